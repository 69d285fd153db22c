package controller

import (
	"cmp"
	"iter"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
)

// obstacle is one thing that keeps Services waiting. When it goes, those that wait for it are worth another try, and no
// others. The zero obstacle is everything else that a change of pools may cure.
type obstacle struct {
	addr   netip.Addr      // this address, held by another Service or reserved
	pool   string          // no free address in this pool
	family corev1.IPFamily // of this family
	key    string          // no shared address of this sharing key that is compatible
}

// turn is a Service's place in a queue: older ones first.
type turn struct {
	created int64 // nanoseconds
	key     string
}

func turnOf(r Request) turn { return turn{r.Created.UnixNano(), r.Key} }

func (t turn) compare(u turn) int {
	return cmp.Or(cmp.Compare(t.created, u.created), cmp.Compare(t.key, u.key))
}

// waiting is the Services that lack an address, by what they wait for.
type waiting struct {
	queues map[obstacle][]turn // in order
	// gone is the obstacles that went, each with the last Service that was tried since.
	gone map[obstacle]turn
}

func newWaiting() waiting {
	return waiting{queues: map[obstacle][]turn{}, gone: map[obstacle]turn{}}
}

func (w *waiting) add(t turn, obstacles []obstacle) {
	for _, o := range obstacles {
		queue := w.queues[o]
		if i, found := slices.BinarySearchFunc(queue, t, turn.compare); !found {
			w.queues[o] = slices.Insert(queue, i, t)
		}
	}
}

func (w *waiting) remove(t turn, obstacles []obstacle) {
	for _, o := range obstacles {
		queue := w.queues[o]
		i, found := slices.BinarySearchFunc(queue, t, turn.compare)
		switch {
		case found && len(queue) == 1:
			delete(w.queues, o)
			delete(w.gone, o)
		case found:
			w.queues[o] = slices.Delete(queue, i, i+1)
		}
	}
}

// went notes that an obstacle is gone.
func (w *waiting) went(o obstacle) {
	if len(w.queues[o]) > 0 {
		w.gone[o] = turn{created: -1 << 63}
	}
}

// next returns the oldest Service that has not been tried since an obstacle of it went.
func (w *waiting) next(stillGone func(obstacle) bool) (turn, bool) {
	var (
		oldest turn
		found  bool
	)
	for o, last := range w.gone {
		queue := w.queues[o]
		i, tried := slices.BinarySearchFunc(queue, last, turn.compare)
		if tried {
			i++
		}
		if i == len(queue) || !stillGone(o) {
			delete(w.gone, o)
			continue
		}
		if !found || queue[i].compare(oldest) < 0 {
			oldest, found = queue[i], true
		}
	}
	if !found {
		return turn{}, false
	}
	for o, last := range w.gone {
		if _, queued := slices.BinarySearchFunc(w.queues[o], oldest, turn.compare); queued && last.compare(oldest) < 0 {
			w.gone[o] = oldest
		}
	}
	return oldest, true
}

// Waiting yields the requests of Services without an address (or, if they prefer two families, without the second)
// that may get one now because of what was released, changed or added to the pools since they last failed. The oldest
// comes first. The caller calls [Allocator.Assign] for each before it takes the next, or [Allocator.Release] if the
// Service is gone; and does so before it assigns to newcomers, so that nobody is overtaken.
func (a *Allocator) Waiting() iter.Seq[Request] {
	return func(yield func(Request) bool) {
		for {
			t, ok := a.waiting.next(a.isGone)
			if !ok || !yield(a.holders[t.key].request) {
				return
			}
		}
	}
}

// isGone tells whether it is still true that an obstacle is gone: others may have been quicker.
func (a *Allocator) isGone(o obstacle) bool {
	if o.pool == "" {
		return true
	}
	p := a.pools[o.pool]
	if p == nil {
		return false
	}
	_, free := p.space(o.family).lowest(a.isTaken)
	return free
}
