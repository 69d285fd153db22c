package main

import "context"

// memory is the proxy's resident memory some time after its cold start.
func (b *bench) memory(ctx context.Context, r *running) error {
	if err := pause(ctx, b.settle); err != nil {
		return err
	}
	mib, err := r.resident()
	if err != nil {
		return err
	}
	b.report.add(figure{name: b.name(memory, ""), proxy: r.name, value: mib, unit: "MiB"})
	return nil
}

// watchIdle is what the proxy does while nothing changes.
func (b *bench) watchIdle(ctx context.Context, r *running) error {
	if err := quiet(ctx); err != nil {
		return err
	}
	counted := b.countNetlink(r)
	before, err := r.cpu()
	if err != nil {
		return err
	}
	if err := pause(ctx, b.options.idle); err != nil {
		return err
	}
	counted(b.name(idle, "netlink"))
	after, err := r.cpu()
	if err != nil {
		return err
	}
	b.report.add(figure{name: b.name(idle, "cpu"), proxy: r.name, value: seconds(after - before), unit: "s"})
	return nil
}
