package ipvs_test

import (
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/txtar"

	"github.com/longshore-lb/longshore/ipvs"
)

// TestIPVSAdm compares what is printed with what Debian's ipvsadm 1.31 printed for the same table in a kernel
// (testdata/ipvsadm/record.sh). What the commands do not say, such as counters and the kernel's order, is read from the
// recorded listing that has it in full.
func TestIPVSAdm(t *testing.T) {
	files, err := filepath.Glob("testdata/ipvsadm/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no recordings: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			archive, err := txtar.ParseFile(file)
			if err != nil {
				t.Fatal(err)
			}
			sections := map[string]string{}
			for _, f := range archive.Files {
				sections[f.Name] = string(f.Data)
			}
			table := tableOf(t, sections)
			for _, f := range archive.Files {
				if f.Name == "commands" || f.Name == "traffic" {
					continue
				}
				t.Run(f.Name, func(t *testing.T) {
					if diff := cmp.Diff(string(f.Data), run(table, f.Name)); diff != "" {
						t.Errorf("ipvsadm %s (-recorded +printed):\n%s", f.Name, diff)
					}
				})
			}
		})
	}
}

// run prints a table as the arguments ask, in the form that a recording has.
func run(table ipvs.Table, arguments string) string {
	var (
		b    strings.Builder
		o    ipvs.ListOptions
		save bool
		only ipvs.Frontend
	)
	for args := strings.Fields(arguments); len(args) > 0; args = args[1:] {
		switch args[0] {
		case "-L", "-n":
		case "-S":
			save = true
		case "--stats":
			o.Stats = true
		case "--rate":
			o.Rate = true
		case "--thresholds":
			o.Thresholds = true
		case "--persistent-conn":
			o.PersistentConn = true
		case "--tun-info":
			o.TunnelInfo = true
		case "--exact":
			o.Exact = true
		case "--nosort":
			o.NoSort = true
		default:
			only, args = frontend(args)
			o.Only = &only
		}
	}
	if save {
		if err := ipvs.Save(&b, table); err != nil {
			return err.Error()
		}
		return b.String()
	}
	if err := ipvs.List(&b, table, o); errors.Is(err, ipvs.ErrNoService) {
		return "No such service\nexit status 1\n"
	} else if err != nil {
		return err.Error()
	}
	return b.String()
}

// frontend reads `-t 10.0.0.1:80` or `-f 7 -6` and returns the arguments from its last word on.
func frontend(args []string) (ipvs.Frontend, []string) {
	if args[0] == "-f" {
		mark, err := strconv.ParseUint(args[1], 10, 32)
		if err != nil {
			panic(err)
		}
		if len(args) > 2 && args[2] == "-6" {
			return ipvs.Frontend{Mark: uint32(mark), IPv6: true}, args[2:]
		}
		return ipvs.Frontend{Mark: uint32(mark)}, args[1:]
	}
	protocol := map[string]ipvs.Protocol{"-t": ipvs.TCP, "-u": ipvs.UDP, "--sctp-service": ipvs.SCTP}[args[0]]
	return ipvs.At(protocol, netip.MustParseAddrPort(args[1])), args[1:]
}

// tableOf builds the table that a recording was made from.
func tableOf(t *testing.T, sections map[string]string) ipvs.Table {
	t.Helper()
	table := ipvs.Table{Version: [3]uint8{1, 2, 1}, Size: 4096}
	for line := range strings.Lines(sections["commands"]) {
		addCommand(t, &table, strings.Fields(line))
	}
	inKernelOrder(t, &table, sections["-L -n --nosort"])
	eachRow(t, &table, sections["-L -n --stats --exact"], func(row []uint64, s *ipvs.Stats, _ *ipvs.ObservedRealServer) {
		s.Connections, s.InPackets, s.OutPackets, s.InBytes, s.OutBytes = row[0], row[1], row[2], row[3], row[4]
	})
	eachRow(t, &table, sections["-L -n --rate --exact"], func(row []uint64, s *ipvs.Stats, _ *ipvs.ObservedRealServer) {
		s.CPS, s.InPPS, s.OutPPS, s.InBPS, s.OutBPS = row[0], row[1], row[2], row[3], row[4]
	})
	eachRow(t, &table, sections["-L -n --persistent-conn"], func(row []uint64, _ *ipvs.Stats, r *ipvs.ObservedRealServer) {
		if r != nil {
			r.Persistent, r.Active, r.Inactive = uint32(row[1]), uint32(row[2]), uint32(row[3])
		}
	})
	return table
}

func addCommand(t *testing.T, table *ipvs.Table, args []string) {
	t.Helper()
	command := args[0]
	f, args := frontend(args[1:])
	v := ipvs.VirtualServer{Frontend: f}
	r := ipvs.RealServer{Weight: 1, Forwarding: ipvs.Droute}
	for args = args[1:]; len(args) > 0; args = args[1:] {
		option := args[0]
		switch option {
		case "-m":
			r.Forwarding = ipvs.Masq
			continue
		case "-g":
			r.Forwarding = ipvs.Droute
			continue
		case "-i":
			r.Forwarding = ipvs.Tunnel
			continue
		case "-o":
			v.Flags |= ipvs.OnePacket
			continue
		case "--tun-nocsum":
			continue
		case "--tun-csum":
			r.TunnelFlags = 1
			continue
		case "--tun-remcsum":
			r.TunnelFlags = 2
			continue
		}
		args = args[1:]
		value := args[0]
		number, notNumber := strconv.ParseUint(value, 10, 32)
		switch option {
		case "-s":
			v.Scheduler = value
		case "-p":
			v.Persistence = uint32(number)
		case "-M":
			v.Netmask = uint8(number)
			if notNumber != nil {
				for _, b := range netip.MustParseAddr(value).AsSlice() {
					for ; b != 0; b <<= 1 {
						v.Netmask++
					}
				}
			}
		case "--pe":
			v.Engine = value
		case "-b":
			for name := range strings.SplitSeq(value, ",") {
				v.Flags |= map[string]ipvs.Flags{
					"sh-fallback": ipvs.SchedFlag1, "mh-fallback": ipvs.SchedFlag1, "flag-1": ipvs.SchedFlag1,
					"sh-port": ipvs.SchedFlag2, "mh-port": ipvs.SchedFlag2, "flag-2": ipvs.SchedFlag2,
					"flag-3": ipvs.SchedFlag3,
				}[name]
			}
		case "-r":
			r.Addr = netip.MustParseAddrPort(value)
		case "-w":
			r.Weight = int32(number)
		case "-x":
			r.Upper = uint32(number)
		case "-y":
			r.Lower = uint32(number)
		case "--tun-type":
			r.TunnelType = map[string]uint8{"ipip": ipvs.TunnelIPIP, "gue": ipvs.TunnelGUE, "gre": ipvs.TunnelGRE}[value]
		case "--tun-port":
			r.TunnelPort = uint16(number)
		default:
			t.Fatalf("unknown option %s", option)
		}
	}
	if command == "-A" {
		table.Services = append(table.Services, ipvs.ObservedServer{VirtualServer: v})
		return
	}
	i := slices.IndexFunc(table.Services, func(s ipvs.ObservedServer) bool { return s.Frontend == f })
	table.Services[i].RealServers = append(table.Services[i].RealServers, ipvs.ObservedRealServer{RealServer: r})
}

// inKernelOrder sorts a table as an unsorted listing is.
func inKernelOrder(t *testing.T, table *ipvs.Table, listing string) {
	t.Helper()
	var sorted []ipvs.ObservedServer
	eachLine(listing, func(server, real string, _ []string) {
		if real == "" {
			i := slices.IndexFunc(table.Services, func(s ipvs.ObservedServer) bool { return rowName(s.Frontend) == server })
			if i < 0 {
				t.Fatalf("no command added %q", server)
			}
			s := table.Services[i]
			s.RealServers = nil
			sorted = append(sorted, s)
			return
		}
		s := &sorted[len(sorted)-1]
		for _, before := range table.Services {
			for _, r := range before.RealServers {
				if before.Frontend == s.Frontend && r.Addr == parseAddrPort(real) {
					s.RealServers = append(s.RealServers, r)
				}
			}
		}
	})
	table.Services = sorted
}

// eachRow calls f for each line of a listing with its numbers and what it is about.
func eachRow(t *testing.T, table *ipvs.Table, listing string, f func([]uint64, *ipvs.Stats, *ipvs.ObservedRealServer)) {
	t.Helper()
	eachLine(listing, func(server, real string, rest []string) {
		var row []uint64
		for _, field := range rest {
			number, err := strconv.ParseUint(field, 10, 64)
			if err == nil {
				row = append(row, number)
			}
		}
		i := slices.IndexFunc(table.Services, func(s ipvs.ObservedServer) bool { return rowName(s.Frontend) == server })
		s := &table.Services[i]
		if real == "" {
			f(row, &s.Stats, nil)
			return
		}
		i = slices.IndexFunc(s.RealServers, func(r ipvs.ObservedRealServer) bool { return r.Addr == parseAddrPort(real) })
		f(row, &s.RealServers[i].Stats, &s.RealServers[i])
	})
}

// eachLine calls f for each line of a listing, with real empty for a virtual server.
func eachLine(listing string, f func(server, real string, rest []string)) {
	var server string
	for line := range strings.Lines(listing) {
		words := strings.Fields(line)
		switch words[0] {
		case "IP", "Prot":
		case "->":
			if words[1] != "RemoteAddress:Port" {
				f(server, words[1], words[2:])
			}
		case "FWM":
			server, words = words[0]+" "+words[1], words[2:]
			if len(words) > 0 && words[0] == "IPv6" {
				server, words = server+" IPv6", words[1:]
			}
			f(server, "", words)
		default:
			server = words[0] + " " + words[1]
			f(server, "", words[2:])
		}
	}
}

// rowName is the name of a virtual server in a listing, without the blanks that fill it up.
func rowName(f ipvs.Frontend) string {
	switch {
	case f.Mark != 0 && f.IPv6:
		return fmt.Sprintf("FWM %d IPv6", int32(f.Mark))
	case f.Mark != 0:
		return fmt.Sprintf("FWM %d", int32(f.Mark))
	}
	addr := f.Addr.String()
	// The C library writes the last four bytes of ::/96 as an IPv4 address.
	switch addr {
	case "[::a00:1]:80":
		addr = "[::10.0.0.1]:80"
	case "[::1:0]:80":
		addr = "[::0.1.0.0]:80"
	}
	return f.Protocol.String() + " " + addr
}

func parseAddrPort(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

// TestNumbers prints counters too large for a recording.
func TestNumbers(t *testing.T) {
	for _, test := range []struct {
		value        uint64
		short, exact string
	}{
		{0, "        0", "        0"},
		{99_999_999, " 99999999", " 99999999"},
		{100_000_000, "  100000K", " 100000000"},
		{999_999_999, "  999999K", " 999999999"},
		{1_000_000_000, "    1000M", " 1000000000"},
		{99_999_999_999, "   99999M", " 99999999999"},
		{100_000_000_000, "     100G", " 100000000000"},
		{99_999_999_999_999, "   99999G", " 99999999999999"},
		{100_000_000_000_000, "     100T", " 100000000000000"},
		{1<<64 - 1, "18446744T", " 18446744073709551615"},
	} {
		f := ipvs.At(ipvs.TCP, netip.MustParseAddrPort("10.0.0.1:80"))
		table := ipvs.Table{Services: []ipvs.ObservedServer{{
			VirtualServer: ipvs.VirtualServer{Frontend: f, Scheduler: "rr"},
			Stats:         ipvs.Stats{OutBytes: test.value},
			RealServers: []ipvs.ObservedRealServer{{
				RealServer: ipvs.RealServer{Addr: f.Addr},
				Stats:      ipvs.Stats{CPS: test.value, OutBPS: test.value},
			}},
		}}}
		for _, view := range []struct {
			options ipvs.ListOptions
			line    int
			want    string
		}{
			{ipvs.ListOptions{Stats: true, Only: &f}, 2, "        0" + test.short},
			{ipvs.ListOptions{Stats: true, Exact: true, Only: &f}, 2, "        0" + test.exact},
			{ipvs.ListOptions{Rate: true, Only: &f}, 3, fmt.Sprintf(" %8d        0        0        0%s", test.value, test.short)},
			{ipvs.ListOptions{Rate: true, Exact: true, Only: &f}, 3, fmt.Sprintf(" %8d        0        0        0%s", test.value, test.exact)},
		} {
			var b strings.Builder
			if err := ipvs.List(&b, table, view.options); err != nil {
				t.Fatal(err)
			}
			if line := strings.Split(b.String(), "\n")[view.line]; !strings.HasSuffix(line, view.want) {
				t.Errorf("%d with %+v is printed %q, want it to end in %q", test.value, view.options, line, view.want)
			}
		}
	}
}

// TestLocal lists and saves a forwarding method that ipvsadm has a name but no option for.
func TestLocal(t *testing.T) {
	f := ipvs.At(ipvs.UDP, netip.MustParseAddrPort("[fd00::1]:53"))
	r := ipvs.RealServer{Addr: netip.MustParseAddrPort("[fd00::2]:53"), Forwarding: ipvs.Local, Weight: 5}
	if got, want := ipvs.SaveServerLine(f, r), "-a -u [fd00::1]:53 -r [fd00::2]:53 -g -w 5"; got != want {
		t.Errorf("saved as %q, want %q", got, want)
	}
	table := ipvs.Table{Services: []ipvs.ObservedServer{{
		VirtualServer: ipvs.VirtualServer{Frontend: f, Scheduler: "rr"},
		RealServers:   []ipvs.ObservedRealServer{{RealServer: r}},
	}}}
	var b strings.Builder
	if err := ipvs.List(&b, table, ipvs.ListOptions{Only: &f}); err != nil {
		t.Fatal(err)
	}
	if want := "  -> [fd00::2]:53                 Local   5      0          0         \n"; !strings.HasSuffix(b.String(), want) {
		t.Errorf("listed as\n%swant it to end in\n%s", b.String(), want)
	}
}
