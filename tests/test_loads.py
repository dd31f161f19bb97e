"""The loads of load.c report what they did."""

from __future__ import annotations

import json
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import series

SLOW = 3  # TCP_SLOW of load.c


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """A server of load.c."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [series.load_program(), "serve", str(port)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    yield port
    process.kill()
    process.wait()


def load(port: int, *words: str) -> subprocess.CompletedProcess[str]:
    command = [str(series.load_program()), *words[:2], "127.0.0.1", str(port), "1", *words[2:]]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("way", ["up", "down"])
def test_streams(port: int, way: str) -> None:
    one, many = (json.loads(load(port, "tcp", way, number).stdout) for number in ("1", "4"))
    assert min(one["bytes"], many["bytes"]) > 1e6
    assert 0.9 < one["seconds"] < 10 and 0.9 < many["seconds"] < 10


@pytest.mark.parametrize("way", ["up", "down"])
@pytest.mark.parametrize("train", ["1", "20"])
def test_datagrams(port: int, way: str, train: str) -> None:
    """The receiver counts; it cannot have got more than were sent."""
    said = json.loads(load(port, "udp", way, "1400", train).stdout)
    assert 100 < said["datagrams"] < 50_000_000, "datagrams, not bytes"
    assert 0.9 < said["seconds"] < 10
    if way == "up":
        assert 0 < said["datagrams"] <= said["sent"] and said["sent"] % int(train) == 0


def test_a_slow_receiver(port: int) -> None:
    """It is the one that bounds the rate: 64 KiB every 2 ms, never much more."""
    said = json.loads(load(port, "slow", "up", "2").stdout)
    assert 1e6 < said["bytes"] < 500 * said["seconds"] * (64 << 10) * 1.1
    assert 2 <= said["longest_gap_ms"] < 1000 * said["seconds"]
    assert said["stalls"] == 0 or said["longest_gap_ms"] >= 200


def test_a_stall_is_seen(port: int) -> None:
    """A sender that stops for 0.4 s: one gap, of that length."""
    with socket.create_connection(("127.0.0.1", port)) as sender:
        sender.sendall(struct.pack(">4Q", SLOW, 1200, 1, 0) + bytes(1000))
        time.sleep(0.4)
        for _ in range(40):
            sender.sendall(bytes(1000))
            time.sleep(0.02)
        count, _, gap_us, stalls = struct.unpack(">4Q", sender.recv(32, socket.MSG_WAITALL))
    assert 1000 <= count <= 41_000 and 350_000 < gap_us < 1_200_000 and stalls >= 1


@pytest.mark.parametrize(
    ("kind", "amount"), [("rr", "1"), ("rr", "50"), ("rr", "1001"), ("crr", "1")]
)
def test_transactions(port: int, kind: str, amount: str) -> None:
    *began, result = load(port, kind, "both", amount).stdout.splitlines()
    opened = [{"open": True}] if kind == "rr" else []
    assert [json.loads(line) for line in began] == [*opened, {"begin": True}]
    said = json.loads(result)
    assert said["transactions"] > 50 and 0 < said["p50_us"] <= said["p99_us"]
    assert 0.9 < said["seconds"] < 10 and "open_first_per_s" not in said


def test_how_fast_connections_open(port: int) -> None:
    """With many: both rates, and every connection is closed before the load ends."""
    said = json.loads(load(port, "rr", "both", "10000").stdout.splitlines()[-1])
    assert min(said["open_first_per_s"], said["open_last_per_s"]) > 100
    open_now = Path("/proc/net/tcp").read_text().splitlines()[1:]
    ports = {f"{port + number:04X}" for number in range(1, 9)}
    left = [line for line in map(str.split, open_now)
            if line[2].rpartition(":")[2] in ports and line[3] == "01"]  # fmt: skip
    assert not left, f"{len(left)} are still established"


def test_a_connection_that_fails_ends_the_load() -> None:
    """One of eight processes is refused: the load ends at once, with the reason."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    done = load(port, "rr", "both", "2000")
    assert done.returncode == 1 and "Connection refused" in done.stdout


def test_a_load_that_fails_says_why() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    done = load(port, "tcp", "up", "1")
    said = json.loads(done.stdout)["error"]
    assert done.returncode == 1 and said == "connect: Connection refused"
