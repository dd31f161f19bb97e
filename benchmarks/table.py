"""`python -m benchmarks.table [FILE]`: README's tables, from a result of `python -m benchmarks`.

Theory      What stands in README between the first line of the first table and the line that names
            the machine is replaced; the words around it are written by hand.
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

README = pathlib.Path(__file__).resolve().parent.parent / "README.md"
Row = dict[str, Any]


def spread(row: Row | None, name: str, digits: int) -> str:
    """Median (minimum-maximum), or a dash where nothing was measured."""
    if row is None or name not in row:
        return "-"
    value = row[name]
    low, high = f"{value['min']:.{digits}f}", f"{value['max']:.{digits}f}"
    return f"{value['median']:.{digits}f} ({low}-{high})"


def seconds(spread_ms: dict[str, float]) -> str:
    """Median (minimum-maximum) of milliseconds."""
    low, high = spread_ms["min"] / 1000, spread_ms["max"] / 1000
    return f"{spread_ms['median'] / 1000:.1f} ({low:.1f}-{high:.1f})"


def pairs(rows: list[Row]) -> list[tuple[Row, Row | None]]:
    """Our rows, those with all workers where there are two, each with passt's of the same case."""
    keys = ("front_end", "mtu", "load", "amount", "direction")
    theirs = {tuple(row[k] for k in keys): row for row in rows if row["back_end"] == "passt"}
    ours: dict[tuple[Any, ...], Row] = {}
    for row in sorted(rows, key=lambda row: row["workers"]):
        if row["back_end"] == "vhostmq":
            ours[tuple(row[k] for k in keys)] = row
    cases = dict.fromkeys(tuple(row[k] for k in keys) for row in rows)
    return [(ours[case], theirs.get(case)) for case in cases if case in ours]


def way(row: Row) -> str:
    """Direction in words."""
    return {"up": "guest to host", "down": "host to guest"}.get(row["direction"], "")


def throughput(rows: list[Row]) -> list[str]:
    """One line per MTU, streams and direction, the back-ends side by side."""
    lines = [
        "| MTU | streams | direction | vhostmq Gbit/s | passt Gbit/s "
        "| vhostmq CPU-s/GB | passt CPU-s/GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for ours, theirs in pairs(rows):
        lines.append(
            f"| {ours['mtu']} | {ours['amount']} | {way(ours)} | {spread(ours, 'gbit_s', 1)} "
            f"| {spread(theirs, 'gbit_s', 1)} | {spread(ours, 'cpu_s_per_gb', 2)} "
            f"| {spread(theirs, 'cpu_s_per_gb', 2)} |"
        )
    return lines


def each(rows: list[Row]) -> list[str]:
    """One line per kind of datagram or transaction."""
    names = {
        "udp": "datagrams of {} bytes",
        "udp_train": "datagrams of {} bytes, sent as trains",
        "rr": "request/response",
        "crr": "connect, request, response",
    }
    lines = [
        "| what | direction | vhostmq per s | passt per s | vhostmq CPU-\u00b5s each "
        "| passt CPU-\u00b5s each | vhostmq p50, p99 \u00b5s | passt p50, p99 \u00b5s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for ours, theirs in pairs(rows):
        cells = [names[ours["load"]].format(ours["amount"]), way(ours)]
        cells += [
            spread(row, name, digits)
            for name, digits in (("per_s", 0), ("cpu_us_each", 1))
            for row in (ours, theirs)
        ]
        cells += [latency(ours), latency(theirs)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def latency(row: Row | None) -> str:
    """Medians of the runs' percentiles."""
    if row is None or "p50_us" not in row:
        return ""
    return f"{row['p50_us']['median']:.0f}, {row['p99_us']['median']:.0f}"


def at_rest(result: dict[str, Any]) -> str:
    """Start-up, idle and memory in words."""
    start, rest = result["start"], result["at_rest"]
    return (
        f"From exec to the answer to GET_FEATURES: {spread(start['warm'], 'answer_ms', 0)} ms with "
        f"everything compiled, {spread(start['cold'], 'answer_ms', 0)} ms with nothing. From exec "
        f"until all workers are ready: {seconds(start['warm']['workers_ms'])} s and "
        f"{seconds(start['cold']['workers_ms'])} s. From exec "
        "to the end of the first command of a guest started then: "
        f"{seconds(start['warm']['guest_ms'])} s and {seconds(start['cold']['guest_ms'])} s. "
        f"Idle with a guest attached: {rest['wakeups_in_5_s']} wake-ups in 5 s. "
        "Memory of each worker with its keeper: "
        + "; ".join(f"{w['private_mb']} MB private, {w['pss_mb']} MB PSS" for w in rest["workers"])
        + "."
    )


def killed(rows: list[Row], runs: int) -> str:
    """A worker, or passt, gets SIGKILL, in words."""
    said = []
    for ours, theirs in pairs([row for row in rows if row["load"] == "kill"]):
        if ours["front_end"] != "vhostmq_guest":
            continue
        said.append(
            f"SIGKILL for a worker while requests go over {ours['amount']} connections in turn: "
            f"the longest wait of any {spread(ours, 'longest_ms', 0)} ms, {ours['failed']} of "
            f"{runs} runs broken off."
        )
        if theirs is not None:
            said.append(
                "For passt, which is one process and is started again at once: "
                f"{theirs['failed']} of {runs}: its front-end is cut off, and all flows are gone."
            )
    return " ".join(said)


def made_on(machine: dict[str, Any]) -> str:
    """The machine in words."""
    return (
        f"{machine['cpu']}, {machine['cores']} cores, Linux {machine['kernel']}, Python "
        f"{machine['python']}, numba {machine['numba']}, {machine['date']}."
    )


def text(result: dict[str, Any]) -> str:
    """All of it, Markdown."""
    tables = throughput(result["throughput"]), each(result["datagrams"] + result["transactions"])
    paragraphs = ["\n".join(lines) for lines in tables]
    machine = result["machine"]
    if "kills" in result:
        paragraphs.append(killed(result["kills"], machine["runs"]))
    return "\n\n".join([*paragraphs, f"{at_rest(result)}\n{made_on(machine)}"])


def renewed(readme: str, made: str) -> str:
    """README with the tables of another result."""
    begin = readme.index(made.partition("\n")[0])
    last = readme.index(", numba ", begin)
    return readme[:begin] + made + readme[readme.index("\n", last) :]


def main() -> None:
    """Write them."""
    path = sys.argv[1] if len(sys.argv) > 1 else "benchmarks/results.json"
    made = text(json.loads(pathlib.Path(path).read_text()))
    README.write_text(renewed(README.read_text(), made))


if __name__ == "__main__":
    main()
