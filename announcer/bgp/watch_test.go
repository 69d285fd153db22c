package bgp

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/longshore-lb/longshore/announcer/bfd"
)

// TestJudge: what BFD sessions mean for BGP sessions.
func TestJudge(t *testing.T) {
	up := bfd.Status{State: bfd.Up, Remote: bfd.Up}
	down := bfd.Status{State: bfd.Down, Remote: bfd.Down}
	off := bfd.Status{State: bfd.Down, Remote: bfd.AdminDown, Diagnostic: bfd.NeighborDown}
	failed := bfd.Status{State: bfd.Down, Remote: bfd.Down, Diagnostic: bfd.DetectionTimeExpired, Failures: 1}
	back := bfd.Status{State: bfd.Up, Remote: bfd.Up, Failures: 1}
	for _, test := range []struct {
		name        string
		strict      bool
		before      gate
		status      bfd.Status
		established bool
		want        gate
	}{
		{"up", false, gate{}, up, true, gate{open: true}},
		{"not up yet", false, gate{}, down, true, gate{open: true}},
		{"failed", false, gate{open: true}, failed, true, gate{failures: 1, ending: true, reason: "BFD: control detection time expired"}},
		{"failed and back before anybody looked", false, gate{open: true}, back, true, gate{failures: 1, ending: true, reason: "BFD: the path had failed"}},
		{"failed, and there was no session", false, gate{open: true}, failed, false, gate{failures: 1, open: true}},
		{"failed, known", false, gate{failures: 1, open: true}, failed, true, gate{failures: 1, open: true}},
		{"failed, gobgp is at it", false, gate{failures: 1, ending: true, reason: "BFD: x"}, failed, true, gate{failures: 1, ending: true, reason: "BFD: x"}},
		{"switched off by the peer", false, gate{open: true}, off, true, gate{open: true}},
		{"strict, up", true, gate{}, up, false, gate{open: true}},
		{"strict, not up yet", true, gate{}, down, false, gate{reason: "waits for BFD, which is down"}},
		{"strict, failed", true, gate{open: true}, failed, true, gate{failures: 1, ending: true, reason: "BFD: control detection time expired"}},
		{"strict, still down", true, gate{failures: 1}, failed, false, gate{failures: 1, reason: "waits for BFD, which is down"}},
		{"strict, switched off by the peer", true, gate{}, off, false, gate{open: true}},
	} {
		got := test.before
		got.judge(test.strict, test.status, test.established)
		if diff := cmp.Diff(test.want, got, cmp.AllowUnexported(gate{})); diff != "" {
			t.Errorf("%s (-want +got):\n%s", test.name, diff)
		}
	}
}

// TestWatched: over how many hops the paths are.
func TestWatched(t *testing.T) {
	external, internal := peer(1, "a"), peer(2, "b")
	internal.PeerASN = internal.MyASN
	multi := external
	multi.EBGPMultiHop = true
	up := []bfd.Status{{Peer: internal.Address, State: bfd.Up, MultiHop: false}}
	for _, test := range []struct {
		name      string
		peer      Peer
		connected bool
		now       []bfd.Status
		ttl       uint8 // of the profile
		multiHop  bool
		wantTTL   uint8
	}{
		{"external", external, true, nil, 200, false, 0},
		{"external, not on a link", external, false, nil, 0, false, 0},
		{"external over hops", multi, true, nil, 0, true, 254},
		{"external over hops, a TTL of its own", multi, true, nil, 200, true, 200},
		{"internal on a link", internal, true, nil, 0, false, 0},
		{"internal elsewhere", internal, false, nil, 0, true, 254},
		{"internal and up, its link has just gone", internal, false, up, 0, false, 0},
	} {
		test.peer.BFD = BFD{Transmit: time.Second, Receive: 2 * time.Second, Multiplier: 5, MinimumTTL: test.ttl, Passive: true}
		want := []bfd.Session{{
			Peer: test.peer.Address, MultiHop: test.multiHop, MinimumTTL: test.wantTTL, Transmit: time.Second, Receive: 2 * time.Second, Multiplier: 5, Passive: true,
		}}
		got := watched([]Peer{test.peer}, func(netip.Addr) bool { return test.connected }, test.now)
		if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
			t.Errorf("%s (-want +got):\n%s", test.name, diff)
		}
	}
	if !onLink(netip.MustParseAddr("127.0.0.1")) || !onLink(netip.MustParseAddr("fe80::1%lo")) || onLink(netip.MustParseAddr("198.51.100.77")) {
		t.Error("onLink does not know this machine's links")
	}
}

// frrWatching is FRR's bgpd with zebra, over which it talks to bfdd.
func (l *lab) frrWatching(name string, asn uint32, lines ...string) *frr {
	l.t.Helper()
	dir := filepath.Join(l.dir, name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		l.t.Fatal(err)
	}
	for daemon, conf := range map[string]string{
		"zebra": "", "bfdd": "",
		"bgpd": fmt.Sprintf("router bgp %d\n bgp router-id 10.99.99.98\n no bgp ebgp-requires-policy\n no bgp network import-check\n %s\n", asn, strings.Join(lines, "\n ")),
	} {
		if err := os.WriteFile(filepath.Join(dir, daemon+".conf"), []byte(conf), 0o644); err != nil {
			l.t.Fatal(err)
		}
	}
	owner, err := user.Lookup("frr")
	if err != nil {
		l.t.Fatal(err)
	}
	run(l.t, "chown", "-R", owner.Uid, dir)
	if err := os.Chmod(l.dir, 0o755); err != nil {
		l.t.Fatal(err)
	}
	f := &frr{lab: l, name: name}
	for _, daemon := range []string{"zebra", "bfdd", "bgpd"} {
		argv := []string{"/usr/lib/frr/" + daemon, "--vty_port", "0", "--log", "stdout", "--config_file", filepath.Join(dir, daemon+".conf"),
			"--pid_file", filepath.Join(dir, daemon+".pid"), "--vty_socket", dir, "--socket", filepath.Join(dir, "zserv")}
		if daemon == "bfdd" {
			argv = append(argv, "--bfdctl", filepath.Join(dir, "bfdd.sock"))
		}
		f.daemon = l.daemon(name, argv...)
		waitFor(l.t, daemon+" to answer", func() error {
			if out, err := exec.Command("ip", "netns", "exec", l.ns(name), "vtysh", "-d", daemon, "--vty_socket", dir, "-c", "show version").CombinedOutput(); err != nil {
				return fmt.Errorf("%w: %s", err, out)
			}
			return nil
		})
	}
	return f
}

// cut has every packet from and to the speaker dropped, until mend.
func (l *lab) cut() {
	l.t.Helper()
	run(l.t, "ip", "netns", "exec", l.ns("speaker"), "nft", "add table inet cut; add chain inet cut in { type filter hook input priority 0; policy drop; }; "+
		"add chain inet cut out { type filter hook output priority 0; policy drop; }")
}

func (l *lab) mend() {
	l.t.Helper()
	run(l.t, "ip", "netns", "exec", l.ns("speaker"), "nft", "delete table inet cut")
}

func fast(p Peer) Peer {
	p.BFD = BFD{Transmit: 100 * time.Millisecond, Receive: 100 * time.Millisecond, Multiplier: 3}
	return p
}

// waitSettled waits until both sessions with a peer have been up for a while: FRR's bgpd, when its session is up, tells bfdd more of the
// neighbor, and bfdd begins anew.
func (s *speaker) waitSettled(peer string) Session {
	s.t.Helper()
	const while = 2 * time.Second
	waitFor(s.t, fmt.Sprintf("sessions with %s to be up for %v", peer, while), func() error {
		got := s.session(peer)
		if got.State != "established" || got.BFD == nil || got.BFD.State != bfd.Up || time.Since(got.Since) < while || time.Since(got.BFD.Since) < while {
			return fmt.Errorf("session is %+v, %+v", got, got.BFD)
		}
		return nil
	})
	return s.session(peer)
}

// waitCount waits until the router has so many routes from us.
func waitCount(t *testing.T, r router, want int) {
	t.Helper()
	waitFor(t, fmt.Sprintf("%d routes at the peer", want), func() error {
		got, err := r.routes()
		if err == nil && len(got) != want {
			err = fmt.Errorf("it has %v", got)
		}
		return err
	})
}

// beforeHoldTime is when a failure must be noticed at the latest; the hold time is 30 s.
const beforeHoldTime = 8 * time.Second

// TestPathFails: the BGP sessions end when the path fails, on both sides and long before their hold time, and come back. Other intervals, and
// the end of watching, do not disturb them.
func TestPathFails(t *testing.T) {
	l := newLab(t, "frr", "bird")
	f := l.frrWatching("frr", 65001, "neighbor nodes peer-group", "neighbor nodes remote-as 64512", "bgp listen range 10.99.1.0/24 peer-group nodes")
	b := l.birdWatching("bird", birdPeer(2, 65002, "bfd on;"))
	s := l.speaker(t)
	peers := []Peer{fast(peer(1, "frr")), fast(peer(2, "bird"))}
	s.set(config(peers, to("192.0.2.1/32")))
	s.waitState("frr", "established") // such a neighbor is not there, nor watched, before it connects
	if _, err := f.vtysh("configure terminal", "router bgp 65001", "neighbor nodes bfd 3 100 100"); err != nil {
		t.Fatal(err)
	}
	routes := map[string]router{"frr": f, "bird": b}
	for _, p := range peers {
		s.waitSettled(p.Name)
		waitCount(t, routes[p.Name], 1)
	}

	before := s.session("frr")
	slower := []Peer{peers[0], peers[1]}
	for i := range slower {
		slower[i].BFD.Transmit = 150 * time.Millisecond
	}
	s.set(config(slower, to("192.0.2.1/32")))
	waitFor(t, "other intervals", func() error {
		if got := s.session("frr"); got.BFD == nil || got.BFD.Transmit != 150*time.Millisecond {
			return fmt.Errorf("session is %+v, %+v", got, got.BFD)
		}
		return nil
	})
	if got := s.session("frr"); !got.Since.Equal(before.Since) || got.BFD.Downs != before.BFD.Downs {
		t.Errorf("other intervals disturbed the session: %+v, %+v", got, got.BFD)
	}

	begun := time.Now()
	l.cut()
	for _, p := range peers {
		waitFor(t, "session "+p.Name+" to end", func() error {
			if got := s.session(p.Name); got.State == "established" {
				return fmt.Errorf("session is %+v, %+v", got, got.BFD)
			}
			return nil
		})
		s.waitReason(p.Name, "BFD: control detection time expired")
		waitCount(t, routes[p.Name], 0)
	}
	if took := time.Since(begun); took > beforeHoldTime {
		t.Errorf("noticed after %v", took)
	}
	l.mend()
	for _, p := range peers {
		s.waitSettled(p.Name)
		waitCount(t, routes[p.Name], 1)
	}
}

// birdWatching is BIRD with protocol bfd.
func (l *lab) birdWatching(name string, lines []string) *bird {
	lines[len(lines)-1] += "\n}\nprotocol bfd {\n interface \"*\" { interval 100 ms; multiplier 3; };" // bird closes what is open
	return l.bird(name, lines)
}

// TestStrict: with strict no session begins before BFD is up; without, BGP goes on without BFD.
func TestStrict(t *testing.T) {
	l := newLab(t, "frr", "other")
	f := l.frrWatching("frr", 65001, frrPeer(1)...)
	l.frr("other", 65002, frrPeer(2)...)
	s := l.speaker(t)
	strict := fast(peer(1, "frr"))
	strict.BFD.Strict = true
	s.set(config([]Peer{strict, fast(peer(2, "other"))}))
	s.waitState("other", "established")
	s.waitReason("frr", "waits for BFD, which is down")
	if got := s.session("frr"); got.State != "idle" {
		t.Errorf("a strict session without BFD is %+v", got)
	}
	if _, err := f.vtysh("configure terminal", "router bgp 65001", "neighbor 10.99.1.1 bfd 3 100 100"); err != nil {
		t.Fatal(err)
	}
	s.waitSettled("frr")
	l.cut()
	s.waitReason("frr", "waits for BFD, which is down")
	if got := s.session("other"); got.BFD == nil || got.BFD.Failures > 0 {
		t.Errorf("the other session: %+v, %+v", got, got.BFD)
	}
	l.mend()
	s.waitState("frr", "established")

	unwatched := peer(1, "frr")
	waiting := fast(peer(2, "other"))
	waiting.BFD.Strict = true
	s.set(config([]Peer{unwatched, waiting}))
	s.waitReason("other", "waits for BFD")
	s.set(config([]Peer{unwatched, peer(2, "other")}))
	s.waitState("other", "established")
}

// TestRestartWatched: a router that is told to look at the C bit keeps the routes through a restart although BFD ends.
func TestRestartWatched(t *testing.T) {
	l := newLab(t, "frr")
	f := l.frrWatching("frr", 65001, frrPeer(1, "neighbor 10.99.1.1 bfd 3 100 100", "neighbor 10.99.1.1 bfd check-control-plane-failure")...)
	p := fast(peer(1, "frr"))
	p.GracefulRestart = true
	c := config([]Peer{p}, to("192.0.2.1/32"))
	s := l.speaker(t)
	s.set(c)
	s.waitSettled("frr")
	waitCount(t, f, 1)
	s.stop()
	for begun := time.Now(); time.Since(begun) < 2*time.Second; time.Sleep(50 * time.Millisecond) {
		if got, err := f.routes(); err != nil || len(got) != 1 {
			t.Fatalf("%v after the end the peer has %v (%v)", time.Since(begun), got, err)
		}
	}
	again := l.speaker(t)
	again.set(c)
	again.waitSettled("frr")
	waitCount(t, f, 1)
}
