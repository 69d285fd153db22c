// Package kernel runs a program on a Linux kernel that has IPVS.
//
// [Usable] says whether the running kernel is one: then the program is simply run. Otherwise a [Machine] boots the
// kernel that Debian ships (package linux-image-amd64, every IPVS scheduler as a module) in QEMU and runs the program
// there: on the host's own files (over 9p, read-only, with a tmpfs on top that takes the writes), in the host's working
// directory, with its environment, streams and exit status. Nothing is built and no disk image is kept; the only thing
// downloaded is the kernel package, once.
//
// The guest's init is the calling program itself, so that program calls [Init] first thing in main and is linked
// statically (CGO_ENABLED=0). Command inlab does so, and is what tests are run with:
//
//	go test -exec /path/to/inlab ./ipvs/kernel
package kernel

import (
	"errors"
	"fmt"
	"os"

	"github.com/u-root/u-root/pkg/kmodule"
	"github.com/vishvananda/netlink"
)

// Usable returns nil if this process can use IPVS on the running kernel, and else why it cannot. It loads the ip_vs
// module when that is needed and allowed. What counts is that the kernel knows the generic netlink family IPVS
// (net/netfilter/ipvs/ip_vs_ctl.c), not what the loading said: the module may be built in, or be loaded already in a
// container that sees no /lib/modules.
func Usable() error {
	if os.Geteuid() != 0 {
		return errors.New("IPVS needs root")
	}
	loading := kmodule.Probe("ip_vs", "")
	if _, err := netlink.GenlFamilyGet("IPVS"); err != nil {
		return errors.Join(fmt.Errorf("generic netlink family IPVS: %w", err), wrap("load ip_vs", loading))
	}
	return nil
}

// wrap names the operation that an error comes from, and keeps nil nil.
func wrap(operation string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", operation, err)
}
