"""ring.py - a ring of variable-length records from one process to one other, in shared memory.

Theory      Two cursors count bytes ever written and ever consumed. A record is an 8-byte head {u32
            length, u32 meta} and its bytes, rounded up to 8, always in one piece: where it would
            cross the end, a skip mark fills the rest. The producer writes the record first and then
            publishes `head` with release order; the consumer reads `head` with acquire order and
            gives room back by moving `tail`, record by record or, having gone on with after(), of
            many at once: what lies in them can be used together. reserve() gives room to write into
            in place (a recvmsg may fill it), commit() publishes what was used, with the mark before
            it if there is one: a mark alone would be a ring that is neither empty nor has a record.
Why so      One writer per cursor: no lock, no compare-and-swap, nothing to repair when a process
            dies: an unpublished record was never there, and the successor of a consumer finds every
            record that was not consumed. What the dead one had done with them is done again:
            segments are told apart by their sequence numbers, datagrams come twice at most.
Limits      HANDOFF_BYTES of data; a record is at most half of that.
Ownership   head: the producer. tail: the consumer. The bytes between tail and head: the consumer;
            the rest: the producer.
"""

from __future__ import annotations

from shm import mem
from shm.access import handoff
from shm.jit import jit
from shm.schema import HANDOFF, HANDOFF_BYTES

HEAD_BYTES = 8
SKIP = 0xFFFFFFFF
_DATA = HANDOFF.size
_TAIL = HANDOFF.fields["tail"].offset
_HEAD = HANDOFF.fields["head"].offset


@jit
def padded(size):
    """Bytes of the ring that a record of `size` bytes takes."""
    return HEAD_BYTES + ((size + 7) & ~7)


@jit
def reserve(h, size):
    """Room for a record of up to `size` bytes: the address to write to, or 0 when there is none."""
    head = handoff.head(h)
    used = head - mem.acquire_u64(h + _TAIL)
    offset = head & (HANDOFF_BYTES - 1)
    need = padded(size)
    to_end = HANDOFF_BYTES - offset
    if need > to_end:
        if used + to_end + need > HANDOFF_BYTES:
            return 0
        mem.put_u32(h + _DATA + offset, SKIP)  # seen with the record behind it: commit()
        offset = 0
    elif used + need > HANDOFF_BYTES:
        return 0
    return h + _DATA + offset + HEAD_BYTES


@jit
def commit(h, address, size, meta):
    """Publish the record whose bytes were written at `address` (from reserve)."""
    mem.put_u32(address - HEAD_BYTES, size)
    mem.put_u32(address - HEAD_BYTES + 4, meta)
    head, offset = handoff.head(h), address - HEAD_BYTES - h - _DATA
    skipped = (offset - head) & (HANDOFF_BYTES - 1)
    mem.release_u64(h + _HEAD, head + skipped + padded(size))


@jit
def length(record):
    """Bytes of a record."""
    return mem.u32(record - HEAD_BYTES)


@jit
def meta(record):
    """What the producer said of it."""
    return mem.u32(record - HEAD_BYTES + 4)


@jit
def _at(h, cursor):
    """The address of the record at `cursor`, or behind the skip mark there; 0 when there is none
    yet."""
    head = mem.acquire_u64(h + _HEAD)
    for _ in range(2):
        if cursor == head:
            return 0
        offset = cursor & (HANDOFF_BYTES - 1)
        if mem.u32(h + _DATA + offset) != SKIP:
            return h + _DATA + offset + HEAD_BYTES
        cursor += HANDOFF_BYTES - offset
    return 0


@jit
def _end(h, record):
    """The cursor behind a record that has not been consumed."""
    tail, offset = handoff.tail(h), record - HEAD_BYTES - h - _DATA + padded(length(record))
    return tail + 1 + ((offset - tail - 1) & (HANDOFF_BYTES - 1))  # up to a whole ring beyond tail


@jit
def first(h):
    """The oldest record's address, or 0 when the ring is empty."""
    return _at(h, handoff.tail(h))


@jit
def after(h, record):
    """The record behind one that has not been consumed, or 0 when there is none yet."""
    return _at(h, _end(h, record))


@jit
def consume(h, record):
    """Give back the room of the oldest record up to and including this one."""
    mem.release_u64(h + _TAIL, _end(h, record))
