package members

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/longshore-lb/longshore/announcer"
)

var byValue = cmp.Comparer(func(a, b netip.Addr) bool { return a == b })

func TestEncode(t *testing.T) {
	for _, a := range []announcer.Agent{
		{Version: 1, Claims: map[netip.Addr]uint64{}},
		{Version: 1 << 60, Able: true, Links: []announcer.Link{{Name: "eth0", IPv4: true}, {Name: "eth1", IPv6: true}, {Name: "wlan0", IPv4: true, IPv6: true}, {Name: "x"}},
			Claims: map[netip.Addr]uint64{
				netip.MustParseAddr("192.0.2.1"): 1, netip.MustParseAddr("192.0.2.200"): 1 << 63, netip.MustParseAddr("10.0.0.1"): 300,
				netip.MustParseAddr("fd00::1"): 2, netip.MustParseAddr("fd00::1:0:0:0:1"): 3, netip.MustParseAddr("c000:0201::"): 4, // as 192.0.2.1 begins
			}},
	} {
		message := encode("node-1", a)
		node, got, err := decode(message)
		if err != nil || node != "node-1" {
			t.Fatalf("%v: node %q, %v", a, node, err)
		}
		if diff := cmp.Diff(a, got, byValue); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
		for n := range message {
			if _, _, err := decode(message[:n]); err == nil {
				t.Errorf("the first %d of %d bytes were accepted", n, len(message))
			}
		}
		if _, _, err := decode(append(message, 0)); err == nil {
			t.Error("a byte too many was accepted")
		}
	}
	if _, _, err := decode([]byte{2, 1, 'a', 1, 0, 0, 0}); err == nil || err.Error() != "message of encoding 2, this agent knows 1" {
		t.Errorf("a message of another version: %v", err)
	}
}

func TestEncodeSize(t *testing.T) {
	a := announcer.Agent{Version: 1, Claims: map[netip.Addr]uint64{}}
	for i := range 5000 {
		a.Claims[netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)})] = uint64(i)
	}
	if n := len(encode("node-1", a)); n > 5000*5 {
		t.Errorf("5000 claims are %d bytes", n)
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(encode("node-1", announcer.Agent{Version: 7, Able: true, Links: []announcer.Link{{Name: "eth0", IPv4: true, IPv6: true}},
		Claims: map[netip.Addr]uint64{netip.MustParseAddr("192.0.2.1"): 1, netip.MustParseAddr("fd00::1"): 2}}))
	f.Fuzz(func(t *testing.T, message []byte) {
		node, a, err := decode(message)
		if err != nil {
			return
		}
		if again, b, err := decode(encode(node, a)); err != nil || again != node || fmt.Sprint(a) != fmt.Sprint(b) {
			t.Errorf("%v became %v, %v", a, b, err)
		}
	})
}
