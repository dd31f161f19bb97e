"""handoff.py - frames from one worker to another: the way across while a flow and its queue have
different workers.

Theory      Two rings per ordered pair of workers (shm/ring.py): tx frames (from the guest, for the
            flow's home) and rx frames (for a receive queue of the other worker). A record is the
            whole frame with its virtio-net header; its meta word is the queue pair. Rings keep
            order, so a flow's frames never overtake each other. A worker that sleeps says so in
            worker.sleeping; a producer that sees it writes to its eventfd: once where a burst of
            frames ends (given() notes whom it owes that, wake() pays), or sooner when WAKE_BYTES
            are waiting. Nothing is owed when a breath ends.
Why so      Queues are served by exactly one process and never locked; what must cross is copied
            once. tx and rx have rings of their own: acknowledgements never wait behind data for a
            full receive queue. A sleeper takes longer to wake than a burst to cross: asking it with
            each frame was a system call for each.
Limits      HANDOFF_BYTES a ring. Who finds no room asks to be woken when there is (worker.stalled).
            rx: data stays in its socket. tx: the frame stays in its queue, and what lies behind it;
            when the other worker has made no room for PATIENCE_MS it is dropped (handoff_full), and
            further ones at once, until one fits: a queue does not stand still for a worker that
            does. What another worker has handed over never waits, so no two wait for each other.
            Dropped at once, as it was before, 3 % of the frames of eight streams that hop ten times
            a second were lost, retransmissions among them: streams stood still for 200 to 600 ms,
            until their guest's timer.
Ownership   shm/ring.py. Copies are counted (handoff_frames, handoff_bytes). A worker that dies
            owing a wake-up leaves that to its successor (worker.py).
"""

from __future__ import annotations

from dataplane.context import FRAME_WAITS, IOV_BYTES, context
from dataplane.context import ring as virtqueue
from shm import libc, mem, ring
from shm.access import worker
from shm.jit import jit
from shm.schema import DROP, HANDOFF_BYTES, HANDOFF_STRIDE

TX, RX = 0, 1
WAKE_BYTES = HANDOFF_BYTES // 8  # a consumer that begins later might leave a burst without room
PATIENCE_MS = 200
FULL = -1 - DROP["handoff_full"]


@jit
def between(w, source, target, direction):
    """The ring for one direction from worker `source` to worker `target`."""
    number = (source * context.workers(w) + target) * 2 + direction
    return context.handoffs(w) + number * HANDOFF_STRIDE


@jit
def _signal(w, other):
    scratch = context.option(w)
    mem.put_u64(scratch, 1)
    libc.write(mem.u64(context.wake_fds(w) + 8 * other), scratch, 8)


@jit
def wake(w):
    """A burst has ended: wake those of the workers it went to that sleep."""
    owed = context.wakes(w)
    if owed == 0:
        return
    context.set_wakes(w, 0)
    context.set_wake_bytes(w, 0)
    mem.fence()  # what was published must be visible before `sleeping` is read
    for other in range(context.workers(w)):
        if (owed >> other) & 1 and worker.sleeping(context.workers_at(w) + other * worker.SIZE):
            _signal(w, other)


@jit
def given(w, other, size):
    """A frame of `size` bytes was published for worker `other`: wake() is owed."""
    me = context.me(w)
    worker.set_handoff_frames(me, worker.handoff_frames(me) + 1)
    worker.set_handoff_bytes(me, worker.handoff_bytes(me) + size)
    context.set_wakes(w, context.wakes(w) | (1 << other))
    context.set_wake_bytes(w, context.wake_bytes(w) + size)
    if context.wake_bytes(w) >= WAKE_BYTES:
        wake(w)


@jit
def reserve(w, h, size):
    """Room for a record, or 0: then the ring's consumer has been asked to wake this worker when
    there is."""
    record = ring.reserve(h, size)
    if record == 0:
        worker.set_stalled(context.me(w), 1)
        mem.fence()  # either the consumer sees `stalled`, or we see the room it made before
        record = ring.reserve(h, size)
    return record


@jit
def room_made(w, other):
    """Tell a stalled worker of room, asleep or not: it may be about to fall asleep."""
    _signal(w, other)


@jit
def _is_patient(w, other):
    """1 unless worker `other` has made no room for PATIENCE_MS."""
    since = context.full_since_ms(w) + 8 * other
    if mem.u64(since) == 0:
        mem.put_u64(since, context.now_ms(w))
    return 1 if context.now_ms(w) - mem.u64(since) < PATIENCE_MS else 0


@jit
def send_chain(w, other, pair, iov, pieces, size):
    """Copy a tx frame of `size` bytes to worker `other`; 1, 0 (no room now), or FULL."""
    h = between(w, context.id(w), other, TX)
    target = reserve(w, h, size)
    if target == 0:
        return 0 if _is_patient(w, other) else FULL
    mem.put_u64(context.full_since_ms(w) + 8 * other, 0)
    at = target
    for index in range(pieces):
        length = mem.u64(iov + index * IOV_BYTES + 8)
        mem.copy(at, mem.u64(iov + index * IOV_BYTES), length)
        at += length
    ring.commit(h, target, size, pair)
    given(w, other, size)
    return 1


@jit
def send_frame(w, other, pair, out, header_bytes, payload, payload_bytes):
    """Copy an rx frame (headers, then payload) to worker `other`; 1, or 0 when there is no room."""
    h = between(w, context.id(w), other, RX)
    target = reserve(w, h, header_bytes + payload_bytes)
    if target == 0:
        return 0
    mem.copy(target, out, header_bytes)
    mem.copy(target + header_bytes, payload, payload_bytes)
    ring.commit(h, target, header_bytes + payload_bytes, pair)
    given(w, other, header_bytes + payload_bytes)
    return 1


@jit
def waiting(w):
    """1 when some other worker has left a frame for this one."""
    me = context.id(w)
    for other in range(context.workers(w)):
        if other != me:
            if ring.first(between(w, other, me, TX)):
                return 1
            record = ring.first(between(w, other, me, RX))
            if record:
                r = context.rings(w) + 2 * ring.meta(record) * virtqueue.SIZE
                if virtqueue.starved(r) & FRAME_WAITS == 0:  # else the guest's kick will wake us
                    return 1
    return 0
