package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Package net knows no SCTP, but a one-to-one SCTP socket (RFC 6458, 4) is used like one of TCP, and net takes it for
// that. Every socket has exactly one address: SCTP tells its peer all it has, and those in the payload are not translated.

// serveSCTP serves as serveTCP does, at every address of the host. The kernel loads its module sctp for that.
func serveSCTP(ctx context.Context, name, port string) error {
	addresses, err := net.InterfaceAddrs()
	if err != nil {
		return err
	}
	done := make(chan error)
	serving := 0
	for _, a := range addresses {
		prefix, err := netip.ParsePrefix(a.String())
		if err != nil {
			return err
		}
		if addr := prefix.Addr(); !addr.IsLoopback() && !addr.IsLinkLocalUnicast() {
			at, err := netip.ParseAddrPort(net.JoinHostPort(addr.String(), port))
			if err != nil {
				return err
			}
			listener, err := listenSCTP(at)
			if err != nil {
				return fmt.Errorf("listen at %s/sctp: %w", at, err)
			}
			serving++
			go func() { done <- serveConnections(ctx, name, listener) }()
		}
	}
	var errs []error
	for range serving {
		errs = append(errs, <-done)
	}
	return errors.Join(errs...)
}

func listenSCTP(at netip.AddrPort) (net.Listener, error) {
	file, err := sctpSocket(at)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	if err := unix.Listen(int(file.Fd()), 128); err != nil {
		return nil, err
	}
	return net.FileListener(file)
}

// dialSCTP connects from an address of the host that this thread is in.
func dialSCTP(ctx context.Context, from netip.Addr, to netip.AddrPort) (net.Conn, error) {
	file, err := sctpSocket(netip.AddrPortFrom(from, 0))
	if err != nil {
		return nil, err
	}
	defer file.Close()
	if deadline, ok := ctx.Deadline(); ok {
		wait := unix.NsecToTimeval(max(time.Until(deadline), time.Millisecond).Nanoseconds())
		if err := unix.SetsockoptTimeval(int(file.Fd()), unix.SOL_SOCKET, unix.SO_SNDTIMEO, &wait); err != nil {
			return nil, err
		}
	}
	if err := unix.Connect(int(file.Fd()), sockaddr(to)); errors.Is(err, unix.EINPROGRESS) { // the time is over
		return nil, context.DeadlineExceeded
	} else if err != nil {
		return nil, err
	}
	return net.FileConn(file)
}

// sctpSocket is a blocking socket with one address.
func sctpSocket(at netip.AddrPort) (*os.File, error) {
	fd, err := unix.Socket(family(at.Addr()), unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_SCTP)
	if err != nil {
		return nil, err
	}
	file := os.NewFile(uintptr(fd), "sctp")
	if err := unix.Bind(fd, sockaddr(at)); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return file, nil
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is6() {
		return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
	}
	return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
}
