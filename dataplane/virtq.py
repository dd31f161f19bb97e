"""virtq.py - virtqueues, the device side: what both formats do, and the one place that tells them
apart.

Theory      ready() says whether a chain waits; walk() turns it into iovec entries; put_used()
            returns it; publish() makes what was returned visible and decides whether the driver
            wants a notification. A chain takes slots of its ring: one in a split ring
            (virtq_split.py), one per descriptor in a packed one (virtq_packed.py). Taking is only
            a cursor: `last_avail` moves when the caller says so, so buffers that turn out not to be
            needed are simply not taken. `ahead` names a chain by the slots in front of it.
Why so      Used chains are shown and the driver is notified once per burst, not per chain (a call
            is a system call here and an interrupt there). While a ring is being worked on, the
            driver is told not to kick; when it is empty, it is asked to, and the ring is looked at
            once more after a full barrier (virtio 1.3, 2.7.10, 2.8.10): else the last kick is lost.
Order       Chains are returned in the order in which they were taken (VIRTIO_F_IN_ORDER).
Limits      Those of the two formats.
Ownership   One worker serves a ring.
Drops       Those of the two formats.
"""

from __future__ import annotations

from dataplane import virtq_packed, virtq_split
from dataplane.context import context, ring
from flows import steer
from shm import libc, mem
from shm.access import queue
from shm.jit import inlined, jit


@inlined
def ready(r, ahead):
    """1 when a chain waits `ahead` slots on, else 0; BAD_AVAIL when the ring cannot be right."""
    if ring.packed(r):
        return virtq_packed.ready(r, ahead)
    return virtq_split.ready(r, ahead)


@inlined
def walk(w, r, ahead, iov, room, writable):
    """The buffers of the chain `ahead` slots on, which ready() has seen, as entries of iov: their
    number, or -1 - reason. Sets chain_id and chain_slots for put_used(), unless it is BAD_AVAIL.

    `writable` 1: an rx chain, all its buffers must be device-writable; 0: a tx chain, none may be.
    """
    if ring.packed(r):
        return virtq_packed.chain(w, r, ahead, iov, room, writable)
    return virtq_split.chain(w, r, ahead, iov, room, writable)


@inlined
def _advance(r, cursor, slots):
    if ring.packed(r):
        return virtq_packed.advance(r, cursor, slots)
    return virtq_split.advance(r, cursor, slots)


@inlined
def take(r, slots):
    """The chains in the next `slots` slots are ours now."""
    ring.set_last_avail(r, _advance(r, ring.last_avail(r), slots))


@inlined
def put_used(r, chain_id, length, slots):
    """Return a chain with `length` bytes written; visible after publish(). With IN_ORDER, `slots`
    may cover chains before it, of which nothing is said (2.7.9, 2.8.8)."""
    if ring.packed(r):
        virtq_packed.put_used(r, chain_id, length, slots)
    else:
        virtq_split.put_used(r, chain_id, length, slots)


@jit
def _wants_call(r, old, new):
    if ring.packed(r):
        return virtq_packed.wants_call(r, old, new)
    return virtq_split.wants_call(r, old, new)


@jit
def publish(r, scratch):
    """Make returned chains visible and notify the driver if it wants; `scratch` holds 8 bytes."""
    old, new = ring.published(r), ring.used_idx(r)
    if old == new:
        return
    if ring.packed(r):
        virtq_packed.show(r)
    else:
        virtq_split.show(r)
    ring.set_published(r, new)
    mem.fence()  # what was shown must be visible before the driver's wish is read
    counters = ring.counters(r)
    if ring.call_fd(r) < 0 or not _wants_call(r, old, new):
        queue.set_calls_suppressed(counters, queue.calls_suppressed(counters) + 1)
        return
    mem.put_u64(scratch, 1)
    libc.write(ring.call_fd(r), scratch, 8)  # non-blocking: a full one already has a call pending
    queue.set_calls(counters, queue.calls(counters) + 1)


@jit
def suppress_kicks(r):
    """Tell the driver that we are looking anyway."""
    if ring.suppressed(r) == 0:
        ring.set_suppressed(r, 1)
        if ring.packed(r):
            virtq_packed.suppress_kicks(r)
        else:
            virtq_split.suppress_kicks(r)


@jit
def _known(r):
    """The cursor up to which there is nothing new: chains that were looked at and did not suffice
    (`short_at`) are not a reason to look again."""
    return ring.short_at(r) - 1 if ring.short_at(r) else ring.last_avail(r)


@inlined
def has_news(r):
    """1 when the driver has made chains available since the ring was last found empty or short."""
    if ring.packed(r):
        return virtq_packed.is_available(r, _known(r))
    return virtq_split.is_beyond(r, _known(r))


@jit
def ask_for_kick(r):
    """Ask to be kicked for the next chain; 1 when one came meanwhile (then no kick may come)."""
    ring.set_suppressed(r, 0)
    if ring.packed(r):
        virtq_packed.want_kick(r, _known(r))
    else:
        virtq_split.want_kick(r, _known(r))
    mem.fence()
    return has_news(r)


@jit
def fell_short(r):
    """All chains there are do not suffice: from now on only further ones are news."""
    end = virtq_packed.end(r) if ring.packed(r) else virtq_split.end(r)
    ring.set_short_at(r, end + 1)


@jit
def is_full(r):
    """1 when the driver has no more chains to make available: all slots hold one."""
    return virtq_packed.is_full(r) if ring.packed(r) else virtq_split.is_full(r)


@jit
def base(r):
    """Where the ring stands, as vhost-user has it (VRING_BASE): packed, also the used cursor."""
    if ring.packed(r):
        return ring.last_avail(r) | (ring.used_idx(r) << 16)
    return ring.last_avail(r)


@jit
def fail(r, scratch):
    """The ring is broken: stop it and signal its error descriptor. Other rings go on."""
    ring.set_running(r, 0)
    counters = ring.counters(r)
    queue.set_errors(counters, queue.errors(counters) + 1)
    if ring.err_fd(r) >= 0:
        mem.put_u64(scratch, 1)
        libc.write(ring.err_fd(r), scratch, 8)


@jit
def drop(r, reason):
    """Count a dropped frame; `reason` as returned by walk and the parsers: -1 - index in DROPS."""
    mem.add_u64(queue.drops(ring.counters(r)) + 8 * (-1 - reason), 1)


@jit
def drop_late(w, reason):
    """Count a frame from the guest that is dropped after its chain was taken: on the tx ring at
    hand, or, where another worker took it, on one of ours."""
    pair = context.pair(w)
    if context.crossed(w):
        pair = steer.pair_of(context.instance(w), context.id(w))
    drop(context.rings(w) + (2 * pair + 1) * ring.SIZE, reason)
