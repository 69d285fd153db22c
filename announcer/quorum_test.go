package announcer_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/longshore-lb/longshore/announcer"
)

func TestPartOf(t *testing.T) {
	for _, test := range []struct {
		expected, alive string
		want            announcer.Part
	}{
		{"", "", announcer.Majority},
		{"a", "a", announcer.Majority},
		{"a", "", announcer.Minority},
		{"a b", "a", announcer.Half},
		{"a b", "b a", announcer.Majority},
		{"a b c", "a", announcer.Minority},
		{"a b c", "a c", announcer.Majority},
		{"a b c d", "d c", announcer.Half},
		{"a b c d", "d", announcer.Minority},
		{"a b c d", "d c a", announcer.Majority},
		{"a b", "a c d e", announcer.Half}, // those that nobody expects do not count
	} {
		if got := announcer.PartOf(strings.Fields(test.expected), strings.Fields(test.alive)); got != test.want {
			t.Errorf("%q of %q is part %d, want %d", test.alive, test.expected, got, test.want)
		}
	}
}

// TestPartsOfSplit holds for every split of up to 7 agents that at most one side goes on, or both know that they are a half.
func TestPartsOfSplit(t *testing.T) {
	for n := 1; n <= 7; n++ {
		for split := range 1 << n {
			var all []string
			var sides [2][]string
			for i := range n {
				name := fmt.Sprint(i)
				all = append(all, name)
				sides[split>>i&1] = append(sides[split>>i&1], name)
			}
			parts := [2]announcer.Part{announcer.PartOf(all, sides[0]), announcer.PartOf(all, sides[1])}
			want := map[[2]announcer.Part]bool{
				{announcer.Majority, announcer.Minority}: true, {announcer.Minority, announcer.Majority}: true, {announcer.Half, announcer.Half}: true,
			}
			if !want[parts] {
				t.Errorf("sides %v are parts %v", sides, parts)
			}
		}
	}
}
