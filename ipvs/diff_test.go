package ipvs_test

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/longshore-lb/longshore/ipvs"
)

// TestDiff takes pairs of states at random and does the operations one by one: they lead from one to the other, and
// what is promised about the order holds after each.
func TestDiff(t *testing.T) {
	r := rand.New(rand.NewPCG(2, 2))
	for i := range 5000 {
		from, to := randomState(r), randomState(r)
		ops := ipvs.Diff(from, to)
		if again := ipvs.Diff(from, to); !slices.Equal(ops, again) {
			t.Fatalf("pair %d: not the same twice:\n%v\n%v", i, ops, again)
		}
		if none := ipvs.Diff(from, from); len(none) > 0 {
			t.Fatalf("pair %d: operations between equal states: %v", i, none)
		}
		at := clone(from)
		for n, o := range ops {
			if err := do(&at, o); err != nil {
				t.Fatalf("pair %d: operation %d, %s: %v", i, n, o, err)
			}
			if err := keepsPromises(from, at, to); err != nil {
				t.Fatalf("pair %d: after operation %d, %s: %v", i, n, o, err)
			}
		}
		if diff := difference(to, at); diff != "" {
			t.Fatalf("pair %d: after all operations (-want +got):\n%s", i, diff)
		}
	}
}

// keepsPromises tells what is wrong with a state on the way between two.
func keepsPromises(from, at, to ipvs.State) error {
	for f := range from.VirtualServers {
		if _, stays := to.VirtualServers[f]; stays {
			if _, ok := at.VirtualServers[f]; !ok {
				return fmt.Errorf("%s has no virtual server, and both ends have one", f)
			}
			if takes(from, f) && takes(to, f) && !takes(at, f) {
				return fmt.Errorf("%s has no real server that takes connections, and both ends have some", f)
			}
		}
	}
	for f := range at.VirtualServers {
		if _, ok := at.Elements[ipvs.Element{Set: ipvs.Frontends, Frontend: f}]; !ok {
			return fmt.Errorf("virtual server %s is not marked as ours", f)
		}
	}
	for route := range at.Routes {
		_, had := from.Routes[route]
		_, stays := to.Routes[route]
		complete := to // a new route comes after all that it leads to
		if had {
			complete = from // an old one goes before
		}
		if had && stays || !route.IsSingleIP() {
			continue
		}
		for f := range complete.VirtualServers {
			if _, ok := at.VirtualServers[f]; f.Addr.Addr() == route.Addr() && !ok {
				return fmt.Errorf("route to %s, and virtual server %s is not there", route, f)
			}
			for addr := range complete.RealServers[f] {
				if _, ok := at.RealServers[f][addr]; f.Addr.Addr() == route.Addr() && !ok && (!had || !kept(to, f)) {
					return fmt.Errorf("route to %s, and real server %s of %s is not there", route, addr, f)
				}
			}
		}
	}
	return nil
}

// takes tells whether a frontend has a real server that takes connections.
func takes(s ipvs.State, f ipvs.Frontend) bool {
	for _, r := range s.RealServers[f] {
		if r.Weight > 0 {
			return true
		}
	}
	return false
}

func kept(s ipvs.State, f ipvs.Frontend) bool {
	_, ok := s.VirtualServers[f]
	return ok
}

// do is what a kernel does with an operation: it refuses to add what is there, and to update or delete what is not.
func do(s *ipvs.State, o ipvs.Operation) error {
	switch o.Kind {
	case ipvs.KindElement:
		for e := range s.Elements {
			if o.Verb == ipvs.Add && e.Set == ipvs.Shortcuts && e.Set == o.Element.Set && e.Frontend == o.Element.Frontend {
				return fmt.Errorf("the map has the key of %s already", e)
			}
		}
		return put(&s.Elements, o.Verb, o.Element, struct{}{})
	case ipvs.KindRoute:
		return put(&s.Routes, o.Verb, o.Route, o.Source)
	case ipvs.KindVirtualServer:
		f := o.VirtualServer.Frontend
		if o.Verb == ipvs.Add && !kept(*s, f) {
			s.AddVirtualServer(o.VirtualServer)
			return nil
		}
		if err := put(&s.VirtualServers, o.Verb, f, o.VirtualServer); err != nil {
			return err
		}
		if o.Verb == ipvs.Delete {
			delete(s.RealServers, f)
		}
		return nil
	case ipvs.KindRealServer:
		f := o.VirtualServer.Frontend
		if !kept(*s, f) {
			return fmt.Errorf("virtual server %s is not there", f)
		}
		of := s.RealServers[f]
		return put(&of, o.Verb, o.RealServer.Addr, o.RealServer)
	}
	return fmt.Errorf("kind %d", o.Kind)
}

func put[K, V comparable](m *map[K]V, verb ipvs.Verb, k K, v V) error {
	have, ok := (*m)[k]
	switch {
	case verb == ipvs.Add && ok:
		return fmt.Errorf("%v is there already", k)
	case verb != ipvs.Add && !ok:
		return fmt.Errorf("%v is not there", k)
	case verb == ipvs.Update && have == v:
		return fmt.Errorf("%v is so already", k)
	case verb == ipvs.Delete:
		delete(*m, k)
		return nil
	}
	if *m == nil {
		*m = map[K]V{}
	}
	(*m)[k] = v
	return nil
}

// clone copies a state: operations may then be done to the copy.
func clone(s ipvs.State) ipvs.State {
	var c ipvs.State
	for _, o := range ipvs.Diff(ipvs.State{}, s) {
		if err := do(&c, o); err != nil {
			panic(err)
		}
	}
	return c
}

// difference is what cmp.Diff says, and nothing, sooner than it would, of equal states.
func difference(want, got ipvs.State) string {
	if maps.Equal(want.VirtualServers, got.VirtualServers) && maps.Equal(want.Routes, got.Routes) && maps.Equal(want.Elements, got.Elements) &&
		maps.EqualFunc(want.RealServers, got.RealServers, maps.Equal) {
		return ""
	}
	return cmp.Diff(want, got, asState)
}

// asState compares states: a map without entries is as good as none.
var asState = cmp.Options{
	cmpopts.EquateEmpty(),
	cmpopts.EquateComparable(netip.Addr{}, netip.AddrPort{}, netip.Prefix{}, ipvs.Frontend{}, ipvs.Element{}),
}

var (
	vips  = []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2"), netip.MustParseAddr("fd00::1"), netip.MustParseAddr("fd00::2")}
	reals = []netip.AddrPort{netip.MustParseAddrPort("10.1.0.1:80"), netip.MustParseAddrPort("10.1.0.1:81"), netip.MustParseAddrPort("10.1.0.2:80")}
)

// randomState is a small state as [controller.Translate] makes them: frontends have their mark of ownership, and a
// route leads to an address only if there is a frontend on it. Two of them have much in common.
func randomState(r *rand.Rand) ipvs.State {
	var s ipvs.State
	one := func(n int) bool { return r.IntN(n) == 0 }
	for _, addr := range vips {
		served := false
		for _, port := range []uint16{80, 443} {
			for _, protocol := range []ipvs.Protocol{ipvs.TCP, ipvs.UDP} {
				if !one(3) {
					continue
				}
				served = true
				f := ipvs.At(protocol, netip.AddrPortFrom(addr, port))
				v := ipvs.VirtualServer{Frontend: f, Scheduler: []string{"rr", "mh"}[r.IntN(2)]}
				if one(4) {
					v.Persistence = 60
				}
				s.AddVirtualServer(v)
				for _, at := range reals {
					if one(2) {
						s.AddVirtualServer(v, ipvs.RealServer{Addr: at, Weight: int32(r.IntN(2))})
					}
				}
				s.AddFrontend(ipvs.Frontends, f)
				if one(2) {
					s.AddFrontend(ipvs.Masquerade, f)
				}
				if one(4) {
					s.Restrict(f, netip.MustParsePrefix([]string{"10.0.0.0/8", "fd00::/8"}[r.IntN(2)]))
				}
				if one(3) {
					s.AddShortcut(f, 1+r.Uint32N(2))
				}
			}
		}
		whole := netip.PrefixFrom(addr, addr.BitLen())
		if served {
			s.AddPrefix(ipvs.VIPs, whole)
		}
		if served && !one(3) {
			s.AddRoute(whole, []netip.Addr{{}, netip.MustParseAddr("172.31.0.1")}[r.IntN(2)])
		}
	}
	for _, text := range []string{"10.96.0.0/16", "10.97.0.0/16"} {
		if p := netip.MustParsePrefix(text); one(3) {
			s.AddRoute(p, netip.Addr{})
			s.AddPrefix(ipvs.ServiceCIDRs, p)
		}
	}
	if one(3) {
		s.AddPrefix(ipvs.Hairpin, netip.PrefixFrom(reals[0].Addr(), 32))
	}
	return s
}

// TestDiffOrder shows the order by example: what is new from the mark of ownership to the route, then what goes from the
// route to the mark.
func TestDiffOrder(t *testing.T) {
	build := func(addr string, scheduler string) ipvs.State {
		var s ipvs.State
		f := ipvs.At(ipvs.TCP, netip.MustParseAddrPort(addr+":80"))
		s.AddVirtualServer(ipvs.VirtualServer{Frontend: f, Scheduler: scheduler}, ipvs.RealServer{Addr: reals[0], Weight: 1})
		s.AddFrontend(ipvs.Frontends, f)
		p := netip.PrefixFrom(f.Addr.Addr(), 32)
		s.AddPrefix(ipvs.VIPs, p)
		s.AddRoute(p, netip.Addr{})
		return s
	}
	for _, test := range []struct {
		name     string
		from, to ipvs.State
		want     []string
	}{
		{"another address", build("192.0.2.1", "rr"), build("192.0.2.2", "rr"), []string{
			"add element ip longshore frontends { 192.0.2.2 . tcp . 80 }",
			"add element ip longshore vips { 192.0.2.2 }",
			"-A -t 192.0.2.2:80 -s rr",
			"-a -t 192.0.2.2:80 -r 10.1.0.1:80 -m -w 1",
			"ip route add local 192.0.2.2/32 dev lo table local",
			"ip route del local 192.0.2.1/32 dev lo table local",
			"-D -t 192.0.2.1:80",
			"delete element ip longshore vips { 192.0.2.1 }",
			"delete element ip longshore frontends { 192.0.2.1 . tcp . 80 }",
		}},
		{"another scheduler", build("192.0.2.1", "rr"), build("192.0.2.1", "mh"), []string{"-E -t 192.0.2.1:80 -s mh"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			var got []string
			for _, o := range ipvs.Diff(test.from, test.to) {
				got = append(got, o.String())
			}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}
