package v1beta1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/longshore-lb/longshore/config/v1beta2"
)

// BGPPeer is a BGPPeer of v1beta2 under its older version. Its fields are those of v1beta2, of which MetalLB's v1beta1 had a part: so
// the API server turns one into the other without a webhook, and what is read in one version and written back loses nothing.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:deprecatedversion:warning="metallb.io/v1beta1 BGPPeer is deprecated: write apiVersion metallb.io/v1beta2"
// +kubebuilder:printcolumn:name="Address",type=string,JSONPath=`.spec.peerAddress`
// +kubebuilder:printcolumn:name="ASN",type=string,JSONPath=`.spec.peerASN`
type BGPPeer struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec   v1beta2.BGPPeerSpec   `json:"spec,omitempty"`
	Status v1beta2.BGPPeerStatus `json:"status,omitempty"`
}

// Current is the peer in the version that is read.
func (p *BGPPeer) Current() *v1beta2.BGPPeer {
	return &v1beta2.BGPPeer{ObjectMeta: p.ObjectMeta, Spec: p.Spec, Status: p.Status}
}

// BGPPeerList is a list of peers.
//
// +kubebuilder:object:root=true
type BGPPeerList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []BGPPeer `json:"items"`
}
