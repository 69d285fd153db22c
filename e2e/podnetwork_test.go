package e2e

import (
	"testing"
	"time"

	"github.com/longshore-lb/longshore/e2e/lab"
)

// scenario shows one thing that longshore does, and leaves the cluster as it found it.
type scenario struct {
	name string
	run  func(*testing.T, *world)
}

// play runs scenarios in order. After each the view of every node's table is compared with ipvsadm's.
func (w *world) play(t *testing.T, scenarios []scenario) {
	t.Helper()
	for _, s := range scenarios {
		ok := t.Run(s.name, func(t *testing.T) {
			began := time.Now()
			s.run(t, w)
			compareWithIpvsadm(t, w)
			t.Logf("took %v", time.Since(began).Round(100*time.Millisecond))
		})
		if !ok {
			for _, n := range w.Lab.Nodes {
				if status, err := w.Longshore(t.Context(), n, "status"); err == nil {
					t.Logf("status of %s:\n%s", n.Name, status)
				}
			}
		}
	}
}

// TestPodNetworks shows that longshore serves pods whichever way the network plugin joins them: in bridges, and in an
// overlay. (TestScenarios has the third way, routes to each pod, unless it is told otherwise.) It plays the scenarios in
// which packets go to pods by a way that others do not: from pods and nodes and from outside; to a pod of the same node, of
// another and to the client itself; by cluster IPs, node ports and LoadBalancer addresses. All others, which are about tables, policies
// and what the API says, run with LONGSHORE_LAB_PODS.
func TestPodNetworks(t *testing.T) {
	for _, network := range []lab.PodNetwork{lab.Bridge, lab.VXLAN} {
		t.Run(string(network), func(t *testing.T) {
			newWorld(t, lab.Config{Nodes: 3, PodNetwork: network}).play(t, []scenario{
				{"ClusterIP", clusterIP},
				{"NodePort", nodePort},
				{"Hairpin", hairpin},
				{"Layer2", layer2},
			})
		})
	}
}
