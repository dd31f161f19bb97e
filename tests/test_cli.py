"""The command line end to end: values that cannot be used, socket paths and ports that cannot be
had, and what is left after a signal."""

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

from control.cli import StartError, bind_socket, listening_socket, main, pid_file
from control.options import OPTIONS

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
    assert process.stderr
    if early:
        deadline = time.monotonic() + 60
        while not path.exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.002)
    else:
        assert any("workers are up" in line for line in process.stderr)
        assert pid_file.read_text() == f"{process.pid}\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in said) == (0, False), said
    assert not path.exists() and not pid_file.exists()
    assert not glob.glob(f"/dev/shm/vhostmq-{process.pid}-*")
    assert os.path.isdir(tmp_path)


def test_a_socket_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    """The path was taken over meanwhile: what is there now is not ours to remove."""
    path = tmp_path / "s"
    with listening_socket(str(path)):
        path.unlink()
        other = bind_socket(str(path))
    assert path.is_socket()
    other.close()
    with listening_socket(str(path)):
        assert path.is_socket()
    assert not path.exists()
    with listening_socket(str(path)):
        path.unlink()


@pytest.mark.parametrize("taken", [True, False], ids=["taken-over", "ours"])
def test_a_signal_after_the_path_was_taken_over(world: World, tmp_path: Path, taken: bool) -> None:
    path = tmp_path / "s"
    command = [sys.executable, "-m", "control", "run", "--socket", str(path)]
    process = world.run(subprocess.Popen, command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr and any("workers are up" in line for line in process.stderr)
    if taken:
        path.unlink()
        other = bind_socket(str(path))
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, "")
    assert path.exists() == taken
    if taken:
        other.close()


def test_a_pid_file_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    for text in ("1\n", "", "\udcff"):
        with pid_file(str(path)):
            assert path.read_text() == f"{os.getpid()}\n"
            path.write_text(text, errors="surrogateescape")
        assert path.read_text(errors="surrogateescape") == text
    with pid_file(str(path)):
        pass
    assert not path.exists()


def ended(*argv: str) -> tuple[int, str]:
    """Status of `vhostmq run` and its one line."""
    command = [sys.executable, "-m", "control", "run", *argv]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "" and done.stderr.count("\n") == 1, done
    return done.returncode, done.stderr.rstrip("\n")


WRONG = {
    "--socket": [""],
    "--fd": ["", "x", "-1", "1.5", "99999999999"],
    "--queues": ["0", "33", "two"],
    "--workers": ["0", "33", ""],
    "--cpus": ["", "x", "1-", "-1", "3-1", "1,1", "0-3,2", "8192", "1,,2"],
    "--poll-us": ["-1", "1001", "long", ""],
    "--features": ["-nosuch", "--csum", "all", "csum;mrg_rxbuf", "version_1"],
    "--tcp-ports": [
        "", "0", "65536", "22-", "25-22", "22:23-24", "x/22", "224.0.0.1/22", "22,22", "22 ", "22,",
        "fe80::1/22", "%an-interface-name/22", "22:0.0.0.0", "::/22:10.0.0.1", "all,~1-65535",
    ],
    "--udp-ports": ["auto", "~", "192.0.2.1/53,192.0.2.1/53", "[::1/53"],
    "--map-host-loopback": ["gateway", "127.0.0.1", "10.0.0.1/8", ""],
    "--map-guest-addr": ["ff02::1", "::", "10.0.0"],
    "--address": ["10.0.0.1/33", "127.0.0.1", "fe80::1", "2001:db8::1/129", "here", "10.0.0.1/"],
    "--netmask": ["33", "255.0.255.0", "-1", "x", ""],
    "--gateway": ["none", "0.0.0.0", "::1", "10.0.0.1/8"],
    "--interface": [""],
    "--mtu": ["67", "65521", "-1", "1500.0", "", "1e3"],
    "--mac-addr": ["01:00:00:00:00:01", "0:0:0:0:0:1", "02-00-00-00-00-01", "00:00:00:00:00:00"],
    "--dns": ["resolver", "0.0.0.0", "224.0.0.251"],
    "--dns-forward": ["127.0.0.1", "none"],
    "--dns-host": ["none", "fe80::1", "::"],
    "--search": ["a..b", "a b/c", ""],
    "--hostname": ["two words", "x" * 64, ""],
    "--fqdn": ["-.-..", "\u00e4.example"],
    "--metrics": ["0", "65536", "localhost:9400", "::1:9400", ""],
}  # fmt: skip


def test_every_option_with_a_value_has_wrong_ones() -> None:
    taking = {o.names[0] for o in OPTIONS if o.command == "run" and o.metavar}
    assert taking - {"--pid"} == set(WRONG)  # any text may name a file


@pytest.mark.parametrize(
    "name, value", [(name, value) for name, values in WRONG.items() for value in values]
)
def test_a_wrong_value_is_wrong_usage(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """Status 2 and one line that names the option. The socket cannot be had either, which would be
    said if it were tried first."""
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    where = [] if name in ("--socket", "--fd") else ["--socket", "/nowhere/at/all/s"]
    with pytest.raises(SystemExit) as end:
        main(["run", *where, f"{name}={value}"])
    out, line = capsys.readouterr()
    assert (end.value.code, out, line.count("\n"), name in line) == (2, "", 1, True), line
    assert line.startswith("vhostmq run: ") and line.endswith(" (see vhostmq run --help)\n")


WRONG_GUEST = {
    "--socket": [""],
    "--queues": ["0", "33", "two"],
    "--mtu": ["67", "65521", "1500.0", ""],
    "--features": WRONG["--features"],
}


def test_every_option_of_guest_with_a_value_has_wrong_ones() -> None:
    assert {o.names[0] for o in OPTIONS if o.command == "guest" and o.metavar} == set(WRONG_GUEST)


@pytest.mark.parametrize(
    "name, value", [(name, value) for name, values in WRONG_GUEST.items() for value in values]
)
def test_a_wrong_value_for_guest(capsys: pytest.CaptureFixture[str], name: str, value: str) -> None:
    """The same, before a process is started or the back-end asked for anything."""
    where = [] if name == "--socket" else ["--socket", "/nowhere/at/all/s"]
    with pytest.raises(SystemExit) as end:
        main(["guest", *where, f"{name}={value}", "--", "true"])
    out, line = capsys.readouterr()
    assert (end.value.code, out, line.count("\n"), name in line) == (2, "", 1, True), line
    assert line.startswith("vhostmq guest: ") and line.endswith(" (see vhostmq guest --help)\n")


@pytest.mark.parametrize(
    "argv",
    [
        ["--netmask", "8", "--address", "10.0.0.1/8"],
        ["--gateway", "10.0.0.1", "--address", "10.0.0.1"],
        ["--ipv4-only", "--tcp-ports", "::1/22"],
        ["--ipv6-only", "--udp-ports", "0.0.0.0/53"],
        ["--tcp-ports", "127.0.0.1/22", "--tcp-ports", "22"],
        ["--tcp-ports", "22", "--tcp-ports", "none"],
    ],
)
def test_options_that_contradict_each_other(argv: list[str]) -> None:
    status, line = ended("--socket", "/nowhere/at/all/s", *argv)
    assert status == 2 and argv[-2] in line and line.endswith(" (see vhostmq run --help)")


def test_what_this_host_does_not_have(tmp_path: Path) -> None:
    """Status 1: the same command line may work elsewhere, or later. Nothing is left behind."""
    path, taken = tmp_path / "s", socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    name = b"\xff0".decode(errors="surrogateescape")
    for argv, text in (
        (["--tcp-ports", f"127.0.0.1/{port}"], f"TCP port {port} on 127.0.0.1: it is in use"),
        (["--metrics", str(port)], f"{port}"),
        (["--tcp-ports", "192.0.2.99/9"], "no interface of this host has the address"),
        (["--tcp-ports", "%nosuch0/9"], "no network interface 'nosuch0'"),
        (["--tcp-ports", f"%{name}/9"], "no network interface"),
        (["--interface", "nosuch0"], "no network interface 'nosuch0'"),
        (["--dns-host", "fe80::1%nosuch0"], "--dns-host: there is no network interface"),
        (["--cpus", "0,8191"], "--cpus: CPU 8191 is not there, or not for this process"),
        (["--pid", str(tmp_path)], f"pid file {tmp_path}"),
        (["--pid", ""], "pid file"),
    ):
        status, line = ended("--quiet", "--socket", str(path), *argv)
        assert (status, text in line) == (1, True), line
        assert line.startswith("vhostmq: ") and not path.exists()
    taken.close()
