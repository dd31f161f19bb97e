"""dhcpv6.py - a DHCPv6 server with one address to give.

Theory      RFC 8415 with one client, one address and infinite lifetimes: no lease table, each
            message is answered from itself and `Net`. An address other than ours is treated as not
            on this link.

                message              server ID   answer
                SOLICIT              absent      ADVERTISE, or REPLY with rapid commit (option 14)
                REQUEST              ours        REPLY; another address in an IA: NotOnLink
                RENEW                ours        REPLY; another address: its lifetimes become 0
                REBIND               absent      as RENEW
                CONFIRM              absent      REPLY: Success or NotOnLink; without addresses none
                RELEASE, DECLINE     ours        REPLY: Success
                INFORMATION-REQUEST  ours, if    REPLY with configuration only
                                     present
Bindings    The first IA_NA of a message gets the address; further ones and every IA_TA get
            NoAddrsAvail, every IA_PD NoPrefixAvail. Without a host address (`net.addr6` None)
            nobody gets one, but name servers are still handed out. Preference 255 in an ADVERTISE
            ends the client's wait for better servers (18.2.1), a second at boot.
Server ID   DUID-LL of our MAC (11.4): the same as long as --mac-addr is.
Limits      A reply fits in the 1280 bytes every IPv6 link carries: DNS lists are cut to what is
            left, a message whose identity associations alone would not fit is dropped.
Ownership   No state.
Drops       Not UDP to port 547, truncated options, missing or oversized client ID, a server ID
            that is not as in the table, relay messages, an IA in INFORMATION-REQUEST, messages
            that must be multicast and are not (16): None.
"""

import struct
from collections.abc import Iterator

from dataplane.slow.net import (
    IPV6_HEADER_BYTES,
    IPV6_MTU_MIN_BYTES,
    UDP_HEADER_BYTES,
    Net,
    build_udp6,
    dns_name,
    dns_names,
    parse_udp6,
)

SERVER_PORT = 547
CLIENT_PORT = 546

SOLICIT, ADVERTISE, REQUEST, CONFIRM, RENEW, REBIND = 1, 2, 3, 4, 5, 6
REPLY, RELEASE, DECLINE, INFORMATION_REQUEST = 7, 8, 9, 11

OPTION_CLIENT_ID = 1
OPTION_SERVER_ID = 2
OPTION_IA_NA = 3
OPTION_IA_TA = 4
OPTION_IA_ADDRESS = 5
OPTION_PREFERENCE = 7
OPTION_STATUS = 13
OPTION_RAPID_COMMIT = 14
OPTION_DNS = 23  # RFC 3646
OPTION_SEARCH = 24  # RFC 3646
OPTION_IA_PD = 25
OPTION_FQDN = 39  # RFC 4704
IA_HEADER_BYTES = {OPTION_IA_NA: 12, OPTION_IA_TA: 4, OPTION_IA_PD: 12}

SUCCESS, NO_ADDRS_AVAIL, NOT_ON_LINK, USE_MULTICAST, NO_PREFIX_AVAIL = 0, 2, 4, 5, 6

INFINITE = 0xFFFFFFFF
CLIENT_ID_MAX_BYTES = 130  # RFC 8415 11.1: a type of 2 bytes and up to 128
BODY_MAX_BYTES = IPV6_MTU_MIN_BYTES - IPV6_HEADER_BYTES - UDP_HEADER_BYTES - 4
UNSPECIFIED = bytes(16)
FQDN_CLIENT_ASKS_SERVER = 1  # S (RFC 4704 4.1)
FQDN_SERVER_OVERRIDES = 2  # O
FQDN_NO_UPDATES = 4  # N

NAMES_A_SERVER = frozenset({REQUEST, RENEW, RELEASE, DECLINE})
TO_ANY_SERVER = frozenset({SOLICIT, CONFIRM, REBIND})

Options = list[tuple[int, bytes]]


def reply(frame: bytes, net: Net, checksum_trusted: bool = False) -> bytes | None:
    """The Ethernet frame that answers a client's, or None; `checksum_trusted`: see parse_udp4."""
    if not net.ipv6 or net.no_dhcpv6:
        return None
    datagram = parse_udp6(frame, checksum_trusted)
    if datagram is None or datagram.dport != SERVER_PORT or len(datagram.payload) < 4:
        return None
    options = parse_options(datagram.payload[4:])
    if datagram.src[0] == 0xFF or datagram.src == UNSPECIFIED or options is None:
        return None
    answer = _answer(datagram.payload[0], options, datagram.dst[0] == 0xFF, net)
    if answer is None or len(answer[1]) > BODY_MAX_BYTES:
        return None
    kind, body = answer
    macs = (net.our_mac, datagram.src_mac)
    addrs = (net.link_local6.packed, datagram.src)
    message = bytes([kind]) + datagram.payload[1:4] + body
    return build_udp6(macs, addrs, (SERVER_PORT, CLIENT_PORT), message)


def server_id(net: Net) -> bytes:
    """Our DUID (RFC 8415 11.4): type 3, hardware type 1, MAC."""
    return struct.pack("!HH", 3, 1) + net.our_mac


def parse_options(data: bytes) -> Options | None:
    """(code, data) in the order sent, None when one is truncated."""
    options = []
    at = 0
    while at < len(data):
        if at + 4 > len(data):
            return None
        code, length = struct.unpack_from("!HH", data, at)
        if at + 4 + length > len(data):
            return None
        options.append((code, data[at + 4 : at + 4 + length]))
        at += 4 + length
    return options


def _option(code: int, data: bytes) -> bytes:
    return struct.pack("!HH", code, len(data)) + data


def _status(code: int) -> bytes:
    return _option(OPTION_STATUS, code.to_bytes(2, "big"))


def _first(options: Options, code: int) -> bytes | None:
    return next((data for known, data in options if known == code), None)


def _answer(kind: int, options: Options, multicast: bool, net: Net) -> tuple[int, bytes] | None:
    """(message type, options) that answer a message of type `kind`, or None."""
    if not _identified(kind, options, net):
        return None
    client = _first(options, OPTION_CLIENT_ID)
    body = _option(OPTION_SERVER_ID, server_id(net))
    if client is not None:
        body = _option(OPTION_CLIENT_ID, client) + body
    if not multicast:  # RFC 8415 18.4: we never sent the option that allows unicast
        return (REPLY, body + _status(USE_MULTICAST)) if kind in NAMES_A_SERVER else None
    if kind in (RELEASE, DECLINE):
        return REPLY, body + _status(SUCCESS)
    if kind == CONFIRM:
        status = _confirmed(options, net)
        return None if status is None else (REPLY, body + _status(status))
    associations = _associations(kind, options, net)
    if associations is None or (kind == INFORMATION_REQUEST and associations):
        return None
    answer_kind = REPLY
    if kind == SOLICIT and _first(options, OPTION_RAPID_COMMIT) is not None and net.addr6:
        body += _option(OPTION_RAPID_COMMIT, b"")
    elif kind == SOLICIT:
        answer_kind = ADVERTISE
        body += _option(OPTION_PREFERENCE, b"\xff")
    body += associations
    return answer_kind, body + _configuration(options, net, BODY_MAX_BYTES - len(body))


def _identified(kind: int, options: Options, net: Net) -> bool:
    """Whether the message has the client and server IDs its type demands (RFC 8415 16)."""
    client = _first(options, OPTION_CLIENT_ID)
    server = _first(options, OPTION_SERVER_ID)
    if client is not None and not 0 < len(client) <= CLIENT_ID_MAX_BYTES:
        return False
    if kind in NAMES_A_SERVER:
        return client is not None and server == server_id(net)
    if kind in TO_ANY_SERVER:
        return client is not None and server is None
    return kind == INFORMATION_REQUEST and server in (None, server_id(net))


def _addresses(code: int, data: bytes) -> list[bytes] | None:
    """The addresses an IA_NA or IA_TA names, None when it is malformed."""
    options = parse_options(data[IA_HEADER_BYTES[code] :])
    if len(data) < IA_HEADER_BYTES[code] or options is None:
        return None
    addresses = [data for known, data in options if known == OPTION_IA_ADDRESS]
    return None if any(len(data) < 24 for data in addresses) else [data[:16] for data in addresses]


def _confirmed(options: Options, net: Net) -> int | None:
    """Status for a CONFIRM; None (no answer, RFC 8415 18.3.3) when it names no address."""
    named = set()
    for code, data in options:
        if code in (OPTION_IA_NA, OPTION_IA_TA):
            addresses = _addresses(code, data)
            if addresses is None:
                return None
            named.update(addresses)
    if not named:
        return None
    return SUCCESS if net.addr6 is not None and named == {net.addr6.packed} else NOT_ON_LINK


def _associations(kind: int, options: Options, net: Net) -> bytes | None:
    """An answer to every IA of the message, None when one is malformed."""
    answers = b""
    assigned = False
    for code, data in options:
        if code not in IA_HEADER_BYTES:
            continue
        named = _addresses(code, data)
        if named is None:
            return None
        if code == OPTION_IA_NA:
            contents = b"".join(_contents(kind, named, net, assigned))
            header = data[:4] + struct.pack("!II", INFINITE, INFINITE)
            assigned = True
        else:
            contents = _status(NO_PREFIX_AVAIL if code == OPTION_IA_PD else NO_ADDRS_AVAIL)
            header = data[:4] + bytes(IA_HEADER_BYTES[code] - 4)
        answers += _option(code, header + contents)
    return answers


def _contents(kind: int, named: list[bytes], net: Net, assigned: bool) -> Iterator[bytes]:
    """What answers an IA_NA that names these addresses (RFC 8415 18.3.2, 18.3.4, 18.3.9)."""
    ours = None if net.addr6 is None or assigned else net.addr6.packed
    others = [address for address in named if address != ours]
    if kind == REQUEST and ours is not None and others:
        yield _status(NOT_ON_LINK)
        return
    if ours is not None:
        yield _option(OPTION_IA_ADDRESS, ours + struct.pack("!II", INFINITE, INFINITE))
    if kind in (RENEW, REBIND):
        for address in others:
            yield _option(OPTION_IA_ADDRESS, address + bytes(8))
    if ours is None:
        yield _status(NO_ADDRS_AVAIL)


def _configuration(options: Options, net: Net, room: int) -> bytes:
    """Name servers, search list and the guest's name, as far as there is room."""
    configuration = b""
    servers = () if net.no_dhcp_dns else net.dns6[: max(0, room - 4) // 16]
    if servers:
        configuration += _option(OPTION_DNS, b"".join(server.packed for server in servers))
    name = dns_name(net.fqdn)
    if name and len(configuration) + 5 + len(name) <= room:
        asked = _first(options, OPTION_FQDN) or b"\0"
        flags = FQDN_NO_UPDATES
        if asked[0] & FQDN_CLIENT_ASKS_SERVER:
            flags |= FQDN_SERVER_OVERRIDES
        configuration += _option(OPTION_FQDN, bytes([flags]) + name)
    if not net.no_dhcp_search:
        names = dns_names(net.search, room - len(configuration) - 4)
        configuration += _option(OPTION_SEARCH, names) if names else b""
    return configuration
