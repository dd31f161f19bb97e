"""A worker that is killed: another takes its place, rings and connections go on where they were.
With its keeper its connections end, and nobody else's do."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import packets as pk
import pytest
from backend import Backend, kind
from driver import BASIC, GUEST_CSUM, Driver
from formats import all_formats, both_formats
from guest import Guest, random_bytes
from minitcp import established, exchange, listen
from world import Datagrams, World, loopback

from control import instances, places
from control.processes import again_in
from shm.layout import View
from shm.schema import SEEN

pytestmark = pytest.mark.skipif(kind() != "ours", reason="NOT TESTED here: passt has no workers")

PAIRS = 2
TRAP = "VHOSTMQ_TEST_TRAP"  # of looping.py
FORWARD_TCP, FORWARD_UDP = 18080, 18081
OPENED = {"tcp": 0, "udp": 2, "icmp": 1}
FORWARDS = ("-t", str(FORWARD_TCP), "-u", str(FORWARD_UDP))


@pytest.fixture
def backend(world: World, compiled: None) -> Iterator[Backend]:
    made = Backend(world, "--queues", str(PAIRS), "--workers", str(PAIRS), *FORWARDS)
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


@contextmanager
def replaced(backend: Backend, meanwhile: Callable[[], None] = lambda: None) -> Iterator[None]:
    """A worker dies in the block; then wait until another is up in its place."""
    up, deadline = count(backend, "workers are up"), time.monotonic() + 20
    yield
    while count(backend, "workers are up") == up:
        assert time.monotonic() < deadline, backend.tail()
        meanwhile()
        time.sleep(0.002)


def kill(backend: Backend, number: int, keeper: bool = False) -> None:
    """SIGKILL one worker, or its keeper, and wait until another is up in its place."""
    died = count(backend, f"worker {number} died")
    with replaced(backend):
        os.kill(lineage(backend)[number][0 if keeper else 1], signal.SIGKILL)
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


def at_host(guest: Guest, end: Datagrams) -> tuple[bytes, tuple]:
    guest.pump(lambda: end.inbox, 3, "a datagram at the host")
    return end.inbox.popleft()


def test_datagrams_and_pings_go_on(backend: Backend, world: World) -> None:
    """On the sockets they had: the other end is asked by nobody new, and what it sends arrives."""
    guest = Guest(Driver(backend.path, pairs=PAIRS, features=BASIC | GUEST_CSUM).start())
    guest.resolve()
    server, client = (guest.with_host(world.udp(socket.AF_INET)) for _ in range(2))

    def ask(text: bytes) -> tuple:
        """The guest asks a server and pings; where the server was asked from."""
        guest.send_udp(guest.gw4, 6000, server.port, text, pair=0)
        data, asked_from = at_host(guest, server)
        assert data == text
        guest.ping(guest.gw4, 7, len(text), text, pair=0)
        assert guest.next_icmp({0})[1].body.endswith(text)
        return asked_from

    def knock(text: bytes) -> None:
        """A client of the host asks the guest."""
        client.send(text, (loopback(socket.AF_INET), FORWARD_UDP))
        packet = guest.next_udp()[1]
        assert (packet.payload, packet.sport) == (text, client.port)

    asked_from = ask(b"one")
    knock(b"here I am")
    for number in range(PAIRS):  # whoever has them
        kill(backend, number)
    server.send(b"an answer", asked_from)
    packet = guest.next_udp()[1]
    assert (packet.payload, packet.sport, packet.dport) == (b"an answer", server.port, 6000)
    guest.send_udp(guest.gw4, FORWARD_UDP, client.port, b"who?", pair=0)
    assert at_host(guest, client) == (b"who?", (loopback(socket.AF_INET), FORWARD_UDP))
    knock(b"still me")
    assert ask(b"again") == asked_from
    opened = {
        dict(labels)["protocol"]: value
        for (name, labels), value in backend.metrics().items()
        if name == "vhostmq_flows_opened_total"
    }
    assert opened == OPENED
    guest.drv.close()


def test_who_waits_in_the_backlog_is_served(backend: Backend, world: World) -> None:
    """Connections from the host that no worker had accepted when it died."""
    guest = Guest(Driver(backend.path, pairs=PAIRS, features=BASIC | GUEST_CSUM).start())
    guest.resolve()
    accepted = listen(guest, FORWARD_TCP)
    for pid in workers(backend):
        os.kill(pid, signal.SIGSTOP)
    clients = [guest.with_host(world.connect(socket.AF_INET, FORWARD_TCP)) for _ in range(16)]
    for number in range(PAIRS):
        kill(backend, number)
    guest.pump(lambda: len(accepted) == len(clients), 10, "all of them at the guest")
    for tcp in accepted:
        tcp.send(b"welcome")
    guest.pump(lambda: all(len(one.inbox) == 7 for one in clients), 10, "an answer for each")
    guest.drv.close()


def test_it_was_writing_down_an_address(backend: Backend, world: World) -> None:
    """An IPv6 address that it had begun to write is forgotten; the guest's next one is learnt."""
    guest = Guest(Driver(backend.path, pairs=PAIRS, features=BASIC | GUEST_CSUM).start())
    guest.resolve()
    accepted = listen(guest, FORWARD_TCP)
    segment = instances.chosen(backend.pid)
    seen = View(SEEN, segment.buffer, segment.offsets.seen)
    seen["lock"] |= 0 + 1  # worker 0
    kill(backend, 0)
    own = guest.ip6 = pk.ip("2001:db8:9::f00d")
    guest.ping(guest.gw6, 7, 1, b"here", pair=0)
    guest.next_icmp({129})
    peer = guest.with_host(world.connect(socket.AF_INET6, FORWARD_TCP))
    guest.pump(lambda: accepted, 5, "a connection")
    assert accepted[0].laddr == own
    peer.close()
    guest.drv.close()
    segment.close()


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
    stuck, (tcp, peer) = workers(backend)[0], ends[1]
    with replaced(backend, lambda: exchange(guest, tcp, peer, b"up", b"down", timeout=2)):
        os.kill(stuck, signal.SIGSTOP)
    assert count(backend, "worker 0 does not go on (status -9)") == 1, backend.tail()
    assert stuck not in workers(backend)
    for tcp, peer in ends:
        exchange(guest, tcp, peer, random_bytes(5000), random_bytes(5000))
    guest.drv.close()


@pytest.mark.parametrize("woken_by", ["a frame", "a command"])
def test_one_in_a_loop_is_replaced(
    world: World, compiled: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, woken_by: str
) -> None:
    """The first breath after all have rested never ends, or one soon after control has woken them:
    it is found, although nobody was looking, and what the other worker carries goes on meanwhile.
    """
    trap = tmp_path / "trap"
    monkeypatch.setenv(TRAP, str(trap))
    words = ("--queues", str(PAIRS), "--workers", str(PAIRS))
    backend = Backend(world, *words, program=("-m", "tests.looping"))
    if woken_by == "a command":
        backend.said("workers are up", 30)
        time.sleep(4.5)  # all come to rest
    guest = Guest(Driver(backend.path, pairs=PAIRS, features=BASIC | GUEST_CSUM).start())
    guest.resolve()
    ends = [established(guest, world, 4, pair=pair) for pair in (0, 1)]
    if woken_by == "a frame":
        guest.pump(timeout=3.0)
    trap.touch()
    guest.ask_for_gateway(pair=0)
    deadline = time.monotonic() + 2
    while trap.exists():
        assert time.monotonic() < deadline, "nobody fell into it"
        time.sleep(0.01)
    tcp, peer = ends[1]
    began_s = time.monotonic()
    with replaced(backend, lambda: exchange(guest, tcp, peer, b"up", b"down", timeout=2)):
        pass
    assert time.monotonic() - began_s < 6, "three looks, a second each, and the next worker"
    assert count(backend, "worker 0 does not go on (status -9)") == 1, backend.tail()
    for tcp, peer in ends:
        exchange(guest, tcp, peer, random_bytes(5000), random_bytes(5000))
    guest.drv.close()
    backend.kill()


def test_one_that_dies_again_and_again_waits(backend: Backend, world: World) -> None:
    """Longer each time, with a line that says so; the other worker goes on. Its connections are
    kept, until it is they that may be what kills it."""
    guest = Guest(Driver(backend.path, pairs=PAIRS, features=BASIC | GUEST_CSUM).start())
    guest.resolve()
    mine, others = (established(guest, world, 4, pair=pair) for pair in (0, 1))

    def carry_on() -> None:
        exchange(guest, *others, b"up", b"down", timeout=2)

    guest.pump(timeout=places.RESTART_CALM_S + 0.2)  # its first death is one of a calm life
    took_s = []
    for number in range(places.FAILURES_KEPT + 1):
        if number == places.FAILURES_KEPT:
            exchange(guest, *mine, random_bytes(5000), random_bytes(5000))
        began_s = time.monotonic()
        with replaced(backend, carry_on):
            os.kill(workers(backend)[0], signal.SIGKILL)
        took_s.append(time.monotonic() - began_s)
    for failures in range(1, places.FAILURES_KEPT + 1):
        assert took_s[failures] >= again_in(failures)[0], took_s
        assert count(backend, f"failure {failures} in a row") == 1, backend.tail()
    mine[0].send(b"anybody?")
    guest.pump(lambda: mine[0].state == "reset", 5, "a reset of the connection that was given up")
    carry_on()
    guest.drv.close()
