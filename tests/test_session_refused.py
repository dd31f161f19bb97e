"""vhost-user messages that cannot be honoured: a NACK where one can be sent, else the end.

Never an exception, never a descriptor left open, never a state half changed.
"""

from __future__ import annotations

import pytest
from conversation import (
    FEATURES,
    NO_FD,
    NUMBERS,
    REPLY_ACK,
    SPLIT,
    Conversation,
    addr,
    region,
    reply,
    single,
    started,
    state,
    talk,
    u64,
)

from control import vhost_user as vu
from control.effects import Close, MemoryChanged, Nack, RingStop
from control.session import Offer


@pytest.mark.parametrize(
    ("name", "payload", "answer"),
    [
        ("IOTLB_MSG", bytes(32), u64(1)),
        ("GET_CONFIG", bytes(24), b""),
        ("SET_DEVICE_STATE_FD", bytes(8), u64(0x101)),
        ("CHECK_DEVICE_STATE", b"", u64(1)),
    ],
)
def test_requests_not_served_get_the_error_reply_they_have(
    name: str, payload: bytes, answer: bytes
) -> None:
    said = talk()
    fd = said.fds.new()
    said.says(name, payload, fd).hears(
        Nack(NUMBERS[name], f"{name}: not served", reply(name, answer))
    )
    assert said.fds.open == {}


@pytest.mark.parametrize("name", ["SET_LOG_BASE", "SET_LOG_FD", "SET_CONFIG", 77, 0, 2**32 - 1])
def test_requests_not_served_are_nacked_where_that_was_agreed_and_close_else(
    name: str | int,
) -> None:
    said = talk(acks=True)
    said.says(name, bytes(16), said.fds.new(), need_reply=True)
    (nack,) = said.listens()
    assert isinstance(nack, Nack) and nack.reason.endswith("not served")
    assert nack.data[4:] == reply("GET_FEATURES", u64(1))[4:]
    said.says("GET_FEATURES").listens()
    said.says(name, bytes(16), said.fds.new())
    (close,) = said.listens()
    assert isinstance(close, Close) and close.reason == nack.reason
    assert said.fds.open == {}


@pytest.mark.parametrize("name", ["GET_INFLIGHT_FD", "POSTCOPY_ADVISE"])
def test_requests_that_wait_for_more_than_a_number_close_the_session(name: str) -> None:
    said = talk(acks=True)
    said.says(name, need_reply=True).hears(Close(f"{name}: not served"))


def test_requests_of_a_protocol_feature_that_was_not_offered_are_refused() -> None:
    said = Conversation(Offer(FEATURES, 1, protocol_features=REPLY_ACK))
    said.says("SET_PROTOCOL_FEATURES", u64(REPLY_ACK)).hears()
    lines = {
        "SEND_RARP": u64(0),
        "NET_SET_MTU": u64(1500),
        "SET_BACKEND_REQ_FD": b"",
        "RESET_DEVICE": b"",
        "ADD_MEM_REG": single(region()),
        "REM_MEM_REG": single(region()),
        "SET_STATUS": u64(0),
    }
    for name, payload in lines.items():
        said.says(name, payload, need_reply=True)
        (nack,) = said.listens()
        assert isinstance(nack, Nack) and "is not offered" in nack.reason
    said.says("GET_MAX_MEM_SLOTS", need_reply=True).hears(
        Close("GET_MAX_MEM_SLOTS: protocol feature CONFIGURE_MEM_SLOTS is not offered")
    )


@pytest.mark.parametrize(
    "name",
    ["SET_VRING_NUM", "SET_VRING_ADDR", "SET_VRING_BASE", "SET_VRING_ENABLE", "SET_VRING_CALL"],
)
@pytest.mark.parametrize("index", [2, 5, 200])
def test_a_ring_that_does_not_exist(name: str, index: int) -> None:
    said = talk(acks=True)
    payload = {"SET_VRING_ADDR": addr(index), "SET_VRING_CALL": u64(index)}
    fds = [said.fds.new()] if name == "SET_VRING_CALL" else []
    said.says(name, payload.get(name, state(index, 1)), *fds, need_reply=True)
    (nack,) = said.listens()
    assert isinstance(nack, Nack) and f"ring {index} of 2" in nack.reason
    said.says("GET_VRING_BASE", state(index, 0), need_reply=True).hears(
        Close(f"GET_VRING_BASE: ring {index} of 2")
    )
    assert said.fds.open == {}


@pytest.mark.parametrize(
    ("name", "payload", "descriptors"),
    [
        ("SET_VRING_NUM", state(0, 0), 0),
        ("SET_VRING_NUM", state(0, 32769), 0),
        ("SET_VRING_ENABLE", state(0, 2), 0),
        ("SET_VRING_ADDR", addr(0, flags=1), 0),
        ("SET_VRING_KICK", u64(0), 0),
        ("SET_VRING_KICK", u64(0), 2),
        ("SET_VRING_CALL", u64(NO_FD), 1),
        ("SET_VRING_ERR", u64(0x200), 1),
        ("SET_BACKEND_REQ_FD", b"", 0),
        ("SET_BACKEND_REQ_FD", b"", 2),
        ("SET_OWNER", b"", 1),
        ("SET_OWNER", b"x", 0),
        ("SET_FEATURES", bytes(7), 0),
        ("SET_FEATURES", u64(SPLIT), 8),
        ("REM_MEM_REG", single(region()), 2),
    ],
)
def test_malformed_messages_change_nothing(name: str, payload: bytes, descriptors: int) -> None:
    said = started(acks=True)
    before = list(said.session.device.rings), said.session.device.memory, set(said.fds.open)
    surplus = [said.fds.new() for _ in range(descriptors)]
    said.says(name, payload, *surplus, need_reply=True)
    (nack,) = said.listens()
    assert isinstance(nack, Nack) and nack.reason.startswith(f"{name}: ")
    after = list(said.session.device.rings), said.session.device.memory, set(said.fds.open)
    assert after == before
    said.says(name, payload, *(said.fds.new() for _ in range(descriptors)))
    *rest, close = said.listens()
    assert rest == [RingStop(0), RingStop(1), MemoryChanged()]
    assert close == Close(nack.reason) and said.fds.open == {}


@pytest.mark.parametrize(
    "header", [vu.Header(1, 0, 0), vu.Header(1, 5, 0), vu.Header(5, 9, 5000), vu.Header(3, 1, 4)]
)
def test_a_stream_that_cannot_be_trusted_is_closed(header: vu.Header) -> None:
    said = started(acks=True)
    said.says_message(vu.Message(header))
    *rest, close = said.listens()
    assert rest == [RingStop(0), RingStop(1), MemoryChanged()] and isinstance(close, Close)
    assert said.fds.open == {}
