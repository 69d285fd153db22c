package controller

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/longshore-lb/longshore/config"
	"github.com/longshore-lb/longshore/ipvs"
)

// SchedulerAnnotation on a Service names the IPVS scheduler of its virtual servers.
const SchedulerAnnotation = "longshore.dev/scheduler"

// NodeView is what a node's data plane depends on besides Services.
type NodeView struct {
	Name          string
	Addresses     []netip.Addr        // the node's own (InternalIP), the first of each family is the main one
	Others        map[netip.Addr]bool // addresses of other nodes, which no Service may take from them
	NodePortAddrs []netip.Addr        // those that serve node ports
	PodCIDRs      []netip.Prefix      // of the pods on this node
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
func TranslateNode(n NodeView) ipvs.State {
	var s ipvs.State
	for _, p := range n.ServiceCIDRs {
		s.AddPrefix(ipvs.ServiceCIDRs, p)
		s.AddRoute(p, n.Address(p.Addr().Is6()))
	}
	for _, p := range n.PodCIDRs {
		s.AddPrefix(ipvs.Pods, p)
	}
	return s
}

// SchedulerOf is the scheduler of a Service's virtual servers: the one its annotation names, or usual if it names none.
// If it names one that does not exist, that is a problem, and lastGood stays in use.
func SchedulerOf(svc *corev1.Service, usual, lastGood string) (string, []Problem) {
	name, ok := svc.Annotations[SchedulerAnnotation]
	if !ok {
		return usual, nil
	}
	if err := config.CheckScheduler(name); err != nil {
		return lastGood, []Problem{{"UnknownScheduler", fmt.Sprintf("annotation %s: %v; %s stays in use", SchedulerAnnotation, err, lastGood)}}
	}
	return name, nil
}

// Translate is what the kernel should hold for one Service, given its EndpointSlices and its scheduler. A Service
// that gets no virtual server, such as a headless one, translates to the zero State.
func Translate(svc *corev1.Service, endpointSlices []*discoveryv1.EndpointSlice, n NodeView, scheduler string) (ipvs.State, []Problem) {
	t := translation{node: n, scheduler: scheduler}
	if svc.Spec.Type == corev1.ServiceTypeExternalName || svc.Spec.ClusterIP == corev1.ClusterIPNone {
		return ipvs.State{}, nil
	}
	if svc.Spec.SessionAffinity == corev1.ServiceAffinityClientIP {
		t.persistence = affinitySeconds(svc)
	}
	if svc.Spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal {
		t.problem("Unsupported", "spec.externalTrafficPolicy: %q is not served yet: Cluster is", svc.Spec.ExternalTrafficPolicy)
	}
	if p := svc.Spec.InternalTrafficPolicy; p != nil && *p == corev1.ServiceInternalTrafficPolicyLocal {
		t.problem("Unsupported", "spec.internalTrafficPolicy: %q is not served yet: Cluster is", *p)
	}
	if len(svc.Spec.LoadBalancerSourceRanges) > 0 {
		t.problem("Unsupported", "spec.loadBalancerSourceRanges: %q is not served yet: every source may connect", svc.Spec.LoadBalancerSourceRanges)
	}
	families := familiesOf(svc)
	for i := range svc.Spec.Ports {
		port := &svc.Spec.Ports[i]
		protocol, ok := protocols[cmp.Or(port.Protocol, corev1.ProtocolTCP)]
		if !ok {
			t.problem("Unsupported", "spec.ports[%d].protocol: %q is not a protocol that IPVS balances", i, port.Protocol)
			continue
		}
		reals := [2][]ipvs.RealServer{ // IPv4, IPv6
			t.realServers(endpointSlices, port, discoveryv1.AddressTypeIPv4, svc.Spec.PublishNotReadyAddresses),
			t.realServers(endpointSlices, port, discoveryv1.AddressTypeIPv6, svc.Spec.PublishNotReadyAddresses),
		}
		serve := func(addr netip.Addr, number int32, vip, masquerade bool) {
			if !slices.Contains(families, familyOf(addr)) {
				return // such as a node's IPv6 address for a Service of IPv4 only
			}
			if n.Others[addr] {
				t.problem("NodeAddress", "%s is another node's address; it is not served here", addr)
				return
			}
			if slices.Contains(n.Addresses, addr) {
				vip = false // what else is at this address, such as ssh, is not ours to reject
			}
			t.serve(ipvs.At(protocol, netip.AddrPortFrom(addr, uint16(number))), reals, vip, masquerade)
		}
		for _, addr := range clusterIPs(svc) {
			serve(addr, port.Port, true, false)
		}
		for _, addr := range slices.Concat(externalIPs(svc), ingressIPs(svc)) {
			serve(addr, port.Port, true, true)
		}
		if port.NodePort > 0 {
			for _, addr := range n.NodePortAddrs {
				serve(addr, port.NodePort, false, true)
			}
		}
	}
	return t.state, t.problems
}

var protocols = map[corev1.Protocol]ipvs.Protocol{
	corev1.ProtocolTCP:  ipvs.TCP,
	corev1.ProtocolUDP:  ipvs.UDP,
	corev1.ProtocolSCTP: ipvs.SCTP,
}

type translation struct {
	node        NodeView
	scheduler   string
	persistence uint32
	state       ipvs.State
	problems    []Problem
}

func (t *translation) problem(reason, format string, args ...any) {
	t.problems = append(t.problems, Problem{reason, fmt.Sprintf(format, args...)})
}

// serve adds a frontend. vip: the address is the Service's, not the node's own, and nothing else may answer there.
func (t *translation) serve(f ipvs.Frontend, reals [2][]ipvs.RealServer, vip, masquerade bool) {
	addr := f.Addr.Addr()
	family := 0
	if addr.Is6() {
		family = 1
	}
	t.state.AddVirtualServer(ipvs.VirtualServer{
		Frontend:    f,
		Scheduler:   t.scheduler,
		Persistence: t.persistence,
	}, reals[family]...)
	t.state.AddFrontend(ipvs.Frontends, f)
	if masquerade {
		t.state.AddFrontend(ipvs.Masquerade, f)
	}
	if !vip {
		return
	}
	whole := netip.PrefixFrom(addr, addr.BitLen())
	t.state.AddPrefix(ipvs.VIPs, whole)
	if !slices.ContainsFunc(t.node.ServiceCIDRs, func(p netip.Prefix) bool { return p.Contains(addr) }) {
		t.state.AddRoute(whole, t.node.Address(addr.Is6()))
	}
}

// realServers is the endpoints of one family that serve a port: the ready ones, or if there is none those that
// still serve while they terminate (KEP-1672). Endpoints of this node are noted for hairpin.
func (t *translation) realServers(from []*discoveryv1.EndpointSlice, port *corev1.ServicePort, family discoveryv1.AddressType, notReadyToo bool) []ipvs.RealServer {
	ready, terminating := map[netip.AddrPort]bool{}, map[netip.AddrPort]bool{} // to whether it is local
	for _, slice := range from {
		if slice.AddressType != family {
			continue
		}
		number, ok := targetPort(slice, port.Name)
		if !ok {
			continue
		}
		for i := range slice.Endpoints {
			e := &slice.Endpoints[i]
			local := e.NodeName != nil && *e.NodeName == t.node.Name
			for _, text := range e.Addresses {
				addr, err := netip.ParseAddr(text)
				if err != nil || addr.Is4() != (family == discoveryv1.AddressTypeIPv4) {
					t.problem("InvalidEndpoint", "EndpointSlice %s: address %q is not of family %s; it is left out", slice.Name, text, family)
					continue
				}
				switch at := netip.AddrPortFrom(addr, number); {
				case notReadyToo || isTrue(e.Conditions.Ready, true):
					ready[at] = local
				case isTrue(e.Conditions.Serving, false) && isTrue(e.Conditions.Terminating, false):
					terminating[at] = local
				}
			}
		}
	}
	if len(ready) == 0 {
		ready = terminating
	}
	reals := make([]ipvs.RealServer, 0, len(ready))
	for at, local := range ready {
		reals = append(reals, ipvs.RealServer{Addr: at, Weight: 1})
		if local {
			t.state.AddPrefix(ipvs.Hairpin, netip.PrefixFrom(at.Addr(), at.Addr().BitLen()))
		}
	}
	return reals
}

// targetPort is the number that a slice's endpoints give the Service port of a name. A slice with a nil port number
// serves every port (discovery/v1 EndpointPort); no Service port can be translated to that.
func targetPort(slice *discoveryv1.EndpointSlice, name string) (uint16, bool) {
	for _, p := range slice.Ports {
		if deref(p.Name) == name && p.Port != nil && *p.Port > 0 && *p.Port < 65536 {
			return uint16(*p.Port), true
		}
	}
	return 0, false
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

// servedFamilies is the families in which somebody serves a Service.
func servedFamilies(s ipvs.State) []corev1.IPFamily {
	var served []corev1.IPFamily
	for f, reals := range s.RealServers {
		if family := familyOf(f.Addr.Addr()); len(reals) > 0 && !slices.Contains(served, family) {
			served = append(served, family)
		}
	}
	return served
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
