package lab

import (
	"bytes"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// TestPodNetworks has pods of one node and of two reach each other, and sees what the rest of the lan sees of them.
func TestPodNetworks(t *testing.T) {
	for _, network := range []PodNetwork{Routed, Bridge, VXLAN} {
		t.Run(string(network), func(t *testing.T) {
			l := ForTest(t, Config{Nodes: 2, PodNetwork: network, Log: testLog(t)})
			n1, n2 := l.Nodes[0], l.Nodes[1]
			startServer(t, l.Client, "client")
			pod, neighbor, remote := startPod(t, n1, "pod"), startPod(t, n1, "neighbor"), startPod(t, n2, "remote")
			if _, err := n1.Run(t.Context(), "nft", `table inet seen {
				chain forward {
					type filter hook forward priority 0
					ip daddr `+neighbor.V4.String()+` counter
					ip6 daddr `+neighbor.V6.String()+` counter
				}
			}`); err != nil {
				t.Fatal(err)
			}
			for _, ipv6 := range []bool{false, true} {
				for _, protocol := range []string{"tcp/80", "udp/80"} {
					for _, other := range []*Host{neighbor, remote} {
						reach(t, pod, protocol, other.Addr(ipv6))
						reach(t, other, protocol, pod.Addr(ipv6))
					}
				}
				awaitAnswer(t, n1.Host, netip.AddrPortFrom(pod.Addr(ipv6), 80))
				fullPacket(t, pod, remote.Addr(ipv6))
				beyond(t, l, pod, ipv6)
			}
			if counters, err := n1.Run(t.Context(), "nft", "list", "table", "inet", "seen"); err != nil || strings.Contains(counters, "packets 0 ") {
				t.Errorf("the node's filter does not see what its pods send each other (%v):\n%s", err, counters)
			}

			if err := n2.Kill(); err != nil {
				t.Fatal(err)
			}
			if err := n2.Boot(); err != nil {
				t.Fatal(err)
			}
			if err := n1.ForgetNeighbors(); err != nil { // n2 has a new hardware address
				t.Fatal(err)
			}
			remote = startPod(t, n2, "again")
			for _, ipv6 := range []bool{false, true} {
				awaitAnswer(t, pod, netip.AddrPortFrom(remote.Addr(ipv6), 80))
			}
		})
	}
}

// startPod starts the built-in server in a pod of a node.
func startPod(t *testing.T, n *Node, name string) *Host {
	t.Helper()
	pod, err := n.addPod(name)
	if err != nil {
		t.Fatal(err)
	}
	startServer(t, pod, name)
	if network := n.lab.podNetwork; network != Routed {
		if port, err := n.kernel.LinkGetProtinfo(pod.Link.farLink); err != nil || !port.Hairpin {
			t.Errorf("%s: the bridge's port of pod %s is not in hairpin mode (%v)", network, name, err)
		}
	}
	return pod
}

// fullPacket sends the largest packet that a pod's interface takes to another pod. Nobody on the way may divide it: over
// IPv4 the kernel says so (IP_PMTUDISC_WANT, ip(7)), over IPv6 it is always so.
func fullPacket(t *testing.T, from *Host, to netip.Addr) {
	t.Helper()
	link, err := from.kernel.LinkByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	headers := 20 + 8
	if to.Is6() {
		headers = 40 + 8
	}
	conn, err := from.DialContext(t.Context(), "udp", netip.AddrPortFrom(to, 80).String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	question, answer := bytes.Repeat([]byte("x"), link.Attrs().MTU-headers), make([]byte, 64<<10)
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Write(question); err != nil {
		t.Fatal(err)
	}
	if n, err := conn.Read(answer); err != nil || !bytes.HasSuffix(answer[:n], question) {
		t.Errorf("%s sent %d bytes to %s, the interface's most, and got back %d: %v", from.Name, len(question), to, n, err)
	}
}

// beyond sees what the client and a pod see of each other.
func beyond(t *testing.T, l *Lab, pod *Host, ipv6 bool) {
	t.Helper()
	hidden := l.podNetwork == VXLAN
	want := pod.Addr(ipv6)
	if hidden {
		want = l.Nodes[0].Addr(ipv6)
	}
	for _, protocol := range []string{"tcp", "udp"} {
		answer, err := pod.Ask(t.Context(), protocol, netip.AddrPortFrom(l.Client.Addr(ipv6), 80))
		if err != nil || answer.Saw.Addr() != want {
			t.Errorf("the client saw %s/%s of the pod, want %s: %v", answer.Saw, protocol, want, err)
		}
	}
	if !hidden {
		reach(t, l.Client, "tcp/80", pod.Addr(ipv6))
		return
	}
	if answer, err := l.Client.Ask(t.Context(), "tcp", netip.AddrPortFrom(pod.Addr(ipv6), 80)); err == nil {
		t.Errorf("the client reached a pod of the overlay from outside: %+v", answer)
	}
	// A node is in the overlay with an address of the overlay only: answers to its other address leave it, and are lost.
	n2 := l.Nodes[1]
	for _, source := range []netip.Addr{n2.pods(ipv6).Addr(), n2.Addr(ipv6)} {
		err := n2.Do(func() error {
			dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: source.AsSlice()}, Timeout: time.Second}
			conn, err := dialer.DialContext(t.Context(), "tcp", netip.AddrPortFrom(pod.Addr(ipv6), 80).String())
			if err == nil {
				err = conn.Close()
			}
			return err
		})
		if answered := err == nil; answered != (source != n2.Addr(ipv6)) {
			t.Errorf("a pod of n1 answered n2 at %s: %v (%v)", source, answered, err)
		}
	}
}

// TestPodNetworkUnknown: a network that is not there is refused by its name.
func TestPodNetworkUnknown(t *testing.T) {
	l, err := New(t.Context(), Config{Nodes: 1, PodNetwork: "token ring"})
	if err == nil {
		err = l.Close()
		t.Fatal("made a lab with an unknown network", err)
	}
	if !strings.Contains(err.Error(), `PodNetwork is "token ring", must be routed, bridge or vxlan`) {
		t.Error(err)
	}
}
