"""The timer wheel against a list of deadlines: nothing lost, nothing late, no needless wake-up."""

from __future__ import annotations

import pytest
from compiled import Leaves, area
from hypothesis import given
from hypothesis import strategies as st

from flows import expiry
from shm.layout import View
from shm.schema import FLOWS_MAX

E = Leaves("flows.expiry")
WHEEL_AT, WHEEL_BYTES = area(4096)
NODES, NODE_BYTES = area(expiry.NODES_BYTES)
HEADS, HEAD_BYTES = area(expiry.HEADS_BYTES)
WHEEL = View(expiry.WHEEL, WHEEL_BYTES, 0)
TICK_MS = 1 << expiry.TICK_BITS
REACH_MS = 38 * 3600 * 1000
YEAR_MS = 365 * 86400 * 1000

FLOWS = [*range(9), FLOWS_MAX - 1]
STARTS = st.one_of(
    st.integers(0, 10_000),
    st.integers(0, 3 * YEAR_MS),
    st.integers((TICK_MS << 32) - 300_000, (TICK_MS << 32) + 10),  # the 32-bit tick wraps
)
DELAYS = st.one_of(
    st.integers(-5000, 100),
    st.integers(0, 3000),
    st.integers(0, 10 * 60_000),
    st.integers(0, REACH_MS),
    st.integers(REACH_MS, YEAR_MS),
)
JUMPS = st.one_of(
    st.integers(0, 20),
    st.integers(0, 3000),
    st.integers(0, 20 * 60_000),
    st.integers(0, 3 * REACH_MS),
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["arm", "arm_by"]), st.sampled_from(FLOWS), DELAYS),
        st.tuples(st.just("later"), st.sampled_from(FLOWS), DELAYS),
        st.tuples(st.just("cancel"), st.sampled_from(FLOWS), st.just(0)),
        st.tuples(st.just("go"), st.just(0), JUMPS),
        st.tuples(st.just("sleep"), st.just(0), st.just(0)),
    ),
    max_size=40,
)


class Timers:
    """A worker's use of the wheel: deadlines in a dictionary, as they stand in flow.deadline_ms."""

    def __init__(self, now_ms: int) -> None:
        NODE_BYTES[: 16 * len(FLOWS)] = bytes(16 * len(FLOWS))
        NODE_BYTES[-16:] = bytes(16)
        HEAD_BYTES[:] = bytes(len(HEAD_BYTES))
        WHEEL_BYTES[: expiry.WHEEL.size] = bytes(expiry.WHEEL.size)
        WHEEL["nodes"], WHEEL["heads"] = NODES, HEADS
        WHEEL["tick"] = now_ms >> expiry.TICK_BITS
        self.now_ms = now_ms
        self.deadlines: dict[int, int] = {}
        self.early = 0
        self.tick = WHEEL["tick"]

    def arm(self, index: int, deadline_ms: int) -> None:
        self.deadlines[index] = max(deadline_ms, self.now_ms)  # the past is now
        E.arm(WHEEL_AT, index, deadline_ms)

    def arm_by(self, index: int, deadline_ms: int) -> None:
        self.deadlines[index] = max(deadline_ms, self.now_ms)
        E.arm_by(WHEEL_AT, index, deadline_ms)

    def cancel(self, index: int) -> None:
        self.deadlines.pop(index, None)
        E.cancel(WHEEL_AT, index)

    def run(self, now_ms: int) -> list[int]:
        """What has come due by `now_ms`; the early ones are armed again, as breath.py does."""
        self.now_ms = now_ms
        done = []
        for _ in range(8 * len(FLOWS)):
            index = E.due(WHEEL_AT, now_ms)
            if index < 0:
                break
            assert index in self.deadlines, "handed out twice, or never armed"
            if self.deadlines[index] > now_ms:
                self.early += 1
                E.arm(WHEEL_AT, index, self.deadlines[index])
            else:
                del self.deadlines[index]
                done.append(index)
        else:
            raise AssertionError("the wheel hands out for ever")
        self.check()
        return done

    def check(self) -> None:
        assert WHEEL["count"] == len(self.deadlines)
        assert WHEEL["tick"] >= self.tick, "time does not run back"
        self.tick = WHEEL["tick"]
        next_ms = E.next_ms(WHEEL_AT)
        if not self.deadlines:
            assert next_ms == -1
            return
        earliest_ms = min(self.deadlines.values())
        assert earliest_ms >> expiry.TICK_BITS >= self.now_ms >> expiry.TICK_BITS, "one is late"
        assert self.now_ms < next_ms, "a worker would not sleep"
        assert next_ms <= (earliest_ms // TICK_MS + 1) * TICK_MS, "a worker would oversleep"


@given(STARTS, STEPS)
def test_against_a_list(start_ms, steps):
    timers = Timers(start_ms)
    for operation, index, amount_ms in steps:
        deadline_ms = max(timers.now_ms + amount_ms, 0)
        if operation in ("arm", "arm_by"):
            getattr(timers, operation)(index, deadline_ms)
        elif operation == "later" and index in timers.deadlines:
            # a moved deadline is only a store: the wheel learns of it when the slot comes due
            timers.deadlines[index] = max(timers.deadlines[index], deadline_ms)
        elif operation == "cancel":
            timers.cancel(index)
        elif operation == "go":
            timers.run(timers.now_ms + amount_ms)
        elif operation == "sleep" and (next_ms := E.next_ms(WHEEL_AT)) >= 0:
            timers.run(max(next_ms, timers.now_ms))
    timers.run(timers.now_ms + 2 * YEAR_MS)
    assert timers.deadlines == {} or min(timers.deadlines.values()) >= timers.now_ms


@given(STARTS, st.integers(0, REACH_MS))
def test_one_timer_costs_few_wake_ups(start_ms, delay_ms):
    """One wake-up a level, the last within a tick after the deadline, never before it."""
    timers = Timers(start_ms)
    timers.arm(3, start_ms + delay_ms)
    wakes = 0
    while timers.deadlines:
        now_ms = E.next_ms(WHEEL_AT)
        timers.run(now_ms)
        wakes += 1
        assert wakes <= expiry.LEVELS + 1
    assert start_ms + delay_ms <= now_ms <= start_ms + delay_ms + TICK_MS


BORDERS = [expiry.SLOTS**level + off for level in (1, 2, 3) for off in (-257, -256, -1, 0, 1, 256)]


@pytest.mark.parametrize("ticks", BORDERS)
@pytest.mark.parametrize("offset", [0, 1, 255, 256, 65535, 65536 - 256])
def test_the_borders_of_levels(offset, ticks):
    """A slot is one turn of its level away, and not quite, and a little more."""
    timers = Timers((70 * 65536 + offset) * TICK_MS)
    deadline_ms = timers.now_ms + ticks * TICK_MS
    timers.arm(3, deadline_ms)
    timers.arm(4, deadline_ms + 256 * TICK_MS)
    timers.arm(5, deadline_ms - TICK_MS)
    while timers.deadlines:
        timers.run(E.next_ms(WHEEL_AT))
    assert timers.now_ms <= deadline_ms + 257 * TICK_MS
    assert timers.early <= 3 * expiry.LEVELS


@given(STARTS, st.lists(st.integers(0, 3 * REACH_MS), min_size=1, max_size=len(FLOWS)))
def test_sleeping_until_next_is_in_time_for_all(start_ms, delays):
    timers = Timers(start_ms)
    for index, delay_ms in zip(FLOWS, delays, strict=False):
        timers.arm_by(index, start_ms + delay_ms)
    for delay_ms in sorted(delays):
        while min(timers.deadlines.values(), default=1 << 62) <= start_ms + delay_ms:
            timers.run(E.next_ms(WHEEL_AT))
            assert timers.now_ms <= start_ms + delay_ms + TICK_MS
    assert timers.deadlines == {}


def test_a_timer_that_moves_with_every_packet_costs_nothing():
    """arm_by with a later time leaves the wheel alone; with an earlier one it does not."""
    timers = Timers(1_000_000)
    timers.arm(1, 1_001_000)
    before = NODE_BYTES[:160], HEAD_BYTES[:]
    for later_ms in range(1_001_000, 1_400_000, 997):
        timers.arm_by(1, later_ms)
    assert (NODE_BYTES[:160], HEAD_BYTES[:]) == before
    timers.deadlines[1] = 1_000_500
    timers.arm_by(1, 1_000_500)
    assert timers.run(1_000_499) == [] and timers.run(1_000_508) == [1]


def test_an_earlier_time_counts_after_a_year_of_uptime():
    """Ticks are kept as 32 bits, which is 397 days."""
    start_ms = (TICK_MS << 32) - 1000
    timers = Timers(start_ms)
    timers.arm(1, start_ms + 300_000)
    timers.arm_by(1, start_ms + 2000)
    assert timers.run(start_ms + 2008) == [1]
    timers = Timers((TICK_MS << 32) + 5000)
    timers.arm(1, timers.now_ms + 300_000)
    timers.arm_by(1, timers.now_ms + 200)
    assert timers.run(timers.now_ms + 208) == [1]


def test_cancelling_one_leaves_its_neighbours():
    """Flows in one slot are a list: first, middle, last, and one that is in no list."""
    for gone in FLOWS:
        timers = Timers(50_000)
        for index in FLOWS[:-1]:
            timers.arm(index, 60_000)
        timers.cancel(gone)
        timers.cancel(gone)
        assert sorted(timers.run(70_000)) == [index for index in FLOWS[:-1] if index != gone]
