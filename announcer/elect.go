package announcer

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
)

// Candidate is a node that could announce an address.
type Candidate struct {
	Node       string // its name, unique in the cluster
	Preference int    // higher is preferred; any range
}

// Claim is a node's word that it answers for an address.
type Claim struct {
	Node  string
	Epoch uint64 // of two claims the higher one is the later one
}

// Contest is who may announce one address, and who says that it does; each in any order.
type Contest struct {
	Candidates []Candidate
	Claims     []Claim
}

// Election gives each address to one node, by these rules:
//
//   - only the candidates of the highest preference count;
//   - one of these that claims the address keeps it. Of several the highest epoch wins, then the highest weight;
//   - an address that none of them claims is given out, in the order of addresses, to the one of them that has the fewest
//     addresses so far, claimed ones counted first; of several the highest weight wins.
//
// The result is a function of the contests alone, whatever the order in which they came: agents that know the same agree. From
// no claims, the fullest of nodes that are candidates for the same addresses has at most one address more than the emptiest. A
// node that comes moves nothing unless it is preferred, one that goes moves its own addresses only.
//
// The weight is part of the contract between agents of different versions, see weight. The zero value is an election without
// addresses. Its cost is that of the addresses that have changed and of those that nobody claims.
type Election struct {
	contests map[netip.Addr]*contest
	held     map[string]int          // how many addresses each node keeps by its claim
	open     map[netip.Addr]struct{} // that have candidates, and no claim of the preferred ones
	touched  map[netip.Addr]struct{} // whose result may have changed since the last Resolve
}

type contest struct {
	Contest
	now, told result
}

type result struct {
	owner string
	held  bool
}

// Elect is the owner of each address that has one.
func Elect(contests map[netip.Addr]Contest) map[netip.Addr]string {
	var e Election
	for addr, c := range contests {
		e.Set(addr, c)
	}
	owners := map[netip.Addr]string{}
	for _, addr := range e.Resolve() {
		owners[addr], _ = e.Owner(addr)
	}
	return owners
}

// Set replaces the contest for an address; one without candidates removes it. The contest is not copied: do not change it.
func (e *Election) Set(addr netip.Addr, c Contest) {
	if e.contests == nil {
		e.contests, e.held = map[netip.Addr]*contest{}, map[string]int{}
		e.open, e.touched = map[netip.Addr]struct{}{}, map[netip.Addr]struct{}{}
	}
	was := e.contests[addr]
	if was == nil {
		if len(c.Candidates) == 0 {
			return
		}
		was = &contest{}
		e.contests[addr] = was
	}
	if was.now.held {
		e.held[was.now.owner]--
	}
	delete(e.open, addr)
	was.Contest = c
	was.now = result{}
	if len(c.Candidates) > 0 {
		if holder := holder(addr, c); holder != "" {
			was.now = result{holder, true}
			e.held[holder]++
		} else {
			e.open[addr] = struct{}{}
		}
	}
	e.touched[addr] = struct{}{}
}

// Resolve gives out what nobody claims, and returns the addresses whose Owner is not what it was after the last call, sorted.
func (e *Election) Resolve() (changed []netip.Addr) {
	if len(e.touched) == 0 {
		return nil
	}
	has := maps.Clone(e.held)
	for _, addr := range slices.SortedFunc(maps.Keys(e.open), netip.Addr.Compare) {
		c := e.contests[addr]
		c.now = result{owner: emptiest(addr, c.Candidates, has)}
		has[c.now.owner]++
		e.touched[addr] = struct{}{}
	}
	for addr := range e.touched {
		c := e.contests[addr]
		if c.now != c.told {
			changed = append(changed, addr)
			c.told = c.now
		}
		if len(c.Candidates) == 0 {
			delete(e.contests, addr)
		}
	}
	clear(e.touched)
	slices.SortFunc(changed, netip.Addr.Compare)
	return changed
}

// Owner is the node that an address was given to by the last Resolve, and whether the node claims it; "" = there is none.
func (e *Election) Owner(addr netip.Addr) (node string, held bool) {
	if c := e.contests[addr]; c != nil {
		return c.told.owner, c.told.held
	}
	return "", false
}

// preferred is the highest preference of some candidates.
func preferred(candidates []Candidate) int {
	return slices.MaxFunc(candidates, func(a, b Candidate) int { return cmp.Compare(a.Preference, b.Preference) }).Preference
}

// holder is the preferred candidate whose claim counts; "" = none claims the address.
func holder(addr netip.Addr, c Contest) string {
	var best Claim
	preference := preferred(c.Candidates)
	for _, claim := range c.Claims {
		if !slices.Contains(c.Candidates, Candidate{claim.Node, preference}) {
			continue
		}
		if best.Node == "" || claim.Epoch > best.Epoch || claim.Epoch == best.Epoch && heavier(addr, claim.Node, best.Node) {
			best = claim
		}
	}
	return best.Node
}

// emptiest is the preferred candidate that has the fewest addresses.
func emptiest(addr netip.Addr, candidates []Candidate, has map[string]int) string {
	best := ""
	preference := preferred(candidates)
	for _, c := range candidates {
		if c.Preference != preference {
			continue
		}
		if best == "" || has[c.Node] < has[best] || has[c.Node] == has[best] && heavier(addr, c.Node, best) {
			best = c.Node
		}
	}
	return best
}

// heavier tells whether a node weighs more for an address than another; the smaller name wins a tie.
func heavier(addr netip.Addr, node, other string) bool {
	a, b := weight(addr, node), weight(addr, other)
	return a > b || a == b && node < other
}

// weight is the rendezvous weight of a node for an address (Thaler and Ravishankar, "Using Name-Based Mappings to Increase
// Hit Rates", 1998): 64-bit FNV-1a over the address in its shortest form (4 or 16 bytes, network order, no zone) and the
// bytes of the node's name, finished by the mixer of MurmurHash3 (fmix64), without which names that differ in their last
// byte alone would get weights that differ in few bits.
func weight(addr netip.Addr, node string) uint64 {
	const offset, prime = 14695981039346656037, 1099511628211 // FNV-1a, 64 bits
	h := uint64(offset)
	bytes := addr.As16()
	address := bytes[:]
	if addr.Is4() || addr.Is4In6() {
		address = bytes[12:]
	}
	for _, b := range address {
		h = (h ^ uint64(b)) * prime
	}
	for i := range len(node) {
		h = (h ^ uint64(node[i])) * prime
	}
	h ^= h >> 33
	h *= 0xff51afd7ed558ccd
	h ^= h >> 33
	h *= 0xc4ceb9fe1a85ec53
	h ^= h >> 33
	return h
}
