"""Datagrams in a simulated day: a guest that sends to programs, programs that answer or speak
unasked, pings. Every datagram is known by its number and comes where, and as often as, it may.

To the host   once. Deaths: again, if a worker died after it had sent it and before its chain was
              seen to be returned, which its successor takes for not sent (dataplane/inherit.py):
              within AGAIN rounds, one of them that of the death.
To the guest  once, whatever dies. On the queue that was right when it was taken out of its socket,
              which is when a worker chooses: steer.queue_of promises the one the guest sent the
              flow on last, and what was sent two rounds ago has been seen (simulation.py). An
              enabled one at that moment; any of those when the right one is none. Datagrams never
              stay behind on another queue, as a stream with payload in flight may.
Order         to the guest: on one queue that of the program, on all of them when the guest never
              changes its queue. To the host: likewise, when no frame is late and nobody dies.
Losses        Each has a reason that somebody counted: a full socket (ours here, its), a full ring
              (queue.drops). Deaths: what was taken out of a socket, but not seen by the guest, when
              some worker died: at most LATER rounds before, in which it may have waited between
              two workers for buffers of a small ring.
Sockets       A conversation keeps the one on which the program heard it first, whatever dies.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import packets as pk
from guest import Guest
from inprocess import Local
from packets import VnetHeader
from sim.datagrams import Datagrams

from shm import schema

SEEN, AGAIN, LATER = 2, 2, 4  # rounds
PORT, IDENT, HOST_IDENT = 2000, 77, 0x5A5A
CONNECTION_REFUSED = 111
SIZES_UP, SIZES_DOWN = (0, 1, 7, 100, 500, 1400), (0, 1, 7, 100, 500, 1400, 1472, 5000)
UNSENT = ("table_full", "table_busy", "handoff_full", "no_socket", "socket_full", "send_failed")
UNSEEN = ("rx_full", "rx_small", "no_queue")
SOCKET_FULL = ("socket_full",)


@dataclasses.dataclass(kw_only=True)
class Steered:
    """What the guest sends on one of its queues, and where frames for it may come."""

    sent: list[tuple[int, int]] = dataclasses.field(default_factory=list)  # in which round, where
    hopped: bool = False

    def sent_on(self, now: int, pair: int) -> None:
        """The guest has sent a frame."""
        self.hopped |= bool(self.sent) and self.sent[-1][1] != pair
        self.sent.append((now, pair))

    def right(self, now: int, rounds: int) -> set[int]:
        """The queues of the last frame that has been seen, sent so many rounds ago or more, and of
        those that may have been looked at after it. A frame is outdone by one that was sent a round
        later: by then it had been seen. Others are forgotten."""
        seen = [at for at, _ in self.sent if at + rounds <= now]
        if seen:
            self.sent = [(at, pair) for at, pair in self.sent if at + 2 > seen[-1]]
        return {pair for _, pair in self.sent}


def _parcels(chance: random.Random, sizes: tuple[int, ...]) -> list[bytes]:
    """What one side has to say, in datagrams of which no two are the same."""
    found, size = {}, 0
    for number in range(chance.choice([1, 20, 120])):
        size = chance.choice(sizes) if chance.random() < 0.4 else size
        found[(bytes([number]) + chance.randbytes(size))[:size]] = None
    return list(found)


class Way:
    """One direction, and how far it has come."""

    def __init__(self, parcels: list[bytes], told: int = 0) -> None:
        self.parcels, self.told, self.due_ms = parcels, told, 0
        self.number = {data: number for number, data in enumerate(parcels)}
        self.came: dict[int, int] = {}  # in which round, by number

    def more(self) -> bool:
        return self.told < len(self.parcels)


@dataclasses.dataclass
class Conversation(Steered):
    """One flow of datagrams, or of pings, to which each answer is the same."""

    up: Way
    down: Way
    ping: bool
    port: int  # of the guest, to one at the host; pings: the guest's identifier
    pair: int
    sock: Datagrams | None = None
    heard: bool = False
    said_ms: int = 0
    given: dict[int, int] = dataclasses.field(default_factory=dict)  # to the socket: as which one
    taken: dict[int, tuple[int, set[int], set[int]]] = dataclasses.field(default_factory=dict)
    last: dict[int, int] = dataclasses.field(default_factory=dict)  # by queue: which came last


class Day(Protocol):
    """What a simulation is for those who talk."""

    chance: random.Random
    guest: Guest
    drv: Local
    hops: float
    delays: float
    frames: int
    judged: int
    deaths_at: list[int]  # in which rounds

    @property
    def round(self) -> int: ...
    @property
    def now_ms(self) -> int: ...


class Conversations:
    """All of one day."""

    def __init__(self, day: Day, pairs: int) -> None:
        self.day, self.chance = day, day.chance
        self.errors = self.chance.choice([0.0, 0.02])
        self.all: list[Conversation] = []
        for number in range(self.chance.randrange(4)):
            self._begin(PORT + number, self.chance.randrange(pairs), False)
        if self.chance.random() < 0.3:
            self._begin(IDENT, self.chance.randrange(pairs), True)
        self.of: dict[Datagrams, Conversation] = {}

    def _begin(self, port: int, pair: int, ping: bool) -> None:
        up = Way(_parcels(self.chance, SIZES_UP))
        down = Way(up.parcels, len(up.parcels)) if ping else Way(_parcels(self.chance, SIZES_DOWN))
        self.all.append(Conversation(up, down, ping, port, pair))

    @property
    def over(self) -> bool:
        """All has been said; what was is on its way, or has come."""
        return all(
            not one.up.more()
            and not (one.sock and one.sock.tx)
            and not (one.down.more() and (one.heard or self.day.now_ms < one.said_ms + 1000))
            for one in self.all
        )

    def due_ms(self) -> list[int]:
        """When somebody goes on."""
        ways = [way for one in self.all for way in (one.up, one.down) if way.more()]
        return [way.due_ms for way in ways]

    def of_frame(self, frame: bytes, program_at: int) -> Conversation | None:
        """Whose frame this is, by the port of the program or the identifier of an echo."""
        if frame[12:14] != b"\x08\0" or frame[23] not in (pk.UDP, pk.ICMP):
            return None
        at = program_at if frame[23] == pk.UDP else 38
        port = int.from_bytes(frame[at : at + 2], "big")
        return next((one for one in self.all if one.port == port), None)

    # --- the guest ---

    def say(self) -> None:
        """The guest sends some datagrams, or none."""
        for one in self.all:
            for number in self._some(one.up, [1, 1, 2, 5, 30]):
                self._say(one, number)
                one.said_ms = self.day.now_ms

    def _some(self, way: Way, counts: list[int]) -> Iterator[int]:
        if self.day.now_ms < way.due_ms:
            return
        way.due_ms = self.day.now_ms + self.chance.choice([0, 0, 5, 50, 300])
        for _ in range(self.chance.choice(counts)):
            if way.more():
                way.told += 1
                yield way.told - 1

    def _say(self, one: Conversation, number: int) -> None:
        guest, data = self.day.guest, one.up.parcels[number]
        if one.ping:
            guest.ping(guest.gw4, one.port, number, data, pair=one.pair)
        else:
            guest.send_udp(guest.gw4, one.port, one.port, data, pair=one.pair)

    def hop(self, pairs: list[int]) -> None:
        """The guest may go on on another queue, and now and then an ICMP error comes."""
        for one in self.all:
            if one.up.told and one.up.more() and self.chance.random() < self.day.hops:
                one.pair = self.chance.choice(pairs)
            if one.sock and one.sock.fds and self.chance.random() < self.errors:
                one.sock.fail(CONNECTION_REFUSED)

    # --- the programs ---

    def answer(self) -> None:
        """The programs read what has come, and answer."""
        for one in self.all:
            if one.sock is None:
                continue
            read = one.sock.fetch(self.chance.choice([0, 3, 100]))
            if one.ping:
                for number in (int.from_bytes(data[6:8], "big") for data in read):
                    if number not in one.given:  # a request that came twice has one answer
                        self._give(one, number)
            elif one.heard:
                for number in self._some(one.down, [1, 1, 3, 20, 60]):
                    self._give(one, number)

    def _give(self, one: Conversation, number: int) -> None:
        data = one.down.parcels[number]
        if one.ping:
            data = b"\0\0\0\0%b%b%b" % (_word(HOST_IDENT), _word(number), data)
        assert one.sock is not None
        assert one.sock.fds, "its socket was closed"
        if one.sock.deliver(data):
            one.given[number] = len(one.given)

    # --- what must hold: at the sockets ---

    def connected(self, sock: Datagrams, port: int) -> None:
        one = next(
            one for one in self.all if one.ping == (sock.protocol != 0) and port in (0, one.port)
        )
        assert not one.heard, "another socket"
        assert one.sock is None or self.day.deaths_at, "connected twice"
        one.sock = sock
        self.of[sock] = one

    def sent(self, sock: Datagrams, data: bytes) -> None:
        one = self.of[sock]
        number = self._number_up(one, data)
        assert number is not None, f"{one.port}: not from the guest: {data!r}"
        now, before = self.day.round, one.up.came.get(number)
        if before is not None:
            died = any(before <= at <= now for at in self.day.deaths_at)
            assert died and now <= before + AGAIN, f"{one.port}: {number} came twice"
        elif not self.day.deaths_at and not self.day.hops and not self.day.delays:
            assert number > max(one.up.came, default=-1), f"{one.port}: {number} was overtaken"
        one.up.came.setdefault(number, now)
        one.heard = True

    def _number_up(self, one: Conversation, data: bytes) -> int | None:
        if not one.ping:
            return one.up.number.get(data)
        number = int.from_bytes(data[6:8], "big")
        whole = b"\x08\0" + data[2:4] + _word(one.port) + _word(number)
        return number if data[:8] == whole and data[8:] == one.up.parcels[number] else None

    def taken(self, sock: Datagrams, data: bytes) -> None:
        """A worker chooses a queue at this moment."""
        one = self.of[sock]
        number = one.down.number[data[8:] if one.ping else data]
        right = one.right(self.day.round, SEEN)
        enabled = {pair for pair in range(32) if self.day.drv.block["rx_enabled"] >> pair & 1}
        one.taken[number] = self.day.round, right, enabled

    # --- what must hold: at the guest ---

    def came(self, one: Conversation, frame: bytes, header: VnetHeader, pair: int) -> None:
        packet = pk.parse(frame, header)
        number = self._number_down(one, packet)
        assert number in one.taken, f"{one.port}: not from the program: {packet}"
        assert number not in one.down.came, f"{one.port}: {number} came twice"
        one.down.came[number] = self.day.round
        _, right, enabled = one.taken[number]
        allowed = right if right <= enabled else enabled
        assert pair in allowed, f"{one.port}: {number} on {pair}, not {allowed}"
        self.day.frames += one.hopped
        self.day.judged += one.hopped and allowed < enabled
        before = one.last.get(pair if self.day.hops else 0, -1)
        assert one.given[number] > before, f"{one.port}: {number} was overtaken on {pair}"
        one.last[pair if self.day.hops else 0] = one.given[number]

    def _number_down(self, one: Conversation, packet: pk.Packet) -> int:
        """-1: it is none."""
        guest = self.day.guest
        if (packet.src, packet.dst) != (guest.gw4, guest.ip4):
            return -1
        if not one.ping:
            ports = (packet.sport, packet.dport) == (one.port, one.port)
            return one.down.number.get(packet.payload, -1) if ports else -1
        number, size = int.from_bytes(packet.body[2:4], "big"), len(packet.body)
        whole = packet.type == 0 and packet.body[:2] == _word(one.port) and size >= 4
        return number if whole and packet.body[4:] == one.down.parcels[number] else -1

    # --- what must hold: in the end ---

    def check_the_end(self) -> None:
        unsent = [
            (one.port, n) for one in self.all for n in range(one.up.told) if n not in one.up.came
        ]
        counted = self._counted(UNSENT)
        assert len(unsent) <= counted, f"did not come to the host, {counted} counted: {unsent}"
        unseen = [
            (one.port, n)
            for one in self.all
            for n in one.given
            if n not in one.down.came and not self._died_after(one.taken.get(n))
        ]
        counted = self._counted(UNSEEN)
        assert len(unseen) <= counted, f"did not come to the guest, {counted} counted: {unseen}"

    def _died_after(self, taken: tuple[int, Any, Any] | None) -> bool:
        if taken is None:
            return False
        return any(taken[0] <= at <= taken[0] + LATER for at in self.day.deaths_at)

    def _counted(self, reasons: tuple[str, ...]) -> int:
        drops: Callable[[str, int], int] = self.day.drv.drops
        return sum(drops(reason, ring) for reason in reasons for ring in range(schema.RINGS_MAX))


def _word(number: int) -> bytes:
    return number.to_bytes(2, "big")
