package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// Pod is a running pod: the process of its only container in a network namespace. Readiness and startup are as
// the container's readinessProbe says (tcpSocket or httpGet); other probes, volumes and init containers are not
// known here.
type Pod struct {
	*Host   // its network namespace; with hostNetwork, its node's
	Node    *Node
	Object  *corev1.Pod // as it was when it started
	kubelet *kubelet

	created chan struct{} // closed when Host is set, or the pod has failed
	changed chan struct{} // something outside wants the pod looked at
	unready atomic.Bool   // the scenario wants it so

	observed atomic.Pointer[corev1.Pod] // as the API server has it

	stopOnce sync.Once
	stopping chan time.Duration // how long the process may take to end

	// Owned by live.
	process  *Process
	started  metav1.Time
	restarts int32
	failures int // of the readiness probe, in a row
	ready    bool
	phase    corev1.PodPhase
	reason   error // why it does not run
	turned   map[corev1.PodConditionType]corev1.PodCondition
	reported []byte
}

func newPod(k *kubelet, n *Node, o *corev1.Pod) *Pod {
	p := &Pod{
		Node: n, Object: o.DeepCopy(), kubelet: k,
		created:  make(chan struct{}),
		changed:  make(chan struct{}, 1),
		stopping: make(chan time.Duration, 1),
		phase:    corev1.PodPending,
		turned:   map[corev1.PodConditionType]corev1.PodCondition{},
	}
	p.observed.Store(o)
	return p
}

// Pod finds a running pod.
func (c *Cluster) Pod(namespace, name string) (*Pod, error) { return c.kubelet.find(namespace, name) }

// Image tells what to run for containers of an image, named without its tag. The image lab is there from the
// start: its containers run their command on this machine or, if they have none, the built-in server, at the ports
// that the container lists or else at 80, both TCP and UDP. Containers of other images wait.
func (c *Cluster) Image(name string, run ImageFunc) {
	c.kubelet.mu.Lock()
	defer c.kubelet.mu.Unlock()
	c.kubelet.images[name] = run
}

// SetReady holds a pod not Ready whatever its probe says, or lets its probe decide again.
func (c *Cluster) SetReady(namespace, name string, ready bool) error {
	pod, err := c.kubelet.find(namespace, name)
	if err != nil {
		return err
	}
	pod.unready.Store(!ready)
	pod.look()
	return nil
}

// look makes live look at the pod now.
func (p *Pod) look() {
	select {
	case p.changed <- struct{}{}:
	default: // it is about to look
	}
}

// orderStop makes the pod end; how the first caller says.
func (p *Pod) orderStop(grace time.Duration) {
	p.stopOnce.Do(func() { p.stopping <- grace })
}

// live is the pod's whole life on its node: created, run, restarted, watched, reported, and removed when it is
// deleted. When ctx ends the node is dead: no one cleans up or reports.
func (p *Pod) live(ctx context.Context) {
	p.create()
	close(p.created)
	for {
		p.ensureProcess(ctx)
		p.probe(ctx)
		p.report(ctx)
		select {
		case <-ctx.Done():
			return
		case grace := <-p.stopping:
			if err := p.terminate(ctx, grace); err != nil && ctx.Err() == nil {
				p.kubelet.complain(err)
			}
			return
		case <-p.exited():
			p.bury()
		case <-p.changed:
		case <-time.After(p.interval()):
		}
	}
}

// create makes the pod's machine.
func (p *Pod) create() {
	o := p.Object
	switch {
	case len(o.Spec.Containers) != 1 || len(o.Spec.InitContainers) > 0:
		p.reason = errors.New("the lab runs pods of one container and no init containers")
	case o.Spec.HostNetwork:
		p.Host = p.Node.Host
	default:
		p.Host, p.reason = p.Node.addPod(o.Namespace + "-" + o.Name)
	}
}

// ensureProcess starts the container's process if there is none and there shall be one.
func (p *Pod) ensureProcess(ctx context.Context) {
	if p.process != nil || p.Host == nil || finished(&corev1.Pod{Status: corev1.PodStatus{Phase: p.phase}}) {
		return
	}
	run, err := p.kubelet.image(p.container().Image)
	var e Exec
	if err == nil {
		e, err = run(ctx, p)
	}
	if err == nil {
		e.Name = p.Object.Namespace + "-" + p.Object.Name
		p.process, err = p.Start(e)
	}
	p.reason = err
	if err == nil {
		p.phase, p.started = corev1.PodRunning, metav1.Now()
	}
}

func (p *Pod) container() *corev1.Container { return &p.Object.Spec.Containers[0] }

// exited is closed when the process has ended; it blocks for ever while there is none.
func (p *Pod) exited() <-chan struct{} {
	if p.process == nil {
		return nil
	}
	return p.process.Exited()
}

// bury takes note that the process has ended by itself.
func (p *Pod) bury() {
	status := p.process.cmd.ProcessState
	p.reason = p.process.Err()
	p.process, p.ready, p.failures = nil, false, 0
	switch policy := p.Object.Spec.RestartPolicy; {
	case policy == corev1.RestartPolicyAlways, policy == corev1.RestartPolicyOnFailure && !status.Success():
		p.restarts++
	case status.Success():
		p.phase = corev1.PodSucceeded
	default:
		p.phase = corev1.PodFailed
	}
}

// interval is when to look at the pod again: soon until it is Ready, then as its probe says.
func (p *Pod) interval() time.Duration {
	if p.process == nil || p.reported == nil {
		return time.Second
	}
	if !p.ready {
		return 200 * time.Millisecond
	}
	if probe := p.container().ReadinessProbe; probe != nil && probe.PeriodSeconds > 0 {
		return time.Duration(probe.PeriodSeconds) * time.Second
	}
	return 10 * time.Second
}

// probe decides whether the pod is ready.
func (p *Pod) probe(ctx context.Context) {
	if p.process == nil || p.unready.Load() {
		p.ready = false
		return
	}
	probe := p.readinessProbe()
	if err := p.check(ctx, probe); err == nil {
		p.ready, p.failures = true, 0
		return
	}
	p.failures++
	if p.failures >= int(max(probe.FailureThreshold, 1)) {
		p.ready = false
	}
}

// readinessProbe is the container's, or else that of the built-in server.
func (p *Pod) readinessProbe() *corev1.Probe {
	c := p.container()
	if c.ReadinessProbe != nil {
		return c.ReadinessProbe
	}
	if c.Image == "lab" && len(c.Command)+len(c.Args) == 0 {
		for _, s := range builtInPorts(c) {
			if port, ok := strings.CutSuffix(s, "/TCP"); ok {
				return &corev1.Probe{ProbeHandler: corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{Port: intstr.Parse(port)}}}
			}
		}
	}
	return &corev1.Probe{}
}

// check connects from the node, as a kubelet does.
func (p *Pod) check(ctx context.Context, probe *corev1.Probe) error {
	ctx, cancel := context.WithTimeout(ctx, time.Duration(max(probe.TimeoutSeconds, 1))*time.Second)
	defer cancel()
	switch {
	case probe.TCPSocket != nil:
		conn, err := p.Node.DialContext(ctx, "tcp", p.probed(probe.TCPSocket.Host, probe.TCPSocket.Port))
		if err != nil {
			return err
		}
		return conn.Close()
	case probe.HTTPGet != nil:
		return p.get(ctx, probe.HTTPGet)
	}
	return nil
}

func (p *Pod) probed(host string, port intstr.IntOrString) string {
	if host == "" {
		host = p.V4.String()
	}
	number := port.String()
	for _, named := range p.container().Ports {
		if named.Name == number {
			number = strconv.Itoa(int(named.ContainerPort))
		}
	}
	return net.JoinHostPort(host, number)
}

func (p *Pod) get(ctx context.Context, action *corev1.HTTPGetAction) error {
	client := &http.Client{Transport: &http.Transport{DialContext: p.Node.DialContext, DisableKeepAlives: true}}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+p.probed(action.Host, action.Port)+action.Path, nil)
	if err != nil {
		return err
	}
	response, err := client.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if response.StatusCode >= 400 {
		return fmt.Errorf("%s: %s", request.URL, response.Status)
	}
	return nil
}

// terminate ends the process as a kubelet does: the preStop sleep, SIGTERM, the rest of the grace period, SIGKILL;
// then it removes the namespace and the object.
func (p *Pod) terminate(ctx context.Context, grace time.Duration) error {
	end, cancel := context.WithTimeout(ctx, grace)
	defer cancel()
	if p.process != nil {
		if l := p.container().Lifecycle; l != nil && l.PreStop != nil && l.PreStop.Sleep != nil {
			p.wait(end, time.Duration(l.PreStop.Sleep.Seconds)*time.Second)
		}
		if p.process.end(syscall.SIGTERM) {
			p.wait(end, grace)
		}
		p.process.Kill()
	}
	if ctx.Err() != nil { // the node has died meanwhile
		return nil
	}
	if p.Host != nil && p.Host != p.Node.Host {
		if err := p.Node.removePod(p.Host); err != nil {
			return fmt.Errorf("remove pod %s/%s: %w", p.Object.Namespace, p.Object.Name, err)
		}
		p.release()
	}
	now := int64(0)
	options := metav1.DeleteOptions{GracePeriodSeconds: &now, Preconditions: &metav1.Preconditions{UID: &p.Object.UID}}
	err := p.kubelet.client.CoreV1().Pods(p.Object.Namespace).Delete(ctx, p.Object.Name, options)
	if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
		return fmt.Errorf("delete pod %s/%s: %w", p.Object.Namespace, p.Object.Name, err)
	}
	return nil
}

// wait waits until the process has ended, d is over, or ctx ends. Status changes are reported meanwhile: a pod
// that terminates may still be told to be unready.
func (p *Pod) wait(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
			return
		case <-p.exited():
			return
		case <-p.changed:
			p.probe(ctx)
			p.report(ctx)
		}
	}
}

// builtIn runs containers of the image lab.
func builtIn(_ context.Context, p *Pod) (Exec, error) {
	c := p.container()
	e := Exec{Env: p.environment()}
	if argv := append(append([]string{}, c.Command...), c.Args...); len(argv) > 0 {
		e.Path, e.Args, e.Dir = argv[0], argv[1:], c.WorkingDir
		return e, nil
	}
	self, err := os.Executable()
	if err != nil {
		return e, err
	}
	e.Path = self
	e.Env = append(e.Env, serveEnv+"="+p.Object.Namespace+"-"+p.Object.Name+" "+strings.Join(builtInPorts(c), " "))
	return e, nil
}

// builtInPorts is where the built-in server serves, such as 80/TCP.
func builtInPorts(c *corev1.Container) []string {
	if len(c.Ports) == 0 {
		return []string{"80/TCP", "80/UDP"}
	}
	var ports []string
	for _, p := range c.Ports {
		protocol := p.Protocol
		if protocol == "" {
			protocol = corev1.ProtocolTCP
		}
		ports = append(ports, fmt.Sprintf("%d/%s", p.ContainerPort, protocol))
	}
	return ports
}

// environment is the container's variables: plain values, and fields of the pod (downward API).
func (p *Pod) environment() []string {
	var env []string
	for _, v := range p.container().Env {
		value := v.Value
		if v.ValueFrom != nil && v.ValueFrom.FieldRef != nil {
			value = p.field(v.ValueFrom.FieldRef.FieldPath)
		}
		env = append(env, v.Name+"="+value)
	}
	return env
}

func (p *Pod) field(path string) string {
	o := p.Object
	join := func(addrs ...netip.Addr) string {
		return fmt.Sprintf("%s,%s", addrs[0], addrs[1])
	}
	return map[string]string{
		"metadata.name":           o.Name,
		"metadata.namespace":      o.Namespace,
		"metadata.uid":            string(o.UID),
		"spec.nodeName":           o.Spec.NodeName,
		"spec.serviceAccountName": o.Spec.ServiceAccountName,
		"status.hostIP":           p.Node.V4.String(),
		"status.hostIPs":          join(p.Node.V4, p.Node.V6),
		"status.podIP":            p.V4.String(),
		"status.podIPs":           join(p.V4, p.V6),
	}[path]
}

// Args is the container's arguments, with the $(NAME) of its environment filled in, for an [ImageFunc].
func (p *Pod) Args() []string {
	var pairs []string
	for _, e := range p.environment() {
		name, value, _ := strings.Cut(e, "=")
		pairs = append(pairs, "$("+name+")", value)
	}
	variables := strings.NewReplacer(pairs...)
	var args []string
	for _, a := range p.container().Args {
		args = append(args, variables.Replace(a))
	}
	return args
}

// Env is the container's environment, NAME=VALUE, with the fields of the pod that it asks for filled in, for an
// [ImageFunc].
func (p *Pod) Env() []string { return p.environment() }
