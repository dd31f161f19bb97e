"""The tests' own packets against scapy, and the parser against frames a guest would refuse.

Everything else in the protocol tests rests on `packets`; here a third party looks at what it
builds.
"""

from __future__ import annotations

import struct
from typing import Any

import packets as pk
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

ETH = (pk.mac("52:54:00:00:00:01"), pk.mac("52:54:00:00:00:02"))
v4 = st.binary(min_size=4, max_size=4)
v6 = st.binary(min_size=16, max_size=16)
addresses = st.one_of(st.tuples(v4, v4), st.tuples(v6, v6))
ports = st.integers(0, 65535)
words = st.integers(0, 0xFFFFFFFF)
payloads = st.binary(max_size=200)


def padded(frame: bytes) -> bytes:
    return frame.ljust(60, b"\0")


@given(addresses, ports, ports, payloads)
def test_udp_is_what_scapy_makes(pair: tuple, sport: int, dport: int, payload: bytes) -> None:
    src, dst = pair
    frame = pk.ip_frame(
        ETH, pk.ip_packet(src, dst, pk.UDP, pk.udp(src, dst, sport, dport, payload))
    )
    ends: dict[str, Any] = {"src": pk.text(src), "dst": pk.text(dst)}
    ip = IP(flags="DF", id=0, **ends) if len(src) == 4 else IPv6(hlim=64, **ends)
    assert frame[14:] == bytes(ip / UDP(sport=sport, dport=dport) / payload)
    parsed = pk.parse(padded(frame))
    assert (parsed.src, parsed.dst, parsed.sport, parsed.dport) == (src, dst, sport, dport)
    assert parsed.payload == payload


@given(addresses, words, words, st.integers(0, 63), st.integers(0, 65535), payloads)
def test_tcp_is_what_scapy_makes(
    pair: tuple, seq: int, ack: int, flags: int, window: int, payload: bytes
) -> None:
    src, dst = pair
    body = pk.tcp(
        src,
        dst,
        80,
        4000,
        seq=seq,
        ack=ack,
        flags=flags,
        window=window,
        options=pk.tcp_options(1400, 7),
        payload=payload,
    )
    frame = pk.ip_frame(ETH, pk.ip_packet(src, dst, pk.TCP, body))
    again = Ether(frame)
    del again[TCP].chksum
    assert bytes(again) == frame, "scapy computes another checksum"
    assert dict(again[TCP].options[:1])["MSS"] == 1400
    parsed = pk.parse(padded(frame))
    assert (parsed.seq, parsed.ack, parsed.flags, parsed.window) == (seq, ack, flags, window)
    assert (parsed.mss, parsed.wscale, parsed.payload) == (1400, 7, payload)


def test_icmp_is_what_scapy_makes() -> None:
    rest = struct.pack(">HH", 7, 9) + b"abc"
    assert pk.icmp(8, 0, rest) == bytes(ICMP(type=8, id=7, seq=9) / b"abc")


def good(csum: str = "full") -> bytes:
    src, dst = pk.ip("192.0.2.1"), pk.ip("192.0.2.2")
    body = pk.tcp(src, dst, 1, 2, seq=3, payload=b"x" * 100, csum=csum)
    return pk.ip_frame(ETH, pk.ipv4(src, dst, pk.TCP, body))


@given(st.integers(12, 153).filter(lambda at: at != 23), st.integers(1, 255))
def test_any_changed_byte_is_noticed(at: int, change: int) -> None:
    """Each byte behind the MAC addresses is under some check: type, length, checksum."""
    frame = bytearray(good())
    frame[at] ^= change
    with pytest.raises((pk.BadFrame, struct.error, IndexError)):
        pk.parse(bytes(frame))


@pytest.mark.parametrize(
    "header",
    [
        pk.VnetHeader(),
        pk.VnetHeader(flags=1, csum_start=34, csum_offset=6),
        pk.VnetHeader(flags=1, csum_start=14, csum_offset=16),
        pk.VnetHeader(flags=1, gso_type=4, gso_size=50, csum_start=34, csum_offset=16),
        pk.VnetHeader(flags=1, gso_type=1, gso_size=0, csum_start=34, csum_offset=16),
        pk.VnetHeader(flags=2, gso_type=1, gso_size=50),
        pk.VnetHeader(flags=1, gso_type=1, gso_size=50, hdr_len=999, csum_start=34, csum_offset=16),
    ],
)
def test_header_that_contradicts_its_frame(header: pk.VnetHeader) -> None:
    """A partial checksum under the wrong virtio-net header."""
    frame = good("partial")
    pk.parse(frame, pk.needs_csum(frame))
    pk.parse(frame, pk.needs_csum(frame, gso_size=50))
    with pytest.raises(pk.BadFrame):
        pk.parse(frame, header)
