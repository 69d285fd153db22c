// Package e2e puts longshore into a lab and shows what it does there, with real packets against a real API server and
// real routers: the scenarios are its tests, the demo is package e2e/demo, the benchmark e2e/bench.
//
// Folders: lab is the machines, the network, the control plane and the peers; kernel and inlab find or boot a kernel
// with IPVS; controlplane pins the programs of the control plane, neighbours those that use Services or judge their
// packets, and build builds both.
package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/longshore-lb/longshore/e2e/lab"
)

// Namespace is where the chart is installed.
const Namespace = "longshore-system"

// Web is a Deployment of six pods that answer at port 8080, TCP and UDP.
const Web = `
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 6
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      containers:
      - name: web
        image: lab
        ports: [{containerPort: 8080}, {containerPort: 8080, protocol: UDP}]
        readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}
---`

// Installation is longshore in a cluster of the lab, installed by its Helm chart: the agents and the controllers are the
// chart's own pods, run as processes, under the chart's own service accounts.
type Installation struct {
	Lab     *lab.Lab
	Cluster *lab.Cluster
	binary  string
}

// Pace is the lab's agent.members.probeInterval, slower than the chart's: on two emulated processors with all of a cluster an agent may
// not get to run for a while.
const Pace = 500 * time.Millisecond

// Install installs the chart in folder root and returns when every agent is ready. The program is bin/longshore there.
func Install(ctx context.Context, l *lab.Lab, c *lab.Cluster, root string) (*Installation, error) {
	binary, err := onMemory(filepath.Join(root, "bin", "longshore"))
	if err != nil {
		return nil, err
	}
	i := &Installation{Lab: l, Cluster: c, binary: binary}
	c.Image("longshore-lb/longshore", i.run)
	// An agent that was killed takes longer to come back here than on a machine of its own.
	if _, err := c.Helm(ctx, "install", "longshore", filepath.Join(root, "charts", "longshore"),
		"--namespace", Namespace, "--create-namespace",
		"--set", "agent.members.probeInterval="+Pace.String(), "--set", "agent.members.crashGrace=10s"); err != nil {
		return nil, err
	}
	return i, i.AwaitReady(ctx)
}

// onMemory copies a program to a tmpfs: in a virtual machine the host's files are slow to start from.
func onMemory(binary string) (string, error) {
	content, err := os.ReadFile(binary)
	if err != nil {
		return "", fmt.Errorf("%w: build it with `make build`", err)
	}
	target := filepath.Join("/run/longshore-lab-bin", filepath.Base(binary))
	if have, err := os.ReadFile(target); err == nil && bytes.Equal(have, content) {
		return target, nil
	}
	if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
		return "", err
	}
	_ = os.Remove(target) // it may be running
	return target, os.WriteFile(target, content, 0o755)
}

// run turns the chart's pods into processes: what a container runtime would mount is given by flags.
func (i *Installation) run(ctx context.Context, pod *lab.Pod) (lab.Exec, error) {
	env := map[string]string{}
	for _, e := range pod.Env() {
		name, value, _ := strings.Cut(e, "=")
		env[name] = value
	}
	container := pod.Object.Spec.Containers[0]
	var args []string
	for _, a := range slices.Concat(container.Command, container.Args) {
		args = append(args, os.Expand(strings.NewReplacer("$(", "${", ")", "}").Replace(a), func(name string) string { return env[name] }))
	}
	kubeconfig, err := i.Cluster.ServiceAccountKubeconfig(ctx, pod.Object.Namespace, pod.Object.Spec.ServiceAccountName)
	if err != nil {
		return lab.Exec{}, err
	}
	args = append(args[1:], "--kubeconfig", kubeconfig)
	if at := slices.Index(args, "--config"); at >= 0 {
		config, err := i.Cluster.Client().CoreV1().ConfigMaps(pod.Object.Namespace).Get(ctx, "longshore-agent", metav1.GetOptions{})
		if err != nil {
			return lab.Exec{}, err
		}
		args[at+1] = filepath.Join(i.Lab.Records(), pod.Object.Name+"-agent.yaml")
		if err := os.WriteFile(args[at+1], []byte(config.Data["agent.yaml"]), 0o644); err != nil {
			return lab.Exec{}, err
		}
		args = append(args, "--status-socket", socket(pod.Node))
	}
	return lab.Exec{Path: i.binary, Args: args, Env: pod.Env()}, nil
}

// socket is where the agent of a node answers `longshore status`: the machines of the lab share their files.
func socket(n *lab.Node) string { return "/run/longshore/" + n.Name + ".sock" }

// AwaitReady waits until the agent of every living node and one controller are ready.
func (i *Installation) AwaitReady(ctx context.Context) error {
	return lab.Await(ctx, "longshore ready on every node", 3*time.Minute, func(ctx context.Context) error {
		daemons, err := i.Cluster.Client().AppsV1().DaemonSets(Namespace).Get(ctx, "longshore-agent", metav1.GetOptions{})
		if err != nil {
			return err
		}
		alive := 0
		for _, n := range i.Lab.Nodes {
			if n.Alive() {
				alive++
			}
		}
		if int(daemons.Status.NumberReady) < alive {
			return fmt.Errorf("%d of %d agents are ready", daemons.Status.NumberReady, alive)
		}
		lease, err := i.Cluster.Client().CoordinationV1().Leases(Namespace).Get(ctx, "longshore-controller", metav1.GetOptions{})
		if err != nil {
			return err
		}
		if lease.Spec.HolderIdentity == nil || *lease.Spec.HolderIdentity == "" {
			return errors.New("no controller leads")
		}
		return nil
	})
}

// Longshore runs a sub-command of longshore on a node.
func (i *Installation) Longshore(ctx context.Context, n *lab.Node, args ...string) (string, error) {
	if args[0] == "status" {
		args = append(args, "--status-socket", socket(n))
	}
	return n.Run(ctx, i.binary, args...)
}

// Shortcut is a shell command that runs longshore on a node; its arguments are the shell's.
func (i *Installation) Shortcut(n *lab.Node) string {
	return fmt.Sprintf(`ip netns exec %s %s "$@" $([ "$1" = status ] && echo --status-socket %s)`, n.NetNS(), i.binary, socket(n))
}

// KillAgent ends the agent of a node at once, without its having a say. The node's kubelet starts it again.
func (i *Installation) KillAgent(n *lab.Node) error { return i.signalAgent(n, syscall.SIGKILL) }

// EndAgent asks the agent of a node to end, as an upgrade does. The node's kubelet starts it again.
func (i *Installation) EndAgent(n *lab.Node) error { return i.signalAgent(n, syscall.SIGTERM) }

func (i *Installation) signalAgent(n *lab.Node, signal syscall.Signal) error {
	commands, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return err
	}
	for _, file := range commands {
		content, err := os.ReadFile(file)
		if err != nil || !bytes.Contains(content, []byte("\x00agent\x00")) || !bytes.Contains(content, []byte("\x00"+socket(n))) {
			continue
		}
		var pid int
		if _, err := fmt.Sscanf(file, "/proc/%d/", &pid); err != nil {
			return err
		}
		return syscall.Kill(pid, signal)
	}
	return fmt.Errorf("no agent runs on %s", n.Name)
}

// AwaitAddress waits until a Service has an address of a family and returns it.
func (i *Installation) AwaitAddress(ctx context.Context, namespace, name string, ipv6 bool) (netip.Addr, error) {
	var found netip.Addr
	err := lab.Await(ctx, "an address for Service "+namespace+"/"+name, time.Minute, func(ctx context.Context) error {
		svc, err := i.Cluster.Client().CoreV1().Services(namespace).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		for _, ingress := range svc.Status.LoadBalancer.Ingress {
			if addr, err := netip.ParseAddr(ingress.IP); err == nil && addr.Is6() == ipv6 {
				found = addr
				return nil
			}
		}
		return fmt.Errorf("its status has %v", svc.Status.LoadBalancer.Ingress)
	})
	return found, err
}
