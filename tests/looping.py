"""looping.py - `vhostmq run` whose workers can be led into a trap: the first that has a slow-path
frame while the file that VHOSTMQ_TEST_TRAP names is there removes it, and then does nothing but run
in a circle.

The program runs as it is; the fork server, of which workers are copies, imports this in place of
what it is told to load. Nobody else may import it: it changes what workers do.
"""

from __future__ import annotations

import os
import sys

from dataplane import start

if __name__ == "__main__":
    from control.cli import main

    start.PRELOAD = "tests.looping"
    globals().update(__spec__=None, __file__=None)  # or every keeper would be made to run this
    sys.exit(main())

from dataplane import preload, worker  # noqa: E402, F401

_answer = worker.Worker._slow_frames


def _fall(self: worker.Worker) -> None:
    try:
        os.unlink(os.environ["VHOSTMQ_TEST_TRAP"])
    except FileNotFoundError:
        _answer(self)
        return
    while True:
        pass


worker.Worker._slow_frames = _fall  # type: ignore[method-assign]
