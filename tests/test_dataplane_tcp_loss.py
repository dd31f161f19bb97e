"""TCP when something is lost, late, out of order, or does not fit: retransmission both ways, and
windows.

A virtqueue loses nothing by itself, but receive buffers run out, guests drop, and acknowledgements
of ours may be lost: whatever a test drops here, the streams must come through whole, and soon.
"Soon" is a bound on the longest silence, so that a stall that some timer ends does not pass for
working.
"""

from __future__ import annotations

import itertools
import random
import socket
import time
from collections.abc import Callable

import pytest
from backend import Backend
from guest import Guest, holds, random_bytes
from minitcp import Tcp, established, exchange
from packets import ACK, FIN, PSH, SYN, Packet
from world import Peer, World

AF = {4: socket.AF_INET, 6: socket.AF_INET6}
families = pytest.mark.parametrize("family", [4, 6])


# --- the guest loses what we send ---------------------------------------------------------------


@families
def test_unacknowledged_data_is_sent_again(guest: Guest, world: World, family: int) -> None:
    """A guest that acknowledges nothing gets the same bytes again, and again later, and then all
    is well.
    """
    tcp, peer = established(guest, world, family)
    tcp.auto_ack = False
    peer.send(random_bytes(3000))
    guest.pump(lambda: len(tcp.received) == 3000, what="the data")
    guest.pump(lambda: tcp.repeated >= 1, 4, "the data again")
    first = time.monotonic()
    tcp.repeated = 0
    guest.pump(lambda: tcp.repeated >= 1, 8, "the data a third time")
    assert time.monotonic() - first > 0.3, "the timer does not back off"
    tcp.auto_ack = True
    tcp.send_ack()
    exchange(guest, tcp, peer, b"well", b"again")


@families
def test_scattered_loss(guest: Guest, world: World, family: int) -> None:
    """Every twentieth segment is lost on its way to the guest: duplicate ACKs bring it back
    quickly.
    """
    tcp, peer = established(guest, world, family)
    rng = random.Random(family)
    tcp.lose_rx = lambda packet: bool(packet.payload) and rng.random() < 0.05
    start = time.monotonic()
    exchange(guest, tcp, peer, b"", random_bytes(1_000_000), 40)
    took = time.monotonic() - start
    assert took < 20, f"{took:.1f} s for one MB with 5 % loss"


@pytest.mark.passt_defect("answers a repeated SYN with SYNs of other numbers")
@families
def test_lost_syn_ack(guest: Guest, world: World, family: int) -> None:
    """The guest misses the SYN,ACK twice and repeats its SYN: the same answer comes again."""
    listener = guest.with_host(world.listen(AF[family]))
    tcp = Tcp(guest, guest.addresses(family)[1], listener.port)
    answers: list[Packet] = []

    def lose(packet: Packet) -> bool:
        if packet.flags & SYN:
            answers.append(packet)
        return len(answers) <= 2

    tcp.lose_rx = lose
    tcp.connect(8)
    assert len({(packet.seq, packet.ack, packet.mss) for packet in answers}) == 1
    guest.pump(holds(listener.accepted, 1), what="the connection at the host")
    exchange(guest, tcp, guest.with_host(listener.accepted[0]), b"at", b"last")


@families
def test_tail_loss(guest: Guest, world: World, family: int) -> None:
    """The very last segment is lost, so no duplicate ACK can tell: the timer must."""
    tcp, peer = established(guest, world, family)
    exchange(guest, tcp, peer, b"", b"first")
    dropped: list[Packet] = []

    def lose(packet: Packet) -> bool:
        if packet.payload and not dropped:
            dropped.append(packet)
            return True
        return False

    tcp.lose_rx = lose
    exchange(guest, tcp, peer, b"", b"last", 3)
    assert dropped


@families
def test_whole_flight_lost(guest: Guest, world: World, family: int) -> None:
    """Everything in flight is lost at once, twice."""
    tcp, peer = established(guest, world, family, window=100_000)
    for seed in (1, 2):
        tcp.lose_rx = until(time.monotonic() + 0.3)
        exchange(guest, tcp, peer, b"", random_bytes(300_000, seed), 10)


def until(moment: float) -> Callable[[Packet], bool]:
    """Lose everything before `moment`."""
    return lambda packet: time.monotonic() < moment


@families
def test_acknowledgement_in_the_middle_of_a_segment(
    guest: Guest, world: World, family: int
) -> None:
    """An ACK need not fall on a segment border: the rest is sent again from exactly there."""
    tcp, peer = established(guest, world, family)
    tcp.auto_ack = False
    peer.send(random_bytes(1000))
    guest.pump(lambda: len(tcp.received) == 1000, what="the data")
    tcp.segment(tcp.nxt, ack=1 + 333)
    tcp.segments.clear()
    guest.pump(lambda: any(p.payload for p in tcp.segments), 4, "the rest again")
    again = next(p for p in tcp.segments if p.payload)
    assert (again.seq - tcp.irs) % (1 << 32) == 334 and len(again.payload) == 667
    tcp.auto_ack = True
    tcp.send_ack()
    exchange(guest, tcp, peer, b"", b"more")


@pytest.mark.passt_defect("believes acknowledgements of bytes never sent")
@families
def test_old_and_future_acknowledgements(guest: Guest, world: World, family: int) -> None:
    """ACKs of long ago and of bytes never sent are not believed."""
    tcp, peer = established(guest, world, family)
    exchange(guest, tcp, peer, b"", random_bytes(50_000, 1))
    for ack in (1, tcp.rcv_nxt - 40_000, tcp.rcv_nxt + 1, tcp.rcv_nxt + 1_000_000):
        tcp.segment(tcp.nxt, ack=ack)
    exchange(guest, tcp, peer, b"up", random_bytes(50_000, 2))


# --- the guest's window -------------------------------------------------------------------------


@families
def test_zero_window_and_reopening(guest: Guest, world: World, family: int) -> None:
    """A guest whose application stops reading: data stops at the window's edge, and goes on when
    it opens.
    """
    tcp, peer = established(guest, world, family, window=60_000, wscale=0)
    tcp.autoread = False
    stream = random_bytes(400_000)
    peer.send(stream)
    got = b""
    for _ in range(4):
        guest.pump(lambda: len(tcp.inbox) == 60_000, 5, "a full window")
        guest.pump(timeout=0.3)
        assert len(tcp.inbox) <= 60_001, "data beyond a window of zero"
        got += tcp.read()
        tcp.send_ack()
    tcp.autoread = True
    got += tcp.read()
    tcp.send_ack()
    guest.pump(lambda: len(tcp.received) == len(stream), 5, "the rest")
    assert tcp.received == stream
    tcp.check()


@pytest.mark.passt_defect("sends whole segments into a window of zero")
@families
def test_lost_window_update(guest: Guest, world: World, family: int) -> None:
    """The window opens, but the segment that says so is lost: a probe must find out (RFC 9293
    3.8.6.1).
    """
    tcp, peer = established(guest, world, family, window=20_000, wscale=0)
    tcp.autoread = False
    stream = random_bytes(50_000)
    peer.send(stream)
    guest.pump(lambda: len(tcp.inbox) == 20_000, 5, "a full window")
    guest.pump(timeout=0.1)
    tcp.read()
    tcp.autoread = True
    guest.pump(lambda: len(tcp.received) == len(stream), 10, "the rest, without a window update")
    assert tcp.received == stream
    tcp.check()


@families
def test_tiny_windows(guest: Guest, world: World, family: int) -> None:
    """A window of 100 bytes, ever: slow, but every byte comes."""
    tcp, peer = established(guest, world, family, window=100, wscale=0)
    exchange(guest, tcp, peer, b"", random_bytes(20_000), 10)


# --- we lose, or seem to lose, what the guest sends ---------------------------------------------


@pytest.mark.passt_defect("never acknowledges such data again")
@families
def test_retransmission_of_acknowledged_data(guest: Guest, world: World, family: int) -> None:
    """Our ACK was lost: what the guest sends again is acknowledged again (RFC 9293 3.10.7.4), not
    delivered twice.
    """
    tcp, peer = established(guest, world, family)
    exchange(guest, tcp, peer, b"0123456789", b"ok")
    for seq, data in ((1, b"0123456789"), (1, b"0123"), (5, b"456789")):
        tcp.segments.clear()
        tcp.segment(seq, data, ACK | PSH)
        guest.pump(lambda: tcp.segments, 1, "an ACK of data acknowledged before")
        assert (tcp.segments[0].ack - tcp.iss) % (1 << 32) == 11
    exchange(guest, tcp, peer, b"more", b"data")
    assert peer.inbox == b"0123456789more"


@families
def test_retransmission_that_overlaps(guest: Guest, world: World, family: int) -> None:
    """Half old, half new, as a guest sends that coalesces its retransmissions."""
    tcp, peer = established(guest, world, family)
    exchange(guest, tcp, peer, b"01234", b"ok")
    tcp.segment(1, b"0123456789", ACK | PSH)
    guest.pump(lambda: peer.inbox == b"0123456789", 1, "the new half")
    guest.pump(lambda: (tcp.segments[-1].ack - tcp.iss) % (1 << 32) == 11, 1, "its ACK")


@families
@pytest.mark.parametrize("size", [0, 1])
def test_keepalive_probe_is_answered(guest: Guest, world: World, family: int, size: int) -> None:
    """A probe one byte before the next (RFC 9293 3.8.4), with or without a byte of garbage."""
    tcp, peer = established(guest, world, family)
    exchange(guest, tcp, peer, b"hello", b"there")
    tcp.segments.clear()
    tcp.segment(tcp.nxt - 1, b"\0" * size, ACK)
    guest.pump(lambda: tcp.segments, 1, "an answer to a keep-alive probe")
    assert (tcp.segments[0].ack - tcp.iss) % (1 << 32) == tcp.nxt
    exchange(guest, tcp, peer, b"still", b"alive")
    assert peer.inbox == b"hellostill"


@families
def test_out_of_order_segments(guest: Guest, world: World, family: int) -> None:
    """Neighbouring segments swapped, all through a stream."""
    tcp, peer = established(guest, world, family)
    stream = random_bytes(120_000)
    tcp.out += stream
    starts = list(range(0, len(stream), 1000))
    tcp.nxt = 1 + len(stream)
    for i in range(0, len(starts), 2):
        for at in (starts[i + 1], starts[i]):
            tcp.segment(1 + at, stream[at : at + 1000], ACK | PSH)
    tcp._arm()
    guest.pump(lambda: len(peer.inbox) == len(stream), 20, "the stream at the host")
    assert peer.inbox == stream
    tcp.check()


@families
def test_gap_is_answered_with_a_duplicate_ack(guest: Guest, world: World, family: int) -> None:
    """A segment beyond a gap is answered at once with what we have (RFC 5681 4.2), and its FIN
    does not count yet.
    """
    tcp, peer = established(guest, world, family)
    exchange(guest, tcp, peer, b"abc", b"ok")
    tcp.segments.clear()
    tcp.segment(4 + 10, b"beyond", FIN | ACK | PSH)
    guest.pump(lambda: tcp.segments, 1, "a duplicate ACK")
    assert (tcp.segments[0].ack - tcp.iss) % (1 << 32) == 4
    tcp.send(b"0123456789")
    guest.pump(holds(peer.inbox, 13), what="the data in the gap")
    guest.pump(timeout=0.1)
    whole = b"abc0123456789beyond"
    assert peer.inbox in ((whole,) if peer.eof else (whole, whole[:13]))


@families
def test_guest_loses_segments(guest: Guest, world: World, family: int) -> None:
    """One in thirty of the guest's segments never reaches us: it sends them again, and the stream
    is whole.
    """
    tcp, peer = established(guest, world, family)
    rng = random.Random(family)
    tcp.lose_tx = lambda seq, data: rng.random() < 0.03
    tcp.sizes = itertools.repeat(1400)
    exchange(guest, tcp, peer, random_bytes(400_000), b"", 40)


# --- the host's application does not read -------------------------------------------------------


@families
def test_host_application_stops_reading(guest: Guest, world: World, family: int) -> None:
    """It reads nothing for a second, then everything: right to the last byte, without a stall
    above a second.
    """
    tcp, peer = established(guest, world, family, rcvbuf=65536)
    peer.reading = False
    stream = random_bytes(6_000_000)
    tcp.send(stream)
    guest.pump(timeout=1.0)
    peer.reading = True
    _read_without_stall(guest, tcp, peer, len(stream), 1.2)
    assert peer.inbox == stream
    tcp.check()


def _read_without_stall(guest: Guest, tcp: Tcp, peer: Peer, size: int, stall_s: float) -> None:
    """Pump until the peer has `size` bytes; no pause in its progress may exceed `stall_s`."""
    while len(peer.inbox) < size:
        had = len(peer.inbox)
        guest.pump(
            holds(peer.inbox, had + 1),
            stall_s,
            f"progress of the stream at the host, {had} of {size} bytes: {tcp}",
        )


@families
def test_slow_host_reader(guest: Guest, world: World, family: int) -> None:
    """A reader of 20 kB every 2 ms with a small buffer: the guest's sender is paced by windows,
    not by losses.
    """
    tcp, peer = established(guest, world, family, rcvbuf=32768)
    peer.reading = False
    stream = random_bytes(2_000_000)
    tcp.send(stream)
    got, quiet = bytearray(), time.monotonic()
    while len(got) < len(stream):
        guest.pump(timeout=0.002)
        try:
            part = peer.socket.recv(20_000)
            quiet = time.monotonic()
            got += part
        except BlockingIOError:
            assert time.monotonic() - quiet < 1.2, f"no data for 1.2 s after {len(got)}: {tcp}"
    assert got == stream
    tcp.check()


@families
def test_window_closes_before_it_is_overrun(guest: Guest, world: World, family: int) -> None:
    """Nobody reads: the guest must be told to stop before long, and what was acknowledged must not
    get lost.
    """
    tcp, peer = established(guest, world, family, rcvbuf=32768)
    peer.reading = False
    tcp.send(random_bytes(16_000_000))
    guest.pump(timeout=1.0)
    acknowledged = tcp.una - 1
    assert acknowledged < 15_000_000, "all of it acknowledged: who holds it?"
    assert tcp.limit - tcp.una < 4 << 20, f"a window of {tcp.limit - tcp.una} to a full socket"
    peer.reading = True
    tcp.retransmit = False
    tcp.limit = tcp.nxt
    guest.pump(lambda: len(peer.inbox) >= acknowledged, 5, "what was acknowledged")


@families
def test_stuck_connection_does_not_hold_up_another(guest: Guest, world: World, family: int) -> None:
    """Head-of-line blocking: one connection full both ways, another must run at full speed."""
    stuck, full = established(guest, world, family, rcvbuf=32768, window=10_000, wscale=0)
    full.reading = False
    stuck.autoread = False
    stuck.send(random_bytes(2_000_000))
    full.send(random_bytes(2_000_000))
    guest.pump(timeout=0.3)
    tcp, peer = established(guest, world, family)
    start = time.monotonic()
    exchange(guest, tcp, peer, random_bytes(1_000_000, 1), random_bytes(1_000_000, 2))
    took = time.monotonic() - start
    assert took < 2.0, f"2 MB took {took:.1f} s beside a stuck connection"


@families
def test_stuck_connections_cost_nothing(
    backend: Backend, guest: Guest, world: World, family: int
) -> None:
    """A closed window on either side is a reason to sleep, not to spin."""
    stuck, full = established(guest, world, family, rcvbuf=32768, window=10_000, wscale=0)
    full.reading = False
    stuck.autoread = False
    stuck.send(random_bytes(2_000_000))
    full.send(random_bytes(2_000_000))
    guest.pump(timeout=1.0)
    load = backend.load(1.0)
    assert load < 0.10, f"{load:.0%} of a processor for one stuck connection"
