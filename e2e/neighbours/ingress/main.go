// Ingress is an ingress controller made of Traefik's parts: its Kubernetes provider (which watches Ingresses, Services
// and their endpoints and writes the Ingresses' status), its routing rules and its UDP proxy. Traefik's own program has
// all clouds' certificate providers in it, which take longer to build than the whole control plane.
package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/signal"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/traefik/traefik/v3/pkg/config/dynamic"
	muxer "github.com/traefik/traefik/v3/pkg/muxer/http"
	"github.com/traefik/traefik/v3/pkg/provider/kubernetes/ingress"
	"github.com/traefik/traefik/v3/pkg/safe"
	"github.com/traefik/traefik/v3/pkg/tls/generate"
	"github.com/traefik/traefik/v3/pkg/udp"
	"golang.org/x/sync/errgroup"
)

func main() {
	published := flag.String("published-service", "", "NAMESPACE/NAME of the Service whose addresses go into the Ingresses' status")
	plain := flag.String("http", ":8000", "where to serve HTTP")
	secure := flag.String("https", ":8443", "where to serve HTTPS, with a certificate that nobody has signed")
	packets := flag.String("udp", ":8053", "where to take UDP packets")
	target := flag.String("udp-target", "", "ADDRESS:PORT to send them to")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	c := &controller{provider: ingress.Provider{
		IngressEndpoint:   &ingress.EndpointIngress{PublishedService: *published},
		NativeLBByDefault: true, // to a Service's cluster IP, not to its endpoints
	}}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return c.follow(ctx) })
	group.Go(func() error { return c.serve(ctx, *plain, false) })
	group.Go(func() error { return c.serve(ctx, *secure, true) })
	group.Go(func() error { return forward(ctx, *packets, *target) })
	if err := group.Wait(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// controller serves what the Ingresses say at the moment.
type controller struct {
	provider ingress.Provider
	routes   atomic.Pointer[muxer.Muxer]
}

// ServeHTTP is not ready to serve before the first list of Ingresses.
func (c *controller) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	routes := c.routes.Load()
	switch {
	case routes == nil:
		http.Error(w, "the Ingresses are not known yet", http.StatusServiceUnavailable)
	case r.URL.Path == "/ping":
		fmt.Fprintln(w, "OK")
	default:
		routes.ServeHTTP(w, r)
	}
}

// follow makes the routes anew whenever the provider tells of a change.
func (c *controller) follow(ctx context.Context) error {
	pool := safe.NewPool(ctx)
	defer pool.Stop()
	changes := make(chan dynamic.Message)
	if err := c.provider.Provide(changes, pool); err != nil {
		return err
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case change := <-changes:
			routes, err := routesOf(change.Configuration.HTTP)
			if err != nil {
				return err
			}
			c.routes.Store(routes)
		}
	}
}

func routesOf(c *dynamic.HTTPConfiguration) (*muxer.Muxer, error) {
	parser, err := muxer.NewSyntaxParser()
	if err != nil {
		return nil, err
	}
	routes := muxer.NewMuxer(parser)
	for name, r := range c.Routers {
		service := c.Services[r.Service]
		if service == nil || service.LoadBalancer == nil {
			return nil, fmt.Errorf("router %s: no service %q", name, r.Service)
		}
		b, err := newBalancer(service.LoadBalancer.Servers)
		if err != nil {
			return nil, fmt.Errorf("router %s: service %s: %w", name, r.Service, err)
		}
		if err := routes.AddRoute(r.Rule, r.RuleSyntax, cmp.Or(r.Priority, muxer.GetRulePriority(r.Rule)), b); err != nil {
			return nil, fmt.Errorf("router %s: %w", name, err)
		}
	}
	return routes, nil
}

// balancer hands requests to its servers in turn.
type balancer struct {
	servers []*httputil.ReverseProxy
	next    atomic.Uint64
}

func newBalancer(servers []dynamic.Server) (*balancer, error) {
	b := &balancer{}
	for _, s := range servers {
		to, err := url.Parse(s.URL)
		if err != nil {
			return nil, err
		}
		b.servers = append(b.servers, &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(to)
			r.SetXForwarded()
		}})
	}
	return b, nil
}

func (b *balancer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if len(b.servers) == 0 {
		http.Error(w, "no server", http.StatusServiceUnavailable)
		return
	}
	b.servers[b.next.Add(1)%uint64(len(b.servers))].ServeHTTP(w, r)
}

func (c *controller) serve(ctx context.Context, address string, secure bool) error {
	s := &http.Server{Addr: address, Handler: c}
	context.AfterFunc(ctx, func() { _ = s.Shutdown(context.WithoutCancel(ctx)) })
	var err error
	if secure {
		var own *tls.Certificate
		if own, err = generate.DefaultCertificate(); err != nil {
			return err
		}
		s.TLSConfig = &tls.Config{Certificates: []tls.Certificate{*own}}
		err = s.ListenAndServeTLS("", "")
	} else {
		err = s.ListenAndServe()
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// forward sends packets to the target and its answers back.
func forward(ctx context.Context, address, target string) error {
	listener, err := udp.Listen(net.ListenConfig{}, "udp", address, 3*time.Second)
	if err != nil {
		return err
	}
	context.AfterFunc(ctx, func() { _ = listener.Close() })
	proxy, err := udp.NewProxy(target)
	if err != nil {
		return err
	}
	for {
		conn, err := listener.Accept()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		go proxy.ServeUDP(conn)
	}
}
