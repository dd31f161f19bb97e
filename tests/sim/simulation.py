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
  every frame    to the guest comes on a pair that is enabled, or was a moment ago; and on one that
                 the guest was sending the flow on a moment ago, if any of those is enabled
  in the end     no flow is left, in the table or in the gauges, and no socket
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
from collections.abc import Callable
from typing import Any

import packets as pk
import pytest
from driver import BASIC, GUEST_CSUM, IN_ORDER, MQ, RING_PACKED
from guest import Guest
from inprocess import Local, spare_sockets
from minitcp import Tcp, listen
from packets import Packet, VnetHeader
from sim.kernel import Kernel, Sock

from dataplane.worker import Worker
from flows import expiry

PAIRS, MS = 4, 1_000_000
GUEST_PORT, HOST = 8080, b"\x7f\0\0\1"
MOMENT_MS = 250  # in which what is on its way arrives, deaths and moves included
LATE_MS = 30
TURNS_MAX = 30_000


class Here:
    """A world without a network of its own: everything happens in this thread."""

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)


@dataclasses.dataclass
class Talk:
    """One connection: the guest's end, the program's, and what each has to say."""

    up: bytes
    down: bytes
    tcp: Tcp | None = None
    sock: Sock | None = None
    inbox: bytearray = dataclasses.field(default_factory=bytearray)
    told: int = 0
    finished: bool = False
    queues: list[tuple[int, int]] = dataclasses.field(default_factory=list)  # since when, which
    spoke_ms: int = 0  # when the guest last sent a packet of it

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
        self.talks: list[Talk] = []
        self.by_port: dict[int, Talk] = {}
        self.enabled: list[tuple[int, set[int]]] = [(self.now_ms, set(range(PAIRS)))]
        self.deaths = 0
        self.hops = self.chance.choice([0.0, 0.01, 0.1])
        self.losses = self.chance.choice([0.0, 0.0, 0.01])
        self.delays = self.chance.choice([0.0, 0.0, 0.02, 0.1])
        self.late: list[tuple[int, Callable[[], None]]] = []  # due when, what
        self.speaking: Talk | None = None
        self.kills = self.chance.choice([0.0, 0.02, 0.1])
        rings = self.chance.choice([0, RING_PACKED, IN_ORDER, RING_PACKED | IN_ORDER])
        self.count = self.chance.choice([1, 2, 3])
        features = BASIC | GUEST_CSUM | MQ | rings
        drv = Local(Here(), workers=self.count, pairs=PAIRS, features=features)  # type: ignore
        self.drv = drv
        drv.net["peek_offset"] = 1
        drv.wait_calls = self._wait_calls  # type: ignore[method-assign]
        drv._bury = self._bury  # type: ignore[method-assign]
        drv.start()
        self.guest = Guest(drv)
        self._send, self.guest.transmit = self.guest.transmit, self._transmit  # type: ignore
        self._take, self.guest.dispatch = self.guest.dispatch, self._dispatch  # type: ignore
        self.guest.resolve()

    @property
    def now_ms(self) -> int:
        return self.kernel.now_ns // MS

    # --- what happens ---

    def run(self) -> None:
        """All connections, from their beginning to their end."""
        self.accepted = listen(self.guest, GUEST_PORT, tso=False)
        self._forward()
        for number in range(self.chance.randrange(2, 6)):
            self._begin(number)
        for _ in range(TURNS_MAX):
            self._turn()
            over = all(talk.over for talk in self.talks) and not self.late
            if over and not self.drv.flow_indexes():
                self._check_the_end()
                return
        lines = [
            f"{talk.tcp} {talk.told}/{len(talk.down)} {len(talk.inbox)}/{len(talk.up)}"
            for talk in self.talks
        ]
        raise AssertionError(f"not over after {TURNS_MAX} turns: {lines}")

    def _begin(self, number: int) -> None:
        talk = Talk(
            self.chance.randbytes(self.chance.randrange(1, 12_000)),
            self.chance.randbytes(self.chance.randrange(1, 60_000)),
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
        """A program connects to the guest."""
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
        tcp.lose_tx = lambda seq, data: self.chance.random() < self.losses
        tcp.lose_rx = lambda packet: bool(packet.payload) and self.chance.random() < self.losses
        emit = tcp._emit

        def noted(*arguments: Any, **named: Any) -> None:
            self.speaking = talk
            emit(*arguments, **named)
            self.speaking = None

        tcp._emit = noted  # type: ignore[method-assign]
        talk.queues.append((self.now_ms, tcp.pair))

    # --- the way of a frame: at once, or late and overtaken by others ---

    def _sometimes_late(self, action: Callable[[], None]) -> None:
        if self.chance.random() < self.delays:
            self.late.append((self.now_ms + self.chance.randrange(1, LATE_MS), action))
        else:
            action()

    def _transmit(self, frame: bytes, *, pair: int = 0, **how: Any) -> None:
        """In place of Guest.transmit."""
        talk = self.speaking

        def send() -> None:
            self._send(frame, pair=pair, **how)
            if talk is not None:
                talk.spoke_ms = self.now_ms
                if talk.queues[-1][1] != pair:
                    talk.queues.append((self.now_ms, pair))

        self._sometimes_late(send)

    def _dispatch(self, pair: int, header: VnetHeader, frame: bytes) -> None:
        """In place of Guest.dispatch. A frame is judged when the driver takes it, late or not."""
        self._came(pk.parse(frame, header), pair)
        self._sometimes_late(lambda: self._take(pair, header, frame))

    def _deliver_late(self) -> None:
        due = [action for at_ms, action in self.late if at_ms <= self.now_ms]
        self.late = [(at_ms, action) for at_ms, action in self.late if at_ms > self.now_ms]
        for action in due:
            action()

    # --- a turn ---

    def _turn(self) -> None:
        steps = [self.guest._step, self._programs, self._deliver_late]
        steps += [lambda n=n: self.drv.breathe(n) for n in range(self.count)]  # type: ignore[misc]
        self.chance.shuffle(steps)
        for step in steps[: self.chance.randrange(1, len(steps) + 1)]:
            step()
        self._take_accepted()
        self._disturb()
        self._pass_time()

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
            part = talk.down[talk.told : talk.told + self.chance.choice([0, 500, 5000])]
            talk.told += sock.deliver(part)
            if talk.told == len(talk.down) and not talk.finished:
                talk.finished = True
                sock.finish()

    def _disturb(self) -> None:
        for talk in self.talks:
            if talk.tcp is not None and talk.tcp.state == "established":
                if self.chance.random() < self.hops:
                    talk.tcp.pair = self.chance.choice(sorted(self.enabled[-1][1]))
                    talk.tcp.send_ack()
        if self.chance.random() < self.kills and not self.kernel.die_after:
            self.kernel.die_after = self.chance.randrange(1, 80)
            self.deaths += 1
        if self.hops and self.chance.random() < 0.01:
            pairs = set(self.chance.sample(range(PAIRS), self.chance.randrange(1, PAIRS + 1)))
            self.enabled.append((self.now_ms, pairs))
            self.drv.enable_pairs(sorted(pairs))
        if self.count > 1 and self.hops and self.chance.random() < 0.005:
            pair, enabled = self.chance.randrange(PAIRS), self.enabled[-1][1]
            self.enabled += [(self.now_ms, enabled - {pair}), (self.now_ms, enabled)]
            self.drv.assign(pair, self.chance.randrange(self.count))

    def _pass_time(self) -> None:
        """A little, or, when nobody has anything to do, until somebody has."""
        under_way = (
            self.drv.busy_any()
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
        step_ms = self.chance.choice([0, 0, 1, 3, 12])
        if idle and due_ms:
            step_ms = max(min(due_ms) - self.now_ms, 1)
        self.kernel.now_ns += min(step_ms, 300) * MS

    def _bury(self, worker: Worker) -> None:
        """A worker has died: sockets that no flow has, and no other worker, are closed."""
        Local._bury(self.drv, worker)
        known = {flow["fd"] for flow in self.drv.flows()}
        block = self.drv.view_of(self.drv.workers.index(worker))
        known |= {block["parting_fd"]} if block["parting"] else set()
        for other in self.drv.workers:
            if other is not worker:
                known.update(spare_sockets(other))
        for fd in set(self.kernel.socks) - known:
            with contextlib.suppress(OSError):
                os.close(fd)
        self.kernel.sweep()

    def _wait_calls(self, queues: Any, timeout: float, extra: Any = ()) -> None:
        """What waits in Guest.pump: all workers breathe, and a millisecond passes."""
        for number in range(self.count):
            self.drv.breathe(number)
        self.kernel.now_ns += MS

    # --- what must hold ---

    def _came(self, packet: Packet, pair: int) -> None:
        """A frame has come to the guest."""
        recent = [pairs for since, pairs in self.enabled if since >= self.now_ms - MOMENT_MS]
        before = [pairs for since, pairs in self.enabled if since < self.now_ms - MOMENT_MS]
        allowed = set().union(*recent, *before[-1:])
        assert pair in allowed, f"a frame on pair {pair}, which is not enabled: {packet}"
        talk = next((t for t in self.talks if t.tcp and t.tcp.lport == packet.dport
                     and t.tcp.rport == packet.sport), None)  # fmt: skip
        if talk is None or talk.tcp is None:
            return
        # Of two packets on two queues the first may be looked at last: it counts until the next.
        lately_ms = talk.spoke_ms - MOMENT_MS
        used = [one for since, one in talk.queues if since >= lately_ms]
        used += [one for since, one in talk.queues if since < lately_ms][-1:]
        always = set(range(PAIRS)).intersection(*recent, *before[-1:])
        if set(used) <= always:
            assert pair in used, f"a frame on pair {pair}, sent on {used} lately: {packet}"

    def _check_the_end(self) -> None:
        for talk in self.talks:
            assert talk.tcp is not None and bytes(talk.inbox) == talk.up
            assert bytes(talk.tcp.received) == talk.down, "the stream at the guest differs"
            # The guest's last segments may be overtaken by the end of the flow: RFC 9293 3.10.7.1.
            talk.tcp.faults = [one for one in talk.tcp.faults if not one.startswith("RST at")]
            talk.tcp.check()
        assert self.drv.flow_count() == 0, "a gauge is wrong"
        left = [sock for sock in self.kernel.socks.values() if sock.connected]
        assert not left, f"{len(left)} sockets nobody closed"

    def close(self) -> None:
        self.kernel.die_after = 0
        self.drv.close()
        os.close(self.listener)
