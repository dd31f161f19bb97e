"""mem.py - raw loads, stores, fences and compare-and-swap on addresses, for compiled code.

Theory      An address is an int64. A load gives an int64, a store takes one and keeps the low bits:
            width and byte order exist only here. Four kinds:
              u8 u16 u32 u64, put_*      monotonic atomics on naturally aligned words: ring
                                         indexes, fields of shared structs, counters. Never torn,
                                         never merged, never repeated.
              be16 .. le64, put_be16 ..  ordinary accesses at any alignment: packet headers in
                                         private copies, addresses, sums over payload.
              copy                       bytes, in any order and any number of pieces.
              acquire_*, release_*, fence, cas_*   ordering between processes.
Why so      Another process (the guest, a peer worker) may change the bytes at any time. An ordinary
            load may be split, merged or repeated by the compiler; the atomic ones may not. LLVM has
            none at any alignment: what others may change meanwhile is copied first, or aligned.
Twin        Every primitive is made twice: as LLVM code, and in Python for NUMBA_DISABLE_JIT=1. The
            Python twin refuses an address outside the mappings announced with `watch`, so an
            interpreted test run is an address sanitizer. Compare-and-swap is real in both (the twin
            calls a compiled one), because two interpreted processes may race as well.
Ownership   None: callers own the addresses.
"""

from __future__ import annotations

import bisect
import ctypes
from typing import Any

from shm import code
from shm.jit import COMPILED, COMPILER, intrinsic, jit

if COMPILER:
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils

_WIDTHS = {8: ctypes.c_uint8, 16: ctypes.c_uint16, 32: ctypes.c_uint32, 64: ctypes.c_int64}


class BadAddress(Exception):
    """An interpreted run touched memory that nobody announced: a bug of ours."""


_watched: list[tuple[int, int, str]] = []


def watch(address: int, size: int, name: str) -> None:
    """Announce a mapping [address, address + size) to the interpreted twins."""
    bisect.insort(_watched, (int(address), int(address) + int(size), name))


def unwatch(address: int) -> None:
    """Forget the mapping that starts at `address`."""
    _watched[:] = [entry for entry in _watched if entry[0] != int(address)]


def check(address: int, size: int) -> int:
    """Raise BadAddress unless [address, address + size) lies in one announced mapping. No bytes lie
    anywhere."""
    if size == 0:
        return int(address)
    at = bisect.bisect_right(_watched, (int(address), 1 << 62, "")) - 1
    if at < 0 or size < 0 or int(address) + int(size) > _watched[at][1]:
        raise BadAddress(f"{int(size)} bytes at {int(address):#x} belong to no mapping")
    return int(address)


def _pointer(builder: Any, address: Any, bits: int, offset: int = 0) -> Any:
    if offset:
        address = builder.add(address, ir.IntType(64)(offset))
    return builder.inttoptr(address, ir.IntType(bits).as_pointer())


def _swap(builder: Any, value: Any, bits: int) -> Any:
    return builder.bswap(value) if bits > 8 else value


def load(bits: int, ordering: str, big_endian: bool, offset: int = 0, signed: bool = False) -> Any:
    """Factory of loads from address + offset. `ordering` "" means an ordinary access at any
    alignment."""
    if not COMPILED:
        kind = _WIDTHS[bits]

        def load_checked(address: int) -> int:
            value = kind.from_address(check(int(address) + offset, bits // 8)).value
            if signed and value >> (bits - 1):
                return int(value - (1 << bits))
            if not big_endian:
                return int(value)
            return int.from_bytes(value.to_bytes(bits // 8, "little"), "big")

        return load_checked

    @intrinsic
    def load_native(typing_context: Any, address: Any) -> Any:  # type: ignore[misc]
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer = _pointer(builder, args[0], bits, offset)
            if ordering:
                value = builder.load_atomic(pointer, ordering, bits // 8)
            else:
                value = builder.load(pointer)
                value.align = 1
            if big_endian:
                value = _swap(builder, value, bits)
            if bits == 64:
                return value
            return (builder.sext if signed else builder.zext)(value, ir.IntType(64))

        return types.int64(types.int64), generate

    return load_native


def store(bits: int, ordering: str, big_endian: bool, offset: int = 0) -> Any:
    """Factory of stores to address + offset. `ordering` "" means an ordinary access at any
    alignment."""
    if not COMPILED:
        kind = _WIDTHS[bits]
        mask = (1 << bits) - 1

        def store_checked(address: int, value: int) -> None:
            value = int(value) & mask
            if big_endian:
                value = int.from_bytes(value.to_bytes(bits // 8, "big"), "little")
            kind.from_address(check(int(address) + offset, bits // 8)).value = value

        return store_checked

    @intrinsic
    def store_native(typing_context: Any, address: Any, value: Any) -> Any:  # type: ignore[misc]
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer = _pointer(builder, args[0], bits, offset)
            word = args[1] if bits == 64 else builder.trunc(args[1], ir.IntType(bits))
            if big_endian:
                word = _swap(builder, word, bits)
            if ordering:
                builder.store_atomic(word, pointer, ordering, bits // 8)
            else:
                made = builder.store(word, pointer)
                made.align = 1
            return context.get_dummy_value()

        return types.none(types.int64, types.int64), generate

    return store_native


u8 = load(8, "monotonic", False)
u16 = load(16, "monotonic", False)
u32 = load(32, "monotonic", False)
u64 = load(64, "monotonic", False)
acquire_u16 = load(16, "acquire", False)
acquire_u32 = load(32, "acquire", False)
acquire_u64 = load(64, "acquire", False)
be16 = load(16, "", True)
be32 = load(32, "", True)
le16 = load(16, "", False)
le32 = load(32, "", False)
le64 = load(64, "", False)

put_u8 = store(8, "monotonic", False)
put_u16 = store(16, "monotonic", False)
put_u32 = store(32, "monotonic", False)
put_u64 = store(64, "monotonic", False)
release_u16 = store(16, "release", False)
release_u32 = store(32, "release", False)
release_u64 = store(64, "release", False)
put_be16 = store(16, "", True)
put_be32 = store(32, "", True)
put_le16 = store(16, "", False)
put_le64 = store(64, "", False)


def member(offset: int) -> Any:
    """Factory of address + offset."""
    if not COMPILED:
        return lambda address: int(address) + offset

    @intrinsic
    def member_native(typing_context: Any, address: Any) -> Any:  # type: ignore[misc]
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.add(args[0], ir.IntType(64)(offset))

        return types.int64(types.int64), generate

    return member_native


def _fence() -> Any:
    if not COMPILED:
        return lambda: None  # the interpreter's own locking orders everything

    @intrinsic
    def fence_native(typing_context: Any) -> Any:  # type: ignore[misc]
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            builder.fence("seq_cst")
            return context.get_dummy_value()

        return types.none(), generate

    return fence_native


def _compiled_cas(bits: int) -> Any:
    """A compare-and-swap made by LLVM and called through ctypes, for interpreted runs."""
    text = f"""
    define i32 @cas(ptr %address, i{bits} %old, i{bits} %new) {{
      %pair = cmpxchg ptr %address, i{bits} %old, i{bits} %new seq_cst seq_cst
      %done = extractvalue {{ i{bits}, i1 }} %pair, 1
      %out = zext i1 %done to i32
      ret i32 %out
    }}"""
    kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, _WIDTHS[bits], _WIDTHS[bits])
    return kind(code.assemble(text, "cas"))


def _cas(bits: int) -> Any:
    if not COMPILED:
        native = _compiled_cas(bits)

        def cas(address: int, old: int, new: int) -> int:
            return int(native(check(address, bits // 8), old, new))

        return cas

    @intrinsic
    def cas_native(typing_context: Any, address: Any, old: Any, new: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kind = ir.IntType(bits)
            old, new = (v if bits == 64 else builder.trunc(v, kind) for v in args[1:])
            pair = builder.cmpxchg(_pointer(builder, args[0], bits), old, new, "seq_cst", "seq_cst")
            return builder.zext(builder.extract_value(pair, 1), ir.IntType(64))

        return types.int64(types.int64, types.int64, types.int64), generate

    return cas_native


fence = _fence()
cas_u32 = _cas(32)
"""cas_u32(address, old, new) -> 1 when the word was `old` and is now `new`, else 0."""


def _copy() -> Any:
    if not COMPILED:

        def copy(target: int, source: int, size: int) -> None:
            ctypes.memmove(check(target, size), check(source, size), int(size))

        return copy

    @intrinsic
    def copy_native(typing_context: Any, target: Any, source: Any, size: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            target, source = (_pointer(builder, a, 8) for a in args[:2])
            cgutils.raw_memcpy(builder, target, source, args[2], 1)
            return context.get_dummy_value()

        return types.none(types.int64, types.int64, types.int64), generate

    return copy_native


copy = _copy()
"""copy(target, source, size): size bytes, the two areas must not overlap."""


@jit
def zero(address, size):
    """Clear `size` bytes, a multiple of 8, at an aligned address."""
    for offset in range(0, size, 8):
        put_u64(address + offset, 0)


@jit
def add_u64(address, amount):
    """Add to a word that only this process writes (a counter): no locked instruction is needed."""
    put_u64(address, u64(address) + amount)
