package config_test

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/longshore-lb/longshore/config"
	"github.com/longshore-lb/longshore/config/v1beta1"
)

func TestParseL2AdvertisementErrors(t *testing.T) {
	_, err := config.ParseL2Advertisement(&v1beta1.L2Advertisement{
		ObjectMeta: meta("lan"),
		Spec: v1beta1.L2AdvertisementSpec{
			IPAddressPoolSelectors: []metav1.LabelSelector{badSelector},
			NodeSelectors:          []metav1.LabelSelector{badSelector},
			ServiceSelectors:       []metav1.LabelSelector{badSelector},
			Interfaces:             []string{"eth0", "", "a-name-of-16-byte", "a/b"},
			PreferredNodeSelectors: []v1beta1.PreferredNodeSelector{
				{Weight: 0, Preference: selector("a", "b")}, {Weight: 101, Preference: badSelector},
			},
		},
	})
	const (
		lan = "L2Advertisement longshore-system/lan: "
		bad = `"{\"matchExpressions\":[{\"key\":\"zone\",\"operator\":\"Near\"}]}": "Near" is not a valid label selector operator` + "\n"
	)
	want := lan + `spec.ipAddressPoolSelectors[0]: ` + bad +
		lan + `spec.nodeSelectors[0]: ` + bad +
		lan + `spec.serviceSelectors[0]: ` + bad +
		lan + `spec.interfaces[1]: "": not the name of a link` + "\n" +
		lan + `spec.interfaces[2]: "a-name-of-16-byte": not the name of a link` + "\n" +
		lan + `spec.interfaces[3]: "a/b": not the name of a link` + "\n" +
		lan + `spec.preferredNodeSelectors[0].weight: 0: must be between 1 and 100` + "\n" +
		lan + `spec.preferredNodeSelectors[1].weight: 101: must be between 1 and 100` + "\n" +
		lan + `spec.preferredNodeSelectors[1].preference: ` + bad
	if diff := cmp.Diff(want, text(err)+"\n"); diff != "" {
		t.Errorf("error (-want +got):\n%s", diff)
	}
}

func TestL2AdvertisementSelects(t *testing.T) {
	everything, err := config.ParseL2Advertisement(&v1beta1.L2Advertisement{ObjectMeta: meta("all")})
	if err != nil {
		t.Fatal(err)
	}
	some, err := config.ParseL2Advertisement(&v1beta1.L2Advertisement{
		ObjectMeta: meta("some"),
		Spec: v1beta1.L2AdvertisementSpec{
			IPAddressPools:         []string{"red"},
			IPAddressPoolSelectors: []metav1.LabelSelector{selector("tier", "gold")},
			NodeSelectors:          []metav1.LabelSelector{selector("role", "edge"), selector("role", "worker")},
			ServiceSelectors:       []metav1.LabelSelector{selector("app", "web")},
			Interfaces:             []string{"eth1"},
			PreferredNodeSelectors: []v1beta1.PreferredNodeSelector{
				{Weight: 60, Preference: selector("role", "edge")}, {Weight: 50, Preference: selector("zone", "a")},
			},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"eth1"}, some.Interfaces); diff != "" {
		t.Errorf("interfaces (-want +got):\n%s", diff)
	}
	for _, test := range []struct {
		what       string
		some, want bool
	}{
		{"pool by name", some.SelectsPool(config.Pool{Name: "red"}), true},
		{"pool by label", some.SelectsPool(config.Pool{Name: "blue", Labels: labels.Set{"tier": "gold"}}), true},
		{"other pool", some.SelectsPool(config.Pool{Name: "blue"}), false},
		{"any pool", everything.SelectsPool(config.Pool{Name: "blue"}), true},
		{"first node selector", some.SelectsNode(labels.Set{"role": "edge"}), true},
		{"second node selector", some.SelectsNode(labels.Set{"role": "worker"}), true},
		{"other node", some.SelectsNode(nil), false},
		{"any node", everything.SelectsNode(nil), true},
		{"service", some.SelectsService(labels.Set{"app": "web"}), true},
		{"other service", some.SelectsService(labels.Set{"app": "db"}), false},
		{"any service", everything.SelectsService(nil), true},
	} {
		if test.some != test.want {
			t.Errorf("%s: %t, want %t", test.what, test.some, test.want)
		}
	}
	for _, test := range []struct {
		node labels.Set
		want int
	}{
		{labels.Set{"role": "edge", "zone": "a"}, 110},
		{labels.Set{"role": "edge"}, 60},
		{labels.Set{"role": "worker"}, 0},
		{labels.Set{"zone": "a"}, 0}, // not selected, so not preferred
	} {
		if got := some.Preference(test.node); got != test.want {
			t.Errorf("Preference(%v) = %d, want %d", test.node, got, test.want)
		}
	}
}

func TestParseBGPAdvertisementErrors(t *testing.T) {
	const tor = "BGPAdvertisement longshore-system/tor: "
	n := func(n int32) *int32 { return &n }
	for _, test := range []struct {
		name string
		spec v1beta1.BGPAdvertisementSpec
		want string
	}{
		{"lengths too short", v1beta1.BGPAdvertisementSpec{AggregationLength: n(0), AggregationLengthV6: n(-1)},
			tor + `spec.aggregationLength: 0: must be between 1 and 32` + "\n" + tor + `spec.aggregationLengthV6: -1: must be between 1 and 128`},
		{"lengths too long", v1beta1.BGPAdvertisementSpec{AggregationLength: n(33), AggregationLengthV6: n(129)},
			tor + `spec.aggregationLength: 33: must be between 1 and 32` + "\n" + tor + `spec.aggregationLengthV6: 129: must be between 1 and 128`},
		{"aggregate of selected services", v1beta1.BGPAdvertisementSpec{
			AggregationLength: n(24), AggregationLengthV6: n(64), ServiceSelectors: []metav1.LabelSelector{selector("a", "b")}},
			tor + `spec.aggregationLength: 24: must be 32 with serviceSelectors` + "\n" + tor + `spec.aggregationLengthV6: 64: must be 128 with serviceSelectors`},
		{"alias", v1beta1.BGPAdvertisementSpec{Communities: []string{"1:2", "no-export"}},
			tor + `spec.communities[1]: "no-export": no Community object has this name, and it is neither a:b nor large:a:b:c`},
		{"no community", v1beta1.BGPAdvertisementSpec{Communities: []string{""}}, tor + `spec.communities[0]: "": neither a:b nor large:a:b:c`},
		{"reserved", v1beta1.BGPAdvertisementSpec{Communities: []string{"large:4294967295:1:1"}},
			tor + `spec.communities[0]: "large:4294967295:1:1": "4294967295" is reserved (RFC 8092 section 5)`},
		{"three numbers", v1beta1.BGPAdvertisementSpec{Communities: []string{"1:2:3"}}, tor + `spec.communities[0]: "1:2:3": neither a:b nor large:a:b:c`},
		{"large of two", v1beta1.BGPAdvertisementSpec{Communities: []string{"large:1:2"}}, tor + `spec.communities[0]: "large:1:2": neither a:b nor large:a:b:c`},
		{"17 bits", v1beta1.BGPAdvertisementSpec{Communities: []string{"65536:1"}}, tor + `spec.communities[0]: "65536:1": "65536" is not a number of 16 bits`},
		{"33 bits", v1beta1.BGPAdvertisementSpec{Communities: []string{"large:1:4294967296:1"}},
			tor + `spec.communities[0]: "large:1:4294967296:1": "4294967296" is not a number of 32 bits`},
		{"not a number", v1beta1.BGPAdvertisementSpec{Communities: []string{"1:"}}, tor + `spec.communities[0]: "1:": "" is not a number of 16 bits`},
		{"selector", v1beta1.BGPAdvertisementSpec{NodeSelectors: []metav1.LabelSelector{badSelector}},
			tor + `spec.nodeSelectors[0]: "{\"matchExpressions\":[{\"key\":\"zone\",\"operator\":\"Near\"}]}": "Near" is not a valid label selector operator`},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, err := config.ParseBGPAdvertisement(&v1beta1.BGPAdvertisement{ObjectMeta: meta("tor"), Spec: test.spec}, config.Aliases{"blackhole": "65535:666"})
			if diff := cmp.Diff(test.want, text(err)); diff != "" {
				t.Errorf("error (-want +got):\n%s", diff)
			}
		})
	}
}

func TestParseBGPAdvertisement(t *testing.T) {
	v4, v6 := int32(24), int32(64)
	a, err := config.ParseBGPAdvertisement(&v1beta1.BGPAdvertisement{
		ObjectMeta: annotated(meta("tor"), config.MEDAnnotation, "4294967295", config.PrependAnnotation, "10"),
		Spec: v1beta1.BGPAdvertisementSpec{
			AggregationLength: &v4, AggregationLengthV6: &v6, LocalPref: 4294967295, Peers: []string{"tor-1"},
			Communities: []string{"65535:65281", "large:4294967294:0:007", "065535:65281", "blackhole", "65535:666"},
		},
	}, config.Aliases{"blackhole": "65535:666"})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"65535:65281", "large:4294967294:0:7", "65535:666"}, a.Communities); diff != "" {
		t.Errorf("communities (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"tor-1"}, a.Peers); diff != "" || a.LocalPref != 4294967295 || a.MED != 4294967295 || a.Prepend != 10 {
		t.Errorf("got %+v", a)
	}
	plain, err := config.ParseBGPAdvertisement(&v1beta1.BGPAdvertisement{ObjectMeta: meta("plain"), Spec: v1beta1.BGPAdvertisementSpec{Communities: []string{"not-looked-up"}}}, nil)
	if err != nil || len(plain.Communities) > 0 {
		t.Fatalf("communities %q, error %v", plain.Communities, err)
	}
	for _, test := range []struct {
		a          config.BGPAdvertisement
		addr, want string
	}{
		{a, "10.0.0.77", "10.0.0.0/24"}, {a, "fd00::77", "fd00::/64"},
		{plain, "10.0.0.77", "10.0.0.77/32"}, {plain, "fd00::77", "fd00::77/128"},
	} {
		if got := test.a.Prefix(netip.MustParseAddr(test.addr)).String(); got != test.want {
			t.Errorf("%s: Prefix(%s) = %s, want %s", test.a.Name, test.addr, got, test.want)
		}
	}
}

// annotated is metadata with these annotations, each key followed by its value.
func annotated(meta metav1.ObjectMeta, annotations ...string) metav1.ObjectMeta {
	for i := 0; i < len(annotations); i += 2 {
		metav1.SetMetaDataAnnotation(&meta, annotations[i], annotations[i+1])
	}
	return meta
}

// TestParseAnnotations has numbers that are none, or too large.
func TestParseAnnotations(t *testing.T) {
	_, err := config.ParseBGPAdvertisement(&v1beta1.BGPAdvertisement{
		ObjectMeta: annotated(meta("tor"), config.MEDAnnotation, "4294967296", config.PrependAnnotation, "thrice"),
	}, nil)
	want := `BGPAdvertisement longshore-system/tor: annotation longshore.dev/med: "4294967296": must be a number between 0 and 4294967295` + "\n" +
		`BGPAdvertisement longshore-system/tor: annotation longshore.dev/as-path-prepend: "thrice": must be a number between 0 and 10`
	if diff := cmp.Diff(want, text(err)); diff != "" {
		t.Errorf("error (-want +got):\n%s", diff)
	}
}

func TestParseCommunity(t *testing.T) {
	const named = "Community longshore-system/named: "
	for _, test := range []struct {
		name    string
		aliases []v1beta1.CommunityAlias
		want    []config.Alias
		err     string
	}{
		{name: "none"},
		{name: "both kinds", aliases: []v1beta1.CommunityAlias{{Name: "blackhole", Value: "65535:0666"}, {Name: "site", Value: "large:64512:1:2"}},
			want: []config.Alias{{Name: "blackhole", Value: "65535:666"}, {Name: "site", Value: "large:64512:1:2"}}},
		{name: "twice", aliases: []v1beta1.CommunityAlias{{Name: "a", Value: "1:1"}, {Name: "a", Value: "1:1"}},
			err: named + `spec.communities[1].name: "a": is the name of spec.communities[0] already`},
		{name: "nameless", aliases: []v1beta1.CommunityAlias{{Value: "1:1"}}, err: named + `spec.communities[0].name: must be set`},
		{name: "a community for a name", aliases: []v1beta1.CommunityAlias{{Name: "1:1", Value: "1:2"}},
			err: named + `spec.communities[0].name: "1:1": has a colon, as only communities have`},
		{name: "a name for a community", aliases: []v1beta1.CommunityAlias{{Name: "a", Value: "b"}},
			err: named + `spec.communities[0].value: "b": neither a:b nor large:a:b:c`},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := config.ParseCommunity(&v1beta1.Community{ObjectMeta: meta("named"), Spec: v1beta1.CommunitySpec{Communities: test.aliases}})
			if diff := cmp.Diff(test.err, text(err)); diff != "" {
				t.Errorf("error (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("aliases (-want +got):\n%s", diff)
			}
		})
	}
}
