package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// about describes the machine and the run.
func about(o options) []string {
	var u unix.Utsname
	_ = unix.Uname(&u) // it has no way to fail
	how := "this machine's own kernel"
	if os.Getenv("LONGSHORE_LAB") == "vm" {
		how = "QEMU, translated without KVM (TCG): several times slower than a real machine"
		if os.Getenv("LONGSHORE_LAB_KVM") == "1" {
			how = "QEMU with KVM"
		}
	}
	processor := o.machine
	if processor == "" {
		processor = "unknown processor"
	}
	return []string{
		time.Now().UTC().Format("2006-01-02 15:04 UTC"),
		fmt.Sprintf("%s, %d of its cores; %s", processor, runtime.NumCPU(), how),
		"Linux " + unix.ByteSliceToString(u.Release[:]),
		fmt.Sprintf("longshore %s, kube-proxy v1.36.3, %s", o.commit, runtime.Version()),
		fmt.Sprintf("memory after %v, idle for %v, %v of connections, changes: %d and at most %d of each peer", o.settle, o.idle, o.connect, o.changes, o.peerChanges),
	}
}

// programs is what kube-proxy runs.
var programs = []string{"ipset", "iptables", "ip6tables", "iptables-restore", "ip6tables-restore", "iptables-save", "ip6tables-save", "nft", "conntrack", "nsenter", "modprobe"}

// toMemory takes a program off the host's disk, which the virtual machine reaches slowly: opened for writing, a file is
// copied to where the machine's writes go. Outside of a machine there is nothing to do.
func toMemory(path string) error {
	if os.Getenv("LONGSHORE_LAB") != "vm" {
		return nil
	}
	path, err := filepath.EvalSymlinks(path)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if errors.Is(err, unix.ETXTBSY) { // it runs, so it was here before
		return nil
	}
	if err != nil {
		return fmt.Errorf("copy a program to memory: %w", err)
	}
	return f.Close()
}

// peersToMemory does that with the programs that kube-proxy runs, and their libraries.
func peersToMemory(ctx context.Context) error {
	files, err := filepath.Glob("/usr/lib/*/xtables/*.so")
	if err != nil {
		return err
	}
	for _, name := range programs {
		path, err := exec.LookPath(name)
		if err != nil {
			return fmt.Errorf("kube-proxy needs %s: %w", name, err)
		}
		files = append(files, path)
		out, err := exec.CommandContext(ctx, "ldd", path).Output()
		if err != nil {
			continue // linked statically
		}
		for word := range strings.FieldsSeq(string(out)) {
			if filepath.IsAbs(word) {
				files = append(files, word)
			}
		}
	}
	for _, f := range files {
		if err := toMemory(f); err != nil {
			return err
		}
	}
	return nil
}

// quiet waits until the processors have little to do, half a minute at most: what is under way of an earlier part would be
// measured with the next.
func quiet(ctx context.Context) error {
	deadline := time.Now().Add(30 * time.Second)
	for time.Now().Before(deadline) {
		idle, all, err := processors()
		if err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(time.Second):
		}
		idle2, all2, err := processors()
		if err != nil {
			return err
		}
		if idle2-idle > 0.85*(all2-all) {
			return nil
		}
	}
	return nil
}

// processors is how much time all of them have been idle, and there was, in ticks (proc(5), /proc/stat).
func processors() (idle, all float64, err error) {
	content, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, 0, err
	}
	var v [8]float64 // user nice system idle iowait irq softirq steal
	if _, err := fmt.Sscanf(string(content), "cpu %g %g %g %g %g %g %g %g", &v[0], &v[1], &v[2], &v[3], &v[4], &v[5], &v[6], &v[7]); err != nil {
		return 0, 0, fmt.Errorf("/proc/stat: %w", err)
	}
	for _, x := range v {
		all += x
	}
	return v[3] + v[4], all, nil
}
