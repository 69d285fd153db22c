package config

import (
	"net/netip"
	"os"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"sigs.k8s.io/yaml"
)

var compareNetip = cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })

// The reference file says what the defaults are, and names every field.
func TestReferenceFile(t *testing.T) {
	content, err := os.ReadFile("testdata/agent.yaml")
	if err != nil {
		t.Fatal(err)
	}
	got, err := ParseAgent("agent.yaml", content)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(DefaultAgent(), got, compareNetip); diff != "" {
		t.Errorf("the file and the defaults differ (-default +file):\n%s", diff)
	}
	var written map[string]any
	if err := yaml.Unmarshal(content, &written); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(fields(reflect.TypeFor[agentFile]()), keys(written)); diff != "" {
		t.Errorf("fields (-code +file):\n%s", diff)
	}
}

// fields is the JSON names of a struct's fields, and theirs.
func fields(s reflect.Type) map[string]any {
	all := map[string]any{}
	for f := range s.Fields() {
		all[f.Tag.Get("json")] = nil
		if f.Type.Kind() == reflect.Struct {
			all[f.Tag.Get("json")] = fields(f.Type)
		}
	}
	return all
}

// keys is a map without its values.
func keys(m map[string]any) map[string]any {
	all := map[string]any{}
	for k, v := range m {
		all[k] = nil
		if inner, ok := v.(map[string]any); ok {
			all[k] = keys(inner)
		}
	}
	return all
}

// The chart writes every field, and its values are the defaults.
func TestChart(t *testing.T) {
	const chart = "../charts/longshore/"
	template, err := os.ReadFile(chart + "templates/agent-config.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for name := range fields(reflect.TypeFor[agentFile]()) {
		if !strings.Contains(string(template), "\n    "+name+":") {
			t.Errorf("the chart's agent.yaml does not write %s", name)
		}
	}
	// Over kube-proxy's configuration it leaves out what is the default.
	compared := map[string]string{}
	for _, c := range regexp.MustCompile(`\(ne \$agent\.(\w+) "(.*)"\)`).FindAllStringSubmatch(string(template), -1) {
		compared[c[1]] = c[2]
	}
	d := defaults()
	same := map[string]string{"scheduler": d.Scheduler, "auditPeriod": d.AuditPeriod, "metricsAddress": d.MetricsAddress}
	if diff := cmp.Diff(same, compared); diff != "" {
		t.Errorf("the chart's agent.yaml takes other values for the defaults (-default +template):\n%s", diff)
	}
	content, err := os.ReadFile(chart + "values.yaml")
	if err != nil {
		t.Fatal(err)
	}
	values := struct {
		LoadBalancerClass string    `json:"loadBalancerClass"`
		Agent             agentFile `json:"agent"`
	}{}
	if err := yaml.Unmarshal(content, &values); err != nil {
		t.Fatal(err)
	}
	want := defaults()
	want.StatusSocket = "" // not a value: the path is mounted
	if diff := cmp.Diff(want, values.Agent); diff != "" || values.LoadBalancerClass != want.LoadBalancerClass {
		t.Errorf("values.yaml and the defaults differ (-default +values):\n%s", diff)
	}
	content, err = os.ReadFile(chart + "values.schema.json")
	if err != nil {
		t.Fatal(err)
	}
	if list := `["` + strings.Join(Schedulers[:], `", "`) + `"]`; !strings.Contains(string(content), list) {
		t.Errorf("values.schema.json does not have the schedulers %s", list)
	}
}

func TestDefaultAgent(t *testing.T) {
	want := Agent{
		Scheduler:        "rr",
		DrainTimeout:     15 * time.Minute,
		AuditPeriod:      5 * time.Minute,
		GracefulShutdown: 5 * time.Second,
		ProbeInterval:    200 * time.Millisecond,
		CrashGrace:       2 * time.Second,
		MembersPort:      7946,
		StatusSocket:     "/run/longshore/agent.sock",
		HealthAddress:    ":10256",
		MetricsAddress:   "127.0.0.1:10249",
	}
	if diff := cmp.Diff(want, DefaultAgent(), compareNetip); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	empty, err := ParseAgent("agent.yaml", nil)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, empty, compareNetip); diff != "" {
		t.Errorf("empty file (-want +got):\n%s", diff)
	}
}

func TestParseAgent(t *testing.T) {
	got, err := ParseAgent("agent.yaml", []byte(`
scheduler: mh
nodePortAddresses: [192.168.1.7/16, "fd00::/8"]
podCIDRs: [10.244.1.9/24, "fd44::/64"]
masqueradeAll: true
drainTimeout: 0s
auditPeriod: 10s
kernel:
  tcpTimeout: 15m
  tcpFinTimeout: 2m
  udpTimeout: 1s
  conntrack:
    maxPerCore: 32768
    min: 131072
    tcpEstablishedTimeout: 24h
    tcpCloseWaitTimeout: 1h
    udpTimeout: 30s
    udpStreamTimeout: 3m
    tcpBeLiberal: true
bgp: {gracefulShutdown: 10m}
loadBalancerClass: example.com/longshore
members: {port: 1, probeInterval: 1s, crashGrace: 0s}
statusSocket: /tmp/s
healthAddress: "[::1]:1"
metricsAddress: ""
`))
	if err != nil {
		t.Fatal(err)
	}
	want := Agent{
		Scheduler:         "mh",
		NodePortAddresses: []netip.Prefix{netip.MustParsePrefix("192.168.0.0/16"), netip.MustParsePrefix("fd00::/8")},
		PodCIDRs:          []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24"), netip.MustParsePrefix("fd44::/64")},
		MasqueradeAll:     true,
		AuditPeriod:       10 * time.Second,
		Kernel: KernelSettings{
			TCPTimeout: 15 * time.Minute, TCPFinTimeout: 2 * time.Minute, UDPTimeout: time.Second,
			ConntrackMaxPerCore: 32768, ConntrackMin: 131072,
			ConntrackTCPEstablishedTimeout: 24 * time.Hour, ConntrackTCPCloseWaitTimeout: time.Hour,
			ConntrackUDPTimeout: 30 * time.Second, ConntrackUDPStreamTimeout: 3 * time.Minute,
			ConntrackTCPBeLiberal: true,
		},
		GracefulShutdown:  10 * time.Minute,
		LoadBalancerClass: "example.com/longshore",
		ProbeInterval:     time.Second,
		MembersPort:       1,
		StatusSocket:      "/tmp/s",
		HealthAddress:     "[::1]:1",
	}
	if diff := cmp.Diff(want, got, compareNetip); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestNodePortPrimary(t *testing.T) {
	got, err := ParseAgent("agent.yaml", []byte("nodePortAddresses: [primary]"))
	if err != nil {
		t.Fatal(err)
	}
	want := DefaultAgent()
	want.NodePortPrimary = true
	if diff := cmp.Diff(want, got, compareNetip); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestParseAgentErrors(t *testing.T) {
	for _, test := range []struct{ name, file, want string }{
		{"unknown field", "schedular: rr", `agent.yaml: unknown field "schedular"`},
		{"unknown field inside", "members: {prot: 1}", `agent.yaml: unknown field "members.prot"`},
		{"upper case", "Scheduler: rr", `agent.yaml: unknown field "Scheduler"`},
		{"twice", "scheduler: rr\nscheduler: lc", "agent.yaml: yaml: unmarshal errors:\n  line 2: key \"scheduler\" already set in map"},
		{"not YAML", "a: b: c", "agent.yaml: yaml: mapping values are not allowed in this context"},
		{"wrong type", "members: {port: many}", `agent.yaml: members.port: string where int should be`},
		{"scheduler", "scheduler: fair", `agent.yaml: scheduler: "fair" is not an IPVS scheduler: choose one of rr wrr lc wlc sh dh mh sed nq lblc lblcr fo ovf`},
		{"no scheduler", `scheduler: ""`, `agent.yaml: scheduler: "" is not an IPVS scheduler: choose one of rr wrr lc wlc sh dh mh sed nq lblc lblcr fo ovf`},
		{"node port addresses", "nodePortAddresses: [10.0.0.0/8, 10.0.0.1]", `agent.yaml: nodePortAddresses[1]: "10.0.0.1": not a CIDR like 192.168.0.0/16`},
		{"primary among others", "nodePortAddresses: [10.0.0.0/8, primary]", `agent.yaml: nodePortAddresses[1]: "primary": must stand alone`},
		{"node ports at loopback", `nodePortAddresses: [0.0.0.0/0, 127.0.0.1/8, "::1/128"]`,
			`agent.yaml: nodePortAddresses: "127.0.0.0/8": node ports are never served at loopback addresses; to serve them nowhere write a CIDR that no node has, such as 192.0.2.0/24
agent.yaml: nodePortAddresses: "::1/128": node ports are never served at loopback addresses; to serve them nowhere write a CIDR that no node has, such as 192.0.2.0/24`},
		{"pods", "podCIDRs: [10.244.0.0]", `agent.yaml: podCIDRs[0]: "10.244.0.0": not a CIDR like 192.168.0.0/16`},
		{"drain forever", "drainTimeout: 24h1s", `agent.yaml: drainTimeout: "24h1s": must be between 0s and 24h`},
		{"drain backwards", "drainTimeout: -1s", `agent.yaml: drainTimeout: "-1s": must be between 0s and 24h`},
		{"drain without unit", `drainTimeout: "15"`, `agent.yaml: drainTimeout: "15": not a duration like 90s or 15m`},
		{"drain as a number", "drainTimeout: 15", `agent.yaml: drainTimeout: number where string should be`},
		{"audit all the time", "auditPeriod: 9s", `agent.yaml: auditPeriod: "9s": must be 0s or at least 10s`},
		{"audit backwards", "auditPeriod: -1h", `agent.yaml: auditPeriod: "-1h": must be 0s or at least 10s`},
		{"shutdown forever", "bgp: {gracefulShutdown: 601s}", `agent.yaml: bgp.gracefulShutdown: "601s": must be between 0s and 10m`},
		{"part of a second", "kernel: {udpTimeout: 1500ms}", `agent.yaml: kernel.udpTimeout: "1.5s": must be whole seconds, at most 596h31m23s`},
		{"more than the kernel has", "kernel: {conntrack: {tcpEstablishedTimeout: 596h31m24s}}",
			`agent.yaml: kernel.conntrack.tcpEstablishedTimeout: "596h31m24s": must be whole seconds, at most 596h31m23s`},
		{"fewer than none", "kernel: {conntrack: {maxPerCore: -1, min: 2147483648}}", `agent.yaml: kernel.conntrack.maxPerCore: -1: must be between 0 and 2147483647
agent.yaml: kernel.conntrack.min: 2147483648: must be between 0 and 2147483647`},
		{"class", "loadBalancerClass: a/b/c", `agent.yaml: loadBalancerClass: "a/b/c": a valid label key must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]') with an optional DNS subdomain prefix and '/' (e.g. 'example.com/MyName')`},
		{"port 0", "members: {port: 0}", `agent.yaml: members.port: 0: must be between 1 and 65535`},
		{"port high", "members: {port: 65536}", `agent.yaml: members.port: 65536: must be between 1 and 65535`},
		{"hectic", "members: {probeInterval: 49ms}", `agent.yaml: members.probeInterval: "49ms": must be between 50ms and 10s`},
		{"asleep", "members: {probeInterval: 11s}", `agent.yaml: members.probeInterval: "11s": must be between 50ms and 10s`},
		{"grace backwards", "members: {crashGrace: -1s}", `agent.yaml: members.crashGrace: "-1s": must be between 0s and 5m`},
		{"grace for ever", "members: {crashGrace: 6m}", `agent.yaml: members.crashGrace: "6m": must be between 0s and 5m`},
		{"socket relative", "statusSocket: s", `agent.yaml: statusSocket: "s": must be an absolute path`},
		{"socket long", "statusSocket: /" + strings.Repeat("s", 107),
			`agent.yaml: statusSocket: "/` + strings.Repeat("s", 107) + `": has 108 bytes, a socket's path has at most 107`},
		{"no port", "healthAddress: 127.0.0.1", `agent.yaml: healthAddress: "127.0.0.1": neither host:port nor empty`},
		{"bad port", "healthAddress: :http", `agent.yaml: healthAddress: ":http": port "http" is not between 1 and 65535`},
		{"name", "metricsAddress: localhost:1", `agent.yaml: metricsAddress: "localhost:1": host "localhost" is not an IP address`},
		{"several", "schedular: rr\nmembers: {port: -1}\nstatusSocket: s", `agent.yaml: unknown field "schedular"
agent.yaml: members.port: -1: must be between 1 and 65535
agent.yaml: statusSocket: "s": must be an absolute path`},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, err := ParseAgent("agent.yaml", []byte(test.file))
			if err == nil {
				t.Fatal("no error")
			}
			if diff := cmp.Diff(test.want, err.Error()); diff != "" {
				t.Errorf("error (-want +got):\n%s", diff)
			}
		})
	}
}
