"""layout.py - turns the C-like text of a struct declaration into offsets, sizes and plain-Python
access.

Theory      A declaration names a struct, then groups of fields. Each group names the one process
            that writes it and starts on a cache line of its own, so that two writers never share a
            line:

                struct worker: what it is
                  writer worker:
                    u64 breaths          steps taken since start
                    u64[8] opened        flows opened, by protocol
                  writer control:
                    u32 pid              process id, 0 while none runs

            Fields are naturally aligned; the size is a multiple of the cache line. Types: u8 u16
            u32 u64 i32.
Why so      One declaration serves compiled code (access.py makes accessors from it), the control
            process (get/set below, no numba), the metrics and the tests: the same struct is never
            written down twice.
Limits      No nesting; arrays have a fixed count.
"""

from __future__ import annotations

import builtins
import re
import struct as structlib
from typing import Any

from shm.record import Record

LINE = 64
TYPES = {"u8": "B", "u16": "H", "u32": "I", "u64": "Q", "i32": "i"}
_FIELD = re.compile(r"(u8|u16|u32|u64|i32)(?:\[([1-9]\d*)\])? (\w+) +(\S.*)")


class Field(Record):
    """One member: `offset` in bytes from the start of the struct, `count` 0 for a single value."""

    name: str
    type: str
    count: int
    offset: int
    writer: str
    doc: str

    @property
    def width(self) -> int:
        """Bytes of one element."""
        return structlib.calcsize(TYPES[self.type])


class Struct(Record):
    """A declared struct: `size` in bytes, fields by name."""

    name: str
    doc: str
    size: int
    fields: dict[str, Field]

    def get(self, buffer: Any, base: int, name: str, index: int = 0) -> int:
        """The value of a field (or of one element of an array) of the struct at `base` in
        `buffer`."""
        field = self.fields[name]
        at = base + field.offset + index * field.width
        return int(structlib.unpack_from("=" + TYPES[field.type], buffer, at)[0])

    def set(self, buffer: Any, base: int, name: str, value: int, index: int = 0) -> None:
        """Store a value. Only the writer named in the declaration may do it."""
        field = self.fields[name]
        at = base + field.offset + index * field.width
        structlib.pack_into("=" + TYPES[field.type], buffer, at, value)

    def set_bytes(self, buffer: Any, base: int, name: str, value: bytes) -> None:
        """Store a whole u8 array."""
        field = self.fields[name]
        if field.type != "u8" or len(value) != field.count:
            raise ValueError(f"{self.name}.{name} takes {field.count} bytes, not {len(value)}")
        at = base + field.offset
        buffer[at : at + field.count] = value

    def get_bytes(self, buffer: Any, base: int, name: str) -> bytes:
        """A whole u8 array."""
        field = self.fields[name]
        at = base + field.offset
        return bytes(buffer[at : at + field.width * max(field.count, 1)])


class View:
    """One struct in a buffer, for Python: view["field"], view["field"] = value. Made often: no
    Record."""

    __slots__ = ("struct", "buffer", "base")

    def __init__(self, struct: Struct, buffer: Any, base: int) -> None:
        self.struct, self.buffer, self.base = struct, buffer, base

    def __getitem__(self, name: str) -> int:
        return self.struct.get(self.buffer, self.base, name)

    def __setitem__(self, name: str, value: int) -> None:
        self.struct.set(self.buffer, self.base, name, value)

    def element(self, name: str, index: int) -> int:
        """One element of an array field."""
        return self.struct.get(self.buffer, self.base, name, index)

    def set_element(self, name: str, index: int, value: int) -> None:
        """Store one element of an array field."""
        self.struct.set(self.buffer, self.base, name, value, index)

    def bytes(self, name: str) -> builtins.bytes:
        """A whole array field."""
        return self.struct.get_bytes(self.buffer, self.base, name)

    def set_bytes(self, name: str, value: builtins.bytes) -> None:
        """Store a whole u8 array."""
        self.struct.set_bytes(self.buffer, self.base, name, value)


def _round_up(value: int, to: int) -> int:
    return (value + to - 1) // to * to


def parse(text: str) -> Struct:
    """Read one declaration; raises ValueError with the offending line."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    head = re.fullmatch(r"struct (\w+): (.+)", lines[0])
    if head is None:
        raise ValueError(f"not a struct line: {lines[0]!r}")
    fields: dict[str, Field] = {}
    offset, writer = 0, ""
    for line in lines[1:]:
        group = re.fullmatch(r"writer (.+):", line)
        if group is not None:
            writer, offset = group[1], _round_up(offset, LINE)
            continue
        match = _FIELD.fullmatch(line)
        if match is None or not writer or match[3] in fields:
            raise ValueError(f"struct {head[1]}: cannot read {line!r}")
        kind, count, name, doc = match[1], int(match[2] or 0), match[3], match[4]
        width = structlib.calcsize(TYPES[kind])
        offset = _round_up(offset, width)
        fields[name] = Field(name, kind, count, offset, writer, doc)
        offset += width * max(count, 1)
    return Struct(head[1], head[2], _round_up(offset, LINE), fields)
