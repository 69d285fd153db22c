package controller

import (
	"maps"
	"net/netip"
	"slices"

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
	Layer2         []config.L2Advertisement
	BGP            []config.BGPAdvertisement
	Nodes          map[string]labels.Set // those that may announce: alive, ready and not excluded, with their labels
	ThisNodeLabels labels.Set
}

// Announced is what is to be done about one address of one Service, on this node.
type Announced struct {
	Service    types.NamespacedName
	Address    netip.Addr
	Pool       string
	Owner      string            // the one node that answers ARP or NDP for the address; "" = none does
	Interfaces []string          // on which the owner answers; empty = every usable one
	Routes     []announcer.Route // what this node advertises by BGP
	Reason     string            // why nobody announces the address at all; "" if somebody does
}

// Announce decides how the LoadBalancer addresses of a Service are announced. served: it has a ready endpoint. An
// address is announced only if a pool of ours holds it, so that addresses which another provider wrote stay its own.
func Announce(svc *corev1.Service, served bool, v NetworkView) []Announced {
	var out []Announced
	for _, addr := range ingressIPs(svc) {
		a := Announced{Service: nameOf(svc), Address: addr}
		i := slices.IndexFunc(v.Pools, func(p config.Pool) bool { return p.Contains(addr) })
		switch {
		case i < 0:
			a.Reason = "in no IPAddressPool"
		case !served:
			a.Pool, a.Reason = v.Pools[i].Name, "no ready endpoint"
		default:
			a.Pool = v.Pools[i].Name
			selected := v.announceLayer2(&a, v.Pools[i], svc.Labels)
			selected = v.announceBGP(&a, v.Pools[i], svc.Labels) || selected
			switch {
			case !selected:
				a.Reason = "no L2Advertisement and no BGPAdvertisement selects it"
			case a.Owner == "" && len(v.Nodes) == 0:
				a.Reason = "no node is alive, ready and not excluded from load balancers"
			}
		}
		out = append(out, a)
	}
	return out
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
			switch {
			case !again:
				interfaces[node] = adv.Interfaces
			case len(had) == 0 || len(adv.Interfaces) == 0:
				interfaces[node] = nil // one of them means every interface
			default:
				interfaces[node] = slices.Compact(slices.Sorted(slices.Values(slices.Concat(had, adv.Interfaces))))
			}
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

// announceBGP makes this node's route to an address of the BGPAdvertisements that select it. Advertisements of one prefix
// become one route: to the peers of all, with the communities of all and the highest LOCAL_PREF.
func (v NetworkView) announceBGP(a *Announced, pool config.Pool, serviceLabels labels.Set) (selected bool) {
	_, eligible := v.Nodes[v.Node]
	routes := map[netip.Prefix]announcer.Route{}
	for _, adv := range v.BGP {
		if !adv.SelectsPool(pool) || !adv.SelectsService(serviceLabels) {
			continue
		}
		selected = true
		if !eligible || !adv.SelectsNode(v.ThisNodeLabels) {
			continue
		}
		r := announcer.Route{Prefix: adv.Prefix(a.Address), Peers: adv.Peers, LocalPref: adv.LocalPref, Communities: adv.Communities}
		if other, ok := routes[r.Prefix]; ok {
			r = mergeRoutes(r, other)
		}
		routes[r.Prefix] = r
	}
	for _, p := range slices.SortedFunc(maps.Keys(routes), netip.Prefix.Compare) {
		a.Routes = append(a.Routes, routes[p])
	}
	return selected
}

func mergeRoutes(a, b announcer.Route) announcer.Route {
	merged := announcer.Route{
		Prefix:      a.Prefix,
		LocalPref:   max(a.LocalPref, b.LocalPref),
		Communities: union(a.Communities, b.Communities),
	}
	if len(a.Peers) > 0 && len(b.Peers) > 0 { // otherwise one of them means every peer
		merged.Peers = union(a.Peers, b.Peers)
	}
	return merged
}

func union(a, b []string) []string {
	return slices.Compact(slices.Sorted(slices.Values(slices.Concat(a, b))))
}

// onTheWire is what this node tells the network, of all announcements: each address and each prefix once.
func onTheWire(node string, all []Announced) ([]announcer.Address, []announcer.Route) {
	addrs := map[netip.Addr]announcer.Address{}
	routes := map[netip.Prefix]announcer.Route{}
	for _, a := range all {
		if a.Owner == node {
			addrs[a.Address] = announcer.Address{Addr: a.Address, Interfaces: a.Interfaces}
		}
		for _, r := range a.Routes {
			if other, ok := routes[r.Prefix]; ok {
				r = mergeRoutes(r, other)
			}
			routes[r.Prefix] = r
		}
	}
	var outAddrs []announcer.Address
	for _, a := range slices.SortedFunc(maps.Keys(addrs), netip.Addr.Compare) {
		outAddrs = append(outAddrs, addrs[a])
	}
	var outRoutes []announcer.Route
	for _, p := range slices.SortedFunc(maps.Keys(routes), netip.Prefix.Compare) {
		outRoutes = append(outRoutes, routes[p])
	}
	return outAddrs, outRoutes
}
