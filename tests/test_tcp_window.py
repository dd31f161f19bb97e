"""The window the guest is told: what it sees must let it send, or be none.

The worker lives in the test's process (inprocess.py).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from compiled import Leaves
from guest import Guest
from minitcp import established
from world import World

from shm import schema
from shm.layout import View

SEGMENT = 1460  # the MSS we announce at an MTU of 1500
T = Leaves("dataplane.tcp_segment")


@pytest.fixture
def guest(make_local: Callable[..., Guest]) -> Guest:
    return make_local()


@pytest.mark.parametrize("room", [0, 256, SEGMENT - 1, SEGMENT, 1500, 1535, 1536, 1700, 3000])
def test_a_window_lets_the_guest_send_a_segment_or_is_none(
    guest: Guest, world: World, room: int
) -> None:
    """Less is told once and never again: the guest would wait for its persist timer. 1460 to 1535
    are a segment, but not without their low 8 bits, which the window scale takes."""
    established(guest, world, 4)
    (index,) = guest.drv.flow_indexes()
    flow = guest.drv.flow(index)
    flow["window_edge"], flow["sndbuf_free"] = flow["seq_from_guest"], -(-room * 4 // 3)
    segment = guest.drv.segment
    View(schema.NET, segment.buffer, segment.offsets.net)["mtu"] = 1500
    w = guest.drv.workers[0].context.address
    seen = T.advertise(w, guest.drv.flow_address(index)) << flow["our_scale"]
    assert seen == (room >> 8 << 8 if room > 1535 else 0) and (seen == 0 or seen >= SEGMENT)
