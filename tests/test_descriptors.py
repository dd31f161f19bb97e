"""How many files may be open: the limit is raised as far as it goes, and one that is too low is
said before it hurts."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from backend import ROOT, Backend, kind
from driver import Driver
from guest import Guest
from test_worker_death import workers
from world import World

from control import descriptors
from control.descriptors import RING, DescriptorError, needed, shortage

OURS = pytest.mark.skipif(kind() != "ours", reason="NOT TESTED here: passt has no such options")
FIRST_EPHEMERAL = 2048  # so that "every port" are this many, and not more than a limit allows


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


# --- the arithmetic -------------------------------------------------------------------------------


def test_enough() -> None:
    assert shortage(1 << 20, 32, 32, 100) == ""


def test_few_connections() -> None:
    _, worker = needed(4, 2, 0)
    assert shortage(worker + descriptors.FLOWS, 4, 2, 0) == ""
    said = shortage(worker + descriptors.FLOWS - 1, 4, 2, 0)
    assert f"leaves each worker {descriptors.FLOWS - 1} connections" in said
    assert "ulimit -Hn" in said and "LimitNOFILE" in said


@pytest.mark.parametrize(
    "limit, ports, count, words",
    [
        (64, 0, 2, ["limit of 64", "32 queue pairs take", "fewer --queues"]),
        (20_000, 37_303, 2, ["37303 forwarded ports for 2 workers", "--workers 1"]),
        (20_000, 37_303, 1, ["37303 forwarded ports for 1 workers", "forward fewer ports"]),
    ],
)
def test_too_few(limit: int, ports: int, count: int, words: list[str]) -> None:
    with pytest.raises(DescriptorError) as caught:
        shortage(limit, 32, count, ports)
    said = str(caught.value)
    assert all(word in said for word in words) and "\n" not in said
    assert ("--workers 1" in said) == (ports > 0 and count > 1)


# --- the back-end ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def busy_world() -> Iterator[World]:
    """A host that keeps nearly all ports for its own connections: few are left for "all"."""
    made = World()
    if not made.isolated:
        made.close()
        pytest.skip("needs a network namespace of its own")
    path = Path("/proc/sys/net/ipv4/ip_local_port_range")
    made.run(path.write_text, f"{FIRST_EPHEMERAL} 65535")
    yield made
    made.close()


def attached(backend: Backend, pairs: int) -> Guest:
    guest = Guest(Driver(backend.path, pairs=pairs).start())
    guest.resolve()
    return guest


@OURS
@pytest.mark.parametrize("pairs, count", [(1, 1), (4, 1), (4, 2), (8, 8), (16, 16)])
def test_what_it_takes(make_backend: Callable[..., Backend], pairs: int, count: int) -> None:
    """The estimate is not exceeded by a running instance, and not far off."""
    ports = 50
    words = ["--queues", str(pairs), "--workers", str(count), "-t", f"3000-{2999 + ports}"]
    backend = make_backend(*words)
    guest = attached(backend, pairs)
    backend.metrics()
    for wanted, pid in zip(
        needed(pairs, count, ports), (backend.control(), workers(backend)[0]), strict=True
    ):
        used = open_files(pid)
        rings_of_others = RING * 2 * (pairs - pairs // count) if pid != backend.control() else 0
        assert used <= wanted <= used + rings_of_others + 32, f"{used} open, {wanted} expected"
    guest.drv.close()


@OURS
def test_the_hard_limit_is_taken(make_backend: Callable[..., Backend]) -> None:
    """Whatever the soft one is, in workers too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    try:
        backend = make_backend("--queues", "1")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for pid in (backend.control(), *workers(backend)):
        limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        assert limits == (hard, hard), f"process {pid}"


@OURS
@pytest.mark.parametrize("limit", [32, 64])
def test_a_limit_nothing_can_run_with(world: World, tmp_path: Path, limit: int) -> None:
    """Refused at once with one line, even if a guest might have asked for less."""
    done = world.run(
        subprocess.run,
        ["sh", "-c", f'ulimit -n {limit}; exec "$@"', "sh", sys.executable, "-m", "control"]
        + ["run", "-s", str(tmp_path / "s")],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        timeout=30,
    )
    lines = [line for line in done.stderr.splitlines() if "ping" not in line]
    assert done.returncode == 1 and len(lines) == 1, done.stderr
    assert f"the limit of {limit} open files is too low: 32 queue pairs take" in lines[0]


@OURS
def test_a_short_limit_is_said_and_served(make_backend: Callable[..., Backend]) -> None:
    backend = make_backend("--queues", "4", nofile=256)
    said = backend.said("open files")
    assert len(said) == 1 and "the limit of 256 open files leaves each worker" in said[0]
    attached(backend, 4).drv.close()


@OURS
def test_every_port(make_backend: Callable[..., Backend], busy_world: World) -> None:
    """`-t all`, two workers: each listens on every port that is not the host's own; a connection
    to any of them reaches the guest."""
    backend = make_backend(
        "--queues", "2", "--workers", "2", "-t", "all", within=busy_world, metrics=False
    )
    guest = attached(backend, 2)
    taken = min(open_files(pid) for pid in workers(backend))
    assert taken > FIRST_EPHEMERAL - 64, "some are in use by the host, most are ours"
    for port in (80, 443, 1024, FIRST_EPHEMERAL - 1):
        asked: list[int] = []
        guest.listeners[port] = lambda packet, pair, asked=asked: asked.append(packet.dport)
        peer = busy_world.connect(2, port)
        guest.pump(lambda asked=asked: asked, 10, f"the SYN of a connection to port {port}")
        peer.close()
    guest.drv.close()


@OURS
def test_more_ports_than_descriptors(busy_world: World, tmp_path: Path) -> None:
    """`-t all` with a limit that is too low for it says what it takes and what to do."""
    command = [sys.executable, "-m", "control", "run", "-s", str(tmp_path / "s"), "-t", "all"]
    done = busy_world.run(
        subprocess.run,
        ["sh", "-c", 'ulimit -n 1500; exec "$@"', "sh", *command, "--workers", "2"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        timeout=30,
    )
    assert done.returncode == 1 and f"{FIRST_EPHEMERAL - 1} forwarded ports" in done.stderr
    assert "--workers 1" in done.stderr and "ulimit" in done.stderr
