"""flow_list.py - the flows of a running instance, for its operator: `vhostmq flows`.

Theory      The flow table lies in shared memory; an entry is copied and looked at again: one that
            ended, or began anew (flow.version), meanwhile is left out. The data plane does not
            notice.
Columns     Addresses as the guest sees them. home: the worker that has the socket, an arrow where
            it is on its way to another; queue: the pair the guest sent on last; age and idle in
            seconds; bytes from and to the guest; moves: how often it went to another worker.
Ownership   Reads only.
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Iterator
from typing import Any

from control import instances
from shm import schema
from shm.layout import View
from shm.segment import Segment

COLUMNS = ("protocol", "guest", "far", "state", "home", "queue", "age_s", "idle_s", "tx_bytes",
           "rx_bytes", "moves")  # fmt: skip
CLAIMED = 0x80000000  # flows/table.py, not imported: it brings the compiler
M32 = 0xFFFFFFFF
AHEAD_MAX_MS = 60_000  # workers go on while we read


def show(pid: int | None, as_json: bool) -> int:
    """Print the flows of an instance; the command's exit status."""
    segment = instances.chosen(pid)
    rows = list(flows(segment, time.monotonic_ns() // 1_000_000))
    segment.close()
    instances.show(rows, COLUMNS, as_json)
    return 0


def flows(segment: Segment, now_ms: int) -> Iterator[dict[str, Any]]:
    """What there is to say of each flow, by COLUMNS."""
    at, buffer = segment.offsets, segment.buffer
    with memoryview(buffer)[at.tags : at.tags + 4 * schema.FLOWS_MAX].cast("I") as tags:
        for index in [index for index, tag in enumerate(tags) if 0 < tag < CLAIMED]:
            start = at.flow + index * schema.FLOW.size
            version = schema.FLOW.get(buffer, start, "version")
            copy = bytes(buffer[start : start + schema.FLOW.size])
            one = View(schema.FLOW, copy, 0)
            same = not version & 1 and version == schema.FLOW.get(buffer, start, "version")
            if same and tags[index] == one["tag"] and one["state"]:
                yield _row(one, now_ms)


def _row(flow: View, now_ms: int) -> dict[str, Any]:
    home, heir = flow["home"], flow["heir"]
    moments_ms = flow["last_guest_ms"], flow["last_far_ms"]
    return {
        "protocol": schema.PROTOCOLS[flow["protocol"]],
        "guest": _end(flow.bytes("guest_addr"), flow["guest_port"]),
        "far": _end(flow.bytes("far_addr"), flow["far_port"]),
        "state": schema.STATES[flow["state"]],
        "home": f"{home}>{heir - 1}" if heir else str(home),
        "queue": flow["tx_queue"],
        "age_s": _since_s(now_ms, flow["born_ms"]),
        "idle_s": min(_since_s(now_ms, one) for one in moments_ms),
        "tx_bytes": flow["tx_bytes"],
        "rx_bytes": flow["rx_bytes"],
        "moves": flow["moves"],
    }


def _since_s(now_ms: int, then_ms: int) -> float:
    """Since a moment of 32 bits; one that came after we looked at the clock is now."""
    since_ms = (now_ms - then_ms) & M32
    return since_ms / 1000 if since_ms < M32 - AHEAD_MAX_MS else 0.0


def _end(packed: bytes, port: int) -> str:
    address = ipaddress.IPv6Address(packed)
    mapped = address.ipv4_mapped
    return f"{mapped}:{port}" if mapped else f"[{address}]:{port}"
