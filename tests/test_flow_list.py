"""`vhostmq flows`: what a running instance's table says, and which instance is meant."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from backend import Backend
from driver import Driver
from guest import Guest
from minitcp import established
from world import World

from control import flow_list
from control.cli import main
from shm import schema, segment
from shm.layout import View
from shm.segment import PREFIX, Segment, SegmentError

ROOT = Path(__file__).resolve().parent.parent
NOW_MS = 10_000_000
NOBODY = 1 << 22  # Linux gives no process this number


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where segments are looked for: nobody else's are there."""
    monkeypatch.setattr(segment, "FOLDER", tmp_path)
    return tmp_path


@contextlib.contextmanager
def instance(pid: int = 0, workers: int = 2) -> Iterator[Segment]:
    """A segment as control makes it."""
    made = Segment(f"{PREFIX}{pid or os.getpid()}-{time.monotonic_ns()}", workers, create=True)
    try:
        yield made
    finally:
        made.unlink()
        made.close()


def add(made: Segment, index: int, **values: int) -> View:
    """A flow in the table."""
    flow = View(schema.FLOW, made.buffer, made.offsets.flow + index * schema.FLOW.size)
    for name in ("guest_addr", "far_addr"):
        flow.set_bytes(name, ipaddress.ip_address("::ffff:192.0.2.1").packed)
    fields = {"tag": 77 + index, "state": 3, "born_ms": NOW_MS - 1500, "last_far_ms": NOW_MS - 500}
    for name, value in (fields | values).items():
        flow[name] = value
    at = made.offsets.tags + 4 * index
    made.buffer[at : at + 4] = flow["tag"].to_bytes(4, "little")
    return flow


def test_a_row() -> None:
    with instance() as made:
        flow = add(made, 5, guest_port=40000, far_port=443, home=1, tx_queue=3, tx_bytes=10)
        flow["rx_bytes"], flow["moves"] = 20, 4
        assert list(flow_list.flows(made, NOW_MS)) == [
            {
                "protocol": "tcp", "guest": "192.0.2.1:40000", "far": "192.0.2.1:443",
                "state": "open", "home": "1", "queue": 3, "age_s": 1.5, "idle_s": 0.5,
                "tx_bytes": 10, "rx_bytes": 20, "moves": 4,
            }
        ]  # fmt: skip


def test_other_flows() -> None:
    with instance() as made:
        flow = add(made, 0, protocol=1, state=6, heir=1, home=1, far_port=53)
        flow.set_bytes("far_addr", ipaddress.ip_address("2001:db8::1").packed)
        add(made, 1, born_ms=(1 << 32) - 500)
        (udp, old) = flow_list.flows(made, (1 << 32) + 500)
    assert (udp["far"], udp["state"], udp["home"]) == ("[2001:db8::1]:53", "stream", "1>0")
    assert old["age_s"] == 1.0, "the clock of 32 bits has turned over"


def test_heard_of_just_now() -> None:
    """A worker was faster than the look at the clock."""
    with instance() as made:
        add(made, 0, born_ms=NOW_MS + 2, last_guest_ms=NOW_MS + 2)
        (row,) = flow_list.flows(made, NOW_MS)
    assert (row["age_s"], row["idle_s"]) == (0.0, 0.0)


def test_what_is_no_flow() -> None:
    """Half made, gone, or another one by now."""
    with instance() as made:
        add(made, 0, state=0)
        add(made, 1, tag=0x80000001)
        changed = add(made, 2)
        changed["tag"] = 5
        assert list(flow_list.flows(made, NOW_MS)) == []


def test_which_instance(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    with pytest.raises(SegmentError, match="no instance of yours runs"):
        flow_list.show(None, False)
    name = f"{PREFIX[1:]}{os.getpid()}-a"
    (folder / name).write_bytes(bytes(4096))
    with pytest.raises(SegmentError, match="another version"):
        flow_list.show(None, False)
    (folder / f"{PREFIX[1:]}{os.getppid()}-b").write_bytes(bytes(4096))
    with pytest.raises(SegmentError, match="choose one with --pid .*, "):
        flow_list.show(None, False)
    with pytest.raises(SegmentError, match=f"process {NOBODY} is no instance"):
        flow_list.show(NOBODY, False)
    (folder / f"{PREFIX[1:]}{NOBODY}-c").write_bytes(b"")  # its creator is gone
    assert NOBODY not in segment.running()
    assert main(["flows", "--pid", str(NOBODY)]) == 1
    assert capsys.readouterr().err == f"vhostmq: process {NOBODY} is no instance of yours\n"


@pytest.mark.parametrize("words", [["flows"], ["workers", "--seconds", "1"]])
def test_into_a_pipe_that_closes(words: list[str]) -> None:
    """As `| head` does: the end, without a word."""
    with instance() as made:
        add(made, 0)
        read_end, write_end = os.pipe()
        os.close(read_end)
        command = [sys.executable, "-m", "control", *words, "--pid", str(os.getpid())]
        done = subprocess.run(
            command, cwd=ROOT, stdout=write_end, stderr=subprocess.PIPE, timeout=30
        )
        os.close(write_end)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


@pytest.mark.passt_lacks("a table to read")
def test_of_a_running_instance(make_backend, world: World) -> None:
    """A connection of a guest, as columns and as JSON."""
    backend: Backend = make_backend("--queues", "1")
    guest = Guest(Driver(backend.path).start())
    guest.resolve()
    tcp, peer = established(guest, world, 4)

    def said(*words: str) -> list[str]:
        command = [sys.executable, "-m", "control", "flows", "--pid", str(backend.pid), *words]
        done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True)
        return done.stdout.splitlines()

    head, *lines = said()
    assert head.split() == list(flow_list.COLUMNS)
    assert [line.split()[:4] for line in lines if "tcp" in line] == [
        ["tcp", f"198.51.100.2:{tcp.lport}", f"198.51.100.1:{tcp.rport}", "open"]
    ]
    (row,) = [row for row in map(json.loads, said("--json")) if row["protocol"] == "tcp"]
    assert row.keys() == set(flow_list.COLUMNS) and row["home"] == "0"
    assert 0 <= row["idle_s"] <= row["age_s"] < 60
    guest.drv.close()
    peer.close()


def test_an_entry_that_is_being_filled_is_left_out() -> None:
    """Its version is odd meanwhile (flows/table.py)."""
    with instance() as made:
        flow = add(made, 5)
        for version, listed in ((4, 1), (5, 0), (6, 1)):
            flow["version"] = version
            assert len(list(flow_list.flows(made, NOW_MS))) == listed
