package controller

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apimachinery/pkg/util/yaml"

	"github.com/longshore-lb/longshore/config"
	"github.com/longshore-lb/longshore/config/v1beta1"
	"github.com/longshore-lb/longshore/config/v1beta2"
)

// Files takes the place of an API server: objects are read from the YAML and JSON files of a folder, and what the
// cluster's loop allocates is kept in a file, so that Services have the same addresses after a restart.
//
// A file that is wrong is reported and keeps its last good content in use; the other files are not affected.
type Files struct {
	folder  string
	store   string
	inboxes []*Inbox
	log     *slog.Logger

	mu       sync.Mutex
	good     map[string][]Object // the last good content of each file
	current  map[inboxKey]Object // as put into the inboxes
	assigned map[string]assignedAddresses
	told     map[string]string // the last error about each file that cannot be used as it is
	twice    map[string]string // the last error about each file with objects that others have, too
}

type assignedAddresses struct {
	Addresses []netip.Addr `json:"addresses"`
	Pool      string       `json:"pool"`
}

// NewFiles reads objects from folder into inboxes, and keeps what was allocated in the file store.
func NewFiles(folder, store string, log *slog.Logger, inboxes ...*Inbox) (*Files, error) {
	if info, err := os.Stat(folder); err != nil {
		return nil, fmt.Errorf("manifests: %w", err)
	} else if !info.IsDir() {
		return nil, fmt.Errorf("manifests: %s is not a folder", folder)
	}
	f := &Files{
		folder: folder, store: store, inboxes: inboxes, log: log,
		good: map[string][]Object{}, current: map[inboxKey]Object{},
		assigned: map[string]assignedAddresses{}, told: map[string]string{}, twice: map[string]string{},
	}
	content, err := os.ReadFile(store)
	switch {
	case errors.Is(err, os.ErrNotExist):
	case err != nil:
		return nil, fmt.Errorf("assignments of the last run: %w", err)
	default:
		if err := json.Unmarshal(content, &f.assigned); err != nil {
			return nil, fmt.Errorf("assignments of the last run: %s: %w", store, err)
		}
		if f.assigned == nil { // the file says null
			f.assigned = map[string]assignedAddresses{}
		}
	}
	return f, nil
}

// settleFiles is how long a folder must be quiet before it is read: an editor writes a file in several steps.
const settleFiles = 100 * time.Millisecond

// Run reads the folder now and whenever something in it changes, until ctx ends.
func (f *Files) Run(ctx context.Context) error {
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("watch %s: %w", f.folder, err)
	}
	defer func() { _ = watcher.Close() }()
	if err := watcher.Add(f.folder); err != nil {
		return fmt.Errorf("watch %s: %w", f.folder, err)
	}
	f.read()
	for _, i := range f.inboxes {
		i.Synced()
	}
	quiet := time.NewTimer(0)
	quiet.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-watcher.Events:
			quiet.Reset(settleFiles)
		case err := <-watcher.Errors:
			f.log.Warn("watching manifests", "error", err)
			quiet.Reset(settleFiles) // something may have been missed
		case <-quiet.C:
			f.read()
		}
	}
}

// read brings the inboxes to what the files say.
func (f *Files) read() {
	f.mu.Lock()
	defer f.mu.Unlock()
	names, err := manifestFiles(f.folder)
	if err != nil {
		f.log.Error("manifests stay as they were", "error", err)
		return
	}
	gone := func(name string) bool { return !slices.Contains(names, name) }
	maps.DeleteFunc(f.good, func(name string, _ []Object) bool { return gone(name) })
	maps.DeleteFunc(f.told, func(name, _ string) bool { return gone(name) })
	maps.DeleteFunc(f.twice, func(name, _ string) bool { return gone(name) })
	for _, name := range names {
		objects, err := readManifests(name)
		if err != nil {
			f.tell(f.told, name, "manifest refused, its last good content stays in use", err)
			continue
		}
		delete(f.told, name)
		f.good[name] = objects
	}
	wanted, origin := map[inboxKey]Object{}, map[inboxKey]string{}
	for _, name := range names {
		var twice []error
		for _, o := range f.good[name] {
			key := inboxKey{reflect.TypeOf(o), nameOf(o)}
			if first, ok := origin[key]; ok {
				twice = append(twice, fmt.Errorf("%s: %s %s is in %s already", name, kindOf(o), nameOf(o), first))
				continue
			}
			wanted[key], origin[key] = o, name
		}
		f.tell(f.twice, name, "object is there twice, the first one is used", errors.Join(twice...))
	}
	f.forget(wanted)
	for key, o := range wanted {
		if old, ok := f.current[key]; !ok || !reflect.DeepEqual(old, o) {
			f.put(o)
		}
	}
	for key, o := range f.current {
		if _, ok := wanted[key]; !ok {
			for _, i := range f.inboxes {
				i.Remove(o)
			}
		}
	}
	f.current = wanted
}

// tell logs what is wrong with a file, once for each new reason.
func (f *Files) tell(told map[string]string, name, message string, err error) {
	switch {
	case err == nil:
		delete(told, name)
	case told[name] != err.Error():
		told[name] = err.Error()
		f.log.Error(message, "error", err)
	}
}

// forget drops the addresses of Services that are no longer there or no longer want any, before they are put anywhere:
// by the time they are back the addresses may be somebody else's. What a file that cannot be read has in it is not known.
func (f *Files) forget(wanted map[inboxKey]Object) {
	if len(f.told) > 0 {
		return
	}
	balanced := map[string]bool{}
	for _, o := range wanted {
		if svc, ok := o.(*corev1.Service); ok && svc.Spec.Type == corev1.ServiceTypeLoadBalancer {
			balanced[nameOf(svc).String()] = true
		}
	}
	before := len(f.assigned)
	maps.DeleteFunc(f.assigned, func(service string, _ assignedAddresses) bool { return !balanced[service] })
	if len(f.assigned) != before {
		if err := f.keep(); err != nil {
			f.log.Error("addresses of Services that are gone are not forgotten", "error", err)
		}
	}
}

// keep writes the addresses assigned to their file.
func (f *Files) keep() error {
	content, err := json.MarshalIndent(f.assigned, "", "  ")
	if err != nil {
		return err
	}
	if err := replaceFile(f.store, content); err != nil {
		return fmt.Errorf("keep assignments: %w", err)
	}
	return nil
}

// put hands an object on, a Service with the addresses it was given.
func (f *Files) put(o Object) {
	if svc, ok := o.(*corev1.Service); ok {
		o = f.withStatus(svc)
	}
	for _, i := range f.inboxes {
		i.Put(o)
	}
}

func (f *Files) withStatus(svc *corev1.Service) *corev1.Service {
	svc = svc.DeepCopy()
	a, ok := f.assigned[nameOf(svc).String()]
	if ok && svc.Spec.Type == corev1.ServiceTypeLoadBalancer {
		svc.Status.LoadBalancer.Ingress = ingressWith(svc, a.Addresses)
		if svc.Annotations == nil {
			svc.Annotations = map[string]string{}
		}
		svc.Annotations[AllocatedFromAnnotation] = a.Pool
	}
	return svc
}

// WriteAddresses is a StatusWriter's.
func (f *Files) WriteAddresses(_ context.Context, svc *corev1.Service, addrs []netip.Addr, pool string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	key := nameOf(svc).String()
	delete(f.assigned, key)
	if len(addrs) > 0 {
		f.assigned[key] = assignedAddresses{addrs, pool}
	}
	if err := f.keep(); err != nil {
		return err
	}
	if o, ok := f.current[inboxKey{reflect.TypeFor[*corev1.Service](), nameOf(svc)}]; ok {
		f.put(o)
	}
	return nil
}

// WritePool is a StatusWriter's; there is nobody to read a pool's status.
func (f *Files) WritePool(context.Context, *v1beta1.IPAddressPool) error { return nil }

// WriteCondition is a StatusWriter's, likewise.
func (f *Files) WriteCondition(context.Context, Object, metav1.Condition) error { return nil }

// replaceFile writes a file so that a crash leaves the old or the new content.
func replaceFile(name string, content []byte) error {
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(name+".new", content, 0o600); err != nil {
		return err
	}
	return os.Rename(name+".new", name)
}

func manifestFiles(folder string) ([]string, error) {
	entries, err := os.ReadDir(folder)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if slices.Contains([]string{".yaml", ".yml", ".json"}, filepath.Ext(e.Name())) {
			names = append(names, filepath.Join(folder, e.Name()))
		}
	}
	return names, nil
}

// readManifests reads and validates the objects of one file. Errors name the file, the document and the field.
func readManifests(name string) ([]Object, error) {
	content, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	var objects []Object
	var errs []error
	documents := yaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(content)))
	for number := 1; ; number++ {
		document, err := documents.Read()
		if errors.Is(err, io.EOF) {
			break
		}
		if err == nil && isEmpty(document) {
			continue
		}
		var o Object
		if err == nil {
			o, err = decodeManifest(document)
		}
		if err != nil {
			for _, err := range joined(err) {
				errs = append(errs, fmt.Errorf("%s: document %d: %w", name, number, err))
			}
			continue
		}
		objects = append(objects, o)
	}
	return objects, errors.Join(errs...)
}

// joined takes apart what errors.Join made.
func joined(err error) []error {
	if all, ok := err.(interface{ Unwrap() []error }); ok {
		return all.Unwrap()
	}
	return []error{err}
}

// isEmpty tells whether a YAML document has nothing but comments.
func isEmpty(document []byte) bool {
	for line := range bytes.Lines(document) {
		if line = bytes.TrimSpace(line); len(line) > 0 && line[0] != '#' && !bytes.Equal(line, []byte("---")) {
			return false
		}
	}
	return true
}

var strict = serializer.NewCodecFactory(Scheme, serializer.EnableStrict).UniversalDeserializer()

const kindsRead = "standalone reads Service, EndpointSlice, IPAddressPool, L2Advertisement, BGPPeer, BFDProfile, BGPAdvertisement and Community"

// decodeManifest reads one object; a field that its kind does not have is an error.
func decodeManifest(document []byte) (Object, error) {
	o, _, err := strict.Decode(document, nil, nil)
	mistyped := new(json.UnmarshalTypeError)
	switch {
	case err == nil:
	case runtime.IsMissingKind(err): // the error would have the whole document in it
		return nil, errors.New("kind is missing")
	case runtime.IsMissingVersion(err):
		return nil, errors.New("apiVersion is missing")
	case runtime.IsNotRegisteredError(err):
		var kind metav1.TypeMeta
		_ = yaml.Unmarshal(document, &kind) // it was good enough to have its kind looked up
		return nil, fmt.Errorf("kind %s of %s: %s", kind.Kind, kind.APIVersion, kindsRead)
	case errors.As(err, &mistyped):
		return nil, fmt.Errorf("%s: %s where %s should be", mistyped.Field, mistyped.Value, mistyped.Type)
	default:
		return nil, err
	}
	object, ok := o.(Object)
	if !ok { // a list
		return nil, fmt.Errorf("kind %s: %s", o.GetObjectKind().GroupVersionKind().Kind, kindsRead)
	}
	if object.GetNamespace() == "" {
		object.SetNamespace(corev1.NamespaceDefault)
	}
	if object.GetName() == "" {
		return nil, fmt.Errorf("%s: metadata.name is missing", kindOf(object))
	}
	if older, ok := object.(*v1beta1.BGPPeer); ok {
		object = older.Current()
	}
	switch o := object.(type) {
	case *corev1.Service:
		err = completeService(o)
	case *discoveryv1.EndpointSlice:
		err = validateSlice(o)
	case *v1beta1.IPAddressPool:
		_, err = config.ParsePool(o)
	case *v1beta1.L2Advertisement:
		_, err = config.ParseL2Advertisement(o)
	case *v1beta1.BGPAdvertisement:
		_, err = config.ParseBGPAdvertisement(o, nil)
	case *v1beta1.Community:
		_, err = config.ParseCommunity(o)
	case *v1beta2.BGPPeer:
		_, err = config.ParsePeer(o)
	case *v1beta1.BFDProfile:
		_, err = config.ParseBFDProfile(o)
	default:
		err = fmt.Errorf("kind %s: %s", kindOf(object), kindsRead)
	}
	return object, err
}

// completeService does what the API server does to a Service: it validates and sets defaults.
func completeService(svc *corev1.Service) error {
	var errs []error
	wrong := func(field string, value any, why string) {
		errs = append(errs, fmt.Errorf("service %s: %s: %q: %s", nameOf(svc), field, fmt.Sprint(value), why))
	}
	switch svc.Spec.Type {
	case "":
		svc.Spec.Type = corev1.ServiceTypeClusterIP
	case corev1.ServiceTypeClusterIP, corev1.ServiceTypeNodePort, corev1.ServiceTypeLoadBalancer, corev1.ServiceTypeExternalName:
	default:
		wrong("spec.type", svc.Spec.Type, "not ClusterIP, NodePort, LoadBalancer or ExternalName")
	}
	if len(svc.Spec.ClusterIPs) == 0 && svc.Spec.ClusterIP != "" {
		svc.Spec.ClusterIPs = []string{svc.Spec.ClusterIP}
	}
	for i, text := range svc.Spec.ClusterIPs {
		if _, err := netip.ParseAddr(text); err != nil && text != corev1.ClusterIPNone {
			wrong(fmt.Sprintf("spec.clusterIPs[%d]", i), text, "not an IP address")
		}
	}
	for i, text := range svc.Spec.ExternalIPs {
		if _, err := netip.ParseAddr(text); err != nil {
			wrong(fmt.Sprintf("spec.externalIPs[%d]", i), text, "not an IP address")
		}
	}
	if len(svc.Spec.IPFamilies) == 0 {
		svc.Spec.IPFamilies = []corev1.IPFamily{corev1.IPv4Protocol}
		if p := svc.Spec.IPFamilyPolicy; p != nil && *p != corev1.IPFamilyPolicySingleStack {
			svc.Spec.IPFamilies = append(svc.Spec.IPFamilies, corev1.IPv6Protocol)
		}
	}
	if len(svc.Spec.Ports) == 0 && svc.Spec.Type != corev1.ServiceTypeExternalName {
		wrong("spec.ports", "", "at least one port is needed")
	}
	names, numbers := map[string]bool{}, map[Port]bool{}
	for i := range svc.Spec.Ports {
		p := &svc.Spec.Ports[i]
		field := fmt.Sprintf("spec.ports[%d]", i)
		p.Protocol = cmp.Or(p.Protocol, corev1.ProtocolTCP)
		if _, ok := protocols[p.Protocol]; !ok {
			wrong(field+".protocol", p.Protocol, "not TCP, UDP or SCTP")
		}
		if p.Port < 1 || p.Port > 65535 {
			wrong(field+".port", p.Port, "not between 1 and 65535")
		}
		if p.NodePort < 0 || p.NodePort > 65535 {
			wrong(field+".nodePort", p.NodePort, "not between 1 and 65535")
		}
		if names[p.Name] {
			wrong(field+".name", p.Name, "every port needs a name of its own")
		}
		names[p.Name] = true
		if number := (Port{p.Protocol, p.Port}); numbers[number] {
			wrong(field, number, "is the port of another one already")
		} else {
			numbers[number] = true
		}
	}
	switch svc.Spec.SessionAffinity {
	case "":
		svc.Spec.SessionAffinity = corev1.ServiceAffinityNone
	case corev1.ServiceAffinityNone, corev1.ServiceAffinityClientIP:
	default:
		wrong("spec.sessionAffinity", svc.Spec.SessionAffinity, "not None or ClientIP")
	}
	if c := svc.Spec.SessionAffinityConfig; c != nil && c.ClientIP != nil {
		if seconds := c.ClientIP.TimeoutSeconds; seconds != nil && (*seconds < 1 || *seconds > 86400) {
			wrong("spec.sessionAffinityConfig.clientIP.timeoutSeconds", *seconds, "not between 1 and 86400")
		}
	}
	return errors.Join(errs...)
}

// validateSlice checks what the API server checks of an EndpointSlice.
func validateSlice(s *discoveryv1.EndpointSlice) error {
	var errs []error
	wrong := func(field string, value any, why string) {
		errs = append(errs, fmt.Errorf("EndpointSlice %s: %s: %q: %s", nameOf(s), field, fmt.Sprint(value), why))
	}
	if s.Labels[discoveryv1.LabelServiceName] == "" {
		wrong("metadata.labels["+discoveryv1.LabelServiceName+"]", "", "names the Service and is missing")
	}
	if s.AddressType != discoveryv1.AddressTypeIPv4 && s.AddressType != discoveryv1.AddressTypeIPv6 {
		wrong("addressType", s.AddressType, "not IPv4 or IPv6")
	}
	for i, p := range s.Ports {
		if p.Port == nil || len(validation.IsValidPortNum(int(*p.Port))) > 0 {
			wrong(fmt.Sprintf("ports[%d].port", i), portText(p.Port), "not between 1 and 65535")
		}
	}
	for i, e := range s.Endpoints {
		for j, text := range e.Addresses {
			addr, err := netip.ParseAddr(text)
			if err != nil || addr.Is4() != (s.AddressType == discoveryv1.AddressTypeIPv4) {
				wrong(fmt.Sprintf("endpoints[%d].addresses[%d]", i, j), text, "not an address of family "+string(s.AddressType))
			} else if !addr.IsGlobalUnicast() || addr.Zone() != "" {
				wrong(fmt.Sprintf("endpoints[%d].addresses[%d]", i, j), text, "no address that other machines can have")
			}
		}
	}
	return errors.Join(errs...)
}

func portText(p *int32) string {
	if p == nil {
		return ""
	}
	return fmt.Sprint(*p)
}

// kindOf is the kind of an object that was read from a manifest.
func kindOf(o Object) string { return o.GetObjectKind().GroupVersionKind().Kind }

// StandaloneNode is the Node that a machine without a cluster is.
func StandaloneNode(name string, addrs []netip.Addr) *corev1.Node {
	n := &corev1.Node{}
	n.Name = name
	n.Labels = map[string]string{corev1.LabelHostname: name}
	for _, a := range addrs {
		n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: a.String()})
	}
	n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}}
	return n
}

// LogEvents takes events where there is no API server: they go to the log only, which has them anyway.
type LogEvents struct{ Log *slog.Logger }

// Event logs a normal event; the loops log the warnings they send themselves.
func (e LogEvents) Event(o runtime.Object, eventtype, reason, message string) {
	if object, ok := o.(Object); ok && eventtype == corev1.EventTypeNormal {
		e.Log.Info(message, "object", types.NamespacedName{Namespace: object.GetNamespace(), Name: object.GetName()}.String(), "reason", reason)
	}
}
