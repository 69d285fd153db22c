package controller

import (
	"hash/fnv"

	"k8s.io/apimachinery/pkg/types"

	"github.com/longshore-lb/longshore/ipvs"
)

// marks gives the ports of Services firewall marks. A mark is a hash of what it is for, so that it is the same again after a
// restart, or else the next that is free.
type marks map[uint32]marked

type marked struct {
	service types.NamespacedName
	port    string
}

// of is the mark of a port of a Service, the same each time until it is released.
func (m marks) of(service types.NamespacedName, port string) uint32 {
	is := marked{service, port}
	h := fnv.New32a()
	_, _ = h.Write([]byte(service.String() + "/" + port))
	for n := h.Sum32() % ipvs.Marks; ; n = (n + 1) % ipvs.Marks {
		mark := ipvs.Mark(n)
		if holder, taken := m[mark]; !taken || holder == is {
			m[mark] = is
			return mark
		}
	}
}

// release frees the marks of a Service.
func (m marks) release(service types.NamespacedName) {
	for mark, of := range m {
		if of.service == service {
			delete(m, mark)
		}
	}
}
