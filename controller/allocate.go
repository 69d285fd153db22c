package controller

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/longshore-lb/longshore/config"
)

// Allocator decides which Service has which address. It is pure: it talks to nobody, has no clock, and gives the same
// answers to the same calls. The cost of a call is proportional to what it changes; only [Allocator.SetPools] looks at
// every Service. It is not safe for concurrent use.
//
// A requested address comes before a requested pool, that before the pools pinned to the Service's namespace or
// labels, and those before the other pools with autoAssign; pools of one kind go by priority (0 is last), then by name.
// Within a pool an address shared under the Service's key comes first, then the lowest free address. Who has an address
// keeps it as long as it fits.
//
// After a restart the order of calls is: SetPools, [Allocator.Adopt] for every Service with an address in its status,
// then [Allocator.Assign] for every Service, the oldest first.
type Allocator struct {
	pools    map[string]*pool
	order    []*pool               // as pools are tried
	extents  []extent              // of all pools, ascending
	reserved map[netip.Addr]string // to its owner

	holders map[string]*holder
	slots   map[netip.Addr]*slot
	groups  map[terms]*group
	waiting waiting
}

// Assignment is the addresses of one Service.
type Assignment struct {
	Addresses []netip.Addr // in the order of the Service's families
	Pool      string       // the pool they are from; if two serve it, both names with a comma between
}

// PoolCounts is how many addresses of a pool are held by Services and how many are left, by family. Numbers that are
// too big for an int64 are math.MaxInt64.
type PoolCounts struct {
	AssignedIPv4, AssignedIPv6   int64
	AvailableIPv4, AvailableIPv6 int64
}

// holder is what the allocator knows of one Service, whether it holds anything or waits.
type holder struct {
	request   Request
	addrs     []netip.Addr
	obstacles []obstacle // what it waits for; nil = it has all it asks for
}

type pool struct {
	config.Pool
	v4, v6 *space
}

func (p *pool) space(family corev1.IPFamily) *space {
	if family == corev1.IPv4Protocol {
		return p.v4
	}
	return p.v6
}

// allows tells whether the pool serves a Service at all.
func (p *pool) allows(r Request) bool { return p.Allows(r.Namespace, r.NamespaceLabels, r.Labels) }

// extent is one range of one pool.
type extent struct {
	config.Range
	pool *pool
}

// NewAllocator returns an allocator without pools.
func NewAllocator() *Allocator {
	return &Allocator{
		pools:   map[string]*pool{},
		holders: map[string]*holder{},
		slots:   map[netip.Addr]*slot{},
		groups:  map[terms]*group{},
		waiting: newWaiting(),
	}
}

// SetPools replaces all pools. Their names must be unique and no address may be in two ranges; package config refuses
// others. It returns the Services that hold an address which no pool gives them any more, the oldest first: they hold
// it until [Allocator.Assign] moves them.
func (a *Allocator) SetPools(pools []config.Pool) (misfits []string) {
	a.pools = make(map[string]*pool, len(pools))
	a.order, a.extents = nil, nil
	for _, c := range pools {
		var v4, v6 []config.Range
		for _, r := range c.Ranges {
			if r.From.Is4() {
				v4 = append(v4, r)
			} else {
				v6 = append(v6, r)
			}
		}
		p := &pool{Pool: c, v4: newSpace(v4, c.AvoidBuggyIPs), v6: newSpace(v6, c.AvoidBuggyIPs)}
		a.pools[c.Name] = p
		a.order = append(a.order, p)
		for _, r := range c.Ranges {
			a.extents = append(a.extents, extent{r, p})
		}
	}
	slices.SortFunc(a.order, comparePools)
	slices.SortFunc(a.extents, func(x, y extent) int { return x.From.Compare(y.From) })

	for addr := range a.reserved {
		if s := a.spaceOf(addr); s != nil {
			s.taken++
		}
	}
	clear(a.groups)
	for addr, held := range a.slots {
		if s := a.spaceOf(addr); s != nil {
			s.assigned++
			if _, reserved := a.reserved[addr]; !reserved {
				s.taken++
			}
		}
		held.group = nil
		a.join(held)
	}
	for _, o := range slices.Collect(maps.Keys(a.waiting.queues)) {
		a.waiting.went(o)
	}

	var turns []turn
	for _, s := range a.holders {
		for _, addr := range s.addrs {
			if a.admit(s.request, addr, false) != nil {
				turns = append(turns, turnOf(s.request))
				break
			}
		}
	}
	slices.SortFunc(turns, turn.compare)
	for _, t := range turns {
		misfits = append(misfits, t.key)
	}
	return misfits
}

// comparePools puts pinned pools first, then goes by priority, then by name.
func comparePools(p, q *pool) int {
	rank := func(p *pool) int {
		if p.Pinned() {
			return 0
		}
		return 1
	}
	priority := func(p *pool) int {
		if p.Priority == 0 {
			return math.MaxInt
		}
		return p.Priority
	}
	return cmp.Or(cmp.Compare(rank(p), rank(q)), cmp.Compare(priority(p), priority(q)), cmp.Compare(p.Name, q.Name))
}

// SetReserved replaces the addresses that are never given out because somebody else has them, such as a node or the API
// server, each with its owner for messages ("node worker-1"). A Service that already holds one keeps it.
func (a *Allocator) SetReserved(owners map[netip.Addr]string) {
	before := a.reserved
	a.reserved = maps.Clone(owners)
	for addr := range owners {
		if _, was := before[addr]; !was && a.slots[addr] == nil {
			if s := a.spaceOf(addr); s != nil {
				s.taken++
			}
		}
	}
	for addr := range before {
		if _, still := owners[addr]; still {
			continue
		}
		held := a.slots[addr]
		if held == nil {
			a.nowFree(addr)
			continue
		}
		a.waiting.went(obstacle{addr: addr}) // its holders may share it again
		if held.group != nil {
			a.waiting.went(obstacle{key: held.group.terms.key})
		}
	}
}

// Adopt records that a Service holds addresses, as its status says, before anybody is assigned new ones. What else it
// asks for is looked at by the next [Allocator.Assign]. It fails with an [*AllocationError], and the Service does not
// hold the address, if no pool gives it to this Service, or if other Services hold it and do not share it. The
// Service's other addresses are adopted all the same.
func (a *Allocator) Adopt(r Request, addrs []netip.Addr) error {
	s := a.holder(r)
	var (
		fitting []netip.Addr
		refused *AllocationError
	)
	for _, addr := range addrs {
		if err := a.admit(r, addr, true); err != nil {
			refused = cmp.Or(refused, err)
			continue
		}
		fitting = append(fitting, addr)
	}
	slices.SortFunc(fitting, netip.Addr.Compare)
	a.settle(s, r, inOrder(slices.Compact(fitting), r.Families), nil)
	if refused != nil {
		return refused
	}
	return nil
}

// Assign gives a Service what it asks for and returns it. If what the Service has still fits, nothing changes; else
// as little as possible does. It fails with an [*AllocationError]; the Service then holds nothing and waits (see
// [Allocator.Waiting]). A Service that prefers two families and finds an address in one of them has no error, but
// waits for the other.
func (a *Allocator) Assign(r Request) (Assignment, error) {
	s := a.holder(r)
	addrs, obstacles, err := a.plan(s, r)
	if err != nil {
		a.settle(s, r, nil, append(obstacles, obstacle{}))
		return Assignment{}, err
	}
	a.settle(s, r, addrs, obstacles)
	return a.assignment(s), nil
}

// Release forgets a Service that was deleted or needs no address any more. It tells whether the Service held an address.
func (a *Allocator) Release(key string) (freed bool) {
	s := a.holders[key]
	if s == nil {
		return false
	}
	freed = len(s.addrs) > 0
	a.settle(s, s.request, nil, nil)
	delete(a.holders, key)
	return freed
}

// Assigned returns what a Service holds, and whether it holds anything.
func (a *Allocator) Assigned(key string) (Assignment, bool) {
	s := a.holders[key]
	if s == nil || len(s.addrs) == 0 {
		return Assignment{}, false
	}
	return a.assignment(s), true
}

// Counts returns the numbers of a pool, all zero for one that does not exist.
func (a *Allocator) Counts(name string) PoolCounts {
	p := a.pools[name]
	if p == nil {
		return PoolCounts{}
	}
	available := func(s *space) int64 {
		if s.size == math.MaxInt64 {
			return s.size
		}
		return s.size - s.taken
	}
	return PoolCounts{
		AssignedIPv4: p.v4.assigned, AvailableIPv4: available(p.v4),
		AssignedIPv6: p.v6.assigned, AvailableIPv6: available(p.v6),
	}
}

func (a *Allocator) holder(r Request) *holder {
	h := a.holders[r.Key]
	if h == nil {
		h = &holder{request: r}
		a.holders[r.Key] = h
	}
	return h
}

func (a *Allocator) assignment(s *holder) Assignment {
	var names []string
	for _, addr := range s.addrs {
		if p := a.poolOf(addr); p != nil && !slices.Contains(names, p.Name) {
			names = append(names, p.Name)
		}
	}
	return Assignment{Addresses: slices.Clone(s.addrs), Pool: strings.Join(names, ",")}
}

// plan finds the addresses that a Service should hold, without giving them to it, and what keeps it from getting more.
func (a *Allocator) plan(s *holder, r Request) ([]netip.Addr, []obstacle, error) {
	if r.RequireDualStack && len(r.Families) < 2 {
		return nil, nil, r.refuse("spec.ipFamilyPolicy", string(corev1.IPFamilyPolicyRequireDualStack), "but the Service has one family only")
	}
	if len(r.Addresses) > 0 {
		return a.planRequested(r)
	}

	var (
		addrs     []netip.Addr
		obstacles []obstacle
		lacking   *AllocationError
	)
	for _, family := range r.Families {
		if addr, ok := a.kept(s, r, family); ok {
			addrs = append(addrs, addr)
			continue
		}
		addr, blocked, err := a.pick(r, family)
		if err != nil {
			lacking = cmp.Or(lacking, err)
			obstacles = append(obstacles, blocked...)
			continue
		}
		addrs = append(addrs, addr)
	}
	if lacking != nil && (r.RequireDualStack || len(addrs) == 0) {
		return nil, obstacles, lacking
	}
	if lacking != nil {
		obstacles = append(obstacles, obstacle{})
	}
	return addrs, obstacles, nil
}

// planRequested checks the addresses that a Service names itself: it gets all of them or none.
func (a *Allocator) planRequested(r Request) ([]netip.Addr, []obstacle, error) {
	for _, addr := range r.Addresses {
		if !slices.Contains(r.Families, familyOf(addr)) {
			return nil, nil, r.refuse(r.AddressesFrom, addr.String(), "is %s, the Service is not", familyOf(addr))
		}
		if err := a.admit(r, addr, false); err != nil {
			return nil, []obstacle{{addr: addr}}, err
		}
	}
	if r.RequireDualStack && len(r.Addresses) < 2 {
		return nil, nil, r.refuse(r.AddressesFrom, r.Addresses[0].String(), "is one address, RequireDualStack needs one of each family")
	}
	return inOrder(r.Addresses, r.Families), nil, nil
}

// kept is the address of a family that the Service already holds, if it still fits.
func (a *Allocator) kept(s *holder, r Request, family corev1.IPFamily) (netip.Addr, bool) {
	for _, addr := range s.addrs {
		if familyOf(addr) == family && a.admit(r, addr, false) == nil {
			return addr, true
		}
	}
	return netip.Addr{}, false
}

// pick finds an address of a family that the Service may get, without giving it to it.
func (a *Allocator) pick(r Request, family corev1.IPFamily) (netip.Addr, []obstacle, *AllocationError) {
	candidates, err := a.candidates(r)
	if err != nil {
		return netip.Addr{}, nil, err
	}
	var (
		names     []string
		obstacles []obstacle
	)
	for _, p := range candidates {
		if addr, ok := a.shareable(r, terms{r.SharingKey, r.Backend, p.Name, family}); ok {
			return addr, nil, nil
		}
		if addr, ok := p.space(family).lowest(a.isTaken); ok {
			return addr, nil, nil
		}
		if p.space(family).size > 0 {
			names = append(names, p.Name)
			obstacles = append(obstacles, obstacle{pool: p.Name, family: family})
		}
	}
	if r.SharingKey != "" {
		obstacles = append(obstacles, obstacle{key: r.SharingKey})
	}
	reason := fmt.Sprintf("no %s address is free in %s", family, strings.Join(names, ", "))
	if len(names) == 0 {
		reason = fmt.Sprintf("no pool has %s addresses for it", family)
	}
	if r.Pool != "" {
		reason = fmt.Sprintf("has no free %s address", family)
	}
	return netip.Addr{}, obstacles, r.refuse(r.PoolFrom, r.Pool, "%s", reason)
}

// candidates are the pools that a Service without a requested address may be served from, in order.
func (a *Allocator) candidates(r Request) ([]*pool, *AllocationError) {
	if r.Pool != "" {
		p := a.pools[r.Pool]
		if p == nil {
			return nil, r.refuse(r.PoolFrom, r.Pool, "is not a pool")
		}
		if !p.allows(r) {
			return nil, r.refuse(r.PoolFrom, r.Pool, "is a pool whose serviceAllocation does not allow this Service")
		}
		return []*pool{p}, nil
	}
	var candidates []*pool
	for _, p := range a.order {
		if p.AutoAssign && p.allows(r) {
			candidates = append(candidates, p)
		}
	}
	return candidates, nil
}

// shareable is the lowest address that other Services hold on these terms and that this one may share.
func (a *Allocator) shareable(r Request, t terms) (netip.Addr, bool) {
	g := a.groups[t]
	if g == nil {
		return netip.Addr{}, false
	}
	return g.lowest(r.Ports, func(addr netip.Addr) bool { return a.admit(r, addr, false) == nil })
}

// admit says why a Service may not hold an address, nil if it may. Whether it holds it already makes no difference, but
// for a reserved address; adopting says that it does.
func (a *Allocator) admit(r Request, addr netip.Addr, adopting bool) *AllocationError {
	refuse := func(format string, args ...any) *AllocationError {
		from := r.AddressesFrom
		if adopting {
			from = "status.loadBalancer.ingress"
		}
		return r.refuse(from, addr.String(), format, args...)
	}
	p := a.poolOf(addr)
	switch {
	case p == nil:
		return refuse("is in no pool")
	case a.spaceOf(addr) == nil:
		return refuse("is left out by avoidBuggyIPs of pool %s", p.Name)
	case !p.allows(r):
		return refuse("is in pool %s, whose serviceAllocation does not allow this Service", p.Name)
	case !adopting && r.Pool != "" && r.Pool != p.Name:
		return refuse("is in pool %s, %s asks for %s", p.Name, r.PoolFrom, r.Pool)
	}
	held := a.slots[addr]
	if owner, reserved := a.reserved[addr]; reserved && !adopting && (held == nil || held.holders[r.Key] == nil) {
		return refuse("is the address of %s", owner)
	}
	if held == nil {
		return nil
	}
	return held.admit(r, refuse)
}

// settle makes a Service hold exactly these addresses under this request, and wait for what is in its way.
func (a *Allocator) settle(s *holder, r Request, addrs []netip.Addr, obstacles []obstacle) {
	a.waiting.remove(turnOf(s.request), s.obstacles)
	before, was := s.addrs, s.request
	same := slices.Equal(before, addrs) && slices.Equal(was.Ports, r.Ports) &&
		was.SharingKey == r.SharingKey && was.Backend == r.Backend
	if !same {
		for _, addr := range before {
			a.leave(s, addr)
		}
	}
	s.request, s.addrs, s.obstacles = r, addrs, obstacles
	if !same {
		for _, addr := range addrs {
			a.enter(s, addr)
		}
		for _, addr := range before {
			if held := a.slots[addr]; len(held.holders) == 0 {
				a.vacate(addr)
			}
			a.waiting.went(obstacle{addr: addr})
		}
		if was.SharingKey != "" && len(before) > 0 {
			a.waiting.went(obstacle{key: was.SharingKey})
		}
		if r.SharingKey != "" && len(addrs) > 0 {
			a.waiting.went(obstacle{key: r.SharingKey})
		}
	}
	a.waiting.add(turnOf(r), obstacles)
}

// enter makes a Service a holder of an address.
func (a *Allocator) enter(h *holder, addr netip.Addr) {
	held := a.slots[addr]
	if held == nil {
		held = newSlot(addr)
		a.slots[addr] = held
		if space := a.spaceOf(addr); space != nil {
			space.assigned++
			if _, reserved := a.reserved[addr]; !reserved {
				space.taken++
			}
		}
	}
	held.enter(h)
	if held.group == nil {
		a.join(held)
	}
}

// leave ends that; the address is not given back yet.
func (a *Allocator) leave(h *holder, addr netip.Addr) {
	held := a.slots[addr]
	held.leave(h)
	if len(held.holders) == 0 && held.group != nil {
		held.group.remove(held)
		if len(held.group.slots) == 0 {
			delete(a.groups, held.group.terms)
		}
		held.group = nil
	}
}

// join puts an address whose holder shares it among those that others may share.
func (a *Allocator) join(held *slot) {
	terms, ok := held.terms()
	p := a.poolOf(held.addr)
	if !ok || p == nil {
		return
	}
	terms.pool = p.Name
	if a.groups[terms] == nil {
		a.groups[terms] = &group{terms: terms}
	}
	held.group = a.groups[terms]
	held.group.add(held)
}

// vacate gives an address without holders back to its pool.
func (a *Allocator) vacate(addr netip.Addr) {
	delete(a.slots, addr)
	if space := a.spaceOf(addr); space != nil {
		space.assigned--
	}
	if _, reserved := a.reserved[addr]; !reserved {
		a.nowFree(addr)
	}
}

// nowFree tells everyone concerned that an address is neither held nor reserved any more.
func (a *Allocator) nowFree(addr netip.Addr) {
	a.waiting.went(obstacle{addr: addr})
	if space := a.spaceOf(addr); space != nil {
		space.taken--
		space.free(addr)
		a.waiting.went(obstacle{pool: a.poolOf(addr).Name, family: familyOf(addr)})
	}
}

// isTaken tells whether an address is held or reserved.
func (a *Allocator) isTaken(addr netip.Addr) bool {
	if _, reserved := a.reserved[addr]; reserved {
		return true
	}
	return a.slots[addr] != nil
}

// poolOf returns the pool that an address is in, nil if it is in none.
func (a *Allocator) poolOf(addr netip.Addr) *pool {
	i, found := slices.BinarySearchFunc(a.extents, addr, func(e extent, addr netip.Addr) int { return e.From.Compare(addr) })
	if !found {
		i--
	}
	if i < 0 || a.extents[i].To.Less(addr) {
		return nil
	}
	return a.extents[i].pool
}

// spaceOf returns the addresses that one is among, nil if no pool gives it to anybody.
func (a *Allocator) spaceOf(addr netip.Addr) *space {
	if p := a.poolOf(addr); p != nil && !(p.AvoidBuggyIPs && isBuggy(addr)) {
		return p.space(familyOf(addr))
	}
	return nil
}

// inOrder sorts addresses as their families are ordered.
func inOrder(addrs []netip.Addr, families []corev1.IPFamily) []netip.Addr {
	sorted := slices.Clone(addrs)
	slices.SortStableFunc(sorted, func(x, y netip.Addr) int {
		return cmp.Compare(slices.Index(families, familyOf(x)), slices.Index(families, familyOf(y)))
	})
	return sorted
}
