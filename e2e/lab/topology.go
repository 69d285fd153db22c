package lab

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// segment is a switch: one broadcast domain, a bridge in the namespace ls-switch.
type segment struct {
	bridge string
	v4, v6 netip.Prefix
}

var (
	lan = segment{"lan", netip.MustParsePrefix("172.31.0.0/24"), netip.MustParsePrefix("fd31::/64")}
	wan = segment{"wan", netip.MustParsePrefix("172.30.0.0/24"), netip.MustParsePrefix("fd30::/64")}
)

// LAN is the network that the nodes and the routers are in.
func LAN() (v4, v6 netip.Prefix) { return lan.v4, lan.v6 }

// WAN is the network behind the routers.
func WAN() (v4, v6 netip.Prefix) { return wan.v4, wan.v6 }

// addresses gives the segment's address number n; the IPv6 one is written with the same digits.
func (s segment) addresses(n int) (v4, v6 netip.Addr) {
	b4 := s.v4.Addr().As4()
	b4[3] = byte(n)
	return netip.AddrFrom4(b4), netip.MustParseAddr(s.v6.Addr().String() + strconv.Itoa(n))
}

// The last parts of the machines' addresses.
const (
	routerNumber  = 1
	birdNumber    = 2
	apiNumber     = 5
	nodeNumber    = 10 // node i has nodeNumber + i
	clientNumber  = 100
	outsideNumber = 100
)

// network is what joins the machines.
type network struct {
	bridges *namespace
	hosts   []*Host // every machine and pod, to be closed
}

func (n *network) close() {
	for _, h := range n.hosts {
		h.release()
	}
	n.bridges.release()
}

// wire makes every machine of the lab and joins them.
func (l *Lab) wire(nodes int) error {
	bridges, err := newNamespace("switch")
	if err != nil {
		return err
	}
	l.network = &network{bridges: bridges}
	if err := bridges.sysctl(map[string]string{"net/ipv6/conf/default/disable_ipv6": "1"}); err != nil {
		return err
	}
	for _, s := range []segment{lan, wan} {
		if err := s.create(bridges); err != nil {
			return err
		}
	}
	if err := l.wireMachines(); err != nil {
		return err
	}
	for i := 1; i <= nodes; i++ {
		n := newNode(i)
		if err := l.wireNode(n); err != nil {
			return err
		}
		l.Nodes = append(l.Nodes, n)
	}
	return l.routePods()
}

// create makes the segment's bridge. Multicast snooping is off: neighbour solicitations reach everyone, as in a
// switch without MLD snooping.
func (s segment) create(in *namespace) error {
	snooping := false
	attrs := netlink.NewLinkAttrs()
	attrs.Name = s.bridge
	return in.addDevice(&netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: &snooping})
}

// wireMachines makes all machines but the nodes.
func (l *Lab) wireMachines() error {
	type interfaceOf struct {
		segment segment
		number  int
	}
	machines := []struct {
		name       string
		host       **Host
		interfaces []interfaceOf // the first is eth0
		router     bool
	}{
		{"router", &l.Router, []interfaceOf{{lan, routerNumber}, {wan, routerNumber}}, true},
		{"bird", &l.Bird, []interfaceOf{{lan, birdNumber}, {wan, birdNumber}}, true},
		{"api", &l.API, []interfaceOf{{lan, apiNumber}}, false},
		{"client", &l.Client, []interfaceOf{{lan, clientNumber}}, false},
		{"outside", &l.Outside, []interfaceOf{{wan, outsideNumber}}, false},
	}
	for _, m := range machines {
		h, err := l.newHost(m.name)
		if err != nil {
			return err
		}
		*m.host = h
		for i, f := range m.interfaces {
			if err := l.plug(h, f.segment, f.number, "eth"+strconv.Itoa(i)); err != nil {
				return err
			}
		}
		if m.router {
			err = h.makeRouter()
		} else {
			err = h.defaultVia(m.interfaces[0].segment)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// newHost makes a machine without any cable. Duplicate address detection is off: it would take a second.
func (l *Lab) newHost(name string) (*Host, error) {
	ns, err := newNamespace(name)
	if err != nil {
		return nil, err
	}
	h := &Host{Name: name, lab: l, namespace: ns}
	l.network.hosts = append(l.network.hosts, h)
	return h, ns.sysctl(map[string]string{
		"net/ipv6/conf/all/accept_dad":     "0",
		"net/ipv6/conf/default/accept_dad": "0",
		"net/ipv6/conf/default/accept_ra":  "0",
		"net/ipv4/conf/all/rp_filter":      "0",
		"net/ipv4/conf/default/rp_filter":  "0",
		"net/ipv4/ping_group_range":        "0 0",
	})
}

// plug joins a machine to a segment by a cable, whose end in the machine is called device. The first one gives
// the machine its addresses.
func (l *Lab) plug(h *Host, s segment, number int, device string) error {
	k, err := newCable(l.network.bridges, s.bridge+"-"+h.Name, h.namespace, device)
	if err != nil {
		return err
	}
	if err := k.connect(s.bridge); err != nil {
		return err
	}
	v4, v6 := s.addresses(number)
	if h.Link == nil {
		h.Link, h.V4, h.V6 = k, v4, v6
	}
	return errors.Join(
		h.addAddress(device, netip.PrefixFrom(v4, s.v4.Bits())),
		h.addAddress(device, netip.PrefixFrom(v6, s.v6.Bits())),
	)
}

// makeRouter lets a machine forward, and spread flows over equal routes by address and port
// (fib_multipath_hash_policy 1, Documentation/networking/ip-sysctl.rst).
func (h *Host) makeRouter() error {
	return h.sysctl(map[string]string{
		"net/ipv4/ip_forward":                "1",
		"net/ipv6/conf/all/forwarding":       "1",
		"net/ipv4/fib_multipath_hash_policy": "1",
		"net/ipv6/fib_multipath_hash_policy": "1",
	})
}

// defaultVia sends everything else to the router.
func (h *Host) defaultVia(s segment) error {
	v4, v6 := s.addresses(routerNumber)
	return errors.Join(
		h.addRoute(netip.PrefixFrom(netip.IPv4Unspecified(), 0), v4),
		h.addRoute(netip.PrefixFrom(netip.IPv6Unspecified(), 0), v6),
	)
}

// wireNode makes the machine of a node.
func (l *Lab) wireNode(n *Node) (err error) {
	if n.Host, err = l.newHost(n.name()); err != nil {
		return err
	}
	if err := l.plug(n.Host, lan, nodeNumber+n.Index, "eth0"); err != nil {
		return err
	}
	return errors.Join(n.makeRouter(), n.defaultVia(lan), n.joinPodNetwork())
}

func single(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

func unspecified(like netip.Addr) netip.Addr {
	if like.Is4() {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

// addAddress gives a device an address at once usable.
func (n *namespace) addAddress(device string, p netip.Prefix) error {
	link, err := n.kernel.LinkByName(device)
	if err != nil {
		return fmt.Errorf("find %s in %s: %w", device, n.name, err)
	}
	a := &netlink.Addr{IPNet: ipNet(p), Flags: unix.IFA_F_NODAD}
	if err := n.kernel.AddrAdd(link, a); err != nil {
		return fmt.Errorf("add address %s to %s in %s: %w", p, device, n.name, err)
	}
	return nil
}

// addRoute adds a route through a gateway.
func (n *namespace) addRoute(to netip.Prefix, via netip.Addr) error {
	r := &netlink.Route{Dst: ipNet(to), Gw: via.AsSlice()}
	if err := n.kernel.RouteAdd(r); err != nil {
		return fmt.Errorf("add route %s via %s in %s: %w", to, via, n.name, err)
	}
	return nil
}

// addDeviceRoute adds a route to neighbours at a device.
func (n *namespace) addDeviceRoute(to netip.Prefix, device string) error {
	link, err := n.kernel.LinkByName(device)
	if err != nil {
		return fmt.Errorf("find %s in %s: %w", device, n.name, err)
	}
	r := &netlink.Route{Dst: ipNet(to), LinkIndex: link.Attrs().Index, Scope: netlink.SCOPE_LINK}
	if err := n.kernel.RouteAdd(r); err != nil {
		return fmt.Errorf("add route %s dev %s in %s: %w", to, device, n.name, err)
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
