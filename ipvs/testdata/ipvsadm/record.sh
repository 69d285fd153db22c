#!/bin/sh
# Records what Debian's ipvsadm 1.31 prints for a table, as a txtar archive that TestIPVSAdm reads.
#
#   record.sh COMMANDS [TRAFFIC] >name.txtar
#
# COMMANDS is lines for ipvsadm -R. TRAFFIC is a shell script that is run afterwards and may leave programs in the
# background while the listings are made. Needs root and a kernel with IPVS; works in a network namespace of its own.
set -eu
if [ -z "${RECORDING:-}" ]; then
	RECORDING=1 exec unshare --net -- "$0" "$@"
fi
ip link set lo up
ipvsadm -R <"$1"

echo "-- commands --"
cat "$1"
if [ $# -gt 1 ]; then
	echo "-- traffic --"
	cat "$2"
	sh "$2" >&2
	sysctl -q net.ipv4.vs.run_estimation=0 # rates stand still
fi

record() {
	echo "-- $* --"
	ipvsadm "$@" 2>&1 || echo "exit status $?"
}
record -S -n
record -L -n
record -L -n --nosort
for format in --stats --rate; do
	record -L -n $format
	record -L -n $format --exact
done
record -L -n --thresholds
record -L -n --persistent-conn
record -L -n --tun-info
record -L -n --tun-info --stats --rate --thresholds --persistent-conn
one=$(sed -n 's/^-A \(-f [0-9]* -6\|-f [0-9]*\|[^ ]* [^ ]*\).*/\1/p' "$1" | head -n 1)
record -L -n $one
record -L -n --stats $one
record -L -n -t 203.0.113.99:9
