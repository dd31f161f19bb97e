"""lab.py - a host without privileges: a network namespace of its own, and processes in it.

Theory      What a demo or a benchmark calls "the host" is a network namespace made for it, in a
            user namespace unless root calls: loopback only, ICMP echo sockets allowed, every port
            free. The back-end and the servers run there; `vhostmq guest` makes the guest's
            namespace behind it. Nothing outside is touched.
Ownership   `Lab` ends what it started, by process id, and removes its folder.
Errors      LabError, one line, when the machine does not allow it.
"""

from __future__ import annotations

import ctypes
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from types import TracebackType
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
INSIDE = "VHOSTMQ_LAB"
READY_S = 300.0
LOG_SHOWN = 4000  # characters of a log in an error
METRICS_PORT = 9400
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


class LabError(Exception):
    """What is missing on this machine, and how to get it."""


def enter(module: str) -> None:
    """Run `module` again inside a network namespace of its own; returns only there."""
    if os.environ.get(INSIDE):
        _set_up()
        return
    if not shutil.which("unshare"):
        raise LabError("unshare is missing (Debian: apt-get install util-linux)")
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        raise LabError("/dev/net/tun cannot be opened: modprobe tun; chmod 666 /dev/net/tun")
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    command = ["unshare", "--net", *user, sys.executable, "-m", module, *sys.argv[1:]]
    os.execvpe(command[0], command, {**os.environ, INSIDE: "1"})


def _set_up() -> None:
    """Loopback up, ICMP echo sockets for everybody."""
    from pyroute2 import IPRoute

    with IPRoute() as ip:
        ip.link("set", index=1, state="up")
    for groups in ("0 2147483647", "0 0"):  # the second is all a user namespace knows
        try:
            pathlib.Path("/proc/sys/net/ipv4/ping_group_range").write_text(groups)
            return
        except OSError:
            continue


class Lab:
    """A folder and the processes in it."""

    def __init__(self) -> None:
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="vhostmq-"))
        self.processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Lab:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in reversed(self.processes):
            self.stop(process)
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self, *command: str, log: str | None = None, **how: Any) -> subprocess.Popen[bytes]:
        """Start a process that dies with this one; its output goes to `log` in the folder.

        `how` is for subprocess.Popen.
        """
        output = (self.folder / log).open("wb") if log else None
        parent = os.getpid()

        def die_with_parent() -> None:
            ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)
            if os.getppid() != parent:
                os._exit(1)

        how = ({"stdout": output, "stderr": output} if output else {}) | how
        process: subprocess.Popen[Any] = subprocess.Popen(
            command, cwd=ROOT, preexec_fn=die_with_parent, **how
        )
        self.processes.append(process)
        return process

    def stop(self, process: subprocess.Popen[bytes]) -> None:
        """End a process, politely first."""
        if process in self.processes:
            self.processes.remove(process)
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def backend(
        self,
        queues: int,
        workers: int,
        *more: str,
        metrics_port: int = METRICS_PORT,
        program: str = "control",
    ) -> subprocess.Popen[bytes]:
        """`vhostmq run`, ready for a front-end, its workers up; `program`: a module that does it
        another way."""
        command = [sys.executable, "-m", program, "run", "--socket", str(self.socket)]
        command += ["--queues", str(queues), "--workers", str(workers), *more]
        process = self.start(*command, "--metrics", f"127.0.0.1:{metrics_port}", log="run.log")
        self.wait_for("run.log", "workers are up", process)
        return process

    @property
    def socket(self) -> pathlib.Path:
        """Where back-ends listen."""
        return self.folder / "vhost.sock"

    def guest(self, queues: int, *command: str, mtu: int = 0) -> int:
        """Run `command` as a guest behind the back-end; its exit status."""
        words = [sys.executable, "-m", "control", "guest", "--socket", str(self.socket)]
        words += ["--queues", str(queues), *(["--mtu", str(mtu)] if mtu else []), "--", *command]
        process = self.start(*words)
        status = process.wait()
        self.processes.remove(process)
        return status

    def wait_for(self, log: str, text: str, process: subprocess.Popen[bytes]) -> None:
        """Wait until a process has said `text`."""
        deadline_s = time.monotonic() + READY_S
        while time.monotonic() < deadline_s:
            said = (self.folder / log).read_text(errors="replace")
            if text in said:
                return
            if process.poll() is not None:
                raise LabError(f"{process.args!r} ended:\n{said[-LOG_SHOWN:]}")
            time.sleep(0.05)
        raise LabError(
            f"{process.args!r} did not say {text!r} in {READY_S:.0f} s:\n{said[-LOG_SHOWN:]}"
        )


def scrape(port: int = METRICS_PORT) -> Samples:
    """All samples of the back-end's metrics, by name and labels."""
    from prometheus_client.parser import text_string_to_metric_families

    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
        text = page.read().decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def labelled(samples: Samples, name: str, **labels: str) -> float:
    """The sum of a metric's samples that have these labels."""
    wanted = frozenset(labels.items())
    return sum(value for (found, has), value in samples.items() if found == name and wanted <= has)
