package controller

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/types"
)

var (
	web = types.NamespacedName{Namespace: "default", Name: "web"}
	api = types.NamespacedName{Namespace: "default", Name: "api"}
)

// checked is what a load balancer hears on a health check node port.
type checked struct {
	Status   int
	Weight   string
	Endpoint int
	Healthy  bool
}

// check asks for the health of Service default/web.
func check(t *testing.T, host string, port uint16) checked {
	t.Helper()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	response, err := client.Get(fmt.Sprintf("http://%s/whatever/path", netip.AddrPortFrom(ip(host), port)))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = response.Body.Close() }()
	content, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	var body struct {
		Service             map[string]string
		LocalEndpoints      int
		ServiceProxyHealthy bool
	}
	if err := json.Unmarshal(content, &body); err != nil {
		t.Fatalf("%s: %v", content, err)
	}
	if diff := cmp.Diff(map[string]string{"namespace": "default", "name": "web"}, body.Service); diff != "" {
		t.Errorf("service of %s (-want +got):\n%s", content, diff)
	}
	if h := response.Header; h.Get("Content-Type") != "application/json" || h.Get("X-Content-Type-Options") != "nosniff" {
		t.Errorf("header %v", h)
	}
	return checked{response.StatusCode, response.Header.Get("X-Load-Balancing-Endpoint-Weight"), body.LocalEndpoints, body.ServiceProxyHealthy}
}

// closed fails if something listens.
func closed(t *testing.T, host string, port uint16) {
	t.Helper()
	c, err := net.Dial("tcp", netip.AddrPortFrom(ip(host), port).String())
	if err == nil {
		_ = c.Close()
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("%s port %d: %v, want it closed", host, port, err)
	}
}

// replaceAnywhere gives a Service a port that is free on this machine.
func replaceAnywhere(t *testing.T, h *HealthChecks, name types.NamespacedName, localEndpoints int) uint16 {
	t.Helper()
	for {
		l, err := net.Listen("tcp", ":0")
		if err != nil {
			t.Fatal(err)
		}
		port := l.Addr().(*net.TCPAddr).AddrPort().Port()
		_ = l.Close()
		err = h.Replace(name, port, localEndpoints)
		if err == nil {
			return port
		}
		if !errors.Is(err, syscall.EADDRINUSE) { // else somebody else was faster
			t.Fatal(err)
		}
	}
}

func replace(t *testing.T, h *HealthChecks, name types.NamespacedName, port uint16, localEndpoints int) {
	t.Helper()
	if err := h.Replace(name, port, localEndpoints); err != nil {
		t.Error(err)
	}
}

// TestHealthChecks asks a Service's port while its endpoints, its port and the health of the agent change.
func TestHealthChecks(t *testing.T) {
	var healthy atomic.Bool
	healthy.Store(true)
	h := NewHealthChecks(slog.New(slog.DiscardHandler), healthy.Load)
	port := replaceAnywhere(t, h, web, 2)
	for _, host := range []string{"127.0.0.1", "::1"} {
		if got := check(t, host, port); got != (checked{200, "2", 2, true}) {
			t.Errorf("two local endpoints, asked at %s: %+v", host, got)
		}
	}
	replace(t, h, web, port, 0)
	if got := check(t, "127.0.0.1", port); got != (checked{503, "0", 0, true}) {
		t.Errorf("no local endpoint: %+v", got)
	}
	replace(t, h, web, port, 1)
	if got := check(t, "127.0.0.1", port); got != (checked{200, "1", 1, true}) {
		t.Errorf("one again: %+v", got)
	}
	healthy.Store(false)
	if got := check(t, "127.0.0.1", port); got != (checked{503, "1", 1, false}) {
		t.Errorf("the agent is not healthy: %+v", got)
	}
	healthy.Store(true)

	second := replaceAnywhere(t, h, web, 1)
	closed(t, "127.0.0.1", port)
	if got := check(t, "127.0.0.1", second); got != (checked{200, "1", 1, true}) {
		t.Errorf("at another port: %+v", got)
	}
	asking, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", second))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = asking.Close() }()
	if _, err := io.WriteString(asking, "GET / HTTP/1.1\r\nHost: web\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	answers := bufio.NewReader(asking)
	if first, err := http.ReadResponse(answers, nil); err != nil {
		t.Fatal(err)
	} else if _, err := io.Copy(io.Discard, first.Body); err != nil {
		t.Fatal(err)
	}
	replace(t, h, web, 0, 0)
	if err := asking.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	if _, err := answers.ReadByte(); !errors.Is(err, io.EOF) {
		t.Errorf("a connection that was kept open: %v, want its end", err)
	}
	closed(t, "127.0.0.1", second)
	closed(t, "::1", second)
	replace(t, h, web, 0, 0) // of a Service that has none already

	third := replaceAnywhere(t, h, web, 1)
	fourth := replaceAnywhere(t, h, api, 1)
	h.Close()
	closed(t, "127.0.0.1", third)
	closed(t, "127.0.0.1", fourth)
}

// TestHealthCheckPortTaken has another program hold the port at first, and then another Service.
func TestHealthCheckPortTaken(t *testing.T) {
	h := NewHealthChecks(slog.New(slog.DiscardHandler), func() bool { return true })
	defer h.Close()
	other, err := net.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	port := other.Addr().(*net.TCPAddr).AddrPort().Port()
	err = h.Replace(web, port, 1)
	if want := fmt.Sprintf("Service default/web: spec.healthCheckNodePort: %d: listen tcp :%[1]d: bind: address already in use", port); err == nil || err.Error() != want {
		t.Fatalf("error %v, want %s", err, want)
	}
	if err := other.Close(); err != nil {
		t.Fatal(err)
	}
	replace(t, h, web, port, 3)
	if got := check(t, "127.0.0.1", port); got != (checked{200, "3", 3, true}) {
		t.Errorf("once the port is free: %+v", got)
	}

	if err := h.Replace(api, port, 1); err == nil || !strings.Contains(err.Error(), "Service default/api: spec.healthCheckNodePort: ") {
		t.Errorf("error %v for a port that another Service has", err)
	}
	if got := check(t, "127.0.0.1", port); got != (checked{200, "3", 3, true}) {
		t.Errorf("of the Service that had the port first: %+v", got)
	}
	replace(t, h, api, 0, 0)
	if got := check(t, "127.0.0.1", port); got != (checked{200, "3", 3, true}) {
		t.Errorf("when the other one is gone: %+v", got)
	}
}

// TestHealthCheckAddresses changes the addresses while a Service is being asked about.
func TestHealthCheckAddresses(t *testing.T) {
	h := NewHealthChecks(slog.New(slog.DiscardHandler), func() bool { return true })
	defer h.Close()
	port := replaceAnywhere(t, h, web, 1)
	ok := checked{200, "1", 1, true}
	expect := func(when string, open, shut []string) {
		t.Helper()
		for _, host := range open {
			if got := check(t, host, port); got != ok {
				t.Errorf("%s, at %s: %+v", when, host, got)
			}
		}
		for _, host := range shut {
			closed(t, host, port)
		}
	}
	set := func(texts ...string) error { return h.Addresses(addrs(texts...)) }
	expect("at every address", []string{"127.0.0.1", "127.0.0.2", "::1"}, nil)
	if err := set("127.0.0.2", "::1"); err != nil {
		t.Error(err)
	}
	expect("at two", []string{"127.0.0.2", "::1"}, []string{"127.0.0.1"})
	err := set("127.0.0.1", "192.0.2.77", "::1")
	if want := fmt.Sprintf("Service default/web: spec.healthCheckNodePort: %d: listen tcp 192.0.2.77:%[1]d: bind: cannot assign requested address", port); err == nil || err.Error() != want {
		t.Errorf("error %v, want %s", err, want)
	}
	expect("one of them is not this machine's", []string{"127.0.0.1", "::1"}, []string{"127.0.0.2"})
	if err := h.Replace(web, port, 1); !errors.Is(err, syscall.EADDRNOTAVAIL) {
		t.Errorf("error %v, want that it is tried again and fails again", err)
	}
	if err := set(); err != nil {
		t.Error(err)
	}
	expect("at none", nil, []string{"127.0.0.1", "127.0.0.2", "::1"})
	replace(t, h, web, port, 1)
	expect("at none still", nil, []string{"127.0.0.1"})
	if err := set("::"); err != nil {
		t.Error(err)
	}
	expect("at every address again", []string{"127.0.0.1", "127.0.0.2", "::1"}, nil)
}

// TestHealthCheckOf counts the endpoints of node n1.
func TestHealthCheckOf(t *testing.T) {
	svc := &corev1.Service{Spec: corev1.ServiceSpec{
		Type: corev1.ServiceTypeLoadBalancer, ExternalTrafficPolicy: corev1.ServiceExternalTrafficPolicyLocal, HealthCheckNodePort: 30100,
	}}
	slice := func(family discoveryv1.AddressType, endpoints ...discoveryv1.Endpoint) *endpointSlice {
		return newEndpointSlice(&discoveryv1.EndpointSlice{AddressType: family, Endpoints: endpoints})
	}
	at := func(node, addr string, ready *bool) discoveryv1.Endpoint {
		return discoveryv1.Endpoint{Addresses: []string{addr}, NodeName: &node, Conditions: discoveryv1.EndpointConditions{Ready: ready}}
	}
	yes, no := true, false
	nobody := at("", "10.1.1.9", &yes)
	nobody.NodeName = nil
	all := []*endpointSlice{
		slice(discoveryv1.AddressTypeIPv4, at("n1", "10.1.1.1", &yes), at("n1", "10.1.1.2", nil), at("n1", "10.1.1.3", &no), at("n2", "10.1.2.1", &yes), nobody),
		slice(discoveryv1.AddressTypeIPv4, at("n1", "10.1.1.1", &yes)), // of another port
		slice(discoveryv1.AddressTypeIPv6, at("n1", "fd01::1", &yes)),
	}
	if port, local := healthCheckOf(svc, all, "n1"); port != 30100 || local != 2 {
		t.Errorf("port %d, %d endpoints; want 30100, 2", port, local)
	}
	if port, local := healthCheckOf(svc, all, "n3"); port != 30100 || local != 0 {
		t.Errorf("on another node: port %d, %d endpoints; want 30100, 0", port, local)
	}
	cluster := svc.DeepCopy()
	cluster.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyCluster
	if port, _ := healthCheckOf(cluster, all, "n1"); port != 0 {
		t.Errorf("port %d of a Service of policy Cluster", port)
	}
}

// TestHealthChecksOfAgent has an agent serve a Service's port, which another program holds at first.
func TestHealthChecksOfAgent(t *testing.T) {
	m, inbox := newMachine(t, "n1"), NewInbox()
	a := m.start(inbox, nil)
	defer a.stop()
	other, err := net.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	port := other.Addr().(*net.TCPAddr).AddrPort().Port()
	local := func(name string, port uint16) string {
		return fmt.Sprintf(`
apiVersion: v1
kind: Service
metadata: {name: %s}
spec: {type: LoadBalancer, externalTrafficPolicy: Local, healthCheckNodePort: %d, ports: [{port: 80}]}
`, name, port)
	}
	on := func(node string) string {
		return strings.ReplaceAll(endpoints("web", true), "addresses:", "nodeName: "+node+", addresses:")
	}
	// passed returns the problems after a pass about what was put before: the loop answers between passes.
	passed := func() []string {
		t.Helper()
		for {
			endpointSlices, services := inbox.waiting()
			s, err := a.Status(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if endpointSlices+services == 0 {
				return s.Problems
			}
		}
	}
	site(t, inbox)
	putAll(t, inbox, local("web", port)+"---"+on("n1"))
	inbox.Synced()
	want := fmt.Sprintf("Service default/web: spec.healthCheckNodePort: %d: listen tcp :%[1]d: bind: address already in use", port)
	if got := passed(); !slices.Contains(got, want) {
		t.Errorf("problems %q, want %q among them", got, want)
	}
	if err := other.Close(); err != nil {
		t.Fatal(err)
	}
	putAll(t, inbox, service("other", "192.0.2.9", 80, "")) // a pass about something else
	if got := passed(); slices.Contains(got, want) {
		t.Errorf("problems %q, with one that is over", got)
	}
	if got := check(t, "127.0.0.1", port); got != (checked{200, "1", 1, true}) {
		t.Errorf("an endpoint on this node: %+v", got)
	}
	putAll(t, inbox, on("n2"))
	passed()
	if got := check(t, "127.0.0.1", port); got != (checked{503, "0", 0, true}) {
		t.Errorf("an endpoint on another node: %+v", got)
	}
	inbox.Remove(objects(t, local("web", port))[0])
	passed()
	closed(t, "127.0.0.1", port)
	putAll(t, inbox, local("web", port)+"---"+on("n1"))
	passed()
	if got := check(t, "127.0.0.1", port); got != (checked{200, "1", 1, true}) {
		t.Errorf("the Service is back: %+v", got)
	}
	a.stop()
	closed(t, "127.0.0.1", port)
}
