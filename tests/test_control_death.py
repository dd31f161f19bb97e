"""Control that is killed: workers go on, another control takes its place, the front-end notices
nothing."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from backend import Backend, kind
from driver import BASIC, GUEST_CSUM, SET_VRING_ENABLE, Channel, Driver, Lost
from formats import all_formats
from guest import Guest, random_bytes
from minitcp import established, exchange, listen
from test_run_options import Adopted
from test_worker_death import count, kill, lineage
from world import World

from control import places
from control.cli import LISTEN_BATCH

pytestmark = pytest.mark.skipif(kind() != "ours", reason="NOT TESTED here: passt is one process")

PAIRS, SEND_RARP = 2, 19
FEATURES = BASIC | GUEST_CSUM


@pytest.fixture
def backend(world: World, compiled: None) -> Iterator[Backend]:
    made = Backend(world, "--queues", str(PAIRS), "--workers", str(PAIRS))
    yield made
    made.kill()


def children(backend: Backend, of: str) -> list[int]:
    """The guard's children with this in their command line."""
    found = []
    for pid in backend.tree()[1:]:
        with contextlib.suppress(OSError):
            with open(f"/proc/{pid}/cmdline") as command, open(f"/proc/{pid}/stat") as stat:
                parent = int(stat.read().rpartition(")")[2].split()[1])
                if parent == backend.pid and of in command.read():
                    found.append(pid)
    return found


def dies_at(place: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have control of tests/dying.py die there, once the file that is returned is made."""
    trap = folder / "trap"
    monkeypatch.setenv("VHOSTMQ_TEST_TRAP", str(trap))
    monkeypatch.setenv("VHOSTMQ_TEST_PLACE", place)
    return trap


def wait_for(condition: Callable[[], bool], backend: Backend, timeout: float = 20) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, backend.tail()
        time.sleep(0.002)


def message_done() -> None:
    """Nothing of the front-end's last message is in hand: what happens then, test_at_any_moment."""
    time.sleep(0.05)


def kill_control(backend: Backend) -> None:
    """SIGKILL, some time after the front-end's last message, and wait until another is there."""
    message_done()
    back = count(backend, "control is back")
    os.kill(backend.control(), signal.SIGKILL)
    wait_for(lambda: count(backend, "control is back") > back, backend)


def test_nobody_notices(backend: Backend, world: World) -> None:
    """A guest's connections go on, old and new, and so do its workers: the same processes."""
    guest = Guest(Driver(backend.path, pairs=PAIRS, features=FEATURES).start())
    guest.resolve()
    ends = [established(guest, world, 4, pair=pair) for pair in range(PAIRS)]
    before = lineage(backend)
    for _ in range(3):
        kill_control(backend)
        for tcp, peer in ends:
            exchange(guest, tcp, peer, random_bytes(50_000), random_bytes(50_000))
        ends.append(established(guest, world, 4, pair=0))
    assert lineage(backend) == before
    assert not count(backend, "front-end gone"), backend.tail()
    guest.drv.close()
    backend.said("front-end gone")


def test_gone_for_a_while(backend: Backend, world: World) -> None:
    """Traffic and new connections with no control at all; then the front-end is heard again, what
    it said meanwhile included."""
    guest = Guest(Driver(backend.path, pairs=PAIRS, features=FEATURES).start())
    guest.resolve()
    message_done()
    os.kill(backend.pid, signal.SIGSTOP)  # the guard makes no other
    os.kill(backend.control(), signal.SIGKILL)
    for pair in range(PAIRS):
        tcp, peer = established(guest, world, 4, pair=pair)
        exchange(guest, tcp, peer, random_bytes(50_000), random_bytes(50_000))
    back = count(backend, "control is back")
    guest.drv.channel.send(SET_VRING_ENABLE, struct.pack("=II", 2, 0))
    os.kill(backend.pid, signal.SIGCONT)
    wait_for(lambda: count(backend, "control is back") > back, backend)
    guest.drv.barrier()
    assert backend.alive() and not count(backend, "front-end gone")
    guest.drv.close()


@all_formats
def test_rings_stop_and_start(backend: Backend, rings: int) -> None:
    """The new control answers for rings that another has started, and starts them again."""
    driver = Driver(backend.path, pairs=PAIRS, features=FEATURES | rings).start()
    guest = Guest(driver)
    guest.resolve()
    for round_ in range(3):
        kill_control(backend)
        driver.close()
        driver = Driver(backend.path, pairs=PAIRS, features=FEATURES | rings).start()
        guest = Guest(driver)
        guest.resolve()
        guest.ping(guest.gw4, 7, round_, b"still there?")
        guest.next_icmp({0}, 10)
    driver.close()


def test_workers_die_with_it(backend: Backend, world: World) -> None:
    """A worker that is killed before, while and after control is gone."""
    guest = Guest(Driver(backend.path, pairs=PAIRS, features=FEATURES).start())
    guest.resolve()
    tcp, peer = established(guest, world, 4, pair=0)
    kill_control(backend)
    kill(backend, 0)
    exchange(guest, tcp, peer, random_bytes(50_000), random_bytes(50_000))
    up = count(backend, "workers are up")
    os.kill(backend.pid, signal.SIGSTOP)
    os.kill(backend.control(), signal.SIGKILL)
    os.kill(lineage(backend)[0][1], signal.SIGKILL)
    os.kill(backend.pid, signal.SIGCONT)
    wait_for(lambda: count(backend, "workers are up") > up, backend)
    exchange(guest, tcp, peer, random_bytes(50_000), random_bytes(50_000))
    kill(backend, 0)
    exchange(guest, tcp, peer, random_bytes(50_000), random_bytes(50_000))
    guest.drv.close()


def test_nothing_leaks(backend: Backend) -> None:
    guest = Guest(Driver(backend.path, pairs=PAIRS, features=FEATURES).start())
    guest.resolve()
    kill_control(backend)
    before = backend.fds()
    for _ in range(5):
        kill_control(backend)
    wait_for(lambda: backend.fds() <= before, backend)
    guest.drv.close()


@pytest.mark.parametrize("seed", range(40))
def test_at_any_moment(backend: Backend, seed: int) -> None:
    """While a front-end sets itself up: it is served, or cut off with one line and may come
    again."""
    moment = random.Random(seed)
    victim = backend.control()
    driver = Driver(backend.path, pairs=PAIRS, features=FEATURES)
    pid = os.fork()
    if pid == 0:
        time.sleep(moment.uniform(0, 0.012))
        os.kill(victim, signal.SIGKILL)
        os._exit(0)
    try:
        driver.start()
    except Lost:
        backend.said("control died over a message")
        assert count(backend, "control died over a message"), backend.tail()
        driver.close()
        os.waitpid(pid, 0)
        driver = Driver(backend.path, pairs=PAIRS, features=FEATURES).start()
    else:
        os.waitpid(pid, 0)
    wait_for(lambda: count(backend, "control is back") > 0, backend)
    guest = Guest(driver)
    guest.resolve()
    guest.ping(guest.gw4, 7, 1, b"there?")
    guest.next_icmp({0}, 10)
    driver.close()


RAISES = """
import sys
from control import cli, session
def fail(*_):
    raise RuntimeError("a bug of ours")
session._HANDLERS[session.Request.SEND_RARP] = fail
sys.exit(cli.main())
"""


def test_a_bug_in_control(world: World, compiled: None) -> None:
    """A message that control dies of costs the front-end its connection to it, and nothing else:
    the guest's connections are there when it comes back."""
    words = ("--queues", str(PAIRS), "--workers", str(PAIRS))
    backend = Backend(world, *words, program=("-c", RAISES))
    guest = Guest(Driver(backend.path, pairs=PAIRS, features=FEATURES).start())
    guest.resolve()
    tcp, peer = established(guest, world, 4, pair=0)
    exchange(guest, tcp, peer, random_bytes(50_000), random_bytes(50_000))
    before = lineage(backend)
    with pytest.raises(Lost):
        guest.drv.ask(SEND_RARP, bytes(8))
    assert backend.said("RuntimeError: a bug of ours") and backend.said("died over a message")
    guest.drv.close()
    guest.drv = Driver(backend.path, pairs=PAIRS, features=FEATURES).start()
    exchange(guest, tcp, peer, random_bytes(50_000), random_bytes(50_000))
    assert lineage(backend) == before
    guest.drv.close()
    assert backend.stop() == 0


@pytest.mark.parametrize("seed", range(20))
def test_about_the_time_a_worker_dies(backend: Backend, world: World, seed: int) -> None:
    """Whatever each of them was just doing: a worker comes up, and its connections go on."""
    chance = random.Random(seed)
    guest = Guest(Driver(backend.path, pairs=PAIRS, features=FEATURES).start())
    guest.resolve()
    tcp, peer = established(guest, world, 4, pair=0)
    exchange(guest, tcp, peer, random_bytes(50_000), random_bytes(50_000))
    up = count(backend, "control is back")
    message_done()
    os.kill(lineage(backend)[0][1], signal.SIGKILL)
    time.sleep(chance.uniform(0, 0.05))
    os.kill(backend.control(), signal.SIGKILL)
    wait_for(lambda: count(backend, "control is back") > up, backend)
    guest.ping(guest.gw4, 7, 1, b"there?")
    guest.next_icmp({0}, 10)
    exchange(guest, tcp, peer, random_bytes(50_000), random_bytes(50_000))
    guest.drv.close()


@all_formats
def test_before_workers_are_up(backend: Backend, rings: int) -> None:
    """Rings that wait for their worker start where the front-end said."""
    (server,) = children(backend, "forkserver")
    os.kill(server, signal.SIGSTOP)
    os.kill(lineage(backend)[0][0], signal.SIGKILL)
    backend.said("worker 0 died")
    driver = Driver(backend.path, pairs=PAIRS, features=FEATURES | rings).start()
    kill_control(backend)
    os.kill(server, signal.SIGCONT)
    guest = Guest(driver)
    guest.resolve()
    guest.ping(guest.gw4, 7, 1, b"there?")
    guest.next_icmp({0}, 10)
    driver.close()


@pytest.mark.parametrize("way", ["--one-off", "--fd"])
def test_one_front_end_only(world: World, compiled: None, way: str) -> None:
    """It goes on with the next control, and still is the last one."""
    words = ("--queues", str(PAIRS))
    if way == "--fd":
        ours, theirs = socket.socketpair()
        with theirs:
            backend = Backend(world, *words, theirs=theirs)
        channel: Channel = Adopted(ours)
    else:
        backend = Backend(world, *words, "--one-off")
        channel = Channel(backend.path)
    driver = Driver("", pairs=PAIRS, features=FEATURES, channel=channel).start()
    kill_control(backend)
    guest = Guest(driver)
    guest.resolve()
    driver.close()
    assert backend.wait() == 0


def test_again_and_again(backend: Backend) -> None:
    """Later and later, and in the end no more: with status 1, and nobody left."""
    tree = backend.tree()
    deadline = time.monotonic() + 60
    while backend.alive():
        assert time.monotonic() < deadline, backend.tail()
        with contextlib.suppress(AssertionError, OSError):
            os.kill(backend.control(), signal.SIGKILL)
        time.sleep(0.005)
    assert backend.wait() == 1 and backend.said("times in a row: stopped")
    wait_for(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in tree), backend)


@pytest.mark.parametrize("place", ["lost", "take_born"])
def test_while_a_worker_is_replaced(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Wherever it stood: the worker's connections go on, that of the other one as ever."""
    trap = dies_at(place, tmp_path, monkeypatch)
    words = ("--queues", str(PAIRS), "--workers", str(PAIRS))
    backend = Backend(world, *words, program=("-m", "tests.dying"))
    guest = Guest(Driver(backend.path, pairs=PAIRS, features=FEATURES).start())
    guest.resolve()
    ends = [established(guest, world, 4, pair=pair) for pair in range(PAIRS)]
    for tcp, peer in ends:
        exchange(guest, tcp, peer, b"up", b"down")
    guest.pump(timeout=places.RESTART_CALM_S + 0.2)
    trap.touch()
    os.kill(lineage(backend)[0][1], signal.SIGKILL)
    wait_for(lambda: count(backend, "control is back") == 1, backend)
    assert not trap.exists()
    for tcp, peer in ends:
        exchange(guest, tcp, peer, random_bytes(5000), random_bytes(5000))
    guest.drv.close()
    backend.kill()


def test_while_it_gives_out_listeners(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ports are served in the end."""
    first, number = 20_000, 3 * LISTEN_BATCH
    trap = dies_at("listeners", tmp_path, monkeypatch)
    words = ("--queues", "1", "--workers", "1", "-t", f"{first}-{first + number - 1}")
    backend = Backend(world, *words, program=("-m", "tests.dying"))
    backend.said("workers are up", 30)
    trap.touch()
    with contextlib.suppress(Lost):
        Driver(backend.path, features=FEATURES).start().close()
    wait_for(lambda: count(backend, "control is back") == 1, backend)
    assert not trap.exists()
    guest = Guest(Driver(backend.path, features=FEATURES).start())
    guest.resolve()
    for port in (first, first + LISTEN_BATCH - 1, first + LISTEN_BATCH, first + number - 1):
        accepted = listen(guest, port)
        peer = guest.with_host(world.connect(socket.AF_INET, port))
        guest.pump(lambda accepted=accepted: accepted, 5, f"a connection to port {port}")
        peer.close()
    guest.drv.close()
    backend.kill()


def test_fork_server_dies(backend: Backend, world: World) -> None:
    """Another is made, with another control; workers stay, and later ones can be made."""
    guest = Guest(Driver(backend.path, pairs=PAIRS, features=FEATURES).start())
    guest.resolve()
    tcp, peer = established(guest, world, 4, pair=0)
    (server,) = children(backend, "forkserver")
    os.kill(server, signal.SIGKILL)
    backend.said("control is back")
    exchange(guest, tcp, peer, random_bytes(50_000), random_bytes(50_000))
    guest.drv.close()
    backend.stop()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_after_it(backend: Backend, number: int) -> None:
    """The signal still reaches whoever is control."""
    kill_control(backend)
    os.kill(backend.pid, number)
    assert backend.wait() == 0


def test_guard_is_killed(backend: Backend) -> None:
    """Then all are gone."""
    tree = backend.tree()
    os.kill(backend.pid, signal.SIGKILL)
    wait_for(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in tree[1:]), backend)
