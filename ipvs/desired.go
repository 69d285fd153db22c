package ipvs

import (
	"maps"
	"net/netip"
	"slices"
	"time"
)

// Wish is what one owner wants the kernel to hold.
type Wish struct {
	State
	// Drain is how long a real server that is no longer wanted keeps its open connections, at weight 0; 0 = it is
	// removed at once.
	Drain time.Duration
	// Leaving is the frontends of which only these real servers may drain, such as those of UDP: nobody is there any
	// more to end a connection of one that has stopped serving. At other frontends every real server may.
	Leaving map[Frontend][]netip.AddrPort
}

// Desired is everything the kernel of a node should hold, kept as what each owner (a Service, or the node
// itself) wants. Its cost per change is that of the owner that changes, whatever the number of owners.
//
// Owners may share addresses: a route or a prefix in a set stays while one owner wants it. A frontend has
// one owner: the first that asked for it keeps it until it lets go, the others wait in line.
//
// A real server that an owner no longer wants drains: it stays at weight 0 until [Desired.EndDrains] or its virtual
// server ends it, and has its weight back if it is wanted again. Who was there before, see [Desired.Adopt], drains too.
//
// The zero value is ready for use. It is not safe for concurrent use.
type Desired struct {
	// Seed, if it is not 0, gives the order in which real servers are added, so that not every node begins with the
	// same one. Those of scheduler mh always come in the order of their addresses: its table depends on that.
	Seed uint32
	// Gone is how many real servers were still draining when their virtual server went.
	Gone int

	wishes   map[string]wish
	claims   map[Frontend][]string // owners that ask for a frontend, in the order they came
	routes   map[netip.Prefix][]string
	prefixes map[Element]int // elements by prefix: how many owners want them
	drains   map[Frontend]map[netip.AddrPort]drain
	leftover leftover
}

// wish is a Wish as it is kept: a third of the memory.
type wish struct {
	servers  []server // by frontend
	routes   []route  // by prefix
	prefixes []Element
	drain    time.Duration
}

type server struct {
	VirtualServer
	reals    []RealServer // by address
	elements []Element
	picky    bool // only those in leaving may drain
	leaving  []netip.AddrPort
}

type route struct {
	to     netip.Prefix
	source netip.Addr
}

// drain is a real server that is no longer wanted and still there.
type drain struct {
	real  RealServer // with weight 0
	until time.Time
}

// Conflict says that an owner did not get a frontend because another one has it.
type Conflict struct {
	Frontend      Frontend
	Owner, Holder string
}

// ReplaceAll sets what owners want (the zero Wish: nothing) and returns the operations that follow from it. What one of
// them lets go and another one takes over is never without an owner, so that a frontend which changes hands keeps its
// virtual server. Owners that ask for the same come in the order of their names.
func (d *Desired) ReplaceAll(wishes map[string]Wish, now time.Time) []Operation {
	if d.wishes == nil {
		d.wishes = map[string]wish{}
		d.claims = map[Frontend][]string{}
		d.routes = map[netip.Prefix][]string{}
		d.prefixes = map[Element]int{}
		d.drains = map[Frontend]map[netip.AddrPort]drain{}
	}
	owners := slices.Sorted(maps.Keys(wishes))
	var mentioned []wish
	for _, owner := range owners {
		mentioned = append(mentioned, d.wishes[owner], compact(wishes[owner]))
	}
	before := d.part(mentioned)
	for i, owner := range owners {
		old, next := mentioned[2*i], mentioned[2*i+1]
		leave(d.claims, owner, frontends(old), frontends(next))
		leave(d.routes, owner, prefixes(old), prefixes(next))
		for _, e := range old.prefixes {
			d.count(e, -1)
		}
	}
	for i, owner := range owners {
		old, next := mentioned[2*i], mentioned[2*i+1]
		join(d.claims, owner, frontends(old), frontends(next))
		join(d.routes, owner, prefixes(old), prefixes(next))
		for _, e := range next.prefixes {
			d.count(e, 1)
		}
		if len(next.servers)+len(next.routes)+len(next.prefixes) == 0 {
			delete(d.wishes, owner)
		} else {
			d.wishes[owner] = next
		}
	}
	for _, w := range mentioned {
		for _, s := range w.servers {
			d.drainWhatLeaves(s.Frontend, before.RealServers[s.Frontend], now)
		}
	}
	after := d.part(mentioned)
	for _, w := range mentioned {
		d.claimed(w)
	}
	return d.order(difference(before, after))
}

// drainWhatLeaves notes which of the real servers that a frontend has had go on without new connections.
func (d *Desired) drainWhatLeaves(f Frontend, had map[netip.AddrPort]RealServer, now time.Time) {
	s, limit := d.holder(f)
	if s == nil {
		d.Gone += len(d.drains[f])
		delete(d.drains, f)
		return
	}
	draining := d.drains[f]
	for at, r := range had {
		_, wanted := s.find(at)
		_, drains := draining[at]
		switch may := limit > 0 && (!s.picky || slices.Contains(s.leaving, at)); {
		case wanted || !may:
			delete(draining, at)
		case !drains:
			if draining == nil {
				draining = map[netip.AddrPort]drain{}
				d.drains[f] = draining
			}
			r.Weight = 0
			draining[at] = drain{r, now.Add(limit)}
		}
	}
	if len(draining) == 0 {
		delete(d.drains, f)
	}
}

// Draining is how many real servers drain.
func (d *Desired) Draining() int {
	n := 0
	for _, of := range d.drains {
		n += len(of)
	}
	return n
}

// DrainingFrontends is the frontends with real servers that drain.
func (d *Desired) DrainingFrontends() []Frontend {
	return slices.SortedFunc(maps.Keys(d.drains), Frontend.Compare)
}

// Drained is why drains ended.
type Drained struct{ Empty, Timeout int }

// EndDrains removes the real servers that have drained: those without a connection, and those whose time is over.
// connections is how many a real server has, open ones and those that are about to be forgotten; one that is not in
// there is taken to have none.
func (d *Desired) EndDrains(now time.Time, connections map[Frontend]map[netip.AddrPort]int) ([]Operation, Drained) {
	var ops []Operation
	var why Drained
	for f, draining := range d.drains {
		for at, dr := range draining {
			switch {
			case connections[f][at] == 0:
				why.Empty++
			case !now.Before(dr.until):
				why.Timeout++
			default:
				continue
			}
			ops = append(ops, Operation{Verb: Delete, Kind: KindRealServer, VirtualServer: VirtualServer{Frontend: f}, RealServer: dr.real})
			delete(draining, at)
		}
		if len(draining) == 0 {
			delete(d.drains, f)
		}
	}
	return order(nil, ops), why
}

// leftover is what the kernel held before there was any wish, as far as no wish has claimed it.
type leftover struct {
	State                           // its elements are those by prefix
	elements map[Frontend][]Element // the others
}

// Adopt takes what the kernel holds for the state that the first wishes are compared with. What of it they do not
// mention stays until [Desired.Settle].
func (d *Desired) Adopt(observed State) {
	d.leftover = leftover{elements: map[Frontend][]Element{}, State: State{
		VirtualServers: maps.Clone(observed.VirtualServers), RealServers: maps.Clone(observed.RealServers), Routes: maps.Clone(observed.Routes),
	}}
	d.leftover.Elements = map[Element]struct{}{}
	for e := range observed.Elements {
		if e.OfFrontend() {
			d.leftover.elements[e.Frontend] = append(d.leftover.elements[e.Frontend], e)
		} else {
			d.leftover.Elements[e] = struct{}{}
		}
	}
}

// Settle returns the operations that remove what was adopted and nobody has asked for since.
func (d *Desired) Settle() []Operation {
	nobodys := d.leftover.State
	for _, of := range d.leftover.elements {
		for _, e := range of {
			nobodys.addElement(e)
		}
	}
	d.leftover = leftover{}
	return Diff(nobodys, State{})
}

// claimed takes from the leftovers what a wish mentions and somebody has now.
func (d *Desired) claimed(w wish) {
	for _, s := range w.servers {
		if len(d.claims[s.Frontend]) > 0 {
			delete(d.leftover.VirtualServers, s.Frontend)
			delete(d.leftover.RealServers, s.Frontend)
			delete(d.leftover.elements, s.Frontend)
		}
	}
	for _, r := range w.routes {
		if len(d.routes[r.to]) > 0 {
			delete(d.leftover.Routes, r.to)
		}
	}
	for _, e := range w.prefixes {
		if d.prefixes[e] > 0 {
			delete(d.leftover.Elements, e)
		}
	}
}

// Repair is what has to be done to an observed state that should be the desired one and may not be. Its cost is that of
// all owners.
func (d *Desired) Repair(observed State) []Operation {
	return d.order(difference(observed, d.State()))
}

func (d *Desired) order(add, del []Operation) []Operation {
	if d.Seed != 0 {
		for i := range add {
			o := &add[i]
			if o.Kind != KindRealServer {
				continue
			}
			if s, _ := d.holder(o.VirtualServer.Frontend); s != nil && s.Scheduler != "mh" {
				o.rank = rank(d.Seed, o.RealServer.Addr)
			}
		}
	}
	return order(add, del)
}

// rank is a hash (FNV-1a, 32 bits) of an address.
func rank(seed uint32, at netip.AddrPort) uint32 {
	h := seed
	for _, b := range at.Addr().As16() {
		h = (h ^ uint32(b)) * 16777619
	}
	return (h ^ uint32(at.Port())) * 16777619
}

// compact makes a wish what is kept of it.
func compact(w Wish) wish {
	c := wish{drain: w.Drain}
	for _, f := range slices.SortedFunc(maps.Keys(w.VirtualServers), Frontend.Compare) {
		s := server{VirtualServer: w.VirtualServers[f], reals: make([]RealServer, 0, len(w.RealServers[f]))}
		for _, r := range w.RealServers[f] {
			s.reals = append(s.reals, r)
		}
		slices.SortFunc(s.reals, func(a, b RealServer) int { return a.Addr.Compare(b.Addr) })
		s.leaving, s.picky = w.Leaving[f]
		c.servers = append(c.servers, s)
	}
	for e := range w.Elements {
		if !e.OfFrontend() {
			c.prefixes = append(c.prefixes, e)
		} else if i, ok := c.find(e.Frontend); ok {
			c.servers[i].elements = append(c.servers[i].elements, e)
		}
	}
	for to, source := range w.Routes {
		c.routes = append(c.routes, route{to, source})
	}
	slices.SortFunc(c.routes, func(a, b route) int { return a.to.Compare(b.to) })
	return c
}

func (w wish) find(f Frontend) (int, bool) {
	return slices.BinarySearchFunc(w.servers, f, func(s server, f Frontend) int { return s.Frontend.Compare(f) })
}

func (w wish) source(to netip.Prefix) netip.Addr {
	i, _ := slices.BinarySearchFunc(w.routes, to, func(r route, to netip.Prefix) int { return r.to.Compare(to) })
	return w.routes[i].source
}

func (s *server) find(at netip.AddrPort) (int, bool) {
	return slices.BinarySearchFunc(s.reals, at, func(r RealServer, at netip.AddrPort) int { return r.Addr.Compare(at) })
}

func frontends(w wish) []Frontend {
	out := make([]Frontend, len(w.servers))
	for i, s := range w.servers {
		out[i] = s.Frontend
	}
	return out
}

func prefixes(w wish) []netip.Prefix {
	out := make([]netip.Prefix, len(w.routes))
	for i, r := range w.routes {
		out[i] = r.to
	}
	return out
}

// count notes that one more owner, or one less, wants an element by prefix.
func (d *Desired) count(e Element, n int) {
	if d.prefixes[e] += n; d.prefixes[e] == 0 {
		delete(d.prefixes, e)
	}
}

// leave takes an owner out of the lines of what it no longer wants.
func leave[K comparable](claims map[K][]string, owner string, old, next []K) {
	for _, k := range old {
		if slices.Contains(next, k) {
			continue
		}
		line := slices.DeleteFunc(slices.Clone(claims[k]), func(o string) bool { return o == owner })
		if len(line) == 0 {
			delete(claims, k)
		} else {
			claims[k] = line
		}
	}
}

// join puts an owner at the end of the lines of what it newly wants.
func join[K comparable](claims map[K][]string, owner string, old, next []K) {
	for _, k := range next {
		if !slices.Contains(old, k) {
			claims[k] = append(claims[k], owner)
		}
	}
}

// part is the desired state, as it is now, of all that some wishes mention.
func (d *Desired) part(wishes []wish) State {
	var s State
	for _, w := range wishes {
		for _, v := range w.servers {
			d.addFrontend(&s, v.Frontend)
		}
		for _, r := range w.routes {
			d.addRoute(&s, r.to)
		}
		for _, e := range w.prefixes {
			d.addElement(&s, e)
		}
	}
	return s
}

// holder is what the owner that has a frontend wants for it, nil if nobody has it, and how long real servers may drain.
func (d *Desired) holder(f Frontend) (*server, time.Duration) {
	line := d.claims[f]
	if len(line) == 0 {
		return nil, 0
	}
	w := d.wishes[line[0]]
	i, _ := w.find(f)
	return &w.servers[i], w.drain
}

// addFrontend copies what the holder of a frontend wants for it: its virtual server, real servers and elements.
func (d *Desired) addFrontend(s *State, f Frontend) {
	v, _ := d.holder(f)
	if v == nil {
		d.addLeftover(s, f)
		return
	}
	s.AddVirtualServer(v.VirtualServer, v.reals...)
	for _, dr := range d.drains[f] {
		s.AddVirtualServer(v.VirtualServer, dr.real)
	}
	for _, e := range v.elements {
		s.addElement(e)
	}
}

func (d *Desired) addLeftover(s *State, f Frontend) {
	if v, ok := d.leftover.VirtualServers[f]; ok {
		s.AddVirtualServer(v)
		s.RealServers[f] = d.leftover.RealServers[f]
	}
	for _, e := range d.leftover.elements[f] {
		s.addElement(e)
	}
}

func (d *Desired) addRoute(s *State, to netip.Prefix) {
	if line := d.routes[to]; len(line) > 0 {
		s.AddRoute(to, d.wishes[line[0]].source(to))
	} else if source, ok := d.leftover.Routes[to]; ok {
		s.AddRoute(to, source)
	}
}

func (d *Desired) addElement(s *State, e Element) {
	if _, left := d.leftover.Elements[e]; left || d.prefixes[e] > 0 {
		s.addElement(e)
	}
}

// State is the whole desired state. Its cost is that of all owners.
func (d *Desired) State() State {
	var s State
	for f := range d.claims {
		d.addFrontend(&s, f)
	}
	for to := range d.routes {
		d.addRoute(&s, to)
	}
	for e := range d.prefixes {
		s.addElement(e)
	}
	return s
}

// Conflicts lists the frontends that an owner asked for and did not get, in order.
func (d *Desired) Conflicts(owner string) []Conflict {
	var out []Conflict
	for _, s := range d.wishes[owner].servers {
		if holder := d.claims[s.Frontend][0]; holder != owner {
			out = append(out, Conflict{Frontend: s.Frontend, Owner: owner, Holder: holder})
		}
	}
	return out
}

// Holder is the owner that has a frontend, "" if nobody has.
func (d *Desired) Holder(f Frontend) string {
	if line := d.claims[f]; len(line) > 0 {
		return line[0]
	}
	return ""
}

// RealServers is how many real servers a frontend should have, without those that drain.
func (d *Desired) RealServers(f Frontend) int {
	if s, _ := d.holder(f); s != nil {
		return len(s.reals)
	}
	return 0
}
