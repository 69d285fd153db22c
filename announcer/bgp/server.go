package bgp

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/osrg/gobgp/v4/api"
	"github.com/osrg/gobgp/v4/pkg/apiutil"
	wire "github.com/osrg/gobgp/v4/pkg/packet/bgp"
	gobgp "github.com/osrg/gobgp/v4/pkg/server"
)

const (
	// restartTime is how long a peer keeps our routes while we restart (RFC 4724 section 3).
	restartTime = 120 // seconds

	// restartDeferral is how long a restarted speaker waits for the other restarting peers before it sends its routes (RFC 4724
	// section 4.1). It learns nothing from them, so there is nothing worth waiting for; gobgp takes no 0.
	restartDeferral = 3 // seconds

	// prefixLimit is how many prefixes of one family a peer may send. They are not used, but gobgp keeps them: about 1 kB each.
	prefixLimit = 50_000

	// prefixLimitPause is for how long a session stays down that exceeded prefixLimit.
	prefixLimitPause = 5 * time.Minute

	// partPause is for how long a session stays down that we ended ourselves: another AS or a router that reads again is not soon to be expected.
	partPause = time.Minute

	// lookEvery is how often the sessions' counters are read.
	lookEvery = 2 * time.Second
)

var (
	ipv4Unicast = &api.Family{Afi: api.Family_AFI_IP, Safi: api.Family_SAFI_UNICAST}
	ipv6Unicast = &api.Family{Afi: api.Family_AFI_IP6, Safi: api.Family_SAFI_UNICAST}
)

// server is a running gobgp and the table it holds. It serves once: a new RouterID needs a new server.
// One goroutine calls its methods.
type server struct {
	log      *slog.Logger
	routerID netip.Addr
	gobgp    *gobgp.BgpServer
	board    *board
	unwatch  context.CancelFunc

	held    table             // what gobgp holds; audiences may have some more
	numbers map[string]uint32 // of audiences, by key; a number is never used for a second one
	started bool              // the first table has been applied

	gates map[netip.Addr]*gate // of the peers that BFD watches, by Peer.Address
}

// startServer starts a gobgp that has no peers and no paths. It calls wake when apply has something to do although
// the table is unchanged, and onChange when the board has changed.
func startServer(log *slog.Logger, routerID netip.Addr, asn uint32, wake, onChange func()) (*server, error) {
	if !routerID.Is4() {
		return nil, fmt.Errorf("start BGP: RouterID %v is not an IPv4 address", routerID)
	}
	board := newBoard(log, wake, onChange)
	ctx, cancel := context.WithCancel(context.Background())
	s := &server{
		log:      log,
		routerID: routerID,
		gobgp:    gobgp.NewBgpServer(gobgp.LoggerOption(slog.New(&logHandler{next: log.Handler(), failed: board.failed}), new(slog.LevelVar))),
		board:    board,
		unwatch:  cancel,
		held:     table{paths: map[netip.Prefix]path{}, audiences: map[string]audience{}},
		numbers:  map[string]uint32{},
		gates:    map[netip.Addr]*gate{},
	}
	go s.gobgp.Serve()
	if err := s.start(ctx, asn); err != nil {
		s.stop()
		return nil, fmt.Errorf("start BGP with RouterID %v: %w", routerID, err)
	}
	return s, nil
}

func (s *server) start(ctx context.Context, asn uint32) error {
	// The AS is that of the first peer only because gobgp needs one: each peer has its own.
	global := &api.Global{Asn: asn, RouterId: s.routerID.String(), ListenPort: -1}
	if err := s.gobgp.StartBgp(ctx, &api.StartBgpRequest{Global: global}); err != nil {
		return err
	}
	if err := s.gobgp.SetPolicies(ctx, policies(nil, nil)); err != nil {
		return fmt.Errorf("set policies: %w", err)
	}
	for direction, policy := range map[api.PolicyDirection]string{
		api.PolicyDirection_POLICY_DIRECTION_IMPORT: importPolicy,
		api.PolicyDirection_POLICY_DIRECTION_EXPORT: exportPolicy,
	} {
		assignment := &api.PolicyAssignment{
			Name:          "global",
			Direction:     direction,
			Policies:      []*api.Policy{{Name: policy}},
			DefaultAction: api.RouteAction_ROUTE_ACTION_REJECT,
		}
		if err := s.gobgp.SetPolicyAssignment(ctx, &api.SetPolicyAssignmentRequest{Assignment: assignment}); err != nil {
			return fmt.Errorf("assign policy %s: %w", policy, err)
		}
	}
	return s.gobgp.WatchEvent(ctx, gobgp.WatchEventMessageCallbacks{
		OnPeerUpdate: func(e *apiutil.WatchEventMessage_PeerEvent, at time.Time) {
			if e.Type == apiutil.PEER_EVENT_STATE {
				s.board.event(e.Peer.State, at)
			}
		},
	}, gobgp.WatchPeer())
}

// look reads how many messages gobgp has sent on each session, and ends those on which none can be sent any more.
func (s *server) look() {
	err := s.gobgp.ListPeer(context.Background(), &api.ListPeerRequest{}, func(p *api.Peer) {
		address, err := netip.ParseAddr(p.GetState().GetNeighborAddress())
		if err == nil {
			sent := p.GetState().GetMessages().GetSent()
			s.board.sent(address, sent.GetTotal(), sent.GetUpdate(), time.Duration(p.GetTimers().GetState().GetNegotiatedHoldTime())*time.Second)
		}
	})
	if err != nil {
		s.log.Error("cannot read the counters of the BGP sessions", "error", err)
	}
	s.part()
}

// part ends the sessions that the board finds impossible.
func (s *server) part() {
	for _, address := range s.board.parting() {
		// Unlike ResetPeer it does no harm to a session that is down already.
		if err := s.gobgp.DisablePeer(context.Background(), &api.DisablePeerRequest{Address: address.String()}); err != nil {
			s.log.Error("session stays up", "peer", address, "error", err)
		}
	}
}

// stop ends the sessions and the server: peers with graceful restart keep the routes, the others are told to drop them.
func (s *server) stop() {
	for _, p := range s.held.peers {
		s.board.remove(p.Address) // what follows is no failure
	}
	if err := s.gobgp.StopBgp(context.Background(), &api.StopBgpRequest{AllowGracefulRestart: true}); err != nil {
		s.log.Error("BGP did not stop", "error", err)
	}
	s.unwatch()
	s.gobgp.Stop() // frees what StopBgp leaves
}

// apply makes gobgp hold t. It returns the names of the peers that cannot be added, and why.
// What fails is tried again when apply is called next.
func (s *server) apply(t table) map[string]error {
	ctx := context.Background()
	s.part()
	for _, address := range s.board.revivable() {
		if err := s.gobgp.EnablePeer(ctx, &api.EnablePeerRequest{Address: address.String()}); err != nil {
			s.log.Error("session stays down", "peer", address, "error", err)
		}
	}
	failed := map[string]error{}
	operations := diff(s.held, t)
	if len(operations) == 0 {
		return failed
	}

	of := func(v verb) []operation {
		return slices.Collect(func(yield func(operation) bool) {
			for _, o := range operations {
				if o.verb == v && !yield(o) {
					return
				}
			}
		})
	}
	for _, o := range operations {
		s.log.Debug("apply", "operation", o.String())
	}
	for _, o := range of(removePeer) {
		s.board.remove(o.peer.Address)
		if err := s.gobgp.DeletePeer(ctx, &api.DeletePeerRequest{Address: o.peer.Address.String()}); err != nil {
			s.log.Error("peer is not removed", "peer", o.peer.Name, "address", o.peer.Address, "error", err)
		}
		s.held.peers = slices.DeleteFunc(s.held.peers, func(p Peer) bool { return p == o.peer })
	}

	// While paths move from one audience to another, gobgp asks the policy whether a peer has the old one and must be told.
	// So the policy knows both until that is done.
	adding := of(addPeer)
	peers := slices.Clone(s.held.peers)
	for _, o := range adding {
		peers = append(peers, o.peer)
	}
	maps.Copy(s.held.audiences, t.audiences)
	if err := s.setPolicies(ctx, peers); err != nil {
		s.log.Error("routes stay as they are", "error", err)
		return failed
	}
	s.withdraw(of(withdraw))
	s.announce(of(announce))
	inUse := map[string]audience{}
	for _, p := range s.held.paths {
		inUse[p.audience] = s.held.audiences[p.audience]
	}
	if len(inUse) < len(s.held.audiences) {
		s.held.audiences = inUse
		if err := s.setPolicies(ctx, peers); err != nil {
			s.log.Error("policy has audiences no route is for", "error", err)
		}
	}

	for _, o := range adding {
		n := neighbor(o.peer, !s.started)
		if g := s.gates[o.peer.Address]; g != nil {
			n.Conf.AdminDown = !g.open
		}
		if err := s.gobgp.AddPeer(ctx, &api.AddPeerRequest{Peer: n}); err != nil {
			failed[o.peer.Name] = fmt.Errorf("add peer %s at %v: %w", o.peer.Name, o.peer.Address, err)
			s.log.Error("no session", "error", failed[o.peer.Name])
			continue
		}
		s.board.add(o.peer)
		s.held.peers = append(s.held.peers, o.peer)
	}
	s.started = true
	s.count()
	return failed
}

// setPolicies makes gobgp's policies those for the audiences held and these peers.
func (s *server) setPolicies(ctx context.Context, peers []Peer) error {
	numbered := make(map[uint32]audience, len(s.held.audiences))
	for _, key := range slices.Sorted(maps.Keys(s.held.audiences)) {
		if _, ok := s.numbers[key]; !ok {
			s.numbers[key] = uint32(len(s.numbers))
		}
		numbered[s.numbers[key]] = s.held.audiences[key]
	}
	if err := s.gobgp.SetPolicies(ctx, policies(numbered, peers)); err != nil {
		return fmt.Errorf("set policies for %d audiences and %d peers: %w", len(numbered), len(peers), err)
	}
	return nil
}

func (s *server) withdraw(operations []operation) {
	for _, o := range operations {
		p, err := s.wirePath(o)
		if err == nil {
			err = s.gobgp.DeletePath(apiutil.DeletePathRequest{Paths: []*apiutil.Path{p}})
		}
		if err != nil {
			s.log.Error("route is not withdrawn", "prefix", o.prefix, "error", err)
			continue
		}
		delete(s.held.paths, o.prefix)
	}
}

func (s *server) announce(operations []operation) {
	paths := make([]*apiutil.Path, 0, len(operations))
	done := make([]operation, 0, len(operations))
	for _, o := range operations {
		p, err := s.wirePath(o)
		if err != nil {
			s.log.Error("route is not advertised", "prefix", o.prefix, "error", err)
			continue
		}
		paths, done = append(paths, p), append(done, o)
	}
	if len(paths) == 0 {
		return
	}
	// On any error gobgp keeps to itself which path it was. It adds the good ones all the same, and adding twice does no harm.
	if _, err := s.gobgp.AddPath(apiutil.AddPathRequest{Paths: paths}); err != nil {
		s.log.Error("routes are not advertised", "count", len(paths), "error", err)
		return
	}
	for _, o := range done {
		s.held.paths[o.prefix] = o.path
	}
}

// wirePath is the path of o as gobgp takes it: with the tag of its audience and without what the export policy adds.
func (s *server) wirePath(o operation) (*apiutil.Path, error) {
	family := wire.RF_IPv4_UC
	if o.prefix.Addr().Is6() {
		family = wire.RF_IPv6_UC
	}
	nlri, err := wire.NewIPAddrPrefix(o.prefix)
	if err != nil {
		return nil, err
	}
	reach, err := wire.NewPathAttributeMpReachNLRI(family, []wire.PathNLRI{{NLRI: nlri}}, o.path.nextHop)
	if err != nil {
		return nil, fmt.Errorf("next hop %v: %w", o.path.nextHop, err)
	}
	number, ok := s.numbers[o.path.audience]
	if !ok {
		return nil, errors.New("no policy knows its audience")
	}
	attrs := []wire.PathAttributeInterface{
		wire.NewPathAttributeOrigin(wire.BGP_ORIGIN_ATTR_TYPE_IGP),
		reach,
		wire.NewPathAttributeLargeCommunities([]*wire.LargeCommunity{wire.NewLargeCommunity(tagAdministrator, 0, number)}),
	}
	if a := s.held.audiences[o.path.audience]; a.shutdown || a.leaving {
		attrs = append(attrs, wire.NewPathAttributeLocalPref(0)) // gobgp's policies cannot set 0; eBGP sessions leave it out
	}
	return &apiutil.Path{
		Family:     family, // AddPath fails without
		Nlri:       nlri,
		Attrs:      attrs,
		Age:        time.Now().Unix(),
		Withdrawal: o.verb == withdraw,
	}, nil
}

// count tells the board how many routes there are for each peer.
func (s *server) count() {
	for _, p := range s.held.peers {
		var routes routeCount
		hears := map[string]bool{}
		for key, a := range s.held.audiences {
			_, hears[key] = a.attributes(p)
		}
		for prefix, path := range s.held.paths {
			family, n := ipv4Unicast, &routes.ipv4
			if prefix.Addr().Is6() {
				family, n = ipv6Unicast, &routes.ipv6
			}
			if hears[path.audience] && (ownNextHop(p, family) || !s.held.audiences[path.audience].ownFamily) {
				*n++
			}
		}
		s.board.count(p.Address, routes)
	}
}

// neighbor is p as gobgp takes it. If restarting, the peer is told that we forwarded all the time (RFC 4724 section 3): the
// kernel did, and the peer need not drop the routes it kept for us.
func neighbor(p Peer, restarting bool) *api.Peer {
	n := &api.Peer{
		Conf: &api.PeerConf{
			NeighborAddress: p.Address.String(),
			PeerAsn:         p.PeerASN,
			LocalAsn:        p.localASN(),
			AuthPassword:    p.Password,
		},
		Timers: &api.Timers{Config: &api.TimersConfig{
			HoldTime:          uint64(p.holdTime() / time.Second),
			KeepaliveInterval: uint64(p.KeepaliveTime / time.Second), // 0: gobgp takes a third of HoldTime
			ConnectRetry:      uint64(p.connectTime() / time.Second),
		}},
		Transport: &api.Transport{RemotePort: uint32(p.Port), BindInterface: p.Device},
	}
	if p.Source.IsValid() {
		n.Transport.LocalAddress = p.Source.String()
	}
	if p.EBGPMultiHop && !p.internal() {
		n.EbgpMultihop = &api.EbgpMultihop{Enabled: true, MultihopTtl: 255}
	}
	if p.TTLSecurityHops != 0 {
		n.TtlSecurity = &api.TtlSecurity{Enabled: true, TtlMin: 256 - uint32(p.TTLSecurityHops)}
	}
	if p.GracefulRestart {
		n.GracefulRestart = &api.GracefulRestart{
			Enabled:         true,
			RestartTime:     restartTime,
			DeferralTime:    restartDeferral,
			LocalRestarting: restarting,
		}
	}
	for _, family := range []*api.Family{ipv4Unicast, ipv6Unicast} {
		n.AfiSafis = append(n.AfiSafis, &api.AfiSafi{
			Config:            &api.AfiSafiConfig{Family: family, Enabled: true},
			MpGracefulRestart: &api.MpGracefulRestart{Config: &api.MpGracefulRestartConfig{Enabled: p.GracefulRestart}},
			PrefixLimits:      &api.PrefixLimit{Family: family, MaxPrefixes: prefixLimit},
		})
	}
	return n
}
