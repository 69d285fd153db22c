package bfd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"
)

// State is the state of a session (RFC 5880 section 4.1).
type State uint8

// The states of RFC 5880 section 4.1.
const (
	AdminDown State = iota // switched off on purpose: says nothing about the path
	Down
	Init // the peer is heard, and does not yet say that it hears us
	Up
)

func (s State) String() string {
	if int(s) < len(stateNames) {
		return stateNames[s]
	}
	return fmt.Sprintf("state %d", uint8(s))
}

var stateNames = [...]string{"admin-down", "down", "init", "up"}

// Diagnostic says why a session left its last state (RFC 5880 section 4.1).
type Diagnostic uint8

// The diagnostics that we send.
const (
	NoDiagnostic         Diagnostic = 0
	DetectionTimeExpired Diagnostic = 1
	NeighborDown         Diagnostic = 3
	Administratively     Diagnostic = 7
)

func (d Diagnostic) String() string {
	if int(d) < len(diagnosticNames) {
		return diagnosticNames[d]
	}
	return fmt.Sprintf("diagnostic %d", uint8(d))
}

var diagnosticNames = [...]string{
	"no diagnostic", "control detection time expired", "echo function failed", "neighbor signaled session down", "forwarding plane reset",
	"path down", "concatenated path down", "administratively down", "reverse concatenated path down",
}

// packet is a control packet without authentication (RFC 5880 section 4.1). Intervals are whole microseconds, at most 4294 s.
type packet struct {
	diagnostic Diagnostic
	state      State
	poll       bool
	final      bool
	demand     bool
	multiplier uint8
	my, your   uint32 // discriminators, as the sender sees them

	desiredMinTx  time.Duration
	requiredMinRx time.Duration
}

const packetLength = 24

// The bits of the second byte.
const (
	flagPoll           = 1 << 5
	flagFinal          = 1 << 4
	flagAuthentication = 1 << 2
	flagDemand         = 1 << 1
	flagMultipoint     = 1 << 0
)

// parse reads a control packet. It makes the checks of RFC 5880 section 6.8.6 that need no session; of what is authenticated it
// takes nothing, as no session of ours is.
func parse(b []byte) (packet, error) {
	if len(b) < packetLength {
		return packet{}, fmt.Errorf("packet of %d bytes is shorter than %d", len(b), packetLength)
	}
	if version := b[0] >> 5; version != 1 {
		return packet{}, fmt.Errorf("version is %d, not 1", version)
	}
	flags, length := b[1], int(b[3])
	if flags&flagAuthentication != 0 {
		return packet{}, errors.New("packet is authenticated, which is not supported")
	}
	if length < packetLength || length > len(b) {
		return packet{}, fmt.Errorf("length %d in a packet of %d bytes", length, len(b))
	}
	p := packet{
		diagnostic:    Diagnostic(b[0] & 0x1f),
		state:         State(flags >> 6),
		poll:          flags&flagPoll != 0,
		final:         flags&flagFinal != 0,
		demand:        flags&flagDemand != 0,
		multiplier:    b[2],
		my:            binary.BigEndian.Uint32(b[4:]),
		your:          binary.BigEndian.Uint32(b[8:]),
		desiredMinTx:  microseconds(b[12:]),
		requiredMinRx: microseconds(b[16:]),
	}
	switch {
	case p.multiplier == 0:
		return packet{}, errors.New("detection multiplier is 0")
	case flags&flagMultipoint != 0:
		return packet{}, errors.New("multipoint bit is set")
	case p.my == 0:
		return packet{}, errors.New("my discriminator is 0")
	case p.your == 0 && p.state != Down && p.state != AdminDown:
		return packet{}, fmt.Errorf("your discriminator is 0 in state %v", p.state)
	}
	return p, nil
}

func microseconds(b []byte) time.Duration {
	return time.Duration(binary.BigEndian.Uint32(b)) * time.Microsecond
}

// marshal is the packet on the wire. Required Min Echo RX is 0: we return no echo packets. The C bit is 0: when the agent ends, so
// do its sessions.
func (p packet) marshal() []byte {
	b := make([]byte, packetLength)
	b[0] = 1<<5 | byte(p.diagnostic)
	b[1] = byte(p.state) << 6
	if p.poll {
		b[1] |= flagPoll
	}
	if p.final {
		b[1] |= flagFinal
	}
	if p.demand {
		b[1] |= flagDemand
	}
	b[2], b[3] = p.multiplier, packetLength
	binary.BigEndian.PutUint32(b[4:], p.my)
	binary.BigEndian.PutUint32(b[8:], p.your)
	binary.BigEndian.PutUint32(b[12:], uint32(p.desiredMinTx/time.Microsecond))
	binary.BigEndian.PutUint32(b[16:], uint32(p.requiredMinRx/time.Microsecond))
	return b
}
