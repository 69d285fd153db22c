package v1beta1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// IPAddressPool is a set of addresses that Services of type LoadBalancer get theirs from.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:storageversion
// +kubebuilder:printcolumn:name="Auto Assign",type=boolean,JSONPath=`.spec.autoAssign`
// +kubebuilder:printcolumn:name="Avoid Buggy IPs",type=boolean,JSONPath=`.spec.avoidBuggyIPs`
// +kubebuilder:printcolumn:name="Addresses",type=string,JSONPath=`.spec.addresses`
// +kubebuilder:printcolumn:name="Accepted",type=string,JSONPath=`.status.conditions[?(@.type=="Accepted")].status`
type IPAddressPool struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec   IPAddressPoolSpec   `json:"spec"`
	Status IPAddressPoolStatus `json:"status,omitempty"`
}

// IPAddressPoolSpec is what the operator asks for.
type IPAddressPoolSpec struct {
	// Address ranges, each a CIDR (10.1.0.0/24, fd00::/112) or first and last address (10.1.0.10-10.1.0.20).
	// Both families may appear in one pool; ranges must not overlap, here or in another pool.
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=1000
	// +kubebuilder:validation:items:MaxLength=95
	// +kubebuilder:validation:XValidation:rule="self.all(r, isCIDR(r) || r.matches('^ *[0-9a-fA-F.:]+ *- *[0-9a-fA-F.:]+ *$'))",message="each of addresses must be a CIDR like 10.1.0.0/24 or a range like 10.1.0.10-10.1.0.20"
	Addresses []string `json:"addresses"`

	// Whether Services that ask for no pool may get an address from this one.
	// +optional
	// +kubebuilder:default=true
	AutoAssign *bool `json:"autoAssign,omitempty"`

	// Whether to leave out IPv4 addresses that end in .0 or .255, which some old equipment drops.
	// +optional
	// +kubebuilder:default=false
	AvoidBuggyIPs bool `json:"avoidBuggyIPs,omitempty"`

	// Which Services the pool is for. Without it the pool is for all.
	// +optional
	ServiceAllocation *ServiceAllocation `json:"serviceAllocation,omitempty"`
}

// ServiceAllocation pins a pool to namespaces and Services.
type ServiceAllocation struct {
	// Order among the pools that fit a Service: the lowest number is used first, 0 last.
	// +optional
	// +kubebuilder:validation:Minimum=0
	Priority int `json:"priority,omitempty"`

	// Names of the namespaces whose Services may use the pool.
	// +optional
	Namespaces []string `json:"namespaces,omitempty"`

	// Label selectors of such namespaces; one that matches is enough.
	// +optional
	NamespaceSelectors []metav1.LabelSelector `json:"namespaceSelectors,omitempty"`

	// Label selectors of the Services that may use the pool; one that matches is enough.
	// +optional
	ServiceSelectors []metav1.LabelSelector `json:"serviceSelectors,omitempty"`
}

// IPAddressPoolStatus is how full the pool is.
type IPAddressPoolStatus struct {
	// Number of IPv4 addresses in use.
	AssignedIPv4 int64 `json:"assignedIPv4"`

	// Number of IPv6 addresses in use.
	AssignedIPv6 int64 `json:"assignedIPv6"`

	// Number of IPv4 addresses left.
	AvailableIPv4 int64 `json:"availableIPv4"`

	// Number of IPv6 addresses left; the largest int64 if there are more.
	AvailableIPv6 int64 `json:"availableIPv6"`

	// Condition Accepted: whether the object is in use as it is written, and why not.
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// IPAddressPoolList is a list of pools.
//
// +kubebuilder:object:root=true
type IPAddressPoolList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []IPAddressPool `json:"items"`
}
