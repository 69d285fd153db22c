package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Exec says what program to start in a host.
type Exec struct {
	Name string        // names the log, NAME.log; unique among the lab's running processes
	Path string        // the program, searched like a shell does
	Args []string      // without the program's name
	Env  []string      // added to the environment of this process, NAME=VALUE
	Dir  string        // working folder, "" = this one's
	Stop time.Duration // how long it may take to end after SIGTERM; 0 = 10 s
}

// Process is a program that runs in a host until it ends, is stopped, or the lab closes.
type Process struct {
	Name string
	Log  string // file with its standard output and error

	cmd    *exec.Cmd
	stop   time.Duration
	exited chan struct{}
	mu     sync.Mutex
	asked  bool  // that it end
	err    error // why it ended by itself
}

// Start starts a program in the host. Its output is appended to NAME.log in the lab's records.
func (h *Host) Start(e Exec) (*Process, error) {
	log, err := os.OpenFile(h.lab.records.file(e.Name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", e.Name, err)
	}
	defer log.Close()
	p := &Process{Name: e.Name, Log: log.Name(), stop: e.Stop, exited: make(chan struct{})}
	if p.stop == 0 {
		p.stop = 10 * time.Second
	}
	p.cmd = h.Command(context.Background(), e.Path, e.Args...)
	p.cmd.Env = append(p.cmd.Env, e.Env...)
	p.cmd.Dir = e.Dir
	p.cmd.Stdout, p.cmd.Stderr = log, log
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // an interrupt at the terminal is this process's business
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s in %s: %w", e.Name, h.Name, err)
	}
	go p.wait()
	return p, nil
}

func (p *Process) wait() {
	err := p.cmd.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.asked {
		p.err = fmt.Errorf("%s ended by itself: %v; its last lines:\n%s", p.Name, cause(err), p.Tail(10))
	}
	close(p.exited)
}

func cause(err error) string {
	if err == nil {
		return "exit status 0"
	}
	return err.Error()
}

// PID is the process's id on this machine.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Exited is closed when the process has ended.
func (p *Process) Exited() <-chan struct{} { return p.exited }

// Err is nil while the process runs and after Stop or Kill; else it says how it ended, with its last lines.
func (p *Process) Err() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.err
}

// Running tells whether the process has not ended.
func (p *Process) Running() bool {
	select {
	case <-p.exited:
		return false
	default:
		return true
	}
}

// Await is [Await] that also ends when the process has, with its last lines in the error.
func (p *Process) Await(ctx context.Context, what string, within time.Duration, check func(context.Context) error) error {
	return awaitUnless(ctx, what, within, p.gone, check)
}

// gone is why the process does not run, or nil.
func (p *Process) gone() error {
	if p.Running() {
		return nil
	}
	if err := p.Err(); err != nil {
		return err
	}
	return fmt.Errorf("%s was stopped", p.Name)
}

// AwaitOutput waits until the process has printed a text.
func (p *Process) AwaitOutput(ctx context.Context, text string, within time.Duration) error {
	return p.Await(ctx, fmt.Sprintf("%s prints %q", p.Name, text), within, func(context.Context) error {
		b, err := os.ReadFile(p.Log)
		if err == nil && !bytes.Contains(b, []byte(text)) {
			err = errors.New("it has not")
		}
		return err
	})
}

// Signal sends a signal to the process.
func (p *Process) Signal(s os.Signal) error {
	if err := p.cmd.Process.Signal(s); err != nil {
		return fmt.Errorf("send %v to %s: %w", s, p.Name, err)
	}
	return nil
}

// Stop asks the process to end (SIGTERM) and waits. If it does not in time it is killed, which is an error.
// It is no error if the process has already ended.
func (p *Process) Stop() error {
	if !p.end(syscall.SIGTERM) {
		return nil
	}
	select {
	case <-p.exited:
		return nil
	case <-time.After(p.stop):
	}
	p.Kill()
	return fmt.Errorf("%s ignored SIGTERM for %v; its last lines:\n%s", p.Name, p.stop, p.Tail(10))
}

// Kill ends the process at once (SIGKILL), without its having a say, and waits until it is gone.
func (p *Process) Kill() {
	if p.end(syscall.SIGKILL) {
		<-p.exited
	}
}

// end sends a signal after which the process is expected to end; false if it has ended already.
func (p *Process) end(s os.Signal) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.Running() {
		return false
	}
	p.asked = true
	if err := p.cmd.Process.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
		p.err = fmt.Errorf("send %v to %s: %w", s, p.Name, err)
	}
	return true
}

// Tail is the last lines that the process has printed.
func (p *Process) Tail(lines int) string {
	b, err := os.ReadFile(p.Log)
	if err != nil {
		return err.Error()
	}
	all := strings.Split(strings.TrimRight(string(b), "\n"), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}
