package bfd

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

const ms = time.Millisecond

// start is when the tests' clock starts.
var start = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func session(transmit, receive time.Duration, multiplier uint8) Session {
	return Session{Peer: netip.MustParseAddr("192.0.2.1"), Transmit: transmit, Receive: receive, Multiplier: multiplier}
}

func always(f float64) func() float64 { return func() float64 { return f } }

// TestTransitions has every state and everything that may happen in it (RFC 5880 section 6.8.6).
func TestTransitions(t *testing.T) {
	const silence = 100 // not a state: the detection time expires
	type event = State
	for _, test := range []struct {
		state State
		event event
		want  State
		why   Diagnostic
		fails bool // says something about the path
	}{
		{Down, AdminDown, Down, NoDiagnostic, false},
		{Down, Down, Init, NoDiagnostic, false},
		{Down, Init, Up, NoDiagnostic, false},
		{Down, Up, Down, NoDiagnostic, false},
		{Down, silence, Down, NoDiagnostic, false},
		{Init, AdminDown, Down, NeighborDown, false},
		{Init, Down, Init, NoDiagnostic, false},
		{Init, Init, Up, NoDiagnostic, false},
		{Init, Up, Up, NoDiagnostic, false},
		{Init, silence, Down, DetectionTimeExpired, false},
		{Up, AdminDown, Down, NeighborDown, false},
		{Up, Down, Down, NeighborDown, true},
		{Up, Init, Up, NoDiagnostic, false},
		{Up, Up, Up, NoDiagnostic, false},
		{Up, silence, Down, DetectionTimeExpired, true},
		{AdminDown, Down, AdminDown, Administratively, false},
		{AdminDown, Up, AdminDown, Administratively, false},
		{AdminDown, silence, AdminDown, Administratively, false},
	} {
		t.Run(fmt.Sprintf("%v %v", test.state, test.event), func(t *testing.T) {
			m := newMachine(session(300*ms, 300*ms, 3), 1, always(1), start)
			now := start.Add(ms)
			m.state, m.your = test.state, 2
			if test.state == AdminDown {
				m.state = Up
				m.switchOff(start)
			} else {
				m.expires, m.remote = start.Add(time.Second), Down
			}
			if test.event == silence {
				now = start.Add(time.Second)
				m.advance(now)
			} else {
				m.receive(packet{state: test.event, multiplier: 3, my: 2, your: 1, desiredMinTx: 300 * ms, requiredMinRx: 300 * ms}, now)
			}
			if m.state != test.want || m.diagnostic != test.why || m.failures > 0 != test.fails {
				t.Errorf("%v because of %v, %d failures; want %v because of %v, a failure: %t", m.state, m.diagnostic, m.failures, test.want, test.why, test.fails)
			}
			if test.event == silence && m.state != AdminDown && m.your != 0 {
				t.Errorf("after silence the peer still is %d", m.your)
			}
			if changed := m.state != test.state; changed && test.state != AdminDown {
				if !m.since.Equal(now) || (test.event != silence && m.sendAt.After(now)) {
					t.Errorf("at %v in a new state since %v, says so at %v", now, m.since, m.sendAt)
				}
			}
		})
	}
}

// TestIntervals has what two systems agree on (RFC 5880 sections 6.8.2 and 6.8.4).
func TestIntervals(t *testing.T) {
	for _, test := range []struct {
		name                string
		ours                Session
		remoteTx, remoteRx  time.Duration
		remoteMultiplier    uint8
		state               State
		interval, detection time.Duration
	}{
		{"alike", session(300*ms, 300*ms, 3), 300 * ms, 300 * ms, 3, Up, 300 * ms, 900 * ms},
		{"the peer hears slowly", session(50*ms, 50*ms, 3), 50 * ms, 400 * ms, 3, Up, 400 * ms, 150 * ms},
		{"the peer sends slowly", session(50*ms, 50*ms, 3), 400 * ms, 50 * ms, 5, Up, 50 * ms, 2000 * ms},
		{"we hear slowly", session(50*ms, 700*ms, 3), 50 * ms, 50 * ms, 2, Up, 50 * ms, 1400 * ms},
		{"not up", session(50*ms, 50*ms, 3), 50 * ms, 50 * ms, 3, Init, time.Second, 150 * ms},
		{"slower than slow", session(2000*ms, 50*ms, 3), 50 * ms, 50 * ms, 3, Init, 2 * time.Second, 150 * ms},
	} {
		m := newMachine(test.ours, 1, always(1), start)
		m.receive(packet{state: Down, multiplier: test.remoteMultiplier, my: 2, desiredMinTx: test.remoteTx, requiredMinRx: test.remoteRx}, start)
		if test.state == Up {
			m.receive(packet{state: Up, multiplier: test.remoteMultiplier, my: 2, your: 1, desiredMinTx: test.remoteTx, requiredMinRx: test.remoteRx}, start)
		}
		if m.state != test.state || m.interval() != test.interval || m.detectionTime() != test.detection {
			t.Errorf("%s: %v, interval %v, detection time %v; want %v, %v, %v",
				test.name, m.state, m.interval(), m.detectionTime(), test.state, test.interval, test.detection)
		}
	}
}

// TestJitter: intervals are shortened by 0 to 25 %, with multiplier 1 by 10 to 25 % (RFC 5880 section 6.8.7).
func TestJitter(t *testing.T) {
	for _, test := range []struct {
		multiplier  uint8
		random      float64
		want, least time.Duration
	}{
		{3, 0, 750 * ms, 0}, {3, 0.5, 875 * ms, 0}, {3, 1, 1000 * ms, 0},
		{1, 0, 750 * ms, 0}, {1, 0.5, 825 * ms, 0}, {1, 1, 900 * ms, 0},
	} {
		m := newMachine(session(300*ms, 300*ms, test.multiplier), 1, always(test.random), start)
		if got := m.jittered(time.Second); (got - test.want).Abs() > time.Microsecond {
			t.Errorf("multiplier %d, random %v: %v, want %v", test.multiplier, test.random, got, test.want)
		}
		m.advance(start)
		if got := m.next().Sub(start); (got - test.want).Abs() > time.Microsecond {
			t.Errorf("multiplier %d, random %v: the second packet after %v, want %v", test.multiplier, test.random, got, test.want)
		}
	}
}

// TestPoll follows changes of intervals: which the peer has to acknowledge, and what waits for that (RFC 5880 section 6.8.3).
func TestPoll(t *testing.T) {
	m := newMachine(session(100*ms, 100*ms, 3), 1, always(1), start)
	hears := func(s State, final bool) {
		m.receive(packet{state: s, final: final, multiplier: 3, my: 2, your: 1, desiredMinTx: 50 * ms, requiredMinRx: 50 * ms}, start)
	}
	check := func(when string, polls bool, interval, detection time.Duration) {
		t.Helper()
		p := m.packet()
		if p.poll != polls || m.interval() != interval || m.detectionTime() != detection {
			t.Errorf("%s: polls %t, interval %v, detection time %v; want %t, %v, %v", when, p.poll, m.interval(), m.detectionTime(), polls, interval, detection)
		}
	}
	hears(Down, false)
	check("Init", false, time.Second, 300*ms)
	hears(Init, false)
	check("Up, faster", true, 100*ms, 300*ms)
	hears(Up, true)
	check("acknowledged", false, 100*ms, 300*ms)
	m.configure(session(400*ms, 60*ms, 3), start)
	check("slower, and shorter detection", true, 100*ms, 300*ms)
	hears(Up, false)
	check("not acknowledged yet", true, 100*ms, 300*ms)
	m.configure(session(500*ms, 60*ms, 3), start)
	hears(Up, true)
	check("the first of two acknowledged", true, 100*ms, 300*ms)
	hears(Up, true)
	check("the second too", false, 500*ms, 180*ms)
	m.configure(session(20*ms, 200*ms, 3), start)
	check("faster, and longer detection", true, 50*ms, 600*ms)
	hears(Up, true)
	if got := m.packet(); got.desiredMinTx != 20*ms || got.requiredMinRx != 200*ms {
		t.Errorf("says %+v", got)
	}

	answer, wanted := m.receive(packet{state: Up, poll: true, multiplier: 3, my: 2, your: 1, desiredMinTx: 50 * ms, requiredMinRx: 50 * ms}, start)
	if !wanted || !answer.final || answer.poll {
		t.Errorf("a poll is answered by %+v, %t", answer, wanted)
	}
}

// TestSilent has the cases in which nothing is sent (RFC 5880 sections 6.1 and 6.8.7).
func TestSilent(t *testing.T) {
	passive := session(300*ms, 300*ms, 3)
	passive.Passive = true
	m := newMachine(passive, 1, always(1), start)
	if _, sends := m.advance(start.Add(time.Hour)); sends || !m.next().IsZero() {
		t.Errorf("a passive session sends before it has heard the peer; next at %v", m.next())
	}
	m.receive(packet{state: Down, multiplier: 3, my: 2, desiredMinTx: time.Second, requiredMinRx: 300 * ms}, start.Add(time.Hour))
	if p, sends := m.advance(start.Add(time.Hour)); !sends || p.state != Init || p.your != 2 {
		t.Errorf("a passive session that has heard the peer sends %+v, %t", p, sends)
	}
	if _, sends := m.advance(start.Add(2 * time.Hour)); sends || m.state != Down {
		t.Errorf("a passive session that has lost the peer is %v and sends: %t", m.state, sends)
	}

	m = newMachine(session(300*ms, 300*ms, 3), 1, always(1), start)
	m.receive(packet{state: Down, multiplier: 3, my: 2, desiredMinTx: time.Second}, start)
	if _, sends := m.advance(start); sends {
		t.Error("sends to a peer that wants no packets")
	}
	m.receive(packet{state: Init, multiplier: 3, my: 2, your: 1, desiredMinTx: time.Second, requiredMinRx: ms, demand: true}, start)
	m.receive(packet{state: Up, final: true, multiplier: 3, my: 2, your: 1, desiredMinTx: time.Second, requiredMinRx: ms, demand: true}, start)
	if _, sends := m.advance(start); sends || m.state != Up {
		t.Errorf("in state %v with a peer in demand mode, sends: %t", m.state, sends)
	}
}

// TestSwitchOff: the peer is told three times that this is no failure, and nothing is heard any more.
func TestSwitchOff(t *testing.T) {
	m := newMachine(session(300*ms, 300*ms, 3), 1, always(1), start)
	m.receive(packet{state: Init, multiplier: 3, my: 2, your: 1, desiredMinTx: ms, requiredMinRx: ms}, start)
	m.switchOff(start)
	var got []string
	for now := start; !m.gone(); now = m.next() {
		if p, send := m.advance(now); send {
			got = append(got, fmt.Sprint(now.Sub(start), " ", p.state, " ", p.diagnostic, " ", p.poll, " ", p.your))
		}
	}
	want := []string{
		"0s admin-down administratively down false 2",
		"50ms admin-down administratively down false 2",
		"100ms admin-down administratively down false 2",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if m.failures > 0 || m.downs != 1 {
		t.Errorf("%d failures, %d downs", m.failures, m.downs)
	}
	never := newMachine(session(300*ms, 300*ms, 3), 1, always(1), start)
	if never.switchOff(start); !never.gone() {
		t.Error("a session that nobody knows of has somebody to tell")
	}
}

// wire joins two machines on a clock of their own. A packet takes a millisecond, if it is not lost.
type wire struct {
	t      *testing.T
	now    time.Time
	ends   [2]*machine
	flying []flight
	lost   func() bool
	sent   [2]int
}

type flight struct {
	at time.Time
	to int
	packet
}

func newWire(t *testing.T, random *rand.Rand, a, b Session) *wire {
	w := &wire{t: t, now: start, lost: func() bool { return false }}
	w.ends[0] = newMachine(a, 11, random.Float64, start)
	w.ends[1] = newMachine(b, 22, random.Float64, start)
	return w
}

func (w *wire) send(from int, p packet) {
	parsed, err := parse(p.marshal())
	if err != nil || parsed != p {
		w.t.Fatalf("end %d sends %+v, which is read as %+v, %v", from, p, parsed, err)
	}
	w.sent[from]++
	if !w.lost() {
		w.flying = append(w.flying, flight{w.now.Add(ms), 1 - from, p})
	}
}

// run lets time pass until it is over or stop says so.
func (w *wire) run(duration time.Duration, stop func() bool) {
	end := w.now.Add(duration)
	for !stop() {
		next := end
		for _, m := range w.ends {
			if at := m.next(); !at.IsZero() && at.Before(next) {
				next = at
			}
		}
		for _, f := range w.flying {
			next = earlier(next, f.at)
		}
		if !next.Before(end) {
			w.now = end
			return
		}
		w.now = earlier(maxTime(w.now, next), end)
		arrived := slices.Clone(w.flying)
		w.flying = nil
		for _, f := range arrived {
			if f.at.After(w.now) {
				w.flying = append(w.flying, f)
			} else if answer, wanted := w.ends[f.to].receive(f.packet, w.now); wanted {
				w.send(f.to, answer)
			}
		}
		for i, m := range w.ends {
			if p, send := m.advance(w.now); send {
				w.send(i, p)
			}
		}
	}
}

func maxTime(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

func (w *wire) both(s State) func() bool {
	return func() bool { return w.ends[0].state == s && w.ends[1].state == s }
}

func never() bool { return false }

// TestTwoMachines: two systems come up, agree on intervals, send as often as that, notice a cut within the detection time and not
// before, and come up again; with one passive, different intervals, and packets lost.
func TestTwoMachines(t *testing.T) {
	passive := session(300*ms, 300*ms, 3)
	passive.Passive = true
	for _, test := range []struct {
		name string
		a, b Session
		loss float64
	}{
		{"alike", session(300*ms, 300*ms, 3), session(300*ms, 300*ms, 3), 0},
		{"fast", session(10*ms, 10*ms, 3), session(10*ms, 10*ms, 3), 0},
		{"unlike", session(50*ms, 700*ms, 5), session(200*ms, 20*ms, 2), 0},
		{"one passive", passive, session(100*ms, 100*ms, 3), 0},
		{"multiplier 1", session(100*ms, 100*ms, 1), session(100*ms, 100*ms, 1), 0},
		{"lossy", session(50*ms, 50*ms, 8), session(50*ms, 50*ms, 8), 0.2},
	} {
		for seed := range uint64(20) {
			random := rand.New(rand.NewPCG(seed, 1))
			w := newWire(t, random, test.a, test.b)
			loss := func() bool { return random.Float64() < test.loss }
			w.lost = loss
			w.run(time.Minute, w.both(Up))
			if !w.both(Up)() {
				t.Fatalf("%s, seed %d: %v and %v after a minute", test.name, seed, w.ends[0].state, w.ends[1].state)
			}
			w.run(5*time.Second, never)
			for i, m := range w.ends {
				want := max([2]Session{test.a, test.b}[i].Transmit, [2]Session{test.a, test.b}[1-i].Receive)
				if m.interval() != want || m.poll {
					t.Errorf("%s, seed %d: end %d has interval %v, polls: %t; want %v", test.name, seed, i, m.interval(), m.poll, want)
				}
			}
			w.sent = [2]int{}
			const long = 20 * time.Second
			w.run(long, never)
			for i, m := range w.ends {
				least, most := int(long/m.interval())-1, int(float64(long/m.interval())/0.75)+2
				if w.sent[i] < least || w.sent[i] > most || m.downs > 0 {
					t.Errorf("%s, seed %d: end %d sent %d packets, want %d to %d; it was down %d times", test.name, seed, i, w.sent[i], least, most, m.downs)
				}
			}

			cut := w.now
			w.lost = func() bool { return true }
			w.run(time.Minute, w.both(Down))
			for i, m := range w.ends {
				// A packet may have been on its way, and the last one came up to an interval before the cut.
				took, detection := m.since.Sub(cut), time.Duration([2]Session{test.a, test.b}[1-i].Multiplier)*w.ends[i].session.Receive
				detection = max(detection, time.Duration([2]Session{test.a, test.b}[1-i].Multiplier)*[2]Session{test.a, test.b}[1-i].Transmit)
				if took > detection+ms || test.loss == 0 && took < detection-max(w.ends[i].session.Receive, [2]Session{test.a, test.b}[1-i].Transmit)-ms {
					t.Errorf("%s, seed %d: end %d noticed after %v, detection time %v", test.name, seed, i, took, detection)
				}
				if m.failures != 1 || m.diagnostic != DetectionTimeExpired {
					t.Errorf("%s, seed %d: end %d has %d failures, %v", test.name, seed, i, m.failures, m.diagnostic)
				}
			}
			w.run(10*time.Second, never)
			w.sent = [2]int{}
			w.run(20*time.Second, never)
			for i := range w.ends {
				if w.sent[i] > 27 {
					t.Errorf("%s, seed %d: end %d sent %d packets in 20 s while down", test.name, seed, i, w.sent[i])
				}
			}
			w.lost = loss
			w.run(time.Minute, w.both(Up))
			if !w.both(Up)() {
				t.Fatalf("%s, seed %d: %v and %v a minute after the cut", test.name, seed, w.ends[0].state, w.ends[1].state)
			}
		}
	}
}

// TestOneWay: who hears nothing tells the other, who hears; and a change of intervals while packets are lost ends as agreed.
func TestOneWay(t *testing.T) {
	w := newWire(t, rand.New(rand.NewPCG(1, 2)), session(100*ms, 100*ms, 3), session(100*ms, 100*ms, 3))
	w.run(time.Minute, w.both(Up))
	w.run(time.Second, never)
	w.ends[1] = newMachine(session(100*ms, 100*ms, 3), 33, always(1), w.now) // it has crashed and is back at once
	w.run(50*ms, func() bool { return w.ends[0].state == Down })
	if w.ends[0].state != Down || w.ends[0].diagnostic != NeighborDown || w.ends[0].failures != 1 {
		t.Errorf("%v, %v, %d failures after the peer was made anew", w.ends[0].state, w.ends[0].diagnostic, w.ends[0].failures)
	}
	w.run(time.Minute, w.both(Up))
	random := rand.New(rand.NewPCG(3, 4))
	w.lost = func() bool { return random.Float64() < 0.25 }
	w.ends[0].configure(session(400*ms, 250*ms, 20), w.now)
	w.ends[1].configure(session(20*ms, 500*ms, 20), w.now)
	w.run(10*time.Second, never)
	for i, want := range [2]time.Duration{500 * ms, 250 * ms} {
		if m := w.ends[i]; m.interval() != want || m.poll || m.state != Up {
			t.Errorf("end %d: %v, interval %v, polls: %t, want %v", i, m.state, m.interval(), m.poll, want)
		}
	}
}
