"""What the guest was last seen using: the latest, whole, though a worker dies while it writes."""

from __future__ import annotations

from mmap import mmap

import packets as pk
import pytest
from compiled import Leaves, area

from flows.sighting import VERSION, WRITER, forget_half
from shm.jit import COMPILED
from shm.layout import View
from shm.schema import SEEN, offsets

S = Leaves("flows.sighting")
AT = offsets(1)
SEGMENT, SEGMENT_BYTES = area(AT.size)
SEEN_AT, ENTRY = SEGMENT + AT.seen, View(SEEN, SEGMENT_BYTES, AT.seen)
OWN = area(4096)
GLOBAL, LOCAL = pk.ip("2001:db8::77"), pk.ip("fe80::77")
FIELDS = {GLOBAL: "addr6", LOCAL: "addr6_local"}
between_accesses = pytest.mark.skipif(
    COMPILED, reason="NOT TESTED here: between two accesses, NUMBA_DISABLE_JIT=1"
)
either = pytest.mark.parametrize("own", [GLOBAL, LOCAL])


@pytest.fixture(autouse=True)
def nobody_seen():
    SEGMENT_BYTES[AT.seen : AT.seen + SEEN.size] = bytes(SEEN.size)


def note(guest: bytes, worker: int = 3, own: tuple[int, mmap] = OWN) -> None:
    at, buffer = own
    buffer[:16] = guest
    S.note(SEEN_AT, at, worker)


def read(field: str, own: tuple[int, mmap] = OWN) -> bytes | None:
    at, buffer = own
    known = SEEN_AT + SEEN.fields[field].offset
    return bytes(buffer[:16]) if S.read6(SEEN_AT, known, at) else None


@either
def test_the_latest_is_known(own: bytes) -> None:
    other = own[:15] + b"\x99"
    assert read(FIELDS[own]) is None
    for guest in (own, other, own):
        note(guest)
        assert read(FIELDS[own]) == guest
    assert [read(field) for field in FIELDS.values()].count(None) == 1


def test_ipv4_is_one_word() -> None:
    note(bytes(10) + b"\xff\xff\xc0\x00\x02\x07")
    assert ENTRY["addr4"] == 0xC0000207 and ENTRY["lock"] == 0


def test_a_group_is_nobodys_link_layer_address() -> None:
    for mac, known in ((0x525400000001, 0x525400000001), (0x01005E000001, 0x525400000001), (0, 0)):
        S.note_mac(SEEN_AT, mac)
        assert ENTRY["mac"] == known or mac == 0
    assert ENTRY["mac"] == 0x525400000001


@either
def test_what_is_known_is_not_written(own: bytes) -> None:
    note(own)
    before = ENTRY["lock"]
    note(own)
    assert ENTRY["lock"] == before and before & WRITER == 0


@either
def test_while_another_writes(own: bytes) -> None:
    """Neither written nor read."""
    note(own)
    ENTRY["lock"] |= 5 + 1
    note(own[:15] + b"\x99")
    assert ENTRY.bytes(FIELDS[own]) == own and read(FIELDS[own]) is None


def test_the_version_begins_again() -> None:
    ENTRY["lock"] = (1 << 32) - VERSION
    note(GLOBAL)
    assert ENTRY["lock"] == 0 and read("addr6") == GLOBAL
    ENTRY["lock"] = (1 << 32) - VERSION + 3 + 1
    forget_half(SEGMENT_BYTES, AT, 3)
    assert ENTRY["lock"] == 0


def test_who_died_while_it_wrote() -> None:
    """What may be half an address is forgotten, by whom it concerns; then others write again."""
    note(GLOBAL)
    note(LOCAL)
    before = ENTRY["lock"]
    forget_half(SEGMENT_BYTES, AT, 3)
    ENTRY["lock"] = before | 3 + 1
    forget_half(SEGMENT_BYTES, AT, 2)
    assert ENTRY["lock"] == before | 3 + 1 and ENTRY.bytes("addr6") == GLOBAL
    forget_half(SEGMENT_BYTES, AT, 3)
    assert ENTRY["lock"] == before + VERSION
    assert read("addr6") is None and read("addr6_local") is None
    note(GLOBAL, 2)
    assert read("addr6") == GLOBAL


@between_accesses
def test_nobody_sees_half_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written while it is read is read again, also if the writer has finished."""
    other, copies = GLOBAL[:15] + b"\x99", []
    note(GLOBAL)
    copy = S.mem.copy

    def half_a_copy(target: int, source: int, size: int) -> None:
        copies.append(size)
        copy(target, source, size // 2)
        if len(copies) == 1:
            note(other, 2, area(4096))
        copy(target + size // 2, source + size // 2, size - size // 2)

    monkeypatch.setattr(S.mem, "copy", half_a_copy)
    assert read("addr6") == other
    assert copies == [16, 16, 16], "read, written, read again"


@between_accesses
@pytest.mark.parametrize("step", ["cas_u32", "copy", "release_u32"])
def test_dies_at_any_step(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """Before it: then the next one sees what was there or nothing, and writes."""
    note(GLOBAL)

    def die(*_: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(S.mem, step, die)
        note(GLOBAL[:15] + b"\x99")
    forget_half(SEGMENT_BYTES, AT, 3)
    assert read("addr6") == (GLOBAL if step == "cas_u32" else None)
    note(LOCAL, 2)
    assert read("addr6_local") == LOCAL
