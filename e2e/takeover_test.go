package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/longshore-lb/longshore/e2e/lab"
)

// TestTakeOver puts longshore in the place of a kube-proxy of each mode, and takes it away again: open connections go on and
// no request is lost on the way there. After the first mode every kube-proxy starts on what longshore has left.
func TestTakeOver(t *testing.T) {
	ctx := t.Context()
	l := lab.ForTest(t, lab.Config{Nodes: 2})
	c, err := l.StartCluster(ctx)
	if err != nil {
		t.Fatal(err)
	}
	w := &world{Installation: &Installation{Lab: l, Cluster: c}, pods: map[string]*lab.Pod{}}
	apply(t, w, Web+`
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  type: NodePort
  selector: {app: web}
  ipFamilyPolicy: RequireDualStack
  externalIPs: [192.0.2.77]
  ports:
  - {name: tcp, port: 80, targetPort: 8080}
  - {name: udp, port: 80, targetPort: 8080, protocol: UDP}
`)
	w.awaitPods(t)
	for _, mode := range []string{"ipvs", "iptables", "nftables"} {
		t.Run(mode, func(t *testing.T) {
			began := time.Now()
			takeOver(t, w, mode)
			t.Logf("took %v", time.Since(began).Round(100*time.Millisecond))
		})
	}
}

// others is what somebody else has on a node, and must keep: rules in the tables that kube-proxy used, and a chain of
// the kubelet's.
const others = `
iptables -t nat -N KUBE-KUBELET-CANARY
iptables -t nat -N MINE
iptables -t nat -A MINE -p tcp --dport 9 -j RETURN -m comment --comment KUBE-SERVICES
iptables -t nat -I PREROUTING -j MINE
ip6tables -A FORWARD -p tcp --dport 9 -j ACCEPT
ipset create MINE bitmap:port range 0-65535`

// listOthers prints what others set up.
const listOthers = `iptables-save -t nat | grep -e MINE -e CANARY; ip6tables-save | grep -e '--dport 9 '; ipset list -n MINE`

// leftovers prints what is left of kube-proxy. KUBE-FIREWALL is the kubelet's, and stays when kube-proxy cleans up as well.
const leftovers = `(iptables-save; ip6tables-save) | grep -e KUBE- | grep -v -e KUBE-FIREWALL -e KUBE-KUBELET-CANARY -e MINE
ip -o link show kube-ipvs0 2>/dev/null; ipset list -n | grep KUBE; nft list tables | grep kube-proxy; true`

func takeOver(t *testing.T, w *world, mode string) {
	ctx := t.Context()
	program, err := lab.Program("kube-proxy")
	if err != nil {
		t.Fatal(err)
	}
	if program, err = onMemory(program); err != nil {
		t.Fatal(err)
	}
	if w.binary, err = onMemory("../bin/longshore"); err != nil {
		t.Fatal(err)
	}
	shell := func(n *lab.Node, text string) string {
		t.Helper()
		out, err := n.Run(ctx, "sh", "-c", text)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	began := time.Now()
	step := func(what string) { t.Logf("%5.1f s: %s", time.Since(began).Seconds(), what) }

	var proxies []*lab.Process
	for _, n := range w.Lab.Nodes {
		p, err := n.Start(lab.Exec{Name: "kube-proxy-" + mode + "-" + n.Name, Path: program, Args: []string{
			"--kubeconfig", w.Cluster.AdminKubeconfig(), "--hostname-override", n.Name, "--proxy-mode", mode, "--cluster-cidr", "10.244.0.0/16,fd44::/16",
			"--conntrack-max-per-core=0", "--conntrack-tcp-timeout-established=0s", "--conntrack-tcp-timeout-close-wait=0s", // the machine's, not the node's
		}})
		if err != nil {
			t.Fatal(err)
		}
		proxies = append(proxies, p)
	}
	type path struct {
		from     *lab.Host
		protocol string
		at       netip.AddrPort
	}
	var paths []path
	ports := w.service(t, "web").Spec.Ports
	for i, n := range w.Lab.Nodes {
		ipv6 := i == 1
		for _, p := range ports {
			paths = append(paths,
				path{w.Lab.Client, p.Name, netip.AddrPortFrom(n.Addr(ipv6), uint16(p.NodePort))},
				path{w.podOn(t, n).Host, p.Name, netip.AddrPortFrom(w.clusterIP(t, "web", ipv6), 80)},
				path{n.Host, p.Name, netip.AddrPortFrom(w.clusterIP(t, "web", ipv6), 80)},
			)
		}
	}
	paths = append(paths, path{w.podOn(t, w.Lab.Nodes[0]).Host, "tcp", netip.MustParseAddrPort("192.0.2.77:80")})
	for _, p := range paths {
		spread(t, p.from, p.protocol, p.at, 6)
	}
	step("kube-proxy serves")

	var held []*lab.Held
	var asked []*asking
	for _, p := range paths {
		for range 2 {
			h, err := p.from.Hold(ctx, p.protocol, p.at, 100*time.Millisecond, 10*time.Second)
			if err != nil {
				t.Fatal(err)
			}
			held = append(held, h)
		}
		asked = append(asked, ask(ctx, p.from, p.protocol, p.at))
	}
	n1 := w.Lab.Nodes[0]
	out, err := n1.Run(ctx, w.binary, "agent", "--take-over-kube-proxy", "--kubeconfig", w.Cluster.AdminKubeconfig(), "--namespace", Namespace, "--status-socket", socket(n1))
	if err == nil || !strings.Contains(err.Error(), "it still runs on this node") {
		t.Errorf("a take-over from a kube-proxy that runs: %v: %s", err, out)
	}
	for _, p := range proxies {
		if err := p.Stop(); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range w.Lab.Nodes {
		shell(n, "set -e"+others)
		shell(n, "ipvsadm -A -t 192.0.2.9:80 -s sh && ipvsadm -a -t 192.0.2.9:80 -r 10.0.0.9:80 -m")
	}
	theirs := shell(n1, listOthers)
	counters := shell(n1, "ipvsadm -Ln --stats --exact")
	step("kube-proxy has ended")

	i, err := Install(ctx, w.Lab, w.Cluster, "..", "agent.takeOverKubeProxy=true")
	if err != nil {
		t.Fatal(err)
	}
	w.Installation = i
	step("longshore is ready")
	for _, n := range w.Lab.Nodes {
		await(t, "nothing of kube-proxy left on "+n.Name, func(ctx context.Context) error {
			out, err := n.Run(ctx, "sh", "-c", leftovers)
			if err == nil && out != "" {
				err = errors.New(out)
			}
			return err
		})
	}
	step("nothing of kube-proxy is left")
	if now := shell(n1, listOthers); now != theirs {
		t.Errorf("what others have was\n%s\nand is now\n%s", theirs, now)
	}
	for _, p := range paths {
		spread(t, p.from, p.protocol, p.at, 6)
	}
	step("longshore alone serves")
	t.Logf("counters of n1 before:\n%s\nafter:\n%s", counters, shell(n1, "ipvsadm -Ln --stats --exact"))
	for _, h := range held {
		if r := h.Release(); r.Broken != nil {
			t.Errorf("a connection was broken: %v", r.Broken)
		}
	}
	for _, a := range asked {
		a.report(t)
	}
	if saved := shell(n1, "ipvsadm -Sn"); !strings.Contains(saved, "192.0.2.9:80 -r 10.0.0.9:80") {
		t.Errorf("somebody else's virtual server is gone:\n%s", saved)
	}
	compareWithIpvsadm(t, w)

	// The way back.
	if out, err := n1.Run(ctx, w.binary, "cleanup", "--status-socket", socket(n1)); err == nil || !strings.Contains(err.Error(), "nothing is removed: another agent runs") {
		t.Errorf("a cleanup under a running agent: %v: %s", err, out)
	}
	if _, err := w.Cluster.Helm(ctx, "uninstall", "longshore", "--namespace", Namespace, "--wait"); err != nil {
		t.Fatal(err)
	}
	for _, n := range w.Lab.Nodes {
		await(t, "a cleanup of "+n.Name, func(ctx context.Context) error {
			_, err := n.Run(ctx, w.binary, "cleanup", "--status-socket", socket(n))
			return err
		})
		shell(n, "ipvsadm -D -t 192.0.2.9:80; iptables -t nat -D PREROUTING -j MINE; iptables -t nat -F MINE; iptables -t nat -X MINE; "+
			"iptables -t nat -X KUBE-KUBELET-CANARY; ip6tables -D FORWARD -p tcp --dport 9 -j ACCEPT; ipset destroy MINE")
		if left := shell(n, "ipvsadm -Sn; nft list tables | grep longshore; ip route show table all proto 196; ip -6 route show table all proto 196"); left != "" {
			t.Errorf("left on %s:\n%s", n.Name, left)
		}
	}
	step("longshore is removed")
}

// asking is requests, one after another.
type asking struct {
	name   string
	cancel context.CancelFunc
	done   sync.WaitGroup

	answers int
	lost    []error
	longest time.Duration
}

// ask asks until the report.
func ask(ctx context.Context, from *lab.Host, protocol string, at netip.AddrPort) *asking {
	ctx, cancel := context.WithCancel(ctx)
	a := &asking{name: fmt.Sprintf("from %s to %s/%s", from.Name, at, protocol), cancel: cancel}
	a.done.Go(func() {
		for ctx.Err() == nil {
			began := time.Now()
			if _, err := from.Ask(context.WithoutCancel(ctx), protocol, at); err != nil {
				a.lost = append(a.lost, fmt.Errorf("at %s: %w", began.Format("05.000"), err))
			} else {
				a.answers++
				a.longest = max(a.longest, time.Since(began))
			}
			time.Sleep(100 * time.Millisecond) // this is the load, not a wait
		}
	})
	return a
}

func (a *asking) report(t *testing.T) {
	t.Helper()
	a.cancel()
	a.done.Wait()
	t.Logf("%s: %d answers, %d lost, the slowest took %v", a.name, a.answers, len(a.lost), a.longest.Round(time.Millisecond))
	if len(a.lost) > 0 {
		t.Errorf("%s: %d of %d requests were lost: %v", a.name, len(a.lost), len(a.lost)+a.answers, errors.Join(a.lost...))
	}
}
