"""A worker dies at any moment, as in test_inherit.py, while there are datagrams and pings: who asks
again is answered, on the socket the flow had; nobody gets what was meant for another; and every
flow is forgotten in the end.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import pytest
from guest import Guest
from test_inherit import Fate, absences, accesses, calls, lived_often, noted, one_in
from test_rehome import settled
from world import World, loopback

from control.listeners import bind_all
from flows.forward import Port
from shm.jit import COMPILED

pytestmark = pytest.mark.skipif(
    COMPILED, reason="NOT TESTED here: a death at a chosen place, which needs NUMBA_DISABLE_JIT=1"
)
__all__ = ["accesses", "calls", "noted"]  # fixtures
TRIES, PUMPS = 10, 10
LONG_S = 150  # more than any flow of datagrams is kept in silence
Scenario = Callable[[Guest, World, Fate], None]


def throughout(scenario: Callable[[Guest, World], None]) -> Scenario:
    """The worker may die at any moment of it."""

    @wraps(scenario)
    def armed(guest: Guest, world: World, fate: Fate) -> None:
        with fate.armed():
            scenario(guest, world)

    return armed


def until(guest: Guest, say: Callable[[], None], inbox: deque[Any]) -> Any:
    """The last that comes in after somebody has said something, again if need be; others of the
    same may come late."""
    for _ in range(TRIES):
        inbox.clear()
        say()
        for _ in range(PUMPS):
            guest.pump(timeout=0.002)
            if inbox:
                return inbox[-1]
    raise AssertionError(f"not heard, {TRIES} times\n{guest.history()}")


def forgotten(guest: Guest) -> None:
    """All flows, once they have been silent."""
    guest.drv.elapse(LONG_S)
    assert not guest.drv.flow_indexes(), [flow["deadline_ms"] for flow in guest.drv.flows()]
    assert guest.drv.flow_count() == 0


def to_pair(guest: Guest, pair: int, say: Callable[[int], None]) -> None:
    """The guest goes on on another pair, for so long that its flows move."""
    for _ in range(2):
        say(pair)
        guest.drv.settle()
        settled(guest)


@throughout
def asking(guest: Guest, world: World) -> None:
    """The guest asks a server, on one pair and on the other."""
    server = guest.with_host(world.udp(socket.AF_INET))
    asked_from = set()
    for pair in (0, 1, 0):

        def ask(pair: int = pair) -> None:
            guest.send_udp(guest.gw4, 6000, server.port, b"from %d" % pair, pair=pair)

        to_pair(guest, pair, ask)
        data, client = until(guest, ask, server.inbox)
        assert data == b"from %d" % pair
        answer = until(guest, partial(server.send, b"answer", client), guest.udp)[1]
        assert (answer.payload, answer.sport, answer.dport) == (b"answer", server.port, 6000)
        asked_from.add(client)
    assert len(asked_from) == 1, "a flow that has answers keeps its socket"
    forgotten(guest)


@throughout
def pinging(guest: Guest, world: World) -> None:
    """The guest pings, on one pair and on the other."""
    for sequence, pair in enumerate((0, 1, 0)):

        def ping(pair: int = pair, sequence: int = sequence) -> None:
            guest.ping(guest.gw4, 7, sequence, b"there?", pair=pair)

        to_pair(guest, pair, ping)
        answer = until(guest, ping, guest.icmp)[1]
        assert answer.type == 0 and answer.body.endswith(b"there?")
    forgotten(guest)


@throughout
def serving(guest: Guest, world: World) -> None:
    """Two clients of the host ask the guest, each gets its own answers."""
    number = world.port()
    bound = world.run(bind_all, [Port("udp", None, None, number, number, None, False)], 1)
    guest.drv.forward(bound[0].sockets[0], 5353, "udp")
    clients = [guest.with_host(world.udp(socket.AF_INET)) for _ in range(2)]
    here = (loopback(socket.AF_INET), number)
    try:
        for client in clients * 2:
            name = b"%d" % client.port
            question = until(guest, partial(client.send, name, here), guest.udp)[1]
            assert (question.payload, question.sport) == (name, client.port)
        for client in clients:

            def answer(port: int = client.port) -> None:
                guest.send_udp(guest.gw4, 5353, port, b"to %d" % port)

            assert until(guest, answer, client.inbox) == (b"to %d" % client.port, here)
        forgotten(guest)
    finally:
        for one in bound:
            for sock in one.sockets:
                sock.close()


scenarios = pytest.mark.parametrize("scenario", [asking, pinging, serving])


@absences
@scenarios
def test_after_a_system_call(
    world: World, calls: Fate, noted: set[int], scenario: Scenario, missed: int
) -> None:
    lived_often(scenario, world, calls, noted, one_in(2), missed)


@absences
@scenarios
def test_between_accesses_to_the_flow_table(
    world: World, accesses: Fate, noted: set[int], scenario: Scenario, missed: int
) -> None:
    """An entry is half written then, in every way in which it can be."""
    lived_often(scenario, world, accesses, noted, one_in(6), missed)
