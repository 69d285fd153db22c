// Command demo shows longshore at work in the lab: three nodes, a client, a router, a real control plane. It is what
// `make demo` runs, in a virtual machine where the kernel of this one has no IPVS.
package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/term"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/longshore-lb/longshore/e2e"
	"github.com/longshore-lb/longshore/e2e/lab"
)

const objects = e2e.Web + `
apiVersion: metallb.io/v1beta1
kind: IPAddressPool
metadata: {name: lan, namespace: longshore-system}
spec: {addresses: [172.31.0.200-172.31.0.220]}
---
apiVersion: metallb.io/v1beta1
kind: L2Advertisement
metadata: {name: lan, namespace: longshore-system}
spec: {ipAddressPools: [lan]}
---
apiVersion: metallb.io/v1beta1
kind: IPAddressPool
metadata: {name: routed, namespace: longshore-system}
spec: {addresses: [192.0.2.10-192.0.2.20], autoAssign: false}
---
apiVersion: metallb.io/v1beta1
kind: BGPAdvertisement
metadata: {name: routed, namespace: longshore-system}
spec: {ipAddressPools: [routed]}
---
apiVersion: metallb.io/v1beta2
kind: BGPPeer
metadata: {name: router, namespace: longshore-system}
spec: {myASN: 64513, peerASN: 64512, peerAddress: 172.31.0.1, holdTime: 9s, keepaliveTime: 3s, connectTime: 1s}
---
apiVersion: v1
kind: Service
metadata: {name: web-lan}
spec:
  type: LoadBalancer
  selector: {app: web}
  ports: [{port: 80, targetPort: 8080}]
---
apiVersion: v1
kind: Service
metadata:
  name: web-routed
  annotations: {metallb.io/address-pool: routed, longshore.dev/scheduler: wlc}
spec:
  type: LoadBalancer
  selector: {app: web}
  ports: [{port: 80, targetPort: 8080}]
`

func main() {
	lab.Main()
	began := time.Now()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	d := &demo{began: began}
	err := d.run(ctx)
	if err != nil {
		fmt.Printf("\ndemo: failed after %v: %v\n", time.Since(began).Round(time.Second), err)
		stop()
		os.Exit(1)
	}
}

type demo struct {
	began     time.Time
	lab       *lab.Lab
	cluster   *lab.Cluster
	longshore *e2e.Installation
	frr       *lab.FRR
}

// step says what comes next, and when.
func (d *demo) step(format string, args ...any) {
	fmt.Printf("\n==> [%3.0f s] %s\n", time.Since(d.began).Seconds(), fmt.Sprintf(format, args...))
}

func (d *demo) run(ctx context.Context) (err error) {
	d.step("the lab: three nodes, a client on their network, a router with a client behind it")
	if d.lab, err = lab.New(ctx, lab.Config{Scenario: "demo", Nodes: 3}); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			fmt.Printf("\nlogs are kept in %s\n", d.lab.KeepRecords())
		}
		err = errors.Join(err, d.lab.Close())
	}()
	for _, part := range []func(context.Context) error{d.start, d.addresses, d.layer2, d.bgp, d.spread, d.view, d.nodeDies} {
		if err := part(ctx); err != nil {
			return err
		}
	}
	fmt.Printf("\ndemo: ok in %v\n", time.Since(d.began).Round(time.Second))
	if os.Getenv("KEEP") != "" {
		return d.keep(ctx)
	}
	return nil
}

func (d *demo) start(ctx context.Context) (err error) {
	d.step("the control plane: etcd, kube-apiserver, kube-controller-manager")
	if d.cluster, err = d.lab.StartCluster(ctx); err != nil {
		return err
	}
	d.step("helm install longshore charts/longshore: an agent on each node, two controllers")
	root, err := os.Getwd()
	if err != nil {
		return err
	}
	if d.longshore, err = e2e.Install(ctx, d.lab, d.cluster, root); err != nil {
		return err
	}
	d.step("FRR on the router; two pools, six pods, two Services")
	if d.frr, err = d.lab.Router.StartFRR(ctx, lab.RouterConfig(64512, 64513)); err != nil {
		return err
	}
	if err := d.cluster.Apply(ctx, objects); err != nil {
		return err
	}
	return lab.Await(ctx, "six ready pods", time.Minute, func(ctx context.Context) error {
		web, err := d.cluster.Client().AppsV1().Deployments("default").Get(ctx, "web", metav1.GetOptions{})
		if err == nil && web.Status.ReadyReplicas != 6 {
			err = fmt.Errorf("%d are ready", web.Status.ReadyReplicas)
		}
		return err
	})
}

func (d *demo) addresses(ctx context.Context) error {
	d.step("addresses out of the pools")
	for _, name := range []string{"web-lan", "web-routed"} {
		if _, err := d.longshore.AwaitAddress(ctx, "default", name, false); err != nil {
			return err
		}
	}
	return d.show(d.cluster.Kubectl(ctx, "get", "services", "web-lan", "web-routed"))
}

// address is that of a Service, which has one by now.
func (d *demo) address(ctx context.Context, name string) (netip.AddrPort, error) {
	addr, err := d.longshore.AwaitAddress(ctx, "default", name, false)
	return netip.AddrPortFrom(addr, 80), err
}

func (d *demo) layer2(ctx context.Context) error {
	at, err := d.address(ctx, "web-lan")
	if err != nil {
		return err
	}
	d.step("layer 2: the client asks who has %s", at.Addr())
	if _, err := d.answered(ctx, at.Addr()); err != nil {
		return err
	}
	if err := d.ask(ctx, d.lab.Client, at); err != nil {
		return err
	}
	return d.show(d.lab.Client.Run(ctx, "ip", "neigh", "show", at.Addr().String()))
}

// answered waits until exactly one node answers for an address, and says which.
func (d *demo) answered(ctx context.Context, addr netip.Addr) (owner *lab.Node, err error) {
	err = lab.Await(ctx, "one node that answers for "+addr.String(), time.Minute, func(context.Context) error {
		answers, err := d.lab.Client.WhoHas(addr, time.Second)
		if err != nil {
			return err
		}
		for _, n := range d.lab.Nodes {
			if len(answers) == 1 && n.Alive() && n.MAC().String() == answers[0].String() {
				owner = n
				return nil
			}
		}
		return fmt.Errorf("%v answer", answers)
	})
	if err == nil {
		fmt.Printf("%s is at %s: %s, and nobody else answers\n", addr, owner.MAC(), owner.Name)
	}
	return owner, err
}

// ask waits until a server answers at all.
func (d *demo) ask(ctx context.Context, from *lab.Host, at netip.AddrPort) error {
	return lab.Await(ctx, "an answer at "+at.String(), time.Minute, func(ctx context.Context) error {
		_, err := from.Ask(ctx, "tcp", at)
		return err
	})
}

func (d *demo) bgp(ctx context.Context) error {
	at, err := d.address(ctx, "web-routed")
	if err != nil {
		return err
	}
	d.step("BGP: the router has %s from every node", at.Addr())
	if err := d.awaitNextHops(ctx, at.Addr(), 3); err != nil {
		return err
	}
	if err := d.show(d.frr.Show(ctx, "show bgp ipv4 unicast")); err != nil {
		return err
	}
	return d.show(d.lab.Router.Run(ctx, "ip", "route", "show", at.Addr().String()))
}

func (d *demo) awaitNextHops(ctx context.Context, addr netip.Addr, count int) error {
	return lab.Await(ctx, fmt.Sprintf("%d next hops of %s", count, addr), time.Minute, func(context.Context) error {
		hops, err := d.lab.Router.NextHops(netip.PrefixFrom(addr, addr.BitLen()))
		if err == nil && len(hops) != count {
			err = fmt.Errorf("the router has %v", hops)
		}
		return err
	})
}

func (d *demo) spread(ctx context.Context) error {
	if err := d.spreadFrom(ctx, d.lab.Client, "web-lan"); err != nil {
		return err
	}
	return d.spreadFrom(ctx, d.lab.Outside, "web-routed")
}

func (d *demo) spreadFrom(ctx context.Context, from *lab.Host, service string) error {
	at, err := d.address(ctx, service)
	if err != nil {
		return err
	}
	d.step("30 requests from %s to %s (%s)", from.Name, at, service)
	if err := d.ask(ctx, from, at); err != nil {
		return err
	}
	return d.requests(ctx, from, at, 6)
}

// requests sends 30 requests and prints which pods answered; so many of them must have.
func (d *demo) requests(ctx context.Context, from *lab.Host, at netip.AddrPort, pods int) error {
	seen := map[string]bool{} // endpoints reach the kernel some time after their pods are ready
	err := lab.Await(ctx, fmt.Sprintf("answers from %d pods", pods), time.Minute, func(ctx context.Context) error {
		for range 2 * pods {
			a, err := from.Ask(ctx, "tcp", at)
			if err != nil {
				return err
			}
			seen[a.Pod] = true
		}
		if len(seen) < pods {
			return fmt.Errorf("%d answered", len(seen))
		}
		return nil
	})
	if err != nil {
		return err
	}
	count := map[string]int{}
	for range 30 {
		a, err := from.Ask(ctx, "tcp", at)
		if err != nil {
			return err
		}
		count[strings.TrimPrefix(a.Pod, "default-")]++
	}
	for _, pod := range slices.Sorted(maps.Keys(count)) {
		fmt.Printf("%-24s %s %d\n", pod, strings.Repeat("#", count[pod]), count[pod])
	}
	if len(count) != pods {
		return fmt.Errorf("%d pods answered, want %d", len(count), pods)
	}
	return nil
}

func (d *demo) view(ctx context.Context) error {
	n := d.lab.Nodes[0]
	d.step("longshore ipvsadm -Ln on %s", n.Name)
	if err := d.show(d.longshore.Longshore(ctx, n, "ipvsadm", "-Ln")); err != nil {
		return err
	}
	d.step("longshore status on %s", n.Name)
	return d.show(d.longshore.Longshore(ctx, n, "status"))
}

func (d *demo) nodeDies(ctx context.Context) error {
	at, err := d.address(ctx, "web-lan")
	if err != nil {
		return err
	}
	routed, err := d.address(ctx, "web-routed")
	if err != nil {
		return err
	}
	owner, err := d.answered(ctx, at.Addr())
	if err != nil {
		return err
	}
	d.step("power cut on %s, which answers for %s", owner.Name, at.Addr())
	if err := owner.Kill(); err != nil {
		return err
	}
	began := time.Now()
	successor, err := d.answered(ctx, at.Addr())
	if err != nil {
		return err
	}
	fmt.Printf("%s took over %v after the power cut\n", successor.Name, time.Since(began).Round(100*time.Millisecond))
	if err := d.awaitNextHops(ctx, routed.Addr(), 2); err != nil {
		return err
	}
	fmt.Printf("the router has two next hops left\n")
	pods, err := d.podsElsewhere(ctx, owner)
	if err != nil {
		return err
	}
	err = lab.Await(ctx, "the dead node's endpoints out of the kernel", time.Minute, func(ctx context.Context) error {
		table, err := d.longshore.Longshore(ctx, successor, "ipvsadm", "-Ln", "-t", at.String())
		if reals := strings.Count(table, "Masq"); err == nil && reals != pods {
			err = fmt.Errorf("%s has %d real servers", successor.Name, reals)
		}
		return err
	})
	if err != nil {
		return err
	}
	d.step("30 requests from client to %s", at)
	if err := d.requests(ctx, d.lab.Client, at, pods); err != nil {
		return err
	}
	d.step("30 requests from outside to %s", routed)
	return d.requests(ctx, d.lab.Outside, routed, pods)
}

// podsElsewhere is how many pods run on other nodes than one.
func (d *demo) podsElsewhere(ctx context.Context, than *lab.Node) (count int, err error) {
	list, err := d.cluster.Client().CoreV1().Pods("default").List(ctx, metav1.ListOptions{LabelSelector: "app=web"})
	if err != nil {
		return 0, err
	}
	for _, p := range list.Items {
		if p.Spec.NodeName != than.Name && p.DeletionTimestamp == nil {
			count++
		}
	}
	return count, nil
}

// show prints what a program printed.
func (d *demo) show(out string, err error) error {
	if err != nil {
		return err
	}
	fmt.Println(strings.TrimRight(out, "\n"))
	return nil
}

// keep leaves the lab up: with a terminal there is a shell in it, else it stays until the input ends.
func (d *demo) keep(ctx context.Context) error {
	fmt.Printf(`
The lab stays up. Its machines are network namespaces:
  ip netns                                          lists them
  ip netns exec ls-client curl http://...           the client; ls-outside is behind the router
  ip netns exec ls-n1 ipvsadm -Ln                   a node
  kubectl get services                              as administrator
  longshore-n1 status                               longshore on a node
End the shell (or the input) to take it down.
`)
	folder, err := d.shortcuts()
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(folder) }()
	if !term.IsTerminal(int(os.Stdin.Fd())) {
		done := make(chan struct{})
		go func() {
			_, _ = os.Stdin.Read(make([]byte, 1))
			close(done)
		}()
		select {
		case <-ctx.Done():
		case <-done:
		}
		return nil
	}
	shell := exec.CommandContext(ctx, "bash")
	shell.Stdin, shell.Stdout, shell.Stderr = os.Stdin, os.Stdout, os.Stderr
	shell.Env = append(os.Environ(), "PATH="+folder+":"+os.Getenv("PATH"))
	_ = shell.Run() // its last command's status is not the demo's
	return nil
}

// shortcuts makes a folder of commands for the shell: kubectl, and longshore on each node.
func (d *demo) shortcuts() (string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	folder, err := os.MkdirTemp("", "longshore-demo-")
	if err != nil {
		return "", err
	}
	commands := map[string]string{
		"kubectl": fmt.Sprintf("ip netns exec %s %s --kubeconfig %s \"$@\"", d.lab.API.NetNS(),
			filepath.Join(cache, "longshore", "controlplane", "kubectl"), d.cluster.AdminKubeconfig()),
	}
	for _, n := range d.lab.Nodes {
		commands["longshore-"+n.Name] = d.longshore.Shortcut(n)
	}
	for name, command := range commands {
		if err := os.WriteFile(filepath.Join(folder, name), []byte("#!/bin/sh\nexec "+command+"\n"), 0o755); err != nil {
			return "", err
		}
	}
	return folder, nil
}
