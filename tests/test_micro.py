"""The micro-benchmarks count what they say: nothing is measured here."""

from __future__ import annotations

import contextlib
import struct
import time

import numpy as np
import pytest

from benchmarks import micro, move
from flows import expiry, steer
from shm import schema
from shm.jit import COMPILED
from shm.layout import View


def test_timers_fall_due_in_time_and_are_set_again() -> None:
    """What timer_ns() counts: none is lost, and few are looked at before they are due."""
    bench, count, times = micro.Bench(), 50, 500
    x = bench.worker.context.view["wheel"]
    start_ms = time.monotonic_ns() // 1_000_000
    flows = np.arange(0, 100 * count, 100)
    deadlines_ms = np.zeros(100 * count, np.int64)
    deadlines_ms[flows] = start_ms + 1000 * (1 + np.arange(count))
    micro.arm_all(x, flows, deadlines_ms)
    looks = micro.expire_often(x, deadlines_ms, np.array([60_000]), times)
    wheel = View(expiry.WHEEL, bench.worker.context.arena.buffer(x), 0)
    assert wheel["count"] == count and times <= looks <= 3 * times
    end_ms = deadlines_ms.max() - 60_000
    due_ms = 50_000 + 9 * 60_000  # the last of ten rounds; two ticks late at most, each
    assert due_ms <= end_ms - start_ms <= due_ms + 10 * 16
    assert not deadlines_ms[1:100].any(), "other flows"
    bench.close()


@pytest.mark.skipif(not COMPILED, reason="NOT TESTED here: interpreted code takes minutes for it")
def test_a_larger_table_holds_more() -> None:
    """What lookup_in_larger_ns() counts: every flow has to find a place."""
    assert micro.lookup_in_larger_ns(schema.FLOWS_MAX + 1) > 0
    with pytest.raises(AssertionError):
        micro.lookup_ns(schema.FLOWS_MAX + 1)


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_chains_are_seen_and_returned(packed: bool) -> None:
    """What ring_ns() counts: each chain is walked, and the guest sees each that is returned."""
    with contextlib.closing(micro.Bench(packed)) as bench:
        if not packed:
            struct.pack_into("<H", bench.memory, micro.AVAIL + 2, 60)
        iov, scratch = (bench.worker.context.view[name] for name in ("chain_iov", "option"))
        assert micro.pop_often(bench.w, bench.ring_address, iov, 60, 3) == 180
        micro.push_often(bench.ring_address, scratch, 30, 2)
        if packed:
            flags = [bench.memory[micro.DESC + 16 * slot + 15] >> 7 for slot in range(61)]
            assert flags == [1] * 60 + [0]
        else:
            assert struct.unpack_from("<H", bench.memory, micro.USED + 2) == (60,)


@pytest.mark.skipif(
    not COMPILED, reason="NOT TESTED here: interpreted, a round takes longer than a flow to settle"
)
def test_flows_move_to_the_other_worker_and_back() -> None:
    """What costs_us() counts: frames of flows that have not settled cross, of those that have, the
    flows themselves move, all of them."""
    with contextlib.closing(move.Bench()) as bench:
        bench.send(0)
        homes = []
        for pair in (1, 0):
            bench.send(pair)
            bench.settle(0)
            bench.send(pair)
            assert bench.moved() == move.FLOWS * len(homes)
            bench.settle(steer.SETTLED_MS + 5)
            bench.send(pair)
            homes.append([flow["home"] for flow in bench.flows()])
        assert homes == [[1] * move.FLOWS, [0] * move.FLOWS]
        assert bench.moved() == 2 * move.FLOWS
