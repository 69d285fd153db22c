package layer2

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// mac is an Ethernet address.
type mac [6]byte

func (m mac) String() string { return net.HardwareAddr(m[:]).String() }

// link is what the kernel says of a network interface, as far as it decides what is announced on it. When any of
// it changes, the link is opened anew and the neighbours are told of every address on it.
type link struct {
	index    int
	name     string
	mac      mac
	member   int  // the index of a bond's active member: after a failover the switches have to learn the way anew
	carries4 bool // carries an IPv4 address with a subnet
	carries6 bool
}

// carries tells whether the link has a subnet of the address's family.
func (l link) carries(addr netip.Addr) bool {
	if addr.Is6() {
		return l.carries6
	}
	return l.carries4
}

// netInterface is the link as the packet libraries want it.
func (l link) netInterface() *net.Interface {
	return &net.Interface{Index: l.index, Name: l.name, HardwareAddr: l.mac[:]}
}

// watch follows the links of the namespace and their addresses.
type watch struct {
	links chan netlink.LinkUpdate // closed when the watch has failed; nil once the watch is closed
	addrs chan netlink.AddrUpdate
	done  chan struct{}
	known map[int]*known // by index
}

// known is one link and its addresses.
type known struct {
	attrs    netlink.LinkAttrs
	member   int
	prefixes map[netip.Prefix]struct{}
}

// newWatch subscribes to changes, then lists what there is: what happens in between is seen twice, in the end as it is.
func newWatch() (*watch, error) {
	const buffer = 1 << 20 // bytes, for a thousand changes while the loop is busy
	w := &watch{
		links: make(chan netlink.LinkUpdate, 64),
		addrs: make(chan netlink.AddrUpdate, 64),
		done:  make(chan struct{}),
		known: map[int]*known{},
	}
	if err := netlink.LinkSubscribeWithOptions(w.links, w.done, netlink.LinkSubscribeOptions{ReceiveBufferSize: buffer}); err != nil {
		close(w.done)
		return nil, fmt.Errorf("subscribe to links: %w", err)
	}
	if err := netlink.AddrSubscribeWithOptions(w.addrs, w.done, netlink.AddrSubscribeOptions{ReceiveBufferSize: buffer}); err != nil {
		w.addrs = nil
		w.close()
		return nil, fmt.Errorf("subscribe to addresses: %w", err)
	}
	links, err := netlink.LinkList()
	if err != nil {
		w.close()
		return nil, fmt.Errorf("list links: %w", err)
	}
	for _, l := range links {
		w.see(l)
	}
	addrs, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		w.close()
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	for _, a := range addrs {
		w.addrChanged(netlink.AddrUpdate{LinkIndex: a.LinkIndex, LinkAddress: *a.IPNet, NewAddr: true})
	}
	return w, nil
}

// close ends the watch; what is known stays. Closing it again does nothing.
func (w *watch) close() {
	if w.broken() {
		return
	}
	close(w.done)
	for range w.links { // until the subscription has noticed
	}
	if w.addrs != nil {
		for range w.addrs {
		}
	}
	w.links, w.addrs = nil, nil
}

// broken tells whether the watch has been closed.
func (w *watch) broken() bool { return w.links == nil }

// linkChanged takes a change in and returns the index of the link; not ok if the message is not about a link itself.
func (w *watch) linkChanged(u netlink.LinkUpdate) (index int, ok bool) {
	if u.IfInfomsg.Family != unix.AF_UNSPEC {
		// About a port of a bridge: one that leaves its bridge is reported as deleted.
		return 0, false
	}
	index = int(u.IfInfomsg.Index)
	if u.Header.Type == unix.RTM_DELLINK {
		delete(w.known, index)
		return index, true
	}
	w.see(u.Link)
	return index, true
}

func (w *watch) see(l netlink.Link) {
	attrs := *l.Attrs()
	k := w.knownAt(attrs.Index)
	k.attrs = attrs
	k.member = 0
	if bond, ok := l.(*netlink.Bond); ok {
		k.member = bond.ActiveSlave
	}
}

// addrChanged takes a change in and returns the index of the link.
func (w *watch) addrChanged(u netlink.AddrUpdate) (index int) {
	addr, ok := netip.AddrFromSlice(u.LinkAddress.IP)
	if !ok {
		return u.LinkIndex
	}
	bits, _ := u.LinkAddress.Mask.Size()
	prefix := netip.PrefixFrom(addr.Unmap(), bits)
	if u.NewAddr {
		w.knownAt(u.LinkIndex).prefixes[prefix] = struct{}{}
	} else if k := w.known[u.LinkIndex]; k != nil {
		delete(k.prefixes, prefix)
	}
	return u.LinkIndex
}

func (w *watch) knownAt(index int) *known {
	k := w.known[index]
	if k == nil {
		k = &known{prefixes: map[netip.Prefix]struct{}{}}
		w.known[index] = k
	}
	return k
}

// usable is the link of an index if addresses can be announced on it.
func (w *watch) usable(index int) (link, bool) {
	k := w.known[index]
	if k == nil {
		return link{}, false
	}
	const want = unix.IFF_UP | unix.IFF_RUNNING
	const avoid = unix.IFF_LOOPBACK | unix.IFF_NOARP | unix.IFF_POINTOPOINT
	if k.attrs.RawFlags&(want|avoid) != want || k.attrs.EncapType != "ether" || len(k.attrs.HardwareAddr) != len(mac{}) {
		return link{}, false
	}
	if _, inVRF := k.attrs.Slave.(*netlink.VrfSlave); k.attrs.MasterIndex != 0 && !inVRF {
		return link{}, false
	}
	l := link{index: index, name: k.attrs.Name, mac: mac(k.attrs.HardwareAddr), member: k.member}
	for p := range k.prefixes {
		if p.Addr().IsGlobalUnicast() && p.Bits() < p.Addr().BitLen() {
			l.carries4 = l.carries4 || p.Addr().Is4()
			l.carries6 = l.carries6 || p.Addr().Is6()
		}
	}
	return l, true
}

// owns tells whether a MAC address is that of a link of this node.
func (w *watch) owns(m mac) bool {
	for _, k := range w.known {
		if string(k.attrs.HardwareAddr) == string(m[:]) {
			return true
		}
	}
	return false
}
