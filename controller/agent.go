package controller

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"

	"github.com/longshore-lb/longshore/announcer"
	"github.com/longshore-lb/longshore/announcer/bgp"
	"github.com/longshore-lb/longshore/config"
	"github.com/longshore-lb/longshore/ipvs"
)

// DataPlane is the kernel of this node (package ipvs/kernel).
type DataPlane interface {
	// Prepare sets up what all Services share; what is there already stays as it is.
	Prepare() error
	// Observe reads what is longshore's in the kernel.
	Observe() (ipvs.State, error)
	// Apply does the operations in their order and returns those that failed; the others are done.
	Apply([]ipvs.Operation) []ipvs.Failure
}

// Layer2 answers ARP and NDP (package announcer/layer2).
type Layer2 interface {
	// Answering tells whether an address is answered for on some link.
	Answering(netip.Addr) bool
	// Set replaces the addresses to answer for; the whole value.
	Set([]announcer.Address)
}

// Speaker keeps BGP sessions (package announcer/bgp).
type Speaker interface {
	// Set replaces what the speaker should be doing and returns at once; the whole value.
	Set(bgp.Config)
	// Sessions is the session of each peer, in the order of bgp.Config.Peers.
	Sessions() []bgp.Session
}

// Members tells which agents are alive (package announcer/members).
type Members interface {
	// Join replaces the addresses of all nodes where an agent may run; this node's own may be among them.
	Join([]netip.AddrPort)
	// Alive is the names of the nodes whose agents are alive, sorted, with this one among them.
	Alive() []string
	// Changed receives when Alive may have changed; many changes may come as one.
	Changed() <-chan struct{}
}

// Events takes what an owner of an object should know, such as a record.EventRecorder.
type Events interface {
	// Event records what happened to the object; eventtype is corev1.EventTypeNormal or EventTypeWarning.
	Event(object runtime.Object, eventtype, reason, message string)
}

// AgentOptions is what an agent works with.
type AgentOptions struct {
	Node      string
	Config    config.Agent
	Inbox     *Inbox
	DataPlane DataPlane
	Layer2    Layer2
	Speaker   Speaker
	Members   Members // nil if this is the only agent
	Events    Events
	Log       *slog.Logger
	// Password reads the password of a BGP peer from the Secret of that name; nil if there are no Secrets.
	Password func(ctx context.Context, secret string) (string, error)
}

// How long the agent waits: before it tries again what the kernel refused, and at its start for the other agents to
// be heard of. Until then it takes every node for alive, so that it does not claim addresses that others announce.
const (
	retryAfter        = 5 * time.Second
	retryForeignAfter = time.Minute // somebody else's virtual server is in the way
	settleAfter       = 5 * time.Second
)

// Agent brings Services into the kernel of one node and their addresses onto the network. What it does in one pass is
// proportional to what changed, except for its first pass and those after a failure.
type Agent struct {
	AgentOptions
	ready   atomic.Bool
	queries chan func()
	metrics *metrics

	// All of what follows belongs to Run.
	snapshot  *snapshot
	desired   ipvs.Desired
	services  map[types.NamespacedName]*served
	crossed   map[types.NamespacedName]struct{} // Services that did not get a frontend because another one has it
	node      NodeView
	network   NetworkView
	peers     []config.Peer
	settled   bool
	stale     bool // the configuration could not be read whole, such as a password
	pools     goodPools
	refused   []string       // why objects of group metallb.io are not in use
	announced []Announced    // as it was last told to the network
	failures  []ipvs.Failure // of the last pass
}

// served is what the agent remembers of a Service.
type served struct {
	scheduler string            // the last good one
	found     []Problem         // by translation
	problems  []Problem         // all, as last reported
	families  []corev1.IPFamily // in which it has a ready endpoint
	announced []Announced
	reported  []netip.Addr // addresses for which an event said that this node announces them
}

// NewAgent returns an agent that does nothing until Run.
func NewAgent(o AgentOptions) *Agent {
	return &Agent{
		AgentOptions: o,
		queries:      make(chan func()),
		metrics:      newMetrics(),
		snapshot:     newSnapshot(),
		services:     map[types.NamespacedName]*served{},
		crossed:      map[types.NamespacedName]struct{}{},
	}
}

// Ready tells whether all that is desired was in the kernel after the last pass. Frontends that somebody else has a
// virtual server for do not count: no retry and no restart would change that.
func (a *Agent) Ready() bool { return a.ready.Load() }

// Run works until ctx ends, and leaves the kernel as it then is: connections go on without the agent. It returns an
// error only if the kernel cannot be used at all.
func (a *Agent) Run(ctx context.Context) error {
	if err := a.DataPlane.Prepare(); err != nil {
		return fmt.Errorf("prepare the kernel: %w", err)
	}
	var membersChanged <-chan struct{}
	if a.Members != nil {
		membersChanged = a.Members.Changed()
	}
	settle := time.After(settleAfter)
	retry := time.NewTimer(0)
	retry.Stop()
	full := true // compare with the kernel itself, not with what it was told before
	for {
		again := false
		select {
		case <-ctx.Done():
			return nil
		case query := <-a.queries:
			query()
			continue
		case <-a.Inbox.poke:
		case <-membersChanged:
			again = true
		case <-settle:
			a.settled, again = true, true
		case <-retry.C:
		}
		changes, synced := a.Inbox.take()
		if !synced {
			continue
		}
		if err := a.pass(ctx, changes, full, again); err != nil {
			a.Log.Error("pass failed, trying again", "error", err, "after", retryAfter)
			full = true
			retry.Reset(retryAfter)
			continue
		}
		full = len(a.failures) > 0 // what failed is not forgotten by a pass about something else
		switch {
		case !a.Ready() || a.stale:
			retry.Reset(retryAfter)
		case full:
			retry.Reset(retryForeignAfter)
		}
	}
}

// pass takes changes in, brings the kernel and then the network to what is desired.
func (a *Agent) pass(ctx context.Context, changes []change, full, membersChanged bool) error {
	t := a.snapshot.update(changes)
	wishes := map[string]ipvs.State{}
	networkChanged := a.updateViews(ctx, &t, membersChanged, wishes)
	for name := range t.services {
		wishes[name.String()] = a.translate(name)
	}
	ops := a.desired.ReplaceAll(wishes)
	a.report(t.services)
	if networkChanged || full {
		for name := range a.services {
			t.services[name] = struct{}{}
		}
	}
	a.withdraw(t.services)
	if full {
		observed, err := a.adopt()
		if err != nil {
			a.ready.Store(false)
			return err
		}
		ops = ipvs.Diff(observed, a.desired.State())
	}
	if a.Log.Enabled(ctx, slog.LevelDebug) {
		for _, o := range ops {
			a.Log.Debug("apply", "operation", o.String())
		}
	}
	a.failures = a.DataPlane.Apply(ops)
	for _, f := range a.failures {
		a.Log.Error("kernel operation failed", "error", f.Err)
	}
	a.ready.Store(!slices.ContainsFunc(a.failures, func(f ipvs.Failure) bool { return !errors.Is(f.Err, ipvs.ErrForeign) }))
	a.metrics.count(ops, a.failures)
	a.announce()
	a.metrics.services.Set(float64(len(a.services)))
	a.metrics.announced.Set(float64(len(a.announced)))
	if len(ops) > 0 {
		a.Log.Info("kernel updated", "operations", len(ops), "failed", len(a.failures))
	}
	return nil
}

// adopt reads what is ours in the kernel, and first mends what all Services share: somebody may have flushed nftables.
func (a *Agent) adopt() (ipvs.State, error) {
	if err := a.DataPlane.Prepare(); err != nil {
		return ipvs.State{}, fmt.Errorf("prepare the kernel: %w", err)
	}
	observed, err := a.DataPlane.Observe()
	if err != nil {
		return ipvs.State{}, fmt.Errorf("observe the kernel: %w", err)
	}
	return observed, nil
}

// updateViews derives the node's and the network's view from the objects where they changed, and tells whether the
// network's did. If the node's view is a different one, every Service is touched.
func (a *Agent) updateViews(ctx context.Context, t *touched, membersChanged bool, wishes map[string]ipvs.State) (networkChanged bool) {
	if t.nodes {
		if node := a.nodeView(); !reflect.DeepEqual(node, a.node) {
			a.node = node
			wishes["node"] = TranslateNode(node)
			for name := range a.snapshot.services {
				t.services[name] = struct{}{}
			}
		}
		if a.Members != nil {
			a.Members.Join(a.memberAddresses())
		}
	}
	if t.config || a.stale {
		t.config = true
		a.updateConfig(ctx)
	}
	if t.nodes || t.config || membersChanged {
		before := a.network
		a.network.Node = a.Node
		a.network.Nodes = a.candidates()
		a.network.ThisNodeLabels = nil
		if n := a.snapshot.nodes[types.NamespacedName{Name: a.Node}]; n != nil {
			a.network.ThisNodeLabels = n.Labels
		}
		networkChanged = t.config || !reflect.DeepEqual(before.Nodes, a.network.Nodes) ||
			!maps.Equal(before.ThisNodeLabels, a.network.ThisNodeLabels)
	}
	return networkChanged
}

// nodeView is this node as the data plane needs it.
func (a *Agent) nodeView() NodeView {
	v := NodeView{Name: a.Node}
	if n := a.snapshot.nodes[types.NamespacedName{Name: a.Node}]; n != nil {
		v.Addresses = internalIPs(n)
		for _, text := range n.Spec.PodCIDRs {
			if p, err := netip.ParsePrefix(text); err == nil {
				v.PodCIDRs = append(v.PodCIDRs, p.Masked())
			}
		}
	}
	v.Others = map[netip.Addr]bool{}
	for _, n := range a.snapshot.nodes {
		for _, addr := range internalIPs(n) {
			if n.Name != a.Node {
				v.Others[addr] = true
			}
		}
	}
	for _, addr := range v.Addresses {
		in := func(p netip.Prefix) bool { return p.Contains(addr) }
		if len(a.Config.NodePortAddresses) == 0 || slices.ContainsFunc(a.Config.NodePortAddresses, in) {
			v.NodePortAddrs = append(v.NodePortAddrs, addr)
		}
	}
	for _, c := range sorted(a.snapshot.serviceCIDRs) {
		for _, text := range c.Spec.CIDRs {
			if p, err := netip.ParsePrefix(text); err == nil {
				v.ServiceCIDRs = append(v.ServiceCIDRs, p.Masked())
			}
		}
	}
	v.ServiceCIDRs = widest(v.ServiceCIDRs)
	return v
}

// widest leaves out the prefixes that are inside of others: ServiceCIDRs may overlap, ranges in a set of nftables may not.
func widest(all []netip.Prefix) []netip.Prefix {
	var out []netip.Prefix
	for i, p := range all {
		inside := func(q netip.Prefix) bool { return q.Bits() < p.Bits() && q.Contains(p.Addr()) }
		if !slices.ContainsFunc(all, inside) && !slices.Contains(all[:i], p) {
			out = append(out, p)
		}
	}
	return out
}

func internalIPs(n *corev1.Node) []netip.Addr {
	var texts []string
	for _, addr := range n.Status.Addresses {
		if addr.Type == corev1.NodeInternalIP {
			texts = append(texts, addr.Address)
		}
	}
	return addresses(texts)
}

func (a *Agent) memberAddresses() []netip.AddrPort {
	var out []netip.AddrPort
	for _, n := range sorted(a.snapshot.nodes) {
		if addrs := internalIPs(n); len(addrs) > 0 {
			out = append(out, netip.AddrPortFrom(addrs[0], a.Config.MembersPort))
		}
	}
	return out
}

// candidates is the nodes that may announce: alive, Ready, with a network, and not excluded from load balancers.
func (a *Agent) candidates() map[string]labels.Set {
	out := map[string]labels.Set{}
	var alive []string
	if a.Members != nil && a.settled {
		alive = a.Members.Alive()
	}
	for _, n := range a.snapshot.nodes {
		_, excluded := n.Labels[corev1.LabelNodeExcludeBalancers]
		if excluded || !nodeReady(n) || alive != nil && !slices.Contains(alive, n.Name) || a.Members == nil && n.Name != a.Node {
			continue
		}
		out[n.Name] = n.Labels
	}
	return out
}

func nodeReady(n *corev1.Node) bool {
	ready := false
	for _, c := range n.Status.Conditions {
		switch {
		case c.Type == corev1.NodeReady:
			ready = c.Status == corev1.ConditionTrue
		case c.Type == corev1.NodeNetworkUnavailable && c.Status == corev1.ConditionTrue:
			return false
		}
	}
	return ready
}

// updateConfig validates the metallb.io objects. One that is wrong is reported and left out; a pool then stays as it was.
func (a *Agent) updateConfig(ctx context.Context) {
	var refused []string
	report := func(o Object, err error) {
		if !slices.Contains(a.refused, err.Error()) {
			a.Log.Warn("configuration refused", "error", err)
			a.Events.Event(o, corev1.EventTypeWarning, "ConfigurationRefused", err.Error())
		}
		refused = append(refused, err.Error())
	}
	defer func() { a.refused = refused }()
	a.stale = false
	var poolErrs []refusedPool
	a.network.Pools, poolErrs = a.pools.parse(a.snapshot.pools) // the cluster's loop sends the events about pools
	a.network.Unusable = nil
	for _, r := range poolErrs {
		refused = append(refused, r.err.Error())
		if !slices.ContainsFunc(a.network.Pools, func(p config.Pool) bool { return p.Name == r.object.Name }) {
			a.network.Unusable = append(a.network.Unusable, config.Pool{Name: r.object.Name, Labels: r.object.Labels})
		}
	}
	a.network.Layer2 = nil
	for _, o := range sorted(a.snapshot.layer2) {
		if adv, err := config.ParseL2Advertisement(o); err != nil {
			report(o, err)
		} else {
			a.network.Layer2 = append(a.network.Layer2, adv)
		}
	}
	a.network.BGP = nil
	for _, o := range sorted(a.snapshot.bgp) {
		if adv, err := config.ParseBGPAdvertisement(o); err != nil {
			report(o, err)
		} else {
			a.network.BGP = append(a.network.BGP, adv)
		}
	}
	a.peers = nil
	for _, o := range sorted(a.snapshot.peers) {
		peer, err := config.ParsePeer(o)
		if err == nil && peer.PasswordSecret != "" {
			if a.Password == nil {
				err = fmt.Errorf("BGPPeer %s: spec.passwordSecret: %q: there are no Secrets without a cluster, write spec.password", nameOf(o), peer.PasswordSecret)
			} else {
				reading, cancel := context.WithTimeout(ctx, retryAfter) // the API server may be away, the nodes are not
				peer.Password, err = a.Password(reading, peer.PasswordSecret)
				cancel()
				if err != nil {
					err = fmt.Errorf("BGPPeer %s: spec.passwordSecret: %w", nameOf(o), err)
					a.stale = true
				}
			}
		}
		if err != nil {
			report(o, err)
			continue
		}
		a.peers = append(a.peers, peer)
	}
}

// translate brings one Service up to date and returns what the kernel should hold for it.
func (a *Agent) translate(name types.NamespacedName) ipvs.State {
	svc := a.snapshot.services[name]
	if svc == nil {
		delete(a.services, name)
		return ipvs.State{}
	}
	s := a.services[name]
	if s == nil {
		s = &served{scheduler: a.Config.Scheduler}
		a.services[name] = s
	}
	scheduler, problems := SchedulerOf(svc, a.Config.Scheduler, s.scheduler)
	state, more := Translate(svc, a.snapshot.slicesOf(name), a.node, scheduler)
	s.scheduler = scheduler
	s.found = append(problems, more...)
	s.families = servedFamilies(state)
	return state
}

// report sends an event about each new problem of the Services touched, and of those that another one is in the way of.
func (a *Agent) report(touched map[types.NamespacedName]struct{}) {
	names := maps.Clone(touched)
	maps.Copy(names, a.crossed)
	for _, name := range slices.SortedFunc(maps.Keys(names), compareNames) {
		delete(a.crossed, name)
		s := a.services[name]
		if s == nil {
			continue
		}
		problems := slices.Clone(s.found)
		for _, c := range a.desired.Conflicts(name.String()) {
			a.crossed[name] = struct{}{}
			problems = append(problems, Problem{"FrontendConflict", fmt.Sprintf("%s is served by Service %s already", c.Frontend, c.Holder)})
		}
		for _, p := range problems {
			if !slices.Contains(s.problems, p) {
				a.Events.Event(a.snapshot.services[name], corev1.EventTypeWarning, p.Reason, p.Message)
				a.Log.Warn("problem with a Service", "service", name.String(), "reason", p.Reason, "message", p.Message)
			}
		}
		s.problems = problems
	}
}

// withdraw decides anew what is announced of the Services touched, and takes back at once what no longer is.
func (a *Agent) withdraw(touched map[types.NamespacedName]struct{}) {
	for name := range touched {
		s := a.services[name]
		if s == nil {
			continue
		}
		s.announced = nil
		if svc := a.snapshot.services[name]; svc != nil {
			s.announced = Announce(svc, s.families, a.network)
		}
		s.reported = slices.DeleteFunc(s.reported, func(addr netip.Addr) bool {
			return !slices.ContainsFunc(s.announced, func(w Announced) bool { return w.Address == addr })
		})
	}
	type one struct {
		service types.NamespacedName
		addr    netip.Addr
	}
	wanted := map[one]Announced{}
	for _, w := range a.wanted() {
		wanted[one{w.Service, w.Address}] = w
	}
	var staying []Announced
	for _, was := range a.announced {
		if w, ok := wanted[one{was.Service, was.Address}]; ok {
			staying = append(staying, intersect(was, w))
		}
	}
	if !reflect.DeepEqual(staying, a.announced) {
		a.tell(staying)
	}
}

// intersect is what of an announcement stays.
func intersect(was, wanted Announced) Announced {
	if was.Owner != wanted.Owner {
		was.Owner = ""
	}
	was.Routes = slices.DeleteFunc(slices.Clone(was.Routes), func(r announcer.Route) bool {
		return !slices.ContainsFunc(wanted.Routes, func(w announcer.Route) bool { return w.Prefix == r.Prefix })
	})
	return was
}

// wanted is the announcements of all Services, in order.
func (a *Agent) wanted() []Announced {
	var all []Announced
	for _, name := range slices.SortedFunc(maps.Keys(a.services), compareNames) {
		all = append(all, a.services[name].announced...)
	}
	return all
}

// announce tells the network about every address whose Service the kernel serves.
func (a *Agent) announce() {
	broken := map[netip.Addr]bool{}
	missing := map[ipvs.Frontend]int{} // real servers
	for _, f := range a.failures {
		if f.Operation.Verb == ipvs.Delete {
			continue // what should be there is
		}
		if frontend := f.Operation.VirtualServer.Frontend; f.Operation.Kind == ipvs.KindRealServer {
			if missing[frontend]++; missing[frontend] < a.desired.RealServers(frontend) {
				continue // one of several does not make an address useless
			}
		}
		broken[f.Operation.VirtualServer.Frontend.Addr.Addr()] = true
		broken[f.Operation.Element.Frontend.Addr.Addr()] = true
		broken[f.Operation.Element.Prefix.Addr()] = true
		broken[f.Operation.Route.Addr()] = true
	}
	realized := slices.DeleteFunc(a.wanted(), func(w Announced) bool { return broken[w.Address] })
	a.tell(realized)
	for _, w := range realized {
		s := a.services[w.Service]
		mine := w.Owner == a.Node
		switch had := slices.Contains(s.reported, w.Address); {
		case mine && !had:
			s.reported = append(s.reported, w.Address)
			a.Events.Event(a.snapshot.services[w.Service], corev1.EventTypeNormal, "nodeAssigned",
				fmt.Sprintf("announcing %s from node %q with protocol \"layer2\"", w.Address, a.Node))
		case !mine && had:
			s.reported = slices.DeleteFunc(s.reported, func(addr netip.Addr) bool { return addr == w.Address })
		}
	}
}

func (a *Agent) tell(all []Announced) {
	addrs, routes := onTheWire(a.Node, all)
	a.announced = all
	a.Layer2.Set(addrs)
	a.Speaker.Set(a.speakerConfig(routes))
}

// speakerConfig is the sessions and routes of this node. A peer gets routes of the family of its own address, and of the
// other one only if it asks for both.
func (a *Agent) speakerConfig(routes []announcer.Route) bgp.Config {
	c := bgp.Config{NextHop4: a.node.Address(false), NextHop6: a.node.Address(true)}
	c.RouterID = c.NextHop4
	var peers []config.Peer
	for _, p := range a.peers {
		if !p.SelectsNode(a.network.ThisNodeLabels) {
			continue
		}
		peers = append(peers, p)
		if p.RouterID.IsValid() {
			c.RouterID = p.RouterID
		}
		c.Peers = append(c.Peers, bgp.Peer{
			Name: p.Name, MyASN: p.MyASN, PeerASN: p.PeerASN, LocalASN: p.LocalASN,
			Address: p.Address, Source: p.Source, Port: p.Port,
			HoldTime: p.HoldTime, KeepaliveTime: p.KeepaliveTime, ConnectTime: connectTime(p),
			Password: p.Password, EBGPMultiHop: p.EBGPMultiHop, GracefulRestart: p.GracefulRestart,
		})
	}
	for _, r := range routes {
		var names []string
		for _, p := range peers {
			wanted := len(r.Peers) == 0 || slices.Contains(r.Peers, p.Name)
			if wanted && (p.DualStack || p.Address.Is6() == r.Prefix.Addr().Is6()) {
				names = append(names, p.Name)
			}
		}
		if len(names) > 0 {
			r.Peers = names
			c.Routes = append(c.Routes, r)
		}
	}
	return c
}

// connectTime is a peer's connect time, as short as the speaker can have it; 0 = the speaker's default.
func connectTime(p config.Peer) time.Duration {
	if p.ConnectTime == 0 {
		return 0
	}
	return max(p.ConnectTime, 2*time.Second)
}
