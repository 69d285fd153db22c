package controller

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
)

// Annotations on a Service that say which address it wants. Each is also read under the older prefix
// metallb.universe.tf/, the newer one wins.
const (
	addressesAnnotation = "metallb.io/loadBalancerIPs"
	poolAnnotation      = "metallb.io/address-pool"
	sharingAnnotation   = "metallb.io/allow-shared-ip"

	annotationPrefix    = "metallb.io/"
	oldAnnotationPrefix = "metallb.universe.tf/"

	loadBalancerIPField = "spec.loadBalancerIP"
)

// Port is a port of a Service, what Services that share an address must not have in common.
type Port struct {
	Protocol corev1.Protocol
	Port     int32
}

// String is the port as an operator writes it: 80/TCP.
func (p Port) String() string { return fmt.Sprintf("%d/%s", p.Port, p.Protocol) }

// Request is what one Service of type LoadBalancer asks of the [Allocator].
type Request struct {
	Key             string // namespace/name of the Service
	Namespace       string
	NamespaceLabels map[string]string // of its Namespace, for the pools' namespaceSelectors
	Labels          map[string]string // of the Service, for the pools' serviceSelectors

	Families         []corev1.IPFamily // one or two, the order that addresses are given in
	RequireDualStack bool              // nothing rather than only one family

	// Addresses, if there are any, are exactly those the Service wants, at most one of a family.
	Addresses     []netip.Addr
	AddressesFrom string // where they were written, for messages
	Pool          string // the pool it wants, "" = any that is given out automatically
	PoolFrom      string

	// SharingKey allows other Services with the same key on the address if their ports are disjoint and their
	// Backend is the same; "" = the address is for this Service alone.
	SharingKey string
	Ports      []Port
	Backend    string // "Cluster", or "Local:" and the selector with externalTrafficPolicy Local

	Created time.Time // who is older is served first
}

// RequestFor reads what a Service asks for, given the labels of its Namespace. It fails with an [*AllocationError] for
// what cannot be understood or contradicts itself. Such a Service is best left with the address it has, and the Request
// is then without a wish for addresses, good for [Allocator.Adopt].
func RequestFor(svc *corev1.Service, namespaceLabels map[string]string) (Request, error) {
	r := Request{
		Key:              svc.Namespace + "/" + svc.Name,
		Namespace:        svc.Namespace,
		NamespaceLabels:  namespaceLabels,
		Labels:           svc.Labels,
		RequireDualStack: svc.Spec.IPFamilyPolicy != nil && *svc.Spec.IPFamilyPolicy == corev1.IPFamilyPolicyRequireDualStack,
		Families:         familiesOf(svc),
		Backend:          string(corev1.ServiceExternalTrafficPolicyCluster),
		Created:          svc.CreationTimestamp.Time,
	}
	if svc.Spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal {
		r.Backend = "Local:" + labels.Set(svc.Spec.Selector).String()
	}
	for _, p := range svc.Spec.Ports {
		protocol := p.Protocol
		if protocol == "" {
			protocol = corev1.ProtocolTCP
		}
		r.Ports = append(r.Ports, Port{protocol, p.Port})
	}

	r.Pool, r.PoolFrom = annotation(svc, poolAnnotation)
	r.SharingKey, _ = annotation(svc, sharingAnnotation)

	list, from := annotation(svc, addressesAnnotation)
	if field := svc.Spec.LoadBalancerIP; field != "" {
		if list != "" {
			return r, r.refuse(from, list, "and %s %q are both set, only one may be", loadBalancerIPField, field)
		}
		list, from = field, loadBalancerIPField
	}
	if list == "" {
		return r, nil
	}
	var wanted []netip.Addr
	for text := range strings.SplitSeq(list, ",") {
		text = strings.TrimSpace(text)
		addr, err := netip.ParseAddr(text)
		if err != nil || addr.Zone() != "" {
			return r, r.refuse(from, text, "is not an IP address")
		}
		addr = addr.Unmap()
		if slices.ContainsFunc(wanted, func(other netip.Addr) bool { return other.Is4() == addr.Is4() }) {
			return r, r.refuse(from, list, "has more than one %s address", familyOf(addr))
		}
		wanted = append(wanted, addr)
	}
	r.Addresses, r.AddressesFrom = wanted, from
	return r, nil
}

// annotation returns an annotation's value without blanks around it and how to name it in a message.
func annotation(svc *corev1.Service, name string) (value, from string) {
	for _, name := range []string{name, oldAnnotationPrefix + strings.TrimPrefix(name, annotationPrefix)} {
		if value := strings.TrimSpace(svc.Annotations[name]); value != "" {
			return value, "annotation " + name
		}
	}
	return "", ""
}

// familiesOf follows the cluster IPs, which the API server gave after it looked at the policy. A Service that no API
// server has seen has its spec.ipFamilies, or else what its policy says.
func familiesOf(svc *corev1.Service) []corev1.IPFamily {
	var families []corev1.IPFamily
	for _, text := range svc.Spec.ClusterIPs {
		if addr, err := netip.ParseAddr(text); err == nil {
			families = append(families, familyOf(addr))
		}
	}
	if len(families) > 0 {
		return families
	}
	if len(svc.Spec.IPFamilies) > 0 {
		return slices.Clone(svc.Spec.IPFamilies)
	}
	if addr, err := netip.ParseAddr(svc.Spec.ClusterIP); err == nil {
		return []corev1.IPFamily{familyOf(addr)}
	}
	if policy := svc.Spec.IPFamilyPolicy; policy != nil && *policy != corev1.IPFamilyPolicySingleStack {
		return []corev1.IPFamily{corev1.IPv4Protocol, corev1.IPv6Protocol}
	}
	return []corev1.IPFamily{corev1.IPv4Protocol}
}

func familyOf(addr netip.Addr) corev1.IPFamily {
	if addr.Unmap().Is4() {
		return corev1.IPv4Protocol
	}
	return corev1.IPv6Protocol
}

// AllocationError says why a Service has no address, or not the one it asks for.
type AllocationError struct {
	Key    string // namespace/name of the Service
	Field  string // what has to change, such as "annotation metallb.io/loadBalancerIPs"; may be empty
	Value  string // of that field; may be empty
	Reason string
}

func (r Request) refuse(field, value, reason string, args ...any) *AllocationError {
	return &AllocationError{Key: r.Key, Field: field, Value: value, Reason: fmt.Sprintf(reason, args...)}
}

// Error is the whole message: service default/web: annotation metallb.io/loadBalancerIPs: "192.0.2.9" is in no pool.
func (e *AllocationError) Error() string { return "service " + e.Key + ": " + e.Message() }

// Message is the error without the Service's name, for an event on the Service itself.
func (e *AllocationError) Message() string {
	message := e.Reason
	if e.Value != "" {
		message = fmt.Sprintf("%q %s", e.Value, message)
	}
	if e.Field != "" {
		message = e.Field + ": " + message
	}
	return message
}
