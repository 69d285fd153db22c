// Package kernel is the only code that touches the kernel's data plane: IPVS by generic netlink, the filter
// by nftables, local routes by rtnetlink, and the sysctls they need. Everything happens in the network
// namespace the process was started in, and no program is run for it.
package kernel

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"

	"github.com/u-root/u-root/pkg/kmodule"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/longshore-lb/longshore/ipvs"
)

// Kernel is the data plane of one network namespace. It is safe for concurrent use.
type Kernel struct {
	log      *slog.Logger
	mu       sync.Mutex
	genl     *genl
	filter   *filter
	routes   *netlink.Handle
	loopback int

	schedulers map[string]bool        // those whose module was asked for
	owned      map[ipvs.Frontend]bool // virtual servers known as ours, should our tables be flushed by somebody
	limited    map[ipvs.Frontend]bool // virtual servers whose real servers have thresholds
	adopted    bool                   // everything has been read by netlink once, so limited is complete
}

// Open connects to the kernel and loads what IPVS needs if it may. It changes nothing else, so it serves
// readers too. Its errors say what is missing and how to get it: root, the module ip_vs.
func Open(log *slog.Logger) (*Kernel, error) {
	if os.Geteuid() != 0 {
		return nil, fmt.Errorf("reading and writing IPVS needs root (CAP_NET_ADMIN); the user id is %d", os.Geteuid())
	}
	g, err := openGenl()
	if err != nil {
		if loadErr := loadModule("ip_vs"); loadErr != nil {
			return nil, fmt.Errorf("the kernel %s has no IPVS, and its module ip_vs cannot be loaded (%w): "+
				"load it on the host with `modprobe ip_vs`, and keep it with a file in /etc/modules-load.d; "+
				"on Debian it is in the package linux-image-amd64", release(), loadErr)
		}
		if g, err = openGenl(); err != nil {
			return nil, fmt.Errorf("module ip_vs was loaded, but: %w", err)
		}
	}
	k := &Kernel{log: log, genl: g, schedulers: map[string]bool{},
		owned: map[ipvs.Frontend]bool{}, limited: map[ipvs.Frontend]bool{}}
	if k.routes, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return nil, fmt.Errorf("open rtnetlink: %w", err)
	}
	lo, err := k.routes.LinkByName("lo")
	if err != nil {
		return nil, fmt.Errorf("find interface lo: %w", err)
	}
	k.loopback = lo.Attrs().Index
	if k.filter, err = newFilter(); err != nil {
		return nil, err
	}
	return k, nil
}

// Close lets go of the sockets; what was programmed stays.
func (k *Kernel) Close() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.routes.Close()
	return k.genl.close()
}

// release is the kernel's version, as uname -r prints it.
func release() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return runtime.GOOS
	}
	return unix.ByteSliceToString(u.Release[:])
}

// loadModule loads a module and those it depends on by system call (finit_module), from /lib/modules.
func loadModule(name string) error {
	if _, err := os.Stat("/sys/module/" + name); err == nil {
		return nil // there already
	}
	if err := kmodule.Probe(name, ""); err != nil {
		return fmt.Errorf("load module %s: %w", name, err)
	}
	return nil
}

// Prepare sets up what all Services share: sysctls and nftables tables. What an earlier run left stays as it is.
func (k *Kernel) Prepare() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, name := range []string{"nf_tables", "nf_conntrack", "nft_ct", "nft_masq", "nft_reject_ipv4", "nft_reject_ipv6"} {
		// The kernel may have them built in, loaded, or load them itself; where it cannot, the next step says what fails.
		if err := loadModule(name); err != nil {
			k.log.Debug("module not loaded", "module", name, "error", err)
		}
	}
	if err := setSysctls(); err != nil {
		return err
	}
	return k.filter.prepare()
}

// Intact tells whether nobody has changed the tables, chains and rules that Prepare made. Their elements are Observe's.
func (k *Kernel) Intact() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.filter.intact()
}

// Observe reads what is ours in the kernel.
func (k *Kernel) Observe() (ipvs.State, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	var s ipvs.State
	if err := k.filter.observe(&s); err != nil {
		return s, err
	}
	if err := k.observeRoutes(&s); err != nil {
		return s, err
	}
	services, err := k.services()
	if err != nil {
		return s, err
	}
	var listed map[ipvs.Frontend][]ipvs.RealServer
	if k.adopted {
		if listed, err = readRealServers(); err != nil {
			return s, fmt.Errorf("list real servers: %w", err)
		}
	}
	claimed := claims(s)
	for _, v := range services {
		f := v.Frontend
		if !claimed[f] && !k.owned[f] {
			continue
		}
		k.owned[f] = true
		reals, complete := listed[f]
		if !complete || k.limited[f] {
			if reals, err = k.realServers(f); err != nil {
				return s, err
			}
		}
		s.AddVirtualServer(v.VirtualServer, reals...)
	}
	k.adopted = true
	return s, nil
}

// claims is the frontends whose virtual servers are ours by what is in the sets.
func claims(s ipvs.State) map[ipvs.Frontend]bool {
	out := map[ipvs.Frontend]bool{}
	for e := range s.Elements {
		switch e.Set {
		case ipvs.Frontends:
			out[e.Frontend] = true
		case ipvs.Shortcuts:
			out[ipvs.Frontend{Mark: e.Mark, IPv6: e.IPv6()}] = true
		}
	}
	return out
}

// realServers reads the real servers of one virtual server, and notes whether any has thresholds.
func (k *Kernel) realServers(f ipvs.Frontend) ([]ipvs.RealServer, error) {
	observed, err := k.destinations(f)
	if err != nil {
		return nil, err
	}
	reals := make([]ipvs.RealServer, len(observed))
	for i, r := range observed {
		reals[i] = r.RealServer
		if r.Upper != 0 || r.Lower != 0 {
			k.limited[f] = true
		}
	}
	return reals, nil
}

// Connections is how many connections the real servers of some virtual servers have, open ones and those that are about
// to be forgotten. A virtual server that is not there has none.
func (k *Kernel) Connections(of []ipvs.Frontend) (map[ipvs.Frontend]map[netip.AddrPort]int, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	out := map[ipvs.Frontend]map[netip.AddrPort]int{}
	for _, f := range of {
		reals, err := k.destinations(f)
		if err != nil {
			return nil, err
		}
		out[f] = map[netip.AddrPort]int{}
		for _, r := range reals {
			out[f][r.Addr] = int(r.Active + r.Inactive)
		}
	}
	return out, nil
}

// Apply does the operations in their order and returns those that failed; the others are done. Elements of
// sets go in one transaction for a run of them, virtual and real servers in batches.
func (k *Kernel) Apply(ops []ipvs.Operation) []ipvs.Failure {
	k.mu.Lock()
	defer k.mu.Unlock()
	var failed []ipvs.Failure
	absent := map[ipvs.Frontend]error{} // virtual servers that could not be added, or not be marked as ours
	for len(ops) > 0 {
		n := 1
		for n < len(ops) && ops[n].Kind == ops[0].Kind {
			n++
		}
		run := ops[:n]
		ops = ops[n:]
		var errs []error
		switch run[0].Kind {
		case ipvs.KindElement:
			errs = slices.Repeat([]error{k.filter.apply(run)}, n)
		case ipvs.KindRoute:
			for _, o := range run {
				errs = append(errs, k.applyRoute(o))
			}
		default:
			errs = k.applyServers(run, absent)
		}
		for i, err := range errs {
			if err = settled(run[i], err); err == nil {
				k.note(run[i])
				continue
			}
			failed = append(failed, ipvs.Failure{Operation: run[i], Err: fmt.Errorf("%s: %w", run[i], err)})
			if f := adds(run[i]); f != (ipvs.Frontend{}) {
				absent[f] = err
			}
		}
	}
	k.disown(failed)
	return failed
}

// note remembers which virtual servers are ours, and which have thresholds.
func (k *Kernel) note(done ipvs.Operation) {
	switch {
	case done.Kind == ipvs.KindRealServer && (done.RealServer.Upper != 0 || done.RealServer.Lower != 0):
		k.limited[done.VirtualServer.Frontend] = true
	case done.Kind != ipvs.KindVirtualServer:
	case done.Verb == ipvs.Delete:
		delete(k.owned, done.VirtualServer.Frontend)
		delete(k.limited, done.VirtualServer.Frontend)
	default:
		k.owned[done.VirtualServer.Frontend] = true
	}
}

// applyServers does operations on virtual or on real servers. A real server whose virtual server is absent
// is not sent: the kernel would put it into whosever virtual server is there.
func (k *Kernel) applyServers(run []ipvs.Operation, absent map[ipvs.Frontend]error) []error {
	errs := make([]error, len(run))
	var messages []message
	var sent []int
	for i, o := range run {
		if err := absent[o.VirtualServer.Frontend]; err != nil {
			errs[i] = fmt.Errorf("virtual server %s: %w", o.VirtualServer.Frontend, err)
			continue
		}
		if adds := o.Kind == ipvs.KindVirtualServer && o.Verb == ipvs.Add; !adds && !k.owned[o.VirtualServer.Frontend] {
			if o.Verb != ipvs.Delete { // nothing of ours is there to delete
				errs[i] = ipvs.ErrForeign
			}
			continue
		}
		messages, sent = append(messages, encodeOperation(o)), append(sent, i)
		if name := o.VirtualServer.Scheduler; o.Kind == ipvs.KindVirtualServer && o.Verb != ipvs.Delete && !k.schedulers[name] {
			k.schedulers[name] = true
			if err := loadModule("ip_vs_" + name); err != nil {
				k.log.Debug("module not loaded", "module", "ip_vs_"+name, "error", err)
			}
		}
	}
	for i, err := range k.genl.write(messages) {
		errs[sent[i]] = err
	}
	return errs
}

// settled turns the kernel's errno into what it means for an operation. What is gone already needs no deletion; but
// an element's errno is that of its whole transaction, of which nothing was done.
func settled(o ipvs.Operation, err error) error {
	switch {
	case err == nil:
		return nil
	case o.Verb == ipvs.Delete && o.Kind != ipvs.KindElement && (errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENOENT)):
		return nil
	case o.Kind == ipvs.KindVirtualServer && o.Verb == ipvs.Add && errors.Is(err, unix.EEXIST):
		return ipvs.ErrForeign
	case o.Kind == ipvs.KindVirtualServer && o.Verb != ipvs.Delete && errors.Is(err, unix.ENOENT):
		return fmt.Errorf("the kernel has no scheduler %q: load its module ip_vs_%s", o.VirtualServer.Scheduler, o.VirtualServer.Scheduler)
	}
	return err
}

// adds is the virtual server that an operation adds, or marks as ours; zero if it does neither.
func adds(o ipvs.Operation) ipvs.Frontend {
	switch {
	case o.Verb != ipvs.Add:
	case o.Kind == ipvs.KindVirtualServer:
		return o.VirtualServer.Frontend
	case o.Kind == ipvs.KindElement && o.Element.Set == ipvs.Frontends:
		return o.Element.Frontend
	case o.Kind == ipvs.KindElement && o.Element.Set == ipvs.Shortcuts:
		return ipvs.Frontend{Mark: o.Element.Mark, IPv6: o.Element.IPv6()}
	}
	return ipvs.Frontend{}
}

// disown takes the mark of ownership off frontends whose virtual server could not be added. It may be somebody else's; and
// the filter would let packets in that a process of the node would then get.
func (k *Kernel) disown(failed []ipvs.Failure) {
	unmarked := map[ipvs.Frontend]bool{}
	var ops []ipvs.Operation
	for _, f := range failed {
		switch o := f.Operation; {
		case o.Kind == ipvs.KindElement && o.Verb == ipvs.Add:
			unmarked[o.Element.Frontend] = true
		case o.Kind == ipvs.KindVirtualServer && o.Verb == ipvs.Add && o.VirtualServer.Frontend.Mark == 0 && !unmarked[o.VirtualServer.Frontend]:
			ops = append(ops, ipvs.Operation{Verb: ipvs.Delete, Kind: ipvs.KindElement,
				Element: ipvs.Element{Set: ipvs.Frontends, Frontend: o.VirtualServer.Frontend}})
		}
	}
	if len(ops) == 0 {
		return
	}
	if err := k.filter.apply(ops); err != nil {
		k.log.Error("cannot disown frontends without a virtual server", "error", err)
	}
}

// PortInUse tells whether a process has a port of this machine's own, by trying to have it too. Nothing listens meanwhile.
func (k *Kernel) PortInUse(p ipvs.Protocol, port uint16) bool {
	kind := map[ipvs.Protocol]int{ipvs.TCP: unix.SOCK_STREAM, ipvs.UDP: unix.SOCK_DGRAM, ipvs.SCTP: unix.SOCK_STREAM}[p]
	if p == ipvs.SCTP { // the socket would load the module
		if _, err := os.Stat("/sys/module/sctp"); err != nil {
			return false
		}
	}
	fd, err := unix.Socket(unix.AF_INET6, kind|unix.SOCK_CLOEXEC, int(p))
	if err != nil {
		return false // without IPv6, or the protocol, there is nothing to learn
	}
	defer func() { _ = unix.Close(fd) }()
	if p == ipvs.TCP { // connections that have ended are no process
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	}
	return errors.Is(unix.Bind(fd, &unix.SockaddrInet6{Port: int(port)}), unix.EADDRINUSE)
}

// sysctls are what the data plane needs, each for a reason.
var sysctls = []struct{ name, value string }{
	{"net.ipv4.vs.conntrack", "1"},          // masquerade matches the original tuple of IPVS connections
	{"net.ipv4.vs.expire_nodest_conn", "1"}, // connections of a removed real server end at their next packet
	{"net.ipv4.vs.expire_quiescent_template", "1"},
	{"net.ipv4.ip_forward", "1"},
	{"net.ipv6.conf.all.forwarding", "1"},
	{"net.ipv4.conf.all.arp_announce", "2"}, // a VIP must never be the sender of the node's own ARP requests
}

func setSysctls() error {
	for _, s := range sysctls {
		path := "/proc/sys/" + strings.ReplaceAll(s.name, ".", "/")
		have, err := os.ReadFile(path)
		if errors.Is(err, os.ErrNotExist) && strings.HasPrefix(s.name, "net.ipv6.") {
			continue // a kernel without IPv6
		}
		if err != nil {
			return fmt.Errorf("read sysctl %s: %w", s.name, err)
		}
		if strings.TrimSpace(string(have)) == s.value {
			continue
		}
		if err := os.WriteFile(path, []byte(s.value), 0o644); err != nil {
			return fmt.Errorf("set sysctl %s = %s: %w", s.name, s.value, err)
		}
	}
	return nil
}
