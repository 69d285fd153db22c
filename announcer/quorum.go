package announcer

import "slices"

// Part is how many of the agents that should be there an agent reaches.
type Part int

// The parts, from the smallest.
const (
	Minority Part = iota // fewer than half: others may answer for every address
	Half                 // exactly half: so may others, and both must not
	Majority             // more than half: no others can be as many
)

// PartOf tells what part of the agents expected are alive. Of two groups that do not reach each other and expect the same, at
// most one is a Majority; two may be a Half. Nobody expected is a Majority.
func PartOf(expected, alive []string) Part {
	reached := 0
	for _, name := range expected {
		if slices.Contains(alive, name) {
			reached++
		}
	}
	switch rest := len(expected) - reached; {
	case reached == rest && reached > 0:
		return Half
	case reached < rest:
		return Minority
	}
	return Majority
}
