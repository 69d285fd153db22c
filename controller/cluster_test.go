package controller

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"k8s.io/apimachinery/pkg/types"

	"github.com/longshore-lb/longshore/config/v1beta1"
)

// standalone is the cluster's loop over a folder of manifests, as `longshore run` has it. The test reads the folder
// itself, so that it knows when.
type standalone struct {
	t             *testing.T
	folder, store string
	log           *machine // its journal has the events

	files    *Files
	seen     *Inbox // what an agent gets to see
	snapshot *snapshot
	stop     func()
}

func newStandalone(t *testing.T) *standalone {
	s := &standalone{t: t, folder: t.TempDir(), log: newMachine(t, "n1")}
	s.store = filepath.Join(t.TempDir(), "state", "assignments.json")
	return s
}

// start begins a run; it must be stopped within the bubble.
func (s *standalone) start() {
	s.t.Helper()
	forCluster := NewInbox()
	s.seen, s.snapshot = NewInbox(), newSnapshot()
	var err error
	s.files, err = NewFiles(s.folder, s.store, slog.New(slog.NewTextHandler(journal{s.log}, &slog.HandlerOptions{
		Level: slog.LevelError,
		ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			if a.Key == slog.TimeKey || a.Key == slog.LevelKey {
				return slog.Attr{}
			}
			return a
		},
	})), forCluster, s.seen)
	if err != nil {
		s.t.Fatal(err)
	}
	forCluster.Put(StandaloneNode("n1", addrs("192.0.2.10")))
	c := NewCluster(ClusterOptions{Inbox: forCluster, Writer: s.files, Events: events{s.log}, Log: slog.New(slog.DiscardHandler)})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { c.Run(ctx); close(done) }()
	s.stop = func() { cancel(); <-done }
	s.files.read()
	forCluster.Synced()
	s.seen.Synced()
}

// journal writes lines of a log to a machine's journal, without the name of the test's folder.
type journal struct{ *machine }

func (j journal) Write(line []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.journal = append(j.journal, strings.TrimSpace(string(line)))
	return len(line), nil
}

// write writes files, given as name and content, and reads the folder. Without content a file is removed.
func (s *standalone) write(pairs ...string) {
	s.t.Helper()
	for i := 0; i < len(pairs); i += 2 {
		name := filepath.Join(s.folder, pairs[i])
		var err error
		if pairs[i+1] == "" {
			err = os.Remove(name)
		} else {
			err = os.WriteFile(name, []byte(pairs[i+1]), 0o644)
		}
		if err != nil {
			s.t.Fatal(err)
		}
	}
	if s.files != nil {
		s.files.read()
	}
}

// services is the Services as an agent sees them, each with addresses and pool.
func (s *standalone) services() map[string]string {
	synctest.Wait()
	changes, _ := s.seen.take()
	s.snapshot.update(changes)
	out := map[string]string{}
	for name, svc := range s.snapshot.services {
		out[name.Name] = strings.TrimSpace(describe(Assignment{Addresses: ingressIPs(svc), Pool: svc.Annotations[AllocatedFromAnnotation]}))
	}
	return out
}

func (s *standalone) expect(what string, want map[string]string) {
	s.t.Helper()
	if diff := cmp.Diff(want, s.services()); diff != "" {
		s.t.Errorf("%s: Services (-want +got):\n%s", what, diff)
	}
}

// said is what was logged and what events were sent.
func (s *standalone) said(what string, want ...string) {
	s.t.Helper()
	got := s.log.happened()
	for i := range got {
		got[i] = strings.ReplaceAll(got[i], s.folder+"/", "")
	}
	slices.Sort(got)
	slices.Sort(want)
	if diff := cmp.Diff(want, got); diff != "" {
		s.t.Errorf("%s: log and events (-want +got):\n%s", what, diff)
	}
}

type services = map[string]string

func poolManifest(name string, ranges ...string) string {
	return fmt.Sprintf("apiVersion: metallb.io/v1beta1\nkind: IPAddressPool\nmetadata: {name: %s}\nspec: {addresses: [%q]}\n", name, strings.Join(ranges, `","`))
}

// wish is a Service of type LoadBalancer; more is what else there is in its metadata, as in "annotations: {...}".
func wish(name string, port int, more string) string {
	return fmt.Sprintf("apiVersion: v1\nkind: Service\nmetadata: {name: %s, %s}\nspec: {type: LoadBalancer, ports: [{port: %d}]}\n---\n", name, more, port)
}

func wants1(address string) string {
	return "annotations: {metallb.io/loadBalancerIPs: " + address + "}"
}

func age(year int) string {
	return fmt.Sprintf("creationTimestamp: %q", fmt.Sprintf("%d-01-01T00:00:00Z", year))
}

func TestClusterRestart(t *testing.T) {
	s := newStandalone(t)
	synctest.Test(t, func(t *testing.T) {
		s.t = t
		s.write(
			"pool.yaml", poolManifest("red", "192.0.2.8/29"),
			"a.yaml", wish("a", 80, ""),
			"services.yaml", wish("b", 80, wants1("192.0.2.15"))+
				wish("c", 80, "annotations: {metallb.io/allow-shared-ip: dns}")+
				wish("d", 81, "annotations: {metallb.io/allow-shared-ip: dns}")+
				"apiVersion: v1\nkind: Service\nmetadata: {name: inside}\nspec: {ports: [{port: 80}]}\n",
		)
		s.start()
		all := services{"a": "192.0.2.8 red", "b": "192.0.2.15 red", "c": "192.0.2.9 red", "d": "192.0.2.9 red", "inside": ""}
		s.expect("start", all)
		s.said("start",
			`Normal event on default/a: IPAllocated: assigned IP ["192.0.2.8"] from pool red`,
			`Normal event on default/b: IPAllocated: assigned IP ["192.0.2.15"] from pool red`,
			`Normal event on default/c: IPAllocated: assigned IP ["192.0.2.9"] from pool red`,
			`Normal event on default/d: IPAllocated: assigned IP ["192.0.2.9"] from pool red`,
		)
		content, err := os.ReadFile(s.store)
		if err != nil {
			t.Fatal(err)
		}
		const kept = `{
  "default/a": {
    "addresses": [
      "192.0.2.8"
    ],
    "pool": "red"
  },
  "default/b": {
    "addresses": [
      "192.0.2.15"
    ],
    "pool": "red"
  },
  "default/c": {
    "addresses": [
      "192.0.2.9"
    ],
    "pool": "red"
  },
  "default/d": {
    "addresses": [
      "192.0.2.9"
    ],
    "pool": "red"
  }
}`
		if diff := cmp.Diff(kept, string(content)); diff != "" {
			t.Errorf("assignments (-want +got):\n%s", diff)
		}

		// While nothing runs, a is deleted and an older one comes that would have been first. The node's 192.0.2.10 is never given out.
		s.stop()
		s.files = nil
		s.write("a.yaml", "", "older.yaml", wish("older", 80, age(1999))+wish("younger", 80, age(2030)))
		s.start()
		delete(all, "a")
		all["older"], all["younger"] = "192.0.2.8 red", "192.0.2.11 red"
		s.expect("restart", all)
		s.said("restart",
			`Normal event on default/older: IPAllocated: assigned IP ["192.0.2.8"] from pool red`,
			`Normal event on default/younger: IPAllocated: assigned IP ["192.0.2.11"] from pool red`,
		)
		s.stop()

		// What is in a file that has become wrong is not forgotten, even if there is a lower free address when it is mended.
		s.files = nil
		s.write("services.yaml", "kind: Servise", "older.yaml", "")
		s.start()
		s.expect("restart with a broken file", services{})
		s.said("restart with a broken file",
			`msg="manifest refused, its last good content stays in use" error="services.yaml: document 1: apiVersion is missing"`)
		s.write("services.yaml", wish("b", 80, "")+wish("c", 80, ""))
		s.expect("mended", services{"b": "192.0.2.15 red", "c": "192.0.2.9 red"})
		s.said("mended")
		s.stop()
	})
}

func TestClusterWaiting(t *testing.T) {
	s := newStandalone(t)
	synctest.Test(t, func(t *testing.T) {
		s.t = t
		s.write(
			"pool.yaml", poolManifest("red", "192.0.2.1/32"),
			"first.yaml", wish("first", 80, age(2000)),
			"younger.yaml", wish("a", 80, age(2003)),
		)
		s.start()
		defer s.stop()
		s.write("older.yaml", wish("z", 80, age(2002)))
		s.expect("full", services{"first": "192.0.2.1 red", "a": "", "z": ""})
		s.said("full",
			`Normal event on default/first: IPAllocated: assigned IP ["192.0.2.1"] from pool red`,
			`Warning event on default/a: AllocationFailed: no IPv4 address is free in red`,
			`Warning event on default/z: AllocationFailed: no IPv4 address is free in red`,
		)
		s.write("older.yaml", wish("z", 81, age(2002)))
		s.said("the reason is the same as before")
		// In the moment in which the address is freed somebody comes who is younger than who waits, and older than nobody.
		s.write("first.yaml", "", "new.yaml", wish("b", 80, age(2020)))
		s.expect("freed", services{"a": "", "b": "", "z": "192.0.2.1 red"})
		s.said("freed",
			`Normal event on default/z: IPAllocated: assigned IP ["192.0.2.1"] from pool red`,
			`Warning event on default/b: AllocationFailed: no IPv4 address is free in red`,
		)
		// No LoadBalancer any more: the address is free, and not z's when it is one again.
		s.write("older.yaml", "apiVersion: v1\nkind: Service\nmetadata: {name: z}\nspec: {ports: [{port: 80}]}\n")
		s.expect("not a LoadBalancer any more", services{"a": "192.0.2.1 red", "b": "", "z": ""})
		s.log.happened()
		s.write("older.yaml", wish("z", 80, age(2002)))
		s.expect("a LoadBalancer again", services{"a": "192.0.2.1 red", "b": "", "z": ""})
		s.said("a LoadBalancer again", `Warning event on default/z: AllocationFailed: no IPv4 address is free in red`)
		// Another load balancer's class is not ours.
		s.write("younger.yaml", strings.Replace(wish("a", 80, age(2003)), "type: LoadBalancer", "type: LoadBalancer, loadBalancerClass: example.com/other", 1))
		s.expect("another class", services{"a": "", "b": "", "z": "192.0.2.1 red"})
		s.said("another class",
			`Warning event on default/a: ClearAssignment: IP ["192.0.2.1"] is no longer assigned`,
			`Normal event on default/z: IPAllocated: assigned IP ["192.0.2.1"] from pool red`,
		)
	})
}

func TestClusterPools(t *testing.T) {
	s := newStandalone(t)
	synctest.Test(t, func(t *testing.T) {
		s.t = t
		s.write("m-pool.yaml", poolManifest("m", "192.0.2.16/30"), "a.yaml", wish("a", 80, ""), "b.yaml", wish("b", 80, wants1("192.0.2.18")))
		s.start()
		defer s.stop()
		start := services{"a": "192.0.2.16 m", "b": "192.0.2.18 m"}
		s.expect("start", start)
		s.log.happened()

		s.write("m-pool.yaml", poolManifest("m", "192.0.2.19-192.0.2.16"))
		s.expect("range reversed", start)
		s.said("range reversed", `msg="manifest refused, its last good content stays in use" error="m-pool.yaml: document 1: `+
			`IPAddressPool default/m: spec.addresses[0]: \"192.0.2.19-192.0.2.16\": range is reversed"`)
		s.write("m-pool.yaml", poolManifest("m", "192.0.2.16/30"))

		// Pools that overlap one in use, whatever their names.
		s.write("more.yaml", poolManifest("a", "192.0.2.0/24")+"---\n"+poolManifest("z", "192.0.2.17/32"))
		s.expect("overlapping pools", start)
		s.said("overlapping pools",
			`Warning event on default/a: ConfigurationRefused: IPAddressPool default/a: spec.addresses[0]: "192.0.2.0/24": overlaps 192.0.2.16/30 of IPAddressPool m`,
			`Warning event on default/z: ConfigurationRefused: IPAddressPool default/z: spec.addresses[0]: "192.0.2.17/32": overlaps 192.0.2.16/30 of IPAddressPool m`,
		)
		s.write("c.yaml", wish("c", 80, wants1("192.0.2.99")))
		start["c"] = ""
		s.expect("requested address outside", start)
		s.said("requested address outside", `Warning event on default/c: AllocationFailed: annotation metallb.io/loadBalancerIPs: "192.0.2.99" is in no pool`)

		// A pool in use that is edited to overlap another one in use stays as it was; what it makes room for waits.
		s.write("more.yaml", poolManifest("a", "192.0.2.99/32"))
		start["c"] = "192.0.2.99 a"
		s.expect("a has a place", start)
		s.log.happened()
		s.write("more.yaml", poolManifest("a", "192.0.2.16/32"))
		s.expect("a is moved onto m", start)
		s.said("a is moved onto m", `Warning event on default/a: ConfigurationRefused: IPAddressPool default/a: spec.addresses[0]: "192.0.2.16/32": overlaps 192.0.2.16/30 of IPAddressPool m`)

		// m makes room: pool a gets its place and Service a with it, and who no longer fits goes.
		s.write("m-pool.yaml", poolManifest("m", "192.0.2.17-192.0.2.18"))
		s.expect("m makes room", services{"a": "192.0.2.16 a", "b": "192.0.2.18 m", "c": ""})
		s.said("m makes room",
			`Warning event on default/c: AllocationFailed: annotation metallb.io/loadBalancerIPs: "192.0.2.99" is in no pool`,
			`Warning event on default/c: ClearAssignment: IP ["192.0.2.99"] is no longer assigned`,
		)
		s.write("m-pool.yaml", poolManifest("m", "192.0.2.20-192.0.2.21"))
		s.expect("m moves", services{"a": "192.0.2.16 a", "b": "", "c": ""})
		s.write("b.yaml", wish("b", 80, ""))
		s.expect("b takes what there is", services{"a": "192.0.2.16 a", "b": "192.0.2.20 m", "c": ""})
		s.log.happened()
		s.write("m-pool.yaml", poolManifest("m", "192.0.2.24-192.0.2.25"))
		s.expect("m moves again and b with it", services{"a": "192.0.2.16 a", "b": "192.0.2.24 m", "c": ""})
		s.said("m moves again and b with it", `Normal event on default/b: IPAllocated: assigned IP ["192.0.2.24"] from pool m`)
		s.write("m-pool.yaml", "", "more.yaml", "")
		s.expect("no pools", services{"a": "", "b": "", "c": ""})
	})
}

// Pools of two namespaces with one name: the first one is in use.
func TestPoolsOfOneName(t *testing.T) {
	pools := newSnapshot()
	var changes []change
	for _, namespace := range []string{"b", "a"} {
		o := objects(t, poolManifest("red", map[string]string{"a": "192.0.2.0/28", "b": "198.51.100.0/28"}[namespace]))[0]
		o.SetNamespace(namespace)
		changes = append(changes, change{object: o})
	}
	pools.update(changes)
	var g goodPools
	for range 2 {
		got, refused := g.parse(pools.pools)
		if len(got) != 1 || got[0].Ranges[0].String() != "192.0.2.0/28" || len(refused) != 1 ||
			refused[0].err.Error() != `IPAddressPool b/red: metadata.name: "red": is the name of IPAddressPool a/red already` {
			t.Errorf("pools %v, refused %v", got, refused)
		}
	}
}

// TestGoodPools edits several pools at once: what is right is taken over, what is wrong stays as it was.
func TestGoodPools(t *testing.T) {
	type ranges = map[string]string
	for _, test := range []struct {
		name              string
		first, then, want ranges
		refused           []string
	}{
		{"swapped", ranges{"a": "192.0.2.1/32", "b": "192.0.2.2/32"}, ranges{"a": "192.0.2.2/32", "b": "192.0.2.1/32"},
			ranges{"a": "192.0.2.2/32", "b": "192.0.2.1/32"}, nil},
		{"one moves away, another into its place, a third is wrong",
			ranges{"a": "192.0.2.1/32", "b": "192.0.2.2/32", "c": "192.0.2.3/32"},
			ranges{"a": "192.0.2.2/32", "b": "192.0.2.9/32", "c": "typo"},
			ranges{"a": "192.0.2.2/32", "b": "192.0.2.9/32", "c": "192.0.2.3/32"}, []string{"c"}},
		{"moved into the place of one that is wrong", ranges{"a": "192.0.2.1/32", "b": "192.0.2.2/32"}, ranges{"a": "192.0.2.2/32", "b": "typo"},
			ranges{"a": "192.0.2.1/32", "b": "192.0.2.2/32"}, []string{"a", "b"}},
		{"new ones overlap each other", ranges{}, ranges{"b": "192.0.2.0/30", "a": "192.0.2.1/32"}, ranges{"a": "192.0.2.1/32"}, []string{"b"}},
		{"a new one in the place of one that is deleted", ranges{"b": "192.0.2.0/30"}, ranges{"a": "192.0.2.1/32", "c": "typo"}, ranges{"a": "192.0.2.1/32"}, []string{"c"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			var g goodPools
			for i, set := range []ranges{test.first, test.then} {
				s := newSnapshot()
				for name, text := range set {
					o := &v1beta1.IPAddressPool{}
					o.Name, o.Namespace, o.Spec.Addresses = name, "default", []string{text}
					s.update([]change{{object: o}})
				}
				got, refused := g.parse(s.pools)
				if i == 0 {
					continue
				}
				inUse := ranges{}
				for _, p := range got {
					inUse[p.Name] = p.Ranges[0].String()
				}
				var names []string
				for _, r := range refused {
					names = append(names, r.object.Name)
					if want := "IPAddressPool default/" + r.object.Name + ": "; !strings.HasPrefix(r.err.Error(), want) {
						t.Errorf("error %q is not about %s", r.err, r.object.Name)
					}
				}
				if !maps.Equal(inUse, test.want) || !slices.Equal(names, test.refused) {
					t.Errorf("in use %v, refused %v, want %v and %v", inUse, names, test.want, test.refused)
				}
			}
		})
	}
}

// What cannot be written is written later.
func TestClusterRetry(t *testing.T) {
	s := newStandalone(t)
	synctest.Test(t, func(t *testing.T) {
		s.t = t
		if err := os.WriteFile(filepath.Dir(s.store), nil, 0o644); err != nil { // where its folder should be
			t.Fatal(err)
		}
		s.write("all.yaml", poolManifest("red", "192.0.2.1/32")+"---\n"+wish("a", 80, ""))
		if _, err := NewFiles(s.folder, s.store, slog.New(slog.DiscardHandler)); err == nil {
			t.Error("the file with the assignments cannot be read and that is no error")
		}
		if err := os.Remove(filepath.Dir(s.store)); err != nil {
			t.Fatal(err)
		}
		s.start()
		defer s.stop()
		s.expect("start", services{"a": "192.0.2.1 red"})
		s.log.happened()
		if err := os.RemoveAll(filepath.Dir(s.store)); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Dir(s.store), nil, 0o644); err != nil {
			t.Fatal(err)
		}
		s.write("all.yaml", poolManifest("red", "192.0.2.2/32")+"---\n"+wish("a", 80, ""))
		s.expect("not written, so not told either", services{"a": "192.0.2.1 red"})
		time.Sleep(retryAfter)
		s.said("not written")
		if err := os.Remove(filepath.Dir(s.store)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(retryAfter)
		s.expect("written", services{"a": "192.0.2.2 red"})
		s.said("written", `Normal event on default/a: IPAllocated: assigned IP ["192.0.2.2"] from pool red`)
	})
}

// Of several changes to one object the last is kept, and none is handed out before all objects are there.
func TestInbox(t *testing.T) {
	b := NewInbox()
	svc := objects(t, wish("a", 80, ""))[0]
	b.Put(svc)
	if changes, synced := b.take(); synced || changes != nil {
		t.Errorf("before it is synced: %v", changes)
	}
	b.Synced()
	b.Remove(svc)
	b.Put(svc)
	changes, synced := b.take()
	if !synced || len(changes) != 1 || changes[0].deleted || nameOf(changes[0].object) != (types.NamespacedName{Namespace: "default", Name: "a"}) {
		t.Errorf("synced %t, changes %v: want one, the last", synced, changes)
	}
	if changes, _ := b.take(); len(changes) != 0 {
		t.Errorf("taken twice: %v", changes)
	}
}
