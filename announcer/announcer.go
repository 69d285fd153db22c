// Package announcer says who tells the network where a Service's address is, and what.
//
// It is pure. Packages announcer/layer2 (ARP, NDP) and announcer/bgp put it on the wire;
// announcer/members tells which agents are alive, and carries what they say of themselves.
package announcer

import (
	"net/netip"
	"slices"
)

// Address is an address this node answers for on its links (layer 2).
type Address struct {
	Addr       netip.Addr
	Interfaces []string // names of the links to answer on; empty = every usable one
	Yielding   bool     // another node is to have it: it is answered for and not announced, and claims of others are not fought
}

// Route is a prefix this node advertises to BGP peers, as one path.
type Route struct {
	Prefix      netip.Prefix
	Peers       []string // names of the peers that get it; empty = all
	LocalPref   uint32   // LOCAL_PREF (RFC 4271 section 5.1.5), iBGP only; 0 = not set
	MED         uint32   // MULTI_EXIT_DISC (RFC 4271 section 5.1.4), lower is preferred; 0 = not set, which means the same
	Prepend     uint8    // how many times our AS is added to AS_PATH beyond the once that is usual, eBGP only
	Communities []string // a:b (RFC 1997) or large:a:b:c (RFC 8092)
}

// Link is a link of a node on which addresses can be answered for.
type Link struct {
	Name       string
	IPv4, IPv6 bool // whether it has a subnet of the family: an address that names no links is answered for there
}

// Reaches tells whether a node with these links can answer for an address on links of these names; empty = every one.
func Reaches(links []Link, addr netip.Addr, names []string) bool {
	return slices.ContainsFunc(links, func(l Link) bool {
		if len(names) > 0 {
			return slices.Contains(names, l.Name)
		}
		return addr.Is6() && l.IPv6 || addr.Is4() && l.IPv4
	})
}

// Agent is what an agent says of itself to the others. The zero value is one that has not said anything.
type Agent struct {
	Version uint64                // grows with each change; 0 = it has not said anything
	Able    bool                  // it answers for addresses: it knows the others, has a majority with them and is not about to end
	Links   []Link                // usable ones, sorted by name
	Claims  map[netip.Addr]uint64 // the addresses that it answers for, with the epoch of each claim; not to be changed
}

// Conflict is a claim of another machine to an address that is answered for here, and not about to be given away.
type Conflict struct {
	Addr         netip.Addr
	Interface    string // the link on which it was heard
	HardwareAddr string // the other's MAC address
}

// Gratuitous is a kind of announcement that nobody asked for: by gratuitous ARP or unsolicited advertisement.
type Gratuitous struct {
	Protocol string // arp, ndp
	Reason   string // one of the following
}

// Why neighbours are told of an address without having asked.
const (
	Takeover  = "takeover" // the address has come to this node
	Carrier   = "carrier"  // the link has come up, or is another one than before
	Periodic  = "periodic" // some time has passed
	Contested = "conflict" // another machine claims the address
)
