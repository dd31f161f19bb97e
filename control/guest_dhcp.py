"""guest_dhcp.py - what a guest asks of its network and what it makes of the answers: DHCPv4, DHCPv6
and router advertisements, the client's side. Bytes in, bytes out; no sockets, no clock.

Theory      A client is asked for the message to send now (again: it is the same until an answer
            moves it on) and is shown what arrives; the last answer is its lease.

                Dhcp4    DISCOVER -> OFFER -> REQUEST -> ACK, or DISCOVER -> ACK where the server
                         does rapid commit (RFC 2131, RFC 4039); a NAK starts over
                Dhcp6    SOLICIT -> ADVERTISE -> REQUEST -> REPLY, or SOLICIT -> REPLY (RFC 8415)

            Router advertisements are acted on by the kernel; `router` reads what the kernel leaves
            to others: name servers, search list, the MTU, whether addresses come by DHCPv6.
Limits      The first server that answers is taken. A lease is not renewed: a guest without a VM is
            a matter of hours. No prefix delegation, no authentication.
Ownership   No state beyond one exchange.
Drops       What is malformed or not for us is ignored: None. Domain names that resolv.conf cannot
            carry are left out.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address

from dataplane.slow import dhcp, dhcpv6, ndp
from dataplane.slow.net import MAC_BROADCAST, build_udp4, parse_udp4

WISHES_4 = bytes(
    (dhcp.OPTION_MASK, dhcp.OPTION_ROUTES, dhcp.OPTION_ROUTER, dhcp.OPTION_DNS)
    + (dhcp.OPTION_DOMAIN, dhcp.OPTION_SEARCH, dhcp.OPTION_MTU, dhcp.OPTION_LEASE)
)  # fmt: skip
WISHES_6 = struct.pack("!HH", dhcpv6.OPTION_DNS, dhcpv6.OPTION_SEARCH)
OPTION6_ORO, OPTION6_ELAPSED = 6, 8
MESSAGE_MAX_BYTES = 1500
NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
POINTERS_MAX = 16

Route = tuple[IPv4Network, IPv4Address]


@dataclass(frozen=True)
class Lease4:
    """What DHCPv4 gave; routes in the order to add them, gateway 0.0.0.0 means on the link."""

    address: IPv4Interface
    routes: tuple[Route, ...] = ()
    dns: tuple[IPv4Address, ...] = ()
    search: tuple[str, ...] = ()
    mtu: int = 0


@dataclass(frozen=True)
class Lease6:
    """What DHCPv6 gave."""

    address: IPv6Address
    dns: tuple[IPv6Address, ...] = ()
    search: tuple[str, ...] = ()


@dataclass(frozen=True)
class Router:
    """What a router advertisement says besides addresses and routes: `prefix` whether it has one to
    make addresses from, `managed` whether DHCPv6 has one, `default` whether it is a way out."""

    default: bool
    managed: bool
    prefix: bool
    dns: tuple[IPv6Address, ...] = ()
    search: tuple[str, ...] = ()
    mtu: int = 0


class Dhcp4:
    """A DHCPv4 client for the interface with address `mac`; `xid` should be random."""

    def __init__(self, mac: bytes, xid: int) -> None:
        self._mac, self._xid = mac, xid
        self._offer: tuple[bytes, bytes] | None = None
        self.lease: Lease4 | None = None

    def frame(self) -> bytes:
        """The Ethernet frame to send now. Answers shall be broadcast: there is no address yet."""
        options = {dhcp.OPTION_CLIENT_ID: b"\1" + self._mac}
        if self._offer is None:
            options[dhcp.OPTION_TYPE] = bytes([dhcp.DISCOVER])
            options[dhcp.OPTION_RAPID_COMMIT] = b""
        else:
            options[dhcp.OPTION_TYPE] = bytes([dhcp.REQUEST])
            options[dhcp.OPTION_REQUESTED], options[dhcp.OPTION_SERVER] = self._offer
        options[dhcp.OPTION_SIZE_MAX] = struct.pack("!H", MESSAGE_MAX_BYTES)
        options[dhcp.OPTION_WISHES] = WISHES_4
        head = (dhcp.BOOTREQUEST, 1, len(self._mac), 0, self._xid, 0, dhcp.FLAG_BROADCAST)
        payload = dhcp.FIXED.pack(*head, *(dhcp.ZERO,) * 4, self._mac, b"", b"") + dhcp.MAGIC
        for code, data in options.items():
            payload += bytes([code, len(data)]) + data
        payload = (payload + bytes([dhcp.OPTION_END])).ljust(dhcp.PAYLOAD_MIN_BYTES, b"\0")
        addrs, ports = (dhcp.ZERO, dhcp.BROADCAST), (dhcp.CLIENT_PORT, dhcp.SERVER_PORT)
        return build_udp4((self._mac, MAC_BROADCAST), addrs, ports, payload)

    def receive(self, frame: bytes) -> bool:
        """Take an Ethernet frame; True when it answered us: `lease`, or a new message to send."""
        datagram = parse_udp4(frame, checksum_trusted=True)  # it may still be uncomputed: a TAP
        if datagram is None or datagram.dport != dhcp.CLIENT_PORT or self.lease is not None:
            return False
        payload = datagram.payload
        if len(payload) < dhcp.FIXED.size + len(dhcp.MAGIC) or payload[0] != dhcp.BOOTREPLY:
            return False
        fields = dhcp.FIXED.unpack_from(payload)
        if fields[4] != self._xid or fields[11][: len(self._mac)] != self._mac:
            return False
        options = _options4(payload[dhcp.FIXED.size + len(dhcp.MAGIC) :])
        if options is None:
            return False
        return self._take(options, given=fields[8])

    def _take(self, options: dict[int, bytes], given: bytes) -> bool:
        kind = options.get(dhcp.OPTION_TYPE)
        if kind == bytes([dhcp.OFFER]) and self._offer is None:
            self._offer = given, options.get(dhcp.OPTION_SERVER, dhcp.ZERO)
            return True
        if kind == bytes([dhcp.NAK]) and self._offer is not None:
            self._offer = None
            return True
        if kind == bytes([dhcp.ACK]):
            self.lease = _lease4(given, options)
            return self.lease is not None
        return False


def _options4(data: bytes) -> dict[int, bytes] | None:
    """All options, pieces put together (RFC 3396); None when one is truncated."""
    options: dict[int, bytes] = {}
    at = 0
    while at < len(data) and data[at] != dhcp.OPTION_END:
        if data[at] == 0:  # pad
            at += 1
            continue
        if at + 1 >= len(data) or at + 2 + data[at + 1] > len(data):
            return None
        end = at + 2 + data[at + 1]
        options[data[at]] = options.get(data[at], b"") + data[at + 2 : end]
        at = end
    return options


def _lease4(given: bytes, options: dict[int, bytes]) -> Lease4 | None:
    try:
        mask = IPv4Address(options.get(dhcp.OPTION_MASK, b"\xff\xff\xff\xff"))
        address = IPv4Interface(f"{IPv4Address(given)}/{mask}")
    except ValueError:
        return None
    if not int(address.ip) or address.ip.is_multicast:
        return None
    return Lease4(
        address,
        _routes(options, address),
        tuple(IPv4Address(part) for part in _parts(options.get(dhcp.OPTION_DNS, b""), 4)),
        _search4(options),
        int.from_bytes(options.get(dhcp.OPTION_MTU, b"")[:2], "big"),
    )


def _routes(options: dict[int, bytes], address: IPv4Interface) -> tuple[Route, ...]:
    """Option 121 replaces option 3 (RFC 3442). A router outside the subnet is on the link."""
    everywhere = IPv4Network("0.0.0.0/0")
    classless = _classless(options.get(dhcp.OPTION_ROUTES, b""))
    if classless:
        return tuple(sorted(classless, key=lambda route: int(route[1]) != 0))
    routers = _parts(options.get(dhcp.OPTION_ROUTER, b""), 4)
    if not routers:
        return ()
    router = IPv4Address(routers[0])
    if router in address.network:
        return ((everywhere, router),)
    return ((IPv4Network(router), IPv4Address(0)), (everywhere, router))


def _classless(data: bytes) -> list[Route]:
    """Option 121: prefix length, as many bytes of the destination as it needs, router."""
    routes = []
    while data:
        size = (data[0] + 7) // 8
        if data[0] > 32 or len(data) < 5 + size:
            return []
        target = data[1 : 1 + size].ljust(4, b"\0")
        router = IPv4Address(data[1 + size : 5 + size])
        routes.append((IPv4Network((target, data[0]), strict=False), router))
        data = data[5 + size :]
    return routes


def _search4(options: dict[int, bytes]) -> tuple[str, ...]:
    """The search list (RFC 3397), else the domain."""
    names = _names(options.get(dhcp.OPTION_SEARCH, b""))
    domain = options.get(dhcp.OPTION_DOMAIN, b"").decode("ascii", "replace").strip("\0.")
    return names or ((domain,) if NAME.fullmatch(domain) else ())


def _parts(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data) - size + 1, size)]


def _names(data: bytes) -> tuple[str, ...]:
    """The usable ones of the domain names in wire form, compressed or not (RFC 1035 4.1.4)."""
    names, at = [], 0
    while at < len(data):
        labels, at = _labels(data, at)
        name = b".".join(labels).decode("ascii", "replace")
        if NAME.fullmatch(name):
            names.append(name)
    return tuple(names)


def _labels(data: bytes, at: int) -> tuple[list[bytes], int]:
    """The labels of the name at `at`, and where the next name begins (the end, if malformed)."""
    labels: list[bytes] = []
    following = -1
    pointers = 0
    while at < len(data) and data[at]:
        size = data[at]
        if size >= 0xC0 and at + 1 < len(data) and pointers < POINTERS_MAX:
            following = at + 2 if following < 0 else following
            at = (size & 0x3F) << 8 | data[at + 1]
            pointers += 1
        elif size < 0x40 and at + size < len(data):
            labels.append(data[at + 1 : at + 1 + size])
            at += 1 + size
        else:
            return [], len(data)
    return labels, at + 1 if following < 0 else following


# ---- IPv6 ---------------------------------------------------------------------------------------


class Dhcp6:
    """A DHCPv6 client for one address; `xid` (24 bits) should be random."""

    def __init__(self, mac: bytes, xid: int) -> None:
        self._xid = xid.to_bytes(3, "big")
        self._client = struct.pack("!HH", 3, 1) + mac  # DUID-LL (RFC 8415 11.4)
        self._association = mac[-4:]
        self._server: bytes | None = None
        self._offered: bytes = b""
        self.lease: Lease6 | None = None

    def message(self) -> bytes:
        """The UDP payload to send now, to ff02::1:2 port 547 from port 546."""
        kind = dhcpv6.SOLICIT if self._server is None else dhcpv6.REQUEST
        body = _option6(dhcpv6.OPTION_CLIENT_ID, self._client)
        if self._server is None:
            body += _option6(dhcpv6.OPTION_RAPID_COMMIT, b"")
        else:
            body += _option6(dhcpv6.OPTION_SERVER_ID, self._server)
        body += _option6(dhcpv6.OPTION_IA_NA, self._association + bytes(8) + self._offered)
        body += _option6(OPTION6_ORO, WISHES_6) + _option6(OPTION6_ELAPSED, bytes(2))
        return bytes([kind]) + self._xid + body

    def receive(self, payload: bytes) -> bool:
        """Take a UDP payload; True when it answered us (`lease`, or another message to send)."""
        listed = dhcpv6.parse_options(payload[4:])
        if payload[1:4] != self._xid or listed is None or self.lease is not None:
            return False
        options = dict(reversed(listed))  # of several, the first one counts
        if options.get(dhcpv6.OPTION_CLIENT_ID) != self._client:
            return False
        address = self._address(options.get(dhcpv6.OPTION_IA_NA, b""))
        server = options.get(dhcpv6.OPTION_SERVER_ID)
        if address is None or server is None:
            return False
        if payload[0] == dhcpv6.ADVERTISE and self._server is None:
            self._server, self._offered = server, _option6(dhcpv6.OPTION_IA_ADDRESS, address)
            return True
        if payload[0] != dhcpv6.REPLY:
            return False
        dns = tuple(map(IPv6Address, _parts(options.get(dhcpv6.OPTION_DNS, b""), 16)))
        search = _names(options.get(dhcpv6.OPTION_SEARCH, b""))
        self.lease = Lease6(IPv6Address(address[:16]), dns, search)
        return True

    def _address(self, association: bytes) -> bytes | None:
        """The first usable address (with its lifetimes) of an IA_NA's contents."""
        inner = dhcpv6.parse_options(association[12:])
        if association[:4] != self._association or inner is None:
            return None
        for code, data in inner:
            usable = len(data) >= 24 and any(data[20:24])  # a valid lifetime of 0 ends an address
            if code == dhcpv6.OPTION_IA_ADDRESS and usable:
                return data[:24]
        return None


def _option6(code: int, data: bytes) -> bytes:
    return struct.pack("!HH", code, len(data)) + data


def router(message: bytes) -> Router | None:
    """Read an ICMPv6 message whose checksum is right; None unless it is a router advertisement."""
    if len(message) < 16 or message[0] != ndp.ROUTER_ADVERTISEMENT or message[1] != 0:
        return None
    dns: list[IPv6Address] = []
    search: tuple[str, ...] = ()
    prefix, mtu = False, 0
    for kind, data in _options_ndp(message[16:]):
        if kind == ndp.OPTION_PREFIX and len(data) == 30:
            prefix = prefix or bool(data[1] & 0x40)  # A: autonomous configuration
        elif kind == ndp.OPTION_MTU and len(data) == 6:
            mtu = int.from_bytes(data[2:6], "big")
        elif kind == ndp.OPTION_RDNSS and any(data[2:6]):  # lifetime
            dns += map(IPv6Address, _parts(data[6:], 16))
        elif kind == ndp.OPTION_DNSSL and any(data[2:6]):
            search += _names(data[6:])
    default = bool(int.from_bytes(message[6:8], "big"))
    return Router(default, bool(message[5] & 0x80), prefix, tuple(dns), search, mtu)


def _options_ndp(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(type, contents) of each option (RFC 4861 4.6), as far as they are well-formed."""
    while len(data) >= 2 and 0 < data[1] * 8 <= len(data):
        yield data[0], data[2 : data[1] * 8]
        data = data[data[1] * 8 :]
