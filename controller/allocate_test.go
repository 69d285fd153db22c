package controller

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/longshore-lb/longshore/config"
)

func TestRequestFor(t *testing.T) {
	created := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	service := func(edit func(*corev1.Service)) *corev1.Service {
		svc := &corev1.Service{
			ObjectMeta: metav1.ObjectMeta{
				Namespace: "default", Name: "web", CreationTimestamp: metav1.NewTime(created), Annotations: map[string]string{},
			},
			Spec: corev1.ServiceSpec{
				ClusterIPs: []string{"10.96.0.1"},
				Selector:   map[string]string{"b": "2", "a": "1"},
				Ports:      []corev1.ServicePort{{Protocol: corev1.ProtocolUDP, Port: 53}, {Port: 80}},
			},
		}
		edit(svc)
		return svc
	}
	request := func(edit func(*Request)) Request {
		r := Request{
			Key: "default/web", Namespace: "default",
			Families: []corev1.IPFamily{v4}, Backend: "Cluster", Created: created,
			Ports: []Port{{corev1.ProtocolUDP, 53}, {corev1.ProtocolTCP, 80}},
		}
		edit(&r)
		return r
	}
	for _, test := range []struct {
		name string
		svc  func(*corev1.Service)
		want func(*Request)
		err  string
	}{
		{
			name: "plain",
			svc:  func(*corev1.Service) {},
			want: func(*Request) {},
		},
		{
			name: "dual stack, families in the order of the cluster IPs",
			svc: func(s *corev1.Service) {
				s.Spec.ClusterIPs = []string{"fd00::1", "10.96.0.1"}
				s.Spec.IPFamilyPolicy = new(corev1.IPFamilyPolicyRequireDualStack)
			},
			want: func(r *Request) {
				r.Families, r.RequireDualStack = []corev1.IPFamily{v6, v4}, true
			},
		},
		{
			name: "no API server has seen it, families given",
			svc: func(s *corev1.Service) {
				s.Spec.ClusterIPs, s.Spec.IPFamilies = nil, []corev1.IPFamily{v6}
			},
			want: func(r *Request) { r.Families = []corev1.IPFamily{v6} },
		},
		{
			name: "no API server has seen it, policy given",
			svc: func(s *corev1.Service) {
				s.Spec.ClusterIPs, s.Spec.IPFamilyPolicy = nil, new(corev1.IPFamilyPolicyPreferDualStack)
			},
			want: func(r *Request) { r.Families = []corev1.IPFamily{v4, v6} },
		},
		{
			name: "no API server has seen it, nothing given",
			svc:  func(s *corev1.Service) { s.Spec.ClusterIPs = nil },
			want: func(*Request) {},
		},
		{
			name: "externalTrafficPolicy Local, whatever the order of the selector",
			svc:  func(s *corev1.Service) { s.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal },
			want: func(r *Request) { r.Backend = "Local:a=1,b=2" },
		},
		{
			name: "annotations",
			svc: func(s *corev1.Service) {
				s.Annotations = map[string]string{
					"metallb.io/loadBalancerIPs": " 192.0.2.9 , 2001:db8::9",
					"metallb.io/address-pool":    "gold",
					"metallb.io/allow-shared-ip": "dns",
				}
			},
			want: func(r *Request) {
				r.Addresses, r.AddressesFrom = addrs("192.0.2.9", "2001:db8::9"), "annotation metallb.io/loadBalancerIPs"
				r.Pool, r.PoolFrom = "gold", "annotation metallb.io/address-pool"
				r.SharingKey = "dns"
			},
		},
		{
			name: "old prefix",
			svc: func(s *corev1.Service) {
				s.Annotations = map[string]string{
					"metallb.universe.tf/loadBalancerIPs": "192.0.2.9",
					"metallb.universe.tf/address-pool":    "silver",
					"metallb.io/address-pool":             "gold",
					"metallb.universe.tf/allow-shared-ip": "dns",
				}
			},
			want: func(r *Request) {
				r.Addresses, r.AddressesFrom = addrs("192.0.2.9"), "annotation metallb.universe.tf/loadBalancerIPs"
				r.Pool, r.PoolFrom = "gold", "annotation metallb.io/address-pool"
				r.SharingKey = "dns"
			},
		},
		{
			name: "field",
			svc:  func(s *corev1.Service) { s.Spec.LoadBalancerIP = "192.0.2.9" },
			want: func(r *Request) { r.Addresses, r.AddressesFrom = addrs("192.0.2.9"), "spec.loadBalancerIP" },
		},
		{
			name: "annotation and field",
			svc: func(s *corev1.Service) {
				s.Spec.LoadBalancerIP = "192.0.2.9"
				s.Annotations["metallb.io/loadBalancerIPs"] = "192.0.2.8"
			},
			err: `service default/web: annotation metallb.io/loadBalancerIPs: "192.0.2.8" and spec.loadBalancerIP "192.0.2.9" are both set, only one may be`,
		},
		{
			name: "not an address",
			svc:  func(s *corev1.Service) { s.Annotations["metallb.io/loadBalancerIPs"] = "192.0.2.9,192.0.2.300" },
			err:  `service default/web: annotation metallb.io/loadBalancerIPs: "192.0.2.300" is not an IP address`,
		},
		{
			name: "a zone",
			svc:  func(s *corev1.Service) { s.Spec.LoadBalancerIP = "fe80::1%eth0" },
			err:  `service default/web: spec.loadBalancerIP: "fe80::1%eth0" is not an IP address`,
		},
		{
			name: "two of a family",
			svc:  func(s *corev1.Service) { s.Annotations["metallb.io/loadBalancerIPs"] = "192.0.2.9,192.0.2.8" },
			err:  `service default/web: annotation metallb.io/loadBalancerIPs: "192.0.2.9,192.0.2.8" has more than one IPv4 address`,
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			svc := service(test.svc)
			got, err := RequestFor(svc, nil)
			if test.err != "" {
				var refused *AllocationError
				if !errors.As(err, &refused) || err.Error() != test.err {
					t.Fatalf("error %v\nwant  %s", err, test.err)
				}
				test.want = func(*Request) {} // good for adopting
			} else if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(request(test.want), got, byValue); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

const (
	v4 = corev1.IPv4Protocol
	v6 = corev1.IPv6Protocol
)

var byValue = cmp.Comparer(func(a, b netip.Addr) bool { return a == b })

func addrs(texts ...string) []netip.Addr {
	var list []netip.Addr
	for _, text := range texts {
		list = append(list, netip.MustParseAddr(text))
	}
	return list
}

// testPool is a pool with autoAssign and ranges as text, with edits.
func testPool(t testing.TB, name string, ranges string, edits ...func(*config.Pool)) config.Pool {
	t.Helper()
	p := config.Pool{Name: name, AutoAssign: true}
	for text := range strings.FieldsSeq(ranges) {
		r, err := config.ParseRange(text)
		if err != nil {
			t.Fatal(err)
		}
		p.Ranges = append(p.Ranges, r)
	}
	for _, edit := range edits {
		edit(&p)
	}
	return p
}

// testRequest is one for an IPv4 address and port 80, with edits. Services are as old as their names are in order.
func testRequest(name string, edits ...func(*Request)) Request {
	r := Request{
		Key: "default/" + name, Namespace: "default", Families: []corev1.IPFamily{v4}, Backend: "Cluster",
		Ports: []Port{{corev1.ProtocolTCP, 80}},
	}
	for _, edit := range edits {
		edit(&r)
	}
	return r
}

func manual(p *config.Pool)         { p.AutoAssign = false }
func noBuggy(p *config.Pool)        { p.AvoidBuggyIPs = true }
func priority(n int) poolEdit       { return func(p *config.Pool) { p.Priority = n } }
func onlyFor(ns ...string) poolEdit { return func(p *config.Pool) { p.Namespaces = ns } }
func forNamespaces(selector string) poolEdit {
	return func(p *config.Pool) { p.NamespaceSelectors = []labels.Selector{mustSelect(selector)} }
}
func forServices(selector string) poolEdit {
	return func(p *config.Pool) { p.ServiceSelectors = []labels.Selector{mustSelect(selector)} }
}

type (
	poolEdit    = func(*config.Pool)
	requestEdit = func(*Request)
)

func mustSelect(text string) labels.Selector {
	selector, err := labels.Parse(text)
	if err != nil {
		panic(err)
	}
	return selector
}

func families(f ...corev1.IPFamily) requestEdit { return func(r *Request) { r.Families = f } }
func requireBoth(r *Request)                    { r.Families, r.RequireDualStack = []corev1.IPFamily{v4, v6}, true }
func wants(texts ...string) requestEdit {
	return func(r *Request) { r.Addresses, r.AddressesFrom = addrs(texts...), "spec.loadBalancerIP" }
}
func fromPool(name string) requestEdit {
	return func(r *Request) { r.Pool, r.PoolFrom = name, "annotation metallb.io/address-pool" }
}
func local(r *Request) { r.Backend = "Local:app=web" }
func labelled(k, v string) requestEdit {
	return func(r *Request) { r.Labels = map[string]string{k: v} }
}
func inNamespace(ns string, set map[string]string) requestEdit {
	return func(r *Request) { r.Namespace, r.NamespaceLabels = ns, set }
}
func sharing(key string, ports ...int32) requestEdit {
	return func(r *Request) {
		r.SharingKey, r.Ports = key, nil
		for _, p := range ports {
			r.Ports = append(r.Ports, Port{corev1.ProtocolTCP, p})
		}
	}
}

// step is one call and what must come of it.
type step func(t *testing.T, a *Allocator)

// gives assigns and wants the addresses and the pool, "192.0.2.1 a".
func gives(r Request, want string) step {
	return func(t *testing.T, a *Allocator) {
		t.Helper()
		got, err := a.Assign(r)
		if err != nil {
			t.Errorf("%v, want %s", err, want)
			return
		}
		if text := describe(got); text != want {
			t.Errorf("%s got %s, want %s", r.Key, text, want)
		}
		if again, ok := a.Assigned(r.Key); !ok || describe(again) != want {
			t.Errorf("%s holds %s, want %s", r.Key, describe(again), want)
		}
	}
}

func describe(a Assignment) string {
	var words []string
	for _, addr := range a.Addresses {
		words = append(words, addr.String())
	}
	return strings.Join(append(words, a.Pool), " ")
}

// refuses assigns and wants an error; the Service must then hold nothing.
func refuses(r Request, want string) step {
	return func(t *testing.T, a *Allocator) {
		t.Helper()
		got, err := a.Assign(r)
		var refused *AllocationError
		if !errors.As(err, &refused) || refused.Message() != want {
			t.Errorf("%s got %s, error %v\nwant error %s", r.Key, describe(got), err, want)
		}
		if held, ok := a.Assigned(r.Key); ok {
			t.Errorf("%s holds %s after an error", r.Key, describe(held))
		}
	}
}

func releases(name string, want bool) step {
	return func(t *testing.T, a *Allocator) {
		t.Helper()
		if got := a.Release("default/" + name); got != want {
			t.Errorf("release of %s: %t, want %t", name, got, want)
		}
	}
}

// offers wants Waiting to yield these Services, "b c", and assigns to each.
func offers(want string) step {
	return func(t *testing.T, a *Allocator) {
		t.Helper()
		var names []string
		for r := range a.Waiting() {
			names = append(names, strings.TrimPrefix(r.Key, "default/"))
			_, _ = a.Assign(r) // an error is as good: that it is offered is what counts
		}
		if got := strings.Join(names, " "); got != want {
			t.Errorf("waiting: %q, want %q", got, want)
		}
	}
}

func pools(want string, pools ...config.Pool) step {
	return func(t *testing.T, a *Allocator) {
		t.Helper()
		if got := strings.Join(a.SetPools(pools), " "); got != want {
			t.Errorf("misfits after the pools changed: %q, want %q", got, want)
		}
	}
}

func adopts(r Request, want string, texts ...string) step {
	return func(t *testing.T, a *Allocator) {
		t.Helper()
		err := a.Adopt(r, addrs(texts...))
		var message string
		var refused *AllocationError
		if errors.As(err, &refused) {
			message = refused.Message()
		}
		if message != want {
			t.Errorf("adopt: error %q, want %q", message, want)
		}
	}
}

func reserves(owners map[string]string) step {
	return func(_ *testing.T, a *Allocator) {
		set := map[netip.Addr]string{}
		for text, owner := range owners {
			set[netip.MustParseAddr(text)] = owner
		}
		a.SetReserved(set)
	}
}

func counts(name string, want PoolCounts) step {
	return func(t *testing.T, a *Allocator) {
		t.Helper()
		if got := a.Counts(name); got != want {
			t.Errorf("counts of %s: %+v, want %+v", name, got, want)
		}
	}
}

func TestAllocator(t *testing.T) {
	pool := func(name, ranges string, edits ...poolEdit) config.Pool { return testPool(t, name, ranges, edits...) }
	for _, test := range []struct {
		name  string
		steps []step
	}{
		{"lowest address first, a freed one again", []step{
			pools("", pool("a", "192.0.2.8/30 192.0.2.1-192.0.2.2")),
			gives(testRequest("s1"), "192.0.2.1 a"),
			gives(testRequest("s2"), "192.0.2.2 a"),
			gives(testRequest("s3"), "192.0.2.8 a"),
			releases("s2", true),
			releases("s2", false),
			gives(testRequest("s4"), "192.0.2.2 a"),
			gives(testRequest("s5"), "192.0.2.9 a"),
			gives(testRequest("s3"), "192.0.2.8 a"),
			counts("a", PoolCounts{AssignedIPv4: 4, AvailableIPv4: 2}),
		}},
		{"to the last address there is", []step{
			pools("", pool("a", "255.255.255.254/31 2001:db8::fffe/127")),
			gives(testRequest("s1", families(v4, v6)), "255.255.255.254 2001:db8::fffe a"),
			gives(testRequest("s2", families(v6, v4)), "2001:db8::ffff 255.255.255.255 a"),
			refuses(testRequest("s3"), "no IPv4 address is free in a"),
			releases("s2", true),
			gives(testRequest("s3"), "255.255.255.255 a"),
		}},
		{"no pools", []step{
			refuses(testRequest("s1"), "no pool has IPv4 addresses for it"),
			refuses(testRequest("s1", wants("192.0.2.9")), `spec.loadBalancerIP: "192.0.2.9" is in no pool`),
			pools("", pool("a", "192.0.2.0/24")),
			offers("s1"),
			gives(testRequest("s1"), "192.0.2.9 a"),
		}},
		{"other pools by priority, 0 is last, then by name", []step{
			pools("", pool("a", "192.0.2.1/32"), pool("b", "192.0.2.2/32"), pool("c", "192.0.2.3/32", priority(20)), pool("d", "192.0.2.4/32", priority(10))),
			gives(testRequest("s1"), "192.0.2.4 d"),
			gives(testRequest("s2"), "192.0.2.3 c"),
			gives(testRequest("s3"), "192.0.2.1 a"),
			gives(testRequest("s4"), "192.0.2.2 b"),
			refuses(testRequest("s5"), "no IPv4 address is free in d, c, a, b"),
		}},
		{"pinned pools first, by namespace, its labels and the Service's labels", []step{
			pools("",
				pool("a", "192.0.2.0/28", priority(1)),
				pool("b", "192.0.2.16/32", onlyFor("team-b")),
				pool("c", "192.0.2.32/32", forNamespaces("tier=gold"), priority(5)),
				pool("d", "192.0.2.48/32", forServices("app in (web)"), priority(3)),
				pool("e", "192.0.2.64/32", onlyFor("team-e"), forServices("app=web"), priority(1))),
			gives(testRequest("s1"), "192.0.2.0 a"),
			gives(testRequest("s2", inNamespace("team-b", nil)), "192.0.2.16 b"),
			gives(testRequest("s3", inNamespace("team-x", map[string]string{"tier": "gold"}), labelled("app", "web")), "192.0.2.48 d"),
			gives(testRequest("s4", inNamespace("team-x", map[string]string{"tier": "gold"}), labelled("app", "web")), "192.0.2.32 c"),
			gives(testRequest("s5", inNamespace("team-e", nil), labelled("app", "db")), "192.0.2.1 a"),
			gives(testRequest("s6", inNamespace("team-e", nil), labelled("app", "web")), "192.0.2.64 e"),
			gives(testRequest("s7", inNamespace("team-b", nil)), "192.0.2.2 a"),
		}},
		{"a selector that matches no namespace allows none", []step{
			pools("", pool("a", "192.0.2.0/28", forNamespaces("tier=gold"))),
			refuses(testRequest("s1", inNamespace("team-x", map[string]string{"tier": "lead"})), "no pool has IPv4 addresses for it"),
			gives(testRequest("s1", inNamespace("team-x", map[string]string{"tier": "gold"})), "192.0.2.0 a"),
		}},
		{"autoAssign false only when asked for", []step{
			pools("", pool("a", "192.0.2.0/28", manual), pool("b", "192.0.2.16/28", manual, onlyFor("default"))),
			refuses(testRequest("s1"), "no pool has IPv4 addresses for it"),
			gives(testRequest("s1", fromPool("a")), "192.0.2.0 a"),
			gives(testRequest("s2", wants("192.0.2.7")), "192.0.2.7 a"),
			gives(testRequest("s2"), "192.0.2.7 a"),
			gives(testRequest("s3", fromPool("b")), "192.0.2.16 b"),
		}},
		{"requested pool", []step{
			pools("", pool("a", "192.0.2.0/28"), pool("b", "192.0.2.16/32"), pool("c", "192.0.2.32/28", onlyFor("team-c")), pool("d", "2001:db8::/64")),
			gives(testRequest("s1"), "192.0.2.0 a"),
			gives(testRequest("s1", fromPool("b")), "192.0.2.16 b"),
			gives(testRequest("s2"), "192.0.2.0 a"),
			refuses(testRequest("s3", fromPool("b")), `annotation metallb.io/address-pool: "b" has no free IPv4 address`),
			refuses(testRequest("s3", fromPool("c")), `annotation metallb.io/address-pool: "c" is a pool whose serviceAllocation does not allow this Service`),
			refuses(testRequest("s3", fromPool("x")), `annotation metallb.io/address-pool: "x" is not a pool`),
			refuses(testRequest("s3", fromPool("d")), `annotation metallb.io/address-pool: "d" has no free IPv4 address`),
			gives(testRequest("s3", fromPool("d"), families(v6)), "2001:db8:: d"),
		}},
		{"requested address", []step{
			pools("", pool("a", "192.0.2.0/28 2001:db8::/64"), pool("c", "192.0.2.32/28", onlyFor("team-c"))),
			gives(testRequest("s1", wants("192.0.2.3")), "192.0.2.3 a"),
			refuses(testRequest("s2", wants("192.0.2.3")), `spec.loadBalancerIP: "192.0.2.3" is held by service default/s1, which does not share it`),
			refuses(testRequest("s3", wants("192.0.2.33")), `spec.loadBalancerIP: "192.0.2.33" is in pool c, whose serviceAllocation does not allow this Service`),
			gives(testRequest("s3", wants("192.0.2.33"), inNamespace("team-c", nil)), "192.0.2.33 c"),
			refuses(testRequest("s4", wants("2001:db8::1")), `spec.loadBalancerIP: "2001:db8::1" is IPv6, the Service is not`),
			refuses(testRequest("s4", wants("192.0.2.4"), fromPool("c")), `spec.loadBalancerIP: "192.0.2.4" is in pool a, annotation metallb.io/address-pool asks for c`),
			gives(testRequest("s1", wants("192.0.2.4")), "192.0.2.4 a"),
			offers("s2"),
			gives(testRequest("s2", wants("192.0.2.3")), "192.0.2.3 a"),
			gives(testRequest("s5", wants("2001:db8::5", "192.0.2.5"), families(v4, v6)), "192.0.2.5 2001:db8::5 a"),
		}},
		{"avoidBuggyIPs", []step{
			pools("", pool("a", "192.0.2.254-192.0.3.1", noBuggy)),
			counts("a", PoolCounts{AvailableIPv4: 2}),
			gives(testRequest("s1"), "192.0.2.254 a"),
			gives(testRequest("s2"), "192.0.3.1 a"),
			refuses(testRequest("s3"), "no IPv4 address is free in a"),
			refuses(testRequest("s3", wants("192.0.2.255")), `spec.loadBalancerIP: "192.0.2.255" is left out by avoidBuggyIPs of pool a`),
			pools("", pool("a", "192.0.2.254-192.0.3.1")),
			offers("s3"),
			gives(testRequest("s3", wants("192.0.2.255")), "192.0.2.255 a"),
			pools("default/s3", pool("a", "192.0.2.254-192.0.3.1", noBuggy)),
			releases("s1", true),
			gives(testRequest("s3"), "192.0.2.254 a"),
		}},
		{"dual stack from two pools", []step{
			pools("", pool("a", "192.0.2.0/31"), pool("b", "2001:db8::/127")),
			gives(testRequest("s1", requireBoth), "192.0.2.0 2001:db8:: a,b"),
			gives(testRequest("s2", families(v6, v4)), "2001:db8::1 192.0.2.1 b,a"),
		}},
		{"RequireDualStack gets both or none", []step{
			pools("", pool("a", "192.0.2.0/31"), pool("b", "2001:db8::/128")),
			refuses(testRequest("s1", requireBoth, families(v4)), `spec.ipFamilyPolicy: "RequireDualStack" but the Service has one family only`),
			gives(testRequest("s1", requireBoth), "192.0.2.0 2001:db8:: a,b"),
			refuses(testRequest("s2", requireBoth), "no IPv6 address is free in b"),
			refuses(testRequest("s3", requireBoth, wants("192.0.2.1")), `spec.loadBalancerIP: "192.0.2.1" is one address, RequireDualStack needs one of each family`),
			counts("a", PoolCounts{AssignedIPv4: 1, AvailableIPv4: 1}),
			releases("s1", true),
			offers("s2"),
			gives(testRequest("s2", requireBoth), "192.0.2.0 2001:db8:: a,b"),
		}},
		{"PreferDualStack gets what there is, and the rest when it comes", []step{
			pools("", pool("a", "192.0.2.0/30")),
			gives(testRequest("s1", families(v6, v4)), "192.0.2.0 a"),
			gives(testRequest("s2", families(v4, v6)), "192.0.2.1 a"),
			offers(""),
			pools("", pool("a", "192.0.2.0/30"), pool("b", "2001:db8::/128")),
			offers("s1 s2"),
			gives(testRequest("s1", families(v6, v4)), "2001:db8:: 192.0.2.0 b,a"),
			gives(testRequest("s2", families(v4, v6)), "192.0.2.1 a"),
			gives(testRequest("s1", families(v4)), "192.0.2.0 a"),
			offers("s2"),
			gives(testRequest("s2", families(v4, v6)), "192.0.2.1 2001:db8:: a,b"),
		}},
		{"sharing", []step{
			pools("", pool("a", "192.0.2.0/28")),
			gives(testRequest("s1", sharing("k", 80, 81)), "192.0.2.0 a"),
			gives(testRequest("s2", sharing("k", 443)), "192.0.2.0 a"),
			gives(testRequest("s3", sharing("k", 443)), "192.0.2.1 a"),
			gives(testRequest("s4", sharing("other", 22)), "192.0.2.2 a"),
			gives(testRequest("s5", sharing("", 22)), "192.0.2.3 a"),
			gives(testRequest("s6", sharing("k", 22), local), "192.0.2.4 a"),
			gives(testRequest("s7", sharing("k", 23), local), "192.0.2.4 a"),
			gives(testRequest("s8", sharing("k", 80)), "192.0.2.1 a"),
			counts("a", PoolCounts{AssignedIPv4: 5, AvailableIPv4: 11}),
			refuses(testRequest("s9", sharing("k", 80), wants("192.0.2.0")), `spec.loadBalancerIP: "192.0.2.0" is shared with service default/s1, which has port 80/TCP too`),
			refuses(testRequest("s9", sharing("k", 9), wants("192.0.2.4")), `spec.loadBalancerIP: "192.0.2.4" is held by service default/s6, whose externalTrafficPolicy or selector differs`),
			refuses(testRequest("s9", sharing("j", 9), wants("192.0.2.4")), `spec.loadBalancerIP: "192.0.2.4" is held by service default/s6, which does not share it`),
			releases("s1", true),
			offers(""),
			counts("a", PoolCounts{AssignedIPv4: 5, AvailableIPv4: 11}),
			gives(testRequest("s9", sharing("k", 80), wants("192.0.2.0")), "192.0.2.0 a"),
		}},
		{"who does not fit with others any more moves", []step{
			pools("", pool("a", "192.0.2.0/28")),
			gives(testRequest("s1", sharing("k", 80)), "192.0.2.0 a"),
			gives(testRequest("s2", sharing("k", 443)), "192.0.2.0 a"),
			gives(testRequest("s2", sharing("k", 443, 80)), "192.0.2.1 a"),
			gives(testRequest("s1", sharing("k", 80, 8080)), "192.0.2.0 a"),
			gives(testRequest("s3", sharing("k", 443)), "192.0.2.0 a"),
			gives(testRequest("s3", sharing("j", 443)), "192.0.2.2 a"),
			gives(testRequest("s3", sharing("", 443)), "192.0.2.2 a"),
			gives(testRequest("s4", sharing("j", 444)), "192.0.2.3 a"),
		}},
		{"a shared address opens up when its holders change", []step{
			pools("", pool("a", "192.0.2.0/32")),
			gives(testRequest("s1", sharing("", 80)), "192.0.2.0 a"),
			refuses(testRequest("s2", sharing("k", 443)), "no IPv4 address is free in a"),
			gives(testRequest("s1", sharing("k", 80, 443)), "192.0.2.0 a"),
			offers("s2"),
			gives(testRequest("s1", sharing("k", 80)), "192.0.2.0 a"),
			offers("s2"),
			gives(testRequest("s2", sharing("k", 443)), "192.0.2.0 a"),
		}},
		{"a freed address goes to the oldest", []step{
			pools("", pool("a", "192.0.2.0/31"), pool("b", "2001:db8::/128")),
			gives(testRequest("s1"), "192.0.2.0 a"),
			gives(testRequest("s2"), "192.0.2.1 a"),
			refuses(testRequest("s4"), "no IPv4 address is free in a"),
			refuses(testRequest("s3"), "no IPv4 address is free in a"),
			refuses(testRequest("s5", wants("192.0.2.1")), `spec.loadBalancerIP: "192.0.2.1" is held by service default/s2, which does not share it`),
			gives(testRequest("s6", families(v6)), "2001:db8:: b"),
			refuses(testRequest("s7", families(v6)), "no IPv6 address is free in b"),
			offers(""),
			releases("s1", true),
			offers("s3"),
			releases("s2", true),
			offers("s4 s5"),
			releases("s4", true),
			offers("s5"),
			releases("s6", true),
			offers("s7"),
		}},
		{"a pool edited moves only who must", []step{
			pools("", pool("a", "192.0.2.0/29")),
			gives(testRequest("s1"), "192.0.2.0 a"),
			gives(testRequest("s2"), "192.0.2.1 a"),
			gives(testRequest("s3"), "192.0.2.2 a"),
			pools("default/s1 default/s2", pool("a", "192.0.2.2-192.0.2.3")),
			gives(testRequest("s1"), "192.0.2.3 a"),
			refuses(testRequest("s2"), "no IPv4 address is free in a"),
			gives(testRequest("s3"), "192.0.2.2 a"),
			pools("", pool("a", "192.0.2.2-192.0.2.4")),
			offers("s2"),
			gives(testRequest("s2"), "192.0.2.4 a"),
			pools("", pool("z", "192.0.2.2-192.0.2.4", manual)),
			gives(testRequest("s3"), "192.0.2.2 z"),
			pools("default/s1 default/s2 default/s3", pool("z", "192.0.2.2-192.0.2.4", onlyFor("team-z"))),
			refuses(testRequest("s3"), "no pool has IPv4 addresses for it"),
			counts("z", PoolCounts{AssignedIPv4: 2, AvailableIPv4: 1}),
			counts("a", PoolCounts{}),
		}},
		{"adopting", []step{
			pools("", pool("a", "192.0.2.0/28 2001:db8::/64"), pool("b", "192.0.2.16/28", onlyFor("team-b"))),
			adopts(testRequest("s1"), "", "192.0.2.5"),
			adopts(testRequest("s2"), `status.loadBalancer.ingress: "192.0.2.5" is held by service default/s1, which does not share it`, "192.0.2.5"),
			adopts(testRequest("s3", sharing("k", 80)), "", "192.0.2.6"),
			adopts(testRequest("s4", sharing("k", 81)), "", "192.0.2.6"),
			adopts(testRequest("s5", sharing("k", 81)), `status.loadBalancer.ingress: "192.0.2.6" is shared with service default/s4, which has port 81/TCP too`, "192.0.2.6"),
			adopts(testRequest("s6", families(v6, v4)), "", "192.0.2.7", "2001:db8::7", "192.0.2.7"),
			adopts(testRequest("s7"), `status.loadBalancer.ingress: "192.0.2.17" is in pool b, whose serviceAllocation does not allow this Service`, "192.0.2.17"),
			adopts(testRequest("s8", families(v4, v6)), `status.loadBalancer.ingress: "203.0.113.1" is in no pool`, "203.0.113.1", "2001:db8::8"),
			adopts(testRequest("s9", wants("192.0.2.9")), "", "192.0.2.8"),
			gives(testRequest("s1"), "192.0.2.5 a"),
			gives(testRequest("s2"), "192.0.2.0 a"),
			gives(testRequest("s4", sharing("k", 81)), "192.0.2.6 a"),
			gives(testRequest("s6", families(v6, v4)), "2001:db8::7 192.0.2.7 a"),
			gives(testRequest("s8", families(v4, v6)), "192.0.2.1 2001:db8::8 a"),
			gives(testRequest("s9", wants("192.0.2.9")), "192.0.2.9 a"),
		}},
		{"reserved addresses", []step{
			pools("", pool("a", "192.0.2.0/30")),
			gives(testRequest("s1"), "192.0.2.0 a"),
			reserves(map[string]string{"192.0.2.0": "node n0", "192.0.2.1": "node n1", "203.0.113.1": "node n2"}),
			gives(testRequest("s1"), "192.0.2.0 a"),
			gives(testRequest("s2"), "192.0.2.2 a"),
			refuses(testRequest("s3", wants("192.0.2.1")), `spec.loadBalancerIP: "192.0.2.1" is the address of node n1`),
			counts("a", PoolCounts{AssignedIPv4: 2, AvailableIPv4: 1}),
			releases("s1", true),
			gives(testRequest("s4"), "192.0.2.3 a"),
			refuses(testRequest("s5"), "no IPv4 address is free in a"),
			pools("", pool("a", "192.0.2.0/30")),
			offers("s3 s5"),
			counts("a", PoolCounts{AssignedIPv4: 2}),
			reserves(map[string]string{"192.0.2.0": "node n0"}),
			offers("s3"),
			reserves(nil),
			offers("s5"),
			counts("a", PoolCounts{AssignedIPv4: 4}),
		}},
		{"big pools", []step{
			pools("", pool("a", "10.0.0.0/8 2001:db8::/64 fd00::/65", noBuggy)),
			gives(testRequest("s1", families(v4, v6)), "10.0.0.1 2001:db8:: a"),
			counts("a", PoolCounts{AssignedIPv4: 1, AssignedIPv6: 1, AvailableIPv4: 1<<24 - 1<<17 - 1, AvailableIPv6: math.MaxInt64}),
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			a := NewAllocator()
			for _, step := range test.steps {
				step(t, a)
			}
		})
	}
}

// TestAllocatorWalk changes Services, pools and reserved addresses at random and compares every state with that of a
// plain and slow model, and with that of an allocator which is restarted again and again.
func TestAllocatorWalk(t *testing.T) {
	for seed := range uint64(4) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			w := &walk{
				t: t, random: rand.New(rand.NewPCG(seed, 0)),
				steady: NewAllocator(), restarted: NewAllocator(),
				requests: map[string]Request{}, model: map[string][]netip.Addr{}, held: map[netip.Addr][]string{}, reserved: map[netip.Addr]string{},
			}
			w.changePools()
			for i := range 10_000 {
				w.step()
				w.check(fmt.Sprintf("step %d: %s", i, w.last))
				if t.Failed() {
					return
				}
				if w.random.IntN(20) == 0 {
					w.restart()
				}
			}
			if w.served < 1000 || w.refused < 1000 || w.shared < 400 || w.moved < 400 {
				t.Errorf("the walk was poor: %d served, %d refused, %d shared, %d moved", w.served, w.refused, w.shared, w.moved)
			}
		})
	}
}

type walk struct {
	t                 *testing.T
	random            *rand.Rand
	steady, restarted *Allocator
	last              string // the last step

	requests map[string]Request
	pools    []config.Pool // in the order they are tried
	reserved map[netip.Addr]string
	model    map[string][]netip.Addr
	held     map[netip.Addr][]string // the model the other way round

	served, refused, shared, moved int
}

// step makes one change as the controller would: apply it, then serve those who waited, then newcomers.
func (w *walk) step() {
	switch n := w.random.IntN(100); {
	case n < 2:
		w.changePools()
	case n < 4:
		w.last = "reserve"
		w.reserved = map[netip.Addr]string{}
		for range w.random.IntN(4) {
			w.reserved[w.addr()] = "node n"
		}
		w.steady.SetReserved(w.reserved)
		w.restarted.SetReserved(w.reserved)
		w.serveWaiting()
	case n < 35 && len(w.requests) > 0:
		key := w.existing()
		w.last = "release " + key
		held := len(w.model[key]) > 0
		delete(w.requests, key)
		w.hold(key, nil)
		for _, a := range []*Allocator{w.steady, w.restarted} {
			if got := a.Release(key); got != held {
				w.t.Errorf("%s: %t, want %t", w.last, got, held)
			}
		}
		w.serveWaiting()
	default:
		r := w.request()
		w.last = fmt.Sprintf("assign %+v", r)
		w.requests[r.Key] = r
		w.assign(r)
		w.serveWaiting()
	}
}

func (w *walk) existing() string {
	keys := slices.Sorted(maps.Keys(w.requests))
	return keys[w.random.IntN(len(keys))]
}

func (w *walk) request() Request {
	n := w.random.IntN(40)
	r := testRequest(fmt.Sprintf("s%02d", n))
	r.Created = time.Unix(int64(n%7), 0)
	pick := func(p int) bool { return w.random.IntN(100) < p }
	r.Namespace = []string{"default", "team-a", "team-b"}[w.random.IntN(3)]
	r.NamespaceLabels = map[string]string{"tier": []string{"gold", "lead"}[w.random.IntN(2)]}
	r.Labels = map[string]string{"app": []string{"web", "db"}[w.random.IntN(2)]}
	r.Families = [][]corev1.IPFamily{{v4}, {v6}, {v4, v6}, {v6, v4}}[w.random.IntN(4)]
	r.RequireDualStack = pick(20)
	if pick(15) {
		r.Addresses = []netip.Addr{w.addr()}
		if other := w.addr(); pick(30) && familyOf(other) != familyOf(r.Addresses[0]) {
			r.Addresses = append(r.Addresses, other)
		}
	}
	if pick(10) {
		r.Pool = string(rune('a' + w.random.IntN(6)))
	}
	if pick(50) {
		r.SharingKey = []string{"k", "l"}[w.random.IntN(2)]
	}
	if pick(20) {
		r.Backend = "Local:app=web"
	}
	r.Ports = nil
	for range 1 + w.random.IntN(2) {
		r.Ports = append(r.Ports, Port{corev1.ProtocolTCP, int32(80 + w.random.IntN(4))})
	}
	return r
}

// addr is an address that may be in a pool.
func (w *walk) addr() netip.Addr {
	if w.random.IntN(2) == 0 {
		return netip.AddrFrom4([4]byte{192, 0, 2, byte(248 + w.random.IntN(28))})
	}
	return netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 15: byte(w.random.IntN(20))})
}

// changePools cuts the addresses into pools anew.
func (w *walk) changePools() {
	w.last = "pools"
	w.pools = nil
	from4, from6 := netip.MustParseAddr("192.0.2.248"), netip.MustParseAddr("2001:db8::")
	skip := func(from netip.Addr, n int) netip.Addr {
		for range n {
			from = from.Next()
		}
		return from
	}
	for _, i := range w.random.Perm(6)[:2+w.random.IntN(4)] {
		p := config.Pool{
			Name:          string(rune('a' + i)),
			AutoAssign:    w.random.IntN(5) > 0,
			AvoidBuggyIPs: w.random.IntN(3) == 0,
			Priority:      w.random.IntN(3),
		}
		for range 1 + w.random.IntN(2) {
			to4, to6 := skip(from4, w.random.IntN(3)), skip(from6, w.random.IntN(3))
			if w.random.IntN(3) > 0 {
				p.Ranges = append(p.Ranges, config.Range{From: from4, To: to4})
			}
			if w.random.IntN(3) > 0 {
				p.Ranges = append(p.Ranges, config.Range{From: from6, To: to6})
			}
			from4, from6 = skip(to4, 1+w.random.IntN(2)), skip(to6, 1+w.random.IntN(2))
		}
		switch w.random.IntN(5) {
		case 0:
			p.Namespaces = []string{"team-a"}
		case 1:
			p.NamespaceSelectors = []labels.Selector{mustSelect("tier=gold")}
		case 2:
			p.ServiceSelectors = []labels.Selector{mustSelect("app=web")}
		}
		w.pools = append(w.pools, p)
	}

	shuffled := slices.Clone(w.pools)
	slices.SortFunc(w.pools, func(p, q config.Pool) int { // pinned, with a priority, by priority, by name
		rank := func(p config.Pool) string {
			return fmt.Sprintf("%t %t %d %s", !p.Pinned(), p.Priority == 0, p.Priority, p.Name)
		}
		return strings.Compare(rank(p), rank(q))
	})

	var misfits []string
	for _, key := range w.byAge() {
		for _, addr := range w.model[key] {
			if !w.mayHold(w.requests[key], addr) {
				misfits = append(misfits, key)
				break
			}
		}
	}
	for _, a := range []*Allocator{w.steady, w.restarted} {
		if diff := cmp.Diff(misfits, a.SetPools(shuffled)); diff != "" {
			w.t.Errorf("misfits after the pools changed (-want +got):\n%s", diff)
		}
	}
	for _, key := range misfits {
		w.assign(w.requests[key])
	}
	w.serveWaiting()
}

func (w *walk) byAge() []string {
	return slices.SortedFunc(maps.Keys(w.requests), func(a, b string) int {
		return turnOf(w.requests[a]).compare(turnOf(w.requests[b]))
	})
}

// assign assigns to one Service in both allocators and the model.
func (w *walk) assign(r Request) {
	before := w.model[r.Key]
	want := w.expect(r)
	w.hold(r.Key, want)
	for _, a := range []*Allocator{w.steady, w.restarted} {
		got, err := a.Assign(r)
		if (err == nil) != (len(want) > 0) || !slices.Equal(got.Addresses, want) {
			w.t.Errorf("%s\ngot %v, error %v\nwant %v", w.last, got, err, want)
		}
	}
	if len(want) == 0 {
		w.refused++
		return
	}
	w.served++
	if len(before) > 0 && before[0] != want[0] {
		w.moved++
	}
	if len(w.holders(want[0])) > 1 {
		w.shared++
	}
}

// serveWaiting lets both allocators serve those who wait; the model tries everyone, oldest first and from the start
// after each that got more.
func (w *walk) serveWaiting() {
	for _, a := range []*Allocator{w.steady, w.restarted} {
		for r := range a.Waiting() {
			_, _ = a.Assign(r) // check compares what comes of it
		}
	}
	for again := true; again; {
		again = false
		for _, key := range w.byAge() {
			want := w.expect(w.requests[key])
			if !slices.Equal(want, w.model[key]) {
				w.hold(key, want)
				again = true
				break
			}
		}
	}
}

// expect is what the model gives a Service.
func (w *walk) expect(r Request) []netip.Addr {
	var got []netip.Addr
	if r.RequireDualStack && len(r.Families) < 2 {
		return nil
	}
	if len(r.Addresses) > 0 {
		for _, family := range r.Families {
			for _, addr := range r.Addresses {
				if familyOf(addr) == family && w.mayHold(r, addr) {
					got = append(got, addr)
				}
			}
		}
		if len(got) < len(r.Addresses) || r.RequireDualStack && len(got) < 2 {
			return nil
		}
		return got
	}
	for _, family := range r.Families {
		if addr, ok := w.expectOne(r, family); ok {
			got = append(got, addr)
		}
	}
	if r.RequireDualStack && len(got) < 2 {
		return nil
	}
	return got
}

func (w *walk) expectOne(r Request, family corev1.IPFamily) (netip.Addr, bool) {
	for _, addr := range w.model[r.Key] {
		if familyOf(addr) == family && w.mayHold(r, addr) {
			return addr, true
		}
	}
	for _, p := range w.pools {
		if r.Pool == "" && !p.AutoAssign {
			continue
		}
		for _, shared := range []bool{true, false} {
			for _, addr := range addressesOf(p, family) {
				if (len(w.holders(addr)) > 0) == shared && w.mayHold(r, addr) {
					return addr, true
				}
			}
		}
	}
	return netip.Addr{}, false
}

func addressesOf(p config.Pool, family corev1.IPFamily) []netip.Addr {
	var list []netip.Addr
	for _, r := range p.Ranges {
		for addr := r.From; familyOf(addr) == family && !r.To.Less(addr); addr = addr.Next() {
			list = append(list, addr)
		}
	}
	slices.SortFunc(list, netip.Addr.Compare)
	return list
}

func (w *walk) holders(addr netip.Addr) []string { return w.held[addr] }

// hold makes a Service of the model hold exactly these addresses.
func (w *walk) hold(key string, addrs []netip.Addr) {
	for _, addr := range w.model[key] {
		w.held[addr] = slices.DeleteFunc(w.held[addr], func(holder string) bool { return holder == key })
	}
	w.model[key] = addrs
	for _, addr := range addrs {
		w.held[addr] = append(w.held[addr], key)
	}
}

// mayHold tells whether the rules let a Service hold an address beside those who hold it.
func (w *walk) mayHold(r Request, addr netip.Addr) bool {
	in := slices.IndexFunc(w.pools, func(p config.Pool) bool { return p.Contains(addr) })
	if in < 0 || !w.pools[in].Allows(r.Namespace, r.NamespaceLabels, r.Labels) || r.Pool != "" && r.Pool != w.pools[in].Name {
		return false
	}
	if _, reserved := w.reserved[addr]; reserved && !slices.Contains(w.model[r.Key], addr) {
		return false
	}
	for _, key := range w.holders(addr) {
		if key != r.Key && !mayShare(r, w.requests[key]) {
			return false
		}
	}
	return true
}

func mayShare(r, s Request) bool {
	return r.SharingKey != "" && r.SharingKey == s.SharingKey && r.Backend == s.Backend &&
		!slices.ContainsFunc(r.Ports, func(p Port) bool { return slices.Contains(s.Ports, p) })
}

// check compares both allocators with the model and looks at the rules that hold whatever the model says.
func (w *walk) check(when string) {
	for name, a := range map[string]*Allocator{"steady": w.steady, "restarted": w.restarted} {
		holders := map[netip.Addr][]Request{}
		for key, r := range w.requests {
			got, _ := a.Assigned(key)
			if !slices.Equal(got.Addresses, w.model[key]) {
				w.t.Errorf("%s\n%s allocator: %s holds %v, want %v", when, name, key, got.Addresses, w.model[key])
			}
			for _, addr := range got.Addresses {
				holders[addr] = append(holders[addr], r)
				if !slices.ContainsFunc(w.pools, func(p config.Pool) bool {
					return p.Contains(addr) && p.Allows(r.Namespace, r.NamespaceLabels, r.Labels)
				}) {
					w.t.Errorf("%s\n%s allocator: %s holds %s, which no pool gives it", when, name, key, addr)
				}
			}
		}
		for addr, all := range holders {
			for i := range all {
				for j := range i {
					if !mayShare(all[i], all[j]) {
						w.t.Errorf("%s\n%s allocator: %s and %s both hold %s", when, name, all[i].Key, all[j].Key, addr)
					}
				}
			}
		}
		for _, p := range w.pools {
			var want PoolCounts
			for _, addr := range append(addressesOf(p, v4), addressesOf(p, v6)...) {
				_, reserved := w.reserved[addr]
				held := len(holders[addr]) > 0
				switch {
				case held && addr.Is4():
					want.AssignedIPv4++
				case held:
					want.AssignedIPv6++
				case reserved || !p.Contains(addr):
				case addr.Is4():
					want.AvailableIPv4++
				default:
					want.AvailableIPv6++
				}
			}
			if got := a.Counts(p.Name); got != want {
				w.t.Errorf("%s\n%s allocator: counts of %s %+v, want %+v", when, name, p.Name, got, want)
			}
		}
	}
}

// restart replaces one allocator by a new one that learns from the Services' status, in any order.
func (w *walk) restart() {
	a := NewAllocator()
	a.SetReserved(w.reserved)
	a.SetPools(w.pools)
	keys := slices.Sorted(maps.Keys(w.requests))
	w.random.Shuffle(len(keys), func(i, j int) { keys[i], keys[j] = keys[j], keys[i] })
	for _, key := range keys {
		if len(w.model[key]) > 0 {
			if err := a.Adopt(w.requests[key], w.model[key]); err != nil {
				w.t.Errorf("restart: %v", err)
			}
		}
	}
	for _, key := range w.byAge() {
		_, _ = a.Assign(w.requests[key]) // check compares what comes of it
	}
	w.restarted = a
	w.check("restart")
}

// BenchmarkAllocator has 10,000 Services with an address; an operation is one change.
func BenchmarkAllocator(b *testing.B) {
	const services = 10_000
	for _, bench := range []struct {
		name   string
		ranges string
		edit   func(i int, r *Request)
	}{
		{"v4 8", "10.0.0.0/8", func(int, *Request) {}},
		{"v6 64", "2001:db8::/64", func(_ int, r *Request) { r.Families = []corev1.IPFamily{v6} }},
		{"one sharing key", "10.0.0.0/8", func(i int, r *Request) { r.SharingKey = "k"; r.Ports[0].Port = int32(80 + i%2) }},
	} {
		request := func(i int) Request {
			r := testRequest(fmt.Sprintf("s%d", i))
			bench.edit(i, &r)
			return r
		}
		fill := func(b *testing.B) *Allocator {
			a := NewAllocator()
			a.SetPools([]config.Pool{testPool(b, "a", bench.ranges)})
			for i := range services {
				if _, err := a.Assign(request(i)); err != nil {
					b.Fatal(err)
				}
			}
			return a
		}
		b.Run(bench.name+"/fill", func(b *testing.B) {
			for b.Loop() {
				fill(b)
			}
		})
		b.Run(bench.name+"/release and assign", func(b *testing.B) {
			a := fill(b)
			random := rand.New(rand.NewPCG(1, 1))
			for b.Loop() {
				r := request(random.IntN(services))
				a.Release(r.Key)
				if _, err := a.Assign(r); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(bench.name+"/unchanged", func(b *testing.B) {
			a := fill(b)
			r := request(services / 2)
			for b.Loop() {
				if _, err := a.Assign(r); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	b.Run("full pool with 10,000 waiting/release", func(b *testing.B) {
		a := NewAllocator()
		a.SetPools([]config.Pool{testPool(b, "a", "10.0.0.0-10.0.0.255")})
		for i := range services {
			_, _ = a.Assign(testRequest(fmt.Sprintf("s%05d", i))) // most wait
		}
		for i := 0; b.Loop(); i++ {
			key := fmt.Sprintf("default/s%05d", i%services)
			a.Release(key)
			for r := range a.Waiting() {
				if _, err := a.Assign(r); err != nil {
					b.Fatal(err)
				}
			}
			_, _ = a.Assign(testRequest(strings.TrimPrefix(key, "default/"))) // waits again, or not
		}
	})
}
