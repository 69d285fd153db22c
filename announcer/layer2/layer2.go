// Package layer2 answers for addresses on the links of the node, by ARP (RFC 826, RFC 5227) for IPv4 and neighbour
// discovery (RFC 4861) for IPv6, and tells the neighbours when such an address has come to the node.
//
// No address is put on any link: the kernel neither knows nor answers for what is announced here. Requests are read
// and answered by packet sockets, which see them before netfilter and routing do, so nothing else on the node has to
// let them through. Everything happens in the network namespace of the process.
//
// # Links
//
// A link is usable if it is up with a carrier, is an Ethernet link, and is not a loopback, NOARP or point-to-point
// link nor enslaved to a bridge, bond or Open vSwitch (whose master is used instead; a link in a VRF stays a link).
// Links are followed as the kernel reports them, not polled.
//
// An address is answered for on the links that it names, if they are usable. One that names no link is answered for on
// every usable link that carries an address of its family which is global (RFC 4291; private and unique local ones
// count) and has a prefix shorter than the whole address: the subnet of that prefix is where neighbours can be that
// ask. This leaves out the node's ends of the pods' veths, which have a host address, a link-local one or none, and
// would otherwise cost two sockets each and hear every announcement. A network whose nodes have only link-local
// IPv6 addresses needs the link named.
//
// # Announcements
//
// When an address comes to a link, or the link comes up, changes its MAC address or fails over to another bond member,
// the neighbours are told five times within about four seconds, the first at once. They are told again every
// minute or so for as long as the address stays, for neighbours and switches that missed it. For IPv4 each time is a
// gratuitous ARP request and a reply, since there are neighbours that heed one and not the other (RFC 5944 section 4.6
// has both); for IPv6 an unsolicited advertisement to all nodes with the override flag (RFC 4861 section 7.2.6, which
// suggests no more than three: a lost one costs more here than one too many). Linux neighbours ignore a change within
// a second of the last one (net.ipv4.neigh.*.locktime), which is one reason for the length of the burst.
package layer2

import (
	"cmp"
	"container/heap"
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/longshore-lb/longshore/announcer"
)

const (
	// defaultRefresh is the mean time between the announcements of an address that stays where it is.
	defaultRefresh = time.Minute

	// conflictInterval is the least time between two conflicts reported, and fought, for one address: DEFEND_INTERVAL
	// of RFC 5227 section 1.1.
	conflictInterval = 10 * time.Second

	// retryInterval is the time until what failed on a link is tried again.
	retryInterval = time.Second
)

// burst is the time from each announcement of a takeover to the next.
var burst = [...]time.Duration{100 * time.Millisecond, 400 * time.Millisecond, 1100 * time.Millisecond, 2500 * time.Millisecond}

// Options tune a Responder. The zero value is right for production.
type Options struct {
	// Refresh is the mean time between two announcements of an address that stays where it is; each is up to a
	// quarter early or late, so that nodes and addresses do not announce in step. 0 = a minute.
	Refresh time.Duration
}

// Announcement is one address that is answered for on one link.
type Announcement struct {
	Addr         netip.Addr
	Interface    string // the link's name
	HardwareAddr string // the link's MAC address, the answer; aa:bb:cc:dd:ee:ff
}

// Responder answers for a set of addresses. Its methods may be called from any goroutine.
type Responder struct {
	log       *slog.Logger
	refresh   time.Duration
	desired   atomic.Pointer[desired]          // read by the goroutines that answer, for every request
	status    atomic.Pointer[[]Announcement]   // written by Run
	links     atomic.Pointer[[]announcer.Link] // likewise
	wake      chan struct{}
	changed   chan struct{}
	conflicts chan announcer.Conflict

	announced [len(protocols)][len(reasons)]atomic.Uint64
	answered  [len(protocols)]atomic.Uint64
}

// protocols is the names of the families' protocols, by familyIndex.
var protocols = [...]string{"arp", "ndp"}

// reason is why neighbours are told of an address without having asked.
type reason int

const (
	takeover reason = iota
	carrier
	periodic
	conflict
)

var reasons = [...]string{
	takeover: announcer.Takeover,
	carrier:  announcer.Carrier,
	periodic: announcer.Periodic,
	conflict: announcer.Contested,
}

// New makes a responder that answers for nothing yet. It opens no socket; Run does.
func New(log *slog.Logger, options Options) *Responder {
	r := &Responder{
		log:       log,
		refresh:   cmp.Or(options.Refresh, defaultRefresh),
		wake:      make(chan struct{}, 1),
		changed:   make(chan struct{}, 1),
		conflicts: make(chan announcer.Conflict, 64),
	}
	r.desired.Store(newDesired(nil))
	r.status.Store(&[]Announcement{})
	r.links.Store(&[]announcer.Link{})
	return r
}

// Set replaces the addresses to answer for by these; the whole value. When it returns, requests for an address that
// is no longer among them go unanswered, and those for a new one are answered on links that are open already;
// joining groups, opening links and announcing is left to Run. An address that occurs twice is answered for on the
// links of both. Addresses that no neighbour can resolve (multicast, loopback, unspecified) are logged and left out.
func (r *Responder) Set(addrs []announcer.Address) {
	valid := make([]announcer.Address, 0, len(addrs))
	for _, a := range addrs {
		a.Addr = a.Addr.Unmap().WithZone("")
		if !a.Addr.IsGlobalUnicast() && !a.Addr.IsLinkLocalUnicast() {
			r.log.Warn("not an address to answer for", "address", a.Addr)
			continue
		}
		valid = append(valid, a)
	}
	r.desired.Store(newDesired(valid))
	poke(r.wake)
}

// Status is what is answered for on which link, sorted by address and link. An address that is set and missing here has
// no usable link, or Run has not come to it yet. The slice is shared: do not change it.
func (r *Responder) Status() []Announcement { return *r.status.Load() }

// Answering tells whether an address is answered for on some link now.
func (r *Responder) Answering(addr netip.Addr) bool {
	return slices.ContainsFunc(r.Status(), func(a Announcement) bool { return a.Addr == addr })
}

// Links is the usable links, sorted by name; none before Run. The slice is shared: do not change it.
func (r *Responder) Links() []announcer.Link { return *r.links.Load() }

// Announcements is how often neighbours were told of an address without having asked, on one link at a time, since New.
func (r *Responder) Announcements() map[announcer.Gratuitous]uint64 {
	counts := map[announcer.Gratuitous]uint64{}
	for p := range r.announced {
		for why := range r.announced[p] {
			counts[announcer.Gratuitous{Protocol: protocols[p], Reason: reasons[why]}] = r.announced[p][why].Load()
		}
	}
	return counts
}

// Answers is how many requests of neighbours were answered since New, by protocol: arp, ndp.
func (r *Responder) Answers() map[string]uint64 {
	counts := map[string]uint64{}
	for p := range r.answered {
		counts[protocols[p]] = r.answered[p].Load()
	}
	return counts
}

// Changed receives after Status or Links has changed. It holds one message: many changes may come as one.
func (r *Responder) Changed() <-chan struct{} { return r.changed }

// Conflicts receives the claims of others to our addresses, at most one per address in 10 seconds. Each is answered
// by announcing the address once more (RFC 5227 section 2.4 (b)). Those that nobody receives are dropped after 64.
func (r *Responder) Conflicts() <-chan announcer.Conflict { return r.conflicts }

// Run answers and announces until ctx ends, and returns nil then. It returns an error if the kernel does not report
// its links at the start; troubles on single links are logged and tried again. Call it once.
func (r *Responder) Run(ctx context.Context) error {
	watch, err := newWatch()
	if err != nil {
		return fmt.Errorf("watch links: %w", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	l := &loop{
		Responder: r,
		ctx:       ctx,
		watch:     watch,
		ports:     map[int]*port{},
		claims:    make(chan claim, 64),
		failed:    make(chan failure),
		defended:  map[netip.Addr]time.Time{},
		troubles:  map[trouble]string{},
	}
	defer l.serving.Wait()
	defer l.closeAll()
	defer cancel()
	l.run()
	return nil
}

// desired is the value that Set was given, arranged by link. It is never changed after newDesired.
type desired struct {
	everywhere map[netip.Addr]struct{}            // on every link that carries the family
	named      map[string]map[netip.Addr]struct{} // on the link of this name
	yielding   map[netip.Addr]struct{}            // without announcing them
}

func newDesired(addrs []announcer.Address) *desired {
	d := &desired{everywhere: map[netip.Addr]struct{}{}, named: map[string]map[netip.Addr]struct{}{}, yielding: map[netip.Addr]struct{}{}}
	for _, a := range addrs {
		if a.Yielding {
			d.yielding[a.Addr] = struct{}{}
		}
		if len(a.Interfaces) == 0 {
			d.everywhere[a.Addr] = struct{}{}
		}
		for _, name := range a.Interfaces {
			if d.named[name] == nil {
				d.named[name] = map[netip.Addr]struct{}{}
			}
			d.named[name][a.Addr] = struct{}{}
		}
	}
	return d
}

// yields tells whether an address is to be answered for only, since another node is to have it.
func (d *desired) yields(addr netip.Addr) bool {
	_, ok := d.yielding[addr]
	return ok
}

// on tells whether an address is to be answered for on a usable link.
func (d *desired) on(l link, addr netip.Addr) bool {
	if _, ok := d.named[l.name][addr]; ok {
		return true
	}
	_, ok := d.everywhere[addr]
	return ok && l.carries(addr)
}

// each calls f for every address to be answered for on a usable link; for some of them twice.
func (d *desired) each(l link, f func(netip.Addr)) {
	for addr := range d.named[l.name] {
		f(addr)
	}
	if l.carries4 || l.carries6 {
		for addr := range d.everywhere {
			if l.carries(addr) {
				f(addr)
			}
		}
	}
}

// loop is the state of Run. One goroutine owns it; those that answer send it what they find.
type loop struct {
	*Responder
	ctx      context.Context
	watch    *watch
	ports    map[int]*port // by index of the link; those on which something is, or should be, announced
	schedule schedule
	retry    time.Time // when to reconcile again because something failed; zero = nothing did
	claims   chan claim
	failed   chan failure
	defended map[netip.Addr]time.Time // last conflict
	troubles map[trouble]string       // logged, and not over
	serving  sync.WaitGroup
}

// port is a link on which addresses are answered for.
type port struct {
	link      link
	wires     [2]wire // ARP, NDP; nil while no address of the family is wanted
	announced map[netip.Addr]*announcement
}

// wire is one protocol on one link.
type wire interface {
	// join lets the requests for an address reach this wire; leave undoes it.
	join(netip.Addr) error
	leave(netip.Addr)
	// announce tells all neighbours once that the address is here.
	announce(netip.Addr) error
	// serve answers the requests for addresses that are wanted, and calls claimed for each message in which another MAC
	// address claims one of them, and answered for each answer sent, until the wire is closed or fails.
	serve(wanted func(netip.Addr) bool, claimed func(addr netip.Addr, by mac), answered func()) error
	close()
}

// claim is a message that says a wanted address is at another MAC address.
type claim struct {
	port *port
	addr netip.Addr
	by   mac
}

// failure is the end of a wire that was not asked for.
type failure struct {
	port   *port
	family int
	err    error
}

// trouble names something that can fail on a link.
type trouble struct {
	link, operation string
}

func (l *loop) run() {
	l.reconcileAll(takeover)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		if next := l.next(); next.IsZero() {
			timer.Stop()
		} else {
			timer.Reset(time.Until(next))
		}
		select {
		case <-l.ctx.Done():
			return
		case <-l.wake:
			l.reconcileAll(takeover)
		case u, ok := <-l.watch.links:
			if !ok {
				l.watchAgain()
			} else if index, ok := l.watch.linkChanged(u); ok {
				l.reconcileOne(index)
			}
		case u, ok := <-l.watch.addrs:
			if !ok {
				l.watchAgain()
			} else {
				l.reconcileOne(l.watch.addrChanged(u))
			}
		case f := <-l.failed:
			l.wireFailed(f)
		case c := <-l.claims:
			l.defend(c)
		case now := <-timer.C:
			if !l.retry.IsZero() && !now.Before(l.retry) {
				l.retry = time.Time{}
				if l.watch.broken() {
					l.watchAgain()
				} else {
					l.reconcileAll(carrier)
				}
			}
			l.announceDue(now)
		}
	}
}

// next is the time of the next thing to do by the clock; zero if there is none.
func (l *loop) next() time.Time {
	switch {
	case len(l.schedule) == 0:
		return l.retry
	case l.retry.IsZero() || l.schedule[0].at.Before(l.retry):
		return l.schedule[0].at
	}
	return l.retry
}

// watchAgain replaces a watch that has ended: the kernel had more to say than its socket could hold.
func (l *loop) watchAgain() {
	l.watch.close()
	watch, err := newWatch()
	if err != nil {
		l.report(trouble{"", "watch links"}, err)
		l.retryLater()
		return
	}
	l.report(trouble{"", "watch links"}, nil)
	l.watch = watch
	l.reconcileAll(carrier)
}

func (l *loop) retryLater() {
	if l.retry.IsZero() {
		l.retry = time.Now().Add(retryInterval)
	}
}

// report logs an error the first time that it happens; nil ends it.
func (l *loop) report(t trouble, err error) {
	if err == nil {
		delete(l.troubles, t)
		return
	}
	if text := err.Error(); l.troubles[t] != text {
		l.troubles[t] = text
		l.log.Warn(t.operation, "interface", t.link, "error", err)
	}
}

// reconcileAll brings every link to what is desired on it; why is the reason to tell the neighbours of what is new there.
func (l *loop) reconcileAll(why reason) {
	d := l.desired.Load()
	for addr, at := range l.defended {
		if time.Since(at) >= conflictInterval {
			delete(l.defended, addr)
		}
	}
	changed := false
	for index := range l.ports {
		if _, ok := l.watch.known[index]; !ok {
			changed = l.reconcile(index, d, why) || changed
		}
	}
	for index := range l.watch.known {
		changed = l.reconcile(index, d, why) || changed
	}
	if l.publishLinks() || changed {
		l.publish()
	}
}

func (l *loop) reconcileOne(index int) {
	changed := l.reconcile(index, l.desired.Load(), carrier)
	if l.publishLinks() || changed {
		l.publish()
	}
}

// publishLinks makes the usable links the Links, and tells whether they are others than before.
func (l *loop) publishLinks() bool {
	links := []announcer.Link{}
	for index := range l.watch.known {
		if link, ok := l.watch.usable(index); ok {
			links = append(links, announcer.Link{Name: link.name, IPv4: link.carries4, IPv6: link.carries6})
		}
	}
	slices.SortFunc(links, func(a, b announcer.Link) int { return cmp.Compare(a.Name, b.Name) })
	if slices.Equal(links, l.Links()) {
		return false
	}
	l.links.Store(&links)
	return true
}

// reconcile brings one link to what is desired on it, and tells whether that changed what is announced.
func (l *loop) reconcile(index int, d *desired, why reason) (changed bool) {
	link, usable := l.watch.usable(index)
	p := l.ports[index]
	if p != nil && (!usable || p.link != link) {
		changed = len(p.announced) > 0
		l.close(p)
		p = nil
	}
	if !usable {
		return changed
	}
	if p != nil {
		for addr := range p.announced {
			if !d.on(link, addr) {
				l.withdraw(p, addr)
				changed = true
			}
		}
	}
	d.each(link, func(addr netip.Addr) {
		if p == nil {
			p = &port{link: link, announced: map[netip.Addr]*announcement{}}
			l.ports[index] = p
		}
		if p.announced[addr] == nil && l.announce(p, addr, why) {
			changed = true
		}
	})
	if p != nil && len(p.announced) == 0 {
		l.close(p)
	}
	return changed
}

// announce begins to answer for an address on a port and starts its burst.
func (l *loop) announce(p *port, addr netip.Addr, why reason) bool {
	w, err := l.wire(p, addr)
	if err == nil {
		err = w.join(addr)
	}
	l.report(trouble{p.link.name, "answer for " + family(addr)}, err)
	if err != nil {
		l.retryLater()
		return false
	}
	a := &announcement{port: p, addr: addr, at: time.Now(), why: why}
	p.announced[addr] = a
	heap.Push(&l.schedule, a)
	l.log.Debug("answering for an address", "address", addr, "interface", p.link.name, "mac", p.link.mac)
	return true
}

// withdraw ends answering for an address on a port. The answers themselves stopped when Set did its work.
func (l *loop) withdraw(p *port, addr netip.Addr) {
	a := p.announced[addr]
	delete(p.announced, addr)
	heap.Remove(&l.schedule, a.index)
	if w := p.wires[familyIndex(addr)]; w != nil {
		w.leave(addr)
	}
	l.log.Debug("no longer answering for an address", "address", addr, "interface", p.link.name)
}

// wire is the open socket for the address's family on a port.
func (l *loop) wire(p *port, addr netip.Addr) (wire, error) {
	family := familyIndex(addr)
	if p.wires[family] != nil {
		return p.wires[family], nil
	}
	open := openARP
	if addr.Is6() {
		open = openNDP
	}
	w, err := open(p.link)
	if err != nil {
		return nil, err
	}
	p.wires[family] = w
	l.report(trouble{p.link.name, "read requests"}, nil)
	l.serving.Go(func() {
		err := w.serve(
			func(addr netip.Addr) bool { return l.desired.Load().on(p.link, addr) },
			func(addr netip.Addr, by mac) {
				select {
				case l.claims <- claim{p, addr, by}:
				default: // a flood; one of them got through
				}
			},
			func() { l.answered[family].Add(1) })
		select {
		case l.failed <- failure{p, family, err}:
		case <-l.ctx.Done():
		}
	})
	return w, nil
}

// wireFailed closes the port of a wire that failed, and has it opened again later.
func (l *loop) wireFailed(f failure) {
	if l.ports[f.port.link.index] != f.port || f.port.wires[f.family] == nil {
		return // it was closed
	}
	l.report(trouble{f.port.link.name, "read requests"}, f.err)
	l.close(f.port)
	l.publish()
	l.retryLater()
}

// close forgets a port and all that is announced on it.
func (l *loop) close(p *port) {
	for addr := range p.announced {
		l.withdraw(p, addr)
	}
	for i, w := range p.wires {
		if w != nil {
			w.close()
			p.wires[i] = nil
		}
	}
	delete(l.ports, p.link.index)
}

func (l *loop) closeAll() {
	for _, p := range l.ports {
		l.close(p)
	}
	l.watch.close()
	l.publish()
}

// publish makes the state of the loop the Status.
func (l *loop) publish() {
	status := []Announcement{}
	for _, p := range l.ports {
		for addr := range p.announced {
			status = append(status, Announcement{Addr: addr, Interface: p.link.name, HardwareAddr: p.link.mac.String()})
		}
	}
	slices.SortFunc(status, func(a, b Announcement) int {
		return cmp.Or(a.Addr.Compare(b.Addr), cmp.Compare(a.Interface, b.Interface))
	})
	l.status.Store(&status)
	poke(l.changed)
}

// announceDue sends the announcements that are due.
func (l *loop) announceDue(now time.Time) {
	d := l.desired.Load()
	for len(l.schedule) > 0 && !l.schedule[0].at.After(now) {
		a := l.schedule[0]
		if d.on(a.port.link, a.addr) && !d.yields(a.addr) { // else it is about to be withdrawn
			l.send(a.port, a.addr, a.why)
		}
		if a.sent < len(burst) {
			a.at = now.Add(burst[a.sent])
			a.sent++
		} else {
			a.why = periodic
			a.at = now.Add(time.Duration(float64(l.refresh) * (0.75 + rand.Float64()/2)))
		}
		heap.Fix(&l.schedule, 0)
	}
}

func (l *loop) send(p *port, addr netip.Addr, why reason) {
	err := p.wires[familyIndex(addr)].announce(addr)
	if err == nil {
		l.announced[familyIndex(addr)][why].Add(1)
	}
	l.report(trouble{p.link.name, "announce by " + family(addr)}, err)
}

// defend reports a claim to an address of ours and announces the address in return.
func (l *loop) defend(c claim) {
	if l.ports[c.port.link.index] != c.port || c.port.announced[c.addr] == nil || l.watch.owns(c.by) || l.desired.Load().yields(c.addr) {
		return // it has gone or goes, or another link of this node on the same network made the claim
	}
	now := time.Now()
	if last, ok := l.defended[c.addr]; ok && now.Sub(last) < conflictInterval {
		return
	}
	l.defended[c.addr] = now
	l.log.Warn("another machine claims an address", "address", c.addr, "interface", c.port.link.name, "mac", c.by)
	select {
	case l.conflicts <- announcer.Conflict{Addr: c.addr, Interface: c.port.link.name, HardwareAddr: c.by.String()}:
	default:
	}
	l.send(c.port, c.addr, conflict)
}

// announcement is an address on a port and when the neighbours are told of it next.
type announcement struct {
	port  *port
	addr  netip.Addr
	at    time.Time
	why   reason
	sent  int // of the burst, after its first
	index int // in the schedule
}

// schedule is a heap of announcements, the next one first.
type schedule []*announcement

func (s schedule) Len() int           { return len(s) }
func (s schedule) Less(i, j int) bool { return s[i].at.Before(s[j].at) }
func (s schedule) Swap(i, j int) {
	s[i], s[j] = s[j], s[i]
	s[i].index, s[j].index = i, j
}

func (s *schedule) Push(x any) {
	a := x.(*announcement)
	a.index = len(*s)
	*s = append(*s, a)
}

func (s *schedule) Pop() any {
	old := *s
	a := old[len(old)-1]
	*s = old[:len(old)-1]
	return a
}

func familyIndex(addr netip.Addr) int {
	if addr.Is6() {
		return 1
	}
	return 0
}

func family(addr netip.Addr) string { return [...]string{"ARP", "NDP"}[familyIndex(addr)] }

func poke(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
