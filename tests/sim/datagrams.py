"""Datagram sockets of the kernel that is made up (kernel.py), UDP and echo.

What is modelled: datagrams with their borders; a receive buffer beyond which a datagram is lost, as
on any host, which is counted here; a send buffer that is full until the program has read; an error
of an earlier datagram that fails one call and is gone then; trains that are cut here (UDP_SEGMENT),
or, on a host that cannot, refused as a route without checksum offload refuses them. A `Witness` is
told what goes through and when: the moment at which a datagram leaves its socket is the one at
which a worker chooses a queue for it.

Not covered: datagrams that the kernel puts together (UDP_GRO, which is asked for only where the
guest takes trains), the error queue (MSG_ERRQUEUE), datagrams cut short (no room is too small for
one of ours), sockets of forwarded ports, IPv6.
"""

from __future__ import annotations

import ctypes
import struct
from typing import Any, Protocol

from dataplane import sockets
from dataplane.context import MMSG_BYTES
from dataplane.udp_train import CMSG_BYTES, MSG_LEN

SNDBUF, RCVBUF = 15_000, 30_000
OVERHEAD = 250  # what the kernel adds to a datagram before it counts its bytes
SEGMENTS_MAX, PAYLOAD_MAX = 64, 65507
IOV, IOV_COUNT, CONTROL, CONTROL_SIZE = range(2, 6)  # words of struct msghdr


class Watched:
    """What stands behind descriptors, `fds` of them, and who waits for it."""

    def __init__(self) -> None:
        self.fds = 0
        self.watched: dict[int, list[Any]] = {}  # by epoll: events, data, whether there is an edge

    def edge(self) -> None:
        for entry in self.watched.values():
            entry[2] = True

    def watch(self, epfd: int, events: int, data: int) -> None:
        self.watched[epfd] = [events, data, True]

    def events(self) -> int:
        """What poll would say."""
        raise NotImplementedError

    def abandoned(self) -> None:
        """Nobody has it open any more."""
        self.watched = {}


class Witness(Protocol):
    """Who is told what happens to datagrams."""

    def connected(self, sock: Datagrams, port: int) -> None:
        """A worker has connected a socket to a program; to a host, by port 0, for echoes."""

    def sent(self, sock: Datagrams, data: bytes) -> None:
        """A worker has sent one."""

    def taken(self, sock: Datagrams, data: bytes) -> None:
        """A worker has received one."""


class Datagrams(Watched):
    """One connected socket, and what its program at the other end sees of it."""

    def __init__(self, protocol: int, cuts: bool, witness: Witness | None) -> None:
        super().__init__()
        self.protocol, self.cuts, self.witness = protocol, cuts, witness
        self.connected = False
        self.error = 0
        self.tx: list[bytes] = []
        self.rx: list[bytes] = []

    def events(self) -> int:
        found = sockets.EPOLLOUT | (sockets.EPOLLIN if self.rx else 0)
        return found | (sockets.EPOLLERR if self.error else 0)

    # --- the other end ---

    def deliver(self, data: bytes) -> bool:
        """A datagram from the other end; False: it is lost."""
        if not self.fds or _weight(self.rx) + len(data) > RCVBUF:
            return False
        self.rx.append(data)
        self.edge()
        return True

    def fetch(self, count: int) -> list[bytes]:
        """Datagrams for the other end."""
        taken, self.tx = self.tx[:count], self.tx[count:]
        return taken

    def fail(self, error: int) -> None:
        """Some ICMP error has come, about what was sent before."""
        self.error = error
        self.edge()

    # --- calls ---

    def _failed(self) -> int:
        error, self.error = self.error, 0
        return -error

    def _send(self, iov: int, count: int, segment: int) -> int:
        if error := self._failed():
            return error
        data = b"".join(ctypes.string_at(at, length) for at, length in pieces(iov, count))
        assert len(data) <= PAYLOAD_MAX, "longer than any datagram"
        if _weight(self.tx) > SNDBUF:
            return -sockets.EAGAIN
        for at in range(0, max(len(data), 1), segment or PAYLOAD_MAX):
            part = data[at : at + (segment or PAYLOAD_MAX)]
            self.tx.append(part)
            assert self.witness is not None
            self.witness.sent(self, part)
        return len(data)

    def sendmsg(self, message: int) -> int:
        header, segment = words(message, 6), 0
        if header[CONTROL_SIZE]:
            _, level, kind = struct.unpack("<QII", ctypes.string_at(header[CONTROL], CMSG_BYTES))
            assert (level, kind) == (sockets.SOL_UDP, sockets.UDP_SEGMENT)
            if not self.cuts:
                return -sockets.EIO
            segment = struct.unpack("<H", ctypes.string_at(header[CONTROL] + CMSG_BYTES, 2))[0]
            total = sum(length for _, length in pieces(header[IOV], header[IOV_COUNT]))
            assert 0 < segment < total <= SEGMENTS_MAX * segment, f"{total} bytes by {segment}"
        return self._send(header[IOV], header[IOV_COUNT], segment)

    def sendmmsg(self, messages: int, count: int) -> int:
        for number in range(count):
            at = messages + number * MMSG_BYTES
            done = self._send(*words(at, 4)[IOV:], 0)
            if done < 0:
                return number or done
            put(at + MSG_LEN, struct.pack("<I", done))
        return count

    def _receive(self) -> bytes | int:
        """The next datagram, or -errno."""
        if error := self._failed():
            return error
        if not self.rx:
            return -sockets.EAGAIN
        data = self.rx.pop(0)
        assert self.witness is not None
        self.witness.taken(self, data)
        return data

    def recv(self, buffer: int, size: int) -> int:
        data = self._receive()
        if isinstance(data, int):
            return data
        assert len(data) <= size, "cut short"
        put(buffer, data)
        return len(data)

    def recvmsg(self, message: int) -> int:
        data = self._receive()
        if isinstance(data, int):
            return data
        header, done = words(message, 6), 0
        for at, length in pieces(header[IOV], header[IOV_COUNT]):
            put(at, data[done : done + length])
            done += len(data[done : done + length])
        assert done == len(data), "cut short"
        put(message + 8 * CONTROL_SIZE, bytes(8))
        return done

    def recvmmsg(self, messages: int, count: int) -> int:
        for number in range(count):
            done = self.recvmsg(messages + number * MMSG_BYTES)
            if done < 0:
                return number or done
            put(messages + number * MMSG_BYTES + MSG_LEN, struct.pack("<I", done))
        return count


def _weight(queue: list[bytes]) -> int:
    return sum(OVERHEAD + len(data) for data in queue)


# --- memory of the workers ---


def put(address: int, data: bytes) -> None:
    ctypes.memmove(address, data, len(data))


def words(address: int, count: int) -> tuple[int, ...]:
    return struct.unpack(f"<{count}Q", ctypes.string_at(address, 8 * count))


def pieces(iov: int, count: int) -> list[tuple[int, int]]:
    found = words(iov, 2 * count)
    return list(zip(found[::2], found[1::2], strict=True))
