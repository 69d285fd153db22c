package controller

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promauto"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/longshore-lb/longshore/ipvs"
)

// metrics is what an agent counts. Those of kube-proxy (pkg/proxy/metrics/metrics.go) have its names, types and buckets,
// so that dashboards go on working, without its label ip_family: a pass of this agent is about both families. All but
// the handler belongs to the agent's loop.
type metrics struct {
	registry *prometheus.Registry

	// As kube-proxy has them.
	sync, fullSync, partialSync                        prometheus.Histogram
	lastSync                                           prometheus.Gauge
	networkProgramming                                 prometheus.Histogram
	endpointChanges, serviceChanges                    prometheus.Counter
	noLocalEndpointsInternal, noLocalEndpointsExternal prometheus.Gauge
	healthz, livez                                     *prometheus.CounterVec

	// Ours.
	operations       *prometheus.CounterVec
	repairs, drained *prometheus.CounterVec
	endpointToKernel prometheus.Histogram
	services         prometheus.Gauge
	announced        prometheus.Gauge
	virtualServers   prometheus.Gauge
	realServers      prometheus.Gauge
	draining         prometheus.Gauge
	foreign          prometheus.Gauge
	taken, given     prometheus.Counter // addresses
	conflicts        prometheus.Counter
	alive, expected  prometheus.Gauge
	fenced           prometheus.Gauge

	// What a pass leaves to the next one.
	started  time.Time                               // of the agent: what was triggered before is none of its doing
	compared bool                                    // with the kernel, once
	servers  map[ipvs.Frontend]int                   // virtual servers in the kernel, with how many real servers they have
	reals    int                                     // all of these
	waiting  map[types.NamespacedName]endpointChange // EndpointSlices of passes that did not come to the kernel
	open     map[object]struct{}                     // what should have been changed and could not
}

// passed is a pass of the agent's loop, as plain values.
type passed struct {
	began, applied, ended time.Time // applied: when the kernel had done, or refused, the last operation

	changes  []change         // of objects, that it took in
	full     bool             // it compared with the kernel itself
	observed ipvs.State       // what it found there, if full
	err      error            // why it ended before it changed the kernel; nil = it did not
	expected []ipvs.Operation // follow from the changes
	ops      []ipvs.Operation // were tried: those expected or, if full, all that observed lacked; not those of the first pass
	failures []ipvs.Failure   // of all

	operations int // how many were tried

	// How it is afterwards.
	services, announced                       int
	draining                                  int // real servers that only keep the connections they have
	noLocalInternal, noLocalExternal          int // Services of traffic policy Local that have endpoints, none of them here
	drainedEmpty, drainedTimeout, drainedGone int // draining real servers removed in the pass, by why
}

// whole tells whether all that is desired was in the kernel when the pass ended. Frontends that somebody else has a
// virtual server for do not count: no retry and no restart would change that.
func (p passed) whole() bool {
	return p.err == nil && !slices.ContainsFunc(p.failures, func(f ipvs.Failure) bool { return !errors.Is(f.Err, ipvs.ErrForeign) })
}

// endpointChange is a change of an EndpointSlice on its way into the kernel.
type endpointChange struct {
	arrived   time.Time
	triggered time.Time // when what made its endpoints change happened; zero if it does not say
}

// object is what an operation is about, whatever it does to it.
type object struct {
	kind     ipvs.Kind
	element  ipvs.Element
	frontend ipvs.Frontend
	real     netip.AddrPort
	route    netip.Prefix
}

func objectOf(o ipvs.Operation) object {
	return object{o.Kind, o.Element, o.VirtualServer.Frontend, o.RealServer.Addr, o.Route}
}

// newMetrics returns the metrics of an agent that takes its changes from the inbox.
func newMetrics(inbox *Inbox) *metrics {
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	with := promauto.With(registry)
	counter := func(name, help string) prometheus.Counter {
		return with.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
	}
	counters := func(name, help string, labels ...string) *prometheus.CounterVec {
		return with.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
	}
	gauge := func(name, help string) prometheus.Gauge {
		return with.NewGauge(prometheus.GaugeOpts{Name: name, Help: help})
	}
	gaugeOf := func(name, help string, value func() float64) {
		with.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, value)
	}
	histogram := func(name, help string, buckets []float64) prometheus.Histogram {
		return with.NewHistogram(prometheus.HistogramOpts{Name: name, Help: help, Buckets: buckets})
	}
	syncBuckets := prometheus.ExponentialBuckets(0.001, 2, 15)
	noLocal := with.NewGaugeVec(prometheus.GaugeOpts{
		Name: "kubeproxy_sync_proxy_rules_no_local_endpoints_total", // a gauge, in spite of its name
		Help: "Services with a Local traffic policy and endpoints, none of which is on this node.",
	}, []string{"traffic_policy"})
	changes := counters("longshore_owner_changes_total", "Addresses that this node began, or ceased, to answer for by ARP or NDP.", "change")
	m := &metrics{
		registry: registry,

		sync:        histogram("kubeproxy_sync_proxy_rules_duration_seconds", "How long passes took.", syncBuckets),
		fullSync:    histogram("kubeproxy_sync_full_proxy_rules_duration_seconds", "How long passes took that compared with the kernel.", syncBuckets),
		partialSync: histogram("kubeproxy_sync_partial_proxy_rules_duration_seconds", "How long passes took that were about changes only.", syncBuckets),
		lastSync:    gauge("kubeproxy_sync_proxy_rules_last_timestamp_seconds", "When all that is desired was last in the kernel."),
		networkProgramming: histogram("kubeproxy_network_programming_duration_seconds",
			"From what made endpoints change, by the clock of the control plane, to the kernel.", slices.Concat([]float64{0},
				prometheus.LinearBuckets(0.25, 0.25, 2), prometheus.LinearBuckets(1, 1, 59),
				prometheus.LinearBuckets(60, 5, 12), prometheus.LinearBuckets(120, 30, 7))),
		endpointChanges:          counter("kubeproxy_sync_proxy_rules_endpoint_changes_total", "Changes of EndpointSlices taken in."),
		serviceChanges:           counter("kubeproxy_sync_proxy_rules_service_changes_total", "Changes of Services taken in."),
		noLocalEndpointsInternal: noLocal.WithLabelValues("internal"),
		noLocalEndpointsExternal: noLocal.WithLabelValues("external"),
		healthz:                  counters("kubeproxy_proxy_healthz_total", "Answers at /healthz.", "code"),
		livez:                    counters("kubeproxy_proxy_livez_total", "Answers at /livez.", "code"),

		operations: counters("longshore_kernel_operations_total",
			"Changes of objects in the kernel, by the object's kind, what was done, and whether the kernel did it.", "kind", "operation", "result"),
		repairs: counters("longshore_audit_repairs_total",
			"Objects that were found missing, changed or left over in the kernel, and mended, by kind.", "kind"),
		drained: counters("longshore_drained_total",
			"Draining real servers removed, by why: empty (no connection was left), timeout, gone (with their Service).", "reason"),
		endpointToKernel: histogram("longshore_endpoint_to_kernel_seconds",
			"From the arrival of a changed EndpointSlice in the agent to the kernel's last acknowledgement.",
			[]float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60}),
		services: gauge("longshore_services", "Services that the agent knows."),
		announced: gauge("longshore_announced_addresses",
			"LoadBalancer addresses of all Services, whichever node announces them, without those the kernel refused."),
		virtualServers: gauge("longshore_virtual_servers", "Virtual servers in the kernel that are longshore's."),
		realServers:    gauge("longshore_real_servers", "Real servers of these, with those that drain."),
		draining:       gauge("longshore_draining_real_servers", "Real servers that only keep the connections they have."),
		foreign:        gauge("longshore_foreign_virtual_servers", "Frontends of Services for which somebody else has a virtual server."),

		taken:     changes.WithLabelValues("taken"),
		given:     changes.WithLabelValues("given"),
		conflicts: counter("longshore_address_conflicts_total", "Claims of other machines to addresses that this node answers for, at most one in 10 s for each."),
		alive:     gauge("longshore_members_alive", "Agents that are alive by gossip, this one among them."),
		expected:  gauge("longshore_members_expected", "Agents on nodes that the API server says are Ready, this one among them."),
		fenced:    gauge("longshore_fenced", "1 while this agent answers for no address because others that it does not reach may; else 0."),

		started: time.Now(),
		servers: map[ipvs.Frontend]int{},
		waiting: map[types.NamespacedName]endpointChange{},
		open:    map[object]struct{}{},
	}
	gaugeOf("kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds", "When the last change of an object arrived.", inbox.lastArrival)
	gaugeOf("kubeproxy_sync_proxy_rules_endpoint_changes_pending", "Changes of EndpointSlices that no pass has taken in.", func() float64 {
		endpointSlices, _ := inbox.waiting()
		return endpointSlices
	})
	gaugeOf("kubeproxy_sync_proxy_rules_service_changes_pending", "Changes of Services that no pass has taken in.", func() float64 {
		_, services := inbox.waiting()
		return services
	})
	for _, code := range []string{"200", "503"} {
		m.healthz.WithLabelValues(code)
		m.livez.WithLabelValues(code)
	}
	for _, kind := range kindNames {
		m.repairs.WithLabelValues(kind)
	}
	for _, reason := range []string{"empty", "timeout", "gone"} {
		m.drained.WithLabelValues(reason)
	}
	return m
}

// layer2 adds what is counted where ARP and NDP are spoken.
func (m *metrics) layer2(l Layer2) { m.registry.MustRegister(layer2Counts{l}) }

// layer2Counts collects the counts of ARP and NDP.
type layer2Counts struct{ Layer2 }

var (
	gratuitous = prometheus.NewDesc("longshore_gratuitous_announcements_total",
		"Announcements of addresses that nobody asked for, by why.", []string{"protocol", "reason"}, nil)
	answered = prometheus.NewDesc("longshore_neighbour_requests_answered_total",
		"Requests of neighbours for addresses that were answered.", []string{"protocol"}, nil)
)

// Describe is a prometheus.Collector's.
func (c layer2Counts) Describe(descs chan<- *prometheus.Desc) {
	descs <- gratuitous
	descs <- answered
}

// Collect is a prometheus.Collector's.
func (c layer2Counts) Collect(metrics chan<- prometheus.Metric) {
	for g, n := range c.Announcements() {
		metrics <- prometheus.MustNewConstMetric(gratuitous, prometheus.CounterValue, float64(n), g.Protocol, g.Reason)
	}
	for protocol, n := range c.Answers() {
		metrics <- prometheus.MustNewConstMetric(answered, prometheus.CounterValue, float64(n), protocol)
	}
}

// members notes how many agents are alive, how many should be, and whether this one is fenced.
func (m *metrics) members(alive, expected int, fenced bool) {
	m.alive.Set(float64(alive))
	m.expected.Set(float64(expected))
	m.fenced.Set(0)
	if fenced {
		m.fenced.Set(1)
	}
}

// lastArrival is when the last change arrived, in seconds since 1970; 0 = none did.
func (b *Inbox) lastArrival() float64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return unixSeconds(b.last)
}

func unixSeconds(t time.Time) float64 {
	if t.IsZero() {
		return 0
	}
	return float64(t.UnixNano()) / 1e9
}

// waiting counts what has arrived and was not taken yet.
func (b *Inbox) waiting() (endpointSlices, services float64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, c := range b.pending {
		if _, ok := c.object.(*corev1.Service); ok {
			services++
		} else if c.slice != nil {
			endpointSlices++
		}
	}
	return endpointSlices, services
}

var (
	kindNames = map[ipvs.Kind]string{
		ipvs.KindElement: "element", ipvs.KindVirtualServer: "virtual_server", ipvs.KindRealServer: "real_server", ipvs.KindRoute: "route",
	}
	verbNames = map[ipvs.Verb]string{ipvs.Add: "add", ipvs.Update: "update", ipvs.Delete: "delete"}
)

// passed takes note of a pass. Its cost is that of what the pass was about; of all servers only if the pass was full.
func (m *metrics) passed(p passed) {
	m.takeIn(p.changes)
	took := p.ended.Sub(p.began).Seconds()
	m.sync.Observe(took)
	if p.full {
		m.fullSync.Observe(took)
	} else {
		m.partialSync.Observe(took)
	}
	if p.err != nil {
		for _, o := range p.expected {
			m.open[objectOf(o)] = struct{}{}
		}
		return
	}
	if p.whole() {
		m.lastSync.Set(unixSeconds(p.ended))
	}
	if p.full {
		m.countRepairs(p)
		clear(m.open)
	}
	foreign := map[ipvs.Frontend]struct{}{}
	for _, f := range p.failures {
		m.open[objectOf(f.Operation)] = struct{}{}
		if errors.Is(f.Err, ipvs.ErrForeign) {
			foreign[f.Operation.VirtualServer.Frontend] = struct{}{}
		}
	}
	m.foreign.Set(float64(len(foreign)))
	for name, e := range m.waiting {
		m.endpointToKernel.Observe(p.applied.Sub(e.arrived).Seconds())
		if e.triggered.After(m.started) {
			m.networkProgramming.Observe(p.applied.Sub(e.triggered).Seconds())
		}
		delete(m.waiting, name)
	}
	m.services.Set(float64(p.services))
	m.announced.Set(float64(p.announced))
	m.draining.Set(float64(p.draining))
	m.noLocalEndpointsInternal.Set(float64(p.noLocalInternal))
	m.noLocalEndpointsExternal.Set(float64(p.noLocalExternal))
	m.drained.WithLabelValues("empty").Add(float64(p.drainedEmpty))
	m.drained.WithLabelValues("timeout").Add(float64(p.drainedTimeout))
	m.drained.WithLabelValues("gone").Add(float64(p.drainedGone))
}

// takeIn counts changes, and keeps those of EndpointSlices until the kernel has them: of several to one slice the
// first, which has waited longest.
func (m *metrics) takeIn(changes []change) {
	for _, c := range changes {
		if _, ok := c.object.(*corev1.Service); ok {
			m.serviceChanges.Inc()
		}
		if c.slice == nil {
			continue
		}
		m.endpointChanges.Inc()
		if _, ok := m.waiting[c.slice.name]; ok {
			continue
		}
		e := endpointChange{arrived: c.arrived}
		if !c.deleted { // else it says what triggered the change before
			e.triggered = c.slice.triggered
		}
		m.waiting[c.slice.name] = e
	}
}

// found takes what was observed in the kernel for what is there.
func (m *metrics) found(observed ipvs.State) {
	clear(m.servers)
	m.reals = 0
	for f := range observed.VirtualServers {
		m.servers[f] = len(observed.RealServers[f])
		m.reals += m.servers[f]
	}
}

// failedOf is the operations that failed.
func failedOf(failures []ipvs.Failure) map[ipvs.Operation]bool {
	failed := make(map[ipvs.Operation]bool, len(failures))
	for _, f := range failures {
		failed[f.Operation] = true
	}
	return failed
}

// count counts operations that were tried, and the servers that are in the kernel after them.
func (m *metrics) count(ops []ipvs.Operation, failures []ipvs.Failure) {
	failed := failedOf(failures)
	times := map[[3]string]int{}
	for _, o := range ops {
		result := "ok"
		if len(failed) > 0 && failed[o] {
			result = "failed"
		} else {
			m.countServer(o)
		}
		times[[3]string{kindNames[o.Kind], verbNames[o.Verb], result}]++
	}
	for labels, n := range times {
		m.operations.WithLabelValues(labels[:]...).Add(float64(n))
	}
	m.virtualServers.Set(float64(len(m.servers)))
	m.realServers.Set(float64(m.reals))
}

// countServer follows an operation that was done.
func (m *metrics) countServer(o ipvs.Operation) {
	f := o.VirtualServer.Frontend
	switch {
	case o.Kind == ipvs.KindVirtualServer && o.Verb == ipvs.Add:
		m.servers[f] = 0
	case o.Kind == ipvs.KindVirtualServer && o.Verb == ipvs.Delete: // its real servers go with it
		m.reals -= m.servers[f]
		delete(m.servers, f)
	case o.Kind == ipvs.KindRealServer && o.Verb == ipvs.Add:
		m.servers[f]++
		m.reals++
	case o.Kind == ipvs.KindRealServer && o.Verb == ipvs.Delete:
		m.servers[f]--
		m.reals--
	}
}

// countRepairs counts what a full pass changed although no change of objects and no earlier failure asked for it. The
// first one makes the kernel what it should be, which is no repair.
func (m *metrics) countRepairs(p passed) {
	if !m.compared {
		m.compared = true
		return
	}
	for _, o := range p.expected {
		m.open[objectOf(o)] = struct{}{}
	}
	failed := failedOf(p.failures)
	for _, o := range p.ops {
		if _, ok := m.open[objectOf(o)]; !ok && !failed[o] {
			m.repairs.WithLabelValues(kindNames[o.Kind]).Inc()
		}
	}
}

// ServeMetrics answers /metrics until ctx ends, with those of the speaker too. It is called once.
func (a *Agent) ServeMetrics(ctx context.Context, address string) error {
	if err := a.metrics.registry.Register(newSessionMetrics(a.Speaker)); err != nil {
		return fmt.Errorf("metrics of BGP sessions: %w", err)
	}
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return fmt.Errorf("metrics address: %w", err)
	}
	return serve(ctx, listener, metricsHandler(a.metrics.registry))
}

func metricsHandler(of *prometheus.Registry) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(of, promhttp.HandlerOpts{}))
	return mux
}
