package bgp

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/longshore-lb/longshore/announcer"
)

// table is a Config in the form gobgp can hold: one path for each prefix.
type table struct {
	peers     []Peer // without their BFD, which no session of gobgp depends on
	watched   []Peer // those with BFD
	paths     map[netip.Prefix]path
	audiences map[string]audience // of the paths, by key
}

// path is what is said about one prefix. It is comparable.
//
// gobgp sends the same best path to every peer. What differs from peer to peer, whether it gets the
// prefix and with which attributes, is left to the export policy, which knows it by the audience.
type path struct {
	nextHop  netip.Addr // unspecified = our end of the session
	audience string     // key in table.audiences
}

// audience says who gets a prefix, and how. Any number of prefixes share one, and it stays the same when peers come
// and go: a new peer touches no path.
type audience struct {
	routes    []announcer.Route // with Peers and Communities sorted and without Prefix
	ownFamily bool              // only over sessions of the prefix' own family: there is no next hop for the others
	shutdown  bool              // Config.Shutdown
	leaving   bool              // as shutdown, but not for peers with GracefulRestart: they keep the routes
}

// key is equal for audiences that are.
func (a audience) key() string {
	var b strings.Builder
	for _, r := range a.routes {
		fmt.Fprintf(&b, "%q %d %d %d %q;", r.Peers, r.LocalPref, r.MED, r.Prepend, r.Communities)
	}
	return fmt.Sprint(b.String(), a.ownFamily, a.shutdown, a.leaving)
}

// shutsDown says whether the peer is asked to prefer other routes.
func (a audience) shutsDown(p Peer) bool { return a.shutdown || a.leaving && !p.GracefulRestart }

const (
	gracefulShutdown = "65535:0" // RFC 8326 section 4
	defaultLocalPref = 100       // what gobgp gives paths without
)

// attributes are what a path says to one peer.
type attributes struct {
	localPref   uint32 // 0 = that of the path, see wirePath
	med         uint32 // 0 = not set
	prepend     uint8
	communities []string // as in announcer.Route, sorted
}

// attributes returns what the peer gets to see of a prefix with this audience, or false if it does not get it.
func (a audience) attributes(p Peer) (attributes, bool) {
	var attrs attributes
	named := false
	for _, r := range a.routes {
		if len(r.Peers) > 0 && !slices.Contains(r.Peers, p.Name) {
			continue
		}
		if !named {
			attrs.med, attrs.prepend = r.MED, r.Prepend
		}
		named = true
		attrs.localPref = max(attrs.localPref, r.LocalPref)
		attrs.med, attrs.prepend = min(attrs.med, r.MED), min(attrs.prepend, r.Prepend)
		attrs.communities = append(attrs.communities, r.Communities...)
	}
	if p.internal() {
		attrs.prepend = 0 // RFC 4271 section 5.1.2
	}
	switch {
	case !p.internal() || a.shutsDown(p):
		attrs.localPref = 0 // RFC 4271 section 5.1.5
	case a.leaving && attrs.localPref == 0:
		attrs.localPref = defaultLocalPref
	}
	if named && a.shutsDown(p) {
		attrs.communities = append(attrs.communities, gracefulShutdown)
	}
	slices.Sort(attrs.communities)
	attrs.communities = slices.Compact(attrs.communities)
	return attrs, named
}

// tableOf returns the table of c, the names of the peers no session is possible with and why, and
// what makes routes impossible.
func tableOf(c Config) (t table, refused map[string]string, problems []error) {
	t = table{paths: map[netip.Prefix]path{}, audiences: map[string]audience{}}
	refused = map[string]string{}
	names, addresses := map[string]bool{}, map[netip.Addr]string{}
	for _, p := range c.Peers {
		if names[p.Name] {
			continue // and the first is reported
		}
		names[p.Name] = true
		// gobgp's policy tells peers apart by address alone, without the zone.
		address := p.Address.WithZone("")
		if err := p.validate(); err != nil {
			refused[p.Name] = err.Error()
		} else if other, taken := addresses[address]; taken {
			refused[p.Name] = fmt.Sprintf("Address %v is that of peer %s", p.Address, other)
		} else {
			addresses[address] = p.Name
			if p.BFD.Multiplier > 0 {
				t.watched = append(t.watched, p)
			}
			p.BFD = BFD{}
			t.peers = append(t.peers, p)
		}
	}

	routes := map[netip.Prefix][]announcer.Route{}
	for _, r := range c.Routes {
		if err := validateRoute(r); err != nil {
			problems = append(problems, fmt.Errorf("route %v: %w", r.Prefix, err))
			continue
		}
		prefix := r.Prefix.Masked()
		routes[prefix] = append(routes[prefix], announcer.Route{
			Peers:       sorted(r.Peers),
			LocalPref:   r.LocalPref,
			MED:         r.MED,
			Prepend:     r.Prepend,
			Communities: sorted(r.Communities),
		})
	}
	for prefix, rs := range routes {
		slices.SortFunc(rs, func(a, b announcer.Route) int {
			return strings.Compare(audience{routes: []announcer.Route{a}}.key(), audience{routes: []announcer.Route{b}}.key())
		})
		nextHop, unspecified := c.NextHop4, netip.IPv4Unspecified()
		if prefix.Addr().Is6() {
			nextHop, unspecified = c.NextHop6, netip.IPv6Unspecified()
		}
		a := audience{routes: rs, shutdown: c.Shutdown}
		if !nextHop.IsValid() {
			nextHop, a.ownFamily = unspecified, true
		}
		key := a.key()
		t.audiences[key] = a
		t.paths[prefix] = path{nextHop: nextHop, audience: key}
	}
	return t, refused, problems
}

// leaving returns the table for the time before the speaker ends.
func (t table) leaving() table {
	left := table{peers: t.peers, paths: map[netip.Prefix]path{}, audiences: map[string]audience{}}
	for prefix, p := range t.paths {
		a := t.audiences[p.audience]
		a.leaving = true
		p.audience = a.key()
		left.audiences[p.audience], left.paths[prefix] = a, p
	}
	return left
}

func validateRoute(r announcer.Route) error {
	if !r.Prefix.IsValid() || r.Prefix.Addr().Is4In6() {
		return fmt.Errorf("not an IPv4 or IPv6 prefix")
	}
	for _, c := range r.Communities {
		if err := validateCommunity(c); err != nil {
			return fmt.Errorf("community %q: %w", c, err)
		}
	}
	return nil
}

// validateCommunity accepts a:b with two 16-bit numbers (RFC 1997) and large:a:b:c with three 32-bit numbers (RFC 8092).
func validateCommunity(c string) error {
	numbers, bits := strings.Split(c, ":"), 16
	if large, ok := strings.CutPrefix(c, "large:"); ok {
		numbers, bits = strings.Split(large, ":"), 32
		if len(numbers) != 3 {
			return fmt.Errorf("not of the form large:a:b:c")
		}
	} else if len(numbers) != 2 {
		return fmt.Errorf("neither of the form a:b nor large:a:b:c")
	}
	for _, n := range numbers {
		v, err := strconv.ParseUint(n, 10, bits)
		if err != nil || strconv.FormatUint(v, 10) != n {
			return fmt.Errorf("%q is not a number of %d bits", n, bits)
		}
	}
	if bits == 32 && numbers[0] == strconv.FormatUint(tagAdministrator, 10) {
		return fmt.Errorf("global administrator %s is reserved (RFC 8092 section 5)", numbers[0])
	}
	return nil
}

// sorted returns a sorted copy of s without duplicates; nil if there are none.
func sorted(s []string) []string {
	if len(s) == 0 {
		return nil
	}
	s = slices.Clone(s)
	slices.Sort(s)
	return slices.Compact(s)
}
