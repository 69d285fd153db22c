// Command check runs all tests, as `make test` does: those that need IPVS in the lab's kernel, the others on this machine.
// It prints a line for each package, the whole output of what fails, and how long the parts took. A test that is
// skipped counts as failed: nothing here may be left out silently. Run it from the repository's root.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// module is where package paths begin.
const module = "github.com/longshore-lb/longshore"

// needsIPVS is the packages whose tests run in the lab's kernel, and how long they may take.
var needsIPVS = map[string]string{
	"/ipvs/kernel": "5m",
	"/e2e":         "35m",
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Println("check:", err)
		stop()
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	if os.Geteuid() != 0 {
		return errors.New("root is needed: the tests make network namespaces")
	}
	all, err := packages(ctx)
	if err != nil {
		return err
	}
	began := time.Now()
	var sum tally
	native := slices.DeleteFunc(slices.Clone(all), func(p string) bool { return needsIPVS[strings.TrimPrefix(p, module)] != "" })
	fmt.Println("== tests on this machine")
	if err := sum.test(ctx, append([]string{"-count=1", "-timeout=10m"}, native...)); err != nil {
		return err
	}
	took := []string{part("on this machine", began)}
	inlab, err := filepath.Abs("bin/inlab")
	if err != nil {
		return err
	}
	for _, p := range all {
		timeout := needsIPVS[strings.TrimPrefix(p, module)]
		if timeout == "" {
			continue
		}
		fmt.Printf("== %s in a kernel with IPVS\n", strings.TrimPrefix(p, module+"/"))
		start := time.Now()
		if err := sum.test(ctx, []string{"-count=1", "-timeout=" + timeout, "-exec=" + inlab, p}); err != nil {
			return err
		}
		took = append(took, part(strings.TrimPrefix(p, module+"/"), start))
	}
	fmt.Printf("== time: %s\n", strings.Join(append(took, part("all", began)), ", "))
	fmt.Printf("%d passed, %d failed, %d skipped\n", sum.passed, sum.failed, sum.skipped)
	switch {
	case sum.failed > 0:
		return errors.New("tests failed")
	case sum.skipped > 0:
		return errors.New("tests were skipped, which counts as failed")
	case sum.passed == 0:
		return errors.New("no test ran")
	}
	return nil
}

func part(name string, began time.Time) string {
	return fmt.Sprintf("%s %v", name, time.Since(began).Round(time.Second))
}

func packages(ctx context.Context) ([]string, error) {
	out, err := exec.CommandContext(ctx, "go", "list", "-f", "{{if or .TestGoFiles .XTestGoFiles}}{{.ImportPath}}{{end}}", "./...").Output()
	if err != nil {
		return nil, fmt.Errorf("go list: %w", err)
	}
	return strings.Fields(string(out)), nil
}

// tally counts tests, subtests included.
type tally struct{ passed, failed, skipped int }

// event is a line of go test -json (cmd/test2json).
type event struct {
	Action, Package, Test, Output string
	Elapsed                       float64
}

// test runs go test and prints a line for each package. It fails only if go test itself cannot run.
func (sum *tally) test(ctx context.Context, args []string) error {
	cmd := exec.CommandContext(ctx, "go", append([]string{"test", "-json"}, args...)...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 30 * time.Second
	cmd.Stderr = os.Stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	readErr := sum.read(stdout)
	err = cmd.Wait()
	if exit := new(exec.ExitError); errors.As(err, &exit) && ctx.Err() == nil {
		err = nil // the events told what failed
		if sum.failed == 0 {
			sum.failed++ // it could not even be built
		}
	}
	return errors.Join(readErr, err)
}

func (sum *tally) read(from io.Reader) error {
	outputs := map[string][]string{} // of each package
	counts := map[string]*tally{}
	lines := bufio.NewReader(from)
	for {
		line, err := lines.ReadBytes('\n')
		if len(line) > 0 {
			var e event
			if json.Unmarshal(line, &e) != nil {
				fmt.Print(string(line)) // not an event: what the compiler says
				continue
			}
			if counts[e.Package] == nil {
				counts[e.Package] = &tally{}
			}
			sum.take(e, counts[e.Package], outputs)
		}
		if errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
	}
}

func (sum *tally) take(e event, of *tally, outputs map[string][]string) {
	showScenario(e)
	switch {
	case e.Action == "output" || e.Action == "build-output":
		outputs[e.Package] = append(outputs[e.Package], e.Output)
		if e.Action == "build-output" {
			fmt.Print(e.Output)
		}
	case e.Test != "" && e.Action == "pass":
		of.passed++
	case e.Test != "" && e.Action == "fail":
		of.failed++
	case e.Test != "" && e.Action == "skip":
		of.skipped++
		fmt.Printf("skipped: %s %s\n", e.Package, e.Test)
	case e.Test == "" && (e.Action == "pass" || e.Action == "fail" || e.Action == "skip"):
		if e.Action == "fail" && of.failed == 0 {
			of.failed++ // it did not get as far as a test, or ended between two
		}
		if e.Action == "fail" {
			fmt.Print(strings.Join(outputs[e.Package], ""))
		}
		verdict := map[bool]string{true: "ok  ", false: "FAIL"}[of.failed == 0 && of.skipped == 0]
		fmt.Printf("%s %-32s %4d passed, %d failed, %d skipped in %.0f s\n",
			verdict, strings.TrimPrefix(e.Package, module+"/"), of.passed, of.failed, of.skipped, e.Elapsed)
		sum.passed, sum.failed, sum.skipped = sum.passed+of.passed, sum.failed+of.failed, sum.skipped+of.skipped
	}
}

// showScenario prints the verdict on a scenario as it comes: they take minutes.
func showScenario(e event) {
	name, _, _ := strings.Cut(e.Test, "/")
	depth := map[string]int{"TestScenarios": 1, "TestPodNetworks": 2}[name] // of the scenarios below the test
	if depth > 0 && strings.Count(e.Test, "/") == depth && (e.Action == "pass" || e.Action == "fail") {
		fmt.Printf("     %s %s in %.0f s\n", e.Action, e.Test, e.Elapsed)
	}
}
