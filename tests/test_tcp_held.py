"""Payload that comes too soon, against a model of intervals; and on the wire, with and without
SACK."""

from __future__ import annotations

import os
import random
import socket
import struct

import pytest
from compiled import Leaves, area
from guest import Guest, holds, random_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from minitcp import Tcp, established, exchange
from packets import ACK, FIN, PSH
from world import World

from dataplane.context import HELD, HELD_BYTES, HELD_MAX, RANGES, Context
from dataplane.tcp_held import STALE_MS
from shm.layout import View
from shm.schema import FLOW
from shm.segment import Segment

H = Leaves("dataplane.tcp_held")
WRAP = 1 << 32
START = WRAP - 7000  # sequence numbers pass zero in most examples
STREAM = random.Random(1).randbytes(HELD_BYTES + (1 << 14))
SOURCE, SOURCE_BYTES = area(1 << 16)
IOV, IOV_BYTES = area(4096)
families = pytest.mark.parametrize("family", [4, 6])

Ranges = list[tuple[int, int]]


class Worker:
    """A worker's context with nothing but flows in it."""

    def __init__(self) -> None:
        self.segment = Segment(f"/vhostmq-test-held-{os.getpid()}", 1, create=True)
        self.segment.unlink()
        self.context = Context(self.segment, 0, 1)
        self.w = self.context.address
        table, _ = area(4096)
        self.context.view["table"] = table
        View(Leaves("flows.table").TABLE, _, 0)["flows"] = self.context.view["flows"]

    def flow(self, index: int) -> View:
        return View(FLOW, self.segment.buffer, self.segment.offsets.flow + index * FLOW.size)

    def at(self, index: int) -> int:
        return self.context.view["flows"] + index * FLOW.size

    def keep(self, index: int, position: int, size: int, fin: int = 0, cut: int = 0) -> int:
        """Offer bytes position..position + size of STREAM, in two pieces, behind `cut` others."""
        data = bytes(cut) + STREAM[position : position + size]
        SOURCE_BYTES[: len(data)] = data
        half = len(data) // 3
        IOV_BYTES[:32] = struct.pack("<QQQQ", SOURCE, half, SOURCE + half, len(data) - half)
        seq = (START + position) % WRAP
        return int(H.keep(self.w, self.at(index), index, seq, IOV, 2, cut, size, fin))

    def take(self, index: int, position: int) -> bytes:
        size = H.take(self.w, self.at(index), (START + position) % WRAP, IOV)
        if not size:
            return b""
        base = self.context.view["held_bytes"]
        memory = self.context.scratch("held_bytes")
        first, front, second, rest = struct.unpack("<QQQQ", IOV_BYTES[:32])
        assert front + rest == size
        return memory[first - base :][:front] + memory[second - base :][:rest]

    def sack(self, index: int) -> Ranges:
        """The blocks told, relative to START."""
        size = H.put_sack(self.w, self.at(index), SOURCE)
        if not size:
            return []
        assert SOURCE_BYTES[:4] == bytes([1, 1, 5, size - 2]) and size % 8 == 4 and size <= 36
        edges = struct.unpack(f">{(size - 4) // 4}I", SOURCE_BYTES[4:size])
        edges = [(edge - START) % WRAP for edge in edges]
        return list(zip(edges[::2], edges[1::2], strict=True))


WORKER = Worker()


def fresh(index: int = 0) -> View:
    """The flow, expecting START, holding nothing."""
    H.release(WORKER.w, WORKER.at(index))
    flow = WORKER.flow(index)
    flow["seq_from_guest"] = START % WRAP
    return flow


def added(ranges: Ranges, left: int, right: int) -> Ranges:
    """The union, as sorted ranges that do not touch."""
    result: Ranges = []
    for a, b in sorted([*ranges, (left, right)]):
        if result and a <= result[-1][1]:
            result[-1] = (result[-1][0], max(b, result[-1][1]))
        else:
            result.append((a, b))
    return result


POSITIONS = st.integers(0, 20_000) | st.integers(HELD_BYTES - 4000, HELD_BYTES + 4000)
STEPS = st.lists(
    st.tuples(st.just("keep"), POSITIONS, st.integers(1, 3000))
    | st.tuples(st.just("arrive"), st.integers(1, 4000), st.just(0)),
    max_size=70,
)


@settings(max_examples=200)
@given(STEPS)
def test_against_a_model(steps: list[tuple[str, int, int]]) -> None:
    """Whatever comes in whatever order: what is held, told and handed over is what came."""
    flow, ranges, expected, latest = fresh(), [], 0, None
    for what, position, size in steps:
        if what == "keep":
            position += expected + 1
            if position + size > len(STREAM):
                continue
            kept = WORKER.keep(0, position, size, cut=position % 5)
            size = min(size, expected + HELD_BYTES - position)
            union = added(ranges, position, position + size) if size > 0 else ranges
            if len(union) > RANGES or size <= 0:
                assert not kept
                continue
            ranges, latest = union, position
        else:
            expected += position
            flow["seq_from_guest"] = (START + expected) % WRAP
            run = next((b for a, b in ranges if a <= expected < b), expected)
            if flow["held"]:
                assert WORKER.take(0, expected) == STREAM[expected:run]
            ranges = [(a, b) for a, b in ranges if b > run]
            expected = run
            flow["seq_from_guest"] = (START + expected) % WRAP
            H.tidy(WORKER.w, WORKER.at(0))
            assert bool(flow["held"]) == bool(ranges)
        told = WORKER.sack(0)
        assert set(told) <= set(ranges) and len(told) == min(len(ranges), 4)
        if latest is not None and any(a <= latest < b for a, b in ranges):
            assert told[0][0] <= latest < told[0][1]


def test_bytes_refused_by_the_socket_are_not_told() -> None:
    """What begins at the next expected byte only waits for room: SACK must not name it."""
    fresh()
    assert WORKER.keep(0, 0, 500) and WORKER.keep(0, 900, 100)
    assert H.waits(WORKER.w, WORKER.at(0))
    assert WORKER.sack(0) == [(900, 1000)]
    assert WORKER.take(0, 0) == STREAM[:500]


def test_what_was_expected_already_is_cut_off() -> None:
    """A segment that begins before the next expected byte."""
    flow = fresh()
    flow["seq_from_guest"] = (START + 300) % WRAP
    assert WORKER.keep(0, 100, 500)
    assert WORKER.take(0, 300) == STREAM[300:600]


def test_fin() -> None:
    """A FIN beyond a gap counts when everything before it has come, and holds the buffer."""
    flow = fresh()
    assert WORKER.keep(0, 100, 50, fin=1)
    flow["seq_from_guest"] = (START + 100) % WRAP
    assert WORKER.take(0, 100) == STREAM[100:150]
    assert H.ends_at(WORKER.w, WORKER.at(0), (START + 150) % WRAP)
    assert not H.ends_at(WORKER.w, WORKER.at(0), (START + 149) % WRAP)
    flow["seq_from_guest"] = (START + 150) % WRAP
    H.tidy(WORKER.w, WORKER.at(0))
    assert flow["held"]
    flow["seq_from_guest"] = (START + 151) % WRAP
    H.tidy(WORKER.w, WORKER.at(0))
    assert not flow["held"]


def test_buffers_are_few_and_stale_ones_move_on() -> None:
    """HELD_MAX flows; one more gets nothing until one of them has been silent for long."""
    view = WORKER.context.view
    for index in range(HELD_MAX + 1):
        fresh(index)
    view["now_ms"] = 10_000
    for index in range(HELD_MAX):
        view["now_ms"] = 10_000 + index
        assert WORKER.keep(index, 100, 10)
    view["now_ms"] = 10_000 + STALE_MS
    assert not WORKER.keep(HELD_MAX, 100, 10)
    view["now_ms"] += 1
    assert WORKER.keep(HELD_MAX, 100, 10)
    assert not WORKER.flow(0)["held"], "the oldest gives way"
    assert all(WORKER.flow(index)["held"] for index in range(1, HELD_MAX + 1))
    owners = {
        View(HELD, WORKER.context.scratch("held"), number * HELD.size)["owner"]
        for number in range(HELD_MAX)
    }
    assert owners == set(range(2, HELD_MAX + 2))
    for index in range(HELD_MAX + 1):
        fresh(index)


# --- on the wire ----------------------------------------------------------------------------------


@pytest.mark.passt_defect("keeps nothing behind a gap")
@families
@pytest.mark.parametrize("sack", [False, True])
def test_one_lost_segment_is_all_that_is_sent_again(
    guest: Guest, world: World, family: int, sack: bool
) -> None:
    """What is behind a gap is not needed again; with SACK the guest is told which bytes that is."""
    tcp, peer = established(guest, world, family, sack=sack)
    assert tcp.peer_sack == sack
    stream = random_bytes(20_000)
    tcp.segments.clear()
    for at in range(1000, 20_000, 1000):
        if at != 7000:
            tcp.segment(1 + at, stream[at : at + 1000], ACK | PSH)
    tcp.nxt = 20_001
    guest.pump(lambda: len(tcp.segments) >= 18, 2, "a duplicate ACK for each")
    blocks = [(left - tcp.iss - 1, right - tcp.iss - 1) for left, right in tcp.segments[-1].sack]
    blocks = [(left % WRAP, right % WRAP) for left, right in blocks]
    assert blocks == ([(8000, 20_000), (1000, 7000)] if sack else [])
    tcp.segment(1, stream[:1000], ACK | PSH)
    guest.pump(holds(peer.inbox, 7000), what="the bytes up to the next gap")
    tcp.segment(7001, stream[7000:8000], ACK | PSH)
    guest.pump(holds(peer.inbox, 20_000), what="all bytes")
    guest.pump(lambda: tcp.una == 20_001, 2, "the ACK of all bytes")
    assert peer.inbox == stream
    exchange(guest, tcp, peer, b"more", b"back")


@pytest.mark.passt_defect("keeps nothing behind a gap")
@families
def test_fin_beyond_a_gap(guest: Guest, world: World, family: int) -> None:
    """The end of the stream came before its middle."""
    tcp, peer = established(guest, world, family)
    tcp.segment(4, b"def", FIN | ACK | PSH)
    tcp.nxt, tcp.fin_at = 8, 7
    guest.pump(timeout=0.1)
    assert not peer.eof
    tcp.segment(1, b"abc", ACK | PSH)
    guest.pump(lambda: peer.eof, 2, "the end of the stream")
    assert peer.inbox == b"abcdef"
    guest.pump(lambda: tcp.una == 8, 2, "the ACK of the FIN")


@families
def test_refused_payload_waits_here(guest: Guest, world: World, family: int) -> None:
    """More than the socket takes, sent without regard to the window: all that can be held arrives,
    in order and once, when the host reads."""
    tcp, peer = established(guest, world, family, rcvbuf=8192)
    peer.reading = False
    stream = random_bytes(4_000_000)
    tcp.retransmit = False
    for at in range(0, len(stream), 1400):
        tcp.segment(1 + at, stream[at : at + 1400], ACK | PSH)
        tcp.nxt = 1 + min(at + 1400, len(stream))
        if at % 140_000 == 0:
            guest.pump(timeout=0.001)
    guest.pump(timeout=0.3)
    taken = tcp.una - 1
    assert taken < len(stream), "the socket took everything: nothing was tested"
    peer.reading = True
    want = min(taken + HELD_BYTES, len(stream))
    guest.pump(holds(peer.inbox, want), 5, "what was held")
    assert peer.inbox == stream[: len(peer.inbox)]
    tcp.out += stream[len(peer.inbox) :]
    tcp.trimmed = len(peer.inbox)
    guest.pump(lambda: tcp.una - 1 == len(peer.inbox), 2, "its ACK")


@families
def test_many_gaps_at_random(guest: Guest, world: World, family: int) -> None:
    """Segments lost, doubled and in any order within a window, in both directions at once."""
    tcp, peer = established(guest, world, family, sack=True)
    rng = random.Random(family)
    stream = random_bytes(600_000)
    missing = {at: stream[at : at + 1300] for at in range(0, len(stream), 1300)}
    peer.send(stream)
    tcp.nxt = 1 + len(stream)
    while missing:
        window = sorted(missing)[:60]
        rng.shuffle(window)
        for at in window:
            if rng.random() < 0.7:
                tcp.segment(1 + at, missing[at], ACK | PSH)
        guest.pump(timeout=0.005)
        missing = {at: data for at, data in missing.items() if 1 + at + len(data) > tcp.una}
    guest.pump(holds(peer.inbox, len(stream)), what="the stream at the host")
    assert peer.inbox == stream
    guest.pump(lambda: len(tcp.received) == len(stream), 5, "the stream at the guest")
    assert tcp.received == stream
    tcp.check()


def test_flow_that_ends_gives_its_buffer_back(guest: Guest, world: World) -> None:
    """Many more connections than buffers leave a gap behind and are reset."""
    listener = guest.with_host(world.listen(socket.AF_INET))
    for _ in range(3 * HELD_MAX):
        tcp = Tcp(guest, guest.addresses(4)[1], listener.port, sack=True)
        tcp.connect()
        tcp.segments.clear()
        tcp.segment(11, b"early", ACK | PSH)
        guest.pump(lambda tcp=tcp: tcp.segments, 1, "a duplicate ACK")
        assert tcp.segments[-1].sack, "no buffer left"
        tcp.abort()
        guest.pump(timeout=0.01)
