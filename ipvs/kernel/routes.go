package kernel

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/longshore-lb/longshore/ipvs"
)

// routeProtocol marks the routes that are ours (rtm_protocol; values from 192 on are free for private use,
// include/uapi/linux/rtnetlink.h names those taken).
const routeProtocol = 196

// localTable is RT_TABLE_LOCAL: what is in it belongs to the node itself.
const localTable = unix.RT_TABLE_LOCAL

func (k *Kernel) localRoute(p netip.Prefix, src netip.Addr) *netlink.Route {
	r := &netlink.Route{
		Family:    unix.AF_INET,
		Type:      unix.RTN_LOCAL,
		Table:     localTable,
		Protocol:  routeProtocol,
		Scope:     netlink.SCOPE_HOST,
		LinkIndex: k.loopback,
		Dst:       &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())},
	}
	if p.Addr().Is6() {
		r.Family = unix.AF_INET6
		r.Scope = netlink.SCOPE_UNIVERSE // IPv6 routes have no other
	}
	if src.IsValid() {
		r.Src = src.AsSlice()
	}
	return r
}

func (k *Kernel) applyRoute(o ipvs.Operation) error {
	switch o.Verb {
	case ipvs.Add, ipvs.Update:
		return k.routes.RouteReplace(k.localRoute(o.Route, o.Source))
	default:
		return k.routes.RouteDel(k.localRoute(o.Route, netip.Addr{}))
	}
}

// observeRoutes lists the local routes with our protocol number.
func (k *Kernel) observeRoutes(s *ipvs.State) error {
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		filter := &netlink.Route{Table: localTable, Protocol: routeProtocol}
		routes, err := k.routes.RouteListFiltered(family, filter, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_PROTOCOL)
		if err != nil {
			return fmt.Errorf("list local routes: %w", err)
		}
		for _, r := range routes {
			if r.Dst == nil {
				continue
			}
			addr, ok := netip.AddrFromSlice(r.Dst.IP)
			if !ok {
				continue
			}
			if family == unix.AF_INET {
				addr = addr.Unmap()
			}
			bits, _ := r.Dst.Mask.Size()
			src, _ := netip.AddrFromSlice(r.Src)
			s.AddRoute(netip.PrefixFrom(addr, bits), src.Unmap())
		}
	}
	return nil
}

// Addresses is the addresses this machine is reached at, the global unicast ones of the interface that the default
// route leads to, at most one of each family; without a default route those of the first interface that has any.
func (k *Kernel) Addresses() ([]netip.Addr, error) {
	var out []netip.Addr
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		routes, err := k.routes.RouteList(nil, family)
		if err != nil {
			return nil, fmt.Errorf("list routes: %w", err)
		}
		preferred := -1
		for _, r := range routes {
			if r.Dst == nil || r.Dst.IP.IsUnspecified() && maskBits(r.Dst.Mask) == 0 {
				preferred = r.LinkIndex
				break
			}
		}
		addrs, err := k.routes.AddrList(nil, family)
		if err != nil {
			return nil, fmt.Errorf("list addresses: %w", err)
		}
		var found netip.Addr
		for _, a := range addrs {
			addr, ok := netip.AddrFromSlice(a.IP)
			if addr = addr.Unmap(); !ok || !addr.IsGlobalUnicast() || a.LinkIndex == k.loopback {
				continue
			}
			if a.LinkIndex == preferred {
				found = addr
				break
			}
			if preferred < 0 && !found.IsValid() {
				found = addr
			}
		}
		if found.IsValid() {
			out = append(out, found)
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("this machine has no address: no interface but lo has a global one")
	}
	return out, nil
}

func maskBits(m net.IPMask) int {
	bits, _ := m.Size()
	return bits
}
