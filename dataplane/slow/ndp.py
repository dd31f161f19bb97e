"""ndp.py - IPv6 neighbour discovery: every neighbour is us, and we are the router.

Theory      As in arp.py, a neighbour solicitation for any address is answered with our MAC (RFC
            4861 7.2). Not answered: duplicate address detection, whose source is the unspecified
            address (RFC 4862 5.4.3), and questions for the guest's own address. A router
            solicitation gets the router advertisement that `unsolicited_ra` also builds. A guest
            configures itself from the prefix (L and A flags, SLAAC) and may also ask DHCPv6: the M
            flag says that there is an address to lease, O that there is configuration.
Local mode  Without a host address (`net.addr6` None) the advertisement has no prefix and router
            lifetime 0: the guest's link-local address still reaches us (fe80::1 is the host), but
            it gets no default route that would lead nowhere and stall dual-stack programs.
Limits      The advertisement fits in 1280 bytes: name servers and domains that do not fit are left
            out. Lifetimes are infinite, as are the leases of dhcp.py; the router's is 65535 s (RFC
            8319), so an unsolicited advertisement is due now and then (RFC 4861 6.2.1: every 200
            to 600 s).
Ownership   No state; when to advertise is the caller's clock.
Drops       What RFC 4861 6.1.1 and 7.1.1 tell to discard: hop limit not 255, wrong checksum, code
            not 0, short message, an option of length 0 or beyond the end, a multicast target. All
            None.
"""

import struct
from ipaddress import IPv6Network

from dataplane.slow.net import (
    IPV6_HEADER_BYTES,
    IPV6_MTU_MIN_BYTES,
    PROTOCOL_ICMPV6,
    Ip6,
    Net,
    build_icmp6,
    checksum,
    dns_names,
    parse_ip6,
    pseudo_header,
)

ROUTER_SOLICITATION = 133
ROUTER_ADVERTISEMENT = 134
NEIGHBOUR_SOLICITATION = 135
NEIGHBOUR_ADVERTISEMENT = 136
OPTION_SOURCE_MAC = 1
OPTION_TARGET_MAC = 2
OPTION_PREFIX = 3
OPTION_MTU = 5
OPTION_RDNSS = 25  # RFC 8106
OPTION_DNSSL = 31  # RFC 8106

UNSPECIFIED = bytes(16)
ALL_NODES = bytes.fromhex("ff020000000000000000000000000001")
ALL_NODES_MAC = bytes.fromhex("333300000001")

INFINITE = 0xFFFFFFFF
ROUTER_LIFETIME_S = 65535
HOP_LIMIT = 64
PREFIX_FLAGS = 0xC0  # L: on link, A: autonomous configuration
RA_FLAG_MANAGED = 0x80
RA_FLAG_OTHER = 0x40
NA_FLAGS = 0xE0  # router, solicited, override
RA_OPTIONS_MAX_BYTES = IPV6_MTU_MIN_BYTES - IPV6_HEADER_BYTES - 16


def reply(frame: bytes, net: Net, checksum_trusted: bool = False) -> bytes | None:
    """The advertisement that answers an Ethernet frame with a solicitation, or None."""
    if not net.ipv6 or net.no_ndp:
        return None
    packet = parse_ip6(frame, PROTOCOL_ICMPV6)
    if packet is None or packet.hop_limit != 255 or len(packet.payload) < 8:
        return None
    message = packet.payload
    covered = pseudo_header(packet.src, packet.dst, PROTOCOL_ICMPV6, len(message)) + message
    if message[1] != 0 or not (checksum_trusted or checksum(covered) == 0):
        return None
    if packet.src[0] == 0xFF:
        return None
    if message[0] == ROUTER_SOLICITATION:
        return _router_advertisement(packet, net)
    if message[0] == NEIGHBOUR_SOLICITATION:
        return _neighbour_advertisement(packet, net)
    return None


def unsolicited_ra(net: Net) -> bytes | None:
    """A router advertisement for all nodes, or None where advertising is switched off."""
    if not net.ipv6 or net.no_ndp or net.no_ra:
        return None
    return _build_ra(net, ALL_NODES_MAC, ALL_NODES)


def _router_advertisement(packet: Ip6, net: Net) -> bytes | None:
    options = _option_types(packet.payload[8:])
    if net.no_ra or options is None:
        return None
    if (
        packet.src == UNSPECIFIED
    ):  # RFC 4861 6.1.1 and 6.2.6: may not tell its MAC, hears by multicast
        return None if OPTION_SOURCE_MAC in options else unsolicited_ra(net)
    return _build_ra(net, packet.src_mac, packet.src)


def _neighbour_advertisement(packet: Ip6, net: Net) -> bytes | None:
    target = packet.payload[8:24]
    if len(target) < 16 or target[0] == 0xFF or _option_types(packet.payload[24:]) is None:
        return None
    own = net.addr6 is not None and target == net.addr6.packed
    if own or packet.src in (UNSPECIFIED, target):
        return None
    message = struct.pack("!BBHB3x", NEIGHBOUR_ADVERTISEMENT, 0, 0, NA_FLAGS) + target
    message += _mac_option(OPTION_TARGET_MAC, net.our_mac)
    macs = (net.our_mac, packet.src_mac)
    return build_icmp6(macs, (net.link_local6.packed, packet.src), message)


def _option_types(data: bytes) -> set[int] | None:
    """Which options `data` holds (RFC 4861 4.6, length in 8-byte units), None if malformed."""
    types = set()
    at = 0
    while at < len(data):
        length = data[at + 1] * 8 if at + 1 < len(data) else 0
        if length == 0 or at + length > len(data):
            return None
        types.add(data[at])
        at += length
    return types


def _mac_option(kind: int, mac: bytes) -> bytes:
    return bytes([kind, 1]) + mac


def _build_ra(net: Net, dst_mac: bytes, dst: bytes) -> bytes:
    managed = 0 if net.addr6 is None else RA_FLAG_MANAGED
    flags = 0 if net.no_dhcpv6 else managed | RA_FLAG_OTHER
    lifetime_s = 0 if net.addr6 is None else ROUTER_LIFETIME_S
    header = struct.pack(
        "!BBHBBHII", ROUTER_ADVERTISEMENT, 0, 0, HOP_LIMIT, flags, lifetime_s, 0, 0
    )
    message = header + _ra_options(net)
    return build_icmp6((net.our_mac, dst_mac), (net.link_local6.packed, dst), message)


def _ra_options(net: Net) -> bytes:
    """Everything advertised, at most RA_OPTIONS_MAX_BYTES (RFC 4861 4.6, RFC 8106 5)."""
    options = _mac_option(OPTION_SOURCE_MAC, net.our_mac)
    if net.addr6 is not None:
        prefix = IPv6Network((net.addr6, net.prefix6), strict=False).network_address.packed
        lengths = (OPTION_PREFIX, 4, net.prefix6, PREFIX_FLAGS)
        options += struct.pack("!BBBBII4x", *lengths, INFINITE, INFINITE) + prefix
    if net.mtu >= IPV6_MTU_MIN_BYTES:
        options += struct.pack("!BB2xI", OPTION_MTU, 1, net.mtu)
    if net.dns6 and not net.no_dhcp_dns:
        servers = net.dns6[: (RA_OPTIONS_MAX_BYTES - len(options) - 8) // 16]
        options += struct.pack("!BB2xI", OPTION_RDNSS, 1 + 2 * len(servers), INFINITE)
        options += b"".join(server.packed for server in servers)
    if not net.no_dhcp_search:
        names = dns_names(net.search, (RA_OPTIONS_MAX_BYTES - len(options) - 8) // 8 * 8)
        if names:
            units = -(-len(names) // 8)
            options += struct.pack("!BB2xI", OPTION_DNSSL, 1 + units, INFINITE)
            options += names.ljust(units * 8, b"\0")
    return options
