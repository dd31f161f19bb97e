"""udp.py - guest UDP datagrams <-> connected host sockets, one per flow.

Theory      The first datagram of a 4-tuple makes a flow with a connected socket of its own: answers
            come back on it, errors are told apart, and the kernel does the matching. A datagram is
            sent straight from guest memory; one that arrives is received straight into receive
            buffers laid out for the size of the last one, what is longer goes to scratch memory and
            is copied behind it.
States      ONEWAY  one side only has sent so far: forgotten after net.udp_oneway_s without traffic.
            STREAM  both sides have: net.udp_stream_s.
Errors      IP_RECVERR: ICMP errors wait in the socket's error queue; plain Python turns them into
            ICMP for the guest (slow/errors). A send that fails with such an error is tried once
            more: the error was about an earlier one.
Limits      DATAGRAMS_MAX per flow and breath to the guest. No multicast.
Ownership   Only flows whose home is this worker.
Drops       bad_l4, not_unicast, table_full, table_busy, no_socket, socket_full, send_failed,
            rx_full, no_queue.
"""

from __future__ import annotations

from dataplane import checksum, handoff, iov, lifecycle, rx, sockets, virtq, wire
from dataplane.context import ERRORS_MAX, IOV_BYTES, VNET_BYTES, context
from dataplane.lifecycle import AGAIN, ONEWAY, READABLE, STREAM
from dataplane.wire import IPPROTO_UDP, UDP_BYTES
from flows import address, steer, table
from shm import libc, mem
from shm import ring as shm_ring
from shm.access import flow, net
from shm.jit import jit
from shm.schema import DROP

BAD_L4 = -1 - DROP["bad_l4"]
NOT_UNICAST = -1 - DROP["not_unicast"]
TABLE_FULL = -1 - DROP["table_full"]
TABLE_BUSY = -1 - DROP["table_busy"]
NO_SOCKET = -1 - DROP["no_socket"]
SOCKET_FULL = -1 - DROP["socket_full"]
SEND_FAILED = -1 - DROP["send_failed"]
RX_FULL = -1 - DROP["rx_full"]

DATAGRAMS_MAX = 32
SIZE_FIRST = 1472
SCRATCH_BYTES = 1 << 16


@jit
def from_guest(w, index):
    """The UDP datagram at hand, of flow `index` or -1. 0, or -1 - reason."""
    l4 = context.hdr(w) + context.l4(w)
    size = mem.be16(l4 + 4)
    if context.l4_bytes(w) < UDP_BYTES or not UDP_BYTES <= size <= context.l4_bytes(w):
        return BAD_L4
    if index < 0:
        index = _open(w, l4)
        if index < 0:
            return index
    f = table.at(context.table(w), index)
    sockets.set_hops(w, f, context.v6(w), context.hops(w))
    return send(w, f, index, context.l4(w) + UDP_BYTES, size - UDP_BYTES)


@jit
def _open(w, l4):
    """A flow for the guest's first datagram: socket, connect. Its index, or -1 - reason."""
    key = context.key(w)
    far, port = key + table.KEY_FAR, mem.be16(l4 + 2)
    if port == 0 or mem.be16(l4) == 0 or not address.is_unicast(far):
        return NOT_UNICAST
    target = context.address(w)
    address.outbound(context.net(w), far, port, target)
    index = lifecycle.open_flow(w, key, context.pair(w), ONEWAY)
    if index < 0:
        return TABLE_FULL if index == table.FULL else TABLE_BUSY
    f = table.at(context.table(w), index)
    return connect(w, f, index, sockets.open_datagram(w, target, 0), target, port)


@jit
def connect(w, f, index, fd, target, port):
    """Give the flow a datagram socket connected to `target`. The index, or -1 - reason."""
    if fd < 0:
        lifecycle.forget(w, f, index)
        return NO_SOCKET
    flow.set_fd(f, fd)
    flow.set_mss(f, SIZE_FIRST)
    size = sockets.put_sockaddr(w, target, port)
    if libc.connect(fd, context.sockaddr(w), size) < 0:
        lifecycle.forget(w, f, index)
        return SEND_FAILED
    if sockets.watch(w, f, index) < 0:
        lifecycle.forget(w, f, index)
        return NO_SOCKET
    return index


@jit
def send(w, f, index, skip, size):
    """Send `size` bytes, `skip` bytes into the chain at hand. 0, or -1 - reason."""
    target = context.rx_iov(w)
    pieces = iov.append_slice(target, 0, context.chain_iov(w), context.chain_count(w), skip, size)
    message = sockets.put_msghdr(w, target, pieces)
    flags = sockets.MSG_DONTWAIT | sockets.MSG_NOSIGNAL
    done = libc.sendmsg(flow.fd(f), message, flags)
    if done < 0 and done != -sockets.EAGAIN:
        done = libc.sendmsg(flow.fd(f), message, flags)
    flow.set_last_guest_ms(f, context.now_ms(w))
    if flow.rx_bytes(f) > 0 and flow.state(f) == ONEWAY:
        lifecycle.set_state(w, f, STREAM)
    schedule(w, f, index)
    if done < 0:
        return SOCKET_FULL if done == -sockets.EAGAIN else SEND_FAILED
    flow.set_tx_bytes(f, flow.tx_bytes(f) + size)
    return 0


@jit
def schedule(w, f, index):
    """Forget the flow after its timeout."""
    n = context.net(w)
    wait_s = net.udp_stream_s(n) if flow.state(f) == STREAM else net.udp_oneway_s(n)
    lifecycle.set_deadline(w, f, index, context.now_ms(w) + 1000 * wait_s)


@jit
def on_event(w, f, index, events):
    """Edges of the flow's socket."""
    if events & sockets.EPOLLERR:
        count = context.error_count(w)
        if count < ERRORS_MAX:
            mem.put_u32(context.errors(w) + 4 * count, index)
            context.set_error_count(w, count + 1)
    if events & (sockets.EPOLLIN | sockets.EPOLLERR):
        lifecycle.put(f, READABLE)
        lifecycle.touch(w, f, index)


@jit
def header(w, f, size):
    """Headers of a datagram of `size` payload bytes in context.out, checksum still zero; their
    length."""
    far, guest = flow.far_addr(f), flow.guest_addr(f)
    l4 = wire.headers(w, context.out(w), wire.is_v6(far), IPPROTO_UDP, far, guest, UDP_BYTES + size)
    mem.put_be16(l4, flow.far_port(f))
    mem.put_be16(l4 + 2, flow.guest_port(f))
    mem.put_be16(l4 + 4, UDP_BYTES + size)
    mem.put_be16(l4 + 6, 0)
    return l4 + UDP_BYTES - context.out(w)


@jit
def finish(w, f, header_bytes, pieces, size):
    """Checksum of the datagram whose payload lies in `pieces` of rx_iov (RFC 768: 0 is sent as
    0xffff)."""
    far, guest = flow.far_addr(f), flow.guest_addr(f)
    v6, out = wire.is_v6(far), context.out(w)
    l4 = out + header_bytes - UDP_BYTES
    if context.guest_csum(w):
        wire.leave_checksum(out, l4, 6, v6, IPPROTO_UDP, far, guest, UDP_BYTES + size)
        return
    total = wire.pseudo_sum(v6, IPPROTO_UDP, far, guest, UDP_BYTES + size)
    total += checksum.partial(l4, UDP_BYTES)
    total += checksum.over_iov(context.rx_iov(w), pieces, 0, size)
    wire.put_sum(l4 + 6, total)
    if mem.be16(l4 + 6) == 0:
        mem.put_be16(l4 + 6, 0xFFFF)


@jit
def _receive(w, f, pieces):
    """One datagram into rx_iov[:pieces] and, beyond that, scratch memory. Its size, or -errno."""
    target = context.rx_iov(w)
    mem.put_u64(target + pieces * IOV_BYTES, context.discard(w))
    mem.put_u64(target + pieces * IOV_BYTES + 8, SCRATCH_BYTES)
    message = sockets.put_msghdr(w, target, pieces + 1)
    done = libc.recvmsg(flow.fd(f), message, sockets.MSG_DONTWAIT)
    if done < 0 and done != -sockets.EAGAIN:  # an error of an earlier datagram, now cleared
        done = libc.recvmsg(flow.fd(f), message, sockets.MSG_DONTWAIT)
    return done


@jit
def _to_ring(w, f, index, r):
    """One datagram into a receive ring of ours: 1, 0 when nothing more can be done now."""
    header_bytes = (
        VNET_BYTES + wire.ETHER_BYTES + wire.l3_bytes(wire.is_v6(flow.far_addr(f))) + UDP_BYTES
    )
    rx.begin(w)
    room = rx.lay(w, r, header_bytes, flow.mss(f))
    if room < 0:
        lifecycle.block(w, f, index, r)
        return 0
    size = _receive(w, f, context.rx_iov_count(w))
    if size < 0:
        lifecycle.clear(f, READABLE)
        return 0
    if size > room:
        rx.begin(w)
        if rx.lay(w, r, header_bytes, size) < size:
            virtq.drop(r, RX_FULL)
            return 1
        iov.copy_in(
            context.rx_iov(w), context.rx_iov_count(w), room, context.discard(w), size - room
        )
    _account(w, f, index, size)
    header(w, f, size)
    finish(w, f, header_bytes, context.rx_iov_count(w), size)
    virtq.take(r, rx.commit(w, r, 0, context.out(w), header_bytes, size))
    return 1


@jit
def _account(w, f, index, size):
    flow.set_mss(f, min(max(size, SIZE_FIRST), 65507))
    flow.set_last_far_ms(f, context.now_ms(w))
    flow.set_rx_bytes(f, flow.rx_bytes(f) + size + 1)  # an empty datagram is an answer, too
    if flow.state(f) == ONEWAY and flow.tx_bytes(f) > 0:
        lifecycle.set_state(w, f, STREAM)
    schedule(w, f, index)


@jit
def _across(w, f, index, other, pair):
    """One datagram to another worker's receive ring: 1, 0 when nothing more can be done now."""
    header_bytes = (
        VNET_BYTES + wire.ETHER_BYTES + wire.l3_bytes(wire.is_v6(flow.far_addr(f))) + UDP_BYTES
    )
    h = handoff.between(w, context.id(w), other, handoff.RX)
    record = handoff.reserve(w, h, header_bytes + SCRATCH_BYTES)
    if record == 0:
        lifecycle.block(w, f, index, 0)
        return 0
    target = context.rx_iov(w)
    mem.put_u64(target, record + header_bytes)
    mem.put_u64(target + 8, SCRATCH_BYTES)
    size = _receive(w, f, 1)
    if size < 0:
        lifecycle.clear(f, READABLE)
        return 0
    _account(w, f, index, size)
    header(w, f, size)
    finish(w, f, header_bytes, 1, size)
    mem.copy(record, context.out(w), header_bytes)
    shm_ring.commit(h, record, header_bytes + size, pair)
    handoff.count(w, header_bytes + size)
    handoff.wake(w, other)
    return 1


@jit
def settle(w, f, index):
    """Datagrams of the socket to the guest, up to the budget of a breath."""
    for _ in range(DATAGRAMS_MAX):
        if not lifecycle.has(f, READABLE):
            return
        pair = steer.queue_of(context.instance(w), f, context.id(w))
        if pair < 0:
            lifecycle.block(w, f, index, 0)
            return
        other = steer.worker_of(context.instance(w), pair)
        if other != context.id(w):
            more = _across(w, f, index, other, pair)
        else:
            more = _to_ring(w, f, index, rx.ring_of(w, pair))
        if more == 0:
            return
    context.set_busy(w, 1)
    lifecycle.put(f, AGAIN)


@jit
def on_timer(w, f, index):
    """No traffic for the flow's timeout."""
    lifecycle.forget(w, f, index)
