"""Workers that look a while before they sleep (--poll-us): nobody has to kick them meanwhile,
nothing gets lost when they do fall asleep, and at rest they cost nothing.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable

import pytest
import test_dataplane_queues
from backend import Backend
from driver import BASIC, EVENT_IDX, GUEST_CSUM
from guest import Guest
from test_dataplane_queues import *  # noqa: F403
from test_dataplane_rings import (  # noqa: F401
    Echo,
    test_call_comes_at_the_used_event,
    test_datagrams_wait_for_receive_buffers,
    test_kicks_only_when_asked_for,
    test_ring_that_starts_empty,
    test_stream_waits_for_receive_buffers,
)
from test_dataplane_starved import test_stream_waits_for_enough  # noqa: F401
from test_dataplane_tcp import test_bulk, test_random_segments  # noqa: F401
from test_dataplane_tcp_loss import test_stuck_connections_cost_nothing  # noqa: F401
from world import World

from control.options import POLL_MAX_US, parse
from dataplane.breath import breathe

POLL_US = 1000
ALONE = ("--poll-us", str(POLL_US))  # a back-end that forwards no ports beside the module's
ARGS = (*test_dataplane_queues.ARGS, *ALONE)
pytestmark = pytest.mark.passt_lacks("no polling")


@pytest.mark.parametrize("features", [0, EVENT_IDX], ids=["flags", "event-idx"])
def test_no_kicks_while_it_looks(
    backend: Backend, make_guest: Callable[..., Guest], world: World, features: int
) -> None:
    """Questions and answers in quick succession: the worker is kicked for few of them."""
    guest = make_guest(features=BASIC | GUEST_CSUM | features)
    echo = Echo(guest, world)
    fewest = 300
    for _ in range(5):
        before = guest.drv.tx(0).kicks
        for number in range(300):
            echo.up(struct.pack(">I", number))
        fewest = min(fewest, guest.drv.tx(0).kicks - before)
    assert fewest < 150, f"{fewest} kicks for 300 datagrams, in the best of five rounds"


def test_pauses_around_the_moment_it_falls_asleep(guest: Guest, world: World) -> None:
    """A datagram at every phase of looking, asking to be kicked, and sleeping: none waits."""
    echo = Echo(guest, world)
    for number in range(400):
        echo.up(struct.pack(">I", number))
        if number % 2:
            echo.down(struct.pack(">I", number))
        time.sleep((POLL_US - 150 + number) / 1e6)


def test_at_rest(backend: Backend, guest: Guest, world: World) -> None:
    """After the last of the traffic it sleeps: no processor time, no wake-ups."""
    echo = Echo(guest, world)
    echo.up(b"?")
    time.sleep(0.2)
    wakeups = switches(backend)
    assert backend.load(1.0) < 0.05
    assert switches(backend) - wakeups <= 2 * len(backend.tree())


def switches(backend: Backend) -> int:
    """Voluntary context switches of all processes of the back-end so far."""
    total = 0
    for pid in backend.tree():
        with open(f"/proc/{pid}/status") as file:
            total += sum(int(line.split()[1]) for line in file if line.startswith("voluntary"))
    return total


def test_how_long_it_looks_is_learnt(make_local: Callable[..., Guest]) -> None:
    """Work that follows soon makes it look longer, up to the limit; work that does not makes it
    sleep at once, as it begins."""
    guest = make_local()
    guest.drv.block["poll_us"] = POLL_US
    context, kick = guest.drv.workers[0].context, guest.drv.tx(0).kick
    view = context.view

    def woken_after(idle_us: int) -> int:
        """One kick, so long after the last work; how long it looks from now on, ns."""
        os.eventfd_write(kick, 1)
        view["busy"] = 0
        view["worked_ns"] = time.monotonic_ns() - 1000 * idle_us
        view["poll_until_ns"] = 0
        view["polling"] = 0
        breathe(context.address, -1, 1)
        looks_ns = view["poll_until_ns"] - view["worked_ns"]
        assert looks_ns == view["poll_ns"] <= 1000 * POLL_US
        return looks_ns

    assert view["poll_ns"] == 0
    assert woken_after(10 * POLL_US) == 0
    longer = [woken_after(POLL_US // 10) for _ in range(12)]
    assert longer[0] > 0 and max(longer) == 1000 * POLL_US
    shorter = [woken_after(2 * POLL_US) for _ in range(12)]
    assert shorter == sorted(shorter, reverse=True) and shorter[-1] == 0


def test_refused_values() -> None:
    """A worker that never sleeps is not what was meant."""
    for value in ("-1", str(POLL_MAX_US + 1), "much"):
        with pytest.raises(SystemExit):
            parse(["run", "--socket", os.devnull, f"--poll-us={value}"])
