// Command bench measures longshore's Service proxy beside kube-proxy, ipvs and nftables mode, on the same API server and
// kernel, in the lab. It is what `make bench` runs; docs/benchmarks.md has its figures and says what they mean.
//
// Sizes are taken in ascending order, so that no Service is loaded twice. At each size every proxy in turn gets a fresh
// node, starts, is measured and goes with its node. A part that fails is reported and does not end the others.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/longshore-lb/longshore/e2e/lab"
)

func main() {
	lab.Main()
	writeLimit()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	o, err := parse()
	if err == nil {
		err = run(ctx, o)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		stop()
		os.Exit(1)
	}
}

// The parts of the benchmark, as -only has them.
const (
	coldstart = "coldstart"
	change    = "change"
	rolling   = "rolling"
	idle      = "idle"
	memory    = "memory"
	datapath  = "datapath"
)

// defaults is at which numbers of Services each part is measured if -sizes does not say.
var defaults = map[string][]int{
	coldstart: {1000, 3000, 10000},
	change:    {100, 1000, 10000},
	rolling:   {100},
	idle:      {10000},
	memory:    {10000},
	datapath:  {1, 1000, 10000},
}

type options struct {
	plan    map[int][]string // the parts at each size
	proxies []string         // of the peers; longshore is always measured

	limit, largeLimit, changeLimit, budget time.Duration
	idle, settle, connect                  time.Duration
	changes, peerChanges, step             int

	out, machine, commit string
}

func parse() (options, error) {
	var o options
	sizes := flag.String("sizes", "", "`numbers` of Services, such as 1000,3000; by default each part has its own")
	only := flag.String("only", "", "`parts` to measure, of coldstart,change,rolling,idle,memory,datapath; by default all")
	peers := flag.String("peers", "kube-proxy-nftables,kube-proxy-ipvs,limit", "what to measure beside longshore")
	flag.DurationVar(&o.limit, "limit", 15*time.Minute, "how long a peer may take for its cold start")
	flag.DurationVar(&o.largeLimit, "large-limit", 8*time.Minute, "the same with 10,000 Services and more")
	flag.DurationVar(&o.changeLimit, "change-limit", 2*time.Minute, "how long all changes of a peer at one size may take; one is always tried")
	flag.DurationVar(&o.budget, "budget", 65*time.Minute, "after this no further proxy is started")
	flag.DurationVar(&o.idle, "idle", 5*time.Minute, "how long to watch an idle proxy")
	flag.DurationVar(&o.settle, "settle", 30*time.Second, "how long after its cold start a proxy's memory is read")
	flag.DurationVar(&o.connect, "connect", 5*time.Second, "how long to connect to each address")
	flag.IntVar(&o.changes, "changes", 200, "number of changes measured of longshore")
	flag.IntVar(&o.peerChanges, "peer-changes", 20, "the same of each peer, at most")
	flag.IntVar(&o.step, "step", 1, "how many endpoints of a Service a rolling update replaces at once, 1 to 10")
	flag.StringVar(&o.out, "out", filepath.Join(os.Getenv("LONGSHORE_LAB_OUT"), "benchmarks.md"), "`file` to write")
	flag.StringVar(&o.machine, "machine", "", "what the processor is, where this program cannot see it")
	flag.StringVar(&o.commit, "commit", "unknown", "version of longshore that is measured")
	flag.Parse()

	o.proxies = strings.Split(*peers, ",")
	for _, p := range o.proxies {
		if p != limit && proxies[p] == nil {
			return o, fmt.Errorf("-peers: %q is none of kube-proxy-nftables,kube-proxy-ipvs,limit", p)
		}
	}
	if o.step < 1 || o.step > perService {
		return o, fmt.Errorf("-step: %d is not between 1 and %d", o.step, perService)
	}
	var err error
	o.plan, err = plan(*sizes, *only)
	return o, err
}

// plan says which parts are measured at which size. If sizes are given, the rolling update is measured at the smallest
// and what is idle at the largest.
func plan(sizes, only string) (map[int][]string, error) {
	var given []int
	for text := range strings.SplitSeq(sizes, ",") {
		if text == "" {
			continue
		}
		n, err := strconv.Atoi(text)
		if err != nil || n < 1 || n > maxServices {
			return nil, fmt.Errorf("-sizes: %q is not a number of Services between 1 and %d", text, maxServices)
		}
		given = append(given, n)
	}
	slices.Sort(given)
	parts := []string{coldstart, memory, change, rolling, idle, datapath}
	if only != "" {
		parts = strings.Split(only, ",")
	}
	p := map[int][]string{}
	for _, part := range parts {
		at, ok := defaults[part]
		if !ok {
			return nil, fmt.Errorf("-only: %q is none of coldstart,change,rolling,idle,memory,datapath", part)
		}
		if len(given) > 0 {
			switch part {
			case rolling:
				at = given[:1]
			case idle, memory:
				at = given[len(given)-1:]
			default:
				at = given
			}
		}
		for _, n := range at {
			p[n] = append(p[n], part)
		}
	}
	return p, nil
}
