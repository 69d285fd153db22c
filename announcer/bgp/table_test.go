package bgp

import (
	"context"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/longshore-lb/longshore/announcer"
)

func TestDiff(t *testing.T) {
	a, b := peer(1, "a"), peer(2, "b")
	slower := a
	slower.HoldTime *= 2
	red := to("192.0.2.1/32")
	red.Communities = []string{"64512:1"}
	elsewhere := config([]Peer{a}, to("192.0.2.1/32"), to("2001:db8::1/128"))
	elsewhere.NextHop6 = netip.MustParseAddr("fd99::77")

	for _, tt := range []struct {
		name     string
		from, to Config
		want     []string
	}{
		{
			name: "everything is new",
			to:   config([]Peer{a}, to("192.0.2.2/32"), to("192.0.2.1/32")),
			want: []string{
				"announce route 192.0.2.1/32 next-hop 10.99.0.1",
				"announce route 192.0.2.2/32 next-hop 10.99.0.1",
				"add neighbor a 10.99.1.2 as 65001",
			},
		},
		{
			name: "everything goes",
			from: config([]Peer{a}, to("192.0.2.1/32")),
			want: []string{"remove neighbor a 10.99.1.2 as 65001", "withdraw route 192.0.2.1/32 next-hop 10.99.0.1"},
		},
		{
			name: "order and repetition mean nothing",
			from: config([]Peer{a, b}, to("192.0.2.1/32", "a", "b"), to("192.0.2.2/32")),
			to:   config([]Peer{b, a}, to("192.0.2.2/32"), to("192.0.2.1/32", "b", "a", "b")),
		},
		{
			name: "one route of three comes, one goes",
			from: config([]Peer{a}, to("192.0.2.1/32"), to("192.0.2.2/32")),
			to:   config([]Peer{a}, to("192.0.2.2/32"), to("192.0.2.3/32")),
			want: []string{"withdraw route 192.0.2.1/32 next-hop 10.99.0.1", "announce route 192.0.2.3/32 next-hop 10.99.0.1"},
		},
		{
			name: "a peer's BFD changes",
			from: config([]Peer{a, fast(b)}, to("192.0.2.1/32")),
			to:   config([]Peer{fast(a), b}, to("192.0.2.1/32")),
		},
		{
			name: "a route's communities change",
			from: config([]Peer{a}, to("192.0.2.1/32"), to("192.0.2.2/32")),
			to:   config([]Peer{a}, red, to("192.0.2.2/32")),
			want: []string{"announce route 192.0.2.1/32 next-hop 10.99.0.1"},
		},
		{
			name: "a peer comes: no route is touched",
			from: config([]Peer{a}, to("192.0.2.1/32"), to("192.0.2.2/32", "b")),
			to:   config([]Peer{a, b}, to("192.0.2.1/32"), to("192.0.2.2/32", "b")),
			want: []string{"add neighbor b 10.99.2.2 as 65002"},
		},
		{
			name: "a peer changes in one field",
			from: config([]Peer{a, b}, to("192.0.2.1/32")),
			to:   config([]Peer{slower, b}, to("192.0.2.1/32")),
			want: []string{"remove neighbor a 10.99.1.2 as 65001", "add neighbor a 10.99.1.2 as 65001"},
		},
		{
			name: "the IPv6 next hop changes",
			from: config([]Peer{a}, to("192.0.2.1/32"), to("2001:db8::1/128")),
			to:   elsewhere,
			want: []string{"announce route 2001:db8::1/128 next-hop fd99::77"},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			from, _, _ := tableOf(tt.from)
			desired, _, _ := tableOf(tt.to)
			var got []string
			for _, o := range diff(from, desired) {
				got = append(got, o.String())
			}
			if d := cmp.Diff(tt.want, got); d != "" {
				t.Errorf("(-want +got)\n%s", d)
			}
			if again := diff(desired, desired); len(again) > 0 {
				t.Errorf("then there is still %v to do", again)
			}
		})
	}
}

func TestAttributes(t *testing.T) {
	external, internal := peer(1, "external"), peer(2, "internal")
	internal.PeerASN = internal.MyASN
	keeping, keepingOutside := internal, external
	keeping.GracefulRestart, keepingOutside.GracefulRestart = true, true
	all := announcer.Route{LocalPref: 100, MED: 30, Prepend: 3, Communities: []string{"64512:2", "64512:1"}}
	some := announcer.Route{LocalPref: 300, MED: 20, Prepend: 4, Communities: []string{"64512:3", "64512:1"}, Peers: []string{"internal"}}
	for _, tt := range []struct {
		name string
		audience
		peer  Peer
		want  attributes
		hears bool
	}{
		{"LOCAL_PREF stays inside, AS_PATH gets longer outside", audience{routes: []announcer.Route{all}}, external,
			attributes{med: 30, prepend: 3, communities: []string{"64512:1", "64512:2"}}, true},
		{"LOCAL_PREF goes inside", audience{routes: []announcer.Route{all}}, internal,
			attributes{localPref: 100, med: 30, communities: []string{"64512:1", "64512:2"}}, true},
		{"not named", audience{routes: []announcer.Route{some}}, external, attributes{}, false},
		{"two routes name the peer", audience{routes: []announcer.Route{all, some}}, internal,
			attributes{localPref: 300, med: 20, communities: []string{"64512:1", "64512:2", "64512:3"}}, true},
		{"two routes, and one is as short as can be", audience{routes: []announcer.Route{all, {}}}, external,
			attributes{communities: []string{"64512:1", "64512:2"}}, true},
		{"one of two names the peer", audience{routes: []announcer.Route{some, all}}, external,
			attributes{med: 30, prepend: 3, communities: []string{"64512:1", "64512:2"}}, true},
		{"shutting down, outside", audience{routes: []announcer.Route{some, all}, shutdown: true}, external,
			attributes{med: 30, prepend: 3, communities: []string{"64512:1", "64512:2", "65535:0"}}, true},
		{"shutting down, inside", audience{routes: []announcer.Route{all}, shutdown: true}, internal,
			attributes{med: 30, communities: []string{"64512:1", "64512:2", "65535:0"}}, true},
		{"shutting down, not named", audience{routes: []announcer.Route{some}, shutdown: true}, external, attributes{}, false},
		{"leaving a peer that drops the routes", audience{routes: []announcer.Route{{}}, leaving: true}, internal, attributes{communities: []string{"65535:0"}}, true},
		{"leaving a peer that keeps the routes", audience{routes: []announcer.Route{{}}, leaving: true}, keeping, attributes{localPref: 100}, true},
		{"leaving an external peer that keeps the routes", audience{routes: []announcer.Route{all}, leaving: true}, keepingOutside,
			attributes{med: 30, prepend: 3, communities: []string{"64512:1", "64512:2"}}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, hears := tt.attributes(tt.peer)
			if d := cmp.Diff(tt.want, got, cmp.AllowUnexported(attributes{})); d != "" || hears != tt.hears {
				t.Errorf("hears is %v, want %v; (-want +got)\n%s", hears, tt.hears, d)
			}
		})
	}
}

func TestValidatePeer(t *testing.T) {
	for _, tt := range []struct {
		change func(*Peer)
		want   string // "" = valid
	}{
		{func(*Peer) {}, ""},
		{func(p *Peer) { p.HoldTime, p.KeepaliveTime = 9*time.Second, 3*time.Second }, ""},
		{func(p *Peer) { p.MyASN = 0 }, "MyASN 0"},
		{func(p *Peer) { p.MyASN, p.LocalASN = 0, 64513 }, ""},
		{func(p *Peer) { p.PeerASN = 0 }, "PeerASN 0"},
		{func(p *Peer) { p.AnyASN = true }, "PeerASN 65001 excludes AnyASN"},
		{func(p *Peer) { p.PeerASN, p.AnyASN = 0, true }, ""},
		{func(p *Peer) { p.TTLSecurityHops = 254 }, ""},
		{func(p *Peer) { p.TTLSecurityHops = 255 }, "TTLSecurityHops 255"},
		{func(p *Peer) { p.TTLSecurityHops, p.EBGPMultiHop = 1, true }, "TTLSecurityHops 1 excludes"},
		{func(p *Peer) { p.Address = netip.Addr{} }, "Address"},
		{func(p *Peer) { p.Address, p.Interface = netip.Addr{}, "eth0" }, "no router advertises itself on link eth0"},
		{func(p *Peer) { p.Address = netip.MustParseAddr("224.0.0.1") }, "Address 224.0.0.1"},
		{func(p *Peer) { p.Address = netip.MustParseAddr("fe80::1") }, "names no interface"},
		{func(p *Peer) { p.Source = netip.MustParseAddr("fd99::1") }, "not of one family"},
		{func(p *Peer) { p.HoldTime = 2 * time.Second }, "HoldTime 2s"},
		{func(p *Peer) { p.HoldTime = 20 * time.Hour }, "HoldTime 20h"},
		{func(p *Peer) { p.KeepaliveTime = 31 * time.Second }, "KeepaliveTime 31s"},
		{func(p *Peer) { p.ConnectTime = time.Second }, "ConnectTime 1s"},
		{func(p *Peer) { p.Password = strings.Repeat("x", 81) }, "Password of 81 bytes"},
	} {
		p := peer(1, "a")
		tt.change(&p)
		if err := p.validate(); (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%+v: error %v, want %q", p, err, tt.want)
		}
	}
}

func TestValidateRoute(t *testing.T) {
	for _, tt := range []struct {
		community string
		valid     bool
	}{
		{"64512:1", true}, {"0:0", true}, {"65535:65535", true}, {"large:64512:1:4294967295", true},
		{"", false}, {"64512", false}, {"65536:1", false}, {"1:2:3", false}, {"-1:2", false}, {"01:2", false}, {"no-export", false},
		{"large:1:2", false}, {"large:1:2:3:4", false}, {"large:4294967296:1:1", false},
		{"large:4294967295:0:1", false}, // ours
	} {
		r := to("192.0.2.1/32")
		r.Communities = []string{tt.community}
		if err := validateRoute(r); (err == nil) != tt.valid {
			t.Errorf("community %q: error %v, want valid %v", tt.community, err, tt.valid)
		}
	}
	bad := to("192.0.2.1/32")
	bad.Communities = []string{"no-export"}
	got, _, problems := tableOf(config(nil, bad, announcer.Route{}, to("192.0.2.77/24")))
	if len(problems) != 2 || len(got.paths) != 1 {
		t.Errorf("problems %v, paths %v; want two and one", problems, got.paths)
	}
	if _, ok := got.paths[netip.MustParsePrefix("192.0.2.0/24")]; !ok {
		t.Errorf("paths %v lack 192.0.2.0/24", got.paths)
	}
}

// TestPause is the pause of a session that exceeded the prefix limit.
func TestPause(t *testing.T) {
	b := newBoard(slog.New(slog.DiscardHandler), func() {}, func() {})
	over, waiting, fine := peer(1, "over"), peer(2, "waiting"), peer(3, "fine")
	for _, p := range []Peer{over, waiting, fine} {
		b.add(p)
	}
	b.sessions[over.Address].revive = time.Now().Add(-time.Second)
	b.sessions[waiting.Address].revive = time.Now().Add(time.Hour)
	if d := cmp.Diff([]string{"10.99.1.2"}, addresses(b.revivable())); d != "" {
		t.Errorf("pause is over (-want +got)\n%s", d)
	}
	if again := b.revivable(); len(again) > 0 {
		t.Errorf("the pause of %v is over twice", again)
	}
}

func addresses(as []netip.Addr) (s []string) {
	for _, a := range as {
		s = append(s, a.String())
	}
	return s
}

// TestNothingIsLeft starts and stops servers in this process, with a peer nobody is at, and looks for goroutines.
func TestNothingIsLeft(t *testing.T) {
	before := goleak.IgnoreCurrent()
	ctx, cancel := context.WithCancel(context.Background())
	changed := make(chan struct{}, 1)
	s := New(slog.New(slog.DiscardHandler), func() {
		select {
		case changed <- struct{}{}:
		default:
		}
	})
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	waitFor := func(what string, ok func([]Session) bool) {
		t.Helper()
		timeout := time.After(patience)
		for !ok(s.Sessions()) {
			select {
			case <-changed:
			case <-timeout:
				t.Fatalf("%s: sessions are %+v", what, s.Sessions())
			}
		}
	}

	nobody := peer(1, "nobody")
	nobody.Address, nobody.Port = netip.MustParseAddr("127.0.0.1"), 9
	c := config([]Peer{nobody}, to("192.0.2.1/32"))
	for _, id := range []string{"10.99.0.1", "10.99.0.2"} {
		c.RouterID = netip.MustParseAddr(id)
		s.Set(c)
		waitFor("no attempt", func(got []Session) bool { return strings.Contains(got[0].Reason, "connection refused") })
	}
	c.RouterID = netip.Addr{}
	s.Set(c)
	waitFor("no complaint", func(got []Session) bool {
		return strings.Contains(got[0].Reason, "RouterID invalid IP is not an IPv4 address")
	})
	c.Peers = nil
	s.Set(c)
	waitFor("still sessions", func(got []Session) bool { return len(got) == 0 })
	c = config([]Peer{nobody})
	s.Set(c)
	waitFor("no attempt", func(got []Session) bool { return strings.Contains(got[0].Reason, "connection refused") })
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Run returned %v", err)
	}
	goleak.VerifyNone(t, before)
}
