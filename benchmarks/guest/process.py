"""process.py - a running program with a log, in a process group of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.lab import LabError


class Process:
    """A running program: its Popen, and the file that both its output streams go to."""

    def __init__(self, popen: subprocess.Popen[bytes], log: Path, name: str) -> None:
        self.popen, self.log, self.name = popen, log, name

    @property
    def pid(self) -> int:
        """The program's own pid: every launcher in front of it has exec'ed the next."""
        return self.popen.pid

    def running(self) -> bool:
        """Whether it has not ended."""
        return self.popen.poll() is None

    def tail(self, lines: int = 40) -> str:
        """The end of what it printed."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join(text.splitlines()[-lines:])

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = 5) -> int:
        """End its process group, by force when it lingers, and return its exit status."""
        if self.running():
            _signal_group(self.pid, number)
        try:
            return self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            _signal_group(self.pid, signal.SIGKILL)
            return self.popen.wait(timeout_s)

    def wait_end(self, timeout_s: float) -> None:
        """Wait until it has ended well; LabError with its log otherwise."""
        try:
            status = self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise LabError(f"{self.name}: no end in {timeout_s:g} s:\n{self.tail()}") from error
        if status:
            raise LabError(f"{self.name} failed ({status}):\n{self.tail()}")

    def wait_for(self, happened: Callable[[], bool], what: str, timeout_s: float) -> None:
        """Wait for something this process brings about; LabError with its log if it does not."""
        deadline_s = time.monotonic() + timeout_s
        while not happened():
            if not self.running():
                status = self.popen.returncode
                raise LabError(f"{self.name} ended ({status}) before {what}:\n{self.tail()}")
            if time.monotonic() > deadline_s:
                raise LabError(f"{self.name}: no {what} in {timeout_s:g} s:\n{self.tail()}")
            time.sleep(0.02)


def _signal_group(pid: int, number: int) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        pass  # it ended between the look and the signal
