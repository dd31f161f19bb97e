"""watch.py - workers that do not go on, seen from outside.

Theory      Every LOOK_S control looks at the breaths that each worker has counted. One that has
            taken none since the last look, and does not wait for something to do, is late; so is
            one that a signal has stopped. A worker that is late LOOKS_MAX times in a row is stuck:
            it is killed, and another takes its place (places.py).
Rest        When all workers wait and none has taken a breath between two looks, control looks
            again after REST_S only: next to nothing of an idle instance runs. The first worker that
            has something to do again says so, once for each rest (instance.rests), before it
            begins: it may get stuck in that very breath.
Why so      A worker says in shared memory when it waits, so nothing has to be sent to it and idle
            ones are not woken. Looks are counted, not seconds: when the whole machine has paused,
            everybody is late once.
Limits      A worker that waits and is not woken is not seen. One that a debugger has stopped is
            left alone.
Ownership   Reads only.
"""

from __future__ import annotations

from typing import NamedTuple

from control.processes import stopped
from shm.layout import View

LOOK_S = 1.0
REST_S = 60.0
LOOKS_MAX = 3


class Seen(NamedTuple):
    """What the last look at one worker found."""

    pid: int = 0
    breaths: int = 0
    late: int = 0


class Watch:
    """Remembers what it saw of each worker, whose shared structs are `blocks`."""

    def __init__(self, blocks: list[View]) -> None:
        self.blocks = blocks
        self.seen = [Seen() for _ in blocks]
        self.resting = False  # at the last look

    def look(self) -> list[int]:
        """The workers that are stuck now."""
        self.resting = self.still()
        return [number for number in range(len(self.blocks)) if self._is_stuck(number)]

    def still(self) -> bool:
        """Whether all wait, and none has taken a breath since it was looked at."""
        return all(
            (block["sleeping"] or not block["pid"]) and block["breaths"] == seen.breaths
            for block, seen in zip(self.blocks, self.seen, strict=True)
        )

    def _is_stuck(self, number: int) -> bool:
        block, seen = self.blocks[number], self.seen[number]
        pid, breaths, sleeping = block["pid"], block["breaths"], block["sleeping"]
        same = pid and (pid, breaths) == (seen.pid, seen.breaths)
        late = same and (not sleeping or stopped(pid))
        self.seen[number] = Seen(pid, breaths, seen.late + 1 if late else 0)
        return self.seen[number].late >= LOOKS_MAX
