package config_test

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/longshore-lb/longshore/config"
	"github.com/longshore-lb/longshore/config/v1beta1"
)

// text is the message of an error, empty for none.
func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

func meta(name string) metav1.ObjectMeta {
	return metav1.ObjectMeta{Namespace: "longshore-system", Name: name}
}

func pool(name string, addresses ...string) *v1beta1.IPAddressPool {
	return &v1beta1.IPAddressPool{ObjectMeta: meta(name), Spec: v1beta1.IPAddressPoolSpec{Addresses: addresses}}
}

func selector(key, value string) metav1.LabelSelector {
	return metav1.LabelSelector{MatchLabels: map[string]string{key: value}}
}

var badSelector = metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{{Key: "zone", Operator: "Near"}}}

func TestParsePoolErrors(t *testing.T) {
	const red = "IPAddressPool longshore-system/red: "
	for _, test := range []struct {
		name string
		pool *v1beta1.IPAddressPool
		want string
	}{
		{"no addresses", pool("red"), red + `spec.addresses: must be set`},
		{"reversed", pool("red", "10.1.0.0/24", "10.0.0.9-10.0.0.1"),
			red + `spec.addresses[1]: "10.0.0.9-10.0.0.1": range is reversed`},
		{"reversed IPv6", pool("red", "fd00::9-fd00::1"), red + `spec.addresses[0]: "fd00::9-fd00::1": range is reversed`},
		{"bad first", pool("red", "10.0.0.300-10.0.0.1"),
			red + `spec.addresses[0]: "10.0.0.300-10.0.0.1": "10.0.0.300" is not an IP address`},
		{"bad last", pool("red", "10.0.0.1-9"), red + `spec.addresses[0]: "10.0.0.1-9": "9" is not an IP address`},
		{"bad CIDR", pool("red", "10.0.0.0/33"), red + `spec.addresses[0]: "10.0.0.0/33": not a CIDR`},
		{"single address", pool("red", "10.0.0.1"),
			red + `spec.addresses[0]: "10.0.0.1": neither a CIDR like 10.1.0.0/24 nor a range like 10.1.0.10-10.1.0.20`},
		{"empty text", pool("red", ""),
			red + `spec.addresses[0]: "": neither a CIDR like 10.1.0.0/24 nor a range like 10.1.0.10-10.1.0.20`},
		{"mixed families", pool("red", "10.0.0.1-fd00::1"),
			red + `spec.addresses[0]: "10.0.0.1-fd00::1": range begins in one address family and ends in the other`},
		{"zone", pool("red", "fe80::1%eth0-fe80::2%eth0"),
			red + `spec.addresses[0]: "fe80::1%eth0-fe80::2%eth0": "fe80::1%eth0" has a zone`},
		{"IPv4 as IPv6", pool("red", "::ffff:10.0.0.1-::ffff:10.0.0.2"),
			red + `spec.addresses[0]: "::ffff:10.0.0.1-::ffff:10.0.0.2": write ::ffff:10.0.0.1 as IPv4`},
		{"IPv4 CIDR as IPv6", pool("red", "::ffff:10.0.0.0/120"),
			red + `spec.addresses[0]: "::ffff:10.0.0.0/120": write ::ffff:10.0.0.0 as IPv4`},
		{"multicast", pool("red", "224.0.0.0/24"),
			red + `spec.addresses[0]: "224.0.0.0/24": 224.0.0.0 cannot be the address of a Service`},
		{"everything", pool("red", "::/0"), red + `spec.addresses[0]: "::/0": :: cannot be the address of a Service`},
		{"overlap in the pool", pool("red", "10.0.0.0/24", "10.0.0.255-10.0.1.7"),
			red + `spec.addresses[1]: "10.0.0.255-10.0.1.7": overlaps 10.0.0.0/24 of the same pool`},
		{"selectors and priority", &v1beta1.IPAddressPool{ObjectMeta: meta("red"), Spec: v1beta1.IPAddressPoolSpec{
			Addresses: []string{"10.0.0.0/24"},
			ServiceAllocation: &v1beta1.ServiceAllocation{
				Priority:           -1,
				NamespaceSelectors: []metav1.LabelSelector{selector("a", "b"), badSelector},
				ServiceSelectors:   []metav1.LabelSelector{selector("-", "b")},
			},
		}}, red + `spec.serviceAllocation.priority: -1: must not be negative
` + red + `spec.serviceAllocation.namespaceSelectors[1]: "{\"matchExpressions\":[{\"key\":\"zone\",\"operator\":\"Near\"}]}": "Near" is not a valid label selector operator
` + red + `spec.serviceAllocation.serviceSelectors[0]: "{\"matchLabels\":{\"-\":\"b\"}}": key: Invalid value: "-": name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')`},
		{"two mistakes, no namespace", &v1beta1.IPAddressPool{
			ObjectMeta: metav1.ObjectMeta{Name: "red"},
			Spec:       v1beta1.IPAddressPoolSpec{Addresses: []string{"x", "10.0.0.2-10.0.0.1"}},
		}, `IPAddressPool red: spec.addresses[0]: "x": neither a CIDR like 10.1.0.0/24 nor a range like 10.1.0.10-10.1.0.20
IPAddressPool red: spec.addresses[1]: "10.0.0.2-10.0.0.1": range is reversed`},
	} {
		t.Run(test.name, func(t *testing.T) {
			p, err := config.ParsePool(test.pool)
			if diff := cmp.Diff(test.want, text(err)); diff != "" {
				t.Errorf("error (-want +got):\n%s", diff)
			}
			if p.Name != "" {
				t.Errorf("a pool comes with the error: %v", p)
			}
		})
	}
}

func TestParsePool(t *testing.T) {
	no := false
	p, err := config.ParsePool(&v1beta1.IPAddressPool{
		ObjectMeta: metav1.ObjectMeta{Name: "red", Labels: map[string]string{"tier": "gold"}},
		Spec: v1beta1.IPAddressPoolSpec{
			Addresses:     []string{"10.0.0.77/24", " 10.0.1.1 - 10.0.1.9 ", "fd00::/64", "fd01::1-fd01::ffff"},
			AutoAssign:    &no,
			AvoidBuggyIPs: true,
			ServiceAllocation: &v1beta1.ServiceAllocation{
				Priority:           5,
				Namespaces:         []string{"shop"},
				NamespaceSelectors: []metav1.LabelSelector{selector("team", "shop")},
				ServiceSelectors:   []metav1.LabelSelector{selector("app", "web"), selector("app", "api")},
			},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	var ranges []string
	for _, r := range p.Ranges {
		ranges = append(ranges, r.String())
	}
	if diff := cmp.Diff([]string{"10.0.0.0/24", "10.0.1.1-10.0.1.9", "fd00::/64", "fd01::1-fd01::ffff"}, ranges); diff != "" {
		t.Errorf("ranges (-want +got):\n%s", diff)
	}
	if p.AutoAssign || !p.AvoidBuggyIPs || p.Priority != 5 || !p.Pinned() || p.Labels["tier"] != "gold" {
		t.Errorf("got %+v", p)
	}
	for addr, want := range map[string]bool{
		"10.0.0.1": true, "10.0.0.0": false, "10.0.0.255": false, "10.0.1.9": true, "10.0.1.10": false,
		"fd00::": true, "fd00::ff": true, "fd01::1:0": false, "10.9.9.9": false,
	} {
		if got := p.Contains(netip.MustParseAddr(addr)); got != want {
			t.Errorf("Contains(%s) = %t, want %t", addr, got, want)
		}
	}
	for _, test := range []struct {
		namespace                      string
		namespaceLabels, serviceLabels labels.Set
		want                           bool
	}{
		{"shop", nil, labels.Set{"app": "web"}, true},
		{"shop", nil, labels.Set{"app": "api"}, true},
		{"shop", nil, labels.Set{"app": "db"}, false},
		{"shop", nil, nil, false},
		{"shop-2", labels.Set{"team": "shop"}, labels.Set{"app": "web"}, true},
		{"other", labels.Set{"team": "other"}, labels.Set{"app": "web"}, false},
		{"other", nil, labels.Set{"app": "web"}, false},
	} {
		if got := p.Allows(test.namespace, test.namespaceLabels, test.serviceLabels); got != test.want {
			t.Errorf("Allows(%s, %v, %v) = %t", test.namespace, test.namespaceLabels, test.serviceLabels, got)
		}
	}
}

func TestParsePoolDefaults(t *testing.T) {
	p, err := config.ParsePool(pool("red", "10.0.0.0/24"))
	if err != nil {
		t.Fatal(err)
	}
	if !p.AutoAssign || p.AvoidBuggyIPs || p.Pinned() || p.Priority != 0 {
		t.Errorf("got %+v", p)
	}
	if !p.Contains(netip.MustParseAddr("10.0.0.0")) || !p.Allows("any", nil, nil) {
		t.Errorf("the pool is not for all: %+v", p)
	}
}

func TestParsePoolsOverlap(t *testing.T) {
	at := func(second int, p *v1beta1.IPAddressPool) *v1beta1.IPAddressPool {
		p.CreationTimestamp = metav1.NewTime(time.Unix(int64(second), 0))
		return p
	}
	from := []*v1beta1.IPAddressPool{
		at(3, pool("a-late", "10.0.0.128/25", "10.5.0.0/24")),
		at(1, pool("red", "10.0.0.0/24", "10.2.0.0/24")),
		at(1, pool("blue", "10.1.0.0/24")),
		at(2, pool("bad", "10.3.0.9-10.3.0.1")),
		at(4, pool("wide", "10.0.0.0/8")),
		at(5, pool("edge", "10.0.1.0-10.0.1.9", "10.5.0.0/24", "9.255.255.0-9.255.255.255", "10.3.0.0/24")),
		at(6, pool("touch", "10.0.1.9-10.0.1.20")),
		at(7, pool("six", "fd00::/64")),
	}
	wantPools := []string{"blue", "red", "edge", "six"}
	wantErrs := []string{
		`IPAddressPool longshore-system/bad: spec.addresses[0]: "10.3.0.9-10.3.0.1": range is reversed`,
		`IPAddressPool longshore-system/a-late: spec.addresses[0]: "10.0.0.128/25": overlaps 10.0.0.0/24 of IPAddressPool red`,
		`IPAddressPool longshore-system/wide: spec.addresses[0]: "10.0.0.0/8": overlaps 10.0.0.0/24 of IPAddressPool red`,
		`IPAddressPool longshore-system/touch: spec.addresses[0]: "10.0.1.9-10.0.1.20": overlaps 10.0.1.0-10.0.1.9 of IPAddressPool edge`,
	}
	for range len(from) { // whatever the order
		from = append(from[1:], from[0])
		pools, errs := config.ParsePools(from)
		var names, messages []string
		for _, p := range pools {
			names = append(names, p.Name)
		}
		for _, err := range errs {
			messages = append(messages, err.Error())
		}
		if diff := cmp.Diff(wantPools, names); diff != "" {
			t.Fatalf("pools (-want +got):\n%s", diff)
		}
		if diff := cmp.Diff(wantErrs, messages); diff != "" {
			t.Fatalf("errors (-want +got):\n%s", diff)
		}
	}
}

func FuzzParsePool(f *testing.F) {
	for _, s := range []string{
		"10.0.0.0/24", "10.0.0.5/24", "10.0.0.1-10.0.0.9", "fd00::/64", "fd00::1-fd00::9", "10.0.0.9-10.0.0.1", "::/0", "-", "/", "1-/",
		"10.0.0.1/32", "0.0.0.1-255.255.255.254", "fe80::1%a-b", "::ffff:1.2.3.4/128", "10.0.0.0-10.0.0.255",
	} {
		f.Add(s, "10.0.0.0/31")
	}
	f.Fuzz(func(t *testing.T, a, b string) {
		p, err := config.ParsePool(pool("red", a, b))
		if err != nil {
			return
		}
		for _, r := range p.Ranges {
			again, err := config.ParseRange(r.String())
			if err != nil || again != r {
				t.Errorf("%q: %s reads as %s, %v", a, r, again, err)
			}
			if !r.Contains(r.From) || !r.Contains(r.To) || r.Contains(r.From.Prev()) || r.Contains(r.To.Next()) {
				t.Errorf("%q: %s does not end at its ends", a, r)
			}
			if slices.ContainsFunc(p.Ranges, func(s config.Range) bool { return s != r && s.Overlaps(r) }) {
				t.Errorf("%q, %q: overlap", a, b)
			}
		}
	})
}
