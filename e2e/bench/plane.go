package main

import (
	"context"
	"crypto/sha256"
	"encoding/base32"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
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
	// asked is how many netlink messages that has taken so far.
	asked() int
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
	node     *lab.Node
	handle   *ipvs.Handle
	messages int
}

func openIPVS(n *lab.Node) (plane, error) {
	h, err := ipvs.New("/run/netns/" + n.NetNS())
	if err != nil {
		return nil, fmt.Errorf("open IPVS on %s: %w", n.Name, err)
	}
	return &ipvsPlane{node: n, handle: h}, nil
}

func (p *ipvsPlane) asked() int { return p.messages }

func (p *ipvsPlane) close() { p.handle.Close() }

func (p *ipvsPlane) has(want pair) (bool, error) {
	p.messages++
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

// nftPlane is the chains of kube-proxy's nftables mode: one for each port of a Service, with a rule that looks an
// endpoint up in a map of its own (writeServiceToEndpointDNATs in pkg/proxy/nftables/proxier.go).
type nftPlane struct {
	conn     *nftables.Conn
	messages int
}

func openNFT(n *lab.Node) (plane, error) {
	p := &nftPlane{}
	err := n.Do(func() (err error) {
		p.conn, err = nftables.New(nftables.AsLasting())
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open nftables on %s: %w", n.Name, err)
	}
	return p, nil
}

func (p *nftPlane) asked() int { return p.messages }

func (p *nftPlane) close() { _ = p.conn.CloseLasting() }

// serviceChain is the name of a Service's chain (servicePortChainNameBase there).
func serviceChain(service int) string {
	return "service-" + hashed(fmt.Sprintf("%s/%s/tcp/%s", namespace, serviceName(service), portName))
}

// hashed is a name with a hash before it (hashAndTruncate there).
func hashed(name string) string {
	hash := sha256.Sum256([]byte(name))
	return base32.StdEncoding.EncodeToString(hash[:])[:8] + "-" + name
}

func (p *nftPlane) has(want pair) (bool, error) {
	endpoints, err := p.endpoints(want.service)
	return slices.Contains(endpoints, want.endpoint), err
}

// all reads the Services one after another as they are asked about.
func (p *nftPlane) all() (func(pair) bool, error) {
	known := map[int][]netip.Addr{}
	return func(want pair) bool {
		if _, ok := known[want.service]; !ok {
			endpoints, err := p.endpoints(want.service)
			if err != nil {
				return false // has says why
			}
			known[want.service] = endpoints
		}
		return slices.Contains(known[want.service], want.endpoint)
	}, nil
}

func (p *nftPlane) endpoints(service int) ([]netip.Addr, error) {
	table := &nftables.Table{Name: "kube-proxy", Family: nftables.TableFamilyIPv4}
	p.messages++
	rules, err := p.conn.GetRules(table, &nftables.Chain{Name: serviceChain(service)})
	if err != nil {
		return nil, fmt.Errorf("rules of Service %s: %w", serviceName(service), err)
	}
	var all []netip.Addr
	for _, r := range rules {
		for _, e := range r.Exprs {
			lookup, ok := e.(*expr.Lookup)
			if !ok {
				continue
			}
			p.messages++
			elements, err := p.conn.GetSetElements(&nftables.Set{Table: table, Name: lookup.SetName})
			if err != nil && strings.Contains(err.Error(), unix.ENOENT.Error()) { // the library does not wrap it
				return nil, nil // it was replaced just now
			}
			if err != nil {
				return nil, fmt.Errorf("endpoints of Service %s: %w", serviceName(service), err)
			}
			for _, e := range elements {
				if len(e.Val) >= 4 { // address . port
					all = append(all, netip.AddrFrom4([4]byte(e.Val)))
				}
			}
		}
	}
	return all, nil
}
