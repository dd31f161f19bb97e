"""`python -m benchmarks.plot [RESULT [FOLDER]]`: a result as pictures, PNG and SVG.

Theory      Bars are medians, whiskers the range of the runs. Against passt: throughput and
            processor time per GB. Against queue pairs: the same for vhostmq alone, and the latency
            of a request. Where workers and front-end have no core each (performance.crowded) rates
            show the scheduler, and bars are drawn hollow. What model.py predicts has a picture of
            its own.
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams["svg.hashsalt"] = "vhostmq"  # one result, one picture, byte for byte

import matplotlib.pyplot as plt  # noqa: E402

from benchmarks import model  # noqa: E402
from benchmarks.goals import WAYS  # noqa: E402
from benchmarks.performance import crowded  # noqa: E402

Row = dict[str, Any]
COLOURS = {"vhostmq": "tab:blue", "passt": "tab:orange"}


def bars(axes: Any, places: list[float], rows: list[Row], name: str, **how: Any) -> None:
    """Medians with whiskers."""
    medians = [row[name]["median"] for row in rows]
    low = [row[name]["median"] - row[name]["min"] for row in rows]
    high = [row[name]["max"] - row[name]["median"] for row in rows]
    axes.bar(places, medians, 0.38, yerr=[low, high], capsize=3, **how)


def against_passt(result: Row, name: str, title: str) -> Any:
    """Every throughput case, the back-ends side by side."""
    figure, axes = plt.subplots(figsize=(9, 4))
    rows = [row for row in result["throughput"] if row["back_end"] == "passt" or row["workers"] > 1]
    cases = list(dict.fromkeys((r["mtu"], r["amount"], r["direction"]) for r in rows))
    for shift, backend in enumerate(("vhostmq", "passt")):
        mine = [row for row in rows if row["back_end"] == backend and name in row]
        at = [cases.index((r["mtu"], r["amount"], r["direction"])) + 0.4 * shift for r in mine]
        if mine:
            bars(axes, at, mine, name, label=backend, color=COLOURS[backend])
    axes.set_xticks([number + 0.2 for number in range(len(cases))])
    labels = [f"{streams} {way}\n{mtu}" for mtu, streams, way in cases]
    axes.set_xticklabels(labels, fontsize="x-small")
    axes.set_xlabel("streams, direction, MTU")
    axes.set_ylabel(title)
    axes.legend()
    return figure


def against_pairs(result: Row, load: str, name: str, title: str) -> Any:
    """vhostmq with different numbers of queue pairs and workers."""
    figure, axes = plt.subplots(figsize=(9, 4))
    rows = [row for row in result["pairs"] if row["load"] == load and name in row]
    cases = list(dict.fromkeys((row["pairs"], row["workers"]) for row in rows))
    for shift, way in enumerate(dict.fromkeys(row["direction"] for row in rows)):
        mine = [row for row in rows if row["direction"] == way]
        at = [cases.index((row["pairs"], row["workers"])) + 0.4 * shift for row in mine]
        bars(axes, at, mine, name, label=way, color=f"C{shift}", edgecolor=f"C{shift}")
        for patch, row in zip(axes.containers[-1], mine, strict=True):
            patch.set_fill(not crowded(row, result["machine"]["cores"]))
    axes.set_xticks([number + 0.2 for number in range(len(cases))])
    axes.set_xticklabels([f"{pairs} / {workers}" for pairs, workers in cases])
    axes.set_xlabel("queue pairs / workers; hollow: workers and front-end have no core each")
    axes.set_ylabel(title)
    axes.legend()
    return figure


def predicted(result: Row) -> Any:
    """The model alone: nothing in this picture was measured at these numbers of cores."""
    figure, axes = plt.subplots(figsize=(9, 4))
    for line in model.predictions(model.costs(result)):
        label = f"{WAYS[line['direction']]}, by {line['kind']}"
        style = "--" if line["kind"] == "workers" else ":"
        axes.plot(model.CORES, line["gbit_s"], style, marker="o", mfc="none", label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(model.CORES, [str(number) for number in model.CORES])
    axes.set_xlabel("workers, or cores of the machine")
    axes.set_ylabel("Gbit/s, predicted, not measured")
    axes.legend()
    return figure


def main() -> None:
    """Write all pictures."""
    path = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "benchmarks/results.json")
    folder = pathlib.Path(sys.argv[2] if len(sys.argv) > 2 else "docs/plots")
    result = json.loads(path.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in {
        "throughput": against_passt(result, "gbit_s", "Gbit/s"),
        "cpu": against_passt(result, "cpu_s_per_gb", "back-end CPU seconds per GB"),
        "pairs_throughput": against_pairs(result, "tcp", "gbit_s", "Gbit/s, 8 streams"),
        "pairs_cpu": against_pairs(result, "tcp", "cpu_s_per_gb", "back-end CPU seconds per GB"),
        "pairs_p50": against_pairs(result, "rr", "p50_us", "request, median, \u00b5s"),
        "pairs_p99": against_pairs(result, "rr", "p99_us", "request, 99th percentile, \u00b5s"),
        "model": predicted(result),
    }.items():
        figure.tight_layout()
        figure.savefig(folder / f"{name}.png")
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        plt.close(figure)
        print(folder / f"{name}.png")


if __name__ == "__main__":
    main()
