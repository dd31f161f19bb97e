"""jit.py - the one place that decides how the data plane is compiled.

Theory      `jit` marks a leaf: it is inlined by LLVM into whoever calls it and never kept by
            itself. `entry` marks a function that Python calls: it has one fixed signature of int64
            values, is compiled once and kept on disk with all its callees inside (code.py).
Why so      numba's own cache looks at the file of the cached function only; an edit in a callee's
            file goes unnoticed. And it can be loaded only by numba, which takes longer to import
            than everything else that happens before a guest is served.
Three ways  compiled     numba is here: what is not kept is compiled, then kept. Leaves can be
                         compiled, too, as tests do.
            linked       numba is not here: the process wants entry points that are all kept
                         (code.want), and the decorators leave leaves alone.
            interpreted  NUMBA_DISABLE_JIT=1 turns the decorators into nothing. The memory
                         primitives (mem.py) then check every address, so a test run becomes an
                         address sanitizer.
Ownership   Each process for itself; the folder: code.py.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from typing import Any

from shm import code

COMPILED = not int(os.environ.get("NUMBA_DISABLE_JIT") or 0)
CACHE_DIR = code.open_folder() if COMPILED else None
OBJECTS = code.all_wanted(CACHE_DIR) if CACHE_DIR is not None else {}
COMPILER = COMPILED and not OBJECTS

if COMPILER:
    import numba
    from numba.core import config as numba_config
    from numba.core.codegen import CPUCodeLibrary, JITCPUCodegen
    from numba.extending import intrinsic as numba_intrinsic

    numba_config.CACHE_DIR = str(CACHE_DIR)

ENTRIES: list[Entry] = []
LEAVES: set[str] = set()


def _compile_once() -> None:
    """Have LLVM optimise and emit each entry as one module, and leaves not at all.

    numba optimises and emits machine code for every function with all its callees inside, then does
    so again in each caller: for a call graph ten levels deep that is most of the compile time. A
    leaf is only ever used inside an entry, so its unoptimised code is kept for linking and nothing
    else is done with it (numba's code library has one method for each of these steps; a numba
    without them compiles as it always does, slower).
    """
    optimise = getattr(CPUCodeLibrary, "_optimize_final_module", None)
    emit = getattr(CPUCodeLibrary, "_finalize_final_module", None)
    if optimise is None or emit is None:
        return

    def optimise_entries(self: Any) -> None:
        if self.name not in LEAVES:
            optimise(self)

    def emit_entries(self: Any) -> None:
        if self.name not in LEAVES:
            emit(self)
            return
        self._finalize_dynamic_globals()
        self._finalized = True

    def set_env(self: Any, env_name: str, env: Any) -> None:
        if self._engine.get_global_value_address(env_name):  # a leaf has none of its own
            set_known_env(self, env_name, env)

    set_known_env = JITCPUCodegen.set_env
    JITCPUCodegen.set_env = set_env
    CPUCodeLibrary._optimize_final_module = optimise_entries
    CPUCodeLibrary._finalize_final_module = emit_entries


if COMPILER:
    _compile_once()


def jit(function: Callable[..., Any]) -> Any:
    """A leaf of the data plane: compiled into its callers, never called from Python on a hot
    path."""
    return _leaf(function, False)


def inlined(function: Callable[..., Any]) -> Any:
    """A leaf that is part of its callers whatever its size: for what runs once per buffer, where a
    call costs as much as the work."""
    return _leaf(function, True)


def _leaf(function: Callable[..., Any], inline: bool) -> Any:
    if not COMPILER:
        return function
    LEAVES.add(function.__qualname__)
    return numba.njit(
        error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True, forceinline=inline
    )(function)


def intrinsic(function: Callable[..., Any]) -> Any:
    """A leaf whose LLVM code is written by hand (numba.extending.intrinsic)."""
    return numba_intrinsic(function) if COMPILER else function


class Entry:
    """An entry point: machine code that Python calls, or the kernel as a signal handler."""

    def __init__(
        self, function: Callable[..., Any], result: Any, arguments: tuple[Any, ...]
    ) -> None:
        self.name = function.__name__
        self._address = 0
        self._function = function
        self._kind = ctypes.CFUNCTYPE(result, *arguments)
        self._call: Callable[..., Any] | None = None
        if COMPILED and not COMPILER:
            if self.name not in OBJECTS:
                raise code.CodeError(f"{self.name} is not among what this process wants")
            self._link(OBJECTS[self.name])
        ENTRIES.append(self)

    def __call__(self, *values: int) -> Any:
        if self._call is None:
            self.prepare()
        assert self._call is not None
        return self._call(*values)

    @property
    def address(self) -> int:
        """Where its machine code begins."""
        if self._call is None:
            self.prepare()
        return self._address

    def prepare(self) -> bool:
        """Link it, or compile it first; whether it had to be compiled."""
        if self._call is not None:
            return False
        assert CACHE_DIR is not None
        made = code.kept(CACHE_DIR, self.name)
        missed = made is None
        if made is None:
            made = self._compile()
            try:
                code.keep(CACHE_DIR, self.name, made)
            except OSError as error:
                print(f"vhostmq: {self.name} is compiled, but not kept: {error}", file=sys.stderr)
        self._link(made)
        return missed

    def _compile(self) -> bytes:
        kinds: dict[Any, Any] = {
            ctypes.c_int64: numba.int64,
            ctypes.c_int32: numba.int32,
            None: numba.void,
        }
        result, arguments = self._kind._restype_, self._kind._argtypes_
        signature = kinds[result](*(kinds[kind] for kind in arguments))
        made = numba.cfunc(signature, error_model="numpy")(self._function)
        return bytes(made._library._get_compiled_object())

    def _link(self, made: bytes) -> None:
        self._address = code.link(made)
        self._call = self._kind(self._address)


def entry(arguments: int) -> Callable[[Callable[..., Any]], Any]:
    """A function that Python calls: `arguments` int64 values in, one int64 out; kept on disk.

    It is compiled by `warm` (or at its first call), not at import.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        if not COMPILED:
            return function
        return Entry(function, ctypes.c_int64, (ctypes.c_int64,) * arguments)

    return decorate


def handler(function: Callable[..., Any]) -> Any:
    """A signal handler (SA_SIGINFO: number, siginfo, context) as machine code; its `address` is for
    sigaction."""
    if not COMPILED:
        return function
    return Entry(function, None, (ctypes.c_int32, ctypes.c_int64, ctypes.c_int64))


def warm(progress: Callable[[str, int, int], None] | None = None) -> int:
    """Compile or link every entry point; returns how many had to be compiled.

    `progress(name, done, total)` is called before each one.
    """
    missed = 0
    for done, one in enumerate(ENTRIES):
        if progress is not None:
            progress(one.name, done, len(ENTRIES))
        missed += one.prepare()
    return missed
