"""traffic.py - verified traffic through a guest, and where it went.

Theory      Every transfer is checked by digest at both ends (xfer.c). Which queue pair carried it
            is read twice, independently: from the back-end's metrics and from the guest driver's
            own counters (`ethtool -S`). Linux picks the transmit queue by CPU (XPS), and RFS keeps
            the acknowledgements on the CPU of the process: a client pinned to CPU i is a client
            pinned to pair i.
Kills       What a killed worker costs is the longest stall of any connection in the time after it.
            xfer tells each stream's longest one and its moment; the same figure for moments at
            which nothing was killed says how much of that is the load's own: dozens of processes
            that hash, on a few CPUs.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass

from backends import Backend
from lab import XFER_PORT

from benchmarks import measure
from benchmarks.guest.guests import AgentGuest, Guest

MIB = 1 << 20
HOP_MS = 100  # how often xfer moves each of its streams to another CPU, where it is to


@dataclass(frozen=True)
class Stream:
    """What one connection of `xfer up|down` went through."""

    took_s: float
    stall_s: float  # the longest time without a byte
    stalled_at_s: float  # when that began, by the clock of where xfer ran
    hops: int  # to another CPU


def check_transfers(output: str, direction: str, size: int, streams: int) -> list[Stream]:
    """Assert that `xfer up|down` moved every byte of every stream, each stream's its own."""
    digests = set()
    lines = [line.split() for line in output.splitlines()]
    for words in lines:
        assert len(words) == 9 and words[0] == direction, f"xfer printed:\n{output}"
        assert int(words[2]) == size
        assert words[3] == words[4], f"stream {words[1]}: sent {words[3]}, received {words[4]}"
        digests.add(words[3])
    assert len(lines) == len(digests) == streams, f"xfer printed:\n{output}"
    return [Stream(*map(float, words[5:8]), int(words[8])) for words in lines]


def check_rounds(
    output: str, directions: tuple[str, ...], size: int, streams: int
) -> list[list[Stream]]:
    """The same for calls of xfer one after the other, in these directions by turns, each of which
    has had its turn; the streams of each call."""
    lines = output.splitlines()
    starts = range(0, len(lines), streams)
    assert len(starts) >= len(directions), f"xfer printed:\n{output}"
    return [
        check_transfers(
            "\n".join(lines[start : start + streams]),
            directions[number % len(directions)],
            size,
            streams,
        )
        for number, start in enumerate(starts)
    ]


def assert_hopped(rounds: list[list[Stream]]) -> None:
    """Streams went to another CPU every HOP_MS. One that ends between two hops has had less than
    its due, and a busy machine is late: hence the room below."""
    streams = [stream for round_ in rounds for stream in round_]
    due = sum(stream.took_s for stream in streams) * 1000 / HOP_MS
    hops = sum(stream.hops for stream in streams)
    assert 0.5 * due < hops < 1.1 * due, f"{hops} hops of {len(streams)} streams, {due:.0f} due"


def kill_workers(backend: Backend, kills: int, every_s: float, seed: int = 1) -> list[float]:
    """SIGKILL for a random worker, so often; the moments, by the machine's CLOCK_MONOTONIC."""
    chosen, moments = random.Random(seed), []
    for _ in range(kills):
        time.sleep(every_s)
        moments.append(time.monotonic())
        os.kill(chosen.choice(measure.workers(backend.process.pid)), signal.SIGKILL)
    time.sleep(every_s)
    return moments


def calm_moments(count: int, every_s: float) -> list[float]:
    """Moments at which nothing is done, as many seconds apart as kills are."""
    moments = []
    for _ in range(count):
        moments.append(time.monotonic())
        time.sleep(every_s)
    return moments


def longest_stalls(
    streams: Iterable[Stream], moments: list[float], within_s: float, clock_ahead_s: float = 0
) -> list[float]:
    """For each moment the longest stall, of any stream, that lay in or reached into the time after
    it; seconds. `clock_ahead_s` is what the streams' clock is ahead of that of the moments."""
    spans = [(one.stalled_at_s - clock_ahead_s, one.stall_s) for one in streams]
    return [
        max(
            (length for began, length in spans if moment - length < began < moment + within_s),
            default=0.0,
        )
        for moment in moments
    ]


def told(stalls: list[float]) -> str:
    """Median and maximum, for people."""
    median, longest = statistics.median(stalls), max(stalls)
    return f"median {1000 * median:.0f} ms, longest {1000 * longest:.0f} ms of {len(stalls)}"


def transfer(
    guest: Guest,
    direction: str,
    address: str,
    size: int,
    streams: int = 1,
    seed: int = 1,
    timeout_s: float = 60,
    hop_ms: int = 0,
) -> list[Stream]:
    """Move size bytes in each of some parallel streams between the guest and a server, perhaps
    streams that go to another CPU every so often."""
    command = f"xfer {direction} {address} {XFER_PORT} {size} {streams} {seed} {hop_ms}"
    return check_transfers(guest.check(command, timeout_s), direction, size, streams)


class Rounds:
    """Parallel transfers over and over, down and up in turn, from construction until end().

    The guest has /tmp/once when each way has had its turn."""

    def __init__(self, guest: AgentGuest, peer: str, size: int, streams: int) -> None:
        self.guest, self.size, self.streams = guest, size, streams
        ways = (f"xfer {way} {peer} {XFER_PORT} {size} {streams} 5" for way in ("down", "up"))
        body = f"{' && '.join(ways)} && touch /tmp/once || exit 1"
        guest.check("rm -f /tmp/enough /tmp/once")
        self.job = guest.start_job(f"while [ ! -e /tmp/enough ]; do {body}; done")

    def end(self, timeout_s: float = 120) -> list[Stream]:
        """Every stream, all of them whole."""
        self.guest.check("touch /tmp/enough")
        result = self.guest.wait_job(self.job, timeout_s)
        assert result.status == 0, result.output
        rounds = check_rounds(result.output, ("down", "up"), self.size, self.streams)
        return [stream for round_ in rounds for stream in round_]


def smoke(guest: Guest, addresses: tuple[str, ...], size: int = 4 * MIB) -> None:
    """A little of everything towards each address: ping, datagrams, both directions of TCP."""
    for address in addresses:
        guest.check(f"ping -c 3 -i 0.2 -W 2 {address}")
        guest.check(f"xfer udp {address} {XFER_PORT} 50 1000")
        for direction in ("up", "down"):
            transfer(guest, direction, address, size)


class PairCounters:
    """Packets and bytes of each pair since construction, by metrics and by the guest's driver."""

    def __init__(self, backend: Backend, guest: Guest, pairs: int) -> None:
        self.backend, self.guest, self.pairs = backend, guest, pairs
        self.metrics = backend.metrics()
        self.driver = self._driver()

    def _driver(self) -> dict[str, int]:
        lines = self.guest.check(f"ethtool -S {self.guest.interface}").splitlines()[1:]
        fields = (line.rsplit(":", 1) for line in lines)
        return {name.strip(): int(value) for name, value in fields}

    def since(self, unit: str, direction: str) -> dict[str, list[int]]:
        """unit ("packets", "bytes") per pair, as each side counted them. tx = guest to host."""
        grown = self.backend.metrics() - self.metrics
        driver = self._driver()
        names = [f"{direction}_queue_{pair}_{unit}" for pair in range(self.pairs)]
        pairs = range(self.pairs)
        name = f"vhostmq_{unit}_total"
        return {
            "metrics": [int(grown.value(name, queue=i, direction=direction)) for i in pairs],
            "driver": [driver.get(name, 0) - self.driver.get(name, 0) for name in names],
        }


def keep_pairs_on_cpus(guest: Guest, pairs: int) -> None:
    """Make a process pinned to CPU i use pair i; assert that XPS sends from CPU i on pair i.

    One interrupt serves all pairs, so RFS moves a packet to the CPU of the process that reads the
    socket: its acknowledgements leave from there, whichever pair the packet came on. RPS takes
    packets of flows that no process has read yet to the CPU of the pair.
    """
    queues = f"/sys/class/net/{guest.interface}/queues"
    guest.check("echo 4096 >/proc/sys/net/core/rps_sock_flow_entries")
    for pair in range(pairs):
        guest.check(f"echo {1 << pair:x} >{queues}/rx-{pair}/rps_cpus")
        guest.check(f"echo 1024 >{queues}/rx-{pair}/rps_flow_cnt")
        mask = int(guest.check(f"cat {queues}/tx-{pair}/xps_cpus"), 16)
        assert mask == 1 << pair, f"the guest's driver maps CPUs {mask:#x} to pair {pair}"
