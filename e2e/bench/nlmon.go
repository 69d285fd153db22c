package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/longshore-lb/longshore/e2e/lab"
)

// counter counts the netlink messages that programs of a node send to the kernel, whoever they are: the kernel's device
// nlmon hands a copy of each to a packet socket (drivers/net/nlmon.c).
type counter struct {
	fd       int
	messages int
	stopping atomic.Bool
	done     chan error
}

// countNetlink counts the messages to the kernel of the proxy's node until the function that it returns is called, which
// reports them, without those that this program sent itself to look at the proxy's work. Where they cannot be counted
// that is a note.
func (b *bench) countNetlink(r *running) func(figureName string) {
	asked := r.asked()
	c, err := newCounter(r.node)
	return func(figureName string) {
		var messages int
		if err == nil {
			messages, err = c.count()
		}
		if err != nil {
			b.report.note("%s of %s: %v", figureName, r.name, err)
			return
		}
		b.report.add(figure{name: figureName, proxy: r.name, value: float64(messages - (r.asked() - asked)), unit: "messages"})
	}
}

func newCounter(n *lab.Node) (*counter, error) {
	c := &counter{done: make(chan error, 1)}
	err := n.Do(func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "nlmon0"
		if err := netlink.LinkAdd(&netlink.GenericLink{LinkAttrs: attrs, LinkType: "nlmon"}); err != nil && !errors.Is(err, unix.EEXIST) {
			return err
		}
		link, err := netlink.LinkByName(attrs.Name)
		if err != nil {
			return err
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return err
		}
		protocol := binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, unix.ETH_P_ALL))
		if c.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, int(protocol)); err != nil {
			return err
		}
		return errors.Join(
			unix.Bind(c.fd, &unix.SockaddrLinklayer{Protocol: protocol, Ifindex: link.Attrs().Index}),
			unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 128<<20),
			unix.SetsockoptTimeval(c.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 200_000}),
		)
	})
	if err != nil {
		return nil, fmt.Errorf("count netlink messages on %s: %w", n.Name, err)
	}
	go func() { c.done <- c.read() }()
	return c, nil
}

func (c *counter) read() error {
	buffer := make([]byte, 1<<20)
	for !c.stopping.Load() {
		n, _, err := unix.Recvfrom(c.fd, buffer, 0)
		switch {
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
		case err != nil:
			return err
		default:
			c.messages += countRequests(buffer[:n])
		}
	}
	return nil
}

// countRequests counts the messages to the kernel in one packet (struct nlmsghdr, netlink(7)): those with the flag of a
// request, which the kernel's answers and notifications lack. The direction of the packet is not to be had from nlmon.
func countRequests(packet []byte) (count int) {
	for len(packet) >= unix.NLMSG_HDRLEN {
		if binary.NativeEndian.Uint16(packet[6:])&unix.NLM_F_REQUEST != 0 {
			count++
		}
		length := (int(binary.NativeEndian.Uint32(packet)) + unix.NLMSG_ALIGNTO - 1) &^ (unix.NLMSG_ALIGNTO - 1)
		if length < unix.NLMSG_HDRLEN || length > len(packet) {
			return count
		}
		packet = packet[length:]
	}
	return count
}

// count ends the counting. What the socket had no room for is an error.
func (c *counter) count() (int, error) {
	c.stopping.Store(true)
	err := <-c.done
	stats, statsErr := unix.GetsockoptTpacketStats(c.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS)
	unix.Close(c.fd)
	if err := errors.Join(err, statsErr); err != nil {
		return 0, fmt.Errorf("count netlink messages: %w", err)
	}
	if stats.Drops > 0 {
		return 0, fmt.Errorf("count netlink messages: %d packets were lost", stats.Drops)
	}
	return c.messages, nil
}
