"""tcp_gather.py - payload from the guest, gathered by flow: one sendmsg for each flow of a burst.

Theory      In-order payload of a burst is strung together where it lies, in guest memory, a gather
            for each flow, which remembers its number (flow.gather): finding it costs nothing. They
            are given out in turn; flush_all() sends what is left at the end of the burst, before
            the chains go back to the guest, or earlier when all were given out. What the socket
            took is acknowledged, the rest is held (tcp_held.py) or the guest's to send again.
Why so      Guests with several streams interleave them: gathering only neighbours made a system
            call of each 64 KiB segment, and each woke the receiver anew (8 streams at MTU 65520:
            17 500 sendmsg per GB, of 57 KB).
Limits      GATHERS_MAX flows at a time, GATHER_IOV_MAX pieces each. Payload of one flow stays in
            order; that of different flows need not.
Ownership   Only flows whose home is this worker. Nothing stays gathered beyond a burst.
Drops       tcp_window: counted when what the socket refused cannot be held.
"""

from __future__ import annotations

from dataplane import iov, lifecycle, sockets, tcp_held, virtq
from dataplane.context import GATHER_IOV_MAX, GATHERS_MAX, IOV_BYTES, context
from dataplane.context import gather as lane
from dataplane.lifecycle import ACK_DUE, CLOSING, DEAD, GUEST_FIN, WRITE_BLOCKED
from dataplane.wire import M32
from flows import table
from shm import libc
from shm.access import flow
from shm.jit import jit
from shm.schema import DROP

REFUSED = -1 - DROP["tcp_window"]


@jit
def _of(w, index):
    """The gather a flow has open, or 0."""
    f = table.at(context.table(w), index)
    g = context.gathers(w) + flow.gather(f) * lane.SIZE
    return g if lane.flow(g) == index + 1 else 0


@jit
def _open(w, index):
    """The flow's gather, a new and empty one unless it has one open."""
    g = _of(w, index)
    if g:
        return g
    if context.gathers_count(w) == GATHERS_MAX:
        flush_all(w)
    number = context.gathers_count(w)
    context.set_gathers_count(w, number + 1)
    flow.set_gather(table.at(context.table(w), index), number)
    g = context.gathers(w) + number * lane.SIZE
    lane.set_flow(g, index + 1)
    return g


@jit
def waiting(w, index):
    """Bytes of the flow that are gathered and not yet sent."""
    g = _of(w, index)
    return lane.bytes(g) if g else 0


@jit
def make_room(w, index, pieces):
    """Send what is gathered of the flow when `pieces` more would not fit."""
    g = _of(w, index)
    if g and lane.count(g) + pieces > GATHER_IOV_MAX:
        _send(w, g)


@jit
def add(w, index, skip, size):
    """Add `size` payload bytes, `skip` bytes into the chain at hand; make_room() was called."""
    g = _open(w, index)
    count = iov.append_slice(
        lane.iov(g), lane.count(g), context.chain_iov(w), context.chain_count(w), skip, size
    )
    lane.set_count(g, count)
    lane.set_bytes(g, lane.bytes(g) + size)


@jit
def finish(w, index):
    """The guest's FIN follows what is gathered: send both."""
    g = _open(w, index)
    lane.set_fin(g, 1)
    _send(w, g)


@jit
def follow(w, f, index):
    """Send what is gathered, and what was held and is due then: payload, FIN."""
    make_room(w, index, 2)
    g = _open(w, index)
    if flow.held(f):  # else what was sent to make room has passed all of it
        expected = (flow.seq_from_guest(f) + lane.bytes(g)) & M32
        size = tcp_held.take(w, f, expected, lane.iov(g) + lane.count(g) * IOV_BYTES)
        if size > 0:
            lane.set_count(g, lane.count(g) + 2)
            lane.set_bytes(g, lane.bytes(g) + size)
        if tcp_held.ends_at(w, f, (expected + size) & M32):
            lane.set_fin(g, 1)
    _send(w, g)


@jit
def flush(w, index):
    """Send what is gathered of one flow."""
    g = _of(w, index)
    if g:
        _send(w, g)


@jit
def flush_all(w):
    """Send everything: the chains go back to the guest afterwards."""
    for number in range(context.gathers_count(w)):
        g = context.gathers(w) + number * lane.SIZE
        if lane.flow(g):
            _send(w, g)
    context.set_gathers_count(w, 0)


@jit
def _send(w, g):
    """One sendmsg; the gather is empty afterwards. What the socket does not take is held, and not
    acknowledged."""
    index, wanted, fin, count = lane.flow(g) - 1, lane.bytes(g), lane.fin(g), lane.count(g)
    lane.set_flow(g, 0)
    lane.set_bytes(g, 0)
    lane.set_fin(g, 0)
    lane.set_count(g, 0)
    f, done = table.at(context.table(w), index), 0
    if wanted > 0:
        message = sockets.put_msghdr(w, lane.iov(g), count)
        done = libc.sendmsg(flow.fd(f), message, sockets.MSG_DONTWAIT | sockets.MSG_NOSIGNAL)
    if done < 0 and done != -sockets.EAGAIN:
        lifecycle.put(f, DEAD)
        lifecycle.touch(w, f, index)
        return
    done = max(done, 0)
    flow.set_seq_from_guest(f, (flow.seq_from_guest(f) + done) & M32)
    flow.set_tx_bytes(f, flow.tx_bytes(f) + done)
    flow.set_sndbuf_free(f, max(flow.sndbuf_free(f) - done - (done >> 2), 0))
    lifecycle.put(f, ACK_DUE)
    if done < wanted:
        lifecycle.put(f, WRITE_BLOCKED)
        seq, left = flow.seq_from_guest(f), wanted - done
        if not tcp_held.keep(w, f, index, seq, lane.iov(g), count, done, left, fin):
            virtq.drop_late(w, REFUSED)
    elif fin:
        flow.set_seq_from_guest(f, (flow.seq_from_guest(f) + 1) & M32)
        libc.shutdown(flow.fd(f), sockets.SHUT_WR)
        lifecycle.put(f, GUEST_FIN)
        lifecycle.set_state(w, f, CLOSING)
    tcp_held.tidy(w, f)
