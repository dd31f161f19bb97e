"""The guest's side of the bargain, frame by frame: what a device with these features may deliver.

`Judge` looks at raw frames with their virtio-net headers, as they lie in the receive buffers, and
raises `BadFrame` for each promise broken. On top of `packets.parse` (checksums complete or partial
exactly as the header says, lengths, no fragments) it knows

    features    which flags and GSO types the guest has agreed to (virtio 1.3 5.1.6.4.1), for IPv4
                and IPv6 apart, and GSO_ECN
    sizes       MSS and MTU, of a segment or of each one a GSO frame stands for; hdr_len as exact as
                GUEST_HDRLEN wants it; at most 128 datagrams in a train (Linux's UDP_MAX_SEGMENTS)
    headers     no IP options, a TTL, reserved bits and unused fields zero, padding zero

`Stream` puts one direction of a TCP connection together again from such frames, with no regard for
what the guest's own stack made of them. `agreed` is what remains of a set of feature bits when
those go that lack what they need (virtio 1.3 5.1.3.1).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

import packets as pk
from driver import (
    CSUM,
    GUEST_CSUM,
    GUEST_TSO4,
    GUEST_TSO6,
    GUEST_USO4,
    GUEST_USO6,
    HOST_TSO4,
    HOST_TSO6,
    HOST_USO,
    MRG_RXBUF,
)
from packets import BadFrame, Packet, VnetHeader

GUEST_ECN, HOST_ECN = 1 << 9, 1 << 13
NEEDS = {
    GUEST_TSO4: GUEST_CSUM,
    GUEST_TSO6: GUEST_CSUM,
    GUEST_USO4: GUEST_CSUM,
    GUEST_USO6: GUEST_CSUM,
    GUEST_ECN: GUEST_TSO4 | GUEST_TSO6,
    HOST_TSO4: CSUM,
    HOST_TSO6: CSUM,
    HOST_USO: CSUM,
    HOST_ECN: HOST_TSO4 | HOST_TSO6,
}
GSO_NEEDS = {
    (pk.GSO_TCP4, 4): GUEST_TSO4,
    (pk.GSO_TCP6, 16): GUEST_TSO6,
    (pk.GSO_UDP_L4, 4): GUEST_USO4,
    (pk.GSO_UDP_L4, 16): GUEST_USO6,
}
TRAIN_MAX = 128
CWR, RESERVED = 128, 0x0F
WRAP = 1 << 32


def agreed(features: int) -> int:
    """`features` without those of which every one they could rest on is missing."""
    for feature, needed in NEEDS.items():  # what is needed comes first
        if not features & needed:
            features &= ~feature
    return features


class Judge:
    """What a guest with these features may be given; `mss` by address length, `mtu` of its link.
    `raw`: headers are as the device wrote them; a kernel's own hdr_len tells of its buffers.
    """

    def __init__(
        self, features: int, mss: Mapping[int, int], mtu: int = 65520, *, raw: bool = True
    ) -> None:
        self.features, self.mss, self.mtu, self.raw = features, mss, mtu, raw

    def look(self, header: VnetHeader, frame: bytes) -> Packet:
        """The frame's fields, or `BadFrame`."""
        packet = pk.parse(frame, header)
        try:
            self._virtio(header, packet)
            end = self._headers(frame, packet)
            self._sizes(header, packet, end)
            _require(not any(frame[end:]), f"padding of {frame[end:].hex()}")
        except BadFrame as wrong:
            raise BadFrame(f"{wrong}: {header} {packet}") from None
        return packet

    def _virtio(self, header: VnetHeader, packet: Packet) -> None:
        known = pk.NEEDS_CSUM | pk.DATA_VALID
        _require(header.flags in (0, pk.NEEDS_CSUM, pk.DATA_VALID, known), "unknown flags")
        _require(not header.flags or bool(self.features & GUEST_CSUM), "flags without GUEST_CSUM")
        if not header.flags & pk.NEEDS_CSUM:
            _require(header.csum_start == header.csum_offset == 0, "csum_start without NEEDS_CSUM")
        merged = self.features & MRG_RXBUF
        _require(header.num_buffers == 1 or bool(merged), "num_buffers without MRG_RXBUF")
        kind = header.gso_type & ~pk.GSO_ECN
        if kind == pk.GSO_NONE:
            _require(header.gso_type == header.gso_size == 0, "GSO fields of a frame without GSO")
            return
        bit = GSO_NEEDS.get((kind, len(packet.src)), 0)
        _require(bool(self.features & bit), "a GSO type that was not agreed on")
        if header.gso_type & pk.GSO_ECN:
            _require(bool(self.features & GUEST_ECN), "GSO_ECN without GUEST_ECN")
            _require(kind != pk.GSO_UDP_L4 and bool(packet.flags & CWR), "GSO_ECN without CWR")

    def _headers(self, frame: bytes, packet: Packet) -> int:
        """Checks the fields that `parse` passes over; where the packet ends."""
        if packet.ethertype == pk.ARP:
            return 14 + 28
        _require(packet.ttl > 0, "TTL 0")
        if packet.ethertype == pk.IP4:
            _require(frame[14] == 0x45, "IPv4 options")
            start, end = 34, 14 + struct.unpack_from(">H", frame, 16)[0]
            _require(not frame[20] & 0x80, "reserved IPv4 flag")
        else:
            start, end = 54, 54 + struct.unpack_from(">H", frame, 18)[0]
        if packet.proto == pk.TCP:
            self._tcp(frame[start:end], packet)
        if packet.proto == pk.UDP:
            told = struct.unpack_from(">H", frame, start + 4)[0]
            _require(told == end - start, f"UDP length {told} of {end - start}")
            summed = packet.header.flags or any(frame[start + 6 : start + 8])
            _require(bool(summed), "UDP without a checksum")
        return end

    def _tcp(self, body: bytes, packet: Packet) -> None:
        syn, fin, rst = (packet.flags & bit for bit in (pk.SYN, pk.FIN, pk.RST))
        _require(not body[12] & RESERVED, "reserved TCP bits")
        _require(not syn or not (fin or rst or packet.payload), "flags that exclude each other")
        _require(bool(syn) == (packet.mss is not None), "an MSS is for SYN, and in each")
        _require(not any(body[18:20]) or bool(packet.flags & pk.URG), "urgent pointer without URG")
        _require(bool(packet.flags & (pk.ACK | pk.SYN | pk.RST)), "a segment without ACK")

    def _sizes(self, header: VnetHeader, packet: Packet, end: int) -> None:
        payload = len(packet.payload)
        if not header.gso_type:
            _require(end - 14 <= self.mtu, f"packet of {end - 14} bytes with an MTU of {self.mtu}")
            if packet.proto == pk.TCP:
                _require(payload <= self.mss[len(packet.src)], f"segment of {payload} bytes")
            return
        headers = end - payload
        _require(
            header.hdr_len == headers or not self.raw, f"hdr_len, with headers of {headers} bytes"
        )
        _require(payload > header.gso_size, "GSO for a single segment")
        if packet.proto == pk.TCP:
            most = self.mss[len(packet.src)]
            _require(header.gso_size <= most, f"gso_size above the MSS of {most}")
        else:
            _require(headers - 14 + header.gso_size <= self.mtu, "a gso_size above the MTU")
            _require(payload <= TRAIN_MAX * header.gso_size, "a train too long")


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise BadFrame(what)


class Stream:
    """The bytes one end of a TCP connection sent, from the segments that were seen of it."""

    def __init__(self) -> None:
        self.first: int | None = None  # sequence number of the SYN
        self.data = bytearray()
        self.later: dict[int, bytes] = {}
        self.ended: int | None = None
        self.flags: set[int] = set()

    def add(self, packet: Packet) -> None:
        """One more segment, in any order, again or not; `BadFrame` if it contradicts others."""
        self.flags.add(packet.flags)
        if packet.flags & pk.SYN:
            _require(self.first in (None, packet.seq), "a SYN with another sequence number")
            self.first = packet.seq
        if self.first is None:
            raise BadFrame(f"a segment before the SYN: {packet}")
        at = (packet.seq - self.first - 1) % WRAP
        if packet.flags & pk.FIN:
            end = at + len(packet.payload)
            _require(self.ended in (None, end), f"FIN at {end}, before at {self.ended}")
            self.ended = end
        if packet.payload:
            known = bytes(self.data[at : at + len(packet.payload)])
            _require(packet.payload.startswith(known), f"byte {at} and on sent with other contents")
            self.later[at] = max(packet.payload, self.later.get(at, b""), key=len)
        while ready := [at for at in self.later if at <= len(self.data)]:
            for at in ready:
                self.data += self.later.pop(at)[len(self.data) - at :]

    def whole(self) -> bytes:
        """All of it; `BadFrame` while parts are missing or the end was not seen."""
        _require(not self.later, f"{len(self.data)} bytes, then a hole")
        _require(self.ended == len(self.data), f"{len(self.data)} bytes, the end at {self.ended}")
        return bytes(self.data)
