package controller

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/txtar"
	corev1 "k8s.io/api/core/v1"
)

// TestBadManifests reads manifests with mistakes: file "errors" of each archive is what is said about the others.
func TestBadManifests(t *testing.T) {
	archives, err := filepath.Glob("testdata/manifests/*.txtar")
	if err != nil || len(archives) == 0 {
		t.Fatalf("no test data: %v", err)
	}
	for _, name := range archives {
		t.Run(strings.TrimSuffix(filepath.Base(name), ".txtar"), func(t *testing.T) {
			archive, err := txtar.ParseFile(name)
			if err != nil {
				t.Fatal(err)
			}
			before := string(txtar.Format(archive))
			folder := t.TempDir()
			var said strings.Builder
			for i := range archive.Files {
				f := &archive.Files[i]
				if f.Name == "errors" {
					f.Data = []byte(said.String())
					continue
				}
				path := filepath.Join(folder, f.Name)
				if err := os.WriteFile(path, f.Data, 0o644); err != nil {
					t.Fatal(err)
				}
				_, err := readManifests(path)
				if err == nil {
					t.Errorf("%s: no error", f.Name)
					continue
				}
				said.WriteString(strings.ReplaceAll(err.Error(), folder+"/", "") + "\n")
			}
			after := string(txtar.Format(archive))
			if *update {
				if err := os.WriteFile(name, []byte(after), 0o644); err != nil {
					t.Fatal(err)
				}
			} else if diff := cmp.Diff(before, after); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

// What the API server would fill in is filled in.
func TestManifestDefaults(t *testing.T) {
	svc := objects(t, "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {clusterIP: 10.96.0.1, ipFamilyPolicy: PreferDualStack, ports: [{port: 80}]}\n")[0].(*corev1.Service)
	want := corev1.ServiceSpec{
		Type: corev1.ServiceTypeClusterIP, ClusterIP: "10.96.0.1", ClusterIPs: []string{"10.96.0.1"},
		IPFamilyPolicy: svc.Spec.IPFamilyPolicy, IPFamilies: []corev1.IPFamily{v4, v6},
		Ports: []corev1.ServicePort{{Protocol: corev1.ProtocolTCP, Port: 80}}, SessionAffinity: corev1.ServiceAffinityNone,
	}
	if diff := cmp.Diff(want, svc.Spec); diff != "" || svc.Namespace != "default" {
		t.Errorf("namespace %q, spec (-want +got):\n%s", svc.Namespace, diff)
	}
}

// TestFiles changes files while they are in use: one with a mistake keeps its last good content, and only it.
func TestFiles(t *testing.T) {
	s := newStandalone(t)
	synctest.Test(t, func(t *testing.T) {
		s.t = t
		s.write(
			"1.yaml", poolManifest("red", "192.0.2.0/29"),
			"2.yaml", wish("a", 80, ""),
			"3.json", `{"apiVersion":"v1","kind":"Service","metadata":{"name":"b"},"spec":{"type":"LoadBalancer","ports":[{"port":80}]}}`,
			"4.yml", "# nothing but a comment\n---\n",
			"notes.txt", "kind: Nothing",
			"5.yaml", "apiVersion: v1\nkind: Service\nmetadata: {name: c}\nspec: {prots: []}\n", // wrong from the beginning
		)
		s.start()
		defer s.stop()
		want := services{"a": "192.0.2.0 red", "b": "192.0.2.1 red"}
		s.expect("start", want)
		typo := func(file, field string) string {
			return `msg="manifest refused, its last good content stays in use" error="` + file + `: document 1: strict decoding error: unknown field \"` + field + `\""`
		}
		if got := s.log.happened(); !slices.Contains(got, strings.ReplaceAll(typo("5.yaml", "spec.prots"), "error=\"", "error=\""+s.folder+"/")) {
			t.Errorf("said\n%s", strings.Join(got, "\n"))
		}

		s.write("2.yaml", strings.Replace(wish("a", 80, ""), "ports", "prots", 1)+wish("d", 80, ""), "5.yaml", wish("c", 80, ""))
		want["c"] = "192.0.2.2 red" // d is in a file with a mistake
		s.expect("typo", want)
		s.said("typo", typo("2.yaml", "spec.prots"), `Normal event on default/c: IPAllocated: assigned IP ["192.0.2.2"] from pool red`)
		s.write("4.yml", "# another comment\n")
		s.expect("another file changes", want)
		s.said("another file changes")

		s.write("2.yaml", wish("a", 80, "")+wish("d", 80, ""))
		want["d"] = "192.0.2.3 red"
		s.expect("mended", want)
		s.log.happened()

		s.write("6.yaml", wish("a", 81, ""))
		s.expect("twice", want)
		s.said("twice", `msg="object is there twice, the first one is used" error="6.yaml: Service default/a is in 2.yaml already"`)
		if port := s.snapshot.services[nameOf(objects(t, wish("a", 1, ""))[0])].Spec.Ports[0].Port; port != 80 {
			t.Errorf("port %d of the second one is used", port)
		}
		s.write("4.yml", "# yet another comment\n")
		s.said("still twice")
		s.write("2.yaml", wish("d", 80, ""))
		s.expect("the second one takes its place", want)
		if port := s.snapshot.services[nameOf(objects(t, wish("a", 1, ""))[0])].Spec.Ports[0].Port; port != 81 {
			t.Errorf("port %d of the one that is gone is used", port)
		}

		s.write("6.yaml", "")
		delete(want, "a")
		s.expect("removed", want)
		if content, err := os.ReadFile(s.store); err != nil || strings.Contains(string(content), "default/a") {
			t.Errorf("its address is not forgotten: %s, %v", content, err)
		}
		s.write("6.yaml", wish("e", 80, ""), "7.yaml", wish("a", 80, age(2020)))
		want["a"], want["e"] = "192.0.2.4 red", "192.0.2.0 red"
		s.expect("back, after somebody else took its address", want)
	})
}

// TestFilesWatch runs as `longshore run` does, and waits for changes to be seen.
func TestFilesWatch(t *testing.T) {
	folder, inbox := t.TempDir(), NewInbox()
	f, err := NewFiles(folder, filepath.Join(t.TempDir(), "assignments.json"), slog.New(slog.DiscardHandler), inbox)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- f.Run(ctx) }()
	seen := newSnapshot()
	wait := func(what string, ok func() bool) {
		t.Helper()
		for end := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
			changes, _ := inbox.take()
			seen.update(changes)
			if ok() {
				return
			}
			if time.Now().After(end) {
				t.Fatalf("%s: not seen", what)
			}
		}
	}
	wait("synced", func() bool { _, synced := inbox.take(); return synced })
	file := filepath.Join(folder, "web.yaml")
	if err := os.WriteFile(file, []byte(wish("web", 80, "")), 0o644); err != nil {
		t.Fatal(err)
	}
	wait("a new file", func() bool { return len(seen.services) == 1 })
	editor := filepath.Join(folder, ".web.yaml.swp") // writes another file and renames it
	if err := os.WriteFile(editor, []byte(wish("web", 80, "")+wish("api", 80, "")), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(editor, file); err != nil {
		t.Fatal(err)
	}
	wait("a file that was replaced", func() bool { return len(seen.services) == 2 })
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	wait("a file that was removed", func() bool { return len(seen.services) == 0 })
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Run: %v", err)
	}
}

func TestNewFilesErrors(t *testing.T) {
	folder := t.TempDir()
	write := func(name, content string) string {
		path := filepath.Join(folder, name)
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	file := write("file", "")
	for _, test := range []struct{ name, folder, store, want string }{
		{"no folder", filepath.Join(folder, "none"), file, "manifests: stat FOLDER/none: no such file or directory"},
		{"a file", file, file, "manifests: FOLDER/file is not a folder"},
		{"store is a folder", folder, folder, "assignments of the last run: read FOLDER: is a directory"},
		{"store is not JSON", folder, write("store", "addresses:"), "assignments of the last run: FOLDER/store: invalid character 'a' looking for beginning of value"},
		{"store with another address", folder, write("other", `{"default/a":{"addresses":["192.0.2.300"]}}`),
			`assignments of the last run: FOLDER/other: ParseAddr("192.0.2.300"): IPv4 field has value >255`},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, err := NewFiles(test.folder, test.store, slog.New(slog.DiscardHandler))
			if err == nil {
				t.Fatal("no error")
			}
			if got := strings.ReplaceAll(err.Error(), folder, "FOLDER"); got != test.want {
				t.Errorf("error %q, want %q", got, test.want)
			}
		})
	}
	f, err := NewFiles(folder, write("null", "null"), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if err := f.WriteAddresses(t.Context(), serviceWith(asIs), addrs("192.0.2.1"), "red"); err != nil {
		t.Errorf("a store that says null: %v", err)
	}
}
