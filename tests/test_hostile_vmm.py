"""Messages and connections no VMM should make: refused or dropped, and the next VMM is served.

Whatever is sent here, three things must hold afterwards: the back-end lives, it has no more
descriptors open than before, and a well-behaved front-end gets its network (`served`). Descriptors
and memory files are the subject of test_hostile_descriptors.py.
"""

from __future__ import annotations

import os
import random
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import driver as vu
import pytest
from backend import Backend
from driver import HEADER, NEED_REPLY, VERSION, Channel, Driver, Lost
from guest import Guest, random_bytes
from minitcp import established, exchange
from world import World

pytestmark = pytest.mark.passt_lacks("ends or crashes at bad messages")


def served(backend: Backend, timeout: float = 3.0) -> None:
    """A new front-end is accepted and its guest has a network."""
    deadline = time.monotonic() + timeout
    while True:
        assert backend.alive(), f"the back-end ended:\n{backend.tail()}"
        try:
            guest = Guest(Driver(backend.path, timeout=2).start())
            break
        except (Lost, OSError) as error:
            assert time.monotonic() < deadline, f"no new front-end is served: {error}"
            time.sleep(0.02)
    try:
        guest.resolve()
        guest.ping(guest.gw4, 1, 1, b"")
        guest.next_icmp({0})
    finally:
        guest.drv.close()


@pytest.fixture
def channel(backend: Backend) -> Iterator[Channel]:
    """A bare connection; afterwards the back-end must serve another and hold no more descriptors
    than before.
    """
    served(backend)
    before = settled(backend)
    made = Channel(backend.path, 2.0)
    yield made
    made.close()
    served(backend)
    after = settled(backend, before)
    assert after <= before, f"{after} descriptors open, {before} before"


def settled(backend: Backend, wanted: int | None = None) -> int:
    """The number of open descriptors once it stops changing, or falls to `wanted`."""
    deadline, last = time.monotonic() + 2, -1
    while (now := backend.fds()) != last or (wanted is not None and now > wanted):
        if time.monotonic() > deadline:
            break
        last = now
        time.sleep(0.05)
    return now


def answered_or_closed(channel: Channel) -> bool:
    """Whether the back-end still answers on this connection; silence is a failure."""
    try:
        channel.send(vu.GET_FEATURES)
        while True:
            request, _, _ = channel.receive()
            if request == vu.GET_FEATURES:
                return True
    except Lost as error:
        assert "timed out" not in str(error), "neither an answer nor an end"
        return False


def pipes(count: int) -> list[int]:
    fds: list[int] = []
    while len(fds) < count:
        fds += os.pipe()
    return fds


@pytest.mark.parametrize("request_number", [*range(61), 255, 1000, 0x7FFFFFFF, 0xFFFFFFFF])
def test_any_request(channel: Channel, request_number: int) -> None:
    """Every request with random payloads, sizes and descriptors, at any point of the handshake."""
    rng = random.Random(request_number)
    for _ in range(6):
        if not answered_or_closed(channel):
            channel.close()
            channel.open()
        if rng.random() < 0.5:
            channel.send(vu.SET_PROTOCOL_FEATURES, struct.pack("<Q", 1 << 3))
        size = rng.choice((0, 4, 8, 12, 16, 20, 24, 32, 40, 264, rng.randrange(300)))
        payload = rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size)))
        flags = VERSION | rng.choice((0, NEED_REPLY))
        fds = pipes(rng.choice((0, 0, 1, 2, 8)))
        try:
            channel.send(request_number, payload, fds, flags=flags)
            channel.socket.settimeout(0.3)
            channel.receive()
        except Lost:
            pass
        finally:
            channel.socket.settimeout(2.0)
            for fd in fds:
                os.close(fd)
    answered_or_closed(channel)


@pytest.mark.parametrize("flags", [0, 2, 3, 5, 0xFFFFFFFF, 0x80000001])
def test_header_flags(channel: Channel, flags: int) -> None:
    """Wrong version, a reply nobody asked for, unknown bits."""
    channel.send(vu.GET_FEATURES, flags=flags)
    try:
        channel.receive()
    except Lost as error:
        assert "timed out" not in str(error)


@pytest.mark.parametrize("size", [0x1001, 1 << 20, 0x7FFFFFFF, 0xFFFFFFFF])
def test_huge_size(backend: Backend, channel: Channel, size: int) -> None:
    """A size no message has: the connection ends at once, nothing is allocated for it."""
    before = memory_kb(backend)
    channel.send(vu.SET_FEATURES, b"x" * 100, size=size)
    with pytest.raises(Lost) as ended:
        channel.receive()
    assert "timed out" not in str(ended.value), "it waits for the rest"
    assert memory_kb(backend) < before + 10_000


def memory_kb(backend: Backend) -> int:
    for line in Path(f"/proc/{backend.control()}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1])
    raise AssertionError("no VmRSS")


@pytest.mark.parametrize("cut", [1, 6, 11, 12, 13, 19])
def test_part_of_a_message_then_silence(
    backend: Backend, make_guest: Callable[..., Guest], world: World, cut: int
) -> None:
    """Half a message: the guest's network goes on meanwhile, at rest; the other half is understood
    when it comes.
    """
    guest = make_guest()
    tcp, peer = established(guest, world, 4)
    message = HEADER.pack(vu.SET_VRING_ENABLE, VERSION, 8) + struct.pack("<II", 0, 1)
    guest.drv.channel.socket.send(message[:cut])
    exchange(guest, tcp, peer, random_bytes(200_000, 1), random_bytes(200_000, 2), 3)
    guest.pump(timeout=0.05)
    assert backend.load(0.3) < 0.10, "it spins for the rest of the message"
    guest.drv.channel.socket.send(message[cut:])
    guest.drv.barrier()
    exchange(guest, tcp, peer, b"up", b"down")


@pytest.mark.parametrize("cut", [1, 11, 12, 15])
def test_part_of_a_message_then_the_end(channel: Channel, cut: int) -> None:
    channel.socket.send((HEADER.pack(vu.SET_FEATURES, VERSION, 8) + bytes(8))[:cut])


def test_messages_byte_by_byte(channel: Channel) -> None:
    """A stream has no message borders: bytes one at a time, then several messages in one piece."""
    ask = HEADER.pack(vu.GET_FEATURES, VERSION, 0)
    for byte in ask:
        channel.socket.send(bytes((byte,)))
        time.sleep(0.002)
    assert channel.receive()[0] == vu.GET_FEATURES
    channel.socket.send(ask * 5)
    assert [channel.receive()[0] for _ in range(5)] == [vu.GET_FEATURES] * 5


def test_answers_nobody_reads(backend: Backend, make_guest: Callable[..., Guest]) -> None:
    """Thousands of questions without reading an answer: the rings go on, memory does not grow."""
    guest = make_guest()
    sock = guest.drv.channel.socket
    before = memory_kb(backend)
    sock.setblocking(False)
    ask, sent = HEADER.pack(vu.GET_FEATURES, VERSION, 0), 0
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline and sent < 20_000:
        try:
            sent += len(ask) == sock.send(ask)
        except BlockingIOError:
            time.sleep(0.01)
        except OSError:
            break
    guest.ping(guest.gw4, 1, 1, b"")
    guest.next_icmp({0})
    assert memory_kb(backend) < before + 20_000


def test_silent_connection(backend: Backend) -> None:
    """A connection that says nothing costs nothing, and when it goes the next is served."""
    quiet = Channel(backend.path)
    time.sleep(0.05)
    assert backend.load(0.3) < 0.05
    quiet.close()
    served(backend)


# --- handshakes that end early ------------------------------------------------------------------


class Cut(Exception):
    """The connection was cut by the test."""


class CutChannel(Channel):
    """A channel that closes itself instead of sending message number `after`, or in the middle of
    it.
    """

    def __init__(self, path: str, after: int, part: int) -> None:
        super().__init__(path, 5.0)
        self.left, self.part = after, part

    def send(self, request: int, payload: bytes = b"", fds: object = (), **how: object) -> None:
        self.left -= 1
        if self.left < 0:
            data = HEADER.pack(request, VERSION, len(payload)) + payload
            if self.part:
                self.socket.send(data[: self.part])
            self.close()
            raise Cut
        super().send(request, payload, fds, **how)  # type: ignore[arg-type]


@pytest.mark.parametrize("part", [0, 5, 14])
def test_connection_cut_anywhere(backend: Backend, part: int) -> None:
    """The handshake broken off before, or within, each of its messages in turn."""
    served(backend)
    before = settled(backend)
    for after in range(200):
        drv = Driver(backend.path, channel=_cut(backend, after, part))
        try:
            drv.start()
        except Cut:
            continue
        finally:
            drv.close()
        break
    assert 20 < after < 199, f"the handshake has {after} messages"
    served(backend)
    assert settled(backend, before) <= before


def _cut(backend: Backend, after: int, part: int) -> CutChannel:
    """Connect; the end of the connection before may take a moment to be noticed."""
    for _ in range(100):
        made = CutChannel(backend.path, after, part)
        if not select.select([made.socket], [], [], 0.005)[0]:
            return made
        made.close()
        time.sleep(0.01)
    raise AssertionError("every connection is turned away")


def test_two_hundred_reconnects(backend: Backend) -> None:
    """No descriptor, no mapping and no process left behind by 200 connections, a tenth of them
    with a running guest.
    """
    served(backend)
    before, processes = settled(backend), len(backend.tree())
    for i in range(200):
        if i % 10 == 0:
            served(backend)
            continue
        channel = Channel(backend.path, 2.0)
        if i % 3:
            try:
                channel.send(vu.GET_FEATURES)
                channel.receive()
            except Lost:
                time.sleep(0.02)
        channel.close()
    served(backend)
    assert settled(backend, before) <= before
    assert len(backend.tree()) == processes
    maps = Path(f"/proc/{backend.control()}/maps").read_text()
    assert "memfd:guest" not in maps, "guest memory is still mapped after the VM went"


# --- values out of range ------------------------------------------------------------------------


def state(index: int, num: int) -> bytes:
    return struct.pack("<II", index, num)


def addresses(index: int, desc: int, used: int, avail: int) -> bytes:
    return struct.pack("<IIQQQQ", index, 0, desc, used, avail, 0)


FAR_OUT = (64, 65, 255, 256, 1 << 20, 0xFFFFFFFF)
VALUES = [
    *[(vu.SET_VRING_NUM, state(index, 256)) for index in FAR_OUT],
    *[(vu.SET_VRING_NUM, state(0, num)) for num in (0, 3, 255, 65536, 0x80000000, 0xFFFFFFFF)],
    *[(vu.SET_VRING_BASE, state(index, 0)) for index in FAR_OUT],
    *[(vu.SET_VRING_ENABLE, state(index, 1)) for index in FAR_OUT],
    *[(vu.SET_VRING_ADDR, addresses(index, 0, 0, 0)) for index in FAR_OUT],
    (vu.SET_VRING_ADDR, addresses(0, 2**64 - 8, 2**64 - 8, 2**64 - 8)),
    (vu.SET_VRING_ADDR, addresses(0, 1, 1, 1)),
    *[(vu.SET_FEATURES, struct.pack("<Q", bits)) for bits in (2**64 - 1, 1 << 63, 0)],
    (vu.SET_PROTOCOL_FEATURES, struct.pack("<Q", 2**64 - 1)),
    *[(request, struct.pack("<Q", 0x40 + i)) for request in (12, 13, 14) for i in (0, 63, 127)],
    *[(request, struct.pack("<Q", vu.NO_FD)) for request in (12, 13, 14)],
    *[(request, struct.pack("<Q", 0)) for request in (12, 13, 14)],
    (20, struct.pack("<Q", 0)),
    (20, struct.pack("<Q", 2**64 - 1)),
    (19, b"\xff" * 8),
]


def named(pair: tuple[int, bytes]) -> object:
    """A parameter whose name is the request and its payload in hexadecimal, trailing zeros cut."""
    return pytest.param(*pair, id=f"{pair[0]}-{pair[1].rstrip(bytes(1)).hex()[:40]}")


@pytest.mark.parametrize(("request_number", "payload"), [named(pair) for pair in VALUES])
def test_value_out_of_range(channel: Channel, request_number: int, payload: bytes) -> None:
    """Indices, sizes and bits that do not exist: refused where an answer is due, never acted on."""
    channel.send(vu.SET_PROTOCOL_FEATURES, struct.pack("<Q", vu.P_REPLY_ACK))
    channel.send(request_number, payload, flags=VERSION | NEED_REPLY)
    try:
        request, flags, answer = channel.receive()
        assert (request, flags & 7, len(answer)) == (request_number, 5, 8)
    except Lost as error:
        assert "timed out" not in str(error), "no acknowledgement though one was asked for"
        return
    assert answered_or_closed(channel)


@pytest.mark.parametrize(
    ("request_number", "payload"),
    [named(pair) for pair in VALUES if pair[0] in (8, 9, 10, 18)],
)
def test_value_out_of_range_while_running(
    backend: Backend, make_guest: Callable[..., Guest], request_number: int, payload: bytes
) -> None:
    """The same on a device that runs: refused, and the guest's rings do not notice."""
    guest = make_guest()
    try:
        code = guest.drv.call(request_number, payload)
    except Lost:
        served(backend)
        return
    if request_number in (vu.SET_VRING_NUM, vu.SET_VRING_ADDR) and payload[:4] == bytes(4):
        return
    assert code, "accepted"
    guest.ping(guest.gw4, 1, 1, b"")
    guest.next_icmp({0})


def test_base_of_a_ring_that_never_ran(channel: Channel) -> None:
    """GET_VRING_BASE is legal at any time, and answered with the index asked for."""
    for index in (0, 1, 0, 3):
        channel.send(vu.GET_VRING_BASE, state(index, 0))
        request, _, payload = channel.receive()
        assert request == vu.GET_VRING_BASE
        assert struct.unpack("<II", payload) == (index, 0)


def test_base_asked_twice(guest: Guest) -> None:
    """Stopping a stopped ring answers the same base, and starting it again works."""
    guest.ping(guest.gw4, 1, 1, b"")
    guest.next_icmp({0})
    first = guest.drv.stop_rings()
    assert guest.drv.stop_rings() == first
    guest.drv.start_rings()
    guest.ping(guest.gw4, 1, 2, b"")
    guest.next_icmp({0})


def test_ring_addresses_at_the_border(backend: Backend, make_guest: Callable[..., Guest]) -> None:
    """A ring must lie in one region: one that would run over its end is refused, one that just
    fits is served.
    """
    guest = make_guest()
    drv, region = guest.drv, guest.drv.memory.regions[-1]
    drv.stop_rings()
    queue = drv.tx(0)
    ring, last = queue.ring, region.user + region.size
    sizes = {"desc": 16 * ring.num, "used": 6 + 8 * ring.num, "avail": 6 + 2 * ring.num}
    user = {name: drv.memory.user(getattr(ring, name)) for name in sizes}
    for name, size in sizes.items():
        align = 16 if name == "desc" else 4 if name == "used" else 2
        wrong = {**user, name: last - size + align - (size % align)}
        try:
            code = drv.call(vu.SET_VRING_ADDR, addresses(1, *_in_order(wrong)))
        except Lost:
            served(backend)
            return
        if not code:
            code = drv.call(vu.SET_VRING_KICK, struct.pack("<Q", 1), [queue.kick])
        assert code, f"the {name} ring over the end of its region was accepted"
    ring.reset()
    ring.desc = drv.memory.end - sizes["desc"]
    drv.rx(0).ring.reset()
    drv.start_rings()
    guest.ping(guest.gw4, 1, 1, b"")
    guest.next_icmp({0})


def _in_order(user: dict[str, int]) -> tuple[int, int, int]:
    return user["desc"], user["used"], user["avail"]


def test_enable_before_anything_else(backend: Backend) -> None:
    """QEMU enables rings seconds before it sets them up, and disables some again: legal,
    remembered.
    """
    drv = Driver(backend.path)
    drv.negotiate()
    for index, on in ((0, True), (1, True), (0, False), (1, False), (0, True), (1, True)):
        drv.enable(index, on)
    drv.start_rings()
    guest = Guest(drv)
    guest.resolve()
    drv.close()


def test_front_end_without_protocol_features(backend: Backend) -> None:
    """No bit 30: no SET_VRING_ENABLE ever comes, the rings count as enabled (ring states)."""
    drv = Driver(backend.path, features=vu.VERSION_1 | vu.MRG_RXBUF | vu.GUEST_CSUM)
    drv.offered = drv.ask_u64(vu.GET_FEATURES)
    drv.features = drv.offered & drv.wanted
    drv.must(vu.SET_OWNER)
    drv.enable = lambda index, on: None  # type: ignore[method-assign]
    drv.start_rings()
    guest = Guest(drv)
    guest.resolve()
    guest.ping(guest.gw4, 1, 1, b"")
    guest.next_icmp({0})
    drv.close()


def test_socket_types(backend: Backend) -> None:
    """Descriptors of the front-end's own socket sent over itself do not keep it alive."""
    served(backend)
    before = settled(backend)
    channel = Channel(backend.path)
    ours, theirs = socket.socketpair()
    channel.send(vu.SET_BACKEND_REQ_FD, fds=[channel.socket.fileno()])
    channel.send(vu.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])
    channel.close()
    theirs.close()
    served(backend)
    assert settled(backend, before) <= before
    assert ours.recv(1) == b"", "the back-end keeps a socket of a front-end that went"
    ours.close()
