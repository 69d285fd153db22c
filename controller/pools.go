package controller

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/longshore-lb/longshore/config"
	"github.com/longshore-lb/longshore/config/v1beta1"
)

// goodPools turns IPAddressPools into pools. A pool in use that is edited into one that is wrong, or that overlaps
// another, stays as it last was, and a new pool never takes the place of one in use: no Service loses its address to a
// typing error.
type goodPools struct {
	last map[types.NamespacedName]*v1beta1.IPAddressPool // as they were when they were last in use
}

// refusedPool is a pool whose present form is not in use.
type refusedPool struct {
	object *v1beta1.IPAddressPool
	err    error
}

// parse returns the pools in use, and the objects that are not used as they are.
func (g *goodPools) parse(objects map[types.NamespacedName]*v1beta1.IPAddressPool) ([]config.Pool, []refusedPool) {
	inUse := maps.Clone(objects)
	refused := map[types.NamespacedName]error{}
	if !compatible(inUse) {
		inUse, refused = g.accept(objects)
	}
	g.last = inUse
	pools, _ := config.ParsePools(sorted(inUse)) // they are compatible
	var out []refusedPool
	for _, o := range sorted(objects) {
		if err := refused[nameOf(o)]; err != nil {
			out = append(out, refusedPool{o, err})
		}
	}
	return pools, out
}

// accept begins with the forms in use and takes over the present ones that go with them, the oldest first, until no more
// do: one may make room for another.
func (g *goodPools) accept(objects map[types.NamespacedName]*v1beta1.IPAddressPool) (inUse map[types.NamespacedName]*v1beta1.IPAddressPool, refused map[types.NamespacedName]error) {
	inUse = map[types.NamespacedName]*v1beta1.IPAddressPool{}
	for name := range objects {
		if last, ok := g.last[name]; ok {
			inUse[name] = last
		}
	}
	open := slices.SortedStableFunc(slices.Values(sorted(objects)), func(a, b *v1beta1.IPAddressPool) int {
		return a.CreationTimestamp.Compare(b.CreationTimestamp.Time)
	})
	for progress := true; progress; {
		progress = false
		refused = map[types.NamespacedName]error{}
		var still []*v1beta1.IPAddressPool
		for _, o := range open {
			if err := fits(o, inUse); err != nil {
				refused[nameOf(o)] = err
				still = append(still, o)
				continue
			}
			inUse[nameOf(o)] = o
			progress = true
		}
		open = still
	}
	return inUse, refused
}

// fits tells why a pool cannot take the place of its namesake among others, nil if it can.
func fits(o *v1beta1.IPAddressPool, others map[types.NamespacedName]*v1beta1.IPAddressPool) error {
	for _, other := range sorted(others) {
		if other.Name == o.Name && other.Namespace != o.Namespace {
			return fmt.Errorf("IPAddressPool %s: metadata.name: %q: is the name of IPAddressPool %s already", nameOf(o), o.Name, nameOf(other))
		}
	}
	youngest := o.DeepCopy() // of two that overlap the younger one is refused
	youngest.CreationTimestamp = metav1.NewTime(time.Unix(1<<40, 0))
	all := maps.Clone(others)
	all[nameOf(o)] = youngest
	_, errs := config.ParsePools(sorted(all))
	return errors.Join(errs...)
}

// compatible tells whether all pools can be in use as they are.
func compatible(objects map[types.NamespacedName]*v1beta1.IPAddressPool) bool {
	names := map[string]bool{}
	for _, o := range objects {
		names[o.Name] = true
	}
	_, errs := config.ParsePools(sorted(objects))
	return len(errs) == 0 && len(names) == len(objects)
}
