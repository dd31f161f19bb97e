"""The rule of skips.py, tried on a few tests of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LACKING = """
import pytest

@pytest.fixture
def wire():
    pytest.skip("needs /dev/net/tun")

@pytest.mark.skipif(True, reason="needs root")
def test_by_mark(): pass

def test_by_fixture(wire): pass

def test_in_the_middle(): pytest.skip("needs a namespace")
"""
MEANT = """
import pytest

@pytest.mark.skipif(True, reason="NOT TESTED here: the compiled run tests it")
def test_by_mark(): pass

def test_in_the_middle(): pytest.skip("NOT TESTED here: no huge pages")

@pytest.mark.xfail(reason="a known defect")
def test_defect(): assert False

def test_good(): pass
"""
MODULE = """
import pytest
pytest.skip("needs a kernel", allow_module_level=True)
"""


def outcome(folder: Path, text: str, ci: str) -> tuple[int, str]:
    """Exit status and last line of pytest over one file."""
    (folder / "test_tried.py").write_text(text)
    (folder / "pytest.ini").write_text("[pytest]\n")
    tests = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "skips", "-p", "no:cacheprovider", "."],
        cwd=folder,
        env={**os.environ, "VHOSTMQ_CI": ci, "PYTHONPATH": str(tests)},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    "text, words", [(LACKING, "3 skipped"), (MEANT, "1 passed, 2 skipped, 1 xfailed")]
)
def test_elsewhere_a_skip_is_a_skip(tmp_path: Path, text: str, words: str) -> None:
    status, said = outcome(tmp_path, text, "")
    assert status == 0 and words in said


def test_in_ci_a_skip_fails_with_its_reason(tmp_path: Path) -> None:
    status, said = outcome(tmp_path, LACKING, "1")
    assert status == 1 and "skipped" not in said.splitlines()[-1]
    for reason in ("needs /dev/net/tun", "needs root", "needs a namespace"):
        assert f"skipped, which VHOSTMQ_CI=1 forbids: {reason}" in said


def test_in_ci_a_whole_module_may_not_be_skipped(tmp_path: Path) -> None:
    status, said = outcome(tmp_path, MODULE, "1")
    assert status != 0 and "forbids: needs a kernel" in said


def test_in_ci_what_is_meant_stays(tmp_path: Path) -> None:
    status, said = outcome(tmp_path, MEANT, "1")
    assert status == 0 and "1 passed, 2 skipped, 1 xfailed" in said
