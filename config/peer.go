package config

import (
	"net/netip"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/longshore-lb/longshore/config/v1beta2"
)

// Peer is a validated BGPPeer.
type Peer struct {
	Name            string
	MyASN           uint32        // our AS, 1 to 4294967295
	PeerASN         uint32        // the router's AS, 1 to 4294967295; 0 with AnyASN
	AnyASN          bool          // the router may be in any AS but ours
	LocalASN        uint32        // our AS as this router sees it; 0 = MyASN
	Address         netip.Addr    // of the router; invalid with Interface
	Interface       string        // the link on which the router is found; empty with Address
	Source          netip.Addr    // our end of the session, of the same family; invalid = the kernel chooses
	Port            uint16        // TCP port of the router, not 0
	HoldTime        time.Duration // 3 s to 65535 s, whole seconds
	KeepaliveTime   time.Duration // 1 s to HoldTime, whole seconds
	ConnectTime     time.Duration // pause between two attempts to connect, 1 s to 65535 s, whole seconds; 0 = not set
	RouterID        netip.Addr    // BGP identifier, an IPv4 address; invalid = not set
	Password        string        // TCP MD5 (RFC 2385); empty = none, or in PasswordSecret
	PasswordSecret  string        // name of a Secret in our namespace whose key "password" is the password; empty = none
	EBGPMultiHop    bool          // the router is external and may be more than one hop away
	TTLSecurityHops uint8         // GTSM (RFC 5082): packets from further away are dropped, 1 to 254 hops; 0 = off
	VRF             string        // name of the VRF's device on the node; empty = none
	GracefulRestart bool          // the router keeps our routes while we restart (RFC 4724)
	DualStack       bool          // the session carries routes of both families, not only of Address's own; with Interface both anyway
	BFDProfile      string        // name of the BFDProfile the path is watched with; empty = it is not watched

	// Warnings are what is said in the object and does not come about as it is said; each names object, field and value.
	Warnings []string

	nodes []labels.Selector
}

// TTLSecurityAnnotation on a BGPPeer is Peer.TTLSecurityHops, a number: 1 for a router on a link of the node.
const TTLSecurityAnnotation = "longshore.dev/ttl-security-hops"

// SelectsNode tells whether a node, by its labels, keeps a session with the peer.
func (p Peer) SelectsNode(nodeLabels labels.Set) bool {
	return len(p.nodes) == 0 || anyMatches(p.nodes, nodeLabels)
}

const (
	defaultPeerPort = 179              // IANA
	defaultHoldTime = 90 * time.Second // RFC 4271 section 10
	maxTime         = 65535 * time.Second
	maxMD5Password  = 80 // TCP_MD5SIG_MAXKEYLEN, include/uapi/linux/tcp.h
)

// ParsePeer validates a BGPPeer.
func ParsePeer(from *v1beta2.BGPPeer) (Peer, error) {
	m := mistakesOf("BGPPeer", &from.ObjectMeta)
	spec := &from.Spec
	p := Peer{
		Name:            from.Name,
		MyASN:           spec.MyASN,
		PeerASN:         spec.PeerASN,
		LocalASN:        spec.LocalASN,
		Port:            spec.PeerPort,
		Password:        spec.Password,
		PasswordSecret:  spec.PasswordSecret.Name,
		EBGPMultiHop:    spec.EBGPMultiHop,
		GracefulRestart: spec.EnableGracefulRestart,
		DualStack:       spec.DualStackAddressFamily || spec.Interface != "",
		BFDProfile:      spec.BFDProfile,
		VRF:             spec.VRF,
		Interface:       spec.Interface,
		TTLSecurityHops: uint8(m.number(from, TTLSecurityAnnotation, 1, 254)),
		nodes:           m.selectors("spec.nodeSelectors", spec.NodeSelectors),
	}
	m.peerASNs(spec, &p)
	m.peerAddresses(spec, &p)
	if p.Port == 0 {
		p.Port = defaultPeerPort
	}
	m.peerTimes(spec, &p)
	m.peerPassword(from)
	if spec.VRF != "" {
		m.link("spec.vrf", spec.VRF)
	}
	if p.TTLSecurityHops != 0 && spec.EBGPMultiHop {
		m.add("spec.ebgpMultiHop", true, "excludes annotation %s", TTLSecurityAnnotation)
	}
	warnings := mistakesOf("BGPPeer", &from.ObjectMeta)
	if spec.DisableMP {
		if spec.DualStackAddressFamily {
			m.add("spec.disableMP", true, "excludes dualStackAddressFamily true")
		}
		warnings.add("spec.disableMP", true, "the session still offers both families (RFC 4760); only routes of peerAddress's own are sent")
	}
	if spec.HoldTime != nil && spec.HoldTime.Duration == 0 {
		warnings.add("spec.holdTime", "0s", "the speaker cannot offer 0; it offers %s, and takes 0 if the peer offers that", maxTime)
	}
	for _, w := range warnings.errs {
		p.Warnings = append(p.Warnings, w.Error())
	}
	if err := m.err(); err != nil {
		return Peer{}, err
	}
	return p, nil
}

func (m *mistakes) peerASNs(spec *v1beta2.BGPPeerSpec, p *Peer) {
	if spec.MyASN == 0 {
		m.missing("spec.myASN")
	}
	local := spec.LocalASN
	if local == 0 {
		local = spec.MyASN
	}
	switch {
	case spec.PeerASN == 0 && spec.DynamicASN == "":
		m.missing("spec.peerASN")
	case spec.PeerASN != 0 && spec.DynamicASN != "":
		m.add("spec.peerASN", spec.PeerASN, "excludes dynamicASN")
	case spec.DynamicASN == "internal":
		p.PeerASN = local
	case spec.DynamicASN == "external":
		p.AnyASN = true
	case spec.DynamicASN != "":
		m.add("spec.dynamicASN", spec.DynamicASN, "neither internal nor external")
	}
	if local != 0 && p.PeerASN == local && spec.EBGPMultiHop {
		m.add("spec.ebgpMultiHop", true, "the peer is internal: AS %d", p.PeerASN)
	}
}

func (m *mistakes) peerAddresses(spec *v1beta2.BGPPeerSpec, p *Peer) {
	if spec.PeerAddress == "" && spec.Interface == "" {
		m.missing("spec.peerAddress")
	}
	if spec.PeerAddress != "" && spec.Interface != "" {
		m.add("spec.peerAddress", spec.PeerAddress, "excludes interface")
	}
	if spec.Interface != "" {
		m.link("spec.interface", spec.Interface)
		if spec.SourceAddress != "" {
			m.add("spec.sourceAddress", spec.SourceAddress, "excludes interface, whose link-local address it is")
		}
		if spec.EBGPMultiHop {
			m.add("spec.ebgpMultiHop", true, "excludes interface")
		}
	}
	p.Address = m.host("spec.peerAddress", spec.PeerAddress)
	p.Source = m.host("spec.sourceAddress", spec.SourceAddress)
	if p.Address.IsValid() && p.Source.IsValid() && p.Address.BitLen() != p.Source.BitLen() {
		m.add("spec.sourceAddress", spec.SourceAddress, "not of the family of peerAddress %s", p.Address)
	}
	p.RouterID = m.host("spec.routerID", spec.RouterID)
	if p.RouterID.Is6() {
		m.add("spec.routerID", spec.RouterID, "must be an IPv4 address")
	}
}

// host reads the address of a host; without text, or with a mistake noted, it is invalid.
func (m *mistakes) host(field, text string) netip.Addr {
	if text == "" {
		return netip.Addr{}
	}
	a, err := parseAddr(text)
	if err != nil {
		m.add(field, text, "%w", err)
		return netip.Addr{}
	}
	if a.IsUnspecified() || a.IsMulticast() {
		m.add(field, text, "not the address of a host")
		return netip.Addr{}
	}
	return a
}

func (m *mistakes) peerTimes(spec *v1beta2.BGPPeerSpec, p *Peer) {
	if spec.HoldTime != nil && spec.HoldTime.Duration == 0 {
		// RFC 4271 section 4.2 allows 0: a silent peer is never missed. This is the longest that can be.
		p.HoldTime = maxTime
		p.KeepaliveTime = (maxTime / 3).Truncate(time.Second)
		if k := spec.KeepaliveTime; k != nil && k.Duration != 0 {
			m.add("spec.keepaliveTime", k.Duration.String(), "must be 0s or not set with holdTime 0s")
		}
	} else {
		p.HoldTime = m.time("spec.holdTime", spec.HoldTime, 3*time.Second, maxTime, defaultHoldTime)
		third := max(time.Second, (p.HoldTime / 3).Truncate(time.Second)) // RFC 4271 section 10
		p.KeepaliveTime = m.time("spec.keepaliveTime", spec.KeepaliveTime, time.Second, p.HoldTime, third)
	}
	p.ConnectTime = m.time("spec.connectTime", spec.ConnectTime, time.Second, maxTime, 0)
}

// time reads a time of whole seconds.
func (m *mistakes) time(field string, t *metav1.Duration, least, most, unset time.Duration) time.Duration {
	switch {
	case t == nil:
		return unset
	case t.Duration < least || t.Duration > most:
		m.add(field, t.Duration.String(), "must be between %s and %s", least, most)
	case t.Duration%time.Second != 0:
		m.add(field, t.Duration.String(), "must be whole seconds")
	}
	return t.Duration
}

func (m *mistakes) peerPassword(from *v1beta2.BGPPeer) {
	password, secret := from.Spec.Password, from.Spec.PasswordSecret
	if password != "" && secret.Name != "" {
		m.add("spec.passwordSecret.name", secret.Name, "excludes password")
	}
	if len(password) > maxMD5Password {
		m.add("spec.password", "(not shown)", "has %d bytes, TCP MD5 takes %d", len(password), maxMD5Password)
	}
	if secret.Namespace != "" && from.Namespace != "" && secret.Namespace != from.Namespace {
		m.add("spec.passwordSecret.namespace", secret.Namespace, "must be the peer's own, %q", from.Namespace)
	}
	if secret.Namespace != "" && secret.Name == "" {
		m.missing("spec.passwordSecret.name")
	}
}
