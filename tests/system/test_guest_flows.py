"""test_guest_flows.py - the connections of `vhostmq guest`, while flows change their queue and
processes are killed.

Theory      STREAMS verified transfers at a time over four pairs of two workers, over and over. What
            moves them to another queue is the TAP's steering program (benchmarks/hops.py): by
            itself a TAP does not look at the CPU a thread runs on, and it has no `ethtool -L`.
            Those two are tested in QEMU.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from backends import CHECKOUT, Backend, start_backend
from lab import PEER4, XFER_PORT, Lab
from traffic import MIB, check_transfers

from benchmarks import hops, measure
from benchmarks.guest.prepare import Images
from benchmarks.guest.process import Process

PAIRS, WORKERS = 4, 2
STREAMS, SIZE = 32, 4 * MIB
KILLS, KILL_EVERY_S = 15, 2.0
HOPS_PER_S, HOP_S = 10, 10.0

pytestmark = pytest.mark.passt_lacks("workers and queue pairs")


@pytest.fixture(scope="module")
def backend(lab: Lab) -> Iterator[Backend]:
    """Fewer workers than pairs."""
    backend = start_backend(lab, PAIRS, "--workers", str(WORKERS))
    yield backend
    backend.stop()


@contextmanager
def transfers(lab: Lab, images: Images, backend: Backend) -> Iterator[Process]:
    """Down and up in turn, until the block ends; then every stream of each must be whole."""
    enough = lab.directory / "enough"
    enough.unlink(missing_ok=True)
    ways = [
        f"{images.bin / 'xfer'} {way} {PEER4} {XFER_PORT} {SIZE} {STREAMS} 5"
        for way in ("down", "up")
    ]
    script = f"while [ ! -e {enough} ]; do {' && '.join(ways)} || exit 1; done"
    words = [sys.executable, "-m", "control", "guest", "--socket", str(backend.vhost_socket)]
    words += ["--queues", str(PAIRS), "--", "sh", "-c", script]
    guest = lab.start("host", words, "guest", cwd=CHECKOUT)
    guest.wait_for(lambda: "down 0" in guest.tail(), "transfers", 30)
    yield guest
    enough.touch()
    guest.wait_end(120)
    lines = [line for line in guest.tail(1 << 20).splitlines() if line.startswith(("up", "down"))]
    for number, start in enumerate(range(0, len(lines), STREAMS)):
        direction = ("down", "up")[number % 2]
        check_transfers("\n".join(lines[start : start + STREAMS]), direction, SIZE, STREAMS)


def test_flows_hop(lab: Lab, images: Images, backend: Backend) -> None:
    """Every flow changes its queue every 100 ms: flows move between the workers."""
    before = backend.metrics()
    with transfers(lab, images, backend) as guest, hops.hopping(guest.pid, HOPS_PER_S):
        time.sleep(HOP_S)
    grown = backend.metrics() - before
    assert grown.value("vhostmq_rehomed_flows_total") > 0
    assert grown.value("vhostmq_handoff_frames_total") > 0


def test_workers_are_killed(lab: Lab, images: Images, backend: Backend) -> None:
    """One of them every two seconds, for thirty."""
    chosen, before = random.Random(1), backend.metrics()
    with transfers(lab, images, backend):
        for _ in range(KILLS):
            time.sleep(KILL_EVERY_S)
            os.kill(chosen.choice(measure.workers(backend.process.pid)), signal.SIGKILL)
        time.sleep(KILL_EVERY_S)
    grown = backend.metrics() - before
    assert grown.value("vhostmq_worker_restarts_total") == KILLS
    assert grown.value("vhostmq_inherited_flows_total") > 0


def test_control_is_killed(lab: Lab, images: Images, backend: Backend) -> None:
    """In turn with a worker, every two seconds one of them."""
    with transfers(lab, images, backend):
        gone = backend.process.log.read_text().count("front-end gone")
        for number in range(KILLS):
            time.sleep(KILL_EVERY_S)
            workers = measure.workers(backend.process.pid)
            control = measure.control(backend.process.pid)
            os.kill(control if number % 2 else workers[number // 2 % WORKERS], signal.SIGKILL)
        time.sleep(KILL_EVERY_S)
        log = backend.process.log.read_text()
    assert log.count("control is back, the front-end still connected") == KILLS // 2
    assert log.count("front-end gone") == gone
