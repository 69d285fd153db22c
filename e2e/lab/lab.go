// Package lab is a bare-metal Kubernetes cluster and the network around it, on one Linux machine.
//
// Machines are network namespaces joined by two switches; the control plane, the routers and the pods are
// real programs in them. A scenario reads like this:
//
//	l := lab.ForTest(t, lab.Config{Nodes: 2})
//	cluster, err := l.StartCluster(ctx)
//	err = cluster.Apply(ctx, deployment)
//	frr, err := l.Router.StartFRR(ctx, lab.RouterConfig(64512, 64513))
//	answer, err := l.Client.Ask(ctx, "tcp", netip.MustParseAddrPort("172.31.0.200:80"))
//	err = l.Nodes[0].Kill()
//
// The machines and their addresses, which never change:
//
//	lan 172.31.0.0/24 fd31::/64   router .1 ::1   bird .2 ::2   api .5 ::5   n1 .11 ::11 ...   client .100 ::100
//	wan 172.30.0.0/24 fd30::/64   router .1 ::1   bird .2 ::2                               outside .100 ::100
//	pods of node i                10.244.i.0/24 fd44:0:0:i::/64, joined as Config.PodNetwork says
//	services                      10.96.0.0/16 fd96::/112, of which no machine has a route
//
// Every namespace is called ls-NAME, so that `ip netns exec ls-n1 ip route` looks into node 1. Only one lab
// exists on a machine at a time; [New] waits for the one before and removes what a crashed one left.
//
// Needed: root, and the Debian packages iproute2, util-linux, nftables, and those of the programs that a
// scenario starts (frr, bird2, tcpdump). The programs of the control plane come from [Build]. A program that starts a lab must
// call [Main] first.
package lab

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// prefix starts the name of every namespace of a lab.
const prefix = "ls-"

// MaxNodes is how many nodes the addresses have room for.
const MaxNodes = 80

// Config says what lab to make.
type Config struct {
	Scenario   string       // names the folder of the records; "" = lab
	Nodes      int          // 1 to MaxNodes
	PodNetwork PodNetwork   // "" = Routed
	Log        *slog.Logger // what the lab does; nil = nowhere
}

// Lab is one set of machines, all switched on. Its methods may be called from any goroutine.
type Lab struct {
	Router  *Host   // between lan and wan: forwards, spreads flows over equal routes by address and port
	Bird    *Host   // a second router between the same two networks
	Client  *Host   // on the lan, sees the nodes' ARP and NDP; reaches the wan through Router
	Outside *Host   // on the wan, reaches the lan and all else through Router
	API     *Host   // where the control plane runs
	Nodes   []*Node // Nodes[0] is n1

	log        *slog.Logger
	podNetwork PodNetwork
	network    *network
	records    *records
	state      string // folder on a tmpfs for what dies with the lab: keys, sockets, databases
	lock       *os.File
	captures   []*Process
	cluster    *Cluster
}

// New makes the machines and the network; nothing else runs yet. If another lab exists it waits until that one
// is closed or ctx ends. Close must be called.
func New(ctx context.Context, c Config) (*Lab, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("the lab needs root: it makes network namespaces")
	}
	if c.Nodes < 1 || c.Nodes > MaxNodes {
		return nil, fmt.Errorf("a lab has 1 to %d nodes, not %d", MaxNodes, c.Nodes)
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	l := &Lab{log: c.Log, podNetwork: cmp.Or(c.PodNetwork, Routed)}
	if !slices.Contains([]PodNetwork{Routed, Bridge, VXLAN}, l.podNetwork) {
		return nil, fmt.Errorf("Config.PodNetwork is %q, must be %s, %s or %s", l.podNetwork, Routed, Bridge, VXLAN)
	}
	if err := l.open(ctx, c); err != nil {
		return nil, errors.Join(fmt.Errorf("make the lab: %w", err), l.Close())
	}
	return l, nil
}

func (l *Lab) open(ctx context.Context, c Config) (err error) {
	if l.lock, err = onlyLab(ctx, c.Log); err != nil {
		return err
	}
	if err := removeNamespaces(); err != nil {
		return fmt.Errorf("remove what an earlier lab left: %w", err)
	}
	if l.records, err = newRecords(c.Scenario); err != nil {
		return err
	}
	if l.state, err = newState(); err != nil {
		return err
	}
	return l.wire(c.Nodes)
}

// ForTest makes a lab for a test, named after it, and closes it at the test's end; the records are kept if the
// test failed. It fails the test if there can be no lab.
func ForTest(t testing.TB, c Config) *Lab {
	t.Helper()
	if c.Scenario == "" {
		c.Scenario = t.Name()
	}
	l, err := New(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("records kept in %s", l.KeepRecords())
		}
		if err := l.Close(); err != nil {
			t.Errorf("close the lab: %v", err)
		}
	})
	return l
}

// KeepRecords makes Close leave the logs and captures where they are, and tells the folder.
func (l *Lab) KeepRecords() string {
	l.records.keep.Store(true)
	return l.records.folder
}

// Records is the folder of this lab's logs and captures: LONGSHORE_LAB_OUT, or longshore/out in the user's cache
// folder, and in it the scenario's name.
func (l *Lab) Records() string { return l.records.folder }

// Close ends every process of the lab and removes all of it.
func (l *Lab) Close() error {
	var errs []error
	if l.cluster != nil {
		l.cluster.stop()
	}
	l.stopCaptures()
	if l.lock != nil {
		errs = append(errs, removeNamespaces())
	}
	if l.network != nil {
		l.network.close()
	}
	if l.state != "" {
		errs = append(errs, os.RemoveAll(l.state))
	}
	if l.records != nil {
		errs = append(errs, l.records.close())
	}
	if l.lock != nil {
		errs = append(errs, l.lock.Close())
		l.lock = nil
	}
	return errors.Join(errs...)
}

// Host finds a machine by its name: router, bird, client, outside, api, n1, n2 ... It is nil if there is none.
func (l *Lab) Host(name string) *Host {
	for _, h := range l.hosts() {
		if h.Name == name {
			return h
		}
	}
	return nil
}

// hosts is every machine of the lan and the wan.
func (l *Lab) hosts() []*Host {
	all := []*Host{l.Router, l.Bird, l.Client, l.Outside, l.API}
	for _, n := range l.Nodes {
		all = append(all, n.Host)
	}
	return all
}

// onlyLab takes the machine's lock for labs. The kernel drops it when the process ends, however it ends.
func onlyLab(ctx context.Context, log *slog.Logger) (*os.File, error) {
	f, err := os.OpenFile("/run/longshore-lab.lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	for waiting := false; ; waiting = true {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, errors.Join(fmt.Errorf("lock %s: %w", f.Name(), err), f.Close())
		}
		if !waiting {
			log.Info("another lab is running on this machine, waiting for its end")
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(fmt.Errorf("another lab is running on this machine: %w", context.Cause(ctx)), f.Close())
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// newState makes the state folder on a tmpfs if the machine has one, so that a database costs no disk writes.
func newState() (string, error) {
	const name = "longshore-lab"
	for _, parent := range []string{"/run", "/dev/shm", os.TempDir()} {
		var s unix.Statfs_t
		if unix.Statfs(parent, &s) != nil || s.Type != unix.TMPFS_MAGIC && parent != os.TempDir() {
			continue
		}
		folder := filepath.Join(parent, name)
		if err := os.RemoveAll(folder); err != nil {
			return "", err
		}
		return folder, os.Mkdir(folder, 0o755)
	}
	return "", fs.ErrNotExist // not reached: the temporary folder is always tried
}

// Await calls check until it returns nil, four times a second. If that takes longer than within, or ctx ends,
// the error says what was awaited and check's last error.
func Await(ctx context.Context, what string, within time.Duration, check func(context.Context) error) error {
	return awaitUnless(ctx, what, within, func() error { return nil }, check)
}

// awaitUnless is Await that also ends when hopeless returns an error.
func awaitUnless(ctx context.Context, what string, within time.Duration, hopeless func() error, check func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	began := time.Now()
	for {
		if err := hopeless(); err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		err := check(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s: not after %v: %w", what, time.Since(began).Round(time.Second), err)
		case <-time.After(250 * time.Millisecond):
		}
	}
}

// fileName makes a name safe for a file: a test called A/b becomes A-b.
func fileName(s string) string {
	return strings.Map(func(r rune) rune {
		if r == '/' || r == os.PathSeparator || r == ' ' {
			return '-'
		}
		return r
	}, s)
}
