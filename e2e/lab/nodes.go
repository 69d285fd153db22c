package lab

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"strconv"
	"sync"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

// Node is a machine on the lan that runs pods. It forwards.
type Node struct {
	*Host
	Index        int          // 1 for n1
	Pods4, Pods6 netip.Prefix // addresses of its pods; each range's first is the pods' gateway

	mu       sync.Mutex
	alive    context.Context // ends when the node is killed
	die      context.CancelFunc
	work     sync.WaitGroup // what this process does for the node while it is alive
	numbers  map[int]bool   // last parts of pod addresses in use
	last     int            // number given last
	podHosts map[string]*Host
}

func newNode(index int) *Node {
	n := &Node{
		Index:    index,
		Pods4:    netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 244, byte(index), 0}), 24),
		Pods6:    netip.MustParsePrefix(fmt.Sprintf("fd44:0:0:%d::/64", index)),
		numbers:  map[int]bool{},
		last:     1, // the gateway
		podHosts: map[string]*Host{},
	}
	n.alive, n.die = context.WithCancel(context.Background())
	return n
}

func (n *Node) name() string { return "n" + strconv.Itoa(n.Index) }

// Alive tells whether the node has not been killed, or was booted again.
func (n *Node) Alive() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.alive.Err() == nil
}

// Kill is a power cut: the network sees nothing more of the node or its pods, every process on it is dead. The
// API server hears of it only by the silence: the node is NotReady after about 10 s.
func (n *Node) Kill() error {
	if err := n.Link.Cut(); err != nil { // first: a dying process says goodbye to its peers, a dead machine does not
		return fmt.Errorf("kill %s: %w", n.Name, err)
	}
	n.mu.Lock()
	n.die()
	n.mu.Unlock()
	err := n.killAll()
	n.work.Wait()
	if err := errors.Join(err, n.killAll()); err != nil { // again: a pod may have been starting
		return fmt.Errorf("kill %s: %w", n.Name, err)
	}
	return nil
}

// killAll ends every process of the node and its pods.
func (n *Node) killAll() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	paths := []string{n.path()}
	for _, h := range n.podHosts {
		paths = append(paths, h.path())
	}
	return killProcesses(paths...)
}

// Boot switches a killed node on again: an empty kernel, the addresses and routes of before. Its kubelet registers
// anew and starts its pods; longshore is for the scenario to start. The node must not be in use while it boots.
func (n *Node) Boot() error {
	if n.Alive() {
		return fmt.Errorf("boot %s: it is running", n.Name)
	}
	l := n.lab
	if err := n.scrap(); err != nil {
		return fmt.Errorf("boot %s: %w", n.Name, err)
	}
	fresh := newNode(n.Index)
	if err := errors.Join(l.wireNode(fresh), l.routePodsOn(fresh.Host)); err != nil {
		return fmt.Errorf("boot %s: %w", n.Name, err)
	}
	n.mu.Lock()
	*n.Host = *fresh.Host
	n.alive, n.die = fresh.alive, fresh.die
	n.mu.Unlock()
	if l.cluster != nil && l.cluster.kubelet != nil {
		l.cluster.kubelet.adopt(n)
	}
	return nil
}

// scrap removes what is left of a killed node.
func (n *Node) scrap() error {
	for _, h := range maps.Clone(n.podHosts) {
		if err := n.removePod(h); err != nil {
			return err
		}
	}
	if err := n.Link.far.kernel.LinkDel(n.Link.farLink); err != nil {
		return err
	}
	n.release() // an open handle would keep the namespace and its tables
	return removeNamespace(n.path())
}

// AddPod makes a pod that no API server knows and no kubelet looks after: a host with the node's next free addresses. It
// goes when the node is booted again.
func (n *Node) AddPod(name string) (*Host, error) { return n.addPod(name) }

// addPod makes the namespace of a pod and gives it the node's next free addresses.
func (n *Node) addPod(name string) (*Host, error) {
	h, err := n.lab.newHost(name)
	if err != nil {
		return nil, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.podHosts[name] = h
	number, err := n.nextNumber()
	if err != nil {
		return nil, err
	}
	v4, v6 := n.Pods4.Addr().As4(), n.Pods6.Addr().As16()
	v4[3], v6[15] = byte(number), byte(number)
	h.V4, h.V6 = netip.AddrFrom4(v4), netip.AddrFrom16(v6)
	return h, n.plugPod(h, "pod"+strconv.Itoa(number))
}

// nextNumber goes round, so that an address is not used again soon after its pod is gone.
func (n *Node) nextNumber() (int, error) {
	for range 253 {
		n.last++
		if n.last > 254 {
			n.last = 2
		}
		if !n.numbers[n.last] {
			n.numbers[n.last] = true
			return n.last, nil
		}
	}
	return 0, fmt.Errorf("%s has 253 pods, no address is free", n.Name)
}

// removePod ends what still runs in a pod's namespace and removes it, cable and all.
func (n *Node) removePod(h *Host) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if err := killProcesses(h.path()); err != nil {
		return err
	}
	if h.Link != nil {
		if err := n.kernel.LinkDel(h.Link.farLink); err != nil {
			return fmt.Errorf("remove the cable of pod %s: %w", h.Name, err)
		}
	}
	delete(n.podHosts, h.Name)
	delete(n.numbers, int(h.V4.As4()[3]))
	return removeNamespace(h.path())
}

// object is the Node as its kubelet registers it.
func (n *Node) object() *corev1.Node {
	labels := map[string]string{
		corev1.LabelHostname:   n.Name,
		corev1.LabelOSStable:   "linux",
		corev1.LabelArchStable: "amd64",
	}
	return &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: n.Name, Labels: labels},
		Spec: corev1.NodeSpec{
			PodCIDR:  n.Pods4.String(),
			PodCIDRs: []string{n.Pods4.String(), n.Pods6.String()},
		},
		Status: n.status(),
	}
}

func (n *Node) status() corev1.NodeStatus {
	now := metav1.Now()
	room := corev1.ResourceList{
		corev1.ResourceCPU:    resource.MustParse("4"),
		corev1.ResourceMemory: resource.MustParse("8Gi"),
		corev1.ResourcePods:   resource.MustParse("250"),
	}
	return corev1.NodeStatus{
		Capacity: room, Allocatable: room,
		Addresses: []corev1.NodeAddress{
			{Type: corev1.NodeInternalIP, Address: n.V4.String()},
			{Type: corev1.NodeInternalIP, Address: n.V6.String()},
			{Type: corev1.NodeHostName, Address: n.Name},
		},
		Conditions: []corev1.NodeCondition{{
			Type: corev1.NodeReady, Status: corev1.ConditionTrue, Reason: "KubeletReady",
			LastHeartbeatTime: now, LastTransitionTime: now,
		}},
		NodeInfo: corev1.NodeSystemInfo{OperatingSystem: "linux", Architecture: "amd64", KubeletVersion: kubernetesVersion},
	}
}

// heartbeat registers the node and keeps it Ready until it is killed, as a kubelet does: by a Lease in
// kube-node-lease, renewed every two seconds.
func (n *Node) heartbeat(ctx context.Context, client kubernetes.Interface, complain func(error)) {
	for ctx.Err() == nil {
		if err := errors.Join(n.register(ctx, client), n.renew(ctx, client)); err != nil && ctx.Err() == nil {
			complain(fmt.Errorf("heartbeat of %s: %w", n.Name, err))
		}
		_ = pause(ctx, 2*time.Second) // the loop sees the end of ctx
	}
}

// register creates the Node, or sets its status if someone took it for dead.
func (n *Node) register(ctx context.Context, client kubernetes.Interface) error {
	nodes := client.CoreV1().Nodes()
	found, err := nodes.Get(ctx, n.Name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		_, err = nodes.Create(ctx, n.object(), metav1.CreateOptions{})
		return err
	}
	if err != nil || nodeReady(found) {
		return err
	}
	found.Status = n.status()
	_, err = nodes.UpdateStatus(ctx, found, metav1.UpdateOptions{})
	return err
}

func nodeReady(n *corev1.Node) bool {
	for _, c := range n.Status.Conditions {
		if c.Type == corev1.NodeReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}

func (n *Node) renew(ctx context.Context, client kubernetes.Interface) error {
	leases := client.CoordinationV1().Leases(corev1.NamespaceNodeLease)
	now, seconds := metav1.NowMicro(), int32(8)
	spec := coordinationv1.LeaseSpec{HolderIdentity: &n.Name, LeaseDurationSeconds: &seconds, RenewTime: &now}
	lease, err := leases.Get(ctx, n.Name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		lease = &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: n.Name}, Spec: spec}
		_, err = leases.Create(ctx, lease, metav1.CreateOptions{})
		return err
	}
	if err != nil {
		return err
	}
	lease.Spec = spec
	_, err = leases.Update(ctx, lease, metav1.UpdateOptions{})
	return err
}
