"""icmp.py - ICMP and ICMPv6 echo: guest pings <-> unprivileged echo sockets (SOCK_DGRAM,
IPPROTO_ICMP).

Theory      One socket per (guest address, destination, identifier). The kernel puts its own
            identifier and checksum into requests and hands back only matching replies; the guest's
            identifier is put back on the way in. A reply above the guest's MTU comes as fragments
            (fragment.py).
Limits      Echo only; other ICMP from the guest is dropped and counted. Needs
            net.ipv4.ping_group_range to include the user's group; control says so at start when it
            does not.
Ownership   Only flows whose home is this worker.
Drops       bad_l4, icmp_type, not_unicast, table_full, table_busy, no_socket, socket_full,
            send_failed; rx_full: a reply for which the buffers there were did not suffice.
"""

from __future__ import annotations

from dataplane import (
    checksum,
    fragment,
    handoff,
    iov,
    lifecycle,
    rehome,
    rx,
    sockets,
    udp,
    virtq,
    wire,
)
from dataplane.context import context
from dataplane.lifecycle import FAR_SAID, GUEST_SAID, ONEWAY, READABLE
from dataplane.wire import IPPROTO_ICMP, IPPROTO_ICMP6
from flows import address, steer, table
from shm import libc, mem
from shm.access import flow
from shm.jit import jit
from shm.schema import DROP

ECHO_REQUEST, ECHO_REPLY, ECHO6_REQUEST, ECHO6_REPLY = 8, 0, 128, 129
ECHO_BYTES = 8
REPLIES_MAX = 32

TABLE_FULL = -1 - DROP["table_full"]
TABLE_BUSY = -1 - DROP["table_busy"]
NO_SOCKET = -1 - DROP["no_socket"]
SOCKET_FULL = -1 - DROP["socket_full"]
SEND_FAILED = -1 - DROP["send_failed"]
NOT_UNICAST = -1 - DROP["not_unicast"]


@jit
def is_echo(w):
    """1 when the ICMP message at hand is an echo request."""
    l4 = context.hdr(w) + context.l4(w)
    wanted = ECHO6_REQUEST if context.v6(w) else ECHO_REQUEST
    return 1 if context.l4_bytes(w) >= ECHO_BYTES and mem.be16(l4) == wanted << 8 else 0


@jit
def from_guest(w, index):
    """The echo request at hand, of flow `index` or -1. 0, or -1 - reason."""
    if index < 0:
        index = _open(w)
        if index < 0:
            return index
    f = table.at(context.table(w), index)
    sockets.set_hops(w, f, context.v6(w), context.hops(w))
    return _send(w, f, index)


@jit
def _send(w, f, index):
    """The message at hand. 0, or -1 - reason."""
    target, size = context.rx_iov(w), context.l4_bytes(w)
    pieces = iov.append_slice(
        target, 0, context.chain_iov(w), context.chain_count(w), context.l4(w), size
    )
    message = sockets.put_msghdr(w, target, pieces)
    flags = sockets.MSG_DONTWAIT | sockets.MSG_NOSIGNAL
    done = libc.sendmsg(flow.fd(f), message, flags)
    if done < 0 and done != -sockets.EAGAIN:  # an error of an earlier request, now cleared
        done = libc.sendmsg(flow.fd(f), message, flags)
    flow.set_last_guest_ms(f, context.now_ms(w))
    lifecycle.said(w, f, index, GUEST_SAID)
    if done < 0:
        return SOCKET_FULL if done == -sockets.EAGAIN else SEND_FAILED
    flow.set_tx_bytes(f, flow.tx_bytes(f) + size)
    return 0


@jit
def _open(w):
    key = context.key(w)
    far = key + table.KEY_FAR
    if not address.is_unicast(far):
        return NOT_UNICAST
    target = context.address(w)
    address.outbound(context.net(w), far, 0, target)
    index = lifecycle.open_flow(w, key, context.pair(w), ONEWAY)
    if index < 0:
        return TABLE_FULL if index == table.FULL else TABLE_BUSY
    f = table.at(context.table(w), index)
    protocol = IPPROTO_ICMP6 if context.v6(w) else IPPROTO_ICMP
    return udp.connect(w, f, index, sockets.open_datagram(w, target, protocol), target, 0)


@jit
def _has_room(w, pair):
    """1 when a reply may go to the pair now; how long it is nobody knows before it is received."""
    if pair < 0:
        return 0
    other = steer.worker_of(context.instance(w), pair)
    if other != context.id(w):
        h = handoff.between(w, context.id(w), other, handoff.RX)
        return 1 if handoff.reserve(w, h, 2 * udp.SCRATCH_BYTES) else 0
    r = rx.ring_of(w, pair)
    return 1 if rx.usable(w, r) and virtq.ready(r, 0) else 0


@jit
def settle(w, f, index):
    """Replies of the socket to the guest. They stay in the socket until there is room."""
    if not lifecycle.has(f, READABLE):
        return
    if rehome.behind(w, f):
        lifecycle.block(w, f, index, lifecycle.ELSE)
        return
    v6 = wire.is_v6(flow.far_addr(f))
    far, guest, buffer = flow.far_addr(f), flow.guest_addr(f), context.discard(w)
    for _ in range(REPLIES_MAX):
        pair = steer.queue_of(context.instance(w), f, context.id(w))
        line = lifecycle.line_to(w, pair)
        if lifecycle.must_wait(w, f, index, line):
            return
        if not _has_room(w, pair):
            lifecycle.block(w, f, index, line)
            return
        size = libc.recv(flow.fd(f), buffer, udp.SCRATCH_BYTES, sockets.MSG_DONTWAIT)
        if size < 0 and size != -sockets.EAGAIN:
            continue  # an error of an earlier request, now cleared
        if size < 0:
            lifecycle.clear(f, READABLE)
            return
        if size < ECHO_BYTES or mem.u8(buffer) != (ECHO6_REPLY if v6 else ECHO_REPLY):
            continue
        protocol = IPPROTO_ICMP6 if v6 else IPPROTO_ICMP
        mem.put_be16(buffer + 4, flow.guest_port(f))
        mem.put_be16(buffer + 2, 0)
        total = checksum.partial(buffer, size)
        if v6:
            total += wire.pseudo_sum(v6, protocol, far, guest, size)
        wire.put_sum(buffer + 2, total)
        flow.set_rx_bytes(f, flow.rx_bytes(f) + size)
        lifecycle.put(f, FAR_SAID)
        fragment.place(w, f, pair, protocol, buffer, size)
    context.set_busy(w, 1)
    lifecycle.put(f, lifecycle.AGAIN)
