package members

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/longshore-lb/longshore/announcer"
)

// encoding is the version of the messages below; one of another version is not understood.
const encoding = 1

// encode writes what an agent says of itself:
//
//	byte     encoding
//	text     name of the node: uvarint length, bytes
//	uvarint  version
//	byte     1 = able
//	uvarint  links, each: text name, byte 1 = IPv4 + 2 = IPv6
//	uvarint  claims, IPv4 before IPv6, sorted, each:
//	    byte     4 or 16, the bytes of the address, + 32 times how many of these are those of the claim before
//	    bytes    the other ones
//	    uvarint  epoch
//
// 5,000 claims of neighbouring addresses are about 20 KB.
func encode(node string, a announcer.Agent) []byte {
	b := text([]byte{encoding}, node)
	b = binary.AppendUvarint(b, a.Version)
	b = append(b, flags(a.Able, false))
	b = binary.AppendUvarint(b, uint64(len(a.Links)))
	for _, l := range a.Links {
		b = append(text(b, l.Name), flags(l.IPv4, l.IPv6))
	}
	b = binary.AppendUvarint(b, uint64(len(a.Claims)))
	var last []byte
	for _, addr := range slices.SortedFunc(maps.Keys(a.Claims), netip.Addr.Compare) {
		bytes := addr.AsSlice()
		same := 0
		for same < 7 && len(last) == len(bytes) && last[same] == bytes[same] && same < len(bytes)-1 {
			same++
		}
		b = append(append(b, byte(len(bytes)+32*same)), bytes[same:]...)
		b = binary.AppendUvarint(b, a.Claims[addr])
		last = bytes
	}
	return b
}

func text(b []byte, s string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

func flags(low, high bool) (b byte) {
	if low {
		b |= 1
	}
	if high {
		b |= 2
	}
	return b
}

// decode reads what encode has written.
func decode(message []byte) (node string, a announcer.Agent, err error) {
	r := &reader{rest: message}
	if version := r.byte(); version != encoding {
		return "", a, fmt.Errorf("message of encoding %d, this agent knows %d", version, encoding)
	}
	node = r.text()
	a.Version = r.number()
	a.Able = r.byte()&1 != 0
	for range r.count() {
		name := r.text()
		families := r.byte()
		a.Links = append(a.Links, announcer.Link{Name: name, IPv4: families&1 != 0, IPv6: families&2 != 0})
	}
	claims := r.count()
	a.Claims = make(map[netip.Addr]uint64, claims)
	var last []byte
	for range claims {
		head := r.byte()
		length, same := int(head%32), int(head/32)
		if length != 4 && length != 16 || same > len(last) || same > length {
			r.failed = true
			break
		}
		bytes := slices.Concat(last[:same], r.bytes(uint64(length-same)))
		if addr, ok := netip.AddrFromSlice(bytes); ok {
			a.Claims[addr] = r.number()
		}
		last = bytes
	}
	if r.failed || len(r.rest) > 0 || node == "" {
		return "", announcer.Agent{}, errors.New("message is cut off or garbled")
	}
	return node, a, nil
}

// reader takes a message apart. After a failure it reads zeros.
type reader struct {
	rest   []byte
	failed bool
}

func (r *reader) bytes(n uint64) []byte {
	if r.failed || n > uint64(len(r.rest)) {
		r.failed = true
		return nil
	}
	b := r.rest[:n]
	r.rest = r.rest[n:]
	return b
}

func (r *reader) byte() byte {
	if b := r.bytes(1); len(b) == 1 {
		return b[0]
	}
	return 0
}

func (r *reader) number() uint64 {
	n, length := binary.Uvarint(r.rest)
	if length <= 0 {
		r.failed = true
		return 0
	}
	r.bytes(uint64(length))
	return n
}

// count is a number of things of at least two bytes each.
func (r *reader) count() uint64 {
	n := r.number()
	if n > uint64(len(r.rest))/2 {
		r.failed = true
		return 0
	}
	return n
}

func (r *reader) text() string { return string(r.bytes(r.number())) }
