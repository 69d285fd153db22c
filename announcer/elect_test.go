package announcer_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/longshore-lb/longshore/announcer"
)

func TestElect(t *testing.T) {
	vip := netip.MustParseAddr("192.0.2.5")
	for _, test := range []struct {
		name       string
		candidates []announcer.Candidate
		want       string
	}{
		{"nobody", nil, ""},
		{"one", []announcer.Candidate{{Node: "a"}}, "a"},
		{"preferred", []announcer.Candidate{{Node: "a"}, {Node: "b", Preference: 1}, {Node: "c"}}, "b"},
		{"negative preference", []announcer.Candidate{{Node: "a", Preference: -2}, {Node: "b", Preference: -1}}, "b"},
		{"twice, higher preference counts", []announcer.Candidate{{Node: "a", Preference: 5}, {Node: "b", Preference: 4}, {Node: "a", Preference: 1}}, "a"},
		// These two hold the hash in place (computed by another program): agents of different versions must agree.
		{"by weight", []announcer.Candidate{{Node: "node-1"}, {Node: "node-2"}, {Node: "node-3"}}, "node-2"},
		{"by weight among the preferred", []announcer.Candidate{{Node: "node-1", Preference: 1}, {Node: "node-2"}, {Node: "node-3", Preference: 1}}, "node-1"},
	} {
		t.Run(test.name, func(t *testing.T) {
			if got := announcer.Elect(vip, test.candidates); got != test.want {
				t.Errorf("Elect(%s, %v) = %q, want %q", vip, test.candidates, got, test.want)
			}
		})
	}
}

func TestElectForms(t *testing.T) {
	nodes := nodes(7)
	for i := range 200 {
		v4 := netip.AddrFrom4([4]byte{10, 0, 0, byte(i)})
		if a, b := announcer.Elect(v4, nodes), announcer.Elect(netip.AddrFrom16(v4.As16()), nodes); a != b {
			t.Errorf("%s is owned by %s, and by %s in its IPv6-mapped form", v4, a, b)
		}
	}
}

func TestElectSpread(t *testing.T) {
	const addresses = 1000
	for name, address := range map[string]func(i int) netip.Addr{
		"IPv4": func(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)}) },
		"IPv6": func(i int) netip.Addr {
			return netip.AddrFrom16([16]byte{0: 0xfd, 14: byte(i >> 8), 15: byte(i)})
		},
	} {
		for n := 3; n <= 10; n++ {
			t.Run(fmt.Sprintf("%s/%d nodes", name, n), func(t *testing.T) {
				candidates := nodes(n)
				owned := map[string]int{}
				for i := range addresses {
					owner := announcer.Elect(address(i), candidates)
					owned[owner]++

					shuffled := nodes(n)
					rand.Shuffle(n, func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
					if other := announcer.Elect(address(i), shuffled); other != owner {
						t.Fatalf("%s: owner %s, but %s for another order %v", address(i), owner, other, shuffled)
					}
					for gone := range candidates {
						rest := append(nodes(gone), candidates[gone+1:]...)
						if other := announcer.Elect(address(i), rest); other != owner && candidates[gone].Node != owner {
							t.Fatalf("%s moved from %s to %s when %s went", address(i), owner, other, candidates[gone].Node)
						}
					}
				}
				for _, c := range candidates {
					// 4 standard deviations of a fair choice: sqrt(1000/n) is an upper bound of one.
					mean := float64(addresses) / float64(n)
					if off := float64(owned[c.Node]) - mean; off*off > 16*mean {
						t.Errorf("%s owns %d of %d addresses, a fair share is %.0f", c.Node, owned[c.Node], addresses, mean)
					}
				}
			})
		}
	}
}

func nodes(n int) []announcer.Candidate {
	var candidates []announcer.Candidate
	for i := range n {
		candidates = append(candidates, announcer.Candidate{Node: fmt.Sprintf("node-%d", i)})
	}
	return candidates
}
