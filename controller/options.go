package controller

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/longshore-lb/longshore/config"
	"github.com/longshore-lb/longshore/ipvs"
)

// Annotations on a Service that say how its virtual servers work. docs/services.md explains each.
const (
	SchedulerAnnotation      = "longshore.dev/scheduler"       // one of config.Schedulers
	SchedulerFlagsAnnotation = "longshore.dev/scheduler-flags" // comma list: sh-fallback, sh-port, mh-fallback, mh-port
	MaxConnectionsAnnotation = "longshore.dev/max-connections" // of one endpoint on one node, at which it takes no more; at least 1
	MinConnectionsAnnotation = "longshore.dev/min-connections" // at which it takes some again; less than the above
	DrainTimeoutAnnotation   = "longshore.dev/drain-timeout"   // Go duration, 0 to 24 h
	SlowStartAnnotation      = "longshore.dev/slow-start"      // Go duration, 1 s to 1 h
	NodeWeightsAnnotation    = "longshore.dev/node-weights"    // comma list of LABEL=VALUE:WEIGHT, the first that matches counts
	PodWeightsAnnotation     = "longshore.dev/pod-weights"     // "true": WeightAnnotation of the pods counts
)

// WeightAnnotation on a Pod is its weight in the Services that have PodWeightsAnnotation, 0 to 65535.
const WeightAnnotation = "longshore.dev/weight"

// maxWeight is the largest weight (Documentation/networking/ipvs-sysctl.rst does not say; ipvsadm(8) does).
const maxWeight = 65535

// Options is what a Service's annotations choose, or the agent's configuration for all that choose nothing.
type Options struct {
	Scheduler    string
	Flags        ipvs.Flags
	Upper, Lower uint32        // connections of one real server
	Drain        time.Duration // how long a real server that goes keeps its connections
	SlowStart    time.Duration // over which a new real server comes to its weight; 0 = at once
	NodeWeights  []NodeWeight
	PodWeights   bool
}

// NodeWeight is the weight of endpoints on nodes with a label.
type NodeWeight struct {
	Label, Value string
	Weight       int32
}

// UsualOptions is the options of a Service without annotations.
func UsualOptions(c config.Agent) Options {
	return Options{Scheduler: c.Scheduler, Flags: usualFlags(c.Scheduler), Drain: c.DrainTimeout}
}

// usualFlags is the flags of a scheduler whose flags nobody has chosen. Without sh-fallback, sh refuses the clients of a real
// server that drains.
func usualFlags(scheduler string) ipvs.Flags {
	if scheduler == "sh" {
		return ipvs.SchedFlag1
	}
	return 0
}

// OptionsOf is the options of a Service. Where an annotation is wrong, that is a problem, and lastGood's stays in use.
func OptionsOf(svc *corev1.Service, usual, lastGood Options) (Options, []Problem) {
	o := usual
	var problems []Problem
	// read parses an annotation if there is one; keep restores what it sets from the last good options.
	read := func(name, reason string, parse func(value string) error, keep func()) {
		value, ok := svc.Annotations[name]
		if !ok {
			return
		}
		if err := parse(strings.TrimSpace(value)); err != nil {
			keep()
			problems = append(problems, Problem{reason, fmt.Sprintf("annotation %s: %v", name, err)})
		}
	}
	read(SchedulerAnnotation, "UnknownScheduler", func(v string) error {
		if err := config.CheckScheduler(v); err != nil {
			return fmt.Errorf("%w; %s stays in use", err, lastGood.Scheduler)
		}
		o.Scheduler, o.Flags = v, usualFlags(v)
		return nil
	}, func() { o.Scheduler, o.Flags = lastGood.Scheduler, lastGood.Flags })
	read(SchedulerFlagsAnnotation, "InvalidAnnotation", func(v string) (err error) {
		o.Flags, err = parseFlags(o.Scheduler, v)
		return err
	}, func() {
		if o.Flags = usualFlags(o.Scheduler); o.Scheduler == lastGood.Scheduler {
			o.Flags = lastGood.Flags
		}
	})
	read(MaxConnectionsAnnotation, "InvalidAnnotation", func(v string) (err error) {
		o.Upper, err = parseCount(v, 1)
		return err
	}, func() { o.Upper = lastGood.Upper })
	read(MinConnectionsAnnotation, "InvalidAnnotation", func(v string) (err error) {
		if o.Lower, err = parseCount(v, 0); err == nil && o.Lower >= o.Upper {
			err = fmt.Errorf("%q: must be less than annotation %s, %d", v, MaxConnectionsAnnotation, o.Upper)
		}
		return err
	}, func() {
		if o.Lower = 0; lastGood.Lower < o.Upper {
			o.Lower = lastGood.Lower
		}
	})
	read(DrainTimeoutAnnotation, "InvalidAnnotation", func(v string) (err error) {
		o.Drain, err = parseDuration(v, 0, 24*time.Hour)
		return err
	}, func() { o.Drain = lastGood.Drain })
	read(SlowStartAnnotation, "InvalidAnnotation", func(v string) (err error) {
		o.SlowStart, err = parseDuration(v, time.Second, time.Hour)
		return err
	}, func() { o.SlowStart = lastGood.SlowStart })
	read(NodeWeightsAnnotation, "InvalidAnnotation", func(v string) (err error) {
		o.NodeWeights, err = parseNodeWeights(v)
		return err
	}, func() { o.NodeWeights = lastGood.NodeWeights })
	read(PodWeightsAnnotation, "InvalidAnnotation", func(v string) (err error) {
		if o.PodWeights, err = strconv.ParseBool(v); err != nil {
			err = fmt.Errorf("%q: neither true nor false", v)
		}
		return err
	}, func() { o.PodWeights = lastGood.PodWeights })
	if (o.PodWeights || len(o.NodeWeights) > 0 || o.SlowStart > 0) && slices.Contains(weightless, o.Scheduler) {
		problems = append(problems, Problem{"WeightsIgnored",
			fmt.Sprintf("scheduler %s does not look at weights: choose another by annotation %s, such as wrr or wlc", o.Scheduler, SchedulerAnnotation)})
	}
	return o, problems
}

// weightless is the schedulers that look at a weight only to see whether it is 0 (net/netfilter/ipvs/ip_vs_*.c).
var weightless = []string{"rr", "lc", "dh"}

// parseFlags reads a list of a scheduler's flags, by the names that ipvsadm(8) has for them.
func parseFlags(scheduler, list string) (ipvs.Flags, error) {
	names := map[string]ipvs.Flags{}
	if scheduler == "sh" || scheduler == "mh" {
		names = map[string]ipvs.Flags{scheduler + "-fallback": ipvs.SchedFlag1, scheduler + "-port": ipvs.SchedFlag2}
	}
	var flags ipvs.Flags
	for name := range strings.SplitSeq(list, ",") {
		if name = strings.TrimSpace(name); name == "" {
			continue
		}
		flag, ok := names[name]
		if !ok && len(names) == 0 {
			return 0, fmt.Errorf("%q: scheduler %s has no flags", name, scheduler)
		}
		if !ok {
			return 0, fmt.Errorf("%q: scheduler %[2]s has no such flag, only %[2]s-fallback and %[2]s-port", name, scheduler)
		}
		flags |= flag
	}
	return flags, nil
}

func parseCount(text string, least uint64) (uint32, error) {
	n, err := strconv.ParseUint(text, 10, 32)
	if err != nil || n < least {
		return 0, fmt.Errorf("%q: must be a number from %d to %d", text, least, uint32(1<<32-1))
	}
	return uint32(n), nil
}

func parseDuration(text string, least, most time.Duration) (time.Duration, error) {
	d, err := time.ParseDuration(text)
	if err != nil || d < least || d > most {
		return 0, fmt.Errorf("%q: must be a duration from %v to %v, such as 90s", text, least, most)
	}
	return d, nil
}

// ParseWeight reads a weight.
func ParseWeight(text string) (int32, error) {
	n, err := strconv.ParseUint(strings.TrimSpace(text), 10, 32)
	if err != nil || n > maxWeight {
		return 0, fmt.Errorf("weight %q: must be a number from 0 to %d", text, maxWeight)
	}
	return int32(n), nil
}

func parseNodeWeights(list string) ([]NodeWeight, error) {
	var out []NodeWeight
	for item := range strings.SplitSeq(list, ",") {
		if item = strings.TrimSpace(item); item == "" {
			continue
		}
		selector, weight, ok := cutLast(item, ":")
		label, value, equals := strings.Cut(selector, "=")
		if !ok || !equals {
			return nil, fmt.Errorf("%q is not LABEL=VALUE:WEIGHT", item)
		}
		for _, reason := range slices.Concat(validation.IsQualifiedName(label), validation.IsValidLabelValue(value)) {
			return nil, fmt.Errorf("%q: %s", selector, reason)
		}
		w, err := ParseWeight(weight)
		if err != nil {
			return nil, err
		}
		out = append(out, NodeWeight{label, value, w})
	}
	return out, nil
}

func cutLast(s, sep string) (before, after string, found bool) {
	if i := strings.LastIndex(s, sep); i >= 0 {
		return s[:i], s[i+len(sep):], true
	}
	return s, "", false
}

// weight is that of endpoints on a node with labels.
func (o Options) weight(node labels.Set) int32 {
	for _, w := range o.NodeWeights {
		if node.Has(w.Label) && node[w.Label] == w.Value {
			return w.Weight
		}
	}
	return 1
}

// ramp is the weight of a real server in its slow start. Weights are a hundred times those of the annotations then, so
// that small ones have steps too; less if the heaviest of them would be too large.
func (o Options) ramp(weight, heaviest int32, age time.Duration) int32 {
	if weight == 0 {
		return 0
	}
	whole := int64(weight) * int64(min(100, maxWeight/heaviest))
	if age >= o.SlowStart {
		return int32(whole)
	}
	return int32(max(1, whole*int64(age)/int64(o.SlowStart)))
}
