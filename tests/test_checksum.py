"""The Internet checksum against the sentence that defines it, over one piece and over many."""

from __future__ import annotations

import struct

import pytest
from compiled import Leaves, area
from hypothesis import example, given
from hypothesis import strategies as st

C = Leaves("dataplane.checksum")
BASE, BYTES = area(1 << 18)
IOV, IOV_BYTES = area(4096)

DATA = st.one_of(
    st.binary(max_size=80),
    st.builds(lambda part, times: part * times, st.binary(max_size=70), st.integers(0, 40)),
)


def naive(data: bytes) -> int:
    """RFC 1071: the one's-complement sum of the 16-bit words, a last odd byte followed by zero."""
    total = 0
    for at in range(0, len(data), 2):
        total += int.from_bytes(data[at : at + 2].ljust(2, b"\0"), "big")
        if total > 0xFFFF:
            total -= 0xFFFF
    return total


def in_memory_order(value: int) -> int:
    return int(struct.unpack("<H", struct.pack(">H", value))[0])


@given(DATA, st.integers(0, 9))
def test_partial(data, at):
    BYTES[at : at + len(data)] = data
    BYTES[at + len(data)] = 0xFF  # what follows must not be added
    assert C.fold(C.partial(BASE + at, len(data))) == in_memory_order(naive(data))


@given(DATA, DATA)
def test_sums_of_pieces_of_even_length_add_up(first, second):
    first = first[: len(first) & ~1]
    BYTES[: len(first)] = first
    BYTES[len(first) : len(first) + len(second)] = second
    total = C.partial(BASE, len(first)) + C.partial(BASE + len(first), len(second))
    assert C.fold(total) == in_memory_order(naive(first + second))


@example(0x10000FFFFFFFF)  # carries into the next word again and again
@given(st.integers(0, (1 << 61) - 1) | st.integers(0, 200_000) | st.integers(0, 1 << 33))
def test_fold(total):
    """Of any sum that can come up: congruent modulo 2**16 - 1, and zero only for nothing."""
    folded = C.fold(total)
    assert 0 <= folded <= 0xFFFF
    assert folded % 0xFFFF == total % 0xFFFF
    assert (folded == 0) == (total == 0)


@pytest.mark.parametrize("fill", [b"\0", b"\1", b"\xff", bytes(range(251))])
def test_large_frames(fill):
    size = 65535 + 14
    BYTES[:size] = (fill * size)[:size]
    assert C.fold(C.partial(BASE, size)) == in_memory_order(naive(BYTES[:size]))


def put_iov(pieces: list[bytes]) -> int:
    """Lay the pieces out apart from each other, at odd distances; the number of entries."""
    at = 1
    for number, piece in enumerate(pieces):
        struct.pack_into("<QQ", IOV_BYTES, 16 * number, BASE + at, len(piece))
        BYTES[at : at + len(piece)] = piece
        BYTES[at + len(piece)] = 0xEE
        at += len(piece) + 1 + number % 3
    return len(pieces)


PIECES = st.lists(st.binary(max_size=40), max_size=12)


@given(PIECES, st.data())
def test_over_scattered_memory(pieces, data):
    """Odd pieces, empty ones, and a part that begins and ends anywhere."""
    count, whole = put_iov(pieces), b"".join(pieces)
    skip = data.draw(st.integers(0, len(whole)))
    size = data.draw(st.integers(0, len(whole) - skip))
    expected = in_memory_order(naive(whole[skip : skip + size]))
    assert C.over_iov(IOV, count, skip, size) == expected


@given(PIECES, st.integers(0, 1000))
def test_over_less_than_was_asked_for(pieces, skip):
    count, whole = put_iov(pieces), b"".join(pieces)
    assert C.over_iov(IOV, count, skip, 1 << 20) == in_memory_order(naive(whole[skip:]))
