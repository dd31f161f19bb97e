"""lab.py - the network the system tests run in: namespaces, addresses, processes, servers.

    guest ==vhost-user== back-end | host   198.51.100.2  2001:db8:1::2   (ordinary user)
                                  |  veth
                                  | far    198.51.100.1  2001:db8:1::1   (gateway)
                                           198.51.100.7  2001:db8:1::7   (peer: DNS, xfer)

Theory      Two network namespaces joined by a veth pair. The back-end, the front-ends and "programs
            of the host" live in `host`, the rest of the Internet in `far`. Nothing reaches the
            machine's own network, and two sessions do not meet: names carry the session's pid.
Ownership   Lab starts every process and ends it, by process group, in close(); namespaces and files
            go the same way. Children die with the test session (PDEATHSIG), and a new session
            removes the namespaces of dead ones.
Limits      Root only. What the tests run as the ordinary user gets no capabilities.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from benchmarks.guest.process import Process
from benchmarks.lab import LabError

HOST4, GATEWAY4, PEER4 = "198.51.100.2", "198.51.100.1", "198.51.100.7"
HOST6, GATEWAY6, PEER6 = "2001:db8:1::2", "2001:db8:1::1", "2001:db8:1::7"
DNS_NAME = "peer.system.test"
XFER_PORT = 7000  # `xfer serve` on the peer and on the host
CLONE_NEWNET = 0x40000000  # <linux/sched.h>

T = TypeVar("T")
_PREFIX = "vhostmq-st"
_LIBC = ctypes.CDLL(None, use_errno=True)


class Lab:
    """Namespaces `host` and `far`, a folder for sockets and logs, and every process started."""

    def __init__(self, user: pwd.struct_passwd) -> None:
        remove_what_the_dead_left()
        self.user = user
        self.processes: list[Process] = []
        self.namespaces: list[str] = []
        self.directory = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}-{os.getpid()}-"))
        os.chown(self.directory, user.pw_uid, user.pw_gid)
        self.directory.chmod(0o755)
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def _build(self) -> None:
        self.add_namespace("host")
        self.add_namespace("far")
        host, far = self.namespace("host"), self.namespace("far")
        _ip(f"-n {host} link add name uplink type veth peer name downlink netns {far}")
        for name, device, addresses in (
            (host, "uplink", (f"{HOST4}/24", f"{HOST6}/64")),
            (far, "downlink", (f"{GATEWAY4}/24", f"{PEER4}/24", f"{GATEWAY6}/64", f"{PEER6}/64")),
        ):
            for address in addresses:
                nodad = " nodad" if ":" in address else ""
                _ip(f"-n {name} address add {address} dev {device}{nodad}")
            _ip(f"-n {name} link set {device} up")
        _ip(f"-n {host} route add default via {GATEWAY4}")
        _ip(f"-n {host} -6 route add default via {GATEWAY6}")
        # Ordinary users may make ICMP sockets, as systemd allows on every distribution.
        self.run("host", ["sh", "-c", "echo 0 2147483647 >/proc/sys/net/ipv4/ping_group_range"])

    def add_namespace(self, role: str) -> None:
        """Make a namespace with its loopback up, and the peer as its name server."""
        name = self.namespace(role)
        _ip(f"netns add {name}")
        self.namespaces.append(name)
        _ip(f"-n {name} link set lo up")
        folder = Path("/etc/netns") / name  # `ip netns exec` puts it over /etc
        folder.mkdir(parents=True)
        (folder / "resolv.conf").write_text(f"nameserver {PEER4}\nnameserver {PEER6}\n")

    def remove_namespace(self, role: str) -> None:
        """Remove a namespace before close() does."""
        self.namespaces.remove(self.namespace(role))
        _remove_namespace(self.namespace(role))

    def namespace(self, role: str) -> str:
        """The full name of a namespace of this session."""
        return f"{_PREFIX}-{os.getpid()}-{role}"

    def command(self, role: str, argv: Iterable[str | Path], ordinary: bool = False) -> list[str]:
        """The command line that runs argv in a namespace, dying with us, perhaps unprivileged."""
        drop = ["setpriv", "--pdeathsig", "KILL"]
        if ordinary:
            ids = [f"--reuid={self.user.pw_uid}", f"--regid={self.user.pw_gid}", "--clear-groups"]
            drop += [*ids, "--inh-caps=-all", "--bounding-set=-all"]
        words = [str(word) for word in argv]
        # env: setpriv's own exec still has root's reach, and would find programs the user cannot.
        return ["ip", "netns", "exec", self.namespace(role), *drop, "--", "env", *words]

    def start(
        self,
        role: str,
        argv: Iterable[str | Path],
        name: str,
        *,
        ordinary: bool = False,
        environment: dict[str, str] | None = None,
        pass_fds: tuple[int, ...] = (),
        cwd: Path | None = None,
    ) -> Process:
        """Start a long-running program; it logs to NAME.log, and close() ends it at the latest."""
        log = self.directory / f"{name}.log"
        home = self.user.pw_dir if ordinary else "/root"
        base = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": home, "LC_ALL": "C.UTF-8"}
        with log.open("wb") as output:
            popen = subprocess.Popen(
                self.command(role, argv, ordinary),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=base | (environment or {}),
                pass_fds=pass_fds,
                cwd=cwd or self.directory,
                start_new_session=True,
            )
        process = Process(popen, log, name)
        self.processes.append(process)
        return process

    def run(
        self,
        role: str,
        argv: Iterable[str | Path],
        *,
        timeout_s: float = 30,
        check: bool = True,
        environment: dict[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end in a namespace, as root; with check, LabError if it fails."""
        command = self.command(role, argv)
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=timeout_s,
                env={**os.environ, **(environment or {})},
            )
        except subprocess.TimeoutExpired as error:
            raise LabError(f"{' '.join(command)}: no end in {timeout_s:g} s") from error
        if check and done.returncode:
            raise LabError(f"{' '.join(command)} failed:\n{done.stdout}")
        return done

    def inside(self, role: str, make: Callable[[], T]) -> T:
        """What `make` makes, in a namespace: by a thread that enters it and ends."""
        made: list[T | OSError] = []

        def enter() -> None:
            try:
                with open(f"/run/netns/{self.namespace(role)}", "rb") as file:
                    if _LIBC.setns(file.fileno(), CLONE_NEWNET):
                        raise OSError(ctypes.get_errno(), "setns")
                made.append(make())
            except OSError as error:
                made.append(error)

        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        if isinstance(made[0], OSError):
            raise made[0]
        return made[0]

    def socket(self, role: str, family: int, kind: int) -> socket.socket:
        """A socket that belongs to a namespace."""
        return self.inside(role, lambda: socket.socket(family, kind))

    def serve_xfer(self, role: str, xfer: Path) -> None:
        """TCP transfers and UDP echo on every address of a namespace: `xfer serve`."""
        server = self.start(role, [xfer, "serve", str(XFER_PORT)], f"xfer-{role}")
        server.wait_for(lambda: "ready" in server.tail(), "listening", 10)

    def close(self) -> None:
        """End every process, remove the namespaces and the folder."""
        for process in reversed(self.processes):
            process.stop(signal.SIGKILL)
        for name in self.namespaces:
            _remove_namespace(name)
        shutil.rmtree(self.directory, ignore_errors=True)


def remove_what_the_dead_left() -> None:
    """Remove namespaces and folders of sessions that were killed before close()."""
    for parent in (Path("/run/netns"), Path(tempfile.gettempdir())):
        for path in parent.glob(f"{_PREFIX}-*-*"):
            pid = path.name.removeprefix(f"{_PREFIX}-").split("-")[0]
            if Path("/proc", pid).exists():
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                _remove_namespace(path.name)


def _remove_namespace(name: str) -> None:
    subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=10)
    shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)


def _ip(arguments: str) -> None:
    command = ["ip", *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    if done.returncode:
        raise LabError(f"ip {arguments}: {done.stderr.strip()}")
