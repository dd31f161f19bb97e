"""cases.py - what is measured: the loads, and what is compared under them.

Theory      A comparison is a list of setups that take turns and the loads they all run. The parts
            are lists of comparisons; all of it is one result. Our own figures against passt are
            those of ALL_CORES, except where the front-end has one pair.
"""

from __future__ import annotations

import os
import pathlib
import resource
from collections.abc import Sequence

from benchmarks.series import Load, Setup

QUEUES, WORKERS = 4, 2
MTUS = (1500, 9000, 65520)
STREAMS = (1, 8, 16)
PAIRS = tuple(  # queue pairs, workers
    (pairs, workers) for pairs in (1, 2, 4, 8, 16) for workers in (1, 2) if workers <= pairs
)
POLLS_US = (0, 50, 200)
HOPS = (0, 1, 10, 100)
KILL_CONNECTIONS = 32
FLOWS = (1, 1000, 100_000)
FLOW_PROCESSES = 8  # pairs and workers of these cases, processes of load.c at each end
SPARE_FILES = 0.85  # of a process's hard limit: flows are not spread evenly, and it has other files
SIZES = (64, 1400)
KVM = "/dev/kvm"
QEMU_LOADS: tuple[Load, ...] = (("tcp", 1), ("rr", 1))

Comparison = tuple[list[Setup], Sequence[Load]]


def back_ends(mtu: int, passt: str, front_end: str = "vhostmq_guest") -> list[Setup]:
    """Ours with several pairs, and passt with its one."""
    pairs, workers = (QUEUES, WORKERS) if front_end == "vhostmq_guest" else (1, 1)
    ours = Setup(front_end, "vhostmq", mtu, pairs, workers)
    return [ours, Setup(front_end, "passt", mtu)] if passt else [ours]


def throughput(passt: str) -> list[Comparison]:
    """TCP both ways at each MTU, and one pair on one worker beside four on two."""
    loads = [("tcp", streams) for streams in STREAMS]
    return [
        ([*back_ends(mtu, passt), Setup("vhostmq_guest", "vhostmq", mtu)], loads) for mtu in MTUS
    ]


def qemu(passt: str) -> list[Comparison]:
    """A Debian kernel, emulated, and on the processor itself where there is KVM."""
    kinds = ["qemu"] + (["qemu_kvm"] if kvm_works() else [])
    return [(back_ends(mtu, passt, kind), QEMU_LOADS) for kind in kinds for mtu in (1500, 65520)]


def kvm_works() -> bool:
    """Whether the processor virtualizes and this process may ask it to. A /dev/kvm without that
    flag has been seen to start machines that never boot."""
    flags = pathlib.Path("/proc/cpuinfo").read_text().split()
    return bool({"vmx", "svm"} & set(flags)) and os.access(KVM, os.R_OK | os.W_OK)


def datagrams(passt: str) -> list[Comparison]:
    """UDP both ways, single and in trains, and one pair on one worker beside four on two."""
    loads = [(kind, size) for kind in ("udp", "udp_train") for size in SIZES]
    return [([*back_ends(1500, passt), Setup("vhostmq_guest", "vhostmq", 1500)], loads)]


def transactions(passt: str) -> list[Comparison]:
    """A request and its response, on one connection and on one each, and one pair on one worker
    beside four on two; and without anybody who keeps the workers' sockets (unkept.py)."""
    setups = [*back_ends(1500, passt), Setup("vhostmq_guest", "vhostmq", 1500)]
    setups.append(Setup("vhostmq_guest", "vhostmq_unkept", 1500, QUEUES, WORKERS))
    return [(setups, [("rr", 1), ("crr", 1)])]


def flows(passt: str) -> list[Comparison]:
    """The same over many open connections in turn, beside what the kernel does alone. passt is one
    process and has its limit of descriptors."""
    setups = [many_flows()]
    if passt:
        setups.append(Setup("vhostmq_guest", "passt", 1500))
    setups.append(Setup("loopback", "none", 65536))
    return [(setups, [("rr", number) for number in affordable_flows()])]


def many_flows(mtu: int = 1500) -> Setup:
    """Ours with so many workers that they may open a descriptor for each of FLOWS."""
    return Setup("vhostmq_guest", "vhostmq", mtu, FLOW_PROCESSES, FLOW_PROCESSES)


def affordable_flows() -> list[int]:
    """FLOWS, or as many as descriptors allow: every connection is one of a worker, of a server's
    process and of a client's."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    room = FLOW_PROCESSES * int(limit * SPARE_FILES)
    if room < FLOWS[-1]:
        print(f"RLIMIT_NOFILE is {limit} here: {room} flows instead of {FLOWS[-1]}")
    return [min(number, room) for number in FLOWS]


def slow_receiver(passt: str) -> list[Comparison]:
    """TCP from the guest to a program that takes less than the way there carries. A tap has no
    larger frames."""
    loads = [("slow", streams) for streams in (1, 8)]
    found = [(back_ends(mtu, passt), loads) for mtu in (1500, 65520)]
    return [*found, (back_ends(1500, passt, "dpdk_tap"), loads)]


def references(passt: str) -> list[Comparison]:
    """What the kernel does without us, and pasta, which is passt without a virtual machine."""
    setups = [Setup("loopback", "none", 65536), Setup("veth", "none", 1500)]
    if passt:
        setups.append(Setup("pasta", "pasta", 65520))
    loads = [("tcp", 1), ("tcp", 16), ("rr", 1), ("crr", 1), *(("udp", size) for size in SIZES)]
    return [(setups, loads)]


def pairs(_: str) -> list[Comparison]:
    """Queue pairs and workers, ours alone."""
    loads = [("tcp", 8), ("rr", 1), ("crr", 1), ("udp", 64)]
    return [([Setup("vhostmq_guest", "vhostmq", 1500, *count)], loads) for count in PAIRS]


def hops(_: str) -> list[Comparison]:
    """Flows that change their queue so often a second, beside a guest left to itself."""
    loads: list[Load] = [("tcp", 8), *(("hop", number) for number in HOPS)]
    return [([Setup("vhostmq_guest", "vhostmq", 1500, QUEUES, WORKERS)], loads)]


def kills(passt: str) -> list[Comparison]:
    """One SIGKILL half-way through requests and their responses over some connections in turn, and
    through as many streams at a time; and those without any."""
    number = KILL_CONNECTIONS
    loads = [("kill_tcp", number), ("tcp", number)]
    guest = Setup("vhostmq_guest", "vhostmq", 1500, QUEUES, WORKERS)
    emulated = Setup("qemu", "vhostmq", 1500, QUEUES, WORKERS)
    return [
        (back_ends(1500, passt), [("kill", number)]),
        ([guest], loads),
        ([emulated], [("kill", number), *loads]),
    ]


def polling(_: str) -> list[Comparison]:
    """Looking for more work before sleeping (--poll-us), ours alone."""
    setups = [
        Setup("vhostmq_guest", "vhostmq", 1500, QUEUES, WORKERS, poll_us) for poll_us in POLLS_US
    ]
    return [(setups, [("rr", 1), ("crr", 1), ("tcp", 1)])]


def sweep(passt: str) -> list[Comparison]:
    """Every load at every MTU with every number of pairs and workers, and rest: more than an hour,
    so only when it is asked for. FLOWS need the descriptors of many workers."""
    loads: list[Load] = [("tcp", 1), ("tcp", 16), ("rr", 1), ("rr", 1000), ("crr", 1)]
    loads += [(kind, size) for kind in ("udp", "udp_train") for size in SIZES]
    loads += [("idle", 0)]
    found: list[Comparison] = []
    for mtu in MTUS:
        setups = [Setup("vhostmq_guest", "vhostmq", mtu, *count) for count in PAIRS]
        found.append((setups + back_ends(mtu, passt)[1:], loads))
        found.append(([many_flows(mtu)], [("rr", number) for number in affordable_flows()]))
    return found


PARTS = {
    part.__name__: part
    for part in (
        throughput,
        qemu,
        datagrams,
        transactions,
        flows,
        slow_receiver,
        references,
        pairs,
        polling,
        hops,
        kills,
    )
}
ON_REQUEST = {"sweep": sweep}
