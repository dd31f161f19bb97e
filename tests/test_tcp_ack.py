"""Acknowledgements to the guest: when they come, and that they put nothing off.

The worker lives in the test's process (inprocess.py), so a breath is over when the test says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from guest import Guest, random_bytes
from minitcp import Tcp, established
from world import Peer, World

from shm.layout import View


def now_ms() -> int:
    return time.monotonic_ns() // 1_000_000


class Talk:
    """A guest's connection, and what it hears of what it sends."""

    def __init__(self, guest: Guest, tcp: Tcp, peer: Peer) -> None:
        self.guest, self.tcp, self.peer = guest, tcp, peer

    @property
    def flow(self) -> View:
        (index,) = self.guest.drv.flow_indexes()
        return self.guest.drv.flow(index)

    def breathe(self) -> None:
        """Let the worker do all there is, and the guest's stack look at what came."""
        self.guest.drv.settle()
        self.guest.pump(timeout=0)

    def say(self, data: bytes) -> int:
        """Send; how many segments came back."""
        before = len(self.tcp.segments)
        self.tcp.send(data)
        self.breathe()
        return len(self.tcp.segments) - before

    def arrive(self) -> None:
        """The peer sends what the guest will not acknowledge, and the worker has seen it."""
        self.peer.send(b"this")
        self.guest.pump(timeout=0.05)
        self.guest.drv.settle()


Begin = Callable[..., Talk]


@pytest.fixture
def begin(make_local: Callable[..., Guest], world: World) -> Begin:
    """Begins a connection on a worker in this process."""

    def talk(**options: object) -> Talk:
        guest = make_local(**options)
        return Talk(guest, *established(guest, world, 4))

    return talk


@pytest.mark.parametrize("size", [1, 1460, 3000, 40_000])
def test_one_for_all_of_a_breath(begin: Begin, size: int) -> None:
    """At once, whatever its size, and one however many segments it takes."""
    talk = begin()
    assert talk.say(random_bytes(size)) == 1 and talk.tcp.all_acked


def test_a_gap_that_is_filled_in_part_is_told_at_once(begin: Begin) -> None:
    """A guest that recovers waits for it to send on (RFC 5681 4.2)."""
    talk = begin()
    tcp, seq = talk.tcp, talk.tcp.nxt
    tcp.segment(seq + 200, b"c" * 100)
    talk.breathe()
    assert talk.flow["held"]
    before = len(tcp.segments)
    tcp.segment(seq, b"a" * 100)
    tcp.nxt = seq + 300
    talk.breathe()
    assert len(tcp.segments) - before == 1 and tcp.una == seq + 100


def test_a_closed_window_is_probed_in_its_own_time(begin: Begin) -> None:
    """The guest takes nothing, but goes on sending: the probe's deadline stays."""
    talk = begin()
    talk.tcp.advertise(0)
    talk.breathe()
    talk.arrive()
    due_ms = talk.flow["deadline_ms"]
    assert due_ms and talk.say(b"?") == 1
    assert talk.flow["deadline_ms"] == due_ms


def test_what_is_in_flight_keeps_its_deadline(begin: Begin) -> None:
    """The guest has not acknowledged what was sent to it: that it sends itself puts nothing off."""
    talk = begin()
    talk.tcp.lose_rx = lambda packet: bool(packet.payload)
    talk.arrive()
    due_ms = talk.flow["deadline_ms"]
    assert 0 < due_ms <= now_ms() + 1000
    for _ in range(3):
        assert talk.say(b"?") == 1
        assert talk.flow["deadline_ms"] == due_ms
    talk.tcp.lose_rx = lambda packet: False
    had = len(talk.tcp.received)
    talk.guest.pump(lambda: len(talk.tcp.received) == had + len(b"this"), what="it again")


def test_without_receive_buffers_it_goes_when_there_are_some(begin: Begin) -> None:
    """And meanwhile the worker sleeps: nothing is tried again by the clock."""
    talk = begin(rx=(1526,), num=16)
    drv = talk.guest.drv
    drv.rx_limit[0] = 0
    for _ in range(32):  # until the device has used up the buffers that are out
        talk.say(random_bytes(1460))
        if not talk.tcp.all_acked:
            break
    assert not talk.tcp.all_acked
    assert drv.breaths_in(1.0) <= 2
    drv.rx_limit[0] = 16
    drv.fill(0)
    talk.guest.pump(lambda: talk.tcp.all_acked, what="the acknowledgement", timeout=2)
