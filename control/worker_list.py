"""worker_list.py - what each worker of a running instance does: `vhostmq workers`.

Theory      The counters of the segment are read twice, `seconds` apart: what they grew by is the
            load. Processor time is the kernel's account of the process.
Columns     cpu: share of one processor; breaths, frames and bits a second; pairs: the queue pairs
            it serves, those with a started receive ring; flows: those it is home of; crossed:
            frames a second that it gave to other workers; moved: flows that came to it, ever.
Ownership   Reads only.
"""

from __future__ import annotations

import time
from typing import Any

from control import instances
from control.processes import process_cpu
from shm import schema
from shm.layout import View
from shm.segment import Segment

COLUMNS = ("worker", "pid", "pairs", "flows", "cpu", "breaths_s", "tx_frames_s", "tx_gbit_s",
           "rx_frames_s", "rx_gbit_s", "crossed_s", "moved", "restarts")  # fmt: skip


def show(pid: int | None, seconds: int, as_json: bool) -> int:
    """Print the load of each worker over the next seconds; the command's exit status."""
    segment = instances.chosen(pid)
    before = counters(segment)
    begin_s = time.monotonic()
    time.sleep(seconds)
    rows = load(before, counters(segment), time.monotonic() - begin_s)
    segment.close()
    instances.show(rows, COLUMNS, as_json)
    return 0


def counters(segment: Segment) -> list[dict[str, Any]]:
    """What the segment and the kernel say of each worker now."""
    at, buffer = segment.offsets, segment.buffer
    instance = View(schema.INSTANCE, buffer, at.instance)
    found = []
    for number in range(at.workers):
        block = View(schema.WORKER, buffer, at.worker + number * schema.WORKER.size)
        pairs = [
            pair
            for pair in range(instance["pairs"])
            if instance.element("pair_worker", pair) == number
        ]
        row: dict[str, Any] = {"worker": number, "cpu_s": process_cpu(block["pid"]).used_s}
        row |= {name: block[name] for name in ("pid", "breaths", "handoff_frames", "restarts")}
        row["moved"] = block["rehomed_flows"]
        row["flows"] = _sum(block, "flows")
        row["pairs"] = [pair for pair in pairs if instance["rx_enabled"] >> pair & 1]
        for ring, name in ((0, "rx"), (1, "tx")):
            for field in ("packets", "bytes"):
                row[f"{name}_{field}"] = sum(
                    _ring(segment, 2 * pair + ring)[field] for pair in pairs
                )
        found.append(row)
    return found


def _ring(segment: Segment, index: int) -> View:
    at = segment.offsets.queue + index * schema.QUEUE.size
    return View(schema.QUEUE, segment.buffer, at)


def _sum(block: View, name: str) -> int:
    """Gauges may be below zero where flows ended that began at another worker."""
    count = schema.WORKER.fields[name].count
    total = sum(block.element(name, number) for number in range(count)) % (1 << 64)
    return total - (1 << 64 if total >> 63 else 0)


def load(
    before: list[dict[str, Any]], after: list[dict[str, Any]], seconds: float
) -> list[dict[str, Any]]:
    """A row of COLUMNS for each worker."""
    rows = []
    for old, new in zip(before, after, strict=True):
        grown = {
            name: max(value - old[name], 0) / seconds
            for name, value in new.items()
            if isinstance(value, int | float)
        }
        row = {name: new[name] for name in ("worker", "pid", "pairs", "flows", "moved", "restarts")}
        row |= {"cpu": grown["cpu_s"], "breaths_s": grown["breaths"]}
        row["crossed_s"] = grown["handoff_frames"]
        for name in ("rx", "tx"):
            row[f"{name}_frames_s"] = grown[f"{name}_packets"]
            row[f"{name}_gbit_s"] = grown[f"{name}_bytes"] * 8 / 1e9
        rows.append(row)
    return rows
