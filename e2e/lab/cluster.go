package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/discovery/cached/memory"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/restmapper"
)

// Cluster is a Kubernetes cluster on the lab's machines: a real control plane, and for each node a simple kubelet
// that runs pods as processes in namespaces of their own.
type Cluster struct {
	lab     *Lab
	plane   *controlPlane
	kubelet *kubelet // nil after StartAPI
	dynamic dynamic.Interface
	mapper  *restmapper.DeferredDiscoveryRESTMapper
}

// StartCluster starts the control plane, registers every node of the lab and waits until all are Ready. The
// cluster ends with the lab.
func (l *Lab) StartCluster(ctx context.Context) (*Cluster, error) {
	if l.cluster != nil {
		return nil, errors.New("the lab has a cluster already")
	}
	plane, err := l.startControlPlane(ctx)
	if err != nil {
		return nil, err
	}
	c, err := l.newCluster(plane)
	if err != nil {
		return nil, err
	}
	if c.kubelet, err = startKubelet(ctx, l, plane); err != nil {
		return nil, err
	}
	l.cluster = c
	return c, nil
}

// StartAPI starts a cluster that is an API server and nothing else: no controllers, no kubelets, so no pods. The nodes
// given are registered as Ready and stay so. It is for who makes all objects himself and lets nothing else use the
// processor. The cluster ends with the lab.
func (l *Lab) StartAPI(ctx context.Context, nodes ...*Node) (*Cluster, error) {
	if l.cluster != nil {
		return nil, errors.New("the lab has a cluster already")
	}
	plane, err := l.startAPI(ctx)
	if err != nil {
		return nil, err
	}
	for _, n := range nodes {
		if err := n.register(ctx, plane.client); err != nil {
			return nil, fmt.Errorf("register %s: %w", n.Name, err)
		}
	}
	l.cluster, err = l.newCluster(plane)
	return l.cluster, err
}

func (l *Lab) newCluster(plane *controlPlane) (*Cluster, error) {
	c := &Cluster{lab: l, plane: plane}
	var err error
	if c.dynamic, err = dynamic.NewForConfig(plane.admin); err != nil {
		return nil, err
	}
	c.mapper = restmapper.NewDeferredDiscoveryRESTMapper(memory.NewMemCacheClient(plane.client.Discovery()))
	return c, nil
}

// stop ends what this process does for the cluster; the programs end with the namespaces.
func (c *Cluster) stop() {
	if c.kubelet != nil {
		c.kubelet.stop()
	}
}

// Err is why a program of the control plane has ended, with its last lines; nil while all run.
func (c *Cluster) Err() error { return c.plane.died() }

// Client is the administrator's client, without a rate limit.
func (c *Cluster) Client() kubernetes.Interface { return c.plane.client }

// AdminConfig is the administrator's access for this process, whose connections start in the host api.
func (c *Cluster) AdminConfig() *rest.Config { return rest.CopyConfig(c.plane.admin) }

// AdminKubeconfig is the administrator's kubeconfig, for programs in any host of the lan.
func (c *Cluster) AdminKubeconfig() string { return c.plane.file("admin.kubeconfig") }

// ServiceAccountKubeconfig writes a kubeconfig, for programs in any host of the lan, with which they are that
// service account and may do what RBAC lets it.
func (c *Cluster) ServiceAccountKubeconfig(ctx context.Context, namespace, account string) (string, error) {
	return c.plane.tokenKubeconfig(ctx, namespace, account)
}

// Kubectl runs kubectl as administrator and returns what it printed.
func (c *Cluster) Kubectl(ctx context.Context, args ...string) (string, error) {
	return c.runTool(ctx, "kubectl", args)
}

// Helm runs helm as administrator and returns what it printed.
func (c *Cluster) Helm(ctx context.Context, args ...string) (string, error) {
	return c.runTool(ctx, "helm", args)
}

func (c *Cluster) runTool(ctx context.Context, name string, args []string) (string, error) {
	path, err := program(name)
	if err != nil {
		return "", err
	}
	cmd := c.plane.host.Command(ctx, path, args...)
	cmd.Env = append(cmd.Env, "KUBECONFIG="+c.AdminKubeconfig(), "HOME="+c.plane.folder,
		"XDG_CACHE_HOME=", "XDG_CONFIG_HOME=", "XDG_DATA_HOME=")
	return output(cmd, name+" "+strings.Join(args, " "))
}

// Apply makes the objects of one or more YAML documents what the text says, by server-side apply. Objects without
// a namespace are in default. It stops at the first that the API server refuses.
func (c *Cluster) Apply(ctx context.Context, text string) error {
	return c.each(text, func(r dynamic.ResourceInterface, o *unstructured.Unstructured) error {
		_, err := r.Apply(ctx, o.GetName(), o, metav1.ApplyOptions{FieldManager: "lab", Force: true})
		return err
	})
}

// Delete deletes the objects of one or more YAML documents, of which only kind, namespace and name matter.
func (c *Cluster) Delete(ctx context.Context, text string) error {
	return c.each(text, func(r dynamic.ResourceInterface, o *unstructured.Unstructured) error {
		return r.Delete(ctx, o.GetName(), metav1.DeleteOptions{})
	})
}

// each calls do with each object of the text and the resource it belongs to.
func (c *Cluster) each(text string, do func(dynamic.ResourceInterface, *unstructured.Unstructured) error) error {
	documents := yaml.NewYAMLOrJSONDecoder(strings.NewReader(text), 4096)
	for {
		o := &unstructured.Unstructured{}
		err := documents.Decode(o)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("parse YAML: %w", err)
		}
		if len(o.Object) == 0 { // an empty document, as Helm prints them
			continue
		}
		resource, err := c.resource(o)
		if err == nil {
			err = do(resource, o)
		}
		if err != nil {
			return fmt.Errorf("%s %s/%s: %w", o.GetKind(), o.GetNamespace(), o.GetName(), err)
		}
	}
}

// resource finds where objects of o's kind live; a kind not known yet is looked for again.
func (c *Cluster) resource(o *unstructured.Unstructured) (dynamic.ResourceInterface, error) {
	kind := o.GroupVersionKind()
	mapping, err := c.mapper.RESTMapping(kind.GroupKind(), kind.Version)
	if meta.IsNoMatchError(err) {
		c.mapper.Reset()
		mapping, err = c.mapper.RESTMapping(kind.GroupKind(), kind.Version)
	}
	if err != nil {
		return nil, err
	}
	if mapping.Scope.Name() == meta.RESTScopeNameRoot {
		return c.dynamic.Resource(mapping.Resource), nil
	}
	if o.GetNamespace() == "" {
		o.SetNamespace(metav1.NamespaceDefault)
	}
	return c.dynamic.Resource(mapping.Resource).Namespace(o.GetNamespace()), nil
}
