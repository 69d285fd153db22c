package main

import (
	"cmp"
	"fmt"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// ours is the proxy that the others are compared with.
const ours = "longshore"

// columns is the order of the table.
var columns = []string{ours, "kube-proxy-nftables", "kube-proxy-ipvs", limit, "minimum"}

// figure is one thing measured of one proxy.
type figure struct {
	name     string // such as change-1000-p50
	proxy    string
	value    float64
	unit     string
	exceeded bool // it did not finish: the true value is more than this one
	more     bool // more is better
}

func seconds(d time.Duration) float64 { return d.Seconds() }
func millis(d time.Duration) float64  { return d.Seconds() * 1000 }

func (f figure) String() string {
	if f.exceeded {
		return ">" + number(f.value)
	}
	return number(f.value)
}

// number has three digits that count.
func number(v float64) string {
	if v == 0 || math.Abs(v) >= 100 {
		return strconv.FormatFloat(v, 'f', 0, 64)
	}
	return strconv.FormatFloat(v, 'f', max(0, 2-int(math.Floor(math.Log10(math.Abs(v))))), 64)
}

// line compares a peer's figure with ours, nil if there is none: more than 1 is in our favour.
func line(mine *figure, peer figure) string {
	value, ratio := "-", "-"
	if mine != nil {
		value = mine.String()
		a, b := peer.value, mine.value
		if peer.more {
			a, b = b, a
		}
		if b > 0 {
			ratio = number(a / b)
			if peer.exceeded && !mine.exceeded {
				ratio = ">" + ratio
			}
		}
	}
	return fmt.Sprintf("BENCH %s/%s ours=%s peer=%s unit=%s ratio=%s", peer.name, peer.proxy, value, peer, peer.unit, ratio)
}

// percentile is the smallest value that p percent of all are not above (nearest rank). It sorts all, which has at least one.
func percentile(all []time.Duration, p float64) time.Duration {
	slices.Sort(all)
	rank := int(math.Ceil(p / 100 * float64(len(all))))
	return all[min(max(rank, 1), len(all))-1]
}

// report collects figures, prints them as they come, and keeps them in a file. It is safe for concurrent use.
type report struct {
	mu    sync.Mutex
	file  string
	about []string // lines that describe machine and run
	rows  []string // names in the order of their first figure
	cells map[string]map[string]figure
	notes []string // what failed or was left out
}

// add takes a figure; longshore's comes before those it is compared with.
func (r *report) add(f figure) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.cells[f.name] == nil {
		r.cells[f.name] = map[string]figure{}
		r.rows = append(r.rows, f.name)
	}
	r.cells[f.name][f.proxy] = f
	if f.proxy == ours {
		fmt.Printf("      %s: %s %s\n", f.name, f, f.unit)
	} else {
		var mine *figure
		if m, ok := r.cells[f.name][ours]; ok {
			mine = &m
		}
		fmt.Println(line(mine, f))
	}
	r.save()
}

// note keeps what a reader of the table has to know.
func (r *report) note(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	text := fmt.Sprintf(format, args...)
	fmt.Println("      note:", text)
	first, _, _ := strings.Cut(text, "\n")
	r.notes = append(r.notes, first)
	r.save()
}

// save writes the file anew: what is known is not lost if the rest fails.
func (r *report) save() {
	if err := os.WriteFile(r.file, []byte(r.markdown()), 0o644); err != nil {
		fmt.Fprintln(os.Stderr, "bench: write the figures:", err)
	}
}

func (r *report) markdown() string {
	var b strings.Builder
	b.WriteString("# Benchmarks\n\nWritten by `make bench`; [what is measured, and how](../CONTRIBUTING.md#benchmarks).\n\n")
	for _, a := range r.about {
		fmt.Fprintf(&b, "- %s\n", a)
	}
	used := slices.DeleteFunc(slices.Clone(columns), func(c string) bool {
		for _, row := range r.cells {
			if _, ok := row[c]; ok {
				return false
			}
		}
		return true
	})
	fmt.Fprintf(&b, "\n| | unit | %s |\n|---|---|%s\n", strings.Join(used, " | "), strings.Repeat("---:|", len(used)))
	for _, name := range r.rows {
		var unit string
		var cells []string
		for _, c := range used {
			f, ok := r.cells[name][c]
			cells = append(cells, map[bool]string{true: f.String(), false: ""}[ok])
			unit = cmp.Or(unit, f.unit)
		}
		fmt.Fprintf(&b, "| %s | %s | %s |\n", name, unit, strings.Join(cells, " | "))
	}
	for i, n := range r.notes {
		if i == 0 {
			b.WriteString("\nWhat failed or was left out:\n\n")
		}
		fmt.Fprintf(&b, "- %s\n", n)
	}
	return b.String()
}
