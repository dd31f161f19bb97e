"""Commands of control that a worker cannot carry out: one clear reason, nothing else is lost, and
no descriptor leaks. The worker is the real one, made in this process."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from vring import Memory, Ring

from dataplane import commands
from dataplane import worker as worker_module
from dataplane.context import LISTENERS_MAX
from dataplane.keeper import descriptors
from dataplane.worker import Worker, main
from shm.mailbox import Mailbox
from shm.segment import Segment

NUM = 16


def open_fds() -> int:
    gc.collect()  # what earlier tests forgot to close
    return len(os.listdir("/proc/self/fd"))


class Bench:
    """One worker, guest memory in two regions, and commands about them."""

    def __init__(self, segment: Segment) -> None:
        self.inbox = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        inbox, sending = (end.fileno() for end in self.inbox)
        wires = commands.Wires((os.eventfd(0),), (sending,), inbox)
        self.worker = Worker(segment, 0, 1, wires)
        self.memory = Memory(1 << 20, borders=1)
        self.rings = [Ring(self.memory, NUM, slots=False) for _ in range(3)]

    def do(self, command: object, *fds: int) -> commands.Done | commands.Failed:
        """Carry out a command with duplicates of these descriptors."""
        return self.worker.carry_out(command, [os.dup(fd) for fd in fds])

    def must(self, command: object, *fds: int) -> None:
        assert isinstance(self.do(command, *fds), commands.Done)

    def refused(self, command: object, *fds: int) -> str:
        answer = self.do(command, *fds)
        assert isinstance(answer, commands.Failed)
        return answer.reason

    def map(self) -> None:
        for number, region in enumerate(self.memory.regions):
            told = region.gpa, region.size, region.user, region.offset
            self.must(commands.MapRegion(number, *told), region.fd)
        self.must(commands.SetRegions((0, 1)))

    def ring(self, index: int, **changes: object) -> commands.SetRing:
        """The command that starts ring `index` with a kick descriptor."""
        desc, avail, used = map(
            self.memory.user,
            (self.rings[index].desc, self.rings[index].avail, self.rings[index].used),
        )
        told = {
            "index": index,
            "num": NUM,
            "desc_uva": desc,
            "avail_uva": avail,
            "used_uva": used,
            "base": 0,
            "enabled": True,
            "has_kick": True,
            "has_call": False,
            "has_err": False,
        }
        return commands.SetRing(**(told | changes))  # type: ignore[arg-type]

    def running(self) -> list[int]:
        return [index for index in range(3) if self.worker.context.ring(index)["running"]]


@pytest.fixture
def bench() -> Iterator[Bench]:
    name = f"/vhostmq-test-{os.getpid()}"
    segment = Segment(name, 1, create=True)
    segment.unlink()
    made = Bench(segment)
    yield made
    for index in range(3):
        made.worker.carry_out(commands.StopRing(index), [])
    made.worker.carry_out(commands.SetRegions(()), [])
    made.worker.context.close()


def test_regions_that_are_not_mapped(bench: Bench) -> None:
    """What control believes to be mapped here and is not: an answer, not a dead worker."""
    bench.map()
    assert bench.refused(commands.SetRegions((0, 7))) == "memory regions [7] are not mapped"
    bench.must(commands.SetRing(**vars(bench.ring(0))), os.eventfd(0))
    assert bench.running() == [0], "the table before is still there"


def test_a_region_that_cannot_be_mapped(bench: Bench) -> None:
    reader, writer = os.pipe()
    before = open_fds()
    assert bench.refused(commands.MapRegion(9, 0, 4096, 0, 0), reader)
    assert open_fds() == before
    os.close(reader)
    os.close(writer)


def test_one_ring_without_memory_does_not_keep_others_from_theirs(bench: Bench) -> None:
    """A new table at other places: the ring that is outside stops, those after it are found."""
    bench.map()
    for index in range(3):
        bench.must(bench.ring(index), os.eventfd(0))
    outside = bench.rings[0]
    first, main_region = bench.memory.regions
    told = first.gpa, first.size, first.user, first.offset
    bench.must(commands.MapRegion(2, *told), first.fd)
    # The same memory again without its first pages, where the first ring is.
    skip = bench.rings[1].desc - main_region.gpa
    assert outside.desc < main_region.gpa + skip
    moved = (
        main_region.gpa + skip,
        main_region.size - skip,
        main_region.user + skip,
        main_region.offset + skip,
    )
    bench.must(commands.MapRegion(3, *moved), main_region.fd)
    said = bench.refused(commands.SetRegions((2, 3)))
    assert said.startswith("ring 0 stopped: ") and "ring 1" not in said
    assert bench.running() == [1, 2]
    new = bench.worker.mappings[3]
    for index in (1, 2):
        at = bench.worker.context.ring(index)["desc"] - new.host
        assert at == bench.rings[index].desc - new.gpa, f"ring {index} still points at the old map"


def test_a_kick_descriptor_that_cannot_be_watched(bench: Bench, tmp_path: Path) -> None:
    """The kernel refuses to poll a regular file. The ring keeps what it has, and can be stopped."""
    bench.map()
    bench.must(bench.ring(0), os.eventfd(0))
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    before = open_fds()
    assert "epoll_ctl" in bench.refused(bench.ring(0), file)
    assert "epoll_ctl" in bench.refused(bench.ring(1), file)
    assert open_fds() == before and bench.running() == [0]
    for index in (0, 1):
        bench.must(commands.StopRing(index))
    bench.must(bench.ring(1), os.eventfd(0))
    assert bench.running() == [1]
    os.close(file)


def test_descriptors_that_were_cut_off(bench: Bench) -> None:
    """A receiver at its limit gets a message without some of its descriptors."""
    before = open_fds()
    for command in (
        commands.MapRegion(9, 0, 4096, 0, 0),
        bench.ring(0),
        commands.ListenOn(((6, 80, 80, bytes(16)),)),
    ):
        assert bench.refused(command) == "0 of 1 descriptors came over: raise RLIMIT_NOFILE"
    assert open_fds() == before


def test_more_forwarded_ports_than_there_is_room_for(bench: Bench) -> None:
    """The batch that does not fit is given back whole."""
    sockets = [socket.socket() for _ in range(3)]
    bench.worker.context.view["listener_count"] = LISTENERS_MAX - 2
    batch = commands.ListenOn(tuple((0, 80 + n, 80, bytes(16)) for n in range(3)))
    before = open_fds()
    said = bench.refused(batch, *(sock.fileno() for sock in sockets))
    assert said == f"more than {LISTENERS_MAX} forwarded ports" and open_fds() == before
    assert bench.worker.context.view["listener_count"] == LISTENERS_MAX - 2
    fits = commands.ListenOn(batch.ports[:2])
    bench.must(fits, *(sock.fileno() for sock in sockets[:2]))
    assert open_fds() == before + 2, "these are served"
    for sock in sockets:
        sock.close()


@pytest.mark.parametrize("lack", ["descriptors", "segment", "epoll"])
def test_a_worker_that_cannot_start_says_so(lack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No traceback: an answer control can log."""
    ours, theirs = Mailbox.pair()
    segment = Segment(f"/vhostmq-test-{os.getpid()}", 1, create=True)
    monkeypatch.setattr(worker_module.sigbus, "install", lambda: None)

    def no_epoll() -> None:
        raise OSError(24, "Too many open files")

    if lack == "epoll":
        monkeypatch.setattr(worker_module.select, "epoll", no_epoll)
    name = "/vhostmq-nowhere" if lack == "segment" else segment.name
    wake = os.eventfd(0)
    wires = commands.Wires((wake,), (wake,), wake)
    fds = [] if lack == "descriptors" else list(wires.fds())
    try:
        assert main(theirs, commands.Start(name, 0, 1), fds, descriptors()) == 1
    finally:
        segment.unlink()
        os.close(wake)
    answer, _ = ours.receive(0)
    assert isinstance(answer, commands.Failed)
    words = {"descriptors": "RLIMIT_NOFILE", "segment": "vhostmq-nowhere", "epoll": "Too many open"}
    assert words[lack] in answer.reason
    ours.close()
    theirs.close()
