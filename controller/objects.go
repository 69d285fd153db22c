package controller

import (
	"fmt"
	"maps"
	"slices"

	"k8s.io/apimachinery/pkg/types"

	"github.com/longshore-lb/longshore/config"
	"github.com/longshore-lb/longshore/config/v1beta1"
)

// lastGood is objects of one kind, parsed, as they were when they were last right.
type lastGood[T any] map[types.NamespacedName]T

// goodObjects is what an agent keeps of each kind.
type goodObjects struct {
	layer2      lastGood[config.L2Advertisement]
	bgp         lastGood[config.BGPAdvertisement]
	communities lastGood[[]config.Alias]
	profiles    lastGood[config.BFDProfile]
	peers       lastGood[watchedPeer]
}

func newGoodObjects() goodObjects {
	return goodObjects{
		layer2:      lastGood[config.L2Advertisement]{},
		bgp:         lastGood[config.BGPAdvertisement]{},
		communities: lastGood[[]config.Alias]{},
		profiles:    lastGood[config.BFDProfile]{},
		peers:       lastGood[watchedPeer]{},
	}
}

// inUse parses objects and returns what of them is in use, in the order of their names: each as it is or, if it is wrong, as it
// was when it was last right. Those that are wrong are reported.
func inUse[O Object, T any](good lastGood[T], objects map[types.NamespacedName]O, parse func(O) (T, error), report func(Object, error)) []T {
	maps.DeleteFunc(good, func(name types.NamespacedName, _ T) bool { _, there := objects[name]; return !there })
	var out []T
	for _, o := range sorted(objects) {
		if parsed, err := parse(o); err != nil {
			report(o, err)
		} else {
			good[nameOf(o)] = parsed
		}
		if parsed, ok := good[nameOf(o)]; ok {
			out = append(out, parsed)
		}
	}
	return out
}

// aliasesOf is the names that Community objects in use give. Of two that give one name the older counts, and the other is
// reported.
func aliasesOf(good lastGood[[]config.Alias], objects map[types.NamespacedName]*v1beta1.Community, report func(Object, error)) config.Aliases {
	inUse(good, objects, config.ParseCommunity, report)
	oldest := slices.SortedStableFunc(slices.Values(sorted(objects)), func(a, b *v1beta1.Community) int {
		return a.CreationTimestamp.Compare(b.CreationTimestamp.Time)
	})
	aliases, owner := config.Aliases{}, map[string]types.NamespacedName{}
	for _, o := range oldest {
		for i, alias := range good[nameOf(o)] {
			if other, taken := owner[alias.Name]; taken {
				report(o, fmt.Errorf("Community %s: spec.communities[%d].name: %q: is a name in Community %s already", nameOf(o), i, alias.Name, other))
				continue
			}
			aliases[alias.Name], owner[alias.Name] = alias.Value, nameOf(o)
		}
	}
	return aliases
}
