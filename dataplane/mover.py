"""mover.py - the processes that move frames of a guest without a VM: plain Python around one
compiled loop (move.py), one process per queue pair.

Theory      Control forks a server() before it has anything else to do. The server links the
            compiled code (or it is the machine's first compilation), says so, and then forks a
            mover for each StartMover it gets, with the code already in place. A mover maps the
            memory file, writes its descriptors and steps for ever.
Ending      A process dies with its parent (PDEATHSIG), and the server when its mailbox ends: no
            mover outlives the guest. A mover that finds its ring broken ends with that as its
            status; the server reports it.
Limits      One TAP queue per pair; no ring is restarted.
Ownership   Descriptors of a StartMover become the mover's. A pair's rings have no other driver.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import select
import traceback
from dataclasses import dataclass

from dataplane.commands import Done
from dataplane.context import IOV_BYTES, Arena
from dataplane.driver_ring import DRIVER_RING
from dataplane.guest_memory import DESC_BYTES, HEADER_BYTES, TABLE_BYTES, RingPlace, StartMover
from dataplane.move import (
    BROKEN_RX,
    BROKEN_TX,
    EVENT_BYTES,
    EVENT_CALL,
    EVENT_TAP,
    EVENTS_MAX,
    MOVER,
    move,
)
from dataplane.process import die_with
from shm import jit, mem
from shm.layout import View
from shm.mailbox import Mailbox, MailboxError, Report

STEPS_MAX = 1000  # between two looks of Python at its own affairs: a signal, say


@dataclass(frozen=True)
class Descriptors:
    """A mover's descriptors, in the order in which they come with StartMover."""

    memory: int
    tap: int
    rx_kick: int
    rx_call: int
    tx_kick: int
    tx_call: int


class Mover:
    """One mover's state outside compiled code."""

    def __init__(self, command: StartMover, fds: Descriptors) -> None:
        self.arena = Arena()
        self.fds = fds
        plan = command.plan()
        self.memory = mmap.mmap(fds.memory, plan.size)
        self.host = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        mem.watch(self.host, plan.size, "guest memory")
        rx, tx = plan.pairs[command.pair]
        self.rx = self._ring(rx, command, True, fds.rx_kick)
        self.tx = self._ring(tx, command, False, fds.tx_kick)
        stack = self.arena.buffer(self.tx["free"])
        for k in range(tx.num):  # the stack's top is buffer 0
            stack[2 * k : 2 * k + 2] = (tx.num - 1 - k).to_bytes(2, "little")
        self.tx["free_count"] = tx.num
        self.address = self._mover(command, rx.num)
        self.epoll = select.epoll()
        self.view["epfd"] = self.epoll.fileno()
        self._watch(fds.tap, EVENT_TAP)
        self._watch(fds.rx_call, EVENT_CALL)
        self._watch(fds.tx_call, EVENT_CALL)

    def _ring(self, place: RingPlace, command: StartMover, writable: bool, kick_fd: int) -> View:
        address = self.arena.take(DRIVER_RING.size, "driver ring")
        view = View(DRIVER_RING, self.arena.buffer(address), 0)
        view["num"] = place.num
        for term in ("packed", "in_order", "event_idx"):
            view[term] = int(getattr(command, term))
        for area in ("desc", "avail", "used", "buffers"):
            view[area] = self.host + getattr(place, area)
        view["stride"] = place.stride
        view["made"] = self._make_descriptors(place, command, writable)
        if place.tables:
            view["lengths"] = self.host + place.tables + DESC_BYTES + 8
            view["length_stride"], view["length_skip"] = TABLE_BYTES, HEADER_BYTES
        else:
            view["lengths"], view["length_stride"] = view["made"] + 8, DESC_BYTES
        for name, width in (("free", 2), ("owned", 1), ("order", 2), ("offered", 2)):
            view[name] = self.arena.take(width * place.num, f"{name} buffers")
        view["kick_fd"] = kick_fd
        return view

    def _make_descriptors(self, place: RingPlace, command: StartMover, writable: bool) -> int:
        """Write what the device finds for each buffer. Descriptors made for buffers are the ring's
        own, or, where its places are filled with them in turn, private; their address."""
        place.write_tables(self.memory, command.packed)
        made = place.descriptors(writable, command.packed)
        if not (command.packed or command.in_order):
            self.memory[place.desc : place.desc + len(made)] = made
            return self.host + place.desc
        address = self.arena.take(len(made), "descriptors")
        self.arena.buffer(address)[: len(made)] = made
        return address

    def _mover(self, command: StartMover, num: int) -> int:
        address = self.arena.take(MOVER.size, "mover")
        self.view = View(MOVER, self.arena.buffer(address), 0)
        self.view["tap_fd"] = self.fds.tap
        self.view["rx"], self.view["tx"] = (
            ctypes.addressof(ctypes.c_char.from_buffer(view.buffer)) for view in (self.rx, self.tx)
        )
        for name, size in (
            ("events", EVENT_BYTES * EVENTS_MAX),
            ("iov", IOV_BYTES * num),
            ("numbers", 2 * num),
            ("word", 8),
        ):
            self.view[name] = self.arena.take(size, name)
        self.view["mergeable"] = int(command.mergeable)
        return address

    def _watch(self, fd: int, what: int) -> None:
        """Register a descriptor, edge-triggered: a call is never read, its edge is enough."""
        events = (select.EPOLLIN | select.EPOLLET) & 0xFFFFFFFF
        event = events.to_bytes(4, "little") + what.to_bytes(8, "little")
        if ctypes.CDLL(None, use_errno=True).epoll_ctl(self.epoll.fileno(), 1, fd, event) < 0:
            raise OSError(ctypes.get_errno(), "epoll_ctl")

    def step(self, patience_ms: int, most: int = 1) -> int:
        """move.move() with this mover."""
        return int(move(self.address, patience_ms, most))

    def close(self) -> None:
        """Give the memory back; the descriptors stay the caller's."""
        self.epoll.close()
        self.arena.close()
        mem.unwatch(self.host)


def run(command: StartMover, fds: Descriptors) -> int:
    """The mover process: steps until a ring is broken; which one."""
    mover = Mover(command, fds)
    while True:
        broken = mover.step(-1, STEPS_MAX)
        if broken:
            return broken


# ---- the server ---------------------------------------------------------------------------------


def server(mailbox: Mailbox) -> None:
    """The process movers are forked from; returns when the parent is gone or a mover has ended."""
    _warm()
    mailbox.send(Report("ready"))
    poll = select.poll()
    poll.register(mailbox.fileno(), select.POLLIN)
    movers: dict[int, tuple[int, int]] = {}
    while True:
        for ready, _ in poll.poll():
            if ready in movers:
                pid, pair = movers[ready]
                mailbox.send(_ending(pair, os.waitpid(pid, 0)[1]))
                return
            try:
                command, fds = mailbox.receive(0)
            except MailboxError:
                return
            pid = _fork(command, fds)
            pidfd = os.pidfd_open(pid)
            movers[pidfd] = pid, command.pair
            poll.register(pidfd, select.POLLIN)
            for fd in fds:
                os.close(fd)
            mailbox.send(Done())


def _warm() -> None:
    """Compile or link move(); of guests that start together on a fresh machine, one compiles."""
    if jit.CACHE_DIR is None or not jit.COMPILER:
        return
    with open(jit.CACHE_DIR / "mover.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        jit.warm()


def _fork(command: StartMover, fds: list[int]) -> int:
    """A mover process; its process id."""
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        die_with(parent)
        status = run(command, Descriptors(*fds))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _ending(pair: int, status: int) -> Report:
    code = os.waitstatus_to_exitcode(status)
    why = {
        BROKEN_RX: "the back-end broke the receive ring",
        BROKEN_TX: "the back-end broke the transmit ring",
    }.get(code, f"the mover process ended with status {code}")
    return Report("ended", text=f"queue pair {pair}: {why}")
