"""A packed ring whose driver makes slots available again before it was shown that they are used.

The device keeps what it returns until it shows it (virtq_packed.py): at most one chain for each
slot, whatever the driver writes meanwhile.
"""

from __future__ import annotations

import struct

import pytest
from compiled import Leaves
from test_virtq_device import DEVICE, FIRST, MEMORY

from dataplane.context import CHAIN_IOV_MAX

V = Leaves("dataplane.virtq")
AVAIL, USED, WRAP = 1 << 7, 1 << 15, 1 << 15


@pytest.mark.parametrize("num", [1, 3, 8])
def test_a_slot_is_not_taken_twice_before_it_was_shown(num: int) -> None:
    DEVICE.attach(16)
    ring, area = DEVICE.ring, MEMORY.alloc(16 * num + 64, 16)
    ring["packed"], ring["num"], ring["log_count"] = 1, num, 0
    ring["desc"], ring["avail"] = DEVICE.host(area), DEVICE.host(area + 16 * num)
    ring["used"] = DEVICE.host(area + 16 * num + 8)
    for name in ("last_avail", "used_idx", "published"):
        ring[name] = WRAP

    def offer(lap: int) -> None:
        flags = USED if lap % 2 else AVAIL
        for slot in range(num):
            MEMORY.write(area + 16 * slot, struct.pack("<QIHH", FIRST, 8, slot, flags))

    def taken() -> int:
        for count in range(10 * num):
            if not V.ready(DEVICE.r, 0):
                return count
            assert V.walk(DEVICE.w, DEVICE.r, 0, DEVICE.iov, CHAIN_IOV_MAX, 0) == 1
            V.put_used(DEVICE.r, ring["chain_id"], 0, 1)
            V.take(DEVICE.r, 1)
        raise AssertionError("no end")

    try:
        offer(0)
        assert taken() == num
        for lap in range(1, 4):
            offer(lap)
            assert V.ready(DEVICE.r, 0) == 0 and V.ready(DEVICE.r, num - 1) == 0
            assert ring["log_count"] == num
            V.publish(DEVICE.r, DEVICE.context.view["option"])
            offer(lap)
            assert taken() == num
    finally:
        ring["packed"] = 0
