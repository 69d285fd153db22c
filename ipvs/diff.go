package ipvs

import (
	"cmp"
	"errors"
	"fmt"
	"iter"
	"net/netip"
	"slices"
	"strings"
)

// Verb is what an operation does.
type Verb uint8

// The verbs. Update changes the value of something that stays.
const (
	Add Verb = iota + 1
	Update
	Delete
)

// Kind is what an operation is about.
type Kind uint8

// The kinds, one for each map of a [State].
const (
	KindElement Kind = iota + 1
	KindVirtualServer
	KindRealServer
	KindRoute
)

// Operation is one change of one object in the kernel. Only the fields of its kind are set; a real server's
// operation has its virtual server's frontend in VirtualServer.Frontend. Operations are comparable.
type Operation struct {
	Verb          Verb
	Kind          Kind
	Element       Element
	VirtualServer VirtualServer
	RealServer    RealServer
	Route         netip.Prefix
	Source        netip.Addr // of a route

	rank uint32 // among the real servers of one virtual server, see [Desired]
}

// ErrForeign says that a virtual server is there already and is somebody else's. It is left alone.
var ErrForeign = errors.New("a virtual server that is not longshore's is there already")

// Failure is an operation that could not be done.
type Failure struct {
	Operation Operation
	Err       error // names the operation
}

// String is the operation as the field's own tools take it: ipvsadm, ip route, nft.
func (o Operation) String() string {
	switch o.Kind {
	case KindElement:
		return fmt.Sprintf("%s element %s", o.verb("add", "add", "delete"), o.Element)
	case KindRoute:
		s := fmt.Sprintf("%s local %s dev lo", o.verb("add", "replace", "del"), o.Route)
		if o.Verb != Delete && o.Source.IsValid() {
			s += " src " + o.Source.String()
		}
		return "ip route " + s + " table local"
	case KindVirtualServer:
		line := SaveLine(o.VirtualServer)
		if o.Verb == Delete {
			return "-D " + serviceArguments(line)
		}
		return o.verb("-A", "-E", "") + strings.TrimPrefix(line, "-A")
	case KindRealServer:
		line := SaveServerLine(o.VirtualServer.Frontend, o.RealServer)
		if o.Verb == Delete {
			return "-d " + serviceArguments(line) + " -r " + o.RealServer.Addr.String()
		}
		return o.verb("-a", "-e", "") + strings.TrimPrefix(line, "-a")
	}
	return fmt.Sprintf("unknown operation %d on kind %d", o.Verb, o.Kind)
}

// quiets tells whether the operation takes a real server's share of new connections from it. Others get theirs first.
func (o *Operation) quiets() bool {
	return o.Kind == KindRealServer && o.Verb == Update && o.RealServer.Weight == 0
}

func (o Operation) verb(add, update, del string) string {
	return [...]string{Add: add, Update: update, Delete: del}[o.Verb]
}

// serviceArguments cuts "-t 10.0.0.1:80" or "-f 7 -6" out of a line in ipvsadm -S syntax.
func serviceArguments(line string) string {
	words := strings.Fields(line)
	if len(words) > 3 && words[3] == "-6" {
		return strings.Join(words[1:4], " ")
	}
	return strings.Join(words[1:3], " ")
}

// String is the element as nft lists it, with its family and set.
func (e Element) String() string {
	family := "ip"
	if e.IPv6() {
		family = "ip6"
	}
	value := e.Prefix.String()
	switch {
	case e.OfFrontend():
		value = fmt.Sprintf("%s . %s . %d", e.Frontend.Addr.Addr(), strings.ToLower(e.Frontend.Protocol.String()), e.Frontend.Addr.Port())
		if e.Set == Allowed {
			value += " . " + e.Prefix.String()
		}
		if e.Set == Shortcuts {
			value += fmt.Sprintf(" : %#x", e.Mark)
		}
	case e.Set == Hairpin:
		value = fmt.Sprintf("%s . %s", e.Prefix.Addr(), e.Prefix.Addr())
	case e.Prefix.IsSingleIP():
		value = e.Prefix.Addr().String()
	}
	return fmt.Sprintf("%s longshore %s { %s }", family, e.Set, value)
}

// Diff is what turns observed into desired, in an order in which no frontend that both states serve is ever
// without a virtual server, or without a real server that takes connections, no packet reaches an address before its virtual server is there, and nothing
// that is ours is without its mark of ownership: elements, virtual servers, real servers and routes are
// added in this order, and deleted in the opposite one. The order is total: equal states give equal operations.
func Diff(observed, desired State) []Operation {
	return order(difference(observed, desired))
}

// difference is the operations of Diff before they are ordered.
func difference(observed, desired State) (add, del []Operation) {
	if n := desired.size() - observed.size(); n > 0 {
		add = make([]Operation, 0, n)
	}
	var added map[Element][]Element // to sets whose elements may be in each other's way
	for e := range desired.Elements {
		if _, ok := observed.Elements[e]; !ok {
			add = append(add, Operation{Verb: Add, Kind: KindElement, Element: e})
			if e.exclusive() {
				if added == nil {
					added = map[Element][]Element{}
				}
				added[e.key()] = append(added[e.key()], e)
			}
		}
	}
	for e := range observed.Elements {
		if _, ok := desired.Elements[e]; ok {
			continue
		}
		o := Operation{Verb: Delete, Kind: KindElement, Element: e}
		if slices.ContainsFunc(added[e.key()], e.excludes) {
			add = append(add, o) // what is in the way goes in the same transaction
		} else {
			del = append(del, o)
		}
	}
	for f, v := range desired.VirtualServers {
		if have, ok := observed.VirtualServers[f]; !ok {
			add = append(add, Operation{Verb: Add, Kind: KindVirtualServer, VirtualServer: v})
		} else if have != v {
			add = append(add, Operation{Verb: Update, Kind: KindVirtualServer, VirtualServer: v})
		}
		add, del = diffRealServers(f, observed.RealServers[f], desired.RealServers[f], add, del)
	}
	for f, v := range observed.VirtualServers {
		if _, ok := desired.VirtualServers[f]; !ok { // its real servers go with it
			del = append(del, Operation{Verb: Delete, Kind: KindVirtualServer, VirtualServer: v})
		}
	}
	for p, src := range desired.Routes {
		if have, ok := observed.Routes[p]; !ok {
			add = append(add, Operation{Verb: Add, Kind: KindRoute, Route: p, Source: src})
		} else if have != src {
			add = append(add, Operation{Verb: Update, Kind: KindRoute, Route: p, Source: src})
		}
	}
	for p, src := range observed.Routes {
		if _, ok := desired.Routes[p]; !ok {
			del = append(del, Operation{Verb: Delete, Kind: KindRoute, Route: p, Source: src})
		}
	}
	return add, del
}

func order(add, del []Operation) []Operation {
	out := make([]Operation, 0, len(add)+len(del))
	for _, o := range slices.SortedFunc(pointers(add), (*Operation).compare) {
		out = append(out, *o)
	}
	for _, o := range slices.SortedFunc(pointers(del), func(a, b *Operation) int { return b.compare(a) }) {
		out = append(out, *o)
	}
	return out
}

// pointers is where operations are: they are large, and a sort would move each many times.
func pointers(ops []Operation) iter.Seq[*Operation] {
	return func(yield func(*Operation) bool) {
		for i := range ops {
			if !yield(&ops[i]) {
				return
			}
		}
	}
}

// exclusive tells whether an element's set holds no two that are alike: a map holds a key once, and ranges do not overlap.
func (e Element) exclusive() bool {
	switch e.Set {
	case Shortcuts, Allowed, ServiceCIDRs, Pods, Kept:
		return true
	}
	return false
}

// key is what elements that may exclude each other have in common.
func (e Element) key() Element { return Element{Set: e.Set, Frontend: e.Frontend} }

// excludes tells whether two elements of one key cannot be in their set at the same time.
func (e Element) excludes(f Element) bool {
	return e.exclusive() && (!e.Prefix.IsValid() || e.Prefix.Overlaps(f.Prefix))
}

// size is how many objects a state has.
func (s State) size() int {
	n := len(s.VirtualServers) + len(s.Routes) + len(s.Elements)
	for _, reals := range s.RealServers {
		n += len(reals)
	}
	return n
}

// diffRealServers appends what is to be done about the real servers of a frontend.
func diffRealServers(f Frontend, observed, desired map[netip.AddrPort]RealServer, add, del []Operation) ([]Operation, []Operation) {
	of := VirtualServer{Frontend: f}
	for addr, r := range desired {
		if have, ok := observed[addr]; !ok {
			add = append(add, Operation{Verb: Add, Kind: KindRealServer, VirtualServer: of, RealServer: r})
		} else if have != r {
			add = append(add, Operation{Verb: Update, Kind: KindRealServer, VirtualServer: of, RealServer: r})
		}
	}
	for addr, r := range observed {
		if _, ok := desired[addr]; !ok {
			del = append(del, Operation{Verb: Delete, Kind: KindRealServer, VirtualServer: of, RealServer: r})
		}
	}
	return add, del
}

// compare orders operations by kind, then by what they are about.
func (o *Operation) compare(p *Operation) int {
	switch {
	case o.Kind != p.Kind:
		return cmp.Compare(o.Kind, p.Kind)
	case o.Kind == KindElement:
		return cmp.Or(
			cmp.Compare(o.Element.Set, p.Element.Set),
			o.Element.Frontend.Compare(p.Element.Frontend),
			cmp.Compare(p.Verb, o.Verb), // delete what is in the way, then add
			o.Element.Prefix.Compare(p.Element.Prefix),
		)
	case o.Kind == KindRoute:
		return o.Route.Compare(p.Route)
	case o.quiets() != p.quiets():
		return compareBool(o.quiets(), p.quiets())
	case o.VirtualServer.Frontend != p.VirtualServer.Frontend:
		return o.VirtualServer.Frontend.Compare(p.VirtualServer.Frontend)
	case o.rank != p.rank:
		return cmp.Compare(o.rank, p.rank)
	}
	return o.RealServer.Addr.Compare(p.RealServer.Addr)
}
