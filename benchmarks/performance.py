"""`python -m benchmarks.performance`: docs/performance.md and docs/sweep.md, made from results.

Theory      The goals with our figure, the other one and their ratio; for what is not met, the
            hand-written paragraph of its topic from benchmarks/notes.md; every row of the result;
            the model; plot.py's pictures. The sweep takes long and its rows are many: it has a
            result and a document of its own. Nothing in either document is written into it by hand,
            and a test holds them to the committed results.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from benchmarks import model
from benchmarks.goals import GOALS, Goal, Result
from benchmarks.lab import ROOT
from benchmarks.table import Row, at_rest, spread
from shm.schema import FLOWS_MAX

DOCUMENT, RESULT = ROOT / "docs/performance.md", ROOT / "benchmarks/results.json"
SWEEP, SWEEP_RESULT = ROOT / "docs/sweep.md", ROOT / "benchmarks/sweep.json"
NOTES = ROOT / "benchmarks/notes.md"
PARTS = {
    "throughput": "TCP through `vhostmq guest`",
    "qemu": "A Debian kernel in QEMU, one pair",
    "datagrams": "UDP through `vhostmq guest`, as fast as it goes",
    "transactions": "64 bytes there and back",
    "flows": "64 bytes there and back, over many open connections in turn",
    "slow_receiver": "TCP to a program that takes 64 KiB every 2 ms, of its streams in turn",
    "pairs": "Queue pairs and workers",
    "polling": "Looking for more work before sleeping",
    "hops": "8 streams that go to another queue so many times a second (hop)",
    "kills": "One SIGKILL half-way, 32 connections: requests in turn (kill), streams (kill_tcp)",
    "ring": "A transmit ring drained, 64-byte frames",
    "references": "For reference: without a virtual machine",
}
PICTURES = {  # of benchmarks/plot.py, beside the document
    "throughput": "TCP, Gbit/s, against passt",
    "cpu": "TCP, processor time of the back-end per GB, against passt",
    "pairs_throughput": "TCP, Gbit/s, against queue pairs and workers",
    "pairs_cpu": "TCP, processor time of the back-end per GB, against queue pairs and workers",
    "pairs_p50": "A request and its response, median, against queue pairs and workers",
    "pairs_p99": "The same, 99th percentile",
    "model": "The model's predictions, not measured",
}
SWEEP_HEAD = """# Everything with everything

Made by `python -m benchmarks.performance` from `benchmarks/sweep.json`, which `make sweep
PASST=/path/to/passt` writes: every load at every MTU with every number of queue pairs and workers,
passt with its one pair beside them, and rest ("idle"). 100 000 connections only with as many
workers as their descriptors need. Medians of {runs} runs of {seconds} s, minimum and maximum in
brackets; columns as in [performance.md](performance.md).
"""
Column = tuple[str, tuple[str, ...], dict[str, int]]
COLUMNS: tuple[Column, ...] = (  # title, measures of which a row has one, digits
    ("Gbit/s or per s", ("gbit_s", "per_s"), {"gbit_s": 2, "per_s": 0}),
    ("back-end CPU-s/GB or \u00b5s each", ("cpu_s_per_gb", "cpu_us_each"), {}),
    ("machine CPU-s/GB or \u00b5s each", ("machine_cpu_s_per_gb", "machine_cpu_us_each"), {}),
)
MORE = (  # title, measures that some rows have
    ("opened per s, the first tenth", "open_first_per_s", 0),
    ("the last tenth", "open_last_per_s", 0),
    ("longest wait for data, ms", "longest_gap_ms", 1),
    ("longest wait of a connection, ms", "longest_ms", 1),
    ("stalls of 200 ms", "stalls", 0),
    ("context switches per s", "idle_switches_per_s", 1),
    ("CPU \u00b5s per s", "idle_cpu_us_per_s", 0),
)
COUNTED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("system calls per MB or each", ("syscalls_per_mb", "syscalls_each")),
    ("notifications per packet", ("notifications_per_packet",)),
)
HEAD = """# Performance

Made by `python -m benchmarks.performance` from `benchmarks/results.json`, which `make bench
PASST=/path/to/passt` writes; the paragraphs on goals that are not met are those of
`benchmarks/notes.md`. Medians of {runs} runs of {seconds} s, minimum and maximum in brackets; the
back-ends of a comparison are up together and take turns. System calls and notifications were
counted in one more run that was not timed. "CPU" is the back-end's whole process tree, "machine"
everything that ran, guest and load included. A packet is one of the guest's interface: up to 64 KiB
with offloads. Over many connections system calls are those between their opening and closing.
Every load with every number of queue pairs and workers at every MTU is in [sweep.md](sweep.md).
"""


def notes(text: str) -> dict[str, str]:
    """Paragraphs by topic: `## topic`, then text."""
    found = {}
    for section in text.split("\n## ")[1:]:
        topic, _, body = section.partition("\n")
        found[topic.strip()] = body.strip()
    return found


def number(value: float) -> str:
    """Three significant digits, and no exponent."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def goal_line(goal: Goal, figures: tuple[float, float]) -> str:
    """One line of the table of goals."""
    sign = "\u2265" if goal.at_least else "\u2264"
    ours, theirs, ratio = number(figures[0]), "-", "-"
    if goal.theirs is not None:
        theirs, ratio = number(figures[1]), f"{figures[0] / figures[1]:.2f}"
    verdict = "met" if goal.met(figures) else "**not met**"
    return f"| {goal.text} | {sign} {goal.bound:g} | {ours} | {theirs} | {ratio} | {verdict} |"


def goals(result: Result) -> list[str]:
    """The table of goals, those that were measured."""
    lines = [
        "| measure | goal | vhostmq | passt, or as said | ratio | |",
        "|---|---|---|---|---|---|",
    ]
    measured = [(goal, goal.figures(result)) for goal in GOALS]
    return lines + [goal_line(goal, found) for goal, found in measured if found]


def unmet(result: Result) -> list[str]:
    """Topics with a goal that is not met, in order."""
    measured = [(goal, goal.figures(result)) for goal in GOALS]
    missed = [goal.topic for goal, found in measured if found and not goal.met(found)]
    return list(dict.fromkeys(missed))


def one_of(row: Row, names: tuple[str, ...]) -> str:
    """Which of these measures a row has, or ''."""
    return next((name for name in names if name in row), "")


def crowded(row: Row, cores: int) -> bool:
    """Whether workers and front-end have no core each."""
    return bool(row["workers"] + 1 > cores)


def line(row: Row, cores: int, more: list[tuple[str, str, int]]) -> str:
    """One row of a result; `more`: those of MORE that its part has."""
    load = f"{row['load']} {row['amount']} {row['direction']}".removesuffix(" both")
    where = f"{row['back_end']} behind {row['front_end']}"
    where += f", looks up to {row['poll_us']} \u00b5s" if row.get("poll_us") else ""
    star = " \\*" if crowded(row, cores) else ""
    cells = [load, str(row["mtu"]), where, f"{row['pairs']}/{row['workers']}{star}"]
    for _, names, digits in COLUMNS:
        name = one_of(row, names)
        cells.append(spread(row, name, digits.get(name, 2)) if name else "-")
    latency = [number(row[name]["median"]) for name in ("p50_us", "p99_us") if name in row]
    cells.append(", ".join(latency))
    cells += [spread(row, name, digits) for _, name, digits in more]
    counted = row.get("counted", {})
    for _, names in COUNTED:
        name = one_of(counted, names)
        cells.append(number(counted[name]) if name else "-")
    cells.append(str(row.get("failed") or ""))
    return "| " + " | ".join(cells) + " |"


def rows(part: list[Row], cores: int) -> list[str]:
    """All rows of a part."""
    more = [column for column in MORE if any(column[1] in row for row in part)]
    titles = ["load", "MTU", "what", "pairs/workers", *(title for title, *_ in COLUMNS)]
    titles += ["p50, p99 \u00b5s", *(title for title, *_ in more)]
    titles += [*(title for title, _ in COUNTED), "failed runs"]
    return ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"] + [
        line(row, cores, more) for row in part
    ]


def memory(found: dict[str, Any]) -> str:
    """What one flow of many takes."""
    few, many = found["flows_before"], found["flows"]
    return (
        f"Memory of {found['workers']} workers and control with {many} flows: "
        f"{found['open_mb']:.1f} MB PSS; with {few}: {found['before_mb']:.1f} MB. "
        f"That is {found['bytes_per_flow']:.0f} bytes a flow, the kernel's not counted."
    )


def machine(found: dict[str, Any]) -> str:
    """Where, with what, and a warning where there are too few cores."""
    known = [f"{key} {value}" for key, value in found.items() if value not in ("", None)]
    return "Measured on: " + ", ".join(known) + "."


def commits(found: dict[str, str]) -> str:
    """Which commit each part was measured at."""
    parts: dict[str, list[str]] = {}
    for part, commit in found.items():
        parts.setdefault(commit, []).append(part)
    return "; ".join(f"commit {commit}: {', '.join(names)}" for commit, names in parts.items())


def warning(result: Result, names: Iterable[str]) -> list[str]:
    """Plain words where rows of these parts show the scheduler."""
    cores = result["machine"]["cores"]
    if not any(crowded(row, cores) for name in names for row in result.get(name, ())):
        return []
    return [
        f"**Lines with a \\*: workers and front-end are more than the {cores} cores**, which run "
        "the load's two ends and the host's kernel as well. Their rates show the scheduler, not "
        "scaling."
    ]


def small(result: Result) -> list[str]:
    """What is no row: start-up, rest, the parts of a breath."""
    found = []
    if "start" in result and "at_rest" in result:
        found += ["## Start, and rest", at_rest(result)]
    if "micro" in result:
        lines = ["| part (benchmarks/micro.py) | best of its rounds |", "|---|---|"]
        lines += [f"| {name} | {number(value)} |" for name, value in result["micro"].items()]
        found += ["## The parts of a breath, alone", "\n".join(lines)]
        found.append(
            f"The table holds {FLOWS_MAX} flows; the lookup among a million is in one compiled for "
            "more."
        )
    return found


def document(result: Result, text: str) -> str:
    """docs/performance.md."""
    written = notes(text)
    known = dict(result["machine"])
    measured_at = known.pop("commits", {})
    parts = [HEAD.format(**known), machine(known), commits(measured_at)]
    parts += [*warning(result, PARTS), "## Goals"]
    parts.append("\n".join(goals(result)))
    for topic in unmet(result):
        parts += [f"### Not met: {topic}", written.get(topic, "Not looked into yet.")]
    for name, title in PARTS.items():
        if name in result:
            parts += [f"## {title}", "\n".join(rows(result[name], result["machine"]["cores"]))]
        if name == "flows" and "flow_memory" in result:
            parts.append(memory(result["flow_memory"]))
    parts += small(result)
    parts += ["## Model, not measurement", *model.section(result), "## Pictures"]
    parts += [f"![{title}](plots/{name}.svg)" for name, title in PICTURES.items()]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def sweep(result: Result) -> str:
    """docs/sweep.md."""
    known = dict(result["machine"])
    commit = commits({"sweep": known.pop("commits")["sweep"]})
    lines = "\n".join(rows(result["sweep"], known["cores"]))
    parts = [SWEEP_HEAD.format(**known), machine(known), commit, *warning(result, ["sweep"]), lines]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def main() -> None:
    """Write the documents."""
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(document(json.loads(RESULT.read_text()), NOTES.read_text()))
    SWEEP.write_text(sweep(json.loads(SWEEP_RESULT.read_text())))
    print(DOCUMENT, SWEEP)


if __name__ == "__main__":
    main()
