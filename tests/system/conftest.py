"""conftest.py - fixtures of the system tests: images, the lab, the back-end under test.

Theory      A module has one lab and one back-end process; its tests run in the order they are
            written, and every one of them ends with a look at the back-end's health. Nothing is
            skipped because the machine is not prepared: prepare.py prepares it or says why not.
            What tests measured is shown at the session's end, whether they passed or not.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the modules of this folder, under any import mode

from backends import Backend, start_backend  # noqa: E402
from lab import DNS_NAME, PEER4, PEER6, Lab  # noqa: E402
from names import NameServer  # noqa: E402

from benchmarks.guest.prepare import Images, ordinary_user, prepare  # noqa: E402

MEASURED = pytest.StashKey[list[str]]()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Show what the back-end logged beside a failure."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    backend = getattr(item, "funcargs", {}).get("backend")
    if report.failed and isinstance(backend, Backend):
        report.sections.append(("back-end's log", backend.process.tail()))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Show what tests measured."""
    if lines := config.stash.get(MEASURED, []):
        terminalreporter.section("measured by system tests")
        for line in lines:
            terminalreporter.line(line)


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Have a line shown at the session's end."""
    lines = request.config.stash.setdefault(MEASURED, [])
    return lambda line: lines.append(f"{request.node.name}: {line}")


@pytest.fixture(scope="session")
def images() -> Images:
    """The guests' images, on a machine made ready."""
    return prepare()


@pytest.fixture(scope="module")
def lab(images: Images) -> Iterator[Lab]:
    """Both namespaces, with servers on the peer and on the host."""
    lab = Lab(ordinary_user())
    try:
        for role in ("far", "host"):
            lab.serve_xfer(role, images.bin / "xfer")
        yield lab
    finally:
        lab.close()


@pytest.fixture(scope="module")
def names(lab: Lab) -> Iterator[NameServer]:
    """The peer's name server."""
    sockets = []
    for family, address in ((socket.AF_INET, PEER4), (socket.AF_INET6, PEER6)):
        sockets.append(lab.socket("far", family, socket.SOCK_DGRAM))
        sockets[-1].bind((address, 53))
    server = NameServer(DNS_NAME, (PEER4, PEER6), sockets)
    yield server
    server.close()


def chosen_workers(module: Any) -> list[str]:
    """What the command line says about the number of workers."""
    return ["--workers", str(module.WORKERS)] if hasattr(module, "WORKERS") else []


@pytest.fixture(scope="module")
def backend(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The back-end, started with the module's QUEUES and WORKERS (without: as many as it likes on
    this machine), and ended in good order."""
    backend = start_backend(lab, request.module.QUEUES, *chosen_workers(request.module))
    yield backend
    backend.stop()


@pytest.fixture(autouse=True)
def healthy(backend: Backend) -> Iterator[None]:
    """No test may leave the back-end dead or complaining of itself."""
    yield
    backend.assert_healthy()


@pytest.fixture
def pairs(backend: Backend) -> int:
    """The number of queue pairs, for tests of how packets are spread over them."""
    if backend.name == "passt":
        pytest.skip(
            "NOT TESTED here: passt has one queue pair and no metrics: nothing to say about pairs"
        )
    return backend.queues
