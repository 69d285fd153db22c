package bfd

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"syscall"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// Where control packets go (RFC 5881 section 4, RFC 5883 section 5), and where they come from.
const (
	singleHopPort = 3784
	multiHopPort  = 4784

	firstSourcePort = 49152
	sourcePorts     = 65536 - firstSourcePort
)

const (
	maxTTL           = 255
	internetControl  = 0xc0    // IP precedence of routing protocols
	accept           = 1 << 16 // more than any packet has
	networkHeader    = 1<<32 - 0x100000
	maxInstructions  = 4096 // BPF_MAXINSNS, include/uapi/linux/bpf_common.h
	maxControlPacket = 1024
)

// kind is what one listening socket is for.
type kind struct{ ipv6, multiHop bool }

func kindOf(s Session) kind { return kind{s.Peer.Is6(), s.MultiHop} }

func (k kind) network() string {
	if k.ipv6 {
		return "udp6"
	}
	return "udp4"
}

func (k kind) port() uint16 {
	if k.multiHop {
		return multiHopPort
	}
	return singleHopPort
}

func (k kind) unspecified() netip.Addr {
	if k.ipv6 {
		return netip.IPv6Unspecified()
	}
	return netip.IPv4Unspecified()
}

// filter is what the kernel does with a packet for a listening socket: it passes on what comes from a peer with at least the TTL, or
// hop limit, that the peer's session wants. The kernel has IP_MINTTL for TCP only; it does nothing for UDP.
func (k kind) filter(sessions []Session) []bpf.Instruction {
	ttl, source := uint32(8), []uint32{12}
	if k.ipv6 {
		ttl, source = 7, []uint32{8, 12, 16, 20}
	}
	load := func(offset uint32, size int) bpf.Instruction {
		return bpf.LoadAbsolute{Off: networkHeader + offset, Size: size}
	}
	var program []bpf.Instruction
	for _, s := range sessions {
		if kindOf(s) != k {
			continue
		}
		peer := s.Peer.AsSlice()
		for i, offset := range source {
			word := uint32(peer[4*i])<<24 | uint32(peer[4*i+1])<<16 | uint32(peer[4*i+2])<<8 | uint32(peer[4*i+3])
			rest := 2*(len(source)-1-i) + 4 // what follows about this peer
			program = append(program, load(offset, 4), bpf.JumpIf{Cond: bpf.JumpEqual, Val: word, SkipFalse: uint8(rest)})
		}
		program = append(program,
			load(ttl, 1),
			bpf.JumpIf{Cond: bpf.JumpGreaterOrEqual, Val: uint32(s.minimumTTL()), SkipFalse: 1},
			bpf.RetConstant{Val: accept},
			bpf.RetConstant{Val: 0},
		)
	}
	return append(program, bpf.RetConstant{Val: 0})
}

// attach makes a program the filter of a socket, at once and whole.
func attach(c syscall.RawConn, program []bpf.Instruction) error {
	if len(program) > maxInstructions {
		return fmt.Errorf("filter of %d instructions for too many peers", len(program))
	}
	raw, err := bpf.Assemble(program)
	if err != nil {
		return fmt.Errorf("filter: %w", err)
	}
	filter := make([]unix.SockFilter, len(raw))
	for i, r := range raw {
		filter[i] = unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
	}
	return with(c, func(fd int) error {
		if err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}); err != nil {
			return fmt.Errorf("attach the filter: %w", err)
		}
		return nil
	})
}

func with(c syscall.RawConn, do func(fd int) error) error {
	var err error
	if failed := c.Control(func(fd uintptr) { err = do(int(fd)) }); failed != nil {
		return failed
	}
	return err
}

// listen opens the socket at which the packets of these sessions arrive.
func (k kind) listen(sessions []Session) (*net.UDPConn, error) {
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error { return attach(c, k.filter(sessions)) }}
	conn, err := config.ListenPacket(context.Background(), k.network(), netip.AddrPortFrom(k.unspecified(), k.port()).String())
	if err != nil {
		return nil, err
	}
	return conn.(*net.UDPConn), nil
}

// dial opens the socket from which one session sends: with a source port of its own, TTL 255, and no ears.
func (k kind) dial(source netip.Addr, taken func(port uint16) bool) (*net.UDPConn, error) {
	if !source.IsValid() {
		source = k.unspecified()
	}
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		if err := attach(c, []bpf.Instruction{bpf.RetConstant{Val: 0}}); err != nil {
			return err
		}
		return with(c, func(fd int) error {
			if k.ipv6 {
				return firstError(
					unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS, maxTTL),
					unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_TCLASS, internetControl),
				)
			}
			return firstError(
				unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_TTL, maxTTL),
				unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_TOS, internetControl),
			)
		})
	}}
	var err error
	for range 32 {
		port := uint16(firstSourcePort + rand.IntN(sourcePorts))
		if taken(port) {
			continue
		}
		var conn net.PacketConn
		if conn, err = config.ListenPacket(context.Background(), k.network(), netip.AddrPortFrom(source, port).String()); err == nil {
			return conn.(*net.UDPConn), nil
		}
	}
	return nil, err
}

func firstError(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}
