package announcer

import "net/netip"

// Candidate is a node that could announce an address.
type Candidate struct {
	Node       string // its name, unique in the cluster
	Preference int    // higher is preferred; any range
}

// Elect chooses the one node that announces an address: among the candidates of the highest preference, the
// one with the highest random weight for this address. It returns "" if there is no candidate.
//
// It is a pure function of its arguments, and every node that calls it with the same candidates, in any order,
// gets the same answer: no lease, no message. Addresses spread evenly over the candidates, and a candidate that
// goes moves its own addresses only (Thaler and Ravishankar, "Using Name-Based Mappings to Increase Hit Rates",
// 1998: rendezvous hashing). A candidate listed twice counts once, with its higher preference.
//
// The weight is part of the contract between agents of different versions: 64-bit FNV-1a over the address in
// its shortest form (4 or 16 bytes, network order, no zone) and the bytes of the node's name, finished by the
// mixer of MurmurHash3 (fmix64), without which names that differ in their last byte alone would get weights that
// differ in few bits. The smaller name wins a tie.
func Elect(addr netip.Addr, candidates []Candidate) (owner string) {
	var best Candidate
	var bestWeight uint64
	address := addr.Unmap().WithZone("").AsSlice()
	for i, c := range candidates {
		w := weight(address, c.Node)
		if i > 0 {
			switch {
			case c.Preference < best.Preference:
				continue
			case c.Preference > best.Preference:
			case w < bestWeight, w == bestWeight && c.Node >= best.Node:
				continue
			}
		}
		best, bestWeight = c, w
	}
	return best.Node
}

// weight is the rendezvous weight of a node for an address.
func weight(address []byte, node string) uint64 {
	const offset, prime = 14695981039346656037, 1099511628211 // FNV-1a, 64 bits
	h := uint64(offset)
	for _, b := range address {
		h = (h ^ uint64(b)) * prime
	}
	for i := range len(node) {
		h = (h ^ uint64(node[i])) * prime
	}
	h ^= h >> 33
	h *= 0xff51afd7ed558ccd
	h ^= h >> 33
	h *= 0xc4ceb9fe1a85ec53
	h ^= h >> 33
	return h
}
