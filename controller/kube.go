package controller

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"sync/atomic"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	watchapi "k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	clientscheme "k8s.io/client-go/kubernetes/scheme"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"
	"k8s.io/client-go/tools/record"

	"github.com/longshore-lb/longshore/config/v1beta1"
	"github.com/longshore-lb/longshore/config/v1beta2"
)

// Scheme knows every kind that longshore reads.
var Scheme = newScheme()

func newScheme() *runtime.Scheme {
	s := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{clientscheme.AddToScheme, v1beta1.AddToScheme, v1beta2.AddToScheme} {
		if err := add(s); err != nil {
			panic(err) // two types of one kind: a mistake in this program
		}
	}
	return s
}

// Kubernetes is the API server as longshore uses it.
type Kubernetes struct {
	client    kubernetes.Interface
	metadata  metadata.Interface
	v1beta1   rest.Interface // group metallb.io
	v1beta2   rest.Interface
	namespace string
}

// NewKubernetes connects to an API server. namespace is where the objects of group metallb.io are.
func NewKubernetes(c *rest.Config, namespace string) (*Kubernetes, error) {
	k := &Kubernetes{namespace: namespace}
	var err error
	builtIn := rest.CopyConfig(c)
	builtIn.ContentType = runtime.ContentTypeProtobuf // a third of the work of JSON, on both sides
	builtIn.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
	if k.client, err = kubernetes.NewForConfig(builtIn); err != nil {
		return nil, fmt.Errorf("connect to the API server: %w", err)
	}
	if k.metadata, err = metadata.NewForConfig(c); err != nil {
		return nil, fmt.Errorf("connect to the API server: %w", err)
	}
	for gv, client := range map[schema.GroupVersion]*rest.Interface{
		v1beta1.SchemeGroupVersion: &k.v1beta1,
		v1beta2.SchemeGroupVersion: &k.v1beta2,
	} {
		own := rest.CopyConfig(c)
		own.GroupVersion = &gv
		own.APIPath = "/apis"
		own.NegotiatedSerializer = serializer.NewCodecFactory(Scheme).WithoutConversion()
		if *client, err = rest.RESTClientFor(own); err != nil {
			return nil, fmt.Errorf("connect to the API server: %w", err)
		}
	}
	return k, nil
}

// source is one kind of objects to watch.
type source struct {
	client    rest.Interface
	resource  string
	namespace string // "" = all
	object    Object
	selector  string // by labels
}

// WatchForAgent feeds an inbox with what an agent needs, until ctx ends.
func (k *Kubernetes) WatchForAgent(ctx context.Context, inbox *Inbox) error {
	return watch(ctx, inbox,
		source{k.client.CoreV1().RESTClient(), "services", "", &corev1.Service{}, "!service.kubernetes.io/service-proxy-name"},
		source{k.client.DiscoveryV1().RESTClient(), "endpointslices", "", &discoveryv1.EndpointSlice{}, "!" + corev1.IsHeadlessService},
		source{k.client.CoreV1().RESTClient(), "nodes", "", &corev1.Node{}, ""},
		source{k.client.NetworkingV1().RESTClient(), "servicecidrs", "", &networkingv1.ServiceCIDR{}, ""},
		source{k.client.CoordinationV1().RESTClient(), "leases", k.namespace, &coordinationv1.Lease{}, AgentLabel},
		source{k.v1beta1, "ipaddresspools", k.namespace, &v1beta1.IPAddressPool{}, ""},
		source{k.v1beta1, "l2advertisements", k.namespace, &v1beta1.L2Advertisement{}, ""},
		source{k.v1beta1, "bgpadvertisements", k.namespace, &v1beta1.BGPAdvertisement{}, ""},
		source{k.v1beta1, "communities", k.namespace, &v1beta1.Community{}, ""},
		source{k.v1beta2, "bgppeers", k.namespace, &v1beta2.BGPPeer{}, ""},
		source{k.v1beta1, "bfdprofiles", k.namespace, &v1beta1.BFDProfile{}, ""},
	)
}

// WatchForCluster feeds an inbox with what the cluster's loop needs, until ctx ends.
func (k *Kubernetes) WatchForCluster(ctx context.Context, inbox *Inbox) error {
	return watch(ctx, inbox,
		source{k.client.CoreV1().RESTClient(), "services", "", &corev1.Service{}, ""},
		source{k.client.CoreV1().RESTClient(), "namespaces", "", &corev1.Namespace{}, ""},
		source{k.client.CoreV1().RESTClient(), "nodes", "", &corev1.Node{}, ""},
		source{k.v1beta1, "ipaddresspools", k.namespace, &v1beta1.IPAddressPool{}, ""},
		source{k.v1beta1, "l2advertisements", k.namespace, &v1beta1.L2Advertisement{}, ""},
		source{k.v1beta1, "bgpadvertisements", k.namespace, &v1beta1.BGPAdvertisement{}, ""},
		source{k.v1beta1, "communities", k.namespace, &v1beta1.Community{}, ""},
		source{k.v1beta1, "bfdprofiles", k.namespace, &v1beta1.BFDProfile{}, ""},
		source{k.v1beta2, "bgppeers", k.namespace, &v1beta2.BGPPeer{}, ""},
	)
}

// WatchPods feeds an inbox with the metadata of pods that say a weight, until ctx ends.
func (k *Kubernetes) WatchPods(ctx context.Context, inbox *Inbox) {
	pods := k.metadata.Resource(corev1.SchemeGroupVersion.WithResource("pods"))
	feed(ctx, inbox, &metav1.PartialObjectMetadata{}, &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			return pods.List(ctx, o)
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watchapi.Interface, error) {
			return pods.Watch(ctx, o)
		},
	}, func(o Object) bool { _, says := o.GetAnnotations()[WeightAnnotation]; return says })
}

func watch(ctx context.Context, inbox *Inbox, sources ...source) error {
	var synced []func() bool
	for _, s := range sources {
		lw := cache.NewFilteredListWatchFromClient(s.client, s.resource, s.namespace, func(o *metav1.ListOptions) {
			o.LabelSelector = s.selector
		})
		synced = append(synced, feed(ctx, inbox, s.object, lw, func(Object) bool { return true }))
	}
	for _, s := range synced {
		for !s() {
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(20 * time.Millisecond):
			}
		}
	}
	inbox.Synced()
	<-ctx.Done()
	return nil
}

// feed begins to put the objects that a ListWatch gives into an inbox, and returns what tells whether all that there were at
// the start have arrived. No object is kept here, only names: the inbox has them. Of objects that keep refuses nothing is.
func feed(ctx context.Context, inbox *Inbox, of Object, lw cache.ListerWatcher, keep func(Object) bool) (synced func() bool) {
	s := &feeder{inbox: inbox, of: of, keep: keep, known: map[types.NamespacedName]struct{}{}}
	go cache.NewReflectorWithOptions(listed{lw}, of, s, cache.ReflectorOptions{}).RunWithContext(ctx)
	return s.synced.Load
}

// listed asks for what there is as a list and not as the begin of a watch (WatchList), in which every object is a message of
// its own: 6,000 objects arrive in less than a third of the time.
type listed struct{ cache.ListerWatcher }

// IsWatchListSemanticsUnSupported is looked for by the Reflector (k8s.io/client-go/util/watchlist).
func (listed) IsWatchListSemanticsUnSupported() bool { return true }

// feeder is the store of a Reflector, which calls it from one goroutine.
type feeder struct {
	inbox  *Inbox
	of     Object
	keep   func(Object) bool
	known  map[types.NamespacedName]struct{}
	synced atomic.Bool
}

func (f *feeder) Add(o any) error    { return f.Update(o) }
func (f *feeder) Resync() error      { return nil }
func (f *feeder) Delete(o any) error { f.remove(nameOf(o.(Object))); return nil }

func (f *feeder) Update(o any) error {
	object := o.(Object)
	if !f.keep(object) {
		f.remove(nameOf(object))
		return nil
	}
	trim(object)
	f.known[nameOf(object)] = struct{}{}
	f.inbox.Put(object)
	return nil
}

func (f *feeder) remove(name types.NamespacedName) {
	if _, ok := f.known[name]; !ok {
		return
	}
	delete(f.known, name)
	gone := f.of.DeepCopyObject().(Object)
	gone.SetNamespace(name.Namespace)
	gone.SetName(name.Name)
	f.inbox.Remove(gone)
}

// Replace is called with everything there is: at the start, and when a watch has missed something.
func (f *feeder) Replace(all []any, _ string) error {
	there := make(map[types.NamespacedName]struct{}, len(all))
	for _, o := range all {
		there[nameOf(o.(Object))] = struct{}{}
		if err := f.Update(o); err != nil {
			return err
		}
	}
	for name := range f.known {
		if _, ok := there[name]; !ok {
			f.remove(name)
		}
	}
	f.synced.Store(true)
	return nil
}

// trim drops what nobody here reads and most of an object's memory is.
func trim(o Object) {
	o.SetManagedFields(nil)
	if a := o.GetAnnotations(); a[corev1.LastAppliedConfigAnnotation] != "" {
		delete(a, corev1.LastAppliedConfigAnnotation)
	}
}

// Events returns a recorder of events that come from component on host; it stops when ctx ends.
func (k *Kubernetes) Events(ctx context.Context, component, host string) record.EventRecorder {
	b := record.NewBroadcaster(record.WithContext(ctx))
	b.StartRecordingToSink(&typedcorev1.EventSinkImpl{Interface: k.client.CoreV1().Events("")})
	return b.NewRecorder(Scheme, corev1.EventSource{Component: component, Host: host})
}

// Password reads key "password" of a Secret of type kubernetes.io/basic-auth.
func (k *Kubernetes) Password(ctx context.Context, secret string) (string, error) {
	value, err := k.SecretValue(ctx, secret, corev1.BasicAuthPasswordKey)
	return string(value), err
}

// SecretValue reads one key of a Secret in our namespace.
func (k *Kubernetes) SecretValue(ctx context.Context, secret, key string) ([]byte, error) {
	s, err := k.client.CoreV1().Secrets(k.namespace).Get(ctx, secret, metav1.GetOptions{})
	if err != nil {
		return nil, fmt.Errorf("read Secret %s/%s: %w", k.namespace, secret, err)
	}
	value, ok := s.Data[key]
	if !ok {
		return nil, fmt.Errorf("secret %s/%s: data has no key %q", k.namespace, secret, key)
	}
	return value, nil
}

// NodeAddresses waits for a Node to have an address and returns its InternalIPs.
func (k *Kubernetes) NodeAddresses(ctx context.Context, name string) ([]netip.Addr, error) {
	for {
		n, err := k.client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
		if err == nil {
			if addrs := internalIPs(n); len(addrs) > 0 {
				return addrs, nil
			}
			err = errors.New("status.addresses has no InternalIP")
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("node %s: %w", name, err)
		case <-time.After(time.Second):
		}
	}
}

// WriteAddresses is a StatusWriter's.
func (k *Kubernetes) WriteAddresses(ctx context.Context, svc *corev1.Service, addrs []netip.Addr, pool string) error {
	annotations := map[string]any{AllocatedFromAnnotation: nil}
	if pool != "" {
		annotations[AllocatedFromAnnotation] = pool
	}
	var ingress any // null deletes
	if list := ingressWith(svc, addrs); len(list) > 0 {
		ingress = list
	}
	for _, patch := range []struct {
		body        any
		subresource []string
	}{
		{map[string]any{"metadata": map[string]any{"annotations": annotations}}, nil},
		{map[string]any{"status": map[string]any{"loadBalancer": map[string]any{"ingress": ingress}}}, []string{"status"}},
	} {
		body, err := json.Marshal(patch.body)
		if err != nil {
			return err
		}
		_, err = k.client.CoreV1().Services(svc.Namespace).Patch(ctx, svc.Name, types.MergePatchType, body, metav1.PatchOptions{}, patch.subresource...)
		if err != nil {
			return fmt.Errorf("patch service %s: %w", nameOf(svc), err)
		}
	}
	return nil
}

// ingressWith is a Service's status with other addresses. What is a hostname is somebody else's and stays.
func ingressWith(svc *corev1.Service, addrs []netip.Addr) []corev1.LoadBalancerIngress {
	var out []corev1.LoadBalancerIngress
	mode := corev1.LoadBalancerIPModeVIP
	for _, addr := range addrs {
		out = append(out, corev1.LoadBalancerIngress{IP: addr.String(), IPMode: &mode})
	}
	for _, i := range svc.Status.LoadBalancer.Ingress {
		if i.IP == "" {
			out = append(out, i)
		}
	}
	return out
}

// WritePool is a StatusWriter's.
func (k *Kubernetes) WritePool(ctx context.Context, pool *v1beta1.IPAddressPool) error {
	body, err := json.Marshal(map[string]any{"status": countsOf(pool)})
	if err != nil {
		return err
	}
	return k.v1beta1.Patch(types.MergePatchType).Namespace(pool.Namespace).Resource("ipaddresspools").
		Name(pool.Name).SubResource("status").Body(body).Do(ctx).Error()
}

// countsOf is a pool's counts, as they are in its status.
func countsOf(p *v1beta1.IPAddressPool) map[string]any {
	return map[string]any{
		"assignedIPv4": p.Status.AssignedIPv4, "assignedIPv6": p.Status.AssignedIPv6,
		"availableIPv4": p.Status.AvailableIPv4, "availableIPv6": p.Status.AvailableIPv6,
	}
}

// LeaseName is the Lease that the controllers of a cluster elect their leader by.
const LeaseName = "longshore-controller"

// Lead waits until this process is the leader among those that call it, calls work, and returns when the
// leadership is lost (an error) or ctx ends. work must end with its context.
func (k *Kubernetes) Lead(ctx context.Context, identity string, work func(context.Context)) error {
	lock := &resourcelock.LeaseLock{
		LeaseMeta:  metav1.ObjectMeta{Namespace: k.namespace, Name: LeaseName},
		Client:     k.client.CoordinationV1(),
		LockConfig: resourcelock.ResourceLockConfig{Identity: identity},
	}
	elector, err := leaderelection.NewLeaderElector(leaderelection.LeaderElectionConfig{
		Lock:            lock,
		LeaseDuration:   15 * time.Second, // the values of kube-controller-manager
		RenewDeadline:   10 * time.Second,
		RetryPeriod:     2 * time.Second,
		ReleaseOnCancel: true,
		Name:            LeaseName,
		Callbacks: leaderelection.LeaderCallbacks{
			OnStartedLeading: work,
			OnStoppedLeading: func() {},
		},
	})
	if err != nil {
		return fmt.Errorf("leader election: %w", err)
	}
	elector.Run(ctx)
	if ctx.Err() == nil {
		return fmt.Errorf("leader election: lost Lease %s/%s", k.namespace, LeaseName)
	}
	return nil
}
