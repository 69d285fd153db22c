package v1beta1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// Labels of the objects below.
const (
	NodeLabel             = "metallb.io/node"
	ServiceNameLabel      = "metallb.io/service-name"
	ServiceNamespaceLabel = "metallb.io/service-namespace"
	ComponentLabel        = "metallb.io/component-type" // of ConfigurationState: speaker or controller
	NodeNameLabel         = "metallb.io/node-name"      // of ConfigurationState, if that is a node's
)

// ServiceL2Status says that a node answers ARP or NDP for an address of a Service. The node writes it, in longshore's namespace.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:storageversion
// +kubebuilder:printcolumn:name="Allocated Node",type=string,JSONPath=`.status.node`
// +kubebuilder:printcolumn:name="Service Name",type=string,JSONPath=`.status.serviceName`
// +kubebuilder:printcolumn:name="Service Namespace",type=string,JSONPath=`.status.serviceNamespace`
type ServiceL2Status struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec   ServiceL2StatusSpec    `json:"spec,omitempty"`
	Status MetalLBServiceL2Status `json:"status,omitempty"`
}

// ServiceL2StatusSpec is empty.
type ServiceL2StatusSpec struct{}

// MetalLBServiceL2Status is what the node says. The name is MetalLB's.
type MetalLBServiceL2Status struct {
	// The node that answers.
	// +optional
	Node string `json:"node,omitempty"`

	// Name of the Service.
	// +optional
	ServiceName string `json:"serviceName,omitempty"`

	// Namespace of the Service.
	// +optional
	ServiceNamespace string `json:"serviceNamespace,omitempty"`

	// The links it answers on; none means every usable one.
	// +optional
	Interfaces []InterfaceInfo `json:"interfaces,omitempty"`
}

// InterfaceInfo is a link.
type InterfaceInfo struct {
	// Its name.
	// +optional
	Name string `json:"name,omitempty"`
}

// ServiceL2StatusList is a list of them.
//
// +kubebuilder:object:root=true
type ServiceL2StatusList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []ServiceL2Status `json:"items"`
}

// ServiceBGPStatus says to which peers a node advertises the addresses of a Service. The node writes it, in longshore's namespace.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:storageversion
// +kubebuilder:printcolumn:name="Node",type=string,JSONPath=`.status.node`
// +kubebuilder:printcolumn:name="Service Name",type=string,JSONPath=`.status.serviceName`
// +kubebuilder:printcolumn:name="Service Namespace",type=string,JSONPath=`.status.serviceNamespace`
type ServiceBGPStatus struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec   ServiceBGPStatusSpec    `json:"spec,omitempty"`
	Status MetalLBServiceBGPStatus `json:"status,omitempty"`
}

// ServiceBGPStatusSpec is empty.
type ServiceBGPStatusSpec struct{}

// MetalLBServiceBGPStatus is what the node says. The name is MetalLB's.
type MetalLBServiceBGPStatus struct {
	// The node that advertises.
	// +optional
	Node string `json:"node,omitempty"`

	// Name of the Service.
	// +optional
	ServiceName string `json:"serviceName,omitempty"`

	// Namespace of the Service.
	// +optional
	ServiceNamespace string `json:"serviceNamespace,omitempty"`

	// Names of the BGPPeers it is meant for, whether or not there is a session.
	// +optional
	Peers []string `json:"peers,omitempty"`
}

// ServiceBGPStatusList is a list of them.
//
// +kubebuilder:object:root=true
type ServiceBGPStatusList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []ServiceBGPStatus `json:"items"`
}

// ConfigurationState says whether a part of longshore uses all objects of group metallb.io as they are written. Each agent writes
// one, in longshore's namespace, with labels metallb.io/component-type and metallb.io/node-name.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:storageversion
// +kubebuilder:printcolumn:name="Result",type=string,JSONPath=`.status.result`
// +kubebuilder:printcolumn:name="LastError",type=string,JSONPath=`.status.lastError`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type ConfigurationState struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Status ConfigurationStateStatus `json:"status,omitempty"`
}

// ConfigurationStateStatus is what the agent says.
type ConfigurationStateStatus struct {
	// Valid, or Invalid if an object is not in use as it is written.
	// +optional
	// +kubebuilder:validation:Enum=Valid;Invalid;Unknown
	Result string `json:"result,omitempty"`

	// What is wrong, a line for each mistake; it names object, field and value.
	// +optional
	LastError string `json:"lastError,omitempty"`

	// Not used by longshore.
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// ConfigurationStateList is a list of them.
//
// +kubebuilder:object:root=true
type ConfigurationStateList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []ConfigurationState `json:"items"`
}
