"""The device side of a packed virtqueue in plain Python, written from virtio 1.3, 2.8 alone.

Places and wrap counters are as the text has them, one descriptor at a time. It takes nothing a
driver must not do: a descriptor that breaks a rule ends the test.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from vring import fence

DESC = struct.Struct("@QIHH")  # address, length, buffer id, flags
F_NEXT, F_WRITE, F_INDIRECT, F_AVAIL, F_USED = 1, 2, 4, 1 << 7, 1 << 15
ENABLE, DISABLE, AT_DESC = 0, 1, 2
WRAP = 1 << 15

Memory = Callable[[int, int], memoryview]


def store(word: memoryview, value: int) -> None:
    """Write a 16-bit word in one piece. (struct.pack_into clears it first, for all to see.)"""
    word.cast("H")[0] = value


class Buffer(NamedTuple):
    """A buffer of the driver's: `pieces` are (address, length); `places` it fills in the ring."""

    id: int
    pieces: list[tuple[int, int]]
    places: int


@dataclass
class Cursor:
    """A place in the ring and the wrap counter that belongs to it."""

    num: int
    place: int = 0
    wrap: int = 1

    def step(self) -> None:
        self.place += 1
        if self.place == self.num:
            self.place, self.wrap = 0, self.wrap ^ 1

    @property
    def word(self) -> int:
        return self.place | (WRAP if self.wrap else 0)


@dataclass
class PackedRing:
    """Addresses are whatever `memory` understands: memory(address, size) are these bytes."""

    memory: Memory
    num: int
    desc: int
    driver: int
    device: int
    writable: bool
    indirect: bool
    event_idx: bool
    avail: Cursor = field(init=False)
    used: Cursor = field(init=False)
    passed: set[int] = field(default_factory=set)
    written: list[tuple[int, bytes]] = field(default_factory=list)
    out: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.avail, self.used = Cursor(self.num), Cursor(self.num)

    def start(self, base: int) -> None:
        """As SET_VRING_BASE gives it."""
        for shift, cursor in ((0, self.avail), (16, self.used)):
            cursor.place, cursor.wrap = base >> shift & 0x7FFF, base >> shift >> 15 & 1

    @property
    def base(self) -> int:
        """As GET_VRING_BASE gives it."""
        return self.avail.word | self.used.word << 16

    # --- buffers of the driver's ---

    def _word(self, address: int, layout: str = "@H") -> int:
        return int(struct.unpack(layout, self.memory(address, struct.calcsize(layout)))[0])

    def waiting(self) -> bool:
        """Whether the driver has offered a buffer."""
        flags = self._word(self.desc + 16 * self.avail.place + 14)
        return (flags & F_AVAIL != 0, flags & F_USED != 0) == (
            self.avail.wrap == 1,
            self.avail.wrap == 0,
        )

    def pop(self) -> Buffer | None:
        """The next buffer."""
        if not self.waiting():
            return None
        pieces: list[tuple[int, int]] = []
        for places in range(1, self.num + 1):
            entry = self.memory(self.desc + 16 * self.avail.place, 16)
            address, length, number, flags = DESC.unpack(entry)
            assert flags & ~(F_AVAIL | F_USED | F_NEXT | F_WRITE | F_INDIRECT) == 0
            assert (flags & F_AVAIL != 0) != (flags & F_USED != 0)
            self.avail.step()
            if flags & F_INDIRECT:
                assert self.indirect and not flags & F_NEXT and places == 1
                pieces += self._table(address, length)
            else:
                assert bool(flags & F_WRITE) == self.writable
                pieces.append((address, length))
            if not flags & F_NEXT:
                assert number not in self.out, f"buffer id {number} is offered twice"
                self.out.add(number)
                return Buffer(number, pieces, places)
        raise AssertionError("a chain longer than the ring")

    def _table(self, address: int, length: int) -> list[tuple[int, int]]:
        assert length > 0 and length % 16 == 0
        pieces = []
        for at in range(address, address + length, 16):
            piece, size, _, flags = DESC.unpack(self.memory(at, 16))
            assert flags == (F_WRITE if self.writable else 0), "the one flag a table may have"
            pieces.append((piece, size))
        return pieces

    def unpop(self, *buffers: Buffer) -> None:
        """Put back the buffers taken last."""
        for buffer in buffers:
            self.out.remove(buffer.id)
            for _ in range(buffer.places):
                if self.avail.place == 0:
                    self.avail.place, self.avail.wrap = self.num, self.avail.wrap ^ 1
                self.avail.place -= 1

    # --- used ones ---

    def put(self, written: int, *batch: Buffer) -> None:
        """Return a buffer, or a batch in the order it was taken, naming the last one only. The
        driver sees it after publish()."""
        flags = (F_AVAIL | F_USED) if self.used.wrap else 0
        flags |= F_WRITE if written else 0
        self.written.append((self.used.place, struct.pack("@IHH", written, batch[-1].id, flags)))
        for buffer in batch:
            self.out.remove(buffer.id)
            for _ in range(buffer.places):
                self.passed.add(self.used.word)
                self.used.step()

    def publish(self) -> bool:
        """Write what was put, the first one's flags last; whether the driver wants a call."""
        for place, data in reversed(self.written):
            entry = self.memory(self.desc + 16 * place, 16)
            entry[8:14] = data[:6]
            store(entry[14:], *struct.unpack_from("@H", data, 6))
        fence()  # else the processor reads the driver's wish before the driver can see them
        self.written.clear()
        passed, self.passed = self.passed, set()
        wish = self._word(self.driver, "@I")
        flags, event = wish >> 16, wish & 0xFFFF
        assert flags in ((ENABLE, DISABLE, AT_DESC) if self.event_idx else (ENABLE, DISABLE))
        if flags == AT_DESC:
            assert event & ~WRAP < self.num
            return event in passed
        return bool(passed) and flags == ENABLE

    # --- kicks ---

    def suppress_kicks(self) -> None:
        store(self.memory(self.device + 2, 2), DISABLE)

    def ask_for_kick(self) -> bool:
        """Ask to be kicked for the next buffer; False when it is there already."""
        store(self.memory(self.device, 2), self.avail.word if self.event_idx else 0)
        store(self.memory(self.device + 2, 2), AT_DESC if self.event_idx else ENABLE)
        fence()
        return not self.waiting()
