package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"

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
	config, node, socket, health string
}

func (f *agentFlags) add(c *cobra.Command) {
	c.Flags().StringVar(&f.config, "config", "", "configuration file; by default every field has its default")
	c.Flags().StringVar(&f.node, "node", "", "name of this node; by default NODE_NAME, else the host name")
	c.Flags().StringVar(&f.socket, "status-socket", "", "overrides statusSocket of the configuration file")
	c.Flags().StringVar(&f.health, "health-address", "", "overrides healthAddress of the configuration file")
}

// load reads the configuration file and fills in the node's name.
func (f *agentFlags) load(c *cobra.Command) (config.Agent, error) {
	conf := config.DefaultAgent()
	if f.config != "" {
		content, err := os.ReadFile(f.config)
		if err != nil {
			return conf, fmt.Errorf("configuration: %w", err)
		}
		if conf, err = config.ParseAgent(f.config, content); err != nil {
			return conf, fmt.Errorf("configuration: %w", err)
		}
	}
	if f.socket != "" {
		conf.StatusSocket = f.socket
	}
	if c.Flags().Changed("health-address") {
		conf.HealthAddress = f.health
	}
	if f.node == "" {
		f.node = os.Getenv("NODE_NAME")
	}
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
	logger := logFlags(c)
	c.RunE = func(c *cobra.Command, _ []string) error {
		log, err := logger()
		if err != nil {
			return err
		}
		restConfig, namespace, err := cluster.config()
		if err != nil {
			return err
		}
		conf, data, lock, err := flags.begin(c, log)
		if err != nil {
			return err
		}
		defer func() { _ = lock.Close() }()
		kube, err := controller.NewKubernetes(restConfig, namespace)
		if err != nil {
			return err
		}
		return runClusterAgent(c.Context(), flags.node, conf, kube, data, log)
	}
	return c
}

// begin reads the configuration, opens the kernel, and makes sure that this is the only agent; the lock is to be closed.
func (f *agentFlags) begin(c *cobra.Command, log *slog.Logger) (config.Agent, *kernel.Kernel, *os.File, error) {
	conf, err := f.load(c)
	if err != nil {
		return conf, nil, nil, err
	}
	data, err := kernel.Open(log)
	if err != nil {
		return conf, nil, nil, err
	}
	lock, err := onlyAgent(conf.StatusSocket)
	return conf, data, lock, err
}

func runClusterAgent(ctx context.Context, node string, conf config.Agent, kube *controller.Kubernetes, data *kernel.Kernel, log *slog.Logger) error {
	addrs, err := kube.NodeAddresses(ctx, node)
	if err != nil {
		return err
	}
	key, err := kube.SecretValue(ctx, membersSecret, membersKey)
	if err != nil {
		return fmt.Errorf("key of the traffic between agents: %w", err)
	}
	m, err := members.New(members.Config{Node: node, Bind: netip.AddrPortFrom(addrs[0], conf.MembersPort), Key: key, Log: log})
	if err != nil {
		return err
	}
	inbox := controller.NewInbox()
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return m.Run(ctx) })
	group.Go(func() error { return kube.WatchForAgent(ctx, inbox) })
	startAgent(ctx, group, controller.AgentOptions{
		Node: node, Config: conf, Inbox: inbox, DataPlane: data, Members: m,
		Events: kube.Events(ctx, "longshore-agent", node), Password: kube.Password, Log: log,
	})
	return ended(group.Wait())
}

// startAgent starts an agent and the parts of it that do not depend on where its objects come from.
func startAgent(ctx context.Context, group *errgroup.Group, o controller.AgentOptions) {
	responder := layer2.New(o.Log, layer2.Options{})
	speaker := bgp.New(o.Log, nil)
	o.Layer2, o.Speaker = responder, speaker
	agent := controller.NewAgent(o)
	group.Go(func() error { return responder.Run(ctx) })
	group.Go(func() error { return speaker.Run(ctx) })
	group.Go(func() error { return agent.Run(ctx) })
	group.Go(func() error { return agent.ServeStatus(ctx, o.Config.StatusSocket) })
	if o.Config.HealthAddress != "" {
		group.Go(func() error { return agent.ServeHealth(ctx, o.Config.HealthAddress, o.Log) })
	}
	if o.Config.MetricsAddress != "" {
		group.Go(func() error { return agent.ServeMetrics(ctx, o.Config.MetricsAddress) })
	}
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
