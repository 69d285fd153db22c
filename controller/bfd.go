package controller

import (
	"cmp"
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/longshore-lb/longshore/announcer/bfd"
	"github.com/longshore-lb/longshore/announcer/bgp"
	"github.com/longshore-lb/longshore/config"
	"github.com/longshore-lb/longshore/config/v1beta1"
	"github.com/longshore-lb/longshore/config/v1beta2"
)

// watchedPeer is a peer, and how the path to it is watched.
type watchedPeer struct {
	config.Peer
	path bgp.BFD
}

// profiles is the BFDProfiles in use by name.
func (a *Agent) profiles(report func(Object, error), warn func(o Object, reason, message string)) map[string]config.BFDProfile {
	profiles := map[string]config.BFDProfile{}
	for _, p := range inUse(a.good.profiles, a.snapshot.profiles, config.ParseBFDProfile, report) {
		profiles[p.Name] = p
	}
	for _, o := range sorted(a.snapshot.profiles) {
		for _, message := range echoWarning(o, profiles[o.Name]) {
			warn(o, "EchoNotSent", message)
		}
	}
	return profiles
}

// echoWarning is what is said of a profile that asks for echo packets.
func echoWarning(o *v1beta1.BFDProfile, p config.BFDProfile) []string {
	if !p.Echo {
		return nil
	}
	return []string{fmt.Sprintf("BFDProfile %s: spec.echoMode: true: longshore sends no echo packets; control packets alone watch the path", nameOf(o))}
}

// watchedBy is a peer with the BFD of the profile that it names.
func watchedBy(o *v1beta2.BGPPeer, p config.Peer, profiles map[string]config.BFDProfile) (watchedPeer, error) {
	if p.BFDProfile == "" {
		return watchedPeer{Peer: p}, nil
	}
	profile, ok := profiles[p.BFDProfile]
	if !ok {
		return watchedPeer{}, fmt.Errorf("BGPPeer %s: spec.bfdProfile: %q: no BFDProfile in use has this name", nameOf(o), p.BFDProfile)
	}
	return watchedPeer{p, bgp.BFD{
		Transmit: profile.Transmit, Receive: profile.Receive, Multiplier: profile.Multiplier,
		MinimumTTL: profile.MinimumTTL, Passive: profile.Passive, Strict: profile.Strict,
	}}, nil
}

// BFDStatus is the BFD session that watches the path to a BGP peer.
type BFDStatus struct {
	State         string    `json:"state"` // down, init, up
	Since         time.Time `json:"since"`
	Reason        string    `json:"reason,omitempty"` // why it is in this state; of up there is none
	Remote        string    `json:"remote"`           // the state as the peer said last, admin-down too
	MultiHop      bool      `json:"multiHop,omitempty"`
	Transmit      int64     `json:"transmitMilliseconds"`  // interval between our packets, as negotiated
	DetectionTime int64     `json:"detectionMilliseconds"` // after which a silent peer is down; 0 = it is not heard
	Problem       string    `json:"problem,omitempty"`     // what is in the way of packets
}

func bfdStatus(s *bfd.Status) *BFDStatus {
	if s == nil {
		return nil
	}
	b := &BFDStatus{
		State: s.State.String(), Since: s.Since, Remote: s.Remote.String(), MultiHop: s.MultiHop,
		Transmit: s.Transmit.Milliseconds(), DetectionTime: s.DetectionTime.Milliseconds(), Problem: s.Problem,
	}
	switch {
	case s.Remote == bfd.AdminDown:
		b.Reason = "the peer has switched it off"
	case s.Diagnostic != bfd.NoDiagnostic:
		b.Reason = s.Diagnostic.String()
	}
	return b
}

// text is the status in a table.
func (b *BFDStatus) text() string {
	if b == nil {
		return "-"
	}
	if why := cmp.Or(b.Problem, b.Reason); why != "" {
		return b.State + ": " + why
	}
	return b.State
}

// bfdMetrics are the metrics of BFD sessions, as MetalLB with FRR has them (internal/bgp/frr metrics), and one of ours.
type bfdMetrics struct {
	sessions func() []bgp.Session
}

var (
	bfdUp        = bfdMetric("metallb_bfd_session_up", "Whether the BFD session is up.")
	bfdUps       = bfdMetric("metallb_bfd_session_up_events", "How often the BFD session has come up.")
	bfdDowns     = bfdMetric("metallb_bfd_session_down_events", "How often the BFD session has gone down.")
	bfdIn        = bfdMetric("metallb_bfd_control_packet_input", "BFD control packets received.")
	bfdOut       = bfdMetric("metallb_bfd_control_packet_output", "BFD control packets sent.")
	bfdDiscarded = bfdMetric("longshore_bfd_packets_discarded_total", "Packets of the peer that were not of the BFD session.")
)

func bfdMetric(name, help string) *prometheus.Desc {
	return prometheus.NewDesc(name, help, []string{"peer"}, nil)
}

// Describe implements prometheus.Collector.
func (m bfdMetrics) Describe(to chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{bfdUp, bfdUps, bfdDowns, bfdIn, bfdOut, bfdDiscarded} {
		to <- d
	}
}

// Collect implements prometheus.Collector.
func (m bfdMetrics) Collect(to chan<- prometheus.Metric) {
	for _, session := range m.sessions() {
		s := session.BFD
		if s == nil {
			continue
		}
		up := 0.
		if s.State == bfd.Up {
			up = 1
		}
		peer := s.Peer.String()
		to <- prometheus.MustNewConstMetric(bfdUp, prometheus.GaugeValue, up, peer)
		for desc, n := range map[*prometheus.Desc]uint64{bfdUps: s.Ups, bfdDowns: s.Downs, bfdIn: s.Received, bfdOut: s.Sent, bfdDiscarded: s.Discarded} {
			to <- prometheus.MustNewConstMetric(desc, prometheus.CounterValue, float64(n), peer)
		}
	}
}
