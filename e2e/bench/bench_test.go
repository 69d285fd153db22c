package main

import (
	"encoding/binary"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestPercentile(t *testing.T) {
	var all []time.Duration
	for i := 200; i > 0; i-- {
		all = append(all, time.Duration(i))
	}
	for _, c := range []struct {
		p    float64
		want time.Duration
	}{{50, 100}, {99, 198}, {100, 200}, {0, 1}} {
		if got := percentile(all, c.p); got != c.want {
			t.Errorf("percentile %v of 1 to 200 is %d, want %d", c.p, got, c.want)
		}
	}
	if got := percentile([]time.Duration{7}, 99); got != 7 {
		t.Errorf("percentile 99 of 7 alone is %d", got)
	}
}

func TestLine(t *testing.T) {
	f := func(proxy string, v float64) figure { return figure{name: "x", proxy: proxy, value: v, unit: "s"} }
	late := f("p", 900)
	late.exceeded = true
	mine, theirs := f(ours, 2), f("p", 1)
	mine.more, theirs.more = true, true
	slow := f(ours, 0.5)
	for _, c := range []struct {
		mine *figure
		peer figure
		want string
	}{
		{&slow, f("p", 12.34), "BENCH x/p ours=0.500 peer=12.3 unit=s ratio=24.7"},
		{&slow, late, "BENCH x/p ours=0.500 peer=>900 unit=s ratio=>1800"},
		{&mine, theirs, "BENCH x/p ours=2.00 peer=1.00 unit=s ratio=2.00"},
		{nil, f("p", 1), "BENCH x/p ours=- peer=1.00 unit=s ratio=-"},
		{&figure{}, f("p", 1), "BENCH x/p ours=0 peer=1.00 unit=s ratio=-"},
	} {
		if got := line(c.mine, c.peer); got != c.want {
			t.Errorf("got  %s\nwant %s", got, c.want)
		}
	}
}

func TestMarkdown(t *testing.T) {
	r := &report{about: []string{"a machine"}, rows: []string{"x"}, notes: []string{"y failed"}, cells: map[string]map[string]figure{
		"x": {ours: {value: 1, unit: "s"}, "kube-proxy-ipvs": {value: 900, unit: "s", exceeded: true}},
	}}
	want := "# Benchmarks\n\nWritten by `make bench`; [what is measured, and how](../CONTRIBUTING.md#benchmarks).\n\n- a machine\n\n" +
		"| | unit | longshore | kube-proxy-ipvs |\n|---|---|---:|---:|\n| x | s | 1.00 | >900 |\n\nWhat failed or was left out:\n\n- y failed\n"
	if diff := cmp.Diff(want, r.markdown()); diff != "" {
		t.Error(diff)
	}
}

func TestParseTable(t *testing.T) {
	// As Linux 6.1 writes it.
	const text = `IP Virtual Server version 1.2.1 (size=4096)
Prot LocalAddress:Port Scheduler Flags
  -> RemoteAddress:Port Forward Weight ActiveConn InActConn
UDP  0A600001:0050 rr  
  -> 0AC00009:1F90      Masq    1      0          0         
TCP  0A601000:0050 rr  
  -> 0AF40202:1F90      Masq    1      0          0         
  -> 0AF40203:1F90      Masq    1      2          3         
TCP  0A601001:0050 wlc persistent 10800 FFFFFFFF
TCP  [fd96:0000:0000:0000:0000:0000:0000:0001]:0050 rr  
  -> [fd44:0000:0000:0000:0000:0000:0000:0001]:1F90      Masq    1      0          0         
FWM  00000007 rr  
  -> 0AF40204:0000      Masq    1      0          0         
`
	want := map[netip.AddrPort][]netip.AddrPort{
		netip.MustParseAddrPort("10.96.16.0:80"): {netip.MustParseAddrPort("10.244.2.2:8080"), netip.MustParseAddrPort("10.244.2.3:8080")},
		netip.MustParseAddrPort("10.96.16.1:80"): {},
	}
	got, err := parseTable(text)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
		t.Error(diff)
	}
	if _, err := parseTable("TCP  0A60100Z:0050 rr\n"); err == nil {
		t.Error("a wrong address is no error")
	}
}

func TestParseProc(t *testing.T) {
	got, err := parseStat("42 (kube proxy) S 1 42 42 0 -1 4194560 900 10 0 0 150 50 20 5 20 0 9 0 100 1 2 3")
	if err != nil || got != 2250*time.Millisecond {
		t.Errorf("the time of a process is %v, %v, want 2.25s", got, err)
	}
	metrics := parseMetrics([]byte("# HELP a\na{x=\"1 2\"} 3\na{x=\"2\"} 4\nb 1.5e+06\n"))
	if diff := cmp.Diff(map[string]float64{"a": 7, "b": 1.5e6}, metrics); diff != "" {
		t.Error(diff)
	}
}

func TestCountRequests(t *testing.T) {
	message := func(length int, flags uint16) []byte {
		b := make([]byte, (length+3)&^3)
		binary.NativeEndian.PutUint32(b, uint32(length))
		binary.NativeEndian.PutUint16(b[6:], flags)
		return b
	}
	for _, c := range []struct {
		packet []byte
		want   int
	}{
		{nil, 0}, {message(16, 1), 1}, {append(message(21, 5), message(36, 1)...), 2},
		{append(message(20, 2), message(20, 1)...), 1}, // an answer
		{message(20, 1)[:18], 1},                       // cut off
	} {
		if got := countRequests(c.packet); got != c.want {
			t.Errorf("%d requests in %d bytes, want %d", got, len(c.packet), c.want)
		}
	}
}

func TestPlan(t *testing.T) {
	for _, c := range []struct {
		sizes, only string
		want        map[int][]string
	}{
		{"", "coldstart,rolling", map[int][]string{100: {rolling}, 1000: {coldstart}, 3000: {coldstart}, 10000: {coldstart}}},
		{"3000,50", "change,idle,rolling", map[int][]string{50: {change, rolling}, 3000: {change, idle}}},
	} {
		got, err := plan(c.sizes, c.only)
		if err != nil {
			t.Error(err)
		}
		if diff := cmp.Diff(c.want, got); diff != "" {
			t.Errorf("sizes %q, only %q: %s", c.sizes, c.only, diff)
		}
	}
	for _, c := range [][2]string{{"0", ""}, {"x", ""}, {"", "everything"}} {
		if _, err := plan(c[0], c[1]); err == nil {
			t.Errorf("sizes %q, only %q are no error", c[0], c[1])
		}
	}
}

// The example of kube-proxy's own comments.
func TestHashed(t *testing.T) {
	if got, want := hashed("ns1/svc1/tcp/p80__10.180.0.1/80"), "5OJB2KTY-ns1/svc1/tcp/p80__10.180.0.1/80"; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}
