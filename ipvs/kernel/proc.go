package kernel

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strconv"

	"github.com/longshore-lb/longshore/ipvs"
)

// procTable is the kernel's own list of virtual and real servers in the network namespace of the reader
// (net/netfilter/ipvs/ip_vs_ctl.c, ip_vs_info_seq_show). It tells all real servers many times faster than netlink, which
// needs a request for each virtual server, but neither thresholds nor tunnels. Where other network namespaces of the machine have
// virtual servers too, it leaves some out: between two reads the kernel counts theirs and skips as many of ours. A virtual
// server that is listed is listed with all its real servers.
const procTable = "/proc/thread-self/net/ip_vs"

// readRealServers reads the real servers of the virtual servers that procTable lists.
func readRealServers() (map[ipvs.Frontend][]ipvs.RealServer, error) {
	f, err := os.Open(procTable)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	return parseRealServers(f)
}

var forwardings = map[string]ipvs.Forwarding{"Masq": ipvs.Masq, "Local": ipvs.Local, "Tunnel": ipvs.Tunnel, "Route": ipvs.Droute}

// parseRealServers reads what procTable prints. The virtual server of a mark is filed under the family of its real
// servers, which the kernel does not tell otherwise; without any it is left out.
func parseRealServers(r io.Reader) (map[ipvs.Frontend][]ipvs.RealServer, error) {
	out := map[ipvs.Frontend][]ipvs.RealServer{}
	var at ipvs.Frontend
	lines := bufio.NewScanner(r)
	for n := 1; lines.Scan(); n++ {
		fields := bytes.Fields(lines.Bytes())
		if n <= 3 || len(fields) < 2 { // three lines of title
			continue
		}
		var err error
		if string(fields[0]) == "->" {
			var real ipvs.RealServer
			if real, err = parseRealServer(fields); err == nil {
				at.IPv6 = real.Addr.Addr().Is6()
				out[at] = append(out[at], real)
			}
		} else {
			if at, err = parseFrontend(string(fields[0]), string(fields[1])); at.Mark == 0 {
				out[at] = nil
			}
		}
		if err != nil {
			return nil, fmt.Errorf("%s, line %d, %q: %w", procTable, n, lines.Text(), err)
		}
	}
	return out, lines.Err()
}

func parseFrontend(protocol, at string) (ipvs.Frontend, error) {
	numbers := map[string]ipvs.Protocol{"TCP": ipvs.TCP, "UDP": ipvs.UDP, "SCTP": ipvs.SCTP}
	if protocol == "FWM" {
		mark, err := strconv.ParseUint(at, 16, 32)
		return ipvs.Frontend{Mark: uint32(mark)}, err
	}
	addr, err := parseHex([]byte(at))
	return ipvs.At(numbers[protocol], addr), err
}

func parseRealServer(fields [][]byte) (ipvs.RealServer, error) {
	if len(fields) < 6 {
		return ipvs.RealServer{}, fmt.Errorf("%d fields, want 6", len(fields))
	}
	addr, err := parseHex(fields[1])
	if err != nil {
		return ipvs.RealServer{}, err
	}
	forwarding, ok := forwardings[string(fields[2])]
	if !ok {
		return ipvs.RealServer{}, fmt.Errorf("forwarding method %q", fields[2])
	}
	weight, err := strconv.ParseInt(string(fields[3]), 10, 32)
	return ipvs.RealServer{Addr: addr, Forwarding: forwarding, Weight: int32(weight)}, err
}

// parseHex reads 0A600001:01BB or [fd96:0000:0000:0000:0000:0000:0000:0001]:01BB.
func parseHex(text []byte) (netip.AddrPort, error) {
	colon := bytes.LastIndexByte(text, ':')
	if colon < 0 {
		return netip.AddrPort{}, fmt.Errorf("%q is no address", text)
	}
	number, err := strconv.ParseUint(string(text[colon+1:]), 16, 16)
	if err != nil {
		return netip.AddrPort{}, err
	}
	host := text[:colon]
	if len(host) > 0 && host[0] == '[' {
		addr, err := netip.ParseAddr(string(bytes.Trim(host, "[]")))
		return netip.AddrPortFrom(addr, uint16(number)), err
	}
	var four [4]byte
	if n, err := hex.Decode(four[:], host[:min(len(host), 8)]); err != nil || n != 4 || len(host) != 8 {
		return netip.AddrPort{}, fmt.Errorf("%q is no address", text)
	}
	return netip.AddrPortFrom(netip.AddrFrom4(four), uint16(number)), nil
}
