package v1beta1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// BGPAdvertisement has the addresses of pools advertised to BGP peers.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:storageversion
// +kubebuilder:printcolumn:name="IPAddressPools",type=string,JSONPath=`.spec.ipAddressPools`
// +kubebuilder:printcolumn:name="IPAddressPool Selectors",type=string,JSONPath=`.spec.ipAddressPoolSelectors`
// +kubebuilder:printcolumn:name="Peers",type=string,JSONPath=`.spec.peers`
// +kubebuilder:printcolumn:name="Node Selectors",type=string,JSONPath=`.spec.nodeSelectors`,priority=10
// +kubebuilder:printcolumn:name="Accepted",type=string,JSONPath=`.status.conditions[?(@.type=="Accepted")].status`
type BGPAdvertisement struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec   BGPAdvertisementSpec   `json:"spec,omitempty"`
	Status BGPAdvertisementStatus `json:"status,omitempty"`
}

// BGPAdvertisementSpec is what the operator asks for.
//
// +kubebuilder:validation:XValidation:rule="!has(self.serviceSelectors) || size(self.serviceSelectors) == 0 || (self.aggregationLength == 32 && self.aggregationLengthV6 == 128)",message="serviceSelectors need aggregationLength 32 and aggregationLengthV6 128: an aggregate would carry other Services along"
type BGPAdvertisementSpec struct {
	// Length of the prefix that IPv4 addresses are rolled up into; 32 is none.
	// +optional
	// +kubebuilder:default=32
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=32
	AggregationLength *int32 `json:"aggregationLength,omitempty"`

	// Length of the prefix that IPv6 addresses are rolled up into; 128 is none.
	// +optional
	// +kubebuilder:default=128
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=128
	AggregationLengthV6 *int32 `json:"aggregationLengthV6,omitempty"`

	// LOCAL_PREF (RFC 4271 section 5.1.5), which only peers in our own AS see; higher is preferred, 0 is not set.
	// +optional
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=4294967295
	// +kubebuilder:validation:Format=int64
	LocalPref uint32 `json:"localPref,omitempty"`

	// Communities to attach: a:b (RFC 1997), large:a:b:c (RFC 8092), or a name that a Community object gives one.
	// +optional
	// +kubebuilder:validation:MaxItems=256
	// +kubebuilder:validation:items:MaxLength=253
	// +kubebuilder:validation:XValidation:rule="self.all(c, size(c) > 0 && (!c.contains(':') || c.matches('^([0-9]+:[0-9]+|large:[0-9]+:[0-9]+:[0-9]+)$')))",message="each of communities must be a:b, large:a:b:c or the name of one"
	Communities []string `json:"communities,omitempty"`

	// Names of the pools. With no names and no selectors: every pool.
	// +optional
	IPAddressPools []string `json:"ipAddressPools,omitempty"`

	// Label selectors of pools, in addition to the names; one that matches is enough.
	// +optional
	IPAddressPoolSelectors []metav1.LabelSelector `json:"ipAddressPoolSelectors,omitempty"`

	// Label selectors of the nodes that advertise; one that matches is enough, none means every node.
	// +optional
	NodeSelectors []metav1.LabelSelector `json:"nodeSelectors,omitempty"`

	// Names of the BGPPeers that get it; none means all.
	// +optional
	Peers []string `json:"peers,omitempty"`

	// Label selectors of the Services this is for; one that matches is enough, none means every Service.
	// +optional
	ServiceSelectors []metav1.LabelSelector `json:"serviceSelectors,omitempty"`
}

// BGPAdvertisementStatus is what longshore makes of it.
type BGPAdvertisementStatus struct {
	// Condition Accepted: whether the object is in use as it is written, and why not.
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// BGPAdvertisementList is a list of BGP advertisements.
//
// +kubebuilder:object:root=true
type BGPAdvertisementList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []BGPAdvertisement `json:"items"`
}
