package main

import (
	"context"
	"crypto/sha256"
	"encoding/base32"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/mdlayher/netlink"
	"github.com/moby/ipvs"
	"golang.org/x/sys/unix"

	"github.com/longshore-lb/longshore/e2e/lab"
)

// plane is what a proxy keeps in the kernel of its node, seen from outside. One goroutine uses it at a time.
type plane interface {
	// has asks the kernel about one endpoint alone; it is cheap.
	has(pair) (bool, error)
	// all reads everything; it takes the proxy's time away.
	all() (func(pair) bool, error)
	close()
}

// awaitAll waits until every pair is in the kernel and tells when that was. It asks often about one that is missing and
// reads everything only when that one has come.
func awaitAll(ctx context.Context, p plane, want []pair) (time.Time, error) {
	witness := want[len(want)-1]
	for {
		at, err := awaitOne(ctx, p, witness, 5*time.Millisecond)
		if err != nil {
			return at, err
		}
		has, err := p.all()
		if err != nil {
			return at, err
		}
		i := slices.IndexFunc(want, func(w pair) bool { return !has(w) })
		if i < 0 {
			return at, nil
		}
		witness = want[i]
	}
}

// awaitOne waits until a pair is in the kernel and tells when it was seen.
func awaitOne(ctx context.Context, p plane, want pair, interval time.Duration) (time.Time, error) {
	for {
		ok, err := p.has(want)
		if err != nil || ok {
			return time.Now(), err
		}
		select {
		case <-ctx.Done():
			return time.Now(), fmt.Errorf("endpoint %s of Service %s is not in the kernel: %w", want.endpoint, serviceName(want.service), context.Cause(ctx))
		case <-time.After(interval):
		}
	}
}

// ipvsPlane is virtual and real servers.
type ipvsPlane struct {
	node   *lab.Node
	handle *ipvs.Handle
}

func openIPVS(n *lab.Node) (plane, error) {
	h, err := ipvs.New("/run/netns/" + n.NetNS())
	if err != nil {
		return nil, fmt.Errorf("open IPVS on %s: %w", n.Name, err)
	}
	return &ipvsPlane{n, h}, nil
}

func (p *ipvsPlane) close() { p.handle.Close() }

func (p *ipvsPlane) has(want pair) (bool, error) {
	servers, err := p.handle.GetDestinations(&ipvs.Service{
		Address: net.IP(vip(want.service).AsSlice()), Port: servicePort, Protocol: unix.IPPROTO_TCP, AddressFamily: unix.AF_INET,
	})
	if err != nil {
		return false, fmt.Errorf("real servers of %s: %w", frontend(want.service), err)
	}
	return slices.ContainsFunc(servers, func(d *ipvs.Destination) bool {
		addr, _ := netip.AddrFromSlice(d.Address)
		return addr.Unmap() == want.endpoint
	}), nil
}

func (p *ipvsPlane) all() (func(pair) bool, error) {
	var table []byte
	err := p.node.Do(func() (err error) {
		table, err = os.ReadFile("/proc/thread-self/net/ip_vs")
		return err
	})
	if err != nil {
		return nil, err
	}
	servers, err := parseTable(string(table))
	return func(want pair) bool {
		return slices.Contains(servers[frontend(want.service)], netip.AddrPortFrom(want.endpoint, targetPort))
	}, err
}

// parseTable reads /proc/net/ip_vs (ip_vs_info_seq_show in net/netfilter/ipvs/ip_vs_ctl.c): the real servers of the TCP
// virtual servers of IPv4.
func parseTable(text string) (map[netip.AddrPort][]netip.AddrPort, error) {
	table := map[netip.AddrPort][]netip.AddrPort{}
	var current netip.AddrPort
	for line := range strings.Lines(text) {
		words := strings.Fields(line)
		if len(words) < 3 || strings.Contains(line, "Address") || words[0] == "IP" {
			continue
		}
		if words[0] != "->" {
			current = netip.AddrPort{}
		}
		if words[0] != "TCP" && words[0] != "->" || strings.HasPrefix(words[1], "[") {
			continue
		}
		at, err := parseHex(words[1])
		if err != nil {
			return nil, fmt.Errorf("/proc/net/ip_vs: line %q: %w", strings.TrimSpace(line), err)
		}
		switch {
		case words[0] == "TCP":
			current = at
			table[current] = make([]netip.AddrPort, 0, perService)
		case current.IsValid():
			table[current] = append(table[current], at)
		}
	}
	return table, nil
}

// parseHex reads 0A600001:0050.
func parseHex(text string) (netip.AddrPort, error) {
	addr, port, _ := strings.Cut(text, ":")
	a, err := strconv.ParseUint(addr, 16, 32)
	if err != nil {
		return netip.AddrPort{}, err
	}
	p, err := strconv.ParseUint(port, 16, 16)
	return netip.AddrPortFrom(plus(netip.IPv4Unspecified(), int(a)), uint16(p)), err
}

// nftPlane is the chains of kube-proxy's nftables mode: one for each endpoint, made in the same transaction as the rule
// that leads to it.
type nftPlane struct{ conn *netlink.Conn }

func openNFT(n *lab.Node) (plane, error) {
	p := &nftPlane{}
	err := n.Do(func() (err error) {
		p.conn, err = netlink.Dial(unix.NETLINK_NETFILTER, nil)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open nftables on %s: %w", n.Name, err)
	}
	return p, nil
}

func (p *nftPlane) close() { p.conn.Close() }

// The table of kube-proxy, and the attributes of a chain (include/uapi/linux/netfilter/nf_tables.h).
const (
	nftTable     = "kube-proxy"
	nftAttrTable = 1 // NFTA_CHAIN_TABLE
	nftAttrName  = 3 // NFTA_CHAIN_NAME
)

// endpointChain is the name of an endpoint's chain (servicePortEndpointChainNameBase in pkg/proxy/nftables/proxier.go).
func endpointChain(p pair) string {
	return "endpoint-" + hashed(fmt.Sprintf("%s/%s/tcp/%s__%s/%d", namespace, serviceName(p.service), portName, p.endpoint, targetPort))
}

// hashed is a name with a hash before it (hashAndTruncate there).
func hashed(name string) string {
	hash := sha256.Sum256([]byte(name))
	return base32.StdEncoding.EncodeToString(hash[:])[:8] + "-" + name
}

func (p *nftPlane) has(want pair) (bool, error) {
	_, err := p.chains(0, func(e *netlink.AttributeEncoder) {
		e.String(nftAttrTable, nftTable)
		e.String(nftAttrName, endpointChain(want))
	})
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	return err == nil, err
}

func (p *nftPlane) all() (func(pair) bool, error) {
	names, err := p.chains(netlink.Dump, func(*netlink.AttributeEncoder) {})
	return func(want pair) bool { return names[endpointChain(want)] }, err
}

// chains asks for chains of family ip and returns their names.
func (p *nftPlane) chains(flags netlink.HeaderFlags, filter func(*netlink.AttributeEncoder)) (map[string]bool, error) {
	e := netlink.NewAttributeEncoder()
	filter(e)
	attrs, err := e.Encode()
	if err != nil {
		return nil, err
	}
	answers, err := p.conn.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETCHAIN, Flags: netlink.Request | flags},
		Data:   append([]byte{unix.AF_INET, unix.NFNETLINK_V0, 0, 0}, attrs...),
	})
	if err != nil {
		return nil, fmt.Errorf("chains of nftables: %w", err)
	}
	names := make(map[string]bool, len(answers))
	for _, m := range answers {
		d, err := netlink.NewAttributeDecoder(m.Data[4:])
		if err != nil {
			return nil, err
		}
		for d.Next() {
			if d.Type() == nftAttrName {
				names[d.String()] = true
			}
		}
		if err := d.Err(); err != nil {
			return nil, err
		}
	}
	return names, nil
}
