package ipvs_test

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/longshore-lb/longshore/ipvs"
)

// TestDrain goes through the life of real servers at one frontend, a step a line: what is wanted, when, and what is done.
func TestDrain(t *testing.T) {
	tcp, udp := ipvs.At(ipvs.TCP, netip.MustParseAddrPort("192.0.2.1:80")), ipvs.At(ipvs.UDP, netip.MustParseAddrPort("192.0.2.1:53"))
	began := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	const limit = time.Minute

	wish := func(f ipvs.Frontend, drain time.Duration, wanted string, leaving ...netip.AddrPort) map[string]ipvs.Wish {
		w := ipvs.Wish{Drain: drain}
		if wanted == "nothing" {
			return map[string]ipvs.Wish{"owner": w}
		}
		w.AddVirtualServer(ipvs.VirtualServer{Frontend: f, Scheduler: "rr"})
		for i, at := range reals {
			if strings.Contains(wanted, string(rune('1'+i))) {
				w.AddVirtualServer(w.VirtualServers[f], ipvs.RealServer{Addr: at, Weight: 5, Upper: 9})
			}
		}
		if f == udp {
			w.Leaving = map[ipvs.Frontend][]netip.AddrPort{f: leaving}
		}
		return map[string]ipvs.Wish{"owner": w}
	}
	busy := func(f ipvs.Frontend, n int) map[ipvs.Frontend]map[netip.AddrPort]int {
		return map[ipvs.Frontend]map[netip.AddrPort]int{f: {reals[0]: n}}
	}
	type step struct {
		at          time.Duration
		want        string // which of the real servers 1, 2, 3; "" = EndDrains
		leaving     []netip.AddrPort
		connections int
		ops         []string
		why         ipvs.Drained
	}
	quiet := "-e -t 192.0.2.1:80 -r 10.1.0.1:80 -m -w 0"
	gone := "-d -t 192.0.2.1:80 -r 10.1.0.1:80"
	for _, test := range []struct {
		name     string
		frontend ipvs.Frontend
		drain    time.Duration
		steps    []step
	}{
		{"until it is empty", tcp, limit, []step{
			{want: "2", ops: []string{quiet}},
			{at: time.Second, connections: 3},
			{at: 2 * time.Second, ops: []string{gone}, why: ipvs.Drained{Empty: 1}},
		}},
		{"until its time is over, which goes on through other changes", tcp, limit, []step{
			{want: "2", ops: []string{quiet}},
			{at: 50 * time.Second, want: "23", ops: []string{"-a -t 192.0.2.1:80 -r 10.1.0.2:80 -m -w 5"}},
			{at: 59 * time.Second, connections: 3},
			{at: 60 * time.Second, connections: 3, ops: []string{gone}, why: ipvs.Drained{Timeout: 1}},
		}},
		{"one that returns has its weight back", tcp, limit, []step{
			{want: "2", ops: []string{quiet}},
			{at: time.Second, want: "12", ops: []string{"-e -t 192.0.2.1:80 -r 10.1.0.1:80 -m -w 5"}},
			{at: 2 * time.Hour},
		}},
		{"a virtual server that goes ends it", tcp, limit, []step{
			{want: "2", ops: []string{quiet}},
			{at: time.Second, want: "nothing", ops: []string{"-D -t 192.0.2.1:80", "delete element ip longshore frontends { 192.0.2.1 . tcp . 80 }"}},
			{at: 2 * time.Hour},
		}},
		{"at once", tcp, 0, []step{{want: "2", ops: []string{gone}}}},
		{"UDP drains while it serves", udp, limit, []step{
			{want: "2", leaving: reals[:1], ops: []string{"-e -u 192.0.2.1:53 -r 10.1.0.1:80 -m -w 0"}},
			{at: time.Second, connections: 1},
			{at: 2 * time.Second, want: "2", ops: []string{"-d -u 192.0.2.1:53 -r 10.1.0.1:80"}},
		}},
		{"UDP that serves no more", udp, limit, []step{{want: "2", ops: []string{"-d -u 192.0.2.1:53 -r 10.1.0.1:80"}}}},
	} {
		t.Run(test.name, func(t *testing.T) {
			for _, restarted := range []bool{false, true} {
				var d ipvs.Desired
				first := wish(test.frontend, test.drain, "12")
				w := first["owner"]
				w.AddFrontend(ipvs.Frontends, test.frontend)
				first["owner"] = w
				if restarted { // the first wish is what another process has left in the kernel
					d.Adopt(w.State)
				} else {
					d.ReplaceAll(first, began)
				}
				for i, s := range test.steps {
					now := began.Add(s.at)
					var ops []ipvs.Operation
					var why ipvs.Drained
					if s.want == "" {
						ops, why = d.EndDrains(now, busy(test.frontend, s.connections))
					} else {
						next := wish(test.frontend, test.drain, s.want, s.leaving...)
						if w := next["owner"]; s.want != "nothing" {
							w.AddFrontend(ipvs.Frontends, test.frontend)
							next["owner"] = w
						}
						ops = d.ReplaceAll(next, now)
					}
					var got []string
					for _, o := range ops {
						got = append(got, o.String())
					}
					if diff := cmp.Diff(s.ops, got); diff != "" {
						t.Errorf("restarted %t: step %d (-want +got):\n%s", restarted, i+1, diff)
					}
					if why != s.why {
						t.Errorf("restarted %t: step %d: %+v drained, want %+v", restarted, i+1, why, s.why)
					}
				}
			}
		})
	}
}

// TestAdopt: what is adopted stays as it is where it is wanted, whoever asks first, and goes at the end where it is not.
func TestAdopt(t *testing.T) {
	var observed ipvs.State
	for _, addr := range []string{"192.0.2.1", "192.0.2.2"} {
		f := ipvs.At(ipvs.TCP, netip.MustParseAddrPort(addr+":80"))
		observed.AddVirtualServer(ipvs.VirtualServer{Frontend: f, Scheduler: "rr"}, ipvs.RealServer{Addr: reals[0], Weight: 1})
		observed.AddFrontend(ipvs.Frontends, f)
		observed.AddFrontend(ipvs.Masquerade, f)
		observed.AddPrefix(ipvs.VIPs, netip.PrefixFrom(f.Addr.Addr(), 32))
		observed.AddRoute(netip.PrefixFrom(f.Addr.Addr(), 32), netip.Addr{})
	}
	half := ipvs.At(ipvs.TCP, netip.MustParseAddrPort("192.0.2.3:80"))
	observed.AddFrontend(ipvs.Frontends, half) // another process ended between two operations

	wish := func(addr string) ipvs.Wish {
		var w ipvs.Wish
		f := ipvs.At(ipvs.TCP, netip.MustParseAddrPort(addr+":80"))
		w.AddVirtualServer(ipvs.VirtualServer{Frontend: f, Scheduler: "mh"}, ipvs.RealServer{Addr: reals[0], Weight: 1})
		w.AddFrontend(ipvs.Frontends, f)
		w.AddPrefix(ipvs.VIPs, netip.PrefixFrom(f.Addr.Addr(), 32))
		w.AddRoute(netip.PrefixFrom(f.Addr.Addr(), 32), netip.Addr{})
		return w
	}
	var d ipvs.Desired
	d.Adopt(observed)
	var got []string
	for _, ops := range [][]ipvs.Operation{
		d.ReplaceAll(map[string]ipvs.Wish{"a": wish("192.0.2.1")}, time.Time{}),
		d.ReplaceAll(map[string]ipvs.Wish{"a": {}, "b": wish("192.0.2.3")}, time.Time{}),
		d.Settle(),
		d.Settle(),
	} {
		got = append(got, "")
		for _, o := range ops {
			got = append(got, o.String())
		}
	}
	want := []string{
		"",
		"-E -t 192.0.2.1:80 -s mh",
		"delete element ip longshore masqueraded { 192.0.2.1 . tcp . 80 }",
		"",
		"add element ip longshore vips { 192.0.2.3 }",
		"-A -t 192.0.2.3:80 -s mh",
		"-a -t 192.0.2.3:80 -r 10.1.0.1:80 -m -w 1",
		"ip route add local 192.0.2.3/32 dev lo table local",
		"ip route del local 192.0.2.1/32 dev lo table local",
		"-D -t 192.0.2.1:80",
		"delete element ip longshore vips { 192.0.2.1 }",
		"delete element ip longshore frontends { 192.0.2.1 . tcp . 80 }",
		"",
		"ip route del local 192.0.2.2/32 dev lo table local",
		"-D -t 192.0.2.2:80",
		"delete element ip longshore vips { 192.0.2.2 }",
		"delete element ip longshore masqueraded { 192.0.2.2 . tcp . 80 }",
		"delete element ip longshore frontends { 192.0.2.2 . tcp . 80 }",
		"",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

// TestSeed: nodes add the same real servers in orders of their own, but for scheduler mh.
func TestSeed(t *testing.T) {
	orders := map[string]map[string]bool{}
	for seed := range uint32(20) {
		for _, scheduler := range []string{"rr", "mh"} {
			d := ipvs.Desired{Seed: 1 + seed}
			var w ipvs.Wish
			v := ipvs.VirtualServer{Frontend: ipvs.At(ipvs.TCP, netip.MustParseAddrPort("192.0.2.1:80")), Scheduler: scheduler}
			for _, at := range reals {
				w.AddVirtualServer(v, ipvs.RealServer{Addr: at, Weight: 1})
			}
			var order strings.Builder
			for _, o := range d.ReplaceAll(map[string]ipvs.Wish{"a": w}, time.Time{}) {
				if o.Kind == ipvs.KindRealServer {
					order.WriteString(o.RealServer.Addr.String() + " ")
				}
			}
			if orders[scheduler] == nil {
				orders[scheduler] = map[string]bool{}
			}
			orders[scheduler][order.String()] = true
		}
	}
	if len(orders["rr"]) < 4 || len(orders["mh"]) != 1 {
		t.Errorf("20 seeds give %d orders for rr and %d for mh, want several and one", len(orders["rr"]), len(orders["mh"]))
	}
}
