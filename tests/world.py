"""The network a back-end under test lives in, and the host-side peers the guest talks to.

`World` is a network namespace of its own wherever the kernel lets us make one (root), so that no
test ever reaches a real network or meets another program's port; otherwise it is the current
namespace. The namespace belongs to one thread: `run` executes a function there, and sockets and
processes made there stay in it for good.

    guest   198.51.100.2, 2001:db8:1::2: the host's own addresses, as a translator gives them
    up0     the same, with default routes by .1 and ::1, where nobody answers
    lo      127.0.0.1, ::1, and the "far" host 192.0.2.7, 2001:db8:7::7, not translated

`uplink=False` leaves only lo, the machine without any network (link-local set-up).

`Peer`, `Listener` and `Datagrams` are non-blocking sockets with unbounded queues; `Guest.pump`
drives them.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import subprocess
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
IP_RECVTTL = 12  # linux/in.h; not in Python 3.11's socket module
HOP_KINDS = (socket.IP_TTL, socket.IPV6_HOPLIMIT)
CLONE_NEWNET = 0x40000000
HOST4, GATEWAY4, FAR4 = "198.51.100.2", "198.51.100.1", "192.0.2.7"
HOST6, GATEWAY6, FAR6 = "2001:db8:1::2", "2001:db8:1::1", "2001:db8:7::7"
UPLINK = f"""
link add up0 type veth peer name up1
link set up0 up
link set up1 up
addr add {HOST4}/24 dev up0
addr add {HOST6}/64 dev up0 nodad
route add default via {GATEWAY4}
-6 route add default via {GATEWAY6}
addr add {FAR4}/32 dev lo
addr add {FAR6}/128 dev lo nodad
"""


class World:
    """One network to run a back-end in; `isolated` tells whether it is a namespace of its own."""

    def __init__(self, *, uplink: bool = True) -> None:
        self._thread = ThreadPoolExecutor(1)
        self.isolated = self.run(_unshare_net)
        if self.isolated:
            self._ip("link set lo up")
            for line in UPLINK.strip().splitlines() if uplink else ():
                self._ip(line)
            self.run(_write, "/proc/sys/net/ipv4/ping_group_range", "0 2147483647")
        self._next_port = 20000 + os.getpid() % 1000

    def run(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Call `function` on the thread that lives in the namespace."""
        return self._thread.submit(function, *args, **kwargs).result()

    def _ip(self, words: str) -> None:
        self.run(subprocess.run, ["ip", *words.split()], check=True, capture_output=True)

    def close(self) -> None:
        self._thread.shutdown()

    def socket(self, family: int, kind: int) -> socket.socket:
        made = self.run(socket.socket, family, kind)
        made.setblocking(False)
        return made

    def port(self) -> int:
        """A port number not handed out before."""
        self._next_port += 1
        return self._next_port

    def listen(self, family: int, host: str | None = None, *, rcvbuf: int = 0) -> Listener:
        """A listening TCP socket on `host` (loopback) and some port."""
        made = self.socket(family, socket.SOCK_STREAM)
        if rcvbuf:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
        made.bind((host or loopback(family), 0))
        made.listen(64)
        return Listener(made)

    def udp(self, family: int, host: str | None = None) -> Datagrams:
        """A UDP socket on `host` (loopback) and some port, with a receive buffer for bursts."""
        made = self.socket(family, socket.SOCK_DGRAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        made.bind((host or loopback(family), 0))
        return Datagrams(made)

    def connect(self, family: int, port: int, host: str | None = None) -> Peer:
        """A TCP connection under way to `host` (loopback)."""
        made = self.socket(family, socket.SOCK_STREAM)
        made.connect_ex((host or loopback(family), port))
        return Peer(made)


def loopback(family: int) -> str:
    return "127.0.0.1" if family == socket.AF_INET else "::1"


def _unshare_net() -> bool:
    return ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET) == 0


def _write(path: str, value: str) -> None:
    with open(path, "w") as file:
        file.write(value)


class Peer:
    """A host application's end of a TCP connection."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.socket = sock
        self.inbox = bytearray()
        self.outbox = bytearray()
        self.eof = False
        self.error: OSError | None = None
        self.reading = True
        self.fin = False

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(self, data: bytes) -> None:
        self.outbox += data
        self.step()

    def shutdown(self) -> None:
        """Half close once everything queued is out."""
        self.fin = True
        self.step()

    @property
    def wants_read(self) -> bool:
        return self.reading and not self.eof and self.error is None

    @property
    def wants_write(self) -> bool:
        return bool(self.outbox) and self.error is None

    def step(self) -> None:
        """Whatever the socket allows now."""
        try:
            while self.outbox and self.error is None:
                del self.outbox[: self.socket.send(memoryview(self.outbox)[: 1 << 20])]
            if self.fin and not self.outbox:
                self.fin = False
                self.socket.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            pass
        except OSError as error:
            self.error = error
        try:
            while self.wants_read:
                part = self.socket.recv(1 << 18)
                self.inbox += part
                self.eof = not part
        except BlockingIOError:
            pass
        except OSError as error:
            self.error = error

    def reset(self) -> None:
        """Close so that the other side gets a RST."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0" + bytes(4))
        self.socket.close()

    def close(self) -> None:
        self.socket.close()


class Listener:
    """A listening socket; connections wait in `accepted`."""

    wants_read, wants_write = True, False

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.port: int = sock.getsockname()[1]
        self.accepted: list[Peer] = []

    def fileno(self) -> int:
        return self.socket.fileno()

    def step(self) -> None:
        try:
            while True:
                self.accepted.append(Peer(self.socket.accept()[0]))
        except BlockingIOError:
            pass

    def close(self) -> None:
        self.socket.close()
        for peer in self.accepted:
            peer.close()


class Datagrams:
    """A bound UDP socket; what arrived waits in `inbox` as (payload, sender)."""

    wants_read, wants_write = True, False

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.port: int = sock.getsockname()[1]
        self.inbox: deque[tuple[bytes, tuple]] = deque()
        self.hops: list[int] = []

    def fileno(self) -> int:
        return self.socket.fileno()

    def step(self) -> None:
        try:
            while True:
                data, ancillary, _, sender = self.socket.recvmsg(65535, 128)
                self.inbox.append((data, sender))
                self.hops += [struct.unpack("i", d)[0] for _, k, d in ancillary if k in HOP_KINDS]
        except OSError:
            pass

    def record_hops(self) -> None:
        """From now on note the TTL or hop limit of every datagram in `hops`."""
        if self.socket.family == socket.AF_INET:
            self.socket.setsockopt(socket.IPPROTO_IP, IP_RECVTTL, 1)
        else:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVHOPLIMIT, 1)

    def send(self, payload: bytes, to: tuple) -> None:
        self.socket.sendto(payload, to)

    def close(self) -> None:
        self.socket.close()
