"""The driver side of packed virtqueues, in plain Python over shared memory files.

Written from virtio 1.3 section 2.8 alone, with the interface of `vring.Ring`. `desc` is the
descriptor ring, `avail` the driver's event suppression area, `used` the device's: the names
vhost-user gives the three addresses.

Places in the ring are counted on for ever: place p is descriptor p mod num in lap p div num, and
the wrap counter of a lap is 1 in the first and changes from lap to lap. So a wrap counter is never
kept, only computed, and which descriptors an event names is a question of equality.

A buffer's id has nothing to do with its place: any 16 bits may be one (the device only echoes
it), so ids are drawn from all of them. In descriptors before the last of a chain, and in indirect
tables, where the device must not look for one (2.8.6, 2.8.7), stands `NO_ID`.

Strict: a used descriptor must stand exactly where the chain lengths of those before it put it
(2.8.6), carry an id that is out, both its bits of the lap, no other flag but WRITE, and WRITE if
and only if something was written (2.8.3, 2.8.4). Descriptors that are skipped must be as they were
offered. Whatever is wrong raises `RingFault` at the next `pending` or `reap`.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from typing import Any

from vring import (
    DESC,
    INDIRECT,
    NEXT,
    WRITE,
    Buffers,
    Chain,
    Desc,
    Memory,
    RingFault,
    Segment,
    Taken,
    fence,
    raw_segments,
)

AVAIL, USED = 1 << 7, 1 << 15
ENABLE, DISABLE, AT_DESC = 0, 1, 2
NO_ID = 0xDEAD
SPACE = 64  # bytes behind the descriptor ring that nobody may write


class PackedRing(Buffers):
    """The driver side of one packed virtqueue of `num` descriptors in `memory`; any `num` up to
    32768 will do.
    """

    FIRST = 0x80008000

    def __init__(self, memory: Memory, num: int, *, slots: bool = True) -> None:
        super().__init__(memory, num, slots)
        self.desc = memory.alloc(16 * num + SPACE, 16)
        self.avail = memory.alloc(4, 4)
        self.used = memory.alloc(4, 4)
        ids = [one for one in range(1 << 16) if one != NO_ID]
        self._ids = [0xFFFF, 0, *random.Random(num).sample(ids[1:-1], max(0, num - 2))][:num]
        self._words = memory.words(self.desc, 8 * num)
        self._areas = [memory.words(at, 2).cast("B").cast("I") for at in (self.avail, self.used)]
        self.reset()

    def reset(self, base: int | None = None) -> None:
        """Everything as a driver sets it up at first, the device's next descriptors those of
        `base` (as SET_VRING_BASE says it: the used half may be missing); buffers that are out are
        forgotten.
        """
        base = self.FIRST if base is None else base
        self.next_avail = self.published = self.next_used = self._looked_at = self._place(base)
        self.used_count = 0
        self.free = list(range(self.num))
        self.chains.clear()
        self._found: deque[tuple[list[int], int]] = deque()
        self._offered: dict[int, bytes] = {}
        self._hidden: tuple[int, int] | None = None
        for index in range(self.num):
            lap_behind = self.next_avail - self.num + (index - self.next_avail) % self.num
            self.memory.write(self.desc + 16 * index, bytes(16))
            self._words[8 * index + 7] = (AVAIL | USED) * self.wrap(lap_behind)
        self.memory.write(self.desc + 16 * self.num, b"\xa5" * SPACE)
        self._areas[0][0] = self._areas[1][0] = self._asked = 0

    # --- places ---

    def wrap(self, place: int) -> int:
        """The wrap counter while this place is written."""
        return (place // self.num + 1) & 1

    def index_wrap(self, place: int) -> int:
        """A place as event suppression areas and bases name it: index, and wrap counter in bit
        15.
        """
        return place % self.num | self.wrap(place) << 15

    def _place(self, base: int) -> int:
        return (base & 0x7FFF) + (0 if base & 0x8000 else self.num)

    @property
    def base(self) -> int:
        """SET_VRING_BASE of a device that goes on behind the last used buffer."""
        self._look()
        return self.index_wrap(self._looked_at) * 0x10001

    @property
    def used_idx(self) -> int:
        """How many buffers the device has returned so far, modulo 65536."""
        return (self.used_count + self.pending()) & 0xFFFF

    def shared(self) -> bytes:
        """What the device may write."""
        return self.memory.read(self.desc, 16 * self.num) + self.memory.read(self.used, 4)

    # --- event suppression ---

    def suppress(self, value: int) -> None:
        """Write the driver's event suppression area: index and wrap counter, flags above them."""
        self._areas[0][0] = self._asked = value
        fence()

    def want_calls(self, wanted: bool) -> None:
        """Ask for a call at the next used buffer, or for none (the device may still send some)."""
        if wanted and self.event_idx:
            self.call_at(0)
        else:
            self.suppress((ENABLE if wanted else DISABLE) << 16)

    def call_at(self, ahead: int) -> None:
        """Ask for a call once `ahead` descriptors more than the next one are used (with
        `event_idx`).
        """
        self.suppress(self.index_wrap(self.next_used + ahead) | AT_DESC << 16)

    def _kick_wanted(self, old: int, new: int) -> bool:
        """Whether the device wants to know of the places from `old` to before `new` (2.8.10)."""
        area = self._areas[1][0]
        event, flags = area & 0xFFFF, area >> 16
        if flags not in (ENABLE, DISABLE, AT_DESC) or (flags == AT_DESC and not self.event_idx):
            raise RingFault(f"the device suppresses events with flags {flags:#x}")
        if flags != AT_DESC:
            return flags == ENABLE
        if event & 0x7FFF >= self.num:
            raise RingFault(f"the device waits for descriptor {event & 0x7FFF} of {self.num}")
        return any(self.index_wrap(place) == event for place in range(old, new))

    # --- offering ---

    def add(self, segments: Sequence[Segment], *, indirect: bool = False, token: Any = None) -> int:
        """Put one chain into the ring, unseen by the device until `publish`; returns its id."""
        if indirect:
            ids = self._claim(1)
            table = self._table(ids[0])
            entries = [DESC.pack(s.gpa, s.length, NO_ID, WRITE * s.write) for s in segments]
            self.memory.write(table, b"".join(entries))
            descs = [(table, 16 * len(segments), INDIRECT, 0)]
        else:
            ids = self._claim(len(segments))
            flags = [WRITE * segment.write | NEXT for segment in segments]
            flags[-1] &= ~NEXT
            descs = [(s.gpa, s.length, f, 0) for s, f in zip(segments, flags, strict=True)]
        return self._put(descs, self._chain(ids, segments, token))

    def raw_table(self, descs: Sequence[Desc]) -> bytes:
        """An indirect table of raw descriptors; `following` becomes the id nobody looks at."""
        return b"".join(DESC.pack(at, size, name, flags) for at, size, flags, name in descs)

    def offer(self, descs: Sequence[Desc]) -> int:
        """Like `add`, a chain of raw descriptors; there is nothing to follow but the next."""
        return self._put(descs, Chain(self._claim(len(descs)), raw_segments(descs)))

    def _put(self, descs: Sequence[Desc], chain: Chain) -> int:
        name = self._ids[chain.ids[0]]
        names = [NO_ID] * (len(descs) - 1) + [name]
        self.put_descs([(*desc[:3], one) for desc, one in zip(descs, names, strict=True)])
        self.chains[name] = chain
        return name

    def put_descs(self, descs: Sequence[Desc]) -> None:
        """Write the next descriptors of the ring (address, length, flags, id) and make them
        available, the first one last; but the first since `publish` waits for it.
        """
        flags = {}
        for place, (addr, length, bits, name) in enumerate(descs, self.next_avail):
            flags[place] = bits ^ (AVAIL if self.wrap(place) else USED)
            raw = DESC.pack(addr & (1 << 64) - 1, length, name, flags[place])
            self._offered[place % self.num] = raw
            self.memory.write(self.desc + place % self.num * 16, raw[:14])
        if not self._hidden:
            self._hidden = (self.next_avail, flags.pop(self.next_avail))
        for place in reversed(flags):
            self.set_flags(place, flags[place])
        self.next_avail += len(descs)

    def set_flags(self, place: int, flags: int) -> None:
        """Write the flags of a descriptor, after all else."""
        fence()
        self._words[8 * (place % self.num) + 7] = flags

    def publish(self) -> bool:
        """Show the device everything added so far; returns whether it wants to be kicked (virtio
        2.8.10, 2.8.21.3.1).
        """
        if self._hidden:
            self.set_flags(*self._hidden)
        old, new = self.published, self.next_avail
        self._hidden, self.published = None, new
        fence()
        return old != new and self._kick_wanted(old, new)

    # --- taking back ---

    def pending(self) -> int:
        """Used buffers not yet taken back."""
        self._look()
        return sum(len(names) for names, _ in self._found)

    def reap(self) -> list[Taken]:
        """(id, bytes written, segments, token) of every buffer the device has returned since the
        last call.
        """
        self._look()
        taken: list[Taken] = []
        while self._found:
            names, length = self._found.popleft()
            self.next_used += sum(len(self.chains[name].ids) for name in names)
            taken += [self._take(name, length if name == names[-1] else None) for name in names]
        self.used_count += len(taken)
        return taken

    def _look(self) -> None:
        """Find the used descriptors written since the last look."""
        found = len(self._found)
        while self._is_used(self._looked_at):
            fence()
            at = self._looked_at % self.num
            _, length, name, flags = DESC.unpack(self.memory.read(self.desc + 16 * at, 16))
            if flags & ~(AVAIL | USED | WRITE) or bool(flags & WRITE) != bool(length):
                raise RingFault(f"used descriptor {at}: flags {flags:#x}, length {length}")
            names = self._newly_returned(name)
            size = sum(len(self.chains[one].ids) for one in names)
            self._check_skipped(range(self._looked_at + 1, self._looked_at + size))
            self._looked_at += size
            self._found.append((names, length))
        if self._areas[0][0] != self._asked:
            raise RingFault("the device wrote the driver's event suppression area")
        if len(self._found) != found:
            end = self.memory.read(self.desc + 16 * self.num, SPACE)
            if end != b"\xa5" * SPACE:
                raise RingFault("the device wrote behind the descriptor ring")

    def _is_used(self, place: int) -> bool:
        """Whether the descriptor bears the marks of the device in this lap (2.8.1)."""
        flags = self._words[8 * (place % self.num) + 7]
        avail, used = (bool(flags & bit) == self.wrap(place) for bit in (AVAIL, USED))
        if avail and used and place >= self.published:
            raise RingFault(f"descriptor {place % self.num} is used, which was not offered")
        if used and not avail and place < self.published:
            raise RingFault(f"descriptor {place % self.num} is used, but AVAIL is of the other lap")
        return avail and used

    def _newly_returned(self, name: int) -> list[int]:
        names = self._returned(name)
        known = {one for names, _ in self._found for one in names}
        if name in known:  # and not yet taken back
            raise RingFault(f"buffer {name} is used twice")
        return [one for one in names if one not in known]

    def _check_skipped(self, places: range) -> None:
        """Descriptors the device skips stay as they were offered (2.8.6)."""
        for place in places:
            at = place % self.num
            if self.memory.read(self.desc + 16 * at, 16) != self._offered[at]:
                raise RingFault(f"descriptor {at}, which is skipped, was written")
