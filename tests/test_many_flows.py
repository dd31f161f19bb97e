"""A hundred thousand flows at once: what one costs in time and memory, beside what ten cost.

Their descriptors are missing (this many sockets no test may open), everything else is as it is with
real ones: entries, timers and gauges made by the data plane's own code, and one real connection and
one real conversation among them, served by real breaths. Interpreted, the same is done with 2000:
only the compiled run says something about time.
"""

from __future__ import annotations

import random
import socket
import statistics
import struct
import time
from collections.abc import Callable

import pytest
from compiled import Leaves
from guest import Guest, random_bytes
from inprocess import PROTOCOL, Local, local_guest
from minitcp import established, exchange
from world import World

from flows import expiry
from shm import schema
from shm.jit import COMPILED

FEW, MANY = 10, 100_000 if COMPILED else 2000
LIFE_S = 120
ENTRY_MAX = 256  # design: an entry is at most this
LOOKUP_S, BREATH_S = 8e-6, 10e-3  # and neither may be a search that costs the same for ten
SLOWER = 8  # a hundred thousand may cost so many times what ten cost: caches, not searches
STREAM = schema.STATES.index("stream")
FAR = bytes(10) + b"\xff\xff" + socket.inet_aton("203.0.113.1")
NEAR = bytes(10) + b"\xff\xff" + socket.inet_aton("198.51.100.2")

lifecycle, table, wheel = (
    Leaves("dataplane.lifecycle"),
    Leaves("flows.table"),
    Leaves("flows.expiry"),
)
timed = pytest.mark.skipif(
    not COMPILED, reason="NOT TESTED here: time says nothing about interpreted code"
)


@pytest.fixture
def guest(make_local: Callable[..., Guest]) -> Guest:
    return make_local()


def key_of(number: int) -> bytes:
    ports = struct.pack("<HHI", 1024 + number % 60_000, 1 + number // 60_000, PROTOCOL["udp"])
    return NEAR + FAR + ports


def put_key(drv: Local, number: int) -> int:
    """The key of a flow where the data plane keeps the one at hand; its address."""
    context = drv.workers[0].context
    context.scratch("key")[:40] = key_of(number)
    return context.view["key"]


def add(drv: Local, numbers: range, life_s: Callable[[int], float]) -> None:
    """Flows without descriptors, each to be forgotten after `life_s`."""
    context = drv.workers[0].context
    now_ms = time.monotonic_ns() // 1_000_000
    for number in numbers:
        index = lifecycle.open_flow(context.address, put_key(drv, number), 0, STREAM)
        assert index >= 0, f"flow {number} was refused"
        deadline_ms = now_ms + int(1000 * life_s(number))
        lifecycle.set_deadline(context.address, drv.flow_address(index), index, deadline_ms)


def shortest(work: Callable[[], float], rounds: int = 7) -> float:
    """The best of some measurements: what else the machine does only makes it slower."""
    return min(work() for _ in range(rounds))


def lookup_s(drv: Local, count: int) -> float:
    """Seconds per lookup of flows in random order, of which `count` exist."""
    found, t = table.find, drv.workers[0].context.view["table"]
    numbers = [random.randrange(count) for _ in range(5000)]
    keys = [key_of(number) for number in numbers]
    place, at = drv.workers[0].context.scratch("key"), drv.workers[0].context.view["key"]

    def once() -> float:
        start = time.perf_counter()
        for key in keys:
            place[:40] = key
            assert found(t, at) >= 0
        return (time.perf_counter() - start) / len(keys)

    return shortest(once)


def breath_s(guest: Guest, world: World) -> float:
    """Seconds per breath with 64 datagrams of one flow in it."""
    host = guest.with_host(world.udp(socket.AF_INET))
    drv = guest.drv

    def once() -> float:
        for _ in range(64):
            guest.send_udp(guest.gw4, 5000, host.port, b"x", publish=False)
        drv.publish(drv.tx(0))
        start = time.perf_counter()
        drv.breathe()
        return time.perf_counter() - start

    took = shortest(once, 30)
    guest.peers.remove(host)
    host.close()
    return took


@timed
def test_a_lookup_costs_the_same(guest: Guest) -> None:
    add(guest.drv, range(FEW), lambda number: LIFE_S)
    few = lookup_s(guest.drv, FEW)
    add(guest.drv, range(FEW, MANY), lambda number: LIFE_S)
    many = lookup_s(guest.drv, MANY)
    assert many < SLOWER * few, f"{few * 1e9:.0f} ns with {FEW} flows, {many * 1e9:.0f} ns now"
    assert many < LOOKUP_S, f"{many * 1e6:.0f} us"


@timed
def test_a_breath_costs_the_same(guest: Guest, world: World) -> None:
    few = breath_s(guest, world)
    add(guest.drv, range(MANY), lambda number: LIFE_S)
    many = breath_s(guest, world)
    assert many < SLOWER * few, f"{few * 1e6:.0f} us alone, {many * 1e6:.0f} us beside {MANY} flows"
    assert many < BREATH_S, f"{many * 1e3:.1f} ms"


@timed
def test_a_timer_costs_the_same(guest: Guest) -> None:
    """Setting one, and moving it with every packet, which is what happens most."""
    drv = guest.drv
    view = drv.workers[0].context.view
    now_ms = time.monotonic_ns() // 1_000_000

    def moved_s(count: int) -> float:
        add(drv, range(drv.flow_count(), count), lambda number: 1 + number % LIFE_S)
        indexes = random.choices(drv.flow_indexes(), k=5000)

        def once() -> float:
            start = time.perf_counter()
            for index in indexes:
                wheel.arm(view["wheel"], index, now_ms + 1000 + index)
                wheel.arm_by(view["wheel"], index, now_ms + 60_000)
            return (time.perf_counter() - start) / len(indexes)

        return shortest(once)

    few, many = moved_s(FEW), moved_s(MANY)
    assert many < SLOWER * few, f"{few * 1e9:.0f} ns with {FEW} flows, {many * 1e9:.0f} ns now"


def test_all_expire_at_once_and_hold_up_nobody(guest: Guest, world: World) -> None:
    """Their time comes in the same moment: each breath takes a bounded share of them, a connection
    goes on meanwhile, and then none is left.
    """
    tcp, peer = established(guest, world, 4)
    drv = guest.drv
    add(drv, range(MANY), lambda number: 0.0)
    time.sleep(0.02)
    left, took = [drv.flow_count()], []
    while left[-1] > 1:
        start = time.perf_counter()
        drv.breathe()
        took.append(time.perf_counter() - start)
        left.append(drv.flow_count())
        if len(took) == 3:
            exchange(guest, tcp, peer, random_bytes(20_000, 1), random_bytes(20_000, 2))
        assert len(took) < 2 * MANY / 256 + 20, f"{left[-1]} left after {len(took)} breaths"
    shares = [before - after for before, after in zip(left, left[1:], strict=False)]
    assert max(shares[:3]) <= 256 and min(shares[:3]) > 0
    assert len(drv.flow_indexes()) == 1
    if COMPILED:
        assert statistics.median(took) < 0.01, f"{statistics.median(took) * 1e3:.1f} ms a breath"
    exchange(guest, tcp, peer, b"all", b"gone")


def test_flows_at_rest_cost_nothing(guest: Guest) -> None:
    """None is due for minutes: no breath is needed for any of them."""
    add(guest.drv, range(MANY), lambda number: LIFE_S + number % 1000)
    guest.drv.settle()
    assert guest.drv.breaths_in(0.5) <= 4


def resident_bytes() -> int:
    """Memory of this process that is really there."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * schema.PAGE


def test_memory(world: World) -> None:
    """An entry, a tag, a timer and a place on the list of touched flows: no more for each, and
    nothing for those that are not there.
    """
    each = schema.FLOW.size + 4 + expiry.NODE_BYTES + 4
    assert schema.FLOW.size <= ENTRY_MAX and each <= ENTRY_MAX + 24
    guest = local_guest(world)
    try:
        add(guest.drv, range(FEW), lambda number: LIFE_S)  # and all code is compiled
        before = resident_bytes()
        add(guest.drv, range(FEW, 2 * FEW), lambda number: LIFE_S)
        assert resident_bytes() - before < 1 << 20
        add(guest.drv, range(2 * FEW, MANY), lambda number: LIFE_S)
        growth = resident_bytes() - before
        assert growth < schema.FLOWS_MAX * each + (4 << 20), f"{growth / MANY:.0f} bytes a flow"
    finally:
        guest.drv.close()
