"""A device side of packed virtqueues so small that it is right by inspection, for vring_packed.py
to be tried against. Written from virtio 1.3 section 2.8 in the words of its text: two indices, two
wrap counters, one used descriptor after the other. `mark` writes whatever a test wants to be wrong.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vring import DESC, INDIRECT, NEXT, WRITE, Memory, fence

AVAIL, USED = 1 << 7, 1 << 15


@dataclass
class Buffer:
    """A buffer taken from the ring: id, descriptors it takes there, (address, length) to read and
    to write.
    """

    name: int
    count: int
    readable: list[tuple[int, int]] = field(default_factory=list)
    writable: list[tuple[int, int]] = field(default_factory=list)


class PackedDevice:
    """Sees the ring as three guest addresses and a base."""

    def __init__(
        self, memory: Memory, num: int, desc: int, driver: int, device: int, base: int
    ) -> None:
        self.memory, self.num, self.desc = memory, num, desc
        self.driver, self.device = driver, device
        self.avail, self.avail_wrap = base & 0x7FFF, base >> 15 & 1
        self.used, self.used_wrap = base >> 16 & 0x7FFF, base >> 31
        self.event_idx = False
        self.signalled = (self.used, self.used_wrap)

    # --- available buffers ---

    def read(self, index: int) -> tuple[int, int, int, int]:
        """(address, length, id, flags)"""
        address, length, name, flags = DESC.unpack(self.memory.read(self.desc + 16 * index, 16))
        return address, length, name, flags

    def is_available(self) -> bool:
        flags = self.read(self.avail)[3]
        return bool(flags & AVAIL) == self.avail_wrap and bool(flags & USED) != self.avail_wrap

    def take(self) -> Buffer | None:
        """The next available buffer."""
        if not self.is_available():
            return None
        fence()
        buffer = Buffer(0, 0)
        while True:
            address, length, name, flags = self.read(self.avail)
            self._step_avail()
            buffer.count += 1
            if flags & INDIRECT:
                for at in range(address, address + length, 16):
                    self._element(buffer, *DESC.unpack(self.memory.read(at, 16)))
            else:
                self._element(buffer, address, length, name, flags)
            if not flags & NEXT:
                buffer.name = name
                return buffer

    def _element(self, buffer: Buffer, address: int, length: int, name: int, flags: int) -> None:
        (buffer.writable if flags & WRITE else buffer.readable).append((address, length))

    def _step_avail(self) -> None:
        self.avail += 1
        if self.avail == self.num:
            self.avail, self.avail_wrap = 0, 1 - self.avail_wrap

    # --- used buffers ---

    def put(self, buffer: Buffer, length: int = 0, skip: int | None = None) -> None:
        """Return a buffer with `length` bytes written into it, and go on `skip` descriptors
        further (default: as many as it has).
        """
        flags = (AVAIL | USED) * self.used_wrap | (WRITE if length else 0)
        self.mark(buffer.name, length, flags)
        for _ in range(buffer.count if skip is None else skip):
            self.used += 1
            if self.used == self.num:
                self.used, self.used_wrap = 0, 1 - self.used_wrap

    def mark(self, name: int, length: int, flags: int) -> None:
        """Write the used descriptor that is next, flags last."""
        at = self.desc + 16 * self.used
        self.memory.write(at + 8, DESC.pack(0, length, name, 0)[8:14])
        fence()
        self.memory.write(at + 14, flags.to_bytes(2, "little"))

    # --- events ---

    def suppress(self, index: int, wrap: int, flags: int) -> None:
        """Say which available buffers are worth a kick."""
        area = index | wrap << 15 | flags << 16
        self.memory.write(self.device, area.to_bytes(4, "little"))
        fence()

    def sleep(self) -> bool:
        """Ask for a kick at the next available buffer; whether there is one already."""
        if self.event_idx:
            self.suppress(self.avail, self.avail_wrap, 2)
        else:
            self.suppress(0, 0, 0)
        return self.is_available()

    def call_wanted(self) -> bool:
        """Whether the driver wants to be called for what was used since this was last asked."""
        fence()
        area = int.from_bytes(self.memory.read(self.driver, 4), "little")
        wanted = False
        while self.signalled != (self.used, self.used_wrap):
            index, wrap = self.signalled
            wanted |= area >> 16 == 0
            wanted |= area >> 16 == 2 and area & 0xFFFF == index | wrap << 15
            wrapped = index + 1 == self.num
            self.signalled = (0, 1 - wrap) if wrapped else (index + 1, wrap)
        return wanted
