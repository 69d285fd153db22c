package lab

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func TestMain(m *testing.M) {
	Main()
	os.Exit(m.Run())
}

// testLog sends the lab's log to the test's.
func testLog(t *testing.T) *slog.Logger { return slog.New(slog.NewTextHandler(t.Output(), nil)) }

const web = `
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      containers: [{name: web, image: lab, ports: [{containerPort: 80}, {containerPort: 53, protocol: UDP}]}]
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  selector: {app: web}
  ipFamilyPolicy: RequireDualStack
  ports: [{name: web, port: 80}, {name: dns, port: 53, protocol: UDP}]
`

// TestCluster goes through a cluster's life: pods become endpoints that the network reaches, a node dies and comes
// back, and nothing is left.
func TestCluster(t *testing.T) {
	ctx := t.Context()
	l, err := New(ctx, Config{Scenario: t.Name(), Nodes: 2, Log: testLog(t)})
	if err != nil {
		t.Fatal(err)
	}
	closed := false
	t.Cleanup(func() {
		if !closed {
			t.Log(l.KeepRecords())
			if err := l.Close(); err != nil {
				t.Error(err)
			}
		}
	})
	cluster, err := l.StartCluster(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := cluster.Apply(ctx, web); err != nil {
		t.Fatal(err)
	}
	pods := awaitEndpoints(t, cluster, 2)
	for _, addr := range pods {
		for _, protocol := range []string{"tcp/80", "udp/53"} {
			reach(t, l.Client, protocol, addr)
			reach(t, l.Outside, protocol, addr)
		}
	}

	toggleReady(t, cluster)
	useTools(t, cluster)
	daemons(t, l, cluster)

	if err := l.Nodes[1].Kill(); err != nil {
		t.Fatal(err)
	}
	awaitEndpoints(t, cluster, 1)
	awaitNode(t, cluster, "n2", false)
	if err := l.Nodes[1].Boot(); err != nil {
		t.Fatal(err)
	}
	awaitNode(t, cluster, "n2", true)
	awaitEndpoints(t, cluster, 2)
	if err := cluster.Delete(ctx, web); err != nil {
		t.Fatal(err)
	}
	awaitNamespaces(t, prefix+"default-web-*", 0)

	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	closed = true
	nothingLeft(t, l)
}

// awaitEndpoints waits until the Service web has so many ready endpoints in each family, and returns their addresses.
func awaitEndpoints(t *testing.T, c *Cluster, count int) []netip.Addr {
	t.Helper()
	var ready []netip.Addr
	err := Await(t.Context(), fmt.Sprintf("%d ready endpoints in each family", count), time.Minute, func(ctx context.Context) error {
		slices, err := c.Client().DiscoveryV1().EndpointSlices("default").List(ctx,
			metav1.ListOptions{LabelSelector: discoveryv1.LabelServiceName + "=web"})
		if err != nil {
			return err
		}
		ready = nil
		for _, s := range slices.Items {
			for _, e := range s.Endpoints {
				if e.Conditions.Ready != nil && *e.Conditions.Ready {
					ready = append(ready, netip.MustParseAddr(e.Addresses[0]))
				}
			}
		}
		if len(ready) != 2*count {
			return fmt.Errorf("ready are %v", ready)
		}
		return c.Err()
	})
	if err != nil {
		t.Fatal(err)
	}
	return ready
}

// toggleReady makes one pod unready and ready again, and sees the other stay.
func toggleReady(t *testing.T, c *Cluster) {
	t.Helper()
	pods, err := c.Client().CoreV1().Pods("default").List(t.Context(), metav1.ListOptions{LabelSelector: "app=web"})
	if err != nil {
		t.Fatal(err)
	}
	name := pods.Items[0].Name
	for _, ready := range []bool{false, true} {
		if err := c.SetReady("default", name, ready); err != nil {
			t.Fatal(err)
		}
		awaitEndpoints(t, c, map[bool]int{false: 1, true: 2}[ready])
	}
	if _, err := c.Pod("default", "no-such-pod"); err == nil {
		t.Error("found a pod that is not there")
	}
}

const reader = `
apiVersion: v1
kind: ServiceAccount
metadata: {name: reader}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: reader}
rules: [{apiGroups: [""], resources: [services], verbs: [list]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: reader}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: reader}
subjects: [{kind: ServiceAccount, name: reader, namespace: default}]
`

// useTools uses kubectl and helm, and a service account that may do one thing only.
func useTools(t *testing.T, c *Cluster) {
	t.Helper()
	ctx := t.Context()
	if err := c.Apply(ctx, reader); err != nil {
		t.Fatal(err)
	}
	if err := c.Apply(ctx, "kind: Nonsense\napiVersion: v1\nmetadata: {name: a}"); err == nil {
		t.Error("applied an object of no kind")
	}
	if out, err := c.Kubectl(ctx, "get", "nodes", "-o", "name"); err != nil || out != "node/n1\nnode/n2\n" {
		t.Errorf("kubectl get nodes: %v: %s", err, out)
	}
	if out, err := c.Helm(ctx, "list", "--all-namespaces", "--output", "json"); err != nil || strings.TrimSpace(out) != "[]" {
		t.Errorf("helm list: %v: %s", err, out)
	}
	kubeconfig, err := c.ServiceAccountKubeconfig(ctx, "default", "reader")
	if err != nil {
		t.Fatal(err)
	}
	kubectl, err := program("kubectl")
	if err != nil {
		t.Fatal(err)
	}
	n1 := c.lab.Nodes[0]
	if out, err := n1.Run(ctx, kubectl, "--kubeconfig", kubeconfig, "get", "services", "-o", "name"); err != nil || !strings.Contains(out, "service/web") {
		t.Errorf("reader may not read services: %v: %s", err, out)
	}
	if out, err := n1.Run(ctx, kubectl, "--kubeconfig", kubeconfig, "get", "secrets"); err == nil || !strings.Contains(err.Error(), "forbidden") {
		t.Errorf("reader may read secrets: %v: %s", err, out)
	}
}

const daemonSet = `
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: agent}
spec:
  selector: {matchLabels: {app: agent}}
  template:
    metadata: {labels: {app: agent}}
    spec:
      hostNetwork: true
      containers:
      - name: agent
        image: example.org/agent:v1
        args: [one, two]
        env:
        - {name: NODE, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
`

// daemons runs an image of the test's own on every node, in the node's network.
func daemons(t *testing.T, l *Lab, c *Cluster) {
	t.Helper()
	c.Image("example.org/agent", func(_ context.Context, pod *Pod) (Exec, error) {
		script := `echo "$NODE runs $*, has $(ip -4 -o addr show eth0 | cut -d " " -f 2-)"; exec sleep 1000`
		return Exec{Path: "sh", Args: append([]string{"-c", script, "agent"}, pod.Args()...), Env: pod.Env()}, nil
	})
	if err := c.Apply(t.Context(), daemonSet); err != nil {
		t.Fatal(err)
	}
	for _, n := range l.Nodes {
		want := fmt.Sprintf("%s runs one two, has eth0    inet %s/24", n.Name, n.V4)
		err := Await(t.Context(), "agent on "+n.Name, time.Minute, func(context.Context) error { return anyLogHas(l, "default-agent-*.log", want) })
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Delete(t.Context(), daemonSet); err != nil {
		t.Fatal(err)
	}
}

func anyLogHas(l *Lab, pattern, text string) error {
	logs, err := filepath.Glob(filepath.Join(l.Records(), pattern))
	if err != nil {
		return err
	}
	for _, log := range logs {
		if b, err := os.ReadFile(log); err == nil && strings.Contains(string(b), text) {
			return nil
		}
	}
	return fmt.Errorf("none of %v has %q", logs, text)
}

func awaitNode(t *testing.T, c *Cluster, name string, ready bool) {
	t.Helper()
	err := Await(t.Context(), fmt.Sprintf("%s ready: %v", name, ready), time.Minute, func(ctx context.Context) error {
		n, err := c.Client().CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
		if err == nil && nodeReady(n) != ready {
			err = errors.New("it is not so")
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func awaitNamespaces(t *testing.T, pattern string, count int) {
	t.Helper()
	err := Await(t.Context(), fmt.Sprintf("%d namespaces %s", count, pattern), time.Minute, func(context.Context) error {
		found, err := filepath.Glob(filepath.Join(namespaces, pattern))
		if err == nil && len(found) != count {
			err = fmt.Errorf("there are %v", found)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// reach asks a pod at its own address; no one translates addresses on the way.
func reach(t *testing.T, from *Host, at string, addr netip.Addr) {
	t.Helper()
	protocol, port, _ := strings.Cut(at, "/")
	server := netip.MustParseAddrPort(net.JoinHostPort(addr.String(), port))
	answer, err := from.Ask(t.Context(), protocol, server)
	if err != nil {
		t.Fatal(err)
	}
	if answer.At != server || answer.Saw != answer.From || answer.Saw.Addr() != from.Addr(addr.Is6()) {
		t.Errorf("%s asked %s/%s from %s: %+v", from.Name, server, protocol, from.Addr(addr.Is6()), answer)
	}
}

// nothingLeft checks that no namespace, process or file of the lab exists.
func nothingLeft(t *testing.T, l *Lab) {
	t.Helper()
	if left, err := filepath.Glob(filepath.Join(namespaces, prefix+"*")); err != nil || len(left) > 0 {
		t.Errorf("namespaces left: %v %v", left, err)
	}
	for _, folder := range []string{l.state, l.Records()} {
		if _, err := os.Stat(folder); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", folder, err)
		}
	}
	commands, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range commands {
		b, err := os.ReadFile(c)
		if err == nil && strings.Contains(string(b), l.state) {
			t.Errorf("process left: %s", strings.ReplaceAll(string(b), "\x00", " "))
		}
	}
}
