package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/longshore-lb/longshore/e2e/lab"
)

// takeOverService has a frontend of every kind at an address of kube-proxy's interface, and node ports.
const takeOverService = `
apiVersion: v1
kind: Namespace
metadata: {name: longshore-system}
---
apiVersion: v1
kind: Secret
metadata: {name: longshore-members, namespace: longshore-system}
stringData: {key: 0123456789abcdef0123456789abcdef}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  type: NodePort
  ipFamilyPolicy: RequireDualStack
  externalIPs: [192.0.2.77]
  ports:
  - {name: tcp, port: 80, targetPort: 8080}
  - {name: udp, port: 80, targetPort: 8080, protocol: UDP}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-4, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: tcp, port: 8080}, {name: udp, port: 8080, protocol: UDP}]
endpoints: [%s]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-6, labels: {kubernetes.io/service-name: web}}
addressType: IPv6
ports: [{name: tcp, port: 8080}, {name: udp, port: 8080, protocol: UDP}]
endpoints: [%s]
`

// takeOverPods is how many endpoints the Service has on each node.
const takeOverPods = 2

// TestTakeOver puts longshore in the place of a kube-proxy of each mode, and takes it away again: on the way there open
// connections go on and no request is lost. From the second mode on, kube-proxy starts on what longshore's removal has left.
// The API server is alone: who else would need a node's processor is not there.
func TestTakeOver(t *testing.T) {
	ctx := t.Context()
	l := lab.ForTest(t, lab.Config{Nodes: 2})
	c, err := l.StartAPI(ctx, l.Nodes...)
	if err != nil {
		t.Fatal(err)
	}
	w := &takeOverWorld{Lab: l, Cluster: c, pods: map[*lab.Node]*lab.Host{}}
	var v4, v6 []string
	for _, n := range l.Nodes {
		for i := range takeOverPods {
			name := fmt.Sprintf("web-%s-%d", n.Name, i)
			pod, err := n.AddPod(name)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := pod.Serve(name, "8080/TCP", "8080/UDP"); err != nil {
				t.Fatal(err)
			}
			w.pods[n] = pod
			v4 = append(v4, fmt.Sprintf("{addresses: ['%s'], nodeName: %s}", pod.V4, n.Name))
			v6 = append(v6, fmt.Sprintf("{addresses: ['%s'], nodeName: %s}", pod.V6, n.Name))
		}
	}
	texts := []string{fmt.Sprintf(takeOverService, strings.Join(v4, ", "), strings.Join(v6, ", "))}
	definitions, err := filepath.Glob("../charts/longshore/crds/*.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range definitions {
		content, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		texts = append(texts, string(content))
	}
	for _, text := range texts {
		if err := c.Apply(ctx, text); err != nil {
			t.Fatal(err)
		}
	}
	modes := []string{"ipvs"} // each takes a minute
	if os.Getenv("LONGSHORE_LAB_MODES") == "all" {
		modes = append(modes, "iptables", "nftables")
	}
	for _, mode := range modes {
		t.Run(mode, func(t *testing.T) { w.takeOver(t, mode) })
	}
}

type takeOverWorld struct {
	*lab.Lab
	*lab.Cluster
	pods map[*lab.Node]*lab.Host // one on each node
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
const listOthers = `iptables-save -t nat | grep -e MINE -e KUBELET-CANARY; ip6tables-save | grep -e '--dport 9 '; ipset list -n MINE`

// leftovers prints what is left of kube-proxy. KUBE-FIREWALL is the kubelet's, and stays when kube-proxy cleans up as well.
const leftovers = `(iptables-save; ip6tables-save) | grep -e KUBE- | grep -v -e KUBE-FIREWALL -e KUBE-KUBELET-CANARY -e MINE
ip -o link show kube-ipvs0 2>/dev/null; ipset list -n | grep KUBE; nft list tables | grep kube-proxy; true`

func (w *takeOverWorld) takeOver(t *testing.T, mode string) {
	ctx := t.Context()
	program, err := lab.Program("kube-proxy")
	if err != nil {
		t.Fatal(err)
	}
	if program, err = onMemory(program); err != nil {
		t.Fatal(err)
	}
	binary, err := onMemory("../bin/longshore")
	if err != nil {
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
	t.Cleanup(func() {
		for _, n := range w.Nodes {
			if t.Failed() {
				out, err := n.Run(context.WithoutCancel(ctx), "sh", "-c", "ipvsadm -Ln; ip -o address show dev kube-ipvs0; nft list ruleset")
				t.Logf("%s at the end (%v):\n%s", n.Name, err, out)
			}
		}
	})

	var proxies []*lab.Process
	for _, n := range w.Nodes {
		p, err := n.Start(lab.Exec{Name: "kube-proxy-" + mode + "-" + n.Name, Path: program, Args: []string{
			"--kubeconfig", w.AdminKubeconfig(), "--hostname-override", n.Name, "--proxy-mode", mode, "--cluster-cidr", "10.244.0.0/16,fd44::/16",
			"--conntrack-max-per-core=0", "--conntrack-tcp-timeout-established=0s", "--conntrack-tcp-timeout-close-wait=0s", // the machine's, not the node's
		}})
		if err != nil {
			t.Fatal(err)
		}
		proxies = append(proxies, p)
		t.Cleanup(p.Kill)
	}
	type path struct {
		from     *lab.Host
		protocol string
		at       netip.AddrPort
	}
	svc, err := w.Cluster.Client().CoreV1().Services("default").Get(ctx, "web", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var paths []path
	for i, n := range w.Nodes { // the first serves IPv4, the second IPv6
		cluster := netip.AddrPortFrom(netip.MustParseAddr(svc.Spec.ClusterIPs[i]), 80)
		for _, p := range svc.Spec.Ports {
			paths = append(paths,
				path{w.Lab.Client, p.Name, netip.AddrPortFrom(n.Addr(cluster.Addr().Is6()), uint16(p.NodePort))},
				path{w.pods[n], p.Name, cluster})
		}
		paths = append(paths, path{n.Host, "tcp", cluster})
	}
	paths = append(paths, path{w.pods[w.Nodes[0]], "tcp", netip.MustParseAddrPort("192.0.2.77:80")})
	for _, p := range paths {
		// Its first sync in mode ipvs runs a program for each entry of its ipsets, the masquerade of which comes last.
		if err := lab.Await(ctx, fmt.Sprintf("kube-proxy to serve %s/%s", p.at, p.protocol), 5*time.Minute, func(ctx context.Context) error {
			for range 4 * takeOverPods {
				if _, err := p.from.Ask(ctx, p.protocol, p.at); err != nil {
					return err
				}
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		spread(t, p.from, p.protocol, p.at, 2*takeOverPods)
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
	n1 := w.Nodes[0]
	agent := func(n *lab.Node) []string {
		return []string{"agent", "--take-over-kube-proxy", "--node", n.Name, "--kubeconfig", w.AdminKubeconfig(), "--namespace", Namespace,
			"--status-socket", socket(n), "--log-level", "debug"}
	}
	out, err := n1.Run(ctx, binary, agent(n1)...)
	if err == nil || !strings.Contains(err.Error(), "it still runs on this node") {
		t.Errorf("a take-over from a kube-proxy that runs: %v: %s", err, out)
	}
	for _, p := range proxies {
		if err := p.Stop(); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range w.Nodes {
		shell(n, "set -e"+others)
		shell(n, "ipvsadm -A -t 192.0.2.9:80 -s sh && ipvsadm -a -t 192.0.2.9:80 -r 10.0.0.9:80 -m")
	}
	theirs := shell(n1, listOthers)
	counters := shell(n1, "ipvsadm -Ln --stats --exact")
	step("kube-proxy has ended")

	var agents []*lab.Process
	for _, n := range w.Nodes {
		p, err := n.Start(lab.Exec{Name: "longshore-" + mode + "-" + n.Name, Path: binary, Args: agent(n)})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(p.Kill)
		agents = append(agents, p)
	}
	for _, p := range agents {
		if err := p.AwaitOutput(ctx, `msg="took over from kube-proxy"`, 2*waitFor); err != nil {
			t.Fatal(err)
		}
	}
	step("longshore has taken over")
	for _, n := range w.Nodes {
		if left := shell(n, leftovers); left != "" {
			t.Errorf("left of kube-proxy on %s:\n%s", n.Name, left)
		}
	}
	if now := shell(n1, listOthers); now != theirs {
		t.Errorf("what others have was\n%s\nand is now\n%s", theirs, now)
	}
	for _, p := range paths {
		spread(t, p.from, p.protocol, p.at, 2*takeOverPods)
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
	compareTables(t, n1, binary)

	// The way back.
	if out, err := n1.Run(ctx, binary, "cleanup", "--status-socket", socket(n1)); err == nil || !strings.Contains(err.Error(), "nothing is removed: another agent runs") {
		t.Errorf("a cleanup under a running agent: %v: %s", err, out)
	}
	for i, n := range w.Nodes {
		if err := agents[i].Stop(); err != nil {
			t.Fatal(err)
		}
		shell(n, binary+" cleanup --status-socket "+socket(n))
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
