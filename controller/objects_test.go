package controller

import (
	"fmt"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/longshore-lb/longshore/announcer/bgp"
	"github.com/longshore-lb/longshore/config/v1beta2"
)

// putUnchecked puts an object that is wrong, as the API server may have it from before its definition had rules.
func putUnchecked(t *testing.T, inbox *Inbox, text string) {
	t.Helper()
	o, _, err := strict.Decode([]byte(text), nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	o.(Object).SetNamespace("default")
	inbox.Put(o.(Object))
}

// TestAgentCommunities follows what is advertised while the names of communities come, change and go.
func TestAgentCommunities(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, inbox := newMachine(t, "n1"), NewInbox()
		a := m.start(inbox, nil)
		defer a.stop()
		site(t, inbox)
		putAll(t, inbox, service("web", "192.0.2.1", 80, "")+"---"+endpoints("web", true))
		inbox.Synced()
		m.happened()

		expect := func(what string, communities []string, events ...string) {
			t.Helper()
			m.expect(what, events...)
			if diff := cmp.Diff(communities, m.speaker.Routes[0].Communities); diff != "" {
				t.Errorf("%s: communities (-want +got):\n%s", what, diff)
			}
		}
		names := func(object, born, aliases string) string {
			return fmt.Sprintf("apiVersion: metallb.io/v1beta1\nkind: Community\nmetadata: {name: %s, creationTimestamp: %q}\nspec: {communities: [%s]}\n", object, born, aliases)
		}
		advertisement := func(communities string) string {
			return "apiVersion: metallb.io/v1beta1\nkind: BGPAdvertisement\nmetadata: {name: tor}\nspec: {communities: [" + communities + "]}\n"
		}
		const unknown = `Warning event on default/tor: ConfigurationRefused: BGPAdvertisement default/tor: spec.communities[0]: "site": ` +
			`no Community object has this name, and it is neither a:b nor large:a:b:c`
		putAll(t, inbox, advertisement("site"))
		expect("nobody has this name: it stays as it was", nil, unknown)
		putAll(t, inbox, names("ours", "2026-01-02T00:00:00Z", `{name: site, value: "64512:1"}`))
		const again = "advertise: 192.0.2.1/32 to tor"
		expect("somebody has it", []string{"64512:1"}, again)
		putAll(t, inbox, names("ours", "2026-01-02T00:00:00Z", `{name: site, value: "64512:2"}`))
		expect("it is another community", []string{"64512:2"}, again)
		putUnchecked(t, inbox, names("ours", "2026-01-02T00:00:00Z", `{name: site, value: "64512"}`))
		expect("a wrong one", []string{"64512:2"}, `Warning event on default/ours: ConfigurationRefused: `+
			`Community default/ours: spec.communities[0].value: "64512": neither a:b nor large:a:b:c`)
		putAll(t, inbox, names("a-younger-one", "2026-01-03T00:00:00Z", `{name: other, value: "64512:7"}, {name: site, value: "64512:8"}`))
		expect("a second object has the name", []string{"64512:2"}, `Warning event on default/a-younger-one: ConfigurationRefused: `+
			`Community default/a-younger-one: spec.communities[1].name: "site": is a name in Community default/ours already`)
		inbox.Remove(objects(t, names("ours", "2026-01-02T00:00:00Z", ""))[0])
		expect("the first object goes", []string{"64512:8"}, again)
		inbox.Remove(objects(t, names("a-younger-one", "2026-01-03T00:00:00Z", ""))[0])
		expect("the last one goes: what it said stays", []string{"64512:8"}, unknown)
		inbox.Remove(objects(t, advertisement(""))[0])
		m.expect("the advertisement goes", "advertise: ")
		putAll(t, inbox, advertisement("site"))
		m.expect("it comes back and is a new one", unknown)
	})
}

// TestAgentLastGood edits objects into wrong ones: sessions and addresses stay.
func TestAgentLastGood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, inbox := newMachine(t, "n1"), NewInbox()
		a := m.start(inbox, nil)
		defer a.stop()
		site(t, inbox)
		putAll(t, inbox, service("web", "192.0.2.1", 80, "")+"---"+endpoints("web", true))
		inbox.Synced()
		m.happened()
		before := m.speaker
		putUnchecked(t, inbox, `
apiVersion: metallb.io/v1beta2
kind: BGPPeer
metadata: {name: tor}
spec: {myASN: 64512, peerASN: 64513, peerAddress: tor.example}
`)
		m.expect("a wrong peer",
			`Warning event on default/tor: ConfigurationRefused: BGPPeer default/tor: spec.peerAddress: "tor.example": "tor.example" is not an IP address`)
		putUnchecked(t, inbox, `
apiVersion: metallb.io/v1beta1
kind: L2Advertisement
metadata: {name: lan}
spec: {interfaces: [eth 0]}
`)
		m.expect("a wrong advertisement",
			`Warning event on default/lan: ConfigurationRefused: L2Advertisement default/lan: spec.interfaces[0]: "eth 0": not the name of a link`)
		time.Sleep(time.Minute)
		if diff := cmp.Diff(before, m.speaker, cmpopts.EquateComparable(bgp.Peer{}, netip.Addr{}, netip.Prefix{})); diff != "" {
			t.Errorf("the speaker (-before +after):\n%s", diff)
		}
		if fmt.Sprint(m.answers) != "[{192.0.2.1 [] false}]" {
			t.Errorf("answers for %v", m.answers)
		}
		inbox.Remove(&v1beta2.BGPPeer{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "tor"}})
		m.expect("it goes", "advertise: ")
	})
}

// TestAgentGracefulShutdown excludes the node from load balancers: its routes stay for a while, with another node in sight.
func TestAgentGracefulShutdown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, inbox := newMachine(t, "n1"), NewInbox()
		a := m.start(inbox, nil)
		defer a.stop()
		site(t, inbox)
		putAll(t, inbox, service("web", "192.0.2.1", 80, "")+"---"+endpoints("web", true))
		inbox.Synced()
		m.happened()
		if c := m.speaker; c.Shutdown || c.ShutdownTime != 5*time.Second {
			t.Errorf("at the start: shutdown %t, %v", c.Shutdown, c.ShutdownTime)
		}
		exclude := func() {
			n := StandaloneNode("n1", addrs("172.31.0.11", "fd31::11"))
			n.Labels = map[string]string{"node.kubernetes.io/exclude-from-external-load-balancers": ""}
			inbox.Put(n)
		}
		exclude()
		m.expect("excluded", "answer for: ")
		if !m.speaker.Shutdown {
			t.Error("peers are not asked to prefer other routes")
		}
		time.Sleep(4 * time.Second)
		exclude()
		m.expect("4 s later")
		time.Sleep(time.Second)
		m.expect("5 s later", "advertise: ")
		if m.speaker.Shutdown {
			t.Error("it does not end")
		}
		inbox.Put(StandaloneNode("n1", addrs("172.31.0.11", "fd31::11")))
		m.expect("back", "answer for: 192.0.2.1", "advertise: 192.0.2.1/32 to tor",
			`Normal event on default/web: nodeAssigned: announcing 192.0.2.1 from node "n1" with protocol "layer2"`)
		exclude()
		time.Sleep(time.Second)
		m.expect("excluded again", "answer for: ")
		inbox.Put(StandaloneNode("n1", addrs("172.31.0.11", "fd31::11")))
		m.expect("back before it has left", "answer for: 192.0.2.1",
			`Normal event on default/web: nodeAssigned: announcing 192.0.2.1 from node "n1" with protocol "layer2"`)
		time.Sleep(time.Minute)
		m.expect("and it stays")
		if m.speaker.Shutdown {
			t.Error("peers are still asked to prefer other routes")
		}
	})
}

// TestAgentWarnings has a peer that is served, though not in all it says.
func TestAgentWarnings(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, inbox := newMachine(t, "n1"), NewInbox()
		a := m.start(inbox, nil)
		defer a.stop()
		inbox.Put(StandaloneNode("n1", addrs("172.31.0.11")))
		const peer = "apiVersion: metallb.io/v1beta2\nkind: BGPPeer\nmetadata: {name: tor, annotations: {longshore.dev/ttl-security-hops: \"2\"}}\n" +
			"spec: {myASN: 64512, dynamicASN: external, peerAddress: 172.31.0.1, holdTime: 0s, vrf: red}\n"
		putAll(t, inbox, peer)
		inbox.Synced()
		const warning = `BGPPeer default/tor: spec.holdTime: "0s": the speaker cannot offer 0; it offers 18h12m15s, and takes 0 if the peer offers that`
		m.expect("it comes", "Warning event on default/tor: Unsupported: "+warning)
		putAll(t, inbox, peer)
		m.expect("it comes again")
		want := []bgp.Peer{{
			Name: "tor", MyASN: 64512, AnyASN: true, Address: netip.MustParseAddr("172.31.0.1"), Port: 179, HoldTime: 65535 * time.Second,
			KeepaliveTime: 21845 * time.Second, Device: "red", TTLSecurityHops: 2,
		}}
		if diff := cmp.Diff(want, m.speaker.Peers, cmpopts.EquateComparable(bgp.Peer{})); diff != "" {
			t.Errorf("peers (-want +got):\n%s", diff)
		}
		if status, err := a.Status(t.Context()); err != nil || len(status.Problems) != 1 || status.Problems[0] != warning {
			t.Errorf("problems %q (%v)", status.Problems, err)
		}
	})
}

// lastReports keeps what was said last, in words.
type lastReports struct{ said []string }

func (r *lastReports) Set(all []Object) {
	r.said = nil
	for _, o := range all {
		_, status := reportOf(o)
		r.said = append(r.said, fmt.Sprintf("%T %v", o, status))
	}
}

// TestAgentReports follows what an agent says of itself.
func TestAgentReports(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, inbox, reports := newMachine(t, "n1"), NewInbox(), &lastReports{}
		m.options = func(o *AgentOptions) { o.Reports = reports }
		a := m.start(inbox, nil)
		defer a.stop()
		site(t, inbox)
		inbox.Synced()
		expect := func(what string, want ...string) {
			t.Helper()
			synctest.Wait()
			if diff := cmp.Diff(want, reports.said); diff != "" {
				t.Errorf("%s (-want +got):\n%s", what, diff)
			}
		}
		const (
			valid = "*v1beta1.ConfigurationState map[lastError: result:Valid]"
			l2    = "*v1beta1.ServiceL2Status map[interfaces:[] node:n1 serviceName:web serviceNamespace:default]"
			bgp   = "*v1beta1.ServiceBGPStatus map[node:n1 peers:[tor] serviceName:web serviceNamespace:default]"
		)
		expect("nothing to announce", valid)
		putAll(t, inbox, service("web", "192.0.2.1", 80, "")+"---"+endpoints("web", true))
		expect("an address", valid, l2, bgp)
		putUnchecked(t, inbox, "apiVersion: metallb.io/v1beta2\nkind: BGPPeer\nmetadata: {name: other}\nspec: {peerASN: 64513, peerAddress: 172.31.0.2}\n")
		expect("a wrong peer", "*v1beta1.ConfigurationState map[lastError:BGPPeer default/other: spec.myASN: must be set result:Invalid]", l2, bgp)
		inbox.Remove(&v1beta2.BGPPeer{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "other"}})
		putAll(t, inbox, endpoints("web", false))
		expect("no endpoint", valid)
	})
}
