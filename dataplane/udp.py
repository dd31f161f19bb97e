"""udp.py - guest UDP datagrams <-> connected host sockets, one per flow.

Theory      The first datagram of a 4-tuple makes a flow with a connected socket of its own: answers
            come back on it, errors are told apart, and the kernel does the matching. A datagram is
            sent straight from guest memory, with those that follow it (udp_train.py). What arrives
            is received straight into receive buffers: as many datagrams by one recvmmsg as there
            are buffers that take the last one's size; larger ones one by one, laid out over several
            buffers. What is longer than its room goes to scratch memory and is copied.
MTU         A datagram above the guest's MTU comes as fragments (fragment.py), from scratch memory.
            A train (UDP_GRO) of such datagrams is taken apart first, also for a guest that takes
            trains: a gso_size above its MTU it could not send on.
States      ONEWAY  one side only has sent so far: forgotten after net.udp_oneway_s without traffic.
            STREAM  both sides have: net.udp_stream_s.
Errors      IP_RECVERR: ICMP errors wait in the socket's error queue; plain Python turns them into
            ICMP for the guest (slow/errors). A send that fails with such an error is tried once
            more: the error was about an earlier one.
Limits      BATCHES of BATCH_MAX datagrams per flow and breath to the guest. No multicast.
Ownership   Only flows whose home is this worker.
Drops       bad_l4, bad_offload, not_unicast, table_full, table_busy, no_socket, send_failed,
            rx_full, rx_small, no_queue.
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
    udp_train,
    virtq,
    wire,
)
from dataplane.context import (
    BATCH_MAX,
    CONTROL_BYTES,
    ERRORS_MAX,
    IOV_BYTES,
    MMSG_BYTES,
    TAIL_BYTES,
    VNET_BYTES,
    context,
    ring,
    rxframe,
)
from dataplane.lifecycle import AGAIN, FAR_SAID, NO_ROOM, ONEWAY, READABLE, SERVED, UDP
from dataplane.wire import IPPROTO_UDP, UDP_BYTES
from flows import address, steer, table
from shm import libc, mem
from shm import ring as shm_ring
from shm.access import flow
from shm.jit import jit
from shm.schema import DROP

BAD_OFFLOAD = -1 - DROP["bad_offload"]
BAD_L4 = -1 - DROP["bad_l4"]
NOT_UNICAST = -1 - DROP["not_unicast"]
TABLE_FULL = -1 - DROP["table_full"]
TABLE_BUSY = -1 - DROP["table_busy"]
NO_SOCKET = -1 - DROP["no_socket"]
SEND_FAILED = -1 - DROP["send_failed"]
RX_FULL = -1 - DROP["rx_full"]

BATCHES = 2
CMSG_BYTES = 16  # struct cmsghdr
MSG_LEN = 56  # mmsghdr.msg_len
SEGMENTS_MAX = 128  # of one datagram with HOST_USO: Linux' UDP_MAX_SEGMENTS
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
    if flow.hops(f) != context.hops(w):
        udp_train.flush(w)  # what is on its way has another TTL
        sockets.set_hops(w, f, context.v6(w), context.hops(w))
    flow.set_last_guest_ms(f, context.now_ms(w))
    skip, size = context.l4(w) + UDP_BYTES, size - UDP_BYTES
    if mem.u8(context.hdr(w) + 1) == wire.GSO_UDP_L4:
        return _segments(w, index, skip, size, mem.le16(context.hdr(w) + 4))
    udp_train.add(w, index, skip, size)
    return 0


@jit
def _segments(w, index, skip, size, segment):
    """One large datagram, which the guest leaves to us to cut (VIRTIO_NET_F_HOST_USO)."""
    if segment == 0 or size > segment * SEGMENTS_MAX:
        return BAD_OFFLOAD
    for _ in range(SEGMENTS_MAX):
        piece = min(segment, size)
        udp_train.add(w, index, skip, piece)
        skip, size = skip + piece, size - piece
        if size == 0:
            break
    return 0


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
    flow.set_mss(f, SIZE_FIRST)
    size = sockets.put_sockaddr(w, target, port)
    if libc.connect(fd, context.sockaddr(w), size) < 0:
        libc.close(fd)
        lifecycle.forget(w, f, index)
        return SEND_FAILED
    flow.set_fd(f, fd)  # once it is connected: no successor finds one that is not
    if flow.protocol(f) == UDP and sockets.takes_trains(w, f):
        sockets.join_trains(w, f)
    if sockets.watch(w, f, index) < 0:
        lifecycle.forget(w, f, index)
        return NO_SOCKET
    return index


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
def _put_header(l4, f, size):
    """The UDP header of `size` bytes of payload, checksum still zero."""
    mem.put_be16(l4, flow.far_port(f))
    mem.put_be16(l4 + 2, flow.guest_port(f))
    mem.put_be16(l4 + 4, UDP_BYTES + size)
    mem.put_be16(l4 + 6, 0)


@jit
def _put_sum(l4, f, size, payload_sum):
    """The checksum into a header of _put_header (RFC 768: 0 is sent as 0xffff)."""
    far, guest = flow.far_addr(f), flow.guest_addr(f)
    total = wire.pseudo_sum(wire.is_v6(far), IPPROTO_UDP, far, guest, UDP_BYTES + size)
    wire.put_sum(l4 + 6, total + checksum.partial(l4, UDP_BYTES) + payload_sum)
    if mem.be16(l4 + 6) == 0:
        mem.put_be16(l4 + 6, 0xFFFF)


@jit
def header(w, f, size, segment):
    """Headers of a datagram of `size` payload bytes in context.out, checksum still zero; their
    length. `segment`: it is many of this size, for the guest to cut; 0: one."""
    far, guest = flow.far_addr(f), flow.guest_addr(f)
    l4 = wire.headers(w, context.out(w), wire.is_v6(far), IPPROTO_UDP, far, guest, UDP_BYTES + size)
    _put_header(l4, f, size)
    length = l4 + UDP_BYTES - context.out(w)
    if segment:
        mem.put_u8(context.out(w) + 1, wire.GSO_UDP_L4)
        mem.put_le16(context.out(w) + 2, length - VNET_BYTES)
        mem.put_le16(context.out(w) + 4, segment)
    return length


@jit
def finish(w, f, header_bytes, source, pieces, size):
    """Checksum of the datagram whose payload lies in `pieces` iovecs at `source`."""
    far, guest, out = flow.far_addr(f), flow.guest_addr(f), context.out(w)
    l4 = out + header_bytes - UDP_BYTES
    if context.guest_csum(w):
        v6 = wire.is_v6(far)
        wire.leave_checksum(out, l4, 6, v6, IPPROTO_UDP, far, guest, UDP_BYTES + size)
    else:
        _put_sum(l4, f, size, checksum.over_iov(source, pieces, 0, size))


@jit
def _segment_of(message, size):
    """The size of each datagram that the kernel has put together in a message (UDP_GRO); 0: it is
    one."""
    control = mem.u64(message + 32)
    if mem.u64(message + 40) < CMSG_BYTES + 4 or mem.u32(control + 8) != sockets.SOL_UDP:
        return 0
    segment = mem.u32(control + CMSG_BYTES)
    return segment if mem.u32(control + 12) == sockets.UDP_GRO and 0 < segment < size else 0


@jit
def _receive(w, f, pieces):
    """One datagram into rx_iov[:pieces] and, beyond that, scratch memory (_tail 0). Its size, or
    -errno."""
    target = context.rx_iov(w)
    mem.put_u64(target + pieces * IOV_BYTES, _tail(w, 0))
    mem.put_u64(target + pieces * IOV_BYTES + 8, TAIL_BYTES)
    message = sockets.put_msghdr(w, target, pieces + 1)
    mem.put_u64(message + 32, context.rx_control(w))
    mem.put_u64(message + 40, CONTROL_BYTES if sockets.takes_trains(w, f) else 0)
    done = libc.recvmsg(flow.fd(f), message, sockets.MSG_DONTWAIT)
    if done < 0 and done != -sockets.EAGAIN:  # an error of an earlier datagram, now cleared
        done = libc.recvmsg(flow.fd(f), message, sockets.MSG_DONTWAIT)
    return done


@jit
def _datagram(segment, size):
    """Payload bytes of one datagram, of `size` in a message that the kernel put together or not."""
    return segment if segment else size


@jit
def payload_max(w, f):
    """Payload of the largest datagram that is one packet to the guest."""
    return fragment.limit(w, wire.is_v6(flow.far_addr(f))) - UDP_BYTES


@jit
def place_alone(w, f, pair, at, size, segment):
    """Datagrams of `segment` bytes (0: one) above the guest's MTU, payload at `at` in scratch
    memory with UDP_BYTES free in front of it, each as fragments; those that do not fit are counted.
    """
    segment = _datagram(segment, size)
    for done in range(0, size, segment):
        piece, l4 = min(segment, size - done), at + done - UDP_BYTES
        _put_header(l4, f, piece)  # over the end of the one before, which has gone
        _put_sum(l4, f, piece, checksum.partial(l4 + UDP_BYTES, piece))
        fragment.place(w, f, pair, IPPROTO_UDP, l4, UDP_BYTES + piece)


@jit
def _header_bytes(f):
    v6 = wire.is_v6(flow.far_addr(f))
    return VNET_BYTES + wire.ETHER_BYTES + wire.l3_bytes(v6) + UDP_BYTES


@jit
def _tail(w, number):
    """Scratch memory for what datagram `number` has beyond its room; TAIL_BYTES before it are
    free, too."""
    return context.tails(w) + (2 * number + 1) * TAIL_BYTES


@jit
def _lay_batch(w, f, r, header_bytes):
    """Messages for a recvmmsg, a receive buffer each; how many."""
    rx.begin(w)
    for number in range(BATCH_MAX):
        first = context.rx_iov_count(w)
        room = rx.lay_one(w, r, header_bytes)
        if room < flow.mss(f):
            return number
        pieces = context.rx_iov_count(w) - first
        source = context.rx_iov(w) + first * IOV_BYTES
        mem.put_u64(source + pieces * IOV_BYTES, _tail(w, number))
        mem.put_u64(source + pieces * IOV_BYTES + 8, TAIL_BYTES)
        context.set_rx_iov_count(w, first + pieces + 1)
        m = context.rx_msgs(w) + number * MMSG_BYTES
        mem.put_u64(m + 16, source)
        mem.put_u64(m + 24, pieces + 1)
        mem.put_u64(m + 32, context.rx_control(w) + number * CONTROL_BYTES)
        mem.put_u64(m + 40, CONTROL_BYTES if sockets.takes_trains(w, f) else 0)
    return BATCH_MAX


@jit
def _straighten(w, number, size):
    """Copy datagram `number` to scratch memory, in one piece; its message then says where."""
    m = context.rx_msgs(w) + number * MMSG_BYTES
    room = min(rxframe.room(context.rx_frames(w) + number * rxframe.SIZE), size)
    at = _tail(w, number) - room
    iov.copy_out(at, mem.u64(m + 16), mem.u64(m + 24) - 1, 0, room)
    mem.put_u64(m + 16, at)


@jit
def _place_copies(w, f, r, header_bytes, first, count):
    """Datagram `first` was larger than its buffer, or than the MTU: it and those behind it are laid
    out anew."""
    most = payload_max(w, f)
    for number in range(first, count):
        size = mem.u32(context.rx_msgs(w) + number * MMSG_BYTES + MSG_LEN)
        _straighten(w, number, size)
    for number in range(first, count):
        m, copy = context.rx_msgs(w) + number * MMSG_BYTES, context.discard_iov(w)
        size, at = mem.u32(m + MSG_LEN), mem.u64(m + 16)
        segment = _segment_of(m, size)
        if _datagram(segment, size) > most:
            place_alone(w, f, ring.index(r) >> 1, at, size, segment)
            continue
        mem.put_u64(copy, at)
        mem.put_u64(copy + 8, size)
        header(w, f, size, segment)
        finish(w, f, header_bytes, copy, 1, size)
        result = rx.put(w, r, context.out(w), header_bytes, at, size)
        if result == 0:
            virtq.drop(r, RX_FULL)


@jit
def _batch(w, f, index, r):
    """Datagrams into a receive ring of ours, a buffer each: how many, 0 when nothing more can be
    done now, or NO_ROOM when single buffers will not do."""
    header_bytes, slots = _header_bytes(f), 0
    wanted = _lay_batch(w, f, r, header_bytes)
    if wanted == 0:
        return NO_ROOM
    messages, flags = context.rx_msgs(w), sockets.MSG_DONTWAIT
    count = libc.recvmmsg(flow.fd(f), messages, wanted, flags)
    if count < 0 and count != -sockets.EAGAIN:  # an error of an earlier datagram, now cleared
        count = libc.recvmmsg(flow.fd(f), messages, wanted, flags)
    if count < wanted:
        lifecycle.clear(f, READABLE)
    if count <= 0:
        return 0
    straight, most = count, payload_max(w, f)
    for number in range(count):
        _account(f, mem.u32(messages + number * MMSG_BYTES + MSG_LEN))
    for number in range(count):
        m = messages + number * MMSG_BYTES
        size = mem.u32(m + MSG_LEN)
        segment = _segment_of(m, size)
        room = rxframe.room(context.rx_frames(w) + number * rxframe.SIZE)
        if size > room or _datagram(segment, size) > most:
            straight = number
            break
        header(w, f, size, segment)
        finish(w, f, header_bytes, mem.u64(m + 16), mem.u64(m + 24) - 1, size)
        slots += rx.commit(w, r, number, context.out(w), header_bytes, size)
    virtq.take(r, slots)
    if straight < count:
        _place_copies(w, f, r, header_bytes, straight, count)
    _heard(w, f, index)
    return count


@jit
def _single(w, f, index, r):
    """One datagram into a receive ring of ours: 1, 0 when nothing more can be done now, or
    NO_ROOM."""
    header_bytes = _header_bytes(f)
    rx.begin(w)
    room = rx.lay(w, r, header_bytes, flow.mss(f))
    if room < 0:
        return NO_ROOM
    size = _receive(w, f, context.rx_iov_count(w))
    if size < 0:
        lifecycle.clear(f, READABLE)
        return 0
    _account(f, size)
    _heard(w, f, index)
    segment = _segment_of(context.msghdr(w), size)
    if _datagram(segment, size) > payload_max(w, f):
        at = _tail(w, 0) - min(room, size)
        iov.copy_out(at, context.rx_iov(w), context.rx_iov_count(w), 0, min(room, size))
        place_alone(w, f, ring.index(r) >> 1, at, size, segment)
        return 1
    if size > room:
        rx.begin(w)
        if rx.lay(w, r, header_bytes, size) < size:
            virtq.drop(r, RX_FULL)
            return 1
        iov.copy_in(context.rx_iov(w), context.rx_iov_count(w), room, _tail(w, 0), size - room)
    header(w, f, size, segment)
    finish(w, f, header_bytes, context.rx_iov(w), context.rx_iov_count(w), size)
    virtq.take(r, rx.commit(w, r, 0, context.out(w), header_bytes, size))
    return 1


@jit
def _to_ring(w, f, index, r):
    """Datagrams into a receive ring of ours: how many, 0 when nothing more can be done now, or
    NO_ROOM."""
    done = _batch(w, f, index, r)
    return done if done != NO_ROOM else _single(w, f, index, r)


@jit
def _account(f, size):
    known = flow.mss(f)  # the largest of late: one that fits need not be copied
    flow.set_mss(f, min(max(size, SIZE_FIRST, known - (known >> 6)), 65507))
    flow.set_rx_bytes(f, flow.rx_bytes(f) + size)
    lifecycle.put(f, SERVED)


@jit
def _heard(w, f, index):
    """The other end has sent something."""
    flow.set_last_far_ms(f, context.now_ms(w))
    lifecycle.said(w, f, index, FAR_SAID)


@jit
def _across(w, f, index, other, pair):
    """One datagram to another worker's receive ring. The same."""
    header_bytes = _header_bytes(f)
    h, most = handoff.between(w, context.id(w), other, handoff.RX), payload_max(w, f)
    more = SCRATCH_BYTES if flow.mss(f) > most else 0  # what headers of fragments may take
    record = handoff.reserve(w, h, header_bytes + SCRATCH_BYTES + more)
    if record == 0:
        return NO_ROOM
    target = context.rx_iov(w)
    mem.put_u64(target, record + header_bytes)
    mem.put_u64(target + 8, SCRATCH_BYTES)
    size = _receive(w, f, 1)
    if size < 0:
        lifecycle.clear(f, READABLE)
        return 0
    _account(f, size)
    _heard(w, f, index)
    segment = _segment_of(context.msghdr(w), size)
    if _datagram(segment, size) > most:
        mem.copy(_tail(w, 0), record + header_bytes, size)
        place_alone(w, f, pair, _tail(w, 0), size, segment)
        return 1
    header(w, f, size, segment)
    finish(w, f, header_bytes, context.rx_iov(w), 1, size)
    mem.copy(record, context.out(w), header_bytes)
    shm_ring.commit(h, record, header_bytes + size, pair)
    handoff.given(w, other, header_bytes + size)
    return 1


@jit
def settle(w, f, index):
    """Datagrams of the socket to the guest, up to the budget of a breath."""
    if rehome.behind(w, f):
        lifecycle.block(w, f, index, lifecycle.ELSE)
        return
    budget = BATCHES * BATCH_MAX
    for _ in range(BATCHES * BATCH_MAX):
        if not lifecycle.has(f, READABLE):
            return
        pair = steer.queue_of(context.instance(w), f, context.id(w))
        line = lifecycle.line_to(w, pair)
        if pair < 0:
            lifecycle.block(w, f, index, line)
            return
        if lifecycle.must_wait(w, f, index, line):
            return
        other = steer.worker_of(context.instance(w), pair)
        if other == context.id(w):
            done = _to_ring(w, f, index, rx.ring_of(w, pair))
        else:
            done = _across(w, f, index, other, pair)
        if done == NO_ROOM:
            lifecycle.block(w, f, index, line)
        if done <= 0:
            return
        budget -= done
        if budget <= 0:
            break
    context.set_busy(w, 1)
    lifecycle.put(f, AGAIN)


@jit
def on_timer(w, f, index):
    """No traffic for the flow's timeout."""
    lifecycle.forget(w, f, index)
