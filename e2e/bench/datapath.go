package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/longshore-lb/longshore/e2e/lab"
)

// answer makes a pod answer every connection with a byte and close it.
func answer(pod *lab.Host) error {
	var listener net.Listener
	err := pod.Do(func() (err error) {
		listener, err = net.Listen("tcp4", netip.AddrPortFrom(pod.V4, targetPort).String())
		return err
	})
	if err != nil {
		return fmt.Errorf("listen in %s: %w", pod.Name, err)
	}
	go func() { // until this program ends
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			_, _ = conn.Write([]byte{'.'}) // the client counts what does not arrive
			conn.Close()
		}
	}()
	return nil
}

// request connects, waits for the answer and closes. It returns how long the connection's opening took. It runs on a
// thread of the client's namespace and uses plain system calls, so that little but the path is measured.
func request(to netip.AddrPort) (time.Duration, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	patience := unix.Timeval{Sec: 3}
	if err := errors.Join(
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &patience),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &patience),
		// Closing resets the connection, so that ports do not run out.
		unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}),
	); err != nil {
		return 0, err
	}
	began := time.Now()
	server := &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}
	err = uninterrupted(func() error { return unix.Connect(fd, server) })
	if err != nil && !errors.Is(err, unix.EISCONN) { // so it says when it was interrupted in between
		return 0, err
	}
	took := time.Since(began)
	var b [1]byte
	var n int
	err = uninterrupted(func() (err error) {
		n, err = unix.Read(fd, b[:])
		return err
	})
	if err == nil && n == 0 {
		err = errors.New("the connection ended without an answer")
	}
	return took, err
}

// uninterrupted calls f again as long as a signal ends it: Go's scheduler sends some, and a socket with a timeout does not
// go on by itself (signal(7)).
func uninterrupted(f func() error) error {
	for {
		if err := f(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// asker asks a Service again and again, with a little time between: it is not to take the processor from the others.
type asker struct {
	end         atomic.Bool
	done        chan struct{}
	asked, lost int
}

func ask(from *lab.Host, to netip.AddrPort) *asker {
	a := &asker{done: make(chan struct{})}
	go func() {
		defer close(a.done)
		_ = from.Do(func() error {
			for !a.end.Load() {
				_, err := request(to)
				a.asked++
				if err != nil {
					a.lost++
				}
				time.Sleep(10 * time.Millisecond)
			}
			return nil
		})
	}()
	return a
}

func (a *asker) stop() (asked, lost int) {
	a.end.Store(true)
	<-a.done
	return a.asked, a.lost
}

// dataPath connects again and again to Service 0: from a pod of the proxy's node to the cluster IP, and from outside the
// cluster to the node port.
func (b *bench) dataPath(ctx context.Context, r *running) error {
	pod, err := b.node().AddPod(fmt.Sprintf("path-%d", b.starts))
	if err != nil {
		return err
	}
	return errors.Join(
		b.connections(ctx, r, "clusterip", pod, target()),
		b.connections(ctx, r, "nodeport", b.lab.Client, netip.AddrPortFrom(b.node().V4, nodePort)),
	)
}

func (b *bench) connections(ctx context.Context, r *running, what string, from *lab.Host, to netip.AddrPort) error {
	var mu sync.Mutex
	var took []time.Duration
	var failed []error
	client := func(until time.Time) {
		var mine []time.Duration
		var errs []error
		for time.Now().Before(until) && ctx.Err() == nil {
			d, err := request(to)
			if err != nil {
				errs = append(errs, err)
				continue
			}
			mine = append(mine, d)
		}
		mu.Lock()
		defer mu.Unlock()
		took, failed = append(took, mine...), append(failed, errs...)
	}
	for _, length := range []time.Duration{b.connect / 10, b.connect} { // the first is to get warm
		took, failed = nil, nil
		began := time.Now()
		var clients sync.WaitGroup
		for range 2 {
			clients.Go(func() {
				err := from.Do(func() error {
					client(began.Add(length))
					return nil
				})
				if err != nil {
					mu.Lock()
					defer mu.Unlock()
					failed = append(failed, err)
				}
			})
		}
		clients.Wait()
	}
	if len(failed) > 0 {
		b.report.note("%s with %d Services: %s: %d of %d connections failed: %v", r.name, b.load.size(), what, len(failed), len(failed)+len(took), failed[0])
	}
	if len(took) == 0 {
		return fmt.Errorf("no connection to %s from %s", to, from.Name)
	}
	b.report.add(figure{name: b.name(datapath, what+"-rate"), proxy: r.name, value: float64(len(took)) / seconds(b.connect), unit: "connections/s", more: true})
	b.report.add(figure{name: b.name(datapath, what+"-p50"), proxy: r.name, value: millis(percentile(took, 50)), unit: "ms"})
	b.report.add(figure{name: b.name(datapath, what+"-p99"), proxy: r.name, value: millis(percentile(took, 99)), unit: "ms"})
	return nil
}
