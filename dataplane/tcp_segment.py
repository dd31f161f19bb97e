"""tcp_segment.py - TCP segments to the guest that carry no payload: SYN, ACK, RST; and the window
they announce.

Theory      A segment is built in context.out from the flow's numbers and placed at once; nothing
            is kept of it, so sending it again is building it again.
Window      What the guest may send is bounded by what the socket's send buffer takes (3/4 of
            SO_MEMINFO's room: a buffer costs the kernel more than its payload), so that nothing
            taken from the ring is refused. The right edge never moves back (RFC 9293 3.8.6).
Limits      Options: MSS, window scale and SACK permitted in SYN, SACK (tcp_held.py) in
            acknowledgements. Scale OUR_SCALE: a window of 16 MiB.
Ownership   Only flows whose home is this worker.
Drops       None: a segment that finds no receive buffer is due when there is one (SYN_DUE, ACK_DUE;
            tcp_rx.settle); a RST is lost.
"""

from __future__ import annotations

from dataplane import checksum, lifecycle, rx, tcp_held, wire
from dataplane.context import VNET_BYTES, context
from dataplane.lifecycle import ACK_DUE, SACK, SCALED, SYN_ACKED, SYN_DUE, SYN_SENT
from dataplane.wire import ACK, IPPROTO_TCP, M32, RST, SYN, TCP_BYTES, distance
from flows import steer
from shm import mem
from shm.access import flow, net, worker
from shm.jit import jit

OUR_SCALE = 8
MSS_MAX = 8192


@jit
def build(w, v6, guest, far, guest_port, far_port, seq, ack, flags, window, l4_header, payload):
    """A TCP segment's headers in context.out; options, if any, are filled in afterwards. Their
    total length."""
    out = context.out(w)
    l4 = wire.headers(w, out, v6, IPPROTO_TCP, far, guest, l4_header + payload)
    mem.put_be16(l4, far_port)
    mem.put_be16(l4 + 2, guest_port)
    mem.put_be32(l4 + 4, seq)
    mem.put_be32(l4 + 8, ack if flags & ACK else 0)
    mem.put_be16(l4 + 12, (l4_header << 10) | flags)
    mem.put_be16(l4 + 14, window)
    mem.put_be32(l4 + 16, 0)
    return l4 + l4_header - out


@jit
def close_header(w, v6, guest, far, l4_header):
    """Complete checksum of a segment without payload."""
    l4 = context.out(w) + VNET_BYTES + wire.ETHER_BYTES + wire.l3_bytes(v6)
    total = wire.pseudo_sum(v6, IPPROTO_TCP, far, guest, l4_header)
    wire.put_sum(l4 + 16, total + checksum.partial(l4, l4_header))


@jit
def announced_mss(w, v6):
    """The MSS we tell the guest. With TSO it does not limit the size of frames, only what the guest
    waits for: Linux sends nothing into a window smaller than one MSS, and at an MTU of 64 KiB that
    is more than a young socket's whole send buffer. So it is kept small."""
    header = wire.l3_bytes(v6) + TCP_BYTES
    return min(net.mtu(context.net(w)) - header, MSS_MAX)


@jit
def worthwhile(w, f):
    """The smallest window worth announcing: one segment, or a quarter of a small send buffer (RFC
    9293 3.8.6.2.2). The kernel tells of room when a third is free: what is then taken for nothing
    would be told again and again."""
    return min(announced_mss(w, wire.is_v6(flow.far_addr(f))), flow.sndbuf(f) >> 2)


@jit
def as_seen(f, window):
    """A window as the guest sees it: the scale takes its low bits. One that is less than a segment
    then lets the guest send nothing."""
    return window >> flow.our_scale(f) << flow.our_scale(f)


@jit
def advertise(w, f):
    """The window field for the guest now, as it stands in the header; moves the right edge forward
    only."""
    expected, scale = flow.seq_from_guest(f), flow.our_scale(f)
    room = min(as_seen(f, flow.sndbuf_free(f) * 3 // 4), 0xFFFF << scale)
    if tcp_held.waits(w, f) or room < worthwhile(w, f):
        room = 0
    edge = flow.window_edge(f)
    if distance((expected + room) & M32, edge) > 0:
        edge = (expected + room) & M32
        flow.set_window_edge(f, edge)
    return min(max(distance(edge, expected), 0) >> scale, 0xFFFF)


@jit
def queue_of(w, f):
    """The pair whose receive queue takes the flow's next segment, or -1."""
    in_flight = lifecycle.has(f, SYN_ACKED) and flow.seq_to_guest(f) != flow.seq_acked(f)
    i = context.instance(w)
    return steer.stream_queue_of(i, f, context.id(w), in_flight, context.now_ms(w))


@jit
def send_empty(w, f, flags, seq, window):
    """A segment without payload to the guest. 1 sent, 0 no receive buffer now."""
    far, guest = flow.far_addr(f), flow.guest_addr(f)
    v6 = wire.is_v6(far)
    options = context.out(w) + VNET_BYTES + wire.ETHER_BYTES + wire.l3_bytes(v6) + TCP_BYTES
    l4_header = TCP_BYTES
    if flags & SYN:
        l4_header += _put_syn_options(w, f, options, v6)
    elif flags == ACK and lifecycle.has(f, SACK):
        l4_header += tcp_held.put_sack(w, f, options)
    size = build(
        w, v6, guest, far, flow.guest_port(f), flow.far_port(f), seq, flow.seq_from_guest(f),
        flags, window, l4_header, 0,
    )  # fmt: skip
    close_header(w, v6, guest, far, l4_header)
    placed = rx.place(w, queue_of(w, f), context.out(w), size, 0, 0)
    return 1 if placed > 0 else 0


@jit
def _put_syn_options(w, f, at, v6):
    """MSS and, when both sides do, window scale and SACK (RFC 7323 2.2, RFC 2018 2); their
    bytes."""
    mem.put_be32(at, 0x02040000 | announced_mss(w, v6))
    mem.put_be32(at + 4, 0x01030300 | OUR_SCALE if lifecycle.has(f, SCALED) else 0x01010101)
    mem.put_be32(at + 8, 0x01010402 if lifecycle.has(f, SACK) else 0x01010101)
    return 12


@jit
def send_ack(w, f):
    """An acknowledgement with the current window. 1 sent, 0 no receive buffer now."""
    if not send_empty(w, f, ACK, flow.seq_to_guest(f), advertise(w, f)):
        return 0
    lifecycle.clear(f, ACK_DUE)
    return 1


@jit
def send_syn(w, f):
    """SYN (a connection from the host) or SYN,ACK (one the guest asked for). The window is not
    scaled here. 1 sent, 0 no receive buffer now."""
    flags = SYN if flow.state(f) == SYN_SENT else SYN | ACK
    window = min(max(flow.sndbuf_free(f) * 3 // 4, worthwhile(w, f)), 0xFFFF)
    if flags & ACK:  # for SYN alone the edge is set when the guest has named its first byte
        flow.set_window_edge(f, (flow.seq_from_guest(f) + window) & M32)
    if not send_empty(w, f, flags, flow.seq_acked(f), window):
        return 0
    lifecycle.clear(f, SYN_DUE)
    return 1


@jit
def reset_guest(w, f):
    """RST to the guest, in its window (RFC 9293 3.10.7.4)."""
    send_empty(w, f, RST | ACK, flow.seq_to_guest(f), 0)
    worker.set_resets(context.me(w), worker.resets(context.me(w)) + 1)
