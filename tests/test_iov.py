"""Slices of iovec arrays against slices of bytes."""

from __future__ import annotations

import ctypes
import struct

from compiled import Leaves, area
from hypothesis import given
from hypothesis import strategies as st

V = Leaves("dataplane.iov")
BASE, BYTES = area(1 << 16)
IOV, IOV_BYTES = area(8192)
OUT = IOV + 4096
LINEAR, LINEAR_BYTES = area(1 << 14)

PIECES = st.lists(st.binary(max_size=30), max_size=12)
PLACE = st.integers(0, 400)


def put_iov(pieces: list[bytes]) -> int:
    at = 0
    for number, piece in enumerate(pieces):
        struct.pack_into("<QQ", IOV_BYTES, 16 * number, BASE + at, len(piece))
        BYTES[at : at + len(piece)] = piece
        at += len(piece) + number % 4
    return len(pieces)


def entries(first: int, count: int) -> list[tuple[int, int]]:
    return [struct.unpack_from("<QQ", IOV_BYTES, 4096 + 16 * n) for n in range(first, count)]


@given(PIECES)
def test_total(pieces):
    assert V.total(IOV, put_iov(pieces)) == sum(map(len, pieces))


@given(PIECES, PLACE, PLACE, st.integers(0, 5))
def test_append_slice(pieces, skip, size, before):
    """The same bytes, at the same places, no empty entry, what stood there before untouched."""
    whole = b"".join(pieces)
    IOV_BYTES[4096:] = b"\x55" * 4096
    count = V.append_slice(OUT, before, IOV, put_iov(pieces), skip, size)
    made = entries(before, count)
    assert (
        b"".join(ctypes.string_at(base, length) for base, length in made)
        == (whole[skip : skip + size])
    )
    sources = [struct.unpack_from("<QQ", IOV_BYTES, 16 * n) for n in range(len(pieces))]
    for base, length in made:
        assert length > 0
        assert any(start <= base and base + length <= start + room for start, room in sources)
    assert before <= count <= before + len(pieces)
    assert set(IOV_BYTES[4096 : 4096 + 16 * before]) <= {0x55}
    assert set(IOV_BYTES[4096 + 16 * count :]) <= {0x55}


@given(PIECES, PLACE, PLACE)
def test_copy_out(pieces, skip, size):
    whole = b"".join(pieces)
    LINEAR_BYTES[:] = b"\xaa" * len(LINEAR_BYTES)
    done = V.copy_out(LINEAR, IOV, put_iov(pieces), skip, size)
    assert LINEAR_BYTES[:done] == whole[skip : skip + size]
    assert set(LINEAR_BYTES[done:]) == {0xAA}


@given(PIECES, PLACE, st.binary(max_size=400))
def test_copy_in(pieces, skip, data):
    count = put_iov(pieces)
    BYTES[4096:] = b"\xbb" * (len(BYTES) - 4096)
    LINEAR_BYTES[: len(data)] = data
    expected = bytearray(b"".join(pieces))
    room = max(len(expected) - skip, 0)
    done = V.copy_in(IOV, count, skip, LINEAR, len(data))
    assert done == min(len(data), room)
    expected[skip : skip + done] = data[:done]
    found = b"".join(
        ctypes.string_at(*struct.unpack_from("<QQ", IOV_BYTES, 16 * n)) for n in range(count)
    )
    assert found == bytes(expected)
