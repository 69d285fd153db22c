package controller

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"

	"github.com/longshore-lb/longshore/announcer"
	"github.com/longshore-lb/longshore/config"
)

// NetworkView is what announcements depend on besides Services.
type NetworkView struct {
	Node           string
	Pools          []config.Pool
	Unusable       []config.Pool // pools without ranges, because what was written is wrong and no better form is known
	Layer2         []config.L2Advertisement
	BGP            []config.BGPAdvertisement
	Nodes          map[string]labels.Set // those that may announce: alive, ready and not excluded, with their labels
	ThisNodeLabels labels.Set

	// Leaving says that this node is not among Nodes any more, because it is to be drained, and still advertises by BGP for a while.
	Leaving bool

	condition string // what else Nodes must fulfil
}

// only is the view with no other nodes than those that have an endpoint.
func (v NetworkView) only(reach map[string]bool) NetworkView {
	if reach[AnyNode] {
		return v
	}
	nodes := map[string]labels.Set{}
	for name := range reach {
		if l, ok := v.Nodes[name]; ok {
			nodes[name] = l
		}
	}
	v.Leaving = v.Leaving && reach[v.Node]
	v.Nodes, v.condition = nodes, ", and has an endpoint (externalTrafficPolicy Local)"
	return v
}

// Announced is what is to be done about one address of one Service, on this node.
type Announced struct {
	Service    types.NamespacedName
	Address    netip.Addr
	Pool       string
	Owner      string            // the one node that answers ARP or NDP for the address; "" = none does
	Interfaces []string          // on which the owner answers; empty = every usable one
	Routes     []announcer.Route // what this node advertises by BGP; those of one prefix may differ in their peers
	Reason     string            // why nobody announces the address at all; "" if somebody does
}

// Announce decides how the LoadBalancer addresses of a Service are announced. reach is the nodes that have an endpoint for
// it, by family, see [Translation]; other nodes do not announce it. An address is announced only if a pool of ours holds it, so that addresses which another provider wrote stay its own.
func Announce(svc *corev1.Service, reach map[corev1.IPFamily]map[string]bool, v NetworkView) []Announced {
	var out []Announced
	for _, addr := range ingressIPs(svc) {
		a := Announced{Service: nameOf(svc), Address: addr}
		pool, found := v.poolOf(addr, svc)
		a.Pool = pool.Name
		switch {
		case !found:
			a.Reason = "in no IPAddressPool"
		case len(reach[familyOf(addr)]) == 0:
			a.Reason = "no ready endpoint"
		default:
			v := v.only(reach[familyOf(addr)])
			selected := v.announceLayer2(&a, pool, svc.Labels)
			selectedBGP, advertised := v.announceBGP(&a, pool, svc.Labels)
			switch {
			case !selected && !selectedBGP:
				a.Reason = "no L2Advertisement and no BGPAdvertisement selects it"
			case len(v.Nodes) == 0:
				a.Reason = "no node is alive, ready and not excluded from load balancers" + v.condition
			case a.Owner == "" && !advertised:
				a.Reason = "the nodeSelectors of its advertisements select no node that is alive, ready and not excluded from load balancers" + v.condition
			}
		}
		out = append(out, a)
	}
	return out
}

// poolOf is the pool that holds an address. What was allocated from a pool that cannot be used any more is still announced
// as that pool's: the Service's annotation names it.
func (v NetworkView) poolOf(addr netip.Addr, svc *corev1.Service) (config.Pool, bool) {
	for _, p := range v.Pools {
		if p.Contains(addr) {
			return p, true
		}
	}
	from := strings.Split(svc.Annotations[AllocatedFromAnnotation], ",")
	for _, p := range v.Unusable {
		if slices.Contains(from, p.Name) {
			return p, true
		}
	}
	return config.Pool{}, false
}

// announceLayer2 elects the owner of an address among the nodes that an L2Advertisement selects.
func (v NetworkView) announceLayer2(a *Announced, pool config.Pool, serviceLabels labels.Set) (selected bool) {
	preference := map[string]int{}
	interfaces := map[string][]string{} // of each node
	for _, adv := range v.Layer2 {
		if !adv.SelectsPool(pool) || !adv.SelectsService(serviceLabels) {
			continue
		}
		selected = true
		for node, nodeLabels := range v.Nodes {
			if !adv.SelectsNode(nodeLabels) {
				continue
			}
			had, again := interfaces[node]
			if !again {
				had = adv.Interfaces
			}
			interfaces[node] = eitherInterfaces(had, adv.Interfaces)
			preference[node] = max(preference[node], adv.Preference(nodeLabels))
		}
	}
	var candidates []announcer.Candidate
	for node := range interfaces {
		candidates = append(candidates, announcer.Candidate{Node: node, Preference: preference[node]})
	}
	a.Owner = announcer.Elect(a.Address, candidates)
	a.Interfaces = interfaces[a.Owner]
	return selected
}

// announceBGP makes this node's routes to an address of the BGPAdvertisements that select it, and tells whether there is
// any that does, and whether any node advertises the address.
func (v NetworkView) announceBGP(a *Announced, pool config.Pool, serviceLabels labels.Set) (selected, advertised bool) {
	_, eligible := v.Nodes[v.Node]
	eligible = eligible || v.Leaving
	for _, adv := range v.BGP {
		if !adv.SelectsPool(pool) || !adv.SelectsService(serviceLabels) {
			continue
		}
		selected = true
		for _, nodeLabels := range v.Nodes {
			advertised = advertised || adv.SelectsNode(nodeLabels)
		}
		if eligible && adv.SelectsNode(v.ThisNodeLabels) {
			a.Routes = append(a.Routes, announcer.Route{
				Prefix: adv.Prefix(a.Address), Peers: adv.Peers, LocalPref: adv.LocalPref, MED: adv.MED, Prepend: adv.Prepend, Communities: adv.Communities,
			})
		}
	}
	a.Routes = distinct(a.Routes)
	return selected, advertised
}

// distinct sorts routes and drops repeated ones. Those of one prefix that differ stay: what a peer gets to see of a prefix
// is of the routes that name the peer, and no other (package announcer/bgp).
func distinct(routes []announcer.Route) []announcer.Route {
	slices.SortFunc(routes, compareRoutes)
	return slices.CompactFunc(routes, func(a, b announcer.Route) bool { return compareRoutes(a, b) == 0 })
}

func compareRoutes(a, b announcer.Route) int {
	return cmp.Or(
		a.Prefix.Compare(b.Prefix),
		slices.Compare(a.Peers, b.Peers),
		cmp.Compare(a.LocalPref, b.LocalPref),
		cmp.Compare(a.MED, b.MED),
		cmp.Compare(a.Prepend, b.Prepend),
		slices.Compare(a.Communities, b.Communities),
	)
}

// onTheWire is what this node tells the network, of all announcements: each address and each route once. Services that
// share an address are answered for on the interfaces of all of them.
func onTheWire(node string, all []Announced) ([]announcer.Address, []announcer.Route) {
	interfaces := map[netip.Addr][]string{}
	var routes []announcer.Route
	for _, a := range all {
		if a.Owner == node {
			had, again := interfaces[a.Address]
			if !again {
				had = a.Interfaces
			}
			interfaces[a.Address] = eitherInterfaces(had, a.Interfaces)
		}
		routes = append(routes, a.Routes...)
	}
	var addrs []announcer.Address
	for _, addr := range slices.SortedFunc(maps.Keys(interfaces), netip.Addr.Compare) {
		addrs = append(addrs, announcer.Address{Addr: addr, Interfaces: interfaces[addr]})
	}
	return addrs, distinct(routes)
}

// eitherInterfaces is the interfaces of both lists; an empty one means every interface.
func eitherInterfaces(a, b []string) []string {
	if len(a) == 0 || len(b) == 0 {
		return nil
	}
	return slices.Compact(slices.Sorted(slices.Values(slices.Concat(a, b))))
}
