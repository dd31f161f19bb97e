#!/bin/sh
# udhcpc_event.sh - what a test guest does with its DHCPv4 lease (busybox udhcpc calls it).
#
# Configures $interface as a plain DHCP client does and writes the lease to $LEASE_FILE as
# NAME=VALUE lines for the tests; with $KEEP_MTU the device keeps its MTU. Never touches
# resolv.conf: the DPDK guest runs it on the host.
case $1 in
bound | renew)
    ip -4 addr flush dev "$interface"
    ip addr add "$ip/$mask" dev "$interface"
    [ -z "$mtu" ] || [ -n "$KEEP_MTU" ] || ip link set dev "$interface" mtu "$mtu"
    ip route replace default via "${router%% *}" dev "$interface"
    {
        echo "address=$ip"
        echo "prefix=$mask"
        echo "router=${router%% *}"
        echo "dns=$dns"
        echo "mtu=$mtu"
        echo "lease_s=$lease"
        echo "server=$serverid"
    } >"$LEASE_FILE"
    ;;
esac
