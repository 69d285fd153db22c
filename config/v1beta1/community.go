package v1beta1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// Community gives BGP communities names, for use in BGPAdvertisements.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:storageversion
// +kubebuilder:printcolumn:name="Communities",type=string,JSONPath=`.spec.communities[*].name`
// +kubebuilder:printcolumn:name="Accepted",type=string,JSONPath=`.status.conditions[?(@.type=="Accepted")].status`
type Community struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec   CommunitySpec   `json:"spec,omitempty"`
	Status CommunityStatus `json:"status,omitempty"`
}

// CommunitySpec is what the operator asks for.
type CommunitySpec struct {
	// The names, each for one community. A name is unique among all Communities.
	// +optional
	// +kubebuilder:validation:XValidation:rule="self.all(c, self.exists_one(d, d.name == c.name))",message="every name in communities must be there once"
	// +kubebuilder:validation:MaxItems=256
	Communities []CommunityAlias `json:"communities,omitempty"`
}

// CommunityAlias is a name of a community.
type CommunityAlias struct {
	// The name to write in spec.communities of a BGPAdvertisement.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	// +kubebuilder:validation:XValidation:rule="!self.contains(':')",message="name must have no colon: it would be a community"
	Name string `json:"name,omitempty"`

	// The community: a:b (RFC 1997) or large:a:b:c (RFC 8092).
	// +kubebuilder:validation:MaxLength=64
	// +kubebuilder:validation:XValidation:rule="self.matches('^([0-9]+:[0-9]+|large:[0-9]+:[0-9]+:[0-9]+)$')",message="value must be a:b or large:a:b:c"
	Value string `json:"value,omitempty"`
}

// CommunityStatus is what longshore makes of it.
type CommunityStatus struct {
	// Condition Accepted: whether the object is in use as it is written, and why not.
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// CommunityList is a list of communities.
//
// +kubebuilder:object:root=true
type CommunityList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []Community `json:"items"`
}
