package layer2

import (
	"fmt"
	"net/netip"

	"github.com/mdlayher/arp"
	"github.com/mdlayher/ethernet"
	"github.com/mdlayher/packet"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// arpWire speaks ARP on one link. It uses the packets of mdlayher/arp and not its Client, which refuses a link without
// an IPv4 address and ends at the first malformed packet that anybody sends.
type arpWire struct {
	link link
	conn *packet.Conn
}

func openARP(l link) (wire, error) {
	filter, err := assemble(received(l, nil))
	if err != nil {
		return nil, err
	}
	conn, err := packet.Listen(l.netInterface(), packet.Raw, unix.ETH_P_ARP, &packet.Config{Filter: filter})
	if err != nil {
		return nil, fmt.Errorf("open ARP on %s: %w", l.name, err)
	}
	return &arpWire{link: l, conn: conn}, nil
}

// join has nothing to do: requests are broadcast or sent to the link's MAC address.
func (w *arpWire) join(netip.Addr) error { return nil }
func (w *arpWire) leave(netip.Addr)      {}
func (w *arpWire) close()                { w.conn.Close() }

// announce sends an ARP announcement (RFC 5227 section 3), a request for the address by the address, and the same as a reply,
// in which the target's MAC address is the sender's too (RFC 5944 section 4.6).
func (w *arpWire) announce(addr netip.Addr) error {
	if err := w.send(arp.OperationRequest, addr, mac{}, addr, broadcast); err != nil {
		return err
	}
	return w.send(arp.OperationReply, addr, w.link.mac, addr, broadcast)
}

var broadcast = mac(ethernet.Broadcast)

func (w *arpWire) send(op arp.Operation, addr netip.Addr, targetMAC mac, target netip.Addr, to mac) error {
	p, err := arp.NewPacket(op, w.link.mac[:], addr, targetMAC[:], target)
	if err != nil {
		return fmt.Errorf("ARP for %s: %w", addr, err)
	}
	payload, err := p.MarshalBinary()
	if err != nil {
		return fmt.Errorf("ARP for %s: %w", addr, err)
	}
	return sendFrame(w.conn, w.link.mac, to, ethernet.EtherTypeARP, payload)
}

// serve answers both broadcast requests and unicast ones, by which neighbours and switches verify what they know. A
// probe (RFC 5227 section 1.1: sender 0.0.0.0) is answered like any other request.
func (w *arpWire) serve(wanted func(netip.Addr) bool, claimed func(netip.Addr, mac), answered func()) error {
	buffer := make([]byte, 256)
	for {
		n, _, err := w.conn.ReadFrom(buffer)
		if err != nil {
			return err
		}
		var frame ethernet.Frame
		var p arp.Packet
		if frame.UnmarshalBinary(buffer[:n]) != nil || p.UnmarshalBinary(frame.Payload) != nil ||
			p.ProtocolType != uint16(ethernet.EtherTypeIPv4) || p.HardwareAddrLength != 6 || p.IPLength != 4 {
			continue
		}
		sender := mac(p.SenderHardwareAddr)
		if sender == w.link.mac {
			continue
		}
		if wanted(p.SenderIP) {
			claimed(p.SenderIP, sender)
		}
		if p.Operation == arp.OperationRequest && p.SenderIP != p.TargetIP && wanted(p.TargetIP) {
			// A reply that cannot be sent is asked for again.
			if w.send(arp.OperationReply, p.TargetIP, sender, p.SenderIP, sender) == nil {
				answered()
			}
		}
	}
}

// received is a filter that accepts the frames which came in by this very link for this node, and of these the ones that
// further instructions accept, if any; each of those must end in a verdict.
//
// A socket bound to a link is given the tagged frames of the VLANs above it as well, untagged and as if they were its own
// (net/core/dev.c, __netif_receive_skb_core: orig_dev): the index of the link tells them apart.
func received(l link, further []bpf.Instruction) []bpf.Instruction {
	const accept = 0xffff
	filter := []bpf.Instruction{
		bpf.LoadExtension{Num: bpf.ExtInterfaceIndex},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: uint32(l.index), SkipTrue: 1},
		bpf.RetConstant{Val: 0},
		bpf.LoadExtension{Num: bpf.ExtType},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.PACKET_OTHERHOST, SkipTrue: 1},
		bpf.RetConstant{Val: 0},
	}
	filter = append(filter, further...)
	return append(filter, bpf.RetConstant{Val: accept})
}

func assemble(filter []bpf.Instruction) ([]bpf.RawInstruction, error) {
	raw, err := bpf.Assemble(filter)
	if err != nil {
		return nil, fmt.Errorf("assemble packet filter: %w", err)
	}
	return raw, nil
}

func sendFrame(conn *packet.Conn, from, to mac, kind ethernet.EtherType, payload []byte) error {
	frame := ethernet.Frame{Destination: to[:], Source: from[:], EtherType: kind, Payload: payload}
	b, err := frame.MarshalBinary()
	if err != nil {
		return err
	}
	_, err = conn.WriteTo(b, &packet.Addr{HardwareAddr: to[:]})
	return err
}
