"""A vhost-user front-end with virtqueue drivers: the VMM and the guest's virtio-net driver in one
object.

`Channel` is the bare wire: messages as bytes with descriptors, nothing checked, so that hostile
tests can send anything. `Driver` is a well-behaved front-end on top: it negotiates as QEMU does,
sets up memory and rings, and then sends and receives frames. Written from the vhost-user
specification; it shares no code with the product.

    drv = Driver(path, pairs=2)
    drv.start()
    drv.send(0, frame, layout=Layout(sizes=(12, 1, 1)))
    header, frame = drv.recv(0, timeout=5)

Pair i is virtqueue 2i (receive, device-writable buffers) and 2i+1 (transmit). Everything runs on
the caller's thread: `recv` sleeps on the call descriptor, so a lost notification shows as a
time-out that says so. Every frame taken is held against the negotiated features (`_check_header`):
a violation raises at once, in whatever test it shows up.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from packets import DATA_VALID, GSO_ECN, NEEDS_CSUM, PLAIN, VnetHeader
from vring import ONE, SLOT, SLOTS, Layout, Memory, Ring, RingFault, Segment, Taken
from vring_packed import PackedRing

# fmt: off
(GET_FEATURES, SET_FEATURES, SET_OWNER, RESET_OWNER, SET_MEM_TABLE, SET_LOG_BASE, SET_LOG_FD,
 SET_VRING_NUM, SET_VRING_ADDR, SET_VRING_BASE, GET_VRING_BASE, SET_VRING_KICK, SET_VRING_CALL,
 SET_VRING_ERR, GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES, GET_QUEUE_NUM,
 SET_VRING_ENABLE) = range(1, 19)
# fmt: on
SET_BACKEND_REQ_FD, GET_CONFIG, SET_DEVICE_STATE_FD, CHECK_DEVICE_STATE = 21, 24, 42, 43
VERSION, REPLY, NEED_REPLY = 1, 4, 8

CSUM, GUEST_CSUM, GUEST_TSO4, GUEST_TSO6, GUEST_ECN = 1 << 0, 1 << 1, 1 << 7, 1 << 8, 1 << 9
HOST_TSO4, HOST_TSO6, MRG_RXBUF, MQ = 1 << 11, 1 << 12, 1 << 15, 1 << 22
INDIRECT_DESC, EVENT_IDX, PROTOCOL_FEATURES, VERSION_1 = 1 << 28, 1 << 29, 1 << 30, 1 << 32
RING_PACKED, IN_ORDER, NOTIFICATION_DATA = 1 << 34, 1 << 35, 1 << 38
GUEST_USO4, GUEST_USO6, HOST_USO = 1 << 54, 1 << 55, 1 << 56
BASIC = VERSION_1 | PROTOCOL_FEATURES | MRG_RXBUF
GSO_BITS = {1: GUEST_TSO4, 4: GUEST_TSO6, 5: GUEST_USO4 | GUEST_USO6}

P_MQ, P_REPLY_ACK, P_BACKEND_REQ = 1 << 0, 1 << 3, 1 << 5
HEADER = struct.Struct("<III")
NO_FD = 1 << 8
FRAME_MAX = 65535 + 14


class Lost(AssertionError):
    """The connection ended, or an answer did not come in time."""


class Channel:
    """The vhost-user socket as bytes; `timeout` seconds bound every wait."""

    def __init__(self, path: str, timeout: float = 10.0) -> None:
        self.path, self.timeout = path, timeout
        self.open()

    def open(self) -> None:
        """Connect, once more if the connection before was closed."""
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(self.timeout)
        self.socket.connect(self.path)

    def send(
        self,
        request: int,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        *,
        flags: int = VERSION,
        size: int | None = None,
    ) -> None:
        """One message; `size` overrides the length its header announces."""
        data = HEADER.pack(request, flags, len(payload) if size is None else size) + payload
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))]
        try:
            self.socket.sendmsg([data], rights if fds else [])
        except OSError as error:
            raise Lost(f"message {request} could not be sent: {error}") from error

    def receive(self) -> tuple[int, int, bytes]:
        """(request, flags, payload) of the next answer; descriptors in it are closed."""
        request, flags, size = HEADER.unpack(self._exactly(HEADER.size))
        return request, flags, self._exactly(size)

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                part, fds, _, _ = socket.recv_fds(self.socket, size - len(data), 8)
            except OSError as error:
                raise Lost(f"no answer: {error or 'timed out'}") from error
            for fd in fds:
                os.close(fd)
            if not part:
                raise Lost("the back-end closed the connection")
            data += part
        return data

    def close(self) -> None:
        self.socket.close()


@dataclass
class Queue:
    """One virtqueue of the device: its ring and the three descriptors shared with the back-end."""

    index: int
    ring: Ring | PackedRing
    kick: int = field(default_factory=lambda: os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
    call: int = field(default_factory=lambda: os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
    err: int = field(default_factory=lambda: os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
    kicks: int = 0
    calls: int = 0

    def close(self) -> None:
        for fd in (self.kick, self.call, self.err):
            os.close(fd)


def drain(fd: int) -> int:
    """Read an eventfd that does not block; 0 when it was not signalled."""
    try:
        return int.from_bytes(os.read(fd, 8), "little")
    except BlockingIOError:
        return 0


class Driver:
    """A front-end with `pairs` queue pairs of `num` descriptors, feature bits `features` at most.

    `need_reply` asks for an acknowledgement of every message, as Cloud Hypervisor does, where
    REPLY_ACK is offered. `rx` is the shape of a receive chain: the lengths of its descriptors.
    With RING_PACKED among the features the rings are packed, and a back-end without is a failure.
    """

    def __init__(
        self,
        path: str,
        *,
        pairs: int = 1,
        num: int = 256,
        features: int = BASIC | GUEST_CSUM,
        borders: int = 0,
        need_reply: bool = True,
        rx: Sequence[int] = (2048,),
        enabled: int | None = None,
        timeout: float = 10.0,
        channel: Channel | None = None,
    ) -> None:
        self.channel = channel or Channel(path, timeout)
        self.path, self.pairs, self.wanted, self.need_reply = path, pairs, features, need_reply
        room = SLOT * min(num, SLOTS) + 48 * num + 64
        self.memory = Memory(room * 2 * pairs + (8 << 20), borders)
        kind = PackedRing if features & RING_PACKED else Ring
        self.queues = [Queue(i, kind(self.memory, num)) for i in range(2 * pairs)]
        self.rx_shape: list[tuple[int, ...]] = [tuple(rx)] * pairs
        self.rx_limit = [min(num, SLOTS)] * pairs
        self.refill = True
        self.useless_buffers = False  # a test posts such: they may come back with length 0
        self.enabled = pairs if enabled is None else enabled
        self.offered = self.features = self.protocol = 0
        self.inbox: list[deque[tuple[VnetHeader, bytes]]] = [deque() for _ in range(pairs)]
        self.borders_busy: set[int] = set()
        self.request_socket: socket.socket | None = None

    # --- messages ---

    def call(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> int | None:
        """A message without an answer of its own; returns the acknowledgement if one was due."""
        asked = self.need_reply and bool(self.protocol & P_REPLY_ACK)
        self.channel.send(request, payload, fds, flags=VERSION | (NEED_REPLY if asked else 0))
        if not asked:
            return None
        return struct.unpack("<Q", self._answer(request))[0]

    def must(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        code = self.call(request, payload, fds)
        if code:
            raise AssertionError(f"message {request} was refused with {code}")

    def ask(self, request: int, payload: bytes = b"") -> bytes:
        """A message that has an answer; returns its payload."""
        self.channel.send(request, payload)
        return self._answer(request)

    def ask_u64(self, request: int) -> int:
        return struct.unpack("<Q", self.ask(request))[0]

    def _answer(self, request: int) -> bytes:
        got, flags, payload = self.channel.receive()
        if got != request or flags & 7 != VERSION | REPLY:
            raise AssertionError(f"answer {got} with flags {flags:#x} to message {request}")
        return payload

    # --- set-up and tear-down ---

    def negotiate(self) -> None:
        """Features, protocol features, owner, as QEMU does on connecting."""
        self.offered = self.ask_u64(GET_FEATURES)
        if self.offered & PROTOCOL_FEATURES:
            offered = self.ask_u64(GET_PROTOCOL_FEATURES)
            wanted = offered & (P_MQ | P_REPLY_ACK | P_BACKEND_REQ)
            self.channel.send(SET_PROTOCOL_FEATURES, struct.pack("<Q", wanted))
            self.protocol = wanted
            if wanted & P_MQ:
                limit = self.ask_u64(GET_QUEUE_NUM)
                if limit < self.pairs:
                    raise AssertionError(f"{self.pairs} pairs wanted, {limit} supported")
            if wanted & P_BACKEND_REQ:
                ours, theirs = socket.socketpair()
                with theirs:
                    self.must(SET_BACKEND_REQ_FD, fds=[theirs.fileno()])
                self.request_socket = ours
        self.must(SET_OWNER)
        self.features = self.offered & self.wanted
        if self.wanted & ~self.offered & (RING_PACKED | IN_ORDER):
            raise AssertionError(f"RING_PACKED or IN_ORDER is not offered: {self.offered:#x}")
        for queue in self.queues:
            self.must(SET_VRING_CALL, struct.pack("<Q", queue.index), [queue.call])
            self.must(SET_VRING_ERR, struct.pack("<Q", queue.index), [queue.err])

    def start(self, base: int | None = None) -> Driver:
        """The whole handshake up to running rings with receive buffers posted."""
        self.negotiate()
        for queue in self.queues:
            queue.ring.reset(base)
        self.start_rings()
        return self

    def start_rings(self) -> None:
        """What a VMM does at DRIVER_OK: features, memory, rings from where they stand, kick,
        enable.
        """
        self.must(SET_FEATURES, struct.pack("<Q", self.features))
        self.set_memory()
        for queue in self.queues:
            self.agree(queue)
            if queue.index % 2:
                queue.ring.want_calls(False)
            else:
                queue.ring.want_calls(True)
                self.fill(queue.index // 2, kick=False)
        for queue in self.queues:
            self.start_ring(queue)
        for queue in self.queues:
            self.enable(queue.index, queue.index // 2 < self.enabled)
        for queue in self.queues:
            self.kick(queue)

    def agree(self, queue: Queue) -> None:
        """Tell the ring what was negotiated."""
        queue.ring.event_idx = bool(self.features & EVENT_IDX)
        queue.ring.in_order = bool(self.features & IN_ORDER)

    def set_memory(self) -> None:
        table = struct.pack("<II", len(self.memory.regions), 0)
        table += b"".join(region.entry() for region in self.memory.regions)
        self.must(SET_MEM_TABLE, table, [region.fd for region in self.memory.regions])

    def start_ring(self, queue: Queue, base: int | None = None) -> None:
        ring = queue.ring
        base = ring.base if base is None else base
        self.must(SET_VRING_NUM, struct.pack("<II", queue.index, ring.num))
        self.must(SET_VRING_BASE, struct.pack("<II", queue.index, base))
        self.must(SET_VRING_ADDR, self.addresses(queue))
        self.must(SET_VRING_KICK, struct.pack("<Q", queue.index), [queue.kick])
        self.must(SET_VRING_CALL, struct.pack("<Q", queue.index), [queue.call])

    def addresses(self, queue: Queue) -> bytes:
        """The payload of SET_VRING_ADDR."""
        places = (queue.ring.desc, queue.ring.used, queue.ring.avail)
        return struct.pack("<IIQQQQ", queue.index, 0, *map(self.memory.user, places), 0)

    def enable(self, index: int, on: bool) -> None:
        self.must(SET_VRING_ENABLE, struct.pack("<II", index, int(on)))

    def stop_ring(self, index: int) -> int:
        """GET_VRING_BASE; returns the base."""
        got, base = struct.unpack("<II", self.ask(GET_VRING_BASE, struct.pack("<II", index, 0)))
        if got != index:
            raise AssertionError(f"base of ring {got} for ring {index}")
        return base

    def stop_rings(self) -> list[int]:
        return [self.stop_ring(queue.index) for queue in self.queues]

    def barrier(self) -> None:
        """Wait until every earlier message took effect."""
        self.ask_u64(GET_FEATURES)

    def close(self) -> None:
        self.channel.close()
        if self.request_socket:
            self.request_socket.close()
        for queue in self.queues:
            queue.close()
        self.memory.close()

    # --- rings ---

    def rx(self, pair: int) -> Queue:
        return self.queues[2 * pair]

    def tx(self, pair: int) -> Queue:
        return self.queues[2 * pair + 1]

    def kick(self, queue: Queue) -> None:
        queue.kicks += 1
        os.write(queue.kick, (1).to_bytes(8, "little"))

    def publish(self, queue: Queue) -> None:
        if queue.ring.publish():
            self.kick(queue)

    def fill(self, pair: int, *, kick: bool = True, limit: int | None = None) -> int:
        """Post receive chains of the pair's shape until `limit` (default `rx_limit`) are out;
        returns how many.
        """
        queue, shape, added = self.rx(pair), self.rx_shape[pair], 0
        ring = queue.ring
        limit = self.rx_limit[pair] if limit is None else limit
        while len(ring.chains) < limit and len(ring.free) >= len(shape):
            ring.add(ring.scatter(ring.free[0], shape, True))
            added += 1
        if added:
            if kick:
                self.publish(queue)
            else:
                ring.publish()
        return added

    def post_across_border(self, pair: int, border: int, size: int, before: int) -> None:
        """One receive buffer of `size` bytes, `before` of them on the near side of a region
        border.
        """
        gpa = self.memory.borders()[border] - before
        self.rx(pair).ring.add([Segment(gpa, size, True)])
        self.publish(self.rx(pair))

    def send(
        self,
        pair: int,
        frame: bytes,
        *,
        header: VnetHeader = PLAIN,
        layout: Layout = ONE,
        publish: bool = True,
        timeout: float = 5.0,
    ) -> None:
        """Put one frame on the pair's transmit ring, waiting up to `timeout` s for descriptors."""
        queue = self.tx(pair)
        data = header.pack() + frame
        lengths = layout.lengths(len(data))
        count = 1 if layout.indirect else len(lengths)
        self.reap_tx(pair)
        deadline = time.monotonic() + timeout
        while len(queue.ring.free) < count or layout.border in self.borders_busy:
            if time.monotonic() > deadline:
                left = len(queue.ring.chains)
                raise Lost(f"transmit ring {pair}: {left} chains not returned in {timeout} s")
            self.publish(queue)
            time.sleep(0.0005)
            self.reap_tx(pair)
        if layout.border is None:
            segments = queue.ring.scatter(queue.ring.free[0], lengths, False)
        else:
            before = len(data) // 2 if layout.before is None else layout.before
            segments = _contiguous(self.memory.borders()[layout.border] - before, lengths)
            self.borders_busy.add(layout.border)
        at = 0
        for segment in segments:
            self.memory.write(segment.gpa, data[at : at + segment.length])
            at += segment.length
        queue.ring.add(segments, indirect=layout.indirect, token=layout.border)
        if publish:
            self.publish(queue)

    def reap_tx(self, pair: int) -> list[int]:
        """Take sent buffers back; returns the used lengths the device wrote (0 each, virtio
        5.1.6.2).
        """
        taken = self.tx(pair).ring.reap()
        for _, _, _, border in taken:
            self.borders_busy.discard(border)
        return [length for _, length, _, _ in taken]

    def wait_sent(self, pair: int, timeout: float = 5.0) -> list[int]:
        """Wait until the device returned every transmit buffer; returns their used lengths."""
        lengths: list[int] = []
        deadline = time.monotonic() + timeout
        while self.tx(pair).ring.chains:
            lengths += self.reap_tx(pair)
            if self.tx(pair).ring.chains and time.monotonic() > deadline:
                left = len(self.tx(pair).ring.chains)
                raise Lost(f"transmit ring {pair}: {left} chains not returned in {timeout} s")
            time.sleep(0.0005)
        return lengths

    def poll(self, pair: int) -> None:
        """Move complete frames of the pair's receive ring to its inbox and post buffers anew."""
        ring = self.rx(pair).ring
        taken = ring.reap()
        if self.useless_buffers:
            taken = [entry for entry in taken if entry[1]]
        at = 0
        while at < len(taken):
            at = self._assemble(pair, taken, at)
        if taken and self.refill:
            self.fill(pair)

    def _assemble(self, pair: int, taken: list[Taken], at: int) -> int:
        head, length, segments, _ = taken[at]
        data = self._gather(segments, length)
        if length < 12 and not self.features & MRG_RXBUF:
            raise RingFault(f"receive buffer {head} returned with {length} bytes")
        pieces, room = [data], [sum(s.length for s in segments)]
        while len(b"".join(pieces)) < 12:
            at += 1
            if at >= len(taken):
                raise RingFault(f"{len(b''.join(pieces))} bytes of a header, then nothing")
            pieces.append(self._gather(taken[at][2], taken[at][1]))
            room.append(sum(s.length for s in taken[at][2]))
        header = VnetHeader.unpack(b"".join(pieces))
        if not 1 <= header.num_buffers:
            raise RingFault(f"num_buffers {header.num_buffers}")
        if header.num_buffers < len(pieces):
            raise RingFault(f"num_buffers {header.num_buffers}, header spans {len(pieces)} buffers")
        while len(pieces) < header.num_buffers:
            at += 1
            if at >= len(taken):
                raise RingFault(
                    f"num_buffers {header.num_buffers}, but {len(pieces)} were returned"
                )
            pieces.append(self._gather(taken[at][2], taken[at][1]))
            room.append(sum(s.length for s in taken[at][2]))
        for piece, size in list(zip(pieces, room, strict=True))[:-1]:
            if len(piece) != size:
                raise RingFault(f"{len(piece)} bytes in a buffer of {size} that is not the last")
        frame = b"".join(pieces)[12:]
        self._check_header(header, frame)
        self.inbox[pair].append((header, frame))
        return at + 1

    def _gather(self, segments: Iterable[Segment], length: int) -> bytes:
        parts = []
        for segment in segments:
            part = min(length, segment.length)
            parts.append(self.memory.read(segment.gpa, part))
            length -= part
        return b"".join(parts)

    def _check_header(self, header: VnetHeader, frame: bytes) -> None:
        """Promises of the virtio-net header against the negotiated features (virtio 5.1.6.4.1)."""
        if header.flags & ~(NEEDS_CSUM | DATA_VALID):
            raise RingFault(f"unknown header flags {header.flags:#x}")
        if header.flags and not self.features & GUEST_CSUM:
            raise RingFault(f"header flags {header.flags:#x} without GUEST_CSUM")
        if header.num_buffers > 1 and not self.features & MRG_RXBUF:
            raise RingFault(f"num_buffers {header.num_buffers} without MRG_RXBUF")
        kind = header.gso_type & ~GSO_ECN
        if kind and not self.features & GSO_BITS.get(kind, 0):
            raise RingFault(f"gso_type {kind} was not negotiated")
        if len(frame) > FRAME_MAX:
            raise RingFault(f"frame of {len(frame)} bytes")

    def recv(self, pair: int, timeout: float = 5.0) -> tuple[VnetHeader, bytes]:
        """The next frame delivered on the pair, or `Lost` after `timeout` s."""
        deadline = time.monotonic() + timeout
        while not self.inbox[pair]:
            self.poll(pair)
            if self.inbox[pair]:
                break
            left = deadline - time.monotonic()
            if left <= 0:
                raise Lost(f"no frame on receive ring {pair} within {timeout} s")
            self.wait_calls([self.rx(pair)], left)
        return self.inbox[pair].popleft()

    def count_calls(self, pair: int) -> int:
        """How often the pair's receive ring was called since last asked, taken up or not."""
        queue = self.rx(pair)
        queue.calls += drain(queue.call)
        calls, queue.calls = queue.calls, 0
        return calls

    def wait_calls(
        self, queues: Sequence[Queue], timeout: float, extra: Sequence[Any] = ()
    ) -> None:
        """Sleep until a call comes for one of `queues`, one of `extra` is readable, or `timeout` s
        passed.

        A receive ring that has used buffers when the sleep ends without a call, although calls
        were wanted since before, is a lost notification and raises.
        """
        for queue in queues:
            queue.ring.want_calls(True)
        if any(queue.ring.pending() for queue in queues):
            return
        ready, _, _ = select.select([q.call for q in queues] + list(extra), [], [], timeout)
        late = [q for q in queues if q.ring.pending() and q.call not in ready]
        if late and not ready:
            time.sleep(0.05)
            for queue in late:
                if not select.select([queue.call], [], [], 0)[0]:
                    raise RingFault(f"ring {queue.index} has used buffers, but no call came")
        for queue in queues:
            if queue.call in ready:
                queue.calls += drain(queue.call)


def _contiguous(gpa: int, lengths: Sequence[int]) -> list[Segment]:
    segments = []
    for length in lengths:
        segments.append(Segment(gpa, length))
        gpa += length
    return segments
