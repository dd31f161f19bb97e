"""balance.py - which worker serves which pair, while they run.

Theory      Pairs are dealt out in turn at first. The guest decides which of them are busy, and two
            busy ones may be one worker's while another has nothing to do. So every look (watch.py)
            the processor time of each worker and the bytes of each pair since the last one are
            taken, a worker's time is split over its pairs by bytes, and a pair moves when that
            makes the busiest worker less busy by GAIN at least:
              the busiest worker is above BUSY   for LOOKS_MAX looks in a row, else all stays
              of its pairs                       the one that leaves the lower maximum of the two
              goes to                            the worker that is the least busy
            Afterwards nothing moves for CALM_LOOKS. Flows follow by themselves (flows/steer.py).
Why so      A ring that moves is stopped for a moment, and every flow on it costs seven system
            calls: rare moves that pay, rather than an even load at every moment. A worker with one
            busy pair keeps it: no move can help.
Limits      Loads of the past second say what comes next. With more workers than processors a worker
            is never BUSY alone, and nothing moves.
Ownership   Decides; workers.py does it.
"""

from __future__ import annotations

from typing import NamedTuple

BUSY = 0.7
GAIN = 0.15
LOOKS_MAX = 3
CALM_LOOKS = 10


class Move(NamedTuple):
    """A pair that another worker should serve."""

    pair: int
    worker: int


def best_move(loads: list[float], shares: list[dict[int, float]]) -> Move | None:
    """The move that relieves the busiest worker most, or None when none does by GAIN.

    loads: processor seconds per second of each worker; shares: of each worker, the part of its
    load that is each of its pairs'.
    """
    busiest = max(range(len(loads)), key=loads.__getitem__)
    idlest = min(range(len(loads)), key=loads.__getitem__)
    if loads[busiest] < BUSY or len(shares[busiest]) < 2:
        return None
    found = []  # the higher of both loads afterwards, and the pair
    for pair, share in shares[busiest].items():
        part = share * loads[busiest]
        found.append((max(loads[busiest] - part, loads[idlest] + part), pair))
    highest, pair = min(found)
    return Move(pair, idlest) if highest <= loads[busiest] - GAIN else None


class Balance:
    """Looks at loads and says when a pair should move."""

    def __init__(self) -> None:
        self._cpu_s: list[float] = []
        self._bytes: list[int] = []
        self._at_s = 0.0
        self._calm = 0
        self._wanted = 0

    def look(
        self, now_s: float, cpu_s: list[float], pair_bytes: list[int], pair_worker: list[int]
    ) -> Move | None:
        """A move that is due. cpu_s of each worker, pair_bytes and pair_worker of each pair, all
        counted from whenever."""
        seconds, self._at_s = now_s - self._at_s, now_s
        loads = _grown(self._cpu_s, cpu_s, seconds)
        carried = _grown(self._bytes, pair_bytes, seconds)
        self._cpu_s, self._bytes = cpu_s, pair_bytes
        if len(loads) < 2 or self._calm > 0:
            self._calm = max(self._calm - 1, 0)
            return None
        move = best_move(loads, _shares(len(loads), carried, pair_worker))
        self._wanted = self._wanted + 1 if move else 0
        if move is None or self._wanted < LOOKS_MAX:
            return None
        self._wanted, self._calm = 0, CALM_LOOKS
        return move


def _grown(
    before: list[float] | list[int], now: list[float] | list[int], seconds: float
) -> list[float]:
    """By how much per second each has grown; nothing at the first look, or where it began anew."""
    if len(before) != len(now) or seconds <= 0:
        return []
    return [max(new - old, 0) / seconds for old, new in zip(before, now, strict=True)]


def _shares(workers: int, carried: list[float], pair_worker: list[int]) -> list[dict[int, float]]:
    """Of each worker: its pairs that carry anything, each with its part of all bytes."""
    found: list[dict[int, float]] = [{} for _ in range(workers)]
    for pair, amount in enumerate(carried):
        if amount > 0:
            found[pair_worker[pair]][pair] = amount
    for pairs in found:
        total = sum(pairs.values())
        for pair in pairs:
            pairs[pair] /= total
    return found
