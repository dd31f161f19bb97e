"""dying.py - `vhostmq run` whose control is killed in the middle of something: at the place that
VHOSTMQ_TEST_PLACE names, when it comes there while the file that VHOSTMQ_TEST_TRAP names is there,
which it removes.

  lost         it has noted that a worker is gone, and has not ordered another
  take_born    it has noted that there may be a worker, and has not told its keeper to make it
  listeners    it has given a worker some of the forwarded ports
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from control import places, workers
from control.cli import main
from dataplane import commands


def _die() -> None:
    try:
        os.unlink(os.environ["VHOSTMQ_TEST_TRAP"])
    except FileNotFoundError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


def _deadly(call: Callable[..., Any]) -> Callable[..., Any]:
    def called(*arguments: Any) -> Any:
        _die()
        return call(*arguments)

    return called


def _tell(
    self: workers.Workers, slot: places.Slot, command: Any, fds: tuple[int, ...] = ()
) -> bool:
    done = _told(self, slot, command, fds)
    if isinstance(command, commands.ListenOn):
        _die()
    return done


_told = workers.Workers._tell

if __name__ == "__main__":
    match os.environ["VHOSTMQ_TEST_PLACE"]:
        case "lost":
            places.again_in = _deadly(places.again_in)
        case "take_born":
            places.Places._wires = _deadly(places.Places._wires)  # type: ignore[method-assign]
        case "listeners":
            workers.Workers._tell = _tell  # type: ignore[method-assign]
    globals().update(__spec__=None, __file__=None)  # or every keeper would be made to run this
    sys.exit(main())
