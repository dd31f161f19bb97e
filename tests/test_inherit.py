"""A worker dies at any moment: after any system call, between any two accesses to shared memory.
The one in its place goes on: every stream arrives whole, whichever end opened it, and every flow
ends.

Compiled code cannot be stopped at a chosen place; interpreted it can. Here a death is an exception
that leaves everything where it was: the test's process keeps the sockets, as a keeper does.
"""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Callable

import pytest
from driver import BASIC, GUEST_CSUM, MQ
from guest import Guest, random_bytes
from inprocess import Died, local_guests, no_leftovers
from minitcp import Tcp, established, listen
from test_rehome import to_other
from world import Peer, World

from shm import libc, mem
from shm.jit import COMPILED
from shm.schema import FLOW, FLOWS_MAX

pytestmark = pytest.mark.skipif(
    COMPILED, reason="NOT TESTED here: a death at a chosen place, which needs NUMBA_DISABLE_JIT=1"
)
CALLS = ("accept4", "close", "connect", "epoll_ctl", "epoll_wait", "getsockopt", "ioctl", "recv",
         "recvmsg", "sendmsg", "setsockopt", "shutdown", "socket", "write")  # fmt: skip
UP, DOWN = random_bytes(9000, 1), random_bytes(150_000, 2)
NEVER = -1
EVERY = int(os.environ.get("VHOSTMQ_EVERY", "15"))  # of the places, one in so many is tried
LOCAL = {"workers": 2, "pairs": 2, "features": BASIC | GUEST_CSUM | MQ}
Make = Callable[..., Guest]
Scenario = Callable[[Guest, World], None]


class Lost(Exception):
    """A connection ended before it was known."""


class Fate:
    """Counts what workers do once it is armed, and ends one at the number it is told."""

    def __init__(self) -> None:
        self.armed, self.at, self.count, self.where = False, NEVER, 0, "nowhere"
        self.span = [0, 0]

    def arm(self, at: int) -> None:
        self.armed, self.at, self.count, self.where = True, at, 0, "nowhere"

    def step(self, where: Callable[[], str]) -> None:
        if not self.armed:
            return
        self.count += 1
        if self.count == self.at:
            self.where = where()
            raise Died(self.where)


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sockets that workers have accepted and not closed."""
    found: list[int] = []
    accept4, close = libc.accept4, libc.close

    def accept_and_note(*arguments: int) -> int:
        fd = int(accept4(*arguments))
        found.extend([fd] if fd >= 0 else [])
        return fd

    def close_and_note(fd: int) -> int:
        found[:] = [one for one in found if one != fd]
        return int(close(fd))

    monkeypatch.setattr(libc, "accept4", accept_and_note)
    monkeypatch.setattr(libc, "close", close_and_note)
    return found


@pytest.fixture
def calls(noted: list[int], monkeypatch: pytest.MonkeyPatch) -> Fate:
    """Ends a worker after a system call that it has not seen the result of."""
    made = Fate()

    def counted(name: str, call: Callable[..., int]) -> Callable[..., int]:
        def after(*arguments: int) -> int:
            result = call(*arguments)
            made.step(lambda: f"after {name}{tuple(map(int, arguments))} = {result}")
            return result

        return after

    for name in CALLS:
        monkeypatch.setattr(libc, name, counted(name, getattr(libc, name)))
    return made


@pytest.fixture
def accesses(monkeypatch: pytest.MonkeyPatch) -> Fate:
    """Ends a worker before it reads or writes a word of the flow table."""
    made, check = Fate(), mem.check

    def counted(address: int, size: int) -> int:
        at = check(address, size)
        if made.span[0] <= at < made.span[1]:
            made.step(lambda: f"at {size} bytes, {(at - made.span[0]) % FLOW.size} in an entry")
        return at

    monkeypatch.setattr(mem, "check", counted)
    return made


def both_ways(guest: Guest, tcp: Tcp, peer: Peer) -> None:
    """Data both ways, then an end from both sides, until nothing is left of the flow."""
    tcp.send(UP)
    peer.send(DOWN)
    guest.pump(
        lambda: len(peer.inbox) >= len(UP) and len(tcp.received) >= len(DOWN), 20, f"data: {tcp}"
    )
    tcp.close()
    peer.shutdown()
    guest.pump(lambda: tcp.eof and peer.eof, 20, f"the end of both streams: {tcp}")
    for _ in range(200):
        if not guest.drv.flow_indexes():
            break
        guest.pump(timeout=0.02)  # the last step shows in no frame
    assert not guest.drv.flow_indexes(), tcp
    assert bytes(peer.inbox) == UP and bytes(tcp.received) == DOWN
    tcp.check()
    assert guest.drv.flow_count() == 0


def from_guest(guest: Guest, world: World) -> None:
    """The guest opens the connection."""
    tcp, peer = established(guest, world, 4)
    both_ways(guest, tcp, peer)


def from_host(guest: Guest, world: World) -> None:
    """The host opens the connection."""
    accepted = listen(guest, 8080)
    listener = world.listen(socket.AF_INET)
    guest.drv.forward(listener.socket, 8080)
    peer = guest.with_host(world.connect(socket.AF_INET, listener.port))
    guest.pump(
        lambda: (accepted and accepted[0].state == "established") or peer.eof or peer.error,
        what="the connection, or its end",
    )
    if not accepted:
        raise Lost
    both_ways(guest, accepted[0], peer)
    listener.close()


def moving(guest: Guest, world: World) -> None:
    """The guest goes to another worker's queue and back, with data under way each time."""
    tcp, peer = established(guest, world, 4)
    for pair in (1, 0):
        peer.send(DOWN[:20_000])
        tcp.send(UP[:5000])
        to_other(guest, tcp, pair)
    had = len(peer.inbox), len(tcp.received)
    guest.pump(
        lambda: (len(peer.inbox), len(tcp.received)) == (10_000, 40_000), 20, f"{tcp}, {had}"
    )
    assert bytes(peer.inbox) == 2 * UP[:5000] and bytes(tcp.received) == 2 * DOWN[:20_000]
    del peer.inbox[:], tcp.received[:]
    both_ways(guest, tcp, peer)


scenarios = pytest.mark.parametrize("scenario", [from_guest, from_host, moving])


def places(count: int, every: int) -> range:
    """One in `every` of so many places: others in each run."""
    return range(1 + random.randrange(every), count + 1, every)


def lived(scenario: Scenario, world: World, fate: Fate, noted: list[int], at: int) -> None:
    """Run the scenario with a death there."""
    with no_leftovers(), local_guests(world) as make:
        guest = make(**LOCAL)
        guest.drv.accepted = noted
        noted.clear()
        table = guest.drv.segment.address + guest.drv.segment.offsets.flow
        fate.span[:] = [table, table + FLOW.size * FLOWS_MAX]
        fate.arm(at)
        try:
            scenario(guest, world)
        except Lost:
            assert guest.drv.flow_count() == 0 and noted == [], "nothing knew of this socket"
        except AssertionError as error:
            raise AssertionError(f"death {at}, {fate.where}") from error
        finally:
            fate.armed = False


@scenarios
def test_after_a_system_call(
    world: World, calls: Fate, noted: list[int], scenario: Scenario
) -> None:
    lived(scenario, world, calls, noted, NEVER)
    for at in places(calls.count, EVERY):
        lived(scenario, world, calls, noted, at)


@scenarios
def test_between_accesses_to_the_flow_table(
    world: World, accesses: Fate, noted: list[int], scenario: Scenario
) -> None:
    """An entry is half written then, in every way in which it can be."""
    lived(scenario, world, accesses, noted, NEVER)
    for at in places(accesses.count, 97 * EVERY):
        lived(scenario, world, accesses, noted, at)
