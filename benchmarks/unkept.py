"""unkept.py - `vhostmq run` whose keepers keep nothing, to see what keeping costs.

Theory      A keeper makes its worker as a child that shares its table of descriptors
            (dataplane/keeper.py). Here it is an ordinary child, with a table of its own: the kernel
            need not count who uses it at every system call, and a worker's sockets end with it.
            Nothing else differs. The program runs as it is; the fork server, of which keepers are
            copies, imports this in place of what it is told to load.
"""

from __future__ import annotations

import os
import sys

from dataplane import start

if __name__ == "__main__":
    from control.cli import main

    start.PRELOAD = "benchmarks.unkept"
    globals().update(__spec__=None, __file__=None)  # or every keeper would be made to run this
    sys.exit(main())

from dataplane import keeper, preload  # noqa: E402, F401

keeper.fork_with_files = os.fork
