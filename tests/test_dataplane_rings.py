"""Any descriptor layout a driver may choose, both directions, and notifications exactly when they
are wanted.

Transmit: a packet's bytes may be cut into descriptors anywhere, chained or indirect, across memory
regions. Receive: mergeable buffers of any size, or one chain for a whole frame. A device may
depend on none of it (virtio 2.7.4.2, 5.1.6.3.1). What arrives must be the same bytes, once.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

import packets as pk
import pytest
from backend import Backend
from driver import BASIC, EVENT_IDX, GUEST_CSUM, INDIRECT_DESC, drain
from formats import all_formats, both_formats, packed_formats
from guest import Guest, random_bytes
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from minitcp import established
from packets import Packet
from vring import Layout
from world import World

FLAGS = BASIC | GUEST_CSUM
ALL = BASIC | GUEST_CSUM | EVENT_IDX | INDIRECT_DESC
PLAIN = 1 << 32 | 1 << 30 | GUEST_CSUM
CALL_PATIENCE_S = 5
# Without shrinking: each failing example costs a time-out.
SAME_GUEST = settings(
    max_examples=60,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
sizes = st.one_of(
    st.lists(st.integers(1, 40), max_size=30),
    st.lists(st.just(1), max_size=80),
    st.lists(st.integers(1, 1000), max_size=4),
)
layouts = st.builds(
    Layout,
    sizes=sizes.map(tuple),
    indirect=st.booleans(),
    border=st.sampled_from([None, None, 0, 1]),
    before=st.integers(1, 42),
)


class Echo:
    """A UDP socket on the host whose datagrams a guest can send to and be answered from."""

    def __init__(self, guest: Guest, world: World, family: int = 4) -> None:
        self.guest = guest
        self.host = guest.with_host(world.udp(socket.AF_INET if family == 4 else socket.AF_INET6))
        self.port = self.host.port
        self.gateway = guest.addresses(family)[1]
        self.client: tuple = ()

    def up(self, payload: bytes, sport: int = 5000, **how: Any) -> None:
        """Guest to host; the payload must arrive, and nothing else."""
        self.guest.send_udp(self.gateway, sport, self.port, payload, **how)
        self.guest.pump(lambda: self.host.inbox, 2, "the datagram at the host")
        got, self.client = self.host.inbox.popleft()
        assert got == payload

    def down(self, payload: bytes) -> Packet:
        """Host to guest, on the flow of the last `up`."""
        self.host.send(payload, self.client)
        _, packet = self.guest.next_udp(2)
        assert packet.payload == payload
        assert (packet.src, packet.sport) == (self.gateway, self.port)
        return packet


@pytest.mark.passt_defect("takes an L4 packet in several descriptors for several packets")
@SAME_GUEST
@given(st.data())
@all_formats
def test_transmit_layouts(
    make_guest: Callable[..., Guest], world: World, data: st.DataObject
) -> None:
    """Any cut of header and packet into descriptors, chained or indirect, across region borders."""
    guest = _kept(make_guest, features=ALL, borders=2)
    echo = Echo(guest, world, data.draw(st.sampled_from([4, 6])))
    for layout in data.draw(st.lists(layouts, min_size=1, max_size=4)):
        echo.up(random_bytes(data.draw(st.integers(0, 1400))), layout=layout)
    assert not echo.host.inbox, "more datagrams than were sent"
    echo.host.close()
    assert set(guest.drv.wait_sent(0)) <= {0}


_guests: dict[Callable[..., Guest], Guest] = {}


def _kept(make_guest: Callable[..., Guest], **options: Any) -> Guest:
    """One guest for all the examples of a test."""
    if make_guest not in _guests:
        _guests.clear()
        guest = make_guest(**options)
        missing = guest.drv.wanted & ~guest.drv.offered
        if missing:
            guest.drv.features &= guest.drv.offered
        _guests[make_guest] = guest
    return _guests[make_guest]


@pytest.mark.passt_lacks("neither EVENT_IDX nor INDIRECT_DESC")
def test_ring_features_are_offered(guest: Guest) -> None:
    for bit in (EVENT_IDX, INDIRECT_DESC, GUEST_CSUM):
        assert guest.drv.offered & bit, f"feature bit {bit.bit_length() - 1} is not offered"


@pytest.mark.passt_defect("takes an L4 packet in several descriptors for several packets")
@pytest.mark.parametrize("family", [4, 6])
@both_formats
def test_every_header_cut(make_guest: Callable[..., Guest], world: World, family: int) -> None:
    """Two descriptors, the border at every byte of the headers in turn."""
    guest = make_guest()
    echo = Echo(guest, world, family)
    for cut in range(1, 12 + 14 + (20 if family == 4 else 40) + 8 + 2):
        echo.up(b"payload %d" % cut, layout=Layout(sizes=(cut,)))


@pytest.mark.parametrize("before", [1, 11, 12, 13, 26, 27, 46, 54, 60, 500])
def test_transmit_across_a_region_border(
    make_guest: Callable[..., Guest], world: World, before: int
) -> None:
    """One descriptor whose first `before` bytes lie in one region and the rest in the next."""
    guest = make_guest(borders=1)
    echo = Echo(guest, world)
    echo.up(random_bytes(1000), layout=Layout(border=0, before=before))


SHORT = pytest.mark.passt_defect("writes a header past a short first descriptor")


@pytest.mark.parametrize(
    "before", [pytest.param(n, marks=SHORT) for n in (1, 8, 11)] + [12, 13, 26, 40, 60, 500]
)
@both_formats
def test_receive_across_a_region_border(
    make_guest: Callable[..., Guest], world: World, before: int
) -> None:
    guest = make_guest(borders=1)
    echo = Echo(guest, world)
    echo.up(b"?")
    drv = guest.drv
    drv.refill = False
    for i in range(256):
        echo.down(struct.pack(">I", i) * 20)
    assert not drv.rx(0).ring.chains
    drv.post_across_border(0, 0, 2048, before)
    echo.down(random_bytes(1000))


SHAPES = [
    pytest.param((1526,), id="1526"),
    pytest.param((64,), id="64", marks=pytest.mark.passt_defect("pads within one buffer only")),
    pytest.param((12, 116), id="header-apart"),
    pytest.param((10, 2, 116), id="short-first", marks=SHORT),
    pytest.param((1,) * 14 + (50,), id="ones", marks=SHORT),
    pytest.param((13, 1, 1, 4000), id="odd"),
    pytest.param((65562,), id="64K"),
]


@pytest.mark.parametrize("shape", SHAPES)
@both_formats
def test_mergeable_receive_buffers(
    make_guest: Callable[..., Guest], world: World, shape: tuple[int, ...]
) -> None:
    """Datagrams and a stream into mergeable buffers of any shape."""
    guest = make_guest(rx=shape, features=ALL)
    echo = Echo(guest, world, 6)
    echo.up(b"?")
    fits = sum(shape) * (guest.drv.rx(0).ring.num // len(shape)) - 74
    for size in (0, 1, sum(shape) - 74, sum(shape) - 73, 1400, 9000, fits):
        echo.down(random_bytes(min(65000, fits, max(0, size))))
    tcp, peer = established(guest, world, 4)
    stream = random_bytes(300_000)
    peer.send(stream)
    guest.pump(lambda: len(tcp.received) >= len(stream), 10, "the stream at the guest")
    assert tcp.received == stream
    tcp.check()


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((65562,), id="one"),
        pytest.param((12, 65550), id="header-apart"),
        pytest.param((4096,) * 17, id="pages"),
        pytest.param((5, 7, 65550), id="short", marks=SHORT),
    ],
)
@both_formats
def test_whole_frame_chains(
    make_guest: Callable[..., Guest], world: World, shape: tuple[int, ...]
) -> None:
    """Without MRG_RXBUF a frame goes into one chain, however large."""
    guest = make_guest(features=PLAIN, rx=shape)
    echo = Echo(guest, world)
    echo.up(b"?")
    for size in (0, 1, 1472, 30_000):
        assert echo.down(random_bytes(size)).header.num_buffers == 1
    tcp, peer = established(guest, world, 4)
    stream = random_bytes(1_000_000)
    peer.send(stream)
    guest.pump(lambda: len(tcp.received) >= len(stream), 10, "the stream at the guest")
    assert tcp.received == stream
    tcp.check()


@pytest.mark.parametrize("num", [4, 16, 1024])
def test_ring_sizes(make_guest: Callable[..., Guest], world: World, num: int) -> None:
    guest = make_guest(num=num, features=ALL)
    tcp, peer = established(guest, world, 6)
    up, down = random_bytes(400_000, 1), random_bytes(400_000, 2)
    tcp.send(up)
    peer.send(down)
    guest.pump(lambda: len(tcp.received) >= len(down), 15, "the stream at the guest")
    guest.pump(lambda: len(peer.inbox) >= len(up), 15, "the stream at the host")
    assert (tcp.received, peer.inbox) == (down, up)
    tcp.check()


@pytest.mark.parametrize("features", [FLAGS, ALL], ids=["flags", "event-idx"])
def test_indices_wrap(make_guest: Callable[..., Guest], world: World, features: int) -> None:
    """Rings that start 100 buffers short of index 65536."""
    guest = make_guest(features=features, base=65436)
    echo = Echo(guest, world)
    for i in range(300):
        echo.up(struct.pack(">I", i))
        echo.down(struct.pack(">I", ~i & 0xFFFFFFFF))
    assert guest.drv.rx(0).ring.used_idx < 1000 and guest.drv.tx(0).ring.used_idx < 1000


@packed_formats
@pytest.mark.parametrize("num", [1, 3, 100, 255, 32768])
def test_packed_ring_sizes(make_guest: Callable[..., Guest], world: World, num: int) -> None:
    """Packed rings may have any size up to 32768 (virtio 2.8.10.1)."""
    test_ring_sizes(make_guest, world, num)


NUM = 7
STARTS = {
    "first": 0x80008000,
    "last of a lap": (NUM - 1 | 0x8000) * 0x10001,
    "amid the other lap": 3 * 0x10001,
    "no used half": 0x8000,
    "no used half, amid a lap": 0x8000 | 5,
    "no used half, amid the other lap": 4,
}


@packed_formats
@pytest.mark.parametrize("start", STARTS)
def test_packed_bases(make_guest: Callable[..., Guest], world: World, start: str) -> None:
    """Rings that start anywhere; each lap the wrap counters change, 200 times. In between the VMM
    stops them and goes on, with and without the used half of the base.
    """
    guest = make_guest(features=ALL, num=NUM, base=STARTS[start])
    echo = Echo(guest, world)
    for i in range(700):
        echo.up(struct.pack(">I", i))
        echo.down(struct.pack(">I", ~i & 0xFFFFFFFF))
        if i % 97 == 0:
            for queue, base in zip(guest.drv.queues, guest.drv.stop_rings(), strict=True):
                assert base == queue.ring.base
                guest.drv.start_ring(queue, base & (0xFFFFFFFF if i % 2 else 0xFFFF))
                guest.drv.enable(queue.index, True)


# --- a receive ring without buffers -------------------------------------------------------------


def starve(guest: Guest) -> None:
    """Let the receive ring run dry: what is out stays, nothing is posted anew."""
    guest.drv.refill = False


def feed(guest: Guest) -> None:
    guest.drv.refill = True
    guest.drv.fill(0)


@pytest.mark.passt_defect("spins while the receive ring is empty, and loses data at a FIN")
@pytest.mark.parametrize("fin", [False, True])
@both_formats
def test_stream_waits_for_receive_buffers(
    backend: Backend, make_guest: Callable[..., Guest], world: World, fin: bool
) -> None:
    """No buffer for a second: under 10 % of a processor; then buffers and one kick: every byte,
    and the FIN.
    """
    guest = make_guest(features=ALL)
    tcp, peer = established(guest, world, 4)
    starve(guest)
    stream = random_bytes(2_000_000)
    peer.send(stream)
    if fin:
        peer.shutdown()
    guest.pump(lambda: not guest.drv.rx(0).ring.chains, 5, "the receive ring to run dry")
    guest.pump(timeout=0.2)
    load = backend.load(1.0)
    assert load < 0.10, f"{load:.0%} of a processor while the receive ring is empty"
    feed(guest)
    guest.pump(lambda: len(tcp.received) >= len(stream), 10, "the rest of the stream")
    assert tcp.received == stream
    if fin:
        guest.pump(lambda: tcp.eof, 5, "the FIN")
    tcp.check()


@pytest.mark.passt_defect("drops datagrams while the receive ring is empty")
@both_formats
def test_datagrams_wait_for_receive_buffers(
    backend: Backend, make_guest: Callable[..., Guest], world: World
) -> None:
    """A few datagrams fit the host socket: they wait there, and come in order."""
    guest = make_guest(features=ALL, num=16)
    echo = Echo(guest, world)
    echo.up(b"?")
    starve(guest)
    for i in range(40):
        echo.host.send(struct.pack(">I", i) * 8, echo.client)
    guest.pump(lambda: len(guest.udp) == 15 or len(guest.udp) == 16, 5, "the ring to run dry")
    load = backend.load(0.5)
    assert load < 0.10, f"{load:.0%} of a processor while the receive ring is empty"
    feed(guest)
    guest.pump(lambda: len(guest.udp) == 40, 5, "all datagrams")
    assert [struct.unpack_from(">I", p.payload)[0] for _, p in guest.udp] == list(range(40))


@pytest.mark.passt_defect("spins while the receive ring is empty")
@both_formats
def test_ring_that_starts_empty(
    backend: Backend, make_guest: Callable[..., Guest], world: World
) -> None:
    """A driver that posts its first receive buffers only after traffic is under way."""
    guest = make_guest(features=ALL)
    drv = guest.drv
    drv.stop_rings()
    for queue in drv.queues:
        queue.ring.reset()
    drv.rx_limit[0] = 0
    drv.start_rings()
    guest.ping(guest.gw4, 1, 1, b"early")
    drv.wait_sent(0)
    assert backend.load(0.3) < 0.10
    drv.rx_limit[0] = 64
    drv.fill(0)
    guest.ping(guest.gw4, 1, 2, b"late")
    guest.next_icmp({0})


# --- notifications ------------------------------------------------------------------------------


def wait_used(guest: Guest, count: int) -> None:
    """Poll the receive ring without asking for calls."""
    ring, deadline = guest.drv.rx(0).ring, time.monotonic() + 5
    while ring.pending() < count:
        assert time.monotonic() < deadline, f"{ring.pending()} of {count} frames arrived"
        time.sleep(0.001)
    time.sleep(0.02)


@pytest.mark.parametrize("features", [FLAGS, ALL], ids=["flags", "event-idx"])
@both_formats
def test_no_calls_when_suppressed(
    make_guest: Callable[..., Guest], world: World, features: int
) -> None:
    guest = make_guest(features=features)
    echo = Echo(guest, world)
    echo.up(b"?")
    guest.pump(timeout=0.05)
    queue = guest.drv.rx(0)
    queue.ring.want_calls(False)
    drain(queue.call)
    for i in range(20):
        echo.host.send(b"%d" % i, echo.client)
    wait_used(guest, 20)
    assert drain(queue.call) == 0, "called although the driver asked for no calls"
    guest.pump(lambda: len(guest.udp) == 20, what="the datagrams")
    guest.udp.clear()
    echo.down(b"and calls work again")


@pytest.mark.passt_lacks("no EVENT_IDX")
@both_formats
def test_call_comes_at_the_used_event(
    request: pytest.FixtureRequest,
    make_backend: Callable[..., Backend],
    make_guest: Callable[..., Guest],
    world: World,
) -> None:
    """used_event 9 ahead: nine frames in silence, a call with the tenth (virtio 2.7.7.1). With a
    back-end of its own, which owes nothing to earlier guests."""
    guest = make_guest(to=make_backend(*getattr(request.module, "ALONE", ())), features=ALL)
    echo = Echo(guest, world)
    echo.up(b"?")
    guest.pump(timeout=0.05)
    queue = guest.drv.rx(0)
    queue.ring.call_at(9)
    drain(queue.call)
    for i in range(9):
        echo.host.send(b"%d" % i, echo.client)
    wait_used(guest, 9)
    assert drain(queue.call) == 0, f"called before the used event\n{guest.history()}"
    echo.host.send(b"9", echo.client)
    wait_used(guest, 10)
    select.select([queue.call], [], [], CALL_PATIENCE_S)  # it follows the used index
    assert drain(queue.call) == 1, f"not called at the used event\n{guest.history()}"


@pytest.mark.parametrize("features", [FLAGS, ALL], ids=["flags", "event-idx"])
@both_formats
def test_kicks_only_when_asked_for(
    make_guest: Callable[..., Guest], world: World, features: int
) -> None:
    """The driver kicks only when the device asks (`Ring.publish`): with pauses of any length
    nothing may hang.
    """
    guest = make_guest(features=features)
    echo = Echo(guest, world)
    for i in range(200):
        echo.up(struct.pack(">I", i))
        if i % 10 == 0:
            time.sleep(0.0005 * (i % 7))
    assert guest.drv.tx(0).kicks <= 205


@pytest.mark.parametrize("features", [FLAGS, ALL], ids=["flags", "event-idx"])
@both_formats
def test_calls_are_batched(make_guest: Callable[..., Guest], world: World, features: int) -> None:
    """One call per ring per breath: a stream of two thousand segments costs far fewer."""
    guest = make_guest(features=features, rx=(1526,))
    tcp, peer = established(guest, world, 4)
    guest.drv.count_calls(0)
    stream = random_bytes(3_000_000)
    peer.send(stream)
    guest.pump(lambda: len(tcp.received) >= len(stream), 10, "the stream at the guest")
    calls, frames = guest.drv.count_calls(0), len(tcp.segments)
    assert calls < frames / 4, f"{calls} calls for {frames} frames"


@all_formats
def test_transmit_buffers_come_back_unwritten(guest: Guest, world: World) -> None:
    """Used length 0 for every transmit buffer: nothing was written into it (virtio 2.7.8)."""
    echo = Echo(guest, world)
    echo.up(b"?")
    for i in range(50):
        guest.send_udp(echo.gateway, 5000, echo.port, b"%d" % i)
    assert set(guest.drv.wait_sent(0)) <= {0}


def test_udp_checksum_kinds(guest: Guest, world: World) -> None:
    """IPv4 allows a datagram without a checksum (RFC 768)."""
    echo = Echo(guest, world)
    body = pk.udp(guest.ip4, guest.gw4, 5000, echo.port, b"no checksum")
    packet = pk.ipv4(guest.ip4, guest.gw4, pk.UDP, body[:6] + b"\0\0" + body[8:])
    guest.send_ip(packet)
    guest.pump(lambda: echo.host.inbox, 2, "the datagram at the host")
    assert echo.host.inbox[0][0] == b"no checksum"
