package kernel

import (
	"encoding/gob"
	"io"
	"sync"

	"golang.org/x/sys/unix"
)

// portName is the virtio serial port that joins the host to the guest's init.
const portName = "longshore.lab"

// job is the first message to the guest: what to run, and what of the host to put around it. All paths are the
// host's, absolute.
type job struct {
	Path string   // the program
	Args []string // with argv[0]
	Dir  string
	Env  []string

	Terminal bool         // the program's streams are one pseudo terminal, not three pipes
	Size     unix.Winsize // of that terminal

	Modules string // the folder that becomes /lib/modules
	Out     string // the folder shared read-write
}

// kind says what a message is.
type kind uint8

const (
	_ kind = iota

	// To the guest.
	kindJob      // Job
	kindInput    // Data for the program's standard input
	kindInputEnd // there is no more
	kindResize   // Size of the terminal
	kindSignal   // Number to send to the program

	// To the host.
	kindStarted // the program runs
	kindOutput  // Data from its standard output
	kindErrors  // Data from its standard error
	kindExit    // Number: its exit status; nothing follows
	kindFailed  // Data: why the program could not be started; nothing follows
)

// message is what both ends of the port exchange, as gob. One ordered stream carries everything, so an exit status
// never overtakes the output before it.
type message struct {
	Kind   kind
	Data   []byte
	Number int
	Size   unix.Winsize
	Job    *job
}

// wire is one end of the port. Several goroutines may send; one receives.
type wire struct {
	mu  sync.Mutex
	enc *gob.Encoder
	dec *gob.Decoder
}

func newWire(rw io.ReadWriter) *wire {
	return &wire{enc: gob.NewEncoder(rw), dec: gob.NewDecoder(rw)}
}

func (w *wire) send(m message) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.enc.Encode(m)
}

func (w *wire) receive() (message, error) {
	var m message
	err := w.dec.Decode(&m)
	return m, err
}
