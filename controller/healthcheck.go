package controller

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// HealthChecks answers the load balancers in front of the cluster that ask, on a Service's healthCheckNodePort, whether
// this node has an endpoint of it. It says what kube-proxy says (pkg/proxy/healthcheck/service_health.go): 200 with at
// least one local ready endpoint, else 503. It is safe for concurrent use.
type HealthChecks struct {
	log     *slog.Logger
	healthy func() bool

	mu      sync.Mutex
	addrs   []netip.Addr
	checks  map[types.NamespacedName]*healthCheck
	serving sync.WaitGroup
}

// healthCheck is one Service's port.
type healthCheck struct {
	service   types.NamespacedName
	port      uint16
	local     atomic.Int64 // ready endpoints on this node
	listening map[netip.Addr]*listening
}

// listening is a port on one address.
type listening struct {
	net.Listener
	server *http.Server
}

// NewHealthChecks returns health checks of no Service, which will listen on every address, of both families. All of
// them fail while healthy says false: then the data plane may be serving endpoints that are gone.
func NewHealthChecks(log *slog.Logger, healthy func() bool) *HealthChecks {
	return &HealthChecks{
		log: log, healthy: healthy,
		addrs:  []netip.Addr{netip.IPv6Unspecified()},
		checks: map[types.NamespacedName]*healthCheck{},
	}
}

// Addresses replaces the addresses to listen on. The unspecified address, alone, stands for every address of both
// families; with no address nothing is listened on. It returns the errors of all ports that cannot be bound, as
// [HealthChecks.Replace] does.
func (h *HealthChecks) Addresses(addrs []netip.Addr) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.addrs = addrs
	var errs []error
	for _, c := range h.checks {
		errs = append(errs, h.listen(c))
	}
	return errors.Join(errs...)
}

// Replace says on which port a Service is asked about, 0 for none, and how many ready endpoints it has on this node. If
// the port cannot be bound the error names the Service, the field and the value; the next call tries again. Whoever
// gives several Services at once should give those that let their port go first: another one may have got it.
func (h *HealthChecks) Replace(name types.NamespacedName, port uint16, localEndpoints int) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	c := h.checks[name]
	if c != nil && c.port != port {
		h.close(c)
		c = nil
	}
	if port == 0 {
		return nil
	}
	if c == nil {
		c = &healthCheck{service: name, port: port, listening: map[netip.Addr]*listening{}}
		h.checks[name] = c
	}
	c.local.Store(int64(localEndpoints))
	return h.listen(c)
}

// Close ends all health checks. When it returns nothing listens any more.
func (h *HealthChecks) Close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, c := range h.checks {
		h.close(c)
	}
	h.serving.Wait()
}

func (h *HealthChecks) close(c *healthCheck) {
	for addr, l := range c.listening {
		l.close()
		delete(c.listening, addr)
	}
	delete(h.checks, c.service)
}

// listen makes a port be bound on the addresses it should be and on no other. What is no longer wanted goes first: a port
// on every address is in the way of the same port on one.
func (h *HealthChecks) listen(c *healthCheck) error {
	wanted := make(map[netip.Addr]bool, len(h.addrs))
	for _, addr := range h.addrs {
		wanted[addr] = true
	}
	for addr, l := range c.listening {
		if !wanted[addr] {
			l.close()
			delete(c.listening, addr)
		}
	}
	var errs []error
	for _, addr := range h.addrs {
		if c.listening[addr] != nil {
			continue
		}
		host := ""
		if !addr.IsUnspecified() {
			host = addr.String()
		}
		listener, err := net.Listen("tcp", net.JoinHostPort(host, strconv.Itoa(int(c.port))))
		if err != nil {
			errs = append(errs, fmt.Errorf("Service %s: spec.healthCheckNodePort: %d: %w", c.service, c.port, err))
			continue
		}
		l := &listening{listener, &http.Server{Handler: h.answer(c), ReadHeaderTimeout: 10 * time.Second}}
		c.listening[addr] = l
		h.serving.Go(func() {
			if err := l.server.Serve(l); !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
				h.log.Error("health check ended", "service", c.service.String(), "address", l.Addr().String(), "error", err)
			}
		})
		h.log.Info("serving health check", "service", c.service.String(), "address", l.Addr().String())
	}
	return errors.Join(errs...)
}

// close sets the port free before it returns, and ends the connections that came by it.
func (l *listening) close() {
	_ = l.Close() // the server knows of its listener only once its goroutine has run
	_ = l.server.Close()
}

// answer says how a Service is doing on this node, at every path.
func (h *HealthChecks) answer(c *healthCheck) http.Handler {
	type service struct {
		Namespace string `json:"namespace"`
		Name      string `json:"name"`
	}
	type body struct {
		Service        service `json:"service"`
		LocalEndpoints int64   `json:"localEndpoints"`
		Healthy        bool    `json:"serviceProxyHealthy"`
	}
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		b := body{service{c.service.Namespace, c.service.Name}, c.local.Load(), h.healthy()}
		w.Header().Set("X-Load-Balancing-Endpoint-Weight", strconv.FormatInt(b.LocalEndpoints, 10))
		writeHealth(w, b.LocalEndpoints > 0 && b.Healthy, b)
	})
}

// writeHealth answers a question about health: 200 or 503, and why.
func writeHealth(w http.ResponseWriter, healthy bool, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(healthCode(healthy))
	_ = json.NewEncoder(w).Encode(body)
}

func healthCode(healthy bool) int {
	if healthy {
		return http.StatusOK
	}
	return http.StatusServiceUnavailable
}

// healthCheckOf is a Service's health check node port, 0 if it has none, and how many ready endpoints the Service has on
// a node: endpoints that terminate do not count, although they may still serve. An endpoint of two families is one, so
// the family with more of them counts.
func healthCheckOf(svc *corev1.Service, endpointSlices []*endpointSlice, node string) (port uint16, localEndpoints int) {
	if svc.Spec.Type != corev1.ServiceTypeLoadBalancer || svc.Spec.ExternalTrafficPolicy != corev1.ServiceExternalTrafficPolicyLocal {
		return 0, 0
	}
	ready := map[corev1.IPFamily]map[netip.Addr]struct{}{corev1.IPv4Protocol: {}, corev1.IPv6Protocol: {}}
	for _, slice := range endpointSlices {
		for i := range slice.endpoints {
			if e := &slice.endpoints[i]; e.node == node && (e.ready || svc.Spec.PublishNotReadyAddresses) {
				ready[slice.family][e.addr] = struct{}{}
			}
		}
	}
	return uint16(svc.Spec.HealthCheckNodePort), max(len(ready[corev1.IPv4Protocol]), len(ready[corev1.IPv6Protocol]))
}

// checkServices brings the health checks of the Services touched up to date, and tries those again whose port could not be
// bound. Services that let a port go come first: it may be what another one waits for.
func (a *Agent) checkServices(touched map[types.NamespacedName]struct{}) {
	var asked []types.NamespacedName
	replace := func(name types.NamespacedName) {
		svc := a.snapshot.services[name]
		if svc == nil {
			_ = a.checks.Replace(name, 0, 0) // nothing is bound
			delete(a.unbound, name)
			return
		}
		port, local := healthCheckOf(svc, a.snapshot.slicesOf(name), a.Node)
		err := a.checks.Replace(name, port, local)
		switch before := a.unbound[name]; {
		case err == nil:
			delete(a.unbound, name)
		case err.Error() != before:
			a.unbound[name] = err.Error()
			a.Log.Warn("health check cannot be served", "error", err)
			a.Events.Event(svc, corev1.EventTypeWarning, "FailedToStartServiceHealthcheck", err.Error())
		}
	}
	for name := range touched {
		if svc := a.snapshot.services[name]; svc == nil || svc.Spec.HealthCheckNodePort == 0 {
			replace(name)
		} else if _, again := a.unbound[name]; !again {
			asked = append(asked, name)
		}
	}
	asked = slices.AppendSeq(asked, maps.Keys(a.unbound))
	for _, name := range asked {
		replace(name)
	}
}
