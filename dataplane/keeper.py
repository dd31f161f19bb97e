"""keeper.py - what keeps a worker's descriptors when the worker dies. No compiled code.

Theory      A keeper makes the worker as a child that shares its table of descriptors (clone(2),
            CLONE_FILES), and waits. Whatever the worker opens, accepts or is sent is the keeper's
            as well, under the same number, at no cost. When the worker dies, however that is, the
            next child finds all of it: every connection's socket, where the flow table says.
              keeper   takes control's Start from the mailbox; makes the worker; waits; reports
                       that it has died; again
              worker   answers Start and serves (worker.py), meanwhile the mailbox's only reader
Why so      Sending each connection's socket to another process, to be kept there, takes two system
            calls a connection and a second descriptor; this takes none. A keeper does nothing that
            a guest, a VMM or the network could upset.
Commands    What was sent to a worker that had died is discarded up to the next Start: control
            brings every worker to the whole wanted state (control/workers.py).
End         A worker that was told to stop, or whose mailbox has ended (control and its guard are
            gone), ends with status 0; then so does the keeper. When a keeper is killed its worker
            dies with it, and its connections with both.
Limits      Linux: CLONE_FILES.
Ownership   Closes what comes with discarded commands, nothing else; a new worker closes what it has
            no use for.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import traceback

from dataplane import commands
from dataplane.process import die_with
from shm.mailbox import DIED, Mailbox, MailboxError, Report

CLONE_FILES = 0x400
SYS_CLONE = 56 if os.uname().machine == "x86_64" else 220  # the generic table: aarch64 and others

_python = ctypes.PyDLL(None, use_errno=True)  # keeps the interpreter's lock, which a child then has
_python.syscall.restype = ctypes.c_long


def descriptors() -> set[int]:
    """This process's open descriptors."""
    found = {int(name) for name in os.listdir("/proc/self/fd")}
    return {fd for fd in found if os.path.exists(f"/proc/self/fd/{fd}")}  # listing opens one


def fork_with_files() -> int:
    """As os.fork, but parent and child share one table of descriptors. Raises OSError."""
    _python.PyOS_BeforeFork()
    child: int = _python.syscall(SYS_CLONE, CLONE_FILES | signal.SIGCHLD, 0, 0, 0, 0)
    if child == 0:
        _python.PyOS_AfterFork_Child()
        return 0
    _python.PyOS_AfterFork_Parent()
    if child < 0:
        raise OSError(ctypes.get_errno(), "a process cannot be made")
    return child


def _next_start(mailbox: Mailbox) -> tuple[commands.Start, list[int]]:
    """Control's next Start; what was meant for a worker that has died is discarded. Raises
    MailboxError."""
    while True:
        message, fds = mailbox.receive()
        if isinstance(message, commands.Start):
            return message, fds
        for fd in fds:
            os.close(fd)


def _work(mailbox: Mailbox, start: commands.Start, fds: list[int], kept: set[int]) -> int:
    """Be the worker; the status to end with."""
    from dataplane import worker

    try:
        die_with(os.getppid())
        return worker.main(mailbox, start, fds, kept)
    except BaseException:
        traceback.print_exc()
        return 1


def main(mailbox: Mailbox) -> None:
    """Make workers until one ends as it was told to."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    kept = descriptors()
    with contextlib.suppress(MailboxError):  # its end: so is the reason to be here
        while True:
            start, fds = _next_start(mailbox)
            # A service manager signals every process of the group; from here on control ends these.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            child = fork_with_files()
            if child == 0:
                os._exit(_work(mailbox, start, fds, kept))
            _, status = os.waitpid(child, 0)
            if status == 0:
                return
            mailbox.send(Report(DIED, status=os.waitstatus_to_exitcode(status)))
