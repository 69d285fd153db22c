package config

// The deepcopy methods of the API types, and the CustomResourceDefinitions that the Helm chart installs.
//go:generate go run sigs.k8s.io/controller-tools/cmd/controller-gen@v0.23.0 object paths=./v1beta1;./v1beta2
//go:generate go run sigs.k8s.io/controller-tools/cmd/controller-gen@v0.23.0 crd paths=./v1beta1;./v1beta2 output:crd:dir=../charts/longshore/crds
