"""Sockets kept ready for connections to come, breath by breath (inprocess.py)."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import pytest
from guest import Guest
from inprocess import no_descriptors, spare_sockets
from minitcp import Tcp, established, exchange
from world import World

from dataplane.context import SPARES_MAX

AF = {4: socket.AF_INET, 6: socket.AF_INET6}
SO_PEEK_OFF = 42
families = pytest.mark.parametrize("family", [4, 6])


@pytest.fixture
def guest(make_local: Callable[..., Guest]) -> Guest:
    """A guest whose worker breathes when the test says so."""
    return make_local()


def ready(guest: Guest) -> list[int]:
    return spare_sockets(guest.drv.workers[0])


def settled(guest: Guest) -> list[int]:
    """What is ready after as many breaths as it could take."""
    for _ in range(2 * SPARES_MAX + 2):
        guest.drv.breathe()
    return ready(guest)


@families
def test_ready_after_the_first_connection(guest: Guest, world: World, family: int) -> None:
    """None before anybody connects; then SPARES_MAX of that family, no more, as connections need
    them; and they serve."""
    assert settled(guest) == []
    exchange(guest, *established(guest, world, family), b"one", b"two")
    first = settled(guest)
    assert len(set(first)) == SPARES_MAX
    for fd in first:
        with socket.socket(fileno=os.dup(fd)) as sock:
            assert sock.family == AF[family] and sock.type == socket.SOCK_STREAM
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE) == 1
        assert not os.get_blocking(fd) and not os.get_inheritable(fd)
    exchange(guest, *established(guest, world, family), b"one", b"two")
    assert first[-1] in {flow["fd"] for flow in guest.drv.flows()}, "the socket that was ready"
    assert len(settled(guest)) == SPARES_MAX


@families
def test_more_connections_than_are_ready(guest: Guest, world: World, family: int) -> None:
    """Those opened at once are as good."""
    exchange(guest, *established(guest, world, family), b"one", b"two")
    settled(guest)
    listener = world.listen(AF[family])
    far = guest.addresses(family)[1]
    streams = [Tcp(guest, far, listener.port).open() for _ in range(SPARES_MAX + 5)]
    guest.pump(lambda: all(tcp.state == "established" for tcp in streams), what="connections")
    listener.step()
    peers = [guest.with_host(sock) for sock in listener.accepted]
    for number, tcp in enumerate(streams):
        tcp.send(b"stream %d" % number)
    guest.pump(lambda: all(peer.inbox for peer in peers), what="what each sent")
    assert {bytes(peer.inbox) for peer in peers} == {
        b"stream %d" % number for number in range(len(streams))
    }
    listener.close()


@families
def test_without_descriptors(guest: Guest, world: World, family: int) -> None:
    """What is ready is used up; nothing more is tried until the next connection."""
    exchange(guest, *established(guest, world, family), b"one", b"two")
    with no_descriptors(world):
        before = settled(guest)
        assert len(before) < SPARES_MAX
    assert settled(guest) == before, "it has not given up"
    exchange(guest, *established(guest, world, family), b"one", b"two")
    assert len(settled(guest)) == SPARES_MAX
