"""netblock.py - the guest's network as compiled code reads it: struct net of the shared segment,
from a Net.

Theory      Net (dataplane/slow/net.py) is what plain Python answers with; struct net
            (shm/schema.py) holds the same addresses as packets carry them, 16 bytes each, plus what
            this kernel can do. It is written once, before workers start.
Ownership   Control is its only writer.
"""

from __future__ import annotations

import errno
import ipaddress
import pathlib
import socket
from typing import Any

from control.hostnet import zone_index
from dataplane.slow.net import Net
from shm import schema
from shm.layout import View
from shm.segment import Segment

MTU_DEFAULT = schema.MTU_MAX
SO_PEEK_OFF = 42
CONNTRACK = pathlib.Path("/proc/sys/net/netfilter")
UDP_ONEWAY_S, UDP_STREAM_S = 30, 120  # nf_conntrack's own defaults


def packed(address: Any) -> bytes:
    """16 bytes of an address, IPv4 as ::ffff:a.b.c.d; zeros for none."""
    if address is None:
        return bytes(16)
    value = ipaddress.ip_address(str(address).partition("%")[0])
    if value.version == 4:
        return bytes(10) + b"\xff\xff" + value.packed
    return value.packed


def has_peek_offset() -> bool:
    """Whether SO_PEEK_OFF moves the start of MSG_PEEK on TCP sockets (Linux 6.9; some of the first
    such kernels know it for IPv4 only). Without a loopback to try it on, no."""
    try:
        with socket.socket(socket.AF_INET6) as six:
            six.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, 0)
    except OSError as error:
        if error.errno != errno.EAFNOSUPPORT:
            return False
    try:
        with (
            socket.create_server(("127.0.0.1", 0)) as server,
            socket.create_connection(server.getsockname()) as client,
        ):
            peer, _ = server.accept()
            with peer:
                peer.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, 0)
                client.sendall(b"ab")
                peer.recv(1, socket.MSG_PEEK)
                return peer.recv(1, socket.MSG_PEEK) == b"b"
    except OSError:
        return False


def has_ping_socket() -> bool:
    """Whether this user may open ICMP echo sockets (net.ipv4.ping_group_range)."""
    try:
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP).close()
    except OSError:
        return False
    return True


def conntrack_timeout_s(name: str, default: int) -> int:
    """A timeout of the host's own connection tracking, so that both forget a conversation
    together."""
    try:
        return int((CONNTRACK / name).read_text())
    except (OSError, ValueError):
        return default


def fill(segment: Segment, net: Net, options: Any) -> None:
    """Write struct net."""
    view = View(schema.NET, segment.buffer, segment.offsets.net)
    view.set_bytes("our_mac", net.our_mac + bytes(2))
    for field, address in {
        "guest4": net.addr4 if net.ipv4 else None,
        "guest6": net.addr6 if net.ipv6 else None,
        "our4": net.our_addr4,
        "our6": net.gateway6 if not net.gateway6.is_link_local else None,
        "our6_local": net.link_local6,
        "map_guest4": net.map_guest_addr4,
        # It stands for guest6: without one it would stand for ::, which is the host's loopback.
        "map_guest6": net.map_guest_addr6 if net.addr6 else None,
        "dns_forward4": net.dns_forward4,
        "dns_forward6": net.dns_forward6,
        "dns_host4": net.dns_host4,
        "dns_host6": net.dns_host6,
        "loopback4": net.map_host_loopback4,
        "loopback6": net.map_host_loopback6,
    }.items():
        view.set_bytes(field, packed(address))
    zone = net.dns_host6.scope_id if net.dns_host6 else None
    view["scope_id"] = zone_index(zone) if zone else net.interface6
    for name in ("no_tcp", "no_udp", "no_icmp"):
        view[name] = int(getattr(options, name))
    view["no_ipv4"], view["no_ipv6"] = int(not net.ipv4), int(not net.ipv6)
    view["mtu"] = net.mtu or MTU_DEFAULT
    view["udp_oneway_s"] = conntrack_timeout_s("nf_conntrack_udp_timeout", UDP_ONEWAY_S)
    view["udp_stream_s"] = conntrack_timeout_s("nf_conntrack_udp_timeout_stream", UDP_STREAM_S)
    view["peek_offset"] = int(has_peek_offset())
