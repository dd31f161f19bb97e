"""`vhostmq guest` as a process: started, watched from outside, and seen to leave nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import packets as pk

from dataplane import slow
from dataplane.slow.net import Net

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 120  # the first guest of a fresh checkout compiles its mover


def network(net: Net) -> Callable[[bytes], list[bytes]]:
    """Answers what a guest asks to configure itself, and echoes UDP and pings."""

    def answer(frame: bytes) -> list[bytes]:
        known = slow.replies(frame, net)
        if known:
            return known
        try:
            packet = pk.parse(frame.ljust(60, b"\0"))
        except pk.BadFrame:
            return []
        macs = (packet.eth_src, net.our_mac)
        if packet.proto == pk.UDP and packet.dport == 7:
            body = pk.udp(packet.dst, packet.src, 7, packet.sport, packet.payload)
        elif packet.proto == pk.ICMP and packet.type == 8:
            body = pk.icmp(0, 0, packet.body)
        else:
            return []
        return [pk.ip_frame(macs, pk.ip_packet(packet.dst, packet.src, packet.proto, body))]

    return answer


def argv(
    path: str, *command: str, queues: int = 1, mtu: int | None = None, features: str = ""
) -> list[str]:
    words = [sys.executable, "-m", "control", "guest", "--socket", path, "--queues", str(queues)]
    words.append(f"--features={features}")
    if mtu is not None:
        words += ["--mtu", str(mtu)]
    return [*words, "--", *command]


def run(path: str, *command: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """A guest from start to end."""
    return subprocess.run(
        argv(path, *command, **options),
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


class Running:
    """A guest that runs while the test looks at it. Its command begins by printing "up"."""

    def __init__(self, path: str, script: str, **options: Any) -> None:
        self.process = subprocess.Popen(
            argv(path, "sh", "-c", f"echo up $$ $(readlink /proc/self/ns/net); {script}"),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline().split()
        assert line[:1] == ["up"], self.process.stderr and self.process.stderr.read()
        self.shell, self.namespace = int(line[1]), line[2]
        self.pids = tree(self.process.pid)

    def end(self) -> tuple[int, str]:
        """(exit status, stderr), and nothing may be left."""
        _, errors = self.process.communicate(timeout=30)
        self.assert_all_gone()
        return self.process.returncode, errors

    def assert_all_gone(self) -> None:
        deadline = time.monotonic() + 5
        while left := [pid for pid in self.pids if is_alive(pid)] + members(self.namespace):
            assert time.monotonic() < deadline, f"processes {left} are left"
            time.sleep(0.02)


def tree(root: int) -> list[int]:
    """A process and all its descendants."""
    children: dict[int, list[int]] = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            stat = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(stat[1]), []).append(int(entry))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def members(namespace: str) -> list[int]:
    """Processes in this network namespace."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.readlink(f"/proc/{entry}/ns/net") == namespace:
                found.append(int(entry))
        except OSError:
            continue
    return found
