// Package v1beta2 holds the objects of API group metallb.io, version v1beta2: BGPPeer.
//
// The group and every field name are MetalLB's, so that a cluster's existing objects keep working.
// The types are only the wire form: package config turns them into validated values.
//
// +kubebuilder:object:generate=true
// +groupName=metallb.io
package v1beta2

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// SchemeGroupVersion is metallb.io/v1beta2.
var SchemeGroupVersion = schema.GroupVersion{Group: "metallb.io", Version: "v1beta2"}

var schemeBuilder = runtime.NewSchemeBuilder(func(s *runtime.Scheme) error {
	s.AddKnownTypes(SchemeGroupVersion, &BGPPeer{}, &BGPPeerList{})
	metav1.AddToGroupVersion(s, SchemeGroupVersion)
	return nil
})

// AddToScheme makes the types of this package known to a scheme.
var AddToScheme = schemeBuilder.AddToScheme
