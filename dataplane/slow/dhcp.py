"""dhcp.py - a DHCPv4 server with one address to give.

Theory      RFC 2131 with one client, one address and an infinite lease needs no lease table: each
            message is answered from itself and `Net`.

                DISCOVER             OFFER, or ACK with rapid commit (option 80, RFC 4039)
                REQUEST              ACK; NAK when it names another address than ours; nothing
                                     when it names another server, whose offer it took
                INFORM               ACK without address and lease
                no type (BOOTP)      reply with BOOTP's own options only (RFC 1534)
                DECLINE, RELEASE     nothing: there is no other address, and nothing to free
Where to    RFC 2131 4.1, in this order: to the relay (giaddr); a NAK to everybody; to the address
            the client has (ciaddr); to everybody when it set the broadcast flag; else to the
            address given. All of it goes to the MAC that asked, or to the broadcast MAC.
Options     53 comes first (some clients look nowhere else), then the client's wishes in its order
            (option 55), then the rest. What does not fit in the message the client takes (option
            57, 576 bytes without it) is left out, least important first. When the router is not on
            the guest's subnet, option 121 says how to reach it (RFC 3442).
Limits      An option carries at most 255 bytes: 63 name servers, as many search domains as fit.
Ownership   No state.
Drops       Not UDP to port 67, not a BOOTP request, truncated options, types only servers send:
            None.
"""

import struct
from ipaddress import IPv4Network
from typing import NamedTuple

from dataplane.slow.net import (
    MAC_BROADCAST,
    Datagram,
    Net,
    build_udp4,
    dns_name,
    dns_names_compressed,
    parse_udp4,
)

SERVER_PORT = 67
CLIENT_PORT = 68
FIXED = struct.Struct("!BBBBIHH4s4s4s4s16s64s128s")  # RFC 2131, figure 1, up to the options
MAGIC = bytes([99, 130, 83, 99])
BOOTREQUEST = 1
BOOTREPLY = 2
FLAG_BROADCAST = 0x8000

DISCOVER, OFFER, REQUEST, ACK, NAK, INFORM = 1, 2, 3, 5, 6, 8
BOOTP = -1  # our name for a message without option 53

OPTION_MASK = 1
OPTION_ROUTER = 3
OPTION_DNS = 6
OPTION_HOSTNAME = 12
OPTION_DOMAIN = 15
OPTION_MTU = 26
OPTION_REQUESTED = 50
OPTION_LEASE = 51
OPTION_OVERLOAD = 52
OPTION_TYPE = 53
OPTION_SERVER = 54
OPTION_WISHES = 55
OPTION_MESSAGE = 56
OPTION_SIZE_MAX = 57
OPTION_CLIENT_ID = 61
OPTION_RAPID_COMMIT = 80
OPTION_FQDN = 81
OPTION_SEARCH = 119
OPTION_ROUTES = 121
OPTION_END = 255
OPTION_MAX_BYTES = 255

BOOTP_OPTIONS = frozenset(
    {OPTION_MASK, OPTION_ROUTER, OPTION_DNS, OPTION_HOSTNAME, OPTION_DOMAIN, OPTION_MTU}
)
FQDN_CLIENT_ASKS_SERVER = 1  # S (RFC 4702 2.1)
FQDN_SERVER_OVERRIDES = 2  # O
FQDN_WIRE_FORM = 4  # E
FQDN_NO_UPDATES = 8  # N

ZERO = bytes(4)
BROADCAST = b"\xff" * 4
INFINITE = b"\xff" * 4
MTU_MIN_BYTES = 68  # RFC 2132 5.1
PAYLOAD_MIN_BYTES = 300  # RFC 1542 2.1: BOOTP's 236 and a vendor area of 64
SIZE_MIN_BYTES = 576  # RFC 2131 2: every client takes this much, IP and UDP headers included
SIZE_LIMIT_BYTES = 1500  # never rely on more, whatever the client says
OUTER_BYTES = 28 + FIXED.size + len(MAGIC)


class Request(NamedTuple):
    """A client's message; addresses in network order, absent ones are zero."""

    kind: int
    xid: int
    flags: int
    ciaddr: bytes
    giaddr: bytes
    hardware: tuple[int, int, bytes]
    options: dict[int, bytes]


def reply(frame: bytes, net: Net, checksum_trusted: bool = False) -> bytes | None:
    """The Ethernet frame that answers a client's, or None; `checksum_trusted`: see parse_udp4."""
    if not net.ipv4 or net.no_dhcp:
        return None
    datagram = parse_udp4(frame, checksum_trusted)
    if datagram is None or datagram.dport != SERVER_PORT:
        return None
    request = parse(datagram.payload)
    if request is None:
        return None
    kind = _answer_kind(request, net)
    if kind is None:
        return None
    port = SERVER_PORT if request.giaddr != ZERO else CLIENT_PORT
    dst, dst_mac = _destination(request, kind, datagram, net)
    addrs = (net.our_addr4.packed, dst)
    payload = _build(request, kind, net)
    return build_udp4((net.our_mac, dst_mac), addrs, (SERVER_PORT, port), payload)


def parse(payload: bytes) -> Request | None:
    """The BOOTP or DHCP request in a UDP payload, or None."""
    if len(payload) < FIXED.size or payload[0] != BOOTREQUEST:
        return None
    fields = FIXED.unpack_from(payload)
    _, hardware_type, hardware_bytes, _, xid, _, flags = fields[:7]
    ciaddr, _, _, giaddr, chaddr, server_name, file = fields[7:]
    options: dict[int, bytes] | None = {}
    if payload[FIXED.size :].startswith(MAGIC):
        options = _parse_options(payload[FIXED.size + len(MAGIC) :], server_name, file)
    if options is None:
        return None
    kind = options.get(OPTION_TYPE)
    if hardware_bytes > len(chaddr) or (kind is not None and len(kind) != 1):
        return None
    hardware = (hardware_type, hardware_bytes, chaddr)
    return Request(kind[0] if kind else BOOTP, xid, flags, ciaddr, giaddr, hardware, options)


def _parse_options(data: bytes, server_name: bytes, file: bytes) -> dict[int, bytes] | None:
    """All options; one sent in pieces is put together (RFC 3396), None when one is truncated.

    Option 52 says that options go on in the file (1) and server name (2) fields (RFC 2131 4.1).
    """
    options: dict[int, bytes] = {}
    if not _collect(data, options):
        return None
    overload = options.get(OPTION_OVERLOAD, b"\0")[:1]
    for bit, field in ((1, file), (2, server_name)):
        if overload and overload[0] & bit and not _collect(field, options):
            return None
    return options


def _collect(data: bytes, options: dict[int, bytes]) -> bool:
    at = 0
    while at < len(data) and data[at] != OPTION_END:
        if data[at] == 0:  # pad: one byte
            at += 1
            continue
        end = at + 2 + data[at + 1] if at + 1 < len(data) else len(data) + 1
        if end > len(data):
            return False
        options[data[at]] = options.get(data[at], b"") + data[at + 2 : end]
        at = end
    return True


def _answer_kind(request: Request, net: Net) -> int | None:
    """Which message answers this one (the table above), or None; BOOTP's reply is like an ACK."""
    if request.kind in (BOOTP, INFORM):
        return ACK
    if request.kind == DISCOVER:
        return ACK if OPTION_RAPID_COMMIT in request.options else OFFER
    if request.kind != REQUEST:
        return None
    if request.options.get(OPTION_SERVER, net.our_addr4.packed) != net.our_addr4.packed:
        return None
    wanted = request.options.get(OPTION_REQUESTED, request.ciaddr)
    return ACK if wanted in (net.addr4.packed, ZERO) else NAK


def _destination(request: Request, kind: int, datagram: Datagram, net: Net) -> tuple[bytes, bytes]:
    """(IP address, MAC) the answer goes to."""
    mac = datagram.src_mac
    if request.giaddr != ZERO:
        return request.giaddr, mac
    if kind == NAK:
        return BROADCAST, MAC_BROADCAST
    if request.ciaddr != ZERO:
        return request.ciaddr, mac
    if request.flags & FLAG_BROADCAST:
        return BROADCAST, MAC_BROADCAST
    if request.kind == INFORM:  # without the ciaddr it must have (RFC 2131 3.4): where it came from
        return (BROADCAST, MAC_BROADCAST) if datagram.src == ZERO else (datagram.src, mac)
    return net.addr4.packed, mac


def _build(request: Request, kind: int, net: Net) -> bytes:
    """The BOOTP payload of the answer (RFC 2131, table 3)."""
    leases = kind != NAK and request.kind != INFORM
    yiaddr = net.addr4.packed if leases else ZERO
    ciaddr = ZERO if kind in (OFFER, NAK) else request.ciaddr
    flags = request.flags
    if kind == NAK and request.giaddr != ZERO:
        flags |= FLAG_BROADCAST  # RFC 2131 4.3.2: the relay must broadcast it
    hardware_type, hardware_bytes, chaddr = request.hardware
    head = (BOOTREPLY, hardware_type, hardware_bytes, 0, request.xid, 0, flags)
    tail = (ciaddr, yiaddr, ZERO, request.giaddr, chaddr, b"", b"")
    room = _options_room(request)
    options = {OPTION_TYPE: bytes([kind]), OPTION_SERVER: net.our_addr4.packed}
    if OPTION_CLIENT_ID in request.options:  # RFC 6842
        options[OPTION_CLIENT_ID] = request.options[OPTION_CLIENT_ID]
    if kind == NAK:
        options[OPTION_MESSAGE] = b"address not available here"
    else:
        _configure(options, request, kind, net)
        _add_domains(options, net, room)
    if request.kind == BOOTP:
        options = {code: data for code, data in options.items() if code in BOOTP_OPTIONS}
    encoded = _encode(options, request.options.get(OPTION_WISHES, b""), room)
    return (FIXED.pack(*head, *tail) + MAGIC + encoded).ljust(PAYLOAD_MIN_BYTES, b"\0")


def _options_room(request: Request) -> int:
    """Bytes for options, the end mark included."""
    if request.kind == BOOTP:
        return PAYLOAD_MIN_BYTES - FIXED.size - len(MAGIC)
    said = int.from_bytes(request.options.get(OPTION_SIZE_MAX, b""), "big")
    return max(SIZE_MIN_BYTES, min(said, SIZE_LIMIT_BYTES)) - OUTER_BYTES


def _configure(options: dict[int, bytes], request: Request, kind: int, net: Net) -> None:
    """Add every option we have for the client, the most important first."""
    if request.kind != INFORM:
        options[OPTION_LEASE] = INFINITE
    if request.kind == DISCOVER and kind == ACK:
        options[OPTION_RAPID_COMMIT] = b""
    subnet = IPv4Network((net.addr4, net.prefix4), strict=False)
    options[OPTION_MASK] = subnet.netmask.packed
    router = net.gateway4.packed
    options[OPTION_ROUTER] = router
    if net.gateway4 not in subnet:  # router/32 is on the link, and everything is behind it
        options[OPTION_ROUTES] = b"\x20" + router + ZERO + b"\0" + router
    if net.dns4 and not net.no_dhcp_dns:
        options[OPTION_DNS] = b"".join(server.packed for server in net.dns4[:63])
    if net.mtu >= MTU_MIN_BYTES:
        options[OPTION_MTU] = net.mtu.to_bytes(2, "big")
    if net.hostname:
        options[OPTION_HOSTNAME] = net.hostname.encode("ascii", "ignore")
    if dns_name(net.fqdn):
        options[OPTION_FQDN] = _fqdn(request.options.get(OPTION_FQDN, b""), net.fqdn)


def _add_domains(options: dict[int, bytes], net: Net, room: int) -> None:
    """Add the guest's domain (its own name's, else the first to search) and the search list."""
    search = () if net.no_dhcp_search else net.search
    _, _, domain = net.fqdn.removesuffix(".").partition(".")
    if domain or search:
        options[OPTION_DOMAIN] = (domain or search[0]).encode("ascii", "ignore")
    left = room - 1 - sum(2 + len(data) for data in options.values())
    names = dns_names_compressed(search, min(left - 2, OPTION_MAX_BYTES))
    if names:
        options[OPTION_SEARCH] = names


def _fqdn(asked: bytes, fqdn: str) -> bytes:
    """Option 81 (RFC 4702): the name in the form the client used, wire form when it sent none.

    We update no DNS (N); when the client wants the server to (S), that is overridden (O).
    """
    client_flags = asked[0] if asked else FQDN_WIRE_FORM
    flags = FQDN_NO_UPDATES | client_flags & FQDN_WIRE_FORM
    if client_flags & FQDN_CLIENT_ASKS_SERVER:
        flags |= FQDN_SERVER_OVERRIDES
    name = dns_name(fqdn) if flags & FQDN_WIRE_FORM else fqdn.removesuffix(".").encode()
    return bytes([flags, 255, 255]) + name  # 255: the two deprecated result codes


def _encode(options: dict[int, bytes], wishes: bytes, room: int) -> bytes:
    """Options as bytes: which ones fit is decided by importance, their order by the client."""
    room -= 1  # the end mark
    fitting = []
    for code, data in options.items():
        if len(data) <= OPTION_MAX_BYTES and 2 + len(data) <= room:
            room -= 2 + len(data)
            fitting.append(code)
    wished = [OPTION_TYPE, *wishes]
    fitting.sort(key=lambda code: wished.index(code) if code in wished else len(wished))
    encoded = b"".join(bytes([code, len(options[code])]) + options[code] for code in fitting)
    return encoded + bytes([OPTION_END])
