package controller

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"

	"github.com/longshore-lb/longshore/ipvs"
)

// NodeView is what a node's data plane depends on besides Services.
type NodeView struct {
	Name          string
	Zone          string              // label topology.kubernetes.io/zone
	Addresses     []netip.Addr        // the node's own (InternalIP), the first of each family is the main one
	Others        map[netip.Addr]bool // addresses of other nodes, which no Service may take from them
	NodePortAddrs []netip.Addr        // those that serve node ports
	PodCIDRs      []netip.Prefix      // of the pods on this node
	PodsKnown     bool                // no pod of this node is outside of PodCIDRs: the configuration says so
	MasqueradeAll bool                // clients of cluster IPs are hidden behind the node, pods too
	ServiceCIDRs  []netip.Prefix      // where cluster IPs come from
}

// Address is the node's main address of a family, invalid if it has none.
func (n NodeView) Address(ipv6 bool) netip.Addr {
	for _, a := range n.Addresses {
		if a.Is6() == ipv6 {
			return a
		}
	}
	return netip.Addr{}
}

// Problem is something about an object that its owner should mend.
type Problem struct {
	Reason  string // for an event: one word in CamelCase
	Message string // names the field and the value
}

// TranslateNode is what the kernel should hold whatever Services there are: the ranges of cluster IPs are local, by
// one route each and without an address, and those that no Service has are dropped.
func TranslateNode(n NodeView) ipvs.Wish {
	var s ipvs.Wish
	for _, p := range n.ServiceCIDRs {
		s.AddPrefix(ipvs.ServiceCIDRs, p)
		s.AddRoute(p, n.Address(p.Addr().Is6()))
	}
	for _, p := range n.PodCIDRs {
		s.AddPrefix(ipvs.Pods, p)
		if !n.MasqueradeAll {
			s.AddPrefix(ipvs.Kept, p)
		}
	}
	return s
}

// Terms is what a Service is translated by, besides its objects and the node.
type Terms struct {
	Options
	NodeLabels func(node string) labels.Set                                             // of any node
	PodWeight  func(pod string) podWeight                                               // of namespace/name
	Age        func(at netip.AddrPort) time.Duration                                    // how long a real server has been there, for its slow start
	Mark       func(port string, protocol ipvs.Protocol, family corev1.IPFamily) uint32 // of the Service's shortcut
}

// Translation is what a Service comes to on a node.
type Translation struct {
	Wish     ipvs.Wish
	Problems []Problem
	// Reach is the nodes with a ready endpoint, by family. Of a Service whose external traffic may go to every node it is
	// every node (AnyNode) as soon as there is one endpoint anywhere.
	Reach map[corev1.IPFamily]map[string]bool
	// NoLocalInternal and NoLocalExternal tell that traffic of policy Local finds no endpoint on this node, though there are some elsewhere.
	NoLocalInternal, NoLocalExternal bool
}

// AnyNode stands for every node in Translation.Reach.
const AnyNode = "*"

// Translate is what the kernel should hold for one Service, given its EndpointSlices. A Service that gets no virtual
// server, such as a headless one, translates to the zero Translation.
func Translate(svc *corev1.Service, endpointSlices []*endpointSlice, n NodeView, terms Terms) Translation {
	if svc.Spec.Type == corev1.ServiceTypeExternalName || svc.Spec.ClusterIP == corev1.ClusterIPNone || svc.Labels[proxyNameLabel] != "" {
		return Translation{}
	}
	t := translation{svc: svc, node: n, terms: terms, families: familiesOf(svc)}
	t.Wish.Drain = terms.Drain
	t.Reach = map[corev1.IPFamily]map[string]bool{}
	t.ports = map[ipvs.Frontend]*corev1.ServicePort{}
	if svc.Spec.SessionAffinity == corev1.ServiceAffinityClientIP {
		t.persistence = affinitySeconds(svc)
	}
	t.externalLocal = svc.Spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal
	t.internalLocal = svc.Spec.InternalTrafficPolicy != nil && *svc.Spec.InternalTrafficPolicy == corev1.ServiceInternalTrafficPolicyLocal
	t.readSourceRanges()
	for _, s := range endpointSlices {
		t.Problems = append(t.Problems, s.problems...)
	}
	for i := range svc.Spec.Ports {
		port := &svc.Spec.Ports[i]
		protocol, ok := protocols[cmp.Or(port.Protocol, corev1.ProtocolTCP)]
		if !ok {
			t.problem("Unsupported", "spec.ports[%d].protocol: %q is not a protocol that IPVS balances", i, port.Protocol)
			continue
		}
		for _, family := range t.families {
			t.serve(port, protocol, family, choose(candidates(endpointSlices, port, family), n, svc.Spec.PublishNotReadyAddresses))
		}
	}
	return t.Translation
}

// proxyNameLabel on a Service says that another proxy than the cluster's usual one serves it (KEP-2447).
const proxyNameLabel = "service.kubernetes.io/service-proxy-name"

var protocols = map[corev1.Protocol]ipvs.Protocol{
	corev1.ProtocolTCP:  ipvs.TCP,
	corev1.ProtocolUDP:  ipvs.UDP,
	corev1.ProtocolSCTP: ipvs.SCTP,
}

type translation struct {
	Translation
	svc                          *corev1.Service
	node                         NodeView
	terms                        Terms
	families                     []corev1.IPFamily
	persistence                  uint32
	externalLocal, internalLocal bool
	ports                        map[ipvs.Frontend]*corev1.ServicePort // that have a frontend
	restricted                   map[corev1.IPFamily]bool              // whether sources are restricted at all
	sources                      map[corev1.IPFamily][]netip.Prefix
}

func (t *translation) problem(reason, format string, args ...any) {
	p := Problem{reason, fmt.Sprintf(format, args...)}
	if !slices.Contains(t.Problems, p) {
		t.Problems = append(t.Problems, p)
	}
}

// readSourceRanges reads spec.loadBalancerSourceRanges. 0.0.0.0/0 and ::/0 are as if there were none, in their family and
// in one without any range; a family that only the other one's ranges are given for lets nobody in.
func (t *translation) readSourceRanges() {
	t.sources = map[corev1.IPFamily][]netip.Prefix{}
	t.restricted = map[corev1.IPFamily]bool{}
	open := map[corev1.IPFamily]bool{}
	for i, text := range t.svc.Spec.LoadBalancerSourceRanges {
		p, err := netip.ParsePrefix(strings.TrimSpace(text))
		if err != nil {
			t.problem("InvalidSourceRange", "spec.loadBalancerSourceRanges[%d]: %q is not a CIDR; it lets nobody in", i, text)
			continue
		}
		family := familyOf(p.Addr())
		t.sources[family] = append(t.sources[family], p.Masked())
		open[family] = open[family] || p.Bits() == 0
	}
	for _, family := range []corev1.IPFamily{corev1.IPv4Protocol, corev1.IPv6Protocol} {
		unset := len(t.sources[family]) == 0 && (open[corev1.IPv4Protocol] || open[corev1.IPv6Protocol])
		t.restricted[family] = len(t.svc.Spec.LoadBalancerSourceRanges) > 0 && !open[family] && !unset
		t.sources[family] = outermost(t.sources[family])
	}
}

// serve adds the frontends of one Service port in one family.
func (t *translation) serve(port *corev1.ServicePort, protocol ipvs.Protocol, family corev1.IPFamily, c chosen) {
	own := func(addrs []netip.Addr) []netip.Addr {
		return slices.DeleteFunc(slices.Clone(addrs), func(a netip.Addr) bool { return familyOf(a) != family })
	}
	cluster, local := t.realServers(c.cluster), t.realServers(c.local)
	internal, external := cluster, cluster
	if t.internalLocal {
		internal = local
	}
	if t.externalLocal {
		external = local
	}
	t.reach(family, c)
	add := func(addr netip.Addr, number int32, reals []ipvs.RealServer, drop bool) (ipvs.Frontend, bool) {
		if t.node.Others[addr] {
			t.problem("NodeAddress", "%s is another node's address; it is not served here", addr)
			return ipvs.Frontend{}, false
		}
		f := ipvs.At(protocol, netip.AddrPortFrom(addr, uint16(number)))
		if other, taken := t.ports[f]; taken && other != port { // such as a node port at an external IP that is the node's own
			t.problem("FrontendConflict", "%s of port %q is served for port %q of the same Service already", f, port.Name, other.Name)
			return f, false
		}
		t.ports[f] = port
		t.addFrontend(f, reals, c.leaving)
		if drop {
			t.Wish.AddFrontend(ipvs.Dropped, f)
		}
		return f, true
	}
	for _, addr := range own(clusterIPs(t.svc)) {
		drop := t.internalLocal && len(local) == 0 && len(cluster) > 0
		t.NoLocalInternal = t.NoLocalInternal || drop
		if f, ok := add(addr, port.Port, internal, drop); ok {
			t.addVIP(addr)
			if t.node.PodsKnown || t.node.MasqueradeAll { // who is no pod is outside the cluster's network, and its pods may not know the way back
				t.Wish.AddFrontend(ipvs.Masquerade, f)
			}
		}
	}
	outside := func(addr netip.Addr, number int32) (ipvs.Frontend, bool) {
		drop := t.externalLocal && len(local) == 0 && len(cluster) > 0
		t.NoLocalExternal = t.NoLocalExternal || drop
		f, ok := add(addr, number, external, drop)
		if ok && t.externalLocal {
			t.addShortcut(f, port, family, cluster, c.leaving)
		} else if ok {
			t.Wish.AddFrontend(ipvs.Masquerade, f)
		}
		return f, ok
	}
	for _, addr := range own(externalIPs(t.svc)) {
		if _, ok := outside(addr, port.Port); ok {
			t.addVIP(addr)
		}
	}
	for _, addr := range own(ingressIPs(t.svc)) {
		if f, ok := outside(addr, port.Port); ok {
			t.addVIP(addr)
			if t.restricted[family] {
				t.Wish.Restrict(f, t.sources[family]...)
			}
		}
	}
	if port.NodePort > 0 {
		for _, addr := range own(t.node.NodePortAddrs) {
			outside(addr, port.NodePort)
		}
	}
}

// addFrontend adds a virtual server with its mark of ownership.
func (t *translation) addFrontend(f ipvs.Frontend, reals []ipvs.RealServer, leaving []netip.AddrPort) {
	t.addServer(ipvs.VirtualServer{Frontend: f, Scheduler: t.terms.Scheduler, Flags: t.terms.Flags, Persistence: t.persistence}, f.Protocol, reals, leaving)
	t.Wish.AddFrontend(ipvs.Frontends, f)
}

func (t *translation) addServer(v ipvs.VirtualServer, protocol ipvs.Protocol, reals []ipvs.RealServer, leaving []netip.AddrPort) {
	t.Wish.AddVirtualServer(v, reals...)
	if protocol == ipvs.UDP {
		if t.Wish.Leaving == nil {
			t.Wish.Leaving = map[ipvs.Frontend][]netip.AddrPort{}
		}
		t.Wish.Leaving[v.Frontend] = leaving
	}
}

// addShortcut gives clients in the cluster all endpoints at a frontend of policy Local (KEP-3685 describes what
// kube-proxy does). A virtual server of a mark cannot be persistent: the kernel then keeps the client's port instead of the
// endpoint's (ip_vs_sched_persist). So session affinity is by scheduler mh, which hashes the client's address.
func (t *translation) addShortcut(f ipvs.Frontend, port *corev1.ServicePort, family corev1.IPFamily, reals []ipvs.RealServer, leaving []netip.AddrPort) {
	v := ipvs.VirtualServer{
		Frontend:  ipvs.Frontend{Mark: t.terms.Mark(port.Name, f.Protocol, family), IPv6: f.IPv6},
		Scheduler: t.terms.Scheduler,
		Flags:     t.terms.Flags,
	}
	if t.persistence > 0 {
		v.Scheduler, v.Flags = "mh", 0
	}
	t.addServer(v, f.Protocol, reals, leaving)
	t.Wish.AddShortcut(f, v.Frontend.Mark)
}

// addVIP makes an address the Service's: nothing else may answer there. The node's own are not: what else is at those, such
// as ssh, is not ours to reject.
func (t *translation) addVIP(addr netip.Addr) {
	if slices.Contains(t.node.Addresses, addr) {
		return
	}
	whole := netip.PrefixFrom(addr, addr.BitLen())
	t.Wish.AddPrefix(ipvs.VIPs, whole)
	if !slices.ContainsFunc(t.node.ServiceCIDRs, func(p netip.Prefix) bool { return p.Contains(addr) }) {
		t.Wish.AddRoute(whole, t.node.Address(addr.Is6()))
	}
}

// realServers is endpoints with their weights. Those of this node are noted for hairpin.
func (t *translation) realServers(from []candidate) []ipvs.RealServer {
	reals := make([]ipvs.RealServer, 0, len(from))
	weights := make([]int32, len(from))
	for i, c := range from {
		weights[i] = t.weight(c)
	}
	for i, c := range from {
		if c.node == t.node.Name {
			t.Wish.AddPrefix(ipvs.Hairpin, netip.PrefixFrom(c.addr, c.addr.BitLen()))
		}
		r := ipvs.RealServer{Addr: c.at, Weight: weights[i], Upper: t.terms.Upper, Lower: t.terms.Lower}
		if t.terms.SlowStart > 0 {
			r.Weight = t.terms.ramp(r.Weight, slices.Max(weights), t.terms.Age(c.at))
		}
		reals = append(reals, r)
	}
	return reals
}

func (t *translation) weight(c candidate) int32 {
	weight := int32(1)
	if len(t.terms.NodeWeights) > 0 {
		weight = t.terms.weight(t.terms.NodeLabels(c.node))
	}
	if t.terms.PodWeights && c.pod != "" {
		w := t.terms.PodWeight(c.pod)
		if w.good {
			weight = w.weight
		}
		if w.problem != "" {
			t.problem("InvalidAnnotation", "%s", w.problem)
		}
	}
	return weight
}

// reach notes which nodes have an endpoint for traffic from outside.
func (t *translation) reach(family corev1.IPFamily, c chosen) {
	if len(c.anywhere) > 0 && t.Reach[family] == nil {
		t.Reach[family] = map[string]bool{}
	}
	for _, e := range c.anywhere {
		if t.externalLocal {
			t.Reach[family][e.node] = true
		} else {
			t.Reach[family][AnyNode] = true
		}
	}
}

func affinitySeconds(svc *corev1.Service) uint32 {
	if c := svc.Spec.SessionAffinityConfig; c != nil && c.ClientIP != nil && c.ClientIP.TimeoutSeconds != nil {
		return uint32(*c.ClientIP.TimeoutSeconds)
	}
	return uint32(corev1.DefaultClientIPServiceAffinitySeconds)
}

func clusterIPs(svc *corev1.Service) []netip.Addr {
	all := svc.Spec.ClusterIPs
	if len(all) == 0 {
		all = []string{svc.Spec.ClusterIP}
	}
	return addresses(all)
}

func externalIPs(svc *corev1.Service) []netip.Addr { return addresses(svc.Spec.ExternalIPs) }

// ingressIPs is the addresses in a Service's status that the data plane serves (ipMode VIP, the default).
func ingressIPs(svc *corev1.Service) []netip.Addr {
	if svc.Spec.Type != corev1.ServiceTypeLoadBalancer {
		return nil
	}
	var texts []string
	for _, i := range svc.Status.LoadBalancer.Ingress {
		if i.IPMode == nil || *i.IPMode == corev1.LoadBalancerIPModeVIP {
			texts = append(texts, i.IP)
		}
	}
	return addresses(texts)
}

// addresses parses what the API server has validated; anything else, such as an empty string, is no address.
func addresses(texts []string) []netip.Addr {
	var out []netip.Addr
	for _, t := range texts {
		if a, err := netip.ParseAddr(t); err == nil {
			out = append(out, a.Unmap())
		}
	}
	return out
}

func isTrue(b *bool, otherwise bool) bool {
	if b == nil {
		return otherwise
	}
	return *b
}

func deref(s *string) string {
	if s == nil {
		return ""
	}
	return *s
}

func compareNames(a, b types.NamespacedName) int {
	return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
}
