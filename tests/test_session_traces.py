"""Recorded front-ends (QEMU, User Mode Linux, DPDK), message by message: each is served as it was.

A trace holds what a real front-end sent to another back-end. Here the same is said to a Session
that offers the same virtio features; from the protocol features the front-end takes what we have,
as it would.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conversation import (
    Conversation,
    message,
    region,
    reply,
    state,
    table,
    u64,
)

from control.effects import Ack, Close, Log, Nack, RingRefused
from control.session import Offer

TRACES = Path(__file__).parent / "traces"
LOG_ALL = 1 << 26
OURS = 0x1A03D

EXPECTED = {
    # name: (queue pairs, rings started and enabled at the same time, in order; "-" is none)
    "dpdk-22.11.passt.1pair": (1, "- 0 01 1 -"),
    "dpdk-22.11.dpdk-vhost.2pairs": (2, "- 0 01 012 0123 123 23 3 -"),
    "dpdk-22.11.dpdk-vhost.2pairs.packed": (2, "- 0 01 012 0123 123 23 3 -"),
    "qemu-7.2.passt.1pair": (1, "- 0 01 1 -"),
    "qemu-7.2.dpdk-vhost.2pairs": (2, "- 0 01 012 0123 013 01 1 -"),
    "qemu-7.2.dpdk-vhost.2pairs.packed": (2, "- 0 01 012 0123 013 01 1 -"),
    "uml-6.1.passt.1pair": (1, "- 0 01 0 -"),
    # Without CONFIG it never enables a ring: they count as enabled. Ring 2 is its control queue.
    "uml-6.1.dpdk-vhost.1pair": (2, "- 0 01 012"),
    "uml-6.1.dpdk-vhost.2pairs": (2, "- 0 01 012"),
}


@dataclass
class Line:
    """One message of a trace, and the answer the front-end waited for (None: it did not)."""

    name: str
    need_reply: bool
    values: dict[str, int]
    answer: Line | None = None


def read(name: str) -> Iterator[Line]:
    last: Line | None = None
    for text in (TRACES / f"{name}.txt").read_text().splitlines():
        if text.startswith("#"):
            continue
        who, request, *words = text.split()
        values = {k: int(v, 0) for k, v in (w.split("=") for w in words if "=" in w)}
        line = Line(request, "need_reply" in words, values)
        if who == "B":
            assert last is not None and last.name == request
            last.answer = line
            continue
        if last is not None:
            yield last
        last = line
    assert last is not None
    yield last


def payload(line: Line) -> bytes:
    v = line.values
    if "gpa" in v:
        return table(region(v["gpa"], v["size"], v["uva"], v["off"]))
    if "desc" in v:
        order = ("desc", "used", "avail", "log")
        return state(v["ring"], v["flags"]) + b"".join(u64(v[key]) for key in order)
    if "ring" in v:
        return state(v["ring"], v["num"]) if "num" in v else u64(v["ring"])
    if line.name == "SET_PROTOCOL_FEATURES":
        return u64(v["u64"] & OURS)
    return u64(v["u64"]) if "u64" in v else b""


def expected_answer(line: Line, offer: Offer) -> bytes | None:
    """What the front-end must get: what it got then, but for what is ours to say."""
    own = {
        "GET_FEATURES": offer.virtio,
        "GET_PROTOCOL_FEATURES": offer.protocol,
        "GET_QUEUE_NUM": offer.queue_pairs,
    }
    if line.name in own:
        return reply(line.name, u64(own[line.name]))
    if line.answer is None:
        # One ack is missing from a trace: the relay that added BACKEND_REQ kept it for itself.
        return reply(line.name, u64(0)) if line.need_reply else None
    if line.name == "GET_VRING_BASE":
        return reply(line.name, state(line.answer.values["ring"], line.answer.values["num"]))
    return reply(line.name, u64(line.answer.values["u64"]))


def replay(said: Conversation, lines: list[Line]) -> list[str]:
    """Say it all; returns the sets of working rings in order."""
    history: list[str] = []
    for line in lines:
        fds = []
        if line.values.get("fds"):
            size = line.values.get("size", 0) + line.values.get("off", 0)
            fds = [said.fds.new(size or None)]
        if line.name == "GET_VRING_BASE":
            assert line.answer is not None
            said.bases[line.values["ring"]] = line.answer.values["num"]
        said.says_message(message(line.name, payload(line), line.need_reply), *fds)
        for effect in said.listens():
            assert not isinstance(effect, Nack | Close | RingRefused | Log), (line, effect)
            assert not isinstance(effect, Ack) or effect.ok
        answer = expected_answer(line, said.session.offer)
        assert said.sent == ([] if answer is None else [answer]), line
        if line.name == "SET_VRING_KICK":
            ring = said.worker[line.values["ring"]]
            assert ring.base == said.ring(ring.index).base and ring.num == 256
        working = "".join(map(str, sorted(said.working))) or "-"
        if not history or history[-1] != working:
            history.append(working)
    return history


def conversation(name: str, lines: list[Line]) -> Conversation:
    pairs, _ = EXPECTED[name]
    first = next(line for line in lines if line.name == "GET_FEATURES")
    assert first.answer is not None
    return Conversation(Offer(first.answer.values["u64"] & ~LOG_ALL, pairs))


def test_every_trace_is_replayed() -> None:
    assert {path.stem for path in TRACES.glob("*.txt")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_recorded_front_end_is_served(name: str) -> None:
    lines = list(read(name))
    said = conversation(name, lines)
    assert " ".join(replay(said, lines)) == EXPECTED[name][1]
    said.hangs_up().listens()
    assert said.fds.open == {} and said.worker == {} and said.mapped == ()


@pytest.mark.parametrize("name", EXPECTED)
def test_the_guest_reboots_on_the_same_connection(name: str) -> None:
    """All that belongs to a driver comes again, also from one that never stopped its rings."""
    lines = list(read(name))
    said = conversation(name, lines)
    first = replay(said, lines)
    starts = next(i for i, line in enumerate(lines) if line.name == "SET_FEATURES")
    # What GET_STATUS answered belongs to the first boot.
    boot = [line for line in lines[starts:] if line.name != "GET_STATUS"]
    second = replay(said, boot)
    assert second[-1] == first[-1]
    assert max(second, key=len) == max(first, key=len)
    open_now = len(said.fds.open)
    replay(said, boot)
    assert len(said.fds.open) == open_now, "a boot leaves no descriptor behind"


@pytest.mark.parametrize("name", EXPECTED)
def test_the_front_end_dies_after_every_message(name: str) -> None:
    lines = list(read(name))
    for count in range(1, len(lines)):
        said = conversation(name, lines)
        replay(said, lines[:count])
        said.hangs_up().listens()
        assert said.fds.open == {} and said.worker == {} and said.mapped == ()
