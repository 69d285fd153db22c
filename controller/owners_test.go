package controller

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/longshore-lb/longshore/announcer"
)

// gossip is what agents say of themselves, and which of them reach each other.
type gossip struct {
	mu      sync.Mutex
	said    map[string]announcer.Agent
	members map[string]*neighbours
}

// neighbours is gossip as one agent hears it.
type neighbours struct {
	*gossip
	name    string
	alive   []string
	changed chan struct{}
	joined  []netip.AddrPort
}

// newGossip is agents that all reach each other.
func newGossip(names ...string) *gossip {
	g := &gossip{said: map[string]announcer.Agent{}, members: map[string]*neighbours{}}
	for _, name := range names {
		g.members[name] = &neighbours{gossip: g, name: name, changed: make(chan struct{}, 1), alive: names}
	}
	return g
}

func (g *gossip) says(name string, a announcer.Agent) {
	g.mu.Lock()
	defer g.mu.Unlock()
	a.Version = g.said[name].Version + 1
	g.said[name] = a
	for _, m := range g.members {
		m.poke()
	}
}

// split makes agents reach those of their own group, such as "n1 n2", only.
func (g *gossip) split(groups ...string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, group := range groups {
		for name := range strings.FieldsSeq(group) {
			g.members[name].alive = strings.Fields(group)
			g.members[name].poke()
		}
	}
}

func (n *neighbours) poke() {
	select {
	case n.changed <- struct{}{}:
	default:
	}
}

func (n *neighbours) Join(all []netip.AddrPort) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.joined = all
}

func (n *neighbours) Agents() map[string]announcer.Agent {
	n.mu.Lock()
	defer n.mu.Unlock()
	agents := map[string]announcer.Agent{}
	for _, name := range n.alive {
		agents[name] = n.said[name]
	}
	return agents
}

func (n *neighbours) Tell(a announcer.Agent)   { n.says(n.name, a) }
func (n *neighbours) Changed() <-chan struct{} { return n.changed }

// crew is the agents of some nodes, with Service web at 192.0.2.1 and its endpoint.
type crew struct {
	t *testing.T
	*gossip
	machines map[string]*machine
	inboxes  map[string]*Inbox
	agents   map[string]running
	tie      *tie
	answers  map[string]string
	sequence []string // who answers, after each change of it
}

func newCrew(t *testing.T, names ...string) *crew {
	c := &crew{t: t, gossip: newGossip(names...), machines: map[string]*machine{}, inboxes: map[string]*Inbox{}, agents: map[string]running{}, answers: map[string]string{}}
	for _, name := range names {
		c.start(name)
	}
	return c
}

func (c *crew) start(name string) {
	m, inbox := newMachine(c.t, name), NewInbox()
	c.machines[name], c.inboxes[name] = m, inbox
	site(c.t, inbox)
	for i, other := range c.names() {
		inbox.Put(StandaloneNode(other, []netip.Addr{netip.AddrFrom4([4]byte{172, 31, 0, byte(11 + i)})}))
	}
	putAll(c.t, inbox, service("web", "192.0.2.1", 80, "")+"---"+endpoints("web", true))
	inbox.Synced()
	m.onSet = func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		now := fmt.Sprintf("%s:%d", name, len(m.answers))
		if c.answers[name] != now {
			c.sequence = append(c.sequence, now)
		}
		c.answers[name] = now
	}
	m.options = func(o *AgentOptions) {
		if c.tie != nil {
			o.TieBreak = c.tie
		}
	}
	c.agents[name] = m.start(inbox, c.members[name])
}

func (c *crew) names() []string {
	var names []string
	for name := range c.members {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

func (c *crew) stop() {
	for _, a := range c.agents {
		a.stop()
	}
}

// all gives every agent an object.
func (c *crew) all(o Object) {
	for _, inbox := range c.inboxes {
		inbox.Put(o)
	}
}

// owners fails unless these answer for some address, once the agents have nothing more to do.
func (c *crew) owners(when string, want ...string) {
	c.t.Helper()
	synctest.Wait()
	var got []string
	for _, name := range c.names() {
		if m := c.machines[name]; m != nil && len(m.answers) > 0 {
			got = append(got, name)
		}
	}
	if !slices.Equal(got, want) {
		c.t.Errorf("%s: %q answer, want %q", when, got, want)
	}
}

// happened is who began and who ceased to answer since the last call, in order.
func (c *crew) happened() string {
	synctest.Wait()
	c.mu.Lock()
	defer c.mu.Unlock()
	text := strings.Join(c.sequence, " ")
	c.sequence = nil
	return text
}

func (c *crew) expect(when, want string) {
	c.t.Helper()
	if got := c.happened(); got != want {
		c.t.Errorf("%s: %q, want %q", when, got, want)
	}
}

func (c *crew) node(name string, change func(*corev1.Node)) {
	n := StandaloneNode(name, []netip.Addr{netip.AddrFrom4([4]byte{172, 31, 0, 10 + name[1] - '0'})})
	change(n)
	c.all(n)
}

// register says that every node has an agent.
func (c *crew) register() {
	for _, name := range c.names() {
		c.all(&coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Namespace: "longshore-system", Name: agentLease(name)},
			Spec: coordinationv1.LeaseSpec{HolderIdentity: &name}})
	}
}

func (c *crew) status(name string) Status {
	c.t.Helper()
	s, err := c.agents[name].Status(c.t.Context())
	if err != nil {
		c.t.Fatal(err)
	}
	return s
}

// An address has one owner, which is alive, Ready and not excluded; one that is new takes nothing.
func TestAgentMembers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCrew(t, "n1", "n2", "n3")
		defer c.stop()
		c.owners("all alive", "n3")
		c.mu.Lock()
		if want, got := "[172.31.0.11:7946 172.31.0.12:7946 172.31.0.13:7946]", fmt.Sprint(c.members["n1"].joined); got != want {
			t.Errorf("joined %s, want %s", got, want)
		}
		c.mu.Unlock()
		c.split("n1 n2", "n3")
		c.owners("n3 is not heard, and nobody counts who is expected", "n1", "n3")
		c.split("n1 n2 n3")
		c.owners("n3 is back, and n1 took the address later", "n1")
		c.node("n1", func(n *corev1.Node) { n.Labels[corev1.LabelNodeExcludeBalancers] = "" })
		c.owners("n1 is excluded", "n3")
		if s := c.machines["n1"].speaker; !s.Shutdown || len(s.Routes) != 1 || len(c.machines["n2"].speaker.Routes) != 1 {
			t.Errorf("a node that was just excluded advertises %v, shutdown %t, another one %v", s.Routes, s.Shutdown, c.machines["n2"].speaker.Routes)
		}
		time.Sleep(5 * time.Second)
		synctest.Wait()
		if len(c.machines["n1"].speaker.Routes) != 0 || len(c.machines["n2"].speaker.Routes) != 1 {
			t.Errorf("an excluded node advertises %v, another one %v", c.machines["n1"].speaker.Routes, c.machines["n2"].speaker.Routes)
		}
		c.node("n1", func(*corev1.Node) {})
		c.owners("n1 is not any more", "n3")
		for _, name := range []string{"n2", "n3"} {
			c.node(name, func(n *corev1.Node) { n.Status.Conditions[0].Status = corev1.ConditionUnknown })
		}
		c.owners("the others are not Ready", "n1")
	})
}

// An agent that starts takes no address that nobody claims before it has heard of the others, or has waited.
func TestAgentSettles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := &crew{t: t, gossip: newGossip("n1", "n2"), machines: map[string]*machine{}, inboxes: map[string]*Inbox{}, agents: map[string]running{}, answers: map[string]string{}}
		c.split("n1", "n2")
		c.start("n1")
		defer c.stop()
		c.owners("alone")
		if got := c.status("n1").VIPs[0].Reason; len(c.machines["n1"].speaker.Routes) != 1 || got != "" {
			t.Errorf("advertises %v, reason %q", c.machines["n1"].speaker.Routes, got)
		}
		time.Sleep(settleAfter)
		c.owners("after the time for that", "n1")
	})
	synctest.Test(t, func(t *testing.T) {
		c := &crew{t: t, gossip: newGossip("n1", "n2"), machines: map[string]*machine{}, inboxes: map[string]*Inbox{}, agents: map[string]running{}, answers: map[string]string{}}
		c.says("n1", announcer.Agent{Able: true, Claims: map[netip.Addr]uint64{ip("192.0.2.1"): 7}}) // in an earlier life
		c.start("n1")
		defer c.stop()
		c.owners("what an earlier process claimed", "n1")
		if got := c.said["n1"].Claims[ip("192.0.2.1")]; got != 7 {
			t.Errorf("claimed again, with epoch %d", got)
		}
	})
}

// The one that gives an address away answers until the other one does, and no longer than handoverTime.
func TestAgentHandsOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCrew(t, "n1", "n2", "n3")
		defer c.stop()
		c.expect("start", "n3:1")
		c.agents["n3"].stop()
		c.expect("n3 ends", "n1:1 n3:0")
		c.split("n1 n2", "n3")
		c.expect("n3 is gone", "")
		c.node("n1", func(n *corev1.Node) { n.Spec.Unschedulable = true })
		c.expect("n1 is cordoned", "n2:1 n1:0")
		c.node("n1", func(*corev1.Node) {})
		c.expect("n1 is not any more", "")
		c.node("n2", func(n *corev1.Node) { n.Labels[corev1.LabelNodeExcludeBalancers] = "" })
		c.expect("n2 is excluded", "n1:1 n2:0")
	})
	synctest.Test(t, func(t *testing.T) {
		c := &crew{t: t, gossip: newGossip("n1", "n2"), machines: map[string]*machine{}, inboxes: map[string]*Inbox{}, agents: map[string]running{}, answers: map[string]string{}}
		deaf := announcer.Agent{Able: false}
		c.says("n2", deaf)
		c.start("n1")
		defer c.stop()
		c.expect("n2 does not answer", "n1:1")
		deaf = announcer.Agent{Able: true, Links: []announcer.Link{{Name: "eth0", IPv4: true}}}
		c.says("n2", deaf) // and never claims anything
		c.expect("n2 could", "")
		began := time.Now()
		c.agents["n1"].stop()
		c.expect("n1 ends", "n1:0")
		if took := time.Since(began); took != handoverTime {
			t.Errorf("n1 waited %v", took)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		c := &crew{t: t, gossip: newGossip("n1", "n2"), machines: map[string]*machine{}, inboxes: map[string]*Inbox{}, agents: map[string]running{}, answers: map[string]string{}}
		c.says("n2", announcer.Agent{Able: false})
		c.start("n1")
		defer c.stop()
		c.expect("start", "n1:1")
		c.says("n2", announcer.Agent{Able: true, Links: []announcer.Link{{Name: "eth0", IPv4: true}}})
		c.node("n1", func(n *corev1.Node) { n.Spec.Unschedulable = true })
		time.Sleep(handoverTime - time.Millisecond)
		c.expect("cordoned, before the time is up", "")
		time.Sleep(upkeepEvery + time.Millisecond)
		c.expect("after it", "n1:0")
	})
}

// The smaller part of the agents does not answer, whatever it was that cut it off.
func TestAgentFence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCrew(t, "n1", "n2", "n3")
		defer c.stop()
		c.register()
		c.owners("all alive", "n3")
		c.happened()
		c.split("n1 n2", "n3")
		c.owners("n3 is alone", "n1")
		if got := c.status("n3").VIPs[0]; got.Owner != "" || len(c.machines["n3"].speaker.Routes) != 1 {
			t.Errorf("owner %q, routes %v", got.Owner, c.machines["n3"].speaker.Routes)
		}
		want := []string{"no address is answered for by ARP or NDP: node n3 does not reach n1, n2, 2 of the 3 agents on nodes that are Ready: the others may answer for every address"}
		if diff := cmp.Diff(want, c.status("n3").Problems); diff != "" {
			t.Errorf("problems (-want +got):\n%s", diff)
		}
		all := scrape(t, c.agents["n3"].metrics)
		if got := all["longshore_fenced"] + all["longshore_members_alive"] + all["longshore_members_expected"]; got != "113" {
			t.Errorf("fenced, alive, expected: %s", got)
		}
		c.split("n1 n2 n3")
		c.owners("together again", "n1")
		c.split("n1", "n2", "n3")
		c.owners("each alone")
		for _, inbox := range c.inboxes {
			for _, name := range []string{"n2", "n3"} { // the name is all that a watch tells of what is deleted
				inbox.Remove(&coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Namespace: "longshore-system", Name: agentLease(name)}})
			}
		}
		c.owners("only n1 is said to have an agent", "n1")
		c.register()
		c.owners("all are again")
		c.split("n1", "n2 n3")
		c.owners("n1 alone", "n3")
		c.split("n1", "n2", "n3")
		for _, name := range []string{"n2", "n3"} {
			c.node(name, func(n *corev1.Node) { n.Status.Conditions[0].Status = corev1.ConditionUnknown })
		}
		c.owners("n1 alone is Ready", "n1")
	})
}

// tie is a Lease that says who has it, or why it cannot.
type tie struct {
	mu       sync.Mutex
	holder   string
	err      error
	released int
}

func (t *tie) Hold(_ context.Context, alive []string) (time.Time, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.err != nil || !slices.Contains(alive, t.holder) {
		return time.Time{}, t.err
	}
	return time.Now().Add(tieDuration), nil
}

func (t *tie) Release(context.Context) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.released++
	return nil
}

func (t *tie) is(holder string, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.holder, t.err = holder, err
}

// Of two halves the one that has the Lease answers, for as long as it has it.
func TestAgentTie(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := &crew{t: t, gossip: newGossip("n1", "n2"), machines: map[string]*machine{}, inboxes: map[string]*Inbox{}, agents: map[string]running{},
			answers: map[string]string{}, tie: &tie{holder: "n2"}}
		c.start("n1")
		c.start("n2")
		defer c.stop()
		c.register()
		c.owners("both", "n1")
		c.happened()
		c.split("n1", "n2")
		time.Sleep(tieInterval)
		c.owners("n2 has the Lease", "n2")
		c.expect("in which order", "n1:0 n2:1")
		time.Sleep(10 * tieDuration)
		c.owners("n2 renews it", "n2")
		c.tie.is("", errors.New("no route to host"))
		time.Sleep(tieDuration - tieInterval - time.Millisecond)
		c.owners("n2 cannot renew it, and it is not over", "n2")
		time.Sleep(tieInterval + time.Millisecond)
		c.owners("it is over")
		c.tie.is("n1", nil)
		time.Sleep(tieInterval)
		c.owners("n1 has it", "n1")
		c.split("n1 n2")
		c.owners("both again", "n1")
		if c.tie.released != 2 {
			t.Errorf("the Lease was released %d times, want 2", c.tie.released)
		}
	})
}

// Another machine's claim is reported on the Service when it begins, and stands in the status while it lasts.
func TestAgentContested(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, inbox := newMachine(t, "n1"), NewInbox()
		m.conflicts = make(chan announcer.Conflict)
		site(t, inbox)
		putAll(t, inbox, service("web", "192.0.2.1", 80, "")+"---"+endpoints("web", true))
		inbox.Synced()
		a := m.start(inbox, nil)
		defer a.stop()
		m.happened()
		claim := announcer.Conflict{Addr: ip("192.0.2.1"), Interface: "eth0", HardwareAddr: "02:00:00:00:00:66"}
		m.conflicts <- claim
		const text = "192.0.2.1: another machine, 02:00:00:00:00:66 on interface eth0 of node n1, says that it has this address"
		m.expect("a claim", "Warning event on default/web: AddressConflict: "+text)
		time.Sleep(10 * time.Second)
		m.conflicts <- claim
		m.expect("the same claim")
		problems := func() []string {
			s, err := a.Status(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			return s.Problems
		}
		if got := problems(); !slices.Equal(got, []string{text}) {
			t.Errorf("problems %q", got)
		}
		if got := scrape(t, a.metrics)["longshore_address_conflicts_total"]; got != "2" {
			t.Errorf("%s conflicts counted", got)
		}
		time.Sleep(conflictOver)
		if got := problems(); len(got) > 0 {
			t.Errorf("problems %q after it is over", got)
		}
		m.conflicts <- claim
		m.expect("it begins again", "Warning event on default/web: AddressConflict: "+text)
	})
}
