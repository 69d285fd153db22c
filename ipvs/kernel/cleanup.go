package kernel

import (
	"errors"
	"fmt"
	"slices"

	"github.com/google/nftables"

	"github.com/longshore-lb/longshore/ipvs"
)

// Cleanup removes from the kernel all that is longshore's, and nothing else: first what leads packets to virtual servers,
// then these, as in [ipvs.Diff], and last the nftables tables. tell gets each step, as the command of ip, ipvsadm or nft
// that does the same; with dryRun that is all that happens. If a step fails the tables stay: they are the mark of what is
// ours, so it can be done again. Sysctls stay in any case: what they were before is not known, and the host has them too.
func (k *Kernel) Cleanup(dryRun bool, tell func(command string)) error {
	ours, tables, err := k.remains()
	if err != nil {
		return err
	}
	ops := slices.DeleteFunc(ipvs.Diff(ours, ipvs.State{}), func(o ipvs.Operation) bool {
		return o.Kind == ipvs.KindElement // they go with their tables
	})
	for _, o := range ops {
		if o.Kind == ipvs.KindRoute {
			tell(fmt.Sprintf("%s proto %d", o, routeProtocol)) // another one may lead to the same addresses
		} else {
			tell("ipvsadm " + o.String())
		}
	}
	for _, t := range tables {
		tell("nft delete table " + familyNames[t.Family] + " " + t.Name)
	}
	if dryRun {
		return nil
	}
	var errs []error
	for _, f := range k.Apply(ops) {
		errs = append(errs, f.Err)
	}
	if len(errs) > 0 {
		return fmt.Errorf("the nftables tables %q stay, so that this can be done again: %w", tableName, errors.Join(errs...))
	}
	return k.filter.remove(tables)
}

// remains is the virtual servers and routes that are ours and the tables that are there, without need of any of these.
func (k *Kernel) remains() (ours ipvs.State, tables []*nftables.Table, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if tables, err = k.filter.remains(&ours); err != nil {
		return ours, nil, err
	}
	if err := k.observeRoutes(&ours); err != nil {
		return ours, nil, err
	}
	services, err := k.services()
	if err != nil {
		return ours, nil, err
	}
	claimed := claims(ours)
	for _, v := range services {
		if claimed[v.Frontend] {
			k.owned[v.Frontend] = true
			ours.AddVirtualServer(v.VirtualServer)
		}
	}
	return ours, tables, nil
}

var familyNames = map[nftables.TableFamily]string{
	nftables.TableFamilyIPv4: "ip",
	nftables.TableFamilyIPv6: "ip6",
	nftables.TableFamilyARP:  "arp",
}

// remains lists those of our tables that are there, and reads the elements of those of their sets that are.
func (f *filter) remains(s *ipvs.State) (there []*nftables.Table, err error) {
	for _, t := range []*nftables.Table{f.families[0].table, f.families[1].table, f.arp} {
		tables, err := f.conn.ListTablesOfFamily(t.Family)
		if err != nil {
			return nil, fmt.Errorf("list nftables tables: %w", err)
		}
		if slices.ContainsFunc(tables, func(o *nftables.Table) bool { return o.Name == t.Name }) {
			there = append(there, t)
		}
	}
	for _, ff := range f.families {
		if !slices.Contains(there, ff.table) {
			continue
		}
		have, err := f.conn.GetSets(ff.table)
		if err != nil {
			return nil, fmt.Errorf("list nftables sets: %w", err)
		}
		for _, set := range sets { // an earlier version may have had fewer
			if slices.ContainsFunc(have, func(o *nftables.Set) bool { return o.Name == string(set.name) }) {
				if err := f.observeSet(s, ff, set.name, set.shape); err != nil {
					return nil, err
				}
			}
		}
	}
	return there, nil
}

// remove deletes tables with all that is in them, all or none.
func (f *filter) remove(tables []*nftables.Table) error {
	for _, t := range tables {
		f.conn.DelTable(t)
	}
	if err := f.conn.Flush(); err != nil {
		return fmt.Errorf("delete nftables tables %q: %w", tableName, err)
	}
	return nil
}
