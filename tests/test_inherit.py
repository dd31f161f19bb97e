"""A worker dies at any moment: after any system call, between any two accesses to shared memory.
The one in its place goes on: every stream arrives whole, whichever end opened it, and every flow
ends.

Compiled code cannot be stopped at a chosen place; interpreted it can. Here a death is an exception
that leaves everything where it was: the test's process keeps the sockets, as a keeper does. The
successor comes at once, or when the others have gone on.

Of a hand-over every system call is somebody's last in turn; of the rest one in so many is
(VHOSTMQ_EVERY), others in each run unless VHOSTMQ_SEED says which. A failure says how to have that
very death again (VHOSTMQ_DEATH).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import socket
import struct
from collections.abc import Callable, Iterator

import pytest
from driver import BASIC, GUEST_CSUM, MQ
from guest import Guest, random_bytes
from inprocess import SYSTEM_CALLS, Died, local_guests, no_leftovers, spare_sockets
from minitcp import Tcp, established, listen
from test_rehome import only_flow, settled, to_other
from world import Peer, World

from dataplane import sockets
from shm import libc, mem
from shm.jit import COMPILED
from shm.schema import FLOW, FLOWS_MAX

pytestmark = pytest.mark.skipif(
    COMPILED, reason="NOT TESTED here: a death at a chosen place, which needs NUMBA_DISABLE_JIT=1"
)
UP, DOWN = random_bytes(9000, 1), random_bytes(150_000, 2)
NEVER = -1
EVERY = int(os.environ.get("VHOSTMQ_EVERY", "15"))  # of the places, one in so many is tried
SEED = int(os.environ.get("VHOSTMQ_SEED") or random.randrange(1 << 32))
DEATH = int(os.environ.get("VHOSTMQ_DEATH", "0"))  # the only place, if any
LOCAL = {"workers": 2, "pairs": 2, "features": BASIC | GUEST_CSUM | MQ}
Make = Callable[..., Guest]
Scenario = Callable[[Guest, World, "Fate"], None]


class Lost(Exception):
    """A connection ended before it was known."""


class Fate:
    """Counts what workers do once it is armed, and ends one at the number it is told."""

    def __init__(self) -> None:
        self.at, self.count, self.where = NEVER, 0, "nowhere"
        self.span = [0, 0]
        self._armed = False

    @contextlib.contextmanager
    def armed(self) -> Iterator[None]:
        """Meanwhile."""
        self.count, self.where, self._armed = 0, "nowhere", True
        try:
            yield
        finally:
            self._armed = False

    def step(self, where: Callable[[], str]) -> None:
        if not self._armed:
            return
        self.count += 1
        if self.count == self.at:
            self.where = where()
            raise Died(self.where)


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The sockets that workers have opened, accepted or been given, and not closed."""
    found: set[int] = set()

    def noting(call: Callable[..., int], fd_of: Callable[..., int]) -> Callable[..., int]:
        def noted(*arguments: int) -> int:
            result = call(*arguments)
            found.update(fd for fd in [fd_of(result, *arguments)] if fd >= 0)
            return result

        return noted

    def forgetting(call: Callable[[int], int]) -> Callable[[int], int]:
        def forgotten(fd: int) -> int:
            found.discard(fd)
            return call(fd)

        return forgotten

    for name in ("accept4", "socket"):
        monkeypatch.setattr(libc, name, noting(getattr(libc, name), lambda fd, *_: fd))
    monkeypatch.setattr(libc, "recvmsg", noting(libc.recvmsg, given))
    for module in (libc, os):
        monkeypatch.setattr(module, "close", forgetting(module.close))
    return found


def given(result: int, _: int, message: int, flags: int) -> int:
    """The descriptor that came with a message, or -1."""
    control, size = mem.u64(message + 32), mem.u64(message + 40)
    if result < 0 or not control or size < sockets.CMSG_FD_BYTES:
        return -1
    level, kind, fd = struct.unpack("<iii", ctypes.string_at(control + 8, 12))
    return fd if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS) else -1


@pytest.fixture
def calls(noted: set[int], monkeypatch: pytest.MonkeyPatch) -> Fate:
    """Ends a worker after a system call that it has not seen the result of."""
    made = Fate()

    def counted(name: str, call: Callable[..., int]) -> Callable[..., int]:
        def after(*arguments: int) -> int:
            result = call(*arguments)
            made.step(lambda: f"after {name}{arguments} = {result}")
            return result

        return after

    for name in SYSTEM_CALLS:
        monkeypatch.setattr(libc, name, counted(name, getattr(libc, name)))
    monkeypatch.setattr(socket, "send_fds", counted("send_fds", socket.send_fds))
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
    to_the_end(guest, tcp, peer, UP, DOWN)


def to_the_end(guest: Guest, tcp: Tcp, peer: Peer, up: bytes, down: bytes) -> None:
    """What has been sent arrives, both ends close, nothing is left of the flow."""
    guest.pump(
        lambda: len(peer.inbox) >= len(up) and len(tcp.received) >= len(down), 20, f"data: {tcp}"
    )
    tcp.close()
    peer.shutdown()
    guest.pump(lambda: tcp.eof and peer.eof, 20, f"the end of both streams: {tcp}")
    for _ in range(200):
        if not guest.drv.flow_indexes():
            break
        guest.pump(timeout=0.02)  # the last step shows in no frame
    assert not guest.drv.flow_indexes(), tcp
    assert bytes(peer.inbox) == up and bytes(tcp.received) == down
    tcp.check()
    assert guest.drv.flow_count() == 0


def from_guest(guest: Guest, world: World, fate: Fate) -> None:
    """The guest opens the connection."""
    with fate.armed():
        tcp, peer = established(guest, world, 4)
        both_ways(guest, tcp, peer)


def from_host(guest: Guest, world: World, fate: Fate) -> None:
    """The host opens the connection."""
    with fate.armed():
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


def moving(guest: Guest, world: World, fate: Fate) -> None:
    """The guest goes to another worker's queue and back, with data under way each time."""
    with fate.armed():
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


def handing_over(guest: Guest, world: World, fate: Fate) -> None:
    """The home gives, the other worker adopts, with data under way both ways; deaths only then."""
    tcp, peer = established(guest, world, 4)
    peer.send(DOWN[:10_000])
    tcp.send(UP[:3000])
    tcp.pair = 1
    tcp.send_ack()
    guest.drv.settle()
    settled(guest)
    peer.send(DOWN[10_000:20_000])
    tcp.send(UP[3000:5000])
    with fate.armed():
        guest.drv.settle()
    flow = only_flow(guest)
    assert (flow["home"], flow["heir"], flow["moves"]) == (1, 0, 1)
    to_the_end(guest, tcp, peer, UP[:5000], DOWN[:20_000])


def one_in(times: int) -> int:
    """Of how many places one is tried: EVERY, so many times as many in a short run."""
    return 1 if EVERY == 1 else times * EVERY


def places(count: int, every: int) -> list[int]:
    """One in `every` of so many places, or the one that is asked for."""
    if DEATH:
        return [DEATH]
    return list(range(1 + random.Random(SEED).randrange(every), count + 1, every))


def lived(
    scenario: Scenario, world: World, fate: Fate, noted: set[int], at: int, missed: int = 0
) -> None:
    """Run the scenario with a death there, of a worker that misses so many breaths."""
    test = os.environ["PYTEST_CURRENT_TEST"].split(" ")[0]
    again = f"VHOSTMQ_DEATH={at} NUMBA_DISABLE_JIT=1 python -m pytest '{test}'"
    with no_leftovers(), local_guests(world) as make:
        guest = make(**LOCAL)
        guest.drv.sockets = noted
        guest.drv.absence = lambda: missed
        table = guest.drv.segment.address + guest.drv.segment.offsets.flow
        fate.span[:] = [table, table + FLOW.size * FLOWS_MAX]
        fate.at = at
        try:
            with contextlib.suppress(Lost):
                scenario(guest, world, fate)
            guest.drv.settle()  # a death at the very end: until another is in its place
            spares = {fd for worker in guest.drv.workers for fd in spare_sockets(worker)}
            assert guest.drv.flow_count() == 0 and noted <= spares, "nothing knows of these sockets"
        except Exception as error:
            raise AssertionError(f"{fate.where}; again: {again} (seed {SEED})") from error
    noted.clear()


def lived_often(
    scenario: Scenario, world: World, fate: Fate, noted: set[int], every: int, missed: int
) -> None:
    """Run it without a death, which tells how many places there are, then with one in turn."""
    lived(scenario, world, fate, noted, NEVER)
    for at in places(fate.count, every):
        lived(scenario, world, fate, noted, at, missed)


absences = pytest.mark.parametrize("missed", [0, 2], ids=["succeeded-at-once", "others-go-on"])


@absences
def test_after_every_system_call_of_a_hand_over(
    world: World, calls: Fate, noted: set[int], missed: int
) -> None:
    lived(handing_over, world, calls, noted, NEVER)
    assert calls.count > 20, "a breath of each, the message, the registration"
    lived_often(handing_over, world, calls, noted, 1, missed)


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
    lived_often(scenario, world, accesses, noted, 97 * one_in(2), missed)
