"""The command line end to end: socket paths that cannot be had, and what is left after a signal."""

from __future__ import annotations

import glob
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from world import World

from control.cli import StartError, bind_socket

ROOT = Path(__file__).resolve().parent.parent


def test_a_live_socket_is_not_replaced(tmp_path: Path) -> None:
    """And its owner is not disturbed: it sees no connection."""
    path = str(tmp_path / "s")
    with bind_socket(path) as live, pytest.raises(StartError, match="in use"):
        live.setblocking(False)
        bind_socket(path)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(path2 := str(tmp_path / "t"))
        other.listen()
        other.setblocking(False)
        with pytest.raises(StartError, match="in use"):
            bind_socket(path2)
        with pytest.raises(BlockingIOError):
            other.accept()


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    socket.socket(socket.AF_UNIX).bind(path)
    bind_socket(path).close()


def test_a_file_is_never_removed(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("do not lose")
    with pytest.raises(StartError, match="not a socket"):
        bind_socket(str(path))
    assert path.read_text() == "do not lose"


@pytest.mark.parametrize("path", ["/nowhere/at/all/s", "x" * 200])
def test_a_path_that_cannot_be_had(path: str) -> None:
    with pytest.raises(StartError) as caught:
        bind_socket(path)
    assert "None" not in str(caught.value)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("early", [True, False], ids=["at-once", "when-ready"])
def test_a_signal_leaves_nothing_behind(
    world: World, tmp_path: Path, number: signal.Signals, early: bool
) -> None:
    """Neither socket, nor pid file, nor segment, nor process; status 0; no traceback."""
    path, pid_file = tmp_path / "s", tmp_path / "pid"
    command = [sys.executable, "-m", "control", "run", "-s", str(path), "-P", str(pid_file)]
    process = world.run(subprocess.Popen, command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (path if early else pid_file).exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.002)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in said) == (0, False), said
    assert not path.exists() and not pid_file.exists()
    assert not glob.glob(f"/dev/shm/vhostmq-{process.pid}-*")
    assert os.path.isdir(tmp_path)
