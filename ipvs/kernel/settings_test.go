package kernel

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"
)

// conntrack reads a sysctl of connection tracking.
func conntrack(t *testing.T, name string) int {
	t.Helper()
	content, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_" + name)
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(content)))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func wantTimeouts(t *testing.T, want string) {
	t.Helper()
	if got := strings.TrimSpace(run(t, "ipvsadm", "-L", "--timeout")); got != want {
		t.Errorf("ipvsadm -L --timeout: got %q, want %q", got, want)
	}
}

func TestSettings(t *testing.T) {
	k := open(t)
	before := map[string]int{}
	for _, name := range []string{"tcp_timeout_established", "tcp_timeout_close_wait", "udp_timeout", "udp_timeout_stream", "tcp_be_liberal"} {
		before[name] = conntrack(t, name)
	}
	wantSysctls := func(changed map[string]int) {
		t.Helper()
		for name, want := range before {
			if n, there := changed[name]; there {
				want = n
			}
			if got := conntrack(t, name); got != want {
				t.Errorf("nf_conntrack_%s: got %d, want %d", name, got, want)
			}
		}
	}
	configure := func(s Settings) {
		t.Helper()
		if err := k.Configure(s); err != nil {
			t.Fatal(err)
		}
	}

	configure(Settings{})
	wantTimeouts(t, "Timeout (tcp tcpfin udp): 900 120 300")
	wantSysctls(nil)

	configure(Settings{TCPTimeout: 2 * time.Hour, UDPTimeout: 45 * time.Second, ConntrackUDPTimeout: 31 * time.Second})
	wantTimeouts(t, "Timeout (tcp tcpfin udp): 7200 120 45")
	wantSysctls(map[string]int{"udp_timeout": 31})

	configure(Settings{
		TCPFinTimeout:                  time.Second,
		ConntrackTCPEstablishedTimeout: 596*time.Hour + 31*time.Minute + 23*time.Second, // the most that config lets through
		ConntrackTCPCloseWaitTimeout:   time.Hour,
		ConntrackUDPStreamTimeout:      5 * time.Minute,
		ConntrackTCPBeLiberal:          true,
	})
	wantTimeouts(t, "Timeout (tcp tcpfin udp): 7200 1 45")
	changed := map[string]int{
		"tcp_timeout_established": 2147483, "tcp_timeout_close_wait": 3600, "udp_timeout": 31, "udp_timeout_stream": 300, "tcp_be_liberal": 1,
	}
	wantSysctls(changed)

	configure(Settings{}) // leaves what is there, whoever set it
	wantTimeouts(t, "Timeout (tcp tcpfin udp): 7200 1 45")
	wantSysctls(changed)

	err := k.Configure(Settings{TCPTimeout: 596*time.Hour*1000 + time.Second, ConntrackUDPTimeout: 32 * time.Second})
	if err == nil || !strings.Contains(err.Error(), "set IPVS timeouts: TCP 596000h0m1s, TCP after FIN 0s, UDP 0s: ") {
		t.Errorf("a timeout that the kernel cannot have: %v", err)
	}
	changed["udp_timeout"] = 32
	wantTimeouts(t, "Timeout (tcp tcpfin udp): 7200 1 45")
	wantSysctls(changed)
}

// The limit of connections is the machine's: a network namespace sees it and cannot set it.
func TestSettingsOfTheMachine(t *testing.T) {
	k := open(t)
	have := conntrack(t, "max")
	err := k.Configure(Settings{ConntrackMin: int32(have + 1), ConntrackUDPTimeout: 33 * time.Second})
	want := fmt.Sprintf("set sysctl net.netfilter.nf_conntrack_max = %d, it stays %d: ", have+1, have)
	if err == nil || !strings.HasPrefix(err.Error(), want) || !strings.HasSuffix(err.Error(), "initial network namespace") {
		t.Errorf("got %v, want %s...", err, want)
	}
	if got := conntrack(t, "max"); got != have {
		t.Errorf("nf_conntrack_max: got %d, want %d", got, have)
	}
	if got := conntrack(t, "udp_timeout"); got != 33 {
		t.Errorf("nf_conntrack_udp_timeout: got %d, want 33: what can be set is set", got)
	}
	if err := k.Configure(Settings{ConntrackMin: int32(have)}); err != nil {
		t.Errorf("a limit that is there already: %v", err)
	}
}

func TestConntrackMax(t *testing.T) {
	for _, test := range []struct {
		name               string
		perCore, min       int32
		cpus, have, expect int
	}{
		{"nothing said", 0, 0, 4, 262144, 262144},
		{"for each CPU", 32768, 0, 4, 262144, 131072},
		{"at least", 32768, 200000, 4, 262144, 200000},
		{"more than at least", 32768, 100000, 4, 65536, 131072},
		{"at least alone raises", 0, 300000, 4, 262144, 300000},
		{"at least alone does not lower", 0, 100000, 4, 262144, 262144},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := Settings{ConntrackMaxPerCore: test.perCore, ConntrackMin: test.min}
			if got := s.conntrackMax(test.cpus, test.have); got != test.expect {
				t.Errorf("got %d, want %d", got, test.expect)
			}
		})
	}
}
