package ipvs

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strconv"
	"strings"
)

// ErrNoService is returned by [List] for a virtual server that is not in the table.
var ErrNoService = errors.New("no such service")

// ListOptions choose what [List] prints, as the options of `ipvsadm -L` do. The zero value is `ipvsadm -L -n`.
// If several of the first five are set, the first of them counts.
type ListOptions struct {
	Stats          bool // --stats: counters
	Rate           bool // --rate: rates per second
	Thresholds     bool // --thresholds: connection limits of real servers
	PersistentConn bool // --persistent-conn: persistence templates of real servers
	TunnelInfo     bool // --tun-info: encapsulation of real servers

	Exact  bool // --exact: counters and rates in full, never as 12K or 12M
	NoSort bool // --nosort: in the kernel's order

	Only *Frontend // -t, -u, --sctp-service or -f: one virtual server, without the banner
}

// List prints a table byte for byte as `ipvsadm -L -n` (version 1.31) does: addresses and ports as numbers, no
// name is looked up. It fails with [ErrNoService] if o.Only is not in the table, and with what w returns.
func List(w io.Writer, t Table, o ListOptions) error {
	services := t.Services
	out := bufio.NewWriter(w)
	if o.Only != nil {
		one, err := find(t, *o.Only)
		if err != nil {
			return fmt.Errorf("list %s: %w", *o.Only, err)
		}
		services = []ObservedServer{one}
	} else {
		fmt.Fprintf(out, "IP Virtual Server version %d.%d.%d (size=%d)\n", t.Version[0], t.Version[1], t.Version[2], t.Size)
	}
	if !o.NoSort {
		services = mergeSort(services, compareServers)
	}

	l := lister{w: out, o: o}
	l.title()
	for _, s := range services {
		l.server(s)
		reals := s.RealServers
		if !o.NoSort {
			reals = mergeSort(reals, compareRealServers)
		}
		for _, r := range reals {
			l.realServer(r)
		}
	}
	return out.Flush()
}

func find(t Table, f Frontend) (ObservedServer, error) {
	for _, s := range t.Services {
		if s.Frontend == f {
			return s, nil
		}
	}
	return ObservedServer{}, ErrNoService
}

// Save prints a table byte for byte as `ipvsadm -S -n` (version 1.31) does, which `ipvsadm -R` reads back.
// Thresholds and counters are not part of that form, and a [Local] real server is saved as [Droute]. It fails with
// what w returns.
func Save(w io.Writer, t Table) error {
	out := bufio.NewWriter(w)
	for _, s := range mergeSort(t.Services, compareServers) {
		fmt.Fprintln(out, SaveLine(s.VirtualServer))
		for _, r := range mergeSort(s.RealServers, compareRealServers) {
			fmt.Fprintln(out, SaveServerLine(s.Frontend, r.RealServer))
		}
	}
	return out.Flush()
}

// SaveLine is the virtual server in ipvsadm's -S syntax, such as `-A -t 10.0.0.1:80 -s rr -p 10800`.
func SaveLine(v VirtualServer) string {
	var b strings.Builder
	fmt.Fprintf(&b, "-A %s -s %s", serviceSwitch(v.Frontend), v.Scheduler)
	if v.Persistence != 0 {
		fmt.Fprintf(&b, " -p %d", v.Persistence)
		if mask, ok := mask(v); ok {
			b.WriteString(" -M " + mask)
		}
	}
	if v.Engine != "" {
		b.WriteString(" --pe " + v.Engine)
	}
	if v.Flags&OnePacket != 0 {
		b.WriteString(" -o")
	}
	if flags, ok := schedulerFlags(v); ok {
		b.WriteString(" -b " + flags)
	}
	return b.String()
}

// SaveServerLine is the real server of a frontend in ipvsadm's -S syntax, such as
// `-a -t 10.0.0.1:80 -r 10.244.1.2:80 -m -w 1`.
func SaveServerLine(f Frontend, r RealServer) string {
	line := fmt.Sprintf("-a %s -r %s %s -w %d", serviceSwitch(f), addrPort(r.Addr), forwardingSwitch(r.Forwarding), r.Weight)
	if r.Forwarding != Tunnel {
		return line
	}
	switch r.TunnelType {
	case TunnelIPIP:
		line += " --tun-type ipip"
	case TunnelGUE:
		line += fmt.Sprintf(" --tun-type gue --tun-port %d %s", r.TunnelPort, checksum(r.TunnelFlags).option())
	case TunnelGRE:
		line += " --tun-type gre " + checksum(r.TunnelFlags).option()
	}
	return line
}

// serviceSwitch is how the command line names a frontend: -t 10.0.0.1:80, -f 7 -6.
func serviceSwitch(f Frontend) string {
	if f.Mark != 0 {
		if f.IPv6 {
			return fmt.Sprintf("-f %d -6", signed(f.Mark))
		}
		return fmt.Sprintf("-f %d", signed(f.Mark))
	}
	option := "-t"
	switch f.Protocol {
	case UDP:
		option = "-u"
	case SCTP:
		option = "--sctp-service"
	}
	return option + " " + addrPort(f.Addr)
}

// forwardingSwitch is the option for a forwarding method. ipvsadm has none for Local, and writes -g.
func forwardingSwitch(f Forwarding) string {
	switch f {
	case Masq:
		return "-m"
	case Tunnel:
		return "-i"
	}
	return "-g"
}

// lister prints the lines of one listing.
type lister struct {
	w io.Writer
	o ListOptions
}

func (l lister) title() {
	const (
		local  = "Prot LocalAddress:Port"
		remote = "  -> RemoteAddress:Port"
	)
	switch {
	case l.o.Stats:
		fmt.Fprintf(l.w, "%-33s %8s %8s %8s %8s %8s\n%s\n", local, "Conns", "InPkts", "OutPkts", "InBytes", "OutBytes", remote)
	case l.o.Rate:
		fmt.Fprintf(l.w, "%-33s %8s %8s %8s %8s %8s\n%s\n", local, "CPS", "InPPS", "OutPPS", "InBPS", "OutBPS", remote)
	case l.o.Thresholds:
		fmt.Fprintf(l.w, "%-33s %-10s %-10s %-10s %-10s\n%s\n", local, "Uthreshold", "Lthreshold", "ActiveConn", "InActConn", remote)
	case l.o.PersistentConn:
		fmt.Fprintf(l.w, "%-33s %-9s %-11s %-10s %-10s\n%s\n", local, "Weight", "PersistConn", "ActiveConn", "InActConn", remote)
	case l.o.TunnelInfo:
		fmt.Fprintf(l.w, "%s Scheduler Flags\n%s           Forward TunnelInfo    Weight ActiveConn InActConn\n", local, remote)
	default:
		fmt.Fprintf(l.w, "%s Scheduler Flags\n%s           Forward Weight ActiveConn InActConn\n", local, remote)
	}
}

func (l lister) server(s ObservedServer) {
	name := serverName(s.Frontend)
	switch {
	case l.o.Stats:
		fmt.Fprintf(l.w, "%-33s%s\n", name, l.numbers(counters(s.Stats)...))
	case l.o.Rate:
		fmt.Fprintf(l.w, "%-33s%s\n", name, l.numbers(s.Stats.CPS, s.Stats.InPPS, s.Stats.OutPPS, s.Stats.InBPS, s.Stats.OutBPS))
	default:
		fmt.Fprintf(l.w, "%s %s%s\n", name, s.Scheduler, listedFlags(s.VirtualServer))
	}
}

func (l lister) realServer(r ObservedRealServer) {
	fmt.Fprintf(l.w, "  -> %-28s", addrPort(r.Addr))
	switch {
	case l.o.Stats:
		fmt.Fprintln(l.w, l.numbers(counters(r.Stats)...))
	case l.o.Rate:
		fmt.Fprintf(l.w, " %8d %8d %8d%s\n", r.Stats.CPS, r.Stats.InPPS, r.Stats.OutPPS, l.numbers(r.Stats.InBPS, r.Stats.OutBPS))
	case l.o.Thresholds:
		fmt.Fprintf(l.w, " %-10d %-10d %-10d %-10d\n", r.Upper, r.Lower, r.Active, r.Inactive)
	case l.o.PersistentConn:
		fmt.Fprintf(l.w, " %-9d %-11d %-10d %-10d\n", uint32(r.Weight), r.Persistent, r.Active, r.Inactive)
	case l.o.TunnelInfo:
		fmt.Fprintf(l.w, " %-7s %-13s %-6d %-10d %-10d\n",
			forwardingName(r.Forwarding), tunnelInfo(r.RealServer), r.Weight, r.Active, r.Inactive)
	default:
		fmt.Fprintf(l.w, " %-7s %-6d %-10d %-10d\n", forwardingName(r.Forwarding), r.Weight, r.Active, r.Inactive)
	}
}

// serverName is the first column of a virtual server.
func serverName(f Frontend) string {
	if f.Mark != 0 {
		if f.IPv6 {
			return fmt.Sprintf("FWM  %d IPv6", signed(f.Mark))
		}
		return fmt.Sprintf("FWM  %d", signed(f.Mark))
	}
	protocol := "?"
	switch f.Protocol {
	case TCP, UDP, SCTP:
		protocol = f.Protocol.String()
	}
	return fmt.Sprintf("%-4s %s", protocol, addrPort(f.Addr))
}

// listedFlags is what follows the scheduler's name in a listing.
func listedFlags(v VirtualServer) string {
	var b strings.Builder
	if flags, ok := schedulerFlags(v); ok {
		b.WriteString(" (" + flags + ")")
	}
	if v.Persistence != 0 {
		fmt.Fprintf(&b, " persistent %d", v.Persistence)
		if mask, ok := mask(v); ok {
			b.WriteString(" mask " + mask)
		}
		if v.Engine != "" {
			b.WriteString(" pe " + v.Engine)
		}
	}
	if v.Flags&OnePacket != 0 {
		b.WriteString(" ops")
	}
	return b.String()
}

// schedulerFlags names the scheduler's flags, and tells whether any is set. sh and mh have names for the first two and
// none for the third: ipvsadm then writes an empty list.
func schedulerFlags(v VirtualServer) (string, bool) {
	names := []string{"flag-1", "flag-2", "flag-3"}
	if v.Scheduler == "sh" || v.Scheduler == "mh" {
		names = []string{v.Scheduler + "-fallback", v.Scheduler + "-port"}
	}
	var set []string
	for i, name := range names {
		if v.Flags&(SchedFlag1<<i) != 0 {
			set = append(set, name)
		}
	}
	return strings.Join(set, ","), v.Flags&(SchedFlag1|SchedFlag2|SchedFlag3) != 0
}

// mask is the persistence netmask as ipvsadm writes it, dotted for IPv4 and bits for IPv6, and whether it is written:
// not if it covers the whole address.
func mask(v VirtualServer) (string, bool) {
	if v.Frontend.IPv6 {
		return strconv.Itoa(int(v.Netmask)), v.Netmask > 0 && v.Netmask < 128
	}
	if v.Netmask == 0 || v.Netmask >= 32 {
		return "", false
	}
	bits := ^uint32(0) << (32 - v.Netmask)
	return netip.AddrFrom4([4]byte{byte(bits >> 24), byte(bits >> 16), byte(bits >> 8), byte(bits)}).String(), true
}

func forwardingName(f Forwarding) string {
	switch f {
	case Masq:
		return "Masq"
	case Local:
		return "Local"
	case Tunnel:
		return "Tunnel"
	}
	return "Route"
}

// tunnelInfo is the encapsulation of a tunnel real server: ipip, gue:PORT:CHECKSUM, gre:CHECKSUM; n/a for the others.
func tunnelInfo(r RealServer) string {
	if r.Forwarding == Tunnel {
		switch r.TunnelType {
		case TunnelIPIP:
			return "ipip"
		case TunnelGUE:
			return fmt.Sprintf("gue:%d:%s", r.TunnelPort, checksum(r.TunnelFlags).short())
		case TunnelGRE:
			return "gre:" + checksum(r.TunnelFlags).short()
		}
	}
	return "n/a"
}

// checksum is how the outer header of a tunnel is protected (IP_VS_TUNNEL_ENCAP_FLAG_*, include/uapi/linux/ip_vs.h).
type checksum uint16

const (
	withChecksum   checksum = 1
	remoteChecksum checksum = 2
)

func (c checksum) option() string {
	switch c {
	case withChecksum:
		return "--tun-csum"
	case remoteChecksum:
		return "--tun-remcsum"
	}
	return "--tun-nocsum"
}

func (c checksum) short() string {
	switch c {
	case withChecksum:
		return "+c"
	case remoteChecksum:
		return "r+c"
	}
	return "-c"
}

func counters(s Stats) []uint64 {
	return []uint64{s.Connections, s.InPackets, s.OutPackets, s.InBytes, s.OutBytes}
}

// numbers prints counters or rates, each with the space before it.
func (l lister) numbers(values ...uint64) string {
	var b strings.Builder
	for _, v := range values {
		b.WriteString(l.number(v))
	}
	return b.String()
}

func (l lister) number(v uint64) string {
	if l.o.Exact {
		digits := strconv.FormatUint(v, 10)
		return fmt.Sprintf("%*s", max(9, len(digits)+1), digits)
	}
	switch {
	case v < 1e8:
		return fmt.Sprintf("%9d", v)
	case v < 1e9:
		return fmt.Sprintf("%8dK", v/1e3)
	case v < 1e11:
		return fmt.Sprintf("%8dM", v/1e6)
	case v < 1e14:
		return fmt.Sprintf("%8dG", v/1e9)
	}
	return fmt.Sprintf("%8dT", v/1e12)
}

// signed is a firewall mark as ipvsadm 1.31 prints and compares it.
func signed(mark uint32) int32 { return int32(mark) }

// addrPort writes an address as the C library's inet_ntop does, with its port.
func addrPort(a netip.AddrPort) string {
	if !a.Addr().Is6() {
		return a.String()
	}
	return "[" + inetNtop(a.Addr()) + "]:" + strconv.Itoa(int(a.Port()))
}

// inetNtop differs from netip for addresses of ::/96: glibc writes their last four bytes as an IPv4 address.
func inetNtop(a netip.Addr) string {
	b := a.As16()
	if [12]byte(b[:12]) == [12]byte{} && (b[12] != 0 || b[13] != 0) {
		return "::" + netip.AddrFrom4([4]byte(b[12:])).String()
	}
	return a.String()
}

// compareServers is ipvsadm's order of virtual servers. Differences are taken in 32 bits and their sign is
// looked at, so the order is not transitive: 10.0.0.1 comes before 100.64.0.1, that before 192.168.0.1, and that before
// 10.0.0.1.
func compareServers(a, b ObservedServer) int32 {
	f, g := a.Frontend, b.Frontend
	if d := signed(f.Mark - g.Mark); d != 0 {
		return d
	}
	if d := int32(compareBool(f.IPv6, g.IPv6)); d != 0 {
		return d
	}
	if d := int32(f.Protocol) - int32(g.Protocol); d != 0 {
		return d
	}
	return compareAddrPorts(f.Addr, g.Addr)
}

func compareRealServers(a, b ObservedRealServer) int32 { return compareAddrPorts(a.Addr, b.Addr) }

// compareAddrPorts looks at as many words of the addresses as the first one has.
func compareAddrPorts(a, b netip.AddrPort) int32 {
	x, y := words(a.Addr()), words(b.Addr())
	for i := range a.Addr().BitLen() / 32 {
		if d := int32(x[i] - y[i]); d != 0 {
			return d
		}
	}
	return int32(a.Port()) - int32(b.Port())
}

// words are the 32-bit words of an address, most significant first; an IPv4 address is the first one.
func words(a netip.Addr) [4]uint32 {
	var w [4]uint32
	for i, b := range a.AsSlice() {
		w[i/4] = w[i/4]<<8 | uint32(b)
	}
	return w
}

// mergeSort sorts as the C library's qsort does. With an order that is not transitive the result depends on the
// algorithm, so any other sort would print another order than ipvsadm for common addresses.
func mergeSort[T any](list []T, compare func(a, b T) int32) []T {
	if len(list) < 2 {
		return list
	}
	left := mergeSort(list[:len(list)/2], compare)
	right := mergeSort(list[len(list)/2:], compare)
	sorted := make([]T, 0, len(list))
	for len(left) > 0 && len(right) > 0 {
		if compare(left[0], right[0]) <= 0 {
			sorted, left = append(sorted, left[0]), left[1:]
		} else {
			sorted, right = append(sorted, right[0]), right[1:]
		}
	}
	return append(append(sorted, left...), right...)
}
