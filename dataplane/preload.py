"""preload.py - what the fork server imports once, so that every worker starts with compiled code in
place.

Theory      Importing this in a fork server (VHOSTMQ_PRELOAD) compiles the entry points, or links
            the ones that are kept (shm/code.py); `warm` calls compile_all(). A fresh machine
            compiles once: the lock makes instances that start together wait for the first one, and
            a progress line says what goes on.
Why so      A worker made by forking this process costs about 10 ms and a few MB of private memory.
End         The fork server ends with its parent, the guard, at whatever point of the compilation it
            is.
Limits      The lock is a flock on a file of the cache folder: it goes away with the process that
            holds it.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import time

from dataplane import start
from dataplane.process import die_with, loading
from shm import code

if parent := os.environ.get("VHOSTMQ_PRELOAD"):
    die_with(int(parent))
    # A service manager signals every process of the group; it is control that ends the others.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    code.want(*start.WORKER_ENTRIES)

with loading():
    from dataplane import breath, worker
    from shm import jit

QUIET_S = 0.5


def compile_all(report: bool) -> int:
    """Compile or link every entry point under the cross-process lock; how many were compiled."""
    if jit.CACHE_DIR is None or not jit.COMPILER:
        return 0
    started_s = time.monotonic()

    def progress(name: str, done: int, total: int) -> None:
        if report and time.monotonic() - started_s > QUIET_S:
            print(
                f"vhostmq: compiling the data plane, {done} of {total} done ({name})",
                file=sys.stderr,
            )

    with open(jit.CACHE_DIR / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if report:
                print("vhostmq: another instance is compiling the data plane", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        compiled = jit.warm(progress)
    if report and compiled:
        taken_s = time.monotonic() - started_s
        print(
            f"vhostmq: data plane compiled in {taken_s:.0f} s; kept for the next start",
            file=sys.stderr,
        )
    return compiled


__all__ = ["breath", "worker"]

if parent:
    with loading():
        compile_all(report=os.environ.get("VHOSTMQ_QUIET") != "1")
