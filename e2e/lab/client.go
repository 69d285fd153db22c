package lab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"
)

// patience is how long one question to a server may take, connection and answer, unless ctx ends before.
const patience = 3 * time.Second

// Answer is what a built-in server said.
type Answer struct {
	Pod  string         // who answered, NAMESPACE-NAME
	Saw  netip.AddrPort // the client's address as the pod saw it
	At   netip.AddrPort // the address at which the pod was asked
	From netip.AddrPort // the client's address as the client saw it
	Took time.Duration  // from the first packet to the answer
}

// Ask connects from the host to a built-in server, over protocol tcp, udp or sctp, and returns its answer. It waits 3
// seconds at most.
func (h *Host) Ask(ctx context.Context, protocol string, server netip.AddrPort) (Answer, error) {
	began := time.Now()
	conn, answer, err := h.greet(ctx, protocol, server)
	if err != nil {
		return Answer{}, fmt.Errorf("ask %s/%s: %w", server, protocol, err)
	}
	answer.Took = time.Since(began)
	return answer, conn.Close()
}

// conversation is a connection to a built-in server.
type conversation struct {
	net.Conn
	udp   bool
	lines *bufio.Reader
}

// greet connects and reads the greeting.
func (h *Host) greet(ctx context.Context, protocol string, server netip.AddrPort) (*conversation, Answer, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	conn, err := h.DialContext(ctx, protocol, server.String())
	if err != nil {
		return nil, Answer{}, err
	}
	c := &conversation{Conn: conn, udp: protocol == "udp", lines: bufio.NewReaderSize(conn, 64<<10)}
	answer, err := c.greeting()
	if err != nil {
		return nil, Answer{}, errors.Join(err, conn.Close())
	}
	answer.From = addrPort(conn.LocalAddr())
	return c, answer, nil
}

func (c *conversation) greeting() (Answer, error) {
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return Answer{}, err
	}
	if c.udp {
		if _, err := c.Write([]byte("hello\n")); err != nil {
			return Answer{}, err
		}
	}
	line, err := c.lines.ReadString('\n')
	if err != nil {
		return Answer{}, err
	}
	if c.udp {
		if _, err := c.lines.ReadString('\n'); err != nil {
			return Answer{}, err
		}
	}
	return parseAnswer(strings.TrimSuffix(line, "\n"))
}

func parseAnswer(line string) (a Answer, err error) {
	words := strings.Fields(line)
	if len(words) != 5 || words[1] != "saw" || words[3] != "at" {
		return a, fmt.Errorf("the answer is %q, not of the form: NAME saw ADDRESS at ADDRESS", line)
	}
	a.Pod = words[0]
	if a.Saw, err = netip.ParseAddrPort(words[2]); err != nil {
		return a, err
	}
	a.At, err = netip.ParseAddrPort(words[4])
	return a, err
}

// echo sends a line and waits for it to come back.
func (c *conversation) echo(deadline time.Time) error {
	if err := c.SetDeadline(deadline); err != nil {
		return err
	}
	if _, err := c.Write([]byte("hello\n")); err != nil {
		return err
	}
	if c.udp { // the greeting comes with every answer
		if _, err := c.lines.ReadString('\n'); err != nil {
			return err
		}
	}
	_, err := c.lines.ReadString('\n')
	return err
}

// Held is an open connection on which a line goes to the server and back again and again.
type Held struct {
	Answer Answer // from when it was opened

	conn   net.Conn
	cancel context.CancelFunc
	done   chan struct{}
	mu     sync.Mutex
	report Report
}

// Report is how a held connection fared.
type Report struct {
	Echoes  int           // lines that came back
	Longest time.Duration // the longest time that one line took
	Broken  error         // why the connection ended before it was released, or nil
}

// Hold opens a connection to a built-in server and keeps it busy with one line each interval until Release, a
// break, or the end of ctx. A line that takes longer than patience (at least the interval) breaks it.
func (h *Host) Hold(ctx context.Context, protocol string, server netip.AddrPort, interval, patience time.Duration) (*Held, error) {
	conn, answer, err := h.greet(ctx, protocol, server)
	if err != nil {
		return nil, fmt.Errorf("hold %s/%s: %w", server, protocol, err)
	}
	ctx, cancel := context.WithCancel(ctx)
	d := &Held{Answer: answer, conn: conn.Conn, cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(d.done)
		defer conn.Close()
		d.keepBusy(ctx, conn, interval, patience)
	}()
	return d, nil
}

func (d *Held) keepBusy(ctx context.Context, conn *conversation, interval, patience time.Duration) {
	for ctx.Err() == nil {
		began := time.Now()
		err := conn.echo(began.Add(patience))
		if d.note(time.Since(began), err) != nil {
			return
		}
		_ = pause(ctx, interval) // the loop sees the end of ctx
	}
}

// note counts a line that took so long, or failed.
func (d *Held) note(took time.Duration, err error) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err != nil {
		d.report.Broken = fmt.Errorf("connection to %s broke after %d lines, the last waited %v: %w",
			d.Answer.Pod, d.report.Echoes, took.Round(time.Millisecond), err)
		return err
	}
	d.report.Echoes++
	d.report.Longest = max(d.report.Longest, took)
	return nil
}

// Report is how the connection has fared so far.
func (d *Held) Report() Report {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.report
}

// Reset ends a TCP connection at once and without a farewell that somebody would wait for (SO_LINGER of 0, socket(7)).
func (d *Held) Reset() error {
	tcp, ok := d.conn.(*net.TCPConn)
	if !ok {
		return errors.New("only TCP has resets")
	}
	if err := tcp.SetLinger(0); err != nil {
		return err
	}
	d.Release()
	return nil
}

// Release closes the connection, after the line under way has come back, and reports.
func (d *Held) Release() Report {
	d.cancel()
	<-d.done
	return d.Report()
}
