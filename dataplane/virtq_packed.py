"""virtq_packed.py - packed virtqueues, the device side (virtio 1.3, 2.8). Called through virtq.py.

Theory      One ring of descriptors, written by both sides. A descriptor is available when its
            AVAIL flag is the wrap counter of the lap and its USED flag is not, and used when both
            are. A chain is as many descriptors (slots) in a row as have NEXT set; the last one has
            the buffer id, which is all the driver wants back: in the slot where the chain began,
            while the slots behind it are skipped.
Cursors     A slot in bits 0-14, the wrap counter in bit 15, as in event suppression and on the
            wire of vhost-user. They advance by slots; `ahead` counts slots from last_avail.
Halves      Length, id and flags are the second half of a descriptor: one load, one store.
Returning   Chains return in the order in which they were taken, so that a used descriptor never
            lands on one that has not been read. put_used() only notes them (used_log): show()
            writes them, the first one last, and the driver, which looks at its slots one after the
            other, sees all or none of a burst. A frame that spans buffers needs that.
Resuming    There is no used index in memory. queue.used_cursor holds it for the worker's successor;
            while show() writes, queue.used_next differs from it, and the successor finishes.
Limits      used_log has room for a chain in each slot: ready() sees none beyond a lap from what was
            shown. `num` need not be a power of two. Wrap counter and slot of a base:
            control/device.py.
Ownership   The driver's words are read once each, by atomic loads; its event suppression area is
            `avail`, ours is `used`.
Drops       chain_loop (an indirect table longer than the queue) and those of descriptor.py;
            bad_avail stops the ring: a chain that fills the ring and has no end has no id.
"""

from __future__ import annotations

from dataplane import descriptor
from dataplane.context import ring
from dataplane.descriptor import (
    BAD_AVAIL,
    CHAIN_LOOP,
    DESC_BYTES,
    F_INDIRECT,
    F_NEXT,
    F_WRITE,
)
from shm import mem
from shm.access import queue
from shm.jit import inlined, jit

F_AVAIL, F_USED = 1 << 7, 1 << 15
WRAP, SLOT = 0x8000, 0x7FFF
EVENT_ENABLE, EVENT_DISABLE, EVENT_DESC = 0, 1, 2
LOG_BYTES = 8


@inlined
def advance(r, cursor, slots):
    """The cursor `slots` further on, at most one lap."""
    slot, wrap = (cursor & SLOT) + slots, cursor & WRAP
    if slot >= ring.num(r):
        return (slot - ring.num(r)) | (wrap ^ WRAP)
    return slot | wrap


@inlined
def _distance(r, old, new):
    """The slots from cursor `old` to `new`, less than two laps."""
    slots = (new & SLOT) - (old & SLOT)
    if (new ^ old) & WRAP:
        slots += ring.num(r)
    return slots if slots >= 0 else slots + 2 * ring.num(r)


@inlined
def _at(r, cursor):
    """The descriptor at a cursor."""
    return ring.desc(r) + (cursor & SLOT) * DESC_BYTES


@inlined
def is_available(r, cursor):
    """1 when the driver has made the descriptor at a cursor available on this lap."""
    flags = mem.acquire_u16(_at(r, cursor) + 14)
    wrap = 1 if cursor & WRAP else 0
    return 1 if (flags >> 7) & 1 == wrap and (flags >> 15) & 1 != wrap else 0


@inlined
def ready(r, ahead):
    """1 when a chain waits `ahead` slots on, else 0: slots the driver has not been shown as used
    cannot be available again, whatever stands there."""
    if _distance(r, ring.published(r), ring.last_avail(r)) + ahead >= ring.num(r):
        return 0
    return is_available(r, advance(r, ring.last_avail(r), ahead))


@inlined
def chain(w, r, ahead, iov, room, writable):
    """The buffers of the chain `ahead` slots on as entries of iov: their number, or -1 - reason.

    Sets chain_id and chain_slots, also when the chain is refused: its end must be found to return
    it. BAD_AVAIL when it has none.
    """
    cursor, count, slots = advance(r, ring.last_avail(r), ahead), 0, 0
    for _ in range(ring.num(r) - ahead):
        at = _at(r, cursor)
        address, word = mem.u64(at), mem.u64(at + 8)
        length, flags = word & 0xFFFFFFFF, (word >> 48) & 0xFFFF
        if count >= 0 and flags & F_INDIRECT:
            count = _indirect(w, r, address, length, flags, iov, count, room, writable)
        elif count >= 0:
            count = descriptor.append(w, address, length, flags, writable, iov, count, room)
        slots += 1
        if flags & F_NEXT == 0:
            ring.set_chain_id(r, (word >> 32) & 0xFFFF)
            ring.set_chain_slots(r, slots)
            return count
        cursor = advance(r, cursor, 1)
    return BAD_AVAIL


@jit
def _indirect(w, r, address, length, flags, iov, count, room, writable):
    """Append the buffers of an indirect table: all its descriptors. Flags other than WRITE mean
    nothing there (2.8.7)."""
    table = descriptor.table(w, address, length, flags)
    if table < 0:
        return table
    if length // DESC_BYTES > ring.num(r):
        return CHAIN_LOOP
    for number in range(length // DESC_BYTES):
        at = table + number * DESC_BYTES
        address, word = mem.u64(at), mem.u64(at + 8)
        length, flags = word & 0xFFFFFFFF, (word >> 48) & 0xFFFF
        count = descriptor.append(w, address, length, flags, writable, iov, count, room)
        if count < 0:
            break
    return count


@inlined
def put_used(r, buffer_id, length, slots):
    """Return a chain of `slots` descriptors, or with IN_ORDER (2.8.8) those before it, too; visible
    after show()."""
    entry = ring.used_log(r) + LOG_BYTES * ring.log_count(r)
    mem.put_u64(entry, length | (buffer_id << 32) | (slots << 48))
    ring.set_log_count(r, ring.log_count(r) + 1)
    ring.set_used_idx(r, advance(r, ring.used_idx(r), slots))


@jit
def _used(cursor, note):
    """The second half of the used descriptor at a cursor: length, buffer id, flags (2.8.1,
    2.8.3)."""
    flags = F_AVAIL | F_USED if cursor & WRAP else 0
    flags |= F_WRITE if note & 0xFFFFFFFF else 0
    return (note & 0xFFFFFFFFFFFF) | (flags << 48)


@jit
def show(r):
    """Make what was returned visible: the first used descriptor last."""
    counters, first, log = ring.counters(r), ring.published(r), ring.used_log(r)
    queue.set_used_next(counters, ring.used_idx(r))
    cursor = first
    for number in range(ring.log_count(r)):
        note = mem.u64(log + LOG_BYTES * number)
        if number > 0:
            mem.release_u64(_at(r, cursor) + 8, _used(cursor, note))
        cursor = advance(r, cursor, (note >> 48) & 0xFFFF)
    mem.release_u64(_at(r, first) + 8, _used(first, mem.u64(log)))
    queue.set_used_cursor(counters, ring.used_idx(r))
    ring.set_log_count(r, 0)


@jit
def wants_call(r, old, new):
    """Whether the driver asked to hear of the slots old..new (2.8.10)."""
    area = ring.avail(r)
    wish = mem.u16(area + 2) & 3
    if wish == EVENT_DESC and ring.event_idx(r):
        event = mem.u16(area)
        since = (new & SLOT) - (event & SLOT)
        if (new ^ event) & WRAP:
            since += ring.num(r)
        return 0 < since <= _distance(r, old, new)
    return wish != EVENT_DISABLE


@jit
def suppress_kicks(r):
    """Ask for no kicks."""
    mem.put_u16(ring.used(r) + 2, EVENT_DISABLE)


@jit
def want_kick(r, known):
    """Ask for a kick when the slot at cursor `known` becomes available."""
    if ring.event_idx(r):
        mem.put_u16(ring.used(r), known)
        mem.release_u16(ring.used(r) + 2, EVENT_DESC)
    else:
        mem.put_u16(ring.used(r) + 2, EVENT_ENABLE)


@jit
def end(r):
    """The cursor of the first slot, from the next chain on, that is not available; after a whole
    lap the one where it began."""
    cursor = ring.last_avail(r)
    for _ in range(ring.num(r)):
        if not is_available(r, cursor):
            break
        cursor = advance(r, cursor, 1)
    return cursor


@jit
def is_full(r):
    """1 when every slot is available and was not taken."""
    return 1 if end(r) == advance(r, ring.last_avail(r), ring.num(r)) else 0
