package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"runtime/debug"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/longshore-lb/longshore/announcer/bgp"
	"github.com/longshore-lb/longshore/announcer/layer2"
	"github.com/longshore-lb/longshore/announcer/members"
	"github.com/longshore-lb/longshore/config"
	"github.com/longshore-lb/longshore/controller"
	"github.com/longshore-lb/longshore/ipvs/kernel"
)

// membersSecret holds, under membersKey, what encrypts the traffic between agents.
const (
	membersSecret = "longshore-members"
	membersKey    = "key"
)

// agentFlags are common to the agent of a cluster and the standalone one.
type agentFlags struct {
	config, kubeProxy, node, socket, health string

	kubeconfig string // of kube-proxy's configuration
}

func (f *agentFlags) add(c *cobra.Command) {
	c.Flags().StringVar(&f.config, "config", "", "configuration file; by default every field has its default")
	c.Flags().StringVar(&f.kubeProxy, "kube-proxy-config", "", "kube-proxy's configuration file (KubeProxyConfiguration); what --config writes wins over it")
	c.Flags().StringVar(&f.node, "node", "", "name of this node; by default NODE_NAME, else kube-proxy's hostnameOverride, else the host name")
	c.Flags().StringVar(&f.socket, "status-socket", "", "overrides statusSocket of the configuration file")
	c.Flags().StringVar(&f.health, "health-address", "", "overrides healthAddress of the configuration file")
}

// load reads the configuration files and fills in the node's name.
func (f *agentFlags) load(c *cobra.Command, log *slog.Logger) (config.Agent, error) {
	var base config.KubeProxy
	parse := config.ParseAgent
	if f.kubeProxy != "" {
		content, err := os.ReadFile(f.kubeProxy)
		if err != nil {
			return config.Agent{}, fmt.Errorf("kube-proxy's configuration: %w", err)
		}
		var warnings []string
		if base, warnings, err = config.ParseKubeProxy(f.kubeProxy, content); err != nil {
			return config.Agent{}, fmt.Errorf("kube-proxy's configuration: %w", err)
		}
		for _, warning := range warnings {
			log.Warn("kube-proxy's configuration: not taken as it is", "field", warning)
		}
		parse = base.ParseAgent
	}
	var content []byte
	if f.config != "" {
		var err error
		if content, err = os.ReadFile(f.config); err != nil {
			return config.Agent{}, fmt.Errorf("configuration: %w", err)
		}
	}
	conf, err := parse(f.config, content)
	if err != nil {
		return conf, fmt.Errorf("configuration: %w", err)
	}
	f.kubeconfig = base.Kubeconfig
	if f.socket != "" {
		conf.StatusSocket = f.socket
	}
	if c.Flags().Changed("health-address") {
		conf.HealthAddress = f.health
	}
	f.node = cmp.Or(f.node, os.Getenv("NODE_NAME"), base.Node)
	if f.node == "" {
		name, err := os.Hostname()
		if err != nil {
			return conf, fmt.Errorf("--node: %w", err)
		}
		f.node = name
	}
	return conf, nil
}

func agentCommand() *cobra.Command {
	var flags agentFlags
	var cluster clusterFlags
	c := &cobra.Command{
		Use:   "agent",
		Short: "Serve the Services of a cluster on this node, and announce their addresses",
		Args:  cobra.NoArgs,
	}
	flags.add(c)
	cluster.add(c)
	takeOver := c.Flags().Bool("take-over-kube-proxy", false, "take over what a kube-proxy that has ended left in the kernel: go on with its virtual servers, "+
		"and remove the rest once all Services are served")
	logger := logFlags(c)
	c.RunE = func(c *cobra.Command, _ []string) error {
		log, err := logger()
		if err != nil {
			return err
		}
		conf, data, lock, err := flags.begin(c, log)
		if err != nil {
			return err
		}
		defer func() { _ = lock.Close() }()
		if *takeOver {
			if err := adoptKubeProxy(data, log); err != nil {
				return err
			}
		}
		switch {
		case cluster.kubeconfig != "" || flags.kubeconfig == "":
		case inPod():
			log.Info("kube-proxy's kubeconfig is not used: a pod has its service account", "kubeconfig", flags.kubeconfig)
		default:
			cluster.kubeconfig = flags.kubeconfig
		}
		restConfig, namespace, err := cluster.config()
		if err != nil {
			return err
		}
		kube, err := controller.NewKubernetes(restConfig, namespace)
		if err != nil {
			return err
		}
		return runClusterAgent(c.Context(), flags.node, conf, kube, data, *takeOver, log)
	}
	return c
}

// inPod tells whether the process runs in a pod, as client-go does.
func inPod() bool {
	return os.Getenv("KUBERNETES_SERVICE_HOST") != "" && os.Getenv("KUBERNETES_SERVICE_PORT") != ""
}

// begin reads the configuration, opens the kernel, makes sure that this is the only agent, and sets what all of the
// machine shares; the lock is to be closed.
func (f *agentFlags) begin(c *cobra.Command, log *slog.Logger) (config.Agent, *kernel.Kernel, *os.File, error) {
	conf, err := f.load(c, log)
	if err != nil {
		return conf, nil, nil, err
	}
	data, err := kernel.Open(log)
	if err != nil {
		return conf, nil, nil, err
	}
	lock, err := onlyAgent(conf.StatusSocket)
	if err != nil {
		return conf, data, nil, err
	}
	if err := data.Configure(kernel.Settings(conf.Kernel)); err != nil { // Services work without
		log.Error("cannot set all settings of the kernel", "error", err)
	}
	return conf, data, lock, nil
}

func runClusterAgent(ctx context.Context, node string, conf config.Agent, kube *controller.Kubernetes, data *kernel.Kernel, takeOver bool, log *slog.Logger) error {
	addrs, err := kube.NodeAddresses(ctx, node)
	if err != nil {
		return err
	}
	key, err := kube.SecretValue(ctx, membersSecret, membersKey)
	if err != nil {
		return fmt.Errorf("key of the traffic between agents: %w", err)
	}
	m, err := members.New(members.Config{Node: node, Bind: netip.AddrPortFrom(addrs[0], conf.MembersPort), Key: key,
		ProbeInterval: conf.ProbeInterval, CrashGrace: conf.CrashGrace, Log: log})
	if err != nil {
		return err
	}
	inbox := controller.NewInbox()
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return kube.WatchForAgent(ctx, inbox) })
	reports := kube.Reporter(node, log)
	group.Go(func() error { return reports.Run(ctx) })
	agent := startAgent(ctx, group, m.Run, controller.AgentOptions{
		Node: node, Config: conf, Inbox: inbox, DataPlane: data, Members: m, Registry: kube, TieBreak: kube.TieBreak(node), Reports: reports,
		Events: kube.Events(ctx, "longshore-agent", node), Password: kube.Password, Log: log,
		WatchPods: func() { kube.WatchPods(ctx, inbox) },
	})
	if takeOver {
		group.Go(func() error { removeKubeProxy(ctx, agent, data, log); return nil })
	}
	return ended(group.Wait())
}

// gcPercent makes the agent's garbage half of what it keeps, not as much (GOGC): it keeps a lot, and makes little garbage, but for
// its start. An operator's GOGC counts.
const gcPercent = 50

// saveMemory gives back what the start has taken and the rest does not need.
func saveMemory() {
	debug.SetGCPercent(gcPercent)
	debug.FreeOSMemory()
}

// awaitReady waits until all that is desired is in the kernel, and tells whether it is: ctx may end before.
func awaitReady(ctx context.Context, agent *controller.Agent) bool {
	for !agent.Ready() {
		select {
		case <-ctx.Done():
			return false
		case <-time.After(100 * time.Millisecond):
		}
	}
	return true
}

// startAgent starts an agent and the parts of it that do not depend on where its objects come from. The gossip and the answers by
// ARP and NDP go on until the agent has handed its addresses over; gossip is nil if there are no others.
func startAgent(ctx context.Context, group *errgroup.Group, gossip func(context.Context) error, o controller.AgentOptions) *controller.Agent {
	responder := layer2.New(o.Log, layer2.Options{})
	speaker := bgp.New(o.Log, nil)
	o.Layer2, o.Speaker = responder, speaker
	agent := controller.NewAgent(o)
	longer, end := context.WithCancel(context.WithoutCancel(ctx))
	if gossip != nil {
		group.Go(func() error { return gossip(longer) })
	}
	group.Go(func() error { return responder.Run(longer) })
	group.Go(func() error { return speaker.Run(ctx) })
	group.Go(func() error {
		defer end()
		return agent.Run(ctx)
	})
	if os.Getenv("GOGC") == "" {
		group.Go(func() error {
			if awaitReady(ctx, agent) {
				saveMemory()
			}
			return nil
		})
	}
	group.Go(func() error { return agent.ServeStatus(ctx, o.Config.StatusSocket) })
	if o.Config.HealthAddress != "" {
		group.Go(func() error { return agent.ServeHealth(ctx, o.Config.HealthAddress, o.Log) })
	}
	if o.Config.MetricsAddress != "" {
		group.Go(func() error { return agent.ServeMetrics(ctx, o.Config.MetricsAddress) })
	}
	return agent
}

// onlyAgent makes sure that no other agent works on this machine: two would take each other's work back. The kernel
// drops the lock when the process ends, however it ends.
func onlyAgent(socket string) (*os.File, error) {
	if err := os.MkdirAll(filepath.Dir(socket), 0o755); err != nil {
		return nil, fmt.Errorf("status socket: %w", err)
	}
	lock, err := os.OpenFile(socket+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock of the status socket: %w", err)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, fmt.Errorf("another agent runs on this machine: %s is locked (%w)", lock.Name(), err)
	}
	return lock, nil
}

// ended drops the error that only says that we were asked to stop.
func ended(err error) error {
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}
