package kernel

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"github.com/u-root/u-root/pkg/kmodule"
	"golang.org/x/sys/unix"
)

// bootModules are what the guest's init needs to reach the host: its line there and its root.
var bootModules = []string{"virtio_pci", "virtio_console", "9pnet_virtio", "9p", "overlay"}

// labModules are loaded before the program starts, so that it needs neither modprobe nor the right to load modules.
// One that the kernel lacks, or has built in, is passed over. Others the kernel can still load on demand.
var labModules = []string{
	"crc32c_generic", // asked for by libcrc32c when it starts, not in modules.dep
	"ip_vs", "ip_vs_rr", "ip_vs_wrr", "ip_vs_lc", "ip_vs_wlc", "ip_vs_fo", "ip_vs_ovf", "ip_vs_lblc", "ip_vs_lblcr",
	"ip_vs_dh", "ip_vs_sh", "ip_vs_mh", "ip_vs_sed", "ip_vs_nq", "ip_vs_twos",
	"nf_conntrack", "nf_conntrack_netlink", "nf_nat", "nf_tables", "nft_ct", "nft_nat", "nft_chain_nat", "nft_masq",
	"nft_limit", "nft_log", "nft_numgen", "nft_hash", "nft_queue", "nfnetlink_queue",
	"nft_reject", "nft_reject_inet", "nft_reject_ipv4", "nft_reject_ipv6", "nft_fib", "nft_fib_inet", "nft_fib_ipv4", "nft_fib_ipv6",
	"veth", "bridge", "br_netfilter", "dummy", "tun", "ipip", "ip6_tunnel", "ip_gre", "vxlan", "fou",
	"sch_netem", "sch_tbf", "sch_ingress", "cls_u32", "act_mirred",
	"inet_diag", "tcp_diag", "udp_diag", "virtio_net",
}

// insertionOrder returns the paths, below root/lib/modules/release, of the named modules and of all they depend on,
// each after everything it needs. A module that is built in has no path and does not appear. The error says which
// names the kernel does not know; the paths are good without them.
func insertionOrder(root, release string, names []string) ([]string, error) {
	var mu sync.Mutex // the dependencies of one module are visited in parallel
	var order []string
	prober, err := kmodule.NewProber(kmodule.ProbeOpts{
		RootDir:        root,
		KVer:           release,
		IgnoreProcMods: true,
		DryRunCB: func(path string) {
			mu.Lock()
			defer mu.Unlock()
			order = append(order, path)
		},
	})
	if err != nil {
		return nil, err
	}
	var unknown []error
	for _, name := range names {
		unknown = append(unknown, prober.Probe(name, ""))
	}
	return order, errors.Join(unknown...)
}

// insert loads a module into the running kernel; one that is there already is no error. It is loaded "by force" only
// because the kernel then does not check the signature (kernel/module/signing.c), which without KVM is most of the
// work: the modules are the kernel's own.
func insert(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := kmodule.FileInit(f, "", kmodule.MODULE_INIT_IGNORE_VERMAGIC); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("load module %s: %w", filepath.Base(path), err)
	}
	return nil
}
