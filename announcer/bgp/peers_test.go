package bgp

import (
	"fmt"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// TestAttributesOnTheWire has MED and a longer AS_PATH at an external peer and an internal one.
func TestAttributesOnTheWire(t *testing.T) {
	l := newLab(t, "external", "internal", "frr")
	external := l.bird("external", birdPeer(1, 65001))
	internal := l.bird("internal", birdPeer(2, 64512))
	f := l.frr("frr", 65003, frrPeer(3)...)
	s := l.speaker(t)
	peers := []Peer{peer(1, "external"), peer(2, "internal"), peer(3, "frr")}
	peers[1].PeerASN = 64512
	peers[0].LocalASN = 64513
	external.kill()
	external = l.bird("external", birdPeer(1, 65001, "neighbor as 64513;"))
	far, near := to("192.0.2.1/32"), to("192.0.2.2/32")
	far.MED, far.Prepend = 4294967295, 2
	s.set(config(peers, far, near))
	waitRoutes(t, external, map[string]route{
		"192.0.2.1/32": {NextHop: "10.99.1.1", Path: "64513 64513 64513", LocalPref: 100, MED: 4294967295},
		"192.0.2.2/32": {NextHop: "10.99.1.1", Path: "64513", LocalPref: 100},
	})
	waitRoutes(t, internal, map[string]route{
		"192.0.2.1/32": {NextHop: "10.99.2.1", LocalPref: 100, MED: 4294967295},
		"192.0.2.2/32": {NextHop: "10.99.2.1", LocalPref: 100},
	})
	waitRoutes(t, f, map[string]route{
		"192.0.2.1/32": {NextHop: "10.99.3.1", Path: "64512 64512 64512", MED: 4294967295},
		"192.0.2.2/32": {NextHop: "10.99.3.1", Path: "64512"},
	})
	since := s.waitState("external", "established").Since
	far.MED, far.Prepend = 10, 0
	s.set(config(peers, far, near))
	waitRoutes(t, external, map[string]route{
		"192.0.2.1/32": {NextHop: "10.99.1.1", Path: "64513", LocalPref: 100, MED: 10},
		"192.0.2.2/32": {NextHop: "10.99.1.1", Path: "64513", LocalPref: 100},
	})
	if got := s.waitState("external", "established"); !got.Since.Equal(since) {
		t.Errorf("session was established at %v, is now %+v", since, got)
	}
}

// TestAnyASN has peers of which only is known that they are in another AS than ours. One is not.
func TestAnyASN(t *testing.T) {
	l := newLab(t, "other", "ours")
	other := l.bird("other", birdPeer(1, 65099))
	ours := l.bird("ours", birdPeer(2, 64512))
	s := l.speaker(t)
	p, q := peer(1, "other"), peer(2, "ours")
	p.PeerASN, p.AnyASN = 0, true
	q.PeerASN, q.AnyASN = 0, true
	s.set(config([]Peer{p, q}, to("192.0.2.1/32")))
	waitRoutes(t, other, map[string]route{"192.0.2.1/32": {NextHop: "10.99.1.1", Path: "64512", LocalPref: 100}})
	s.waitReason("ours", "the peer is in our own AS 64512, and any other is wanted; next attempt in 1m0s")
	waitRoutes(t, ours, map[string]route{})
}

// TestTTLSecurity has a router that takes only packets that have come over one link, and one that sends such as could have come from
// anywhere: with TTL 1.
func TestTTLSecurity(t *testing.T) {
	l := newLab(t, "bird", "careless")
	b := l.bird("bird", birdPeer(1, 65001, "ttl security on;"))
	l.bird("careless", birdPeer(2, 65002))
	s := l.speaker(t)
	p, q := peer(1, "bird"), peer(2, "careless")
	s.set(config([]Peer{q}, to("192.0.2.1/32")))
	s.waitState("careless", "established")
	p.TTLSecurityHops, q.TTLSecurityHops = 1, 1
	s.set(config([]Peer{p, q}, to("192.0.2.1/32")))
	waitRoutes(t, b, map[string]route{"192.0.2.1/32": {NextHop: "10.99.1.1", Path: "64512", LocalPref: 100}})
	waitFor(t, "packets of the careless router to be dropped", func() error {
		out, err := exec.Command("ip", "netns", "exec", l.ns("speaker"), "nstat", "-asz", "TcpExtTCPMinTTLDrop").Output()
		fields := strings.Fields(string(out))
		if err == nil && (len(fields) < 3 || fields[len(fields)-2] == "0") {
			err = fmt.Errorf("counters are %q", out)
		}
		return err
	})
	if got := s.session("careless"); got.State == "established" {
		t.Errorf("session is %+v", got)
	}
}

// TestDevice binds sessions to the link the peer is on, to another one, and to one that is not there. It is how a session is in a VRF,
// whose device is a link as any other here.
func TestDevice(t *testing.T) {
	l := newLab(t, "right", "wrong")
	right := l.bird("right", birdPeer(1, 65001))
	l.bird("wrong", birdPeer(2, 65002))
	s := l.speaker(t)
	p, q, absent := peer(1, "right"), peer(2, "wrong"), peer(3, "absent")
	p.Device, q.Device, absent.Device = "to-right", "to-right", "to-nowhere"
	s.set(config([]Peer{p, q, absent}, to("192.0.2.1/32")))
	waitRoutes(t, right, map[string]route{"192.0.2.1/32": {NextHop: "10.99.1.1", Path: "64512", LocalPref: 100}})
	s.waitReason("wrong", "cannot connect to 10.99.2.2:179")
	s.waitReason("absent", "no such device")
}

// TestGracefulShutdown has routes that are about to go, first all, then those of peers that would lose them when the speaker ends.
func TestGracefulShutdown(t *testing.T) {
	l := newLab(t, "external", "internal", "keeping")
	external := l.bird("external", birdPeer(1, 65001))
	internal := l.bird("internal", birdPeer(2, 64512))
	keeping := l.bird("keeping", birdPeer(3, 64512))
	s := l.speaker(t)
	peers := []Peer{peer(1, "external"), peer(2, "internal"), peer(3, "keeping")}
	peers[1].PeerASN, peers[2].PeerASN = 64512, 64512
	peers[2].GracefulRestart = true
	preferred := to("192.0.2.1/32")
	preferred.LocalPref = 300
	c := config(peers, preferred, to("192.0.2.2/32"))
	at := func(n, pref, otherPref int, path, communities string) map[string]route {
		hop := netip.AddrFrom4([4]byte{10, 99, byte(n), 1}).String()
		return map[string]route{
			"192.0.2.1/32": {NextHop: hop, LocalPref: pref, Path: path, Communities: communities},
			"192.0.2.2/32": {NextHop: hop, LocalPref: otherPref, Path: path, Communities: communities},
		}
	}
	const shutdown = "(65535,0)"
	s.set(c)
	waitRoutes(t, external, at(1, 100, 100, "64512", ""))
	waitRoutes(t, internal, at(2, 300, 100, "", ""))
	waitRoutes(t, keeping, at(3, 300, 100, "", ""))
	since := s.waitState("keeping", "established").Since

	c.Shutdown = true
	s.set(c)
	waitRoutes(t, external, at(1, 100, 100, "64512", shutdown))
	waitRoutes(t, internal, at(2, 0, 0, "", shutdown))
	waitRoutes(t, keeping, at(3, 0, 0, "", shutdown))
	c.Shutdown, c.ShutdownTime = false, 5*time.Second
	s.set(c)
	waitRoutes(t, external, at(1, 100, 100, "64512", ""))
	waitRoutes(t, internal, at(2, 300, 100, "", ""))
	waitRoutes(t, keeping, at(3, 300, 100, "", ""))
	if got := s.waitState("keeping", "established"); !got.Since.Equal(since) {
		t.Errorf("session was established at %v, is now %+v", since, got)
	}

	began := time.Now()
	stopped := make(chan struct{})
	go func() { defer close(stopped); s.stop() }()
	waitRoutes(t, external, at(1, 100, 100, "64512", shutdown))
	waitRoutes(t, internal, at(2, 0, 0, "", shutdown))
	waitRoutes(t, keeping, at(3, 300, 100, "", ""))
	<-stopped
	if took := time.Since(began); took < c.ShutdownTime {
		t.Errorf("ended after %v", took)
	}
	waitRoutes(t, external, map[string]route{})
	waitRoutes(t, internal, map[string]route{})
	waitRoutes(t, keeping, at(3, 300, 100, "", ""))
}

// TestUnnumbered has a router of which only the link is known, and two: routes of both families have our link-local address for next hop.
func TestUnnumbered(t *testing.T) {
	l := newLab(t, "frr", "nobody")
	for _, ns := range []string{"speaker", "frr"} { // as a fabric without numbers has it
		link := map[string]string{"speaker": "to-frr", "frr": "uplink"}[ns]
		run(t, "ip", "-n", l.ns(ns), "addr", "flush", "dev", link, "scope", "global")
	}
	s := l.speaker(t)
	p, q := peer(1, "frr"), peer(2, "nobody")
	p.Address, p.Interface = netip.Addr{}, "to-frr"
	q.Address, q.Interface = netip.Addr{}, "to-nobody"
	s.set(config([]Peer{p, q}, to("192.0.2.1/32"), to("2001:db8::1/128")))
	s.waitReason("frr", "no router advertises itself on link to-frr")

	f := l.unnumberedFRR("frr", 65001, "neighbor uplink interface remote-as 64512", "address-family ipv6 unicast", " neighbor uplink activate", "exit-address-family")
	own := linkLocal(t, l.ns("speaker"), "to-frr")
	want := map[string]route{
		"192.0.2.1/32":    {NextHop: own, Path: "64512"},
		"2001:db8::1/128": {NextHop: own, Path: "64512"},
	}
	waitRoutes(t, f, want)
	session := s.waitState("frr", "established")
	if router := linkLocal(t, l.ns("frr"), "uplink") + "%to-frr"; session.Address.String() != router || session.Advertised != 2 {
		t.Errorf("session is %+v, want one with %s and 2 routes", session, router)
	}
	s.waitReason("nobody", "no router advertises itself on link to-nobody")

	// Another router in its place, with another address.
	f.kill()
	s.waitReason("frr", "the peer closed the connection")
	s.set(config([]Peer{q}, to("192.0.2.1/32")))
	waitFor(t, "the peer to be gone", func() error {
		if got := s.session("frr"); got.Peer != "" {
			return fmt.Errorf("session is %+v", got)
		}
		return nil
	})
}

// linkLocal is the link-local address of a link.
func linkLocal(t *testing.T, ns, link string) string {
	t.Helper()
	var address string
	waitFor(t, "the link-local address of "+link, func() error {
		out, err := exec.Command("ip", "-n", ns, "-6", "-o", "addr", "show", "dev", link, "scope", "link", "-tentative").Output()
		if err != nil {
			return err
		}
		fields := strings.Fields(string(out))
		if len(fields) < 4 {
			return fmt.Errorf("ip says %q", out)
		}
		address, _, _ = strings.Cut(fields[3], "/")
		return nil
	})
	return address
}
