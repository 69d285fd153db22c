package bgp

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/longshore-lb/longshore/announcer"
)

// message is a BGP message (RFC 4271 section 4.1) with this body.
func message(kind byte, body ...byte) []byte {
	m := bytes.Repeat([]byte{0xff}, 16)
	m = binary.BigEndian.AppendUint16(m, uint16(19+len(body)))
	return append(append(m, kind), body...)
}

const (
	open         = 1
	update       = 2
	notification = 3
	keepalive    = 4
	refresh      = 5
)

// openBody is the body of an OPEN of AS 65001 with these optional parameters.
func openBody(holdTime uint16, parameters ...byte) []byte {
	b := []byte{4, 65001 >> 8, 65001 & 255, byte(holdTime >> 8), byte(holdTime), 10, 99, 99, 99, byte(len(parameters))}
	return append(b, parameters...)
}

// updateBody is the body of an UPDATE without withdrawn routes.
func updateBody(attributes []byte, nlri ...byte) []byte {
	b := binary.BigEndian.AppendUint16([]byte{0, 0}, uint16(len(attributes)))
	return append(append(b, attributes...), nlri...)
}

func unhex(text string) []byte {
	b, err := hex.DecodeString(strings.ReplaceAll(text, " ", ""))
	if err != nil {
		panic(err)
	}
	return b
}

// The attributes ORIGIN, AS_PATH and NEXT_HOP as they should be, and a prefix.
var (
	origin  = unhex("40 01 01 00")
	asPath  = unhex("40 02 06 02 01 0000fde9")
	nextHop = unhex("40 03 04 0a636302")
	prefix  = unhex("18 cb0071")
)

// oddPeer is a BGP speaker of a few lines: it takes one connection, sends an OPEN and a KEEPALIVE if established, and then
// what is odd. It reads what it is sent until the connection ends.
type oddPeer struct {
	name        string
	established bool
	sends       []byte
	closes      bool   // after that
	waits       bool   // before that, for the other side to be established
	want        string // why the session ended; "" = it did not, because RFC 7606 asks for less, or gobgp does not look
}

// saidBy tells whether a session says what is wanted.
func (o oddPeer) saidBy(s Session) bool {
	return o.want == "" && s.Reason == "" || o.want != "" && strings.HasPrefix(s.Reason, o.want)
}

// serve takes one connection. What fails shows in what the speaker says of the session.
func (o oddPeer) serve(l net.Listener) {
	conn, err := l.Accept()
	if err != nil {
		return
	}
	defer func() { _ = conn.Close() }()
	if o.established {
		_, _ = conn.Write(slicesOf(message(open, openBody(90, unhex("02 06 41 04 0000fde9")...)...), message(keepalive)))
	}
	for messages := 0; o.waits && messages < 2; messages++ { // its OPEN and its first KEEPALIVE
		header := make([]byte, 19)
		if _, err := io.ReadFull(conn, header); err != nil {
			return
		}
		if _, err := io.CopyN(io.Discard, conn, int64(binary.BigEndian.Uint16(header[16:]))-19); err != nil {
			return
		}
	}
	_, _ = conn.Write(o.sends)
	if !o.closes {
		_, _ = io.Copy(io.Discard, conn)
	}
}

func slicesOf(all ...[]byte) []byte { return bytes.Join(all, nil) }

// TestOddMessages has a peer for each way to be wrong. None of them harms the speaker or another session, and each session says
// why it ended.
func TestOddMessages(t *testing.T) {
	attrs := func(all ...[]byte) []byte { return slicesOf(all...) }
	odd := []oddPeer{
		{name: "no-marker", sends: bytes.Repeat([]byte{0}, 19),
			want: "notification sent: code 1(header) subcode 1(connection not synchronized)"},
		{name: "noise", sends: []byte("GET / HTTP/1.1\r\nHost: router\r\n\r\n"),
			want: "notification sent: code 1(header) subcode 1(connection not synchronized)"},
		{name: "length-18", sends: slicesOf(bytes.Repeat([]byte{0xff}, 16), []byte{0, 18, open}),
			want: "notification sent: code 1(header) subcode 2(bad message length)"},
		{name: "length-65535", sends: slicesOf(bytes.Repeat([]byte{0xff}, 16), []byte{0xff, 0xff, open}),
			want: "notification sent: code 1(header) subcode 2(bad message length)"},
		{name: "type-0", sends: message(0),
			want: "notification sent: code 1(header) subcode 3(bad message type)"},
		{name: "type-77", sends: message(77, 1, 2, 3),
			want: "notification sent: code 1(header) subcode 3(bad message type)"},
		{name: "open-without-body", sends: message(open),
			want: "notification sent: code 1(header) subcode 2(bad message length)"},
		{name: "open-version-3", sends: message(open, append([]byte{3}, openBody(90)[1:]...)...),
			want: "notification sent: code 2(open) subcode 1(unsupported version number)"},
		{name: "open-hold-time-1", sends: message(open, openBody(1)...),
			want: "notification sent: code 2(open) subcode 6(unacceptable hold time)"},
		{name: "open-id-zero", sends: message(open, 4, 0xfd, 0xe9, 0, 90, 0, 0, 0, 0, 0),
			want: "notification sent: code 2(open) subcode 3(bad bgp identifier)"},
		{name: "open-other-AS", sends: message(open, 4, 0xfd, 0xea, 0, 90, 10, 99, 99, 99, 0),
			want: "notification sent: code 2(open) subcode 2(bad peer as)"},
		{name: "open-parameters-too-long", sends: message(open, append(openBody(90)[:9], 200)...),
			want: "notification sent: code 1(header) subcode 2(bad message length)"},
		{name: "open-capability-too-long", sends: message(open, openBody(90, unhex("02 04 41 f0 00 00")...)...),
			want: "notification sent: code 2(open) subcode 7(unsupported capability)"},
		{name: "open-capability-cut", sends: message(open, openBody(90, unhex("02 02 41 04")...)...),
			want: "notification sent: code 2(open) subcode 7(unsupported capability)"},
		{name: "open-unknown-parameter", sends: message(open, openBody(90, unhex("09 02 00 00")...)...)},
		{name: "open-extended-length", sends: message(open, append(openBody(90)[:9], 255, 255, 0xff, 0xff)...),
			want: "notification sent: code 1(header) subcode 2(bad message length)"},
		{name: "keepalive-first", sends: message(keepalive),
			want: "the peer refused the session; does it expect AS 64512 from us?"},
		{name: "update-first", sends: message(update, updateBody(attrs(origin, asPath, nextHop), prefix...)...),
			want: "the peer refused the session; does it expect AS 64512 from us?"},
		{name: "refresh-first", sends: message(refresh, 0, 1, 0, 1),
			want: "the peer refused the session; does it expect AS 64512 from us?"},
		{name: "notification-first", sends: message(notification, 6, 5),
			want: "the peer refused the session; does it expect AS 64512 from us?"},
		{name: "open-twice", sends: slicesOf(message(open, openBody(90)...), message(open, openBody(90)...)),
			want: "the peer refused the session; does it expect AS 64512 from us?"},
		{name: "half-an-open", sends: message(open, openBody(90)...)[:25], closes: true,
			want: "the peer closed the connection before it was a session"},

		{name: "established", established: true},
		{name: "closed-early", established: true, closes: true,
			want: "the peer closed the connection"},
		{name: "closed", established: true, closes: true, waits: true,
			want: "the peer closed the connection"},
		{name: "half-an-update", established: true, waits: true, sends: message(update, updateBody(attrs(origin, asPath, nextHop), prefix...)...)[:30], closes: true,
			want: "the peer closed the connection"},
		{name: "open-again", established: true, sends: message(open, openBody(90)...)},
		{name: "type-99", established: true, sends: message(99),
			want: "notification sent: code 1(header) subcode 3(bad message type)"},
		{name: "keepalive-with-body", established: true, sends: message(keepalive, 1)},
		{name: "notification-cease", established: true, sends: message(notification, 6, 2),
			want: "notification received: code 6(cease) subcode 2(administrative shutdown)"},
		{name: "notification-unknown", established: true, sends: message(notification, 99, 99, 1, 2, 3),
			want: "notification received: code 99(undefined) subcode 99(undefined)"},
		{name: "notification-without-body", established: true, sends: message(notification),
			want: "notification sent: code 1(header) subcode 2(bad message length)"},
		{name: "refresh-unknown-family", established: true, sends: message(refresh, 0x63, 0, 0, 0x63)},
		{name: "refresh-cut", established: true, sends: message(refresh, 0, 1),
			want: "notification sent: code 7(route refresh) subcode 1(undefined)"},
		{name: "update-without-body", established: true, sends: message(update),
			want: "notification sent: code 3(update) subcode 1(malformed attribute list)"},
		{name: "update-withdrawn-too-long", established: true, sends: message(update, 0xff, 0xff, 0, 0),
			want: "notification sent: code 3(update) subcode 1(malformed attribute list)"},
		{name: "update-attributes-too-long", established: true, sends: message(update, 0, 0, 0xff, 0xff),
			want: "notification sent: code 3(update) subcode 1(malformed attribute list)"},
		{name: "update-attribute-too-long", established: true, sends: message(update, updateBody(unhex("40 01 ff 00"))...)},
		{name: "update-prefix-33", established: true, sends: message(update, updateBody(attrs(origin, asPath, nextHop), unhex("21 cb00710000")...)...),
			want: "notification sent: code 3(update) subcode 10(invalid network field)"},
		{name: "update-prefix-cut", established: true, sends: message(update, updateBody(attrs(origin, asPath, nextHop), unhex("18 cb")...)...),
			want: "notification sent: code 3(update) subcode 10(invalid network field)"},
		{name: "update-no-attributes", established: true, sends: message(update, updateBody(nil, prefix...)...)},
		{name: "update-no-next-hop", established: true, sends: message(update, updateBody(attrs(origin, asPath), prefix...)...)},
		{name: "update-origin-9", established: true, sends: message(update, updateBody(attrs(unhex("40 01 01 09"), asPath, nextHop), prefix...)...)},
		{name: "update-origin-flags", established: true, sends: message(update, updateBody(attrs(unhex("80 01 01 00"), asPath, nextHop), prefix...)...)},
		{name: "update-origin-twice", established: true, sends: message(update, updateBody(attrs(origin, origin, asPath, nextHop), prefix...)...)},
		{name: "update-as-path-cut", established: true, sends: message(update, updateBody(attrs(origin, unhex("40 02 03 02 05 00"), nextHop), prefix...)...)},
		{name: "update-as-path-segment-9", established: true, sends: message(update, updateBody(attrs(origin, unhex("40 02 06 09 01 0000fde9"), nextHop), prefix...)...)},
		{name: "update-next-hop-short", established: true, sends: message(update, updateBody(attrs(origin, asPath, unhex("40 03 02 0a63")), prefix...)...)},
		{name: "update-next-hop-multicast", established: true, sends: message(update, updateBody(attrs(origin, asPath, unhex("40 03 04 e0000001")), prefix...)...)},
		{name: "update-unknown-well-known", established: true, sends: message(update, updateBody(attrs(origin, asPath, nextHop, unhex("40 63 01 00")), prefix...)...),
			want: "notification sent: code 3(update) subcode 2(unrecognized well known attribute)"},
		{name: "update-communities-5", established: true, sends: message(update, updateBody(attrs(origin, asPath, nextHop, unhex("c0 08 05 0102030405")), prefix...)...)},
		{name: "update-large-communities-11", established: true, sends: message(update, updateBody(attrs(origin, asPath, nextHop, unhex("c0 20 0b 0102030405060708090a0b")), prefix...)...)},
		{name: "update-med-short", established: true, sends: message(update, updateBody(attrs(origin, asPath, nextHop, unhex("80 04 01 00")), prefix...)...)},
		{name: "update-aggregator-short", established: true, sends: message(update, updateBody(attrs(origin, asPath, nextHop, unhex("c0 07 01 00")), prefix...)...)},
		{name: "update-mp-reach-cut", established: true, sends: message(update, updateBody(attrs(origin, asPath, unhex("80 0e 03 000201")))...),
			want: "notification sent: code 3(update) subcode 5(attribute length error)"},
		{name: "update-mp-reach-next-hop-too-long", established: true, sends: message(update, updateBody(attrs(origin, asPath, unhex("80 0e 05 000201ff00")))...),
			want: "notification sent: code 3(update) subcode 5(attribute length error)"},
		{name: "update-mp-reach-unknown-family", established: true, sends: message(update, updateBody(attrs(origin, asPath, unhex("80 0e 05 6300630000")))...),
			want: "notification sent: code 3(update) subcode 5(attribute length error)"},
		{name: "update-mp-reach-prefix-129", established: true, sends: message(update, updateBody(attrs(origin, asPath,
			unhex("80 0e 26 000201 10 fd990000000000000000000000000002 00 81 0102030405060708090a0b0c0d0e0f10")))...),
			want: "notification sent: code 3(update) subcode 10(invalid network field)"},
		{name: "update-mp-unreach-empty", established: true, sends: message(update, updateBody(unhex("80 0f 00"))...),
			want: "notification sent: code 3(update) subcode 5(attribute length error)"},
		{name: "update-encapsulation", established: true, sends: message(update, updateBody(attrs(origin, asPath, nextHop, unhex("c0 17 04 0001ffff")), prefix...)...)},
		{name: "update-aigp", established: true, sends: message(update, updateBody(attrs(origin, asPath, nextHop, unhex("80 1a 03 01ffff")), prefix...)...)},
		{name: "update-prefix-sid", established: true, sends: message(update, updateBody(attrs(origin, asPath, nextHop, unhex("c0 28 03 05ffff")), prefix...)...)},
		{name: "update-bgp-ls", established: true, sends: message(update, updateBody(attrs(origin, asPath, nextHop, unhex("80 1d 04 0400ffff")), prefix...)...)},
	}
	s := New(slog.New(slog.DiscardHandler), nil)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	c := Config{RouterID: node4, NextHop4: node4, Routes: []announcer.Route{to("192.0.2.1/32")}}
	for i, o := range odd {
		p := peer(1, o.name)
		p.HoldTime, p.ConnectTime = 90*time.Second, 60*time.Second
		p.Address = netip.AddrFrom4([4]byte{127, 9, byte(i), 1})
		listener, err := net.Listen("tcp", netip.AddrPortFrom(p.Address, 0).String())
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = listener.Close() }()
		p.Port = uint16(listener.Addr().(*net.TCPAddr).Port)
		c.Peers = append(c.Peers, p)
		go o.serve(listener)
	}
	s.Set(c)
	for i, o := range odd {
		waitFor(t, "the session with "+o.name, func() error {
			got := s.Sessions()[i]
			alive := o.want == "" && (got.State == "established" || got.State == "openconfirm" && !o.established)
			if got.Peer != o.name || !o.saidBy(got) || alive != (o.want == "") {
				return fmt.Errorf("session is %+v, want Reason %q", got, o.want)
			}
			return nil
		})
	}
	// Those that lived did so to the end.
	for i, o := range odd {
		if got := s.Sessions()[i]; !o.saidBy(got) {
			t.Errorf("session is %+v, want Reason %q", got, o.want)
		}
	}
}

// deafEnv makes the test binary a peer that says all the time that it is there, and reads nothing.
const deafEnv = "LONGSHORE_TEST_BGP_DEAF"

func deaf() error {
	listener, err := net.Listen("tcp", ":179")
	if err != nil {
		return err
	}
	conn, err := listener.Accept()
	if err != nil {
		return err
	}
	_, err = conn.Write(slicesOf(message(open, openBody(3, unhex("02 06 41 04 0000fde9")...)...), message(keepalive)))
	for ; err == nil; time.Sleep(500 * time.Millisecond) {
		_, err = conn.Write(message(keepalive))
	}
	return err
}

// TestPeerThatDoesNotRead has a peer whose window is full before all routes are sent. Then nothing can be sent to it, not even that we
// are there; gobgp does not notice.
func TestPeerThatDoesNotRead(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	l := newLab(t, "deaf")
	run(t, "ip", "netns", "exec", l.ns("speaker"), "sysctl", "-qw", "net.ipv4.tcp_wmem=4096 16384 16384")
	run(t, "ip", "netns", "exec", l.ns("deaf"), "sysctl", "-qw", "net.ipv4.tcp_rmem=4096 16384 16384")
	l.daemon("deaf", "env", deafEnv+"=1", self)
	s := l.speaker(t)
	p := peer(1, "deaf")
	p.HoldTime = 3 * time.Second
	var routes []announcer.Route
	for n := range 50_000 {
		routes = append(routes, announcer.Route{Prefix: netip.PrefixFrom(netip.AddrFrom4([4]byte{11, byte(n >> 16), byte(n >> 8), byte(n)}), 32)})
	}
	s.set(config([]Peer{p}, routes...))
	s.waitState("deaf", "established")
	s.waitReason("deaf", "send hold timer expired: the peer has read nothing for 6s; next attempt in 1m0s")
}
