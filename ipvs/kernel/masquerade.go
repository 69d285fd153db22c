package kernel

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/longshore-lb/longshore/ipvs"
)

// Keys of a ct expression (enum nft_ct_keys, include/uapi/linux/netfilter/nf_tables.h): the destination address of a
// connection's tuple. google/nftables writes neither (it leaves out their direction), only the older NFT_CT_DST, which
// has no fixed length: in a concatenation the nft program cannot list it. So this one rule is written by hand.
const (
	ctDestinationIP  = 20
	ctDestinationIP6 = 22
)

// externalChain is the chain of the rule that hides clients outside the node's pods behind the node.
const externalChain = "external"

// directionOriginal is IP_CT_DIR_ORIGINAL (include/uapi/linux/netfilter/nf_conntrack_tuple_common.h).
const directionOriginal = 0

// addMasqueradeChain makes the chain "external" together with its one rule, unless an earlier run did: a chain that is
// there has its rule. A version of longshore that needs another rule names its chain differently.
func (ff *filterFamily) addMasqueradeChain(conn *nftables.Conn) error {
	chains, err := conn.ListChainsOfTableFamily(ff.table.Family)
	if err != nil {
		return fmt.Errorf("list nftables chains: %w", err)
	}
	if slices.ContainsFunc(chains, func(c *nftables.Chain) bool { return c.Table.Name == tableName && c.Name == externalChain }) {
		return nil
	}
	ip := ff.layout()
	key := uint32(ctDestinationIP)
	if ff.ipv6() {
		key = ctDestinationIP6
	}
	destination := attrs(
		attr(unix.NFTA_EXPR_NAME, []byte("ct\x00")),
		nested(unix.NFTA_EXPR_DATA,
			attr(unix.NFTA_CT_KEY, be32(key)),
			attr(unix.NFTA_CT_DREG, be32(firstRegister)),
			attr(unix.NFTA_CT_DIRECTION, []byte{directionOriginal}),
		),
	)
	elements := []netlink.Attribute{nested(unix.NFTA_LIST_ELEM, destination...)}
	for _, e := range []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: ip.next},
		&expr.Ct{Key: expr.CtKeyPROTODST, Register: ip.next + 1, Direction: directionOriginal},
		ff.lookup(ipvs.Masquerade, false),
		ip.source(),
		ff.lookup(ipvs.Pods, true),
		&expr.Masq{},
	} {
		b, err := expr.Marshal(byte(ff.table.Family), e)
		if err != nil {
			return fmt.Errorf("encode masquerade rule: %w", err)
		}
		elements = append(elements, attr(unix.NLA_F_NESTED|unix.NFTA_LIST_ELEM, b))
	}
	table := attr(unix.NFTA_RULE_TABLE, []byte(tableName+"\x00"))
	return ff.commit(
		ff.message(unix.NFT_MSG_NEWCHAIN, 0, table, attr(unix.NFTA_CHAIN_NAME, []byte(externalChain+"\x00"))),
		ff.message(unix.NFT_MSG_NEWRULE, netlink.Append, table,
			attr(unix.NFTA_RULE_CHAIN, []byte(externalChain+"\x00")),
			nested(unix.NFTA_RULE_EXPRESSIONS, elements...)),
	)
}

func (ff *filterFamily) message(kind uint16, flags netlink.HeaderFlags, a ...netlink.Attribute) netlink.Message {
	body := nested(0, a...).Data
	return netlink.Message{
		Header: netlink.Header{
			Type:  netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | kind),
			Flags: netlink.Request | netlink.Acknowledge | netlink.Create | flags,
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
		return fmt.Errorf("add nftables chain %s: %w", externalChain, err)
	}
	for range messages {
		if _, err := conn.Receive(); err != nil {
			return fmt.Errorf("add nftables chain %s: %w", externalChain, err)
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
