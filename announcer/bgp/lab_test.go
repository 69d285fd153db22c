package bgp

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// The lab: the speaker and each peer run in a network namespace of their own, joined by veths. The speaker is this test binary,
// started again: gobgp dials from any thread, so a whole process has to be in the namespace.

// patience is how long the tests wait for what takes seconds on an idle machine.
const patience = 60 * time.Second

// speakerEnv makes the test binary a speaker that reads a Config a line and writes its Sessions a line.
const speakerEnv = "LONGSHORE_TEST_BGP_SPEAKER"

func TestMain(m *testing.M) {
	if os.Getenv(deafEnv) != "" {
		fmt.Fprintln(os.Stderr, deaf())
		return
	}
	if os.Getenv(speakerEnv) != "" {
		if err := speak(os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// speak runs a Speaker until in ends or the process is told to stop.
func speak(in io.Reader, out io.Writer) error {
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer cancel()
	changed := make(chan struct{}, 1)
	s := New(slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug})), func() {
		select {
		case changed <- struct{}{}:
		default:
		}
	})
	go func() {
		for d := json.NewDecoder(in); ; {
			var c Config
			if d.Decode(&c) != nil {
				cancel()
				return
			}
			s.Set(c)
		}
	}()
	go func() {
		for e := json.NewEncoder(out); ; <-changed {
			if e.Encode(s.Sessions()) != nil {
				return
			}
		}
	}()
	return s.Run(ctx)
}

// speaker is a Speaker in another process.
type speaker struct {
	t       *testing.T
	cmd     *exec.Cmd
	in      io.WriteCloser
	stopped bool

	mu       sync.Mutex
	sessions map[string]Session
}

func (l *lab) speaker(t *testing.T) *speaker {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	s := &speaker{t: t, cmd: exec.Command("ip", "netns", "exec", l.ns("speaker"), self), sessions: map[string]Session{}}
	s.cmd.Env = append(os.Environ(), speakerEnv+"=1")
	var log bytes.Buffer
	s.cmd.Stderr = &log
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if s.in, err = s.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	read := make(chan struct{})
	go func() {
		defer close(read)
		for lines := bufio.NewScanner(out); lines.Scan(); {
			var sessions []Session
			if err := json.Unmarshal(lines.Bytes(), &sessions); err != nil {
				t.Errorf("speaker wrote %q: %v", lines.Text(), err)
				return
			}
			s.mu.Lock()
			clear(s.sessions)
			for _, session := range sessions {
				s.sessions[session.Peer] = session
			}
			s.mu.Unlock()
		}
	}()
	t.Cleanup(func() {
		s.stop()
		<-read
		if t.Failed() {
			t.Logf("speaker's log:\n%s", &log)
		}
	})
	return s
}

func (s *speaker) set(c Config) {
	s.t.Helper()
	if err := json.NewEncoder(s.in).Encode(c); err != nil {
		s.t.Fatalf("set the speaker's configuration: %v", err)
	}
}

func (s *speaker) session(peer string) Session {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.sessions[peer]
}

// stop ends Run and waits for the process.
func (s *speaker) stop() {
	s.t.Helper()
	if s.stopped {
		return
	}
	s.stopped = true
	s.in.Close()
	if err := s.cmd.Wait(); err != nil {
		s.t.Errorf("speaker ended: %v", err)
	}
}

func (s *speaker) waitState(peer, state string) Session {
	s.t.Helper()
	waitFor(s.t, fmt.Sprintf("session %s to be %s", peer, state), func() error {
		if got := s.session(peer); got.State != state {
			return fmt.Errorf("session is %+v", got)
		}
		return nil
	})
	return s.session(peer)
}

func (s *speaker) waitReason(peer, part string) {
	s.t.Helper()
	waitFor(s.t, fmt.Sprintf("session %s to be down because of %q", peer, part), func() error {
		if got := s.session(peer); got.State == "established" || !strings.Contains(got.Reason, part) {
			return fmt.Errorf("session is %+v", got)
		}
		return nil
	})
}

// lab has the speaker's namespace and one for each peer. Peer number n is at 10.99.n.2 and fd99:n::2, the speaker at
// 10.99.n.1 and fd99:n::1.
type lab struct {
	t    *testing.T
	name string
	dir  string
}

var labs int

func newLab(t *testing.T, peers ...string) *lab {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test makes network namespaces and must run as root")
	}
	for _, program := range []string{"ip", "vtysh", "/usr/lib/frr/bgpd", "bird", "birdc"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Fatalf("this test needs the Debian packages iproute2, frr and bird2: %v", err)
		}
	}
	// Not t.TempDir: its long names do not fit into the address of a Unix socket.
	dir, err := os.MkdirTemp("", "bgp")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	labs++
	l := &lab{t: t, name: fmt.Sprintf("lsbgp%d-%d", os.Getpid(), labs), dir: dir}
	l.addNamespace("speaker")
	for i, peer := range peers {
		n := i + 1
		l.addNamespace(peer)
		link := fmt.Sprintf("to-%s", peer)
		run(t, "ip", "-n", l.ns("speaker"), "link", "add", link, "type", "veth", "peer", "name", "uplink", "netns", l.ns(peer))
		for end, ns := range map[string]string{link: l.ns("speaker"), "uplink": l.ns(peer)} {
			host := 2
			if end == link {
				host = 1
			}
			run(t, "ip", "-n", ns, "addr", "add", fmt.Sprintf("10.99.%d.%d/24", n, host), "dev", end)
			run(t, "ip", "-n", ns, "addr", "add", fmt.Sprintf("fd99:%d::%d/64", n, host), "dev", end, "nodad")
			run(t, "ip", "-n", ns, "link", "set", end, "up")
		}
	}
	return l
}

func (l *lab) ns(of string) string { return l.name + "-" + of }

func (l *lab) addNamespace(of string) {
	l.t.Helper()
	run(l.t, "ip", "netns", "add", l.ns(of))
	l.t.Cleanup(func() { run(l.t, "ip", "netns", "del", l.ns(of)) })
	run(l.t, "ip", "-n", l.ns(of), "link", "set", "lo", "up")
}

// daemon runs a program in the namespace of a peer until it is stopped or the test ends.
type daemon struct {
	t    *testing.T
	cmd  *exec.Cmd
	log  bytes.Buffer
	done bool
}

func (l *lab) daemon(of string, argv ...string) *daemon {
	l.t.Helper()
	d := &daemon{t: l.t, cmd: exec.Command("ip", append([]string{"netns", "exec", l.ns(of)}, argv...)...)}
	d.cmd.Stdout, d.cmd.Stderr = &d.log, &d.log
	if err := d.cmd.Start(); err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() {
		d.kill()
		if l.t.Failed() {
			l.t.Logf("%s in %s:\n%s", argv[0], of, &d.log)
		}
	})
	return d
}

// kill ends the daemon at once.
func (d *daemon) kill() {
	if !d.done {
		d.done = true
		d.cmd.Process.Kill()
		d.cmd.Wait()
	}
}

// frr is FRR's bgpd, without zebra: its table is all that is asked of it.
type frr struct {
	*daemon
	lab  *lab
	name string
}

// unnumberedFRR starts zebra, which advertises itself as a router and hears who else does, and then bgpd as frr does.
func (l *lab) unnumberedFRR(name string, asn uint32, lines ...string) *frr {
	l.t.Helper()
	dir := filepath.Join(l.dir, name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		l.t.Fatal(err)
	}
	// Unlike bgpd it must become user frr, which is to read and write here.
	run(l.t, "chmod", "711", l.dir)
	run(l.t, "chown", "frr:frr", dir)
	conf := filepath.Join(dir, "zebra.conf")
	if err := os.WriteFile(conf, nil, 0o644); err != nil {
		l.t.Fatal(err)
	}
	l.daemon(name, "/usr/lib/frr/zebra", "--vty_port", "0", "--log", "stdout", "--config_file", conf,
		"--pid_file", filepath.Join(dir, "zebra.pid"), "--vty_socket", dir, "--socket", filepath.Join(dir, "zserv"))
	waitFor(l.t, "zebra to listen", func() error { _, err := os.Stat(filepath.Join(dir, "zserv")); return err })
	return l.startFRR(name, asn, nil, lines...)
}

// frr starts bgpd with these lines inside "router bgp".
func (l *lab) frr(name string, asn uint32, lines ...string) *frr {
	l.t.Helper()
	return l.startFRR(name, asn, []string{"--no_zebra"}, lines...)
}

func (l *lab) startFRR(name string, asn uint32, flags []string, lines ...string) *frr {
	l.t.Helper()
	dir := filepath.Join(l.dir, name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		l.t.Fatal(err)
	}
	conf := fmt.Sprintf("router bgp %d\n bgp router-id 10.99.99.98\n no bgp ebgp-requires-policy\n no bgp network import-check\n %s\n", asn, strings.Join(lines, "\n "))
	if err := os.WriteFile(filepath.Join(dir, "bgpd.conf"), []byte(conf), 0o644); err != nil {
		l.t.Fatal(err)
	}
	d := l.daemon(name, append([]string{"/usr/lib/frr/bgpd", "--skip_runas", "--vty_port", "0", "--log", "stdout", "--log-level", "debugging",
		"--config_file", filepath.Join(dir, "bgpd.conf"), "--pid_file", filepath.Join(dir, "pid"),
		"--vty_socket", dir, "--socket", filepath.Join(dir, "zserv")}, flags...)...)
	f := &frr{daemon: d, lab: l, name: name}
	waitFor(l.t, "bgpd to answer", func() error { _, err := f.vtysh("show version"); return err })
	return f
}

func (f *frr) vtysh(commands ...string) ([]byte, error) {
	argv := []string{"netns", "exec", f.lab.ns(f.name), "vtysh", "-d", "bgpd", "--vty_socket", filepath.Join(f.lab.dir, f.name)}
	for _, c := range commands {
		argv = append(argv, "-c", c)
	}
	var errs bytes.Buffer
	cmd := exec.Command("ip", argv...)
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("vtysh %q: %w: %s%s", commands, err, out, &errs)
	}
	return out, nil
}

// route is a path as a peer has it.
type route struct {
	NextHop     string // the global one; if there is none, link-local
	Path        string // AS path
	LocalPref   int
	MED         int
	Communities string
	Large       string
}

// routes returns what FRR has from the speaker.
func (f *frr) routes() (map[string]route, error) {
	got := map[string]route{}
	for _, family := range []string{"ipv4", "ipv6"} {
		out, err := f.vtysh("show bgp " + family + " unicast json")
		if err != nil {
			return nil, err
		}
		var table struct{ Routes map[string]json.RawMessage }
		if err := json.Unmarshal(out, &table); err != nil {
			return nil, fmt.Errorf("FRR's table: %w: %s", err, out)
		}
		for prefix := range table.Routes {
			out, err := f.vtysh("show bgp " + family + " unicast " + prefix + " json")
			if err != nil {
				return nil, err
			}
			var detail struct {
				Paths []struct {
					ASPath         struct{ String string }
					LocPrf         int
					Metric         int
					Community      struct{ String string }
					LargeCommunity struct{ String string }
					Nexthops       []struct{ IP, Scope string }
				}
			}
			if err := json.Unmarshal(out, &detail); err != nil {
				return nil, fmt.Errorf("FRR's path to %s: %w: %s", prefix, err, out)
			}
			for _, p := range detail.Paths {
				r := route{Path: p.ASPath.String, LocalPref: p.LocPrf, MED: p.Metric, Communities: p.Community.String, Large: p.LargeCommunity.String}
				for _, hop := range p.Nexthops {
					if hop.Scope != "link-local" || r.NextHop == "" {
						r.NextHop = hop.IP
					}
				}
				got[prefix] = r
			}
		}
	}
	return got, nil
}

// bird is BIRD with one BGP protocol.
type bird struct {
	*daemon
	lab  *lab
	name string
}

// bird starts BIRD with these lines inside "protocol bgp speaker" and, if static is not empty, a static protocol of these lines.
func (l *lab) bird(name string, lines []string, static ...string) *bird {
	l.t.Helper()
	dir := filepath.Join(l.dir, name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		l.t.Fatal(err)
	}
	conf := "router id 10.99.99.99;\nprotocol device {}\nprotocol static { ipv4; " + strings.Join(static, " ") + " }\n" +
		"protocol bgp speaker {\n " + strings.Join(lines, "\n ") + "\n}\n"
	if err := os.WriteFile(filepath.Join(dir, "bird.conf"), []byte(conf), 0o644); err != nil {
		l.t.Fatal(err)
	}
	d := l.daemon(name, "bird", "-f", "-d", "-c", filepath.Join(dir, "bird.conf"), "-s", filepath.Join(dir, "ctl"), "-P", filepath.Join(dir, "pid"))
	b := &bird{daemon: d, lab: l, name: name}
	waitFor(l.t, "bird to answer", func() error { _, err := b.birdc("show status"); return err })
	return b
}

func (b *bird) birdc(command string) (string, error) {
	out, err := exec.Command("birdc", "-s", filepath.Join(b.lab.dir, b.name, "ctl"), command).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("birdc %s: %w: %s", command, err, out)
	}
	return string(out), nil
}

// routes returns what BIRD has from the speaker.
func (b *bird) routes() (map[string]route, error) {
	out, err := b.birdc("show route protocol speaker all")
	if err != nil {
		return nil, err
	}
	got := map[string]route{}
	var prefix string
	var r route
	for line := range strings.Lines(out) {
		fields := strings.Fields(line)
		if len(fields) == 0 {
			continue
		}
		if p, err := netip.ParsePrefix(fields[0]); err == nil {
			prefix, r = p.String(), route{}
		}
		name, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
		switch name {
		case "BGP.as_path":
			r.Path = value
		case "BGP.next_hop":
			r.NextHop, _, _ = strings.Cut(value, " ")
		case "BGP.local_pref":
			if _, err := fmt.Sscan(value, &r.LocalPref); err != nil {
				return nil, fmt.Errorf("local preference %q of %s: %w", value, prefix, err)
			}
		case "BGP.med":
			if _, err := fmt.Sscan(value, &r.MED); err != nil {
				return nil, fmt.Errorf("MED %q of %s: %w", value, prefix, err)
			}
		case "BGP.community":
			r.Communities = value
		case "BGP.large_community":
			r.Large = value
		}
		if prefix != "" {
			got[prefix] = r
		}
	}
	return got, nil
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
		time.Sleep(100 * time.Millisecond)
	}
}
