package controller

import (
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
)

// slot is an address that at least one Service holds.
type slot struct {
	addr    netip.Addr
	holders map[string]*holder
	ports   map[Port]string // to the Service that has it
	group   *group          // where others find it to share it; nil = nobody may
}

func newSlot(addr netip.Addr) *slot {
	return &slot{addr: addr, holders: map[string]*holder{}, ports: map[Port]string{}}
}

func (s *slot) enter(h *holder) {
	s.holders[h.request.Key] = h
	for _, port := range h.request.Ports {
		s.ports[port] = h.request.Key
	}
}

func (s *slot) leave(h *holder) {
	delete(s.holders, h.request.Key)
	for _, port := range h.request.Ports {
		delete(s.ports, port)
		if s.group != nil {
			s.group.opened(s.addr, port)
		}
	}
}

// terms are those of the holders, which all have the same, without the pool; false if they do not share the address.
func (s *slot) terms() (terms, bool) {
	for _, h := range s.holders {
		return terms{key: h.request.SharingKey, backend: h.request.Backend, family: familyOf(s.addr)}, h.request.SharingKey != ""
	}
	return terms{}, false
}

// admit says why a Service may not share the address, nil if it may or has it to itself.
func (s *slot) admit(r Request, refuse func(string, ...any) *AllocationError) *AllocationError {
	for _, other := range s.holders {
		switch o := other.request; {
		case o.Key == r.Key:
			continue
		case r.SharingKey == "" || o.SharingKey != r.SharingKey:
			return refuse("is held by service %s, which does not share it", s.oldest(r.Key))
		case o.Backend != r.Backend:
			return refuse("is held by service %s, whose externalTrafficPolicy or selector differs", s.oldest(r.Key))
		}
	}
	for _, port := range r.Ports {
		if owner, used := s.ports[port]; used && owner != r.Key {
			return refuse("is shared with service %s, which has port %s too", owner, port)
		}
	}
	return nil
}

// oldest names the oldest holder other than one, so that messages do not change from call to call.
func (s *slot) oldest(except string) string {
	var turns []turn
	for key, holder := range s.holders {
		if key != except {
			turns = append(turns, turnOf(holder.request))
		}
	}
	return slices.MinFunc(turns, turn.compare).key
}

// terms are what Services on one address have in common, and where the address is.
type terms struct {
	key     string
	backend string
	pool    string
	family  corev1.IPFamily
}

// group is the addresses that are shared on the same terms. For each port it finds the lowest one where the port is not
// in use, the way a space finds the lowest free one.
type group struct {
	terms terms
	slots []*slot // by address, ascending
	gaps  map[Port]*gap
}

// gap is the addresses of a group where a port is not in use: below mark only those in opened.
type gap struct {
	mark   netip.Addr
	opened lowestFirst // may have addresses that have left, or where the port is in use again
}

func (g *group) position(addr netip.Addr) (int, bool) {
	return slices.BinarySearchFunc(g.slots, addr, func(s *slot, addr netip.Addr) int { return s.addr.Compare(addr) })
}

func (g *group) add(s *slot) {
	i, found := g.position(s.addr)
	if found {
		return
	}
	g.slots = slices.Insert(g.slots, i, s)
	for port := range g.gaps {
		g.opened(s.addr, port)
	}
}

func (g *group) remove(s *slot) {
	if i, found := g.position(s.addr); found {
		g.slots = slices.Delete(g.slots, i, i+1)
	}
}

// opened notes that a port may not be in use on an address.
func (g *group) opened(addr netip.Addr, port Port) {
	if gap := g.gaps[port]; gap != nil && addr.Less(gap.mark) {
		gap.opened.add(addr)
	}
}

// lowest is the lowest address where none of the ports is in use and which the caller admits.
func (g *group) lowest(ports []Port, admit func(netip.Addr) bool) (netip.Addr, bool) {
	var from netip.Addr
	for _, port := range ports {
		lowest, ok := g.lowestWithout(port)
		if !ok {
			return netip.Addr{}, false
		}
		if from.Less(lowest) {
			from = lowest
		}
	}
	i, _ := g.position(from)
	for _, s := range g.slots[i:] {
		if admit(s.addr) {
			return s.addr, true
		}
	}
	return netip.Addr{}, false
}

// lowestWithout is the lowest address where a port is not in use.
func (g *group) lowestWithout(port Port) (netip.Addr, bool) {
	if g.gaps == nil {
		g.gaps = map[Port]*gap{}
	}
	if g.gaps[port] == nil {
		g.gaps[port] = &gap{}
	}
	gap := g.gaps[port]
	unused := func(s *slot) bool { _, used := s.ports[port]; return !used }
	if addr, ok := gap.opened.first(func(addr netip.Addr) bool {
		i, found := g.position(addr)
		return found && unused(g.slots[i])
	}); ok {
		return addr, true
	}
	i, _ := g.position(gap.mark)
	for ; i < len(g.slots); i++ {
		gap.mark = g.slots[i].addr
		if unused(g.slots[i]) {
			return gap.mark, true
		}
	}
	return netip.Addr{}, false
}
