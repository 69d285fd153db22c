package lab

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestLinks cuts, silences and flaps cables, and sees it from the other machines.
func TestLinks(t *testing.T) {
	ctx := t.Context()
	l := ForTest(t, Config{Nodes: 2, Log: testLog(t)})
	n1, n2 := l.Nodes[0], l.Nodes[1]
	server := startServer(t, n1.Host, "n1-server")

	held := map[string]*Held{}
	for protocol, patience := range map[string]time.Duration{"tcp": time.Minute, "udp": 2 * time.Second} {
		var err error
		if held[protocol], err = l.Client.Hold(ctx, protocol, server, 20*time.Millisecond, patience); err != nil {
			t.Fatal(err)
		}
	}
	for protocol, h := range held {
		err := Await(ctx, protocol+" echoes", time.Minute, func(context.Context) error {
			if h.Report().Echoes == 0 {
				return errors.New("none yet")
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for name, step := range map[string]func() error{"cut": n1.Link.Cut, "silence": n1.Link.Silence} {
		if err := step(); err != nil {
			t.Fatal(err)
		}
		if answer, err := n2.Ask(ctx, "tcp", server); err == nil {
			t.Errorf("%s: n1 still answers: %+v", name, answer)
		}
		if err := n1.Link.Mend(); err != nil {
			t.Fatal(err)
		}
		awaitAnswer(t, n2.Host, server)
	}
	if err := n1.Link.Flap(ctx, 3, 50*time.Millisecond, 50*time.Millisecond); err != nil {
		t.Fatal(err)
	}
	awaitAnswer(t, n2.Host, server)

	if r := held["tcp"].Release(); r.Broken != nil || r.Echoes == 0 || r.Longest < time.Second {
		t.Errorf("a TCP connection did not outlive the cuts with a pause: %+v", r)
	}
	if r := held["udp"].Release(); r.Broken == nil || r.Echoes == 0 {
		t.Errorf("a UDP flow did not lose a packet to the cuts: %+v", r)
	}

	// A kernel without netem says so; one with it makes every packet late.
	err := n1.Link.Degrade(Quality{Delay: 100 * time.Millisecond})
	if errors.Is(err, unix.ENOENT) {
		if !strings.Contains(err.Error(), "sch_netem") {
			t.Errorf("the error does not name the missing module: %v", err)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	if answer, err := n2.Ask(ctx, "tcp", server); err != nil || answer.Took < 200*time.Millisecond {
		t.Errorf("100 ms each way took %v, %v", answer.Took, err)
	}
	if err := n1.Link.Degrade(Quality{}); err != nil {
		t.Fatal(err)
	}
}

// startServer starts the built-in server in a host at port 80.
func startServer(t *testing.T, h *Host, name string) netip.AddrPort {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := h.Start(Exec{Name: name, Path: self, Env: []string{serveEnv + "=" + name + " 80/TCP 80/UDP"}}); err != nil {
		t.Fatal(err)
	}
	server := netip.AddrPortFrom(h.V4, 80)
	awaitAnswer(t, h, server)
	return server
}

func awaitAnswer(t *testing.T, h *Host, server netip.AddrPort) {
	t.Helper()
	err := Await(t.Context(), fmt.Sprintf("%s reaches %s", h.Name, server), time.Minute, func(ctx context.Context) error {
		_, err := h.Ask(ctx, "tcp", server)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestSplit parts nodes from one another, and from nobody else, and watches who answers for an address.
func TestSplit(t *testing.T) {
	ctx := t.Context()
	l := ForTest(t, Config{Nodes: 3, Log: testLog(t)})
	n := l.Nodes
	servers := []netip.AddrPort{startServer(t, n[0].Host, "n1-server"), startServer(t, n[1].Host, "n2-server"), startServer(t, n[2].Host, "n3-server")}
	reaches := func(from *Host, to int, want bool) {
		t.Helper()
		if _, err := from.Ask(ctx, "tcp", servers[to]); (err == nil) != want {
			t.Errorf("%s asks n%d: %v", from.Name, to+1, err)
		}
	}
	split := func(groups ...[]*Node) {
		t.Helper()
		if err := l.Split(groups...); err != nil {
			t.Fatal(err)
		}
	}
	split(n[:1], n[1:])
	reaches(n[0].Host, 1, false)
	reaches(n[2].Host, 0, false)
	reaches(n[1].Host, 2, true)
	for i := range n {
		reaches(l.Client, i, true)
	}
	split(n[:1], n[1:2], n[2:])
	reaches(n[1].Host, 2, false)
	split()
	for _, from := range n {
		for i := range n {
			reaches(from.Host, i, true)
		}
	}

	end, err := l.Client.Watch(n[1].V4, 10*time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	if err := Await(ctx, "a second question", time.Minute, func(context.Context) error {
		_, err := l.Client.WhoHas(n[1].V4, 100*time.Millisecond)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	answers := end()
	if len(answers) < 3 {
		t.Errorf("%d answers", len(answers))
	}
	for _, a := range answers {
		if a.By.String() != n[1].MAC().String() {
			t.Errorf("%s answers for n2", a.By)
		}
	}
}

// TestWhoHas asks for addresses of one machine, of none and of two.
func TestWhoHas(t *testing.T) {
	l := ForTest(t, Config{Nodes: 2, Log: testLog(t)})
	n1, n2 := l.Nodes[0], l.Nodes[1]
	for _, shared := range []string{"172.31.0.200", "fd31::200"} {
		for _, n := range l.Nodes {
			if err := n.addAddress("eth0", netip.PrefixFrom(netip.MustParseAddr(shared), lanBits(shared))); err != nil {
				t.Fatal(err)
			}
		}
	}
	tests := []struct {
		addr string
		want []*Host
	}{
		{"172.31.0.11", []*Host{n1.Host}},
		{"fd31::12", []*Host{n2.Host}},
		{"172.31.0.77", nil},
		{"fd31::77", nil},
		{"172.31.0.200", []*Host{n1.Host, n2.Host}},
		{"fd31::200", []*Host{n1.Host, n2.Host}},
	}
	for _, tt := range tests {
		macs, err := l.Client.WhoHas(netip.MustParseAddr(tt.addr), time.Second)
		if err != nil {
			t.Fatal(err)
		}
		got := map[*Host]bool{}
		for _, mac := range macs {
			got[l.HostWithMAC(mac)] = true
		}
		if len(macs) != len(tt.want) {
			t.Errorf("%s: answers from %v, want %d", tt.addr, macs, len(tt.want))
		}
		for _, h := range tt.want {
			if !got[h] {
				t.Errorf("%s: no answer from %s", tt.addr, h.Name)
			}
		}
	}
}

func lanBits(addr string) int {
	if netip.MustParseAddr(addr).Is6() {
		return lan.v6.Bits()
	}
	return lan.v4.Bits()
}

// speaker is a node's FRR that announces one address of each family to both routers, which shall not keep them when
// it stops.
const speaker = `router bgp 64513
 no bgp ebgp-requires-policy
 no bgp network import-check
 bgp graceful-restart-disable
 no bgp default ipv4-unicast
 neighbor 172.31.0.1 remote-as 64512
 neighbor 172.31.0.2 remote-as 64512
 address-family ipv4 unicast
  network 192.0.2.1/32
  neighbor 172.31.0.1 activate
  neighbor 172.31.0.2 activate
 exit-address-family
 address-family ipv6 unicast
  network 2001:db8::1/128
  neighbor 172.31.0.1 activate
  neighbor 172.31.0.2 activate
 exit-address-family
exit
`

// TestPeers has two nodes announce the same addresses: both routers spread over both nodes, and the client behind
// them is served from there.
func TestPeers(t *testing.T) {
	ctx := t.Context()
	l := ForTest(t, Config{Nodes: 2, Log: testLog(t)})
	frr, err := l.Router.StartFRR(ctx, RouterConfig(64512, 64513))
	if err != nil {
		t.Fatal(err)
	}
	bird, err := l.Bird.StartBIRD(ctx, BirdConfig(64512, 64513))
	if err != nil {
		t.Fatal(err)
	}
	var speakers []*FRR
	for i, n := range l.Nodes {
		for _, vip := range []string{"192.0.2.1/32", "2001:db8::1/128"} {
			if err := n.addAddress("lo", netip.MustParsePrefix(vip)); err != nil {
				t.Fatal(err)
			}
		}
		startServer(t, n.Host, fmt.Sprintf("server-%d", i))
		s, err := n.StartFRR(ctx, speaker)
		if err != nil {
			t.Fatal(err)
		}
		speakers = append(speakers, s)
	}
	for _, router := range []*Host{l.Router, l.Bird} {
		for _, vip := range []string{"192.0.2.1", "2001:db8::1"} {
			awaitNextHops(t, router, vip, 2)
		}
	}
	for _, vip := range []string{"192.0.2.1", "2001:db8::1"} {
		spread(t, l.Outside, netip.AddrPortFrom(netip.MustParseAddr(vip), 80), 2)
	}
	if out, err := frr.Show(ctx, "show bgp ipv6 unicast json"); err != nil || !strings.Contains(out, "2001:db8::1/128") {
		t.Errorf("FRR's table: %v\n%s", err, out)
	}
	if out, err := bird.Show(ctx, "show route for 192.0.2.1"); err != nil || strings.Count(out, "via 172.31.0.1") != 2 {
		t.Errorf("BIRD's table: %v\n%s", err, out)
	}

	if err := speakers[0].Stop(); err != nil {
		t.Fatal(err)
	}
	awaitNextHops(t, l.Router, "192.0.2.1", 1)
	awaitNextHops(t, l.Bird, "2001:db8::1", 1)
	if err := frr.Configure(ctx, "router bgp 64512\n address-family ipv4 unicast\n no maximum-paths 8\n"); err != nil {
		t.Error(err)
	}
	if err := frr.Configure(ctx, "router bgp 64512\n nonsense\n"); err == nil {
		t.Error("FRR took a line of nonsense")
	}
	for _, stop := range []func() error{frr.Stop, bird.Stop} {
		if err := stop(); err != nil {
			t.Error(err)
		}
	}
	awaitNextHops(t, l.Router, "192.0.2.1", 0)
	awaitNextHops(t, l.Bird, "192.0.2.1", 0)
}

// awaitNextHops waits until the host's kernel has a route to an address by so many machines of the lan.
func awaitNextHops(t *testing.T, h *Host, addr string, count int) {
	t.Helper()
	what := fmt.Sprintf("%s has %d next hops for %s", h.Name, count, addr)
	err := Await(t.Context(), what, time.Minute, func(context.Context) error {
		hops, err := h.NextHops(netip.PrefixFrom(netip.MustParseAddr(addr), netip.MustParseAddr(addr).BitLen()))
		if err == nil && len(hops) != count {
			err = fmt.Errorf("they are %v", hops)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// spread asks until so many servers have answered.
func spread(t *testing.T, h *Host, server netip.AddrPort, count int) {
	t.Helper()
	seen := map[string]bool{}
	for range 100 {
		answer, err := h.Ask(t.Context(), "tcp", server)
		if err != nil {
			t.Fatal(err)
		}
		if seen[answer.Pod] = true; len(seen) == count {
			return
		}
	}
	t.Errorf("100 connections to %s were answered by %v only", server, seen)
}

// TestCapture keeps the packets of a failed scenario, and nothing of one that passed.
func TestCapture(t *testing.T) {
	for _, failed := range []bool{true, false} {
		l, err := New(t.Context(), Config{Scenario: t.Name() + "/kept", Nodes: 1, Log: testLog(t)})
		if err != nil {
			t.Fatal(err)
		}
		if err := l.Capture(t.Context(), l.Client, l.Nodes[0].Host); err != nil {
			t.Fatal(err)
		}
		if _, err := l.Client.WhoHas(l.Nodes[0].V4, time.Second); err != nil {
			t.Fatal(err)
		}
		if failed {
			l.KeepRecords()
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"client", "n1"} {
			s, err := os.Stat(filepath.Join(l.Records(), name+".pcap"))
			if kept := err == nil && s.Size() > 24; kept != failed { // 24 bytes are the file's header
				t.Errorf("failed %v, but capture of %s kept: %v", failed, name, kept)
			}
		}
		if err := os.RemoveAll(l.Records()); err != nil {
			t.Fatal(err)
		}
	}
}

// TestOneLab sees that a second lab waits, and that it can give up.
func TestOneLab(t *testing.T) {
	ForTest(t, Config{Nodes: 1, Log: testLog(t)})
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if second, err := New(ctx, Config{Scenario: "second", Nodes: 1}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a second lab: %v, %v", second, err)
	}
}

// TestProcess sees programs that die, that do not want to end, and that are not there.
func TestProcess(t *testing.T) {
	l := ForTest(t, Config{Nodes: 1, Log: testLog(t)})
	h := l.Client
	dies, err := h.Start(Exec{Name: "dies", Path: "sh", Args: []string{"-c", "echo the reason; exit 3"}})
	if err != nil {
		t.Fatal(err)
	}
	<-dies.Exited()
	if err := dies.Err(); err == nil || !strings.Contains(err.Error(), "exit status 3") || !strings.Contains(err.Error(), "the reason") {
		t.Errorf("error of a program that died: %v", err)
	}
	if err := dies.Stop(); err != nil {
		t.Errorf("stop of an ended program: %v", err)
	}

	stubborn, err := h.Start(Exec{
		Name: "stubborn", Path: "sh", Stop: time.Second, // its child sleeps on, which Close has to end
		Args: []string{"-c", "trap 'echo no' TERM; echo ready; while :; do sleep 1; done"},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := stubborn.AwaitOutput(t.Context(), "ready", time.Minute); err != nil {
		t.Fatal(err)
	}
	if err := stubborn.Stop(); err == nil || !strings.Contains(err.Error(), "ignored SIGTERM") {
		t.Errorf("stop of a stubborn program: %v", err)
	}
	if stubborn.Running() {
		t.Error("the stubborn program still runs")
	}

	if _, err := h.Run(t.Context(), "no-such-program"); err == nil || !strings.Contains(err.Error(), "no-such-program") {
		t.Errorf("run of a program that is not there: %v", err)
	}
}
