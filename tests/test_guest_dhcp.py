"""The guest's DHCP clients and its reading of router advertisements: against the product's servers
with any network, against answers scapy builds and dissects, and against garbage."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv4Network, IPv6Address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.dhcp import BOOTP, DHCP
from scapy.layers.dhcp6 import (
    DHCP6_Advertise,
    DHCP6_Reply,
    DHCP6_Request,
    DHCP6_Solicit,
    DHCP6OptClientId,
    DHCP6OptDNSServers,
    DHCP6OptIA_NA,
    DHCP6OptIAAddress,
    DHCP6OptServerId,
)
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether

from control.guest_dhcp import Dhcp4, Dhcp6, Lease4, Lease6, Router, router
from dataplane.slow import dhcp, dhcpv6, ndp
from dataplane.slow.net import Net, build_udp6

MAC = bytes.fromhex("525400123456")
XID = 0x00ABCDEF
NET = Net(
    addr4=IPv4Address("192.0.2.2"),
    prefix4=24,
    gateway4=IPv4Address("192.0.2.1"),
    our_addr4=IPv4Address("192.0.2.1"),
    addr6=IPv6Address("2001:db8::2"),
    dns4=(IPv4Address("192.0.2.53"), IPv4Address("198.51.100.53")),
    dns6=(IPv6Address("2001:db8::53"),),
    search=("corp.example", "lab.corp.example"),
    mtu=9000,
)
EVERYWHERE = IPv4Network("0.0.0.0/0")
LINK_LOCAL = IPv6Address("fe80::1").packed
SERVERS = IPv6Address("ff02::1:2").packed

label = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,10}[a-z0-9])?", fullmatch=True)
name = st.lists(label, min_size=1, max_size=4).map(".".join)
addresses4 = st.integers(0x01000000, 0xDFFFFFFF).map(IPv4Address)
addresses6 = st.integers(0x2000 << 112, (0x4000 << 112) - 1).map(IPv6Address)
nets = st.builds(
    NET.replaced,
    addr4=addresses4,
    prefix4=st.integers(1, 32),
    gateway4=addresses4,
    our_addr4=addresses4,
    addr6=st.one_of(st.none(), addresses6),
    dns4=st.lists(addresses4, max_size=5, unique=True).map(tuple),
    dns6=st.lists(addresses6, max_size=3, unique=True).map(tuple),
    search=st.lists(name, max_size=3, unique=True).map(tuple),
    mtu=st.sampled_from([0, 68, 1280, 1500, 65520]),
)


def converse4(net: Net, client: Dhcp4) -> Lease4:
    for _ in range(3):
        answer = dhcp.reply(client.frame(), net)
        assert answer is not None and client.receive(answer)
        if client.lease is not None:
            return client.lease
    raise AssertionError("no lease")


@settings(deadline=None)
@given(net=nets)
def test_lease_is_what_the_server_has(net: Net) -> None:
    lease = converse4(net, Dhcp4(MAC, XID))
    assert (lease.address.ip, lease.address.network.prefixlen) == (net.addr4, net.prefix4)
    *_, (target, gateway) = lease.routes
    assert (target, gateway) == (EVERYWHERE, net.gateway4)
    if net.gateway4 not in lease.address.network:
        assert lease.routes[0] == (IPv4Network(net.gateway4), IPv4Address(0))
    assert lease.dns == net.dns4 and lease.mtu == net.mtu
    assert lease.search == net.search


def scapy_answer(kind: str, *options: object, yiaddr: str = "192.0.2.7", **bootp: object) -> bytes:
    fields = {"op": 2, "xid": XID, "chaddr": MAC, "yiaddr": yiaddr} | bootp
    message = BOOTP(**fields) / DHCP(options=[("message-type", kind), *options, "end"])
    ether = Ether(src="02:00:00:00:00:01", dst="ff:ff:ff:ff:ff:ff")
    return bytes(
        ether / IP(src="192.0.2.1", dst="255.255.255.255") / UDP(sport=67, dport=68) / message
    )


def test_four_messages() -> None:
    """As scapy reads and writes them: no rapid commit here, so there is an offer and a request."""
    client = Dhcp4(MAC, XID)
    discover = Ether(client.frame())
    assert discover.dst == "ff:ff:ff:ff:ff:ff" and discover[IP].src == "0.0.0.0"
    assert discover[BOOTP].flags == "B" and discover[BOOTP].chaddr[:6] == MAC
    assert ("message-type", 1) in discover[DHCP].options
    server = ("server_id", "192.0.2.1")
    assert client.receive(scapy_answer("offer", server))
    request = Ether(client.frame())
    for option in (("message-type", 3), server, ("requested_addr", "192.0.2.7")):
        assert option in request[DHCP].options
    assert not client.receive(scapy_answer("offer", server, yiaddr="192.0.2.8"))
    mask, routers = ("subnet_mask", "255.255.255.0"), ("router", "192.0.2.1", "192.0.2.254")
    assert client.receive(scapy_answer("ack", server, mask, routers))
    assert client.lease is not None
    assert str(client.lease.address) == "192.0.2.7/24"
    assert client.lease.routes == ((EVERYWHERE, IPv4Address("192.0.2.1")),)
    assert not client.receive(scapy_answer("ack", server, yiaddr="192.0.2.9"))


def test_refusal_starts_over() -> None:
    client = Dhcp4(MAC, XID)
    first = client.frame()
    assert client.receive(scapy_answer("offer", ("server_id", "192.0.2.1")))
    assert client.frame() != first
    assert client.receive(scapy_answer("nak"))
    assert client.frame() == first


@pytest.mark.parametrize(
    "answer",
    [
        scapy_answer("offer", xid=XID + 1),
        scapy_answer("offer", chaddr=bytes(6)),
        scapy_answer("offer", op=1),
        scapy_answer("nak"),
        scapy_answer("ack", yiaddr="0.0.0.0"),
        scapy_answer("ack", yiaddr="224.0.0.1"),
        scapy_answer("ack", ("subnet_mask", "255.0.255.0")),
        scapy_answer("offer")[:-10],
    ],
)
def test_answers_for_nobody(answer: bytes) -> None:
    client = Dhcp4(MAC, XID)
    assert not client.receive(answer) and client.lease is None


def test_classless_routes_replace_the_router() -> None:
    """RFC 3442, and the route on the link comes first, whatever the order in the option."""
    routes = bytes([0, 192, 0, 2, 1, 24, 10, 1, 2, 192, 0, 2, 3, 32, 192, 0, 2, 1, 0, 0, 0, 0])
    client = Dhcp4(MAC, XID)
    options = (("router", "192.0.2.99"), (121, routes))
    assert client.receive(scapy_answer("ack", *options))
    assert client.lease is not None
    on_link, *others = client.lease.routes
    assert on_link == (IPv4Network("192.0.2.1/32"), IPv4Address(0))
    assert set(others) == {
        (EVERYWHERE, IPv4Address("192.0.2.1")),
        (IPv4Network("10.1.2.0/24"), IPv4Address("192.0.2.3")),
    }


@pytest.mark.parametrize("routes", [bytes([33]) + bytes(9), bytes([24, 10, 1]), bytes([0])])
def test_malformed_routes_count_as_none(routes: bytes) -> None:
    client = Dhcp4(MAC, XID)
    assert client.receive(scapy_answer("ack", (121, routes)))
    assert client.lease is not None and client.lease.routes == ()


@pytest.mark.parametrize(
    "wire, names",
    [
        (b"\3eng\7example\0\4sale\xc0\4", ("eng.example", "sale.example")),
        (b"\7exa\nple\0\2ok\0", ("ok",)),  # no line of its own in resolv.conf
        (b"\xc0\0", ()),  # a pointer to itself
        (b"\1a\xc0\0", ()),
        (b"\5ab", ()),
        (b"\x80ab\0", ()),
        (b"\0", ()),
    ],
)
def test_search_list(wire: bytes, names: tuple[str, ...]) -> None:
    client = Dhcp4(MAC, XID)
    assert client.receive(scapy_answer("ack", (119, wire)))
    assert client.lease is not None and client.lease.search == names


@settings(deadline=None)
@given(data=st.binary(max_size=400), at=st.integers(0, 400))
def test_garbage_is_ignored(data: bytes, at: int) -> None:
    """Anything at all, and a good answer with a piece of it overwritten: never an exception."""
    client = Dhcp4(MAC, XID)
    client.receive(data)
    good = dhcp.reply(client.frame(), NET)
    assert good is not None
    client.receive(good[:at] + data + good[at + len(data) :])
    six = Dhcp6(MAC, XID)
    six.receive(data)
    answer = payload6(six, NET)
    six.receive(answer[:at] + data + answer[at + len(data) :])
    router(data)
    message = advertisement(NET)
    router(message[:at] + data + message[at + len(data) :])


# ---- IPv6 ----------------------------------------------------------------------------------------


def payload6(client: Dhcp6, net: Net) -> bytes:
    """The product's answer to what the client says."""
    macs, addrs = (MAC, bytes.fromhex("333300010002")), (LINK_LOCAL, SERVERS)
    answer = dhcpv6.reply(build_udp6(macs, addrs, (546, 547), client.message()), net)
    assert answer is not None
    return answer[62:]


def advertisement(net: Net) -> bytes:
    """The product's router advertisement."""
    frame = ndp.unsolicited_ra(net)
    assert frame is not None
    return frame[54:]


@settings(deadline=None)
@given(net=nets.filter(lambda net: net.addr6 is not None))
def test_lease6_is_what_the_server_has(net: Net) -> None:
    client = Dhcp6(MAC, XID)
    assert client.receive(payload6(client, net))
    assert net.addr6 is not None
    assert client.lease == Lease6(net.addr6, net.dns6, net.search)


def scapy_answer6(kind: type, client: Dhcp6, address: str, valid: int = 3600) -> bytes:
    asked = DHCP6_Solicit(client.message())
    return bytes(
        kind(trid=XID)
        / DHCP6OptClientId(duid=asked[DHCP6OptClientId].duid)
        / DHCP6OptServerId(duid=b"\0\3\0\1abcdef")
        / DHCP6OptIA_NA(
            iaid=asked[DHCP6OptIA_NA].iaid,
            ianaopts=[DHCP6OptIAAddress(addr=address, preflft=valid, validlft=valid)],
        )
        / DHCP6OptDNSServers(dnsservers=["2001:db8::53"])
    )


def test_four_messages6() -> None:
    client = Dhcp6(MAC, XID)
    assert client.receive(scapy_answer6(DHCP6_Advertise, client, "2001:db8::7"))
    request = DHCP6_Request(client.message())
    assert request.msgtype == 3 and request[DHCP6OptServerId].duid
    assert request[DHCP6OptIA_NA].ianaopts[0].addr == "2001:db8::7"
    assert client.receive(scapy_answer6(DHCP6_Reply, client, "2001:db8::7"))
    assert client.lease == Lease6(IPv6Address("2001:db8::7"), (IPv6Address("2001:db8::53"),))


def test_address_that_is_no_longer_valid() -> None:
    client = Dhcp6(MAC, XID)
    assert not client.receive(scapy_answer6(DHCP6_Reply, client, "2001:db8::7", valid=0))


def test_answer_to_another_client6() -> None:
    other = Dhcp6(b"\2\0\0\0\0\1", XID)
    assert not Dhcp6(MAC, XID).receive(scapy_answer6(DHCP6_Reply, other, "2001:db8::7"))


@settings(deadline=None)
@given(net=nets)
def test_router_advertisement(net: Net) -> None:
    has = net.addr6 is not None
    mtu = net.mtu if net.mtu >= 1280 else 0
    said = router(advertisement(net))
    assert said == Router(has, has, has, net.dns6, net.search, mtu)


def test_other_icmp6_is_no_router() -> None:
    message = advertisement(NET)
    assert router(message) is not None
    assert router(bytes([136]) + message[1:]) is None
    assert router(message[:15]) is None


def test_lifetime_zero_withdraws_name_servers() -> None:
    head = struct.pack("!BBHBBHII", 134, 0, 0, 64, 0, 1800, 0, 0)
    server = IPv6Address("2001:db8::53").packed
    assert router(head + struct.pack("!BBHI", 25, 3, 0, 0) + server) == Router(True, False, False)
