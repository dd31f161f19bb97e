"""tx.py - frames from the guest: one look at the headers, then to the protocol they belong to.

Theory      frame() copies the first HEADERS_MAX bytes of a chain to private memory once and parses
            only that copy: the guest may rewrite its buffers at any time and changes nothing under
            us. Payload stays where it is; the iovec of the chain is what goes to sendmsg.
Dispatch    ARP, DHCP, DHCPv6, NDP        a slot for plain Python (slow/), bounded per breath
            TCP, UDP, ICMP echo           flow lookup; the flow remembers the queue pair (steer);
                                          when its home is another worker the frame crosses
                                          (handoff), else tcp | udp | icmp.from_guest
Checksums   The IPv4 header checksum is verified. L4 checksums are not: shared memory does not
            corrupt, and with VIRTIO_NET_F_CSUM they are not there yet.
Limits      Frames of 65535 bytes plus the Ethernet header; IPv6 extension headers within
            HEADERS_MAX; fragments are dropped.
Ownership   Rings of this worker's pairs; frames other workers hand over (crossed).
Drops       no_header, oversize, ethertype, bad_ip, fragment, ip_protocol, bad_offload, policy,
            slow_full, handoff_full, and those of the protocols.
"""

from __future__ import annotations

from dataplane import (
    checksum,
    handoff,
    icmp,
    iov,
    lifecycle,
    rehome,
    tcp,
    tcp_gather,
    udp,
    udp_train,
    wire,
)
from dataplane.context import (
    ATTEND_SLOW,
    HEADERS_MAX,
    SLOW_BYTES,
    SLOW_SLOTS,
    VNET_BYTES,
    context,
)
from dataplane.lifecycle import ICMP, TCP, UDP
from flows import address, sighting, steer, table
from shm import mem
from shm.access import net, worker
from shm.jit import jit
from shm.schema import DROP

NO_HEADER = -1 - DROP["no_header"]
OVERSIZE = -1 - DROP["oversize"]
ETHERTYPE = -1 - DROP["ethertype"]
BAD_IP = -1 - DROP["bad_ip"]
BAD_L4 = -1 - DROP["bad_l4"]
FRAGMENT = -1 - DROP["fragment"]
IP_PROTOCOL = -1 - DROP["ip_protocol"]
BAD_OFFLOAD = -1 - DROP["bad_offload"]
POLICY = -1 - DROP["policy"]
SLOW_FULL = -1 - DROP["slow_full"]
ICMP_TYPE = -1 - DROP["icmp_type"]

WAITS = 1  # for room in a hand-off ring; it is looked at as if for the first time then
FRAME_MAX = 65535 + wire.ETHER_BYTES
EXTENSIONS_MAX = 8
DHCP_PORT, DHCP6_PORT = 67, 547
NDP_FIRST, NDP_SOLICITATION, NDP_LAST = 133, 135, 137
NDP_TARGET, NDP_TARGET_END = 8, 24  # in a neighbour solicitation (RFC 4861 4.3)


@jit
def frame(w):
    """The chain at hand (context.chain_iov, chain_count, pair, crossed). 0, WAITS: not now, or -1 -
    reason."""
    pieces = context.chain_count(w)
    size = iov.total(context.chain_iov(w), pieces) - VNET_BYTES
    if size < wire.ETHER_BYTES:
        return NO_HEADER
    if size > FRAME_MAX:
        return OVERSIZE
    context.set_frame_bytes(w, size)
    hdr = context.hdr(w)
    iov.copy_out(hdr, context.chain_iov(w), pieces, 0, HEADERS_MAX)
    if not _offload_ok(w, hdr, size):
        return BAD_OFFLOAD
    ether = hdr + VNET_BYTES
    sighting.note_mac(context.seen(w), (mem.be16(ether + 6) << 32) | mem.be32(ether + 8))
    ethertype = mem.be16(ether + 12)
    context.set_l3(w, VNET_BYTES + wire.ETHER_BYTES)
    if ethertype == wire.ETHERTYPE_IP4:
        return POLICY if net.no_ipv4(context.net(w)) else _ip4(w, hdr, size - wire.ETHER_BYTES)
    if ethertype == wire.ETHERTYPE_IP6:
        return POLICY if net.no_ipv6(context.net(w)) else _ip6(w, hdr, size - wire.ETHER_BYTES)
    if ethertype == wire.ETHERTYPE_ARP:
        return _slow(w)
    return ETHERTYPE


@jit
def flush(w):
    """Send what was gathered: chains may go back to the guest afterwards."""
    tcp_gather.flush_all(w)
    udp_train.flush(w)


@jit
def _offload_ok(w, hdr, size):
    """1 when the virtio-net header asks only for what the driver has acked (virtio 1.3 5.1.6.2)."""
    flags, kind = mem.u8(hdr), mem.u8(hdr + 1)
    gso = kind & ~wire.GSO_ECN
    if flags & wire.VNET_NEEDS_CSUM:
        if not context.csum(w) or mem.le16(hdr + 6) + mem.le16(hdr + 8) + 2 > size:
            return 0
    if kind & wire.GSO_ECN and not context.host_ecn(w):
        return 0
    if gso == wire.GSO_NONE:
        return 1
    if flags & wire.VNET_NEEDS_CSUM == 0:
        return 0
    if gso == wire.GSO_TCP4:
        return context.host_tso4(w)
    if gso == wire.GSO_TCP6:
        return context.host_tso6(w)
    if gso == wire.GSO_UDP_L4:
        return context.host_uso(w)
    return 0


@jit
def _slow(w):
    """Keep the frame for plain Python."""
    slot, size = context.slow_count(w), context.frame_bytes(w)
    if slot >= SLOW_SLOTS or size > SLOW_BYTES - VNET_BYTES:
        return SLOW_FULL
    target = context.slow(w) + slot * SLOW_BYTES
    iov.copy_out(target, context.chain_iov(w), context.chain_count(w), 0, size + VNET_BYTES)
    trusted = mem.u8(context.hdr(w)) & wire.VNET_NEEDS_CSUM
    mem.put_u64(context.slow_meta(w) + 8 * slot, size | (context.pair(w) << 32) | (trusted << 48))
    context.set_slow_count(w, slot + 1)
    context.set_attend(w, context.attend(w) | ATTEND_SLOW)
    me = context.me(w)
    worker.set_slow_frames(me, worker.slow_frames(me) + 1)
    return 0


@jit
def _ip4(w, hdr, room):
    """IPv4 (RFC 791): `room` bytes from the IP header on."""
    ip = hdr + context.l3(w)
    header, size = (mem.u8(ip) & 15) * 4, mem.be16(ip + 2)
    if mem.u8(ip) >> 4 != 4 or not wire.IP4_BYTES <= header <= size or size > room:
        return BAD_IP
    if checksum.fold(checksum.partial(ip, header)) != 0xFFFF:
        return BAD_IP
    if mem.be16(ip + 6) & 0x3FFF:
        return FRAGMENT
    key = context.key(w)
    for at in (key + table.KEY_GUEST, key + table.KEY_FAR):
        mem.put_le64(at, 0)
        mem.put_be32(at + 8, 0xFFFF)
    mem.put_be32(key + table.KEY_GUEST + 12, mem.be32(ip + 12))
    mem.put_be32(key + table.KEY_FAR + 12, mem.be32(ip + 16))
    context.set_v6(w, 0)
    context.set_hops(w, mem.u8(ip + 8))
    context.set_l4(w, context.l3(w) + header)
    context.set_l4_bytes(w, size - header)
    return _l4(w, mem.u8(ip + 9))


@jit
def _ip6(w, hdr, room):
    """IPv6 (RFC 8200) with its extension headers: `room` bytes from the IP header on."""
    ip = hdr + context.l3(w)
    left = mem.be16(ip + 4)
    if room < wire.IP6_BYTES or mem.u8(ip) >> 4 != 6 or left > room - wire.IP6_BYTES:
        return BAD_IP
    key = context.key(w)
    mem.copy(key + table.KEY_GUEST, ip + 8, 16)
    mem.copy(key + table.KEY_FAR, ip + 24, 16)
    if address.is_v4(key + table.KEY_FAR) or address.is_v4(key + table.KEY_GUEST):
        return BAD_IP  # a v4-mapped address has no place on a wire (RFC 4291 2.5.5.2)
    context.set_v6(w, 1)
    context.set_hops(w, mem.u8(ip + 7))
    protocol, at = mem.u8(ip + 6), context.l3(w) + wire.IP6_BYTES
    for _ in range(EXTENSIONS_MAX):
        if protocol == 44:
            return FRAGMENT
        if protocol != 0 and protocol != 43 and protocol != 60:
            context.set_l4(w, at)
            context.set_l4_bytes(w, left)
            return _l4(w, protocol)
        if left < 8 or at + 8 > HEADERS_MAX:
            return BAD_IP
        length = (mem.u8(hdr + at + 1) + 1) * 8
        protocol = mem.u8(hdr + at)
        at += length
        left -= length
        if left < 0:
            return BAD_IP
    return BAD_IP


@jit
def _l4(w, protocol):
    """Which protocol, and the flow key's ports."""
    l4, n, key = context.hdr(w) + context.l4(w), context.net(w), context.key(w)
    if context.l4_bytes(w) < 8 or context.l4(w) + 20 > HEADERS_MAX:
        return BAD_L4
    if protocol == wire.IPPROTO_TCP:
        if net.no_tcp(n):
            return POLICY
        return _flow(w, TCP, mem.be16(l4), mem.be16(l4 + 2))
    if protocol == wire.IPPROTO_UDP:
        if mem.be16(l4 + 2) == (DHCP6_PORT if context.v6(w) else DHCP_PORT) and _is_ours(w, key):
            return _slow(w)
        if net.no_udp(n):
            return POLICY
        return _flow(w, UDP, mem.be16(l4), mem.be16(l4 + 2))
    if protocol == wire.IPPROTO_ICMP6 and context.v6(w):
        if NDP_FIRST <= mem.u8(l4) <= NDP_LAST:
            _learn_neighbour(w, l4)
            return _slow(w)
    elif protocol != wire.IPPROTO_ICMP or context.v6(w):
        return IP_PROTOCOL
    if not icmp.is_echo(w):
        return ICMP_TYPE
    if net.no_icmp(n):
        return POLICY
    return _flow(w, ICMP, mem.be16(l4 + 4), 0)


@jit
def _is_ours(w, key):
    """1 when a DHCP message is meant for this link: broadcast, multicast, or one of our
    addresses."""
    far, n = key + table.KEY_FAR, context.net(w)
    if address.is_unicast(far) == 0:
        return 1
    if address.same(far, net.our4(n)) or address.same(far, net.our6_local(n)):
        return 1
    return address.same(far, net.our6(n))


@jit
def _learn_address(w, key):
    """The guest's addresses, from the source of what it sends; 0 when the source is impossible."""
    guest = key + table.KEY_GUEST
    if not address.is_unicast(guest):
        return 0
    sighting.note(context.seen(w), guest, context.id(w))
    return 1


@jit
def _learn_neighbour(w, l4):
    """The same from neighbour discovery, which comes before anything else: a guest that asks
    whether somebody has an address, from none of its own, is about to take it (RFC 4862 5.4.2)."""
    guest = context.key(w) + table.KEY_GUEST
    if not address.is_set(guest) and mem.u8(l4) == NDP_SOLICITATION:
        if context.l4_bytes(w) < NDP_TARGET_END or context.l4(w) + NDP_TARGET_END > HEADERS_MAX:
            return
        mem.copy(guest, l4 + NDP_TARGET, 16)
        if address.is_v4(guest):
            return
    _learn_address(w, context.key(w))


@jit
def _flow(w, protocol, guest_port, far_port):
    """Find the flow, steer, and hand the packet to its protocol or to its home."""
    key, t = context.key(w), context.table(w)
    mem.put_u16(key + table.KEY_GUEST_PORT, guest_port)
    mem.put_u16(key + table.KEY_FAR_PORT, far_port)
    mem.put_u32(key + table.KEY_PROTOCOL, protocol)
    if not _learn_address(w, key):
        return BAD_IP
    index = table.find(t, key)
    if index >= 0 and rehome.fetch(w, table.at(t, index)):
        index = table.find(t, key)
    if index >= 0:
        f = table.at(t, index)
        if not context.crossed(w) and not context.retried(w):  # else that has been noted
            steer.sent_on(f, context.pair(w))
        home = rehome.owner(w, f)
        if home != context.id(w):
            return _cross(w, home)  # once more, if it moved while the frame crossed
        if context.crossed(w):
            lifecycle.touch(w, f, index)  # it may be about to move
    if protocol == TCP:
        return tcp.from_guest(w, index)
    if protocol == UDP:
        return udp.from_guest(w, index)
    return icmp.from_guest(w, index)


@jit
def _cross(w, home):
    result = handoff.send_chain(
        w, home, context.pair(w), context.chain_iov(w), context.chain_count(w),
        context.frame_bytes(w) + VNET_BYTES,
    )  # fmt: skip
    if result == 0:  # what was handed over gives its room back whatever happens to it
        return handoff.FULL if context.crossed(w) else WAITS
    return 0 if result > 0 else result
