"""measure.py - what /proc and perf say of a back-end: processor time, memory, wake-ups, system
calls, and how fast it starts."""

from __future__ import annotations

import os
import pathlib
import signal
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks import lab

TICKS = os.sysconf("SC_CLK_TCK")
IDLE_S = 5.0
GET_FEATURES = struct.pack("<III", 1, 1, 0)
START_TIMEOUT_S = 30.0
PERF_ATTACHES_S = 0.5  # to processes that run
PERF_EVENTS = ("raw_syscalls:sys_enter", "syscalls:sys_enter_read", "syscalls:sys_enter_write")


def _children() -> dict[int, list[int]]:
    """Of every process that has some."""
    found: dict[int, list[int]] = {}
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        found.setdefault(parent, []).append(int(folder.name))
    return found


def tree(pid: int) -> list[int]:
    """A process and all its descendants."""
    children, found, left = _children(), [], [pid]
    while left:
        found.append(left.pop())
        left += children.get(found[-1], [])
    return found


def places(pid: int) -> list[tuple[int, int]]:
    """(keeper, worker) of a running `vhostmq run`: keepers are children of its fork server, workers
    of keepers."""
    children = _children()
    keepers = [one for child in children.get(pid, []) for one in children.get(child, [])]
    return sorted((keeper, one) for keeper in keepers for one in children.get(keeper, []))


def workers(pid: int) -> list[int]:
    """The workers of a running `vhostmq run`."""
    return [worker for _, worker in places(pid)]


def control(pid: int) -> int:
    """The control process of a running `vhostmq run`: the child that is a copy of its guard."""
    (found,) = (child for child in _children()[pid] if _command(child) == _command(pid))
    return found


def _command(pid: int) -> bytes:
    return pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()


def cpu_s(pid: int, alone: bool = False) -> float:
    """Processor seconds of all threads of the tree's live processes, or of this one alone: the
    scheduler's nanoseconds, not its ticks, which miss what sleeps often."""
    total_ns = 0
    for one in [pid] if alone else tree(pid):
        for thread in pathlib.Path(f"/proc/{one}/task").glob("*/schedstat"):
            try:
                total_ns += int(thread.read_text().split()[0])
            except OSError:
                continue
    return total_ns / 1e9


def machine_cpu_s() -> float:
    """Processor seconds of the whole machine that were neither idle nor waiting for a disk."""
    words = pathlib.Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    user, nice, system, _, _, irq, softirq, _ = map(int, words)
    return (user + nice + system + irq + softirq) / TICKS


def switches(pid: int) -> int:
    """Context switches of all threads of the tree: every wake-up is one."""
    total = 0
    for one in tree(pid):
        for thread in pathlib.Path(f"/proc/{one}/task").glob("*"):
            for line in (thread / "status").read_text().splitlines():
                if "ctxt_switches" in line:
                    total += int(line.split()[1])
    return total


def memory_mb(pid: int) -> dict[str, float]:
    """Private memory and proportional share of one process, MB."""
    sizes = {"private_mb": 0.0, "pss_mb": 0.0}
    for line in pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        word, _, value = line.partition(":")
        if word in ("Private_Clean", "Private_Dirty"):
            sizes["private_mb"] += int(value.split()[0]) / 1024
        elif word == "Pss":
            sizes["pss_mb"] = int(value.split()[0]) / 1024
    return {name: round(size, 1) for name, size in sizes.items()}


def perf_command(pids: list[int], log: pathlib.Path) -> list[str]:
    """perf that counts PERF_EVENTS of these processes and writes them to `log`."""
    options = ["-x", ",", "-o", str(log), "-e", ",".join(PERF_EVENTS)]
    return ["perf", "stat", *options, "-p", ",".join(map(str, pids))]


def perf_counts(log: pathlib.Path) -> dict[str, float]:
    """What perf has written; empty if it was not allowed to count."""
    lines = log.read_text().splitlines() if log.exists() else []
    found = (line.split(",") for line in lines)
    return {words[2]: float(words[0]) for words in found if len(words) > 2 and words[0].isdigit()}


@contextmanager
def perf(pids: list[int], log: pathlib.Path) -> Iterator[dict[str, float]]:
    """Counts of what these processes do meanwhile, filled in at the end. It takes perf a moment to
    begin: nothing should go on yet."""
    found: dict[str, float] = {}
    process = subprocess.Popen(perf_command(pids, log), stderr=subprocess.PIPE)
    time.sleep(PERF_ATTACHES_S)
    try:
        yield found
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate()
        found |= perf_counts(log)


def perf_for(seconds: float, pids: list[int], log: pathlib.Path) -> dict[str, float]:
    """Counts of so many seconds of what goes on all the time."""
    subprocess.run([*perf_command(pids, log), "sleep", str(seconds)], capture_output=True)
    return perf_counts(log)


def spread(values: list[float]) -> dict[str, float]:
    """Median, minimum, maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summary(runs: list[dict[str, float | None]]) -> dict[str, Any]:
    """Median, minimum and maximum of every measure."""
    values: dict[str, list[float]] = {}
    for run in runs:
        for name, value in run.items():
            if value is not None:
                values.setdefault(name, []).append(value)
    return {name: spread(found) for name, found in values.items()}


def start_up(runs: int, cold: bool) -> dict[str, dict[str, float]]:
    """Milliseconds from exec to the answer to GET_FEATURES, until all workers are ready, and until
    a guest that is started right after the answer has its lease and its command is done; `cold`:
    nothing was ever compiled."""
    answered, ready, served = [], [], []
    for _ in range(runs):
        with lab.Lab() as room:
            command = [sys.executable, "-m", "control", "run", "--socket", str(room.socket)]
            if cold:
                command[:0] = ["env", f"XDG_CACHE_HOME={room.folder}"]
            start_s = time.monotonic()
            room.start(*command, "--queues", "4", log="run.log")
            while not room.socket.exists():
                if time.monotonic() - start_s > START_TIMEOUT_S:
                    raise lab.LabError("the back-end does not start")
                time.sleep(0.001)
            with socket.socket(socket.AF_UNIX) as front_end:
                while front_end.connect_ex(str(room.socket)):
                    time.sleep(0.001)
                front_end.sendall(GET_FEATURES)
                front_end.recv(20)
            answered.append((time.monotonic() - start_s) * 1000)
            words = [sys.executable, "-m", "control", "guest", "--socket", str(room.socket)]
            guest = room.start(*words, "--", "true", log="guest.log")
            while b"workers are up" not in (room.folder / "run.log").read_bytes():
                if guest.poll():
                    break
                time.sleep(0.002)
            ready.append((time.monotonic() - start_s) * 1000)
            if status := guest.wait():
                raise lab.LabError(f"the guest ended with {status}")
            served.append((time.monotonic() - start_s) * 1000)
    found = {"answer_ms": answered, "workers_ms": ready, "guest_ms": served}
    return {name: spread(values) for name, values in found.items()}


def at_rest(queues: int, workers: int) -> dict[str, Any]:
    """Wake-ups in five seconds and memory per worker, its keeper included, a guest attached and
    idle."""
    with lab.Lab() as room:
        backend = room.backend(queues, workers)
        words = [sys.executable, "-m", "control", "guest", "--socket", str(room.socket)]
        words += ["--queues", str(queues), "--", "sh", "-c", "echo up; sleep 60"]
        guest = subprocess.Popen(words, cwd=lab.ROOT, stdout=subprocess.PIPE)
        assert guest.stdout is not None
        guest.stdout.readline()
        time.sleep(3.0)  # neighbour discovery and router solicitations settle
        before = switches(backend.pid)
        time.sleep(IDLE_S)
        woken = switches(backend.pid) - before
        memory = [
            {name: round(size + memory_mb(keeper)[name], 1) for name, size in own.items()}
            for keeper, own in ((keeper, memory_mb(one)) for keeper, one in places(backend.pid))
        ]
        guest.terminate()
        guest.wait()
    return {"wakeups_in_5_s": woken, "workers": memory}
