package lab

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"
)

// kubelet is the kubelets of all nodes and a scheduler: it gives pods without a node to the live node with the
// fewest, and runs each pod's program. One goroutine decides what runs; each pod has one of its own.
type kubelet struct {
	lab    *Lab
	client kubernetes.Interface
	pods   corelisters.PodLister
	pokes  chan struct{}
	cancel context.CancelFunc
	loop   sync.WaitGroup

	mu      sync.Mutex
	running map[types.UID]*Pod
	images  map[string]ImageFunc
}

// ImageFunc says what program a container of a pod is. The pod's Host and Object are set.
type ImageFunc func(ctx context.Context, pod *Pod) (Exec, error)

// startKubelet registers the nodes and returns when all are Ready.
func startKubelet(ctx context.Context, l *Lab, plane *controlPlane) (*kubelet, error) {
	life, cancel := context.WithCancel(context.Background())
	k := &kubelet{
		lab: l, client: plane.client, cancel: cancel,
		pokes:   make(chan struct{}, 1),
		running: map[types.UID]*Pod{},
		images:  map[string]ImageFunc{"lab": builtIn},
	}
	factory := informers.NewSharedInformerFactory(k.client, 0)
	informer := factory.Core().V1().Pods()
	k.pods = informer.Lister()
	poke := func(any) { k.poke() }
	if _, err := informer.Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: poke, UpdateFunc: func(_, o any) { poke(o) }, DeleteFunc: poke,
	}); err != nil {
		cancel()
		return nil, err
	}
	factory.StartWithContext(life)
	for _, n := range l.Nodes {
		k.adopt(n)
	}
	k.loop.Go(func() {
		defer factory.Shutdown()
		factory.WaitForCacheSync(life.Done())
		k.run(life)
	})
	err := plane.await(ctx, "all nodes Ready", k.nodesReady)
	if err != nil {
		k.stop()
		return nil, err
	}
	return k, nil
}

// nodesReady checks that every live node is Ready and nothing keeps pods off it.
func (k *kubelet) nodesReady(ctx context.Context) error {
	list, err := k.client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	ready := map[string]bool{}
	for _, n := range list.Items {
		ready[n.Name] = nodeReady(&n) && len(n.Spec.Taints) == 0
	}
	for _, n := range k.lab.Nodes {
		if n.Alive() && !ready[n.Name] {
			return fmt.Errorf("node %s is not Ready", n.Name)
		}
	}
	return nil
}

// adopt starts a node's heartbeat.
func (k *kubelet) adopt(n *Node) {
	n.work.Go(func() { n.heartbeat(n.alive, k.client, k.complain) })
	k.poke()
}

// stop ends every goroutine, and leaves the pods' processes to the end of their namespaces.
func (k *kubelet) stop() {
	k.cancel()
	k.loop.Wait()
	for _, n := range k.lab.Nodes {
		n.mu.Lock()
		n.die()
		n.mu.Unlock()
		n.work.Wait()
	}
}

func (k *kubelet) complain(err error) { k.lab.log.Warn("lab node", "error", err) }

func (k *kubelet) poke() {
	select {
	case k.pokes <- struct{}{}:
	default: // one is waiting
	}
}

// run looks at all pods when one has changed, and every few seconds to try again what failed.
func (k *kubelet) run(ctx context.Context) {
	for ctx.Err() == nil {
		if err := k.sync(ctx); err != nil && ctx.Err() == nil {
			k.complain(err)
		}
		select {
		case <-ctx.Done():
		case <-k.pokes:
		case <-time.After(3 * time.Second):
		}
	}
}

func (k *kubelet) sync(ctx context.Context) error {
	all, err := k.pods.List(labels.Everything())
	if err != nil {
		return err
	}
	var errs []error
	known, load := map[types.UID]bool{}, map[string]int{}
	for _, o := range all {
		known[o.UID] = true
		load[o.Spec.NodeName]++
	}
	for _, o := range all {
		switch {
		case o.Spec.NodeName != "":
			k.ensure(o)
		case o.DeletionTimestamp == nil:
			errs = append(errs, k.bind(ctx, o, load))
		}
	}
	for uid, pod := range k.snapshot() {
		if !known[uid] {
			pod.orderStop(0)
		}
	}
	return errors.Join(errs...)
}

func (k *kubelet) snapshot() map[types.UID]*Pod {
	k.mu.Lock()
	defer k.mu.Unlock()
	return maps.Clone(k.running)
}

// bind gives a pod to the live node it may run on that has the fewest pods, and counts it there.
func (k *kubelet) bind(ctx context.Context, o *corev1.Pod, load map[string]int) error {
	var best *Node
	for _, n := range k.lab.Nodes {
		if n.Alive() && mayRunOn(o, n.object()) && (best == nil || load[n.Name] < load[best.Name]) {
			best = n
		}
	}
	if best == nil {
		return nil // a node may boot later
	}
	load[best.Name]++
	binding := &corev1.Binding{
		ObjectMeta: metav1.ObjectMeta{Namespace: o.Namespace, Name: o.Name, UID: o.UID},
		Target:     corev1.ObjectReference{Kind: "Node", Name: best.Name},
	}
	err := k.client.CoreV1().Pods(o.Namespace).Bind(ctx, binding, metav1.CreateOptions{})
	if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) { // gone, or bound: the cache lags
		return fmt.Errorf("bind pod %s/%s to %s: %w", o.Namespace, o.Name, best.Name, err)
	}
	return nil
}

// mayRunOn knows node selectors and what the DaemonSet controller asks for: one node by its name.
func mayRunOn(o *corev1.Pod, n *corev1.Node) bool {
	if !labels.SelectorFromSet(o.Spec.NodeSelector).Matches(labels.Set(n.Labels)) {
		return false
	}
	a := o.Spec.Affinity
	if a == nil || a.NodeAffinity == nil || a.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution == nil {
		return true
	}
	for _, term := range a.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms {
		for _, f := range term.MatchFields {
			if f.Key == metav1.ObjectNameField && f.Operator == corev1.NodeSelectorOpIn && slices.Contains(f.Values, n.Name) {
				return true
			}
		}
	}
	return false
}

// ensure starts a pod of a live node that does not run yet, and tells a running one that it shall end.
func (k *kubelet) ensure(o *corev1.Pod) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if pod := k.running[o.UID]; pod != nil {
		pod.observe(o)
		if o.DeletionTimestamp != nil {
			pod.orderStop(gracePeriod(o))
		}
		return
	}
	i := slices.IndexFunc(k.lab.Nodes, func(n *Node) bool { return n.Name == o.Spec.NodeName })
	if i < 0 || finished(o) && o.DeletionTimestamp == nil {
		return
	}
	node := k.lab.Nodes[i]
	node.mu.Lock()
	defer node.mu.Unlock()
	if node.alive.Err() != nil {
		return
	}
	pod := newPod(k, node, o)
	k.running[o.UID] = pod
	life := node.alive
	node.work.Go(func() {
		pod.live(life)
		k.mu.Lock()
		delete(k.running, o.UID)
		k.mu.Unlock()
		k.poke()
	})
}

func finished(o *corev1.Pod) bool {
	return o.Status.Phase == corev1.PodSucceeded || o.Status.Phase == corev1.PodFailed
}

func gracePeriod(o *corev1.Pod) time.Duration {
	if s := o.DeletionGracePeriodSeconds; s != nil {
		return time.Duration(*s) * time.Second
	}
	return 0
}

// find is the running pod of that name.
func (k *kubelet) find(namespace, name string) (*Pod, error) {
	for _, pod := range k.snapshot() {
		if o := pod.Object; o.Namespace == namespace && o.Name == name {
			<-pod.created
			if pod.Host != nil {
				return pod, nil
			}
		}
	}
	return nil, fmt.Errorf("pod %s/%s does not run", namespace, name)
}

// image finds what runs a container's image, whose tag and digest do not matter.
func (k *kubelet) image(name string) (ImageFunc, error) {
	repository, _, _ := strings.Cut(name, "@")
	if colon := strings.LastIndex(repository, ":"); colon > strings.LastIndex(repository, "/") {
		repository = repository[:colon]
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	f, ok := k.images[repository]
	if !ok {
		return nil, fmt.Errorf("the lab knows no image %s", repository)
	}
	return f, nil
}
