package controller

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/longshore-lb/longshore/announcer"
	"github.com/longshore-lb/longshore/announcer/bgp"
	"github.com/longshore-lb/longshore/config"
	"github.com/longshore-lb/longshore/ipvs"
)

// nowhere is a kernel and a network that do nothing, at once: what is left is the agent's own work.
type nowhere struct{ operations int }

func (*nowhere) Prepare() error               { return nil }
func (*nowhere) Observe() (ipvs.State, error) { return ipvs.State{}, nil }
func (*nowhere) Intact() bool                 { return true }
func (n *nowhere) Apply(ops []ipvs.Operation) []ipvs.Failure {
	n.operations += len(ops)
	return nil
}
func (*nowhere) Connections([]ipvs.Frontend) (map[ipvs.Frontend]map[netip.AddrPort]int, error) {
	return nil, nil
}
func (*nowhere) PortInUse(ipvs.Protocol, uint16) bool { return false }
func (*nowhere) Answering(netip.Addr) bool            { return false }
func (*nowhere) Set([]announcer.Address)              {}

func (*nowhere) Links() []announcer.Link                        { return nil }
func (*nowhere) Changed() <-chan struct{}                       { return nil }
func (*nowhere) Conflicts() <-chan announcer.Conflict           { return nil }
func (*nowhere) Announcements() map[announcer.Gratuitous]uint64 { return nil }
func (*nowhere) Answers() map[string]uint64                     { return nil }

type nobody struct{}

func (nobody) Set(bgp.Config)          {}
func (nobody) Sessions() []bgp.Session { return nil }

const benchmarkEndpoints = 10

// many is an agent that has not begun yet, and the inbox with its Services of 10 endpoints each.
func many(services int) (*Agent, *Inbox, *nowhere) {
	inbox, kernel := NewInbox(), &nowhere{}
	a := NewAgent(AgentOptions{Node: "n1", Config: config.DefaultAgent(), Inbox: inbox, DataPlane: kernel, Layer2: kernel,
		Speaker: nobody{}, Events: LogEvents{slog.New(slog.DiscardHandler)}, Log: slog.New(slog.DiscardHandler)})
	inbox.Put(StandaloneNode("n1", addrs("172.31.0.11")))
	for i := range services {
		svc, _ := numbered(i, 0)
		inbox.Put(svc)
	}
	for i := range services {
		_, slice := numbered(i, 0)
		inbox.Put(slice)
	}
	inbox.Synced()
	return a, inbox, kernel
}

// numbered is Service number i and its endpoints, the last of which has been replaced a number of times.
func numbered(i, replaced int) (*corev1.Service, *discoveryv1.EndpointSlice) {
	meta := metav1.ObjectMeta{Namespace: "default", Name: fmt.Sprintf("service-%05d", i)}
	svc := &corev1.Service{ObjectMeta: meta, Spec: corev1.ServiceSpec{
		ClusterIP: fmt.Sprintf("10.96.%d.%d", i/250, i%250+1), Ports: []corev1.ServicePort{{Port: 80}},
	}}
	port, node := int32(8080), "n2"
	slice := &discoveryv1.EndpointSlice{ObjectMeta: meta, AddressType: discoveryv1.AddressTypeIPv4, Ports: []discoveryv1.EndpointPort{{Port: &port}}}
	slice.Labels = map[string]string{discoveryv1.LabelServiceName: svc.Name}
	for k := range benchmarkEndpoints {
		addr := fmt.Sprintf("10.%d.%d.%d", 128+k, i/250, i%250+1)
		if k == benchmarkEndpoints-1 {
			addr = fmt.Sprintf("10.%d.%d.%d", 200+replaced%2, i/250, i%250+1)
		}
		slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{Addresses: []string{addr}, NodeName: &node})
	}
	return svc, slice
}

func (a *Agent) onePass(b *testing.B) {
	changes, _ := a.Inbox.take()
	if err := a.pass(context.Background(), changes, !a.adopted, false, true); err != nil {
		b.Fatal(err)
	}
}

// BenchmarkColdStart is the agent's own work for its first pass.
func BenchmarkColdStart(b *testing.B) {
	for _, services := range []int{1000, 10_000} {
		b.Run(fmt.Sprint(services), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				b.StopTimer()
				a, _, kernel := many(services)
				b.StartTimer()
				a.onePass(b)
				if kernel.operations < services*benchmarkEndpoints {
					b.Fatalf("%d operations", kernel.operations)
				}
			}
		})
	}
}

// BenchmarkChange is the agent's own work for one endpoint that is replaced, and should not depend on the number of Services.
func BenchmarkChange(b *testing.B) {
	for _, services := range []int{100, 1000, 10_000} {
		b.Run(fmt.Sprint(services), func(b *testing.B) {
			a, inbox, _ := many(services)
			a.onePass(b)
			b.ReportAllocs()
			for i := 1; b.Loop(); i++ {
				_, slice := numbered(7, i)
				inbox.Put(slice)
				a.onePass(b)
			}
		})
	}
}
