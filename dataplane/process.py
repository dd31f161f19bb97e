"""process.py - what a child process does first: tie its life to its parent's. No compiled code.

Theory      PR_SET_PDEATHSIG has the kernel kill a process when its parent ends, however that
            happens: SIGKILL to the parent leaves nobody behind.
Limits      The kernel forgets the wish when the process executes a program with more privileges.
Ownership   Each process for itself.
"""

from __future__ import annotations

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None)  # loaded here: a child between fork and exec had better not look for it


def die_with(parent: int) -> None:
    """End this process when its parent, process `parent`, ends; at once when it already has."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
