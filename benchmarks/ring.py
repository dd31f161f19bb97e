"""ring.py - how fast a transmit ring is drained: DPDK's virtio-user sends 64-byte datagrams that
the back-end has no use for.

Theory      testpmd (txonly) fills the ring as fast as it can. We drop for policy (`run --no-udp`),
            so that ring, chains and parsing are what is measured; DPDK's own vhost back-end
            (net_vhost, rxonly) takes frames and frees them, and does not look at them. Both have
            one queue pair and one thread. Frames are counted by the front-end: what the ring took.
Alternation Both sides of DPDK poll for as long as they live, so that the back-ends cannot be up
            together: every run starts its own.
Limits      Guest to host only: nothing but sockets makes us send towards the guest, and what that
            costs is the datagrams' part. Where huge pages are lacking the part fails and says so.
"""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import lab, measure
from benchmarks.guest.guests import GUEST_MAC

FRAME_BYTES = 64
MEMORY_MB = 64
SETTLE_S = 1.5  # until it forwards, and its first report has gone by
EAL = ("--no-pci", "--no-telemetry", "--in-memory", "--single-file-segments", "-m", str(MEMORY_MB))
FORWARD = ("--total-num-mbufs=8192", "--auto-start", "--no-numa", "--stats-period=1")
BACK_ENDS = ("vhostmq", "dpdk_vhost")
FRONT_CPU, BACK_CPU = 1, 0

Run = dict[str, float | None]


def testpmd(
    room: lab.Lab, cpu: int, devices: Sequence[str], *how: str, log: str, inside: Sequence[str] = ()
) -> subprocess.Popen[bytes]:
    """testpmd that forwards on one processor; its other thread sleeps on the other. `inside`: the
    command that enters another namespace."""
    words = ["stdbuf", "-oL", "dpdk-testpmd", "--lcores", f"0@{1 - cpu},1@{cpu}", *EAL]
    words += [f"--vdev={device}" for device in devices]
    return room.start(*inside, *words, "--", *FORWARD, *how, log=log)


def start_back_end(room: lab.Lab, kind: str) -> subprocess.Popen[bytes]:
    """Ready for a front-end."""
    if kind == "vhostmq":
        return room.backend(1, 1, "--no-udp")
    device = f"net_vhost0,iface={room.socket},queues=1"
    process = testpmd(room, BACK_CPU, [device], "--forward-mode=rxonly", log="run.log")
    room.wait_for("run.log", "Port statistics", process)
    return process


def one_run(kind: str, seconds: float, count: bool = False) -> tuple[Run, dict[str, float]]:
    """Frames per second and processor time of each; with `count` system calls and notifications of
    each instead, where they can be counted."""
    with lab.Lab() as room:
        back_end = start_back_end(room, kind)
        device = f"net_virtio_user0,path={room.socket},mac={GUEST_MAC},queues=1"
        how = ("--forward-mode=txonly", f"--txpkts={FRAME_BYTES}")
        front_end = testpmd(room, FRONT_CPU, [device], *how, log="front.log")
        room.wait_for("front.log", "Port statistics", front_end)
        time.sleep(SETTLE_S)
        events = {}
        before, start_s = (measure.cpu_s(back_end.pid), measure.machine_cpu_s()), time.monotonic()
        if count and shutil.which("perf"):
            log = room.folder / "perf.txt"
            events = measure.perf_for(seconds, measure.tree(back_end.pid), log)
        else:
            time.sleep(seconds)
        after, took_s = (measure.cpu_s(back_end.pid), measure.machine_cpu_s()), time.monotonic()
        used_s, machine_s = (
            (b - a) / (took_s - start_s) for a, b in zip(before, after, strict=True)
        )
        room.stop(front_end)
        said = (room.folder / "front.log").read_text(errors="replace")
        counted = notifications() if kind == "vhostmq" else {}
    rates = [int(word) for word in re.findall(r"Tx-pps:\s+(\d+)", said)][1:]
    if not rates or not max(rates):
        raise lab.LabError(f"no frame crossed to {kind}:\n{said[-2000:]}")
    per_s = statistics.mean(rates)
    if events:
        counted |= {"syscalls_each": events[measure.PERF_EVENTS[0]] / seconds / per_s}
    each = {"cpu_us_each": used_s * 1e6 / per_s, "machine_cpu_us_each": machine_s * 1e6 / per_s}
    return {"per_s": per_s, **each}, counted


def notifications() -> dict[str, float]:
    """Per frame, by our metrics; LabError if frames went anywhere but where policy sends them."""
    samples = lab.scrape()
    taken = lab.labelled(samples, "vhostmq_packets_total", direction="tx")
    dropped = lab.labelled(samples, "vhostmq_drops_total", direction="tx", reason="policy")
    if dropped < 0.99 * taken:
        raise lab.LabError(f"{dropped:.0f} of {taken:.0f} frames were dropped for policy")
    names = ("vhostmq_kicks_total", "vhostmq_calls_total")
    told = sum(lab.labelled(samples, name, direction="tx") for name in names)
    return {"notifications_per_packet": told / taken}


def runs_in_turn(runs: int, seconds: float) -> list[dict[str, Any]]:
    """A row for each back-end."""
    timed: dict[str, list[Run]] = {kind: [] for kind in BACK_ENDS}
    for _ in range(runs):
        for kind in BACK_ENDS:
            found, _ = one_run(kind, seconds)
            timed[kind].append(found)
            print(f"{kind} drains {found['per_s']:.4g} frames of {FRAME_BYTES} bytes a second")
    counted = {kind: one_run(kind, seconds, count=True)[1] for kind in BACK_ENDS}
    setup = {"front_end": "dpdk_virtio_user", "pairs": 1, "workers": 1, "mtu": 1500}
    load = {"load": "drain", "amount": FRAME_BYTES, "direction": "up"}
    return [
        {
            **setup,
            "back_end": kind,
            **load,
            **measure.summary(timed[kind]),
            "counted": counted[kind],
        }
        for kind in BACK_ENDS
    ]
