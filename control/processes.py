"""processes.py - what the kernel says of a worker's process (proc(5), /proc/PID/stat), and when
one that died is made again.

Again       At once when it had lived for a while, else later with each time in a row.
Ownership   Reads only. A process that has ended reads as none.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
STATE, USER, SYSTEM, ENDED_USER, ENDED_SYSTEM, STARTED = 3, 14, 15, 16, 17, 22  # as proc(5) counts

AGAIN_MAX_S = 5.0


def again_in(failures: int) -> tuple[float, str]:
    """Seconds until a process is made that has failed so many times in a row, and the same in words
    for the end of a line."""
    delay_s = min(0.1 * 2**failures - 0.1, AGAIN_MAX_S)
    return delay_s, f" in {delay_s:.1f} s, failure {failures} in a row" if failures else ""


def _fields(pid: int) -> list[str]:
    """The fields from STATE on; none without a process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text() if pid else ""
    except OSError:
        text = ""
    return text.rpartition(")")[2].split()  # the name before it may hold anything


class Cpu(NamedTuple):
    """What there is to say of a process's processor time; zeros for none."""

    started: int  # ticks since boot: tells one process from another with its number
    used_s: float
    ended_s: float  # used by children that have ended


def process_cpu(pid: int) -> Cpu:
    """Processor time of a process."""
    fields = _fields(pid)
    if not fields:
        return Cpu(0, 0.0, 0.0)
    numbers = (STARTED, USER, SYSTEM, ENDED_USER, ENDED_SYSTEM)
    started, *ticks = (int(fields[number - STATE]) for number in numbers)
    return Cpu(started, sum(ticks[:2]) / TICKS_PER_S, sum(ticks[2:]) / TICKS_PER_S)


def stopped(pid: int) -> bool:
    """Whether a signal has stopped the process; not: a debugger."""
    return _fields(pid)[:1] == ["T"]
