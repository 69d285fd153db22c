package controller_test

import (
	"fmt"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/longshore-lb/longshore/controller"
	"github.com/longshore-lb/longshore/e2e/lab"
)

// TestLeases uses the Leases of agents at a real API server.
func TestLeases(t *testing.T) {
	const namespace = "longshore-system"
	ctx := t.Context()
	l := lab.ForTest(t, lab.Config{Nodes: 1})
	c, err := l.StartAPI(ctx, l.Nodes...)
	if err != nil {
		t.Fatal(err)
	}
	kube, err := controller.NewKubernetes(c.AdminConfig(), namespace)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Client().CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	leases := c.Client().CoordinationV1().Leases(namespace)
	hold := func(b *controller.TieBreak, alive ...string) time.Time {
		t.Helper()
		until, err := b.Hold(ctx, alive)
		if err != nil {
			t.Fatal(err)
		}
		return until
	}
	holder := func() string {
		t.Helper()
		lease, err := leases.Get(ctx, controller.TieBreakName, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return *lease.Spec.HolderIdentity
	}

	t.Run("one half has it", func(t *testing.T) {
		a, b, friend := kube.TieBreak("a"), kube.TieBreak("b"), kube.TieBreak("c")
		var until time.Time
		for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
			if until = hold(a, "a", "c"); !until.After(time.Now()) {
				t.Fatalf("a has it until %v", until)
			}
			if got := hold(b, "b", "d"); !got.IsZero() {
				t.Fatalf("b has it until %v, a until %v", got, until)
			}
		}
		// Another agent of the half renews it, in the holder's name.
		if until = hold(friend, "a", "c"); !until.After(time.Now()) || holder() != "a" {
			t.Fatalf("c has it until %v, the holder is %s", until, holder())
		}
		for hold(b, "b", "d").IsZero() {
			time.Sleep(20 * time.Millisecond)
		}
		if early := time.Until(until); early > 0 {
			t.Errorf("b got it %v before it was over for a", early)
		}
		if got := hold(a, "a", "c"); !got.IsZero() || holder() != "b" {
			t.Errorf("a has it until %v, the holder is %s", got, holder())
		}
		if err := a.Release(ctx); err != nil || holder() != "b" {
			t.Errorf("a released what b has: %v, the holder is %q", err, holder())
		}
		if err := b.Release(ctx); err != nil {
			t.Fatal(err)
		}
		if got := hold(a, "a", "c"); got.IsZero() {
			t.Error("a does not get it after b has released it")
		}
	})
	t.Run("both want it", func(t *testing.T) {
		if err := leases.Delete(ctx, controller.TieBreakName, metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		var mu sync.Mutex
		got := map[int]int{}
		var all sync.WaitGroup
		for i := range 10 {
			all.Go(func() {
				var half []string
				for j := i % 2; j < 10; j += 2 {
					half = append(half, fmt.Sprint(j))
				}
				until, err := kube.TieBreak(fmt.Sprint(i)).Hold(ctx, half)
				mu.Lock()
				defer mu.Unlock()
				if err != nil {
					t.Errorf("%d: %v", i, err)
				} else if !until.IsZero() {
					got[i%2]++
				}
			})
		}
		all.Wait()
		if got[0]+got[1] != 5 || got[0]*got[1] != 0 {
			t.Errorf("of the halves so many have it: %v", got)
		}
	})
	t.Run("agents", func(t *testing.T) {
		const node = "n1"
		for range 2 { // again after a crash
			if err := kube.Register(ctx, node); err != nil {
				t.Fatal(err)
			}
		}
		list, err := leases.List(ctx, metav1.ListOptions{LabelSelector: controller.AgentLabel})
		if err != nil || len(list.Items) != 1 {
			t.Fatalf("%d Leases of agents, %v", len(list.Items), err)
		}
		lease := list.Items[0]
		if owner := lease.OwnerReferences; lease.Name != "longshore-agent.n1" || *lease.Spec.HolderIdentity != node || len(owner) != 1 || owner[0].Name != node {
			t.Errorf("the Lease is %+v", lease)
		}
		for range 2 {
			if err := kube.Unregister(ctx, node); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := leases.Get(ctx, lease.Name, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
			t.Errorf("the Lease is still there: %v", err)
		}
		if err := kube.Register(ctx, "n9"); err == nil {
			t.Error("an agent of a node that is not there was registered")
		}
	})
}
