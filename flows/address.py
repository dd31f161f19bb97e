"""address.py - which host address a guest's destination means, and what the guest sees of a host's
source.

Theory      `outbound` maps the address the guest used to the one the host connects to; `inbound` is
            its mirror for connections and datagrams that start on the host. Addresses are 16 bytes;
            IPv4 is ::ffff:a.b.c.d.
              guest -> gateway (or --map-host-loopback)   the host's loopback
              guest -> --map-guest-addr                   the address the guest shares with the host
              guest -> --dns-forward, port 53 or 853      the host's resolver
              host's loopback -> guest                    seen as that same gateway address
              host's own address -> guest                 seen as --map-guest-addr, else as our own
                                                          address
Why so      The guest uses the host's own address; anything that would look to it like itself, or
            like its own loopback, must get another name.
Limits      One address per family and mapping. Multicast and broadcast are never mapped (they are
            refused before).
Ownership   Reads struct net, written by control before workers start.
"""

from __future__ import annotations

from shm import mem
from shm.access import net
from shm.jit import jit

V4_PREFIX = 0xFFFF0000  # bytes 8..11 of ::ffff:0:0/96 as a little-endian word: 00 00 ff ff


@jit
def is_v4(address):
    """1 for ::ffff:a.b.c.d."""
    return 1 if mem.le64(address) == 0 and mem.u32(address + 8) == V4_PREFIX else 0


@jit
def is_set(address):
    """1 unless all bytes are zero."""
    return 1 if mem.le64(address) != 0 or mem.le64(address + 8) != 0 else 0


@jit
def same(left, right):
    """1 when two addresses are equal and set."""
    if mem.le64(left) == mem.le64(right) and mem.le64(left + 8) == mem.le64(right + 8):
        return is_set(left)
    return 0


@jit
def is_link_local(address):
    """1 for fe80::/10."""
    return 1 if mem.be16(address) & 0xFFC0 == 0xFE80 else 0


@jit
def is_loopback(address):
    """1 for 127.0.0.0/8 and ::1."""
    if is_v4(address):
        return 1 if mem.u8(address + 12) == 127 else 0
    return (
        1
        if mem.le64(address) == 0 and mem.be32(address + 8) == 0 and mem.be32(address + 12) == 1
        else 0
    )


@jit
def is_unicast(address):
    """1 for an address one host can have on a link: neither unspecified, loopback, multicast,
    broadcast nor class E. Loopback must never come from a link or go to one (RFC 1122 3.2.1.3,
    RFC 4291 2.5.3): passed on, it would reach the host's own services."""
    if is_loopback(address):
        return 0
    if is_v4(address):
        first = mem.u8(address + 12)
        return 1 if 0 < first < 224 else 0
    return 1 if mem.u8(address) != 0xFF and is_set(address) else 0


@jit
def _loopback_of(target, v4):
    mem.put_le64(target, 0)
    mem.put_be32(target + 8, 0x0000FFFF if v4 else 0)
    mem.put_be32(target + 12, 0x7F000001 if v4 else 1)


@jit
def outbound(n, far, port, target):
    """Store at `target` the address the host must use for the guest's `far`:`port`; 1: it was
    mapped."""
    source = _resolver(n, far, port)
    if source == 0:
        if same(far, net.loopback4(n)) or same(far, net.loopback6(n)):
            _loopback_of(target, is_v4(far))
            return 1
        source = far
        if same(far, net.map_guest4(n)):
            source = net.guest4(n)
        elif same(far, net.map_guest6(n)):
            source = net.guest6(n)
    mem.copy(target, source, 16)
    return 1 if source != far else 0


@jit
def _resolver(n, far, port):
    """Where the host's resolver stands in struct net when `far`:`port` means it, else 0."""
    if port != 53 and port != 853:
        return 0
    if same(far, net.dns_forward4(n)) and is_set(net.dns_host4(n)):
        return net.dns_host4(n)
    if same(far, net.dns_forward6(n)) and is_set(net.dns_host6(n)):
        return net.dns_host6(n)
    return 0


@jit
def inbound(n, source, far):
    """Store at `far` the address under which the guest sees host-side `source`; 0 when there is
    none."""
    v4 = is_v4(source)
    if is_loopback(source):
        if v4:
            chosen = net.loopback4(n) if is_set(net.loopback4(n)) else net.our4(n)
        else:
            chosen = net.loopback6(n) if is_set(net.loopback6(n)) else net.our6_local(n)
    elif same(source, net.guest4(n)):
        chosen = net.map_guest4(n) if is_set(net.map_guest4(n)) else net.our4(n)
    elif same(source, net.guest6(n)):
        chosen = net.map_guest6(n) if is_set(net.map_guest6(n)) else net.our6(n)
        if not is_set(chosen):
            chosen = net.our6_local(n)
    else:
        chosen = source
    mem.copy(far, chosen, 16)
    return is_set(far)
