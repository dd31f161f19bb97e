"""Datagrams in a simulated day: a guest that sends to programs, programs that answer or speak
unasked, pings. Every datagram is known by its number and comes where, and as often as, it may.

To the host   once. Deaths: again, if some worker died, the one that sent it or the one that had
              handed it over, before its chain was returned: a successor takes such for not sent
              (dataplane/inherit.py). That is within AGAIN rounds.
To the guest  once, whatever dies. On the queue that was right when it was taken out of its socket,
              which is when a worker chooses: steer.queue_of promises the one the guest sent the
              flow on last, and what was sent SEEN rounds ago has been seen (simulation.py). If one
              that may be right was disabled then, on any that was enabled. Datagrams never stay
              behind on another queue, as a stream with payload in flight may; how long they are on
              their way does not matter.
Order         to the guest: on one queue that of the program, on all of them when the guest never
              changes its queue. To the host: on days without changes, late frames and deaths.
Losses        To the host: whatever dies, none that no ring has counted (queue.drops). To the guest:
              what the socket was too full for does not count, the rest was counted likewise, or
              died with a worker that had it in hand: the one that took it, in that breath, or the
              one whose queue it was for, up to LATER rounds later, in which it may have waited
              between the two.
Sockets       A conversation keeps the one on which the program heard it first, whatever dies.

Counters say how many, not which: a drop of TCP's, or one that a successor counts again, may stand
for a datagram that nobody counted. Pings are answered by a program; asked twice, it answers once.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from typing import Protocol

import packets as pk
from guest import Guest
from inprocess import Local
from packets import VnetHeader
from sim.datagrams import Datagrams

from shm import schema

SEEN, AGAIN, LATER = 2, 2, 4  # rounds
PORT, IDENT, HOST_IDENT = 2000, 77, 0x5A5A
CONNECTION_REFUSED = 111
SIZES = (0, 1, 7, 100, 500, 1400)
SIZES_DOWN = (SIZES, (*SIZES, 1472, 5000))  # also more than a receive buffer takes
LAST_WORDS = 30  # not more than these are said at once in the end
UNSENT = ("table_busy", "handoff_full", "socket_full")
UNSEEN = ("rx_full", "rx_small", "no_queue")
NEVER = ("table_full", "no_socket", "send_failed")  # here nothing is scarce, and a retry helps


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
    for number in range(chance.choice([1, 30, 120])):
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
class Taken:
    """The moment at which a worker took a datagram out of its socket."""

    round: int
    by: tuple[int, int]  # which worker, and in which breath
    right: set[int]
    enabled: set[int]
    owners: dict[int, int]  # of the queues at that moment

    @property
    def allowed(self) -> set[int]:
        """The queues it may have been made for."""
        return self.right if self.right <= self.enabled else self.enabled

    @property
    def hands(self) -> set[int]:
        """The other workers that may have had it in hand."""
        return {self.owners[pair] for pair in self.allowed} - {self.by[0]}


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
    taken: dict[int, Taken] = dataclasses.field(default_factory=dict)
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
    acting: tuple[int, int]  # which worker, and in which breath
    died: list[tuple[int, int, int]]  # in which round, and who acting then

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
        up = Way(_parcels(self.chance, SIZES))
        down = _parcels(self.chance, self.chance.choice(SIZES_DOWN))
        answers = Way(up.parcels, len(up.parcels)) if ping else Way(down)
        self.all.append(Conversation(up, answers, ping, port, pair))

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
        asked = any(one.ping and one.sock and one.sock.tx for one in self.all)
        return [way.due_ms for way in ways] + [self.day.now_ms] * asked

    def of_frame(self, frame: bytes, program_at: int) -> Conversation | None:
        """Whose frame this is, by the port of the program or the identifier of an echo."""
        if frame[12:14] != b"\x08\0" or frame[23] not in (pk.UDP, pk.ICMP):
            return None
        ping = frame[23] == pk.ICMP
        at = 38 if ping else program_at
        port = int.from_bytes(frame[at : at + 2], "big")
        found = [one for one in self.all if (one.ping, one.port) == (ping, port)]
        assert found, f"of no conversation: {port}"
        return found[0]

    # --- the guest ---

    def say(self) -> None:
        """The guest sends some datagrams, or none."""
        for one in self.all:
            for number in self._some(one.up, [1, 1, 1, 2, 3, 20]):
                self._say(one, number)
                one.said_ms = self.day.now_ms

    def _some(self, way: Way, counts: list[int]) -> Iterator[int]:
        if self.day.now_ms < way.due_ms:
            return
        way.due_ms = self.day.now_ms + self.chance.choice([0, 0, 5, 50, 300])
        left, count = len(way.parcels) - way.told, self.chance.choice(counts)
        if left <= LAST_WORDS and self.chance.random() < 0.5:
            count = left  # nothing comes later that would show the worker what it has left behind
        for _ in range(min(count, left)):
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
            read = one.sock.fetch(100 if one.ping else self.chance.choice([0, 0, 1, 5, 100]))
            if one.ping:
                for number in (int.from_bytes(data[6:8], "big") for data in read):
                    if number not in one.given:  # a request that came twice has one answer
                        self._give(one, number)
            elif one.heard:
                for number in self._some(one.down, [1, 1, 1, 2, 5, 30]):
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
        assert one.sock is None or self.day.died, "connected twice"
        one.sock = sock
        self.of[sock] = one

    def sent(self, sock: Datagrams, data: bytes) -> None:
        one = self.of[sock]
        number = self._number_up(one, data)
        assert number is not None, f"{one.port}: not from the guest: {data!r}"
        now, before = self.day.round, one.up.came.get(number)
        if before is not None:
            died = any(before - 1 <= at for at, _, _ in self.day.died)
            assert died and now <= before + AGAIN, f"{one.port}: {number} came twice"
        elif not self.day.died and not self.day.hops and not self.day.delays:
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
        drv = self.day.drv
        enabled = {pair for pair in range(schema.PAIRS_MAX) if drv.block["rx_enabled"] >> pair & 1}
        owners = {pair: drv.owner(pair) for pair in enabled | right}
        one.taken[number] = Taken(self.day.round, self.day.acting, right, enabled, owners)

    # --- what must hold: at the guest ---

    def came(self, one: Conversation, frame: bytes, header: VnetHeader, pair: int) -> None:
        packet = pk.parse(frame, header)
        number = self._number_down(one, packet)
        assert number in one.taken, f"{one.port}: not from the program: {packet}"
        assert number not in one.down.came, f"{one.port}: {number} came twice"
        one.down.came[number] = self.day.round
        allowed, enabled = one.taken[number].allowed, one.taken[number].enabled
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
        assert not self._counted(NEVER), f"one of {NEVER} was counted"
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

    def _died_after(self, taken: Taken | None) -> bool:
        """Whether who had taken a datagram died before it was seen."""
        if taken is None:
            return False
        return any(
            (worker, breath) == taken.by
            or (worker in taken.hands and taken.round <= at <= taken.round + LATER)
            for at, worker, breath in self.day.died
        )

    def _counted(self, reasons: tuple[str, ...]) -> int:
        drops: Callable[[str, int], int] = self.day.drv.drops
        return sum(drops(reason, ring) for reason in reasons for ring in range(schema.RINGS_MAX))


def _word(number: int) -> bytes:
    return number.to_bytes(2, "big")
