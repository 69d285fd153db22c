package config

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/longshore-lb/longshore/config/v1beta1"
)

// Alias is a name that a Community object gives a community.
type Alias struct {
	Name  string // not empty, without colons
	Value string // a:b or large:a:b:c, as in BGPAdvertisement.Communities
}

// Aliases is the communities that have names, by name.
type Aliases map[string]string

// ParseCommunity validates a Community and returns its aliases in their order.
func ParseCommunity(from *v1beta1.Community) ([]Alias, error) {
	m := mistakesOf("Community", &from.ObjectMeta)
	var aliases []Alias
	first := map[string]int{}
	for i, c := range from.Spec.Communities {
		field := fmt.Sprintf("spec.communities[%d]", i)
		if other, twice := first[c.Name]; twice {
			m.add(field+".name", c.Name, "is the name of spec.communities[%d] already", other)
		} else {
			first[c.Name] = i
		}
		switch {
		case c.Name == "":
			m.missing(field + ".name")
		case strings.Contains(c.Name, ":"):
			m.add(field+".name", c.Name, "has a colon, as only communities have")
		}
		value, err := parseCommunity(c.Value)
		if err != nil {
			m.add(field+".value", c.Value, "%w", err)
		}
		aliases = append(aliases, Alias{c.Name, value})
	}
	if err := m.err(); err != nil {
		return nil, err
	}
	return aliases, nil
}

// community reads a community or the name of one. It is "" for a name if there are no aliases at all.
func (a Aliases) community(text string) (string, error) {
	if text == "" || strings.Contains(text, ":") {
		return parseCommunity(text)
	}
	if a == nil {
		return "", nil
	}
	value, ok := a[text]
	if !ok {
		return "", errors.New("no Community object has this name, and it is neither a:b nor large:a:b:c")
	}
	return value, nil
}

// parseCommunity reads a:b (RFC 1997: 16 bits each) or large:a:b:c (RFC 8092: 32 bits each).
func parseCommunity(text string) (string, error) {
	numbers, large := strings.CutPrefix(text, "large:")
	parts := strings.Split(numbers, ":")
	want, bits := 2, 16
	if large {
		want, bits = 3, 32
	}
	if len(parts) != want {
		return "", errors.New("neither a:b nor large:a:b:c")
	}
	for i, p := range parts {
		n, err := strconv.ParseUint(p, 10, bits)
		if err != nil {
			return "", fmt.Errorf("%q is not a number of %d bits", p, bits)
		}
		parts[i] = strconv.FormatUint(n, 10)
	}
	if large && parts[0] == "4294967295" {
		return "", fmt.Errorf("%q is reserved (RFC 8092 section 5)", parts[0])
	}
	c := strings.Join(parts, ":")
	if large {
		c = "large:" + c
	}
	return c, nil
}
