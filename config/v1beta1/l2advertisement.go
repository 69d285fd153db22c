package v1beta1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// L2Advertisement has the addresses of pools answered for by ARP and NDP.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:storageversion
// +kubebuilder:printcolumn:name="IPAddressPools",type=string,JSONPath=`.spec.ipAddressPools`
// +kubebuilder:printcolumn:name="IPAddressPool Selectors",type=string,JSONPath=`.spec.ipAddressPoolSelectors`
// +kubebuilder:printcolumn:name="Interfaces",type=string,JSONPath=`.spec.interfaces`
// +kubebuilder:printcolumn:name="Node Selectors",type=string,JSONPath=`.spec.nodeSelectors`,priority=10
// +kubebuilder:printcolumn:name="Accepted",type=string,JSONPath=`.status.conditions[?(@.type=="Accepted")].status`
type L2Advertisement struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec   L2AdvertisementSpec   `json:"spec,omitempty"`
	Status L2AdvertisementStatus `json:"status,omitempty"`
}

// L2AdvertisementSpec is what the operator asks for.
type L2AdvertisementSpec struct {
	// Names of the pools. With no names and no selectors: every pool.
	// +optional
	IPAddressPools []string `json:"ipAddressPools,omitempty"`

	// Label selectors of pools, in addition to the names; one that matches is enough.
	// +optional
	IPAddressPoolSelectors []metav1.LabelSelector `json:"ipAddressPoolSelectors,omitempty"`

	// Label selectors of the nodes that may announce; one that matches is enough, none means every node.
	// +optional
	NodeSelectors []metav1.LabelSelector `json:"nodeSelectors,omitempty"`

	// Names of the links to answer on; none means every usable one. The election of the
	// node does not look at them: select nodes that have them.
	// +optional
	// +kubebuilder:validation:MaxItems=256
	// +kubebuilder:validation:items:MaxLength=15
	// +kubebuilder:validation:XValidation:rule="self.all(i, i.matches('^[^/: \\\\t\\\\n]+$'))",message="each of interfaces must be the name of a link"
	Interfaces []string `json:"interfaces,omitempty"`

	// Label selectors of the Services this is for; one that matches is enough, none means every Service.
	// +optional
	ServiceSelectors []metav1.LabelSelector `json:"serviceSelectors,omitempty"`

	// Nodes to prefer among those that may announce: the weights of what matches a node add up.
	// +optional
	PreferredNodeSelectors []PreferredNodeSelector `json:"preferredNodeSelectors,omitempty"`
}

// PreferredNodeSelector gives a weight to nodes.
type PreferredNodeSelector struct {
	// What a match adds to the node's preference.
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=100
	Weight int32 `json:"weight"`

	// The nodes, by label. An empty selector matches every node.
	Preference metav1.LabelSelector `json:"preference"`
}

// L2AdvertisementStatus is what longshore makes of it.
type L2AdvertisementStatus struct {
	// Condition Accepted: whether the object is in use as it is written, and why not.
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// L2AdvertisementList is a list of layer 2 advertisements.
//
// +kubebuilder:object:root=true
type L2AdvertisementList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []L2Advertisement `json:"items"`
}
