// Package bfd watches the paths to routers: Bidirectional Forwarding Detection, RFC 5880, over one hop (RFC 5881) and several
// (RFC 5883), in asynchronous mode and without authentication. It sends and returns no echo packets.
//
// A session is a pure state machine (machine.go) that is fed packets and the time. One goroutine has all of them, and the sockets
// (socket.go). Who is no peer, or too many hops away, is not heard: the kernel drops the packet.
package bfd

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"time"
)

// Session is a path to watch. It is comparable.
type Session struct {
	Peer       netip.Addr    // the router; link-local with its zone. No two sessions of a Monitor share it
	Source     netip.Addr    // our end; invalid = the kernel chooses
	MultiHop   bool          // RFC 5883: the router is more than one hop away
	MinimumTTL uint8         // with MultiHop: packets with a lower TTL, or hop limit, are dropped; without it that is 255 (RFC 5881 section 5)
	Transmit   time.Duration // interval at which we are willing to send; whole microseconds, 1 µs to 4294 s
	Receive    time.Duration // interval at which we are willing to receive; likewise
	Multiplier uint8         // packets that may be lost in a row are one less than this; 1 to 255
	Passive    bool          // says nothing until the router does
}

func (s Session) minimumTTL() uint8 {
	if s.MultiHop {
		return s.MinimumTTL
	}
	return maxTTL
}

func (s Session) validate() error {
	switch {
	case !s.Peer.IsValid() || s.Peer.IsUnspecified() || s.Peer.IsMulticast() || s.Peer.Is4In6():
		return fmt.Errorf("Peer %v is not a router's address", s.Peer)
	case s.Peer.IsLinkLocalUnicast() && s.Peer.Is6() && s.Peer.Zone() == "":
		return fmt.Errorf("Peer %v is link-local and names no interface", s.Peer)
	case s.Source.IsValid() && s.Source.Is4() != s.Peer.Is4():
		return fmt.Errorf("Source %v and Peer %v are not of one family", s.Source, s.Peer)
	case s.Multiplier == 0:
		return errors.New("Multiplier is 0")
	}
	for name, interval := range map[string]time.Duration{"Transmit": s.Transmit, "Receive": s.Receive} {
		if interval < time.Microsecond || interval > 4294*time.Second {
			return fmt.Errorf("%s %v is not within 1 µs and 4294 s", name, interval)
		}
	}
	return nil
}

// Status is how a session is.
type Status struct {
	Peer             netip.Addr // Session.Peer
	MultiHop         bool
	State            State
	Since            time.Time     // of State
	Diagnostic       Diagnostic    // why State was entered
	Remote           State         // as the peer said last; Down if it is not heard
	RemoteDiagnostic Diagnostic    // likewise
	Transmit         time.Duration // interval between our packets, as negotiated, before jitter
	DetectionTime    time.Duration // after which a silent peer is down; 0 = it is not heard
	Sent, Received   uint64        // control packets; received are those that were for this session
	Discarded        uint64        // packets from the peer that were not taken (RFC 5880 section 6.8.6)
	Ups, Downs       uint64        // how often state Up was entered, and left
	Failures         uint64        // Downs after silence, or because the peer said so. That it was switched off is none (RFC 5882 section 4.2)
	Problem          string        // what is in the way of packets, or why the last one was discarded; empty = nothing
}

// Monitor watches the paths set last.
type Monitor struct {
	log      *slog.Logger
	onChange func()
	poke     chan struct{} // of size 1: there is something to apply
	arrivals chan arrival

	mu       sync.Mutex
	desired  []Session
	entries  []*entry // in the order of desired, and then those that are leaving
	closing  bool
	sockets  map[kind]*socket
	problems map[kind]string // why there is no socket
	retry    time.Time       // of what is in problems
}

// entry is a session at work.
type entry struct {
	*machine
	conn     *net.UDPConn // from which it sends; nil = there is none yet
	unsent   string       // why the last packet could not be sent
	rejected string       // why the last packet was discarded
	shown    shown

	packetsOut, packetsIn, discarded uint64
}

// shown is what onChange was last called for.
type shown struct {
	state, remote       State
	since               time.Time
	failures            uint64
	transmit, detection time.Duration
	unsent              string
}

func (e *entry) show() shown {
	return shown{e.state, e.remote, e.since, e.failures, e.interval(), e.detectionTime(), e.unsent}
}

func (e *entry) problem() string {
	if e.rejected != "" {
		return cmp.Or(e.unsent, "discarded a packet: "+e.rejected)
	}
	return e.unsent
}

// socket is where packets arrive.
type socket struct {
	conn     *net.UDPConn
	sessions []Session // in its filter
}

// arrival is a packet from the address of a peer.
type arrival struct {
	kind kind
	from netip.Addr
	packet
	err error // why it is none
}

const (
	retryAfter = time.Second           // when a socket that could not be opened is tried again
	stall      = 20 * time.Millisecond // lateness of a timer from which on packets may be waiting that nobody had time to read
)

// New returns a Monitor that does nothing until Run. It calls onChange, which must not block, after a state, a negotiated
// interval, or what is in the way of sending, has changed.
func New(log *slog.Logger, onChange func()) *Monitor {
	return &Monitor{
		log: log, onChange: onChange,
		poke: make(chan struct{}, 1), arrivals: make(chan arrival, 64),
		sockets: map[kind]*socket{}, problems: map[kind]string{},
	}
}

// Set makes these the paths to watch. It returns at once; the slice must not be changed afterwards. A session that is gone, or has another
// Source or MultiHop, ends by saying so to the peer; other changes are negotiated.
func (m *Monitor) Set(sessions []Session) {
	m.mu.Lock()
	m.desired = sessions
	m.mu.Unlock()
	select {
	case m.poke <- struct{}{}:
	default:
	}
}

// Sessions is how the sessions set last are, in their order; those that Run has not come to yet are left out.
func (m *Monitor) Sessions() []Status {
	m.mu.Lock()
	defer m.mu.Unlock()
	var all []Status
	for _, e := range m.entries {
		if e.state == AdminDown {
			continue
		}
		s := Status{
			Peer: e.session.Peer, MultiHop: e.session.MultiHop, State: e.state, Since: e.since, Diagnostic: e.diagnostic,
			Remote: e.remote, RemoteDiagnostic: e.remoteReasons, Transmit: e.interval(), DetectionTime: e.detectionTime(),
			Sent: e.packetsOut, Received: e.packetsIn, Discarded: e.discarded, Ups: e.ups, Downs: e.downs, Failures: e.failures,
			Problem: cmp.Or(m.problems[kindOf(e.session)], e.problem()),
		}
		all = append(all, s)
	}
	return all
}

// Run watches until ctx ends. Then it tells the peers that this is no failure, within a fraction of a second. It returns nil.
func (m *Monitor) Run(ctx context.Context) error {
	var readers sync.WaitGroup
	ended, end := context.WithCancel(context.Background())
	defer readers.Wait()
	defer end()
	defer m.closeAll()
	timer := time.NewTimer(0)
	defer timer.Stop()
	due, done := time.Now(), ctx.Done()
	for {
		apply := false
		select {
		case <-done:
			done = nil
			m.mu.Lock()
			m.desired, m.closing = nil, true
			m.mu.Unlock()
			apply = true
		case <-m.poke:
			apply = true
		case a := <-m.arrivals:
			m.take(a)
		case <-timer.C:
			apply = len(m.problems) > 0 && !time.Now().Before(m.retry)
		}
		if apply {
			m.apply(func(k kind, conn *net.UDPConn) {
				readers.Go(func() { m.read(ended, k, conn) })
			})
		}
		if time.Since(due) > stall { // the process did not run: let it read what came meanwhile
			time.Sleep(stall)
		}
		for range len(m.arrivals) { // what is here already counts before the detection time does
			m.take(<-m.arrivals)
		}
		next, changed, over := m.advance()
		due = time.Now().Add(next)
		if changed {
			m.onChange()
		}
		if over {
			return nil
		}
		timer.Reset(next)
	}
}

// apply brings the sessions and the sockets to what is desired.
func (m *Monitor) apply(startReader func(kind, *net.UDPConn)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := time.Now()
	var entries, leaving []*entry
	for _, s := range m.desired {
		if err := s.validate(); err != nil {
			m.log.Error("no BFD session", "peer", s.Peer, "error", err)
			continue
		}
		at := slices.IndexFunc(m.entries, func(e *entry) bool {
			return e.state != AdminDown && e.session.Peer == s.Peer && e.session.Source == s.Source && e.session.MultiHop == s.MultiHop
		})
		if at < 0 {
			entries = append(entries, &entry{machine: newMachine(s, m.discriminator(), mathrand.Float64, now)})
			continue
		}
		if m.entries[at].session != s {
			m.entries[at].configure(s, now)
		}
		entries = append(entries, m.entries[at])
	}
	for _, e := range m.entries {
		if !slices.Contains(entries, e) {
			if e.state != AdminDown {
				e.switchOff(now)
			}
			leaving = append(leaving, e)
		}
	}
	m.entries = append(entries, leaving...)
	for _, k := range []kind{{}, {ipv6: true}, {multiHop: true}, {ipv6: true, multiHop: true}} {
		m.applySocket(k, startReader)
	}
}

// applySocket opens, changes or closes the socket at which sessions of one kind hear.
func (m *Monitor) applySocket(k kind, startReader func(kind, *net.UDPConn)) {
	var sessions []Session
	for _, e := range m.entries {
		if e.state != AdminDown && kindOf(e.session) == k {
			sessions = append(sessions, e.session)
		}
	}
	s := m.sockets[k]
	var err error
	switch {
	case len(sessions) == 0:
		if s != nil {
			_ = s.conn.Close()
			delete(m.sockets, k)
		}
	case s == nil:
		var conn *net.UDPConn
		if conn, err = k.listen(sessions); err == nil {
			m.sockets[k] = &socket{conn, sessions}
			startReader(k, conn)
		}
	case !slices.Equal(s.sessions, sessions):
		var raw syscall.RawConn
		if raw, err = s.conn.SyscallConn(); err == nil {
			err = attach(raw, k.filter(sessions))
		}
		if err == nil {
			s.sessions = sessions
		}
	}
	if err == nil {
		delete(m.problems, k)
		return
	}
	problem := fmt.Sprintf("cannot hear BFD: %v", err)
	if m.problems[k] != problem {
		m.log.Error("BFD hears nothing, trying again", "error", err)
	}
	m.problems[k], m.retry = problem, time.Now().Add(retryAfter)
}

// discriminator is a number that no session has (RFC 5880 section 6.3), hard to guess.
func (m *Monitor) discriminator() uint32 {
	for {
		var b [4]byte
		_, _ = rand.Read(b[:]) // never fails
		d := binary.BigEndian.Uint32(b[:])
		if d != 0 && !slices.ContainsFunc(m.entries, func(e *entry) bool { return e.my == d }) {
			return d
		}
	}
}

// read passes on what arrives until the socket is closed.
func (m *Monitor) read(ended context.Context, k kind, conn *net.UDPConn) {
	buffer := make([]byte, maxControlPacket)
	for {
		n, from, err := conn.ReadFromUDPAddrPort(buffer)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // of one packet, such as a checksum
		}
		a := arrival{kind: k, from: from.Addr()}
		a.packet, a.err = parse(buffer[:n])
		select {
		case m.arrivals <- a:
		case <-ended.Done():
			return
		}
	}
}

// take gives a packet to its session: the one with our discriminator in it or, if there is none, the one with the peer (RFC 5881 section 3).
// Both must be of this peer, or anybody who sees a number could speak for it.
func (m *Monitor) take(a arrival) {
	m.mu.Lock()
	defer m.mu.Unlock()
	at := slices.IndexFunc(m.entries, func(e *entry) bool {
		return e.state != AdminDown && e.session.Peer == a.from && kindOf(e.session) == a.kind
	})
	if at < 0 {
		return
	}
	e := m.entries[at]
	if a.err == nil && a.your != 0 && a.your != e.my {
		a.err = fmt.Errorf("your discriminator is %d, not %d", a.your, e.my)
	}
	if a.err != nil {
		if e.discarded++; e.discarded == 1 { // not each of them: anybody on the link can send more
			m.log.Warn("discarded a BFD packet", "peer", e.session.Peer, "reason", a.err)
		}
		e.rejected = a.err.Error()
		return
	}
	e.packetsIn++
	e.rejected = ""
	if answer, wanted := e.receive(a.packet, time.Now()); wanted {
		m.send(e, answer)
	}
}

// send sends one packet of a session, and opens the session's socket first if there is none.
func (m *Monitor) send(e *entry, p packet) {
	var err error
	if e.conn == nil {
		e.conn, err = kindOf(e.session).dial(e.session.Source, func(port uint16) bool {
			return slices.ContainsFunc(m.entries, func(other *entry) bool {
				return other.conn != nil && other.conn.LocalAddr().(*net.UDPAddr).Port == int(port)
			})
		})
	}
	if err == nil {
		_, err = e.conn.WriteToUDPAddrPort(p.marshal(), netip.AddrPortFrom(e.session.Peer, kindOf(e.session).port()))
	}
	if err != nil {
		e.unsent = fmt.Sprintf("cannot send: %v", err)
		return
	}
	e.packetsOut++
	e.unsent = ""
}

// advance does what is due. It tells in what time there is more, whether there is something to tell, and whether all is over.
func (m *Monitor) advance() (next time.Duration, changed, over bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := time.Now()
	var at time.Time
	for _, e := range m.entries {
		if p, send := e.machine.advance(now); send {
			m.send(e, p)
		}
		at = earlier(at, e.next())
		if now := e.show(); now != e.shown {
			m.logChange(e, now)
			e.shown, changed = now, true
		}
	}
	m.entries = slices.DeleteFunc(m.entries, func(e *entry) bool {
		if e.gone() && e.conn != nil {
			_ = e.conn.Close()
		}
		return e.gone()
	})
	next = time.Hour
	if len(m.problems) > 0 {
		next = retryAfter
	}
	if !at.IsZero() {
		next = min(next, max(at.Sub(now), 0))
	}
	return next, changed, m.closing && len(m.entries) == 0
}

// logChange logs what an operator should know of a change.
func (m *Monitor) logChange(e *entry, now shown) {
	log := m.log.With("peer", e.session.Peer)
	if now.unsent != e.shown.unsent && now.unsent != "" {
		log.Warn("problem with a BFD session", "problem", now.unsent)
	}
	switch {
	case now.since.Equal(e.shown.since):
	case now.state == Up:
		log.Info("BFD session is up")
	case now.failures > e.shown.failures:
		log.Warn("BFD session is down", "reason", e.diagnostic)
	case e.shown.state == Up:
		log.Info("BFD session is switched off", "reason", e.diagnostic)
	}
}

// closeAll closes what is open still.
func (m *Monitor) closeAll() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for k, s := range m.sockets {
		_ = s.conn.Close()
		delete(m.sockets, k)
	}
}
