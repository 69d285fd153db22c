package main

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/longshore-lb/longshore/controller"
)

func runCommand() *cobra.Command {
	var flags agentFlags
	c := &cobra.Command{
		Use:   "run --manifests DIR",
		Short: "Be a load balancer without a cluster: the same objects, from files",
		Long: `Reads Service, EndpointSlice, IPAddressPool, L2Advertisement, BGPPeer, BFDProfile, BGPAdvertisement and Community objects from
the YAML and JSON files of a folder, follows their changes, and serves and announces them on this machine.`,
		Args: cobra.NoArgs,
	}
	flags.add(c)
	folder := c.Flags().String("manifests", "", "folder of the manifests (required)")
	store := c.Flags().String("assignments", "/var/lib/longshore/assignments.json", "file that keeps which Service has which address")
	own := c.Flags().StringSlice("node-address", nil, "addresses of this machine, one of each family; by default those of the interface with the default route")
	logger := logFlags(c)
	c.RunE = func(c *cobra.Command, _ []string) error {
		log, err := logger()
		if err != nil {
			return err
		}
		if *folder == "" {
			return errors.New("--manifests is required")
		}
		conf, data, lock, err := flags.begin(c, log)
		if err != nil {
			return err
		}
		defer func() { _ = lock.Close() }()
		var addrs []netip.Addr
		for _, text := range *own {
			a, err := netip.ParseAddr(text)
			if err != nil {
				return fmt.Errorf("--node-address: %w", err)
			}
			addrs = append(addrs, a)
		}
		if len(addrs) == 0 {
			if addrs, err = data.Addresses(); err != nil {
				return err
			}
		}
		log.Info("this machine", "node", flags.node, "addresses", addrs)
		forAgent, forCluster := controller.NewInbox(), controller.NewInbox()
		files, err := controller.NewFiles(*folder, *store, log, forAgent, forCluster)
		if err != nil {
			return err
		}
		node := controller.StandaloneNode(flags.node, addrs)
		forAgent.Put(node)
		forCluster.Put(node)
		events := controller.LogEvents{Log: log}
		loop := controller.NewCluster(controller.ClusterOptions{
			Class: conf.LoadBalancerClass, Inbox: forCluster, Writer: files, Events: events, Log: log,
		})
		group, ctx := errgroup.WithContext(c.Context())
		group.Go(func() error { return files.Run(ctx) })
		group.Go(func() error { loop.Run(ctx); return nil })
		startAgent(ctx, group, nil, controller.AgentOptions{
			Node: flags.node, Config: conf, Inbox: forAgent, DataPlane: data, Events: events, Log: log,
		})
		return ended(group.Wait())
	}
	return c
}
