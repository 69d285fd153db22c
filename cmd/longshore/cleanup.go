package main

import (
	"fmt"
	"log/slog"
	"os"

	"github.com/spf13/cobra"

	"github.com/longshore-lb/longshore/config"
	"github.com/longshore-lb/longshore/ipvs/kernel"
)

func cleanupCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "cleanup",
		Short: "Remove all that is longshore's from this machine's kernel",
		Long: `Removes from this machine's kernel all that is longshore's and nothing else: local routes of protocol 196, virtual servers
whose frontends are in longshore's sets, and the nftables tables called longshore. Prints each step as the command of ip,
ipvsadm or nft that does the same. No agent may run here meanwhile.

Sysctls stay: what they were before is not known, and the rest of the machine may count on them.`,
		Args: cobra.NoArgs,
	}
	socket := c.Flags().String("status-socket", config.DefaultAgent().StatusSocket, "where the agent of this machine answers when it runs")
	dryRun := c.Flags().Bool("dry-run", false, "print what would be done, and do nothing")
	c.RunE = func(*cobra.Command, []string) error {
		k, err := kernel.Open(slog.New(slog.DiscardHandler))
		if err != nil {
			return err
		}
		defer func() { _ = k.Close() }()
		if !*dryRun {
			lock, err := onlyAgent(*socket)
			if err != nil {
				return fmt.Errorf("nothing is removed: %w", err)
			}
			defer func() { _ = lock.Close() }()
		}
		return k.Cleanup(*dryRun, func(command string) { _, _ = fmt.Fprintln(os.Stdout, command) })
	}
	return c
}
