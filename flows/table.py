"""table.py - the shared flow table: claim, find, release, by several processes without a lock on
lookups.

Theory      FLOWS_MAX entries in buckets of 16. A key hashes to two buckets; it lives in any slot of
            either. A slot's tag (30 hash bits, never 0) stands in an array of its own: one cache
            line holds a bucket's tags, so a lookup touches two lines and the entry that matches.
            There is no chain to follow and no tombstone.
Why so      Removal is one store; a lookup takes the same steps at ten flows and at a hundred
            thousand; nothing is ever moved, so an index names a flow for as long as it lives. Two
            choices of 16, the emptier one first, refuse no key before the table is 85 % full.
Claim       1. the creator takes the lock word of the key's first bucket (compare-and-swap of its
               worker number); all creators of one key share that bucket, so a key cannot be added
               twice;
            2. it looks again;
            3. it swaps a free tag for CLAIMED (another key may be racing for the slot from the
               other bucket);
            4. it fills the entry;
            5. it stores the tag with release order: found from now on.
Crash       A worker that dies between 1 and 5 leaves its number in the lock word and in a CLAIMED
            tag. The process that takes its place clears both before it serves (`forget_claims`);
            no other worker's flow is touched.
Key         40 bytes: guest address 16, far address 16, guest port 2, far port 2, protocol 4. IPv4
            addresses are stored as ::ffff:a.b.c.d, so there is one kind of key.
Hash        HalfSipHash-1-3 with 64 bits of output and a random key per instance: neither the guest
            nor a peer can aim at a bucket.
Limits      FLOWS_MAX flows; a full pair of buckets refuses the flow (drop reason table_full).
Ownership   An entry belongs to its home worker. tx_queue alone is written by others (schema.py says
            why).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

from shm import mem
from shm.access import accessors, flow
from shm.jit import jit
from shm.layout import View, parse
from shm.schema import BUCKET_SLOTS, BUCKETS, FLOW, FLOWS_MAX, Offsets

FULL = -1
BUSY = -2
CLAIMED = 0x80000000
LOCK_TRIES = 200
_KEY_AT = FLOW.fields["guest_addr"].offset
assert FLOW.fields["far_port"].offset == _KEY_AT + 34 and _KEY_AT % 8 == 0

TABLE = parse("""
struct table: where one worker finds the shared table
  writer worker:
    u64 tags                 u32 per slot
    u64 locks                u32 per bucket: 0, or the number of the worker claiming there + 1
    u64 flows                entry 0
    u64 key0                 first half of the hash key
    u64 key1                 second half
    u64 last                 index + 1 of the flow found last, 0 none
""")
table = accessors(TABLE)

KEY_BYTES = 40
KEY_GUEST, KEY_FAR, KEY_GUEST_PORT, KEY_FAR_PORT, KEY_PROTOCOL = 0, 16, 32, 34, 36


@jit
def _rotl(value, bits):
    return ((value << bits) | (value >> (32 - bits))) & 0xFFFFFFFF


@jit
def _round(v0, v1, v2, v3):
    """One HalfSipHash round (Aumasson and Bernstein, HalfSipHash reference description)."""
    v0 = (v0 + v1) & 0xFFFFFFFF
    v1 = _rotl(v1, 5) ^ v0
    v0 = _rotl(v0, 16)
    v2 = (v2 + v3) & 0xFFFFFFFF
    v3 = _rotl(v3, 8) ^ v2
    v0 = (v0 + v3) & 0xFFFFFFFF
    v3 = _rotl(v3, 7) ^ v0
    v2 = (v2 + v1) & 0xFFFFFFFF
    v1 = _rotl(v1, 13) ^ v2
    return v0, v1, _rotl(v2, 16), v3


@jit
def hash_key(t, key):
    """62 bits of keyed hash of the 40 bytes at `key`: 32 low ones for buckets, 30 high ones for the
    tag."""
    k0, k1 = table.key0(t) & 0xFFFFFFFF, table.key1(t) & 0xFFFFFFFF
    v0, v1, v2, v3 = k0, k1 ^ 0xEE, 0x6C796765 ^ k0, 0x74656462 ^ k1
    for index in range(KEY_BYTES // 4):
        word = mem.u32(key + 4 * index)
        v3 ^= word
        v0, v1, v2, v3 = _round(v0, v1, v2, v3)
        v0 ^= word
    v3 ^= KEY_BYTES << 24
    v0, v1, v2, v3 = _round(v0, v1, v2, v3)
    v0 ^= KEY_BYTES << 24
    v2 ^= 0xEE
    for _ in range(3):
        v0, v1, v2, v3 = _round(v0, v1, v2, v3)
    low = v1 ^ v3
    v1 ^= 0xDD
    for _ in range(3):
        v0, v1, v2, v3 = _round(v0, v1, v2, v3)
    return low | (((v1 ^ v3) & 0x3FFFFFFF) << 32)


@jit
def _bucket(value, choice):
    """First slot of the first (0) or second (1) bucket of a hash."""
    first = value & (BUCKETS - 1)
    if choice == 0:
        return first * BUCKET_SLOTS
    second = (value >> 16) & (BUCKETS - 1)
    if second == first:
        second = first ^ 1
    return second * BUCKET_SLOTS


@jit
def _tag(value):
    return (value >> 32) | 0x40000000


@jit
def at(t, index):
    """Address of entry `index`."""
    return table.flows(t) + index * flow.SIZE


@jit
def _same(f, key):
    k = f + _KEY_AT
    return (
        mem.u64(k) == mem.u64(key)
        and mem.u64(k + 8) == mem.u64(key + 8)
        and mem.u64(k + 16) == mem.u64(key + 16)
        and mem.u64(k + 24) == mem.u64(key + 24)
        and mem.u32(k + 32) == mem.u32(key + 32)
        and flow.protocol(f) == mem.u32(key + KEY_PROTOCOL)
    )


@jit
def _search(t, key, value):
    tag = _tag(value)
    for choice in range(2):
        first = _bucket(value, choice)
        for slot in range(first, first + BUCKET_SLOTS):
            if mem.acquire_u32(table.tags(t) + 4 * slot) == tag and _same(at(t, slot), key):
                return slot
    return -1


@jit
def find(t, key):
    """Index of the flow with this key, or -1. The flow of the previous packet costs one
    comparison."""
    last = table.last(t) - 1
    if last >= 0:
        tag = mem.acquire_u32(table.tags(t) + 4 * last)  # before the key, as in _search
        if tag != 0 and tag == flow.tag(at(t, last)) and _same(at(t, last), key):
            return last
    index = _search(t, key, hash_key(t, key))
    if index >= 0:
        table.set_last(t, index + 1)
    return index


@jit
def _free_in(t, first):
    """Free slots of the bucket that begins at slot `first`."""
    free = 0
    for slot in range(first, first + BUCKET_SLOTS):
        if mem.u32(table.tags(t) + 4 * slot) == 0:
            free += 1
    return free


@jit
def _free_slot(t, value, home):
    """Swap a free tag for CLAIMED by `home`, in the emptier bucket if it still has one.

    The slot, or -1."""
    emptier = 1 if _free_in(t, _bucket(value, 1)) > _free_in(t, _bucket(value, 0)) else 0
    for choice in (emptier, 1 - emptier):
        first = _bucket(value, choice)
        for slot in range(first, first + BUCKET_SLOTS):
            tag = table.tags(t) + 4 * slot
            if mem.u32(tag) == 0 and mem.cas_u32(tag, 0, CLAIMED + home + 1):
                return slot
    return -1


@jit
def _fill(t, slot, key, value, home, pair):
    f = at(t, slot)
    flow.set_version(f, flow.version(f) | 1)
    generation = (flow.generation(f) + 1) & 0xFFFF
    mem.zero(f + 8, flow.SIZE - 8)
    mem.copy(f + _KEY_AT, key, KEY_PROTOCOL)
    flow.set_protocol(f, mem.u32(key + KEY_PROTOCOL))
    flow.set_generation(f, generation)
    flow.set_home(f, home)
    flow.set_tx_queue(f, pair)
    flow.set_fd(f, -1)
    flow.set_tag(f, _tag(value))
    mem.release_u32(f, flow.version(f) + 1)  # version is the first word: even again
    mem.release_u32(table.tags(t) + 4 * slot, _tag(value))


@jit
def claim(t, key, home, pair):
    """Index of a new flow of worker `home`, last sent on by the guest on `pair`; FULL or BUSY.

    If another worker made the same flow meanwhile, that one's index is returned: look at its home.
    """
    value = hash_key(t, key)
    lock = table.locks(t) + 4 * (value & (BUCKETS - 1))
    for _ in range(LOCK_TRIES):
        if mem.cas_u32(lock, 0, home + 1):
            break
    else:
        return BUSY
    slot = _search(t, key, value)
    if slot < 0:
        slot = _free_slot(t, value, home)
        if slot >= 0:
            _fill(t, slot, key, value, home, pair)
    mem.release_u32(lock, 0)
    return slot if slot >= 0 else FULL


@jit
def release(t, index):
    """Forget a flow; its home does this, after closing its socket."""
    if table.last(t) == index + 1:
        table.set_last(t, 0)
    flow.set_state(at(t, index), 0)
    mem.release_u32(table.tags(t) + 4 * index, 0)


def _set_words(buffer: Any, offset: int, count: int) -> Iterator[tuple[int, int]]:
    """Those of `count` u32 that are not 0, by index; most are, and are passed over in blocks."""
    size = 4 * BUCKET_SLOTS
    words, none = bytes(buffer[offset : offset + 4 * count]), bytes(size)
    for start in range(0, 4 * count, size):
        if words[start : start + size] != none:
            block = struct.unpack_from(f"<{BUCKET_SLOTS}I", words, start)
            yield from ((start // 4 + n, word) for n, word in enumerate(block) if word)


def entry_at(buffer: Any, offsets: Offsets, index: int) -> View:
    """Entry `index`, for plain Python."""
    return View(FLOW, buffer, offsets.flow + index * FLOW.size)


def forget_claims(buffer: Any, offsets: Offsets, worker: int) -> None:
    """Clear what a worker that died was making: the locks it held, entries that nobody could find
    yet. Plain Python, called by the process that takes its place, before it serves."""
    for offset, count, mine in (
        (offsets.locks, BUCKETS, worker + 1),
        (offsets.tags, FLOWS_MAX, CLAIMED + worker + 1),
    ):
        for index, word in _set_words(buffer, offset, count):
            if word == mine:
                struct.pack_into("<I", buffer, offset + 4 * index, 0)


def descriptors(buffer: Any, offsets: Offsets, worker: int) -> set[int]:
    """The sockets of a worker's flows, but for those that are on their way to others."""
    return {one["fd"] for one in of_worker(buffer, offsets, worker)}


def lose_descriptors(buffer: Any, offsets: Offsets, worker: int) -> None:
    """The sockets of a worker's flows are gone with the process that held them. What is on its way
    to another worker is that one's to write."""
    for one in of_worker(buffer, offsets, worker):
        one["fd"] = -1


def of_worker(buffer: Any, offsets: Offsets, worker: int) -> Iterator[View]:
    """A worker's flows, but for those that are on their way to others. Plain Python, called by that
    worker between breaths. Only entries that are taken are looked at: reading the others would make
    the whole table resident."""
    taken = [index for index, tag in _set_words(buffer, offsets.tags, FLOWS_MAX) if tag < CLAIMED]
    for index in taken:
        entry = entry_at(buffer, offsets, index)
        if is_of(entry, worker):
            yield entry


def is_of(entry: View, worker: int) -> bool:
    """Whether a flow is that worker's and not on its way: who adopts it clears heir last."""
    return not entry["heir"] and entry["home"] == worker
