"""workers.py - the worker processes: started, told what to serve, started again when they die.

Theory      Control holds the whole wanted state (memory regions, rings, features, network,
            listeners) and the table of which worker serves which pair. A change is sent to the
            workers it concerns and acknowledged by each before the caller goes on: that is what
            makes "every worker has remapped before the ack" true. A worker that comes up, first or
            again, is brought to the wanted state by the same commands.
Start       The fork server takes a second to load the data plane (a minute to compile it on a fresh
            machine), so workers are started by a thread while control already answers the
            front-end. A ring whose worker is not up yet simply starts later; the driver's requests
            wait in it.
Death       A worker's keeper (dataplane/keeper.py) says when it has died; the next one is made at
            once, later and later when it dies again within RESTART_CALM_S. One that does not answer
            within ANSWER_S is killed and treated the same. The keeper has kept the sockets of its
            flows, so these go on. With a keeper that is gone (the mailbox is closed), or a worker
            that cannot start, all of it is made anew: those connections are lost. A ring it served
            stays where the driver's used index stands: the next worker goes on there, and so does a
            front-end that asks first.
Refusals    A worker that comes up and cannot map guest memory, or take a ring, costs those rings
            (`on_refused`); the others go on. One that is lost meanwhile has refused nothing: the
            next in its place is told everything again.
Ownership   Writes instance.pair_worker, instance.rx_enabled, worker.pid, worker.restarts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from typing import Any

from control.device import Region, Ring
from control.logs import Log
from control.vhost_user import VirtioFeature
from dataplane import commands, start
from shm import schema
from shm.layout import View
from shm.mailbox import DIED, Mailbox, MailboxError, PeerDied, Report, ask, wait_for_death
from shm.segment import Segment

ANSWER_S = 5.0
RESTART_CALM_S = 1.0
RESTART_DELAY_MAX_S = 5.0
LAUNCH_S = 0.3
KILL_S = 1.0  # a killed worker has ended, and its keeper has said so
PROTOCOL_NUMBER = {name: number for number, name in enumerate(schema.PROTOCOLS)}

Listeners = Callable[[int, str], Iterator[tuple[commands.ListenOn, tuple[int, ...]]]]


@dataclasses.dataclass
class Slot:
    """One worker's place: its keeper, its process and mailbox while it is up."""

    id: int
    keeper: Any = None
    kept: Mailbox | None = None  # the mailbox, while the keeper has no worker
    pidfd: int = -1
    mailbox: Mailbox | None = None
    ready: bool = False
    started_s: float = 0.0
    failures: int = 0
    listens: bool = False
    mapped: set[int] = dataclasses.field(default_factory=set)
    rings: set[int] = dataclasses.field(default_factory=set)

    def serving(self, index: int) -> bool:
        """Whether this very process has begun to serve the ring."""
        return index in self.rings


class Workers:
    """All workers of one instance."""

    def __init__(
        self,
        segment: Segment,
        pairs: int,
        count: int,
        net: Any,
        log: Log,
        cpus: tuple[int, ...] = (),
    ) -> None:
        self.segment = segment
        self.log = log
        self.net = net
        self.pairs = pairs
        self.cpus = cpus
        self.slots = [Slot(number) for number in range(count)]
        self.instance = View(schema.INSTANCE, segment.buffer, segment.offsets.instance)
        self.features = 0
        self.regions: dict[int, Region] = {}
        self.rings: dict[int, Ring] = {}
        self.listeners: Listeners = lambda worker, protocol: iter(())
        self.on_up: Callable[[Slot], None] = lambda slot: None
        self.on_down: Callable[[Slot], None] = lambda slot: None
        self.on_refused: Callable[[int, str], None] = lambda index, reason: None
        self._left: dict[int, int | None] = {}  # rings whose worker died: the used index then
        self._region_numbers = 0
        self._wakes = tuple(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in self.slots)
        self._inboxes = [socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in self.slots]
        for end in itertools.chain(*self._inboxes):
            end.setblocking(False)
        self._context = multiprocessing.get_context("forkserver")
        self._bearing = threading.Lock()
        self._context.set_forkserver_preload([start.PRELOAD])
        self._orders: queue.SimpleQueue[tuple[Slot, float] | None] = queue.SimpleQueue()
        self._born: queue.SimpleQueue[tuple[Slot, Any, Mailbox]] = queue.SimpleQueue()
        self.born_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        for pair in range(schema.PAIRS_MAX):
            schema.INSTANCE.set(
                segment.buffer, segment.offsets.instance, "pair_worker", pair % count, pair
            )

    # --- processes ------------------------------------------------------------------------------

    def start(self) -> None:
        """Start all workers in the background."""
        threading.Thread(target=self._midwife, name="start workers", daemon=True).start()
        for slot in self.slots:
            self._orders.put((slot, 0.0))

    def _midwife(self) -> None:
        """The thread that waits for the fork server."""
        os.environ["VHOSTMQ_PRELOAD"] = str(os.getpid())
        os.environ["VHOSTMQ_QUIET"] = "1" if self.log.quiet else "0"
        os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy's; nothing here multiplies matrices
        while (order := self._orders.get()) is not None:
            slot, delay_s = order
            time.sleep(delay_s)
            try:
                with self._bearing:
                    self._born.put((slot, *(self._kept(slot) or self._bear())))
            except (OSError, EOFError) as error:
                self.log.error(f"worker {slot.id} cannot be started: {error}")
                self._orders.put((slot, RESTART_DELAY_MAX_S))
            else:
                os.eventfd_write(self.born_fd, 1)

    def _kept(self, slot: Slot) -> tuple[Any, Mailbox] | None:
        """The keeper of a worker that has died, and our end of its mailbox."""
        mailbox, slot.kept = slot.kept, None
        return (slot.keeper, mailbox) if mailbox else None

    def _bear(self) -> tuple[Any, Mailbox]:
        """A new keeper and our end of its mailbox. Raises OSError, EOFError."""
        # A terminal sends Ctrl-C to every process of the group, but it is control that ends the
        # others: they inherit this. The resource tracker's start would undo it: it comes first.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        ours, theirs = Mailbox.pair()
        try:
            made = self._context.Process(target=start.main, args=(theirs,), daemon=True)
            made.start()
        except (OSError, EOFError):
            ours.close()
            raise
        finally:
            theirs.close()
        return made, ours

    def take_born(self) -> None:
        """Bring workers that have come up to the wanted state. Called when born_fd is readable."""
        os.eventfd_read(self.born_fd)
        while not self._born.empty():
            slot, made, mailbox = self._born.get()
            slot.keeper, slot.mailbox, slot.started_s = made, mailbox, time.monotonic()
            slot.mapped = set()
            number = len(self.slots)
            cpu = self.cpus[slot.id % len(self.cpus)] if self.cpus else None
            command = commands.Start(self.segment.name, slot.id, number, cpu)
            answer = self._answer(slot, command, self._wires(slot).fds())
            if isinstance(answer, commands.Failed):
                made.kill()  # nothing of it is of use
                self.lost(slot, f"cannot start: {answer.reason}")
            if not isinstance(answer, commands.Done):
                continue
            self._block(slot)["pid"] = answer.value
            with contextlib.suppress(ProcessLookupError):  # it has died since: that will be told
                slot.pidfd = os.pidfd_open(answer.value)
            slot.ready = True
            self._bring_up(slot)
            if not slot.ready:
                continue  # lost on the way: another is ordered
            self.on_up(slot)
            self.log.debug(f"worker {slot.id} is up, process {answer.value}")
            if len(self._up()) == number:
                self.log.info(f"all {number} workers are up")

    def _wires(self, slot: Slot) -> commands.Wires:
        sending = tuple(theirs.fileno() for theirs, _ in self._inboxes)
        return commands.Wires(self._wakes, sending, self._inboxes[slot.id][1].fileno())

    def _block(self, slot: Slot) -> View:
        base = self.segment.offsets.worker + slot.id * schema.WORKER.size
        return View(schema.WORKER, self.segment.buffer, base)

    def _bring_up(self, slot: Slot) -> None:
        self._tell(slot, commands.SetNet(self.net))
        self._tell(slot, commands.SetFeatures(self.features))
        no_memory = self._give_memory(slot)
        for index in list(self.rings):
            if self.owner(index) is slot and (why := no_memory or self._send_ring(index)):
                self.on_refused(index, f"worker {slot.id}: {why}")
        self._give_listeners(slot, "udp")
        self._listen_if_needed()
        self._tell(slot, commands.Revive())

    def _end(self, slot: Slot, mailbox: Mailbox) -> int | None:
        """Kill a worker; its status, which its keeper tells, or None when that is gone, too."""
        if slot.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(slot.pidfd, signal.SIGKILL)
        try:
            return wait_for_death(mailbox, KILL_S)
        except MailboxError:
            mailbox.close()
            slot.keeper.kill()
            slot.keeper.join(KILL_S)
            return None

    def lost(self, slot: Slot, how: str = "died", status: int | None = None) -> None:
        """The worker is gone (its keeper has told its `status`), or of no use: end it and order
        another."""
        if slot.mailbox is None:
            return
        calm = time.monotonic() - slot.started_s > RESTART_CALM_S
        slot.failures = 0 if calm else slot.failures + 1
        self.on_down(slot)
        mailbox, slot.mailbox, slot.ready, slot.listens = slot.mailbox, None, False, False
        if status is None:
            status = self._end(slot, mailbox)
        kept = status is not None
        slot.kept = mailbox if kept else None
        if slot.pidfd >= 0:
            os.close(slot.pidfd)
            slot.pidfd = -1
        self._left |= {index: self._used_index(self.rings[index]) for index in slot.rings}
        slot.rings = set()
        delay_s = min(0.1 * 2**slot.failures - 0.1, RESTART_DELAY_MAX_S)
        block = self._block(slot)
        block["pid"] = 0
        block["restarts"] += 1
        said = status if kept else slot.keeper.exitcode
        self.log.error(
            f"worker {slot.id} {how} (status {said}); "
            + ("another takes its place" if kept else "its connections are lost; starting it again")
            + (f" in {delay_s:.1f} s, failure {slot.failures} in a row" if delay_s else "")
        )
        self._orders.put((slot, delay_s))

    def stop(self) -> None:
        """End all workers, then the thread, and with it the fork server.

        A worker that is just being started is waited for: the fork server's child would complain if
        control were gone before it has been told what to do. While the data plane compiles there is
        no child yet.
        """
        self._orders.put(None)
        self._bearing.acquire(timeout=LAUNCH_S)
        for slot in self.slots:
            if slot.mailbox is not None:
                try:
                    slot.mailbox.send(commands.Stop())
                except MailboxError:
                    pass
        deadline_s = time.monotonic() + 2.0
        for slot in self.slots:
            if slot.kept is not None:
                slot.kept.close()
            if slot.keeper is not None:
                slot.keeper.join(max(deadline_s - time.monotonic(), 0.1))
                if slot.keeper.exitcode is None:
                    slot.keeper.kill()

    def reports(self, slot: Slot) -> list[Report]:
        """What the worker reported unasked. Called when its mailbox is readable."""
        if slot.mailbox is None:
            return []
        try:
            message, _ = slot.mailbox.receive(0)
            if isinstance(message, Report) and message.kind == DIED:
                self.lost(slot, status=message.values["status"])
                return []
            if isinstance(message, Report):
                slot.mailbox.reports.append(message)
        except MailboxError as error:
            if "gone" in str(error):
                self.lost(slot)
                return []
        taken, slot.mailbox.reports = slot.mailbox.reports, []
        return taken

    def _answer(
        self, slot: Slot, command: Any, fds: tuple[int, ...] = ()
    ) -> commands.Done | commands.Failed | None:
        """The answer to one command; None when the worker is lost."""
        if slot.mailbox is None:
            return None
        try:
            answer: commands.Done | commands.Failed = ask(slot.mailbox, command, fds, ANSWER_S)
        except PeerDied as error:
            self.lost(slot, status=error.status)
            return None
        except MailboxError as error:
            self.lost(slot, "does not answer" if "timed out" in str(error) else "died")
            return None
        return answer

    def _ask(self, slot: Slot, command: Any, fds: tuple[int, ...] = ()) -> str:
        """Why the worker refused a command, or ""."""
        answer = self._answer(slot, command, fds)
        return answer.reason if isinstance(answer, commands.Failed) else ""

    def _tell(self, slot: Slot, command: Any, fds: tuple[int, ...] = ()) -> bool:
        """One command, a refusal logged; whether it was none."""
        if refusal := self._ask(slot, command, fds):
            self.log.warning(f"worker {slot.id}: {refusal}")
        return not refusal

    # --- what they serve ------------------------------------------------------------------------

    def owner(self, index: int) -> Slot:
        """The worker that serves ring `index`."""
        return self.slots[self.instance.element("pair_worker", index // 2)]

    def _up(self) -> list[Slot]:
        return [slot for slot in self.slots if slot.ready]

    def set_features(self, features: int) -> None:
        """Tell every worker what the driver acked."""
        if features != self.features:
            self.features = features
            for slot in self._up():
                self._tell(slot, commands.SetFeatures(features))

    def set_memory(self, memory: tuple[Region, ...]) -> bool:
        """Have every worker use exactly these regions; False when one could not map them."""
        known = {region: number for number, region in self.regions.items()}
        wanted: dict[int, Region] = {}
        for region in memory:
            number = known.get(region)
            if number is None:
                self._region_numbers += 1
                number = self._region_numbers
            wanted[number] = region
        self.regions = wanted
        done = True
        for slot in self._up():
            if refusal := self._give_memory(slot):
                self.log.warning(f"worker {slot.id}: {refusal}")
                done = False
        return done

    def _give_memory(self, slot: Slot) -> str:
        """Have one worker use exactly the wanted regions; why it cannot, or ""."""
        for number, region in self.regions.items():
            if number in slot.mapped:
                continue
            command = commands.MapRegion(
                number, region.gpa, region.size, region.uva, region.mmap_offset
            )
            if refusal := self._ask(slot, command, (region.fd,)):
                return f"guest memory cannot be mapped: {refusal}"
            slot.mapped.add(number)
        refusal = self._ask(slot, commands.SetRegions(tuple(self.regions)))
        slot.mapped &= self.regions.keys()
        return refusal

    def set_ring(self, ring: Ring, features: int) -> bool:
        """Start a ring, or change one that runs."""
        self.set_features(features)
        self.rings[ring.index] = ring
        if not ring.enabled:
            self._publish_enabled()
        if refusal := self._send_ring(ring.index):
            self.log.warning(f"worker {self.owner(ring.index).id}: {refusal}")
        self._publish_enabled()
        self._listen_if_needed()
        return not refusal

    def _send_ring(self, index: int) -> str:
        """Give a ring to its worker, if that is up; why it refuses, or ""."""
        ring, slot = self.rings[index], self.owner(index)
        if not slot.ready:
            return ""  # it will be told when it is up
        if self.regions.keys() - slot.mapped and (refusal := self._give_memory(slot)):
            return refusal
        fds = [fd for fd in (ring.kick_fd, ring.call_fd, ring.err_fd) if fd is not None]
        command = commands.SetRing(
            index=index,
            num=ring.num,
            desc_uva=ring.desc_uva or 0,
            avail_uva=ring.avail_uva or 0,
            used_uva=ring.used_uva or 0,
            base=commands.RESUME if index in self._left else ring.base,
            enabled=ring.enabled,
            has_kick=ring.kick_fd is not None,
            has_call=ring.call_fd is not None,
            has_err=ring.err_fd is not None,
        )
        had = slot.serving(index)
        slot.rings.add(index)  # from here on it may have begun, even if it dies before it says so
        if refusal := self._ask(slot, command, tuple(fds)):
            if not had:
                slot.rings.discard(index)
        elif slot.serving(index):
            self._left.pop(index, None)
        return refusal

    def stop_ring(self, index: int) -> int | None:
        """Stop a ring; the available index to go on from, or None when no worker had it.

        The one its worker tells, or the used index, when that worker has died: what it took and
        never returned is to be taken again.
        """
        ring = self.rings.pop(index, None)
        if ring is None:
            return None
        slot, left = self.owner(index), self._left.pop(index, None)
        had = slot.serving(index)
        slot.rings.discard(index)
        self._publish_enabled()
        if not had:
            return left
        answer = self._answer(slot, commands.StopRing(index))
        return answer.value if isinstance(answer, commands.Done) else self._used_index(ring)

    def _used_index(self, ring: Ring) -> int | None:
        """Where the device stood in returning a ring's chains, as a base; None when nobody knows.

        A split ring's used index (virtio 1.3, 2.7.8) is read from guest memory: not mapped, since a
        front-end that shrinks the file must not end this process. Of a packed ring the worker has
        noted it.
        """
        if self.features & VirtioFeature.RING_PACKED:
            at = self.segment.offsets.queue + ring.index * schema.QUEUE.size
            cursor = View(schema.QUEUE, self.segment.buffer, at)["used_next"]
            return cursor | cursor << 16
        for region in self.regions.values():
            at = (ring.used_uva or 0) - region.uva
            if 0 <= at <= region.size - 4:
                try:
                    index = os.pread(region.fd, 2, region.mmap_offset + at + 2)
                except OSError:  # the front-end has just replaced this memory
                    return None
                return int.from_bytes(index, "little") if len(index) == 2 else None
        return None

    def _publish_enabled(self) -> None:
        """instance.rx_enabled: the pairs whose receive ring is there and enabled."""
        mask = 0
        for index, ring in self.rings.items():
            if index % 2 == 0 and ring.enabled:
                mask |= 1 << (index // 2)
        if mask != self.instance["rx_enabled"]:
            self.instance["rx_enabled"] = mask
            for slot in self._up():
                self._tell(slot, commands.Revive())

    def _listen_if_needed(self) -> None:
        """A worker whose first pair is enabled gets listeners of its own, so that the kernel
        spreads connections."""
        mask = self.instance["rx_enabled"]
        for slot in self._up():
            serves = any(
                mask >> pair & 1 and self.instance.element("pair_worker", pair) == slot.id
                for pair in range(self.pairs)
            )
            if serves and not slot.listens:
                slot.listens = True
                self._give_listeners(slot, "tcp")

    def _give_listeners(self, slot: Slot, protocol: str) -> None:
        for command, fds in self.listeners(slot.id, protocol):
            self._tell(slot, command, fds)

    def send_frames(self, pair: int, frames: tuple[bytes, ...]) -> None:
        """Frames for the guest from control."""
        slot = self.owner(2 * pair)
        if slot.ready:
            self._tell(slot, commands.SendFrames(pair, frames))
