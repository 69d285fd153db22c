// Package bgp keeps BGP sessions to the configured peers and advertises routes over them.
//
// The speaker is gobgp, run inside the process. It only dials out, takes no routes from its
// peers, and sends each route to the peers the route names and to no other.
//
// What should be is one value, [Config], and [Speaker.Set] takes the whole of it. A pure function
// makes a table of it (table.go), another the operations that lead from the table in use to the
// new one (diff.go), and one goroutine applies them (server.go): what did not change is left alone.
//
// Where a peer asks for it, the path to it is watched by package bfd, and its session ends at once when the path fails (watch.go).
package bgp

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/longshore-lb/longshore/announcer"
	"github.com/longshore-lb/longshore/announcer/bfd"
)

// Peer is a router to keep a session with. It is comparable: two equal values are one session.
//
// Times are rounded down to whole seconds.
type Peer struct {
	Name            string        // unique among the peers of a Config; routes name peers by it
	MyASN           uint32        // our AS; 1..4294967295
	PeerASN         uint32        // the AS the router must be in; if it is ours too, the session is iBGP; 0 with AnyASN
	AnyASN          bool          // the router may be in any AS but ours
	LocalASN        uint32        // our AS as this router sees it; 0 = MyASN
	Address         netip.Addr    // where the router listens; no two peers of a Config may share it
	Interface       string        // instead of Address: the link on which the router is found by its router advertisements (unnumbered)
	Source          netip.Addr    // our end of the session; invalid = the kernel chooses
	Port            uint16        // 0 = 179
	Device          string        // the device to be bound to, such as that of a VRF (Linux, networking/vrf.rst); empty = none
	HoldTime        time.Duration // 0 = 90 s; 3..65535 s (RFC 4271 section 4.2)
	KeepaliveTime   time.Duration // 0 = a third of HoldTime; at most HoldTime
	ConnectTime     time.Duration // pause between two attempts to connect; 0 = 30 s; at least 2 s
	Password        string        // TCP MD5 (RFC 2385), at most 80 bytes; empty = none
	EBGPMultiHop    bool          // the router is not on a link of ours: TTL 255 instead of 1
	TTLSecurityHops uint8         // GTSM (RFC 5082): packets of a router further away are dropped, 1 to 254 hops; 0 = off; excludes EBGPMultiHop
	GracefulRestart bool          // the router keeps our routes for 120 s while we restart (RFC 4724)
	BFD             BFD           // how the path to the router is watched; a change does not end the session
}

// Config is everything the speaker should be doing.
//
// A route goes out with the node's own end of the session as next hop (RFC 4271 section 5.1.3);
// where that is of the other family, or link-local, with NextHop4 or NextHop6. Over a session with a router that was found on an
// Interface it is our link-local address for both families (RFC 8950, RFC 2545).
//
// If several routes have one prefix, each peer gets the prefix once, with the communities of all
// the routes that name the peer, the highest of their LocalPref, and the lowest of their MED and Prepend.
type Config struct {
	RouterID netip.Addr        // BGP identifier (RFC 4271 section 4.2); IPv4
	Peers    []Peer            // no peers: nothing runs
	Routes   []announcer.Route // what to advertise
	NextHop4 netip.Addr        // an IPv4 address of this node; invalid = IPv4 routes go over IPv4 sessions only
	NextHop6 netip.Addr        // an IPv6 address of this node; invalid = IPv6 routes go over IPv6 sessions only

	// Shutdown asks all peers to prefer other routes to ours, because these are about to go (RFC 8326): they have the
	// community GRACEFUL_SHUTDOWN and, over iBGP, LOCAL_PREF 0.
	Shutdown bool
	// ShutdownTime is for how long that is asked of peers without GracefulRestart when Run ends, before it ends the sessions:
	// at most 20 s, as Kubernetes kills after 30. 0 = not at all.
	ShutdownTime time.Duration
}

// Session is the state of the session with one peer.
type Session struct {
	Peer       string      // Peer.Name
	Address    netip.Addr  // Peer.Address, or that of the router found on Peer.Interface; invalid = none was
	Interface  string      // Peer.Interface
	Device     string      // Peer.Device
	State      string      // idle, active, openconfirm or established (RFC 4271 section 8.2.2); connecting is active
	Since      time.Time   // when State was entered
	Reason     string      // why the session, or the last attempt to have one, ended; empty = none ever did
	Advertised int         // routes sent to the peer; 0 unless established
	Updates    uint64      // UPDATE messages sent to the peer since it was configured, as of a few seconds ago
	BFD        *bfd.Status // the session that watches the path; nil = none does
}

// Speaker keeps the sessions of the Config set last.
type Speaker struct {
	log      *slog.Logger
	onChange func()
	poke     chan struct{} // of size 1: there is something to apply
	monitor  *bfd.Monitor

	mu      sync.Mutex
	desired Config
	routers routers
	board   *board            // the sessions of the running server; nil = none runs
	refused map[string]string // peers of desired no session is tried with, and why
	since   time.Time         // of refused

	finding sync.WaitGroup // the finders of routers
}

// New returns a Speaker that does nothing until Run. It calls onChange, which may be nil and must
// not block, after what Sessions returns has changed.
func New(log *slog.Logger, onChange func()) *Speaker {
	if onChange == nil {
		onChange = func() {}
	}
	s := &Speaker{
		log: log, onChange: onChange, poke: make(chan struct{}, 1),
		routers: routers{finders: map[string]context.CancelFunc{}, found: map[string]netip.Addr{}},
	}
	s.monitor = bfd.New(log, func() { s.wake(); onChange() })
	return s
}

// Set makes c what the speaker should be doing. It returns at once; c's slices must not be changed afterwards.
//
// The first Config after a start should have all its routes: a peer that kept our routes while we
// restarted drops the ones missing from what we send first (RFC 4724 section 4.2).
func (s *Speaker) Set(c Config) {
	s.mu.Lock()
	s.desired = c
	s.mu.Unlock()
	s.wake()
}

func (s *Speaker) wake() {
	select {
	case s.poke <- struct{}{}:
	default:
	}
}

// Run keeps the sessions until ctx ends. Then it ends them, within a few seconds after the ShutdownTime: peers with
// GracefulRestart keep the routes for a while, the others drop them at once. It returns nil.
func (s *Speaker) Run(ctx context.Context) error {
	var srv *server
	// BFD ends after BGP: to a peer with graceful restart its end would be that of the routes.
	monitoring, stopMonitor := context.WithCancel(context.WithoutCancel(ctx))
	var monitor sync.WaitGroup
	monitor.Go(func() { _ = s.monitor.Run(monitoring) }) // returns nil
	defer s.finding.Wait()
	defer func() {
		if srv != nil {
			s.leave(srv)
			srv.stop()
		}
		stopMonitor()
		monitor.Wait()
		s.show(nil, nil)
	}()
	again := time.NewTimer(0)
	again.Stop()
	defer again.Stop()
	look := time.NewTicker(lookEvery)
	defer look.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-s.poke:
		case <-again.C:
		case <-look.C:
			if srv != nil {
				srv.look()
			}
			continue
		}
		c := s.wanted()
		s.look(ctx, c)
		var wait time.Duration
		if srv, wait = s.reconcile(srv, s.resolved(c)); wait > 0 {
			again.Reset(wait)
		}
	}
}

func (s *Speaker) wanted() Config {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.desired
}

// longestLeave is the most that Config.ShutdownTime delays the end.
const longestLeave = 20 * time.Second

// leave asks the peers that are about to lose our routes to prefer others, and gives them time.
func (s *Speaker) leave(srv *server) {
	c := s.resolved(s.wanted())
	lose := func(session Session) bool {
		return session.Advertised > 0 && slices.ContainsFunc(c.Peers, func(p Peer) bool { return p.Name == session.Peer && !p.GracefulRestart })
	}
	if c.ShutdownTime <= 0 || !slices.ContainsFunc(s.Sessions(), lose) {
		return
	}
	t, _, _ := tableOf(c)
	srv.apply(t.leaving())
	time.Sleep(min(c.ShutdownTime, longestLeave))
}

// reconcile makes the server do what c says and returns it: the one given, a new one, or nil. It is to be called again after wait,
// if that is not 0.
func (s *Speaker) reconcile(srv *server, c Config) (_ *server, wait time.Duration) {
	t, refused, problems := tableOf(c)
	for _, err := range problems {
		s.log.Error("route is not advertised", "error", err)
	}
	if srv != nil && (len(t.peers) == 0 || srv.routerID != c.RouterID) {
		srv.stop()
		srv = nil
	}
	if srv == nil && len(t.peers) > 0 {
		var err error
		if srv, err = startServer(s.log, c.RouterID, t.peers[0].localASN(), s.wake, s.onChange); err != nil {
			s.log.Error("BGP is down", "error", err)
			for _, p := range t.peers {
				refused[p.Name] = err.Error()
			}
		}
	}
	paths := s.monitor.Sessions()
	s.monitor.Set(watched(t.watched, onLink, paths))
	if srv == nil {
		s.show(nil, refused)
		return nil, 0
	}
	srv.judgeGates(t.watched, paths)
	for name, err := range srv.apply(t) {
		refused[name] = err.Error()
	}
	switch {
	case srv.applyGates(t.watched):
		wait = recheckSession
	case slices.ContainsFunc(t.watched, Peer.internal):
		wait = recheckLinks
	}
	s.show(srv.board, refused)
	return srv, wait
}

// show makes b and refused what Sessions reports.
func (s *Speaker) show(b *board, refused map[string]string) {
	s.mu.Lock()
	s.board, s.refused, s.since = b, refused, time.Now()
	s.mu.Unlock()
	s.onChange()
}

// Sessions returns the session of each peer, in the order of Config.Peers.
func (s *Speaker) Sessions() []Session {
	s.mu.Lock()
	defer s.mu.Unlock()
	sessions := make([]Session, 0, len(s.desired.Peers))
	paths := s.monitor.Sessions()
	for _, p := range s.desired.Peers {
		if p.Interface != "" {
			p.Address = s.routers.found[p.Interface]
		}
		session := Session{Peer: p.Name, Address: p.Address, Interface: p.Interface, Device: p.Device, State: "idle", Since: s.since}
		if why, ok := s.refused[p.Name]; ok {
			session.Reason = why
		} else if s.board != nil {
			session = s.board.session(session)
		}
		if path, ok := statusOf(paths, p.Address); ok && p.BFD.Multiplier > 0 {
			session.BFD = &path
		}
		sessions = append(sessions, session)
	}
	return sessions
}

// localASN is our AS as the peer sees it.
func (p Peer) localASN() uint32 {
	if p.LocalASN != 0 {
		return p.LocalASN
	}
	return p.MyASN
}

// internal says whether the session is iBGP.
func (p Peer) internal() bool { return !p.AnyASN && p.localASN() == p.PeerASN }

// validate says what makes a session with p impossible.
func (p Peer) validate() error {
	switch {
	case p.localASN() == 0:
		return fmt.Errorf("MyASN 0 is reserved (RFC 7607)")
	case p.AnyASN && p.PeerASN != 0:
		return fmt.Errorf("PeerASN %d excludes AnyASN", p.PeerASN)
	case p.PeerASN == 0 && !p.AnyASN:
		return fmt.Errorf("PeerASN 0 is reserved (RFC 7607)")
	case p.Interface != "" && !p.Address.IsValid():
		return fmt.Errorf("no router advertises itself on link %s", p.Interface)
	case !p.Address.IsValid() || p.Address.IsUnspecified() || p.Address.IsMulticast():
		return fmt.Errorf("Address %v is not a router's", p.Address)
	case p.Address.Is6() && p.Address.IsLinkLocalUnicast() && p.Address.Zone() == "":
		return fmt.Errorf("Address %v is link-local and names no interface", p.Address)
	case p.Source.IsValid() && p.Source.Is4() != p.Address.Is4():
		return fmt.Errorf("Source %v and Address %v are not of one family", p.Source, p.Address)
	case p.HoldTime != 0 && (p.HoldTime < 3*time.Second || p.HoldTime > 65535*time.Second):
		return fmt.Errorf("HoldTime %v is not within 3 to 65535 seconds", p.HoldTime)
	case p.KeepaliveTime < 0 || p.KeepaliveTime > p.holdTime():
		return fmt.Errorf("KeepaliveTime %v is not within 0 and HoldTime %v", p.KeepaliveTime, p.holdTime())
	case p.ConnectTime != 0 && (p.ConnectTime < 2*time.Second || p.ConnectTime > 65535*time.Second):
		return fmt.Errorf("ConnectTime %v is not within 2 to 65535 seconds", p.ConnectTime)
	case p.TTLSecurityHops == 255:
		return fmt.Errorf("TTLSecurityHops 255 is not within 0 to 254")
	case p.TTLSecurityHops != 0 && p.EBGPMultiHop:
		return fmt.Errorf("TTLSecurityHops %d excludes EBGPMultiHop", p.TTLSecurityHops)
	case len(p.Password) > 80:
		return fmt.Errorf("Password of %d bytes is longer than 80", len(p.Password))
	}
	return nil
}

func (p Peer) holdTime() time.Duration {
	if p.HoldTime == 0 {
		return 90 * time.Second
	}
	return p.HoldTime
}

func (p Peer) connectTime() time.Duration {
	if p.ConnectTime == 0 {
		return 30 * time.Second
	}
	return p.ConnectTime
}
