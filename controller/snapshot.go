// Package controller is what longshore does with Kubernetes objects: the agent's loop (Services into the kernel,
// addresses onto the network) and the cluster's loop (addresses out of pools onto Services).
//
// It is the only package that knows Kubernetes types. What is decided is decided by pure functions, [Translate],
// [Announce] and the [Allocator]; the loops own all state in one goroutine each, and everything else, informers,
// files, members, timers, only pokes them.
package controller

import (
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"

	"github.com/longshore-lb/longshore/config/v1beta1"
	"github.com/longshore-lb/longshore/config/v1beta2"
)

// Object is a Kubernetes object of any kind.
type Object interface {
	runtime.Object
	metav1.Object
}

// Inbox is where objects arrive, from informers or from files, for one loop. Of several changes to one object only
// the last is kept, so a loop that is busy falls behind by work, never by memory. It is safe for concurrent use.
type Inbox struct {
	mu      sync.Mutex
	pending map[inboxKey]change
	last    time.Time // when the last change arrived
	poke    chan struct{}
	synced  bool
}

type inboxKey struct {
	kind reflect.Type
	name types.NamespacedName
}

type change struct {
	object  Object
	slice   *endpointSlice // in the place of object, if that is an EndpointSlice
	deleted bool
	arrived time.Time // the first of the changes that came together
}

// NewInbox returns an empty inbox.
func NewInbox() *Inbox {
	return &Inbox{pending: map[inboxKey]change{}, poke: make(chan struct{}, 1)}
}

// Put adds or replaces an object, which must not be changed afterwards.
func (b *Inbox) Put(o Object) { b.add(o, false) }

// Remove says that an object is gone; only its kind, namespace and name matter.
func (b *Inbox) Remove(o Object) { b.add(o, true) }

func (b *Inbox) add(o Object, deleted bool) {
	key, c := newChange(o, deleted)
	b.mu.Lock()
	defer b.mu.Unlock()
	b.last = c.arrived
	if before, ok := b.pending[key]; ok {
		c.arrived = before.arrived
	}
	b.pending[key] = c
	b.signal()
}

func newChange(o Object, deleted bool) (inboxKey, change) {
	key := inboxKey{reflect.TypeOf(o), nameOf(o)}
	c := change{object: o, deleted: deleted, arrived: time.Now()}
	if s, ok := o.(*discoveryv1.EndpointSlice); ok {
		c.slice, c.object = newEndpointSlice(s), nil
	}
	return key, c
}

// Synced says that all objects there were at the start have arrived. Loops change nothing before that, so they count as
// arrived now.
func (b *Inbox) Synced() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.synced = true
	for key, c := range b.pending {
		c.arrived = time.Now()
		b.pending[key] = c
	}
	b.signal()
}

func (b *Inbox) signal() {
	select {
	case b.poke <- struct{}{}:
	default:
	}
}

// take returns what arrived since the last call, nothing before the inbox is synced.
func (b *Inbox) take() (changes []change, synced bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.synced {
		return nil, false
	}
	changes = slices.Collect(maps.Values(b.pending))
	b.pending = map[inboxKey]change{} // not cleared: it was large once
	return changes, true
}

func nameOf(o metav1.Object) types.NamespacedName {
	return types.NamespacedName{Namespace: o.GetNamespace(), Name: o.GetName()}
}

// snapshot is the objects as they arrived last. It belongs to one loop.
type snapshot struct {
	services     map[types.NamespacedName]*corev1.Service
	slices       map[types.NamespacedName][]*endpointSlice     // of each Service, by name
	serviceOf    map[types.NamespacedName]types.NamespacedName // of each EndpointSlice
	podWeights   map[string]podWeight                          // of the pods that say one, by namespace/name
	watchesPods  bool
	nodes        map[types.NamespacedName]*corev1.Node
	agents       map[string]bool // nodes that have an agent, by their Leases
	namespaces   map[types.NamespacedName]*corev1.Namespace
	serviceCIDRs map[types.NamespacedName]*networkingv1.ServiceCIDR
	pools        map[types.NamespacedName]*v1beta1.IPAddressPool
	layer2       map[types.NamespacedName]*v1beta1.L2Advertisement
	bgp          map[types.NamespacedName]*v1beta1.BGPAdvertisement
	communities  map[types.NamespacedName]*v1beta1.Community
	peers        map[types.NamespacedName]*v1beta2.BGPPeer
	profiles     map[types.NamespacedName]*v1beta1.BFDProfile
}

func newSnapshot() *snapshot {
	return &snapshot{
		services:     map[types.NamespacedName]*corev1.Service{},
		slices:       map[types.NamespacedName][]*endpointSlice{},
		serviceOf:    map[types.NamespacedName]types.NamespacedName{},
		podWeights:   map[string]podWeight{},
		nodes:        map[types.NamespacedName]*corev1.Node{},
		agents:       map[string]bool{},
		namespaces:   map[types.NamespacedName]*corev1.Namespace{},
		serviceCIDRs: map[types.NamespacedName]*networkingv1.ServiceCIDR{},
		pools:        map[types.NamespacedName]*v1beta1.IPAddressPool{},
		layer2:       map[types.NamespacedName]*v1beta1.L2Advertisement{},
		bgp:          map[types.NamespacedName]*v1beta1.BGPAdvertisement{},
		communities:  map[types.NamespacedName]*v1beta1.Community{},
		peers:        map[types.NamespacedName]*v1beta2.BGPPeer{},
		profiles:     map[types.NamespacedName]*v1beta1.BFDProfile{},
	}
}

// touched is what a run of changes concerns.
type touched struct {
	services   map[types.NamespacedName]struct{} // Services that changed, or whose endpoints did
	nodes      bool                              // Nodes, ServiceCIDRs
	agents     bool                              // nodes that have an agent
	node       bool                              // this node's view
	namespaces bool
	config     bool // objects of group metallb.io
}

// update takes changes in and tells what they touch.
func (s *snapshot) update(changes []change) touched {
	t := touched{services: map[types.NamespacedName]struct{}{}}
	for _, c := range changes {
		if c.slice != nil {
			for _, service := range s.updateSlice(c.slice, c.deleted) {
				t.services[service] = struct{}{}
			}
			continue
		}
		name := nameOf(c.object)
		switch o := c.object.(type) {
		case *corev1.Service:
			keep(s.services, name, o, c.deleted)
			t.services[name] = struct{}{}
		case *metav1.PartialObjectMetadata:
			for _, service := range s.updatePod(o, c.deleted) {
				t.services[service] = struct{}{}
			}
		case *corev1.Node:
			keep(s.nodes, name, o, c.deleted)
			t.nodes = true
		case *coordinationv1.Lease:
			if node, ok := strings.CutPrefix(o.Name, agentLeasePrefix); ok { // of one that is deleted only the name is known
				s.agents[node] = !c.deleted
				t.agents = true
			}
		case *corev1.Namespace:
			keep(s.namespaces, name, o, c.deleted)
			t.namespaces = true
		case *networkingv1.ServiceCIDR:
			keep(s.serviceCIDRs, name, o, c.deleted)
			t.nodes = true
		case *v1beta1.IPAddressPool:
			t.config = t.config || c.deleted || !sameButStatus(s.pools[name], o)
			keep(s.pools, name, o, c.deleted)
		case *v1beta1.L2Advertisement:
			t.config = t.config || c.deleted || !sameGeneration(s.layer2[name], o)
			keep(s.layer2, name, o, c.deleted)
		case *v1beta1.BGPAdvertisement:
			t.config = t.config || c.deleted || !sameGeneration(s.bgp[name], o)
			keep(s.bgp, name, o, c.deleted)
		case *v1beta1.Community:
			t.config = t.config || c.deleted || !sameGeneration(s.communities[name], o)
			keep(s.communities, name, o, c.deleted)
		case *v1beta2.BGPPeer:
			t.config = t.config || c.deleted || !sameGeneration(s.peers[name], o)
			keep(s.peers, name, o, c.deleted)
		case *v1beta1.BFDProfile:
			t.config = t.config || c.deleted || !sameGeneration(s.profiles[name], o)
			keep(s.profiles, name, o, c.deleted)
		}
	}
	return t
}

func keep[T Object](m map[types.NamespacedName]T, name types.NamespacedName, o T, deleted bool) {
	if deleted {
		delete(m, name)
	} else {
		m[name] = o
	}
}

// sameButStatus tells whether a pool differs in nothing that matters here: its counts change with every allocation.
func sameButStatus(a, b *v1beta1.IPAddressPool) bool {
	return a != nil && reflect.DeepEqual(a.Spec, b.Spec) && maps.Equal(a.Labels, b.Labels) && a.UID == b.UID
}

// sameGeneration tells whether an object differs in nothing but its status, as far as the API server counts.
func sameGeneration[T Object](a, b T) bool {
	return !reflect.ValueOf(a).IsNil() && b.GetGeneration() != 0 && a.GetGeneration() == b.GetGeneration() && a.GetUID() == b.GetUID() &&
		maps.Equal(a.GetLabels(), b.GetLabels()) && maps.Equal(a.GetAnnotations(), b.GetAnnotations())
}

// updateSlice files an EndpointSlice under the Service it names (label kubernetes.io/service-name), and tells which
// Services it concerns: with another label it leaves one for the other.
func (s *snapshot) updateSlice(o *endpointSlice, deleted bool) []types.NamespacedName {
	var concerned []types.NamespacedName
	if was, ok := s.serviceOf[o.name]; ok {
		concerned = append(concerned, was)
		delete(s.serviceOf, o.name)
		s.slices[was] = slices.DeleteFunc(s.slices[was], func(e *endpointSlice) bool { return e.name == o.name })
		if len(s.slices[was]) == 0 {
			delete(s.slices, was)
		}
	}
	if deleted {
		return concerned
	}
	s.serviceOf[o.name] = o.service
	s.slices[o.service] = append(s.slices[o.service], o)
	slices.SortFunc(s.slices[o.service], func(a, b *endpointSlice) int { return compareNames(a.name, b.name) })
	return append(concerned, o.service)
}

// slicesOf is the EndpointSlices of a Service in the order of their names.
func (s *snapshot) slicesOf(service types.NamespacedName) []*endpointSlice { return s.slices[service] }

// podWeight is the weight that a pod says. If what it says is wrong, that is a problem, and its last good weight stays.
type podWeight struct {
	weight  int32
	good    bool // there is a weight
	problem string
}

// updatePod notes a pod's weight, and tells which Services have the pod for an endpoint, if it is another one now.
func (s *snapshot) updatePod(o *metav1.PartialObjectMetadata, deleted bool) []types.NamespacedName {
	pod := nameOf(o).String()
	before := s.podWeights[pod]
	var now podWeight
	if text, says := o.Annotations[WeightAnnotation]; says && !deleted {
		var err error
		if now.weight, err = ParseWeight(text); err == nil {
			now.good = true
		} else {
			now = podWeight{before.weight, before.good, fmt.Sprintf("Pod %s: annotation %s: %v", pod, WeightAnnotation, err)}
		}
	}
	if now == before {
		return nil
	}
	if s.podWeights[pod] = now; now == (podWeight{}) {
		delete(s.podWeights, pod)
	}
	var concerned []types.NamespacedName
	for service, of := range s.slices {
		if slices.ContainsFunc(of, func(e *endpointSlice) bool {
			return slices.ContainsFunc(e.endpoints, func(p endpoint) bool { return p.pod == pod })
		}) {
			concerned = append(concerned, service)
		}
	}
	return concerned
}

func (s *snapshot) podWeight(pod string) podWeight { return s.podWeights[pod] }

// labelsOf is the labels of a node; none if it is not known.
func (s *snapshot) labelsOf(node string) labels.Set {
	if n := s.nodes[types.NamespacedName{Name: node}]; n != nil {
		return n.Labels
	}
	return nil
}

// sorted is the values of a map in the order of their names.
func sorted[T any](m map[types.NamespacedName]T) []T {
	names := slices.SortedFunc(maps.Keys(m), compareNames)
	out := make([]T, len(names))
	for i, n := range names {
		out[i] = m[n]
	}
	return out
}
