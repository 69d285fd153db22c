package bgp

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/osrg/gobgp/v4/api"
)

// tagAdministrator is the global administrator of the large community that tags a path with the number of its
// audience. RFC 8092 section 5 reserves it, and the export policy takes the tag off: no peer ever sees it.
const tagAdministrator = 4294967295

const (
	importPolicy = "own-routes-in"
	exportPolicy = "audiences-out"
)

// tag is the large community of the paths with the audience of this number.
func tag(number uint32) string { return fmt.Sprintf("%d:0:%d", uint32(tagAdministrator), number) }

// policies returns all of gobgp's policies.
//
// In: our own routes and no others. Ours pass the import policy too, and a mere default of reject would drop them silently.
// Out: for each audience, each peer that hears it and each family, one statement that accepts the path and gives it that peer's attributes.
// What no statement accepts stays here.
func policies(audiences map[uint32]audience, peers []Peer) *api.SetPoliciesRequest {
	request := &api.SetPoliciesRequest{}
	for _, p := range peers {
		request.DefinedSets = append(request.DefinedSets, &api.DefinedSet{
			DefinedType: api.DefinedType_DEFINED_TYPE_NEIGHBOR,
			Name:        neighborSet(p),
			List:        []string{netip.PrefixFrom(p.Address.WithZone(""), p.Address.BitLen()).String()},
		})
	}
	out := &api.Policy{Name: exportPolicy}
	for _, number := range slices.Sorted(maps.Keys(audiences)) {
		tagSet := fmt.Sprintf("audience-%d", number)
		request.DefinedSets = append(request.DefinedSets, &api.DefinedSet{
			DefinedType: api.DefinedType_DEFINED_TYPE_LARGE_COMMUNITY,
			Name:        tagSet,
			List:        []string{"^" + tag(number) + "$"},
		})
		for _, p := range peers {
			attrs, hears := audiences[number].attributes(p)
			if !hears {
				continue
			}
			for _, family := range []*api.Family{ipv4Unicast, ipv6Unicast} {
				self := ownNextHop(p, family)
				if !self && audiences[number].ownFamily {
					continue
				}
				actions := attrs.actions(p)
				if self {
					actions.Nexthop = &api.NexthopAction{Self: true}
				}
				out.Statements = append(out.Statements, &api.Statement{
					Name: fmt.Sprintf("%s-%s-%s", tagSet, neighborSet(p), family.Afi),
					Conditions: &api.Conditions{
						LargeCommunitySet: &api.MatchSet{Type: api.MatchSet_TYPE_ANY, Name: tagSet},
						NeighborSet:       &api.MatchSet{Type: api.MatchSet_TYPE_ANY, Name: neighborSet(p)},
						AfiSafiIn:         []*api.Family{family},
					},
					Actions: actions,
				})
			}
		}
	}
	in := &api.Policy{Name: importPolicy, Statements: []*api.Statement{{
		Name:       importPolicy,
		Conditions: &api.Conditions{RouteType: api.Conditions_ROUTE_TYPE_LOCAL},
		Actions:    &api.Actions{RouteAction: api.RouteAction_ROUTE_ACTION_ACCEPT},
	}}}
	request.Policies = []*api.Policy{in, out}
	return request
}

func neighborSet(p Peer) string { return "peer-" + p.Address.WithZone("").String() }

// ownNextHop says whether our end of the session with p can be the next hop of routes of the family.
func ownNextHop(p Peer, family *api.Family) bool {
	if p.Interface != "" {
		return true
	}
	return p.Address.Is4() == (family.Afi == api.Family_AFI_IP) && !(p.Address.Is6() && p.Address.IsLinkLocalUnicast())
}

// actions accept a path for p and make its attributes these. Replacing the large communities takes the tag off.
func (a attributes) actions(p Peer) *api.Actions {
	communities := &api.CommunityAction{Type: api.CommunityAction_TYPE_REPLACE}
	large := &api.CommunityAction{Type: api.CommunityAction_TYPE_REPLACE}
	for _, c := range a.communities {
		if l, ok := strings.CutPrefix(c, "large:"); ok {
			large.Communities = append(large.Communities, l)
		} else {
			communities.Communities = append(communities.Communities, c)
		}
	}
	actions := &api.Actions{
		RouteAction:    api.RouteAction_ROUTE_ACTION_ACCEPT,
		Community:      communities,
		LargeCommunity: large,
	}
	if a.localPref != 0 {
		actions.LocalPref = &api.LocalPrefAction{Value: a.localPref}
	}
	if a.med != 0 {
		actions.Med = &api.MedAction{Type: api.MedAction_TYPE_REPLACE, Value: int64(a.med)}
	}
	if a.prepend != 0 {
		actions.AsPrepend = &api.AsPrependAction{Asn: p.localASN(), Repeat: uint32(a.prepend)}
	}
	return actions
}
