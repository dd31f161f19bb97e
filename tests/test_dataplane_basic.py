"""What a guest does first: addresses, neighbours, echo; and what an operator does: start, stop,
one client only.

Everything goes over a real vhost-user socket to a back-end process (see `backend`, `driver`).
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable, Iterator

import packets as pk
import pytest
from backend import Backend
from driver import Channel, Driver, Lost
from guest import LINK_LOCAL, MAC, Guest, random_bytes
from world import GATEWAY4, HOST4, HOST6, World

XID = 0x1234ABCD
ALL_NODES, ALL_ROUTERS = pk.ip("ff02::1"), pk.ip("ff02::2")
DHCP6_SERVERS = pk.ip("ff02::1:2")
DUID = b"\0\3\0\1" + MAC


def request(guest: Guest, kind: int, options: dict[int, bytes]) -> None:
    """Send one DHCP message by broadcast."""
    message = pk.dhcp(guest.mac, XID + kind, kind, {55: bytes((1, 3, 6, 26, 51, 54)), **options})
    body = pk.udp(bytes(4), b"\xff" * 4, 68, 67, message)
    packet = pk.ipv4(bytes(4), b"\xff" * 4, pk.UDP, body)
    guest.transmit(pk.ip_frame((pk.BROADCAST, guest.mac), packet))


def dhcp_exchange(guest: Guest, kind: int, options: dict[int, bytes]) -> tuple[bytes, dict]:
    """Send one DHCP message by broadcast and return (address, options) of its answer."""
    request(guest, kind, options)
    _, answer = guest.next_udp()
    assert (answer.sport, answer.dport) == (67, 68)
    address, xid, found = pk.dhcp_reply(answer.payload)
    assert xid == XID + kind
    return address, found


def lease(guest: Guest) -> tuple[bytes, dict]:
    """DISCOVER, OFFER, REQUEST, ACK; returns the address and the options of the ACK."""
    offered, options = dhcp_exchange(guest, 1, {})
    assert options[53] == b"\2", "the answer to DISCOVER is not an OFFER"
    address, options = dhcp_exchange(guest, 3, {50: offered, 54: options[54]})
    assert options[53] == b"\5", "the answer to REQUEST is not an ACK"
    assert address == offered
    return address, options


def test_dhcp_lease(make_guest: Callable[..., Guest]) -> None:
    """The guest is given the host's own address, mask and gateway."""
    guest = make_guest(resolve=False)
    address, options = lease(guest)
    assert pk.text(address) == HOST4
    assert pk.text(options[1]) == "255.255.255.0"
    assert pk.text(options[3]) == GATEWAY4
    assert len(options[54]) == 4
    assert struct.unpack(">I", options[51])[0] > 60
    if 26 in options:
        assert 1280 <= struct.unpack(">H", options[26])[0] <= 65520


def test_dhcp_from_a_known_address(guest: Guest) -> None:
    """A client that renews (unicast, own source address) is acknowledged with the same address."""
    message = pk.dhcp(guest.mac, XID, 3, {50: guest.ip4})
    body = pk.udp(guest.ip4, guest.gw4, 68, 67, message)
    guest.send_ip(pk.ipv4(guest.ip4, guest.gw4, pk.UDP, body))
    _, answer = guest.next_udp()
    address, _, options = pk.dhcp_reply(answer.payload)
    assert (address, options[53]) == (guest.ip4, b"\5")


def test_arp_for_the_gateway(make_guest: Callable[..., Guest]) -> None:
    guest = make_guest(resolve=False)
    guest.resolve()
    answer = guest.arp[-1]
    assert answer.eth_dst == guest.mac, "an ARP answer goes to whom asked"
    assert answer.eth_src == guest.gw_mac
    assert answer.body[18:24] == guest.mac and answer.dst == guest.ip4
    assert not guest.gw_mac[0] & 1 and guest.gw_mac != guest.mac


def test_arp_for_the_own_address_is_not_answered(make_guest: Callable[..., Guest]) -> None:
    """Duplicate address detection (RFC 5227): an answer to a probe for its own address would take
    it from the guest.
    """
    guest = make_guest()
    guest.arp.clear()
    for sender in (bytes(4), guest.ip4):
        body = pk.arp(1, guest.mac, sender, bytes(6), guest.ip4)
        guest.transmit(pk.ether(pk.BROADCAST, guest.mac, pk.ARP, body))
    guest.pump(timeout=0.3)
    assert [str(p) for p in guest.arp if p.type == 2 and p.src == guest.ip4] == []


def solicit(guest: Guest, target: bytes) -> pk.Packet:
    """Neighbour solicitation for `target`; returns the advertisement."""
    group = pk.solicited_node(target)
    rest = bytes(4) + target + b"\1\1" + guest.mac
    body = pk.icmp6(LINK_LOCAL, group, 135, 0, rest)
    packet = pk.ipv6(LINK_LOCAL, group, pk.ICMP6, body, ttl=255)
    guest.transmit(pk.ip_frame((pk.multicast_mac(group), guest.mac), packet))
    return guest.next_icmp({136})[1]


def test_neighbour_discovery_of_the_gateway(guest: Guest) -> None:
    advert = solicit(guest, guest.gw6)
    assert advert.ttl == 255, "a guest ignores NDP with another hop limit (RFC 4861 7.1.2)"
    assert advert.body[4:20] == guest.gw6
    assert advert.body[0] & 0x40, "the solicited flag"
    options = advert.body[20:]
    assert options[:2] == b"\2\1" and options[2:8] == advert.eth_src


def test_router_advertisement(guest: Guest) -> None:
    """A router solicitation yields a default router and a prefix the guest can make addresses
    from.
    """
    body = pk.icmp6(LINK_LOCAL, ALL_ROUTERS, 133, 0, bytes(4) + b"\1\1" + guest.mac)
    packet = pk.ipv6(LINK_LOCAL, ALL_ROUTERS, pk.ICMP6, body, ttl=255)
    guest.transmit(pk.ip_frame((pk.multicast_mac(ALL_ROUTERS), guest.mac), packet))
    _, advert = guest.next_icmp({134})
    assert advert.ttl == 255 and advert.src[:2] == b"\xfe\x80"
    assert struct.unpack_from(">H", advert.body, 2)[0] > 0, "router lifetime"
    options, at = {}, 12
    while at < len(advert.body):
        size = advert.body[at + 1] * 8
        assert size, "an option of length zero"
        options[advert.body[at]] = advert.body[at : at + size]
        at += size
    prefix = options[3]
    assert prefix[2] == 64 and prefix[3] & 0x40, "prefix length and the autonomous flag"
    assert prefix[16:24] == pk.ip(HOST6)[:8]


def dhcp6(guest: Guest, kind: int, options: dict[int, bytes]) -> dict[int, bytes]:
    """One DHCPv6 exchange (RFC 8415); returns the options of the answer, its type under 0."""
    message = bytes((kind, 0, 0, kind))
    for code, value in {1: DUID, 8: bytes(2), **options}.items():
        message += struct.pack(">HH", code, len(value)) + value
    body = pk.udp(LINK_LOCAL, DHCP6_SERVERS, 546, 547, message)
    packet = pk.ipv6(LINK_LOCAL, DHCP6_SERVERS, pk.UDP, body)
    guest.transmit(pk.ip_frame((pk.multicast_mac(DHCP6_SERVERS), guest.mac), packet))
    answer = guest.next_udp()[1].payload
    assert answer[1:4] == bytes((0, 0, kind)), "transaction id"
    found, at = {0: answer[:1]}, 4
    while at < len(answer):
        code, size = struct.unpack_from(">HH", answer, at)
        found[code] = answer[at + 4 : at + 4 + size]
        at += 4 + size
    return found


def test_dhcp6_lease(guest: Guest) -> None:
    identity = struct.pack(">III", 7, 0, 0)
    advertised = dhcp6(guest, 1, {3: identity})
    assert advertised[0] == b"\2" and advertised[1] == DUID
    assert pk.ip(HOST6) in advertised[3], "the address offered"
    reply = dhcp6(guest, 3, {2: advertised[2], 3: advertised[3]})
    assert reply[0] == b"\7"
    assert pk.ip(HOST6) in reply[3] and reply[2] == advertised[2]


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("size", [0, 1, 56, 1400])
def test_echo_to_the_host(guest: Guest, family: int, size: int) -> None:
    """The gateway stands for the host's loopback: its kernel answers, and the answer seems to come
    from there.
    """
    own, gateway = guest.addresses(family)
    payload = random_bytes(size)
    for sequence in (1, 2, 65535):
        guest.ping(gateway, 0x4711, sequence, payload)
        _, answer = guest.next_icmp({0} if family == 4 else {129})
        assert (answer.src, answer.dst, answer.code) == (gateway, own, 0)
        assert answer.body == struct.pack(">HH", 0x4711, sequence) + payload


@pytest.mark.parametrize("family", [4, 6])
def test_echo_identifiers_are_kept_apart(guest: Guest, family: int) -> None:
    """Two pings with different identifiers, interleaved: every answer carries its own."""
    _, gateway = guest.addresses(family)
    sent = [(ident, sequence) for sequence in range(5) for ident in (100, 200)]
    for ident, sequence in sent:
        guest.ping(gateway, ident, sequence, struct.pack(">HH", ident, sequence))
    answers = [guest.next_icmp({0, 129})[1].body for _ in sent]
    assert sorted(answers) == sorted(struct.pack(">HHHH", *pair, *pair) for pair in sent)


@pytest.fixture
def island() -> Iterator[World]:
    made = World(uplink=False)
    if not made.isolated:
        made.close()
        pytest.skip("no permission to make a network namespace")
    made.run(_allow_ping)
    yield made
    made.close()


def _allow_ping() -> None:
    with open("/proc/sys/net/ipv4/ping_group_range", "w") as file:
        file.write("0 2147483647")


def test_host_without_network(
    island: World, make_backend: Callable[..., Backend], make_guest: Callable[..., Guest]
) -> None:
    """No interface, no route: the back-end starts all the same, hands out link-local addresses,
    reaches the host.
    """
    there = make_backend(within=island)
    guest = make_guest(to=there, resolve=False)
    address, options = lease(guest)
    assert address[:2] == bytes((169, 254)), f"{pk.text(address)} is not link-local"
    guest.ip4, guest.gw4 = address, options[3]
    guest.resolve()
    guest.ping(guest.gw4, 1, 1, b"are you there")
    assert guest.next_icmp({0})[1].src == guest.gw4
    guest.gw6 = pk.ip("fe80::1")
    assert solicit(guest, guest.gw6).body[4:20] == guest.gw6
    guest.ping(guest.gw6, 1, 1, b"and you?")
    assert guest.next_icmp({129})[1].src == guest.gw6
    server = guest.with_host(island.udp(socket.AF_INET))
    guest.send_udp(guest.gw4, 1234, server.port, b"hello")
    data, client = guest.pump(lambda: server.inbox, what="the datagram at the host").popleft()
    assert data == b"hello"
    server.send(b"welcome", client)
    assert guest.next_udp()[1].payload == b"welcome"


def test_one_off_ends_with_its_client(
    make_backend: Callable[..., Backend], make_guest: Callable[..., Guest]
) -> None:
    there = make_backend("--one-off")
    guest = make_guest(to=there)
    guest.ping(guest.gw4, 1, 1, b"")
    guest.next_icmp({0})
    family = there.tree()
    guest.drv.channel.close()
    assert there.wait() == 0, there.tail()
    wait_gone(family)


def test_sigterm_ends_everything(
    make_backend: Callable[..., Backend], make_guest: Callable[..., Guest]
) -> None:
    """SIGTERM with a running guest: exit status 0 and not one process left behind."""
    there = make_backend()
    make_guest(to=there)
    family = there.tree()
    there.process.terminate()
    assert there.wait() == 0, there.tail()
    wait_gone(family)


def wait_gone(pids: list[int], timeout: float = 5.0) -> None:
    deadline = time.monotonic() + timeout
    while left := [pid for pid in pids if os.path.exists(f"/proc/{pid}")]:
        assert time.monotonic() < deadline, f"processes {left} outlive the back-end"
        time.sleep(0.02)


def test_second_client_is_turned_away(backend: Backend, guest: Guest) -> None:
    """One VM per instance: a second connection is closed, and the first does not notice."""
    other = Channel(backend.path)
    with pytest.raises(Lost):
        other.send(1)
        other.receive()
    other.close()
    guest.ping(guest.gw4, 1, 1, b"still here")
    guest.next_icmp({0})


def test_reconnect(backend: Backend, make_guest: Callable[..., Guest]) -> None:
    """The front-end goes and comes back, ten times: each time the guest has its network at once."""
    for round_number in range(10):
        guest = make_guest()
        guest.ping(guest.gw4, 7, round_number, b"x" * 64)
        guest.next_icmp({0})
        guest.drv.channel.close()


def test_offered_features_do_not_change_on_reconnect(
    backend: Backend, make_guest: Callable[..., Guest]
) -> None:
    """A front-end that reconnects insists on what it had (protocol of QEMU and DPDK)."""
    seen = set()
    for _ in range(3):
        drv = make_guest(resolve=False).drv
        seen.add((drv.offered, drv.protocol))
        drv.channel.close()
    assert len(seen) == 1


@pytest.mark.passt_defect("sets DATA_VALID without GUEST_CSUM")
def test_driver_without_mergeable_buffers(make_guest: Callable[..., Guest]) -> None:
    """Plain VERSION_1 guests exist: no MRG_RXBUF, no GUEST_CSUM, num_buffers still 1 (virtio
    5.1.6.4.1).
    """
    guest = make_guest(features=1 << 32 | 1 << 30, rx=(65562,))
    guest.ping(guest.gw4, 3, 1, random_bytes(1000))
    _, answer = guest.next_icmp({0})
    assert answer.header.num_buffers == 1 and not answer.header.flags


def test_idle_costs_nothing(backend: Backend, guest: Guest) -> None:
    """An idle guest: less than 3 % of one processor, periodic work included."""
    guest.pump(timeout=0.3)
    load = backend.load(2.0)
    assert load < 0.03, f"{load:.1%} of a processor while idle"


def test_handshake_is_quick(backend: Backend) -> None:
    """QEMU's main thread waits for every answer: connect to running rings within a second."""
    start = time.monotonic()
    drv = Driver(backend.path)
    drv.start()
    took = time.monotonic() - start
    drv.close()
    assert took < 1.0, f"the handshake took {took:.2f} s"
