// Command longshore balances Kubernetes Services over their endpoints with IPVS, and announces their LoadBalancer
// addresses by ARP, NDP and BGP: `agent` on every node, `controller` once in a cluster, or `run` on a machine
// without a cluster. `status` and `ipvsadm` show what it does, `cleanup` takes it back.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"
)

// version is set by the build.
var version = "development"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := command().ExecuteContext(ctx); err != nil {
		fmt.Fprintf(os.Stderr, "longshore: %v\n", err)
		os.Exit(1)
	}
}

func command() *cobra.Command {
	root := &cobra.Command{
		Use:           "longshore",
		Short:         "IPVS load balancer for Kubernetes on bare metal, with a BGP and layer 2 announcer",
		Version:       version,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.AddCommand(agentCommand(), controllerCommand(), runCommand(), statusCommand(), ipvsadmCommand(), cleanupCommand())
	return root
}

// logFlags adds --log-level and returns what makes the logger once flags are parsed.
func logFlags(c *cobra.Command) func() (*slog.Logger, error) {
	level := c.Flags().String("log-level", "info", "debug, info, warn or error")
	return func() (*slog.Logger, error) {
		var l slog.Level
		if err := l.UnmarshalText([]byte(*level)); err != nil {
			return nil, fmt.Errorf("--log-level: %q is not debug, info, warn or error", *level)
		}
		log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: l}))
		klog.SetSlogLogger(log.With("from", "client-go"))
		return log, nil
	}
}

// clusterFlags adds the flags that say where the API server is.
type clusterFlags struct {
	kubeconfig, namespace string
}

func (f *clusterFlags) add(c *cobra.Command) {
	c.Flags().StringVar(&f.kubeconfig, "kubeconfig", "", "how to reach the API server; by default as the service account of the pod")
	c.Flags().StringVar(&f.namespace, "namespace", "", "where the objects of group metallb.io are; by default the pod's namespace")
}

func (f *clusterFlags) config() (*rest.Config, string, error) {
	namespace := f.namespace
	if namespace == "" {
		namespace = os.Getenv("NAMESPACE")
	}
	if namespace == "" {
		content, err := os.ReadFile("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
		if err != nil {
			return nil, "", errors.New("--namespace is needed outside a pod")
		}
		namespace = strings.TrimSpace(string(content))
	}
	c, err := clientcmd.BuildConfigFromFlags("", f.kubeconfig)
	if err != nil {
		return nil, "", fmt.Errorf("API server: %w", err)
	}
	c.UserAgent = "longshore/" + version
	c.QPS, c.Burst = 50, 100
	c.DisableCompression = true // the API server takes longer to compress a list than a cluster's network to carry it
	return c, namespace, nil
}
