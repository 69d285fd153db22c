package config

import (
	"time"

	"github.com/longshore-lb/longshore/config/v1beta1"
)

// StrictAnnotation on a BFDProfile, "true" or "false": peers with this profile get no BGP session before their BFD session is up.
const StrictAnnotation = "longshore.dev/strict"

// BFDProfile is a validated BFDProfile: how the path to a peer is watched (RFC 5880).
type BFDProfile struct {
	Name       string
	Receive    time.Duration // interval at which packets can be received, 10 ms to 60 s
	Transmit   time.Duration // interval at which packets are sent, 10 ms to 60 s
	Multiplier uint8         // of our interval, after which the peer takes the path for broken, 2 to 255
	MinimumTTL uint8         // of packets of peers more than one hop away, 1 to 254
	Echo       bool          // echo packets are wished for; longshore sends none
	Passive    bool          // nothing is sent until the peer is heard
	Strict     bool          // no BGP session before the BFD session is up
}

// The values of fields that are not set are those of FRR's bfdd, as in MetalLB.
const (
	defaultBFDInterval   = 300 // milliseconds
	defaultBFDMultiplier = 3
	defaultBFDMinimumTTL = 254
)

// ParseBFDProfile validates a BFDProfile.
func ParseBFDProfile(from *v1beta1.BFDProfile) (BFDProfile, error) {
	m := mistakesOf("BFDProfile", &from.ObjectMeta)
	spec := &from.Spec
	milliseconds := func(field string, value *uint32) time.Duration {
		return time.Duration(m.optional(field, value, 10, 60000, defaultBFDInterval)) * time.Millisecond
	}
	p := BFDProfile{
		Name:       from.Name,
		Receive:    milliseconds("spec.receiveInterval", spec.ReceiveInterval),
		Transmit:   milliseconds("spec.transmitInterval", spec.TransmitInterval),
		Multiplier: uint8(m.optional("spec.detectMultiplier", spec.DetectMultiplier, 2, 255, defaultBFDMultiplier)),
		MinimumTTL: uint8(m.optional("spec.minimumTtl", spec.MinimumTTL, 1, 254, defaultBFDMinimumTTL)),
		Echo:       spec.EchoMode != nil && *spec.EchoMode,
		Passive:    spec.PassiveMode != nil && *spec.PassiveMode,
	}
	milliseconds("spec.echoInterval", spec.EchoInterval)
	switch strict, says := from.Annotations[StrictAnnotation]; {
	case strict == "true":
		p.Strict = true
	case says && strict != "false":
		m.add("annotation "+StrictAnnotation, strict, `must be "true" or "false"`)
	}
	if err := m.err(); err != nil {
		return BFDProfile{}, err
	}
	return p, nil
}

// optional reads a number that need not be set.
func (m *mistakes) optional(field string, value *uint32, least, most, unset uint32) uint32 {
	switch {
	case value == nil:
		return unset
	case *value < least || *value > most:
		m.add(field, *value, "must be between %d and %d", least, most)
	}
	return *value
}
