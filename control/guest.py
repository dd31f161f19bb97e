"""guest.py - `vhostmq guest`: a guest without a VM. A network namespace behind any vhost-user
network back-end, with a command in it.

Theory      What a VMM and a guest's kernel do between them, done by this process in this order:
              1  connect, and fork the process that movers come from (dataplane/mover.py): it loads
                 the compiled code while the rest goes on
              2  negotiate (front_end.py)
              3  move into the namespaces, make the TAP (guest_namespace.py)
              4  make memory and event descriptors, start one mover per queue pair, hand the rings
                 to the back-end
              5  addresses, routes, name servers (guest_net.py)
              6  run the command; its exit status is ours
              7  end what it left behind, stop the rings, end the movers
Signals     INT, QUIT, TERM and HUP go to the command, except those the terminal sends: the command
            is in the same process group and has got them already.
Ownership   This process is the reaper of everything below it (PR_SET_CHILD_SUBREAPER): when the
            command ends, what it left in the background ends too, as when a machine is switched
            off. When this process is killed, movers and command die with it.
Limits      The command is root in a user namespace, or the caller if that is root. The guest is not
            isolated from the host's files or processes.
Errors      One line on stderr and status 1: the back-end is gone or broke a ring, no namespace, no
            TAP. 126 and 127 as in a shell: the command cannot be run, is not there.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import select
import signal
import struct
import subprocess
import sys
import time
import traceback
from contextlib import ExitStack
from typing import Protocol

from control import features, guest_namespace
from control.front_end import FrontEnd, FrontEndError, RingFds
from control.guest_namespace import NamespaceError
from control.vhost_user import VirtioFeature, feature_names
from dataplane.guest_memory import StartMover
from dataplane.process import die_with, loading
from dataplane.start import MOVER_ENTRIES
from shm.mailbox import Mailbox, MailboxError, ask

_F = VirtioFeature

QUEUE_SIZE = 256
COMPILE_S = 600.0
PATIENCE_S = 3.0
ENDING_S = 2.0
PR_SET_CHILD_SUBREAPER = 36
SFD_CLOEXEC_NONBLOCK = os.O_CLOEXEC | os.O_NONBLOCK
SIGINFO_BYTES = 128
SI_KERNEL = 0x80
FORWARDED = (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP)

_libc = ctypes.CDLL(None, use_errno=True)


class Options(Protocol):
    """What the command line says (control/options.py)."""

    socket: str
    queues: int
    mtu: int | None
    features: str
    command: list[str]


class GuestError(Exception):
    """The guest cannot go on; the text is one line for the operator."""


def tell(text: str) -> None:
    """A line for the operator."""
    print(f"vhostmq guest: {text}", file=sys.stderr, flush=True)


def main(options: Options) -> int:
    """Run the guest; the exit status."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # unwind: see _run
    try:
        with ExitStack() as stack:
            return _run(options, stack)
    except (GuestError, FrontEndError, NamespaceError) as error:
        tell(str(error))
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _run(options: Options, stack: ExitStack) -> int:
    left_out = features.offered("", 1) & ~features.offered(options.features, 1)
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    front = FrontEnd(options.socket)
    stack.callback(front.close)
    movers = Movers(front)
    stack.callback(movers.end)
    front.negotiate(options.queues, options.mtu, left_out)
    num = QUEUE_SIZE
    alarm = Alarm(front, movers)
    stack.callback(os.close, alarm.err_fd)

    from control.guest_net import GuestNet  # after the fork: pyroute2 takes half a second to load

    guest_namespace.enter()
    taps = guest_namespace.open_taps(options.queues, front.features)
    movers.wait_ready()
    _start(front, movers, taps, num, alarm.err_fd)
    stack.callback(front.stop)
    net = GuestNet(guest_namespace.DEVICE, options.mtu, tell)
    try:
        net.up()
        settings = net.configure(alarm)
    finally:
        net.close()
    try:
        guest_namespace.bind_resolv_conf(settings.resolv_conf())
    except NamespaceError as error:
        tell(f"{error}; names are resolved as on the host")
    tell(f"{guest_namespace.DEVICE} {settings}, {_terms(front.features, options.queues, num)}")
    stack.callback(_end_leftovers, movers.pid)
    return _run_command(options.command or [os.environ.get("SHELL", "/bin/sh")], alarm, movers.pid)


def _terms(features: int, queues: int, num: int) -> str:
    shown = features & ~(VirtioFeature.PROTOCOL_FEATURES | VirtioFeature.VERSION_1)
    count = f"{queues} queue pair{'s' if queues > 1 else ''} of {num}"
    return f"{count}, {feature_names(shown) or 'no offloads'}"


def _start(front: FrontEnd, movers: Movers, taps: list[int], num: int, err_fd: int) -> None:
    """Memory and rings, a mover for each pair, then the back-end."""
    rings, fds = [], list(taps)
    for _ in range(2 * len(taps)):
        kick, call = (os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(2))
        rings.append(RingFds(kick, call, err_fd))
        fds += (kick, call)
    memory_fd = os.memfd_create("vhostmq-guest", os.MFD_CLOEXEC)
    fds.append(memory_fd)
    has = front.features.__and__
    first = StartMover(
        pair=0,
        pairs=len(taps),
        num=num,
        mergeable=bool(has(_F.MRG_RXBUF)),
        indirect=bool(has(_F.INDIRECT_DESC)),
        event_idx=bool(has(_F.EVENT_IDX)),
        packed=bool(has(_F.RING_PACKED)),
        in_order=bool(has(_F.IN_ORDER)),
    )
    plan = first.plan()
    os.ftruncate(memory_fd, plan.size)
    for pair, tap in enumerate(taps):
        rx, tx = rings[2 * pair : 2 * pair + 2]
        start = dataclasses.replace(first, pair=pair)
        movers.start(start, (memory_fd, tap, rx.kick, rx.call, tx.kick, tx.call))
    front.start(plan, memory_fd, rings)
    for fd in fds:
        os.close(fd)  # the movers and the back-end have them


class Movers:
    """The process that movers are forked from. It is forked from here, at once."""

    def __init__(self, front: FrontEnd) -> None:
        parent = os.getpid()
        self.mailbox, theirs = Mailbox.pair()
        self.pid = os.fork()
        if self.pid:
            theirs.close()
            return
        status = 1
        try:
            os.setsid()  # the terminal's signals are for the command
            die_with(parent)
            front.close()
            self.mailbox.close()
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 0)
            os.dup2(null, 1)
            from shm import code

            code.want(*MOVER_ENTRIES)
            with loading():
                from dataplane import mover

            mover.server(theirs)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def wait_ready(self) -> None:
        """Until the compiled code is there."""
        if not select.select([self.mailbox], [], [], PATIENCE_S)[0]:
            tell("waiting for the packet mover; on a machine's first start it is compiled ...")
        try:
            self.mailbox.receive(COMPILE_S)
        except MailboxError as error:
            raise GuestError("the packet mover did not start") from error

    def start(self, command: StartMover, fds: tuple[int, ...]) -> None:
        """Start a mover with these descriptors (duplicates of them)."""
        try:
            ask(self.mailbox, command, fds)
        except MailboxError as error:
            for report in self.mailbox.reports:
                raise GuestError(report.values["text"]) from error
            raise GuestError("the movers have ended") from error

    def check(self) -> None:
        """Raise GuestError: nothing good comes from movers once they run."""
        try:
            report, _ = self.mailbox.receive(0)
        except MailboxError as error:
            raise GuestError("the movers have ended") from error
        raise GuestError(report.values["text"])

    def end(self) -> None:
        """End them all: the movers die with their parent and are then ours to reap."""
        self.mailbox.close()
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        _reap_all()


class Alarm:
    """What may go wrong while the guest runs (guest_net.Alarm)."""

    def __init__(self, front: FrontEnd, movers: Movers) -> None:
        self.front, self.movers = front, movers
        self.err_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def fds(self) -> list[int]:
        """Connection, movers' mailbox, error descriptor of all rings."""
        return [self.front.socket.fileno(), self.movers.mailbox.fileno(), self.err_fd]

    def check(self) -> None:
        """Raise what happened."""
        ready = select.select(self.fds(), [], [], 0)[0]
        if self.movers.mailbox.fileno() in ready:
            self.movers.check()
        if self.err_fd in ready:
            raise GuestError("the back-end says that a ring is broken")
        if ready:
            self.front.check()


# ---- the command --------------------------------------------------------------------------------


def _run_command(command: list[str], alarm: Alarm, movers_pid: int) -> int:
    """Run it to its end; the status as a shell gives it. Raises when the guest cannot go on."""
    parent, before = os.getpid(), signal.pthread_sigmask(signal.SIG_BLOCK, ())
    signal.pthread_sigmask(signal.SIG_BLOCK, (*FORWARDED, signal.SIGCHLD))

    def prepare() -> None:
        die_with(parent)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    try:
        process = subprocess.Popen(command, preexec_fn=prepare)
    except OSError as error:
        tell(f"cannot run {command[0]}: {error.strerror}")
        return 127 if isinstance(error, FileNotFoundError) else 126
    signals = _signalfd((*FORWARDED, signal.SIGCHLD))
    try:
        while process.poll() is None:
            ready = select.select([signals, *alarm.fds()], [], [])[0]
            for number in _arrived(signals) if signals in ready else ():
                process.send_signal(number)
            _reap(process.pid, movers_pid)
            if ready != [signals] and process.poll() is None:
                alarm.check()
    except Exception:
        _end_process(process)
        raise
    finally:
        os.close(signals)
    status = process.returncode
    return 128 - status if status < 0 else status


def _signalfd(signals: tuple[signal.Signals, ...]) -> int:
    """A descriptor to read blocked signals from, with their origin, which handlers are not told."""
    mask = sum(1 << (number - 1) for number in signals).to_bytes(SIGINFO_BYTES, "little")
    return int(_libc.signalfd(-1, mask, SFD_CLOEXEC_NONBLOCK))


def _arrived(fd: int) -> list[int]:
    """The signals that waited there and are for the command."""
    numbers = []
    for _ in range(len(FORWARDED) + 1):
        try:
            number, _, code = struct.unpack_from("Iii", os.read(fd, SIGINFO_BYTES))
        except BlockingIOError:
            break
        if number != signal.SIGCHLD and code != SI_KERNEL:
            numbers.append(number)
    return numbers


def _reap(*but: int) -> None:
    """Take leave of orphans that ended."""
    while True:
        found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if found is None or found.si_pid in but:
            return
        os.waitpid(found.si_pid, 0)


def _reap_all() -> None:
    """Until there is no child left; all of them have been killed."""
    try:
        while True:
            os.waitpid(-1, 0)
    except ChildProcessError:
        pass


def _end_process(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, and after ENDING_S SIGKILL."""
    process.terminate()
    try:
        process.wait(ENDING_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _end_leftovers(movers_pid: int) -> None:
    """Kill what the command left running; children of what is killed become ours and are next."""
    deadline_s = time.monotonic() + ENDING_S
    while time.monotonic() < deadline_s:
        try:
            with open(f"/proc/self/task/{os.getpid()}/children") as file:
                children = {int(word) for word in file.read().split()} - {movers_pid}
        except OSError:
            return
        if not children:
            return
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
