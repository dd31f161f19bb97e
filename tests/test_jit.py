"""Entry points: compiled once, linked by the next process, never used for other sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from llvmlite import binding

from dataplane import start
from shm import code

ROOT = Path(__file__).resolve().parent.parent
LEAF = '''"""A leaf in a file of its own."""
from shm.jit import jit


@jit
def scaled(x):
    return {factor} * x
'''
PROBE = '''"""An entry that calls a leaf of another file."""
from flows.leaf import scaled
from shm.jit import entry


@entry(1)
def step(x):
    return scaled(x) + 1
'''
RUN = """
from dataplane import probe
from shm import jit
missed = jit.warm(lambda name, done, total: print(name, done, total))
print(missed, probe.step(5), jit.CACHE_DIR)
"""


def python(
    code: str, tree: Path, cache: Path, interpreted: bool = False, quiet: bool = False
) -> subprocess.Popen:
    env = os.environ | {
        "XDG_CACHE_HOME": str(cache),
        "NUMBA_DISABLE_JIT": str(int(interpreted)),
        "PYTHONDONTWRITEBYTECODE": "1",  # Python's own cache goes by size and time alone
    }
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tree,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE if quiet else None,
    )


def last_line(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    return str(output).strip().splitlines()[-1]


@pytest.fixture
def tree(tmp_path):
    """A small source tree: the real shm/, one leaf, one entry."""
    made = tmp_path / "tree"
    shutil.copytree(ROOT / "shm", made / "shm", ignore=shutil.ignore_patterns("__pycache__"))
    for room in ("flows", "dataplane"):
        (made / room).mkdir()
        (made / room / "__init__.py").touch()
    (made / "flows" / "leaf.py").write_text(LEAF.format(factor=2))
    (made / "dataplane" / "probe.py").write_text(PROBE)
    return made


def test_a_second_process_compiles_nothing_and_an_edit_is_never_missed(tree, tmp_path):
    """The edited file is not the one whose function is cached: numba alone would not notice."""
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    leaf = tree / "flows" / "leaf.py"
    times = leaf.stat()
    missed, value, first = last_line(python(RUN, tree, cache)).split()
    assert (missed, value) == ("1", "11")
    assert Path(first).parent == cache / "vhostmq"
    assert last_line(python(RUN, tree, cache)) == f"0 11 {first}"
    leaf.write_text(LEAF.format(factor=3))
    os.utime(leaf, ns=(times.st_atime_ns, times.st_mtime_ns))  # same size, same time
    missed, value, second = last_line(python(RUN, tree, cache)).split()
    assert (missed, value) == ("1", "16") and second != first
    leaf.write_text(LEAF.format(factor=2))
    assert last_line(python(RUN, tree, cache)) == f"0 11 {first}"


def test_cold_processes_that_start_together(tree, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    started = [python(RUN, tree, cache) for _ in range(3)]
    assert {last_line(process).split()[1] for process in started} == {"11"}
    assert last_line(python(RUN, tree, cache)).split()[:2] == ["0", "11"]


def test_interpreted_runs_need_no_cache(tree, tmp_path):
    assert last_line(python(RUN, tree, tmp_path, interpreted=True)) == "0 11 None"
    assert not (tmp_path / "vhostmq").exists()


def test_an_entry_has_one_version(tree, tmp_path):
    """After warm nothing is compiled any more: a wrong argument is an error, not a new version."""
    code = RUN + "\ntry:\n    probe.step('5')\nexcept ArgumentError:\n    print('refused')\n"
    code = "from ctypes import ArgumentError\n" + code
    assert last_line(python(code, tree, tmp_path)) == "refused"


LINKED = """
import sys
from shm import code
code.want({wanted})
from dataplane import probe
from shm import jit
print(jit.warm(), probe.step(5), jit.CACHE_DIR, "numba" in sys.modules, "numpy" in sys.modules)
"""


def test_a_process_that_wants_kept_entries_has_no_compiler(tree, tmp_path):
    """It calls the same code. When one it wants is missing, or damaged, it compiles."""
    wanted = LINKED.format(wanted="'step'")
    assert last_line(python(wanted, tree, tmp_path)).split()[:2] == ["1", "11"]
    missed, value, folder, numba, numpy = last_line(python(wanted, tree, tmp_path)).split()
    assert (missed, value, numba, numpy) == ("0", "11", "False", "False")
    made = Path(folder) / "step.o"
    whole = made.read_bytes()
    made.write_bytes(whole[:-1])
    assert last_line(python(wanted, tree, tmp_path)) == f"1 11 {folder} True True"
    assert made.stat().st_size == len(whole)
    made.unlink()
    assert last_line(python(wanted, tree, tmp_path)) == f"1 11 {folder} True True"
    more = LINKED.format(wanted="'step', 'stride'")
    assert last_line(python(more, tree, tmp_path)) == f"0 11 {folder} True True"


def test_code_that_cannot_be_kept_runs_all_the_same(tree, tmp_path):
    """And says so: the next start compiles again."""
    folder = last_line(python(RUN, tree, tmp_path)).split()[2]
    made = Path(folder) / "step.o"
    made.unlink()
    made.mkdir()
    for _ in range(2):
        process = python(RUN, tree, tmp_path, quiet=True)
        out, said = process.communicate(timeout=300)
        assert process.returncode == 0 and out.splitlines()[-1] == f"1 11 {folder}"
        assert "vhostmq: step is compiled, but not kept: " in said


def test_what_was_not_wanted_is_not_called(tree, tmp_path):
    """A process without a compiler that comes upon another entry point says so at once."""
    wanted = LINKED.format(wanted="'step'")
    last_line(python(wanted, tree, tmp_path))
    other = tree / "dataplane" / "other.py"
    other.write_text(PROBE.replace("step", "stride"))
    both = wanted.replace("import probe", "import probe, other")
    last_line(python(both.replace("'step'", "'step', 'stride'"), tree, tmp_path))
    failed = python(both + "\nassert False, 'not reached'", tree, tmp_path, quiet=True)
    _, said = failed.communicate(timeout=300)
    assert failed.returncode == 1
    assert "CodeError: stride is not among what this process wants" in said


def test_interpreted_processes_link_nothing(tree, tmp_path):
    wanted = LINKED.format(wanted="'step'")
    last_line(python(wanted, tree, tmp_path))
    assert last_line(python(wanted, tree, tmp_path, interpreted=True)) == "0 11 None False False"


DATA_PLANE = """
import sys
from shm import code
from dataplane import preload
assert "shm.jit" in sys.modules
from shm import jit
print(preload.compile_all(False), *sorted(one.name for one in jit.ENTRIES))
"""
MOVER = """
from dataplane import mover
from shm import jit
print(jit.warm(), *sorted(one.name for one in jit.ENTRIES))
"""


def test_what_the_processes_want_is_what_they_have():
    """The lists of names that the fork server and the guest's movers ask for are complete, and no
    longer than need be."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    assert last_line(python(DATA_PLANE, ROOT, home)).split()[1:] == sorted(start.WORKER_ENTRIES)
    assert last_line(python(MOVER, ROOT, home)).split()[1:] == sorted(start.MOVER_ENTRIES)


# --- the folder -----------------------------------------------------------------------------------


def test_the_digest_names_every_source_of_the_compiled_rooms(tree, monkeypatch):
    monkeypatch.setattr(code, "ROOT", tree)
    seen = {code.source_digest()}
    assert code.source_digest() in seen
    for room in code.ROOMS:
        path = tree / room / "deep" / "new.py"
        path.parent.mkdir()
        path.write_text("")
        seen.add(code.source_digest())
        path.write_text("x = 1\n")
        seen.add(code.source_digest())
        path.rename(path.with_name("renamed.py"))
        seen.add(code.source_digest())
    assert len(seen) == 1 + 3 * len(code.ROOMS)
    (tree / "control").mkdir()
    (tree / "control" / "cli.py").write_text("x = 1\n")
    (tree / "shm" / "notes.txt").write_text("not a source\n")
    assert code.source_digest() in seen


def test_the_digest_follows_the_compiler_and_the_processor(monkeypatch):
    """Another numba, llvmlite or Python, and a home that several machines share."""
    before = code.source_digest()
    monkeypatch.setattr(code.sys, "version", "3.0")
    seen = {before, code.source_digest()}
    monkeypatch.undo()
    for name in ("get_host_cpu_name", "get_host_cpu_features"):
        with monkeypatch.context() as patch:
            found = getattr(binding, name)()
            other = type(found)({"nothing": True}) if isinstance(found, dict) else "other"
            patch.setattr(binding, name, lambda other=other: other)
            seen.add(code.source_digest())
    read = Path.read_bytes
    for package in ("numba", "llvmlite"):
        with monkeypatch.context() as patch:
            patch.setattr(
                Path,
                "read_bytes",
                lambda path, package=package: (
                    b"other" if path.parts[-2:] == (package, "_version.py") else read(path)
                ),
            )
            seen.add(code.source_digest())
    assert len(seen) == 6 and code.source_digest() == before


@pytest.fixture
def homes(tmp_path, monkeypatch):
    """The user's cache folder and the temporary folder, both empty."""
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    home.mkdir()
    temporary.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    return home, temporary


def test_the_folder_is_private(homes):
    home, _ = homes
    assert code.cache_root() == home / "vhostmq"
    assert (home / "vhostmq").stat().st_mode & 0o777 == 0o700
    assert code.cache_root() == home / "vhostmq", "it may be there already"


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_others_can_write_to_is_not_used(homes, mode):
    """Code is loaded from it: whoever can write to it runs code as us."""
    home, temporary = homes
    (home / "vhostmq").mkdir()
    (home / "vhostmq").chmod(mode)
    fallback = temporary / f"vhostmq-{os.getuid()}"
    assert code.cache_root() == fallback
    fallback.chmod(mode)
    last = code.cache_root()
    assert last not in (home / "vhostmq", fallback)
    assert last.parent == temporary and last.stat().st_mode & 0o777 == 0o700


def test_a_link_to_somewhere_is_not_used(homes):
    home, temporary = homes
    (temporary / "elsewhere").mkdir()
    (home / "vhostmq").symlink_to(temporary / "elsewhere")
    assert code.cache_root() == temporary / f"vhostmq-{os.getuid()}"


@pytest.mark.parametrize("home", ["relative/path", "/dev/null", ""])
def test_a_home_that_cannot_be_used(homes, monkeypatch, home):
    monkeypatch.setenv("XDG_CACHE_HOME", home)
    monkeypatch.setenv("HOME", "/dev/null")
    assert code.cache_root() == homes[1] / f"vhostmq-{os.getuid()}"


def test_old_folders_are_removed(tmp_path):
    now_s = time.time()
    limit_s = code.KEEP_DAYS * 86400
    for name, age_s in (("old", limit_s + 60), ("recent", limit_s - 60), ("new", 0)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "code").touch()
        os.utime(folder, (now_s - age_s, now_s - age_s))
    (tmp_path / "a file").touch()
    os.utime(tmp_path / "a file", (0, 0))
    code.prune(tmp_path, now_s)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a file", "new", "recent"]
