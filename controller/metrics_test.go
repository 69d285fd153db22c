package controller

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/longshore-lb/longshore/announcer/bfd"
	"github.com/longshore-lb/longshore/announcer/bgp"
	"github.com/longshore-lb/longshore/ipvs"
)

// scrape is what the agent answers to Prometheus, by series, without what Go and the process say, and without buckets.
func scrape(t *testing.T, m *metrics) map[string]string {
	t.Helper()
	return scrapeOf(t, m.registry)
}

func scrapeOf(t *testing.T, registry *prometheus.Registry) map[string]string {
	t.Helper()
	out := map[string]string{}
	for line := range strings.Lines(scraped(t, registry)) {
		series, value, ok := strings.Cut(strings.TrimSpace(line), " ")
		if ok && ourSeries(series) && !strings.Contains(series, "_bucket{") {
			out[series] = value
		}
	}
	return out
}

func scraped(t *testing.T, registry *prometheus.Registry) string {
	t.Helper()
	r := httptest.NewRecorder()
	metricsHandler(registry).ServeHTTP(r, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	if r.Code != http.StatusOK {
		t.Fatalf("scrape: %d %s", r.Code, r.Body)
	}
	return r.Body.String()
}

func ourSeries(name string) bool {
	return strings.HasPrefix(name, "kubeproxy_") || strings.HasPrefix(name, "longshore_") || strings.HasPrefix(name, "metallb_")
}

// changed is what is in one scrape and was not in the other, or is another value.
func changed(before, after map[string]string) map[string]string {
	out := maps.Clone(after)
	for k, v := range before {
		if out[k] == v {
			delete(out, k)
		}
	}
	return out
}

// TestMetricsOfPasses gives metrics one pass after the other and looks at what each changes.
func TestMetricsOfPasses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMetrics(NewInbox())
		first := ipvs.At(ipvs.TCP, netip.MustParseAddrPort("192.0.2.1:80"))
		second := ipvs.At(ipvs.TCP, netip.MustParseAddrPort("192.0.2.2:80"))
		one, two := netip.MustParseAddrPort("10.1.1.1:8080"), netip.MustParseAddrPort("10.1.1.2:8080")
		server := func(v ipvs.Verb, f ipvs.Frontend) ipvs.Operation {
			return ipvs.Operation{Verb: v, Kind: ipvs.KindVirtualServer, VirtualServer: ipvs.VirtualServer{Frontend: f, Scheduler: "rr"}}
		}
		real := func(v ipvs.Verb, f ipvs.Frontend, r netip.AddrPort) ipvs.Operation {
			return ipvs.Operation{Verb: v, Kind: ipvs.KindRealServer, VirtualServer: ipvs.VirtualServer{Frontend: f}, RealServer: ipvs.RealServer{Addr: r, Weight: 1}}
		}
		slice := func(trigger time.Duration) change {
			s := &discoveryv1.EndpointSlice{}
			s.Namespace, s.Name = "default", "web-1"
			if trigger != 0 {
				s.Annotations = map[string]string{corev1.EndpointsLastChangeTriggerTime: time.Now().Add(-trigger).Format(time.RFC3339Nano)}
			}
			return change{slice: newEndpointSlice(s), arrived: time.Now().Add(-3 * time.Millisecond)}
		}
		was := scrape(t, m)
		expect := func(what string, p passed, want map[string]string) {
			t.Helper()
			p.began = time.Now().Add(-2 * time.Millisecond)
			p.applied, p.ended = time.Now(), time.Now()
			pass(m, p)
			now := scrape(t, m)
			got := changed(was, now)
			was = now
			for name, value := range got { // a gauge is compared with the time of now
				if strings.HasSuffix(name, "_timestamp_seconds") && value == fmt.Sprint(unixSeconds(time.Now())) {
					got[name] = "now"
				}
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("%s (-want +got):\n%s", what, diff)
			}
			time.Sleep(time.Second)
		}
		time.Sleep(time.Hour)

		var observed ipvs.State
		observed.AddVirtualServer(ipvs.VirtualServer{Frontend: first, Scheduler: "rr"}, ipvs.RealServer{Addr: one, Weight: 1})
		expect("the first pass", passed{
			full: true, observed: observed, changes: []change{{object: &corev1.Service{}}, slice(2 * time.Hour)},
			ops:      []ipvs.Operation{server(ipvs.Add, second), real(ipvs.Add, first, two), real(ipvs.Add, second, one), real(ipvs.Delete, first, one)},
			services: 2, announced: 1, draining: 3, noLocalInternal: 4, noLocalExternal: 5,
		}, map[string]string{
			"kubeproxy_sync_proxy_rules_duration_seconds_count":                                    "1",
			"kubeproxy_sync_proxy_rules_duration_seconds_sum":                                      "0.002",
			"kubeproxy_sync_full_proxy_rules_duration_seconds_count":                               "1",
			"kubeproxy_sync_full_proxy_rules_duration_seconds_sum":                                 "0.002",
			"kubeproxy_sync_proxy_rules_last_timestamp_seconds":                                    "now",
			"kubeproxy_sync_proxy_rules_endpoint_changes_total":                                    "1",
			"kubeproxy_sync_proxy_rules_service_changes_total":                                     "1",
			`kubeproxy_sync_proxy_rules_no_local_endpoints_total{traffic_policy="internal"}`:       "4",
			`kubeproxy_sync_proxy_rules_no_local_endpoints_total{traffic_policy="external"}`:       "5",
			"longshore_endpoint_to_kernel_seconds_count":                                           "1",
			"longshore_endpoint_to_kernel_seconds_sum":                                             "0.003",
			`longshore_kernel_operations_total{kind="virtual_server",operation="add",result="ok"}`: "1",
			`longshore_kernel_operations_total{kind="real_server",operation="add",result="ok"}`:    "2",
			`longshore_kernel_operations_total{kind="real_server",operation="delete",result="ok"}`: "1",
			"longshore_services":              "2",
			"longshore_announced_addresses":   "1",
			"longshore_virtual_servers":       "2",
			"longshore_real_servers":          "2",
			"longshore_draining_real_servers": "3",
		})

		failure := func(o ipvs.Operation, err error) ipvs.Failure {
			return ipvs.Failure{Operation: o, Err: fmt.Errorf("%s: %w", o, err)}
		}
		expect("a change that is refused in part", passed{
			changes: []change{slice(time.Minute)},
			ops:     []ipvs.Operation{real(ipvs.Add, second, two), real(ipvs.Add, first, one)}, failures: []ipvs.Failure{failure(real(ipvs.Add, first, one), errors.New("no"))},
			services: 2, announced: 1, drainedEmpty: 1, drainedTimeout: 2, drainedGone: 3,
		}, map[string]string{
			"kubeproxy_sync_proxy_rules_duration_seconds_count":                                     "2",
			"kubeproxy_sync_proxy_rules_duration_seconds_sum":                                       "0.004",
			"kubeproxy_sync_partial_proxy_rules_duration_seconds_count":                             "1",
			"kubeproxy_sync_partial_proxy_rules_duration_seconds_sum":                               "0.002",
			"kubeproxy_network_programming_duration_seconds_count":                                  "1",
			"kubeproxy_network_programming_duration_seconds_sum":                                    "60",
			"kubeproxy_sync_proxy_rules_endpoint_changes_total":                                     "2",
			`kubeproxy_sync_proxy_rules_no_local_endpoints_total{traffic_policy="internal"}`:        "0",
			`kubeproxy_sync_proxy_rules_no_local_endpoints_total{traffic_policy="external"}`:        "0",
			"longshore_endpoint_to_kernel_seconds_count":                                            "2",
			"longshore_endpoint_to_kernel_seconds_sum":                                              "0.006",
			`longshore_kernel_operations_total{kind="real_server",operation="add",result="ok"}`:     "3",
			`longshore_kernel_operations_total{kind="real_server",operation="add",result="failed"}`: "1",
			"longshore_real_servers":                                                                "3",
			"longshore_draining_real_servers":                                                       "0",
			`longshore_drained_total{reason="empty"}`:                                               "1",
			`longshore_drained_total{reason="timeout"}`:                                             "2",
			`longshore_drained_total{reason="gone"}`:                                                "3",
		})

		expect("a kernel that cannot be read, with a change that has to wait", passed{
			full: true, err: errors.New("no"), changes: []change{slice(time.Minute)}, expected: []ipvs.Operation{server(ipvs.Update, second)},
		}, map[string]string{
			"kubeproxy_sync_proxy_rules_duration_seconds_count":      "3",
			"kubeproxy_sync_proxy_rules_duration_seconds_sum":        "0.006",
			"kubeproxy_sync_full_proxy_rules_duration_seconds_count": "2",
			"kubeproxy_sync_full_proxy_rules_duration_seconds_sum":   "0.004",
			"kubeproxy_sync_proxy_rules_endpoint_changes_total":      "3",
		})

		observed = ipvs.State{} // somebody removed the first virtual server
		observed.AddVirtualServer(ipvs.VirtualServer{Frontend: second}, ipvs.RealServer{Addr: one, Weight: 1}, ipvs.RealServer{Addr: two, Weight: 1})
		third := ipvs.At(ipvs.TCP, netip.MustParseAddrPort("192.0.2.3:80"))
		ops := []ipvs.Operation{
			server(ipvs.Add, first), real(ipvs.Add, first, two), // repairs
			real(ipvs.Add, first, one),                          // failed before
			server(ipvs.Update, second),                         // had to wait
			server(ipvs.Add, third), real(ipvs.Add, third, one), // expected, and somebody else's
		}
		expect("what was left is made up for", passed{
			full: true, observed: observed, ops: ops, expected: ops[4:], services: 3, announced: 1,
			failures: []ipvs.Failure{failure(ops[4], ipvs.ErrForeign), failure(ops[5], ipvs.ErrForeign)},
		}, map[string]string{
			"kubeproxy_sync_proxy_rules_duration_seconds_count":                                        "4",
			"kubeproxy_sync_proxy_rules_duration_seconds_sum":                                          "0.008",
			"kubeproxy_sync_full_proxy_rules_duration_seconds_count":                                   "3",
			"kubeproxy_sync_full_proxy_rules_duration_seconds_sum":                                     "0.006",
			"kubeproxy_sync_proxy_rules_last_timestamp_seconds":                                        "now",
			"kubeproxy_network_programming_duration_seconds_count":                                     "2",
			"kubeproxy_network_programming_duration_seconds_sum":                                       "121",
			"longshore_endpoint_to_kernel_seconds_count":                                               "3",
			"longshore_endpoint_to_kernel_seconds_sum":                                                 "1.009",
			`longshore_audit_repairs_total{kind="virtual_server"}`:                                     "1",
			`longshore_audit_repairs_total{kind="real_server"}`:                                        "1",
			`longshore_kernel_operations_total{kind="virtual_server",operation="add",result="ok"}`:     "2",
			`longshore_kernel_operations_total{kind="virtual_server",operation="update",result="ok"}`:  "1",
			`longshore_kernel_operations_total{kind="virtual_server",operation="add",result="failed"}`: "1",
			`longshore_kernel_operations_total{kind="real_server",operation="add",result="ok"}`:        "5",
			`longshore_kernel_operations_total{kind="real_server",operation="add",result="failed"}`:    "2",
			"longshore_services":                "3",
			"longshore_real_servers":            "4",
			"longshore_foreign_virtual_servers": "1",
		})

		expect("a Service goes, and with its virtual server its real servers", passed{
			ops: []ipvs.Operation{server(ipvs.Delete, second)}, services: 2, announced: 1,
		}, map[string]string{
			"kubeproxy_sync_proxy_rules_duration_seconds_count":                                       "5",
			"kubeproxy_sync_proxy_rules_duration_seconds_sum":                                         "0.01",
			"kubeproxy_sync_partial_proxy_rules_duration_seconds_count":                               "2",
			"kubeproxy_sync_partial_proxy_rules_duration_seconds_sum":                                 "0.004",
			"kubeproxy_sync_proxy_rules_last_timestamp_seconds":                                       "now",
			`longshore_kernel_operations_total{kind="virtual_server",operation="delete",result="ok"}`: "1",
			"longshore_services":                "2",
			"longshore_virtual_servers":         "1",
			"longshore_real_servers":            "2",
			"longshore_foreign_virtual_servers": "0",
		})

		observed = ipvs.State{} // somebody made the second one again, and removed the first, which nobody wants any more
		observed.AddVirtualServer(ipvs.VirtualServer{Frontend: second}, ipvs.RealServer{Addr: one, Weight: 1})
		fourth := ipvs.At(ipvs.TCP, netip.MustParseAddrPort("192.0.2.4:80"))
		ops = []ipvs.Operation{server(ipvs.Add, fourth), real(ipvs.Add, fourth, one), server(ipvs.Delete, second)}
		expect("a comparison with the kernel together with a change", passed{
			full: true, observed: observed, ops: ops, expected: []ipvs.Operation{ops[0], ops[1], server(ipvs.Delete, first)}, services: 2, announced: 1,
		}, map[string]string{
			"kubeproxy_sync_proxy_rules_duration_seconds_count":                                       "6",
			"kubeproxy_sync_proxy_rules_duration_seconds_sum":                                         "0.012",
			"kubeproxy_sync_full_proxy_rules_duration_seconds_count":                                  "4",
			"kubeproxy_sync_full_proxy_rules_duration_seconds_sum":                                    "0.008",
			"kubeproxy_sync_proxy_rules_last_timestamp_seconds":                                       "now",
			`longshore_audit_repairs_total{kind="virtual_server"}`:                                    "2",
			`longshore_kernel_operations_total{kind="virtual_server",operation="add",result="ok"}`:    "3",
			`longshore_kernel_operations_total{kind="virtual_server",operation="delete",result="ok"}`: "2",
			`longshore_kernel_operations_total{kind="real_server",operation="add",result="ok"}`:       "6",
			"longshore_real_servers": "1",
		})
	})
}

// TestMetricsOfAgent scrapes a running agent.
func TestMetricsOfAgent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, inbox := newMachine(t, "n1"), NewInbox()
		a := m.start(inbox, nil)
		defer a.stop()
		time.Sleep(time.Minute)
		site(t, inbox)
		putAll(t, inbox, service("web", "192.0.2.1", 80, "")+"---"+endpoints("web", true)+"---"+service("idle", "192.0.2.2", 80, ""))
		expect := func(when string, want map[string]string) {
			t.Helper()
			all, got := scrape(t, a.metrics), map[string]string{}
			for name := range want {
				got[name] = all[name]
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("%s (-want +got):\n%s", when, diff)
			}
		}
		now := func(plus time.Duration) string { return fmt.Sprint(unixSeconds(time.Now().Add(plus))) }
		expect("before the first pass", map[string]string{
			"kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds": now(0),
			"kubeproxy_sync_proxy_rules_last_timestamp_seconds":        "0",
			"kubeproxy_sync_proxy_rules_endpoint_changes_pending":      "1",
			"kubeproxy_sync_proxy_rules_service_changes_pending":       "2",
			"kubeproxy_sync_proxy_rules_service_changes_total":         "0",
			"kubeproxy_sync_proxy_rules_duration_seconds_count":        "0",
		})
		time.Sleep(30 * time.Second)
		putAll(t, inbox, endpoints("web", true)) // once more, before anybody has looked
		synctest.Wait()
		inbox.Synced()
		synctest.Wait()
		expect("after it", map[string]string{
			"kubeproxy_sync_proxy_rules_endpoint_changes_pending":    "0",
			"kubeproxy_sync_proxy_rules_service_changes_pending":     "0",
			"kubeproxy_sync_proxy_rules_endpoint_changes_total":      "1",
			"kubeproxy_sync_proxy_rules_service_changes_total":       "2",
			"kubeproxy_sync_full_proxy_rules_duration_seconds_count": "1",
			"longshore_endpoint_to_kernel_seconds_count":             "1",
			"longshore_endpoint_to_kernel_seconds_sum":               "0", // as long as the first list was not whole, nobody waited
			"longshore_services":                                     "2",
			"longshore_announced_addresses":                          "2",
			"longshore_virtual_servers":                              "2",
			"longshore_real_servers":                                 "1",
			`longshore_audit_repairs_total{kind="virtual_server"}`:   "0",
		})
		wakes := make(chan struct{})
		m.set(func() { m.refuse = func(ipvs.Operation) error { <-wakes; return nil } })
		putAll(t, inbox, endpoints("idle", true))
		time.Sleep(time.Second)
		putAll(t, inbox, endpoints("web", true))
		time.Sleep(time.Second)
		putAll(t, inbox, endpoints("web", true))
		time.Sleep(time.Second)
		expect("while the kernel hangs", map[string]string{
			"kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds": now(-time.Second),
			"kubeproxy_sync_proxy_rules_last_timestamp_seconds":        now(-3 * time.Second),
			"kubeproxy_sync_proxy_rules_endpoint_changes_pending":      "1",
			"longshore_endpoint_to_kernel_seconds_count":               "1",
		})
		close(wakes)
		synctest.Wait()
		expect("after two changes", map[string]string{
			"kubeproxy_sync_proxy_rules_last_timestamp_seconds":         now(0),
			"kubeproxy_sync_full_proxy_rules_duration_seconds_count":    "1",
			"kubeproxy_sync_partial_proxy_rules_duration_seconds_count": "2",
			"kubeproxy_sync_partial_proxy_rules_duration_seconds_sum":   "3",
			"kubeproxy_sync_proxy_rules_endpoint_changes_total":         "3",
			"kubeproxy_sync_proxy_rules_endpoint_changes_pending":       "0",
			"longshore_endpoint_to_kernel_seconds_count":                "3",
			"longshore_endpoint_to_kernel_seconds_sum":                  "5", // three seconds, and two from the first of two changes
			"longshore_real_servers":                                    "2",
		})
		m.set(func() { // somebody removes an element, and something fails, which makes the agent look at the kernel
			for e := range m.state.Elements {
				if e.Set == ipvs.Masquerade && e.Frontend.Addr.Addr() == ip("192.0.2.2") {
					delete(m.state.Elements, e)
				}
			}
			m.refuse = func(ipvs.Operation) error { return errors.New("no") }
		})
		putAll(t, inbox, endpoints("web", false))
		synctest.Wait()
		m.set(func() { m.refuse = nil })
		time.Sleep(retryAfter)
		synctest.Wait()
		expect("after a repair", map[string]string{
			`longshore_audit_repairs_total{kind="element"}`:                                            "1",
			`longshore_audit_repairs_total{kind="real_server"}`:                                        "0",
			`longshore_kernel_operations_total{kind="element",operation="add",result="ok"}`:            "7",
			`longshore_kernel_operations_total{kind="real_server",operation="update",result="failed"}`: "1", // to weight 0
			`longshore_kernel_operations_total{kind="real_server",operation="delete",result="ok"}`:     "1",
			"longshore_virtual_servers": "2",
			"longshore_real_servers":    "1",
		})
	})
}

// TestMetricsDocumented compares the table in docs/operations.md with what is registered: name, type, labels.
func TestMetricsDocumented(t *testing.T) {
	m := newMetrics(NewInbox())
	m.layer2(toLayer2{})
	m.registry.MustRegister(bfdMetrics{func() []bgp.Session { return []bgp.Session{{BFD: &bfd.Status{}}} }})
	pass(m, passed{ops: []ipvs.Operation{{Verb: ipvs.Add, Kind: ipvs.KindRoute}}}) // so that every metric has a series

	m.registry.MustRegister(newSessionMetrics(toBGP{&machine{speaker: bgp.Config{Peers: []bgp.Peer{{Name: "tor"}}}}}))
	allocator := newAllocatorMetrics()
	allocator.pools(map[string]PoolCounts{"red": {}})

	types := map[string]string{}
	for _, registry := range []*prometheus.Registry{m.registry, allocator.registry} {
		for _, match := range regexp.MustCompile(`(?m)^# TYPE (\S+) (\S+)$`).FindAllStringSubmatch(scraped(t, registry), -1) {
			types[match[1]] = match[2]
		}
	}
	descs := make(chan *prometheus.Desc)
	go func() {
		m.registry.Describe(descs)
		allocator.registry.Describe(descs)
		close(descs)
	}()
	registered := map[string]string{} // to type and labels
	form := regexp.MustCompile(`^Desc\{fqName: "([^"]+)", .* variableLabels: \{(.*)\}\}$`)
	for d := range descs {
		match := form.FindStringSubmatch(d.String())
		if match == nil {
			t.Fatalf("unknown form of %s", d)
		}
		if ourSeries(match[1]) {
			registered[match[1]] = types[match[1]] + " " + match[2]
		}
	}

	page, err := os.ReadFile("../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	documented := map[string]string{}
	quoted := regexp.MustCompile("`([^`]+)`")
	for line := range strings.Lines(string(page)) {
		cells := strings.Split(strings.Trim(line, "| \n"), "|")
		name := strings.Trim(cells[0], "` ")
		if !strings.HasPrefix(line, "| `") || !ourSeries(name) {
			continue
		}
		if len(cells) != 4 {
			t.Fatalf("%d cells instead of 4: %s", len(cells), line)
		}
		var labels []string
		for _, match := range quoted.FindAllStringSubmatch(cells[2], -1) {
			labels = append(labels, match[1])
		}
		documented[name] = strings.TrimSpace(cells[1]) + " " + strings.Join(labels, ",")
	}
	if diff := cmp.Diff(registered, documented); diff != "" {
		t.Errorf("docs/operations.md (-registered +documented):\n%s", diff)
	}
}

// TestMetricsAfterRestart starts an agent on a kernel that has everything already.
func TestMetricsAfterRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMachine(t, "n1")
		for _, when := range []string{"at the first start", "at the second start"} {
			inbox := NewInbox()
			a := m.start(inbox, nil)
			site(t, inbox)
			putAll(t, inbox, service("web", "192.0.2.1", 80, "")+"---"+endpoints("web", true)+"---"+service("idle", "192.0.2.2", 80, ""))
			inbox.Synced()
			synctest.Wait()
			all := scrape(t, a.metrics)
			a.stop()
			if got := [2]string{all["longshore_virtual_servers"], all["longshore_real_servers"]}; got != [2]string{"2", "1"} {
				t.Errorf("%s: %s virtual servers and %s real servers counted, want 2 and 1", when, got[0], got[1])
			}
		}
	})
}

// pass does what the agent's loop does about a pass.
func pass(m *metrics, p passed) {
	if p.err == nil {
		if p.full {
			m.found(p.observed)
		}
		m.count(p.ops, p.failures)
	}
	m.passed(p)
}

// TestMetricsOfSessions has the sessions of a speaker among the metrics of an agent.
func TestMetricsOfSessions(t *testing.T) {
	registry := prometheus.NewRegistry()
	registry.MustRegister(newSessionMetrics(sessions{
		{Address: netip.MustParseAddr("192.0.2.1"), State: "established", Advertised: 3, Updates: 5},
		{Interface: "eth0", Device: "red", State: "active", Updates: 2},
	}))
	want := map[string]string{
		`metallb_bgp_session_up{peer="192.0.2.1",vrf=""}`:               "1",
		`metallb_bgp_updates_total{peer="192.0.2.1",vrf=""}`:            "5",
		`metallb_bgp_announced_prefixes_total{peer="192.0.2.1",vrf=""}`: "3",
		`metallb_bgp_session_up{peer="eth0",vrf="red"}`:                 "0",
		`metallb_bgp_updates_total{peer="eth0",vrf="red"}`:              "2",
		`metallb_bgp_announced_prefixes_total{peer="eth0",vrf="red"}`:   "0",
	}
	if diff := cmp.Diff(want, scrapeOf(t, registry)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// sessions is a Speaker that has these.
type sessions []bgp.Session

func (s sessions) Set(bgp.Config)          {}
func (s sessions) Sessions() []bgp.Session { return s }

// TestMetricsOfPools follows the counts of pools.
func TestMetricsOfPools(t *testing.T) {
	m := newAllocatorMetrics()
	m.pools(map[string]PoolCounts{"red": {AssignedIPv4: 1, AssignedIPv6: 2, AvailableIPv4: 3, AvailableIPv6: 4}, "blue": {AvailableIPv6: math.MaxInt64}})
	want := map[string]string{
		`metallb_allocator_addresses_in_use_total{pool="red"}`: "3", `metallb_allocator_addresses_total{pool="red"}`: "10",
		`metallb_allocator_addresses_in_use_total{pool="blue"}`: "0", `metallb_allocator_addresses_total{pool="blue"}`: "9.223372036854776e+18",
	}
	if diff := cmp.Diff(want, scrapeOf(t, m.registry)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	m.pools(nil)
	if got := scrapeOf(t, m.registry); len(got) > 0 {
		t.Errorf("left when all pools are gone: %v", got)
	}
}
