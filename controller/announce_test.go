package controller

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"

	"github.com/longshore-lb/longshore/announcer"
	"github.com/longshore-lb/longshore/config"
	"github.com/longshore-lb/longshore/config/v1beta1"
)

// serviceWith is default/web with addresses in its status.
func serviceWith(edit func(*corev1.Service), texts ...string) *corev1.Service {
	svc := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "web"},
		Spec:       corev1.ServiceSpec{Type: corev1.ServiceTypeLoadBalancer},
	}
	for _, text := range texts {
		svc.Status.LoadBalancer.Ingress = append(svc.Status.LoadBalancer.Ingress, corev1.LoadBalancerIngress{IP: text})
	}
	edit(svc)
	return svc
}

func asIs(*corev1.Service) {}

// match is selectors of one label each.
func match(pairs ...string) []metav1.LabelSelector {
	var out []metav1.LabelSelector
	for i := 0; i < len(pairs); i += 2 {
		out = append(out, metav1.LabelSelector{MatchLabels: map[string]string{pairs[i]: pairs[i+1]}})
	}
	return out
}

func layer2(t *testing.T, specs ...v1beta1.L2AdvertisementSpec) []config.L2Advertisement {
	t.Helper()
	var out []config.L2Advertisement
	for _, spec := range specs {
		a, err := config.ParseL2Advertisement(&v1beta1.L2Advertisement{Spec: spec})
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, a)
	}
	return out
}

func bgpAdvertisements(t *testing.T, specs ...v1beta1.BGPAdvertisementSpec) []config.BGPAdvertisement {
	t.Helper()
	var out []config.BGPAdvertisement
	for _, spec := range specs {
		a, err := config.ParseBGPAdvertisement(&v1beta1.BGPAdvertisement{Spec: spec}, nil)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, a)
	}
	return out
}

func route(prefix string, edits ...func(*announcer.Route)) announcer.Route {
	r := announcer.Route{Prefix: netip.MustParsePrefix(prefix)}
	for _, edit := range edits {
		edit(&r)
	}
	return r
}

func to(peers ...string) func(*announcer.Route) {
	return func(r *announcer.Route) { r.Peers = peers }
}

func with(localPref uint32, communities ...string) func(*announcer.Route) {
	return func(r *announcer.Route) { r.LocalPref, r.Communities = localPref, communities }
}

var prefixByValue = cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })

// TestAnnounce decides for Service default/web on node n2. All three nodes may announce unless said otherwise; among
// all of them 192.0.2.1 is that of n3, and fd00::1 then one of the others' (announcer.Elect). Every node but n4 has links.
func TestAnnounce(t *testing.T) {
	everyNode := map[string]labels.Set{"n1": {"rack": "a"}, "n2": {"rack": "b"}, "n3": {"rack": "b", "fast": "yes"}}
	red := testPool(t, "red", "192.0.2.0/28 fd00::/124", func(p *config.Pool) { p.Labels = labels.Set{"tier": "gold"} })
	blue := testPool(t, "blue", "198.51.100.0/24", noBuggy)
	length := func(bits int32) *int32 { return &bits }
	all := []v1beta1.L2AdvertisementSpec{{}}
	for _, test := range []struct {
		name   string
		svc    *corev1.Service
		served []corev1.IPFamily     // nil = both
		nodes  map[string]labels.Set // nil = everyNode
		layer2 []v1beta1.L2AdvertisementSpec
		bgp    []v1beta1.BGPAdvertisementSpec
		view   func(*NetworkView) // what else is different
		want   []Announced        // without Service
	}{
		{
			name: "no address yet", svc: serviceWith(asIs), layer2: all,
		},
		{
			name: "not a LoadBalancer any more", layer2: all,
			svc: serviceWith(func(s *corev1.Service) { s.Spec.Type = corev1.ServiceTypeClusterIP }, "192.0.2.1"),
		},
		{
			name: "address of somebody else", svc: serviceWith(asIs, "203.0.113.1"), layer2: all,
			want: []Announced{{Address: ip("203.0.113.1"), Reason: "in no IPAddressPool"}},
		},
		{
			name: "address that the pool leaves out", svc: serviceWith(asIs, "198.51.100.255"), layer2: all,
			want: []Announced{{Address: ip("198.51.100.255"), Reason: "in no IPAddressPool"}},
		},
		{
			name: "nobody serves", svc: serviceWith(asIs, "192.0.2.1"), served: []corev1.IPFamily{corev1.IPv6Protocol}, layer2: all, bgp: []v1beta1.BGPAdvertisementSpec{{}},
			want: []Announced{{Address: ip("192.0.2.1"), Pool: "red", Reason: "no ready endpoint"}},
		},
		{
			name: "no advertisement", svc: serviceWith(asIs, "192.0.2.1"),
			want: []Announced{{Address: ip("192.0.2.1"), Pool: "red", Reason: "no L2Advertisement and no BGPAdvertisement selects it"}},
		},
		{
			name: "advertisements of other pools and Services", svc: serviceWith(asIs, "192.0.2.1"),
			layer2: []v1beta1.L2AdvertisementSpec{{IPAddressPools: []string{"blue"}}, {ServiceSelectors: match("app", "web")}},
			bgp:    []v1beta1.BGPAdvertisementSpec{{IPAddressPoolSelectors: match("tier", "silver")}},
			want:   []Announced{{Address: ip("192.0.2.1"), Pool: "red", Reason: "no L2Advertisement and no BGPAdvertisement selects it"}},
		},
		{
			name: "elected among all", svc: serviceWith(asIs, "192.0.2.1", "fd00::1"), layer2: all,
			want: []Announced{
				{Address: ip("192.0.2.1"), Pool: "red", Owner: "n3"},
				{Address: ip("fd00::1"), Pool: "red", Owner: "n1"},
			},
		},
		{
			name: "elected among those that are alive", svc: serviceWith(asIs, "192.0.2.1"), layer2: all,
			nodes: map[string]labels.Set{"n1": nil},
			want:  []Announced{{Address: ip("192.0.2.1"), Pool: "red", Owner: "n1"}},
		},
		{
			name: "no node may announce", svc: serviceWith(asIs, "192.0.2.1"), layer2: all, bgp: []v1beta1.BGPAdvertisementSpec{{}},
			nodes: map[string]labels.Set{},
			want:  []Announced{{Address: ip("192.0.2.1"), Pool: "red", Reason: "no node is alive, ready and not excluded from load balancers"}},
		},
		{
			name: "node selector", svc: serviceWith(asIs, "192.0.2.1"),
			layer2: []v1beta1.L2AdvertisementSpec{{NodeSelectors: match("rack", "a")}},
			want:   []Announced{{Address: ip("192.0.2.1"), Pool: "red", Owner: "n1"}},
		},
		{
			name: "node selectors select nobody", svc: serviceWith(asIs, "192.0.2.1"),
			layer2: []v1beta1.L2AdvertisementSpec{{NodeSelectors: match("rack", "c")}},
			bgp:    []v1beta1.BGPAdvertisementSpec{{NodeSelectors: match("rack", "c")}},
			want: []Announced{{Address: ip("192.0.2.1"), Pool: "red",
				Reason: "the nodeSelectors of its advertisements select no node that is alive, ready and not excluded from load balancers"}},
		},
		{
			name: "preferred nodes add up over advertisements by their maximum", svc: serviceWith(asIs, "192.0.2.1"),
			layer2: []v1beta1.L2AdvertisementSpec{
				{PreferredNodeSelectors: []v1beta1.PreferredNodeSelector{{Weight: 10, Preference: match("rack", "b")[0]}, {Weight: 30, Preference: match("rack", "a")[0]}}},
				{PreferredNodeSelectors: []v1beta1.PreferredNodeSelector{{Weight: 20, Preference: match("rack", "b")[0]}}},
			},
			want: []Announced{{Address: ip("192.0.2.1"), Pool: "red", Owner: "n1"}},
		},
		{
			name: "interfaces of the owner, of all advertisements that select it", svc: serviceWith(asIs, "192.0.2.1"),
			layer2: []v1beta1.L2AdvertisementSpec{
				{NodeSelectors: match("fast", "yes"), Interfaces: []string{"eth1", "eth0"}},
				{NodeSelectors: match("fast", "yes"), Interfaces: []string{"eth2", "eth0"}},
				{NodeSelectors: match("rack", "c"), Interfaces: []string{"eth3"}},
			},
			want: []Announced{{Address: ip("192.0.2.1"), Pool: "red", Owner: "n3", Interfaces: []string{"eth0", "eth1", "eth2"}}},
		},
		{
			name: "an advertisement without interfaces means every one", svc: serviceWith(asIs, "192.0.2.1"),
			layer2: []v1beta1.L2AdvertisementSpec{{Interfaces: []string{"eth0"}}, {}, {Interfaces: []string{"eth1"}}},
			want:   []Announced{{Address: ip("192.0.2.1"), Pool: "red", Owner: "n3"}},
		},
		{
			name: "only nodes whose agent answers", svc: serviceWith(asIs, "192.0.2.1"), layer2: all,
			view: func(v *NetworkView) { delete(v.Links, "n3"); delete(v.Links, "n2") },
			want: []Announced{{Address: ip("192.0.2.1"), Pool: "red", Owner: "n1"}},
		},
		{
			name: "only nodes with a link of the family", svc: serviceWith(asIs, "192.0.2.1", "fd00::1"), layer2: all,
			view: func(v *NetworkView) {
				v.Links = map[string][]announcer.Link{"n1": {{Name: "eth0", IPv4: true}}, "n2": {{Name: "eth0", IPv6: true}}, "n3": {{Name: "eth0"}}}
			},
			want: []Announced{{Address: ip("192.0.2.1"), Pool: "red", Owner: "n1"}, {Address: ip("fd00::1"), Pool: "red", Owner: "n2"}},
		},
		{
			name: "only nodes with a link that is listed", svc: serviceWith(asIs, "192.0.2.1"),
			layer2: []v1beta1.L2AdvertisementSpec{{Interfaces: []string{"eth8", "eth9"}}},
			view:   func(v *NetworkView) { v.Links["n2"] = []announcer.Link{{Name: "eth0", IPv4: true}, {Name: "eth9"}} },
			want:   []Announced{{Address: ip("192.0.2.1"), Pool: "red", Owner: "n2", Interfaces: []string{"eth8", "eth9"}}},
		},
		{
			name: "no node with a link that is listed", svc: serviceWith(asIs, "192.0.2.1"),
			layer2: []v1beta1.L2AdvertisementSpec{{Interfaces: []string{"eth9"}}},
			want:   []Announced{{Address: ip("192.0.2.1"), Pool: "red", Reason: "no node that its L2Advertisements select has an agent that answers, and a usable link for it"}},
		},
		{
			name: "a cordoned node is the last choice", svc: serviceWith(asIs, "192.0.2.1"),
			layer2: []v1beta1.L2AdvertisementSpec{{PreferredNodeSelectors: []v1beta1.PreferredNodeSelector{{Weight: 100, Preference: match("fast", "yes")[0]}}}},
			view:   func(v *NetworkView) { v.Cordoned = map[string]bool{"n3": true, "n2": true} },
			want:   []Announced{{Address: ip("192.0.2.1"), Pool: "red", Owner: "n1"}},
		},
		{
			name: "but a choice", svc: serviceWith(asIs, "192.0.2.1"), layer2: all, nodes: map[string]labels.Set{"n3": nil},
			view: func(v *NetworkView) { v.Cordoned = map[string]bool{"n3": true} },
			want: []Announced{{Address: ip("192.0.2.1"), Pool: "red", Owner: "n3"}},
		},
		{
			name: "another Service's L2Advertisement decides", svc: serviceWith(asIs, "192.0.2.1"),
			layer2: []v1beta1.L2AdvertisementSpec{{NodeSelectors: match("rack", "a")}},
			view:   func(v *NetworkView) { v.Owner = func(netip.Addr) string { return "n3" } },
			want: []Announced{{Address: ip("192.0.2.1"), Pool: "red",
				Reason: "node n3 answers for it, for another Service whose L2Advertisement selects that node"}},
		},
		{
			name: "this agent does not answer", svc: serviceWith(asIs, "192.0.2.1"), layer2: all,
			view: func(v *NetworkView) {
				v.Silent, v.Owner = "the agent is about to end", func(netip.Addr) string { return "" }
			},
			want: []Announced{{Address: ip("192.0.2.1"), Pool: "red", Reason: "the agent is about to end"}},
		},
		{
			name: "BGP with everything", svc: serviceWith(asIs, "192.0.2.1", "fd00::1"),
			bgp: []v1beta1.BGPAdvertisementSpec{{LocalPref: 200, Communities: []string{"64512:1"}, Peers: []string{"tor"}}},
			want: []Announced{
				{Address: ip("192.0.2.1"), Pool: "red", Routes: []announcer.Route{route("192.0.2.1/32", to("tor"), with(200, "64512:1"))}},
				{Address: ip("fd00::1"), Pool: "red", Routes: []announcer.Route{route("fd00::1/128", to("tor"), with(200, "64512:1"))}},
			},
		},
		{
			name: "BGP aggregates and the host's own route", svc: serviceWith(asIs, "192.0.2.1", "fd00::1"),
			bgp: []v1beta1.BGPAdvertisementSpec{
				{},
				{AggregationLength: length(24), AggregationLengthV6: length(64), LocalPref: 50},
			},
			want: []Announced{
				{Address: ip("192.0.2.1"), Pool: "red", Routes: []announcer.Route{route("192.0.2.0/24", with(50)), route("192.0.2.1/32")}},
				{Address: ip("fd00::1"), Pool: "red", Routes: []announcer.Route{route("fd00::/64", with(50)), route("fd00::1/128")}},
			},
		},
		{
			name: "one prefix, different things said to different peers", svc: serviceWith(asIs, "192.0.2.1"),
			bgp: []v1beta1.BGPAdvertisementSpec{
				{Peers: []string{"transit"}, Communities: []string{"65535:65281"}},
				{Peers: []string{"tor"}, LocalPref: 300},
				{Peers: []string{"tor"}, LocalPref: 300},
			},
			want: []Announced{{Address: ip("192.0.2.1"), Pool: "red", Routes: []announcer.Route{
				route("192.0.2.1/32", to("tor"), with(300)),
				route("192.0.2.1/32", to("transit"), with(0, "65535:65281")),
			}}},
		},
		{
			name: "BGP from other nodes only", svc: serviceWith(asIs, "192.0.2.1"),
			bgp:  []v1beta1.BGPAdvertisementSpec{{NodeSelectors: match("rack", "a")}},
			want: []Announced{{Address: ip("192.0.2.1"), Pool: "red"}},
		},
		{
			name: "this node may not announce", svc: serviceWith(asIs, "192.0.2.1"), bgp: []v1beta1.BGPAdvertisementSpec{{}},
			nodes: map[string]labels.Set{"n1": nil},
			want:  []Announced{{Address: ip("192.0.2.1"), Pool: "red"}},
		},
		{
			name: "selected by its labels and the pool's", layer2: []v1beta1.L2AdvertisementSpec{{NodeSelectors: match("rack", "a"), ServiceSelectors: match("app", "web"), IPAddressPoolSelectors: match("tier", "gold")}},
			svc: serviceWith(func(s *corev1.Service) { s.Labels = map[string]string{"app": "web"} }, "192.0.2.1", "198.51.100.1"),
			want: []Announced{
				{Address: ip("192.0.2.1"), Pool: "red", Owner: "n1"},
				{Address: ip("198.51.100.1"), Pool: "blue", Reason: "no L2Advertisement and no BGPAdvertisement selects it"},
			},
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			v := NetworkView{
				Node: "n2", Pools: []config.Pool{red, blue}, Nodes: everyNode, ThisNodeLabels: everyNode["n2"],
				Layer2: layer2(t, test.layer2...), BGP: bgpAdvertisements(t, test.bgp...),
			}
			if test.nodes != nil {
				v.Nodes = test.nodes
			}
			everyLink := []announcer.Link{{Name: "eth0", IPv4: true, IPv6: true}, {Name: "eth1"}, {Name: "eth2"}, {Name: "eth3"}}
			v.Links = map[string][]announcer.Link{"n1": everyLink, "n2": everyLink, "n3": everyLink}
			if test.view != nil {
				test.view(&v)
			}
			for i := range test.want {
				test.want[i].Service = types.NamespacedName{Namespace: "default", Name: "web"}
			}
			for range 20 { // whatever the order that maps have this time
				served := test.served
				if served == nil {
					served = []corev1.IPFamily{corev1.IPv4Protocol, corev1.IPv6Protocol}
				}
				reach := map[corev1.IPFamily]map[string]bool{}
				for _, family := range served {
					reach[family] = map[string]bool{AnyNode: true}
				}
				contests := map[netip.Addr]announcer.Contest{}
				for addr, candidates := range Candidates(test.svc, reach, v) {
					contests[addr] = announcer.Contest{Candidates: candidates}
				}
				if v.Owner == nil {
					owners := announcer.Elect(contests)
					v.Owner = func(addr netip.Addr) string { return owners[addr] }
				}
				if diff := cmp.Diff(test.want, Announce(test.svc, reach, v), byValue, prefixByValue); diff != "" {
					t.Fatalf("-want +got:\n%s", diff)
				}
			}
		})
	}
}

func ip(text string) netip.Addr { return netip.MustParseAddr(text) }

func TestOnTheWire(t *testing.T) {
	all := []Announced{
		{Address: ip("192.0.2.3"), Owner: "n2", Interfaces: []string{"eth0"}},
		{Address: ip("192.0.2.1"), Owner: "n1"},
		{Address: ip("192.0.2.2"), Owner: "n2", Interfaces: []string{"eth1"}, Routes: []announcer.Route{route("192.0.2.0/24"), route("192.0.2.2/32", to("tor"))}},
		{Address: ip("192.0.2.9"), Reason: "no ready endpoint"},
		// Another Service on the address of the first one, and one without endpoints.
		{Address: ip("192.0.2.3"), Owner: "n2", Interfaces: []string{"eth2", "eth0"}},
		{Address: ip("192.0.2.3"), Reason: "no ready endpoint"},
		// Another one on the address of the third.
		{Address: ip("192.0.2.2"), Owner: "n2", Routes: []announcer.Route{route("192.0.2.0/24"), route("192.0.2.2/32", to("transit"), with(0, "1:1"))}},
	}
	addrs, routes := onTheWire("n2", all)
	wantAddrs := []announcer.Address{
		{Addr: ip("192.0.2.2")},
		{Addr: ip("192.0.2.3"), Interfaces: []string{"eth0", "eth2"}},
	}
	if diff := cmp.Diff(wantAddrs, addrs, byValue); diff != "" {
		t.Errorf("addresses (-want +got):\n%s", diff)
	}
	wantRoutes := []announcer.Route{route("192.0.2.0/24"), route("192.0.2.2/32", to("tor")), route("192.0.2.2/32", to("transit"), with(0, "1:1"))}
	if diff := cmp.Diff(wantRoutes, routes, prefixByValue); diff != "" {
		t.Errorf("routes (-want +got):\n%s", diff)
	}
	if addrs, routes := onTheWire("n4", nil); addrs != nil || routes != nil {
		t.Errorf("nothing announced: %v, %v", addrs, routes)
	}
}
