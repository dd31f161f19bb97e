"""Checksum and segmentation offload for TCP: long frames where negotiated, and only there.

`Driver` refuses any GSO frame whose type was not negotiated, `packets.parse` any whose header
contradicts its frame; these tests make such frames fly.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from driver import (
    BASIC,
    CSUM,
    GUEST_CSUM,
    GUEST_TSO4,
    GUEST_TSO6,
    HOST_TSO4,
    HOST_TSO6,
    MQ,
    MRG_RXBUF,
)
from formats import all_formats, both_formats
from guest import Guest, random_bytes
from minitcp import established, exchange
from world import World

pytestmark = pytest.mark.passt_lacks("no TSO")
families = pytest.mark.parametrize("family", [4, 6])
TSO = CSUM | GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | HOST_TSO4 | HOST_TSO6


@families
@pytest.mark.parametrize(
    ("features", "rx"),
    [(BASIC, (4096,)), (BASIC, (65562,)), (BASIC, (10, 1516)), (BASIC & ~MRG_RXBUF, (65562,))],
    ids=["4K", "64K", "short-first", "not-mergeable"],
)
@all_formats
def test_both_ways(
    make_guest: Callable[..., Guest], world: World, family: int, features: int, rx: tuple[int, ...]
) -> None:
    """60 kB segments to the host in a frame each (HOST_TSO), GSO frames to the guest (GUEST_TSO),
    into receive buffers of any shape.
    """
    guest = make_guest(features=features | TSO, rx=rx)
    missing = TSO & ~guest.drv.offered
    assert not missing, f"feature bits {missing:#x} are not offered"
    tcp, peer = established(guest, world, family, tso=True)
    sizes: set[int] = set()
    guest.on_packet = lambda packet, pair: sizes.add(packet.header.gso_size)
    exchange(guest, tcp, peer, random_bytes(4_000_000, 1), random_bytes(4_000_000, 2))
    assert sizes - {0} and max(sizes) <= tcp.mss, f"GSO sizes {sizes} with an MSS of {tcp.mss}"


@families
def test_host_offloads_alone(make_guest: Callable[..., Guest], world: World, family: int) -> None:
    """A guest that took GUEST_CSUM but no GUEST_TSO gets no frame longer than its MSS."""
    guest = make_guest(features=BASIC | CSUM | GUEST_CSUM | HOST_TSO4 | HOST_TSO6 | MQ)
    tcp, peer = established(guest, world, family, tso=True)
    exchange(guest, tcp, peer, random_bytes(1_000_000, 1), random_bytes(1_000_000, 2))


@families
@both_formats
def test_under_loss(make_guest: Callable[..., Guest], world: World, family: int) -> None:
    """GSO frames lost both ways: what is sent again may be cut elsewhere, but the bytes are the
    same.
    """
    guest = make_guest(features=BASIC | TSO, rx=(4096,))
    tcp, peer = established(guest, world, family, tso=True)
    rng = random.Random(family)
    tcp.lose_rx = lambda packet: bool(packet.payload) and rng.random() < 0.05
    tcp.lose_tx = lambda seq, data: rng.random() < 0.03
    exchange(guest, tcp, peer, random_bytes(1_000_000, 1), random_bytes(1_000_000, 2), 40)
