"""Workers that cannot be brought up: what they cannot serve is refused, clearly and alone.

First control's side with workers played by the test, then the whole back-end with a worker that
the system refuses the memory.
"""

from __future__ import annotations

import itertools
import os
import pickle
import resource
import select
import signal
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from backend import Backend, kind
from driver import BASIC, GUEST_CSUM, Driver
from formats import all_formats
from guest import Guest
from test_worker_death import count, kill, lineage, workers
from vring import Memory, Ring
from world import World

from control.device import Region
from control.device import Ring as DeviceRing
from control.places import FAILURES_KEPT
from control.workers import Workers
from dataplane import commands
from shm.mailbox import DIED, Mailbox, MailboxError, Report
from shm.segment import Segment

Answers = Callable[[Any], Any]


class Lines:
    """A log that only remembers."""

    quiet = False

    def __init__(self) -> None:
        self.lines: list[str] = []

    def error(self, text: str) -> None:
        self.lines.append(text)

    warning = info = debug = error


def ended() -> tuple[int, int]:
    """A process that has ended, and a descriptor of it."""
    process = subprocess.Popen(["true"])
    pidfd = os.pidfd_open(process.pid)
    process.wait()
    return process.pid, pidfd


class Played:
    """A worker process played by a thread: every command is done unless `answers` says Failed;
    `dies_at` a command it hangs up without an answer; at one it `falls_at` its keeper says that it
    has died."""

    def __init__(
        self,
        answers: Answers = lambda command: None,
        dies_at: Any = (),
        falls_at: Any = (),
    ) -> None:
        self.mailbox, self._end = Mailbox.pair()
        self._answers, self._dies_at, self._falls_at = answers, dies_at, falls_at
        self.seen: list[Any] = []
        self.pid, self.keeper = ended()
        threading.Thread(target=self._play, daemon=True).start()

    def _play(self) -> None:
        while True:
            try:
                command, fds = self._end.receive()
            except MailboxError:
                return
            for fd in fds:
                os.close(fd)
            if isinstance(command, self._dies_at):
                self._end.close()
                return
            self.seen.append(command)
            if isinstance(command, self._falls_at):
                self._end.send(Report(DIED, status=-11))
                continue
            value = self.pid if isinstance(command, commands.Start) else 77
            self._end.send(self._answers(command) or commands.Done(value))

    def kinds(self) -> list[str]:
        return [type(command).__name__ for command in self.seen]


class Office:
    """Control's `Workers` for two pairs and two workers, with guest memory and rings to give."""

    def __init__(self) -> None:
        self.segment = Segment(f"/vhostmq-test-{os.getpid()}", 2, create=True)
        self.segment.unlink()
        self.log = Lines()
        self.workers = Workers(self.segment, 2, 2, None, self.log)  # type: ignore[arg-type]
        self.memory = Memory(1 << 20, borders=1)
        self.rings = [Ring(self.memory, 16, slots=False) for _ in range(4)]
        self.refused: list[tuple[int, str]] = []
        self.former: list[Workers] = []  # of controls that have died
        self.fds: list[int] = []
        self.workers.on_refused = lambda *what: self.refused.append(what)

    def tell(self) -> None:
        """All memory and rings, as a front-end gives them while no worker is up yet."""
        regions = (Region(r.gpa, r.size, r.user, r.offset, r.fd) for r in self.memory.regions)
        assert self.workers.set_memory(tuple(regions))
        for index in range(4):
            assert self.workers.set_ring(self.ring(index), 0)

    def ring(self, index: int) -> DeviceRing:
        ring = self.rings[index]
        desc, avail, used = map(self.memory.user, (ring.desc, ring.avail, ring.used))
        self.fds.append(os.eventfd(0))
        return DeviceRing(index, 16, desc, avail, used, 5, kick_fd=self.fds[-1], enabled=True)

    def born(self, number: int, played: Played) -> Played:
        self.workers._born.put((self.workers.slots[number], played.keeper, played.mailbox))
        os.eventfd_write(self.workers.born_fd, 1)
        self.workers.take_born()
        return played

    def ordered(self) -> list[int]:
        """Workers that are to be started (again)."""
        found = []
        while not self.workers._orders.empty():
            order = self.workers._orders.get()
            assert order is not None
            found.append(order[0].id)
        return found

    def close(self) -> None:
        """All descriptors: one process runs all tests, and select() takes 1024."""
        for one in (self.workers, *self.former):
            boxes = [box for slot in one.slots for box in (slot.mailbox, slot.kept) if box]
            for end in (*boxes, *itertools.chain(*one._inboxes)):
                end.close()
            self.fds += {fd for slot in one.slots for fd in (slot.keeper, slot.pidfd)} - {-1}
            self.fds += one._wakes + (one.born_fd,)
        for fd in self.fds:
            os.close(fd)
        self.memory.close()
        self.segment.close()


@pytest.fixture
def office() -> Iterator[Office]:
    made = Office()
    yield made
    made.close()


def failing(kind_of: type, reason: str) -> Answers:
    return lambda command: commands.Failed(reason) if isinstance(command, kind_of) else None


def test_a_worker_that_cannot_map_costs_its_rings(office: Office) -> None:
    office.tell()
    good = office.born(1, Played())
    bad = office.born(0, Played(failing(commands.MapRegion, "no room")))
    why = "worker 0: guest memory cannot be mapped: no room"
    assert office.refused == [(0, why), (1, why)]
    assert "SetRing" not in bad.kinds() and "SetRegions" not in bad.kinds()
    assert [c.index for c in good.seen if isinstance(c, commands.SetRing)] == [2, 3]
    assert office.ordered() == [], "it is there for what comes next"


def test_memory_is_tried_again_when_it_changes(office: Office) -> None:
    """What one worker could not map before is mapped before the next table is used."""
    office.tell()
    hopes = {"up": False}
    office.born(
        0, Played(lambda c: commands.Failed("no") if is_map(c) and not hopes["up"] else None)
    )
    (again,) = [office.workers.regions[number] for number in list(office.workers.regions)[:1]]
    assert not office.workers.set_memory((again,))
    hopes["up"] = True
    assert office.workers.set_memory((again,))
    assert office.workers.slots[0].mapped == set(office.workers.regions)


def is_map(command: Any) -> bool:
    return isinstance(command, commands.MapRegion)


def test_a_ring_that_is_refused_is_the_only_one(office: Office) -> None:
    office.tell()

    def not_zero(command: Any) -> commands.Failed | None:
        wrong = isinstance(command, commands.SetRing) and command.index == 0
        return commands.Failed("not this one") if wrong else None

    worker = office.born(0, Played(not_zero))
    assert office.refused == [(0, "worker 0: not this one")]
    assert [c.index for c in worker.seen if isinstance(c, commands.SetRing)] == [0, 1]
    assert office.workers.stop_ring(0) is None, "no worker ever had it: no base to tell"
    assert office.workers.stop_ring(1) == 77
    assert "StopRing" in worker.kinds()


def test_a_refused_start_is_tried_again(office: Office) -> None:
    """With a line that says why, and later each time; never a slot that stays empty."""
    for _ in range(2):
        office.born(0, Played(failing(commands.Start, "Too many open files")))
        assert office.ordered() == [0]
    assert "worker 0 cannot start: Too many open files" in office.log.lines[0]
    assert "in 0.3 s, failure 2 in a row" in office.log.lines[1]
    office.born(0, Played())
    assert office.workers.slots[0].ready


@pytest.mark.parametrize("command", [commands.MapRegion, commands.SetRegions, commands.SetRing])
def test_a_worker_lost_on_the_way_has_refused_nothing(office: Office, command: type) -> None:
    """It is replaced, and the next one is told everything."""
    office.tell()
    office.born(0, Played(dies_at=command))
    assert office.ordered() == [0] and office.refused == []
    assert not office.workers.slots[0].ready
    worker = office.born(0, Played())
    assert worker.kinds().count("SetRing") == 2 and worker.kinds().count("MapRegion") == 2
    assert office.workers.set_memory(())


def test_lost_while_the_front_end_waits(office: Office) -> None:
    """A change that meets a dying worker succeeds: its successor makes it."""
    office.born(0, Played(dies_at=(commands.SetFeatures, commands.MapRegion)))
    office.tell()
    assert office.ordered() == [0]


def used(office: Office, index: int, value: int) -> None:
    office.memory.write(office.rings[index].used + 2, struct.pack("<H", value))


@pytest.mark.parametrize("dies_at", [(), commands.StopRing])
def test_the_base_of_a_ring_whose_worker_died(office: Office, dies_at: Any) -> None:
    """Where the driver's used index stands, not where the ring began (5)."""
    office.tell()
    worker = office.born(0, Played(dies_at=dies_at))
    used(office, 0, 4321)
    if not dies_at:
        office.workers.lost(office.workers.slots[0])
        used(office, 0, 9)  # nobody serves it any more: a guest's scribbling is not ours
    assert office.workers.stop_ring(0) == 4321
    assert office.workers.stop_ring(2) is None, "it never began"
    del worker


def test_the_next_worker_resumes_and_a_front_end_may_still_ask(office: Office) -> None:
    office.tell()
    first = office.born(0, Played())
    assert [c.base for c in first.seen if isinstance(c, commands.SetRing)] == [5, 5]
    used(office, 0, 100)
    used(office, 1, 101)
    office.workers.lost(office.workers.slots[0])
    second = office.born(0, Played())
    assert [c.base for c in second.seen if isinstance(c, commands.SetRing)] == [-1, -1]
    assert [office.workers.stop_ring(index) for index in (0, 1)] == [77, 77]
    office.workers.set_ring(office.ring(0), 0)
    bases = [c.base for c in second.seen if isinstance(c, commands.SetRing)]
    assert bases == [-1, -1, 5], "stopped and started: the front-end's word counts again"


def test_the_base_of_a_ring_whose_memory_is_gone(office: Office) -> None:
    """A file that was cut short, and one that was closed: no base to tell, and no exception."""
    office.tell()
    office.born(0, Played())
    os.ftruncate(office.memory.regions[-1].fd, 4096)
    office.workers.lost(office.workers.slots[0])
    assert office.workers.stop_ring(0) is None
    office.born(0, Played())
    office.memory.close()
    office.workers.lost(office.workers.slots[0])
    office.memory.regions.clear()
    assert office.workers.stop_ring(1) is None


def test_a_worker_that_dies_again_and_again(office: Office) -> None:
    """Its keeper is asked for another, later and later; in the end for nothing any more, for what
    it keeps may be what kills them."""
    slot = office.workers.slots[0]
    worker = Played(falls_at=commands.SetNet)
    for failures in range(1, FAILURES_KEPT + 1):
        office.born(0, worker)
        assert office.ordered() == [0] and slot.failures == failures
        assert (slot.kept is worker.mailbox) == (failures < FAILURES_KEPT)
    assert worker.kinds() == ["Start", "SetNet"] * FAILURES_KEPT
    said = office.log.lines
    assert "another takes its place in 0.3 s, failure 2 in a row" in said[1]
    assert "its connections are lost; starting it again in 1.5 s" in said[-1]


def test_a_pair_goes_to_another_worker(office: Office) -> None:
    """Disabled, stopped, started where it stood, enabled: in this order, each before the next."""
    office.tell()
    former, heir = office.born(0, Played()), office.born(1, Played())
    workers = office.workers
    assert workers.instance["rx_enabled"] == 0b11
    masks: list[int] = []
    ask = workers._ask

    def watched(slot: Any, command: Any, fds: tuple[int, ...] = ()) -> str:
        masks.append(workers.instance["rx_enabled"])
        return ask(slot, command, fds)

    workers._ask = watched  # type: ignore[method-assign]
    before, heir_before = len(former.seen), len(heir.seen)
    workers.assign(0, workers.slots[1])
    assert former.kinds()[before:] == ["Revive", "StopRing", "StopRing", "Revive"]
    started = [c for c in heir.seen[heir_before:] if isinstance(c, commands.SetRing)]
    assert [(c.index, c.base) for c in started] == [(0, 77), (1, 77)]
    assert masks[:2] == [0b10, 0b10] and workers.instance["rx_enabled"] == 0b11
    assert [workers.instance.element("pair_worker", pair) for pair in range(2)] == [1, 1]
    assert workers.stop_ring(0) == 77, "the front-end's stop goes to the new one"
    assert isinstance(heir.seen[-1], commands.StopRing)


def test_a_pair_stays_with_a_worker_that_is_not_there(office: Office) -> None:
    office.tell()
    office.born(0, Played())
    office.workers.assign(0, office.workers.slots[1])
    assert office.workers.instance.element("pair_worker", 0) == 0


def test_a_pair_that_its_new_worker_refuses(office: Office) -> None:
    office.tell()
    office.born(0, Played())
    office.born(1, Played(lambda c: commands.Failed("no") if is_ring(c, 0) else None))
    office.workers.assign(0, office.workers.slots[1])
    assert [index for index, _ in office.refused] == [0]


def is_ring(command: Any, index: int) -> bool:
    return isinstance(command, commands.SetRing) and command.index == index


# --- after the death of control -------------------------------------------------------------------


@pytest.fixture
def living() -> Iterator[Callable[[], int]]:
    """Descriptors of processes that live until the test ends."""
    made = []

    def make() -> int:
        made.append(subprocess.Popen(["sleep", "1000"]))
        return os.pidfd_open(made[-1].pid)

    yield make
    for process in made:
        process.kill()
        process.wait()


def next_control(
    office: Office, pidfd: Callable[[], int], keeper: Callable[[], int] | None = None
) -> Workers:
    """Another control's Workers, from what this one has noted, with descriptors of its own."""
    noted = pickle.loads(pickle.dumps(office.workers.noted()))
    slots = [
        slot._replace(
            keeper=keeper() if keeper else os.dup(slot.keeper),
            mailbox=os.dup(slot.mailbox),
            pidfd=pidfd(),
        )
        if slot.keeper >= 0
        else slot
        for slot in noted.slots
    ]
    pairs = [office.workers.instance.element("pair_worker", pair) for pair in range(2)]
    office.former.append(office.workers)
    office.workers = Workers(office.segment, 2, 2, None, office.log)  # type: ignore[arg-type]
    for pair, worker in enumerate(pairs):  # both are made of one, which did this before
        office.workers.instance.set_element("pair_worker", pair, worker)
    office.workers._midwife = lambda: None  # type: ignore[method-assign]
    office.workers.take_over(noted._replace(slots=slots))
    return office.workers


def having(regions: tuple[int, ...], rings: tuple[int, ...]) -> Answers:
    """A worker that has these when it is asked."""

    def answer(command: Any) -> Any:
        if isinstance(command, commands.Describe):
            return commands.Have(command.token, os.getpid(), regions, rings, ())
        return None

    return answer


Living = Callable[[], int]


def test_the_next_control_finds_all_as_it_should_be(office: Office, living: Living) -> None:
    office.tell()
    regions = tuple(office.workers.regions)
    played = [office.born(n, Played(having(regions, (2 * n, 2 * n + 1)))) for n in range(2)]
    assert office.ordered() == []
    for worker in played:
        worker.seen.clear()
    workers = next_control(office, living)
    assert [slot.ready for slot in workers.slots] == [True, True] and office.ordered() == []
    for number, worker in enumerate(played):
        told = ["Describe", "SetNet", "SetFeatures", "SetRegions", *2 * ["SetRing"], "Revive"]
        assert worker.kinds() == told
        assert [c.base for c in worker.seen[-3:-1]] == [5, 5], "they run: no base is looked at"
        assert workers.slots[number].rings == {2 * number, 2 * number + 1}
    assert workers.stop_ring(0) == 77


def test_the_next_control_finds_a_pair_on_its_way(office: Office, living: Living) -> None:
    """Stopped by its former worker, not started by the heir; and a ring nobody wants any more."""
    office.tell()
    regions = tuple(office.workers.regions)
    former = office.born(0, Played(having(regions, ())))
    heir = office.born(1, Played(having(regions, (2, 3, 5))))
    office.workers.instance.set_element("pair_worker", 0, 1)
    used(office, 0, 4321)
    former.seen.clear()
    heir.seen.clear()
    workers = next_control(office, living)
    assert "SetRing" not in former.kinds()
    assert [c.index for c in heir.seen if isinstance(c, commands.StopRing)] == [5]
    started = {c.index: c.base for c in heir.seen if isinstance(c, commands.SetRing)}
    assert started == {0: commands.RESUME, 1: commands.RESUME, 2: 5, 3: 5}
    assert workers.slots[1].rings == {0, 1, 2, 3}


def test_answers_to_a_dead_control_are_let_pass(office: Office, living: Living) -> None:
    office.tell()
    worker = office.born(0, Played(having((), ())))
    mailbox = office.workers.slots[0].mailbox
    assert mailbox is not None
    for command in (commands.Revive(), commands.Describe(1), commands.StopRing(0)):
        mailbox.send(command)
    workers = next_control(office, living)
    assert workers.slots[0].ready and workers.stop_ring(1) == 77
    assert worker.kinds().count("Describe") == 2


@pytest.mark.parametrize("told", [True, False], ids=["not-read", "read"])
def test_a_worker_died_about_the_same_time(office: Office, living: Living, told: bool) -> None:
    """Its keeper has said so, to this control or the one before: it is asked for another."""
    office.tell()
    worker = office.born(0, Played())
    if told:
        worker._end.send(Report(DIED, status=-11))
    used(office, 0, 4321)
    workers = next_control(office, lambda: ended()[1], living)
    assert office.ordered() == [0, 1] and workers.slots[0].kept is not None
    assert workers.stop_ring(0) == 4321


def test_a_worker_that_was_just_being_started(office: Office, living: Living) -> None:
    """Its Start had been sent: what it says to that is let pass, and it is brought up."""
    office.tell()
    worker = Played(having((), ()))
    office.workers.on_change = lambda: before.append(office.workers.noted())
    before: list[Any] = []
    office.born(0, worker)
    assert before[0].slots[0].up and before[0].slots[0].pidfd < 0
    office.workers.noted = lambda: before[0]  # type: ignore[method-assign]
    assert worker.mailbox.send(commands.Revive()) is None, "an answer that nobody has taken"
    workers = next_control(office, lambda: -1)
    assert workers.slots[0].ready and workers.slots[0].rings == {0, 1}
    assert [c.base for c in worker.seen if isinstance(c, commands.SetRing)] == [5, 5, 5, 5]


def test_a_ring_that_never_ran_starts_where_it_was_told(office: Office, living: Living) -> None:
    """Its worker was not up yet when control died: that is no reason to resume."""
    office.tell()
    office.workers = next_control(office, living)
    worker = office.born(0, Played())
    assert [c.base for c in worker.seen if isinstance(c, commands.SetRing)] == [5, 5]


def test_a_worker_lost_while_all_rings_stop(office: Office, living: Living) -> None:
    """Control died over a message: nothing is wanted any more; a worker dies over that."""
    office.tell()
    regions = tuple(office.workers.regions)
    office.born(0, Played(having(regions, (0, 1)), falls_at=commands.StopRing))
    noted = office.workers.noted()._replace(regions={}, rings={}, left={})
    office.workers.noted = lambda: noted  # type: ignore[method-assign]
    workers = next_control(office, living)
    assert office.ordered() == [1, 0] and not workers.slots[0].ready


def test_places_that_were_not_taken(office: Office, living: Living) -> None:
    """No worker had come up: all are ordered, and what one may have left is looked for."""
    workers = next_control(office, living)
    assert office.ordered() == [0, 1]
    assert [workers._block(slot)["restarts"] for slot in workers.slots] == [1, 1]


# --- the whole back-end ---------------------------------------------------------------------------

OURS = pytest.mark.skipif(kind() != "ours", reason="NOT TESTED here: passt has no workers")
PAIRS = 2


@pytest.fixture
def backend(world: World, compiled: None) -> Iterator[Backend]:
    made = Backend(world, "--queues", str(PAIRS), "--workers", str(PAIRS))
    yield made
    assert "Traceback" not in "\n".join(made.lines), made.tail(100)
    made.kill()


def said(backend: Backend, text: str, times: int) -> None:
    """Wait until the back-end has said `text` so many times."""
    deadline = time.monotonic() + 20
    while count(backend, text) < times:
        assert time.monotonic() < deadline, backend.tail()
        time.sleep(0.01)


def size_of(pid: int) -> int:
    """Bytes of address space."""
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def parent(pid: int) -> int:
    """The fork server a worker comes from."""
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[1])


def pings(guest: Guest, pair: int) -> None:
    for sequence in range(20):
        guest.ping(guest.gw4, 7, sequence, b"anybody?", pair=pair)
        guest.next_icmp({0}, 10)


@OURS
def test_a_worker_without_memory(backend: Backend) -> None:
    """The system refuses the new worker a mapping as large as the guest: its rings are refused with
    their error descriptors signalled, the other pair goes on, and a front-end that sets its rings
    up again when there is memory gets them back."""
    guest = Guest(Driver(backend.path, pairs=PAIRS).start())
    guest.resolve()
    mapped = sum(region.size for region in guest.drv.memory.regions)
    first = workers(backend)[0]
    room = size_of(first) - mapped // 2
    before = resource.prlimit(parent(first), resource.RLIMIT_AS, (room, resource.RLIM_INFINITY))
    kill(backend, 0)
    errors = [queue.err for queue in guest.drv.queues]
    assert select.select(errors, [], [], 10)[0] == errors[:2]
    assert count(backend, "cannot run: worker 0: guest memory cannot be mapped: ") == 2
    guest.serving = [1]
    pings(guest, 1)
    resource.prlimit(workers(backend)[0], resource.RLIMIT_AS, before)
    for queue in guest.drv.queues[:2]:
        guest.drv.start_ring(queue)
        guest.drv.kick(queue)
    guest.serving = [0, 1]
    pings(guest, 0)
    guest.drv.close()


@OURS
@all_formats
def test_vring_base_of_a_dead_worker(backend: Backend, rings: int) -> None:
    """GET_VRING_BASE while no worker has the ring says where the guest's buffers stand, so that
    the front-end's next start loses none."""
    guest = Guest(Driver(backend.path, pairs=PAIRS, features=BASIC | GUEST_CSUM | rings).start())
    guest.resolve()
    pings(guest, 0)
    victim, _ = lineage(backend)[0]
    server = parent(victim)
    os.kill(server, signal.SIGSTOP)  # no keeper is born
    try:
        os.kill(victim, signal.SIGKILL)
        said(backend, "worker 0 died", 1)
        stopped = [guest.drv.stop_ring(index) for index in (0, 1)]
    finally:
        os.kill(server, signal.SIGCONT)
    assert stopped == [queue.ring.base for queue in guest.drv.queues[:2]]
    assert guest.drv.tx(0).ring.used_idx >= 20
    for queue, base in zip(guest.drv.queues[:2], stopped, strict=True):
        guest.drv.start_ring(queue, base)
        guest.drv.kick(queue)
    said(backend, "workers are up", 2)
    pings(guest, 0)
    guest.drv.close()
