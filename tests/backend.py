"""The back-end under test, as a process: start it, watch it from outside, end it.

By default it is this checkout, ``python -m control run --socket PATH ...``. The environment
variable ``BACKEND=passt:/path/to/passt`` runs the same tests against passt in vhost-user mode,
which shows whether a test asks for something only our own code would do. Differences live in
`Backend.argv` and nowhere else.

Everything learnt here comes from the outside: exit status, standard error, /proc, and the metrics
port.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from world import World

ROOT = Path(__file__).resolve().parent.parent
READY_S = 180.0
LOAD_WINDOWS, CALM = 3, 0.03  # a share of one processor
TICKS = os.sysconf("SC_CLK_TCK")
SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)")
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def kind() -> str:
    """``"ours"`` or ``"passt"``."""
    return os.environ.get("BACKEND", "ours").partition(":")[0]


class Backend:
    """One running back-end in `world`, with more arguments and perhaps few descriptors; `program`
    runs in the place of ``-m control``. It listens at `path`, unless it gets one end of a
    connection, `theirs`, with --fd.
    """

    def __init__(
        self,
        world: World,
        *args: str,
        metrics: bool = True,
        nofile: int | None = None,
        program: tuple[str, ...] = ("-m", "control"),
        theirs: socket.socket | None = None,
    ) -> None:
        self.world, self.program = world, program
        self.folder = tempfile.mkdtemp(prefix="vu")
        os.chmod(self.folder, 0o1777)
        self.path = f"{self.folder}/s"
        self.where = ["--fd", str(theirs.fileno())] if theirs else ["--socket", self.path]
        self.metrics_port = world.port() if metrics and kind() == "ours" else 0
        self.lines: list[str] = []
        self._ready = threading.Event()
        self.process = world.run(
            subprocess.Popen,
            self.argv(args),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=[theirs.fileno()] if theirs else [],
            text=True,
            errors="replace",
            preexec_fn=nofile and functools.partial(_limit_descriptors, nofile),
        )
        self.pid = self.process.pid
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._wait_ready()

    def argv(self, args: tuple[str, ...]) -> list[str]:
        if kind() == "passt":
            program = os.environ["BACKEND"].partition(":")[2]
            head = [program, "--foreground", "--vhost-user", "--repair-path", "none"]
            return [*head, *self.where, *args]
        argv = [sys.executable, *self.program, "run", *self.where]
        if self.metrics_port:
            argv += ["--metrics", f"127.0.0.1:{self.metrics_port}"]
        return [*argv, *args]

    def _read(self) -> None:
        word = "You can start qemu" if kind() == "passt" else "workers are up"
        assert self.process.stderr
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))
            if word in line:
                self._ready.set()
        self._ready.set()

    def _wait_ready(self) -> None:
        if not self._ready.wait(READY_S) or self.process.poll() is not None:
            status = self.process.poll()
            self.kill()
            raise AssertionError(f"back-end not ready (exit status {status}):\n{self.tail()}")

    def tail(self, lines: int = 30) -> str:
        return "\n".join(self.lines[-lines:])

    def said(self, text: str, timeout: float = 5.0) -> list[str]:
        """Its lines with `text` in them; waits for the first, which a thread has to read."""
        deadline = time.monotonic() + timeout
        while not (found := [line for line in self.lines if text in line]):
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        return found

    # --- seen from outside ---

    def alive(self) -> bool:
        return self.process.poll() is None

    def tree(self) -> list[int]:
        """Process ids of the back-end and all its descendants."""
        children: dict[int, list[int]] = {}
        for entry in os.listdir("/proc"):
            if entry.isdigit() and (stat := _stat(int(entry))):
                children.setdefault(int(stat[1]), []).append(int(entry))
        found, left = [], [self.pid]
        while left:
            pid = left.pop()
            found.append(pid)
            left += children.get(pid, [])
        return found

    def control(self) -> int:
        """The process that talks to the front-end: ours is a copy of the one that was started."""
        if kind() == "passt":
            return self.pid
        command = Path(f"/proc/{self.pid}/cmdline").read_bytes()
        for pid in self.tree()[1:]:
            stat = _stat(pid)
            if stat and int(stat[1]) == self.pid:
                with contextlib.suppress(OSError):
                    if Path(f"/proc/{pid}/cmdline").read_bytes() == command:
                        return pid
        raise AssertionError(f"no control:\n{self.tail()}")

    def cpu_s(self) -> float:
        """Processor time used so far by the live processes of the tree, in seconds."""
        stats = [stat for pid in self.tree() if (stat := _stat(pid))]
        return sum(int(stat[11]) + int(stat[12]) for stat in stats) / TICKS

    def load(self, seconds: float) -> float:
        """Share of one processor used over `seconds`: the least of LOAD_WINDOWS, or the first below
        CALM. What spins does so in each; what had to be done, or a busy machine, passes."""
        least = math.inf
        for _ in range(LOAD_WINDOWS):
            before, start = self.cpu_s(), time.monotonic()
            time.sleep(seconds)
            least = min(least, (self.cpu_s() - before) / (time.monotonic() - start))
            if least < CALM:
                break
        return least

    def fds(self) -> int:
        """Open descriptors of all processes of the tree."""
        total = 0
        for pid in self.tree():
            try:
                total += len(os.listdir(f"/proc/{pid}/fd"))
            except OSError:
                continue
        return total

    def metrics(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        """Every sample of the metrics page by name and labels."""
        with self.world.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
            sock.settimeout(10)
            sock.connect(("127.0.0.1", self.metrics_port))
            sock.sendall(b"GET /metrics HTTP/1.0\r\nHost: localhost\r\n\r\n")
            page = b""
            while part := sock.recv(1 << 16):
                page += part
        head, _, body = page.decode().partition("\r\n\r\n")
        if " 200 " not in head.splitlines()[0]:
            raise AssertionError(f"metrics answered {head.splitlines()[0]!r}")
        samples = {}
        for line in body.splitlines():
            if match := SAMPLE.match(line):
                labels = frozenset(LABEL.findall(match[2] or ""))
                samples[match[1], labels] = float(match[3])
        return samples

    def total(self, name: str, **labels: str) -> float:
        """Sum of the samples of `name` that carry all `labels`."""
        wanted = set(labels.items())
        return sum(
            value
            for (sample, has), value in self.metrics().items()
            if sample == name and wanted <= has
        )

    # --- ending ---

    def wait(self, timeout: float = 10.0) -> int:
        """Exit status once it ends by itself."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"back-end still runs after {timeout} s:\n{self.tail()}") from None

    def stop(self) -> int:
        """SIGTERM; returns the exit status."""
        if self.alive():
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.wait()
        finally:
            self.kill()

    def kill(self) -> None:
        """End the whole tree at once; harmless when it already ended."""
        if self.alive():
            tree = self.tree()
            self.process.kill()
            self.process.wait()
            for pid in tree[1:]:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
        self._reader.join(5)
        shutil.rmtree(self.folder, ignore_errors=True)


def _limit_descriptors(nofile: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (nofile, nofile))


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the state on (index 0), or None if it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return text.rpartition(")")[2].split()
