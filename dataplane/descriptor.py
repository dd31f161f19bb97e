"""descriptor.py - what split and packed rings have in common: 16 bytes that name a buffer.

Theory      A descriptor names a guest address, a length and flags; one with F_INDIRECT names a
            table of descriptors instead (virtio 1.3, 2.7.5 and 2.8.5). append() turns one
            into iovec entries, table() finds a table.
Limits      A table lies in one memory region.
Ownership   The iovec is the caller's, who has read the words of the descriptor, each once.
Drops       bad_address, bad_indirect, bad_direction.
"""

from __future__ import annotations

from dataplane import guest
from shm.jit import jit
from shm.schema import DROP

DESC_BYTES = 16
F_NEXT, F_WRITE, F_INDIRECT = 1, 2, 4

CHAIN_LOOP = -1 - DROP["chain_loop"]
BAD_INDEX = -1 - DROP["bad_index"]
BAD_ADDRESS = -1 - DROP["bad_address"]
BAD_INDIRECT = -1 - DROP["bad_indirect"]
BAD_DIRECTION = -1 - DROP["bad_direction"]
BAD_AVAIL = -1 - DROP["bad_avail"]


@jit
def append(w, address, length, flags, writable, iov, count, room):
    """Append a buffer to iov[count:room]; the new count, or -1 - reason. `writable`: whether it
    must be device-writable, or must not."""
    if (flags & F_WRITE != 0) != (writable != 0):
        return BAD_DIRECTION
    if length == 0:
        return count
    return guest.translate(w, address, length, iov, count, room)


@jit
def table(w, address, length, flags):
    """Where the indirect table of a descriptor with these fields is mapped, or -1 - reason."""
    if flags & F_NEXT or length == 0 or length % DESC_BYTES:
        return BAD_INDIRECT
    at = guest.contiguous(w, address, length)
    return at if at else BAD_ADDRESS
