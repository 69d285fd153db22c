package controller

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/longshore-lb/longshore/announcer"
	"github.com/longshore-lb/longshore/announcer/bgp"
	"github.com/longshore-lb/longshore/config"
	"github.com/longshore-lb/longshore/ipvs"
)

// machine is a node of which everything but the agent is simulated: a kernel that does operations on a state, and a
// network that remembers what it was last told. What happens is written to one journal.
type machine struct {
	t    *testing.T
	name string

	mu          sync.Mutex
	state       ipvs.State
	refuse      func(ipvs.Operation) error // why the kernel does not do an operation; nil = it does everything
	blind       error                      // why the kernel cannot be observed
	observed    int                        // how often it was
	connections map[ipvs.Frontend]map[netip.AddrPort]int
	taken       map[uint16]bool        // ports of other processes
	answers     []announcer.Address    // what was last told to layer 2
	speaker     bgp.Config             // and to BGP
	password    func() (string, error) // of every BGP peer; nil = there are no Secrets
	options     func(*AgentOptions)    // what else an agent is started with; nil = nothing
	journal     []string
	conflicts   chan announcer.Conflict // claims of other machines
	onSet       func()                  // called when layer 2 was told something else; nil = nothing is
}

func newMachine(t *testing.T, name string) *machine { return &machine{t: t, name: name} }

func (m *machine) Prepare() error { return nil }

func (m *machine) Intact() bool { return true }

func (m *machine) Connections([]ipvs.Frontend) (map[ipvs.Frontend]map[netip.AddrPort]int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.connections, nil
}

func (m *machine) PortInUse(_ ipvs.Protocol, port uint16) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.taken[port]
}

func (m *machine) Observe() (ipvs.State, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.observed++
	if m.blind != nil {
		return ipvs.State{}, m.blind
	}
	return m.copied(), nil
}

// Apply does operations as the kernel would. No address may be announced that nobody serves, at any time.
func (m *machine) Apply(ops []ipvs.Operation) []ipvs.Failure {
	m.mu.Lock()
	defer m.mu.Unlock()
	var failures []ipvs.Failure
	for _, o := range ops {
		var err error
		if refuse := m.refuse; refuse != nil {
			m.mu.Unlock() // a kernel that takes its time keeps nobody else
			err = refuse(o)
			m.mu.Lock()
		}
		if err != nil {
			m.journal = append(m.journal, "refused: "+o.String())
		} else {
			m.journal = append(m.journal, o.String())
			err = m.do(o)
		}
		if err != nil {
			failures = append(failures, ipvs.Failure{Operation: o, Err: fmt.Errorf("%s: %w", o, err)})
		}
		m.check("after " + o.String())
	}
	return failures
}

func (m *machine) do(o ipvs.Operation) error {
	switch f := o.VirtualServer.Frontend; o.Kind {
	case ipvs.KindElement:
		for e := range m.state.Elements {
			if o.Verb == ipvs.Add && excludes(e, o.Element) {
				return fmt.Errorf("overlaps %s", e)
			}
		}
		return put(&m.state.Elements, o.Verb, o.Element, struct{}{})
	case ipvs.KindRoute:
		return put(&m.state.Routes, o.Verb, o.Route, o.Source)
	case ipvs.KindVirtualServer:
		if err := put(&m.state.VirtualServers, o.Verb, f, o.VirtualServer); err != nil {
			return err
		}
		if o.Verb != ipvs.Update {
			delete(m.state.RealServers, f)
		}
		return nil
	default:
		if _, ok := m.state.VirtualServers[f]; !ok {
			return fmt.Errorf("no virtual server %s", f)
		}
		of := m.state.RealServers[f]
		err := put(&of, o.Verb, o.RealServer.Addr, o.RealServer)
		if m.state.RealServers == nil {
			m.state.RealServers = map[ipvs.Frontend]map[netip.AddrPort]ipvs.RealServer{}
		}
		m.state.RealServers[f] = of
		return err
	}
}

// excludes tells whether nftables refuses an element while there is another one: ranges may not overlap, a map has one
// value for a key.
func excludes(e, f ipvs.Element) bool {
	if e.Set != f.Set || e.Frontend != f.Frontend || e == f {
		return false
	}
	switch e.Set {
	case ipvs.ServiceCIDRs, ipvs.Pods, ipvs.Kept, ipvs.Allowed:
		return e.Prefix.Overlaps(f.Prefix)
	}
	return e.Set == ipvs.Shortcuts
}

func put[K, V comparable](m *map[K]V, verb ipvs.Verb, k K, v V) error {
	if _, ok := (*m)[k]; ok == (verb == ipvs.Add) {
		return fmt.Errorf("there: %t", ok)
	}
	if verb == ipvs.Delete {
		delete(*m, k)
		return nil
	}
	if *m == nil {
		*m = map[K]V{}
	}
	(*m)[k] = v
	return nil
}

// copied is the state as a value of its own, virtual servers with their real servers.
func (m *machine) copied() ipvs.State {
	s := ipvs.State{Routes: maps.Clone(m.state.Routes), Elements: maps.Clone(m.state.Elements)}
	for f, v := range m.state.VirtualServers {
		s.AddVirtualServer(v, slices.Collect(maps.Values(m.state.RealServers[f]))...)
	}
	return s
}

// check fails if an address is announced that has no route, no virtual server or no real server.
func (m *machine) check(when string) {
	served := map[netip.Addr]bool{}
	for f, reals := range m.state.RealServers {
		_, routed := m.state.Routes[netip.PrefixFrom(f.Addr.Addr(), f.Addr.Addr().BitLen())]
		served[f.Addr.Addr()] = served[f.Addr.Addr()] || routed && len(reals) > 0
	}
	for _, a := range m.answers {
		if !served[a.Addr] {
			m.t.Errorf("%s: answers for %s, which nobody serves; so far:\n%s", when, a.Addr, strings.Join(m.journal, "\n"))
		}
	}
	for _, r := range m.speaker.Routes {
		if r.Prefix.IsSingleIP() && !served[r.Prefix.Addr()] {
			m.t.Errorf("%s: advertises %s, which nobody serves; so far:\n%s", when, r.Prefix, strings.Join(m.journal, "\n"))
		}
	}
}

// toLayer2 and toBGP are what the agent tells, written down when it changes.
type (
	toLayer2 struct{ *machine }
	toBGP    struct{ *machine }
)

func (m toLayer2) Answering(addr netip.Addr) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.ContainsFunc(m.answers, func(a announcer.Address) bool { return a.Addr == addr })
}

func (m toLayer2) Links() []announcer.Link {
	return []announcer.Link{{Name: "eth0", IPv4: true, IPv6: true}}
}

func (m toLayer2) Changed() <-chan struct{}             { return nil }
func (m toLayer2) Conflicts() <-chan announcer.Conflict { return m.conflicts }
func (m toLayer2) Announcements() map[announcer.Gratuitous]uint64 {
	return map[announcer.Gratuitous]uint64{{Protocol: "arp", Reason: announcer.Takeover}: 5}
}

func (m toLayer2) Answers() map[string]uint64 { return map[string]uint64{"ndp": 7} }

func (m toLayer2) Set(all []announcer.Address) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if fmt.Sprint(all) != fmt.Sprint(m.answers) {
		var words []string
		for _, a := range all {
			words = append(words, strings.Join(append([]string{a.Addr.String()}, a.Interfaces...), " on "))
		}
		m.journal = append(m.journal, "answer for: "+strings.Join(words, ", "))
		if m.onSet != nil {
			defer m.onSet()
		}
	}
	m.answers = all
	m.check("told to answer")
}

func (m toBGP) Set(c bgp.Config) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if fmt.Sprint(c.Routes) != fmt.Sprint(m.speaker.Routes) {
		var words []string
		for _, r := range c.Routes {
			words = append(words, r.Prefix.String()+" to "+strings.Join(r.Peers, " and "))
		}
		m.journal = append(m.journal, "advertise: "+strings.Join(words, ", "))
	}
	m.speaker = c
	m.check("told to advertise")
}

func (m toBGP) Sessions() []bgp.Session {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []bgp.Session
	for _, p := range m.speaker.Peers {
		out = append(out, bgp.Session{Peer: p.Name, Address: p.Address, State: "established", Since: time.Now(), Advertised: 1})
	}
	return out
}

// events go to the journal too.
type events struct{ *machine }

func (m events) Event(o runtime.Object, eventtype, reason, message string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.journal = append(m.journal, fmt.Sprintf("%s event on %s: %s: %s", eventtype, nameOf(o.(Object)), reason, message))
}

// happened returns the journal since the last call, once the agent has nothing more to do.
func (m *machine) happened() []string {
	synctest.Wait()
	m.mu.Lock()
	defer m.mu.Unlock()
	j := m.journal
	m.journal = nil
	return j
}

func (m *machine) expect(what string, want ...string) {
	m.t.Helper()
	if diff := cmp.Diff(want, m.happened()); diff != "" {
		m.t.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

func (m *machine) set(change func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	change()
}

// running is an agent at work.
type running struct {
	*Agent
	stop func()
}

// start runs an agent on the machine. It must be stopped within the bubble.
func (m *machine) start(inbox *Inbox, members Members) running {
	ctx, cancel := context.WithCancel(context.Background())
	o := AgentOptions{
		Node: m.name, Config: config.DefaultAgent(), Inbox: inbox, DataPlane: m, Layer2: toLayer2{m}, Speaker: toBGP{m},
		Members: members, Events: events{m}, Log: slog.New(slog.DiscardHandler),
	}
	if m.password != nil {
		o.Password = func(context.Context, string) (string, error) { return m.password() }
	}
	if m.options != nil {
		m.options(&o)
	}
	a := NewAgent(o)
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	return running{a, sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			m.t.Errorf("the agent ended: %v", err)
		}
	})}
}

// objects reads manifests.
func objects(t *testing.T, text string) []Object {
	t.Helper()
	var out []Object
	for _, d := range documents(t, []byte(text)) {
		o, err := decodeAny(d)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, o)
	}
	return out
}

func putAll(t *testing.T, inbox *Inbox, text string) {
	t.Helper()
	for _, o := range objects(t, text) {
		inbox.Put(o)
	}
}

// site is node n1, a pool, and how its addresses are announced.
func site(t *testing.T, inbox *Inbox) {
	inbox.Put(StandaloneNode("n1", addrs("172.31.0.11", "fd31::11")))
	putAll(t, inbox, `
apiVersion: metallb.io/v1beta1
kind: IPAddressPool
metadata: {name: red}
spec: {addresses: [192.0.2.0/28]}
---
apiVersion: metallb.io/v1beta1
kind: L2Advertisement
metadata: {name: lan}
---
apiVersion: metallb.io/v1beta1
kind: BGPAdvertisement
metadata: {name: tor}
---
apiVersion: metallb.io/v1beta2
kind: BGPPeer
metadata: {name: tor}
spec: {myASN: 64512, peerASN: 64513, peerAddress: 172.31.0.1}
`)
}

// service is a LoadBalancer Service with an address and an endpoint.
func service(name, vip string, port int, annotations string) string {
	return fmt.Sprintf(`
apiVersion: v1
kind: Service
metadata: {name: %s, annotations: {%s}}
spec: {type: LoadBalancer, ports: [{port: %d}]}
status: {loadBalancer: {ingress: [{ip: %s}]}}
`, name, annotations, port, vip)
}

func endpoints(name string, ready bool) string {
	return fmt.Sprintf(`
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: %s-1, labels: {kubernetes.io/service-name: %s}}
addressType: IPv4
ports: [{port: 8080}]
endpoints: [{addresses: [10.244.1.2], conditions: {ready: %t}}]
`, name, name, ready)
}

// TestAgentOrder follows one Service from its first sight to its end.
func TestAgentOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, inbox := newMachine(t, "n1"), NewInbox()
		a := m.start(inbox, nil)
		defer a.stop()
		site(t, inbox)
		putAll(t, inbox, service("web", "192.0.2.1", 80, ""))
		time.Sleep(time.Minute)
		m.expect("before the inbox is synced")
		if a.Ready() {
			t.Error("ready before the inbox is synced")
		}

		inbox.Synced()
		m.expect("a Service without endpoints",
			"add element ip longshore frontends { 192.0.2.1 . tcp . 80 }",
			"add element ip longshore masqueraded { 192.0.2.1 . tcp . 80 }",
			"add element ip longshore vips { 192.0.2.1 }",
			"-A -t 192.0.2.1:80 -s rr",
			"ip route add local 192.0.2.1/32 dev lo src 172.31.0.11 table local",
		)
		if !a.Ready() {
			t.Error("not ready")
		}

		putAll(t, inbox, endpoints("web", true))
		m.expect("the first endpoint",
			"-a -t 192.0.2.1:80 -r 10.244.1.2:8080 -m -w 1",
			"answer for: 192.0.2.1",
			"advertise: 192.0.2.1/32 to tor",
			`Normal event on default/web: nodeAssigned: announcing 192.0.2.1 from node "n1" with protocol "layer2"`,
		)
		putAll(t, inbox, service("web", "192.0.2.1", 80, "unrelated: change"))
		m.expect("a change of no importance")
		putAll(t, inbox, service("web", "192.0.2.1", 80, "longshore.dev/scheduler: mh"))
		m.expect("another scheduler", "-E -t 192.0.2.1:80 -s mh")

		putAll(t, inbox, service("web", "192.0.2.2", 80, "longshore.dev/scheduler: mh"))
		m.expect("another address",
			"answer for: ",
			"advertise: ",
			"add element ip longshore frontends { 192.0.2.2 . tcp . 80 }",
			"add element ip longshore masqueraded { 192.0.2.2 . tcp . 80 }",
			"add element ip longshore vips { 192.0.2.2 }",
			"-A -t 192.0.2.2:80 -s mh",
			"-a -t 192.0.2.2:80 -r 10.244.1.2:8080 -m -w 1",
			"ip route add local 192.0.2.2/32 dev lo src 172.31.0.11 table local",
			"ip route del local 192.0.2.1/32 dev lo table local",
			"-D -t 192.0.2.1:80",
			"delete element ip longshore vips { 192.0.2.1 }",
			"delete element ip longshore masqueraded { 192.0.2.1 . tcp . 80 }",
			"delete element ip longshore frontends { 192.0.2.1 . tcp . 80 }",
			"answer for: 192.0.2.2",
			"advertise: 192.0.2.2/32 to tor",
			`Normal event on default/web: nodeAssigned: announcing 192.0.2.2 from node "n1" with protocol "layer2"`,
		)

		putAll(t, inbox, endpoints("web", false))
		m.expect("no endpoint is ready",
			"answer for: ",
			"advertise: ",
			"-e -t 192.0.2.2:80 -r 10.244.1.2:8080 -m -w 0",
		)
		time.Sleep(upkeepEvery)
		m.expect("no connection is open", "-d -t 192.0.2.2:80 -r 10.244.1.2:8080")
		putAll(t, inbox, endpoints("web", true))
		m.happened()

		inbox.Remove(objects(t, service("web", "192.0.2.2", 80, ""))[0])
		m.expect("the Service is deleted",
			"answer for: ",
			"advertise: ",
			"ip route del local 192.0.2.2/32 dev lo table local",
			"-D -t 192.0.2.2:80",
			"delete element ip longshore vips { 192.0.2.2 }",
			"delete element ip longshore masqueraded { 192.0.2.2 . tcp . 80 }",
			"delete element ip longshore frontends { 192.0.2.2 . tcp . 80 }",
		)
		if diff := cmp.Diff(ipvs.State{}, m.copied(), cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("something is left:\n%s", diff)
		}
		if m.observed != 1 {
			t.Errorf("the kernel was read %d times; nothing failed, so once is enough", m.observed)
		}
	})
}

// An operation that fails keeps the address it is about off the network, and no other, until it succeeds.
func TestAgentFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, inbox := newMachine(t, "n1"), NewInbox()
		refusing := func(part string) func(ipvs.Operation) error {
			return func(o ipvs.Operation) error {
				if strings.Contains(o.String(), part) {
					return errors.New("no space left on device")
				}
				return nil
			}
		}
		m.refuse = refusing("192.0.2.1:80 -r")
		a := m.start(inbox, nil)
		defer a.stop()
		site(t, inbox)
		for i, name := range []string{"web", "api"} {
			putAll(t, inbox, service(name, fmt.Sprintf("192.0.2.%d", i+1), 80, "")+"---"+endpoints(name, true))
		}
		time.Sleep(settleAfter + time.Second) // what follows is due to the failures alone
		inbox.Synced()
		synctest.Wait()
		if got := fmt.Sprint(m.answers, m.speaker.Routes); got != "[{192.0.2.2 [] false}] [{192.0.2.2/32 [tor] 0 0 0 []}]" || a.Ready() {
			t.Errorf("announced %s, ready %t", got, a.Ready())
		}
		status, err := a.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if want := []string{"-a -t 192.0.2.1:80 -r 10.244.1.2:8080 -m -w 1: no space left on device"}; !slices.Equal(status.Problems, want) {
			t.Errorf("problems %q, want %q", status.Problems, want)
		}
		if v := status.VIPs[0]; v.Reason != "the kernel refused it" || v.Owner != "" || v.Prefixes != nil {
			t.Errorf("status of the VIP: %+v", v)
		}
		m.happened()

		time.Sleep(retryAfter)
		m.expect("second try", "refused: -a -t 192.0.2.1:80 -r 10.244.1.2:8080 -m -w 1")
		m.set(func() { m.refuse = nil })
		time.Sleep(retryAfter)
		m.expect("third try",
			"-a -t 192.0.2.1:80 -r 10.244.1.2:8080 -m -w 1",
			"answer for: 192.0.2.1, 192.0.2.2",
			"advertise: 192.0.2.1/32 to tor, 192.0.2.2/32 to tor",
			`Normal event on default/web: nodeAssigned: announcing 192.0.2.1 from node "n1" with protocol "layer2"`,
		)
		if m.observed != 3 || !a.Ready() {
			t.Errorf("kernel read %d times, want one for each try; ready %t", m.observed, a.Ready())
		}
		time.Sleep(time.Minute)
		m.expect("all is well")

		// An address that is announced already goes, too.
		m.set(func() { m.refuse = refusing("-E ") })
		putAll(t, inbox, service("web", "192.0.2.1", 80, "longshore.dev/scheduler: mh"))
		m.expect("an update fails",
			"refused: -E -t 192.0.2.1:80 -s mh",
			"answer for: 192.0.2.2",
			"advertise: 192.0.2.2/32 to tor",
		)
		m.set(func() { m.refuse = nil })
		inbox.Put(objects(t, endpoints("web", true))[0]) // whatever wakes it up: it looks again
		m.expect("and succeeds",
			"-E -t 192.0.2.1:80 -s mh",
			"answer for: 192.0.2.1, 192.0.2.2",
			"advertise: 192.0.2.1/32 to tor, 192.0.2.2/32 to tor",
		)

		// What cannot be deleted does not matter to the others, and is tried again.
		m.set(func() { m.refuse = refusing("-D ") })
		inbox.Remove(objects(t, service("web", "192.0.2.1", 80, ""))[0])
		m.happened()
		if got := fmt.Sprint(m.answers); got != "[{192.0.2.2 [] false}]" || a.Ready() {
			t.Errorf("answers for %s, ready %t", got, a.Ready())
		}
	})
}

// While the kernel cannot be read nothing is done to it and nothing is announced.
func TestAgentBlind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, inbox := newMachine(t, "n1"), NewInbox()
		m.blind = errors.New("operation not permitted")
		a := m.start(inbox, nil)
		defer a.stop()
		site(t, inbox)
		putAll(t, inbox, service("web", "192.0.2.1", 80, "")+"---"+endpoints("web", true))
		inbox.Synced()
		time.Sleep(retryAfter + time.Second)
		m.expect("blind")
		putAll(t, inbox, service("api", "192.0.2.2", 80, "")+"---"+endpoints("api", true))
		m.expect("still blind")
		m.set(func() { m.blind = nil })
		time.Sleep(retryAfter)
		m.happened()
		if got := fmt.Sprint(m.answers); got != "[{192.0.2.1 [] false} {192.0.2.2 [] false}]" || !a.Ready() {
			t.Errorf("answers for %s, ready %t", got, a.Ready())
		}
	})
}

// An agent that ends leaves everything as it is, and the next one finds nothing to do but to announce all of it at once.
func TestAgentRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMachine(t, "n1")
		for _, life := range []string{"first", "second"} {
			inbox := NewInbox()
			site(t, inbox)
			for i, name := range []string{"web", "api"} {
				putAll(t, inbox, service(name, fmt.Sprintf("192.0.2.%d", i+1), 80, "")+"---"+endpoints(name, true))
			}
			inbox.Synced()
			m.set(func() { m.answers, m.speaker = nil, bgp.Config{} })
			a := m.start(inbox, nil)
			time.Sleep(time.Minute)
			synctest.Wait()
			a.stop()
			if life == "first" {
				m.happened()
			}
		}
		m.expect("second life",
			"answer for: 192.0.2.1, 192.0.2.2",
			"advertise: 192.0.2.1/32 to tor, 192.0.2.2/32 to tor",
			`Normal event on default/api: nodeAssigned: announcing 192.0.2.2 from node "n1" with protocol "layer2"`,
			`Normal event on default/web: nodeAssigned: announcing 192.0.2.1 from node "n1" with protocol "layer2"`,
		)
	})
}

// A frontend that goes from one Service to another in one pass keeps its virtual server and its route.
func TestAgentHandOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, inbox := newMachine(t, "n1"), NewInbox()
		a := m.start(inbox, nil)
		defer a.stop()
		site(t, inbox)
		putAll(t, inbox, service("web", "192.0.2.1", 80, "")+"---"+endpoints("web", true))
		inbox.Synced()
		m.happened()
		inbox.mu.Lock() // both changes arrive before the agent looks
		for _, o := range objects(t, service("web", "192.0.2.1", 80, "")) {
			key, c := newChange(o, true)
			inbox.pending[key] = c
		}
		for _, o := range objects(t, service("new", "192.0.2.1", 80, "longshore.dev/scheduler: mh")+"---"+endpoints("new", true)) {
			key, c := newChange(o, false)
			inbox.pending[key] = c
		}
		inbox.signal()
		inbox.mu.Unlock()
		m.expect("renamed",
			"answer for: ",
			"advertise: ",
			"-E -t 192.0.2.1:80 -s mh",
			"answer for: 192.0.2.1",
			"advertise: 192.0.2.1/32 to tor",
			`Normal event on default/new: nodeAssigned: announcing 192.0.2.1 from node "n1" with protocol "layer2"`,
		)
	})
}

// TestAgentForeign holds that somebody else's virtual server in the way leaves the node ready and the address unannounced,
// and that a pass about something else forgets neither.
func TestAgentForeign(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, inbox := newMachine(t, "n1"), NewInbox()
		m.refuse = func(o ipvs.Operation) error {
			if o.VirtualServer.Frontend.Addr.Addr() == netip.MustParseAddr("192.0.2.1") && o.Verb != ipvs.Delete {
				return ipvs.ErrForeign
			}
			return nil
		}
		a := m.start(inbox, nil)
		defer a.stop()
		site(t, inbox)
		putAll(t, inbox, service("web", "192.0.2.1", 80, "")+"---"+endpoints("web", true))
		inbox.Synced()
		synctest.Wait()
		putAll(t, inbox, service("api", "192.0.2.2", 80, "")+"---"+endpoints("api", true))
		synctest.Wait()
		status, err := a.Status(t.Context())
		if err != nil || !status.Ready || len(status.Problems) != 3 || !strings.Contains(status.Problems[0], ipvs.ErrForeign.Error()) {
			t.Errorf("status %+v (%v), want a node that is ready and names the Service, and the virtual and the real server refused", status, err)
		}
		if got := fmt.Sprint(m.answers); got != "[{192.0.2.2 [] false}]" {
			t.Errorf("answering for %s, want 192.0.2.2 alone", got)
		}
		m.set(func() { m.refuse = nil })
		time.Sleep(retryForeignAfter + time.Second)
		synctest.Wait()
		if got := fmt.Sprint(m.answers); got != "[{192.0.2.1 [] false} {192.0.2.2 [] false}]" {
			t.Errorf("answering for %s when the other one has gone, want both", got)
		}
	})
}

// TestAgentPassword holds that a password which comes after the peer that needs it is found.
func TestAgentPassword(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, inbox := newMachine(t, "n1"), NewInbox()
		var there atomic.Bool
		m.password = func() (string, error) {
			if !there.Load() {
				return "", errors.New(`secrets "tor" not found`)
			}
			return "secret", nil
		}
		a := m.start(inbox, nil)
		defer a.stop()
		inbox.Put(StandaloneNode("n1", addrs("172.31.0.11")))
		putAll(t, inbox, `
apiVersion: metallb.io/v1beta2
kind: BGPPeer
metadata: {name: tor}
spec: {myASN: 64512, peerASN: 64513, peerAddress: 172.31.0.1, passwordSecret: {name: tor}}
`)
		inbox.Synced()
		synctest.Wait()
		status, err := a.Status(t.Context())
		if want := []string{`BGPPeer default/tor: spec.passwordSecret: secrets "tor" not found`}; err != nil || !slices.Equal(status.Problems, want) {
			t.Errorf("problems %q (%v), want %q", status.Problems, err, want)
		}
		there.Store(true)
		time.Sleep(retryAfter + time.Second)
		synctest.Wait()
		if peers := m.speaker.Peers; len(peers) != 1 || peers[0].Password != "secret" {
			t.Errorf("peers %+v, want one with the password", peers)
		}
	})
}

// Of two Services on one frontend the first has it; the other one is told so, once, until the first one goes.
func TestAgentConflict(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, inbox := newMachine(t, "n1"), NewInbox()
		a := m.start(inbox, nil)
		defer a.stop()
		inbox.Put(StandaloneNode("n1", addrs("172.31.0.11")))
		putAll(t, inbox, service("one", "192.0.2.1", 80, "")+"---"+endpoints("one", true))
		inbox.Synced()
		m.happened()
		putAll(t, inbox, service("two", "192.0.2.1", 80, "longshore.dev/scheduler: mh")+"---"+endpoints("two", true))
		m.expect("the second one comes", "Warning event on default/two: FrontendConflict: 192.0.2.1:80/TCP is served by Service default/one already")
		putAll(t, inbox, service("two", "192.0.2.1", 80, "longshore.dev/scheduler: lc"))
		m.expect("it changes")
		problems := func() []string {
			s, err := a.Status(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			return s.Problems
		}
		if got, want := problems(), []string{"Service default/two: 192.0.2.1:80/TCP is served by Service default/one already"}; !slices.Equal(got, want) {
			t.Errorf("problems %q, want %q", got, want)
		}
		inbox.Remove(objects(t, service("one", "192.0.2.1", 80, ""))[0])
		m.expect("the first one goes", "-E -t 192.0.2.1:80 -s lc")
		if got := problems(); len(got) > 0 {
			t.Errorf("problems %q remain", got)
		}
	})
}

// What is wrong with an object is said once, on the object, and nothing else suffers.
func TestAgentProblems(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, inbox := newMachine(t, "n1"), NewInbox()
		a := m.start(inbox, nil)
		defer a.stop()
		site(t, inbox)
		putAll(t, inbox, service("web", "192.0.2.1", 80, "longshore.dev/scheduler: lc")+"---"+endpoints("web", true))
		inbox.Synced()
		m.happened()
		putAll(t, inbox, service("web", "192.0.2.1", 80, "longshore.dev/scheduler: best"))
		m.expect("unknown scheduler", `Warning event on default/web: UnknownScheduler: annotation longshore.dev/scheduler: "best" is not an IPVS scheduler: `+
			`choose one of rr wrr lc wlc sh dh mh sed nq lblc lblcr fo ovf; lc stays in use`)
		peer := objects(t, "apiVersion: metallb.io/v1beta2\nkind: BGPPeer\nmetadata: {name: secret}\n"+
			"spec: {myASN: 64512, peerASN: 64513, peerAddress: 172.31.0.2, passwordSecret: {name: s}}")[0]
		const refused = `BGPPeer default/secret: spec.passwordSecret: "s": there are no Secrets without a cluster, write spec.password`
		for range 2 {
			inbox.Put(peer)
			synctest.Wait()
		}
		m.expect("a peer that is not possible", "Warning event on default/secret: ConfigurationRefused: "+refused)
		status, err := a.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if len(status.Problems) != 2 || status.Problems[1] != refused {
			t.Errorf("problems %q", status.Problems)
		}
		if len(m.speaker.Peers) != 1 || fmt.Sprint(m.answers) != "[{192.0.2.1 [] false}]" {
			t.Errorf("%d peers, answers for %v", len(m.speaker.Peers), m.answers)
		}
		inbox.Remove(peer)
		putAll(t, inbox, service("web", "192.0.2.1", 80, "longshore.dev/scheduler: mh"))
		m.expect("mended", "-E -t 192.0.2.1:80 -s mh")
	})
}

// ServiceCIDRs may lie in each other; what the kernel gets never does.
func TestAgentServiceCIDRs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, inbox := newMachine(t, "n1"), NewInbox()
		a := m.start(inbox, nil)
		defer a.stop()
		inbox.Put(StandaloneNode("n1", addrs("172.31.0.11")))
		cidr := func(name string, texts ...string) {
			c := &networkingv1.ServiceCIDR{Spec: networkingv1.ServiceCIDRSpec{CIDRs: texts}}
			c.Name = name
			inbox.Put(c)
		}
		cidr("kubernetes", "10.96.0.0/24", "fd96::/112")
		inbox.Synced()
		m.expect("one",
			"add element ip longshore service_cidrs { 10.96.0.0/24 }",
			"add element ip6 longshore service_cidrs { fd96::/112 }",
			"ip route add local 10.96.0.0/24 dev lo src 172.31.0.11 table local",
			"ip route add local fd96::/112 dev lo table local",
		)
		cidr("more", "10.96.0.0/16")
		cidr("again", "10.96.0.0/16")
		m.happened()
		time.Sleep(retryAfter) // the wider one had to wait for the narrower one to go
		m.happened()
		if _, wide := m.state.Routes[netip.MustParsePrefix("10.96.0.0/16")]; !wide || len(m.state.Routes) != 2 || len(m.state.Elements) != 2 || !a.Ready() {
			t.Errorf("routes %v, elements %v, ready %t", m.state.Routes, m.state.Elements, a.Ready())
		}
	})
}

// An EndpointSlice that gets another label serves another Service, and the first one no longer.
func TestAgentSliceMoves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, inbox := newMachine(t, "n1"), NewInbox()
		a := m.start(inbox, nil)
		defer a.stop()
		inbox.Put(StandaloneNode("n1", addrs("172.31.0.11")))
		putAll(t, inbox, service("one", "192.0.2.1", 80, "")+"---"+service("two", "192.0.2.2", 80, "")+"---"+endpoints("one", true))
		inbox.Synced()
		m.happened()
		slice := objects(t, endpoints("one", true))[0]
		slice.SetLabels(map[string]string{"kubernetes.io/service-name": "two"})
		inbox.Put(slice)
		m.expect("moved", "-a -t 192.0.2.2:80 -r 10.244.1.2:8080 -m -w 1", "-e -t 192.0.2.1:80 -r 10.244.1.2:8080 -m -w 0")
		gone := objects(t, endpoints("one", true))[0] // only its name matters
		inbox.Remove(gone)
		m.expect("gone", "-e -t 192.0.2.2:80 -r 10.244.1.2:8080 -m -w 0")
	})
}

// TestAgentWalk changes objects at random while the kernel refuses one operation in eight. No address is announced that
// nobody serves (machine.check), and after the faults are over the node is as one that has never seen any.
func TestAgentWalk(t *testing.T) {
	r := rand.New(rand.NewPCG(4, 4))
	for walk := range 40 {
		synctest.Test(t, func(t *testing.T) {
			m, inbox := newMachine(t, "n1"), NewInbox()
			faults := rand.New(rand.NewPCG(5, uint64(walk)))
			m.refuse = func(ipvs.Operation) error {
				if faults.IntN(8) == 0 {
					return errors.New("cannot allocate memory")
				}
				return nil
			}
			site(t, inbox)
			inbox.Synced()
			a := m.start(inbox, nil)
			defer a.stop()
			objectsNow := map[inboxKey]Object{} // but those of the site
			change := func() {
				name := fmt.Sprintf("s%d", r.IntN(8))
				var text string
				switch r.IntN(3) {
				case 0:
					text = endpoints(name, r.IntN(3) > 0)
				default: // Services share addresses, each has a port of its own
					vip := fmt.Sprintf("192.0.2.%d", r.IntN(4))
					text = service(name, vip, 80+int(name[1]-'0'), "longshore.dev/scheduler: "+[]string{"rr", "mh"}[r.IntN(2)])
				}
				o := objects(t, text)[0]
				key, _ := newChange(o, false)
				if r.IntN(4) == 0 {
					delete(objectsNow, key)
					inbox.Remove(o)
				} else {
					objectsNow[key] = o
					inbox.Put(o)
				}
			}
			for range 40 {
				for range 1 + r.IntN(4) {
					change()
				}
				if r.IntN(5) == 0 {
					time.Sleep(retryAfter)
				}
				synctest.Wait()
			}
			m.set(func() { m.refuse = nil })
			change()
			time.Sleep(2 * retryAfter)
			synctest.Wait()
			if !a.Ready() {
				t.Error("not ready after the faults are over")
			}

			fresh, again := newMachine(t, "n1"), NewInbox()
			site(t, again)
			for _, o := range objectsNow {
				again.Put(o)
			}
			again.Synced()
			b := fresh.start(again, nil)
			defer b.stop()
			synctest.Wait()
			equal := cmp.Options{cmpopts.EquateEmpty(), cmpopts.EquateComparable(netip.Addr{}, netip.AddrPort{}, netip.Prefix{}, ipvs.Frontend{}, ipvs.Element{}, ipvs.VirtualServer{})}
			if diff := cmp.Diff(fresh.copied(), m.copied(), equal); diff != "" {
				t.Errorf("walk %d: kernel (-fresh +walked):\n%s", walk, diff)
			}
			if diff := cmp.Diff(fresh.answers, m.answers, equal); diff != "" {
				t.Errorf("walk %d: layer 2 (-fresh +walked):\n%s", walk, diff)
			}
			if diff := cmp.Diff(fresh.speaker, m.speaker, equal); diff != "" {
				t.Errorf("walk %d: BGP (-fresh +walked):\n%s", walk, diff)
			}
		})
	}
}
