// Package members tells which agents are alive, by gossip between the agents and not through the API server:
// when that is slow or gone, a dead node's addresses still move within seconds.
//
// # Failure detection
//
// The protocol is SWIM with Lifeguard, by hashicorp/memberlist. With the settings of this package:
//
//   - every agent probes one other, in turn, each 500 ms: UDP, answered within 250 ms, else until the end of the
//     500 ms through three other agents and by TCP;
//   - an agent that answered none of these is suspect, and has 1.5 s to say that it lives: 3 probe intervals, times
//     log10(agents) in clusters of more than 10 (3 s for 100 agents). No confirmation by others shortens or
//     lengthens it.
//
// So a node that dies is noticed by the first prober after 0.8 s on average (each of n agents probes one at random),
// suspect 0.5 s later and dead 1.5 s after that: between 2 and 3.5 s for up to 10 agents. News of it spreads by
// gossip each 100 ms. An agent on an overloaded machine must be silent for 2 s in a row to be taken for dead, and
// one that finds itself late with its own probes waits longer for others (up to 8 intervals) before it accuses them.
// An agent that crashes on a node that lives is not taken for dead at once: the node's kernel, which refuses
// connections to the agent's port, tells the two apart. The agent then has 10 s to come back, and the node keeps its
// addresses meanwhile. For a dead node the same look costs 0.3 s more.
//
// An agent that ends properly says so, and is gone for all within a gossip interval or two.
package members

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hashicorp/memberlist"
)

const (
	probeInterval  = 500 * time.Millisecond
	probeTimeout   = 250 * time.Millisecond
	suspicion      = 3 // probe intervals between suspect and dead, for up to 10 agents
	gossipInterval = 100 * time.Millisecond
	dialTimeout    = 2 * time.Second // for one attempt to join a node

	// joinInterval is the time between rounds of attempts to join the nodes that are not members, and joinRound how
	// many are tried in one: a single success brings every other member with it.
	joinInterval = time.Second
	joinRound    = 3

	// leaveTimeout is how long a leaving agent waits for its farewell to be sent.
	leaveTimeout = 2 * time.Second

	// crashGrace is how long an agent that has crashed has to come back on a node that lives, crashCheck the pause
	// between two looks at such a node, and crashTimeout how long one may take: a node that lives answers from its kernel.
	crashGrace   = 10 * time.Second
	crashCheck   = 500 * time.Millisecond
	crashTimeout = 300 * time.Millisecond

	// label keeps other users of memberlist on the same port out, whatever their key.
	label = "longshore"
)

// Config says who this agent is and where it talks to the others.
type Config struct {
	Node string         // this node's name, unique among the members
	Bind netip.AddrPort // the node's own address, to bind to and to be reached at (UDP and TCP); not unspecified
	Key  []byte         // 16, 24 or 32 bytes to encrypt with AES-128, -192 or -256; empty = in the clear
	Log  *slog.Logger
}

// Members is the set of agents that gossip with this one.
type Members struct {
	config  Config
	changed chan struct{}
	joins   chan struct{} // size 1: targets changed

	mu      sync.Mutex
	targets []netip.AddrPort
	list    *memberlist.Memberlist    // while Run runs
	crashed map[string]netip.AddrPort // agents that are gone without a farewell, from nodes that seem to live
	watches sync.WaitGroup
	leaving atomic.Bool
}

// New checks the configuration. Nothing is sent or bound before Run.
func New(config Config) (*Members, error) {
	if config.Node == "" {
		return nil, fmt.Errorf("members: no node name")
	}
	if config.Log == nil {
		return nil, fmt.Errorf("members: no logger")
	}
	config.Bind = plain(config.Bind)
	if !config.Bind.IsValid() || config.Bind.Addr().IsUnspecified() || config.Bind.Port() == 0 {
		return nil, fmt.Errorf("members: bind address %s: want the node's address and a port", config.Bind)
	}
	if err := memberlist.ValidateKey(config.Key); len(config.Key) > 0 && err != nil {
		return nil, fmt.Errorf("members: key of %d bytes: want 16, 24 or 32", len(config.Key))
	}
	return &Members{
		config:  config,
		changed: make(chan struct{}, 1),
		joins:   make(chan struct{}, 1),
		crashed: map[string]netip.AddrPort{},
	}, nil
}

// plain is an address as it is compared here: an IPv4 address in its own form.
func plain(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}

// Run gossips until ctx ends, then takes leave of the others, which takes up to a few seconds. It returns an
// error if the address cannot be bound. Call it once.
func (m *Members) Run(ctx context.Context) error {
	list, err := memberlist.Create(m.memberlistConfig(ctx))
	if err != nil {
		return fmt.Errorf("gossip on %s: %w", m.config.Bind, err)
	}
	m.mu.Lock()
	m.list = list
	m.mu.Unlock()
	poke(m.changed)

	var joining sync.WaitGroup
	joining.Go(func() { m.join(ctx, list) })
	defer joining.Wait()
	defer m.watches.Wait()
	<-ctx.Done() // not the end of join, which may be waiting for a node that does not answer

	// The others cannot see in memberlist's farewell whether an agent left or was taken for dead: it says so before.
	m.leaving.Store(true)
	if err := list.UpdateNode(leaveTimeout); err != nil {
		m.config.Log.Warn("tell the other agents of the end", "error", err)
	}
	if err := list.Leave(leaveTimeout); err != nil {
		m.config.Log.Warn("leave the other agents", "error", err)
	}
	m.mu.Lock()
	m.list = nil
	m.mu.Unlock()
	poke(m.changed)
	if err := list.Shutdown(); err != nil {
		return fmt.Errorf("stop gossip on %s: %w", m.config.Bind, err)
	}
	return nil
}

func (m *Members) memberlistConfig(ctx context.Context) *memberlist.Config {
	c := memberlist.DefaultLANConfig()
	c.Name = m.config.Node
	c.Label = label
	c.BindAddr = m.config.Bind.Addr().String()
	c.BindPort = int(m.config.Bind.Port())
	c.AdvertiseAddr = c.BindAddr
	c.AdvertisePort = c.BindPort
	c.SecretKey = m.config.Key
	c.ProbeInterval = probeInterval
	c.ProbeTimeout = probeTimeout
	c.SuspicionMult = suspicion
	c.SuspicionMaxTimeoutMult = 1
	c.GossipInterval = gossipInterval
	c.TCPTimeout = dialTimeout
	c.DeadNodeReclaimTime = time.Nanosecond // a dead node may come back with another address, at once
	c.EnableCompression = false             // messages are a few dozen bytes
	c.Events = events{ctx, m}
	c.Delegate = delegate{&m.leaving}
	c.Logger = log.New(slogWriter{ctx, m.config.Log}, "", 0)
	return c
}

// Join sets the addresses of all nodes where an agent may run; the whole value, each time they change. Those that
// are not members are tried again and again in the background, so that an agent that starts late or a network that
// was split is found. This node's own address may be among them.
func (m *Members) Join(addrs []netip.AddrPort) {
	targets := make([]netip.AddrPort, 0, len(addrs))
	for _, a := range addrs {
		if a = plain(a); a.IsValid() && a != m.config.Bind {
			targets = append(targets, a)
		}
	}
	m.mu.Lock()
	m.targets = targets
	m.mu.Unlock()
	poke(m.joins)
}

// Alive is the names of the nodes whose agents are alive, sorted: this one, those that gossip with it, and for a while
// those whose agent alone has crashed. It is this one alone before Run and after it.
func (m *Members) Alive() []string {
	m.mu.Lock()
	list := m.list
	names := []string{m.config.Node}
	if list != nil {
		names = slices.AppendSeq(names, maps.Keys(m.crashed))
	}
	m.mu.Unlock()
	if list != nil {
		for _, n := range list.Members() {
			names = append(names, n.Name)
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// watchCrashed keeps a node among the living while its kernel answers at the agent's port, refusing the connection or
// not: the node lives, only its agent does not. Its data plane works on, and every connection through it would break if
// its addresses went elsewhere. The agent has crashGrace to come back.
func (m *Members) watchCrashed(ctx context.Context, name string, at netip.AddrPort) {
	deadline := time.Now().Add(crashGrace)
	dialer := net.Dialer{Timeout: crashTimeout}
	for time.Now().Before(deadline) && m.isCrashed(name, at) {
		conn, err := dialer.DialContext(ctx, "tcp", at.String())
		if err == nil {
			_ = conn.Close()
		} else if !errors.Is(err, syscall.ECONNREFUSED) {
			m.config.Log.Debug("a node is dead", "node", name, "error", err)
			break
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(crashCheck):
		}
	}
	m.mu.Lock()
	delete(m.crashed, name)
	m.mu.Unlock()
	poke(m.changed)
}

func (m *Members) isCrashed(name string, at netip.AddrPort) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.crashed[name] == at
}

// Changed receives when Alive may have changed. It holds one message: many changes may come as one.
func (m *Members) Changed() <-chan struct{} { return m.changed }

// join tries the targets that are not members until ctx ends.
func (m *Members) join(ctx context.Context, list *memberlist.Memberlist) {
	tick := time.NewTicker(joinInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-m.joins:
		}
		missing := m.missing(list)
		rand.Shuffle(len(missing), func(i, j int) { missing[i], missing[j] = missing[j], missing[i] })
		for _, target := range missing[:min(len(missing), joinRound)] {
			if ctx.Err() != nil {
				return
			}
			if _, err := list.Join([]string{target.String()}); err != nil {
				m.config.Log.Debug("join an agent", "address", target, "error", err)
			}
		}
	}
}

// missing is the targets that no living member has as its address.
func (m *Members) missing(list *memberlist.Memberlist) []netip.AddrPort {
	joined := map[netip.AddrPort]bool{}
	for _, n := range list.Members() {
		if addr, ok := netip.AddrFromSlice(n.Addr); ok {
			joined[netip.AddrPortFrom(addr.Unmap(), n.Port)] = true
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	var missing []netip.AddrPort
	for _, t := range m.targets {
		if !joined[t] {
			missing = append(missing, t)
		}
	}
	return missing
}

func poke(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// events follows the members. memberlist calls it with its lock held.
type events struct {
	ctx context.Context
	*Members
}

func (e events) NotifyJoin(n *memberlist.Node) {
	e.mu.Lock()
	delete(e.crashed, n.Name)
	e.mu.Unlock()
	poke(e.changed)
}

func (e events) NotifyLeave(n *memberlist.Node) {
	defer poke(e.changed)
	addr, ok := netip.AddrFromSlice(n.Addr)
	if !ok || string(n.Meta) == metaLeaving || e.ctx.Err() != nil {
		return
	}
	at := plain(netip.AddrPortFrom(addr, n.Port))
	e.mu.Lock()
	e.crashed[n.Name] = at
	e.mu.Unlock()
	e.watches.Go(func() { e.watchCrashed(e.ctx, n.Name, at) })
}

func (e events) NotifyUpdate(*memberlist.Node) { poke(e.changed) }

// metaLeaving is the metadata of an agent that is about to end properly; all others have none.
const metaLeaving = "leaving"

// delegate gives memberlist this agent's metadata. There is nothing else to exchange.
type delegate struct{ leaving *atomic.Bool }

func (d delegate) NodeMeta(int) []byte {
	if d.leaving.Load() {
		return []byte(metaLeaving)
	}
	return nil
}

func (delegate) NotifyMsg([]byte)                {}
func (delegate) GetBroadcasts(int, int) [][]byte { return nil }
func (delegate) LocalState(bool) []byte          { return nil }
func (delegate) MergeRemoteState([]byte, bool)   {}

// slogWriter takes memberlist's lines, "[WARN] memberlist: text", to the structured log: warnings and errors as
// warnings, since the protocol recovers from all of them by itself, anything else for debugging. So is everything
// after the end of ctx: probes under way then fail on the closed socket.
type slogWriter struct {
	ctx context.Context
	log *slog.Logger
}

var _ io.Writer = slogWriter{}

func (w slogWriter) Write(line []byte) (int, error) {
	level, text := slog.LevelDebug, strings.TrimSpace(string(line))
	if tag, rest, ok := strings.Cut(text, " "); ok && strings.HasPrefix(tag, "[") {
		text = strings.TrimPrefix(rest, "memberlist: ")
		if (tag == "[WARN]" || tag == "[ERR]") && w.ctx.Err() == nil {
			level = slog.LevelWarn
		}
	}
	w.log.Log(w.ctx, level, text, "from", "memberlist")
	return len(line), nil
}
