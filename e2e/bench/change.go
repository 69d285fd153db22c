package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// pace is the time between two changes: more than kube-proxy's minSyncPeriod of a second, so that this is not what is measured.
const pace = 1100 * time.Millisecond

// change replaces one endpoint of one Service again and again, and measures each time from when this program knows that
// it is written, by the API server's answer or by a watch's event, to the new endpoint's being in the kernel.
func (b *bench) change(ctx context.Context, r *running) error {
	count, interval := b.changes, time.Duration(0)
	if r.name != ours {
		count, interval = b.peerChanges, pace
	}
	limited, cancel := context.WithTimeout(ctx, b.changeLimit)
	defer cancel()
	if r.name == ours {
		limited = ctx
	}
	w, err := b.watch(ctx)
	if err != nil {
		return err
	}
	defer w.stop()
	before, err := r.metrics(ctx)
	if err != nil {
		return err
	}
	order := rand.New(rand.NewPCG(1, 2)).Perm(b.load.size())
	var took []time.Duration
	for i := range count {
		d, err := b.changeOne(limited, r, w, order[i%len(order)])
		if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
			break
		}
		if err != nil {
			return err
		}
		took = append(took, d)
		if err := pause(limited, interval); err != nil {
			break
		}
	}
	if len(took) == 0 {
		b.report.add(figure{name: b.name(change, "p50"), proxy: r.name, value: millis(b.changeLimit), unit: "ms", exceeded: true})
		return nil
	}
	fmt.Printf("      %d changes\n", len(took))
	b.report.add(figure{name: b.name(change, "p50"), proxy: r.name, value: millis(percentile(took, 50)), unit: "ms"})
	b.report.add(figure{name: b.name(change, "p99"), proxy: r.name, value: millis(percentile(took, 99)), unit: "ms"})
	after, err := r.metrics(ctx)
	if err != nil {
		return err
	}
	mallocs := after["go_memstats_mallocs_total"] - before["go_memstats_mallocs_total"]
	b.report.add(figure{name: b.name(change, "allocations"), proxy: r.name, value: mallocs / float64(len(took)), unit: "1/change"})
	return nil
}

func (b *bench) changeOne(ctx context.Context, r *running, w *watcher, service int) (time.Duration, error) {
	const endpoint = perService - 1
	want := pair{service, b.load.other(service, endpoint)}
	arrived := make(chan time.Time, 1)
	var failed error
	go func() {
		var at time.Time
		at, failed = awaitOne(ctx, r.plane, want, time.Millisecond)
		arrived <- at
	}()
	version, err := b.load.replace(ctx, service, endpoint, endpoint+1)
	known := time.Now()
	at := <-arrived
	if err := errors.Join(err, failed); err != nil {
		return 0, err
	}
	if seen, ok := w.seen(version); ok && seen.Before(known) {
		known = seen
	}
	return max(at.Sub(known), 0), nil
}

// watcher notes when each version of an EndpointSlice is seen.
type watcher struct {
	stop func()
	mu   sync.Mutex
	when map[string]time.Time
}

func (b *bench) watch(ctx context.Context) (*watcher, error) {
	slices := b.load.client.DiscoveryV1().EndpointSlices(namespace)
	list, err := slices.List(ctx, metav1.ListOptions{Limit: 1})
	if err != nil {
		return nil, err
	}
	events, err := slices.Watch(ctx, metav1.ListOptions{ResourceVersion: list.ResourceVersion})
	if err != nil {
		return nil, err
	}
	w := &watcher{stop: events.Stop, when: map[string]time.Time{}}
	go func() {
		for e := range events.ResultChan() {
			now := time.Now()
			if slice, ok := e.Object.(*discoveryv1.EndpointSlice); ok {
				w.mu.Lock()
				w.when[slice.ResourceVersion] = now
				w.mu.Unlock()
			}
		}
	}()
	return w, nil
}

func (w *watcher) seen(version string) (time.Time, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	at, ok := w.when[version]
	return at, ok
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(d):
		return nil
	}
}
