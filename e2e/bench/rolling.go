package main

import (
	"context"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"
)

// rolling replaces every endpoint of up to 100 Services, some of each Service at a time, while a pod asks Service 0
// again and again. Pods that are replaced go on to answer.
func (b *bench) rolling(ctx context.Context, r *running) error {
	services := min(100, b.load.size())
	changes := services * perService
	pod, err := b.node().AddPod(fmt.Sprintf("client-%d", b.starts))
	if err != nil {
		return err
	}
	before, err := r.metrics(ctx)
	if err != nil {
		return err
	}
	name := func(what string) string { return fmt.Sprintf("rolling-%d-%s", changes, what) }
	cpu, err := r.cpu()
	if err != nil {
		return err
	}
	counted := b.countNetlink(r)
	asking := ask(pod, target())
	began := time.Now()
	err = b.replaceAll(ctx, services)
	var at time.Time
	if err == nil {
		limited, cancel := context.WithTimeout(ctx, b.changeLimit)
		at, err = awaitAll(limited, r.plane, b.load.pairs())
		cancel()
	}
	requests, lost := asking.stop()
	counted(name("netlink"))
	if err != nil {
		return err
	}
	used, err := r.cpu()
	if err != nil {
		return err
	}
	after, err := r.metrics(ctx)
	if err != nil {
		return err
	}
	b.report.add(figure{name: name("time"), proxy: r.name, value: seconds(at.Sub(began)), unit: "s"})
	b.report.add(figure{name: name("cpu"), proxy: r.name, value: seconds(used - cpu), unit: "s"})
	b.report.add(figure{name: name("requests-lost"), proxy: r.name, value: float64(lost), unit: "requests"})
	b.report.add(figure{name: name("requests"), proxy: r.name, value: float64(requests), unit: "requests", more: true})
	if r.name == ours {
		const metric = "longshore_kernel_operations_total"
		b.report.add(figure{name: name("kernel-operations"), proxy: ours, value: after[metric] - before[metric], unit: "operations"})
		minimum := 2 * (changes + perService) // Service 0 has a second virtual server, of its node port
		b.report.add(figure{name: name("kernel-operations"), proxy: "minimum", value: float64(minimum), unit: "operations"})
	}
	return nil
}

// replaceAll replaces all endpoints of the first Services, round by round, four writes at a time.
func (b *bench) replaceAll(ctx context.Context, services int) error {
	for from := 0; from < perService; from += b.options.step {
		group, ctx := errgroup.WithContext(ctx)
		group.SetLimit(4)
		for s := range services {
			group.Go(func() error {
				_, err := b.load.replace(ctx, s, from, min(from+b.options.step, perService))
				return err
			})
		}
		if err := group.Wait(); err != nil {
			return err
		}
	}
	return nil
}
