"""tcp_rx.py - host stream sockets -> guest: data, FIN, retransmission, and the end of a breath for
a flow.

Theory      push() lays frames out over the guest's receive buffers, as many as its window allows,
            and one recvmsg with MSG_PEEK fills them all. Nothing leaves the socket until the guest
            has acknowledged it: then it is discarded with MSG_TRUNC, which also moves the peek
            offset (SO_PEEK_OFF). Sending again is setting that offset back to zero.
            settle() runs once per touched flow at the end of a breath: discard, send data,
            acknowledge, set timers.
GSO         When the driver took GUEST_TSO4/6 a frame carries up to 64 KiB with one header, gso_size
            = the guest's MSS. Without, frames are MSS-sized, still many per recvmsg. Without
            GUEST_CSUM checksums are completed here.
Full ring   No receive buffer: the flow is parked on the ring (lifecycle.block), the ring asks for a
            kick, the data waits in the socket. Nothing spins, nothing is lost.
Short read  The socket was drained; with edge triggering a new edge tells of more. After a hang-up
            there is no further edge: READABLE stays until recvmsg has returned 0, and FIN is sent.
            Likewise where there was urgent data, at which recvmsg stops short (URGENT).
Limits      BATCH_BYTES per flow and recvmsg, BATCHES per breath. Retries and times below.
Old kernels Without SO_PEEK_OFF for TCP (before Linux 6.9) the bytes in flight are peeked into a
            discard area first; no more than SKIP_MAX are in flight then.
Ownership   Only flows whose home is this worker.
"""

from __future__ import annotations

from dataplane import (
    checksum,
    far_peer,
    handoff,
    lifecycle,
    rehome,
    rx,
    sockets,
    tcp_held,
    tcp_segment,
    wire,
)
from dataplane.context import IOV_BYTES, VNET_BYTES, context, rxframe
from dataplane.lifecycle import (
    ACK_DUE,
    CLOSING,
    CONNECTING,
    DEAD,
    FIN_ACKED,
    FIN_MADE,
    FIN_SENT,
    GUEST_FIN,
    HOST_HUP,
    NO_ROOM,
    READABLE,
    SERVED,
    SYN_ACKED,
    SYN_DUE,
    SYN_SENT,
    URGENT,
    WRITE_BLOCKED,
)
from dataplane.wire import ACK, FIN, M32, PSH, TCP_BYTES, distance
from flows import steer
from shm import libc, mem
from shm import ring as shm_ring
from shm.access import flow, net, worker
from shm.jit import jit

BATCH_BYTES = 1 << 18
BATCHES = 4
GSO_PAYLOAD_MAX = 65535 - wire.IP6_BYTES - TCP_BYTES
DISCARD_BYTES = 1 << 16
DISCARD_PIECES = 512
SKIP_MAX = DISCARD_PIECES // 2 * DISCARD_BYTES
MEMINFO_FRESH = 1 << 18
DISCARDS_MAX = 4

RTO_FIRST_MS = 1000
RETRIES_MAX = 7
SYN_RETRIES_MAX = 5
IDLE_MS = 7200 * 1000
KEEPALIVE_MS = 300 * 1000


# --- data -----------------------------------------------------------------------------------------


@jit
def _header_bytes(v6):
    return VNET_BYTES + wire.ETHER_BYTES + wire.l3_bytes(v6) + TCP_BYTES


@jit
def _is_gso(w, v6):
    return context.guest_tso6(w) if v6 else context.guest_tso4(w)


@jit
def _frame_payload(w, f, v6):
    """Payload of a full frame: MSS, or as many whole MSS as one GSO frame takes."""
    mss = flow.mss(f)
    if not _is_gso(w, v6):
        return mss
    return max(GSO_PAYLOAD_MAX // mss, 1) * mss


@jit
def _peek(w, f, iov, count):
    """Peek what follows the bytes already in flight. Bytes, or -errno; 0 at the end of the
    stream."""
    flags = sockets.MSG_PEEK | sockets.MSG_DONTWAIT
    if net.peek_offset(context.net(w)):
        return libc.recvmsg(flow.fd(f), sockets.put_msghdr(w, iov, count), flags)
    skip = distance(flow.seq_to_guest(f), flow.seq_acked(f))
    old, pieces, left = context.discard_iov(w), 0, skip
    for _ in range(DISCARD_PIECES // 2):
        if left <= 0:
            break
        piece = min(left, DISCARD_BYTES)
        mem.put_u64(old + pieces * IOV_BYTES, context.discard(w))
        mem.put_u64(old + pieces * IOV_BYTES + 8, piece)
        pieces += 1
        left -= piece
    keep = min(count, DISCARD_PIECES - pieces)
    mem.copy(old + pieces * IOV_BYTES, iov, keep * IOV_BYTES)
    done = libc.recvmsg(flow.fd(f), sockets.put_msghdr(w, old, pieces + keep), flags)
    if done < 0:
        return done
    if done > skip:
        return done - skip
    return 0 if lifecycle.has(f, HOST_HUP) else -sockets.EAGAIN


@jit
def _data_header(w, f, v6, size, last):
    """Headers of a data frame in context.out; checksum and segmentation are the guest's when it
    took them."""
    flags = ACK | PSH if last else ACK
    window = tcp_segment.advertise(w, f)
    guest, far = flow.guest_addr(f), flow.far_addr(f)
    tcp_segment.build(
        w, v6, guest, far, flow.guest_port(f), flow.far_port(f), flow.seq_to_guest(f),
        flow.seq_from_guest(f), flags, window, TCP_BYTES, size,
    )  # fmt: skip
    out = context.out(w)
    l4 = out + _header_bytes(v6) - TCP_BYTES
    if context.guest_csum(w):
        wire.leave_checksum(out, l4, 16, v6, wire.IPPROTO_TCP, far, guest, TCP_BYTES + size)
        if size > flow.mss(f):
            mem.put_u8(out + 1, wire.GSO_TCP6 if v6 else wire.GSO_TCP4)
            mem.put_le16(out + 2, l4 + TCP_BYTES - out - VNET_BYTES)
            mem.put_le16(out + 4, flow.mss(f))
    lifecycle.clear(f, ACK_DUE)


@jit
def _complete_checksum(w, f, v6, iov, pieces, skip, size):
    """Without GUEST_CSUM: the whole sum, over payload where it lies."""
    if context.guest_csum(w):
        return
    l4 = context.out(w) + _header_bytes(v6) - TCP_BYTES
    guest, far = flow.guest_addr(f), flow.far_addr(f)
    total = wire.pseudo_sum(v6, wire.IPPROTO_TCP, far, guest, TCP_BYTES + size)
    total += checksum.partial(l4, TCP_BYTES) + checksum.over_iov(iov, pieces, skip, size)
    wire.put_sum(l4 + 16, total)


@jit
def _sent(w, f, size):
    seq = (flow.seq_to_guest(f) + size) & M32
    flow.set_seq_to_guest(f, seq)
    if distance(seq, flow.seq_max(f)) > 0:
        flow.set_seq_max(f, seq)
    lifecycle.put(f, SERVED)


@jit
def _send_fin(w, f):
    """The other end has finished: FIN after the last byte."""
    if tcp_segment.send_empty(w, f, FIN | ACK, flow.seq_to_guest(f), tcp_segment.advertise(w, f)):
        _sent(w, f, 1)
        lifecycle.put(f, FIN_SENT | FIN_MADE)
        lifecycle.clear(f, ACK_DUE | READABLE)
        lifecycle.set_state(w, f, CLOSING)


@jit
def _arrived(w, f, result, wanted):
    """What a recvmsg says about the socket; 1 when `result` bytes are to be sent."""
    if result == 0:
        _send_fin(w, f)
        return 0
    if result == -sockets.EAGAIN:
        lifecycle.clear(f, READABLE)
        return 0
    if result < 0:
        lifecycle.put(f, DEAD)
        return 0
    far_peer.arrived(w, f, result)
    if result < wanted and not lifecycle.has(f, HOST_HUP | URGENT):
        lifecycle.clear(f, READABLE)
    return 1


@jit
def _push_ring(w, f, r, v6, room):
    """One batch into a receive ring of ours. Bytes sent; 0: nothing more can be done now, or
    NO_ROOM."""
    rx.begin(w)
    header, full, wanted = _header_bytes(v6), _frame_payload(w, f, v6), 0
    for _ in range(rx.RX_FRAMES_MAX):
        size = min(full, min(room, BATCH_BYTES) - wanted)
        if size <= 0:
            break
        got = rx.lay(w, r, header, size)
        if got <= 0:
            break
        wanted += got
        if got < size:
            break
    if wanted == 0:
        return NO_ROOM
    result = _peek(w, f, context.rx_iov(w), context.rx_iov_count(w))
    if not _arrived(w, f, result, wanted):
        return 0
    left, slots, skip = result, 0, 0
    for number in range(context.rx_frame_count(w)):
        size = min(left, rxframe.room(context.rx_frames(w) + number * rxframe.SIZE))
        left -= size
        _data_header(w, f, v6, size, left == 0)
        _complete_checksum(w, f, v6, context.rx_iov(w), context.rx_iov_count(w), skip, size)
        slots += rx.commit(w, r, number, context.out(w), header, size)
        skip += size
        _sent(w, f, size)
        if left == 0:
            break
    rx.virtq.take(r, slots)
    return result


@jit
def _push_across(w, f, other, pair, v6, room):
    """One frame to a receive ring of another worker, by the hand-off ring. The same."""
    header = _header_bytes(v6)
    size = min(room, _frame_payload(w, f, v6))
    h = handoff.between(w, context.id(w), other, handoff.RX)
    record = handoff.reserve(w, h, header + size)
    if record == 0:
        return NO_ROOM
    iov = context.rx_iov(w)
    mem.put_u64(iov, record + header)
    mem.put_u64(iov + 8, size)
    result = _peek(w, f, iov, 1)
    if not _arrived(w, f, result, size):
        return 0
    _data_header(w, f, v6, result, result < size)
    _complete_checksum(w, f, v6, iov, 1, 0, result)
    mem.copy(record, context.out(w), header)
    _sent(w, f, result)  # before anybody can see the frame, and so before it is acknowledged
    shm_ring.commit(h, record, header + result, pair)
    handoff.given(w, other, header + result)
    return result


@jit
def push(w, f, index):
    """Send what the socket holds, as far as the guest's window and buffers reach."""
    if rehome.behind(w, f):
        lifecycle.block(w, f, index, lifecycle.ELSE)
        return
    v6 = wire.is_v6(flow.far_addr(f))
    window = flow.window(f)
    if not net.peek_offset(context.net(w)):
        window = min(window, SKIP_MAX)
    for _ in range(BATCHES):
        room = window - distance(flow.seq_to_guest(f), flow.seq_acked(f))
        if room <= 0 or lifecycle.has(f, FIN_SENT | DEAD) or not lifecycle.has(f, READABLE):
            return
        pair = tcp_segment.queue_of(w, f)
        line = lifecycle.line_to(w, pair)
        if pair < 0:
            lifecycle.block(w, f, index, line)
            return
        if lifecycle.must_wait(w, f, index, line):
            return
        other = steer.worker_of(context.instance(w), pair)
        if other == context.id(w):
            sent = _push_ring(w, f, rx.ring_of(w, pair), v6, room)
        else:
            sent = _push_across(w, f, other, pair, v6, room)
        if sent == NO_ROOM:
            lifecycle.block(w, f, index, line)
        if sent <= 0:
            return
    if lifecycle.has(f, READABLE):
        context.set_busy(w, 1)
        lifecycle.put(f, lifecycle.AGAIN)


# --- acknowledged data ----------------------------------------------------------------------------


@jit
def discard(w, f):
    """Free in the socket what the guest has acknowledged; this moves the peek offset, too."""
    for _ in range(DISCARDS_MAX):  # more than one where recv stops at an urgent byte
        size = flow.undiscarded(f)
        if size == 0:
            return
        done = libc.recv(flow.fd(f), 0, size, sockets.MSG_TRUNC | sockets.MSG_DONTWAIT)
        if done <= 0:
            return
        flow.set_undiscarded(f, size - done)


@jit
def rewind(w, f):
    """Send again from the first byte the guest has not acknowledged."""
    discard(w, f)
    flow.set_seq_to_guest(f, flow.seq_acked(f))
    if net.peek_offset(context.net(w)):
        left = flow.undiscarded(f)  # what could not be discarded is still in front
        sockets.set_int(w, flow.fd(f), sockets.SOL_SOCKET, sockets.SO_PEEK_OFF, left)
    if not lifecycle.has(f, FIN_ACKED):
        lifecycle.clear(f, FIN_SENT)
    lifecycle.put(f, READABLE)
    worker.set_retransmits(context.me(w), worker.retransmits(context.me(w)) + 1)


# --- the end of a breath --------------------------------------------------------------------------


@jit
def drop_host(w, f, index):
    """End a connection towards the host (the peer gets RST) and forget it."""
    fd = flow.fd(f)
    if fd >= 0:
        flow.set_fd(f, -1)
        sockets.abort(w, fd)
    lifecycle.forget(w, f, index)


@jit
def reset_both(w, f, index):
    """End a connection towards both sides."""
    tcp_segment.reset_guest(w, f)
    drop_host(w, f, index)


@jit
def learn_room(w, f, index):
    """After sending: how much the socket still takes; when the guest cannot go on, be told of
    room."""
    if flow.sndbuf_free(f) < MEMINFO_FRESH:
        sockets.learn_room(w, f)
    left = distance(flow.window_edge(f), flow.seq_from_guest(f))
    room = max(left, flow.sndbuf_free(f) * 3 // 4)
    if tcp_held.waits(w, f) or tcp_segment.as_seen(f, room) < tcp_segment.worthwhile(w, f):
        lifecycle.put(f, WRITE_BLOCKED)
        sockets.rearm(w, f, index)


@jit
def _wait_for_room(w, f, index):
    """SYN or an acknowledgement found no receive buffer, or no queue: it goes when there is one."""
    lifecycle.block(w, f, index, lifecycle.line_to(w, tcp_segment.queue_of(w, f)))


@jit
def settle(w, f, index):
    """All that a breath left to do for one flow."""
    if lifecycle.has(f, DEAD):
        reset_both(w, f, index)
        return
    if flow.state(f) == CONNECTING:
        return
    if lifecycle.has(f, SYN_DUE) and not lifecycle.has(f, SYN_ACKED):
        if not tcp_segment.send_syn(w, f):
            _wait_for_room(w, f, index)
        schedule(w, f, index)
    if flow.state(f) == SYN_SENT:
        return
    if lifecycle.has(f, ACK_DUE):
        learn_room(w, f, index)
    discard(w, f)
    if lifecycle.has(f, SYN_ACKED):
        push(w, f, index)
    if lifecycle.has(f, DEAD):
        reset_both(w, f, index)
        return
    if lifecycle.has(f, ACK_DUE) and not tcp_segment.send_ack(w, f):
        _wait_for_room(w, f, index)
    if (
        lifecycle.has(f, GUEST_FIN)
        and lifecycle.has(f, FIN_ACKED)
        and not lifecycle.has(f, ACK_DUE)
    ):
        lifecycle.forget(w, f, index)
        return
    schedule(w, f, index)


# --- timers ---------------------------------------------------------------------------------------


@jit
def schedule(w, f, index):
    """When the flow must be looked at next: retransmission while something is in flight, else
    keepalive."""
    in_flight = flow.seq_max(f) != flow.seq_acked(f)
    probe = flow.window(f) == 0 and lifecycle.has(f, READABLE)
    if in_flight or probe:
        wait_ms = RTO_FIRST_MS << flow.retries(f)
    else:
        wait_ms = KEEPALIVE_MS
    deadline_ms = context.now_ms(w) + wait_ms
    idle = wait_ms == KEEPALIVE_MS
    if idle or flow.deadline_ms(f) == 0 or deadline_ms < flow.deadline_ms(f):
        lifecycle.set_deadline(w, f, index, deadline_ms)


@jit
def _resend(w, f):
    """SYN, or SYN,ACK, or data once more. A closed window is probed with one byte (RFC 9293
    3.8.6.1)."""
    if not lifecycle.has(f, SYN_ACKED):
        lifecycle.put(f, SYN_DUE)
        return
    if flow.window(f) == 0:
        flow.set_window(f, 1)
    if flow.seq_max(f) != flow.seq_acked(f):
        rewind(w, f)


@jit
def on_timer(w, f, index):
    """The flow's deadline has passed."""
    flow.set_deadline_ms(f, 0)
    state = flow.state(f)
    if state == CONNECTING:
        return
    now_ms = context.now_ms(w)
    quiet_ms = steer.since(now_ms, flow.last_guest_ms(f))
    in_flight = flow.seq_max(f) != flow.seq_acked(f)
    if in_flight or (flow.window(f) == 0 and lifecycle.has(f, READABLE)):
        # A window that is zero again says that the last probe, which set it to one byte, was
        # answered: the connection stays, however long it takes (RFC 9293 3.8.6.1).
        answered = state != SYN_SENT and flow.window(f) == 0
        retries_max = SYN_RETRIES_MAX if state == SYN_SENT else RETRIES_MAX
        if flow.retries(f) >= retries_max and not answered:
            reset_both(w, f, index)
            return
        flow.set_retries(f, min(flow.retries(f) + 1, retries_max - 1 if answered else retries_max))
        _resend(w, f)
    elif min(quiet_ms, steer.since(now_ms, flow.last_far_ms(f))) >= IDLE_MS:
        reset_both(w, f, index)
        return
    elif quiet_ms >= KEEPALIVE_MS:
        seq, window = (flow.seq_to_guest(f) - 1) & M32, tcp_segment.advertise(w, f)
        tcp_segment.send_empty(w, f, ACK, seq, window)
    lifecycle.touch(w, f, index)
    schedule(w, f, index)
