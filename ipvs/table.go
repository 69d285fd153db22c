package ipvs

// Table is what a reader of one network namespace's kernel sees: its virtual servers with their real servers,
// counters and rates. It is what [List] and [Save] print.
type Table struct {
	Version [3]uint8 // of the kernel's IPVS: major, minor, patch (IP_VS_VERSION_CODE)
	Size    uint32   // buckets of the connection table, a power of two (ip_vs.conn_tab_bits)

	// Services is in the order the kernel gave them. The order matters to [List]: where ipvsadm's comparison
	// leaves it open who comes first, the kernel's order decides.
	Services []ObservedServer
}

// ObservedServer is a virtual server as the kernel holds it.
type ObservedServer struct {
	VirtualServer
	Stats       Stats
	RealServers []ObservedRealServer // in the kernel's order
}

// ObservedRealServer is a real server as the kernel holds it.
type ObservedRealServer struct {
	RealServer
	Active     uint32 // connections that are established (IPVS_DEST_ATTR_ACTIVE_CONNS)
	Inactive   uint32 // connections that are not, such as those in TIME_WAIT
	Persistent uint32 // persistence templates that lead here
	Stats      Stats
}

// Stats is what the kernel counts for a virtual or a real server since it was added or zeroed, and the rates it
// estimates from that every two seconds (struct ip_vs_kstats, include/net/ip_vs.h).
type Stats struct {
	Connections uint64 // scheduled
	InPackets   uint64 // from clients
	OutPackets  uint64 // to clients, 0 unless the replies pass through this node
	InBytes     uint64
	OutBytes    uint64

	CPS    uint64 // connections per second
	InPPS  uint64 // packets per second
	OutPPS uint64
	InBPS  uint64 // bytes per second
	OutBPS uint64
}
