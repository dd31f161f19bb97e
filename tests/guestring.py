"""A mover and the device side of its rings, in one process, worked by hand.

A socket pair that keeps message borders stands in for the TAP: what the test writes to its end the
mover reads as frames of the guest, and what the mover delivers the test reads back. The device
returns buffers in any order, or in order and in batches, and asks for kicks as the test likes. It
is dataplane/virtq.py, or for packed rings packeddevice.py, which shares no code with the product.
"""

from __future__ import annotations

import ctypes
import os
import select
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from compiled import Leaves, area
from packeddevice import WRAP, Buffer, PackedRing

from dataplane.context import CONTEXT, REGION, RING
from dataplane.guest_memory import GPA, PAGE, StartMover
from dataplane.mover import Descriptors, Mover
from shm import mem
from shm.layout import View
from shm.schema import QUEUE

V = Leaves("dataplane.virtq")
NUM = 16
HEADER = 12
FRAME_MAX = 65535 + 14
TERMS = {
    "mergeable": True,
    "indirect": True,
    "event_idx": True,
    "packed": False,
    "in_order": False,
}
WORLD, WORLD_BYTES = area(CONTEXT.size + PAGE)
REGIONS, REGION_BYTES = area(REGION.size)
RINGS, RING_BYTES = area(2 * RING.size)
COUNTERS, COUNTER_BYTES = area(2 * QUEUE.size)
IOV, IOV_BYTES = area(16 * 1024)
LOG_BYTES = 8 * 1024
USED_LOG, USED_LOG_BYTES = area(2 * LOG_BYTES)
SCRATCH, SCRATCH_BYTES = area(PAGE)


def frame(number: int, size: int) -> bytes:
    """A frame of `size` bytes that no other one resembles, its virtio-net header all zero."""
    return bytes(HEADER) + (struct.pack(">I", number) * (size // 4 + 1))[:size]


class Device:
    """The device side of one ring: product code, but every decision is the test's."""

    def __init__(
        self, mover: Mover, place: Any, index: int, terms: dict[str, bool], kick: int, call: int
    ) -> None:
        self.address = RINGS + index * RING.size
        self.view = View(RING, RING_BYTES, index * RING.size)
        self.view["num"], self.view["index"] = place.num, index
        self.view["packed"] = int(terms["packed"])
        self.view["used_log"], self.view["log_count"] = USED_LOG + index * LOG_BYTES, 0
        self.view["desc"] = mover.host + place.desc
        self.view["avail"], self.view["used"] = mover.host + place.avail, mover.host + place.used
        self.view["event_idx"] = int(terms["event_idx"])
        self.view["kick_fd"], self.view["call_fd"], self.view["err_fd"] = kick, call, -1
        self.view["counters"] = COUNTERS + index * QUEUE.size
        self.view["suppressed"] = 0
        self.kick, self.writable = kick, 1 - index
        self.asleep = False
        self.held: list[tuple[int, list[tuple[int, int]]]] = []

    def start(self, base: int) -> None:
        cursor = lap(base, self.view["num"]) if self.view["packed"] else base
        for name in ("last_avail", "seen_avail", "used_idx", "published"):
            self.view[name] = cursor

    def pop(self) -> bool:
        """Take one chain, if there is one, into `held`."""
        ready = V.ready(self.address, 0)
        assert ready in (0, 1)
        if not ready:
            return False
        pieces = V.walk(WORLD, self.address, 0, IOV, 1024, self.writable)
        head = self.view["chain_id"]
        assert pieces > 0, f"chain {head} is refused with {pieces}"
        V.take(self.address, self.view["chain_slots"])
        iov = [struct.unpack_from("<QQ", IOV_BYTES, 16 * k) for k in range(pieces)]
        self.held.append((head, iov))
        return True

    def put(self, number: int, written: int) -> None:
        """Return the chain at `number` in `held`; visible after publish()."""
        head, _ = self.held.pop(number)
        V.put_used(self.address, head, written, 1)

    def put_batch(self, count: int, written: int) -> None:
        """Return the first `count` chains, naming the last of them (2.7.9, 2.8.8)."""
        head, _ = self.held[count - 1]
        del self.held[:count]
        V.put_used(self.address, head, written, count)

    def waiting(self) -> bool:
        """Whether a chain can be taken."""
        return bool(V.ready(self.address, 0))

    def publish(self) -> None:
        V.publish(self.address, SCRATCH)

    def sleep(self) -> None:
        """Ask for a kick; stay awake when something came meanwhile."""
        self.asleep = V.ask_for_kick(self.address) == 0

    def awake(self) -> bool:
        """Whether the device runs: it does not sleep, or was kicked."""
        if self.asleep and signalled(self.kick):
            os.eventfd_read(self.kick)
            V.suppress_kicks(self.address)
            self.asleep = False
        return not self.asleep


def lap(base: int, num: int) -> int:
    """An index that counts buffers as the place and wrap counter it stands for."""
    return base & (num - 1) | (0 if base & num else WRAP)


class PackedDevice:
    """The same for a packed ring, without product code."""

    def __init__(
        self, mover: Mover, place: Any, index: int, terms: dict[str, bool], kick: int, call: int
    ) -> None:
        self.host, self.size = mover.host - GPA, len(mover.memory)
        self.memory = memoryview(mover.memory)
        self.ring = PackedRing(
            self.bytes_at,
            place.num,
            *(GPA + area for area in (place.desc, place.avail, place.used)),
            writable=index == 0,
            indirect=terms["indirect"],
            event_idx=terms["event_idx"],
        )
        self.kick, self.call, self.asleep = kick, call, False
        self.buffers: list[Buffer] = []
        self.held: list[tuple[int, list[tuple[int, int]]]] = []

    def bytes_at(self, address: int, size: int) -> memoryview:
        assert GPA <= address and address + size <= GPA + self.size
        return self.memory[address - GPA : address - GPA + size]

    def start(self, base: int) -> None:
        self.ring.start(lap(base, self.ring.num) * 0x10001)

    def pop(self) -> bool:
        buffer = self.ring.pop()
        if buffer is None:
            return False
        self.buffers.append(buffer)
        self.held.append((buffer.id, [(self.host + at, size) for at, size in buffer.pieces]))
        return True

    def put(self, number: int, written: int) -> None:
        del self.held[number]
        self.ring.put(written, self.buffers.pop(number))

    def put_batch(self, count: int, written: int) -> None:
        del self.held[:count]
        self.ring.put(written, *self.buffers[:count])
        del self.buffers[:count]

    def waiting(self) -> bool:
        return self.ring.waiting()

    def publish(self) -> None:
        if self.ring.publish():
            os.eventfd_write(self.call, 1)

    def sleep(self) -> None:
        self.asleep = self.ring.ask_for_kick()

    def awake(self) -> bool:
        if self.asleep and signalled(self.kick):
            os.eventfd_read(self.kick)
            self.ring.suppress_kicks()
            self.asleep = False
        return not self.asleep


def signalled(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


class Rig:
    """A mover with its TAP, and the device of both its rings."""

    def __init__(self, base: int, num: int = NUM, reference: bool = False, **terms: bool) -> None:
        start = StartMover(0, 1, num, **terms)
        made = start.plan()
        fd = os.memfd_create("guest")
        os.ftruncate(fd, made.size)
        self.tap, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.tap.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        theirs.setblocking(False)
        self.tap.setblocking(False)
        self.events = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(4)]
        self.fds = Descriptors(fd, theirs.detach(), *self.events)
        self.mover = Mover(start, self.fds)
        kicks, calls = self.events[0::2], self.events[1::2]
        kind = PackedDevice if reference else Device
        self.in_order = terms["in_order"]
        self.rx, self.tx = (
            kind(self.mover, place, index, terms, kicks[index], calls[index])
            for index, place in enumerate(made.pairs[0])
        )
        region = View(REGION, REGION_BYTES, 0)
        region["gpa"], region["size"], region["host"] = GPA, made.size, self.mover.host
        context = View(CONTEXT, WORLD_BYTES, 0)
        context["regions"], context["region_count"], context["region_hit"] = REGIONS, 1, 0
        for device, view in ((self.rx, self.mover.rx), (self.tx, self.mover.tx)):
            device.start(base)
            view["avail_idx"] = view["notified"] = view["last_used"] = base
            for at in () if terms["packed"] else (view["avail"] + 2, view["used"] + 2):
                ctypes.memmove(at, struct.pack("<H", base), 2)

    def close(self) -> None:
        for device in (self.rx, self.tx):
            if isinstance(device, PackedDevice):
                device.memory.release()
        self.mover.close()
        self.tap.close()
        for fd in (self.fds.memory, self.fds.tap, *self.events):
            os.close(fd)

    def receive(self, data: bytes) -> bool:
        """The device puts a frame into the rx ring, unpublished; False when it has no room."""
        room = sum(length for _, iov in self.rx.held for _, length in iov)
        while room < len(data) and self.rx.pop():
            room += sum(length for _, length in self.rx.held[-1][1])
        if room < len(data):
            return False
        count, left = 0, data
        sizes: list[int] = []
        for _, iov in self.rx.held:
            written = 0
            for at, length in iov:
                part = left[:length]
                ctypes.memmove(mem.check(at, len(part)), part, len(part))
                written, left = written + len(part), left[len(part) :]
            count += 1
            sizes.append(written)
            if not left:
                break
        first = self.rx.held[0][1][0][0]
        ctypes.memmove(first + 10, struct.pack("<H", count), 2)
        if self.in_order and len(data) % 2:  # all but the last are full
            self.rx.put_batch(count, sizes[-1])
            return True
        for written in sizes:
            self.rx.put(0, written)
        return True

    def read(self) -> bytes | None:
        """A frame the mover delivered, if there is one."""
        try:
            return self.tap.recv(FRAME_MAX + HEADER)
        except BlockingIOError:
            return None


@contextmanager
def rig_with(frames: int = 0, num: int = NUM, **terms: bool) -> Iterator[Rig]:
    """A rig that has sent some frames of 60 bytes."""
    rig = Rig(0, num, **{**TERMS, **terms})
    try:
        rig.mover.step(0)
        for number in range(frames):
            rig.tap.send(frame(number, 60))
        rig.mover.step(0)
        yield rig
    finally:
        rig.close()
