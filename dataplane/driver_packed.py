"""driver_packed.py - packed virtqueues, the driver side (virtio 1.3, 2.8).

Theory      One ring of descriptors that both sides write in turn. The driver puts the descriptor of
            a buffer into the next place, its number as the buffer id; the device puts a used
            descriptor, with the id and the bytes written, into the next place it has not written
            to yet. Two flags say whose a descriptor is: seen from the lap an index is in (even or
            odd), AVAIL is set to it by both sides, USED by the device only. Buffers may come back
            in any order: the place says nothing, the id does.
Visibility  A descriptor's second half (length, id, flags) is one word, stored in one piece with
            release order after the first. That is an ordinary store to x86, and so a batch of
            buffers is offered one by one: to hold the first back would cost more.
In order    A used descriptor names the last buffer of a batch; the next one lies that many places
            on. `offered` says how many.
Calls       An event structure each way, written and read in one piece: call always, never, or when
            the descriptor at a place is used (EVENT_IDX).
Limits      One descriptor of the ring per buffer. Unknown event flags get a kick: it does no harm.
Ownership   The device's descriptors and event structure are not trusted. What is believed of a
            descriptor comes from one load of its second half.
"""

from __future__ import annotations

from dataplane.driver_ring import BROKEN, DESC_BYTES, is_out, ring
from shm import mem
from shm.jit import jit

# Flags as they lie in the second half of a descriptor: length | id << 32 | flags << 48.
F_WRITE = 2 << 48
F_AVAIL = 1 << 55
F_USED = -(1 << 63)
# Words of an event structure: place | lap << 15 | flags << 16.
EVENT_WRAP = 1 << 15
EVENT_DISABLE, EVENT_DESC = 1, 2


@jit
def show(r, number):
    """Put a buffer where the device finds it: at `avail_idx`."""
    at = ring.avail_idx(r)
    entry = ring.desc(r) + DESC_BYTES * (at & (ring.num(r) - 1))
    made = ring.made(r) + DESC_BYTES * number
    mem.put_u64(entry, mem.u64(made))
    mine = F_USED if at & ring.num(r) else F_AVAIL
    mem.release_u64(entry + 8, mem.u64(made + 8) | mine)


@jit
def wants_kick(r, old, new):
    """Whether the device asked to hear of what was offered at indexes old..new (2.8.10)."""
    wish = mem.u32(ring.used(r))
    flags = (wish >> 16) & 3
    if flags == EVENT_DESC and ring.event_idx(r):
        laps = 2 * ring.num(r) - 1
        event = wish & (ring.num(r) - 1) | (0 if wish & EVENT_WRAP else ring.num(r))
        return (event - old) & laps < (new - old) & 0xFFFF
    return flags != EVENT_DISABLE


@jit
def _second_half(r, at):
    return mem.acquire_u64(ring.desc(r) + DESC_BYTES * (at & (ring.num(r) - 1)) + 8)


@jit
def _is_used(r, at, word):
    """Whether this second half of the descriptor at index `at` is a used one's."""
    return word & (F_AVAIL | F_USED) == (0 if at & ring.num(r) else F_AVAIL | F_USED)


@jit
def _batch(r, at, last):
    """The same for a descriptor at index `at`."""
    if not is_out(r, last):
        return BROKEN
    count = ((mem.u16(ring.offered(r) + 2 * last) - at) & 0xFFFF) + 1
    return count if count <= (ring.avail_idx(r) - at) & 0xFFFF else BROKEN


@jit
def finished(r):
    """Used buffers not taken yet; BROKEN when a batch is not of the device's buffers."""
    first, end = ring.last_used(r), ring.avail_idx(r)
    at = (first + ring.batch(r)) & 0xFFFF
    for _ in range(ring.num(r)):
        if at == end:
            break
        word = _second_half(r, at)
        if not _is_used(r, at, word):
            break
        count = _batch(r, at, (word >> 32) & 0xFFFF) if ring.in_order(r) else 1
        if count == BROKEN:
            return BROKEN
        at = (at + count) & 0xFFFF
    return (at - first) & 0xFFFF


@jit
def used_word(r):
    """What the next used descriptor says: buffer | bytes written << 32. The length means nothing
    when nothing was written."""
    word = _second_half(r, ring.last_used(r))
    length = word & 0xFFFFFFFF if word & F_WRITE else 0
    return (word >> 32) & 0xFFFF | length << 32


@jit
def batch(r, last):
    """In order: how many buffers a used descriptor that names `last` gives back, from the next one
    on; BROKEN if the device does not have them all."""
    return _batch(r, ring.last_used(r), last)


@jit
def suppress_calls(r):
    """Ask the device for no calls."""
    mem.put_u32(ring.avail(r), EVENT_DISABLE << 16)


@jit
def ask_for_call(r, after):
    """Ask for a call when `after` more buffers are used; without EVENT_IDX, when one is."""
    if ring.event_idx(r):
        at = ring.last_used(r) + after - 1
        place = at & (ring.num(r) - 1) | (0 if at & ring.num(r) else EVENT_WRAP)
        mem.put_u32(ring.avail(r), place | EVENT_DESC << 16)
    else:
        mem.put_u32(ring.avail(r), 0)
