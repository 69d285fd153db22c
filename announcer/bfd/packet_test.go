package bfd

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// good is an Up packet as RFC 5880 section 4.1 draws it.
func good() []byte {
	return []byte{
		0x20, 0xe0, 3, 24, // version 1, no diagnostic; Up, poll; multiplier 3
		0x11, 0x22, 0x33, 0x44, // my discriminator
		0x55, 0x66, 0x77, 0x88, // your discriminator
		0, 0x04, 0x93, 0xe0, // 300 ms
		0, 0, 0xc3, 0x50, // 50 ms
		0, 0, 0, 0,
	}
}

func TestParse(t *testing.T) {
	want := packet{
		state: Up, poll: true, multiplier: 3, my: 0x11223344, your: 0x55667788,
		desiredMinTx: 300 * time.Millisecond, requiredMinRx: 50 * time.Millisecond,
	}
	got, err := parse(good())
	if err != nil {
		t.Fatal(err)
	}
	if got != want {
		t.Errorf("parsed %+v, want %+v", got, want)
	}
	if diff := cmp.Diff(good(), want.marshal()); diff != "" {
		t.Errorf("marshaled (-want +got):\n%s", diff)
	}
	if _, err := parse(append(good(), 1, 2, 3)); err != nil {
		t.Errorf("with bytes after its length: %v", err)
	}
}

// TestParseRefuses has each check of RFC 5880 section 6.8.6 that needs no session.
func TestParseRefuses(t *testing.T) {
	for _, test := range []struct {
		name string
		edit func([]byte) []byte
		want string // part of the error
	}{
		{"empty", func([]byte) []byte { return nil }, "0 bytes"},
		{"short", func(b []byte) []byte { return b[:23] }, "23 bytes"},
		{"version 0", func(b []byte) []byte { b[0] = 0; return b }, "version is 0"},
		{"version 2", func(b []byte) []byte { b[0] = 0x40; return b }, "version is 2"},
		{"length below the least", func(b []byte) []byte { b[3] = 23; return b }, "length 23"},
		{"length beyond the packet", func(b []byte) []byte { b[3] = 25; return b }, "length 25"},
		{"authenticated", func(b []byte) []byte { b[1] |= flagAuthentication; b[3] = 26; return append(b, 1, 2) }, "authenticated"},
		{"multiplier", func(b []byte) []byte { b[2] = 0; return b }, "multiplier is 0"},
		{"multipoint", func(b []byte) []byte { b[1] |= flagMultipoint; return b }, "multipoint"},
		{"my discriminator", func(b []byte) []byte { clear(b[4:8]); return b }, "my discriminator"},
		{"Up without your discriminator", func(b []byte) []byte { clear(b[8:12]); return b }, "your discriminator is 0 in state up"},
		{"Init without your discriminator", func(b []byte) []byte { b[1] = 0x80; clear(b[8:12]); return b }, "in state init"},
	} {
		if got, err := parse(test.edit(good())); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %+v, error %v, want %q", test.name, got, err, test.want)
		}
	}
	for _, state := range []State{AdminDown, Down} {
		b := good()
		b[1] = byte(state) << 6
		clear(b[8:12])
		if _, err := parse(b); err != nil {
			t.Errorf("%v without your discriminator: %v", state, err)
		}
	}
}

// FuzzParse: what is taken is what the rules allow, and is the same after it has been on the wire.
func FuzzParse(f *testing.F) {
	f.Add(good())
	f.Add([]byte{})
	f.Add(append(good(), good()...))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := parse(b)
		if err != nil {
			return
		}
		if p.my == 0 || p.multiplier == 0 || p.your == 0 && p.state > Down {
			t.Fatalf("took %+v", p)
		}
		again, err := parse(p.marshal())
		if err != nil || again != p {
			t.Fatalf("%+v came back as %+v, %v", p, again, err)
		}
	})
}
