#!/bin/sh
# guest_init.sh - PID 1 of the test guests (QEMU and User-Mode Linux), all of their user space.
#
# Theory      Mounts, loads the modules named in /modules.order, opens the channel that the kernel
#             command line names (guest.agent=NAME of a virtio-serial port, or /dev/TTY) and becomes
#             the agent: one command a line in, one answer a line out, in order.
#
#   guest -> test   ready BOOT_ID
#   test -> guest   ID LIMIT_S base64(shell script)
#   guest -> test   ID STATUS base64(what it printed, both streams)
#
# Limits      A line fits a tty's 4096 bytes. A script that overruns LIMIT_S gets SIGTERM and
#             status 143.
#             The network is left alone: what the tests configure is part of what they check.
export PATH=/bin

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /tmp
exec </dev/console >/dev/console 2>&1
while read -r module; do
    insmod "$module"
done </modules.order
echo 0 >/proc/sys/net/ipv6/conf/eth0/router_solicitation_delay
ip link set lo up

channel=$(sed -n 's/.*guest\.agent=\([^ ]*\).*/\1/p' /proc/cmdline)
case $channel in
/dev/*)
    stty -F "$channel" raw -echo
    ;;
*)
    port=$(grep -lx "$channel" /sys/class/virtio-ports/*/name)
    channel=/dev/$(basename "${port%/name}")
    ;;
esac

exec 3<>"$channel"
echo "ready $(cat /proc/sys/kernel/random/boot_id)" >&3
while :; do
    while read -r id limit_s script <&3; do
        echo "$script" | base64 -d >/tmp/agent.script
        timeout "$limit_s" sh /tmp/agent.script </dev/null >/tmp/agent.output 2>&1
        echo "$id $? $(base64 -w 0 /tmp/agent.output)" >&3
    done
    sleep 1 # the test let go of the channel
done
