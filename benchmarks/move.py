"""move.py - what it costs to give a flow to another worker (dataplane/rehome.py), and a frame.

Theory      Two workers in this process, a transmit ring for each, FLOWS conversations of datagrams
            that one of them has. The guest sends a datagram of each on the other's ring: it crosses
            by the hand-off ring. It does so again, and either the flows have not settled there, and
            cross once more, or they have, and move. The difference is what moving costs both
            workers: seven system calls, and the work around them. What crossing costs is the
            difference to datagrams that the guest sends where the flows are.
Honesty     Best of ROUNDS, the ways in turn. Nobody reads what is sent: the receiver's socket is
            full.
Limits      The time a flow needs to settle is not waited for: its moments are moved into the past.
"""

from __future__ import annotations

import itertools
import mmap
import os
import socket
import struct
import time
from collections.abc import Iterator
from types import SimpleNamespace

from benchmarks.micro import (
    FRAMES,
    GATEWAY,
    GUEST,
    MEMORY_BYTES,
    NO_PLACE,
    begin,
    datagram,
    memory_file,
)
from control import netblock
from dataplane import commands
from dataplane.breath import breathe
from dataplane.slow.net import Net
from dataplane.worker import Worker
from flows import steer, table
from shm import schema
from shm.layout import View
from shm.segment import Segment

FLOWS, ROUNDS, BREATHS = 32, 50, 4
NUM, RING_BYTES = 64, 1 << 14
AVAIL, USED = 1 << 12, 1 << 13
OPTIONS = SimpleNamespace(no_tcp=False, no_udp=False, no_icmp=False)


class Bench:
    """Two workers, a ring each, and the guest that fills them."""

    def __init__(self) -> None:
        self.sink = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sink.bind(("127.0.0.1", 0))
        self.segment = Segment(f"/vhostmq-move-{os.getpid()}", 2, create=True)
        self.segment.unlink()
        net = Net(addr4=GUEST, prefix4=24, gateway4=GATEWAY, map_host_loopback4=GATEWAY)
        netblock.fill(self.segment, net, OPTIONS)
        instance = View(schema.INSTANCE, self.segment.buffer, self.segment.offsets.instance)
        instance["pairs"], instance["rx_enabled"] = 2, 0b11
        instance.set_element("pair_worker", 1, 1)
        wakes = tuple(os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2))
        self.inboxes = [socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(2)]
        for end in itertools.chain(*self.inboxes):
            end.setblocking(False)
        sending = tuple(theirs.fileno() for theirs, _ in self.inboxes)
        self.workers = [
            Worker(self.segment, n, 2, commands.Wires(wakes, sending, self.inboxes[n][1].fileno()))
            for n in range(2)
        ]
        self.file = memory_file(MEMORY_BYTES)
        self.memory = mmap.mmap(self.file, MEMORY_BYTES)
        self.sent = [0, 0]
        for number, worker in enumerate(self.workers):
            self._start(number, worker)

    def _start(self, number: int, worker: Worker) -> None:
        """A transmit ring whose every chain is a datagram of another flow."""
        at = number * RING_BYTES
        for index in range(NUM):
            place = FRAMES + 2048 * index
            frame = datagram(1000 + index % FLOWS, self.sink.getsockname()[1])
            self.memory[place : place + len(frame)] = frame
            words = (NO_PLACE + place, len(frame), 0, 0)
            struct.pack_into("<QIHH", self.memory, at + 16 * index, *words)
            struct.pack_into("<H", self.memory, at + AVAIL + 4 + 2 * index, index)
        struct.pack_into("<H", self.memory, at + AVAIL, 1)  # no calls wanted
        ring = commands.SetRing(
            index=2 * number + 1, num=NUM, desc_uva=NO_PLACE + at,
            avail_uva=NO_PLACE + at + AVAIL, used_uva=NO_PLACE + at + USED, base=0, enabled=True,
            has_kick=True, has_call=True, has_err=True,
        )  # fmt: skip
        region = commands.MapRegion(0, NO_PLACE, MEMORY_BYTES, NO_PLACE, 0)
        begin(worker, 0, region, os.dup(self.file), ring)

    def send(self, pair: int) -> float:
        """A datagram of each flow on a pair's ring; the seconds until all is done about them."""
        self.sent[pair] = (self.sent[pair] + FLOWS) & 0xFFFF
        struct.pack_into("<H", self.memory, pair * RING_BYTES + AVAIL + 2, self.sent[pair])
        self.workers[pair].context.ring(2 * pair + 1)["pending"] = 1
        start_s = time.perf_counter()
        for number in (pair, 1 - pair, pair):
            breathe(self.workers[number].context.address, 0, BREATHS)
        return time.perf_counter() - start_s

    def flows(self) -> Iterator[View]:
        """Every entry in use."""
        for number in range(2):
            yield from table.of_worker(self.segment.buffer, self.segment.offsets, number)

    def moved(self) -> int:
        """How many flows have moved so far."""
        blocks = (self.segment.offsets.worker + n * schema.WORKER.size for n in range(2))
        return sum(schema.WORKER.get(self.segment.buffer, at, "rehomed_flows") for at in blocks)

    def settle(self, for_ms: int) -> None:
        """All flows have been where they are for so long, and have never moved."""
        then_ms = (time.monotonic_ns() // 1_000_000 - for_ms - 1) | 1
        for flow in self.flows():
            flow["away_ms"], flow["moved_ms"] = then_ms & 0xFFFFFFFF, 0

    def close(self) -> None:
        """Give all back."""
        for number, worker in enumerate(self.workers):
            worker.carry_out(commands.StopRing(2 * number + 1), [])
            worker.carry_out(commands.SetRegions(()), [])
            for flow in list(table.of_worker(self.segment.buffer, self.segment.offsets, number)):
                os.close(flow["fd"])
            worker.epoll.close()
            worker.context.close()
        os.close(self.file)
        self.sink.close()


def costs_us() -> dict[str, float]:
    """Microseconds of both workers for a flow that moves, and for a small frame that crosses."""
    bench, home, best = Bench(), 0, {"stayed": 1.0, "crossed": 1.0, "moved": 1.0}
    try:
        bench.send(home)
        assert len(list(bench.flows())) == FLOWS, "not every datagram opened a flow"
        for _ in range(ROUNDS):
            other, before = 1 - home, bench.moved()
            best["stayed"] = min(best["stayed"], bench.send(home))
            bench.send(other)
            bench.settle(0)
            best["crossed"] = min(best["crossed"], bench.send(other))
            assert bench.moved() == before, "flows moved that had not settled"
            bench.settle(steer.SETTLED_MS + 5)
            best["moved"] = min(best["moved"], bench.send(other))
            assert bench.moved() == before + FLOWS, "not every flow moved"
            home = other
    finally:
        bench.close()
    found = {"move": best["moved"] - best["crossed"], "cross": best["crossed"] - best["stayed"]}
    return {f"{name}_us": 1e6 * seconds / FLOWS for name, seconds in found.items()}
