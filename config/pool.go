package config

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/labels"

	"github.com/longshore-lb/longshore/config/v1beta1"
)

// Pool is a validated IPAddressPool.
type Pool struct {
	Name          string
	Labels        labels.Set // for the pool selectors of advertisements
	Ranges        []Range    // at least one, none overlaps another, in the order written
	AutoAssign    bool       // whether Services that ask for no pool may use it
	AvoidBuggyIPs bool       // whether IPv4 addresses ending in .0 and .255 are left out
	Priority      int        // the lowest number is used first, 0 last

	// Whose Services may use the pool: those of the namespaces named or selected, if there are names or
	// selectors; and of them those selected by ServiceSelectors, if there are any.
	Namespaces         []string
	NamespaceSelectors []labels.Selector
	ServiceSelectors   []labels.Selector
}

// Contains tells whether the pool may hand out an address.
func (p Pool) Contains(addr netip.Addr) bool {
	if p.AvoidBuggyIPs && addr.Is4() {
		if last := addr.As4()[3]; last == 0 || last == 255 {
			return false
		}
	}
	return slices.ContainsFunc(p.Ranges, func(r Range) bool { return r.Contains(addr) })
}

// Pinned tells whether the pool is for some Services only.
func (p Pool) Pinned() bool {
	return len(p.Namespaces)+len(p.NamespaceSelectors)+len(p.ServiceSelectors) > 0
}

// Allows tells whether a Service, by its namespace and labels, may use the pool. A selector that matches no
// namespace allows none.
func (p Pool) Allows(namespace string, namespaceLabels, serviceLabels labels.Set) bool {
	if len(p.Namespaces)+len(p.NamespaceSelectors) > 0 &&
		!slices.Contains(p.Namespaces, namespace) && !anyMatches(p.NamespaceSelectors, namespaceLabels) {
		return false
	}
	return len(p.ServiceSelectors) == 0 || anyMatches(p.ServiceSelectors, serviceLabels)
}

// ParsePool validates an IPAddressPool by itself.
func ParsePool(from *v1beta1.IPAddressPool) (Pool, error) {
	m := mistakesOf("IPAddressPool", &from.ObjectMeta)
	p := Pool{
		Name:          from.Name,
		Labels:        from.Labels,
		AutoAssign:    from.Spec.AutoAssign == nil || *from.Spec.AutoAssign,
		AvoidBuggyIPs: from.Spec.AvoidBuggyIPs,
	}
	if len(from.Spec.Addresses) == 0 {
		m.missing("spec.addresses")
	}
	for i, text := range from.Spec.Addresses {
		field := fmt.Sprintf("spec.addresses[%d]", i)
		r, err := ParseRange(text)
		if err != nil {
			m.add(field, text, "%w", err)
			continue
		}
		if o := slices.IndexFunc(p.Ranges, r.Overlaps); o >= 0 {
			m.add(field, text, "overlaps %s of the same pool", p.Ranges[o])
			continue
		}
		p.Ranges = append(p.Ranges, r)
	}
	if a := from.Spec.ServiceAllocation; a != nil {
		if a.Priority < 0 {
			m.add("spec.serviceAllocation.priority", a.Priority, "must not be negative")
		}
		p.Priority = a.Priority
		p.Namespaces = a.Namespaces
		p.NamespaceSelectors = m.selectors("spec.serviceAllocation.namespaceSelectors", a.NamespaceSelectors)
		p.ServiceSelectors = m.selectors("spec.serviceAllocation.serviceSelectors", a.ServiceSelectors)
	}
	if err := m.err(); err != nil {
		return Pool{}, err
	}
	return p, nil
}

// ParsePools validates pools by themselves and against each other. Of two that overlap the one created later is
// refused, or the one whose name comes later if they are of the same second; it is refused whole. The pools and
// the errors are in the order of age and name, whatever the order of from.
func ParsePools(from []*v1beta1.IPAddressPool) ([]Pool, []error) {
	from = slices.Clone(from)
	slices.SortStableFunc(from, func(a, b *v1beta1.IPAddressPool) int {
		return cmp.Or(
			a.CreationTimestamp.Compare(b.CreationTimestamp.Time),
			cmp.Compare(a.Name, b.Name),
			cmp.Compare(a.Namespace, b.Namespace),
		)
	})
	var (
		pools []Pool
		errs  []error
		taken claims
	)
	for _, object := range from {
		p, err := ParsePool(object)
		if err == nil {
			err = taken.add(object, p)
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		pools = append(pools, p)
	}
	return pools, errs
}

// claims is the ranges of the pools accepted so far, disjoint and in order.
type claims []claim

type claim struct {
	Range
	pool string
}

// add claims the ranges of a pool, all or, if one is taken, none.
func (c *claims) add(object *v1beta1.IPAddressPool, p Pool) error {
	m := mistakesOf("IPAddressPool", &object.ObjectMeta)
	for i, r := range p.Ranges {
		if other, ok := c.find(r); ok {
			m.add(fmt.Sprintf("spec.addresses[%d]", i), object.Spec.Addresses[i],
				"overlaps %s of IPAddressPool %s", other.Range, other.pool)
		}
	}
	if err := m.err(); err != nil {
		return err
	}
	for _, r := range p.Ranges {
		*c = slices.Insert(*c, c.position(r), claim{r, p.Name})
	}
	return nil
}

// find returns the first claim that overlaps a range.
func (c claims) find(r Range) (claim, bool) {
	if i := c.position(r); i < len(c) && c[i].Overlaps(r) {
		return c[i], true
	}
	return claim{}, false
}

// position is the index of the first claim that does not end before the range begins.
func (c claims) position(r Range) int {
	i, _ := slices.BinarySearchFunc(c, r.From, func(c claim, from netip.Addr) int { return c.To.Compare(from) })
	return i
}

// Range is the addresses from From to To, both included, of one family. It is comparable.
type Range struct {
	From, To netip.Addr
}

// Contains tells whether the address is in the range.
func (r Range) Contains(addr netip.Addr) bool {
	return addr.BitLen() == r.From.BitLen() && r.From.Compare(addr) <= 0 && addr.Compare(r.To) <= 0
}

// Overlaps tells whether the ranges share an address.
func (r Range) Overlaps(s Range) bool { return r.Contains(s.From) || s.Contains(r.From) }

// String is the range as a CIDR if it is one, else as first-last; [ParseRange] reads both.
func (r Range) String() string {
	for bits := range r.From.BitLen() + 1 {
		if p := netip.PrefixFrom(r.From, bits); p.Masked() == p && last(p) == r.To {
			return p.String()
		}
	}
	return r.From.String() + "-" + r.To.String()
}

// ParseRange reads a CIDR, whose host bits do not matter, or first-last. IPv4 addresses written as IPv6 ones, zones and
// ranges that begin or end at an address no host can have (unspecified, loopback, multicast) are errors.
func ParseRange(text string) (Range, error) {
	var r Range
	if begin, end, ok := strings.Cut(text, "-"); ok {
		from, err := parseAddr(strings.TrimSpace(begin))
		if err != nil {
			return Range{}, err
		}
		to, err := parseAddr(strings.TrimSpace(end))
		if err != nil {
			return Range{}, err
		}
		r = Range{from, to}
	} else {
		if !strings.Contains(text, "/") {
			return Range{}, errors.New("neither a CIDR like 10.1.0.0/24 nor a range like 10.1.0.10-10.1.0.20")
		}
		p, err := netip.ParsePrefix(strings.TrimSpace(text))
		if err != nil {
			return Range{}, errors.New("not a CIDR")
		}
		if p.Addr().Is4In6() {
			return Range{}, fmt.Errorf("write %s as IPv4", p.Addr())
		}
		r = Range{p.Masked().Addr(), last(p)}
	}
	switch {
	case r.From.BitLen() != r.To.BitLen():
		return Range{}, errors.New("range begins in one address family and ends in the other")
	case r.To.Less(r.From):
		return Range{}, errors.New("range is reversed")
	}
	for _, a := range []netip.Addr{r.From, r.To} {
		if a.IsUnspecified() || a.IsLoopback() || a.IsMulticast() {
			return Range{}, fmt.Errorf("%s cannot be the address of a Service", a)
		}
	}
	return r, nil
}

// parseAddr reads an address without zone whose family is what it looks like.
func parseAddr(text string) (netip.Addr, error) {
	a, err := netip.ParseAddr(text)
	switch {
	case err != nil:
		return netip.Addr{}, fmt.Errorf("%q is not an IP address", text)
	case a.Zone() != "":
		return netip.Addr{}, fmt.Errorf("%q has a zone", text)
	case a.Is4In6():
		return netip.Addr{}, fmt.Errorf("write %s as IPv4", text)
	}
	return a, nil
}

// last is the last address of a prefix.
func last(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for bit := p.Bits(); bit < len(b)*8; bit++ {
		b[bit/8] |= 0x80 >> (bit % 8)
	}
	a, _ := netip.AddrFromSlice(b) // 4 or 16 bytes
	return a
}
