"""`python -m benchmarks`: numbers of the back-end, measured on this machine, as a table and JSON.

Theory      Everything runs in a namespace of its own (lab.py). cases.py says what is compared under
            which loads, series.py runs it, ring.py drains rings with DPDK, measure.py starts and
            rests. Processor time is that of the back-end's whole process tree, and the machine's.
            Start-up: from exec to the answer to GET_FEATURES, and to the first command of a guest
            that has its lease, with everything compiled and with nothing. Idle: context switches of
            every process of the back-end over five seconds with a guest attached.
Honesty     Medians with minimum and maximum of RUNS runs; runs that failed are counted. Two cores
            show the scheduler as much as the program: processor seconds per GB are steadier than
            Gbit/s. Processor time of the machine is that of everything on it: leave it alone.
Result      JSON in `--out`; the tables of README and docs/ are made from the committed ones.
            `--only` measures some parts and replaces them in there; what stays must have been
            measured alike, on the same machine.
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
from collections.abc import Callable
from typing import Any

from benchmarks import cases, lab, measure, memory, ring, series
from benchmarks.guest import prepare

RUNS, SECONDS = 5, 2
SAME = ("cpu", "cores", "kernel", "runs", "seconds")  # of all parts of a result
DESCRIBE = ("describe", "--always", "--dirty", "--exclude=*")
REAL_GUESTS = {"qemu", "kills", "ring"}  # parts for which the machine is prepared

Part = Callable[[], Any]


def compared(name: str, how: series.How) -> list[series.Row]:
    """All comparisons of a part."""
    rows = []
    for setups, loads in (cases.PARTS | cases.ON_REQUEST)[name](how.passt):
        if warning := crowded(max(setup.workers for setup in setups)):
            print(warning)
        rows += series.compare(setups, loads, how)
    return rows


def crowded(workers: int) -> str:
    """A warning where guest and workers cannot have a core each."""
    cores = os.cpu_count() or 1
    if workers + 1 <= cores:
        return ""
    return (
        f"warning: {workers} workers, a guest and the host's programs share {cores} cores: rates "
        "show the scheduler, not scaling; see benchmarks/model.py"
    )


def start_up(runs: int) -> dict[str, Any]:
    """Warm and cold."""
    found = {}
    for kind in ("warm", "cold"):
        found[kind] = measure.start_up(runs, kind == "cold")
        print(f"start-up, {kind}: {found[kind]}", flush=True)
    return found


def at_rest() -> dict[str, Any]:
    """A guest attached and idle."""
    found = measure.at_rest(cases.QUEUES, cases.WORKERS)
    print("at rest with a guest:", found, flush=True)
    return found


def micro_numbers() -> dict[str, float]:
    """What the parts of a breath cost; imports the compiler, which nothing else here needs."""
    from benchmarks import micro, move

    found = micro.numbers() | move.costs_us()
    print(found, flush=True)
    return found


def machine(how: series.How) -> dict[str, Any]:
    """What the numbers were made on, and how."""
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
        "qemu": version("qemu-system-x86_64"),
        "passt": version(how.passt) if how.passt else "",
        "dpdk": version("dpkg-query", "-W", "-f=${Version}", "dpdk-dev"),
        "kvm": cases.kvm_works(),
        "runs": how.runs,
        "seconds": how.seconds,
        "date": time.strftime("%Y-%m-%d"),
    }


def version(program: str, *words: str) -> str:
    """The first line of what a program says of its version, if it is there."""
    if not shutil.which(program):
        return ""
    done = subprocess.run([program, *(words or ("--version",))], capture_output=True, text=True)
    return done.stdout.partition("\n")[0].strip()


def merged(path: pathlib.Path, only: list[str], here: dict[str, Any]) -> dict[str, Any]:
    """What the result begins with: nothing, or what is there and is not measured again."""
    result: dict[str, Any] = json.loads(path.read_text()) if only and path.exists() else {}
    if not result.keys() - {"machine", *only}:
        return {"machine": here}
    for key in SAME:
        if result["machine"].get(key) != here.get(key):
            raise lab.LabError(f"{key} differs from that of {path}: measure everything")
    return result


def parts_of(how: series.How) -> dict[str, Part]:
    """Everything there is to measure, by name."""
    found: dict[str, Part] = {"start": lambda: start_up(how.runs), "at_rest": at_rest}
    for name in (*cases.PARTS, *cases.ON_REQUEST):
        found[name] = lambda name=name: compared(name, how)  # type: ignore[misc]
    found["flow_memory"] = lambda: memory.per_flow(how)
    found["ring"] = lambda: ring.runs_in_turn(how.runs, how.seconds)
    return found | {"micro": micro_numbers}


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure vhostmq.")
    parser.add_argument("--passt", default="", metavar="PATH", help="compare with this passt")
    parser.add_argument("--out", default="benchmarks/results.json", metavar="FILE")
    parser.add_argument("--runs", type=int, default=RUNS, metavar="N")
    parser.add_argument("--seconds", type=float, default=SECONDS, metavar="N", help="of each run")
    names = list(parts_of(series.How(0, 0, "")))
    only = f"measure these parts again; {', '.join(cases.ON_REQUEST)}: only so"
    parser.add_argument("--only", choices=names, nargs="+", default=[], help=only)
    return parser.parse_args()


def images(only: list[str]) -> prepare.Images | None:
    """Those of real guests, if needed: made before the namespace is entered, then only looked up.

    Raises LabError when they are not there and the caller is not root.
    """
    if only and not REAL_GUESTS & set(only):
        return None
    try:
        if os.environ.get(lab.INSIDE):
            return prepare.build_images(prepare.fetch_kernel())
        return prepare.prepare()
    except prepare.PrepareError as error:
        raise lab.LabError(f"no images for QEMU: {error}") from error


def main() -> int:
    """Measure, print, write."""
    chosen = options()
    path = pathlib.Path(chosen.out)
    try:
        found = images(chosen.only)
        lab.enter("benchmarks")
        how = series.How(chosen.runs, chosen.seconds, chosen.passt, found)
        here, start_s = machine(how), time.monotonic()
        result = merged(path, chosen.only, here)
        parts, commit = parts_of(how), version("git", "-C", str(lab.ROOT), *DESCRIBE)
        for name in chosen.only or [name for name in parts if name not in cases.ON_REQUEST]:
            result[name] = parts[name]()
            result["machine"].setdefault("commits", {})[name] = commit
            path.write_text(json.dumps(result, indent=1) + "\n")
            print(f"{name}: done after {time.monotonic() - start_s:.0f} s", flush=True)
    except lab.LabError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    print(f"written to {chosen.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
