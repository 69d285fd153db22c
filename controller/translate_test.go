package controller

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/txtar"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/yaml"

	"github.com/longshore-lb/longshore/ipvs"
)

var update = flag.Bool("update", false, "write what is printed into testdata")

// TestTranslate reads Kubernetes objects and prints what has to be done to an empty kernel, and then, for each further
// set, what to that of the one before. Node n1 is 172.31.0.11 and fd31::11 in zone east, another one is 172.31.0.12. A first
// section node.yaml says in what the view of the node differs; then what the node itself needs is printed too.
func TestTranslate(t *testing.T) {
	files, err := filepath.Glob("testdata/translate/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no test data: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			archive, err := txtar.ParseFile(file)
			if err != nil {
				t.Fatal(err)
			}
			before := string(txtar.Format(archive))
			c := translations{t: t, node: testNode(), lastGood: map[string]Options{}, marks: marks{}}
			sections := archive.Files
			if len(sections) > 0 && sections[0].Name == "node.yaml" {
				c.nodeToo = true
				c.readNode(sections[0].Data)
				sections = sections[1:]
			}
			if len(sections) == 0 || len(sections)%2 != 0 {
				t.Fatalf("%d sections, want pairs of objects and what becomes of them", len(sections))
			}
			for i := 0; i < len(sections); i += 2 {
				sections[i+1].Data = []byte(c.translateAll(sections[i].Data))
			}
			after := string(txtar.Format(archive))
			if *update {
				if err := os.WriteFile(file, []byte(after), 0o644); err != nil {
					t.Fatal(err)
				}
			} else if diff := cmp.Diff(before, after); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

func testNode() NodeView {
	return NodeView{
		Name:          "n1",
		Zone:          "east",
		Addresses:     addrs("172.31.0.11", "fd31::11"),
		NodePortAddrs: addrs("172.31.0.11", "fd31::11"),
		Others:        map[netip.Addr]bool{netip.MustParseAddr("172.31.0.12"): true},
		ServiceCIDRs:  []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16"), netip.MustParsePrefix("fd96::/112")},
	}
}

// translations is a kernel that sets of objects are brought into, one after another.
type translations struct {
	t        *testing.T
	node     NodeView
	nodeToo  bool // print what the node itself needs
	desired  ipvs.Desired
	lastGood map[string]Options
	marks    marks
	out      bytes.Buffer
}

func (c *translations) readNode(text []byte) {
	c.t.Helper()
	j, err := yaml.ToJSON(text)
	if err != nil {
		c.t.Fatal(err)
	}
	d := json.NewDecoder(bytes.NewReader(j))
	d.DisallowUnknownFields()
	if err := d.Decode(&c.node); err != nil {
		c.t.Fatalf("node.yaml: %v", err)
	}
}

func (c *translations) translateAll(text []byte) string {
	c.t.Helper()
	c.out.Reset()
	s := newSnapshot()
	var changes []change
	for _, o := range objects(c.t, string(text)) {
		_, change := newChange(o, false)
		changes = append(changes, change)
	}
	s.update(changes)
	if c.nodeToo {
		c.replace(nodeOwner, TranslateNode(c.node), nil)
		c.nodeToo = false
	}
	for _, svc := range sorted(s.services) {
		c.translate(svc, s)
	}
	for _, owner := range slices.Sorted(maps.Keys(c.lastGood)) {
		if namespace, name, _ := strings.Cut(owner, "/"); s.services[types.NamespacedName{Namespace: namespace, Name: name}] == nil {
			c.replace(owner, ipvs.Wish{}, nil)
			delete(c.lastGood, owner)
		}
	}
	return c.out.String()
}

// replace prints problems and what has to be done.
func (c *translations) replace(owner string, w ipvs.Wish, problems []Problem) {
	ops := c.desired.ReplaceAll(map[string]ipvs.Wish{owner: w}, time.Time{})
	for _, f := range c.desired.Conflicts(owner) {
		problems = append(problems, Problem{"FrontendConflict", f.Frontend.String() + " belongs to " + f.Holder})
	}
	for _, p := range problems {
		fmt.Fprintf(&c.out, "# %s: %s\n", p.Reason, p.Message)
	}
	for _, o := range ops {
		line := o.String()
		if r := o.RealServer; r.Upper > 0 && o.Verb != ipvs.Delete { // ipvsadm -S has no thresholds
			line += fmt.Sprintf(" -x %d -y %d", r.Upper, r.Lower)
		}
		fmt.Fprintln(&c.out, line)
	}
}

// translate prints what becomes of one Service. Its real servers have been there for a quarter of their slow start.
func (c *translations) translate(svc *corev1.Service, s *snapshot) {
	owner := nameOf(svc).String()
	usual := Options{Scheduler: "rr", Drain: 15 * time.Minute}
	last, known := c.lastGood[owner]
	if !known {
		last = usual
	}
	options, problems := OptionsOf(svc, usual, last)
	c.lastGood[owner] = options
	translated := Translate(svc, s.slicesOf(nameOf(svc)), c.node, Terms{
		Options:    options,
		NodeLabels: s.labelsOf,
		PodWeight:  s.podWeight,
		Age:        func(netip.AddrPort) time.Duration { return options.SlowStart / 4 },
		Mark: func(port string, protocol ipvs.Protocol, family corev1.IPFamily) uint32 {
			return c.marks.of(nameOf(svc), fmt.Sprintf("%s/%s/%s", port, protocol, family))
		},
	})
	c.replace(owner, translated.Wish, append(problems, translated.Problems...))
	if p, local := healthCheckOf(svc, s.slicesOf(nameOf(svc)), c.node.Name); p != 0 {
		fmt.Fprintf(&c.out, "# health check port %d: %d local endpoints\n", p, local)
	}
	if translated.NoLocalInternal || translated.NoLocalExternal {
		fmt.Fprintf(&c.out, "# no local endpoint: internal %t, external %t\n", translated.NoLocalInternal, translated.NoLocalExternal)
	}
	for _, family := range slices.Sorted(maps.Keys(translated.Reach)) {
		if reach := translated.Reach[family]; !reach[AnyNode] {
			fmt.Fprintf(&c.out, "# %s is announced from %q alone\n", family, slices.Sorted(maps.Keys(reach)))
		}
	}
}

func documents(t *testing.T, text []byte) [][]byte {
	t.Helper()
	var out [][]byte
	for part := range strings.SplitSeq(string(text), "\n---\n") {
		if !isEmpty([]byte(part)) {
			j, err := yaml.ToJSON([]byte(part))
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, j)
		}
	}
	return out
}

// decodeAny reads an object of any kind that an agent watches: those of the API server too, that no manifest may have. Of a
// Pod it keeps what an agent gets to see.
func decodeAny(document []byte) (Object, error) {
	o, _, err := strict.Decode(document, nil, nil)
	if err != nil {
		return nil, err
	}
	switch o := o.(type) {
	case *corev1.Node, *networkingv1.ServiceCIDR:
		return o.(Object), nil
	case *discoveryv1.EndpointSlice: // the API server lets more pass
		if o.Namespace == "" {
			o.Namespace = metav1.NamespaceDefault
		}
		return o, nil
	case *corev1.Pod:
		pod := &metav1.PartialObjectMetadata{ObjectMeta: o.ObjectMeta}
		pod.Namespace = metav1.NamespaceDefault
		return pod, nil
	}
	return decodeManifest(document)
}
