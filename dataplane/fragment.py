"""fragment.py - messages to the guest that are larger than its MTU, as IP fragments.

Theory      A device must not give a driver that knows its MTU a larger packet without a GSO type
            (virtio 1.3 5.1.4.1), so a datagram or an echo reply that is larger comes as fragments
            (RFC 791 3.2, RFC 8200 4.5), which the guest's IP puts together again. All but the last
            are as large as the MTU allows, payload a multiple of 8 bytes. The L4 checksum covers
            the whole message and is finished beforehand: what GUEST_CSUM leaves to the guest cannot
            span packets.
MTU         What the guest is told by DHCP and router advertisement (65520 where none is told),
            whether or not VIRTIO_NET_F_MTU was acked: this is the size it sets its link to, and
            larger packets are at its mercy either way. IPv6 packets of 1280 bytes fit every link
            (RFC 8200 5); an advertisement tells no less, so we count with no less.
Identity    A keyed hash of the two addresses plus a number: unlike for other pairs of hosts, and
            not to be guessed by either (RFC 7739 5.3). Each worker counts by the number of workers
            from its own on, so two of them never give one pair of hosts the same one before the
            field wraps.
All or none A message whose fragments do not all find receive buffers is dropped and counted once.
            To another worker's ring each fragment is a record of the hand-off ring, which has room
            for all or gets none; each then waits for buffers as every record does.
Limits      A slow path: payload is copied from scratch memory. RX_FRAMES_MAX fragments on a ring of
            this worker: more, with an MTU below 300 bytes, are dropped.
Ownership   Only receive queues of this worker's own pairs.
Drops       rx_full, rx_small, no_queue.
"""

from __future__ import annotations

from dataplane import checksum, handoff, rx, virtq, wire
from dataplane.context import RX_FRAMES_MAX, context
from dataplane.wire import IP4_BYTES
from flows import steer, table
from shm import mem
from shm import ring as shm_ring
from shm.access import flow, net
from shm.jit import jit

MTU6_MIN = 1280  # RFC 8200 5
IPPROTO_FRAGMENT = 44
FRAGMENT_BYTES = 8  # IPv6 fragment header
MORE = 0x2000  # IPv4: more fragments follow
IDENTITIES = 1 << 16  # no flow's protocol: these keys of the table's hash are no flow's


@jit
def limit(w, v6):
    """Bytes of L4 header and payload that one packet to the guest may have."""
    mtu = net.mtu(context.net(w))
    return (max(mtu, MTU6_MIN) if v6 else mtu) - wire.l3_bytes(v6)


@jit
def _identity(w, f):
    """Identification of the flow's next fragmented message: 32 bits, IPv4 takes the low 16."""
    key, number = context.key(w), context.fragmented(w)
    mem.copy(key + table.KEY_GUEST, flow.guest_addr(f), 16)
    mem.copy(key + table.KEY_FAR, flow.far_addr(f), 16)
    mem.put_u32(key + table.KEY_GUEST_PORT, 0)
    mem.put_u32(key + table.KEY_PROTOCOL, IDENTITIES)
    context.set_fragmented(w, number + 1)
    base = table.hash_key(context.table(w), key) & 0xFFFFFFFF
    return (base + number * context.workers(w) + context.id(w)) & 0xFFFFFFFF


@jit
def _headers(w, f, protocol, identity, at, size, more):
    """Headers in context.out of the fragment with `size` bytes of the message from byte `at` on;
    their length."""
    far, guest, out = flow.far_addr(f), flow.guest_addr(f), context.out(w)
    if wire.is_v6(far):
        size += FRAGMENT_BYTES
        header = wire.headers(w, out, 1, IPPROTO_FRAGMENT, far, guest, size)
        mem.put_be16(header, protocol << 8)
        mem.put_be16(header + 2, at | more)  # `at` is a multiple of 8: the three low bits are free
        mem.put_be32(header + 4, identity)
        return header + FRAGMENT_BYTES - out
    end = wire.headers(w, out, 0, protocol, far, guest, size)
    ip = end - IP4_BYTES
    mem.put_be16(ip + 4, identity)
    mem.put_be16(ip + 6, (at >> 3) | (MORE if more else 0))
    mem.put_be16(ip + 10, 0)
    wire.put_sum(ip + 10, checksum.partial(ip, IP4_BYTES))
    return end - out


@jit
def _to_ring(w, r, f, protocol, l4, size, piece):
    """All fragments into a ring of ours: 1, 0 when buffers are missing, or -1 - reason."""
    if not rx.usable(w, r):
        return rx.not_usable(w, r)
    count = (size + piece - 1) // piece
    if count > RX_FRAMES_MAX:
        return 0
    identity, slots = _identity(w, f), 0
    header_bytes = _headers(w, f, protocol, identity, 0, piece, 1)
    rx.begin(w)
    for number in range(count):
        wanted = min(piece, size - number * piece)
        room = rx.lay(w, r, header_bytes, wanted)
        if room < 0 and number == 0:
            return 0
        if room < wanted:
            return rx.refuse(w, r, room)
    rx.fill(w, l4)
    for number in range(count):
        at = number * piece
        length = min(piece, size - at)
        _headers(w, f, protocol, identity, at, length, 1 if number + 1 < count else 0)
        slots += rx.commit(w, r, number, context.out(w), header_bytes, length)
    virtq.take(r, slots)
    return 1


@jit
def _across(w, other, pair, f, protocol, l4, size, piece):
    """All fragments to another worker: 1, or 0 when there is no room."""
    count, identity = (size + piece - 1) // piece, _identity(w, f)
    header_bytes = _headers(w, f, protocol, identity, 0, piece, 1)
    h = handoff.between(w, context.id(w), other, handoff.RX)
    if shm_ring.reserve(h, count * shm_ring.padded(header_bytes + piece)) == 0:
        return 0
    for number in range(count):
        at = number * piece
        length = min(piece, size - at)
        _headers(w, f, protocol, identity, at, length, 1 if number + 1 < count else 0)
        handoff.send_frame(w, other, pair, context.out(w), header_bytes, l4 + at, length)
    return 1


@jit
def place(w, f, pair, protocol, l4, size):
    """The message of `size` bytes at `l4`, L4 header first and checksum complete, to the flow's
    guest on `pair`, in as many packets as it takes. 1, or -1 - reason, which is counted."""
    far, guest = flow.far_addr(f), flow.guest_addr(f)
    v6 = wire.is_v6(far)
    most = limit(w, v6)
    if size <= most or pair < 0:
        end = wire.headers(w, context.out(w), v6, protocol, far, guest, size)
        return rx.place_or_drop(w, pair, context.out(w), end - context.out(w), l4, size)
    piece = (most - (FRAGMENT_BYTES if v6 else 0)) & ~7
    other = steer.worker_of(context.instance(w), pair)
    if other != context.id(w):
        result = _across(w, other, pair, f, protocol, l4, size, piece)
    else:
        result = _to_ring(w, rx.ring_of(w, pair), f, protocol, l4, size, piece)
    return rx.count_refused(w, pair, result)
