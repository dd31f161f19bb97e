"""The compile cache: filled once, used by the next process, never used for other sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from shm import jit

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


def python(code: str, tree: Path, cache: Path, interpreted: bool = False) -> subprocess.Popen:
    env = os.environ | {
        "XDG_CACHE_HOME": str(cache),
        "NUMBA_DISABLE_JIT": str(int(interpreted)),
        "PYTHONDONTWRITEBYTECODE": "1",  # Python's own cache goes by size and time alone
    }
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=tree, env=env, text=True, stdout=subprocess.PIPE
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
    code = RUN + "\ntry:\n    probe.step('5')\nexcept TypeError:\n    print('refused')\n"
    assert last_line(python(code, tree, tmp_path)) == "refused"


COUNT = """
from numba.core import event
with event.install_recorder("numba:compile") as recorder:
    import dataplane.breath
    from shm import jit
    missed = jit.warm()
print(missed, len(recorder.buffer), len(jit.ENTRIES))
"""


def test_the_data_plane_itself_is_compiled_once():
    """What a worker starts with: all entries from the cache, not one compilation."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    last_line(python(COUNT, ROOT, Path(home)))
    missed, compilations, entries = last_line(python(COUNT, ROOT, Path(home))).split()
    assert (missed, compilations) == ("0", "0") and int(entries) > 0


# --- the folder -----------------------------------------------------------------------------------


def test_the_digest_names_every_source_of_the_compiled_rooms(tree, monkeypatch):
    monkeypatch.setattr(jit, "ROOT", tree)
    seen = {jit.source_digest()}
    assert jit.source_digest() in seen
    for room in jit.ROOMS:
        path = tree / room / "deep" / "new.py"
        path.parent.mkdir()
        path.write_text("")
        seen.add(jit.source_digest())
        path.write_text("x = 1\n")
        seen.add(jit.source_digest())
        path.rename(path.with_name("renamed.py"))
        seen.add(jit.source_digest())
    assert len(seen) == 1 + 3 * len(jit.ROOMS)
    (tree / "control").mkdir()
    (tree / "control" / "cli.py").write_text("x = 1\n")
    (tree / "shm" / "notes.txt").write_text("not a source\n")
    assert jit.source_digest() in seen


def test_the_digest_follows_the_compiler(monkeypatch):
    before = jit.source_digest()
    monkeypatch.setattr(jit.numba, "__version__", "0.0")
    assert jit.source_digest() != before


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
    assert jit.cache_root() == home / "vhostmq"
    assert (home / "vhostmq").stat().st_mode & 0o777 == 0o700
    assert jit.cache_root() == home / "vhostmq", "it may be there already"


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_others_can_write_to_is_not_used(homes, mode):
    """Code is loaded from it: whoever can write to it runs code as us."""
    home, temporary = homes
    (home / "vhostmq").mkdir()
    (home / "vhostmq").chmod(mode)
    fallback = temporary / f"vhostmq-{os.getuid()}"
    assert jit.cache_root() == fallback
    fallback.chmod(mode)
    last = jit.cache_root()
    assert last not in (home / "vhostmq", fallback)
    assert last.parent == temporary and last.stat().st_mode & 0o777 == 0o700


def test_a_link_to_somewhere_is_not_used(homes):
    home, temporary = homes
    (temporary / "elsewhere").mkdir()
    (home / "vhostmq").symlink_to(temporary / "elsewhere")
    assert jit.cache_root() == temporary / f"vhostmq-{os.getuid()}"


@pytest.mark.parametrize("home", ["relative/path", "/dev/null", ""])
def test_a_home_that_cannot_be_used(homes, monkeypatch, home):
    monkeypatch.setenv("XDG_CACHE_HOME", home)
    monkeypatch.setenv("HOME", "/dev/null")
    assert jit.cache_root() == homes[1] / f"vhostmq-{os.getuid()}"


def test_old_folders_are_removed(tmp_path):
    now_s = time.time()
    limit_s = jit.CACHE_KEEP_DAYS * 86400
    for name, age_s in (("old", limit_s + 60), ("recent", limit_s - 60), ("new", 0)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "code").touch()
        os.utime(folder, (now_s - age_s, now_s - age_s))
    (tmp_path / "a file").touch()
    os.utime(tmp_path / "a file", (0, 0))
    jit.prune(tmp_path, now_s)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a file", "new", "recent"]
