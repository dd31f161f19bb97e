"""How far a peer is, and its receive window (dataplane/far_peer.py).

The worker lives in the test's process (inprocess.py). A peer that really is far away, and what it
gains, is in tests/system/test_wan.py: here everything is on loopback, so near.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable

import pytest
from compiled import Leaves
from guest import Guest, random_bytes
from minitcp import established, exchange
from world import World

from dataplane import lifecycle
from dataplane.far_peer import BULK_BYTES, FAR_RTT_US, FAR_WINDOW_BYTES
from shm.layout import View

far_peer = Leaves("dataplane.far_peer")
families = pytest.mark.parametrize("family", [4, 6])


@pytest.fixture
def guest(make_local: Callable[..., Guest]) -> Guest:
    return make_local()


def only_flow(guest: Guest) -> tuple[View, int, int]:
    """The one flow there is: the entry, its address, and the worker's."""
    (index,) = guest.drv.flow_indexes()
    w = guest.drv.workers[0].context.address
    return guest.drv.flow(index), guest.drv.flow_address(index), w


def option(flow: View, name: int) -> int:
    with socket.socket(fileno=os.dup(flow["fd"])) as sock:
        return sock.getsockopt(socket.SOL_SOCKET, name)


@families
def test_the_round_trip_is_the_kernels(guest: Guest, world: World, family: int) -> None:
    established(guest, world, family)
    flow, f, w = only_flow(guest)
    with socket.socket(fileno=os.dup(flow["fd"])) as sock:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    (rtt_us,) = struct.unpack_from("I", info, 68)
    assert 0 < rtt_us < FAR_RTT_US
    assert far_peer.rtt_us(w, f) == rtt_us


@families
def test_a_wide_window_leaves_the_flow_as_it_was(guest: Guest, world: World, family: int) -> None:
    """The buffer takes the window, one byte is still worth an event, and all data comes."""
    tcp, peer = established(guest, world, family)
    flow, f, w = only_flow(guest)
    before = option(flow, socket.SO_RCVBUF)
    far_peer.widen(w, f)
    assert option(flow, socket.SO_RCVBUF) >= FAR_WINDOW_BYTES > before
    assert option(flow, socket.SO_RCVLOWAT) == 1
    for size in (1, 300_000, 1):
        exchange(guest, tcp, peer, b"", random_bytes(size))


def test_the_kernel_still_sizes_a_widened_buffer(guest: Guest, world: World) -> None:
    """SO_RCVBUF would fix it for good (SOCK_RCVBUF_LOCK): a later wish would have no effect."""
    established(guest, world, 4)
    flow, f, w = only_flow(guest)
    far_peer.widen(w, f)
    once = option(flow, socket.SO_RCVBUF)
    with socket.socket(fileno=os.dup(flow["fd"])) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 2 * FAR_WINDOW_BYTES)
    assert option(flow, socket.SO_RCVBUF) > once


def test_near_flows_keep_their_window_and_are_asked_once(guest: Guest, world: World) -> None:
    tcp, peer = established(guest, world, 4)
    flow, _, _ = only_flow(guest)
    before = option(flow, socket.SO_RCVBUF)
    exchange(guest, tcp, peer, b"", random_bytes(BULK_BYTES - 1))
    assert not flow["flags"] & lifecycle.RTT_KNOWN, "asked for a flow that only talks"
    exchange(guest, tcp, peer, b"", random_bytes(BULK_BYTES))
    assert flow["flags"] & lifecycle.RTT_KNOWN
    assert option(flow, socket.SO_RCVBUF) == before
