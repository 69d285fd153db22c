package controller

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// Status is what an agent says of itself: `longshore status` prints it, -o json as it is.
type Status struct {
	Node     string          `json:"node"`
	Ready    bool            `json:"ready"` // all that is desired is in the kernel
	VIPs     []VIPStatus     `json:"vips"`
	Sessions []SessionStatus `json:"sessions"`
	Problems []string        `json:"problems"` // each names its object
}

// VIPStatus is one LoadBalancer address of one Service, as this node sees it.
type VIPStatus struct {
	Address    netip.Addr `json:"address"`
	Service    string     `json:"service"`
	Pool       string     `json:"pool,omitempty"`
	Owner      string     `json:"owner,omitempty"`      // the node that answers ARP or NDP for it
	Interfaces []string   `json:"interfaces,omitempty"` // on which it does; empty = every usable one
	Prefixes   []string   `json:"prefixes,omitempty"`   // advertised by this node over BGP
	Peers      []string   `json:"peers,omitempty"`      // that have them now
	Reason     string     `json:"reason,omitempty"`     // why it is not announced
}

// SessionStatus is a BGP session of this node.
type SessionStatus struct {
	Peer       string     `json:"peer"`
	Address    netip.Addr `json:"address"`             // none as long as no router was found on Interface
	Interface  string     `json:"interface,omitempty"` // of an unnumbered peer
	State      string     `json:"state"`
	Since      time.Time  `json:"since"`
	Advertised int        `json:"advertised"`       // prefixes
	Reason     string     `json:"reason,omitempty"` // why it ended last
	BFD        *BFDStatus `json:"bfd,omitempty"`    // the session that watches the path; nil = none does
}

// Status asks the agent's loop; it fails if the loop does not run or ctx ends.
func (a *Agent) Status(ctx context.Context) (Status, error) {
	answer := make(chan Status, 1)
	select {
	case a.queries <- func() { answer <- a.status() }:
		return <-answer, nil
	case <-ctx.Done():
		return Status{}, fmt.Errorf("ask the agent: %w", ctx.Err())
	}
}

func (a *Agent) status() Status {
	s := Status{Node: a.Node, Ready: a.Ready(), VIPs: []VIPStatus{}, Sessions: []SessionStatus{}, Problems: []string{}}
	var established []string
	for _, session := range a.Speaker.Sessions() {
		s.Sessions = append(s.Sessions, SessionStatus{
			Peer: session.Peer, Address: session.Address, Interface: session.Interface, State: session.State,
			Since: session.Since, Advertised: session.Advertised, Reason: session.Reason, BFD: bfdStatus(session.BFD),
		})
		if session.State == "established" {
			established = append(established, session.Peer)
		}
	}
	for _, w := range a.wanted() {
		v := VIPStatus{Address: w.Address, Service: w.Service.String(), Pool: w.Pool, Owner: w.Owner, Interfaces: w.Interfaces, Reason: w.Reason}
		if !slices.ContainsFunc(a.told[w.Service], func(t Announced) bool { return t.Address == w.Address }) {
			v.Owner, v.Reason = "", "the kernel refused it"
			w.Routes = nil
		} else if w.Owner == a.Node && !a.Layer2.Answering(w.Address) {
			v.Reason = "no usable link of this node is in its network, or it has just come here"
		}
		for _, r := range w.Routes {
			if p := r.Prefix.String(); !slices.Contains(v.Prefixes, p) {
				v.Prefixes = append(v.Prefixes, p)
			}
			for _, p := range established {
				if (len(r.Peers) == 0 || slices.Contains(r.Peers, p)) && !slices.Contains(v.Peers, p) {
					v.Peers = append(v.Peers, p)
				}
			}
		}
		s.VIPs = append(s.VIPs, v)
	}
	slices.SortStableFunc(s.VIPs, func(v, w VIPStatus) int { return v.Address.Compare(w.Address) })
	for _, name := range slices.SortedFunc(maps.Keys(a.services), compareNames) {
		svc := a.snapshot.services[name]
		for _, p := range a.services[name].problems {
			s.Problems = append(s.Problems, fmt.Sprintf("Service %s: %s", name, p.Message))
		}
		if svc != nil && svc.Spec.Type == corev1.ServiceTypeLoadBalancer && len(svc.Status.LoadBalancer.Ingress) == 0 {
			s.Problems = append(s.Problems, fmt.Sprintf("Service %s: has no address yet", name))
		}
	}
	for _, name := range slices.SortedFunc(maps.Keys(a.unbound), compareNames) {
		s.Problems = append(s.Problems, a.unbound[name])
	}
	if a.fence.reason != "" {
		s.Problems = append(s.Problems, "no address is answered for by ARP or NDP: "+a.fence.reason)
	}
	s.Problems = append(s.Problems, a.conflictTexts()...)
	s.Problems = append(s.Problems, a.refused...)
	s.Problems = append(s.Problems, a.warned...)
	s.Problems = append(s.Problems, a.overlaps...)
	for _, f := range a.failures {
		s.Problems = append(s.Problems, f.Err.Error())
	}
	return s
}

// Write prints a status for people.
func (s Status) Write(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 8, 3, ' ', 0)
	state := "ready"
	if !s.Ready {
		state = "not ready"
	}
	fmt.Fprintf(t, "node %s: %s\n\n", s.Node, state)
	fmt.Fprintln(t, "VIP\tSERVICE\tPOOL\tLAYER 2\tBGP FROM THIS NODE\tNOT ANNOUNCED BECAUSE")
	for _, v := range s.VIPs {
		layer2 := v.Owner
		if len(v.Interfaces) > 0 {
			layer2 += " on " + strings.Join(v.Interfaces, ",")
		}
		routes := strings.Join(v.Prefixes, ",")
		if routes != "" {
			routes += " to " + cmp.Or(strings.Join(v.Peers, ","), "nobody yet")
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\n", v.Address, v.Service, orDash(v.Pool), orDash(layer2), orDash(routes), orDash(v.Reason))
	}
	fmt.Fprintln(t, "\nBGP PEER\tADDRESS\tSTATE\tSINCE\tPREFIXES\tBFD\tENDED LAST BECAUSE")
	for _, b := range s.Sessions {
		address := b.Interface
		if b.Address.IsValid() {
			address = b.Address.String()
		}
		since := "-"
		if !b.Since.IsZero() {
			since = time.Since(b.Since).Round(time.Second).String()
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%d\t%s\t%s\n", b.Peer, address, b.State, since, b.Advertised, b.BFD.text(), orDash(b.Reason))
	}
	for i, p := range s.Problems {
		if i == 0 {
			fmt.Fprintln(t, "\nPROBLEMS")
		}
		fmt.Fprintln(t, p)
	}
	return t.Flush()
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// ServeStatus answers on a Unix socket that only root may use, until ctx ends.
func (a *Agent) ServeStatus(ctx context.Context, socket string) error {
	if err := os.MkdirAll(filepath.Dir(socket), 0o755); err != nil {
		return fmt.Errorf("status socket: %w", err)
	}
	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("status socket: %w", err)
	}
	listener, err := net.Listen("unix", socket)
	if err != nil {
		return fmt.Errorf("status socket: %w", err)
	}
	if err := os.Chmod(socket, 0o600); err != nil {
		return fmt.Errorf("status socket: %w", err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, r *http.Request) {
		status, err := a.Status(r.Context())
		if err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(status)
	})
	return serve(ctx, listener, mux)
}

func serve(ctx context.Context, listener net.Listener, handler http.Handler) error {
	server := &http.Server{Handler: handler, ReadHeaderTimeout: 10 * time.Second}
	stop := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer stop()
	if err := server.Serve(listener); err != nil && !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// FetchStatus asks the agent behind a socket.
func FetchStatus(ctx context.Context, socket string) (Status, error) {
	client := http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}}}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://agent/status", nil)
	if err != nil {
		return Status{}, err
	}
	response, err := client.Do(request)
	if err != nil {
		return Status{}, fmt.Errorf("no agent answers at %s: is it running on this node? (%w)", socket, err)
	}
	defer func() { _ = response.Body.Close() }()
	if response.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(response.Body, 1000))
		return Status{}, fmt.Errorf("agent at %s: %s: %s", socket, response.Status, strings.TrimSpace(string(text)))
	}
	var s Status
	if err := json.NewDecoder(response.Body).Decode(&s); err != nil {
		return Status{}, fmt.Errorf("agent at %s: %w", socket, err)
	}
	return s, nil
}
