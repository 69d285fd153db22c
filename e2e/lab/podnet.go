package lab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"strings"

	"github.com/u-root/u-root/pkg/kmodule"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// PodNetwork is how pods reach each other and everybody else, in the place of a network plugin. In all of them the pods
// of a node have addresses of its pod CIDRs, and the range's first is their gateway.
type PodNetwork string

const (
	// Routed gives each pod a cable of its own to the node, and every machine of the lan static routes to the pods.
	Routed PodNetwork = "routed"
	// Bridge plugs the pods of a node into a bridge, whose subnet is the node's pod CIDR; routes are as in Routed. What
	// one pod sends to another of its node is not routed.
	Bridge PodNetwork = "bridge"
	// VXLAN joins such bridges by an overlay, as flannel does. The other machines of the lan have no route to the pods and
	// never see their addresses: a pod that leaves the overlay is masqueraded by its node, and the lan loses packets with a
	// pod's address as source, as the networks of clouds and nodes with rp_filter=1 do.
	VXLAN PodNetwork = "vxlan"
)

// What the pod CIDRs of all nodes are in.
var (
	podRange4 = netip.MustParsePrefix("10.244.0.0/16")
	podRange6 = netip.MustParsePrefix("fd44::/48")
)

// The devices of a node, called as flannel and its bridge plugin call them.
const (
	podBridge     = "cni0"
	overlayDevice = "flannel.1"
)

// overlayPort is the kernel's own default, and flannel's.
const overlayPort = 8472

// overlayMTU leaves room for the outer Ethernet, IPv4, UDP and VXLAN headers (RFC 7348, section 5).
const overlayMTU = 1500 - 50

// joinPodNetwork makes a node ready for pods.
func (n *Node) joinPodNetwork() error {
	switch n.lab.podNetwork {
	case Bridge:
		return n.addPodBridge()
	case VXLAN:
		return errors.Join(n.addPodBridge(), n.addOverlay(), n.masqueradePods())
	}
	return nil
}

// routePods gives the machines of the lan routes to every node's pods; of an overlay only the nodes have any.
func (l *Lab) routePods() error {
	var machines []*Host
	if l.podNetwork != VXLAN {
		machines = []*Host{l.Router, l.Bird, l.Client, l.API}
	} else if err := l.losePods(); err != nil {
		return err
	}
	for _, n := range l.Nodes {
		machines = append(machines, n.Host)
	}
	for _, h := range machines {
		if err := l.routePodsOn(h); err != nil {
			return err
		}
	}
	return nil
}

func (l *Lab) routePodsOn(h *Host) error {
	route := h.routeToPods
	if l.podNetwork == VXLAN {
		route = h.routeThroughOverlay
	}
	for _, n := range l.Nodes {
		if n.Name == h.Name {
			continue
		}
		if err := route(n); err != nil {
			return err
		}
	}
	return nil
}

func (h *Host) routeToPods(of *Node) error {
	return errors.Join(h.addRoute(of.Pods4, of.V4), h.addRoute(of.Pods6, of.V6))
}

// plugPod joins a pod's namespace to its node.
func (n *Node) plugPod(pod *Host, device string) (err error) {
	if pod.Link, err = newCable(n.namespace, device, pod.namespace, "eth0"); err != nil {
		return err
	}
	if n.lab.podNetwork == Routed {
		return n.plugIntoNode(pod, device)
	}
	return n.plugIntoBridge(pod)
}

// plugIntoNode gives the node's end the pods' gateway address and a route to just this pod.
func (n *Node) plugIntoNode(pod *Host, device string) error {
	for _, ipv6 := range []bool{false, true} {
		addr, gateway := pod.Addr(ipv6), n.gateway(ipv6)
		if err := errors.Join(
			n.addAddress(device, single(gateway)),
			n.addDeviceRoute(single(addr), device),
			pod.addAddress("eth0", single(addr)),
			pod.addDeviceRoute(single(gateway), "eth0"),
			pod.addRoute(netip.PrefixFrom(unspecified(addr), 0), gateway),
		); err != nil {
			return err
		}
	}
	return nil
}

// plugIntoBridge makes the node's end a port that also sends back where a frame came from (hairpin mode): a pod may be
// the endpoint of the Service that it asks.
func (n *Node) plugIntoBridge(pod *Host) error {
	pod.Link.hairpin = true
	if err := errors.Join(pod.Link.setMTU(n.lab.podNetwork.mtu()), pod.Link.connect(podBridge)); err != nil {
		return err
	}
	for _, ipv6 := range []bool{false, true} {
		addr := pod.Addr(ipv6)
		if err := errors.Join(
			pod.addAddress("eth0", netip.PrefixFrom(addr, n.pods(ipv6).Bits())),
			pod.addRoute(netip.PrefixFrom(unspecified(addr), 0), n.gateway(ipv6)),
		); err != nil {
			return err
		}
	}
	return nil
}

func (p PodNetwork) mtu() int {
	if p == VXLAN {
		return overlayMTU
	}
	return 1500
}

func (n *Node) pods(ipv6 bool) netip.Prefix {
	if ipv6 {
		return n.Pods6
	}
	return n.Pods4
}

func (n *Node) gateway(ipv6 bool) netip.Addr { return n.pods(ipv6).Addr().Next() }

// addPodBridge makes the bridge for the node's pods. Its hardware address is given, else it would change with the ports.
func (n *Node) addPodBridge() error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.HardwareAddr = podBridge, n.lab.podNetwork.mtu(), macFor(n.gateway(false))
	if err := n.addDevice(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
		return err
	}
	return errors.Join(
		n.filterBridged(),
		n.addAddress(podBridge, netip.PrefixFrom(n.gateway(false), n.Pods4.Bits())),
		n.addAddress(podBridge, netip.PrefixFrom(n.gateway(true), n.Pods6.Bits())),
	)
}

// filterBridged lets packets that stay on a bridge pass the node's IP hooks, which every network plugin with a bridge
// asks for: a pod's reply to a client on the same bridge does not come through the node's IP stack otherwise, and
// nobody there could give it the Service's address again.
func (n *Node) filterBridged() error {
	if _, err := os.Stat("/proc/sys/net/bridge"); errors.Is(err, fs.ErrNotExist) {
		if err := kmodule.Probe("br_netfilter", ""); err != nil {
			return fmt.Errorf("load module br_netfilter: %w", err)
		}
	}
	return n.sysctl(map[string]string{
		"net/bridge/bridge-nf-call-iptables":  "1",
		"net/bridge/bridge-nf-call-ip6tables": "1",
	})
}

// addOverlay makes the node's end of the overlay, whose addresses are the first of its pod CIDRs, as flannel's are. It
// learns nothing: routeThroughOverlay says where the others are.
func (n *Node) addOverlay() error {
	underlay, err := n.kernel.LinkByName("eth0")
	if err != nil {
		return fmt.Errorf("find eth0 in %s: %w", n.name(), err)
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.HardwareAddr = overlayDevice, overlayMTU, n.overlayMAC()
	device := &netlink.Vxlan{
		LinkAttrs: attrs, VxlanId: 1, VtepDevIndex: underlay.Attrs().Index, SrcAddr: n.V4.AsSlice(), Port: overlayPort,
	}
	return errors.Join(
		n.addDevice(device),
		n.addAddress(overlayDevice, single(n.Pods4.Addr())),
		n.addAddress(overlayDevice, single(n.Pods6.Addr())),
	)
}

// overlayMAC is the same after a reboot, so that the other nodes still know it.
func (n *Node) overlayMAC() net.HardwareAddr { return macFor(n.Pods4.Addr()) }

// macFor is a hardware address made from an IPv4 one, as network plugins make them.
func macFor(v4 netip.Addr) net.HardwareAddr {
	return append(net.HardwareAddr{0x0a, 0x58}, v4.AsSlice()...)
}

// routeThroughOverlay tells a node where another one's pods are: behind that one's end of the overlay, which has this
// hardware address and is at that machine. IPv6 goes over IPv4 too.
func (h *Host) routeThroughOverlay(to *Node) error {
	link, err := h.kernel.LinkByName(overlayDevice)
	if err != nil {
		return fmt.Errorf("find %s in %s: %w", overlayDevice, h.Name, err)
	}
	device := link.Attrs().Index
	machine := &netlink.Neigh{
		LinkIndex: device, Family: unix.AF_BRIDGE, Flags: netlink.NTF_SELF, State: netlink.NUD_PERMANENT,
		IP: to.V4.AsSlice(), HardwareAddr: to.overlayMAC(),
	}
	if err := h.kernel.NeighSet(machine); err != nil {
		return fmt.Errorf("tell %s of %s where %s is: %w", overlayDevice, h.Name, to.Name, err)
	}
	for _, ipv6 := range []bool{false, true} {
		pods := to.pods(ipv6)
		neighbor := &netlink.Neigh{
			LinkIndex: device, State: netlink.NUD_PERMANENT, IP: pods.Addr().AsSlice(), HardwareAddr: to.overlayMAC(),
		}
		route := &netlink.Route{LinkIndex: device, Dst: ipNet(pods), Gw: pods.Addr().AsSlice(), Flags: int(netlink.FLAG_ONLINK)}
		if err := errors.Join(h.kernel.NeighSet(neighbor), h.kernel.RouteAdd(route)); err != nil {
			return fmt.Errorf("route %s through the overlay in %s: %w", pods, h.Name, err)
		}
	}
	return nil
}

// masqueradePods hides pods behind the node where they leave the overlay, as --ip-masq of flannel does. What flannel
// also does is left out, since other overlays do not: to masquerade what comes from outside to another node's pods.
// That is up to who sends it there.
func (n *Node) masqueradePods() error {
	return n.nft(fmt.Sprintf(`table inet cni {
		chain postrouting {
			type nat hook postrouting priority srcnat
			ip saddr %[1]s ip daddr != { %[1]s, 224.0.0.0/4 } masquerade fully-random
			ip6 saddr %[2]s ip6 daddr != { %[2]s, ff00::/8 } masquerade fully-random
		}
	}`, podRange4, podRange6))
}

// losePods lets no packet of a pod pass a switch outside the overlay.
func (l *Lab) losePods() error {
	return l.network.bridges.nft(fmt.Sprintf(`table bridge underlay {
		chain forward {
			type filter hook forward priority filter
			ip saddr %s drop
			ip6 saddr %s drop
		}
	}`, podRange4, podRange6))
}

// nft gives a namespace rules, in the language of nft(8).
func (n *namespace) nft(rules string) error {
	h := Host{Name: strings.TrimPrefix(n.name, prefix), namespace: n}
	_, err := h.Run(context.Background(), "nft", rules)
	return err
}

// addDevice makes a device and sets it up.
func (n *namespace) addDevice(link netlink.Link) error {
	name := link.Attrs().Name
	if err := n.kernel.LinkAdd(link); err != nil {
		return fmt.Errorf("add %s %s in %s: %w", link.Type(), name, n.name, err)
	}
	if err := n.kernel.LinkSetUp(link); err != nil {
		return fmt.Errorf("set %s of %s up: %w", name, n.name, err)
	}
	return nil
}
