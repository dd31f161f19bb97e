"""device.py - what the front-end has told us so far: features, guest memory, rings, and every
descriptor it gave us.

Theory      session.py decides what a message means; this module holds the outcome and judges
            whether it makes sense: whether a memory region can be mapped, whether a ring can run.
            It knows no messages and no workers.
Rings       A ring *waits* while anything it needs is still to come (size, addresses, kick
            descriptor, features, guest memory), in whatever order it comes. With all there it
            either runs or has a *problem*, which is the guest driver's or the front-end's doing.
            Ring 2i is pair i's receive queue, 2i + 1 its transmit queue.
Ownership   The device owns each descriptor from the moment it is stored until it is replaced,
            dropped or `release` is called; workers get duplicates of their own. Nothing here is
            shared with another process.
Limits      `slots` memory regions, `rings` rings. Every check is linear in the number of regions.
Sources     QEMU docs/interop/vhost-user.rst, "Memory access" and "Ring states"; virtio 1.3, 2.7
            and 2.8 for the layout of split and packed rings.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import Any

from control.vhost_user import ADDRESS_END, MemoryRegion, Refused, VirtioFeature
from dataplane.commands import ring_areas
from shm.record import Record

CloseFd = Callable[[int], None]
Fstat = Callable[[int], os.stat_result]


class Region(Record):
    """One mapped stretch of guest memory. Map `fd` from 0 for `mmap_offset + size` bytes (a huge
    page file cannot be mapped from any offset); guest address `gpa` and ring address `uva` are at
    `mmap_offset` of it."""

    gpa: int
    size: int
    uva: int
    mmap_offset: int
    fd: int


class Ring(Record):
    """One virtqueue as the front-end described it. `base` is the number on the wire: split rings
    the next available index; packed rings available index and wrap bit in bits 0-15, used ones in
    16-31, which some front-ends leave 0 (DPDK): the device stops with nothing in flight, so the
    low half says it all."""

    index: int
    num: int = 0
    desc_uva: int | None = None
    avail_uva: int | None = None
    used_uva: int | None = None
    base: int = 0
    kick_fd: int | None = None
    call_fd: int | None = None
    err_fd: int | None = None
    enabled: bool = False
    started: bool = False
    problem: str = ""


_NOT_SHARED = (
    "is the guest's memory shared? (QEMU: memory-backend-memfd with share=on; "
    "Cloud Hypervisor: --memory shared=on)"
)
Place = tuple[int, int, int, int]


def _place(region: Region | MemoryRegion) -> Place:
    """What makes two announcements the same region."""
    return region.gpa, region.size, region.uva, region.mmap_offset


_RING_FDS = ("kick_fd", "call_fd", "err_fd")


def _binary_size(size: int) -> str:
    return f"{size >> 20} MiB" if size and size % (1 << 20) == 0 else f"{size} bytes"


class Device:
    """The state of one vhost-user connection. `close` and `fstat` are the system calls,
    replaceable for tests."""

    def __init__(
        self, rings: int, slots: int, close: CloseFd = os.close, fstat: Fstat = os.fstat
    ) -> None:
        self.rings = [Ring(index) for index in range(rings)]
        self.memory: tuple[Region, ...] = ()
        self._added_again: dict[Place, int] = {}
        self.features = 0
        self.features_known = False
        self.protocol_features = 0
        self.status = 0
        self.backend_fd: int | None = None
        self._slots = slots
        self._close = close
        self._fstat = fstat

    @property
    def packed(self) -> bool:
        return bool(self.features & VirtioFeature.RING_PACKED)

    def find(self, uva: int, size: int) -> Region | None:
        """The one region that holds all of `size` bytes at user address `uva`."""
        for region in self.memory:
            if region.uva <= uva and uva + size <= region.uva + region.size:
                return region
        return None

    # Guest memory

    def set_memory(self, wanted: list[MemoryRegion], fds: list[int]) -> None:
        """Replace all regions; takes over `fds` (and empties the list) only when every region is
        sound. No region at all is what a front-end has whose memory is not shared."""
        if not wanted:
            raise Refused(f"no memory region; {_NOT_SHARED}")
        if not fds:
            raise Refused(f"{len(wanted)} memory regions without a descriptor; {_NOT_SHARED}")
        if len(fds) != len(wanted):
            raise Refused(f"{len(fds)} descriptors for {len(wanted)} memory regions")
        table: list[Region] = []
        for number, (region, fd) in enumerate(zip(wanted, fds, strict=True)):
            self._check_region(f"memory region {number}", region, fd, table)
            table.append(Region(region.gpa, region.size, region.uva, region.mmap_offset, fd))
        fds.clear()
        self.drop_memory()
        self.memory = tuple(table)

    def add_region(self, region: MemoryRegion, fds: list[int]) -> None:
        """One region more; takes over the descriptor only when it is sound.

        QEMU adds every region once per queue pair (each pair is a vhost device to it) and removes
        it as often: an identical region is counted, not refused.
        """
        if not fds:
            raise Refused(f"a memory region without a descriptor; {_NOT_SHARED}")
        if any(_place(known) == _place(region) for known in self.memory):
            self._added_again[_place(region)] = self._added_again.get(_place(region), 0) + 1
            return
        if len(self.memory) >= self._slots:
            raise Refused(f"all {self._slots} memory slots are taken")
        self._check_region("memory region", region, fds[0], self.memory)
        added = Region(region.gpa, region.size, region.uva, region.mmap_offset, fds.pop())
        self.memory = (*self.memory, added)

    def remove_region(self, region: MemoryRegion) -> None:
        """The region with the same guest address, user address and size (the offset does not
        count)."""
        for known in self.memory:
            if (known.gpa, known.uva, known.size) == (region.gpa, region.uva, region.size):
                if again := self._added_again.pop(_place(known), 0):
                    if again > 1:
                        self._added_again[_place(known)] = again - 1
                    return
                self.memory = tuple(other for other in self.memory if other is not known)
                self._close(known.fd)
                return
        raise Refused(f"no memory region of {region.size:#x} bytes at {region.gpa:#x}")

    def drop_memory(self) -> None:
        """Forget all regions."""
        self._added_again = {}
        memory, self.memory = self.memory, ()
        for region in memory:
            self._close(region.fd)

    def _check_region(
        self, name: str, region: MemoryRegion, fd: int, others: tuple[Region, ...] | list[Region]
    ) -> None:
        if region.size == 0:
            raise Refused(f"{name} is empty")
        for start in (region.gpa, region.uva, region.mmap_offset):
            if start + region.size >= ADDRESS_END:  # mmap takes signed numbers
                raise Refused(f"{name} of {region.size:#x} bytes at {start:#x} is out of range")
        for other in others:
            if region.gpa < other.gpa + other.size and other.gpa < region.gpa + region.size:
                raise Refused(f"{name} at {region.gpa:#x} overlaps the one at {other.gpa:#x}")
        try:
            status = self._fstat(fd)
        except OSError as error:
            raise Refused(f"{name}: {error.strerror}") from error
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISCHR(status.st_mode)):
            raise Refused(f"{name}: its descriptor is no file that can be mapped")
        needed = region.mmap_offset + region.size
        # Reading a mapping beyond the end of its file is SIGBUS. Only regular files (memfd,
        # hugetlbfs, tmpfs) have an end that fstat knows.
        if stat.S_ISREG(status.st_mode) and status.st_size < needed:
            raise Refused(
                f"{name} needs {_binary_size(needed)} of a file that has only "
                f"{_binary_size(status.st_size)}; was share=on given?"
            )

    # Rings

    def change_ring(self, index: int, **changes: Any) -> None:
        """Set fields of a ring; a descriptor that is replaced is closed."""
        ring = self.rings[index]
        self.rings[index] = ring.replaced(**changes)
        for name in _RING_FDS:
            held = getattr(ring, name)
            if held is not None and held != getattr(self.rings[index], name):
                self._close(held)

    def waiting(self, index: int) -> bool:
        """Whether something this ring needs has not been said yet."""
        ring = self.rings[index]
        told = ring.num and ring.desc_uva is not None and ring.kick_fd is not None
        return not (told and self.features_known and self.memory)

    def problem(self, index: int) -> str:
        """Why this ring, with all it needs there, must not run; or ""."""
        ring = self.rings[index]
        if not self.features & VirtioFeature.VERSION_1:
            return "the guest's driver is a legacy one (VERSION_1 is not among its features)"
        if self.packed:
            if ring.base & 0x7FFF >= ring.num:
                return f"base {ring.base:#x} is beyond the {ring.num} slots of the ring"
        else:
            if ring.num & (ring.num - 1):
                return f"size {ring.num} is not a power of two"
            if ring.base > 0xFFFF:
                return f"base {ring.base:#x} is beyond 16 bits"
        places = zip(
            ("descriptor", "driver (avail)", "device (used)"),
            (ring.desc_uva, ring.avail_uva, ring.used_uva),
            ring_areas(ring.num, self.packed),
            strict=True,
        )
        for name, uva, (size, alignment) in places:
            if uva is None or uva % alignment:
                return f"{name} area at {uva or 0:#x} is not aligned to {alignment} bytes"
            if self.find(uva, size) is None:
                return f"{name} area of {size} bytes at {uva:#x} is not inside one memory region"
        return ""

    # The rest

    def set_backend_fd(self, fd: int | None) -> None:
        """The channel for our own requests; the former one is closed."""
        held, self.backend_fd = self.backend_fd, fd
        if held is not None:
            self._close(held)

    def descriptors(self) -> set[int]:
        """All that it owns."""
        fds = [self.backend_fd, *(region.fd for region in self.memory)]
        fds += [getattr(ring, name) for ring in self.rings for name in _RING_FDS]
        return {fd for fd in fds if fd is not None}

    def release(self) -> None:
        """Close every descriptor and be as new."""
        self.drop_memory()
        self.set_backend_fd(None)
        for ring in self.rings:
            self.change_ring(ring.index, kick_fd=None, call_fd=None, err_fd=None)
        self.rings = [Ring(ring.index) for ring in self.rings]
        self.features = self.protocol_features = self.status = 0
        self.features_known = False
