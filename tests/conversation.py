"""A vhost-user front-end on paper: it says messages to a Session and hears effects.

Bytes are packed here from the specification's tables, not by the code under test. Descriptors are
numbers from `Descriptors`, which knows which are open and objects to closing one twice.
`Conversation` is the server as well: it executes effects the way effects.py asks for, with a list
of rings for workers.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable
from typing import Any

from control.effects import (
    Ack,
    Effect,
    MemoryChanged,
    Nack,
    Reply,
    ReplyVringBase,
    RingChanged,
    RingStop,
)
from control.session import Offer, Session
from control.vhost_user import Header, Message

NUMBERS = dict(
    GET_FEATURES=1,
    SET_FEATURES=2,
    SET_OWNER=3,
    RESET_OWNER=4,
    SET_MEM_TABLE=5,
    SET_LOG_BASE=6,
    SET_LOG_FD=7,
    SET_VRING_NUM=8,
    SET_VRING_ADDR=9,
    SET_VRING_BASE=10,
    GET_VRING_BASE=11,
    SET_VRING_KICK=12,
    SET_VRING_CALL=13,
    SET_VRING_ERR=14,
    GET_PROTOCOL_FEATURES=15,
    SET_PROTOCOL_FEATURES=16,
    GET_QUEUE_NUM=17,
    SET_VRING_ENABLE=18,
    SEND_RARP=19,
    NET_SET_MTU=20,
    SET_BACKEND_REQ_FD=21,
    IOTLB_MSG=22,
    GET_CONFIG=24,
    SET_CONFIG=25,
    POSTCOPY_ADVISE=28,
    GET_INFLIGHT_FD=31,
    RESET_DEVICE=34,
    GET_MAX_MEM_SLOTS=36,
    ADD_MEM_REG=37,
    REM_MEM_REG=38,
    SET_STATUS=39,
    GET_STATUS=40,
    SET_DEVICE_STATE_FD=42,
    CHECK_DEVICE_STATE=43,
)

PROTOCOL_FEATURES = 1 << 30
VERSION_1 = 1 << 32
REPLY_ACK = 1 << 3
NO_FD = 0x100

CSUM, GUEST_CSUM, GUEST_TSO4, HOST_TSO4 = 1 << 0, 1 << 1, 1 << 7, 1 << 11
NET_MQ, EVENT_IDX, RING_PACKED = 1 << 22, 1 << 29, 1 << 34
FEATURES = CSUM | GUEST_CSUM | GUEST_TSO4 | HOST_TSO4 | NET_MQ | EVENT_IDX | VERSION_1 | RING_PACKED
SPLIT = VERSION_1 | PROTOCOL_FEATURES
"""What the back-end of these tests offers, and a guest takes: plain split rings."""

MiB = 1 << 20
GPA = 0x4000_0000
UVA = 0x7F00_0000_0000
SIZE = 64 * MiB


def u64(value: int) -> bytes:
    return struct.pack("=Q", value)


def state(index: int, num: int) -> bytes:
    return struct.pack("=II", index, num)


def addr(index: int, at: int | None = None, flags: int = 0, log: int = 0) -> bytes:
    """A split ring of up to 256 entries in three consecutive pages from `at`."""
    at = UVA + index * 0x4000 if at is None else at
    return struct.pack("=IIQQQQ", index, flags, at, at + 0x2000, at + 0x1000, log)


def region(gpa: int = GPA, size: int = SIZE, uva: int = UVA, offset: int = 0) -> bytes:
    return struct.pack("=QQQQ", gpa, size, uva, offset)


def table(*regions: bytes) -> bytes:
    return struct.pack("=II", len(regions), 0) + b"".join(regions)


def single(one: bytes) -> bytes:
    return bytes(8) + one


def message(name: str | int, payload: bytes = b"", need_reply: bool = False) -> Message:
    request = NUMBERS[name] if isinstance(name, str) else name
    return Message(Header(request, 1 | 8 * need_reply, len(payload)), payload)


def reply(name: str, payload: bytes) -> bytes:
    return struct.pack("=III", NUMBERS[name], 0x5, len(payload)) + payload


class Descriptors:
    """Numbers that stand for open files. Each is closed once, and only if it was opened."""

    def __init__(self) -> None:
        self.open: dict[int, int | None] = {}
        self._next = 100

    def new(self, size: int | None = None) -> int:
        """A descriptor: a regular file of `size` bytes, or with None something without a size."""
        self._next += 1
        self.open[self._next] = size
        return self._next

    def close(self, fd: int) -> None:
        assert fd in self.open, f"descriptor {fd} closed twice, or never ours"
        del self.open[fd]

    def fstat(self, fd: int) -> os.stat_result:
        size = self.open[fd]
        mode = stat.S_IFCHR if size is None else stat.S_IFREG
        return os.stat_result((mode, 0, 0, 1, 0, 0, size or 0, 0, 0, 0))


class Conversation:
    """`says` one message, `hears` exactly these effects, before anything else is said."""

    def __init__(
        self, offer: Offer, fails: Callable[[Effect], bool] = lambda effect: False
    ) -> None:
        self.fds = Descriptors()
        self.session = Session(offer, close=self.fds.close, fstat=self.fds.fstat)
        self.worker: dict[int, Any] = {}
        """What the workers were given last: ring index -> Ring."""
        self.mapped: tuple[Any, ...] = ()
        self.bases: dict[int, int] = {}
        """Where the workers stop: ring index -> base."""
        self.sent: list[bytes] = []
        self._fails = fails
        self._unheard: list[Effect] | None = None

    def says(
        self,
        name: str | int,
        payload: bytes = b"",
        *fds: int,
        need_reply: bool = False,
    ) -> Conversation:
        return self.says_message(message(name, payload, need_reply), *fds)

    def says_message(self, said: Message, *fds: int) -> Conversation:
        assert self._unheard is None, f"nobody listened to {self._unheard}"
        effects = self.session.receive(said, list(fds))
        self._unheard = list(effects)
        self.sent = []
        self._execute(effects)
        return self

    def hangs_up(self) -> Conversation:
        assert self._unheard is None, f"nobody listened to {self._unheard}"
        effects = self.session.hangup()
        self._unheard = list(effects)
        self._execute(effects)
        return self

    def hears(self, *expected: Effect) -> None:
        heard = self.listens()
        assert heard == list(expected)

    def listens(self) -> list[Effect]:
        """What was heard, for a test that looks at it itself."""
        assert self._unheard is not None, "nothing was said"
        heard, self._unheard = self._unheard, None
        return heard

    def ring(self, index: int) -> Any:
        return self.session.device.rings[index]

    @property
    def running(self) -> set[int]:
        return {ring.index for ring in self.session.device.rings if ring.started}

    @property
    def working(self) -> set[int]:
        """Rings that are started and enabled."""
        return {ring.index for ring in self.session.device.rings if ring.started and ring.enabled}

    def _execute(self, effects: list[Effect]) -> None:
        failed = False
        for effect in effects:
            if self._fails(effect):
                failed = True
                self._execute(self.session.effect_failed(effect, "no more of that"))
                continue
            self._execute_one(effect, failed)

    def _execute_one(self, effect: Effect, failed: bool) -> None:
        session = self.session
        match effect:
            case MemoryChanged():
                self.mapped = session.device.memory
            case RingChanged(index):
                if session.device.rings[index].started:
                    self.worker[index] = session.device.rings[index]
            case RingStop(index):
                if self.worker.pop(index, None):
                    session.ring_stopped(index, self.bases.get(index, 0))
            case Ack():
                self.sent.append(effect.data(failed))
            case Nack() | Reply():
                self.sent.append(effect.data)
            case ReplyVringBase(index):
                self.sent.append(session.vring_base_reply(index))


def talk(pairs: int = 1, acks: bool = False, **more: int) -> Conversation:
    """A conversation that has just begun; with `acks` REPLY_ACK is agreed on."""
    said = Conversation(Offer(FEATURES, pairs, **more))
    if acks:
        said.says("SET_PROTOCOL_FEATURES", u64(REPLY_ACK)).hears()
    return said


def with_memory(pairs: int = 1, acks: bool = False, features: int = SPLIT) -> Conversation:
    """Features and one region of memory are set."""
    said = talk(pairs, acks)
    said.says("SET_FEATURES", u64(features)).hears()
    said.says("SET_MEM_TABLE", table(region()), said.fds.new(SIZE)).hears(MemoryChanged())
    return said


def start_ring(said: Conversation, index: int = 0, base: int = 0) -> None:
    said.says("SET_VRING_NUM", state(index, 256)).hears()
    said.says("SET_VRING_BASE", state(index, base)).hears()
    said.says("SET_VRING_ADDR", addr(index)).hears()
    said.says("SET_VRING_KICK", u64(index), said.fds.new()).hears(RingChanged(index))
    said.says("SET_VRING_CALL", u64(index), said.fds.new()).hears(RingChanged(index))


def started(pairs: int = 1, acks: bool = False, features: int = SPLIT) -> Conversation:
    """All rings run and are enabled."""
    said = with_memory(pairs, acks, features)
    for index in range(2 * pairs):
        start_ring(said, index)
        said.says("SET_VRING_ENABLE", state(index, 1)).hears(RingChanged(index))
    return said
