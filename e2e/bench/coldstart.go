package main

import (
	"context"
	"errors"
	"time"

	"golang.org/x/sync/errgroup"
)

// coldStart measures from the proxy's start to the last endpoint in the kernel, and to its saying that it is healthy. A
// peer that takes longer than its limit is not ready.
func (b *bench) coldStart(ctx context.Context, r *running, tell bool) (ready bool, err error) {
	within := b.limit
	if b.load.size() >= 10000 && r.name != ours {
		within = b.largeLimit
	}
	limited, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	limited, died := context.WithCancelCause(limited)
	defer died(nil)
	go func() {
		<-r.process.Exited()
		died(errors.Join(errors.New("the proxy has ended"), r.process.Err()))
	}()
	group := errgroup.Group{}
	note := func(what string, wait func() (time.Time, error)) func() error {
		return func() error {
			at, err := wait()
			f := figure{name: b.name(coldstart, what), proxy: r.name, value: seconds(at.Sub(r.began)), unit: "s"}
			if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
				f.value, f.exceeded, err = seconds(within), true, errLate
			}
			if tell && (err == nil || f.exceeded) {
				b.report.add(f)
			}
			return err
		}
	}
	group.Go(note("kernel", func() (time.Time, error) { return awaitAll(limited, r.plane, b.load.pairs()) }))
	group.Go(note("healthy", func() (time.Time, error) { return r.healthy(limited) }))
	err = group.Wait()
	if errors.Is(err, errLate) {
		return false, nil
	}
	return err == nil, err
}

var errLate = errors.New("not in time")
