package kernel

import (
	"strings"
	"testing"

	"github.com/longshore-lb/longshore/ipvs"
)

// kubeProxyLeft is what a kube-proxy of mode ipvs leaves, cut down, between things of others.
const kubeProxyLeft = `
ip link add kube-ipvs0 type dummy
ip address add 10.96.0.1/32 dev kube-ipvs0
ip address add fd96::1/128 dev kube-ipvs0
ip link add eth0 type dummy
ip address add 172.31.0.11/24 dev eth0
ipvsadm -A -t 10.96.0.1:443 -s rr
ipvsadm -a -t 10.96.0.1:443 -r 172.31.0.5:6443 -m
ipvsadm -A -t [fd96::1]:443 -s rr
ipvsadm -A -t 172.31.0.11:30080 -s rr
ipvsadm -A -u 172.31.0.11:30080 -s rr
ipvsadm -A -t 172.31.0.11:30081 -s rr
ipvsadm -A -t 172.31.0.12:30080 -s rr
ipvsadm -A --sctp-service 172.31.0.11:30082 -s rr
ipvsadm -A --sctp-service 172.31.0.11:30083 -s rr
ipvsadm -A -f 7 -s rr
ipset create KUBE-NODE-PORT-TCP bitmap:port range 0-65535
ipset add KUBE-NODE-PORT-TCP 30080
ipset create KUBE-NODE-PORT-SCTP-HASH hash:ip,port
ipset add KUBE-NODE-PORT-SCTP-HASH 172.31.0.11,sctp:30082
ipset create KUBE-6-CLUSTER-IP hash:ip,port family inet6
ipset create KUBE-CLUSTER-IP hash:ip,port
ipset create MINE bitmap:port range 0-65535
iptables-restore <<END
*nat
:KUBE-SERVICES -
:KUBE-SEP-ABCDEFGH234567QR -
:KUBE-MARK-MASQ -
:KUBE-KUBELET-CANARY -
:MINE -
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A PREROUTING -j MINE
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A KUBE-SERVICES -m set --match-set KUBE-CLUSTER-IP dst,dst -j KUBE-MARK-MASQ
-A KUBE-SERVICES -j KUBE-SEP-ABCDEFGH234567QR
-A KUBE-SEP-ABCDEFGH234567QR -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.0.0.1:8080
-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
-A MINE -m comment --comment KUBE-SERVICES -j RETURN
COMMIT
*filter
:KUBE-FIREWALL -
:KUBE-FORWARD -
-A INPUT -j KUBE-FIREWALL
-A FORWARD -j KUBE-FORWARD
COMMIT
END
nft add table ip6 kube-proxy
nft add table ip kube-proxy-of-mine
`

func TestTakeOverFromKubeProxy(t *testing.T) {
	k := open(t)
	run(t, "sh", "-ec", kubeProxyLeft)
	n, err := k.AdoptKubeProxy()
	if err != nil || n != 4 {
		t.Errorf("%d virtual servers were adopted (%v), want 4", n, err)
	}
	ours := observe(t, k)
	for at, want := range map[ipvs.Frontend]bool{
		frontend(ipvs.TCP, "10.96.0.1:443"):      true,
		frontend(ipvs.TCP, "[fd96::1]:443"):      true,
		frontend(ipvs.TCP, "172.31.0.11:30080"):  true,
		frontend(ipvs.SCTP, "172.31.0.11:30082"): true,
		frontend(ipvs.SCTP, "172.31.0.11:30083"): false,
		frontend(ipvs.UDP, "172.31.0.11:30080"):  false, // its protocol has no set
		frontend(ipvs.TCP, "172.31.0.11:30081"):  false, // in no set
		frontend(ipvs.TCP, "172.31.0.12:30080"):  false, // another machine's address
		{Mark: 7}:                                false,
	} {
		if _, got := ours.VirtualServers[at]; got != want {
			t.Errorf("%s is ours: %v, want %v", at, got, want)
		}
	}
	if reals := ours.RealServers[frontend(ipvs.TCP, "10.96.0.1:443")]; len(reals) != 1 {
		t.Errorf("real servers %v, want one", reals)
	}

	// Somebody else's chain that uses one of kube-proxy's: nothing is removed, rather than half.
	run(t, "iptables", "-t", "nat", "-A", "MINE", "-j", "KUBE-MARK-MASQ")
	before := run(t, "iptables-save")
	if err := k.RemoveKubeProxy(); err == nil || !strings.Contains(err.Error(), "chain MINE of table nat") {
		t.Errorf("with a chain of others in use: %v", err)
	}
	if after := run(t, "iptables-save"); stripComments(after) != stripComments(before) {
		t.Errorf("rules were\n%s\nand are\n%s", before, after)
	}
	run(t, "iptables", "-t", "nat", "-D", "MINE", "-j", "KUBE-MARK-MASQ")

	if err := k.RemoveKubeProxy(); err != nil {
		t.Fatal(err)
	}
	rest := run(t, "sh", "-c", "iptables-save; ipset list -n; nft list tables; ip -o link; ip route show table local")
	for _, gone := range []string{"-j KUBE-SERVICES", ":KUBE-SERVICES", "KUBE-SEP", "KUBE-MARK-MASQ", "KUBE-FORWARD", "CLUSTER-IP", "NODE-PORT", "kube-ipvs0", "ip6 kube-proxy"} {
		if strings.Contains(rest, gone) {
			t.Errorf("%s is still there:\n%s", gone, rest)
		}
	}
	for _, stays := range []string{"-A PREROUTING -j MINE", "-A MINE -m comment --comment KUBE-SERVICES -j RETURN", ":KUBE-KUBELET-CANARY", "-A INPUT -j KUBE-FIREWALL",
		"\nMINE\n", "table ip kube-proxy-of-mine", "table ip longshore"} {
		if !strings.Contains(rest, stays) {
			t.Errorf("%s is gone:\n%s", stays, rest)
		}
	}
	// Nothing is left to take over.
	if n, err := k.AdoptKubeProxy(); n != 0 || err != nil {
		t.Errorf("a second time: %d, %v", n, err)
	}
	if err := k.RemoveKubeProxy(); err != nil {
		t.Error(err)
	}
}

// stripComments drops the lines of iptables-save with times in them.
func stripComments(saved string) string {
	var out strings.Builder
	for line := range strings.Lines(saved) {
		if !strings.HasPrefix(line, "#") {
			out.WriteString(line)
		}
	}
	return out.String()
}
