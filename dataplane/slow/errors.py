"""errors.py - ICMP errors about what the guest sent, carried to the guest.

Theory      A datagram socket with IP_RECVERR or IPV6_RECVERR keeps every ICMP error about what it
            sent in its error queue (ip(7), linux/errqueue.h): type, code, the MTU for "too big",
            who complained, and as much of the packet as that one quoted. From this an error is
            made as the guest's own network would have sent it: the quoted packet is built again
            from the flow's key, so that it names the addresses and ports the guest used, and the
            complainer gets the name under which the guest knows it, as in flows/address.py.
            The kernel's own "message too long" (a path MTU it has learnt) becomes "too big".
Why so      Without these, closed ports look like lost packets (a resolver waits for seconds
            instead of asking the next server), traceroute stays blind and path MTU discovery fails.
Sources     RFC 792, RFC 1191, RFC 1812 4.3.2, RFC 4443.
Limits      ERRORS_MAX of one socket at a time, the rest with its next error. Quoted are the IP
            header and 8 bytes (IPv4), or what fits 1280 bytes (IPv6). The lengths and checksums in
            it are those of the part the complainer quoted: more of the packet is not known.
            Destination unreachable, too big and time exceeded only; a parameter problem would
            point into a header that was not the guest's.
Ownership   The socket is its home worker's; it is read between two breaths.
Drops       None of the guest's frames end here: errors of other kinds are not passed on.
"""

import socket
import struct
from ipaddress import IPv4Address, IPv6Address

from dataplane.slow.net import (
    ETHERNET_HEADER_BYTES,
    ETHERTYPE_IPV4,
    IPV6_HEADER_BYTES,
    IPV6_MTU_MIN_BYTES,
    Net,
    build_ethernet,
    build_icmp6,
    build_udp4,
    build_udp6,
    checksum,
)
from shm.layout import View
from shm.schema import PROTOCOLS

Address = IPv4Address | IPv6Address

ERRORS_MAX = 16
QUOTE_MAX_BYTES = 2048  # more than any ICMP error quotes (RFC 1812: 576, RFC 4443: 1280)

# struct sock_extended_err: errno, origin, type, code, padding, info, data; a sockaddr follows
EXTENDED_ERROR = struct.Struct("=IBBBBII")
RECVERR = {(socket.IPPROTO_IP, 11), (socket.IPPROTO_IPV6, 25)}  # IP_RECVERR, IPV6_RECVERR
ORIGIN_LOCAL, ORIGIN_ICMP, ORIGIN_ICMP6 = 1, 2, 3
EMSGSIZE = 90

ICMP_BYTES = 8
IP4_BYTES = 20
PROTOCOL_ICMP = 1
DONT_FRAGMENT = 0x4000  # with it the identification may be 0 (RFC 6864 4.1)
UNREACHABLE, TIME_EXCEEDED, FRAGMENTATION_NEEDED = 3, 11, 4
UNREACHABLE6, TOO_BIG6, TIME_EXCEEDED6 = 1, 2, 3
QUOTE6_MAX_BYTES = IPV6_MTU_MIN_BYTES - IPV6_HEADER_BYTES - ICMP_BYTES


def replies(entry: View, net: Net, guest_mac: bytes) -> list[bytes]:
    """Ethernet frames for the guest: the errors that wait at the socket of the flow `entry`."""
    frames = []
    sock = socket.socket(fileno=entry["fd"])
    try:
        for _ in range(ERRORS_MAX):
            try:
                quoted, ancillary, _, sent_to = sock.recvmsg(
                    QUOTE_MAX_BYTES, 512, socket.MSG_ERRQUEUE | socket.MSG_DONTWAIT
                )
            except BlockingIOError:
                break
            for level, kind, data in ancillary:
                if (level, kind) in RECVERR:
                    frames += _translate(entry, net, guest_mac, quoted, sent_to, data)
    finally:
        sock.detach()  # the descriptor stays the flow's
    return frames


def _translate(
    entry: View, net: Net, guest_mac: bytes, quoted: bytes, sent_to: tuple, data: bytes
) -> list[bytes]:
    """The frame for one extended error, or none when it is of no use to the guest."""
    guest, far = _address(entry.bytes("guest_addr")), _address(entry.bytes("far_addr"))
    errno, origin, kind, code, _, info, _ = EXTENDED_ERROR.unpack_from(data)
    head = _head(far.version, errno, origin, kind, code, info)
    packet = _sent_packet(entry, guest, far, quoted)
    if head is None or packet is None:
        return []
    offender = _offender(data[EXTENDED_ERROR.size :])
    if offender is None:
        source: Address = net.our_addr4 if far.version == 4 else net.link_local6
    elif sent_to and offender.packed == socket.inet_pton(_family(far), sent_to[0].split("%")[0]):
        source = far
    else:
        source = _seen_as(net, offender)
    addrs = (source.packed, guest.packed)
    if far.version == 6:
        return [build_icmp6((net.our_mac, guest_mac), addrs, head + packet[:QUOTE6_MAX_BYTES])]
    message = head + packet[: IP4_BYTES + ICMP_BYTES]
    message = message[:2] + checksum(message).to_bytes(2, "big") + message[4:]
    packet = _build_ip4(addrs, message)
    return [build_ethernet(guest_mac, net.our_mac, ETHERTYPE_IPV4, packet)]


def _head(version: int, errno: int, origin: int, kind: int, code: int, info: int) -> bytes | None:
    """The 8 bytes before the quoted packet, checksum zero, or None for errors not passed on."""
    if origin == ORIGIN_LOCAL and errno == EMSGSIZE:
        kind, code = (UNREACHABLE, FRAGMENTATION_NEEDED) if version == 4 else (TOO_BIG6, 0)
    elif origin != (ORIGIN_ICMP if version == 4 else ORIGIN_ICMP6):
        return None
    if version == 6:
        if kind not in (UNREACHABLE6, TOO_BIG6, TIME_EXCEEDED6):
            return None
        return struct.pack("!BBHI", kind, code, 0, info if kind == TOO_BIG6 else 0)
    if kind not in (UNREACHABLE, TIME_EXCEEDED):
        return None
    too_big = (kind, code) == (UNREACHABLE, FRAGMENTATION_NEEDED)
    return struct.pack("!BBHI", kind, code, 0, info & 0xFFFF if too_big else 0)


def _sent_packet(entry: View, guest: Address, far: Address, quoted: bytes) -> bytes | None:
    """The IP packet as the guest sent it, as far as it was quoted; None when too little was."""
    macs, addrs = (bytes(6), bytes(6)), (guest.packed, far.packed)
    if PROTOCOLS[entry["protocol"]] == "udp":
        ports = (entry["guest_port"], entry["far_port"])
        build = build_udp4 if far.version == 4 else build_udp6
        return build(macs, addrs, ports, quoted)[ETHERNET_HEADER_BYTES:]
    if len(quoted) < ICMP_BYTES:
        return None
    identifier = entry["guest_port"].to_bytes(2, "big")  # on the host the kernel chose another
    echo = quoted[:2] + bytes(2) + identifier + quoted[6:]
    if far.version == 6:
        return build_icmp6(macs, addrs, echo)[ETHERNET_HEADER_BYTES:]
    return _build_ip4(addrs, echo[:2] + checksum(echo).to_bytes(2, "big") + echo[4:])


def _build_ip4(addrs: tuple[bytes, bytes], message: bytes) -> bytes:
    """An IPv4 packet with an ICMP message; `addrs` are source and destination."""
    total_bytes = IP4_BYTES + len(message)
    header = struct.pack("!BBHIBBH", 0x45, 0, total_bytes, DONT_FRAGMENT, 64, PROTOCOL_ICMP, 0)
    header += addrs[0] + addrs[1]
    return header[:10] + checksum(header).to_bytes(2, "big") + header[12:] + message


def _address(data: bytes) -> Address:
    """An address as the shared structs hold it: 16 bytes, IPv4 as ::ffff:a.b.c.d."""
    address = IPv6Address(data)
    return address.ipv4_mapped or address


def _family(address: Address) -> socket.AddressFamily:
    return socket.AF_INET if address.version == 4 else socket.AF_INET6


def _offender(sockaddr: bytes) -> Address | None:
    """Who complained: the struct sockaddr behind an extended error; None: this host's kernel."""
    family = int.from_bytes(sockaddr[:2], "little")
    if family == socket.AF_INET and len(sockaddr) >= 8:
        return IPv4Address(sockaddr[4:8])
    if family == socket.AF_INET6 and len(sockaddr) >= 24:
        return IPv6Address(sockaddr[8:24])
    return None


def _seen_as(net: Net, host: Address) -> Address:
    """The address under which the guest sees a host-side one: flows/address.py, inbound."""
    if isinstance(host, IPv4Address):
        if host.is_loopback:
            return net.map_host_loopback4 or net.our_addr4
        return (net.map_guest_addr4 or net.our_addr4) if host == net.addr4 else host
    if host.is_loopback:
        return net.map_host_loopback6 or net.link_local6
    router = net.link_local6 if net.gateway6.is_link_local else net.gateway6
    return (net.map_guest_addr6 or router) if host == net.addr6 else host
