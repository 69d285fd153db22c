package controller

import (
	"bytes"
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// TestStatusWrite compares what people and what programs get to see with testdata/status.
func TestStatusWrite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // so that time stands still
		full := Status{
			Node:  "n1",
			Ready: false,
			VIPs: []VIPStatus{
				{Address: ip("192.0.2.1"), Service: "default/web", Pool: "red", Owner: "n1", Interfaces: []string{"eth0", "eth1"},
					Prefixes: []string{"192.0.2.0/24", "192.0.2.1/32"}, Peers: []string{"tor-a", "tor-b"}},
				{Address: ip("192.0.2.2"), Service: "default/api", Pool: "red", Owner: "n2", Prefixes: []string{"192.0.2.2/32"}},
				{Address: ip("192.0.2.3"), Service: "shop/cart", Pool: "red", Reason: "no ready endpoint"},
				{Address: ip("2001:db8::1"), Service: "default/web", Reason: "in no IPAddressPool"},
			},
			Sessions: []SessionStatus{
				{Peer: "tor-a", Address: ip("172.31.0.1"), State: "established", Since: time.Now().Add(-90*time.Minute - 400*time.Millisecond), Advertised: 2,
					BFD: &BFDStatus{State: "up", Since: time.Now().Add(-time.Hour), Remote: "up", Transmit: 300, DetectionTime: 900}},
				{Peer: "tor-b", Address: ip("fe80::1%eth0"), State: "active", Reason: "connection refused",
					BFD: &BFDStatus{State: "down", Reason: "control detection time expired", Remote: "down", MultiHop: true, Transmit: 1000}},
				{Peer: "tor-c", Address: ip("172.31.0.3"), State: "idle", Reason: "BFD: neighbor signaled session down"},
			},
			Problems: []string{"Service default/db: has no address yet", "add virtual server 192.0.2.4:80/TCP: no space left on device"},
		}
		empty := Status{Node: "n1", Ready: true, VIPs: []VIPStatus{}, Sessions: []SessionStatus{}, Problems: []string{}}
		for name, s := range map[string]Status{"full": full, "empty": empty} {
			var text bytes.Buffer
			if err := s.Write(&text); err != nil {
				t.Fatal(err)
			}
			golden(t, name+".txt", text.Bytes())
			content, err := json.MarshalIndent(s, "", "  ")
			if err != nil {
				t.Fatal(err)
			}
			golden(t, name+".json", append(content, '\n'))
			var back Status
			if err := json.Unmarshal(content, &back); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(s, back, byValue); diff != "" {
				t.Errorf("%s, read back (-want +got):\n%s", name, diff)
			}
		}
	})
}

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	file := filepath.Join("testdata", "status", name)
	if *update {
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("%s (-want +got):\n%s", name, diff)
	}
}

// TestStatusOfAgent asks a running agent.
func TestStatusOfAgent(t *testing.T) {
	var got Status
	synctest.Test(t, func(t *testing.T) {
		m, inbox := newMachine(t, "n1"), NewInbox()
		a := m.start(inbox, nil)
		defer a.stop()
		site(t, inbox)
		putAll(t, inbox, service("web", "192.0.2.1", 80, "")+"---"+endpoints("web", true)+"---"+service("idle", "192.0.2.2", 80, "")+"---\n"+wish("db", 80, ""))
		inbox.Synced()
		synctest.Wait()
		var err error
		if got, err = a.Status(t.Context()); err != nil {
			t.Fatal(err)
		}
		got.Sessions[0].Since = time.Time{}
	})
	want := Status{
		Node: "n1", Ready: true,
		VIPs: []VIPStatus{
			{Address: ip("192.0.2.1"), Service: "default/web", Pool: "red", Owner: "n1", Prefixes: []string{"192.0.2.1/32"}, Peers: []string{"tor"}},
			{Address: ip("192.0.2.2"), Service: "default/idle", Pool: "red", Reason: "no ready endpoint"},
		},
		Sessions: []SessionStatus{{Peer: "tor", Address: netip.MustParseAddr("172.31.0.1"), State: "established", Advertised: 1}},
		Problems: []string{"Service default/db: has no address yet"},
	}
	if diff := cmp.Diff(want, got, byValue); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}
