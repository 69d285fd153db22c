package bgp

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
)

// operation is one step from the table in use to the desired one.
type operation struct {
	verb   verb
	peer   Peer         // of addPeer and removePeer
	prefix netip.Prefix // of announce and withdraw
	path   path         // of announce; of withdraw: the path in use
}

type verb string

// In the order in which they are applied: what must go goes first; a peer comes when its routes are there, and gets all of them at once.
const (
	removePeer verb = "remove neighbor"
	withdraw   verb = "withdraw route"
	announce   verb = "announce route"
	addPeer    verb = "add neighbor"
)

// String is the operation in words, for logs and tests.
func (o operation) String() string {
	switch o.verb {
	case addPeer, removePeer:
		return fmt.Sprintf("%s %s %v as %d", o.verb, o.peer.Name, o.peer.Address, o.peer.PeerASN)
	default:
		return fmt.Sprintf("%s %v next-hop %v", o.verb, o.prefix, o.path.nextHop)
	}
}

// diff returns the operations that lead from one table to another. A peer that changed in any field is removed and
// added anew; a path that changed is announced again, which replaces it at the peers without a gap.
func diff(from, to table) []operation {
	var ops []operation
	for _, p := range from.peers {
		if !slices.Contains(to.peers, p) {
			ops = append(ops, operation{verb: removePeer, peer: p})
		}
	}
	for _, prefix := range prefixes(from) {
		if _, ok := to.paths[prefix]; !ok {
			ops = append(ops, operation{verb: withdraw, prefix: prefix, path: from.paths[prefix]})
		}
	}
	for _, prefix := range prefixes(to) {
		if old, ok := from.paths[prefix]; !ok || old != to.paths[prefix] {
			ops = append(ops, operation{verb: announce, prefix: prefix, path: to.paths[prefix]})
		}
	}
	for _, p := range to.peers {
		if !slices.Contains(from.peers, p) {
			ops = append(ops, operation{verb: addPeer, peer: p})
		}
	}
	return ops
}

// prefixes returns the prefixes of t in order.
func prefixes(t table) []netip.Prefix {
	ps := make([]netip.Prefix, 0, len(t.paths))
	for p := range t.paths {
		ps = append(ps, p)
	}
	slices.SortFunc(ps, func(a, b netip.Prefix) int {
		return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
	})
	return ps
}
