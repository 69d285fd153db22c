package main

import (
	"context"
	"fmt"
	"log/slog"

	"github.com/longshore-lb/longshore/controller"
	"github.com/longshore-lb/longshore/ipvs"
	"github.com/longshore-lb/longshore/ipvs/kernel"
)

// kubeProxyHealthPort is where kube-proxy answers /healthz if nobody tells it otherwise.
const kubeProxyHealthPort = 10256

// adoptKubeProxy makes kube-proxy's virtual servers ours, before the agent looks at the kernel. The agent must not begin
// while kube-proxy runs: each would take back what the other does.
func adoptKubeProxy(data *kernel.Kernel, log *slog.Logger) error {
	if data.PortInUse(ipvs.TCP, kubeProxyHealthPort) {
		return fmt.Errorf("take over from kube-proxy: it still runs on this node, or another program has port %d/TCP", kubeProxyHealthPort)
	}
	n, err := data.AdoptKubeProxy()
	if err != nil {
		return fmt.Errorf("take over from kube-proxy: %w", err)
	}
	log.Info("taking over from kube-proxy", "adopted", n)
	return nil
}

// removeKubeProxy removes the rest of what kube-proxy left when all that is desired is in the kernel: until then its rules
// and addresses serve.
func removeKubeProxy(ctx context.Context, agent *controller.Agent, data *kernel.Kernel, log *slog.Logger) {
	if !awaitReady(ctx, agent) {
		return
	}
	if err := data.RemoveKubeProxy(); err != nil {
		log.Error("took over from kube-proxy, but not all that it left could be removed", "error", err)
		return
	}
	log.Info("took over from kube-proxy")
}
