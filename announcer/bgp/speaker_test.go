package bgp

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/longshore-lb/longshore/announcer"
)

// The node's addresses. The IPv4 one is on no link; the IPv6 one is on the link of peer 2, as BIRD takes no next hop from elsewhere.
var (
	node4 = netip.MustParseAddr("10.99.0.1")
	node6 = netip.MustParseAddr("fd99:2::1")
)

func config(peers []Peer, routes ...announcer.Route) Config {
	return Config{RouterID: node4, NextHop4: node4, NextHop6: node6, Peers: peers, Routes: routes}
}

// peer is peer number n of the lab, in AS 65000+n; we are in AS 64512.
func peer(n int, name string) Peer {
	return Peer{
		Name: name, MyASN: 64512, PeerASN: 65000 + uint32(n), Address: netip.AddrFrom4([4]byte{10, 99, byte(n), 2}),
		HoldTime: 30 * time.Second, ConnectTime: 3 * time.Second,
	}
}

func to(prefix string, peers ...string) announcer.Route {
	return announcer.Route{Prefix: netip.MustParsePrefix(prefix), Peers: peers}
}

type router interface {
	routes() (map[string]route, error)
}

// waitRoutes waits until the router has these routes from us and no others.
func waitRoutes(t *testing.T, r router, want map[string]route) {
	t.Helper()
	waitFor(t, "the peer's table", func() error {
		got, err := r.routes()
		if err != nil {
			return err
		}
		if diff := cmp.Diff(want, got); diff != "" {
			return fmt.Errorf("(-want +got)\n%s", diff)
		}
		return nil
	})
}

// birdPeer are the lines for a session of BIRD in AS asn with our node number n.
func birdPeer(n int, asn uint32, more ...string) []string {
	return append([]string{
		fmt.Sprintf("local 10.99.%d.2 as %d;", n, asn),
		fmt.Sprintf("neighbor 10.99.%d.1 as 64512;", n),
		"ipv4 { import all; export all; };",
		"ipv6 { import all; export all; };",
		"error wait time 1, 2;", // or it would refuse for a minute after each error
	}, more...)
}

// frrPeer are the lines for a session of FRR with our node number n.
func frrPeer(n int, more ...string) []string {
	return append([]string{
		fmt.Sprintf("neighbor 10.99.%d.1 remote-as 64512", n),
		"address-family ipv6 unicast",
		fmt.Sprintf(" neighbor 10.99.%d.1 activate", n),
		"exit-address-family",
	}, more...)
}

// TestRoutes follows routes at two peers, FRR and BIRD: who gets them, with what, and that they go.
func TestRoutes(t *testing.T) {
	l := newLab(t, "frr", "bird")
	f := l.frr("frr", 65001, frrPeer(1)...)
	b := l.bird("bird", birdPeer(2, 65002))
	s := l.speaker(t)
	peers := []Peer{peer(1, "frr"), peer(2, "bird")}

	everyone := to("192.0.2.1/32")
	everyone.Communities = []string{"65535:65281", "64512:7", "large:64512:1:2"}
	everyone.LocalPref = 200 // stays here: the sessions are eBGP
	everyone6 := to("2001:db8::1/128")
	onlyFRR, onlyBIRD := to("192.0.2.2/32", "frr"), to("192.0.2.3/32", "bird")
	s.set(config(peers, everyone, everyone6, onlyFRR, onlyBIRD))

	atFRR := func() map[string]route {
		return map[string]route{
			"192.0.2.1/32":    {NextHop: "10.99.1.1", Path: "64512", Communities: "64512:7 no-export", Large: "64512:1:2"},
			"2001:db8::1/128": {NextHop: "fd99:2::1", Path: "64512"},
		}
	}
	atBIRD := func() map[string]route {
		return map[string]route{
			"192.0.2.1/32":    {NextHop: "10.99.2.1", Path: "64512", LocalPref: 100, Communities: "(64512,7) (65535,65281)", Large: "(64512, 1, 2)"},
			"2001:db8::1/128": {NextHop: "fd99:2::1", Path: "64512", LocalPref: 100},
		}
	}
	wantFRR, wantBIRD := atFRR(), atBIRD()
	wantFRR["192.0.2.2/32"] = route{NextHop: "10.99.1.1", Path: "64512"}
	wantBIRD["192.0.2.3/32"] = route{NextHop: "10.99.2.1", Path: "64512", LocalPref: 100}
	waitRoutes(t, f, wantFRR)
	waitRoutes(t, b, wantBIRD)
	for _, p := range peers {
		if got := s.waitState(p.Name, "established"); got.Advertised != 3 {
			t.Errorf("session %+v: Advertised is not 3", got)
		}
	}
	up := map[string]time.Time{"frr": s.session("frr").Since, "bird": s.session("bird").Since}

	// A route moves from one peer to the other, one comes to both and one goes from both.
	movedRoute, shared := to("192.0.2.2/32", "bird"), to("192.0.2.3/32", "frr", "bird")
	s.set(config(peers, everyone6, movedRoute, shared))
	wantFRR, wantBIRD = atFRR(), atBIRD()
	delete(wantFRR, "192.0.2.1/32")
	delete(wantBIRD, "192.0.2.1/32")
	wantBIRD["192.0.2.2/32"] = route{NextHop: "10.99.2.1", Path: "64512", LocalPref: 100}
	wantFRR["192.0.2.3/32"] = route{NextHop: "10.99.1.1", Path: "64512"}
	wantBIRD["192.0.2.3/32"] = route{NextHop: "10.99.2.1", Path: "64512", LocalPref: 100}
	waitRoutes(t, f, wantFRR)
	waitRoutes(t, b, wantBIRD)

	// One prefix says different things to the two peers.
	blue, red := to("192.0.2.2/32", "frr"), to("192.0.2.2/32", "bird")
	blue.Communities, red.Communities = []string{"64512:1"}, []string{"64512:2"}
	s.set(config(peers, blue, red))
	waitRoutes(t, f, map[string]route{"192.0.2.2/32": {NextHop: "10.99.1.1", Path: "64512", Communities: "64512:1"}})
	waitRoutes(t, b, map[string]route{"192.0.2.2/32": {NextHop: "10.99.2.1", Path: "64512", LocalPref: 100, Communities: "(64512,2)"}})

	// Everything goes while the sessions stay.
	s.set(config(peers))
	waitRoutes(t, f, map[string]route{})
	waitRoutes(t, b, map[string]route{})
	for name, since := range up {
		if got := s.waitState(name, "established"); !got.Since.Equal(since) || got.Advertised != 0 {
			t.Errorf("session was established at %v with 0 routes left, is now %+v", since, got)
		}
	}
}

// TestRefusal has peers with which no session is possible beside one that works, and stays.
func TestRefusal(t *testing.T) {
	l := newLab(t, "good", "wrong", "picky", "silent")
	good := l.bird("good", birdPeer(1, 65001))
	l.bird("wrong", birdPeer(2, 64999))                                            // is not in the AS we expect
	l.frr("picky", 65003, "neighbor 10.99.3.1 remote-as 64999")                    // expects another AS from us
	l.daemon("silent", "ip", "netns", "exec", l.ns("silent"), "sleep", "infinity") // nothing listens
	s := l.speaker(t)
	peers := []Peer{peer(1, "good")}
	s.set(config(peers, to("192.0.2.1/32")))
	since := s.waitState("good", "established").Since

	impossible := peer(5, "impossible")
	impossible.HoldTime = time.Second
	twin := peer(1, "twin")
	peers = append(peers, peer(2, "wrong"), peer(3, "picky"), peer(4, "silent"), impossible, twin)
	s.set(config(peers, to("192.0.2.1/32")))
	s.waitReason("wrong", "bad peer as")
	s.waitReason("picky", "the peer refused the session; does it expect AS 64512 from us?")
	s.waitReason("silent", "10.99.4.2:179: connect: connection refused")
	s.waitReason("impossible", "HoldTime 1s is not within 3 to 65535 seconds")
	s.waitReason("twin", "Address 10.99.1.2 is that of peer good")

	waitRoutes(t, good, map[string]route{"192.0.2.1/32": {NextHop: "10.99.1.1", Path: "64512", LocalPref: 100}})
	if got := s.session("good"); !got.Since.Equal(since) || got.State != "established" || got.Reason != "" {
		t.Errorf("session was established at %v, is now %+v", since, got)
	}

	// Corrected, it works.
	peers[1].PeerASN = 64999
	s.set(config(peers, to("192.0.2.1/32")))
	s.waitState("wrong", "established")
}

// TestPassword has a peer that wants another TCP MD5 password than ours, and then the same.
func TestPassword(t *testing.T) {
	l := newLab(t, "bird")
	b := l.bird("bird", birdPeer(1, 65001, `password "right";`))
	s := l.speaker(t)
	p := peer(1, "bird")
	p.Password = "wrong"
	s.set(config([]Peer{p}, to("192.0.2.1/32")))
	s.waitReason("bird", "cannot connect to 10.99.1.2:179: i/o timeout")
	p.Password = "right"
	s.set(config([]Peer{p}, to("192.0.2.1/32")))
	s.waitState("bird", "established")
	waitRoutes(t, b, map[string]route{"192.0.2.1/32": {NextHop: "10.99.1.1", Path: "64512", LocalPref: 100}})
}

// TestPeerRestart kills a peer, and it comes back.
func TestPeerRestart(t *testing.T) {
	l := newLab(t, "bird", "other")
	b := l.bird("bird", birdPeer(1, 65001))
	l.bird("other", birdPeer(2, 65002))
	s := l.speaker(t)
	routes := []announcer.Route{to("192.0.2.1/32"), to("2001:db8::1/128", "other")}
	s.set(config([]Peer{peer(1, "bird"), peer(2, "other")}, routes...))
	s.waitState("bird", "established")
	since := s.waitState("other", "established").Since

	b.kill()
	s.waitReason("bird", "the peer closed the connection")
	// What changes while it is away is what it gets when it is back.
	s.set(config([]Peer{peer(1, "bird"), peer(2, "other")}, to("192.0.2.9/32")))
	b = l.bird("bird", birdPeer(1, 65001))
	s.waitState("bird", "established")
	waitRoutes(t, b, map[string]route{"192.0.2.9/32": {NextHop: "10.99.1.1", Path: "64512", LocalPref: 100}})
	if got := s.session("bird"); got.Reason == "" || got.Advertised != 1 {
		t.Errorf("session %+v: want a Reason from last time and 1 route", got)
	}

	// A peer that goes silent is noticed when the hold time has passed.
	fast := peer(1, "bird")
	fast.HoldTime = 3 * time.Second
	slow := s.session("bird").Since
	s.set(config([]Peer{fast, peer(2, "other")}, to("192.0.2.9/32")))
	waitFor(t, "a session with the short hold time", func() error {
		if got := s.session("bird"); got.State != "established" || !got.Since.After(slow) {
			return fmt.Errorf("session is %+v", got)
		}
		return nil
	})
	run(t, "ip", "-n", l.ns("bird"), "link", "set", "uplink", "down")
	s.waitReason("bird", "hold timer expired")
	if got := s.session("other"); !got.Since.Equal(since) || got.State != "established" {
		t.Errorf("the other session was established at %v, is now %+v", since, got)
	}
}

// TestChange changes one peer, then the router ID, and follows the sessions.
func TestChange(t *testing.T) {
	l := newLab(t, "changed", "kept")
	changed := l.bird("changed", birdPeer(1, 65001, "neighbor as 64513;"))
	kept := l.bird("kept", birdPeer(2, 65002))
	s := l.speaker(t)
	p, q := peer(1, "changed"), peer(2, "kept")
	s.set(config([]Peer{p, q}, to("192.0.2.1/32")))
	since := s.waitState("kept", "established").Since
	s.waitReason("changed", "refused")

	p.LocalASN = 64513
	s.set(config([]Peer{p, q}, to("192.0.2.1/32")))
	s.waitState("changed", "established")
	waitRoutes(t, changed, map[string]route{"192.0.2.1/32": {NextHop: "10.99.1.1", Path: "64513", LocalPref: 100}})
	if got := s.session("kept"); !got.Since.Equal(since) || got.State != "established" {
		t.Errorf("session was established at %v, is now %+v", since, got)
	}

	c := config([]Peer{p, q}, to("192.0.2.1/32"))
	c.RouterID = netip.MustParseAddr("10.99.0.2")
	s.set(c)
	for _, b := range []*bird{changed, kept} {
		waitFor(t, "the new router ID at "+b.name, func() error {
			out, err := b.birdc("show protocols all speaker")
			if err == nil && !strings.Contains(out, "Neighbor ID:      10.99.0.2") {
				err = errors.New(out)
			}
			return err
		})
	}
	waitRoutes(t, kept, map[string]route{"192.0.2.1/32": {NextHop: "10.99.2.1", Path: "64512", LocalPref: 100}})

	// A removed peer is told to forget everything; without peers nothing is left.
	s.set(config([]Peer{p}, to("192.0.2.1/32")))
	waitRoutes(t, kept, map[string]route{})
	s.set(config(nil, to("192.0.2.1/32")))
	waitRoutes(t, changed, map[string]route{})
}

// TestGracefulRestart stops the speaker and starts it again: a peer with graceful restart has the routes all the time, one without loses them.
func TestGracefulRestart(t *testing.T) {
	l := newLab(t, "frr", "bird", "without")
	f := l.frr("frr", 65001, frrPeer(1)...)
	b := l.bird("bird", birdPeer(2, 65002))
	without := l.bird("without", birdPeer(3, 65003))
	peers := []Peer{peer(1, "frr"), peer(2, "bird"), peer(3, "without")}
	peers[0].GracefulRestart, peers[1].GracefulRestart = true, true
	c := config(peers, to("192.0.2.1/32"), to("2001:db8::1/128"))

	wantFRR := map[string]route{
		"192.0.2.1/32":    {NextHop: "10.99.1.1", Path: "64512"},
		"2001:db8::1/128": {NextHop: "fd99:2::1", Path: "64512"},
	}
	wantBIRD := map[string]route{
		"192.0.2.1/32":    {NextHop: "10.99.2.1", Path: "64512", LocalPref: 100},
		"2001:db8::1/128": {NextHop: "fd99:2::1", Path: "64512", LocalPref: 100},
	}
	wantWithout := map[string]route{"192.0.2.1/32": {NextHop: "10.99.3.1", Path: "64512", LocalPref: 100}}
	s := l.speaker(t)
	s.set(c)
	waitRoutes(t, f, wantFRR)
	waitRoutes(t, b, wantBIRD)
	waitFor(t, "the route at the peer without", func() error {
		got, err := without.routes()
		if err == nil && got["192.0.2.1/32"] != wantWithout["192.0.2.1/32"] {
			err = fmt.Errorf("table is %v", got)
		}
		return err
	})
	out, err := f.vtysh("show bgp ipv4 neighbors 10.99.1.1 graceful-restart")
	if err != nil || !strings.Contains(string(out), "Received Restart Time(sec): 120") {
		t.Errorf("FRR did not hear of a restart time of 120 s: %v\n%s", err, out)
	}

	// From here on no look at the tables may find a route missing.
	type table struct {
		router router
		want   map[string]route
	}
	stop, watched := make(chan struct{}), make(chan error, 2)
	for _, at := range []table{{f, wantFRR}, {b, wantBIRD}} {
		go func() {
			for n := 0; ; n++ {
				got, err := at.router.routes()
				if err == nil {
					if diff := cmp.Diff(at.want, got); diff != "" {
						err = fmt.Errorf("look %d (-want +got)\n%s", n, diff)
					}
				}
				if err != nil {
					watched <- err
					return
				}
				select {
				case <-stop:
					watched <- nil
					return
				default:
				}
			}
		}()
	}
	s.stop()
	waitRoutes(t, without, map[string]route{})
	s = l.speaker(t)
	s.set(c)
	for _, p := range peers {
		s.waitState(p.Name, "established")
	}
	waitFor(t, "the end of the restart", func() error {
		got, err := without.routes()
		if err == nil && got["192.0.2.1/32"] != wantWithout["192.0.2.1/32"] {
			err = fmt.Errorf("table is %v", got)
		}
		if err != nil {
			return err
		}
		for neighbor, r := range map[string]func() (string, error){
			"frr": func() (string, error) {
				out, err := f.vtysh("show bgp ipv4 unicast 192.0.2.1/32")
				return string(out), err
			},
			"bird": func() (string, error) { return b.birdc("show protocols all speaker") },
		} {
			out, err := r()
			if err != nil {
				return err
			}
			if strings.Contains(strings.ToLower(out), "stale") || strings.Contains(out, "Restart: ") {
				return fmt.Errorf("%s still waits: %s", neighbor, out)
			}
		}
		return nil
	})
	close(stop)
	for range 2 {
		if err := <-watched; err != nil {
			t.Errorf("a route was gone for a while: %v", err)
		}
	}

	// A route that went while we were away goes when we are back.
	s.stop()
	s = l.speaker(t)
	s.set(config(peers, to("192.0.2.1/32")))
	delete(wantFRR, "2001:db8::1/128")
	delete(wantBIRD, "2001:db8::1/128")
	waitRoutes(t, f, wantFRR)
	waitRoutes(t, b, wantBIRD)
}

// TestInternal has iBGP sessions, one over IPv6: LOCAL_PREF goes along, and what peers send goes nowhere.
func TestInternal(t *testing.T) {
	l := newLab(t, "frr", "bird")
	f := l.frr("frr", 64512, "neighbor fd99:1::1 remote-as 64512", "address-family ipv6 unicast", " neighbor fd99:1::1 activate")
	b := l.bird("bird", birdPeer(2, 64512), "route 203.0.113.0/24 blackhole;")
	s := l.speaker(t)
	p, q := peer(1, "frr"), peer(2, "bird")
	p.PeerASN, q.PeerASN = 64512, 64512
	p.Address, p.Source = netip.MustParseAddr("fd99:1::2"), netip.MustParseAddr("fd99:1::1")
	preferred := to("192.0.2.1/32")
	preferred.LocalPref = 200
	s.set(config([]Peer{p, q}, preferred, to("192.0.2.2/32"), to("2001:db8::1/128")))
	waitRoutes(t, f, map[string]route{
		"192.0.2.1/32":    {NextHop: "10.99.0.1", Path: "Local", LocalPref: 200},
		"192.0.2.2/32":    {NextHop: "10.99.0.1", Path: "Local", LocalPref: 100},
		"2001:db8::1/128": {NextHop: "fd99:1::1", Path: "Local", LocalPref: 100},
	})
	waitRoutes(t, b, map[string]route{
		"192.0.2.1/32":    {NextHop: "10.99.2.1", LocalPref: 200},
		"192.0.2.2/32":    {NextHop: "10.99.2.1", LocalPref: 100},
		"2001:db8::1/128": {NextHop: "fd99:2::1", LocalPref: 100},
	})
}

// TestForeignRoutes has a peer that sends a route: no other gets it. Then it sends too many.
func TestForeignRoutes(t *testing.T) {
	l := newLab(t, "frr", "bird")
	f := l.frr("frr", 65001, frrPeer(1)...)
	static := []string{"route 203.0.113.0/24 blackhole;"}
	b := l.bird("bird", birdPeer(2, 65002), static...)
	s := l.speaker(t)
	s.set(config([]Peer{peer(1, "frr"), peer(2, "bird")}, to("192.0.2.1/32")))
	atFRR := map[string]route{"192.0.2.1/32": {NextHop: "10.99.1.1", Path: "64512"}}
	waitRoutes(t, f, atFRR)
	s.waitState("bird", "established")
	// The marker is sent after bird's routes have come.
	s.set(config([]Peer{peer(1, "frr"), peer(2, "bird")}, to("192.0.2.1/32"), to("192.0.2.2/32")))
	atFRR["192.0.2.2/32"] = route{NextHop: "10.99.1.1", Path: "64512"}
	waitRoutes(t, f, atFRR)

	b.kill()
	for n := range prefixLimit + 1 {
		static = append(static, fmt.Sprintf("route 11.%d.%d.%d/32 blackhole;", n>>16, n>>8&255, n&255))
	}
	l.bird("bird", birdPeer(2, 65002), static...)
	s.waitReason("bird", "the peer sent more than 50000 prefixes of a family")
	waitRoutes(t, f, atFRR)
}

// TestMultiHop has a peer two hops away: the session needs EBGPMultiHop.
func TestMultiHop(t *testing.T) {
	l := newLab(t, "router")
	// Behind the router, in its own namespace, an address a packet with TTL 1 does not reach.
	l.addNamespace("far")
	run(t, "ip", "-n", l.ns("router"), "link", "add", "to-far", "type", "veth", "peer", "name", "uplink", "netns", l.ns("far"))
	run(t, "ip", "-n", l.ns("router"), "addr", "add", "10.99.9.1/24", "dev", "to-far")
	run(t, "ip", "-n", l.ns("far"), "addr", "add", "10.99.9.2/24", "dev", "uplink")
	run(t, "ip", "-n", l.ns("router"), "link", "set", "to-far", "up")
	run(t, "ip", "-n", l.ns("far"), "link", "set", "uplink", "up")
	run(t, "ip", "-n", l.ns("far"), "route", "add", "default", "via", "10.99.9.1")
	run(t, "ip", "-n", l.ns("speaker"), "route", "add", "10.99.9.0/24", "via", "10.99.1.2")
	run(t, "ip", "netns", "exec", l.ns("router"), "sysctl", "-qw", "net.ipv4.ip_forward=1")
	far := l.bird("far", []string{"local 10.99.9.2 as 65009;", "neighbor 10.99.1.1 as 64512;", "multihop;", "ipv4 { import all; export none; };"})

	s := l.speaker(t)
	p := peer(9, "far")
	s.set(config([]Peer{p}, to("192.0.2.1/32")))
	s.waitReason("far", "cannot connect to 10.99.9.2:179")
	p.EBGPMultiHop = true
	s.set(config([]Peer{p}, to("192.0.2.1/32"), to("2001:db8::1/128")))
	waitRoutes(t, far, map[string]route{"192.0.2.1/32": {NextHop: "10.99.1.1", Path: "64512", LocalPref: 100}})
	// The peer takes no IPv6.
	if got := s.waitState("far", "established"); got.Advertised != 1 {
		t.Errorf("session %+v: Advertised is not 1", got)
	}
}
