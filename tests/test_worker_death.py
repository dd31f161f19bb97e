"""A worker that is killed: another takes its place, rings and connections go on where they were.
With its keeper its connections end, and nobody else's do."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest
from backend import Backend, kind
from driver import BASIC, GUEST_CSUM, Driver
from formats import all_formats, both_formats
from guest import Guest, random_bytes
from minitcp import established, exchange
from world import World

pytestmark = pytest.mark.skipif(kind() != "ours", reason="NOT TESTED here: passt has no workers")

PAIRS = 2


@pytest.fixture
def backend(world: World, compiled: None) -> Iterator[Backend]:
    made = Backend(world, "--queues", str(PAIRS), "--workers", str(PAIRS))
    yield made
    made.kill()


def lineage(backend: Backend) -> list[tuple[int, int]]:
    """(keeper, worker) of every place: the fork server's children and theirs."""
    parents: dict[int, int] = {}
    for pid in backend.tree():
        with open(f"/proc/{pid}/cmdline") as command, open(f"/proc/{pid}/stat") as stat:
            if "forkserver" in command.read():
                parents[pid] = int(stat.read().rpartition(")")[2].split()[1])
    return sorted(
        (parent, pid) for pid, parent in parents.items() if parents.get(parent) in parents
    )


def workers(backend: Backend) -> list[int]:
    """The worker processes, in the order in which their places were made."""
    return [worker for _, worker in lineage(backend)]


def count(backend: Backend, text: str) -> int:
    """Lines the back-end has written with this text."""
    return sum(text in line for line in backend.lines)


def kill(backend: Backend, number: int, keeper: bool = False) -> None:
    """SIGKILL one worker, or its keeper, and wait until another is up in its place."""
    up, died = count(backend, "workers are up"), count(backend, f"worker {number} died")
    os.kill(lineage(backend)[number][0 if keeper else 1], signal.SIGKILL)
    deadline = time.monotonic() + 20
    while count(backend, "workers are up") == up:
        assert time.monotonic() < deadline, backend.tail()
        time.sleep(0.002)
    assert count(backend, f"worker {number} died") == died + 1, backend.tail()


@all_formats
def test_rings_go_on(backend: Backend, rings: int) -> None:
    """Frames are answered before and after, on rings the driver never touched in between."""
    guest = Guest(Driver(backend.path, pairs=PAIRS, features=BASIC | GUEST_CSUM | rings).start())
    guest.resolve()
    kill(backend, 0)
    for sequence in range(300):  # more than a ring full
        guest.ping(guest.gw4, 7, sequence, b"still there?", pair=0)
        guest.next_icmp({0}, 10)
    guest.drv.close()


@both_formats
def test_connections_go_on(backend: Backend, world: World, rings: int) -> None:
    """Those of the worker that was killed and those of others, opened by either end; a new one, and
    one that ends."""
    guest = Guest(Driver(backend.path, pairs=PAIRS, features=BASIC | GUEST_CSUM | rings).start())
    guest.resolve()
    ends = [established(guest, world, 4, pair=pair) for pair in (0, 0, 1)]
    for _ in range(3):
        for tcp, peer in ends:
            exchange(guest, tcp, peer, random_bytes(50_000), random_bytes(50_000))
        kill(backend, 0)
    ends.append(established(guest, world, 4, pair=0))
    for tcp, peer in ends:
        exchange(guest, tcp, peer, random_bytes(50_000), random_bytes(50_000))
        tcp.close()
        peer.shutdown()
    guest.pump(lambda: all(tcp.eof and peer.eof for tcp, peer in ends), 5, "FIN at both ends")
    guest.drv.close()


@both_formats
def test_only_its_own_connections_end_with_a_keeper(
    backend: Backend, world: World, rings: int
) -> None:
    """A connection of another worker goes on; one of the killed worker is reset, not silent."""
    guest = Guest(Driver(backend.path, pairs=PAIRS, features=BASIC | GUEST_CSUM | rings).start())
    guest.resolve()
    lost, lost_peer = established(guest, world, 4, pair=0)
    kept, kept_peer = established(guest, world, 4, pair=1)
    for tcp, peer in ((lost, lost_peer), (kept, kept_peer)):
        exchange(guest, tcp, peer, random_bytes(50_000), random_bytes(50_000))
    kill(backend, 0, keeper=True)
    exchange(guest, kept, kept_peer, random_bytes(50_000), random_bytes(50_000))
    lost.send(b"anybody?")
    guest.pump(lambda: lost.state == "reset", 5, "a reset of the connection that was lost")
    guest.drv.close()
    lost_peer.close()
    kept_peer.close()


def test_workers_stay_on_their_processors(world: World, compiled: None) -> None:
    """--cpus: in turn, also the one that takes a dead one's place."""
    may = sorted(os.sched_getaffinity(0))
    chosen = list(reversed(may))[:2]
    words = ("--queues", "3", "--workers", "3", "--cpus", ",".join(map(str, chosen)))
    backend = Backend(world, *words)
    wanted = sorted([chosen[number % len(chosen)]] for number in range(3))

    def pinned() -> list[list[int]]:
        return sorted(sorted(os.sched_getaffinity(pid)) for pid in workers(backend))

    try:
        deadline = time.monotonic() + 20
        while pinned() != wanted:
            assert time.monotonic() < deadline, backend.tail()
            time.sleep(0.01)
        kill(backend, 1)
        assert pinned() == wanted
        assert os.sched_getaffinity(backend.pid) == set(may), "control is not pinned"
    finally:
        backend.kill()


def test_one_that_is_stuck_is_replaced(backend: Backend, world: World) -> None:
    """A worker that takes no breath any more (here: stopped by a signal) is killed, with a line
    that says so; its connections go on, and the other worker never stops."""
    guest = Guest(Driver(backend.path, pairs=PAIRS, features=BASIC | GUEST_CSUM).start())
    guest.resolve()
    ends = [established(guest, world, 4, pair=pair) for pair in (0, 1)]
    for tcp, peer in ends:
        exchange(guest, tcp, peer, b"up", b"down")
    guest.pump(timeout=3.0)  # all come to rest, and nobody looks after them
    stuck = workers(backend)[0]
    up = count(backend, "workers are up")
    os.kill(stuck, signal.SIGSTOP)
    tcp, peer = ends[1]
    deadline = time.monotonic() + 20
    while count(backend, "workers are up") == up:
        assert time.monotonic() < deadline, backend.tail()
        exchange(guest, tcp, peer, b"up", b"down", timeout=2)
        time.sleep(0.05)
    assert count(backend, "worker 0 does not go on (status -9)") == 1, backend.tail()
    assert stuck not in workers(backend)
    for tcp, peer in ends:
        exchange(guest, tcp, peer, random_bytes(5000), random_bytes(5000))
    guest.drv.close()
