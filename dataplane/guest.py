"""guest.py - guest physical addresses to addresses in this process.

Theory      The front-end's memory table is an array of regions sorted by guest address. A buffer
            may cross from one region into the next (vhost-user "memory regions"), so translation
            appends one or more iovec entries.
Why so      Most buffers lie in the region of the last one: that is looked at first, then a binary
            search.
Limits      509 regions; an iovec array of fixed room.
Ownership   The region array is written by worker.py between breaths, after control has sent a new
            table.
Drops       bad_address: outside every region, or address + length wraps around.
"""

from __future__ import annotations

from dataplane.context import IOV_BYTES, context, region
from shm import mem
from shm.jit import jit
from shm.schema import DROP

BAD_ADDRESS = -1 - DROP["bad_address"]
_SEARCH_STEPS = 10  # 2**10 > 509 regions


@jit
def find(w, gpa):
    """The region that holds guest address `gpa`, or 0."""
    hit = context.region_hit(w)
    if hit != 0:
        offset = gpa - region.gpa(hit)
        if 0 <= offset < region.size(hit):
            return hit
    low, high = 0, context.region_count(w)
    base = context.regions(w)
    for _ in range(_SEARCH_STEPS):
        if low >= high:
            break
        middle = (low + high) >> 1
        r = base + middle * region.SIZE
        if gpa < region.gpa(r):
            high = middle
        elif gpa - region.gpa(r) >= region.size(r):
            low = middle + 1
        else:
            context.set_region_hit(w, r)
            return r
    return 0


@jit
def translate(w, gpa, length, iov, count, room):
    """Append `length` bytes at guest address `gpa` to iov[count:room]; the new count or -1 -
    reason."""
    for _ in range(room - count + 1):
        if length <= 0:
            return count
        r = find(w, gpa)
        if r == 0 or count >= room:
            return BAD_ADDRESS
        offset = gpa - region.gpa(r)
        piece = min(length, region.size(r) - offset)
        mem.put_u64(iov + count * IOV_BYTES, region.host(r) + offset)
        mem.put_u64(iov + count * IOV_BYTES + 8, piece)
        count += 1
        gpa += piece
        length -= piece
    return BAD_ADDRESS


@jit
def contiguous(w, gpa, length):
    """The address of `length` bytes that lie in one region, or 0 (descriptor tables must)."""
    r = find(w, gpa)
    if r == 0 or region.size(r) - (gpa - region.gpa(r)) < length:
        return 0
    return region.host(r) + gpa - region.gpa(r)
