"""A keeper that control left behind when it died between telling it to make a worker and noting
which process that is: the next control finds the worker, has it made, or has another one made, and
its answers are to what was asked.

The keeper is the real one, in a process of its own; its worker is played.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from test_bring_up import Office

from control.places import NotedSlot
from control.workers import Workers
from dataplane import commands, keeper
from shm import schema
from shm.layout import View
from shm.mailbox import Mailbox

BASE = 4242
NONE = NotedSlot(-1, -1, -1, False, frozenset(), 0.0, 0)
Told = Callable[[], tuple[int, int]]


def serve(mailbox: Mailbox, block: View, tells: int) -> None:
    """Be a worker: first of all, say which process, and as which one in the place."""
    os.write(tells, b"%d %d\n" % (os.getpid(), block["restarts"]))
    mailbox.send(commands.Done(os.getpid()))
    while True:
        command, fds = mailbox.receive()
        for fd in fds:
            os.close(fd)
        answer: Any = commands.Done()
        match command:
            case commands.Start():
                answer = commands.Failed("unknown command Start")
            case commands.Describe(token):
                answer = commands.Have(token, os.getpid(), (), (), ())
            case commands.StopRing():
                answer = commands.Done(BASE)
        mailbox.send(answer)


class Keeper:
    """The keeper of place 0, and what its workers tell."""

    def __init__(self, office: Office, patch: pytest.MonkeyPatch) -> None:
        segment = office.segment
        block = View(schema.WORKER, segment.buffer, segment.offsets.worker)
        self.mailbox, theirs = Mailbox.pair()
        self._told, tells = os.pipe()

        def work(mailbox: Mailbox, start: Any, fds: list[int], kept: set[int]) -> None:
            serve(mailbox, block, tells)

        patch.setattr(keeper, "_work", work)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self.mailbox.close()
                keeper.main(theirs)
            finally:
                os._exit(0)
        theirs.close()
        os.close(tells)

    def told(self) -> tuple[int, int]:
        """The next worker: its process, and the place's restarts when it began."""
        assert select.select([self._told], [], [], 5)[0], "no worker was made"
        pid, restarts = os.read(self._told, 100).split()
        return int(pid), int(restarts)

    def tells_more(self) -> bool:
        return bool(select.select([self._told], [], [], 0.3)[0])

    def end(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._told)
        self.mailbox.close()


@pytest.fixture
def office(monkeypatch: pytest.MonkeyPatch) -> Iterator[Office]:
    monkeypatch.setattr(Workers, "_midwife", lambda self: None)
    made = Office()
    yield made
    made.close()


@pytest.mark.parametrize("what", ["lives", "died", "was not made"])
def test_it_is_found(office: Office, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    workers, kept = office.workers, Keeper(office, monkeypatch)
    slot = workers.slots[0]
    first = 0
    if what != "was not made":
        kept.mailbox.send(workers._start_command(slot), workers._wires(slot).fds())
        first, _ = kept.told()
    if what == "died":
        os.kill(first, signal.SIGKILL)
        time.sleep(0.2)
    pidfd, box = os.pidfd_open(kept.pid), os.dup(kept.mailbox.fileno())
    noted = NotedSlot(pidfd, box, -1, True, frozenset(), time.monotonic() - 10, 0)
    workers.find([noted, NONE])
    if what == "lives":
        assert not kept.tells_more()
    else:
        first, restarts = kept.told()
        assert restarts > 0, "it looks for what one before it has left"
    assert slot.ready and slot.pidfd >= 0 and 0 not in office.ordered()
    assert workers._answer(slot, commands.StopRing(0)) == commands.Done(BASE)
    assert workers._block(slot)["pid"] == first
    kept.end()
