package v1beta2

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// BGPPeer is a router that nodes keep a BGP session with.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:storageversion
// +kubebuilder:printcolumn:name="Address",type=string,JSONPath=`.spec.peerAddress`
// +kubebuilder:printcolumn:name="ASN",type=string,JSONPath=`.spec.peerASN`
// +kubebuilder:printcolumn:name="BFD Profile",type=string,JSONPath=`.spec.bfdProfile`
// +kubebuilder:printcolumn:name="Multi Hops",type=string,JSONPath=`.spec.ebgpMultiHop`
// +kubebuilder:printcolumn:name="Accepted",type=string,JSONPath=`.status.conditions[?(@.type=="Accepted")].status`
type BGPPeer struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec   BGPPeerSpec   `json:"spec,omitempty"`
	Status BGPPeerStatus `json:"status,omitempty"`
}

// BGPPeerSpec is what the operator asks for.
//
// +kubebuilder:validation:XValidation:rule="(has(self.peerASN) && self.peerASN != 0) != (has(self.dynamicASN) && size(self.dynamicASN) > 0)",message="exactly one of peerASN and dynamicASN must be set"
// +kubebuilder:validation:XValidation:rule="(has(self.peerAddress) && size(self.peerAddress) > 0) != (has(self.interface) && size(self.interface) > 0)",message="exactly one of peerAddress and interface must be set"
// +kubebuilder:validation:XValidation:rule="!(has(self.password) && size(self.password) > 0 && has(self.passwordSecret) && has(self.passwordSecret.name) && size(self.passwordSecret.name) > 0)",message="password and passwordSecret exclude each other"
// +kubebuilder:validation:XValidation:rule="!has(self.keepaliveTime) || duration(self.keepaliveTime) <= duration(has(self.holdTime) ? self.holdTime : '90s')",message="keepaliveTime must not be longer than holdTime"
// +kubebuilder:validation:XValidation:rule="!has(self.keepaliveTime) || (has(self.holdTime) && duration(self.holdTime) == duration('0s') ? duration(self.keepaliveTime) == duration('0s') : duration(self.keepaliveTime) >= duration('1s'))",message="keepaliveTime must be at least 1s, and 0s or not set with holdTime 0s"
// +kubebuilder:validation:XValidation:rule="!(has(self.peerASN) && self.peerASN != 0 && has(self.ebgpMultiHop) && self.ebgpMultiHop) || self.peerASN != (has(self.localASN) && self.localASN != 0 ? self.localASN : self.myASN)",message="ebgpMultiHop is for external peers, and peerASN is our own AS"
// +kubebuilder:validation:XValidation:rule="!(has(self.dynamicASN) && self.dynamicASN == 'internal' && has(self.ebgpMultiHop) && self.ebgpMultiHop)",message="ebgpMultiHop is for external peers, and dynamicASN is internal"
// +kubebuilder:validation:XValidation:rule="!(has(self.disableMP) && self.disableMP && has(self.dualStackAddressFamily) && self.dualStackAddressFamily)",message="disableMP and dualStackAddressFamily exclude each other"
// +kubebuilder:validation:XValidation:rule="!has(self.sourceAddress) || size(self.sourceAddress) == 0 || !has(self.peerAddress) || size(self.peerAddress) == 0 || !isIP(self.sourceAddress) || !isIP(self.peerAddress) || ip(self.sourceAddress).family() == ip(self.peerAddress).family()",message="sourceAddress must be of the family of peerAddress"
// +kubebuilder:validation:XValidation:rule="!has(self.passwordSecret) || !has(self.passwordSecret.__namespace__) || size(self.passwordSecret.__namespace__) == 0 || (has(self.passwordSecret.name) && size(self.passwordSecret.name) > 0)",message="passwordSecret.name must be set"
type BGPPeerSpec struct {
	// AS number of our end of the session.
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=4294967295
	// +kubebuilder:validation:Format=int64
	MyASN uint32 `json:"myASN"`

	// AS number expected of the peer.
	// +optional
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=4294967295
	// +kubebuilder:validation:Format=int64
	PeerASN uint32 `json:"peerASN,omitempty"`

	// Instead of peerASN: internal takes a peer in our own AS, external one in any other.
	// +optional
	// +kubebuilder:validation:Enum=internal;external
	DynamicASN string `json:"dynamicASN,omitempty"`

	// AS number to show to this peer instead of myASN; 0 is not set.
	// +optional
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=4294967295
	// +kubebuilder:validation:Format=int64
	LocalASN uint32 `json:"localASN,omitempty"`

	// Address of the peer.
	// +optional
	// +kubebuilder:validation:MaxLength=45
	// +kubebuilder:validation:XValidation:rule="size(self) == 0 || isIP(self)",message="peerAddress must be an IP address"
	PeerAddress string `json:"peerAddress,omitempty"`

	// Instead of peerAddress: the link on which the peer is found (unnumbered BGP).
	// +optional
	// +kubebuilder:validation:MaxLength=15
	Interface string `json:"interface,omitempty"`

	// Our own address of the session; the kernel chooses if it is not set.
	// +optional
	// +kubebuilder:validation:MaxLength=45
	// +kubebuilder:validation:XValidation:rule="size(self) == 0 || isIP(self)",message="sourceAddress must be an IP address"
	SourceAddress string `json:"sourceAddress,omitempty"`

	// TCP port of the peer.
	// +optional
	// +kubebuilder:default=179
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=65535
	PeerPort uint16 `json:"peerPort,omitempty"`

	// Hold time to propose (RFC 4271 section 4.2): 0 to keep a silent session for ever, else 3s to 65535s. 90s if not set.
	// +optional
	// +kubebuilder:validation:XValidation:rule="duration(self) == duration('0s') || (duration(self) >= duration('3s') && duration(self) <= duration('65535s'))",message="holdTime must be 0 or between 3s and 65535s"
	// +kubebuilder:validation:XValidation:rule="duration(self).getMilliseconds() % 1000 == 0",message="holdTime must be whole seconds"
	HoldTime *metav1.Duration `json:"holdTime,omitempty"`

	// Time between keepalives, at most the hold time. A third of the hold time if not set.
	// +optional
	// +kubebuilder:validation:XValidation:rule="duration(self).getMilliseconds() % 1000 == 0",message="keepaliveTime must be whole seconds"
	KeepaliveTime *metav1.Duration `json:"keepaliveTime,omitempty"`

	// Time between attempts to connect, whole seconds.
	// +optional
	// +kubebuilder:validation:XValidation:rule="duration(self) >= duration('1s') && duration(self) <= duration('65535s')",message="connectTime must be between 1s and 65535s"
	// +kubebuilder:validation:XValidation:rule="duration(self).getMilliseconds() % 1000 == 0",message="connectTime must be whole seconds"
	ConnectTime *metav1.Duration `json:"connectTime,omitempty"`

	// BGP identifier (RFC 4271 section 4.2), an IPv4 address; derived from the node if not set.
	// +optional
	// +kubebuilder:validation:MaxLength=15
	// +kubebuilder:validation:XValidation:rule="size(self) == 0 || (isIP(self) && ip(self).family() == 4)",message="routerID must be an IPv4 address"
	RouterID string `json:"routerID,omitempty"`

	// Label selectors of the nodes that connect to this peer; one that matches is enough, none means every node.
	// +optional
	NodeSelectors []metav1.LabelSelector `json:"nodeSelectors,omitempty"`

	// TCP MD5 password (RFC 2385).
	// +optional
	// +kubebuilder:validation:MaxLength=80
	Password string `json:"password,omitempty"`

	// Secret of type kubernetes.io/basic-auth in our own namespace whose key "password" is the TCP MD5 password.
	// +optional
	// +structType=atomic
	PasswordSecret SecretReference `json:"passwordSecret,omitempty"`

	// Name of the BFDProfile to watch the peer with.
	// +optional
	BFDProfile string `json:"bfdProfile,omitempty"`

	// Whether the peer keeps our routes while the agent restarts (RFC 4724).
	// +optional
	EnableGracefulRestart bool `json:"enableGracefulRestart,omitempty"`

	// Whether an external peer may be more than one hop away.
	// +optional
	EBGPMultiHop bool `json:"ebgpMultiHop,omitempty"`

	// Name of the VRF of the node that the session runs in.
	// +optional
	// +kubebuilder:validation:MaxLength=15
	VRF string `json:"vrf,omitempty"`

	// Deprecated by MetalLB; the same as dualStackAddressFamily false.
	// +optional
	// +kubebuilder:default=false
	DisableMP bool `json:"disableMP,omitempty"`

	// Whether the session carries routes of both families, not only those of the peer address's own.
	// +optional
	// +kubebuilder:default=false
	DualStackAddressFamily bool `json:"dualStackAddressFamily,omitempty"`
}

// SecretReference names a Secret.
type SecretReference struct {
	// Name of the Secret.
	// +optional
	Name string `json:"name,omitempty"`

	// Namespace of the Secret; only our own is possible.
	// +optional
	Namespace string `json:"namespace,omitempty"`
}

// BGPPeerStatus is what longshore makes of it.
type BGPPeerStatus struct {
	// Condition Accepted: whether the object is in use as it is written, and why not.
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// BGPPeerList is a list of peers.
//
// +kubebuilder:object:root=true
type BGPPeerList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []BGPPeer `json:"items"`
}
