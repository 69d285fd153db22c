package bfd

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"
	"time"
)

func to(peer netip.Addr) Session {
	return Session{Peer: peer, Transmit: 100 * ms, Receive: 100 * ms, Multiplier: 3}
}

func far(peer netip.Addr) Session {
	s := to(peer)
	s.MultiHop, s.MinimumTTL = true, 254
	return s
}

// lateness is how much later than the detection time a session may be seen down on a busy machine.
const lateness = time.Second

// TestRouters has sessions with FRR and BIRD, one hop and two hops away, of both families and link-local: they come up, agree on intervals,
// change them without going down, notice a cut, come up again, and end without alarm.
func TestRouters(t *testing.T) {
	linkLocal := to(netip.MustParseAddr("fe80::2%right"))
	linkLocal.Source = netip.MustParseAddr("fe80::1%right") // the link has another one too, of its hardware address
	us := []neighbor{{agent4, near4, false}, {agent6, near6, false}}
	ourLinkLocal := neighbor{netip.MustParseAddr("fe80::1"), netip.MustParseAddr("fe80::2"), false}
	remote := []neighbor{{agent4, far4, true}, {agent6, far6, true}}
	birdFar := func(peer netip.Addr) Session { // BIRD sends with the system's TTL
		s := far(peer)
		s.MinimumTTL = 63
		return s
	}
	for _, test := range []struct {
		name     string
		router   func(*lab) router
		sessions []Session
		ours     []netip.Addr // as the router knows us, in the same order
	}{
		{"FRR", func(l *lab) router { return l.frr("near", append(us, ourLinkLocal)...) }, []Session{to(near4), to(near6), linkLocal},
			[]netip.Addr{agent4, agent6, ourLinkLocal.address}},
		{"BIRD", func(l *lab) router { return l.bird("near", append(us, ourLinkLocal)...) }, []Session{to(near4), to(near6), linkLocal},
			[]netip.Addr{agent4, agent6, ourLinkLocal.address}},
		{"FRR over two hops", func(l *lab) router { return l.frr("far", remote...) }, []Session{far(far4), far(far6)}, []netip.Addr{agent4, agent6}},
		{"BIRD over two hops", func(l *lab) router { return l.bird("far", remote...) }, []Session{birdFar(far4), birdFar(far6)}, []netip.Addr{agent4, agent6}},
	} {
		t.Run(test.name, func(t *testing.T) {
			l := newLab(t)
			r := test.router(l)
			a := l.agent()
			a.set(test.sessions...)
			detection := routerMultiplier * routerTransmit
			for i, s := range test.sessions {
				waitRouter(t, r, test.ours[i], "up")
				a.wait(s.Peer, "up, as negotiated", func(s Status) bool {
					return s.State == Up && s.Remote == Up && s.Transmit == routerReceive && s.DetectionTime == detection
				})
			}
			sent := a.session(test.sessions[0].Peer).Sent
			begun := time.Now()
			a.wait(test.sessions[0].Peer, "sending", func(s Status) bool { return s.Sent >= sent+10 })
			if took := time.Since(begun); took < 10*routerReceive*3/4-routerReceive || took > 10*routerReceive+lateness {
				t.Errorf("ten packets in %v, negotiated are %v for each", took, routerReceive)
			}

			slower := make([]Session, len(test.sessions))
			for i, s := range test.sessions {
				s.Transmit, s.Receive = 300*ms, 250*ms
				slower[i] = s
			}
			a.set(slower...)
			for _, s := range test.sessions {
				a.wait(s.Peer, "as negotiated anew", func(s Status) bool {
					return s.State == Up && s.Downs == 0 && s.Transmit == 300*ms && s.DetectionTime == routerMultiplier*250*ms
				})
			}
			a.set(test.sessions...)
			for _, s := range test.sessions {
				a.wait(s.Peer, "as before", func(s Status) bool {
					return s.State == Up && s.Downs == 0 && s.Transmit == routerReceive && s.DetectionTime == detection
				})
			}

			cut := time.Now()
			l.cut()
			for i, s := range test.sessions {
				got := a.waitState(s.Peer, Down)
				if took := got.Since.Sub(cut); took > detection+lateness || got.Diagnostic != DetectionTimeExpired || got.Failures != 1 {
					t.Errorf("%v noticed after %v, detection time %v: %+v", s.Peer, took, detection, got)
				}
				waitRouter(t, r, test.ours[i], "down")
			}
			l.mend()
			for i, s := range test.sessions {
				a.waitState(s.Peer, Up)
				waitRouter(t, r, test.ours[i], "up")
			}

			begun = time.Now()
			a.stop()
			if took := time.Since(begun); took > lateness {
				t.Errorf("the end took %v", took)
			}
			want := "down"
			if _, ok := r.(frr); ok {
				want = "down, administratively down"
			}
			for _, ours := range test.ours {
				waitRouter(t, r, ours, want)
			}
		})
	}
}

// TestPeerSwitchesOff: that a router ends its session on purpose is no failure, and says so.
func TestPeerSwitchesOff(t *testing.T) {
	l := newLab(t)
	r := l.frr("near", neighbor{agent4, near4, false})
	a := l.agent()
	a.set(to(near4))
	a.waitState(near4, Up)
	if _, err := r.vtysh("bfdd", "configure terminal", "bfd", "peer 10.98.1.1 local-address 10.98.1.2", "shutdown"); err != nil {
		t.Fatal(err)
	}
	a.wait(near4, "switched off by the peer", func(s Status) bool {
		return s.Remote == AdminDown && s.State == Down && s.Failures == 0 && s.Downs == 1
	})
}

// TestPassive: a passive session says nothing until the router does, and then comes up.
func TestPassive(t *testing.T) {
	l := newLab(t)
	a := l.agent()
	passive := to(near4)
	passive.Passive = true
	a.set(passive, to(near6))
	a.wait(near6, "down and sending", func(s Status) bool { return s.Sent >= 3 })
	if s := a.session(near4); s.Sent != 0 {
		t.Errorf("the passive session has sent: %+v", s)
	}
	l.frr("near", neighbor{agent4, near4, false})
	a.waitState(near4, Up)
}

// hello is the first packet of a session.
func hello() []byte {
	return packet{state: Down, multiplier: 3, my: 7, desiredMinTx: time.Second, requiredMinRx: time.Second}.marshal()
}

// TestTTL: what has come over a router, or too many of them, or from who is no peer, never reaches the program.
func TestTTL(t *testing.T) {
	for _, test := range []struct {
		name     string
		session  Session
		from     netip.Addr
		to       netip.AddrPort
		good     int // TTL
		stranger netip.Addr
	}{
		{"IPv4", to(near4), near4, netip.AddrPortFrom(agent4, singleHopPort), 255, netip.MustParseAddr("10.98.1.77")},
		{"IPv6", to(near6), near6, netip.AddrPortFrom(agent6, singleHopPort), 255, netip.MustParseAddr("fd98:1::77")},
		{"IPv4 over hops", func() Session { s := far(near4); s.MinimumTTL = 100; return s }(), near4, netip.AddrPortFrom(agent4, multiHopPort), 100,
			netip.MustParseAddr("10.98.1.77")},
		{"IPv6 over hops", func() Session { s := far(near6); s.MinimumTTL = 100; return s }(), near6, netip.AddrPortFrom(agent6, multiHopPort), 100,
			netip.MustParseAddr("fd98:1::77")},
	} {
		t.Run(test.name, func(t *testing.T) {
			l := newLab(t)
			l.must("near", fmt.Sprintf("ip addr add %v/%d dev left nodad", test.stranger, test.stranger.BitLen()))
			a := l.agent()
			other := to(far4) // another peer in the filter, before and after
			if test.from.Is6() {
				other = to(far6)
			}
			other.MultiHop, other.MinimumTTL = test.session.MultiHop, test.session.MinimumTTL
			a.set(other, test.session)
			a.wait(test.from, "there", func(s Status) bool { return s.State == Down && s.Sent > 0 })
			l.send("near", datagram{netip.AddrPortFrom(test.from, 50000), test.to, test.good - 1, [][]byte{hello(), hello(), {1}}})
			l.send("near", datagram{netip.AddrPortFrom(test.stranger, 50000), test.to, 255, [][]byte{hello(), hello(), {1}}})
			if s := a.session(test.from); s.Received+s.Discarded > 0 || s.State != Down {
				t.Errorf("with TTL %d: %+v", test.good-1, s)
			}
			l.send("near", datagram{netip.AddrPortFrom(test.from, 50000), test.to, test.good, [][]byte{hello()}}) // comes after the others
			got := a.wait(test.from, "taken", func(s Status) bool { return s.Received+s.Discarded > 0 })
			if got.Received != 1 || got.Discarded != 0 || got.Downs != 0 {
				t.Errorf("one packet with TTL %d and several that must not count: %+v", test.good, got)
			}
		})
	}
}

// TestGarbage: nothing that comes from the peer's own address and is no packet of the session disturbs it.
func TestGarbage(t *testing.T) {
	l := newLab(t)
	l.frr("near", neighbor{agent4, near4, false})
	a := l.agent()
	a.set(to(near4))
	a.waitState(near4, Up)
	random := rand.New(rand.NewPCG(1, 1))
	var payloads [][]byte
	for range 200 {
		b := make([]byte, random.IntN(60))
		for i := range b {
			b[i] = byte(random.Uint32())
		}
		payloads = append(payloads, b)
	}
	other := packet{state: Down, multiplier: 3, my: 7, your: 8, desiredMinTx: time.Second, requiredMinRx: time.Second}.marshal()
	authenticated := hello()
	authenticated[1] |= flagAuthentication
	payloads = append(payloads, other, authenticated)
	l.send("near", datagram{netip.AddrPortFrom(near4, 50000), netip.AddrPortFrom(agent4, singleHopPort), 255, payloads})
	got := a.wait(near4, "disturbed", func(s Status) bool { return s.Discarded >= uint64(len(payloads)) })
	if got.State != Up || got.Downs > 0 {
		t.Errorf("after garbage: %+v", got)
	}
	a.wait(near4, "without a problem, as good packets come", func(s Status) bool { return s.Problem == "" && s.State == Up && s.Downs == 0 })
}

// TestPortTaken: where another program has the port, the sessions say so, and work when it is gone.
func TestPortTaken(t *testing.T) {
	l := newLab(t)
	l.frr("near", neighbor{agent4, near4, false})
	first, second := l.agent(), l.agent()
	first.set(to(far4))
	first.wait(far4, "there", func(s Status) bool { return s.Sent > 0 })
	second.set(to(near4))
	second.wait(near4, "deaf", func(s Status) bool { return strings.Contains(s.Problem, "address already in use") })
	first.stop()
	second.wait(near4, "up", func(s Status) bool { return s.State == Up && s.Problem == "" })
}

// TestSet: sessions come and go, one by one, and a new one takes the place of one with another source.
func TestSet(t *testing.T) {
	l := newLab(t)
	r := l.frr("near", neighbor{agent4, near4, false}, neighbor{agent6, near6, false})
	a := l.agent()
	a.set(to(near4), to(near6))
	a.waitState(near4, Up)
	a.waitState(near6, Up)
	a.set(to(near6))
	waitRouter(t, r, agent4, "down, administratively down")
	sourced := to(near4)
	sourced.Source = agent4
	a.set(sourced, to(near6))
	a.waitState(near4, Up)
	if s := a.session(near6); s.Downs > 0 || s.State != Up {
		t.Errorf("the session that stayed: %+v", s)
	}
	waitRouter(t, r, agent4, "up")
}
