package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/longshore-lb/longshore/e2e/lab"
)

const longshoreNamespace = "longshore-system"

// bench is one run. n1 is the node of the proxy that is being measured; n2 has the pods that answer, and no proxy.
type bench struct {
	options
	began   time.Time
	lab     *lab.Lab
	cluster *lab.Cluster
	load    *load
	report  *report
	config  string // file with the configuration of longshore's agent
	starts  int    // of programs, to number their logs
}

func (b *bench) node() *lab.Node { return b.lab.Nodes[0] }

// step says what comes next, and when.
func (b *bench) step(format string, args ...any) {
	fmt.Printf("==> [%4.0f s] %s\n", time.Since(b.began).Seconds(), fmt.Sprintf(format, args...))
}

func run(ctx context.Context, o options) (err error) {
	if err := os.MkdirAll(filepath.Dir(o.out), 0o755); err != nil {
		return err
	}
	b := &bench{options: o, began: time.Now(), report: &report{file: o.out, about: about(o), cells: map[string]map[string]figure{}}}
	b.step("the lab, etcd and kube-apiserver")
	if b.lab, err = lab.New(ctx, lab.Config{Scenario: "bench", Nodes: 2}); err != nil {
		return err
	}
	fmt.Printf("      logs are kept in %s\n", b.lab.KeepRecords())
	defer func() { err = errors.Join(err, b.lab.Close()) }()
	if err := b.prepare(ctx); err != nil {
		return err
	}
	for _, size := range slices.Sorted(maps.Keys(o.plan)) {
		b.step("%d Services with %d endpoints each", size, perService)
		if err := b.load.grow(ctx, size); err != nil {
			return err
		}
		b.at(ctx, size)
		if err := errors.Join(context.Cause(ctx), b.cluster.Err()); err != nil {
			return err
		}
	}
	b.report.about = append(b.report.about, fmt.Sprintf("the run took %v", time.Since(b.began).Round(time.Second)))
	b.report.save()
	b.step("done; the figures are in %s", o.out)
	return nil
}

// prepare starts what serves all proxies in turn.
func (b *bench) prepare(ctx context.Context) (err error) {
	if err := peersToMemory(ctx); err != nil {
		return err
	}
	for _, name := range []string{"etcd", "kube-apiserver"} {
		path, err := lab.Program(name)
		if err == nil {
			err = toMemory(path)
		}
		if err != nil {
			return err
		}
	}
	if b.cluster, err = b.lab.StartAPI(ctx, b.node()); err != nil {
		return err
	}
	crds, err := filepath.Glob("charts/longshore/crds/*.yaml")
	if err != nil {
		return err
	}
	for _, file := range crds {
		content, err := os.ReadFile(file)
		if err == nil {
			err = b.cluster.Apply(ctx, string(content))
		}
		if err != nil {
			return err
		}
	}
	client := b.cluster.AdminConfig()
	client.ContentType = "application/vnd.kubernetes.protobuf"
	b.load = &load{}
	if b.load.client, err = kubernetes.NewForConfig(client); err != nil {
		return err
	}
	for _, name := range []string{namespace, longshoreNamespace} {
		ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}
		if _, err := b.load.client.CoreV1().Namespaces().Create(ctx, ns, metav1.CreateOptions{}); err != nil {
			return err
		}
	}
	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "longshore-members"}, Data: map[string][]byte{"key": make([]byte, 32)}}
	if _, err := b.load.client.CoreV1().Secrets(longshoreNamespace).Create(ctx, secret, metav1.CreateOptions{}); err != nil {
		return err
	}
	b.config = filepath.Join(b.lab.Records(), "agent.yaml")
	if err := os.WriteFile(b.config, []byte("metricsAddress: 127.0.0.1:10249\n"), 0o644); err != nil {
		return err
	}
	return b.startPods()
}

// startPods makes the pods of Service 0 on n2, twice as many as it has endpoints at a time.
func (b *bench) startPods() error {
	for i := range 2 * perService {
		pod, err := b.lab.Nodes[1].AddPod(fmt.Sprintf("server-%d", i))
		if err != nil {
			return err
		}
		if err := answer(pod); err != nil {
			return err
		}
		b.load.pods[i/perService] = append(b.load.pods[i/perService], pod.V4)
	}
	return nil
}

// at measures every proxy with so many Services.
func (b *bench) at(ctx context.Context, size int) {
	peers := slices.DeleteFunc(slices.Clone(b.proxies), func(p string) bool {
		return p == limit && !slices.Contains(b.plan[size], coldstart)
	})
	for _, name := range append([]string{ours}, peers...) {
		if ctx.Err() != nil {
			return
		}
		if time.Since(b.began) > b.budget {
			b.report.note("%s with %d Services: not measured, the time was over", name, size)
			continue
		}
		b.step("%s with %d Services", name, size)
		if err := b.freshNode(ctx); err != nil {
			b.report.note("%s with %d Services: %v", name, size, err)
			return
		}
		var err error
		if name == limit {
			err = b.measureLimit(ctx)
		} else {
			err = b.measure(ctx, proxies[name])
		}
		if err != nil {
			b.report.note("%s with %d Services: %v", name, size, err)
		}
	}
}

// freshNode gives n1 an empty kernel.
func (b *bench) freshNode(ctx context.Context) error {
	if err := b.node().Kill(); err != nil {
		return err
	}
	if err := b.node().Boot(); err != nil {
		return err
	}
	for _, h := range []*lab.Host{b.lab.Client, b.lab.API, b.lab.Nodes[1].Host} { // the new node has a new hardware address
		if err := h.ForgetNeighbors(); err != nil {
			return err
		}
	}
	return quiet(ctx)
}

// measure starts a proxy and takes all figures of it at the present size.
func (b *bench) measure(ctx context.Context, p *proxy) error {
	r, err := b.start(p)
	if err != nil {
		return err
	}
	defer r.stop()
	parts := b.plan[b.load.size()]
	ready, err := b.coldStart(ctx, r, slices.Contains(parts, coldstart))
	if err != nil {
		return err
	}
	for _, part := range []struct {
		name   string
		always bool // also of a proxy that is not ready yet
		do     func(context.Context, *running) error
	}{
		{memory, true, b.memory}, {datapath, true, b.dataPath}, {change, true, b.change}, {rolling, false, b.rolling}, {idle, false, b.watchIdle},
	} {
		if !slices.Contains(parts, part.name) {
			continue
		}
		if !ready && !part.always {
			b.report.note("%s with %d Services: %s not measured, the proxy did not get ready", p.name, b.load.size(), part.name)
			continue
		}
		if err := part.do(ctx, r); err != nil {
			b.report.note("%s with %d Services: %s: %v", p.name, b.load.size(), part.name, err)
		}
		if err := r.alive(); err != nil {
			return err
		}
	}
	return nil
}

// name is a figure's, with the size in it.
func (b *bench) name(part, what string) string {
	n := fmt.Sprintf("%s-%d", part, b.load.size())
	if what != "" {
		n += "-" + what
	}
	return n
}

// target is where Service 0 is reached inside the cluster.
func target() netip.AddrPort { return frontend(0) }
