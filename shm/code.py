"""code.py - machine code that is kept: one ELF object per entry point, linked without the compiler.

Theory      What numba has compiled for an entry point is an object of System V's ELF. It is kept as
            a file, and a later process has llvmlite link it: the compiler itself is not imported.
            A process that calls nothing but entry points says which (`want`) before shm.jit is
            imported; it runs without the compiler if all of them are kept.
Why so      Importing numba and having it load its own cache takes three quarters of a second and
            20 MB, linking 50 ms: that is most of the time from exec to workers that are ready.
Folder      It is named by a digest of every source that can be compiled, of the compiler and of the
            processor: an edited tree, another numba, another machine with the same home never meet
            this code. An object is preceded by a digest of itself: one that was cut off or damaged
            is compiled again.
Symbols     Entry points call the C library, found in this process. The wrapper that numba puts
            around each also names functions of numba for an exception on its way to Python; entry
            points raise none. Where numba is not there, those names end the process.
Limits      Old folders are removed by `prune` once they have not been used for KEEP_DAYS.
Ownership   The cache folder belongs to the user: $XDG_CACHE_HOME/vhostmq, else ~/.cache/vhostmq,
            else a private folder below the temporary directory when the home cannot be written.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import pathlib
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
ROOMS = ("shm", "flows", "dataplane")
PLAIN = (
    "dataplane/slow/",
    "dataplane/worker.py",
    "dataplane/commands.py",
    "dataplane/p",
    "dataplane/start.py",
)
KEEP_DAYS = 30
DIGEST_BYTES = 20
SYMBOL = "<IBBHQQ"  # Elf64_Sym: name, info, other, section, value, size
ENTRY = "cfunc."  # how numba's names of functions that C can call begin
NEVER_CALLED = ("numba_", "NRT_")


class CodeError(Exception):
    """Machine code that cannot be linked here."""


# --- where it is kept -----------------------------------------------------------------------------


def compiler() -> bytes:
    """What makes the code, and for which processor."""
    from llvmlite import binding

    said = [sys.version.encode()]
    for name in ("numba", "llvmlite"):
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        said.append(pathlib.Path(spec.origin).with_name("_version.py").read_bytes())
    said.append(binding.get_host_cpu_name().encode())
    said.append(binding.get_host_cpu_features().flatten().encode())
    return b"\n".join(said)


def source_digest() -> str:
    """Digest of all sources that may end up in compiled code, and of the compiler."""
    digest = hashlib.blake2b(compiler(), digest_size=10)
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
    """Remove the compiled code of trees that nobody has run for KEEP_DAYS."""
    for path in root.iterdir():
        with contextlib.suppress(OSError):  # another instance may be removing it, too
            if path.is_dir() and now_s - path.stat().st_mtime > KEEP_DAYS * 86400:
                shutil.rmtree(path, ignore_errors=True)


def open_folder() -> pathlib.Path:
    """The folder of this source tree, made if need be."""
    folder = cache_root() / source_digest()
    folder.mkdir(mode=0o700, exist_ok=True)
    os.utime(folder)
    prune(folder.parent, time.time())
    return folder


# --- what is kept ---------------------------------------------------------------------------------


def keep(folder: pathlib.Path, name: str, made: bytes) -> None:
    """Keep the object of entry point `name`; whole or not at all. Raises OSError."""
    draft = folder / f"{name}.{os.getpid()}"
    try:
        draft.write_bytes(hashlib.blake2b(made, digest_size=DIGEST_BYTES).digest() + made)
        os.replace(draft, folder / f"{name}.o")
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def kept(folder: pathlib.Path, name: str) -> bytes | None:
    """The object kept for entry point `name`; None when there is none, or a damaged one."""
    try:
        found = (folder / f"{name}.o").read_bytes()
    except OSError:
        return None
    made = found[DIGEST_BYTES:]
    whole = hashlib.blake2b(made, digest_size=DIGEST_BYTES).digest() == found[:DIGEST_BYTES]
    return made if whole else None


_wanted: tuple[str, ...] = ()


def want(*names: str) -> None:
    """This process calls these entry points and no other compiled code. Before shm.jit is
    imported."""
    global _wanted
    assert "shm.jit" not in sys.modules, "too late: the compiler may be here already"
    _wanted = names


def all_wanted(folder: pathlib.Path) -> dict[str, bytes]:
    """The objects of all entry points this process wants, by name; none when one is missing."""
    found = {name: kept(folder, name) for name in _wanted}
    return {name: made for name, made in found.items() if made is not None and all(found.values())}


# --- linking --------------------------------------------------------------------------------------

_engines: list[Any] = []  # code lives as long as its engine


def _engine(module: str) -> Any:
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine()
    _engines.append(binding.create_mcjit_compiler(binding.parse_assembly(module), machine))
    return _engines[-1]


def assemble(text: str, name: str) -> int:
    """The address of function `name` of a module written in LLVM's language."""
    engine = _engine(text)
    engine.finalize_object()
    return int(engine.get_function_address(name))


def symbols(made: bytes) -> Iterator[tuple[str, bool]]:
    """Name of each symbol of an object, and whether it is defined there (System V ABI, chapter
    4)."""
    from llvmlite.binding import ObjectFileRef

    sections = {part.name(): part.data() for part in ObjectFileRef.from_data(made).sections()}
    names = sections[b".strtab"]
    for at, _, _, section, _, _ in struct.iter_unpack(SYMBOL, sections[b".symtab"]):
        if at:
            yield names[at : names.index(b"\0", at)].decode(), section != 0


def link(made: bytes) -> int:
    """The address of the entry point in an object. Raises CodeError when it calls what is not
    here."""
    from llvmlite import binding

    engine, entry = _engine(""), ""
    for name, defined in symbols(made):
        if defined:
            entry = name if name.startswith(ENTRY) else entry
        elif binding.address_of_symbol(name) is None:
            if not name.startswith(NEVER_CALLED):
                raise CodeError(f"machine code calls {name}, which is not in this process")
            abort = ctypes.cast(ctypes.CDLL(None).abort, ctypes.c_void_p).value
            binding.add_symbol(name, abort)
    engine.add_object_file(binding.ObjectFileRef.from_data(made))
    engine.finalize_object()
    return int(engine.get_function_address(entry))
