"""jit.py - the one place that decides how the data plane is compiled and where the result is kept.

Theory      `jit` marks a leaf: it is inlined by LLVM into whoever calls it and never cached by
            itself. `entry` marks a function that Python calls: it has one fixed signature of int64
            values, is compiled once and kept on disk with all its callees inside.
Why so      numba's cache looks at the file of the cached function only; an edit in a callee's file
            goes unnoticed. So the cache folder is named by a digest of every source that can be
            compiled, plus the versions of numba and Python: an edited tree never meets code of
            another one.
Interpreted NUMBA_DISABLE_JIT=1 turns the decorators into nothing. The memory primitives (mem.py)
then
            check every address, so a test run becomes an address sanitizer.
Limits      Old folders are removed by `prune` once they have not been used for CACHE_KEEP_DAYS.
Ownership   The cache folder belongs to the user: $XDG_CACHE_HOME/vhostmq, else ~/.cache/vhostmq,
            else a private folder below the temporary directory when the home cannot be written.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numba
from numba.core import config as numba_config
from numba.core.codegen import CPUCodeLibrary, JITCPUCodegen

ROOT = pathlib.Path(__file__).resolve().parent.parent
ROOMS = ("shm", "flows", "dataplane")
PLAIN = (
    "dataplane/slow/",
    "dataplane/worker.py",
    "dataplane/commands.py",
    "dataplane/p",
    "dataplane/start.py",
)
CACHE_KEEP_DAYS = 30

COMPILED = not numba_config.DISABLE_JIT

ENTRIES: list[Any] = []


def source_digest() -> str:
    """Digest of all sources that may end up in compiled code, and of the compiler."""
    digest = hashlib.blake2b(digest_size=10)
    digest.update(f"{numba.__version__} {sys.version}".encode())
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            if name.startswith(PLAIN):
                continue  # plain Python: nothing compiled names it
            digest.update(name.encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _private_folder(path: pathlib.Path) -> bool:
    """True when `path` is (or could be made) a folder that only this user can write to."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
        return (
            found.st_uid == os.getuid() and not found.st_mode & 0o022 and os.access(path, os.W_OK)
        )
    except OSError:
        return False


def cache_root() -> pathlib.Path:
    """The folder that holds one sub-folder per source digest. Code is loaded from it, so it must be
    private."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    candidates = [
        pathlib.Path(home) / "vhostmq",
        pathlib.Path(tempfile.gettempdir()) / f"vhostmq-{os.getuid()}",
    ]
    for path in candidates:
        if path.is_absolute() and _private_folder(path):
            return path
    return pathlib.Path(tempfile.mkdtemp(prefix="vhostmq-"))


def prune(root: pathlib.Path, now_s: float) -> None:
    """Remove the compiled code of trees that nobody has run for CACHE_KEEP_DAYS."""
    for path in root.iterdir():
        with contextlib.suppress(OSError):  # another instance may be removing it, too
            if path.is_dir() and now_s - path.stat().st_mtime > CACHE_KEEP_DAYS * 86400:
                shutil.rmtree(path, ignore_errors=True)


def _open_cache() -> pathlib.Path:
    folder = cache_root() / source_digest()
    folder.mkdir(mode=0o700, exist_ok=True)
    os.utime(folder)
    numba_config.CACHE_DIR = str(folder)
    return folder


CACHE_DIR = _open_cache() if COMPILED else None
if CACHE_DIR is not None:
    prune(CACHE_DIR.parent, time.time())


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


LEAVES: set[str] = set()
if COMPILED:
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
    LEAVES.add(function.__qualname__)
    return numba.njit(
        error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True, forceinline=inline
    )(function)


def entry(arguments: int) -> Callable[[Callable[..., Any]], Any]:
    """A function that Python calls: `arguments` int64 values in, one int64 out; cached on disk.

    It is compiled by `warm` (or at its first call), not at import.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        compiled = numba.njit(error_model="numpy", cache=True)(function)
        ENTRIES.append((compiled, (numba.int64,) * arguments))
        return compiled

    return decorate


def handler(function: Callable[..., Any]) -> Any:
    """A signal handler (SA_SIGINFO: number, siginfo, context) as machine code; its `address` is for
    sigaction."""
    if not COMPILED:
        return function
    signature = numba.void(numba.int32, numba.int64, numba.int64)
    return numba.cfunc(signature, cache=True)(function)


def warm(progress: Callable[[str, int, int], None] | None = None) -> int:
    """Compile or load every entry point; returns how many had to be compiled.

    `progress(name, done, total)` is called before each one.
    """
    if not COMPILED:
        return 0
    missed = 0
    for done, (function, signature) in enumerate(ENTRIES):
        if progress is not None:
            progress(function.__name__, done, len(ENTRIES))
        function.compile(signature)
        missed += sum(function.stats.cache_misses.values())
        function.disable_compile()
    return missed
