"""Rings and descriptors no driver should make: refused, counted by reason, and nobody else's
problem.

The contract: a bad buffer comes back with length 0 and is counted under its reason; a ring whose
indices make no sense is stopped, counted, and its error descriptor signalled; the other rings go
on; nothing ends, spins or hangs. After GET_VRING_BASE and a new start a stopped ring works again.

`REASONS` names what the metrics page calls each refusal.
"""

from __future__ import annotations

import os
import random
import select
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

import packets as pk
import pytest
from backend import Backend
from driver import BASIC, CSUM, EVENT_IDX, GUEST_CSUM, INDIRECT_DESC, MQ, Driver, Queue
from formats import PACKED, SPLIT, both_formats
from guest import Guest
from vring import DESC, INDIRECT, NEXT, WRITE, Desc, Layout
from world import World

pytestmark = pytest.mark.passt_lacks("ends at the first malformed descriptor, and has no metrics")

METRIC = "vhostmq_drops_total"
REASONS = {
    "loop": "chain_loop",
    "index": "bad_index",
    "address": "bad_address",
    "indirect": "bad_indirect",
    "direction": "bad_direction",
    "short": "no_header",
    "oversize": "oversize",
    "avail": "bad_avail",
    "rx small": "rx_small",
    "offload": "bad_offload",
}
ALL = BASIC | GUEST_CSUM | CSUM | EVENT_IDX | INDIRECT_DESC | MQ
NUM = 256


@pytest.fixture
def guest(make_guest: Callable[..., Guest]) -> Guest:
    """Two pairs: what happens to one must not touch the other."""
    return make_guest(pairs=2, num=NUM, features=ALL)


class Counter:
    """The drops of one reason and direction, from now on."""

    def __init__(self, backend: Backend, reason: str, direction: str) -> None:
        self.backend = backend
        self.labels = {"reason": REASONS[reason], "direction": direction}
        self.before = backend.total(METRIC, **self.labels)

    def __call__(self) -> int:
        return int(self.backend.total(METRIC, **self.labels) - self.before)

    def wait(self, count: int) -> None:
        deadline = time.monotonic() + 3
        while (now := self()) != count:
            assert time.monotonic() < deadline, f"{now} drops of {self.labels}, not {count}"
            time.sleep(0.05)


def offer(drv: Driver, queue: Queue, descs: list[Desc]) -> int:
    """Put a chain of raw descriptors on a ring and kick; returns its name."""
    name = queue.ring.offer(descs)
    queue.ring.publish()
    drv.kick(queue)
    return name


def back(queue: Queue, count: int = 1, timeout: float = 3.0) -> list[tuple[int, int]]:
    """Wait for `count` used buffers; returns (head, length) of each."""
    deadline = time.monotonic() + timeout
    while queue.ring.pending() < count:
        assert time.monotonic() < deadline, f"ring {queue.index}: a bad buffer does not come back"
        time.sleep(0.001)
    return [(head, length) for head, length, _, _ in queue.ring.reap()]


def alive(guest: Guest, *pairs: int) -> None:
    """The pairs answer echo requests."""
    for pair in pairs or (0, 1):
        guest.ping(guest.gw4, 99, pair, b"alive?", pair=pair)
        guest.next_icmp({0}, 3)


def udp_frame(guest: Guest, world_port: int, payload: bytes) -> bytes:
    body = pk.udp(guest.ip4, guest.gw4, 7000, world_port, payload)
    return pk.ip_frame((guest.gw_mac, guest.mac), pk.ipv4(guest.ip4, guest.gw4, pk.UDP, body))


def good(guest: Guest) -> int:
    """Guest address of a harmless frame with its header: an echo request of 54 bytes."""
    drv = guest.drv
    rest = struct.pack(">HH", 1, 1) + bytes(8)
    packet = pk.ipv4(guest.ip4, guest.gw4, pk.ICMP, pk.icmp(8, 0, rest))
    gpa = drv.memory.alloc(4096)
    drv.memory.write(gpa, bytes(12) + pk.ip_frame((guest.gw_mac, guest.mac), packet))
    return gpa


FRAME = 12 + 14 + 20 + 16


def end(guest: Guest) -> int:
    return guest.drv.memory.end


CHAINS: dict[str, tuple[str, Callable[[Guest, int], list[Desc]]]] = {
    "a loop of two": ("loop", lambda g, a: [(a, 20, NEXT, 1), (a + 20, 20, NEXT, 0)]),
    "itself": ("loop", lambda g, a: [(a, 62, NEXT, 0)]),
    "next just outside": ("index", lambda g, a: [(a, 62, NEXT, NUM)]),
    "next far outside": ("index", lambda g, a: [(a, 62, NEXT, 65535)]),
    "address 0": ("address", lambda g, a: [(0, 62, 0, 0)]),
    "behind memory": ("address", lambda g, a: [(end(g), 62, 0, 0)]),
    "across the end": ("address", lambda g, a: [(end(g) - 30, 62, 0, 0)]),
    "last address": ("address", lambda g, a: [(2**64 - 1, 1, 0, 0)]),
    "wraps around": ("address", lambda g, a: [(2**64 - 16, 0x20000, 0, 0)]),
    "wraps to good": ("address", lambda g, a: [(2**64 - 4, 0x10040, 0, 0)]),
    "longest length": ("address", lambda g, a: [(a, 0xFFFFFFFF, 0, 0)]),
    "second is bad": ("address", lambda g, a: [(a, 30, NEXT, 1), (end(g), 32, 0, 0)]),
    "writable": ("direction", lambda g, a: [(a, 62, WRITE, 0)]),
    "second writable": ("direction", lambda g, a: [(a, 30, NEXT, 1), (a + 30, 32, WRITE, 0)]),
    "one byte": ("short", lambda g, a: [(a, 1, 0, 0)]),
    "eleven bytes": ("short", lambda g, a: [(a, 11, 0, 0)]),
    "header only": ("short", lambda g, a: [(a, 12, 0, 0)]),
    "no Ethernet": ("short", lambda g, a: [(a, 25, 0, 0)]),
    "length zero": ("short", lambda g, a: [(a, 0, 0, 0)]),
    "two of length zero": ("short", lambda g, a: [(a, 0, NEXT, 1), (a, 0, 0, 0)]),
    "oversize": ("oversize", lambda g, a: [(g.drv.memory.alloc(70000), 70000, 0, 0)]),
    "oversize by many": (
        "oversize",
        lambda g, a: [(g.drv.memory.alloc(4096), 4096, NEXT * (i < 29), i + 1) for i in range(30)],
    ),
}


def cases(table: dict[str, tuple[str, Any]], *split_only: str) -> pytest.MarkDecorator:
    """Each case with both ring formats; those that need a link to somewhere with split rings. (In
    packed rings what follows is what stands behind: test_hostile_packed.py.)
    """
    made = [pytest.param(name, *SPLIT.values, id=name) for name in table]
    for name, (reason, _) in table.items():
        if reason not in ("loop", "index") and name not in split_only:
            made.append(pytest.param(name, *PACKED.values, id=f"{name}-packed", marks=PACKED.marks))
    return pytest.mark.parametrize(("name", "rings"), made, indirect=["rings"])


@cases(CHAINS)
def test_bad_transmit_chain(backend: Backend, guest: Guest, name: str) -> None:
    """Back with length 0, counted once, and the very next frame of the same ring is carried."""
    reason, build = CHAINS[name]
    counter = Counter(backend, reason, "tx")
    queue = guest.drv.tx(0)
    head = offer(guest.drv, queue, build(guest, good(guest)))
    assert back(queue) == [(head, 0)]
    alive(guest)
    counter.wait(1)
    assert not select.select([queue.err], [], [], 0)[0], "one bad buffer does not break a ring"


def table(guest: Guest, descs: list[Desc]) -> int:
    gpa = guest.drv.memory.alloc(16 * max(1, len(descs)))
    guest.drv.memory.write(gpa, guest.drv.tx(0).ring.raw_table(descs))
    return gpa


def simple(guest: Guest, a: int, descs: list[Desc], length: int | None = None) -> list[Desc]:
    size = 16 * len(descs) if length is None else length
    return [(table(guest, descs), size, INDIRECT, 0)]


LONG = [(0x20000, 1, NEXT, i + 1) for i in range(NUM)] + [(0x20000, 62, 0, 0)]
TABLES: dict[str, tuple[str, Callable[[Guest, int], list[Desc]]]] = {
    "length 0": ("indirect", lambda g, a: simple(g, a, [(a, 62, 0, 0)], 0)),
    "length 8": ("indirect", lambda g, a: simple(g, a, [(a, 62, 0, 0)], 8)),
    "length 17": ("indirect", lambda g, a: simple(g, a, [(a, 62, 0, 0)] * 2, 17)),
    "nested": (
        "indirect",
        lambda g, a: simple(g, a, [(table(g, [(a, 62, 0, 0)]), 16, INDIRECT, 0)]),
    ),
    "with next": (
        "indirect",
        lambda g, a: [(table(g, [(a, 62, 0, 0)]), 16, INDIRECT | NEXT, 1), (a, 62, 0, 0)],
    ),
    "outside memory": ("address", lambda g, a: [(end(g), 16, INDIRECT, 0)]),
    "across the end": ("address", lambda g, a: [(end(g) - 16, 32, INDIRECT, 0)]),
    "wraps around": ("address", lambda g, a: [(2**64 - 16, 32, INDIRECT, 0)]),
    "huge": ("address", lambda g, a: [(table(g, [(a, 62, 0, 0)]), 0xFFFFFFF0, INDIRECT, 0)]),
    "next outside": ("index", lambda g, a: simple(g, a, [(a, 30, NEXT, 2), (a, 32, 0, 0)])),
    "loop": ("loop", lambda g, a: simple(g, a, [(a, 30, NEXT, 1), (a, 32, NEXT, 0)])),
    "longer than the queue": ("loop", lambda g, a: simple(g, a, LONG)),
    "bad address": ("address", lambda g, a: simple(g, a, [(end(g), 62, 0, 0)])),
    "writable": ("direction", lambda g, a: simple(g, a, [(a, 62, WRITE, 0)])),
    "short": ("short", lambda g, a: simple(g, a, [(a, 11, 0, 0)])),
}


@cases(TABLES, "nested")
def test_bad_indirect_table(backend: Backend, guest: Guest, name: str) -> None:
    reason, build = TABLES[name]
    counter = Counter(backend, reason, "tx")
    queue = guest.drv.tx(0)
    head = offer(guest.drv, queue, build(guest, good(guest)))
    assert back(queue) == [(head, 0)]
    alive(guest)
    counter.wait(1)


def test_direct_then_indirect(guest: Guest) -> None:
    """Not hostile, only rare: descriptors, then an indirect one as the last (virtio 2.7.5.3.2)."""
    a = good(guest)
    rest = table(guest, [(a + 30, 10, NEXT, 1), (a + 40, FRAME - 40, 0, 0)])
    queue = guest.drv.tx(0)
    head = offer(guest.drv, queue, [(a, 30, NEXT, 1), (rest, 32, INDIRECT, 0)])
    assert back(queue) == [(head, 0)]
    guest.next_icmp({0})


@both_formats
def test_zero_length_among_others(guest: Guest) -> None:
    """Descriptors of length 0 between good ones: carried or refused, but back at once, and no
    harm.
    """
    a = good(guest)
    queue = guest.drv.tx(0)
    descs = [(a, 0, NEXT, 1), (a, 12, NEXT, 2), (0, 0, NEXT, 3), (a + 12, FRAME - 12, 0, 0)]
    head = offer(guest.drv, queue, descs)
    assert back(queue) == [(head, 0)]
    alive(guest)


@both_formats
def test_largest_frame(guest: Guest, world: World) -> None:
    """65535 bytes of IPv4 are not too much; the drop for oversize must begin above them."""
    server = guest.with_host(world.udp(socket.AF_INET))
    frame = udp_frame(guest, server.port, bytes(65507))
    guest.transmit(frame, layout=Layout((12, 14, 4000)))
    guest.pump(lambda: server.inbox, 3, "the largest datagram at the host")
    assert len(server.inbox[0][0]) == 65507


@both_formats
def test_bad_chains_one_after_another(backend: Backend, guest: Guest) -> None:
    """A thousand bad buffers: each comes back, each is counted, and the processor is free
    afterwards.
    """
    counter = Counter(backend, "address", "tx")
    queue = guest.drv.tx(0)
    for _ in range(10):
        for _ in range(100):
            queue.ring.offer([(end(guest), 62, 0, 0)])
        queue.ring.publish()
        guest.drv.kick(queue)
        assert {length for _, length in back(queue, 100)} == {0}
    counter.wait(1000)
    alive(guest)
    assert backend.load(0.5) < 0.10


# --- receive ------------------------------------------------------------------------------------

RX_CHAINS: dict[str, tuple[str, Callable[[Guest, int], list[Desc]]]] = {
    "readable": ("direction", lambda g, a: [(a, 2048, 0, 0)]),
    "second readable": ("direction", lambda g, a: [(a, 12, WRITE | NEXT, 1), (a, 2048, 0, 0)]),
    "loop": ("loop", lambda g, a: [(a, 8, WRITE | NEXT, 0)]),
    "next outside": ("index", lambda g, a: [(a, 2048, WRITE | NEXT, NUM)]),
    "behind memory": ("address", lambda g, a: [(end(g), 2048, WRITE, 0)]),
    "across the end": ("address", lambda g, a: [(end(g) - 8, 2048, WRITE, 0)]),
    "wraps around": ("address", lambda g, a: [(2**64 - 8, 0x11000, WRITE, 0)]),
    "nested": ("indirect", lambda g, a: simple(g, a, [(a, 16, INDIRECT, 0)])),
    "table of length 8": ("indirect", lambda g, a: simple(g, a, [(a, 2048, WRITE, 0)], 8)),
}


def restart_empty(guest: Guest) -> None:
    """Rings anew, receive rings without a single buffer."""
    drv = guest.drv
    drv.stop_rings()
    for queue in drv.queues:
        queue.ring.reset()
    drv.refill = False
    drv.rx_limit = [0] * drv.pairs
    drv.start_rings()


@cases(RX_CHAINS, "nested")
def test_bad_receive_chain(backend: Backend, guest: Guest, name: str) -> None:
    """A bad buffer before good ones: back with length 0, and the frame goes into a good one."""
    reason, build = RX_CHAINS[name]
    counter = Counter(backend, reason, "rx")
    restart_empty(guest)
    drv, queue = guest.drv, guest.drv.rx(0)
    bad = offer(drv, queue, build(guest, drv.memory.alloc(4096)))
    drv.fill(0, limit=20)
    guest.ping(guest.gw4, 5, 5, b"into the good one")
    deadline = time.monotonic() + 3
    frames: list[tuple[int, int]] = []
    while not any(length for _, length in frames):
        assert time.monotonic() < deadline, f"no frame in the good buffers, only {frames}"
        frames += [(head, length) for head, length, _, _ in queue.ring.reap()]
        time.sleep(0.001)
    assert frames[0] == (bad, 0), "the bad buffer comes back first, with nothing in it"
    counter.wait(1)


@both_formats
def test_receive_chain_too_small(backend: Backend, make_guest: Callable[..., Guest]) -> None:
    """Without mergeable buffers a frame must fit one chain: one that does not is dropped and
    counted.
    """
    guest = make_guest(features=1 << 32 | 1 << 30 | GUEST_CSUM, rx=(200,))
    counter = Counter(backend, "rx small", "rx")
    guest.ping(guest.gw4, 1, 1, bytes(1000))
    counter.wait(1)
    assert {length for _, length, _, _ in guest.drv.rx(0).ring.reap()} <= {0}
    guest.drv.fill(0)
    guest.ping(guest.gw4, 1, 2, bytes(10))
    assert guest.next_icmp({0})[1].body[2:4] == b"\0\2"


@pytest.mark.parametrize("size", [1, 4, 11])
@both_formats
def test_receive_buffers_without_room_for_a_header(
    backend: Backend, make_guest: Callable[..., Guest], size: int
) -> None:
    """Mergeable buffers must hold at least the header (virtio 5.1.6.3.1): smaller ones must do no
    harm.
    """
    guest = make_guest(features=ALL & ~MQ, rx=(size,), resolve=False)
    body = pk.arp(1, guest.mac, guest.ip4, bytes(6), guest.gw4)
    guest.transmit(pk.ether(pk.BROADCAST, guest.mac, pk.ARP, body))
    guest.drv.wait_sent(0)
    time.sleep(0.1)
    assert backend.load(0.3) < 0.10
    guest.drv.stop_rings()
    for queue in guest.drv.queues:
        queue.ring.reset()
    guest.drv.rx_shape = [(2048,)]
    guest.drv.inbox[0].clear()
    guest.drv.start_rings()
    guest.resolve()
    alive(guest, 0)


# --- rings that make no sense -------------------------------------------------------------------


@pytest.mark.parametrize("jump", [NUM + 1, 0x4000, 0x8000, 0xFFFF])
@pytest.mark.parametrize("direction", ["tx", "rx"])
def test_available_index_jumps(backend: Backend, guest: Guest, jump: int, direction: str) -> None:
    """More new buffers than the ring has: it stops, says so, is counted, and the other pair does
    not notice.
    """
    counter = Counter(backend, "avail", direction)
    drv = guest.drv
    queue = drv.tx(0) if direction == "tx" else drv.rx(0)
    ring = queue.ring
    known = ring.used_idx if direction == "tx" else ring.used_idx
    ring.set_avail_idx(known + jump)
    drv.kick(queue)
    if direction == "rx":
        guest.ping(guest.gw4, 98, 0, b"", pair=0)
    readable, _, _ = select.select([queue.err], [], [], 3)
    assert readable, "the error descriptor is not signalled"
    counter.wait(1)
    alive(guest, 1)
    used = ring.used_idx
    for _ in range(5):
        drv.kick(queue)
    time.sleep(0.05)
    assert ring.used_idx == used, "a stopped ring was served"
    assert backend.load(0.3) < 0.10
    restart(guest)
    alive(guest)


def restart(guest: Guest) -> None:
    """A reset by the guest's driver: all rings stopped, set up from scratch, started."""
    drv = guest.drv
    drv.stop_rings()
    for queue in drv.queues:
        queue.ring.reset()
        os.eventfd_write(queue.err, 1)
        os.eventfd_read(queue.err)
    drv.refill = True
    drv.rx_limit = [NUM] * drv.pairs
    drv.start_rings()


@pytest.mark.parametrize("head", [NUM, NUM + 1, 65535])
@pytest.mark.parametrize("direction", ["tx", "rx"])
def test_head_outside_the_table(backend: Backend, guest: Guest, head: int, direction: str) -> None:
    """An available entry that names no descriptor: counted; it may stop this ring, no other."""
    counter = Counter(backend, "index", direction)
    if direction == "rx":
        restart_empty(guest)
    queue = guest.drv.tx(0) if direction == "tx" else guest.drv.rx(0)
    queue.ring.put_avail(head)
    queue.ring.publish()
    guest.drv.kick(queue)
    if direction == "rx":
        guest.ping(guest.gw4, 98, 0, b"", pair=0)
    counter.wait(1)
    assert backend.load(0.3) < 0.10
    restart(guest)
    alive(guest)


def test_available_index_runs_backwards(backend: Backend, guest: Guest) -> None:
    """Ten frames, then an index nine lower: impossible, hence the ring is stopped."""
    for i in range(10):
        guest.ping(guest.gw4, 97, i, b"")
    guest.drv.wait_sent(0)
    counter = Counter(backend, "avail", "tx")
    queue = guest.drv.tx(0)
    queue.ring.set_avail_idx(queue.ring.used_idx - 9)
    guest.drv.kick(queue)
    counter.wait(1)
    restart(guest)
    alive(guest)


def test_rings_full_of_garbage(backend: Backend, guest: Guest) -> None:
    """Random bytes over the descriptor tables and available rings of one pair, 200 times, with
    kicks.
    """
    rng = random.Random(4)
    drv = guest.drv
    guest.serving = [1]
    for round_number in range(200):
        for queue in (drv.rx(0), drv.tx(0)):
            ring, memory = queue.ring, drv.memory
            memory.write(ring.desc, garbage(rng, memory.end))
            memory.write(ring.avail + 4, struct.pack(f"<{NUM}H", *rng.choices(range(300), k=NUM)))
            ring.set_avail_idx(ring.used_idx + rng.choice((1, 10, NUM, NUM, 300)))
            drv.kick(queue)
        if round_number % 20 == 19:
            time.sleep(0.02)
            alive(guest, 1)
            restart_pair(guest)
    assert backend.load(0.5) < 0.10
    restart(guest)
    guest.serving = [0, 1]
    alive(guest)


def garbage(rng: random.Random, end: int) -> bytes:
    """A descriptor table of random, half plausible entries."""
    return b"".join(
        DESC.pack(
            rng.choice((rng.randrange(end), rng.getrandbits(64), 0x20000)),
            rng.choice((rng.randrange(2000), rng.getrandbits(32), 0)),
            rng.choice((0, NEXT, WRITE, WRITE | NEXT, INDIRECT, rng.getrandbits(16))),
            rng.choice((rng.randrange(NUM), rng.getrandbits(16))),
        )
        for _ in range(NUM)
    )


def restart_pair(guest: Guest) -> None:
    """Stop both rings of pair 0 and start them again, empty."""
    drv = guest.drv
    for queue in (drv.rx(0), drv.tx(0)):
        drv.stop_ring(queue.index)
        queue.ring.reset()
        drv.start_ring(queue, 0)
        drv.enable(queue.index, True)


def test_descriptors_change_under_our_hands(backend: Backend, guest: Guest, world: World) -> None:
    """The guest rewrites descriptors while they are being read (double fetch): wrong frames, but
    no harm.
    """
    drv, queue = guest.drv, guest.drv.tx(0)
    a, bad = good(guest), drv.memory.end + (1 << 40)
    rng = random.Random(1)
    for _ in range(300):
        head = offer(drv, queue, [(a, 12, NEXT, 1), (a + 12, FRAME - 12, 0, 0)])
        second = queue.ring.chains[head].ids[1]
        for _ in range(4):
            queue.ring.write_desc(second, rng.choice((bad, a, 0)), rng.getrandbits(32), 0, 0)
            queue.ring.write_desc(second, a + 12, FRAME - 12, rng.getrandbits(3), head)
        back(queue)
        guest.drv.poll(0)
        guest.drv.inbox[0].clear()
    guest.pump(timeout=0.05)
    guest.icmp.clear()
    alive(guest)


# --- frames that make no sense ------------------------------------------------------------------

OFFLOADS: dict[str, dict[str, Any]] = {
    "TSO that was not negotiated": {"flags": 1, "gso_type": 1, "gso_size": 1000, "hdr_len": 54},
    "unknown gso_type": {"flags": 1, "gso_type": 77, "gso_size": 1000},
}


@pytest.mark.parametrize("name", OFFLOADS)
@both_formats
def test_bad_offload(backend: Backend, guest: Guest, world: World, name: str) -> None:
    """A virtio-net header that asks for the impossible: the frame is dropped under its reason."""
    counter = Counter(backend, "offload", "tx")
    server = guest.with_host(world.udp(socket.AF_INET))
    fields = {"csum_start": 34, "csum_offset": 6, **OFFLOADS[name]}
    guest.transmit(udp_frame(guest, server.port, b"x" * 500), header=pk.VnetHeader(**fields))
    assert set(guest.drv.wait_sent(0)) == {0}
    counter.wait(1)
    alive(guest)
    assert not server.inbox


@pytest.mark.parametrize(("start", "offset"), [(60000, 16), (65535, 65535), (0, 0), (34, 65535)])
def test_checksum_outside_the_frame(
    backend: Backend, guest: Guest, world: World, start: int, offset: int
) -> None:
    """NEEDS_CSUM at an impossible place: carried as it is or dropped, but nothing is written
    there.
    """
    server = guest.with_host(world.udp(socket.AF_INET))
    header = pk.VnetHeader(flags=1, csum_start=start, csum_offset=offset)
    guest.transmit(udp_frame(guest, server.port, b"x" * 500), header=header)
    assert set(guest.drv.wait_sent(0)) == {0}
    alive(guest)
    assert [data for data, _ in server.inbox] in ([], [b"x" * 500])


def frames(guest: Guest, port: int) -> list[bytes]:
    """One good frame of each kind a guest sends."""
    four, six = (guest.ip4, guest.gw4), (guest.ip6, guest.gw6)
    eth = (guest.gw_mac, guest.mac)
    made = []
    for src, dst in (four, six):
        udp = pk.udp(src, dst, 7000, port, b"payload")
        syn = pk.tcp(src, dst, 7001, port, seq=1, flags=2, options=pk.tcp_options(1460, 7))
        rest = struct.pack(">HH", 1, 1) + b"echo"
        echo = pk.icmp(8, 0, rest) if len(src) == 4 else pk.icmp6(src, dst, 128, 0, rest)
        for proto, body in (
            (pk.UDP, udp),
            (pk.TCP, syn),
            (pk.ICMP if len(src) == 4 else pk.ICMP6, echo),
        ):
            made.append(pk.ip_frame(eth, pk.ip_packet(src, dst, proto, body)))
    made.append(pk.ether(*eth, pk.ARP, pk.arp(1, guest.mac, guest.ip4, bytes(6), guest.gw4)))
    dhcp = pk.udp(bytes(4), b"\xff" * 4, 68, 67, pk.dhcp(guest.mac, 1, 1, {55: b"\1\3\6"}))
    made.append(pk.ip_frame(eth, pk.ipv4(bytes(4), b"\xff" * 4, pk.UDP, dhcp)))
    group = pk.solicited_node(guest.gw6)
    solicit = pk.icmp6(guest.ip6, group, 135, 0, bytes(4) + guest.gw6 + b"\1\1" + guest.mac)
    made.append(pk.ip_frame(eth, pk.ipv6(guest.ip6, group, pk.ICMP6, solicit, ttl=255)))
    return made


@both_formats
def test_broken_frames(backend: Backend, guest: Guest, world: World) -> None:
    """3000 frames with random bytes changed, cut short or prolonged: each is taken, none does
    harm.
    """
    server = world.udp(socket.AF_INET)
    rng = random.Random(7)
    whole = frames(guest, server.port)
    guest.drv.refill = False
    for i in range(3000):
        frame = bytearray(rng.choice(whole))
        for _ in range(rng.choice((0, 1, 1, 2, 5))):
            frame[rng.randrange(12, len(frame))] = rng.choice((0, 255, rng.randrange(256)))
        cut = rng.choice((None, None, rng.randrange(14, len(frame))))
        tail = bytes(rng.choice((0, 0, 0, rng.randrange(100))))
        guest.drv.send(i % 2, bytes(frame[:cut]) + tail, publish=i % 50 == 49)
    for pair in (0, 1):
        guest.drv.publish(guest.drv.tx(pair))
        assert set(guest.drv.wait_sent(pair)) <= {0}
    server.close()
    restart(guest)
    guest.pump(timeout=0.1)
    guest.icmp.clear()
    alive(guest)
