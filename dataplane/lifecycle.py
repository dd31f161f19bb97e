"""lifecycle.py - what all flows have in common: made, touched, timed, blocked, forgotten.

Theory      open_flow() claims an entry for a key; set_state() moves it and keeps the gauges right;
            touch() puts it on the list of flows that the end of the breath settles; block() parks
            it until a receive ring has buffers; forget() closes its socket and gives the entry
            back.
Lines       Flows that wait for buffers of one ring stand in line. When there are some the first is
            settled, then the next, until there are none left; who runs out goes to the end, and so
            does who comes meanwhile. Before, the latest came first and whoever had not run out went
            on beside the line: of 32 streams some got nothing for a second and a half. Whoever is
            wanted on another ring when it is looked at leaves the line.
Ownership   Only flows whose home is this worker. Gauges are this worker's own words.
Limits      None of its own: every list has room for every flow.
"""

from __future__ import annotations

from dataplane import tcp_held
from dataplane.context import DIRTY_MAX, LINE_WAITS, NOBODY, context, ring
from flows import expiry, steer, table
from shm import libc, mem
from shm.access import flow, net, worker
from shm.jit import jit
from shm.schema import STATES

FREE, CONNECTING, SYN_SENT, OPEN, CLOSING, ONEWAY, STREAM = range(len(STATES))
TCP, UDP, ICMP = range(3)

TAKEN = -3

# flow.line, when it is not 0
ELSE = 1  # for something else than buffers: block() with no ring
FIRST_RING = 2  # and the following: for buffers of the receive ring of pair 0, 1, ...

# flow.flags
ACK_DUE = 1  # tcp: the guest must get an acknowledgement
READABLE = 2  # the socket may hold something for the guest
HOST_HUP = 4  # tcp: the other end has finished sending
FIN_SENT = 8  # tcp: FIN sent to the guest, it has the sequence number seq_max - 1
FIN_ACKED = 16  # tcp: the guest acknowledged it
GUEST_FIN = 32  # tcp: the guest has finished sending; the socket is shut down for writing
DIRTY = 128  # in the list of flows to settle in this breath
WRITE_BLOCKED = 256  # tcp: the socket's send buffer is full, an edge will tell
SACK = 512  # tcp: the guest understands selective acknowledgements
DEAD = 1024  # tcp: to be reset when settled
SCALED = 2048  # tcp: both sides use window scaling
SYN_ACKED = 4096  # tcp: the guest has acknowledged our SYN
FIN_MADE = 16384  # tcp: FIN was sent at least once: it is the byte before seq_max
NO_SEGMENT = 512  # udp: the kernel cannot cut trains for this socket
URGENT = 32768  # tcp: there was urgent data: a short read does not mean a drained socket
RTT_KNOWN = 65536  # tcp: how far the other end is has been looked at (far_peer.py)
AGAIN = 8192  # tcp: the budget of this breath ended before the data did
DAMPED = 131072  # it would have moved since the guest went to another pair (rehome.py)
ACCEPTED = 262144  # tcp: the connection was opened by the other end
FAR_SAID = 524288  # datagrams: the other end has sent one
GUEST_SAID = 1048576  # datagrams: the guest has sent one
SYN_DUE = 2097152  # tcp: the guest must get SYN or SYN,ACK, unless it has acknowledged one
SERVED = 4194304  # something went to the guest when it was settled last


@jit
def has(f, flag):
    """1 when any of these flags is set."""
    return 1 if flow.flags(f) & flag else 0


@jit
def put(f, flag):
    """Set flags."""
    flow.set_flags(f, flow.flags(f) | flag)


@jit
def clear(f, flag):
    """Clear flags."""
    flow.set_flags(f, flow.flags(f) & ~flag)


@jit
def _gauge(w, f):
    return worker.flows(context.me(w)) + 8 * (flow.protocol(f) * 8 + flow.state(f))


@jit
def count(w, f, change):
    """Move the gauge of the flow's state."""
    mem.add_u64(_gauge(w, f), change)


@jit
def set_state(w, f, state):
    """Move a flow to another state; the gauges follow."""
    if flow.state(f) != FREE:
        count(w, f, -1)
    flow.set_state(f, state)
    if state != FREE:
        count(w, f, 1)


@jit
def open_flow(w, key, pair, state):
    """Claim a flow for `key`; its index, table.FULL or table.BUSY, or TAKEN when the key has one
    already, here or at another worker."""
    index = table.claim(context.table(w), key, context.id(w), pair)
    if index < 0:
        return index
    f = table.at(context.table(w), index)
    if flow.home(f) != context.id(w) or flow.state(f) != FREE:
        return TAKEN
    flow.set_born_ms(f, context.now_ms(w))
    flow.set_last_guest_ms(f, context.now_ms(w))
    flow.set_last_far_ms(f, context.now_ms(w))
    set_state(w, f, state)
    mem.add_u64(worker.opened(context.me(w)) + 8 * flow.protocol(f), 1)
    return index


@jit
def first_pair(w):
    """The pair on which a flow that the other end begins is told to the guest: enabled ones in
    turn. Without any (the guest has just gone) it is tried again when the flow's timer ends."""
    pair = max(steer.any_pair(context.instance(w), context.id(w), context.round_robin(w)), 0)
    context.set_round_robin(w, (pair + 1) & 31)
    return pair


@jit
def touch(w, f, index):
    """Settle this flow at the end of the breath."""
    count = context.dirty_count(w)
    if has(f, DIRTY) or count >= DIRTY_MAX:
        return
    put(f, DIRTY)
    mem.put_u32(context.dirty(w) + 4 * count, index)
    context.set_dirty_count(w, count + 1)


@jit
def set_deadline(w, f, index, deadline_ms):
    """Look at the flow again at `deadline_ms`."""
    flow.set_deadline_ms(f, deadline_ms)
    expiry.arm_by(context.wheel(w), index, deadline_ms)


@jit
def said(w, f, index, who):
    """A datagram of this side (FAR_SAID, GUEST_SAID), the first one or not."""
    put(f, who)
    if flow.state(f) == ONEWAY and has(f, FAR_SAID) and has(f, GUEST_SAID):
        set_state(w, f, STREAM)
    forget_later(w, f, index)


@jit
def forget_later(w, f, index):
    """Forget a datagram flow when it has been silent for its timeout."""
    n = context.net(w)
    wait_s = net.udp_stream_s(n) if flow.state(f) == STREAM else net.udp_oneway_s(n)
    set_deadline(w, f, index, context.now_ms(w) + 1000 * wait_s)


@jit
def _number(w, r):
    """Ring `r` as flow.line names it; ELSE when r is 0."""
    return FIRST_RING + (r - context.rings(w)) // (2 * ring.SIZE) if r else ELSE


@jit
def _line(w, number):
    """The first and the last of the flows in a line."""
    if number == ELSE:
        return context.line(w)
    return ring.line(context.rings(w) + 2 * (number - FIRST_RING) * ring.SIZE)


@jit
def _stand_in_line(w, f, index, r):
    number = _number(w, r)
    if flow.line(f) == number:
        return
    leave(w, f, index)
    flow.set_line(f, number)
    line = _line(w, number)
    if mem.u32(line) == NOBODY:
        mem.put_u32(line, index)
    else:
        flow.set_line_next(table.at(context.table(w), mem.u32(line + 4)), index)
    mem.put_u32(line + 4, index)
    flow.set_line_next(f, -1)


@jit
def block(w, f, index, r):
    """Park a flow until ring `r`, which has none for it, has buffers; r 0: until a hand-off ring
    has room, or until the set of enabled receive queues changes."""
    _stand_in_line(w, f, index, r)
    if r:
        ring.set_starved(r, ring.starved(r) | LINE_WAITS)


@jit
def somebody_waits(r):
    """1 when flows stand in line for buffers of ring `r`."""
    return 1 if mem.u32(ring.line(r)) != NOBODY else 0


@jit
def must_wait(w, f, index, r):
    """1 when the flow stands in line for ring `r`, or now does because others do; r 0: for room
    in a hand-off ring. Who stands in another line has gone elsewhere since, and leaves that."""
    if flow.line(f) == _number(w, r):
        return 1
    leave(w, f, index)
    if r == 0 or ring.starved(r) == 0 or not somebody_waits(r):
        return 0
    _stand_in_line(w, f, index, r)
    return 1


@jit
def next_waiting(w, r):
    """Take who has waited longest for buffers of ring `r` out of the line."""
    index = mem.u32(ring.line(r))
    f = table.at(context.table(w), index)
    mem.put_u32(ring.line(r), flow.line_next(f) & NOBODY)
    flow.set_line(f, 0)
    return index


@jit
def unblock(w, r):
    """Wake all flows that wait for ring `r` (0: for something else). Who had something when it last
    tried comes behind those who had nothing."""
    line = _line(w, _number(w, r))
    first = mem.u32(line)
    mem.put_u32(line, NOBODY)
    for served in range(2):
        index = first
        for _ in range(DIRTY_MAX):
            if index == NOBODY:
                break
            f = table.at(context.table(w), index)
            if has(f, SERVED) == served:
                flow.set_line(f, 0)
                touch(w, f, index)
            index = flow.line_next(f) & NOBODY


@jit
def leave(w, f, index):
    """Take the flow out of the line it stands in, if any."""
    if flow.line(f) == 0:
        return
    line = _line(w, flow.line(f))
    flow.set_line(f, 0)
    before, at = -1, mem.u32(line)
    for _ in range(DIRTY_MAX):  # a line has each flow once
        if at == index:
            break
        if at == NOBODY:
            return
        before, at = at, flow.line_next(table.at(context.table(w), at)) & NOBODY
    following = flow.line_next(f) & NOBODY
    if before < 0:
        mem.put_u32(line, following)
        return
    flow.set_line_next(table.at(context.table(w), before), flow.line_next(f))
    if following == NOBODY:
        mem.put_u32(line + 4, before)


@jit
def forget(w, f, index):
    """Close the socket and give the entry back."""
    leave(w, f, index)
    fd = flow.fd(f)
    if fd >= 0:
        flow.set_fd(f, -1)  # first: the number may be another socket's as soon as it is closed
        libc.close(fd)
    tcp_held.release(w, f)
    expiry.cancel(context.wheel(w), index)
    set_state(w, f, FREE)
    table.release(context.table(w), index)
