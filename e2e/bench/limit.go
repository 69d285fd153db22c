package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/longshore-lb/longshore/e2e/lab"
)

// limit is the peer that only writes: a program that knows all virtual and real servers beforehand and puts them into
// the kernel in batches. No proxy of this kind can be faster.
const limit = "limit"

// limitEnv makes this program that peer; its value is the number of Services.
const limitEnv = "LONGSHORE_BENCH_LIMIT"

// measureLimit is how long the program takes, from its start to its end, on a fresh node.
func (b *bench) measureLimit(ctx context.Context) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	size := b.load.size()
	b.starts++
	began := time.Now()
	p, err := b.node().Start(lab.Exec{
		Name: fmt.Sprintf("%02d-limit-%d", b.starts, size), Path: self, Env: []string{limitEnv + "=" + strconv.Itoa(size)},
	})
	if err != nil {
		return err
	}
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-p.Exited():
	}
	took := time.Since(began)
	kernel, err := openIPVS(b.node())
	if err != nil {
		return err
	}
	defer kernel.close()
	has, err := kernel.all()
	if err != nil {
		return err
	}
	for s := range size {
		for i := range perService {
			if want := (pair{s, fake(s, i, 0)}); !has(want) {
				return fmt.Errorf("the bare writer left out endpoint %s of Service %d: %s", want.endpoint, s, p.Tail(3))
			}
		}
	}
	b.report.add(figure{name: fmt.Sprintf("coldstart-%d-kernel", size), proxy: limit, value: seconds(took), unit: "s"})
	return nil
}

// writeLimit is that program; in any other process it does nothing.
func writeLimit() {
	text, ok := os.LookupEnv(limitEnv)
	if !ok {
		return
	}
	size, err := strconv.Atoi(text)
	if err == nil {
		err = writeServers(size)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

func writeServers(size int) error {
	family, err := netlink.GenlFamilyGet("IPVS")
	if err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_GENERIC)
	if err != nil {
		return err
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	w := writer{fd: fd, family: family.ID}
	for s := range size {
		w.add(1, service(s, true)) // IPVS_CMD_NEW_SERVICE, include/uapi/linux/ip_vs.h
		for i := range perService {
			w.add(5, service(s, false), destination(fake(s, i, 0))) // IPVS_CMD_NEW_DEST
		}
		if len(w.batch) > 50<<10 || s == size-1 {
			if err := w.flush(); err != nil {
				return err
			}
		}
	}
	return nil
}

// writer sends messages in batches, of which the last message alone asks for an answer.
type writer struct {
	fd     int
	family uint16
	seq    uint32
	batch  []byte
	last   int // where the last message begins
}

func (w *writer) add(command byte, attributes ...[]byte) {
	w.last = len(w.batch)
	w.seq++
	length := unix.NLMSG_HDRLEN + 4
	for _, a := range attributes {
		length += len(a)
	}
	w.batch = binary.NativeEndian.AppendUint32(w.batch, uint32(length))
	w.batch = binary.NativeEndian.AppendUint16(w.batch, w.family)
	w.batch = binary.NativeEndian.AppendUint16(w.batch, unix.NLM_F_REQUEST)
	w.batch = binary.NativeEndian.AppendUint32(w.batch, w.seq)
	w.batch = append(w.batch, 0, 0, 0, 0, command, 1, 0, 0)
	for _, a := range attributes {
		w.batch = append(w.batch, a...)
	}
}

func (w *writer) flush() error {
	binary.NativeEndian.PutUint16(w.batch[w.last+6:], unix.NLM_F_REQUEST|unix.NLM_F_ACK)
	if err := unix.Sendto(w.fd, w.batch, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	w.batch = w.batch[:0]
	answer := make([]byte, 64<<10)
	n, _, err := unix.Recvfrom(w.fd, answer, 0)
	if err != nil {
		return err
	}
	if n < unix.NLMSG_HDRLEN+4 {
		return errors.New("short answer of the kernel")
	}
	if code := int32(binary.NativeEndian.Uint32(answer[unix.NLMSG_HDRLEN:])); code != 0 {
		return fmt.Errorf("message %d: %w", binary.NativeEndian.Uint32(answer[8:]), unix.Errno(-code))
	}
	return nil
}

// service is the attribute that names a virtual server, and what a new one is.
func service(s int, whole bool) []byte {
	parts := [][]byte{
		attribute(1, binary.NativeEndian.AppendUint16(nil, unix.AF_INET)),
		attribute(2, binary.NativeEndian.AppendUint16(nil, unix.IPPROTO_TCP)),
		attribute(3, address(vip(s))),
		attribute(4, binary.BigEndian.AppendUint16(nil, servicePort)),
	}
	if whole {
		parts = append(parts,
			attribute(6, []byte("rr\x00")),
			attribute(7, []byte{0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff}), // no flags
			attribute(8, make([]byte, 4)),                            // no timeout
			attribute(9, []byte{0xff, 0xff, 0xff, 0xff}),
		)
	}
	return attribute(1|unix.NLA_F_NESTED, parts...)
}

// destination is the attribute that is a real server of weight 1 with masquerading.
func destination(a netip.Addr) []byte {
	return attribute(2|unix.NLA_F_NESTED,
		attribute(1, address(a)),
		attribute(2, binary.BigEndian.AppendUint16(nil, targetPort)),
		attribute(3, make([]byte, 4)),
		attribute(4, binary.NativeEndian.AppendUint32(nil, 1)),
		attribute(5, make([]byte, 4)),
		attribute(6, make([]byte, 4)),
		attribute(11, binary.NativeEndian.AppendUint16(nil, unix.AF_INET)),
	)
}

// address is a union nf_inet_addr.
func address(a netip.Addr) []byte { return append(a.AsSlice(), make([]byte, 12)...) }

func attribute(kind uint16, parts ...[]byte) []byte {
	length := 4
	for _, p := range parts {
		length += len(p)
	}
	b := binary.NativeEndian.AppendUint16(nil, uint16(length))
	b = binary.NativeEndian.AppendUint16(b, kind)
	for _, p := range parts {
		b = append(b, p...)
	}
	return append(b, make([]byte, (4-length%4)%4)...)
}
