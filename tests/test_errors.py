"""ICMP errors for the guest, from real sockets with real errors; scapy is the judge.

Closed ports are tried on the loopback of wherever this runs. Everything else happens in a network
namespace (`world`): errors of routers are sent by hand, from any address, through a raw socket, and
reach the socket under test through the kernel like any other.
"""

from __future__ import annotations

import select
import socket
import struct
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

import pytest
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6EchoRequest,
    ICMPv6PacketTooBig,
    ICMPv6ParamProblem,
    ICMPv6TimeExceeded,
    IPv6,
)
from scapy.layers.l2 import Ether
from world import FAR4, FAR6, HOST4, HOST6

from dataplane.slow.errors import ERRORS_MAX, replies
from dataplane.slow.net import Net
from shm.layout import View
from shm.schema import FLOW, PROTOCOLS

MAC = bytes.fromhex("525400123456")
NET = Net(
    addr4=IPv4Address(HOST4),
    our_addr4=IPv4Address("198.51.100.1"),
    addr6=IPv6Address(HOST6),
    map_host_loopback4=IPv4Address("198.51.100.1"),
)
GUEST = {4: "198.51.100.2", 6: "2001:db8:1::2"}
FAR = {4: "203.0.113.5", 6: "2001:db8:9::5"}  # what the guest calls the other end
ROUTER = {4: "203.0.113.77", 6: "2001:db8:9::77"}
GUEST_PORT, FAR_PORT = 40123, 53
NEIGHBOUR = {4: "198.51.100.200", 6: "2001:db8:1::200"}  # on the link, answers nothing


def packed(address: str) -> bytes:
    made = ip_address(address)
    return (bytes(10) + b"\xff\xff" if made.version == 4 else b"") + made.packed


def flow(sock: socket.socket, version: int, protocol: str = "udp") -> View:
    """The entry of a flow with this socket, between GUEST and FAR."""
    entry = View(FLOW, bytearray(FLOW.size), 0)
    entry.set_bytes("guest_addr", packed(GUEST[version]))
    entry.set_bytes("far_addr", packed(FAR[version]))
    entry["guest_port"] = GUEST_PORT
    entry["far_port"] = FAR_PORT if protocol == "udp" else 0
    entry["protocol"] = PROTOCOLS.index(protocol)
    entry["fd"] = sock.fileno()
    return entry


def ready(sock: socket.socket, version: int, host: str, port: int = 0) -> socket.socket:
    """Errors on, not blocking, connected: as dataplane/sockets.py and udp.py do."""
    sock.setblocking(False)
    if version == 4:
        sock.setsockopt(socket.IPPROTO_IP, 11, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IPV6, 25, 1)
    sock.connect((host, port))
    return sock


def wait_for_error(sock: socket.socket) -> None:
    poll = select.poll()
    poll.register(sock, 0)
    assert poll.poll(5000), "no error came"


def judged(frame: bytes, version: int, source: str) -> IP | IPv6:
    """The IP packet of an error for the guest, everything outside the quoted packet checked."""
    ether = Ether(frame)
    assert (ether.dst, ether.src) == ("52:54:00:12:34:56", "56:48:4d:51:00:01")
    packet = ether[IP] if version == 4 else ether[IPv6]
    assert (packet.src, packet.dst) == (source, GUEST[version])
    rebuilt = packet.copy()
    if version == 4:
        assert ether.type == 0x0800 and packet.proto == 1
        assert len(frame) == 14 + packet.len == 14 + 20 + 8 + 28
        del rebuilt.chksum, rebuilt[ICMP].chksum
    else:
        assert ether.type == 0x86DD and packet.nh == 58
        assert len(frame) == 14 + 40 + packet.plen <= 14 + 1280
        del rebuilt.payload.cksum
    assert bytes(rebuilt) == bytes(packet), "a checksum is wrong"
    return packet


def expected_quote(version: int, payload: bytes, protocol: str = "udp") -> bytes:
    """The packet the guest sent, as scapy makes it, cut as far as an error quotes it."""
    if protocol == "udp":
        l4 = UDP(sport=GUEST_PORT, dport=FAR_PORT) / payload
    elif version == 4:
        l4 = ICMP(type=8, id=GUEST_PORT, seq=7) / payload
    else:
        l4 = ICMPv6EchoRequest(id=GUEST_PORT, seq=7, data=payload)
    if version == 4:
        return bytes(IP(src=GUEST[4], dst=FAR[4], ttl=64, id=0, flags="DF") / l4)[:28]
    hops = 64 if protocol == "udp" else 255
    return bytes(IPv6(src=GUEST[6], dst=FAR[6], hlim=hops) / l4)[: 1280 - 40 - 8]


def quote_of(packet: IP | IPv6) -> bytes:
    return bytes(packet)[28:] if packet.version == 4 else bytes(packet)[48:]


# --- closed ports on loopback ---------------------------------------------------------------------


def closed_port(version: int) -> tuple[socket.socket, int]:
    """A loopback UDP port nobody listens on, kept from others by a socket that never receives."""
    family, host = (socket.AF_INET, "127.0.0.1") if version == 4 else (socket.AF_INET6, "::1")
    holder = socket.socket(family, socket.SOCK_STREAM)
    holder.bind((host, 0))
    return holder, holder.getsockname()[1]


@pytest.mark.parametrize("size", [0, 1, 12, 500, 2000])
@pytest.mark.parametrize("version", [4, 6])
def test_closed_port(version, size):
    family, host = (socket.AF_INET, "127.0.0.1") if version == 4 else (socket.AF_INET6, "::1")
    holder, port = closed_port(version)
    payload = bytes(range(256)) * 8
    with holder, ready(socket.socket(family, socket.SOCK_DGRAM), version, host, port) as sock:
        sock.send(payload[:size])
        wait_for_error(sock)
        (frame,) = replies(flow(sock, version), NET, MAC)
        packet = judged(frame, version, source=FAR[version])
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        assert replies(flow(sock, version), NET, MAC) == [], "an error is told once"
    if version == 4:
        assert (packet[ICMP].type, packet[ICMP].code) == (3, 3)
        quoted = payload[: min(size, 576 - 28 - 28)]  # what Linux quotes (RFC 1812 4.3.2.3)
    else:
        assert (packet.payload.type, packet.payload.code) == (1, 4)
        quoted = payload[: min(size, 1280 - 48 - 48)]
    assert quote_of(packet) == expected_quote(version, quoted)


def test_no_error_no_frame():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        ready(sock, 4, "127.0.0.1", sock.getsockname()[1])
        assert replies(flow(sock, 4), NET, MAC) == []
        sock.send(b"the socket is still open")
        assert sock.recv(100) == b"the socket is still open"


# --- errors by hand -------------------------------------------------------------------------------


class Wire:
    """A connected socket in the namespace, and a raw one that plays the routers on its way."""

    def __init__(self, world, version: int, protocol: str = "udp", host: str | None = None):
        if not world.isolated:
            pytest.skip("needs a network namespace of its own")
        self.version, self.protocol = version, protocol
        self.host = host or (FAR4 if version == 4 else FAR6)
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        icmp = 1 if version == 4 else 58
        made = world.run(socket.socket, family, socket.SOCK_DGRAM, 0 if protocol == "udp" else icmp)
        self.sock = ready(made, version, self.host, 5353 if protocol == "udp" else 0)
        self.raw = world.run(socket.socket, family, socket.SOCK_RAW, socket.IPPROTO_RAW)
        self.local, self.port = self.sock.getsockname()[:2]

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()
        self.raw.close()

    def sent(self, payload: bytes) -> IP | IPv6:
        """The packet the socket would have sent."""
        if self.protocol == "udp":
            l4 = UDP(sport=self.port, dport=5353) / payload
        elif self.version == 4:
            l4 = ICMP(type=8, id=self.port, seq=7) / payload
        else:
            l4 = ICMPv6EchoRequest(id=self.port, seq=7, data=payload)
        layer = IP if self.version == 4 else IPv6
        return layer(src=self.local, dst=self.host) / l4

    def complain(self, error, payload: bytes, source: str | None = None) -> None:
        """A router sends `error` about a packet of the socket."""
        source = source or ROUTER[self.version]
        layer = IP if self.version == 4 else IPv6
        packet = bytes(layer(src=source, dst=self.local) / error / bytes(self.sent(payload)))
        self.raw.sendto(packet, (self.local, 0))

    def frames(self) -> list[bytes]:
        wait_for_error(self.sock)
        return replies(flow(self.sock, self.version, self.protocol), NET, MAC)


@pytest.mark.parametrize("protocol", ["udp", "icmp"])
@pytest.mark.parametrize(
    ("version", "error", "rest"),
    [
        (4, ICMP(type=3, code=0), 0),
        (4, ICMP(type=3, code=1), 0),
        (4, ICMP(type=3, code=13), 0),
        (4, ICMP(type=3, code=4, nexthopmtu=1400), 1400),
        (4, ICMP(type=11, code=0), 0),
        (6, ICMPv6DestUnreach(code=0), 0),
        (6, ICMPv6DestUnreach(code=1), 0),
        (6, ICMPv6PacketTooBig(mtu=1400), 1400),
        (6, ICMPv6TimeExceeded(code=0), 0),
    ],
)
def test_a_router_complains(world, protocol, version, error, rest):
    payload = bytes(range(200))
    with Wire(world, version, protocol) as wire:
        wire.complain(error, payload)
        (frame,) = wire.frames()
    packet = judged(frame, version, source=ROUTER[version])
    icmp = bytes(packet)[20:] if version == 4 else bytes(packet)[40:]
    assert (icmp[0], icmp[1]) == (error.type, error.code)
    assert int.from_bytes(icmp[4:8], "big") == rest
    assert quote_of(packet) == expected_quote(version, payload, protocol)


@pytest.mark.parametrize("version", [4, 6])
def test_a_quote_longer_than_allowed(world, version):
    """What goes to the guest fits 1280 bytes (RFC 4443 2.4), 56 bytes for IPv4."""
    error = ICMP(type=3, code=1) if version == 4 else ICMPv6DestUnreach(code=3)
    payload = (bytes(range(256)) * 6)[:1290]
    with Wire(world, version) as wire:
        wire.complain(error, payload)
        (frame,) = wire.frames()
    packet = judged(frame, version, ROUTER[version])
    assert quote_of(packet) == expected_quote(version, payload)
    assert len(packet) == (56 if version == 4 else 1280)


@pytest.mark.parametrize("version", [4, 6])
def test_a_quote_without_payload(world, version):
    """RFC 792 asks for 8 bytes only: the UDP header and nothing else."""
    error = ICMP(type=3, code=1) if version == 4 else ICMPv6DestUnreach(code=3)
    with Wire(world, version) as wire:
        wire.complain(error, b"")
        (frame,) = wire.frames()
    assert quote_of(judged(frame, version, ROUTER[version])) == expected_quote(version, b"")


@pytest.mark.parametrize(
    ("version", "error"),
    [(4, ICMP(type=12, code=0, ptr=9)), (6, ICMPv6ParamProblem(code=1, ptr=6))],
)
def test_errors_that_are_not_passed_on(world, version, error):
    """A parameter problem points into a header that was not the guest's."""
    with Wire(world, version) as wire:
        wire.complain(error, b"abc")
        assert wire.frames() == []


@pytest.mark.parametrize(
    ("version", "offender", "changes", "seen_as"),
    [
        (4, "127.0.0.1", {}, "198.51.100.1"),
        (4, "127.0.0.1", {"map_host_loopback4": IPv4Address("192.0.2.99")}, "192.0.2.99"),
        (4, "127.0.0.1", {"map_host_loopback4": None}, "198.51.100.1"),
        (4, HOST4, {}, "198.51.100.1"),
        (4, HOST4, {"map_guest_addr4": IPv4Address("192.0.2.98")}, "192.0.2.98"),
        (4, FAR4, {}, FAR[4]),
        (6, "::1", {}, "fe80::1"),
        (6, "::1", {"map_host_loopback6": IPv6Address("2001:db8::99")}, "2001:db8::99"),
        (6, HOST6, {}, "fe80::1"),
        (6, HOST6, {"gateway6": IPv6Address("2001:db8:1::1")}, "2001:db8:1::1"),
        (6, HOST6, {"map_guest_addr6": IPv6Address("2001:db8::98")}, "2001:db8::98"),
        (6, FAR6, {}, FAR[6]),
    ],
)
def test_the_complainer_is_named_as_the_guest_knows_it(world, version, offender, changes, seen_as):
    error = ICMP(type=3, code=1) if version == 4 else ICMPv6DestUnreach(code=3)
    with Wire(world, version) as wire:
        wire.complain(error, b"abc", source=offender)
        wait_for_error(wire.sock)
        net = Net(**{**vars(NET), **changes})
        (frame,) = replies(flow(wire.sock, version), net, MAC)
    judged(frame, version, source=seen_as)


def test_a_flood_of_errors_is_bounded(world):
    """Every call does a bounded share; the errors keep their order."""
    with Wire(world, 4) as wire:
        for number in range(ERRORS_MAX + 5):
            wire.complain(ICMP(type=3, code=number % 3), b"abc")
        first, second = wire.frames(), wire.frames()
    assert (len(first), len(second)) == (ERRORS_MAX, 5)
    codes = [judged(frame, 4, ROUTER[4])[ICMP].code for frame in first + second]
    assert codes == [number % 3 for number in range(ERRORS_MAX + 5)]


def test_errors_of_another_family_and_odd_kinds_are_ignored(monkeypatch):
    """What the kernel may queue besides: time stamps, zero-copy notes, other messages."""
    from dataplane.slow import errors

    def extended(errno: int, origin: int, kind: int, code: int, sockaddr: bytes = b"") -> bytes:
        return struct.pack("=IBBBBII", errno, origin, kind, code, 0, 1400, 0) + sockaddr

    class Fake:
        def __init__(self, fileno: int) -> None:
            self.left = [
                (0, 11, extended(0, 4, 0, 0)),
                (0, 11, extended(113, 1, 0, 0)),
                (0, 11, extended(111, 3, 1, 4)),
                (0, 8, bytes(12)),
                (1, 29, bytes(16)),
                (0, 11, extended(90, 1, 0, 0, bytes(16))),
            ]

        def recvmsg(self, *_: int):
            if not self.left:
                raise BlockingIOError
            return b"", [self.left.pop(0)], 0, ("192.0.2.7", 5353)

        def detach(self) -> None:
            pass

    monkeypatch.setattr(errors.socket, "socket", Fake)
    entry = View(FLOW, bytearray(FLOW.size), 0)
    entry.set_bytes("guest_addr", packed(GUEST[4]))
    entry.set_bytes("far_addr", packed(FAR[4]))
    entry["protocol"] = PROTOCOLS.index("udp")
    (frame,) = replies(entry, NET, MAC)
    packet = judged(frame, 4, source=str(NET.our_addr4))
    assert (packet[ICMP].type, packet[ICMP].code, packet[ICMP].nexthopmtu) == (3, 4, 1400)


# --- errors the kernel finds by itself ------------------------------------------------------------


NEIGHBOUR_SETTINGS = [
    f"/proc/sys/net/ipv{version}/neigh/up0/{name}"
    for version in (4, 6)
    for name in ("mcast_solicit", "retrans_time_ms")
]


def exchange(values: list[str]) -> list[str]:
    """Set how long the kernel asks for a neighbour; the values before."""
    before = [Path(path).read_text() for path in NEIGHBOUR_SETTINGS]
    for path, value in zip(NEIGHBOUR_SETTINGS, values, strict=True):
        Path(path).write_text(value)
    return before


@pytest.fixture
def hasty_world(world):
    """A host that gives up on a silent neighbour at once instead of after three seconds."""
    if not world.isolated:
        pytest.skip("needs a network namespace of its own")
    before = world.run(exchange, ["1", "20"] * 2)
    yield world
    world.run(exchange, before)


@pytest.mark.parametrize("protocol", ["udp", "icmp"])
@pytest.mark.parametrize("version", [4, 6])
def test_a_silent_neighbour(hasty_world, version, protocol):
    """The host itself says: host unreachable. It names itself, which the guest would take for its
    own address."""
    with Wire(hasty_world, version, protocol, host=NEIGHBOUR[version]) as wire:
        echo = bytes(ICMP(type=8, seq=7)) if version == 4 else bytes(ICMPv6EchoRequest(seq=7))
        payload = b"0123456789abcdef"
        wire.sock.send(payload if protocol == "udp" else echo + payload)
        (frame,) = wire.frames()
    packet = judged(frame, version, source="198.51.100.1" if version == 4 else "fe80::1")
    icmp = bytes(packet)[20:] if version == 4 else bytes(packet)[40:]
    assert (icmp[0], icmp[1]) == ((3, 1) if version == 4 else (1, 3))
    assert quote_of(packet) == expected_quote(version, payload, protocol)


@pytest.mark.parametrize("version", [4, 6])
def test_a_datagram_too_long_for_a_known_path(world, version):
    """A socket that must not fragment is told the MTU by its own kernel: the guest is, too."""
    host = NEIGHBOUR[version]
    with Wire(world, version, host=host) as wire:
        if version == 4:
            wire.sock.setsockopt(socket.IPPROTO_IP, 10, 2)  # IP_MTU_DISCOVER, IP_PMTUDISC_DO
        else:
            wire.sock.setsockopt(socket.IPPROTO_IPV6, 62, 1)  # IPV6_DONTFRAG
        with pytest.raises(OSError):
            wire.sock.send(bytes(3000))
        (frame,) = wire.frames()
    packet = judged(frame, version, source="198.51.100.1" if version == 4 else "fe80::1")
    if version == 4:
        assert (packet[ICMP].type, packet[ICMP].code, packet[ICMP].nexthopmtu) == (3, 4, 1500)
    else:
        assert (packet.payload.type, packet.payload.mtu) == (2, 1500)
    assert quote_of(packet) == expected_quote(version, b"")
