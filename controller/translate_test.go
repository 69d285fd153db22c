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
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/txtar"
	corev1 "k8s.io/api/core/v1"
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
			lastGood := map[string]Options{}
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

func translateAll(t *testing.T, text []byte, desired *ipvs.Desired, lastGood map[string]Options) string {
	t.Helper()
	node := NodeView{
		Name:          "n1",
		Zone:          "east",
		Addresses:     []netip.Addr{netip.MustParseAddr("172.31.0.11"), netip.MustParseAddr("fd31::11")},
		NodePortAddrs: []netip.Addr{netip.MustParseAddr("172.31.0.11"), netip.MustParseAddr("fd31::11")},
		Others:        map[netip.Addr]bool{netip.MustParseAddr("172.31.0.12"): true},
		ServiceCIDRs:  []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16"), netip.MustParsePrefix("fd96::/112")},
	}
	s := newSnapshot()
	inbox := NewInbox()
	inbox.Synced()
	for _, document := range documents(t, text) {
		o, err := decodeManifest(document)
		if err != nil {
			t.Fatal(err)
		}
		inbox.Put(o)
	}
	changes, _ := inbox.take()
	s.update(changes)
	usual := Options{Scheduler: "rr", Drain: 15 * time.Minute}
	marks := marks{}
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
	replace := func(owner string, w ipvs.Wish) []ipvs.Operation {
		return desired.ReplaceAll(map[string]ipvs.Wish{owner: w}, time.Time{})
	}
	for _, svc := range sorted(s.services) {
		owner := nameOf(svc).String()
		owners[owner] = true
		last, known := lastGood[owner]
		if !known {
			last = usual
		}
		options, problems := OptionsOf(svc, usual, last)
		lastGood[owner] = options
		translated := Translate(svc, s.slicesOf(nameOf(svc)), node, Terms{
			Options:    options,
			NodeLabels: s.labelsOf,
			PodWeight:  s.podWeight,
			Age:        func(netip.AddrPort) time.Duration { return options.SlowStart / 4 },
			Mark: func(port string, protocol ipvs.Protocol, family corev1.IPFamily) uint32 {
				return marks.of(nameOf(svc), fmt.Sprintf("%s/%s/%s", port, protocol, family))
			},
		})
		ops := replace(owner, translated.Wish)
		problems = append(problems, translated.Problems...)
		for _, c := range desired.Conflicts(owner) {
			problems = append(problems, Problem{"FrontendConflict", c.Frontend.String() + " belongs to " + c.Holder})
		}
		print(ops, problems)
		if p, local := healthCheckOf(svc, s.slicesOf(nameOf(svc)), node.Name); p != 0 {
			fmt.Fprintf(&out, "# health check port %d: %d local endpoints\n", p, local)
		}
	}
	for owner := range lastGood {
		if !owners[owner] {
			print(replace(owner, ipvs.Wish{}), nil)
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
