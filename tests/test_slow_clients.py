"""The slow path against real clients: a tap device in a namespace, answered by `replies`.

arping and udhcpc are busybox's, neighbour discovery and autoconfiguration the Linux kernel's. None
of them shares code or assumptions with what is tested here.
"""

import fcntl
import json
import os
import select
import shutil
import struct
import subprocess
import threading
import time
import warnings
from ipaddress import IPv4Address, IPv6Address, IPv6Network

import pytest

from dataplane.slow import replies
from dataplane.slow.ndp import unsolicited_ra
from dataplane.slow.net import Net

NAMESPACE = f"vmqslow{os.getpid()}"  # also the name of the tap device: at most 15 characters
NET = Net(
    addr4=IPv4Address("192.0.2.2"),
    prefix4=24,
    gateway4=IPv4Address("192.0.2.1"),
    our_addr4=IPv4Address("192.0.2.1"),
    addr6=IPv6Address("2001:db8::2"),
    dns4=(IPv4Address("192.0.2.53"), IPv4Address("198.51.100.53")),
    dns6=(IPv6Address("2001:db8::53"),),
    search=("corp.example", "lab.corp.example"),
    hostname="guest",
    mtu=9000,
)
OUR_MAC = ":".join(f"{byte:02x}" for byte in NET.our_mac)
TUNSETIFF = 0x400454CA
IFF_TAP_NO_PI = 0x1002


def run(command, check=True):
    return subprocess.run(
        command.split(), check=check, capture_output=True, text=True, timeout=30
    ).stdout


def inside(command, check=True):
    return run(f"ip netns exec {NAMESPACE} {command}", check)


def until(probe, timeout_s=10.0):
    """The first true value of `probe`, or its last one when time is up."""
    deadline = time.monotonic() + timeout_s
    while not (value := probe()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return value


class Wire:
    """The far end of the tap device: answers every frame as `net` says."""

    def __init__(self, fd):
        self.fd = fd
        self.net = NET
        self.stop_read, self.stop_write = os.pipe()
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def serve(self):
        while self.stop_read not in select.select([self.fd, self.stop_read], [], [])[0]:
            for frame in replies(os.read(self.fd, 65536), self.net):
                os.write(self.fd, frame)

    def close(self):
        os.close(self.stop_write)
        self.thread.join()
        os.close(self.stop_read)


@pytest.fixture
def wire():
    missing = [tool for tool in ("ip", "busybox") if not shutil.which(tool)]
    if os.geteuid() != 0 or missing or not os.access("/dev/net/tun", os.W_OK):
        reason = f"needs root, /dev/net/tun and two tools (missing: {missing or 'none'})"
        warnings.warn(f"no real client was tried: {reason}", stacklevel=1)
        pytest.skip(reason)
    run(f"ip netns add {NAMESPACE}")
    fd = os.open("/dev/net/tun", os.O_RDWR)
    wire = None
    try:
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", NAMESPACE.encode(), IFF_TAP_NO_PI))
        run(f"ip link set {NAMESPACE} netns {NAMESPACE}")
        run(f"ip -n {NAMESPACE} link set {NAMESPACE} name guest0")
        wire = Wire(fd)
        yield wire
    finally:
        if wire:
            wire.close()
        os.close(fd)
        run(f"ip netns del {NAMESPACE}")


def addresses6(scope="global"):
    """The addresses of guest0 that have passed duplicate address detection."""
    links = json.loads(run(f"ip -n {NAMESPACE} -j -6 addr show dev guest0 scope {scope}"))
    infos = [info for link in links for info in link.get("addr_info", [])]
    return [info["local"] for info in infos if "local" in info and not info.get("tentative")]


def neighbour_mac(target):
    """The MAC the kernel finds for an IPv6 neighbour when it has something to send there."""
    assert until(lambda: addresses6("link"))
    inside(f"busybox ping6 -c 1 -W 1 -I guest0 {target}", check=False)
    entries = json.loads(run(f"ip -n {NAMESPACE} -j -6 neigh show {target} dev guest0"))
    return [entry.get("lladdr") for entry in entries]


@pytest.mark.parametrize("target", ["192.0.2.1", "192.0.2.99"])
def test_arping_finds_us_everywhere(wire, target):
    run(f"ip -n {NAMESPACE} addr add 192.0.2.2/24 dev guest0")
    run(f"ip -n {NAMESPACE} link set guest0 up")
    assert OUR_MAC in inside(f"busybox arping -c 1 -w 5 -I guest0 {target}").lower()


def test_arping_conflict_probe(wire):
    """Exit status 0 of arping -D means that nobody else has the address."""
    run(f"ip -n {NAMESPACE} link set guest0 up")
    inside("busybox arping -D -c 2 -w 2 -I guest0 192.0.2.2")
    with pytest.raises(subprocess.CalledProcessError):
        inside("busybox arping -D -c 2 -w 2 -I guest0 192.0.2.3")


def udhcpc(tmp_path, *arguments):
    """What udhcpc hands to its script for a lease: {variable: value}."""
    result = tmp_path / "lease.json"
    script = tmp_path / "script"
    script.write_text(f'#!/bin/sh\n[ "$1" = bound ] && env > {result}\nexit 0\n')
    script.chmod(0o755)
    run(f"ip -n {NAMESPACE} link set guest0 up")
    inside(
        f"busybox udhcpc -i guest0 -f -n -q -t 5 -T 1 -s {script} -O search -O mtu -O staticroutes "
        + " ".join(arguments)
    )
    return dict(line.partition("=")[::2] for line in result.read_text().splitlines())


def test_udhcpc(wire, tmp_path):
    lease = udhcpc(tmp_path)
    assert (lease["ip"], lease["subnet"], lease["router"]) == (
        "192.0.2.2",
        "255.255.255.0",
        "192.0.2.1",
    )
    assert lease["dns"] == "192.0.2.53 198.51.100.53"
    assert lease["search"] == "corp.example lab.corp.example"
    assert (lease["hostname"], lease["domain"], lease["mtu"]) == ("guest", "corp.example", "9000")
    assert (lease["serverid"], lease["lease"]) == ("192.0.2.1", str(0xFFFFFFFF))
    assert "staticroutes" not in lease


def test_udhcpc_with_broadcast_flag_and_router_elsewhere(wire, tmp_path):
    wire.net = NET.replaced(
        gateway4=IPv4Address("10.9.9.1"), our_addr4=IPv4Address("10.9.9.1"), prefix4=32
    )
    lease = udhcpc(tmp_path, "-B", "-r 192.0.2.77")
    assert (lease["ip"], lease["subnet"]) == ("192.0.2.2", "255.255.255.255")
    assert lease["staticroutes"] == "10.9.9.1/32 0.0.0.0 0.0.0.0/0 10.9.9.1"


def test_linux_autoconfigures(wire):
    """Router solicitation to address, MTU and default route; then our MAC for two neighbours."""
    run(f"ip -n {NAMESPACE} link set guest0 up")
    [address] = until(addresses6)
    assert IPv6Address(address) in IPv6Network("2001:db8::/64")
    [route] = json.loads(run(f"ip -n {NAMESPACE} -j -6 route show default"))
    assert (route["gateway"], route["dev"], route["protocol"]) == ("fe80::1", "guest0", "ra")
    assert inside("cat /proc/sys/net/ipv6/conf/guest0/mtu").strip() == "1500"  # the device's own
    for target in ("fe80::1", "2001:db8::77"):
        assert neighbour_mac(target) == [OUR_MAC]


def test_linux_in_local_mode(wire):
    """No prefix and no default route, and the router's link-local address still resolves."""
    wire.net = Net()
    run(f"ip -n {NAMESPACE} link set guest0 up")
    assert neighbour_mac("fe80::1") == [OUR_MAC]
    time.sleep(1.5)  # the kernel solicits routers once it has an address: the answer is here now
    assert addresses6() == []
    assert json.loads(run(f"ip -n {NAMESPACE} -j -6 route show default")) == []


def test_linux_takes_an_unsolicited_advertisement(wire):
    wire.net = NET.replaced(no_ra=True)
    run(f"ip -n {NAMESPACE} link set guest0 mtu 9000 up")
    time.sleep(1.5)
    assert addresses6() == []
    os.write(wire.fd, unsolicited_ra(NET.replaced(mtu=4000)))
    assert len(until(addresses6)) == 1
    assert inside("cat /proc/sys/net/ipv6/conf/guest0/mtu").strip() == "4000"
