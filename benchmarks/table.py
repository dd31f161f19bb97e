"""`python -m benchmarks.table [FILE]`: README tables from a result of `python -m benchmarks`."""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

Row = dict[str, Any]


def spread(row: Row | None, name: str, digits: int) -> str:
    """Median (minimum-maximum), or a dash where nothing was measured."""
    if row is None:
        return "-"
    value = row[name]
    low, high = f"{value['min']:.{digits}f}", f"{value['max']:.{digits}f}"
    return f"{value['median']:.{digits}f} ({low}-{high})"


def seconds(spread_ms: dict[str, float]) -> str:
    """Median (minimum-maximum) of milliseconds."""
    low, high = spread_ms["min"] / 1000, spread_ms["max"] / 1000
    return f"{spread_ms['median'] / 1000:.1f} ({low:.1f}-{high:.1f})"


def throughput(rows: list[Row]) -> list[str]:
    """One line per MTU, streams and direction, the back-ends side by side."""
    lines = [
        "| MTU | streams | direction | vhostmq Gbit/s | passt Gbit/s "
        "| vhostmq CPU-s/GB | passt CPU-s/GB |",
        "|---|---|---|---|---|---|---|",
    ]
    cases = dict.fromkeys((row["mtu"], row["streams"], row["direction"]) for row in rows)
    for mtu, streams, direction in cases:
        of = {
            row["backend"]: row
            for row in rows
            if (row["mtu"], row["streams"], row["direction"]) == (mtu, streams, direction)
        }
        ours, theirs = of.get("vhostmq"), of.get("passt")
        way = "guest to host" if direction == "up" else "host to guest"
        lines.append(
            f"| {mtu} | {streams} | {way} | {spread(ours, 'gbit_s', 1)} "
            f"| {spread(theirs, 'gbit_s', 1)} | {spread(ours, 'cpu_s_per_gb', 2)} "
            f"| {spread(theirs, 'cpu_s_per_gb', 2)} |"
        )
    return lines


def main() -> None:
    """Print Markdown."""
    path = sys.argv[1] if len(sys.argv) > 1 else "benchmarks/results.json"
    result = json.loads(pathlib.Path(path).read_text())
    print("\n".join(throughput(result["throughput"])))
    start, rest, machine = result["start"], result["at_rest"], result["machine"]
    print()
    print(
        f"From exec to the answer to GET_FEATURES: {spread(start['warm'], 'answer_ms', 0)} ms with "
        f"everything compiled, {spread(start['cold'], 'answer_ms', 0)} ms with nothing. From exec "
        "to the end of the first command of a guest started then: "
        f"{seconds(start['warm']['guest_ms'])} s and {seconds(start['cold']['guest_ms'])} s. "
        f"Idle with a guest attached: {rest['wakeups_in_5_s']} wake-ups in 5 s. Memory per worker: "
        + "; ".join(f"{w['private_mb']} MB private, {w['pss_mb']} MB PSS" for w in rest["workers"])
        + "."
    )
    print(
        f"{machine['cpu']}, {machine['cores']} cores, Linux {machine['kernel']}, Python "
        f"{machine['python']}, numba {machine['numba']}, {machine['date']}."
    )


if __name__ == "__main__":
    main()
