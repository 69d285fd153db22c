package controller

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"time"
	"unique"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/types"
)

// endpointSlice is what is kept of an EndpointSlice: an eighth of the memory, and parsed once.
type endpointSlice struct {
	name      types.NamespacedName
	service   types.NamespacedName // label kubernetes.io/service-name
	family    corev1.IPFamily
	ports     []endpointPort
	endpoints []endpoint
	problems  []Problem
	triggered time.Time // annotation endpoints.kubernetes.io/last-change-trigger-time, zero if there is none
}

type endpointPort struct {
	name     string
	protocol corev1.Protocol
	number   uint16
}

// endpoint is one address of an EndpointSlice.
type endpoint struct {
	addr                        netip.Addr
	node                        string
	pod                         string // namespace/name, "" if it is none
	forZones, forNodes          []string
	ready, serving, terminating bool
}

// newEndpointSlice takes from an EndpointSlice what the data plane needs. An address that is not of the slice's family is
// a problem of its own and is left out.
func newEndpointSlice(o *discoveryv1.EndpointSlice) *endpointSlice {
	s := &endpointSlice{
		name:    nameOf(o),
		service: types.NamespacedName{Namespace: o.Namespace, Name: o.Labels[discoveryv1.LabelServiceName]},
		family:  corev1.IPFamily(o.AddressType),
	}
	if at, err := time.Parse(time.RFC3339Nano, o.Annotations[corev1.EndpointsLastChangeTriggerTime]); err == nil {
		s.triggered = at
	}
	if _, headless := o.Labels[corev1.IsHeadlessService]; headless {
		s.service.Name = "" // it has no virtual server (kubernetes/enhancements, KEP-2447)
	}
	if o.AddressType == discoveryv1.AddressTypeFQDN {
		s.problems = append(s.problems, Problem{"InvalidEndpoint",
			fmt.Sprintf("EndpointSlice %s: addressType %q is not served; it is left out", o.Name, o.AddressType)})
		return s
	}
	for _, p := range o.Ports {
		// A nil port number serves every port (discovery/v1 EndpointPort); no Service port can be translated to that.
		if p.Port != nil && *p.Port > 0 && *p.Port < 65536 {
			protocol := corev1.ProtocolTCP
			if p.Protocol != nil {
				protocol = *p.Protocol
			}
			s.ports = append(s.ports, endpointPort{intern(deref(p.Name)), protocol, uint16(*p.Port)})
		}
	}
	s.endpoints = make([]endpoint, 0, len(o.Endpoints))
	for i := range o.Endpoints {
		s.add(&o.Endpoints[i])
	}
	return s
}

func (s *endpointSlice) add(e *discoveryv1.Endpoint) {
	out := endpoint{
		node:        intern(deref(e.NodeName)),
		ready:       isTrue(e.Conditions.Ready, true),
		terminating: isTrue(e.Conditions.Terminating, false),
	}
	out.serving = isTrue(e.Conditions.Serving, out.ready)
	if e.TargetRef != nil && e.TargetRef.Kind == "Pod" {
		out.pod = cmp.Or(e.TargetRef.Namespace, s.name.Namespace) + "/" + e.TargetRef.Name
	}
	if e.Hints != nil {
		for _, z := range e.Hints.ForZones {
			out.forZones = append(out.forZones, intern(z.Name))
		}
		for _, n := range e.Hints.ForNodes {
			out.forNodes = append(out.forNodes, intern(n.Name))
		}
	}
	for _, text := range e.Addresses {
		addr, err := netip.ParseAddr(text)
		if err != nil || familyOf(addr) != s.family {
			s.problems = append(s.problems, Problem{"InvalidEndpoint",
				fmt.Sprintf("EndpointSlice %s: address %q is not of family %s; it is left out", s.name.Name, text, s.family)})
			continue
		}
		out.addr = addr.Unmap()
		s.endpoints = append(s.endpoints, out)
	}
}

// intern keeps one copy of a string that many endpoints have.
func intern(s string) string { return unique.Make(s).Value() }

// candidate is an endpoint at one port.
type candidate struct {
	*endpoint
	at netip.AddrPort
}

// candidates is the endpoints of one family that a Service port leads to, by address. Of several at one address a ready
// one counts.
func candidates(from []*endpointSlice, port *corev1.ServicePort, family corev1.IPFamily) []candidate {
	var out []candidate
	for _, s := range from {
		if s.family != family {
			continue
		}
		i := slices.IndexFunc(s.ports, func(p endpointPort) bool {
			return p.name == port.Name && p.protocol == cmp.Or(port.Protocol, corev1.ProtocolTCP)
		})
		if i < 0 {
			continue
		}
		for k := range s.endpoints {
			e := &s.endpoints[k]
			out = append(out, candidate{e, netip.AddrPortFrom(e.addr, s.ports[i].number)})
		}
	}
	slices.SortStableFunc(out, func(a, b candidate) int {
		return cmp.Or(a.at.Compare(b.at), compareReadiness(a.endpoint, b.endpoint))
	})
	return slices.CompactFunc(out, func(a, b candidate) bool { return a.at == b.at })
}

func compareReadiness(a, b *endpoint) int {
	rank := func(e *endpoint) int {
		switch {
		case e.ready:
			return 0
		case e.serving:
			return 1
		}
		return 2
	}
	return cmp.Compare(rank(a), rank(b))
}

// chosen is the endpoints that take connections: those that every client may be sent to, and those on this node. In both
// sets they are the ready ones or, if there is none, those that still serve while they terminate (KEP-1669).
type chosen struct {
	cluster, local []candidate
	anywhere       []candidate      // cluster before the choice of the nearest
	leaving        []netip.AddrPort // that serve while they terminate
}

// choose picks from candidates. Readiness does not matter if notReadyToo (spec.publishNotReadyAddresses).
func choose(all []candidate, n NodeView, notReadyToo bool) chosen {
	local := func(c candidate) bool { return c.node == n.Name }
	var ready, terminating []candidate
	var c chosen
	for _, e := range all {
		switch {
		case e.ready || notReadyToo:
			ready = append(ready, e)
		case e.serving && e.terminating:
			terminating = append(terminating, e)
			c.leaving = append(c.leaving, e.at)
		}
	}
	c.anywhere, c.cluster = ready, nearest(ready, n)
	if len(ready) == 0 {
		c.anywhere, c.cluster = terminating, terminating
	}
	if c.local = only(ready, local); len(c.local) == 0 {
		c.local = only(terminating, local)
	}
	return c
}

// nearest is the endpoints whose hints name this node or, if there is none, its zone; all of them if any has no hint of
// that kind, or no hint matches (Kubernetes documentation, "Topology Aware Routing", "Traffic distribution").
func nearest(all []candidate, n NodeView) []candidate {
	for _, hint := range []struct {
		of   func(candidate) []string
		here string
	}{
		{func(c candidate) []string { return c.forNodes }, n.Name},
		{func(c candidate) []string { return c.forZones }, n.Zone},
	} {
		if hint.here == "" || slices.ContainsFunc(all, func(c candidate) bool { return len(hint.of(c)) == 0 }) {
			continue
		}
		if near := only(all, func(c candidate) bool { return slices.Contains(hint.of(c), hint.here) }); len(near) > 0 {
			return near
		}
	}
	return all
}

func only(all []candidate, keep func(candidate) bool) []candidate {
	var out []candidate
	for _, c := range all {
		if keep(c) {
			out = append(out, c)
		}
	}
	return out
}
