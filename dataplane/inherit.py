"""inherit.py - what a worker that died had in hand, taken over by the one in its place.

Theory      Descriptors outlive a worker (keeper.py), and so does the table. What a flow's entry
            says may be a moment old: the worker died between a system call and the store that notes
            what it did. So nothing of it is believed that the kernel knows better:
              sent      how much of the guest's stream the socket has taken, whether it was shut
                        down: TCP_INFO and SIOCOUTQ say, seq_from_guest follows
              consumed  how much of the other end's stream was discarded: TCP_INFO and SIOCINQ;
                        with seq_acked, one word that is written once the guest has acknowledged,
                        that gives what is still to be discarded
            Why not a sequence number in each entry: it would tell that a store is missing, at the
            cost of two more for every change, and not what the kernel has done meanwhile.
            (flow.version has that for an entry as a whole: one that is being filled is CLAIMED,
            found by nobody, and given back, flows/table.py.)
            What the guest has not acknowledged is sent again. Payload that was held for its socket
            is lost with the worker; the guest was never told that it may forget it.
Order       Flows first, rings then: chains that were taken and not returned are processed again,
            and their segments are old where the socket has them already.
Refusals    An entry that contradicts its socket is reset, that flow alone. One that was being made
            (no socket yet, or one that is not connecting) is given back; the guest's packet that
            began it comes again.
Limits      Datagrams of the chains that are processed again may be sent twice.
Ownership   The new worker, before its first breath: its rings are not there yet, so flows wait
            until control says that they are (revive). One that is woken before stands in line for
            a ring to come; so do frames that were handed over for it (rx.not_usable).
Source      tcp_info: Linux, include/uapi/linux/tcp.h; tcpi_bytes_acked counts the SYN of the end
            that connected and the FIN, tcpi_bytes_received the other's FIN.
"""

from __future__ import annotations

from dataplane import lifecycle, rehome, sockets
from dataplane.context import context
from dataplane.lifecycle import (
    ACCEPTED,
    ACK_DUE,
    AGAIN,
    CLOSING,
    CONNECTING,
    DAMPED,
    DEAD,
    DIRTY,
    FIN_ACKED,
    FIN_MADE,
    FIN_SENT,
    FREE,
    GUEST_FIN,
    READABLE,
    SYN_ACKED,
    SYN_DUE,
    SYN_SENT,
    TCP,
    WRITE_BLOCKED,
)
from dataplane.wire import M32, distance
from flows import expiry, table
from shm import libc, mem
from shm.access import flow, net, worker
from shm.jit import jit
from shm.schema import FLOWS_MAX

SIOCINQ, SIOCOUTQ = 0x541B, 0x5411
INFO_BYTES, INFO_ACKED, INFO_RECEIVED = 192, 120, 128  # struct tcp_info, two u64 of it
TCP_FIN_WAIT1, TCP_FIN_WAIT2, TCP_TIME_WAIT, TCP_CLOSE = 4, 5, 6, 7
TCP_CLOSE_WAIT, TCP_LAST_ACK, TCP_CLOSING = 8, 9, 11
SENT_FIN = 1 << TCP_FIN_WAIT1 | 1 << TCP_FIN_WAIT2 | 1 << TCP_LAST_ACK
GOT_FIN = 1 << TCP_CLOSE_WAIT | 1 << TCP_LAST_ACK
ENDED = 1 << TCP_CLOSING | 1 << TCP_TIME_WAIT | 1 << TCP_CLOSE  # both
LOOKS_MAX = 64
STRAYS_MAX = 1 << 30


@jit
def flows(w):
    """Take over every flow whose home is this worker; how many."""
    t, me = context.table(w), context.me(w)
    for index in range(FLOWS_MAX):
        tag = mem.acquire_u32(table.table.tags(t) + 4 * index)
        if tag == 0 or tag >= table.CLAIMED:
            continue
        f = table.at(t, index)
        if flow.heir(f) == 0 and flow.home(f) == context.id(w):  # its heir clears heir last
            _inherit(w, f, index)
            worker.set_inherited_flows(me, worker.inherited_flows(me) + 1)
    return 0


@jit
def _inherit(w, f, index):
    """One flow: what was private to the worker that died is void, the rest is looked at."""
    lifecycle.clear(f, DIRTY | AGAIN | DAMPED | WRITE_BLOCKED)
    flow.set_line(f, 0)
    flow.set_held(f, 0)
    if flow.state(f) == FREE:
        table.release(context.table(w), index)
        return
    lifecycle.count(w, f, 1)
    begun = flow.fd(f) >= 0
    if begun and flow.state(f) == CONNECTING:
        begun = _look(w, f) != TCP_CLOSE  # else connect() was not called, or has just failed
    if not begun:
        lifecycle.forget(w, f, index)
        return
    if flow.state(f) == SYN_SENT:
        lifecycle.put(f, SYN_DUE)  # it may not have been sent
    elif flow.protocol(f) == TCP and flow.state(f) != CONNECTING:
        _compare(w, f)
    if flow.former(f) == context.id(w) + 1:
        flow.set_former(f, 0)  # it was about to be given away
    if flow.deadline_ms(f):
        expiry.arm(context.wheel(w), index, flow.deadline_ms(f))
    elif flow.protocol(f) != TCP:
        lifecycle.forget_later(w, f, index)  # its first datagram was on its way
    if rehome.watched(w, f, index):
        lifecycle.block(w, f, index, lifecycle.ELSE)


@jit
def _look(w, f):
    """struct tcp_info in scratch; the kernel's state of the connection, or -errno."""
    at = context.control(w)
    mem.put_u32(at + INFO_BYTES, INFO_BYTES)
    result = libc.getsockopt(flow.fd(f), sockets.IPPROTO_TCP, sockets.TCP_INFO, at, at + INFO_BYTES)
    return mem.u8(at) if result >= 0 else result


@jit
def _queued(w, f, request):
    """Bytes in the socket's receive (SIOCINQ) or send queue (SIOCOUTQ)."""
    at = context.control(w) + INFO_BYTES
    mem.put_u32(at, 0)
    libc.ioctl(flow.fd(f), request, at)
    return mem.u32(at)


@jit
def _compare(w, f):
    """Bring an entry to what its socket says; one that contradicts it is to be reset."""
    at = context.control(w)
    for _ in range(LOOKS_MAX):  # until nothing has happened between two looks
        state = _look(w, f)
        acked, received = mem.u64(at + INFO_ACKED), mem.u64(at + INFO_RECEIVED)
        outq, inq = _queued(w, f, SIOCOUTQ), _queued(w, f, SIOCINQ)
        again = _look(w, f)
        if (
            state == again
            and mem.u64(at + INFO_ACKED) == acked
            and mem.u64(at + INFO_RECEIVED) == received
        ):
            break
    else:
        lifecycle.put(f, DEAD)  # never seen so far; what does not fit together is not believed
        return
    ends = 1 << max(state, 0)
    if state < 0 or not _sent(w, f, acked + outq, ends) or not _consumed(w, f, received, inq, ends):
        lifecycle.put(f, DEAD)


@jit
def _sent(w, f, total, ends):
    """seq_from_guest from what the socket has taken; 0 when that cannot be."""
    fin = 1 if ends & (SENT_FIN | ENDED) else 0
    syn = 0 if lifecycle.has(f, ACCEPTED) else 1
    payload = total - syn - fin
    seq = (flow.isn_from_guest(f) + 1 + payload + fin) & M32
    ahead = distance(seq, flow.seq_from_guest(f))
    if not -1 <= ahead < STRAYS_MAX:  # -1: a FIN that was noted before it was sent
        return 0
    flow.set_seq_from_guest(f, seq)
    flow.set_tx_bytes(f, payload)
    if distance(flow.window_edge(f), seq) < 0:
        flow.set_window_edge(f, seq)
    lifecycle.clear(f, GUEST_FIN)
    if fin:
        lifecycle.put(f, GUEST_FIN)
    if fin or lifecycle.has(f, FIN_MADE):
        lifecycle.set_state(w, f, CLOSING)
    lifecycle.put(f, ACK_DUE)
    return 1


@jit
def _consumed(w, f, received, inq, ends):
    """What is still to be discarded, and go back to what the guest has acknowledged; 0 when that
    cannot be."""
    first = (flow.isn_to_guest(f) + 1) & M32
    if flow.seq_acked(f) != (first - 1) & M32:
        lifecycle.put(f, SYN_ACKED)
    else:
        lifecycle.clear(f, SYN_ACKED)
        lifecycle.put(f, SYN_DUE)  # it may not have been sent
        flow.set_seq_to_guest(f, first)
        flow.set_seq_max(f, first)
        flow.set_undiscarded(f, 0)
        lifecycle.clear(f, ACK_DUE)  # which says nothing to who waits for SYN,ACK
        return 1
    fin_acked = 1 if lifecycle.has(f, FIN_MADE) and flow.seq_acked(f) == flow.seq_max(f) else 0
    fin = 1 if ends & (GOT_FIN | ENDED) else 0
    left = distance(flow.seq_acked(f), (first + received - fin - inq + fin_acked) & M32)
    if not 0 <= left <= inq:
        return 0
    flow.set_undiscarded(f, left)
    flow.set_seq_to_guest(f, flow.seq_acked(f))
    if net.peek_offset(context.net(w)):
        sockets.set_int(w, flow.fd(f), sockets.SOL_SOCKET, sockets.SO_PEEK_OFF, left)
    lifecycle.clear(f, FIN_ACKED | FIN_SENT)
    if fin_acked:
        lifecycle.put(f, FIN_ACKED | FIN_SENT)
    lifecycle.put(f, READABLE)
    return 1
