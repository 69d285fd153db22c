// Package announcer says who tells the network where a Service's address is, and what.
//
// It is pure. Packages announcer/layer2 (ARP, NDP) and announcer/bgp put it on the wire;
// announcer/members tells which agents are alive.
package announcer

import "net/netip"

// Address is an address this node answers for on its links (layer 2).
type Address struct {
	Addr       netip.Addr
	Interfaces []string // names of the links to answer on; empty = every usable one
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
