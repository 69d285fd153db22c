package lab

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// namespaces is where `ip netns` keeps the named ones.
const namespaces = "/run/netns"

// namespace is one network namespace.
type namespace struct {
	name   string // as `ip netns` lists it
	handle netns.NsHandle
	kernel *netlink.Handle // a netlink socket in it
}

func newNamespace(name string) (*namespace, error) {
	n := &namespace{name: prefix + name}
	err := onThread(func() (err error) {
		n.handle, err = netns.NewNamed(n.name)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("add network namespace %s: %w", n.name, err)
	}
	if n.kernel, err = netlink.NewHandleAt(n.handle, unix.NETLINK_ROUTE); err != nil {
		return nil, fmt.Errorf("netlink in %s: %w", n.name, err)
	}
	return n, n.loopbackUp()
}

func (n *namespace) loopbackUp() error {
	lo, err := n.kernel.LinkByName("lo")
	if err != nil {
		return err
	}
	return n.kernel.LinkSetUp(lo)
}

func (n *namespace) path() string { return filepath.Join(namespaces, n.name) }

// run calls f on a thread that is in the namespace. A socket that f opens stays there. f must not start
// goroutines that open sockets: they run on other threads.
func (n *namespace) run(f func() error) error {
	return onThread(func() error {
		if err := netns.Set(n.handle); err != nil {
			return fmt.Errorf("enter network namespace %s: %w", n.name, err)
		}
		return f()
	})
}

// onThread calls f, which may change its network namespace, on a thread of its own. A thread that cannot be
// brought back stays locked to the goroutine and ends with it.
func onThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		home, err := netns.Get()
		if err != nil {
			done <- fmt.Errorf("network namespace of this process: %w", err)
			return
		}
		defer home.Close()
		err = f()
		if netns.Set(home) == nil {
			runtime.UnlockOSThread()
		}
		done <- err
	}()
	return <-done
}

// sysctl sets kernel parameters of the namespace; names have slashes: net/ipv4/ip_forward.
func (n *namespace) sysctl(values map[string]string) error {
	return n.run(func() error {
		for name, value := range values {
			if err := os.WriteFile("/proc/sys/"+name, []byte(value), 0o644); err != nil {
				return fmt.Errorf("set %s to %s in %s: %w", name, value, n.name, err)
			}
		}
		return nil
	})
}

// release closes the handles; the namespace lives on while it has a name, a process or a socket.
func (n *namespace) release() {
	n.kernel.Close()
	n.handle.Close()
}

// removeNamespaces kills what runs in the namespaces called ls-..., of this lab or of a crashed one, and
// removes them.
func removeNamespaces() error {
	paths, err := filepath.Glob(filepath.Join(namespaces, prefix+"*"))
	if err != nil {
		return err
	}
	errs := []error{killProcesses(paths...)}
	for _, p := range paths {
		errs = append(errs, removeNamespace(p))
	}
	return errors.Join(errs...)
}

func removeNamespace(path string) error {
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("unmount %s: %w", path, err)
	}
	return os.Remove(path)
}

// killProcesses ends every process in the namespaces at the paths and waits until they are gone.
func killProcesses(paths ...string) error {
	inside := map[uint64]bool{}
	for _, p := range paths {
		var s unix.Stat_t
		if err := unix.Stat(p, &s); err != nil {
			return fmt.Errorf("look at %s: %w", p, err)
		}
		inside[s.Ino] = true
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		pids, err := processesIn(inside)
		if err != nil || len(pids) == 0 {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("processes %v in %s outlive SIGKILL", pids, strings.Join(paths, " "))
		}
		for _, pid := range pids {
			_ = unix.Kill(pid, unix.SIGKILL) // it may have ended by itself
		}
	}
}

// processesIn lists the processes whose network namespace's inode is among those given; never this process.
func processesIn(inside map[uint64]bool) ([]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		var s unix.Stat_t // fails for a process that has just ended
		if unix.Stat(fmt.Sprintf("/proc/%d/ns/net", pid), &s) == nil && inside[s.Ino] {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}
