"""The tests' driver side of packed virtqueues against a device side just as independent
(packedpeer.py): all a good device may do is taken, all else is a `RingFault`.

And what both formats have in `Buffers`, with split rings: order, guards, copies.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from packedpeer import AVAIL, USED, Buffer, PackedDevice
from vring import INDIRECT, NEXT, WRITE, Memory, Ring, RingFault, Segment
from vring_packed import AT_DESC, DISABLE, ENABLE, PackedRing

NUMS = st.sampled_from([1, 2, 3, 5, 7, 8, 13])
SIZES = st.lists(st.integers(0, 90), min_size=1, max_size=5)
CHAINS = st.tuples(SIZES, st.integers(0, 5), st.booleans())
"""Sizes of descriptors, how many of them are writable, whether they are in a table."""
MEMORY = Memory(128 << 20)
RINGS = {num: PackedRing(MEMORY, num) for num in (1, 2, 3, 5, 7, 8, 13)}
SPLIT = Ring(MEMORY, 8)
SPARE = MEMORY.alloc(4096)


def pair(num: int, base: int | None = None, **terms: bool) -> tuple[PackedRing, PackedDevice]:
    """A fresh ring and a device on it."""
    ring = RINGS[num]
    ring.reset(base)
    ring.event_idx, ring.in_order = terms.get("event_idx", False), terms.get("in_order", False)
    device = PackedDevice(MEMORY, num, ring.desc, ring.avail, ring.used, ring.base)
    device.event_idx = ring.event_idx
    return ring, device


class Conversation(RuleBasedStateMachine):
    """Buffers of any shape come and go in any order that was agreed on: every byte written is
    found, and every notification that was asked for is sent.
    """

    @initialize(num=NUMS, event_idx=st.booleans(), in_order=st.booleans(), data=st.data())
    def start(self, num: int, event_idx: bool, in_order: bool, data: st.DataObject) -> None:
        index, wrap = data.draw(st.integers(0, num - 1)), data.draw(st.sampled_from([0, 1]))
        base = (index | wrap << 15) * 0x10001
        self.ring, self.device = pair(num, base, event_idx=event_idx, in_order=in_order)
        assert self.ring.base == base
        self.offered: list[tuple[int, list[Segment]]] = []
        self.held: list[Buffer] = []
        self.returned: list[tuple[int, int, int]] = []
        self.number = 0
        self.kicked = self.called = False
        self.asleep = self.waiting = False

    @rule(chains=st.lists(CHAINS, min_size=1, max_size=5))
    def driver_adds(self, chains: list[tuple[list[int], int, bool]]) -> None:
        for sizes, writable, indirect in chains:
            if len(self.ring.free) < (1 if indirect else len(sizes)):
                with pytest.raises(BlockingIOError):
                    self.ring.add([Segment(SPARE, 1)] * len(sizes), indirect=indirect)
            else:
                self.add(sizes, max(0, len(sizes) - writable), indirect)

    def add(self, sizes: list[int], split: int, indirect: bool) -> None:
        """One buffer, of which the device may write the descriptors from `split` on."""
        ring = self.ring
        laid = ring.scatter(ring.free[0], sizes, True)
        segments = [Segment(s.gpa, s.length) for s in laid[:split]] + laid[split:]
        self.number += 1
        for segment in segments[:split]:
            MEMORY.write(segment.gpa, bytes([self.number % 251]) * segment.length)
        self.offered.append((ring.add(segments, indirect=indirect, token=self.number), segments))

    @rule()
    def driver_publishes(self) -> None:
        self.kicked |= self.ring.publish()

    @rule()
    def driver_waits(self) -> None:
        self.ring.want_calls(True)
        self.waiting = not self.ring.pending()

    @rule()
    def driver_is_busy(self) -> None:
        self.ring.want_calls(False)
        self.waiting = self.called = False

    @rule()
    def driver_reaps(self) -> None:
        expected, self.returned = self.returned, []
        assert self.ring.pending() == len(expected)
        for (name, length, _, token), wanted in zip(self.ring.reap(), expected, strict=True):
            assert (name, length, token) == wanted
        self.called = False
        self.waiting = False

    @rule(most=st.integers(1, 5))
    def device_takes(self, most: int) -> None:
        for _ in range(most):
            buffer = self.device.take()
            if not buffer:
                break
            name, segments = self.offered.pop(0)
            assert buffer.name == name
            assert buffer.readable == [(s.gpa, s.length) for s in segments if not s.write]
            assert buffer.writable == [(s.gpa, s.length) for s in segments if s.write]
            self.held.append(buffer)
            self.asleep = self.kicked = False

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def device_returns(self, data: st.DataObject) -> None:
        """One of those it has; in order, the first, or several at once."""
        number = data.draw(st.integers(0, len(self.held) - 1))
        skip = None
        if self.ring.in_order:
            skipped, self.held = self.held[:number], self.held[number:]
            self.returned += [self.told(one, written_whole(one)) for one in skipped]
            skip, number = sum(one.count for one in skipped) + self.held[0].count, 0
        buffer = self.held.pop(number)
        length = data.draw(st.integers(0, written_whole(buffer)))
        left = length
        for gpa, size in buffer.writable:
            MEMORY.write(gpa, b"w" * min(left, size))
            left -= min(left, size)
        self.device.put(buffer, length, skip)
        self.returned.append(self.told(buffer, length))

    def told(self, buffer: Buffer, length: int) -> tuple[int, int, int]:
        return buffer.name, length, self.ring.chains[buffer.name].token

    @rule()
    def device_notifies(self) -> None:
        self.called |= self.device.call_wanted()
        if self.waiting and self.returned:
            assert self.called, "used buffers, but the call waited for does not come"

    @rule()
    def device_sleeps(self) -> None:
        self.asleep, self.kicked = not self.device.sleep(), False

    @rule()
    def device_is_busy(self) -> None:
        self.device.suppress(0, 0, DISABLE)
        self.asleep = self.kicked = False

    @rule()
    def driver_and_device_start_again(self) -> None:
        """A device that returns all it took goes on where its base says."""
        for buffer in self.held:
            self.device.put(buffer)
            self.returned.append(self.told(buffer, 0))
        self.held.clear()
        ring, at = self.ring, self.device.used | self.device.used_wrap << 15
        assert ring.base == at * 0x10001
        self.device = PackedDevice(MEMORY, ring.num, ring.desc, ring.avail, ring.used, ring.base)
        self.device.event_idx = ring.event_idx
        self.device.suppress(0, 0, DISABLE)
        self.asleep = self.kicked = self.waiting = False

    @precondition(lambda self: hasattr(self, "ring"))
    @invariant()
    def no_kick_is_lost(self) -> None:
        if self.asleep:
            assert self.kicked == self.device.is_available(), "a kick exactly when it was asked for"

    @precondition(lambda self: hasattr(self, "ring"))
    @invariant()
    def descriptors_are_somewhere(self) -> None:
        out = sum(len(chain.ids) for chain in self.ring.chains.values())
        assert out + len(self.ring.free) == self.ring.num
        assert self.ring.pending() == len(self.returned)


def written_whole(buffer: Buffer) -> int:
    return sum(size for _, size in buffer.writable)


Conversation.TestCase.settings = settings(deadline=None, max_examples=60, stateful_step_count=60)
test_conversation = Conversation.TestCase


# --- events ---------------------------------------------------------------------------------------


@given(
    num=NUMS,
    data=st.data(),
    flags=st.sampled_from([ENABLE, DISABLE, AT_DESC]),
    wrap=st.integers(0, 1),
)
def test_when_a_kick_is_wanted(num: int, data: st.DataObject, flags: int, wrap: int) -> None:
    """Of the descriptors made available, one is the one the device named, lap and all (2.8.10)."""
    ring, device = pair(num, event_idx=True)
    for _ in range(data.draw(st.integers(0, 2 * num))):
        ring.add([Segment(SPARE, 8)])
        ring.publish()
        taken = device.take()
        assert taken
        device.put(taken)
        ring.reap()
    index = data.draw(st.integers(0, num - 1))
    device.suppress(index, wrap, flags)
    named, at, lap = False, device.avail, device.avail_wrap
    assert not ring.publish(), "nothing is new"
    for _ in range(data.draw(st.integers(1, num))):
        ring.add([Segment(SPARE, 8)])
        named |= (at, lap) == (index, wrap)
        at, lap = (0, 1 - lap) if at + 1 == num else (at + 1, lap)
    assert ring.publish() == (named if flags == AT_DESC else flags == ENABLE)
    assert not ring.publish(), "nothing is new"


@pytest.mark.parametrize("ahead", [0, 1, 4, 6])
def test_a_call_some_buffers_later(ahead: int) -> None:
    ring, device = pair(7, event_idx=True)
    for _ in range(12):
        ring.call_at(ahead)
        for _ in range(7):
            ring.add([Segment(SPARE, 8)])
        ring.publish()
        for number in range(7):
            taken = device.take()
            assert taken
            device.put(taken)
            assert device.call_wanted() == (number == ahead)
        assert len(ring.reap()) == 7


def test_a_chain_is_unseen_until_it_is_published() -> None:
    ring, device = pair(5)
    ring.add([Segment(SPARE, 8), Segment(SPARE, 8)])
    ring.add([Segment(SPARE, 8)])
    assert device.take() is None
    ring.publish()
    assert device.take() and device.take() and not device.take()


# --- faults ---------------------------------------------------------------------------------------


def lie(ring: PackedRing, device: PackedDevice, first: Buffer, **wrong: int) -> None:
    """A used descriptor with something other than what would be right."""
    marks = (AVAIL | USED) * device.used_wrap
    said = {"name": first.name, "length": 0, "flags": marks, **wrong}
    device.mark(**said)


def poke(gpa: int, data: bytes = b"x") -> None:
    MEMORY.write(gpa, data)


def skip_over(ring: PackedRing, device: PackedDevice, first: Buffer) -> None:
    second = device.take()
    assert second
    device.put(second)
    device.put(first)


def write_skipped(ring: PackedRing, device: PackedDevice, first: Buffer) -> None:
    device.put(first)
    poke(ring.desc + 16 * (device.used - 1))


def use_twice(ring: PackedRing, device: PackedDevice, first: Buffer) -> None:
    device.put(first)
    device.put(first)


def use_all_and_one_more(ring: PackedRing, device: PackedDevice, first: Buffer) -> None:
    second = device.take()
    assert second
    device.put(first)
    device.put(second)
    device.put(second)


def use_unpublished(ring: PackedRing, device: PackedDevice, first: Buffer) -> None:
    second = device.take()
    assert second
    device.put(first)
    device.put(second)
    device.put(Buffer(ring.add([Segment(SPARE, 8)]), 1))


def write_and_put(ring: PackedRing, device: PackedDevice, first: Buffer, at: int) -> None:
    poke(at)
    device.put(first, 1)


# Two buffers are out: one of a readable and a writable descriptor (10 bytes), and one more.
FAULTS: dict[str, Callable[[PackedRing, PackedDevice, Buffer], None]] = {
    "an id that is not out": lambda r, d, f: lie(r, d, f, name=f.name ^ 1),
    "the place for an id": lambda r, d, f: lie(r, d, f, name=d.used),
    "the id of a descriptor before the last": lambda r, d, f: lie(r, d, f, name=d.read(d.used)[2]),
    "USED alone": lambda r, d, f: lie(r, d, f, flags=USED * d.used_wrap or AVAIL),
    "NEXT in a used descriptor": lambda r, d, f: lie(
        r, d, f, flags=(AVAIL | USED) * d.used_wrap | NEXT),
    "more than there is room for": lambda r, d, f: d.put(f, 11),
    "a length nobody may look at": lambda r, d, f: lie(r, d, f, length=5),
    "WRITE, but nothing written": lambda r, d, f: lie(
        r, d, f, flags=(AVAIL | USED) * d.used_wrap | WRITE),
    "used twice": use_twice,
    "more than was offered": use_all_and_one_more,
    "used before it was published": use_unpublished,
    "a skipped descriptor written": write_skipped,
    "written behind a buffer": lambda r, d, f: write_and_put(r, d, f, sum(f.writable[0])),
    "written what is to be read": lambda r, d, f: write_and_put(r, d, f, f.readable[0][0]),
    "written behind the ring": lambda r, d, f: write_and_put(r, d, f, r.desc + 16 * r.num),
    "the driver's own area written": lambda r, d, f: poke(r.avail),
}  # fmt: skip


@pytest.mark.parametrize("turns", [0, 3, 4])
@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found(name: str, turns: int) -> None:
    """Wherever in the ring they happen; without them nothing is found."""
    for wrong in (False, True):
        ring, device = pair(7)
        first = two_out(ring, device, turns)
        if wrong:
            FAULTS[name](ring, device, first)
            with pytest.raises(RingFault):
                ring.reap()
        else:
            device.put(first, 1)
            assert len(ring.reap()) == 1


def two_out(ring: PackedRing, device: PackedDevice, turns: int) -> Buffer:
    """After some buffers have come and gone, two are out; the device has taken the first."""
    for _ in range(turns):
        ring.add([Segment(SPARE, 8), Segment(SPARE, 8)])
        ring.publish()
        taken = device.take()
        assert taken
        device.put(taken)
        ring.reap()
    segments = ring.scatter(ring.free[0], (10, 10), True)
    ring.add([Segment(segments[0].gpa, 10), segments[1]])
    ring.add(ring.scatter(ring.free[0], (20,), True))
    ring.publish()
    first = device.take()
    assert first
    return first


SUPPRESSIONS = {
    "reserved flags": (0, 1, 3, True),
    "flags beyond two bits": (0, 1, 4, True),
    "a descriptor without EVENT_IDX": (0, 1, AT_DESC, False),
    "a descriptor the ring does not have": (7, 1, AT_DESC, True),
}


@pytest.mark.parametrize("name", SUPPRESSIONS)
def test_event_suppression_that_is_not_allowed(name: str) -> None:
    *area, event_idx = SUPPRESSIONS[name]
    ring, device = pair(7, event_idx=event_idx)
    device.suppress(*area)
    ring.add([Segment(SPARE, 8)])
    with pytest.raises(RingFault):
        ring.publish()


# --- order ----------------------------------------------------------------------------------------


def test_packed_out_of_order_is_not_in_order() -> None:
    """With IN_ORDER the second buffer stands for the first as well."""
    for in_order in (False, True):
        ring, device = pair(7, in_order=in_order)
        first = two_out(ring, device, 0)
        skip_over(ring, device, first)
        if in_order:
            with pytest.raises(RingFault, match="skipped"):
                ring.reap()
        else:
            assert len(ring.reap()) == 2


def test_packed_batch_in_order() -> None:
    """One descriptor for two buffers (2.8.8): the first is full."""
    for in_order in (False, True):
        ring, device = pair(7, in_order=in_order)
        first = two_out(ring, device, 2)
        second = device.take()
        assert second
        device.put(second, 3, skip=first.count + second.count)
        assert [entry[:2] for entry in ring.reap()] == [
            *([(first.name, 10)] if in_order else []), (second.name, 3),
        ]  # fmt: skip
        stands = device.used | device.used_wrap << 15
        assert (ring.base == stands * 0x10001) == in_order


def split_out(in_order: bool, count: int = 3) -> list[int]:
    SPLIT.reset()
    SPLIT.in_order = in_order
    heads = [SPLIT.add(SPLIT.scatter(SPLIT.free[0], (10,), True)) for _ in range(count)]
    SPLIT.publish()
    return heads


def use_split(number: int, head: int, length: int, index: int) -> None:
    """A used element, and the used index."""
    at = SPLIT.used + 4 + 8 * number
    MEMORY.write(at, head.to_bytes(4, "little") + length.to_bytes(4, "little"))
    MEMORY.write(SPLIT.used + 2, index.to_bytes(2, "little"))


def test_split_batch_in_order() -> None:
    """One element for three buffers (2.7.9): the first two are full."""
    heads = split_out(True)
    use_split(0, heads[2], 4, 3)
    assert [entry[:2] for entry in SPLIT.reap()] == [(heads[0], 10), (heads[1], 10), (heads[2], 4)]
    assert len(SPLIT.free) == 8 and not SPLIT.pending()


def test_split_out_of_order_is_not_in_order() -> None:
    for in_order in (False, True):
        heads = split_out(in_order)
        use_split(0, heads[1], 4, 1)
        if in_order:
            with pytest.raises(RingFault, match="jumps over"):
                SPLIT.reap()
        else:
            assert [entry[:2] for entry in SPLIT.reap()] == [(heads[1], 4)]


def test_split_descriptors_are_used_in_ring_order() -> None:
    """Driver's side of IN_ORDER: from descriptor 0 on, the next is the next (2.7.9)."""
    following = 0
    split_out(True, 0)
    for turn in range(20):
        count = turn % 3 + 1
        head = SPLIT.add([Segment(SPARE, 8)] * count)
        SPLIT.publish()
        assert SPLIT.chains[head].ids == [(following + n) % 8 for n in range(count)]
        following += count
        use_split(turn % 8, head, 0, turn + 1)
        assert len(SPLIT.reap()) == 1


@pytest.mark.parametrize("wrong", ["written behind", "read-only written", "too long"])
def test_split_faults_are_found(wrong: str) -> None:
    SPLIT.reset()
    SPLIT.in_order = False
    segments = SPLIT.scatter(SPLIT.free[0], (10, 10), True)
    readable = Segment(segments[0].gpa, 10)
    SPLIT.add([readable, segments[1]])
    SPLIT.publish()
    if wrong == "written behind":
        poke(segments[1].gpa + 10)
    elif wrong == "read-only written":
        poke(readable.gpa + 9)
    use_split(0, 0, 11 if wrong == "too long" else 10, 1)
    with pytest.raises(RingFault):
        SPLIT.reap()


# --- raw descriptors ------------------------------------------------------------------------------


def test_raw_descriptors_are_what_they_are() -> None:
    """Hostile tests write what they like; the marks of the lap are added, or taken away."""
    ring, device = pair(3)
    ring.offer([(-1, 0xFFFFFFFF, NEXT, 0), (5, 6, WRITE | INDIRECT, 0)])
    ring.publish()
    assert device.read(0)[:2] == ((1 << 64) - 1, 0xFFFFFFFF)
    assert device.read(0)[3] == NEXT | AVAIL
    assert device.read(1)[:2] == (5, 6) and device.read(1)[3] == WRITE | INDIRECT | AVAIL
    assert list(ring.chains) == [device.read(1)[2]]
    ring.put_descs([(7, 8, AVAIL | USED, 9)])
    ring.publish()
    assert device.read(2) == (7, 8, 9, USED)


def test_ids_are_not_places() -> None:
    """Any 16 bits may be one; no two buffers that are out share one."""
    seen = set()
    for num, ring in RINGS.items():
        ring.reset()
        names = [ring.add([Segment(SPARE, 8)]) for _ in range(num)]
        assert len(set(names)) == num
        assert sum(name == place for place, name in enumerate(names)) <= num // 5
        seen |= set(names)
    assert 0xFFFF in seen and 0 in seen
