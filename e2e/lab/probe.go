package lab

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/mdlayher/arp"
	"github.com/mdlayher/ndp"
)

// WhoHas asks the host's first network who has an address, once, by ARP or by a neighbour solicitation, and
// returns the hardware addresses of all who answer within the time, in the order of their answers. The host's own
// tables are not touched.
func (h *Host) WhoHas(addr netip.Addr, within time.Duration) (answers []net.HardwareAddr, err error) {
	err = h.run(func() error {
		device, err := net.InterfaceByName(h.Link.device)
		if err != nil {
			return err
		}
		ask := askARP
		if addr.Is6() {
			ask = askNDP
		}
		answers, err = ask(device, addr, time.Now().Add(within))
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("ask from %s who has %s: %w", h.Name, addr, err)
	}
	return answers, nil
}

func askARP(device *net.Interface, addr netip.Addr, deadline time.Time) ([]net.HardwareAddr, error) {
	client, err := arp.Dial(device)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	if err := errors.Join(client.SetDeadline(deadline), client.Request(addr)); err != nil {
		return nil, err
	}
	return collect(func() (net.HardwareAddr, error) {
		p, _, err := client.Read()
		if err != nil || p.Operation != arp.OperationReply || p.SenderIP != addr {
			return nil, err
		}
		return p.SenderHardwareAddr, nil
	})
}

func askNDP(device *net.Interface, addr netip.Addr, deadline time.Time) ([]net.HardwareAddr, error) {
	conn, _, err := ndp.Listen(device, ndp.LinkLocal)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	group, err := ndp.SolicitedNodeMulticast(addr)
	if err != nil {
		return nil, err
	}
	question := &ndp.NeighborSolicitation{
		TargetAddress: addr,
		Options:       []ndp.Option{&ndp.LinkLayerAddress{Direction: ndp.Source, Addr: device.HardwareAddr}},
	}
	if err := errors.Join(conn.SetDeadline(deadline), conn.WriteTo(question, nil, group)); err != nil {
		return nil, err
	}
	return collect(func() (net.HardwareAddr, error) {
		message, _, _, err := conn.ReadFrom()
		answer, ok := message.(*ndp.NeighborAdvertisement)
		if err != nil || !ok || answer.TargetAddress != addr {
			return nil, err
		}
		for _, o := range answer.Options {
			if target, ok := o.(*ndp.LinkLayerAddress); ok && target.Direction == ndp.Target {
				return target.Addr, nil
			}
		}
		return nil, nil
	})
}

// Answered is one answer to the question who has an address.
type Answered struct {
	At time.Time
	By net.HardwareAddr
}

// Watch asks the host's first network by ARP, again and again, who has an IPv4 address, until the function that it returns is
// called, which tells all answers in their order.
func (h *Host) Watch(addr netip.Addr, every time.Duration) (end func() []Answered, err error) {
	var client *arp.Client
	err = h.run(func() error {
		device, err := net.InterfaceByName(h.Link.device)
		if err == nil {
			client, err = arp.Dial(device)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("watch %s from %s: %w", addr, h.Name, err)
	}
	var answers []Answered
	var working sync.WaitGroup
	stop := make(chan struct{})
	working.Go(func() {
		for {
			p, _, err := client.Read()
			if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, os.ErrClosed) {
				return
			}
			if err == nil && p.Operation == arp.OperationReply && p.SenderIP == addr && p.TargetIP != addr { // not gratuitous
				answers = append(answers, Answered{time.Now(), p.SenderHardwareAddr})
			}
		}
	})
	working.Go(func() {
		tick := time.NewTicker(every)
		defer tick.Stop()
		for {
			_ = client.Request(addr) // what is lost is asked again
			select {
			case <-stop:
				return
			case <-tick.C:
			}
		}
	})
	return func() []Answered {
		close(stop)
		_ = client.SetReadDeadline(time.Now().Add(every))
		working.Wait()
		_ = client.Close()
		return answers
	}, nil
}

// collect calls read until its deadline has passed, and returns each address once.
func collect(read func() (net.HardwareAddr, error)) ([]net.HardwareAddr, error) {
	var all []net.HardwareAddr
	for {
		mac, err := read()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return all, nil
		}
		if err != nil {
			return nil, err
		}
		if mac != nil && !slices.ContainsFunc(all, func(m net.HardwareAddr) bool { return m.String() == mac.String() }) {
			all = append(all, mac)
		}
	}
}
