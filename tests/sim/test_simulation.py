"""Many simulated days: `VHOSTMQ_SIM=first:count` says which seeds."""

from __future__ import annotations

import os

import pytest
from inprocess import no_leftovers
from sim.simulation import Simulation

from shm.jit import COMPILED

pytestmark = pytest.mark.skipif(
    COMPILED, reason="NOT TESTED here: a simulated kernel, which needs NUMBA_DISABLE_JIT=1"
)
FIRST, COUNT = map(int, os.environ.get("VHOSTMQ_SIM", "0:200").split(":"))
BATCH = 20


def lived(seed: int, monkeypatch: pytest.MonkeyPatch) -> Simulation:
    """One day, which is over."""
    with no_leftovers(), monkeypatch.context() as patch:
        day = Simulation(seed, patch)
        try:
            day.run()
        except Exception as error:
            again = f"VHOSTMQ_SIM={seed}:1 NUMBA_DISABLE_JIT=1 python -m pytest tests/sim"
            last = day.kernel.died_after or "none"
            raise AssertionError(f"again: {again} ({day.deaths} deaths, {last})") from error
        finally:
            day.close()
        return day


@pytest.mark.parametrize("first", range(FIRST, FIRST + COUNT, BATCH))
def test_days(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    days = [lived(seed, monkeypatch) for seed in range(first, min(first + BATCH, FIRST + COUNT))]
    judged, frames = sum(day.judged for day in days), sum(day.frames for day in days)
    assert len(days) < BATCH or judged > frames // 4, f"only {judged} of {frames} frames judged"


@pytest.mark.parametrize("seed", range(FIRST, FIRST + COUNT, BATCH))
def test_the_same_day_again(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One seed is one day: every system call and every frame is the same, and when it ends."""
    one, again = lived(seed, monkeypatch), lived(seed, monkeypatch)
    assert (one.kernel.trace, one.kernel.now_ns) == (again.kernel.trace, again.kernel.now_ns)
