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


@pytest.mark.parametrize("first", range(FIRST, FIRST + COUNT, BATCH))
def test_days(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(first, min(first + BATCH, FIRST + COUNT)):
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
