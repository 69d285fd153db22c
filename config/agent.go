package config

import (
	gojson "encoding/json"
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/util/validation"
	"sigs.k8s.io/json"
	"sigs.k8s.io/yaml"
)

// Schedulers is the names of the kernel's IPVS schedulers (net/netfilter/ipvs/ip_vs_*.c).
var Schedulers = [...]string{"rr", "wrr", "lc", "wlc", "sh", "dh", "mh", "sed", "nq", "lblc", "lblcr", "fo", "ovf"}

// CheckScheduler tells whether the kernel has a scheduler of that name.
func CheckScheduler(name string) error {
	if slices.Contains(Schedulers[:], name) {
		return nil
	}
	return fmt.Errorf("%q is not an IPVS scheduler: choose one of %s", name, strings.Join(Schedulers[:], " "))
}

// minAuditPeriod keeps an agent from doing nothing but comparing.
const minAuditPeriod = 10 * time.Second

const noNodePort = "node ports are never served at loopback addresses; " +
	"to serve them nowhere write a CIDR that no node has, such as 192.0.2.0/24"

// Agent is the validated configuration of an agent.
type Agent struct {
	Scheduler         string         // of virtual servers whose Service names none; one of Schedulers
	NodePortAddresses []netip.Prefix // which addresses of the node serve node ports; empty = all
	NodePortPrimary   bool           // only the node's main address of each family does; NodePortAddresses is empty then
	PodCIDRs          []netip.Prefix // whose sources count as pods of this node; empty = the node's spec.podCIDRs
	MasqueradeAll     bool           // clients of cluster IPs are hidden behind the node, pods too
	DrainTimeout      time.Duration  // how long an endpoint that goes keeps its open connections, at most 24h; 0 = not at all
	AuditPeriod       time.Duration  // how often the whole kernel state is compared, at least 10s; 0 = never
	Kernel            KernelSettings
	GracefulShutdown  time.Duration // for how long BGP peers are asked to prefer other routes (RFC 8326) before this node's go, at most 10m; 0 = not at all
	LoadBalancerClass string        // the class of Services to announce; empty = those without a class
	ProbeInterval     time.Duration // the pace at which agents notice that one is gone, 50ms to 10s
	CrashGrace        time.Duration // how long an agent that crashed has to come back while its node lives, at most 5m; 0 = no time
	MembersPort       uint16        // TCP and UDP port on which agents watch each other, not 0
	StatusSocket      string        // absolute path of the Unix socket that answers `longshore status`
	HealthAddress     string        // host:port of /healthz and /livez, host empty = every address; empty = off
	MetricsAddress    string        // host:port of /metrics, likewise
}

// KernelSettings are settings of the kernel that others on the machine feel too. Zero leaves what the kernel has.
// Times are whole seconds.
type KernelSettings struct {
	TCPTimeout    time.Duration // of IPVS connections without packets
	TCPFinTimeout time.Duration // likewise, after a FIN
	UDPTimeout    time.Duration

	ConntrackMaxPerCore            int32 // connections to track for each CPU
	ConntrackMin                   int32 // and at least in all
	ConntrackTCPEstablishedTimeout time.Duration
	ConntrackTCPCloseWaitTimeout   time.Duration
	ConntrackUDPTimeout            time.Duration
	ConntrackUDPStreamTimeout      time.Duration
	ConntrackTCPBeLiberal          bool // packets outside a connection's window belong to it
}

// agentFile is the file as it is written. The comments of testdata/agent.yaml say what the fields mean.
type agentFile struct {
	Scheduler         string      `json:"scheduler"`
	NodePortAddresses []string    `json:"nodePortAddresses"`
	PodCIDRs          []string    `json:"podCIDRs"`
	MasqueradeAll     bool        `json:"masqueradeAll"`
	DrainTimeout      string      `json:"drainTimeout"`
	AuditPeriod       string      `json:"auditPeriod"`
	Kernel            kernelFile  `json:"kernel"`
	BGP               bgpFile     `json:"bgp"`
	LoadBalancerClass string      `json:"loadBalancerClass"`
	Members           membersFile `json:"members"`
	StatusSocket      string      `json:"statusSocket"`
	HealthAddress     string      `json:"healthAddress"`
	MetricsAddress    string      `json:"metricsAddress"`
}

type kernelFile struct {
	TCPTimeout    string        `json:"tcpTimeout"`
	TCPFinTimeout string        `json:"tcpFinTimeout"`
	UDPTimeout    string        `json:"udpTimeout"`
	Conntrack     conntrackFile `json:"conntrack"`
}

type conntrackFile struct {
	MaxPerCore            int    `json:"maxPerCore"`
	Min                   int    `json:"min"`
	TCPEstablishedTimeout string `json:"tcpEstablishedTimeout"`
	TCPCloseWaitTimeout   string `json:"tcpCloseWaitTimeout"`
	UDPTimeout            string `json:"udpTimeout"`
	UDPStreamTimeout      string `json:"udpStreamTimeout"`
	TCPBeLiberal          bool   `json:"tcpBeLiberal"`
}

type bgpFile struct {
	GracefulShutdown string `json:"gracefulShutdown"`
}

type membersFile struct {
	Port          int    `json:"port"`
	ProbeInterval string `json:"probeInterval"`
	CrashGrace    string `json:"crashGrace"`
}

// defaults is the file that says nothing. Ports 10256 and 10249 are kube-proxy's, whose probes and dashboards go on
// working; 7946 is memberlist's.
func defaults() agentFile {
	return agentFile{
		Scheduler:         "rr",
		NodePortAddresses: []string{},
		PodCIDRs:          []string{},
		DrainTimeout:      "15m",
		AuditPeriod:       "5m",
		Kernel: kernelFile{
			TCPTimeout:    "0s",
			TCPFinTimeout: "0s",
			UDPTimeout:    "0s",
			Conntrack: conntrackFile{
				TCPEstablishedTimeout: "0s",
				TCPCloseWaitTimeout:   "0s",
				UDPTimeout:            "0s",
				UDPStreamTimeout:      "0s",
			},
		},
		BGP:            bgpFile{GracefulShutdown: "5s"},
		Members:        membersFile{Port: 7946, ProbeInterval: "200ms", CrashGrace: "2s"},
		StatusSocket:   "/run/longshore/agent.sock",
		HealthAddress:  ":10256",
		MetricsAddress: "127.0.0.1:10249",
	}
}

// DefaultAgent is the configuration of an agent whose file is empty.
func DefaultAgent() Agent {
	return defaults().validate(&mistakes{}) // always valid: a test says so
}

// ParseAgent reads the content of an agent's configuration file, YAML or JSON. A field that is not in the file has its
// default; one that does not exist, or is written twice, is an error. Each line of an error begins with path.
func ParseAgent(path string, content []byte) (Agent, error) {
	return defaults().over(path, content)
}

// over reads the content of a configuration file over f, which has the fields that are not in it.
func (f agentFile) over(path string, content []byte) (Agent, error) {
	text, err := yaml.YAMLToJSONStrict(content)
	if err != nil {
		return Agent{}, fmt.Errorf("%s: %w", path, err)
	}
	strict, err := json.UnmarshalStrict(text, &f)
	if err != nil {
		return Agent{}, undecoded(path, err)
	}
	m := &mistakes{object: path}
	for _, err := range strict {
		m.errs = append(m.errs, fmt.Errorf("%s: %w", path, err))
	}
	a := f.validate(m)
	if err := m.err(); err != nil {
		return Agent{}, err
	}
	return a, nil
}

// undecoded is why a file could not be decoded.
func undecoded(path string, err error) error {
	if wrong := new(gojson.UnmarshalTypeError); errors.As(err, &wrong) {
		path += ": " + wrong.Field
	}
	return fmt.Errorf("%s: %w", path, readable(err))
}

// readable says in few words that a value has the wrong type.
func readable(err error) error {
	if wrong := new(gojson.UnmarshalTypeError); errors.As(err, &wrong) {
		return fmt.Errorf("%s where %s should be", wrong.Value, wrong.Type)
	}
	return err
}

// validate makes the configuration of the file.
func (f agentFile) validate(m *mistakes) Agent {
	a := Agent{
		Scheduler:         f.Scheduler,
		PodCIDRs:          m.prefixes("podCIDRs", f.PodCIDRs),
		MasqueradeAll:     f.MasqueradeAll,
		DrainTimeout:      m.duration("drainTimeout", f.DrainTimeout),
		AuditPeriod:       m.duration("auditPeriod", f.AuditPeriod),
		Kernel:            f.Kernel.validate(m),
		GracefulShutdown:  m.duration("bgp.gracefulShutdown", f.BGP.GracefulShutdown),
		LoadBalancerClass: f.LoadBalancerClass,
		StatusSocket:      f.StatusSocket,
		HealthAddress:     f.HealthAddress,
		MetricsAddress:    f.MetricsAddress,
		ProbeInterval:     m.duration("members.probeInterval", f.Members.ProbeInterval),
		CrashGrace:        m.duration("members.crashGrace", f.Members.CrashGrace),
		MembersPort:       uint16(f.Members.Port),
	}
	m.scheduler("scheduler", f.Scheduler)
	a.NodePortAddresses, a.NodePortPrimary = m.nodePortAddresses(f.NodePortAddresses)
	for _, p := range a.NodePortAddresses {
		if p.Addr().IsLoopback() {
			m.add("nodePortAddresses", p.String(), noNodePort)
		}
	}
	if a.DrainTimeout < 0 || a.DrainTimeout > 24*time.Hour {
		m.add("drainTimeout", f.DrainTimeout, "must be between 0s and 24h")
	}
	if a.AuditPeriod != 0 && a.AuditPeriod < minAuditPeriod {
		m.add("auditPeriod", f.AuditPeriod, "must be 0s or at least %s", minAuditPeriod)
	}
	if a.GracefulShutdown < 0 || a.GracefulShutdown > 10*time.Minute {
		m.add("bgp.gracefulShutdown", f.BGP.GracefulShutdown, "must be between 0s and 10m")
	}
	if f.LoadBalancerClass != "" {
		for _, reason := range validation.IsQualifiedName(f.LoadBalancerClass) {
			m.add("loadBalancerClass", f.LoadBalancerClass, "%s", reason)
		}
	}
	if f.Members.Port < 1 || f.Members.Port > 65535 {
		m.add("members.port", f.Members.Port, "must be between 1 and 65535")
	}
	if a.ProbeInterval < 50*time.Millisecond || a.ProbeInterval > 10*time.Second {
		m.add("members.probeInterval", f.Members.ProbeInterval, "must be between 50ms and 10s")
	}
	if a.CrashGrace < 0 || a.CrashGrace > 5*time.Minute {
		m.add("members.crashGrace", f.Members.CrashGrace, "must be between 0s and 5m")
	}
	if err := checkSocket(f.StatusSocket); err != nil {
		m.add("statusSocket", f.StatusSocket, "%w", err)
	}
	m.listen("healthAddress", f.HealthAddress)
	m.listen("metricsAddress", f.MetricsAddress)
	return a
}

func (f kernelFile) validate(m *mistakes) KernelSettings {
	seconds := func(field, text string) time.Duration {
		d := m.duration("kernel."+field, text)
		m.kernelTime("kernel."+field, d)
		return d
	}
	amount := func(field string, n int) int32 {
		if n < 0 || n > math.MaxInt32 {
			m.add("kernel."+field, n, "must be between 0 and %d", math.MaxInt32)
		}
		return int32(n)
	}
	c := f.Conntrack
	return KernelSettings{
		TCPTimeout:                     seconds("tcpTimeout", f.TCPTimeout),
		TCPFinTimeout:                  seconds("tcpFinTimeout", f.TCPFinTimeout),
		UDPTimeout:                     seconds("udpTimeout", f.UDPTimeout),
		ConntrackMaxPerCore:            amount("conntrack.maxPerCore", c.MaxPerCore),
		ConntrackMin:                   amount("conntrack.min", c.Min),
		ConntrackTCPEstablishedTimeout: seconds("conntrack.tcpEstablishedTimeout", c.TCPEstablishedTimeout),
		ConntrackTCPCloseWaitTimeout:   seconds("conntrack.tcpCloseWaitTimeout", c.TCPCloseWaitTimeout),
		ConntrackUDPTimeout:            seconds("conntrack.udpTimeout", c.UDPTimeout),
		ConntrackUDPStreamTimeout:      seconds("conntrack.udpStreamTimeout", c.UDPStreamTimeout),
		ConntrackTCPBeLiberal:          c.TCPBeLiberal,
	}
}

// scheduler notes a scheduler that the kernel does not have.
func (m *mistakes) scheduler(field, name string) {
	if err := CheckScheduler(name); err != nil {
		m.errs = append(m.errs, fmt.Errorf("%s: %s: %w", m.object, field, err))
	}
}

// nodePortAddresses parses which addresses serve node ports: CIDRs, or the word primary alone.
func (m *mistakes) nodePortAddresses(texts []string) (cidrs []netip.Prefix, onlyPrimary bool) {
	const primary = "primary"
	at := slices.Index(texts, primary)
	if at < 0 {
		return m.prefixes("nodePortAddresses", texts), false
	}
	if len(texts) > 1 {
		m.add(fmt.Sprintf("nodePortAddresses[%d]", at), primary, "must stand alone")
	}
	return nil, true
}

// prefixes parses a list of CIDRs.
func (m *mistakes) prefixes(field string, texts []string) (all []netip.Prefix) {
	for i, text := range texts {
		p, err := netip.ParsePrefix(text)
		if err != nil {
			m.add(fmt.Sprintf("%s[%d]", field, i), text, "not a CIDR like 192.168.0.0/16")
			continue
		}
		all = append(all, p.Masked())
	}
	return all
}

// duration parses a duration; one that is wrong is 0.
func (m *mistakes) duration(field, text string) time.Duration {
	d, err := time.ParseDuration(text)
	if err != nil {
		m.add(field, text, "not a duration like 90s or 15m")
	}
	return d
}

// kernelTime notes a time that the kernel cannot have: it counts seconds, and ticks in 31 bits. A kernel of 1000 ticks
// a second has the least room.
func (m *mistakes) kernelTime(field string, d time.Duration) {
	const most = math.MaxInt32 / 1000 * time.Second
	if d < 0 || d > most || d%time.Second != 0 {
		m.add(field, d.String(), "must be whole seconds, at most %s", most)
	}
}

// listen notes an address that no server can listen on.
func (m *mistakes) listen(field, address string) {
	if err := checkListen(address); err != nil {
		m.add(field, address, "%w", err)
	}
}

// checkSocket tells whether a Unix socket can have the path.
func checkSocket(path string) error {
	const longest = 107 // sun_path of sockaddr_un, include/uapi/linux/un.h, less the final zero
	switch {
	case !filepath.IsAbs(path):
		return errors.New("must be an absolute path")
	case len(path) > longest:
		return fmt.Errorf("has %d bytes, a socket's path has at most %d", len(path), longest)
	}
	return nil
}

// checkListen tells whether a server can listen on host:port. The host is not looked up.
func checkListen(address string) error {
	if address == "" {
		return nil
	}
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return errors.New("neither host:port nor empty")
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return fmt.Errorf("port %q is not between 1 and 65535", port)
	}
	if host == "" {
		return nil
	}
	if _, err := netip.ParseAddr(host); err != nil {
		return fmt.Errorf("host %q is not an IP address", host)
	}
	return nil
}
