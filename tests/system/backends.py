"""backends.py - the program under test: how to start it, and what it promises to be asserted.

Theory      `vhostmq run` of this checkout, as an ordinary user in the namespace `host`. To test the
            tests, BACKEND=passt:/path/of/passt in the environment runs passt's vhost-user mode in
            its place: one queue pair and no metrics, so assertions about pairs do not apply.
Ownership   Lab ends the process; stop() asserts an orderly end.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import scrape
from lab import Lab

from benchmarks.guest.process import Process

CHECKOUT = Path(__file__).resolve().parents[2]
METRICS_PORT = 9400
READY_TIMEOUT_S = 20
WARM_TIMEOUT_S = 300  # a fresh machine compiles the data plane once, before guests count seconds
GUEST_PORT = 7100  # TCP and UDP, forwarded from the host to the guest, unchanged


@dataclass
class Backend:
    """A running back-end."""

    lab: Lab
    process: Process
    vhost_socket: Path
    queues: int
    name: str  # "ours" or "passt"

    def metrics(self) -> scrape.Metrics:
        """Scrape it from within its namespace."""
        connection = self.lab.socket("host", socket.AF_INET, socket.SOCK_STREAM)
        return scrape.scrape(connection, "127.0.0.1", METRICS_PORT)

    def assert_healthy(self) -> None:
        """It runs and has not reported a fault of its own."""
        assert self.process.running(), f"the back-end ended:\n{self.process.tail()}"
        log = self.process.log.read_text(errors="replace")
        assert "Traceback" not in log, f"the back-end reported a fault:\n{log[-4000:]}"

    def stop(self) -> None:
        """SIGTERM ends it in five seconds with status 0."""
        self.assert_healthy()
        status = self.process.stop(signal.SIGTERM)
        assert status == 0, f"the back-end ended with {status}:\n{self.process.tail()}"


def start_backend(lab: Lab, queues: int, *words: str) -> Backend:
    """Start the back-end under test, perhaps with more words on its command line, and wait until it
    takes connections."""
    vhost_socket = lab.directory / "vhost.sock"
    forwards = ["-t", str(GUEST_PORT), "-u", str(GUEST_PORT)]
    kind, _, path = os.environ.get("BACKEND", "ours").partition(":")
    if kind == "passt":
        command = [path, "--foreground", "--vhost-user", "--socket", str(vhost_socket), *forwards]
        queues = 1
    else:
        warm(lab)
        command = [*vhostmq(), "run", "--socket", str(vhost_socket), "--queues", str(queues)]
        command += ["--metrics", f"127.0.0.1:{METRICS_PORT}", *forwards, *words]
    process = lab.start("host", command, "backend", ordinary=True, cwd=CHECKOUT)
    process.wait_for(vhost_socket.exists, "vhost-user socket", READY_TIMEOUT_S)
    if kind != "passt":
        process.wait_for(lambda: "ready on" in process.tail(), "ready line", READY_TIMEOUT_S)
    return Backend(lab, process, vhost_socket, queues, kind)


@functools.cache
def warm(lab: Lab) -> None:
    """Have the data plane compiled, once."""
    process = lab.start("host", [*vhostmq(), "warm"], "warm", ordinary=True, cwd=CHECKOUT)
    process.wait_end(WARM_TIMEOUT_S)


def vhostmq() -> list[str]:
    """The command of this checkout: the installed one, else the package."""
    installed = shutil.which("vhostmq", path=str(CHECKOUT / ".venv/bin"))
    return [installed] if installed else [sys.executable, "-m", "control"]
