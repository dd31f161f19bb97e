"""virtq.py - split virtqueues, the device side (virtio 1.3 section 2.7).

Theory      available() says how many chains wait; head_at() names one; walk() turns a chain into
            iovec entries; put_used() returns one; publish() makes the returned ones visible and
            decides whether the driver wants a notification. Taking is only a cursor: `last_avail`
            moves when the caller says so, so buffers that turn out not to be needed are simply not
            taken.
Why so      The used index is published and the driver notified once per burst, not per chain
            (snapshots of both costs: a call is a system call here and an interrupt there).
            While a ring is being worked on, the driver is told not to kick; when it is empty, it is
            asked to, and the ring is looked at once more after a full barrier (2.7.10): else the
            last kick is lost.
Limits      A chain has at most `num` descriptors, indirect ones included (2.7.5.3.1); an indirect
            table lies in one memory region.
Ownership   One worker serves a ring. The driver's words are read once each, by atomic loads.
Drops       chain_loop, bad_index, bad_address, bad_indirect, bad_direction; bad_avail stops the
            ring.
"""

from __future__ import annotations

from dataplane import guest
from dataplane.context import context, ring
from shm import libc, mem
from shm.access import queue
from shm.jit import jit
from shm.schema import DROP

DESC_BYTES = 16
F_NEXT, F_WRITE, F_INDIRECT = 1, 2, 4
AVAIL_F_NO_INTERRUPT = 1
USED_F_NO_NOTIFY = 1

CHAIN_LOOP = -1 - DROP["chain_loop"]
BAD_INDEX = -1 - DROP["bad_index"]
BAD_ADDRESS = -1 - DROP["bad_address"]
BAD_INDIRECT = -1 - DROP["bad_indirect"]
BAD_DIRECTION = -1 - DROP["bad_direction"]
BAD_AVAIL = -1 - DROP["bad_avail"]


@jit
def available(r):
    """Chains the driver has made available and we have not taken; BAD_AVAIL when that is
    impossible."""
    waiting = (mem.acquire_u16(ring.avail(r) + 2) - ring.last_avail(r)) & 0xFFFF
    if waiting > ring.num(r):
        return BAD_AVAIL
    return waiting


@jit
def head_at(r, offset):
    """Head index of the chain `offset` places after the next one."""
    at = (ring.last_avail(r) + offset) & (ring.num(r) - 1)
    return mem.u16(ring.avail(r) + 4 + 2 * at)


@jit
def take(r, count):
    """The next `count` chains are ours now."""
    ring.set_last_avail(r, (ring.last_avail(r) + count) & 0xFFFF)


@jit
def walk(w, r, head, iov, room, writable):
    """Append the buffers of chain `head` to iov; the number of entries, or -1 - reason.

    `writable` 1: an rx chain, all its buffers must be device-writable; 0: a tx chain, none may be.
    """
    table, size, index, count, nested = ring.desc(r), ring.num(r), head, 0, 0
    for _ in range(ring.num(r) + 1):
        if index >= size:
            return BAD_INDEX
        at = table + index * DESC_BYTES
        address, length = mem.u64(at), mem.u32(at + 8)
        flags, following = mem.u16(at + 12), mem.u16(at + 14)
        if flags & F_INDIRECT:
            if nested or flags & F_NEXT or length == 0 or length % DESC_BYTES:
                return BAD_INDIRECT
            table = guest.contiguous(w, address, length)
            if table == 0:
                return BAD_ADDRESS
            size, index, nested = min(length // DESC_BYTES, 0x10000), 0, 1
            continue
        if (flags & F_WRITE != 0) != (writable != 0):
            return BAD_DIRECTION
        if length > 0:
            count = guest.translate(w, address, length, iov, count, room)
            if count < 0:
                return count
        if flags & F_NEXT == 0:
            return count
        index = following
    return CHAIN_LOOP


@jit
def put_used(r, head, length):
    """Return a chain with `length` bytes written; visible after publish()."""
    at = ring.used_idx(r)
    entry = ring.used(r) + 4 + 8 * (at & (ring.num(r) - 1))
    mem.put_u32(entry, head)
    mem.put_u32(entry + 4, length)
    ring.set_used_idx(r, (at + 1) & 0xFFFF)


@jit
def _wants_call(r, old, new):
    """Whether the driver asked to hear of used entries old..new (2.7.7.2)."""
    mem.fence()  # the used index must be visible before the driver's wish is read
    if ring.event_idx(r):
        event = mem.u16(ring.avail(r) + 4 + 2 * ring.num(r))
        return (new - event - 1) & 0xFFFF < (new - old) & 0xFFFF
    return mem.u16(ring.avail(r)) & AVAIL_F_NO_INTERRUPT == 0


@jit
def publish(r, scratch):
    """Make returned chains visible and notify the driver if it wants; `scratch` holds 8 bytes."""
    old, new = ring.published(r), ring.used_idx(r)
    if old == new:
        return
    mem.release_u16(ring.used(r) + 2, new)
    ring.set_published(r, new)
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
        if ring.event_idx(r) == 0:
            mem.put_u16(ring.used(r), USED_F_NO_NOTIFY)
        # With EVENT_IDX avail_event stays where it is, behind the driver: no kick until we move it.


@jit
def _known(r):
    """The available index up to which there is nothing new: chains that were looked at and did not
    suffice (`short_at`) are not a reason to look again."""
    return (ring.short_at(r) - 1) & 0xFFFF if ring.short_at(r) else ring.last_avail(r)


@jit
def has_news(r):
    """1 when the driver has made chains available since the ring was last found empty or short."""
    return 1 if mem.acquire_u16(ring.avail(r) + 2) != _known(r) else 0


@jit
def ask_for_kick(r):
    """Ask to be kicked for the next chain; 1 when one came meanwhile (then no kick may come)."""
    ring.set_suppressed(r, 0)
    known = _known(r)
    if ring.event_idx(r):
        mem.put_u16(ring.used(r) + 4 + 8 * ring.num(r), known)
    else:
        mem.put_u16(ring.used(r), 0)
    mem.fence()
    return has_news(r)


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
    pair = context.id(w) if context.crossed(w) else context.pair(w)
    drop(context.rings(w) + (2 * pair + 1) * ring.SIZE, reason)
