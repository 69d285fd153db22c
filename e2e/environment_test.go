package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/u-root/u-root/pkg/kmodule"
)

// TestWithoutRoot: who is not root is told so, by every command that needs it.
func TestWithoutRoot(t *testing.T) {
	binary, err := onMemory("../bin/longshore")
	if err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"ipvsadm", "-Ln"},
		{"run", "--manifests", "/"},
		{"agent", "--namespace", "x", "--kubeconfig", kubeconfig(t)},
	} {
		command := exec.Command(binary, args...)
		command.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		out, err := command.CombinedOutput()
		if err == nil || !strings.Contains(string(out), "needs root") {
			t.Errorf("longshore %s as nobody: %v: %s", strings.Join(args, " "), err, out)
		}
	}
}

// kubeconfig is one that can be read by everybody and leads nowhere.
func kubeconfig(t *testing.T) string {
	t.Helper()
	name := filepath.Join("/run", "longshore-nowhere.kubeconfig")
	text := "{apiVersion: v1, kind: Config, clusters: [{name: c, cluster: {server: 'http://127.0.0.1:1'}}], contexts: [{name: c, context: {cluster: c}}], current-context: c}"
	if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Remove(name) })
	return name
}

// TestWithoutIPVS: where the kernel has no IPVS and cannot load it, that is said, with the module's name and the
// way to get it. The modules are taken out for that, which is done in the lab's own machine only: on a host that has IPVS
// the test runs itself there.
func TestWithoutIPVS(t *testing.T) {
	if os.Getenv("LONGSHORE_LAB") != "vm" {
		out, err := exec.Command("../bin/inlab", "-vm", "--", os.Args[0], "-test.run=^TestWithoutIPVS$").CombinedOutput()
		if err != nil {
			t.Fatalf("in the lab's own machine: %v: %s", err, out)
		}
		return
	}
	binary, err := onMemory("../bin/longshore")
	if err != nil {
		t.Fatal(err)
	}
	removed := removeIPVS(t)
	defer func() {
		for _, name := range removed {
			if err := kmodule.Probe(name, ""); err != nil {
				t.Errorf("load %s again: %v", name, err)
			}
		}
	}()
	// The module can be loaded by system call: nothing is missing then.
	if out, err := exec.Command(binary, "ipvsadm", "-Ln").CombinedOutput(); err != nil {
		t.Errorf("longshore ipvsadm -Ln with the module on disk: %v: %s", err, out)
	}
	removeIPVS(t)
	// Without the files of the modules, and without the program by which the kernel loads them itself, it cannot.
	const helper = "/proc/sys/kernel/modprobe"
	program, err := os.ReadFile(helper)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(helper, []byte("/nonexistent"), 0o644); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := os.WriteFile(helper, program, 0o644); err != nil {
			t.Error(err)
		}
	}()
	command := exec.Command("unshare", "--mount", "sh", "-c", "mount -t tmpfs none /lib/modules && exec "+binary+" ipvsadm -Ln")
	out, err := command.CombinedOutput()
	for _, want := range []string{"no IPVS", "module ip_vs", "modprobe ip_vs"} {
		if err == nil || !strings.Contains(string(out), want) {
			t.Errorf("longshore ipvsadm -Ln without IPVS: %v: %s; want %q in it", err, out, want)
		}
	}
}

// removeIPVS removes ip_vs and all that uses it from the kernel, and returns what it removed, ip_vs first.
func removeIPVS(t *testing.T) (removed []string) {
	t.Helper()
	modules, err := os.ReadFile("/proc/modules")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(modules)) {
		if name := strings.Fields(line)[0]; strings.HasPrefix(name, "ip_vs_") {
			removed = append(removed, name)
		}
	}
	removed = append(removed, "ip_vs")
	for _, name := range removed {
		if err := kmodule.Delete(name, 0); err != nil {
			t.Fatalf("remove module %s: %v", name, err)
		}
	}
	slices.Reverse(removed)
	return removed
}
