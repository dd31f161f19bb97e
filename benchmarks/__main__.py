"""`python -m benchmarks`: numbers of the back-end, measured on this machine, as a table and JSON.

Theory      Everything runs in a namespace of its own (lab.py), through `vhostmq guest`, one guest
            per back-end, MTU and load; processor time of the back-end's whole process tree is read
            before and after each run. Throughput: iperf3. Datagrams: iperf3, counted where they
            arrive. Transactions: requests and responses, on one connection and on one each.
            Start-up: from exec to the answer to GET_FEATURES, and to the first command of a guest
            that has its lease, with everything compiled and with nothing. Idle: context switches of
            every process of the back-end over five seconds with a guest attached.
Honesty     Medians with minimum and maximum of RUNS runs. Two cores show the scheduler as much as
            the program: processor seconds per GB are steadier than Gbit/s.
Result      JSON in `--out`; the README's tables are made from the committed one. `--only` measures
            one part and replaces it in there, on the same machine.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks import lab, measure
from benchmarks.load import ECHO_PORTS

RUNS = 5
COLD_RUNS = 3
SECONDS = 2
QUEUES, WORKERS = 4, 2
PARTS = ("start", "at_rest", "throughput", "datagrams", "transactions", "pairs")
PAIRS = ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (8, 2), (16, 2))  # queue pairs, workers
THROUGHPUT = [(mtu, ("tcp", streams)) for streams in (1, 8) for mtu in (1500, 65520)]
DATAGRAMS = [(1500, ("udp", size)) for size in (64, 1400)]
TRANSACTIONS = [(1500, ("rr", 1)), (1500, ("crr", 1))]
SWEEP = [(1500, load) for load in (("tcp", 8), ("rr", 1))]


def start_passt(room: lab.Lab, program: str) -> subprocess.Popen[bytes]:
    """passt in vhost-user mode; it becomes nobody before it binds."""
    room.folder.chmod(0o1777)
    room.socket.unlink(missing_ok=True)
    command = [program, "--foreground", "--vhost-user", "--socket", str(room.socket)]
    process = room.start(*command, "--repair-path", "none", log="run.log")
    room.wait_for("run.log", "You can start qemu", process)
    return process


def one_series(
    kind: str, passt: str, mtu: int, load: tuple[str, int], queues: int, workers: int
) -> Iterator[dict[str, Any]]:
    """Runs of one back-end at one MTU with one load (load.py)."""
    with lab.Lab() as room:
        server = room.start("iperf3", "-s", "--forceflush", "-B", "127.0.0.1", log="iperf3.log")
        room.wait_for("iperf3.log", "Server listening", server)
        for name, port in ECHO_PORTS.items():
            words = [sys.executable, "-m", "benchmarks.echo", "127.0.0.1", str(port)]
            words += ["once"] if name == "crr" else []
            room.wait_for(f"{name}.log", "listening", room.start(*words, log=f"{name}.log"))
        if kind == "passt":
            backend, queues, workers = start_passt(room, passt), 1, 1
        else:
            backend = room.backend(queues, workers)
        words = [sys.executable, "-m", "control", "guest", "--socket", str(room.socket)]
        words += ["--queues", str(queues), "--mtu", str(mtu), "--"]
        words += [sys.executable, "-m", "benchmarks.load", str(RUNS), str(SECONDS)]
        words += [load[0], str(load[1])]
        guest = subprocess.Popen(words, cwd=lab.ROOT, stdout=subprocess.PIPE, text=True)
        assert guest.stdout is not None
        before = 0.0
        for line in guest.stdout:
            said = json.loads(line)
            if said["event"] == "begin":
                before = measure.cpu_s(backend.pid)
            elif said["event"] == "failed":
                print(f"{kind:8} mtu {mtu:5} {load} {said['direction']} failed: {said['error']}")
            else:
                used_s = measure.cpu_s(backend.pid) - before
                yield {
                    "backend": kind,
                    "queues": queues,
                    "workers": workers,
                    "mtu": mtu,
                    "load": load[0],
                    "amount": load[1],
                    "direction": said["direction"],
                } | rates(said, used_s)
        if guest.wait() != 0:
            raise lab.LabError(f"the guest behind {kind} ended with {guest.returncode}")


def rates(said: dict[str, Any], used_s: float) -> dict[str, float | None]:
    """What one run comes to; `used_s`: processor time of the back-end."""
    if "bytes" in said:
        gigabytes = said["bytes"] / 1e9
        return {
            "gbit_s": 8 * gigabytes / said["seconds"],
            "cpu_s_per_gb": used_s / gigabytes if gigabytes else None,
        }
    number = said.get("datagrams", said.get("transactions"))
    found = {
        "per_s": number / said["seconds"],
        "cpu_us_each": used_s * 1e6 / number if number else None,
    }
    return found | {name: said[name] for name in ("p50_us", "p99_us") if name in said}


def series(
    passt: str, loads: Iterable[tuple[int, tuple[str, int]]], queues: int, workers: int
) -> list[dict[str, Any]]:
    """All runs of (MTU, load), the two back-ends in turn."""
    found = []
    for mtu, load in loads:
        for kind in ("vhostmq", "passt") if passt else ("vhostmq",):
            for run in one_series(kind, passt, mtu, load, queues, workers):
                found.append(run)
                print(
                    f"{kind:8} {run['queues']:2} pairs {run['workers']} workers mtu {mtu:5} "
                    f"{load[0]:3} {load[1]:4} {run['direction']:4} "
                    + ", ".join(f"{k} {v:.4g}" for k, v in run.items() if isinstance(v, float)),
                    flush=True,
                )
    return summary(found)


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per back-end, MTU, load and direction."""
    keys = ("backend", "queues", "workers", "mtu", "load", "amount", "direction")
    rows = []
    for key in dict.fromkeys(tuple(run[k] for k in keys) for run in runs):
        mine = [run for run in runs if tuple(run[k] for k in keys) == key]
        measured = {
            name: measure.spread(values)
            for name in mine[0]
            if name not in keys and (values := [run[name] for run in mine if run[name] is not None])
        }
        rows.append(dict(zip(keys, key, strict=True)) | measured)
    return rows


def sweep() -> list[dict[str, Any]]:
    """Queue pairs and workers, vhostmq alone."""
    found = []
    for queues, workers in PAIRS:
        if workers > (os.cpu_count() or 1):
            print(f"{workers} workers on {os.cpu_count()} cores: what follows shows the scheduler")
        found += series("", SWEEP, queues, workers)
    return found


def machine() -> dict[str, Any]:
    """What the numbers were made on."""
    import numba

    model = [
        line.partition(":")[2].strip()
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": model[0] if model else platform.machine(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "numba": numba.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def start_up() -> dict[str, Any]:
    """Warm and cold."""
    found = {}
    for kind, runs in (("warm", RUNS), ("cold", COLD_RUNS)):
        found[kind] = measure.start_up(runs, kind == "cold")
        print(f"start-up, {kind}: {found[kind]}", flush=True)
    return found


def at_rest() -> dict[str, Any]:
    """A guest attached and idle."""
    found = measure.at_rest(QUEUES, WORKERS)
    print("at rest with a guest:", found, flush=True)
    return found


def merged(path: pathlib.Path, only: str) -> dict[str, Any]:
    """What the result begins with: nothing, or with `--only` the one that is there."""
    here = machine()
    if not only:
        return {"machine": here}
    result: dict[str, Any] = json.loads(path.read_text())
    if any(result["machine"][key] != value for key, value in here.items() if key != "date"):
        raise lab.LabError(f"{path} was made on another machine: measure everything")
    return result


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure vhostmq.")
    parser.add_argument("--passt", default="", metavar="PATH", help="compare with this passt")
    parser.add_argument("--out", default="benchmarks/results.json", metavar="FILE")
    parser.add_argument("--only", choices=PARTS, default="")
    options = parser.parse_args()
    path = pathlib.Path(options.out)
    parts = {
        "start": start_up,
        "at_rest": at_rest,
        "throughput": lambda: series(options.passt, THROUGHPUT, QUEUES, WORKERS),
        "datagrams": lambda: series(options.passt, DATAGRAMS, QUEUES, WORKERS),
        "transactions": lambda: series(options.passt, TRANSACTIONS, QUEUES, WORKERS),
        "pairs": sweep,
    }
    try:
        lab.enter("benchmarks")
        if not shutil.which("iperf3"):
            raise lab.LabError("iperf3 is missing (Debian: apt-get install iperf3)")
        result = merged(path, options.only)
        for part in [options.only] if options.only else parts:
            result[part] = parts[part]()
    except lab.LabError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
