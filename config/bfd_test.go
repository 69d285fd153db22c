package config_test

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/longshore-lb/longshore/config"
	"github.com/longshore-lb/longshore/config/v1beta1"
)

func TestParseBFDProfile(t *testing.T) {
	n := func(v uint32) *uint32 { return &v }
	yes, no := true, false
	type spec = v1beta1.BFDProfileSpec
	for _, test := range []struct {
		name   string
		spec   spec
		strict string
		want   config.BFDProfile
		errs   []string // lines, each after "BFDProfile longshore-system/fast: "
	}{
		{name: "nothing", want: config.BFDProfile{Name: "fast", Receive: 300 * time.Millisecond, Transmit: 300 * time.Millisecond, Multiplier: 3, MinimumTTL: 254}},
		{
			name: "everything", strict: "true",
			spec: spec{ReceiveInterval: n(10), TransmitInterval: n(60000), DetectMultiplier: n(255), EchoInterval: n(50), EchoMode: &yes, PassiveMode: &yes, MinimumTTL: n(1)},
			want: config.BFDProfile{
				Name: "fast", Receive: 10 * time.Millisecond, Transmit: time.Minute, Multiplier: 255, MinimumTTL: 1, Echo: true, Passive: true, Strict: true,
			},
		},
		{
			name: "switched off", strict: "false", spec: spec{EchoMode: &no, PassiveMode: &no, DetectMultiplier: n(2), MinimumTTL: n(254)},
			want: config.BFDProfile{Name: "fast", Receive: 300 * time.Millisecond, Transmit: 300 * time.Millisecond, Multiplier: 2, MinimumTTL: 254},
		},
		{
			name: "too little", strict: "yes",
			spec: spec{ReceiveInterval: n(0), TransmitInterval: n(9), DetectMultiplier: n(1), EchoInterval: n(9), MinimumTTL: n(0)},
			errs: []string{
				`spec.receiveInterval: 0: must be between 10 and 60000`,
				`spec.transmitInterval: 9: must be between 10 and 60000`,
				`spec.detectMultiplier: 1: must be between 2 and 255`,
				`spec.minimumTtl: 0: must be between 1 and 254`,
				`spec.echoInterval: 9: must be between 10 and 60000`,
				`annotation longshore.dev/strict: "yes": must be "true" or "false"`,
			},
		},
		{
			name: "too much",
			spec: spec{ReceiveInterval: n(60001), TransmitInterval: n(60001), DetectMultiplier: n(256), EchoInterval: n(60001), MinimumTTL: n(255)},
			errs: []string{
				`spec.receiveInterval: 60001: must be between 10 and 60000`,
				`spec.transmitInterval: 60001: must be between 10 and 60000`,
				`spec.detectMultiplier: 256: must be between 2 and 255`,
				`spec.minimumTtl: 255: must be between 1 and 254`,
				`spec.echoInterval: 60001: must be between 10 and 60000`,
			},
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			from := &v1beta1.BFDProfile{ObjectMeta: meta("fast"), Spec: test.spec}
			if test.strict != "" {
				from.Annotations = map[string]string{config.StrictAnnotation: test.strict}
			}
			got, err := config.ParseBFDProfile(from)
			var want []string
			for _, line := range test.errs {
				want = append(want, "BFDProfile longshore-system/fast: "+line)
			}
			if diff := cmp.Diff(strings.Join(want, "\n"), text(err)); diff != "" {
				t.Errorf("error (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}
