// Package members tells which agents are alive and what they say of themselves, by gossip between the agents and not through
// the API server: when that is slow or gone, a dead node's addresses still move within a second.
//
// # Failure detection
//
// The protocol is SWIM with Lifeguard, by hashicorp/memberlist. Its pace is Config.ProbeInterval, p:
//
//   - every agent probes one other, in turn, each p: UDP, answered within p/2, else until the end of p through three other
//     agents and by TCP;
//   - an agent that answered none of these is suspect, and has p to say that it lives, times log10(agents) in clusters of
//     more than 10 (2p for 100 agents). No confirmation by others shortens or lengthens it;
//   - then the node's kernel is asked, by a TCP connection to the agent's port. It answers within p, or the node is dead.
//
// A node that dies is noticed by the first prober after p/2 on average (each of n agents probes one at random), and at the
// worst, with two others that begin at the same time, after 3p. Then come p, p and p. So it is taken for dead after 3.5p on
// average and 6p at the worst: with the default of 200 ms after 0.7 s, at most 1.2 s. News of it spreads by gossip each p/4.
//
// What makes so fast a pace safe is the last step. An agent that is late because its machine is overloaded has a kernel that
// answers: the node counts as alive for Config.CrashGrace, in which the agent says that it lives. The same goes for an agent
// that has crashed and comes back. One that finds itself late with its own probes waits longer for others (up to 8
// intervals) before it accuses them (Lifeguard's local health awareness).
//
// An agent that ends properly says so, and is gone for all within a gossip interval or two.
//
// # What agents say of themselves
//
// [announcer.Agent] is versioned, and the newest version counts. A change goes to every other agent: in packets of gossip if
// it is small, else over TCP. All of it is exchanged when an agent joins, and with one other agent each 10 seconds, so that
// what was lost arrives. What a dead agent said dies with it.
package members

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hashicorp/memberlist"

	"github.com/longshore-lb/longshore/announcer"
)

const (
	suspicion     = 1 // probe intervals between suspect and dead, for up to 10 agents
	gossipPerPace = 4 // rounds of gossip in a probe interval
	dialTimeout   = 2 * time.Second

	// syncInterval is the time between two exchanges of all that is known, each with another agent: what got lost on the way
	// is learned then. memberlist makes it longer for more than 32 agents.
	syncInterval = 10 * time.Second

	// joinInterval is the time between rounds of attempts to join the nodes that are not members, and joinRound how
	// many are tried in one: a single success brings every other member with it.
	joinInterval = time.Second
	joinRound    = 3

	// leaveTimeout is how long a leaving agent waits for its farewell to be sent.
	leaveTimeout = 2 * time.Second

	// label keeps other users of memberlist on the same port out, whatever their key.
	label = "longshore"

	// datagram is how many bytes of a message of ours fit into one packet of gossip, in any case (memberlist's
	// UDPBufferSize, less what it adds and its own news).
	datagram = 1000
)

// Config says who this agent is and where it talks to the others.
type Config struct {
	Node          string         // this node's name, unique among the members
	Bind          netip.AddrPort // the node's own address, to bind to and to be reached at (UDP and TCP); not unspecified
	Key           []byte         // 16, 24 or 32 bytes to encrypt with AES-128, -192 or -256; empty = in the clear
	ProbeInterval time.Duration  // the pace of failure detection, see the package; positive
	CrashGrace    time.Duration  // how long an agent that has crashed has to come back on a node that lives; 0 = no time
	Log           *slog.Logger
}

// Members is the set of agents that gossip with this one.
type Members struct {
	config  Config
	changed chan struct{}
	joins   chan struct{} // size 1: targets changed
	spreads chan struct{} // size 1: the own word changed
	queue   memberlist.TransmitLimitedQueue

	mu      sync.Mutex
	targets []netip.AddrPort
	list    *memberlist.Memberlist     // while Run runs
	crashed map[string]netip.AddrPort  // agents that are gone without a farewell, from nodes that seem to live
	agents  map[string]announcer.Agent // what agents said of themselves last, this one too; some may be dead
	told    bool                       // whether this agent has said anything
	errands map[string]uint64          // version of the own word that is on its way to a member
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
	if config.ProbeInterval <= 0 {
		return nil, fmt.Errorf("members: probe interval %s: must be positive", config.ProbeInterval)
	}
	m := &Members{
		config:  config,
		changed: make(chan struct{}, 1),
		joins:   make(chan struct{}, 1),
		spreads: make(chan struct{}, 1),
		crashed: map[string]netip.AddrPort{},
		agents:  map[string]announcer.Agent{},
		errands: map[string]uint64{},
	}
	m.queue.RetransmitMult = 4 // times log10 of the agents, as memberlist does with its own news
	m.queue.NumNodes = func() int { return max(len(m.Alive()), 1) }
	return m, nil
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
	poke(m.spreads)

	var working sync.WaitGroup
	working.Go(func() { m.join(ctx, list) })
	working.Go(func() { m.spread(ctx, list) })
	defer working.Wait()
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
	c.ProbeInterval = m.config.ProbeInterval
	c.ProbeTimeout = m.config.ProbeInterval / 2
	c.SuspicionMult = suspicion
	c.SuspicionMaxTimeoutMult = 1
	c.GossipInterval = m.config.ProbeInterval / gossipPerPace
	c.PushPullInterval = syncInterval
	c.TCPTimeout = dialTimeout
	c.DeadNodeReclaimTime = time.Nanosecond // a dead node may come back with another address, at once
	c.EnableCompression = false             // messages are compact
	c.Events = events{ctx, m}
	c.Delegate = delegate{m}
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

// Agents is what each living agent says of itself, by the name of its node: those of Alive. An agent that has not said
// anything yet is there with the zero value.
//
// What an earlier process on this node said of itself, if others remember it, stands until Tell, and its claims are added to
// those of a Tell that came before. So an agent that comes back after a crash finds the claims that it had.
func (m *Members) Agents() map[string]announcer.Agent {
	alive := m.Alive()
	m.mu.Lock()
	defer m.mu.Unlock()
	agents := make(map[string]announcer.Agent, len(alive))
	for _, name := range alive {
		agents[name] = m.agents[name]
	}
	return agents
}

// Tell replaces what this agent says of itself, and sends it to all others; the whole value, whose Version does not count. Of
// several in a row the last one may be all that others hear.
func (m *Members) Tell(a announcer.Agent) {
	m.mu.Lock()
	a.Version = m.agents[m.config.Node].Version + 1
	m.agents[m.config.Node] = a
	m.told = true
	m.mu.Unlock()
	poke(m.spreads)
	poke(m.changed)
}

// spread sends the own word to all others whenever it changes: in packets of gossip if it fits, else over a TCP connection
// to each.
func (m *Members) spread(ctx context.Context, list *memberlist.Memberlist) {
	var errands sync.WaitGroup
	defer errands.Wait()
	for {
		select {
		case <-ctx.Done():
			return
		case <-m.spreads:
		}
		message, version := m.word()
		if version == 0 {
			continue
		}
		if len(message) <= datagram {
			m.queue.QueueBroadcast(word{m.config.Node, message})
			continue
		}
		for _, n := range list.Members() {
			if n.Name == m.config.Node || !m.errand(n.Name, version) {
				continue
			}
			errands.Go(func() {
				// What does not arrive is learned at the next exchange of everything.
				if err := list.SendReliable(n, message); err != nil {
					m.config.Log.Debug("tell an agent", "node", n.Name, "error", err)
				}
				m.mu.Lock()
				delete(m.errands, n.Name)
				newer := m.agents[m.config.Node].Version > version
				m.mu.Unlock()
				if newer {
					poke(m.spreads)
				}
			})
		}
	}
}

// errand tells whether nothing is on its way to a member, and notes that something is now.
func (m *Members) errand(name string, version uint64) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, busy := m.errands[name]; busy {
		return false
	}
	m.errands[name] = version
	return true
}

// word is the message that says what this agent says of itself; version 0 = nothing.
func (m *Members) word() (message []byte, version uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	own := m.agents[m.config.Node]
	return encode(m.config.Node, own), own.Version
}

// heard takes in what an agent said of itself, unless something newer is known, and tells whether it was news of another one.
func (m *Members) heard(message []byte) (about string, news bool) {
	node, a, err := decode(message)
	if err != nil {
		m.config.Log.Debug("message of another agent", "error", err)
		return "", false
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	known := m.agents[node]
	switch {
	case node == m.config.Node && m.told:
		// Of an earlier process here, if it is not what this one said. What this one says must count as newer, and it may
		// want to keep what it had.
		if a.Version < known.Version || a.Version == known.Version && reflect.DeepEqual(a, known) {
			return node, false
		}
		known.Version = a.Version + 1
		maps.Copy(a.Claims, known.Claims)
		known.Claims = a.Claims
		m.agents[node] = known
		poke(m.spreads)
		poke(m.changed)
	case a.Version > known.Version:
		m.agents[node] = a
		poke(m.changed)
		return node, node != m.config.Node
	}
	return node, false
}

// forget drops what an agent said that is gone.
func (m *Members) forget(name string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.agents, name)
}

// watchCrashed keeps a node among the living while its kernel answers at the agent's port, refusing the connection or
// not: the node lives, only its agent does not. Its data plane works on, and every connection through it would break if
// its addresses went elsewhere. The agent has the grace to come back.
func (m *Members) watchCrashed(ctx context.Context, name string, at netip.AddrPort) {
	deadline := time.Now().Add(m.config.CrashGrace)
	dialer := net.Dialer{Timeout: m.config.ProbeInterval} // a node that lives answers from its kernel
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
		case <-time.After(m.config.ProbeInterval):
		}
	}
	m.mu.Lock()
	if m.crashed[name] == at { // else it is back
		delete(m.crashed, name)
		delete(m.agents, name)
	}
	m.mu.Unlock()
	poke(m.changed)
}

func (m *Members) isCrashed(name string, at netip.AddrPort) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.crashed[name] == at
}

// Changed receives when Alive or Agents may have changed. It holds one message: many changes may come as one.
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
	poke(e.spreads) // the one that joined may have missed the own word
}

func (e events) NotifyLeave(n *memberlist.Node) {
	defer poke(e.changed)
	addr, ok := netip.AddrFromSlice(n.Addr)
	if !ok || string(n.Meta) == metaLeaving || e.ctx.Err() != nil || e.config.CrashGrace == 0 {
		e.forget(n.Name)
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

// delegate exchanges what agents say of themselves, and says whether this one is about to end. memberlist keeps none of the
// slices that it is given, and changes those that it gives.
type delegate struct{ *Members }

func (d delegate) NodeMeta(int) []byte {
	if d.leaving.Load() {
		return []byte(metaLeaving)
	}
	return nil
}

// NotifyMsg passes news on, as gossip does: the one that they are about tells a few others only.
func (d delegate) NotifyMsg(message []byte) {
	if about, news := d.heard(message); news && len(message) <= datagram {
		d.queue.QueueBroadcast(word{about, slices.Clone(message)})
	}
}

func (d delegate) GetBroadcasts(overhead, limit int) [][]byte {
	return d.queue.GetBroadcasts(overhead, limit)
}

// LocalState is what all living agents said, each message after its length: what one of them could not be told by another,
// it is told by a third.
func (d delegate) LocalState(bool) (state []byte) {
	for name, a := range d.Agents() {
		if a.Version > 0 {
			message := encode(name, a)
			state = append(binary.AppendUvarint(state, uint64(len(message))), message...)
		}
	}
	return state
}

func (d delegate) MergeRemoteState(state []byte, _ bool) {
	r := &reader{rest: state}
	for len(r.rest) > 0 && !r.failed {
		if message := r.bytes(r.number()); !r.failed {
			d.heard(message)
		}
	}
}

// word is a message about an agent that is on its way by gossip; the next one about it takes its place.
type word struct {
	about   string
	message []byte
}

func (w word) Name() string                          { return w.about }
func (w word) Message() []byte                       { return w.message }
func (w word) Invalidates(memberlist.Broadcast) bool { return false } // by name
func (w word) Finished()                             {}

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
