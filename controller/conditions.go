package controller

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"strings"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/longshore-lb/longshore/config"
	"github.com/longshore-lb/longshore/config/v1beta1"
	"github.com/longshore-lb/longshore/config/v1beta2"
)

// Accepted is the type of the condition of every object of group metallb.io: whether it is in use as it is written.
const Accepted = "Accepted"

// longestMessage is what the API server takes of a condition's message (metav1.Condition).
const longestMessage = 32768

// verdict is what the condition says of an object.
type verdict struct {
	err      error    // why it is not in use as it is written; nil = it is
	warnings []string // what of it does not come about as it is said
}

// condition is the verdict as a condition of an object of that generation. had is what the object has.
func (v verdict) condition(generation int64, had []metav1.Condition) metav1.Condition {
	c := metav1.Condition{Type: Accepted, Status: metav1.ConditionTrue, Reason: "InUse", ObservedGeneration: generation}
	switch {
	case v.err != nil:
		c.Status, c.Reason, c.Message = metav1.ConditionFalse, "Refused", v.err.Error()
	case len(v.warnings) > 0:
		c.Reason, c.Message = "InUseInPart", strings.Join(v.warnings, "\n")
	}
	c.Message = c.Message[:min(len(c.Message), longestMessage)]
	conditions := append([]metav1.Condition(nil), had...)
	meta.SetStatusCondition(&conditions, c) // which keeps the time of the last transition
	return *meta.FindStatusCondition(conditions, Accepted)
}

// judge says of each object of group metallb.io what becomes of it. pools are those that are refused.
func (s *snapshot) judge(pools []refusedPool) map[Object]verdict {
	verdicts := map[Object]verdict{}
	for _, o := range s.pools {
		verdicts[o] = verdict{}
	}
	for _, r := range pools {
		if o := s.pools[nameOf(r.object)]; o != nil { // with its latest counts
			verdicts[o] = verdict{err: r.err}
		}
	}
	refuse := func(o Object, err error) {
		v := verdicts[o]
		if v.err != nil {
			err = fmt.Errorf("%w\n%w", v.err, err)
		}
		verdicts[o] = verdict{err: err}
	}
	for _, o := range s.communities {
		verdicts[o] = verdict{}
	}
	aliases := aliasesOf(lastGood[[]config.Alias]{}, s.communities, refuse)
	for _, o := range s.bgp {
		_, err := config.ParseBGPAdvertisement(o, aliases)
		verdicts[o] = verdict{err: err}
	}
	for _, o := range s.layer2 {
		_, err := config.ParseL2Advertisement(o)
		verdicts[o] = verdict{err: err}
	}
	profiles := map[string]config.BFDProfile{}
	for _, o := range s.profiles {
		p, err := config.ParseBFDProfile(o)
		if verdicts[o] = (verdict{err: err}); err == nil {
			profiles[o.Name] = p
			verdicts[o] = verdict{warnings: echoWarning(o, p)}
		}
	}
	for _, o := range s.peers {
		p, err := config.ParsePeer(o)
		if err == nil {
			_, err = watchedBy(o, p, profiles)
		}
		verdicts[o] = verdict{err, p.Warnings}
	}
	return verdicts
}

// conditionsOf is the conditions in an object's status.
func conditionsOf(o Object) *[]metav1.Condition {
	switch o := o.(type) {
	case *v1beta1.IPAddressPool:
		return &o.Status.Conditions
	case *v1beta1.L2Advertisement:
		return &o.Status.Conditions
	case *v1beta1.BGPAdvertisement:
		return &o.Status.Conditions
	case *v1beta1.Community:
		return &o.Status.Conditions
	case *v1beta1.BFDProfile:
		return &o.Status.Conditions
	case *v1beta2.BGPPeer:
		return &o.Status.Conditions
	}
	panic(fmt.Sprintf("%T has no conditions", o)) // a mistake in this package
}

// writeConditions brings the conditions of all objects up to date, and tells whether all could be written.
func (c *Cluster) writeConditions(ctx context.Context) bool {
	whole := true
	for o, v := range c.snapshot.judge(c.unusable) {
		had := *conditionsOf(o)
		condition := v.condition(o.GetGeneration(), had)
		if before := meta.FindStatusCondition(had, Accepted); before != nil && *before == condition {
			continue
		}
		if err := c.Writer.WriteCondition(ctx, o, condition); err != nil {
			c.Log.Warn("cannot write a condition", "object", fmt.Sprintf("%T %s", o, nameOf(o)), "error", err)
			whole = false
		}
	}
	return whole
}

// WriteCondition is a StatusWriter's.
func (k *Kubernetes) WriteCondition(ctx context.Context, o Object, c metav1.Condition) error {
	client, resource := k.v1beta1, ""
	switch o.(type) {
	case *v1beta1.IPAddressPool:
		resource = "ipaddresspools"
	case *v1beta1.L2Advertisement:
		resource = "l2advertisements"
	case *v1beta1.BGPAdvertisement:
		resource = "bgpadvertisements"
	case *v1beta1.Community:
		resource = "communities"
	case *v1beta1.BFDProfile:
		resource = "bfdprofiles"
	case *v1beta2.BGPPeer:
		client, resource = k.v1beta2, "bgppeers"
	}
	conditions := append([]metav1.Condition(nil), *conditionsOf(o)...)
	meta.SetStatusCondition(&conditions, c)
	status := map[string]any{"conditions": conditions}
	if p, ok := o.(*v1beta1.IPAddressPool); ok { // whose counts are required
		maps.Copy(status, countsOf(p))
	}
	body, err := json.Marshal(map[string]any{"status": status})
	if err != nil {
		return err
	}
	return client.Patch(types.MergePatchType).Namespace(o.GetNamespace()).Resource(resource).Name(o.GetName()).SubResource("status").Body(body).Do(ctx).Error()
}
