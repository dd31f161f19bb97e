"""The device side of a split virtqueue in plain Python, written from virtio 1.3, 2.7 alone.

The counterpart of packeddevice.py, with the same words. A driver that breaks a rule ends the test.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from packeddevice import F_INDIRECT, F_NEXT, F_WRITE, Buffer, Memory, store
from vring import fence

DESC = struct.Struct("@QIHH")  # address, length, flags, next
NO_INTERRUPT = 1


@dataclass
class SplitRing:
    """Addresses are whatever `memory` understands: memory(address, size) are these bytes."""

    memory: Memory
    num: int
    desc: int
    driver: int
    device: int
    writable: bool
    indirect: bool
    event_idx: bool
    avail: int = 0
    used: int = 0
    shown: int = 0
    out: set[int] = field(default_factory=set)

    def start(self, base: int) -> None:
        """As SET_VRING_BASE gives it."""
        self.avail = self.used = self.shown = base

    @property
    def base(self) -> int:
        """As GET_VRING_BASE gives it."""
        return self.avail

    def _word(self, address: int) -> int:
        return int(struct.unpack("@H", self.memory(address, 2))[0])

    def _put(self, address: int, value: int) -> None:
        store(self.memory(address, 2), value & 0xFFFF)

    def waiting(self) -> bool:
        """Whether the driver has offered a buffer."""
        return self._word(self.driver + 2) != self.avail

    def pop(self) -> Buffer | None:
        """The next buffer."""
        if not self.waiting():
            return None
        head = self._word(self.driver + 4 + 2 * (self.avail % self.num))
        assert head not in self.out, f"descriptor {head} is offered twice"
        self.avail = (self.avail + 1) & 0xFFFF
        self.out.add(head)
        table, at, count = self.desc, head, self.num
        pieces: list[tuple[int, int]] = []
        while True:
            assert at < count
            address, length, flags, following = DESC.unpack(self.memory(table + 16 * at, 16))
            if flags & F_INDIRECT:
                assert self.indirect and table == self.desc and flags == F_INDIRECT
                table, at, count = address, 0, length // 16
                continue
            assert bool(flags & F_WRITE) == self.writable
            pieces.append((address, length))
            if not flags & F_NEXT:
                return Buffer(head, pieces, 1)
            at = following

    def unpop(self, *buffers: Buffer) -> None:
        """Put back the buffers taken last."""
        self.out -= {buffer.id for buffer in buffers}
        self.avail = (self.avail - len(buffers)) & 0xFFFF

    def put(self, written: int, *batch: Buffer) -> None:
        """Return a buffer, or a batch in the order it was taken, naming the last one only. The
        driver sees it after publish()."""
        entry = self.memory(self.device + 4 + 8 * (self.used % self.num), 8)
        struct.pack_into("@II", entry, 0, batch[-1].id, written)
        for buffer in batch:
            self.out.remove(buffer.id)
        self.used = (self.used + len(batch)) & 0xFFFF

    def publish(self) -> bool:
        """Show what was put; whether the driver wants a call."""
        old, self.shown = self.shown, self.used
        self._put(self.device + 2, self.used)
        fence()  # else the processor reads the driver's wish before the driver can see the index
        if self.event_idx:
            event = self._word(self.driver + 4 + 2 * self.num)
            return (self.used - event - 1) & 0xFFFF < (self.used - old) & 0xFFFF
        return old != self.used and not self._word(self.driver) & NO_INTERRUPT

    def ask_for_kick(self) -> bool:
        """Ask to be kicked for the next buffer; False when it is there already."""
        if self.event_idx:
            self._put(self.device + 4 + 8 * self.num, self.avail)
        fence()
        return not self.waiting()
