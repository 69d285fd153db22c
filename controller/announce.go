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
	// For layer 2 only.
	Links    map[string][]announcer.Link // of those of Nodes that answer for addresses
	Cordoned map[string]bool             // nodes that are the last choice
	Silent   string                      // why this agent has no owner for any address; "" = it has
	Owner    func(netip.Addr) string     // the node that was elected among the Candidates of all Services; "" = none

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
	Yielding   bool              // the owner is this node until another one answers
	Routes     []announcer.Route // what this node advertises by BGP; those of one prefix may differ in their peers
	Reason     string            // why nobody announces the address at all; "" if somebody does
}

// Announce decides how the LoadBalancer addresses of a Service are announced, once their owners are elected. reach is the nodes that have an endpoint for
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
			selected, reason := v.announceLayer2(&a, pool, svc.Labels)
			selectedBGP, advertised := v.announceBGP(&a, pool, svc.Labels)
			switch {
			case !selected && !selectedBGP:
				a.Reason = "no L2Advertisement and no BGPAdvertisement selects it"
			case len(v.Nodes) == 0:
				a.Reason = "no node is alive, ready and not excluded from load balancers" + v.condition
			case a.Owner == "" && !advertised && reason != "":
				a.Reason = reason
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

// Candidates is the nodes that may answer by ARP or NDP for the LoadBalancer addresses of a Service; an address that has none is
// not there. The arguments are those of [Announce].
func Candidates(svc *corev1.Service, reach map[corev1.IPFamily]map[string]bool, v NetworkView) map[netip.Addr][]announcer.Candidate {
	all := map[netip.Addr][]announcer.Candidate{}
	for _, addr := range ingressIPs(svc) {
		if pool, found := v.poolOf(addr, svc); found && len(reach[familyOf(addr)]) > 0 {
			c := v.only(reach[familyOf(addr)]).contest(addr, pool, svc.Labels)
			if len(c.candidates) > 0 {
				all[addr] = c.candidates
			}
		}
	}
	return all
}

// cordoned is what makes a node the last choice, whatever its preference.
const cordoned = -1 << 40

// contest is who may answer for an address of a Service.
type contest struct {
	selected   bool // by an L2Advertisement
	nodes      int  // that one of those selects
	candidates []announcer.Candidate
	interfaces map[string][]string // of each candidate
}

// contest finds the nodes that an L2Advertisement selects for an address and that have a link for it.
func (v NetworkView) contest(addr netip.Addr, pool config.Pool, serviceLabels labels.Set) contest {
	c := contest{interfaces: map[string][]string{}}
	preference := map[string]int{}
	nodes := map[string]bool{}
	for _, adv := range v.Layer2 {
		if !adv.SelectsPool(pool) || !adv.SelectsService(serviceLabels) {
			continue
		}
		c.selected = true
		for node, nodeLabels := range v.Nodes {
			if !adv.SelectsNode(nodeLabels) {
				continue
			}
			nodes[node] = true
			if !announcer.Reaches(v.Links[node], addr, adv.Interfaces) {
				continue
			}
			had, again := c.interfaces[node]
			if !again {
				had = adv.Interfaces
			}
			c.interfaces[node] = eitherInterfaces(had, adv.Interfaces)
			preference[node] = max(preference[node], adv.Preference(nodeLabels))
		}
	}
	c.nodes = len(nodes)
	for _, node := range slices.Sorted(maps.Keys(c.interfaces)) {
		p := preference[node]
		if v.Cordoned[node] {
			p += cordoned
		}
		c.candidates = append(c.candidates, announcer.Candidate{Node: node, Preference: p})
	}
	return c
}

// announceLayer2 says who answers for an address, if an L2Advertisement selects it; else why nobody does.
func (v NetworkView) announceLayer2(a *Announced, pool config.Pool, serviceLabels labels.Set) (selected bool, reason string) {
	c := v.contest(a.Address, pool, serviceLabels)
	if !c.selected || c.nodes == 0 {
		return c.selected, ""
	}
	owner := v.Owner(a.Address)
	on, candidate := c.interfaces[owner]
	switch {
	case candidate:
		a.Owner, a.Interfaces = owner, on
	case v.Silent != "":
		reason = v.Silent
	case len(c.candidates) == 0:
		reason = "no node that its L2Advertisements select has an agent that answers, and a usable link for it"
	case owner != "":
		reason = "node " + owner + " answers for it, for another Service whose L2Advertisement selects that node"
	default:
		reason = "its owner has not been elected yet"
	}
	return true, reason
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
	yielding := map[netip.Addr]bool{}
	var routes []announcer.Route
	for _, a := range all {
		if a.Owner == node {
			had, again := interfaces[a.Address]
			if !again {
				had = a.Interfaces
			}
			interfaces[a.Address] = eitherInterfaces(had, a.Interfaces)
			yielding[a.Address] = a.Yielding
		}
		routes = append(routes, a.Routes...)
	}
	var addrs []announcer.Address
	for _, addr := range slices.SortedFunc(maps.Keys(interfaces), netip.Addr.Compare) {
		addrs = append(addrs, announcer.Address{Addr: addr, Interfaces: interfaces[addr], Yielding: yielding[addr]})
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
