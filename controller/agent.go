package controller

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"maps"
	"net/netip"
	"reflect"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"

	"github.com/longshore-lb/longshore/announcer"
	"github.com/longshore-lb/longshore/announcer/bgp"
	"github.com/longshore-lb/longshore/config"
	"github.com/longshore-lb/longshore/config/v1beta1"
	"github.com/longshore-lb/longshore/config/v1beta2"
	"github.com/longshore-lb/longshore/ipvs"
)

// DataPlane is the kernel of this node (package ipvs/kernel).
type DataPlane interface {
	// Prepare sets up what all Services share; what is there already stays as it is.
	Prepare() error
	// Observe reads what is longshore's in the kernel.
	Observe() (ipvs.State, error)
	// Intact tells whether what Prepare set up is still so.
	Intact() bool
	// Apply does the operations in their order and returns those that failed; the others are done.
	Apply([]ipvs.Operation) []ipvs.Failure
	// Connections is how many connections the real servers of some virtual servers have.
	Connections([]ipvs.Frontend) (map[ipvs.Frontend]map[netip.AddrPort]int, error)
	// PortInUse tells whether a process of this node has a port of its own, at which it would no longer be reached.
	PortInUse(ipvs.Protocol, uint16) bool
}

// Layer2 answers ARP and NDP (package announcer/layer2).
type Layer2 interface {
	// Answering tells whether an address is answered for on some link.
	Answering(netip.Addr) bool
	// Set replaces the addresses to answer for; the whole value.
	Set([]announcer.Address)
	// Links is the usable links of this node.
	Links() []announcer.Link
	// Changed receives when Answering or Links may have changed; many changes may come as one.
	Changed() <-chan struct{}
	// Conflicts receives the claims of other machines to addresses that are answered for.
	Conflicts() <-chan announcer.Conflict
	// Announcements counts those that nobody asked for.
	Announcements() map[announcer.Gratuitous]uint64
	// Answers counts the requests that were answered, by protocol.
	Answers() map[string]uint64
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
	// Agents is what each living agent says of itself, by the name of its node; this one is among them.
	Agents() map[string]announcer.Agent
	// Tell replaces what this agent says of itself.
	Tell(announcer.Agent)
	// Changed receives when Agents may have changed; many changes may come as one.
	Changed() <-chan struct{}
}

// Registry tells the API server which nodes have an agent ([Kubernetes]).
type Registry interface {
	// Register says that a node has an agent, until Unregister.
	Register(ctx context.Context, node string) error
	// Unregister says that it has none any more.
	Unregister(ctx context.Context, node string) error
}

// Tie decides between two halves of the agents that do not reach each other ([TieBreak]). One goroutine at a time uses it.
type Tie interface {
	// Hold tries once to get or renew it for the half that is alive, and tells until when that has it; zero = it has not.
	Hold(ctx context.Context, alive []string) (until time.Time, err error)
	// Release gives it up, if this agent has it for its half.
	Release(ctx context.Context) error
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
	Members   Members  // nil if this is the only agent
	Registry  Registry // nil if there is no API server
	TieBreak  Tie      // likewise
	Events    Events
	Log       *slog.Logger
	// Password reads the password of a BGP peer from the Secret of that name; nil if there are no Secrets.
	Password func(ctx context.Context, secret string) (string, error)
	// Reports takes what the agent says of itself; nil if there is no API server.
	Reports Reports
	// WatchPods makes the inbox receive pods too. It is called once, when a Service first wants their weights; nil if there
	// are no pods to watch.
	WatchPods func()
}

// How long the agent waits: before it tries again what the kernel refused, and at its start for the other agents to
// be heard of. Until then it takes every node for alive, and no address that nobody claims.
const (
	retryAfter        = 5 * time.Second
	retryForeignAfter = time.Minute // somebody else's virtual server is in the way
	settleAfter       = 5 * time.Second
)

// upkeepEvery is how often real servers that drain, or start slowly, are looked at.
const upkeepEvery = time.Second

// manyServices is from how many Services on a pass about everything takes memory that is worth giving back.
const manyServices = 1000

// firstChunk is how many Services the first pass brings into the kernel at a time: those that come first are served
// first, and what is held in memory for a chunk is small.
const firstChunk = 256

// Agent brings Services into the kernel of one node and their addresses onto the network. What it does in one pass is
// proportional to what changed, except for its first pass and those after a failure.
type Agent struct {
	AgentOptions
	ready   atomic.Bool
	queries chan func()
	metrics *metrics
	health  health
	checks  *HealthChecks
	tied    chan time.Time // until when this half of the agents has the Lease that decides
	tieMu   sync.Mutex     // of TieBreak

	background sync.WaitGroup // what asks the API server

	// All of what follows belongs to Run.
	snapshot  *snapshot
	desired   ipvs.Desired
	services  map[types.NamespacedName]*served
	crossed   map[types.NamespacedName]struct{} // Services that did not get a frontend because another one has it
	unbound   map[types.NamespacedName]string   // why a Service's health check port is not bound
	noLocal   [2]int                            // Services of internal, and of external, traffic policy Local that have endpoints, none of them here
	ramping   map[types.NamespacedName]struct{} // Services with a real server in its slow start
	marks     marks
	node      NodeView
	overlaps  []string // ServiceCIDRs that have a node's address in them, as last reported
	network   NetworkView
	peers     []watchedPeer
	settled   bool        // the other agents have been heard of, or there was time enough
	late      bool        // there was time enough
	adopted   bool        // the first pass is over
	unsaid    bool        // Reports has not been told of what changed last
	leavesAt  time.Time   // until then this node still advertises by BGP although it is excluded
	left      *time.Timer // when it does not any more
	untold    bool        // the view of the network has changed since the network was last told
	stale     bool        // the configuration could not be read whole, such as a password
	pools     goodPools
	good      goodObjects
	warned    []string                             // what in the objects does not come about as it is said
	refused   []string                             // why objects of group metallb.io are not in use
	told      map[types.NamespacedName][]Announced // what the network was last told
	announced int                                  // how many addresses that is
	conflicts map[netip.Addr]reported
	owners
	failures []ipvs.Failure // of the last pass
}

// served is what the agent remembers of a Service.
type served struct {
	options   Options   // the last good ones
	found     []Problem // by translation
	problems  []Problem // all, as last reported
	reach     map[corev1.IPFamily]map[string]bool
	announced []Announced
	contested []netip.Addr                 // addresses that have candidates
	reported  []netip.Addr                 // addresses for which an event said that this node announces them
	born      map[netip.AddrPort]time.Time // of each real server, if they start slowly
	nodePorts map[portOf]bool              // those looked at, and whether a process has them
	noLocal   [2]bool                      // Translation.NoLocalInternal, NoLocalExternal
}

type portOf struct {
	protocol ipvs.Protocol
	number   uint16
}

// NewAgent returns an agent that does nothing until Run.
func NewAgent(o AgentOptions) *Agent {
	a := &Agent{
		AgentOptions: o,
		queries:      make(chan func()),
		metrics:      newMetrics(o.Inbox),
		snapshot:     newSnapshot(),
		services:     map[types.NamespacedName]*served{},
		crossed:      map[types.NamespacedName]struct{}{},
		unbound:      map[types.NamespacedName]string{},
		ramping:      map[types.NamespacedName]struct{}{},
		marks:        marks{},
		told:         map[types.NamespacedName][]Announced{},
		good:         newGoodObjects(),
		tied:         make(chan time.Time),
		conflicts:    map[netip.Addr]reported{},
		owners:       newOwners(),
	}
	a.metrics.layer2(o.Layer2)
	a.metrics.registry.MustRegister(bfdMetrics{o.Speaker.Sessions})
	a.checks = NewHealthChecks(o.Log, func() bool { return a.health.at(time.Now()).live })
	a.desired.Seed = seed(o.Node)
	return a
}

// seed is a node's own, and not 0.
func seed(node string) uint32 {
	h := fnv.New32a()
	_, _ = h.Write([]byte(node))
	return h.Sum32() | 1
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
	defer a.checks.Close()
	defer a.background.Wait()
	defer a.untie(true)
	var membersChanged <-chan struct{}
	if a.Members != nil {
		membersChanged = a.Members.Changed()
	}
	var settle <-chan time.Time // from the first pass on, since only then the others are looked for
	fence := time.NewTimer(0)
	fence.Stop()
	retry := time.NewTimer(0)
	retry.Stop()
	a.left = time.NewTimer(0)
	a.left.Stop()
	upkeep := time.NewTicker(upkeepEvery)
	defer upkeep.Stop()
	audit, stop := every(a.Config.AuditPeriod)
	defer stop()
	full := true       // compare with the kernel itself, not with what it was told before
	var last time.Time // when the last pass began
	for {
		again, tick := false, false
		select {
		case <-ctx.Done():
			a.handOver()
			return nil
		case query := <-a.queries:
			query()
			continue
		case <-a.Inbox.poke:
		case <-membersChanged:
			again = true
		case <-a.left.C:
			again = true
		case <-a.Layer2.Changed():
			again = true
		case conflict := <-a.Layer2.Conflicts():
			a.contested(conflict)
			continue
		case a.fence.until = <-a.tied:
			fence.Reset(time.Until(a.fence.until))
			again = true
		case <-fence.C:
			again = true
		case <-settle:
			a.late, again = true, true
		case <-upkeep.C:
			idle := a.desired.Draining() == 0 && len(a.ramping) == 0 && len(a.lingering) == 0
			if idle || full && time.Since(last) < retryAfter { // a full pass each second would be too much
				continue
			}
			tick = true
		case <-audit:
			full = true
		case <-retry.C:
		}
		changes, synced := a.Inbox.take()
		if !synced {
			continue
		}
		last = time.Now()
		if settle == nil && a.Members != nil {
			settle = time.After(settleAfter)
		}
		if err := a.pass(ctx, changes, full, again, tick); err != nil {
			a.Log.Error("pass failed, trying again", "error", err, "after", retryAfter)
			full = true
			retry.Reset(retryAfter)
			continue
		}
		if full && len(a.services) >= manyServices {
			debug.FreeOSMemory() // what a pass about everything took is not needed until the next one
		}
		full = len(a.failures) > 0 // what failed is not forgotten by a pass about something else
		switch {
		case !a.Ready() || a.stale:
			retry.Reset(retryAfter)
		case full || len(a.unbound) > 0:
			retry.Reset(retryForeignAfter)
		}
	}
}

// every is a ticker that never ticks if its period is 0.
func every(period time.Duration) (<-chan time.Time, func()) {
	if period == 0 {
		return nil, func() {}
	}
	t := time.NewTicker(period)
	return t.C, t.Stop
}

// pass takes changes in, brings the kernel and then the network to what is desired.
func (a *Agent) pass(ctx context.Context, changes []change, full, membersChanged, tick bool) error {
	p := a.begins(changes, full)
	t := a.snapshot.update(changes)
	if tick {
		maps.Copy(t.services, a.ramping)
	}
	claimed := a.hear()
	networkChanged := a.updateViews(ctx, &t, membersChanged || len(claimed) > 0) || a.untold
	a.untold = networkChanged
	a.failures = nil
	if a.adopted {
		p.err = a.update(&p, t, claimed, networkChanged, tick)
	} else {
		networkChanged = true
		p.err = a.begin(&p, t)
	}
	if p.err != nil {
		a.ends(p)
		return p.err
	}
	p.failures, p.applied = a.failures, time.Now()
	for _, f := range a.failures {
		a.Log.Error("kernel operation failed", "error", f.Err)
	}
	a.report(t.services)
	a.checkServices(t.services)
	a.announce(t.services, networkChanged)
	a.sayIt()
	p.services, p.announced, p.draining = len(a.services), a.announced, a.desired.Draining()
	p.noLocalInternal, p.noLocalExternal = a.noLocal[0], a.noLocal[1]
	a.ends(p)
	if p.operations > 0 {
		a.Log.Info("kernel updated", "operations", p.operations, "failed", len(a.failures))
	}
	return nil
}

// begin is the first pass. It takes what an earlier process left in the kernel for what there is, and brings the Services in
// some at a time: what a cluster cannot start without is served first. What nobody wants goes at the end.
func (a *Agent) begin(p *passed, t touched) (err error) {
	if p.observed, err = a.adopt(); err != nil {
		return err
	}
	a.desired.Adopt(p.observed)
	for name := range a.snapshot.services { // some may have come with a pass that failed
		t.services[name] = struct{}{}
	}
	step := func(ops []ipvs.Operation) { // counted at once: all of them together are much memory
		failed := len(a.failures)
		a.apply(p, ops)
		a.metrics.count(p.ops, a.failures[failed:])
		p.operations, p.ops = p.operations+len(p.ops), nil
	}
	a.metrics.found(p.observed)
	step(a.desired.ReplaceAll(map[string]ipvs.Wish{nodeOwner: TranslateNode(a.node)}, time.Now()))
	chunks, applied := make(chan []ipvs.Operation), make(chan struct{})
	go func() { // the kernel takes one while the next is made
		defer close(applied)
		for ops := range chunks {
			step(ops)
		}
	}()
	names := slices.SortedFunc(maps.Keys(t.services), a.inOrderOfNeed)
	for len(names) > 0 {
		n := 0
		for n < min(len(names), firstChunk) && a.need(names[n]) == a.need(names[0]) {
			n++
		}
		wishes := map[string]ipvs.Wish{}
		for _, name := range names[:n] {
			wishes[name.String()] = a.translate(name)
		}
		names = names[n:]
		chunks <- a.desired.ReplaceAll(wishes, time.Now())
	}
	close(chunks)
	<-applied
	step(a.desired.Settle())
	a.elect(t.services, nil)
	for name := range t.services {
		a.withdraw(name)
	}
	a.adopted, a.started = true, true
	return nil
}

// nodeOwner owns what the kernel holds whatever Services there are.
const nodeOwner = "node"

// need tells how much else depends on a Service: the API server's 0, the cluster's DNS 1, all others 2.
func (a *Agent) need(name types.NamespacedName) int {
	svc := a.snapshot.services[name]
	switch {
	case name == types.NamespacedName{Namespace: metav1.NamespaceDefault, Name: "kubernetes"}:
		return 0
	case svc != nil && svc.Labels["k8s-app"] == "kube-dns":
		return 1
	}
	return 2
}

// inOrderOfNeed puts what others depend on first.
func (a *Agent) inOrderOfNeed(m, n types.NamespacedName) int {
	return cmp.Or(cmp.Compare(a.need(m), a.need(n)), compareNames(m, n))
}

// update is every pass but the first.
func (a *Agent) update(p *passed, t touched, claimed map[netip.Addr]struct{}, networkChanged, tick bool) (err error) {
	now := time.Now()
	wishes := map[string]ipvs.Wish{}
	if t.node {
		wishes[nodeOwner] = TranslateNode(a.node)
	}
	for name := range t.services {
		wishes[name.String()] = a.translate(name)
	}
	gone := a.desired.Gone
	ops := a.desired.ReplaceAll(wishes, now)
	p.drainedGone = a.desired.Gone - gone
	if networkChanged || p.full {
		for name := range a.services {
			t.services[name] = struct{}{}
		}
	}
	a.elect(t.services, claimed)
	withdrawn := false
	for name := range t.services {
		withdrawn = a.withdraw(name) || withdrawn
	}
	if withdrawn {
		a.tell()
	}
	if tick {
		ended, err := a.endDrains(p, now)
		if err != nil {
			return err
		}
		ops = append(ops, ended...)
	}
	p.expected = ops
	if p.full {
		if p.observed, err = a.adopt(); err != nil {
			return err
		}
		ops = a.desired.Repair(p.observed)
		a.metrics.found(p.observed)
	}
	a.apply(p, ops)
	a.metrics.count(p.ops, a.failures)
	p.operations = len(p.ops)
	return nil
}

// endDrains removes real servers that have drained. It comes at a tick, not when they begin to: a connection may be on
// its way to one until the kernel knows that it has weight 0.
func (a *Agent) endDrains(p *passed, now time.Time) ([]ipvs.Operation, error) {
	if a.desired.Draining() == 0 {
		return nil, nil
	}
	connections, err := a.DataPlane.Connections(a.desired.DrainingFrontends())
	if err != nil {
		return nil, fmt.Errorf("count the connections of real servers that drain: %w", err)
	}
	ops, why := a.desired.EndDrains(now, connections)
	p.drainedEmpty, p.drainedTimeout = why.Empty, why.Timeout
	return ops, nil
}

// apply does operations of a pass, and notes those that fail.
func (a *Agent) apply(p *passed, ops []ipvs.Operation) {
	if a.Log.Enabled(context.Background(), slog.LevelDebug) {
		for _, o := range ops {
			a.Log.Debug("apply", "operation", o.String())
		}
	}
	if len(ops) > 0 {
		a.failures = append(a.failures, a.DataPlane.Apply(ops)...)
		p.ops = append(p.ops, ops...)
	}
}

// adopt reads what is ours in the kernel, and first mends what all Services share: somebody may have flushed nftables.
func (a *Agent) adopt() (ipvs.State, error) {
	if !a.adopted || !a.DataPlane.Intact() {
		if err := a.DataPlane.Prepare(); err != nil {
			return ipvs.State{}, fmt.Errorf("prepare the kernel: %w", err)
		}
	}
	observed, err := a.DataPlane.Observe()
	if err != nil {
		return ipvs.State{}, fmt.Errorf("observe the kernel: %w", err)
	}
	return observed, nil
}

// updateViews derives the node's and the network's view from the objects where they changed, and tells whether the
// network's did.
func (a *Agent) updateViews(ctx context.Context, t *touched, membersChanged bool) (networkChanged bool) {
	if t.nodes {
		a.health.nodeEligible(eligible(a.snapshot.nodes[types.NamespacedName{Name: a.Node}]))
		a.updateNode(t)
		if a.Members != nil {
			a.Members.Join(a.memberAddresses())
		}
	}
	if t.config || a.stale {
		t.config = true
		a.updateConfig(ctx)
	}
	if t.nodes || t.config || t.agents || membersChanged {
		wasSettled, before := a.settled, a.network
		a.settle(a.late)
		a.register(ctx)
		a.updateFence()
		a.network.Node = a.Node
		a.network.Nodes = a.candidates()
		a.network.Leaving = a.leaves(before)
		a.network.Links = a.links()
		a.network.Cordoned = a.cordoned()
		a.network.Owner = a.owner
		a.network.Silent = a.silent()
		a.network.ThisNodeLabels = nil
		if n := a.snapshot.nodes[types.NamespacedName{Name: a.Node}]; n != nil {
			a.network.ThisNodeLabels = n.Labels
		}
		networkChanged = t.config || before.Leaving != a.network.Leaving || !reflect.DeepEqual(before.Nodes, a.network.Nodes) || wasSettled != a.settled ||
			!reflect.DeepEqual(before.Links, a.network.Links) || !maps.Equal(before.Cordoned, a.network.Cordoned) ||
			before.Silent != a.network.Silent || !maps.Equal(before.ThisNodeLabels, a.network.ThisNodeLabels)
	}
	return networkChanged
}

// updateNode derives the node's view, and touches the Services that what has changed in it is about: nodes change often.
func (a *Agent) updateNode(t *touched) {
	before := a.node
	a.node = a.nodeView()
	others := !maps.Equal(a.node.Others, before.Others)
	before.Others = a.node.Others
	t.node = !reflect.DeepEqual(a.node, before)
	for name, svc := range a.snapshot.services {
		s := a.services[name]
		if t.node || others && len(externalIPs(svc))+len(ingressIPs(svc)) > 0 || s != nil && len(s.options.NodeWeights) > 0 {
			t.services[name] = struct{}{}
		}
	}
	if t.node && (len(a.Config.NodePortAddresses) > 0 || a.Config.NodePortPrimary) {
		_ = a.checks.Addresses(a.node.NodePortAddrs) // checkServices comes upon what cannot be bound
	}
}

// nodeView is this node as the data plane needs it.
func (a *Agent) nodeView() NodeView {
	v := NodeView{Name: a.Node, PodCIDRs: a.Config.PodCIDRs, PodsKnown: len(a.Config.PodCIDRs) > 0, MasqueradeAll: a.Config.MasqueradeAll}
	if n := a.snapshot.nodes[types.NamespacedName{Name: a.Node}]; n != nil {
		v.Addresses = internalIPs(n)
		v.Zone = n.Labels[corev1.LabelTopologyZone]
		for _, text := range n.Spec.PodCIDRs {
			if p, err := netip.ParsePrefix(text); err == nil && !v.PodsKnown {
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
		switch {
		case a.Config.NodePortPrimary && addr != v.Address(addr.Is6()), addr.IsLoopback():
		case len(a.Config.NodePortAddresses) == 0 || slices.ContainsFunc(a.Config.NodePortAddresses, in):
			v.NodePortAddrs = append(v.NodePortAddrs, addr)
		}
	}
	v.ServiceCIDRs = a.usableServiceCIDRs(v)
	return v
}

// usableServiceCIDRs is where cluster IPs come from, without a range that has a node's address in it: to make that local would
// cut this node off from others. Its cluster IPs are served one by one.
func (a *Agent) usableServiceCIDRs(v NodeView) []netip.Prefix {
	nodes := slices.SortedFunc(maps.Keys(v.Others), netip.Addr.Compare)
	nodes = append(nodes, v.Addresses...)
	var usable []netip.Prefix
	var overlaps []string
	for _, c := range sorted(a.snapshot.serviceCIDRs) {
		for i, text := range c.Spec.CIDRs {
			p, err := netip.ParsePrefix(text)
			if err != nil {
				continue
			}
			at := slices.IndexFunc(nodes, p.Contains)
			if at < 0 {
				usable = append(usable, p.Masked())
				continue
			}
			message := fmt.Sprintf("ServiceCIDR %s: spec.cidrs[%d]: %q has the address %s of a node in it; its cluster IPs are served, but "+
				"packets to its other addresses are not dropped", c.Name, i, text, nodes[at])
			if !slices.Contains(a.overlaps, message) {
				a.Events.Event(c, corev1.EventTypeWarning, "OverlapsNodes", message)
				a.Log.Warn("problem with a ServiceCIDR", "message", message)
			}
			overlaps = append(overlaps, message)
		}
	}
	a.overlaps = overlaps
	return outermost(usable)
}

// outermost leaves out the prefixes that are inside of others: ServiceCIDRs and source ranges may overlap, ranges in a set
// of nftables may not.
func outermost(all []netip.Prefix) []netip.Prefix {
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
		alive = a.aliveNames()
	}
	for _, n := range a.snapshot.nodes {
		if excluded(n) || !nodeReady(n) || alive != nil && !slices.Contains(alive, n.Name) || a.Members == nil && n.Name != a.Node {
			continue
		}
		out[n.Name] = n.Labels
	}
	return out
}

// leaves tells whether this node is excluded from load balancers, and was not a while ago: then its routes stay for that while,
// and peers are asked to prefer others (RFC 8326).
func (a *Agent) leaves(before NetworkView) bool {
	n := a.snapshot.nodes[types.NamespacedName{Name: a.Node}]
	if n == nil || !excluded(n) {
		return false
	}
	if _, announced := before.Nodes[a.Node]; announced {
		a.leavesAt = time.Now().Add(a.Config.GracefulShutdown)
		a.left.Reset(a.Config.GracefulShutdown)
	}
	return time.Now().Before(a.leavesAt)
}

// excluded tells whether a node is not to announce LoadBalancer addresses.
func excluded(n *corev1.Node) bool {
	_, ok := n.Labels[corev1.LabelNodeExcludeBalancers]
	return ok
}

// cordoned is the nodes that are about to be drained, or have been.
func (a *Agent) cordoned() map[string]bool {
	out := map[string]bool{}
	for _, n := range a.snapshot.nodes {
		if n.Spec.Unschedulable {
			out[n.Name] = true
		}
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

// updateConfig validates the metallb.io objects. One that is wrong is reported, and stays as it last was right.
func (a *Agent) updateConfig(ctx context.Context) {
	var refused, warned []string
	report := func(o Object, err error) {
		if !slices.Contains(a.refused, err.Error()) {
			a.Log.Warn("configuration refused", "error", err)
			a.Events.Event(o, corev1.EventTypeWarning, "ConfigurationRefused", err.Error())
		}
		refused = append(refused, err.Error())
	}
	warn := func(o Object, reason, message string) {
		if !slices.Contains(a.warned, message) {
			a.Log.Warn("configuration not taken as it is", "warning", message)
			a.Events.Event(o, corev1.EventTypeWarning, reason, message)
		}
		warned = append(warned, message)
	}
	defer func() { a.refused, a.warned, a.unsaid = refused, warned, true }()
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
	a.network.Layer2 = inUse(a.good.layer2, a.snapshot.layer2, config.ParseL2Advertisement, report)
	aliases := aliasesOf(a.good.communities, a.snapshot.communities, report)
	a.network.BGP = inUse(a.good.bgp, a.snapshot.bgp, func(o *v1beta1.BGPAdvertisement) (config.BGPAdvertisement, error) {
		return config.ParseBGPAdvertisement(o, aliases)
	}, report)
	profiles := a.profiles(report, warn)
	a.peers = inUse(a.good.peers, a.snapshot.peers, func(o *v1beta2.BGPPeer) (watchedPeer, error) {
		peer, err := a.parsePeer(ctx, o)
		if err != nil {
			return watchedPeer{}, err
		}
		return watchedBy(o, peer, profiles)
	}, report)
	for _, o := range sorted(a.snapshot.peers) {
		for _, message := range a.good.peers[nameOf(o)].Warnings {
			warn(o, "Unsupported", message)
		}
	}
}

// parsePeer validates a peer and reads its password.
func (a *Agent) parsePeer(ctx context.Context, o *v1beta2.BGPPeer) (config.Peer, error) {
	peer, err := config.ParsePeer(o)
	if err != nil || peer.PasswordSecret == "" {
		return peer, err
	}
	if a.Password == nil {
		return peer, fmt.Errorf("BGPPeer %s: spec.passwordSecret: %q: there are no Secrets without a cluster, write spec.password", nameOf(o), peer.PasswordSecret)
	}
	reading, cancel := context.WithTimeout(ctx, retryAfter) // the API server may be away, the nodes are not
	defer cancel()
	if peer.Password, err = a.Password(reading, peer.PasswordSecret); err != nil {
		a.stale = true
		return peer, fmt.Errorf("BGPPeer %s: spec.passwordSecret: %w", nameOf(o), err)
	}
	return peer, nil
}

// translate brings one Service up to date and returns what the kernel should hold for it.
func (a *Agent) translate(name types.NamespacedName) ipvs.Wish {
	svc := a.snapshot.services[name]
	if svc == nil {
		if s := a.services[name]; s != nil {
			for _, addr := range s.contested {
				a.contestAddress(addr, name, nil)
			}
		}
		a.countNoLocal(a.services[name], Translation{})
		delete(a.services, name)
		delete(a.ramping, name)
		a.marks.release(name)
		return ipvs.Wish{}
	}
	usual := UsualOptions(a.Config)
	s := a.services[name]
	if s == nil {
		s = &served{options: usual}
		a.services[name] = s
	}
	var problems []Problem
	s.options, problems = OptionsOf(svc, usual, s.options)
	if s.options.PodWeights {
		problems = append(problems, a.watchPods()...)
	}
	terms := Terms{
		Options:    s.options,
		NodeLabels: a.snapshot.labelsOf,
		PodWeight:  a.snapshot.podWeight,
		Mark: func(port string, protocol ipvs.Protocol, family corev1.IPFamily) uint32 {
			return a.marks.of(name, fmt.Sprintf("%s/%s/%s", port, protocol, family))
		},
	}
	delete(a.ramping, name)
	if s.options.SlowStart > 0 {
		born := map[netip.AddrPort]time.Time{}
		terms.Age = a.age(name, s, born)
		defer func() { s.born = born }()
	}
	t := Translate(svc, a.snapshot.slicesOf(name), a.node, terms)
	s.found = slices.Concat(problems, t.Problems, a.takenPorts(svc, s))
	s.reach = t.Reach
	a.countNoLocal(s, t)
	return t.Wish
}

// countNoLocal counts a Service among those without an endpoint here, as its new translation says.
func (a *Agent) countNoLocal(s *served, t Translation) {
	if s == nil {
		return
	}
	for i, now := range [2]bool{t.NoLocalInternal, t.NoLocalExternal} {
		if now && !s.noLocal[i] {
			a.noLocal[i]++
		} else if !now && s.noLocal[i] {
			a.noLocal[i]--
		}
		s.noLocal[i] = now
	}
}

// age tells how long real servers of a Service have been there, and notes in born since when. Those of a Service that is
// new, or new to slow start, have been there for ever: there is nobody to take the load meanwhile.
func (a *Agent) age(name types.NamespacedName, s *served, born map[netip.AddrPort]time.Time) func(netip.AddrPort) time.Duration {
	now := time.Now()
	return func(at netip.AddrPort) time.Duration {
		since, known := s.born[at]
		if !known && s.born != nil {
			since = now
		}
		born[at] = since
		age := now.Sub(since)
		if age < s.options.SlowStart {
			a.ramping[name] = struct{}{}
		}
		return age
	}
}

// watchPods begins to watch pods for their weights, and says so if that cannot be.
func (a *Agent) watchPods() []Problem {
	if a.WatchPods == nil {
		return []Problem{{"InvalidAnnotation", "annotation " + PodWeightsAnnotation + ": there are no pods without a cluster"}}
	}
	if !a.snapshot.watchesPods {
		a.snapshot.watchesPods = true
		a.WatchPods()
	}
	return nil
}

// takenPorts looks, once for each, whether a process of this node has the node ports of a Service. IPVS takes their packets
// before the process sees them.
func (a *Agent) takenPorts(svc *corev1.Service, s *served) []Problem {
	var problems []Problem
	looked := map[portOf]bool{}
	for i, p := range svc.Spec.Ports {
		key := portOf{protocols[cmp.Or(p.Protocol, corev1.ProtocolTCP)], uint16(p.NodePort)}
		if p.NodePort <= 0 || key.protocol == 0 || len(a.node.NodePortAddrs) == 0 {
			continue
		}
		taken, known := s.nodePorts[key]
		if !known {
			taken = a.DataPlane.PortInUse(key.protocol, key.number)
		}
		looked[key] = taken
		if taken {
			problems = append(problems, Problem{"NodePortInUse", fmt.Sprintf("spec.ports[%d].nodePort: %d/%s: a process of node %s has this port; "+
				"what is sent there goes to the Service now", i, p.NodePort, key.protocol, a.Node)})
		}
	}
	s.nodePorts = looked
	return problems
}

// report sends an event about each new problem of the Services touched, and of those that another one is in the way of.
func (a *Agent) report(touched map[types.NamespacedName]struct{}) {
	names := maps.Clone(touched)
	maps.Copy(names, a.crossed)
	foreign := map[types.NamespacedName][]Problem{}
	for _, f := range a.failures {
		if f.Operation.Kind == ipvs.KindVirtualServer && errors.Is(f.Err, ipvs.ErrForeign) {
			namespace, name, _ := strings.Cut(a.desired.Holder(f.Operation.VirtualServer.Frontend), "/")
			of := types.NamespacedName{Namespace: namespace, Name: name}
			foreign[of] = append(foreign[of], Problem{"ForeignVirtualServer", f.Err.Error()})
			names[of] = struct{}{}
		}
	}
	for _, name := range slices.SortedFunc(maps.Keys(names), compareNames) {
		delete(a.crossed, name)
		s := a.services[name]
		if s == nil {
			continue
		}
		problems := slices.Concat(s.found, foreign[name])
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

// withdraw decides anew how a Service is announced, and takes from what the network was told what no longer is so. It
// tells whether anything was.
func (a *Agent) withdraw(name types.NamespacedName) bool {
	var wanted []Announced
	if s, svc := a.services[name], a.snapshot.services[name]; s != nil && svc != nil {
		wanted = Announce(svc, s.reach, a.network)
		s.announced = wanted
		s.reported = slices.DeleteFunc(s.reported, func(addr netip.Addr) bool {
			return !slices.ContainsFunc(wanted, func(w Announced) bool { return w.Address == addr })
		})
	}
	var staying []Announced
	for _, was := range a.told[name] {
		if i := slices.IndexFunc(wanted, func(w Announced) bool { return w.Address == was.Address }); i >= 0 {
			if reach := a.services[name].reach[familyOf(was.Address)]; reach[AnyNode] || reach[a.Node] {
				a.linger(was, &wanted[i])
			}
			staying = append(staying, intersect(was, wanted[i]))
		}
	}
	return a.retell(name, staying)
}

// retell replaces what the network is to be told of one Service, and tells whether that is something else than before.
func (a *Agent) retell(name types.NamespacedName, all []Announced) bool {
	if reflect.DeepEqual(all, a.told[name]) || len(all) == 0 && len(a.told[name]) == 0 {
		return false
	}
	if a.told[name] = all; len(all) == 0 {
		delete(a.told, name)
	}
	return true
}

// intersect is what of an announcement stays.
func intersect(was, wanted Announced) Announced {
	was.Yielding = wanted.Yielding
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

// announce tells the network about every address of the Services touched that the kernel serves.
func (a *Agent) announce(touched map[types.NamespacedName]struct{}, always bool) {
	broken := a.broken()
	changed := always
	var realized []Announced
	for _, name := range slices.SortedFunc(maps.Keys(touched), compareNames) {
		if s := a.services[name]; s != nil {
			all := slices.DeleteFunc(slices.Clone(s.announced), func(w Announced) bool { return broken[w.Address] })
			changed = a.retell(name, all) || changed
			realized = append(realized, all...)
		}
	}
	if changed {
		a.tell()
	}
	a.lingered()
	a.speak()
	a.untold = false
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

// broken is the addresses that the kernel does not serve as it should.
func (a *Agent) broken() map[netip.Addr]bool {
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
	return broken
}

// tell tells the network everything that is announced.
func (a *Agent) tell() {
	var all []Announced
	for _, name := range slices.SortedFunc(maps.Keys(a.told), compareNames) {
		all = append(all, a.told[name]...)
	}
	addrs, routes := onTheWire(a.Node, all)
	a.Layer2.Set(addrs)
	a.claim(addrs)
	a.Speaker.Set(a.speakerConfig(routes))
	a.announced = len(all)
	a.unsaid = true
}

// speakerConfig is the sessions and routes of this node. A peer gets routes of the family of its own address, and of the
// other one only if it asks for both.
func (a *Agent) speakerConfig(routes []announcer.Route) bgp.Config {
	c := bgp.Config{
		NextHop4: a.node.Address(false), NextHop6: a.node.Address(true),
		Shutdown: a.network.Leaving, ShutdownTime: a.Config.GracefulShutdown,
	}
	c.RouterID = c.NextHop4
	peers := a.sessionPeers()
	for _, p := range peers {
		if p.RouterID.IsValid() {
			c.RouterID = p.RouterID
		}
		c.Peers = append(c.Peers, bgp.Peer{
			Name: p.Name, MyASN: p.MyASN, PeerASN: p.PeerASN, AnyASN: p.AnyASN, LocalASN: p.LocalASN,
			Address: p.Address, Interface: p.Interface, Source: p.Source, Port: p.Port, Device: p.VRF, TTLSecurityHops: p.TTLSecurityHops,
			HoldTime: p.HoldTime, KeepaliveTime: p.KeepaliveTime, ConnectTime: connectTime(p.Peer),
			Password: p.Password, EBGPMultiHop: p.EBGPMultiHop, GracefulRestart: p.GracefulRestart,
			BFD: p.path,
		})
	}
	for _, r := range routes {
		if r.Peers = peersOf(r, peers); len(r.Peers) > 0 {
			c.Routes = append(c.Routes, r)
		}
	}
	return c
}

// sessionPeers is the peers that this node keeps a session with.
func (a *Agent) sessionPeers() []watchedPeer {
	return slices.DeleteFunc(slices.Clone(a.peers), func(p watchedPeer) bool { return !p.SelectsNode(a.network.ThisNodeLabels) })
}

// peersOf is the names of those among peers that get a route.
func peersOf(r announcer.Route, peers []watchedPeer) (names []string) {
	for _, p := range peers {
		wanted := len(r.Peers) == 0 || slices.Contains(r.Peers, p.Name)
		if wanted && (p.DualStack || p.Address.Is6() == r.Prefix.Addr().Is6()) {
			names = append(names, p.Name)
		}
	}
	return names
}

// sayIt tells Reports what has changed.
func (a *Agent) sayIt() {
	n := a.snapshot.nodes[types.NamespacedName{Name: a.Node}]
	if a.Reports == nil || !a.unsaid || n == nil {
		return
	}
	a.unsaid = false
	peers := a.sessionPeers()
	a.Reports.Set(report(n, a.refused, a.told, func(w Announced) (names []string) {
		for _, r := range w.Routes {
			names = append(names, peersOf(r, peers)...)
		}
		return names
	}))
}

// connectTime is a peer's connect time, as short as the speaker can have it; 0 = the speaker's default.
func connectTime(p config.Peer) time.Duration {
	if p.ConnectTime == 0 {
		return 0
	}
	return max(p.ConnectTime, 2*time.Second)
}
