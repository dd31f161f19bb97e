"""Address classes and mappings, held against Python's ipaddress and a table of cases."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from compiled import Leaves, area
from hypothesis import given
from hypothesis import strategies as st

from shm.layout import View
from shm.schema import NET

A = Leaves("flows.address")
NET_AT, NET_BYTES = area(4096)
SCRATCH, SCRATCH_BYTES = area(4096)
LEFT, RIGHT, TARGET = SCRATCH, SCRATCH + 16, SCRATCH + 32

SOME4 = ["0.0.0.0", "0.0.0.1", "1.0.0.0", "126.255.255.255", "127.0.0.1", "127.255.255.255",
         "128.0.0.0", "169.254.2.1", "192.0.2.1", "223.255.255.255", "224.0.0.1", "239.1.1.1",
         "240.0.0.1", "255.255.255.255"]  # fmt: skip
SOME6 = ["::", "::1", "::2", "::1:0:0:1", "::7f00:1", "1::1", "2001:db8::1", "fe7f::1", "fe80::1",
         "febf::1", "fec0::1", "fc00::1", "ff02::1", "ffff::1", "64:ff9b::7f00:1", "0:0:0:1::",
         "::fffe:127.0.0.1", "0:0:1::ffff:127.0.0.1"]  # fmt: skip
ADDRESSES = st.one_of(
    st.sampled_from(SOME4 + SOME6).map(ip_address), st.ip_addresses(v=4), st.ip_addresses(v=6)
)


def packed(address: IPv4Address | IPv6Address | str | None) -> bytes:
    if address is None:
        return bytes(16)
    address = ip_address(address)
    mapped = bytes(10) + b"\xff\xff" if address.version == 4 else b""
    return mapped + address.packed


def put(at: int, address: IPv4Address | IPv6Address | str | None) -> int:
    SCRATCH_BYTES[at - SCRATCH : at - SCRATCH + 16] = packed(address)
    return at


def got() -> str | None:
    """The address the leaf has stored at TARGET."""
    data = SCRATCH_BYTES[32:48]
    if not any(data):
        return None
    mapped = IPv6Address(data).ipv4_mapped
    return str(mapped or IPv6Address(data))


# --- classes --------------------------------------------------------------------------------------


@given(ADDRESSES)
def test_classes(address):
    if getattr(address, "ipv4_mapped", None):
        address = address.ipv4_mapped
    put(LEFT, address)
    v4 = address.version == 4
    assert A.is_v4(LEFT) == v4
    assert A.is_set(LEFT) == (v4 or int(address) != 0)
    assert A.is_link_local(LEFT) == (not v4 and address.is_link_local)
    assert A.is_loopback(LEFT) == address.is_loopback
    this_network = v4 and int(address) >> 24 == 0
    bad = this_network or address.is_multicast or address.is_unspecified or address.is_loopback
    assert A.is_unicast(LEFT) == (not bad and not (v4 and int(address) >> 28 == 15))


@given(ADDRESSES, ADDRESSES)
def test_same(left, right):
    put(LEFT, left)
    put(RIGHT, right)
    assert A.same(LEFT, RIGHT) == (packed(left) == packed(right) and any(packed(left)))
    put(RIGHT, left)
    assert A.same(LEFT, RIGHT) == any(packed(left))


@pytest.mark.parametrize("byte", range(16))
def test_same_looks_at_every_byte(byte):
    put(LEFT, "2001:db8::1")
    put(RIGHT, "2001:db8::1")
    SCRATCH_BYTES[16 + byte] ^= 0x80
    assert A.same(LEFT, RIGHT) == 0
    assert A.is_v4(put(LEFT, "10.0.0.1")) == 1
    SCRATCH_BYTES[byte] ^= 1
    assert A.is_v4(LEFT) == (byte >= 12)


# --- mappings -------------------------------------------------------------------------------------

PLAIN = {
    "guest4": "192.0.2.7", "guest6": "2001:db8::7",
    "our4": "192.0.2.1", "our6": None, "our6_local": "fe80::1",
}  # fmt: skip
FULL = PLAIN | {
    "loopback4": "192.0.2.1", "loopback6": "2001:db8::1",
    "map_guest4": "192.0.2.70", "map_guest6": "2001:db8::70",
    "dns_forward4": "192.0.2.53", "dns_forward6": "2001:db8::53",
    "dns_host4": "127.0.0.53", "dns_host6": "2001:4860:4860::8888",
}  # fmt: skip


def configure(addresses: dict[str, str | None]) -> int:
    NET_BYTES[: NET.size] = bytes(NET.size)
    view = View(NET, NET_BYTES, 0)
    for name, address in addresses.items():
        view.set_bytes(name, packed(address))
    return NET_AT


@pytest.mark.parametrize(
    ("changes", "far", "port", "host"),
    [
        ({}, "192.0.2.1", 80, "127.0.0.1"),
        ({}, "2001:db8::1", 80, "::1"),
        ({"loopback6": "fe80::1"}, "fe80::1", 80, "::1"),
        ({}, "fe80::1", 80, "fe80::1"),
        ({}, "192.0.2.70", 80, "192.0.2.7"),
        ({}, "2001:db8::70", 443, "2001:db8::7"),
        ({}, "192.0.2.53", 53, "127.0.0.53"),
        ({}, "192.0.2.53", 853, "127.0.0.53"),
        ({}, "192.0.2.53", 80, "192.0.2.53"),
        ({}, "2001:db8::53", 53, "2001:4860:4860::8888"),
        ({}, "2001:db8::53", 54, "2001:db8::53"),
        ({}, "198.51.100.9", 53, "198.51.100.9"),
        ({}, "2001:db8:1::9", 853, "2001:db8:1::9"),
        # the gateway is both: DNS goes to the resolver, everything else to the host's loopback
        ({"dns_forward4": "192.0.2.1"}, "192.0.2.1", 53, "127.0.0.53"),
        ({"dns_forward4": "192.0.2.1"}, "192.0.2.1", 54, "127.0.0.1"),
        ({"dns_forward6": "2001:db8::1"}, "2001:db8::1", 853, "2001:4860:4860::8888"),
        # a host without a resolver: never "any address", which would be the host itself
        ({"dns_host4": None}, "192.0.2.53", 53, "192.0.2.53"),
        ({"dns_host6": None}, "2001:db8::53", 53, "2001:db8::53"),
        ({"dns_host4": None, "dns_forward4": "192.0.2.1"}, "192.0.2.1", 53, "127.0.0.1"),
        # options that are off
        ({"loopback4": None}, "192.0.2.1", 80, "192.0.2.1"),
        ({"loopback6": None}, "2001:db8::1", 80, "2001:db8::1"),
        ({"map_guest4": None}, "192.0.2.70", 80, "192.0.2.70"),
        ({"dns_forward4": None}, "192.0.2.53", 53, "192.0.2.53"),
    ],
)
def test_outbound(changes, far, port, host):
    mapped = A.outbound(configure(FULL | changes), put(LEFT, far), port, TARGET)
    assert got() == host
    assert mapped == (host != far)


@given(ADDRESSES, st.integers(0, 65535))
def test_outbound_without_options_maps_nothing(far, port):
    assert A.outbound(configure(PLAIN), put(LEFT, far), port, TARGET) == 0
    assert SCRATCH_BYTES[32:48] == packed(far)


@pytest.mark.parametrize(
    ("changes", "source", "far"),
    [
        ({}, "127.0.0.1", "192.0.2.1"),
        ({}, "127.8.9.10", "192.0.2.1"),
        ({"loopback4": None, "our4": "192.0.2.9"}, "127.0.0.1", "192.0.2.9"),
        ({"loopback4": None, "our4": None}, "127.0.0.1", None),
        ({}, "::1", "2001:db8::1"),
        ({"loopback6": "fe80::2"}, "::1", "fe80::2"),
        ({"loopback6": None}, "::1", "fe80::1"),
        ({"loopback6": None, "our6_local": None}, "::1", None),
        ({}, "192.0.2.7", "192.0.2.70"),
        ({"map_guest4": None}, "192.0.2.7", "192.0.2.1"),
        ({"map_guest4": None, "our4": None}, "192.0.2.7", None),
        ({}, "2001:db8::7", "2001:db8::70"),
        ({"map_guest6": None, "our6": "2001:db8::1"}, "2001:db8::7", "2001:db8::1"),
        ({"map_guest6": None}, "2001:db8::7", "fe80::1"),
        ({"map_guest6": None, "our6_local": None}, "2001:db8::7", None),
        ({}, "198.51.100.9", "198.51.100.9"),
        ({}, "2001:db8:1::9", "2001:db8:1::9"),
        ({}, "fe80::abcd", "fe80::abcd"),
        ({"guest4": None}, "192.0.2.7", "192.0.2.7"),
    ],
)
def test_inbound(changes, source, far):
    found = A.inbound(configure(FULL | changes), put(LEFT, source), TARGET)
    assert got() == far
    assert found == (far is not None)


@given(ADDRESSES)
def test_the_guest_never_sees_itself_or_loopback(source):
    A.inbound(configure(FULL), put(LEFT, source), TARGET)
    if not getattr(source, "ipv4_mapped", None):
        assert got() not in ("192.0.2.7", "2001:db8::7")
        assert got() is None or not ip_address(got()).is_loopback


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "192.0.2.7", "2001:db8::7", "198.51.100.9"])
def test_what_comes_in_can_be_answered(host):
    """outbound is the mirror of inbound: an answer goes back to where the question came from."""
    A.inbound(configure(FULL), put(LEFT, host), TARGET)
    put(LEFT, got())
    A.outbound(NET_AT, LEFT, 80, TARGET)
    assert got() == host
