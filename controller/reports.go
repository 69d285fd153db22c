package controller

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"maps"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	"github.com/longshore-lb/longshore/config/v1beta1"
)

// Reports takes what an agent says of itself, for the API server.
type Reports interface {
	// Set replaces all of it and returns at once.
	Set(all []Object)
}

// report is what a node says: its ConfigurationState, and a ServiceL2Status and a ServiceBGPStatus for each Service that it announces. They
// go when the Node goes. peersOf is the names of the peers that get a Service's routes.
func report(node *corev1.Node, refused []string, told map[types.NamespacedName][]Announced, peersOf func(Announced) []string) []Object {
	meta := func(name string, labels map[string]string) metav1.ObjectMeta {
		return metav1.ObjectMeta{
			Name: name, Labels: labels,
			OwnerReferences: []metav1.OwnerReference{{APIVersion: "v1", Kind: "Node", Name: node.Name, UID: node.UID}},
		}
	}
	of := func(prefix string, service types.NamespacedName) metav1.ObjectMeta {
		h := fnv.New64a() // a name of its own for each node and Service, whatever theirs are
		fmt.Fprint(h, node.Name, " ", service)
		return meta(fmt.Sprintf("%s-%016x", prefix, h.Sum64()), map[string]string{
			v1beta1.NodeLabel: node.Name, v1beta1.ServiceNameLabel: service.Name, v1beta1.ServiceNamespaceLabel: service.Namespace,
		})
	}
	state := &v1beta1.ConfigurationState{ObjectMeta: meta("speaker-"+node.Name, map[string]string{
		v1beta1.NodeLabel: node.Name, v1beta1.ComponentLabel: "speaker", v1beta1.NodeNameLabel: node.Name,
	})}
	state.Status.Result = "Valid"
	if len(refused) > 0 {
		state.Status.Result, state.Status.LastError = "Invalid", strings.Join(refused, "\n")
	}
	all := []Object{state}
	for _, service := range slices.SortedFunc(maps.Keys(told), compareNames) {
		owns, interfaces, peers := false, []string(nil), []string(nil)
		for _, a := range told[service] {
			if a.Owner == node.Name {
				had := interfaces
				if !owns {
					had = a.Interfaces
				}
				owns, interfaces = true, eitherInterfaces(had, a.Interfaces)
			}
			peers = append(peers, peersOf(a)...)
		}
		if owns {
			s := &v1beta1.ServiceL2Status{ObjectMeta: of("l2", service)}
			s.Status = v1beta1.MetalLBServiceL2Status{Node: node.Name, ServiceName: service.Name, ServiceNamespace: service.Namespace}
			for _, name := range interfaces {
				s.Status.Interfaces = append(s.Status.Interfaces, v1beta1.InterfaceInfo{Name: name})
			}
			all = append(all, s)
		}
		if len(peers) > 0 {
			s := &v1beta1.ServiceBGPStatus{ObjectMeta: of("bgp", service)}
			s.Status = v1beta1.MetalLBServiceBGPStatus{
				Node: node.Name, ServiceName: service.Name, ServiceNamespace: service.Namespace, Peers: slices.Compact(slices.Sorted(slices.Values(peers))),
			}
			all = append(all, s)
		}
	}
	return all
}

// Reporter brings reports of one node to the API server.
type Reporter struct {
	client          rest.Interface
	namespace, node string
	log             *slog.Logger
	poke            chan struct{}

	mu   sync.Mutex
	want []Object // nil: nothing has been said yet

	// What follows belongs to Run.
	known map[reportKey]any // the status of what is there; nil: to be read
	last  string            // why it could not be written last
}

type reportKey struct{ resource, name string }

// Reporter returns a Reporter of a node.
func (k *Kubernetes) Reporter(node string, log *slog.Logger) *Reporter {
	return &Reporter{client: k.v1beta1, namespace: k.namespace, node: node, log: log, poke: make(chan struct{}, 1)}
}

// Set is Reports'.
func (r *Reporter) Set(all []Object) {
	r.mu.Lock()
	r.want = all
	r.mu.Unlock()
	select {
	case r.poke <- struct{}{}:
	default:
	}
}

// reportPause is the least time between two rounds of reports: they are for people.
const reportPause = time.Second

// Run writes until ctx ends.
func (r *Reporter) Run(ctx context.Context) error {
	wait := func(d time.Duration) bool {
		select {
		case <-ctx.Done():
			return false
		case <-time.After(d):
			return true
		}
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-r.poke:
		}
		for !r.written(ctx) {
			if !wait(retryAfter) {
				return nil
			}
		}
		if !wait(reportPause) {
			return nil
		}
	}
}

// written tells whether all could be written. If not, that is logged once for each new reason, and what is there is to be read again.
func (r *Reporter) written(ctx context.Context) bool {
	err := r.write(ctx)
	if err == nil {
		r.last = ""
		return true
	}
	if err.Error() != r.last && ctx.Err() == nil {
		r.log.Warn("status objects are not up to date, trying again", "error", err)
	}
	r.last, r.known = err.Error(), nil
	return false
}

// write makes what is there what is wanted.
func (r *Reporter) write(ctx context.Context) error {
	r.mu.Lock()
	want := r.want
	r.mu.Unlock()
	if r.known == nil {
		if err := r.read(ctx); err != nil {
			return err
		}
	}
	wanted := map[reportKey]bool{}
	var errs []error
	for _, o := range want {
		key, status := reportOf(o)
		wanted[key] = true
		had, there := r.known[key]
		if there && reflect.DeepEqual(had, status) {
			continue
		}
		if !there {
			err := r.client.Post().Namespace(r.namespace).Resource(key.resource).Body(o.DeepCopyObject()).Do(ctx).Error()
			if err != nil && !apierrors.IsAlreadyExists(err) {
				errs = append(errs, fmt.Errorf("create %s %s: %w", key.resource, key.name, err))
				continue
			}
		}
		body, err := json.Marshal(map[string]any{"status": status})
		if err != nil {
			return err
		}
		if err := r.client.Patch(types.MergePatchType).Namespace(r.namespace).Resource(key.resource).Name(key.name).SubResource("status").
			Body(body).Do(ctx).Error(); err != nil {
			errs = append(errs, fmt.Errorf("patch %s %s: %w", key.resource, key.name, err))
			continue
		}
		r.known[key] = status
	}
	for key := range r.known {
		if wanted[key] {
			continue
		}
		err := r.client.Delete().Namespace(r.namespace).Resource(key.resource).Name(key.name).Do(ctx).Error()
		if err != nil && !apierrors.IsNotFound(err) {
			errs = append(errs, fmt.Errorf("delete %s %s: %w", key.resource, key.name, err))
			continue
		}
		delete(r.known, key)
	}
	return errors.Join(errs...)
}

// read finds what this node, perhaps an earlier process, has written.
func (r *Reporter) read(ctx context.Context) error {
	r.known = nil
	known := map[reportKey]any{}
	for resource, list := range map[string]runtime.Object{
		"configurationstates": &v1beta1.ConfigurationStateList{},
		"servicel2statuses":   &v1beta1.ServiceL2StatusList{},
		"servicebgpstatuses":  &v1beta1.ServiceBGPStatusList{},
	} {
		err := r.client.Get().Namespace(r.namespace).Resource(resource).Param("labelSelector", v1beta1.NodeLabel+"="+r.node).Do(ctx).Into(list)
		if err != nil {
			return fmt.Errorf("list %s: %w", resource, err)
		}
		switch l := list.(type) {
		case *v1beta1.ConfigurationStateList:
			for i := range l.Items {
				note(known, &l.Items[i])
			}
		case *v1beta1.ServiceL2StatusList:
			for i := range l.Items {
				note(known, &l.Items[i])
			}
		case *v1beta1.ServiceBGPStatusList:
			for i := range l.Items {
				note(known, &l.Items[i])
			}
		}
	}
	r.known = known
	return nil
}

func note(known map[reportKey]any, o Object) {
	key, status := reportOf(o)
	known[key] = status
}

// reportOf is where an object is, and what it says. Every field of the status is in it, so that a patch takes away what is no longer said.
func reportOf(o Object) (reportKey, any) {
	switch o := o.(type) {
	case *v1beta1.ConfigurationState:
		return reportKey{"configurationstates", o.Name}, map[string]any{"result": o.Status.Result, "lastError": o.Status.LastError}
	case *v1beta1.ServiceL2Status:
		s := o.Status
		return reportKey{"servicel2statuses", o.Name}, map[string]any{
			"node": s.Node, "serviceName": s.ServiceName, "serviceNamespace": s.ServiceNamespace, "interfaces": s.Interfaces,
		}
	case *v1beta1.ServiceBGPStatus:
		s := o.Status
		return reportKey{"servicebgpstatuses", o.Name}, map[string]any{
			"node": s.Node, "serviceName": s.ServiceName, "serviceNamespace": s.ServiceNamespace, "peers": s.Peers,
		}
	}
	panic(fmt.Sprintf("%T is no report", o)) // a mistake in this package
}
