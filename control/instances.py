"""instances.py - the running instance that an operator's command is about, and how rows about it
are shown.

Theory      An instance is found by its segment of shared memory (shm/segment.py), whose name holds
            the process id of `run` (control/guard.py). One that runs alone need not be named.
Limits      The user's own instances: their memory is nobody else's to read.
Ownership   Reads only.
Errors      SegmentError: no instance, several and none chosen, or one of another version.
"""

from __future__ import annotations

import json
from typing import Any

from shm.segment import Segment, SegmentError, running, workers_of


def chosen(pid: int | None) -> Segment:
    """The segment of the instance with this process id, or of the only one there is."""
    found = running()
    if pid is None and len(found) == 1:
        (pid,) = found
    if pid in found:
        name = found[pid]
        return Segment(name, workers_of(name))
    if pid is not None:
        raise SegmentError(f"process {pid} is no instance of yours")
    if not found:
        raise SegmentError("no instance of yours runs")
    ids = ", ".join(map(str, sorted(found)))
    raise SegmentError(f"several instances run: choose one with --pid ({ids})")


def show(rows: list[dict[str, Any]], names: tuple[str, ...], as_json: bool) -> None:
    """Print rows: aligned, under these names, or each as a JSON object."""
    if as_json:
        for row in rows:
            print(json.dumps(row))
    else:
        print(columns([list(names), *([_text(row[name]) for name in names] for row in rows)]))


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value)) or "-"
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 100 else f"{value:.2f}"
    return str(value)


def columns(rows: list[list[str]]) -> str:
    """Rows of cells as aligned text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
