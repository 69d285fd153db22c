package controller

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"

	"github.com/longshore-lb/longshore/ipvs"
)

// TestWalk changes Services, EndpointSlices, Nodes and ServiceCIDRs at random, 10,000 times, while the kernel refuses one
// operation in ten, and then some more while it refuses none. What must hold after every operation is in
// [faultyKernel.Apply]; after every step each frontend that should be served is, unless the kernel has refused it; and when the
// faults are over the kernel holds what is desired, and no real server drains for ever.
func TestWalk(t *testing.T) {
	const steps = 500
	for walk := range 24 {
		rate := 10
		if walk >= 20 {
			rate = 0
		}
		synctest.Test(t, func(t *testing.T) {
			w := newWalker(t, uint64(walk), rate)
			defer func() { w.agent.stop() }()
			for range steps {
				w.step()
			}
			w.settle()
		})
		if t.Failed() {
			return
		}
	}
}

// walker is an agent, the objects it was given, and the kernel it works on.
type walker struct {
	*faultyKernel
	r     *rand.Rand
	now   map[inboxKey]Object
	inbox *Inbox
	agent running
}

func newWalker(t *testing.T, seed uint64, rate int) *walker {
	w := &walker{r: rand.New(rand.NewPCG(6, seed)), now: map[inboxKey]Object{}}
	w.faultyKernel = &faultyKernel{
		machine: newMachine(t, "n1"), r: rand.New(rand.NewPCG(7, seed)), rate: rate,
		refused: map[ipvs.Frontend]bool{}, foreign: map[ipvs.Frontend]bool{}, open: map[connection]bool{}, quiet: map[connection]bool{}, asked: map[connection]time.Time{},
	}
	w.options = func(o *AgentOptions) { o.DataPlane = w.faultyKernel }
	if rate > 0 {
		for _, text := range []string{"198.51.100.1:443", "10.96.0.12:80"} {
			w.foreign[ipvs.At(ipvs.TCP, netip.MustParseAddrPort(text))] = true
		}
	}
	for _, o := range []Object{w.node("n1"), w.node("n2")} {
		key, _ := newChange(o, false)
		w.now[key] = o
	}
	w.wanted, w.drains = w.wantedFrontends()
	w.start()
	return w
}

// start is the life of another agent on the same machine.
func (w *walker) start() {
	w.inbox = NewInbox()
	for _, o := range w.now {
		w.inbox.Put(o)
	}
	w.inbox.Synced()
	w.agent = w.machine.start(w.inbox, nil)
	synctest.Wait()
}

// step changes some objects, waits some time, and looks at what came of it.
func (w *walker) step() {
	w.set(func() { w.history, w.journal = nil, nil })
	changes := map[inboxKey]change{}
	for range 1 + w.r.IntN(3) {
		o := w.object()
		key, c := newChange(o, w.r.IntN(4) == 0)
		if c.deleted {
			if _, ok := o.(*corev1.Node); ok {
				continue
			}
			delete(w.now, key)
		} else {
			w.now[key] = o
		}
		changes[key] = c
	}
	w.set(func() {
		w.wanted, w.drains = w.wantedFrontends()
		for c := range w.open {
			if w.r.IntN(4) == 0 {
				delete(w.open, c) // it ends
			}
		}
	})
	if w.r.IntN(50) == 0 && w.marked() {
		w.agent.stop()
		w.start()
	} else {
		w.inbox.mu.Lock() // all arrive before the agent looks
		maps.Copy(w.inbox.pending, changes)
		w.inbox.signal()
		w.inbox.mu.Unlock()
		synctest.Wait()
	}
	w.check()
	switch w.r.IntN(30) {
	case 0:
		time.Sleep(shortestDrain + retryAfter)
	case 1, 2, 3:
		time.Sleep(retryAfter)
	case 4, 5, 6:
		time.Sleep(upkeepEvery)
	}
	synctest.Wait()
	w.check()
	if w.rate == 0 {
		if !w.agent.Ready() { // a range of addresses has to wait until one that overlaps it has gone
			time.Sleep(2 * retryAfter)
			synctest.Wait()
		}
		w.converged()
	}
}

// marked tells whether each virtual server bears its mark of ownership: only then does the agent of another process know it.
func (w *walker) marked() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	for f := range w.state.VirtualServers {
		if _, ok := w.state.Elements[ipvs.Element{Set: ipvs.Frontends, Frontend: f}]; !ok && f.Mark == 0 {
			return false
		}
	}
	return true
}

// check fails if something was wrong on the way, or a frontend that should be served is not.
func (w *walker) check() {
	w.t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	for f := range w.wanted {
		if _, ok := w.state.VirtualServers[f]; !ok && !w.refused[f] && !w.foreign[f] {
			w.complain("%s has no virtual server, and the kernel has not refused one", f)
		}
	}
	if w.wrong != "" {
		w.t.Fatalf("%s; what was done in this step:\n%s", w.wrong, strings.Join(w.history, "\n"))
	}
}

// converged fails if the kernel does not hold what is desired.
func (w *walker) converged() {
	w.t.Helper()
	var ops []ipvs.Operation
	var draining int
	done := make(chan struct{})
	w.agent.queries <- func() {
		ops, draining = w.agent.desired.Repair(w.copied()), w.agent.desired.Draining()
		close(done)
	}
	<-done
	if len(ops) > 0 || !w.agent.Ready() {
		w.t.Fatalf("ready %t, and not in the kernel: %v; what was done in this step:\n%s", w.agent.Ready(), ops, strings.Join(w.history, "\n"))
	}
	if quiet := len(w.quiet); quiet != draining {
		w.t.Fatalf("%d real servers are quiet, and %d drain", quiet, draining)
	}
	for f := range w.state.VirtualServers {
		if f.Mark == 0 && !w.wanted[f] {
			w.t.Fatalf("virtual server %s is there, and nobody wants it", f)
		}
	}
}

// settle ends the faults, and then waits for longer than anything may drain.
func (w *walker) settle() {
	w.set(func() {
		w.history = nil
		w.rate = 0
		clear(w.foreign)
	})
	time.Sleep(retryForeignAfter + 3*retryAfter)
	synctest.Wait()
	w.check()
	w.converged()
	time.Sleep(20 * time.Minute)
	synctest.Wait()
	w.check()
	w.converged()
	if len(w.quiet) > 0 {
		w.t.Fatalf("%d real servers still drain", len(w.quiet))
	}
}

// faultyKernel is a kernel as package ipvs/kernel makes it look: elements of sets change in one transaction for a run of
// operations, which the kernel does or refuses as a whole; every other operation is done or refused by itself, and the
// others go on. Virtual servers of others are in it too.
type faultyKernel struct {
	*machine
	r    *rand.Rand
	rate int // of a hundred operations it refuses so many

	wanted  map[ipvs.Frontend]bool // frontends that should be served, by the objects
	drains  map[ipvs.Frontend]bool // those of which real servers drain, whoever has them
	refused map[ipvs.Frontend]bool // virtual servers that the kernel did not add when it should
	foreign map[ipvs.Frontend]bool
	open    map[connection]bool      // real servers with open connections
	quiet   map[connection]bool      // real servers with weight 0
	asked   map[connection]time.Time // when the agent first said that they should have it
	history []string
	wrong   string
}

type connection struct {
	frontend ipvs.Frontend
	real     netip.AddrPort
}

// shortestDrain is the shortest drain timeout in the walk, but for 0.
const shortestDrain = 30 * time.Second

func (k *faultyKernel) complain(format string, args ...any) {
	if k.wrong == "" {
		k.wrong = fmt.Sprintf(format, args...)
	}
}

func (k *faultyKernel) Connections(of []ipvs.Frontend) (map[ipvs.Frontend]map[netip.AddrPort]int, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	out := map[ipvs.Frontend]map[netip.AddrPort]int{}
	for _, f := range of {
		out[f] = map[netip.AddrPort]int{}
		for at := range k.state.RealServers[f] {
			if k.open[connection{f, at}] {
				out[f][at] = 1
			}
		}
	}
	return out, nil
}

var errFault = errors.New("cannot allocate memory")

// Apply does operations. After each of them: no virtual server that is wanted has been deleted; nothing of others was touched; no
// address is routed that has no virtual server, unless for a fault; no real server was removed that has connections and time; and
// a frontend that has real servers for new connections before and after has some all the time.
func (k *faultyKernel) Apply(ops []ipvs.Operation) []ipvs.Failure {
	k.mu.Lock()
	defer k.mu.Unlock()
	p := applying{faultyKernel: k, took: map[ipvs.Frontend]bool{}, gap: map[ipvs.Frontend]ipvs.Operation{}, faulty: map[netip.Addr]bool{}, absent: map[ipvs.Frontend]error{}}
	for f := range k.state.VirtualServers {
		p.took[f] = k.takes(f)
	}
	for len(ops) > 0 {
		n := 1
		for ops[0].Kind == ipvs.KindElement && n < len(ops) && ops[n].Kind == ipvs.KindElement {
			n++
		}
		if ops[0].Kind == ipvs.KindElement {
			p.transaction(ops[:n])
		} else {
			p.one(ops[0])
		}
		ops = ops[n:]
	}
	for f, o := range p.gap {
		if p.took[f] && k.takes(f) && !p.faulty[f.Addr.Addr()] {
			k.complain("%s had no real server for new connections after %s, and has some before and after", f, o)
		}
	}
	return p.failures
}

// applying is one call of Apply.
type applying struct {
	*faultyKernel
	took     map[ipvs.Frontend]bool           // had real servers that take connections at the start
	gap      map[ipvs.Frontend]ipvs.Operation // had none after this operation
	faulty   map[netip.Addr]bool              // addresses about which an operation was refused
	absent   map[ipvs.Frontend]error          // virtual servers that could not be added
	failures []ipvs.Failure
}

func (k *faultyKernel) takes(f ipvs.Frontend) bool {
	for _, r := range k.state.RealServers[f] {
		if r.Weight > 0 {
			return true
		}
	}
	return false
}

func (p *applying) fail(o ipvs.Operation, err error) {
	p.history = append(p.history, fmt.Sprintf("%s: %v", o, err))
	p.failures = append(p.failures, ipvs.Failure{Operation: o, Err: fmt.Errorf("%s: %w", o, err)})
}

func (p *applying) fault() error {
	if p.r.IntN(100) < p.rate {
		return errFault
	}
	return nil
}

// transaction takes elements out, then puts others in, all or none.
func (p *applying) transaction(ops []ipvs.Operation) {
	before := maps.Clone(p.state.Elements)
	err := p.fault()
	for _, verb := range []ipvs.Verb{ipvs.Delete, ipvs.Add} {
		for _, o := range ops {
			if o.Verb != verb || err != nil {
				continue
			}
			if err = p.do(o); err != nil && !strings.Contains(err.Error(), "overlaps") {
				p.complain("%s: %v", o, err)
			}
		}
	}
	if err != nil {
		p.state.Elements = before
	}
	for _, o := range ops {
		if err != nil {
			p.fail(o, err)
		} else {
			p.history = append(p.history, o.String())
		}
	}
}

// one does an operation that is no element's.
func (p *applying) one(o ipvs.Operation) {
	f := o.VirtualServer.Frontend
	addr := f.Addr.Addr()
	if o.Kind == ipvs.KindRoute {
		addr = o.Route.Addr()
	}
	if err := p.absent[f]; err != nil && o.Kind == ipvs.KindRealServer {
		p.fail(o, err)
		return
	}
	err := p.fault()
	adds := o.Kind == ipvs.KindVirtualServer && o.Verb == ipvs.Add
	if p.foreign[f] {
		if !adds {
			p.complain("%s touches what is somebody else's", o)
		}
		err = ipvs.ErrForeign
		delete(p.state.Elements, ipvs.Element{Set: ipvs.Frontends, Frontend: f}) // the kernel disowns it
	}
	if err != nil {
		p.faulty[addr] = true
		if adds {
			p.absent[f], p.refused[f] = err, true
		}
		p.ask(o)
		p.fail(o, err)
		return
	}
	if err := p.do(o); err != nil {
		p.complain("%s: %v", o, err)
		p.fail(o, err)
		return
	}
	p.history = append(p.history, o.String())
	switch o.Kind {
	case ipvs.KindVirtualServer:
		p.didVirtualServer(o)
	case ipvs.KindRealServer:
		p.didRealServer(o)
	}
	if _, routed := p.state.Routes[netip.PrefixFrom(addr, max(addr.BitLen(), 0))]; routed && f.Mark == 0 && !p.faulty[addr] && !p.servedAt(addr) {
		p.complain("after %s: %s is routed and has no virtual server", o, addr)
	}
}

func (p *applying) servedAt(addr netip.Addr) bool {
	for _, of := range []map[ipvs.Frontend]bool{p.foreign, p.refused} {
		for f := range of {
			if f.Addr.Addr() == addr {
				return true
			}
		}
	}
	for f := range p.state.VirtualServers {
		if f.Addr.Addr() == addr {
			return true
		}
	}
	return false
}

func (p *applying) didVirtualServer(o ipvs.Operation) {
	f := o.VirtualServer.Frontend
	if o.Verb != ipvs.Delete {
		delete(p.refused, f)
		return
	}
	if p.wanted[f] {
		p.complain("%s is wanted and was deleted", f)
	}
	for _, of := range []map[connection]bool{p.open, p.quiet} {
		maps.DeleteFunc(of, func(c connection, _ bool) bool { return c.frontend == f })
	}
	maps.DeleteFunc(p.asked, func(c connection, _ time.Time) bool { return c.frontend == f })
}

// ask notes when a real server was first to take no new connections. One that was to go before, by itself or with its
// virtual server, may go at any time.
func (p *applying) ask(o ipvs.Operation) {
	c := connection{o.VirtualServer.Frontend, o.RealServer.Addr}
	switch _, again := p.asked[c]; {
	case o.Kind == ipvs.KindVirtualServer && o.Verb == ipvs.Delete:
		for at := range p.state.RealServers[c.frontend] {
			p.asked[connection{c.frontend, at}] = time.Time{}
		}
	case o.Kind != ipvs.KindRealServer:
	case o.Verb == ipvs.Delete:
		p.asked[c] = time.Time{}
	case !again && o.RealServer.Weight == 0:
		p.asked[c] = time.Now()
	}
}

func (p *applying) didRealServer(o ipvs.Operation) {
	c := connection{o.VirtualServer.Frontend, o.RealServer.Addr}
	switch {
	case o.Verb == ipvs.Delete:
		if since, asked := p.asked[c]; p.open[c] && p.drains[c.frontend] && (!asked || time.Since(since) < shortestDrain) {
			p.complain("%s: it has connections and has drained for less than %v (since %v)", o, shortestDrain, since)
		}
		delete(p.open, c)
		delete(p.quiet, c)
		delete(p.asked, c)
	case o.RealServer.Weight > 0:
		p.open[c] = true
		delete(p.quiet, c)
		delete(p.asked, c)
	default:
		p.quiet[c] = true
		p.ask(o)
	}
	if !p.takes(c.frontend) {
		p.gap[c.frontend] = o
	}
}

// wantedFrontends says, in as few words as there are, what should be served, and at which of the frontends real servers drain
// whichever of several Services has them.
func (w *walker) wantedFrontends() (wanted, drains map[ipvs.Frontend]bool) {
	wanted, drains = map[ipvs.Frontend]bool{}, map[ipvs.Frontend]bool{}
	mine, others := map[string]bool{}, map[string]bool{}
	for _, o := range w.now {
		if n, ok := o.(*corev1.Node); ok {
			for _, a := range n.Status.Addresses {
				if n.Name == "n1" {
					mine[a.Address] = true
				} else {
					others[a.Address] = true
				}
			}
		}
	}
	for _, o := range w.now {
		svc, ok := o.(*corev1.Service)
		if !ok || svc.Spec.Type == corev1.ServiceTypeExternalName || svc.Spec.ClusterIP == "None" || len(svc.Labels) > 0 {
			continue
		}
		add := func(addr string, number int32, p corev1.Protocol) {
			at := netip.AddrPortFrom(netip.MustParseAddr(addr), uint16(number))
			family := corev1.IPv4Protocol
			if at.Addr().Is6() {
				family = corev1.IPv6Protocol
			}
			if number == 0 || others[addr] || !slices.Contains(svc.Spec.IPFamilies, family) {
				return
			}
			f := ipvs.At(map[corev1.Protocol]ipvs.Protocol{"TCP": ipvs.TCP, "UDP": ipvs.UDP, "SCTP": ipvs.SCTP}[p], at)
			had := wanted[f]
			wanted[f] = true
			drain := svc.Annotations[DrainTimeoutAnnotation]
			drains[f] = (drains[f] || !had) && p != corev1.ProtocolUDP && (drain == "" || drain == "30s")
		}
		for _, p := range svc.Spec.Ports {
			for _, addr := range slices.Concat(svc.Spec.ClusterIPs, svc.Spec.ExternalIPs) {
				add(addr, p.Port, p.Protocol)
			}
			for _, i := range svc.Status.LoadBalancer.Ingress {
				if svc.Spec.Type == corev1.ServiceTypeLoadBalancer && (i.IPMode == nil || *i.IPMode == corev1.LoadBalancerIPModeVIP) {
					add(i.IP, p.Port, p.Protocol)
				}
			}
			for addr := range mine {
				add(addr, p.NodePort, p.Protocol)
			}
		}
	}
	return wanted, drains
}

// object is one object, as it might be.
func (w *walker) object() Object {
	i := w.r.IntN(7)
	switch n := w.r.IntN(40); {
	case n == 0:
		return w.node([]string{"n1", "n2"}[w.r.IntN(2)])
	case n == 1:
		c := &networkingv1.ServiceCIDR{}
		c.Name = "kubernetes"
		c.Spec.CIDRs = [][]string{{"10.96.0.0/16", "fd96::/112"}, {"10.96.0.0/24"}, {"10.0.0.0/8"}}[w.r.IntN(3)]
		return c
	case n < 20:
		return w.slice(i)
	}
	return w.service(i)
}

func (w *walker) one(n int) bool { return w.r.IntN(n) == 0 }

func choice[T any](r *rand.Rand, of ...T) T { return of[r.IntN(len(of))] }

// some is a part of what there is.
func some[T any](r *rand.Rand, of ...T) []T {
	return slices.DeleteFunc(slices.Clone(of), func(T) bool { return r.IntN(2) == 0 })
}

func (w *walker) node(name string) *corev1.Node {
	n := StandaloneNode(name, addrs("172.31.0.11", "fd31::11"))
	if name == "n2" {
		n = StandaloneNode(name, addrs(choice(w.r, "172.31.0.12", "172.31.0.12", "10.96.0.77")))
	} else if w.one(3) {
		n = StandaloneNode(name, addrs("172.31.0.11", "172.31.0.13"))
	}
	n.Labels[corev1.LabelTopologyZone] = choice(w.r, "east", "west")
	n.Spec.PodCIDRs = some(w.r, "10.244.1.0/24", "fd44::/64")
	return n
}

func (w *walker) slice(i int) *discoveryv1.EndpointSlice {
	s := &discoveryv1.EndpointSlice{AddressType: choice(w.r, discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv6)}
	s.Namespace, s.Name = "default", fmt.Sprintf("s%d-%d", i, w.r.IntN(2))
	s.Labels = map[string]string{discoveryv1.LabelServiceName: fmt.Sprintf("s%d", i)}
	for _, p := range some(w.r, servicePorts...) {
		number := choice[int32](w.r, 8080, 8080, 9090)
		s.Ports = append(s.Ports, discoveryv1.EndpointPort{Name: &p.Name, Protocol: &p.Protocol, Port: &number})
	}
	for n := range w.r.IntN(4) {
		node := choice(w.r, "n1", "n2", "n3")
		ready, serving, terminating := w.r.IntN(3) > 0, w.r.IntN(2) == 0, w.r.IntN(2) == 0
		e := discoveryv1.Endpoint{
			Addresses:  []string{fmt.Sprintf("10.244.1.%d", 2+n)},
			NodeName:   &node,
			Conditions: discoveryv1.EndpointConditions{Ready: &ready, Serving: &serving, Terminating: &terminating},
		}
		if s.AddressType == discoveryv1.AddressTypeIPv6 {
			e.Addresses = []string{fmt.Sprintf("fd44::%d", 2+n)}
		}
		if w.r.IntN(3) > 0 {
			e.Hints = &discoveryv1.EndpointHints{ForZones: []discoveryv1.ForZone{{Name: choice(w.r, "east", "west")}}}
		}
		s.Endpoints = append(s.Endpoints, e)
	}
	return s
}

var servicePorts = []corev1.ServicePort{
	{Name: "a", Port: 80, Protocol: corev1.ProtocolTCP},
	{Name: "b", Port: 80, Protocol: corev1.ProtocolUDP},
	{Name: "c", Port: 80, Protocol: corev1.ProtocolSCTP},
	{Name: "d", Port: 443, Protocol: corev1.ProtocolTCP},
}

func (w *walker) service(i int) *corev1.Service {
	svc := &corev1.Service{}
	svc.Namespace, svc.Name, svc.Annotations = "default", fmt.Sprintf("s%d", i), map[string]string{}
	spec := &svc.Spec
	spec.Type = choice(w.r, corev1.ServiceTypeClusterIP, corev1.ServiceTypeNodePort, corev1.ServiceTypeLoadBalancer, corev1.ServiceTypeLoadBalancer)
	spec.IPFamilies = choice(w.r, []corev1.IPFamily{"IPv4"}, []corev1.IPFamily{"IPv4", "IPv6"}, []corev1.IPFamily{"IPv6"}, []corev1.IPFamily{"IPv6", "IPv4"})
	for _, family := range spec.IPFamilies {
		spec.ClusterIPs = append(spec.ClusterIPs, fmt.Sprintf(map[corev1.IPFamily]string{"IPv4": "10.96.0.%d", "IPv6": "fd96::%d"}[family], 10+i))
	}
	spec.ClusterIP = spec.ClusterIPs[0]
	spec.Ports = some(w.r, servicePorts...)
	if spec.Type != corev1.ServiceTypeClusterIP {
		for n := range spec.Ports {
			spec.Ports[n].NodePort = 30000 + w.r.Int32N(3)
		}
		spec.ExternalTrafficPolicy = choice(w.r, corev1.ServiceExternalTrafficPolicyCluster, corev1.ServiceExternalTrafficPolicyLocal)
	}
	spec.Ports = slices.CompactFunc(spec.Ports, func(a, b corev1.ServicePort) bool {
		return a.NodePort > 0 && a.NodePort == b.NodePort && a.Protocol == b.Protocol
	})
	spec.ExternalIPs = some(w.r, "198.51.100.1", "fd51::1", "172.31.0.11", "172.31.0.12")
	for _, addr := range some(w.r, "192.0.2.1", "192.0.2.2", "fd52::1") {
		svc.Status.LoadBalancer.Ingress = append(svc.Status.LoadBalancer.Ingress,
			corev1.LoadBalancerIngress{IP: addr, IPMode: choice[*corev1.LoadBalancerIPMode](w.r, nil, new(corev1.LoadBalancerIPModeVIP), new(corev1.LoadBalancerIPModeProxy))})
	}
	if w.one(3) {
		spec.InternalTrafficPolicy = new(corev1.ServiceInternalTrafficPolicyLocal)
	}
	if w.one(3) {
		spec.SessionAffinity = corev1.ServiceAffinityClientIP
	}
	if w.one(3) {
		spec.LoadBalancerSourceRanges = some(w.r, "10.0.0.0/8", "10.1.0.0/16", "fd00::/8", "fd01::/16", "0.0.0.0/0", "nowhere")
	}
	spec.PublishNotReadyAddresses = w.one(8)
	switch w.r.IntN(20) {
	case 0:
		svc.Labels = map[string]string{proxyNameLabel: "other"}
	case 1:
		spec.Type, spec.ClusterIP, spec.ClusterIPs = corev1.ServiceTypeExternalName, "", nil
	case 2:
		spec.ClusterIP, spec.ClusterIPs = "None", []string{"None"}
	}
	for _, a := range [][]string{
		{SchedulerAnnotation, "rr", "mh", "sh", "wlc", "best"},
		{DrainTimeoutAnnotation, "30s", "30s", "0s", "soon"},
		{SlowStartAnnotation, "10s"},
		{NodeWeightsAnnotation, corev1.LabelTopologyZone + "=east:3"},
		{MaxConnectionsAnnotation, "100"},
	} {
		if value := choice(w.r, a[1:]...); w.one(3) {
			svc.Annotations[a[0]] = value
		}
	}
	return svc
}
