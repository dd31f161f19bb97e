"""virtq_split.py - split virtqueues, the device side (virtio 1.3, 2.7). Called through virtq.py.

Theory      The driver puts the head of each chain into the available ring and moves its index; the
            device puts it into the used ring, and moves that index. Every chain is one slot of
            either. `ahead` counts from last_avail, the next chain to take.
Why so      The driver's index is on a cache line it keeps writing: it is read at the beginning of a
            burst, and again when what was seen of it (seen_avail) has been used up.
Limits      A chain has at most `num` descriptors, indirect ones included (2.7.5.3.1).
Ownership   The driver's words are read once each, by atomic loads.
Drops       chain_loop, bad_index and those of descriptor.py; bad_avail stops the ring.
"""

from __future__ import annotations

from dataplane import descriptor
from dataplane.context import ring
from dataplane.descriptor import (
    BAD_AVAIL,
    BAD_INDEX,
    BAD_INDIRECT,
    CHAIN_LOOP,
    DESC_BYTES,
    F_INDIRECT,
    F_NEXT,
)
from shm import mem
from shm.jit import inlined, jit

AVAIL_F_NO_INTERRUPT = 1
USED_F_NO_NOTIFY = 1


@inlined
def ready(r, ahead):
    """1 when a chain waits `ahead` slots on, else 0; BAD_AVAIL: the index cannot be."""
    taken = ring.last_avail(r)
    if ahead and (ring.seen_avail(r) - taken) & 0xFFFF > ahead:
        return 1
    seen = mem.acquire_u16(ring.avail(r) + 2)
    waiting = (seen - taken) & 0xFFFF
    if waiting > ring.num(r):
        return BAD_AVAIL
    ring.set_seen_avail(r, seen)
    return 1 if waiting > ahead else 0


@inlined
def advance(r, cursor, slots):
    """The cursor `slots` further on."""
    return (cursor + slots) & 0xFFFF


@inlined
def chain(w, r, ahead, iov, room, writable):
    """walk() for the chain `ahead` slots on; sets chain_id and chain_slots."""
    at = (ring.last_avail(r) + ahead) & (ring.num(r) - 1)
    head = mem.u16(ring.avail(r) + 4 + 2 * at)
    ring.set_chain_id(r, head)
    ring.set_chain_slots(r, 1)
    return walk(w, r, head, iov, room, writable)


@inlined
def walk(w, r, head, iov, room, writable):
    """The buffers of chain `head` as entries of iov: their number, or -1 - reason."""
    table, size, index, count, nested = ring.desc(r), ring.num(r), head, 0, 0
    for _ in range(ring.num(r) + 1):
        if index >= size:
            return BAD_INDEX
        at = table + index * DESC_BYTES
        address, length = mem.u64(at), mem.u32(at + 8)
        flags, following = mem.u16(at + 12), mem.u16(at + 14)
        if flags & F_INDIRECT:
            table = BAD_INDIRECT if nested else descriptor.table(w, address, length, flags)
            if table < 0:
                return table
            size, index, nested = min(length // DESC_BYTES, 0x10000), 0, 1
            continue
        count = descriptor.append(w, address, length, flags, writable, iov, count, room)
        if count < 0 or flags & F_NEXT == 0:
            return count
        index = following
    return CHAIN_LOOP


@inlined
def put_used(r, head, length, slots):
    """Return a chain, and with it the `slots` - 1 before it (IN_ORDER, 2.7.9); visible after
    show()."""
    at = ring.used_idx(r)
    entry = ring.used(r) + 4 + 8 * (at & (ring.num(r) - 1))
    mem.put_u32(entry, head)
    mem.put_u32(entry + 4, length)
    ring.set_used_idx(r, advance(r, at, slots))


@jit
def show(r):
    """Make what was returned visible."""
    mem.release_u16(ring.used(r) + 2, ring.used_idx(r))


@jit
def wants_call(r, old, new):
    """Whether the driver asked to hear of used entries old..new (2.7.7.2)."""
    if ring.event_idx(r):
        event = mem.u16(ring.avail(r) + 4 + 2 * ring.num(r))
        return (new - event - 1) & 0xFFFF < (new - old) & 0xFFFF
    return mem.u16(ring.avail(r)) & AVAIL_F_NO_INTERRUPT == 0


@jit
def suppress_kicks(r):
    """Ask for no kicks. With EVENT_IDX avail_event stays where it is, behind the driver: no kick
    until we move it."""
    if ring.event_idx(r) == 0:
        mem.put_u16(ring.used(r), USED_F_NO_NOTIFY)


@jit
def want_kick(r, known):
    """Ask for a kick when there is more than what is known."""
    if ring.event_idx(r):
        mem.put_u16(ring.used(r) + 4 + 8 * ring.num(r), known)
    else:
        mem.put_u16(ring.used(r), 0)


@inlined
def is_beyond(r, known):
    """1 when the driver has made more available than what is known."""
    return 1 if mem.acquire_u16(ring.avail(r) + 2) != known else 0


@jit
def end(r):
    """The cursor behind the last chain the driver has made available."""
    return mem.acquire_u16(ring.avail(r) + 2)


@jit
def is_full(r):
    """1 when every slot holds a chain that was not taken."""
    return 1 if (end(r) - ring.last_avail(r)) & 0xFFFF == ring.num(r) else 0
