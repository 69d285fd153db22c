// Build makes the programs that the lab runs beside longshore: the control plane of e2e/controlplane and what
// e2e/neighbours pins. Run it from the repository's root: go run ./e2e/build
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"time"

	"github.com/longshore-lb/longshore/e2e/lab"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := lab.Build(ctx, "e2e", report); err != nil {
		fmt.Fprintln(os.Stderr, "build the programs of the lab:", err)
		os.Exit(1)
	}
}

func report(b lab.Built) {
	if b.Cached {
		fmt.Printf("%-24s there already\n", filepath.Base(b.Program))
		return
	}
	fmt.Printf("%-24s built in %v\n", filepath.Base(b.Program), b.Took.Round(time.Second))
}
