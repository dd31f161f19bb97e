"""access.py - accessors for compiled code, made from the declarations in schema.py.

Theory      For a struct S, `accessors(S)` is a module-like object with, for every field f,
              f(address)            the value (for an array: the address of its first element)
              set_f(address, v)     store (single values only)
            and SIZE. `address` is where the struct begins. A misspelt field is an error at compile
            time.
Why so      Accessors are intrinsics: they cost no compilation of their own (as functions, they were
            two thirds of the time of a cold start), and offsets are constants in the machine code.
Limits      Single values are monotonic atomics (mem.py); acquire and release are asked for by name
            there.
"""

from __future__ import annotations

import types
from typing import Any

from shm import mem, schema
from shm.layout import Field, Struct


def _getter(field: Field) -> Any:
    if field.count:
        return mem.member(field.offset)
    return mem.load(8 * field.width, "monotonic", False, field.offset, field.type == "i32")


def _setter(field: Field) -> Any:
    return mem.store(8 * field.width, "monotonic", False, field.offset)


def accessors(struct: Struct) -> types.ModuleType:
    """The accessors of one struct, as a module so that compiled code can name them."""
    made = types.ModuleType(struct.name, struct.doc)
    for field in struct.fields.values():
        setattr(made, field.name, _getter(field))
        if not field.count:
            setattr(made, f"set_{field.name}", _setter(field))
    made.SIZE = struct.size  # type: ignore[attr-defined]
    return made


instance = accessors(schema.INSTANCE)
net = accessors(schema.NET)
seen = accessors(schema.SEEN)
worker = accessors(schema.WORKER)
queue = accessors(schema.QUEUE)
flow = accessors(schema.FLOW)
handoff = accessors(schema.HANDOFF)
