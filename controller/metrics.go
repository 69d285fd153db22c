package controller

import (
	"context"
	"fmt"
	"net"
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/longshore-lb/longshore/ipvs"
)

// metrics is what an agent counts.
type metrics struct {
	registry   *prometheus.Registry
	operations *prometheus.CounterVec
	services   prometheus.Gauge
	announced  prometheus.Gauge
}

func newMetrics() *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		operations: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "longshore_kernel_operations_total",
			Help: "Changes of objects in the kernel, by the object's kind, what was done, and whether the kernel did it.",
		}, []string{"kind", "operation", "result"}),
		services: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "longshore_services", Help: "Services that the agent knows.",
		}),
		announced: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "longshore_announced_addresses", Help: "LoadBalancer addresses of all Services, whichever node announces them, without those the kernel refused.",
		}),
	}
	m.registry.MustRegister(m.operations, m.services, m.announced,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

var (
	kindNames = map[ipvs.Kind]string{
		ipvs.KindElement: "element", ipvs.KindVirtualServer: "virtual_server", ipvs.KindRealServer: "real_server", ipvs.KindRoute: "route",
	}
	verbNames = map[ipvs.Verb]string{ipvs.Add: "add", ipvs.Update: "update", ipvs.Delete: "delete"}
)

// count takes note of operations and of those among them that failed.
func (m *metrics) count(ops []ipvs.Operation, failures []ipvs.Failure) {
	failed := make(map[ipvs.Operation]bool, len(failures))
	for _, f := range failures {
		failed[f.Operation] = true
	}
	for _, o := range ops {
		result := "ok"
		if failed[o] {
			result = "failed"
		}
		m.operations.WithLabelValues(kindNames[o.Kind], verbNames[o.Verb], result).Inc()
	}
}

// ServeMetrics answers /metrics until ctx ends.
func (a *Agent) ServeMetrics(ctx context.Context, address string) error {
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return fmt.Errorf("metrics address: %w", err)
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(a.metrics.registry, promhttp.HandlerOpts{}))
	return serve(ctx, listener, mux)
}
