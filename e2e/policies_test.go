package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/longshore-lb/longshore/e2e/lab"
)

// handMade is an endpoint of a hand-made EndpointSlice: a pod of the Deployment web, in the conditions that a scenario wants.
type handMade struct {
	pod        *lab.Pod
	conditions string // "" = ready
}

const (
	notReady = "{ready: false, serving: false}"
	leaving  = "{ready: false, serving: true, terminating: true}"
	stopped  = "{ready: false, serving: false, terminating: true}"
)

func ready(pods ...*lab.Pod) []handMade {
	var all []handMade
	for _, p := range pods {
		all = append(all, handMade{pod: p})
	}
	return all
}

// slicesOf is the EndpointSlices, one of each family, of a Service without a selector whose ports are called tcp and udp.
func slicesOf(service string, backends ...handMade) string {
	var text strings.Builder
	for _, family := range families {
		fmt.Fprintf(&text, `
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: %[1]s-%[2]s, labels: {kubernetes.io/service-name: %[3]s}}
addressType: %[4]s
ports: [{name: tcp, port: 8080}, {name: udp, port: 8080, protocol: UDP}]
endpoints:%[5]s`, service, strings.ToLower(family.name), service, family.name, map[bool]string{true: " []"}[len(backends) == 0])
		for _, b := range backends {
			fmt.Fprintf(&text, "\n- {addresses: [%q], nodeName: %s, targetRef: {kind: Pod, namespace: default, name: %s}", b.pod.Addr(family.ipv6), b.pod.Node.Name, b.pod.Object.Name)
			if b.conditions != "" {
				fmt.Fprintf(&text, ", conditions: %s", b.conditions)
			}
			text.WriteString("}")
		}
	}
	return text.String()
}

// service is a Service of both families and protocols without a selector. fields is what its spec has besides.
func service(name, annotations, fields string) string {
	return fmt.Sprintf(`
apiVersion: v1
kind: Service
metadata: {name: %s, annotations: {%s}}
spec:
  ipFamilyPolicy: RequireDualStack
  ports:
  - {name: tcp, port: 80, targetPort: 8080}
  - {name: udp, port: 80, targetPort: 8080, protocol: UDP}
%s`, name, annotations, indent(fields))
}

func indent(fields string) string {
	return strings.ReplaceAll("  "+strings.TrimSpace(fields), "\n", "\n  ")
}

// oneEach is one pod of the Deployment web on each node.
func oneEach(t *testing.T, w *world) (a, b, c *lab.Pod) {
	t.Helper()
	return w.podOn(t, w.Lab.Nodes[0]), w.podOn(t, w.Lab.Nodes[1]), w.podOn(t, w.Lab.Nodes[2])
}

func (w *world) nodePort(t *testing.T, name, protocol string, n *lab.Node, ipv6 bool) netip.AddrPort {
	t.Helper()
	for _, p := range w.service(t, name).Spec.Ports {
		if p.Name == protocol {
			return netip.AddrPortFrom(n.Addr(ipv6), uint16(p.NodePort))
		}
	}
	t.Fatalf("Service %s has no port %s", name, protocol)
	return netip.AddrPort{}
}

// answeredBy waits until the answers to a run of questions come from all of these pods and from no other, and returns them.
func answeredBy(t *testing.T, from *lab.Host, protocol string, at netip.AddrPort, pods ...*lab.Pod) (answers []lab.Answer) {
	t.Helper()
	want := map[string]bool{}
	for _, p := range pods {
		want[p.Name] = true
	}
	await(t, fmt.Sprintf("answers from %s/%s to %s by %v", at, protocol, from.Name, slices.Sorted(maps.Keys(want))), func(ctx context.Context) error {
		answers = nil
		seen := map[string]bool{}
		for range 3 * len(pods) {
			a, err := from.Ask(ctx, protocol, at)
			if err != nil {
				return err
			}
			answers = append(answers, a)
			seen[a.Pod] = true
		}
		if !maps.Equal(seen, want) {
			return fmt.Errorf("answered by %v", slices.Sorted(maps.Keys(seen)))
		}
		return nil
	})
	return answers
}

// seenAs checks that the pods saw the client's own address.
func seenAs(t *testing.T, client netip.Addr, answers []lab.Answer) {
	t.Helper()
	for _, a := range answers {
		if a.Saw.Addr() != client {
			t.Errorf("%s saw %s: the client's address is %s", a.Pod, a.Saw.Addr(), client)
		}
	}
}

type question struct {
	from     *lab.Host
	protocol string
	at       netip.AddrPort
}

// unanswered waits until none of the questions gets an answer or is refused: their packets are dropped. A UDP socket of the
// node itself is told so by EPERM.
func unanswered(t *testing.T, questions ...question) {
	t.Helper()
	await(t, "silence", func(ctx context.Context) error {
		errs := make([]error, len(questions))
		var asking sync.WaitGroup
		for i, q := range questions {
			asking.Go(func() {
				answer, err := q.from.Ask(ctx, q.protocol, q.at)
				var timeout net.Error
				switch {
				case err == nil:
					errs[i] = fmt.Errorf("%s/%s answered %s by %s", q.at, q.protocol, q.from.Name, answer.Pod)
				case !errors.Is(err, syscall.EPERM) && (!errors.As(err, &timeout) || !timeout.Timeout()):
					errs[i] = err
				}
			})
		}
		asking.Wait()
		return errors.Join(errs...)
	})
}

func externalPolicyLocal(t *testing.T, w *world) {
	a, b, c := oneEach(t, w)
	local := "externalTrafficPolicy: Local\ntype: LoadBalancer"
	applyFor(t, w, pools)
	applyFor(t, w, service("local-lan", "", local)+slicesOf("local-lan", ready(a, b)...))
	applyFor(t, w, service("local-routed", "metallb.io/address-pool: routed", local)+slicesOf("local-routed", ready(a, b)...))
	client, outside := w.Lab.Client, w.Lab.Outside
	var dropped []question
	for _, family := range families {
		vip := w.address(t, "local-lan", family.ipv6)
		owner := w.owner(t, vip)
		local := map[*lab.Node]*lab.Pod{a.Node: a, b.Node: b}[owner]
		if local == nil {
			t.Fatalf("%s, which has no endpoint, has the address", owner.Name)
		}
		routed := w.address(t, "local-routed", family.ipv6)
		awaitNextHops(t, w, routed, a.Node, b.Node)
		for _, protocol := range []string{"tcp", "udp"} {
			// From outside only the endpoints of the node that the packet comes to, which see the client itself.
			seenAs(t, client.Addr(family.ipv6), answeredBy(t, client, protocol, netip.AddrPortFrom(vip, 80), local))
			for _, p := range []*lab.Pod{a, b} {
				seenAs(t, client.Addr(family.ipv6), answeredBy(t, client, protocol, w.nodePort(t, "local-lan", protocol, p.Node, family.ipv6), p))
			}
			dropped = append(dropped, question{client, protocol, w.nodePort(t, "local-lan", protocol, c.Node, family.ipv6)})
			// In the cluster all endpoints, by the same frontends, even on a node that has none.
			for _, at := range []netip.AddrPort{netip.AddrPortFrom(vip, 80), w.nodePort(t, "local-lan", protocol, c.Node, family.ipv6)} {
				seenAs(t, c.Addr(family.ipv6), answeredBy(t, c.Host, protocol, at, a, b))
				answeredBy(t, c.Node.Host, protocol, at, a, b)
			}
		}
		seenAs(t, outside.Addr(family.ipv6), spread(t, outside, "tcp", netip.AddrPortFrom(routed, 80), 2))
	}
	unanswered(t, dropped...)
	for n, local := range map[*lab.Node]int{a.Node: 1, b.Node: 1, c.Node: 0} {
		checkedAs(t, w, "local-lan", n, local)
	}
	// The announcements follow the endpoints.
	for _, name := range []string{"local-lan", "local-routed"} {
		apply(t, w, slicesOf(name, ready(c)...))
	}
	for _, family := range families {
		vip := w.address(t, "local-lan", family.ipv6)
		awaitNextHops(t, w, w.address(t, "local-routed", family.ipv6), c.Node)
		await(t, fmt.Sprintf("%s on %s", vip, c.Node.Name), func(context.Context) error {
			if owner := w.owner(t, vip); owner != c.Node {
				return fmt.Errorf("it is on %s", owner.Name)
			}
			return nil
		})
		answeredBy(t, client, "tcp", netip.AddrPortFrom(vip, 80), c)
	}
}

// checkedAs checks what an external load balancer hears at a Service's health check port on a node.
func checkedAs(t *testing.T, w *world, name string, n *lab.Node, local int) {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{DialContext: w.Lab.Client.DialContext, DisableKeepAlives: true}}
	url := "http://" + netip.AddrPortFrom(n.V4, uint16(w.service(t, name).Spec.HealthCheckNodePort)).String() + "/"
	response, err := client.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	status := map[bool]int{false: http.StatusServiceUnavailable, true: http.StatusOK}[local > 0]
	want := fmt.Sprintf(`{"service":{"namespace":"default","name":%q},"localEndpoints":%d,"serviceProxyHealthy":true}`, name, local)
	compact := strings.Join(strings.Fields(string(body)), "")
	if weight := response.Header.Get("X-Load-Balancing-Endpoint-Weight"); response.StatusCode != status || compact != want || weight != strconv.Itoa(local) {
		t.Errorf("%s: %s, weight %q, %s, want %d, %d, %s", url, response.Status, weight, compact, status, local, want)
	}
}

func internalPolicyLocal(t *testing.T, w *world) {
	a, b, c := oneEach(t, w)
	applyFor(t, w, service("inside", "", "internalTrafficPolicy: Local\ntype: NodePort")+slicesOf("inside", ready(a, b)...))
	var dropped []question
	for _, family := range families {
		for _, protocol := range []string{"tcp", "udp"} {
			at := netip.AddrPortFrom(w.clusterIP(t, "inside", family.ipv6), 80)
			for _, p := range []*lab.Pod{a, b} {
				answeredBy(t, p.Node.Host, protocol, at, p)
				answeredBy(t, p.Host, protocol, at, p)
			}
			dropped = append(dropped, question{c.Host, protocol, at}, question{c.Node.Host, protocol, at})
			answeredBy(t, w.Lab.Client, protocol, w.nodePort(t, "inside", protocol, c.Node, family.ipv6), a, b)
		}
	}
	unanswered(t, dropped...)
}

func sourceRanges(t *testing.T, w *world) {
	a, b, c := oneEach(t, w)
	client, outside := w.Lab.Client, w.Lab.Outside
	ranged := func(ranges string) string {
		return service("ranged", "", "type: LoadBalancer\nloadBalancerSourceRanges: ["+ranges+"]")
	}
	applyFor(t, w, pools)
	applyFor(t, w, ranged(fmt.Sprintf(`%s/32, "%s/128"`, client.V4, client.V6))+slicesOf("ranged", ready(a, b)...))
	var vips []netip.AddrPort
	var held []*lab.Held
	var dropped []question
	for _, family := range families {
		vip := netip.AddrPortFrom(w.address(t, "ranged", family.ipv6), 80)
		vips = append(vips, vip)
		for _, protocol := range []string{"tcp", "udp"} {
			answeredBy(t, client, protocol, vip, a, b)
			for _, from := range []*lab.Host{outside, c.Host, c.Node.Host} {
				dropped = append(dropped, question{from, protocol, vip})
			}
		}
		answeredBy(t, c.Host, "tcp", netip.AddrPortFrom(w.clusterIP(t, "ranged", family.ipv6), 80), a, b) // ranges are for load balancers
		h, err := client.Hold(t.Context(), "tcp", vip, 50*time.Millisecond, 10*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		held = append(held, h)
	}
	unanswered(t, dropped...)
	v4, v6 := lab.WAN()
	apply(t, w, ranged(fmt.Sprintf(`%s, %s, "%s", "%s"`, v4, c.Node.Pods4, v6, c.Node.Pods6)))
	dropped = nil
	for _, vip := range vips {
		for _, protocol := range []string{"tcp", "udp"} {
			answeredBy(t, outside, protocol, vip, a, b)
			answeredBy(t, c.Host, protocol, vip, a, b)
			dropped = append(dropped, question{client, protocol, vip}, question{c.Node.Host, protocol, vip})
		}
	}
	unanswered(t, dropped...)
	for _, h := range held {
		before := h.Report().Echoes
		await(t, "lines on an open connection of a client that is no longer let in", func(context.Context) error {
			r := h.Report()
			if r.Broken == nil && r.Echoes < before+3 {
				return fmt.Errorf("%d lines since", r.Echoes-before)
			}
			return r.Broken
		})
		h.Release()
	}
	apply(t, w, ranged(`0.0.0.0/0`))
	for _, vip := range vips {
		for _, from := range []*lab.Host{client, outside, c.Node.Host} {
			answeredBy(t, from, "tcp", vip, a, b)
		}
	}
}

const lastPod = `
apiVersion: v1
kind: Pod
metadata: {name: last, labels: {app: last}}
spec:
  terminationGracePeriodSeconds: 10
  containers:
  - {name: last, image: lab, ports: [{containerPort: 8080}], lifecycle: {preStop: {sleep: {seconds: 6}}}}
`

func terminating(t *testing.T, w *world) {
	a, b, c := oneEach(t, w)
	applyFor(t, w, service("leaving", "", "")+slicesOf("leaving", handMade{a, leaving}, handMade{b, stopped}))
	for _, family := range families {
		answeredBy(t, c.Host, "tcp", netip.AddrPortFrom(w.clusterIP(t, "leaving", family.ipv6), 80), a)
	}
	apply(t, w, slicesOf("leaving", handMade{a, leaving}, handMade{b, stopped}, handMade{pod: c}))
	for _, family := range families {
		answeredBy(t, c.Node.Host, "udp", netip.AddrPortFrom(w.clusterIP(t, "leaving", family.ipv6), 80), c)
	}
	// The only pod of a Service is deleted and takes its time: Kubernetes' own EndpointSlice controller says so.
	apply(t, w, lastPod)
	applyFor(t, w, `
apiVersion: v1
kind: Service
metadata: {name: last}
spec: {selector: {app: last}, ports: [{port: 80, targetPort: 8080}]}
`)
	at := netip.AddrPortFrom(w.clusterIP(t, "last", false), 80)
	awaitAnswer(t, c.Host, "tcp", at)
	if err := w.Cluster.Delete(t.Context(), lastPod); err != nil {
		t.Fatal(err)
	}
	await(t, "an endpoint that is not ready, and serves while it terminates", func(ctx context.Context) error {
		list, err := w.Cluster.Client().DiscoveryV1().EndpointSlices("default").List(ctx, metav1.ListOptions{LabelSelector: "kubernetes.io/service-name=last"})
		if err != nil {
			return err
		}
		for _, s := range list.Items {
			for _, e := range s.Endpoints {
				if x := e.Conditions; !*x.Ready && *x.Serving && *x.Terminating {
					return nil
				}
			}
		}
		return fmt.Errorf("%d slices", len(list.Items))
	})
	for range 10 {
		if _, err := c.Ask(t.Context(), "tcp", at); err != nil {
			t.Fatal(err)
		}
	}
	await(t, "refusal, when the pod is gone", func(ctx context.Context) error {
		if _, err := c.Ask(ctx, "tcp", at); !errors.Is(err, syscall.ECONNREFUSED) {
			return fmt.Errorf("got %w", err)
		}
		return nil
	})
}

// realServer is a line of ipvsadm -Ln.
type realServer struct{ weight, active, inactive int }

// realServers is the real servers of a TCP frontend on a node by their addresses, as Debian's ipvsadm sees them; nil if
// there is no such virtual server.
func realServers(t *testing.T, n *lab.Node, at netip.AddrPort) map[netip.Addr]realServer {
	t.Helper()
	table, err := n.Run(t.Context(), "ipvsadm", "-Ln")
	if err != nil {
		t.Fatal(err)
	}
	var reals map[netip.Addr]realServer
	ours := false
	for line := range strings.Lines(table) {
		words := strings.Fields(line)
		switch {
		case len(words) < 2:
		case words[0] == "->" && ours:
			var numbers [3]int
			for i := range numbers {
				if numbers[i], err = strconv.Atoi(words[3+i]); err != nil {
					t.Fatalf("%q: %v", line, err)
				}
			}
			reals[netip.MustParseAddrPort(words[1]).Addr()] = realServer{numbers[0], numbers[1], numbers[2]}
		case words[0] != "->":
			if ours = words[0] == "TCP" && words[1] == at.String(); ours {
				reals = map[netip.Addr]realServer{}
			}
		}
	}
	return reals
}

// awaitWeight waits until a pod is a real server of a frontend with a weight; -1 stands for no real server.
func awaitWeight(t *testing.T, n *lab.Node, at netip.AddrPort, pod *lab.Pod, weight int) {
	t.Helper()
	await(t, fmt.Sprintf("weight %d of %s at %s on %s", weight, pod.Name, at, n.Name), func(context.Context) error {
		r, ok := realServers(t, n, at)[pod.Addr(at.Addr().Is6())]
		if !ok {
			r.weight = -1
		}
		if r.weight != weight {
			return fmt.Errorf("it is %d", r.weight)
		}
		return nil
	})
}

// holdAt holds a connection that a certain pod answers.
func holdAt(t *testing.T, from *lab.Host, at netip.AddrPort, pod *lab.Pod) (held *lab.Held) {
	t.Helper()
	await(t, "a connection to "+pod.Name, func(ctx context.Context) (err error) {
		held, err = from.Hold(t.Context(), "tcp", at, 50*time.Millisecond, 5*time.Second)
		if err == nil && held.Answer.Pod != pod.Name {
			held.Release()
			err = fmt.Errorf("%s has it", held.Answer.Pod)
		}
		return err
	})
	return held
}

// lives checks that lines still come back on a connection.
func lives(t *testing.T, held *lab.Held) {
	t.Helper()
	before := held.Report().Echoes
	await(t, "lines from "+held.Answer.Pod, func(context.Context) error {
		if r := held.Report(); r.Broken == nil && r.Echoes < before+2 {
			return errors.New("none")
		}
		return nil
	})
	if r := held.Report(); r.Broken != nil {
		t.Error(r.Broken)
	}
}

// breaks waits until a connection has ended.
func breaks(t *testing.T, held *lab.Held) {
	t.Helper()
	await(t, "the end of a connection to "+held.Answer.Pod, func(context.Context) error {
		if held.Report().Broken == nil {
			return errors.New("it goes on")
		}
		return nil
	})
}

func draining(t *testing.T, w *world) {
	a, b, c := oneEach(t, w)
	t.Run("AcrossRestart", func(t *testing.T) {
		// The first pod gets just one connection: IPVS would count others that have ended for two minutes more.
		applyFor(t, w, service("drained", "", "")+slicesOf("drained", ready(a)...))
		at := netip.AddrPortFrom(w.clusterIP(t, "drained", false), 80)
		held := holdAt(t, c.Host, at, a)
		apply(t, w, slicesOf("drained", handMade{a, notReady}, handMade{pod: b}))
		awaitWeight(t, c.Node, at, a, 0)
		answeredBy(t, c.Host, "tcp", at, b)
		lives(t, held)
		apply(t, w, slicesOf("drained", handMade{pod: b}))
		restart(t, w, c.Node)
		awaitWeight(t, c.Node, at, a, 0)
		answeredBy(t, c.Host, "tcp", at, b)
		lives(t, held)
		if r := realServers(t, c.Node, at)[a.V4]; r.active != 1 || r.inactive != 0 {
			t.Errorf("%s has %+v connections, want the one that is held", a.Name, r)
		}
		if err := held.Reset(); err != nil {
			t.Fatal(err)
		}
		awaitWeight(t, c.Node, at, a, -1)
	})
	t.Run("Returns", func(t *testing.T) {
		applyFor(t, w, service("returning", "", "")+slicesOf("returning", ready(a, b)...))
		at := netip.AddrPortFrom(w.clusterIP(t, "returning", true), 80)
		held := holdAt(t, c.Host, at, a)
		apply(t, w, slicesOf("returning", ready(b)...))
		awaitWeight(t, c.Node, at, a, 0)
		answeredBy(t, c.Host, "tcp", at, b)
		apply(t, w, slicesOf("returning", ready(a, b)...))
		awaitWeight(t, c.Node, at, a, 1)
		answeredBy(t, c.Host, "tcp", at, a, b)
		lives(t, held)
		if r := held.Release(); r.Broken != nil {
			t.Error(r.Broken)
		}
	})
	t.Run("Timeout", func(t *testing.T) {
		applyFor(t, w, service("capped", "longshore.dev/drain-timeout: 3s", "")+slicesOf("capped", ready(a, b)...))
		at := netip.AddrPortFrom(w.clusterIP(t, "capped", false), 80)
		held := holdAt(t, c.Host, at, a)
		apply(t, w, slicesOf("capped", ready(b)...))
		awaitWeight(t, c.Node, at, a, 0)
		began := time.Now()
		awaitWeight(t, c.Node, at, a, -1)
		if took := time.Since(began); took < 1500*time.Millisecond || took > 15*time.Second {
			t.Errorf("it drained for %v, want 3 s", took)
		}
		breaks(t, held)
	})
	t.Run("Deletion", func(t *testing.T) {
		text := service("deleted", "", "") + slicesOf("deleted", ready(a)...)
		apply(t, w, text)
		at := netip.AddrPortFrom(w.clusterIP(t, "deleted", false), 80)
		held := holdAt(t, c.Host, at, a)
		if err := w.Cluster.Delete(t.Context(), text); err != nil {
			t.Fatal(err)
		}
		await(t, "no virtual server "+at.String(), func(context.Context) error {
			if r := realServers(t, c.Node, at); r != nil {
				return fmt.Errorf("its real servers: %v", r)
			}
			return nil
		})
		breaks(t, held)
	})
}

// restart ends a node's agent without a word and waits until its successor is ready.
func restart(t *testing.T, w *world, n *lab.Node) {
	t.Helper()
	if err := w.KillAgent(n); err != nil {
		t.Fatal(err)
	}
	ctx := context.WithoutCancel(t.Context()) // it is for cleaning up too
	err := lab.Await(ctx, "the agent's end", waitFor, func(ctx context.Context) error {
		if _, err := w.Longshore(ctx, n, "status"); err == nil {
			return errors.New("it still answers")
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	err = lab.Await(ctx, "the agent of "+n.Name+" to be ready again", waitFor, func(ctx context.Context) error {
		out, err := w.Longshore(ctx, n, "status")
		if err == nil && !strings.Contains(out, n.Name+": ready") {
			err = errors.New(out)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// stream is a UDP client that asks from one port all the time.
type stream struct {
	conn net.Conn
	done chan struct{}
	mu   sync.Mutex
	last string               // the pod that answered last
	when map[string]time.Time // each pod's last answer
	from map[string]time.Time // and its first
}

func startStream(t *testing.T, from *lab.Host, at netip.AddrPort) *stream {
	t.Helper()
	conn, err := from.DialContext(t.Context(), "udp", at.String())
	if err != nil {
		t.Fatal(err)
	}
	s := &stream{conn: conn, done: make(chan struct{}), when: map[string]time.Time{}, from: map[string]time.Time{}}
	go func() {
		defer close(s.done)
		packet := make([]byte, 1<<10)
		for {
			if _, err := conn.Write([]byte("hello\n")); errors.Is(err, net.ErrClosed) {
				return
			}
			_ = conn.SetReadDeadline(time.Now().Add(50 * time.Millisecond)) // fails when the next Write will
			n, err := conn.Read(packet)
			if err != nil {
				continue
			}
			s.hear(strings.Fields(string(packet[:n]))[0])
			time.Sleep(10 * time.Millisecond)
		}
	}()
	t.Cleanup(func() {
		_ = conn.Close() // of UDP; nothing is lost
		<-s.done
	})
	return s
}

func (s *stream) hear(pod string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	if s.last = pod; s.from[pod].IsZero() {
		s.from[pod] = now
	}
	s.when[pod] = now
}

func (s *stream) hears(pod *lab.Pod) func(context.Context) error {
	began := time.Now()
	return func(context.Context) error {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.last != pod.Name || s.when[pod.Name].Before(began) {
			return fmt.Errorf("it hears %q", s.last)
		}
		return nil
	}
}

func (s *stream) port() uint16 { return s.conn.LocalAddr().(*net.UDPAddr).AddrPort().Port() }

func udpMoves(t *testing.T, w *world) {
	a, b, c := oneEach(t, w)
	applyFor(t, w, service("datagrams", "", "type: NodePort")+slicesOf("datagrams", ready(a)...))
	var streams []*stream
	var frontends []netip.AddrPort
	for _, family := range families {
		inside := netip.AddrPortFrom(w.clusterIP(t, "datagrams", family.ipv6), 80)
		node := w.nodePort(t, "datagrams", "udp", c.Node, family.ipv6)
		answeredBy(t, c.Host, "udp", inside, a)
		answeredBy(t, w.Lab.Client, "udp", node, a)
		streams = append(streams, startStream(t, c.Host, inside), startStream(t, w.Lab.Client, node))
		frontends = append(frontends, inside, node)
	}
	for _, s := range streams {
		await(t, "the first pod", s.hears(a))
	}
	// As long as the pod serves, its clients stay with it; new ones go elsewhere.
	apply(t, w, slicesOf("datagrams", handMade{a, leaving}, handMade{pod: b}))
	for i, from := range []*lab.Host{c.Host, w.Lab.Client, c.Host, w.Lab.Client} {
		answeredBy(t, from, "udp", frontends[i], b)
	}
	for _, s := range streams {
		await(t, "the pod that leaves", s.hears(a))
	}
	apply(t, w, slicesOf("datagrams", handMade{pod: b}))
	for _, s := range streams {
		await(t, "the other pod", s.hears(b))
		s.mu.Lock()
		if gap := s.from[b.Name].Sub(s.when[a.Name]); gap > time.Second {
			t.Errorf("from %s nobody answered for %v", s.conn.LocalAddr(), gap)
		}
		s.mu.Unlock()
	}
	// A late answer of the pod that is gone may begin a connection of its own in the node's table; that keeps no client from the other.
	late := func(line string) bool {
		return strings.Contains(line, "[UNREPLIED]") && slices.ContainsFunc([]string{a.V4.String(), a.V6.String()}, func(pod string) bool {
			return strings.Index(line, "src="+pod+" ") == strings.Index(line, "src=")
		})
	}
	for _, look := range [][]string{{"ipvsadm", "-Lnc"}, {"conntrack", "-L", "-p", "udp"}, {"conntrack", "-L", "-p", "udp", "-f", "ipv6"}} {
		out, err := c.Node.Run(t.Context(), look[0], look[1:]...)
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(out) {
			for _, s := range streams {
				client := []string{fmt.Sprintf(":%d ", s.port()), fmt.Sprintf("sport=%d ", s.port())}
				pod := []string{a.V4.String() + ":8080", a.V6.String() + "]:8080", "src=" + a.V4.String() + " ", "src=" + a.V6.String() + " "}
				has := func(word string) bool { return strings.Contains(line, word) }
				if slices.ContainsFunc(client, has) && slices.ContainsFunc(pod, has) && !late(line) {
					t.Errorf("%s still has %s", strings.Join(look, " "), line)
				}
			}
		}
	}
}

func sctpIsServed(t *testing.T, w *world) {
	if _, err := os.Stat("/sys/module/sctp"); err == nil != w.sctpBefore {
		t.Errorf("module sctp: loaded is %v now, was %v before longshore came", err == nil, w.sctpBefore)
	}
	a, b, c := oneEach(t, w)
	for _, p := range []*lab.Pod{a, b} {
		server, err := p.Serve(p.Name+"-sctp", "9000/SCTP")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := server.Stop(); err != nil {
				t.Error(err)
			}
		})
	}
	text := `
apiVersion: v1
kind: Service
metadata: {name: associations}
spec:
  type: NodePort
  ipFamilyPolicy: RequireDualStack
  ports: [{name: tcp, port: 80, targetPort: 9000, protocol: SCTP}]
` + strings.ReplaceAll(slicesOf("associations", ready(a, b)...), "{name: tcp, port: 8080}", "{name: tcp, port: 9000, protocol: SCTP}")
	applyFor(t, w, text)
	for _, family := range families {
		at := netip.AddrPortFrom(w.clusterIP(t, "associations", family.ipv6), 80)
		for _, from := range []*lab.Host{c.Host, c.Node.Host} {
			spread(t, from, "sctp", at, 2)
		}
		seenAs(t, c.Addr(family.ipv6), spread(t, c.Host, "sctp", at, 2))
		spread(t, w.Lab.Client, "sctp", w.nodePort(t, "associations", "tcp", c.Node, family.ipv6), 2)
	}
}

func topology(t *testing.T, w *world) {
	zones := map[string]string{"n1": "east", "n2": "west", "n3": "west"}
	for node, zone := range zones {
		kubectl(t, w, "label", "node", node, "topology.kubernetes.io/zone="+zone)
		t.Cleanup(func() { kubectl(t, w, "label", "node", node, "topology.kubernetes.io/zone-") })
	}
	near := func(name, distribution string) string {
		return service(name, "", "selector: {app: web}\ntrafficDistribution: "+distribution)
	}
	applyFor(t, w, near("same-node", "PreferSameNode"))
	applyFor(t, w, near("same-zone", "PreferSameZone"))
	for _, family := range families {
		node, zone := netip.AddrPortFrom(w.clusterIP(t, "same-node", family.ipv6), 80), netip.AddrPortFrom(w.clusterIP(t, "same-zone", family.ipv6), 80)
		for _, n := range w.Lab.Nodes {
			var here, around []*lab.Pod
			for _, p := range w.pods {
				if p.Node == n {
					here = append(here, p)
				}
				if zones[p.Node.Name] == zones[n.Name] {
					around = append(around, p)
				}
			}
			answeredBy(t, w.podOn(t, n).Host, "tcp", node, here...)
			answeredBy(t, n.Host, "udp", zone, around...)
		}
	}
}

func kubectl(t *testing.T, w *world, args ...string) {
	t.Helper()
	if _, err := w.Cluster.Kubectl(context.WithoutCancel(t.Context()), args...); err != nil {
		t.Error(err)
	}
}

func options(t *testing.T, w *world) {
	a, b, c := oneEach(t, w)
	kubectl(t, w, "label", "node", a.Node.Name, "example.org/size=large")
	kubectl(t, w, "annotate", "pod", b.Object.Name, "longshore.dev/weight=3")
	t.Cleanup(func() {
		kubectl(t, w, "label", "node", a.Node.Name, "example.org/size-")
		kubectl(t, w, "annotate", "pod", b.Object.Name, "longshore.dev/weight-")
	})
	for name, annotations := range map[string]string{
		"hashed":   "longshore.dev/scheduler: mh, longshore.dev/scheduler-flags: 'mh-fallback,mh-port'",
		"limited":  "longshore.dev/max-connections: '100', longshore.dev/min-connections: '50'",
		"by-nodes": "longshore.dev/scheduler: wrr, longshore.dev/node-weights: 'example.org/size=large:3'",
		"by-pods":  "longshore.dev/scheduler: wrr, longshore.dev/pod-weights: 'true'",
	} {
		applyFor(t, w, service(name, annotations, "")+slicesOf(name, ready(a, b)...))
	}
	applyFor(t, w, service("slow", "longshore.dev/scheduler: wrr, longshore.dev/slow-start: 5s", "")+slicesOf("slow", ready(b)...))
	frontend := func(name string) netip.AddrPort { return netip.AddrPortFrom(w.clusterIP(t, name, false), 80) }
	prints := func(at netip.AddrPort, option, want string) {
		t.Helper()
		await(t, fmt.Sprintf("%q by ipvsadm -Ln %s -t %s", want, option, at), func(ctx context.Context) error {
			table, err := c.Node.Run(ctx, "ipvsadm", strings.Fields("-Ln "+option+" -t "+at.String())...)
			if err == nil && !strings.Contains(strings.Join(strings.Fields(table), " "), want) {
				err = errors.New(table)
			}
			return err
		})
	}
	prints(frontend("hashed"), "", "mh (mh-fallback,mh-port)")
	prints(frontend("limited"), "--thresholds", a.V4.String()+":8080 100 50")
	for name, heavy := range map[string]*lab.Pod{"by-nodes": a, "by-pods": b} {
		at := frontend(name)
		awaitWeight(t, c.Node, at, heavy, 3)
		answeredBy(t, c.Host, "tcp", at, a, b)
		shares := map[string]int{}
		for range 40 {
			answer, err := c.Ask(t.Context(), "tcp", at)
			if err != nil {
				t.Fatal(err)
			}
			shares[answer.Pod]++
		}
		if shares[heavy.Name] != 30 {
			t.Errorf("%s: of 40 answers %v, want 30 from %s", name, shares, heavy.Name)
		}
	}
	at := frontend("slow")
	awaitWeight(t, c.Node, at, b, 100)
	apply(t, w, slicesOf("slow", ready(a, b)...))
	var weights []int
	began := time.Now()
	await(t, "the full weight", func(context.Context) error {
		r, ok := realServers(t, c.Node, at)[a.V4]
		switch {
		case !ok:
			began = time.Now()
		case len(weights) == 0 || weights[len(weights)-1] != r.weight:
			weights = append(weights, r.weight)
		}
		if r.weight != 100 {
			return fmt.Errorf("weights %v", weights)
		}
		return nil
	})
	if took := time.Since(began); !slices.IsSorted(weights) || len(weights) < 4 || weights[0] > 40 || took < 4*time.Second {
		t.Errorf("the weight went %v in %v, want steps up to 100 in 5 s", weights, took)
	}
}

func kindsOfServices(t *testing.T, w *world) {
	a, b, c := oneEach(t, w)
	client := w.Lab.Client
	t.Run("ExternalIPs", func(t *testing.T) {
		external := []netip.Addr{netip.MustParseAddr("198.51.100.7"), netip.MustParseAddr("2001:db8:1::7")}
		applyFor(t, w, service("external", "", `externalIPs: [198.51.100.7, "2001:db8:1::7"]`)+slicesOf("external", ready(a, b)...))
		for _, addr := range external {
			to, via := netip.PrefixFrom(addr, addr.BitLen()).String(), c.Node.Addr(addr.Is6()).String()
			if _, err := client.Run(t.Context(), "ip", "route", "add", to, "via", via); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if _, err := client.Run(context.WithoutCancel(t.Context()), "ip", "route", "del", to); err != nil {
					t.Error(err)
				}
			})
			for _, from := range []*lab.Host{client, c.Host, a.Node.Host} {
				answeredBy(t, from, "tcp", netip.AddrPortFrom(addr, 80), a, b)
			}
		}
	})
	t.Run("HostNetwork", func(t *testing.T) {
		n := b.Node
		server, err := n.Serve("host-"+n.Name, "8090/TCP", "8090/UDP")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := server.Stop(); err != nil {
				t.Error(err)
			}
		})
		onHost := strings.NewReplacer("8080", "8090", `"`+b.V4.String()+`"`, n.V4.String(), `"`+b.V6.String()+`"`, `"`+n.V6.String()+`"`)
		applyFor(t, w, service("on-host", "", "type: NodePort")+onHost.Replace(slicesOf("on-host", ready(b)...)))
		for _, family := range families {
			for _, protocol := range []string{"tcp", "udp"} {
				inside := netip.AddrPortFrom(w.clusterIP(t, "on-host", family.ipv6), 80)
				for _, q := range []question{
					{n.Host, protocol, inside}, // to itself
					{b.Host, protocol, inside},
					{a.Host, protocol, inside},
					{a.Node.Host, protocol, inside},
					{client, protocol, w.nodePort(t, "on-host", protocol, n, family.ipv6)},
					{client, protocol, w.nodePort(t, "on-host", protocol, a.Node, family.ipv6)},
				} {
					if answer := awaitAnswer(t, q.from, protocol, q.at); answer.Pod != "host-"+n.Name {
						t.Errorf("%s asked %s, which %s answered", q.from.Name, q.at, answer.Pod)
					}
				}
			}
		}
	})
	t.Run("OtherProxy", func(t *testing.T) {
		applyFor(t, w, service("elsewhere", "", "")+slicesOf("elsewhere", ready(a, b)...))
		at := netip.AddrPortFrom(w.clusterIP(t, "elsewhere", false), 80)
		answeredBy(t, c.Host, "tcp", at, a, b)
		kubectl(t, w, "label", "service", "elsewhere", "service.kubernetes.io/service-proxy-name=other")
		gone(t, c.Node, at)
		kubectl(t, w, "label", "service", "elsewhere", "service.kubernetes.io/service-proxy-name-")
		answeredBy(t, c.Host, "tcp", at, a, b)
	})
	t.Run("TypeChanges", func(t *testing.T) {
		applyFor(t, w, service("changing", "", "type: ClusterIP")+slicesOf("changing", ready(a, b)...))
		inside := netip.AddrPortFrom(w.clusterIP(t, "changing", true), 80)
		answeredBy(t, c.Host, "tcp", inside, a, b)
		apply(t, w, service("changing", "", "type: NodePort"))
		node := w.nodePort(t, "changing", "tcp", c.Node, true)
		answeredBy(t, client, "tcp", node, a, b)
		apply(t, w, `
apiVersion: v1
kind: Service
metadata: {name: changing}
spec: {type: ExternalName, externalName: example.org}
`)
		gone(t, c.Node, inside)
		gone(t, c.Node, node)
		apply(t, w, service("changing", "", "type: NodePort"))
		answeredBy(t, c.Host, "tcp", netip.AddrPortFrom(w.clusterIP(t, "changing", true), 80), a, b)
		node = w.nodePort(t, "changing", "tcp", c.Node, true)
		answeredBy(t, client, "tcp", node, a, b)
		apply(t, w, service("changing", "", "type: ClusterIP"))
		gone(t, c.Node, node)
	})
}

// gone waits until a node has no virtual server at a TCP frontend.
func gone(t *testing.T, n *lab.Node, at netip.AddrPort) {
	t.Helper()
	await(t, fmt.Sprintf("no virtual server %s on %s", at, n.Name), func(context.Context) error {
		if r := realServers(t, n, at); r != nil {
			return fmt.Errorf("its real servers: %v", r)
		}
		return nil
	})
}

func masqueradePorts(t *testing.T, w *world) {
	a, b, c := oneEach(t, w)
	applyFor(t, w, service("masked", "", "type: NodePort")+slicesOf("masked", ready(a, b)...))
	// The client's own ports are those of node ports: masquerade that may keep them does.
	const setting = "net.ipv4.ip_local_port_range"
	before, err := w.Lab.Client.Run(t.Context(), "sysctl", "-n", setting)
	if err == nil {
		_, err = w.Lab.Client.Run(t.Context(), "sysctl", "-w", setting+"=30000 32767")
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if _, err := w.Lab.Client.Run(context.WithoutCancel(t.Context()), "sysctl", "-w", setting+"="+strings.TrimSpace(before)); err != nil {
			t.Error(err)
		}
	})
	for _, family := range families {
		for _, protocol := range []string{"tcp", "udp"} {
			at := w.nodePort(t, "masked", protocol, c.Node, family.ipv6)
			answeredBy(t, w.Lab.Client, protocol, at, a, b)
			for range 50 {
				answer, err := w.Lab.Client.Ask(t.Context(), protocol, at)
				if err != nil {
					t.Fatal(err)
				}
				if answer.Saw.Addr() != c.Node.Addr(family.ipv6) {
					t.Fatalf("%s saw %s, not the node", answer.Pod, answer.Saw)
				}
				if port := answer.Saw.Port(); port < 32768 || answer.From.Port() > 32767 {
					t.Fatalf("over %s, %s saw port %d for the client's %d: a node port may be that", protocol, answer.Pod, port, answer.From.Port())
				}
			}
		}
	}
}

func tamperedTables(t *testing.T, w *world) {
	a, b, c := oneEach(t, w)
	n := c.Node
	run := func(command string) string {
		t.Helper()
		out, err := n.Run(context.WithoutCancel(t.Context()), strings.Fields(command)[0], strings.Fields(command)[1:]...)
		if err != nil {
			t.Error(err)
		}
		return out
	}
	// This node's agent looks at the kernel as often as it can be told to.
	setAuditPeriod(t, w, n, "10s")
	t.Cleanup(func() { setAuditPeriod(t, w, n, "5m") })
	run("ipvsadm -A -t 203.0.113.10:80 -s sh")
	run("ipvsadm -a -t 203.0.113.10:80 -r 10.9.9.9:80 -m -w 3")
	t.Cleanup(func() { run("ipvsadm -D -t 203.0.113.10:80") })
	applyFor(t, w, service("tampered", "", "type: NodePort\nexternalIPs: [198.51.100.8, 203.0.113.10]")+slicesOf("tampered", ready(a, b)...))
	awaitEvent(t, w, "ForeignVirtualServer", "203.0.113.10:80")
	inside := netip.AddrPortFrom(w.clusterIP(t, "tampered", false), 80)
	inside6 := netip.AddrPortFrom(w.clusterIP(t, "tampered", true), 80)
	external := netip.MustParseAddrPort("198.51.100.8:80")
	outside := w.nodePort(t, "tampered", "tcp", n, false)
	served := func() {
		t.Helper()
		answeredBy(t, c.Host, "tcp", inside, a, b)
		answeredBy(t, c.Host, "udp", inside6, a, b)
		answeredBy(t, n.Host, "tcp", external, a, b)
		for _, answer := range answeredBy(t, w.Lab.Client, "tcp", outside, a, b) {
			if answer.Saw.Addr() != n.V4 {
				t.Errorf("%s saw %s: the masquerade is gone", answer.Pod, answer.Saw)
			}
		}
	}
	served()
	tables := func() []string { return strings.Split(run("nft -s list ruleset"), "\n") }
	before, servers := tables(), run("ipvsadm -Sn")
	// An audit tries for a moment to have the foreign virtual server's frontend.
	await(t, "the same tables twice", func(context.Context) error {
		last := before
		before = tables()
		if diff := cmp.Diff(last, before); diff != "" {
			return fmt.Errorf("they change: %s", diff)
		}
		return nil
	})
	for _, damage := range [][]string{
		{
			fmt.Sprintf("nft delete element ip longshore frontends { %s . tcp . 80 }", inside.Addr()),
			fmt.Sprintf("nft delete element ip longshore masqueraded { %s . tcp . %d }", outside.Addr(), outside.Port()),
			"ipvsadm -d -t " + inside.String() + " -r " + a.V4.String() + ":8080",
			"ipvsadm -D -u " + inside6.String(),
			"ip route del local " + external.Addr().String() + " table local",
		},
		{"nft flush chain ip longshore external", "nft flush chain ip longshore input"},
		{"nft flush ruleset"},
	} {
		for _, command := range damage {
			run(command)
		}
		await(t, fmt.Sprintf("what was before %q", damage), func(context.Context) error {
			if diff := cmp.Diff(before, tables()); diff != "" {
				return fmt.Errorf("nftables (-before +now): %s", diff)
			}
			if now := run("ipvsadm -Sn"); now != servers {
				return fmt.Errorf("ipvsadm has\n%s", now)
			}
			return nil
		})
		served()
	}
	if table := run("ipvsadm -Ln -t 203.0.113.10:80"); !strings.Contains(table, "203.0.113.10:80 sh") || strings.Count(table, "Masq") != 1 {
		t.Errorf("somebody else's virtual server is now\n%s", table)
	}
}

// setAuditPeriod restarts one agent with another audit period.
func setAuditPeriod(t *testing.T, w *world, n *lab.Node, period string) {
	t.Helper()
	ctx := context.WithoutCancel(t.Context())
	configs := w.Cluster.Client().CoreV1().ConfigMaps(Namespace)
	config, err := configs.Get(ctx, "longshore-agent", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	for line := range strings.Lines(config.Data["agent.yaml"]) {
		if strings.HasPrefix(line, "auditPeriod:") {
			line = "auditPeriod: " + period + "\n"
		}
		lines = append(lines, line)
	}
	patch := fmt.Sprintf(`{"data": {"agent.yaml": %q}}`, strings.Join(lines, ""))
	if _, err := configs.Patch(ctx, "longshore-agent", types.MergePatchType, []byte(patch), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	restart(t, w, n)
}
