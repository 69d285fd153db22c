package layer2

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/mdlayher/ethernet"
	"github.com/mdlayher/ndp"
	"github.com/mdlayher/packet"
	"golang.org/x/net/bpf"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"
)

// ndpWire speaks neighbour discovery on one link.
//
// It reads and writes whole frames rather than ICMPv6: neighbours verify an address by a solicitation sent to the address
// itself (RFC 4861 section 7.3.3), which an ICMPv6 socket sees only where the kernel takes the address as its own and the
// filter lets it through; and an answer need not wait until the kernel has resolved the one that asked. The source of what
// is sent is the announced address, as it is when the kernel answers for an address of a link, so the link needs no
// link-local address that has finished duplicate address detection.
type ndpWire struct {
	link   link
	conn   *packet.Conn
	groups *groups
}

// Lengths in bytes (IEEE 802.3, RFC 8200 section 3). Messages with extension headers are not read: nobody sends them, but for
// fragments, which RFC 6980 section 5 has ignored.
const (
	ethernetHeader = 14
	ipv6Header     = 40
)

func openNDP(l link) (wire, error) {
	const nextHeader, hopLimit, icmpType = ethernetHeader + 6, ethernetHeader + 7, ethernetHeader + ipv6Header
	filter, err := assemble(received(l, []bpf.Instruction{
		bpf.LoadAbsolute{Off: nextHeader, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.IPPROTO_ICMPV6, SkipTrue: 1},
		bpf.RetConstant{Val: 0},
		bpf.LoadAbsolute{Off: hopLimit, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: ndp.HopLimit, SkipTrue: 1},
		bpf.RetConstant{Val: 0},
		bpf.LoadAbsolute{Off: icmpType, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: uint32(ipv6.ICMPTypeNeighborSolicitation), SkipTrue: 2},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: uint32(ipv6.ICMPTypeNeighborAdvertisement), SkipTrue: 1},
		bpf.RetConstant{Val: 0},
	}))
	if err != nil {
		return nil, err
	}
	conn, err := packet.Listen(l.netInterface(), packet.Raw, unix.ETH_P_IPV6, &packet.Config{Filter: filter})
	if err != nil {
		return nil, fmt.Errorf("open NDP on %s: %w", l.name, err)
	}
	return &ndpWire{link: l, conn: conn, groups: newGroups(l)}, nil
}

// join joins the solicited-node group of the address, to which solicitations are sent (RFC 4861 section 7.2.1).
func (w *ndpWire) join(addr netip.Addr) error { return w.groups.join(addr) }
func (w *ndpWire) leave(addr netip.Addr)      { w.groups.leave(addr) }

func (w *ndpWire) close() {
	w.conn.Close()
	w.groups.close()
}

// announce sends an unsolicited advertisement to all nodes (RFC 4861 section 7.2.6).
func (w *ndpWire) announce(addr netip.Addr) error {
	return w.advertise(addr, false, allNodes, mac{0x33, 0x33, 0, 0, 0, 1})
}

var allNodes = netip.IPv6LinkLocalAllNodes()

// advertise sends one advertisement of an address. The override flag is always set: what neighbours had cached before is
// wrong. So is the router flag: a node forwards what it gets for a virtual address, which is being a router in the words of RFC
// 4861 section 2.1, and section 7.2.5 has neighbours act on it only where a router says that it is none any more.
func (w *ndpWire) advertise(addr netip.Addr, solicited bool, to netip.Addr, toMAC mac) error {
	message, err := ndp.MarshalMessageChecksum(&ndp.NeighborAdvertisement{
		Router:        true,
		Solicited:     solicited,
		Override:      true,
		TargetAddress: addr,
		Options:       []ndp.Option{&ndp.LinkLayerAddress{Direction: ndp.Target, Addr: w.link.mac[:]}},
	}, addr, to)
	if err != nil {
		return fmt.Errorf("advertise %s: %w", addr, err)
	}
	p := make([]byte, ipv6Header, ipv6Header+len(message))
	p[0] = 6 << 4
	binary.BigEndian.PutUint16(p[4:], uint16(len(message)))
	p[6] = unix.IPPROTO_ICMPV6
	p[7] = ndp.HopLimit
	copy(p[8:], addr.AsSlice())
	copy(p[24:], to.AsSlice())
	return sendFrame(w.conn, w.link.mac, toMAC, ethernet.EtherTypeIPv6, append(p, message...))
}

// serve answers solicitations sent to the group or to the address itself. One from the unspecified address is somebody's
// duplicate address detection: it is answered to all nodes and is not marked as solicited (RFC 4861 section 7.2.4).
func (w *ndpWire) serve(wanted func(netip.Addr) bool, claimed func(netip.Addr, mac), answered func()) error {
	buffer := make([]byte, 2048)
	for {
		n, _, err := w.conn.ReadFrom(buffer)
		if err != nil {
			return err
		}
		source, from, message, ok := parseNDP(buffer[:n])
		if !ok || from == w.link.mac {
			continue
		}
		switch m := message.(type) {
		case *ndp.NeighborSolicitation:
			if !wanted(m.TargetAddress) {
				continue
			}
			// An answer that cannot be sent is asked for again.
			if source.IsUnspecified() {
				err = w.announce(m.TargetAddress)
			} else {
				err = w.advertise(m.TargetAddress, true, source, linkLayer(m.Options, ndp.Source, from))
			}
			if err == nil {
				answered()
			}
		case *ndp.NeighborAdvertisement:
			if by := linkLayer(m.Options, ndp.Target, from); by != w.link.mac && wanted(m.TargetAddress) {
				claimed(m.TargetAddress, by)
			}
		}
	}
}

// linkLayer is the MAC address in a message's options, or another if there is none.
func linkLayer(options []ndp.Option, direction ndp.Direction, otherwise mac) mac {
	for _, o := range options {
		if l, ok := o.(*ndp.LinkLayerAddress); ok && l.Direction == direction {
			return mac(l.Addr)
		}
	}
	return otherwise
}

// parseNDP reads a frame that passed the filter: the source's IPv6 and MAC addresses and the message, unless it is one that RFC
// 4861 sections 7.1.1 and 7.1.2 have ignored.
func parseNDP(b []byte) (source netip.Addr, from mac, message ndp.Message, ok bool) {
	var frame ethernet.Frame
	if frame.UnmarshalBinary(b) != nil || len(frame.Payload) < ipv6Header {
		return source, from, nil, false
	}
	header, body := frame.Payload[:ipv6Header], frame.Payload[ipv6Header:]
	length := int(binary.BigEndian.Uint16(header[4:]))
	if length > len(body) || length < 4 {
		return source, from, nil, false
	}
	body = body[:length]
	if checksum(header[8:], body) != 0 || body[1] != 0 {
		return source, from, nil, false
	}
	message, err := ndp.ParseMessage(body)
	if err != nil {
		return source, from, nil, false
	}
	from = mac(frame.Source)
	source = netip.AddrFrom16([16]byte(header[8:24]))
	destination := netip.AddrFrom16([16]byte(header[24:40]))
	switch m := message.(type) {
	case *ndp.NeighborSolicitation:
		if source.IsUnspecified() {
			group, err := ndp.SolicitedNodeMulticast(m.TargetAddress)
			ok = err == nil && destination == group && linkLayer(m.Options, ndp.Source, mac{}) == mac{}
		} else {
			ok = !m.TargetAddress.IsMulticast()
		}
	case *ndp.NeighborAdvertisement:
		ok = !m.TargetAddress.IsMulticast() && !(destination.IsMulticast() && m.Solicited)
	}
	return source, from, message, ok
}

// checksum is the internet checksum of an ICMPv6 message with its own in it, 0 if that is right (RFC 8200 section 8.1).
// The addresses are those of the header, source and destination.
func checksum(addresses, message []byte) uint16 {
	sum := uint32(len(message)) + unix.IPPROTO_ICMPV6
	for _, b := range [][]byte{addresses, message} {
		for ; len(b) > 1; b = b[2:] {
			sum += uint32(binary.BigEndian.Uint16(b))
		}
		if len(b) == 1 {
			sum += uint32(b[0]) << 8
		}
	}
	for sum>>16 != 0 {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// groups is the solicited-node groups that are joined on a link. Several addresses may share a group. The kernel limits the
// groups of one socket by memory (net.core.optmem_max, 365 by default), so there are as many sockets as it takes; nothing is
// read from them.
type groups struct {
	link    link
	sockets []*groupSocket
	joined  map[netip.Addr]*membership // by group
}

type groupSocket struct {
	conn   *ndp.Conn
	groups int
}

type membership struct {
	socket    *groupSocket
	addresses int
}

const groupsPerSocket = 256

func newGroups(l link) *groups { return &groups{link: l, joined: map[netip.Addr]*membership{}} }

// join joins the group of an address. Each call needs a leave.
func (g *groups) join(addr netip.Addr) error {
	group, err := ndp.SolicitedNodeMulticast(addr)
	if err != nil {
		return fmt.Errorf("group of %s: %w", addr, err)
	}
	if m := g.joined[group]; m != nil {
		m.addresses++
		return nil
	}
	socket, err := g.socket()
	if err != nil {
		return err
	}
	if err := socket.conn.JoinGroup(group); err != nil {
		return fmt.Errorf("join group %s of %s on %s: %w", group, addr, g.link.name, err)
	}
	socket.groups++
	g.joined[group] = &membership{socket, 1}
	return nil
}

// leave leaves the group of an address if no other address needs it.
func (g *groups) leave(addr netip.Addr) {
	group, err := ndp.SolicitedNodeMulticast(addr)
	m := g.joined[group]
	if err != nil || m == nil {
		return
	}
	if m.addresses--; m.addresses > 0 {
		return
	}
	delete(g.joined, group)
	_ = m.socket.conn.LeaveGroup(group) // it fails if the link has gone, and the group with it
	m.socket.groups--
}

// socket is one that can take another group.
func (g *groups) socket() (*groupSocket, error) {
	for _, s := range g.sockets {
		if s.groups < groupsPerSocket {
			return s, nil
		}
	}
	conn, _, err := ndp.Listen(g.link.netInterface(), ndp.Unspecified)
	if err != nil {
		return nil, fmt.Errorf("open socket for groups on %s: %w", g.link.name, err)
	}
	var nothing ipv6.ICMPFilter
	nothing.SetAll(true)
	if err := conn.SetICMPFilter(&nothing); err != nil {
		conn.Close()
		return nil, fmt.Errorf("filter socket for groups on %s: %w", g.link.name, err)
	}
	s := &groupSocket{conn: conn}
	g.sockets = append(g.sockets, s)
	return s, nil
}

func (g *groups) close() {
	for _, s := range g.sockets {
		s.conn.Close()
	}
}
