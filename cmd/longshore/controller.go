package main

import (
	"context"
	"fmt"
	"os"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/longshore-lb/longshore/controller"
)

func controllerCommand() *cobra.Command {
	var cluster clusterFlags
	c := &cobra.Command{
		Use:   "controller",
		Short: "Give the Services of a cluster addresses from IPAddressPools; one works, the others wait",
		Args:  cobra.NoArgs,
	}
	cluster.add(c)
	class := c.Flags().String("load-balancer-class", "", "spec.loadBalancerClass of the Services to serve; by default those without one")
	identity := c.Flags().String("identity", "", "name of this process in the leader election; by default the host name and process id")
	metrics := c.Flags().String("metrics-address", "", "host:port of /metrics, host empty: every address; by default off")
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
		if *identity == "" {
			host, err := os.Hostname()
			if err != nil {
				return fmt.Errorf("--identity: %w", err)
			}
			*identity = fmt.Sprintf("%s-%d", host, os.Getpid())
		}
		kube, err := controller.NewKubernetes(restConfig, namespace)
		if err != nil {
			return err
		}
		group, ctx := errgroup.WithContext(c.Context())
		inbox := controller.NewInbox()
		loop := controller.NewCluster(controller.ClusterOptions{
			Class: *class, Inbox: inbox, Writer: kube, Events: kube.Events(ctx, "longshore-controller", *identity), Log: log,
		})
		if *metrics != "" {
			group.Go(func() error { return loop.ServeMetrics(ctx, *metrics) })
		}
		group.Go(func() error {
			return kube.Lead(ctx, *identity, func(ctx context.Context) {
				log.Info("leading", "identity", *identity)
				group, ctx := errgroup.WithContext(ctx)
				group.Go(func() error { return kube.WatchForCluster(ctx, inbox) })
				group.Go(func() error { loop.Run(ctx); return nil })
				if err := group.Wait(); err != nil {
					log.Error("stopped leading", "error", err)
				}
			})
		})
		return ended(group.Wait())
	}
	return c
}
