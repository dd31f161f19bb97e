"""rx.py - frames into the guest's receive buffers.

Theory      lay() spreads one frame of a given size over the next receive buffers and appends the
            room for its payload to an iovec, so that a recvmsg writes payload straight into guest
            memory; commit() then writes the headers in front of what arrived and returns the
            buffers that were used. Buffers that were laid out but not used are simply not taken.
            Several frames can be laid out for one recvmsg. place() is for small frames that are
            ready in memory, on whatever worker's queue they belong.
Mergeable   With VIRTIO_NET_F_MRG_RXBUF a frame spans buffers, all but the last filled (virtio 1.3
            5.1.6.4); without, a frame must fit one buffer.
Limits      RX_FRAMES_MAX frames, RX_BUFS_MAX buffers and UIO_MAXIOV pieces in one batch.
Ownership   Only receive queues of this worker's own pairs.
Drops       rx_full and rx_small for frames that cannot wait; no_queue, unless the ring is to come:
            that is like one without buffers.
"""

from __future__ import annotations

from dataplane import handoff, iov, virtq
from dataplane.context import (
    ATTEND_BROKEN,
    CHAIN_IOV_MAX,
    GATHER_IOV_MAX,
    IOV_BYTES,
    RX_BUFS_MAX,
    RX_FRAMES_MAX,
    VNET_BYTES,
    context,
    ring,
    rxbuf,
    rxframe,
)
from dataplane.descriptor import BAD_AVAIL
from dataplane.wire import FRAME_MIN
from flows import steer
from shm import mem
from shm.access import queue
from shm.jit import jit
from shm.schema import DROP

RX_FULL = -1 - DROP["rx_full"]
RX_SMALL = -1 - DROP["rx_small"]
NO_QUEUE = -1 - DROP["no_queue"]
_MINIMUM = VNET_BYTES + FRAME_MIN


@jit
def ring_of(w, pair):
    """The receive ring of a pair."""
    return context.rings(w) + 2 * pair * ring.SIZE


@jit
def begin(w):
    """Start a batch on one receive ring."""
    context.set_rx_buf_count(w, 0)
    context.set_rx_slots(w, 0)
    context.set_rx_raw_count(w, 0)
    context.set_rx_iov_count(w, 0)
    context.set_rx_frame_count(w, 0)


@jit
def _buffer(w, r):
    """Add the next receive buffer to the batch: its size, 0 when there is none or no room for it
    in the batch, or -1 when it cannot be used.

    A malformed or empty chain at the head of the batch is returned with length 0 and counted;
    further in, the batch ends.
    """
    if not ring.running(r):
        return 0
    count, state = context.rx_buf_count(w), 0
    for _ in range(ring.num(r)):
        raw = context.rx_raw_count(w)  # rx_raw has room for 4 * CHAIN_IOV_MAX
        if count >= RX_BUFS_MAX or raw > 3 * CHAIN_IOV_MAX:
            break
        state = virtq.ready(r, context.rx_slots(w))
        if state <= 0:
            break
        target = context.rx_raw(w) + raw * IOV_BYTES
        pieces = virtq.walk(w, r, context.rx_slots(w), target, CHAIN_IOV_MAX, 1)
        if pieces == BAD_AVAIL:
            state = pieces
            break
        size = iov.total(target, max(pieces, 0))
        if size > 0:
            _add_buffer(w, r, raw, pieces, size)
            return size
        if count > 0:
            return -1
        virtq.drop(r, pieces if pieces < 0 else RX_SMALL)
        virtq.put_used(r, ring.chain_id(r), 0, ring.chain_slots(r))
        virtq.take(r, ring.chain_slots(r))
    if state < 0:
        virtq.drop(r, state)
        virtq.fail(r, context.option(w))
        context.set_attend(w, context.attend(w) | ATTEND_BROKEN)
    else:
        virtq.fell_short(r)
    return 0


@jit
def _add_buffer(w, r, raw, pieces, size):
    """The chain walked last belongs to the batch."""
    count = context.rx_buf_count(w)
    b = context.rx_bufs(w) + count * rxbuf.SIZE
    rxbuf.set_chain(b, ring.chain_id(r) | (ring.chain_slots(r) << 16))
    rxbuf.set_first(b, raw)
    rxbuf.set_size(b, size)
    context.set_rx_buf_count(w, count + 1)
    context.set_rx_slots(w, context.rx_slots(w) + ring.chain_slots(r))
    context.set_rx_raw_count(w, raw + pieces)


@jit
def _return(r, b, length):
    """Return a buffer of the batch with `length` bytes; the slots it takes."""
    slots = rxbuf.chain(b) >> 16
    virtq.put_used(r, rxbuf.chain(b) & 0xFFFF, length, slots)
    return slots


@jit
def _payload_room(w, first, skip, size):
    """Append the `size` bytes that follow `skip` bytes of headers to rx_iov; the bytes appended."""
    target, count, done = context.rx_iov(w), context.rx_iov_count(w), 0
    for index in range(rxbuf.first(first), context.rx_raw_count(w)):
        raw = context.rx_raw(w) + index * IOV_BYTES
        length = mem.u64(raw + 8)
        if skip >= length:
            skip -= length
            continue
        piece = min(length - skip, size - done)
        if piece <= 0 or count >= GATHER_IOV_MAX - 1:  # one is left for scratch memory (udp.py)
            break
        mem.put_u64(target + count * IOV_BYTES, mem.u64(raw) + skip)
        mem.put_u64(target + count * IOV_BYTES + 8, piece)
        count += 1
        done += piece
        skip = 0
    context.set_rx_iov_count(w, count)
    return done


@jit
def give_back(w, r):
    """The next receive buffer is of no use: back to the driver, or the ring is stuck for good."""
    virtq.drop(r, RX_SMALL)
    virtq.take(r, _return(r, context.rx_bufs(w), 0))
    ring.set_short_at(r, 0)  # the ones behind it may do
    begin(w)


@jit
def lay(w, r, header_bytes, payload_bytes):
    """Lay one frame out; the payload bytes it can take (may be fewer), or -1 when buffers or the
    batch ran out."""
    frames = context.rx_frame_count(w)
    if frames >= RX_FRAMES_MAX or context.rx_raw_count(w) > 2 * CHAIN_IOV_MAX:
        return -1
    first, size = context.rx_buf_count(w), 0
    if first == 0:
        ring.set_short_at(r, 0)
    need, got = max(header_bytes + payload_bytes, _MINIMUM), 0
    limit = RX_BUFS_MAX if context.mergeable(w) else 1
    for _ in range(limit):
        size = _buffer(w, r)
        if size <= 0 and context.rx_buf_count(w) == first:
            return -1
        if size <= 0:
            break
        got += size
        if got >= need:
            break
    f = context.rx_frames(w) + frames * rxframe.SIZE
    rxframe.set_first(f, first)
    rxframe.set_count(f, context.rx_buf_count(w) - first)
    if got < header_bytes:
        if first == 0 and (not context.mergeable(w) or size < 0):
            give_back(w, r)  # too small, or in front of a chain that cannot be used
        return -1
    room = min(payload_bytes, got - header_bytes)
    rxframe.set_room(
        f, _payload_room(w, context.rx_bufs(w) + first * rxbuf.SIZE, header_bytes, room)
    )
    context.set_rx_frame_count(w, frames + 1)
    return rxframe.room(f)


@jit
def lay_one(w, r, header_bytes):
    """Lay one frame of any size out over the next receive buffer alone; its room for payload, or -1
    when that buffer will not do or is not there."""
    frames, first = context.rx_frame_count(w), context.rx_buf_count(w)
    if frames >= RX_FRAMES_MAX or context.rx_raw_count(w) > 2 * CHAIN_IOV_MAX:
        return -1
    size = _buffer(w, r)
    if size <= max(header_bytes, _MINIMUM):
        if size > 0:  # leave it to lay()
            b = context.rx_bufs(w) + first * rxbuf.SIZE
            context.set_rx_buf_count(w, first)
            context.set_rx_slots(w, context.rx_slots(w) - (rxbuf.chain(b) >> 16))
            context.set_rx_raw_count(w, rxbuf.first(b))
        return -1
    f = context.rx_frames(w) + frames * rxframe.SIZE
    rxframe.set_first(f, first)
    rxframe.set_count(f, 1)
    b = context.rx_bufs(w) + first * rxbuf.SIZE
    rxframe.set_room(f, _payload_room(w, b, header_bytes, size - header_bytes))
    context.set_rx_frame_count(w, frames + 1)
    return rxframe.room(f)


@jit
def _scatter(w, first, skip, source, size):
    """Write `size` bytes to the frame that begins at buffer `first`, `skip` bytes into it. source
    0: zeros."""
    for index in range(rxbuf.first(first), context.rx_raw_count(w)):
        raw = context.rx_raw(w) + index * IOV_BYTES
        length = mem.u64(raw + 8)
        if skip >= length:
            skip -= length
            continue
        piece = min(length - skip, size)
        if source:
            mem.copy(mem.u64(raw) + skip, source, piece)
            source += piece
        else:
            for offset in range(piece):
                mem.put_u8(mem.u64(raw) + skip + offset, 0)
        size -= piece
        skip = 0
        if size <= 0:
            return


@jit
def commit(w, r, number, out, header_bytes, payload_bytes):
    """Finish frame `number` of the batch: headers from `out`, payload already in place. Returns
    slots to take."""
    f = context.rx_frames(w) + number * rxframe.SIZE
    first = context.rx_bufs(w) + rxframe.first(f) * rxbuf.SIZE
    size = header_bytes + payload_bytes
    room, buffers = 0, 0
    for index in range(rxframe.count(f)):
        room += rxbuf.size(first + index * rxbuf.SIZE)
        buffers += 1
        if room >= max(size, _MINIMUM):
            break
    mem.put_le16(out + 10, buffers)
    _scatter(w, first, 0, out, header_bytes)
    if size < _MINIMUM and room >= _MINIMUM:
        _scatter(w, first, size, 0, _MINIMUM - size)
        size = _MINIMUM
    counters = ring.counters(r)
    queue.set_packets(counters, queue.packets(counters) + 1)
    queue.set_bytes(counters, queue.bytes(counters) + size - VNET_BYTES)
    slots = 0
    for index in range(buffers):
        b = first + index * rxbuf.SIZE
        used = min(rxbuf.size(b), size)
        slots += _return(r, b, used)
        size -= used
    return slots


@jit
def usable(w, r):
    """1 when frames may go to this ring now."""
    return 1 if ring.running(r) and ring.enabled(r) else 0


@jit
def not_usable(w, r):
    """Why a ring cannot be used: 0 when it is to come, since control says that frames may go there
    (this worker has just taken the place of one that died), else NO_QUEUE."""
    i, pair = context.instance(w), ring.index(r) >> 1
    comes = steer.is_enabled(i, pair) and steer.worker_of(i, pair) == context.id(w)
    return 0 if comes else NO_QUEUE


@jit
def refuse(w, r, room):
    """What was laid out last has room for `room` bytes only (-1: for no frame), which is too
    little: 0 when buffers are missing, or RX_SMALL, counted, when more cannot come."""
    if room >= 0 and not context.mergeable(w):
        give_back(w, r)
        return RX_SMALL
    if ring.short_at(r) == 0:
        give_back(w, r)  # the chain behind it cannot be used
    if not virtq.is_full(r):
        return 0
    virtq.drop(r, RX_SMALL)  # the driver has no more buffers to give
    return RX_SMALL


@jit
def fill(w, payload):
    """Copy payload to all the room that was laid out."""
    for index in range(context.rx_iov_count(w)):
        piece = context.rx_iov(w) + index * IOV_BYTES
        mem.copy(mem.u64(piece), payload, mem.u64(piece + 8))
        payload += mem.u64(piece + 8)


@jit
def put(w, r, out, header_bytes, payload, payload_bytes):
    """A whole frame into one of this worker's rings: 1, 0 when buffers are missing, or -1 -
    reason."""
    if not usable(w, r):
        return not_usable(w, r)
    begin(w)
    room = lay(w, r, header_bytes, payload_bytes)
    if room < 0:
        return 0
    if room < payload_bytes:
        return refuse(w, r, room)
    fill(w, payload)
    virtq.take(r, commit(w, r, 0, out, header_bytes, payload_bytes))
    return 1


@jit
def place(w, pair, out, header_bytes, payload, payload_bytes):
    """A whole frame to a pair's receive queue, wherever it is served: 1, 0 (no room now), or -1 -
    reason."""
    if pair < 0:
        return NO_QUEUE
    other = steer.worker_of(context.instance(w), pair)
    if other != context.id(w):
        return handoff.send_frame(w, other, pair, out, header_bytes, payload, payload_bytes)
    return put(w, ring_of(w, pair), out, header_bytes, payload, payload_bytes)


@jit
def count_refused(w, pair, result):
    """Count what place() or its like refused, no room (0) as rx_full; 1 or the reason."""
    if result == 0:
        result = RX_FULL
    if result < 0 and result != RX_SMALL:
        i, me = context.instance(w), context.id(w)
        own = pair >= 0 and steer.worker_of(i, pair) == me
        virtq.drop(ring_of(w, pair if own else steer.pair_of(i, me)), result)
    return result


@jit
def place_or_drop(w, pair, out, header_bytes, payload, payload_bytes):
    """Like place, for frames nobody will send again: no room is a counted drop (on a ring of this
    worker)."""
    result = place(w, pair, out, header_bytes, payload, payload_bytes)
    return count_refused(w, pair, result)
