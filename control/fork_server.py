"""fork_server.py - the process that loads the data plane once and is copied for every keeper.

Theory      multiprocessing's fork server. The guard (guard.py) launches it and is its parent, so
            that it outlives a control that dies; control, the guard's child, asks it for keepers.
            multiprocessing expects the one who asks to be the parent, and would wait for the server
            as for a child: `inherited` tells it not to.
Limits      One for a process. A server that dies is launched again by the guard, with a new control
            to go with it, whose keepers and workers stay.
No tracker  Nothing here is registered with multiprocessing's resource tracker. It would be a
            process more, and everybody who shares a table of descriptors would take care of it in
            the others' way.
Ownership   The environment variables VHOSTMQ_PRELOAD, VHOSTMQ_QUIET and OPENBLAS_NUM_THREADS.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing import forkserver, resource_tracker
from typing import Any

from dataplane import start
from shm.mailbox import Mailbox

_server: Any = forkserver._forkserver  # type: ignore[attr-defined]
_tracker: Any = resource_tracker._resource_tracker


def launch(quiet: bool) -> int:
    """Start it, unless it runs; its process id. It is not waited for: it loads the data plane,
    or compiles it, meanwhile. Raises OSError."""
    os.environ["VHOSTMQ_PRELOAD"] = str(os.getpid())
    os.environ["VHOSTMQ_QUIET"] = "1" if quiet else "0"
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy's; nothing here multiplies matrices
    forkserver.set_forkserver_preload([start.PRELOAD])
    if _tracker._fd is None:
        _tracker._fd = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)
        _tracker.ensure_running = resource_tracker.ensure_running = _nothing
    # A terminal sends Ctrl-C to every process of the group, but it is control that ends the others:
    # they inherit this.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    return int(_server._forkserver_pid)


def _nothing() -> None:
    pass


def inherited() -> None:
    """The server is our parent's child, not ours."""
    _server.ensure_running = _nothing


def make_keeper(mailbox: Mailbox) -> int:
    """A new keeper with this end of a mailbox; a descriptor of its process (pidfd). Raises OSError,
    EOFError."""
    context = multiprocessing.get_context("forkserver")
    made = context.Process(target=start.main, args=(mailbox,), daemon=True)
    made.start()
    assert made.pid is not None
    return os.pidfd_open(made.pid)
