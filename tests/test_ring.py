"""The ring of records: against a model in Python, across its end, between two processes."""

from __future__ import annotations

import os
import random
from collections import deque

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
        st.just(("get",)),
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

    def place(self, size: int) -> int | None:
        """The cursor at which a record of `size` bytes begins, None when there is no room."""
        need = 8 + -(-size // 8) * 8
        at = self.head
        if at % HANDOFF_BYTES + need > HANDOFF_BYTES:
            at = -(-at // HANDOFF_BYTES) * HANDOFF_BYTES
        return at if at + need - self.tail <= HANDOFF_BYTES else None


def take_oldest(model: Model) -> None:
    record = R.first(BASE)
    if not model.records:
        assert record == 0
        model.tail = model.head  # what remained was a skip mark
        return
    at, data, meta = model.records.popleft()
    assert record == BASE + HANDOFF.size + at % HANDOFF_BYTES + 8
    assert R.first(BASE) == record, "looking does not take"
    assert (R.length(record), R.meta(record)) == (len(data), meta)
    offset = record - BASE
    assert BYTES[offset : offset + len(data)] == data
    R.consume(BASE, record)
    model.tail = at + 8 + -(-len(data) // 8) * 8
    assert CURSORS["tail"] == model.tail


@given(start=STARTS, steps=STEPS)
def test_against_a_model(start, steps):
    CURSORS["head"] = CURSORS["tail"] = start
    model = Model(start)
    for number, step in enumerate(steps):
        if step[0] == "get":
            take_oldest(model)
            continue
        size, at = step[1], model.place(step[1])
        record = R.reserve(BASE, size)
        assert (record != 0) == (at is not None)
        if record == 0 or at is None:
            continue
        assert record == BASE + HANDOFF.size + at % HANDOFF_BYTES + 8
        assert at % HANDOFF_BYTES + 8 + size <= HANDOFF_BYTES
        model.head = at
        if step[0] == "put":
            used = min(step[2], size)  # less may be used than was asked for
            data = stamp(number, used)
            BYTES[record - BASE : record - BASE + used] = data
            R.commit(BASE, record, used, number)
            model.records.append((at, data, number))
            model.head = at + 8 + -(-used // 8) * 8
        assert CURSORS["head"] == model.head
    while model.records:
        take_oldest(model)
    assert R.first(BASE) == 0


def test_nothing_is_seen_before_it_is_committed():
    CURSORS["head"] = CURSORS["tail"] = HANDOFF_BYTES - 16
    record = R.reserve(BASE, 9)
    assert record == BASE + HANDOFF.size + 8, "it does not fit before the end"
    assert R.first(BASE) == 0, "only the skip mark is there"
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


def test_between_two_processes():
    base, shared = area(HANDOFF_STRIDE)
    sizes = sizes_of(1, 1500)

    def work(number):
        for index, size in enumerate(sizes):
            if number == 0:
                while (record := R.reserve(base, size)) == 0:
                    os.sched_yield()
                shared[record - base : record - base + size] = stamp(index, size)
                R.commit(base, record, size, index)
                continue
            while (record := R.first(base)) == 0:
                os.sched_yield()
            if (R.length(record), R.meta(record)) != (size, index):
                return 1
            if shared[record - base : record - base + size] != stamp(index, size):
                return 2
            R.consume(base, record)
        return 0

    assert sum(sizes) > 3 * HANDOFF_BYTES, "the end of the ring is crossed several times"
    assert in_processes(2, work) == [0, 0]
