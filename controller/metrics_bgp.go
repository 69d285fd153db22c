package controller

import (
	"cmp"
	"context"
	"fmt"
	"net"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

// sessionMetrics asks the speaker for its sessions whenever it is asked itself. The names, types and labels are MetalLB's.
type sessionMetrics struct {
	speaker               Speaker
	up, updates, prefixes *prometheus.Desc
}

func newSessionMetrics(s Speaker) sessionMetrics {
	of := func(name, help string) *prometheus.Desc {
		return prometheus.NewDesc(name, help, []string{"peer", "vrf"}, nil)
	}
	return sessionMetrics{
		speaker:  s,
		up:       of("metallb_bgp_session_up", "Whether the session with a BGP peer is established: 1 or 0."),
		updates:  of("metallb_bgp_updates_total", "UPDATE messages sent to a BGP peer."),
		prefixes: of("metallb_bgp_announced_prefixes_total", "Prefixes that a BGP peer has from this node now."), // a gauge, in spite of its name
	}
}

// Describe is a prometheus.Collector's.
func (m sessionMetrics) Describe(to chan<- *prometheus.Desc) {
	to <- m.up
	to <- m.updates
	to <- m.prefixes
}

// Collect is a prometheus.Collector's.
func (m sessionMetrics) Collect(to chan<- prometheus.Metric) {
	for _, s := range m.speaker.Sessions() {
		up := 0.0
		if s.State == "established" {
			up = 1
		}
		peer := cmp.Or(s.Interface, s.Address.String())
		to <- prometheus.MustNewConstMetric(m.up, prometheus.GaugeValue, up, peer, s.Device)
		to <- prometheus.MustNewConstMetric(m.updates, prometheus.CounterValue, float64(s.Updates), peer, s.Device)
		to <- prometheus.MustNewConstMetric(m.prefixes, prometheus.GaugeValue, float64(s.Advertised), peer, s.Device)
	}
}

// allocatorMetrics is what the cluster's loop counts, by MetalLB's names. It belongs to that loop.
type allocatorMetrics struct {
	registry     *prometheus.Registry
	inUse, total *prometheus.GaugeVec
}

func newAllocatorMetrics() allocatorMetrics {
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	with := promauto.With(registry)
	return allocatorMetrics{
		registry: registry,
		inUse: with.NewGaugeVec(prometheus.GaugeOpts{
			Name: "metallb_allocator_addresses_in_use_total", Help: "Addresses of a pool that Services have.",
		}, []string{"pool"}),
		total: with.NewGaugeVec(prometheus.GaugeOpts{
			Name: "metallb_allocator_addresses_total", Help: "Addresses that a pool has, in use or not.",
		}, []string{"pool"}),
	}
}

// pools replaces what is said of all pools.
func (m allocatorMetrics) pools(of map[string]PoolCounts) {
	m.inUse.Reset()
	m.total.Reset()
	for name, n := range of {
		inUse := float64(n.AssignedIPv4) + float64(n.AssignedIPv6)
		m.inUse.WithLabelValues(name).Set(inUse)
		m.total.WithLabelValues(name).Set(inUse + float64(n.AvailableIPv4) + float64(n.AvailableIPv6))
	}
}

// ServeMetrics answers /metrics until ctx ends. Only the process that leads has pools to speak of.
func (c *Cluster) ServeMetrics(ctx context.Context, address string) error {
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return fmt.Errorf("metrics address: %w", err)
	}
	return serve(ctx, listener, metricsHandler(c.metrics.registry))
}
