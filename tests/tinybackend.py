"""A vhost-user back-end small enough to be obviously right, and able to be wrong on purpose.

One thread, one connection, rings in plain Python (splitdevice.py, packeddevice.py), written from
the specifications like driver.py (which is its opposite). A function of the test's answers each
frame; what it returns goes to the guest on the queue pair the question came from. Used to see what
`vhostmq guest` does with back-ends unlike our own: fewer features, odd answers, sudden ends, broken
rings.
"""

from __future__ import annotations

import mmap
import os
import select
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import driver as d
from packeddevice import Buffer, PackedRing
from splitdevice import SplitRing

RING_PACKED, NOTIFICATION_DATA = 1 << 34, 1 << 38
HEADER = 12
NOBODY = 0xFFFF
Answer = Callable[[bytes], list[bytes]]


@dataclass
class Ring:
    """One virtqueue as the front-end described it; addresses are its user addresses."""

    index: int
    num: int = 0
    base: int = 0
    desc: int = 0
    used: int = 0
    avail: int = 0
    queue: SplitRing | PackedRing | None = None
    lies: bool = False
    kick: int = -1
    call: int = -1
    err: int = -1
    enabled: bool = False
    frames: int = 0
    calls: int = 0


@dataclass
class Wishes:
    """How this back-end differs from a good one."""

    offer: int = d.VERSION_1 | d.PROTOCOL_FEATURES | d.MRG_RXBUF
    protocol: int = d.P_MQ | d.P_REPLY_ACK
    queues: int = 4
    refuse: int = 0  # this request is answered with an error
    close_at: int = 0  # the connection ends at this request


@dataclass
class TinyBackend:
    """Listens at `path` from the start; `answer` gets each frame of the guest, no header."""

    path: str
    answer: Answer
    wishes: Wishes = field(default_factory=Wishes)

    def __post_init__(self) -> None:
        self.rings = [Ring(index) for index in range(2 * self.wishes.queues)]
        self.features = self.acked = self.memory_base = 0
        self.memory: mmap.mmap | None = None
        self.requests: list[int] = []
        self.frames: list[tuple[int, bytes]] = []
        self.error: BaseException | None = None
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(self.path)
        self.listener.listen()
        os.chmod(self.path, 0o777)
        self.wake_read, self.wake_write = os.pipe()
        self.orders: list[Callable[[], None]] = []
        self.connection: socket.socket | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def close(self) -> None:
        """End the connection and the thread; raises what went wrong in it."""
        os.close(self.wake_write)
        self.thread.join(10)
        self.listener.close()
        if self.error is not None:
            raise self.error

    def order(self, what: Callable[[], None]) -> None:
        """Have this done on the back-end's thread."""
        self.orders.append(what)
        os.write(self.wake_write, b"x")

    def hang_up(self) -> None:
        """End the connection (an order)."""
        assert self.connection is not None
        self.connection.close()
        self.connection = None

    # --- the thread ---

    def _run(self) -> None:
        try:
            while self._step():
                pass
        except BaseException as error:  # told by close()
            self.error = error
        finally:
            if self.connection is not None:
                self.connection.close()

    def _step(self) -> bool:
        source: Any = self.connection or self.listener
        kicks = {ring.kick: ring for ring in self.rings if ring.kick >= 0}
        ready: list[Any] = select.select([source, self.wake_read, *kicks], [], [])[0]
        if self.wake_read in ready:
            if not os.read(self.wake_read, 1):
                return False
            self.orders.pop(0)()
        elif self.listener in ready:
            self.connection = self.listener.accept()[0]
        elif source in ready:
            self._message()
        for fd in set(ready) & set(kicks):
            os.read(fd, 8)
            if kicks[fd].index % 2:
                self._serve(kicks[fd])
        return True

    # --- messages ---

    def _message(self) -> None:
        assert self.connection is not None
        head, fds, _, _ = socket.recv_fds(self.connection, d.HEADER.size, 8)
        if not head:
            return self.hang_up()
        request, flags, size = d.HEADER.unpack(head)
        payload = self.connection.recv(size, socket.MSG_WAITALL) if size else b""
        self.requests.append(request)
        if request == self.wishes.close_at:
            return self.hang_up()
        reply = self._obey(request, payload, fds)
        if reply is None and flags & d.NEED_REPLY:
            reply = struct.pack("<Q", int(request == self.wishes.refuse))
        if reply is not None:
            self.connection.sendall(d.HEADER.pack(request, 5, len(reply)) + reply)

    def _obey(self, request: int, payload: bytes, fds: list[int]) -> bytes | None:
        number = struct.unpack_from("<Q", payload)[0] if len(payload) >= 8 else 0
        answers = {
            d.GET_FEATURES: self.wishes.offer,
            d.GET_PROTOCOL_FEATURES: self.wishes.protocol,
            d.GET_QUEUE_NUM: self.wishes.queues,
        }
        if request in answers:
            return struct.pack("<Q", answers[request])
        if request == d.SET_FEATURES:
            assert number & ~self.wishes.offer == 0, f"features {number:#x} were not offered"
            self.features = number
        elif request == d.SET_PROTOCOL_FEATURES:
            assert number & ~self.wishes.protocol == 0
        elif request == d.SET_MEM_TABLE:
            self._map(payload, *fds)
        elif request in (d.SET_VRING_KICK, d.SET_VRING_CALL, d.SET_VRING_ERR):
            name = {d.SET_VRING_KICK: "kick", d.SET_VRING_CALL: "call", d.SET_VRING_ERR: "err"}
            (fd,) = fds
            setattr(self.rings[number & 0xFF], name[request], fd)
            if request == d.SET_VRING_KICK:
                self._start(self.rings[number & 0xFF])
        elif d.SET_VRING_NUM <= request <= d.GET_VRING_BASE or request == d.SET_VRING_ENABLE:
            return self._ring(request, payload)
        return None

    def _map(self, payload: bytes, fd: int) -> None:
        count, gpa, size, user, offset = struct.unpack_from("<Q4Q", payload)
        assert count == 1 and gpa == user and offset == 0
        self.memory, self.memory_base = mmap.mmap(fd, size), gpa
        os.close(fd)

    def _ring(self, request: int, payload: bytes) -> bytes | None:
        index, value = struct.unpack_from("<II", payload)
        ring = self.rings[index]
        if request == d.SET_VRING_NUM:
            ring.num = value
        elif request == d.SET_VRING_BASE:
            ring.base = value
        elif request == d.SET_VRING_ADDR:
            ring.desc, ring.used, ring.avail = struct.unpack_from("<QQQ", payload, 8)
        elif request == d.SET_VRING_ENABLE:
            ring.enabled = bool(value)
        elif request == d.GET_VRING_BASE:
            ring.kick = -1
            assert ring.queue is not None
            return struct.pack("<II", index, ring.queue.base)
        return None

    # --- rings ---

    def _bytes(self, address: int, size: int) -> memoryview:
        assert self.memory is not None
        at = address - self.memory_base
        assert 0 <= at and at + size <= len(self.memory), f"{size} bytes at {address:#x}"
        return memoryview(self.memory)[at : at + size]

    def _start(self, ring: Ring) -> None:
        kind = PackedRing if self.features & RING_PACKED else SplitRing
        ring.queue = kind(
            self._bytes,
            ring.num,
            ring.desc,
            ring.avail,
            ring.used,
            writable=ring.index % 2 == 0,
            indirect=bool(self.features & d.INDIRECT_DESC),
            event_idx=bool(self.features & d.EVENT_IDX),
        )
        ring.queue.start(ring.base)

    def _return(self, ring: Ring, written: list[int], buffers: list[Buffer]) -> None:
        """Buffers in the order they were taken; in order, one entry for all of them."""
        assert ring.queue is not None
        if ring.lies and buffers:
            ring.lies, buffers[-1] = False, buffers[-1]._replace(id=NOBODY)
            ring.queue.out.add(NOBODY)
        if self.features & d.IN_ORDER and buffers:
            ring.queue.put(written[-1], *buffers)
            return
        for size, buffer in zip(written, buffers, strict=True):
            ring.queue.put(size, buffer)

    def _publish(self, ring: Ring) -> None:
        """Show what was returned; call if the driver wants it."""
        assert ring.queue is not None
        if ring.queue.publish():
            os.write(ring.call, struct.pack("<Q", 1))
            ring.calls += 1

    def _serve(self, ring: Ring) -> None:
        """Everything in a tx ring, and the answers."""
        assert ring.queue is not None
        while True:
            done: list[Buffer] = []
            while (buffer := ring.queue.pop()) is not None:
                data = b"".join(self._bytes(*piece) for piece in buffer.pieces)
                flags, gso = data[:2]
                assert (flags, gso, data[10:HEADER]) == (0, 0, b"\0\0"), "nothing was offered"
                done.append(buffer)
                ring.frames += 1
                self.frames.append((ring.index // 2, data[HEADER:]))
                for answer in self.answer(data[HEADER:]):
                    self.send(ring.index // 2, answer)
            self._return(ring, [0] * len(done), done)
            self._publish(ring)
            if ring.queue.ask_for_kick():
                return

    def send(self, pair: int, frame: bytes) -> None:
        """A frame to the guest; dropped when there is no room for it (on the thread only)."""
        ring = self.rings[2 * pair]
        assert ring.queue is not None
        buffers: list[Buffer] = []
        room = 0
        while room < HEADER + len(frame) and (buffer := ring.queue.pop()) is not None:
            buffers.append(buffer)
            room += sum(size for _, size in buffer.pieces)
        if room < HEADER + len(frame):
            ring.queue.unpop(*buffers)
            return
        assert len(buffers) == 1 or self.features & d.MRG_RXBUF
        left = bytes(10) + struct.pack("<H", len(buffers)) + frame
        written = []
        for buffer in buffers:
            before = len(left)
            for address, size in buffer.pieces:
                part = left[:size]
                self._bytes(address, len(part))[:] = part
                left = left[len(part) :]
            written.append(before - len(left))
        self._return(ring, written, buffers)
        ring.frames += 1
        self._publish(ring)

    def break_ring(self, index: int) -> None:
        """Return a buffer the driver never gave (an order). In a packed ring, where an entry beyond
        what is out is not looked at, that waits until the next one is returned."""
        ring = self.rings[index]
        if isinstance(ring.queue, PackedRing):
            ring.lies = True
        elif ring.queue is not None:
            ring.queue.out.add(NOBODY)
            ring.queue.put(0, Buffer(NOBODY, [], 1))
            self._publish(ring)

    def complain(self, index: int) -> None:
        """Say that a ring is broken (an order)."""
        os.write(self.rings[index].err, struct.pack("<Q", 1))
