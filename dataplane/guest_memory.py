"""guest_memory.py - the memory of a guest without a VM: where its rings and buffers lie. No
compiled code: `vhostmq guest` sizes the memory file and describes the rings from here, movers
build them.

Theory      One file (memfd), one region. Each queue pair has four parts, every one on pages of its
            own: two ring blocks (descriptors, driver's area, device's area, for tx also the
            indirect tables) and two buffer areas. A buffer and its indirect table never change
            place: what a descriptor says of a buffer is settled, but for the length of a tx frame.
Buffers     tx: 68 KiB each, a 64 KiB GSO frame and its headers: the TAP is read straight into it.
            rx: a page each with MRG_RXBUF (the most Linux posts), as many as a frame needs; without
            it a frame must fit in one, so they are as large as those of tx.
Indirect    With INDIRECT_DESC a tx chain is an indirect table of two descriptors, virtio-net header
            and frame, as a Linux guest lays out a GSO frame; else one descriptor for both.
Formats     Split and packed rings have the same places: avail ring or driver's event structure,
            used ring or device's (virtio 1.3, 2.7 and 2.8). Descriptors differ in where flags lie,
            and in that those of a packed ring carry the buffer's number.
Why so      The guest addresses here are offsets from GPA, and so are the user addresses that ring
            messages carry: they need not be pointers (vhost-user "front-end user address"). Pages
            nobody touches cost nothing: the file of 32 pairs has half a gigabyte or a whole one,
            but few pages of it.
Limits      Rings of at most RING_SIZE_MAX entries: a frame spread over a whole ring must fit
            in one writev (UIO_MAXIOV).
Ownership   The file belongs to `vhostmq guest`; a mover writes its own pair's parts only.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

PAGE = 4096
GPA = 1 << 32
RING_SIZE_MAX = 1024
BIG_BUFFER_BYTES = 17 * PAGE  # 65535 + Ethernet, VLAN and virtio-net headers, in whole pages
RX_BUFFER_BYTES = PAGE
HEADER_BYTES = 12  # struct virtio_net_hdr_v1 (virtio 1.3, 5.1.6)
DESC_BYTES = 16
TABLE_BYTES = 2 * DESC_BYTES

F_NEXT, F_WRITE, F_INDIRECT = 1, 2, 4
_DESC = struct.Struct("<QIHH")  # split: address, length, flags, next; packed: id, flags


@dataclass(frozen=True)
class RingPlace:
    """Offsets of one ring's parts in the memory file: `avail` is the driver's area, `used` the
    device's; `tables` 0: it has no indirect ones."""

    num: int
    desc: int
    avail: int
    used: int
    tables: int
    buffers: int
    stride: int

    def descriptors(self, writable: bool, packed: bool) -> bytes:
        """A descriptor for each buffer in turn; the device may write to an rx ring's."""
        flags = F_INDIRECT if self.tables else F_WRITE if writable else 0
        made = bytearray()
        for k in range(self.num):
            if self.tables:
                where, size = self.tables + k * TABLE_BYTES, TABLE_BYTES
            else:
                where, size = self.buffers + k * self.stride, self.stride
            made += _DESC.pack(GPA + where, size, *((k, flags) if packed else (flags, 0)))
        return bytes(made)

    def write_tables(self, memory: Any, packed: bool) -> None:
        """The indirect tables of all buffers, if there are any. Those of a packed ring go on to
        their end without a flag for it (virtio 1.3, 2.8.7)."""
        following = (0, 0) if packed else (F_NEXT, 1)
        for k in range(self.num if self.tables else 0):
            at, buffer = self.tables + k * TABLE_BYTES, GPA + self.buffers + k * self.stride
            _DESC.pack_into(memory, at, buffer, HEADER_BYTES, *following)
            length = self.stride - HEADER_BYTES
            _DESC.pack_into(memory, at + DESC_BYTES, buffer + HEADER_BYTES, length, 0, 0)


@dataclass(frozen=True)
class Plan:
    """The places of all rings, (rx, tx) per pair, and the bytes of the whole file."""

    pairs: tuple[tuple[RingPlace, RingPlace], ...]
    size: int


def plan(pairs: int, num: int, mergeable: bool, indirect: bool) -> Plan:
    """Lay out `pairs` queue pairs of rings with `num` entries (a power of two)."""
    at = 0

    def ring(tables: bool, stride: int) -> RingPlace:
        nonlocal at
        desc = at
        avail = desc + num * DESC_BYTES
        used = _up(avail + 6 + 2 * num, 64)
        table = _up(used + 6 + 8 * num, 64)
        buffers = _up(table + num * TABLE_BYTES if tables else table, PAGE)
        at = _up(buffers + num * stride, PAGE)
        return RingPlace(num, desc, avail, used, table if tables else 0, buffers, stride)

    rx_bytes = RX_BUFFER_BYTES if mergeable else BIG_BUFFER_BYTES
    made = tuple((ring(False, rx_bytes), ring(indirect, BIG_BUFFER_BYTES)) for _ in range(pairs))
    return Plan(made, at)


@dataclass(frozen=True)
class StartMover:
    """Serve queue pair `pair` of `pairs`; six descriptors come along (dataplane/mover.py)."""

    pair: int
    pairs: int
    num: int
    mergeable: bool
    indirect: bool
    event_idx: bool
    packed: bool
    in_order: bool

    def plan(self) -> Plan:
        """The memory file this mover works in."""
        return plan(self.pairs, self.num, self.mergeable, self.indirect)


def _up(value: int, to: int) -> int:
    return -(-value // to) * to
