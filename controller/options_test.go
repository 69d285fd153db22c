package controller

import (
	"reflect"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/longshore-lb/longshore/config"
	"github.com/longshore-lb/longshore/ipvs"
)

// TestOptionsOf reads each annotation, alone or with those it depends on. What is wrong is a problem that names the annotation
// and the value, and the last good option stays.
func TestOptionsOf(t *testing.T) {
	usual := Options{Scheduler: "rr", Drain: time.Minute}
	last := Options{
		Scheduler: "mh", Flags: ipvs.SchedFlag2, Upper: 90, Lower: 80, Drain: time.Hour, SlowStart: 7 * time.Second,
		NodeWeights: []NodeWeight{{"last", "", 1}}, PodWeights: true,
	}
	with := func(change func(*Options)) Options {
		o := usual
		change(&o)
		return o
	}
	const (
		scheduler = SchedulerAnnotation
		flags     = SchedulerFlagsAnnotation
		most      = MaxConnectionsAnnotation
		least     = MinConnectionsAnnotation
		drain     = DrainTimeoutAnnotation
		slow      = SlowStartAnnotation
		nodes     = NodeWeightsAnnotation
		pods      = PodWeightsAnnotation
	)
	tests := []struct {
		annotations []string // name, value, name, value
		want        Options
		problems    []string // parts of each, separated by a bar
	}{
		{nil, usual, nil},
		{[]string{"longshore.dev/unknown", "x"}, usual, nil},

		{[]string{scheduler, " wlc "}, with(func(o *Options) { o.Scheduler = "wlc" }), nil},
		{[]string{scheduler, "sh"}, with(func(o *Options) { o.Scheduler, o.Flags = "sh", ipvs.SchedFlag1 }), nil},
		{[]string{scheduler, "best"}, with(func(o *Options) { o.Scheduler, o.Flags = "mh", ipvs.SchedFlag2 }), []string{scheduler + `|"best"|mh stays in use`}},
		{[]string{scheduler, "RR"}, with(func(o *Options) { o.Scheduler, o.Flags = "mh", ipvs.SchedFlag2 }), []string{scheduler + `|"RR"`}},
		{[]string{scheduler, ""}, with(func(o *Options) { o.Scheduler, o.Flags = "mh", ipvs.SchedFlag2 }), []string{scheduler + `|""`}},

		{[]string{scheduler, "sh", flags, "sh-port"}, with(func(o *Options) { o.Scheduler, o.Flags = "sh", ipvs.SchedFlag2 }), nil},
		{[]string{scheduler, "mh", flags, "mh-port, mh-fallback,"}, with(func(o *Options) { o.Scheduler, o.Flags = "mh", ipvs.SchedFlag1|ipvs.SchedFlag2 }), nil},
		{[]string{scheduler, "sh", flags, ""}, with(func(o *Options) { o.Scheduler = "sh" }), nil},
		{[]string{scheduler, "mh", flags, "sh-port"}, with(func(o *Options) { o.Scheduler, o.Flags = "mh", ipvs.SchedFlag2 }), []string{flags + `|"sh-port"|only mh-fallback and mh-port`}},
		{[]string{scheduler, "sh", flags, "mh-port"}, with(func(o *Options) { o.Scheduler, o.Flags = "sh", ipvs.SchedFlag1 }), []string{flags + `|"mh-port"`}},
		{[]string{flags, "mh-port"}, usual, []string{flags + `|"mh-port"|scheduler rr has no flags`}},
		{[]string{scheduler, "best", flags, "mh-fallback"}, with(func(o *Options) { o.Scheduler, o.Flags = "mh", ipvs.SchedFlag1 }), []string{scheduler}},

		{[]string{most, "1"}, with(func(o *Options) { o.Upper = 1 }), nil},
		{[]string{most, "4294967295", least, "4294967294"}, with(func(o *Options) { o.Upper, o.Lower = 1<<32-1, 1<<32-2 }), nil},
		{[]string{most, "10", least, "0"}, with(func(o *Options) { o.Upper = 10 }), nil},
		{[]string{most, "0"}, with(func(o *Options) { o.Upper = 90 }), []string{most + `|"0"|from 1 to 4294967295`}},
		{[]string{most, "4294967296"}, with(func(o *Options) { o.Upper = 90 }), []string{most + `|"4294967296"`}},
		{[]string{most, "1e3"}, with(func(o *Options) { o.Upper = 90 }), []string{most + `|"1e3"`}},
		{[]string{most, "many", least, "85"}, with(func(o *Options) { o.Upper, o.Lower = 90, 85 }), []string{most + `|"many"`}},
		{[]string{most, "100", least, "100"}, with(func(o *Options) { o.Upper, o.Lower = 100, 80 }), []string{least + `|"100"|less than|` + most + ", 100"}},
		{[]string{most, "50", least, "60"}, with(func(o *Options) { o.Upper = 50 }), []string{least + `|"60"`}},
		{[]string{most, "100", least, "-1"}, with(func(o *Options) { o.Upper, o.Lower = 100, 80 }), []string{least + `|"-1"|from 0`}},
		{[]string{least, "5"}, usual, []string{least + `|"5"`}},

		{[]string{drain, "0"}, with(func(o *Options) { o.Drain = 0 }), nil},
		{[]string{drain, "24h"}, with(func(o *Options) { o.Drain = 24 * time.Hour }), nil},
		{[]string{drain, "24h0m1s"}, with(func(o *Options) { o.Drain = time.Hour }), []string{drain + `|"24h0m1s"|from 0s to 24h0m0s`}},
		{[]string{drain, "-1s"}, with(func(o *Options) { o.Drain = time.Hour }), []string{drain + `|"-1s"`}},
		{[]string{drain, "90"}, with(func(o *Options) { o.Drain = time.Hour }), []string{drain + `|"90"`}},

		{[]string{scheduler, "wrr", slow, "1s"}, with(func(o *Options) { o.Scheduler, o.SlowStart = "wrr", time.Second }), nil},
		{[]string{scheduler, "wrr", slow, "1h"}, with(func(o *Options) { o.Scheduler, o.SlowStart = "wrr", time.Hour }), nil},
		{[]string{scheduler, "wrr", slow, "999ms"}, with(func(o *Options) { o.Scheduler, o.SlowStart = "wrr", 7*time.Second }), []string{slow + `|"999ms"|from 1s to 1h0m0s`}},
		{[]string{scheduler, "wrr", slow, "61m"}, with(func(o *Options) { o.Scheduler, o.SlowStart = "wrr", 7*time.Second }), []string{slow + `|"61m"`}},
		{[]string{slow, "1s"}, with(func(o *Options) { o.SlowStart = time.Second }), []string{"scheduler rr does not look at weights"}},

		{
			[]string{scheduler, "wrr", nodes, "a=b:0, example.org/c=:65535,"},
			with(func(o *Options) {
				o.Scheduler, o.NodeWeights = "wrr", []NodeWeight{{"a", "b", 0}, {"example.org/c", "", 65535}}
			}), nil,
		},
		{[]string{nodes, ""}, usual, nil},
		{[]string{scheduler, "wrr", nodes, "a=b"}, with(func(o *Options) { o.Scheduler, o.NodeWeights = "wrr", last.NodeWeights }), []string{nodes + `|"a=b"`}},
		{[]string{scheduler, "wrr", nodes, "a:5"}, with(func(o *Options) { o.Scheduler, o.NodeWeights = "wrr", last.NodeWeights }), []string{nodes + `|"a:5"`}},
		{[]string{scheduler, "wrr", nodes, "a=b:65536"}, with(func(o *Options) { o.Scheduler, o.NodeWeights = "wrr", last.NodeWeights }), []string{nodes + `|"65536"`}},
		{[]string{scheduler, "wrr", nodes, "a b=c:1"}, with(func(o *Options) { o.Scheduler, o.NodeWeights = "wrr", last.NodeWeights }), []string{nodes + `|"a b=c"`}},
		{[]string{scheduler, "wrr", nodes, "a=b c:1"}, with(func(o *Options) { o.Scheduler, o.NodeWeights = "wrr", last.NodeWeights }), []string{nodes + `|"a=b c"`}},
		{[]string{scheduler, "lc", nodes, "a=b:1"}, with(func(o *Options) { o.Scheduler, o.NodeWeights = "lc", []NodeWeight{{"a", "b", 1}} }), []string{"scheduler lc does not"}},

		{[]string{scheduler, "sed", pods, "true"}, with(func(o *Options) { o.Scheduler, o.PodWeights = "sed", true }), nil},
		{[]string{pods, "false"}, usual, nil},
		{[]string{scheduler, "sed", pods, "yes"}, with(func(o *Options) { o.Scheduler, o.PodWeights = "sed", true }), []string{pods + `|"yes"|neither true nor false`}},
		{[]string{scheduler, "dh", pods, "true"}, with(func(o *Options) { o.Scheduler, o.PodWeights = "dh", true }), []string{"scheduler dh does not"}},

		{
			[]string{scheduler, "x", flags, "y", most, "z", least, "v", drain, "u", slow, "t", nodes, "s", pods, "r"}, last,
			[]string{scheduler, flags, most, least, drain, slow, nodes, pods},
		},
	}
	for _, test := range tests {
		t.Run(strings.Join(test.annotations, " "), func(t *testing.T) {
			svc := &corev1.Service{}
			svc.Annotations = map[string]string{}
			for i := 0; i < len(test.annotations); i += 2 {
				svc.Annotations[test.annotations[i]] = test.annotations[i+1]
			}
			got, problems := OptionsOf(svc, usual, last)
			if !reflect.DeepEqual(got, test.want) {
				t.Errorf("options\n%+v, want\n%+v", got, test.want)
			}
			if len(problems) != len(test.problems) {
				t.Fatalf("problems %q, want %d", problems, len(test.problems))
			}
			for i, parts := range test.problems {
				for part := range strings.SplitSeq(parts, "|") {
					if !strings.Contains(problems[i].Message, part) {
						t.Errorf("problem %q does not say %s", problems[i].Message, part)
					}
				}
			}
		})
	}
}

// Each scheduler of the kernel is good, and those that have flags have no others.
func TestSchedulers(t *testing.T) {
	for _, name := range config.Schedulers {
		svc := &corev1.Service{}
		svc.Annotations = map[string]string{SchedulerAnnotation: name, SchedulerFlagsAnnotation: name + "-fallback," + name + "-port"}
		o, problems := OptionsOf(svc, Options{Scheduler: "rr"}, Options{Scheduler: "rr"})
		has := name == "sh" || name == "mh"
		if o.Scheduler != name || (len(problems) == 0) != has || (o.Flags != 0) != has {
			t.Errorf("%s: %+v, problems %q", name, o, problems)
		}
	}
}

func TestParseWeight(t *testing.T) {
	for text, want := range map[string]int32{"0": 0, " 7 ": 7, "65535": 65535, "65536": -1, "-1": -1, "": -1, "heavy": -1, "0x10": -1, "4294967297": -1} {
		got, err := ParseWeight(text)
		if (err != nil) != (want < 0) || err == nil && got != want {
			t.Errorf("%q: %d, %v", text, got, err)
		}
		if err != nil && !strings.Contains(err.Error(), text) {
			t.Errorf("%q: the error %q does not say it", text, err)
		}
	}
}
