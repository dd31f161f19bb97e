"""goals.py - what vhostmq wants to reach, and whether a result does.

Theory      A goal is a ratio of two figures of one result: ours over passt's of the same case, or
            over another of our own; or it is for ours alone, and passt's, if there is one, stands
            beside it. Cases are found by the keys of their rows, so that this list is all that
            knows what is compared with what. Nothing stands for anything else: each front-end, each
            number of streams and each direction that was measured has its own line.
Figures     Medians of the runs; of what must never happen, the worst run.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Result = dict[str, Any]
Case = dict[str, Any]

STREAMS = (1, 8, 16)
OURS = {"front_end": "vhostmq_guest", "back_end": "vhostmq", "pairs": 4, "workers": 2, "poll_us": 0}
UNKEPT = OURS | {"back_end": "vhostmq_unkept"}
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
    theirs: Case | None  # None: there is nothing to compare with
    bound: float
    at_least: bool = True
    alone: bool = False
    over: str = ""  # the measure of theirs, if it is another
    figure: str = "median"

    def figures(self, result: Result) -> tuple[float, float] | None:
        """Ours and theirs, if both were measured; ours twice where there is no other."""
        ours = figure(result, self.ours, self.measure, self.figure)
        if self.theirs is None:
            return None if ours is None else (ours, ours)
        theirs = figure(result, self.theirs, self.over or self.measure, self.figure)
        return None if ours is None or not theirs else (ours, theirs)

    def met(self, figures: tuple[float, float]) -> bool:
        """Whether these are what was wanted."""
        reached = figures[0] / (1 if self.alone else figures[1])
        return reached >= self.bound if self.at_least else reached <= self.bound


def figure(result: Result, case: Case, measure: str, kind: str = "median") -> float | None:
    """A figure of the one row of a result that is this case, or of a part that has no rows."""
    if "part" in case:
        value: Any = result.get(case["part"], {})
        for key in case.get("path", ()):
            value = value.get(key, {})
        value = value.get(measure + case.get("suffix", ""))
        value = value[kind] if isinstance(value, dict) else value
        return None if value is None else float(value)
    for part in result.values():
        for row in part if isinstance(part, list) else ():
            if measure in row and all(row.get(key) == value for key, value in case.items()):
                return float(row[measure][kind])
    return None


def streams(number: int) -> str:
    """In words."""
    return "one stream" if number == 1 else f"{number} streams"


def tcp(case: Case, mtu: int, number: int, way: str) -> Case:
    """One row of TCP."""
    return case | {"mtu": mtu, "load": "tcp", "amount": number, "direction": way}


def rates() -> Iterator[Goal]:
    """TCP, one stream, each front-end; and several, where passt is hardest to beat."""
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
    for number in STREAMS[1:]:
        for way in WAYS:
            text = f"vhostmq guest, MTU 65520, {number} streams, {WAYS[way]}, Gbit/s"
            cases = (tcp(OURS, 65520, number, way), tcp(PASST, 65520, number, way))
            yield Goal("tcp_65520", text, "gbit_s", *cases, 1.3)


def machine() -> Iterator[Goal]:
    """TCP, 8 streams over several pairs: Gbit/s, and processor time of the whole machine."""
    for way in WAYS:
        cases = (tcp(OURS, 1500, 8, way), tcp(PASST, 1500, 8, way))
        text = f"8 streams, MTU 1500, {WAYS[way]}, "
        yield Goal("pairs", text + "Gbit/s", "gbit_s", *cases, 2.0)
        text += "CPU-s/GB of the machine"
        yield Goal("pairs", text, "machine_cpu_s_per_gb", *cases, 0.5, at_least=False)


def costs() -> Iterator[Goal]:
    """TCP: processor time of the back-end per GB, against passt's and our own."""
    for mtu, bound in ((1500, 0.4), (65520, 0.6)):
        for name, ours, theirs, numbers in (
            ("vhostmq guest", OURS, PASST, STREAMS),
            ("qemu", QEMU, QEMU_PASST, (1,)),
        ):
            for number, way in itertools.product(numbers, WAYS):
                text = (
                    f"{name}, MTU {mtu}, {streams(number)}, {WAYS[way]}, CPU-s/GB of the back-end"
                )
                cases = (tcp(ours, mtu, number, way), tcp(theirs, mtu, number, way))
                yield Goal(f"cpu_{mtu}", text, "cpu_s_per_gb", *cases, bound, at_least=False)
    for number, way in itertools.product(STREAMS, WAYS):
        for words, ours in (("4 pairs", OURS), ("1 pair", ONE_PAIR)):
            text = f"{words}, {streams(number)}, {WAYS[way]}, CPU-s/GB: our own MTU 1500 over 65520"
            cases = (tcp(ours, 1500, number, way), tcp(ours, 65520, number, way))
            yield Goal("mtu", text, "cpu_s_per_gb", *cases, 1.15, at_least=False)
    for number, way in itertools.product(STREAMS, WAYS):
        text = f"{streams(number)}, MTU 1500, {WAYS[way]}, CPU-s/GB: our 4 pairs over 1"
        cases = (tcp(OURS, 1500, number, way), tcp(ONE_PAIR, 1500, number, way))
        yield Goal("sharding", text, "cpu_s_per_gb", *cases, 1.1, at_least=False)


def others() -> Iterator[Goal]:
    """Datagrams, transactions, rings, tables."""
    for kind, words in (("udp", ""), ("udp_train", ", sent as trains")):
        for size in (64, 1400):
            for way in WAYS:
                load = {"load": kind, "amount": size, "direction": way}
                text = f"datagrams of {size} bytes{words}, {WAYS[way]}, per second"
                yield Goal("datagrams", text, "per_s", OURS | load, PASST | load, 2.5)
    guests = (
        ("vhostmq guest", OURS, PASST, (1500,)),
        ("vhostmq guest, our one pair", ONE_PAIR, PASST, (1500,)),
    )
    for name, words, bound, places in (
        ("crr", "connect, request, response", 1.5, guests),
        (
            "rr",
            "request/response",
            1.2,
            (*guests, ("qemu", QEMU, QEMU_PASST, (1500, 65520))),
        ),
    ):
        for place, ours, theirs, mtus in places:
            for mtu in mtus:
                case: Case = {"load": name, "amount": 1, "mtu": mtu}
                text, cases = f"{place}, MTU {mtu}, {words}", (ours | case, theirs | case)
                yield Goal(name, f"{text}, per second", "per_s", *cases, bound)
                text = f"{text}, 99th percentile"
                yield Goal(name, text, "p99_us", *cases, 1.0, at_least=False)
    case = {"load": "crr", "amount": 1, "mtu": 1500}
    text = "connect, request, response, per second: sockets kept for the next worker over not kept"
    yield Goal("keepers", text, "per_s", OURS | case, UNKEPT | case, 0.9)
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
            yield Goal(
                "slow",
                text,
                "longest_gap_ms",
                *cases,
                200,
                at_least=False,
                alone=True,
                figure="max",
            )


def many() -> Iterator[Goal]:
    """Many connections: neither opening them nor using them may become slower."""
    ours = {"back_end": "vhostmq", "load": "rr", "front_end": "vhostmq_guest", "workers": 8}
    most = ours | {"amount": 100_000}
    text = "100 000 connections, opened per second: the last tenth over the first"
    yield Goal("opening", text, "open_last_per_s", most, most, 0.95, over="open_first_per_s")
    text = "request/response per second: over 100 000 connections in turn over one"
    yield Goal("opening", text, "per_s", most, ours | {"amount": 1}, 0.95)


def hops() -> Iterator[Goal]:
    """Flows that change their queue: nothing is to be noticed, or not much."""
    for number, bound in ((1, 0.95), (10, 0.5), (100, 0.5)):
        for way in WAYS:
            hopping = OURS | {"load": "hop", "amount": number, "direction": way}
            never = OURS | {"load": "hop", "amount": 0, "direction": way}
            often = "one hop" if number == 1 else f"{number} hops"
            text = f"8 streams, {WAYS[way]}, {often} a second over none, Gbit/s"
            yield Goal("hops", text, "gbit_s", hopping, never, bound)


def kills() -> Iterator[Goal]:
    """A worker is killed: how long a connection has to wait."""
    loads = {
        "32 connections, requests in turn": ("kill", "both"),
        "32 streams, guest to host": ("kill_tcp", "up"),
        "32 streams, host to guest": ("kill_tcp", "down"),
    }
    for place, front_end in (("vhostmq guest", "vhostmq_guest"), ("qemu", "qemu")):
        for words, (load, way) in loads.items():
            case = OURS | {"front_end": front_end, "load": load, "amount": 32, "direction": way}
            for kind, most in (("median", 200), ("max", 1000)):
                text = f"{place}, {words}, a worker is killed: longest wait of any, {kind}, ms"
                yield Goal(
                    "kills",
                    text,
                    "longest_ms",
                    case,
                    None,
                    most,
                    at_least=False,
                    alone=True,
                    figure=kind,
                )


def starts() -> Iterator[Goal]:
    """Start-up and rest, ours alone."""
    for kind, measure, words, most in (
        ("warm", "answer_ms", "from exec to the answer to GET_FEATURES, all compiled", 200),
        ("cold", "answer_ms", "the same, nothing compiled", 200),
        ("warm", "workers_ms", "from exec to all workers ready, all compiled", 1000),
        ("cold", "workers_ms", "the same, nothing compiled", 60_000),
    ):
        case = {"part": "start", "path": (kind,)}
        text = f"{words}, ms"
        yield Goal("start", text, measure, case, None, most, at_least=False, alone=True)
    text, case = "wake-ups of an idle back-end in 5 s", {"part": "at_rest"}
    yield Goal("rest", text, "wakeups_in_5_s", case, None, 5, at_least=False, alone=True)


ALL = (rates, machine, costs, others, stalls, many, hops, kills, starts)
GOALS = tuple(itertools.chain.from_iterable(group() for group in ALL))
