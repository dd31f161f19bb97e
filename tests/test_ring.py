"""The ring of records: against a model in Python, across its end, between two processes."""

from __future__ import annotations

import os
import random
from collections import deque

import pytest
from compiled import Leaves, area, in_processes
from hypothesis import given
from hypothesis import strategies as st

from shm.layout import View
from shm.schema import HANDOFF, HANDOFF_BYTES, HANDOFF_STRIDE

R = Leaves("shm.ring")
SIZE_MAX = HANDOFF_BYTES // 2 - 8
BASE, BYTES = area(HANDOFF_STRIDE)
CURSORS = View(HANDOFF, BYTES, 0)

SIZES = st.one_of(
    st.integers(0, 100),
    st.integers(0, 100_000),
    st.integers(SIZE_MAX - 20, SIZE_MAX),
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), SIZES, SIZES),
        st.tuples(st.just("reserve"), SIZES),
        st.just(("walk",)),
        st.just(("walk",)),
        st.just(("give back",)),
        st.just(("die",)),
    ),
    max_size=60,
)
STARTS = st.one_of(
    st.integers(0, HANDOFF_BYTES // 8), st.integers(HANDOFF_BYTES // 8 - 10, HANDOFF_BYTES // 8)
).map(lambda words: 8 * words + 5 * HANDOFF_BYTES)


def stamp(number: int, size: int) -> bytes:
    return (number.to_bytes(4, "little") * (size // 4 + 1))[:size]


class Model:
    """What must be in the ring, and whether there is room, by the rule in ring.py's docstring."""

    def __init__(self, start: int) -> None:
        self.head = self.tail = start
        self.records: deque[tuple[int, bytes, int]] = deque()
        self.walked, self.record = 0, 0  # how many the consumer has looked at, the last one

    def place(self, size: int) -> int | None:
        """The cursor at which a record of `size` bytes begins, None when there is no room."""
        need = 8 + -(-size // 8) * 8
        at = self.head
        if at % HANDOFF_BYTES + need > HANDOFF_BYTES:
            at = -(-at // HANDOFF_BYTES) * HANDOFF_BYTES
        return at if at + need - self.tail <= HANDOFF_BYTES else None


def walk_on(model: Model) -> None:
    record = R.after(BASE, model.record) if model.walked else R.first(BASE)
    if model.walked == len(model.records):
        assert record == 0
        return
    at, data, meta = model.records[model.walked]
    assert record == BASE + HANDOFF.size + at % HANDOFF_BYTES + 8
    assert (R.length(record), R.meta(record)) == (len(data), meta)
    offset = record - BASE
    assert BYTES[offset : offset + len(data)] == data
    model.walked, model.record = model.walked + 1, record


def give_back(model: Model) -> None:
    """Everything that was looked at."""
    if model.walked == 0:
        return
    R.consume(BASE, model.record)
    for _ in range(model.walked):
        at, data, _ = model.records.popleft()
        model.tail = at + 8 + -(-len(data) // 8) * 8
    model.walked = 0


def consumer_step(model: Model, what: str) -> None:
    if what == "walk":
        walk_on(model)
    elif what == "give back":
        give_back(model)
    else:
        model.walked = 0  # a successor begins with the oldest
    assert CURSORS["tail"] == model.tail, "only giving back gives back"


@given(start=STARTS, steps=STEPS)
def test_against_a_model(start, steps):
    CURSORS["head"] = CURSORS["tail"] = start
    model = Model(start)
    for number, step in enumerate(steps):
        if len(step) == 1:
            consumer_step(model, step[0])
            continue
        size, at = step[1], model.place(step[1])
        record = R.reserve(BASE, size)
        assert (record != 0) == (at is not None)
        if record == 0 or at is None:
            continue
        assert record == BASE + HANDOFF.size + at % HANDOFF_BYTES + 8
        assert at % HANDOFF_BYTES + 8 + size <= HANDOFF_BYTES
        if step[0] == "put":
            used = min(step[2], size)  # less may be used than was asked for
            data = stamp(number, used)
            BYTES[record - BASE : record - BASE + used] = data
            R.commit(BASE, record, used, number)
            model.records.append((at, data, number))
            model.head = at + 8 + -(-used // 8) * 8
        assert CURSORS["head"] == model.head
    for _ in range(len(model.records) + 1 - model.walked):
        walk_on(model)
    give_back(model)
    assert not model.records and R.first(BASE) == 0


def test_nothing_is_seen_before_it_is_committed():
    CURSORS["head"] = CURSORS["tail"] = HANDOFF_BYTES - 16
    record = R.reserve(BASE, 9)
    assert record == BASE + HANDOFF.size + 8, "it does not fit before the end"
    assert R.first(BASE) == 0, "only the skip mark is there"
    assert CURSORS["head"] == CURSORS["tail"], "and nobody takes it for a record"
    R.commit(BASE, record, 9, 1)
    assert R.first(BASE) == record


def test_a_full_ring_takes_exactly_what_is_given_back():
    CURSORS["head"] = CURSORS["tail"] = 0
    count = HANDOFF_BYTES // 1024
    for number in range(count):
        R.commit(BASE, R.reserve(BASE, 1016), 1016, number)
    assert R.reserve(BASE, 0) == 0
    R.consume(BASE, R.first(BASE))
    assert R.reserve(BASE, 1017) == 0
    assert R.reserve(BASE, 1016) != 0


def test_a_full_ring_is_given_back_at_once():
    """Two records fill it: where the second ends, the first begins."""
    half = HANDOFF_BYTES // 2
    for start, behind in ((0, half), (half, half), (HANDOFF_BYTES - 1024, HANDOFF_BYTES - 1024)):
        CURSORS["head"] = CURSORS["tail"] = start
        for size in (HANDOFF_BYTES - behind - 8, behind - 8):
            R.commit(BASE, R.reserve(BASE, size), size, 0)
        assert CURSORS["head"] == start + HANDOFF_BYTES
        last = R.after(BASE, R.first(BASE))
        assert R.after(BASE, last) == 0
        R.consume(BASE, last)
        assert CURSORS["tail"] == CURSORS["head"]
        assert R.first(BASE) == 0


def test_the_bytes_skipped_at_the_end_count_as_used():
    """2000 bytes are free at the start and 16 at the end: no record of more than 2000 fits."""
    CURSORS["head"], CURSORS["tail"] = 2 * HANDOFF_BYTES - 16, HANDOFF_BYTES + 2000
    assert R.reserve(BASE, 2000 - 8 + 8) == 0
    assert CURSORS["head"] == 2 * HANDOFF_BYTES - 16, "and nothing was published"
    assert R.reserve(BASE, 2000 - 8) == BASE + HANDOFF.size + 8


def test_the_largest_record_always_fits_an_empty_ring():
    for start in range(0, HANDOFF_BYTES, HANDOFF_BYTES // 64 + 8):
        CURSORS["head"] = CURSORS["tail"] = start & ~7
        assert R.reserve(BASE, SIZE_MAX) != 0


def test_a_length_is_never_the_skip_mark():
    assert SIZE_MAX < R.SKIP


def sizes_of(seed: int, count: int) -> list[int]:
    chance = random.Random(seed)
    return [int(2 ** chance.uniform(0, 16)) for _ in range(count)]


@pytest.mark.parametrize("burst", [1, 5, 64])
def test_between_two_processes(burst):
    """The consumer takes up to so many at once; they stay what they are until given back."""
    base, shared = area(HANDOFF_STRIDE)
    sizes = sizes_of(1, 1500)

    def next_burst():
        found = [R.first(base)]
        while found[-1] and len(found) < burst:
            found.append(R.after(base, found[-1]))
        return [record for record in found if record]

    def produce():
        for index, size in enumerate(sizes):
            while (record := R.reserve(base, size)) == 0:
                os.sched_yield()
            shared[record - base : record - base + size] = stamp(index, size)
            R.commit(base, record, size, index)

    def consume():
        left = deque(enumerate(sizes))
        while left:
            while not (records := next_burst()):
                os.sched_yield()
            os.sched_yield()  # time for the producer to overwrite what it must not
            for record in records:
                index, size = left.popleft()
                if (R.length(record), R.meta(record)) != (size, index):
                    return 1
                if shared[record - base : record - base + size] != stamp(index, size):
                    return 2
            R.consume(base, records[-1])
        return 0

    def work(number):
        return consume() if number else produce()

    assert sum(sizes) > 3 * HANDOFF_BYTES, "the end of the ring is crossed several times"
    assert in_processes(2, work) == [0, 0]
