"""Guest memory and the driver side of split virtqueues, in plain Python over shared memory files.

Independent of the product on purpose: written from virtio 1.3 section 2.7, so that the two sides
meet only in shared memory, as a guest kernel and a device do. Packed virtqueues are in
vring_packed.py; what does not depend on the format is in `Buffers`.

Memory is one memfd per region, guest addresses contiguous from region to region (a buffer may
therefore cross a border), front-end addresses and mmap offsets deliberately unrelated to them. The
last region is the large one and holds rings and buffers; the regions before it are one MiB each
and hold only buffers laid across their borders.

Every descriptor head owns a *slot*: 128 KiB, whose first 32 KiB are the indirect table of that
head and whose rest are its buffers, scattered with gaps so that a back-end that takes descriptors
for contiguous memory is caught. Behind each buffer that the device may write stands a guard, and of
what it may only read there is a copy: both are compared when the buffer comes back.

With `in_order` (VIRTIO_F_IN_ORDER) buffers come back in the order they were offered, and naming one
returns all before it, those written completely (2.7.9, 2.8.8).

Index words go through a native ``memoryview`` cast, hence one aligned 16-bit access each. `fence`
orders an index store before the load that decides about a notification; a lock operation is a full
barrier on the machines we run on.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

NEXT, WRITE, INDIRECT = 1, 2, 4
DESC = struct.Struct("<QIHH")
NO_INTERRUPT = NO_NOTIFY = 1
SLOT, TABLE = 128 << 10, 32 << 10
SLOTS = 1024  # at most: a larger ring has no more buffers than these out at a time
GUARD = b"\xc5"
SMALL_REGION = 1 << 20
PAGE = 4096

_lock = threading.Lock()


def fence() -> None:
    """Full memory barrier."""
    with _lock:
        pass


class RingFault(AssertionError):
    """The back-end broke a rule of the virtqueue."""


@dataclass
class Region:
    """One memory region as SET_MEM_TABLE describes it, and our own mapping of it."""

    gpa: int
    size: int
    user: int
    offset: int
    fd: int
    map: mmap.mmap

    def entry(self) -> bytes:
        """The 32 bytes of a vhost-user memory region description."""
        return struct.pack("<QQQQ", self.gpa, self.size, self.user, self.offset)


class Memory:
    """Guest memory: `main` bytes for rings and buffers, preceded by `borders` small regions."""

    def __init__(self, main: int, borders: int = 0) -> None:
        self.regions: list[Region] = []
        self._free = 0
        gpa = 0x10000
        for i, size in enumerate([SMALL_REGION] * borders + [_align(main, PAGE)]):
            offset = PAGE * (i % 3)
            fd = os.memfd_create(f"guest{i}", os.MFD_CLOEXEC)
            os.ftruncate(fd, offset + size)
            view = mmap.mmap(fd, offset + size)
            user = (0x7E0000000000 - (i << 36)) + gpa
            self.regions.append(Region(gpa, size, user, offset, fd, view))
            gpa += size
        self.end = gpa
        self._free = self.regions[-1].gpa + PAGE

    def region(self, gpa: int) -> Region:
        for region in self.regions:
            if region.gpa <= gpa < region.gpa + region.size:
                return region
        raise ValueError(f"{gpa:#x} is outside guest memory")

    def user(self, gpa: int) -> int:
        """The front-end address of `gpa`, as SET_VRING_ADDR wants it."""
        region = self.region(gpa)
        return region.user + gpa - region.gpa

    def alloc(self, size: int, align: int = PAGE) -> int:
        """`size` bytes of the main region, never freed; returns their guest address."""
        gpa = _align(self._free, align)
        self._free = gpa + size
        if self._free > self.end - PAGE:
            raise MemoryError(f"guest memory of {self.regions[-1].size} bytes is used up")
        return gpa

    def borders(self) -> list[int]:
        """The guest addresses at which a region ends and the next begins."""
        return [region.gpa for region in self.regions[1:]]

    def write(self, gpa: int, data: bytes) -> None:
        while data:
            region = self.region(gpa)
            at = gpa - region.gpa
            part = data[: region.size - at]
            region.map[region.offset + at : region.offset + at + len(part)] = part
            gpa, data = gpa + len(part), data[len(part) :]

    def read(self, gpa: int, size: int) -> bytes:
        parts = []
        while size > 0:
            region = self.region(gpa)
            at = gpa - region.gpa
            part = min(size, region.size - at)
            parts.append(region.map[region.offset + at : region.offset + at + part])
            gpa, size = gpa + part, size - part
        return b"".join(parts)

    def words(self, gpa: int, count: int) -> memoryview:
        """`count` 16-bit words at `gpa` (even, within one region) as a native view."""
        region = self.region(gpa)
        at = region.offset + gpa - region.gpa
        return memoryview(region.map)[at : at + 2 * count].cast("H")

    def close(self) -> None:
        """Give up the files; the mappings go when the last view of them does."""
        for region in self.regions:
            os.close(region.fd)


@dataclass(frozen=True)
class Layout:
    """How the bytes of one packet, virtio-net header included, are cut into descriptors.

    `sizes` are the lengths of the first descriptors; whatever remains goes into one more. `border`
    is the index of a region border the bytes are laid across, contiguous, with `before` bytes
    (default half) on its near side.
    """

    sizes: tuple[int, ...] = ()
    indirect: bool = False
    border: int | None = None
    before: int | None = None

    def lengths(self, total: int) -> list[int]:
        lengths = []
        for size in self.sizes:
            if size >= total:
                break
            lengths.append(size)
            total -= size
        if total:
            lengths.append(total)
        return lengths


ONE = Layout()


@dataclass(frozen=True)
class Segment:
    """One descriptor to be: guest address, length in bytes, device-writable or not; `guard` bytes
    of `GUARD` follow it.
    """

    gpa: int
    length: int
    write: bool = False
    guard: int = 0


@dataclass(frozen=True)
class Chain:
    """A buffer the device has: the places it took of `free`, the caller's token, and what the
    device-readable segments held.
    """

    ids: list[int]
    segments: list[Segment]
    token: Any = None
    readable: tuple[bytes, ...] = ()

    @property
    def room(self) -> int:
        """Bytes the device may write."""
        return sum(segment.length for segment in self.segments if segment.write)


Desc = tuple[int, int, int, int]
"""A raw descriptor: address, length, flags, and what follows it, counted within its chain."""

Taken = tuple[int, int, list[Segment], Any]
"""A buffer that came back: its name, bytes written, segments, token."""


class Buffers:
    """What both ring formats have: free descriptors, slots, and the buffers that are out.

    `free` has an entry for each free descriptor; its first names the slot of the next buffer.
    `chains` has the buffers that are out by the name the device returns them under, oldest first.
    """

    FIRST = 0
    """SET_VRING_BASE of a ring that was never used."""

    def __init__(self, memory: Memory, num: int, slots: bool) -> None:
        self.memory, self.num = memory, num
        self.event_idx = self.in_order = False
        self._slots = memory.alloc(SLOT * min(num, SLOTS)) if slots else 0
        self.free: list[int] = []
        self.chains: dict[int, Chain] = {}

    def slot(self, head: int) -> int:
        """Guest address of the buffers that belong to this entry of `free`."""
        return self._table(head) + TABLE

    def _table(self, head: int) -> int:
        return self._slots + head % SLOTS * SLOT

    def scatter(self, head: int, lengths: Sequence[int], write: bool) -> list[Segment]:
        """Segments of the given lengths in the slot of `head`: in turn from its front and its
        back, with gaps.
        """
        shared = [one for one in self.chains.values() if self.num > SLOTS]
        if any((one.ids[0] - head) % SLOTS == 0 for one in shared):
            raise BlockingIOError(f"slot {head % SLOTS} is in use")
        front = self.slot(head)
        back = front + SLOT - TABLE
        segments = []
        for i, length in enumerate(lengths):
            if i % 2 == 0:
                segments.append(Segment(front, length, write, 3 * write))
                front += length + 3
            else:
                back -= length + 5
                segments.append(Segment(back, length, write, 5 * write))
        if front > back:
            raise ValueError(f"buffers of {sum(lengths)} bytes do not fit a slot")
        for segment in segments:
            self.memory.write(segment.gpa + segment.length, GUARD * segment.guard)
        return segments

    def _claim(self, count: int) -> list[int]:
        """Take `count` free descriptors."""
        if len(self.free) < count:
            raise BlockingIOError(f"{count} descriptors wanted, {len(self.free)} free")
        ids = self.free[:count]
        del self.free[:count]
        return ids

    def _chain(self, ids: list[int], segments: Sequence[Segment], token: Any) -> Chain:
        read = self.memory.read
        readable = tuple(read(one.gpa, one.length) for one in segments if not one.write)
        return Chain(ids, list(segments), token, readable)

    def _returned(self, name: int) -> list[int]:
        """The buffers that come back with `name`: it alone, or in order all older ones before."""
        if name not in self.chains:
            raise RingFault(f"buffer {name} is used, which is not out")
        if not self.in_order:
            return [name]
        names = list(self.chains)
        return names[: names.index(name) + 1]

    def _take(self, name: int, length: int | None) -> Taken:
        """Take a buffer back into which the device wrote `length` bytes, or None: all there is
        room for.
        """
        chain = self.chains.pop(name)
        if length is None:
            length = chain.room
        if length > chain.room:
            raise RingFault(f"used length {length} for {chain.room} writable bytes")
        for segment in chain.segments:
            found = self.memory.read(segment.gpa + segment.length, segment.guard)
            if found != GUARD * segment.guard:
                raise RingFault(f"buffer {name} was written beyond {segment}")
        unwritable = [segment for segment in chain.segments if not segment.write]
        for segment, data in zip(unwritable, chain.readable, strict=False):
            if self.memory.read(segment.gpa, segment.length) != data:
                raise RingFault(f"buffer {name} was written in {segment}")
        self.free.extend(chain.ids)
        return name, length, chain.segments, chain.token


class Ring(Buffers):
    """The driver side of one split virtqueue of `num` descriptors in `memory`."""

    def __init__(self, memory: Memory, num: int, *, slots: bool = True) -> None:
        super().__init__(memory, num, slots)
        self.desc = memory.alloc(16 * num, 16)
        self.avail = memory.alloc(6 + 2 * num, 2)
        self.used = memory.alloc(6 + 8 * num, 4)
        self._avail = memory.words(self.avail, 3 + num)
        self._used = memory.words(self.used, 3 + 4 * num)
        self.reset()

    def reset(self, base: int | None = None) -> None:
        """Everything as a driver sets it up at first, both indices at `base`; buffers that are out
        are forgotten.
        """
        self.memory.write(self.desc, bytes(16 * self.num))
        self.memory.write(self.avail, bytes(6 + 2 * self.num))
        self.memory.write(self.used, bytes(6 + 8 * self.num))
        self.free = list(range(self.num))
        self.chains.clear()
        base = self.FIRST if base is None else base
        self.next_avail = self.published = self.next_used = base
        self._avail[1] = self._used[1] = base

    # --- words shared with the device ---

    @property
    def used_idx(self) -> int:
        """How many buffers the device has returned so far, modulo 65536."""
        return self._used[1]

    @property
    def base(self) -> int:
        """SET_VRING_BASE of a device that goes on behind the last used buffer."""
        return self.used_idx

    def shared(self) -> bytes:
        """What the device may write."""
        return self.memory.read(self.used, 6 + 8 * self.num)

    @property
    def avail_event(self) -> int:
        return self._used[2 + 4 * self.num]

    @property
    def no_notify(self) -> bool:
        return bool(self._used[0] & NO_NOTIFY)

    def set_avail_idx(self, value: int) -> None:
        fence()
        self._avail[1] = value & 0xFFFF

    def want_calls(self, wanted: bool) -> None:
        """Ask for a call at the next used buffer, or for none (the device may still send some)."""
        if self.event_idx:
            near = self.next_used if wanted else self.next_used - 1
            self._avail[2 + self.num] = near & 0xFFFF
            self._avail[0] = 0
        else:
            self._avail[0] = 0 if wanted else NO_INTERRUPT
        fence()

    def call_at(self, ahead: int) -> None:
        """Ask for a call `ahead` buffers after the next used one (with `event_idx`)."""
        self._avail[2 + self.num] = (self.next_used + ahead) & 0xFFFF
        self._avail[0] = 0
        fence()

    # --- offering ---

    def add(self, segments: Sequence[Segment], *, indirect: bool = False, token: Any = None) -> int:
        """Put one chain into the available ring, unseen by the device until `publish`; returns its
        head.
        """
        ids = self._claim(1 if indirect else len(segments))
        if indirect:
            table = self._table(ids[0])
            self.memory.write(table, chain_bytes(segments, range(len(segments))))
            self.write_desc(ids[0], table, 16 * len(segments), INDIRECT, 0)
        else:
            for at, desc in zip(ids, DESC.iter_unpack(chain_bytes(segments, ids)), strict=True):
                self.write_desc(at, *desc)
        self.chains[ids[0]] = self._chain(ids, segments, token)
        self.put_avail(ids[0])
        return ids[0]

    def raw_table(self, descs: Sequence[Desc]) -> bytes:
        """An indirect table of raw descriptors."""
        return b"".join(DESC.pack(*desc) for desc in descs)

    def offer(self, descs: Sequence[Desc]) -> int:
        """Like `add`, a chain of raw descriptors; `following` is raw where it is outside the
        chain.
        """
        ids = self._claim(len(descs))
        for at, (addr, length, flags, following) in zip(ids, descs, strict=True):
            link = ids[following] if following < len(ids) else following
            self.write_desc(at, addr & (1 << 64) - 1, length, flags, link)
        self.chains[ids[0]] = Chain(ids, raw_segments(descs))
        self.put_avail(ids[0])
        return ids[0]

    def write_desc(self, index: int, addr: int, length: int, flags: int, following: int) -> None:
        self.memory.write(self.desc + 16 * index, DESC.pack(addr, length, flags, following))

    def put_avail(self, head: int) -> None:
        """Write a raw head index into the next available entry."""
        self._avail[2 + self.next_avail % self.num] = head
        self.next_avail = (self.next_avail + 1) & 0xFFFF

    def publish(self) -> bool:
        """Show the device everything added so far; returns whether it wants to be kicked (virtio
        2.7.7.2, 2.7.10).
        """
        old, new = self.published, self.next_avail
        self.set_avail_idx(new)
        self.published = new
        fence()
        if self.event_idx:
            return (new - self.avail_event - 1) & 0xFFFF < (new - old) & 0xFFFF
        return old != new and not self.no_notify

    # --- taking back ---

    def pending(self) -> int:
        """Used buffers not yet taken back."""
        return (self.used_idx - self.next_used) & 0xFFFF

    def reap(self) -> list[Taken]:
        """(head, bytes written, segments, token) of every buffer the device has returned since the
        last call.
        """
        taken: list[Taken] = []
        if self.pending() > len(self.chains):
            raise RingFault(f"used index says {self.pending()} buffers, {len(self.chains)} are out")
        while self.pending():
            fence()
            at = 2 + 4 * (self.next_used % self.num)
            head = self._used[at] | self._used[at + 1] << 16
            length = self._used[at + 2] | self._used[at + 3] << 16
            heads = self._returned(head)
            if len(heads) > self.pending():
                raise RingFault(f"used element {head} jumps over {heads[self.pending() :]}")
            taken += [self._take(one, length if one == head else None) for one in heads]
            self.next_used = (self.next_used + len(heads)) & 0xFFFF
        return taken


def raw_segments(descs: Sequence[Desc]) -> list[Segment]:
    """What raw descriptors describe, taken at their word."""
    return [Segment(addr, length, bool(flags & WRITE)) for addr, length, flags, _ in descs]


def chain_bytes(segments: Sequence[Segment], ids: Sequence[int]) -> bytes:
    """The descriptors of `segments` chained through `ids`, as an indirect table holds them."""
    table = bytearray()
    for i, segment in enumerate(segments):
        last = i == len(segments) - 1
        flags = (WRITE if segment.write else 0) | (0 if last else NEXT)
        table += DESC.pack(segment.gpa, segment.length, flags, 0 if last else ids[i + 1])
    return bytes(table)


def _align(value: int, align: int) -> int:
    return -(-value // align) * align
