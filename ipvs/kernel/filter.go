package kernel

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/longshore-lb/longshore/ipvs"
)

// tableName is the name of our nftables table in each family; nothing in a table of that name is anybody else's.
const tableName = "longshore"

// elementsPerMessage keeps one netlink message below the 64 KiB that an attribute can hold.
const elementsPerMessage = 500

// sendBuffer is enough for a transaction of a million elements, of some 50 bytes each. The kernel takes that much memory
// only while a transaction is that large.
const sendBuffer = 64 << 20

// filter is our nftables tables: one for each of ip and ip6, and one for arp, which silences the kernel for
// our VIPs (it answers ARP for every address that a local route covers, on every node).
//
// The number of tables, chains and rules is fixed. What changes are elements of sets, in one transaction per
// call. In the syntax of nft, the table of a family is:
//
//	chain prerouting { type filter hook prerouting priority mangle
//		ct state ! new accept
//		jump restrict
//		ip saddr @pods meta mark set ip daddr . meta l4proto . th dport map @shortcuts
//		jump locality
//	}
//	chain output { type route hook output priority mangle
//		ct state ! new accept
//		jump restrict
//		meta mark set ip daddr . meta l4proto . th dport map @shortcuts
//		jump locality
//	}
//	chain restrict {
//		ip daddr . meta l4proto . th dport @restricted ip daddr . meta l4proto . th dport . ip saddr != @allowed drop
//	}
//	chain locality {
//		meta mark != 0x4c000000/8 ip daddr . meta l4proto . th dport @dropped drop
//	}
//	chain input { type filter hook input priority filter
//		ct direction reply accept
//		ip daddr . meta l4proto . th dport @frontends accept
//		ip daddr @vips meta l4proto icmp accept
//		ip daddr @vips reject
//		ip daddr @service_cidrs drop
//	}
//	chain unmark { type filter hook output priority filter
//		meta mark 0x4c000000/8 meta mark set 0
//	}
//	chain postrouting { type nat hook postrouting priority srcnat
//		jump external
//	}
//	chain external {
//		ip saddr . ip daddr @hairpin masquerade to :32768-65535
//		ct original ip daddr . meta l4proto . ct original proto-dst @masqueraded ip saddr != @kept masquerade to :32768-65535
//		oif != lo fib saddr type local ct original ip daddr . meta l4proto . ct original proto-dst @frontends masquerade to :32768-65535
//	}
//
// The mark chooses the virtual server: IPVS looks for one of the packet's mark first. It does not stay on the packet: once
// IPVS has taken that, it passes the hook output again, on its way to the real server.
//
// A reply comes to a VIP if a process of this node has it for its own address, as it did while kube-proxy had VIPs on an
// interface. The input chain comes before IPVS (LOCAL_IN, priority 98), the output chain too (LOCAL_OUT, priority -98). IPVS does not
// set the dnat bit of conntrack, but the original tuple tells which frontend a connection came to; for that
// net.ipv4.vs.conntrack is 1. Masquerade takes no port of the range that node ports come from: a reply to such a port would be
// taken for a request.
type filter struct {
	conn     *nftables.Conn
	families [2]*filterFamily // IPv4, IPv6
	arp      *nftables.Table
	arpSets  map[ipvs.Set]*nftables.Set
	rules    [sha256.Size]byte // of what the kernel lists of our rules since prepare
}

type filterFamily struct {
	table *nftables.Table
	sets  map[ipvs.Set]*nftables.Set
}

func newFilter() (*filter, error) {
	// A transaction is one datagram, however many elements it has.
	conn, err := nftables.New(nftables.WithSockOptions(func(c *netlink.Conn) error { return c.SetWriteBuffer(sendBuffer) }))
	if err != nil {
		return nil, fmt.Errorf("open nftables: %w", err)
	}
	f := &filter{conn: conn, arpSets: map[ipvs.Set]*nftables.Set{}}
	for i, family := range [2]nftables.TableFamily{nftables.TableFamilyIPv4, nftables.TableFamilyIPv6} {
		f.families[i] = &filterFamily{
			table: &nftables.Table{Family: family, Name: tableName},
			sets:  map[ipvs.Set]*nftables.Set{},
		}
		for _, set := range sets {
			f.families[i].sets[set.name] = newSet(f.families[i].table, set.name, set.shape)
		}
	}
	f.arp = &nftables.Table{Family: nftables.TableFamilyARP, Name: tableName}
	for _, set := range sets {
		if set.arp {
			f.arpSets[set.name] = newSet(f.arp, set.name, set.shape)
		}
	}
	return f, nil
}

// setShape is what the members of a set look like.
type setShape int

const (
	frontendShape setShape = iota // address . protocol . port
	addressShape                  // address
	prefixShape                   // ranges of addresses
	pairShape                     // address . address
	sourceShape                   // address . protocol . port . range of addresses
	markShape                     // address . protocol . port : mark
)

// sets declares our sets, and which of them the arp table has too.
var sets = []struct {
	name  ipvs.Set
	shape setShape
	arp   bool
}{
	{ipvs.Frontends, frontendShape, false},
	{ipvs.Masquerade, frontendShape, false},
	{ipvs.VIPs, addressShape, true},
	{ipvs.ServiceCIDRs, prefixShape, true},
	{ipvs.Pods, prefixShape, false},
	{ipvs.Kept, prefixShape, false},
	{ipvs.Hairpin, pairShape, false},
	{ipvs.Dropped, frontendShape, false},
	{ipvs.Restricted, frontendShape, false},
	{ipvs.Allowed, sourceShape, false},
	{ipvs.Shortcuts, markShape, false},
}

func newSet(t *nftables.Table, name ipvs.Set, shape setShape) *nftables.Set {
	addr := nftables.TypeIPAddr
	if t.Family == nftables.TableFamilyIPv6 {
		addr = nftables.TypeIP6Addr
	}
	s := &nftables.Set{Table: t, Name: string(name), KeyType: addr}
	switch shape {
	case frontendShape, markShape:
		s.KeyType = nftables.MustConcatSetType(addr, nftables.TypeInetProto, nftables.TypeInetService)
		s.Concatenation = true
		if s.IsMap = shape == markShape; s.IsMap {
			s.DataType = nftables.TypeMark
		}
	case sourceShape:
		s.KeyType = nftables.MustConcatSetType(addr, nftables.TypeInetProto, nftables.TypeInetService, addr)
		s.Concatenation, s.Interval = true, true
	case pairShape:
		s.KeyType = nftables.MustConcatSetType(addr, addr)
		s.Concatenation = true
	case prefixShape:
		s.Interval = true
	}
	return s
}

// prepare makes the tables what this version of longshore needs. Elements that are there stay, and rules are
// replaced in one transaction, so that a restart changes nothing for the traffic.
func (f *filter) prepare() error {
	for _, ff := range f.families {
		f.conn.AddTable(ff.table)
		for _, set := range sets {
			if err := f.conn.AddSet(ff.sets[set.name], nil); err != nil {
				return fmt.Errorf("declare set %s: %w", set.name, err)
			}
		}
	}
	f.conn.AddTable(f.arp)
	for _, set := range sets {
		if !set.arp {
			continue
		}
		if err := f.conn.AddSet(f.arpSets[set.name], nil); err != nil {
			return fmt.Errorf("declare set %s: %w", set.name, err)
		}
	}
	if err := f.conn.Flush(); err != nil {
		return fmt.Errorf("declare nftables tables %q: %w", tableName, err)
	}
	for _, ff := range f.families {
		if err := ff.addExternalChain(); err != nil {
			return err
		}
		ff.addRules(f.conn)
	}
	f.addARPRules()
	if err := f.conn.Flush(); err != nil {
		return fmt.Errorf("add the rules of nftables tables %q: %w", tableName, err)
	}
	rules, err := f.listRules()
	f.rules = rules
	return err
}

// intact tells whether the rules are those that prepare made, by handle: one that was replaced by its equal is another.
func (f *filter) intact() bool {
	rules, err := f.listRules()
	return err == nil && rules == f.rules
}

// listRules is a hash of our rules as the kernel lists them.
func (f *filter) listRules() (sum [sha256.Size]byte, err error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return sum, fmt.Errorf("open nftables: %w", err)
	}
	defer func() { _ = conn.Close() }()
	hash := sha256.New()
	for _, family := range []nftables.TableFamily{nftables.TableFamilyIPv4, nftables.TableFamilyIPv6, nftables.TableFamilyARP} {
		table := nested(0, attr(unix.NFTA_RULE_TABLE, []byte(tableName+"\x00"))).Data
		listed, err := conn.Execute(netlink.Message{
			Header: netlink.Header{
				Type:  netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETRULE),
				Flags: netlink.Request | netlink.Dump,
			},
			Data: append([]byte{byte(family), unix.NFNETLINK_V0, 0, 0}, table...),
		})
		if err != nil {
			return sum, fmt.Errorf("list nftables rules: %w", err)
		}
		for _, m := range listed {
			hash.Write(m.Data[4:]) // without the header, which has the ruleset's generation
		}
	}
	return [sha256.Size]byte(hash.Sum(nil)), nil
}

// addARPRules silences the kernel for requests only: the node's own requests may carry a VIP as sender, and the
// replies to them must come back to it.
func (f *filter) addARPRules() {
	const arpIn = 0 // NF_ARP_IN (include/uapi/linux/netfilter_arp.h); nftables.ChainHookInput is NF_ARP_OUT there
	input := addChain(f.conn, f.arp, "input", nftables.ChainTypeFilter, nftables.ChainHookRef(arpIn), nftables.ChainPriorityFilter)
	for _, set := range sets {
		if !set.arp {
			continue
		}
		f.conn.AddRule(&nftables.Rule{Table: f.arp, Chain: input, Exprs: []expr.Any{
			&expr.Payload{DestRegister: firstRegister, Base: expr.PayloadBaseNetworkHeader, Offset: 6, Len: 2},
			&expr.Cmp{Op: expr.CmpOpEq, Register: firstRegister, Data: []byte{0, 1}},
			&expr.Payload{DestRegister: firstRegister, Base: expr.PayloadBaseNetworkHeader, Offset: 24, Len: 4},
			&expr.Lookup{SourceRegister: firstRegister, SetName: string(set.name), SetID: f.arpSets[set.name].ID},
			&expr.Verdict{Kind: expr.VerdictDrop},
		}})
	}
}

// addChain declares a chain and empties it of the rules of an earlier run.
func addChain(conn *nftables.Conn, t *nftables.Table, name string, kind nftables.ChainType, hook *nftables.ChainHook, priority *nftables.ChainPriority) *nftables.Chain {
	c := conn.AddChain(&nftables.Chain{Table: t, Name: name, Type: kind, Hooknum: hook, Priority: priority})
	conn.FlushChain(c)
	return c
}

// firstRegister is NFT_REG32_00, the first of the sixteen registers of four bytes each
// (include/uapi/linux/netfilter/nf_tables.h); a key of several fields lies in consecutive ones.
const firstRegister = 8

// layout is where things are in a packet and in registers, for one family.
type layout struct {
	sourceOffset, destinationOffset, size uint32
	next                                  uint32 // the register after an address
	icmp                                  byte
	portUnreachable                       uint8 // code of the ICMP message (RFC 792, RFC 4443)
}

func (ff *filterFamily) ipv6() bool { return ff.table.Family == nftables.TableFamilyIPv6 }

func (ff *filterFamily) layout() layout {
	if ff.ipv6() {
		return layout{8, 24, 16, firstRegister + 4, unix.IPPROTO_ICMPV6, 4}
	}
	return layout{12, 16, 4, firstRegister + 1, unix.IPPROTO_ICMP, 3}
}

func (l layout) source() *expr.Payload { return l.address(firstRegister, l.sourceOffset) }

func (l layout) destination(register uint32) *expr.Payload {
	return l.address(register, l.destinationOffset)
}

func (l layout) address(register, offset uint32) *expr.Payload {
	return &expr.Payload{DestRegister: register, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: l.size}
}

func (ff *filterFamily) lookup(set ipvs.Set, invert bool) *expr.Lookup {
	return &expr.Lookup{SourceRegister: firstRegister, SetName: string(set), SetID: ff.sets[set].ID, Invert: invert}
}

// frontend loads destination address, protocol and port into the registers of a key.
func (l layout) frontend() []expr.Any {
	return []expr.Any{
		l.destination(firstRegister),
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: l.next},
		&expr.Payload{DestRegister: l.next + 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
	}
}

// marked compares the packet's mark with ours.
func marked(op expr.CmpOp) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: firstRegister},
		&expr.Bitwise{SourceRegister: firstRegister, DestRegister: firstRegister, Len: 4, Mask: ne32(ipvs.MarkMask), Xor: ne32(0)},
		&expr.Cmp{Op: op, Register: firstRegister, Data: ne32(ipvs.MarkBits)},
	}
}

func ne32(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }

func (ff *filterFamily) addRules(conn *nftables.Conn) {
	ip := ff.layout()
	mangle := nftables.ChainPriorityMangle
	restrict := addChain(conn, ff.table, "restrict", "", nil, nil)
	locality := addChain(conn, ff.table, "locality", "", nil, nil)
	prerouting := addChain(conn, ff.table, "prerouting", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, mangle)
	output := addChain(conn, ff.table, "output", nftables.ChainTypeRoute, nftables.ChainHookOutput, mangle)
	input := addChain(conn, ff.table, "input", nftables.ChainTypeFilter, nftables.ChainHookInput, nftables.ChainPriorityFilter)
	unmark := addChain(conn, ff.table, "unmark", nftables.ChainTypeFilter, nftables.ChainHookOutput, nftables.ChainPriorityFilter)
	postrouting := addChain(conn, ff.table, "postrouting", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource)
	rule := func(chain *nftables.Chain, parts ...[]expr.Any) {
		conn.AddRule(&nftables.Rule{Table: ff.table, Chain: chain, Exprs: slices.Concat(parts...)})
	}
	one := func(e ...expr.Any) []expr.Any { return e }
	verdict := func(kind expr.VerdictKind) []expr.Any { return one(&expr.Verdict{Kind: kind}) }
	jump := func(to string) []expr.Any { return one(&expr.Verdict{Kind: expr.VerdictJump, Chain: to}) }
	toVIP := one(ip.destination(firstRegister), ff.lookup(ipvs.VIPs, false))

	known := one(
		&expr.Ct{Key: expr.CtKeySTATE, Register: firstRegister},
		&expr.Bitwise{SourceRegister: firstRegister, DestRegister: firstRegister, Len: 4, Mask: ne32(expr.CtStateBitNEW), Xor: ne32(0)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: firstRegister, Data: ne32(0)},
	)
	shortcut := slices.Concat(ip.frontend(), one(
		&expr.Lookup{SourceRegister: firstRegister, DestRegister: firstRegister, IsDestRegSet: true, SetName: string(ipvs.Shortcuts), SetID: ff.sets[ipvs.Shortcuts].ID},
		&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: firstRegister},
	))
	for _, chain := range []*nftables.Chain{prerouting, output} {
		rule(chain, known, verdict(expr.VerdictAccept))
		rule(chain, jump(restrict.Name))
		if chain == prerouting {
			rule(chain, one(ip.source(), ff.lookup(ipvs.Pods, false)), shortcut)
		} else {
			rule(chain, shortcut)
		}
		rule(chain, jump(locality.Name))
	}
	rule(restrict, ip.frontend(), one(ff.lookup(ipvs.Restricted, false)),
		ip.frontend(), one(ip.address(ip.next+2, ip.sourceOffset), ff.lookup(ipvs.Allowed, true)), verdict(expr.VerdictDrop))
	rule(locality, marked(expr.CmpOpNeq), ip.frontend(), one(ff.lookup(ipvs.Dropped, false)), verdict(expr.VerdictDrop))

	rule(input, one(
		&expr.Ct{Key: expr.CtKeyDIRECTION, Register: firstRegister},
		&expr.Cmp{Op: expr.CmpOpEq, Register: firstRegister, Data: []byte{directionReply}},
	), verdict(expr.VerdictAccept))
	rule(input, ip.frontend(), one(ff.lookup(ipvs.Frontends, false)), verdict(expr.VerdictAccept))
	rule(input, toVIP, one(
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: firstRegister},
		&expr.Cmp{Op: expr.CmpOpEq, Register: firstRegister, Data: []byte{ip.icmp}},
	), verdict(expr.VerdictAccept))
	rule(input, toVIP, one(&expr.Reject{Type: unix.NFT_REJECT_ICMP_UNREACH, Code: ip.portUnreachable}))
	rule(input, one(ip.destination(firstRegister), ff.lookup(ipvs.ServiceCIDRs, false)), verdict(expr.VerdictDrop))

	rule(unmark, marked(expr.CmpOpEq), one(
		&expr.Immediate{Register: firstRegister, Data: ne32(0)},
		&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: firstRegister},
	))

	rule(postrouting, jump(externalChain))
}

// observe reads the elements of our sets.
func (f *filter) observe(s *ipvs.State) error {
	for _, ff := range f.families {
		for _, set := range sets {
			if err := f.observeSet(s, ff, set.name, set.shape); err != nil {
				return err
			}
		}
	}
	return nil
}

func (f *filter) observeSet(s *ipvs.State, ff *filterFamily, name ipvs.Set, shape setShape) error {
	elements, err := f.conn.GetSetElements(ff.sets[name])
	if err != nil {
		return fmt.Errorf("list nftables set %s: %w", name, err)
	}
	if err := decodeElements(s, name, shape, elements, ff.ipv6()); err != nil {
		return fmt.Errorf("list nftables set %s: %w", name, err)
	}
	return nil
}

// apply adds or deletes the elements of operations, all or none.
func (f *filter) apply(ops []ipvs.Operation) error {
	type target struct {
		set  *nftables.Set
		verb ipvs.Verb
	}
	var order []target // deterministic: as the operations came
	changes := map[target][]nftables.SetElement{}
	change := func(set *nftables.Set, verb ipvs.Verb, e ipvs.Element) {
		if set == nil {
			return
		}
		t := target{set, verb}
		if _, ok := changes[t]; !ok {
			order = append(order, t)
		}
		changes[t] = append(changes[t], encodeElement(e)...)
	}
	for _, o := range ops {
		family := 0
		if o.Element.IPv6() {
			family = 1
		} else {
			change(f.arpSets[o.Element.Set], o.Verb, o.Element)
		}
		change(f.families[family].sets[o.Element.Set], o.Verb, o.Element)
	}
	// Deletions first: the key of a map, or an overlapping range, may come again in the same transaction.
	slices.SortStableFunc(order, func(a, b target) int { return cmp.Compare(b.verb, a.verb) })
	for _, t := range order {
		update := f.conn.SetAddElements
		if t.verb == ipvs.Delete {
			update = f.conn.SetDeleteElements
		}
		for elements := changes[t]; len(elements) > 0; {
			n := min(len(elements), elementsPerMessage)
			if err := update(t.set, elements[:n]); err != nil {
				return fmt.Errorf("change nftables set %s: %w", t.set.Name, err)
			}
			elements = elements[n:]
		}
	}
	if err := f.conn.Flush(); err != nil {
		return fmt.Errorf("change nftables sets: %w", err)
	}
	return nil
}

// encodeElement is the key, or for a range the two ends, of an element. Fields of a key fill four bytes or a multiple.
func encodeElement(e ipvs.Element) []nftables.SetElement {
	switch {
	case e.OfFrontend():
		key := e.Frontend.Addr.Addr().AsSlice()
		key = append(key, byte(e.Frontend.Protocol), 0, 0, 0)
		key = append(binary.BigEndian.AppendUint16(key, e.Frontend.Addr.Port()), 0, 0)
		switch e.Set {
		case ipvs.Allowed:
			return []nftables.SetElement{{
				Key:    slices.Concat(key, e.Prefix.Addr().AsSlice()),
				KeyEnd: slices.Concat(key, lastAddr(e.Prefix).AsSlice()),
			}}
		case ipvs.Shortcuts:
			return []nftables.SetElement{{Key: key, Val: ne32(e.Mark)}}
		}
		return []nftables.SetElement{{Key: key}}
	case e.Set == ipvs.Hairpin:
		addr := e.Prefix.Addr().AsSlice()
		return []nftables.SetElement{{Key: append(addr, addr...)}}
	case e.Set == ipvs.VIPs:
		return []nftables.SetElement{{Key: e.Prefix.Addr().AsSlice()}}
	}
	start := []nftables.SetElement{{Key: e.Prefix.Addr().AsSlice()}}
	if after := lastAddr(e.Prefix).Next(); after.IsValid() {
		return append(start, nftables.SetElement{Key: after.AsSlice(), IntervalEnd: true})
	}
	return start // the range reaches the end of the address space
}

// lastAddr is the highest address of a prefix.
func lastAddr(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

func decodeElements(s *ipvs.State, name ipvs.Set, shape setShape, elements []nftables.SetElement, v6 bool) error {
	size := 4
	if v6 {
		size = 16
	}
	var starts, ends []netip.Addr
	for _, e := range elements {
		if len(e.Key) < size {
			return fmt.Errorf("key of %d bytes", len(e.Key))
		}
		addr, _ := netip.AddrFromSlice(e.Key[:size])
		switch shape {
		case frontendShape, sourceShape, markShape:
			if len(e.Key) < size+8 {
				return fmt.Errorf("key of %d bytes", len(e.Key))
			}
			f := ipvs.At(ipvs.Protocol(e.Key[size]), netip.AddrPortFrom(addr, binary.BigEndian.Uint16(e.Key[size+4:])))
			switch {
			case shape == frontendShape:
				s.AddFrontend(name, f)
			case shape == markShape && len(e.Val) >= 4:
				s.AddShortcut(f, binary.NativeEndian.Uint32(e.Val))
			case shape == sourceShape && len(e.Key) >= 2*size+8 && len(e.KeyEnd) >= 2*size+8:
				start, _ := netip.AddrFromSlice(e.Key[size+8:][:size])
				end, _ := netip.AddrFromSlice(e.KeyEnd[size+8:][:size])
				s.AddSource(f, prefixBetween(start, []netip.Addr{end.Next()}))
			default:
				return fmt.Errorf("element %x of %d bytes", e.Key, len(e.Val))
			}
		case addressShape, pairShape:
			s.AddPrefix(name, netip.PrefixFrom(addr, addr.BitLen()))
		case prefixShape:
			if e.IntervalEnd {
				ends = append(ends, addr)
			} else {
				starts = append(starts, addr)
			}
		}
	}
	for _, start := range starts {
		s.AddPrefix(name, prefixBetween(start, ends))
	}
	return nil
}

// prefixBetween is the prefix from start to the next of the ends (exclusive).
func prefixBetween(start netip.Addr, ends []netip.Addr) netip.Prefix {
	var end netip.Addr
	for _, e := range ends {
		if e.IsValid() && start.Less(e) && (!end.IsValid() || e.Less(end)) {
			end = e
		}
	}
	for bits := start.BitLen(); bits > 0; bits-- {
		p := netip.PrefixFrom(start, bits)
		if p.Masked().Addr() == start && lastAddr(p).Next() == end {
			return p
		}
	}
	return netip.PrefixFrom(start, 0)
}
