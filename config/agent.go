package config

import (
	gojson "encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

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

// Agent is the validated configuration of an agent.
type Agent struct {
	Scheduler         string         // of virtual servers whose Service names none; one of Schedulers
	NodePortAddresses []netip.Prefix // which addresses of the node serve node ports; empty = all
	LoadBalancerClass string         // the class of Services to announce; empty = those without a class
	MembersPort       uint16         // TCP and UDP port on which agents watch each other, not 0
	StatusSocket      string         // absolute path of the Unix socket that answers `longshore status`
	HealthAddress     string         // host:port of /healthz and /livez, host empty = every address; empty = off
	MetricsAddress    string         // host:port of /metrics, likewise
}

// agentFile is the file as it is written. The comments of testdata/agent.yaml say what the fields mean.
type agentFile struct {
	Scheduler         string      `json:"scheduler"`
	NodePortAddresses []string    `json:"nodePortAddresses"`
	LoadBalancerClass string      `json:"loadBalancerClass"`
	Members           membersFile `json:"members"`
	StatusSocket      string      `json:"statusSocket"`
	HealthAddress     string      `json:"healthAddress"`
	MetricsAddress    string      `json:"metricsAddress"`
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
		Members:           membersFile{Port: 7946},
		StatusSocket:      "/run/longshore/agent.sock",
		HealthAddress:     ":10256",
		MetricsAddress:    "127.0.0.1:10249",
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
		LoadBalancerClass: f.LoadBalancerClass,
		StatusSocket:      f.StatusSocket,
		HealthAddress:     f.HealthAddress,
		MetricsAddress:    f.MetricsAddress,
		MembersPort:       uint16(f.Members.Port),
	}
	if err := CheckScheduler(f.Scheduler); err != nil {
		errs = append(errs, fmt.Errorf("scheduler: %w", err))
	}
	for i, text := range f.NodePortAddresses {
		p, err := netip.ParsePrefix(text)
		if err != nil {
			wrong(fmt.Sprintf("nodePortAddresses[%d]", i), text, errors.New("not a CIDR like 192.168.0.0/16"))
			continue
		}
		a.NodePortAddresses = append(a.NodePortAddresses, p.Masked())
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
