package kernel

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/longshore-lb/longshore/ipvs"
)

// What kube-proxy v1.36 makes, and leaves when it ends (pkg/proxy/ipvs/proxier.go, pkg/proxy/ipvs/ipset.go,
// pkg/proxy/iptables/proxier.go, pkg/proxy/nftables/proxier.go). The kubelet has chains of its own, which stay.
const (
	kubeProxyDevice = "kube-ipvs0" // has every address of every Service, in mode ipvs
	kubeProxyTable  = "kube-proxy" // in mode nftables
)

var kubeProxyChain = regexp.MustCompile(`^KUBE-(SERVICES|EXTERNAL-SERVICES|NODEPORTS|NODE-PORT|POSTROUTING|MARK-MASQ|LOAD-BALANCER|FORWARD|` +
	`PROXY-FIREWALL|SOURCE-RANGES-FIREWALL|IPVS-FILTER|IPVS-OUT-FILTER|PROXY-CANARY|(SVC|SVL|SEP|FW|EXT)-[A-Z2-7]{16})$`)

// The ipsets of mode ipvs, without KUBE- and, in IPv6, KUBE-6-.
var (
	kubeProxyNodePorts = map[ipvs.Protocol]string{ipvs.TCP: "NODE-PORT-TCP", ipvs.UDP: "NODE-PORT-UDP", ipvs.SCTP: "NODE-PORT-SCTP-HASH"}
	kubeProxyIPSets    = []string{
		"LOOP-BACK", "CLUSTER-IP", "EXTERNAL-IP", "EXTERNAL-IP-LOCAL", "LOAD-BALANCER", "LOAD-BALANCER-LOCAL", "LOAD-BALANCER-FW",
		"LOAD-BALANCER-SOURCE-IP", "LOAD-BALANCER-SOURCE-CIDR", "NODE-PORT-TCP", "NODE-PORT-LOCAL-TCP", "NODE-PORT-UDP",
		"NODE-PORT-LOCAL-UDP", "NODE-PORT-SCTP-HASH", "NODE-PORT-LOCAL-SCTP-HASH", "HEALTH-CHECK-NODE-PORT", "IPVS-IPS",
	}
)

// kubeProxyIPSet is the whole name of an ipset: kube-proxy cuts what is too long.
func kubeProxyIPSet(name string, ipv6 bool) string {
	if !ipv6 {
		return "KUBE-" + name
	}
	name = "KUBE-6-" + name
	return name[:min(len(name), 31)]
}

// AdoptKubeProxy marks the virtual servers that a kube-proxy of mode ipvs has left as ours: those at the addresses of its
// interface, and those at addresses of this machine and ports in its sets of node ports. So the agent changes only what
// it wants otherwise, and open connections go on. It returns how many they are.
func (k *Kernel) AdoptKubeProxy() (int, error) {
	if err := k.Prepare(); err != nil {
		return 0, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	device, err := k.routes.LinkByName(kubeProxyDevice)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("find interface %s: %w", kubeProxyDevice, err)
	}
	addrs, err := k.routes.AddrList(nil, unix.AF_UNSPEC)
	if err != nil {
		return 0, fmt.Errorf("list addresses: %w", err)
	}
	bound, local := map[netip.Addr]bool{}, map[netip.Addr]bool{}
	for _, a := range addrs {
		addr, _ := netip.AddrFromSlice(a.IP)
		if a.LinkIndex == device.Attrs().Index {
			bound[addr.Unmap()] = true
		} else {
			local[addr.Unmap()] = true
		}
	}
	services, err := k.services()
	if err != nil {
		return 0, err
	}
	ports := map[string]map[uint16]bool{}
	var ops []ipvs.Operation
	for _, v := range services {
		f := v.Frontend
		theirs := bound[f.Addr.Addr()]
		if !theirs && local[f.Addr.Addr()] {
			if theirs, err = k.isKubeProxyNodePort(f, ports); err != nil {
				return 0, err
			}
		}
		if !theirs {
			continue
		}
		ops = append(ops, ipvs.Operation{Verb: ipvs.Add, Kind: ipvs.KindElement, Element: ipvs.Element{Set: ipvs.Frontends, Frontend: f}})
	}
	return len(ops), k.filter.apply(ops)
}

// isKubeProxyNodePort tells whether kube-proxy has noted a port of this machine as a node port. It keeps in known what it
// reads, by ipset.
func (k *Kernel) isKubeProxyNodePort(f ipvs.Frontend, known map[string]map[uint16]bool) (bool, error) {
	name, port := kubeProxyIPSet(kubeProxyNodePorts[f.Protocol], f.IPv6), f.Addr.Port()
	var err error
	if f.Protocol == ipvs.SCTP { // of type hash:ip,port, those of the others are bitmap:port
		protocol := uint8(f.Protocol)
		var is bool
		if is, err = k.routes.IpsetTest(name, &netlink.IPSetEntry{IP: f.Addr.Addr().AsSlice(), Protocol: &protocol, Port: &port}); err == nil {
			return is, nil
		}
	} else if known[name] == nil {
		known[name] = map[uint16]bool{}
		var set *netlink.IPSetResult
		if set, err = k.routes.IpsetList(name); err == nil {
			for _, e := range set.Entries {
				known[name][*e.Port] = true
			}
		}
	}
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return false, fmt.Errorf("look for port %d in ipset %s: %w", port, name, err)
	}
	return known[name][port], nil
}

// RemoveKubeProxy removes what kube-proxy of any mode has left, but for its virtual servers: its chains of iptables and
// its nftables tables in one transaction, so that the next packet finds ours; then its ipsets and its interface.
// Connections that its rules have led to an endpoint go on: conntrack remembers them. Rules of iptables-legacy cannot be
// removed here; the error says so if there may be any.
func (k *Kernel) RemoveKubeProxy() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := removeKubeProxyRules(); err != nil {
		return err
	}
	device, err := k.routes.LinkByName(kubeProxyDevice)
	switch {
	case errors.As(err, &netlink.LinkNotFoundError{}):
		return legacyIPTables()
	case err != nil:
		return fmt.Errorf("find interface %s: %w", kubeProxyDevice, err)
	}
	if err := k.destroyKubeProxyIPSets(); err != nil {
		return err
	}
	if err := k.routes.LinkDel(device); err != nil { // last: it is how an unfinished removal is known
		return fmt.Errorf("delete interface %s: %w", kubeProxyDevice, err)
	}
	return legacyIPTables()
}

func removeKubeProxyRules() error {
	conn, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	for _, family := range []nftables.TableFamily{nftables.TableFamilyIPv4, nftables.TableFamilyIPv6} {
		tables, err := conn.ListTablesOfFamily(family)
		if err != nil {
			return fmt.Errorf("list nftables tables: %w", err)
		}
		for _, t := range tables {
			if t.Name == kubeProxyTable {
				conn.DelTable(t)
			}
		}
		if err := dropKubeProxyChains(conn, family); err != nil {
			return err
		}
	}
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("remove kube-proxy's rules: %w", err)
	}
	return nil
}

// dropKubeProxyChains queues the deletion of kube-proxy's chains in the tables that iptables-nft keeps, and of the rules
// that lead to them.
func dropKubeProxyChains(conn *nftables.Conn, family nftables.TableFamily) error {
	chains, err := conn.ListChainsOfTableFamily(family)
	if err != nil {
		return fmt.Errorf("list nftables chains: %w", err)
	}
	isTheirs := func(table, chain string) bool {
		return (table == "nat" || table == "filter" || table == "mangle") && kubeProxyChain.MatchString(chain)
	}
	var theirs []*nftables.Chain
	tables := map[string]bool{} // with a chain of theirs
	for _, c := range chains {
		if isTheirs(c.Table.Name, c.Name) {
			theirs = append(theirs, c)
			tables[c.Table.Name] = true
		}
	}
	for _, c := range chains {
		if !tables[c.Table.Name] || isTheirs(c.Table.Name, c.Name) {
			continue
		}
		rules, err := conn.GetRules(c.Table, c)
		if err != nil {
			return fmt.Errorf("list the rules of chain %s in table %s: %w", c.Name, c.Table.Name, err)
		}
		for _, r := range rules {
			for _, e := range r.Exprs {
				v, ok := e.(*expr.Verdict)
				if !ok || !isTheirs(c.Table.Name, v.Chain) {
					continue
				}
				if c.Hooknum == nil {
					return fmt.Errorf("remove kube-proxy's rules: chain %s of table %s, which is not kube-proxy's, uses its chain %s",
						c.Name, c.Table.Name, v.Chain)
				}
				if err := conn.DelRule(r); err != nil {
					return fmt.Errorf("remove kube-proxy's rule in chain %s of table %s: %w", c.Name, c.Table.Name, err)
				}
			}
		}
	}
	for _, c := range theirs { // they lead to each other
		conn.FlushChain(c)
	}
	for _, c := range theirs {
		conn.DelChain(c)
	}
	return nil
}

// destroyKubeProxyIPSets destroys kube-proxy's ipsets. The kernel lets go of them some time after the rules that use them
// were deleted (nf_tables_trans_destroy_work, net/netfilter/nf_tables_api.c).
func (k *Kernel) destroyKubeProxyIPSets() error {
	deadline := time.Now().Add(5 * time.Second)
	for _, name := range kubeProxyIPSets {
		for _, ipv6 := range []bool{false, true} {
			name := kubeProxyIPSet(name, ipv6)
			for {
				err := k.routes.IpsetDestroy(name)
				if err == nil || errors.Is(err, unix.ENOENT) {
					break
				}
				if time.Now().After(deadline) {
					return fmt.Errorf("destroy ipset %s: %w", name, err)
				}
				time.Sleep(10 * time.Millisecond)
			}
		}
	}
	return nil
}

// legacyIPTables is an error if this network namespace has address translation by the older interface of iptables.
func legacyIPTables() error {
	for _, names := range []string{"/proc/net/ip_tables_names", "/proc/net/ip6_tables_names"} {
		if b, err := os.ReadFile(names); err == nil && strings.Contains("\n"+string(b), "\nnat\n") {
			return fmt.Errorf("iptables-legacy has a table nat on this node (%s): if kube-proxy's chains KUBE-* are in it, remove them there", names)
		}
	}
	return nil
}
