package kernel

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Init does nothing in a program that was started in the usual way. In one that a Machine's kernel started as its
// first process, it runs the machine and never returns. Call it before anything else in main.
func Init() {
	if os.Getpid() != 1 || os.Args[0] != "/init" {
		return
	}
	fmt.Println("init:", guest()) // on the console that the host keeps
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	select {}
}

// guest runs the machine until something fails; the host ends it when the program has.
func guest() error {
	for _, m := range []mount{{"proc", "/proc", ""}, {"sysfs", "/sys", ""}, {"devtmpfs", "/dev", ""}} {
		if err := m.make(); err != nil {
			return err
		}
	}
	modules, err := filepath.Glob("/m/*")
	if err != nil {
		return err
	}
	for _, path := range modules {
		if err := insert(path); err != nil {
			fmt.Println("init:", err) // what needs it will say so
		}
	}
	port, err := openPort()
	if err != nil {
		return err
	}
	w := newWire(port)
	msg, err := w.receive()
	if err != nil {
		return fmt.Errorf("receive the job: %w", err)
	}
	status, err := runJob(w, msg.Job)
	if err != nil {
		return errors.Join(err, w.send(message{Kind: kindFailed, Data: []byte(err.Error())}))
	}
	unix.Sync() // what was written to the shared folder through a mapping
	if err := w.send(message{Kind: kindExit, Number: status}); err != nil {
		return err
	}
	select {} // the host kills the machine when it has read the status
}

// openPort waits for the port to appear and for the host to be seen at its other end: before that, a read reports the
// end of the stream (drivers/char/virtio_console.c, port_fops_read).
func openPort() (*os.File, error) {
	for range 1000 {
		names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
		if err != nil {
			return nil, err
		}
		for _, path := range names {
			if name, err := os.ReadFile(path); err != nil || strings.TrimSpace(string(name)) != portName {
				continue
			}
			device := filepath.Join("/dev", filepath.Base(filepath.Dir(path)))
			fd, err := unix.Open(device, unix.O_RDWR|unix.O_CLOEXEC, 0)
			if err != nil {
				return nil, fmt.Errorf("open %s: %w", device, err)
			}
			for {
				state := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
				if _, err := unix.Poll(state, 0); err == nil && state[0].Revents&unix.POLLHUP == 0 {
					return os.NewFile(uintptr(fd), device), nil
				}
				time.Sleep(time.Millisecond)
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
	return nil, fmt.Errorf("virtio port %s does not appear", portName)
}

// mount is a file system without a device, and the folder, made if missing, to mount it on.
type mount struct{ fstype, target, options string }

func (m mount) make() error {
	if err := os.MkdirAll(m.target, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(m.fstype, m.target, m.fstype, 0, m.options); err != nil {
		return fmt.Errorf("mount %s on %s: %w", m.fstype, m.target, err)
	}
	return nil
}

// enterRoot makes the host's files the root, under a tmpfs that takes the writes, and returns a path to the host's
// files as they are. It moves the new root over the old one and not only this process into it, for the programs that
// look: chroot alone forbids user namespaces and pivot_root.
func enterRoot() (host string, err error) {
	const lower, upper, root = "/lower", "/upper", "/root"
	share := "trans=virtio,version=9p2000.L,msize=512000"
	if err := os.MkdirAll(lower, 0o755); err != nil {
		return "", err
	}
	if err := unix.Mount("host", lower, "9p", unix.MS_RDONLY, share+",cache=loose"); err != nil {
		return "", fmt.Errorf("mount the host's root: %w", err)
	}
	if err := (mount{"tmpfs", upper, "mode=755"}).make(); err != nil {
		return "", err
	}
	if err := overlay(lower, upper, root); err != nil {
		return "", err
	}
	for _, dir := range []string{"/proc", "/sys", "/dev"} {
		if err := unix.Mount(dir, root+dir, "", unix.MS_MOVE, ""); err != nil {
			return "", fmt.Errorf("move %s: %w", dir, err)
		}
	}
	below, err := unix.Open(lower, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	if err := errors.Join(
		wrap("enter the root", unix.Chdir(root)),
		wrap("move the root", unix.Mount(".", "/", "", unix.MS_MOVE, "")),
		wrap("change the root", unix.Chroot(".")),
	); err != nil {
		return "", err
	}
	return fmt.Sprintf("/proc/self/fd/%d", below), nil
}

// overlay mounts the folder lower on target, with the writes going below the folder scratch.
func overlay(lower, scratch, target string) error {
	up, work := filepath.Join(scratch, "up"), filepath.Join(scratch, "work")
	for _, dir := range []string{up, work, target} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	if err := unix.Mount("overlay", target, "overlay", 0, fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", lower, up, work)); err != nil {
		return fmt.Errorf("mount an overlay on %s: %w", target, err)
	}
	return nil
}

// furnish makes the guest's root what a program expects of a machine, and what the job asks of it.
func furnish(j *job) error {
	host, err := enterRoot()
	if err != nil {
		return err
	}
	for _, m := range []mount{
		{"tmpfs", "/run", "mode=755"},
		{"tmpfs", "/tmp", "mode=1777"},
		{"tmpfs", "/dev/shm", "mode=1777"},
		{"devpts", "/dev/pts", "mode=620,ptmxmode=666"},
		{"cgroup2", "/sys/fs/cgroup", ""},
	} {
		if err := m.make(); err != nil {
			return err
		}
	}
	for _, dir := range []string{"/run/netns", "/run/lock", "/lib/modules"} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	for i, name := range []string{"stdin", "stdout", "stderr"} {
		if err := os.Symlink(fmt.Sprint("/proc/self/fd/", i), "/dev/"+name); err != nil {
			return err
		}
	}
	if err := os.Symlink("/proc/self/fd", "/dev/fd"); err != nil {
		return err
	}
	if err := unix.Mount(host+j.Modules, "/lib/modules", "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount the modules: %w", err)
	}
	// The guest's /tmp is new, but go test runs in one of the host's.
	if strings.HasPrefix(j.Dir, "/tmp/") {
		if err := overlay(host+j.Dir, "/run/.dir", j.Dir); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(j.Out, 0o755); err != nil {
		return err
	}
	// cache=mmap caches nothing but what is mapped: host and guest see each other's writes.
	if err := unix.Mount("out", j.Out, "9p", 0, "trans=virtio,version=9p2000.L,msize=512000,cache=mmap"); err != nil {
		return fmt.Errorf("mount the shared folder: %w", err)
	}
	if err := toMemory(host, j.Path); err != nil {
		return err
	}
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	return errors.Join(wrap("set lo up", err), wrap("set the host name", unix.Sethostname([]byte("lab"))))
}

// toMemory copies the program off the host's disk: over 9p every page of it that is touched is a request. It stays at
// its path, which exists in the guest unless it is below /tmp.
func toMemory(host, path string) error {
	if f, err := os.OpenFile(path, os.O_RDWR, 0); err == nil {
		return f.Close() // opening for writing made the overlay copy it
	}
	from, err := os.Open(host + path)
	if err != nil {
		return err
	}
	defer from.Close()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	to, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(to, from)
	return errors.Join(err, to.Close())
}

// runJob starts the program and returns its exit status once all it wrote has been sent. An error says that it was
// not started.
func runJob(w *wire, j *job) (status int, err error) {
	if err := furnish(j); err != nil {
		return 0, err
	}
	if _, err := netlink.GenlFamilyGet("IPVS"); err != nil {
		return 0, fmt.Errorf("generic netlink family IPVS: %w", err)
	}
	const files = 1 << 20 // fs.nr_open
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: files, Max: files}); err != nil {
		return 0, fmt.Errorf("set the limit of open files: %w", err)
	}

	s, err := newStreams(j)
	if err != nil {
		return 0, err
	}
	attributes := &syscall.SysProcAttr{Setsid: true, Setctty: j.Terminal}
	p, err := os.StartProcess(j.Path, j.Args, &os.ProcAttr{Dir: j.Dir, Env: j.Env, Files: s.program[:], Sys: attributes})
	if err != nil {
		return 0, err
	}
	s.closeProgram()
	if err := w.send(message{Kind: kindStarted}); err != nil {
		return 0, err
	}
	go s.receive(w, p)
	exited := make(chan struct{})
	output, errs := s.relay(w, kindOutput, s.output, exited), s.relay(w, kindErrors, s.errors, exited)
	status = reap(p.Pid)
	close(exited)
	<-output
	<-errs
	return status, nil
}

// reap collects every process that ends, as the first process has to, until that one does, and returns its exit status.
func reap(pid int) int {
	for {
		var ws unix.WaitStatus
		ended, err := unix.Wait4(-1, &ws, 0, nil)
		if err == nil && ended == pid {
			return exitStatus(ws)
		}
	}
}

// exitStatus is a process's end as a shell tells it.
func exitStatus(ws unix.WaitStatus) int {
	if ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return ws.ExitStatus()
}

// streams are the program's ends of its standard streams, and ours; with a terminal there is one of each, and errors
// is nil.
type streams struct {
	program               [3]*os.File
	input, output, errors *os.File
}

func newStreams(j *job) (*streams, error) {
	if j.Terminal {
		ours, theirs, err := newTerminal(j.Size)
		return &streams{program: [3]*os.File{theirs, theirs, theirs}, input: ours, output: ours}, err
	}
	s := &streams{}
	var failed [3]error
	s.program[0], s.input, failed[0] = os.Pipe()
	s.output, s.program[1], failed[1] = os.Pipe()
	s.errors, s.program[2], failed[2] = os.Pipe()
	return s, errors.Join(failed[:]...)
}

func newTerminal(size unix.Winsize) (ours, theirs *os.File, err error) {
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("open /dev/ptmx: %w", err)
	}
	n, err := unix.IoctlGetUint32(fd, unix.TIOCGPTN)
	if err != nil {
		return nil, nil, fmt.Errorf("number of the terminal: %w", err)
	}
	if err := errors.Join(unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0), unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &size)); err != nil {
		return nil, nil, fmt.Errorf("set the terminal up: %w", err)
	}
	theirs, err = os.OpenFile(fmt.Sprint("/dev/pts/", n), os.O_RDWR|unix.O_NOCTTY, 0)
	return os.NewFile(uintptr(fd), "/dev/ptmx"), theirs, err
}

func (s *streams) closeProgram() {
	for _, f := range s.program {
		f.Close() // one file three times if it is a terminal
	}
}

// receive does what the host says until it is gone; then it ends the machine.
func (s *streams) receive(w *wire, p *os.Process) {
	for {
		msg, err := w.receive()
		if err != nil {
			_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
		}
		switch msg.Kind {
		case kindInput:
			_, _ = s.input.Write(msg.Data) // a program that does not read its input may lose it
		case kindInputEnd:
			if s.input != s.output {
				s.input.Close()
			}
		case kindResize:
			_ = unix.IoctlSetWinsize(int(s.input.Fd()), unix.TIOCSWINSZ, &msg.Size)
		case kindSignal:
			_ = unix.Kill(p.Pid, unix.Signal(msg.Number))
		}
	}
}

// relay sends what comes out of a file to the host, until its end, or until the program has exited and nothing is
// left in it: a process that the program leaves behind may hold it open for ever. The channel is closed then.
func (s *streams) relay(w *wire, k kind, from *os.File, exited <-chan struct{}) (done chan struct{}) {
	done = make(chan struct{})
	if from == nil {
		close(done)
		return done
	}
	fd := int(from.Fd()) // blocking from here on
	go func() {
		defer close(done)
		buffer := make([]byte, 64<<10)
		for last := false; ; {
			ready := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
			switch n, err := unix.Poll(ready, 20); {
			case err != nil: // interrupted
			case n > 0:
				got, err := unix.Read(fd, buffer)
				if got <= 0 && err != unix.EINTR { // a terminal ends with EIO
					return
				}
				if w.send(message{Kind: k, Data: buffer[:max(got, 0)]}) != nil {
					return
				}
			case last:
				return
			default:
				select {
				case <-exited:
					last = true // once more, for what came since
				default:
				}
			}
		}
	}()
	return done
}
