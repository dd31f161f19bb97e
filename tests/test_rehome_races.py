"""What may happen between two accesses to a flow that moves: the heir adopts, its home dies, there
is no descriptor. Interpreted only: compiled code cannot be stopped there."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import pytest
from driver import BASIC, GUEST_CSUM, MQ
from guest import Guest, random_bytes
from inprocess import Died, no_descriptors
from minitcp import established, exchange
from test_rehome import HOME, OTHER, Make, elsewhere, fill_inbox, given, only_flow, settled
from world import World

from dataplane import breath, inherit, sockets
from dataplane.slow import errors
from flows import table
from shm import access
from shm.jit import COMPILED
from shm.layout import View
from shm.schema import FLOW

pytestmark = pytest.mark.skipif(
    COMPILED, reason="NOT TESTED here: between two accesses, NUMBA_DISABLE_JIT=1"
)


@pytest.fixture
def make(make_local: Make) -> Make:
    """Guests with two workers, a queue pair for each."""
    return partial(make_local, workers=2, pairs=2, features=BASIC | GUEST_CSUM | MQ)


@pytest.mark.parametrize("number", range(3))
def test_between_two_loads_of_the_former_home(
    make: Make, world: World, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """It still has the flow on its list, and the heir adopts it when the former home has just
    looked at one word of the entry: whatever that was, the flow is not its own."""
    guest = make()
    tcp, _ = established(guest, world, 4)
    loads = []

    class Looked:
        """The entry's words, the `number`-th of which is not followed by the next at once."""

        def __getattr__(self, name: str) -> Callable[[int], int]:
            def load(f: int) -> int:
                value = int(getattr(access.flow, name)(f))
                loads.append(name)
                if len(loads) == number + 1:
                    guest.drv.breathe(OTHER)
                return value

            return load

    with given(guest, tcp):
        (index,) = guest.drv.flow_indexes()
        address = guest.drv.workers[HOME].context.address
        with monkeypatch.context() as patch:
            patch.setattr(breath, "flow", Looked())
            assert not breath._is_ours(address, guest.drv.flow_address(index)), loads


def adopts_after(
    guest: Guest, patch: pytest.MonkeyPatch, module: object, name: str, number: int
) -> list[str]:
    """The heir adopts when `number` words of the flow have been read by a module's `name`, through
    which it looks at entries; which were."""
    loads: list[str] = []
    (index,) = guest.drv.flow_indexes()

    def loaded(word: str) -> None:
        loads.append(word)
        if len(loads) == number:
            guest.drv._breathe(OTHER, 0)

    class Words:
        """The accessors."""

        def __getattr__(self, word: str) -> Callable[..., int]:
            def load(f: int, *value: int) -> int:
                found = getattr(access.flow, word)(f, *value)
                if f == guest.drv.flow_address(index) and not value:
                    loaded(word)
                return int(found or 0)

            return load if callable(getattr(access.flow, word)) else getattr(access.flow, word)

    class Entry(View):
        def __getitem__(self, word: str) -> int:
            found = super().__getitem__(word)
            if self.struct is FLOW:
                loaded(word)
            return found

    patch.setattr(module, name, Words() if name == "flow" else Entry)
    return loads


@pytest.mark.parametrize("number", [1, 2])
def test_between_two_loads_of_a_successor(
    make: Make, world: World, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The former home has died, and who takes its place looks for flows of its own."""
    guest = make()
    tcp, peer = established(guest, world, 4)
    with given(guest, tcp):
        inherited = guest.drv.counter("inherited_flows", HOME)
        with monkeypatch.context() as patch:
            loads = adopts_after(guest, patch, inherit, "flow", number)
            world.run(guest.drv.succeed, HOME)
        assert guest.drv.counter("inherited_flows", HOME) == inherited, loads
        guest.drv.settle()
        assert (only_flow(guest)["home"], guest.drv.flow_count()) == (OTHER, 1)
    exchange(guest, tcp, peer, random_bytes(5000), random_bytes(5000))


@pytest.mark.parametrize("number", [1, 2])
def test_between_two_loads_of_plain_python(
    make: Make, world: World, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A successor whose keeper has died, too, forgets the sockets that were lost with it. The heir
    has its own."""
    guest = make()
    tcp, peer = established(guest, world, 4)
    with given(guest, tcp) as flow:
        with monkeypatch.context() as patch:
            loads = adopts_after(guest, patch, table, "View", number)
            table.lose_descriptors(guest.drv.segment.buffer, guest.drv.segment.offsets, HOME)
        guest.drv.settle()
        assert flow["home"] == OTHER and flow["fd"] >= 0, loads
    exchange(guest, tcp, peer, random_bytes(5000), random_bytes(5000))


@pytest.mark.parametrize("number", [1, 2])
def test_an_error_of_a_flow_that_goes(
    make: Make, world: World, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The heir's descriptor is a number that means nothing here."""
    guest = make()
    tcp, _ = established(guest, world, 4)
    with given(guest, tcp):
        one, asked = guest.drv.workers[HOME], []
        one.context.scratch("errors")[:4] = guest.drv.flow_indexes()[0].to_bytes(4, "little")
        one.context.view["error_count"] = 1
        with monkeypatch.context() as patch:
            adopts_after(guest, patch, table, "View", number)
            patch.setattr(errors, "replies", lambda *arguments: asked.append(arguments) or [])
            world.run(one._error_queues)
        assert not asked
        one.context.view["error_count"] = 0
        guest.drv.settle()


def test_an_inbox_without_room_when_a_worker_dies(
    make: Make, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was about to send the socket. Its successor does, once there is room."""
    guest = make()
    tcp, peer = established(guest, world, 4)
    elsewhere(guest, tcp)
    tcp.send_ack()
    guest.drv.breathe(OTHER)
    fill_inbox(guest, OTHER)
    real, died = sockets.pass_on, list[int]()

    def die(*arguments: int) -> int:
        if died:
            return int(real(*arguments))
        died.append(1)
        raise Died("before sendmsg")

    monkeypatch.setattr(sockets, "pass_on", die)
    guest.drv.breathe(HOME)
    flow = only_flow(guest)
    assert (flow["home"], flow["heir"]) == (HOME, OTHER + 1)
    for _ in range(3):
        guest.drv.breathe(HOME)
    assert guest.drv.counter("parting", HOME), "there is no room yet"
    guest.drv.settle()
    assert (flow["home"], flow["heir"], guest.drv.counter("parting", HOME)) == (OTHER, 0, 0)
    exchange(guest, tcp, peer, random_bytes(9000), random_bytes(9000, 2))


def test_a_frame_of_a_flow_that_could_not_be_adopted(
    make: Make, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A datagram, its flow on its way here, and no descriptor to be had: the flow has ended, and
    another cannot begin. Nothing is written to an entry that may be somebody else's."""
    guest = make()
    host = guest.with_host(world.udp(socket.AF_INET))
    for pair in (HOME, OTHER):
        guest.send_udp(guest.gw4, 6000, host.port, b"a", pair=pair)
        guest.drv.settle()
    settled(guest)
    guest.send_udp(guest.gw4, 6000, host.port, b"b", pair=OTHER)
    guest.drv.breathe(OTHER)
    (index,) = guest.drv.flow_indexes()
    real, taken = breath._rx_kicks, list[int]()

    def given_just_then(w: int) -> None:
        if not taken and w == guest.drv.workers[OTHER].context.address:
            guest.drv._breathe(HOME, 0)
            assert guest.drv.flow(index)["heir"] == OTHER + 1
            with suppress(OSError):
                while True:
                    taken.append(os.dup(0))
        real(w)

    monkeypatch.setattr(breath, "_rx_kicks", given_just_then)
    guest.send_udp(guest.gw4, 6000, host.port, b"c", pair=OTHER)
    with no_descriptors(world):
        guest.drv.breathe(OTHER)
    for fd in taken:
        os.close(fd)
    assert taken and not guest.drv.flow_indexes()
    assert [guest.drv.drops(why, 2 * OTHER + 1) for why in ("send_failed", "no_socket")] == [0, 1]
    guest.send_udp(guest.gw4, 6000, host.port, b"d", pair=OTHER)
    guest.pump(lambda: host.inbox and host.inbox[-1][0] == b"d", what="the next one")
