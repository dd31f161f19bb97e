"""Which pair goes to which worker, and when."""

from __future__ import annotations

import re
import time

from backend import Backend
from driver import BASIC, GUEST_CSUM, MQ, Driver
from guest import Guest, random_bytes
from hypothesis import given
from hypothesis import strategies as st
from minitcp import established
from world import World

from control.balance import BUSY, CALM_LOOKS, GAIN, LOOKS_MAX, Balance, Move, best_move

loads = st.floats(0, 1)
workers = st.lists(
    st.tuples(loads, st.dictionaries(st.integers(0, 31), st.floats(0.01, 1), max_size=4)),
    min_size=2,
    max_size=5,
)


def test_two_busy_pairs_of_one_worker() -> None:
    assert best_move([0.9, 0.1], [{0: 0.5, 2: 0.5}, {}]) == Move(0, 1)
    assert best_move([0.1, 0.9], [{}, {1: 0.7, 3: 0.3}]) == Move(3, 0)


def test_what_would_not_help() -> None:
    """One busy pair, little gain, nobody busy."""
    assert best_move([1.0, 0.0], [{0: 1.0}, {}]) is None
    assert best_move([1.0, 0.0], [{0: 0.99, 2: 0.01}, {}]) is None
    assert best_move([0.9, 0.8], [{0: 0.5, 2: 0.5}, {1: 1.0}]) is None
    assert best_move([BUSY - 0.01, 0.0], [{0: 0.5, 2: 0.5}, {}]) is None


@given(workers)
def test_a_move_helps(found: list[tuple[float, dict[int, float]]]) -> None:
    """Whatever the loads: the two workers' maximum falls by GAIN, and the pair is the busiest's."""
    load = [one for one, _ in found]
    shares = [
        {pair: part / sum(pairs.values()) for pair, part in pairs.items()} for _, pairs in found
    ]
    move = best_move(load, shares)
    if move is None:
        return
    busiest = load.index(max(load))
    part = shares[busiest][move.pair] * load[busiest]
    assert load[busiest] >= BUSY and move.worker != busiest
    assert max(load[busiest] - part, load[move.worker] + part) <= load[busiest] - GAIN + 1e-9


def second(balance: Balance, now: int, cpu: tuple[float, float], serving: list[int]) -> Move | None:
    """A look at two workers that have used so much of every second, and four pairs of which 0 and 2
    carry everything."""
    return balance.look(
        float(now), [share * now for share in cpu], [1000 * now, 0, 1000 * now, 0], serving
    )


def test_a_move_waits_for_several_looks_and_then_for_calm() -> None:
    balance, serving = Balance(), [0, 1, 0, 1]
    found = [second(balance, now, (0.9, 0.1), serving) for now in range(40)]
    due = [now for now, move in enumerate(found) if move]
    assert found[due[0]] == Move(0, 1)
    assert due[0] == LOOKS_MAX, "the first look has nothing to compare with"
    assert due[1] - due[0] == CALM_LOOKS + LOOKS_MAX


def test_a_load_that_passes_moves_nothing() -> None:
    balance = Balance()
    cpu, moves = [0.0, 0.0], []
    for now in range(30):
        cpu[0] += 0.9 if now % 3 else 0.1
        moves.append(balance.look(float(now), [*cpu], [9 * now, 0, 9 * now, 0], [0, 1, 0, 1]))
    assert moves == [None] * 30


def test_a_worker_that_began_anew_has_no_load() -> None:
    """Its processor time starts at 0 again."""
    balance = Balance()
    for now in range(10):
        assert balance.look(float(now), [10.0 - now, 0.0], [now, 0, now, 0], [0, 1, 0, 1]) is None


def test_one_worker() -> None:
    balance = Balance()
    for now in range(10):
        assert balance.look(float(now), [float(now)], [now, now], [0, 0]) is None


REHOMED = "vhostmq_rehomed_flows_total"
MOVED = re.compile(r"pair (\d): worker (\d) serves it now")
PAIRS, MOVES, BLOCK = 4, 4, random_bytes(40_000)


def moved(backend: Backend) -> list[tuple[int, int]]:
    """(pair, its new worker) of every move so far."""
    found = (MOVED.search(line) for line in backend.lines)
    return [(int(match[1]), int(match[2])) for match in found if match]


def test_pairs_change_their_workers_while_they_run(world: World, compiled: None) -> None:
    """A real back-end under traffic on the pairs of one worker: some go to the other, again and
    again, and every stream goes on byte for byte; their flows follow."""
    words = ("--queues", str(PAIRS), "--workers", "2")
    backend = Backend(world, *words, program=("-m", "tests.balancing"))
    try:
        drv = Driver(backend.path, pairs=PAIRS, features=BASIC | GUEST_CSUM | MQ).start()
        guest = Guest(drv)
        guest.resolve()
        ends = [established(guest, world, 4, pair=pair) for pair in range(PAIRS)]
        deadline = time.monotonic() + 120
        while len(moves := moved(backend)) < MOVES:
            assert time.monotonic() < deadline, backend.tail()
            serving = {pair: pair % 2 for pair in range(PAIRS)} | dict(moves)
            most = max((0, 1), key=list(serving.values()).count)
            busy = [ends[pair] for pair, worker in serving.items() if worker == most]
            for tcp, peer in busy:
                del tcp.received[:], peer.inbox[:]
                tcp.send(BLOCK)
                peer.send(BLOCK)
            for tcp, peer in busy:
                guest.pump(lambda p=peer: len(p.inbox) >= len(BLOCK), 5, "the stream up")
                guest.pump(lambda t=tcp: len(t.received) >= len(BLOCK), 5, "the stream down")
                assert bytes(peer.inbox) == bytes(tcp.received) == BLOCK
        assert {worker for _, worker in moves} == {0, 1}, moves
        rehomed = [v for (n, _), v in backend.metrics().items() if n == REHOMED]
        assert sum(rehomed) > 0
        for tcp, _ in ends:
            tcp.check()
        drv.close()
    finally:
        backend.kill()
