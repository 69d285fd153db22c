package lab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// serveEnv makes this program the built-in server; its value is the server's name and the ports: "web-1 80/TCP 53/UDP 9/SCTP".
const serveEnv = "LONGSHORE_LAB_SERVE"

// Main makes this program the pods' built-in server if the lab started it as one; then it does not return. Call it
// first in main or TestMain.
func Main() {
	spec, ok := os.LookupEnv(serveEnv)
	if !ok {
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	if err := serve(ctx, strings.Fields(spec)); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// Serve starts the built-in server in the host itself, at ports such as 80/TCP; name is what it answers with.
func (h *Host) Serve(name string, ports ...string) (*Process, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	return h.Start(Exec{Name: name, Path: self, Env: []string{serveEnv + "=" + name + " " + strings.Join(ports, " ")}})
}

// serve is the built-in server. Over TCP and SCTP it greets with "NAME saw CLIENT at SERVER" and echoes lines; over UDP it
// answers every packet with the greeting and the packet's text. When ctx ends it takes no new connections and
// returns after the last one is closed.
func serve(ctx context.Context, spec []string) error {
	if len(spec) < 2 {
		return fmt.Errorf("%s is %q, must be a name and at least one port like 80/TCP", serveEnv, strings.Join(spec, " "))
	}
	group, ctx := errgroup.WithContext(ctx)
	for _, s := range spec[1:] {
		port, protocol, _ := strings.Cut(s, "/")
		switch protocol {
		case "TCP":
			group.Go(func() error { return serveTCP(ctx, spec[0], port) })
		case "UDP":
			group.Go(func() error { return serveUDP(ctx, spec[0], port) })
		case "SCTP":
			group.Go(func() error { return serveSCTP(ctx, spec[0], port) })
		default:
			return fmt.Errorf("%s: port %q: protocol must be TCP, UDP or SCTP", serveEnv, s)
		}
	}
	return group.Wait()
}

func serveTCP(ctx context.Context, name, port string) error {
	listener, err := net.Listen("tcp", ":"+port)
	if err != nil {
		return err
	}
	return serveConnections(ctx, name, listener)
}

func serveConnections(ctx context.Context, name string, listener net.Listener) error {
	stop := context.AfterFunc(ctx, func() { listener.Close() })
	defer stop()
	var open sync.WaitGroup
	defer open.Wait()
	for {
		conn, err := listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return err
		}
		open.Go(func() { echo(conn, name) })
	}
}

func echo(conn net.Conn, name string) {
	defer conn.Close()
	fmt.Fprintln(conn, greeting(name, addrPort(conn.RemoteAddr()), addrPort(conn.LocalAddr())))
	_, _ = io.Copy(conn, bufio.NewReader(conn)) // ends when the client does
}

func greeting(name string, saw, at netip.AddrPort) string {
	return fmt.Sprintf("%s saw %s at %s", name, saw, at)
}

// addrPort is an address of a TCP or UDP socket, an IPv4 one as such.
func addrPort(a net.Addr) netip.AddrPort {
	p := a.(interface{ AddrPort() netip.AddrPort }).AddrPort()
	return netip.AddrPortFrom(p.Addr().Unmap(), p.Port())
}

// serveUDP answers from the address that the packet came to: the socket asks for it (IPV6_RECVPKTINFO, ipv6(7))
// and hands it back with the answer.
func serveUDP(ctx context.Context, name, port string) error {
	address, err := net.ResolveUDPAddr("udp", "[::]:"+port)
	if err != nil {
		return err
	}
	conn, err := net.ListenUDP("udp", address)
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	if err := receivePacketInfo(conn); err != nil {
		return err
	}
	packet, control := make([]byte, 64<<10), make([]byte, 512)
	for {
		n, c, _, client, err := conn.ReadMsgUDPAddrPort(packet, control)
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			continue // an answer of before was refused
		}
		at, err := destination(control[:c])
		if err != nil {
			return err
		}
		saw := netip.AddrPortFrom(client.Addr().Unmap(), client.Port())
		answer := greeting(name, saw, netip.AddrPortFrom(at, uint16(address.Port))) + "\n" + string(packet[:n])
		_, _, _ = conn.WriteMsgUDPAddrPort([]byte(answer), control[:c], client) // UDP promises nothing
	}
}

func receivePacketInfo(conn *net.UDPConn) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var set error
	err = raw.Control(func(fd uintptr) {
		set = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1)
	})
	return errors.Join(err, set)
}

// destination is the address a packet was sent to, from its control message (struct in6_pktinfo).
func destination(control []byte) (netip.Addr, error) {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return netip.Addr{}, err
	}
	for _, m := range messages {
		if m.Header.Level == unix.IPPROTO_IPV6 && m.Header.Type == unix.IPV6_PKTINFO && len(m.Data) >= 16 {
			return netip.AddrFrom16([16]byte(m.Data[:16])).Unmap(), nil
		}
	}
	return netip.Addr{}, errors.New("a UDP packet came without its destination")
}
