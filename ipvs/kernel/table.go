package kernel

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/longshore-lb/longshore/ipvs"
)

// encodeOperation is the request for an operation on a virtual or real server.
func encodeOperation(o ipvs.Operation) message {
	attrs := make(attributes, 0, 160)
	if o.Kind == ipvs.KindVirtualServer {
		attrs.nested(attrService, encodeVirtualServer(o.VirtualServer, o.Verb != ipvs.Delete))
		return message{command: [...]uint8{ipvs.Add: cmdNewService, ipvs.Update: cmdSetService, ipvs.Delete: cmdDelService}[o.Verb], attrs: attrs}
	}
	attrs.nested(attrService, encodeVirtualServer(o.VirtualServer, false))
	attrs.nested(attrDest, encodeRealServer(o.RealServer))
	return message{command: [...]uint8{ipvs.Add: cmdNewDest, ipvs.Update: cmdSetDest, ipvs.Delete: cmdDelDest}[o.Verb], attrs: attrs}
}

// encodeVirtualServer encodes what identifies a virtual server and, if whole, what it is.
func encodeVirtualServer(v ipvs.VirtualServer, whole bool) attributes {
	a := make(attributes, 0, 96)
	f := v.Frontend
	family := uint16(unix.AF_INET)
	if f.IPv6 {
		family = unix.AF_INET6
	}
	a.uint16(svcFamily, family)
	if f.Mark != 0 {
		a.uint32(svcMark, f.Mark)
	} else {
		a.uint16(svcProtocol, uint16(f.Protocol))
		a.bytes(svcAddr, inetAddr(f.Addr.Addr()))
		a.port(svcPort, f.Addr.Port())
	}
	if !whole {
		return a
	}
	a.text(svcScheduler, v.Scheduler)
	if v.Engine != "" {
		a.text(svcEngine, v.Engine)
	}
	flags := uint32(v.Flags)
	if v.Persistence > 0 {
		flags |= svcFlagPersistent
	}
	a.bytes(svcFlags, binary.NativeEndian.AppendUint32(binary.NativeEndian.AppendUint32(nil, flags), ^uint32(svcFlagHashed)))
	a.uint32(svcTimeout, v.Persistence)
	if f.IPv6 {
		a.uint32(svcNetmask, uint32(orElse(v.Netmask, 128)))
	} else {
		mask := ^uint32(0) << (32 - orElse(v.Netmask, 32))
		a.bytes(svcNetmask, binary.BigEndian.AppendUint32(nil, mask))
	}
	return a
}

func orElse(v, otherwise uint8) uint8 {
	if v == 0 {
		return otherwise
	}
	return v
}

func encodeRealServer(r ipvs.RealServer) attributes {
	a := make(attributes, 0, 96)
	family := uint16(unix.AF_INET)
	if r.Addr.Addr().Is6() {
		family = unix.AF_INET6
	}
	a.uint16(destFamily, family)
	a.bytes(destAddr, inetAddr(r.Addr.Addr()))
	a.port(destPort, r.Addr.Port())
	a.uint32(destForward, uint32(r.Forwarding))
	a.uint32(destWeight, uint32(r.Weight))
	a.uint32(destUpper, r.Upper)
	a.uint32(destLower, r.Lower)
	if r.Forwarding == ipvs.Tunnel {
		a.uint8(destTunnelType, r.TunnelType)
		a.port(destTunnelPort, r.TunnelPort)
		a.uint16(destTunnelFlags, r.TunnelFlags)
	}
	return a
}

// inetAddr is union nf_inet_addr: 16 bytes, an IPv4 address in the first four.
func inetAddr(a netip.Addr) []byte {
	b := make([]byte, 16)
	copy(b, a.AsSlice())
	return b
}

func readAddr(b []byte, family uint16) (netip.Addr, error) {
	switch {
	case family == unix.AF_INET && len(b) >= 4:
		return netip.AddrFrom4([4]byte(b)), nil
	case family == unix.AF_INET6 && len(b) >= 16:
		return netip.AddrFrom16([16]byte(b)), nil
	}
	return netip.Addr{}, fmt.Errorf("address of %d bytes in family %d", len(b), family)
}

// Table reads the kernel's whole table: everybody's virtual servers, not only ours. Its errors are those of netlink.
func (k *Kernel) Table() (ipvs.Table, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.table()
}

func (k *Kernel) table() (ipvs.Table, error) {
	var t ipvs.Table
	err := k.genl.read(message{command: cmdGetInfo}, false, func(b []byte) error {
		a, err := parse(b)
		if err != nil {
			return err
		}
		version := number(a[infoVersion])
		t.Version = [3]uint8{uint8(version >> 16), uint8(version >> 8), uint8(version)}
		t.Size = uint32(number(a[infoConnSize]))
		return nil
	})
	if err != nil {
		return t, fmt.Errorf("read IPVS version: %w", err)
	}
	if t.Services, err = k.services(); err != nil {
		return t, err
	}
	for i := range t.Services {
		if t.Services[i].RealServers, err = k.destinations(t.Services[i].Frontend); err != nil {
			return t, err
		}
	}
	return t, nil
}

// services lists the virtual servers, without their real servers.
func (k *Kernel) services() ([]ipvs.ObservedServer, error) {
	var out []ipvs.ObservedServer
	err := k.genl.read(message{command: cmdGetService}, true, func(b []byte) error {
		s, err := decodeVirtualServer(b)
		if err == nil {
			out = append(out, s)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list virtual servers: %w", err)
	}
	return out, nil
}

// destinations lists the real servers of one virtual server.
func (k *Kernel) destinations(f ipvs.Frontend) ([]ipvs.ObservedRealServer, error) {
	var out []ipvs.ObservedRealServer
	var attrs attributes
	attrs.nested(attrService, encodeVirtualServer(ipvs.VirtualServer{Frontend: f}, false))
	err := k.genl.read(message{command: cmdGetDest, attrs: attrs}, true, func(b []byte) error {
		r, err := decodeRealServer(b, f)
		if err == nil {
			out = append(out, r)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list real servers of %s: %w", f, err)
	}
	return out, nil
}

func decodeVirtualServer(b []byte) (ipvs.ObservedServer, error) {
	a, err := parseNested(b, attrService)
	if err != nil {
		return ipvs.ObservedServer{}, fmt.Errorf("virtual server: %w", err)
	}
	family := uint16(number(a[svcFamily]))
	v := ipvs.VirtualServer{
		Frontend:  ipvs.Frontend{IPv6: family == unix.AF_INET6},
		Scheduler: text(a[svcScheduler]),
		Engine:    text(a[svcEngine]),
	}
	if mark := uint32(number(a[svcMark])); mark != 0 {
		v.Frontend.Mark = mark
	} else {
		addr, err := readAddr(a[svcAddr], family)
		if err != nil {
			return ipvs.ObservedServer{}, fmt.Errorf("virtual server: %w", err)
		}
		v.Frontend.Protocol = ipvs.Protocol(number(a[svcProtocol]))
		v.Frontend.Addr = netip.AddrPortFrom(addr, port(a[svcPort]))
	}
	flags := uint32(0)
	if f := a[svcFlags]; len(f) >= 4 {
		flags = binary.NativeEndian.Uint32(f)
	}
	if flags&svcFlagPersistent != 0 {
		v.Persistence = uint32(number(a[svcTimeout]))
	}
	v.Flags = ipvs.Flags(flags) & (ipvs.OnePacket | ipvs.SchedFlag1 | ipvs.SchedFlag2 | ipvs.SchedFlag3)
	if v.Frontend.IPv6 {
		v.Netmask = uint8(number(a[svcNetmask])) % 128 // the whole address is 0, as in a zero VirtualServer
	} else if m := a[svcNetmask]; len(m) == 4 {
		for mask := binary.BigEndian.Uint32(m); mask != 0; mask <<= 1 {
			v.Netmask++
		}
		v.Netmask %= 32
	}
	return ipvs.ObservedServer{VirtualServer: v, Stats: decodeStats(a[svcStats64], a[svcStats])}, nil
}

func decodeRealServer(b []byte, f ipvs.Frontend) (ipvs.ObservedRealServer, error) {
	a, err := parseNested(b, attrDest)
	if err != nil {
		return ipvs.ObservedRealServer{}, fmt.Errorf("real server of %s: %w", f, err)
	}
	family := uint16(unix.AF_INET)
	if f.IPv6 {
		family = unix.AF_INET6
	}
	if v, ok := a[destFamily]; ok { // a tunnel may lead to the other family
		family = uint16(number(v))
	}
	addr, err := readAddr(a[destAddr], family)
	if err != nil {
		return ipvs.ObservedRealServer{}, fmt.Errorf("real server of %s: %w", f, err)
	}
	r := ipvs.RealServer{
		Addr:       netip.AddrPortFrom(addr, port(a[destPort])),
		Forwarding: ipvs.Forwarding(number(a[destForward]) & forwardMask),
		Weight:     int32(number(a[destWeight])),
		Upper:      uint32(number(a[destUpper])),
		Lower:      uint32(number(a[destLower])),
	}
	if r.Forwarding == ipvs.Tunnel {
		r.TunnelType = uint8(number(a[destTunnelType]))
		r.TunnelPort = port(a[destTunnelPort])
		r.TunnelFlags = uint16(number(a[destTunnelFlags]))
	}
	return ipvs.ObservedRealServer{
		RealServer: r,
		Active:     uint32(number(a[destActive])),
		Inactive:   uint32(number(a[destInactive])),
		Persistent: uint32(number(a[destPersistent])),
		Stats:      decodeStats(a[destStats64], a[destStats]),
	}, nil
}

func parseNested(b []byte, kind uint16) (map[uint16][]byte, error) {
	outer, err := parse(b)
	if err != nil {
		return nil, err
	}
	return parse(outer[kind])
}

// decodeStats prefers the 64 bit counters that kernels have since 4.1.
func decodeStats(wide, narrow []byte) ipvs.Stats {
	b := wide
	if b == nil {
		b = narrow
	}
	a, err := parse(b)
	if err != nil {
		return ipvs.Stats{}
	}
	var v [11]uint64 // IPVS_STATS_ATTR_CONNS = 1 ... IPVS_STATS_ATTR_OUTBPS = 10
	for i := range v {
		v[i] = number(a[uint16(i)])
	}
	return ipvs.Stats{
		Connections: v[1], InPackets: v[2], OutPackets: v[3], InBytes: v[4], OutBytes: v[5],
		CPS: v[6], InPPS: v[7], OutPPS: v[8], InBPS: v[9], OutBPS: v[10],
	}
}

// number reads an integer in host order, whatever its size.
func number(b []byte) uint64 {
	switch len(b) {
	case 1:
		return uint64(b[0])
	case 2:
		return uint64(binary.NativeEndian.Uint16(b))
	case 4:
		return uint64(binary.NativeEndian.Uint32(b))
	case 8:
		return binary.NativeEndian.Uint64(b)
	}
	return 0
}

func port(b []byte) uint16 {
	if len(b) < 2 {
		return 0
	}
	return binary.BigEndian.Uint16(b)
}

func text(b []byte) string { return string(bytes.TrimRight(b, "\x00")) }
