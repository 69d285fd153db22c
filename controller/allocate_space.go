package controller

import (
	"container/heap"
	"encoding/binary"
	"math"
	"math/bits"
	"net/netip"
	"slices"

	"github.com/longshore-lb/longshore/config"
)

// space is the addresses of one pool in one family, and finds the lowest free one without a walk over the others:
// all addresses below a mark are taken, left out, or in freed; none above the mark has been looked at.
// Its cost is one heap operation per address given or freed, plus one step of the mark per address ever taken.
type space struct {
	ranges     []config.Range // ascending, disjoint
	avoidBuggy bool           // leave out x.x.x.0 and x.x.x.255

	current int         // range that the mark is in; len(ranges) when all have been passed
	mark    netip.Addr  // in the current range
	freed   lowestFirst // below the mark; may have addresses that were taken since

	size     int64 // how many addresses there are, at most math.MaxInt64
	taken    int64 // of them held by a Service or reserved
	assigned int64 // of them held by a Service
}

func newSpace(ranges []config.Range, avoidBuggy bool) *space {
	slices.SortFunc(ranges, func(a, b config.Range) int { return a.From.Compare(b.From) })
	s := &space{ranges: ranges, avoidBuggy: avoidBuggy}
	for _, r := range ranges {
		s.size = saturatingAdd(s.size, rangeSize(r, avoidBuggy))
	}
	if len(ranges) > 0 {
		s.mark = ranges[0].From
	}
	return s
}

// lowest returns the lowest address that is not taken. It changes nothing that can be seen: the address stays free.
func (s *space) lowest(taken func(netip.Addr) bool) (netip.Addr, bool) {
	if addr, ok := s.freed.first(func(addr netip.Addr) bool { return !taken(addr) }); ok {
		return addr, true
	}
	for s.current < len(s.ranges) {
		if !(s.avoidBuggy && isBuggy(s.mark)) && !taken(s.mark) {
			return s.mark, true
		}
		s.advance()
	}
	return netip.Addr{}, false
}

func (s *space) advance() {
	if s.mark != s.ranges[s.current].To {
		s.mark = s.mark.Next()
		return
	}
	s.current++
	if s.current < len(s.ranges) {
		s.mark = s.ranges[s.current].From
	}
}

// free tells the space that an address in it is not taken any more.
func (s *space) free(addr netip.Addr) {
	if s.current == len(s.ranges) || addr.Less(s.mark) {
		s.freed.add(addr)
	}
}

// isBuggy tells addresses that some old equipment takes for a network's or a broadcast address.
func isBuggy(addr netip.Addr) bool {
	if !addr.Is4() {
		return false
	}
	last := addr.As4()[3]
	return last == 0 || last == 255
}

// rangeSize counts the addresses of a range, at most math.MaxInt64.
func rangeSize(r config.Range, avoidBuggy bool) int64 {
	fromHigh, fromLow := halves(r.From)
	toHigh, toLow := halves(r.To)
	low, borrow := bits.Sub64(toLow, fromLow, 0)
	high, _ := bits.Sub64(toHigh, fromHigh, borrow)
	if high != 0 || low >= math.MaxInt64 {
		return math.MaxInt64
	}
	size := int64(low) + 1
	if avoidBuggy && r.From.Is4() {
		// Of any 256 addresses in a row two are left out; what is short of 256 is counted one by one.
		size -= size / 256 * 2
		for addr, rest := r.From, (int64(low)+1)%256; rest > 0; addr, rest = addr.Next(), rest-1 {
			if isBuggy(addr) {
				size--
			}
		}
	}
	return size
}

func halves(addr netip.Addr) (high, low uint64) {
	b := addr.As16()
	return binary.BigEndian.Uint64(b[:8]), binary.BigEndian.Uint64(b[8:])
}

func saturatingAdd(a, b int64) int64 {
	if a > math.MaxInt64-b {
		return math.MaxInt64
	}
	return a + b
}

// lowestFirst is a set of addresses that gives the lowest one which is still of use. It forgets the others only when it
// comes across them.
type lowestFirst struct {
	heap addrHeap
	set  map[netip.Addr]struct{} // what is in heap
}

func (l *lowestFirst) add(addr netip.Addr) {
	if _, known := l.set[addr]; known {
		return
	}
	if l.set == nil {
		l.set = map[netip.Addr]struct{}{}
	}
	l.set[addr] = struct{}{}
	heap.Push(&l.heap, addr)
}

func (l *lowestFirst) first(useful func(netip.Addr) bool) (netip.Addr, bool) {
	for len(l.heap) > 0 {
		if useful(l.heap[0]) {
			return l.heap[0], true
		}
		delete(l.set, heap.Pop(&l.heap).(netip.Addr))
	}
	return netip.Addr{}, false
}

// addrHeap is a container/heap with the lowest address first.
type addrHeap []netip.Addr

func (h addrHeap) Len() int           { return len(h) }
func (h addrHeap) Less(i, j int) bool { return h[i].Less(h[j]) }
func (h addrHeap) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *addrHeap) Push(x any)        { *h = append(*h, x.(netip.Addr)) }
func (h *addrHeap) Pop() any {
	last := (*h)[len(*h)-1]
	*h = (*h)[:len(*h)-1]
	return last
}
