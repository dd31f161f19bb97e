"""wan.py - a line between two namespaces of the lab that takes time.

Theory      A TUN device at either end; a thread reads a packet here, keeps it for a while and
            writes it there. Nothing is lost and nothing overtakes, so whatever a transfer over the
            line costs more than the same transfer of a program of the host is the back-end's.
            Its MTU is the caller's: at nearly the largest there is, a peer's segments fill a young
            socket's whole receive window (dataplane/far_peer.py).
Limits      As fast as Python reads and writes packets: some 50 000 a second.
Ownership   close() ends the thread; the devices go with their descriptors.
"""

from __future__ import annotations

import collections
import fcntl
import os
import select
import struct
import threading
import time

from lab import Lab

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 1, 0x1000


def _tun() -> int:
    """A TUN device in the namespace of this thread."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", b"wan", IFF_TUN | IFF_NO_PI))
    return fd


class Line:
    """Addresses near (in namespace `host`) and far (in `far`), `delay_s` apart each way."""

    near4, far4 = "192.0.2.1", "192.0.2.2"
    near6, far6 = "2001:db8:2::1", "2001:db8:2::2"

    def __init__(self, lab: Lab, mtu: int, delay_s: float) -> None:
        self.mtu, self.delay_s = mtu, delay_s
        self.ends = [lab.inside(role, _tun) for role in ("host", "far")]
        for role, addresses in (
            ("host", (f"{self.near4}/30", f"{self.near6}/126")),
            ("far", (f"{self.far4}/30", f"{self.far6}/126")),
        ):
            for address in addresses:
                nodad = ["nodad"] if ":" in address else []
                lab.run(role, ["ip", "address", "add", address, "dev", "wan", *nodad])
            lab.run(role, ["ip", "link", "set", "wan", "mtu", str(mtu), "up"])
        self.running = True
        self.thread = threading.Thread(target=self._carry)
        self.thread.start()

    def _carry(self) -> None:
        """The thread: packets wait in two queues, oldest first."""
        waiting: tuple[collections.deque[tuple[float, bytes]], ...] = (
            collections.deque(),
            collections.deque(),
        )
        while self.running:
            due = [queue[0][0] for queue in waiting if queue]
            patience_s = min([0.1, *(max(at - time.monotonic(), 0) for at in due)])
            ready, _, _ = select.select(self.ends, [], [], patience_s)
            now = time.monotonic()
            for fd in ready:
                self._take(fd, waiting[self.ends.index(fd)], now + self.delay_s)
            for queue, end in zip(waiting, reversed(self.ends), strict=True):
                while queue and queue[0][0] <= now:
                    os.write(end, queue.popleft()[1])

    def _take(self, fd: int, queue: collections.deque[tuple[float, bytes]], at: float) -> None:
        for _ in range(64):
            try:
                queue.append((at, os.read(fd, self.mtu)))
            except BlockingIOError:
                return

    def close(self) -> None:
        """End the line."""
        self.running = False
        self.thread.join()
        for fd in self.ends:
            os.close(fd)
