"""guests.py - real guests: QEMU and User-Mode Linux.

Theory      Front-ends with one face: start(), run() a shell command inside, kill(), close(). The
            kernels run `guest_init.sh`, whose agent answers one command at a time over a channel of
            its own (a virtio-serial port, a UML serial line), so commands do not depend on the
            network under test. Where they run, and as whom, is the Place's to say: the system
            tests' lab, or the benchmarks'.
Limits      Each wait has an end and says what the guest's console showed last. Commands are short
            (a line of the channel holds 4096 bytes) and run in order; start_job() is for the rest.
Why so      vectors=0: QEMU 7.2 under TCG crashes with vhost-user and MSI-X. setarch -R: a UML
            memory file of constant size.
"""

from __future__ import annotations

import abc
import base64
import signal
import socket
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from benchmarks.guest import uml
from benchmarks.guest.prepare import Images
from benchmarks.guest.process import Process

BOOT_TIMEOUT_S = 240  # a reboot of an emulated guest takes the longer the more it has done
COMMAND_BYTES_MAX = 2800  # base64 and the prefix stay below a tty's 4096
MEMORY_MIB = 512
RING_PACKED = 34  # feature bit, virtio 1.1 section 6
GUEST_MAC = "52:54:00:12:34:57"


class GuestError(Exception):
    """A guest did not boot, answer or manage what a test needs as a matter of course."""


@dataclass(frozen=True)
class Result:
    """What a command in a guest came to; output holds both streams."""

    status: int
    output: str


@dataclass(frozen=True)
class Network:
    """What a guest was given."""

    address4: str
    address6: str  # the first global address
    router: str
    router6: str
    dns: list[str]
    lease: dict[str, str]


class Place(Protocol):
    """Where front-ends run."""

    directory: Path

    def start(
        self,
        role: str,
        argv: Iterable[str | Path],
        name: str,
        *,
        ordinary: bool = False,
        environment: dict[str, str] | None = None,
        pass_fds: tuple[int, ...] = (),
    ) -> Process:
        """Start a program in the namespace `role`, perhaps as the ordinary user."""


class Guest(abc.ABC):
    """What all have in common: running commands, and getting onto the network."""

    interface = "eth0"
    scratch = "/tmp"  # where the guest's files of the moment go
    udhcpc_event = "/udhcpc_event.sh"

    def __init__(self, lab: Place, images: Images, vhost_socket: Path) -> None:
        self.lab, self.images, self.vhost_socket = lab, images, vhost_socket
        self.process: Process | None = None
        self.jobs = 0

    @abc.abstractmethod
    def run(self, command: str, timeout_s: float = 20) -> Result:
        """Run a shell command in the guest."""

    def check(self, command: str, timeout_s: float = 20) -> str:
        """Run a command that has to succeed; its output."""
        result = self.run(command, timeout_s)
        if result.status:
            raise GuestError(f"{command!r} failed ({result.status}) in guest:\n{result.output}")
        return result.output

    def start_job(self, command: str) -> int:
        """Start a command in the background; a number for wait_job()."""
        self.jobs += 1
        log = f"{self.scratch}/job.{self.jobs}"
        body = f"({command}) >{log} 2>&1; echo $? >{log}.new; mv {log}.new {log}.status"
        self.check(f"rm -f {log}.status; ({body}) </dev/null >/dev/null 2>&1 &")
        return self.jobs

    def wait_job(self, job: int, timeout_s: float = 60) -> Result:
        """Wait for a background command to end."""
        log = f"{self.scratch}/job.{job}"
        deadline_s = time.monotonic() + timeout_s
        while self.run(f"test -e {log}.status").status:
            if time.monotonic() > deadline_s:
                so_far = self.run(f"cat {log}").output
                raise GuestError(f"job {job} has not ended in {timeout_s:g} s:\n{so_far}")
            time.sleep(0.1)
        return Result(int(self.check(f"cat {log}.status")), self.check(f"cat {log}"))

    def serve_xfer(self, port: int) -> None:
        """Start `xfer serve` in the guest and wait until it listens."""
        log = f"{self.scratch}/serve.{port}"
        self.check(f"xfer serve {port} </dev/null >{log} 2>&1 &")
        ready = f"for i in $(seq 100); do grep -q ready {log} && exit; usleep 50000; done"
        self.check(f"{ready}; cat {log}; exit 1")

    def join_network(self, timeout_s: float = 20) -> Network:
        """Get a DHCPv4 lease and wait for a global IPv6 address that passed DAD."""
        name = self.interface
        lease = self.take_lease(timeout_s)
        deadline_s = time.monotonic() + timeout_s
        while not (address6 := self.global_address6()):
            if time.monotonic() > deadline_s:
                shown = self.run(f"ip -6 addr show dev {name}; ip -6 route").output
                raise GuestError(f"no global IPv6 address in {timeout_s:g} s:\n{shown}")
            time.sleep(0.1)
        route = self.check(f"ip -6 route show default dev {name}").split()
        router6 = route[route.index("via") + 1]
        dns = lease["dns"].split()
        return Network(lease["address"], address6, lease["router"], router6, dns, lease)

    def take_lease(self, timeout_s: float = 20) -> dict[str, str]:
        """Get a DHCPv4 lease; what `udhcpc_event.sh` wrote of it."""
        name = self.interface
        lease_file = f"{self.scratch}/lease"
        self.check(f"rm -f {lease_file}; ip link set {name} up")
        client = f"udhcpc -i {name} -n -q -f -t 8 -T 1 -O mtu -s {self.udhcpc_event}"
        self.check(f"LEASE_FILE={lease_file} {client}", timeout_s)
        lines = self.check(f"cat {lease_file}").splitlines()
        return dict(line.split("=", 1) for line in lines)

    def global_address6(self) -> str:
        """The first global IPv6 address that is neither tentative nor a duplicate, or ''."""
        for line in self.check(f"ip -6 addr show dev {self.interface} scope global").splitlines():
            words = line.split()
            if words[:1] == ["inet6"] and not {"tentative", "dadfailed"} & set(words):
                return words[1].split("/")[0]
        return ""

    def kill(self) -> None:
        """End the front-end as a crash does: no message to the back-end."""
        if self.process:
            self.process.stop(signal.SIGKILL)

    def close(self) -> None:
        """End the front-end in its own orderly way."""
        if self.process:
            self.process.stop(signal.SIGTERM)


class AgentGuest(Guest):
    """A guest with a kernel: commands go to the agent of `guest_init.sh`."""

    def __init__(self, lab: Place, images: Images, vhost_socket: Path) -> None:
        super().__init__(lab, images, vhost_socket)
        self.channel: socket.socket | None = None
        self.received, self.boot_id = b"", ""
        self.commands = 0

    def run(self, command: str, timeout_s: float = 20) -> Result:
        """Run a shell command; GuestError when the guest itself no longer answers."""
        script = base64.b64encode(command.encode()).decode()
        if len(command) > COMMAND_BYTES_MAX:
            raise ValueError(f"command of {len(command)} bytes")
        self.commands += 1
        self._send(f"{self.commands} {timeout_s:g} {script}\n")
        words = self._read_line(timeout_s + 10, command).split(" ")
        if words[0] != str(self.commands):
            raise GuestError(f"the agent answered {words[:2]} to command {self.commands}")
        return Result(int(words[1]), base64.b64decode(words[2]).decode(errors="replace"))

    def wait_booted(self) -> None:
        """Wait for the agent's greeting; a boot that has been greeted before does not count."""
        while True:
            words = self._read_line(BOOT_TIMEOUT_S, "boot").split(" ")
            if words[0] == "ready" and words[1] != self.boot_id:
                self.boot_id = words[1]
                return

    def kill(self) -> None:
        super().kill()
        self._drop_channel()

    def close(self) -> None:
        super().close()
        self._drop_channel()

    def _drop_channel(self) -> None:
        if self.channel:
            self.channel.close()
        self.channel, self.received = None, b""

    def _send(self, line: str) -> None:
        if self.channel is None:
            raise GuestError("the guest is not running, or stopped answering earlier")
        self.channel.settimeout(10)
        self.channel.sendall(line.encode())

    def _read_line(self, timeout_s: float, purpose: str) -> str:
        assert self.channel is not None
        deadline_s = time.monotonic() + timeout_s
        while b"\n" not in self.received:
            self.channel.settimeout(max(deadline_s - time.monotonic(), 0.001))
            try:
                data = self.channel.recv(1 << 16)
            except (TimeoutError, ConnectionError):
                data = b""
            if not data:
                self._drop_channel()  # out of step for good: later commands fail at once
                raise GuestError(f"no answer to {purpose!r}; {self._last_words()}")
            self.received += data
        line, _, self.received = self.received.partition(b"\n")
        return line.decode().rstrip("\r")

    def _last_words(self) -> str:
        assert self.process is not None
        state = "running" if self.process.running() else f"ended ({self.process.popen.returncode})"
        console = self._console()
        tail = console.read_text(errors="replace")[-3000:] if console.exists() else ""
        return f"{self.process.name} is {state}:\n{self.process.tail()}\n--- console:\n{tail}"

    def _console(self) -> Path:
        return self.lab.directory / "console.log"


class QemuGuest(AgentGuest):
    """Debian's kernel on QEMU, without KVM unless asked; `queues` pairs, as many virtual CPUs."""

    def __init__(
        self,
        lab: Place,
        images: Images,
        vhost_socket: Path,
        queues: int,
        packed: bool = False,
        accelerator: str = "tcg",
        reconnect_s: int = 0,
    ) -> None:
        super().__init__(lab, images, vhost_socket)
        self.queues, self.packed, self.accelerator = queues, packed, accelerator
        self.reconnect_s = reconnect_s  # how often it tries when the back-end is gone, 0 never

    def start(self) -> None:
        """Start QEMU as the ordinary user and wait for the agent."""
        agent = self.lab.directory / "agent.sock"
        agent.unlink(missing_ok=True)
        self.process = self.lab.start("host", self._command(agent), "qemu", ordinary=True)
        self.process.wait_for(lambda: self._connected(agent), "agent socket", 20)
        self.wait_booted()

    def reboot(self) -> None:
        """The guest restarts itself in good order; the front-end stays.

        The interface goes down first: Linux 6.1 loops for ever in virtnet_poll when a packet comes
        while device_shutdown() breaks the rings.
        """
        script = base64.b64encode(f"ip link set {self.interface} down; reboot -f".encode())
        self._send(f"0 10 {script.decode()}\n")
        self.wait_booted()

    def reset(self) -> None:
        """The reset button: QEMU resets every device under the running kernel's feet."""
        with socket.socket(socket.AF_UNIX) as monitor:
            monitor.settimeout(10)
            monitor.connect(str(self.lab.directory / "qmp.sock"))
            with monitor.makefile("rw") as lines:
                lines.readline()  # greeting
                for command in ("qmp_capabilities", "system_reset"):
                    lines.write(f'{{"execute": "{command}"}}\n')
                    lines.flush()
                    while "return" not in (answer := lines.readline()):  # events come between
                        if "error" in answer or not answer:
                            raise GuestError(f"QEMU answered {command} with {answer!r}")
        self.wait_booted()

    def _connected(self, path: Path) -> bool:
        channel = socket.socket(socket.AF_UNIX)
        try:
            channel.connect(str(path))
        except OSError:
            channel.close()
            return False
        self.channel = channel
        return True

    def _command(self, agent: Path) -> list[str]:
        kernel = (
            "console=ttyS0 quiet panic=-1 net.ifnames=0 mitigations=off tsc=reliable "
            "no_timer_check random.trust_cpu=on guest.agent=agent"
        )
        device = f"virtio-net-pci,netdev=n0,mac={GUEST_MAC},romfile=,mq=on,vectors=0"
        return [
            *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none"),
            *("-machine", f"q35,accel={self.accelerator}", "-cpu", "max"),
            *("-smp", str(max(self.queues, 2))),
            *("-m", f"{MEMORY_MIB}M", "-numa", "node,memdev=mem"),
            *("-object", f"memory-backend-memfd,id=mem,size={MEMORY_MIB}M,share=on"),
            *("-kernel", str(self.images.kernel), "-initrd", str(self.images.qemu_initramfs)),
            *("-append", kernel, "-serial", f"file:{self._console()}"),
            *("-qmp", f"unix:{self.lab.directory}/qmp.sock,server=on,wait=off"),
            *("-chardev", f"socket,id=agent,path={agent},server=on,wait=off"),
            *("-device", "virtio-serial-pci"),
            *("-device", "virtserialport,chardev=agent,name=agent"),
            *("-chardev", f"socket,id=vhost,path={self.vhost_socket},reconnect={self.reconnect_s}"),
            *("-netdev", f"vhost-user,id=n0,chardev=vhost,queues={self.queues}"),
            *("-device", device + (",packed=on" if self.packed else "")),
        ]


class UmlGuest(AgentGuest):
    """User-Mode Linux: a Linux kernel as a process, fast without KVM; one queue pair."""

    def start(self) -> None:
        """Start the kernel as the ordinary user and wait for the agent."""
        self.channel, inside = socket.socketpair()
        command = [
            *(sys.executable, uml.__file__, "setarch", "-R", "linux.uml"),
            *(f"mem={MEMORY_MIB}M", "root=/dev/ram0", "quiet"),
            *(f"initrd={self.images.uml_initramfs}", "con0=null,fd:1", "con=null", "ssl=null"),
            *(f"ssl0=fd:{inside.fileno()}", "guest.agent=/dev/ttyS0", "panic=-1"),
            *(f"uml_dir={self.lab.directory}/uml", "umid=guest"),
            f"virtio_uml.device={self.vhost_socket}:1",
        ]
        self.process = self.lab.start(
            "host",
            command,
            "uml",
            ordinary=True,
            environment={"TMPDIR": "/dev/shm"},
            pass_fds=(inside.fileno(),),
        )
        inside.close()
        self.wait_booted()
