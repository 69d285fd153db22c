package controller

import (
	"bytes"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/txtar"
	"k8s.io/apimachinery/pkg/util/yaml"

	"github.com/longshore-lb/longshore/ipvs"
)

var update = flag.Bool("update", false, "write what is printed into testdata")

// TestTranslate reads Kubernetes objects and prints what has to be done to an empty kernel, and then, if there is a
// second set, what to that of the first. Node n1 is 172.31.0.11 and fd31::11, another one is 172.31.0.12.
func TestTranslate(t *testing.T) {
	files, err := filepath.Glob("testdata/translate/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no test data: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			archive, err := txtar.ParseFile(file)
			if err != nil {
				t.Fatal(err)
			}
			before := string(txtar.Format(archive))
			var desired ipvs.Desired
			lastGood := map[string]string{}
			for i := 0; i+1 < len(archive.Files); i += 2 {
				archive.Files[i+1].Data = []byte(translateAll(t, archive.Files[i].Data, &desired, lastGood))
			}
			after := string(txtar.Format(archive))
			if *update {
				if err := os.WriteFile(file, []byte(after), 0o644); err != nil {
					t.Fatal(err)
				}
			} else if diff := cmp.Diff(before, after); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

func translateAll(t *testing.T, text []byte, desired *ipvs.Desired, lastGood map[string]string) string {
	t.Helper()
	node := NodeView{
		Name:          "n1",
		Addresses:     []netip.Addr{netip.MustParseAddr("172.31.0.11"), netip.MustParseAddr("fd31::11")},
		NodePortAddrs: []netip.Addr{netip.MustParseAddr("172.31.0.11"), netip.MustParseAddr("fd31::11")},
		Others:        map[netip.Addr]bool{netip.MustParseAddr("172.31.0.12"): true},
		ServiceCIDRs:  []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16"), netip.MustParsePrefix("fd96::/112")},
	}
	s := newSnapshot()
	var changes []change
	for _, document := range documents(t, text) {
		o, err := decodeManifest(document)
		if err != nil {
			t.Fatal(err)
		}
		changes = append(changes, change{object: o})
	}
	s.update(changes)
	var out bytes.Buffer
	owners := map[string]bool{}
	print := func(ops []ipvs.Operation, problems []Problem) {
		for _, p := range problems {
			fmt.Fprintf(&out, "# %s: %s\n", p.Reason, p.Message)
		}
		for _, o := range ops {
			fmt.Fprintln(&out, o)
		}
	}
	for _, svc := range sorted(s.services) {
		owner := nameOf(svc).String()
		owners[owner] = true
		if lastGood[owner] == "" {
			lastGood[owner] = "rr"
		}
		scheduler, problems := SchedulerOf(svc, "rr", lastGood[owner])
		lastGood[owner] = scheduler
		state, more := Translate(svc, s.slicesOf(nameOf(svc)), node, scheduler)
		ops := desired.Replace(owner, state)
		for _, c := range desired.Conflicts(owner) {
			more = append(more, Problem{"FrontendConflict", c.Frontend.String() + " belongs to " + c.Holder})
		}
		print(ops, append(problems, more...))
	}
	for owner := range lastGood {
		if !owners[owner] {
			print(desired.Replace(owner, ipvs.State{}), nil)
			delete(lastGood, owner)
		}
	}
	return out.String()
}

func documents(t *testing.T, text []byte) [][]byte {
	t.Helper()
	var out [][]byte
	for part := range strings.SplitSeq(string(text), "\n---\n") {
		if !isEmpty([]byte(part)) {
			j, err := yaml.ToJSON([]byte(part))
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, j)
		}
	}
	return out
}
