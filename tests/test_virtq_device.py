"""The device side of split virtqueues against an independent driver (tests/vring.py).

The two meet only in shared memory: index words, descriptors, used elements, notification wishes.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections import deque

import pytest
from compiled import Leaves
from hypothesis import given
from hypothesis import strategies as st
from vring import DESC, INDIRECT, NEXT, WRITE, Memory, Ring, Segment, chain_bytes

from dataplane.context import CHAIN_IOV_MAX, IOV_BYTES, REGION, Context
from shm import mem, schema
from shm.layout import View
from shm.segment import Segment as SharedSegment

V = Leaves("dataplane.virtq")
S = Leaves("dataplane.virtq_split")
D = Leaves("dataplane.descriptor")
MAIN = 4 << 20
TX, RX = 0, 1


class Device:
    """One ring of a worker's context over a driver's memory of four regions."""

    def __init__(self) -> None:
        name = f"/vhostmq-test-virtq-{os.getpid()}"
        self.segment = SharedSegment(name, 1, create=True)
        self.segment.unlink()
        self.context = Context(self.segment, 0, 1)
        self.w = self.context.address
        self.memory = Memory(MAIN, borders=3)
        self.ring = self.context.ring(1)
        self.r = self.context.view["rings"] + self.ring.base
        self.iov = self.context.view["chain_iov"]
        self.counters = View(
            schema.QUEUE, self.segment.buffer, self.ring["counters"] - self.segment.address
        )
        self.hosts: dict[int, int] = {}
        for position, region in enumerate(self.memory.regions):
            host = ctypes.addressof(ctypes.c_char.from_buffer(region.map)) + region.offset
            self.hosts[region.gpa] = host
            view = View(REGION, self.context.scratch("regions"), position * REGION.size)
            view["gpa"], view["size"], view["host"] = region.gpa, region.size, host
            mem.watch(host, region.size, "guest")
        self.context.view["region_count"] = len(self.memory.regions)
        self.rings: dict[int, Ring] = {}
        self.call = os.eventfd(0, os.EFD_NONBLOCK)
        self.err = os.eventfd(0, os.EFD_NONBLOCK)

    def host(self, gpa: int) -> int:
        region = self.memory.region(gpa)
        return self.hosts[region.gpa] + gpa - region.gpa

    def attach(self, num: int, base: int = 0, event_idx: bool = False) -> Ring:
        """A fresh ring of `num` entries whose indexes all stand at `base`."""
        if num not in self.rings:
            self.rings[num] = Ring(self.memory, num, slots=False)
        driver = self.rings[num]
        driver.reset(base)
        driver.event_idx = event_idx
        driver.want_calls(True)
        ring = self.ring
        ring["num"], ring["running"], ring["enabled"] = num, 1, 1
        ring["desc"], ring["avail"] = self.host(driver.desc), self.host(driver.avail)
        ring["used"] = self.host(driver.used)
        for name in ("last_avail", "seen_avail", "used_idx", "published"):
            ring[name] = base
        ring["event_idx"], ring["suppressed"] = int(event_idx), 0
        ring["call_fd"], ring["err_fd"] = self.call, self.err
        zero = bytes(schema.QUEUE.size)
        self.segment.buffer[self.counters.base : self.counters.base + len(zero)] = zero
        self.called()
        return driver

    def called(self) -> int:
        """Notifications since the last time."""
        return drained(self.call)

    def walk(self, head: int, direction: int = TX, room: int = CHAIN_IOV_MAX) -> int:
        return int(S.walk(self.w, self.r, head, self.iov, room, direction))

    def next(self, ahead: int) -> int:
        """The id of the chain `ahead` slots on."""
        assert V.ready(self.r, ahead) == 1
        V.walk(self.w, self.r, ahead, self.iov, CHAIN_IOV_MAX, RX)
        return int(self.ring["chain_id"])

    def entries(self, count: int) -> list[tuple[int, int]]:
        data = self.context.scratch("chain_iov")
        return [struct.unpack_from("<QQ", data, IOV_BYTES * number) for number in range(count)]

    def expected(self, segments: list[Segment]) -> list[tuple[int, int]]:
        """The pieces of host memory behind `segments`: one each, more where a region ends."""
        pieces = []
        for segment in segments:
            gpa, left = segment.gpa, segment.length
            while left:
                region = self.memory.region(gpa)
                size = min(left, region.gpa + region.size - gpa)
                pieces.append((self.host(gpa), size))
                gpa, left = gpa + size, left - size
        return pieces


def drained(fd: int) -> int:
    try:
        return int.from_bytes(os.read(fd, 8), "little")
    except BlockingIOError:
        return 0


DEVICE = Device()
MEMORY = DEVICE.memory
FIRST, END = MEMORY.regions[0].gpa, MEMORY.end
TABLE = MEMORY.alloc(16 * 600, 16)
BORDERS = MEMORY.borders()

LENGTHS = st.one_of(st.integers(0, 3), st.integers(0, 70_000))
PLACES = st.one_of(
    st.integers(FIRST, END - 70_000),
    st.builds(lambda border, back: border - back, st.sampled_from(BORDERS), st.integers(0, 70_000)),
)


@st.composite
def segments(draw, write: bool, size_max: int = 20):
    made = draw(st.lists(st.tuples(PLACES, LENGTHS), min_size=1, max_size=size_max))
    return [Segment(gpa, length, write) for gpa, length in made]


# --- chains ---------------------------------------------------------------------------------------


@given(st.data(), st.sampled_from([TX, RX]), st.booleans())
def test_a_chain_becomes_its_pieces(data, direction, indirect):
    """Direct or indirect, across region borders, in any order of descriptors."""
    driver = DEVICE.attach(32)
    chain = data.draw(segments(write=direction == RX))
    ids = data.draw(st.permutations(range(32)))[: 1 if indirect else len(chain)]
    if indirect:
        MEMORY.write(TABLE, chain_bytes(chain, range(len(chain))))
        extra = data.draw(st.sampled_from([0, WRITE]))  # to be ignored (virtio 2.7.5.3.2)
        driver.write_desc(ids[0], TABLE, 16 * len(chain), INDIRECT | extra, 999)
    else:
        for at, descriptor in zip(ids, DESC.iter_unpack(chain_bytes(chain, ids)), strict=True):
            driver.write_desc(at, *descriptor)
    expected = DEVICE.expected(chain)
    assert DEVICE.walk(ids[0], direction) == len(expected)
    assert DEVICE.entries(len(expected)) == expected


@pytest.mark.parametrize("num", [1, 2, 8, 256])
@pytest.mark.parametrize("indirect", [False, True])
def test_the_longest_chain(num, indirect):
    """As many descriptors as the queue has entries (virtio 2.7.5.3.1), and not one more."""
    driver = DEVICE.attach(num)
    for count, allowed in ((num, True), (num + 1, False)):
        chain = [Segment(FIRST + 10 * number, 10) for number in range(count)]
        if indirect:
            MEMORY.write(TABLE, chain_bytes(chain, range(count)))
            driver.write_desc(0, TABLE, 16 * count, INDIRECT, 0)
        elif allowed:
            MEMORY.write(driver.desc, chain_bytes(chain, range(count)))
        else:
            MEMORY.write(driver.desc, chain_bytes(chain, [*range(num), 0])[: 16 * num])
        assert DEVICE.walk(0) == (count if allowed else D.CHAIN_LOOP)


def test_room_for_pieces_is_kept():
    driver = DEVICE.attach(8)
    chain = [Segment(BORDERS[0] - 5, 10), Segment(BORDERS[1] - 5, 10)]
    MEMORY.write(driver.desc, chain_bytes(chain, [0, 1]))
    assert DEVICE.walk(0, room=4) == 4
    for room in range(4):
        assert DEVICE.walk(0, room=room) == D.BAD_ADDRESS


def descriptors(*wanted: tuple[int, int, int, int]) -> bytes:
    return b"".join(DESC.pack(gpa & (1 << 64) - 1, *rest) for gpa, *rest in wanted)


GOOD = (FIRST, 100, 0, 0)
MALFORMED = {
    # name: head, descriptors at 0.., indirect table, reason
    "head beyond the queue": (8, [], [], "bad_index"),
    "head far beyond the queue": (0xFFFF, [], [], "bad_index"),
    "next beyond the queue": (0, [(FIRST, 1, NEXT, 8)], [], "bad_index"),
    "next is itself": (0, [(FIRST, 1, NEXT, 0)], [], "chain_loop"),
    "two that follow each other": (
        1, [GOOD, (FIRST, 1, NEXT, 2), (FIRST, 1, NEXT, 1)], [], "chain_loop"),
    "a loop of empty buffers": (0, [(FIRST, 0, NEXT, 1), (FIRST, 0, NEXT, 0)], [], "chain_loop"),
    "below all memory": (0, [(FIRST - 1, 1, 0, 0)], [], "bad_address"),
    "address zero": (0, [(0, 100, 0, 0)], [], "bad_address"),
    "the byte after all memory": (0, [(END, 1, 0, 0)], [], "bad_address"),
    "over the end of memory": (0, [(END - 10, 11, 0, 0)], [], "bad_address"),
    "longer than all memory": (0, [(FIRST, 0xFFFFFFFF, 0, 0)], [], "bad_address"),
    "address and length wrap around": (0, [(-10, 100, 0, 0)], [], "bad_address"),
    "a negative address": (0, [(-(1 << 63), 100, 0, 0)], [], "bad_address"),
    "the largest address": (0, [((1 << 63) - 1, 100, 0, 0)], [], "bad_address"),
    "bad after good": (0, [(FIRST, 1, NEXT, 1), (END, 5, 0, 0)], [], "bad_address"),
    "table of no bytes": (0, [(TABLE, 0, INDIRECT, 0)], [GOOD], "bad_indirect"),
    "table of half a descriptor": (0, [(TABLE, 24, INDIRECT, 0)], [GOOD], "bad_indirect"),
    "table and next": (0, [(TABLE, 16, INDIRECT | NEXT, 1), GOOD], [GOOD], "bad_indirect"),
    "table in a table": (
        0, [(TABLE, 16, INDIRECT, 0)], [(TABLE, 16, INDIRECT, 0)], "bad_indirect"),
    "table outside memory": (0, [(END, 16, INDIRECT, 0)], [], "bad_address"),
    "table over the end of memory": (0, [(END - 16, 32, INDIRECT, 0)], [], "bad_address"),
    "table across a border": (0, [(BORDERS[0] - 16, 32, INDIRECT, 0)], [], "bad_address"),
    "a huge table": (0, [(TABLE, 0xFFFFFFF0, INDIRECT, 0)], [GOOD], "bad_address"),
    "next beyond its table": (
        0, [(TABLE, 32, INDIRECT, 0)], [(FIRST, 1, NEXT, 2), GOOD], "bad_index"),
    "a loop in a table": (
        0, [(TABLE, 32, INDIRECT, 0)], [(FIRST, 1, NEXT, 1), (FIRST, 1, NEXT, 0)], "chain_loop"),
    "a bad address in a table": (0, [(TABLE, 16, INDIRECT, 0)], [(END, 1, 0, 0)], "bad_address"),
    "a writable buffer": (0, [(FIRST, 1, WRITE, 0)], [], "bad_direction"),
    "a writable buffer after a readable one": (
        0, [(FIRST, 1, NEXT, 1), (FIRST, 1, WRITE, 0)], [], "bad_direction"),
    "a writable buffer in a table": (
        0, [(TABLE, 16, INDIRECT, 0)], [(FIRST, 1, WRITE, 0)], "bad_direction"),
    "an empty writable buffer": (0, [(FIRST, 0, WRITE, 0)], [], "bad_direction"),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_chains_have_their_reason(name):
    head, direct, table, reason = MALFORMED[name]
    driver = DEVICE.attach(8)
    MEMORY.write(driver.desc, descriptors(*direct))
    MEMORY.write(TABLE, descriptors(*table))
    assert DEVICE.walk(head) == -1 - schema.DROP[reason]


def test_readable_buffers_in_a_receive_chain():
    driver = DEVICE.attach(8)
    MEMORY.write(driver.desc, descriptors((FIRST, 1, WRITE | NEXT, 1), (FIRST, 1, 0, 0)))
    assert DEVICE.walk(0, RX) == D.BAD_DIRECTION
    assert DEVICE.walk(1, RX) == D.BAD_DIRECTION


WORD16 = st.one_of(st.integers(0, 9), st.integers(0, 0xFFFF))
HOSTILE = st.tuples(
    st.one_of(PLACES, st.just(TABLE), st.integers(-(1 << 63), (1 << 63) - 1), st.just(END - 8)),
    st.one_of(LENGTHS, st.sampled_from([16, 32, 128, 0xFFFFFFFF, 0xFFFFFFF0])),
    st.one_of(st.sampled_from([0, NEXT, NEXT, INDIRECT, WRITE]), st.integers(0, 0xFFFF)),
    WORD16,
)


@given(
    st.lists(HOSTILE, min_size=8, max_size=8),
    st.lists(HOSTILE, min_size=8, max_size=8),
    WORD16,
    st.sampled_from([TX, RX]),
)
def test_hostile_descriptors(direct, table, head, direction):
    """Anything: pieces inside guest memory, or a reason. (Interpreted: no stray load either.)"""
    driver = DEVICE.attach(8)
    MEMORY.write(driver.desc, descriptors(*direct))
    MEMORY.write(TABLE, descriptors(*table))
    result = DEVICE.walk(head, direction)
    reasons = ("chain_loop", "bad_index", "bad_address", "bad_indirect", "bad_direction")
    if result < 0:
        assert result in {-1 - schema.DROP[reason] for reason in reasons}
        return
    for base, size in DEVICE.entries(result):
        assert size > 0
        assert any(
            host <= base and base + size <= host + MEMORY.region(gpa).size
            for gpa, host in DEVICE.hosts.items()
        )


# --- indexes --------------------------------------------------------------------------------------

BASES = st.one_of(st.just(0), st.integers(0, 0xFFFF), st.integers(0xFFE0, 0xFFFF))
NUMS = st.sampled_from([1, 2, 4, 16, 64])


@given(NUMS, BASES, st.booleans(), st.data())
def test_chains_come_and_go(num, base, event_idx, data):
    """Taken in the order of the driver, returned in any order, through wraps of all indexes."""
    driver = DEVICE.attach(num, base, event_idx)
    offered: deque[int] = deque()
    taken: list[int] = []
    returned: list[tuple[int, int]] = []
    for _ in range(data.draw(st.integers(1, 25))):
        for _ in range(data.draw(st.integers(0, len(driver.free)))):
            offered.append(driver.add([Segment(FIRST, 60, write=True)]))
        driver.publish()
        assert [DEVICE.next(ahead) for ahead in range(len(offered))] == list(offered)
        assert V.ready(DEVICE.r, len(offered)) == 0
        burst = data.draw(st.integers(0, len(offered)))
        V.take(DEVICE.r, burst)
        taken += [offered.popleft() for _ in range(burst)]
        taken = data.draw(st.permutations(taken))
        for _ in range(data.draw(st.integers(0, len(taken)))):
            returned.append((taken.pop(), data.draw(st.integers(0, 60))))
            V.put_used(DEVICE.r, *returned[-1], 1)
        assert driver.reap() == [], "nothing is returned before it is published"
        V.publish(DEVICE.r, DEVICE.context.view["option"])
        assert [(head, length) for head, length, _, _ in driver.reap()] == returned
        returned.clear()
    assert driver.used_idx == DEVICE.ring["used_idx"]


@given(NUMS, BASES, st.integers(0, 0xFFFF), st.none() | st.integers(-2, 2))
def test_an_available_index_that_jumps(num, base, jump, near):
    driver = DEVICE.attach(num, base)
    jump = jump if near is None else max(num + near, 0)
    driver.set_avail_idx(base + jump)
    assert V.ready(DEVICE.r, 0) == (min(jump, 1) if jump <= num else D.BAD_AVAIL)
    if 0 < jump <= num:
        assert V.ready(DEVICE.r, jump - 1) == 1
        assert V.ready(DEVICE.r, jump) == 0


# --- notifications --------------------------------------------------------------------------------


@given(NUMS, BASES, st.integers(0, 64), st.integers(0, 0xFFFF) | st.integers(-70, 70))
def test_calls_with_event_idx(num, base, count, event):
    """A call exactly when the entry the driver waits for is among those that became visible."""
    driver = DEVICE.attach(num, base, event_idx=True)
    count, event = min(count, num), (base + event) & 0xFFFF
    driver._avail[2 + num] = event
    for number in range(count):
        V.put_used(DEVICE.r, number, 0, 1)
    V.publish(DEVICE.r, DEVICE.context.view["option"])
    wanted = event in {(base + number) & 0xFFFF for number in range(count)}
    assert DEVICE.called() == wanted
    assert DEVICE.counters["calls"] == wanted
    assert DEVICE.counters["calls_suppressed"] == (count > 0 and not wanted)
    assert driver.used_idx == (base + count) & 0xFFFF


@given(st.booleans(), st.integers(0, 8))
def test_calls_with_flags(wanted, count):
    """One call a burst, none for an empty one, none where the driver wants none."""
    driver = DEVICE.attach(8, 0xFFFC)
    driver.want_calls(wanted)
    for number in range(count):
        V.put_used(DEVICE.r, number, 0, 1)
    for _ in range(2):
        V.publish(DEVICE.r, DEVICE.context.view["option"])
    assert DEVICE.called() == (wanted and count > 0)
    assert DEVICE.counters["calls_suppressed"] == (count > 0 and not wanted)


def test_no_call_descriptor():
    """A driver that polls: the entries are there, nothing is written anywhere."""
    driver = DEVICE.attach(8)
    DEVICE.ring["call_fd"] = -1
    V.put_used(DEVICE.r, 0, 0, 1)
    V.publish(DEVICE.r, DEVICE.context.view["option"])
    assert driver.used_idx == 1 and DEVICE.called() == 0
    assert DEVICE.counters["calls_suppressed"] == 1


@given(NUMS, BASES, st.booleans(), st.data())
def test_no_kick_is_lost_and_few_are_sent(num, base, event_idx, data):
    """The device works while there is something, then sleeps; a driver that finds it asleep kicks.

    Chains that come between the last look and the wish for a kick are found by the second look.
    """
    driver = DEVICE.attach(num, base, event_idx)
    V.suppress_kicks(DEVICE.r)
    awake, waiting = True, 0
    allowed = int(event_idx)  # kicks: one for each time the device asked; flags take a wish back
    for _ in range(data.draw(st.integers(1, 40))):
        if data.draw(st.booleans()) and driver.free:
            driver.add([Segment(FIRST, 1)])
            waiting += 1
            kicked = driver.publish()
            assert kicked or awake, "nobody will ever look at this chain"
            allowed -= kicked
            assert allowed >= 0, "a needless kick"
            awake = awake or kicked
        elif awake:
            V.suppress_kicks(DEVICE.r)
            allowed = allowed if event_idx else 0
            burst = data.draw(st.integers(0, waiting))
            for number in range(burst):
                V.put_used(DEVICE.r, DEVICE.next(number), 0, 1)
            V.take(DEVICE.r, burst)
            V.publish(DEVICE.r, DEVICE.context.view["option"])
            driver.reap()
            waiting -= burst
            late = data.draw(st.booleans()) and bool(driver.free) and waiting == 0
            if late:
                driver.add([Segment(FIRST, 1)])
                waiting += 1
                allowed -= driver.publish()
                assert allowed >= 0, "a needless kick"
            if waiting == late:  # nothing was left when the device looked
                assert V.ask_for_kick(DEVICE.r) == late
                awake, allowed = late, 1 if event_idx else len(driver.free)


def test_asking_again_while_awake_costs_nothing():
    """suppress_kicks writes to guest memory once, not once a breath."""
    driver = DEVICE.attach(8)
    V.suppress_kicks(DEVICE.r)
    assert driver.no_notify
    driver._used[0] = 0
    V.suppress_kicks(DEVICE.r)
    assert not driver.no_notify
    assert V.ask_for_kick(DEVICE.r) == 0


# --- broken rings and counters --------------------------------------------------------------------


def test_a_broken_ring_stops_and_says_so():
    DEVICE.attach(8)
    V.fail(DEVICE.r, DEVICE.context.view["option"])
    assert DEVICE.ring["running"] == 0
    assert drained(DEVICE.err) == 1
    assert DEVICE.counters["errors"] == 1
    DEVICE.ring["err_fd"] = -1
    V.fail(DEVICE.r, DEVICE.context.view["option"])
    assert drained(DEVICE.err) == 0
    assert DEVICE.counters["errors"] == 2


@pytest.mark.parametrize("reason", schema.DROP)
def test_drops_are_counted_by_reason(reason):
    DEVICE.attach(8)
    V.drop(DEVICE.r, -1 - schema.DROP[reason])
    V.drop(DEVICE.r, -1 - schema.DROP[reason])
    counts = [DEVICE.counters.element("drops", number) for number in range(schema.DROP_WORDS)]
    assert counts == [2 * (number == schema.DROP[reason]) for number in range(schema.DROP_WORDS)]
