package bfd

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"os/user"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The lab: three network namespaces in a row, agent - near - far. The monitor runs in the first, routers in the others, which forward.
// The monitor, and who sends what he should not, are this test binary, started again: a namespace belongs to a whole process.

// patience is how long the tests wait for what takes a second or two on an idle machine.
const patience = 60 * time.Second

const (
	monitorEnv = "LONGSHORE_TEST_BFD_MONITOR" // be a Monitor that reads []Session a line and writes []Status a line
	sendEnv    = "LONGSHORE_TEST_BFD_SEND"    // send one datagram, as JSON
)

func TestMain(m *testing.M) {
	var err error
	switch {
	case os.Getenv(monitorEnv) != "":
		err = monitor(os.Stdin, os.Stdout)
	case os.Getenv(sendEnv) != "":
		err = sendDatagram(os.Getenv(sendEnv))
	default:
		os.Exit(m.Run())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// monitor runs a Monitor until in ends. It writes how the sessions are when they change, and several times a second.
func monitor(in io.Reader, out io.Writer) error {
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer cancel()
	changed := make(chan struct{}, 1)
	m := New(slog.New(slog.NewTextHandler(os.Stderr, nil)), func() {
		select {
		case changed <- struct{}{}:
		default:
		}
	})
	go func() {
		for d := json.NewDecoder(in); ; {
			var sessions []Session
			if d.Decode(&sessions) != nil {
				cancel()
				return
			}
			m.Set(sessions)
		}
	}()
	go func() {
		for e := json.NewEncoder(out); ; {
			if e.Encode(m.Sessions()) != nil {
				return
			}
			select {
			case <-changed:
			case <-time.After(100 * time.Millisecond):
			}
		}
	}()
	return m.Run(ctx)
}

// datagram is what somebody sends.
type datagram struct {
	From, To netip.AddrPort
	TTL      int
	Payloads [][]byte
}

func sendDatagram(text string) error {
	var d datagram
	if err := json.Unmarshal([]byte(text), &d); err != nil {
		return err
	}
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		return with(c, func(fd int) error {
			if d.To.Addr().Is6() {
				return unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS, d.TTL)
			}
			return unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_TTL, d.TTL)
		})
	}}
	conn, err := config.ListenPacket(context.Background(), "udp", d.From.String())
	if err != nil {
		return err
	}
	for _, p := range d.Payloads {
		if _, err := conn.WriteTo(p, net.UDPAddrFromAddrPort(d.To)); err != nil {
			return err
		}
	}
	return nil
}

type lab struct {
	t    *testing.T
	name string
	dir  string
}

var labs int

// Addresses in the lab: the agent is .1 (::1) of network 1, near is .2 there and .1 of network 2, far is .2 of network 2.
var (
	agent4, near4, far4 = netip.MustParseAddr("10.98.1.1"), netip.MustParseAddr("10.98.1.2"), netip.MustParseAddr("10.98.2.2")
	agent6, near6, far6 = netip.MustParseAddr("fd98:1::1"), netip.MustParseAddr("fd98:1::2"), netip.MustParseAddr("fd98:2::2")
)

func newLab(t *testing.T) *lab {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test makes network namespaces and must run as root")
	}
	for _, program := range []string{"ip", "nft", "vtysh", "/usr/lib/frr/bfdd", "bird", "birdc"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Fatalf("this test needs the Debian packages iproute2, nftables, frr and bird2: %v", err)
		}
	}
	// Not t.TempDir: its long names do not fit into the address of a Unix socket.
	dir, err := os.MkdirTemp("", "bfd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	labs++
	l := &lab{t: t, name: fmt.Sprintf("lsbfd%d-%d", os.Getpid(), labs), dir: dir}
	for _, of := range []string{"agent", "near", "far"} {
		run(t, "ip", "netns", "add", l.ns(of))
		t.Cleanup(func() { run(t, "ip", "netns", "del", l.ns(of)) })
		l.must(of, "ip link set lo up")
		l.must(of, "sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 net.ipv6.conf.default.accept_dad=0")
	}
	for n, ends := range map[int][2]string{1: {"agent", "near"}, 2: {"near", "far"}} {
		run(t, "ip", "-n", l.ns(ends[0]), "link", "add", "right", "type", "veth", "peer", "name", "left", "netns", l.ns(ends[1]))
		for host, link := range map[int]string{1: "right", 2: "left"} {
			of := ends[host-1]
			l.must(of, fmt.Sprintf("ip addr add 10.98.%d.%d/24 dev %s", n, host, link))
			l.must(of, fmt.Sprintf("ip addr add fd98:%d::%d/64 dev %s nodad", n, host, link))
			l.must(of, fmt.Sprintf("ip link set %s up", link))
			l.must(of, fmt.Sprintf("ip addr add fe80::%d/64 dev %s nodad", host, link))
		}
	}
	l.must("agent", "ip route add 10.98.2.0/24 via 10.98.1.2")
	l.must("agent", "ip route add fd98:2::/64 via fd98:1::2")
	l.must("far", "ip route add 10.98.1.0/24 via 10.98.2.1")
	l.must("far", "ip route add fd98:1::/64 via fd98:2::1")
	return l
}

func (l *lab) ns(of string) string { return l.name + "-" + of }

// must runs a command line, split at spaces, in a namespace.
func (l *lab) must(of, line string) {
	l.t.Helper()
	run(l.t, append([]string{"ip", "netns", "exec", l.ns(of)}, strings.Fields(line)...)...)
}

// cut has every packet from and to the namespace of the agent dropped, until mend.
func (l *lab) cut() {
	l.t.Helper()
	l.must("agent", "nft add table inet cut")
	for _, hook := range []string{"input", "output"} {
		l.must("agent", fmt.Sprintf("nft add chain inet cut %s { type filter hook %s priority 0 ; policy drop ; }", hook, hook))
	}
}

func (l *lab) mend() {
	l.t.Helper()
	l.must("agent", "nft delete table inet cut")
}

// send has somebody in a namespace send datagrams, and returns when they are sent.
func (l *lab) send(of string, d datagram) {
	l.t.Helper()
	text, err := json.Marshal(d)
	if err != nil {
		l.t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		l.t.Fatal(err)
	}
	cmd := exec.Command("ip", "netns", "exec", l.ns(of), self)
	cmd.Env = append(os.Environ(), sendEnv+"="+string(text))
	if out, err := cmd.CombinedOutput(); err != nil {
		l.t.Fatalf("send %s: %v: %s", text, err, out)
	}
}

// agent is a Monitor in another process.
type agent struct {
	t       *testing.T
	cmd     *exec.Cmd
	in      io.WriteCloser
	read    chan struct{} // closed when its output has ended
	stopped bool

	mu       sync.Mutex
	sessions map[netip.Addr]Status
}

func (l *lab) agent() *agent {
	l.t.Helper()
	self, err := os.Executable()
	if err != nil {
		l.t.Fatal(err)
	}
	a := &agent{t: l.t, cmd: exec.Command("ip", "netns", "exec", l.ns("agent"), self), read: make(chan struct{}), sessions: map[netip.Addr]Status{}}
	a.cmd.Env = append(os.Environ(), monitorEnv+"=1")
	var log bytes.Buffer
	a.cmd.Stderr = &log
	out, err := a.cmd.StdoutPipe()
	if err != nil {
		l.t.Fatal(err)
	}
	if a.in, err = a.cmd.StdinPipe(); err != nil {
		l.t.Fatal(err)
	}
	if err := a.cmd.Start(); err != nil {
		l.t.Fatal(err)
	}
	go func() {
		defer close(a.read)
		for lines := bufio.NewScanner(out); lines.Scan(); {
			var sessions []Status
			if err := json.Unmarshal(lines.Bytes(), &sessions); err != nil {
				a.t.Errorf("the monitor wrote %q: %v", lines.Text(), err)
				return
			}
			a.mu.Lock()
			clear(a.sessions)
			for _, s := range sessions {
				a.sessions[s.Peer] = s
			}
			a.mu.Unlock()
		}
	}()
	l.t.Cleanup(func() {
		a.stop()
		if l.t.Failed() {
			l.t.Logf("monitor's log:\n%s", &log)
		}
	})
	return a
}

func (a *agent) set(sessions ...Session) {
	a.t.Helper()
	if err := json.NewEncoder(a.in).Encode(sessions); err != nil {
		a.t.Fatalf("set the sessions: %v", err)
	}
}

func (a *agent) session(peer netip.Addr) Status {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.sessions[peer]
}

// wait waits until the session with a peer is as it should be.
func (a *agent) wait(peer netip.Addr, what string, good func(Status) bool) Status {
	a.t.Helper()
	waitFor(a.t, fmt.Sprintf("session with %v to be %s", peer, what), func() error {
		if s := a.session(peer); s.Peer != peer || !good(s) {
			return fmt.Errorf("it is %+v", s)
		}
		return nil
	})
	return a.session(peer)
}

func (a *agent) waitState(peer netip.Addr, state State) Status {
	a.t.Helper()
	return a.wait(peer, state.String(), func(s Status) bool { return s.State == state })
}

// stop ends Run and waits for the process.
func (a *agent) stop() {
	a.t.Helper()
	if a.stopped {
		return
	}
	a.stopped = true
	a.in.Close()
	<-a.read
	if err := a.cmd.Wait(); err != nil {
		a.t.Errorf("monitor ended: %v", err)
	}
}

// daemon runs a program in a namespace until the test ends.
func (l *lab) daemon(of string, argv ...string) *exec.Cmd {
	l.t.Helper()
	var log bytes.Buffer
	cmd := exec.Command("ip", append([]string{"netns", "exec", l.ns(of)}, argv...)...)
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if l.t.Failed() {
			l.t.Logf("%s in %s:\n%s", argv[0], of, &log)
		}
	})
	return cmd
}

// router is what stands at the other end of a session.
type router interface {
	// state is the session with the peer as the router has it, in the router's words, which tell up and down apart.
	state(peer netip.Addr) (string, error)
}

// What routers ask for, beside our own 100 ms, 100 ms and 3.
const (
	routerTransmit   = 150 * time.Millisecond
	routerReceive    = 200 * time.Millisecond
	routerMultiplier = 4
)

// neighbor is us, as a router's configuration has it.
type neighbor struct {
	address, local netip.Addr
	multiHop       bool
}

type frr struct {
	lab *lab
	of  string
}

// frr starts FRR's zebra and bfdd.
func (l *lab) frr(of string, neighbors ...neighbor) frr {
	l.t.Helper()
	dir := filepath.Join(l.dir, of)
	l.write(of, "bfdd.conf", "")
	l.write(of, "zebra.conf", "")
	start := func(daemon string, more ...string) {
		l.daemon(of, append([]string{"/usr/lib/frr/" + daemon, "--vty_port", "0", "--log", "stdout",
			"--config_file", filepath.Join(dir, daemon+".conf"), "--pid_file", filepath.Join(dir, daemon+".pid"),
			"--vty_socket", dir, "--socket", filepath.Join(dir, "zserv")}, more...)...)
	}
	l.own(of)
	f := frr{l, of}
	start("zebra")
	waitFor(l.t, "zebra to answer", func() error { _, err := f.vtysh("zebra", "show version"); return err })
	start("bfdd", "--bfdctl", filepath.Join(dir, "bfdd.sock"))
	waitFor(l.t, "bfdd to answer", func() error { _, err := f.vtysh("bfdd", "show version"); return err })
	for _, n := range neighbors { // not in its file: it reads that before zebra tells it of the links
		peer := fmt.Sprintf("peer %v", n.address)
		if n.multiHop {
			peer += " multihop"
		}
		peer += fmt.Sprintf(" local-address %v", n.local)
		if n.address.IsLinkLocalUnicast() {
			peer += " interface left"
		}
		if _, err := f.vtysh("bfdd", "configure terminal", "bfd", peer, fmt.Sprintf("transmit-interval %d", routerTransmit.Milliseconds()),
			fmt.Sprintf("receive-interval %d", routerReceive.Milliseconds()), fmt.Sprintf("detect-multiplier %d", routerMultiplier)); err != nil {
			l.t.Fatal(err)
		}
	}
	return f
}

func (l *lab) write(of, name, content string) {
	l.t.Helper()
	if err := os.MkdirAll(filepath.Join(l.dir, of), 0o755); err != nil {
		l.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(l.dir, of, name), []byte(content), 0o644); err != nil {
		l.t.Fatal(err)
	}
}

// own gives a router's files to user frr, which FRR's daemons become.
func (l *lab) own(of string) {
	l.t.Helper()
	frr, err := user.Lookup("frr")
	if err != nil {
		l.t.Fatal(err)
	}
	run(l.t, "chown", "-R", frr.Uid, filepath.Join(l.dir, of))
	if err := os.Chmod(l.dir, 0o755); err != nil {
		l.t.Fatal(err)
	}
}

func (f frr) vtysh(daemon string, commands ...string) ([]byte, error) {
	argv := []string{"netns", "exec", f.lab.ns(f.of), "vtysh", "-d", daemon, "--vty_socket", filepath.Join(f.lab.dir, f.of)}
	for _, c := range commands {
		argv = append(argv, "-c", c)
	}
	out, err := exec.Command("ip", argv...).Output()
	if err != nil {
		return nil, fmt.Errorf("vtysh %q: %w: %s", commands, err, out)
	}
	return out, nil
}

func (f frr) state(peer netip.Addr) (string, error) {
	out, err := f.vtysh("bfdd", "show bfd peers json")
	if err != nil {
		return "", err
	}
	var peers []struct {
		Peer             string
		Status           string
		RemoteDiagnostic string `json:"remote-diagnostic"`
	}
	if err := json.Unmarshal(out, &peers); err != nil {
		return "", fmt.Errorf("FRR's peers: %w: %s", err, out)
	}
	for _, p := range peers {
		if p.Peer == peer.WithZone("").String() {
			return p.Status + ", " + p.RemoteDiagnostic, nil
		}
	}
	return "", fmt.Errorf("FRR does not know %v: %s", peer, out)
}

type bird struct {
	lab *lab
	of  string
}

// bird starts BIRD with protocol bfd.
func (l *lab) bird(of string, neighbors ...neighbor) bird {
	l.t.Helper()
	dir := filepath.Join(l.dir, of)
	timers := fmt.Sprintf("{ min tx interval %d ms; min rx interval %d ms; multiplier %d; }",
		routerTransmit.Milliseconds(), routerReceive.Milliseconds(), routerMultiplier)
	var conf strings.Builder
	fmt.Fprintf(&conf, "router id 10.98.0.9;\nprotocol device {}\nprotocol bfd {\n interface \"*\" %s;\n multihop %s;\n", timers, timers)
	for _, n := range neighbors {
		if n.multiHop {
			fmt.Fprintf(&conf, " neighbor %v local %v multihop on;\n", n.address, n.local)
		} else {
			fmt.Fprintf(&conf, " neighbor %v dev \"left\" local %v;\n", n.address, n.local)
		}
	}
	l.write(of, "bird.conf", conf.String()+"}\n")
	l.daemon(of, "bird", "-f", "-d", "-c", filepath.Join(dir, "bird.conf"), "-s", filepath.Join(dir, "ctl"), "-P", filepath.Join(dir, "pid"))
	b := bird{l, of}
	waitFor(l.t, "bird to answer", func() error { _, err := b.birdc("show status"); return err })
	return b
}

func (b bird) birdc(command string) (string, error) {
	out, err := exec.Command("birdc", "-s", filepath.Join(b.lab.dir, b.of, "ctl"), command).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("birdc %s: %w: %s", command, err, out)
	}
	return string(out), nil
}

func (b bird) state(peer netip.Addr) (string, error) {
	out, err := b.birdc("show bfd sessions")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); len(f) > 2 && f[0] == peer.WithZone("").String() {
			return strings.ToLower(f[2]), nil
		}
	}
	return "", fmt.Errorf("BIRD does not know %v: %s", peer, out)
}

// waitRouter waits until the router's words for its session with a peer have this in them.
func waitRouter(t *testing.T, r router, peer netip.Addr, part string) {
	t.Helper()
	waitFor(t, fmt.Sprintf("the router's session with %v to be %q", peer, part), func() error {
		state, err := r.state(peer)
		if err == nil && !strings.Contains(state, part) {
			err = fmt.Errorf("it is %q", state)
		}
		return err
	})
}

func run(t *testing.T, argv ...string) {
	t.Helper()
	if out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", strings.Join(argv, " "), err, out)
	}
}

// waitFor tries until what is expected has come, or patience ends.
func waitFor(t *testing.T, what string, try func() error) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := try()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("waiting for %s: %v", what, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}
