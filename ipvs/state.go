// Package ipvs says what a node's kernel should hold to serve Services, and what has to change for it to do so.
//
// It is pure: no netlink, no clock, no Kubernetes. A [State] is a value; [Diff] turns two of them into
// [Operation] values that print in the field's own syntax (ipvsadm -S lines, ip route, nft). Package
// ipvs/kernel reads and writes the real thing.
package ipvs

import (
	"cmp"
	"fmt"
	"net/netip"
)

// Protocol is an IP protocol number (IANA protocol-numbers) that IPVS balances; 0 for a firewall mark.
type Protocol uint8

// The protocols that IPVS knows by address and port (include/uapi/linux/in.h).
const (
	TCP  Protocol = 6
	UDP  Protocol = 17
	SCTP Protocol = 132
)

// String gives the name Kubernetes uses: TCP, UDP, SCTP, or the number.
func (p Protocol) String() string {
	switch p {
	case TCP:
		return "TCP"
	case UDP:
		return "UDP"
	case SCTP:
		return "SCTP"
	}
	return fmt.Sprintf("%d", uint8(p))
}

// Frontend is what the kernel finds a virtual server by: address, port and protocol, or a firewall mark
// and a family. It is comparable and is the key of a virtual server everywhere.
type Frontend struct {
	Protocol Protocol       // 0 if Mark is set
	Addr     netip.AddrPort // zero if Mark is set
	Mark     uint32         // firewall mark, 0 = by address
	IPv6     bool           // the family of a mark; for an address it equals Addr.Addr().Is6()
}

// At is the frontend at an address and port.
func At(p Protocol, addr netip.AddrPort) Frontend {
	return Frontend{Protocol: p, Addr: addr, IPv6: addr.Addr().Is6()}
}

// String is the frontend as an operator writes it: 10.0.0.1:80/TCP, [fd00::1]:53/UDP, fwmark 7.
func (f Frontend) String() string {
	if f.Mark != 0 {
		if f.IPv6 {
			return fmt.Sprintf("fwmark %d IPv6", f.Mark)
		}
		return fmt.Sprintf("fwmark %d", f.Mark)
	}
	return f.Addr.String() + "/" + f.Protocol.String()
}

// Compare orders frontends by mark, family, address, port and protocol.
func (f Frontend) Compare(g Frontend) int {
	return cmp.Or(
		cmp.Compare(f.Mark, g.Mark),
		compareBool(f.IPv6, g.IPv6),
		f.Addr.Compare(g.Addr),
		cmp.Compare(f.Protocol, g.Protocol),
	)
}

func compareBool(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	}
	return 1
}

// Flags are the bits of a virtual server (include/uapi/linux/ip_vs.h, IP_VS_SVC_F_*), as far as an
// operator chooses them. Persistence has a field of its own.
type Flags uint32

// Scheduler flags: what each of the three means depends on the scheduler (sh and mh name them).
const (
	OnePacket  Flags = 0x0004 // each UDP packet is scheduled alone
	SchedFlag1 Flags = 0x0008 // sh-fallback, mh-fallback
	SchedFlag2 Flags = 0x0010 // sh-port, mh-port
	SchedFlag3 Flags = 0x0020
)

// VirtualServer is one frontend and how it chooses among its real servers.
type VirtualServer struct {
	Frontend    Frontend
	Scheduler   string // name of the kernel's scheduler: rr, wrr, lc, mh, ...
	Flags       Flags
	Persistence uint32 // seconds a client stays with a real server; 0 = no persistence
	Netmask     uint8  // leading bits of the client's address that persistence looks at; 0 = all of them
	Engine      string // persistence engine, "" or "sip"
}

// Forwarding is how a packet reaches a real server.
type Forwarding uint8

// The kernel's forwarding methods (IP_VS_CONN_F_*).
const (
	Masq   Forwarding = 0 // destination NAT
	Local  Forwarding = 1 // the node itself
	Tunnel Forwarding = 2
	Droute Forwarding = 3 // direct routing
)

// Tunnel encapsulations (IP_VS_CONN_F_TUNNEL_TYPE_*), for Forwarding Tunnel.
const (
	TunnelIPIP uint8 = 0
	TunnelGUE  uint8 = 1
	TunnelGRE  uint8 = 2
)

// RealServer is one back end of a virtual server, an endpoint in Kubernetes' words.
type RealServer struct {
	Addr        netip.AddrPort
	Forwarding  Forwarding
	Weight      int32  // 0 = no new connections; at most 65535
	Upper       uint32 // connections at which the server takes no more; 0 = no limit
	Lower       uint32 // connections at which it takes some again
	TunnelType  uint8  // TunnelIPIP, TunnelGUE, TunnelGRE
	TunnelPort  uint16 // GUE only
	TunnelFlags uint16 // IP_VS_TUNNEL_ENCAP_FLAG_*
}

// Set names a set of our nftables table of one family; the kernel package declares it.
type Set string

// The sets. Frontend sets hold address . protocol . port, prefix sets hold address ranges.
const (
	// Frontends is every address, protocol and port that we serve. It is also our claim of ownership: a
	// virtual server in the kernel is ours if, and only if, its frontend is in this set.
	Frontends Set = "frontends"
	// Masquerade is the frontends whose clients outside the node's pods are hidden behind the node.
	Masquerade Set = "masqueraded"
	// VIPs is the addresses that belong to Services: what is not a known frontend there is rejected, and
	// the kernel does not answer ARP for them.
	VIPs Set = "vips"
	// ServiceCIDRs is the ranges that cluster IPs come from; an address in them that no Service has is dropped.
	ServiceCIDRs Set = "service_cidrs"
	// Pods is the ranges of this node's own pods, which are clients in the cluster.
	Pods Set = "pods"
	// Kept is the ranges of sources whose address is kept on the way to any frontend: the pods' as well.
	Kept Set = "kept"
	// Hairpin is the local endpoints: one that reaches itself through a Service is masqueraded.
	Hairpin Set = "hairpin"
	// Dropped is the frontends that new connections get no answer from: those of traffic policy Local on a node
	// without an endpoint.
	Dropped Set = "dropped"
	// Restricted is the frontends that only the sources in Allowed may reach.
	Restricted Set = "restricted"
	// Allowed is frontends with the ranges of the sources that may reach them.
	Allowed Set = "allowed"
	// Shortcuts leads frontends to firewall marks, for clients in the cluster: they get the virtual server of the mark
	// in the place of the frontend's own. A virtual server of a mark is ours if, and only if, the mark is in here.
	Shortcuts Set = "shortcuts"
)

// Element is one member of one set, comparable. Sets of frontends have Frontend, of ranges Prefix; Allowed has both, and
// Shortcuts has Frontend and Mark.
type Element struct {
	Set      Set
	Prefix   netip.Prefix
	Frontend Frontend
	Mark     uint32
}

// OfFrontend tells whether the element belongs to a frontend, and so to whoever has that.
func (e Element) OfFrontend() bool { return e.Frontend != Frontend{} }

// IPv6 tells the family of the table the element is in.
func (e Element) IPv6() bool {
	if e.OfFrontend() {
		return e.Frontend.IPv6
	}
	return e.Prefix.Addr().Is6()
}

// State is what a node's kernel should hold, or holds, of ours. The zero value is empty and ready for reading;
// use [State.AddVirtualServer] and its siblings to fill it.
type State struct {
	VirtualServers map[Frontend]VirtualServer
	RealServers    map[Frontend]map[netip.AddrPort]RealServer
	Routes         map[netip.Prefix]netip.Addr // local routes: what the node takes as its own, and the source address it then uses
	Elements       map[Element]struct{}
}

// AddVirtualServer puts a virtual server and its real servers into the state.
func (s *State) AddVirtualServer(v VirtualServer, reals ...RealServer) {
	if s.VirtualServers == nil {
		s.VirtualServers = map[Frontend]VirtualServer{}
		s.RealServers = map[Frontend]map[netip.AddrPort]RealServer{}
	}
	s.VirtualServers[v.Frontend] = v
	if s.RealServers[v.Frontend] == nil {
		s.RealServers[v.Frontend] = make(map[netip.AddrPort]RealServer, len(reals))
	}
	for _, r := range reals {
		s.RealServers[v.Frontend][r.Addr] = r
	}
}

// AddRoute makes the addresses of a prefix local; src is the address that connections the node opens
// to them come from (the zero Addr leaves that to the kernel, which takes the address itself).
func (s *State) AddRoute(p netip.Prefix, src netip.Addr) {
	if s.Routes == nil {
		s.Routes = map[netip.Prefix]netip.Addr{}
	}
	s.Routes[p.Masked()] = src
}

// AddPrefix puts a range of addresses into a set.
func (s *State) AddPrefix(set Set, p netip.Prefix) {
	s.addElement(Element{Set: set, Prefix: p.Masked()})
}

// AddFrontend puts a frontend into a set.
func (s *State) AddFrontend(set Set, f Frontend) { s.addElement(Element{Set: set, Frontend: f}) }

// Restrict lets only sources in the ranges reach a frontend: nobody, if there is none.
func (s *State) Restrict(f Frontend, sources ...netip.Prefix) {
	s.AddFrontend(Restricted, f)
	for _, p := range sources {
		s.AddSource(f, p)
	}
}

// AddSource lets one more range of sources reach a restricted frontend.
func (s *State) AddSource(f Frontend, p netip.Prefix) {
	s.addElement(Element{Set: Allowed, Frontend: f, Prefix: p.Masked()})
}

// The marks that are ours: those whose first byte is MarkBits.
const (
	MarkBits uint32 = 0x4c000000
	MarkMask uint32 = 0xff000000
)

// Marks is how many different marks [Mark] gives.
const Marks = 1 << 22

// Mark is mark number n of ours, of which Marks is taken off as often as need be. Bits 14 and 15 stay 0: there
// Kubernetes puts marks of its own, that packets be masqueraded or dropped.
func Mark(n uint32) uint32 {
	n %= Marks
	return MarkBits | n>>14<<16 | n&0x3fff
}

// AddShortcut leads clients in the cluster from a frontend to the virtual server of a mark.
func (s *State) AddShortcut(f Frontend, mark uint32) {
	s.addElement(Element{Set: Shortcuts, Frontend: f, Mark: mark})
}

func (s *State) addElement(e Element) {
	if s.Elements == nil {
		s.Elements = map[Element]struct{}{}
	}
	s.Elements[e] = struct{}{}
}
