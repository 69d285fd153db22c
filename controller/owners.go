package controller

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/longshore-lb/longshore/announcer"
)

// handoverTime is how long an agent goes on answering for an address that it has to give away, for the other one to say that it
// answers. The other one needs a round of gossip to hear of it, and one to be heard.
const handoverTime = 2 * time.Second

// owners is what the agent knows of who answers for which address by ARP or NDP. It belongs to the agent's loop.
type owners struct {
	election    announcer.Election
	contestants map[netip.Addr]map[types.NamespacedName][]announcer.Candidate // of each Service on the address
	heard       map[string]announcer.Agent                                    // what the living agents say of themselves
	clock       uint64                                                        // the highest epoch of a claim heard of
	claims      map[netip.Addr]uint64                                         // what this agent answers for
	lingering   map[netip.Addr]time.Time                                      // addresses that are on their way to another agent, and until when to wait
	started     bool                                                          // the first pass is over: what this agent says counts
	leaving     bool                                                          // the agent is about to end
	registered  bool                                                          // the API server is told that this node has an agent
	fence       fence
}

func newOwners() owners {
	return owners{
		contestants: map[netip.Addr]map[types.NamespacedName][]announcer.Candidate{},
		heard:       map[string]announcer.Agent{},
		claims:      map[netip.Addr]uint64{},
		lingering:   map[netip.Addr]time.Time{},
	}
}

// aliveNames is the nodes whose agents are alive, sorted.
func (a *Agent) aliveNames() []string { return slices.Sorted(maps.Keys(a.heard)) }

// able tells whether this agent answers for the addresses that it is elected for.
func (a *Agent) able() bool { return !a.leaving && a.fence.reason == "" }

// hear takes in what the agents say of themselves now, and tells for which addresses other claims are made.
func (a *Agent) hear() (changed map[netip.Addr]struct{}) {
	changed = map[netip.Addr]struct{}{}
	if a.Members == nil {
		return changed
	}
	before := a.heard
	a.heard = a.Members.Agents()
	for name, now := range a.heard {
		was := before[name]
		if now.Version == was.Version {
			continue
		}
		for addr, epoch := range now.Claims {
			a.clock = max(a.clock, epoch)
			if had, ok := was.Claims[addr]; !ok || had != epoch {
				changed[addr] = struct{}{}
			}
		}
	}
	for name, was := range before {
		now := a.heard[name] // nothing, if it is dead
		if now.Version == was.Version {
			continue
		}
		for addr := range was.Claims {
			if _, ok := now.Claims[addr]; !ok {
				changed[addr] = struct{}{}
			}
		}
	}
	return changed
}

// settle ends the time in which the agent takes nothing that nobody claims: once all have been heard of that it may share
// addresses with, or after settleAfter.
func (a *Agent) settle(late bool) {
	if a.settled || a.Members == nil {
		a.settled = true
		return
	}
	for _, n := range a.snapshot.nodes {
		if n.Name != a.Node && nodeReady(n) && a.heard[n.Name].Version == 0 && !late {
			return
		}
	}
	a.settled = a.started || late
}

// register tells the API server, in the background, that this node has an agent that counts: from now on the others miss it when
// it is gone.
func (a *Agent) register(ctx context.Context) {
	if a.Registry == nil || !a.settled || a.registered {
		return
	}
	a.registered = true
	a.background.Go(func() {
		for ctx.Err() == nil {
			err := a.Registry.Register(ctx, a.Node)
			if err == nil {
				return
			}
			a.Log.Warn("the API server does not count this agent yet", "error", err)
			select {
			case <-ctx.Done():
			case <-time.After(retryAfter):
			}
		}
	})
}

// links is the links of the nodes that answer for addresses.
func (a *Agent) links() map[string][]announcer.Link {
	links := map[string][]announcer.Link{}
	for node, agent := range a.heard {
		if agent.Able {
			links[node] = agent.Links
		}
	}
	delete(links, a.Node)
	if a.able() {
		links[a.Node] = a.Layer2.Links()
	}
	return links
}

// contest says who may answer for the addresses of a Service, as it is now.
func (a *Agent) contest(name types.NamespacedName) {
	var now map[netip.Addr][]announcer.Candidate
	if s, svc := a.services[name], a.snapshot.services[name]; s != nil && svc != nil {
		now = Candidates(svc, s.reach, a.network)
		for _, addr := range s.contested {
			if _, ok := now[addr]; !ok {
				a.contestAddress(addr, name, nil)
			}
		}
		s.contested = slices.Collect(maps.Keys(now))
	}
	for addr, candidates := range now {
		a.contestAddress(addr, name, candidates)
	}
}

func (a *Agent) contestAddress(addr netip.Addr, name types.NamespacedName, candidates []announcer.Candidate) {
	of := a.contestants[addr]
	if reflect.DeepEqual(of[name], candidates) {
		return
	}
	if of == nil {
		of = map[types.NamespacedName][]announcer.Candidate{}
		a.contestants[addr] = of
	}
	if of[name] = candidates; len(candidates) == 0 {
		delete(of, name)
	}
	if len(of) == 0 {
		delete(a.contestants, addr)
	}
	a.reclaim(addr)
}

// reclaim tells the election who may have an address and who claims it.
func (a *Agent) reclaim(addr netip.Addr) {
	var c announcer.Contest
	for _, candidates := range a.contestants[addr] {
		c.Candidates = append(c.Candidates, candidates...)
	}
	for node, agent := range a.heard {
		if epoch, ok := agent.Claims[addr]; ok {
			c.Claims = append(c.Claims, announcer.Claim{Node: node, Epoch: epoch})
		}
	}
	a.election.Set(addr, c)
}

// elect gives every address of the Services touched an owner, and touches all Services of addresses that have another one now.
func (a *Agent) elect(touched map[types.NamespacedName]struct{}, claimed map[netip.Addr]struct{}) {
	for addr := range claimed {
		if a.contestants[addr] != nil {
			a.reclaim(addr)
		}
	}
	for name := range touched {
		a.contest(name)
	}
	for _, addr := range a.election.Resolve() {
		for name := range a.contestants[addr] {
			touched[name] = struct{}{}
		}
	}
	now := time.Now()
	for addr, until := range a.lingering {
		if !until.After(now) {
			for name := range a.contestants[addr] {
				touched[name] = struct{}{}
			}
		}
	}
}

// owner is the node that answers for an address. What nobody claims is nobody's while the agent does not know the others.
func (a *Agent) owner(addr netip.Addr) string {
	node, held := a.election.Owner(addr)
	if !a.settled && !held {
		return ""
	}
	return node
}

// silent is why this agent knows of no owners.
func (a *Agent) silent() string {
	switch {
	case a.leaving:
		return "the agent is about to end"
	case a.fence.reason != "":
		return a.fence.reason
	case !a.settled:
		return "the agent has just started, and waits for the others"
	}
	return ""
}

// linger goes on answering for an address that another agent has been elected for and does not answer for yet.
func (a *Agent) linger(was Announced, wanted *Announced) {
	node, held := a.election.Owner(was.Address)
	if was.Owner != a.Node || wanted.Owner == a.Node || wanted.Owner == "" || node == "" || held || a.fence.reason != "" {
		return
	}
	until, again := a.lingering[was.Address]
	if !again {
		until = time.Now().Add(handoverTime)
		a.lingering[was.Address] = until
	}
	if time.Now().Before(until) {
		wanted.Owner, wanted.Interfaces, wanted.Yielding = a.Node, was.Interfaces, true
	}
}

// lingered forgets the addresses that have been given away, or have stayed.
func (a *Agent) lingered() {
	for addr := range a.lingering {
		node, held := a.election.Owner(addr)
		if _, claimed := a.claims[addr]; !claimed || held || node == "" || node == a.Node && a.able() {
			delete(a.lingering, addr)
		}
	}
}

// claim tells the other agents for which addresses this one answers now.
func (a *Agent) claim(addrs []announcer.Address) {
	claims := map[netip.Addr]uint64{}
	for _, address := range addrs {
		epoch, ok := a.claims[address.Addr]
		if !ok {
			epoch, ok = a.heard[a.Node].Claims[address.Addr] // of an earlier process
		}
		if !ok {
			epoch = a.clock + 1
		}
		claims[address.Addr] = epoch
	}
	for addr := range claims {
		if _, had := a.claims[addr]; !had {
			a.metrics.taken.Inc()
		}
	}
	for addr := range a.claims {
		if _, has := claims[addr]; !has {
			a.metrics.given.Inc()
		}
	}
	a.claims = claims
	a.speak()
}

// speak tells the other agents of this one, if it is not what they heard last. Links that no address can be announced on are left
// out: there is one for each pod.
func (a *Agent) speak() {
	if a.Members == nil || !a.started {
		return
	}
	own := announcer.Agent{Able: a.able(), Claims: a.claims}
	for _, l := range a.Layer2.Links() {
		named := func(adv string) bool { return adv == l.Name }
		wanted := l.IPv4 || l.IPv6
		for _, adv := range a.network.Layer2 {
			wanted = wanted || slices.ContainsFunc(adv.Interfaces, named)
		}
		if wanted {
			own.Links = append(own.Links, l)
		}
	}
	last := a.heard[a.Node]
	if last.Version == 0 || own.Able != last.Able || !slices.Equal(own.Links, last.Links) || !maps.Equal(own.Claims, last.Claims) {
		a.Members.Tell(own)
	}
}

// handOver gives the addresses of this agent to the others, which announce them before this one falls silent, and waits for
// that. What the kernel does for open connections goes on.
func (a *Agent) handOver() {
	if a.Members == nil || !a.adopted {
		return
	}
	ctx := context.Background()
	if a.registered {
		if err := a.Registry.Unregister(ctx, a.Node); err != nil {
			a.Log.Warn("the API server still counts this agent", "error", err)
		}
	}
	a.leaving = true
	end := time.After(handoverTime)
	for again := true; again; {
		if err := a.pass(ctx, nil, false, true, false); err != nil {
			a.Log.Error("hand addresses over", "error", err)
			break
		}
		if len(a.lingering) == 0 {
			break
		}
		select {
		case <-a.Members.Changed():
		case <-end:
			a.Log.Warn("addresses that no other agent has taken over in time", "addresses", len(a.lingering))
			again = false
		}
	}
	a.Layer2.Set(nil)
}

// contested reports that another machine claims an address that this node answers for, once for as long as that goes on.
func (a *Agent) contested(c announcer.Conflict) {
	a.metrics.conflicts.Inc()
	last, again := a.conflicts[c.Addr]
	a.conflicts[c.Addr] = reported{c, time.Now()}
	if again && last.HardwareAddr == c.HardwareAddr && time.Since(last.at) < conflictOver {
		return
	}
	for name := range a.contestants[c.Addr] {
		if svc := a.snapshot.services[name]; svc != nil {
			a.Events.Event(svc, corev1.EventTypeWarning, "AddressConflict", conflictText(c, a.Node))
		}
	}
}

// conflictOver is after how long without another claim a conflict is over. While it lasts, one is reported each 10 seconds.
const conflictOver = time.Minute

// reported is a conflict and when it was last heard of.
type reported struct {
	announcer.Conflict
	at time.Time
}

func conflictText(c announcer.Conflict, node string) string {
	return fmt.Sprintf("%s: another machine, %s on interface %s of node %s, says that it has this address", c.Addr, c.HardwareAddr, c.Interface, node)
}

// conflictTexts is the conflicts that go on, in order.
func (a *Agent) conflictTexts() []string {
	var texts []string
	for addr, c := range a.conflicts {
		if time.Since(c.at) >= conflictOver {
			delete(a.conflicts, addr)
			continue
		}
		texts = append(texts, conflictText(c.Conflict, a.Node))
	}
	slices.Sort(texts)
	return texts
}
