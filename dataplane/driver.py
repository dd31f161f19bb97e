"""driver.py - virtqueues, the driver side: one interface to both formats.

Theory      offer() puts a buffer into the ring, where an awake device finds it; notify() kicks one
            that sleeps and asked to be woken for what was offered since the last look. finished()
            and take() get used buffers back. What rings look like is for driver_split.py and
            driver_packed.py to know; which of them is meant is decided here and nowhere else.
            Buffers, and what is known of a ring in either format, are driver_ring.py's.
Calls       While frames move, the device is asked not to call. Before waiting, ask_for_call(), then
            a full barrier, then one more look: else the last call is lost (2.7.10).
Limits      One descriptor of the ring per buffer.
Ownership   One mover per ring pair. The device's words are read once each, by atomic loads, and are
            not trusted: BROKEN is returned for what a device cannot have said, and the ring is
            over.
"""

from __future__ import annotations

from dataplane import driver_packed, driver_split
from dataplane.driver_ring import BROKEN, given, is_out, next_of_batch, ring, set_batch, taken_back
from shm import libc, mem
from shm.jit import inlined, jit


@jit
def written(word):
    """The bytes written, of a used buffer as take() gives it."""
    return (word >> 32) & 0xFFFFFFFF


@inlined
def offer(r, number):
    """Give a buffer to the device."""
    if ring.packed(r):
        driver_packed.show(r, number)
    else:
        driver_split.show(r, number)
    given(r, number)


@jit
def unnotified(r):
    """Buffers offered since the last notify()."""
    return (ring.avail_idx(r) - ring.notified(r)) & 0xFFFF


@jit
def _wants_kick(r, old, new):
    mem.fence()  # what was offered must be visible before the device's wish is read
    if ring.packed(r):
        return driver_packed.wants_kick(r, old, new)
    return driver_split.wants_kick(r, old, new)


@jit
def notify(r, scratch):
    """Kick the device if it wants to hear of what was offered; `scratch` holds 8 bytes."""
    old, new = ring.notified(r), ring.avail_idx(r)
    if old == new:
        return
    ring.set_notified(r, new)
    if _wants_kick(r, old, new):
        mem.put_u64(scratch, 1)
        libc.write(ring.kick_fd(r), scratch, 8)
        ring.set_kicks(r, ring.kicks(r) + 1)


@jit
def finished(r):
    """Used buffers not taken yet; BROKEN when they cannot be."""
    return driver_packed.finished(r) if ring.packed(r) else driver_split.finished(r)


@jit
def _used_word(r):
    return driver_packed.used_word(r) if ring.packed(r) else driver_split.used_word(r)


@jit
def _batch(r, last):
    return driver_packed.batch(r, last) if ring.packed(r) else driver_split.batch(r, last)


@jit
def _take_in_order(r):
    if ring.batch(r) == 0:
        word = _used_word(r)
        count = _batch(r, word & 0xFFFFFFFF)
        if count == BROKEN:
            return BROKEN
        set_batch(r, count, written(word))
    return next_of_batch(r)


@inlined
def take(r):
    """The next used buffer, which finished() has seen: number | bytes written << 32; or BROKEN."""
    if ring.in_order(r):
        return _take_in_order(r)
    word = _used_word(r)
    number = word & 0xFFFFFFFF
    if not is_out(r, number):
        return BROKEN
    taken_back(r, number)
    return word


@jit
def suppress_calls(r):
    """Ask the device for no calls."""
    if ring.packed(r):
        driver_packed.suppress_calls(r)
    else:
        driver_split.suppress_calls(r)


@jit
def ask_for_call(r, after):
    """Ask for a call when `after` more buffers are used; without EVENT_IDX, when one is."""
    if ring.packed(r):
        driver_packed.ask_for_call(r, after)
    else:
        driver_split.ask_for_call(r, after)
