"""series.py - back-ends side by side under the same load, run after run in turn.

Theory      A Setup says what is tried: front-end, back-end, MTU, queue pairs, workers. Those of one
            comparison are all up at the same time, each in a room of its own with its own guest,
            and take turns run by run, so that whatever else the machine does hits all of them.
            Idle ones cost next to nothing; those whose front-end polls, or loses its back-end when
            it is killed, take turns in rooms that are made for one run. Loads are load.c's
            (guest/load.c), here and there.
Counted     System calls and notifications are counted in one run more, which is not timed: perf
            counts at every entry of the kernel. Over many connections only system calls, while they
            are open. Notifications are ours by our metrics; passt's are its read() and write()
            calls, which it uses for nothing but eventfds then. Packets are those of the guest's
            interface, where a segment of 64 KiB is one.
Rest        The load "idle" is none: what a back-end does while its guest does nothing.
Result      One row per setup, load and direction: median, minimum and maximum of each measure.
"""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks import hops, lab, measure, places
from benchmarks.guest.prepare import Images, build_program

PORT = 7000
LOAD_SOURCES = ("load.c", "load_rr.h")
TRAIN_BYTES, TRAIN_MAX = 60000, 64  # what a UDP_SEGMENT message may hold
OURS = {"vhostmq": "control", "vhostmq_unkept": "benchmarks.unkept"}  # what runs
SETUP_KEYS = ("front_end", "back_end", "pairs", "workers", "poll_us", "mtu")
KEYS = (*SETUP_KEYS, "load", "amount", "direction")
STUCK_S = 60.0
HOP_STREAMS = 8  # of the load "hop", whose amount is how often each changes its queue
INTERFACE = "eth0"  # in every guest
SAID_OF_STREAMS = ("longest_gap_ms", "stalls")  # measures as load.c says them
SAID_OF_REQUESTS = ("p50_us", "p99_us", "open_first_per_s", "open_last_per_s")

Row = dict[str, Any]
Run = dict[str, float | None]
Load = tuple[str, int]  # kind, amount


@dataclass(frozen=True)
class Setup:
    """One of those compared."""

    front_end: str
    back_end: str
    mtu: int
    pairs: int = 1
    workers: int = 1
    poll_us: int = 0


@dataclass(frozen=True)
class How:
    """How often and how long, and with what."""

    runs: int
    seconds: float
    passt: str
    images: Images | None = None


def directions(kind: str) -> tuple[str, ...]:
    """The ways a load goes."""
    if kind == "slow":
        return ("up",)
    return ("both",) if kind in ("rr", "crr", "kill", "idle") else ("up", "down")


def arguments(load: Load, direction: str, address: str, seconds: float) -> str:
    """What load.c is called with."""
    kind, amount = load
    if kind == "hop":
        kind, amount = "tcp", HOP_STREAMS
    kind = {"kill": "rr", "kill_tcp": "tcp"}.get(kind, kind)
    words = [kind.partition("_")[0], direction, address, str(PORT), str(seconds), str(amount)]
    if kind in ("udp", "udp_train"):
        train = 1 if kind == "udp" else min(TRAIN_BYTES // amount, TRAIN_MAX)
        words.append(str(train))
    return " ".join(words)


def moved(said: dict[str, Any]) -> int:
    """Datagrams that arrived, or transactions."""
    return int(said["datagrams"] if "datagrams" in said else said["transactions"])


def rates(said: dict[str, Any], used_s: float, machine_s: float) -> Run:
    """What one run comes to; `used_s`, `machine_s`: processor time of back-end and machine."""
    if "bytes" in said:
        gigabytes = said["bytes"] / 1e9
        return {
            "gbit_s": 8 * gigabytes / said["seconds"],
            "cpu_s_per_gb": used_s / gigabytes if gigabytes else None,
            "machine_cpu_s_per_gb": machine_s / gigabytes if gigabytes else None,
            **{name: said[name] for name in SAID_OF_STREAMS if name in said},
        }
    number = moved(said)
    found = {
        "per_s": number / said["seconds"] if number else 0.0,
        "cpu_us_each": used_s * 1e6 / number if number else None,
        "machine_cpu_us_each": machine_s * 1e6 / number if number else None,
    }
    return found | {name: said[name] for name in SAID_OF_REQUESTS if name in said}


def killed(said: dict[str, Any]) -> Run:
    """The same of a run in which somebody was killed, whose processor time is gone with it."""
    if "bytes" in said:
        return {
            "gbit_s": 8e-9 * said["bytes"] / said["seconds"],
            "longest_ms": said["longest_gap_ms"],
        }
    return {"per_s": moved(said) / said["seconds"], "longest_ms": said["max_us"] / 1e3}


def kills(load: Load) -> bool:
    """Whether a process is killed under this load."""
    return load[0].startswith("kill")


class Bench:
    """A setup that is up: its room, back-end and guest."""

    def __init__(self, setup: Setup, how: How, room: lab.Lab, metrics_port: int) -> None:
        self.setup, self.how, self.room, self.metrics_port = setup, how, room, metrics_port
        self.back_end = self._start_back_end()
        self.inside = self._start_front_end()
        self.program = "load" if setup.front_end in places.QEMU else str(load_program())

    def _start_back_end(self) -> subprocess.Popen[bytes] | None:
        setup = self.setup
        if program := OURS.get(setup.back_end):
            words = ("--mtu", str(setup.mtu), "--poll-us", str(setup.poll_us))
            count, port = (setup.pairs, setup.workers), self.metrics_port
            return self.room.backend(*count, *words, metrics_port=port, program=program)
        return start_passt(self.room, self.how.passt, setup.mtu) if self.is_passt else None

    @property
    def is_passt(self) -> bool:
        """passt in vhost-user mode."""
        return self.setup.back_end == "passt"

    def _start_front_end(self) -> places.Inside:
        name, room, setup = self.setup.front_end, self.room, self.setup
        if name in places.QEMU:
            assert self.how.images is not None
            return places.Qemu(room, self.how.images, places.QEMU[name], setup.pairs)
        if name == "vhostmq_guest":
            return places.vhostmq_guest(room, setup.pairs, setup.mtu)
        if name == "pasta":
            program = str(pathlib.Path(self.how.passt).with_name("pasta"))
            shell = places.pasta(room, program, setup.mtu)
            self.back_end = shell.process
            return shell
        if name == "dpdk_tap":
            return places.dpdk_tap(room, setup.mtu)
        return {"loopback": places.loopback, "veth": places.veth}[name](room)

    def cpu_s(self) -> float:
        """Processor time of the back-end so far."""
        if self.back_end is None:
            return 0.0
        return measure.cpu_s(self.back_end.pid, alone=self.setup.front_end == "pasta")

    def run(
        self, load: Load, direction: str, heard: places.Heard = lambda said: None
    ) -> dict[str, Any]:
        """What load.c says of one run; LabError with its reason when it fails."""
        words = arguments(load, direction, self.inside.address, self.how.seconds)
        with self._hopping(load), self._killing(load):
            output = self.inside.run(f"{self.program} {words}", self.how.seconds + STUCK_S, heard)
        said: dict[str, Any] = json.loads(output.splitlines()[-1])
        return said

    def _hopping(self, load: Load) -> AbstractContextManager[None]:
        """The guest's flows change their queue where that is part of the load."""
        if load[0] != "hop":
            return nullcontext()
        assert isinstance(self.inside, places.Shell)
        return hops.hopping(self.inside.process.pid, load[1])

    @contextmanager
    def _killing(self, load: Load) -> Iterator[None]:
        """Half-way the back-end, or a worker of ours, is killed, where that is the load."""
        if not kills(load):
            yield
            return
        timer = threading.Timer(1 + self.how.seconds / 2, self._kill)  # load.c settles for a second
        timer.start()
        try:
            yield
        finally:
            timer.join()

    def _kill(self) -> None:
        """SIGKILL; passt is started again."""
        assert self.back_end is not None
        if self.is_passt:
            self.back_end.kill()
            self.back_end.wait()
            self.back_end = start_passt(self.room, self.how.passt, self.setup.mtu)
        else:
            os.kill(random.choice(measure.workers(self.back_end.pid)), signal.SIGKILL)

    def rest(self) -> Run:
        """A run without a load."""
        if self.back_end is None:
            return {}
        used_s, woken = self.cpu_s(), measure.switches(self.back_end.pid)
        time.sleep(self.how.seconds)
        woken, used_s = measure.switches(self.back_end.pid) - woken, self.cpu_s() - used_s
        return {
            "idle_switches_per_s": woken / self.how.seconds,
            "idle_cpu_us_per_s": used_s * 1e6 / self.how.seconds,
        }

    def timed(self, load: Load, direction: str) -> Run:
        """One run, and what it took, without opening and closing connections where it says when
        they are open."""
        if load[0] == "idle":
            return self.rest()
        clocks = {"start": (self.cpu_s(), measure.machine_cpu_s())}

        def heard(said: bytes) -> None:
            for word in ("begin", "seconds"):
                if word.encode() in said and word not in clocks:
                    clocks[word] = (self.cpu_s(), measure.machine_cpu_s())

        said = self.run(load, direction, heard)
        if kills(load):
            return killed(said)
        begin = clocks.get("begin", clocks["start"])
        end = clocks.get("seconds") or (self.cpu_s(), measure.machine_cpu_s())
        return rates(said, end[0] - begin[0], end[1] - begin[1])

    def counted(self, load: Load, direction: str) -> dict[str, float]:
        """System calls, and notifications per packet, of one run that is not timed."""
        if self.back_end is None or not shutil.which("perf") or load[0] == "idle" or kills(load):
            return {}
        if load[0] == "rr" and load[1] > 1:
            return self._counted_when_open(load, direction)
        packets, told = self._packets(), self._notifications()
        with measure.perf(measure.tree(self.back_end.pid), self.room.folder / "perf.txt") as events:
            said = self.run(load, direction)
        if not events:
            return {}
        if self.is_passt:
            told, now = 0.0, events[measure.PERF_EVENTS[1]] + events[measure.PERF_EVENTS[2]]
        else:
            now = self._notifications()
        unit, amount = ("per_mb", said["bytes"] / 1e6) if "bytes" in said else ("each", moved(said))
        found = {f"syscalls_{unit}": events[measure.PERF_EVENTS[0]] / max(amount, 1)}
        if self.setup.front_end != "pasta":  # a tap has no notifications
            crossed = max(self._packets() - packets, 1)
            found["notifications_per_packet"] = (now - told) / crossed
        return found

    def _counted_when_open(self, load: Load, direction: str) -> dict[str, float]:
        """System calls of a load's transactions without those that open and close its connections;
        load.c leaves perf time between the two."""
        log, found = self.room.folder / "perf.txt", dict[str, float]()
        assert self.back_end is not None
        pids = measure.tree(self.back_end.pid)
        with ExitStack() as counting:

            def heard(said: bytes) -> None:
                nonlocal found
                if b"seconds" in said:
                    counting.close()
                elif b"open" in said and b"begin" not in said:
                    found = counting.enter_context(measure.perf(pids, log))

            said = self.run(load, direction, heard)
        if not found:
            return {}
        return {"syscalls_each": found[measure.PERF_EVENTS[0]] / max(moved(said), 1)}

    def _packets(self) -> int:
        """Sent and received by the guest's interface so far."""
        line = self.inside.run(f"grep {INTERFACE}: /proc/net/dev", STUCK_S)
        words = line.partition(":")[2].split()  # 8 numbers received, 8 sent, packets second
        return int(words[9]) + int(words[1])

    def _notifications(self) -> float:
        """Kicks and calls so far, by our metrics."""
        if self.setup.back_end not in OURS:
            return 0.0
        samples = lab.scrape(self.metrics_port)
        names = ("vhostmq_kicks_total", "vhostmq_calls_total")
        return sum(lab.labelled(samples, name) for name in names)


def load_program() -> pathlib.Path:
    """load.c for the host, compiled when it has changed."""
    folder = lab.ROOT / "build/benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    built, sources = (
        folder / "load",
        [lab.ROOT / "benchmarks/guest" / name for name in LOAD_SOURCES],
    )
    newest = max(source.stat().st_mtime for source in sources)
    if not built.exists() or built.stat().st_mtime < newest:
        build_program("load", folder)
    return built


def start_passt(room: lab.Lab, program: str, mtu: int) -> subprocess.Popen[bytes]:
    """passt in vhost-user mode; it becomes nobody before it binds."""
    room.folder.chmod(0o1777)
    room.socket.unlink(missing_ok=True)
    command = [program, "--foreground", "--vhost-user", "--socket", str(room.socket)]
    command += ["--repair-path", "none", "--mtu", str(mtu)]
    process = room.start(*command, log="run.log")
    room.wait_for("run.log", "You can start qemu", process)
    return process


@contextmanager
def served() -> Iterator[None]:
    """load.c's server on the host."""
    with lab.Lab() as room:
        process = room.start(str(load_program()), "serve", str(PORT), log="serve.log")
        room.wait_for("serve.log", "ready", process)
        yield


def compare(setups: Iterable[Setup], loads: Iterable[Load], how: How) -> list[Row]:
    """All runs of these loads, the setups in turn; a row for each."""
    setups = list(setups)
    loads = list(loads)
    asked = [(load, direction) for load in loads for direction in directions(load[0])]
    with served():
        polling = any(setup.front_end in places.POLLING for setup in setups)
        killed = any(setup.back_end == "passt" for setup in setups) and any(map(kills, loads))
        if polling or killed:
            return alone(setups, asked, how)
        with up(setups, how) as benches:
            return in_turn(benches, asked, how.runs)


@contextmanager
def up(setups: Iterable[Setup], how: How) -> Iterator[list[Bench]]:
    """Those of these setups that start, in rooms of their own."""
    with ExitStack() as stack:
        benches = []
        for number, setup in enumerate(setups):
            room = stack.enter_context(lab.Lab())
            with told(setup, "start"):
                benches.append(Bench(setup, how, room, lab.METRICS_PORT + number))
                stack.callback(benches[-1].inside.close)
        yield benches


def in_turn(benches: list[Bench], asked: list[tuple[Load, str]], runs: int) -> list[Row]:
    """Runs of these loads, loads and benches taking turns: what is compared lies side by side, and
    a machine that is slower for a minute is so for all."""
    timed: dict[tuple[Bench, Load, str], list[Run]] = {}
    for _ in range(runs):
        for (load, direction), bench in itertools.product(asked, benches):
            mine = timed.setdefault((bench, load, direction), [])
            with told(bench.setup, load, direction):
                mine.append(bench.timed(load, direction))
    return [row_of(bench, *case, timed[bench, *case]) for case in asked for bench in benches]


def alone(setups: list[Setup], asked: list[tuple[Load, str]], how: How) -> list[Row]:
    """Runs of loads, for each of which its setup is up by itself."""
    timed: dict[tuple[Setup, Load, str], list[Run]] = {}
    rows = []
    for number in range(how.runs):
        for setup, (load, direction) in itertools.product(setups, asked):
            mine = timed.setdefault((setup, load, direction), [])
            with up([setup], how) as benches:
                for bench in benches:
                    with told(setup, load, direction):
                        mine.append(bench.timed(load, direction))
                    if number == how.runs - 1:
                        rows.append(row_of(bench, load, direction, mine))
    return rows


def row_of(bench: Bench, load: Load, direction: str, timed: list[Run]) -> Row:
    """What the runs that did not fail come to, and what is counted in one more."""
    row = asdict(bench.setup) | {"load": load[0], "amount": load[1], "direction": direction}
    row |= measure.summary(timed) | {"failed": bench.how.runs - len(timed)}
    with told(bench.setup, load, direction):
        row |= {"counted": bench.counted(load, direction)}
    print(shown(row), flush=True)
    return row


@contextmanager
def told(setup: Setup, *what: object) -> Iterator[None]:
    """What fails is said and left out."""
    try:
        yield
    except lab.LabError as error:
        print(f"{setup} {what} failed: {error}", flush=True)


def shown(row: Row) -> str:
    """A row for the eyes of whoever waits."""
    case = " ".join(str(row[key]) for key in KEYS)
    medians = {name: value["median"] for name, value in row.items() if isinstance(value, dict)
               and "median" in value}  # fmt: skip
    measures = medians | row.get("counted", {})
    return f"{case}: " + ", ".join(f"{name} {value:.4g}" for name, value in measures.items())
