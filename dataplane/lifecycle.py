"""lifecycle.py - what all flows have in common: made, touched, timed, blocked, forgotten.

Theory      open_flow() claims an entry for a key; set_state() moves it and keeps the gauges right;
            touch() puts it on the list of flows that the end of the breath settles; block() parks
            it until a receive ring has buffers; forget() closes its socket and gives the entry
            back.
Lines       Flows that wait for buffers of one ring stand in line. When there are some the first is
            settled, then the next, until there are none left; who runs out goes to the end, and so
            does who comes meanwhile. Before, the latest came first and whoever had not run out went
            on beside the line: of 32 streams some got nothing for a second and a half. Those that
            wait for room in a hand-off ring have a line for each worker, all woken by any room.
            Whoever is wanted elsewhere when it is looked at leaves its line, which takes the same
            time wherever it stands: a guest may have all its flows in one, and end them.
Ownership   Only flows whose home is this worker. Gauges are this worker's own words.
Limits      None of its own: every list has room for every flow.
"""

from __future__ import annotations

from dataplane import tcp_held
from dataplane.context import DIRTY_MAX, LINE_BYTES, LINE_WAITS, NOBODY, context, ring
from flows import expiry, steer, table
from shm import libc, mem
from shm.access import flow, net, worker
from shm.jit import jit
from shm.schema import STATES, WORKERS_MAX

FREE, CONNECTING, SYN_SENT, OPEN, CLOSING, ONEWAY, STREAM = range(len(STATES))
TCP, UDP, ICMP = range(3)

TAKEN = -3
NO_ROOM = -1  # in a receive ring, or in the hand-off ring to its worker: the flow is to be parked

# flow.line, when it is not 0
ELSE = 1  # for a queue to be enabled, or for what its former home has sent
FIRST_WORKER = 2  # and the following: for room in the hand-off ring to worker 0, 1, ...
FIRST_RING = FIRST_WORKER + WORKERS_MAX  # for buffers of the receive ring of pair 0, 1, ...

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
def line_to(w, pair):
    """The line in which a flow waits that has no way to the receive queue of a pair (-1: none)."""
    if pair < 0:
        return ELSE
    other = steer.worker_of(context.instance(w), pair)
    return FIRST_RING + pair if other == context.id(w) else FIRST_WORKER + other


@jit
def _line(w, number):
    """The first and the last of the flows in a line."""
    return context.lines(w) + LINE_BYTES * number


@jit
def _join(w, number, before, following):
    """Two flows become neighbours in a line; NOBODY: the other is its first, or its last."""
    if before == NOBODY:
        mem.put_u32(_line(w, number), following)
    else:
        flow.set_line_next(table.at(context.table(w), before), following)
    if following == NOBODY:
        mem.put_u32(_line(w, number) + 4, before)
    else:
        flow.set_line_before(table.at(context.table(w), following), before)


@jit
def _stand_in_line(w, f, index, number):
    if flow.line(f) == number:
        return
    leave(w, f)
    flow.set_line(f, number)
    last = mem.u32(_line(w, number) + 4)
    _join(w, number, last, index)
    _join(w, number, index, NOBODY)


@jit
def block(w, f, index, number):
    """Park a flow in a line: until there are buffers, or room in a hand-off ring, or until the set
    of enabled receive queues changes. A ring without buffers is told that it has a line."""
    _stand_in_line(w, f, index, number)
    if number >= FIRST_RING:
        r = _ring(w, number)
        ring.set_starved(r, ring.starved(r) | LINE_WAITS)


@jit
def _ring(w, number):
    return context.rings(w) + 2 * (number - FIRST_RING) * ring.SIZE


@jit
def somebody_waits(w, number):
    """1 when flows stand in this line."""
    return 1 if mem.u32(_line(w, number)) != NOBODY else 0


@jit
def must_wait(w, f, index, number):
    """1 when the flow stands in this line, or now does because others wait for a ring's buffers.
    Who stands in another line has gone elsewhere since, and leaves that."""
    if flow.line(f) == number:
        return 1
    leave(w, f)
    if number < FIRST_RING or ring.starved(_ring(w, number)) == 0 or not somebody_waits(w, number):
        return 0
    _stand_in_line(w, f, index, number)
    return 1


@jit
def next_waiting(w, number):
    """Take who has waited longest out of a line in which somebody waits."""
    index = mem.u32(_line(w, number))
    leave(w, table.at(context.table(w), index))
    return index


@jit
def unblock(w, number):
    """Wake all flows in a line. Who had something when it last tried comes behind those who had
    nothing."""
    first = mem.u32(_line(w, number))
    _join(w, number, NOBODY, NOBODY)
    for served in range(2):
        index = first
        for _ in range(DIRTY_MAX):
            if index == NOBODY:
                break
            f = table.at(context.table(w), index)
            if has(f, SERVED) == served:
                flow.set_line(f, 0)
                touch(w, f, index)
            index = flow.line_next(f)


@jit
def room_made(w):
    """Some worker may have made room in its hand-off ring: wake all who wait for that."""
    unblock(w, ELSE)
    for other in range(context.workers(w)):
        unblock(w, FIRST_WORKER + other)


@jit
def leave(w, f):
    """Take the flow out of the line it stands in, if any."""
    if flow.line(f):
        _join(w, flow.line(f), flow.line_before(f), flow.line_next(f))
        flow.set_line(f, 0)


@jit
def forget(w, f, index):
    """Close the socket and give the entry back."""
    leave(w, f)
    fd = flow.fd(f)
    if fd >= 0:
        flow.set_fd(f, -1)  # first: the number may be another socket's as soon as it is closed
        libc.close(fd)
    tcp_held.release(w, f)
    expiry.cancel(context.wheel(w), index)
    set_state(w, f, FREE)
    table.release(context.table(w), index)
