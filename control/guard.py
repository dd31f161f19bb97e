"""guard.py - what keeps control's descriptors when control dies.

Theory      `run` opens what an instance needs and then makes control as a child that shares its
            table of descriptors (dataplane/keeper.py has the way), and waits: the process that an
            operator knows does nothing that a guest, a front-end or the network could upset. When
            control dies, workers go on; the next child has the front-end's socket, the guest's
            memory and the workers' mailboxes under the numbers that are in the notes (notes.py).
              guard    makes control; waits; passes SIGTERM and SIGINT on; again
              control  server.py; its exit status is the guard's
Again       At once, later and later if it dies again within CALM_S, FAILURES_MAX times in a row and
            no more: a service manager may know better then.
            A fork server that dies is launched again, and control with it, which knows where it is.
End         When the guard is killed control dies with it, and everybody else with their mailboxes.
Ownership   Descriptors that a dead control had opened and not written down are closed by the next.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
import traceback
from collections.abc import Callable

from control import fork_server
from control.logs import Log
from control.notes import Notes
from control.processes import again_in
from dataplane.keeper import descriptors, fork_with_files
from dataplane.process import die_with

CALM_S = 3.0  # more than until its first look at the workers (watch.py LOOK_S)
FAILURES_MAX = 8
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Guard:
    """Makes controls, one after the other."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.notes = Notes()
        self.ending = False  # a signal came
        self.base: set[int] = set()  # descriptors that were there before any control
        self._child = 0
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, nobody could be waited for
        for number in SIGNALS:
            signal.signal(number, self._end)

    def _end(self, *_: object) -> None:
        self.ending = True
        if self._child:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._child, signal.SIGTERM)

    def run(self, control: Callable[[], int]) -> int:
        """Make controls until one ends by itself; the exit status. `control` is called in each
        child."""
        failures = 0
        while not self.ending:
            started_s = time.monotonic()
            try:
                server = self._launch()
                status = self._wait_for(self._make(control), server)
                how = f"status {status}"
            except OSError as error:
                status, how = os.EX_SOFTWARE, str(error)
            if (status >= 0 and status != os.EX_SOFTWARE) or self.ending:
                for number in SIGNALS:  # whose handlers go before the process does
                    signal.signal(number, signal.SIG_IGN)
                return min(max(status, 0), 1)
            failures = 0 if time.monotonic() - started_s > CALM_S else failures + 1
            if failures == FAILURES_MAX:
                self.log.error(f"control died ({how}) {failures} times in a row: stopped")
                return 1
            delay_s, later = again_in(failures)
            self.log.error(f"control died ({how}); another takes its place{later}")
            deadline_s = time.monotonic() + delay_s
            while not self.ending and (left_s := deadline_s - time.monotonic()) > 0:
                time.sleep(min(left_s, 0.05))  # a signal does not end a sleep
        return 0

    def _launch(self) -> int:
        """The fork server; its descriptors are no control's."""
        before = descriptors() if self.base else set()
        server = fork_server.launch(self.log.quiet)
        after = descriptors()
        self.base = self.base & after | after - before
        return server

    def _make(self, control: Callable[[], int]) -> int:
        guard = os.getpid()
        self._child = 0
        child = fork_with_files()
        if child == 0:
            status = os.EX_SOFTWARE
            try:
                die_with(guard)
                fork_server.inherited()
                status = control()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)  # nothing of the guard's is to be unwound here
        self._child = child
        if self.ending:
            os.kill(child, signal.SIGTERM)
        return child

    def _wait_for(self, child: int, server: int) -> int:
        """The status of a control that has ended; it is ended when the fork server has."""
        while True:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
            assert ended is not None
            if ended.si_pid not in (child, server):
                os.waitpid(ended.si_pid, 0)  # whoever it is: a container's first process gets some
                continue
            if ended.si_pid == server and not self.ending:
                self.log.error("the fork server died; another takes its place, and control's")
                os.kill(child, signal.SIGKILL)
            self._child = 0
            _, status = os.waitpid(child, 0)
            return os.waitstatus_to_exitcode(status)
