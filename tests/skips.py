"""Skips that may not look green: in continuous integration they fail.

A test that needs root, a namespace or /dev/net/tun is skipped, with its reason, on a machine that
lacks them. With VHOSTMQ_CI=1 (.ci/run) nothing may be lacking, and each skip becomes a failure with
that reason. A skip that is meant, wherever the test runs, says so: its reason begins with
"NOT TESTED here".
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

DELIBERATE = "NOT TESTED here"


def _refuse(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turn a skip that is not meant into a failure."""
    if os.environ.get("VHOSTMQ_CI") != "1" or not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    reason = reason.removeprefix("Skipped: ")
    if not reason.startswith(DELIBERATE):
        report.outcome = "failed"
        report.longrepr = f"skipped, which VHOSTMQ_CI=1 forbids: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    report = yield
    _refuse(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Iterator[None]:
    report = yield
    _refuse(report)
    return report
