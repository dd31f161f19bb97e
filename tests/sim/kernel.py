"""A kernel that is made up: sockets, epoll and the clock, for workers in the test's process.

Every descriptor is a real one (an eventfd that nobody reads), so numbers are never confused and
whoever closes one closes it; what stands behind it is a `Sock` here, a stream's, or `Datagrams`
(datagrams.py). Calls on other descriptors (kicks, wake-ups, inboxes) go to the real kernel. Nothing
waits, and time passes when the test says.

What is modelled is what the data plane relies on: bytes that a socket takes until its buffer is
full, peeking with an offset that discarding moves, edges of epoll, half-closes, TCP_INFO and the
lengths of queues, sockets that change hands by SCM_RIGHTS. A worker may be made to die after any
call (`die_at`).
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import time
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from inprocess import SYSTEM_CALLS, Died
from sim.datagrams import Datagrams, Watched, Witness, pieces, put, words

from dataplane import sockets
from dataplane.inherit import INFO_ACKED, INFO_RECEIVED, SIOCINQ
from shm import libc

SNDBUF, RCVBUF = 30_000, 50_000
CLOSE, ESTABLISHED, SYN_SENT, FIN_WAIT2, CLOSE_WAIT = 7, 1, 2, 5, 8
ECONNRESET = 104
GIVING = ("accept4", "socket")  # a descriptor, whose number is another in each run


class Sock(Watched):
    """One connection's end on our side, and what its program at the other end sees of it."""

    def __init__(self, active: bool) -> None:
        super().__init__()
        self.active = active
        self.called = self.connected = False
        self.error = 0
        self.tx, self.sent, self.shut = bytearray(), 0, False
        self.rx, self.arrived, self.ended = bytearray(), 0, False
        self.peek = 0
        self.wants_room = False

    @property
    def state(self) -> int:
        if not self.connected:
            return SYN_SENT if self.called and not self.error else CLOSE
        if self.error or (self.shut and self.ended):
            return CLOSE
        return CLOSE_WAIT if self.ended else FIN_WAIT2 if self.shut else ESTABLISHED

    @property
    def room(self) -> int:
        return SNDBUF - len(self.tx)

    def watch(self, epfd: int, events: int, data: int) -> None:
        super().watch(epfd, events, data)
        self.wants_room |= self.room < SNDBUF // 3

    def abandoned(self) -> None:
        """The other end gets a reset."""
        super().abandoned()
        if not (self.shut and self.ended):
            self.fail(ECONNRESET)

    def events(self) -> int:
        found = 0
        if self.rx or self.ended:
            found |= sockets.EPOLLIN
        if self.connected and self.room >= SNDBUF // 3:
            found |= sockets.EPOLLOUT
        if self.ended:
            found |= sockets.EPOLLRDHUP
        if self.state == CLOSE:
            found |= sockets.EPOLLHUP | sockets.EPOLLOUT
        return found | (sockets.EPOLLERR if self.error else 0)

    # --- the other end ---

    def deliver(self, data: bytes) -> int:
        """Bytes from the other end, as many as fit."""
        taken = data[: RCVBUF - len(self.rx)]
        self.rx += taken
        self.arrived += len(taken)
        if taken:
            self.edge()
        return len(taken)

    def finish(self) -> None:
        self.ended = True
        self.edge()

    def fetch(self, size: int) -> bytes:
        """Bytes for the other end."""
        taken = bytes(self.tx[:size])
        del self.tx[:size]
        if taken and self.wants_room and self.room >= SNDBUF // 3:
            self.wants_room = False
            self.edge()
        return taken

    def fail(self, error: int) -> None:
        self.error = error
        self.edge()


class Kernel:
    """The system calls of the data plane; `install` puts them in place of the real ones."""

    def __init__(self) -> None:
        self.socks: dict[int, Sock | Datagrams] = {}
        self.backlog: list[tuple[Sock, bytes, int]] = []  # connections nobody has accepted yet
        # By the message that goes with them.
        self.on_the_way: dict[bytes, list[Sock | Datagrams]] = {}
        self.looked_at: dict[int, bytes] = {}  # by inbox: the message that was peeked at last
        self.called: Callable[[Sock, int], None] = lambda sock, port: None
        self.witness: Witness | None = None
        self.cuts = True  # trains of datagrams
        self.died: Callable[[], None] = lambda: None
        self.now_ns = 1_000_000_000_000
        self.calls = 0  # so many there were, and which one is somebody's last
        self.die_at = 0
        self.died_after = ""
        self.trace = 0  # of all calls and their results: the same day has the same
        self.real: dict[str, Callable[..., int]] = {}

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for name in (*SYSTEM_CALLS, "clock_gettime"):
            self.real[name] = getattr(libc, name)
            call = getattr(self, name, self.real[name])
            patch.setattr(libc, name, self._counted(name, call))
        patch.setattr(socket, "send_fds", self._send_fds)
        self.real["os.close"] = os.close
        patch.setattr(os, "close", self._os_close)
        patch.setattr(time, "monotonic_ns", lambda: self.now_ns)
        patch.setattr(time, "monotonic", lambda: self.now_ns / 1e9)

    def _counted(self, name: str, call: Callable[..., int]) -> Callable[..., int]:
        def counted(*arguments: int) -> int:
            result = call(*map(int, arguments))
            if name != "clock_gettime":
                self._done(name, result)
            return result

        return counted

    def _done(self, name: str, result: int) -> None:
        """A call has been carried out: the caller may die before it knows the result."""
        what = name if name in GIVING else f"{name} = {result}"
        self.note(what.encode())
        self.calls += 1
        if self.calls == self.die_at:
            self.died_after = what
            self.died()
            raise Died(what)

    def note(self, what: bytes) -> None:
        """Something happens that must be the same when the same day is lived again."""
        self.trace = zlib.crc32(what, self.trace)

    def _gone(self, fd: int) -> None:
        sock = self.socks.pop(fd)
        sock.fds -= 1
        if sock.fds == 0:
            sock.abandoned()

    def _new(self, sock: Sock | Datagrams) -> int:
        fd = os.eventfd(0, os.EFD_NONBLOCK)
        self._name(fd, sock)
        return fd

    def _name(self, fd: int, sock: Sock | Datagrams) -> None:
        self.socks[fd] = sock
        sock.fds += 1

    # --- calls ---

    def clock_gettime(self, clock: int, timespec: int) -> int:
        put(timespec, struct.pack("<QQ", *divmod(self.now_ns, 1_000_000_000)))
        return 0

    def socket(self, family: int, kind: int, protocol: int) -> int:
        if kind & sockets.SOCK_DGRAM:
            return self._new(Datagrams(protocol, self.cuts, self.witness))
        return self._new(Sock(active=True))

    def _stream(self, fd: int) -> Sock:
        sock = self.socks[fd]
        assert isinstance(sock, Sock)
        return sock

    def _datagrams(self, fd: int) -> Datagrams:
        sock = self.socks[fd]
        assert isinstance(sock, Datagrams)
        return sock

    def connect(self, fd: int, address: int, size: int) -> int:
        sock, port = self.socks[fd], int.from_bytes(ctypes.string_at(address + 2, 2), "big")
        if isinstance(sock, Datagrams):
            assert self.witness is not None
            sock.connected = True
            self.witness.connected(sock, port)
            return 0
        sock.called = True
        self.called(sock, port)
        return -sockets.EINPROGRESS

    def accept4(self, fd: int, address: int, size: int, flags: int) -> int:
        if not self.backlog:
            return -sockets.EAGAIN
        sock, host, port = self.backlog.pop(0)
        put(address, struct.pack("<H", 2) + struct.pack(">H", port) + host + bytes(8))
        put(size, struct.pack("<I", 16))
        return self._new(sock)

    def close(self, fd: int) -> int:
        if fd in self.socks:
            self._gone(fd)
        return self.real["close"](fd)

    def _os_close(self, fd: int) -> None:
        """What plain Python closes, of whom else it may be."""
        if fd in self.socks:
            self._gone(fd)
        self.real["os.close"](fd)

    def shutdown(self, fd: int, how: int) -> int:
        self._stream(fd).shut = True
        return 0

    def sendmsg(self, fd: int, message: int, flags: int) -> int:
        name, _, iov, count, control, size = words(message, 6)
        if fd not in self.socks:
            if control and size:
                passed = struct.unpack("<i", ctypes.string_at(control + 16, 4))[0]
                self._pass(ctypes.string_at(*words(iov, 2)), passed)
            return self.real["sendmsg"](fd, message, flags)
        sock = self.socks[fd]
        if isinstance(sock, Datagrams):
            return sock.sendmsg(message)
        if sock.error or sock.shut:
            return -(sock.error or 32)
        data = b"".join(ctypes.string_at(at, length) for at, length in pieces(iov, count))
        taken = data[: max(sock.room, 0)]
        if not taken:
            sock.wants_room = True
            return -sockets.EAGAIN
        sock.tx += taken
        sock.sent += len(taken)
        return len(taken)

    def sendmmsg(self, fd: int, messages: int, count: int, flags: int) -> int:
        return self._datagrams(fd).sendmmsg(messages, count)

    def recvmmsg(self, fd: int, messages: int, count: int, flags: int) -> int:
        return self._datagrams(fd).recvmmsg(messages, count)

    def _send_fds(self, box: Any, buffers: list[bytes], fds: list[int]) -> int:
        for fd in fds:
            self._pass(buffers[0], fd)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))]
        sent = int(box.sendmsg(buffers, rights if fds else []))
        self._done("send_fds", sent)
        return sent

    def _pass(self, message: bytes, fd: int) -> None:
        self.on_the_way.setdefault(message, []).append(self.socks[fd])
        self.socks[fd].fds += 1

    def recvmsg(self, fd: int, message: int, flags: int) -> int:
        _, _, iov, count, control, _ = words(message, 6)
        if fd not in self.socks:
            return self._look_into(fd, message, flags, iov, control)
        sock, done = self.socks[fd], 0
        if isinstance(sock, Datagrams):
            return sock.recvmsg(message)
        assert flags & sockets.MSG_PEEK, "only peeked at"
        for at, length in pieces(iov, count):
            part = sock.rx[sock.peek : sock.peek + length]
            put(at, bytes(part))
            sock.peek += len(part)
            done += len(part)
            if len(part) < length:
                break
        if done == 0 and sock.error:
            return -sock.error
        return done if done or sock.ended else -sockets.EAGAIN

    def _look_into(self, fd: int, message: int, flags: int, iov: int, control: int) -> int:
        """A message in an inbox, which is only peeked at."""
        done = self.real["recvmsg"](fd, message, flags)
        if done > 0:
            self.looked_at[fd] = ctypes.string_at(words(iov, 2)[0], done)
            if words(message, 6)[5]:
                passed = struct.unpack("<i", ctypes.string_at(control + 16, 4))[0]
                self._name(passed, self.on_the_way[self.looked_at[fd]][0])
        return done

    def recv(self, fd: int, buffer: int, size: int, flags: int) -> int:
        if fd not in self.socks:
            if passed := self.on_the_way.get(self.looked_at.pop(fd)):
                passed.pop(0).fds -= 1
            return self.real["recv"](fd, buffer, size, flags)
        sock = self.socks[fd]
        if isinstance(sock, Datagrams):
            return sock.recv(buffer, size)
        assert flags & sockets.MSG_TRUNC and buffer == 0, "only discarded"
        done = min(size, len(sock.rx))
        if not done:
            return 0 if sock.ended else -sockets.EAGAIN
        del sock.rx[:done]
        sock.peek = max(sock.peek - done, 0)
        return done

    def setsockopt(self, fd: int, level: int, option: int, value: int, size: int) -> int:
        if level == sockets.SOL_SOCKET and option == sockets.SO_PEEK_OFF:
            self._stream(fd).peek = struct.unpack("<i", ctypes.string_at(value, 4))[0]
        return 0

    def getsockopt(self, fd: int, level: int, option: int, value: int, size: int) -> int:
        sock, room = self._stream(fd), struct.unpack("<I", ctypes.string_at(size, 4))[0]
        found = bytearray(room)
        if (level, option) == (sockets.SOL_SOCKET, sockets.SO_ERROR):
            struct.pack_into("<i", found, 0, sock.error)
        elif (level, option) == (sockets.SOL_SOCKET, sockets.SO_MEMINFO):
            struct.pack_into("<I", found, 4 * sockets.MEMINFO_SNDBUF, SNDBUF)
            struct.pack_into("<I", found, 4 * sockets.MEMINFO_WMEM_QUEUED, len(sock.tx))
        elif (level, option) == (sockets.IPPROTO_TCP, sockets.TCP_INFO):
            found[0] = sock.state
            if room > INFO_RECEIVED:
                acked = sock.active + sock.sent - len(sock.tx) + sock.shut
                struct.pack_into("<Q", found, INFO_ACKED, acked)
                struct.pack_into("<Q", found, INFO_RECEIVED, sock.arrived + sock.ended)
        else:
            raise AssertionError(f"getsockopt {level} {option}")
        put(value, bytes(found))
        return 0

    def ioctl(self, fd: int, request: int, argument: int) -> int:
        sock = self._stream(fd)
        put(argument, struct.pack("<I", len(sock.rx if request == SIOCINQ else sock.tx)))
        return 0

    def epoll_ctl(self, epfd: int, operation: int, fd: int, event: int) -> int:
        if fd not in self.socks:
            return self.real["epoll_ctl"](epfd, operation, fd, event)
        sock = self.socks[fd]
        if operation == sockets.EPOLL_DEL:
            sock.watched.pop(epfd, None)
            return 0
        events, data = struct.unpack("<IQ", ctypes.string_at(event, 12))
        sock.watch(epfd, events, data)
        return 0

    def has_news(self, epolls: set[int]) -> bool:
        """Whether one of these would find an edge."""
        return any(
            entry[2]
            for sock in self.socks.values()
            for epfd, entry in sock.watched.items()
            if epfd in epolls
        )

    def epoll_wait(self, epfd: int, events: int, count: int, timeout_ms: int) -> int:
        found = 0
        for sock in list(dict.fromkeys(self.socks.values())):
            entry = sock.watched.get(epfd)
            if entry is None or not entry[2] or found == count:
                continue
            entry[2] = False
            always = sockets.EPOLLERR | sockets.EPOLLHUP
            if mask := sock.events() & (entry[0] | always):
                put(events + 12 * found, struct.pack("<IQ", mask, entry[1]))
                found += 1
        if found < count:
            found += max(self.real["epoll_wait"](epfd, events + 12 * found, count - found, 0), 0)
        return found
