"""Flows that need more receive buffers than the guest gives: they take turns.

One worker in the test's process, and a guest that gives buffers when the test says so, never enough
for all (dataplane/lifecycle.py, Lines).
"""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest
from driver import BASIC, GUEST_CSUM
from guest import Guest, random_bytes
from minitcp import established
from world import World

Make = Callable[..., Guest]


@pytest.fixture
def guest(make_local: Make) -> Guest:
    """A ring of sixteen buffers: one stream alone takes more."""
    return make_local(num=16, features=BASIC | GUEST_CSUM)


def feed(guest: Guest, rounds: int) -> None:
    """So often the guest gives the ring all the buffers it has room for, and takes what comes."""
    for _ in range(rounds):
        guest.drv.refill = True
        guest.drv.fill(0)
        guest.drv.refill = False
        guest.drv.settle()
        guest.pump(timeout=0)


@pytest.mark.parametrize("trickle", [0, 8000], ids=["all-at-once", "one-now-and-then"])
def test_streams_in_need_of_buffers_take_turns(guest: Guest, world: World, trickle: int) -> None:
    """Nobody gets less than half its share, whether a stream has more than the ring takes, as most
    have, or is drained each time and has news again when buffers come, as the first may."""
    rounds = 4
    streams = [established(guest, world, 4, window=1 << 20) for _ in range(9)]
    guest.drv.refill = False
    for _, peer in streams[1 if trickle else 0 :]:
        peer.send(random_bytes(2_000_000))
    guest.drv.settle()
    for _ in range(rounds * len(streams)):
        streams[0][1].send(random_bytes(trickle))
        feed(guest, 1)
    got = [len(tcp.received) for tcp, _ in streams[1:]]
    assert min(got) >= sum(got) / len(got) / 2, got
    assert len(streams[0][0].received) >= min(sum(got) / len(got), rounds * trickle) / 2
    for tcp, _ in streams:
        tcp.check()


def test_datagrams_in_need_of_buffers_take_turns(guest: Guest, world: World) -> None:
    """Of each socket some arrive before all of another's have, and in the end all have."""
    flows, each = 9, 40
    host = guest.with_host(world.udp(socket.AF_INET))
    for port in range(6000, 6000 + flows):
        guest.send_udp(guest.gw4, port, host.port, b"?")
    guest.pump(lambda: len(host.inbox) == flows, what="the datagrams at the host")
    guest.drv.refill = False
    for _, client in host.inbox:
        for number in range(each):
            host.send(b"%d" % number, client)
    guest.drv.settle()
    feed(guest, 2 * flows)
    ports = [packet.dport for _, packet in guest.udp]
    assert {ports.count(port) > 0 for port in range(6000, 6000 + flows)} == {True}, ports
    assert max(ports.count(port) for port in ports) < 2.5 * len(ports) / flows
    feed(guest, 2 * flows * each // 16)
    numbers = [[int(p.payload) for _, p in guest.udp if p.dport == port] for port in set(ports)]
    assert numbers == [list(range(each))] * flows
