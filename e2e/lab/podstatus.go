package lab

import (
	"context"
	"encoding/json"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
)

// report writes the pod's status if it is not what was written last, or someone took the pod for dead.
func (p *Pod) report(ctx context.Context) {
	status := p.status()
	text, err := json.Marshal(status)
	if err != nil {
		p.kubelet.complain(err)
		return
	}
	if string(text) == string(p.reported) && podReady(p.observed.Load()) == p.ready {
		return
	}
	patch, err := statusPatch(p.Object.UID, status)
	if err != nil {
		p.kubelet.complain(err)
		return
	}
	pods := p.kubelet.client.CoreV1().Pods(p.Object.Namespace)
	o, err := pods.Patch(ctx, p.Object.Name, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status")
	switch {
	case err == nil:
		p.reported = text
		p.observed.Store(o)
	case ctx.Err() == nil && !apierrors.IsNotFound(err):
		p.reported = nil
		p.kubelet.complain(fmt.Errorf("status of pod %s/%s: %w", p.Object.Namespace, p.Object.Name, err))
	}
}

// observe notes how the API server has the pod now.
func (p *Pod) observe(o *corev1.Pod) {
	before := p.observed.Swap(o)
	if podReady(before) != podReady(o) {
		p.look()
	}
}

func podReady(o *corev1.Pod) bool {
	for _, c := range o.Status.Conditions {
		if c.Type == corev1.PodReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}

// statusPatch is a strategic merge patch of a pod's status. Conditions that others have set stay, but addresses
// of before a reboot do not.
func statusPatch(uid types.UID, status corev1.PodStatus) ([]byte, error) {
	fields, err := runtime.DefaultUnstructuredConverter.ToUnstructured(&status)
	if err != nil {
		return nil, err
	}
	for _, list := range []string{"podIPs", "hostIPs"} {
		if addresses, ok := fields[list].([]any); ok {
			fields[list] = append(addresses, map[string]any{"$patch": "replace"})
		}
	}
	return json.Marshal(map[string]any{"metadata": map[string]any{"uid": uid}, "status": fields})
}

// status is what a kubelet would report.
func (p *Pod) status() corev1.PodStatus {
	s := corev1.PodStatus{
		Phase:     p.phase,
		HostIP:    p.Node.V4.String(),
		HostIPs:   []corev1.HostIP{{IP: p.Node.V4.String()}, {IP: p.Node.V6.String()}},
		StartTime: &p.Object.CreationTimestamp,
	}
	if p.Host != nil && p.process != nil {
		s.PodIP = p.V4.String()
		s.PodIPs = []corev1.PodIP{{IP: p.V4.String()}, {IP: p.V6.String()}}
	}
	s.Conditions = []corev1.PodCondition{
		p.condition(corev1.PodScheduled, true),
		p.condition(corev1.PodReadyToStartContainers, p.Host != nil),
		p.condition(corev1.PodInitialized, true),
		p.condition(corev1.ContainersReady, p.ready),
		p.condition(corev1.PodReady, p.ready),
	}
	if len(p.Object.Spec.Containers) == 1 {
		s.ContainerStatuses = []corev1.ContainerStatus{p.containerStatus()}
	} else {
		s.Message = p.reason.Error()
	}
	return s
}

// condition knows since when it is so.
func (p *Pod) condition(kind corev1.PodConditionType, is bool) corev1.PodCondition {
	status := corev1.ConditionFalse
	if is {
		status = corev1.ConditionTrue
	}
	if p.turned[kind].Status != status {
		p.turned[kind] = corev1.PodCondition{Type: kind, Status: status, LastTransitionTime: metav1.Now()}
	}
	return p.turned[kind]
}

func (p *Pod) containerStatus() corev1.ContainerStatus {
	running := p.process != nil
	c := corev1.ContainerStatus{
		Name: p.container().Name, Image: p.container().Image, Ready: p.ready, Started: &running, RestartCount: p.restarts,
	}
	switch {
	case running:
		c.ContainerID = fmt.Sprintf("lab://%d", p.process.PID())
		c.State.Running = &corev1.ContainerStateRunning{StartedAt: p.started}
	case p.phase == corev1.PodSucceeded:
		c.State.Terminated = &corev1.ContainerStateTerminated{Reason: "Completed"}
	case p.phase == corev1.PodFailed:
		c.State.Terminated = &corev1.ContainerStateTerminated{Reason: "Error", ExitCode: 1, Message: p.reason.Error()}
	case p.reason != nil:
		c.State.Waiting = &corev1.ContainerStateWaiting{Reason: "NotRunning", Message: p.reason.Error()}
	}
	return c
}
