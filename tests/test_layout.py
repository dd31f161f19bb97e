"""The struct declarations: what the text means in bytes, and which texts are refused."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shm.layout import LINE, Struct, View, parse

WIDTHS = {"u8": 1, "u16": 2, "u32": 4, "u64": 8, "i32": 4}
FORMS = {"u8": "B", "u16": "H", "u32": "I", "u64": "Q", "i32": "i"}

FIELDS = st.tuples(st.sampled_from(sorted(WIDTHS)), st.none() | st.integers(1, 20))
GROUPS = st.lists(st.lists(FIELDS, min_size=1, max_size=8), min_size=1, max_size=4)

EXAMPLE = """
struct example: two writers
  writer worker:
    u8 small             one byte
    u64 large            eight
    u16[3] some          three words
  writer control (at start):
    i32 signed           below zero, too
"""


def declaration(groups) -> str:
    lines = ["struct made: by a test"]
    for number, group in enumerate(groups):
        lines.append(f"  writer process {number}:")
        for position, (kind, count) in enumerate(group):
            array = "" if count is None else f"[{count}]"
            lines.append(f"    {kind}{array} f{number}_{position}  of the test")
    return "\n".join(lines)


def test_example():
    made = parse(EXAMPLE)
    assert (made.name, made.doc, made.size) == ("example", "two writers", 128)
    assert {name: field.offset for name, field in made.fields.items()} == {
        "small": 0, "large": 8, "some": 16, "signed": 64,
    }  # fmt: skip
    assert [field.count for field in made.fields.values()] == [0, 0, 3, 0]
    assert made.fields["signed"].writer == "control (at start)"
    assert made.fields["large"].doc == "eight"


@given(GROUPS)
def test_fields_are_aligned_apart_and_as_close_as_that_allows(groups):
    """C's layout rule within a group; every group on a cache line of its own."""
    made = parse(declaration(groups))
    at = 0
    for number, group in enumerate(groups):
        at = -(-at // LINE) * LINE
        for position, (kind, count) in enumerate(group):
            field = made.fields[f"f{number}_{position}"]
            at = -(-at // WIDTHS[kind]) * WIDTHS[kind]
            assert (field.offset, field.type, field.count) == (at, kind, count or 0)
            assert field.writer == f"process {number}"
            at += WIDTHS[kind] * (count or 1)
    assert made.size == -(-at // LINE) * LINE
    lines = [(f.offset // LINE, (f.offset + f.width * max(f.count, 1) - 1) // LINE, f.writer)
             for f in made.fields.values()]  # fmt: skip
    owner: dict[int, str] = {}
    for first, last, writer in lines:
        for line in range(first, last + 1):
            assert owner.setdefault(line, writer) == writer


@given(GROUPS, st.integers(0, 200), st.data())
def test_values_are_stored_where_the_layout_says(groups, base, data):
    made = parse(declaration(groups))
    buffer = bytearray(b"\xa5" * (base + made.size + 8))
    expected = bytearray(buffer)
    name = data.draw(st.sampled_from(sorted(made.fields)))
    field = made.fields[name]
    index = data.draw(st.integers(0, max(field.count, 1) - 1))
    bits = 8 * field.width
    low = -(1 << bits - 1) if field.type == "i32" else 0
    value = data.draw(st.integers(low, low + (1 << bits) - 1))
    made.set(buffer, base, name, value, index)
    at = base + field.offset + index * field.width
    struct.pack_into("=" + FORMS[field.type], expected, at, value)
    assert buffer == expected
    assert made.get(buffer, base, name, index) == value
    view = View(made, buffer, base)
    assert view.element(name, index) == value
    if not field.count:
        view[name] = value
        assert view[name] == value and buffer == expected


@pytest.mark.parametrize("value", [-1, 256])
def test_a_value_that_does_not_fit_is_refused(value):
    buffer = bytearray(parse(EXAMPLE).size)
    with pytest.raises(struct.error):
        View(parse(EXAMPLE), buffer, 0)["small"] = value
    assert buffer == bytes(len(buffer))


def test_arrays_of_bytes():
    made = parse("struct s: of bytes\n writer w:\n u16 pad  first\n u8[4] four  bytes")
    buffer = bytearray(64)
    view = View(made, buffer, 0)
    view.set_bytes("four", b"abcd")
    assert view.bytes("four") == b"abcd" and buffer[2:6] == b"abcd" and sum(buffer[6:]) == 0
    for wrong in (b"abc", b"abcde"):
        with pytest.raises(ValueError, match="takes 4 bytes"):
            view.set_bytes("four", wrong)
    with pytest.raises(ValueError):
        view.set_bytes("pad", b"ab")


@pytest.mark.parametrize(
    "text",
    [
        "structure s: what\n writer w:\n u8 a  b",
        "struct s\n writer w:\n u8 a  b",
        "struct s: no writer\n u8 a  b",
        "struct s: unknown type\n writer w:\n u128 a  b",
        "struct s: no doc\n writer w:\n u8 a",
        "struct s: twice\n writer w:\n u8 a  b\n u8 a  b",
        "struct s: twice in two groups\n writer w:\n u8 a  b\n writer v:\n u16 a  b",
        "struct s: negative\n writer w:\n u8[-1] a  b",
        "struct s: no name\n writer w:\n u8  b",
        "struct s: an array of none\n writer w:\n u8[0] a  b",
    ],
)
def test_refused_declarations_name_the_line(text):
    with pytest.raises(ValueError, match="struct") as refused:
        parse(text)
    assert any(repr(line.strip()) in str(refused.value) for line in text.splitlines())


def test_a_struct_is_a_value():
    """The schema's digest is taken from the text of its structs: no address may be in it."""
    first, second = parse(EXAMPLE), parse(EXAMPLE)
    assert isinstance(first, Struct) and first == second and repr(first) == repr(second)
    assert " at 0x" not in repr(first)
