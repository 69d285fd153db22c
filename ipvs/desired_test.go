package ipvs_test

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/longshore-lb/longshore/ipvs"
)

// TestDesired lets owners with clashing wishes come, change and go at random. The operations, done to a state, make it
// the desired one each time, are no more than the change, and the desired state is that of a naive model.
func TestDesired(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 3))
	var (
		desired  ipvs.Desired
		model    = model{wishes: map[string]ipvs.State{}, claims: map[claim]int{}}
		realized ipvs.State
	)
	for i := range 10_000 {
		batch := map[string]ipvs.State{}
		for range 1 + r.IntN(3) {
			var wish ipvs.State
			if r.IntN(4) > 0 {
				wish = randomState(r)
			}
			batch[fmt.Sprintf("owner-%d", r.IntN(6))] = wish
		}
		before := clone(realized)
		ops := desired.ReplaceAll(wishes(batch), time.Time{})
		model.replace(batch)
		want := model.state()
		if diff := difference(want, desired.State()); diff != "" {
			t.Fatalf("step %d: desired state (-model +got):\n%s", i, diff)
		}
		if least := ipvs.Diff(before, want); !slices.Equal(ops, least) {
			t.Fatalf("step %d: operations\n%v\nwant those of the change\n%v", i, ops, least)
		}
		for n, o := range ops {
			if err := do(&realized, o); err != nil {
				t.Fatalf("step %d: operation %d, %s: %v", i, n, o, err)
			}
			if err := keepsPromises(before, realized, want); err != nil {
				t.Fatalf("step %d: after operation %d, %s: %v", i, n, o, err)
			}
		}
		if diff := difference(want, realized); diff != "" {
			t.Fatalf("step %d: after all operations (-want +got):\n%s", i, diff)
		}
		for owner := range model.wishes {
			if want, got := model.conflicts(owner), desired.Conflicts(owner); !slices.Equal(want, got) {
				t.Fatalf("step %d: conflicts of %s: %v, model %v", i, owner, got, want)
			}
		}
	}
}

// wishes is what owners want, with nothing to drain.
func wishes(states map[string]ipvs.State) map[string]ipvs.Wish {
	out := map[string]ipvs.Wish{}
	for owner, s := range states {
		out[owner] = ipvs.Wish{State: s}
	}
	return out
}

// model is the rule in as few words as there are: who asked first has it.
type model struct {
	wishes map[string]ipvs.State
	claims map[claim]int // when it was made
	clock  int
}

type claim struct {
	owner    string
	frontend ipvs.Frontend
	route    netip.Prefix
}

func (m *model) replace(batch map[string]ipvs.State) {
	for _, owner := range slices.Sorted(maps.Keys(batch)) {
		wanted := map[claim]bool{}
		for f := range batch[owner].VirtualServers {
			wanted[claim{owner: owner, frontend: f}] = true
		}
		for p := range batch[owner].Routes {
			wanted[claim{owner: owner, route: p}] = true
		}
		maps.DeleteFunc(m.claims, func(c claim, _ int) bool { return c.owner == owner && !wanted[c] })
		for c := range wanted {
			if _, had := m.claims[c]; !had {
				m.claims[c] = m.clock // of one owner no two are for the same
			}
		}
		m.clock++
		if m.wishes[owner] = batch[owner]; len(batch[owner].VirtualServers)+len(batch[owner].Routes)+len(batch[owner].Elements) == 0 {
			delete(m.wishes, owner)
		}
	}
}

// first is who claimed something first.
func (m *model) first(same func(claim) bool) string {
	var owner string
	var since int
	for c, at := range m.claims {
		if same(c) && (owner == "" || at < since) {
			owner, since = c.owner, at
		}
	}
	return owner
}

func (m *model) holder(f ipvs.Frontend) string {
	return m.first(func(c claim) bool { return c.frontend == f && !c.route.IsValid() })
}

func (m *model) state() ipvs.State {
	var s ipvs.State
	for owner, wish := range m.wishes {
		for f, v := range wish.VirtualServers {
			if m.holder(f) == owner {
				s.AddVirtualServer(v, slices.Collect(maps.Values(wish.RealServers[f]))...)
			}
		}
		for p, src := range wish.Routes {
			if m.first(func(c claim) bool { return c.route == p }) == owner {
				s.AddRoute(p, src)
			}
		}
		for e := range wish.Elements {
			switch {
			case !e.OfFrontend():
				s.AddPrefix(e.Set, e.Prefix)
			case m.holder(e.Frontend) != owner:
			case e.Set == ipvs.Shortcuts:
				s.AddShortcut(e.Frontend, e.Mark)
			case e.Set == ipvs.Allowed:
				s.Restrict(e.Frontend, e.Prefix)
			case e.Set != ipvs.Restricted: // which comes with what is allowed
				s.AddFrontend(e.Set, e.Frontend)
			}
		}
	}
	return s
}

func (m *model) conflicts(owner string) []ipvs.Conflict {
	var out []ipvs.Conflict
	for f := range m.wishes[owner].VirtualServers {
		if holder := m.holder(f); holder != owner {
			out = append(out, ipvs.Conflict{Frontend: f, Owner: owner, Holder: holder})
		}
	}
	slices.SortFunc(out, func(a, b ipvs.Conflict) int { return a.Frontend.Compare(b.Frontend) })
	return out
}

// A frontend that changes hands is updated in place, if it happens in one step.
func TestDesiredHandOver(t *testing.T) {
	wish := func(scheduler string) ipvs.State {
		var s ipvs.State
		f := ipvs.At(ipvs.TCP, netip.MustParseAddrPort("192.0.2.1:80"))
		s.AddVirtualServer(ipvs.VirtualServer{Frontend: f, Scheduler: scheduler}, ipvs.RealServer{Addr: reals[0], Weight: 1})
		s.AddFrontend(ipvs.Frontends, f)
		s.AddRoute(netip.MustParsePrefix("192.0.2.1/32"), netip.Addr{})
		return s
	}
	for _, test := range []struct {
		from, to string
		want     string
	}{
		{"a", "b", "[-E -t 192.0.2.1:80 -s mh]"},
		{"b", "a", "[-E -t 192.0.2.1:80 -s mh]"},
	} {
		var d ipvs.Desired
		d.ReplaceAll(wishes(map[string]ipvs.State{test.from: wish("rr")}), time.Time{})
		if got := fmt.Sprint(d.ReplaceAll(wishes(map[string]ipvs.State{test.from: {}, test.to: wish("mh")}), time.Time{})); got != test.want {
			t.Errorf("from %s to %s: %s, want %s", test.from, test.to, got, test.want)
		}
	}
}

// The cost of a change does not depend on how many owners there are.
func TestDesiredCost(t *testing.T) {
	allocations := func(owners int) float64 {
		var d ipvs.Desired
		wish := func(i int, scheduler string) ipvs.State {
			var s ipvs.State
			f := ipvs.At(ipvs.TCP, netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), 80))
			s.AddVirtualServer(ipvs.VirtualServer{Frontend: f, Scheduler: scheduler}, ipvs.RealServer{Addr: reals[0], Weight: 1})
			s.AddFrontend(ipvs.Frontends, f)
			s.AddRoute(netip.PrefixFrom(f.Addr.Addr(), 32), netip.Addr{})
			return s
		}
		for i := range owners {
			d.ReplaceAll(wishes(map[string]ipvs.State{fmt.Sprint(i): wish(i, "rr")}), time.Time{})
		}
		a, b := wishes(map[string]ipvs.State{"5": wish(5, "mh")}), wishes(map[string]ipvs.State{"5": wish(5, "rr")})
		return testing.AllocsPerRun(100, func() {
			if n := len(d.ReplaceAll(a, time.Time{})) + len(d.ReplaceAll(b, time.Time{})); n != 2 {
				t.Fatalf("%d operations, want one for each change", n)
			}
		})
	}
	if few, many := allocations(10), allocations(10_000); many > 2*few {
		t.Errorf("a change takes %.0f allocations among 10000 owners, and %.0f among 10", many, few)
	}
}
