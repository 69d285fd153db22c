package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/longshore-lb/longshore/e2e/lab"
)

// proxy is a program to measure.
type proxy struct {
	name string
	exec func(*bench) (lab.Exec, error)
	open func(*lab.Node) (plane, error)
	// synced tells whether a proxy that answers 200 at /healthz has done its work.
	synced func(context.Context, *running) bool
}

var proxies = map[string]*proxy{
	ours: {
		name: ours, open: openIPVS,
		exec: func(b *bench) (lab.Exec, error) {
			path, err := filepath.Abs("bin/longshore")
			return lab.Exec{Path: path, Args: []string{
				"agent", "--kubeconfig", b.cluster.AdminKubeconfig(), "--namespace", longshoreNamespace, "--config", b.config,
				"--node", b.node().Name, "--status-socket", "/run/longshore/bench.sock",
			}}, err
		},
		synced: func(context.Context, *running) bool { return true },
	},
	"kube-proxy-ipvs":     kubeProxy("ipvs", openIPVS),
	"kube-proxy-nftables": kubeProxy("nftables", openNFT),
}

func kubeProxy(mode string, open func(*lab.Node) (plane, error)) *proxy {
	return &proxy{
		name: "kube-proxy-" + mode, open: open,
		exec: func(b *bench) (lab.Exec, error) {
			path, err := lab.Program("kube-proxy")
			return lab.Exec{Path: path, Args: []string{
				"--kubeconfig", b.cluster.AdminKubeconfig(), "--hostname-override", b.node().Name, "--proxy-mode", mode,
				"--cluster-cidr", "10.244.0.0/16,fd44::/16",
				"--conntrack-max-per-core=0", "--conntrack-tcp-timeout-established=0s", "--conntrack-tcp-timeout-close-wait=0s", // the host's
			}}, err
		},
		// It answers 200 from its start on; this metric appears when the first sync of the family is over.
		synced: func(ctx context.Context, r *running) bool {
			_, body, err := r.get(ctx, "http://127.0.0.1:10249/metrics")
			return err == nil && bytes.Contains(body, []byte(`kubeproxy_sync_proxy_rules_last_timestamp_seconds{ip_family="IPv4"}`))
		},
	}
}

// running is a proxy on its node.
type running struct {
	*proxy
	plane
	process *lab.Process
	node    *lab.Node
	began   time.Time
	http    *http.Client
}

// start starts a proxy on a fresh node.
func (b *bench) start(p *proxy) (*running, error) {
	exec, err := p.exec(b)
	if err != nil {
		return nil, err
	}
	if err := toMemory(exec.Path); err != nil {
		return nil, err
	}
	r := &running{proxy: p, node: b.node()}
	r.http = &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			return r.node.DialContext(ctx, network, address)
		},
	}}
	if r.plane, err = p.open(r.node); err != nil {
		return nil, err
	}
	b.starts++
	exec.Name = fmt.Sprintf("%02d-%s-%d", b.starts, p.name, b.load.size())
	r.began = time.Now()
	r.process, err = r.node.Start(exec)
	return r, err
}

// stop ends the proxy; its node goes afterwards, so it need not be polite.
func (r *running) stop() {
	r.process.Kill()
	r.plane.close()
}

// alive is why the proxy has ended, nil while it runs.
func (r *running) alive() error {
	if r.process.Running() {
		return nil
	}
	return r.process.Err()
}

func (r *running) get(ctx context.Context, url string) (status int, body []byte, err error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return 0, nil, err
	}
	response, err := r.http.Do(request)
	if err != nil {
		return 0, nil, err
	}
	defer response.Body.Close()
	body, err = io.ReadAll(response.Body)
	return response.StatusCode, body, err
}

// healthy waits for /healthz and tells when it was good.
func (r *running) healthy(ctx context.Context) (time.Time, error) {
	for {
		status, _, err := r.get(ctx, "http://127.0.0.1:10256/healthz")
		if err == nil && status == http.StatusOK && r.synced(ctx, r) {
			return time.Now(), nil
		}
		if err := r.alive(); err != nil {
			return time.Time{}, err
		}
		select {
		case <-ctx.Done():
			return time.Time{}, context.Cause(ctx)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// metrics is the sum of every series of each metric.
func (r *running) metrics(ctx context.Context) (map[string]float64, error) {
	status, body, err := r.get(ctx, "http://127.0.0.1:10249/metrics")
	if err != nil || status != http.StatusOK {
		return nil, fmt.Errorf("metrics of %s: status %d: %w", r.name, status, err)
	}
	return parseMetrics(body), nil
}

// parseMetrics reads Prometheus' text format, without labels and timestamps.
func parseMetrics(text []byte) map[string]float64 {
	sums := map[string]float64{}
	for line := range bytes.Lines(text) {
		at := bytes.LastIndexByte(line, ' ')
		if at < 0 || line[0] == '#' {
			continue
		}
		name, _, _ := bytes.Cut(line[:at], []byte("{"))
		if v, err := strconv.ParseFloat(string(bytes.TrimSpace(line[at:])), 64); err == nil {
			sums[string(name)] += v
		}
	}
	return sums
}

// cpu is the processor's time that the proxy has used, with that of the programs it has run to their ends.
func (r *running) cpu() (time.Duration, error) {
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", r.process.PID()))
	if err != nil {
		return 0, err
	}
	return parseStat(string(content))
}

// parseStat adds utime, stime, cutime and cstime of /proc/PID/stat (proc(5)), which are in ticks of 10 ms.
func parseStat(text string) (time.Duration, error) {
	words := strings.Fields(text[strings.LastIndexByte(text, ')')+1:])
	if len(words) < 15 {
		return 0, fmt.Errorf("/proc/PID/stat: %q is too short", text)
	}
	var ticks int
	for _, w := range words[11:15] {
		n, err := strconv.Atoi(w)
		if err != nil {
			return 0, fmt.Errorf("/proc/PID/stat: %w", err)
		}
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond, nil
}

// resident is the proxy's VmRSS in MiB.
func (r *running) resident() (float64, error) {
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", r.process.PID()))
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(content), "VmRSS:")
	var kib float64
	if _, err := fmt.Sscan(rest, &kib); err != nil {
		return 0, fmt.Errorf("VmRSS of %s: %w", r.name, err)
	}
	return kib / 1024, nil
}
