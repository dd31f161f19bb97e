"""tcp.py - guest TCP segments -> host stream sockets, and how connections begin and end.

Theory      We are not a TCP. Two kernels are; we carry to each what the other says. Sequence
            numbers towards the guest are ours, bytes map one to one to the socket's stream.
              guest -> host  in-order payload of a burst is gathered from guest memory, one sendmsg
                             for each flow (tcp_gather.py); what the socket took is acknowledged,
                             the rest the guest has.
              host -> guest  tcp_rx.py; segments without payload and the window: tcp_segment.py.
States      CONNECTING  the guest sent SYN; connect() is under way. It gets SYN,ACK when the other
            end has answered.
            SYN_SENT    the host accepted a connection; SYN was sent to the guest.
            OPEN        data may flow. Flags say who has finished: GUEST_FIN (socket shut down for
                        writing), HOST_HUP, FIN_SENT, FIN_ACKED (towards the guest).
            CLOSING     one side has finished. When both have, the flow is forgotten.
Too soon    Payload behind a gap, or more than the socket takes (its buffer shrank after the window
            was announced): tcp_held.py keeps it until what is missing has come, or the socket's
            EPOLLOUT edge tells of room.
Limits      No urgent data, no timestamps.
Ownership   Only flows whose home is this worker.
Drops       bad_l4, no_flow (RST is sent, RFC 9293 3.10.7.1), tcp_gap, tcp_window, tcp_stale,
            table_full, table_busy, no_socket, not_unicast.
"""

from __future__ import annotations

from dataplane import lifecycle, rx, sockets, spare, tcp_gather, tcp_held, tcp_rx, tcp_segment, wire
from dataplane.context import HEADERS_MAX, context, listener
from dataplane.lifecycle import (
    ACCEPTED,
    ACK_DUE,
    CONNECTING,
    DEAD,
    FIN_ACKED,
    FIN_MADE,
    FIN_SENT,
    GUEST_FIN,
    HOST_HUP,
    OPEN,
    READABLE,
    SACK,
    SCALED,
    SYN_ACKED,
    SYN_DUE,
    SYN_SENT,
    URGENT,
    WRITE_BLOCKED,
)
from dataplane.tcp_segment import OUR_SCALE
from dataplane.wire import ACK, FIN, M32, RST, SYN, TCP_BYTES, distance
from flows import address, steer, table
from shm import libc, mem
from shm.access import flow, net, worker
from shm.jit import jit
from shm.schema import DROP

BAD_L4 = -1 - DROP["bad_l4"]
NO_FLOW = -1 - DROP["no_flow"]
GAP = -1 - DROP["tcp_gap"]
STALE = -1 - DROP["tcp_stale"]
TABLE_FULL = -1 - DROP["table_full"]
TABLE_BUSY = -1 - DROP["table_busy"]
NO_SOCKET = -1 - DROP["no_socket"]
NOT_UNICAST = -1 - DROP["not_unicast"]

MSS_DEFAULT = 536  # RFC 9293 3.7.1
MSS_MIN = 64


# --- segments from the guest ----------------------------------------------------------------------


@jit
def from_guest(w, index):
    """The TCP segment at hand, of flow `index` or -1. 0, or -1 - reason."""
    l4 = context.hdr(w) + context.l4(w)
    size = context.l4_bytes(w)
    header = (mem.u8(l4 + 12) >> 4) * 4
    if size < TCP_BYTES or not TCP_BYTES <= header <= size:
        return BAD_L4
    if context.l4(w) + header > HEADERS_MAX:
        return BAD_L4
    flags = mem.u8(l4 + 13)
    if index < 0:
        if flags & (SYN | ACK | RST | FIN) == SYN:
            return _connect(w, l4, header)
        if flags & RST == 0:
            _reset_unknown(w, l4, size - header, flags)
        return NO_FLOW
    f = table.at(context.table(w), index)
    flow.set_last_guest_ms(f, context.now_ms(w))
    state = flow.state(f)
    if state == SYN_SENT:
        return _answered(w, f, index, l4, header, flags)
    if state == CONNECTING:
        if flags & RST:
            tcp_rx.drop_host(w, f, index)
        return 0  # SYN again: connect() is still under way
    return _segment(w, f, index, l4, size - header, flags)


@jit
def _reset_unknown(w, l4, payload, flags):
    """RST for a segment that belongs to no connection (RFC 9293 3.10.7.1)."""
    key, v6 = context.key(w), context.v6(w)
    guest, far = key + table.KEY_GUEST, key + table.KEY_FAR
    guest_port, far_port = mem.be16(l4), mem.be16(l4 + 2)
    if flags & ACK:
        seq, ack, out_flags = mem.be32(l4 + 8), 0, RST
    else:
        length = payload + (1 if flags & SYN else 0) + (1 if flags & FIN else 0)
        seq, ack, out_flags = 0, (mem.be32(l4 + 4) + length) & M32, RST | ACK
    size = tcp_segment.build(
        w, v6, guest, far, guest_port, far_port, seq, ack, out_flags, 0, TCP_BYTES, 0
    )
    tcp_segment.close_header(w, v6, guest, far, TCP_BYTES)
    pair = context.pair(w)
    if not steer.is_enabled(context.instance(w), pair):
        pair = steer.any_pair(context.instance(w), context.id(w), pair)
    rx.place_or_drop(w, pair, context.out(w), size, 0, 0)
    worker.set_resets(context.me(w), worker.resets(context.me(w)) + 1)


@jit
def _options(w, f, l4, header):
    """MSS, window scale and SACK of the guest's SYN (RFC 9293 3.2, RFC 7323 2.2, RFC 2018 2)."""
    v6 = wire.is_v6(flow.far_addr(f))
    mss, at = MSS_DEFAULT, l4 + TCP_BYTES
    for _ in range(40):
        left = l4 + header - at
        if left <= 0 or mem.u8(at) == 0:
            break
        kind = mem.u8(at)
        if kind == 1:
            at += 1
            continue
        length = mem.u8(at + 1) if left > 1 else 0
        if length < 2 or length > left:
            break
        if kind == 2 and length == 4:
            mss = mem.be16(at + 2)
        elif kind == 3 and length == 3:
            flow.set_guest_scale(f, min(mem.u8(at + 2), 14))
            flow.set_our_scale(f, OUR_SCALE)
            lifecycle.put(f, SCALED)
        elif kind == 4 and length == 2:
            lifecycle.put(f, SACK)
        at += length
    largest = 65535 - wire.IP6_BYTES - TCP_BYTES
    mtu = net.mtu(context.net(w))
    if mtu:
        largest = min(largest, mtu - wire.l3_bytes(v6) - TCP_BYTES)
    flow.set_mss(f, max(min(mss, largest), MSS_MIN))


@jit
def first_sequence(w, key):
    """Initial sequence number: keyed hash of the connection plus a clock (RFC 6528)."""
    return (table.hash_key(context.table(w), key) + (wire.now_ns(w) >> 6)) & M32


@jit
def _connect(w, l4, header):
    """The guest's SYN: a new flow, a socket, connect()."""
    key = context.key(w)
    far = key + table.KEY_FAR
    port = mem.be16(l4 + 2)
    if port == 0 or mem.be16(l4) == 0 or not address.is_unicast(far):
        return NOT_UNICAST
    target = context.address(w)
    address.outbound(context.net(w), far, port, target)
    index = lifecycle.open_flow(w, key, context.pair(w), CONNECTING)
    if index < 0:
        return TABLE_FULL if index == table.FULL else TABLE_BUSY
    f = table.at(context.table(w), index)
    seq = mem.be32(l4 + 4)
    isn = first_sequence(w, key)
    flow.set_isn_from_guest(f, seq)
    flow.set_isn_to_guest(f, isn)
    flow.set_seq_from_guest(f, (seq + 1) & M32)
    flow.set_window_edge(f, (seq + 1) & M32)
    flow.set_seq_to_guest(f, isn)
    flow.set_seq_acked(f, isn)
    flow.set_seq_max(f, isn)
    flow.set_window(f, mem.be16(l4 + 14))
    _options(w, f, l4, header)
    fd = spare.take(w, target)
    if fd < 0:
        lifecycle.forget(w, f, index)
        return NO_SOCKET
    flow.set_fd(f, fd)
    size = sockets.put_sockaddr(w, target, port)
    result = libc.connect(fd, context.sockaddr(w), size)
    if result < 0 and result != -sockets.EINPROGRESS:
        tcp_rx.reset_both(w, f, index)
        return 0
    if sockets.watch(w, f, index) < 0:
        tcp_rx.drop_host(w, f, index)
        return NO_SOCKET
    return 0


@jit
def connected(w, f, index, events):
    """connect() has ended: SYN,ACK, when the flow is settled, or RST to the guest."""
    failed = events & (sockets.EPOLLERR | sockets.EPOLLHUP)
    if failed and sockets.error_of(w, flow.fd(f)) != 0:
        tcp_rx.reset_both(w, f, index)
        return
    sockets.learn_room(w, f)
    flow.set_seq_to_guest(f, (flow.isn_to_guest(f) + 1) & M32)
    flow.set_seq_max(f, flow.seq_to_guest(f))
    lifecycle.put(f, SYN_DUE)
    lifecycle.set_state(w, f, OPEN)


@jit
def _end_former(w, key):
    """The kernel has given us a new connection between the ends of an old one: that is over, and
    the event that says so has not been looked at yet. 1 when it was ours to end."""
    index = table.find(context.table(w), key)
    if index < 0:
        return 0
    f = table.at(context.table(w), index)
    if flow.heir(f) or flow.home(f) != context.id(w):
        return 0
    tcp_rx.reset_both(w, f, index)
    return 1


@jit
def accepted(w, entry, fd, source_port):
    """A connection from the host: a new flow, and SYN to the guest when it is settled. 0, or -1 -
    reason."""
    key = context.key(w)
    mem.put_u16(key + table.KEY_GUEST_PORT, listener.guest_port(entry))
    mem.put_u16(key + table.KEY_FAR_PORT, source_port)
    mem.put_u32(key + table.KEY_PROTOCOL, lifecycle.TCP)
    pair = lifecycle.first_pair(w)
    index = lifecycle.open_flow(w, key, pair, SYN_SENT)
    if index == lifecycle.TAKEN and _end_former(w, key):
        index = lifecycle.open_flow(w, key, pair, SYN_SENT)
    if index < 0:
        return TABLE_FULL if index == table.FULL else TABLE_BUSY
    f = table.at(context.table(w), index)
    isn = first_sequence(w, key)
    flow.set_isn_to_guest(f, isn)
    flow.set_seq_to_guest(f, (isn + 1) & M32)
    flow.set_seq_max(f, (isn + 1) & M32)
    flow.set_seq_acked(f, isn)
    flow.set_mss(f, MSS_DEFAULT)
    lifecycle.put(f, SCALED | SACK | ACCEPTED | SYN_DUE)
    flow.set_fd(f, fd)
    sockets.learn_room(w, f)
    sockets.tcp_options(w, fd)
    if sockets.watch(w, f, index) < 0:
        flow.set_fd(f, -1)  # the caller closes it
        lifecycle.forget(w, f, index)
        return NO_SOCKET
    lifecycle.touch(w, f, index)
    return 0


@jit
def _answered(w, f, index, l4, header, flags):
    """The guest's answer to our SYN."""
    if flags & ACK and mem.be32(l4 + 8) != flow.seq_to_guest(f):
        if flags & RST == 0:
            _reset_unknown(w, l4, 0, flags)
        return STALE
    if flags & RST:
        if flags & ACK:
            tcp_rx.drop_host(w, f, index)
        return 0
    if flags & (SYN | ACK) != SYN | ACK:
        return STALE
    lifecycle.clear(f, SCALED | SACK)
    _options(w, f, l4, header)
    flow.set_isn_from_guest(f, mem.be32(l4 + 4))
    flow.set_seq_from_guest(f, (mem.be32(l4 + 4) + 1) & M32)
    flow.set_window_edge(f, flow.seq_from_guest(f))
    flow.set_seq_acked(f, flow.seq_to_guest(f))
    flow.set_window(f, mem.be16(l4 + 14))
    flow.set_retries(f, 0)
    lifecycle.put(f, ACK_DUE | SYN_ACKED)
    lifecycle.set_state(w, f, OPEN)
    lifecycle.touch(w, f, index)
    return 0


@jit
def _segment(w, f, index, l4, payload, flags):
    """A segment of a synchronised connection (RFC 9293 3.10.7.4)."""
    tcp_gather.make_room(w, index, context.chain_count(w))  # may find that the socket is full
    seq = mem.be32(l4 + 4)
    expected = (flow.seq_from_guest(f) + tcp_gather.waiting(w, index)) & M32
    ahead = distance(seq, expected)
    lifecycle.touch(w, f, index)
    if flags & RST:
        if 0 <= ahead <= max(distance(flow.window_edge(f), expected), 0):
            tcp_gather.flush(w, index)
            tcp_rx.drop_host(w, f, index)
            return 0
        return STALE
    if flags & SYN:  # our SYN,ACK was lost, or a challenge is due
        if seq == (flow.seq_from_guest(f) - 1) & M32 and not lifecycle.has(f, SYN_ACKED):
            lifecycle.put(f, SYN_DUE)
        lifecycle.put(f, ACK_DUE)
        return 0
    if flags & ACK == 0:
        return STALE
    if not _acknowledge(w, f, mem.be32(l4 + 8), mem.be16(l4 + 14), payload, flags, ahead):
        lifecycle.put(f, ACK_DUE)
        return STALE
    if payload == 0 and flags & FIN == 0:
        if ahead != 0:
            lifecycle.put(f, ACK_DUE)  # keepalive, window probe or an old segment
        return 0
    return _payload(w, f, index, l4, payload, flags, ahead)


@jit
def _acknowledge(w, f, ack, window, payload, flags, ahead):
    """The acknowledgement and window of a segment; 0 when it acknowledges what was never sent."""
    advance = distance(ack, flow.seq_acked(f))
    if advance > distance(flow.seq_max(f), flow.seq_acked(f)):
        return 0
    if advance < 0:
        return 1  # an old segment
    scaled = window << flow.guest_scale(f)
    if advance > 0:
        _advance(f, ack, advance)
    elif payload == 0 and flags & FIN == 0 and scaled == flow.window(f) and ahead == 0:
        if flow.seq_max(f) != flow.seq_acked(f):
            flow.set_dup_acks(f, min(flow.dup_acks(f) + 1, 255))
            if flow.dup_acks(f) == 3:
                tcp_rx.rewind(w, f)
    flow.set_window(f, scaled)
    return 1


@jit
def _advance(f, ack, advance):
    """The guest has taken `advance` more bytes (our SYN and FIN count as one each)."""
    data = advance
    if lifecycle.has(f, FIN_MADE) and ack == flow.seq_max(f):
        lifecycle.put(f, FIN_ACKED | FIN_SENT)
        lifecycle.clear(f, READABLE)
        data -= 1
    if not lifecycle.has(f, SYN_ACKED):
        lifecycle.put(f, SYN_ACKED)
        data -= 1
    flow.set_undiscarded(f, flow.undiscarded(f) + data)
    flow.set_rx_bytes(f, flow.rx_bytes(f) + data)
    flow.set_seq_acked(f, ack)
    if distance(ack, flow.seq_to_guest(f)) > 0:
        flow.set_seq_to_guest(f, ack)
    flow.set_retries(f, 0)
    flow.set_dup_acks(f, 0)
    flow.set_deadline_ms(f, 0)


@jit
def _payload(w, f, index, l4, payload, flags, ahead):
    """Data or FIN of an acceptable segment."""
    overlap, fin = max(-ahead, 0), 1 if flags & FIN else 0
    if lifecycle.has(f, GUEST_FIN) or overlap >= payload + fin:
        lifecycle.put(f, ACK_DUE)  # all of it is old: the acknowledgement was lost (3.10.7.4)
        return 0
    skip, size = context.l4(w) + (mem.u8(l4 + 12) >> 4) * 4 + overlap, payload - overlap
    if lifecycle.has(f, DEAD):
        return tcp_gather.REFUSED
    if ahead > 0 or tcp_held.waits(w, f):
        return _hold(w, f, index, (mem.be32(l4 + 4) + overlap) & M32, skip, size, fin)
    if size > 0:
        tcp_gather.add(w, index, skip, size)
    if fin:
        tcp_gather.finish(w, index)
    elif flow.held(f):
        tcp_gather.follow(w, f, index)
    return 0


@jit
def _hold(w, f, index, seq, skip, size, fin):
    """A segment that comes too soon."""
    tcp_gather.flush(w, index)  # what is told below shall be the latest
    kept = tcp_held.keep(
        w, f, index, seq, context.chain_iov(w), context.chain_count(w), skip, size, fin
    )
    if tcp_held.waits(w, f):
        lifecycle.put(f, ACK_DUE)  # nothing is missing, the socket is full
    else:
        tcp_segment.send_ack(w, f)  # at once: it tells of the gap (RFC 5681 4.2)
    return 0 if kept else GAP


# --- events of the socket -------------------------------------------------------------------------


@jit
def on_event(w, f, index, events):
    """Edges of the flow's socket."""
    if flow.state(f) == CONNECTING:
        if events & (sockets.EPOLLOUT | sockets.EPOLLERR | sockets.EPOLLHUP) == 0:
            return
        connected(w, f, index, events)
        if flow.state(f) != OPEN:
            return  # else the same edge may tell of data and hang-up, and no other will
    if events & sockets.EPOLLPRI:
        lifecycle.put(f, URGENT)
    if events & sockets.EPOLLERR and sockets.error_of(w, flow.fd(f)) != 0:
        lifecycle.put(f, DEAD)
    if events & (sockets.EPOLLRDHUP | sockets.EPOLLHUP):
        lifecycle.put(f, HOST_HUP)
    if events & (sockets.EPOLLIN | sockets.EPOLLRDHUP | sockets.EPOLLHUP):
        lifecycle.put(f, READABLE)
        flow.set_last_far_ms(f, context.now_ms(w))
    if events & sockets.EPOLLOUT and lifecycle.has(f, WRITE_BLOCKED):
        _writable(w, f, index)
    lifecycle.touch(w, f, index)


@jit
def _writable(w, f, index):
    """There is room in the send buffer again."""
    sockets.learn_room(w, f)
    lifecycle.clear(f, WRITE_BLOCKED)
    lifecycle.put(f, ACK_DUE)
    if tcp_held.waits(w, f):
        tcp_gather.follow(w, f, index)
