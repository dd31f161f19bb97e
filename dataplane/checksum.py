"""checksum.py - the Internet checksum (RFC 1071) over scattered memory.

Theory      The one's-complement sum does not depend on byte order (RFC 1071 section 2B): words are
            added as they lie in memory, 32 bits at a time into 64, and the folded result is stored
            as it is. `partial` returns an unfolded sum; odd pieces inside a scattered buffer are
            handled by swapping the bytes of later sums.
Why so      Ordinary 32-bit loads in a counted loop: LLVM makes vector code of it.
Limits      Sums of up to 2^31 bytes; callers pass frames of 64 KiB.
Ownership   Reads memory that the guest may change: a wrong checksum is then the guest's own doing.
"""

from __future__ import annotations

from dataplane.context import IOV_BYTES
from shm import mem
from shm.jit import jit


@jit
def fold(total):
    """A 16-bit one's-complement sum in memory order."""
    total = (total & 0xFFFFFFFF) + (total >> 32)
    total = (total & 0xFFFF) + ((total >> 16) & 0xFFFF) + (total >> 32)
    return (total & 0xFFFF) + (total >> 16)


@jit
def partial(address, size):
    """Unfolded sum of `size` bytes in memory order; an odd last byte counts as followed by zero."""
    total = 0
    words = size >> 2
    for index in range(words):
        total += mem.le32(address + 4 * index)
    at = address + 4 * words
    if size & 2:
        total += mem.le16(at)
        at += 2
    if size & 1:
        total += mem.u8(at)
    return total


@jit
def over_iov(iov, count, skip, size):
    """Folded sum of `size` bytes that begin `skip` bytes into an iovec array."""
    total, odd = 0, 0
    for index in range(count):
        base, length = mem.u64(iov + index * IOV_BYTES), mem.u64(iov + index * IOV_BYTES + 8)
        if skip >= length:
            skip -= length
            continue
        piece = min(length - skip, size)
        if piece <= 0:
            break
        value = fold(partial(base + skip, piece))
        if odd:
            value = ((value & 0xFF) << 8) | (value >> 8)
        total += value
        odd ^= piece & 1
        size -= piece
        skip = 0
    return fold(total)
