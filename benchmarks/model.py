"""`python -m benchmarks.model [RESULT]`: throughput on more cores than this machine has, predicted.

Theory      Everything a worker does costs processor time: per breath, per packet, per byte. Those
            costs are measured with one worker; more workers on cores of their own do the same work
            side by side.
              per byte     back-end CPU per GB of TCP, one pair on one worker: frames are 64 KiB, so
                           that packets and breaths hardly show
              per packet   back-end CPU per datagram of 64 and of 1400 bytes, one pair on one
                           worker: a line through both, level where the large ones cost less
              per breath   a breath that finds 1 and one that finds 64 frames (micro.py): a line
            Predicted: a worker's rate is the inverse of its cost; W workers do W times that; a
            machine of N cores that runs guest and host programs, too, does N over the cost of all.
Assumptions Stated with every prediction (ASSUMPTIONS). The prediction for the cores there are is
            printed beside what was measured, so that it can be judged.
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

from benchmarks.goals import ONE_PAIR, OURS, WAYS, Case, Result, figure, tcp

CORES = (1, 2, 4, 8, 16)
SIZES, BURSTS = (64, 1400), (1, 64)
STREAMS, MTU = 8, 1500
ASSUMPTIONS = (
    "Flows are many, spread evenly over pairs and stay on the pair they began on: no frame crosses "
    "between workers.",
    "Workers share no lock and no cache line on the way of a packet, so that each costs what one "
    "alone costs; caches and memory bandwidth suffice for all.",
    "Predictions for workers: each has a core of its own, and guest and host programs have enough.",
    "Predictions for machines: all cores are busy all the time, guest and host programs included, "
    "and their costs do not grow with the number of cores.",
)


def costs(result: Result) -> dict[str, float]:
    """Measured costs by name, those that the result has."""
    found = {}
    for way in WAYS:
        case = tcp(ONE_PAIR, MTU, STREAMS, way)
        for name in ("cpu_s_per_gb", "machine_cpu_s_per_gb"):
            if value := figure(result, case, name):
                found[f"{name}_{way}"] = value
        small, large = (figure(result, datagram(size, way), "cpu_us_each") for size in (64, 1400))
        if small and large:
            byte_us = max(large - small, 0) / (1400 - 64)
            found[f"byte_ns_{way}"] = 1000 * byte_us
            found[f"packet_us_{way}"] = max(small, large) - 1400 * byte_us
    micro = result.get("micro", {})
    if "breath_1_ns" in micro:
        each = (micro["breath_64_ns"] - micro["breath_1_ns"]) / 63
        found |= {"ring_frame_ns": each, "breath_ns": micro["breath_1_ns"] - each}
    return found


def datagram(size: int, way: str) -> Case:
    """The row of single datagrams of a size."""
    return ONE_PAIR | {"load": "udp", "amount": size, "direction": way}


def predictions(found: dict[str, float]) -> list[dict[str, Any]]:
    """Gbit/s of TCP: of so many workers, and of machines of so many cores."""
    lines = []
    for way in WAYS:
        for kind, name in (("workers", "cpu_s_per_gb"), ("cores", "machine_cpu_s_per_gb")):
            if cost := found.get(f"{name}_{way}"):
                rates = [8 * number / cost for number in CORES]
                lines.append({"kind": kind, "direction": way, "gbit_s": rates})
    return lines


def packet_rates(found: dict[str, float]) -> dict[str, list[float]]:
    """Millions a second of so many workers: datagrams by size, and frames that policy drops by how
    many a breath finds."""
    costs_us = {
        f"datagrams of {size} bytes, {WAYS[way]}": found[f"packet_us_{way}"]
        + size * found[f"byte_ns_{way}"] / 1000
        for way in WAYS
        for size in SIZES
        if f"packet_us_{way}" in found
    }
    if "breath_ns" in found:
        for burst in BURSTS:
            each_ns = found["breath_ns"] / burst + found["ring_frame_ns"]
            costs_us[f"frames dropped, {burst} a breath"] = each_ns / 1000
    return {what: [number / cost for number in CORES] for what, cost in costs_us.items()}


def check(result: Result) -> list[str]:
    """Prediction for this machine beside what it did with all its workers."""
    cores, lines, found = result["machine"]["cores"], [], costs(result)
    for way in WAYS:
        measured = figure(result, tcp(OURS, MTU, STREAMS, way), "gbit_s")
        cost = found.get(f"machine_cpu_s_per_gb_{way}")
        if measured and cost:
            lines.append(
                f"{WAYS[way]}, this machine of {cores} cores: predicted {8 * cores / cost:.1f}, "
                f"measured {measured:.1f} Gbit/s."
            )
    return lines


def section(result: Result) -> list[str]:
    """What docs/performance.md says of it, as paragraphs."""
    found = costs(result)
    if not found:
        return ["The result lacks the costs that it is made of."]
    shown = "; ".join(f"{name} {value:.3g}" for name, value in found.items())
    heads = " | ".join(map(str, CORES)) + " |", "|---" * (len(CORES) + 1) + "|"
    table = ["| TCP, Gbit/s | " + heads[0], heads[1]]
    for line in predictions(found):
        what = f"{WAYS[line['direction']]}, by number of {line['kind']}"
        table.append(f"| {what} | " + " | ".join(f"{rate:.0f}" for rate in line["gbit_s"]) + " |")
    packets = ["| millions per second, by number of workers | " + heads[0], heads[1]]
    for what, rates in packet_rates(found).items():
        packets.append(f"| {what} | " + " | ".join(f"{rate:.2f}" for rate in rates) + " |")
    assumed = "\n".join(f"* {text}" for text in ASSUMPTIONS)
    paragraphs = [f"Costs measured: {shown}.", "\n".join(table), "\n".join(packets)]
    return [*paragraphs, *check(result), "Assumed:\n\n" + assumed]


def main() -> None:
    """Print it."""
    path = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "benchmarks/results.json")
    print("\n\n".join(section(json.loads(path.read_text()))))


if __name__ == "__main__":
    main()
