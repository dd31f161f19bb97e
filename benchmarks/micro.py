"""`python -m benchmarks.micro`: what the parts of a breath cost, one number each.

Theory      A worker in this process, its guest memory a memfd, its transmit ring filled by hand
            with 64-byte datagrams that policy drops (--no-udp): what is left is ring, chains,
            parsing and lookup. Rings of both formats, table, timers and checksum are called in
            compiled loops: "pop" is to see a chain and walk it, "push" to return one and its share
            of showing RING_BATCH of them.
Honesty     Best of ROUNDS rounds: what the code costs when nothing is in its way. The lookups go
            through keys at random, so large tables show the caches. Timers have random delays up to
            LIFE_MS, their flows lie anywhere in the table; the clock jumps to what is due next.
Larger      A table's size is compiled in (schema.FLOWS_MAX, 131 072). To look among a million a
            process of its own compiles one of LARGER_FLOWS_MAX: what the same code costs there.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from ipaddress import IPv4Address

import numba
import numpy as np

from benchmarks import lab
from dataplane import checksum, commands, virtq
from dataplane.breath import breathe
from dataplane.context import CHAIN_IOV_MAX, RING, VNET_BYTES
from dataplane.worker import Worker
from flows import expiry, table
from shm import schema
from shm.layout import View
from shm.segment import Segment

ROUNDS = 5
NUM = 256
FRAME_BYTES = 64
FLOWS = (10, 1_000, 10_000, 100_000)
MILLION, LARGER_FLOWS_MAX = 1_000_000, 1 << 21
LARGER = """
from shm import schema
schema.FLOWS_MAX, schema.BUCKETS = {flows_max}, {flows_max} // schema.BUCKET_SLOTS
from benchmarks import micro
print(micro.lookup_ns({count}))
"""
LOOKUPS = TIMERS = 100_000
LIFE_MS = 120_000
BURSTS = (1, 16, 64)
BREATHS = 20_000
RING_BATCH, RING_TIMES = 64, 20_000
PACKED, PACKED_BASE, PACKED_AVAILABLE = 1 << 34, 0x8000, 1 << 7
MEMORY_BYTES = 1 << 20
DESC, AVAIL, USED, FRAMES = 0, 1 << 13, 1 << 14, 1 << 16
NO_PLACE = 1 << 40  # guest addresses begin here
GUEST, GATEWAY = IPv4Address("10.0.0.2"), IPv4Address("10.0.0.1")
UDP = schema.PROTOCOLS.index("udp")


@numba.njit(error_model="numpy")
def sum_often(address, size, times):
    """Checksum the same bytes many times."""
    total = 0
    for _ in range(times):
        total += checksum.partial(address, size)
    return total


@numba.njit(error_model="numpy")
def find_often(t, keys, count, passes):
    """Look every key up so many times; how often one was found."""
    found = 0
    for _ in range(passes):
        for number in range(count):
            found += table.find(t, keys + number * table.KEY_BYTES) >= 0
    return found


@numba.njit(error_model="numpy")
def claim_all(t, keys, count):
    """Make a flow for every key; how many got one."""
    made = 0
    for number in range(count):
        made += table.claim(t, keys + number * table.KEY_BYTES, 0, 0) >= 0
    return made


@numba.njit(error_model="numpy")
def arm_all(x, flows, deadlines_ms):
    """Set the timers of these flows."""
    for index in flows:
        expiry.arm(x, index, deadlines_ms[index])


@numba.njit(error_model="numpy")
def expire_often(x, deadlines_ms, delays_ms, times):
    """Have so many timers fall due, each set anew when it has. How often a flow was looked at: too
    early, too, because its slot is wider than the time it has left."""
    looks, fallen = 0, 0
    while fallen < times:
        now_ms = expiry.next_ms(x)
        index = expiry.due(x, now_ms)
        while index >= 0:
            looks += 1
            if deadlines_ms[index] <= now_ms:
                deadlines_ms[index] = now_ms + delays_ms[fallen % len(delays_ms)]
                fallen += 1
            expiry.arm(x, index, deadlines_ms[index])
            index = expiry.due(x, now_ms)
    return looks


@numba.njit(error_model="numpy")
def pop_often(w, r, iov, batch, times):
    """See and walk the next `batch` chains, again and again; how many pieces they had."""
    pieces = 0
    for _ in range(times):
        for ahead in range(batch):
            if virtq.ready(r, ahead) > 0:
                pieces += virtq.walk(w, r, ahead, iov, CHAIN_IOV_MAX, 0)
    return pieces


@numba.njit(error_model="numpy")
def push_often(r, scratch, batch, times):
    """Return `batch` chains and show them, again and again."""
    for _ in range(times):
        for number in range(batch):
            virtq.put_used(r, number, 0, 1)
        virtq.publish(r, scratch)


def best_s(work: Callable[[], object]) -> float:
    """Seconds of the fastest of ROUNDS runs, after one that compiles."""
    work()
    taken = []
    for _ in range(ROUNDS):
        start_s = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start_s)
    return min(taken)


def address_of(buffer: mmap.mmap) -> int:
    """Where a mapping lies."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def memory_file(size: int) -> int:
    """A descriptor of memory that is shared."""
    fd = os.memfd_create("micro")
    os.ftruncate(fd, size)
    return fd


def datagram(sport: int, dport: int) -> bytes:
    """A datagram of the guest for its gateway, in an Ethernet frame of FRAME_BYTES, and the header
    virtio has before that."""
    udp = struct.pack(">HHHH", sport, dport, FRAME_BYTES - 34, 0).ljust(FRAME_BYTES - 34, b"\0")
    fields = (0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0, GUEST.packed, GATEWAY.packed)
    ip = bytearray(struct.pack(">BBHHHBBH4s4s", *fields))
    total = sum(struct.unpack(">10H", ip))
    total = (total & 0xFFFF) + (total >> 16)
    ip[10:12] = struct.pack(">H", ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF)
    return bytes(VNET_BYTES) + b"\2\0\0\0\0\1\2\0\0\0\0\2\x08\0" + ip + udp


def begin(
    worker: Worker, features: int, region: commands.MapRegion, fd: int, ring: commands.SetRing
) -> None:
    """Give a worker memory, which `fd` is, and one ring."""
    for command, fds in (
        (commands.SetFeatures(features), []),
        (region, [fd]),
        (commands.SetRegions((region.number,)), []),
        (ring, [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(3)]),
    ):
        done = worker.carry_out(command, fds)
        if not isinstance(done, commands.Done):
            raise RuntimeError(f"the worker refused {command}: {done}")


def memory_of(size: int) -> mmap.mmap:
    """Memory in pages like those of a segment, which anonymous memory need not have."""
    fd = memory_file(size)
    try:
        return mmap.mmap(fd, size)
    finally:
        os.close(fd)


class Bench:
    """A worker with one transmit ring, and the guest's memory."""

    def __init__(self, packed: bool = False) -> None:
        self.packed = packed
        self.segment = Segment(f"/vhostmq-micro-{os.getpid()}", 1, create=True)
        self.segment.unlink()
        net = View(schema.NET, self.segment.buffer, self.segment.offsets.net)
        net["no_udp"], net["mtu"] = 1, 1500
        self.inbox = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        inbox, sending = (end.fileno() for end in self.inbox)
        wires = commands.Wires((os.eventfd(0, os.EFD_NONBLOCK),), (sending,), inbox)
        self.worker = Worker(self.segment, 0, 1, wires)
        self.w = self.worker.context.address
        fd = memory_file(MEMORY_BYTES)
        self.memory = mmap.mmap(fd, MEMORY_BYTES)
        self.avail = 0
        self._write_frames()
        region = commands.MapRegion(0, NO_PLACE, MEMORY_BYTES, NO_PLACE, 0)
        ring = commands.SetRing(
            index=1, num=NUM, desc_uva=NO_PLACE + DESC, avail_uva=NO_PLACE + AVAIL,
            used_uva=NO_PLACE + USED, base=PACKED_BASE if packed else 0, enabled=True,
            has_kick=True, has_call=True, has_err=True,
        )  # fmt: skip
        begin(self.worker, PACKED if packed else 0, region, fd, ring)
        self.ring = self.worker.context.ring(1)
        self.ring_address = self.worker.context.view["rings"] + RING.size

    def _write_frames(self) -> None:
        """Descriptors that name a datagram each; the available ring names them in turn. The guest
        wants no calls."""
        frame = datagram(5000, 5001).ljust(VNET_BYTES + FRAME_BYTES, b"\0")
        for index in range(NUM):
            at = FRAMES + 2048 * index
            self.memory[at : at + len(frame)] = frame
            words = (index, PACKED_AVAILABLE) if self.packed else (0, 0)
            struct.pack_into(
                "<QIHH", self.memory, DESC + 16 * index, NO_PLACE + at, len(frame), *words
            )
            if not self.packed:
                struct.pack_into("<H", self.memory, AVAIL + 4 + 2 * index, index)
        flags = AVAIL + 2 if self.packed else AVAIL  # of struct pvirtq_event_suppress, virtq_avail
        struct.pack_into("<H", self.memory, flags, 1)

    def close(self) -> None:
        """Give all memory back; others of this process may get its addresses."""
        for command in (commands.StopRing(1), commands.SetRegions(())):
            self.worker.carry_out(command, [])
        self.worker.epoll.close()
        self.worker.context.close()

    def breaths(self, burst: int) -> None:
        """BREATHS breaths, each of which finds `burst` datagrams."""
        for _ in range(BREATHS):
            self.avail = (self.avail + burst) & 0xFFFF
            struct.pack_into("<H", self.memory, AVAIL + 2, self.avail)
            self.ring["pending"] = 1
            breathe(self.w, 0, 1)

    def dropped(self) -> int:
        """How many were dropped for policy so far."""
        base = self.segment.offsets.queue + schema.QUEUE.size
        counters = View(schema.QUEUE, self.segment.buffer, base)
        return counters.element("drops", schema.DROP["policy"])


def keys(count: int) -> mmap.mmap:
    """Flow keys of `count` UDP conversations."""
    chosen = random.Random(1)
    area = mmap.mmap(-1, count * table.KEY_BYTES)
    for number in range(count):
        guest = bytes(10) + b"\xff\xff" + bytes([10, 0, 0, 2])
        far = bytes(10) + b"\xff\xff" + chosen.randbytes(4)
        ports = struct.pack("<HHI", 1024 + number % 60000, chosen.randrange(1, 65536), UDP)
        at = number * table.KEY_BYTES
        area[at : at + table.KEY_BYTES] = guest + far + ports
    return area


def numbers() -> dict[str, float]:
    """Every number by what it is of."""
    found, area = {}, mmap.mmap(-1, 1 << 16)
    for size in (1460, 65000):
        taken_s = best_s(lambda size=size: sum_often(address_of(area), size, 2000))  # type: ignore
        found[f"checksum_{size}_gb_s"] = 2000 * size / taken_s / 1e9
    with closing(Bench()) as bench:
        for burst in BURSTS:
            before = bench.dropped()
            taken_s = best_s(lambda burst=burst: bench.breaths(burst))  # type: ignore[misc]
            dropped = bench.dropped() - before
            assert dropped == (ROUNDS + 1) * BREATHS * burst, "not all were dropped"
            found[f"breath_{burst}_ns"] = taken_s / BREATHS * 1e9
    for name, packed in (("split", False), ("packed", True)):
        for part, taken_ns in zip(("pop", "push"), ring_ns(packed), strict=True):
            found[f"{name}_{part}_ns"] = taken_ns
    for count in FLOWS:
        found[f"lookup_{count}_ns"] = lookup_ns(count)
        found[f"timer_{count}_ns"] = timer_ns(count)
    found[f"lookup_{MILLION}_ns"] = lookup_in_larger_ns(MILLION)
    return found


def ring_ns(packed: bool) -> tuple[float, float]:
    """Seeing and walking a chain of one buffer, and returning one."""
    with closing(Bench(packed)) as bench:
        bench.avail = RING_BATCH
        struct.pack_into("<H", bench.memory, AVAIL + 2, 1 if packed else bench.avail)
        w, r = bench.w, bench.ring_address
        iov, scratch = (bench.worker.context.view[name] for name in ("chain_iov", "option"))
        pieces = pop_often(w, r, iov, RING_BATCH, 1)
        assert pieces == RING_BATCH, f"{pieces} chains of {RING_BATCH} were found"
        pop_s = best_s(lambda: pop_often(w, r, iov, RING_BATCH, RING_TIMES))
        push_s = best_s(lambda: push_often(r, scratch, RING_BATCH, RING_TIMES))
        chains = RING_BATCH * RING_TIMES
        return pop_s / chains * 1e9, push_s / chains * 1e9


def lookup_ns(count: int) -> float:
    """Finding a flow among `count`, in passes over all keys that make LOOKUPS at least."""
    parts = {
        "tags": 4 * schema.FLOWS_MAX,
        "locks": 4 * schema.BUCKETS,
        "flows": schema.FLOW.size * schema.FLOWS_MAX,
    }
    areas, own = {name: memory_of(size) for name, size in parts.items()}, memory_of(mmap.PAGESIZE)
    view = View(table.TABLE, own, 0)
    for name, area in areas.items():
        view[name] = address_of(area)
    t, made, passes = address_of(own), keys(count), max(LOOKUPS // count, 1)
    assert claim_all(t, address_of(made), count) > 0.99 * count
    taken_s = best_s(lambda: find_often(t, address_of(made), count, passes))
    return taken_s / count / passes * 1e9


def lookup_in_larger_ns(count: int) -> float:
    """The same in a table of LARGER_FLOWS_MAX."""
    program = LARGER.format(flows_max=LARGER_FLOWS_MAX, count=count)
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=lab.ROOT, stdout=subprocess.PIPE, check=True)
    return float(done.stdout)


def timer_ns(count: int) -> float:
    """Setting one timer among `count`, and its falling due."""
    chosen = np.random.default_rng(1)
    start_ms = time.monotonic_ns() // 1_000_000
    deadlines_ms = np.zeros(schema.FLOWS_MAX, np.int64)
    flows = chosen.permutation(schema.FLOWS_MAX)[:count]
    delays_ms = chosen.integers(1, LIFE_MS, TIMERS)
    deadlines_ms[flows] = start_ms + delays_ms[:count]
    with closing(Bench()) as one:
        x = one.worker.context.view["wheel"]
        arm_all(x, flows, deadlines_ms)
        taken_s = best_s(lambda: expire_often(x, deadlines_ms, delays_ms, TIMERS))
        return taken_s / TIMERS * 1e9


def main() -> None:
    """Measure and print."""
    for name, value in numbers().items():
        print(f"{name} {value:.4g}")


if __name__ == "__main__":
    main()
