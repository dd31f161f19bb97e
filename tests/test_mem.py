"""The memory primitives: what each loads and stores, and what an interpreted run refuses."""

from __future__ import annotations

import os
import re
import struct
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType

import pytest
from compiled import Leaves, area, in_processes
from hypothesis import given
from hypothesis import strategies as st

import shm.jit
from shm import access, mem
from shm.layout import TYPES
from shm.schema import FLOW

BASE, BYTES = area(4096)
INT64 = st.integers(-(1 << 63), (1 << 63) - 1)


def twin() -> ModuleType:
    """shm/mem.py as an interpreted run has it, in any run; it knows no mapping but BASE."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shm.jit, "COMPILED", False)
        patch.setattr(shm.jit, "jit", lambda function: function)
        made = module_from_spec(spec := spec_from_file_location("mem_twin", mem.__file__))
        spec.loader.exec_module(made)
    made.watch(BASE, 4096, "base")
    return made


M = Leaves("shm.mem")
TWIN = twin()
both = pytest.mark.parametrize("made", [M, TWIN], ids=["leaf", "twin"])

# name, struct format, alignment that the primitive asks for
LOADS = [
    ("u8", "<B", 1), ("u16", "<H", 2), ("u32", "<I", 4), ("u64", "<q", 8),
    ("acquire_u16", "<H", 2), ("acquire_u32", "<I", 4), ("acquire_u64", "<q", 8),
    ("be16", ">H", 1), ("be32", ">I", 1), ("le16", "<H", 1), ("le32", "<I", 1),
    ("le64", "<q", 1),
]  # fmt: skip
STORES = [
    ("put_u8", "<B", 1), ("put_u16", "<H", 2), ("put_u32", "<I", 4), ("put_u64", "<Q", 8),
    ("release_u16", "<H", 2), ("release_u32", "<I", 4), ("release_u64", "<Q", 8),
    ("put_be16", ">H", 1), ("put_be32", ">I", 1), ("put_le16", "<H", 1), ("put_le64", "<Q", 1),
]  # fmt: skip


def test_every_primitive_is_tested_here():
    """A load or store that is added to mem.py must be added to the tables above."""
    names = {name for name, _, _ in LOADS + STORES}
    pattern = r"((put|acquire|release)_)?(u|be|le)\d+"
    assert {name for name in vars(mem) if re.fullmatch(pattern, name)} == names


@pytest.mark.parametrize(("name", "form", "align"), LOADS)
@both
@given(data=st.binary(min_size=8, max_size=8), slot=st.integers(0, 15))
def test_load(made, name, form, align, data, slot):
    at = slot * align
    BYTES[at : at + 8] = data
    assert getattr(made, name)(BASE + at) == struct.unpack_from(form, data)[0]


@pytest.mark.parametrize(("name", "form", "align"), STORES)
@both
@given(value=INT64, slot=st.integers(1, 15))
def test_store_keeps_the_low_bits_and_touches_nothing_else(made, name, form, align, value, slot):
    at, width = 64 + slot * align, struct.calcsize(form)
    BYTES[0:256] = bytes(range(256))
    getattr(made, name)(BASE + at, value)
    expected = bytearray(range(256))
    struct.pack_into(form, expected, at, value & ((1 << 8 * width) - 1))
    assert BYTES[0:256] == bytes(expected)


@both
@pytest.mark.parametrize(("name", "form", "align"), LOADS)
def test_load_is_never_negative_below_64_bits(made, name, form, align):
    BYTES[0:8] = b"\xff" * 8
    bits = 8 * struct.calcsize(form)
    assert getattr(made, name)(BASE) == (-1 if bits == 64 else (1 << bits) - 1)


@both
@given(st.integers(0, 64), st.integers(0, 64), st.integers(0, 200))
def test_copy(made, source, target, size):
    BYTES[0:1024] = bytes(i * 7 & 255 for i in range(1024))
    expected = bytearray(BYTES[0:1024])
    expected[512 + target : 512 + target + size] = BYTES[source : source + size]
    made.copy(BASE + 512 + target, BASE + source, size)
    assert BYTES[0:1024] == bytes(expected)


@both
def test_copy_of_nothing_needs_no_memory(made):
    made.copy(BASE, 0, 0)
    made.copy(0, BASE, 0)


@pytest.mark.parametrize("size", [0, 8, 16, 72])
def test_zero(size):
    BYTES[0:128] = b"\xaa" * 128
    M.zero(BASE + 8, size)
    assert BYTES[0:128] == b"\xaa" * 8 + bytes(size) + b"\xaa" * (120 - size)


@given(INT64, INT64)
def test_add_wraps_like_the_word_it_adds_to(start, amount):
    M.put_u64(BASE, start)
    M.add_u64(BASE, amount)
    total = (start + amount) & ((1 << 64) - 1)
    assert BYTES[0:8] == total.to_bytes(8, "little")


WORD = st.integers(0, (1 << 32) - 1)


@both
@given(now=WORD, old=WORD, new=WORD)
def test_compare_and_swap(made, now, old, new):
    BYTES[0:12] = struct.pack("<III", 7, now, 9)
    assert made.cas_u32(BASE + 4, old, new) == (now == old)
    assert struct.unpack_from("<III", BYTES) == (7, new if now == old else now, 9)


def test_compare_and_swap_between_processes():
    """Four processes count together through one word: no step is lost."""
    base, _ = area(4096)
    steps, count = 2000, 4

    def work(number):
        for _ in range(steps):
            while True:
                seen = M.u32(base)
                if M.cas_u32(base, seen, seen + 1):
                    break
            M.add_u64(base + 64 + 8 * number, 1)

    assert in_processes(count, work) == [0] * count
    assert M.u32(base) == steps * count
    assert [M.u64(base + 64 + 8 * n) for n in range(count)] == [steps] * count


def test_release_and_acquire_between_processes():
    """What was stored before a release is seen by whoever acquires it."""
    base, _ = area(4096)
    rounds = 1000

    def work(number):
        for step in range(1, rounds + 1):
            if number == 0:
                M.put_u64(base + 64, step * 3)
                M.release_u32(base, step)
                while M.acquire_u32(base + 128) != step:
                    os.sched_yield()
            else:
                while M.acquire_u32(base) != step:
                    os.sched_yield()
                if M.u64(base + 64) != step * 3:
                    return 1
                M.fence()
                M.release_u32(base + 128, step)

    assert in_processes(2, work) == [0, 0]


S = Leaves("shm.access.flow")  # a struct with a field of every type
FIELDS = ["protocol", "mss", "flags", "fd", "tx_bytes"]


def test_the_sample_has_every_type():
    assert {FLOW.fields[name].type for name in FIELDS} == set(TYPES)


@given(name=st.sampled_from(FIELDS), value=INT64)
def test_accessors_follow_the_layout(name, value):
    field, before = FLOW.fields[name], bytes(range(256))
    BYTES[:256] = before
    getattr(S, f"set_{name}")(BASE, value)
    width = field.width
    low = (value & (1 << 8 * width) - 1).to_bytes(width, "little")
    assert BYTES[:256] == before[: field.offset] + low + before[field.offset + width :]
    signed = field.type in ("i32", "u64")  # a u64 is an int64 in a register
    assert getattr(S, name)(BASE) == int.from_bytes(low, "little", signed=signed)


def test_an_array_is_its_address():
    assert S.far_addr(BASE) == BASE + FLOW.fields["far_addr"].offset
    assert not hasattr(access.flow, "set_far_addr")
    assert access.flow.SIZE == FLOW.size


# --- the Python twins: an interpreted run is an address sanitizer --------------------------------


@pytest.fixture
def border():
    """The end of a mapping of 100 bytes that nothing follows."""
    base, _ = area(8192)
    TWIN.watch(base, 100, "short")
    yield base + 100
    TWIN.unwatch(base)


@pytest.mark.parametrize(("name", "form", "align"), LOADS)
def test_loads_beyond_a_mapping_are_refused(border, name, form, align):
    width = struct.calcsize(form)
    getattr(TWIN, name)(border - width)
    for address in (border - width + 1, border, border + 4000, 0, -8):
        with pytest.raises(TWIN.BadAddress):
            getattr(TWIN, name)(address)


@pytest.mark.parametrize(("name", "form", "align"), STORES)
def test_stores_beyond_a_mapping_are_refused(border, name, form, align):
    width = struct.calcsize(form)
    getattr(TWIN, name)(border - width, 1)
    for address in (border - width + 1, border, 0):
        with pytest.raises(TWIN.BadAddress):
            getattr(TWIN, name)(address, 1)


def test_copy_and_swap_beyond_a_mapping_are_refused(border):
    first = border - 100
    TWIN.copy(BASE, first, 100)
    for target, source, size in (
        (BASE, first, 101), (border - 99, BASE, 100), (BASE, 0, 1), (BASE, first, -1),
    ):  # fmt: skip
        with pytest.raises(TWIN.BadAddress):
            TWIN.copy(target, source, size)
    assert TWIN.cas_u32(border - 4, 0, 1) == 1
    with pytest.raises(TWIN.BadAddress):
        TWIN.cas_u32(border - 3, 0, 1)


def test_a_mapping_is_refused_once_forgotten():
    base, _ = area(4096)
    TWIN.watch(base, 4096, "a name")
    TWIN.watch(base, 4096, "a second name")
    TWIN.u8(base)
    TWIN.unwatch(base)
    with pytest.raises(TWIN.BadAddress):
        TWIN.u8(base)
    TWIN.watch(base, 4096, "again")
    TWIN.u8(base + 4095)
    TWIN.unwatch(base)


@given(
    st.dictionaries(st.integers(0, 40), st.integers(1, 10), max_size=6),
    st.integers(0, 60),
    st.integers(1, 12),
)
def test_an_access_must_lie_in_one_mapping(mappings, at, size):
    """Where mappings overlap, in the one that starts last."""
    base = BASE + 4096
    for start, length in mappings.items():
        TWIN.watch(base + start, length, "part")
    try:
        before = [start for start in mappings if start <= at]
        if before and at + size <= max(before) + mappings[max(before)]:
            assert TWIN.check(base + at, size) == base + at
        else:
            with pytest.raises(TWIN.BadAddress):
                TWIN.check(base + at, size)
    finally:
        for start in mappings:
            TWIN.unwatch(base + start)
