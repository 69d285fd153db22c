package lab

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"
)

// records is the folder of a lab's logs and captures.
type records struct {
	folder string
	keep   atomic.Bool
}

// newRecords makes the folder anew.
func newRecords(scenario string) (*records, error) {
	out := os.Getenv("LONGSHORE_LAB_OUT")
	if out == "" {
		cache, err := os.UserCacheDir()
		if err != nil {
			return nil, fmt.Errorf("folder for the records, or set LONGSHORE_LAB_OUT: %w", err)
		}
		out = filepath.Join(cache, "longshore", "out")
	}
	if scenario == "" {
		scenario = "lab"
	}
	r := &records{folder: filepath.Join(out, fileName(scenario))}
	if err := os.RemoveAll(r.folder); err != nil {
		return nil, err
	}
	return r, os.MkdirAll(r.folder, 0o755)
}

func (r *records) file(name string) string { return filepath.Join(r.folder, fileName(name)) }

func (r *records) close() error {
	if r.keep.Load() {
		return nil
	}
	return os.RemoveAll(r.folder)
}

// Capture records every packet of the hosts with tcpdump, each into NAME.pcap among the records, until the lab
// closes. It returns when all captures see packets.
func (l *Lab) Capture(ctx context.Context, hosts ...*Host) error {
	for _, h := range hosts {
		p, err := h.Start(Exec{
			Name: h.Name + "-tcpdump",
			Path: "tcpdump",
			// -U: each packet is in the file at once; -Z root: the folder need not be writable for user tcpdump
			Args: []string{"-i", "any", "-n", "-U", "-Z", "root", "-w", l.records.file(h.Name + ".pcap")},
		})
		if err != nil {
			return err
		}
		l.captures = append(l.captures, p)
	}
	for _, p := range l.captures {
		if err := p.AwaitOutput(ctx, "listening on", 30*time.Second); err != nil {
			return err
		}
	}
	return nil
}

// stopCaptures lets tcpdump write what it still holds.
func (l *Lab) stopCaptures() {
	for _, p := range l.captures {
		if err := p.Stop(); err != nil {
			l.log.Warn("a capture may be incomplete", "error", err)
		}
	}
	l.captures = nil
}
