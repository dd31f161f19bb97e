"""Packed rings no driver should make: refused, counted, and nobody else's problem.

The contract is that of test_hostile_rings.py, which has all that is the same in both formats. Here
is what only packed rings can be: wrap counters that lie, chains without a last descriptor, tables
whose flags mean nothing, event suppression areas with garbage, bases outside the ring.
"""

from __future__ import annotations

import random
import select
import socket
import struct
import time
from collections.abc import Callable

import driver as vu
import pytest
from backend import Backend
from driver import MQ, RING_PACKED, Driver, Lost, Queue
from formats import packed_formats
from guest import Guest, random_bytes
from test_hostile_rings import (
    ALL,
    FRAME,
    METRIC,
    Counter,
    alive,
    back,
    end,
    good,
    offer,
    restart,
    table,
)
from vring import DESC, INDIRECT, NEXT, WRITE, Layout
from vring_packed import AT_DESC, AVAIL, DISABLE, ENABLE, USED, PackedRing
from world import World

pytestmark = pytest.mark.passt_lacks("split rings only")
NUM = 251


@pytest.fixture
def guest(make_guest: Callable[..., Guest], rings: int) -> Guest:
    """Two pairs: what happens to one must not touch the other."""
    return make_guest(pairs=2, num=NUM, features=ALL | RING_PACKED)


def ring_of(queue: Queue) -> PackedRing:
    assert isinstance(queue.ring, PackedRing)
    return queue.ring


def show(drv: Driver, queue: Queue) -> None:
    queue.ring.publish()
    drv.kick(queue)


def drops(backend: Backend, direction: str = "tx") -> int:
    return int(backend.total(METRIC, direction=direction))


def wait_drops(backend: Backend, more_than: int, direction: str = "tx") -> None:
    deadline = time.monotonic() + 3
    while drops(backend, direction) <= more_than:
        assert time.monotonic() < deadline, "nothing is counted"
        time.sleep(0.05)


def harmless(backend: Backend, guest: Guest) -> None:
    """The other pair goes on, nothing spins, and after a new start all is well."""
    guest.serving = [1]
    alive(guest, 1)
    load = backend.load(0.3)
    assert load < 0.10, f"{load:.0%} of a processor"
    restart(guest)
    guest.serving = [0, 1]
    alive(guest)


# --- chains ---------------------------------------------------------------------------------------


@packed_formats
def test_chain_of_the_whole_ring(guest: Guest, world: World) -> None:
    """The longest chain there may be, from the first descriptor of a lap and from elsewhere."""
    server = guest.with_host(world.udp(socket.AF_INET))
    for turn in range(8):
        data = random_bytes(400 + turn)
        where = Layout((1,) * (NUM - 1)) if turn % 2 else Layout((3,))
        guest.send_udp(guest.gw4, 7000, server.port, data, layout=where)
        guest.pump(lambda: server.inbox, 3, f"datagram {turn}")
        assert server.inbox.popleft()[0] == data
        assert guest.drv.wait_sent(0) in ([], [0])


@pytest.mark.parametrize("direction", ["tx", "rx"])
def test_chain_without_an_end(backend: Backend, guest: Guest, direction: str) -> None:
    """NEXT in every descriptor of the ring: there is no id to return it by."""
    drv, before = guest.drv, drops(backend, direction)
    queue = drv.tx(0) if direction == "tx" else drv.rx(0)
    restart_empty(guest)
    a = good(guest)
    offer(drv, queue, [(a, 1, NEXT | WRITE * (direction == "rx"), 0)] * NUM)
    if direction == "rx":
        guest.ping(guest.gw4, 98, 0, b"", pair=0)
    wait_drops(backend, before, direction)
    assert queue.ring.pending() or select.select([queue.err], [], [], 3)[0], (
        "neither returned nor is the ring said to be broken"
    )
    harmless(backend, guest)


def restart_empty(guest: Guest) -> None:
    """Rings anew, receive rings without a single buffer."""
    drv = guest.drv
    drv.stop_rings()
    for queue in drv.queues:
        queue.ring.reset()
    drv.refill = False
    drv.rx_limit[0] = 0
    drv.start_rings()


def test_one_id_for_all(guest: Guest) -> None:
    """Ids are the driver's business: the device repeats what it was given, twice if need be."""
    drv, queue = guest.drv, guest.drv.tx(0)
    ring, a, first = ring_of(queue), good(guest), guest.drv.tx(0).ring.next_avail
    for _ in range(3):
        ring.put_descs([(a, 30, NEXT, 1), (a + 30, FRAME - 30, 0, 7)])
    show(drv, queue)
    for _ in range(3):
        drv.recv(0)
    for place in (first, first + 2, first + 4):
        at = ring.desc + place % NUM * 16
        deadline = time.monotonic() + 3
        while not drv.memory.read(at + 15, 1)[0] & USED >> 8:
            assert time.monotonic() < deadline, "a buffer does not come back"
        assert DESC.unpack(drv.memory.read(at, 16))[1:] == (0, 7, AVAIL | USED)
    restart(guest)
    alive(guest)


def test_bad_and_good_buffers_through_many_laps(backend: Backend, guest: Guest) -> None:
    """Bad chains of any length between good ones: each back at its place, in some forty laps."""
    rng, counter = random.Random(3), Counter(backend, "address", "tx")
    drv, queue, a = guest.drv, guest.drv.tx(0), good(guest)
    bad = good_ones = 0
    while queue.ring.next_avail < 40 * NUM:
        for _ in range(rng.randint(1, 8)):
            length = rng.choice((1, 1, 2, 5, 20))
            flags = [NEXT] * (length - 1) + [0]
            if rng.random() < 0.5:
                chain = [(end(guest), 7, one, 0) for one in flags]
                bad += 1
            else:
                cuts = [0, *sorted(rng.choices(range(FRAME), k=length - 1)), FRAME]
                parts = zip(cuts, cuts[1:], strict=False)
                chain = [(a + x, y - x, f, 0) for (x, y), f in zip(parts, flags, strict=True)]
                good_ones += 1
            queue.ring.offer(chain)
        show(drv, queue)
        out = len(queue.ring.chains)
        assert {length for _, length in back(queue, out)} == {0}
        drv.poll(0)
        drv.inbox[0].clear()
    counter.wait(bad)
    assert good_ones > 500
    guest.pump(timeout=0.1)
    guest.icmp.clear()
    alive(guest)


# --- tables ---------------------------------------------------------------------------------------

RESERVED = [NEXT, AVAIL, USED, AVAIL | USED, 0x7F78, 0xFFFF & ~(WRITE | INDIRECT)]


@pytest.mark.parametrize("flags", RESERVED, ids=hex)
@pytest.mark.parametrize("ring_flags", [0, WRITE])
def test_reserved_flags_around_tables(guest: Guest, flags: int, ring_flags: int) -> None:
    """In a table all flags but WRITE are ignored, and ids are; so is WRITE where a table is named
    (2.8.7).
    """
    a, queue = good(guest), guest.drv.tx(0)
    entries = [(a, 30, flags, 999), (a + 30, 20, flags, 0), (a + 50, FRAME - 50, flags, 0xFFFF)]
    head = offer(guest.drv, queue, [(table(guest, entries), 48, INDIRECT | ring_flags, 0)])
    assert back(queue) == [(head, 0)]
    guest.next_icmp({0})


def test_a_table_in_a_table(backend: Backend, guest: Guest) -> None:
    """No driver may set INDIRECT there (2.8.18). Ignored like other flags (2.8.7), or refused and
    counted; what the entry names is never taken for a table.
    """
    counter, a = Counter(backend, "indirect", "tx"), good(guest)
    inner = table(guest, [(a, FRAME, 0, 0)])
    queue, payload = guest.drv.tx(0), guest.drv.memory.read(a, FRAME)
    guest.drv.memory.write(inner + 16, payload)
    entries = [(a, 30, 0, 0), (inner + 16 + 30, FRAME - 30, INDIRECT, 0)]
    head = offer(guest.drv, queue, [(table(guest, entries), 32, INDIRECT, 0)])
    assert back(queue) == [(head, 0)]
    guest.pump(lambda: guest.icmp or counter(), 3, "neither carried nor counted")
    assert len(guest.icmp) + counter() == 1


@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize("write", [0, 1, 2])
def test_receive_buffers_are_written_only_where_they_may_be(
    backend: Backend, guest: Guest, indirect: bool, write: int
) -> None:
    """Some of three descriptors are not writable: back with nothing in it, counted, untouched."""
    counter = Counter(backend, "direction", "rx")
    restart_empty(guest)
    drv, queue, gpa = guest.drv, guest.drv.rx(0), guest.drv.memory.alloc(4096)
    flags = [WRITE * (number != write) for number in range(3)]
    entries = [(gpa + 1000 * number, 1000, one, 0) for number, one in enumerate(flags)]
    if indirect:
        offer(drv, queue, [(table(guest, entries), 48, INDIRECT, 0)])
    else:
        bits = [flag | NEXT * (number < 2) for number, flag in enumerate(flags)]
        offer(drv, queue, [(*one[:2], bit, 0) for one, bit in zip(entries, bits, strict=True)])
    drv.memory.write(gpa, b"\x99" * 4096)
    guest.ping(guest.gw4, 1, 1, bytes(1900), pair=0)
    assert [length for _, length in back(queue)] == [0]
    counter.wait(1)
    assert drv.memory.read(gpa, 4096) == b"\x99" * 4096, "written all the same"
    restart(guest)
    alive(guest)


# --- marks that lie -------------------------------------------------------------------------------


def test_a_descriptor_of_the_other_lap(backend: Backend, guest: Guest) -> None:
    """A kick, but the marks say: not yet. Nothing happens until they do, and then it does."""
    drv, queue = guest.drv, guest.drv.tx(0)
    ring, a = ring_of(queue), good(guest)
    for wrong in (AVAIL | USED, AVAIL, USED):
        ring.offer([(a, FRAME, 0, 0)])
        place = ring.next_avail - 1
        right = AVAIL if ring.wrap(place) else USED
        ring._hidden = (place, right ^ wrong)
        show(drv, queue)
        guest.serving = [1]
        for _ in range(3):
            drv.kick(queue)
        alive(guest, 1)
        assert backend.load(0.2) < 0.10
        shared = ring.shared()[16 * (place % NUM) :][:16]
        assert DESC.unpack(shared)[3] == right ^ wrong, "it was used"
        assert not drv.rx(0).ring.pending(), "it was carried"
        ring.set_flags(place, right)
        guest.serving = [0, 1]
        drv.kick(queue)
        back(queue)
        guest.next_icmp({0})


@pytest.mark.parametrize("wrong", [AVAIL | USED, AVAIL, USED], ids=["other-lap", "AVAIL", "USED"])
def test_a_chain_whose_second_descriptor_is_not_available(
    backend: Backend, guest: Guest, wrong: int
) -> None:
    """All of a chain must bear the marks (2.8.6). Carried, refused or the ring stopped: no harm."""
    drv, queue = guest.drv, guest.drv.tx(0)
    a = good(guest)
    offer(drv, queue, [(a, 30, NEXT, 0), (a + 30, FRAME - 30, wrong, 0)])
    select.select([queue.err], [], [], 0.2)
    harmless(backend, guest)


@pytest.mark.parametrize("direction", ["tx", "rx"])
def test_all_descriptors_are_available(backend: Backend, guest: Guest, direction: str) -> None:
    """A driver that marks descriptors it never wrote: as many bad buffers as the ring has."""
    restart_empty(guest)
    drv, before = guest.drv, drops(backend, direction)
    queue = drv.tx(0) if direction == "tx" else drv.rx(0)
    ring = ring_of(queue)
    ring.offer([(0, 0, 0, 0)] * NUM)
    for place in range(NUM):
        ring.set_flags(place, AVAIL)
    drv.kick(queue)
    guest.ping(guest.gw4, 1, 1, b"", pair=1)
    if direction == "rx":
        server_frame(guest)
    wait_drops(backend, before, direction)
    harmless(backend, guest)


def server_frame(guest: Guest) -> None:
    """Make the device want to deliver on pair 0."""
    guest.ping(guest.gw4, 98, 0, b"", pair=0)


def test_flags_change_under_our_hands(backend: Backend, guest: Guest) -> None:
    """The guest rewrites flags, lengths and ids of what it has shown (double fetch)."""
    guest.serving = [1]
    drv, queue, rng = guest.drv, guest.drv.tx(0), random.Random(1)
    ring, a = ring_of(queue), good(guest)
    for _ in range(100):
        first = ring.next_avail
        offer(drv, queue, [(a, 12, NEXT, 0), (a + 12, FRAME - 12, NEXT, 0), (a, 9, 0, 0)])
        for _ in range(20):
            at = ring.desc + (first + rng.randrange(3)) % NUM * 16
            drv.memory.write(at + 8, rng.randbytes(4))
            drv.memory.write(at + 12, rng.randbytes(2))
            ring.set_flags(first + rng.randrange(3), rng.getrandbits(16))
        drv.stop_ring(1)
        ring.reset()
        drv.start_ring(queue)
        drv.enable(1, True)
        drv.poll(0)
        drv.inbox[0].clear()
    harmless(backend, guest)


def test_packed_rings_full_of_garbage(backend: Backend, guest: Guest) -> None:
    """Random bytes over the descriptor rings of one pair, 200 times, with kicks."""
    rng, drv = random.Random(4), guest.drv
    guest.serving = [1]
    for turn in range(200):
        for queue in (drv.rx(0), drv.tx(0)):
            ring = ring_of(queue)
            drv.memory.write(ring.desc, garbage(rng, drv.memory.end))
            ring.suppress(rng.getrandbits(32))
            drv.memory.write(ring.used, rng.randbytes(4))
            drv.kick(queue)
        if turn % 10 == 9:
            time.sleep(0.02)
            alive(guest, 1)
            for queue in (drv.rx(0), drv.tx(0)):
                drv.stop_ring(queue.index)
                queue.ring.reset()
                drv.start_ring(queue)
                drv.enable(queue.index, True)
    harmless(backend, guest)


def garbage(rng: random.Random, limit: int) -> bytes:
    """A descriptor ring of random, half plausible entries, half of them available in each lap."""
    return b"".join(
        DESC.pack(
            rng.choice((rng.randrange(limit), rng.getrandbits(64), 0x20000)),
            rng.choice((rng.randrange(2000), rng.getrandbits(32), 0)),
            rng.getrandbits(16),
            rng.choice((0, 0, NEXT, WRITE, WRITE | NEXT, INDIRECT, rng.getrandbits(16)))
            | rng.choice((AVAIL, USED)),
        )
        for _ in range(NUM)
    )


# --- event suppression ----------------------------------------------------------------------------

AREAS = {
    "reserved flags": 3 << 16,
    "more flags than there are": 0xFFFF << 16,
    "disabled, with reserved bits": (DISABLE | 0xFFFC) << 16,
    "enabled, with a descriptor": ENABLE << 16 | 0xFFFF,
    "a descriptor just outside": AT_DESC << 16 | 0x8000 | NUM,
    "a descriptor far outside": AT_DESC << 16 | 0xFFFF,
    "all ones": 0xFFFFFFFF,
}


@pytest.mark.parametrize("features", [ALL, ALL & ~vu.EVENT_IDX], ids=["event-idx", "flags"])
@pytest.mark.parametrize("name", AREAS)
def test_garbage_in_the_event_suppression_area(
    backend: Backend, make_guest: Callable[..., Guest], name: str, features: int
) -> None:
    """Whatever the driver writes there, frames are carried; calls are its own loss."""
    guest = make_guest(features=(features & ~MQ) | RING_PACKED, num=NUM)
    drv = guest.drv
    for queue in drv.queues:
        ring_of(queue).suppress(AREAS[name])
    rx = ring_of(drv.rx(0))
    for number in range(NUM + 20):
        before = rx.used_idx
        guest.ping(guest.gw4, 1, number, b"")
        deadline = time.monotonic() + 3
        while rx.used_idx == before:
            assert time.monotonic() < deadline, f"frame {number} is not carried"
        drv.poll(0)
    assert len(drv.inbox[0]) == NUM + 20
    assert backend.load(0.2) < 0.10
    drv.inbox[0].clear()
    alive(guest, 0)


# --- what the VMM says ----------------------------------------------------------------------------


def denied(drv: Driver, queue: Queue, request: int, payload: bytes) -> bool:
    """Whether this message, or starting the ring with what it says, is refused, or the connection
    ends.
    """
    try:
        return bool(
            drv.call(request, payload)
            or drv.call(vu.SET_VRING_KICK, struct.pack("<Q", queue.index), [queue.kick])
        )
    except Lost as error:
        assert "timed out" not in str(error), "neither an answer nor an end"
        return True


def stopped(guest: Guest) -> Queue:
    """The transmit ring of pair 0, stopped with all else; it has been told size and addresses."""
    guest.drv.stop_rings()
    queue = guest.drv.tx(0)
    guest.drv.must(vu.SET_VRING_NUM, struct.pack("<II", queue.index, queue.ring.num))
    guest.drv.must(vu.SET_VRING_ADDR, guest.drv.addresses(queue))
    guest.drv.must(vu.SET_VRING_BASE, struct.pack("<II", queue.index, queue.ring.base))
    return queue


def again(backend: Backend, guest: Guest, make_guest: Callable[..., Guest]) -> None:
    """The same device, or if its connection ended another, works."""
    try:
        guest.drv.barrier()
    except Lost:
        guest = make_guest(pairs=2, num=NUM, features=ALL | RING_PACKED)
    else:
        restart(guest)
    alive(guest)


PLACES = {
    "descriptors at an odd address": ("desc", 1),
    "descriptors not aligned": ("desc", 8),
    "driver's area at an odd address": ("avail", 1),
    "driver's area not aligned": ("avail", 2),
    "device's area at an odd address": ("used", 1),
    "device's area not aligned": ("used", 2),
    "descriptors outside memory": ("desc", 1 << 40),
    "driver's area outside memory": ("avail", 1 << 40),
    "device's area outside memory": ("used", 1 << 40),
}


@pytest.mark.parametrize("name", PLACES)
def test_ring_addresses(
    backend: Backend, guest: Guest, make_guest: Callable[..., Guest], name: str
) -> None:
    """Refused at once or at the start (2.8.10.1), and right ones are taken after that."""
    which, offset = PLACES[name]
    queue, user = stopped(guest), guest.drv.memory.user
    places = {part: user(getattr(queue.ring, part)) for part in ("desc", "used", "avail")}
    places[which] += offset
    payload = struct.pack("<IIQQQQ", queue.index, 0, *places.values(), 0)
    assert denied(guest.drv, queue, vu.SET_VRING_ADDR, payload), f"{name}: accepted"
    again(backend, guest, make_guest)


@pytest.mark.parametrize("part", ["desc", "used", "avail"])
def test_ring_up_to_the_end_of_memory(
    backend: Backend, guest: Guest, make_guest: Callable[..., Guest], part: str
) -> None:
    """A part that just fits is served, one unit further is refused."""
    size, align = (16 * NUM, 16) if part == "desc" else (4, 4)
    queue, region = stopped(guest), guest.drv.memory.regions[-1]
    user = guest.drv.memory.user
    places = {name: user(getattr(queue.ring, name)) for name in ("desc", "used", "avail")}
    for offset, wrong in ((align, True), (0, False)):
        places[part] = region.user + region.size - size + offset
        payload = struct.pack("<IIQQQQ", queue.index, 0, *places.values(), 0)
        assert denied(guest.drv, queue, vu.SET_VRING_ADDR, payload) == wrong
    again(backend, guest, make_guest)


@pytest.mark.parametrize("num", [0, 32769, 65536, 1 << 31, 0xFFFFFFFF])
def test_ring_sizes_that_do_not_exist(
    backend: Backend, guest: Guest, make_guest: Callable[..., Guest], num: int
) -> None:
    queue = stopped(guest)
    payload = struct.pack("<II", queue.index, num)
    assert denied(guest.drv, queue, vu.SET_VRING_NUM, payload), f"size {num}: accepted"
    again(backend, guest, make_guest)


@pytest.mark.parametrize("direction", ["tx", "rx"])
@pytest.mark.parametrize(
    "base",
    [NUM, NUM | 0x8000, 0x7FFF, 0xFFFF, NUM << 16 | 0x80008000, 0x7FFF0000, 0xFFFFFFFF, 0xFFFF8000],
    ids=hex,
)
def test_bases_outside_the_ring(
    backend: Backend, guest: Guest, make_guest: Callable[..., Guest], base: int, direction: str
) -> None:
    """Refused, or the ring does not run: the other pair does not notice, and a right base works."""
    drv = guest.drv
    queue = drv.tx(0) if direction == "tx" else drv.rx(0)
    drv.stop_ring(queue.index)
    queue.ring.reset()
    try:
        drv.call(vu.SET_VRING_BASE, struct.pack("<II", queue.index, base))
        drv.call(vu.SET_VRING_ADDR, drv.addresses(queue))
        drv.call(vu.SET_VRING_KICK, struct.pack("<Q", queue.index), [queue.kick])
        drv.call(vu.SET_VRING_ENABLE, struct.pack("<II", queue.index, 1))
        offer(drv, queue, [(good(guest), FRAME, WRITE * (direction == "rx"), 0)])
        drv.barrier()
    except Lost:
        again(backend, guest, make_guest)
    else:
        harmless(backend, guest)
