package ipvs

import (
	"maps"
	"net/netip"
	"slices"
)

// Desired is everything the kernel of a node should hold, kept as what each owner (a Service, or the node
// itself) wants. Its cost per change is that of the owner that changes, whatever the number of owners.
//
// Owners may share addresses: a route or a prefix in a set stays while one owner wants it. A frontend has
// one owner: the first that asked for it keeps it until it lets go, the others wait in line. The zero value
// is ready for use. It is not safe for concurrent use.
type Desired struct {
	wishes   map[string]State
	claims   map[Frontend][]string // owners that ask for a frontend, in the order they came
	routes   map[netip.Prefix][]string
	prefixes map[Element]int // elements by prefix: how many owners want them
}

// Conflict says that an owner did not get a frontend because another one has it.
type Conflict struct {
	Frontend      Frontend
	Owner, Holder string
}

// Replace sets what an owner wants (the zero State: nothing) and returns the operations that follow from it.
func (d *Desired) Replace(owner string, wish State) []Operation {
	return d.ReplaceAll(map[string]State{owner: wish})
}

// ReplaceAll is [Desired.Replace] for several owners at once. What one of them lets go and another one takes over is
// never without an owner, so that a frontend which changes hands keeps its virtual server. Owners that ask for the
// same come in the order of their names.
func (d *Desired) ReplaceAll(wishes map[string]State) []Operation {
	if d.wishes == nil {
		d.wishes = map[string]State{}
		d.claims = map[Frontend][]string{}
		d.routes = map[netip.Prefix][]string{}
		d.prefixes = map[Element]int{}
	}
	var mentioned []State
	for owner, wish := range wishes {
		mentioned = append(mentioned, d.wishes[owner], wish)
	}
	before := d.part(mentioned)
	for owner, wish := range wishes {
		old := d.wishes[owner]
		leave(d.claims, owner, old.VirtualServers, wish.VirtualServers)
		leave(d.routes, owner, old.Routes, wish.Routes)
		for e := range old.Elements {
			d.count(e, -1)
		}
	}
	for _, owner := range slices.Sorted(maps.Keys(wishes)) {
		old, wish := d.wishes[owner], wishes[owner]
		join(d.claims, owner, old.VirtualServers, wish.VirtualServers)
		join(d.routes, owner, old.Routes, wish.Routes)
		for e := range wish.Elements {
			d.count(e, 1)
		}
		if wish.empty() {
			delete(d.wishes, owner)
		} else {
			d.wishes[owner] = wish
		}
	}
	return Diff(before, d.part(mentioned))
}

// count notes that one more owner, or one less, wants an element by prefix.
func (d *Desired) count(e Element, n int) {
	if !e.Prefix.IsValid() {
		return
	}
	if d.prefixes[e] += n; d.prefixes[e] == 0 {
		delete(d.prefixes, e)
	}
}

func (s State) empty() bool {
	return len(s.VirtualServers) == 0 && len(s.Routes) == 0 && len(s.Elements) == 0
}

// leave takes an owner out of the lines of what it no longer wants.
func leave[K comparable, V any](claims map[K][]string, owner string, old, wish map[K]V) {
	for k := range old {
		if _, stays := wish[k]; stays {
			continue
		}
		line := slices.DeleteFunc(slices.Clone(claims[k]), func(o string) bool { return o == owner })
		if len(line) == 0 {
			delete(claims, k)
		} else {
			claims[k] = line
		}
	}
}

// join puts an owner at the end of the lines of what it newly wants.
func join[K comparable, V any](claims map[K][]string, owner string, old, wish map[K]V) {
	for k := range wish {
		if _, had := old[k]; !had {
			claims[k] = append(claims[k], owner)
		}
	}
}

// part is the desired state, as it is now, of all that some wishes mention.
func (d *Desired) part(wishes []State) State {
	var s State
	for _, w := range wishes {
		for f := range w.VirtualServers {
			d.addFrontend(&s, f)
		}
		for p := range w.Routes {
			if line := d.routes[p]; len(line) > 0 {
				s.AddRoute(p, d.wishes[line[0]].Routes[p])
			}
		}
		for e := range w.Elements {
			if d.prefixes[e] > 0 {
				s.addElement(e)
			}
		}
	}
	return s
}

// addFrontend copies what the holder of a frontend wants for it: its virtual server, real servers and elements.
func (d *Desired) addFrontend(s *State, f Frontend) {
	line := d.claims[f]
	if len(line) == 0 {
		return
	}
	wish := d.wishes[line[0]]
	s.AddVirtualServer(wish.VirtualServers[f])
	s.RealServers[f] = wish.RealServers[f]
	for _, set := range []Set{Frontends, Masquerade} {
		e := Element{Set: set, Frontend: f}
		if _, ok := wish.Elements[e]; ok {
			s.addElement(e)
		}
	}
}

// State is the whole desired state. Its cost is that of all owners.
func (d *Desired) State() State {
	var s State
	for f := range d.claims {
		d.addFrontend(&s, f)
	}
	for p, line := range d.routes {
		s.AddRoute(p, d.wishes[line[0]].Routes[p])
	}
	for e := range d.prefixes {
		s.addElement(e)
	}
	return s
}

// Conflicts lists the frontends that an owner asked for and did not get, in order.
func (d *Desired) Conflicts(owner string) []Conflict {
	var out []Conflict
	for _, f := range slices.SortedFunc(maps.Keys(d.wishes[owner].VirtualServers), Frontend.Compare) {
		if holder := d.claims[f][0]; holder != owner {
			out = append(out, Conflict{Frontend: f, Owner: owner, Holder: holder})
		}
	}
	return out
}

// RealServers is how many real servers a frontend should have.
func (d *Desired) RealServers(f Frontend) int {
	if line := d.claims[f]; len(line) > 0 {
		return len(d.wishes[line[0]].RealServers[f])
	}
	return 0
}
