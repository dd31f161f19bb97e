"""rehome.py - a flow moves to another worker: its socket, its registration, its timer.

Theory      Everything about a flow but its descriptor lies in the shared table. Its home decides
            (flows/steer.py) when it has just taken what crossed, and when it has settled the flow:
              give    1  the flow leaves the home's lists, timers and epoll; flow.heir says who is
                         next: from here on its home leaves it alone
                      2  the descriptor goes to the heir's inbox (SCM_RIGHTS) and is closed
              adopt   3  the heir registers it, is home, and settles it at the end of its breath
            An inbox is a datagram socket: one message is one flow. It wakes the heir, which also
            looks there at once when it has a frame of such a flow at hand. A message is taken out
            when the flow has been adopted: if the heir dies first, its successor finds it. If the
            home dies between 1 and 2, its successor does the rest (part).
From guest  A frame that another worker put into the hand-off ring to the former home before it saw
            step 1 is sent on from there, in the ring to the heir. A flow moves when the ring from
            its heir is empty, or after CROWDED_MS at all events: so hardly any frame takes that way
            round; what does comes late, as in any network. Empty is what the ring is just after
            this worker has looked; at the end of a breath other flows' frames are there again
            (a busy stream waited 20 to 100 ms for a chance).
To guest    What the former home has put into the hand-off ring to the heir comes before what the
            heir sends itself: until the ring has been consumed up to flow.former_head, the heir
            leaves data in the socket (behind), and the flow stays.
Refusals    An inbox without room: the flow stays, and tries again after SETTLED_MS. A descriptor
            that the heir may not have (RLIMIT_NOFILE): the connection ends with RST.
Limits      MOVES_MAX adopted at a time.
Ownership   The home until step 1, nobody in between, the heir from step 3 on. A message in the
            inbox of a worker that has died is there for its successor.
"""

from __future__ import annotations

from dataplane import handoff, lifecycle, sockets
from dataplane.context import context
from dataplane.lifecycle import AGAIN, CLOSING, DAMPED, DEAD, FREE, OPEN, READABLE, TCP, UDP
from flows import expiry, steer, table
from shm import libc, mem, ring
from shm.access import flow, worker
from shm.access import handoff as cursors
from shm.jit import jit
from shm.schema import HANDOFF

MOVES_MAX = 64
CROWDED_MS = 100
MESSAGE_BYTES = 16  # flow index, generation
_TAIL = HANDOFF.fields["tail"].offset


# --- giving ---------------------------------------------------------------------------------------


@jit
def consider(w, f, index):
    """Move the flow if it should and can; 1: it is the heir's."""
    me, now_ms = context.id(w), context.now_ms(w)
    heir = steer.heir_of(context.instance(w), f, me, now_ms)
    if heir == steer.STAYS:
        lifecycle.clear(f, DAMPED)
        return 0
    if not _movable(f) or behind(w, f) or worker.parting(context.me(w)):
        return 0
    if heir == steer.DAMPED:
        _damped(w, f)
        return 0
    crowded = ring.first(handoff.between(w, heir, me, handoff.TX)) != 0
    if crowded and steer.since(now_ms, flow.away_ms(f)) < CROWDED_MS:
        return 0
    return _give(w, f, index, heir)


@jit
def _damped(w, f):
    """The flow stays: counted once for each time that the guest went elsewhere."""
    if not lifecycle.has(f, DAMPED):
        lifecycle.put(f, DAMPED)
        worker.set_moves_damped(context.me(w), worker.moves_damped(context.me(w)) + 1)


@jit
def _movable(f):
    """1 when all there is of the flow lies in the table and in its socket."""
    if flow.protocol(f) != TCP:
        return 1
    if lifecycle.has(f, DEAD) or flow.held(f):
        return 0
    return 1 if flow.state(f) == OPEN or flow.state(f) == CLOSING else 0


@jit
def _give(w, f, index, heir):
    """1, or 0: the heir has no room, all is as before."""
    me, fd, deadline_ms = context.id(w), flow.fd(f), flow.deadline_ms(f)
    lifecycle.leave(w, f)
    expiry.cancel(context.wheel(w), index)
    sockets.unwatch(w, fd)
    flow.set_former(f, me + 1)
    flow.set_former_head(f, cursors.head(handoff.between(w, me, heir, handoff.RX)))
    lifecycle.count(w, f, -1)
    mem.fence()  # all of it is there when the heir is named
    worker.set_parting_fd(context.me(w), fd)
    worker.set_parting(context.me(w), index + 1)
    flow.set_heir(f, heir + 1)
    if _send(w, f, index, heir, fd) >= 0:
        worker.set_parting(context.me(w), 0)  # first: then the number may be another socket's
        libc.close(fd)
        return 1
    flow.set_heir(f, 0)
    worker.set_parting(context.me(w), 0)
    flow.set_former(f, 0)
    steer.tried(f, context.now_ms(w))
    lifecycle.count(w, f, 1)
    if deadline_ms:
        expiry.arm(context.wheel(w), index, deadline_ms)
    if watched(w, f, index):
        lifecycle.put(f, AGAIN)  # its edges were not looked for meanwhile
        context.set_busy(w, 1)
    return 0


@jit
def _send(w, f, index, heir, fd):
    """A flow's socket into the inbox of its heir; -errno."""
    at = context.option(w)
    mem.put_u64(at, index)
    mem.put_u64(at + 8, flow.generation(f))
    mem.put_u64(at + 16, at)
    mem.put_u64(at + 24, MESSAGE_BYTES)
    return sockets.pass_on(w, mem.u64(context.inboxes(w) + 8 * heir), fd, at + 16)


@jit
def part(w):
    """Finish what a worker that died in this place had begun: whether the socket was sent nobody
    knows, so it is sent again, or that it is gone. Who has the flow does not look at the message.
    An inbox without room is tried again, for the flow is nobody's until then."""
    me = context.me(w)
    index, fd = worker.parting(me) - 1, worker.parting_fd(me)
    if index < 0:
        return
    f = table.at(context.table(w), index)
    heir = flow.heir(f)
    if heir and flow.home(f) == context.id(w) and _send(w, f, index, heir - 1, fd) < 0:
        context.set_handoff_held(w, 1)
        return
    worker.set_parting(me, 0)  # first: then the number may be another socket's
    if fd >= 0:
        libc.close(fd)


# --- adopting -------------------------------------------------------------------------------------


@jit
def adopt(w):
    """Take all flows that wait in the inbox."""
    for _ in range(MOVES_MAX):
        at = context.option(w)
        mem.put_u64(at + 16, at)
        mem.put_u64(at + 24, MESSAGE_BYTES)
        fd = sockets.look_into(w, context.inbox_fd(w), at + 16)
        if fd == sockets.NOTHING:
            return
        _adopt(w, mem.u64(at), mem.u64(at + 8), fd)
        sockets.take_out(w, context.inbox_fd(w))  # last: this worker may die before it has adopted
    context.set_inbox(w, 1)
    context.set_busy(w, 1)


@jit
def _adopt(w, index, generation, fd):
    me, now_ms = context.id(w), context.now_ms(w)
    f = table.at(context.table(w), index)
    if flow.heir(f) != me + 1 or flow.generation(f) != generation or flow.state(f) == FREE:
        if fd >= 0:
            libc.close(fd)  # adopted before, or ended
        return
    flow.set_fd(f, fd)
    lifecycle.count(w, f, 1)
    steer.arrived(f, now_ms)
    flow.set_home(f, me)
    mem.fence()  # whoever sees no heir sees the new home
    flow.set_heir(f, 0)
    worker.set_rehomed_flows(context.me(w), worker.rehomed_flows(context.me(w)) + 1)
    if flow.deadline_ms(f):
        expiry.arm(context.wheel(w), index, flow.deadline_ms(f))
    lifecycle.clear(f, DAMPED)
    if flow.protocol(f) == UDP and fd >= 0:
        sockets.join_trains(w, f)  # features may have changed on the way
    if watched(w, f, index):
        lifecycle.touch(w, f, index)


@jit
def watched(w, f, index):
    """Register the flow's socket; 0 when there is nothing left of the flow, 1: it is to be settled,
    and if only to be reset."""
    if flow.fd(f) < 0 or sockets.watch(w, f, index) < 0:
        if flow.protocol(f) != TCP:
            lifecycle.forget(w, f, index)
            return 0
        lifecycle.put(f, DEAD)
    lifecycle.put(f, READABLE)
    return 1


# --- frames ---------------------------------------------------------------------------------------


@jit
def fetch(w, f):
    """Look into the inbox when the flow is on its way here; 1: it may have ended by that."""
    if flow.heir(f) != context.id(w) + 1:
        return 0
    adopt(w)
    return 1


@jit
def owner(w, f):
    """The worker that a frame from the guest goes to. A flow that is on its way here and has not
    come: its home sends the frame on."""
    other = steer.owner_of(f)
    return flow.home(f) if other == context.id(w) and flow.heir(f) else other


@jit
def behind(w, f):
    """1 while frames of the flow's former home are still on their way to the guest."""
    former = flow.former(f)
    if former == 0:
        return 0
    h = handoff.between(w, former - 1, context.id(w), handoff.RX)
    if 0 < (flow.former_head(f) - mem.acquire_u64(h + _TAIL)) & steer.M32 < 1 << 31:
        return 1
    flow.set_former(f, 0)
    return 0
