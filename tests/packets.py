"""Ethernet frames for the tests: a builder and a strict parser, sharing nothing with the product.

Why of its own: a test that builds packets with the code under test proves only that the code
agrees with itself. Everything here follows the RFCs directly (791, 8200, 9293, 768, 792, 4443,
826, 4861, 2131, 8415) on plain ``bytes``. Addresses are packed ``bytes`` of 4 or 16, MAC addresses
``bytes`` of 6; ``ip()`` converts from text.

The parser is the guest's kernel at its strictest: `parse` raises `BadFrame` for anything a real
guest would count as an error, and for the promises of the virtio-net header too (a NEEDS_CSUM
frame must carry exactly the pseudo-header sum, a GSO frame must be NEEDS_CSUM and longer than one
segment, and so on). A test therefore need not check them.

Checksums: ``"full"`` a finished one, ``"partial"`` the pseudo-header sum as CHECKSUM_PARTIAL
leaves it (pair it with `needs_csum`), ``"bad"`` a wrong one on purpose.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass, field

ARP, IP4, IP6 = 0x0806, 0x0800, 0x86DD
ICMP, TCP, UDP, ICMP6 = 1, 6, 17, 58
FIN, SYN, RST, PSH, ACK, URG = 1, 2, 4, 8, 16, 32
BROADCAST = b"\xff" * 6

NEEDS_CSUM, DATA_VALID = 1, 2
GSO_NONE, GSO_TCP4, GSO_UDP, GSO_TCP6, GSO_UDP_L4, GSO_ECN = 0, 1, 3, 4, 5, 0x80
VNET_HDR = struct.Struct("<BBHHHHH")
MIN_FRAME = 60


class BadFrame(AssertionError):
    """The back-end sent the guest something no guest should get."""


@dataclass(frozen=True)
class VnetHeader:
    """virtio_net_hdr_mrg_rxbuf, 12 bytes, little-endian (virtio 1.x, 5.1.6)."""

    flags: int = 0
    gso_type: int = 0
    hdr_len: int = 0
    gso_size: int = 0
    csum_start: int = 0
    csum_offset: int = 0
    num_buffers: int = 0

    def pack(self) -> bytes:
        return VNET_HDR.pack(
            self.flags,
            self.gso_type,
            self.hdr_len,
            self.gso_size,
            self.csum_start,
            self.csum_offset,
            self.num_buffers,
        )

    @classmethod
    def unpack(cls, data: bytes) -> VnetHeader:
        return cls(*VNET_HDR.unpack_from(data))


PLAIN = VnetHeader()


@dataclass
class Packet:
    """One parsed frame; fields that its protocol does not have stay at their defaults."""

    eth_dst: bytes = b""
    eth_src: bytes = b""
    ethertype: int = 0
    src: bytes = b""
    dst: bytes = b""
    proto: int = 0
    ttl: int = 0
    sport: int = 0
    dport: int = 0
    seq: int = 0
    ack: int = 0
    flags: int = 0
    window: int = 0
    mss: int | None = None
    wscale: int | None = None
    sack_permitted: bool = False
    sack: tuple[tuple[int, int], ...] = ()
    type: int = 0
    code: int = 0
    body: bytes = b""
    payload: bytes = b""
    header: VnetHeader = field(default=PLAIN)

    def __str__(self) -> str:
        return summary(self)


def ip(text: str) -> bytes:
    """Packed form of an IPv4 or IPv6 address given as text."""
    return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)


def text(address: bytes) -> str:
    """The inverse of `ip`."""
    return socket.inet_ntop(socket.AF_INET6 if len(address) == 16 else socket.AF_INET, address)


def mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def folded(data: bytes) -> int:
    """Ones' complement sum of the 16-bit words of `data` (RFC 1071), 0 only for all zero words.

    A number in base 2**16 is congruent to the sum of its digits modulo 2**16 - 1, so Python's big
    integers do it.
    """
    if len(data) & 1:
        data += b"\0"
    value = int.from_bytes(data, "big")
    return value % 0xFFFF or (0xFFFF if value else 0)


def checksum(data: bytes) -> int:
    return 0xFFFF ^ folded(data)


def pseudo(src: bytes, dst: bytes, proto: int, length: int) -> bytes:
    """Pseudo-header of TCP, UDP and ICMPv6 over either family (RFC 9293 3.1, RFC 8200 8.1)."""
    if len(src) == 4:
        return src + dst + struct.pack(">BBH", 0, proto, length)
    return src + dst + struct.pack(">II", length, proto)


# --- building -----------------------------------------------------------------------------------


def ether(dst: bytes, src: bytes, ethertype: int, body: bytes) -> bytes:
    return dst + src + struct.pack(">H", ethertype) + body


def ipv4(
    src: bytes, dst: bytes, proto: int, body: bytes, *, ttl: int = 64, ident: int = 0
) -> bytes:
    head = struct.pack(
        ">BBHHHBBH4s4s", 0x45, 0, 20 + len(body), ident, 0x4000, ttl, proto, 0, src, dst
    )
    return head[:10] + struct.pack(">H", checksum(head)) + head[12:] + body


def ipv6(src: bytes, dst: bytes, proto: int, body: bytes, *, ttl: int = 64) -> bytes:
    return struct.pack(">IHBB16s16s", 6 << 28, len(body), proto, ttl, src, dst) + body


def ip_packet(src: bytes, dst: bytes, proto: int, body: bytes, *, ttl: int = 64) -> bytes:
    """An IP packet of the family of `src` around `body`."""
    return (ipv4 if len(src) == 4 else ipv6)(src, dst, proto, body, ttl=ttl)


def ip_frame(eth: tuple[bytes, bytes], packet: bytes) -> bytes:
    """`packet` in an Ethernet frame; `eth` is (destination MAC, source MAC)."""
    return ether(eth[0], eth[1], IP4 if packet[0] >> 4 == 4 else IP6, packet)


def with_checksum(src: bytes, dst: bytes, proto: int, body: bytes, at: int, csum: str) -> bytes:
    """`body` with the checksum field at offset `at` filled in the way `csum` says."""
    head = pseudo(src, dst, proto, len(body))
    if csum == "partial":
        value = folded(head)
    else:
        value = checksum(head + body)
        if csum == "bad":
            value ^= 0x5555
        elif proto == UDP and value == 0:
            value = 0xFFFF
    return body[:at] + struct.pack(">H", value) + body[at + 2 :]


def udp(
    src: bytes, dst: bytes, sport: int, dport: int, payload: bytes, *, csum: str = "full"
) -> bytes:
    """A UDP datagram without its IP header."""
    body = struct.pack(">HHHH", sport, dport, 8 + len(payload), 0) + payload
    return with_checksum(src, dst, UDP, body, 6, csum)


def tcp_options(mss: int | None = None, wscale: int | None = None, sack: bool = False) -> bytes:
    options = b""
    if mss is not None:
        options += struct.pack(">BBH", 2, 4, mss)
    if wscale is not None:
        options += struct.pack(">BBBB", 1, 3, 3, wscale)
    if sack:
        options += b"\1\1\4\2"
    return options


def tcp(
    src: bytes,
    dst: bytes,
    sport: int,
    dport: int,
    *,
    seq: int,
    ack: int = 0,
    flags: int = ACK,
    window: int = 65535,
    options: bytes = b"",
    payload: bytes = b"",
    csum: str = "full",
) -> bytes:
    """A TCP segment without its IP header; sequence numbers are taken modulo 2**32."""
    offset = (20 + len(options)) // 4
    body = (
        struct.pack(
            ">HHIIBBHHH",
            sport,
            dport,
            seq & 0xFFFFFFFF,
            ack & 0xFFFFFFFF,
            offset << 4,
            flags,
            window,
            0,
            0,
        )
        + options
        + payload
    )
    return with_checksum(src, dst, TCP, body, 16, csum)


def needs_csum(frame: bytes, *, gso_size: int = 0) -> VnetHeader:
    """The virtio-net header for a frame whose TCP or UDP checksum is partial, with TSO or USO if
    `gso_size`.
    """
    four = frame[12:14] == b"\x08\x00"
    start = 14 + (20 if four else 40)
    is_tcp = (frame[23] if four else frame[20]) == TCP
    header_len = start + (4 * (frame[start + 12] >> 4) if is_tcp else 8)
    gso = GSO_NONE
    if gso_size:
        gso = (GSO_TCP4 if four else GSO_TCP6) if is_tcp else GSO_UDP_L4
    return VnetHeader(
        NEEDS_CSUM, gso, header_len if gso else 0, gso_size, start, 16 if is_tcp else 6
    )


def icmp(kind: int, code: int, rest: bytes) -> bytes:
    """An ICMPv4 message; `rest` is everything after the checksum."""
    body = struct.pack(">BBH", kind, code, 0) + rest
    return body[:2] + struct.pack(">H", checksum(body)) + body[4:]


def icmp6(src: bytes, dst: bytes, kind: int, code: int, rest: bytes) -> bytes:
    return with_checksum(src, dst, ICMP6, struct.pack(">BBH", kind, code, 0) + rest, 2, "full")


def arp(op: int, sha: bytes, spa: bytes, tha: bytes, tpa: bytes) -> bytes:
    """The body of an ARP packet for IPv4 over Ethernet; `op` 1 asks, 2 answers."""
    return struct.pack(">HHBBH6s4s6s4s", 1, IP4, 6, 4, op, sha, spa, tha, tpa)


def solicited_node(address: bytes) -> bytes:
    return ip("ff02::1:ff00:0")[:13] + address[13:]


def multicast_mac(group: bytes) -> bytes:
    """Ethernet address of an IPv6 multicast group (RFC 2464 7)."""
    return b"\x33\x33" + group[12:]


def dhcp(mac_address: bytes, xid: int, kind: int, options: dict[int, bytes]) -> bytes:
    """A BOOTREQUEST with the given DHCP message type and options (RFC 2131 2, RFC 2132)."""
    head = struct.pack(
        ">BBBBIHH4s4s4s4s16s64s128s", 1, 1, 6, 0, xid, 0, 0x8000, *[b""] * 4, mac_address, b"", b""
    )
    tlv = bytes((53, 1, kind))
    for code, value in options.items():
        tlv += bytes((code, len(value))) + value
    return head + b"\x63\x82\x53\x63" + tlv + b"\xff"


def dhcp_reply(payload: bytes) -> tuple[bytes, int, dict[int, bytes]]:
    """(your address, transaction id, options) of a BOOTREPLY, or `BadFrame`."""
    if len(payload) < 241 or payload[0] != 2 or payload[236:240] != b"\x63\x82\x53\x63":
        raise BadFrame(f"not a DHCP reply: {payload[:8].hex()}... of {len(payload)} bytes")
    options: dict[int, bytes] = {}
    at = 240
    while payload[at] != 255:
        if payload[at] == 0:
            at += 1
            continue
        size = payload[at + 1]
        options[payload[at]] = payload[at + 2 : at + 2 + size]
        at += 2 + size
        if at >= len(payload):
            raise BadFrame("DHCP options do not end")
    return payload[16:20], struct.unpack_from(">I", payload, 4)[0], options


# --- parsing ------------------------------------------------------------------------------------


def parse(frame: bytes, header: VnetHeader = PLAIN) -> Packet:
    """The frame's fields, after every check a guest makes; raises `BadFrame`."""
    if len(frame) < MIN_FRAME:
        raise BadFrame(f"frame of {len(frame)} bytes is shorter than Ethernet's {MIN_FRAME}")
    packet = Packet(frame[:6], frame[6:12], struct.unpack_from(">H", frame, 12)[0], header=header)
    body = frame[14:]
    if packet.ethertype == IP4:
        _parse_ipv4(packet, body)
    elif packet.ethertype == IP6:
        _parse_ipv6(packet, body)
    elif packet.ethertype == ARP:
        fields = struct.unpack_from(">HHBBH6s4s6s4s", body)
        if fields[:4] != (1, IP4, 6, 4):
            raise BadFrame(f"ARP packet of kind {fields[:4]}")
        packet.type, packet.body = fields[4], body[:28]
        packet.src, packet.dst = fields[6], fields[8]
    else:
        raise BadFrame(f"ethertype {packet.ethertype:#06x}")
    _check_vnet(packet, len(frame))
    return packet


def _parse_ipv4(packet: Packet, body: bytes) -> None:
    size, total = (body[0] & 15) * 4, struct.unpack_from(">H", body, 2)[0]
    if body[0] >> 4 != 4 or size < 20 or not size <= total <= len(body):
        raise BadFrame(f"IPv4 version {body[0]:#x}, total length {total} of {len(body)}")
    if len(body) > max(total, MIN_FRAME - 14):
        raise BadFrame(f"{len(body) - total} stray bytes after an IPv4 packet of {total}")
    if folded(body[:size]) != 0xFFFF:
        raise BadFrame("IPv4 header checksum is wrong")
    if struct.unpack_from(">H", body, 6)[0] & 0x3FFF:
        raise BadFrame("IPv4 fragment")
    packet.ttl, packet.proto = body[8], body[9]
    packet.src, packet.dst = body[12:16], body[16:20]
    _parse_l4(packet, body[size:total], 14 + size)


def _parse_ipv6(packet: Packet, body: bytes) -> None:
    length = struct.unpack_from(">H", body, 4)[0]
    if body[0] >> 4 != 6 or 40 + length > len(body):
        raise BadFrame(f"IPv6 version {body[0]:#x}, payload length {length} of {len(body) - 40}")
    if len(body) > max(40 + length, MIN_FRAME - 14):
        raise BadFrame(f"{len(body) - 40 - length} stray bytes after an IPv6 packet")
    packet.proto, packet.ttl = body[6], body[7]
    packet.src, packet.dst = body[8:24], body[24:40]
    _parse_l4(packet, body[40 : 40 + length], 54)


def _parse_l4(packet: Packet, body: bytes, start: int) -> None:
    if packet.proto == TCP:
        _check_l4_sum(packet, body, start, 16)
        _parse_tcp(packet, body)
    elif packet.proto == UDP:
        _check_l4_sum(packet, body, start, 6)
        packet.sport, packet.dport, length, _ = struct.unpack_from(">HHHH", body)
        if length != len(body) and packet.header.gso_type != GSO_UDP_L4:
            raise BadFrame(f"UDP length {length} of {len(body)}")
        packet.payload = body[8:]
    elif packet.proto in (ICMP, ICMP6):
        head = b"" if packet.proto == ICMP else pseudo(packet.src, packet.dst, ICMP6, len(body))
        if folded(head + body) != 0xFFFF:
            raise BadFrame("ICMP checksum is wrong")
        packet.type, packet.code, packet.body = body[0], body[1], body[4:]
    else:
        packet.body = body


def _parse_tcp(packet: Packet, body: bytes) -> None:
    packet.sport, packet.dport, packet.seq, packet.ack, offset, packet.flags, packet.window = (
        struct.unpack_from(">HHIIBBH", body)
    )
    size = (offset >> 4) * 4
    if not 20 <= size <= len(body):
        raise BadFrame(f"TCP data offset {size} of {len(body)}")
    at = 20
    while at < size and body[at]:
        if body[at] == 1:
            at += 1
            continue
        length = body[at + 1] if at + 1 < size else 0
        if length < 2 or at + length > size:
            raise BadFrame("TCP options overrun the header")
        if body[at] == 2:
            packet.mss = struct.unpack_from(">H", body, at + 2)[0]
        elif body[at] == 3:
            packet.wscale = body[at + 2]
        elif body[at] == 4:
            packet.sack_permitted = True
        elif body[at] == 5:
            edges = struct.unpack_from(f">{(length - 2) // 4}I", body, at + 2)
            packet.sack = tuple(zip(edges[::2], edges[1::2], strict=True))
        at += length
    packet.payload = body[size:]


def _check_l4_sum(packet: Packet, body: bytes, start: int, at: int) -> None:
    header = packet.header
    if len(body) < at + 2:
        raise BadFrame(f"{len(body)} bytes are too short for protocol {packet.proto}")
    head = pseudo(packet.src, packet.dst, packet.proto, len(body))
    value = struct.unpack_from(">H", body, at)[0]
    if header.flags & NEEDS_CSUM:
        if (header.csum_start, header.csum_offset) != (start, at):
            raise BadFrame(
                f"checksum at {header.csum_start}+{header.csum_offset}, not {start}+{at}"
            )
        if (value - folded(head)) % 0xFFFF:
            raise BadFrame(f"NEEDS_CSUM over {value:#06x}, pseudo-header sum {folded(head):#06x}")
    elif not header.flags & DATA_VALID:
        if packet.proto == UDP and value == 0 and packet.ethertype == IP4:
            return
        if folded(head + body) != 0xFFFF:
            raise BadFrame(f"checksum {value:#06x} of protocol {packet.proto} is wrong")


def _check_vnet(packet: Packet, length: int) -> None:
    header = packet.header
    kind = header.gso_type & ~GSO_ECN
    if kind == GSO_NONE:
        if header.gso_size and header.gso_type:
            raise BadFrame(f"gso_size {header.gso_size} with gso_type {header.gso_type}")
        return
    wanted = {(TCP, 4): GSO_TCP4, (TCP, 16): GSO_TCP6, (UDP, 4): GSO_UDP_L4, (UDP, 16): GSO_UDP_L4}
    if wanted.get((packet.proto, len(packet.src))) != kind:
        raise BadFrame(f"gso_type {kind} on protocol {packet.proto}")
    if not header.flags & NEEDS_CSUM or not header.gso_size:
        raise BadFrame("a GSO frame needs NEEDS_CSUM and a gso_size")
    if header.hdr_len > length:
        raise BadFrame(f"hdr_len {header.hdr_len} beyond the frame's {length}")


def summary(packet: Packet) -> str:
    """One line for a failure message."""
    if packet.ethertype == ARP:
        return f"ARP {packet.type} {text(packet.src)} -> {text(packet.dst)}"
    route = f"{text(packet.src)} -> {text(packet.dst)}"
    if packet.proto == TCP:
        letters = "".join(c for i, c in enumerate("FSRPAU") if packet.flags >> i & 1)
        return (
            f"TCP {route} {packet.sport}>{packet.dport} {letters} seq {packet.seq} "
            f"ack {packet.ack} win {packet.window} len {len(packet.payload)}"
        )
    if packet.proto == UDP:
        return f"UDP {route} {packet.sport}>{packet.dport} len {len(packet.payload)}"
    if packet.proto in (ICMP, ICMP6):
        return f"ICMP {route} type {packet.type} code {packet.code} len {len(packet.body)}"
    return f"{route} protocol {packet.proto}"
