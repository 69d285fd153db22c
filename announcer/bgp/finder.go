package bgp

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"time"

	"github.com/mdlayher/ndp"
)

const (
	// advertiseEvery is how often a finder says that it is there; FRR does so as often (zebra/rtadv.c, BGP unnumbered).
	advertiseEvery = 10 * time.Second

	// openEvery is how often a finder tries to use a link that is not there, or not up.
	openEvery = 2 * time.Second
)

// finder finds the router on a link, by its router advertisements (RFC 4861 section 4.2), and lets itself be found: routers that do
// unnumbered BGP take a session only from who has advertised. It advertises a lifetime of 0, so that nobody takes the node for a
// default router.
type finder struct {
	log  *slog.Logger
	link string
	// heard is called for each advertisement, with the router's link-local address on the link.
	heard func(router netip.Addr)
}

// run finds until ctx ends.
func (f *finder) run(ctx context.Context) {
	var last string
	for {
		if err := f.listen(ctx); err != nil && ctx.Err() == nil && err.Error() != last {
			last = err.Error()
			f.log.Warn("cannot look for a router", "link", f.link, "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(openEvery):
		}
	}
}

// listen returns when the link cannot be used any more, or ctx ends.
func (f *finder) listen(ctx context.Context) error {
	link, err := net.InterfaceByName(f.link)
	if err != nil {
		return fmt.Errorf("link %s: %w", f.link, err)
	}
	conn, own, err := ndp.Listen(link, ndp.LinkLocal)
	if err != nil {
		return fmt.Errorf("listen on %s: %w", f.link, err)
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	defer func() { _ = conn.Close() }()
	for _, group := range []netip.Addr{netip.IPv6LinkLocalAllNodes(), netip.IPv6LinkLocalAllRouters()} {
		if err := conn.JoinGroup(group); err != nil {
			return fmt.Errorf("join %s on %s: %w", group, f.link, err)
		}
	}
	source := ndp.Option(&ndp.LinkLayerAddress{Direction: ndp.Source, Addr: link.HardwareAddr})
	if err := conn.WriteTo(&ndp.RouterSolicitation{Options: []ndp.Option{source}}, nil, netip.IPv6LinkLocalAllRouters()); err != nil {
		return fmt.Errorf("solicit routers on %s: %w", f.link, err)
	}
	for {
		if err := conn.WriteTo(&ndp.RouterAdvertisement{Options: []ndp.Option{source}}, nil, netip.IPv6LinkLocalAllNodes()); err != nil {
			return fmt.Errorf("advertise on %s: %w", f.link, err)
		}
		if err := f.read(conn, own, time.Now().Add(advertiseEvery)); err != nil {
			return fmt.Errorf("read on %s: %w", f.link, err)
		}
	}
}

// read hears routers until then, or until one asks whether we are there.
func (f *finder) read(conn *ndp.Conn, own netip.Addr, until time.Time) error {
	if err := conn.SetReadDeadline(until); err != nil {
		return err
	}
	for {
		message, control, from, err := conn.ReadFrom()
		if timeout := net.Error(nil); errors.As(err, &timeout) && timeout.Timeout() {
			return nil
		}
		if err != nil {
			return err
		}
		// Only who is on the link can have sent it (RFC 4861 section 6.1.2).
		if control != nil && control.HopLimit != ndp.HopLimit || from.WithZone("") == own.WithZone("") {
			continue
		}
		switch message.(type) {
		case *ndp.RouterAdvertisement:
			if from.IsLinkLocalUnicast() {
				f.heard(from.WithZone(f.link))
			}
		case *ndp.RouterSolicitation:
			return nil
		}
	}
}

// routers is the routers that were found, by link. A router that has a session stays the one of its link, whoever else is there.
type routers struct {
	finders map[string]context.CancelFunc
	found   map[string]netip.Addr
}

// look starts and stops finders, so that there is one for each link that a peer of c names.
func (s *Speaker) look(ctx context.Context, c Config) {
	s.mu.Lock()
	defer s.mu.Unlock()
	wanted := map[string]bool{}
	for _, p := range c.Peers {
		if p.Interface == "" || wanted[p.Interface] {
			continue
		}
		wanted[p.Interface] = true
		if s.routers.finders[p.Interface] != nil {
			continue
		}
		finding, cancel := context.WithCancel(ctx)
		s.routers.finders[p.Interface] = cancel
		f := &finder{log: s.log, link: p.Interface, heard: func(router netip.Addr) { s.heard(finding, router) }}
		s.finding.Go(func() { f.run(finding) })
	}
	for link, cancel := range s.routers.finders {
		if !wanted[link] {
			cancel()
			delete(s.routers.finders, link)
			delete(s.routers.found, link)
		}
	}
}

// heard takes note of a router, unless the finder was stopped.
func (s *Speaker) heard(finding context.Context, router netip.Addr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	link := router.Zone()
	had := s.routers.found[link]
	if finding.Err() != nil || had == router || s.board != nil && s.board.established(had) {
		return
	}
	s.log.Info("router found", "link", link, "address", router)
	s.routers.found[link] = router
	s.wake()
}

// resolved is c with the addresses of the routers that were found. Peers whose router was not have none.
func (s *Speaker) resolved(c Config) Config {
	s.mu.Lock()
	defer s.mu.Unlock()
	peers := make([]Peer, 0, len(c.Peers))
	for _, p := range c.Peers {
		if p.Interface != "" {
			p.Address = s.routers.found[p.Interface]
		}
		peers = append(peers, p)
	}
	c.Peers = peers
	return c
}
