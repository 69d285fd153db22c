package config

import (
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/txtar"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/kube-proxy/config/v1alpha1"
)

var update = flag.Bool("update", false, "write what is reported into testdata/kubeproxy, to be read before it is committed")

// The archives have kube-proxy's configuration, and either the errors it gives, or what an operator would write into
// agent.yaml instead of it, what it says to others than the agent's configuration, and the warnings.
func TestParseKubeProxy(t *testing.T) {
	archives, err := filepath.Glob("testdata/kubeproxy/*.txtar")
	if err != nil || len(archives) == 0 {
		t.Fatalf("no test data: %v", err)
	}
	for _, name := range archives {
		t.Run(strings.TrimSuffix(filepath.Base(name), ".txtar"), func(t *testing.T) {
			archive, err := txtar.ParseFile(name)
			if err != nil {
				t.Fatal(err)
			}
			want := map[string]string{}
			for _, f := range archive.Files {
				want[f.Name] = string(f.Data)
			}
			k, warnings, err := ParseKubeProxy("config.conf", []byte(want["config.conf"]))
			got := map[string]string{"config.conf": want["config.conf"]}
			if err != nil {
				got["errors"] = err.Error() + "\n"
			} else {
				got["agent.yaml"] = want["agent.yaml"]
				got["said"] = lines(told("node", k.Node), told("kubeconfig", k.Kubeconfig))
				got["warnings"] = lines(warnings...)
				sameAgent(t, k, want["agent.yaml"])
			}
			if *update {
				write(t, name, archive, got)
			} else if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// sameAgent compares the configuration that kube-proxy's makes with that of an agent.yaml.
func sameAgent(t *testing.T, k KubeProxy, file string) {
	t.Helper()
	want, err := ParseAgent("agent.yaml", []byte(file))
	if err != nil {
		t.Fatal(err)
	}
	got, err := k.ParseAgent("agent.yaml", nil)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, compareNetip); diff != "" {
		t.Errorf("(-agent.yaml +config.conf):\n%s", diff)
	}
}

func told(what, value string) string {
	if value == "" {
		return ""
	}
	return what + " " + value
}

// lines is the texts that are not empty, each a line.
func lines(texts ...string) string {
	var b strings.Builder
	for _, text := range texts {
		if text != "" {
			b.WriteString(text + "\n")
		}
	}
	return b.String()
}

func write(t *testing.T, name string, archive *txtar.Archive, sections map[string]string) {
	archive.Files = nil
	for _, section := range []string{"config.conf", "agent.yaml", "said", "warnings", "errors"} {
		if content, there := sections[section]; there {
			archive.Files = append(archive.Files, txtar.File{Name: section, Data: []byte(content)})
		}
	}
	if err := os.WriteFile(name, txtar.Format(archive), 0o644); err != nil {
		t.Fatal(err)
	}
}

// What the agent's own file writes wins, zeros too; what it does not write stays.
func TestAgentOverKubeProxy(t *testing.T) {
	k, _, err := ParseKubeProxy("config.conf", []byte(`
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
nodePortAddresses: [primary]
clusterCIDR: 10.244.0.0/16
iptables: {masqueradeAll: true}
ipvs: {scheduler: wlc, tcpTimeout: 2h, udpTimeout: 4m}
conntrack: {maxPerCore: 65536, min: 262144}
`))
	if err != nil {
		t.Fatal(err)
	}
	got, err := k.ParseAgent("agent.yaml", []byte(`
scheduler: rr
nodePortAddresses: []
masqueradeAll: false
kernel:
  tcpTimeout: 0s
  conntrack: {min: 0}
`))
	if err != nil {
		t.Fatal(err)
	}
	want, err := ParseAgent("agent.yaml", []byte(`
podCIDRs: [10.244.0.0/16]
kernel:
  udpTimeout: 4m
  conntrack: {maxPerCore: 65536}
`))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, compareNetip); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	none, err := k.ParseAgent("agent.yaml", nil)
	if err != nil {
		t.Fatal(err)
	}
	empty, err := k.ParseAgent("agent.yaml", []byte("kernel:\n  conntrack:\n")) // as the chart writes it
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(none, empty, compareNetip); diff != "" {
		t.Errorf("a field without a value (-no file +file):\n%s", diff)
	}
	if _, err := k.ParseAgent("agent.yaml", []byte("schedular: rr")); err == nil {
		t.Error("a field that does not exist is no error")
	}
}

// Every field that kube-proxy has is known here, and no other; docs/kube-proxy.md has them all.
func TestKubeProxyFields(t *testing.T) {
	page, err := os.ReadFile("../docs/kube-proxy.md")
	if err != nil {
		t.Fatal(err)
	}
	known := map[string]bool{}
	for field := range kubeProxyFields {
		known[field] = false
	}
	for _, field := range kubeProxyLeaves(reflect.TypeFor[v1alpha1.KubeProxyConfiguration](), "") {
		at := field
		for strings.Contains(at, ".") {
			if _, there := known[at]; there {
				break
			}
			at = at[:strings.LastIndex(at, ".")]
		}
		if _, there := known[at]; !there {
			t.Errorf("field %s is not in kubeProxyFields", field)
			continue
		}
		known[at] = true
		if at != "apiVersion" && at != "kind" && !strings.Contains(string(page), "`"+at+"`") {
			t.Errorf("docs/kube-proxy.md does not have `%s`", at)
		}
	}
	for field, there := range known {
		if !there {
			t.Errorf("kubeProxyFields has %s, kube-proxy has not", field)
		}
	}
}

// kubeProxyLeaves is the JSON names of a type's fields, with those they are in; types that read themselves have no fields.
func kubeProxyLeaves(s reflect.Type, in string) []string {
	var all []string
	for f := range s.Fields() {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		inner := f.Type
		reads := reflect.PointerTo(inner).Implements(reflect.TypeFor[json.Unmarshaler]())
		switch {
		case inner == reflect.TypeFor[metav1.TypeMeta]():
			all = append(all, kubeProxyLeaves(inner, in)...)
		case inner.Kind() == reflect.Struct && !reads:
			all = append(all, kubeProxyLeaves(inner, in+name+".")...)
		default:
			all = append(all, in+name)
		}
	}
	return all
}
