// Package config turns what an operator writes into validated values: the objects of API group
// metallb.io (packages v1beta1 and v1beta2 are their wire form) and the agent's configuration file.
//
// It is pure: no cluster, no files, no network. An error names object, field and value, as in
//
//	IPAddressPool longshore-system/red: spec.addresses[1]: "10.0.0.9-10.0.0.1": range is reversed
//
// and an object with several mistakes gives one such line for each (errors.Join).
//
// The meaning of the metallb.io objects is MetalLB's (https://metallb.io/apis/). A field that MetalLB has and
// longshore does not serve yet is refused by name, never ignored.
package config

import (
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
)

// mistakes collects what is wrong with one object.
type mistakes struct {
	object string // kind and name, as error messages begin
	errs   []error
}

func mistakesOf(kind string, meta *metav1.ObjectMeta) *mistakes {
	name := meta.Name
	if meta.Namespace != "" {
		name = meta.Namespace + "/" + name
	}
	return &mistakes{object: kind + " " + name}
}

// add notes a wrong value of a field.
func (m *mistakes) add(field string, value any, format string, args ...any) {
	if s, ok := value.(string); ok {
		value = fmt.Sprintf("%q", s)
	}
	m.errs = append(m.errs, fmt.Errorf("%s: %s: %v: %w", m.object, field, value, fmt.Errorf(format, args...)))
}

// missing notes a field that must be set and is not.
func (m *mistakes) missing(field string) {
	m.errs = append(m.errs, fmt.Errorf("%s: %s: must be set", m.object, field))
}

// number reads an annotation that is a number; it is 0 if the object does not have it.
func (m *mistakes) number(of metav1.Object, annotation string, least, most uint64) uint64 {
	text, ok := of.GetAnnotations()[annotation]
	if !ok {
		return 0
	}
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil || n < least || n > most {
		m.add("annotation "+annotation, text, "must be a number between %d and %d", least, most)
		return 0
	}
	return n
}

// link notes what cannot be the name of a link.
func (m *mistakes) link(field, name string) {
	if name == "" || len(name) > 15 || strings.ContainsAny(name, "/: \t\n") { // dev_valid_name, net/core/dev.c
		m.add(field, name, "not the name of a link")
	}
}

func (m *mistakes) err() error { return errors.Join(m.errs...) }

// selectors parses a list of label selectors.
func (m *mistakes) selectors(field string, from []metav1.LabelSelector) []labels.Selector {
	var to []labels.Selector
	for i := range from {
		if s := m.selector(fmt.Sprintf("%s[%d]", field, i), &from[i]); s != nil {
			to = append(to, s)
		}
	}
	return to
}

// selector parses a label selector; it is nil, and the mistake noted, if that fails.
func (m *mistakes) selector(field string, from *metav1.LabelSelector) labels.Selector {
	s, err := metav1.LabelSelectorAsSelector(from)
	if err != nil {
		text, _ := json.Marshal(from) // plain strings always marshal
		m.add(field, string(text), "%w", err)
		return nil
	}
	return s
}

// anyMatches tells whether one of the selectors matches.
func anyMatches(selectors []labels.Selector, set labels.Set) bool {
	for _, s := range selectors {
		if s.Matches(set) {
			return true
		}
	}
	return false
}
