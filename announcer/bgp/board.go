package bgp

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/osrg/gobgp/v4/api"
	"github.com/osrg/gobgp/v4/pkg/apiutil"
	wire "github.com/osrg/gobgp/v4/pkg/packet/bgp"
)

// board has the sessions of one server, as gobgp's goroutines report them.
type board struct {
	log      *slog.Logger
	wake     func() // there is something in revivable
	onChange func()

	mu       sync.Mutex
	sessions map[netip.Addr]*boardEntry // by Peer.Address
}

type boardEntry struct {
	peer   Peer
	state  string
	since  time.Time
	reason string
	routes routeCount // for the peer, whether or not there is a session
	holds  string     // why we are ending the session

	ipv4, ipv6 bool      // families the session in state established carries
	revive     time.Time // when a session that exceeded the prefix limit, or that we ended, may be tried again; zero = it did not
	parted     string    // why we ended the session, or are about to; empty = we did not
	parting    bool      // the server has not been asked to yet

	messages, updates uint64    // sent, of all kinds, and UPDATEs
	lastSent          time.Time // when messages was seen to grow, or the session to come up
}

// routeCount is a number of routes of each family.
type routeCount struct{ ipv4, ipv6 int }

func newBoard(log *slog.Logger, wake, onChange func()) *board {
	return &board{log: log, wake: wake, onChange: onChange, sessions: map[netip.Addr]*boardEntry{}}
}

func (b *board) add(p Peer) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.sessions[p.Address] = &boardEntry{peer: p, state: "idle", since: time.Now()}
}

func (b *board) remove(address netip.Addr) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.sessions, address)
}

func (b *board) count(address netip.Addr, routes routeCount) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if e, ok := b.sessions[address]; ok {
		e.routes = routes
	}
}

// session fills in what is known about the session with s.Peer.
func (b *board) session(s Session) Session {
	b.mu.Lock()
	defer b.mu.Unlock()
	e, ok := b.sessions[s.Address]
	if !ok || e.peer.Name != s.Peer {
		return s
	}
	s.State, s.Since, s.Reason, s.Updates = e.state, e.since, e.reason, e.updates
	if e.state == "established" {
		if e.ipv4 {
			s.Advertised += e.routes.ipv4
		}
		if e.ipv6 {
			s.Advertised += e.routes.ipv6
		}
	}
	return s
}

// event notes a change of a session's state. gobgp updates what it would answer when asked only after this call.
func (b *board) event(s apiutil.PeerState, at time.Time) {
	b.mu.Lock()
	e, ok := b.sessions[s.NeighborAddress]
	if !ok {
		b.mu.Unlock()
		return
	}
	was := e.state
	e.state, e.since = stateName(s.SessionState), at
	switch s.SessionState {
	case wire.BGP_FSM_ESTABLISHED:
		e.ipv4, e.ipv6 = carried(s.RemoteCap)
		e.lastSent = time.Now()
		if e.peer.AnyASN && s.PeerASN == e.peer.localASN() {
			e.part(fmt.Sprintf("the peer is in our own AS %d, and any other is wanted", s.PeerASN))
			b.wake()
		}
		b.log.Info("BGP session is established", "peer", e.peer.Name, "address", e.peer.Address)
	case wire.BGP_FSM_IDLE:
		if s.AdminState == api.PeerState_ADMIN_STATE_PFX_CT {
			e.reason = fmt.Sprintf("the peer sent more than %d prefixes of a family; next attempt in %v", prefixLimit, prefixLimitPause)
			e.revive = time.Now().Add(prefixLimitPause)
			time.AfterFunc(prefixLimitPause, b.wake)
		} else if e.holds != "" {
			e.reason, e.holds = e.holds, ""
		} else if e.parted != "" {
			e.reason = fmt.Sprintf("%s; next attempt in %v", e.parted, partPause)
			e.parted, e.revive = "", time.Now().Add(partPause)
			time.AfterFunc(partPause, b.wake)
		} else if reason := downReason(e.peer, s); reason != "" {
			e.reason = reason
		} else if was == "openconfirm" {
			e.reason = "the peer closed the connection before it was a session"
		}
		if was == "established" {
			b.log.Warn("BGP session is down", "peer", e.peer.Name, "address", e.peer.Address, "reason", e.reason)
		}
	}
	b.mu.Unlock()
	b.onChange()
}

// held notes why a session is being ended, or kept from beginning.
func (b *board) held(address netip.Addr, reason string) {
	b.mu.Lock()
	e, ok := b.sessions[address]
	idle := ok && e.state == "idle"
	if ok && !idle {
		e.holds = reason
	}
	b.mu.Unlock()
	if idle {
		b.failed(address, reason)
	}
}

// part has the server end a session.
func (e *boardEntry) part(why string) { e.parted, e.parting = why, true }

// parting returns the peers whose sessions are to be ended. Each is returned once.
func (b *board) parting() []netip.Addr {
	b.mu.Lock()
	defer b.mu.Unlock()
	var addresses []netip.Addr
	for address, e := range b.sessions {
		if e.parting {
			e.parting = false
			addresses = append(addresses, address)
		}
	}
	return addresses
}

// sent notes how many messages have been sent to a peer. One that reads nothing fills its window, and then not even a KEEPALIVE is
// sent: gobgp does not notice. RFC 9687 ends such a session after the SendHoldTime, which is here twice the hold time, so that the peer can
// be expected to have ended it before.
func (b *board) sent(address netip.Addr, messages, updates uint64, holdTime time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	e, ok := b.sessions[address]
	if !ok {
		return
	}
	if e.updates = updates; messages != e.messages {
		e.messages, e.lastSent = messages, time.Now()
	}
	if e.state == "established" && e.parted == "" && holdTime > 0 && time.Since(e.lastSent) > 2*holdTime {
		e.part(fmt.Sprintf("send hold timer expired: the peer has read nothing for %v", 2*holdTime))
	}
}

// established tells whether there is a session with a peer.
func (b *board) established(address netip.Addr) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	e, ok := b.sessions[address]
	return ok && e.state == "established"
}

// paused tells whether the session with a peer is down for a while because we ended it, or it exceeded the prefix limit.
func (b *board) paused(address netip.Addr) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	e, ok := b.sessions[address]
	return ok && (e.parted != "" || !e.revive.IsZero())
}

// failed notes why an attempt to have a session failed.
func (b *board) failed(address netip.Addr, reason string) {
	b.mu.Lock()
	e, ok := b.sessions[address]
	if ok && reason == refusedOpen {
		reason = refusal(e.peer)
	}
	changed := ok && e.reason != reason && e.holds == "" // what we do about a session we hold is no reason
	if changed {
		e.reason = reason
		b.log.Warn("no BGP session", "peer", e.peer.Name, "address", e.peer.Address, "reason", reason)
	}
	b.mu.Unlock()
	if changed {
		b.onChange()
	}
}

// revivable returns the peers whose pause after too many prefixes is over. Each is returned once.
func (b *board) revivable() []netip.Addr {
	b.mu.Lock()
	defer b.mu.Unlock()
	var addresses []netip.Addr
	for address, e := range b.sessions {
		if !e.revive.IsZero() && !time.Now().Before(e.revive) {
			e.revive = time.Time{}
			addresses = append(addresses, address)
		}
	}
	return addresses
}

func stateName(s wire.FSMState) string {
	return strings.ToLower(strings.TrimPrefix(s.String(), "BGP_FSM_"))
}

// carried returns the families a session carries, of the two we offer, with a peer that has these capabilities. A
// peer that has none for families takes IPv4 (RFC 4760 section 8).
func carried(capabilities []wire.ParameterCapabilityInterface) (ipv4, ipv6 bool) {
	any := false
	for _, c := range capabilities {
		if mp, ok := c.(*wire.CapMultiProtocol); ok {
			any = true
			ipv4 = ipv4 || mp.CapValue == wire.RF_IPv4_UC
			ipv6 = ipv6 || mp.CapValue == wire.RF_IPv6_UC
		}
	}
	return ipv4 || !any, ipv6
}

// downReason says in words why a session went to idle, or "" if nothing went wrong.
func downReason(p Peer, s apiutil.PeerState) string {
	switch s.DisconnectReason {
	case api.PeerState_DISCONNECT_REASON_UNSPECIFIED, api.PeerState_DISCONNECT_REASON_DECONFIGURED,
		api.PeerState_DISCONNECT_REASON_IDLE_TIMER_EXPIRED:
		return ""
	case api.PeerState_DISCONNECT_REASON_HOLD_TIMER_EXPIRED:
		return "hold timer expired: nothing heard from the peer"
	case api.PeerState_DISCONNECT_REASON_NOTIFICATION_SENT:
		return strings.Replace(s.DisconnectMessage, "notification-sent", "notification sent:", 1)
	case api.PeerState_DISCONNECT_REASON_NOTIFICATION_RECEIVED:
		return strings.Replace(s.DisconnectMessage, "notification-received", "notification received:", 1)
	case api.PeerState_DISCONNECT_REASON_READ_FAILED:
		return "the peer closed the connection"
	case api.PeerState_DISCONNECT_REASON_WRITE_FAILED:
		return "the connection broke"
	case api.PeerState_DISCONNECT_REASON_GRACEFUL_RESTART:
		return "the connection broke; the peer may be restarting"
	case api.PeerState_DISCONNECT_REASON_INVALID_MSG:
		return refusal(p)
	default:
		return s.DisconnectMessage
	}
}

// refusedOpen is the reason for which refusal has the words.
const refusedOpen = "refused"

// refusal is what is known when a peer answers our OPEN with something else: a NOTIFICATION, whose content gobgp drops.
func refusal(p Peer) string {
	return fmt.Sprintf("the peer refused the session; does it expect AS %d from us?", p.localASN())
}

// logHandler takes gobgp's log. It passes on warnings, and the rest as debug messages: what happens to the sessions is logged here.
//
// It is also where the reasons of failed attempts are found. gobgp keeps a session it has never had in state active and reports
// no event, neither when it cannot connect nor when the peer refuses; it logs it. The words are those of v4.8.0; the tests notice when they change.
type logHandler struct {
	next   slog.Handler
	failed func(address netip.Addr, reason string)
	peer   netip.Addr // what the messages are about; invalid = no peer
}

// Enabled returns true: a failure to connect is a debug message.
func (h *logHandler) Enabled(context.Context, slog.Level) bool { return true }

func (h *logHandler) Handle(ctx context.Context, r slog.Record) error {
	if h.peer.IsValid() {
		if reason := attemptReason(r); reason != "" {
			h.failed(h.peer, reason)
		}
	}
	if r.Message == "failed to stop BGP server" {
		return nil // Stop after StopBgp always says so
	}
	if r.Level == slog.LevelInfo {
		r.Level = slog.LevelDebug
	}
	if !h.next.Enabled(ctx, r.Level) {
		return nil
	}
	return h.next.Handle(ctx, r)
}

func (h *logHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	with := *h
	with.next = h.next.WithAttrs(attrs)
	for _, a := range attrs {
		if a.Key == "Key" {
			with.peer, _ = netip.ParseAddr(a.Value.String())
		}
	}
	return &with
}

func (h *logHandler) WithGroup(name string) slog.Handler {
	with := *h
	with.next = h.next.WithGroup(name)
	return &with
}

// attemptReason returns why the attempt r speaks of failed, or "" if it does not speak of one.
func attemptReason(r slog.Record) string {
	attr := func(key string) (v slog.Value) {
		r.Attrs(func(a slog.Attr) bool {
			if a.Key == key {
				v = a.Value
			}
			return a.Key != key
		})
		return v
	}
	switch r.Message {
	case "failed to connect":
		// dial tcp 0.0.0.0:0->192.0.2.1:179: connect: connection refused
		_, why, _ := strings.Cut(attr("Error").String(), "->")
		return "cannot connect to " + why
	case "outgoing connection IO error", "failed to send keepalive on outgoing connection":
		return "the peer closed the connection before it was a session"
	case "outgoing connection closing due to hold timer expired in OPEN SENT state":
		return "hold timer expired: the peer did not answer our OPEN"
	case "sent notification":
		code, subcode := attr("Code"), attr("Subcode")
		if code.Kind() != slog.KindInt64 || subcode.Kind() != slog.KindInt64 {
			return ""
		}
		if code.Int64() == wire.BGP_ERROR_FSM_ERROR {
			return refusedOpen
		}
		return "notification sent: " + wire.NewNotificationErrorCode(uint8(code.Int64()), uint8(subcode.Int64())).String()
	}
	return ""
}
