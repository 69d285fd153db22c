package kernel

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"time"
)

// Timeouts of the IPVS generic netlink family (include/uapi/linux/ip_vs.h).
const (
	cmdSetConfig = 12

	attrTimeoutTCP    = 4
	attrTimeoutTCPFin = 5
	attrTimeoutUDP    = 6
)

// Settings are settings of the kernel that others on the machine feel too. Zero leaves what the kernel has. Times are
// whole seconds.
type Settings struct {
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

// Configure sets what is not zero. One that fails does not keep the others; the error has a line for each. The limit of
// tracked connections belongs to the whole machine and can be set in its initial network namespace only
// (net/netfilter/nf_conntrack_standalone.c).
func (k *Kernel) Configure(s Settings) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return errors.Join(k.setTimeouts(s), k.setConntrack(s))
}

// setTimeouts sets all timeouts of IPVS at once; the kernel keeps those that are 0 (ip_vs_set_timeout).
func (k *Kernel) setTimeouts(s Settings) error {
	var attrs attributes
	attrs.uint32(attrTimeoutTCP, uint32(s.TCPTimeout/time.Second))
	attrs.uint32(attrTimeoutTCPFin, uint32(s.TCPFinTimeout/time.Second))
	attrs.uint32(attrTimeoutUDP, uint32(s.UDPTimeout/time.Second))
	if err := k.genl.write([]message{{command: cmdSetConfig, attrs: attrs}})[0]; err != nil {
		return fmt.Errorf("set IPVS timeouts: TCP %s, TCP after FIN %s, UDP %s: %w", s.TCPTimeout, s.TCPFinTimeout, s.UDPTimeout, err)
	}
	return nil
}

// setConntrack sets the sysctls of connection tracking.
func (k *Kernel) setConntrack(s Settings) error {
	if s == (Settings{TCPTimeout: s.TCPTimeout, TCPFinTimeout: s.TCPFinTimeout, UDPTimeout: s.UDPTimeout}) {
		return nil // about IPVS alone
	}
	if err := loadModule("nf_conntrack"); err != nil { // it may be built in; else the sysctls are not there, which is said then
		k.log.Debug("module not loaded", "module", "nf_conntrack", "error", err)
	}
	seconds := func(d time.Duration) func(int) int {
		return func(have int) int { return cmp.Or(int(d/time.Second), have) }
	}
	return errors.Join(
		setConntrack("tcp_timeout_established", seconds(s.ConntrackTCPEstablishedTimeout)),
		setConntrack("tcp_timeout_close_wait", seconds(s.ConntrackTCPCloseWaitTimeout)),
		setConntrack("udp_timeout", seconds(s.ConntrackUDPTimeout)),
		setConntrack("udp_timeout_stream", seconds(s.ConntrackUDPStreamTimeout)),
		setConntrack("tcp_be_liberal", func(have int) int {
			if s.ConntrackTCPBeLiberal {
				return 1
			}
			return have
		}),
		setConntrack("max", func(have int) int { return s.conntrackMax(runtime.NumCPU(), have) }),
	)
}

// conntrackMax is how many connections to track, where the kernel has a limit already.
func (s Settings) conntrackMax(cpus, have int) int {
	return max(cmp.Or(int(s.ConntrackMaxPerCore)*cpus, have), int(s.ConntrackMin))
}

// setConntrack changes a sysctl of connection tracking from the value it has.
func setConntrack(name string, change func(have int) int) error {
	name = "net.netfilter.nf_conntrack_" + name
	path := "/proc/sys/" + strings.ReplaceAll(name, ".", "/")
	text, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("read sysctl %s: %w", name, err)
	}
	have, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		return fmt.Errorf("read sysctl %s: %w", name, err)
	}
	value := change(have)
	if value == have {
		return nil
	}
	err = os.WriteFile(path, []byte(strconv.Itoa(value)), 0o644)
	if errors.Is(err, os.ErrPermission) {
		return fmt.Errorf("set sysctl %s = %d, it stays %d: %w; it may belong to the machine's initial network namespace", name, value, have, err)
	}
	if err != nil {
		return fmt.Errorf("set sysctl %s = %d, it stays %d: %w", name, value, have, err)
	}
	return nil
}
