package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Host is a machine of the lab or a pod: a network namespace with addresses.
type Host struct {
	Name   string     // without the prefix ls-; of a pod: NAMESPACE-NAME
	V4, V6 netip.Addr // of the first interface
	Link   *Link      // the first interface's cable

	lab *Lab
	*namespace
}

// Addr is the host's address of one family.
func (h *Host) Addr(ipv6 bool) netip.Addr {
	if ipv6 {
		return h.V6
	}
	return h.V4
}

// MAC is the hardware address of the first interface, by which neighbours know the machine.
func (h *Host) MAC() net.HardwareAddr { return h.Link.nearLink.Attrs().HardwareAddr }

// NetNS is the name by which `ip netns exec` finds the host.
func (h *Host) NetNS() string { return h.namespace.name }

// Command is a program to run in the host, not started yet. It ends with ctx. Beside the caller's PATH the
// folders of system programs are searched.
func (h *Host) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{"--net=" + h.path(), "--", name}, args...)...)
	cmd.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
	return cmd
}

// Run runs a program in the host and returns what it printed on its standard output. The error has what it
// printed on its standard error.
func (h *Host) Run(ctx context.Context, name string, args ...string) (string, error) {
	return output(h.Command(ctx, name, args...), h.Name+": "+name+" "+strings.Join(args, " "))
}

// output runs a command; what names it in the error.
func output(cmd *exec.Cmd, what string) (string, error) {
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("%s: %w: %s", what, err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), nil
}

// Do calls f on a thread that is in the host's namespace: sockets that f opens are the host's. f must not start
// goroutines that open sockets.
func (h *Host) Do(f func() error) error { return h.run(f) }

// DialContext connects from the host to an address, which must be numeric, over a protocol of package net or sctp. It
// fits net/http and client-go.
func (h *Host) DialContext(ctx context.Context, protocol, address string) (conn net.Conn, err error) {
	to, err := netip.ParseAddrPort(address)
	if err != nil {
		return nil, fmt.Errorf("dial from %s: %w", h.Name, err)
	}
	err = h.run(func() (err error) {
		if protocol == "sctp" {
			conn, err = dialSCTP(ctx, h.Addr(to.Addr().Is6()), to)
			return err
		}
		conn, err = new(net.Dialer).DialContext(ctx, protocol, address)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("from %s: %w", h.Name, err)
	}
	return conn, nil
}

// Neighbor is the hardware address the host has learnt for an address (ARP or NDP); the error says if it has none.
func (h *Host) Neighbor(addr netip.Addr) (net.HardwareAddr, error) {
	neighbors, err := h.kernel.NeighList(0, family(addr))
	if err != nil {
		return nil, fmt.Errorf("neighbours of %s: %w", h.Name, err)
	}
	const unusable = netlink.NUD_INCOMPLETE | netlink.NUD_FAILED | netlink.NUD_NOARP
	for _, n := range neighbors {
		if ip, ok := netip.AddrFromSlice(n.IP); ok && ip.Unmap() == addr && n.State&unusable == 0 && len(n.HardwareAddr) > 0 {
			return n.HardwareAddr, nil
		}
	}
	return nil, fmt.Errorf("%s knows no neighbour %s", h.Name, addr)
}

// ForgetNeighbors empties the host's ARP and NDP tables of what it has learnt.
func (h *Host) ForgetNeighbors() error {
	neighbors, err := h.kernel.NeighList(0, unix.AF_UNSPEC)
	if err != nil {
		return fmt.Errorf("neighbours of %s: %w", h.Name, err)
	}
	for _, n := range neighbors {
		if n.State&netlink.NUD_PERMANENT != 0 {
			continue
		}
		if err := h.kernel.NeighDel(&n); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("delete neighbour %s of %s: %w", n.IP, h.Name, err)
		}
	}
	return nil
}

func family(a netip.Addr) int {
	if a.Is6() {
		return unix.AF_INET6
	}
	return unix.AF_INET
}

// HostWithMAC is the machine of the lan with that hardware address, or nil.
func (l *Lab) HostWithMAC(mac net.HardwareAddr) *Host {
	for _, h := range l.hosts() {
		if h != l.Outside && h.MAC().String() == mac.String() {
			return h
		}
	}
	return nil
}

// NextHops is the gateways of the host's route to exactly this prefix, in its main table; none if it has no such
// route.
func (h *Host) NextHops(to netip.Prefix) ([]netip.Addr, error) {
	routes, err := h.kernel.RouteListFiltered(family(to.Addr()), &netlink.Route{Dst: ipNet(to)}, netlink.RT_FILTER_DST)
	if err != nil {
		return nil, fmt.Errorf("routes of %s to %s: %w", h.Name, to, err)
	}
	var hops []netip.Addr
	for _, r := range routes {
		if gateway, ok := netip.AddrFromSlice(r.Gw); ok {
			hops = append(hops, gateway.Unmap())
		}
		for _, path := range r.MultiPath {
			if gateway, ok := netip.AddrFromSlice(path.Gw); ok {
				hops = append(hops, gateway.Unmap())
			}
		}
	}
	return hops, nil
}
