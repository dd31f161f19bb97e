"""UDP both ways and both families, one connected socket per flow, and the ICMP errors that belong
to it.
"""

from __future__ import annotations

import itertools
import socket
import struct
from collections.abc import Callable

import packets as pk
import pytest
from driver import BASIC, CSUM, GUEST_CSUM
from guest import Guest, random_bytes
from world import FAR4, FAR6, Datagrams, World, loopback

FORWARD, MAPPED, MAPPED_TO = 15353, 15354, 53
ARGS = ("-u", str(FORWARD), "-u", f"{MAPPED}:{MAPPED_TO}")
AF = {4: socket.AF_INET, 6: socket.AF_INET6}
families = pytest.mark.parametrize("family", [4, 6])


@pytest.fixture
def server(guest: Guest, world: World, family: int) -> Datagrams:
    """A UDP server on the host's loopback."""
    return guest.with_host(world.udp(AF[family]))


def at_host(guest: Guest, server: Datagrams) -> tuple[bytes, tuple]:
    guest.pump(lambda: server.inbox, 3, "a datagram at the host")
    return server.inbox.popleft()


@families
@pytest.mark.parametrize("size", [0, 1, 7, 1472, 9000, 65400])
def test_echo(guest: Guest, server: Datagrams, family: int, size: int) -> None:
    """A datagram of any size there and back, addresses and ports as the guest knows them."""
    own, gateway = guest.addresses(family)
    payload = random_bytes(size)
    port = guest.port()
    guest.send_udp(gateway, port, server.port, payload)
    data, client = at_host(guest, server)
    assert data == payload
    assert client[0] == loopback(AF[family])
    server.send(payload[::-1], client)
    _, answer = guest.next_udp()
    assert answer.payload == payload[::-1]
    assert (answer.src, answer.sport) == (gateway, server.port)
    assert (answer.dst, answer.dport) == (own, port)


@families
def test_one_socket_per_flow(guest: Guest, server: Datagrams, family: int) -> None:
    """Datagrams of one flow come from one host address; different flows from different ones."""
    _, gateway = guest.addresses(family)
    ports = [guest.port() for _ in range(4)]
    clients: dict[int, set[tuple]] = {port: set() for port in ports}
    for port in ports * 5:
        guest.send_udp(gateway, port, server.port, b"%d" % port)
        data, client = at_host(guest, server)
        clients[int(data)].add(client)
    assert all(len(seen) == 1 for seen in clients.values()), clients
    assert len(set.union(*clients.values())) == 4


@families
def test_flow_to_two_servers_from_one_port(
    guest: Guest, server: Datagrams, world: World, family: int
) -> None:
    """The same guest port to two servers is two flows: each answer comes from the right one."""
    _, gateway = guest.addresses(family)
    other = guest.with_host(world.udp(AF[family]))
    port = guest.port()
    for one in (server, other):
        guest.send_udp(gateway, port, one.port, b"?")
        _, client = at_host(guest, one)
        one.send(struct.pack(">H", one.port), client)
    answers = [guest.next_udp()[1] for _ in range(2)]
    assert {(p.sport, struct.unpack(">H", p.payload)[0]) for p in answers} == {
        (server.port, server.port),
        (other.port, other.port),
    }


@families
def test_strangers_do_not_reach_a_flow(
    guest: Guest, server: Datagrams, world: World, family: int
) -> None:
    """The flow's socket is connected: a datagram from another port of the host is not the guest's
    business.
    """
    _, gateway = guest.addresses(family)
    guest.send_udp(gateway, guest.port(), server.port, b"?")
    _, client = at_host(guest, server)
    stranger = guest.with_host(world.udp(AF[family]))
    stranger.send(b"let me in", client)
    guest.expect_silence(0.2, "a datagram from somebody the guest never wrote to")


@families
def test_far_host_is_not_translated(guest: Guest, world: World, family: int) -> None:
    """A destination that is not the gateway is reached as it is, and answers as it is."""
    far = FAR4 if family == 4 else FAR6
    if not world.isolated:
        pytest.skip("no namespace of our own to put a far host into")
    server = guest.with_host(world.udp(AF[family], far))
    guest.send_udp(pk.ip(far), 7000, server.port, b"far")
    data, client = at_host(guest, server)
    assert data == b"far"
    server.send(b"away", client)
    _, answer = guest.next_udp()
    assert (answer.src, answer.sport, answer.payload) == (pk.ip(far), server.port, b"away")


@families
def test_burst_to_the_host(guest: Guest, server: Datagrams, family: int) -> None:
    """500 datagrams of growing size, published in batches: all arrive, in order."""
    _, gateway = guest.addresses(family)
    port = guest.port()
    for i in range(500):
        payload = struct.pack(">I", i) + bytes(i)
        guest.send_udp(gateway, port, server.port, payload, publish=i % 25 == 24)
    guest.pump(lambda: len(server.inbox) == 500, 5, "all 500 datagrams")
    assert [(struct.unpack_from(">I", d)[0], len(d)) for d, _ in server.inbox] == [
        (i, i + 4) for i in range(500)
    ]


@families
def test_burst_to_the_guest(guest: Guest, server: Datagrams, family: int) -> None:
    """150 datagrams at once: there are buffers for all of them, so all must come, in order."""
    _, gateway = guest.addresses(family)
    guest.send_udp(gateway, guest.port(), server.port, b"?")
    _, client = at_host(guest, server)
    for i in range(150):
        server.send(struct.pack(">I", i), client)
    guest.pump(lambda: len(guest.udp) == 150, 5, "all 150 datagrams")
    assert [struct.unpack(">I", p.payload)[0] for _, p in guest.udp] == list(range(150))


@families
def test_many_flows(guest: Guest, server: Datagrams, family: int) -> None:
    """300 flows at once, each answered on its own port."""
    _, gateway = guest.addresses(family)
    ports = [guest.port() for _ in range(300)]
    for port in ports:
        guest.send_udp(gateway, port, server.port, struct.pack(">H", port))
    guest.pump(lambda: len(server.inbox) == 300, 10, "300 flows at the host")
    assert len({client for _, client in server.inbox}) == 300
    for data, client in server.inbox:
        server.send(data, client)
    guest.pump(lambda: len(guest.udp) == 300, 10, "300 answers")
    for _, packet in guest.udp:
        assert struct.unpack(">H", packet.payload)[0] == packet.dport
    assert {p.dport for _, p in guest.udp} == set(ports)


@families
def test_time_to_live_is_kept(guest: Guest, server: Datagrams, family: int) -> None:
    """The guest's TTL or hop limit is what leaves the host (traceroute lives on it)."""
    _, gateway = guest.addresses(family)
    server.record_hops()
    port = guest.port()
    for ttl in (64, 7, 7, 200):
        guest.send_udp(gateway, port, server.port, b"hop", ttl=ttl)
        at_host(guest, server)
    assert server.hops == [64, 7, 7, 200]


@families
def test_closed_port_is_unreachable(guest: Guest, world: World, family: int) -> None:
    """ICMP port unreachable, around the datagram as the guest sent it (RFC 792, RFC 4443 3.1)."""
    own, gateway = guest.addresses(family)
    gone = world.udp(AF[family])
    gone.close()
    port = guest.port()
    guest.send_udp(gateway, port, gone.port, b"anybody?")
    _, error = guest.next_icmp({3} if family == 4 else {1})
    assert (error.type, error.code) == ((3, 3) if family == 4 else (1, 4))
    assert (error.src, error.dst) == (gateway, own)
    quoted = error.body[4:]
    size = 20 if family == 4 else 40
    addresses = quoted[12:20] if family == 4 else quoted[8:40]
    assert addresses == own + gateway, "the quoted packet's addresses are not those of the guest's"
    assert quoted[9 if family == 4 else 6] == pk.UDP
    assert struct.unpack_from(">HH", quoted, size) == (port, gone.port)


@families
def test_flow_lives_on_after_an_error(guest: Guest, world: World, family: int) -> None:
    """A server that starts late: the first datagram meets an error, the second is delivered."""
    _, gateway = guest.addresses(family)
    early = world.udp(AF[family])
    early.close()
    port = guest.port()
    guest.send_udp(gateway, port, early.port, b"too early")
    guest.next_icmp({3, 1})
    sock = world.socket(AF[family], socket.SOCK_DGRAM)
    sock.bind((loopback(AF[family]), early.port))
    server = guest.with_host(Datagrams(sock))
    guest.send_udp(gateway, port, early.port, b"in time")
    assert at_host(guest, server)[0] == b"in time"


@families
def test_forwarded_port(guest: Guest, world: World, family: int) -> None:
    """-u: a datagram to the host's port reaches the guest, whose answer comes from that port."""
    own, gateway = guest.addresses(family)
    client = guest.with_host(world.udp(AF[family]))
    for round_number in range(3):
        client.send(b"knock %d" % round_number, (loopback(AF[family]), FORWARD))
        _, packet = guest.next_udp()
        assert packet.payload == b"knock %d" % round_number
        assert (packet.src, packet.dst) == (gateway, own)
        assert (packet.sport, packet.dport) == (client.port, FORWARD)
        guest.send_udp(gateway, FORWARD, client.port, b"who is there?")
        data, sender = at_host(guest, client)
        assert data == b"who is there?"
        assert sender[:2] == (loopback(AF[family]), FORWARD)


@families
def test_forwarded_port_to_another_port(guest: Guest, world: World, family: int) -> None:
    _, gateway = guest.addresses(family)
    client = guest.with_host(world.udp(AF[family]))
    client.send(b"query", (loopback(AF[family]), MAPPED))
    _, packet = guest.next_udp()
    assert (packet.dport, packet.payload) == (MAPPED_TO, b"query")
    guest.send_udp(gateway, MAPPED_TO, client.port, b"answer")
    data, sender = at_host(guest, client)
    assert (data, sender[1]) == (b"answer", MAPPED)


@families
def test_forwarded_clients_are_kept_apart(guest: Guest, world: World, family: int) -> None:
    _, gateway = guest.addresses(family)
    clients = [guest.with_host(world.udp(AF[family])) for _ in range(8)]
    for client in clients * 3:
        client.send(b"%d" % client.port, (loopback(AF[family]), FORWARD))
        _, packet = guest.next_udp()
        assert int(packet.payload) == packet.sport == client.port
        guest.send_udp(gateway, FORWARD, packet.sport, packet.payload)
    for client in clients:
        for _ in range(3):
            assert at_host(guest, client)[0] == b"%d" % client.port


@pytest.mark.passt_lacks("no CSUM")
@families
def test_partial_checksum(make_guest: Callable[..., Guest], world: World, family: int) -> None:
    """A guest with CSUM leaves the checksum to the device: the field holds the pseudo-header sum
    only.
    """
    guest = make_guest(features=BASIC | GUEST_CSUM | CSUM)
    assert guest.drv.features & CSUM, "VIRTIO_NET_F_CSUM is not offered"
    own, gateway = guest.addresses(family)
    server = guest.with_host(world.udp(AF[family]))
    body = pk.udp(own, gateway, 7000, server.port, b"half summed", csum="partial")
    frame = pk.ip_frame((guest.gw_mac, guest.mac), pk.ip_packet(own, gateway, pk.UDP, body))
    guest.transmit(frame, header=pk.needs_csum(frame))
    assert at_host(guest, server)[0] == b"half summed"


@pytest.mark.parametrize("offset", [0, 1, 2, 3])
def test_padded_frames(guest: Guest, world: World, offset: int) -> None:
    """Short packets are padded to 60 bytes by Ethernet: the padding is not payload."""
    server = guest.with_host(world.udp(socket.AF_INET))
    body = pk.udp(guest.ip4, guest.gw4, 7000, server.port, b"abc"[:offset])
    packet = pk.ipv4(guest.ip4, guest.gw4, pk.UDP, body)
    guest.transmit(pk.ip_frame((guest.gw_mac, guest.mac), packet).ljust(60, b"\xaa"))
    assert at_host(guest, server)[0] == b"abc"[:offset]


def test_destinations_that_are_dropped(guest: Guest, world: World) -> None:
    """Broadcast, port 0, a fragment, an unknown protocol: no answer, no harm, and the next
    datagram works.
    """
    own, gateway = guest.ip4, guest.gw4
    server = guest.with_host(world.udp(socket.AF_INET))
    for dst, sport, dport in itertools.product(
        (b"\xff" * 4, pk.ip("198.51.100.255"), gateway), (0, 7000), (0, server.port)
    ):
        if dst == gateway and sport and dport:
            continue
        guest.send_ip(pk.ipv4(own, dst, pk.UDP, pk.udp(own, dst, sport, dport, b"no")))
    whole = pk.ipv4(own, gateway, pk.UDP, pk.udp(own, gateway, 7000, server.port, b"piece"))
    head = whole[:6] + b"\x20\0" + whole[8:10] + b"\0\0" + whole[12:20]
    head = head[:10] + struct.pack(">H", pk.checksum(head)) + head[12:]
    guest.send_ip(head + whole[20:])
    guest.send_ip(pk.ipv4(own, gateway, 132, bytes(40)))
    guest.send_udp(gateway, 7000, server.port, b"yes")
    data, _ = at_host(guest, server)
    assert data == b"yes"
