"""What only a network device's front-end says: the MTU of the guest's device, and that the guest
has moved."""

from __future__ import annotations

import pytest
from conversation import reply, started, talk, u64

from control.effects import Ack, Announce, Close, MtuChanged, Nack


@pytest.mark.parametrize("mtu", [68, 1280, 1500, 65520, 65535])
def test_an_mtu_is_accepted(mtu: int) -> None:
    """Every MTU that virtio allows (1.3, 5.1.4.1): the answer is 0, if one is due at all."""
    said = talk(acks=True)
    said.says("NET_SET_MTU", u64(mtu), need_reply=True).hears(MtuChanged(mtu), Ack(20))
    assert said.sent == [reply("NET_SET_MTU", u64(0))]
    said.says("NET_SET_MTU", u64(mtu)).hears(MtuChanged(mtu))
    assert said.sent == []
    talk().says("NET_SET_MTU", u64(mtu), need_reply=True).hears(MtuChanged(mtu))


@pytest.mark.parametrize("mtu", [0, 67, 65536, 2**32 + 1500, 2**63, 2**64 - 1])
def test_an_mtu_that_no_device_has(mtu: int) -> None:
    """Not 0 where an answer is due, and all goes on; else the front-end cannot be told but so."""
    said = started(acks=True)
    said.says("NET_SET_MTU", u64(mtu), need_reply=True)
    (nack,) = said.listens()
    assert isinstance(nack, Nack) and nack.reason.endswith(f"MTU {mtu} is not within 68 to 65535")
    assert said.sent == [reply("NET_SET_MTU", u64(1))] and said.working == {0, 1}
    said = talk()
    said.says("NET_SET_MTU", u64(mtu)).hears(
        Close(f"NET_SET_MTU: MTU {mtu} is not within 68 to 65535")
    )


@pytest.mark.parametrize("mac", ["525400123456", "000000000000", "ffffffffffff"])
def test_rarp(mac: str) -> None:
    """Nobody has to be told where the guest is now: accepted at any time, and nothing changes."""
    payload = bytes.fromhex(mac) + b"\0\0"
    announce = Announce(bytes.fromhex(mac))
    talk().says("SEND_RARP", payload, need_reply=True).hears(announce)
    said = started(acks=True)
    before = said.session.device.rings
    said.says("SEND_RARP", payload, need_reply=True).hears(announce, Ack(19))
    assert said.sent == [reply("SEND_RARP", u64(0))] and said.session.device.rings == before
    said.says("SEND_RARP", payload).hears(announce)
    assert said.sent == []


@pytest.mark.parametrize("name", ["SEND_RARP", "NET_SET_MTU"])
def test_rarp_and_mtu_that_are_malformed(name: str) -> None:
    for payload in (b"", bytes(7), bytes(9), u64(1500) * 2):
        said = talk(acks=True)
        said.says(name, payload, need_reply=True)
        (nack,) = said.listens()
        assert isinstance(nack, Nack) and f"{len(payload)} bytes" in nack.reason
    said = talk(acks=True)
    said.says(name, u64(1500), said.fds.new(), need_reply=True)
    (nack,) = said.listens()
    assert isinstance(nack, Nack) and "1 descriptors" in nack.reason and not said.fds.open
