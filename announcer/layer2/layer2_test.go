package layer2_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
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
	"github.com/longshore-lb/longshore/announcer/layer2"
)

// nodeEnv, if set, makes the test binary a node: a Responder with this refresh interval, driven by lines on standard
// input. A network namespace belongs to a whole process that way.
const nodeEnv = "LONGSHORE_TEST_LAYER2"

// patience is how long a test waits for what must come.
const patience = 30 * time.Second

func TestMain(m *testing.M) {
	if refresh := os.Getenv(nodeEnv); refresh != "" {
		if err := runNode(refresh); err != nil {
			fmt.Println("end", err)
			os.Exit(1)
		}
		fmt.Println("end")
		os.Exit(0)
	}
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "these tests make network namespaces and open packet sockets: run them as root")
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// runNode sets the addresses of each line, ADDRESS[@LINK,LINK][!]... (! = yielding), or for the line "counts" says what it has counted, until
// the end of its input.
func runNode(refresh string) error {
	interval, err := time.ParseDuration(refresh)
	if err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	r := layer2.New(log, layer2.Options{Refresh: interval})
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- r.Run(ctx) }()

	lines := make(chan string)
	go func() {
		defer close(lines)
		for in := bufio.NewScanner(os.Stdin); in.Scan(); {
			lines <- in.Text()
		}
	}()
	for {
		select {
		case err := <-ended:
			return fmt.Errorf("Run returned early: %w", err)
		case c := <-r.Conflicts():
			fmt.Println("conflict", c.Addr, c.Interface, c.HardwareAddr)
		case <-r.Changed():
			status, err := json.Marshal(r.Status())
			if err != nil {
				return err
			}
			fmt.Printf("status %s\n", status)
		case line, ok := <-lines:
			if !ok {
				cancel()
				if err := <-ended; err != nil {
					return err
				}
				if left := r.Status(); len(left) > 0 {
					return fmt.Errorf("still answering after the end: %v", left)
				}
				return goleak.Find()
			}
			if line == "counts" {
				counts := map[string]uint64{}
				for g, n := range r.Announcements() {
					counts[g.Protocol+" "+g.Reason] = n
				}
				for protocol, n := range r.Answers() {
					counts[protocol+" answers"] = n
				}
				for _, l := range r.Links() {
					counts[fmt.Sprint("link ", l)] = 1
				}
				line, err := json.Marshal(counts)
				if err != nil {
					return err
				}
				fmt.Printf("counts %s\n", line)
				continue
			}
			var addrs []announcer.Address
			for f := range strings.FieldsSeq(line) {
				f, yielding := strings.CutSuffix(f, "!")
				addr, links, named := strings.Cut(f, "@")
				a := announcer.Address{Addr: netip.MustParseAddr(addr), Yielding: yielding}
				if named {
					a.Interfaces = strings.Split(links, ",")
				}
				addrs = append(addrs, a)
			}
			r.Set(addrs)
			fmt.Println("set")
		}
	}
}

// namespace is a network namespace of this test's own.
type namespace struct {
	t    *testing.T
	name string
}

func newNamespace(t *testing.T, name string) namespace {
	t.Helper()
	ns := namespace{t, fmt.Sprintf("layer2-%d-%s", os.Getpid(), name)}
	run(t, "ip", "netns", "add", ns.name)
	t.Cleanup(func() { run(t, "ip", "netns", "del", ns.name) })
	ns.must("ip link set lo up")
	// No random delays: neither before duplicate address detection nor at all where a test does not want it.
	ns.must("sysctl -qw net.ipv6.conf.default.accept_dad=0 net.ipv6.conf.default.router_solicitations=0")
	return ns
}

// must runs a command line (split at spaces) in the namespace and returns what it prints.
func (ns namespace) must(line string) string {
	ns.t.Helper()
	return run(ns.t, "ip", append([]string{"netns", "exec", ns.name}, strings.Fields(line)...)...)
}

// try runs a command line that may fail.
func (ns namespace) try(line string) (string, error) {
	out, err := exec.Command("ip", append([]string{"netns", "exec", ns.name}, strings.Fields(line)...)...).CombinedOutput()
	return string(out), err
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// eventually waits until a condition holds; it returns what to say if it does not.
func eventually(t *testing.T, condition func() (problem string)) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		problem := condition()
		if problem == "" {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(problem)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// neighbour is an entry of a namespace's neighbour table: "MAC STATE".
func (ns namespace) neighbour(addr string) string {
	ns.t.Helper()
	var entries []struct {
		Lladdr string
		State  []string
	}
	family := "-4"
	if strings.Contains(addr, ":") {
		family = "-6"
	}
	if err := json.Unmarshal([]byte(ns.must("ip -j "+family+" neigh show "+addr)), &entries); err != nil {
		ns.t.Fatal(err)
	}
	if len(entries) == 0 {
		return ""
	}
	return entries[0].Lladdr + " " + strings.Join(entries[0].State, ",")
}

// resolves has the namespace's kernel resolve an address by sending to it.
func (ns namespace) resolves(addr, mac string) {
	ns.t.Helper()
	_, _ = ns.try("ip neigh del " + addr + " dev eth0")
	eventually(ns.t, func() string {
		// A datagram to the discard port. Nobody takes it: the address is on no link.
		run(ns.t, "ip", "netns", "exec", ns.name, "bash", "-c", "echo >/dev/udp/"+addr+"/9")
		if got := ns.neighbour(addr); got != mac+" REACHABLE" {
			return fmt.Sprintf("%s resolves %s to %q, want %s", ns.name, addr, got, mac)
		}
		return ""
	})
}

// network is a switch with machines on it, each with one link, eth0.
type network struct {
	t      *testing.T
	bridge namespace
}

func newNetwork(t *testing.T) network {
	t.Helper()
	n := network{t, newNamespace(t, "switch")}
	n.bridge.must("ip link add br0 type bridge mcast_snooping 0")
	n.bridge.must("ip link set br0 up")
	return n
}

// machine adds a machine with the last bytes of its addresses.
func (n network) machine(name string, number int) namespace {
	n.t.Helper()
	ns := newNamespace(n.t, name)
	n.plug(ns, "eth0", number)
	return ns
}

// plug joins a machine to the switch by another link.
func (n network) plug(ns namespace, link string, number int) {
	n.t.Helper()
	port := fmt.Sprintf("port%d", number)
	n.bridge.must(fmt.Sprintf("ip link add %s type veth peer name %s address %s netns %s", port, link, mac(number), ns.name))
	n.bridge.must(fmt.Sprintf("ip link set %s master br0 up", port))
	ns.must(fmt.Sprintf("ip addr add 192.0.2.%d/24 dev %s", number, link))
	ns.must(fmt.Sprintf("ip addr add 2001:db8::%d/64 dev %s", number, link))
	ns.must("ip link set " + link + " up")
}

func mac(number int) string { return fmt.Sprintf("02:00:00:00:00:%02d", number) }

// node is a Responder in a process of its own.
type node struct {
	t         *testing.T
	stdin     io.WriteCloser
	sets      chan struct{}
	statuses  chan []layer2.Announcement
	conflicts chan string
	counts    chan map[string]uint64
	ended     chan string
}

func startNode(t *testing.T, ns namespace, refresh time.Duration) *node {
	t.Helper()
	cmd := exec.Command("ip", "netns", "exec", ns.name, os.Args[0])
	cmd.Env = append(os.Environ(), nodeEnv+"="+refresh.String())
	cmd.Stderr = t.Output()
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	n := &node{
		t:         t,
		stdin:     stdin,
		sets:      make(chan struct{}),
		statuses:  make(chan []layer2.Announcement, 1000),
		conflicts: make(chan string, 1000),
		counts:    make(chan map[string]uint64),
		ended:     make(chan string, 1),
	}
	go func() {
		last := "no farewell"
		in := bufio.NewReader(stdout)
		for {
			line, err := in.ReadString('\n')
			if err != nil {
				break
			}
			word, rest, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
			switch word {
			case "set":
				n.sets <- struct{}{}
			case "status":
				var s []layer2.Announcement
				if err := json.Unmarshal([]byte(rest), &s); err != nil {
					t.Errorf("node %s: status %s: %v", ns.name, rest, err)
				}
				n.statuses <- s
			case "conflict":
				n.conflicts <- rest
			case "counts":
				var counts map[string]uint64
				if err := json.Unmarshal([]byte(rest), &counts); err != nil {
					t.Errorf("node %s: counts %s: %v", ns.name, rest, err)
				}
				n.counts <- counts
			case "end":
				last = rest
			}
		}
		cmd.Wait()
		n.ended <- last
	}()
	t.Cleanup(func() {
		stdin.Close()
		select {
		case last := <-n.ended:
			if last != "" {
				t.Errorf("node %s ended with: %s", ns.name, last)
			}
		case <-time.After(patience):
			cmd.Process.Kill()
			t.Errorf("node %s did not end", ns.name)
		}
	})
	return n
}

// set gives the node its addresses, written as ADDRESS[@LINK,...].
func (n *node) set(addrs ...string) {
	n.t.Helper()
	if _, err := fmt.Fprintln(n.stdin, strings.Join(addrs, " ")); err != nil {
		n.t.Fatal(err)
	}
	select {
	case <-n.sets:
	case last := <-n.ended:
		n.ended <- last
		n.t.Fatalf("node ended: %s", last)
	}
}

// announces waits until the node's status is these, each written as "ADDRESS LINK MAC".
func (n *node) announces(want ...string) {
	n.t.Helper()
	var got []string
	deadline := time.After(patience)
	for {
		select {
		case status := <-n.statuses:
			got = nil
			for _, a := range status {
				got = append(got, fmt.Sprintf("%s %s %s", a.Addr, a.Interface, a.HardwareAddr))
			}
			if slices.Equal(got, want) {
				return
			}
		case <-deadline:
			n.t.Fatalf("wrong announcements (-want +got):\n%s", cmp.Diff(want, got))
		}
	}
}

const (
	vip4 = "192.0.2.100"
	vip6 = "2001:db8::100"
)

var vips = []string{vip4, vip6}

// announcedOn is what announces takes for both addresses on one link.
func announcedOn(link, mac string) []string {
	return []string{vip4 + " " + link + " " + mac, vip6 + " " + link + " " + mac}
}

// TestResolve has another machine's kernel and tools ask for addresses that are on no link.
func TestResolve(t *testing.T) {
	network := newNetwork(t)
	client, machine := network.machine("client", 1), network.machine("node", 2)
	node := startNode(t, machine, time.Hour)
	node.set(vips...)
	node.announces(announcedOn("eth0", mac(2))...)

	for _, vip := range vips {
		client.resolves(vip, mac(2))
	}
	for _, tool := range []struct{ name, line string }{
		{"broadcast request", "arping -q -c1 -C1 -w5 -i eth0 " + vip4},
		{"unicast request", "arping -q -c1 -C1 -w5 -i eth0 -t " + mac(2) + " " + vip4},
		{"probe before use", "arping -q -c1 -C1 -w5 -0 -i eth0 " + vip4},
		{"solicitation", "ndisc6 -q -1 -r3 -w2000 " + vip6 + " eth0"},
	} {
		if out, err := client.try(tool.line); err != nil {
			t.Errorf("%s: %s: %v\n%s", tool.name, tool.line, err, out)
		}
	}
	if out, err := client.try("arping -q -c1 -w1 -i eth0 192.0.2.101"); err == nil {
		t.Errorf("an address that was not set was answered for:\n%s", out)
	}
	if got := strings.TrimSpace(machine.must("ip -o addr show to " + vip4)); got != "" {
		t.Errorf("the address is on a link: %s", got)
	}

	// Gone: nobody answers, from the moment that set returns.
	node.set()
	if out, err := client.try("arping -q -c2 -w2 -i eth0 " + vip4); err == nil {
		t.Errorf("%s is answered for after it was taken away\n%s", vip4, out)
	}
	if out, err := client.try("ndisc6 -q -1 -r1 -w500 " + vip6 + " eth0"); err == nil {
		t.Errorf("%s is answered for after it was taken away\n%s", vip6, out)
	}
	node.announces()
	if groups := machine.must("ip -6 maddr show dev eth0"); strings.Contains(groups, "ff02::1:ff00:100") {
		t.Errorf("the group of %s was not left:\n%s", vip6, groups)
	}
}

// TestVerify has the client's kernel verify an entry that it has: by requests to the MAC address, and the solicitations to the
// address itself. Only an answer marked as solicited makes it reachable.
func TestVerify(t *testing.T) {
	network := newNetwork(t)
	client, machine := network.machine("client", 1), network.machine("node", 2)
	node := startNode(t, machine, time.Hour)
	node.set(vips...)
	node.announces(announcedOn("eth0", mac(2))...)
	for _, vip := range vips {
		client.must("ip neigh replace " + vip + " lladdr " + mac(2) + " dev eth0 nud probe")
		eventually(t, func() string {
			if got := client.neighbour(vip); got != mac(2)+" REACHABLE" {
				return fmt.Sprintf("%s is %q after the client has verified it", vip, got)
			}
			return ""
		})
	}
}

// TestTakeover moves addresses from one node to another: the client, which asks nothing, is told.
func TestTakeover(t *testing.T) {
	network := newNetwork(t)
	client := network.machine("client", 1)
	first := startNode(t, network.machine("first", 2), time.Hour)
	second := startNode(t, network.machine("second", 3), time.Hour)
	first.set(vips...)
	for _, vip := range vips {
		client.resolves(vip, mac(2))
	}
	client.ignores(vips...)

	second.set(vips...) // the successor announces, then the predecessor stops
	second.announces(announcedOn("eth0", mac(3))...)
	first.set()
	for _, vip := range vips {
		client.learns(vip, mac(3))
	}

	// The predecessor dies without a word and the address goes back: same thing.
	first.set(vips...)
	second.set()
	for _, vip := range vips {
		client.learns(vip, mac(2))
	}
}

// ignores makes the client unable to ask for addresses, so that it knows only what it is told.
func (ns namespace) ignores(addrs ...string) {
	ns.t.Helper()
	ns.must("nft add table arp quiet")
	ns.must("nft add chain arp quiet output { type filter hook output priority 0 ; }")
	ns.must("nft add rule arp quiet output arp operation request drop")
	ns.must("nft add table ip6 quiet")
	ns.must("nft add chain ip6 quiet output { type filter hook output priority 0 ; }")
	ns.must("nft add rule ip6 quiet output icmpv6 type nd-neighbor-solicit drop")
	for _, addr := range addrs {
		ns.must("ip neigh change " + addr + " dev eth0 nud stale")
	}
}

// learns waits until the client has an entry that it was told of.
func (ns namespace) learns(addr, mac string) {
	ns.t.Helper()
	eventually(ns.t, func() string {
		if got := ns.neighbour(addr); !strings.HasPrefix(got, mac+" ") {
			return fmt.Sprintf("the client has %s at %q, want %s", addr, got, mac)
		}
		return ""
	})
}

// TestRefresh spoils the client's entries long after the takeover: it is told again.
func TestRefresh(t *testing.T) {
	network := newNetwork(t)
	client, machine := network.machine("client", 1), network.machine("node", 2)
	node := startNode(t, machine, 2*time.Second)
	node.set(vips...)
	for _, vip := range vips {
		client.resolves(vip, mac(2))
	}
	client.ignores()
	for range 4 { // for longer than the burst of a takeover lasts
		for _, vip := range vips {
			client.must("ip neigh replace " + vip + " lladdr 02:00:00:00:00:99 dev eth0 nud stale")
		}
		for _, vip := range vips {
			client.learns(vip, mac(2))
		}
		time.Sleep(1500 * time.Millisecond)
	}
}

// capture starts tcpdump on eth0.
func (ns namespace) capture(filter string) capture {
	t := ns.t
	t.Helper()
	cmd := exec.Command("ip", "netns", "exec", ns.name, "tcpdump", "-l", "-n", "-e", "-vv", "-i", "eth0", filter)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	messages, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	for in := bufio.NewScanner(messages); in.Scan() && !strings.Contains(in.Text(), "listening on"); {
	}
	lines := make(chan string, 1000)
	go func() {
		for in := bufio.NewScanner(out); in.Scan(); {
			lines <- in.Text()
		}
		close(lines)
	}()
	return lines
}

// capture is what tcpdump prints, line by line.
type capture <-chan string

// contain waits until each text has occurred exactly so often.
func (c capture) contain(t *testing.T, want map[string]int) {
	t.Helper()
	got := map[string]int{}
	deadline := time.After(patience)
	for !cmp.Equal(want, got) {
		select {
		case line, ok := <-c:
			if !ok {
				t.Fatal("the capture ended")
			}
			for text := range want {
				got[text] += strings.Count(line, text)
			}
		case <-deadline:
			t.Fatalf("wrong frames (-want +got):\n%s", cmp.Diff(want, got))
		}
	}
}

// TestBurst holds what a takeover looks like to another program: five times each form, in well-formed frames.
func TestBurst(t *testing.T) {
	network := newNetwork(t)
	client, machine := network.machine("client", 1), network.machine("node", 2)
	frames := client.capture("ether src " + mac(2))
	node := startNode(t, machine, time.Hour)
	node.set(vips...)

	want := map[string]int{
		"> ff:ff:ff:ff:ff:ff, ethertype ARP":                                      10,
		"Request who-has " + vip4 + " tell " + vip4:                               5,
		"Reply " + vip4 + " is-at " + mac(2):                                      5,
		vip6 + " > ff02::1: [icmp6 sum ok] ICMP6, neighbor advertisement":         5,
		"33:33:00:00:00:01, ethertype IPv6":                                       5,
		"tgt is " + vip6 + ", Flags [router, override]":                           5,
		"destination link-address option (2), length 8 (1): " + mac(2):            5,
		"hlim 255, next-header ICMPv6 (58) payload length: 32) " + vip6 + " > ff": 5,
	}
	frames.contain(t, want)
}

// TestLinks changes the links under a running node.
func TestLinks(t *testing.T) {
	network := newNetwork(t)
	client, machine := network.machine("client", 1), newNamespace(t, "node")
	node := startNode(t, machine, time.Hour)
	node.set(vips...)
	network.plug(machine, "eth0", 2) // after the addresses are set
	node.announces(announcedOn("eth0", mac(2))...)
	for _, vip := range vips {
		client.resolves(vip, mac(2))
	}

	network.bridge.must("ip link set port2 down") // the node's link loses its carrier
	node.announces()
	for _, vip := range vips {
		client.must("ip neigh replace " + vip + " lladdr 02:00:00:00:00:99 dev eth0 nud stale")
	}
	network.bridge.must("ip link set port2 up")
	node.announces(announcedOn("eth0", mac(2))...)
	for _, vip := range vips {
		client.learns(vip, mac(2)) // told, not asked: it sends nothing
	}

	machine.must("ip link set eth0 down")
	node.announces()
	machine.must("ip link set eth0 address 02:00:00:00:00:88")
	machine.must("ip addr add 2001:db8::2/64 dev eth0") // the kernel forgot it with the link
	machine.must("ip link set eth0 up")
	node.announces(announcedOn("eth0", "02:00:00:00:00:88")...)
	for _, vip := range vips {
		client.learns(vip, "02:00:00:00:00:88")
	}

	machine.must("ip link set eth0 down")
	node.announces()
	machine.must("ip link set eth0 name uplink")
	machine.must("ip addr add 2001:db8::2/64 dev uplink")
	machine.must("ip link set uplink up")
	node.announces(announcedOn("uplink", "02:00:00:00:00:88")...)
	machine.must("ip link del uplink")
	node.announces()
}

// TestUsable holds which links are used for addresses that name none, and for those that name some.
func TestUsable(t *testing.T) {
	far, machine := newNamespace(t, "far"), newNamespace(t, "node")
	number := 10
	veth := func(name string) {
		number++
		machine.must(fmt.Sprintf("ip link add %s address %s type veth peer name %s netns %s", name, mac(number), name, far.name))
		machine.must("ip link set " + name + " up")
		far.must("ip link set " + name + " up")
	}
	veth("plain") // 11
	machine.must("ip addr add 192.0.2.2/24 dev plain")
	machine.must("ip addr add 2001:db8::2/64 dev plain")
	veth("only4") // 12
	machine.must("ip addr add 198.51.100.2/31 dev only4")
	veth("only6") // 13
	machine.must("ip addr add fd00::2/127 dev only6")
	veth("pod") // 14: as CNI plugins leave the node's end
	machine.must("ip addr add 10.244.0.1/32 dev pod")
	machine.must("ip addr add fd01::1/128 dev pod")
	veth("bare") // 15: only a link-local address
	veth("nocarrier")
	machine.must("ip addr add 192.0.2.3/24 dev nocarrier")
	far.must("ip link set nocarrier down")
	veth("off")
	machine.must("ip addr add 192.0.2.4/24 dev off")
	machine.must("ip link set off down")
	veth("noarp")
	machine.must("ip addr add 192.0.2.5/24 dev noarp")
	machine.must("ip link set noarp arp off")
	veth("slave")
	machine.must("ip addr add 192.0.2.6/24 dev slave")
	machine.must("ip link add br0 address 02:00:00:00:00:20 type bridge")
	machine.must("ip link set slave master br0")
	machine.must("ip addr add 192.0.2.7/24 dev br0")
	machine.must("ip link set br0 up")
	machine.must("ip link add macvlan0 link plain address 02:00:00:00:00:21 type macvlan mode bridge")
	machine.must("ip addr add 192.0.2.8/24 dev macvlan0")
	machine.must("ip link set macvlan0 up")
	machine.must("ip addr add 192.0.2.9/24 dev lo")

	node := startNode(t, machine, time.Hour)
	node.set(vips...)
	node.announces(
		vip4+" br0 02:00:00:00:00:20",
		vip4+" macvlan0 02:00:00:00:00:21",
		vip4+" only4 "+mac(12),
		vip4+" plain "+mac(11),
		vip6+" only6 "+mac(13),
		vip6+" plain "+mac(11),
	)

	// The bridge's port becomes a link of its own: the kernel reports it as deleted, among other things.
	machine.must("ip link set slave nomaster")
	node.announces(
		vip4+" br0 02:00:00:00:00:20",
		vip4+" macvlan0 02:00:00:00:00:21",
		vip4+" only4 "+mac(12),
		vip4+" plain "+mac(11),
		vip4+" slave "+mac(number),
		vip6+" only6 "+mac(13),
		vip6+" plain "+mac(11),
	)

	// Named links are used whatever addresses they have, if they are usable.
	node.set(vip4+"@bare,noarp,absent", vip6+"@bare,only4,off")
	node.announces(vip4+" bare "+mac(15), vip6+" bare "+mac(15), vip6+" only4 "+mac(12))

	// Everywhere and on a named link: both. What cannot be resolved is left out.
	node.set(vip6, vip6+"@bare", "224.0.0.9", "::1", "ff02::9", "0.0.0.0")
	node.announces(vip6+" bare "+mac(15), vip6+" only6 "+mac(13), vip6+" plain "+mac(11))

	// An address makes a link worth using, and the loss of it ends that.
	machine.must("ip addr add 2001:db8:1::1/64 dev pod")
	node.announces(vip6+" bare "+mac(15), vip6+" only6 "+mac(13), vip6+" plain "+mac(11), vip6+" pod "+mac(14))
	machine.must("ip addr del 2001:db8:1::1/64 dev pod")
	node.announces(vip6+" bare "+mac(15), vip6+" only6 "+mac(13), vip6+" plain "+mac(11))
}

// quiet waits until the announcements of a takeover are over: what a node sends after it, it sends for another reason.
func quiet() { time.Sleep(6 * time.Second) }

// TestDuplicateAddressDetection has a machine try to take our IPv6 address: it is told that it cannot, by an answer to all nodes
// that is not marked as solicited.
func TestDuplicateAddressDetection(t *testing.T) {
	network := newNetwork(t)
	intruder, machine := network.machine("intruder", 1), network.machine("node", 2)
	node := startNode(t, machine, time.Hour)
	node.set(vips...)
	node.announces(announcedOn("eth0", mac(2))...)
	quiet()
	frames := intruder.capture("ether src " + mac(2))
	intruder.must("sysctl -qw net.ipv6.conf.all.accept_dad=1 net.ipv6.conf.eth0.accept_dad=1")
	intruder.must("ip addr add " + vip6 + "/64 dev eth0")
	eventually(t, func() string {
		if got := intruder.must("ip addr show dev eth0 to " + vip6); !strings.Contains(got, "dadfailed") {
			return "the address was not refused: " + got
		}
		return ""
	})
	frames.contain(t, map[string]int{
		vip6 + " > ff02::1: [icmp6 sum ok] ICMP6, neighbor advertisement": 1,
		"tgt is " + vip6 + ", Flags [router, override]":                   1,
	})
}

// TestConflict has a machine claim our addresses. It is reported, and the neighbours are put right.
func TestConflict(t *testing.T) {
	network := newNetwork(t)
	client, machine, intruder := network.machine("client", 1), network.machine("node", 2), network.machine("intruder", 3)
	node := startNode(t, machine, time.Hour)
	node.set(vips...)
	for _, vip := range vips {
		client.resolves(vip, mac(2))
	}
	client.ignores(vips...)
	quiet()

	// The kernel announces its addresses when the MAC address of a link changes.
	intruder.must("sysctl -qw net.ipv4.conf.eth0.arp_notify=1 net.ipv6.conf.eth0.ndisc_notify=1")
	intruder.must("ip addr add " + vip4 + "/24 dev eth0")
	intruder.must("ip addr add " + vip6 + "/64 dev eth0 nodad")
	const other = "02:00:00:00:00:66"
	intruder.must("ip link set eth0 address " + other)
	var got []string
	for range vips {
		select {
		case c := <-node.conflicts:
			got = append(got, c)
		case <-time.After(patience):
			t.Fatalf("conflicts: %v", got)
		}
	}
	slices.Sort(got)
	if diff := cmp.Diff([]string{vip4 + " eth0 " + other, vip6 + " eth0 " + other}, got); diff != "" {
		t.Errorf("conflicts (-want +got):\n%s", diff)
	}
	for _, vip := range vips {
		client.learns(vip, mac(2))
	}
	// Again at once: not a report each.
	for range 3 {
		intruder.must("ip link set eth0 address 02:00:00:00:00:67")
		intruder.must("ip link set eth0 address " + other)
	}
	node.set()
	node.announces()
	if n := len(node.conflicts); n > len(vips) {
		t.Errorf("%d conflicts reported on top of one per address", n)
	}
}

// counted waits until the node has counted this much of each, at least, or exactly where it says 0.
func (n *node) counted(want map[string]uint64) {
	n.t.Helper()
	eventually(n.t, func() string {
		fmt.Fprintln(n.stdin, "counts")
		got := <-n.counts
		for what, count := range want {
			if got[what] < count || count == 0 && got[what] > 0 {
				return fmt.Sprintf("counted %v, want %v", got, want)
			}
		}
		return ""
	})
}

// TestCounts holds that each announcement is counted with its reason, and each answer, and which links are usable.
func TestCounts(t *testing.T) {
	network := newNetwork(t)
	client, machine, intruder := network.machine("client", 1), network.machine("node", 2), network.machine("intruder", 3)
	node := startNode(t, machine, 2*time.Second)
	node.set(vips...)
	node.counted(map[string]uint64{"arp takeover": 5, "ndp takeover": 5, "arp carrier": 0, "ndp carrier": 0, "arp conflict": 0,
		"arp answers": 0, "ndp answers": 0, "link {eth0 true true}": 1, "link {lo false false}": 0})
	for _, vip := range vips {
		client.resolves(vip, mac(2))
	}
	node.counted(map[string]uint64{"arp answers": 1, "ndp answers": 1, "arp periodic": 1, "ndp periodic": 1})
	network.bridge.must("ip link set port2 down")
	node.counted(map[string]uint64{"link {eth0 true true}": 0, "arp carrier": 0})
	network.bridge.must("ip link set port2 up")
	node.counted(map[string]uint64{"link {eth0 true true}": 1, "arp carrier": 5, "ndp carrier": 5, "arp conflict": 0})
	intruder.must("sysctl -qw net.ipv4.conf.eth0.arp_notify=1")
	intruder.must("ip addr add " + vip4 + "/24 dev eth0")
	intruder.must("ip link set eth0 address 02:00:00:00:00:66")
	node.counted(map[string]uint64{"arp conflict": 1, "ndp conflict": 0})
}

// TestYield holds that an address which another node is to have is answered for, and neither announced nor fought for.
func TestYield(t *testing.T) {
	network := newNetwork(t)
	client, machine, successor := network.machine("client", 1), network.machine("node", 2), network.machine("successor", 3)
	node := startNode(t, machine, 2*time.Second)
	node.set(vip4)
	node.counted(map[string]uint64{"arp takeover": 5})
	node.set(vip4 + "!")
	client.resolves(vip4, mac(2))
	next := startNode(t, successor, time.Hour)
	next.set(vip4)
	next.counted(map[string]uint64{"arp takeover": 5, "arp conflict": 0})
	node.counted(map[string]uint64{"arp conflict": 0})
	client.learns(vip4, mac(3))
	if len(node.conflicts) > 0 {
		t.Error("the successor was reported as a conflict")
	}
	node.set()
	node.announces()
}

// TestMany answers for more IPv6 addresses than one socket can join groups for.
func TestMany(t *testing.T) {
	const addresses = 3000 // 2,340 groups fill a socket where net.core.optmem_max is 128 KiB, 365 where it is 20
	network := newNetwork(t)
	client, machine := network.machine("client", 1), network.machine("node", 2)
	node := startNode(t, machine, time.Hour)
	var addrs, want []string
	for i := range addresses {
		addr := netip.AddrFrom16([16]byte{0x20, 0x01, 0x0d, 0xb8, 14: byte(1 + i/256), 15: byte(i)}).String()
		addrs = append(addrs, addr)
		want = append(want, addr+" eth0 "+mac(2))
	}
	// Two that share a group with the first.
	addrs = append(addrs, "2001:db8::1:0:100", "2001:db8::2:0:100")
	want = append(want, "2001:db8::1:0:100 eth0 "+mac(2), "2001:db8::2:0:100 eth0 "+mac(2))
	node.set(addrs...)
	node.announces(want...)
	if groups := strings.Count(machine.must("ip -6 maddr show dev eth0"), "ff02::1:ff00:"); groups < addresses {
		t.Errorf("%d solicited-node groups joined, want at least %d", groups, addresses)
	}
	for _, addr := range []string{addrs[0], addrs[addresses-1], addrs[addresses+1]} {
		client.resolves(addr, mac(2))
	}
	node.set(addrs[addresses]) // the group stays
	node.announces(want[addresses])
	client.resolves(addrs[addresses], mac(2))
	groups := machine.must("ip -6 maddr show dev eth0")
	if n := strings.Count(groups, "ff02::1:ff00:"); n > 2 || !strings.Contains(groups, "ff02::1:ff00:100") {
		t.Errorf("joined are %d solicited-node groups, want those of one address and of the link:\n%s", n, groups)
	}
}
