"""driver_split.py - split virtqueues, the driver side (virtio 1.3, 2.7).

Theory      The driver names descriptors in the avail ring and then moves its index; the device
            names them in the used ring, with the bytes written, and moves that one's index. Each
            side writes to its own ring only. Descriptor k is made for buffer k and stays, so a used
            entry names the buffer.
In order    Descriptors have to be used in the order of the table then (2.7.5): the next place of
            the avail ring names the descriptor of the same place, which is copied from `made`. A
            used entry names a place, and the used index says how many came back.
Calls       EVENT_IDX: the last word of the avail ring is the used index to be called at; a used
            index passed long ago suppresses calls. Without: a flag.
Limits      One descriptor of the ring per buffer.
Ownership   The device writes the used ring. Each of its words is read once, by an atomic load, and
            not trusted.
"""

from __future__ import annotations

from dataplane.driver_ring import BROKEN, DESC_BYTES, ring
from shm import mem
from shm.jit import jit

AVAIL_F_NO_INTERRUPT = 1
USED_F_NO_NOTIFY = 1


@jit
def show(r, number):
    """Put a buffer where the device finds it: at `avail_idx`."""
    at, name = ring.avail_idx(r), number
    place = at & (ring.num(r) - 1)
    if ring.in_order(r):
        name = place
        mem.copy(ring.desc(r) + DESC_BYTES * place, ring.made(r) + DESC_BYTES * number, DESC_BYTES)
    mem.put_u16(ring.avail(r) + 4 + 2 * place, name)
    mem.release_u16(ring.avail(r) + 2, at + 1)  # the entry must be visible before the index


@jit
def wants_kick(r, old, new):
    """Whether the device asked to hear of what was offered at indexes old..new (2.7.10)."""
    if ring.event_idx(r):
        event = mem.u16(ring.used(r) + 4 + 8 * ring.num(r))
        return (new - event - 1) & 0xFFFF < (new - old) & 0xFFFF
    return mem.u16(ring.used(r)) & USED_F_NO_NOTIFY == 0


@jit
def finished(r):
    """Used buffers not taken yet; BROKEN when they are more than the device had."""
    count = (mem.acquire_u16(ring.used(r) + 2) - ring.last_used(r)) & 0xFFFF
    return count if count <= ring.out(r) else BROKEN


@jit
def used_word(r):
    """What the next used entry says: descriptor | bytes written << 32."""
    entry = ring.used(r) + 4 + 8 * (ring.last_used(r) & (ring.num(r) - 1))
    return mem.u32(entry) | mem.u32(entry + 4) << 32


@jit
def batch(r, last):
    """In order: how many buffers a used entry that names `last` gives back, from the next one on;
    BROKEN if they were not all used."""
    count = ((last - ring.last_used(r)) & (ring.num(r) - 1)) + 1
    return count if last < ring.num(r) and count <= finished(r) else BROKEN


@jit
def suppress_calls(r):
    """Ask the device for no calls."""
    if ring.event_idx(r):  # an index it has passed
        mem.put_u16(ring.avail(r) + 4 + 2 * ring.num(r), ring.last_used(r) - 1)
    else:
        mem.put_u16(ring.avail(r), AVAIL_F_NO_INTERRUPT)


@jit
def ask_for_call(r, after):
    """Ask for a call when `after` more buffers are used; without EVENT_IDX, when one is."""
    if ring.event_idx(r):
        mem.put_u16(ring.avail(r) + 4 + 2 * ring.num(r), ring.last_used(r) + after - 1)
    else:
        mem.put_u16(ring.avail(r), 0)
