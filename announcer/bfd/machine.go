package bfd

import "time"

// slowInterval is the least interval at which a session that is not Up sends (RFC 5880 section 6.8.3).
const slowInterval = time.Second

// A session that is switched off says so several times, as a packet may be lost.
const (
	goodbyes     = 3
	goodbyePause = 50 * time.Millisecond
)

// machine is one session as RFC 5880 section 6.8 has it: what comes in are packets and the time, what comes out are packets and the
// time at which to ask again. It has no clock and no socket.
type machine struct {
	session Session
	random  func() float64 // 0 <= random() < 1

	my, your                  uint32 // discriminators; your is 0 until the peer is heard
	state, remote             State
	diagnostic, remoteReasons Diagnostic
	since                     time.Time // of state

	desiredMinTx, requiredMinRx time.Duration // as we say them
	txInUse, rxInUse            time.Duration // as we act: others only while a poll sequence has not told the peer
	poll, pollAgain             bool          // a poll sequence is on; another one is to follow

	remoteMinTx, remoteMinRx time.Duration
	remoteMultiplier         uint8
	remoteDemand             bool

	expires  time.Time // when the detection time is over; zero = nothing was heard
	sendAt   time.Time
	sent     time.Time // the last periodic packet
	goodbyes int       // packets yet to be sent by a session that is switched off

	ups, downs uint64 // how often state Up was entered, and left
	failures   uint64 // downs that say something about the path
}

// newMachine is a session in state Down that begins at once, unless it is passive.
func newMachine(s Session, my uint32, random func() float64, now time.Time) *machine {
	m := &machine{session: s, random: random, my: my, state: Down, remote: Down, since: now, remoteMinRx: time.Microsecond, sendAt: now}
	m.retime()
	return m
}

// configure makes the session one with other intervals, multiplier or role.
func (m *machine) configure(s Session, now time.Time) {
	m.session = s
	m.retime()
	m.sendAt = now
}

// retime makes the intervals those of the state, and has the peer acknowledge a change (RFC 5880 section 6.8.3). While the session
// is Up a longer interval, and a shorter detection time, wait for that.
func (m *machine) retime() {
	tx, rx := m.session.Transmit, m.session.Receive
	if m.state != Up {
		tx = max(tx, slowInterval)
	}
	if tx == m.desiredMinTx && rx == m.requiredMinRx {
		return
	}
	if m.state != Up || tx < m.txInUse {
		m.txInUse = tx
	}
	if m.state != Up || rx > m.rxInUse {
		m.rxInUse = rx
	}
	m.desiredMinTx, m.requiredMinRx = tx, rx
	if m.your != 0 {
		m.pollAgain = m.poll
		m.poll = true
	}
}

// enter changes the state and says so at once.
func (m *machine) enter(s State, why Diagnostic, now time.Time) {
	if m.state == Up {
		m.downs++
		if m.remote != AdminDown && s != AdminDown {
			m.failures++
		}
	}
	if s == Up {
		m.ups++
	}
	m.state, m.diagnostic, m.since, m.sendAt = s, why, now, now
	m.retime()
}

// receive takes in a packet that parse has accepted and that is for this session (RFC 5880 section 6.8.6). If the peer wants an answer
// now, that is returned.
func (m *machine) receive(p packet, now time.Time) (answer packet, wanted bool) {
	if m.state == AdminDown {
		return packet{}, false
	}
	before := m.interval()
	m.your, m.remote, m.remoteReasons = p.my, p.state, p.diagnostic
	m.remoteDemand, m.remoteMultiplier = p.demand, p.multiplier
	m.remoteMinTx, m.remoteMinRx = p.desiredMinTx, p.requiredMinRx
	if p.final && m.poll {
		if m.poll, m.pollAgain = m.pollAgain, false; !m.poll {
			m.txInUse, m.rxInUse = m.desiredMinTx, m.requiredMinRx
		}
	}
	switch {
	case p.state == AdminDown:
		if m.state != Down {
			m.enter(Down, NeighborDown, now)
		}
	case m.state == Down && p.state == Down:
		m.enter(Init, NoDiagnostic, now)
	case m.state == Down && p.state == Init, m.state == Init && (p.state == Init || p.state == Up):
		m.enter(Up, NoDiagnostic, now)
	case m.state == Up && p.state == Down:
		m.enter(Down, NeighborDown, now)
	}
	m.expires = now.Add(m.detectionTime())
	if i := m.interval(); i < before {
		m.sendAt = earlier(m.sendAt, m.sent.Add(m.jittered(i)))
	}
	if !p.poll {
		return packet{}, false
	}
	answer = m.packet()
	answer.poll, answer.final = false, true
	return answer, true
}

// advance does what is due: it notices that the peer is silent, and returns the periodic packet if it is time for one.
func (m *machine) advance(now time.Time) (p packet, send bool) {
	if !m.expires.IsZero() && !now.Before(m.expires) {
		m.forget()
		if m.state == Init || m.state == Up {
			m.enter(Down, DetectionTimeExpired, now)
		}
	}
	if m.silent() || now.Before(m.sendAt) {
		return packet{}, false
	}
	m.sent = now
	if m.state == AdminDown {
		m.goodbyes--
		m.sendAt = now.Add(goodbyePause)
	} else {
		m.sendAt = now.Add(m.jittered(m.interval()))
	}
	return m.packet(), true
}

// forget makes the peer one that was never heard (RFC 5880 section 6.8.1, bfd.RemoteDiscr).
func (m *machine) forget() {
	m.expires, m.your, m.remote, m.poll, m.pollAgain = time.Time{}, 0, Down, false, false
	m.remoteMinTx, m.remoteMinRx, m.remoteMultiplier, m.remoteDemand = 0, time.Microsecond, 0, false
}

// next is when advance has something to do; the zero time = not before a packet comes.
func (m *machine) next() time.Time {
	if m.silent() {
		return m.expires
	}
	return earlier(m.expires, m.sendAt)
}

// earlier is the first of two times; a zero time never comes.
func earlier(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

// switchOff ends the session on purpose (RFC 5880 section 6.8.16). It is over when gone.
func (m *machine) switchOff(now time.Time) {
	m.expires = time.Time{}
	m.poll, m.pollAgain = false, false
	m.enter(AdminDown, Administratively, now)
	m.poll, m.goodbyes = false, goodbyes
	if m.your == 0 {
		m.goodbyes = 0 // nobody has heard of it
	}
}

// gone tells whether a session that is switched off has said so.
func (m *machine) gone() bool { return m.state == AdminDown && m.goodbyes == 0 }

// silent tells whether no periodic packets are to be sent (RFC 5880 section 6.8.7).
func (m *machine) silent() bool {
	switch {
	case m.state == AdminDown:
		return m.goodbyes == 0
	case m.session.Passive && m.your == 0, m.remoteMinRx == 0:
		return true
	}
	return m.remoteDemand && m.state == Up && m.remote == Up && !m.poll
}

// interval is the time between periodic packets, without jitter (RFC 5880 section 6.8.2).
func (m *machine) interval() time.Duration { return max(m.txInUse, m.remoteMinRx) }

// detectionTime is how long the peer may be silent (RFC 5880 section 6.8.4); 0 = it was not heard.
func (m *machine) detectionTime() time.Duration {
	return time.Duration(m.remoteMultiplier) * max(m.rxInUse, m.remoteMinTx)
}

// jittered shortens an interval by up to a quarter, and by a tenth at least if one lost packet is a failure (RFC 5880 section 6.8.7).
func (m *machine) jittered(interval time.Duration) time.Duration {
	least, most := 0.75, 1.0
	if m.session.Multiplier == 1 {
		most = 0.9
	}
	return time.Duration(float64(interval) * (least + (most-least)*m.random()))
}

// packet is what the session says now.
func (m *machine) packet() packet {
	return packet{
		diagnostic: m.diagnostic, state: m.state, poll: m.poll, multiplier: m.session.Multiplier,
		my: m.my, your: m.your, desiredMinTx: m.desiredMinTx, requiredMinRx: m.requiredMinRx,
	}
}
