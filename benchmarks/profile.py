"""`python -m benchmarks.profile LOAD AMOUNT DIRECTION [--mtu N] [--pairs N] [--workers N]
[--passt PATH]`: where a back-end's processor time goes under one load.

Theory      One setup of series.py, one run of the load while perf samples the back-end's processes
            (cpu-clock: it needs no counters of the processor, which virtual machines often lack).
            Printed: the share of kernel and user space, and the functions that were met most, in
            milliseconds of processor time per GB (or microseconds for each).
            Compiled Python has no symbols: all that workers run of it is one line. This is what
            notes.md is written from.
"""

from __future__ import annotations

import argparse
import collections
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any

from benchmarks import cases, lab, measure, series

SECONDS, SHOWN, HZ = 5, 15, 1999
PERF_MAP = "/perf-"  # how perf calls memory without a file: /tmp/perf-PID.map


def sampled(
    bench: series.Bench, load: series.Load, direction: str
) -> tuple[pathlib.Path, dict[str, Any]]:
    """perf's record of the back-end during one run, and what load.c said of that."""
    assert bench.back_end is not None
    path = bench.room.folder / "perf.data"
    pids = ",".join(map(str, measure.tree(bench.back_end.pid)))
    command = ["perf", "record", "-q", "-e", "cpu-clock", "-F", str(HZ), "-o", str(path)]
    process = subprocess.Popen([*command, "-p", pids], stderr=subprocess.DEVNULL)
    time.sleep(measure.PERF_ATTACHES_S)
    try:
        said = bench.run(load, direction)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()
    return path, said


def functions(path: pathlib.Path) -> collections.Counter[str]:
    """Samples by function; user space is one line for each program or library."""
    command = ["perf", "script", "-i", str(path), "-F", "ip,sym,dso"]
    done = subprocess.run(command, capture_output=True, text=True)
    found: collections.Counter[str] = collections.Counter()
    for line in done.stdout.splitlines():
        words = line.split()
        if len(words) < 3:
            continue
        where = "compiled" if PERF_MAP in words[-1] else words[-1].strip("()")
        kernel = "kernel" in where or where.endswith(".ko")
        found[f"kernel {words[1]}" if kernel else f"user {pathlib.PurePath(where).name}"] += 1
    return found


def show(setup: series.Setup, found: collections.Counter[str], said: dict[str, Any]) -> None:
    """The summary and the functions met most."""
    total = max(found.total(), 1)
    if "bytes" in said:
        unit, amount = "ms/GB", said["bytes"] / 1e9 / 1000
    else:
        unit, amount = "us each", series.moved(said) / 1e6
    kernel = sum(count for name, count in found.items() if name.startswith("kernel"))
    print(f"{setup}: {said}")
    print(f"{total / HZ / amount:.1f} {unit}, {100 * kernel / total:.0f} % in the kernel")
    for name, count in found.most_common(SHOWN):
        print(f"{100 * count / total:5.1f} %  {count / HZ / amount:7.2f} {unit}  {name}")


def main() -> int:
    """Run, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile")
    parser.add_argument("load", choices=("tcp", "udp", "udp_train", "rr", "crr"))
    parser.add_argument("amount", type=int)
    parser.add_argument("direction", choices=("up", "down", "both"))
    parser.add_argument("--mtu", type=int, default=1500)
    parser.add_argument("--pairs", type=int, default=cases.QUEUES)
    parser.add_argument("--workers", type=int, default=cases.WORKERS)
    parser.add_argument("--passt", default="", metavar="PATH", help="profile this instead of us")
    options = parser.parse_args()
    try:
        lab.enter("benchmarks.profile")
        how = series.How(1, SECONDS, options.passt)
        name, pairs, workers = "vhostmq", options.pairs, options.workers
        if options.passt:
            name, pairs, workers = "passt", 1, 1
        setup = series.Setup("vhostmq_guest", name, options.mtu, pairs, workers)
        with series.served(), lab.Lab() as room:
            bench = series.Bench(setup, how, room, lab.METRICS_PORT)
            path, said = sampled(bench, (options.load, options.amount), options.direction)
            bench.inside.close()
            show(setup, functions(path), said)
    except lab.LabError as error:
        print(f"benchmarks.profile: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
