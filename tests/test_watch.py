"""Which workers are found stuck, by the breaths they take."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from control import watch
from control.processes import process_cpu, stopped
from control.watch import LOOKS_MAX, Watch
from shm import schema
from shm.layout import View


def block(pid: int = 7) -> View:
    made = View(schema.WORKER, bytearray(schema.WORKER.size), 0)
    made["pid"] = pid
    return made


def looks(of: Watch, count: int) -> list[list[int]]:
    return [of.look() for _ in range(count)]


def test_one_that_breathes_is_not_stuck() -> None:
    one = block()
    found = Watch([one])
    for breath in range(10):
        one["breaths"] = breath
        assert found.look() == []


def test_one_that_waits_is_not_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "stopped", lambda pid: False)
    one = block()
    one["sleeping"] = 1
    assert looks(Watch([one]), 10) == [[]] * 10


def test_one_that_does_neither_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the look on at which it has been late often enough; the other one is not."""
    monkeypatch.setattr(watch, "stopped", lambda pid: False)
    one, other = block(7), block(8)
    other["sleeping"] = 1
    found = Watch([other, one])
    assert looks(found, LOOKS_MAX + 2) == [[]] * LOOKS_MAX + [[1], [1]]
    one["breaths"] += 1
    assert found.look() == []


def test_rest() -> None:
    """All wait, and none has taken a breath since the last look; until then, only."""
    one, gone = block(), block(0)
    found = Watch([one, gone])
    assert (looks(found, 2), found.resting) == ([[], []], False), "it does not wait"
    one["sleeping"] = 1
    assert (found.look(), found.resting, found.still()) == ([], True, True)
    one["sleeping"] = 0
    assert not found.still()
    one["sleeping"], one["breaths"] = 1, 1
    assert not found.still()
    assert (found.look(), found.resting) == ([], False)
    assert (found.look(), found.resting) == ([], True)


def test_one_that_is_stopped_is_stuck_even_if_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "stopped", lambda pid: True)
    one = block()
    one["sleeping"] = 1
    assert looks(Watch([one]), LOOKS_MAX + 1)[-1] == [0]


def test_another_process_begins_anew() -> None:
    """A new worker is not blamed for the breaths that the one before it did not take; no worker is
    never stuck."""
    one = block(7)
    found = Watch([one])
    looks(found, LOOKS_MAX)
    one["pid"] = 8
    assert looks(found, LOOKS_MAX) == [[]] * LOOKS_MAX
    one["pid"] = 0
    assert looks(found, 10) == [[]] * 10


def test_what_the_kernel_says_of_a_process() -> None:
    child = subprocess.Popen(["sleep", "60"])
    try:
        assert not stopped(child.pid)
        started = process_cpu(child.pid).started
        assert started > 0
        os.kill(child.pid, signal.SIGSTOP)
        deadline = time.monotonic() + 5
        while not stopped(child.pid):
            assert time.monotonic() < deadline, Path(f"/proc/{child.pid}/stat").read_text()
    finally:
        child.kill()
        child.wait()
    assert not stopped(child.pid) and process_cpu(child.pid) == (0, 0.0, 0.0)
    assert not stopped(0) and process_cpu(0) == (0, 0.0, 0.0)
