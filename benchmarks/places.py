"""places.py - where loads run: guests of every kind, and the references, all with one face.

Theory      An Inside runs shell commands somewhere and knows the address at which the host's
            servers are reached from there: through a back-end the gateway, which stands for the
            host's loopback. `vhostmq guest`, loopback, veth and pasta are a shell behind pipes;
            QEMU has the agent of its guest (guest/guests.py). The tap behind DPDK's testpmd is in a
            namespace of its own, whose kernel is the guest: no offloads, and frames that its ring
            does not take are lost.
Errors      LabError when a command fails, or does not end.
"""

from __future__ import annotations

import os
import pathlib
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

from benchmarks import ring
from benchmarks.guest import guests
from benchmarks.guest.prepare import Images
from benchmarks.guest.process import Process
from benchmarks.lab import Lab, LabError

QEMU = {"qemu": "tcg", "qemu_kvm": "kvm"}  # front-end: accelerator
VETH = {"host": "10.77.0.1", "guest": "10.77.0.2"}
TAP = {"guest": "169.254.2.1/16", "gateway": "169.254.2.2", "mac": "52:54:00:12:34:58"}
POLLING = ("dpdk_tap",)  # front-ends that take a processor for as long as they live
BOOT_S = 120.0


Heard = Callable[[bytes], None]


class Inside(Protocol):
    """A place for loads."""

    address: str

    def run(self, command: str, timeout_s: float, heard: Heard = lambda said: None) -> str:
        """Run a shell command; what it printed. `heard` is told what it has said so far, each time
        it says something, if that can be had."""

    def close(self) -> None:
        """End the guest in good order."""


class Shell:
    """`sh` behind pipes, started by `words`."""

    def __init__(self, room: Lab, *words: str, address: str = "") -> None:
        self.room, self.commands, self.said = room, 0, b""
        self.process = room.start(*words, "sh", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.address = address or self._gateway()

    def _gateway(self) -> str:
        words = self.run("ip -4 route show default", BOOT_S).split()
        if "via" not in words:
            raise LabError(f"no default route behind {self.process.args!r}: {words}")
        return words[words.index("via") + 1]

    def run(self, command: str, timeout_s: float, heard: Heard = lambda said: None) -> str:
        """Run a shell command; LabError with its output when it fails."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.commands += 1
        mark = f"END {self.commands} "
        self.process.stdin.write(f"({command}) </dev/null 2>&1; echo {mark}$?\n".encode())
        self.process.stdin.flush()
        end_s = time.monotonic() + timeout_s
        while mark.encode() not in self.said or not self.said.endswith(b"\n"):
            left_s = max(end_s - time.monotonic(), 0)
            ready = select.select([self.process.stdout], [], [], left_s)[0]
            data = os.read(self.process.stdout.fileno(), 1 << 16) if ready else b""
            if not data:
                raise LabError(f"no answer to {command!r} in {timeout_s:.0f} s: {self.said!r}")
            self.said += data
            heard(self.said)
        output, _, status = self.said.decode().partition(mark)
        self.said = b""
        if int(status):
            raise LabError(output.strip() or f"{command!r} ended with {status.strip()}")
        return output

    def close(self) -> None:
        """The shell's end is the guest's."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.room.stop(self.process)


class Host:
    """The benchmarks' lab as a Place for guests: one namespace, one user."""

    def __init__(self, room: Lab) -> None:
        self.room, self.directory = room, room.folder

    def start(
        self,
        role: str,
        argv: Iterable[str | pathlib.Path],
        name: str,
        *,
        ordinary: bool = False,
        environment: dict[str, str] | None = None,
        pass_fds: tuple[int, ...] = (),
    ) -> Process:
        """Start a program; `role` and `ordinary` say nothing here."""
        words = [str(word) for word in argv]
        more = {"env": {**os.environ, **(environment or {})}, "pass_fds": pass_fds}
        popen = self.room.start(*words, log=f"{name}.log", start_new_session=True, **more)
        return Process(popen, self.directory / f"{name}.log", name)


@contextmanager
def guest_errors() -> Iterator[None]:
    """What a guest does not manage is a LabError like everything else."""
    try:
        yield
    except guests.GuestError as error:
        raise LabError(str(error)) from error


class Qemu:
    """A Debian kernel in QEMU."""

    def __init__(self, room: Lab, images: Images, accelerator: str, pairs: int) -> None:
        place = Host(room)
        self.guest = guests.QemuGuest(place, images, room.socket, pairs, accelerator=accelerator)
        with guest_errors():
            self.guest.start()
            self.address = self.guest.take_lease()["router"]

    def run(self, command: str, timeout_s: float, heard: Heard = lambda said: None) -> str:
        """Run a shell command; LabError with its output when it fails. Heard at the end only."""
        del heard
        with guest_errors():
            return self.guest.check(command, timeout_s)

    def close(self) -> None:
        """SIGTERM ends QEMU in good order."""
        self.guest.close()


def vhostmq_guest(room: Lab, pairs: int, mtu: int) -> Shell:
    """`vhostmq guest` with a shell in it."""
    words = [sys.executable, "-m", "control", "guest", "--socket", str(room.socket)]
    return Shell(room, *words, "--queues", str(pairs), "--mtu", str(mtu), "--")


def dpdk_tap(room: Lab, mtu: int) -> Shell:
    """A namespace with a tap; testpmd carries frames between it and virtio-user. The addresses are
    those back-ends give where the host has none."""
    shell = Shell(room, "unshare", "--net", address=TAP["gateway"])
    shell.run("true", BOOT_S)  # the namespace is there
    net = f"net_virtio_user0,path={room.socket},mac={guests.GUEST_MAC},queues=1"
    tap = f"net_tap0,iface=eth0,mac={TAP['mac']}"
    inside = ("nsenter", f"--net=/proc/{shell.process.pid}/ns/net")
    process = ring.testpmd(
        room, ring.FRONT_CPU, [net, tap], "--forward-mode=io", log="front.log", inside=inside
    )
    room.wait_for("front.log", "Port statistics", process)
    shell.run(
        f"ip link set lo up; ip link set eth0 up mtu {mtu}; "
        f"ip address add {TAP['guest']} dev eth0; ip route add default via {TAP['gateway']}",
        BOOT_S,
    )
    return shell


def loopback(room: Lab) -> Shell:
    """No guest at all."""
    return Shell(room, address="127.0.0.1")


def veth(room: Lab) -> Shell:
    """A namespace at the other end of a veth pair, which goes with it."""
    shell = Shell(room, "unshare", "--net", address=VETH["host"])
    shell.run("true", BOOT_S)  # the namespace is there
    for words in (
        f"link add bench0 type veth peer name eth0 netns {shell.process.pid}",
        f"address add {VETH['host']}/24 dev bench0",
        "link set bench0 up",
    ):
        subprocess.run(["ip", *words.split()], check=True)
    shell.run(f"ip address add {VETH['guest']}/24 dev eth0; ip link set eth0 up", BOOT_S)
    return shell


def pasta(room: Lab, program: str, mtu: int) -> Shell:
    """A namespace behind pasta's tap; its gateway is the host's loopback."""
    net = ("-a", "10.78.0.2", "-n", "24", "-g", "10.78.0.1", "-m", str(mtu), "-4")
    words = (program, "--config-net", "--netns-only", "--runas", "0", "--ns-ifname", "eth0")
    return Shell(room, *words, "-q", *net, "--")


def wait_for_port(port: int) -> None:
    """Wait until somebody listens on the loopback."""
    end_s = time.monotonic() + BOOT_S
    while True:
        with socket.socket() as sock:
            if not sock.connect_ex(("127.0.0.1", port)):
                return
        if time.monotonic() > end_s:
            raise LabError(f"nobody listens on port {port}")
        time.sleep(0.05)
