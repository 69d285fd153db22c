// Command inlab runs a program on a kernel that has IPVS, and is what `go test -exec` runs the kernel tests with:
//
//	inlab [flags] [--] PROGRAM [ARGUMENTS...]
//
// As root on a kernel that has IPVS, or can load it, it becomes the program. Elsewhere it runs the program in a virtual
// machine that looks like this host; package e2e/kernel says what that is and needs. Either way the program keeps its
// working directory, its streams (a terminal too: `inlab bash`) and its exit status, and finds in its environment
//
//	LONGSHORE_LAB      host or vm: where it runs
//	LONGSHORE_LAB_OUT  a folder that outlives it, the same on the host
//
// Exit status 125 is inlab's own: the program could not be run to its end, and standard error says why.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/term"

	"github.com/longshore-lb/longshore/e2e/kernel"
)

// statusOwn is the exit status of inlab's own failures, as env(1) and its kind have it.
const statusOwn = 125

func main() {
	kernel.Init()
	status, err := lab()
	var ended signalled
	switch {
	case errors.As(err, &ended):
		os.Exit(128 + int(ended.signal.(syscall.Signal)))
	case err != nil:
		fmt.Fprintln(os.Stderr, "inlab:", err)
		os.Exit(statusOwn)
	}
	os.Exit(status)
}

func lab() (status int, err error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return 0, err
	}
	cache = filepath.Join(cache, "longshore")
	machine := kernel.Machine{
		Cache: filepath.Join(cache, "kernel"),
		CPUs:  min(runtime.NumCPU(), 4),
		KVM:   os.Getenv("LONGSHORE_LAB_KVM") == "1",
		Log:   slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{ReplaceAttr: withoutTime})).With("by", "inlab"),
	}
	always := flag.Bool("vm", false, "use a virtual machine even if this kernel has IPVS")
	flag.StringVar(&machine.Memory, "m", env("LONGSHORE_LAB_MEMORY", "6G"), "`memory` of the virtual machine, as QEMU takes it (environment LONGSHORE_LAB_MEMORY)")
	flag.StringVar(&machine.Out, "out", env("LONGSHORE_LAB_OUT", filepath.Join(cache, "out")), "`folder` shared with the virtual machine (environment LONGSHORE_LAB_OUT)")
	flag.Usage = func() {
		fmt.Fprintln(flag.CommandLine.Output(), "usage: inlab [flags] [--] PROGRAM [ARGUMENTS...]")
		flag.PrintDefaults()
	}
	flag.Parse()
	if flag.NArg() == 0 {
		flag.Usage()
		return 2, nil
	}
	if machine.Out, err = filepath.Abs(machine.Out); err != nil {
		return 0, err
	}
	if err := os.MkdirAll(machine.Out, 0o755); err != nil {
		return 0, err
	}
	command, err := command(flag.Args())
	if err != nil {
		return 0, err
	}
	os.Setenv("LONGSHORE_LAB_OUT", machine.Out)

	var unusable error
	if !*always {
		if unusable = kernel.Usable(); unusable == nil {
			os.Setenv("LONGSHORE_LAB", env("LONGSHORE_LAB", "host")) // it is vm within one
			return 0, syscall.Exec(command.Path, command.Args, os.Environ())
		}
	}
	os.Setenv("LONGSHORE_LAB", "vm")
	command.Env = os.Environ()
	ctx, cancel := context.WithCancelCause(context.Background())
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	go func() { cancel(signalled{<-signals}) }()
	status, err = machine.Run(ctx, command)
	if lacks := new(kernel.MissingError); errors.As(err, &lacks) && unusable != nil {
		err = fmt.Errorf("this kernel cannot be used: %s\n%w", strings.ReplaceAll(unusable.Error(), "\n", "; "), err)
	}
	return status, err
}

// command finds the program and gives it this process's surroundings. The folders of the administrator's programs
// are searched too: the tests use them, and in the virtual machine everyone is root.
func command(args []string) (kernel.Command, error) {
	os.Setenv("PATH", os.Getenv("PATH")+":/usr/local/sbin:/usr/sbin:/sbin")
	os.Unsetenv("TMPDIR") // a folder of the host
	path, err := exec.LookPath(args[0])
	if err == nil {
		path, err = filepath.Abs(path)
	}
	if err != nil {
		return kernel.Command{}, err
	}
	dir, err := os.Getwd()
	if err != nil {
		return kernel.Command{}, err
	}
	c := kernel.Command{Path: path, Args: args, Dir: dir, Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr}
	if term.IsTerminal(int(os.Stdin.Fd())) && term.IsTerminal(int(os.Stdout.Fd())) {
		c.Terminal = os.Stdin
	}
	return c, nil
}

// signalled is why a run was given up.
type signalled struct{ signal os.Signal }

func (s signalled) Error() string { return s.signal.String() }

func withoutTime(_ []string, a slog.Attr) slog.Attr {
	if a.Key == slog.TimeKey {
		return slog.Attr{}
	}
	return a
}

// env is an environment variable, or a default if it is unset or empty.
func env(name, otherwise string) string {
	if value := os.Getenv(name); value != "" {
		return value
	}
	return otherwise
}
