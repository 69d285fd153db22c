#!/bin/sh
# Sees to the programs that the lab and the tests run. On Debian, as root, it installs what is missing; elsewhere it
# says what that is. Daemons that come with a package are not started.
set -eu

missing=
need() { # need PROGRAM PACKAGE
	command -v "$1" >/dev/null 2>&1 || [ -x "/usr/sbin/$1" ] || [ -x "/sbin/$1" ] || [ -x "$1" ] || missing="$missing $2"
}
need qemu-system-x86_64 qemu-system-x86
need depmod kmod
need xz xz-utils
need ip iproute2
need nft nftables
need ipvsadm ipvsadm
need conntrack conntrack
need tcpdump tcpdump
arping --help 2>&1 | grep -q Habets || missing="$missing arping" # not the one of iputils
need ndisc6 ndisc6
need /usr/lib/frr/bgpd frr
need bird bird2
need nsenter util-linux
need curl curl
# What kube-proxy runs.
need ipset ipset
need iptables iptables
need conntrack conntrack

# The lab's kernel comes from a package too.
lists=yes
if command -v apt-cache >/dev/null 2>&1; then
	apt-cache depends linux-image-amd64 >/dev/null 2>&1 || lists=
fi
[ -n "$missing" ] || [ -z "$lists" ] || exit 0
if [ "$(id -u)" -ne 0 ]; then
	echo "root is needed: the lab makes network namespaces. Missing, too, are the Debian packages:$missing" >&2
	exit 1
fi
if ! command -v apt-get >/dev/null 2>&1; then
	echo "this is not Debian; install what its packages have:$missing" >&2
	exit 1
fi
apt-get update -qq
[ -n "$missing" ] || exit 0
echo "installing$missing"
if [ ! -e /usr/sbin/policy-rc.d ]; then
	printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
	chmod +x /usr/sbin/policy-rc.d
	trap 'rm -f /usr/sbin/policy-rc.d' EXIT
fi
# shellcheck disable=SC2086
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
