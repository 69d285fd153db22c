package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/kubernetes"
)

const (
	namespace   = "bench"
	portName    = "p"
	servicePort = 80
	targetPort  = 8080
	nodePort    = 30080 // of Service 0
	perService  = 10    // endpoints
	maxServices = 50000 // the lab's range of cluster IPs has 65,536
)

// Two addresses are made up for each endpoint; it has one or the other, and a change is from one to the other. Only
// those of Service 0 are pods, which answer.
var (
	firstVIP  = netip.MustParseAddr("10.96.16.0")
	firstFake = [2]netip.Addr{netip.MustParseAddr("10.192.0.0"), netip.MustParseAddr("10.208.0.0")}
)

func plus(a netip.Addr, n int) netip.Addr {
	b := a.As4()
	binary.BigEndian.PutUint32(b[:], binary.BigEndian.Uint32(b[:])+uint32(n))
	return netip.AddrFrom4(b)
}

func vip(service int) netip.Addr          { return plus(firstVIP, service) }
func serviceName(service int) string      { return fmt.Sprintf("svc-%05d", service) }
func frontend(service int) netip.AddrPort { return netip.AddrPortFrom(vip(service), servicePort) }
func fake(service, endpoint, which int) netip.Addr {
	return plus(firstFake[which], service*perService+endpoint)
}

// pair is one endpoint of one Service: what a proxy has to have one real server for.
type pair struct {
	service  int
	endpoint netip.Addr
}

// load is the Services at the API server, and the endpoints they have now.
type load struct {
	client kubernetes.Interface
	pods   [2][]netip.Addr // the addresses of the endpoints of Service 0
	which  [][perService]int
}

// size is the number of Services.
func (l *load) size() int { return len(l.which) }

func (l *load) endpoint(service, i int) netip.Addr {
	which := l.which[service][i]
	if service == 0 {
		return l.pods[which][i]
	}
	return fake(service, i, which)
}

// pairs is what has to be in the kernel now.
func (l *load) pairs() []pair {
	all := make([]pair, 0, l.size()*perService)
	for s := range l.which {
		for i := range perService {
			all = append(all, pair{s, l.endpoint(s, i)})
		}
	}
	return all
}

// grow adds Services until there are so many.
func (l *load) grow(ctx context.Context, size int) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(16)
	for l.size() < size {
		s := l.size()
		l.which = append(l.which, [perService]int{})
		service, slice := l.service(s), l.slice(s)
		group.Go(func() error {
			if _, err := l.client.CoreV1().Services(namespace).Create(ctx, service, metav1.CreateOptions{}); err != nil {
				return fmt.Errorf("create Service %s: %w", service.Name, err)
			}
			if _, err := l.client.DiscoveryV1().EndpointSlices(namespace).Create(ctx, slice, metav1.CreateOptions{}); err != nil {
				return fmt.Errorf("create EndpointSlice %s: %w", slice.Name, err)
			}
			return nil
		})
	}
	return group.Wait()
}

func (l *load) service(s int) *corev1.Service {
	svc := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: serviceName(s), Namespace: namespace},
		Spec: corev1.ServiceSpec{
			Type: corev1.ServiceTypeClusterIP, ClusterIP: vip(s).String(),
			Ports: []corev1.ServicePort{{Name: portName, Protocol: corev1.ProtocolTCP, Port: servicePort, TargetPort: intstr.FromInt32(targetPort)}},
		},
	}
	if s == 0 {
		svc.Spec.Type = corev1.ServiceTypeNodePort
		svc.Spec.Ports[0].NodePort = nodePort
	}
	return svc
}

func (l *load) slice(s int) *discoveryv1.EndpointSlice {
	name, protocol, port, ready := portName, corev1.ProtocolTCP, int32(targetPort), true
	slice := &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{
			Name: serviceName(s), Namespace: namespace,
			Labels: map[string]string{discoveryv1.LabelServiceName: serviceName(s), discoveryv1.LabelManagedBy: "bench"},
		},
		AddressType: discoveryv1.AddressTypeIPv4,
		Ports:       []discoveryv1.EndpointPort{{Name: &name, Protocol: &protocol, Port: &port}},
	}
	for i := range perService {
		slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{
			Addresses:  []string{l.endpoint(s, i).String()},
			Conditions: discoveryv1.EndpointConditions{Ready: &ready},
		})
	}
	return slice
}

// replace gives endpoints of a Service, from to the one before to, their other addresses, in one write. It returns the
// write's resourceVersion.
func (l *load) replace(ctx context.Context, service, from, to int) (string, error) {
	for i := from; i < to; i++ {
		l.which[service][i] = 1 - l.which[service][i]
	}
	written, err := l.client.DiscoveryV1().EndpointSlices(namespace).Update(ctx, l.slice(service), metav1.UpdateOptions{})
	if err != nil {
		return "", fmt.Errorf("update EndpointSlice %s: %w", serviceName(service), err)
	}
	return written.ResourceVersion, nil
}

// other is the address that an endpoint does not have now.
func (l *load) other(service, i int) netip.Addr {
	which := 1 - l.which[service][i]
	if service == 0 {
		return l.pods[which][i]
	}
	return fake(service, i, which)
}
