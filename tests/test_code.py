"""Machine code that is kept: whole or not at all, and linked to what is in the process.

The objects are a C compiler's, named as numba names entry points; what a symbol table says is what
binutils' nm says.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shm import code

ROOT = Path(__file__).resolve().parent.parent
ADDS = """
static long table[] = {1, 20, 300};
long add(long n) __asm__("cfunc.add");
long add(long n) { return n + table[n % 3]; }
"""
READS = """
long getpid(void), numba_never(long), NRT_never(long);
long who(long n) __asm__("cfunc.who");
long other(long n) { return numba_never(n) + NRT_never(n); }
long who(long n) { return n < 0 ? other(n) : getpid() + n; }
"""
LOST = """
long not_in_any_library(void);
long lost(long n) __asm__("cfunc.lost");
long lost(long n) { return n ? not_in_any_library() : 0; }
"""


def compiled(folder: Path, text: str) -> bytes:
    """A C compiler's object of `text`, position independent as numba's are."""
    source = folder / "source.c"
    source.write_text(text)
    made = folder / "source.obj"
    subprocess.run(["cc", "-c", "-O1", "-fPIC", "-o", made, source], check=True)
    return made.read_bytes()


def called(made: bytes, value: int) -> int:
    return int(ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(code.link(made))(value))


# --- linking --------------------------------------------------------------------------------------


def test_an_object_is_linked_and_called(tmp_path):
    made = compiled(tmp_path, ADDS)
    assert [called(made, value) for value in (0, 1, 2, 10**12)] == [1, 21, 302, 10**12 + 20]


def test_objects_are_apart(tmp_path):
    """Two objects that name the same things each have their own."""
    first = compiled(tmp_path, ADDS)
    second = compiled(tmp_path, ADDS.replace("300", "7"))
    assert (called(first, 2), called(second, 2), called(first, 2)) == (302, 9, 302)


def test_symbols_are_those_that_nm_tells(tmp_path):
    for text in (ADDS, READS, LOST):
        made = compiled(tmp_path, text)
        told = subprocess.check_output(["nm", "-a", tmp_path / "source.obj"], text=True)
        names = {tuple(line.split()[-2:]) for line in told.splitlines()}
        wanted = {(name, kind != "U") for kind, name in names if not name.startswith(".")}
        found = set(code.symbols(made))
        assert wanted <= found and all(defined for _, defined in found - wanted)


def test_the_c_library_is_found_and_what_is_never_called_does_no_harm(tmp_path):
    """In a process of its own: names that end it stay there."""
    (tmp_path / "made").write_bytes(compiled(tmp_path, READS))
    script = f"""
import ctypes, os
from pathlib import Path
from shm import code
made = Path({str(tmp_path / "made")!r}).read_bytes()
who = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(code.link(made))
assert who(5) == os.getpid() + 5
print("never called", flush=True)
who(-1)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, text=True, capture_output=True)
    assert done.stdout == "never called\n"
    assert done.returncode == -6, "the process ends when it is called after all"


def test_what_is_nowhere_is_refused(tmp_path):
    """LLVM itself would end the process."""
    with pytest.raises(code.CodeError, match="not_in_any_library"):
        code.link(compiled(tmp_path, LOST))


# --- keeping --------------------------------------------------------------------------------------


def test_what_is_kept_is_found(tmp_path):
    assert code.kept(tmp_path, "name") is None
    code.keep(tmp_path, "name", b"machine code")
    assert code.kept(tmp_path, "name") == b"machine code"
    code.keep(tmp_path, "name", b"another")
    assert code.kept(tmp_path, "name") == b"another"
    assert [path.name for path in tmp_path.iterdir()] == ["name.o"]


@given(st.binary(max_size=200), st.data())
def test_what_is_damaged_is_not(tmp_path_factory, made, data):
    """One that was cut off, or has another byte anywhere."""
    folder = tmp_path_factory.mktemp("kept")
    code.keep(folder, "name", made)
    path = folder / "name.o"
    whole = path.read_bytes()
    size = data.draw(st.integers(0, len(whole) - 1))
    path.write_bytes(whole[:size])
    assert code.kept(folder, "name") is None
    at, other = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(1, 255))
    path.write_bytes(whole[:at] + bytes([whole[at] ^ other]) + whole[at + 1 :])
    assert code.kept(folder, "name") is None


def test_a_folder_that_is_full_leaves_the_former(tmp_path, monkeypatch):
    """A write that fails half-way."""
    code.keep(tmp_path, "name", b"machine code")

    def full(path, data):
        with open(path, "wb") as file:
            file.write(data[:5])
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space"):
            code.keep(tmp_path, "name", b"another")
    assert code.kept(tmp_path, "name") == b"machine code"
    assert [path.name for path in tmp_path.iterdir()] == ["name.o"]


def test_all_that_is_wanted_or_nothing(tmp_path, monkeypatch):
    code.keep(tmp_path, "first", b"1")
    code.keep(tmp_path, "second", b"2")
    for wanted, found in (
        ((), {}),
        (("first",), {"first": b"1"}),
        (("first", "second"), {"first": b"1", "second": b"2"}),
        (("first", "third"), {}),
    ):
        monkeypatch.setattr(code, "_wanted", wanted)
        assert code.all_wanted(tmp_path) == found


def test_a_wish_after_the_decision_is_a_mistake():
    script = "from shm import jit, code\ncode.want('breathe')\n"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, text=True, capture_output=True,
        env=os.environ | {"NUMBA_DISABLE_JIT": "1"},
    )  # fmt: skip
    assert done.returncode == 1 and "too late" in done.stderr
