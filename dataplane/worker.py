"""worker.py - the process that serves some queue pairs: plain Python around one compiled loop.

Theory      main() is called in a child of the keeper (keeper.py), a copy of the fork server, which
            has imported and warmed the compiled code. The loop is three lines: breathe until plain
            Python is needed, and attend to what compiled code could not do itself: commands from
            control, slow-path frames, error queues of sockets. All of that is bounded per breath by
            compiled code.
Memory      Regions are mapped under numbers (MapRegion) and switched all at once (SetRegions)
            between breaths: no packet ever sees half a table. Ring addresses are found anew after
            every switch.
Limits      schema.MEMORY_SLOTS_MAX regions; commands one at a time.
Succession  A worker that died has left its descriptors. The one in its place keeps the sockets of
            its flows and takes these over (inherit.py), closes all others, and is brought up by
            control like any new one.
Ownership   A command's descriptors are closed once it is carried out or refused; what keeps one
            takes it off the list. The mailbox's end ends the worker: control has closed it, or
            has died and its guard, too (control/guard.py).
Drops       slow_ignored: a slow-path frame that needs no answer.
Errors      A command that cannot be carried out is answered with Failed and changes nothing, but a
            ring that is not in guest memory (any more) stops. An exception is a bug of ours: the
            process dies and control starts another.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import mmap
import os
import select
import time

from dataplane import commands, sigbus, slow, virtq_packed
from dataplane.breath import breathe, inject, revive, ring_stopped, succeed
from dataplane.context import (
    ATTEND_AWAKE,
    ATTEND_BROKEN,
    ATTEND_ERRORS,
    ATTEND_MAILBOX,
    ATTEND_SLOW,
    EVENT_INBOX,
    EVENT_KICK,
    EVENT_LISTENER,
    EVENT_MAILBOX,
    EVENT_WAKE,
    LISTENER,
    LISTENERS_MAX,
    REGION,
    SLOW_BYTES,
    VNET_BYTES,
    Context,
)
from dataplane.keeper import descriptors
from dataplane.slow import datagrams, errors
from dataplane.slow.net import Net
from flows import expiry, sighting, table
from shm import mem, schema
from shm.layout import View
from shm.mailbox import AWAKE, Mailbox, MailboxError, Report
from shm.segment import Segment, SegmentError

VIRTIO_NET_F = {
    "csum": 0,
    "guest_uso4": 54,
    "guest_uso6": 55,
    "host_uso": 56,
    "guest_csum": 1,
    "guest_tso4": 7,
    "guest_tso6": 8,
    "host_tso4": 11,
    "host_tso6": 12,
    "host_ecn": 13,
    "mergeable": 15,
}
NO_FD = -1
BREATHS_MAX = 1000  # between two looks of Python at its own affairs
MAP_NORESERVE = 0x4000  # Linux; Python names it since 3.13
VIRTIO_F_EVENT_IDX, VIRTIO_F_RING_PACKED, VIRTIO_F_IN_ORDER = 29, 34, 35


class Refused(Exception):
    """A command that cannot be carried out."""


def expect(fds: list[int], count: int) -> None:
    """The kernel cuts descriptors off that this process may not have (unix(7), MSG_CTRUNC)."""
    if len(fds) != count:
        raise Refused(f"{len(fds)} of {count} descriptors came over: raise RLIMIT_NOFILE")


@dataclasses.dataclass
class Mapping:
    """A mapped memory region."""

    gpa: int
    size: int
    uva: int
    area: mmap.mmap
    host: int


class Worker:
    """One worker's state outside compiled code."""

    def __init__(
        self, segment: Segment, worker_id: int, workers: int, wires: commands.Wires
    ) -> None:
        self.context = Context(segment, worker_id, workers)
        self.segment = segment
        self.id = worker_id
        self.net: Net | None = None
        self.mappings: dict[int, Mapping] = {}
        self.active: tuple[int, ...] = ()
        self.rings: dict[int, commands.SetRing] = {}
        self.listens: dict[int, int] = {}  # the place in the list of forwarded ports, by protocol
        self.stopping = False
        self.mailbox: Mailbox | None = None
        view = self.context.view
        self.epoll = select.epoll()
        view["epfd"] = self.epoll.fileno()
        view["wake_fd"], view["inbox_fd"] = wires.wakes[worker_id], wires.inbox
        for name, fds in (("wake_fds", wires.wakes), ("inboxes", wires.inboxes)):
            area = self.context.scratch(name)
            for number, fd in enumerate(fds):
                area[8 * number : 8 * number + 8] = fd.to_bytes(8, "little")
        self._make_table()
        self._make_wheel()
        self._take_place_of_dead(wires)
        self._watch(wires.wakes[worker_id], EVENT_WAKE, 0)
        self._watch(wires.inbox, EVENT_INBOX, 0)

    def _take_place_of_dead(self, wires: commands.Wires) -> None:
        """A process before this one may have died as the same worker. What it left in the table is
        taken over or cleared. Others may sleep whom it gave frames, or wait for room that it had
        made, and did not come to wake."""
        block = block_of(self.segment, self.id)
        if block["restarts"]:
            self._succeed(block)
            for wake in wires.wakes:
                os.eventfd_write(wake, 1)
        block["keeper"] = os.getppid()

    def _succeed(self, block: View) -> None:
        buffer, offsets = self.segment.buffer, self.segment.offsets
        table.forget_claims(buffer, offsets, self.id)
        sighting.forget_half(buffer, offsets, self.id)
        for gauge in range(schema.WORKER.fields["flows"].count):
            block.set_element("flows", gauge, 0)
        inherits = block["keeper"] == os.getppid()
        if not inherits:
            table.lose_descriptors(buffer, offsets, self.id)
        if block["parting"]:
            self._look_at_parting(block, inherits)
        succeed(self.context.address)

    def _look_at_parting(self, block: View, inherits: bool) -> None:
        """The flow that was being given to another worker. If it has no heir (yet, or any more),
        there is nothing to finish: the socket is the flow's, or nobody's."""
        buffer, offsets = self.segment.buffer, self.segment.offsets
        if not inherits:
            block["parting_fd"] = NO_FD
        if table.entry_at(buffer, offsets, block["parting"] - 1)["heir"]:
            return  # rehome.part
        fd = block["parting_fd"]
        block["parting"] = 0  # first: then the number may be another socket's
        if fd != NO_FD and fd not in table.descriptors(buffer, offsets, self.id):
            os.close(fd)

    def _make_table(self) -> None:
        arena, at = self.context.arena, self.segment.offsets
        address = arena.take(table.TABLE.size, "table")
        view = View(table.TABLE, arena.buffer(address), 0)
        base = self.segment.address
        view["tags"], view["locks"], view["flows"] = base + at.tags, base + at.locks, base + at.flow
        instance = View(schema.INSTANCE, self.segment.buffer, at.instance)
        view["key0"], view["key1"] = instance.element("secret", 0), instance.element("secret", 1)
        self.context.view["table"] = address

    def _make_wheel(self) -> None:
        arena = self.context.arena
        address = arena.take(expiry.WHEEL.size, "wheel")
        view = View(expiry.WHEEL, arena.buffer(address), 0)
        view["nodes"] = arena.take(expiry.NODES_BYTES, "wheel nodes")
        view["heads"] = arena.take(expiry.HEADS_BYTES, "wheel heads")
        view["tick"] = time.monotonic_ns() // 1_000_000 >> expiry.TICK_BITS
        self.context.view["wheel"] = address

    def _watch(self, fd: int, kind: int, number: int) -> None:
        """Register a descriptor, edge-triggered: a kick is never read, its edge is enough."""
        events = select.EPOLLIN | select.EPOLLET
        event = (events & 0xFFFFFFFF).to_bytes(4, "little") + (kind << 56 | number).to_bytes(
            8, "little"
        )
        buffer = ctypes.create_string_buffer(event, 12)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.epoll_ctl(self.epoll.fileno(), 1, fd, buffer) < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"epoll_ctl: {os.strerror(number)}")

    # --- the loop -------------------------------------------------------------------------------

    def run(self, mailbox: Mailbox) -> None:
        """Serve until told to stop or until the mailbox ends."""
        self.mailbox = mailbox
        self._watch(mailbox.fileno(), EVENT_MAILBOX, 0)
        mailbox.send(commands.Done(os.getpid()))
        while not self.stopping:
            attend = breathe(self.context.address, -1, BREATHS_MAX)
            if attend:
                self.attend(attend)

    def attend(self, attend: int) -> None:
        """What compiled code leaves to plain Python."""
        if attend & ATTEND_MAILBOX:
            self._commands()
        if attend & ATTEND_SLOW:
            self._slow_frames()
        if attend & ATTEND_ERRORS:
            self._error_queues()
        if attend & ATTEND_AWAKE and self.mailbox is not None:
            with contextlib.suppress(MailboxError):
                self.mailbox.send(Report(AWAKE))
        if attend & ATTEND_BROKEN and self.mailbox is not None:
            broken = [i for i in self.rings if not self.context.ring(i)["running"]]
            for index in broken:
                del self.rings[index]
            with contextlib.suppress(MailboxError):  # without control there is nobody to know
                self.mailbox.send(Report("broken", rings=broken))

    def _commands(self) -> None:
        assert self.mailbox is not None
        while True:
            try:
                command, fds = self.mailbox.receive(0)
            except MailboxError as error:
                if "gone" in str(error):
                    self.stopping = True
                return
            try:
                self.mailbox.send(self.carry_out(command, fds))
            except MailboxError:
                self.stopping = True
                return

    def carry_out(self, command: object, fds: list[int]) -> commands.Answer:
        """Do what a command says; its descriptors are kept or closed."""
        try:
            match command:
                case commands.MapRegion():
                    self._map_region(command, fds)
                case commands.SetRegions():
                    self._set_regions(command.numbers)
                case commands.SetFeatures():
                    self._set_features(command.features)
                case commands.SetRing():
                    self._set_ring(command, fds)
                case commands.StopRing():
                    return commands.Done(self._stop_ring(command.index))
                case commands.ListenOn():
                    self._listen_on(command, fds)
                case commands.SetNet():
                    self.net = command.net
                case commands.SendFrames():
                    for frame in command.frames:
                        self.send_frame(frame, command.pair)
                case commands.Describe(token):
                    regions, rings = tuple(self.mappings), tuple(self.rings)
                    listens = tuple(self.listens.items())
                    return commands.Have(token, os.getpid(), regions, rings, listens)
                case commands.Revive():
                    revive(self.context.address)
                case commands.Stop():
                    self.stopping = True
                case _:
                    raise Refused(f"unknown command {command!r}")
        except (Refused, OSError, ValueError) as error:
            return commands.Failed(str(error))
        finally:
            for fd in fds:
                os.close(fd)
        return commands.Done()

    # --- guest memory and rings -----------------------------------------------------------------

    def _map_region(self, command: commands.MapRegion, fds: list[int]) -> None:
        expect(fds, 1)
        size = command.size + command.mmap_offset
        area = mmap.mmap(fds[0], size, flags=mmap.MAP_SHARED | MAP_NORESERVE)
        host = ctypes.addressof(ctypes.c_char.from_buffer(area)) + command.mmap_offset
        self.mappings[command.number] = Mapping(command.gpa, command.size, command.uva, area, host)

    def _set_regions(self, numbers: tuple[int, ...]) -> None:
        """Switch the table; rings whose memory is gone stop."""
        if unknown := [number for number in numbers if number not in self.mappings]:
            raise Refused(f"memory regions {unknown} are not mapped")
        chosen = sorted((self.mappings[n] for n in numbers), key=lambda m: m.gpa)
        buffer = self.context.scratch("regions")
        for position, mapping in enumerate(chosen):
            view = View(REGION, buffer, position * REGION.size)
            view["gpa"], view["size"] = mapping.gpa, mapping.size
            view["host"] = mapping.host
            mem.watch(mapping.host, mapping.size, "guest")
        self.context.view["region_count"] = len(chosen)
        self.context.view["region_hit"] = 0
        self.active = numbers
        homeless = []
        for command in list(self.rings.values()):
            try:
                self._place_ring(command)
            except Refused as error:
                homeless.append(f"ring {command.index} stopped: {error}")
        for number in [n for n in self.mappings if n not in numbers]:
            mapping = self.mappings.pop(number)
            mem.unwatch(mapping.host)
            mapping.area.close()
        if homeless:
            raise Refused("; ".join(homeless))

    def _address_of(self, uva: int, size: int) -> int:
        """Where a front-end address is mapped here; Refused when it is nowhere."""
        for number in self.active:
            mapping = self.mappings[number]
            if mapping.uva <= uva and uva + size <= mapping.uva + mapping.size:
                return mapping.host + uva - mapping.uva
        raise Refused(f"{size} bytes at {uva:#x} lie outside the memory table")

    def _place_ring(self, command: commands.SetRing) -> None:
        """Set the addresses of a ring from the current memory table; a ring that has none stops."""
        ring = self.context.ring(command.index)
        packed = bool(self.context.view["features"] >> VIRTIO_F_RING_PACKED & 1)
        wanted = (command.desc_uva, command.avail_uva, command.used_uva)
        try:
            desc, avail, used = (
                self._address_of(uva, size)
                for uva, (size, _) in zip(
                    wanted, commands.ring_areas(command.num, packed), strict=True
                )
            )
        except Refused:
            self._stop_ring(command.index)
            raise
        ring["desc"], ring["avail"], ring["used"] = desc, avail, used

    def _set_features(self, features: int) -> None:
        view = self.context.view
        former = view["guest_uso4"], view["guest_uso6"]
        view["features"] = features
        for name, bit in VIRTIO_NET_F.items():
            view[name] = features >> bit & 1
        uso4, uso6 = view["guest_uso4"], view["guest_uso6"]
        if (uso4, uso6) == former:
            return
        for entry in table.of_worker(self.segment.buffer, self.segment.offsets, self.id):
            if entry["protocol"] == schema.PROTOCOLS.index("udp"):
                datagrams.suit_guest(entry, bool(uso4), bool(uso6))

    def _set_ring(self, command: commands.SetRing, fds: list[int]) -> None:
        ring = self.context.ring(command.index)
        names = [n for n in ("kick", "call", "err") if getattr(command, f"has_{n}")]
        expect(fds, len(names))
        given = dict(zip(names, fds, strict=True))
        for fd in fds:
            os.set_blocking(fd, False)  # never wait for a front-end to read its notifications
        if command.has_kick:
            self._watch(given["kick"], EVENT_KICK, command.index)
        fds.clear()
        fresh = command.index not in self.rings
        for name in ("call", "err", "kick"):
            self._replace_fd(ring, f"{name}_fd", given.get(name, -1))
        ring["num"] = command.num
        self._place_ring(command)
        features = self.context.view["features"]
        ring["event_idx"] = features >> VIRTIO_F_EVENT_IDX & 1
        ring["packed"] = features >> VIRTIO_F_RING_PACKED & 1
        ring["in_order"] = features >> VIRTIO_F_IN_ORDER & 1
        if fresh:
            self._start_ring(ring, command)
        self.rings[command.index] = command
        ring["enabled"] = int(command.enabled)
        ring["pending"] = 1
        if given.get("call", -1) >= 0:
            self._signal(
                given["call"]
            )  # a notification may have gone to the descriptor before this one
        view = self.context.view
        view["pairs_end"] = max(view["pairs_end"], command.index // 2 + 1)
        view["busy"] = 1

    def _start_ring(self, ring: View, command: commands.SetRing) -> None:
        """Cursors of a ring that starts.

        Chains a former device took and never returned are taken again: returned in order, they
        begin where it stopped returning. A front-end that names an available index up to one queue
        size beyond the driver's used index (Cloud Hypervisor after a crash) means those, too.
        """
        base, resumes = command.base, command.base == commands.RESUME
        if ring["packed"]:
            used_idx = self._resumed(ring) if resumes else base & 0xFFFF
            last_avail = used_idx
        else:
            used_idx = int.from_bytes(ctypes.string_at(ring["used"] + 2, 2), "little")
            again = resumes or (base - used_idx) & 0xFFFF <= command.num
            last_avail = used_idx if again else base & 0xFFFF
        ring["used_idx"] = ring["published"] = used_idx
        ring["last_avail"] = ring["seen_avail"] = last_avail
        ring["suppressed"] = 1
        ring["starved"] = ring["short_at"] = ring["short_since_ms"] = ring["log_count"] = 0
        ring["running"] = 1
        counters = self._counters(ring)
        counters["used_cursor"] = counters["used_next"] = used_idx

    def _counters(self, ring: View) -> View:
        return View(schema.QUEUE, self.segment.buffer, ring["counters"] - self.segment.address)

    def _resumed(self, ring: View) -> int:
        """Where a worker that ended stopped returning chains of a packed ring. If that was in the
        middle of showing some, the driver sees them now: they had been carried out."""
        counters = self._counters(ring)
        cursor, end = counters["used_cursor"], counters["used_next"]
        if cursor != end:
            at = ring["desc"] + virtq_packed.DESC_BYTES * (cursor & virtq_packed.SLOT)
            flags = int.from_bytes(ctypes.string_at(at + 14, 2), "little")
            wrap = cursor >> 15
            if flags >> 15 & 1 != wrap:  # the first of them: the last to be marked
                used = virtq_packed.F_AVAIL | virtq_packed.F_USED if wrap else 0
                shown = bytes(4) + ctypes.string_at(at + 12, 2) + used.to_bytes(2, "little")
                ctypes.memmove(at + 8, shown, len(shown))
        return int(end)

    def _signal(self, fd: int) -> None:
        """Write to an eventfd, or whatever a front-end gave us in its place."""
        with contextlib.suppress(OSError):
            os.write(fd, (1).to_bytes(8, "little"))

    def _replace_fd(self, ring: View, name: str, fd: int) -> None:
        old = ring[name]
        if old >= 0:
            if (
                name == "kick_fd"
            ):  # others hold this eventfd, too: closing would not end its registration
                self.epoll.unregister(old)
            os.close(old)
        ring[name] = fd

    def _stop_ring(self, index: int) -> int:
        """Stop; the available index to go on from."""
        ring = self.context.ring(index)
        self.rings.pop(index, None)
        base = ring["last_avail"]
        if ring["running"]:
            base = ring_stopped(self.context.address, index)
        ring["running"] = ring["enabled"] = ring["pending"] = 0
        for name in ("kick_fd", "call_fd", "err_fd"):
            self._replace_fd(ring, name, -1)
        return int(base)

    # --- forwarded ports ------------------------------------------------------------------------

    def _listen_on(self, command: commands.ListenOn, fds: list[int]) -> None:
        view, buffer = self.context.view, self.context.scratch("listeners")
        expect(fds, len(command.ports))
        if view["listener_count"] + len(fds) > LISTENERS_MAX:
            raise Refused(f"more than {LISTENERS_MAX} forwarded ports")
        for protocol, port, guest_port, guest_addr in command.ports:
            fd, number = fds[0], view["listener_count"]
            self._watch(fd, EVENT_LISTENER, number)
            entry = View(LISTENER, buffer, number * LISTENER.size)
            entry["fd"], entry["protocol"] = fd, protocol
            entry["port"], entry["guest_port"] = port, guest_port
            entry.set_bytes("guest_addr", guest_addr)
            entry["ready"] = 1
            view["listener_count"] = number + 1
            self.listens[protocol] = command.place
            del fds[0]

    # --- slow path ------------------------------------------------------------------------------

    def _slow_frames(self) -> None:
        """Answer the slow-path frames of this breath."""
        if self.net is None:
            return
        meta, frames = self.context.scratch("slow_meta"), self.context.scratch("slow")
        taken = []
        for slot in range(self.context.view["slow_count"]):
            word = int.from_bytes(meta[8 * slot : 8 * slot + 8], "little")
            start = slot * SLOW_BYTES + VNET_BYTES
            taken.append(
                (frames[start : start + (word & 0xFFFFFFFF)], word >> 32 & 0xFFFF, word >> 48 & 1)
            )
        for frame, pair, trusted in taken:
            answers = slow.replies(frame, self.net, checksum_trusted=bool(trusted))
            if not answers:
                self._drop(pair, schema.DROP["slow_ignored"])
            for answer in answers:
                self.send_frame(answer, pair)

    def _drop(self, pair: int, reason: int) -> None:
        """Count a frame from the guest that plain Python has no use for."""
        ring = self.context.ring(2 * pair + 1)
        at = ring["counters"] - self.segment.address
        drops = View(schema.QUEUE, self.segment.buffer, at)
        drops.set_element("drops", reason, drops.element("drops", reason) + 1)

    def send_frame(self, frame: bytes, pair: int) -> None:
        """One Ethernet frame to the guest."""
        if len(frame) <= SLOW_BYTES:
            self.context.scratch("slow")[: len(frame)] = frame
            inject(self.context.address, len(frame) | pair << 32)

    def _error_queues(self) -> None:
        """ICMP errors that wait in the error queues of datagram sockets."""
        if self.net is None:
            return
        numbers = self.context.scratch("errors")
        for position in range(self.context.view["error_count"]):
            index = int.from_bytes(numbers[4 * position : 4 * position + 4], "little")
            entry = table.entry_at(self.segment.buffer, self.segment.offsets, index)
            if not table.is_of(entry, self.id) or entry["state"] == 0 or entry["fd"] < 0:
                continue
            for frame in errors.replies(entry, self.net, self._guest_mac()):
                self.send_frame(frame, entry["tx_queue"])

    def _guest_mac(self) -> bytes:
        return schema.SEEN.get(self.segment.buffer, self.segment.offsets.seen, "mac").to_bytes(
            6, "big"
        )


def block_of(segment: Segment, worker_id: int) -> View:
    """A worker's shared struct."""
    base = segment.offsets.worker + worker_id * schema.WORKER.size
    return View(schema.WORKER, segment.buffer, base)


def inherited(segment: Segment, worker_id: int) -> set[int]:
    """The sockets that a worker before this one has left: none where another keeper had them."""
    block = block_of(segment, worker_id)
    if block["keeper"] != os.getppid():
        return set()
    parting = {block["parting_fd"]} if block["parting"] else set()
    return parting | table.descriptors(segment.buffer, segment.offsets, worker_id)


def main(mailbox: Mailbox, start: commands.Start, fds: list[int], kept: set[int]) -> int:
    """Be a worker: `kept` are the descriptors its keeper had before the first one. The status to
    end with."""
    sigbus.install()
    try:
        expect(fds, commands.Wires.count(start.workers))
        if start.cpu is not None:
            os.sched_setaffinity(0, {start.cpu})
        left = descriptors() - kept - set(fds)
        segment = Segment(start.segment, start.workers)
        for fd in left - inherited(segment, start.id):
            os.close(fd)
        worker = Worker(segment, start.id, start.workers, commands.Wires.of(fds))
    except (Refused, SegmentError, OSError) as error:
        mailbox.send(commands.Failed(str(error)))
        return 1
    worker.run(mailbox)
    return 0
