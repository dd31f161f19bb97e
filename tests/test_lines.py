"""Lines of flows against lists: who comes first, who is woken, and that nobody is lost.

The flows are entries of a table without sockets, worker 0's; the receive rings are pairs 0 and 1.
What `unblock` wakes is read from the list of flows to settle.
"""

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from compiled import Leaves
from hypothesis import example, given
from hypothesis import strategies as st

from dataplane.context import LINE_WAITS, NOBODY, Context
from dataplane.lifecycle import ELSE, FIRST_RING, FIRST_WORKER, SERVED
from flows.table import TABLE
from shm import schema
from shm.layout import View
from shm.segment import Segment

L = Leaves("dataplane.lifecycle")
WORKERS = 3
LINES = [ELSE, FIRST_WORKER + 1, FIRST_RING, FIRST_RING + 1]
FLOWS = [0, 1, 2, schema.FLOWS_MAX - 1]
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("block"), st.sampled_from(FLOWS), st.sampled_from(LINES)),
        st.tuples(st.just("must_wait"), st.sampled_from(FLOWS), st.sampled_from(LINES)),
        st.tuples(st.just("leave"), st.sampled_from(FLOWS), st.just(0)),
        st.tuples(st.just("served"), st.sampled_from(FLOWS), st.booleans()),
        st.tuples(st.just("fill"), st.just(0), st.sampled_from(LINES[2:])),
        st.tuples(st.just("next"), st.just(0), st.sampled_from(LINES)),
        st.tuples(st.just("unblock"), st.just(0), st.sampled_from(LINES)),
        st.tuples(st.just("room"), st.just(0), st.just(0)),
    ),
    min_size=10,
    max_size=60,
)
_names = itertools.count()


class Lines:
    """A worker's lines, and beside each the list that it must be."""

    def __init__(self, context: Context) -> None:
        self.context, self.w = context, context.address
        table = context.arena.take(TABLE.size, "table")
        View(TABLE, context.arena.buffer(table), 0)["flows"] = context.view["flows"]
        context.view["table"] = table
        self.model: dict[int, list[int]] = {line: [] for line in LINES}
        self.has_served: set[int] = set()
        self.starved: set[int] = set()

    def flow(self, index: int) -> View:
        offset = self.context.view["flows"] - self.context.segment.address
        base = offset + index * schema.FLOW.size
        return View(schema.FLOW, self.context.segment.buffer, base)

    def at(self, index: int) -> int:
        return int(self.context.view["flows"]) + index * schema.FLOW.size

    def where(self, index: int) -> int:
        return next((line for line, flows in self.model.items() if index in flows), 0)

    def _put(self, index: int, line: int) -> None:
        if self.where(index) != line:
            self._remove(index)
            self.model[line].append(index)

    def _remove(self, index: int) -> None:
        for flows in self.model.values():
            if index in flows:
                flows.remove(index)

    # --- steps ---

    def block(self, index: int, line: int) -> None:
        self._put(index, line)
        if line >= FIRST_RING:
            self.starved.add(line)
        L.block(self.w, self.at(index), index, line)

    def must_wait(self, index: int, line: int) -> None:
        waits = self.where(index) == line
        if not waits:
            self._remove(index)
            if line in self.starved and self.model[line]:
                self._put(index, line)
                waits = True
        assert L.must_wait(self.w, self.at(index), index, line) == waits

    def leave(self, index: int, _: int) -> None:
        self._remove(index)
        L.leave(self.w, self.at(index))

    def served(self, index: int, yes: int) -> None:
        """Whether it had something when it was settled last."""
        (self.has_served.add if yes else self.has_served.discard)(index)
        flow = self.flow(index)
        flow["flags"] = flow["flags"] & ~SERVED | (SERVED if yes else 0)

    def fill(self, _: int, line: int) -> None:
        self.starved.discard(line)
        self.context.ring(2 * (line - FIRST_RING))["starved"] = 0

    def next(self, _: int, line: int) -> None:
        assert L.somebody_waits(self.w, line) == bool(self.model[line])
        if self.model[line]:
            assert L.next_waiting(self.w, line) == self.model[line].pop(0)

    def unblock(self, _: int, line: int) -> None:
        L.unblock(self.w, line)
        assert self.touched() == tuple(self._woken(line))

    def room(self, _: int, __: int) -> None:
        L.room_made(self.w)
        lines = [line for line in LINES if line < FIRST_RING]
        assert self.touched() == tuple(index for line in lines for index in self._woken(line))

    def _woken(self, line: int) -> list[int]:
        flows, self.model[line] = self.model[line], []
        return sorted(flows, key=lambda index: index in self.has_served)

    def touched(self) -> tuple[int, ...]:
        """The flows that are to be settled; then they have been."""
        found = self._words("dirty", self.context.view["dirty_count"])
        self.context.view["dirty_count"] = 0
        for index in found:
            flow = self.flow(index)
            flow["flags"] &= SERVED
        return found

    def _words(self, scratch: str, count: int) -> tuple[int, ...]:
        return struct.unpack(f"<{count}I", self.context.scratch(scratch)[: 4 * count])

    # --- what must hold ---

    def check(self) -> None:
        ends = self._words("lines", 2 * (LINES[-1] + 1))
        for line, flows in self.model.items():
            both = (flows[0], flows[-1]) if flows else (NOBODY, NOBODY)
            assert ends[2 * line : 2 * line + 2] == both
            assert [self.flow(index)["line"] for index in flows] == [line] * len(flows)
            forth = [self.flow(index)["line_next"] for index in flows]
            back = [self.flow(index)["line_before"] for index in flows]
            assert (forth, back) == ([*flows[1:], NOBODY][: len(flows)], [NOBODY, *flows][:-1])
            if line >= FIRST_RING:
                starved = self.context.ring(2 * (line - FIRST_RING))["starved"]
                assert starved == (LINE_WAITS if line in self.starved else 0)
        assert all(self.flow(index)["line"] == self.where(index) for index in FLOWS)


@contextmanager
def worker() -> Iterator[Lines]:
    segment = Segment(f"/vhostmq-test-lines-{os.getpid()}-{next(_names)}", WORKERS, create=True)
    segment.unlink()
    context = Context(segment, 0, WORKERS)
    try:
        yield Lines(context)
    finally:
        context.close()
        segment.close()


@given(STEPS)
@example([("served", 0, 1), ("block", 0, ELSE), ("block", 1, ELSE), ("unblock", 0, ELSE)])
def test_lines_are_lists(steps: list[tuple[str, int, int]]) -> None:
    with worker() as lines:
        for step, index, line in steps:
            getattr(lines, step)(index, line)
            lines.check()
