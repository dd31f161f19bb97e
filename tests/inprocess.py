"""Workers in the test's own process, breath by breath: what else is too fast to see.

`Local` is a `Driver` whose front-end is missing: instead of messages on a socket, the workers get
the commands control would send them, and `breathe` is called by the test, or by whatever waits
(`wait_calls`, `wait_sent`). So one thread decides what has happened before a breath and what has
not, and everything of `Guest` and `Tcp` works as over a socket.

A worker that raises Died has died there: another takes its place, as control would have it. It
may come later (`absence`): meanwhile all others go on, and what is asked of the one that died, its
breaths but not its commands, is in vain. It may itself die before it is complete.

Time is the machine's, but `elapse` lets it pass without waiting: every moment written down in the
flow table moves into the past, and the timers with it.
"""

from __future__ import annotations

import gc
import inspect
import itertools
import os
import resource
import select
import socket
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from ipaddress import IPv4Address, IPv6Address
from types import SimpleNamespace
from typing import Any

from compiled import Leaves
from driver import BASIC, GUEST_CSUM, Driver, Queue, drain
from guest import MAC, Guest
from vring import RingFault
from world import GATEWAY4, GATEWAY6, HOST4, HOST6, World

from control import netblock
from dataplane import commands
from dataplane.breath import breathe
from dataplane.context import LISTENER, SPARES
from dataplane.slow.net import Net
from dataplane.worker import Worker
from shm import libc, mem, schema
from shm.layout import View
from shm.segment import Segment

NET = Net(
    addr4=IPv4Address(HOST4),
    prefix4=24,
    gateway4=IPv4Address(GATEWAY4),
    our_addr4=IPv4Address(GATEWAY4),
    addr6=IPv6Address(HOST6),
    gateway6=IPv6Address(GATEWAY6),
    map_host_loopback4=IPv4Address(GATEWAY4),
    map_host_loopback6=IPv6Address(GATEWAY6),
)
OPTIONS = SimpleNamespace(no_tcp=False, no_udp=False, no_icmp=False)
PROTOCOL = {name: number for number, name in enumerate(schema.PROTOCOLS)}
# All that a worker calls in its breaths, by name; the clock, which changes nothing, is left out.
SYSTEM_CALLS = [
    name
    for name, call in inspect.getmembers(libc, inspect.isfunction)
    if call.__module__ == libc.__name__ and name[0] != "_"
    if name not in ("clock_gettime", "exit_now")
]
_names = itertools.count()
EXPIRY = Leaves("flows.expiry")


class Died(Exception):
    """Raised by a test where a worker is to die."""


class Mortal(Worker):
    """A worker that is in its place before it is complete: it may die in the making."""

    def __init__(self, local: Local, number: int) -> None:
        local.workers[number] = self
        super().__init__(local.segment, number, len(local.wakes), local.wires(number))


class _NoChannel:
    """What a `Driver` without a front-end socket closes."""

    def close(self) -> None:
        pass


class Local(Driver):
    """`workers` workers in this process serve the driver's pairs in turn: pair p by worker p mod
    `workers`. They live in `world`.
    """

    def __init__(
        self, world: World, *, workers: int = 1, features: int = BASIC | GUEST_CSUM, **options: Any
    ) -> None:
        super().__init__("", channel=_NoChannel(), features=features, **options)  # type: ignore
        self.world = world
        self.features = features
        self.segment = Segment(f"/vhostmq-{os.getpid()}-{next(_names)}", workers, create=True)
        self.segment.unlink()
        self.block = View(schema.INSTANCE, self.segment.buffer, self.segment.offsets.instance)
        self.net = View(schema.NET, self.segment.buffer, self.segment.offsets.net)
        self.block["pairs"] = self.pairs
        for number in range(2):
            self.block.set_element("secret", number, int.from_bytes(os.urandom(7), "little"))
        for pair in range(self.pairs):
            self.block.set_element("pair_worker", pair, pair % workers)
        world.run(netblock.fill, self.segment, NET, OPTIONS)
        self.wakes = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(workers)]
        self.inboxes = [socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in self.wakes]
        for end in itertools.chain(*self.inboxes):
            end.setblocking(False)
        self.listens: list[tuple[commands.ListenOn, int]] = []
        self.sockets: Collection[int] = ()  # those that workers have opened and not closed
        self.absence: Callable[[], int] = lambda: 0  # how many breaths one that dies will miss
        self.absent: dict[int, int] = {}  # workers that have died: how many they still miss
        self.workers = [Worker(self.segment, i, workers, self.wires(i)) for i in range(workers)]

    # --- what control would do ---

    def wires(self, worker: int) -> commands.Wires:
        sending = tuple(theirs.fileno() for theirs, _ in self.inboxes)
        return commands.Wires(tuple(self.wakes), sending, self.inboxes[worker][1].fileno())

    def order(self, worker: int, command: object, fds: Sequence[int] = ()) -> int:
        """Have a worker carry out a command, with descriptors of its own; the answer's value. One
        that has died has its successor do so."""
        if worker in self.absent:
            self.succeed(worker)
        try:
            done = self.workers[worker].carry_out(command, [os.dup(fd) for fd in fds])
        except Died:
            self.succeed(worker)
            if isinstance(command, commands.ListenOn):
                return 0  # its successor was given it
            if isinstance(command, commands.StopRing):
                return commands.RESUME  # the used index says where it stood
            return self.order(worker, command, fds)
        assert isinstance(done, commands.Done), done
        assert not self.workers[worker].context.view["wakes"], "whom it gave frames may sleep on"
        return done.value

    def start(self, base: int | None = None) -> Local:
        for queue in self.queues:
            queue.ring.reset(base)
            self.agree(queue)
            queue.ring.want_calls(queue.index % 2 == 0)
            if queue.index % 2 == 0:
                self.fill(queue.index // 2, kick=False)
        for worker in range(len(self.workers)):
            self._bring_up(worker)
        for queue in self.queues:
            self.start_ring(queue)
        self.enable_pairs(range(self.enabled))
        return self

    def _bring_up(self, worker: int) -> None:
        self.order(worker, commands.SetFeatures(self.features))
        regions = self.memory.regions
        for number, one in enumerate(regions):
            region = commands.MapRegion(number, one.gpa, one.size, one.user, one.offset)
            self.order(worker, region, [one.fd])
        self.order(worker, commands.SetRegions(tuple(range(len(regions)))))
        self.order(worker, commands.SetNet(NET))

    def succeed(self, worker: int) -> None:
        """A worker has died: another takes its place, finds its sockets and goes on."""
        rings = list(self.workers[worker].rings)
        while not self._replaced(worker):
            pass
        self._bring_up(worker)
        for index in rings:
            self.start_ring(self.queues[index], commands.RESUME)
        for listen, fd in self.listens if worker == 0 else ():
            self.order(0, listen, [fd])
        self.order(worker, commands.Revive())

    def _replaced(self, worker: int) -> bool:
        """Whether the one in its place has lived until commands come to it."""
        self.absent.pop(worker, None)
        self.view_of(worker)["restarts"] += 1
        self._bury(self.workers[worker])
        try:
            made = Mortal(self, worker)
            breathe(made.context.address, 0, 1)  # commands come in a breath
        except Died:
            return False
        return True

    def _kept(self) -> set[int]:
        """The sockets that somebody knows: as those of a flow, or as what a worker was giving away
        when it died."""
        known = {flow["fd"] for flow in self.flows() if not flow["heir"]}
        blocks = map(self.view_of, range(len(self.workers)))
        return known | {block["parting_fd"] for block in blocks if block["parting"]}

    def _bury(self, worker: Worker) -> None:
        """What a worker had but for its flows' sockets."""
        for index in worker.rings:
            ring = worker.context.ring(index)
            for name in ("kick_fd", "call_fd", "err_fd"):
                os.close(ring[name])
        for number in range(worker.context.view["listener_count"]):
            listeners = worker.context.scratch("listeners")
            os.close(View(LISTENER, listeners, number * LISTENER.size)["fd"])
        spares = {fd for one in self.workers for fd in spare_sockets(one)}
        for fd in set(self.sockets) - self._kept() - spares:
            os.close(fd)
        self._unmap(worker)
        worker.context.close()

    def _unmap(self, worker: Worker) -> None:
        for fd in spare_sockets(worker):
            os.close(fd)
        for mapping in worker.mappings.values():
            mem.unwatch(mapping.host)
            mapping.area.close()
        worker.epoll.close()

    def start_ring(self, queue: Queue, base: int | None = None) -> None:
        ring, place = queue.ring, self.memory.user
        command = commands.SetRing(
            index=queue.index, num=ring.num, desc_uva=place(ring.desc), avail_uva=place(ring.avail),
            used_uva=place(ring.used), base=ring.base if base is None else base, enabled=True,
            has_kick=True, has_call=True, has_err=True,
        )  # fmt: skip
        fds = (queue.kick, queue.call, queue.err)
        self.order(self.owner(queue.index // 2), command, fds)

    def stop_ring(self, index: int) -> int:
        return self.order(self.owner(index // 2), commands.StopRing(index))

    def enable_pairs(self, pairs: Sequence[int]) -> None:
        """Frames may go to the receive queues of these pairs."""
        self.block["rx_enabled"] = sum(1 << pair for pair in pairs)
        for worker in range(len(self.workers)):
            self.order(worker, commands.Revive())

    def assign(self, pair: int, worker: int) -> None:
        """Another worker serves the pair from now on, as control would have it."""
        enabled, queues = self.block["rx_enabled"], self.queues[2 * pair : 2 * pair + 2]
        self.enable_pairs([one for one in range(self.pairs) if enabled >> one & 1 and one != pair])
        self.settle()
        bases = [self.stop_ring(queue.index) for queue in queues]
        self.block.set_element("pair_worker", pair, worker)
        for queue, base in zip(queues, bases, strict=True):
            self.start_ring(queue, base)
        self.enable_pairs([one for one in range(self.pairs) if enabled >> one & 1])

    def forward(self, listener: socket.socket, guest_port: int, protocol: str = "tcp") -> None:
        """What comes to `listener` is for this port of the guest. It stays open for successors, as
        long as this does."""
        entry = (PROTOCOL[protocol], listener.getsockname()[1], guest_port, bytes(16))
        kept = os.dup(listener.fileno())
        self.listens.append((commands.ListenOn((entry,)), kept))
        self.order(0, commands.ListenOn((entry,)), [kept])

    def close(self) -> None:
        for flow in self.flows():
            if flow["fd"] >= 0 and not flow["heir"]:
                os.close(flow["fd"])
        for worker in self.workers:
            for index in list(worker.rings):
                worker.carry_out(commands.StopRing(index), [])
            self._unmap(worker)
        for worker in self.workers:
            worker.context.close()
        for fd in (*self.wakes, *(kept for _, kept in self.listens)):
            os.close(fd)
        for end in itertools.chain(*self.inboxes):
            end.close()
        super().close()

    def keep_home(self) -> None:
        """The flows there are have only just moved: for a minute they stay, and frames cross."""
        for flow in self.flows():
            flow["moved_ms"] = (time.monotonic_ns() // 1_000_000 - 1 | 1) & 0xFFFFFFFF
            flow["stay_ms"] = 0xFFFF
            flow["moved_bytes"] = (flow["tx_bytes"] + flow["rx_bytes"] + (1 << 31)) & 0xFFFFFFFF

    # --- looking inside ---

    def owner(self, pair: int) -> int:
        """The worker that serves a pair."""
        return self.block.element("pair_worker", pair)

    def flows(self) -> Iterator[View]:
        """The entries in use."""
        for index in self.flow_indexes():
            yield self.flow(index)

    def flow_indexes(self) -> list[int]:
        at = self.segment.offsets.tags
        tags = memoryview(self.segment.buffer)[at : at + 4 * schema.FLOWS_MAX].cast("I")
        taken = bytes(self.segment.buffer[at : at + 4 * schema.FLOWS_MAX]).strip(b"\0")
        if not taken:
            return []
        return [index for index, tag in enumerate(tags) if tag and self.flow(index)["state"]]

    def flow(self, index: int) -> View:
        base = self.segment.offsets.flow + index * schema.FLOW.size
        return View(schema.FLOW, self.segment.buffer, base)

    def view_of(self, worker: int) -> View:
        """A worker's block."""
        base = self.segment.offsets.worker + worker * schema.WORKER.size
        return View(schema.WORKER, self.segment.buffer, base)

    def counter(self, name: str, worker: int = 0) -> int:
        """A word of a worker's block."""
        return int(self.view_of(worker)[name])

    def flow_count(self) -> int:
        """The gauges of all workers together: flows by protocol and state."""
        base, size = self.segment.offsets.worker, schema.WORKER.size
        gauges = range(schema.WORKER.fields["flows"].count)
        return sum(
            View(schema.WORKER, self.segment.buffer, base + worker * size).element("flows", gauge)
            for worker in range(len(self.workers))
            for gauge in gauges
        )

    def flow_address(self, index: int) -> int:
        """An entry as compiled code names it."""
        return self.segment.address + self.flow(index).base

    def queue_counter(self, ring: int, name: str) -> int:
        """A word of a ring's counters."""
        return self._counters(ring)[name]

    def drops(self, reason: str, ring: int) -> int:
        """Frames dropped for this reason."""
        return self._counters(ring).element("drops", schema.DROP[reason])

    def _counters(self, ring: int) -> View:
        at = self.segment.offsets.queue + ring * schema.QUEUE.size
        return View(schema.QUEUE, self.segment.buffer, at)

    # --- breathing ---

    def breathe(self, worker: int = 0, patience_ms: int = 0) -> int:
        """One breath of one worker, and what it leaves to plain Python; what that was."""
        return self.world.run(self._breathe, worker, patience_ms)

    def _breathe(self, worker: int, patience_ms: int) -> int:
        one = self.workers[worker]
        if worker in self.absent:
            self._miss_a_breath(worker)
            return 0
        try:
            attend = int(breathe(one.context.address, patience_ms, 1))
            one.attend(attend)
        except Died:
            self.absent[worker] = self.absence() + 1
            self._miss_a_breath(worker)
            return 0
        assert not one.context.view["wakes"], "somebody sleeps on who was given frames"
        return attend

    def _miss_a_breath(self, worker: int) -> None:
        """One that has died does nothing, and in the end another has its place."""
        self.absent[worker] -= 1
        if self.absent[worker] == 0:
            self.succeed(worker)

    def busy(self, worker: int = 0) -> bool:
        """Whether the worker would not sleep now, or is missed."""
        return worker in self.absent or bool(self.workers[worker].context.view["busy"])

    def busy_any(self) -> bool:
        """Whether any of them would not sleep."""
        return any(map(self.busy, range(len(self.workers))))

    def settle(self, breaths: int = 200) -> None:
        """All workers breathe, in turn, until none has work left."""
        for _ in range(breaths):
            for worker in range(len(self.workers)):
                self.breathe(worker)
            if not any(map(self.busy, range(len(self.workers)))) and not self._stirred():
                return
        raise AssertionError(f"still busy after {breaths} breaths")

    def _stirred(self) -> bool:
        fds = [worker.epoll.fileno() for worker in self.workers]
        return bool(select.select(fds, [], [], 0)[0]) or self._crossing()

    def _crossing(self, ways: Sequence[int] = (0,)) -> bool:
        """Whether frames are between two workers, of whom none sleeps here: those for the host (0),
        for the guest (1)."""
        for number in range(len(self.workers) ** 2):
            for way in ways:
                at = self.segment.offsets.handoff + (2 * number + way) * schema.HANDOFF_STRIDE
                ring = View(schema.HANDOFF, self.segment.buffer, at)
                if ring["head"] != ring["tail"]:
                    return True
        return False

    def breaths_in(self, seconds: float, worker: int = 0) -> int:
        """How many breaths a worker left to itself takes in this time."""
        end, count = time.monotonic() + seconds, 0
        while (left := end - time.monotonic()) > 0:
            self.breathe(worker, int(1000 * left) + 1)
            count += 1
        return count

    # --- what waits in `Driver` and `Guest` ---

    def reap_tx(self, pair: int) -> list[int]:
        if not self.tx(pair).ring.free:
            self.breathe(self.owner(pair))
        return super().reap_tx(pair)

    def wait_sent(self, pair: int, timeout: float = 5.0) -> list[int]:
        self.publish(self.tx(pair))
        self.settle()
        return super().wait_sent(pair, timeout)

    def wait_calls(
        self, queues: Sequence[Queue], timeout: float, extra: Sequence[Any] = ()
    ) -> None:
        deadline = time.monotonic() + timeout
        for queue in queues:
            queue.ring.want_calls(True)
        if any(queue.ring.pending() for queue in queues):
            return
        while True:
            for worker in range(len(self.workers)):
                self.breathe(worker)
            epolls = [worker.epoll.fileno() for worker in self.workers]
            for queue in queues:
                calls = drain(queue.call)
                queue.calls += calls
                if queue.ring.pending() and not calls:
                    raise RingFault(f"ring {queue.index} has used buffers, but no call came")
            if any(queue.ring.pending() for queue in queues):
                return
            left = max(0.0, deadline - time.monotonic())
            idle = not any(map(self.busy, range(len(self.workers))))
            ready = select.select([*epolls, *extra], [], [], min(left, 0.01) if idle else 0)[0]
            if not left or any(one in ready for one in extra):
                return

    # --- time ---

    def elapse(
        self, seconds: float, between: Callable[[], Any] | None = None, *, steps: int = 200
    ) -> None:
        """Let time pass, timer by timer; `between` runs after each and must leave nothing to do."""
        left_ms = int(seconds * 1000)
        for _ in range(steps):
            now_ms = time.monotonic_ns() // 1_000_000
            due = [flow["deadline_ms"] - now_ms for flow in self.flows() if flow["deadline_ms"]]
            step_ms = max(0, min([left_ms, *due]))
            self._shift(step_ms)
            left_ms -= step_ms
            time.sleep(0.025)  # the wheel turns in steps of 8 ms
            self.settle()
            if between:
                between()
            if left_ms == 0:
                return
        raise AssertionError(f"{left_ms} ms left after {steps} timers")

    def _shift(self, step_ms: int) -> None:
        """Every flow's moments lie this much further in the past."""
        for index in self.flow_indexes():
            flow = self.flow(index)
            for name in ("last_guest_ms", "last_far_ms"):
                flow[name] = (flow[name] - step_ms) % (1 << 32)
            if flow["deadline_ms"]:
                flow["deadline_ms"] -= step_ms
                wheel = self.workers[flow["home"]].context.view["wheel"]
                EXPIRY.arm(wheel, index, flow["deadline_ms"])


def local_guest(world: World, **options: Any) -> Guest:
    """A guest on workers in this process, whose address the workers know."""
    guest = Guest(Local(world, **options).start())
    guest.resolve()
    assert guest.gw_mac != MAC
    return guest


@contextmanager
def local_guests(world: World) -> Iterator[Callable[..., Guest]]:
    """Makes such guests; in the end they and their peers are closed."""
    made: list[Guest] = []

    def make(**options: Any) -> Guest:
        made.append(local_guest(world, **options))
        return made[-1]

    yield make
    for guest in made:
        guest.drv.close()
        for peer in guest.peers:
            peer.close()


@contextmanager
def no_leftovers() -> Iterator[None]:
    """Closes what workers that died meanwhile have left open, as their successors would."""

    def descriptors() -> set[int]:
        gc.collect()  # what Python would close later
        return {int(name) for name in os.listdir("/proc/self/fd")}

    before = descriptors()
    try:
        yield
    finally:
        for fd in descriptors() - before:
            with suppress(OSError):  # the listing's own
                os.close(fd)


def spare_sockets(worker: Worker) -> list[int]:
    """The descriptors a worker keeps ready for connections to come."""
    area, found = worker.context.scratch("spares"), []
    for family in range(2):
        view = View(SPARES, area, family * SPARES.size)
        found += [view.element("fds", number) for number in range(view["count"])]
    return found


@contextmanager
def no_descriptors(world: World) -> Iterator[None]:
    """Meanwhile this process gets no new descriptor."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
