"""Receive rings whose buffers are there but of no use: nothing may spin, nothing may hang.

A frame waits for buffers. What the guest offers is too little for it, or empty, or cannot be used.
Until the guest adds something the worker has nothing to do; when it has added enough, the frame
arrives.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest
from backend import Backend
from driver import BASIC, EVENT_IDX, GUEST_CSUM, MQ
from formats import both_formats
from guest import Guest, holds, random_bytes
from minitcp import Tcp, established
from packets import ACK, SYN
from vring import Segment
from world import World

FLAGS = BASIC | GUEST_CSUM
AT_ONCE_S = 1  # no timer's doing
PLAIN = 1 << 32 | 1 << 30 | GUEST_CSUM
MERGEABLE = {"flags": FLAGS, "event-idx": FLAGS | EVENT_IDX}

Post = Callable[[Guest], None]


def post(guest: Guest, *lengths: int) -> None:
    """One receive buffer of each length, in memory that nothing else uses."""
    queue = guest.drv.rx(0)
    for length in lengths:
        gpa = queue.ring.slot(queue.ring.free[0])
        queue.ring.add([Segment(gpa, length, True)])
    guest.drv.publish(queue)


def post_unusable(guest: Guest) -> None:
    """A small buffer and behind it one the device may not write to."""
    queue = guest.drv.rx(0)
    for write in (True, False):
        gpa = queue.ring.slot(queue.ring.free[0])
        queue.ring.add([Segment(gpa, 20, write)])
    guest.drv.publish(queue)


def empty_ring(guest: Guest) -> None:
    """From now on the pair has the buffers that a test posts, and no others."""
    guest.drv.refill = False
    guest.drv.useless_buffers = True
    guest.drv.stop_ring(0)
    ring = guest.drv.rx(0).ring
    ring.reset(ring.base)
    guest.drv.start_ring(guest.drv.rx(0))
    guest.drv.enable(0, True)


OFFERS: dict[str, Post] = {
    "nothing": lambda guest: None,
    "too little": lambda guest: post(guest, 20, 20),
    "one byte each": lambda guest: post(guest, *[1] * 40),
    "empty": lambda guest: post(guest, 0, 0, 0),
    "unusable": post_unusable,
    "small, empty": lambda guest: post(guest, 20, 0),
    "little by little": lambda guest: [post(guest, 1) for _ in range(30)] and None,
}


@pytest.mark.passt_lacks("ends at such buffers")
@pytest.mark.parametrize("features", MERGEABLE)
@pytest.mark.parametrize("offer", OFFERS)
@both_formats
def test_stream_waits_for_enough(
    backend: Backend, make_guest: Callable[..., Guest], world: World, offer: str, features: str
) -> None:
    """TCP data, too few bytes of buffers: no processor time, then all of it."""
    guest = make_guest(features=MERGEABLE[features] & ~MQ)
    tcp, peer = established(guest, world, 4)
    guest.pump(timeout=0.05)
    empty_ring(guest)
    stream = random_bytes(5000)
    peer.send(stream)
    OFFERS[offer](guest)
    guest.pump(timeout=0.1)
    load = backend.load(0.7)
    assert load < 0.15, f"{load:.0%} of a processor while the guest does nothing"
    post(guest, *[1526] * 8)
    guest.pump(lambda: len(tcp.received) == len(stream), 4, "the stream")
    assert tcp.received == stream


@pytest.mark.passt_lacks("ends at such buffers")
@both_formats
def test_small_buffers_without_mergeable(
    backend: Backend, make_guest: Callable[..., Guest], world: World
) -> None:
    """Each is given back and the next one tried: the first that suffices is used."""
    guest = make_guest(features=PLAIN)
    tcp, peer = established(guest, world, 4)
    guest.pump(timeout=0.05)
    empty_ring(guest)
    peer.send(b"data")
    post(guest, 10, 11, 60, 1526, 1526)
    guest.pump(lambda: tcp.received == b"data", 2, "the data in the first buffer that does")
    load = backend.load(0.5)
    assert load < 0.15, f"{load:.0%} of a processor"


@pytest.mark.passt_lacks("ends at such buffers")
@both_formats
def test_connection_request_waits(
    backend: Backend, make_guest: Callable[..., Guest], world: World
) -> None:
    """Not a stream but one segment, the answer to a SYN: it comes when there is room."""
    guest = make_guest(features=FLAGS & ~MQ)
    listener = guest.with_host(world.listen(socket.AF_INET))
    empty_ring(guest)
    post(guest, 20)
    tcp = Tcp(guest, guest.gw4, listener.port)
    tcp.retransmit = False
    tcp.open()
    guest.pump(timeout=0.7)
    load = backend.load(0.5)  # the second try, after a second, finds no room either
    assert load < 0.15, f"{load:.0%} of a processor"
    post(guest, *[1526] * 8)
    guest.pump(lambda: tcp.state == "established", AT_ONCE_S, "the connection")
    assert [segment.flags for segment in tcp.segments] == [SYN | ACK]
    guest.pump(holds(listener.accepted, 1), what="the connection at the host")
