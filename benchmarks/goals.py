"""goals.py - what vhostmq wants to reach, and whether a result does.

Theory      A goal is a ratio of two medians of one result: ours over passt's of the same case, or
            over another of our own; or it is for ours alone, and passt's stands beside it. Cases
            are found by the keys of their rows, so that this list is all that knows what is
            compared with what. One front-end never stands for another: each has its own line.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Result = dict[str, Any]
Case = dict[str, Any]

OURS = {"front_end": "vhostmq_guest", "back_end": "vhostmq", "pairs": 4, "workers": 2, "poll_us": 0}
ONE_PAIR = OURS | {"pairs": 1, "workers": 1}
PASST = {"front_end": "vhostmq_guest", "back_end": "passt"}
QEMU, QEMU_PASST, TAP, TAP_PASST = (
    {"front_end": front_end, "back_end": back_end}
    for front_end in ("qemu", "dpdk_tap")
    for back_end in ("vhostmq", "passt")
)
DRAIN = {"load": "drain"}
WAYS = {"up": "guest to host", "down": "host to guest"}


@dataclass(frozen=True)
class Goal:
    """`measure` of `ours` over that of `theirs` (or `alone`), at least (or at most) `bound`."""

    topic: str  # goals of one topic share a paragraph of notes
    text: str
    measure: str
    ours: Case
    theirs: Case
    bound: float
    at_least: bool = True
    alone: bool = False

    def medians(self, result: Result) -> tuple[float, float] | None:
        """Ours and theirs, if both were measured."""
        found = [median(result, case, self.measure) for case in (self.ours, self.theirs)]
        return None if None in found or not found[1] else (found[0], found[1])  # type: ignore

    def met(self, medians: tuple[float, float]) -> bool:
        """Whether these are what was wanted."""
        figure = medians[0] / (1 if self.alone else medians[1])
        return figure >= self.bound if self.at_least else figure <= self.bound


def median(result: Result, case: Case, measure: str) -> float | None:
    """The median of the one row of a result that is this case, or a single number of it."""
    if "part" in case:
        value = result.get(case["part"], {}).get(measure + case["suffix"])
        return None if value is None else float(value)
    for part in result.values():
        for row in part if isinstance(part, list) else ():
            if measure in row and all(row.get(key) == value for key, value in case.items()):
                return float(row[measure]["median"])
    return None


def streams(number: int) -> str:
    """In words."""
    return "one stream" if number == 1 else f"{number} streams"


def tcp(case: Case, mtu: int, number: int, way: str) -> Case:
    """One row of TCP."""
    return case | {"mtu": mtu, "load": "tcp", "amount": number, "direction": way}


def rates() -> Iterator[Goal]:
    """TCP, one stream, each front-end; and several."""
    wanted = {
        ("qemu", 1500, "up"): 3.3, ("qemu", 1500, "down"): 2.0,
        ("vhostmq guest", 1500, "up"): 1.6, ("vhostmq guest", 1500, "down"): 2.0,
    }  # fmt: skip
    for name, ours, theirs in (("qemu", QEMU, QEMU_PASST), ("vhostmq guest", OURS, PASST)):
        for mtu in (1500, 65520):
            for way in WAYS:
                text = f"{name}, MTU {mtu}, one stream, {WAYS[way]}, Gbit/s"
                cases = (tcp(ours, mtu, 1, way), tcp(theirs, mtu, 1, way))
                bound = wanted.get((name, mtu, way), 1.3)
                yield Goal(f"tcp_{mtu}", text, "gbit_s", *cases, bound)
    for number in (8, 16):  # several streams: never below passt
        for way in WAYS:
            text = f"vhostmq guest, MTU 65520, {number} streams, {WAYS[way]}, Gbit/s"
            cases = (tcp(OURS, 65520, number, way), tcp(PASST, 65520, number, way))
            yield Goal("tcp_65520", text, "gbit_s", *cases, 1.0)


def costs() -> Iterator[Goal]:
    """TCP, 8 streams: processor time, and Gbit/s of several pairs."""
    for way in WAYS:
        cases = (tcp(OURS, 1500, 8, way), tcp(PASST, 1500, 8, way))
        text = f"8 streams, MTU 1500, {WAYS[way]}, "
        yield Goal("pairs", text + "Gbit/s", "gbit_s", *cases, 2.0)
        text += "CPU-s/GB of the machine"
        yield Goal("pairs", text, "machine_cpu_s_per_gb", *cases, 0.5, at_least=False)
    for mtu, bound in ((1500, 0.4), (65520, 0.6)):
        for way in WAYS:
            text = f"8 streams, MTU {mtu}, {WAYS[way]}, CPU-s/GB of the back-end"
            cases = (tcp(OURS, mtu, 8, way), tcp(PASST, mtu, 8, way))
            yield Goal(f"cpu_{mtu}", text, "cpu_s_per_gb", *cases, bound, at_least=False)
    for way in WAYS:
        text = f"8 streams, {WAYS[way]}, CPU-s/GB: our own MTU 1500 over 65520"
        cases = (tcp(OURS, 1500, 8, way), tcp(OURS, 65520, 8, way))
        yield Goal("mtu", text, "cpu_s_per_gb", *cases, 1.15, at_least=False)
        text = f"8 streams, MTU 1500, {WAYS[way]}, CPU-s/GB: our 4 pairs over 1"
        cases = (tcp(OURS, 1500, 8, way), tcp(ONE_PAIR, 1500, 8, way))
        yield Goal("sharding", text, "cpu_s_per_gb", *cases, 1.1, at_least=False)


def others() -> Iterator[Goal]:
    """Datagrams, transactions, rings, tables."""
    for kind, words in (("udp", ""), ("udp_train", ", sent as trains")):
        for size in (64, 1400):
            for way in WAYS:
                load = {"load": kind, "amount": size, "direction": way}
                text = f"datagrams of {size} bytes{words}, {WAYS[way]}, per second"
                yield Goal("datagrams", text, "per_s", OURS | load, PASST | load, 2.5)
    for name, words, bound in (
        ("crr", "connect, request, response", 1.5),
        ("rr", "request/response", 1.2),
    ):
        case: Case = {"load": name, "amount": 1, "mtu": 1500}
        yield Goal(name, f"{words}, per second", "per_s", OURS | case, PASST | case, bound)
        text = f"{words}, 99th percentile"
        yield Goal(name, text, "p99_us", OURS | case, PASST | case, 1.0, at_least=False)
    drains = [DRAIN | {"back_end": back_end} for back_end in ("vhostmq", "dpdk_vhost")]
    text = "DPDK, 64-byte frames dropped, frames per second, over DPDK's own vhost"
    yield Goal("drain", text, "per_s", drains[0], drains[1], 0.7)
    sizes = [{"part": "micro", "suffix": f"_{number}_ns"} for number in (100_000, 10)]
    text = "lookup among 100 000 flows over lookup among 10, ns"
    yield Goal("lookup", text, "lookup", sizes[0], sizes[1], 1.5, at_least=False)
    text = "timer among 100 000 flows over timer among 10, ns"
    yield Goal("timer", text, "timer", sizes[0], sizes[1], 1.5, at_least=False)


def stalls() -> Iterator[Goal]:
    """TCP to a receiver that is slow: it always has something to take."""
    for name, ours, theirs, mtu in (
        ("vhostmq guest", OURS, PASST, 1500),
        ("vhostmq guest", OURS, PASST, 65520),
        ("DPDK and a tap", TAP, TAP_PASST, 1500),
    ):
        for number in (1, 8):
            load = {"load": "slow", "amount": number, "mtu": mtu}
            text = f"slow receiver, {name}, MTU {mtu}, {streams(number)}, longest wait for data, ms"
            cases = (ours | load, theirs | load)
            yield Goal("slow", text, "longest_gap_ms", *cases, 200, at_least=False, alone=True)


GOALS = (*rates(), *costs(), *others(), *stalls())
