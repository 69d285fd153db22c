package controller

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/longshore-lb/longshore/announcer/bfd"
	"github.com/longshore-lb/longshore/announcer/bgp"
	"github.com/longshore-lb/longshore/config/v1beta1"
)

// TestAgentBFDProfiles: a peer is watched as its profile says. Without the profile there is no new session, and one that there is stays as it is.
func TestAgentBFDProfiles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, inbox := newMachine(t, "n1"), NewInbox()
		a := m.start(inbox, nil)
		defer a.stop()
		site(t, inbox)
		inbox.Synced()
		m.happened()
		put := func(text string) Object {
			o := objects(t, text)[0]
			inbox.Put(o)
			synctest.Wait()
			return o
		}
		const fast = "apiVersion: metallb.io/v1beta1\nkind: BFDProfile\nmetadata: {name: fast, annotations: {longshore.dev/strict: 'true'}}\n"
		check := func(when string, problems []string, want ...bgp.BFD) {
			t.Helper()
			var got []bgp.BFD
			for _, p := range m.speaker.Peers {
				got = append(got, p.BFD)
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("%s: paths (-want +got):\n%s", when, diff)
			}
			status, err := a.Status(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(problems, status.Problems); diff != "" {
				t.Errorf("%s: problems (-want +got):\n%s", when, diff)
			}
		}
		watched := bgp.BFD{Transmit: 300 * time.Millisecond, Receive: 50 * time.Millisecond, Multiplier: 3, MinimumTTL: 254, Strict: true}
		const missing = `BGPPeer default/new: spec.bfdProfile: "fast": no BFDProfile in use has this name`

		peer := put("apiVersion: metallb.io/v1beta2\nkind: BGPPeer\nmetadata: {name: new}\nspec: {myASN: 64512, peerASN: 64513, peerAddress: 172.31.0.2, bfdProfile: fast}")
		m.expect("without the profile", "Warning event on default/new: ConfigurationRefused: "+missing)
		check("without the profile", []string{missing}, bgp.BFD{})

		profile := put(fast + "spec: {receiveInterval: 50}")
		m.expect("with the profile")
		check("with the profile", []string{}, watched, bgp.BFD{})

		const wrong = `BFDProfile default/fast: spec.receiveInterval: 5: must be between 10 and 60000`
		edited := profile.DeepCopyObject().(*v1beta1.BFDProfile)
		*edited.Spec.ReceiveInterval = 5
		inbox.Put(edited)
		synctest.Wait()
		m.expect("with a wrong profile", "Warning event on default/fast: ConfigurationRefused: "+wrong)
		check("with a wrong profile", []string{wrong}, watched, bgp.BFD{})

		inbox.Remove(profile)
		synctest.Wait()
		m.expect("after the profile", "Warning event on default/new: ConfigurationRefused: "+missing)
		check("after the profile", []string{missing}, watched, bgp.BFD{})

		const echo = `BFDProfile default/fast: spec.echoMode: true: longshore sends no echo packets; control packets alone watch the path`
		put(fast + "spec: {receiveInterval: 100, echoMode: true, passiveMode: true}")
		m.expect("with echo", "Warning event on default/fast: EchoNotSent: "+echo)
		watched.Receive, watched.Passive = 100*time.Millisecond, true
		check("with echo", []string{echo}, watched, bgp.BFD{})

		inbox.Remove(peer)
		synctest.Wait()
		check("without the peer", []string{echo}, bgp.BFD{})
	})
}

func TestBFDStatus(t *testing.T) {
	for _, test := range []struct {
		name   string
		status *bfd.Status
		want   string
	}{
		{"none", nil, "-"},
		{"up", &bfd.Status{State: bfd.Up, Remote: bfd.Up}, "up"},
		{"silence", &bfd.Status{State: bfd.Down, Remote: bfd.Down, Diagnostic: bfd.DetectionTimeExpired}, "down: control detection time expired"},
		{"switched off", &bfd.Status{State: bfd.Down, Remote: bfd.AdminDown, Diagnostic: bfd.NeighborDown}, "down: the peer has switched it off"},
		{"deaf", &bfd.Status{State: bfd.Down, Remote: bfd.Down, Problem: "cannot hear BFD: port"}, "down: cannot hear BFD: port"},
	} {
		if got := bfdStatus(test.status).text(); got != test.want {
			t.Errorf("%s: %q, want %q", test.name, got, test.want)
		}
	}
}
