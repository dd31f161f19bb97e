"""A mover and the device side of its rings, in one process, worked by hand.

A socket pair that keeps message borders stands in for the TAP: what the test writes to its end the
mover reads as frames of the guest, and what the mover delivers the test reads back. The device is
dataplane/virtq.py, returning chains in any order and asking for kicks as the test likes.
"""

from __future__ import annotations

import ctypes
import os
import select
import socket
import struct
from typing import Any

from compiled import Leaves, area

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
WORLD, WORLD_BYTES = area(CONTEXT.size + PAGE)
REGIONS, REGION_BYTES = area(REGION.size)
RINGS, RING_BYTES = area(2 * RING.size)
COUNTERS, COUNTER_BYTES = area(2 * QUEUE.size)
IOV, IOV_BYTES = area(16 * 1024)
SCRATCH, SCRATCH_BYTES = area(PAGE)


def frame(number: int, size: int) -> bytes:
    """A frame of `size` bytes that no other one resembles, its virtio-net header all zero."""
    return bytes(HEADER) + (struct.pack(">I", number) * (size // 4 + 1))[:size]


class Device:
    """The device side of one ring: product code, but every decision is the test's."""

    def __init__(self, mover: Mover, place: Any, index: int, event_idx: bool, kick: int, call: int):
        self.address = RINGS + index * RING.size
        self.view = View(RING, RING_BYTES, index * RING.size)
        self.view["num"], self.view["index"] = place.num, index
        self.view["desc"] = mover.host + place.desc
        self.view["avail"], self.view["used"] = mover.host + place.avail, mover.host + place.used
        self.view["event_idx"] = int(event_idx)
        self.view["kick_fd"], self.view["call_fd"], self.view["err_fd"] = kick, call, -1
        self.view["counters"] = COUNTERS + index * QUEUE.size
        self.view["suppressed"] = 0
        self.kick, self.writable = kick, 1 - index
        self.asleep = False
        self.held: list[tuple[int, list[tuple[int, int]]]] = []

    def start(self, base: int) -> None:
        for name in ("last_avail", "seen_avail", "used_idx", "published"):
            self.view[name] = base

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


def signalled(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


class Rig:
    """A mover with its TAP, and the device of both its rings."""

    def __init__(self, base: int, num: int = NUM, **terms: bool) -> None:
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
        self.rx, self.tx = (
            Device(self.mover, place, index, terms["event_idx"], kicks[index], calls[index])
            for index, place in enumerate(made.pairs[0])
        )
        region = View(REGION, REGION_BYTES, 0)
        region["gpa"], region["size"], region["host"] = GPA, made.size, self.mover.host
        context = View(CONTEXT, WORLD_BYTES, 0)
        context["regions"], context["region_count"], context["region_hit"] = REGIONS, 1, 0
        for device, view in ((self.rx, self.mover.rx), (self.tx, self.mover.tx)):
            device.start(base)
            view["avail_idx"] = view["notified"] = view["last_used"] = base
            for at in (view["avail"] + 2, view["used"] + 2):
                ctypes.memmove(at, struct.pack("<H", base), 2)

    def close(self) -> None:
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
        for written in sizes:
            self.rx.put(0, written)
        return True

    def read(self) -> bytes | None:
        """A frame the mover delivered, if there is one."""
        try:
            return self.tap.recv(FRAME_MAX + HEADER)
        except BlockingIOError:
            return None
