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

// externalChain is the chain of the rules that hide clients outside the node's pods, and the node's own, behind the
// address that the packets leave from.
const externalChain = "external"

// directionOriginal is IP_CT_DIR_ORIGINAL (include/uapi/linux/netfilter/nf_conntrack_tuple_common.h).
const directionOriginal = 0

// addExternalChain makes the chain "external" and its rules, in the place of those that an earlier run made.
func (ff *filterFamily) addExternalChain() error {
	ip := ff.layout()
	table := attr(unix.NFTA_RULE_TABLE, []byte(tableName+"\x00"))
	chain := attr(unix.NFTA_RULE_CHAIN, []byte(externalChain+"\x00"))
	messages := []netlink.Message{
		ff.message(unix.NFT_MSG_NEWCHAIN, netlink.Create, table, attr(unix.NFTA_CHAIN_NAME, []byte(externalChain+"\x00"))),
		ff.message(unix.NFT_MSG_DELRULE, 0, table, chain),
	}
	lo := []expr.Any{
		&expr.Meta{Key: expr.MetaKeyOIF, Register: firstRegister},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: firstRegister, Data: ne32(loopbackIndex)},
		&expr.Fib{Register: firstRegister, FlagSADDR: true, ResultADDRTYPE: true},
		&expr.Cmp{Op: expr.CmpOpEq, Register: firstRegister, Data: ne32(unix.RTN_LOCAL)},
	}
	for _, rule := range []struct {
		before []expr.Any
		set    ipvs.Set
		after  []expr.Any
	}{
		{nil, ipvs.Masquerade, []expr.Any{ip.source(), ff.lookup(ipvs.Kept, true)}},
		{lo, ipvs.Frontends, nil},
	} {
		elements, err := ff.encode(rule.before)
		if err != nil {
			return err
		}
		elements = append(elements, nested(unix.NFTA_LIST_ELEM, ff.originalDestination()...))
		rest, err := ff.encode(slices.Concat([]expr.Any{
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: ip.next},
			&expr.Ct{Key: expr.CtKeyPROTODST, Register: ip.next + 1, Direction: directionOriginal},
			ff.lookup(rule.set, false),
		}, rule.after, masquerade(firstRegister, firstRegister+1)))
		if err != nil {
			return err
		}
		messages = append(messages, ff.message(unix.NFT_MSG_NEWRULE, netlink.Create|netlink.Append, table, chain,
			nested(unix.NFTA_RULE_EXPRESSIONS, append(elements, rest...)...)))
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

func (ff *filterFamily) encode(exprs []expr.Any) ([]netlink.Attribute, error) {
	var out []netlink.Attribute
	for _, e := range exprs {
		b, err := expr.Marshal(byte(ff.table.Family), e)
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
