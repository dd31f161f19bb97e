"""More flows than the host has descriptors for: refused, counted, and over when the flood is over.

The back-end runs with a low limit on descriptors, so that a few hundred flows are a flood. What
already runs must not suffer, and when the flood's connections are gone, new ones must work: a
descriptor lost at the limit is lost for good.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable

import packets as pk
import pytest
from backend import Backend
from guest import Guest, random_bytes
from minitcp import Tcp, established, exchange
from world import World

LIMIT = 300
FLOOD = 600


@pytest.fixture
def tight(make_backend: Callable[..., Backend]) -> Backend:
    return make_backend(nofile=LIMIT)


@pytest.mark.passt_defect("makes no new flow after its descriptors ran out once")
def test_connection_flood(tight: Backend, make_guest: Callable[..., Guest], world: World) -> None:
    """600 connections where 300 descriptors are, reset again: then new ones work as before."""
    guest = make_guest(to=tight)
    tcp, peer = established(guest, world, 4)
    listener = guest.with_host(world.listen(2))
    for round_number in range(2):
        flood = [Tcp(guest, guest.gw4, listener.port) for _ in range(FLOOD)]
        for one in flood:
            one.retransmit = False
            one.open()
        guest.pump(timeout=0.5)
        exchange(guest, tcp, peer, random_bytes(100_000), random_bytes(100_000))
        for one in flood:
            one.state = "established"
            one.abort()
        guest.pump(timeout=0.2)
        for accepted in listener.accepted:
            accepted.close()
        listener.accepted.clear()
        _connects_again(guest, world, round_number)
    refused = tight.total("vhostmq_drops_total", reason="no_socket")
    assert refused >= 2 * (FLOOD - LIMIT), f"{refused} of {2 * FLOOD} counted as without a socket"
    assert tight.load(0.3) < 0.10


def _connects_again(guest: Guest, world: World, round_number: int) -> None:
    deadline = time.monotonic() + 6
    while True:
        try:
            again, other = established(guest, world, 4)
            break
        except AssertionError as error:
            assert time.monotonic() < deadline, f"round {round_number}: no new connection: {error}"
            guest.pump(timeout=0.1)
    exchange(guest, again, other, b"new", b"flow")


@pytest.mark.parametrize("protocol", [pk.UDP, pk.ICMP])
def test_datagram_flood(
    tight: Backend, make_guest: Callable[..., Guest], world: World, protocol: int
) -> None:
    """Thousands of one-packet flows: connections that exist go on, and nothing spins after."""
    guest = make_guest(to=tight)
    tcp, peer = established(guest, world, 4)
    server = guest.with_host(world.udp(2))
    for i in range(3000):
        if protocol == pk.UDP:
            guest.send_udp(guest.gw4, 1024 + i, server.port, struct.pack(">I", i))
        else:
            guest.ping(guest.gw4, i, 1, b"")
        if i % 500 == 499:
            guest.pump(timeout=0.02)
            exchange(guest, tcp, peer, random_bytes(20_000, i), random_bytes(20_000, i + 1))
    guest.drv.wait_sent(0)
    exchange(guest, tcp, peer, random_bytes(100_000), random_bytes(100_000))
    assert tight.total("vhostmq_drops_total", reason="no_socket") >= 3000 - LIMIT
    assert tight.load(0.5) < 0.10
