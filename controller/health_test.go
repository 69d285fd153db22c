package controller

import (
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/longshore-lb/longshore/ipvs"
)

// TestHealth walks through what may happen to an agent, in minutes since its start.
func TestHealth(t *testing.T) {
	start := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	at := func(minutes float64) time.Time { return start.Add(time.Duration(minutes * float64(time.Minute))) }
	var h health
	expect := func(minutes float64, what string, live, healthy bool) {
		t.Helper()
		if got := h.at(at(minutes)); got.live != live || got.healthy != healthy {
			t.Errorf("minute %v, %s: live %t, healthy %t; want %t, %t", minutes, what, got.live, got.healthy, live, healthy)
		}
	}
	expect(0, "just started", true, false)
	expect(100, "still waits for the first list of objects", true, false)
	h.queued(at(100))
	expect(101, "first pass", true, false)
	expect(102, "first pass does not end", false, false)
	h.passed()
	expect(102, "first pass ended, the kernel refused something", true, false)
	h.queued(at(102))
	h.applied(at(103))
	expect(103, "all is in the kernel", true, true)
	expect(200, "nothing happens", true, true)

	h.queued(at(200))
	expect(201.9, "a change is on its way", true, true)
	h.queued(at(201.9))
	expect(202, "the first of two has been for two minutes", false, false)
	h.applied(at(202))
	expect(202, "both are there", true, true)
	h.queued(at(210))
	expect(211, "the next one has its own two minutes", true, true)
	h.passed()
	expect(211, "the kernel refused it", true, true)
	h.queued(at(211.5))
	h.passed()
	expect(211.9, "and again", true, true)
	expect(212, "for two minutes", true, false)
	h.applied(at(213))
	expect(213, "no longer", true, true)

	h.nodeEligible(true)
	if got, want := h.at(at(220)), (healthNow{live: true, healthy: true, eligible: true, updated: at(213)}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	h.nodeEligible(false)
	expect(220, "the node goes", true, true)
	if h.at(at(220)).eligible {
		t.Error("the node is eligible still")
	}
}

func TestEligible(t *testing.T) {
	with := func(change func(*corev1.Node)) *corev1.Node {
		n := StandaloneNode("n1", nil)
		change(n)
		return n
	}
	for _, c := range []struct {
		what string
		node *corev1.Node
		want bool
	}{
		{"an ordinary node", with(func(*corev1.Node) {}), true},
		{"a node with a taint", with(func(n *corev1.Node) { n.Spec.Taints = []corev1.Taint{{Key: "dedicated"}} }), true},
		{"no node", nil, false},
		{"a node that is being deleted", with(func(n *corev1.Node) { n.DeletionTimestamp = &metav1.Time{Time: time.Now()} }), false},
		{"a node that the autoscaler will delete", with(func(n *corev1.Node) {
			n.Spec.Taints = []corev1.Taint{{Key: "dedicated"}, {Key: "ToBeDeletedByClusterAutoscaler", Effect: corev1.TaintEffectNoSchedule}}
		}), false},
	} {
		if got := eligible(c.node); got != c.want {
			t.Errorf("%s: eligible %t", c.what, got)
		}
	}
}

// TestHealthOfAgent asks a running agent whose kernel refuses, hangs and cannot be read, and whose node goes.
func TestHealthOfAgent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, inbox := newMachine(t, "n1"), NewInbox()
		a := m.start(inbox, nil)
		defer a.stop()
		handler := a.healthHandler()
		expect := func(what string, healthz, livez int, want, wantLive healthBody) {
			t.Helper()
			for path, w := range map[string]struct {
				code int
				body healthBody
			}{"/healthz": {healthz, want}, "/livez": {livez, wantLive}} {
				r := httptest.NewRecorder()
				handler.ServeHTTP(r, httptest.NewRequest(http.MethodGet, path, nil))
				var got healthBody
				if err := json.Unmarshal(r.Body.Bytes(), &got); err != nil {
					t.Fatalf("%s: %s: %v", path, r.Body, err)
				}
				w.body.CurrentTime = time.Now()
				if w.code == http.StatusOK {
					w.body.LastUpdated = time.Now()
				}
				if diff := cmp.Diff(w.body, got, cmpopts.EquateApproxTime(0)); diff != "" || r.Code != w.code {
					t.Errorf("%s: %s: %d, want %d (-want +got):\n%s", what, path, r.Code, w.code, diff)
				}
				if h := r.Header(); h.Get("Content-Type") != "application/json" || h.Get("X-Content-Type-Options") != "nosniff" {
					t.Errorf("%s: header %v", path, h)
				}
			}
		}
		yes, no := true, false
		up, dead := healthBody{Healthy: true}, healthBody{}
		good, node := healthBody{Healthy: true, NodeEligible: &yes}, healthBody{Healthy: true, NodeEligible: &no}
		var last time.Time
		bad := func() healthBody { return healthBody{NodeEligible: &yes, LastUpdated: last} }

		expect("nothing is known yet", 503, 200, healthBody{NodeEligible: &no}, up)
		site(t, inbox)
		putAll(t, inbox, service("web", "192.0.2.1", 80, "")+"---"+endpoints("web", true))
		inbox.Synced()
		synctest.Wait()
		expect("after the first pass", 200, 200, good, up)

		time.Sleep(time.Hour)
		last = time.Now()
		inbox.Put(StandaloneNode("n2", nil)) // so that a pass was made now
		synctest.Wait()
		m.set(func() { m.refuse = func(ipvs.Operation) error { return errors.New("no") } })
		putAll(t, inbox, service("web", "192.0.2.1", 81, ""))
		time.Sleep(healthTimeout - time.Second)
		expect("the kernel has refused something for not quite two minutes", 200, 200, good, up)
		time.Sleep(time.Second)
		synctest.Wait() // it is tried again just now
		expect("for two minutes", 503, 200, bad(), up)
		m.set(func() { m.refuse = nil })
		time.Sleep(retryAfter)
		synctest.Wait()
		expect("no longer", 200, 200, good, up)
		last = time.Now()

		wakes := make(chan struct{})
		m.set(func() { m.refuse = func(ipvs.Operation) error { <-wakes; return nil } })
		putAll(t, inbox, endpoints("web", false))
		time.Sleep(healthTimeout - time.Second)
		expect("the kernel has hung for not quite two minutes", 200, 200, good, up)
		time.Sleep(time.Second)
		dead.LastUpdated = last
		expect("for two minutes", 503, 503, bad(), dead)
		close(wakes)
		synctest.Wait()
		expect("no longer", 200, 200, good, up)

		cordoned := StandaloneNode("n1", addrs("172.31.0.11", "fd31::11"))
		cordoned.Spec.Taints = []corev1.Taint{{Key: toBeDeletedTaint}}
		inbox.Put(cordoned)
		synctest.Wait()
		node.LastUpdated = time.Now()
		expect("the node goes", 503, 200, node, up)
		counted := scrape(t, a.metrics)
		for _, path := range []string{"healthz", "livez"} {
			var got []string
			for _, code := range []string{"200", "503"} {
				got = append(got, counted["kubeproxy_proxy_"+path+`_total{code="`+code+`"}`])
			}
			want := map[string][]string{"healthz": {"5", "4"}, "livez": {"8", "1"}}[path]
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("answers counted at /%s (-want +got):\n%s", path, diff)
			}
		}
	})
}
