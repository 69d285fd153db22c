package announcer_test

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/longshore-lb/longshore/announcer"
)

func TestElect(t *testing.T) {
	vip := netip.MustParseAddr("192.0.2.5")
	three := []announcer.Candidate{{Node: "node-1"}, {Node: "node-2"}, {Node: "node-3"}}
	for _, test := range []struct {
		name    string
		contest announcer.Contest
		want    string
	}{
		{"nobody", announcer.Contest{}, ""},
		{"a claim of nobody's", announcer.Contest{Claims: []announcer.Claim{{Node: "node-1", Epoch: 1}}}, ""},
		{"one", announcer.Contest{Candidates: three[:1]}, "node-1"},
		{"preferred", announcer.Contest{Candidates: []announcer.Candidate{{Node: "a"}, {Node: "b", Preference: 1}, {Node: "c"}}}, "b"},
		{"negative preference", announcer.Contest{Candidates: []announcer.Candidate{{Node: "a", Preference: -2}, {Node: "b", Preference: -1}}}, "b"},
		{"twice, higher preference counts", announcer.Contest{Candidates: []announcer.Candidate{
			{Node: "a", Preference: 5}, {Node: "b", Preference: 4}, {Node: "a", Preference: 1}}}, "a"},
		{"the holder keeps it", announcer.Contest{Candidates: three, Claims: []announcer.Claim{{Node: "node-3", Epoch: 7}}}, "node-3"},
		{"the later claim", announcer.Contest{Candidates: three, Claims: []announcer.Claim{{Node: "node-1", Epoch: 8}, {Node: "node-3", Epoch: 9}, {Node: "node-2", Epoch: 7}}}, "node-3"},
		{"claims of one epoch, by weight", announcer.Contest{Candidates: three, Claims: []announcer.Claim{{Node: "node-1", Epoch: 9}, {Node: "node-3", Epoch: 9}}}, "node-1"},
		{"the holder is no candidate any more", announcer.Contest{Candidates: three[:2], Claims: []announcer.Claim{{Node: "node-3", Epoch: 9}}}, "node-2"},
		{"a preferred node takes it from the holder", announcer.Contest{
			Candidates: []announcer.Candidate{{Node: "node-1", Preference: 1}, {Node: "node-2"}}, Claims: []announcer.Claim{{Node: "node-2", Epoch: 9}}}, "node-1"},
		// These two hold the hash in place (computed by another program): agents of different versions must agree.
		{"by weight", announcer.Contest{Candidates: three}, "node-2"},
		{"by weight among the preferred", announcer.Contest{Candidates: []announcer.Candidate{
			{Node: "node-1", Preference: 1}, {Node: "node-2"}, {Node: "node-3", Preference: 1}}}, "node-1"},
	} {
		t.Run(test.name, func(t *testing.T) {
			if got := announcer.Elect(map[netip.Addr]announcer.Contest{vip: test.contest})[vip]; got != test.want {
				t.Errorf("the owner is %q, want %q", got, test.want)
			}
		})
	}
}

func TestElectForms(t *testing.T) {
	for i := range 200 {
		v4 := netip.AddrFrom4([4]byte{10, 0, 0, byte(i)})
		mapped := netip.AddrFrom16(v4.As16())
		c := announcer.Contest{Candidates: nodes(7)}
		a, b := announcer.Elect(map[netip.Addr]announcer.Contest{v4: c})[v4], announcer.Elect(map[netip.Addr]announcer.Contest{mapped: c})[mapped]
		if a != b {
			t.Errorf("%s is owned by %s, and by %s in its IPv6-mapped form", v4, a, b)
		}
	}
}

// TestElectSpread holds that addresses nobody claims are spread evenly, in whatever order all is said.
func TestElectSpread(t *testing.T) {
	for n := 1; n <= 10; n++ {
		for _, addresses := range []int{1, 7, 100, 1000} {
			contests := map[netip.Addr]announcer.Contest{}
			for i := range addresses {
				contests[address(i)] = announcer.Contest{Candidates: shuffled(nodes(n))}
			}
			owners := announcer.Elect(contests)
			if fullest, emptiest := spread(owners, nodes(n)); fullest > emptiest+1 {
				t.Errorf("%d addresses on %d nodes: %d on one, %d on another", addresses, n, fullest, emptiest)
			}
			for addr := range contests {
				contests[addr] = announcer.Contest{Candidates: shuffled(nodes(n))}
			}
			if diff := cmp.Diff(owners, announcer.Elect(contests), byValue); diff != "" {
				t.Fatalf("another result for another order (-one +other):\n%s", diff)
			}
		}
	}
}

// TestElectMoves holds that a node that comes moves nothing, and that one that goes moves its own addresses only, evenly.
func TestElectMoves(t *testing.T) {
	const n, addresses = 5, 500
	contests := map[netip.Addr]announcer.Contest{}
	for i := range addresses {
		contests[address(i)] = announcer.Contest{Candidates: nodes(n)}
	}
	before := announcer.Elect(contests)
	for addr, owner := range before {
		contests[addr] = announcer.Contest{Candidates: nodes(n + 1), Claims: []announcer.Claim{{Node: owner, Epoch: 1}}}
	}
	if diff := cmp.Diff(before, announcer.Elect(contests), byValue); diff != "" {
		t.Errorf("a node that came moved addresses (-before +after):\n%s", diff)
	}
	for addr, c := range contests {
		contests[addr] = announcer.Contest{Candidates: nodes(n)[1:], Claims: c.Claims}
	}
	after := announcer.Elect(contests)
	for addr, owner := range before {
		if owner != "node-0" && after[addr] != owner {
			t.Errorf("%s moved from %s to %s when node-0 went", addr, owner, after[addr])
		}
	}
	if fullest, emptiest := spread(after, nodes(n)[1:]); fullest > emptiest+1 {
		t.Errorf("after node-0 went: %d on one node, %d on another", fullest, emptiest)
	}
}

// TestElectionWalk holds that an election that is told changes, in any order and as many at a time as you like, has the result
// of one that is told all at once, and reports each change of it.
func TestElectionWalk(t *testing.T) {
	var e announcer.Election
	contests := map[netip.Addr]announcer.Contest{}
	known := map[netip.Addr]string{}
	for step := range 3000 {
		addr := address(rand.IntN(60))
		c := announcer.Contest{Candidates: shuffled(nodes(6))[:rand.IntN(6)]}
		for i := range c.Candidates {
			c.Candidates[i].Preference = rand.IntN(2)
		}
		for range rand.IntN(3) {
			c.Claims = append(c.Claims, announcer.Claim{Node: fmt.Sprintf("node-%d", rand.IntN(6)), Epoch: uint64(rand.IntN(3))})
		}
		e.Set(addr, c)
		contests[addr] = c
		if rand.IntN(3) > 0 {
			continue
		}
		for _, addr := range e.Resolve() {
			if known[addr], _ = e.Owner(addr); known[addr] == "" {
				delete(known, addr)
			}
		}
		if diff := cmp.Diff(announcer.Elect(contests), known, byValue); diff != "" {
			t.Fatalf("step %d (-at once +by changes):\n%s", step, diff)
		}
	}
}

// TestElectConverges lets nodes with views of their own, each of which claims what it gives to itself, exchange their
// claims: once all know all, every address has one owner, who claims it, and no other claim is left.
func TestElectConverges(t *testing.T) {
	const n, addresses = 4, 60
	for range 50 {
		claims := map[string]map[netip.Addr]uint64{} // of each node
		for _, c := range nodes(n) {
			claims[c.Node] = map[netip.Addr]uint64{}
		}
		round := func(sees func(viewer, other string) bool) {
			next := map[string]map[netip.Addr]uint64{}
			for viewer := range claims {
				contests := map[netip.Addr]announcer.Contest{}
				var clock uint64
				for i := range addresses {
					var c announcer.Contest
					for other, of := range claims {
						if viewer != other && !sees(viewer, other) {
							continue
						}
						c.Candidates = append(c.Candidates, announcer.Candidate{Node: other})
						if epoch, ok := of[address(i)]; ok {
							clock = max(clock, epoch)
							c.Claims = append(c.Claims, announcer.Claim{Node: other, Epoch: epoch})
						}
					}
					contests[address(i)] = c
				}
				next[viewer] = map[netip.Addr]uint64{}
				for addr, owner := range announcer.Elect(contests) {
					if owner != viewer {
						continue
					}
					epoch, had := claims[viewer][addr]
					if !had {
						epoch = clock + 1
					}
					next[viewer][addr] = epoch
				}
			}
			claims = next
		}
		for range 5 {
			split := rand.IntN(1 << n)
			side := func(node string) int { return split >> (node[len(node)-1] - '0') & 1 }
			round(func(viewer, other string) bool { return side(viewer) == side(other) })
		}
		round(func(_, _ string) bool { return true })
		round(func(_, _ string) bool { return true })
		owned := map[netip.Addr][]string{}
		for node, of := range claims {
			for addr := range of {
				owned[addr] = append(owned[addr], node)
			}
		}
		for i := range addresses {
			if len(owned[address(i)]) != 1 {
				t.Fatalf("%s is claimed by %v", address(i), owned[address(i)])
			}
		}
	}
}

// TestElectCost holds that thousands of addresses take a moment: the bound is a hundred times what it takes.
func TestElectCost(t *testing.T) {
	const addresses = 5000
	var e announcer.Election
	began := time.Now()
	for i := range addresses {
		e.Set(address(i), announcer.Contest{Candidates: nodes(3)})
	}
	e.Resolve()
	whole := time.Since(began)
	for i := range addresses {
		owner, _ := e.Owner(address(i))
		e.Set(address(i), announcer.Contest{Candidates: nodes(3), Claims: []announcer.Claim{{Node: owner, Epoch: 1}}})
	}
	e.Resolve()
	began = time.Now()
	e.Set(address(7), announcer.Contest{Candidates: nodes(3)[1:]})
	e.Resolve()
	one := time.Since(began)
	t.Logf("%d addresses in %v, then one in %v", addresses, whole, one)
	if whole > time.Second || one > whole/4 {
		t.Errorf("%d addresses took %v, one of them %v", addresses, whole, one)
	}
}

var byValue = cmp.Comparer(func(a, b netip.Addr) bool { return a == b })

func spread(owners map[netip.Addr]string, candidates []announcer.Candidate) (fullest, emptiest int) {
	has := map[string]int{}
	for _, c := range candidates {
		has[c.Node] = 0
	}
	for _, owner := range owners {
		has[owner]++
	}
	counts := slices.Collect(maps.Values(has))
	return slices.Max(counts), slices.Min(counts)
}

// address is an IPv4 address, or for odd numbers an IPv6 one.
func address(i int) netip.Addr {
	if i%2 == 0 {
		return netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)})
	}
	return netip.AddrFrom16([16]byte{0: 0xfd, 14: byte(i >> 8), 15: byte(i)})
}

func shuffled(all []announcer.Candidate) []announcer.Candidate {
	rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	return all
}

func nodes(n int) []announcer.Candidate {
	var candidates []announcer.Candidate
	for i := range n {
		candidates = append(candidates, announcer.Candidate{Node: fmt.Sprintf("node-%d", i)})
	}
	return candidates
}
