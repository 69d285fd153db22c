// Package v1beta1 holds the objects of API group metallb.io, version v1beta1: IPAddressPool,
// L2Advertisement, BGPAdvertisement, BFDProfile and Community.
//
// The group and every field name are MetalLB's, so that a cluster's existing objects keep working.
// The types are only the wire form: package config turns them into validated values.
//
// +kubebuilder:object:generate=true
// +groupName=metallb.io
package v1beta1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// SchemeGroupVersion is metallb.io/v1beta1.
var SchemeGroupVersion = schema.GroupVersion{Group: "metallb.io", Version: "v1beta1"}

var schemeBuilder = runtime.NewSchemeBuilder(func(s *runtime.Scheme) error {
	s.AddKnownTypes(SchemeGroupVersion,
		&IPAddressPool{}, &IPAddressPoolList{},
		&L2Advertisement{}, &L2AdvertisementList{},
		&BGPAdvertisement{}, &BGPAdvertisementList{},
		&BFDProfile{}, &BFDProfileList{},
		&Community{}, &CommunityList{},
		&BGPPeer{}, &BGPPeerList{},
		&ServiceL2Status{}, &ServiceL2StatusList{},
		&ServiceBGPStatus{}, &ServiceBGPStatusList{},
		&ConfigurationState{}, &ConfigurationStateList{},
	)
	metav1.AddToGroupVersion(s, SchemeGroupVersion)
	return nil
})

// AddToScheme makes the types of this package known to a scheme.
var AddToScheme = schemeBuilder.AddToScheme
