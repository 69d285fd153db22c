package controller

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/yaml"

	"github.com/longshore-lb/longshore/announcer"
	"github.com/longshore-lb/longshore/config"
	"github.com/longshore-lb/longshore/config/v1beta1"
	"github.com/longshore-lb/longshore/config/v1beta2"
)

const testNamespace = "longshore-system"

// apiServer is etcd and kube-apiserver with the chart's definitions, on this machine's loopback.
type apiServer struct {
	t    *testing.T
	c    *rest.Config
	core kubernetes.Interface
	kube *Kubernetes
}

// startAPIServer starts the programs that `make lab` builds.
func startAPIServer(t *testing.T) *apiServer {
	t.Helper()
	folder, dir := programs(t), t.TempDir()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	private := pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)})
	for name, content := range map[string][]byte{"sa.key": private, "tokens.csv": []byte("secret,admin,admin,system:masters\n")} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	clients, peers, secure := freePort(t), freePort(t), freePort(t)
	url := func(port int) string { return fmt.Sprintf("http://127.0.0.1:%d", port) }
	run := func(name string, args ...string) {
		cmd := exec.Command(filepath.Join(folder, name), args...)
		var log bytes.Buffer
		cmd.Stdout, cmd.Stderr = &log, &log
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			cmd.Process.Kill()
			cmd.Wait()
			if t.Failed() {
				text := log.String()
				t.Logf("the end of %s's log:\n%s", name, text[max(0, len(text)-4000):])
			}
		})
	}
	run("etcd", "--name=test", "--data-dir="+filepath.Join(dir, "etcd"), "--listen-client-urls="+url(clients), "--advertise-client-urls="+url(clients),
		"--listen-peer-urls="+url(peers), "--initial-advertise-peer-urls="+url(peers), "--initial-cluster=test="+url(peers), "--unsafe-no-fsync", "--log-level=warn")
	run("kube-apiserver", "--etcd-servers="+url(clients), "--bind-address=127.0.0.1", fmt.Sprintf("--secure-port=%d", secure),
		"--cert-dir="+filepath.Join(dir, "certs"), "--token-auth-file="+filepath.Join(dir, "tokens.csv"), "--authorization-mode=RBAC",
		"--service-account-issuer=https://kubernetes.default.svc", "--service-account-signing-key-file="+filepath.Join(dir, "sa.key"),
		"--service-account-key-file="+filepath.Join(dir, "sa.key"), "--service-cluster-ip-range=10.96.0.0/16")
	s := &apiServer{t: t, c: &rest.Config{
		Host: fmt.Sprintf("https://127.0.0.1:%d", secure), BearerToken: "secret", TLSClientConfig: rest.TLSClientConfig{Insecure: true}, QPS: -1,
	}}
	if s.core, err = kubernetes.NewForConfig(s.c); err != nil {
		t.Fatal(err)
	}
	if s.kube, err = NewKubernetes(s.c, testNamespace); err != nil {
		t.Fatal(err)
	}
	s.eventually("the API server to be ready", func() error {
		return s.core.CoreV1().RESTClient().Get().AbsPath("/readyz").Do(t.Context()).Error()
	})
	if _, err := s.core.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: testNamespace}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	s.define()
	return s
}

// programs is the folder of what `make lab` builds.
func programs(t *testing.T) string {
	t.Helper()
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	folder := filepath.Join(cache, "longshore", "controlplane")
	for _, name := range []string{"etcd", "kube-apiserver"} {
		if _, err := os.Stat(filepath.Join(folder, name)); err != nil {
			t.Fatalf("this test needs the control plane, which `make lab` builds: %v", err)
		}
	}
	return folder
}

func freePort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	return l.Addr().(*net.TCPAddr).Port
}

// define applies the chart's definitions and waits until they are served.
func (s *apiServer) define() {
	s.t.Helper()
	files, err := filepath.Glob("../charts/longshore/crds/*.yaml")
	if err != nil || len(files) == 0 {
		s.t.Fatalf("definitions %q, error %v", files, err)
	}
	const path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
	for _, file := range files {
		content, err := os.ReadFile(file)
		if err != nil {
			s.t.Fatal(err)
		}
		body, err := yaml.YAMLToJSON(content)
		if err != nil {
			s.t.Fatal(err)
		}
		if err := s.core.CoreV1().RESTClient().Post().AbsPath(path).SetHeader("Content-Type", "application/json").Body(body).Do(s.t.Context()).Error(); err != nil {
			s.t.Fatalf("%s: %v", file, err)
		}
		var crd struct{ Metadata struct{ Name string } }
		if err := yaml.Unmarshal(content, &crd); err != nil {
			s.t.Fatal(err)
		}
		s.eventually(crd.Metadata.Name+" to be served", func() error {
			out, err := s.core.CoreV1().RESTClient().Get().AbsPath(path, crd.Metadata.Name).Do(s.t.Context()).Raw()
			if err == nil && !strings.Contains(strings.ReplaceAll(string(out), " ", ""), `"status":"True","type":"Established"`) &&
				!strings.Contains(strings.ReplaceAll(string(out), " ", ""), `"type":"Established","status":"True"`) {
				err = fmt.Errorf("it says %s", out)
			}
			return err
		})
	}
}

func (s *apiServer) eventually(what string, try func() error) {
	s.t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		err := try()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("waiting for %s: %v", what, err)
		}
	}
}

var resources = map[string]string{
	"IPAddressPool": "ipaddresspools", "L2Advertisement": "l2advertisements", "BGPAdvertisement": "bgpadvertisements",
	"Community": "communities", "BGPPeer": "bgppeers",
}

// create makes an object of a kind and version, such as "BGPPeer v1beta2", with a spec in YAML.
func (s *apiServer) create(kind, name, spec string) error {
	kind, version, _ := strings.Cut(kind, " ")
	var fields any
	if err := yaml.Unmarshal([]byte(spec), &fields); err != nil {
		s.t.Fatalf("%s: %v", spec, err)
	}
	body, err := json.Marshal(map[string]any{
		"apiVersion": "metallb.io/" + version, "kind": kind, "metadata": map[string]any{"name": name, "namespace": testNamespace}, "spec": fields,
	})
	if err != nil {
		s.t.Fatal(err)
	}
	return s.core.CoreV1().RESTClient().Post().AbsPath("/apis/metallb.io", version, "namespaces", testNamespace, resources[kind]).
		SetHeader("Content-Type", "application/json").Body(body).Do(s.t.Context()).Error()
}

// TestAPIServer has what the real API server makes of our objects, and we of it.
func TestAPIServer(t *testing.T) {
	s := startAPIServer(t)
	t.Run("wrong objects", s.testRefusals)
	t.Run("versions", s.testVersions)
	t.Run("conditions", s.testConditions)
	t.Run("reports", s.testReports)
}

// Each wrong field is refused by the definition, with words that name it; and by our own parser, for objects from before.
func (s *apiServer) testRefusals(t *testing.T) {
	const good = "myASN: 64512, peerASN: 64513, peerAddress: 192.0.2.1"
	const nowhere = "myASN: 64512, peerASN: 64513"
	const nobody = "myASN: 64512, peerAddress: 192.0.2.1"
	for i, test := range []struct{ kind, spec, want string }{ // want = "": it is right
		{"BGPPeer v1beta2", good, ""},
		{"BGPPeer v1beta1", good, ""},
		{"BGPPeer v1beta2", good + ", holdTime: 0s, keepaliveTime: 0s, disableMP: true", ""},
		{"BGPPeer v1beta2", nobody + ", dynamicASN: external, vrf: red, connectTime: 5s, holdTime: 9s, keepaliveTime: 3s, routerID: 10.0.0.1", ""},
		{"BGPPeer v1beta2", "peerASN: 64513, peerAddress: 192.0.2.1", "spec.myASN"},
		{"BGPPeer v1beta2", "myASN: 0, peerASN: 64513, peerAddress: 192.0.2.1", "spec.myASN"},
		{"BGPPeer v1beta2", nobody + ", peerASN: 4294967296", "spec.peerASN"},
		{"BGPPeer v1beta2", nobody, "exactly one of peerASN and dynamicASN"},
		{"BGPPeer v1beta2", good + ", dynamicASN: internal", "exactly one of peerASN and dynamicASN"},
		{"BGPPeer v1beta2", nobody + ", dynamicASN: any", "spec.dynamicASN"},
		{"BGPPeer v1beta2", nowhere, "exactly one of peerAddress and interface"},
		{"BGPPeer v1beta2", good + ", interface: eth0", "exactly one of peerAddress and interface"},
		{"BGPPeer v1beta2", nowhere + ", peerAddress: tor.example", "peerAddress must be an IP address"},
		{"BGPPeer v1beta1", nowhere + ", peerAddress: tor.example", "peerAddress must be an IP address"},
		{"BGPPeer v1beta2", good + ", sourceAddress: 192.0.2", "sourceAddress must be an IP address"},
		{"BGPPeer v1beta2", good + `, sourceAddress: "fd00::1"`, "sourceAddress must be of the family of peerAddress"},
		{"BGPPeer v1beta2", good + `, routerID: "fd00::1"`, "routerID must be an IPv4 address"},
		{"BGPPeer v1beta2", good + ", peerPort: 65536", "spec.peerPort"},
		{"BGPPeer v1beta2", good + ", holdTime: 2s", "holdTime must be 0 or between 3s and 65535s"},
		{"BGPPeer v1beta2", good + ", holdTime: 65536s", "holdTime must be 0 or between 3s and 65535s"},
		{"BGPPeer v1beta2", good + ", holdTime: 3500ms", "holdTime must be whole seconds"},
		{"BGPPeer v1beta2", good + ", holdTime: 9s, keepaliveTime: 10s", "keepaliveTime must not be longer than holdTime"},
		{"BGPPeer v1beta2", good + ", keepaliveTime: 91s", "keepaliveTime must not be longer than holdTime"},
		{"BGPPeer v1beta2", good + ", keepaliveTime: 0s", "keepaliveTime must be at least 1s"},
		{"BGPPeer v1beta2", good + ", holdTime: 0s, keepaliveTime: 1s", "keepaliveTime must not be longer than holdTime"},
		{"BGPPeer v1beta2", good + ", keepaliveTime: 1500ms", "keepaliveTime must be whole seconds"},
		{"BGPPeer v1beta2", good + ", connectTime: 0s", "connectTime must be between 1s and 65535s"},
		{"BGPPeer v1beta2", good + ", password: x, passwordSecret: {name: tor}", "password and passwordSecret exclude each other"},
		{"BGPPeer v1beta2", good + ", password: " + strings.Repeat("x", 81), "spec.password"},
		{"BGPPeer v1beta2", good + ", passwordSecret: {namespace: longshore-system}", "passwordSecret.name must be set"},
		{"BGPPeer v1beta2", "myASN: 64512, peerASN: 64512, peerAddress: 192.0.2.1, ebgpMultiHop: true", "ebgpMultiHop is for external peers"},
		{"BGPPeer v1beta2", nobody + ", dynamicASN: internal, ebgpMultiHop: true", "ebgpMultiHop is for external peers"},
		{"BGPPeer v1beta2", good + ", disableMP: true, dualStackAddressFamily: true", "disableMP and dualStackAddressFamily exclude each other"},
		{"BGPPeer v1beta2", good + ", vrf: a-name-of-16-byte", "spec.vrf"},

		{"IPAddressPool v1beta1", `addresses: [192.0.2.0/24, 198.51.100.1-198.51.100.9, "2001:db8::/64"]`, ""},
		{"IPAddressPool v1beta1", "addresses: []", "spec.addresses"},
		{"IPAddressPool v1beta1", "addresses: [192.0.2.1]", "each of addresses must be"},
		{"IPAddressPool v1beta1", "addresses: [192.0.2.0/33]", "each of addresses must be"},
		{"IPAddressPool v1beta1", "addresses: [192.0.2.1-192.0.2.9-192.0.2.20]", "each of addresses must be"},
		{"IPAddressPool v1beta1", "addresses: [192.0.2.0/24], serviceAllocation: {priority: -1}", "spec.serviceAllocation.priority"},

		{"L2Advertisement v1beta1", "interfaces: [eth0]", ""},
		{"L2Advertisement v1beta1", "interfaces: [eth 0]", "each of interfaces must be the name of a link"},
		{"L2Advertisement v1beta1", "preferredNodeSelectors: [{weight: 101, preference: {}}]", "spec.preferredNodeSelectors[0].weight"},

		{"BGPAdvertisement v1beta1", `communities: ["64512:1", "large:64512:1:2", site], aggregationLength: 24`, ""},
		{"BGPAdvertisement v1beta1", `communities: ["64512:1:2"]`, "each of communities must be"},
		{"BGPAdvertisement v1beta1", `communities: [""]`, "each of communities must be"},
		{"BGPAdvertisement v1beta1", "aggregationLength: 33", "spec.aggregationLength"},
		{"BGPAdvertisement v1beta1", "aggregationLengthV6: 0", "spec.aggregationLengthV6"},
		{"BGPAdvertisement v1beta1", "aggregationLength: 24, serviceSelectors: [{}]", "serviceSelectors need aggregationLength 32"},

		{"Community v1beta1", `communities: [{name: site, value: "64512:1"}, {name: other, value: "large:64512:1:2"}]`, ""},
		{"Community v1beta1", `communities: [{name: site, value: "64512:1"}, {name: site, value: "64512:2"}]`, "every name in communities must be there once"},
		{"Community v1beta1", `communities: [{name: "64512:1", value: "64512:1"}]`, "name must have no colon"},
		{"Community v1beta1", `communities: [{name: site, value: other}]`, "value must be a:b or large:a:b:c"},
	} {
		name := fmt.Sprintf("object-%d", i)
		spec := "{" + test.spec + "}"
		err := s.create(test.kind, name, spec)
		if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
			t.Errorf("%s %s: error %v, want %q", test.kind, test.spec, err, test.want)
		}
		if own := parseSpec(t, test.kind, spec); test.want != "" && own == nil {
			t.Errorf("%s %s: refused by the definition and not by us", test.kind, test.spec)
		} else if test.want == "" && own != nil {
			t.Errorf("%s %s: %v", test.kind, test.spec, own)
		}
	}
}

// parseSpec is what our own parsers say of a spec. One that does not even fit into the type is wrong, too.
func parseSpec(t *testing.T, kind, spec string) error {
	t.Helper()
	meta := metav1.ObjectMeta{Name: "object"}
	switch kind, _, _ := strings.Cut(kind, " "); kind {
	case "BGPPeer":
		o := &v1beta2.BGPPeer{ObjectMeta: meta}
		if err := yaml.Unmarshal([]byte(spec), &o.Spec); err != nil {
			return err
		}
		_, err := config.ParsePeer(o)
		return err
	case "IPAddressPool":
		o := &v1beta1.IPAddressPool{ObjectMeta: meta}
		if err := yaml.Unmarshal([]byte(spec), &o.Spec); err != nil {
			return err
		}
		_, err := config.ParsePool(o)
		return err
	case "L2Advertisement":
		o := &v1beta1.L2Advertisement{ObjectMeta: meta}
		if err := yaml.Unmarshal([]byte(spec), &o.Spec); err != nil {
			return err
		}
		_, err := config.ParseL2Advertisement(o)
		return err
	case "BGPAdvertisement":
		o := &v1beta1.BGPAdvertisement{ObjectMeta: meta}
		if err := yaml.Unmarshal([]byte(spec), &o.Spec); err != nil {
			return err
		}
		_, err := config.ParseBGPAdvertisement(o, nil)
		return err
	default:
		o := &v1beta1.Community{ObjectMeta: meta}
		if err := yaml.Unmarshal([]byte(spec), &o.Spec); err != nil {
			return err
		}
		_, err := config.ParseCommunity(o)
		return err
	}
}

// A peer that is written in the older version is read in the newer one, and back, without loss.
func (s *apiServer) testVersions(t *testing.T) {
	if err := s.create("BGPPeer v1beta1", "older", "{myASN: 64512, peerASN: 64513, peerAddress: 192.0.2.9, nodeSelectors: [{matchLabels: {rack: a}}]}"); err != nil {
		t.Fatal(err)
	}
	var got v1beta2.BGPPeer
	if err := s.kube.v1beta2.Get().Namespace(testNamespace).Resource("bgppeers").Name("older").Do(t.Context()).Into(&got); err != nil {
		t.Fatal(err)
	}
	if got.Spec.PeerAddress != "192.0.2.9" || len(got.Spec.NodeSelectors) != 1 || got.Spec.PeerPort != 179 {
		t.Errorf("read as v1beta2: %+v", got.Spec)
	}
	got.Spec.PeerASN, got.Spec.DynamicASN = 0, "external"
	var older v1beta1.BGPPeer
	if err := s.kube.v1beta2.Put().Namespace(testNamespace).Resource("bgppeers").Name("older").Body(&got).Do(t.Context()).Error(); err != nil {
		t.Fatal(err)
	}
	if err := s.kube.v1beta1.Get().Namespace(testNamespace).Resource("bgppeers").Name("older").Do(t.Context()).Into(&older); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(got.Spec, older.Spec); diff != "" {
		t.Errorf("read as v1beta1 (-v1beta2 +v1beta1):\n%s", diff)
	}
}

// The controller says of every object whether it is in use.
func (s *apiServer) testConditions(t *testing.T) {
	for _, o := range []struct{ kind, name, spec string }{
		{"IPAddressPool v1beta1", "cond-pool", "{addresses: [203.0.113.0/24]}"},
		{"IPAddressPool v1beta1", "cond-twice", "{addresses: [203.0.113.0/25]}"},
		{"L2Advertisement v1beta1", "cond-lan", "{}"},
		{"BGPAdvertisement v1beta1", "cond-unknown", "{communities: [no-such-name]}"},
		{"Community v1beta1", "cond-names", `{communities: [{name: cond, value: "64512:7"}]}`},
		{"BGPPeer v1beta2", "cond-peer", "{myASN: 64512, peerASN: 64513, peerAddress: 192.0.2.7, holdTime: 0s}"},
	} {
		if err := s.create(o.kind, o.name, o.spec); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	inbox := NewInbox()
	loop := NewCluster(ClusterOptions{Inbox: inbox, Writer: s.kube, Events: LogEvents{Log: slog.New(slog.DiscardHandler)}, Log: slog.New(slog.DiscardHandler)})
	done := make(chan struct{}, 2)
	go func() { _ = s.kube.WatchForCluster(ctx, inbox); done <- struct{}{} }()
	go func() { loop.Run(ctx); done <- struct{}{} }()
	defer func() { cancel(); <-done; <-done }()

	accepted := func(kind, name string, status metav1.ConditionStatus, reason, message string) {
		t.Helper()
		client := s.kube.v1beta1
		if kind == "BGPPeer" {
			client = s.kube.v1beta2
		}
		s.eventually("the condition of "+name, func() error {
			raw, err := client.Get().Namespace(testNamespace).Resource(resources[kind]).Name(name).Do(t.Context()).Raw()
			if err != nil {
				return err
			}
			var o struct {
				Metadata struct{ Generation int64 }
				Status   struct{ Conditions []metav1.Condition }
			}
			if err := json.Unmarshal(raw, &o); err != nil {
				return err
			}
			if len(o.Status.Conditions) != 1 {
				return fmt.Errorf("%s", raw)
			}
			c := o.Status.Conditions[0]
			if c.Type != Accepted || c.Status != status || c.Reason != reason || !strings.Contains(c.Message, message) || c.ObservedGeneration != o.Metadata.Generation {
				return fmt.Errorf("condition is %+v", c)
			}
			return nil
		})
	}
	accepted("IPAddressPool", "cond-pool", metav1.ConditionTrue, "InUse", "")
	accepted("IPAddressPool", "cond-twice", metav1.ConditionFalse, "Refused", `spec.addresses[0]: "203.0.113.0/25": overlaps`)
	accepted("L2Advertisement", "cond-lan", metav1.ConditionTrue, "InUse", "")
	accepted("BGPAdvertisement", "cond-unknown", metav1.ConditionFalse, "Refused", `spec.communities[0]: "no-such-name": no Community object has this name`)
	accepted("Community", "cond-names", metav1.ConditionTrue, "InUse", "")
	accepted("BGPPeer", "cond-peer", metav1.ConditionTrue, "InUseInPart", `spec.holdTime: "0s"`)
	// Mended, it says so; the counts of a pool are written beside the condition.
	if err := s.create("Community v1beta1", "cond-more", `{communities: [{name: no-such-name, value: "64512:8"}]}`); err != nil {
		t.Fatal(err)
	}
	accepted("BGPAdvertisement", "cond-unknown", metav1.ConditionTrue, "InUse", "")
	var pool v1beta1.IPAddressPool
	if err := s.kube.v1beta1.Get().Namespace(testNamespace).Resource("ipaddresspools").Name("cond-pool").Do(t.Context()).Into(&pool); err != nil {
		t.Fatal(err)
	}
	if pool.Status.AvailableIPv4 != 256 || len(pool.Status.Conditions) != 1 {
		t.Errorf("status of the pool is %+v", pool.Status)
	}
}

// An agent's reports come, change and go, also those of a process that has ended.
func (s *apiServer) testReports(t *testing.T) {
	node, err := s.core.CoreV1().Nodes().Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1"}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	web, api := types.NamespacedName{Namespace: "default", Name: "web"}, types.NamespacedName{Namespace: "default", Name: "api"}
	route := announcer.Route{Prefix: netip.MustParsePrefix("192.0.2.1/32")}
	says := func(refused []string, told map[types.NamespacedName][]Announced, peers ...string) []Object {
		return report(node, refused, told, func(a Announced) []string {
			if len(a.Routes) == 0 {
				return nil
			}
			return peers
		})
	}
	there := func() string {
		t.Helper()
		var lines []string
		var states v1beta1.ConfigurationStateList
		var l2 v1beta1.ServiceL2StatusList
		var bgp v1beta1.ServiceBGPStatusList
		get := func(resource string) rest.Result {
			return s.kube.v1beta1.Get().Namespace(testNamespace).Resource(resource).Do(t.Context())
		}
		for resource, err := range map[string]error{
			"configurationstates": get("configurationstates").Into(&states), "servicel2statuses": get("servicel2statuses").Into(&l2),
			"servicebgpstatuses": get("servicebgpstatuses").Into(&bgp),
		} {
			if err != nil {
				t.Fatalf("%s: %v", resource, err)
			}
		}
		for _, o := range states.Items {
			lines = append(lines, fmt.Sprintf("%s %s %q", o.Name, o.Status.Result, o.Status.LastError))
		}
		for _, o := range l2.Items {
			lines = append(lines, fmt.Sprintf("l2 %s/%s on %s %v %s", o.Status.ServiceNamespace, o.Status.ServiceName, o.Status.Node, o.Status.Interfaces, o.OwnerReferences[0].Name))
		}
		for _, o := range bgp.Items {
			lines = append(lines, fmt.Sprintf("bgp %s/%s on %s %v %s", o.Status.ServiceNamespace, o.Status.ServiceName, o.Status.Node, o.Status.Peers, o.Labels[v1beta1.ServiceNameLabel]))
		}
		slices.Sort(lines)
		return strings.Join(lines, "\n")
	}
	expect := func(what string, want ...string) {
		t.Helper()
		s.eventually(what, func() error {
			if diff := cmp.Diff(strings.Join(want, "\n"), there()); diff != "" {
				return fmt.Errorf("(-want +got):\n%s", diff)
			}
			return nil
		})
	}
	start := func() (*Reporter, func()) {
		r := s.kube.Reporter("n1", slog.New(slog.DiscardHandler))
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- r.Run(ctx) }()
		return r, func() {
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
	}
	r, stop := start()
	r.Set(says(nil, map[types.NamespacedName][]Announced{
		web: {{Owner: "n1", Interfaces: []string{"eth0"}, Routes: []announcer.Route{route}}, {Owner: "n1", Interfaces: []string{"eth1"}}},
		api: {{Owner: "n2", Routes: []announcer.Route{route}}},
	}, "tor-2", "tor-1"))
	expect("the first reports",
		"bgp default/api on n1 [tor-1 tor-2] api", "bgp default/web on n1 [tor-1 tor-2] web", "l2 default/web on n1 [{eth0} {eth1}] n1", `speaker-n1 Valid ""`)
	r.Set(says([]string{"one mistake", "another"}, map[types.NamespacedName][]Announced{web: {{Owner: "n1", Routes: []announcer.Route{route}}}}, "tor-1"))
	expect("a change", "bgp default/web on n1 [tor-1] web", "l2 default/web on n1 [] n1", `speaker-n1 Invalid "one mistake\nanother"`)
	stop()
	r, stop = start()
	defer stop()
	r.Set(says(nil, nil))
	expect("what an earlier process said is gone", `speaker-n1 Valid ""`)
}
