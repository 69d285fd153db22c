package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/longshore-lb/longshore/e2e/lab"
)

func TestMain(m *testing.M) {
	lab.Main()
	serveForwarded()
	os.Exit(m.Run())
}

// waitFor is how long the scenarios wait for what shall happen: much longer than it takes, on a slow machine too.
const waitFor = time.Minute

// world is what the scenarios share: making a cluster takes longer than most of them.
type world struct {
	*Installation
	frr  *lab.FRR
	bird *lab.BIRD
	pods map[string]*lab.Pod // of the Deployment web, by the name they answer with

	sctpBefore bool // whether the kernel's module sctp was loaded before longshore came
}

// TestScenarios shows what longshore does in a cluster of three nodes, whose pods are joined as LONGSHORE_LAB_PODS says
// (see [lab.PodNetwork]; usually they are routed).
func TestScenarios(t *testing.T) {
	w := newWorld(t, lab.Config{Nodes: 3, PodNetwork: lab.PodNetwork(os.Getenv("LONGSHORE_LAB_PODS"))})
	w.play(t, []scenario{
		{"ClusterIP", clusterIP},
		{"RejectedAndDropped", rejectedAndDropped},
		{"NodePort", nodePort},
		{"SessionAffinity", sessionAffinity},
		{"Scheduler", scheduler},
		{"Hairpin", hairpin},
		{"EndpointsFollowReadiness", endpointsFollowReadiness},
		{"Layer2", layer2},
		{"Handover", handover},
		{"SplitBrain", splitBrain},
		{"BGP", overBGP},
		{"BFD", overBFD},
		{"GracefulShutdown", gracefulShutdown},
		{"StatusObjects", statusObjects},
		{"AgentRestart", agentRestart},
		{"OthersAreLeftAlone", othersAreLeftAlone},
		{"BadInput", badInput},
		{"DeletedService", deletedService},
		{"ExternalPolicyLocal", externalPolicyLocal},
		{"InternalPolicyLocal", internalPolicyLocal},
		{"SourceRanges", sourceRanges},
		{"Terminating", terminating},
		{"Draining", draining},
		{"UDPMoves", udpMoves},
		{"SCTP", sctpIsServed},
		{"Topology", topology},
		{"Options", options},
		{"KindsOfServices", kindsOfServices},
		{"MasqueradePorts", masqueradePorts},
		{"TamperedTables", tamperedTables},
		{"ClusterDNS", clusterDNS},
		{"SharedIngress", sharedIngress},
		{"NetworkPolicy", networkPolicy},
		{"NodeDies", nodeDies}, // last: the node stays dead
	})
}

const web = Web + `
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  selector: {app: web}
  ipFamilyPolicy: RequireDualStack
  ports:
  - {name: tcp, port: 80, targetPort: 8080}
  - {name: udp, port: 80, targetPort: 8080, protocol: UDP}
`

func newWorld(t *testing.T, config lab.Config) *world {
	t.Helper()
	ctx := t.Context()
	began := time.Now()
	step := func(what string) { t.Logf("%5.1f s: %s", time.Since(began).Seconds(), what) }
	l := lab.ForTest(t, config)
	step("machines and network")
	if err := l.Capture(ctx, l.Client, l.Router); err != nil {
		t.Fatal(err)
	}
	c, err := l.StartCluster(ctx)
	if err != nil {
		t.Fatal(err)
	}
	step("control plane and nodes")
	_, err = os.Stat("/sys/module/sctp")
	sctpBefore := err == nil
	i, err := Install(ctx, l, c, "..")
	if err != nil {
		t.Fatal(err)
	}
	step("longshore installed and ready")
	w := &world{Installation: i, pods: map[string]*lab.Pod{}, sctpBefore: sctpBefore}
	if w.frr, err = l.Router.StartFRR(ctx, lab.RouterConfig(64512, 64513)); err != nil {
		t.Fatal(err)
	}
	if w.bird, err = l.Bird.StartBIRD(ctx, lab.BirdConfig(64512, 64513)); err != nil {
		t.Fatal(err)
	}
	apply(t, w, web)
	await(t, "6 ready pods", func(ctx context.Context) error {
		d, err := c.Client().AppsV1().Deployments("default").Get(ctx, "web", metav1.GetOptions{})
		if err == nil && d.Status.ReadyReplicas != 6 {
			err = fmt.Errorf("%d are ready", d.Status.ReadyReplicas)
		}
		return err
	})
	list, err := c.Client().CoreV1().Pods("default").List(ctx, metav1.ListOptions{LabelSelector: "app=web"})
	if err != nil {
		t.Fatal(err)
	}
	step("routers and pods")
	for _, o := range list.Items {
		if w.pods["default-"+o.Name], err = c.Pod("default", o.Name); err != nil {
			t.Fatal(err)
		}
	}
	return w
}

// podOn is a pod of the Deployment web that runs on a node.
func (w *world) podOn(t *testing.T, n *lab.Node) *lab.Pod {
	t.Helper()
	for _, p := range w.pods {
		if p.Node == n {
			return p
		}
	}
	t.Fatalf("no pod on %s", n.Name)
	return nil
}

func (w *world) service(t *testing.T, name string) *corev1.Service {
	t.Helper()
	svc, err := w.Cluster.Client().CoreV1().Services("default").Get(t.Context(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return svc
}

// clusterIP is the Service's cluster IP of one family.
func (w *world) clusterIP(t *testing.T, name string, ipv6 bool) netip.Addr {
	t.Helper()
	for _, text := range w.service(t, name).Spec.ClusterIPs {
		if a := netip.MustParseAddr(text); a.Is6() == ipv6 {
			return a
		}
	}
	t.Fatalf("Service %s has no cluster IP of the family", name)
	return netip.Addr{}
}

func apply(t *testing.T, w *world, text string) {
	t.Helper()
	if err := w.Cluster.Apply(t.Context(), text); err != nil {
		t.Fatal(err)
	}
}

// applyFor applies objects for the time of one scenario.
func applyFor(t *testing.T, w *world, text string) {
	t.Helper()
	apply(t, w, text)
	t.Cleanup(func() {
		if err := w.Cluster.Delete(context.WithoutCancel(t.Context()), text); err != nil {
			t.Error(err)
		}
	})
}

func await(t *testing.T, what string, check func(context.Context) error) {
	t.Helper()
	if err := lab.Await(t.Context(), what, waitFor, check); err != nil {
		t.Fatal(err)
	}
}

// awaitAnswer waits until a server answers at all, and returns its answer.
func awaitAnswer(t *testing.T, from *lab.Host, protocol string, at netip.AddrPort) (answer lab.Answer) {
	t.Helper()
	await(t, fmt.Sprintf("an answer from %s/%s to %s", at, protocol, from.Name), func(ctx context.Context) (err error) {
		answer, err = from.Ask(ctx, protocol, at)
		return err
	})
	return answer
}

// spread asks until every one of want answers has come from another pod, and returns all answers.
func spread(t *testing.T, from *lab.Host, protocol string, at netip.AddrPort, want int) []lab.Answer {
	t.Helper()
	awaitAnswer(t, from, protocol, at)
	var answers []lab.Answer
	seen := map[string]int{}
	// Endpoints reach the kernel some time after their pods are ready.
	for began := time.Now(); time.Since(began) < waitFor; time.Sleep(time.Millisecond) {
		a, err := from.Ask(t.Context(), protocol, at)
		if err != nil {
			t.Errorf("from %s: %v", from.Name, err)
			return answers
		}
		answers = append(answers, a)
		seen[a.Pod]++
		if len(seen) == want {
			return answers
		}
	}
	t.Errorf("%d requests from %s to %s/%s were answered by %v, want %d pods", len(answers), from.Name, at, protocol, seen, want)
	return answers
}

var families = []struct {
	name string
	ipv6 bool
}{{"IPv4", false}, {"IPv6", true}}

func clusterIP(t *testing.T, w *world) {
	for _, family := range families {
		vip := w.clusterIP(t, "web", family.ipv6)
		for _, protocol := range []string{"tcp", "udp"} {
			at := netip.AddrPortFrom(vip, 80)
			t.Run(family.name+"/"+protocol, func(t *testing.T) {
				for _, n := range w.Lab.Nodes {
					pod := w.podOn(t, n)
					for _, a := range spread(t, pod.Host, protocol, at, 6) {
						if a.Pod == pod.Name {
							continue // itself: the hairpin is masqueraded
						}
						if a.Saw.Addr() != pod.Addr(family.ipv6) {
							t.Errorf("pod %s asked %s, which saw %s: the pod's address is %s", pod.Name, a.Pod, a.Saw.Addr(), pod.Addr(family.ipv6))
						}
					}
					spread(t, n.Host, protocol, at, 6)
				}
			})
		}
	}
}

func rejectedAndDropped(t *testing.T, w *world) {
	applyFor(t, w, `
apiVersion: v1
kind: Service
metadata: {name: empty}
spec:
  selector: {app: nobody}
  type: NodePort
  ports: [{port: 80}]
`)
	refused := func(t *testing.T, from *lab.Host, at netip.AddrPort) {
		t.Helper()
		await(t, fmt.Sprintf("%s refused to %s", at, from.Name), func(ctx context.Context) error {
			_, err := from.Ask(ctx, "tcp", at)
			if !errors.Is(err, syscall.ECONNREFUSED) {
				return fmt.Errorf("got %w, want connection refused", err)
			}
			return nil
		})
	}
	n := w.Lab.Nodes[0]
	pod := w.podOn(t, n)
	for _, family := range families {
		vip := w.clusterIP(t, "web", family.ipv6)
		for _, from := range []*lab.Host{pod.Host, n.Host} {
			refused(t, from, netip.AddrPortFrom(vip, 81))
			refused(t, from, netip.AddrPortFrom(vip, 10256)) // the agent's own health server listens on every address
		}
	}
	empty := w.service(t, "empty")
	for _, from := range []*lab.Host{pod.Host, n.Host} {
		refused(t, from, netip.AddrPortFrom(netip.MustParseAddr(empty.Spec.ClusterIP), 80))
	}
	refused(t, w.Lab.Client, netip.AddrPortFrom(n.V4, uint16(empty.Spec.Ports[0].NodePort)))
	// An address of the Service CIDR that no Service has answers nothing at all.
	unanswered(t, question{from: pod.Host, protocol: "tcp", at: netip.MustParseAddrPort("10.96.255.1:10256")})
}

func nodePort(t *testing.T, w *world) {
	applyFor(t, w, `
apiVersion: v1
kind: Service
metadata: {name: web-node}
spec:
  type: NodePort
  selector: {app: web}
  ipFamilyPolicy: RequireDualStack
  ports:
  - {name: tcp, port: 80, targetPort: 8080}
  - {name: udp, port: 80, targetPort: 8080, protocol: UDP}
`)
	for _, port := range w.service(t, "web-node").Spec.Ports {
		for _, family := range families {
			t.Run(port.Name+"/"+family.name, func(t *testing.T) {
				for _, n := range w.Lab.Nodes {
					at := netip.AddrPortFrom(n.Addr(family.ipv6), uint16(port.NodePort))
					spread(t, w.Lab.Client, port.Name, at, 6)
				}
				other := w.podOn(t, w.Lab.Nodes[1])
				spread(t, other.Host, port.Name, netip.AddrPortFrom(w.Lab.Nodes[0].Addr(family.ipv6), uint16(port.NodePort)), 6)
			})
		}
	}
}

func sessionAffinity(t *testing.T, w *world) {
	applyFor(t, w, `
apiVersion: v1
kind: Service
metadata: {name: sticky}
spec:
  type: NodePort
  selector: {app: web}
  sessionAffinity: ClientIP
  sessionAffinityConfig: {clientIP: {timeoutSeconds: 300}}
  ports: [{port: 80, targetPort: 8080}]
`)
	at := netip.AddrPortFrom(w.clusterIP(t, "sticky", false), 80)
	for _, n := range w.Lab.Nodes {
		pod := w.podOn(t, n)
		first := awaitAnswer(t, pod.Host, "tcp", at)
		for range 10 {
			a, err := pod.Ask(t.Context(), "tcp", at)
			if err != nil {
				t.Fatal(err)
			}
			if a.Pod != first.Pod {
				t.Errorf("%s was answered by %s, then by %s", pod.Name, first.Pod, a.Pod)
			}
		}
	}
	table, err := w.Longshore(t.Context(), w.Lab.Nodes[0], "ipvsadm", "-Ln", "-t", at.String())
	if err != nil || !strings.Contains(table, "persistent 300") {
		t.Errorf("%v: no persistence in\n%s", err, table)
	}
}

func scheduler(t *testing.T, w *world) {
	of := func() string {
		t.Helper()
		table, err := w.Longshore(t.Context(), w.Lab.Nodes[0], "ipvsadm", "-Ln", "-t", netip.AddrPortFrom(w.clusterIP(t, "web", false), 80).String())
		if err != nil {
			t.Fatal(err)
		}
		line := strings.Split(table, "\n")[2]
		return strings.Fields(line)[2]
	}
	annotate := func(value string) {
		t.Helper()
		if _, err := w.Cluster.Kubectl(t.Context(), "annotate", "--overwrite", "service", "web", "longshore.dev/scheduler"+value); err != nil {
			t.Fatal(err)
		}
	}
	awaitScheduler := func(want string) {
		t.Helper()
		await(t, "scheduler "+want, func(context.Context) error {
			if got := of(); got != want {
				return fmt.Errorf("it is %s", got)
			}
			return nil
		})
	}
	awaitScheduler("rr")
	annotate("=mh")
	awaitScheduler("mh")
	annotate("=fastest")
	awaitEvent(t, w, "UnknownScheduler", `"fastest" is not an IPVS scheduler`)
	awaitScheduler("mh") // the last good one stays
	annotate("-")
	awaitScheduler("rr")
}

// awaitEvent waits for an event with a reason and a text in its message.
func awaitEvent(t *testing.T, w *world, reason, text string) {
	t.Helper()
	await(t, "event "+reason, func(ctx context.Context) error {
		events, err := w.Cluster.Client().CoreV1().Events("").List(ctx, metav1.ListOptions{FieldSelector: "reason=" + reason})
		if err != nil {
			return err
		}
		for _, e := range events.Items {
			if strings.Contains(e.Message, text) {
				return nil
			}
		}
		return fmt.Errorf("none of %d events %s has %q", len(events.Items), reason, text)
	})
}

func hairpin(t *testing.T, w *world) {
	pod := w.podOn(t, w.Lab.Nodes[0])
	name := strings.TrimPrefix(pod.Name, "default-")
	if _, err := w.Cluster.Kubectl(t.Context(), "label", "pod", name, "only=this"); err != nil {
		t.Fatal(err)
	}
	applyFor(t, w, `
apiVersion: v1
kind: Service
metadata: {name: itself}
spec:
  selector: {only: this}
  ipFamilyPolicy: RequireDualStack
  ports: [{port: 80, targetPort: 8080}]
`)
	for _, family := range families {
		a := awaitAnswer(t, pod.Host, "tcp", netip.AddrPortFrom(w.clusterIP(t, "itself", family.ipv6), 80))
		if a.Pod != pod.Name {
			t.Errorf("%s: answered by %s", family.name, a.Pod)
		}
	}
}

// takers is how many real servers in an ipvsadm table take new connections: one that drains has weight 0.
func takers(table string) int {
	n := 0
	for line := range strings.Lines(table) {
		if words := strings.Fields(line); len(words) == 6 && words[2] == "Masq" && words[3] != "0" {
			n++
		}
	}
	return n
}

func endpointsFollowReadiness(t *testing.T, w *world) {
	at := netip.AddrPortFrom(w.clusterIP(t, "web", false), 80)
	pod := w.podOn(t, w.Lab.Nodes[2])
	name := strings.TrimPrefix(pod.Name, "default-")
	reals := func() int {
		table, err := w.Longshore(t.Context(), w.Lab.Nodes[0], "ipvsadm", "-Ln", "-t", at.String())
		if err != nil {
			t.Fatal(err)
		}
		return takers(table)
	}
	for _, ready := range []bool{false, true} {
		if err := w.Cluster.SetReady("default", name, ready); err != nil {
			t.Fatal(err)
		}
		want := 5
		if ready {
			want = 6
		}
		await(t, fmt.Sprintf("%d real servers that take connections", want), func(context.Context) error {
			if got := reals(); got != want {
				return fmt.Errorf("there are %d", got)
			}
			return nil
		})
	}
}

// pools are for the two ways to announce: lan is in the nodes' own network, routed is not.
const pools = `
apiVersion: metallb.io/v1beta1
kind: IPAddressPool
metadata: {name: lan, namespace: longshore-system}
spec: {addresses: [172.31.0.200-172.31.0.220, "fd31::200-fd31::220"]}
---
apiVersion: metallb.io/v1beta1
kind: L2Advertisement
metadata: {name: lan, namespace: longshore-system}
spec: {ipAddressPools: [lan]}
---
apiVersion: metallb.io/v1beta1
kind: IPAddressPool
metadata: {name: routed, namespace: longshore-system}
spec: {addresses: [192.0.2.0/24, "2001:db8::/64"], autoAssign: false}
---
apiVersion: metallb.io/v1beta1
kind: BGPAdvertisement
metadata: {name: routed, namespace: longshore-system}
spec: {ipAddressPools: [routed], communities: ["64513:100"]}
---
apiVersion: metallb.io/v1beta2
kind: BGPPeer
metadata: {name: router, namespace: longshore-system}
spec: {myASN: 64513, peerASN: 64512, peerAddress: 172.31.0.1, dualStackAddressFamily: true, holdTime: 9s, keepaliveTime: 3s, connectTime: 1s}
---
apiVersion: metallb.io/v1beta2
kind: BGPPeer
metadata: {name: bird, namespace: longshore-system}
spec: {myASN: 64513, peerASN: 64512, peerAddress: "fd31::2", dualStackAddressFamily: true, holdTime: 9s, keepaliveTime: 3s, connectTime: 1s}
`

const webLAN = `
apiVersion: v1
kind: Service
metadata: {name: web-lan}
spec:
  type: LoadBalancer
  selector: {app: web}
  ipFamilyPolicy: RequireDualStack
  ports:
  - {name: tcp, port: 80, targetPort: 8080}
  - {name: udp, port: 80, targetPort: 8080, protocol: UDP}
`

const webRouted = `
apiVersion: v1
kind: Service
metadata: {name: web-routed, annotations: {metallb.io/address-pool: routed}}
spec:
  type: LoadBalancer
  selector: {app: web}
  ipFamilyPolicy: RequireDualStack
  ports:
  - {name: tcp, port: 80, targetPort: 8080}
  - {name: udp, port: 80, targetPort: 8080, protocol: UDP}
`

func (w *world) address(t *testing.T, name string, ipv6 bool) netip.Addr {
	t.Helper()
	addr, err := w.AwaitAddress(t.Context(), "default", name, ipv6)
	if err != nil {
		t.Fatal(err)
	}
	return addr
}

// owner is the node that announces an address by layer 2, as its own agent and every other one says.
func (w *world) owner(t *testing.T, addr netip.Addr) *lab.Node {
	t.Helper()
	var owner *lab.Node
	await(t, "one owner of "+addr.String(), func(ctx context.Context) error {
		names := map[string]bool{}
		for _, n := range w.Lab.Nodes {
			if !n.Alive() {
				continue
			}
			text, err := w.Longshore(ctx, n, "status", "-o", "json")
			if err != nil {
				return err
			}
			var status struct {
				VIPs []struct{ Address, Owner string }
			}
			if err := json.Unmarshal([]byte(text), &status); err != nil {
				return err
			}
			for _, v := range status.VIPs {
				if v.Address == addr.String() {
					names[v.Owner] = true
				}
			}
		}
		for _, n := range w.Lab.Nodes {
			if len(names) == 1 && names[n.Name] {
				owner = n
				return nil
			}
		}
		return fmt.Errorf("the agents say %v", names)
	})
	return owner
}

func layer2(t *testing.T, w *world) {
	applyFor(t, w, pools)
	applyFor(t, w, webLAN)
	for _, family := range families {
		t.Run(family.name, func(t *testing.T) {
			vip := w.address(t, "web-lan", family.ipv6)
			if first := map[bool]string{false: "172.31.0.200", true: "fd31::200"}[family.ipv6]; vip.String() != first {
				t.Errorf("the address is %s, not the lowest free one of the pool, %s", vip, first)
			}
			owner := w.owner(t, vip)
			for _, protocol := range []string{"tcp", "udp"} {
				spread(t, w.Lab.Client, protocol, netip.AddrPortFrom(vip, 80), 6)
			}
			if mac, err := w.Lab.Client.Neighbor(vip); err != nil || mac.String() != owner.MAC().String() {
				t.Errorf("the client's neighbour table has %s (%v), the owner %s has %s", mac, err, owner.Name, owner.MAC())
			}
			onlyAnswer(t, w, vip, owner)
			// From within the cluster the address works as well, on every node.
			for _, n := range w.Lab.Nodes {
				spread(t, n.Host, "tcp", netip.AddrPortFrom(vip, 80), 6)
				pod := w.podOn(t, n)
				for _, a := range spread(t, pod.Host, "tcp", netip.AddrPortFrom(vip, 80), 6) {
					if a.Pod != pod.Name && a.Saw.Addr() != pod.Addr(family.ipv6) {
						t.Errorf("pod %s asked %s, which saw %s", pod.Name, a.Pod, a.Saw.Addr())
					}
				}
			}
		})
	}
	awaitEvent(t, w, "IPAllocated", "172.31.0.20")
	awaitEvent(t, w, "nodeAssigned", `with protocol "layer2"`)
}

// onlyAnswer asks the whole lan who has an address: one node answers, the owner.
func onlyAnswer(t *testing.T, w *world, vip netip.Addr, owner *lab.Node) {
	t.Helper()
	answers, err := w.Lab.Client.WhoHas(vip, 2*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	if len(answers) != 1 || answers[0].String() != owner.MAC().String() {
		t.Errorf("%v answer for %s, want only %s of %s", answers, vip, owner.MAC(), owner.Name)
	}
}

// awaitNextHops waits until the router's kernel, which FRR fills, has exactly these nodes as next hops of an address.
func awaitNextHops(t *testing.T, w *world, vip netip.Addr, nodes ...*lab.Node) {
	t.Helper()
	var want []netip.Addr
	for _, n := range nodes {
		want = append(want, n.Addr(vip.Is6()))
	}
	prefix := netip.PrefixFrom(vip, vip.BitLen())
	await(t, fmt.Sprintf("next hops %v of %s", want, prefix), func(context.Context) error {
		got, err := w.Lab.Router.NextHops(prefix)
		slices.SortFunc(got, netip.Addr.Compare)
		if err == nil && !slices.Equal(got, want) {
			err = fmt.Errorf("the router has %v", got)
		}
		return err
	})
}

func overBGP(t *testing.T, w *world) {
	applyFor(t, w, pools)
	applyFor(t, w, webRouted)
	for _, family := range families {
		t.Run(family.name, func(t *testing.T) {
			vip := w.address(t, "web-routed", family.ipv6)
			awaitNextHops(t, w, vip, w.Lab.Nodes...)
			command := "show bgp ipv4 unicast " + vip.String() + "/32 json"
			if family.ipv6 {
				command = "show bgp ipv6 unicast " + vip.String() + "/128 json"
			}
			table, err := w.frr.Show(t.Context(), command)
			if err != nil {
				t.Fatal(err)
			}
			var route struct {
				Paths []struct {
					Multipath bool
					Community struct{ String string }
					Nexthops  []struct{ IP string }
				}
			}
			if err := json.Unmarshal([]byte(table), &route); err != nil {
				t.Fatal(err)
			}
			if len(route.Paths) != 3 {
				t.Errorf("FRR has %d paths, want one from each node:\n%s", len(route.Paths), table)
			}
			for _, p := range route.Paths {
				if !p.Multipath || p.Community.String != "64513:100" {
					t.Errorf("a path is not equal to the others or lacks the community: %+v", p)
				}
			}
			for _, protocol := range []string{"tcp", "udp"} {
				spread(t, w.Lab.Outside, protocol, netip.AddrPortFrom(vip, 80), 6)
			}
			await(t, "the route in BIRD", func(ctx context.Context) error {
				out, err := w.bird.Show(ctx, "show route for "+vip.String()+" all")
				if err == nil && strings.Count(out, "BGP.next_hop") < 3 {
					err = fmt.Errorf("BIRD has\n%s", out)
				}
				return err
			})
			// No pool of layer 2 has the address: nobody answers for it on the lan.
			if answers, err := w.Lab.Client.WhoHas(vip, time.Second); err != nil || len(answers) > 0 {
				t.Errorf("%v answer ARP or NDP for %s (%v)", answers, vip, err)
			}
		})
	}
	status, err := w.Longshore(t.Context(), w.Lab.Nodes[0], "status")
	if err != nil || !strings.Contains(status, "192.0.2.0/32 to bird,router") {
		t.Errorf("status does not say who has the route (%v):\n%s", err, status)
	}
	if strings.Count(status, "established") != 2 {
		t.Errorf("status does not show two established sessions:\n%s", status)
	}
}

// bfdProfile is for peer router; the detection time is 1.5 s, its hold time is 9 s.
const bfdProfile = `
apiVersion: metallb.io/v1beta1
kind: BFDProfile
metadata: {name: lab, namespace: longshore-system}
spec: {receiveInterval: 300, transmitInterval: 300, detectMultiplier: 5}
`

// overBFD cuts the link of a node: the router drops the node's routes as soon as BFD notices, and has them again when the link is back.
func overBFD(t *testing.T, w *world) {
	applyFor(t, w, bfdProfile)
	const unwatched = "spec: {myASN: 64513, peerASN: 64512, peerAddress: 172.31.0.1,"
	watched := strings.Replace(pools, unwatched, unwatched+" bfdProfile: lab,", 1)
	if watched == pools {
		t.Fatal("peer router is not what it was")
	}
	applyFor(t, w, watched)
	applyFor(t, w, webRouted)
	configure := func(line string) {
		if err := w.frr.Configure(context.WithoutCancel(t.Context()), "router bgp 64512\n"+line); err != nil {
			t.Error(err)
		}
	}
	configure("neighbor nodes bfd 5 300 300")
	t.Cleanup(func() { configure("no neighbor nodes bfd") })
	vip := w.address(t, "web-routed", false)
	awaitNextHops(t, w, vip, w.Lab.Nodes...)
	lost, rest := w.Lab.Nodes[2], w.Lab.Nodes[:2]
	for _, n := range w.Lab.Nodes {
		await(t, "BFD up at "+n.Name, func(ctx context.Context) error {
			text, err := w.Longshore(ctx, n, "status", "-o", "json")
			if err != nil {
				return err
			}
			var status struct {
				Sessions []struct {
					Peer string
					BFD  struct{ State string }
				}
			}
			if err := json.Unmarshal([]byte(text), &status); err != nil {
				return err
			}
			for _, s := range status.Sessions {
				if s.Peer == "router" && s.BFD.State == "up" {
					return nil
				}
			}
			return fmt.Errorf("status says\n%s", text)
		})
	}
	if err := lost.Link.Cut(); err != nil {
		t.Fatal(err)
	}
	cut := true
	t.Cleanup(func() {
		if cut {
			if err := lost.Link.Mend(); err != nil {
				t.Error(err)
			}
		}
	})
	began := time.Now()
	awaitNextHops(t, w, vip, rest...)
	took := time.Since(began)
	t.Logf("the router dropped the routes %v after the cut", took.Round(100*time.Millisecond))
	if took > 4*time.Second {
		t.Errorf("the router dropped the routes %v after the cut; the hold time is 9 s, the detection time of BFD 1.5 s", took)
	}
	if err := lost.Link.Mend(); err != nil {
		t.Fatal(err)
	}
	cut = false
	awaitNextHops(t, w, vip, w.Lab.Nodes...)
	spread(t, w.Lab.Outside, "tcp", netip.AddrPortFrom(vip, 80), 6)
}

// gracefulShutdown excludes a node from load balancers: its routes first ask for others, and then they go.
func gracefulShutdown(t *testing.T, w *world) {
	applyFor(t, w, pools)
	applyFor(t, w, webRouted)
	vip := w.address(t, "web-routed", false)
	awaitNextHops(t, w, vip, w.Lab.Nodes...)
	leaving := w.Lab.Nodes[0]
	label := func(value string) {
		t.Helper()
		if out, err := w.Cluster.Kubectl(t.Context(), "label", "--overwrite", "node", leaving.Name, "node.kubernetes.io/exclude-from-external-load-balancers"+value); err != nil {
			t.Fatalf("label %s: %v: %s", leaving.Name, err, out)
		}
	}
	label("=true")
	defer func() {
		label("-")
		awaitNextHops(t, w, vip, w.Lab.Nodes...)
	}()
	await(t, "the community GRACEFUL_SHUTDOWN on the node's path, and on no other", func(ctx context.Context) error {
		table, err := w.frr.Show(ctx, "show bgp ipv4 unicast "+vip.String()+"/32 json")
		if err != nil {
			return err
		}
		var route struct {
			Paths []struct {
				Community struct{ String string }
				Nexthops  []struct{ IP string }
			}
		}
		if err := json.Unmarshal([]byte(table), &route); err != nil {
			return err
		}
		for _, p := range route.Paths {
			marked := strings.Contains(p.Community.String, "65535:0") || strings.Contains(p.Community.String, "graceful-shutdown")
			if len(p.Nexthops) == 0 || marked != (p.Nexthops[0].IP == leaving.Addr(false).String()) {
				return fmt.Errorf("FRR has\n%s", table)
			}
		}
		if len(route.Paths) != len(w.Lab.Nodes) {
			return fmt.Errorf("FRR has %d paths", len(route.Paths))
		}
		return nil
	})
	awaitNextHops(t, w, vip, w.Lab.Nodes[1:]...)
	spread(t, w.Lab.Outside, "tcp", netip.AddrPortFrom(vip, 80), 6)
}

// statusObjects reads with kubectl what the agents and the controller write.
func statusObjects(t *testing.T, w *world) {
	applyFor(t, w, pools)
	applyFor(t, w, webLAN)
	applyFor(t, w, webRouted)
	vip := w.address(t, "web-lan", false)
	awaitAnswer(t, w.Lab.Client, "tcp", netip.AddrPortFrom(vip, 80))
	says := func(kind, columns string, wanted ...string) {
		t.Helper()
		await(t, kind, func(ctx context.Context) error {
			out, err := w.Cluster.Kubectl(ctx, "get", kind, "-n", "longshore-system", "--no-headers", "-o", "custom-columns="+columns)
			if err != nil {
				return err
			}
			var lines []string
			for line := range strings.Lines(out) {
				lines = append(lines, strings.Join(strings.Fields(line), " "))
			}
			for _, want := range wanted {
				if !slices.Contains(lines, want) {
					return fmt.Errorf("there is\n%s\nand not %q", out, want)
				}
			}
			return nil
		})
	}
	var valid, advertised []string
	for _, n := range w.Lab.Nodes {
		valid = append(valid, n.Name+" Valid")
		advertised = append(advertised, n.Name+" web-routed")
	}
	says("configurationstates", `NODE:.metadata.labels.metallb\.io/node-name,RESULT:.status.result`, valid...)
	says("servicel2statuses", "NODE:.status.node,SERVICE:.status.serviceName", w.owner(t, vip).Name+" web-lan")
	says("servicebgpstatuses", "NODE:.status.node,SERVICE:.status.serviceName", advertised...)
	for _, kind := range []string{"ipaddresspools", "l2advertisements", "bgpadvertisements", "bgppeers"} {
		says(kind, "STATUS:.status.conditions[0].type,IS:.status.conditions[0].status", "Accepted True")
	}
}

func agentRestart(t *testing.T, w *world) {
	applyFor(t, w, pools)
	applyFor(t, w, webLAN)
	vip := w.address(t, "web-lan", false)
	owner := w.owner(t, vip)
	awaitAnswer(t, w.Lab.Client, "tcp", netip.AddrPortFrom(vip, 80))
	cluster := netip.AddrPortFrom(w.clusterIP(t, "web", false), 80)
	var held []*lab.Held
	for range 6 {
		for from, at := range map[*lab.Host]netip.AddrPort{
			w.Lab.Client:           netip.AddrPortFrom(vip, 80),
			w.podOn(t, owner).Host: cluster,
		} {
			h, err := from.Hold(t.Context(), "tcp", at, 100*time.Millisecond, 20*time.Second)
			if err != nil {
				t.Fatal(err)
			}
			held = append(held, h)
		}
	}
	before, err := w.Longshore(t.Context(), owner, "ipvsadm", "-Sn")
	if err != nil {
		t.Fatal(err)
	}
	// Whatever is deleted from the kernel from now on is seen here.
	monitor, err := owner.Start(lab.Exec{Name: "monitor-nft", Path: "nft", Args: []string{"monitor", "destroy"}})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.KillAgent(owner); err != nil {
		t.Fatal(err)
	}
	await(t, "the agent's end", func(ctx context.Context) error {
		if _, err := w.Longshore(ctx, owner, "status"); err == nil {
			return errors.New("it still answers")
		}
		return nil
	})
	awaitAnswer(t, w.Lab.Client, "tcp", netip.AddrPortFrom(vip, 80)) // without the agent
	await(t, "the agent to be ready again", func(ctx context.Context) error {
		out, err := w.Longshore(ctx, owner, "status")
		if err == nil && !strings.Contains(out, owner.Name+": ready") {
			err = errors.New(out)
		}
		return err
	})
	after, err := w.Longshore(t.Context(), owner, "ipvsadm", "-Sn")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(before, after); diff != "" {
		t.Errorf("the table differs after the restart (-before +after):\n%s", diff)
	}
	counters, err := w.Longshore(t.Context(), owner, "ipvsadm", "-Ln", "--stats", "-t", netip.AddrPortFrom(vip, 80).String())
	if err != nil {
		t.Fatal(err)
	}
	if connections := strings.Fields(strings.Split(counters, "\n")[2])[2]; connections == "0" {
		t.Errorf("the virtual server's counters began anew, it was made again:\n%s", counters)
	}
	for _, h := range held {
		if r := h.Release(); r.Broken != nil || r.Echoes < 3 {
			t.Errorf("a connection to %s: %+v", h.Answer.Pod, r)
		}
	}
	if err := monitor.Stop(); err != nil {
		t.Error(err)
	}
	if gone := monitor.Tail(20); strings.Contains(gone, "delete element") || strings.Contains(gone, "delete table") || strings.Contains(gone, "delete set") {
		t.Errorf("the restart took from nftables:\n%s", gone)
	}
	if now := w.owner(t, vip); now != owner {
		t.Errorf("the address went from %s to %s", owner.Name, now.Name)
	}
}

func othersAreLeftAlone(t *testing.T, w *world) {
	n := w.Lab.Nodes[0]
	for _, args := range []string{"-A -t 203.0.113.9:80 -s sh", "-a -t 203.0.113.9:80 -r 10.9.9.9:80 -m -w 3"} {
		if out, err := n.Run(t.Context(), "ipvsadm", strings.Fields(args)...); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	t.Cleanup(func() {
		if _, err := n.Run(context.WithoutCancel(t.Context()), "ipvsadm", "-D", "-t", "203.0.113.9:80"); err != nil {
			t.Error(err)
		}
	})
	// A Service that wants the same frontend does not get it, and everything else it wants is served.
	applyFor(t, w, `
apiVersion: v1
kind: Service
metadata: {name: clash}
spec:
  selector: {app: web}
  externalIPs: [203.0.113.9]
  ports: [{port: 80, targetPort: 8080}]
`)
	awaitAnswer(t, n.Host, "tcp", netip.AddrPortFrom(w.clusterIP(t, "clash", false), 80))
	await(t, "the clash in status", func(ctx context.Context) error {
		status, err := w.Longshore(ctx, n, "status")
		if err == nil && !strings.Contains(status, "-A -t 203.0.113.9:80 -s rr: a virtual server that is not longshore's is there already") {
			err = errors.New(status)
		}
		return err
	})
	table, err := w.Longshore(t.Context(), n, "ipvsadm", "-Ln", "-t", "203.0.113.9:80")
	if err != nil || !strings.Contains(table, "203.0.113.9:80 sh") || !strings.Contains(table, "10.9.9.9:80") || strings.Count(table, "Masq") != 1 {
		t.Errorf("somebody else's virtual server is now (%v):\n%s", err, table)
	}
}

func badInput(t *testing.T, w *world) {
	applyFor(t, w, pools)
	applyFor(t, w, webLAN)
	vip := w.address(t, "web-lan", false)
	awaitAnswer(t, w.Lab.Client, "tcp", netip.AddrPortFrom(vip, 80))

	applyFor(t, w, `
apiVersion: metallb.io/v1beta1
kind: IPAddressPool
metadata: {name: overlapping, namespace: longshore-system}
spec: {addresses: [172.31.0.210-172.31.0.230]}
---
apiVersion: metallb.io/v1beta1
kind: IPAddressPool
metadata: {name: reversed, namespace: longshore-system}
spec: {addresses: [10.9.0.9-10.9.0.1]}
`)
	awaitEvent(t, w, "ConfigurationRefused", "IPAddressPool longshore-system/overlapping: spec.addresses[0]")
	awaitEvent(t, w, "ConfigurationRefused", `IPAddressPool longshore-system/reversed: spec.addresses[0]: "10.9.0.9-10.9.0.1": range is reversed`)

	applyFor(t, w, `
apiVersion: v1
kind: Service
metadata: {name: outside, annotations: {metallb.io/loadBalancerIPs: 198.51.100.1}}
spec: {type: LoadBalancer, selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}
`)
	awaitEvent(t, w, "AllocationFailed", `"198.51.100.1" is in no pool`)

	applyFor(t, w, `
apiVersion: metallb.io/v1beta2
kind: BGPPeer
metadata: {name: refusing, namespace: longshore-system}
spec: {myASN: 65000, peerASN: 64512, peerAddress: "fd31::1", connectTime: 1s}
---
apiVersion: metallb.io/v1beta2
kind: BGPPeer
metadata: {name: nobody, namespace: longshore-system}
spec: {myASN: 64513, peerASN: 64512, peerAddress: 172.31.0.99, connectTime: 1s}
`)
	await(t, "the refusals in status", func(ctx context.Context) error {
		text, err := w.Longshore(ctx, w.Lab.Nodes[0], "status", "-o", "json")
		if err != nil {
			return err
		}
		var status struct {
			Sessions []struct{ Peer, State, Reason string }
		}
		if err := json.Unmarshal([]byte(text), &status); err != nil {
			return err
		}
		for _, s := range status.Sessions {
			reason := map[string]string{"refusing": "does it expect AS 65000", "nobody": "cannot connect to 172.31.0.99:179"}[s.Peer]
			if bad := reason != ""; bad != (s.State != "established") || !strings.Contains(s.Reason, reason) {
				return fmt.Errorf("sessions: %+v", status.Sessions)
			}
		}
		return nil
	})

	// The API server refuses what the schema knows to be wrong, naming field and value.
	for _, bad := range []struct{ text, want string }{
		{"apiVersion: metallb.io/v1beta1\nkind: IPAddressPool\nmetadata: {name: typo, namespace: longshore-system}\nspec: {adresses: [10.9.0.0/24]}", "adresses"},
		{"apiVersion: metallb.io/v1beta2\nkind: BGPPeer\nmetadata: {name: hold, namespace: longshore-system}\nspec: {myASN: 1, peerASN: 2, peerAddress: 172.31.0.1, holdTime: 1s}", "holdTime"},
	} {
		if err := w.Cluster.Apply(t.Context(), bad.text); err == nil || !strings.Contains(err.Error(), bad.want) {
			t.Errorf("applying\n%s\ngave %v, want an error with %q", bad.text, err, bad.want)
		}
	}
	// The rest is not affected.
	if got := w.address(t, "web-lan", false); got != vip {
		t.Errorf("the address of web-lan went from %s to %s", vip, got)
	}
	spread(t, w.Lab.Client, "tcp", netip.AddrPortFrom(vip, 80), 6)
	for _, n := range w.Lab.Nodes {
		status, err := w.Longshore(t.Context(), n, "status")
		if err != nil || !strings.Contains(status, n.Name+": ready") || !strings.Contains(status, "range is reversed") {
			t.Errorf("status of %s (%v):\n%s", n.Name, err, status)
		}
	}
}

func deletedService(t *testing.T, w *world) {
	applyFor(t, w, pools)
	apply(t, w, webLAN)
	apply(t, w, webRouted)
	var vips []netip.Addr
	for _, family := range families {
		lan, routed := w.address(t, "web-lan", family.ipv6), w.address(t, "web-routed", family.ipv6)
		awaitAnswer(t, w.Lab.Client, "tcp", netip.AddrPortFrom(lan, 80))
		awaitNextHops(t, w, routed, w.Lab.Nodes...)
		vips = append(vips, lan, routed)
	}
	for _, text := range []string{webLAN, webRouted} {
		if err := w.Cluster.Delete(t.Context(), text); err != nil {
			t.Fatal(err)
		}
	}
	for _, vip := range vips {
		awaitNextHops(t, w, vip)
		for _, n := range w.Lab.Nodes {
			await(t, fmt.Sprintf("nothing of %s on %s", vip, n.Name), func(ctx context.Context) error {
				for _, look := range [][]string{{"ipvsadm", "-Ln"}, {"nft", "list", "ruleset"}, {"ip", "route", "show", "table", "local"}, {"ip", "-6", "route", "show", "table", "local"}} {
					out, err := n.Run(ctx, look[0], look[1:]...)
					if err != nil {
						return err
					}
					for _, word := range strings.FieldsFunc(out, func(r rune) bool { return strings.ContainsRune(" \n\t{}[],", r) }) {
						if word == vip.String() || strings.HasPrefix(word, vip.String()+":80") {
							return fmt.Errorf("%s still has %s", strings.Join(look, " "), word)
						}
					}
				}
				return nil
			})
		}
		if answers, err := w.Lab.Client.WhoHas(vip, time.Second); err != nil || len(answers) > 0 {
			t.Errorf("%v still answer for %s (%v)", answers, vip, err)
		}
	}
	for _, command := range []string{"show bgp ipv4 unicast json", "show bgp ipv6 unicast json"} {
		table, err := w.frr.Show(t.Context(), command)
		if err != nil || strings.Contains(table, "192.0.2.") || strings.Contains(table, "2001:db8:") {
			t.Errorf("FRR's table still has the route (%v):\n%s", err, table)
		}
	}
}

func nodeDies(t *testing.T, w *world) {
	applyFor(t, w, pools)
	applyFor(t, w, webLAN)
	applyFor(t, w, webRouted)
	lan, routed := w.address(t, "web-lan", false), w.address(t, "web-routed", false)
	awaitNextHops(t, w, routed, w.Lab.Nodes...)
	awaitAnswer(t, w.Lab.Client, "tcp", netip.AddrPortFrom(lan, 80))
	owner := w.owner(t, lan)
	var rest []*lab.Node
	for _, n := range w.Lab.Nodes {
		if n != owner {
			rest = append(rest, n)
		}
	}
	if err := owner.Kill(); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	await(t, "the address on another node", func(ctx context.Context) error {
		answers, err := w.Lab.Client.WhoHas(lan, 500*time.Millisecond)
		if err == nil && (len(answers) != 1 || answers[0].String() == owner.MAC().String()) {
			err = fmt.Errorf("%v answer", answers)
		}
		return err
	})
	t.Logf("another node answered for %s after %v", lan, time.Since(began).Round(100*time.Millisecond))
	successor := w.owner(t, lan)
	onlyAnswer(t, w, lan, successor)
	awaitNextHops(t, w, routed, rest...)
	// The endpoints of the dead node go when the API server knows that it is dead.
	left := 0
	for _, p := range w.pods {
		if p.Node != owner {
			left++
		}
	}
	await(t, fmt.Sprintf("%d real servers", left), func(ctx context.Context) error {
		table, err := w.Longshore(ctx, successor, "ipvsadm", "-Ln", "-t", netip.AddrPortFrom(lan, 80).String())
		if err == nil && takers(table) != left {
			err = errors.New(table)
		}
		return err
	})
	spread(t, w.Lab.Client, "tcp", netip.AddrPortFrom(lan, 80), left)
	spread(t, w.Lab.Outside, "tcp", netip.AddrPortFrom(routed, 80), left)
}

// compareWithIpvsadm compares our view of every living node's table with Debian's ipvsadm, byte for byte.
func compareWithIpvsadm(t *testing.T, w *world) {
	t.Helper()
	for _, n := range w.Lab.Nodes {
		if n.Alive() {
			compareTables(t, n, w.binary)
		}
	}
}

// compareTables compares what longshore and ipvsadm print of a node's table.
func compareTables(t *testing.T, n *lab.Node, binary string) {
	t.Helper()
	for _, args := range [][]string{{"-Ln"}, {"-Sn"}} {
		// Connections come and go between two readings: one of a few pairs must be equal.
		await(t, fmt.Sprintf("equal tables by ipvsadm %s on %s", strings.Join(args, " "), n.Name), func(ctx context.Context) error {
			theirs, err := n.Run(ctx, "ipvsadm", args...)
			if err != nil {
				return err
			}
			ours, err := n.Run(ctx, binary, append([]string{"ipvsadm"}, args...)...)
			if err != nil {
				return err
			}
			if diff := cmp.Diff(theirs, ours); diff != "" {
				return fmt.Errorf("-ipvsadm +longshore\n%s", diff)
			}
			return nil
		})
	}
}
