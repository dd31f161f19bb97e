"""What a network card does for its driver, in software: segmentation and checksums.

`lower` turns a frame and its virtio-net header into the frames that would be on a cable: large ones
cut, unfinished checksums finished. So a test can let a guest's stack say the same with any set of
features (what they do not allow is done here first, as a kernel does), and compare what the guest
is given with any other set. Shares nothing with the product (virtio 1.3 5.1.6, RFC 9293, RFC 768,
RFC 3168 6.1.2 for CWR in a cut segment).
"""

from __future__ import annotations

import struct
from dataclasses import replace

from driver import CSUM, HOST_TSO4, HOST_TSO6, HOST_USO
from packets import (
    FIN,
    GSO_ECN,
    GSO_TCP4,
    GSO_TCP6,
    GSO_UDP_L4,
    IP4,
    NEEDS_CSUM,
    PSH,
    TCP,
    VnetHeader,
    checksum,
    folded,
    pseudo,
)

CWR = 128
ETHER = 14
HOST_ECN = 1 << 13
TAKES = {GSO_TCP4: HOST_TSO4, GSO_TCP6: HOST_TSO6, GSO_UDP_L4: HOST_USO}
Sent = tuple[VnetHeader, bytes]


def lower(header: VnetHeader, frame: bytes, features: int = 0) -> list[Sent]:
    """`frame` as one or more that need no more of the other side than `features` (CSUM and the HOST
    ones) allow; without any, as they would be on a cable.
    """
    pieces = [(header, frame)]
    kind, ecn = header.gso_type & ~GSO_ECN, header.gso_type & GSO_ECN
    if kind and not (features & TAKES[kind] and (features & HOST_ECN or not ecn)):
        plain = replace(header, gso_type=0, gso_size=0, hdr_len=0)
        pieces = [(plain, piece) for piece in _cut(frame, header.gso_size)]
    return pieces if features & CSUM else [_finish(*piece) for piece in pieces]


def _places(frame: bytes) -> tuple[int, int, int]:
    """(protocol, offset of its header, offset of its payload); the frame is a well-formed one."""
    four = frame[12:14] == IP4.to_bytes(2, "big")
    proto, l4 = (frame[23], 34) if four else (frame[20], 54)
    return proto, l4, l4 + ((frame[l4 + 12] >> 4) * 4 if proto == TCP else 8)


def _cut(frame: bytes, size: int) -> list[bytes]:
    """Segments of `size` bytes of payload, the last perhaps shorter; L4 checksums stay partial."""
    proto, l4, start = _places(frame)
    payload, pieces = frame[start:], []
    for at in range(0, max(len(payload), 1), size):
        head, part = bytearray(frame[:start]), payload[at : at + size]
        if proto == TCP:
            (seq,) = struct.unpack_from(">I", head, l4 + 4)
            struct.pack_into(">I", head, l4 + 4, (seq + at) & 0xFFFFFFFF)
            head[l4 + 13] &= ~CWR if at else 0xFF
            head[l4 + 13] &= 0xFF if at + size >= len(payload) else ~(FIN | PSH)
        else:
            struct.pack_into(">H", head, l4 + 4, 8 + len(part))
        _set_ip_length(head, start - l4 + len(part))
        field = l4 + (16 if proto == TCP else 6)
        partial = folded(_pseudo_of(head, start - l4 + len(part)))
        struct.pack_into(">H", head, field, partial)
        pieces.append(bytes(head) + part)
    return pieces


def _set_ip_length(head: bytearray, l4_bytes: int) -> None:
    if head[12:14] == IP4.to_bytes(2, "big"):
        struct.pack_into(">H", head, ETHER + 2, 20 + l4_bytes)
        struct.pack_into(">H", head, ETHER + 10, 0)
        struct.pack_into(">H", head, ETHER + 10, checksum(bytes(head[ETHER : ETHER + 20])))
    else:
        struct.pack_into(">H", head, ETHER + 4, l4_bytes)


def _pseudo_of(frame: bytes | bytearray, l4_bytes: int) -> bytes:
    proto, l4, _ = _places(bytes(frame))
    size = 4 if l4 == 34 else 16
    src, dst = bytes(frame[l4 - 2 * size : l4 - size]), bytes(frame[l4 - size : l4])
    return pseudo(src, dst, proto, l4_bytes)


def _finish(header: VnetHeader, frame: bytes) -> Sent:
    """The sum over everything from csum_start on, the field itself included (virtio 5.1.6.2)."""
    if header.flags & NEEDS_CSUM:
        at = header.csum_start + header.csum_offset
        value = checksum(frame[header.csum_start : _end(frame)]) or 0xFFFF
        frame = frame[:at] + struct.pack(">H", value) + frame[at + 2 :]
    return replace(header, flags=0, csum_start=0, csum_offset=0), frame


def _end(frame: bytes) -> int:
    """Where the IP packet ends and padding begins."""
    if frame[12:14] == IP4.to_bytes(2, "big"):
        return ETHER + int(struct.unpack_from(">H", frame, ETHER + 2)[0])
    return ETHER + 40 + int(struct.unpack_from(">H", frame, ETHER + 4)[0])
