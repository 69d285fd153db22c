package bgp

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/osrg/gobgp/v4/api"

	"github.com/longshore-lb/longshore/announcer/bfd"
)

// BFD is how the path to a peer is watched (package bfd). It is comparable.
type BFD struct {
	Transmit   time.Duration // bfd.Session.Transmit
	Receive    time.Duration // bfd.Session.Receive
	Multiplier uint8         // bfd.Session.Multiplier; 0 = the path is not watched
	MinimumTTL uint8         // of packets of a peer that is more than one hop away; 0 = 254
	Passive    bool          // bfd.Session.Passive
	Strict     bool          // no BGP session before the BFD session is up, unless the peer has switched BFD off
}

const defaultMinimumTTL = 254 // as FRR's bfdd has it

// When to look again: at a session that gobgp should be ending or beginning, and at the addresses of the links.
const (
	recheckSession = 100 * time.Millisecond
	recheckLinks   = 5 * time.Second
)

// watched returns the BFD sessions of these peers. One that is up stays over as many hops as it is.
func watched(peers []Peer, connected func(netip.Addr) bool, now []bfd.Status) []bfd.Session {
	var sessions []bfd.Session
	for _, p := range peers {
		s := bfd.Session{
			Peer: p.Address, Source: p.Source, MultiHop: p.EBGPMultiHop && !p.internal() || p.internal() && !connected(p.Address),
			Transmit: p.BFD.Transmit, Receive: p.BFD.Receive, Multiplier: p.BFD.Multiplier, Passive: p.BFD.Passive,
		}
		if is, ok := statusOf(now, p.Address); ok && is.State == bfd.Up && p.internal() {
			s.MultiHop = is.MultiHop
		}
		if s.MultiHop {
			if s.MinimumTTL = p.BFD.MinimumTTL; s.MinimumTTL == 0 {
				s.MinimumTTL = defaultMinimumTTL
			}
		}
		sessions = append(sessions, s)
	}
	return sessions
}

func statusOf(all []bfd.Status, peer netip.Addr) (bfd.Status, bool) {
	at := slices.IndexFunc(all, func(s bfd.Status) bool { return s.Peer == peer })
	if at < 0 {
		return bfd.Status{}, false
	}
	return all[at], true
}

// onLink tells whether an address is in a network of one of this machine's links.
func onLink(addr netip.Addr) bool {
	if addr.IsLinkLocalUnicast() {
		return true
	}
	links, err := net.InterfaceAddrs()
	if err != nil {
		return false
	}
	return slices.ContainsFunc(links, func(a net.Addr) bool {
		p, err := netip.ParsePrefix(a.String())
		return err == nil && p.Contains(addr)
	})
}

// gate lets a BGP session be, or not, as BFD has it.
type gate struct {
	failures uint64 // of the BFD session, that were seen
	ending   bool   // after a failure, until gobgp has ended the session
	open     bool
	reason   string // why it is not open
}

// judge decides on what is known of the BFD session; established is the BGP session.
//
// A path that fails ends the BGP session that runs over it, once: it comes back as BGP finds it, or with strict when the path is up. A peer
// that switches BFD off says nothing about the path (RFC 5882 section 4.2).
func (g *gate) judge(strict bool, s bfd.Status, established bool) {
	if s.Failures > g.failures && established {
		g.ending = true
		g.reason = "BFD: the path had failed"
		if s.State != bfd.Up {
			g.reason = fmt.Sprintf("BFD: %v", s.Diagnostic)
		}
	}
	g.failures = s.Failures
	wait := strict && s.State != bfd.Up && s.Remote != bfd.AdminDown
	if wait && !g.ending {
		g.reason = "waits for BFD, which is " + s.State.String()
	}
	g.open = !g.ending && !wait
}

// judgeGates decides which of the watched peers' sessions may be. A peer that is not watched any more is let through.
func (s *server) judgeGates(peers []Peer, statuses []bfd.Status) {
	for address, g := range s.gates {
		if !slices.ContainsFunc(peers, func(p Peer) bool { return p.Address == address }) {
			g.open, g.ending = true, false
		}
	}
	for _, p := range peers {
		g := s.gates[p.Address]
		if g == nil {
			g = &gate{}
			s.gates[p.Address] = g
		}
		// Before there is a BFD session it is down.
		status, ok := statusOf(statuses, p.Address)
		if !ok {
			status = bfd.Status{State: bfd.Down, Remote: bfd.Down}
		}
		g.judge(p.BFD.Strict, status, s.board.established(p.Address))
	}
}

// applyGates has gobgp end and begin sessions as the gates say. It tells whether it has to be called again, as gobgp takes
// its time, and drops the requests that come meanwhile.
func (s *server) applyGates(peers []Peer) (again bool) {
	for address, g := range s.gates {
		var session *api.Peer
		err := s.gobgp.ListPeer(context.Background(), &api.ListPeerRequest{Address: address.String()}, func(p *api.Peer) { session = p })
		if err != nil || session == nil {
			delete(s.gates, address)
			continue
		}
		admin := session.State.AdminState
		switch {
		case !g.open && admin == api.PeerState_ADMIN_STATE_UP:
			s.board.held(address, g.reason)
			err = s.gobgp.DisablePeer(context.Background(), &api.DisablePeerRequest{Address: address.String()})
			again = true
		case admin == api.PeerState_ADMIN_STATE_DOWN && g.ending:
			if session.State.SessionState == api.PeerState_SESSION_STATE_IDLE {
				g.ending = false
			}
			again = true
		case admin == api.PeerState_ADMIN_STATE_DOWN && !g.open:
			s.board.held(address, g.reason)
		case admin == api.PeerState_ADMIN_STATE_DOWN && !s.board.paused(address):
			err = s.gobgp.EnablePeer(context.Background(), &api.EnablePeerRequest{Address: address.String()})
			again = true
		case !slices.ContainsFunc(peers, func(p Peer) bool { return p.Address == address }):
			delete(s.gates, address)
		}
		if err != nil {
			s.log.Error("BGP session does not follow BFD", "peer", address, "error", err)
		}
	}
	return again
}
