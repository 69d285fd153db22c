package config_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"sigs.k8s.io/yaml"

	"github.com/longshore-lb/longshore/config"
	"github.com/longshore-lb/longshore/config/v1beta1"
	"github.com/longshore-lb/longshore/config/v1beta2"
)

// The chart installs one definition per kind; the version that is stored is the one the code reads.
func TestCustomResourceDefinitions(t *testing.T) {
	type version struct {
		Name    string `json:"name"`
		Served  bool   `json:"served"`
		Storage bool   `json:"storage"`
		Schema  struct {
			OpenAPIV3Schema struct {
				Properties struct {
					Spec struct {
						Properties map[string]any `json:"properties"`
					} `json:"spec"`
				} `json:"properties"`
			} `json:"openAPIV3Schema"`
		} `json:"schema"`
		Subresources struct {
			Status *struct{} `json:"status"`
		} `json:"subresources"`
	}
	type definition struct {
		Kind     string `json:"kind"`
		Metadata struct {
			Name string `json:"name"`
		} `json:"metadata"`
		Spec struct {
			Scope string `json:"scope"`
			Names struct {
				Kind string `json:"kind"`
			} `json:"names"`
			Versions []version `json:"versions"`
		} `json:"spec"`
	}
	want := map[string]string{ // kind and version, and a field that the schema of spec must have; what is written by us has none
		"IPAddressPool v1beta1":      "serviceAllocation",
		"L2Advertisement v1beta1":    "preferredNodeSelectors",
		"BGPAdvertisement v1beta1":   "aggregationLengthV6",
		"BFDProfile v1beta1":         "minimumTtl",
		"Community v1beta1":          "communities",
		"BGPPeer v1beta1":            "dynamicASN",
		"BGPPeer v1beta2":            "dynamicASN",
		"ServiceL2Status v1beta1":    "",
		"ServiceBGPStatus v1beta1":   "",
		"ConfigurationState v1beta1": "",
	}
	files, err := filepath.Glob("../charts/longshore/crds/*.yaml")
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for _, file := range files {
		content, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var d definition
		if err := yaml.Unmarshal(content, &d); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		if d.Kind != "CustomResourceDefinition" || d.Spec.Scope != "Namespaced" {
			t.Fatalf("%s: %s, %s", file, d.Kind, d.Spec.Scope)
		}
		for i, v := range d.Spec.Versions {
			newest := i == len(d.Spec.Versions)-1
			if !v.Served || v.Storage != newest || v.Subresources.Status == nil {
				t.Errorf("%s %s: served %t, storage %t, status %v", file, v.Name, v.Served, v.Storage, v.Subresources.Status)
			}
			name := d.Spec.Names.Kind + " " + v.Name
			got[name] = ""
			if field := want[name]; v.Schema.OpenAPIV3Schema.Properties.Spec.Properties[field] != nil {
				got[name] = field
			}
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("kinds (-want +got):\n%s", diff)
	}
}

// Objects as MetalLB's documentation shows them are read through the scheme, strictly, and parsed.
func TestDecode(t *testing.T) {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{v1beta1.AddToScheme, v1beta2.AddToScheme} {
		if err := add(scheme); err != nil {
			t.Fatal(err)
		}
	}
	decoder := serializer.NewCodecFactory(scheme, serializer.EnableStrict).UniversalDeserializer()
	for _, test := range []struct{ object, want string }{
		{`
apiVersion: metallb.io/v1beta1
kind: IPAddressPool
metadata: {name: first-pool, namespace: metallb-system}
spec:
  addresses: [192.168.10.0/24, 192.168.9.1-192.168.9.5, "fc00:f853:0ccd:e799::/124"]
  serviceAllocation: {priority: 50, namespaces: [a], namespaceSelectors: [{matchLabels: {foo: bar}}]}
`, ""},
		{`
apiVersion: metallb.io/v1beta1
kind: L2Advertisement
metadata: {name: example, namespace: metallb-system}
spec: {ipAddressPools: [first-pool], interfaces: [eth0], preferredNodeSelectors: [{weight: 100, preference: {}}]}
`, ""},
		{`
apiVersion: metallb.io/v1beta1
kind: BGPAdvertisement
metadata: {name: local, namespace: metallb-system}
spec: {ipAddressPools: [bgp-pool], aggregationLength: 32, localPref: 100, communities: ["65535:65282"]}
`, ""},
		{`
apiVersion: metallb.io/v1beta1
kind: BFDProfile
metadata: {name: testbfdprofile, namespace: metallb-system}
spec: {receiveInterval: 380, transmitInterval: 270, detectMultiplier: 3, echoInterval: 38, echoMode: false, passiveMode: true, minimumTtl: 254}
`, ""},
		{`
apiVersion: metallb.io/v1beta2
kind: BGPPeer
metadata: {name: sample, namespace: metallb-system}
spec: {myASN: 64500, peerASN: 64501, peerAddress: 10.0.0.1, holdTime: 90s, keepaliveTime: 30s}
`, ""},
		{`
apiVersion: metallb.io/v1beta1
kind: IPAddressPool
metadata: {name: typo}
spec: {adresses: [192.168.10.0/24]}
`, `strict decoding error: unknown field "spec.adresses"`},
	} {
		object, _, err := decoder.Decode([]byte(test.object), nil, nil)
		if err == nil {
			switch o := object.(type) {
			case *v1beta1.IPAddressPool:
				_, err = config.ParsePool(o)
			case *v1beta1.L2Advertisement:
				_, err = config.ParseL2Advertisement(o)
			case *v1beta1.BGPAdvertisement:
				_, err = config.ParseBGPAdvertisement(o, config.Aliases{})
			case *v1beta1.BFDProfile:
				_, err = config.ParseBFDProfile(o)
			case *v1beta2.BGPPeer:
				_, err = config.ParsePeer(o)
			default:
				t.Fatalf("decoded a %T", o)
			}
		}
		if text(err) != test.want {
			t.Errorf("%s\nerror %q, want %q", test.object, text(err), test.want)
		}
	}
}
