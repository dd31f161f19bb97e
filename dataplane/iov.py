"""iov.py - slices of iovec arrays.

Theory      A frame from the guest is a list of pieces; its payload is the same list with the front
            cut off. Cutting copies 16 bytes per piece and no payload.
Limits      The caller knows the room of the target array.
Ownership   None: callers own the arrays and what they point to.
"""

from __future__ import annotations

from dataplane.context import IOV_BYTES
from shm import mem
from shm.jit import jit


@jit
def append_slice(target, count, source, pieces, skip, size):
    """Append bytes skip..skip+size of `source` (of `pieces` entries) to target[count:]; the new
    count."""
    for index in range(pieces):
        entry = source + index * IOV_BYTES
        length = mem.u64(entry + 8)
        if skip >= length:
            skip -= length
            continue
        take = min(length - skip, size)
        if take <= 0:
            break
        mem.put_u64(target + count * IOV_BYTES, mem.u64(entry) + skip)
        mem.put_u64(target + count * IOV_BYTES + 8, take)
        count += 1
        size -= take
        skip = 0
    return count


@jit
def total(source, pieces):
    """Bytes in all pieces."""
    size = 0
    for index in range(pieces):
        size += mem.u64(source + index * IOV_BYTES + 8)
    return size


@jit
def copy_out(target, source, pieces, skip, size):
    """Copy bytes skip..skip+size to linear memory; the bytes copied (fewer when there are
    fewer)."""
    done = 0
    for index in range(pieces):
        if done >= size:
            break
        entry = source + index * IOV_BYTES
        length = mem.u64(entry + 8)
        if skip >= length:
            skip -= length
            continue
        take = min(length - skip, size - done)
        mem.copy(target + done, mem.u64(entry) + skip, take)
        done += take
        skip = 0
    return done


@jit
def copy_in(target, pieces, skip, source, size):
    """Copy linear memory into the pieces, from `skip` bytes in; the bytes copied."""
    done = 0
    for index in range(pieces):
        entry = target + index * IOV_BYTES
        length = mem.u64(entry + 8)
        if skip >= length:
            skip -= length
            continue
        take = min(length - skip, size - done)
        if take <= 0:
            break
        mem.copy(mem.u64(entry) + skip, source + done, take)
        done += take
        skip = 0
    return done
