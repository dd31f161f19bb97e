"""test_guest_flows.py - the connections of `vhostmq guest`, while flows change their queue and
processes are killed.

Theory      STREAMS verified transfers at a time over four pairs of two workers, over and over. What
            moves them to another queue is the TAP's steering program (benchmarks/hops.py): by
            itself a TAP does not look at the CPU a thread runs on (xfer moves the threads all the
            same), and it has no `ethtool -L`. What those two do to queues is tested in QEMU.
Stalls      xfer's clock is ours: each kill's longest stall is looked up in the seconds after it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
from backends import CHECKOUT, Backend
from lab import PEER4, XFER_PORT, Lab
from traffic import (
    HOP_MS,
    MIB,
    Stream,
    assert_hopped,
    calm_moments,
    check_rounds,
    kill_workers,
    longest_stalls,
    told,
)

from benchmarks import hops, measure
from benchmarks.guest.prepare import Images
from benchmarks.guest.process import Process

QUEUES, WORKERS = 4, 2  # fewer than pairs, whatever the CPUs
STREAMS, SIZE = 32, 4 * MIB
KILLS, KILL_EVERY_S = 15, 2.0
STALL_MAX_S = 1.0  # after a kill, above what the load alone does to itself
CALM = 5  # moments without a kill, to compare
HOP_S = 10.0  # how long flows hop

pytestmark = pytest.mark.passt_lacks("workers and queue pairs")


@dataclass
class Traffic:
    """The guest's process; once all is through, what went through, call by call of xfer."""

    guest: Process
    rounds: list[list[Stream]] = field(default_factory=list)

    def streams(self) -> list[Stream]:
        """All of them."""
        return [stream for round_ in self.rounds for stream in round_]


@contextmanager
def transfers(lab: Lab, images: Images, backend: Backend, hop_ms: int = 0) -> Iterator[Traffic]:
    """Down and up in turn, until the block ends; then every stream of each must be whole."""
    enough = lab.directory / "enough"
    enough.unlink(missing_ok=True)
    directions = ("down", "up")
    ways = [
        f"{images.bin / 'xfer'} {way} {PEER4} {XFER_PORT} {SIZE} {STREAMS} 5 {hop_ms}"
        for way in directions
    ]
    script = f"while [ ! -e {enough} ]; do {' && '.join(ways)} || exit 1; done"
    words = [sys.executable, "-m", "control", "guest", "--socket", str(backend.vhost_socket)]
    words += ["--queues", str(QUEUES), "--", "sh", "-c", script]
    guest = lab.start("host", words, "guest", cwd=CHECKOUT)
    guest.wait_for(lambda: "down 0" in guest.tail(), "transfers", 30)
    traffic = Traffic(guest)
    yield traffic
    enough.touch()
    guest.wait_end(120)
    lines = [line for line in guest.tail(1 << 20).splitlines() if line.startswith(directions)]
    traffic.rounds = check_rounds("\n".join(lines), directions, SIZE, STREAMS)


def test_flows_hop(lab: Lab, images: Images, backend: Backend) -> None:
    """Every thread changes its CPU every 100 ms, and every flow its queue: flows move between the
    workers."""
    before = backend.metrics()
    with transfers(lab, images, backend, HOP_MS) as traffic:
        with hops.hopping(traffic.guest.pid, 1000 // HOP_MS):
            time.sleep(HOP_S)
    assert_hopped(traffic.rounds)
    grown = backend.metrics() - before
    assert grown.value("vhostmq_rehomed_flows_total") > 0
    assert grown.value("vhostmq_handoff_frames_total") > 0


def test_workers_are_killed(
    lab: Lab, images: Images, backend: Backend, tell: Callable[[str], None]
) -> None:
    """One of them every two seconds, for thirty; no connection stands still for long."""
    before = backend.metrics()
    with transfers(lab, images, backend) as traffic:
        calm = calm_moments(CALM, KILL_EVERY_S)
        kills = kill_workers(backend, KILLS, KILL_EVERY_S)
    undisturbed = longest_stalls(traffic.streams(), calm, KILL_EVERY_S)
    stalls = longest_stalls(traffic.streams(), kills, KILL_EVERY_S)
    tell(f"longest stall after each kill: {told(stalls)}; without kills: {told(undisturbed)}")
    assert min(stalls) > 0, f"no traffic after a kill: {stalls}"
    most_s = STALL_MAX_S + max(undisturbed)
    assert max(stalls) < most_s, f"after kills {stalls}, without {undisturbed}"
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
