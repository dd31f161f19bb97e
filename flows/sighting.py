"""sighting.py - the addresses the guest was last seen using, known to all workers.

Theory      Each worker compares the source of what the guest sends with what is known, and writes
            what is new: forwarded connections and datagrams go there. The latest sighting wins.
            A link-layer or an IPv4 address is one word, one store. An IPv6 address is two: who
            writes one puts its number into seen.lock by compare-and-swap, and gives the lock back
            with the next version. Who reads one looks at the lock before and after.
Why so      Nobody waits for a writer. A worker that finds the lock taken does not write: the next
            packet says the same again. A reader that has looked READS_MAX times does as if no
            address had been seen.
Crash       A worker that dies while it writes leaves its number in the lock. Who takes its place
            clears what may be half an address and gives the lock back (`forget_half`).
Ownership   struct seen, every worker.
"""

from __future__ import annotations

from typing import Any

from flows import address
from shm import mem
from shm.access import seen
from shm.jit import jit
from shm.layout import View
from shm.schema import SEEN, Offsets

WRITER = 0xFF  # bits of the lock: the worker that writes + 1; 0 none. Above: the version
VERSION = 0x100
READS_MAX = 100
_LOCK = SEEN.fields["lock"].offset


@jit
def note_mac(s, mac):
    """The source of a frame; a group address or none is not the guest's."""
    if mac != seen.mac(s) and mac != 0 and (mac >> 40) & 1 == 0:
        seen.set_mac(s, mac)


@jit
def note(s, guest, worker):
    """The source of a packet that `worker` received, the 16 bytes at `guest`."""
    if address.is_v4(guest):
        value = mem.be32(guest + 12)
        if seen.addr4(s) != value:
            seen.set_addr4(s, value)
        return
    known = seen.addr6_local(s) if address.is_link_local(guest) else seen.addr6(s)
    if mem.le64(known) != mem.le64(guest) or mem.le64(known + 8) != mem.le64(guest + 8):
        lock = s + _LOCK
        version = mem.u32(lock)
        if version & WRITER == 0 and mem.cas_u32(lock, version, version | (worker + 1)):
            mem.fence()  # the lock before the bytes
            mem.copy(known, guest, 16)
            mem.release_u32(lock, version + VERSION)


@jit
def read6(s, known, target):
    """Store at `target` the address that stands at `known` in struct seen, whole; 0: there is
    none."""
    lock = s + _LOCK
    for _ in range(READS_MAX):
        version = mem.acquire_u32(lock)
        if version & WRITER:
            continue
        mem.copy(target, known, 16)
        mem.fence()  # the bytes before the lock
        if mem.u32(lock) == version:
            return address.is_set(target)
    return 0


def forget_half(buffer: Any, offsets: Offsets, worker: int) -> None:
    """Clear what a worker that died was writing. Plain Python, called by the process that takes its
    place, before it serves."""
    entry = View(SEEN, buffer, offsets.seen)
    if entry["lock"] & WRITER == worker + 1:
        for name in ("addr6", "addr6_local"):
            entry.set_bytes(name, bytes(16))
        entry["lock"] = (entry["lock"] + VERSION) & (1 << 32) - 1 & ~WRITER
