package members_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/longshore-lb/longshore/announcer"
	"github.com/longshore-lb/longshore/announcer/members"
)

// childEnv, if set, makes the test binary one agent, "name address peer,peer", that runs until it is killed.
const childEnv = "LONGSHORE_TEST_MEMBER"

// The pace is an agent's own, the grace longer than a test waits while an agent is away.
const (
	pace  = 200 * time.Millisecond
	grace = 6 * time.Second
)

// patience is how long a test waits for what must come.
const patience = 60 * time.Second

func TestMain(m *testing.M) {
	if child := os.Getenv(childEnv); child != "" {
		runChild(strings.Fields(child))
	}
	// memberlist does not wait for a probe that is under way when it is shut down; it ends by its own timeouts.
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("github.com/hashicorp/memberlist.(*Memberlist).probeNode"))
}

func runChild(fields []string) {
	m, err := members.New(members.Config{Node: fields[0], Bind: netip.MustParseAddrPort(fields[1]), ProbeInterval: pace, CrashGrace: grace,
		Log: slog.New(slog.DiscardHandler)})
	if err == nil {
		m.Join([]netip.AddrPort{netip.MustParseAddrPort(fields[2])})
		if len(fields) > 3 {
			m.Tell(says(uint64(len(fields[3]))))
		}
		fmt.Println("running")
		err = m.Run(context.Background())
	}
	fmt.Println(err)
	os.Exit(1)
}

// agent is one running member.
type agent struct {
	*members.Members
	name string
	stop func() // gracefully; returns when Run did
}

func start(t *testing.T, name string, bind netip.AddrPort, key []byte, peers ...netip.AddrPort) agent {
	t.Helper()
	log := slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn})).With("agent", name)
	m, err := members.New(members.Config{Node: name, Bind: bind, Key: key, ProbeInterval: pace, CrashGrace: grace, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	m.Join(peers)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- m.Run(ctx) }()
	stopped := false
	a := agent{Members: m, name: name, stop: func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("%s ended: %v", name, err)
		}
	}}
	t.Cleanup(a.stop)
	return a
}

// sees waits, by Changed alone, until the agent sees exactly these alive, and returns how long it took.
func (a agent) sees(t *testing.T, want ...string) time.Duration {
	t.Helper()
	begin := time.Now()
	deadline := time.After(patience)
	for {
		got := a.Alive()
		if slices.Equal(got, want) {
			return time.Since(begin)
		}
		select {
		case <-a.Changed():
		case <-deadline:
			t.Fatalf("%s sees the wrong agents (-want +got):\n%s", a.name, cmp.Diff(want, got))
		}
	}
}

// says is what an agent may say of itself, with a number of claims.
func says(claims uint64) announcer.Agent {
	a := announcer.Agent{Able: true, Links: []announcer.Link{{Name: "eth0", IPv4: true}}, Claims: map[netip.Addr]uint64{}}
	for i := range claims {
		a.Claims[netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)})] = claims
	}
	return a
}

// hears waits, by Changed alone, until what the agent knows of another one is this.
func (a agent) hears(t *testing.T, name string, want announcer.Agent) {
	t.Helper()
	deadline := time.After(patience)
	for {
		got := a.Agents()[name]
		got.Version = 0
		diff := cmp.Diff(want, got, byValue)
		if diff == "" {
			return
		}
		select {
		case <-a.Changed():
		case <-deadline:
			t.Fatalf("%s knows of %s (-want +got):\n%s", a.name, name, diff)
		}
	}
}

var byValue = cmp.Comparer(func(a, b netip.Addr) bool { return a == b })

// TestTell holds that all agents hear what one says of itself, be it little or much, and the last thing of all.
func TestTell(t *testing.T) {
	at := []netip.AddrPort{endpoint(t, "127.0.0.61"), endpoint(t, "127.0.0.62"), endpoint(t, "127.0.0.63"), endpoint(t, "127.0.0.64")}
	key := []byte("0123456789abcdef")
	a, b := start(t, "a", at[0], key, at...), start(t, "b", at[1], key, at...)
	c := start(t, "c", at[2], key, at...)
	for _, x := range []agent{a, b, c} {
		x.sees(t, "a", "b", "c")
	}
	for _, claims := range []uint64{3, 0, 5000, 1} {
		began := time.Now()
		a.Tell(says(claims))
		for _, x := range []agent{a, b, c} {
			x.hears(t, "a", says(claims))
		}
		if took := time.Since(began); took > 2*time.Second { // it does not come with the exchange each 10 s
			t.Errorf("%d claims were heard after %v", claims, took)
		}
	}
	for i := range uint64(300) {
		a.Tell(says(1000 + i))
	}
	b.Tell(says(2000))
	for _, x := range []agent{a, b, c} {
		x.hears(t, "a", says(1299))
		x.hears(t, "b", says(2000))
	}
	d := start(t, "d", at[3], key, at[2]) // joins by c, which has not said anything
	d.hears(t, "a", says(1299))
	d.hears(t, "b", says(2000))
	d.hears(t, "c", announcer.Agent{})
	began := time.Now()
	a.Tell(says(7))
	d.hears(t, "a", says(7))
	if took := time.Since(began); took > 5*time.Second { // it does not come with the exchange each 10 s
		t.Errorf("d heard after %v", took)
	}
	b.stop()
	a.sees(t, "a", "c", "d")
	if _, ok := a.Agents()["b"]; ok {
		t.Error("what b said has not gone with it")
	}
}

// TestTellAgain holds that an agent that comes back after a crash finds what it said before, and that what it says then counts.
func TestTellAgain(t *testing.T) {
	at := []netip.AddrPort{endpoint(t, "127.0.0.65"), endpoint(t, "127.0.0.66")}
	a := start(t, "a", at[0], nil, at...)
	kill := startChild(t, "b", at[1], at[0], "five!")
	a.hears(t, "b", says(5))
	kill()
	b := start(t, "b", at[1], nil, at[0])
	b.hears(t, "b", says(5))
	a.hears(t, "b", says(5))
	b.Tell(says(1))
	a.hears(t, "b", says(1))
	b.hears(t, "b", says(1))
	b.stop()
	a.sees(t, "a")

	// One that speaks before it has heard of its earlier life.
	kill = startChild(t, "b", at[1], at[0], "five!")
	a.hears(t, "b", says(5))
	kill()
	b = start(t, "b", at[1], nil)
	b.Tell(says(2))
	b.Join(at[:1])
	both := says(5)
	maps.Copy(both.Claims, says(2).Claims)
	a.hears(t, "b", both)
	b.hears(t, "b", both)
	b.Tell(says(2))
	a.hears(t, "b", says(2))
}

// endpoint is a port that is free on an address for both UDP and TCP, and not one that the kernel gives out by itself
// (net.ipv4.ip_local_port_range begins at 32768).
func endpoint(t *testing.T, addr string) netip.AddrPort {
	t.Helper()
	for range 20 {
		found := netip.AddrPortFrom(netip.MustParseAddr(addr), uint16(20000+rand.IntN(10000)))
		l, err := net.Listen("tcp", found.String())
		if err != nil {
			continue
		}
		l.Close()
		u, err := net.ListenPacket("udp", found.String())
		if err == nil {
			u.Close()
			return found
		}
	}
	t.Fatalf("no port of %s is free for UDP and TCP", addr)
	return netip.AddrPort{}
}

func TestMembers(t *testing.T) {
	for _, test := range []struct {
		name  string
		addrs [3]string
		key   []byte
	}{
		{"IPv4", [3]string{"127.0.0.11", "127.0.0.12", "127.0.0.13"}, nil},
		{"IPv4 encrypted", [3]string{"127.0.0.11", "127.0.0.12", "127.0.0.13"}, []byte("0123456789abcdef0123456789abcdef")},
		{"IPv6", [3]string{"::1", "::1", "::1"}, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			var at []netip.AddrPort
			for _, addr := range test.addrs {
				at = append(at, endpoint(t, addr))
			}
			a := start(t, "a", at[0], test.key, at...) // its own address is among them
			b := start(t, "b", at[1], test.key, at[0])
			c := start(t, "c", at[2], test.key, at[0]) // b is found through a
			for _, x := range []agent{a, b, c} {
				x.sees(t, "a", "b", "c")
			}

			began := time.Now()
			c.stop()
			if got := c.Alive(); !slices.Equal(got, []string{"c"}) {
				t.Errorf("c has stopped and sees %v", got)
			}
			a.sees(t, "a", "b")
			b.sees(t, "a", "b")
			if took := time.Since(began); took > grace*3/4 { // what takes a moment would take the grace
				t.Errorf("c took leave and was gone after %v only, as if it had crashed", took)
			}

			c = start(t, "c", at[2], test.key) // it is looked for by a, which knows all addresses
			for _, x := range []agent{a, b, c} {
				x.sees(t, "a", "b", "c")
			}
		})
	}
}

// The tests here do not run in parallel: while one of them starts a process, that has a copy of every open socket for a
// moment, and an address that another test has just let go of is still in use.

// TestKilled kills an agent as a crash does: it says nothing.
func TestKilled(t *testing.T) {
	at := []netip.AddrPort{endpoint(t, "127.0.0.21"), endpoint(t, "127.0.0.22"), endpoint(t, "127.0.0.23")}
	a := start(t, "a", at[0], nil, at...)
	b := start(t, "b", at[1], nil, at...)
	kill := startChild(t, "c", at[2], at[0])
	a.sees(t, "a", "b", "c")
	b.sees(t, "a", "b", "c")

	kill()
	t.Logf("c was killed; a knew %v later, b %v after that", a.sees(t, "a", "b"), b.sees(t, "a", "b"))

	kill = startChild(t, "c", at[2], at[0])
	a.sees(t, "a", "b", "c")
	b.sees(t, "a", "b", "c")
	kill()
	a.sees(t, "a", "b")

	// A node may come back with another address.
	elsewhere := endpoint(t, "127.0.0.24")
	startChild(t, "c", elsewhere, at[0])
	a.sees(t, "a", "b", "c")
}

// TestCrash holds that an agent that crashes and comes back is never missed: its node lives.
func TestCrash(t *testing.T) {
	at := []netip.AddrPort{endpoint(t, "127.0.0.25"), endpoint(t, "127.0.0.26")}
	a := start(t, "a", at[0], nil, at...)
	kill := startChild(t, "b", at[1], at[0])
	a.sees(t, "a", "b")
	kill()
	// Many looks after memberlist takes it for dead, and long before its time is up.
	for deadline := time.Now().Add(grace / 2); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if got := a.Alive(); !slices.Equal(got, []string{"a", "b"}) {
			t.Fatalf("a sees %v after b has crashed", got)
		}
	}
	startChild(t, "b", at[1], at[0])
	for deadline := time.Now().Add(grace * 3 / 2); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if got := a.Alive(); !slices.Equal(got, []string{"a", "b"}) {
			t.Fatalf("a sees %v after b has come back", got)
		}
	}
}

// startChild runs an agent as a process of its own and returns what kills it. It claims an address for each letter of a word.
func startChild(t *testing.T, name string, bind, peer netip.AddrPort, word ...string) (kill func()) {
	t.Helper()
	child := exec.Command(os.Args[0])
	if name == elsewhere {
		child = exec.Command("ip", "netns", "exec", elsewhere, os.Args[0])
	}
	child.Env = append(os.Environ(), fmt.Sprintf("%s=%s %s %s %s", childEnv, name, bind, peer, strings.Join(word, "")))
	out, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(out)
	if line, err := lines.ReadString('\n'); line != "running\n" {
		t.Fatalf("agent %s: %q, %v", name, line, err)
	}
	killed := false
	kill = func() {
		if killed {
			return
		}
		killed = true
		child.Process.Kill()
		rest, _ := io.ReadAll(lines)
		child.Wait()
		if len(rest) > 0 {
			t.Errorf("agent %s ended before it was killed: %s", name, rest)
		}
	}
	t.Cleanup(kill)
	return kill
}

// elsewhere is an agent in a network namespace of that name.
const elsewhere = "longshore-members"

// TestNodeDies lets a node fall silent, its kernel too, and measures how long that goes unnoticed.
func TestNodeDies(t *testing.T) {
	ip := func(line string) {
		t.Helper()
		if out, err := exec.Command("ip", strings.Fields(line)...).CombinedOutput(); err != nil {
			t.Fatalf("ip %s: %v: %s", line, err, out)
		}
	}
	ip("netns add " + elsewhere)
	t.Cleanup(func() { ip("netns del " + elsewhere) })
	ip("link add members type veth peer name eth0 netns " + elsewhere)
	ip("addr add 10.254.77.1/24 dev members")
	ip("link set members up")
	ip("-n " + elsewhere + " addr add 10.254.77.2/24 dev eth0")
	ip("-n " + elsewhere + " link set eth0 up")
	at := []netip.AddrPort{endpoint(t, "10.254.77.1"), netip.MustParseAddrPort("10.254.77.2:7946")}
	a := start(t, "a", at[0], nil, at[1])
	startChild(t, elsewhere, at[1], at[0])
	a.sees(t, "a", elsewhere)
	ip("-n " + elsewhere + " route add blackhole 10.254.77.1/32") // it hears, and says nothing any more
	took := a.sees(t, "a")
	t.Logf("the node was taken for dead after %v, with a probe interval of %v", took, pace)
	if most := 10 * pace; took > most {
		t.Errorf("the node was taken for dead after %v, later than %v", took, most)
	}
}

// TestStrangers holds that agents with different keys, or one with and one without, stay apart.
func TestStrangers(t *testing.T) {
	at := []netip.AddrPort{endpoint(t, "127.0.0.31"), endpoint(t, "127.0.0.32"), endpoint(t, "127.0.0.33")}
	key := []byte("0123456789abcdef")
	a := start(t, "a", at[0], key, at...)
	stranger := start(t, "stranger", at[1], []byte("fedcba9876543210"), at...)
	friend := start(t, "friend", at[2], key, at...)
	a.sees(t, "a", "friend")
	friend.sees(t, "a", "friend")
	stranger.sees(t, "stranger")
}

func TestBindsTheNodeAddressOnly(t *testing.T) {
	at := endpoint(t, "127.0.0.41")
	a := start(t, "a", at, nil)
	<-a.Changed() // running
	for _, network := range []string{"tcp", "udp"} {
		other := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.42"), at.Port()).String()
		var err error
		if network == "tcp" {
			var l net.Listener
			if l, err = net.Listen(network, other); err == nil {
				l.Close()
			}
		} else {
			var l net.PacketConn
			if l, err = net.ListenPacket(network, other); err == nil {
				l.Close()
			}
		}
		if err != nil {
			t.Errorf("bound to more than %s: %v", at, err)
		}
	}
}

func TestRunAddressTaken(t *testing.T) {
	at := endpoint(t, "127.0.0.51")
	a := start(t, "a", at, nil)
	<-a.Changed()
	m, err := members.New(members.Config{Node: "b", Bind: at, ProbeInterval: pace, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	err = m.Run(t.Context())
	if err == nil || !strings.Contains(err.Error(), "gossip on "+at.String()) {
		t.Errorf("Run on an address in use: %v", err)
	}
}

func TestNew(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	bind := netip.MustParseAddrPort("192.0.2.1:7946")
	for _, test := range []struct {
		name   string
		config members.Config
		want   string // "" = accepted
	}{
		{"good", members.Config{Node: "a", Bind: bind, ProbeInterval: pace, Log: log}, ""},
		{"good key", members.Config{Node: "a", Bind: bind, ProbeInterval: pace, Log: log, Key: make([]byte, 24)}, ""},
		{"no name", members.Config{Bind: bind, ProbeInterval: pace, Log: log}, "no node name"},
		{"no logger", members.Config{Node: "a", Bind: bind, ProbeInterval: pace}, "no logger"},
		{"no address", members.Config{Node: "a", ProbeInterval: pace, Log: log}, "bind address"},
		{"every address", members.Config{Node: "a", Bind: netip.MustParseAddrPort("[::]:7946"), ProbeInterval: pace, Log: log}, "bind address [::]:7946"},
		{"no port", members.Config{Node: "a", Bind: netip.MustParseAddrPort("192.0.2.1:0"), ProbeInterval: pace, Log: log}, "bind address 192.0.2.1:0"},
		{"short key", members.Config{Node: "a", Bind: bind, ProbeInterval: pace, Log: log, Key: make([]byte, 15)}, "key of 15 bytes"},
		{"no pace", members.Config{Node: "a", Bind: bind, Log: log}, "probe interval 0s"},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, err := members.New(test.config)
			switch {
			case test.want == "" && err != nil:
				t.Errorf("New: %v", err)
			case test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)):
				t.Errorf("New: %v, want %q", err, test.want)
			}
		})
	}
}
