"""`python -m benchmarks.compare OLD NEW`: two results side by side.

Theory      Every number that both results have: median (minimum-maximum) of each, and the ratio of
            the medians. Where the ranges of the runs overlap, the difference may be noise, and the
            line says so.
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

from benchmarks.series import KEYS

Spread = dict[str, float]


def numbers(result: dict[str, Any]) -> dict[tuple[str, ...], Spread]:
    """Every spread of a result by what it is of."""
    found = {}
    for part in result.values():
        for row in part if isinstance(part, list) else ():
            case = tuple(str(row[key]) for key in KEYS if key in row)
            for name, value in row.items():
                if isinstance(value, dict) and "median" in value:
                    found[(*case, name)] = value
    return found


def line(case: tuple[str, ...], old: Spread, new: Spread) -> str:
    """One line of the comparison."""
    ratio = new["median"] / old["median"] if old["median"] else float("nan")
    apart = new["min"] > old["max"] or new["max"] < old["min"]
    shown = [f"{s['median']:.4g} ({s['min']:.4g}-{s['max']:.4g})" for s in (old, new)]
    verdict = "" if apart else "  ranges overlap"
    return f"{' '.join(case):56} {shown[0]:>28} {shown[1]:>28} {ratio:6.2f}{verdict}"


def main() -> None:
    """Print every common number; warn where the machines differ."""
    old, new = (json.loads(pathlib.Path(path).read_text()) for path in sys.argv[1:3])
    for name, value in old["machine"].items():
        if name != "date" and new["machine"].get(name) != value:
            print(f"warning: {name} differs: {value} and {new['machine'].get(name)}")
    theirs = numbers(new)
    for case, spread in numbers(old).items():
        if case in theirs:
            print(line(case, spread, theirs[case]))


if __name__ == "__main__":
    main()
