package kernel

import (
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/longshore-lb/longshore/ipvs"
)

// everything is what others see of the kernel's tables. Those of IPVS have no order of their own.
func everything(t *testing.T) string {
	t.Helper()
	servers := strings.Split(run(t, "ipvsadm", "-Sn"), "\n")
	slices.Sort(servers)
	return strings.Join(servers, "\n") + run(t, "nft", "list", "ruleset") + run(t, "ip", "route", "show", "table", "all") +
		run(t, "ip", "-6", "route", "show", "table", "all")
}

// TestCleanup: what is ours goes, and what others have made stays byte for byte.
func TestCleanup(t *testing.T) {
	k := open(t)
	run(t, "sh", "-ec", `
		ipvsadm -A -t 192.0.2.9:80 -s sh -p 300
		ipvsadm -a -t 192.0.2.9:80 -r 10.0.0.9:80 -m -w 5
		ipvsadm -A -u [fd96::9]:53 -s wlc
		ipvsadm -A -f 7 -s rr
		ipvsadm -A -f 7 -s rr -6
		ip route add local 198.51.100.0/24 dev lo table local
		ip route add local 10.96.0.0/16 dev lo table 100 proto 196
		ip -6 route add local fd99::/64 dev lo table local proto 197
		nft 'add table ip other; add set ip other frontends { type ipv4_addr; elements = { 192.0.2.9 }; };
			add chain ip other input { type filter hook input priority 0; }; add rule ip other input ip daddr @frontends accept'
		nft add table inet longshore
	`)
	// Open left our tables: they go, for a picture of what is others' alone, and are made again.
	if err := k.Cleanup(false, func(string) {}); err != nil {
		t.Fatal(err)
	}
	before := everything(t)
	if strings.Contains(before, "table ip longshore") {
		t.Fatalf("tables are left:\n%s", before)
	}
	prepare := func() {
		t.Helper()
		if err := k.Prepare(); err != nil {
			t.Fatal(err)
		}
		apply(t, k, ipvs.Diff(observe(t, k), example()))
	}
	clean := func(after string) {
		t.Helper()
		if diff := cmp.Diff(before, everything(t)); diff != "" {
			t.Errorf("%s (-before +after):\n%s", after, diff)
		}
	}

	prepare()
	full := everything(t)
	var dry []string
	if err := k.Cleanup(true, func(command string) { dry = append(dry, command) }); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(full, everything(t)); diff != "" {
		t.Errorf("a dry run changed something:\n%s", diff)
	}
	mark := ipvs.Mark(12345678)
	want := fmt.Sprintf(`ip route del local fd96::/112 dev lo table local proto 196
ip route del local 192.0.2.1/32 dev lo table local proto 196
ip route del local 10.96.0.0/16 dev lo table local proto 196
ipvsadm -D -f %[1]d -6
ipvsadm -D -f %[1]d
ipvsadm -D -t [fd96::1]:443
ipvsadm -D -t 192.0.2.1:80
ipvsadm -D --sctp-service 10.96.0.11:9
ipvsadm -D -u 10.96.0.10:53
ipvsadm -D -t 10.96.0.1:443
nft delete table ip longshore
nft delete table ip6 longshore
nft delete table arp longshore`, mark)
	if diff := cmp.Diff(want, strings.Join(dry, "\n")); diff != "" {
		t.Errorf("the dry run prints (-want +got):\n%s", diff)
	}

	var done []string
	if err := k.Cleanup(false, func(command string) { done = append(done, command) }); err != nil {
		t.Fatal(err)
	}
	clean("after the cleanup")
	if diff := cmp.Diff(dry, done); diff != "" {
		t.Errorf("the dry run had said something else:\n%s", diff)
	}

	// What it prints does the same.
	prepare()
	if out, err := exec.Command("sh", "-exc", strings.Join(dry, "\n")).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	clean("after the printed commands")

	// Nothing is there, or only part of it: that is no error.
	if err := k.Cleanup(false, func(command string) { t.Errorf("on a clean machine: %s", command) }); err != nil {
		t.Error(err)
	}
	prepare()
	run(t, "sh", "-ec", `
		nft delete table ip6 longshore
		nft flush chain ip longshore restrict
		nft delete set ip longshore allowed
	`)
	if err := k.Cleanup(false, func(string) {}); err != nil {
		t.Error(err)
	}
	// Nothing said any more that these are ours.
	run(t, "ipvsadm", "-D", "-t", "[fd96::1]:443")
	run(t, "ipvsadm", "-D", "-f", fmt.Sprint(mark), "-6")
	clean("after the cleanup of a part")
}
