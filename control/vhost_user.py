"""vhost_user.py - the vhost-user wire format: numbers, bits, payloads, sizes. Constants and pure
functions only.

Theory      A message is a 12-byte header {u32 request, u32 flags, u32 size} in host byte order,
            then `size` bytes of payload; descriptors travel as SCM_RIGHTS beside the header. The
            reader takes exactly 12 bytes, then exactly `Header.payload_size` bytes: one longer
            read would join two messages and credit the second one's descriptors to the first.
            Source of all numbers: QEMU docs/interop/vhost-user.rst; of the virtio bits: virtio
            1.3, chapters 5.1.3 and 6.
Directions  Every payload encodes and decodes, so that the back-end (session.py) and a front-end
            (`vhostmq guest`) speak from this one page.
Errors      Decoding raises `Refused` with the reason, never anything else. Encoding trusts its
            caller.
Rules       RULES lists the requests this project serves: how the payload is decoded, how many
            descriptors may come with it, and the protocol feature without which the request is not
            for us. What is not listed is refused: politely where the specification defines an
            error reply (ERROR_REPLIES) or REPLY_ACK allows one, else by closing the session.
Limits      Payloads to PAYLOAD_MAX bytes, memory tables to TABLE_REGIONS_MAX regions: the
            specification says 8, Cloud Hypervisor sends up to 32 after memory was plugged in and
            its guest rebooted.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from enum import IntEnum, IntFlag
from typing import Any, ClassVar, Self

from shm.record import Record

HEADER_SIZE = 12
VERSION = 1
VERSION_MASK = 0x3
REPLY = 0x4
NEED_REPLY = 0x8

PAYLOAD_MAX = 4096
TABLE_REGIONS_MAX = 32
RING_SIZE_MAX = 32768
QUEUE_PAIRS_MAX = 32
MTU_MIN = 68
MTU_MAX = 65535

ADDRESS_END = 1 << 63
"""Guest and user addresses and file offsets lie below this, so that int64 holds them (no wrap, no
sign)."""

_HEADER = struct.Struct("=III")
_U64 = struct.Struct("=Q")
_TABLE = struct.Struct("=II")


class Refused(Exception):
    """A message cannot be honoured; str() says why in words an operator can use."""


class Request(IntEnum):
    """Front-end to back-end requests."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43
    GET_SHMEM_CONFIG = 44


class ProtocolFeature(IntFlag):
    """Bits of GET/SET_PROTOCOL_FEATURES."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    RARP = 1 << 2
    REPLY_ACK = 1 << 3
    NET_MTU = 1 << 4
    BACKEND_REQ = 1 << 5
    CROSS_ENDIAN = 1 << 6
    CRYPTO_SESSION = 1 << 7
    PAGEFAULT = 1 << 8
    CONFIG = 1 << 9
    BACKEND_SEND_FD = 1 << 10
    HOST_NOTIFIER = 1 << 11
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16
    XEN_MMAP = 1 << 17
    SHARED_OBJECT = 1 << 18
    DEVICE_STATE = 1 << 19


class VirtioFeature(IntFlag):
    """Bits of GET/SET_FEATURES: virtio-net's, virtio's, and two of vhost's own (LOG_ALL,
    PROTOCOL_FEATURES)."""

    CSUM = 1 << 0
    GUEST_CSUM = 1 << 1
    CTRL_GUEST_OFFLOADS = 1 << 2
    MTU = 1 << 3
    MAC = 1 << 5
    GSO = 1 << 6
    GUEST_TSO4 = 1 << 7
    GUEST_TSO6 = 1 << 8
    GUEST_ECN = 1 << 9
    GUEST_UFO = 1 << 10
    HOST_TSO4 = 1 << 11
    HOST_TSO6 = 1 << 12
    HOST_ECN = 1 << 13
    HOST_UFO = 1 << 14
    MRG_RXBUF = 1 << 15
    NET_STATUS = 1 << 16
    CTRL_VQ = 1 << 17
    CTRL_RX = 1 << 18
    CTRL_VLAN = 1 << 19
    CTRL_RX_EXTRA = 1 << 20
    GUEST_ANNOUNCE = 1 << 21
    NET_MQ = 1 << 22
    CTRL_MAC_ADDR = 1 << 23
    NOTIFY_ON_EMPTY = 1 << 24
    LOG_ALL = 1 << 26
    ANY_LAYOUT = 1 << 27
    INDIRECT_DESC = 1 << 28
    EVENT_IDX = 1 << 29
    PROTOCOL_FEATURES = 1 << 30
    VERSION_1 = 1 << 32
    ACCESS_PLATFORM = 1 << 33
    RING_PACKED = 1 << 34
    IN_ORDER = 1 << 35
    ORDER_PLATFORM = 1 << 36
    SR_IOV = 1 << 37
    NOTIFICATION_DATA = 1 << 38
    RING_RESET = 1 << 40
    GUEST_USO4 = 1 << 54
    GUEST_USO6 = 1 << 55
    HOST_USO = 1 << 56
    HASH_REPORT = 1 << 57
    GUEST_HDRLEN = 1 << 59
    RSS = 1 << 60
    RSC_EXT = 1 << 61
    STANDBY = 1 << 62
    SPEED_DUPLEX = 1 << 63


_F = VirtioFeature

REQUIREMENTS: tuple[tuple[int, int], ...] = (
    (_F.GUEST_TSO4, _F.GUEST_CSUM),
    (_F.GUEST_TSO6, _F.GUEST_CSUM),
    (_F.GUEST_UFO, _F.GUEST_CSUM),
    (_F.GUEST_USO4, _F.GUEST_CSUM),
    (_F.GUEST_USO6, _F.GUEST_CSUM),
    (_F.GUEST_ECN, _F.GUEST_TSO4 | _F.GUEST_TSO6),
    (_F.HOST_TSO4, _F.CSUM),
    (_F.HOST_TSO6, _F.CSUM),
    (_F.HOST_UFO, _F.CSUM),
    (_F.HOST_USO, _F.CSUM),
    (_F.HOST_ECN, _F.HOST_TSO4 | _F.HOST_TSO6),
)
"""(feature, any of these must be there too): virtio 1.3, 5.1.3.1. Ordered: what is required comes
first. The rules about CTRL_VQ are left out: a front-end that serves the control queue itself takes
CTRL_VQ from what it passes on."""


def consistent(features: int) -> int:
    """`features` without those whose requirement is missing (REQUIREMENTS)."""
    for feature, needed in REQUIREMENTS:
        if not features & needed:
            features &= ~feature
    return features


def feature_names(bits: int, kind: type[IntFlag] = VirtioFeature) -> str:
    """The names of set bits, lowest first, separated by blanks; a bit without a name is `bN`."""
    known = {member.value: member.name for member in kind}
    found = [1 << n for n in range(64) if bits >> n & 1]
    return " ".join(known.get(bit) or f"b{bit.bit_length() - 1}" for bit in found)


class Header(Record):
    """The 12 bytes in front of every message."""

    request: int
    flags: int
    size: int

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """From exactly HEADER_SIZE bytes (the caller's duty: this much is read before anything is
        known)."""
        return cls(*_HEADER.unpack(data))

    def encode(self) -> bytes:
        """As it goes on the wire."""
        return _HEADER.pack(self.request, self.flags, self.size)

    @property
    def need_reply(self) -> bool:
        return bool(self.flags & NEED_REPLY)

    def problem(self, reply: bool = False) -> str:
        """Why the stream cannot be trusted after this header, or "". `reply`: a reply is expected,
        not a request."""
        if self.flags & VERSION_MASK != VERSION:
            return f"message version {self.flags & VERSION_MASK} instead of {VERSION}"
        if bool(self.flags & REPLY) != reply:
            return "a request where a reply is due" if reply else "a reply nobody asked for"
        if self.size > PAYLOAD_MAX:
            return f"payload of {self.size} bytes, more than {PAYLOAD_MAX}"
        return ""

    @property
    def payload_size(self) -> int:
        """Bytes to read after the header: none when the size is beyond belief (the session will
        close then)."""
        return self.size if self.size <= PAYLOAD_MAX else 0


class Message(Record):
    """A header and the payload that was read after it."""

    header: Header
    payload: bytes = b""


def request_name(request: int) -> str:
    """SET_OWNER, or `request 77` for a number without a name."""
    return Request(request).name if request in _REQUEST_NUMBERS else f"request {request}"


_REQUEST_NUMBERS = frozenset(Request)


def encode_request(request: int, payload: bytes = b"", need_reply: bool = False) -> bytes:
    """A request on the wire, either direction's (descriptors go beside it)."""
    flags = VERSION | (NEED_REPLY if need_reply else 0)
    return Header(request, flags, len(payload)).encode() + payload


def encode_reply(request: int, payload: bytes) -> bytes:
    """A reply on the wire: version and REPLY, never NEED_REPLY."""
    return Header(request, VERSION | REPLY, len(payload)).encode() + payload


def encode_ack(request: int, ok: bool) -> bytes:
    """The answer to NEED_REPLY under REPLY_ACK: u64 0 for success, 1 for failure."""
    return encode_reply(request, encode_u64(0 if ok else 1))


def encode_u64(value: int) -> bytes:
    """A payload that is one number."""
    return _U64.pack(value)


def decode_u64(payload: bytes) -> int:
    """The number of such a payload; raises Refused."""
    return int(_unpack(_U64, payload)[0])


def decode_nothing(payload: bytes) -> None:
    """Raise Refused unless the payload is empty."""
    if payload:
        raise Refused(f"payload of {len(payload)} bytes where none belongs")


def _unpack(layout: struct.Struct, payload: bytes) -> tuple[Any, ...]:
    if len(payload) != layout.size:
        raise Refused(f"payload of {len(payload)} bytes instead of {layout.size}")
    return layout.unpack(payload)


class VringState(Record):
    """NUM, BASE, ENABLE: a ring and one number. Packed rings use all 32 bits of a base."""

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=II")
    index: int
    num: int

    @classmethod
    def decode(cls, payload: bytes) -> Self:
        """From a payload; raises Refused."""
        return cls(*_unpack(cls.LAYOUT, payload))

    def encode(self) -> bytes:
        """As it goes on the wire."""
        return self.LAYOUT.pack(self.index, self.num)


class VringAddr(Record):
    """ADDR: where a ring lies, in the front-end's user addresses; mind the order on the wire."""

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=IIQQQQ")
    index: int
    flags: int
    desc: int
    used: int
    avail: int
    log: int = 0

    @classmethod
    def decode(cls, payload: bytes) -> Self:
        """From a payload; raises Refused."""
        return cls(*_unpack(cls.LAYOUT, payload))

    def encode(self) -> bytes:
        """As it goes on the wire."""
        fields = (self.index, self.flags, self.desc, self.used, self.avail, self.log)
        return self.LAYOUT.pack(*fields)


class VringFd(Record):
    """KICK, CALL, ERR: the ring its descriptor is for; bit 8 says that none comes."""

    NO_FD: ClassVar[int] = 0x100
    index: int
    has_fd: bool

    @classmethod
    def decode(cls, payload: bytes) -> Self:
        """From a payload; raises Refused."""
        value = decode_u64(payload)
        if value >= 2 * cls.NO_FD:
            raise Refused(f"reserved bits in {value:#x}")
        return cls(value & 0xFF, not value & cls.NO_FD)

    def encode(self) -> bytes:
        """As it goes on the wire."""
        return encode_u64(self.index | (0 if self.has_fd else self.NO_FD))


class MemoryRegion(Record):
    """A stretch of guest memory: `size` bytes at guest address `gpa`, `uva` in the front-end, in a
    file that is to be mapped from 0: its first byte is at `mmap_offset`."""

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=QQQQ")
    gpa: int
    size: int
    uva: int
    mmap_offset: int

    @classmethod
    def decode(cls, payload: bytes) -> Self:
        """From the payload of ADD_MEM_REG or REM_MEM_REG (8 bytes of padding first)."""
        return cls(*_unpack(_SINGLE_REGION, payload)[1:])

    def pack(self) -> bytes:
        return self.LAYOUT.pack(self.gpa, self.size, self.uva, self.mmap_offset)

    def encode(self) -> bytes:
        """As it goes on the wire."""
        return bytes(8) + self.pack()


_SINGLE_REGION = struct.Struct("=QQQQQ")


def encode_mem_table(regions: list[MemoryRegion]) -> bytes:
    """SET_MEM_TABLE's payload."""
    return _TABLE.pack(len(regions), 0) + b"".join(region.pack() for region in regions)


def decode_mem_table(payload: bytes) -> list[MemoryRegion]:
    """SET_MEM_TABLE. A payload longer than its regions need is fine: UML always sends room for
    two."""
    if len(payload) < _TABLE.size:
        raise Refused(f"payload of {len(payload)} bytes is too short for a memory table")
    count = _TABLE.unpack_from(payload)[0]
    if count > TABLE_REGIONS_MAX:
        raise Refused(f"{count} memory regions, more than {TABLE_REGIONS_MAX}")
    end = _TABLE.size + count * MemoryRegion.LAYOUT.size
    if len(payload) < end:
        raise Refused(f"payload of {len(payload)} bytes is too short for {count} memory regions")
    fields = MemoryRegion.LAYOUT.iter_unpack(payload[_TABLE.size : end])
    return [MemoryRegion(*values) for values in fields]


def decode_mac(payload: bytes) -> bytes:
    """SEND_RARP's payload: six bytes of a MAC address in a u64; raises Refused."""
    if len(payload) != _U64.size:
        raise Refused(f"payload of {len(payload)} bytes instead of {_U64.size}")
    return payload[:6]


class Rule(Record):
    """How a request is taken apart: payload, least and most descriptors, protocol feature (0:
    always served)."""

    decode: Callable[[bytes], Any]
    fds: tuple[int, int] = (0, 0)
    needs: int = 0


RULES: dict[int, Rule] = {
    Request.GET_FEATURES: Rule(decode_nothing),
    Request.SET_FEATURES: Rule(decode_u64),
    Request.SET_OWNER: Rule(decode_nothing),
    Request.RESET_OWNER: Rule(decode_nothing),
    Request.SET_MEM_TABLE: Rule(decode_mem_table, (0, TABLE_REGIONS_MAX)),
    Request.SET_VRING_NUM: Rule(VringState.decode),
    Request.SET_VRING_ADDR: Rule(VringAddr.decode),
    Request.SET_VRING_BASE: Rule(VringState.decode),
    Request.GET_VRING_BASE: Rule(VringState.decode),
    Request.SET_VRING_KICK: Rule(VringFd.decode, (0, 1)),
    Request.SET_VRING_CALL: Rule(VringFd.decode, (0, 1)),
    Request.SET_VRING_ERR: Rule(VringFd.decode, (0, 1)),
    Request.GET_PROTOCOL_FEATURES: Rule(decode_nothing),
    Request.SET_PROTOCOL_FEATURES: Rule(decode_u64),
    Request.GET_QUEUE_NUM: Rule(decode_nothing),
    Request.SET_VRING_ENABLE: Rule(VringState.decode),
    Request.SEND_RARP: Rule(decode_mac, needs=ProtocolFeature.RARP),
    Request.NET_SET_MTU: Rule(decode_u64, needs=ProtocolFeature.NET_MTU),
    Request.SET_BACKEND_REQ_FD: Rule(decode_nothing, (1, 1), ProtocolFeature.BACKEND_REQ),
    Request.RESET_DEVICE: Rule(decode_nothing, needs=ProtocolFeature.RESET_DEVICE),
    Request.GET_MAX_MEM_SLOTS: Rule(decode_nothing, needs=ProtocolFeature.CONFIGURE_MEM_SLOTS),
    Request.ADD_MEM_REG: Rule(MemoryRegion.decode, (0, 1), ProtocolFeature.CONFIGURE_MEM_SLOTS),
    # A descriptor with REM_MEM_REG is an old front-end's mistake that the specification has us
    # close in silence.
    Request.REM_MEM_REG: Rule(MemoryRegion.decode, (0, 1), ProtocolFeature.CONFIGURE_MEM_SLOTS),
    Request.SET_STATUS: Rule(decode_u64, needs=ProtocolFeature.STATUS),
    Request.GET_STATUS: Rule(decode_nothing, needs=ProtocolFeature.STATUS),
}

SERVED_PROTOCOL_FEATURES = ProtocolFeature(
    ProtocolFeature.MQ
    | ProtocolFeature.RARP
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.NET_MTU
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
)
"""Every protocol feature that RULES and session.py honour. BACKEND_REQ is there because UML cannot
probe without it."""

OWN_REPLY: frozenset[int] = frozenset(
    {
        Request.GET_FEATURES,
        Request.GET_VRING_BASE,
        Request.GET_PROTOCOL_FEATURES,
        Request.GET_QUEUE_NUM,
        Request.IOTLB_MSG,
        Request.GET_CONFIG,
        Request.CREATE_CRYPTO_SESSION,
        Request.POSTCOPY_ADVISE,
        Request.POSTCOPY_END,
        Request.GET_INFLIGHT_FD,
        Request.GET_MAX_MEM_SLOTS,
        Request.GET_STATUS,
        Request.GET_SHARED_OBJECT,
        Request.SET_DEVICE_STATE_FD,
        Request.CHECK_DEVICE_STATE,
        Request.GET_SHMEM_CONFIG,
    }
)
"""Requests whose sender waits for a reply of their own kind, NEED_REPLY or not; an ack would be
taken for it. SET_LOG_BASE belongs here only with LOG_SHMFD, which is not offered."""

ERROR_REPLIES: dict[int, bytes] = {
    Request.IOTLB_MSG: encode_u64(1),
    Request.GET_CONFIG: b"",
    Request.POSTCOPY_END: encode_u64(1),
    Request.SET_DEVICE_STATE_FD: encode_u64(0x101),  # failed, and no descriptor comes back
    Request.CHECK_DEVICE_STATE: encode_u64(1),
}
"""The payload that says "failed" in a reply, where the specification defines one."""
