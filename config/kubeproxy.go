package config

import (
	"cmp"
	gojson "encoding/json"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/kube-proxy/config/v1alpha1"
	"sigs.k8s.io/json"
	"sigs.k8s.io/yaml"
)

// KubeProxy is what kube-proxy's own configuration says to an agent.
type KubeProxy struct {
	Node       string // the node's name, hostnameOverride; empty = not said
	Kubeconfig string // how to reach the API server, clientConnection.kubeconfig; empty = not said

	file agentFile
}

// ParseKubeProxy reads a KubeProxyConfiguration of kubeproxy.config.k8s.io/v1alpha1, as it is in the ConfigMap
// kube-proxy of clusters made by kubeadm (https://kubernetes.io/docs/reference/config-api/kube-proxy-config.v1alpha1/).
//
// A zero says nothing, and kube-proxy's own defaults are not applied. Each field that says something and has no effect
// here, or another than in kube-proxy, gives a warning that names it, its value and the reason. Wrong values of fields
// that have an effect are errors. Lines of both begin with path.
func ParseKubeProxy(path string, content []byte) (KubeProxy, []string, error) {
	text, err := yaml.YAMLToJSONStrict(content)
	if err != nil {
		return KubeProxy{}, nil, fmt.Errorf("%s: %w", path, err)
	}
	var document map[string]any
	if err := json.UnmarshalCaseSensitivePreserveInts(text, &document); err != nil {
		return KubeProxy{}, nil, fmt.Errorf("%s: not a YAML map", path)
	}
	if v, k := document["apiVersion"], document["kind"]; v != "kubeproxy.config.k8s.io/v1alpha1" || k != "KubeProxyConfiguration" {
		return KubeProxy{}, nil, fmt.Errorf("%s: apiVersion %v, kind %v: must be kubeproxy.config.k8s.io/v1alpha1, "+
			"KubeProxyConfiguration; in a ConfigMap that is the text under data, config.conf", path, v, k)
	}
	said := leaves(nil, document)
	m := &mistakes{object: path}
	odd := map[string]string{} // why a field has another effect than in kube-proxy, or none
	for _, l := range said {
		if known, err := l.check(); err != nil {
			m.add(l.field(), l.value, "%w", err)
		} else if !known {
			odd[l.field()] = "KubeProxyConfiguration has no such field"
		}
	}
	if err := m.err(); err != nil {
		return KubeProxy{}, nil, err
	}
	var c v1alpha1.KubeProxyConfiguration
	if err := json.UnmarshalCaseSensitivePreserveInts(text, &c); err != nil {
		return KubeProxy{}, nil, undecoded(path, err)
	}
	k := KubeProxy{Node: strings.ToLower(strings.TrimSpace(c.HostnameOverride)), Kubeconfig: c.ClientConnection.Kubeconfig}
	k.file = fromKubeProxy(&c, m, odd)
	if err := m.err(); err != nil {
		return KubeProxy{}, nil, err
	}
	var warnings []string
	for _, l := range said {
		if reason := cmp.Or(odd[l.field()], reasonOf(l.field())); reason != "" {
			warnings = append(warnings, fmt.Sprintf("%s: %s: %s: %s", path, l.field(), l.text(), reason))
		}
	}
	return k, warnings, nil
}

// ParseAgent reads the agent's own configuration file over kube-proxy's: as the function ParseAgent, but a field that is
// not in the file is what kube-proxy's says, and has its default if that says nothing.
func (k KubeProxy) ParseAgent(path string, content []byte) (Agent, error) {
	return k.file.over(path, content)
}

// fromKubeProxy writes the agent's file with what kube-proxy's says. Where a value makes an effect another than in
// kube-proxy, odd gets the reason under the field's name; mistakes go to m.
func fromKubeProxy(c *v1alpha1.KubeProxyConfiguration, m *mistakes, odd map[string]string) agentFile {
	f := defaults()

	if c.IPVS.Scheduler != "" {
		f.Scheduler = c.IPVS.Scheduler
		m.scheduler("ipvs.scheduler", f.Scheduler)
	}
	nodePorts(c, &f, m, odd)
	pods(c, &f, m, odd)

	switch c.Mode {
	case "", "ipvs":
	case "iptables", "nftables":
		odd["mode"] = "longshore always serves with IPVS"
	default:
		m.add("mode", string(c.Mode), "choose one of iptables ipvs nftables")
	}
	f.MasqueradeAll = c.IPTables.MasqueradeAll
	odd["nftables.masqueradeAll"] = "is for mode nftables; here it is iptables.masqueradeAll"
	if c.Mode == "nftables" {
		f.MasqueradeAll = c.NFTables.MasqueradeAll
		odd["iptables.masqueradeAll"] = "is not for mode nftables"
		delete(odd, "nftables.masqueradeAll")
	}

	switch d := c.IPVS.SyncPeriod.Duration; {
	case d < 0:
		m.add("ipvs.syncPeriod", d.String(), "must be greater than 0s")
	case d == 0:
	case d < minAuditPeriod:
		odd["ipvs.syncPeriod"] = fmt.Sprintf("%s is used, the least auditPeriod", minAuditPeriod)
		f.AuditPeriod = minAuditPeriod.String()
	default:
		f.AuditPeriod = d.String()
	}

	f.Kernel = kernelSettings(c, m, odd)

	if c.BindAddress != "" {
		a, err := netip.ParseAddr(c.BindAddress)
		switch {
		case err != nil:
			m.add("bindAddress", c.BindAddress, "not an IP address")
		case !a.IsUnspecified():
			odd["bindAddress"] = "the node's addresses are those of its Node object, or --node-address of `longshore run`"
		}
		if a.Is6() {
			f.MetricsAddress = "[::1]:10249" // kube-proxy's default then
		}
	}
	f.HealthAddress = m.kubeProxyListen("healthzBindAddress", c.HealthzBindAddress, f.HealthAddress)
	f.MetricsAddress = m.kubeProxyListen("metricsBindAddress", c.MetricsBindAddress, f.MetricsAddress)
	return f
}

// kernelSettings takes over the settings of the kernel.
func kernelSettings(c *v1alpha1.KubeProxyConfiguration, m *mistakes, odd map[string]string) kernelFile {
	seconds := func(field string, d metav1.Duration) string {
		m.kernelTime(field, d.Duration)
		return d.Duration.String()
	}
	amount := func(field string, n *int32) int {
		if n == nil {
			return 0
		}
		if *n < 0 {
			m.add(field, *n, "must not be negative")
		}
		return int(*n)
	}
	orZero := func(d *metav1.Duration) metav1.Duration {
		if d == nil {
			return metav1.Duration{}
		}
		return *d
	}
	k := kernelFile{
		TCPTimeout:    seconds("ipvs.tcpTimeout", c.IPVS.TCPTimeout),
		TCPFinTimeout: seconds("ipvs.tcpFinTimeout", c.IPVS.TCPFinTimeout),
		UDPTimeout:    seconds("ipvs.udpTimeout", c.IPVS.UDPTimeout),
		Conntrack: conntrackFile{
			MaxPerCore:            amount("conntrack.maxPerCore", c.Conntrack.MaxPerCore),
			Min:                   amount("conntrack.min", c.Conntrack.Min),
			TCPEstablishedTimeout: seconds("conntrack.tcpEstablishedTimeout", orZero(c.Conntrack.TCPEstablishedTimeout)),
			TCPCloseWaitTimeout:   seconds("conntrack.tcpCloseWaitTimeout", orZero(c.Conntrack.TCPCloseWaitTimeout)),
			UDPTimeout:            seconds("conntrack.udpTimeout", c.Conntrack.UDPTimeout),
			UDPStreamTimeout:      seconds("conntrack.udpStreamTimeout", c.Conntrack.UDPStreamTimeout),
			TCPBeLiberal:          c.Conntrack.TCPBeLiberal,
		},
	}
	if n := c.Conntrack.MaxPerCore; n != nil && *n == 0 { // the limit is to stay as it is
		odd["conntrack.min"] = "is ignored with maxPerCore 0"
		k.Conntrack.Min = 0
	}
	return k
}

// nodePorts takes over which addresses serve node ports.
func nodePorts(c *v1alpha1.KubeProxyConfiguration, f *agentFile, m *mistakes, odd map[string]string) {
	cidrs, onlyPrimary := m.nodePortAddresses(c.NodePortAddresses)
	if onlyPrimary || len(cidrs) < len(c.NodePortAddresses) { // said, or refused
		f.NodePortAddresses = c.NodePortAddresses
		return
	}
	for _, p := range cidrs {
		if p.Addr().IsLoopback() {
			odd["nodePortAddresses"] = "loopback addresses never serve node ports"
			continue
		}
		f.NodePortAddresses = append(f.NodePortAddresses, p.String())
	}
	if len(cidrs) > 0 && len(f.NodePortAddresses) == 0 { // not all addresses of the node instead
		m.add("nodePortAddresses", cidrs[0].String(), noNodePort)
	}
}

// pods takes over whose packets count as those of pods.
func pods(c *v1alpha1.KubeProxyConfiguration, f *agentFile, m *mistakes, odd map[string]string) {
	switch c.DetectLocalMode {
	case "", "ClusterCIDR":
		if c.ClusterCIDR == "" {
			return // kube-proxy then knows no pods; the node's spec.podCIDRs do no harm
		}
		f.PodCIDRs = strings.Split(c.ClusterCIDR, ",")
		m.prefixes("clusterCIDR", f.PodCIDRs)
		return
	case "NodeCIDR": // the default of the agent
	case "BridgeInterface", "InterfaceNamePrefix":
		odd["detectLocalMode"] = "pods are known by their addresses, here the node's spec.podCIDRs"
	default:
		m.add("detectLocalMode", string(c.DetectLocalMode), "choose one of ClusterCIDR NodeCIDR BridgeInterface InterfaceNamePrefix")
	}
	odd["clusterCIDR"] = fmt.Sprintf("is not for detectLocalMode %s", c.DetectLocalMode)
}

// kubeProxyListen is the address to listen on: without a port it has that of otherwise, and if it says nothing it is otherwise.
func (m *mistakes) kubeProxyListen(field, address, otherwise string) string {
	if address == "" {
		return otherwise
	}
	if a, err := netip.ParseAddr(address); err == nil {
		_, port, _ := net.SplitHostPort(otherwise) // a default, always host:port
		address = net.JoinHostPort(a.String(), port)
	}
	m.listen(field, address)
	return address
}

// kubeProxyFields is the fields of a KubeProxyConfiguration: why one has no effect, with all those in it, or nothing if
// it has.
var kubeProxyFields = map[string]string{
	"apiVersion":                      "",
	"kind":                            "",
	"featureGates":                    "there are no feature gates",
	"clientConnection":                "the agent's own client decides that",
	"clientConnection.kubeconfig":     "",
	"logging":                         "the log has flag --log-level",
	"hostnameOverride":                "",
	"bindAddress":                     "",
	"healthzBindAddress":              "",
	"metricsBindAddress":              "",
	"bindAddressHardFail":             "an address that cannot be listened on always ends the agent",
	"enableProfiling":                 "the agent has no profiling",
	"showHiddenMetricsForVersion":     "no metric is hidden",
	"mode":                            "",
	"iptables":                        "longshore has no iptables rules",
	"iptables.localhostNodePorts":     "node ports are never served at loopback addresses",
	"iptables.masqueradeAll":          "",
	"ipvs.syncPeriod":                 "",
	"ipvs.minSyncPeriod":              "changes are programmed as they come, in one pass those that come together",
	"ipvs.scheduler":                  "",
	"ipvs.excludeCIDRs":               "virtual servers of others are never touched",
	"ipvs.strictARP":                  "the kernel never answers ARP for a VIP",
	"ipvs.tcpTimeout":                 "",
	"ipvs.tcpFinTimeout":              "",
	"ipvs.udpTimeout":                 "",
	"nftables":                        "longshore's nftables tables are its own",
	"nftables.masqueradeAll":          "",
	"winkernel":                       "longshore runs on Linux",
	"detectLocalMode":                 "",
	"detectLocal":                     "pods are known by their addresses, not by interfaces",
	"clusterCIDR":                     "",
	"nodePortAddresses":               "",
	"oomScoreAdj":                     "whoever starts the agent decides that, in a pod the kubelet",
	"conntrack.maxPerCore":            "",
	"conntrack.min":                   "",
	"conntrack.tcpEstablishedTimeout": "",
	"conntrack.tcpCloseWaitTimeout":   "",
	"conntrack.tcpBeLiberal":          "",
	"conntrack.udpTimeout":            "",
	"conntrack.udpStreamTimeout":      "",
	"configSyncPeriod":                "objects are watched, never fetched anew",
	"portRange":                       "it has none in kube-proxy either",
	"windowsRunAsService":             "longshore runs on Linux",
}

// reasonOf tells why a field that exists has no effect; empty if it has.
func reasonOf(field string) string {
	reason, there := kubeProxyFields[field]
	for !there && field != "" {
		field = field[:max(0, strings.LastIndexByte(field, '.'))]
		reason, there = kubeProxyFields[field]
	}
	return reason
}

// leaf is a field of a document that has no fields itself.
type leaf struct {
	path  []string
	value any
}

// leaves is the fields of a document that say something, in their order: zeros do not.
func leaves(path []string, value any) []leaf {
	switch v := value.(type) {
	case nil:
		return nil
	case map[string]any:
		var all []leaf
		for _, name := range slices.Sorted(maps.Keys(v)) {
			all = append(all, leaves(append(slices.Clip(path), name), v[name])...)
		}
		return all
	case []any:
		if len(v) == 0 {
			return nil
		}
	default:
		if slices.Contains([]any{false, int64(0), 0.0, "", "0", "0s"}, value) {
			return nil
		}
	}
	return []leaf{{path, value}}
}

func (l leaf) field() string { return strings.Join(l.path, ".") }

// text is the value as JSON.
func (l leaf) text() string {
	text, _ := gojson.Marshal(l.value) // it was JSON before
	return string(text)
}

// check tells whether the field is one of kube-proxy's and can have the value. It is tried alone: so a mistake has its
// field's name, whatever type reads it.
func (l leaf) check() (known bool, err error) {
	document := l.value
	for _, name := range slices.Backward(l.path) {
		document = map[string]any{name: document}
	}
	text, err := gojson.Marshal(document)
	if err != nil {
		return false, err
	}
	unknown, err := json.UnmarshalStrict(text, &v1alpha1.KubeProxyConfiguration{})
	return len(unknown) == 0, readable(err)
}
