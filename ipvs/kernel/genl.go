package kernel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Commands and attributes of the IPVS generic netlink family (include/uapi/linux/ip_vs.h).
const (
	cmdNewService = 1
	cmdSetService = 2
	cmdDelService = 3
	cmdGetService = 4
	cmdNewDest    = 5
	cmdSetDest    = 6
	cmdDelDest    = 7
	cmdGetDest    = 8
	cmdGetInfo    = 15

	attrService = 1
	attrDest    = 2

	svcFamily    = 1
	svcProtocol  = 2
	svcAddr      = 3
	svcPort      = 4
	svcMark      = 5
	svcScheduler = 6
	svcFlags     = 7
	svcTimeout   = 8
	svcNetmask   = 9
	svcStats     = 10
	svcEngine    = 11
	svcStats64   = 12

	destAddr        = 1
	destPort        = 2
	destForward     = 3
	destWeight      = 4
	destUpper       = 5
	destLower       = 6
	destActive      = 7
	destInactive    = 8
	destPersistent  = 9
	destStats       = 10
	destFamily      = 11
	destStats64     = 12
	destTunnelType  = 13
	destTunnelPort  = 14
	destTunnelFlags = 15

	infoVersion  = 1
	infoConnSize = 2

	svcFlagPersistent = 0x0001
	svcFlagHashed     = 0x0002
	forwardMask       = 0x0007
)

// batchBytes is how much is sent in one go: well below the default send buffer of a netlink socket (208 KiB).
const batchBytes = 60 << 10

// genl is a socket of the IPVS generic netlink family. It is not safe for concurrent use.
type genl struct {
	fd     int
	family uint16
	seq    uint32
	buf    []byte
}

// openGenl opens a socket in the network namespace of the calling thread. It fails if the kernel has no IPVS.
func openGenl() (*genl, error) {
	family, err := netlink.GenlFamilyGet("IPVS")
	if err != nil {
		return nil, fmt.Errorf("generic netlink family IPVS: %w", err)
	}
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_GENERIC)
	if err != nil {
		return nil, fmt.Errorf("open netlink socket: %w", err)
	}
	// A reply that does not come would otherwise hold its caller for ever.
	timeout := unix.NsecToTimeval(int64(30 * time.Second))
	const receiveBuffer = 4 << 20 // each operation that fails is answered with a datagram of its own
	err = errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, receiveBuffer),
		unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &timeout),
	)
	if err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("set up netlink socket: %w", err)
	}
	return &genl{fd: fd, family: family.ID, buf: make([]byte, 256<<10)}, nil
}

func (g *genl) close() error { return unix.Close(g.fd) }

// message is one request: a command and its attributes.
type message struct {
	command uint8
	attrs   []byte
}

func (g *genl) encode(m message, flags uint16) []byte {
	g.seq++
	b := make([]byte, unix.NLMSG_HDRLEN+4, unix.NLMSG_HDRLEN+4+len(m.attrs))
	binary.NativeEndian.PutUint32(b, uint32(cap(b)))
	binary.NativeEndian.PutUint16(b[4:], g.family)
	binary.NativeEndian.PutUint16(b[6:], flags)
	binary.NativeEndian.PutUint32(b[8:], g.seq)
	b[unix.NLMSG_HDRLEN] = m.command
	b[unix.NLMSG_HDRLEN+1] = 1 // version of the family
	return append(b, m.attrs...)
}

// write sends messages in order and returns an error for each (nil where it was applied). Only the last of
// each batch asks for an acknowledgement: the kernel answers the others if, and only if, they fail.
func (g *genl) write(messages []message) []error {
	errs := make([]error, len(messages))
	for start := 0; start < len(messages); {
		var batch []byte
		first, end := g.seq+1, start
		for end < len(messages) && (end == start || len(batch)+unix.NLMSG_HDRLEN+4+len(messages[end].attrs) < batchBytes) {
			batch = append(batch, g.encode(messages[end], unix.NLM_F_REQUEST)...)
			end++
		}
		last := len(batch) - unix.NLMSG_HDRLEN - 4 - len(messages[end-1].attrs)
		binary.NativeEndian.PutUint16(batch[last+6:], unix.NLM_F_REQUEST|unix.NLM_F_ACK)
		if err := g.exchange(batch, first, errs[start:end]); err != nil {
			for i := start; i < len(messages); i++ {
				errs[i] = err
			}
			return errs
		}
		start = end
	}
	return errs
}

// exchange sends one batch whose messages are numbered from first and waits for the answer to the last.
func (g *genl) exchange(batch []byte, first uint32, errs []error) error {
	if err := g.send(batch); err != nil {
		return err
	}
	last := first + uint32(len(errs)) - 1
	for {
		done := false
		err := g.receive(func(h unix.NlMsghdr, payload []byte) error {
			if h.Type != unix.NLMSG_ERROR || h.Seq-first >= uint32(len(errs)) {
				return nil // a late answer to an earlier batch
			}
			if code := int32(binary.NativeEndian.Uint32(payload)); code != 0 {
				errs[h.Seq-first] = unix.Errno(-code)
			}
			done = done || h.Seq == last
			return nil
		})
		if err != nil || done {
			return err
		}
	}
}

// read sends one request and calls each for the attributes of every answer, until the last.
func (g *genl) read(m message, dump bool, each func(attrs []byte) error) error {
	flags := uint16(unix.NLM_F_REQUEST | unix.NLM_F_ACK)
	if dump {
		flags = unix.NLM_F_REQUEST | unix.NLM_F_DUMP
	}
	request := g.encode(m, flags)
	seq := g.seq
	if err := g.send(request); err != nil {
		return err
	}
	for {
		done := false
		err := g.receive(func(h unix.NlMsghdr, payload []byte) error {
			if h.Seq != seq {
				return nil
			}
			switch h.Type {
			case unix.NLMSG_DONE:
				done = true
			case unix.NLMSG_ERROR:
				done = true
				if code := int32(binary.NativeEndian.Uint32(payload)); code != 0 {
					return unix.Errno(-code)
				}
			case g.family:
				return each(payload[4:])
			}
			return nil
		})
		if err != nil || done {
			return err
		}
	}
}

func (g *genl) send(b []byte) error {
	err := uninterrupted(func() error {
		return unix.Sendto(g.fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	})
	if err != nil {
		return fmt.Errorf("netlink send: %w", err)
	}
	return nil
}

// uninterrupted repeats a system call that a signal ended. With a timeout on the socket the kernel does not (signal(7)).
func uninterrupted(call func() error) error {
	for {
		if err := call(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// receive reads one datagram and hands its messages on.
func (g *genl) receive(each func(h unix.NlMsghdr, payload []byte) error) error {
	n := 0
	err := uninterrupted(func() (err error) {
		n, _, err = unix.Recvfrom(g.fd, g.buf, 0)
		return err
	})
	if err != nil {
		return fmt.Errorf("netlink receive: %w", err)
	}
	for b := g.buf[:n]; len(b) >= unix.NLMSG_HDRLEN; {
		h := unix.NlMsghdr{
			Len:   binary.NativeEndian.Uint32(b),
			Type:  binary.NativeEndian.Uint16(b[4:]),
			Flags: binary.NativeEndian.Uint16(b[6:]),
			Seq:   binary.NativeEndian.Uint32(b[8:]),
		}
		if h.Len < unix.NLMSG_HDRLEN || int(h.Len) > len(b) {
			return fmt.Errorf("netlink receive: message of %d bytes in %d", h.Len, len(b))
		}
		if err := each(h, b[unix.NLMSG_HDRLEN:h.Len]); err != nil {
			return err
		}
		b = b[min(len(b), int(h.Len+unix.NLMSG_ALIGNTO-1)&^(unix.NLMSG_ALIGNTO-1)):]
	}
	return nil
}

// attributes builds a run of netlink attributes.
type attributes []byte

// header begins an attribute whose value has n bytes.
func (a *attributes) header(kind uint16, n int) {
	*a = binary.NativeEndian.AppendUint16(*a, uint16(unix.SizeofNlAttr+n))
	*a = binary.NativeEndian.AppendUint16(*a, kind)
}

func (a *attributes) pad() {
	for len(*a)%unix.NLA_ALIGNTO != 0 {
		*a = append(*a, 0)
	}
}

func (a *attributes) bytes(kind uint16, value []byte) {
	a.header(kind, len(value))
	*a = append(*a, value...)
	a.pad()
}

func (a *attributes) uint8(kind uint16, v uint8) {
	a.header(kind, 1)
	*a = append(*a, v)
	a.pad()
}

func (a *attributes) uint16(kind uint16, v uint16) {
	a.header(kind, 2)
	*a = binary.NativeEndian.AppendUint16(*a, v)
	a.pad()
}

func (a *attributes) uint32(kind uint16, v uint32) {
	a.header(kind, 4)
	*a = binary.NativeEndian.AppendUint32(*a, v)
}

func (a *attributes) port(kind uint16, v uint16) {
	a.header(kind, 2)
	*a = binary.BigEndian.AppendUint16(*a, v)
	a.pad()
}

func (a *attributes) text(kind uint16, v string) { a.bytes(kind, append([]byte(v), 0)) }

func (a *attributes) nested(kind uint16, inner attributes) { a.bytes(kind|unix.NLA_F_NESTED, inner) }

// parse turns a run of attributes into a map by kind.
func parse(b []byte) (map[uint16][]byte, error) {
	list, err := nl.ParseRouteAttr(b)
	if err != nil {
		return nil, err
	}
	m := make(map[uint16][]byte, len(list))
	for _, a := range list {
		m[a.Attr.Type&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER)] = a.Value
	}
	return m, nil
}
