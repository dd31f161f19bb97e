"""workers.py - what the workers serve: control's whole wanted state, and how they are told.

Theory      Control holds the whole wanted state (memory regions, rings, features, network,
            listeners) and the table of which worker serves which pair. A change is sent to the
            workers it concerns and acknowledged by each before the caller goes on: that is what
            makes "every worker has remapped before the ack" true. A worker that comes up, first or
            again (places.py), is brought to the wanted state by the same commands.
Waiting     A ring whose worker is not up yet simply starts later; the driver's requests wait in it.
            One whose worker has died stays where the driver's used index stands: the next worker
            goes on there, and so does a front-end that asks first.
Balance     A pair may change its worker while it runs: the law is in balance.py. It is disabled for
            that moment, so that flows use another or wait, as when the guest disables one.
Refusals    A worker that comes up and cannot map guest memory, or take a ring, costs those rings
            (`on_refused`); the others go on. One that is lost meanwhile has refused nothing: the
            next in its place is told everything again.
Ownership   Writes instance.pair_worker, instance.rx_enabled, instance.rests.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from control.balance import Balance
from control.device import Region, Ring
from control.logs import Log
from control.places import NotedSlot, Places, Slot
from control.processes import process_cpu
from control.vhost_user import VirtioFeature
from control.watch import LOOK_S, REST_S, Watch
from dataplane import commands
from shm import schema
from shm.layout import View
from shm.segment import Segment

HANDED_S = 0.1  # how long frames under way are waited for
PROTOCOL_NUMBER = {name: number for number, name in enumerate(schema.PROTOCOLS)}

Listeners = Callable[[int, str, int], Iterator[tuple[commands.ListenOn, tuple[int, ...]]]]


class Noted(NamedTuple):
    """Workers.noted."""

    features: int
    regions: dict[int, Region]
    region_numbers: int
    rings: dict[int, Ring]
    left: dict[int, int | None]
    slots: list[NotedSlot]


class Workers(Places):
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
        super().__init__(segment, count, log, cpus)
        self.net = net
        self.pairs = pairs
        self.instance = View(schema.INSTANCE, segment.buffer, segment.offsets.instance)
        self.features = 0
        self.regions: dict[int, Region] = {}
        self.rings: dict[int, Ring] = {}
        self.listeners: Listeners = lambda worker, protocol, place: iter(())
        self.on_refused: Callable[[int, str], None] = lambda index, reason: None
        self._left: dict[int, int | None] = {}  # rings whose worker died: the used index then
        self._region_numbers = 0
        self._leaving = -1  # the pair that is just changing its worker
        self._watch = Watch([self._block(slot) for slot in self.slots])
        self._balance = Balance()
        for pair in range(schema.PAIRS_MAX):
            self.instance.set_element("pair_worker", pair, pair % count)

    # --- over the death of control ----------------------------------------------------------------

    def noted(self) -> Noted:
        """What the next control has to know (notes.py)."""
        slots = [slot.noted() for slot in self.slots]
        return Noted(
            self.features, self.regions, self._region_numbers, self.rings, self._left, slots
        )

    def take_over(self, noted: Noted) -> None:
        """Instead of `start`, go on where a control before this one stood: its workers are brought
        from what they have to what it wanted, whatever it was just telling them."""
        self.features, self.regions = noted.features, noted.regions
        self._region_numbers = noted.region_numbers
        self.rings, self._left = noted.rings, noted.left
        self.find(noted.slots)
        self._publish_enabled()
        for slot in self._up():
            surplus = slot.rings - {index for index in self.rings if self.owner(index) is slot}
            slot.rings -= surplus
            for index in surplus:
                self._tell(slot, commands.StopRing(index))
        begun = frozenset[int]().union(*(slot.rings for slot in noted.slots))
        for index in begun & self.rings.keys():
            if not self.owner(index).serving(index):
                self._left.setdefault(index, self._used_index(self.rings[index]))
        for slot in self._up():
            self.bring_up(slot)

    def bring_up(self, slot: Slot) -> None:
        """All of the wanted state that concerns the worker, whether it has some of it or not."""
        self._tell(slot, commands.SetNet(self.net))
        self._tell(slot, commands.SetFeatures(self.features))
        no_memory = self._give_memory(slot)
        for index in list(self.rings):
            if self.owner(index) is slot and (why := no_memory or self._send_ring(index)):
                self.on_refused(index, f"worker {slot.id}: {why}")
        self._give_listeners(slot, "udp")
        self._listen_if_needed()
        self._tell(slot, commands.Revive())

    def left_behind(self, slot: Slot) -> None:
        """Its rings stay where the used index stands."""
        wanted = slot.rings & self.rings.keys()
        self._left |= {index: self._used_index(self.rings[index]) for index in wanted}
        slot.rings = set()

    def look(self) -> float:
        """Look after all workers: those that are stuck are killed, those that are overloaded give a
        pair away. In how many seconds to look again, if none has work before."""
        for number in self._watch.look():
            self.lost(self.slots[number], "does not go on")
        pairs, buffer, at = range(self.pairs), self.segment.buffer, self.segment.offsets
        carried = [
            sum(
                schema.QUEUE.get(buffer, at.queue + index * schema.QUEUE.size, "bytes")
                for index in (2 * pair, 2 * pair + 1)
            )
            for pair in pairs
        ]
        cpu_s = [process_cpu(self._block(slot)["pid"]).used_s for slot in self.slots]
        serving = [self.instance.element("pair_worker", pair) for pair in pairs]
        if move := self._balance.look(time.monotonic(), cpu_s, carried, serving):
            self.assign(move.pair, self.slots[move.worker])
        if not self._watch.resting:
            return LOOK_S
        self.instance["rests"] += 1
        return REST_S if self._watch.still() else LOOK_S  # who woke before that has not said so

    # --- what they serve ------------------------------------------------------------------------

    def owner(self, index: int) -> Slot:
        """The worker that serves ring `index`."""
        return self.slots[self.instance.element("pair_worker", index // 2)]

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

    def assign(self, pair: int, slot: Slot) -> None:
        """Have another worker serve a pair, without losing a frame: first none is given to its
        receive queue any more, then the rings change hands where they stand."""
        former = self.owner(2 * pair)
        rings = [self.rings[index] for index in (2 * pair, 2 * pair + 1) if index in self.rings]
        if former is slot or not (former.ready and slot.ready):
            return
        self._leaving = pair
        self._publish_enabled()
        self._wait_for_frames(former)
        bases = [self.stop_ring(ring.index) for ring in rings]
        self.instance.set_element("pair_worker", pair, slot.id)
        self._leaving = -1
        for ring, base in zip(rings, bases, strict=True):
            moved = ring if base is None else ring.replaced(base=base)
            if not self.set_ring(moved, self.features):
                self.on_refused(ring.index, f"worker {slot.id} cannot take it from {former.id}")
        self.log.info(f"pair {pair}: worker {slot.id} serves it now, {former.id} had more to do")

    def _wait_for_frames(self, slot: Slot) -> None:
        """Until what others have given a worker for its receive queues has been taken."""
        at, deadline_s = self.segment.offsets, time.monotonic() + HANDED_S
        count = len(self.slots)
        for other in range(count):
            number = 2 * (other * count + slot.id) + 1
            cursors = View(
                schema.HANDOFF, self.segment.buffer, at.handoff + number * schema.HANDOFF_STRIDE
            )
            while cursors["head"] != cursors["tail"] and time.monotonic() < deadline_s:
                time.sleep(0.0005)

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
            if index % 2 == 0 and ring.enabled and index != 2 * self._leaving:
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
            if serves:
                self._give_listeners(slot, "tcp")

    def _give_listeners(self, slot: Slot, protocol: str) -> None:
        """Those that it does not have: all or none, or what a control that died had left out."""
        number = PROTOCOL_NUMBER[protocol]
        if number in slot.given:
            return
        slot.given.add(number)
        for command, fds in self.listeners(slot.id, protocol, slot.listens.get(number, 0)):
            self._tell(slot, command, fds)

    def send_frames(self, pair: int, frames: tuple[bytes, ...]) -> None:
        """Frames for the guest from control."""
        slot = self.owner(2 * pair)
        if slot.ready:
            self._tell(slot, commands.SendFrames(pair, frames))
