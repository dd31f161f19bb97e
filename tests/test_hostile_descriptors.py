"""Descriptors and memory files no VMM should hand over: refused, or survived.

A front-end's descriptors are foreign property: they may be of any kind, be full, be closed at the
other end, shrink under our mappings. None of it may block a worker, end the back-end, or stay open
after the connection is gone.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import driver as vu
import pytest
from backend import Backend
from driver import Driver, Lost
from formats import both_formats
from guest import Guest, random_bytes
from minitcp import established, exchange
from test_hostile_vmm import served, settled
from vring import Layout
from world import World

pytestmark = pytest.mark.passt_lacks("ends, crashes or hangs at bad descriptors")

MB = 1 << 20


@pytest.fixture
def drv(backend: Backend) -> Iterator[Driver]:
    """A front-end that has negotiated and set nothing up yet; the next one must be served, no
    descriptor lost.
    """
    served(backend)
    before = settled(backend)
    made = Driver(backend.path, timeout=3)
    made.negotiate()
    yield made
    made.close()
    served(backend)
    after = settled(backend, before)
    assert after <= before, f"{after} descriptors open, {before} before"


def refused(drv: Driver, request: int, payload: bytes, fds: list[int]) -> None:
    """The message is answered with a failure, or the connection ended."""
    try:
        assert drv.call(request, payload, fds), f"message {request} was accepted"
    except Lost as error:
        assert "timed out" not in str(error), "neither an answer nor an end"


def memory_table(*regions: tuple[int, int, int, int], count: int | None = None) -> bytes:
    """SET_MEM_TABLE of (guest address, size, user address, offset) each."""
    head = struct.pack("<II", len(regions) if count is None else count, 0)
    return head + b"".join(struct.pack("<QQQQ", *region) for region in regions)


GOOD = (0, MB, 0x7F0000000000, 0)
TABLES: dict[str, tuple[bytes, int]] = {
    "no region": (memory_table(count=0), 0),
    "more than there are": (memory_table(GOOD, count=8), 8),
    "count far out": (memory_table(GOOD, count=0xFFFFFFFF), 1),
    "nine": (memory_table(*[(i * MB, MB, i * MB, 0) for i in range(9)]), 8),
    "no descriptor": (memory_table(GOOD), 0),
    "one descriptor for two": (memory_table(GOOD, (MB, MB, MB, 0)), 1),
    "size 0": (memory_table((0, 0, 0, 0)), 1),
    "longer than the file": (memory_table((0, 2 * MB, 0, 0)), 1),
    "offset behind the file": (memory_table((0, MB, 0, MB)), 1),
    "offset wraps": (memory_table((0, MB, 0, 2**64 - MB)), 1),
    "size wraps": (memory_table((0, 2**64 - 1, 0, 4096)), 1),
    "guest address wraps": (memory_table((2**64 - 4096, MB, 0, 0)), 1),
    "user address wraps": (memory_table((0, MB, 2**64 - 4096, 0)), 1),
    "overlapping": (memory_table(GOOD, (MB // 2, MB, 0x7E0000000000, 0)), 2),
    "half a region": (memory_table(GOOD)[:-7], 1),
}


@pytest.mark.parametrize("name", TABLES)
def test_memory_table(drv: Driver, name: str) -> None:
    payload, count = TABLES[name]
    with ExitStack() as stack:
        refused(drv, vu.SET_MEM_TABLE, payload, [memfd(stack, MB) for _ in range(count)])


def memfd(stack: ExitStack, size: int) -> int:
    fd = os.memfd_create("guest-bad")
    stack.callback(os.close, fd)
    os.ftruncate(fd, size)
    return fd


def unmappable(kind: str, stack: ExitStack) -> int:
    """A descriptor that cannot be mapped readable and writable."""
    if kind == "pipe":
        ends = os.pipe()
        for fd in ends:
            stack.callback(os.close, fd)
        return ends[0]
    if kind == "eventfd":
        fd = os.eventfd(0)
    elif kind == "directory":
        fd = os.open("/", os.O_RDONLY)
    elif kind == "socket":
        fd = socket.socket(socket.AF_UNIX).detach()
    else:
        path = stack.enter_context(tempfile.NamedTemporaryFile())
        path.truncate(MB)
        fd = os.open(path.name, os.O_RDONLY)
    stack.callback(os.close, fd)
    return fd


@pytest.mark.parametrize("kind", ["pipe", "eventfd", "directory", "socket", "read-only file"])
def test_memory_that_cannot_be_mapped(drv: Driver, kind: str) -> None:
    with ExitStack() as stack:
        refused(drv, vu.SET_MEM_TABLE, memory_table(GOOD), [unmappable(kind, stack)])


def test_read_only_rings(drv: Driver) -> None:
    """A memory file sealed against new writable mappings: refused like a read-only one."""
    import fcntl

    with ExitStack() as stack:
        fd = os.memfd_create("guest-sealed", os.MFD_ALLOW_SEALING)
        stack.callback(os.close, fd)
        os.ftruncate(fd, MB)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        refused(drv, vu.SET_MEM_TABLE, memory_table(GOOD), [fd])


@both_formats
def test_memory_table_is_replaced_by_a_bad_one(guest: Guest) -> None:
    """A running device and a table that cannot be mapped: refused, the old memory stays (or the
    connection ends).
    """
    with ExitStack() as stack:
        bad = memory_table(GOOD, (MB, MB, MB, 0))
        try:
            assert guest.drv.call(vu.SET_MEM_TABLE, bad, [memfd(stack, MB), memfd(stack, 0)])
        except Lost:
            return
    guest.ping(guest.gw4, 1, 1, b"")
    guest.next_icmp({0})


def test_more_descriptors_than_any_message_has(backend: Backend, drv: Driver) -> None:
    """Surplus descriptors are closed, message after message."""
    with ExitStack() as stack:
        fds = [memfd(stack, 4096) for _ in range(8)]
        before = settled(backend)
        for request in (vu.GET_FEATURES, vu.SET_VRING_ENABLE, vu.SET_VRING_CALL, vu.SET_OWNER):
            for _ in range(20):
                try:
                    drv.channel.send(request, bytes(8) if request != 1 else b"", fds)
                except Lost:
                    return
        try:
            drv.barrier()
        except (Lost, AssertionError):
            return
        assert settled(backend, before + 2) <= before + 2


def test_descriptors_little_by_little(backend: Backend, drv: Driver) -> None:
    """Some with each byte of one message: they are not gathered for ever."""
    with ExitStack() as stack:
        fds = [memfd(stack, 4096) for _ in range(60)]
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("60i", *fds))]
        before = settled(backend)
        with pytest.raises(OSError):
            for byte in vu.HEADER.pack(vu.SET_FEATURES, vu.VERSION, 8):
                drv.channel.socket.sendmsg([bytes([byte])], rights)
                time.sleep(0.05)
        assert settled(backend, before) <= before


# --- notifications into nowhere -----------------------------------------------------------------


def notifiers(stack: ExitStack) -> dict[str, int]:
    """Descriptors that cannot take a notification, each in its own way."""
    full_event = os.eventfd(0, os.EFD_NONBLOCK)
    os.eventfd_write(full_event, 0xFFFFFFFFFFFFFFFE)
    blocking = os.eventfd(0)
    os.eventfd_write(blocking, 0xFFFFFFFFFFFFFFFE)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, bytes(65536))
    except BlockingIOError:
        os.set_blocking(writer, True)
    gone, broken = os.pipe()
    os.close(gone)
    left, right = socket.socketpair()
    left.setblocking(False)
    try:
        while True:
            left.send(bytes(4096))
    except BlockingIOError:
        left.setblocking(True)
    dead, alone = socket.socketpair()
    dead.close()
    plain = tempfile.TemporaryFile()
    fds = {
        "full eventfd": full_event,
        "full blocking eventfd": blocking,
        "full pipe": writer,
        "pipe without reader": broken,
        "full socket": left.detach(),
        "socket without peer": alone.detach(),
        "read end of a pipe": reader,
        "file": os.dup(plain.fileno()),
        "directory": os.open("/", os.O_RDONLY),
    }
    for fd in fds.values():
        stack.callback(os.close, fd)
    stack.callback(right.close)
    stack.callback(plain.close)
    return fds


KINDS = [
    "full eventfd",
    "full blocking eventfd",
    "full pipe",
    "pipe without reader",
    "full socket",
    "socket without peer",
    "read end of a pipe",
    "file",
    "directory",
]


@pytest.mark.parametrize("kind", KINDS)
@both_formats
def test_call_descriptor(backend: Backend, make_guest: Callable[..., Guest], kind: str) -> None:
    """The call cannot be delivered: never wait for it, never end; the rings are served all the
    same.
    """
    guest = make_guest()
    drv = guest.drv
    with ExitStack() as stack:
        fd = notifiers(stack)[kind]
        for index in (0, 1):
            try:
                drv.call(vu.SET_VRING_CALL, struct.pack("<Q", index), [fd])
            except Lost:
                served(backend)
                return
        ring = drv.rx(0).ring
        for i in range(20):
            before = ring.used_idx
            guest.ping(guest.gw4, 1, i, b"")
            deadline = time.monotonic() + 3
            while ring.used_idx == before:
                assert time.monotonic() < deadline, (
                    f"the ring stands still with a {kind} for a call"
                )
                time.sleep(0.001)
        assert backend.load(0.3) < 0.10
        drv.must(vu.SET_VRING_CALL, struct.pack("<Q", 0), [drv.rx(0).call])
    drv.poll(0)
    guest.pump(timeout=0.02)
    guest.icmp.clear()
    guest.ping(guest.gw4, 1, 1, b"")
    guest.next_icmp({0})


@pytest.mark.parametrize("kind", KINDS)
def test_error_descriptor(backend: Backend, make_guest: Callable[..., Guest], kind: str) -> None:
    """A broken ring whose error cannot be told: the other ring and the control socket go on."""
    guest = make_guest()
    drv = guest.drv
    with ExitStack() as stack:
        fd = notifiers(stack)[kind]
        try:
            drv.call(vu.SET_VRING_ERR, struct.pack("<Q", 1), [fd])
        except Lost:
            served(backend)
            return
        ring = drv.tx(0).ring
        ring.set_avail_idx(ring.used_idx + 0x4000)
        drv.kick(drv.tx(0))
        drv.barrier()
        assert backend.load(0.3) < 0.10
    drv.stop_rings()
    for queue in drv.queues:
        queue.ring.reset()
    drv.start_rings()
    guest.resolve()


@pytest.mark.parametrize("kind", KINDS)
def test_kick_descriptor(backend: Backend, make_guest: Callable[..., Guest], kind: str) -> None:
    """A kick descriptor that is no eventfd, or always readable: no spinning, no blocking read."""
    guest = make_guest()
    drv = guest.drv
    with ExitStack() as stack:
        fd = notifiers(stack)[kind]
        drv.stop_ring(1)
        try:
            drv.call(vu.SET_VRING_KICK, struct.pack("<Q", 1), [fd])
            drv.barrier()
        except Lost:
            served(backend)
            return
        load = backend.load(0.5)
        assert load < 0.10, f"{load:.0%} of a processor for a {kind} as kick descriptor"
        drv.stop_rings()
    for queue in drv.queues:
        queue.ring.reset()
    drv.start_rings()
    guest.resolve()


# --- memory that goes away ----------------------------------------------------------------------


NOT_INTERPRETED = pytest.mark.skipif(
    os.environ.get("NUMBA_DISABLE_JIT") == "1",
    reason="NOT TESTED here: surviving SIGBUS takes a compiled handler; the compiled run tests it",
)


@NOT_INTERPRETED
@both_formats
def test_memory_file_truncated(
    backend: Backend, make_guest: Callable[..., Guest], world: World
) -> None:
    """A region's file shrinks after it was mapped: touching it is SIGBUS. The instance and its
    other memory go on.
    """
    guest = make_guest(borders=1)
    tcp, peer = established(guest, world, 4)
    exchange(guest, tcp, peer, b"before", b"the truncation")
    guest.drv.barrier()
    small = guest.drv.memory.regions[0]
    os.ftruncate(small.fd, 0)
    ring = guest.drv.tx(0).ring
    for offset in (0, small.size - 100):
        ring.offer([(small.gpa + offset, 100, 0, 0)])
    ring.publish()
    guest.drv.kick(guest.drv.tx(0))
    time.sleep(0.2)
    deadline = time.monotonic() + 10
    while True:
        assert backend.alive(), f"the back-end ended:\n{backend.tail()}"
        try:
            guest.ping(guest.gw4, 1, 1, b"", layout=Layout())
            guest.next_icmp({0}, 1)
            break
        except AssertionError:
            assert time.monotonic() < deadline, "the guest's network does not come back"
    exchange(guest, tcp, peer, b", after", b", too")


@NOT_INTERPRETED
@both_formats
def test_all_memory_truncated(backend: Backend, make_guest: Callable[..., Guest]) -> None:
    """Even the rings are gone: this VM is lost, the next one is served."""
    guest = make_guest()
    guest.drv.barrier()
    drv = guest.drv
    calls = [queue.kick for queue in drv.queues]
    for region in drv.memory.regions:
        os.ftruncate(region.fd, 0)
    for fd in calls:
        os.eventfd_write(fd, 1)
    time.sleep(0.3)
    drv.channel.close()
    guest.peers.clear()
    served(backend, 10)


def test_pages_punched_out(
    backend: Backend, make_guest: Callable[..., Guest], world: World
) -> None:
    """A balloon gives pages back (MADV_REMOVE on the shared file): they read as zeros, nothing
    else happens.
    """
    guest = make_guest()
    tcp, peer = established(guest, world, 4)
    region = guest.drv.memory.regions[-1]
    spare = guest.drv.memory.alloc(1 << 20)
    region.map.madvise(mmap.MADV_REMOVE, region.offset + spare - region.gpa, 1 << 20)
    exchange(guest, tcp, peer, random_bytes(100_000, 1), random_bytes(100_000, 2))
