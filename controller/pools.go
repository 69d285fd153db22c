package controller

import (
	"errors"
	"maps"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/types"

	"github.com/longshore-lb/longshore/config"
	"github.com/longshore-lb/longshore/config/v1beta1"
)

// goodPools turns IPAddressPools into pools. A pool that was good and is edited into one that is wrong, or that
// overlaps another, stays as it last was: no Service loses its address to a typing error.
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
	pools, errs := config.ParsePools(sorted(objects))
	var refused []refusedPool
	fallback := maps.Clone(objects)
	for _, o := range sorted(objects) {
		if slices.ContainsFunc(pools, func(p config.Pool) bool { return p.Name == o.Name }) {
			continue
		}
		refused = append(refused, refusedPool{o, about(o, errs)})
		if old, ok := g.last[nameOf(o)]; ok {
			fallback[nameOf(o)] = old
		} else {
			delete(fallback, nameOf(o))
		}
	}
	if len(refused) > 0 {
		pools, _ = config.ParsePools(sorted(fallback))
	}
	g.last = map[types.NamespacedName]*v1beta1.IPAddressPool{}
	for name, o := range fallback {
		if slices.ContainsFunc(pools, func(p config.Pool) bool { return p.Name == o.Name }) {
			g.last[name] = o
		}
	}
	return pools, refused
}

// about picks the errors that begin with an object's name.
func about(o *v1beta1.IPAddressPool, errs []error) error {
	var own []error
	for _, err := range errs {
		if strings.HasPrefix(err.Error(), "IPAddressPool "+nameOf(o).String()+":") {
			own = append(own, err)
		}
	}
	return errors.Join(own...)
}
