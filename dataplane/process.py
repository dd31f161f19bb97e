"""process.py - what a child process does first: tie its life to its parent's, and load the compiled
code. No compiled code itself.

Theory      PR_SET_PDEATHSIG has the kernel kill a process when its parent ends, however that
            happens: SIGKILL to the parent leaves nobody behind.
            What a process loads once stays: loading() keeps the collector from going through it
            again and again meanwhile (a sixth of the time where the compiler is among it, 170 000
            objects), and from writing to its pages later, which copies of the process share.
Limits      The kernel forgets the wish when the process executes a program with more privileges.
Ownership   Each process for itself.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None)  # loaded here: a child between fork and exec had better not look for it


def die_with(parent: int) -> None:
    """End this process when its parent, process `parent`, ends; at once when it already has."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


@contextmanager
def loading() -> Iterator[None]:
    """Make objects that stay for as long as the process does."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
