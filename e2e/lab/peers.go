package lab

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// RouterConfig is FRR's configuration (bgpd) for a router of autonomous system local that takes sessions from any
// machine of the lan in autonomous system peer, over IPv4 or IPv6, with both address families in each, spreads
// over up to 8 equal routes, and drops a silent peer after 9 s. More lines may be added after it.
func RouterConfig(local, peer uint32) string {
	return fmt.Sprintf(`router bgp %[1]d
 bgp router-id 172.31.0.%[3]d
 no bgp ebgp-requires-policy
 no bgp default ipv4-unicast
 neighbor nodes peer-group
 neighbor nodes remote-as %[2]d
 neighbor nodes timers 3 9
 bgp listen limit %[6]d
 bgp listen range %[4]s peer-group nodes
 bgp listen range %[5]s peer-group nodes
 address-family ipv4 unicast
  neighbor nodes activate
  maximum-paths 8
 exit-address-family
 address-family ipv6 unicast
  neighbor nodes activate
  maximum-paths 8
 exit-address-family
exit
`, local, peer, routerNumber, lan.v4, lan.v6, MaxNodes)
}

// FRR is FRRouting's zebra, bfdd and bgpd in a host: zebra puts the routes that bgpd learns into the host's kernel, and bfdd watches the
// paths to the neighbors that bgpd is told to watch.
type FRR struct {
	host              *Host
	folder            string // configuration and sockets
	zebra, bfdd, bgpd *Process
}

// StartFRR starts FRRouting in the host with a configuration of bgpd, such as RouterConfig's, and returns when it
// takes commands. One runs in a host at a time.
func (h *Host) StartFRR(ctx context.Context, config string) (*FRR, error) {
	f := &FRR{host: h, folder: filepath.Join(h.lab.state, "frr-"+h.Name)}
	if err := f.prepare(config); err != nil {
		return nil, fmt.Errorf("start FRR in %s: %w", h.Name, err)
	}
	var err error
	if f.zebra, err = f.start("zebra"); err != nil {
		return nil, err
	}
	// bgpd looks for zebra once and then every ten seconds.
	if err := f.zebra.Await(ctx, "zebra ready", time.Minute, f.listens("zebra.vty")); err != nil {
		return nil, err
	}
	if f.bfdd, err = f.start("bfdd", "--bfdctl="+filepath.Join(f.folder, "bfdd.sock")); err != nil {
		return nil, err
	}
	if err := f.bfdd.Await(ctx, "bfdd ready", time.Minute, f.listens("bfdd.vty")); err != nil {
		return nil, err
	}
	if f.bgpd, err = f.start("bgpd", "--bgp_port=179"); err != nil {
		return nil, err
	}
	return f, f.bgpd.Await(ctx, "bgpd ready", time.Minute, f.listens("bgpd.vty"))
}

// prepare writes the configuration where user frr, which the daemons become, may read it and open sockets.
func (f *FRR) prepare(config string) error {
	if err := os.RemoveAll(f.folder); err != nil {
		return err
	}
	if err := os.Mkdir(f.folder, 0o755); err != nil {
		return err
	}
	files := map[string][]byte{
		filepath.Join(f.folder, "zebra.conf"): []byte("log stdout informational\n"),
		filepath.Join(f.folder, "bfdd.conf"):  []byte("log stdout informational\n"),
		filepath.Join(f.folder, "bgpd.conf"):  []byte("log stdout informational\n" + config),
		filepath.Join(f.folder, "vtysh.conf"): nil,
	}
	if err := writeFiles(files); err != nil {
		return err
	}
	frr, err := user.Lookup("frr")
	if err != nil {
		return fmt.Errorf("is the package frr installed? %w", err)
	}
	uid, err := strconv.Atoi(frr.Uid)
	if err != nil {
		return err
	}
	for _, name := range append(slices.Collect(maps.Keys(files)), f.folder) {
		if err := os.Chown(name, uid, -1); err != nil {
			return err
		}
	}
	return nil
}

func (f *FRR) start(daemon string, more ...string) (*Process, error) {
	return f.host.Start(Exec{
		Name: f.host.Name + "-" + daemon,
		Path: "/usr/lib/frr/" + daemon,
		Args: append([]string{
			"--config_file=" + filepath.Join(f.folder, daemon+".conf"),
			"--pid_file=" + filepath.Join(f.folder, daemon+".pid"),
			"--socket=" + filepath.Join(f.folder, "zserv.api"),
			"--vty_socket=" + f.folder, "--vty_port=0",
		}, more...),
	})
}

// listens checks that a daemon's command socket is there.
func (f *FRR) listens(socket string) func(context.Context) error {
	return func(context.Context) error {
		_, err := os.Stat(filepath.Join(f.folder, socket))
		return err
	}
}

// Show runs a command of FRR's shell and returns what it prints: show bgp ipv4 unicast json
func (f *FRR) Show(ctx context.Context, command string) (string, error) { return f.vtysh(ctx, command) }

// Configure changes the running configuration by lines as in a configuration file.
func (f *FRR) Configure(ctx context.Context, config string) error {
	commands := []string{"configure terminal"}
	for line := range strings.Lines(config) {
		commands = append(commands, strings.TrimSpace(line))
	}
	_, err := f.vtysh(ctx, commands...)
	return err
}

// vtysh runs commands one after another. It ends with status 0 even if a daemon refuses one, which its output tells.
func (f *FRR) vtysh(ctx context.Context, commands ...string) (string, error) {
	args := []string{"--vty_socket", f.folder, "--config_dir", f.folder}
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	out, err := f.host.Run(ctx, "vtysh", args...)
	if err != nil {
		return out, err
	}
	for line := range strings.Lines(out) {
		if strings.HasPrefix(line, "%") {
			return out, fmt.Errorf("vtysh in %s: %s: %s", f.host.Name, strings.Join(commands, "; "), strings.TrimSpace(line))
		}
	}
	return out, nil
}

// Stop ends the daemons; the routes they put into the kernel go.
func (f *FRR) Stop() error { return errors.Join(f.bgpd.Stop(), f.bfdd.Stop(), f.zebra.Stop()) }

// Kill ends the daemons as a crash would: sessions break, the routes stay in the router's kernel.
func (f *FRR) Kill() {
	f.bgpd.Kill()
	f.bfdd.Kill()
	f.zebra.Kill()
}

// BirdConfig is BIRD's configuration for what RouterConfig is for FRR: a router of autonomous system local that
// takes sessions from the lan's machines in autonomous system peer and puts what it learns into the kernel.
func BirdConfig(local, peer uint32) string {
	session := func(name, network string) string {
		return fmt.Sprintf(`protocol bgp %s {
  local as %d;
  neighbor range %s as %d;
  dynamic name "%s_";
  hold time 9;
  keepalive time 3;
  ipv4 { import all; export none; };
  ipv6 { import all; export none; };
}
`, name, local, network, peer, name)
	}
	return fmt.Sprintf(`router id 172.31.0.%d;
log stderr all;
protocol device {}
protocol kernel { ipv4 { export where source = RTS_BGP; }; merge paths on limit 8; }
protocol kernel { ipv6 { export where source = RTS_BGP; }; merge paths on limit 8; }
`, birdNumber) + session("nodes", lan.v4.String()) + session("nodes6", lan.v6.String())
}

// BIRD is the BIRD routing daemon in a host.
type BIRD struct {
	host    *Host
	socket  string
	process *Process
}

// StartBIRD starts BIRD in the host with a configuration, such as BirdConfig's, and returns when it takes commands.
func (h *Host) StartBIRD(ctx context.Context, config string) (*BIRD, error) {
	b := &BIRD{host: h, socket: filepath.Join(h.lab.state, "bird-"+h.Name+".ctl")}
	file := filepath.Join(h.lab.state, "bird-"+h.Name+".conf")
	if err := writeFiles(map[string][]byte{file: []byte(config)}); err != nil {
		return nil, fmt.Errorf("start BIRD in %s: %w", h.Name, err)
	}
	var err error
	b.process, err = h.Start(Exec{Name: h.Name + "-bird", Path: "bird", Args: []string{"-f", "-c", file, "-s", b.socket}})
	if err != nil {
		return nil, err
	}
	return b, b.process.Await(ctx, "BIRD ready", time.Minute, func(ctx context.Context) error {
		_, err := b.Show(ctx, "show status")
		return err
	})
}

// Show runs a command of BIRD's shell and returns what it prints: show route all
func (b *BIRD) Show(ctx context.Context, command string) (string, error) {
	return b.host.Run(ctx, "birdc", append([]string{"-s", b.socket}, strings.Fields(command)...)...)
}

// Stop ends the daemon; the routes it put into the kernel go.
func (b *BIRD) Stop() error { return b.process.Stop() }

// Kill ends the daemon as a crash would.
func (b *BIRD) Kill() { b.process.Kill() }
