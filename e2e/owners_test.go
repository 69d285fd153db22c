package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/longshore-lb/longshore/e2e/lab"
)

const (
	// A node is taken for dead after at most 6 times the pace, and slowness is how much longer all may take where the
	// processors are emulated and shared by everything.
	slowness = 2

	detection = 6 * Pace * slowness
	healing   = time.Second * slowness
)

// answering is how long a machine answered for an address without a pause.
type answering struct {
	by         string
	begin, end time.Time
}

// pauseAfter is from when on a machine that does not answer has ceased to: a hundred questions later.
const pauseAfter = 500 * time.Millisecond

// periods is who answered when, of answers in their order.
func periods(answers []lab.Answered) []answering {
	var all []answering
	last := map[string]int{}
	for _, a := range answers {
		by := a.By.String()
		if i, ok := last[by]; ok && a.At.Sub(all[i].end) < pauseAfter {
			all[i].end = a.At
			continue
		}
		last[by] = len(all)
		all = append(all, answering{by, a.At, a.At})
	}
	return all
}

// overlapAndGap is for how long two machines answered at the same time at most, and for how long nobody did.
func overlapAndGap(answers []lab.Answered) (overlap, gap time.Duration) {
	all := periods(answers)
	for i, p := range all {
		for _, q := range all[i+1:] {
			begin, end := p.begin, p.end
			if q.begin.After(begin) {
				begin = q.begin
			}
			if q.end.Before(end) {
				end = q.end
			}
			if p.by != q.by {
				overlap = max(overlap, end.Sub(begin))
			}
		}
	}
	for i := 1; i < len(answers); i++ {
		gap = max(gap, answers[i].At.Sub(answers[i-1].At))
	}
	return overlap, gap
}

func TestOverlapAndGap(t *testing.T) {
	begin := time.Now()
	at := func(ms int, by byte) lab.Answered {
		return lab.Answered{At: begin.Add(time.Duration(ms) * time.Millisecond), By: []byte{2, 0, 0, 0, 0, by}}
	}
	for _, test := range []struct {
		answers      []lab.Answered
		overlap, gap time.Duration
	}{
		{nil, 0, 0},
		{[]lab.Answered{at(0, 1), at(100, 1), at(300, 2), at(400, 2)}, 0, 200 * time.Millisecond},
		{[]lab.Answered{at(0, 1), at(100, 2), at(300, 1), at(400, 2)}, 200 * time.Millisecond, 200 * time.Millisecond},
		{[]lab.Answered{at(0, 1), at(100, 2), at(700, 1), at(800, 1)}, 0, 600 * time.Millisecond},
	} {
		if overlap, gap := overlapAndGap(test.answers); overlap != test.overlap || gap != test.gap {
			t.Errorf("%v: overlap %v, gap %v, want %v and %v", test.answers, overlap, gap, test.overlap, test.gap)
		}
	}
}

// awaitAnswering waits until the nodes that answer for an address are so many, and all of a group.
func awaitAnswering(t *testing.T, w *world, vip netip.Addr, many int, group []*lab.Node) *lab.Node {
	t.Helper()
	var found *lab.Node
	await(t, fmt.Sprintf("%d nodes that answer for %s", many, vip), func(context.Context) error {
		answers, err := w.Lab.Client.WhoHas(vip, 300*time.Millisecond)
		if err != nil {
			return err
		}
		for _, mac := range answers {
			i := slices.IndexFunc(group, func(n *lab.Node) bool { return n.MAC().String() == mac.String() })
			if i < 0 {
				return fmt.Errorf("%s answers, which is none of those that may", mac)
			}
			found = group[i]
		}
		if len(answers) != many {
			return fmt.Errorf("%v answer", answers)
		}
		return nil
	})
	return found
}

// splitBrain parts the nodes in each way. The larger part answers, one node of it, and nobody else for longer than it takes
// to notice.
func splitBrain(t *testing.T, w *world) {
	applyFor(t, w, pools)
	applyFor(t, w, webLAN)
	vip := w.address(t, "web-lan", false)
	w.owner(t, vip)
	n := w.Lab.Nodes
	t.Cleanup(func() {
		if err := w.Lab.Split(); err != nil {
			t.Error(err)
		}
	})
	play := func(name string, larger []*lab.Node, many int, groups ...[]*lab.Node) {
		t.Run(name, func(t *testing.T) {
			end, err := w.Lab.Client.Watch(vip, 10*time.Millisecond)
			if err != nil {
				t.Fatal(err)
			}
			if err := w.Lab.Split(groups...); err != nil {
				t.Fatal(err)
			}
			began := time.Now()
			awaitAnswering(t, w, vip, many, larger)
			settled := time.Since(began)
			time.Sleep(detection) // so long nothing changes
			awaitAnswering(t, w, vip, many, larger)
			if err := w.Lab.Split(); err != nil {
				t.Fatal(err)
			}
			began = time.Now()
			awaitAnswering(t, w, vip, 1, n)
			healed := time.Since(began)
			w.owner(t, vip)
			overlap, gap := overlapAndGap(end())
			t.Logf("settled after %v, healed after %v; two nodes answered for at most %v, nobody for at most %v",
				settled.Round(time.Millisecond), healed.Round(time.Millisecond), overlap.Round(time.Millisecond), gap.Round(time.Millisecond))
			if overlap > detection {
				t.Errorf("two nodes answered at the same time for %v, more than %v", overlap, detection)
			}
			if many > 0 && gap > 2*detection {
				t.Errorf("nobody answered for %v, more than %v", gap, 2*detection)
			}
			if healed > healing {
				t.Errorf("one node answered %v after the network was whole, later than %v", healed, healing)
			}
		})
	}
	play("n1|n2n3", n[1:], 1, n[:1], n[1:])
	play("n2|n1n3", []*lab.Node{n[0], n[2]}, 1, n[1:2], []*lab.Node{n[0], n[2]})
	play("n3|n1n2", n[:2], 1, n[2:], n[:2])
	play("n1|n2|n3", nil, 0, n[:1], n[1:2], n[2:])

	// Without n3's Lease n1 and n2 expect nobody else: each is a half, and one of them gets the Lease that decides.
	leases := w.Cluster.Client().CoordinationV1().Leases(Namespace)
	lease, err := leases.Get(t.Context(), "longshore-agent."+n[2].Name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := leases.Delete(t.Context(), lease.Name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	play("n1|n2", n[:2], 1, n[:1], n[1:2], n[2:])
	lease.ResourceVersion, lease.UID = "", ""
	if _, err := leases.Create(t.Context(), lease, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
}

// handover moves an address by a cordoned node and by an agent that is asked to end, while a client asks all the time.
func handover(t *testing.T, w *world) {
	applyFor(t, w, pools)
	applyFor(t, w, webLAN)
	vip := w.address(t, "web-lan", false)
	at := netip.AddrPortFrom(vip, 80)
	awaitAnswer(t, w.Lab.Client, "tcp", at)
	owner := w.owner(t, vip)
	moves := func(name string, move func(*lab.Node) error) {
		end, err := w.Lab.Client.Watch(vip, 10*time.Millisecond)
		if err != nil {
			t.Fatal(err)
		}
		requests := ask(t.Context(), w.Lab.Client, "tcp", at)
		if err := move(owner); err != nil {
			t.Fatal(err)
		}
		var others []*lab.Node
		for _, n := range w.Lab.Nodes {
			if n != owner {
				others = append(others, n)
			}
		}
		awaitAnswering(t, w, vip, 1, others)
		owner = w.owner(t, vip)
		time.Sleep(2 * time.Second) // of requests to the new one
		requests.report(t)
		overlap, gap := overlapAndGap(end())
		t.Logf("%s: both nodes answered for %v, nobody for at most %v", name, overlap.Round(time.Millisecond), gap.Round(time.Millisecond))
		if gap > time.Second {
			t.Errorf("%s: nobody answered for %v", name, gap)
		}
	}
	cordon := func(on bool) func(*lab.Node) error {
		return func(n *lab.Node) error {
			patch, err := json.Marshal(map[string]any{"spec": map[string]any{"unschedulable": on}})
			if err != nil {
				return err
			}
			_, err = w.Cluster.Client().CoreV1().Nodes().Patch(t.Context(), n.Name, types.MergePatchType, patch, metav1.PatchOptions{})
			return err
		}
	}
	first := owner
	moves("cordoned", cordon(true))
	if err := cordon(false)(first); err != nil {
		t.Fatal(err)
	}
	moves("the agent ends", w.EndAgent)
	if err := w.AwaitReady(t.Context()); err != nil {
		t.Fatal(err)
	}
}
