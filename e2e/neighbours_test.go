package e2e

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/dns"
	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/longshore-lb/longshore/e2e/lab"
)

// readyPods waits until as many pods of a namespace with a label are ready, and none is going, and returns them.
func readyPods(t *testing.T, w *world, namespace, selector string, want int) []*lab.Pod {
	t.Helper()
	var names []string
	await(t, fmt.Sprintf("%d ready pods %s", want, selector), func(ctx context.Context) error {
		list, err := w.Cluster.Client().CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: selector})
		if err != nil {
			return err
		}
		names = nil
		for _, o := range list.Items {
			for _, c := range o.Status.Conditions {
				if c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue {
					names = append(names, o.Name)
				}
			}
		}
		if len(names) != want || len(list.Items) != want {
			return fmt.Errorf("%d of %d are", len(names), len(list.Items))
		}
		return nil
	})
	var pods []*lab.Pod
	for _, name := range names {
		pod, err := w.Cluster.Pod(namespace, name)
		if err != nil {
			t.Fatal(err)
		}
		pods = append(pods, pod)
	}
	return pods
}

// goneAfter makes the test's end wait for the end of the pods with a label, whose owners the test deletes.
func goneAfter(t *testing.T, w *world, namespace, selector string) {
	t.Helper()
	t.Cleanup(func() {
		ctx := context.WithoutCancel(t.Context())
		if err := lab.Await(ctx, "the end of the pods "+selector, waitFor, func(ctx context.Context) error {
			list, err := w.Cluster.Client().CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: selector})
			if err == nil && len(list.Items) > 0 {
				err = fmt.Errorf("%d are left", len(list.Items))
			}
			return err
		}); err != nil {
			t.Error(err)
		}
	})
}

// account is a service account and what it may do.
func account(namespace, name, rules string) string {
	return fmt.Sprintf(`
apiVersion: v1
kind: ServiceAccount
metadata: {namespace: %[1]s, name: %[2]s}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: %[2]s}
rules:
%[3]s
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: %[2]s}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: %[2]s}
subjects: [{kind: ServiceAccount, namespace: %[1]s, name: %[2]s}]
---`, namespace, name, rules)
}

// corefile is what kubeadm writes, without what leads out of the cluster.
const corefile = `
.:53 {
    errors
    ready
    kubernetes cluster.local in-addr.arpa ip6.arpa {
        pods verified
    }
    loadbalance
}
`

const coreDNS = `
apiVersion: apps/v1
kind: Deployment
metadata: {namespace: kube-system, name: coredns}
spec:
  replicas: 2
  selector: {matchLabels: {k8s-app: kube-dns}}
  template:
    metadata: {labels: {k8s-app: kube-dns}}
    spec:
      serviceAccountName: coredns
      containers:
      - name: coredns
        image: coredns/coredns
        readinessProbe: {httpGet: {path: /ready, port: 8181}, periodSeconds: 1}
---
apiVersion: v1
kind: Service
metadata: {namespace: kube-system, name: kube-dns}
spec:
  selector: {k8s-app: kube-dns}
  clusterIP: 10.96.0.10
  clusterIPs: [10.96.0.10, "fd96::10"]
  ipFamilyPolicy: RequireDualStack
  ports:
  - {name: dns, port: 53, protocol: UDP}
  - {name: dns-tcp, port: 53}
`

// named is a Service of each kind that only DNS knows, and pods with names of their own.
const named = `
apiVersion: v1
kind: Service
metadata: {name: headless}
spec:
  clusterIP: None
  selector: {app: web}
  ipFamilyPolicy: RequireDualStack
---
apiVersion: v1
kind: Service
metadata: {name: elsewhere}
spec: {type: ExternalName, externalName: www.example.org}
---
apiVersion: v1
kind: Service
metadata: {name: ledger}
spec:
  clusterIP: None
  selector: {app: ledger}
  ipFamilyPolicy: RequireDualStack
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: ledger}
spec:
  serviceName: ledger
  replicas: 2
  selector: {matchLabels: {app: ledger}}
  template:
    metadata: {labels: {app: ledger}}
    spec: {containers: [{name: ledger, image: lab}]}
`

// clusterDNS resolves every kind of name from a pod of every node through the cluster IPs of CoreDNS, which itself
// reaches the API server by its cluster IP.
func clusterDNS(t *testing.T, w *world) {
	folder := t.TempDir()
	if err := os.WriteFile(filepath.Join(folder, "Corefile"), []byte(corefile), 0o644); err != nil {
		t.Fatal(err)
	}
	run := w.Cluster.InCluster("coredns")
	w.Cluster.Image("coredns/coredns", func(ctx context.Context, pod *lab.Pod) (lab.Exec, error) {
		e, err := run(ctx, pod)
		e.Dir = folder
		return e, err
	})
	goneAfter(t, w, "kube-system", "k8s-app=kube-dns")
	goneAfter(t, w, "default", "app=ledger")
	applyFor(t, w, account("kube-system", "coredns", `
- {apiGroups: [""], resources: [services, pods, namespaces], verbs: [list, watch]}
- {apiGroups: [discovery.k8s.io], resources: [endpointslices], verbs: [list, watch]}`)+coreDNS)
	applyFor(t, w, named)
	readyPods(t, w, "kube-system", "k8s-app=kube-dns", 2)
	ledger := readyPods(t, w, "default", "app=ledger", 2)

	type question struct {
		name string
		kind uint16
		want []string
	}
	questions := []question{
		{"elsewhere.default.svc.cluster.local.", dns.TypeCNAME, []string{"www.example.org."}},
		{"kube-dns.kube-system.svc.cluster.local.", dns.TypeA, []string{"10.96.0.10"}},
		{"1.0.96.10.in-addr.arpa.", dns.TypePTR, []string{"kubernetes.default.svc.cluster.local."}},
		{"nobody.default.svc.cluster.local.", dns.TypeA, nil},
	}
	for _, family := range families {
		kind := dns.TypeA
		if family.ipv6 {
			kind = dns.TypeAAAA
		}
		var headless []string
		for _, pod := range w.pods {
			headless = append(headless, pod.Addr(family.ipv6).String())
		}
		questions = append(questions,
			question{"web.default.svc.cluster.local.", kind, []string{w.clusterIP(t, "web", family.ipv6).String()}},
			question{"headless.default.svc.cluster.local.", kind, headless})
		for _, pod := range ledger {
			address := pod.Addr(family.ipv6).String()
			questions = append(questions, question{pod.Object.Name + ".ledger.default.svc.cluster.local.", kind, []string{address}})
			if !family.ipv6 { // CoreDNS knows pods by their first address only
				questions = append(questions, question{strings.ReplaceAll(address, ".", "-") + ".default.pod.cluster.local.", kind, []string{address}})
			}
		}
	}
	for _, n := range w.Lab.Nodes {
		pod := w.podOn(t, n)
		for _, family := range families {
			server := netip.MustParseAddrPort("10.96.0.10:53")
			if family.ipv6 {
				server = netip.MustParseAddrPort("[fd96::10]:53")
			}
			for _, protocol := range []string{"udp", "tcp"} {
				for _, q := range questions {
					slices.Sort(q.want)
					await(t, fmt.Sprintf("%s %s by %s/%s from %s", dns.TypeToString[q.kind], q.name, server, protocol, n.Name), func(ctx context.Context) error {
						got, err := resolve(ctx, pod.Host, protocol, server, q.name, q.kind)
						if err != nil {
							return err
						}
						if diff := cmp.Diff(q.want, got); diff != "" {
							return errors.New("-want +got\n" + diff)
						}
						return nil
					})
				}
			}
		}
	}
}

// resolve asks a name server and returns the values of the records of that kind, sorted; none if there is no such name.
func resolve(ctx context.Context, from *lab.Host, protocol string, server netip.AddrPort, name string, kind uint16) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	conn, err := from.DialContext(ctx, protocol, server.String())
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(3 * time.Second)); err != nil {
		return nil, err
	}
	c := dns.Conn{Conn: conn}
	question := new(dns.Msg).SetQuestion(name, kind)
	if err := c.WriteMsg(question); err != nil {
		return nil, err
	}
	answer, err := c.ReadMsg()
	if err != nil {
		return nil, err
	}
	if answer.Id != question.Id || answer.Rcode != dns.RcodeSuccess && answer.Rcode != dns.RcodeNameError {
		return nil, fmt.Errorf("the answer is %s", dns.RcodeToString[answer.Rcode])
	}
	var values []string
	for _, r := range answer.Answer {
		switch r := r.(type) {
		case *dns.A:
			values = append(values, r.A.String())
		case *dns.AAAA:
			values = append(values, r.AAAA.String())
		case *dns.CNAME:
			values = append(values, r.Target)
		case *dns.PTR:
			values = append(values, r.Ptr)
		}
	}
	slices.Sort(values)
	return values, nil
}

// forwardedEnv makes the tests' program a web server; its value is the server's name.
const forwardedEnv = "LONGSHORE_E2E_FORWARDED"

// serveForwarded makes this program a web server if a pod of the image forwarded started it; then it does not return. It
// answers with its name, the path, and whom the request was forwarded for.
func serveForwarded() {
	name, ok := os.LookupEnv(forwardedEnv)
	if !ok {
		return
	}
	fmt.Fprintln(os.Stderr, http.ListenAndServe(":8080", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, name, " ", r.URL.Path, " ", r.Header.Get("X-Forwarded-For"))
	})))
	os.Exit(1)
}

const ingressController = `
apiVersion: networking.k8s.io/v1
kind: IngressClass
metadata: {name: traefik}
spec: {controller: traefik.io/ingress-controller}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: ingress}
spec:
  replicas: 2
  selector: {matchLabels: {app: ingress}}
  template:
    metadata: {labels: {app: ingress}}
    spec:
      serviceAccountName: ingress
      containers:
      - name: ingress
        image: ingress
        args: [--published-service, default/ingress, --udp-target, "$(WEB)"]
        env: [{name: WEB, value: "%s:80"}]
        readinessProbe: {httpGet: {path: /ping, port: 8000}, periodSeconds: 1}
---
apiVersion: v1
kind: Service
metadata: {name: ingress, annotations: {metallb.io/allow-shared-ip: ingress, metallb.io/loadBalancerIPs: "172.31.0.210,fd31::210"}}
spec:
  type: LoadBalancer
  externalTrafficPolicy: Local
  selector: {app: ingress}
  ipFamilyPolicy: RequireDualStack
  ports:
  - {name: http, port: 80, targetPort: 8000}
  - {name: https, port: 443, targetPort: 8443}
---
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata: {name: paths}
spec:
  ingressClassName: traefik
  rules:
  - http:
      paths:
      - {path: /a, pathType: Prefix, backend: {service: {name: a, port: {number: 80}}}}
      - {path: /b, pathType: Prefix, backend: {service: {name: b, port: {number: 80}}}}
`

// ingressUDP shares the address. Where only nodes with endpoints answer, both Services must have the same ones.
const ingressUDP = `
apiVersion: v1
kind: Service
metadata: {name: ingress-udp, annotations: {metallb.io/allow-shared-ip: ingress, metallb.io/loadBalancerIPs: "172.31.0.210,fd31::210"}}
spec:
  type: LoadBalancer
  externalTrafficPolicy: Local
  selector: {app: ingress}
  ipFamilyPolicy: RequireDualStack
  ports: [{name: udp, port: 53, targetPort: 8053, protocol: UDP}]
`

func backendOf(name string) string {
	return fmt.Sprintf(`
apiVersion: apps/v1
kind: Deployment
metadata: {name: %[1]s}
spec:
  replicas: 2
  selector: {matchLabels: {app: %[1]s}}
  template:
    metadata: {labels: {app: %[1]s, tier: backend}}
    spec: {containers: [{name: web, image: forwarded, readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}}]}
---
apiVersion: v1
kind: Service
metadata: {name: %[1]s}
spec: {selector: {app: %[1]s}, ports: [{port: 80, targetPort: 8080}]}
---`, name)
}

// sharedIngress serves HTTP, HTTPS and UDP of an ingress controller at one address of two Services. The controller sends
// requests to the cluster IPs of its back ends, and tells them the address of the client.
func sharedIngress(t *testing.T, w *world) {
	w.Cluster.Image("ingress", w.Cluster.InCluster("ingress"))
	w.Cluster.Image("forwarded", func(_ context.Context, pod *lab.Pod) (lab.Exec, error) {
		self, err := os.Executable()
		return lab.Exec{Path: self, Env: []string{forwardedEnv + "=" + pod.Object.Name}}, err
	})
	goneAfter(t, w, "default", "app=ingress")
	goneAfter(t, w, "default", "tier=backend")
	applyFor(t, w, pools)
	applyFor(t, w, backendOf("a")+backendOf("b"))
	applyFor(t, w, account("default", "ingress", `
- {apiGroups: [""], resources: [services, nodes, secrets], verbs: [get, list, watch]}
- {apiGroups: [discovery.k8s.io], resources: [endpointslices], verbs: [list, watch]}
- {apiGroups: [networking.k8s.io], resources: [ingresses, ingressclasses], verbs: [get, list, watch]}
- {apiGroups: [networking.k8s.io], resources: [ingresses/status], verbs: [update]}`)+
		fmt.Sprintf(ingressController, w.clusterIP(t, "web", false)))
	backends := map[string][]*lab.Pod{"/a": readyPods(t, w, "default", "app=a", 2), "/b": readyPods(t, w, "default", "app=b", 2)}
	readyPods(t, w, "default", "app=ingress", 2)

	vips := map[bool]netip.Addr{}
	for _, family := range families {
		vips[family.ipv6] = w.address(t, "ingress", family.ipv6)
	}
	web := func(t *testing.T) {
		for _, family := range families {
			client := w.Lab.Client.Addr(family.ipv6)
			for _, scheme := range []string{"http", "https"} {
				for _, path := range []string{"/a", "/b"} {
					url := fmt.Sprintf("%s://%s%s", scheme, urlHost(vips[family.ipv6]), path)
					var answer string
					await(t, "an answer from "+url, func(ctx context.Context) (err error) {
						answer, err = get(ctx, w.Lab.Client, url)
						return err
					})
					for range 4 {
						words := strings.Fields(answer)
						if len(words) != 3 || words[1] != path || !slices.ContainsFunc(backends[path], func(p *lab.Pod) bool { return p.Object.Name == words[0] }) {
							t.Fatalf("%s: answered %q, want a pod of %s", url, answer, path)
						}
						if words[2] != client.String() {
							t.Errorf("%s: the back end was told that the client is %s: it is %s", url, words[2], client)
						}
						var err error
						if answer, err = get(t.Context(), w.Lab.Client, url); err != nil {
							t.Fatal(err)
						}
					}
				}
			}
		}
	}
	t.Run("shared", func(t *testing.T) {
		applyFor(t, w, ingressUDP)
		for _, family := range families {
			if got := w.address(t, "ingress-udp", family.ipv6); got != vips[family.ipv6] {
				t.Errorf("the second Service has %s, not %s of the first", got, vips[family.ipv6])
			}
			onlyAnswer(t, w, vips[family.ipv6], w.owner(t, vips[family.ipv6]))
			a := awaitAnswer(t, w.Lab.Client, "udp", netip.AddrPortFrom(vips[family.ipv6], 53))
			if w.pods[a.Pod] == nil {
				t.Errorf("UDP was answered by %s, not by a pod of web", a.Pod)
			}
		}
		web(t)
	})
	// What the other leaves behind is served on, and its own port is refused.
	for _, family := range families {
		await(t, "UDP refused", func(ctx context.Context) error {
			if _, err := w.Lab.Client.Ask(ctx, "udp", netip.AddrPortFrom(vips[family.ipv6], 53)); !errors.Is(err, syscall.ECONNREFUSED) {
				return fmt.Errorf("got %w, want connection refused", err)
			}
			return nil
		})
	}
	web(t)
	await(t, "the addresses in the Ingress's status", func(ctx context.Context) error {
		object, err := w.Cluster.Client().NetworkingV1().Ingresses("default").Get(ctx, "paths", metav1.GetOptions{})
		if err != nil {
			return err
		}
		var got []string
		for _, i := range object.Status.LoadBalancer.Ingress {
			got = append(got, i.IP)
		}
		if diff := cmp.Diff([]string{vips[false].String(), vips[true].String()}, got); diff != "" {
			return errors.New("-want +got\n" + diff)
		}
		return nil
	})
}

func urlHost(a netip.Addr) string {
	if a.Is6() {
		return "[" + a.String() + "]"
	}
	return a.String()
}

// get asks a URL whose host is an address, over a connection of its own; any certificate is good.
func get(ctx context.Context, from *lab.Host, url string) (string, error) {
	client := &http.Client{Timeout: 3 * time.Second, Transport: &http.Transport{
		DialContext:       from.DialContext,
		DisableKeepAlives: true,
		TLSClientConfig:   &tls.Config{InsecureSkipVerify: true},
	}}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	response, err := client.Do(request)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s: %s", url, response.Status, body)
	}
	return string(body), err
}

const policyEngine = `
apiVersion: apps/v1
kind: DaemonSet
metadata: {namespace: kube-system, name: kube-network-policies}
spec:
  selector: {matchLabels: {app: kube-network-policies}}
  template:
    metadata: {labels: {app: kube-network-policies}}
    spec:
      hostNetwork: true
      serviceAccountName: kube-network-policies
      containers:
      - name: kube-network-policies
        image: kube-network-policies
        args: ["--hostname-override=$(NODE)", "--disable-nri", "--v=2"]
        env: [{name: NODE, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}]
        readinessProbe: {httpGet: {path: /metrics, port: 9080}, periodSeconds: 1}
`

// shop is a database on one node, and two kinds of its clients on every node.
const shop = `
apiVersion: apps/v1
kind: Deployment
metadata: {name: database}
spec:
  replicas: 1
  selector: {matchLabels: {role: database}}
  template:
    metadata: {labels: {role: database}}
    spec:
      nodeSelector: {kubernetes.io/hostname: n1}
      containers: [{name: database, image: lab}]
---
apiVersion: v1
kind: Service
metadata: {name: database}
spec:
  selector: {role: database}
  ipFamilyPolicy: RequireDualStack
  ports:
  - {name: tcp, port: 5432, targetPort: 80}
  - {name: udp, port: 5432, targetPort: 80, protocol: UDP}
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: clerk}
spec:
  selector: {matchLabels: {role: clerk}}
  template:
    metadata: {labels: {role: clerk}}
    spec: {containers: [{name: clerk, image: lab}]}
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: guest}
spec:
  selector: {matchLabels: {role: guest}}
  template:
    metadata: {labels: {role: guest}}
    spec: {containers: [{name: guest, image: lab}]}
`

// policies let clerks talk to the database only, and the database to clerks only.
const policies = `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: database}
spec:
  podSelector: {matchLabels: {role: database}}
  policyTypes: [Ingress]
  ingress:
  - from: [{podSelector: {matchLabels: {role: clerk}}}]
    ports: [{port: 80}, {port: 80, protocol: UDP}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: clerk}
spec:
  podSelector: {matchLabels: {role: clerk}}
  policyTypes: [Egress]
  egress:
  - to: [{podSelector: {matchLabels: {role: database}}}]
    ports: [{port: 80}, {port: 80, protocol: UDP}]
`

// networkPolicy shows that a policy engine judges what goes through a Service as it judges what goes to the pod itself,
// since it sees the client's address at the server's node and the server's at the client's node.
func networkPolicy(t *testing.T, w *world) {
	w.Cluster.Image("kube-network-policies", w.Cluster.InCluster("kube-network-policies"))
	t.Cleanup(func() { // the engine leaves its table, which lets nobody through who was in it
		for _, n := range w.Lab.Nodes {
			if _, err := n.Run(context.WithoutCancel(t.Context()), "nft", "delete", "table", "inet", "kube-network-policies"); err != nil {
				t.Error(err)
			}
		}
	})
	goneAfter(t, w, "kube-system", "app=kube-network-policies")
	goneAfter(t, w, "default", "role")
	applyFor(t, w, account("kube-system", "kube-network-policies", `
- {apiGroups: [""], resources: [pods, namespaces], verbs: [list, watch]}
- {apiGroups: [networking.k8s.io], resources: [networkpolicies], verbs: [list, watch]}`)+policyEngine)
	applyFor(t, w, shop)
	readyPods(t, w, "kube-system", "app=kube-network-policies", len(w.Lab.Nodes))
	database := readyPods(t, w, "default", "role=database", 1)[0]
	clerks := readyPods(t, w, "default", "role=clerk", len(w.Lab.Nodes))
	guests := readyPods(t, w, "default", "role=guest", len(w.Lab.Nodes))

	type way struct {
		from     *lab.Pod
		protocol string
		at       netip.AddrPort
	}
	// ways are all ways from the pods to a server: each family and protocol, itself and through its Service.
	ways := func(from []*lab.Pod, direct *lab.Pod, directPort uint16, service string, port uint16) (all []way) {
		for _, pod := range from {
			for _, family := range families {
				for _, protocol := range []string{"tcp", "udp"} {
					all = append(all,
						way{pod, protocol, netip.AddrPortFrom(direct.Addr(family.ipv6), directPort)},
						way{pod, protocol, netip.AddrPortFrom(w.clusterIP(t, service, family.ipv6), port)})
				}
			}
		}
		return all
	}
	open := func(all []way) {
		t.Helper()
		for _, o := range all {
			if a := awaitAnswer(t, o.from.Host, o.protocol, o.at); a.Saw != a.From {
				t.Errorf("%s came to %s/%s from %s: its pod saw %s", o.from.Name, o.at, o.protocol, a.From, a.Saw)
			}
		}
	}
	blocked := func(all []way) {
		t.Helper()
		var group errgroup.Group // each waits for an answer that does not come
		for _, o := range all {
			group.Go(func() error {
				return lab.Await(t.Context(), fmt.Sprintf("%s kept from %s/%s", o.from.Name, o.at, o.protocol), waitFor, func(ctx context.Context) error {
					a, err := o.from.Ask(ctx, o.protocol, o.at)
					var timeout net.Error
					if errors.As(err, &timeout) && timeout.Timeout() {
						return nil
					}
					if err == nil {
						err = fmt.Errorf("%s answered", a.Pod)
					}
					return err
				})
			})
		}
		if err := group.Wait(); err != nil {
			t.Error(err)
		}
	}
	web := w.podOn(t, w.Lab.Nodes[0])
	toDatabase := func(from []*lab.Pod) []way { return ways(from, database, 80, "database", 5432) }
	toWeb := func(from []*lab.Pod) []way { return ways(from, web, 8080, "web", 80) }
	for _, pods := range [][]*lab.Pod{clerks, guests} {
		open(toDatabase(pods))
		open(toWeb(pods))
	}
	applyFor(t, w, policies)
	blocked(append(toDatabase(guests), toWeb(clerks)...))
	open(toDatabase(clerks))
	open(toWeb(guests))
}
