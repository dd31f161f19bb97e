"""test_uml.py - User-Mode Linux through `vhostmq run`: another front-end, the fastest real driver.

Theory      UML speaks its own dialect of vhost-user (every message wants an answer, the call
            "eventfd" is a socket, rings are never stopped with GET_VRING_BASE), drives split rings
            of one pair, and runs at a speed where ring-full and back-pressure paths are taken.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from backends import Backend
from lab import PEER4, PEER6, Lab
from traffic import MIB, smoke, transfer

from benchmarks.guest.guests import Network, UmlGuest
from benchmarks.guest.prepare import Images

QUEUES = 1
PEERS = (PEER4, PEER6)

pytestmark = pytest.mark.passt_lacks("protocol feature BACKEND_REQ, without which UML has no irq")


@pytest.fixture(scope="module")
def guest(lab: Lab, images: Images, backend: Backend) -> Iterator[UmlGuest]:
    """The booted guest."""
    guest = UmlGuest(lab, images, backend.vhost_socket)
    guest.start()
    yield guest
    guest.close()


@pytest.fixture(scope="module")
def network(guest: UmlGuest) -> Network:
    """The guest's lease and addresses."""
    return guest.join_network()


def test_addresses(network: Network) -> None:
    """A lease with a name server, and a global IPv6 address."""
    assert network.address4 and network.address6
    assert network.dns == [PEER4]


@pytest.mark.usefixtures("network")
@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("peer", PEERS, ids=["ipv4", "ipv6"])
def test_transfers(guest: UmlGuest, direction: str, peer: str) -> None:
    """Four streams of 64 MiB, every SHA-256 equal at both ends."""
    transfer(guest, direction, peer, 64 * MIB, streams=4)


def test_front_end_killed(guest: UmlGuest) -> None:
    """The same process serves the next kernel."""
    guest.kill()
    guest.start()
    guest.join_network()
    smoke(guest, PEERS)
