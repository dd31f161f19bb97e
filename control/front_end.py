"""front_end.py - the front-end's side of a vhost-user connection: what a VMM says to a back-end.

Theory      Requests are sent one at a time. One with an answer waits for it; one without asks for
            an acknowledgement where the back-end can give one (REPLY_ACK), so that a refusal is
            noticed at the request refused. The order is QEMU's: owner, features, memory, each
            ring's description, its kick descriptor last, then all rings are enabled.
Sources     QEMU docs/interop/vhost-user.rst; the wire format is control/vhost_user.py.
Rings       A ring's driver area goes as its "available" address, the device's as its "used" one.
            It starts at 0; of a packed ring the wrap counters are told too, and begin as 1.
Limits      One memory region, rings that are never described anew. NOTIFICATION_DATA changes
            nothing: an eventfd carries no data. ANSWER_S seconds for an answer: a back-end that has
            to compile first still makes it.
Ownership   The connection. Descriptors sent stay the caller's.
Errors      FrontEndError with one line for the operator.
"""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass

from control.vhost_user import (
    HEADER_SIZE,
    Header,
    MemoryRegion,
    ProtocolFeature,
    Refused,
    Request,
    VirtioFeature,
    VringAddr,
    VringFd,
    VringState,
    consistent,
    decode_u64,
    encode_mem_table,
    encode_request,
    encode_u64,
    request_name,
)
from dataplane.guest_memory import GPA, Plan, RingPlace

ANSWER_S = 60.0
STOP_S = 1.0

_F, _P = VirtioFeature, ProtocolFeature
OFFLOADS = (
    (_F.CSUM | _F.HOST_TSO4 | _F.HOST_TSO6 | _F.HOST_ECN)
    | (_F.GUEST_CSUM | _F.GUEST_TSO4 | _F.GUEST_TSO6 | _F.GUEST_ECN)
)  # fmt: skip
USO = _F.HOST_USO | _F.GUEST_USO4 | _F.GUEST_USO6
TAP_USO_KERNEL = (6, 2)  # the first Linux whose TAP knows USO
RINGS = (
    (_F.INDIRECT_DESC | _F.EVENT_IDX)
    | (_F.RING_PACKED | _F.IN_ORDER | _F.NOTIFICATION_DATA)
)  # fmt: skip
WANTED = OFFLOADS | RINGS | _F.MRG_RXBUF | _F.VERSION_1
PACKED_START = 0x80008000  # next to offer and to use: place 0, wrap counter 1 (bits 15 and 31)


class FrontEndError(Exception):
    """The back-end cannot be used (any more); the text is one line for the operator."""


def _tap_has_uso() -> bool:
    """Whether the kernel's TAP takes and gives large datagrams; it has no way to ask it that comes
    before the features are settled."""
    version = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return version is not None and tuple(map(int, version.groups())) >= TAP_USO_KERNEL


@dataclass(frozen=True, slots=True)
class RingFds:
    """The event descriptors of one ring."""

    kick: int
    call: int
    err: int


class FrontEnd:
    """A connection to a vhost-user back-end. `features` are those negotiated."""

    def __init__(self, path: str) -> None:
        """Connect to the socket at `path`."""
        self.features = 0
        self._rings = 0
        self._acks = False
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(ANSWER_S)
        try:
            self.socket.connect(path)
        except OSError as error:
            self.socket.close()
            raise FrontEndError(f"cannot connect to {path}: {error.strerror or error}") from error

    def close(self) -> None:
        """End the connection."""
        self.socket.close()

    def negotiate(self, pairs: int, mtu: int | None, left_out: int = 0) -> None:
        """Agree on features for `pairs` queue pairs, without those of `left_out`; tell the MTU to a
        back-end that listens."""
        self._tell(Request.SET_OWNER)
        offered = self._ask_u64(Request.GET_FEATURES)
        if not offered & _F.VERSION_1:
            raise FrontEndError("the back-end does not offer VERSION_1 (virtio 1.0)")
        protocol = 0
        if offered & _F.PROTOCOL_FEATURES:
            wanted = _P.MQ | _P.REPLY_ACK | (_P.NET_MTU if mtu else 0)
            protocol = self._ask_u64(Request.GET_PROTOCOL_FEATURES) & wanted
            self._tell(Request.SET_PROTOCOL_FEATURES, encode_u64(protocol))
            self._acks = bool(protocol & _P.REPLY_ACK)
        most = self._ask_u64(Request.GET_QUEUE_NUM) if protocol & _P.MQ else 1
        if pairs > most:
            raise FrontEndError(f"{pairs} queue pairs wanted, the back-end serves {most}")
        if mtu and protocol & _P.NET_MTU:
            self._tell(Request.NET_SET_MTU, encode_u64(mtu))
        asked = WANTED | _F.PROTOCOL_FEATURES | (_F.NET_MQ if pairs > 1 else 0)
        asked |= _F.MTU if protocol & _P.NET_MTU else 0
        asked |= USO if _tap_has_uso() else 0
        self.features = consistent(offered & asked & ~left_out)
        self._tell(Request.SET_FEATURES, encode_u64(self.features))

    def start(self, plan: Plan, memory_fd: int, rings: list[RingFds]) -> None:
        """Hand over memory and rings (rx, tx of each pair in turn), and have them served."""
        region = MemoryRegion(GPA, plan.size, GPA, 0)
        self._tell(Request.SET_MEM_TABLE, encode_mem_table([region]), memory_fd)
        places = [place for pair in plan.pairs for place in pair]
        for index, (place, fds) in enumerate(zip(places, rings, strict=True)):
            self._describe(index, place, fds)
        self._rings = len(rings)
        if self.features & _F.PROTOCOL_FEATURES:  # else the rings are enabled as they start
            for index in range(len(rings)):
                self._tell(Request.SET_VRING_ENABLE, VringState(index, 1).encode())

    def _describe(self, index: int, place: RingPlace, fds: RingFds) -> None:
        areas = (GPA + place.desc, GPA + place.used, GPA + place.avail)
        start = PACKED_START if self.features & _F.RING_PACKED else 0
        self._tell(Request.SET_VRING_NUM, VringState(index, place.num).encode())
        self._tell(Request.SET_VRING_BASE, VringState(index, start).encode())
        self._tell(Request.SET_VRING_ADDR, VringAddr(index, 0, *areas).encode())
        which = VringFd(index, True).encode()
        self._tell(Request.SET_VRING_ERR, which, fds.err)
        self._tell(Request.SET_VRING_CALL, which, fds.call)
        self._tell(Request.SET_VRING_KICK, which, fds.kick)

    def stop(self) -> None:
        """Have all rings stopped, as a guest that shuts down in order; a dead back-end is fine."""
        self.socket.settimeout(STOP_S)
        try:
            for index in range(self._rings):
                self._ask(Request.GET_VRING_BASE, VringState(index, 0).encode())
        except FrontEndError:
            pass

    def check(self) -> None:
        """Raise FrontEndError when the back-end has gone; to call when the socket is readable."""
        try:
            data = self.socket.recv(1, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError as error:
            raise FrontEndError(f"the connection to the back-end failed: {error}") from error
        if data:
            raise FrontEndError("the back-end sent a message nobody asked for")
        raise FrontEndError("the back-end closed the connection")

    # Messages

    def _tell(self, request: Request, payload: bytes = b"", fd: int = -1) -> None:
        """A request without an answer of its own."""
        self._send(encode_request(request, payload, need_reply=self._acks), fd)
        if self._acks and self._answer_u64(request):
            raise FrontEndError(f"the back-end refused {request_name(request)}")

    def _ask(self, request: Request, payload: bytes = b"") -> bytes:
        """A request that has an answer; its payload."""
        self._send(encode_request(request, payload))
        return self._answer(request)

    def _ask_u64(self, request: Request) -> int:
        self._send(encode_request(request))
        return self._answer_u64(request)

    def _send(self, data: bytes, fd: int = -1) -> None:
        try:
            socket.send_fds(self.socket, [data], [fd] if fd >= 0 else [])
        except OSError as error:
            raise FrontEndError(f"the back-end takes no message: {error}") from error

    def _answer(self, request: Request) -> bytes:
        header = Header.decode(self._receive(HEADER_SIZE, request))
        problem = header.problem(reply=True)
        if header.request != request:
            problem = f"an answer to {request_name(header.request)}"
        if problem:
            raise FrontEndError(f"bad answer to {request_name(request)}: {problem}")
        return self._receive(header.payload_size, request)

    def _answer_u64(self, request: Request) -> int:
        try:
            return decode_u64(self._answer(request))
        except Refused as error:
            raise FrontEndError(f"bad answer to {request_name(request)}: {error}") from error

    def _receive(self, size: int, request: Request) -> bytes:
        data = b""
        while len(data) < size:
            try:
                part = self.socket.recv(size - len(data))
            except OSError as error:
                reason = f"no answer to {request_name(request)}: {error}"
                raise FrontEndError(f"the back-end gave {reason}") from error
            if not part:
                raise FrontEndError(
                    f"the back-end closed the connection at {request_name(request)}"
                )
            data += part
        return data
