package controller

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
)

// healthTimeout is how long a change may take into the kernel before the agent says that it is not healthy. A pass takes
// milliseconds, seconds at the start of a large cluster; kube-proxy allows twice its sync period, of which there is none
// here.
const healthTimeout = 2 * time.Minute

// toBeDeletedTaint is on nodes that the cluster autoscaler is about to remove: load balancers should stop to send them
// new connections (KEP-3836).
const toBeDeletedTaint = "ToBeDeletedByClusterAutoscaler"

// health tells whether changes get into the kernel in time. It has no clock, every event comes with its time. It is safe
// for concurrent use; the zero value is an agent that has just started.
//
// It keeps two things apart. An agent that is stuck, whose passes do not end, is of no use to anybody, and a restart may
// help. One whose kernel refuses something, such as the one Service whose scheduler has no module, serves all
// others: it is not healthy, but a restart or a withdrawal of all it serves would harm and mend nothing.
type health struct {
	mu        sync.Mutex
	undone    time.Time // when the oldest change came that no pass has done what it could for; zero: there is none
	unapplied time.Time // and that is not in the kernel
	whole     time.Time // when the kernel last had all that is desired; zero: never yet
	eligible  bool
}

// queued says that a change came, or something else that a pass must be made for.
func (h *health) queued(at time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.undone.IsZero() {
		h.undone = at
	}
	if h.unapplied.IsZero() {
		h.unapplied = at
	}
}

// passed says that a pass did what it could for all that was queued, though the kernel refused some of it.
func (h *health) passed() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.undone = time.Time{}
}

// applied says that a pass brought all that was queued into the kernel.
func (h *health) applied(at time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.undone, h.unapplied, h.whole = time.Time{}, time.Time{}, at
}

// nodeEligible says whether the node may get new connections.
func (h *health) nodeEligible(eligible bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.eligible = eligible
}

// healthNow is what health comes to at some time.
type healthNow struct {
	live     bool      // passes end in time
	healthy  bool      // and bring all that is desired into the kernel; one has done so
	eligible bool      // the node may get new connections
	updated  time.Time // when the kernel last had all that is desired
}

func (h *health) at(now time.Time) healthNow {
	h.mu.Lock()
	defer h.mu.Unlock()
	inTime := func(since time.Time) bool { return since.IsZero() || now.Sub(since) < healthTimeout }
	return healthNow{
		live:     inTime(h.undone),
		healthy:  inTime(h.undone) && inTime(h.unapplied) && !h.whole.IsZero(),
		eligible: h.eligible,
		updated:  h.whole,
	}
}

// eligible tells whether a node may get new connections: it is known, it is not being deleted, and nobody is about to.
func eligible(n *corev1.Node) bool {
	if n == nil || !n.DeletionTimestamp.IsZero() {
		return false
	}
	for _, t := range n.Spec.Taints {
		if t.Key == toBeDeletedTaint {
			return false
		}
	}
	return true
}

// ServeHealth answers /healthz (all that is desired gets into the kernel, and the node stays) and /livez (passes end)
// until ctx ends, with the answers of kube-proxy (pkg/proxy/healthcheck/proxy_health.go).
func (a *Agent) ServeHealth(ctx context.Context, address string, log *slog.Logger) error {
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return fmt.Errorf("health address: %w", err)
	}
	log.Info("serving health", "address", listener.Addr().String())
	return serve(ctx, listener, a.healthHandler())
}

// healthBody is kube-proxy's, without its status for each family: here one pass serves both.
type healthBody struct {
	LastUpdated  time.Time `json:"lastUpdated"`
	CurrentTime  time.Time `json:"currentTime"`
	NodeEligible *bool     `json:"nodeEligible,omitempty"`
	Healthy      bool      `json:"healthy"` // whatever the node is
}

func (a *Agent) healthHandler() http.Handler {
	handle := func(count *prometheus.CounterVec, judge func(healthNow, *healthBody) bool) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			now := time.Now()
			h := a.health.at(now)
			body := healthBody{LastUpdated: h.updated, CurrentTime: now}
			ok := judge(h, &body)
			if ok {
				body.LastUpdated = now // as kube-proxy has it: what is up to date was updated just now
			}
			count.WithLabelValues(strconv.Itoa(healthCode(ok))).Inc()
			writeHealth(w, ok, body)
		}
	}
	mux := http.NewServeMux()
	mux.Handle("GET /healthz", handle(a.metrics.healthz, func(h healthNow, b *healthBody) bool {
		b.Healthy, b.NodeEligible = h.healthy, &h.eligible
		return h.healthy && h.eligible
	}))
	mux.Handle("GET /livez", handle(a.metrics.livez, func(h healthNow, b *healthBody) bool {
		b.Healthy = h.live
		return h.live
	}))
	return mux
}

// begins is the start of a pass about the changes.
func (a *Agent) begins(changes []change, full bool) passed {
	p := passed{began: time.Now(), full: full, changes: changes}
	oldest := p.began
	for _, c := range changes {
		if c.arrived.Before(oldest) {
			oldest = c.arrived
		}
	}
	a.health.queued(oldest)
	return p
}

// ends takes note of a pass that is over.
func (a *Agent) ends(p passed) {
	p.ended = time.Now()
	a.metrics.passed(p)
	whole := p.whole()
	switch {
	case whole:
		a.health.applied(p.ended)
	case p.err == nil:
		a.health.passed()
	}
	a.ready.Store(whole)
}
