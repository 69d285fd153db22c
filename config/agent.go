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

// primary stands in nodePortAddresses for the node's main address of each family, as in kube-proxy's configuration.
const primary = "primary"

// minAuditPeriod keeps an agent from doing nothing but comparing.
const minAuditPeriod = 10 * time.Second

var errNodePortLoopback = errors.New("node ports are never served at loopback addresses; " +
	"to serve them nowhere write a CIDR that no node has, such as 192.0.2.0/24")

// Agent is the validated configuration of an agent.
type Agent struct {
	Scheduler         string         // of virtual servers whose Service names none; one of Schedulers
	NodePortAddresses []netip.Prefix // which addresses of the node serve node ports; empty = all
	NodePortPrimary   bool           // only the node's main address of each family does; NodePortAddresses is empty then
	PodCIDRs          []netip.Prefix // whose sources count as pods of this node; empty = the node's spec.podCIDRs
	MasqueradeAll     bool           // clients are hidden behind the node at every frontend
	DrainTimeout      time.Duration  // how long an endpoint that goes keeps its open connections, at most 24h; 0 = not at all
	AuditPeriod       time.Duration  // how often the whole kernel state is compared, at least 10s; 0 = never
	Kernel            KernelSettings
	LoadBalancerClass string // the class of Services to announce; empty = those without a class
	MembersPort       uint16 // TCP and UDP port on which agents watch each other, not 0
	StatusSocket      string // absolute path of the Unix socket that answers `longshore status`
	HealthAddress     string // host:port of /healthz and /livez, host empty = every address; empty = off
	MetricsAddress    string // host:port of /metrics, likewise
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

type membersFile struct {
	Port int `json:"port"`
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
		Members:        membersFile{Port: 7946},
		StatusSocket:   "/run/longshore/agent.sock",
		HealthAddress:  ":10256",
		MetricsAddress: "127.0.0.1:10249",
	}
}

// DefaultAgent is the configuration of an agent whose file is empty.
func DefaultAgent() Agent {
	a, _ := defaults().validate() // always valid: a test says so
	return a
}

// ParseAgent reads the content of an agent's configuration file, YAML or JSON. A field that is not in the file has its
// default; one that does not exist, or is written twice, is an error. Each line of an error begins with path.
func ParseAgent(path string, content []byte) (Agent, error) {
	file := defaults()
	text, err := yaml.YAMLToJSONStrict(content)
	if err != nil {
		return Agent{}, fmt.Errorf("%s: %w", path, err)
	}
	strict, err := json.UnmarshalStrict(text, &file)
	if wrong := new(gojson.UnmarshalTypeError); errors.As(err, &wrong) {
		return Agent{}, fmt.Errorf("%s: %s: %s where %s should be", path, wrong.Field, wrong.Value, wrong.Type)
	}
	if err != nil {
		return Agent{}, fmt.Errorf("%s: %w", path, err)
	}
	a, err := file.validate()
	return a, prefixed(path, append(strict, err))
}

// prefixed joins errors, each with what it is about.
func prefixed(path string, errs []error) error {
	var all []error
	for _, err := range errs {
		if joined, ok := err.(interface{ Unwrap() []error }); ok {
			all = append(all, prefixed(path, joined.Unwrap()))
		} else if err != nil {
			all = append(all, fmt.Errorf("%s: %w", path, err))
		}
	}
	return errors.Join(all...)
}

// validate makes the configuration of the file.
func (f agentFile) validate() (Agent, error) {
	var errs []error
	wrong := func(field string, value any, err error) {
		if s, ok := value.(string); ok {
			value = strconv.Quote(s)
		}
		errs = append(errs, fmt.Errorf("%s: %v: %w", field, value, err))
	}
	a := Agent{
		Scheduler:         f.Scheduler,
		MasqueradeAll:     f.MasqueradeAll,
		LoadBalancerClass: f.LoadBalancerClass,
		StatusSocket:      f.StatusSocket,
		HealthAddress:     f.HealthAddress,
		MetricsAddress:    f.MetricsAddress,
		MembersPort:       uint16(f.Members.Port),
	}
	if err := CheckScheduler(f.Scheduler); err != nil {
		errs = append(errs, fmt.Errorf("scheduler: %w", err))
	}
	prefixes := func(field string, texts []string) (all []netip.Prefix) {
		for i, text := range texts {
			p, err := netip.ParsePrefix(text)
			if err != nil {
				wrong(fmt.Sprintf("%s[%d]", field, i), text, errors.New("not a CIDR like 192.168.0.0/16"))
				continue
			}
			all = append(all, p.Masked())
		}
		return all
	}
	if slices.Equal(f.NodePortAddresses, []string{primary}) {
		a.NodePortPrimary = true
	} else if i := slices.Index(f.NodePortAddresses, primary); i >= 0 {
		wrong(fmt.Sprintf("nodePortAddresses[%d]", i), primary, errors.New("must stand alone"))
	} else {
		a.NodePortAddresses = prefixes("nodePortAddresses", f.NodePortAddresses)
	}
	for _, p := range a.NodePortAddresses {
		if loopback(p) {
			wrong("nodePortAddresses", p.String(), errNodePortLoopback)
		}
	}
	a.PodCIDRs = prefixes("podCIDRs", f.PodCIDRs)
	timed := func(field, text string, check func(time.Duration) error) time.Duration {
		d, err := time.ParseDuration(text)
		if err != nil {
			wrong(field, text, errors.New("not a duration like 90s or 15m"))
		} else if err := check(d); err != nil {
			wrong(field, text, err)
		}
		return d
	}
	a.DrainTimeout = timed("drainTimeout", f.DrainTimeout, func(d time.Duration) error {
		if d < 0 || d > 24*time.Hour {
			return errors.New("must be between 0s and 24h")
		}
		return nil
	})
	a.AuditPeriod = timed("auditPeriod", f.AuditPeriod, func(d time.Duration) error {
		if d != 0 && d < minAuditPeriod {
			return fmt.Errorf("must be 0s or at least %s", minAuditPeriod)
		}
		return nil
	})
	amount := func(field string, n int) int32 {
		if n < 0 || n > math.MaxInt32 {
			wrong(field, n, fmt.Errorf("must be between 0 and %d", math.MaxInt32))
		}
		return int32(n)
	}
	k, c := f.Kernel, f.Kernel.Conntrack
	a.Kernel = KernelSettings{
		TCPTimeout:                     timed("kernel.tcpTimeout", k.TCPTimeout, checkKernelTime),
		TCPFinTimeout:                  timed("kernel.tcpFinTimeout", k.TCPFinTimeout, checkKernelTime),
		UDPTimeout:                     timed("kernel.udpTimeout", k.UDPTimeout, checkKernelTime),
		ConntrackMaxPerCore:            amount("kernel.conntrack.maxPerCore", c.MaxPerCore),
		ConntrackMin:                   amount("kernel.conntrack.min", c.Min),
		ConntrackTCPEstablishedTimeout: timed("kernel.conntrack.tcpEstablishedTimeout", c.TCPEstablishedTimeout, checkKernelTime),
		ConntrackTCPCloseWaitTimeout:   timed("kernel.conntrack.tcpCloseWaitTimeout", c.TCPCloseWaitTimeout, checkKernelTime),
		ConntrackUDPTimeout:            timed("kernel.conntrack.udpTimeout", c.UDPTimeout, checkKernelTime),
		ConntrackUDPStreamTimeout:      timed("kernel.conntrack.udpStreamTimeout", c.UDPStreamTimeout, checkKernelTime),
		ConntrackTCPBeLiberal:          c.TCPBeLiberal,
	}
	if f.LoadBalancerClass != "" {
		for _, reason := range validation.IsQualifiedName(f.LoadBalancerClass) {
			wrong("loadBalancerClass", f.LoadBalancerClass, errors.New(reason))
		}
	}
	if f.Members.Port < 1 || f.Members.Port > 65535 {
		wrong("members.port", f.Members.Port, errors.New("must be between 1 and 65535"))
	}
	if err := checkSocket(f.StatusSocket); err != nil {
		wrong("statusSocket", f.StatusSocket, err)
	}
	if err := checkListen(f.HealthAddress); err != nil {
		wrong("healthAddress", f.HealthAddress, err)
	}
	if err := checkListen(f.MetricsAddress); err != nil {
		wrong("metricsAddress", f.MetricsAddress, err)
	}
	if len(errs) > 0 {
		return Agent{}, errors.Join(errs...)
	}
	return a, nil
}

// loopback tells whether a prefix has no other addresses than loopback ones.
func loopback(p netip.Prefix) bool {
	return p.Addr().IsLoopback() && p.Masked().Addr().IsLoopback()
}

// checkKernelTime tells whether the kernel can have the time: it counts seconds, and ticks in 31 bits. A kernel of 1000
// ticks a second has the least room.
func checkKernelTime(d time.Duration) error {
	const most = math.MaxInt32 / 1000 * time.Second
	if d < 0 || d > most || d%time.Second != 0 {
		return fmt.Errorf("must be whole seconds, at most %s", most)
	}
	return nil
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
