"""The flow table against a dictionary, its hash against the published one, processes at once."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable

import pytest
from compiled import Leaves, area, in_processes
from hypothesis import given
from hypothesis import strategies as st

from flows.table import TABLE, descriptors, forget_claims, lose_descriptors, of_worker
from shm.jit import COMPILED
from shm.layout import View
from shm.schema import BUCKET_SLOTS, BUCKETS, FLOW, FLOWS_MAX, offsets

T = Leaves("flows.table")
AT = offsets(1)
SEGMENT, SEGMENT_BYTES = area(AT.size)


def part(start: int, size: int) -> tuple[int, memoryview]:
    """Address and bytes of a part of the segment."""
    return SEGMENT + start, memoryview(SEGMENT_BYTES)[start : start + size]


TAGS, TAG_BYTES = part(AT.tags, 4 * FLOWS_MAX)
LOCKS, LOCK_BYTES = part(AT.locks, 4 * BUCKETS)
ENTRIES, ENTRY_BYTES = part(AT.flow, FLOW.size * FLOWS_MAX)
SECRET = (0x0123456789ABCDEF, 0x7EDCBA9876543210)


def make_table() -> tuple[int, View, int]:
    """One process's view of the shared table: its address, its words, and room for a key."""
    address, buffer = area(4096)
    view = View(TABLE, buffer, 0)
    view["tags"], view["locks"], view["flows"] = TAGS, LOCKS, ENTRIES
    view["key0"], view["key1"] = SECRET
    return address, view, address + 2048


TABLE_AT, VIEW, KEY = make_table()


def put_key(key: bytes) -> int:
    VIEW.buffer[2048 : 2048 + len(key)] = key
    return KEY


def make_key(number: int, protocol: int = 0) -> bytes:
    guest = bytes(10) + b"\xff\xff" + struct.pack(">I", 0x0A000001 + number % 3)
    far = random.Random(number).randbytes(16)
    return guest + far + struct.pack("<HHI", number & 0xFFFF, number * 7 & 0xFFFF, protocol)


def entry(index: int) -> View:
    return View(FLOW, ENTRY_BYTES, index * FLOW.size)


def tag_of(index: int) -> int:
    return int(struct.unpack_from("<I", TAG_BYTES, 4 * index)[0])


def set_tag(index: int, tag: int) -> None:
    struct.pack_into("<I", TAG_BYTES, 4 * index, tag)


def find(key: bytes) -> int:
    return int(T.find(TABLE_AT, put_key(key)))


def claim(key: bytes, home: int = 0, pair: int = 0) -> int:
    return int(T.claim(TABLE_AT, put_key(key), home, pair))


def release(index: int) -> None:
    T.release(TABLE_AT, index)


@pytest.fixture(autouse=True)
def empty_table():
    """Every test leaves the table as it found it: empty."""
    yield
    for index, (tag,) in enumerate(struct.iter_unpack("<I", TAG_BYTES[:])):
        if tag:
            release(index)
    VIEW["last"] = 0
    assert not any(LOCK_BYTES[:])


# --- the hash -------------------------------------------------------------------------------------


def half_sip_hash(data: bytes, key: bytes, rounds: tuple[int, int]) -> bytes:
    """HalfSipHash with 8 bytes of output, step by step as its authors describe it."""
    mask = 0xFFFFFFFF

    def rotated(value: int, bits: int) -> int:
        return (value << bits | value >> 32 - bits) & mask

    def mix(v: list[int], times: int) -> None:
        for _ in range(times):
            for a, b, bits in ((0, 1, 5), (2, 3, 8), (0, 3, 7), (2, 1, 13)):
                v[a] = v[a] + v[b] & mask
                v[b] = rotated(v[b], bits) ^ v[a]
                if (a, b) in ((0, 1), (2, 1)):
                    v[a] = rotated(v[a], 16)

    k0, k1 = struct.unpack("<II", key)
    v = [k0, k1 ^ 0xEE, 0x6C796765 ^ k0, 0x74656462 ^ k1]
    padded = data + bytes(3 - len(data) % 4) + bytes([len(data) & 255])
    for (word,) in struct.iter_unpack("<I", padded):
        v[3] ^= word
        mix(v, rounds[0])
        v[0] ^= word
    v[2] ^= 0xEE
    mix(v, rounds[1])
    first = v[1] ^ v[3]
    v[1] ^= 0xDD
    mix(v, rounds[1])
    return struct.pack("<II", first, v[1] ^ v[3])


@pytest.mark.parametrize(
    ("size", "digest"),
    [
        (0, "218d1f59b9b83cc8"),
        (1, "be552412f8387315"),
        (3, "ce0f1a45f7060679"),
        (8, "edfee820bce4858c"),
        (12, "7bc71f9faef5c799"),
    ],
)
def test_the_slow_hash_is_the_published_one(size, digest):
    """Vectors of the reference implementation: HalfSipHash-2-4, 64 bits, key 00..07, data 00.."""
    assert half_sip_hash(bytes(range(size)), bytes(range(8)), (2, 4)).hex() == digest


@given(st.binary(min_size=40, max_size=40), st.tuples(*[st.integers(0, (1 << 64) - 1)] * 2))
def test_hash(key, secret):
    VIEW["key0"], VIEW["key1"] = secret
    try:
        value = T.hash_key(TABLE_AT, put_key(key))
    finally:
        VIEW["key0"], VIEW["key1"] = SECRET
    secret_bytes = struct.pack("<II", secret[0] & 0xFFFFFFFF, secret[1] & 0xFFFFFFFF)
    low, high = struct.unpack("<II", half_sip_hash(key, secret_bytes, (1, 3)))
    assert value == low | (high & 0x3FFFFFFF) << 32


def halves(key: bytes) -> tuple[int, int]:
    """The two words of a key's hash."""
    secret = struct.pack("<II", SECRET[0] & 0xFFFFFFFF, SECRET[1] & 0xFFFFFFFF)
    low, high = struct.unpack("<II", half_sip_hash(key, secret, (1, 3)))
    return low, high


def places(key: bytes) -> tuple[list[int], int]:
    """The slots a key may stand in, and its tag, from the description in table.py."""
    low, high = halves(key)
    first, second = low % BUCKETS, (low >> 16) % BUCKETS
    if first == second:
        second ^= 1
    slots = [BUCKET_SLOTS * b + slot for b in (first, second) for slot in range(BUCKET_SLOTS)]
    return slots, high & 0x3FFFFFFF | 0x40000000


# --- one process ----------------------------------------------------------------------------------


STEPS = st.lists(
    st.tuples(st.sampled_from(["claim", "find", "release"]), st.integers(0, 11)), max_size=60
)


@given(STEPS)
def test_against_a_dictionary(steps):
    keys = [make_key(number, number % 3) for number in range(12)]
    model: dict[bytes, int] = {}
    for operation, number in steps:
        key = keys[number]
        if operation == "claim":
            index = claim(key, home=number, pair=number % 4)
            assert index == model.setdefault(key, index)
            assert index in places(key)[0]
        elif operation == "find":
            assert find(key) == model.get(key, -1)
        elif key in model:
            release(model.pop(key))
        assert len(set(model.values())) == len(model)
    for key in keys:
        assert find(key) == model.get(key, -1)
        assert find(key) == model.get(key, -1), "the second time it may be the flow found last"
    for index in model.values():
        release(index)
    assert all(find(key) == -1 for key in keys)


@pytest.mark.parametrize("at", range(36))
def test_a_key_that_differs_in_one_byte_is_another_flow(at):
    key = bytearray(make_key(1))
    index = claim(bytes(key))
    assert find(bytes(key)) == index
    key[at] ^= 1
    assert find(bytes(key)) == -1
    assert claim(bytes(key)) not in (index, -1)


def test_protocols_are_told_apart():
    indexes = {claim(make_key(1, protocol)) for protocol in range(3)}
    assert len(indexes) == 3
    assert {find(make_key(1, protocol)) for protocol in range(3)} == indexes


@given(
    st.binary(min_size=36, max_size=36), st.integers(0, 2), st.integers(0, 31), st.integers(0, 31)
)
def test_a_new_entry(addresses, protocol, home, pair):
    key = addresses + struct.pack("<I", protocol)
    index = claim(key, home, pair)
    flow = entry(index)
    before = flow["generation"]
    ENTRY_BYTES[index * FLOW.size + 8 : (index + 1) * FLOW.size] = b"\xee" * (FLOW.size - 8)
    flow["generation"] = before
    release(index)
    assert claim(key, home, pair) == index
    assert flow.bytes("guest_addr") + flow.bytes("far_addr") == key[:32]
    assert (flow["guest_port"], flow["far_port"]) == struct.unpack("<HH", key[32:36])
    expected = {
        "protocol": protocol, "home": home, "tx_queue": pair, "fd": -1,
        "generation": before + 1 & 0xFFFF, "tag": places(key)[1],
    }  # fmt: skip
    assert {name: flow[name] for name in expected} == expected
    assert flow["version"] % 2 == 0
    assert T.at(TABLE_AT, index) == ENTRIES + index * FLOW.size
    given = {"guest_addr", "far_addr", "guest_port", "far_port", "version"}
    for name in set(FLOW.fields) - set(expected) - given:
        assert flow[name] == 0, name
    release(index)
    assert flow["state"] == 0 and tag_of(index) == 0


def test_the_generation_wraps_around():
    index = claim(make_key(5))
    entry(index)["generation"] = 0xFFFF
    release(index)
    assert claim(make_key(5)) == index
    assert entry(index)["generation"] == 0


def search(wanted: Callable[[bytes], bool]) -> bytes:
    """The first key for which this holds."""
    return next(key for key in map(make_key, range(1 << 20)) if wanted(key))


def buckets(key: bytes) -> tuple[int, int]:
    slots, _ = places(key)
    return slots[0] // BUCKET_SLOTS, slots[BUCKET_SLOTS] // BUCKET_SLOTS


@pytest.mark.parametrize("hashes_coincide", [False, True])
def test_full_buckets_refuse_and_take_again(hashes_coincide):
    """31 of the 32 slots taken: the last one is found wherever it is; none left: refused.

    Where a key hashes to one bucket twice, the one beside it is its second.
    """
    key = make_key(9)
    if hashes_coincide:
        key = search(lambda key: (halves(key)[0] ^ halves(key)[0] >> 16) % BUCKETS == 0)
    slots, _ = places(key)
    assert len(set(slots)) == 2 * BUCKET_SLOTS
    for free in slots:
        for slot in slots:
            set_tag(slot, 0 if slot == free else 0x40000001)
        assert claim(key) == free
        assert find(key) == free
        release(free)
        assert find(key) == -1
    for slot in slots:
        set_tag(slot, 0x40000001)
    assert claim(key) == T.FULL
    assert find(key) == -1


def test_the_emptier_bucket_comes_first():
    """One more flow in the first bucket: the second takes the next; equal again: the first."""
    key = make_key(9)
    slots, _ = places(key)
    first, second = slots[:BUCKET_SLOTS], slots[BUCKET_SLOTS:]
    for taken in range(BUCKET_SLOTS):
        set_tag(first[taken], 0x40000001)
        index = claim(key)
        assert index == second[taken]
        release(index)
        set_tag(second[taken], 0x40000001)
        if taken + 1 < BUCKET_SLOTS:
            index = claim(key)
            assert index == first[taken + 1]
            release(index)


def test_the_same_tag_is_not_the_same_key():
    """Other flows with this key's tag in both its buckets, and one that is being made."""
    key = make_key(11)
    slots, tag = places(key)
    for slot in (slots[0], slots[3], slots[20]):
        set_tag(slot, tag)
        entry(slot).set_bytes("guest_addr", bytes(16))
    for slot in (slots[1], *slots[16:20]):
        set_tag(slot, T.CLAIMED)
    assert find(key) == -1
    assert claim(key) == slots[2], "the first bucket is the emptier one"
    assert find(key) == slots[2]


def test_a_key_being_claimed_by_another_worker():
    key = make_key(13)
    lock = places(key)[0][0] // BUCKET_SLOTS * 4
    struct.pack_into("<I", LOCK_BYTES, lock, 3)
    assert claim(key) == T.BUSY
    assert struct.unpack_from("<I", LOCK_BYTES, lock) == (3,), "the lock is not ours to open"
    assert find(key) == -1
    struct.pack_into("<I", LOCK_BYTES, lock, 0)
    assert claim(key) >= 0


def test_the_flow_found_last_may_be_gone():
    """Released, and its slot taken by another key, by another process: this one cannot be told."""
    key, other = make_key(21), make_key(22)
    index = claim(key)
    assert find(key) == index
    set_tag(index, 0)
    assert find(key) == -1
    set_tag(index, T.CLAIMED)
    assert find(key) == -1
    set_tag(index, entry(index)["tag"])
    assert find(key) == index
    flow = entry(index)
    flow.set_bytes("far_addr", other[16:32])
    assert find(key) == -1
    flow["tag"] = places(other)[1]
    set_tag(index, flow["tag"])
    assert find(key) == -1


def test_what_a_worker_that_died_has_in_the_table():
    """Its flows and their sockets, apart those it was giving away."""
    dead = 3
    going, staying = claim(make_key(33), home=dead), claim(make_key(34), home=dead)
    claim(make_key(35), home=5)
    entry(going)["state"] = entry(staying)["state"] = 3
    entry(going)["fd"], entry(staying)["fd"] = 40, 41
    entry(going)["heir"] = 6
    assert [one["fd"] for one in of_worker(SEGMENT_BYTES, AT, dead)] == [41]
    assert descriptors(SEGMENT_BYTES, AT, dead) == {41}
    lose_descriptors(SEGMENT_BYTES, AT, dead)
    assert descriptors(SEGMENT_BYTES, AT, dead) == {-1}


def test_what_a_worker_that_died_was_making_is_cleared():
    """Half-made claims and locks go, flows stay; a claim another worker is making stays, even of an
    entry that was the dead one's before.
    """
    dead, other = 3, 5
    mine, theirs = claim(make_key(31), home=dead), claim(make_key(32), home=other)
    half, taken = 1000, 2000
    set_tag(half, T.CLAIMED + dead + 1)
    set_tag(taken, T.CLAIMED + other + 1)
    entry(taken)["state"], entry(taken)["home"] = 3, dead
    struct.pack_into("<II", LOCK_BYTES, 40, dead + 1, other + 1)
    forget_claims(SEGMENT_BYTES, AT, dead)
    assert tag_of(half) == 0
    assert tag_of(mine) == entry(mine)["tag"] and tag_of(theirs) == entry(theirs)["tag"]
    assert tag_of(taken) == T.CLAIMED + other + 1 and entry(taken)["state"] == 3
    assert struct.unpack_from("<II", LOCK_BYTES, 40) == (0, other + 1)
    struct.pack_into("<II", LOCK_BYTES, 40, 0, 0)


def test_almost_every_entry_can_be_used():
    """No key is refused before the table is 85 % full (an interpreted run stops at 1 %)."""
    count = int(FLOWS_MAX * (0.85 if COMPILED else 0.01))
    indexes = {claim(bytes(32) + struct.pack("<II", number, 0)) for number in range(count)}
    assert len(indexes) == count and min(indexes) >= 0


# --- several processes ----------------------------------------------------------------------------


def test_processes_that_claim_the_same_keys_get_the_same_entries():
    """The first creator wins, the others get its entry; no key is there twice."""
    count, keys = 4, [make_key(1000 + number, number % 3) for number in range(500)]
    results = memoryview(area(8 * len(keys) * count)[1]).cast("q")
    release(claim(keys[0]))  # compiled before the race

    def work(number):
        table, view, key_at = make_table()
        for place, key in enumerate(keys):
            view.buffer[2048:2088] = key
            while (index := T.claim(table, key_at, number, number)) == T.BUSY:
                os.sched_yield()
            results[number * len(keys) + place] = index

    assert in_processes(count, work) == [0] * count
    found = [find(key) for key in keys]
    assert min(found) >= 0 and len(set(found)) == len(keys)
    for place, index in enumerate(found):
        assert [results[number * len(keys) + place] for number in range(count)] == [index] * count
        slots, tag = places(keys[place])
        assert [slot for slot in slots if tag_of(slot) == tag] == [index]
        assert entry(index)["tx_queue"] == entry(index)["home"]


def test_processes_that_race_for_the_last_free_slot():
    """Two keys that share one bucket but no lock: one of them gets the slot, the other none."""
    mine = make_key(9)
    shared, full = buckets(mine)
    other = search(lambda key: buckets(key)[1] == shared and buckets(key)[0] != full)
    rounds = 2000 if COMPILED else 100
    for bucket in (shared, full, buckets(other)[0]):
        for slot in range(BUCKET_SLOTS):
            set_tag(bucket * BUCKET_SLOTS + slot, 0x40000001)
    free = shared * BUCKET_SLOTS + 7
    set_tag(free, 0)
    assert claim(mine) == free  # compiled before the race
    release(free)
    steps = memoryview(area(4096)[1]).cast("q")  # how far each process is, and what it got

    def meet(number, step):
        steps[number] = step
        while steps[1 - number] < step:
            os.sched_yield()

    def work(number):
        table, view, key_at = make_table()
        view.buffer[2048:2088] = (mine, other)[number]
        for turn in range(rounds):
            meet(number, 3 * turn + 1)
            index = T.claim(table, key_at, number, 0)
            steps[8 + number] = index
            meet(number, 3 * turn + 2)
            if sorted(steps[8:10]) != [T.FULL, free]:
                return 1
            if index >= 0 and (tag_of(free) != places((mine, other)[number])[1]):
                return 2
            meet(number, 3 * turn + 3)
            if index >= 0:
                T.release(table, index)
        return 0

    assert in_processes(2, work) == [0, 0]


def test_processes_that_come_and_go_never_share_an_entry():
    """Claims and releases of few keys by all: what a process claimed as its own stays its own."""
    count, keys = 4, [make_key(2000 + number) for number in range(12)]
    steps = 3000 if COMPILED else 300
    release(claim(keys[0]))

    def work(number):
        chance = random.Random(number)
        table, view, key_at = make_table()
        held: dict[int, int] = {}
        for step in range(steps):
            place = chance.randrange(len(keys))
            view.buffer[2048:2088] = keys[place]
            if place in held:
                index = held.pop(place)
                if T.find(table, key_at) != index or entry(index)["tx_bytes"] != number + 1:
                    return 1
                T.release(table, index)
                continue
            index = T.claim(table, key_at, number, 0)
            if index >= 0 and entry(index)["home"] == number and entry(index)["tx_bytes"] == 0:
                entry(index)["tx_bytes"] = number + 1
                held[place] = index
            if step % 16 == 0:
                os.sched_yield()
        for index in held.values():
            T.release(table, index)
        return 0

    assert in_processes(count, work) == [0] * count
    assert not any(TAG_BYTES[:])
