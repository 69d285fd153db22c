package kernel

import (
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"time"

	"github.com/u-root/u-root/pkg/cpio"
	"golang.org/x/sys/unix"
	"golang.org/x/term"
)

// bootLimit is how long the guest may take until the program runs; 3 seconds is usual, but on an overloaded host a
// boot without KVM has been seen to stall for good.
const bootLimit = 60 * time.Second

// Machine is the virtual machine that programs run in. Only one runs at a time for a cache folder: the next one waits.
type Machine struct {
	// Cache is the folder, made if missing, that holds the kernel and the lock.
	Cache string
	// Out is a folder, made if missing, that host and guest share read-write at the same path. Every other write of
	// the guest stays in its memory and goes with it.
	Out string
	// Memory is the guest's memory as QEMU's -m takes it, such as 6G. The host gives only what is touched.
	Memory string
	// CPUs is the number of virtual processors, at least 1.
	CPUs int
	// KVM uses the processor's virtualization instead of QEMU's translator. That is faster (translated code runs 3 to 4
	// times slower than native), but it is not the default because a /dev/kvm that opens may still hang the guest when
	// the host is itself a virtual machine.
	KVM bool
	// Log is told what takes time: a fetch, another machine's end, a second boot.
	Log *slog.Logger
}

// Command is a program to run in a Machine. All paths are the host's.
type Command struct {
	Path string   // the program, absolute
	Args []string // its arguments, with argv[0]
	Dir  string   // working directory, absolute
	Env  []string // its environment, as os.Environ has it

	Stdin          io.Reader // passed on as it comes, its end too; nil is an empty one
	Stdout, Stderr io.Writer // receive what the program writes, byte for byte

	// Terminal, if set, is used in place of the three streams: the program gets a terminal of its own, of the same
	// size, and this one is raw as long as it runs.
	Terminal *os.File
}

// Run boots the machine, runs the program in it and returns its exit status: 0 to 255, 128+n if signal n ended it.
// The machine is gone afterwards, with whatever the program left running. The error is not nil if the program was not
// run to its end; it is a [MissingError] if the host lacks something. A boot that stalls or dies before the
// program runs is tried once more. When ctx is done, the machine is killed and the error is the cause of ctx.
//
// SIGQUIT is passed on to the program as long as it runs: what go test sends to a test that exceeds its time.
func (m Machine) Run(ctx context.Context, cmd Command) (status int, err error) {
	_, have := cached(m.Cache)
	if lacks := missing(runtime.GOARCH, exec.LookPath, have); len(lacks) > 0 {
		return 0, &MissingError{lacks}
	}
	for _, dir := range []string{m.Cache, m.Out} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return 0, err
		}
	}
	img, err := fetch(ctx, m.Cache, m.Log)
	if err != nil {
		return 0, fmt.Errorf("fetch a kernel: %w", err)
	}
	unlock, err := lock(ctx, filepath.Join(m.Cache, "machine.lock"), func() {
		m.Log.Info("waiting for the virtual machine that runs already")
	})
	if err != nil {
		return 0, err
	}
	defer unlock()

	status, err = m.boot(ctx, img, cmd, "quiet")
	if failed := new(failure); errors.As(err, &failed) && failed.retry {
		m.Log.Warn("the virtual machine did not boot, trying once more", "reason", failed.reason, "console", failed.console)
		status, err = m.boot(ctx, img, cmd, "ignore_loglevel")
	}
	return status, err
}

// MissingError says what a host lacks to run a Machine.
type MissingError struct {
	Pieces []string // one line each, with the Debian package to install
}

func (e *MissingError) Error() string {
	return "the virtual machine cannot be started:\n\t" + strings.Join(e.Pieces, "\n\t")
}

// failure is why a program was not run to its end by a machine that was started.
type failure struct {
	reason  error
	console string // path of what the guest's kernel said
	retry   bool   // the program did not run yet, and another boot may help
}

func (f *failure) Error() string {
	return fmt.Sprintf("%v; the guest's console is kept in %s and ends:\n%s", f.reason, f.console, tail(f.console, 60))
}

// boot is one attempt of Run.
func (m Machine) boot(ctx context.Context, img image, c Command, kernelArgs ...string) (status int, err error) {
	initramfs, err := newInitramfs(img)
	if err != nil {
		return 0, fmt.Errorf("make the initramfs: %w", err)
	}
	defer initramfs.Close()
	conn, far, err := socketpair()
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	console, err := os.CreateTemp(m.Cache, "console-*.log")
	if err != nil {
		far.Close()
		return 0, err
	}
	console.Close()

	// QEMU must die with this process; the kernel sees to that when the thread that started it ends.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var said bytes.Buffer
	qemu := exec.Command("qemu-system-x86_64", m.arguments(img, console.Name(), kernelArgs)...)
	qemu.Stdout, qemu.Stderr = &said, &said
	qemu.WaitDelay = time.Second                 // for what a wrapper of QEMU may leave behind
	qemu.ExtraFiles = []*os.File{far, initramfs} // descriptors 3 and 4
	qemu.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL, Setpgid: true}
	err = qemu.Start()
	far.Close()
	if err != nil {
		os.Remove(console.Name())
		return 0, err
	}
	var late atomic.Bool
	watchdog := time.AfterFunc(bootLimit, func() {
		late.Store(true)
		qemu.Process.Kill()
	})
	defer watchdog.Stop()
	defer context.AfterFunc(ctx, func() { qemu.Process.Kill() })()

	s := session{wire: newWire(conn), command: c, started: func() { watchdog.Stop() }}
	status, err = s.run(m, img)
	qemu.Process.Kill()
	qemu.Wait()
	switch {
	case err == nil || ctx.Err() != nil:
		os.Remove(console.Name())
		if err != nil {
			err = context.Cause(ctx)
		}
		return status, err
	case late.Load():
		err = fmt.Errorf("it did not get to run the program within %v", bootLimit)
	case said.Len() > 0:
		err = fmt.Errorf("%w: QEMU says: %s", err, strings.TrimSpace(said.String()))
	}
	return 0, &failure{reason: err, console: console.Name(), retry: !s.running && !errors.Is(err, errRefused)}
}

// arguments is QEMU's command line; descriptor 3 is the port to the guest's init and 4 the initramfs.
func (m Machine) arguments(img image, console string, kernelArgs []string) []string {
	accel, cpu := "tcg,thread=multi,tb-size=1024", "max"
	kernelArgs = append(kernelArgs, "console=ttyS0", "panic=-1", "oops=panic", "mitigations=off")
	if m.KVM {
		accel, cpu = "kvm", "host"
	} else {
		// Left to itself, the guest's kernel distrusts the translated TSC and takes the HPET, which costs an exit for
		// every look at the clock; and Go looks at it all the time.
		kernelArgs = append(kernelArgs, "tsc=reliable", "clocksource=tsc", fmt.Sprintf("tsc_early_khz=%d", tscKHz()))
	}
	share := func(path, tag, options string) string {
		return fmt.Sprintf("local,path=%s,mount_tag=%s,security_model=none,multidevs=remap%s", strings.ReplaceAll(path, ",", ",,"), tag, options)
	}
	return []string{
		"-M", "q35", "-accel", accel, "-cpu", cpu, "-smp", fmt.Sprint(m.CPUs), "-m", m.Memory,
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "file:" + console,
		"-kernel", img.kernel(), "-initrd", "/proc/self/fd/4", "-append", strings.Join(kernelArgs, " "),
		"-virtfs", share("/", "host", ",readonly=on"),
		"-virtfs", share(m.Out, "out", ""),
		"-chardev", "socket,id=wire,fd=3", "-device", "virtio-serial-pci", "-device", "virtserialport,chardev=wire,name=" + portName,
	}
}

// tscKHz measures the frequency of the time stamp counter, which the guest sees as it is. /proc/cpuinfo does not say
// it: what is there follows the processor's power states.
func tscKHz() uint64 {
	start, ticks := time.Now(), readTSC()
	time.Sleep(50 * time.Millisecond)
	elapsed, ticks := time.Since(start), readTSC()-ticks
	return ticks * uint64(time.Millisecond) / uint64(elapsed)
}

// newInitramfs makes the guest's first file system in memory: this program as /init, and the modules in /m, named so
// that their order is that of insertion.
func newInitramfs(img image) (_ *os.File, err error) {
	self, err := os.Open("/proc/self/exe")
	if err != nil {
		return nil, err
	}
	defer self.Close()
	if err := static(self); err != nil {
		return nil, err
	}
	boot, err := insertionOrder(img.root, img.release, bootModules)
	if err != nil {
		return nil, err
	}
	lab, _ := insertionOrder(img.root, img.release, labModules) // no kernel has every one
	fd, err := unix.MemfdCreate("initramfs", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "initramfs")
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	info, err := self.Stat()
	if err != nil {
		return nil, err
	}
	records := []cpio.Record{{
		ReaderAt: self,
		Info:     cpio.Info{Name: "init", Mode: cpio.S_IFREG | 0o755, FileSize: uint64(info.Size())},
	}}
	for i, path := range append(boot, lab...) {
		content, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		records = append(records, cpio.StaticFile(fmt.Sprintf("m/%03d-%s", i, filepath.Base(path)), string(content), 0o644))
	}
	return f, cpio.WriteRecordsAndDirs(cpio.Newc.Writer(f), records)
}

// static refuses a program that needs a dynamic loader: the initramfs has none.
func static(program io.ReaderAt) error {
	f, err := elf.NewFile(program)
	if err != nil {
		return err
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return errors.New("this program is linked dynamically and cannot be the guest's init: build it with CGO_ENABLED=0")
		}
	}
	return nil
}

// socketpair makes the two ends of the port: ours and QEMU's.
func socketpair() (near net.Conn, far *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("socketpair: %w", err)
	}
	ours := os.NewFile(uintptr(fds[0]), "wire")
	defer ours.Close()
	far = os.NewFile(uintptr(fds[1]), "wire")
	if near, err = net.FileConn(ours); err != nil {
		far.Close()
		return nil, nil, err
	}
	return near, far, nil
}

// tail returns the last lines of a file, or what keeps it from being read.
func tail(path string, lines int) string {
	content, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	all := strings.Split(strings.TrimSpace(strings.ReplaceAll(string(content), "\r", "")), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// errStopped is the end of QEMU, whatever ended it: a panic of the guest's kernel, mostly.
var errStopped = errors.New("the virtual machine stopped by itself")

// errRefused is wrapped by the error of a guest that booted but could not start the program.
var errRefused = errors.New("the guest cannot run the program")

// session is the host's side of one program's run.
type session struct {
	wire    *wire
	command Command
	started func() // called when the program runs
	running bool   // it has been called
}

// run hands the job to the guest and passes the streams on until the program has ended.
func (s *session) run(m Machine, img image) (status int, err error) {
	c := s.command
	j := &job{Path: c.Path, Args: c.Args, Dir: c.Dir, Env: c.Env, Modules: img.modules(), Out: m.Out}
	if c.Terminal != nil {
		j.Terminal, j.Size = true, windowSize(c.Terminal)
	}
	go func() { _ = s.wire.send(message{Kind: kindJob, Job: j}) }() // no one reads it until the guest is up

	for {
		msg, err := s.wire.receive()
		if err != nil {
			return 0, errStopped
		}
		switch msg.Kind {
		case kindStarted:
			s.running = true
			s.started()
			stop, err := s.passOn()
			if err != nil {
				return 0, err
			}
			defer stop()
		case kindOutput, kindErrors:
			if _, err := s.output(msg.Kind).Write(msg.Data); err != nil {
				return 0, fmt.Errorf("pass on the program's output: %w", err)
			}
		case kindExit:
			return msg.Number, nil
		case kindFailed:
			return 0, fmt.Errorf("%w: %s", errRefused, msg.Data)
		}
	}
}

// output is where the program's output goes.
func (s *session) output(k kind) io.Writer {
	switch {
	case s.command.Terminal != nil:
		return s.command.Terminal
	case k == kindErrors:
		return s.command.Stderr
	}
	return s.command.Stdout
}

// passOn starts to pass the input and the signals on to the program, until stop is called. A read of the input that
// is under way then stays so: there is no general way to interrupt it.
func (s *session) passOn() (stop func(), err error) {
	input, restore := s.command.Stdin, func() {}
	if t := s.command.Terminal; t != nil {
		state, err := term.MakeRaw(int(t.Fd()))
		if err != nil {
			return nil, fmt.Errorf("make the terminal raw: %w", err)
		}
		input, restore = t, func() { _ = term.Restore(int(t.Fd()), state) }
	}
	go func() {
		if input != nil {
			// An error ends the input as its end does; the machine's own end is found by receive.
			_, _ = io.Copy(sender{s.wire, kindInput}, input)
		}
		_ = s.wire.send(message{Kind: kindInputEnd})
	}()

	signals := make(chan os.Signal, 8)
	signal.Notify(signals, unix.SIGQUIT, unix.SIGWINCH)
	go func() {
		for sig := range signals {
			switch {
			case sig == unix.SIGQUIT:
				_ = s.wire.send(message{Kind: kindSignal, Number: int(unix.SIGQUIT)})
			case s.command.Terminal != nil:
				_ = s.wire.send(message{Kind: kindResize, Size: windowSize(s.command.Terminal)})
			}
		}
	}()
	return func() {
		signal.Stop(signals)
		close(signals)
		restore()
	}, nil
}

// windowSize is the size of a terminal, zero if it does not say.
func windowSize(terminal *os.File) unix.Winsize {
	size, err := unix.IoctlGetWinsize(int(terminal.Fd()), unix.TIOCGWINSZ)
	if err != nil {
		return unix.Winsize{}
	}
	return *size
}

// sender is a writer that sends all it gets as messages of one kind.
type sender struct {
	wire *wire
	kind kind
}

func (s sender) Write(p []byte) (int, error) {
	if err := s.wire.send(message{Kind: s.kind, Data: p}); err != nil {
		return 0, err
	}
	return len(p), nil
}
