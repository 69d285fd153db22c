package kernel

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/longshore-lb/longshore/ipvs"
)

// Keys of a ct expression (enum nft_ct_keys, include/uapi/linux/netfilter/nf_tables.h): the destination address of a
// connection's tuple. google/nftables writes neither (it leaves out their direction), only the older NFT_CT_DST, which
// has no fixed length: in a concatenation the nft program cannot list it. So the rules with it are written by hand.
const (
	ctDestinationIP  = 20
	ctDestinationIP6 = 22
)

// The source ports of masquerade: above the range of node ports (30000-32767).
const (
	firstMasqueradePort = 32768
	lastMasqueradePort  = 65535
)

// protocolSpecified is NF_NAT_RANGE_PROTO_SPECIFIED (include/uapi/linux/netfilter/nf_nat.h). Without it the kernel keeps a
// client's port, whatever range of ports the expression has: nft_redir sets it by itself, nft_masq does not. Neither do
// google/nftables and the nft program.
const protocolSpecified = 1 << 1

// externalChain is the chain of the rules that hide clients outside the node's pods, and the node's own, behind the
// address that the packets leave from.
const externalChain = "external"

// The directions of a connection (enum ip_conntrack_dir, include/uapi/linux/netfilter/nf_conntrack_tuple_common.h).
const (
	directionOriginal = 0
	directionReply    = 1
)

// addExternalChain makes the chain "external" and its rules, in the place of those that an earlier run made.
func (ff *filterFamily) addExternalChain() error {
	ip := ff.layout()
	table := attr(unix.NFTA_RULE_TABLE, []byte(tableName+"\x00"))
	chain := attr(unix.NFTA_RULE_CHAIN, []byte(externalChain+"\x00"))
	messages := []netlink.Message{
		ff.message(unix.NFT_MSG_NEWCHAIN, netlink.Create, table, attr(unix.NFTA_CHAIN_NAME, []byte(externalChain+"\x00"))),
		ff.message(unix.NFT_MSG_DELRULE, 0, table, chain),
	}
	nodeOrigin := []expr.Any{
		&expr.Meta{Key: expr.MetaKeyOIF, Register: firstRegister},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: firstRegister, Data: ne32(loopbackIndex)},
		&expr.Fib{Register: firstRegister, FlagSADDR: true, ResultADDRTYPE: true},
		&expr.Cmp{Op: expr.CmpOpEq, Register: firstRegister, Data: ne32(unix.RTN_LOCAL)},
	}
	frontendIn := func(set ipvs.Set) []any {
		return []any{
			ff.originalDestination(),
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: ip.next},
			&expr.Ct{Key: expr.CtKeyPROTODST, Register: ip.next + 1, Direction: directionOriginal},
			ff.lookup(set, false),
		}
	}
	for _, rule := range [][]any{
		{ip.source(), ip.destination(ip.next), ff.lookup(ipvs.Hairpin, false)},
		append(frontendIn(ipvs.Masquerade), ip.source(), ff.lookup(ipvs.Kept, true)),
		append(anys(nodeOrigin), frontendIn(ipvs.Frontends)...),
	} {
		elements, err := ff.encode(append(rule,
			&expr.Immediate{Register: firstRegister, Data: binary.BigEndian.AppendUint16(nil, firstMasqueradePort)},
			&expr.Immediate{Register: firstRegister + 1, Data: binary.BigEndian.AppendUint16(nil, lastMasqueradePort)},
			masquerade(firstRegister, firstRegister+1)))
		if err != nil {
			return err
		}
		messages = append(messages, ff.message(unix.NFT_MSG_NEWRULE, netlink.Create|netlink.Append, table, chain,
			nested(unix.NFTA_RULE_EXPRESSIONS, elements...)))
	}
	return ff.commit(messages...)
}

// loopbackIndex is the index of lo, the first interface of every network namespace (net/core/net_namespace.c).
const loopbackIndex = 1

// originalDestination is the expression `ct original ip daddr`.
func (ff *filterFamily) originalDestination() []netlink.Attribute {
	key := uint32(ctDestinationIP)
	if ff.ipv6() {
		key = ctDestinationIP6
	}
	return attrs(
		attr(unix.NFTA_EXPR_NAME, []byte("ct\x00")),
		nested(unix.NFTA_EXPR_DATA,
			attr(unix.NFTA_CT_KEY, be32(key)),
			attr(unix.NFTA_CT_DREG, be32(firstRegister)),
			attr(unix.NFTA_CT_DIRECTION, []byte{directionOriginal}),
		),
	)
}

// masquerade is the expression `masquerade to :A-B`, with the ports in two registers.
func masquerade(first, last uint32) []netlink.Attribute {
	return attrs(
		attr(unix.NFTA_EXPR_NAME, []byte("masq\x00")),
		nested(unix.NFTA_EXPR_DATA,
			attr(unix.NFTA_MASQ_FLAGS, be32(protocolSpecified)),
			attr(unix.NFTA_MASQ_REG_PROTO_MIN, be32(first)),
			attr(unix.NFTA_MASQ_REG_PROTO_MAX, be32(last)),
		),
	)
}

func anys(exprs []expr.Any) []any {
	out := make([]any, len(exprs))
	for i, e := range exprs {
		out[i] = e
	}
	return out
}

// encode makes the list of a rule's expressions, each an expr.Any or the attributes of one.
func (ff *filterFamily) encode(exprs []any) ([]netlink.Attribute, error) {
	var out []netlink.Attribute
	for _, e := range exprs {
		if attributes, ok := e.([]netlink.Attribute); ok {
			out = append(out, nested(unix.NFTA_LIST_ELEM, attributes...))
			continue
		}
		b, err := expr.Marshal(byte(ff.table.Family), e.(expr.Any))
		if err != nil {
			return nil, fmt.Errorf("encode a rule of chain %s: %w", externalChain, err)
		}
		out = append(out, attr(unix.NLA_F_NESTED|unix.NFTA_LIST_ELEM, b))
	}
	return out, nil
}

func (ff *filterFamily) message(kind uint16, flags netlink.HeaderFlags, a ...netlink.Attribute) netlink.Message {
	body := nested(0, a...).Data
	return netlink.Message{
		Header: netlink.Header{
			Type:  netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | kind),
			Flags: netlink.Request | netlink.Acknowledge | flags,
		},
		Data: append([]byte{byte(ff.table.Family), unix.NFNETLINK_V0, 0, 0}, body...),
	}
}

// commit sends messages as one transaction.
func (ff *filterFamily) commit(messages ...netlink.Message) error {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	defer func() { _ = conn.Close() }()
	bracket := func(kind netlink.HeaderType) netlink.Message {
		return netlink.Message{
			Header: netlink.Header{Type: kind, Flags: netlink.Request},
			Data:   []byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, 0, unix.NFNL_SUBSYS_NFTABLES},
		}
	}
	batch := slices.Concat([]netlink.Message{bracket(unix.NFNL_MSG_BATCH_BEGIN)}, messages, []netlink.Message{bracket(unix.NFNL_MSG_BATCH_END)})
	if _, err := conn.SendMessages(batch); err != nil {
		return fmt.Errorf("replace nftables chain %s: %w", externalChain, err)
	}
	for range messages {
		if _, err := conn.Receive(); err != nil {
			return fmt.Errorf("replace nftables chain %s: %w", externalChain, err)
		}
	}
	return nil
}

func be32(v uint32) []byte { return binary.BigEndian.AppendUint32(nil, v) }

func attrs(a ...netlink.Attribute) []netlink.Attribute { return a }

func attr(kind uint16, data []byte) netlink.Attribute {
	return netlink.Attribute{Type: kind, Data: data}
}

// nested is an attribute of attributes. Their encoding fails only above 64 KiB, far from what is written here.
func nested(kind uint16, inner ...netlink.Attribute) netlink.Attribute {
	b, err := netlink.MarshalAttributes(inner)
	if err != nil {
		panic(err)
	}
	return netlink.Attribute{Type: kind | unix.NLA_F_NESTED, Data: b}
}
