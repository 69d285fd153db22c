package kernel

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// What modules.dep lists after the colon is in no useful order, and may name the indirect dependencies or not.
func TestInsertionOrderPutsEveryModuleAfterItsNeeds(t *testing.T) {
	root := t.TempDir()
	dir := filepath.Join(root, "lib/modules/6.1.0")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	needs := map[string][]string{
		"ip_vs_mh":       {"ip_vs", "nf_conntrack", "libcrc32c"},
		"ip_vs":          {"libcrc32c", "nf_conntrack", "nf_defrag_ipv4"},
		"nf_conntrack":   {"nf_defrag_ipv4", "libcrc32c"},
		"nf_defrag_ipv4": nil,
		"libcrc32c":      nil,
		"unrelated":      nil,
	}
	var dep strings.Builder
	for module, list := range needs {
		dep.WriteString(module + ".ko:")
		for _, d := range list {
			dep.WriteString(" " + d + ".ko")
		}
		dep.WriteString("\n")
	}
	for file, content := range map[string]string{"modules.dep": dep.String(), "modules.builtin": "kernel/overlay.ko\n"} {
		if err := os.WriteFile(filepath.Join(dir, file), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}

	order, err := insertionOrder(root, "6.1.0", []string{"overlay", "ip_vs_mh", "ip_vs_of_the_future", "nf_conntrack"})
	if err == nil || !strings.Contains(err.Error(), "ip_vs_of_the_future") {
		t.Errorf("error = %v, want one that names the unknown module", err)
	}
	var names []string
	for _, path := range order {
		if filepath.Dir(path) != dir {
			t.Errorf("path %s is not in %s", path, dir)
		}
		name := strings.TrimSuffix(filepath.Base(path), ".ko")
		for _, need := range needs[name] {
			if !slices.Contains(names, need) {
				t.Errorf("%s comes before %s, which it needs", name, need)
			}
		}
		names = append(names, name)
	}
	slices.Sort(names)
	if diff := cmp.Diff([]string{"ip_vs", "ip_vs_mh", "libcrc32c", "nf_conntrack", "nf_defrag_ipv4"}, names); diff != "" {
		t.Errorf("modules (-want +got):\n%s", diff)
	}
}

func TestMissingNamesEveryPieceAndItsPackage(t *testing.T) {
	const qemu = "qemu-system-x86_64 is not installed: Debian package qemu-system-x86"
	for _, tt := range []struct {
		name       string
		goarch     string
		installed  []string
		haveKernel bool
		want       []string
	}{
		{"all there", "amd64", []string{"qemu-system-x86_64", "apt-cache", "apt-get", "dpkg-deb", "depmod", "xz"}, false, nil},
		{"a cached kernel needs no apt", "amd64", []string{"qemu-system-x86_64"}, true, nil},
		{"no QEMU", "amd64", nil, true, []string{qemu}},
		{"nothing", "arm64", nil, false, []string{
			"this is arm64: the virtual machine is amd64 only, elsewhere run on a kernel that has ip_vs",
			qemu,
			"apt-cache is not installed: Debian package apt",
			"apt-get is not installed: Debian package apt",
			"dpkg-deb is not installed: Debian package dpkg",
			"depmod is not installed: Debian package kmod",
			"xz is not installed: Debian package xz-utils",
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			lookPath := func(name string) (string, error) {
				if slices.Contains(tt.installed, name) {
					return "/usr/bin/" + name, nil
				}
				return "", exec.ErrNotFound
			}
			if diff := cmp.Diff(tt.want, missing(tt.goarch, lookPath, tt.haveKernel)); diff != "" {
				t.Errorf("missing (-want +got):\n%s", diff)
			}
		})
	}
}

func TestExitStatusIsTheShells(t *testing.T) {
	for _, tt := range []struct {
		script string
		want   int
	}{
		{"exit 0", 0}, {"exit 7", 7}, {"exit 255", 255},
		{"kill -KILL $$", 137}, {"kill -TERM $$", 143}, {"ulimit -c 0; kill -ABRT $$", 134},
	} {
		cmd := exec.Command("sh", "-c", tt.script)
		if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
			t.Fatal(err)
		}
		if got := exitStatus(unix.WaitStatus(cmd.ProcessState.Sys().(syscall.WaitStatus))); got != tt.want {
			t.Errorf("%q: exit status %d, want %d", tt.script, got, tt.want)
		}
	}
}

func TestDependencyOfThePackage(t *testing.T) {
	for _, tt := range []struct{ output, want string }{
		{"linux-image-amd64\n  Depends: linux-image-6.1.0-56-amd64\n  Conflicts: x\n", "linux-image-6.1.0-56-amd64"},
		{"linux-image-amd64\n", ""},
		{"", ""},
	} {
		if got, ok := dependency(tt.output); got != tt.want || ok != (tt.want != "") {
			t.Errorf("dependency(%q) = %q, %v; want %q", tt.output, got, ok, tt.want)
		}
	}
}

// bzImage makes a file with a boot header of one setup sector, and the payload right behind it.
func bzImage(payload string, length int) []byte {
	image := make([]byte, 2*512)
	image[0x1f1] = 1
	copy(image[0x202:], "HdrS")
	image = binary.LittleEndian.AppendUint32(image[:0x248], 16)
	image = binary.LittleEndian.AppendUint32(image, uint32(length))
	return append(append(image[:1024:1024], make([]byte, 16)...), payload...)
}

func TestPayloadOfKernel(t *testing.T) {
	const xz, gzip = "\xfd7zXZ\x00compressed", "\x1f\x8bcompressed"
	for _, tt := range []struct {
		name      string
		image     []byte
		want      string
		wantError string
	}{
		{"xz", bzImage(xz+"more", len(xz)), xz, ""},
		{"not xz", bzImage(gzip, len(gzip)), "", ""},
		{"cut short", bzImage(xz, len(xz)+1), "", "bzImage cut short"},
		{"no header", make([]byte, 4096), "", "not a bzImage"},
		{"empty", nil, "", "not a bzImage"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := xzPayload(tt.image)
			if string(got) != tt.want {
				t.Errorf("payload %q, want %q", got, tt.want)
			}
			if (err == nil) != (tt.wantError == "") || err != nil && err.Error() != tt.wantError {
				t.Errorf("error %v, want %q", err, tt.wantError)
			}
		})
	}
}

func TestOnlyAStaticProgramIsInit(t *testing.T) {
	sh, err := os.Open("/bin/sh")
	if err != nil {
		t.Fatal(err)
	}
	defer sh.Close()
	if err := static(sh); err == nil || !strings.Contains(err.Error(), "CGO_ENABLED=0") {
		t.Errorf("a dynamic program: error %v, want one that says how to build it", err)
	}
}

// A process that the program leaves behind holds the pipe open; what was written must arrive all the same, also when
// the host is slow to take it, and nothing may wait for that process.
func TestRelayEndsWithTheProgramAndLosesNothing(t *testing.T) {
	near, far := net.Pipe()
	defer near.Close()
	out, in, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close() // open to the end of the test
	want := bytes.Repeat([]byte("0123456789abcdef"), 60<<10/16)
	if _, err := in.Write(want); err != nil {
		t.Fatal(err)
	}
	exited := make(chan struct{})
	close(exited)
	s := &streams{}
	done := s.relay(newWire(far), kindOutput, out, exited)
	go func() {
		<-done
		far.Close()
	}()

	time.Sleep(100 * time.Millisecond) // longer than the relay waits for more
	var got []byte
	for host := newWire(near); ; {
		m, err := host.receive()
		if err != nil {
			break
		}
		if m.Kind != kindOutput {
			t.Fatalf("message of kind %d, want output", m.Kind)
		}
		got = append(got, m.Data...)
	}
	if !bytes.Equal(want, got) {
		t.Errorf("%d bytes arrived, want the %d written", len(got), len(want))
	}
}

func TestLockWaitsForTheOther(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	free := func() { t.Error("waits for a lock that is free") }
	unlock, err := lock(t.Context(), path, free)
	if err != nil {
		t.Fatal(err)
	}

	gaveUp := errors.New("gave up")
	ctx, cancel := context.WithCancelCause(t.Context())
	if _, err := lock(ctx, path, func() { cancel(gaveUp) }); !errors.Is(err, gaveUp) {
		t.Errorf("a second lock, given up: error %v, want %v", err, gaveUp)
	}

	waited := false
	again, err := lock(t.Context(), path, func() { waited = true; unlock() })
	if err != nil {
		t.Fatal(err)
	}
	again()
	if !waited {
		t.Error("a second lock did not wait")
	}
}
