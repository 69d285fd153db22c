package lab

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Link is the cable from a machine's first interface to its switch, or from a pod to its node.
type Link struct {
	far, near         *namespace // the switch's (or node's) end, the machine's end
	port, device      string     // what the ends are called there
	bridge            string     // what the port belongs to, "" for none
	hairpin           bool       // the port sends back to where a frame came from, if need be
	farLink, nearLink netlink.Link
}

// newCable makes a veth pair between two namespaces, both ends up.
func newCable(far *namespace, port string, near *namespace, device string) (*Link, error) {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = port
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: device, PeerNamespace: netlink.NsFd(near.handle)}
	if err := far.kernel.LinkAdd(veth); err != nil {
		return nil, fmt.Errorf("add veth %s in %s: %w", port, far.name, err)
	}
	k := &Link{far: far, near: near, port: port, device: device}
	var err error
	if k.farLink, err = far.kernel.LinkByName(port); err != nil {
		return nil, fmt.Errorf("find %s in %s: %w", port, far.name, err)
	}
	if k.nearLink, err = near.kernel.LinkByName(device); err != nil {
		return nil, fmt.Errorf("find %s in %s: %w", device, near.name, err)
	}
	if err := errors.Join(far.kernel.LinkSetUp(k.farLink), near.kernel.LinkSetUp(k.nearLink)); err != nil {
		return nil, fmt.Errorf("set %s of %s up: %w", device, near.name, err)
	}
	return k, nil
}

func (k *Link) connect(bridge string) error {
	master, err := k.far.kernel.LinkByName(bridge)
	if err != nil {
		return fmt.Errorf("find bridge %s: %w", bridge, err)
	}
	if err := k.far.kernel.LinkSetMaster(k.farLink, master); err != nil {
		return fmt.Errorf("put %s into %s: %w", k.port, bridge, err)
	}
	k.bridge = bridge
	if !k.hairpin {
		return nil
	}
	if err := k.far.kernel.LinkSetHairpin(k.farLink, true); err != nil {
		return fmt.Errorf("let %s send back into %s: %w", k.port, k.near.name, err)
	}
	return nil
}

// setMTU limits the packets of both ends.
func (k *Link) setMTU(mtu int) error {
	if err := errors.Join(k.far.kernel.LinkSetMTU(k.farLink, mtu), k.near.kernel.LinkSetMTU(k.nearLink, mtu)); err != nil {
		return fmt.Errorf("limit packets of %s of %s to %d bytes: %w", k.device, k.near.name, mtu, err)
	}
	return nil
}

// Cut unplugs the cable: the machine loses its carrier and every packet is lost.
func (k *Link) Cut() error {
	if err := k.far.kernel.LinkSetDown(k.farLink); err != nil {
		return fmt.Errorf("cut %s of %s: %w", k.device, k.near.name, err)
	}
	return nil
}

// Mend plugs the cable in again after Cut or Silence.
func (k *Link) Mend() error {
	if err := k.far.kernel.LinkSetUp(k.farLink); err != nil {
		return fmt.Errorf("mend %s of %s: %w", k.device, k.near.name, err)
	}
	if k.bridge == "" {
		return nil
	}
	return k.connect(k.bridge)
}

// Silence loses every packet while the machine still sees a carrier, as when something breaks farther away.
func (k *Link) Silence() error {
	if k.bridge == "" {
		return fmt.Errorf("silence %s of %s: only a cable to a switch or a bridge can be silenced", k.device, k.near.name)
	}
	if err := k.far.kernel.LinkSetNoMaster(k.farLink); err != nil {
		return fmt.Errorf("silence %s of %s: %w", k.device, k.near.name, err)
	}
	return nil
}

// Flap cuts and mends the cable a number of times, down and up for the given times, and leaves it up.
func (k *Link) Flap(ctx context.Context, times int, down, up time.Duration) error {
	for range times {
		if err := k.Cut(); err != nil {
			return err
		}
		cut := pause(ctx, down)
		if err := errors.Join(k.Mend(), cut); err != nil {
			return err
		}
		if err := pause(ctx, up); err != nil {
			return err
		}
	}
	return nil
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(d):
		return nil
	}
}

// Quality is how badly a cable carries packets, in each direction. The zero value is a perfect cable.
type Quality struct {
	Delay  time.Duration // to each packet, at least 1 µs
	Jitter time.Duration // at most this much more or less delay
	Loss   float64       // percent of packets lost, 0 to 100
}

// Degrade makes a cable slow or lossy with the kernel's netem (tc-netem(8)); the error tells if the kernel has
// none. Degrade(Quality{}) makes it perfect again.
func (k *Link) Degrade(q Quality) error {
	if q.Loss < 0 || q.Loss > 100 {
		return fmt.Errorf("degrade %s of %s: loss is %v percent, must be 0 to 100", k.device, k.near.name, q.Loss)
	}
	return errors.Join(degrade(k.far, k.farLink, q), degrade(k.near, k.nearLink, q))
}

func degrade(in *namespace, link netlink.Link, q Quality) error {
	attrs := netlink.QdiscAttrs{LinkIndex: link.Attrs().Index, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT}
	qdisc := netlink.NewNetem(attrs, netlink.NetemQdiscAttrs{
		Latency: uint32(q.Delay.Microseconds()),
		Jitter:  uint32(q.Jitter.Microseconds()),
		Loss:    float32(q.Loss),
	})
	if q == (Quality{}) {
		err := in.kernel.QdiscDel(qdisc)
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL) { // it was perfect
			return nil
		}
		return err
	}
	err := in.kernel.QdiscReplace(qdisc)
	if errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("degrade %s in %s: this kernel has no netem (module sch_netem): %w", link.Attrs().Name, in.name, err)
	}
	if err != nil {
		return fmt.Errorf("degrade %s in %s: %w", link.Attrs().Name, in.name, err)
	}
	return nil
}

// Split parts the nodes on the lan: two that are in different groups do not hear each other, everybody else hears all. Without
// groups it makes the lan whole again.
func (l *Lab) Split(groups ...[]*Node) error {
	var rules strings.Builder
	for i, group := range groups {
		for _, other := range slices.Concat(groups[i+1:]...) {
			for _, n := range group {
				a, b := n.Link.port, other.Link.port
				fmt.Fprintf(&rules, "iifname %[1]q oifname %[2]q drop\niifname %[2]q oifname %[1]q drop\n", a, b)
			}
		}
	}
	// Declared before it is deleted, so that it is there to be deleted.
	return l.network.bridges.nft(fmt.Sprintf(`table bridge split {}
		delete table bridge split
		table bridge split {
			chain forward {
				type filter hook forward priority filter
				%s
			}
		}`, rules.String()))
}
