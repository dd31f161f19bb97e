"""net.py - what the guest is told about its network, and the bytes all small protocols share.

Theory      ARP, NDP, DHCP and DHCPv6 each answer one frame with one frame. What they answer comes
            from one immutable `Net`, made by control and shipped to workers by pickle; how a frame
            is taken apart and put together is here, once. A frame is judged from the outside in:
            Ethernet, IP, UDP, each with its lengths and its checksum, and the first doubt ends it
            with None. So a protocol file only ever sees a payload whose outer layers were
            consistent.
Why so      A guest sends these a few times a minute: plain Python, bytes in and bytes out, is
            quick enough, costs no compilation, and can be tested without a ring or a socket.
Limits      Frames of at most 2048 bytes; no IPv4 fragments, no IPv6 extension headers (RFC 6980
            forbids fragments in NDP and no DHCPv6 client sends others), no VLAN tags. A domain
            name that DNS cannot carry is left out.
Ownership   Nothing here has state; `Net` is frozen and replaced as a whole.
Drops       None stands for every refusal; the caller counts it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple

from shm.record import Record

ETHERNET_HEADER_BYTES = 14
FRAME_MIN_BYTES = 60  # IEEE 802.3 minimum without the checksum
FRAME_MAX_BYTES = 2048  # no client of these protocols sends as much; it bounds every parser
ETHERTYPE_IPV4 = 0x0800
ETHERTYPE_ARP = 0x0806
ETHERTYPE_IPV6 = 0x86DD
PROTOCOL_UDP = 17
PROTOCOL_ICMPV6 = 58
IPV6_HEADER_BYTES = 40
UDP_HEADER_BYTES = 8
IPV6_MTU_MIN_BYTES = 1280  # RFC 8200, 5: every link carries this much

MAC_BROADCAST = b"\xff" * 6
OUR_MAC = bytes.fromhex("56484d510001")  # locally administered; the first four bytes read "VHMQ"


class Net(Record):
    """The guest's network as we present it. Names follow the command line options of passt.

    `addr*` belongs to the guest, `gateway*` is its router. `our_addr4` and `link_local6` are what
    we sign our own packets with; `link_local6` is also the router in our advertisements.
    The defaults are the set-up for a host without a network: link-local addresses only. There,
    `addr6` is None: the host has no IPv6 to share, the guest keeps the link-local address it made
    for itself, which reaches the host, and gets neither a prefix nor a default route.
    `map_*` and `dns_forward*` are addresses that flows translate, `dns_host*` is where DNS queries
    to `dns_forward*` go; `dns_host6` may carry a zone (fe80::1%eth0).
    `interface6` is the number of the host's interface on whose link the guest's link-local
    destinations are, 0 for none.
    `mtu` counts bytes; 0 means: do not advertise one.
    """

    our_mac: bytes = OUR_MAC
    ipv4: bool = True
    addr4: IPv4Address = IPv4Address("169.254.2.1")
    prefix4: int = 16
    gateway4: IPv4Address = IPv4Address("169.254.2.2")
    our_addr4: IPv4Address = IPv4Address("169.254.2.2")
    ipv6: bool = True
    addr6: IPv6Address | None = None
    prefix6: int = 64
    gateway6: IPv6Address = IPv6Address("fe80::1")
    link_local6: IPv6Address = IPv6Address("fe80::1")
    dns4: tuple[IPv4Address, ...] = ()
    dns6: tuple[IPv6Address, ...] = ()
    search: tuple[str, ...] = ()
    hostname: str = ""
    fqdn: str = ""
    mtu: int = 0
    map_host_loopback4: IPv4Address | None = None
    map_host_loopback6: IPv6Address | None = None
    map_guest_addr4: IPv4Address | None = None
    map_guest_addr6: IPv6Address | None = None
    dns_forward4: IPv4Address | None = None
    dns_forward6: IPv6Address | None = None
    dns_host4: IPv4Address | None = None
    dns_host6: IPv6Address | None = None
    interface6: int = 0
    no_dhcp: bool = False
    no_dhcpv6: bool = False
    no_ndp: bool = False
    no_ra: bool = False
    no_dhcp_dns: bool = False
    no_dhcp_search: bool = False


class Ip6(NamedTuple):
    """One IPv6 packet without extension headers, lengths checked."""

    src_mac: bytes
    src: bytes
    dst: bytes
    hop_limit: int
    payload: bytes


class Datagram(NamedTuple):
    """One UDP datagram, lengths and checksums checked."""

    src_mac: bytes
    src: bytes
    dst: bytes
    dport: int
    payload: bytes


def checksum(data: bytes) -> int:
    """Internet checksum of `data` (RFC 1071); 0 when `data` already holds a right one."""
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def pseudo_header(src: bytes, dst: bytes, protocol: int, length: int) -> bytes:
    """What an upper-layer checksum also covers (RFC 768 for IPv4, RFC 8200 8.1 for IPv6)."""
    return src + dst + struct.pack("!HH" if len(src) == 4 else "!II", protocol, length)


def payload_of(frame: bytes, ethertype: int) -> bytes | None:
    """What follows the Ethernet header, when the frame has this type and an individual source."""
    if not ETHERNET_HEADER_BYTES <= len(frame) <= FRAME_MAX_BYTES:
        return None
    if frame[12:14] != ethertype.to_bytes(2, "big"):
        return None
    if frame[6] & 1:  # a group address cannot send (IEEE 802.3, 3.2.3), so it cannot be answered
        return None
    return frame[ETHERNET_HEADER_BYTES:]


def parse_ip6(frame: bytes, next_header: int) -> Ip6 | None:
    """The IPv6 packet in `frame` if `next_header` follows its fixed header, else None."""
    packet = payload_of(frame, ETHERTYPE_IPV6)
    if packet is None or len(packet) < IPV6_HEADER_BYTES or packet[0] >> 4 != 6:
        return None
    length = int.from_bytes(packet[4:6], "big")
    if packet[6] != next_header or length > len(packet) - IPV6_HEADER_BYTES:
        return None
    payload = packet[IPV6_HEADER_BYTES : IPV6_HEADER_BYTES + length]
    return Ip6(frame[6:12], packet[8:24], packet[24:40], packet[7], payload)


def parse_udp4(frame: bytes, checksum_trusted: bool) -> Datagram | None:
    """The UDP datagram in an IPv4 frame, or None.

    `checksum_trusted`: the UDP checksum is unfinished (VIRTIO_NET_HDR_F_NEEDS_CSUM), skip it.
    """
    packet = payload_of(frame, ETHERTYPE_IPV4)
    if packet is None or len(packet) < 20 or packet[0] >> 4 != 4:
        return None
    header_bytes = (packet[0] & 15) * 4
    total_bytes, _, fragment = struct.unpack_from("!HHH", packet, 2)
    if header_bytes < 20 or not header_bytes <= total_bytes <= len(packet):
        return None
    more_or_offset = fragment & 0x3FFF
    if packet[9] != PROTOCOL_UDP or more_or_offset or checksum(packet[:header_bytes]):
        return None
    body = packet[header_bytes:total_bytes]
    return _parse_udp(frame[6:12], packet[12:16], packet[16:20], body, checksum_trusted)


def parse_udp6(frame: bytes, checksum_trusted: bool) -> Datagram | None:
    """The UDP datagram in an IPv6 frame, or None; `checksum_trusted` as for `parse_udp4`."""
    packet = parse_ip6(frame, PROTOCOL_UDP)
    if packet is None:
        return None
    return _parse_udp(packet.src_mac, packet.src, packet.dst, packet.payload, checksum_trusted)


def _parse_udp(
    src_mac: bytes, src: bytes, dst: bytes, body: bytes, checksum_trusted: bool
) -> Datagram | None:
    if len(body) < UDP_HEADER_BYTES:
        return None
    _, dport, length, sent_checksum = struct.unpack_from("!HHHH", body)
    if not UDP_HEADER_BYTES <= length <= len(body):
        return None
    body = body[:length]
    unchecked = checksum_trusted or (sent_checksum == 0 and len(src) == 4)  # RFC 768: 0 is "none"
    if not unchecked:
        if sent_checksum == 0 or checksum(pseudo_header(src, dst, PROTOCOL_UDP, length) + body):
            return None
    return Datagram(src_mac, src, dst, dport, body[UDP_HEADER_BYTES:])


def build_ethernet(dst_mac: bytes, src_mac: bytes, ethertype: int, payload: bytes) -> bytes:
    """An Ethernet frame, padded to 60 bytes."""
    frame = dst_mac + src_mac + ethertype.to_bytes(2, "big") + payload
    return frame.ljust(FRAME_MIN_BYTES, b"\0")


def build_udp4(
    macs: tuple[bytes, bytes], addrs: tuple[bytes, bytes], ports: tuple[int, int], payload: bytes
) -> bytes:
    """An Ethernet frame with a UDP datagram over IPv4; each pair is (source, destination)."""
    udp = _build_udp(addrs, ports, payload)
    dont_fragment = 0x4000  # RFC 6864 4.1: then the identification may stay 0
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 0, dont_fragment, 64, PROTOCOL_UDP, 0)
    header += addrs[0] + addrs[1]
    header = header[:10] + checksum(header).to_bytes(2, "big") + header[12:]
    return build_ethernet(macs[1], macs[0], ETHERTYPE_IPV4, header + udp)


def build_udp6(
    macs: tuple[bytes, bytes], addrs: tuple[bytes, bytes], ports: tuple[int, int], payload: bytes
) -> bytes:
    """An Ethernet frame with a UDP datagram over IPv6; each pair is (source, destination)."""
    return _build_ip6(macs, addrs, PROTOCOL_UDP, 64, _build_udp(addrs, ports, payload))


def build_icmp6(macs: tuple[bytes, bytes], addrs: tuple[bytes, bytes], message: bytes) -> bytes:
    """An Ethernet frame with an ICMPv6 message whose checksum field is still 0, hop limit 255."""
    total = checksum(pseudo_header(*addrs, PROTOCOL_ICMPV6, len(message)) + message)
    message = message[:2] + total.to_bytes(2, "big") + message[4:]
    return _build_ip6(macs, addrs, PROTOCOL_ICMPV6, 255, message)


def _build_udp(addrs: tuple[bytes, bytes], ports: tuple[int, int], payload: bytes) -> bytes:
    length = UDP_HEADER_BYTES + len(payload)
    ports_and_length = struct.pack("!HHH", *ports, length)
    covered = pseudo_header(*addrs, PROTOCOL_UDP, length) + ports_and_length + b"\0\0" + payload
    total = checksum(covered) or 0xFFFF  # RFC 768: a sum of 0 is sent as all ones
    return ports_and_length + total.to_bytes(2, "big") + payload


def _build_ip6(
    macs: tuple[bytes, bytes],
    addrs: tuple[bytes, bytes],
    next_header: int,
    hop_limit: int,
    payload: bytes,
) -> bytes:
    header = struct.pack("!IHBB", 6 << 28, len(payload), next_header, hop_limit)
    return build_ethernet(macs[1], macs[0], ETHERTYPE_IPV6, header + addrs[0] + addrs[1] + payload)


def name_labels(name: str) -> list[bytes] | None:
    """The labels of a domain name (a last dot is ignored), or None when DNS cannot carry it.

    RFC 1035 3.1: labels of 1 to 63 bytes, at most 255 bytes on the wire. The root alone is None
    too: there is nothing to search in it.
    """
    try:
        labels = [label.encode("ascii") for label in name.removesuffix(".").split(".")]
    except UnicodeEncodeError:
        return None
    if not all(1 <= len(label) <= 63 for label in labels):
        return None
    return labels if sum(len(label) + 1 for label in labels) < 255 else None


def dns_name(name: str) -> bytes:
    """`name` in DNS wire form, not compressed; empty when DNS cannot carry it."""
    labels = name_labels(name)
    if labels is None:
        return b""
    return b"".join(bytes([len(label)]) + label for label in labels) + b"\0"


def dns_names(names: Iterable[str], room_bytes: int) -> bytes:
    """As many whole names as fit in `room_bytes`, in order, not compressed (RFC 8106, RFC 3646)."""
    wire = b""
    for encoded in map(dns_name, names):
        if len(wire) + len(encoded) > room_bytes:
            break
        wire += encoded
    return wire


def dns_names_compressed(names: Iterable[str], room_bytes: int) -> bytes:
    """As many whole names as fit, known endings as pointers into this block (RFC 3397, 2)."""
    wire = b""
    seen: dict[tuple[bytes, ...], int] = {}
    for labels in filter(None, map(name_labels, names)):
        encoded = b""
        while labels and tuple(labels) not in seen:
            seen[tuple(labels)] = len(wire) + len(encoded)
            encoded += bytes([len(labels[0])]) + labels[0]
            labels = labels[1:]
        encoded += struct.pack("!H", 0xC000 | seen[tuple(labels)]) if labels else b"\0"
        if len(wire) + len(encoded) > room_bytes:
            break
        wire += encoded
    return wire
