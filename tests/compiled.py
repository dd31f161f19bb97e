"""Leaves of the compiled code as plain Python functions, and memory for them to work on.

A leaf (`shm.jit.jit`) and a memory primitive (shm/mem.py, shm/access.py) exist only inside compiled
code: Python cannot call them. `Leaves("flows.table").claim` can be called: behind it stands a
compiled function that does nothing but call the leaf. With NUMBA_DISABLE_JIT=1 the attribute is the
leaf itself, so the same tests check both.

Each such function is a file of three lines in the cache folder of this very source tree (shm/jit.py
names it by a digest): numba keeps compiled code on disk only for functions that come from a file,
and so a second run of the suite compiles nothing.
"""

from __future__ import annotations

import ctypes
import importlib.util
import inspect
import itertools
import mmap
import os
import sys
from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any

import numba
from hypothesis import settings
from numba.core.dispatcher import Dispatcher
from numba.core.extending import _Intrinsic

from shm import mem
from shm.jit import CACHE_DIR, COMPILED

SOURCE = """from pkgutil import resolve_name
leaf = resolve_name({path!r}).{name}
def call_leaf({parameters}): return leaf({parameters})
"""


def _arity(leaf: Any) -> int:
    if isinstance(leaf, _Intrinsic):
        return len(inspect.signature(leaf._defn).parameters) - 1  # without the typing context
    return len(inspect.signature(leaf.py_func).parameters)


def _callable(path: str, name: str, leaf: Any) -> Callable[..., Any]:
    """A compiled function that calls the leaf `name` of the module (or accessors) at `path`."""
    assert CACHE_DIR is not None
    folder = CACHE_DIR / "leaves"
    folder.mkdir(exist_ok=True)
    file = folder / f"{path}.{name}.py"
    if not file.exists():
        parameters = ", ".join(f"a{number}" for number in range(_arity(leaf)))
        draft = file.with_suffix(f".{os.getpid()}")
        draft.write_text(SOURCE.format(path=path, name=name, parameters=parameters))
        os.replace(draft, file)
    spec = importlib.util.spec_from_file_location(f"leaf_{path}_{name}".replace(".", "_"), file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # numba looks there when it loads from the cache
    spec.loader.exec_module(module)
    return numba.njit(error_model="numpy", cache=True)(module.call_leaf)


class Leaves:
    """The leaves of a module or of a struct's accessors, callable; constants pass through."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __getattr__(self, name: str) -> Any:
        found = getattr(resolve_name(self._path), name)
        if COMPILED and (
            isinstance(found, _Intrinsic)
            or (isinstance(found, Dispatcher) and found.targetoptions.get("no_cpython_wrapper"))
        ):
            found = _callable(self._path, name, found)
        setattr(self, name, found)
        return found


# The first call of a leaf compiles it, and interpreted runs are slow: examples have no deadline.
settings.register_profile("leaves", deadline=None)
settings.load_profile("leaves")

_areas: list[mmap.mmap] = []
_numbers = itertools.count()


def area(size: int) -> tuple[int, mmap.mmap]:
    """Address and buffer of `size` zero bytes, page aligned, shared with processes forked later.

    They stay until the test process ends.
    """
    made = mmap.mmap(-1, size, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    _areas.append(made)
    address = ctypes.addressof(ctypes.c_char.from_buffer(made))
    mem.watch(address, size, f"test {next(_numbers)}")
    return address, made


def in_processes(count: int, work: Callable[[int], int | None]) -> list[int]:
    """Run work(0) .. work(count - 1) in forked processes that start together.

    Returns their exit statuses: what `work` returned (None: 0), 255 when it raised.
    """
    gate_read, gate_write = os.pipe()
    children = []
    for number in range(count):
        pid = os.fork()
        if pid == 0:
            status = 255
            try:
                os.close(gate_write)
                os.read(gate_read, 1)  # end of file opens the gate
                status = work(number) or 0
            except BaseException as error:
                os.write(2, f"process {number}: {error!r}\n".encode())
            finally:
                os._exit(status)
        children.append(pid)
    os.close(gate_read)
    os.close(gate_write)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
