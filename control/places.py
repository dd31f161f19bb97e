"""places.py - the worker processes of an instance: a place for each, kept taken.

Theory      A place has a number, a keeper (dataplane/keeper.py) and, while it is up, a worker with
            a mailbox. What workers are to serve is workers.py's, which brings up who has come
            (bring_up) and is told of who has gone (left_behind).
Start       The fork server takes a moment to load the data plane (a minute to compile it on a fresh
            machine), so keepers are started by a thread while control already answers the
            front-end.
Death       A worker's keeper says when it has died; the next one is made at once, later and later
            when it dies again within RESTART_CALM_S. One that does not answer within ANSWER_S is
            killed and treated the same. The keeper has kept the sockets of its flows, so these go
            on. With a keeper that is gone (the mailbox is closed), a worker that cannot start, or
            one that has died FAILURES_KEPT times in a row, all of it is made anew: those
            connections are lost.
Limits      One command to a worker at a time; whoever asks waits for the answer.
Ownership   Writes worker.pid, worker.restarts.
"""

from __future__ import annotations

import abc
import contextlib
import heapq
import itertools
import os
import queue
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from control import fork_server
from control.logs import Log
from control.processes import AGAIN_MAX_S, again_in
from dataplane import commands
from shm import schema
from shm.layout import View
from shm.mailbox import (
    DIED,
    Mailbox,
    MailboxError,
    PeerDied,
    Report,
    ask,
    get_in_step,
    wait_for_death,
)
from shm.segment import Segment

ANSWER_S = 5.0
RESTART_CALM_S = 1.0
FAILURES_KEPT = 4  # what kills every worker again may be among what is kept
LAUNCH_S = 0.3
KILL_S = 1.0  # a killed worker has ended, and its keeper has said so


def has_ended(pidfd: int, timeout_s: float = 0.0) -> bool:
    """Whether a process ends within a time."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(1000 * timeout_s))


def kill(pidfd: int) -> None:
    """SIGKILL, if it is there."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)


class NotedSlot(NamedTuple):
    """A place as the next control has to know it (notes.py); descriptors, -1 for none."""

    keeper: int
    mailbox: int
    pidfd: int
    up: bool  # the keeper may have a worker
    rings: frozenset[int]
    started_s: float
    failures: int

    def descriptors(self) -> set[int]:
        """Those that are open."""
        return {self.keeper, self.mailbox, self.pidfd} - {-1}


class Slot:
    """One worker's place: its keeper, its process and mailbox while it is up."""

    def __init__(self, number: int) -> None:
        self.id = number
        self.keeper = -1  # a pidfd
        self.kept: Mailbox | None = None  # the mailbox, while the keeper has no worker
        self.pidfd = -1
        self.mailbox: Mailbox | None = None
        self.ready = False
        self.started_s = 0.0
        self.failures = 0
        self.given: set[int] = set()  # the protocols of which it was given all listeners
        self.listens: dict[int, int] = {}  # the place of the last, of each, when it was found
        self.mapped: set[int] = set()
        self.rings: set[int] = set()

    def noted(self) -> NotedSlot:
        """Its descriptors, and what cannot be asked of the worker."""
        box = self.mailbox or self.kept
        fds = (self.keeper, box.fileno() if box else -1, self.pidfd)
        rings = frozenset(self.rings)
        return NotedSlot(*fds, self.mailbox is not None, rings, self.started_s, self.failures)

    def serving(self, index: int) -> bool:
        """Whether this very process has begun to serve the ring."""
        return index in self.rings


class Places(abc.ABC):
    """All places of one instance."""

    def __init__(self, segment: Segment, count: int, log: Log, cpus: tuple[int, ...] = ()) -> None:
        self.segment = segment
        self.log = log
        self.cpus = cpus
        self.slots = [Slot(number) for number in range(count)]
        self.on_up: Callable[[Slot], None] = lambda slot: None
        self.on_down: Callable[[Slot], None] = lambda slot: None
        self.on_change: Callable[[], None] = lambda: None  # before what is noted is closed
        self._wakes = tuple(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in self.slots)
        self._inboxes = [socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in self.slots]
        for end in itertools.chain(*self._inboxes):
            end.setblocking(False)
        self._bearing = threading.Lock()
        self._orders: queue.SimpleQueue[tuple[Slot, float] | None] = queue.SimpleQueue()
        self._due: list[tuple[float, int]] = []  # when, which place: of the thread that starts them
        self._born: queue.SimpleQueue[tuple[Slot, int, Mailbox]] = queue.SimpleQueue()
        self.born_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    @abc.abstractmethod
    def bring_up(self, slot: Slot) -> None:
        """Tell a worker that has just come up what it serves."""

    @abc.abstractmethod
    def left_behind(self, slot: Slot) -> None:
        """A worker is gone: note where it stood."""

    # --- coming and going -------------------------------------------------------------------------

    def start(self) -> None:
        """Start all workers in the background."""
        threading.Thread(target=self._midwife, name="start workers", daemon=True).start()
        for slot in self.slots:
            self._orders.put((slot, 0.0))

    def find(self, noted: list[NotedSlot]) -> None:
        """Instead of `start`, the workers that a control before this one has left (notes.py):
        those that live are asked what they have; the others are started."""
        threading.Thread(target=self._midwife, name="start workers", daemon=True).start()
        for slot, left in zip(self.slots, noted, strict=True):
            slot.started_s, slot.failures = left.started_s, left.failures
            if left.mailbox >= 0:
                mailbox = Mailbox(socket.socket(fileno=left.mailbox))
                slot.mailbox, slot.kept = (mailbox, None) if left.up else (None, mailbox)
                slot.keeper, slot.pidfd, slot.rings = left.keeper, left.pidfd, set(left.rings)
        for slot in self.slots:
            if slot.mailbox is not None:
                self._find_worker(slot, slot.mailbox)
                continue
            if slot.kept is None:  # there may have been a worker: what it left is looked for
                self._block(slot)["restarts"] += 1
            self._orders.put((slot, 0.0))

    def _find_worker(self, slot: Slot, mailbox: Mailbox) -> None:
        """Let pass what the worker still answers to a control before this one; what it has."""
        if slot.pidfd >= 0 and has_ended(slot.pidfd):
            try:
                status: int | None = wait_for_death(mailbox, KILL_S)
            except MailboxError:  # that was read already, or the keeper is gone, too
                status = None if has_ended(slot.keeper) else -signal.SIGKILL
            self.lost(slot, status=status)
            return
        try:
            have = self._described(slot, mailbox)
            if slot.pidfd < 0:
                slot.pidfd = os.pidfd_open(have.pid)
        except PeerDied as error:
            self.lost(slot, status=error.status)
        except (MailboxError, OSError):
            self.lost(slot, "does not answer")
        else:
            self._block(slot)["pid"] = have.pid
            slot.mapped, slot.rings = set(have.regions), set(have.rings)
            slot.listens, slot.ready = dict(have.listens), True
            self.on_up(slot)

    def _described(self, slot: Slot, mailbox: Mailbox) -> commands.Have:
        """What the worker has. One that is not known by its process may not have been made: Start
        is sent again, as that of a successor. A worker that is there refuses it; if one was there
        and its death has not been heard of, the other one answers. Raises MailboxError, PeerDied,
        OSError."""
        if slot.pidfd >= 0:
            return self._ask_for_all(mailbox)
        self._block(slot)["restarts"] += 1
        mailbox.send(self._start_command(slot), self._wires(slot).fds())
        try:
            return self._ask_for_all(mailbox)
        except PeerDied as error:
            self.log.error(f"worker {slot.id} died (status {error.status}); another has its place")
            return self._ask_for_all(mailbox)

    def _ask_for_all(self, mailbox: Mailbox) -> commands.Have:
        have: commands.Have = get_in_step(mailbox, commands.Describe(time.monotonic_ns()), ANSWER_S)
        return have

    def _midwife(self) -> None:
        """The thread that waits for the fork server."""
        while (slot := self._next_order()) is not None:
            try:
                with self._bearing:
                    self._born.put((slot, *(self._kept(slot) or self._bear())))
            except (OSError, EOFError) as error:
                self.log.error(f"worker {slot.id} cannot be started: {error}")
                self._orders.put((slot, AGAIN_MAX_S))
            else:
                os.eventfd_write(self.born_fd, 1)

    def _next_order(self) -> Slot | None:
        """Whose turn it is, once it is; None: nobody's any more. A place that has to wait keeps no
        other waiting."""
        while not self._due or self._due[0][0] > time.monotonic():
            wait_s = max(self._due[0][0] - time.monotonic(), 0) if self._due else None
            with contextlib.suppress(queue.Empty):
                order = self._orders.get(timeout=wait_s)
                if order is None:
                    return None
                slot, delay_s = order
                heapq.heappush(self._due, (time.monotonic() + delay_s, slot.id))
        return self.slots[heapq.heappop(self._due)[1]]

    def _kept(self, slot: Slot) -> tuple[int, Mailbox] | None:
        """The keeper of a worker that has died, and our end of its mailbox."""
        return (slot.keeper, slot.kept) if slot.kept else None

    def _bear(self) -> tuple[int, Mailbox]:
        """A new keeper and our end of its mailbox. Raises OSError, EOFError."""
        ours, theirs = Mailbox.pair()
        try:
            return fork_server.make_keeper(theirs), ours
        except (OSError, EOFError):
            ours.close()
            raise
        finally:
            theirs.close()

    def take_born(self) -> None:
        """Bring workers that have come up to the wanted state. Called when born_fd is readable."""
        os.eventfd_read(self.born_fd)
        while not self._born.empty():
            slot, keeper, mailbox = self._born.get()
            slot.keeper, slot.mailbox, slot.kept = keeper, mailbox, None
            slot.started_s = time.monotonic()
            slot.mapped = set()
            self.on_change()  # from here on there may be a worker
            answer = self._answer(slot, self._start_command(slot), self._wires(slot).fds())
            if isinstance(answer, commands.Failed):
                kill(slot.keeper)  # nothing of it is of use
                self.lost(slot, f"cannot start: {answer.reason}")
            if not isinstance(answer, commands.Done):
                continue
            self._block(slot)["pid"] = answer.value
            with contextlib.suppress(OSError):  # it has died since: that will be told
                slot.pidfd = os.pidfd_open(answer.value)
            slot.ready = True
            self.bring_up(slot)
            if not slot.ready:
                continue  # lost on the way: another is ordered
            self.on_up(slot)
            self.log.debug(f"worker {slot.id} is up, process {answer.value}")
            if len(self._up()) == len(self.slots):
                self.log.info(f"all {len(self.slots)} workers are up")

    def _start_command(self, slot: Slot) -> commands.Start:
        cpu = self.cpus[slot.id % len(self.cpus)] if self.cpus else None
        return commands.Start(self.segment.name, slot.id, len(self.slots), cpu)

    def _wires(self, slot: Slot) -> commands.Wires:
        sending = tuple(theirs.fileno() for theirs, _ in self._inboxes)
        return commands.Wires(self._wakes, sending, self._inboxes[slot.id][1].fileno())

    def _block(self, slot: Slot) -> View:
        base = self.segment.offsets.worker + slot.id * schema.WORKER.size
        return View(schema.WORKER, self.segment.buffer, base)

    def _end(self, pidfd: int, mailbox: Mailbox) -> int | None:
        """Kill a worker; its status, which its keeper tells, or None when that is gone, too."""
        if pidfd >= 0:
            kill(pidfd)
        try:
            return wait_for_death(mailbox, KILL_S)
        except MailboxError:
            return None

    def _end_keeper(self, keeper: int, mailbox: Mailbox) -> None:
        """All that it keeps is gone with it."""
        mailbox.close()
        kill(keeper)
        has_ended(keeper, KILL_S)
        os.close(keeper)

    def lost(self, slot: Slot, how: str = "died", status: int | None = None) -> None:
        """The worker is gone (its keeper has told its `status`), or of no use: end it and order
        another. What is noted is open: it is closed once it is not noted any more."""
        if slot.mailbox is None:
            return
        calm = time.monotonic() - slot.started_s > RESTART_CALM_S
        slot.failures = 0 if calm else slot.failures + 1
        self.on_down(slot)
        mailbox, slot.mailbox, slot.ready = slot.mailbox, None, False
        slot.given, slot.listens = set(), {}
        pidfd, slot.pidfd, keeper = slot.pidfd, -1, slot.keeper
        if status is None:
            status = self._end(pidfd, mailbox)
        kept = status is not None and slot.failures < FAILURES_KEPT
        slot.kept, slot.keeper = (mailbox, keeper) if kept else (None, -1)
        block = self._block(slot)
        block["pid"] = 0
        block["restarts"] += 1  # before the note: a keeper that is noted is given no other look
        self.left_behind(slot)
        self.on_change()
        if not kept:
            self._end_keeper(keeper, mailbox)
        if pidfd >= 0:
            os.close(pidfd)
        delay_s, later = again_in(slot.failures)
        said = "its keeper, too" if status is None else f"status {status}"
        self.log.error(
            f"worker {slot.id} {how} ({said}); "
            + ("another takes its place" if kept else "its connections are lost; starting it again")
            + later
        )
        self._orders.put((slot, delay_s))

    def stop(self) -> None:
        """End all workers, and the thread.

        A worker that is just being started is waited for: the fork server's child would complain if
        control were gone before it has been told what to do. While the data plane compiles there is
        no child yet.
        """
        self._orders.put(None)
        self._bearing.acquire(timeout=LAUNCH_S)
        for slot in self.slots:
            if slot.mailbox is not None:
                try:
                    slot.mailbox.send(commands.Stop())
                except MailboxError:
                    pass
        deadline_s = time.monotonic() + 2.0
        for slot in self.slots:
            if slot.kept is not None:
                slot.kept.close()
            if slot.keeper >= 0:
                if not has_ended(slot.keeper, max(deadline_s - time.monotonic(), 0.1)):
                    kill(slot.keeper)

    # --- talking ----------------------------------------------------------------------------------

    def reports(self, slot: Slot) -> list[Report]:
        """What the worker reported unasked. Called when its mailbox is readable."""
        if slot.mailbox is None:
            return []
        try:
            message, _ = slot.mailbox.receive(0)
            if isinstance(message, Report) and message.kind == DIED:
                self.lost(slot, status=message.values["status"])
                return []
            if isinstance(message, Report):
                slot.mailbox.reports.append(message)
        except MailboxError as error:
            if "gone" in str(error):
                self.lost(slot)
                return []
        taken, slot.mailbox.reports = slot.mailbox.reports, []
        return taken

    def _answer(
        self, slot: Slot, command: Any, fds: tuple[int, ...] = ()
    ) -> commands.Done | commands.Failed | None:
        """The answer to one command; None when the worker is lost."""
        if slot.mailbox is None:
            return None
        try:
            answer: commands.Done | commands.Failed = ask(slot.mailbox, command, fds, ANSWER_S)
        except PeerDied as error:
            self.lost(slot, status=error.status)
            return None
        except MailboxError as error:
            self.lost(slot, "does not answer" if "timed out" in str(error) else "died")
            return None
        return answer

    def _ask(self, slot: Slot, command: Any, fds: tuple[int, ...] = ()) -> str:
        """Why the worker refused a command, or ""."""
        answer = self._answer(slot, command, fds)
        return answer.reason if isinstance(answer, commands.Failed) else ""

    def _tell(self, slot: Slot, command: Any, fds: tuple[int, ...] = ()) -> bool:
        """One command, a refusal logged; whether it was none."""
        if refusal := self._ask(slot, command, fds):
            self.log.warning(f"worker {slot.id}: {refusal}")
        return not refusal

    def _up(self) -> list[Slot]:
        return [slot for slot in self.slots if slot.ready]
