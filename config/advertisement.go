package config

import (
	"fmt"
	"math"
	"net/netip"
	"slices"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/longshore-lb/longshore/config/v1beta1"
)

// L2Advertisement is a validated L2Advertisement: what to answer for by ARP and NDP, and where.
type L2Advertisement struct {
	Name       string
	Interfaces []string // names of the links to answer on; empty = every usable one

	selection
	preferences []preference
}

type preference struct {
	weight int
	nodes  labels.Selector
}

// Preference is how much the advertisement prefers a node, by its labels, over other nodes it selects: the sum of the
// weights that match, 0 for none. It is 0 for a node that the advertisement does not select.
func (a L2Advertisement) Preference(nodeLabels labels.Set) int {
	if !a.SelectsNode(nodeLabels) {
		return 0
	}
	sum := 0
	for _, p := range a.preferences {
		if p.nodes.Matches(nodeLabels) {
			sum += p.weight
		}
	}
	return sum
}

// ParseL2Advertisement validates an L2Advertisement.
func ParseL2Advertisement(from *v1beta1.L2Advertisement) (L2Advertisement, error) {
	m := mistakesOf("L2Advertisement", &from.ObjectMeta)
	a := L2Advertisement{
		Name:       from.Name,
		Interfaces: from.Spec.Interfaces,
		selection: m.selection(from.Spec.IPAddressPools, from.Spec.IPAddressPoolSelectors,
			from.Spec.NodeSelectors, from.Spec.ServiceSelectors),
	}
	for i, name := range from.Spec.Interfaces {
		m.link(fmt.Sprintf("spec.interfaces[%d]", i), name)
	}
	for i := range from.Spec.PreferredNodeSelectors {
		p := &from.Spec.PreferredNodeSelectors[i]
		field := fmt.Sprintf("spec.preferredNodeSelectors[%d]", i)
		if p.Weight < 1 || p.Weight > 100 {
			m.add(field+".weight", p.Weight, "must be between 1 and 100")
		}
		a.preferences = append(a.preferences, preference{int(p.Weight), m.selector(field+".preference", &p.Preference)})
	}
	if err := m.err(); err != nil {
		return L2Advertisement{}, err
	}
	return a, nil
}

// BGPAdvertisement is a validated BGPAdvertisement: what to advertise to BGP peers, and how.
type BGPAdvertisement struct {
	Name                string
	AggregationLength   int      // 1 to 32: IPv4 addresses are advertised as prefixes of this length
	AggregationLengthV6 int      // 1 to 128, for IPv6 addresses
	LocalPref           uint32   // LOCAL_PREF (RFC 4271 section 5.1.5); 0 = not set
	MED                 uint32   // MULTI_EXIT_DISC (RFC 4271 section 5.1.4); 0 = not set, which means the same
	Prepend             uint8    // how many times our AS is added to AS_PATH for external peers, at most maxPrepend
	Communities         []string // a:b (RFC 1997) or large:a:b:c (RFC 8092), decimal without leading zeros, no duplicates
	Peers               []string // names of the peers that get it; empty = all

	selection
}

// Annotations on a BGPAdvertisement, for what MetalLB has no fields. Both are numbers.
const (
	MEDAnnotation     = "longshore.dev/med"             // BGPAdvertisement.MED
	PrependAnnotation = "longshore.dev/as-path-prepend" // BGPAdvertisement.Prepend
)

const maxPrepend = 10 // as FRR has it

// Prefix is what is advertised for an address.
func (a BGPAdvertisement) Prefix(addr netip.Addr) netip.Prefix {
	bits := a.AggregationLengthV6
	if addr.Is4() {
		bits = a.AggregationLength
	}
	return netip.PrefixFrom(addr, bits).Masked()
}

// ParseBGPAdvertisement validates a BGPAdvertisement. Names of communities are looked up in aliases; if that is nil they are
// left out, for a caller that only asks whether the object itself is right.
func ParseBGPAdvertisement(from *v1beta1.BGPAdvertisement, aliases Aliases) (BGPAdvertisement, error) {
	m := mistakesOf("BGPAdvertisement", &from.ObjectMeta)
	a := BGPAdvertisement{
		Name:                from.Name,
		AggregationLength:   m.length("spec.aggregationLength", from.Spec.AggregationLength, 32),
		AggregationLengthV6: m.length("spec.aggregationLengthV6", from.Spec.AggregationLengthV6, 128),
		LocalPref:           from.Spec.LocalPref,
		MED:                 uint32(m.number(from, MEDAnnotation, 0, math.MaxUint32)),
		Prepend:             uint8(m.number(from, PrependAnnotation, 0, maxPrepend)),
		Peers:               from.Spec.Peers,
		selection: m.selection(from.Spec.IPAddressPools, from.Spec.IPAddressPoolSelectors,
			from.Spec.NodeSelectors, from.Spec.ServiceSelectors),
	}
	for i, text := range from.Spec.Communities {
		c, err := aliases.community(text)
		if err != nil {
			m.add(fmt.Sprintf("spec.communities[%d]", i), text, "%w", err)
			continue
		}
		if c != "" && !slices.Contains(a.Communities, c) {
			a.Communities = append(a.Communities, c)
		}
	}
	// An aggregate would carry along the addresses of Services that are not selected.
	if len(from.Spec.ServiceSelectors) > 0 {
		if a.AggregationLength != 32 {
			m.add("spec.aggregationLength", a.AggregationLength, "must be 32 with serviceSelectors")
		}
		if a.AggregationLengthV6 != 128 {
			m.add("spec.aggregationLengthV6", a.AggregationLengthV6, "must be 128 with serviceSelectors")
		}
	}
	if err := m.err(); err != nil {
		return BGPAdvertisement{}, err
	}
	return a, nil
}

// length validates a prefix length; the default is the longest.
func (m *mistakes) length(field string, bits *int32, longest int) int {
	if bits == nil {
		return longest
	}
	if *bits < 1 || int(*bits) > longest {
		m.add(field, *bits, "must be between 1 and %d", longest)
	}
	return int(*bits)
}

// selection is what an advertisement is for. The zero value selects everything.
type selection struct {
	poolNames []string
	pools     []labels.Selector
	nodes     []labels.Selector
	services  []labels.Selector
}

func (m *mistakes) selection(poolNames []string, pools, nodes, services []metav1.LabelSelector) selection {
	return selection{
		poolNames: poolNames,
		pools:     m.selectors("spec.ipAddressPoolSelectors", pools),
		nodes:     m.selectors("spec.nodeSelectors", nodes),
		services:  m.selectors("spec.serviceSelectors", services),
	}
}

// SelectsPool tells whether the advertisement is for the addresses of a pool: it is named or its labels are
// selected, or the advertisement neither names nor selects any.
func (s selection) SelectsPool(p Pool) bool {
	return len(s.poolNames)+len(s.pools) == 0 || slices.Contains(s.poolNames, p.Name) || anyMatches(s.pools, p.Labels)
}

// SelectsNode tells whether a node, by its labels, is to announce.
func (s selection) SelectsNode(nodeLabels labels.Set) bool {
	return len(s.nodes) == 0 || anyMatches(s.nodes, nodeLabels)
}

// SelectsService tells whether the advertisement is for a Service, by its labels.
func (s selection) SelectsService(serviceLabels labels.Set) bool {
	return len(s.services) == 0 || anyMatches(s.services, serviceLabels)
}
