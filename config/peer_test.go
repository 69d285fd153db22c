package config_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/longshore-lb/longshore/config"
	"github.com/longshore-lb/longshore/config/v1beta2"
)

func seconds(n float64) *metav1.Duration {
	return &metav1.Duration{Duration: time.Duration(n * float64(time.Second))}
}

func TestParsePeerErrors(t *testing.T) {
	type spec = v1beta2.BGPPeerSpec
	for _, test := range []struct {
		name string
		edit func(*spec) // of a good peer
		want []string    // lines, each after "BGPPeer longshore-system/tor: "
	}{
		{"nothing", func(s *spec) { *s = spec{} }, []string{
			`spec.myASN: must be set`, `spec.peerASN: must be set`, `spec.peerAddress: must be set`}},
		{"dynamic AS", func(s *spec) { s.PeerASN, s.DynamicASN = 0, "any" }, []string{`spec.dynamicASN: "any": neither internal nor external`}},
		{"two AS", func(s *spec) { s.DynamicASN = "internal" }, []string{`spec.peerASN: 64513: excludes dynamicASN`}},
		{"multihop inside, dynamic AS", func(s *spec) { s.PeerASN, s.DynamicASN, s.EBGPMultiHop = 0, "internal", true }, []string{
			`spec.ebgpMultiHop: true: the peer is internal: AS 64512`}},
		{"unnumbered", func(s *spec) {
			s.PeerAddress, s.Interface, s.SourceAddress, s.EBGPMultiHop = "", "eth/0", "192.0.2.7", true
		}, []string{
			`spec.interface: "eth/0": not the name of a link`,
			`spec.sourceAddress: "192.0.2.7": excludes interface, whose link-local address it is`,
			`spec.ebgpMultiHop: true: excludes interface`}},
		{"two ways", func(s *spec) { s.Interface = "eth0" }, []string{`spec.peerAddress: "192.0.2.1": excludes interface`}},
		{"VRF", func(s *spec) { s.VRF = "red blue" }, []string{`spec.vrf: "red blue": not the name of a link`}},
		{"addresses", func(s *spec) { s.PeerAddress, s.SourceAddress, s.RouterID = "tor.example", "192.0.2", "1" }, []string{
			`spec.peerAddress: "tor.example": "tor.example" is not an IP address`,
			`spec.sourceAddress: "192.0.2": "192.0.2" is not an IP address`,
			`spec.routerID: "1": "1" is not an IP address`}},
		{"not hosts", func(s *spec) { s.PeerAddress, s.SourceAddress, s.RouterID = "224.0.0.5", "::", "0.0.0.0" }, []string{
			`spec.peerAddress: "224.0.0.5": not the address of a host`,
			`spec.sourceAddress: "::": not the address of a host`,
			`spec.routerID: "0.0.0.0": not the address of a host`}},
		{"families", func(s *spec) { s.SourceAddress, s.RouterID = "fd00::1", "fd00::1" }, []string{
			`spec.sourceAddress: "fd00::1": not of the family of peerAddress 192.0.2.1`,
			`spec.routerID: "fd00::1": must be an IPv4 address`}},
		{"keepalives without hold time", func(s *spec) { s.HoldTime, s.KeepaliveTime = seconds(0), seconds(30) }, []string{
			`spec.keepaliveTime: "30s": must be 0s or not set with holdTime 0s`}},
		{"hold time short", func(s *spec) { s.HoldTime = seconds(2) }, []string{`spec.holdTime: "2s": must be between 3s and 18h12m15s`}},
		{"hold time long", func(s *spec) { s.HoldTime = seconds(65536) }, []string{
			`spec.holdTime: "18h12m16s": must be between 3s and 18h12m15s`}},
		{"hold time with a fraction", func(s *spec) { s.HoldTime = seconds(3.5) }, []string{`spec.holdTime: "3.5s": must be whole seconds`}},
		{"keepalive longer than hold", func(s *spec) { s.HoldTime, s.KeepaliveTime = seconds(9), seconds(10) }, []string{
			`spec.keepaliveTime: "10s": must be between 1s and 9s`}},
		{"keepalive zero", func(s *spec) { s.KeepaliveTime = seconds(0) }, []string{`spec.keepaliveTime: "0s": must be between 1s and 1m30s`}},
		{"connect time", func(s *spec) { s.ConnectTime = seconds(0.5) }, []string{
			`spec.connectTime: "500ms": must be between 1s and 18h12m15s`}},
		{"two passwords", func(s *spec) { s.Password, s.PasswordSecret.Name = "secret", "tor" }, []string{
			`spec.passwordSecret.name: "tor": excludes password`}},
		{"long password", func(s *spec) { s.Password = strings.Repeat("x", 81) }, []string{
			`spec.password: "(not shown)": has 81 bytes, TCP MD5 takes 80`}},
		{"foreign secret", func(s *spec) { s.PasswordSecret = v1beta2.SecretReference{Name: "tor", Namespace: "other"} }, []string{
			`spec.passwordSecret.namespace: "other": must be the peer's own, "longshore-system"`}},
		{"secret without name", func(s *spec) { s.PasswordSecret.Namespace = "longshore-system" }, []string{
			`spec.passwordSecret.name: must be set`}},
		{"multihop inside", func(s *spec) { s.LocalASN, s.EBGPMultiHop = 64513, true }, []string{
			`spec.ebgpMultiHop: true: the peer is internal: AS 64513`}},
		{"one family and two", func(s *spec) { s.DisableMP, s.DualStackAddressFamily = true, true }, []string{
			`spec.disableMP: true: excludes dualStackAddressFamily true`}},
		{"selector", func(s *spec) { s.NodeSelectors = []metav1.LabelSelector{badSelector} }, []string{
			`spec.nodeSelectors[0]: "{\"matchExpressions\":[{\"key\":\"zone\",\"operator\":\"Near\"}]}": "Near" is not a valid label selector operator`}},
	} {
		t.Run(test.name, func(t *testing.T) {
			from := &v1beta2.BGPPeer{ObjectMeta: meta("tor"), Spec: spec{MyASN: 64512, PeerASN: 64513, PeerAddress: "192.0.2.1"}}
			test.edit(&from.Spec)
			_, err := config.ParsePeer(from)
			var want []string
			for _, line := range test.want {
				want = append(want, "BGPPeer longshore-system/tor: "+line)
			}
			if diff := cmp.Diff(strings.Join(want, "\n"), text(err)); diff != "" {
				t.Errorf("error (-want +got):\n%s", diff)
			}
		})
	}
}

func TestParsePeer(t *testing.T) {
	for _, test := range []struct {
		name string
		spec v1beta2.BGPPeerSpec
		want config.Peer
	}{
		{
			"inside, whatever our AS is, and never missed",
			v1beta2.BGPPeerSpec{MyASN: 64512, LocalASN: 64513, DynamicASN: "internal", PeerAddress: "192.0.2.1", HoldTime: seconds(0), KeepaliveTime: seconds(0), DisableMP: true},
			config.Peer{
				Name: "tor", MyASN: 64512, LocalASN: 64513, PeerASN: 64513, Address: netip.MustParseAddr("192.0.2.1"),
				Port: 179, HoldTime: 65535 * time.Second, KeepaliveTime: 21845 * time.Second,
				Warnings: []string{
					`BGPPeer longshore-system/tor: spec.disableMP: true: the session still offers both families (RFC 4760); only routes of peerAddress's own are sent`,
					`BGPPeer longshore-system/tor: spec.holdTime: "0s": the speaker cannot offer 0; it offers 18h12m15s, and takes 0 if the peer offers that`,
				},
			},
		},
		{
			"unnumbered",
			v1beta2.BGPPeerSpec{MyASN: 64512, PeerASN: 64513, Interface: "eth0"},
			config.Peer{
				Name: "tor", MyASN: 64512, PeerASN: 64513, Interface: "eth0", DualStack: true,
				Port: 179, HoldTime: 90 * time.Second, KeepaliveTime: 30 * time.Second,
			},
		},
		{
			"outside, in a VRF",
			v1beta2.BGPPeerSpec{MyASN: 64512, DynamicASN: "external", PeerAddress: "192.0.2.1", VRF: "red"},
			config.Peer{
				Name: "tor", MyASN: 64512, AnyASN: true, Address: netip.MustParseAddr("192.0.2.1"), VRF: "red",
				Port: 179, HoldTime: 90 * time.Second, KeepaliveTime: 30 * time.Second,
			},
		},
		{
			"defaults",
			v1beta2.BGPPeerSpec{MyASN: 64512, PeerASN: 64513, PeerAddress: "192.0.2.1"},
			config.Peer{
				Name: "tor", MyASN: 64512, PeerASN: 64513, Address: netip.MustParseAddr("192.0.2.1"),
				Port: 179, HoldTime: 90 * time.Second, KeepaliveTime: 30 * time.Second,
			},
		},
		{
			"everything",
			v1beta2.BGPPeerSpec{
				MyASN: 4200000000, PeerASN: 4294967295, LocalASN: 65000, PeerAddress: "fd00::1", SourceAddress: "fd00::2",
				PeerPort: 1790, HoldTime: seconds(3), ConnectTime: seconds(5), RouterID: "10.0.0.1",
				NodeSelectors:  []metav1.LabelSelector{selector("rack", "1"), selector("rack", "2")},
				PasswordSecret: v1beta2.SecretReference{Name: "tor", Namespace: "longshore-system"},
				EBGPMultiHop:   true, EnableGracefulRestart: true, DualStackAddressFamily: true, BFDProfile: "fast",
			},
			config.Peer{
				Name: "tor", MyASN: 4200000000, PeerASN: 4294967295, LocalASN: 65000,
				Address: netip.MustParseAddr("fd00::1"), Source: netip.MustParseAddr("fd00::2"), Port: 1790,
				HoldTime: 3 * time.Second, KeepaliveTime: time.Second, ConnectTime: 5 * time.Second,
				RouterID: netip.MustParseAddr("10.0.0.1"), PasswordSecret: "tor",
				EBGPMultiHop: true, GracefulRestart: true, DualStack: true, BFDProfile: "fast",
			},
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := config.ParsePeer(&v1beta2.BGPPeer{ObjectMeta: meta("tor"), Spec: test.spec})
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b }), cmpopts.IgnoreUnexported(config.Peer{})); diff != "" {
				t.Errorf("peer (-want +got):\n%s", diff)
			}
			all := len(test.spec.NodeSelectors) == 0
			if got.SelectsNode(nil) != all || !got.SelectsNode(labels.Set{"rack": "2"}) || got.SelectsNode(labels.Set{"rack": "3"}) != all {
				t.Errorf("selects the wrong nodes: %v", test.spec.NodeSelectors)
			}
		})
	}
}

func TestParsePeerTTLSecurity(t *testing.T) {
	for value, want := range map[string]string{
		"1": "", "254": "",
		"0":   `BGPPeer longshore-system/tor: annotation longshore.dev/ttl-security-hops: "0": must be a number between 1 and 254`,
		"255": `BGPPeer longshore-system/tor: annotation longshore.dev/ttl-security-hops: "255": must be a number between 1 and 254`,
		"":    `BGPPeer longshore-system/tor: annotation longshore.dev/ttl-security-hops: "": must be a number between 1 and 254`,
	} {
		from := &v1beta2.BGPPeer{
			ObjectMeta: annotated(meta("tor"), config.TTLSecurityAnnotation, value),
			Spec:       v1beta2.BGPPeerSpec{MyASN: 64512, PeerASN: 64513, PeerAddress: "192.0.2.1"},
		}
		got, err := config.ParsePeer(from)
		if text(err) != want || err == nil && fmt.Sprint(got.TTLSecurityHops) != value {
			t.Errorf("%q: %d hops, error %q, want %q", value, got.TTLSecurityHops, text(err), want)
		}
		from.Spec.EBGPMultiHop = true
		if _, err = config.ParsePeer(from); want == "" && text(err) != `BGPPeer longshore-system/tor: spec.ebgpMultiHop: true: excludes annotation longshore.dev/ttl-security-hops` {
			t.Errorf("%q and multihop: error %q", value, text(err))
		}
	}
}
