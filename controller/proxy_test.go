package controller

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/longshore-lb/longshore/announcer"
	"github.com/longshore-lb/longshore/ipvs"
)

// slice is an EndpointSlice of a Service; each endpoint is "address" or "address node" or "address node pod".
func slice(service string, endpoints ...string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: %s-1, labels: {kubernetes.io/service-name: %s}}\n"+
		"addressType: IPv4\nports: [{port: 8080}]\nendpoints:\n", service, service)
	for _, e := range endpoints {
		words := strings.Fields(e + " n1")
		fmt.Fprintf(&b, "  - {addresses: [%s], nodeName: %s", words[0], words[1])
		if len(words) > 3 {
			fmt.Fprintf(&b, ", targetRef: {kind: Pod, name: %s}", words[2])
		}
		b.WriteString("}\n")
	}
	return b.String()
}

// lone is node n1, alone and without pools.
func lone(t *testing.T) (*machine, *Inbox) {
	inbox := NewInbox()
	inbox.Put(StandaloneNode("n1", addrs("172.31.0.11")))
	return newMachine(t, "n1"), inbox
}

// An endpoint that comes to others starts slowly, those that were there when the agent started do not, and a ramp ends.
func TestAgentSlowStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, inbox := lone(t)
		a := m.start(inbox, nil)
		defer func() { a.stop() }()
		putAll(t, inbox, service("web", "192.0.2.1", 80, "longshore.dev/scheduler: wlc, longshore.dev/slow-start: 4s")+"---\n"+slice("web", "10.244.1.2"))
		inbox.Synced()
		m.happened()
		if w := m.weights("192.0.2.1:80"); w != "10.244.1.2:8080=100" {
			t.Errorf("weights at the start %s", w)
		}
		time.Sleep(upkeepEvery / 2) // between ticks
		putAll(t, inbox, slice("web", "10.244.1.2", "10.244.1.3"))
		m.expect("another endpoint", "add element ip longshore hairpin { 10.244.1.3 . 10.244.1.3 }", "-a -t 192.0.2.1:80 -r 10.244.1.3:8080 -m -w 1")
		for _, weight := range []int{12, 37, 62, 87, 100} {
			time.Sleep(upkeepEvery)
			m.expect("a second later", fmt.Sprintf("-e -t 192.0.2.1:80 -r 10.244.1.3:8080 -m -w %d", weight))
		}
		time.Sleep(time.Minute)
		m.expect("when the ramp is over")

		a.stop()
		m.set(func() { m.observed = 0 })
		a = m.start(inboxOf(t, service("web", "192.0.2.1", 80, "longshore.dev/scheduler: wlc, longshore.dev/slow-start: 4s")+"---\n"+slice("web", "10.244.1.2", "10.244.1.3")), nil)
		time.Sleep(time.Minute)
		m.expect("another agent")
		if m.observed != 1 {
			t.Errorf("the kernel was read %d times; nothing failed, so once is enough", m.observed)
		}
	})
}

// inboxOf is all that another agent on node n1 gets to see.
func inboxOf(t *testing.T, text string) *Inbox {
	inbox := NewInbox()
	inbox.Put(StandaloneNode("n1", addrs("172.31.0.11")))
	putAll(t, inbox, text)
	inbox.Synced()
	return inbox
}

// weights is the real servers of a TCP frontend with their weights.
func (m *machine) weights(frontend string) string {
	synctest.Wait()
	m.mu.Lock()
	defer m.mu.Unlock()
	of := m.state.RealServers[ipvs.At(ipvs.TCP, netip.MustParseAddrPort(frontend))]
	var out []string
	for _, at := range slices.SortedFunc(maps.Keys(of), netip.AddrPort.Compare) {
		out = append(out, fmt.Sprintf("%s=%d", at, of[at].Weight))
	}
	return strings.Join(out, " ")
}

// An endpoint that goes keeps its connections until they end or its time is over, whichever agent is there to see.
func TestAgentDrain(t *testing.T) {
	const annotations = "longshore.dev/drain-timeout: 30s"
	f, at := ipvs.At(ipvs.TCP, netip.MustParseAddrPort("192.0.2.1:80")), netip.MustParseAddrPort("10.244.1.2:8080")
	const quiet, gone = "-e -t 192.0.2.1:80 -r 10.244.1.2:8080 -m -w 0", "-d -t 192.0.2.1:80 -r 10.244.1.2:8080"
	objects := service("web", "192.0.2.1", 80, annotations) + "---\n" + slice("web", "10.244.1.3 n2")
	connections := func(m *machine, n int) {
		m.set(func() { m.connections = map[ipvs.Frontend]map[netip.AddrPort]int{f: {at: n}} })
	}
	for _, test := range []struct {
		name string
		then func(m *machine, a running) running
	}{
		{"until its connections end", func(m *machine, a running) running {
			time.Sleep(20 * time.Second)
			m.expect("with a connection")
			connections(m, 0)
			time.Sleep(upkeepEvery)
			m.expect("without one", gone)
			return a
		}},
		{"until its time is over", func(m *machine, a running) running {
			time.Sleep(29 * time.Second)
			m.expect("after 29 s")
			time.Sleep(2 * time.Second)
			m.expect("after 31 s", gone)
			return a
		}},
		{"over a restart", func(m *machine, a running) running {
			time.Sleep(20 * time.Second)
			a.stop()
			m.expect("the agent ends")
			a = m.start(inboxOf(m.t, objects), nil)
			time.Sleep(20 * time.Second)
			m.expect("another agent finds it at weight 0")
			connections(m, 0)
			time.Sleep(upkeepEvery)
			m.expect("its connections end", gone)
			return a
		}},
		{"over a restart, and has as much time again", func(m *machine, a running) running {
			time.Sleep(20 * time.Second)
			a.stop()
			m.happened()
			a = m.start(inboxOf(m.t, objects), nil)
			time.Sleep(29 * time.Second)
			m.expect("after 29 s")
			time.Sleep(2 * time.Second)
			m.expect("after 31 s", gone)
			return a
		}},
		{"begun by the agent after a restart", func(m *machine, a running) running {
			a.stop()
			m.set(func() { m.state.RealServers[f][at] = ipvs.RealServer{Addr: at, Weight: 1} }) // as if it had never been told
			a = m.start(inboxOf(m.t, objects), nil)
			m.expect("it finds a real server that nobody wants", quiet)
			time.Sleep(31 * time.Second)
			m.expect("after 31 s", gone)
			return a
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m, inbox := lone(t)
				putAll(t, inbox, service("web", "192.0.2.1", 80, annotations)+"---\n"+slice("web", "10.244.1.2 n2", "10.244.1.3 n2"))
				inbox.Synced()
				a := m.start(inbox, nil)
				m.happened()
				connections(m, 3)
				time.Sleep(upkeepEvery / 2)
				putAll(t, inbox, slice("web", "10.244.1.3 n2"))
				m.expect("the endpoint goes", quiet)
				a = test.then(m, a)
				time.Sleep(time.Minute)
				m.expect("later")
				if w := m.weights("192.0.2.1:80"); w != "10.244.1.3:8080=1" {
					t.Errorf("real servers at the end: %s", w)
				}
				a.stop()
			})
		})
	}
}

// Pods are watched once a Service wants their weights, and not before; a weight that comes, changes or goes is an update.
func TestAgentPodWeights(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, inbox := lone(t)
		watches := 0
		m.options = func(o *AgentOptions) { o.WatchPods = func() { watches++ } }
		a := m.start(inbox, nil)
		defer a.stop()
		pod := func(name, weight string) *metav1.PartialObjectMetadata {
			p := &metav1.PartialObjectMetadata{}
			p.Namespace, p.Name, p.Annotations = "default", name, map[string]string{WeightAnnotation: weight}
			return p
		}
		putAll(t, inbox, service("web", "192.0.2.1", 80, "longshore.dev/scheduler: wrr")+"---\n"+slice("web", "10.244.1.2 n2 a", "10.244.1.3 n2 b"))
		inbox.Synced()
		m.happened()
		if watches != 0 {
			t.Error("pods are watched, and nobody wants their weights")
		}
		const wanted = `longshore.dev/scheduler: wrr, longshore.dev/pod-weights: "true"`
		putAll(t, inbox, service("web", "192.0.2.1", 80, wanted))
		m.expect("weights are wanted, and none has arrived")
		for _, step := range []struct {
			what string
			do   func()
			want []string
		}{
			{"a weight", func() { inbox.Put(pod("a", "5")) }, []string{"-e -t 192.0.2.1:80 -r 10.244.1.2:8080 -m -w 5"}},
			{"the same again", func() { inbox.Put(pod("a", "5")) }, nil},
			{"of a pod that is no endpoint", func() { inbox.Put(pod("c", "5")) }, nil},
			{"one that is none", func() { inbox.Put(pod("a", "heavy")) }, []string{
				`Warning event on default/web: InvalidAnnotation: Pod default/a: annotation longshore.dev/weight: weight "heavy": must be a number from 0 to 65535`,
			}},
			{"0", func() { inbox.Put(pod("b", "0")) }, []string{"-e -t 192.0.2.1:80 -r 10.244.1.3:8080 -m -w 0"}},
			{"both go", func() { inbox.Remove(pod("a", "")); inbox.Remove(pod("b", "")) }, []string{
				"-e -t 192.0.2.1:80 -r 10.244.1.2:8080 -m -w 1", "-e -t 192.0.2.1:80 -r 10.244.1.3:8080 -m -w 1",
			}},
			{"another Service wants them", func() { putAll(t, inbox, service("api", "192.0.2.1", 81, wanted)) }, []string{
				"add element ip longshore frontends { 192.0.2.1 . tcp . 81 }", "add element ip longshore masqueraded { 192.0.2.1 . tcp . 81 }", "-A -t 192.0.2.1:81 -s wrr",
			}},
		} {
			step.do()
			got := m.happened()
			slices.Sort(got) // two changes may be two passes
			if want := slices.Sorted(slices.Values(step.want)); !slices.Equal(got, want) {
				t.Errorf("%s: %q, want %q", step.what, got, want)
			}
		}
		if watches != 1 {
			t.Errorf("pods are watched %d times", watches)
		}

		m, inbox = lone(t)
		b := m.start(inbox, nil)
		defer b.stop()
		putAll(t, inbox, service("web", "192.0.2.1", 80, wanted))
		inbox.Synced()
		if got := m.happened(); !slices.Contains(got, "Warning event on default/web: InvalidAnnotation: annotation longshore.dev/pod-weights: there are no pods without a cluster") {
			t.Errorf("where there are no pods: %q", got)
		}
	})
}

// A node port that a process of the node has is served all the same, and the Service gets an event, once.
func TestAgentNodePortInUse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, inbox := lone(t)
		m.taken = map[uint16]bool{30080: true, 80: true}
		a := m.start(inbox, nil)
		defer a.stop()
		const text = "apiVersion: v1\nkind: Service\nmetadata: {name: web, annotations: {%s}}\nspec: {type: NodePort, clusterIP: 10.96.1.1, " +
			"ports: [{name: a, port: 80, nodePort: 30079}, {name: b, port: 81, nodePort: %d}]}"
		putAll(t, inbox, fmt.Sprintf(text, "", 30080))
		inbox.Synced()
		const event = "Warning event on default/web: NodePortInUse: spec.ports[1].nodePort: 30080/TCP: a process of node n1 has this port; what is sent there goes to the Service now"
		got := m.happened()
		if n := len(slices.DeleteFunc(slices.Clone(got), func(s string) bool { return s != event })); n != 1 || !slices.Contains(got, "-A -t 172.31.0.11:30080 -s rr") {
			t.Errorf("%q, want the node port served and one event\n%s", got, event)
		}
		putAll(t, inbox, fmt.Sprintf(text, "some: thing", 30080))
		m.expect("a change of no importance")
		putAll(t, inbox, fmt.Sprintf(text, "", 30081))
		m.happened()
		status, err := a.Status(t.Context())
		if err != nil || len(status.Problems) > 0 {
			t.Errorf("problems %q (%v) with another node port", status.Problems, err)
		}
	})
}

// A ServiceCIDR with a node's address in it is not made local; its cluster IPs are, one by one.
func TestAgentOverlappingServiceCIDR(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, inbox := lone(t)
		inbox.Put(StandaloneNode("n2", addrs("10.96.7.7")))
		a := m.start(inbox, nil)
		defer a.stop()
		putAll(t, inbox, "apiVersion: networking.k8s.io/v1\nkind: ServiceCIDR\nmetadata: {name: kubernetes}\nspec: {cidrs: [\"fd96::/112\", 10.96.0.0/16]}\n---\n"+
			"apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {clusterIP: 10.96.1.1, ports: [{port: 80}]}")
		inbox.Synced()
		const event = `Warning event on /kubernetes: OverlapsNodes: ServiceCIDR kubernetes: spec.cidrs[1]: "10.96.0.0/16" has the address 10.96.7.7 of a node in it; ` +
			"its cluster IPs are served, but packets to its other addresses are not dropped"
		m.expect("it overlaps",
			event,
			"add element ip6 longshore service_cidrs { fd96::/112 }",
			"ip route add local fd96::/112 dev lo table local",
			"add element ip longshore frontends { 10.96.1.1 . tcp . 80 }",
			"add element ip longshore vips { 10.96.1.1 }",
			"-A -t 10.96.1.1:80 -s rr",
			"ip route add local 10.96.1.1/32 dev lo src 172.31.0.11 table local",
		)
		inbox.Put(StandaloneNode("n3", addrs("172.31.0.13")))
		m.expect("a change of no importance")
		inbox.Remove(StandaloneNode("n2", nil))
		m.expect("the node goes",
			"add element ip longshore service_cidrs { 10.96.0.0/16 }",
			"ip route add local 10.96.0.0/16 dev lo src 172.31.0.11 table local",
			"ip route del local 10.96.1.1/32 dev lo table local",
		)
	})
}

// On a node that has just booted the API server and DNS are served first, and of what an earlier process has left nothing goes
// before all that is wanted is there.
func TestAgentColdStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, inbox := lone(t)
		var old ipvs.State
		f := ipvs.At(ipvs.TCP, netip.MustParseAddrPort("10.96.9.9:80"))
		old.AddVirtualServer(ipvs.VirtualServer{Frontend: f, Scheduler: "rr"}, ipvs.RealServer{Addr: netip.MustParseAddrPort("10.244.9.9:80"), Weight: 1})
		old.AddFrontend(ipvs.Frontends, f)
		old.AddPrefix(ipvs.VIPs, netip.PrefixFrom(f.Addr.Addr(), 32))
		old.AddRoute(netip.PrefixFrom(f.Addr.Addr(), 32), netip.Addr{})
		m.state = old
		const others = 3 * firstChunk
		clusterIP := func(namespace, name, labels, addr string) string {
			return fmt.Sprintf("apiVersion: v1\nkind: Service\nmetadata: {namespace: %s, name: %s, labels: {%s}}\nspec: {clusterIP: %s, ports: [{port: 80}]}", namespace, name, labels, addr)
		}
		for i := range others {
			name := fmt.Sprintf("a%04d", i)
			putAll(t, inbox, clusterIP("a", name, "", fmt.Sprintf("10.96.%d.%d", 10+i/200, i%200)))
			putAll(t, inbox, strings.Replace(slice(name, "10.244.1.2 n2"), "metadata: {", "metadata: {namespace: a, ", 1))
		}
		putAll(t, inbox, clusterIP("default", "kubernetes", "", "10.96.255.1")+"\n---\n"+slice("kubernetes", "172.31.0.1 n2"))
		putAll(t, inbox, clusterIP("kube-system", "dns", "k8s-app: kube-dns", "10.96.255.10")+"\n---\n"+
			strings.Replace(slice("dns", "10.244.1.53 n2"), "metadata: {", "metadata: {namespace: kube-system, ", 1))
		inbox.Synced()
		a := m.start(inbox, nil)
		defer a.stop()
		var kubernetes, dns, added, deleted int // when they were complete; when the last thing was added, and the first deleted
		before := map[string]int{}              // Services that were there before
		served := 0
		for i, line := range m.happened() {
			switch {
			case strings.HasPrefix(line, "ip route add local 10.96.255.1/32"):
				kubernetes, before["kubernetes"] = i, served
			case strings.HasPrefix(line, "ip route add local 10.96.255.10/32"):
				dns, before["dns"] = i, served
			case strings.HasPrefix(line, "ip route add"):
				served++
			case deleted == 0 && (strings.HasPrefix(line, "ip route del") || strings.HasPrefix(line, "-d") || strings.HasPrefix(line, "-D") || strings.HasPrefix(line, "delete")):
				deleted = i
			}
			if strings.HasPrefix(line, "-a") || strings.HasPrefix(line, "-A") || strings.HasPrefix(line, "add") || strings.HasPrefix(line, "ip route add") {
				added = i
			}
		}
		if served != others || kubernetes == 0 || dns == 0 {
			t.Fatalf("%d Services served, want %d; kubernetes %d, dns %d", served, others, kubernetes, dns)
		}
		if before["kubernetes"] >= firstChunk || before["dns"] >= firstChunk {
			t.Errorf("%d Services were served before the API server, %d before DNS, want none of another chunk", before["kubernetes"], before["dns"])
		}
		if deleted <= added {
			t.Errorf("operation %d deletes, and %d adds", deleted, added)
		}
		if _, left := m.state.VirtualServers[f]; left || len(m.state.VirtualServers) != others+2 {
			t.Errorf("%d virtual servers, the old one among them: %t", len(m.state.VirtualServers), left)
		}
	})
}

// What somebody takes from the kernel, or changes in it, comes back at the next audit.
func TestAgentAudit(t *testing.T) {
	for _, period := range []time.Duration{0, 10 * time.Second} {
		synctest.Test(t, func(t *testing.T) {
			m, inbox := lone(t)
			m.options = func(o *AgentOptions) { o.Config.AuditPeriod = period }
			putAll(t, inbox, service("web", "192.0.2.1", 80, "")+"---\n"+slice("web", "10.244.1.2 n2"))
			inbox.Synced()
			a := m.start(inbox, nil)
			defer a.stop()
			m.happened()
			f := ipvs.At(ipvs.TCP, netip.MustParseAddrPort("192.0.2.1:80"))
			m.set(func() {
				delete(m.state.RealServers, f)
				clear(m.state.Routes)
				delete(m.state.Elements, ipvs.Element{Set: ipvs.Masquerade, Frontend: f})
				m.state.VirtualServers[f] = ipvs.VirtualServer{Frontend: f, Scheduler: "lc"}
			})
			time.Sleep(period)
			if period == 0 {
				time.Sleep(24 * time.Hour)
				m.expect("without audits")
				return
			}
			m.expect("the audit",
				"add element ip longshore masqueraded { 192.0.2.1 . tcp . 80 }",
				"-E -t 192.0.2.1:80 -s rr",
				"-a -t 192.0.2.1:80 -r 10.244.1.2:8080 -m -w 1",
				"ip route add local 192.0.2.1/32 dev lo src 172.31.0.11 table local",
			)
			time.Sleep(period)
			m.expect("the next one")
		})
	}
}

// With externalTrafficPolicy Local an address is announced from nodes with an endpoint alone, whichever there are.
func TestAgentLocalAnnouncements(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, inbox := newMachine(t, "n1"), NewInbox()
		all := newGossip("n1", "n2")
		all.says("n2", announcer.Agent{Able: true, Links: []announcer.Link{{Name: "eth0", IPv4: true}}})
		a := m.start(inbox, all.members["n1"])
		defer a.stop()
		site(t, inbox)
		inbox.Put(StandaloneNode("n2", addrs("172.31.0.12")))
		policy := func(p string) {
			putAll(t, inbox, fmt.Sprintf("apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {type: LoadBalancer, externalTrafficPolicy: %s, ports: [{port: 80}]}\n"+
				"status: {loadBalancer: {ingress: [{ip: 192.0.2.1}]}}", p))
		}
		for _, step := range []struct {
			policy, endpoints string
			announced         bool // by BGP, from this node
			owner             string
			reason            string
		}{
			{"Local", "10.244.1.2 n1", true, "n1", ""},
			{"Local", "10.244.2.2 n2", false, "n2", ""},
			{"Local", "10.244.3.2 n3", false, "", "no node is alive, ready and not excluded from load balancers, and has an endpoint (externalTrafficPolicy Local)"},
			{"Local", "", false, "", "no ready endpoint"},
			{"Local", "10.244.1.2 n1, 10.244.2.2 n2", true, "n1", ""},
			{"Cluster", "10.244.3.2 n3", true, "n1", ""},
		} {
			policy(step.policy)
			if step.endpoints == "" {
				putAll(t, inbox, slice("web"))
			} else {
				putAll(t, inbox, slice("web", strings.Split(step.endpoints, ",")...))
			}
			inbox.Synced()
			synctest.Wait()
			status, err := a.Status(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			v := status.VIPs[0]
			if v.Owner != step.owner || v.Reason != step.reason || (len(m.speaker.Routes) > 0) != step.announced || (len(m.answers) > 0) != (step.owner == "n1") {
				t.Errorf("%s, endpoints %q: owner %q, reason %q, routes %v, answers for %v", step.policy, step.endpoints, v.Owner, v.Reason, m.speaker.Routes, m.answers)
			}
		}
	})
}
