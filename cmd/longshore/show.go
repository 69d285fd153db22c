package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/longshore-lb/longshore/config"
	"github.com/longshore-lb/longshore/controller"
	"github.com/longshore-lb/longshore/ipvs"
	"github.com/longshore-lb/longshore/ipvs/kernel"
)

func statusCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "status",
		Short: "Tell which address is announced by whom and how, the BGP sessions, and what is wrong",
		Args:  cobra.NoArgs,
	}
	socket := c.Flags().String("status-socket", config.DefaultAgent().StatusSocket, "where the agent of this node answers")
	output := c.Flags().StringP("output", "o", "text", "text or json")
	c.RunE = func(c *cobra.Command, _ []string) error {
		if *output != "text" && *output != "json" {
			return fmt.Errorf("--output: %q is not text or json", *output)
		}
		ctx, cancel := context.WithTimeout(c.Context(), 10*time.Second)
		defer cancel()
		status, err := controller.FetchStatus(ctx, *socket)
		if err != nil {
			return err
		}
		if *output == "text" {
			return status.Write(os.Stdout)
		}
		e := json.NewEncoder(os.Stdout)
		e.SetIndent("", "  ")
		return e.Encode(status)
	}
	return c
}

func ipvsadmCommand() *cobra.Command {
	var o ipvs.ListOptions
	var list, numeric, save bool
	var tcp, udp, sctp string
	var mark uint32
	var ipv6 bool
	c := &cobra.Command{
		Use:   "ipvsadm -Ln",
		Short: "Print the kernel's IPVS table byte for byte as ipvsadm does",
		Long: `Prints the IPVS table of this machine as ipvsadm 1.31 does: -L (the default) and -S, always with -n. Everybody's virtual
servers are shown, not only longshore's.`,
		Args: cobra.NoArgs,
	}
	f := c.Flags()
	f.BoolVarP(&list, "list", "L", false, "list the table (the default)")
	f.BoolVarP(&list, "list-lower", "l", false, "the same as -L")
	f.Lookup("list-lower").Hidden = true
	f.BoolVarP(&save, "save", "S", false, "print the table as ipvsadm commands")
	f.BoolVarP(&numeric, "numeric", "n", false, "addresses and ports as numbers (required)")
	f.StringVarP(&tcp, "tcp-service", "t", "", "only this TCP virtual server")
	f.StringVarP(&udp, "udp-service", "u", "", "only this UDP virtual server")
	f.StringVar(&sctp, "sctp-service", "", "only this SCTP virtual server")
	f.Uint32VarP(&mark, "fwmark-service", "f", 0, "only the virtual server of this firewall mark")
	f.BoolVarP(&ipv6, "ipv6", "6", false, "the firewall mark is for IPv6")
	f.BoolVar(&o.Stats, "stats", false, "counters")
	f.BoolVar(&o.Rate, "rate", false, "rates")
	f.BoolVar(&o.Thresholds, "thresholds", false, "connection limits")
	f.BoolVar(&o.PersistentConn, "persistent-conn", false, "persistent connections")
	f.BoolVar(&o.TunnelInfo, "tun-info", false, "encapsulation of tunnels")
	f.BoolVar(&o.Exact, "exact", false, "numbers in full")
	f.BoolVar(&o.NoSort, "nosort", false, "in the kernel's order")
	c.RunE = func(*cobra.Command, []string) error {
		if !numeric {
			return errors.New("names are not looked up: add -n")
		}
		if list && save {
			return errors.New("-L and -S exclude each other")
		}
		only, err := oneFrontend(map[ipvs.Protocol]string{ipvs.TCP: tcp, ipvs.UDP: udp, ipvs.SCTP: sctp}, mark, ipv6)
		if err != nil {
			return err
		}
		o.Only = only
		k, err := kernel.Open(slog.New(slog.DiscardHandler))
		if err != nil {
			return err
		}
		defer func() { _ = k.Close() }()
		table, err := k.Table()
		if err != nil {
			return err
		}
		if save {
			return ipvs.Save(os.Stdout, table)
		}
		return ipvs.List(os.Stdout, table, o)
	}
	return c
}

// oneFrontend is the virtual server that the flags choose, nil if they choose none.
func oneFrontend(services map[ipvs.Protocol]string, mark uint32, ipv6 bool) (*ipvs.Frontend, error) {
	var chosen []ipvs.Frontend
	if mark != 0 {
		chosen = append(chosen, ipvs.Frontend{Mark: mark, IPv6: ipv6})
	}
	for protocol, text := range services {
		if text == "" {
			continue
		}
		addr, err := netip.ParseAddrPort(text)
		if err != nil {
			return nil, fmt.Errorf("virtual server: %w", err)
		}
		chosen = append(chosen, ipvs.At(protocol, addr))
	}
	switch len(chosen) {
	case 0:
		return nil, nil
	case 1:
		return &chosen[0], nil
	}
	return nil, errors.New("only one virtual server can be chosen")
}
