package kernel

import (
	"errors"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	moby "github.com/moby/ipvs"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/longshore-lb/longshore/ipvs"
)

// open gives a Kernel in a network namespace of the test's own.
func open(t *testing.T) *Kernel {
	t.Helper()
	runtime.LockOSThread() // never unlocked: the thread ends with the test's goroutine
	ns, err := netns.New()
	if err != nil {
		t.Fatalf("make a network namespace (the test needs root): %v", err)
	}
	t.Cleanup(func() { _ = ns.Close() })
	run(t, "ip", "link", "set", "lo", "up")
	k, err := Open(slog.New(slog.NewTextHandler(t.Output(), nil)))
	if err != nil {
		t.Fatalf("%v\nRun the test with `make test`, which finds a kernel with IPVS.", err)
	}
	t.Cleanup(func() { _ = k.Close() })
	if err := k.Prepare(); err != nil {
		t.Fatal(err)
	}
	return k
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func frontend(p ipvs.Protocol, addr string) ipvs.Frontend {
	return ipvs.At(p, netip.MustParseAddrPort(addr))
}

func real(addr string, weight int32) ipvs.RealServer {
	return ipvs.RealServer{Addr: netip.MustParseAddrPort(addr), Weight: weight}
}

// example has something of everything.
func example() ipvs.State {
	var s ipvs.State
	for _, v := range []struct {
		server ipvs.VirtualServer
		reals  []ipvs.RealServer
	}{
		{ipvs.VirtualServer{Frontend: frontend(ipvs.TCP, "10.96.0.1:443"), Scheduler: "rr"}, []ipvs.RealServer{real("172.31.0.5:6443", 1)}},
		{ipvs.VirtualServer{Frontend: frontend(ipvs.UDP, "10.96.0.10:53"), Scheduler: "wlc", Persistence: 10800}, []ipvs.RealServer{real("10.244.1.2:5353", 1), real("10.244.2.2:5353", 65535)}},
		{ipvs.VirtualServer{Frontend: frontend(ipvs.SCTP, "10.96.0.11:9"), Scheduler: "lc"}, nil},
		{ipvs.VirtualServer{Frontend: frontend(ipvs.TCP, "[fd96::1]:443"), Scheduler: "mh", Flags: ipvs.SchedFlag1 | ipvs.SchedFlag2}, []ipvs.RealServer{real("[fd44::2]:6443", 0)}},
		{ipvs.VirtualServer{Frontend: frontend(ipvs.TCP, "192.0.2.1:80"), Scheduler: "sh", Persistence: 60, Netmask: 24}, []ipvs.RealServer{{Addr: netip.MustParseAddrPort("10.244.1.3:80"), Weight: 7, Upper: 100, Lower: 50}}},
	} {
		s.AddVirtualServer(v.server, v.reals...)
		s.AddFrontend(ipvs.Frontends, v.server.Frontend)
	}
	for _, ipv6 := range []bool{false, true} {
		at, from := frontend(ipvs.TCP, "192.0.2.1:80"), "10.0.0.0/8"
		if ipv6 {
			at, from = frontend(ipvs.TCP, "[fd96::1]:443"), "fd00::/16"
		}
		marked := ipvs.Frontend{Mark: ipvs.Mark(12345678), IPv6: ipv6}
		s.AddVirtualServer(ipvs.VirtualServer{Frontend: marked, Scheduler: "lc"}, slices.Collect(maps.Values(s.RealServers[at]))...)
		s.AddShortcut(at, marked.Mark)
		s.Restrict(at, netip.MustParsePrefix(from))
		s.AddFrontend(ipvs.Dropped, at)
	}
	s.Restrict(frontend(ipvs.TCP, "192.0.2.1:80"), netip.MustParsePrefix("192.168.7.0/25"), netip.MustParsePrefix("255.255.255.255/32"))
	s.AddFrontend(ipvs.Masquerade, frontend(ipvs.TCP, "192.0.2.1:80"))
	for _, p := range []string{"10.96.0.1/32", "10.96.0.10/32", "fd96::1/128", "192.0.2.1/32"} {
		s.AddPrefix(ipvs.VIPs, netip.MustParsePrefix(p))
	}
	for _, p := range []string{"10.96.0.0/16", "fd96::/112"} {
		s.AddPrefix(ipvs.ServiceCIDRs, netip.MustParsePrefix(p))
	}
	s.AddPrefix(ipvs.Pods, netip.MustParsePrefix("10.244.1.0/24"))
	s.AddPrefix(ipvs.Pods, netip.MustParsePrefix("fd44:0:0:1::/64"))
	s.AddPrefix(ipvs.Hairpin, netip.MustParsePrefix("10.244.1.3/32"))
	s.AddPrefix(ipvs.Hairpin, netip.MustParsePrefix("fd44::2/128"))
	s.AddRoute(netip.MustParsePrefix("10.96.0.0/16"), netip.MustParseAddr("127.0.0.1"))
	s.AddRoute(netip.MustParsePrefix("192.0.2.1/32"), netip.Addr{})
	s.AddRoute(netip.MustParsePrefix("fd96::/112"), netip.Addr{})
	return s
}

func observe(t *testing.T, k *Kernel) ipvs.State {
	t.Helper()
	s, err := k.Observe()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func apply(t *testing.T, k *Kernel, ops []ipvs.Operation) {
	t.Helper()
	for _, f := range k.Apply(ops) {
		t.Error(f.Err)
	}
}

var equal = cmp.Options{
	cmpopts.EquateEmpty(),
	cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
	cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
	cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b }),
}

func TestApplyThenObserve(t *testing.T) {
	k := open(t)
	want := example()
	apply(t, k, ipvs.Diff(observe(t, k), want))
	if diff := cmp.Diff(want, observe(t, k), equal); diff != "" {
		t.Errorf("observed differs from applied (-want +got):\n%s", diff)
	}

	// A second Prepare, as at a restart, changes nothing.
	if err := k.Prepare(); err != nil {
		t.Fatal(err)
	}
	if ops := ipvs.Diff(observe(t, k), want); len(ops) > 0 {
		t.Errorf("after a restart: operations %v, want none", ops)
	}

	// Nor is anything lost for good if somebody flushes nftables, as a restart of its unit does.
	run(t, "nft", "flush", "ruleset")
	if err := k.Prepare(); err != nil {
		t.Fatal(err)
	}
	apply(t, k, ipvs.Diff(observe(t, k), want))
	if diff := cmp.Diff(want, observe(t, k), equal); diff != "" {
		t.Errorf("after a flush of nftables (-want +got):\n%s", diff)
	}

	// Rules are looked after as well.
	if !k.Intact() {
		t.Error("not intact after Prepare")
	}
	run(t, "nft", "insert rule ip longshore input accept")
	if k.Intact() {
		t.Error("intact with somebody else's rule")
	}
	if err := k.Prepare(); err != nil || !k.Intact() {
		t.Errorf("not intact after it was prepared again: %v", err)
	}
	if strings.Contains(run(t, "nft", "list chain ip longshore input"), "{\n\t\taccept") {
		t.Error("somebody else's rule is still there")
	}

	changed := example()
	https := frontend(ipvs.TCP, "10.96.0.1:443")
	changed.AddVirtualServer(ipvs.VirtualServer{Frontend: https, Scheduler: "wrr"}, real("172.31.0.5:6443", 3), real("172.31.0.6:6443", 1))
	delete(changed.VirtualServers, frontend(ipvs.SCTP, "10.96.0.11:9"))
	delete(changed.RealServers, frontend(ipvs.SCTP, "10.96.0.11:9"))
	delete(changed.Elements, ipvs.Element{Set: ipvs.Frontends, Frontend: frontend(ipvs.SCTP, "10.96.0.11:9")})
	changed.AddRoute(netip.MustParsePrefix("10.96.0.0/16"), netip.Addr{})
	apply(t, k, ipvs.Diff(want, changed))
	if diff := cmp.Diff(changed, observe(t, k), equal); diff != "" {
		t.Errorf("after a change (-want +got):\n%s", diff)
	}

	apply(t, k, ipvs.Diff(changed, ipvs.State{}))
	if diff := cmp.Diff(ipvs.State{}, observe(t, k), equal); diff != "" {
		t.Errorf("after all was deleted (-want +got):\n%s", diff)
	}
}

// TestIndependentReaders lets programs that are not ours read what we wrote.
func TestIndependentReaders(t *testing.T) {
	k := open(t)
	want := example()
	apply(t, k, ipvs.Diff(ipvs.State{}, want))

	h, err := moby.New("")
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	services, err := h.GetServices()
	if err != nil {
		t.Fatal(err)
	}
	if len(services) != len(want.VirtualServers) {
		t.Errorf("moby/ipvs sees %d virtual servers, want %d", len(services), len(want.VirtualServers))
	}
	for _, s := range services {
		addr, _ := netip.AddrFromSlice(s.Address)
		f := ipvs.At(ipvs.Protocol(s.Protocol), netip.AddrPortFrom(addr.Unmap(), s.Port))
		if s.FWMark != 0 {
			f = ipvs.Frontend{Mark: s.FWMark, IPv6: s.AddressFamily == unix.AF_INET6}
		}
		v, ok := want.VirtualServers[f]
		if !ok {
			t.Errorf("moby/ipvs sees %s, which was not asked for", f)
			continue
		}
		if s.SchedName != v.Scheduler || s.Timeout != v.Persistence {
			t.Errorf("moby/ipvs sees %s with scheduler %s timeout %d, want %s and %d", f, s.SchedName, s.Timeout, v.Scheduler, v.Persistence)
		}
		reals, err := h.GetDestinations(s)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range reals {
			addr, _ := netip.AddrFromSlice(d.Address)
			r := want.RealServers[f][netip.AddrPortFrom(addr.Unmap(), d.Port)]
			if d.Weight != int(r.Weight) || d.UpperThreshold != r.Upper || d.LowerThreshold != r.Lower {
				t.Errorf("moby/ipvs sees real server %+v of %s, want %+v", d, f, r)
			}
		}
		if len(reals) != len(want.RealServers[f]) {
			t.Errorf("moby/ipvs sees %d real servers of %s, want %d", len(reals), f, len(want.RealServers[f]))
		}
	}

	table, err := k.Table()
	if err != nil {
		t.Fatal(err)
	}
	var ours strings.Builder
	if err := ipvs.List(&ours, table, ipvs.ListOptions{}); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(run(t, "ipvsadm", "-Ln"), ours.String()); diff != "" {
		t.Errorf("ipvsadm -Ln prints something else (-ipvsadm +ours):\n%s", diff)
	}

	ruleset := run(t, "nft", "-s", "list", "ruleset")
	t.Logf("%s", ruleset)
	if _, arp, _ := strings.Cut(ruleset, "table arp longshore"); !strings.Contains(arp, "hook input") {
		t.Errorf("the arp chain is not at hook input:\n%s", arp)
	}
	for _, line := range []string{
		"ct state ! new accept",
		"ip daddr . meta l4proto . th dport @restricted ip daddr . meta l4proto . th dport . ip saddr != @allowed drop",
		"ip saddr @pods meta mark set ip daddr . meta l4proto . th dport map @shortcuts",
		"ip6 saddr @pods meta mark set ip6 daddr . meta l4proto . th dport map @shortcuts",
		"meta mark != 0x4c000000/8 ip daddr . meta l4proto . th dport @dropped drop",
		"meta mark 0x4c000000/8 meta mark set 0x00000000",
		"type route hook output priority mangle",
		"ct direction reply accept",
		"ip daddr . meta l4proto . th dport @frontends accept",
		"ip daddr @vips meta l4proto icmp accept",
		"ip daddr @vips reject",
		"ip daddr @service_cidrs drop",
		"ip saddr . ip daddr @hairpin masquerade to :32768-65535",
		"ip6 daddr . meta l4proto . th dport @frontends accept",
		"ip6 saddr . ip6 daddr @hairpin masquerade to :32768-65535",
		"arp operation request arp daddr ip @vips drop",
		"10.244.1.3 . 10.244.1.3",
		"ct original ip daddr . meta l4proto . ct original proto-dst @masqueraded ip saddr != @kept masquerade to :32768-65535",
		"ct original ip6 daddr . meta l4proto . ct original proto-dst @masqueraded ip6 saddr != @kept masquerade to :32768-65535",
		`oif != "lo" fib saddr type local ct original ip daddr . meta l4proto . ct original proto-dst @frontends masquerade to :32768-65535`,
		"192.0.2.1 . tcp . 80 . 192.168.7.0/25",
		"fd96::1 . tcp . 443 . fd00::/16",
		"192.0.2.1 . tcp . 80",
	} {
		if !strings.Contains(ruleset, line) {
			t.Errorf("nft list ruleset has no %q", line)
		}
	}
}

// TestOthersAreLeftAlone: what is not marked as ours is neither observed, changed nor added to.
func TestOthersAreLeftAlone(t *testing.T) {
	k := open(t)
	for _, args := range []string{"-A -t 192.0.2.9:80 -s sh", "-a -t 192.0.2.9:80 -r 10.0.0.9:80 -m -w 5"} {
		run(t, "ipvsadm", strings.Fields(args)...)
	}
	before := run(t, "ipvsadm", "-Sn")
	if got := observe(t, k); len(got.VirtualServers) != 0 {
		t.Errorf("observed as ours: %v", got.VirtualServers)
	}

	var want ipvs.State
	theirs := frontend(ipvs.TCP, "192.0.2.9:80")
	want.AddVirtualServer(ipvs.VirtualServer{Frontend: theirs, Scheduler: "rr"}, real("10.244.1.2:80", 1))
	want.AddFrontend(ipvs.Frontends, theirs)
	failed := k.Apply(ipvs.Diff(ipvs.State{}, want))
	if len(failed) != 2 || !errors.Is(failed[0].Err, ipvs.ErrForeign) || !errors.Is(failed[1].Err, ipvs.ErrForeign) {
		t.Errorf("failures %v, want the virtual server and its real server, both for ErrForeign", failed)
	}
	if diff := cmp.Diff(before, run(t, "ipvsadm", "-Sn")); diff != "" {
		t.Errorf("somebody else's virtual server was touched:\n%s", diff)
	}
	if got := observe(t, k); len(got.VirtualServers) != 0 {
		t.Errorf("after the clash, observed as ours: %v", got.VirtualServers)
	}
}

// TestOtherNamespaces: the kernel's list of real servers is not whole where there are virtual servers of other namespaces.
func TestOtherNamespaces(t *testing.T) {
	var want ipvs.State
	for i := range 100 {
		f := ipvs.At(ipvs.TCP, netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 97, byte(i >> 8), byte(i)}), 80))
		want.AddVirtualServer(ipvs.VirtualServer{Frontend: f, Scheduler: "rr"}, real("10.244.1.3:80", 1), real("10.244.2.3:80", 1))
		want.AddFrontend(ipvs.Frontends, f)
	}
	for range 2 {
		k := open(t) // the second is of another namespace
		apply(t, k, ipvs.Diff(ipvs.State{}, want))
		for range 2 { // by netlink, then by the list
			if left := ipvs.Diff(observe(t, k), want); len(left) > 0 {
				t.Errorf("%d differences after Apply, the first: %s", len(left), left[0])
			}
		}
	}
}

// TestManyElements puts more into one transaction than a socket takes by default.
func TestManyElements(t *testing.T) {
	k := open(t)
	var want ipvs.State
	for i := range 20_000 {
		addr := netip.AddrFrom4([4]byte{10, 97, byte(i >> 8), byte(i)})
		want.AddFrontend(ipvs.Frontends, ipvs.At(ipvs.TCP, netip.AddrPortFrom(addr, 80)))
		want.AddPrefix(ipvs.VIPs, netip.PrefixFrom(addr, 32))
	}
	apply(t, k, ipvs.Diff(ipvs.State{}, want))
	if got := len(observe(t, k).Elements); got != 40_000 {
		t.Errorf("%d elements, want 40000", got)
	}
	apply(t, k, ipvs.Diff(want, ipvs.State{}))
	if got := len(observe(t, k).Elements); got != 0 {
		t.Errorf("%d elements are left", got)
	}
}

// TestMissingElement: an element that somebody else has deleted takes no other deletion with it unnoticed.
func TestMissingElement(t *testing.T) {
	k := open(t)
	var have ipvs.State
	for _, p := range []string{"192.0.2.1/32", "192.0.2.2/32"} {
		have.AddPrefix(ipvs.VIPs, netip.MustParsePrefix(p))
	}
	apply(t, k, ipvs.Diff(ipvs.State{}, have))
	run(t, "nft", "delete element ip longshore vips { 192.0.2.1 }")
	if failed := k.Apply(ipvs.Diff(have, ipvs.State{})); len(failed) != 2 {
		t.Errorf("failures %v, want both deletions: they were one transaction", failed)
	}
	apply(t, k, ipvs.Diff(observe(t, k), ipvs.State{}))
	if got := observe(t, k); len(got.Elements) != 0 {
		t.Errorf("left: %v", got.Elements)
	}
}

// TestConnections holds a connection and sees it counted; and a restarted process finds thresholds, which /proc does not tell.
func TestConnections(t *testing.T) {
	k := open(t)
	f := frontend(ipvs.TCP, "192.0.2.1:80")
	var want ipvs.State
	want.AddVirtualServer(ipvs.VirtualServer{Frontend: f, Scheduler: "rr"}, ipvs.RealServer{Addr: netip.MustParseAddrPort("127.0.0.1:8080"), Weight: 1, Upper: 9})
	want.AddFrontend(ipvs.Frontends, f)
	want.AddRoute(netip.MustParsePrefix("192.0.2.1/32"), netip.Addr{})
	apply(t, k, ipvs.Diff(ipvs.State{}, want))
	l, err := net.Listen("tcp", "127.0.0.1:8080")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	c, err := net.Dial("tcp", "192.0.2.1:80")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	gone := frontend(ipvs.TCP, "192.0.2.2:80")
	n, err := k.Connections([]ipvs.Frontend{f, gone})
	if err != nil || len(n[gone]) != 0 || n[f][netip.MustParseAddrPort("127.0.0.1:8080")] != 1 {
		t.Errorf("connections %v, %v: want one", n, err)
	}
	if !k.PortInUse(ipvs.TCP, 8080) || k.PortInUse(ipvs.UDP, 8080) || k.PortInUse(ipvs.TCP, 8081) || k.PortInUse(ipvs.SCTP, 8080) {
		t.Error("port 8080/TCP is not the only one in use")
	}
	for range 2 { // by netlink, then by /proc
		if diff := cmp.Diff(want, observe(t, k), equal); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
	}
}

func TestUnknownScheduler(t *testing.T) {
	k := open(t)
	var want ipvs.State
	f, g := frontend(ipvs.TCP, "192.0.2.1:80"), frontend(ipvs.TCP, "192.0.2.2:80")
	want.AddVirtualServer(ipvs.VirtualServer{Frontend: f, Scheduler: "nosuch"}, real("10.244.1.2:80", 1))
	want.AddVirtualServer(ipvs.VirtualServer{Frontend: g, Scheduler: "rr"}, real("10.244.1.2:80", 1))
	failed := k.Apply(ipvs.Diff(ipvs.State{}, want))
	if len(failed) != 2 || !strings.Contains(failed[0].Err.Error(), `no scheduler "nosuch"`) {
		t.Errorf("failures %v, want two that name the scheduler", failed)
	}
	table, err := k.Table()
	if err != nil {
		t.Fatal(err)
	}
	if len(table.Services) != 1 || table.Services[0].Frontend != g {
		t.Errorf("the kernel holds %+v, want only %s", table.Services, g)
	}
}

func TestPrefixesSurviveTheirEncoding(t *testing.T) {
	for _, text := range []string{"10.96.0.0/12", "0.0.0.0/0", "255.255.255.0/24", "10.0.0.1/32", "fd00::/8", "ffff::/16", "::/0"} {
		p := netip.MustParsePrefix(text)
		var s ipvs.State
		err := decodeElements(&s, ipvs.Pods, prefixShape, encodeElement(ipvs.Element{Set: ipvs.Pods, Prefix: p}), p.Addr().Is6())
		if err != nil {
			t.Errorf("%s: %v", p, err)
		}
		if _, ok := s.Elements[ipvs.Element{Set: ipvs.Pods, Prefix: p}]; !ok {
			t.Errorf("%s came back as %v", p, s.Elements)
		}
	}
}
