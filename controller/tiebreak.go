package controller

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	typedcoordinationv1 "k8s.io/client-go/kubernetes/typed/coordination/v1"

	"github.com/longshore-lb/longshore/announcer"
)

// TieBreakName is the Lease that decides between two halves of the agents that do not reach each other.
const TieBreakName = "longshore-tie-break"

const (
	// tieDuration is how long one half has the Lease after its last renewal, tieInterval the time between two attempts to get
	// or renew it, tieTimeout how long one may take.
	tieDuration = 3 * time.Second
	tieInterval = time.Second
	tieTimeout  = time.Second
)

// TieBreak is the Lease of that name, as one agent sees it. One goroutine at a time may use it.
//
// Its holder is an agent. The half that the holder is in has it, and every agent of that half renews it in the holder's name. The
// other half takes it when it has seen it unchanged for its whole duration by its own clock. Every write is by compare-and-swap.
type TieBreak struct {
	leases typedcoordinationv1.LeaseInterface
	node   string
	seen   string    // resourceVersion
	since  time.Time // when that was first seen
}

// TieBreak is the Lease for the agent of a node.
func (k *Kubernetes) TieBreak(node string) *TieBreak {
	return &TieBreak{leases: k.client.CoordinationV1().Leases(k.namespace), node: node}
}

// Hold tries once to get or renew the Lease for the half that is alive, this agent's node among it. It returns until when the half
// has it, by the clock of this process; zero if the other half has it. An error changes nothing about what an earlier call
// returned.
func (b *TieBreak) Hold(ctx context.Context, alive []string) (until time.Time, err error) {
	ctx, cancel := context.WithTimeout(ctx, tieTimeout)
	defer cancel()
	for {
		until, err = b.hold(ctx, alive)
		if !apierrors.IsConflict(err) && !apierrors.IsAlreadyExists(err) {
			break
		}
	}
	if err != nil {
		return until, fmt.Errorf("Lease %s: %w", TieBreakName, err)
	}
	return until, nil
}

func (b *TieBreak) hold(ctx context.Context, alive []string) (time.Time, error) {
	lease, err := b.leases.Get(ctx, TieBreakName, metav1.GetOptions{})
	missing := apierrors.IsNotFound(err)
	switch {
	case missing:
		lease = &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: TieBreakName}}
	case err != nil:
		return time.Time{}, err
	}
	now := time.Now()
	if b.since.IsZero() || lease.ResourceVersion != b.seen {
		b.seen, b.since = lease.ResourceVersion, now
	}
	holder := ""
	if lease.Spec.HolderIdentity != nil {
		holder = *lease.Spec.HolderIdentity
	}
	over := holder == "" || now.Sub(b.since) > tieDuration
	ours := slices.Contains(alive, holder)
	if !ours && !over {
		return time.Time{}, nil
	}
	if !ours {
		holder = b.node
		lease.Spec.AcquireTime = &metav1.MicroTime{Time: now}
	}
	seconds := int32(tieDuration / time.Second)
	lease.Spec.HolderIdentity, lease.Spec.LeaseDurationSeconds = &holder, &seconds
	lease.Spec.RenewTime = &metav1.MicroTime{Time: now}
	if missing {
		_, err = b.leases.Create(ctx, lease, metav1.CreateOptions{})
	} else {
		_, err = b.leases.Update(ctx, lease, metav1.UpdateOptions{})
	}
	if err != nil {
		return time.Time{}, err
	}
	return now.Add(tieDuration), nil
}

// Release gives the Lease up if this agent is its holder, so that the next tie is broken at once.
func (b *TieBreak) Release(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, tieTimeout)
	defer cancel()
	lease, err := b.leases.Get(ctx, TieBreakName, metav1.GetOptions{})
	if err == nil && lease.Spec.HolderIdentity != nil && *lease.Spec.HolderIdentity == b.node {
		nobody := ""
		lease.Spec.HolderIdentity = &nobody
		_, err = b.leases.Update(ctx, lease, metav1.UpdateOptions{})
	}
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("release Lease %s: %w", TieBreakName, err)
	}
	return nil
}

// AgentLabel is on the Leases by which agents say that a node has one. They are not renewed: who is alive is told by gossip.
const AgentLabel = "longshore.dev/agent"

// agentLease is the name of such a Lease.
func agentLease(node string) string { return agentLeasePrefix + node }

const agentLeasePrefix = "longshore-agent."

// Register says that a node has an agent, until Unregister or until the Node is deleted.
func (k *Kubernetes) Register(ctx context.Context, node string) error {
	ctx, cancel := context.WithTimeout(ctx, retryAfter)
	defer cancel()
	n, err := k.client.CoreV1().Nodes().Get(ctx, node, metav1.GetOptions{})
	if err != nil {
		return fmt.Errorf("register the agent: node %s: %w", node, err)
	}
	lease := &coordinationv1.Lease{
		ObjectMeta: metav1.ObjectMeta{
			Name: agentLease(node), Labels: map[string]string{AgentLabel: ""},
			OwnerReferences: []metav1.OwnerReference{{APIVersion: "v1", Kind: "Node", Name: node, UID: n.UID}},
		},
		Spec: coordinationv1.LeaseSpec{HolderIdentity: &node},
	}
	_, err = k.client.CoordinationV1().Leases(k.namespace).Create(ctx, lease, metav1.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("register the agent: Lease %s: %w", lease.Name, err)
	}
	return nil
}

// Unregister says that a node has no agent any more.
func (k *Kubernetes) Unregister(ctx context.Context, node string) error {
	ctx, cancel := context.WithTimeout(ctx, tieTimeout)
	defer cancel()
	err := k.client.CoordinationV1().Leases(k.namespace).Delete(ctx, agentLease(node), metav1.DeleteOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("unregister the agent: Lease %s: %w", agentLease(node), err)
	}
	return nil
}

// fence is whether the agent must not answer for addresses, since others that it does not reach may.
type fence struct {
	reason string             // why it must not; "" = it may
	tied   []string           // the half that is alive, while it is one
	until  time.Time          // until when the half has the Lease
	stop   context.CancelFunc // ends the attempts to get it
}

// updateFence counts the agents that are alive among those that should be.
func (a *Agent) updateFence() {
	if a.Members == nil || !a.settled {
		return
	}
	expected := []string{a.Node}
	for _, n := range sorted(a.snapshot.nodes) {
		if a.snapshot.agents[n.Name] && nodeReady(n) && n.Name != a.Node {
			expected = append(expected, n.Name)
		}
	}
	alive := a.aliveNames()
	part := announcer.PartOf(expected, alive)
	before := a.fence.reason
	a.fence.reason = ""
	if part != announcer.Half || a.TieBreak == nil {
		a.untie(part == announcer.Majority)
	}
	missing := slices.DeleteFunc(slices.Clone(expected), func(name string) bool { return slices.Contains(alive, name) })
	reached := fmt.Sprintf("node %s does not reach %s, %d of the %d agents on nodes that are Ready", a.Node, strings.Join(missing, ", "), len(missing), len(expected))
	switch {
	case part == announcer.Minority:
		a.fence.reason = reached + ": the others may answer for every address"
	case part == announcer.Half && a.TieBreak == nil:
		a.fence.reason = reached + ", and there is no Lease to decide between two halves"
	case part == announcer.Half:
		a.tie(alive)
		if !time.Now().Before(a.fence.until) {
			a.fence.reason = reached + ", and this half has not got Lease " + TieBreakName
		}
	}
	a.metrics.members(len(alive), len(expected), a.fence.reason != "")
	if a.fence.reason != before {
		if a.fence.reason != "" {
			a.Log.Error("no longer answering by ARP and NDP", "reason", a.fence.reason)
		} else {
			a.Log.Warn("answering by ARP and NDP again", "alive", alive, "expected", expected)
		}
	}
}

// tie lets attempts to get the Lease begin for a half. Agents that answer for nothing leave a moment to those that do.
func (a *Agent) tie(alive []string) {
	if a.fence.tied != nil && slices.Equal(a.fence.tied, alive) {
		return
	}
	if a.fence.stop != nil {
		a.fence.stop()
	}
	ctx, cancel := context.WithCancel(context.Background())
	a.fence.tied, a.fence.stop = alive, cancel
	wait := time.Duration(0)
	if len(a.claims) == 0 {
		wait = tieInterval
	}
	a.background.Go(func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-time.After(wait):
			}
			a.contend(ctx, alive)
			wait = tieInterval
		}
	})
}

func (a *Agent) contend(ctx context.Context, alive []string) {
	a.tieMu.Lock()
	defer a.tieMu.Unlock()
	until, err := a.TieBreak.Hold(ctx, alive)
	if ctx.Err() != nil {
		return
	}
	if err != nil {
		a.Log.Warn("cannot decide between two halves of the agents", "error", err)
		return
	}
	select {
	case a.tied <- until:
	case <-ctx.Done():
	}
}

// untie ends the attempts. A half that has become more than that gives the Lease back.
func (a *Agent) untie(giveBack bool) {
	if a.fence.stop == nil {
		return
	}
	a.fence.stop()
	a.fence.tied, a.fence.stop, a.fence.until = nil, nil, time.Time{}
	if giveBack {
		a.background.Go(func() {
			a.tieMu.Lock()
			defer a.tieMu.Unlock()
			if err := a.TieBreak.Release(context.Background()); err != nil {
				a.Log.Warn("tie between two halves of the agents", "error", err)
			}
		})
	}
}
