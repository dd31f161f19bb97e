"""`python -m benchmarks.compare OLD NEW`: two results side by side.

Theory      Every number that both results have: median (minimum-maximum) of each, and the ratio of
            the medians. Where the ranges of the runs overlap, the difference may be noise, and the
            line says so; it says as well where a number was measured once and has no range. What
            only one of them has is named at the end.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

from benchmarks.series import KEYS

Case = tuple[str, ...]
Spread = dict[str, float]


def numbers(result: dict[str, Any]) -> dict[Case, Spread]:
    """Every number of a result by what it is of; one that was measured once as its own range."""
    found: dict[Case, Spread] = {}
    for part, value in result.items():
        if part != "machine":
            _collect(value, (part,), found)
    return found


def _collect(value: Any, case: Case, found: dict[Case, Spread]) -> None:
    if isinstance(value, list):
        for number, row in enumerate(value):
            named = tuple(str(row[key]) for key in KEYS if key in row) or (str(number),)
            measures = {name: one for name, one in row.items() if name not in KEYS}
            _collect(measures, (*case, *named), found)
    elif isinstance(value, dict) and "median" in value:
        found[case] = value
    elif isinstance(value, dict):
        for name, one in value.items():
            _collect(one, (*case, name), found)
    else:
        found[case] = {"median": value, "min": value, "max": value}


def line(case: Case, old: Spread, new: Spread) -> str:
    """One line of the comparison."""
    ratio = new["median"] / old["median"] if old["median"] else float("nan")
    once = old["min"] == old["max"] and new["min"] == new["max"]
    apart = new["min"] > old["max"] or new["max"] < old["min"]
    shown = [f"{s['median']:.4g} ({s['min']:.4g}-{s['max']:.4g})" for s in (old, new)]
    verdict = "  no range" if once else "" if apart else "  ranges overlap"
    return f"{' '.join(case):66} {shown[0]:>28} {shown[1]:>28} {ratio:6.2f}{verdict}"


def main() -> None:
    """Print every common number; warn where the machines differ."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare")
    parser.add_argument("old", type=pathlib.Path)
    parser.add_argument("new", type=pathlib.Path)
    paths = parser.parse_args()
    old, new = (json.loads(path.read_text()) for path in (paths.old, paths.new))
    for name, value in old["machine"].items():
        if name != "date" and new["machine"].get(name) != value:
            print(f"warning: {name} differs: {value} and {new['machine'].get(name)}")
    ours, theirs = numbers(old), numbers(new)
    for case, spread in ours.items():
        if case in theirs and (spread["median"] or theirs[case]["median"]):
            print(line(case, spread, theirs[case]))
    for path, lacking in ((paths.old, ours.keys() - theirs), (paths.new, theirs.keys() - ours)):
        for case in sorted(lacking):
            print(f"only in {path}: {' '.join(case)}")


if __name__ == "__main__":
    main()
