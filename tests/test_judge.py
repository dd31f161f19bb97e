"""The judge of frames against frames that break one promise each, and `lower` against scapy."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import packets as pk
import pytest
from driver import CSUM, GUEST_CSUM, GUEST_TSO4, GUEST_TSO6, GUEST_USO4, GUEST_USO6, MRG_RXBUF
from judge import GUEST_ECN, NEEDS, Judge, Stream, agreed
from offload import CWR, TAKES, lower
from packets import BadFrame
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

ETH = (pk.mac("52:54:00:00:00:01"), pk.mac("52:54:00:00:00:02"))
ENDS = {4: (pk.ip("192.0.2.1"), pk.ip("192.0.2.2")), 6: (pk.ip("2001:db8::1"), pk.ip("fd00::2"))}
GUEST_GSO = GUEST_TSO4 | GUEST_TSO6 | GUEST_USO4 | GUEST_USO6
EVERY = MRG_RXBUF | GUEST_CSUM | GUEST_GSO | GUEST_ECN
MSS = {4: 1460, 16: 1440}
families = pytest.mark.parametrize("family", [4, 6])


def segment(family: int, size: int, *, gso: int = 0, csum: str = "partial", **how: Any) -> tuple:
    """(header, frame) of a TCP segment."""
    src, dst = ENDS[family]
    payload = (bytes(range(250)) * 40)[:size]
    body = pk.tcp(src, dst, 80, 4000, seq=2**32 - 700, payload=payload, csum=csum, **how)
    return framed(family, pk.TCP, body, gso, csum)


def datagram(family: int, size: int, *, gso: int = 0, csum: str = "partial") -> tuple:
    """(header, frame) of a UDP datagram."""
    src, dst = ENDS[family]
    payload = (bytes(range(250)) * 40)[:size]
    return framed(family, pk.UDP, pk.udp(src, dst, 53, 4000, payload, csum=csum), gso, csum)


def framed(family: int, proto: int, body: bytes, gso: int, csum: str) -> tuple:
    frame = pk.ip_frame(ETH, pk.ip_packet(*ENDS[family], proto, body)).ljust(60, b"\0")
    header = pk.needs_csum(frame, gso_size=gso) if csum == "partial" else pk.PLAIN
    return replace(header, num_buffers=1), frame


def changed(frame: bytes, at: int, value: int) -> bytes:
    """With one byte changed, and the IPv4 header checksum right again."""
    frame = frame[:at] + bytes((value,)) + frame[at + 1 :]
    if 14 <= at < 34 and frame[12:14] == b"\x08\0":
        head = frame[14:24] + b"\0\0" + frame[26:34]
        frame = frame[:24] + struct.pack(">H", pk.checksum(head)) + frame[26:]
    return frame


@families
@pytest.mark.parametrize("features", [EVERY, MRG_RXBUF | GUEST_CSUM, 0])
def test_good_frames(family: int, features: int) -> None:
    csum = "partial" if features & GUEST_CSUM else "full"
    judge = Judge(features, MSS)
    for make in (segment, datagram):
        for size in (0, 1, 1440):
            judge.look(*make(family, size, csum=csum))
        if features == EVERY:
            judge.look(*make(family, 5000, gso=1000))


HEADERS: dict[str, dict[str, Any]] = {
    "unknown flag": {"flags": 4 | 1},
    "no flag over a partial sum": {"flags": 0, "csum_start": 0, "csum_offset": 0},
    "a start without NEEDS_CSUM": {"flags": pk.DATA_VALID},
    "start": {"csum_start": 14},
    "offset": {"csum_offset": 4},
    "GSO without a size": {"gso_size": 0},
    "GSO of the other family": {"gso_type": 3},
    "hdr_len too short": {"hdr_len": 53},
    "hdr_len too long": {"hdr_len": 66},
    "hdr_len beyond": {"hdr_len": 6000},
    "above the MSS": {"gso_size": 1461},
    "for one segment": {"gso_size": 5000},
    "ECN without CWR": {"gso_type": pk.GSO_TCP4 | pk.GSO_ECN},
    "a size without GSO": {"gso_type": 0},
}


@pytest.mark.parametrize("name", HEADERS)
def test_bad_headers(name: str) -> None:
    header, frame = segment(4, 5000, gso=1000)
    Judge(EVERY, MSS).look(header, frame)
    with pytest.raises(BadFrame):
        Judge(EVERY, MSS).look(replace(header, **HEADERS[name]), frame)


@families
@pytest.mark.parametrize("make", [segment, datagram])
def test_what_was_not_agreed_on(family: int, make: Any) -> None:
    tso, uso = {4: (GUEST_TSO4, GUEST_USO4), 6: (GUEST_TSO6, GUEST_USO6)}[family]
    large, small = make(family, 5000, gso=1000), make(family, 100)
    for features, sent in (
        (EVERY & ~(tso if make is segment else uso), large),
        (EVERY & ~GUEST_CSUM, small),
        (EVERY & ~MRG_RXBUF, (replace(small[0], num_buffers=2), small[1])),
    ):
        Judge(EVERY, MSS).look(*sent)
        with pytest.raises(BadFrame):
            Judge(features, MSS).look(*sent)
    header, frame = segment(family, 5000, gso=1000, flags=pk.ACK | CWR)
    header = replace(header, gso_type=header.gso_type | pk.GSO_ECN)
    Judge(EVERY, MSS).look(header, frame)
    with pytest.raises(BadFrame):
        Judge(EVERY & ~GUEST_ECN, MSS).look(header, frame)


@pytest.mark.parametrize(
    ("at", "value"),
    [(14, 0x46), (20, 0xC0), (20, 0x20), (22, 0), (46, 0x5F), (53, 1), (47, pk.SYN | pk.FIN)],
)
def test_bad_fields(at: int, value: int) -> None:
    """IP options, reserved flag, a fragment, TTL, reserved TCP bits, urgent pointer, SYN+FIN."""
    header, frame = segment(4, 100)
    with pytest.raises(BadFrame):
        Judge(EVERY, MSS).look(header, changed(frame, at, value))


@families
def test_length_of_a_train(family: int) -> None:
    """The kernel would cut off what is beyond the UDP header's length."""
    header, frame = datagram(family, 5000, gso=1000)
    at = 38 if family == 4 else 58
    with pytest.raises(BadFrame):
        Judge(EVERY, MSS).look(header, frame[:at] + b"\x03\xf0" + frame[at + 2 :])


@families
def test_bad_contents(family: int) -> None:
    """Bytes that a complete checksum covers; sizes; padding; no checksum at all."""
    judge = Judge(0, MSS)
    for make in (segment, datagram):
        header, frame = make(family, 100, csum="full")
        for at in range(26 if family == 4 else 22, len(frame)):
            with pytest.raises(BadFrame):
                judge.look(header, changed(frame, at, frame[at] ^ 1))
    small = datagram(family, 1, csum="full")[1]
    for frame in (
        segment(family, MSS[len(ENDS[family][0])] + 1, csum="full")[1],
        small[:-1] + b"\1",
        changed(changed(small, 40 if family == 4 else 60, 0), 41 if family == 4 else 61, 0),
    ):
        with pytest.raises(BadFrame):
            judge.look(replace(pk.PLAIN, num_buffers=1), frame)
    with pytest.raises(BadFrame):
        Judge(0, MSS, mtu=1400).look(*datagram(family, 1400, csum="full"))


@families
@pytest.mark.parametrize("make", [segment, datagram])
@pytest.mark.parametrize(("size", "gso"), [(5000, 1000), (2001, 1000), (999, 0), (0, 0)])
def test_lowered_frames_are_what_scapy_makes(family: int, make: Any, size: int, gso: int) -> None:
    """Cut and finished: lengths and checksums as scapy computes them, payload and order kept."""
    header, frame = make(family, size, gso=gso)
    payload, kind = b"", TCP if make is segment else UDP
    pieces = lower(header, frame)
    assert len(pieces) == max(1, -(-size // (gso or 10_000)))
    for plain, piece in pieces:
        assert (plain.flags, plain.gso_type) == (0, 0)
        parsed = Ether(piece)
        if kind is TCP:
            assert parsed[TCP].seq == (2**32 - 700 + len(payload)) % 2**32
        payload += pk.parse(piece.ljust(60, b"\0"), plain).payload
        for layer, names in ((IP, ("len", "chksum")), (IPv6, ("plen",)), (kind, ("chksum",))):
            for name in names if layer in parsed else ():
                delattr(parsed[layer], name)
        assert bytes(parsed) == piece
    assert payload == (bytes(range(250)) * 40)[:size]


@pytest.mark.parametrize("features", [0, CSUM, *(CSUM | bit for bit in TAKES.values())])
def test_lowered_as_far_as_needed(features: int) -> None:
    for family in (4, 6):
        for make in (segment, datagram):
            header, frame = make(family, 5000, gso=1000)
            done = lower(header, frame, features)
            whole = features & TAKES[header.gso_type]
            assert (done == [(header, frame)]) == bool(whole)
            assert {one.flags for one, _ in done} == {1 if features & CSUM else 0}


def test_stream() -> None:
    """Out of order and again is fine; with other contents, with a hole or without an end is not."""

    def packet(at: int, data: bytes, flags: int = pk.ACK) -> pk.Packet:
        return pk.Packet(seq=(2**32 - 3 + at) % 2**32, flags=flags, payload=data)

    good = [packet(0, b"", pk.SYN), packet(4, b"def"), packet(1, b"abcd"), packet(4, b"defg")]
    end = packet(8, b"", pk.FIN)
    stream = Stream()
    for one in (*good, end):
        stream.add(one)
    assert stream.whole() == b"abcdefg"
    for wrong in (packet(2, b"X"), packet(9, b"", pk.FIN), packet(1, b"", pk.SYN)):
        with pytest.raises(BadFrame):
            stream.add(wrong)
    for missing in (good, [*good[:2], end], [*good, packet(9, b"", pk.FIN)]):
        part = Stream()
        for one in missing:
            part.add(one)
        with pytest.raises(BadFrame):
            part.whole()


def test_agreed() -> None:
    """Every subset: nothing stays whose needs are gone, nothing else goes."""
    bits = [*NEEDS, CSUM, GUEST_CSUM, MRG_RXBUF]
    for number in range(1 << len(bits)):
        features = sum(bit for at, bit in enumerate(bits) if number >> at & 1)
        left = agreed(features)
        for bit in bits:
            assert bool(left & bit) == bool(features & bit and left & NEEDS.get(bit, bit))
