package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/longshore-lb/longshore/e2e/lab"
)

// manifests is a load balancer on n1 for servers on n2 and n3: one address by ARP, one by BGP.
const manifests = `
apiVersion: metallb.io/v1beta1
kind: IPAddressPool
metadata: {name: lan}
spec: {addresses: [172.31.0.200-172.31.0.210]}
---
apiVersion: metallb.io/v1beta1
kind: L2Advertisement
metadata: {name: lan}
spec: {ipAddressPools: [lan]}
---
apiVersion: metallb.io/v1beta1
kind: IPAddressPool
metadata: {name: routed}
spec: {addresses: [192.0.2.0/24], autoAssign: false}
---
apiVersion: metallb.io/v1beta1
kind: BGPAdvertisement
metadata: {name: routed}
spec: {ipAddressPools: [routed]}
---
apiVersion: metallb.io/v1beta2
kind: BGPPeer
metadata: {name: router}
spec: {myASN: 64513, peerASN: 64512, peerAddress: 172.31.0.1, connectTime: 2s}
---
apiVersion: v1
kind: Service
metadata: {name: web-lan}
spec:
  type: LoadBalancer
  ports: [{name: tcp, port: 80}, {name: udp, port: 80, protocol: UDP}]
---
apiVersion: v1
kind: Service
metadata: {name: web-routed, annotations: {metallb.io/address-pool: routed}}
spec:
  type: LoadBalancer
  ports: [{name: tcp, port: 80}, {name: udp, port: 80, protocol: UDP}]
`

// endpoints is the servers of a Service.
func endpoints(service string, addrs ...string) string {
	return fmt.Sprintf(`
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: %s, labels: {kubernetes.io/service-name: %s}}
addressType: IPv4
ports: [{name: tcp, port: 8080}, {name: udp, port: 8080, protocol: UDP}]
endpoints: [{addresses: [%s]}]
---`, service, service, strings.Join(addrs, "]}, {addresses: ["))
}

// TestStandalone shows longshore as a load balancer without a cluster, from files.
func TestStandalone(t *testing.T) {
	ctx := t.Context()
	l := lab.ForTest(t, lab.Config{Nodes: 3})
	for _, n := range l.Nodes[1:] {
		if _, err := n.Serve("server-"+n.Name, "8080/TCP", "8080/UDP"); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := l.Router.StartFRR(ctx, lab.RouterConfig(64512, 64513)); err != nil {
		t.Fatal(err)
	}
	binary, err := onMemory("../bin/longshore")
	if err != nil {
		t.Fatal(err)
	}
	folder, n1 := t.TempDir(), l.Nodes[0]
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(folder, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("objects.yaml", manifests)
	write("endpoints.yaml", endpoints("web-lan", "172.31.0.12", "172.31.0.13")+endpoints("web-routed", "172.31.0.12", "172.31.0.13"))
	start := func() *lab.Process {
		t.Helper()
		p, err := n1.Start(lab.Exec{Name: "longshore", Path: binary, Args: []string{"run", "--manifests", folder, "--node", "n1",
			"--assignments", filepath.Join(folder, "assignments"), "--status-socket", socket(n1)}})
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	process := start()
	lan, routed := netip.MustParseAddrPort("172.31.0.200:80"), netip.MustParseAddrPort("192.0.2.0:80")
	for _, protocol := range []string{"tcp", "udp"} {
		spread(t, l.Client, protocol, lan, 2)
		spread(t, l.Outside, protocol, routed, 2)
	}
	if mac, err := l.Client.Neighbor(lan.Addr()); err != nil || mac.String() != n1.MAC().String() {
		t.Errorf("the client's neighbour table has %s (%v), n1 has %s", mac, err, n1.MAC())
	}

	compareTables(t, n1, binary)

	// A second one on the machine would take the first one's work back.
	if out, err := n1.Run(ctx, binary, "run", "--manifests", folder, "--node", "n1", "--status-socket", socket(n1)); err == nil || !strings.Contains(err.Error(), "another agent runs on this machine") {
		t.Errorf("a second agent: %v: %s", err, out)
	}

	// One server goes.
	write("endpoints.yaml", endpoints("web-lan", "172.31.0.13")+endpoints("web-routed", "172.31.0.12", "172.31.0.13"))
	awaitReals := func(want int) {
		t.Helper()
		await(t, fmt.Sprintf("%d real servers", want), func(ctx context.Context) error {
			out, err := n1.Run(ctx, binary, "ipvsadm", "-Ln", "-t", lan.String())
			if err == nil && takers(out) != want {
				err = errors.New(out)
			}
			return err
		})
	}
	awaitReals(1)
	if a := awaitAnswer(t, l.Client, "tcp", lan); a.Pod != "server-n3" {
		t.Errorf("%s answered", a.Pod)
	}

	// A typing error is named, and what was there before stays.
	write("endpoints.yaml", strings.Replace(endpoints("web-lan", "172.31.0.12"), "addressType", "adressType", 1))
	if err := process.AwaitOutput(ctx, `unknown field \"adressType\"`, waitFor); err != nil {
		t.Error(err)
	}
	if err := process.AwaitOutput(ctx, "endpoints.yaml: document 1", waitFor); err != nil {
		t.Error(err)
	}
	awaitAnswer(t, l.Client, "tcp", lan)

	// After a restart the Services have their addresses, though another one comes first now.
	write("endpoints.yaml", endpoints("web-lan", "172.31.0.12", "172.31.0.13")+endpoints("another", "172.31.0.12"))
	if err := process.Stop(); err != nil {
		t.Fatal(err)
	}
	write("another.yaml", strings.ReplaceAll(manifests[strings.LastIndex(manifests[:strings.Index(manifests, "name: web-routed")], "---"):], "name: web-routed, annotations: {metallb.io/address-pool: routed}", "name: another"))
	start()
	awaitReals(2) // until then the kernel serves what it was told before
	spread(t, l.Client, "tcp", lan, 2)
	if a := awaitAnswer(t, l.Client, "tcp", netip.MustParseAddrPort("172.31.0.201:80")); a.Pod != "server-n2" {
		t.Errorf("the new Service is served by %s", a.Pod)
	}
	// web-routed has lost its endpoints: nobody is told to come to it.
	await(t, "no route to web-routed", func(context.Context) error {
		hops, err := l.Router.NextHops(netip.PrefixFrom(routed.Addr(), 32))
		if err == nil && len(hops) > 0 {
			err = fmt.Errorf("the router has %v", hops)
		}
		return err
	})
	status, err := n1.Run(ctx, binary, "status", "--status-socket", socket(n1))
	if err != nil || !strings.Contains(status, "no ready endpoint") {
		t.Errorf("status does not say why (%v):\n%s", err, status)
	}
}
