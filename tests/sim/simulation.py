"""One simulated day of some workers: a guest that hops between queues, programs at the other ends,
workers that die, frames that get lost, late, or overtaken. Everything that happens is drawn from
one seed.

Whole workers (interpreted), the guest's driver and TCP of the other tests, and a kernel that is
made up (kernel.py), on a clock that only the simulation moves. Each turn the guest, some workers
and the programs do a step, in an order that is drawn; then time passes, to the next timer when
nothing else is left.

What must hold, whatever happens:
  every stream   arrives at its other end byte for byte, as far as it has come at any time, and
                 whole in the end; no segment to the guest contradicts another or its window
                 (minitcp.py)
  every datagram comes once, or why it does not is known (conversations.py)
  every frame    to the guest comes on a pair that is enabled, or was a moment ago; and on the one
                 that the guest sends the flow on (Steering, below)
  in the end     no flow is left, in the table or in the gauges, and no socket

A worker that dies stays dead for some of its turns, also for none: the others go on meanwhile, and
time does not jump. Its successor may die before it is complete.

The guest takes frames from all queues, or, on some days, now and then from a few of them only,
which does not count as acting: elsewhere frames pile up meanwhile.

Steering    flows/steer.py promises a flow's frames on the queue that the guest last sent it on.
            What is under way is measured in rounds, not in time: in a round everybody acts at least
            once, the guest and each worker, a whole breath, in which nobody dies. So a frame of the
            guest has been seen by the end of the round after the one in which it was sent; ROUNDS
            after that one whatever was made before has arrived.
              right      the queue of the last frame, and of those that may have been looked at
                         after it. All are judged unless one of them was disabled meanwhile.
              stray      a stream with payload in flight may stay where it was, from the first frame
                         that shows it for STRAY_MAX_MS; not once a frame has come on a right one
            How many frames were judged against fewer pairs than were enabled is counted.
"""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Callable
from typing import Any

import packets as pk
import pytest
from driver import BASIC, GUEST_CSUM, IN_ORDER, MQ, RING_PACKED
from guest import Guest
from inprocess import Local
from minitcp import Tcp, listen
from packets import VnetHeader
from sim.conversations import Conversation, Conversations, Steered
from sim.kernel import Kernel, Sock

from dataplane.slow import errors
from flows import expiry, steer

PAIRS, MS = 4, 1_000_000
GUEST_PORT, HOST = 8080, b"\x7f\0\0\1"
ROUNDS = 4  # in which what is on its way arrives, deaths and moves included
LATE_MS = 30
TURNS_MAX = 30_000


class Here:
    """A world without a network of its own: everything happens in this thread."""

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)


@dataclasses.dataclass
class Talk(Steered):
    """One connection: the guest's end, the program's, and what each has to say."""

    up: bytes
    down: bytes
    pace: int  # how much of that the program says at a time, at most
    tcp: Tcp | None = None
    sock: Sock | None = None
    inbox: bytearray = dataclasses.field(default_factory=bytearray)
    told: int = 0
    finished: bool = False
    judged_by: set[int] = dataclasses.field(default_factory=set)  # what was right of late
    came_right: int | None = None  # in which round a frame first came on one of these
    strays: dict[int, int] = dataclasses.field(default_factory=dict)  # queue: since when, in ms

    @property
    def over(self) -> bool:
        """Both streams have come whole, and both ends know that they have ended."""
        return (
            self.tcp is not None
            and self.sock is not None
            and len(self.inbox) == len(self.up)
            and len(self.tcp.received) == len(self.down)
            and self.tcp.eof
            and self.sock.shut
        )


class Simulation:
    """One seed."""

    def __init__(self, seed: int, patch: pytest.MonkeyPatch) -> None:
        self.chance = random.Random(seed)
        random.seed(seed)  # what the guest's TCP draws
        patch.setattr(os, "urandom", self.chance.randbytes)  # the instance's secret
        self.kernel = Kernel()
        self.kernel.install(patch)
        self.kernel.called = self._called
        self.kernel.died = lambda: self.died.append((self.round, *self.acting))
        self.kernel.cuts = self.chance.random() < 0.7
        patch.setattr(errors, "replies", lambda entry, net, guest_mac: [])
        self.acting = (-1, 0)  # which worker, and in which of all breaths or commands
        self.died: list[tuple[int, int, int]] = []  # in which round, and who acting then
        self.talks: list[Talk] = []
        self.by_port: dict[int, Talk] = {}
        self.enabled: list[tuple[int, set[int]]] = [(0, set(range(PAIRS)))]  # since which round
        self.rounds_ms: list[int] = []  # when each ended
        self.acted: set[int] = set()  # who has in this one
        self.frames = self.judged = 0  # of flows that have hopped
        self.deaths = 0
        self.hops = self.chance.choice([0.0, 0.01, 0.1])
        self.losses = self.chance.choice([0.0, 0.0, 0.01])
        self.delays = self.chance.choice([0.0, 0.0, 0.02, 0.1, 0.5])
        self.late: list[tuple[int, Callable[[], None]]] = []  # due when, what
        self.blinks = self.chance.choice([0.0, 0.0, 0.5])
        self.kills = self.chance.choice([0.0, 0.02, 0.1])
        rings = self.chance.choice([0, RING_PACKED, IN_ORDER, RING_PACKED | IN_ORDER])
        self.count = self.chance.choice([1, 2, 3])
        num = self.chance.choice([8, 64])  # with few buffers flows stand in line
        # Streams here are short: a few KiB have to be worth a move, or none is.
        patch.setattr(steer, "PAID_BYTES", self.chance.choice([2000, 20_000, 1 << 18]))
        features = BASIC | GUEST_CSUM | MQ | rings
        here: Any = Here()
        drv = Local(here, workers=self.count, pairs=PAIRS, num=num, features=features)
        self.drv = drv
        drv.net["peek_offset"] = 1
        drv.net["udp_oneway_s"] = drv.net["udp_stream_s"] = self.chance.choice([1, 2])
        drv.wait_calls = self._wait_calls  # type: ignore[method-assign]
        drv.sockets = self.kernel.socks
        drv.absence = lambda: self.chance.choice([0, 1, 2, 5, 20])
        for name in ("breathe", "order", "succeed"):
            setattr(drv, name, self._noted(getattr(drv, name)))
        drv.start()
        self.guest = Guest(drv)
        self._send, self.guest.transmit = self.guest.transmit, self._transmit  # type: ignore
        self._take, self.guest.dispatch = self.guest.dispatch, self._dispatch  # type: ignore
        self.guest.resolve()
        self.conversations = self.kernel.witness = Conversations(self, PAIRS)

    @property
    def now_ms(self) -> int:
        return self.kernel.now_ns // MS

    # --- what happens ---

    def run(self) -> None:
        """All connections and conversations, from their beginning to their end."""
        self.accepted = listen(self.guest, GUEST_PORT, tso=False)
        self._forward()
        for number in range(self.chance.randrange(2, 6)):
            self._begin(number)
        for _ in range(TURNS_MAX):
            self._turn()
            over = all(talk.over for talk in self.talks) and self.conversations.over
            missed = self.late or self.drv.absent  # a successor closes what the dead one had left
            if over and not missed and not self.drv.flow_indexes():
                self._check_the_end()
                return
        lines = [
            f"{talk.tcp} {talk.told}/{len(talk.down)} {len(talk.inbox)}/{len(talk.up)}"
            for talk in self.talks
        ]
        raise AssertionError(f"not over after {TURNS_MAX} turns: {lines}")

    def _begin(self, number: int) -> None:
        down, pace = self.chance.choice([(60_000, 5000), (60_000, 5000), (4000, 200)])
        talk = Talk(
            self.chance.randbytes(self.chance.randrange(1, 12_000)),
            self.chance.randbytes(self.chance.randrange(1, down)),
            pace,
        )
        self.talks.append(talk)
        if self.chance.random() < 0.6:
            port = 1000 + number
            self.by_port[port] = talk
            talk.tcp = Tcp(self.guest, self.guest.gw4, port, pair=self.chance.randrange(PAIRS))
            self._prepare(talk)
            talk.tcp.open()
            talk.tcp.send(talk.up)
            talk.tcp.close()
        else:
            self._call(talk, 30_000 + number)

    def _call(self, talk: Talk, port: int) -> None:
        """A program connects to the guest, perhaps again, and begins with what it has to say."""
        talk.told, talk.finished = 0, False
        talk.sock = Sock(active=False)
        talk.sock.connected = True
        self.by_port[port] = talk
        self.kernel.backlog.append((talk.sock, HOST, port))
        os.eventfd_write(self.listener, 1)

    def _forward(self) -> None:
        """A listener, which is an eventfd that is written for each connection."""
        self.listener = os.eventfd(0, os.EFD_NONBLOCK)

        class Listening:
            fileno = lambda _, fd=self.listener: fd  # noqa: E731
            getsockname = lambda _: ("127.0.0.1", GUEST_PORT)  # noqa: E731

        self.drv.forward(Listening(), GUEST_PORT)  # type: ignore[arg-type]

    def _called(self, sock: Sock, port: int) -> None:
        """A worker connects a socket to a program."""
        talk = self.by_port[port]
        if talk.sock is not None and not talk.sock.error and talk.sock.connected:
            raise AssertionError("connected twice")
        talk.sock = sock

    def _prepare(self, talk: Talk) -> None:
        tcp = talk.tcp
        assert tcp is not None
        tcp.late = self.delays > 0
        tcp.lose_tx = lambda seq, data: self.chance.random() < self.losses
        tcp.lose_rx = lambda packet: bool(packet.payload) and self.chance.random() < self.losses

    # --- the way of a frame: at once, or late and overtaken by others ---

    def _sometimes_late(self, action: Callable[[], None]) -> None:
        if self.talks and self.chance.random() < self.delays:  # not before the day has begun
            self.late.append((self.now_ms + self.chance.randrange(1, LATE_MS), action))
        else:
            action()

    def _transmit(self, frame: bytes, *, pair: int = 0, **how: Any) -> None:
        """In place of Guest.transmit."""
        talk = self._talk_of(frame, 36)

        def send() -> None:
            self.kernel.note(b"%d " % pair + frame)
            self._send(frame, pair=pair, **how)
            if talk is not None:
                self._sent_on(talk, pair)

        if isinstance(talk, Talk) and frame[47] & (pk.SYN | pk.ACK) == pk.SYN:
            send()  # after the end of its connection it would begin another one
        else:
            self._sometimes_late(send)

    def _talk_of(self, frame: bytes, port_at: int) -> Talk | Conversation | None:
        """Whose frame this is, by the port of the program."""
        if frame[12:14] != b"\x08\0" or frame[23] != pk.TCP:
            return self.conversations.of_frame(frame, port_at) if self.talks else None
        return self.by_port.get(int.from_bytes(frame[port_at : port_at + 2], "big"))

    def _dispatch(self, pair: int, header: VnetHeader, frame: bytes) -> None:
        """In place of Guest.dispatch. A frame is judged when the driver takes it, late or not."""
        self.kernel.note(b"%d " % pair + frame)
        self._came(frame, header, pair)
        self._sometimes_late(lambda: self._take(pair, header, frame))

    def _deliver_late(self) -> None:
        due = [action for at_ms, action in self.late if at_ms <= self.now_ms]
        self.late = [(at_ms, action) for at_ms, action in self.late if at_ms > self.now_ms]
        for action in due:
            action()

    # --- a turn ---

    def _turn(self) -> None:
        steps = [self._guest_acts, self._programs, self._deliver_late]
        steps += [lambda n=n: self._breathe(n) for n in range(self.count)]  # type: ignore[misc]
        self.chance.shuffle(steps)
        for step in steps[: self.chance.randrange(1, len(steps) + 1)]:
            step()
        self._take_accepted()
        self._disturb()
        self._pass_time()

    def _guest_acts(self) -> None:
        self.conversations.say()
        blinks = self.chance.random() < self.blinks
        seen = self.chance.randrange(PAIRS) if blinks else PAIRS
        self.guest.serving = self.chance.sample(range(PAIRS), seen) if blinks else [*range(PAIRS)]
        self.guest._step()
        if not blinks:
            self._acted(self.count)

    def _breathe(self, worker: int) -> None:
        restarts = self.drv.counter("restarts", worker)
        self.drv.breathe(worker)
        if worker not in self.drv.absent and self.drv.counter("restarts", worker) == restarts:
            self._acted(worker)

    def _noted(self, act: Callable[..., int]) -> Callable[..., int]:
        """What a worker does, with a note of who it is."""

        def noted(worker: int, *arguments: Any) -> int:
            before, self.acting = self.acting, (worker, self.acting[1] + 1)
            result = act(worker, *arguments)
            self.acting = (before[0], self.acting[1])
            return result

        return noted

    def _acted(self, who: int) -> None:
        self.acted.add(who)
        if len(self.acted) == self.count + 1:
            self.acted.clear()
            self.rounds_ms.append(self.now_ms)

    def _take_accepted(self) -> None:
        while self.accepted:
            tcp = self.accepted.pop()
            talk = self.by_port[tcp.rport]
            if talk.tcp is not None:
                continue  # the same connection: its SYN came twice
            talk.tcp = tcp
            self._prepare(talk)
            tcp.send(talk.up)
            tcp.close()

    def _programs(self) -> None:
        """Every program reads and writes a little."""
        self.conversations.answer()
        for talk in self.talks:
            sock = talk.sock
            if sock is None:
                continue
            if sock.error and talk.tcp is None:
                self._call(talk, self.chance.randrange(30_000, 40_000))
                continue
            if not sock.connected and sock.called and self.chance.random() < 0.5:
                sock.connected = True
                sock.edge()
            if not sock.connected:
                continue
            assert not sock.error, f"the host's end got an error: {sock.error}"
            talk.inbox += sock.fetch(self.chance.choice([0, 100, 3000]))
            assert talk.up.startswith(bytes(talk.inbox)), "the stream at the host differs"
            end = talk.told + self.chance.choice([0, talk.pace // 10, talk.pace])
            talk.told += sock.deliver(talk.down[talk.told : end])
            if talk.told == len(talk.down) and not talk.finished:
                talk.finished = True
                sock.finish()

    def _disturb(self) -> None:
        for talk in self.talks:
            if talk.tcp is not None and talk.tcp.state == "established":
                if self.chance.random() < self.hops:
                    talk.tcp.pair = self.chance.choice(sorted(self.enabled[-1][1]))
                    talk.tcp.send_ack()
        self.conversations.hop(sorted(self.enabled[-1][1]))
        if self.chance.random() < self.kills and self.kernel.die_at <= self.kernel.calls:
            self.kernel.die_at = self.kernel.calls + self.chance.randrange(1, 80)
            self.deaths += 1
        if self.hops and self.chance.random() < 0.01:
            pairs = set(self.chance.sample(range(PAIRS), self.chance.randrange(1, PAIRS + 1)))
            self._enabled(pairs)
            self.drv.enable_pairs(sorted(pairs))
        if self.count > 1 and self.hops and self.chance.random() < 0.005:
            pair, enabled = self.chance.randrange(PAIRS), self.enabled[-1][1]
            self._enabled(enabled - {pair})
            self._enabled(enabled)
            self.drv.assign(pair, self.chance.randrange(self.count))

    def _enabled(self, pairs: set[int]) -> None:
        self.enabled.append((self.round, pairs))
        for talk in self.talks:
            talk.came_right = None
            talk.strays.clear()

    def _pass_time(self) -> None:
        """A little, or, when nobody has anything to do, until somebody has."""
        under_way = (
            self.drv.busy_any()
            or self.kernel.has_news({one.context.view["epfd"] for one in self.drv.workers})
            or self.drv._crossing((0, 1))
            or any(
                self.drv.rx(pair).ring.pending() or self.drv.tx(pair).ring.chains
                for pair in range(PAIRS)
            )
        )
        idle = not under_way and self.chance.random() < 0.3
        due_ms = [expiry.next_ms(one.context.view["wheel"]) for one in self.drv.workers]
        due_ms = [one for one in due_ms if one >= 0]
        timers = [one for end in self.guest.endpoints.values() if (one := end.deadline())]
        due_ms += [int(1000 * one) for one in timers] + [at_ms for at_ms, _ in self.late]
        due_ms += self.conversations.due_ms()
        step_ms = self.chance.choice([0, 0, 1, 3, 12])
        if idle and due_ms:
            step_ms = max(min(due_ms) - self.now_ms, 1)
        self.kernel.now_ns += min(step_ms, 300) * MS

    def _wait_calls(self, queues: Any, timeout: float, extra: Any = ()) -> None:
        """What waits in Guest.pump: all workers breathe, and a millisecond passes."""
        for number in range(self.count):
            self.drv.breathe(number)
        self.kernel.now_ns += MS

    # --- what must hold ---

    @property
    def round(self) -> int:
        return len(self.rounds_ms)

    def _sent_on(self, talk: Talk | Conversation, pair: int) -> None:
        """The guest has sent a frame: what counted before counts until this one has been seen."""
        talk.sent_on(self.round, pair)
        if isinstance(talk, Talk):
            talk.strays.pop(pair, None)

    def _came(self, frame: bytes, header: VnetHeader, pair: int) -> None:
        """A frame has come to the guest."""
        talk = self._talk_of(frame, 34)
        if isinstance(talk, Conversation):
            self.conversations.came(talk, frame, header, pair)
            return
        recent = [pairs for since, pairs in self.enabled if since >= self.round - ROUNDS]
        before = [pairs for since, pairs in self.enabled if since < self.round - ROUNDS]
        enabled = set().union(*recent, *before[-1:])
        assert pair in enabled, f"on pair {pair}, which is not enabled: {pk.parse(frame, header)}"
        if talk is None or not talk.sent:
            return
        self.frames += talk.hopped
        right = talk.right(self.round, ROUNDS)
        if not right <= enabled.intersection(*recent, *before[-1:]):
            talk.came_right = None
            talk.strays.clear()
            return
        self.judged += talk.hopped and right < enabled
        if right != talk.judged_by:
            talk.judged_by, talk.came_right = right, None
        if pair in right:
            talk.came_right = self.round if talk.came_right is None else talk.came_right
        else:
            why = self._strayed(talk, pair)
            assert not why, f"on {pair}, not {right}: {why}: {pk.parse(frame, header)}"

    def _strayed(self, talk: Talk, pair: int) -> str:
        """Why a frame may not come on a queue that was left; nothing if it may."""
        if talk.came_right is not None and talk.came_right + ROUNDS < self.round:
            return "the stream had changed"
        since_ms = talk.strays.setdefault(pair, self.now_ms)
        made_ms = self.rounds_ms[self.round - ROUNDS]
        return "too long" if made_ms > since_ms + steer.STRAY_MAX_MS else ""

    def _check_the_end(self) -> None:
        for talk in self.talks:
            assert talk.tcp is not None and bytes(talk.inbox) == talk.up
            assert bytes(talk.tcp.received) == talk.down, "the stream at the guest differs"
            # The guest's last segments may be overtaken by the end of the flow: RFC 9293 3.10.7.1.
            # An ACK may overtake the SYN,ACK before it: a segment to be ignored (3.10.7.3).
            late = ("RST at", "not an answer to our SYN") if self.delays else ("RST at",)
            talk.tcp.faults = [one for one in talk.tcp.faults if not one.startswith(late)]
            talk.tcp.check()
        self.conversations.check_the_end()
        assert self.drv.flow_count() == 0, "a gauge is wrong"
        left = [sock for sock in self.kernel.socks.values() if sock.connected]
        assert not left, f"{len(left)} sockets nobody closed"

    def close(self) -> None:
        self.kernel.die_at = 0
        self.drv.close()
        os.close(self.listener)
