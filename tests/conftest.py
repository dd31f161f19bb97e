"""Fixtures of the protocol tests: one network, one back-end per module, a fresh guest per test.

A back-end is started once per module and module-level ``ARGS``; each test connects its own
front-end, so that the tests also exercise a few hundred reconnects. Tests that need other
arguments, or that end the back-end, take `make_backend`.

Markers, effective only in a ``BACKEND=passt:...`` run: ``passt_defect(reason)`` expects the test
to fail there, ``passt_lacks(reason)`` does not run it there. Neither weakens the run against our
own code. What a skip means in continuous integration: skips.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from backend import READY_S, Backend, kind
from driver import BASIC, GUEST_CSUM, Driver
from guest import Guest
from world import World

pytest_plugins = ["skips"]
RAISED = pytest.StashKey[bool]()


def pytest_configure(config: pytest.Config) -> None:
    for line in (
        "passt_defect(reason): a known defect of passt; the test describes the right behaviour",
        "passt_lacks(reason): passt does not have this at all",
    ):
        config.addinivalue_line("markers", line)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if kind() != "passt":
        return
    for item in items:
        if mark := item.get_closest_marker("passt_defect"):
            item.add_marker(pytest.mark.xfail(reason=mark.args[0], strict=False))
        if mark := item.get_closest_marker("passt_lacks"):
            item.add_marker(pytest.mark.skip(reason=f"NOT TESTED here: passt: {mark.args[0]}"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    """Remember on the item that its test raised, so that the next test gets a fresh back-end."""
    if call.excinfo and not call.excinfo.errisinstance(pytest.skip.Exception):
        item.stash[RAISED] = True
    return (yield)


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    made = World()
    yield made
    made.close()


@pytest.fixture(scope="session")
def compiled(world: World) -> None:
    """Serve one guest, however long that takes: a fresh machine compiles the data plane first."""
    first = Backend(world)
    try:
        guest = Guest(Driver(first.path, timeout=READY_S).start())
        guest.resolve(READY_S)
        guest.drv.close()
    finally:
        first.kill()


@pytest.fixture(scope="module")
def shared_backend(
    request: pytest.FixtureRequest, world: World, compiled: None
) -> Iterator[Callable[[], Backend]]:
    """The module's back-end; started anew after a test that failed or ended it."""
    running: list[Backend] = []

    def current() -> Backend:
        if not running or not running[-1].alive():
            options = getattr(request.module, "OPTIONS", {})
            running.append(Backend(world, *getattr(request.module, "ARGS", ()), **options))
        return running[-1]

    yield current
    for one in running:
        one.kill()


@pytest.fixture
def backend(
    request: pytest.FixtureRequest, shared_backend: Callable[[], Backend]
) -> Iterator[Backend]:
    current = shared_backend()
    at = len(current.lines)
    yield current
    status = current.process.poll()
    text = "\n".join(current.lines[at:])
    if request.node.stash.get(RAISED, False):
        current.kill()
    if kind() == "passt" and request.node.get_closest_marker("passt_defect"):
        return
    assert status is None, f"the back-end ended with status {status}:\n{current.tail()}"
    assert "Traceback" not in text, f"the back-end raised:\n{text}"
    assert " died (" not in text, f"a worker died:\n{text}"
    assert " does not answer (" not in text, f"a worker hung:\n{text}"


@pytest.fixture
def make_local(world: World) -> Iterator[Callable[..., Guest]]:
    """Makes guests on workers in this process, which breathe when the test says so."""
    from inprocess import local_guests  # the data plane itself, which few tests need here

    with local_guests(world) as make:
        yield make


@pytest.fixture
def make_backend(world: World, compiled: None) -> Iterator[Callable[..., Backend]]:
    """Start back-ends with arguments of the test's own; they are ended after it."""
    made: list[Backend] = []

    def make(*args: str, within: World = world, **options: Any) -> Backend:
        made.append(Backend(within, *args, **options))
        return made[-1]

    yield make
    for one in made:
        text = one.tail(1000)
        one.kill()
        assert "Traceback" not in text, f"the back-end raised:\n{text}"
        assert " died (" not in text, f"a worker died:\n{text}"


@pytest.fixture
def rings(request: pytest.FixtureRequest) -> int:
    """Feature bits of the format of a guest's rings: split rings where a test does not choose
    (formats.py).
    """
    return int(getattr(request, "param", 0))


@pytest.fixture
def make_guest(backend: Backend, rings: int) -> Iterator[Callable[..., Guest]]:
    """A guest on the module's back-end; options are those of `Driver`, plus ``to`` another
    back-end. Its rings are of the test's format.
    """
    made: list[Guest] = []

    def make(
        *,
        to: Backend | None = None,
        resolve: bool = True,
        base: int | None = None,
        features: int = BASIC | GUEST_CSUM,
        **options: Any,
    ) -> Guest:
        drv = Driver((to or backend).path, features=features | rings, **options)
        guest = Guest(drv.start(base))
        made.append(guest)
        if resolve:
            guest.resolve()
        return guest

    yield make
    for guest in made:
        guest.drv.close()
        for peer in guest.peers:
            peer.close()


@pytest.fixture
def guest(make_guest: Callable[..., Guest]) -> Guest:
    return make_guest()
