"""Rings that are small, and notifications counted one by one.

A frame that fits the receive ring to the last byte is delivered, one that can never fit is dropped
and counted, and neither holds up what comes after. A kick is wanted once per time the device finds
its ring empty, a call comes once per ring and breath: bounds that hold only where nothing runs in
between, so the workers live in the test's process.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import pytest
from driver import BASIC, EVENT_IDX, GUEST_CSUM, GUEST_TSO4, GUEST_TSO6, MQ, drain
from formats import both_formats
from guest import Guest, random_bytes
from minitcp import established
from world import Datagrams, World

AF = {4: socket.AF_INET, 6: socket.AF_INET6}
families = pytest.mark.parametrize("family", [4, 6])
HEADERS = {4: 12 + 14 + 20 + 8, 6: 12 + 14 + 40 + 8}
MERGEABLE = BASIC | GUEST_CSUM | EVENT_IDX | MQ
WHOLE = 1 << 32 | 1 << 30 | GUEST_CSUM | MQ
notifications = pytest.mark.parametrize(
    "features", [BASIC | GUEST_CSUM, MERGEABLE], ids=["flags", "event-idx"]
)


class Make:
    """Makes guests on workers in this process."""

    def __init__(self, world: World, make_local: Callable[..., Guest], rings: int) -> None:
        self.world, self.make_local, self.rings = world, make_local, rings

    def guest(self, *, features: int, **options: Any) -> Guest:
        return self.make_local(features=features | self.rings, **options)

    def conversation(
        self, family: int, *, pair: int = 0, **options: Any
    ) -> tuple[Guest, Datagrams, tuple]:
        """A guest that has sent a datagram on pair 0 and one on `pair`, the socket that got them,
        and where that one answers to.
        """
        guest = self.guest(**options)
        host = guest.with_host(self.world.udp(AF[family]))
        for on in (0, pair):
            guest.send_udp(guest.addresses(family)[1], 5000, host.port, b"?", pair=on)
            guest.pump(lambda: host.inbox, what="the datagram at the host")
            client = host.inbox.popleft()[1]
        return guest, host, client


@pytest.fixture
def make(world: World, make_local: Callable[..., Guest], rings: int) -> Make:
    return Make(world, make_local, rings)


# --- room -----------------------------------------------------------------------------------------

SMALL = [
    pytest.param((64,), 17, id="64"),
    pytest.param((1,) * 14 + (50,), 17, id="ones"),
    pytest.param((12, 52), 17, id="header-apart"),
    pytest.param((700,), 1, id="one"),
    pytest.param((300, 301), 3, id="three"),
]


@families
@pytest.mark.parametrize(("shape", "chains"), SMALL)
@both_formats
def test_datagrams_and_the_room_of_a_ring(
    make: Make, family: int, shape: tuple[int, ...], chains: int
) -> None:
    """To the last byte, and one more, and far more; with the flow's last size large or small."""
    guest, host, client = make.conversation(family, features=MERGEABLE, rx=shape)
    limit(guest, 0, chains)
    fits, dropped = sum(shape) * chains - HEADERS[family], 0
    for size in (0, fits, fits + 1, 1, 1400, fits, 9000, 60_000, fits - 1, fits + 1, 7):
        host.send(random_bytes(size), client)
        if size <= fits:
            assert guest.next_udp(1)[1].payload == random_bytes(size)
        else:
            dropped += 1
            guest.drv.settle()
            assert not guest.drv.rx(0).ring.pending()
        assert guest.drv.drops("rx_full", 0) == dropped, f"{size} bytes, {fits} fit"
    assert len(guest.drv.rx(0).ring.chains) == chains


def limit(guest: Guest, pair: int, chains: int) -> None:
    """From now on the pair has only so many receive chains out."""
    drv = guest.drv
    drv.stop_ring(2 * pair)
    drv.rx(pair).ring.reset()
    drv.rx_limit[pair] = chains
    drv.fill(pair)
    drv.start_ring(drv.rx(pair))


@families
@pytest.mark.parametrize("tso", [0, GUEST_TSO4 | GUEST_TSO6], ids=["plain", "tso"])
@pytest.mark.parametrize(("shape", "chains"), SMALL)
@both_formats
def test_a_stream_through_a_small_ring(
    make: Make, world: World, family: int, shape: tuple[int, ...], chains: int, tso: int
) -> None:
    """Segments are made as short as the ring wants them; none is lost."""
    guest = make.guest(features=MERGEABLE | tso, rx=shape)
    tcp, peer = established(guest, world, family)
    limit(guest, 0, chains)
    stream = random_bytes(30_000)
    peer.send(stream)
    guest.pump(lambda: len(tcp.received) >= len(stream), 10, f"the stream at the guest: {tcp}")
    assert tcp.received == stream
    room = sum(shape) * chains - HEADERS[family] - 12
    assert max(len(packet.payload) for packet in tcp.segments) == min(room, 30_000 if tso else 1460)
    assert not guest.drv.counter("retransmits")
    tcp.check()


@families
@both_formats
def test_chains_too_small_for_a_datagram(make: Make, world: World, family: int) -> None:
    """Without mergeable buffers a frame has one chain: what does not fit is dropped and counted,
    what fits goes on; a stream is cut to fit.
    """
    guest, host, client = make.conversation(family, features=WHOLE, rx=(100, 500))
    fits = 600 - HEADERS[family]
    dropped = 0
    for size in (fits, fits + 1, 1400, fits, 30_000, 1):
        host.send(random_bytes(size), client)
        if size <= fits:
            assert guest.next_udp(1)[1].payload == random_bytes(size)
        else:
            dropped += 1
            guest.drv.settle()
        drops = guest.drv.drops("rx_small", 0) + guest.drv.drops("rx_full", 0)
        assert drops == dropped, f"{size} bytes, {fits} fit"
    tcp, peer = established(guest, world, family)
    stream = random_bytes(30_000)
    peer.send(stream)
    guest.pump(lambda: len(tcp.received) >= len(stream), 10, f"the stream at the guest: {tcp}")
    assert tcp.received == stream
    tcp.check()


@families
@both_formats
def test_a_frame_from_another_worker_that_never_fits(make: Make, family: int) -> None:
    """It must not stay at the head of the hand-off ring for good, in front of all that follows."""
    guest, host, client = make.conversation(
        family, pair=1, pairs=2, workers=2, features=MERGEABLE, rx=(64,)
    )
    assert [(flow["home"], flow["tx_queue"]) for flow in guest.drv.flows()] == [(0, 1)]
    guest.drv.keep_home()
    limit(guest, 1, 17)
    fits = 17 * 64 - HEADERS[family]
    host.send(random_bytes(fits), client)
    assert guest.next_udp(1)[1].payload == random_bytes(fits)
    for size in (fits + 1, 1400, 60_000):
        host.send(random_bytes(size), client)
    host.send(b"after them", client)
    assert guest.next_udp(2)[1].payload == b"after them"
    assert guest.drv.drops("rx_full", 2) == 3


def test_a_starved_queue_of_another_worker_costs_nothing(make: Make) -> None:
    """Frames wait in the hand-off ring for buffers the guest does not give: both workers sleep.
    With the buffers the queue works again; what waited comes in order, or was dropped and counted.
    """
    guest, host, client = make.conversation(
        4, pair=1, pairs=2, workers=2, num=16, features=MERGEABLE
    )
    guest.serving = [0]
    guest.drv.keep_home()
    for number in range(30):
        host.send(b"%d" % number, client)
    for worker in (0, 1, 0, 1):
        guest.drv.breathe(worker)
    for worker in (1, 0):
        assert guest.drv.breaths_in(0.3, worker) < 20, f"worker {worker} spins"
    guest.serving = [0, 1]
    guest.pump(timeout=0.1)
    host.send(b"30", client)
    guest.pump(lambda: guest.udp and guest.udp[-1][1].payload == b"30", 2, "the next datagram")
    numbers = [int(packet.payload) for _, packet in guest.udp]
    assert numbers == sorted(numbers) and numbers[:16] == list(range(16))
    assert len(numbers) + guest.drv.drops("rx_full", 2) == 31


def test_a_starved_queue_holds_up_no_other(make: Make, world: World) -> None:
    """Pairs 1 and 3 belong to one worker, both flows to another. The guest gives pair 1 no buffers;
    what comes for pair 3 must get through.
    """
    guest = make.guest(pairs=4, workers=2, num=16, features=MERGEABLE)
    host, clients = guest.with_host(world.udp(socket.AF_INET)), {}
    for on in (1, 3):
        for pair in (0, on):
            guest.send_udp(guest.gw4, 5000 + on, host.port, b"?", pair=pair)
            guest.pump(lambda: host.inbox, what="the datagram at the host")
            clients[on] = host.inbox.popleft()[1]
    assert {(flow["home"], flow["tx_queue"]) for flow in guest.drv.flows()} == {(0, 1), (0, 3)}
    guest.serving = [0, 2, 3]
    for _ in range(20):
        host.send(b"nobody takes this", clients[1])
    guest.drv.settle()
    host.send(b"through", clients[3])
    came_on, packet = guest.next_udp(2)
    assert (came_on, packet.payload) == (3, b"through")
    guest.serving = [0, 1, 2, 3]
    guest.pump(lambda: len(guest.udp) >= 16, 2, "what waits for pair 1")


# --- notifications --------------------------------------------------------------------------------


@notifications
@both_formats
def test_no_kick_is_wanted_before_the_ring_is_empty(
    make: Make, world: World, features: int
) -> None:
    """One kick wakes the device; until it has found the ring empty it asks for no other, however
    much comes meanwhile and however many breaths it takes. Then it asks for exactly one.
    """
    guest, host, _ = make.conversation(4, features=features)
    drv, queue = guest.drv, guest.drv.tx(0)

    def frames(count: int) -> int:
        """Send so many, each shown on its own; the kicks that took."""
        before = queue.kicks
        for _ in range(count):
            guest.send_udp(guest.gw4, 5000, host.port, b"")
        return queue.kicks - before

    drv.settle()
    for _ in range(3):
        assert frames(1) == 1
        assert frames(99) == (0 if features & EVENT_IDX else 99)
        for left in (36, 72, 108):
            drv.breathe()  # 64 chains
            drv.reap_tx(0)
            assert len(queue.ring.chains) == left
            assert frames(100) == 0, "a kick while the device is at it"
        taken = 0
        while queue.ring.chains:
            drv.breathe()
            drv.reap_tx(0)
            taken += 1
        assert taken == 4
        drv.settle()
    guest.pump(lambda: len(host.inbox) == 3 * 400, 5, "every datagram at the host")


@notifications
@both_formats
def test_one_call_per_ring_and_breath(make: Make, world: World, features: int) -> None:
    """However many buffers a breath returns; and none when it returns none."""
    guest = make.guest(features=features, rx=(1526,))
    tcp, peer = established(guest, world, 4)
    drv, queue = guest.drv, guest.drv.rx(0)
    stream, most = random_bytes(400_000), 0
    peer.send(stream)
    while len(tcp.received) < len(stream):
        queue.ring.want_calls(True)
        drain(queue.call)
        drv.breathe()
        used = queue.ring.pending()
        assert drain(queue.call) == (1 if used else 0), f"calls for {used} buffers"
        most = max(most, used)
        guest._step()
    assert tcp.received == stream and most > 30
