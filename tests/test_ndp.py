"""Neighbour discovery: answers dissected and checksums recomputed by scapy."""

from ipaddress import IPv6Address

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RA,
    ICMPv6ND_RS,
    ICMPv6NDOptDNSSL,
    ICMPv6NDOptMTU,
    ICMPv6NDOptPrefixInfo,
    ICMPv6NDOptRDNSS,
    ICMPv6NDOptSrcLLAddr,
    IPv6,
    in6_chksum,
)
from scapy.layers.l2 import Ether

from dataplane.slow import replies
from dataplane.slow.ndp import reply, unsolicited_ra
from dataplane.slow.net import Net

# a busy machine is no failure
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

GUEST_MAC = "52:54:00:12:34:56"
GUEST = "fe80::5054:ff:fe12:3456"
OUR_MAC = "56:48:4d:51:00:01"
NET = Net(
    addr6=IPv6Address("2001:db8:1:2::9"),
    gateway6=IPv6Address("fe80::fc"),
    link_local6=IPv6Address("fe80::fc"),
    dns6=(IPv6Address("2001:db8::53"), IPv6Address("fe80::fc")),
    search=("corp.example", "example.org."),
    mtu=65520,
)


def solicit_router(src=GUEST, options=None):
    options = ICMPv6NDOptSrcLLAddr(lladdr=GUEST_MAC) if options is None else options
    ether = Ether(src=GUEST_MAC, dst="33:33:00:00:00:02")
    return ether / IPv6(src=src, dst="ff02::2", hlim=255) / ICMPv6ND_RS() / options


def solicit_neighbour(target, src=GUEST, dst="ff02::1:ff00:fc", options=None):
    options = ICMPv6NDOptSrcLLAddr(lladdr=GUEST_MAC) if options is None else options
    ether = Ether(src=GUEST_MAC, dst="33:33:ff:00:00:fc")
    return ether / IPv6(src=src, dst=dst, hlim=255) / ICMPv6ND_NS(tgt=target) / options


def dissect(frame):
    """The reply as scapy sees it, after what holds for every reply."""
    packet = Ether(frame)
    assert (packet.src, packet[IPv6].hlim, packet[IPv6].version) == (OUR_MAC, 255, 6)
    assert packet[IPv6].plen == len(bytes(packet[IPv6].payload)) == len(frame) - 54
    assert in6_chksum(58, packet[IPv6], bytes(packet[IPv6].payload)) == 0
    return packet


def options_of(packet):
    """The classes of the options in an advertisement, in order; they end where the message does."""
    message = packet[ICMPv6ND_RA]
    data, at = bytes(message)[16:], 0
    while at < len(data):
        assert data[at + 1] > 0
        at += data[at + 1] * 8
    assert at == len(data) and message.res == 0
    return [layer for layer in packet.layers() if layer.__name__.startswith("ICMPv6NDOpt")]


@pytest.mark.parametrize("target", ["fe80::fc", "2001:db8:1:2::1", "2001:db8:ffff::1", "fe80::77"])
def test_any_neighbour_is_us(target):
    frame = bytes(solicit_neighbour(target))
    packet = dissect(reply(frame, NET))
    assert (packet.dst, packet[IPv6].src, packet[IPv6].dst) == (GUEST_MAC, "fe80::fc", GUEST)
    advertisement = packet[ICMPv6ND_NA]
    assert (advertisement.R, advertisement.S, advertisement.O, advertisement.res) == (1, 1, 1, 0)
    assert (advertisement.tgt, advertisement.code) == (target, 0)
    option = advertisement.payload
    assert (option.type, option.len, option.lladdr) == (2, 1, OUR_MAC)
    assert replies(frame, NET) == [bytes(packet)]


def test_unicast_probe_without_options():
    """Neighbour unreachability detection (RFC 4861 7.3) asks us directly."""
    probe = solicit_neighbour("fe80::fc", dst="fe80::fc", options=b"")
    assert dissect(reply(bytes(probe), NET))[ICMPv6ND_NA].tgt == "fe80::fc"


@pytest.mark.parametrize(
    "target, src",
    [
        ("2001:db8:1:2::9", GUEST),  # the address we gave it
        ("2001:db8:1:2::77", "::"),  # duplicate address detection
        ("2001:db8:1:2::9", "::"),
        (GUEST, GUEST),
        ("ff02::1", GUEST),
        ("fe80::fc", "ff02::1"),
    ],
)
def test_no_neighbour_advertisement(target, src):
    options = b"" if src == "::" else None
    assert reply(bytes(solicit_neighbour(target, src=src, options=options)), NET) is None


def test_router_advertisement():
    frame = bytes(solicit_router())
    packet = dissect(reply(frame, NET))
    assert (packet.dst, packet[IPv6].src, packet[IPv6].dst) == (GUEST_MAC, "fe80::fc", GUEST)
    advertisement = packet[ICMPv6ND_RA]
    assert (advertisement.M, advertisement.O, advertisement.prf, advertisement.code) == (1, 1, 0, 0)
    assert (advertisement.chlim, advertisement.routerlifetime) == (64, 65535)
    assert (advertisement.reachabletime, advertisement.retranstimer) == (0, 0)
    assert options_of(packet) == [
        ICMPv6NDOptSrcLLAddr,
        ICMPv6NDOptPrefixInfo,
        ICMPv6NDOptMTU,
        ICMPv6NDOptRDNSS,
        ICMPv6NDOptDNSSL,
    ]
    assert packet[ICMPv6NDOptSrcLLAddr].lladdr == OUR_MAC
    prefix = packet[ICMPv6NDOptPrefixInfo]
    assert (prefix.prefix, prefix.prefixlen) == ("2001:db8:1:2::", 64)
    assert (prefix.L, prefix.A, prefix.R, prefix.res1, prefix.res2) == (1, 1, 0, 0, 0)
    assert prefix.validlifetime == prefix.preferredlifetime == 0xFFFFFFFF
    assert (prefix.len, packet[ICMPv6NDOptMTU].mtu) == (4, 65520)
    servers = packet[ICMPv6NDOptRDNSS]
    assert (servers.len, servers.dns, servers.lifetime) == (
        5,
        ["2001:db8::53", "fe80::fc"],
        0xFFFFFFFF,
    )
    domains = packet[ICMPv6NDOptDNSSL]
    assert [name.rstrip(".") for name in domains.searchlist if name.strip(".")] == [
        "corp.example",
        "example.org",
    ]
    assert domains.len == 5  # 8 + 14 + 13 bytes, and padding to a multiple of 8
    assert replies(frame, NET) == [bytes(packet)]


def test_router_solicitation_without_a_source_address():
    """RFC 4861 6.2.6: the answer goes to all nodes; 6.1.1: the question may not tell a MAC."""
    packet = dissect(reply(bytes(solicit_router(src="::", options=b"")), NET))
    assert (packet.dst, packet[IPv6].dst) == ("33:33:00:00:00:01", "ff02::1")
    assert bytes(packet) == unsolicited_ra(NET)
    assert reply(bytes(solicit_router(src="::")), NET) is None


@pytest.mark.parametrize(
    "changes, managed, other, options",
    [
        ({"no_dhcpv6": True}, 0, 0, 5),
        ({"mtu": 0}, 1, 1, 4),
        ({"mtu": 1279}, 1, 1, 4),
        ({"mtu": 1280}, 1, 1, 5),
        ({"dns6": ()}, 1, 1, 4),
        ({"no_dhcp_dns": True}, 1, 1, 4),
        ({"no_dhcp_search": True}, 1, 1, 4),
        ({"search": ("x" * 64, "with space.ok", "", ".", "ünïcode")}, 1, 1, 5),
        ({"search": ("x" * 64, "", ".", "ünïcode")}, 1, 1, 4),
        ({"addr6": None}, 0, 1, 4),
    ],
)
def test_what_is_advertised(changes, managed, other, options):
    packet = dissect(unsolicited_ra(NET.replaced(**changes)))
    advertisement = packet[ICMPv6ND_RA]
    assert (advertisement.M, advertisement.O) == (managed, other)
    assert len(options_of(packet)) == options


def test_local_mode_advertises_no_way_out():
    packet = dissect(reply(bytes(solicit_router()), Net()))
    assert packet[IPv6].src == "fe80::1"
    assert packet[ICMPv6ND_RA].routerlifetime == 0
    assert options_of(packet) == [ICMPv6NDOptSrcLLAddr]


@pytest.mark.parametrize("switch", [{"no_ndp": True}, {"ipv6": False}])
def test_switched_off(switch):
    net = NET.replaced(**switch)
    assert reply(bytes(solicit_router()), net) is None
    assert reply(bytes(solicit_neighbour("fe80::fc")), net) is None
    assert unsolicited_ra(net) is None


def test_no_ra_leaves_neighbours():
    net = NET.replaced(no_ra=True)
    assert reply(bytes(solicit_router()), net) is None
    assert unsolicited_ra(net) is None
    assert reply(bytes(solicit_neighbour("fe80::fc")), net) is not None


def test_long_lists_are_cut_to_the_minimum_mtu():
    many = tuple(IPv6Address(f"2001:db8::{number:x}") for number in range(300))
    names = tuple(f"domain-{number}.example" for number in range(300))
    for net in (
        NET.replaced(dns6=many),
        NET.replaced(search=names),
        NET.replaced(dns6=many, search=names),
    ):
        frame = unsolicited_ra(net)
        assert 1100 < len(frame) <= 14 + 1280
        packet = dissect(frame)
        servers = packet[ICMPv6NDOptRDNSS].dns
        assert servers == [str(server) for server in net.dns6[: len(servers)]]
        options_of(packet)
    sizes = set()
    for count in range(80):
        for last in ("a", "a" * 8):
            search = (*names[:count], last)
            packet = dissect(unsolicited_ra(NET.replaced(dns6=many[: 1 + count], search=search)))
            assert len(options_of(packet)) in (4, 5)
            sizes.add(len(packet))
    assert 14 + 1280 - 8 < max(sizes) <= 14 + 1280


@pytest.mark.parametrize("question", [solicit_router(), solicit_neighbour("fe80::fc")])
class TestRefusals:
    """RFC 4861 6.1.1 and 7.1.1, one doubt at a time."""

    def test_hop_limit(self, question):
        for hop_limit in (0, 1, 64, 254):
            changed = question.copy()
            changed[IPv6].hlim = hop_limit
            assert reply(bytes(changed), NET) is None

    def test_code(self, question):
        changed = question.copy()
        changed[IPv6].payload.code = 1
        assert reply(bytes(changed), NET) is None

    def test_checksum(self, question):
        changed = question.copy()
        changed[IPv6].payload.cksum = 0x1234
        assert reply(bytes(changed), NET) is None
        assert reply(bytes(changed), NET, checksum_trusted=True) == reply(bytes(question), NET)

    @pytest.mark.parametrize(
        "options",
        [b"\x01\x00", b"\x01\x00" * 4, b"\x01", b"\x01\x02" + b"x" * 6, b"\x01\x01abcdef\xfd"],
    )
    def test_options(self, question, options):
        """Length 0 (an endless loop for the careless), and options beyond the end."""
        changed = question.copy()
        changed[IPv6].payload.remove_payload()
        assert reply(bytes(changed / options), NET) is None
        assert reply(bytes(changed / b"\xfd\x01abcdef"), NET) is not None

    def test_every_truncation(self, question):
        frame = bytes(question)
        for length in range(len(frame)):
            assert reply(frame[:length], NET) is None

    def test_trailing_bytes_do_not_matter(self, question):
        assert reply(bytes(question) + b"\xff" * 7, NET) == reply(bytes(question), NET)


def test_short_messages_with_right_lengths():
    for cut in (solicit_router(options=b""), solicit_neighbour("fe80::fc", options=b"")):
        body = bytes(cut[IPv6].payload)
        for length in range(len(body)):
            packet = IPv6(src=GUEST, dst="ff02::2", hlim=255, nh=58) / body[:length]
            frame = bytes(Ether(src=GUEST_MAC, dst=OUR_MAC) / packet)
            assert reply(frame, NET, checksum_trusted=True) is None


def test_other_icmpv6_is_not_ours():
    ip = IPv6(src=GUEST, dst="fe80::fc", hlim=255)
    echo = Ether(src=GUEST_MAC, dst=OUR_MAC) / ip / ICMPv6EchoRequest()
    assert reply(bytes(echo), NET) is None
    assert replies(bytes(echo), NET) == []
    assert reply(reply(bytes(solicit_router()), NET), NET) is None
    assert reply(reply(bytes(solicit_neighbour("fe80::fc")), NET), NET) is None


VALID = [bytes(solicit_router()), bytes(solicit_neighbour("fe80::fc"))]


def test_longest_frame():
    """Beyond 2048 bytes nothing is parsed: no guest can make us work on more."""
    assert reply(VALID[0].ljust(2048, b"\0"), NET) is not None
    assert reply(VALID[0].ljust(2049, b"\0"), NET) is None


@unhurried
@given(st.binary(max_size=200))
def test_random_bytes_never_raise(data):
    icmp6 = VALID[0][:14] + b"\x60\0\0\0" + len(data).to_bytes(2, "big") + b"\x3a\xff"
    for frame in (data, VALID[0][:14] + data, icmp6 + VALID[0][22:54] + data):
        for trusted in (False, True):
            answer = reply(frame, NET, trusted)
            assert answer is None or dissect(answer)
            assert replies(frame, NET, trusted) == ([] if answer is None else [answer])


@unhurried
@given(
    st.sampled_from(VALID),
    st.lists(st.tuples(st.integers(0, 85), st.integers(0, 255)), max_size=8),
    st.binary(max_size=40),
    st.integers(0, 130),
)
def test_mutated_solicitations_never_raise(valid, changes, more, length):
    frame = bytearray(valid + more)
    frame[18:20] = (len(frame) - 54).to_bytes(2, "big")
    for at, value in changes:
        frame[at % len(frame)] = value
    answer = reply(bytes(frame[:length]), NET, checksum_trusted=True)
    assert answer is None or dissect(answer)
