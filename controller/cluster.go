package controller

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/longshore-lb/longshore/config/v1beta1"
)

// AllocatedFromAnnotation on a Service names the pool its addresses are from. We write it.
const AllocatedFromAnnotation = "metallb.io/ip-allocated-from-pool"

// StatusWriter puts what was allocated where everybody sees it.
type StatusWriter interface {
	// WriteAddresses replaces the addresses in a Service's status (entries that are hostnames stay) and the
	// pool in its annotation. No addresses: both go.
	WriteAddresses(ctx context.Context, svc *corev1.Service, addrs []netip.Addr, pool string) error
	// WritePool writes the counts in the status of a pool.
	WritePool(ctx context.Context, pool *v1beta1.IPAddressPool) error
	// WriteCondition writes one condition in the status of an object of group metallb.io.
	WriteCondition(ctx context.Context, o Object, c metav1.Condition) error
}

// ClusterOptions is what the cluster's loop works with.
type ClusterOptions struct {
	Class  string // spec.loadBalancerClass of the Services to serve; "" = those without one
	Inbox  *Inbox
	Writer StatusWriter
	Events Events
	Log    *slog.Logger
}

// Cluster gives addresses of pools to Services of type LoadBalancer. One of them works in a cluster at a time.
type Cluster struct {
	ClusterOptions

	// All of what follows belongs to Run.
	metrics  allocatorMetrics
	snapshot *snapshot
	alloc    *Allocator
	whole    bool // there are pools, and all of them are in use
	pools    goodPools
	unusable []refusedPool                   // pools that are not in use as they are
	unjudged bool                            // not all conditions could be written
	told     map[types.NamespacedName]string // the last event about a Service that is in trouble
	refused  map[types.NamespacedName]string // the last event about a pool that is not in use as it is
}

// NewCluster returns a loop that does nothing until Run.
func NewCluster(o ClusterOptions) *Cluster {
	return &Cluster{ClusterOptions: o, metrics: newAllocatorMetrics(), snapshot: newSnapshot(), alloc: NewAllocator(), told: map[types.NamespacedName]string{}}
}

// Run allocates until ctx ends.
func (c *Cluster) Run(ctx context.Context) {
	retry := time.NewTimer(0)
	retry.Stop()
	unwritten := map[types.NamespacedName]struct{}{}
	for {
		select {
		case <-ctx.Done():
			return
		case <-c.Inbox.poke:
		case <-retry.C:
		}
		changes, synced := c.Inbox.take()
		if !synced {
			continue
		}
		t := c.snapshot.update(changes)
		maps.Copy(t.services, unwritten)
		unwritten = c.pass(ctx, t)
		if len(unwritten) > 0 || c.unjudged {
			retry.Reset(retryAfter)
		}
	}
}

// pass allocates what the changes call for and returns the Services whose status could not be written.
func (c *Cluster) pass(ctx context.Context, t touched) (unwritten map[types.NamespacedName]struct{}) {
	if t.nodes {
		c.alloc.SetReserved(c.nodeAddresses())
	}
	if t.config {
		pools, refused := c.pools.parse(c.snapshot.pools)
		c.reportPools(refused)
		c.unusable = refused
		c.whole = len(pools) > 0 && len(refused) == 0
		for _, key := range c.alloc.SetPools(pools) {
			t.services[parseKey(key)] = struct{}{}
		}
		for name, svc := range c.snapshot.services {
			got, holds := c.alloc.Assigned(name.String())
			if holds && got.Pool != svc.Annotations[AllocatedFromAnnotation] || // its address is in another pool now
				!holds && len(ingressIPs(svc)) > 0 { // it kept an address that was in no pool, and may be in one now
				t.services[name] = struct{}{}
			}
		}
	}
	if t.namespaces { // a label of a namespace may open or close pools
		for name := range c.snapshot.services {
			t.services[name] = struct{}{}
		}
	}
	unwritten = map[types.NamespacedName]struct{}{}
	settle := func(svc *corev1.Service) {
		if err := c.settle(ctx, svc); err != nil {
			c.Log.Error("cannot write a Service's status, trying again", "service", nameOf(svc).String(), "error", err)
			unwritten[nameOf(svc)] = struct{}{}
		}
	}
	for name := range t.services {
		if svc := c.snapshot.services[name]; svc == nil || !c.ours(svc) {
			c.alloc.Release(name.String())
			if svc == nil {
				delete(c.told, name)
			} else if svc.Annotations[AllocatedFromAnnotation] != "" {
				if err := c.clear(ctx, svc); err != nil {
					c.Log.Error("cannot clear a Service's status, trying again", "service", name.String(), "error", err)
					unwritten[name] = struct{}{}
				}
			}
		}
	}
	for _, svc := range c.oldestFirst(maps.Keys(t.services)) { // who comes with an address keeps it before anybody gets one
		if _, holds := c.alloc.Assigned(nameOf(svc).String()); !holds {
			c.adopt(svc)
		}
	}
	for _, svc := range c.oldestFirst(maps.Keys(t.services)) { // who has an address keeps or changes it first
		if _, holds := c.alloc.Assigned(nameOf(svc).String()); holds {
			settle(svc)
		}
	}
	c.serveWaiting(settle)
	for _, svc := range c.oldestFirst(maps.Keys(t.services)) {
		if _, holds := c.alloc.Assigned(nameOf(svc).String()); !holds {
			settle(svc)
		}
	}
	c.serveWaiting(settle)
	c.writePools(ctx)
	if t.config || c.unjudged {
		c.unjudged = !c.writeConditions(ctx)
	}
	return unwritten
}

func (c *Cluster) serveWaiting(settle func(*corev1.Service)) {
	for r := range c.alloc.Waiting() {
		if svc := c.snapshot.services[parseKey(r.Key)]; svc != nil && c.ours(svc) {
			settle(svc)
		} else {
			c.alloc.Release(r.Key)
		}
	}
}

// ours tells whether a Service asks this load balancer for an address.
func (c *Cluster) ours(svc *corev1.Service) bool {
	class := deref(svc.Spec.LoadBalancerClass)
	return svc.Spec.Type == corev1.ServiceTypeLoadBalancer && class == c.Class && svc.DeletionTimestamp == nil
}

func (c *Cluster) oldestFirst(names func(func(types.NamespacedName) bool)) []*corev1.Service {
	var out []*corev1.Service
	for name := range names {
		if svc := c.snapshot.services[name]; svc != nil && c.ours(svc) {
			out = append(out, svc)
		}
	}
	slices.SortFunc(out, func(a, b *corev1.Service) int {
		if d := a.CreationTimestamp.Compare(b.CreationTimestamp.Time); d != 0 {
			return d
		}
		return compareNames(nameOf(a), nameOf(b))
	})
	return out
}

func (c *Cluster) request(svc *corev1.Service) (Request, error) {
	var namespaceLabels map[string]string
	if ns := c.snapshot.namespaces[types.NamespacedName{Name: svc.Namespace}]; ns != nil {
		namespaceLabels = ns.Labels
	}
	return RequestFor(svc, namespaceLabels)
}

func (c *Cluster) adopt(svc *corev1.Service) {
	addrs := ingressIPs(svc)
	if len(addrs) == 0 {
		return
	}
	r, _ := c.request(svc) // a request that cannot be understood still says who it is; settle reports it
	if err := c.alloc.Adopt(r, addrs); err != nil {
		c.Log.Warn("a Service's address cannot be kept", "error", err)
	}
}

// settle makes a Service's status what the allocator says.
func (c *Cluster) settle(ctx context.Context, svc *corev1.Service) error {
	name := nameOf(svc)
	r, err := c.request(svc)
	if err != nil { // what cannot be understood leaves the Service as it is
		c.warn(svc, err)
		return nil
	}
	had := ingressIPs(svc)
	if _, holds := c.alloc.Assigned(name.String()); !holds && len(had) > 0 && !c.whole {
		// Its pool may be one that cannot be used as it is, or be yet to come: no address is lost to that.
		c.warn(svc, fmt.Errorf("%s stays, though no pool in use has it, because not all pools can be used", quoted(had)))
		return nil
	}
	got, err := c.alloc.Assign(r)
	if err != nil {
		c.warn(svc, err)
		if len(had) > 0 {
			return c.clear(ctx, svc)
		}
		return nil
	}
	delete(c.told, name)
	if slices.Equal(had, got.Addresses) && svc.Annotations[AllocatedFromAnnotation] == got.Pool {
		return nil
	}
	if err := c.write(ctx, svc, got); err != nil {
		return err
	}
	if !slices.Equal(had, got.Addresses) {
		c.Events.Event(svc, corev1.EventTypeNormal, "IPAllocated", fmt.Sprintf("assigned IP %s from pool %s", quoted(got.Addresses), got.Pool))
		c.Log.Info("address allocated", "service", name.String(), "addresses", got.Addresses, "pool", got.Pool)
	}
	return nil
}

// write writes a Service's status, and takes it for what the Service is from now on: it may be looked at again before it
// comes back.
func (c *Cluster) write(ctx context.Context, svc *corev1.Service, a Assignment) error {
	if err := c.Writer.WriteAddresses(ctx, svc, a.Addresses, a.Pool); err != nil {
		return err
	}
	written := svc.DeepCopy()
	written.Status.LoadBalancer.Ingress = ingressWith(svc, a.Addresses)
	delete(written.Annotations, AllocatedFromAnnotation)
	if a.Pool != "" {
		metav1.SetMetaDataAnnotation(&written.ObjectMeta, AllocatedFromAnnotation, a.Pool)
	}
	c.snapshot.services[nameOf(svc)] = written
	return nil
}

func quoted(addrs []netip.Addr) string { return fmt.Sprintf("%q", addrs) }

// clear takes the addresses away from a Service that has lost them.
func (c *Cluster) clear(ctx context.Context, svc *corev1.Service) error {
	if err := c.write(ctx, svc, Assignment{}); err != nil {
		return err
	}
	if had := ingressIPs(svc); len(had) > 0 {
		c.Events.Event(svc, corev1.EventTypeWarning, "ClearAssignment", fmt.Sprintf("IP %s is no longer assigned", quoted(had)))
		c.Log.Warn("address taken away", "service", nameOf(svc).String(), "addresses", had)
	}
	return nil
}

// warn sends an event about a Service once for each new reason.
func (c *Cluster) warn(svc *corev1.Service, err error) {
	message := err.Error()
	if a := new(AllocationError); errors.As(err, &a) {
		message = a.Message()
	}
	if c.told[nameOf(svc)] == message {
		return
	}
	c.told[nameOf(svc)] = message
	c.Events.Event(svc, corev1.EventTypeWarning, "AllocationFailed", message)
	c.Log.Warn("no address for a Service", "error", err)
}

// reportPools sends an event about each pool whose present form is refused, once for each new reason.
func (c *Cluster) reportPools(refused []refusedPool) {
	before := c.refused
	c.refused = map[types.NamespacedName]string{}
	for _, r := range refused {
		name, message := nameOf(r.object), r.err.Error()
		c.refused[name] = message
		if before[name] != message {
			c.Events.Event(r.object, corev1.EventTypeWarning, "ConfigurationRefused", message)
			c.Log.Warn("pool refused", "error", r.err)
		}
	}
}

// writePools brings the pools' counts up to date.
func (c *Cluster) writePools(ctx context.Context) {
	counts := map[string]PoolCounts{}
	defer func() { c.metrics.pools(counts) }()
	for name, p := range c.snapshot.pools {
		n := c.alloc.Counts(p.Name)
		counts[p.Name] = n
		had := PoolCounts{
			AssignedIPv4: p.Status.AssignedIPv4, AssignedIPv6: p.Status.AssignedIPv6,
			AvailableIPv4: p.Status.AvailableIPv4, AvailableIPv6: p.Status.AvailableIPv6,
		}
		if had == n {
			continue
		}
		changed := p.DeepCopy()
		changed.Status.AssignedIPv4, changed.Status.AssignedIPv6 = n.AssignedIPv4, n.AssignedIPv6
		changed.Status.AvailableIPv4, changed.Status.AvailableIPv6 = n.AvailableIPv4, n.AvailableIPv6
		if err := c.Writer.WritePool(ctx, changed); err != nil {
			c.Log.Warn("cannot write a pool's status", "pool", name.String(), "error", err)
			continue
		}
		c.snapshot.pools[name] = changed
	}
}

// nodeAddresses is the addresses that machines have: they are never given out.
func (c *Cluster) nodeAddresses() map[netip.Addr]string {
	owners := map[netip.Addr]string{}
	for _, n := range c.snapshot.nodes {
		for _, addr := range n.Status.Addresses {
			for _, a := range addresses([]string{addr.Address}) {
				owners[a] = "node " + n.Name
			}
		}
	}
	return owners
}

func parseKey(key string) types.NamespacedName {
	namespace, name, _ := strings.Cut(key, "/")
	return types.NamespacedName{Namespace: namespace, Name: name}
}
