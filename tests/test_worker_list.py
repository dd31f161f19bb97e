"""`vhostmq workers`: the load of each worker, from two readings of the counters."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from backend import Backend
from driver import Driver
from guest import Guest
from test_flow_list import instance

from control import worker_list
from shm import schema
from shm.layout import View

ROOT = Path(__file__).resolve().parent.parent


def test_what_grew_is_the_load() -> None:
    with instance(workers=2) as made:
        at = made.offsets
        shared = View(schema.INSTANCE, made.buffer, at.instance)
        shared["pairs"], shared["rx_enabled"] = 4, 0b0011
        for pair in range(4):
            shared.set_element("pair_worker", pair, pair % 2)
        blocks = [View(schema.WORKER, made.buffer, at.worker + n * 448) for n in range(2)]
        assert schema.WORKER.size == 448
        rings = [
            View(schema.QUEUE, made.buffer, at.queue + n * schema.QUEUE.size) for n in range(8)
        ]
        rings[1]["packets"] = blocks[0]["breaths"] = 1000
        before = worker_list.counters(made)
        blocks[0]["breaths"], blocks[0]["rehomed_flows"], blocks[1]["handoff_frames"] = 1500, 7, 80
        blocks[0].set_element("flows", 3, 5)
        blocks[1].set_element("flows", 3, (1 << 64) - 2)
        rings[1]["packets"], rings[5]["bytes"], rings[2]["packets"] = 1300, 10**9, 50
        first, second = worker_list.load(before, worker_list.counters(made), 2.0)
    assert set(first) == set(worker_list.COLUMNS)
    assert (first["breaths_s"], first["tx_frames_s"], first["tx_gbit_s"]) == (250, 150, 4.0)
    assert (first["pairs"], first["moved"], first["flows"]) == ([0], 7, 5)
    assert (second["rx_frames_s"], second["crossed_s"], second["flows"]) == (25, 40, -2)
    assert (second["pairs"], second["breaths_s"], second["cpu"]) == ([1], 0, 0)


def test_a_worker_that_was_started_again_has_no_negative_load() -> None:
    row = {"worker": 0, "pid": 1, "pairs": [], "flows": 0, "moved": 0, "restarts": 0, "cpu_s": 9.0,
           "breaths": 5, "handoff_frames": 5, "rx_packets": 5, "rx_bytes": 5, "tx_packets": 5,
           "tx_bytes": 5}  # fmt: skip
    (found,) = worker_list.load([row], [row | {"cpu_s": 0.1, "restarts": 1}], 1.0)
    assert found["cpu"] == 0 and found["restarts"] == 1


@pytest.mark.passt_lacks("shared counters")
def test_of_a_running_instance(make_backend) -> None:
    backend: Backend = make_backend("--queues", "2", "--workers", "2")
    guest = Guest(Driver(backend.path, pairs=2).start())
    guest.resolve()

    def said(*words: str) -> list[str]:
        command = [sys.executable, "-m", "control", "workers", "--pid", str(backend.pid), *words]
        done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True)
        return done.stdout.splitlines()

    head, *lines = said()
    assert head.split() == list(worker_list.COLUMNS) and len(lines) == 2
    rows = [json.loads(line) for line in said("--json")]
    assert [row["worker"] for row in rows] == [0, 1]
    assert [row["pairs"] for row in rows] == [[0], [1]]
    assert all(row["pid"] in backend.tree() and 0 <= row["cpu"] < 2 for row in rows)
    guest.drv.close()
