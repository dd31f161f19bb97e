"""Options of `vhostmq run`, each in a running back-end, seen by a guest on the wire.

What an option does to values (addresses, masks, name servers) is tested where they are decided;
here, that it reaches the process that needs it and that the guest can tell.
"""

from __future__ import annotations

import os
import re
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import packets as pk
import pytest
from backend import ROOT, Backend
from driver import GET_QUEUE_NUM, Channel, Driver, Lost
from guest import LINK_LOCAL, Guest
from minitcp import Tcp, established, exchange
from test_dataplane_basic import ALL_ROUTERS, dhcp6, lease, solicit
from world import FAR4, FAR6, HOST4, HOST6, Datagrams, World, loopback

pytestmark = pytest.mark.passt_lacks("metrics, and some of these options")

AF = {4: socket.AF_INET, 6: socket.AF_INET6}
FORWARD_TCP, FORWARD_UDP = 18080, 18081
SEND_RARP, NET_SET_MTU = 19, 20
families = pytest.mark.parametrize("family", [4, 6])
OTHER = {4: pk.ip("203.0.113.77"), 6: pk.ip("2001:db8:77::77")}
"""Addresses that mean nothing unless an option gives them a meaning."""


class Adopted(Channel):
    """A channel over a connection that exists already."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(10)
        self.path, self.socket = "", sock


PATIENCE_S = 5.0


class Impatient(Guest):
    """A guest that waits `patience` seconds at most."""

    patience = PATIENCE_S

    def pump(
        self, until: Callable[[], Any] | None = None, timeout: float = 5.0, what: str = ""
    ) -> Any:
        return super().pump(until, min(timeout, self.patience), what)


Serve = Callable[..., tuple[Backend, Impatient]]


@pytest.fixture
def serve(make_backend: Callable[..., Backend]) -> Iterator[Serve]:
    """A back-end with these arguments and a guest behind it."""
    guests: list[Guest] = []

    def start(
        *args: str, resolve: bool = True, within: World | None = None
    ) -> tuple[Backend, Impatient]:
        there = make_backend(*args, **({"within": within} if within else {}))
        guest = Impatient(Driver(there.path).start())
        guests.append(guest)
        if resolve:
            guest.resolve()
        return there, guest

    yield start
    for guest in guests:
        guest.drv.close()
        for peer in guest.peers:
            peer.close()


def ask(guest: Guest, there: bytes, server: Datagrams, port: int = 0) -> tuple[bytes, int]:
    """A datagram to `there` and the server's port, or `port`, answered by `server` on the host;
    returns where the answer seems to come from.
    """
    guest.send_udp(there, guest.port(), port or server.port, b"ping")
    data, client = guest.pump(lambda: server.inbox, 5, "a datagram at the host").popleft()
    assert data == b"ping"
    server.send(b"pong", client)
    answer = guest.next_udp()[1]
    assert answer.payload == b"pong"
    return answer.src, answer.sport


def policy_drops(there: Backend) -> float:
    return there.total("vhostmq_drops_total", reason="policy", direction="tx", queue="0")


def advertised(guest: Guest) -> tuple[pk.Packet, dict[int, bytes]]:
    """The router advertisement that answers a solicitation, and its options by type."""
    body = pk.icmp6(LINK_LOCAL, ALL_ROUTERS, 133, 0, bytes(4) + b"\1\1" + guest.mac)
    packet = pk.ipv6(LINK_LOCAL, ALL_ROUTERS, pk.ICMP6, body, ttl=255)
    guest.transmit(pk.ip_frame((pk.multicast_mac(ALL_ROUTERS), guest.mac), packet))
    advert = guest.next_icmp({134})[1]
    options, at = {}, 12
    while at < len(advert.body):
        size = advert.body[at + 1] * 8
        options[advert.body[at]] = advert.body[at + 2 : at + size]
        at += size
    return advert, options


def silent(guest: Impatient, action: Callable[[Impatient], Any]) -> bool:
    """Whether an exchange that normally succeeds at once gets no answer at all."""
    seen: list[pk.Packet] = []
    guest.on_packet = lambda packet, pair: seen.append(packet)
    guest.patience = 0.4
    try:
        action(guest)
    except AssertionError:
        return not seen
    finally:
        guest.on_packet, guest.patience = None, PATIENCE_S
    return False


# --- where the front-end is ---------------------------------------------------------------------


def test_a_connected_descriptor(make_backend: Callable[..., Backend]) -> None:
    """--fd: served without anybody connecting; when its front-end goes, so does the back-end."""
    ours, theirs = socket.socketpair()
    with theirs:
        there = make_backend(theirs=theirs)
    guest = Guest(Driver("", channel=Adopted(ours)).start())
    guest.resolve()
    guest.ping(guest.gw4, 1, 1, b"")
    guest.next_icmp({0})
    assert os.listdir(there.folder) == [] and there.alive()
    guest.drv.channel.close()
    assert there.wait() == 0, there.tail()
    guest.drv.close()


def test_a_signal_ends_a_connected_descriptor(make_backend: Callable[..., Backend]) -> None:
    """SIGTERM: status 0, and the front-end sees its end."""
    ours, theirs = socket.socketpair()
    with theirs:
        there = make_backend(theirs=theirs)
    drv = Driver("", channel=Adopted(ours)).start()
    assert there.stop() == 0
    with pytest.raises(Lost):
        drv.channel.receive()
    drv.close()


def bad_descriptors() -> dict[str, Callable[[], list[Any]]]:
    """Things that are no connected Unix stream socket; the first of each is given."""

    def tcp() -> list[Any]:
        server = socket.create_server(("127.0.0.1", 0))
        return [socket.create_connection(server.getsockname()), server]

    def udp() -> list[Any]:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.connect(("127.0.0.1", 9))
        return [sock]

    def listening() -> list[Any]:
        sock = socket.socket(socket.AF_UNIX)
        sock.bind("")
        sock.listen()
        return [sock]

    return {
        "file": lambda: [open(os.devnull)],
        "pipe": lambda: [os.fdopen(fd) for fd in os.pipe()],
        "eventfd": lambda: [os.fdopen(os.eventfd(0))],
        "unconnected": lambda: [socket.socket(socket.AF_UNIX)],
        "listening": listening,
        "datagrams": lambda: list(socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)),
        "packets": lambda: list(socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)),
        "tcp": tcp,
        "udp": udp,
    }


@pytest.mark.parametrize("kind", [*bad_descriptors(), "closed"])
def test_a_descriptor_that_cannot_be_used(kind: str) -> None:
    made = [] if kind == "closed" else bad_descriptors()[kind]()
    number = made[0].fileno() if made else 99
    command = [sys.executable, "-m", "control", "run", "--fd", str(number)]
    run = subprocess.run(
        command, cwd=ROOT, pass_fds=[number] if made else [], capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    for one in made:
        one.close()
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (1, "", 1), run.stderr
    assert re.match(f"vhostmq: --fd {number} is not a .*socket", run.stderr)


# --- which address means what -------------------------------------------------------------------


@families
def test_map_guest_addr(serve: Serve, world: World, family: int) -> None:
    """The host at the address it shares with the guest: from the guest, and to it."""
    mapped, shared = OTHER[family], HOST4 if family == 4 else HOST6
    forwarded = world.port()
    there, guest = serve("--map-guest-addr", pk.text(mapped), "-u", str(forwarded))
    server = guest.with_host(world.udp(AF[family], shared))
    assert ask(guest, mapped, server) == (mapped, server.port)
    server.send(b"from the host", (shared, forwarded))
    assert guest.next_udp()[1].src == mapped
    listener = world.listen(AF[family], shared)
    Tcp(guest, mapped, listener.port).connect().check()
    listener.close()


@families
def test_without_map_guest_addr(serve: Serve, world: World, family: int) -> None:
    """The host's own address as a source would look to the guest like itself."""
    shared, forwarded = HOST4 if family == 4 else HOST6, world.port()
    there, guest = serve("--map-guest-addr", "none", "-u", str(forwarded))
    client = guest.with_host(world.udp(AF[family], shared))
    client.send(b"who am I?", (shared, forwarded))
    assert guest.next_udp()[1].src == guest.addresses(family)[1]


def test_map_guest_addr_without_an_address(serve: Serve) -> None:
    """A host without IPv6: what stands for the address it shares must not lead to its loopback."""
    island = World(uplink=False)
    assert island.isolated, "a network namespace is needed"
    try:
        where = ("--map-guest-addr", pk.text(OTHER[6]), "--map-host-loopback", "none")
        there, guest = serve(*where, resolve=False, within=island)
        guest.gw_mac = solicit(guest, guest.gw6).eth_src
        server = guest.with_host(island.udp(AF[6]))
        guest.send_udp(OTHER[6], 7000, server.port, b"let me in")
        guest.pump(timeout=0.3)
        assert not server.inbox
    finally:
        island.close()


@families
def test_map_host_loopback(serve: Serve, world: World, family: int) -> None:
    """Another address is the host's loopback, and the gateway is not any more."""
    mapped = OTHER[family]
    there, guest = serve("--map-host-loopback", pk.text(mapped))
    server = guest.with_host(world.udp(AF[family]))
    guest.send_udp(guest.addresses(family)[1], 7000, server.port, b"by the gateway")
    assert ask(guest, mapped, server) == (mapped, server.port)
    assert not server.inbox, "what went to the gateway reached the loopback"
    listener = world.listen(AF[family])
    Tcp(guest, mapped, listener.port).connect().check()
    listener.close()


@pytest.mark.parametrize("option", [["--no-map-gw"], ["--map-host-loopback", "none"]])
def test_no_way_to_the_loopback(serve: Serve, world: World, option: list[str]) -> None:
    there, guest = serve(*option)
    for family in (4, 6):
        server = guest.with_host(world.udp(AF[family]))
        guest.send_udp(guest.addresses(family)[1], 7000, server.port, b"let me in")
        guest.pump(timeout=0.3)
        assert not server.inbox
        far = FAR4 if family == 4 else FAR6  # all else works
        elsewhere = guest.with_host(world.udp(AF[family], far))
        assert ask(guest, pk.ip(far), elsewhere)[0] == pk.ip(far)


@families
def test_dns_forward(serve: Serve, world: World, family: int) -> None:
    """Port 53 of one address is --dns-host's, over UDP and TCP; its other ports are not."""
    assert world.isolated, "port 53 of the loopback is needed"
    resolver, forward = loopback(AF[family]), OTHER[family]
    there, guest = serve("--dns-forward", pk.text(forward), "--dns-host", resolver)
    made = world.socket(AF[family], socket.SOCK_DGRAM)
    made.bind((resolver, 53))
    server = guest.with_host(Datagrams(made))
    assert ask(guest, forward, server, 53) == (forward, 53)
    other = guest.with_host(world.udp(AF[family]))
    guest.send_udp(forward, 7000, other.port, b"not a query")
    guest.pump(timeout=0.3)
    assert not other.inbox
    listening = world.socket(AF[family], socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind((resolver, 53))
    listening.listen()
    Tcp(guest, forward, 53).connect().check()
    listening.close()


# --- protocols switched off ---------------------------------------------------------------------


def connects(guest: Guest, world: World, family: int) -> None:
    tcp, peer = established(guest, world, family)
    exchange(guest, tcp, peer, b"up", b"down")


def pings(guest: Guest, family: int) -> None:
    guest.ping(guest.addresses(family)[1], 5, 1, b"x")
    guest.next_icmp({0, 129})


def test_no_tcp(serve: Serve, world: World) -> None:
    """A SYN is dropped and counted, in both families; all else is as ever."""
    there, guest = serve("--no-tcp")
    for count, family in enumerate((4, 6), 1):
        listener = world.listen(AF[family])
        gateway = guest.addresses(family)[1]
        tcp = Tcp(guest, gateway, listener.port)
        tcp.segment(0, flags=pk.SYN)
        tcp.forget()
        guest.expect_silence(0.2, "an answer to a SYN")
        assert policy_drops(there) == count
        listener.step()
        assert not listener.accepted
        listener.close()
        pings(guest, family)
        ask(guest, gateway, guest.with_host(world.udp(AF[family])))
    assert policy_drops(there) == 2


def test_no_udp(serve: Serve, world: World) -> None:
    """Datagrams are dropped and counted; DHCP and DHCPv6 are not the host's UDP, and go on."""
    there, guest = serve("--no-udp")
    for count, family in enumerate((4, 6), 1):
        server = guest.with_host(world.udp(AF[family]))
        guest.send_udp(guest.addresses(family)[1], 7000, server.port, b"?")
        guest.expect_silence(0.2, "an answer to a datagram")
        assert policy_drops(there) == count and not server.inbox
        pings(guest, family)
        connects(guest, world, family)
    assert pk.text(lease(guest)[0]) == HOST4
    assert pk.ip(HOST6) in dhcp6(guest, 1, {3: struct.pack(">III", 7, 0, 0)})[3]
    assert policy_drops(there) == 2


def test_no_icmp(serve: Serve, world: World) -> None:
    """Pings are dropped and counted; neighbours and routers are not told either."""
    there, guest = serve("--no-icmp")
    for count, family in enumerate((4, 6), 1):
        guest.ping(guest.addresses(family)[1], 5, 1, b"x")
        guest.expect_silence(0.2, "an echo reply")
        assert not guest.icmp and policy_drops(there) == count
        connects(guest, world, family)
        ask(guest, guest.addresses(family)[1], guest.with_host(world.udp(AF[family])))
    assert silent(guest, lambda guest: solicit(guest, guest.gw6))
    assert silent(guest, advertised)
    assert pk.text(lease(guest)[0]) == HOST4
    assert policy_drops(there) == 2


def test_ipv4_only(serve: Serve, world: World) -> None:
    there, guest = serve("-4")
    pings(guest, 4)
    connects(guest, world, 4)
    assert pk.text(lease(guest)[0]) == HOST4
    server = guest.with_host(world.udp(AF[6]))
    guest.send_udp(guest.gw6, 7000, server.port, b"?")
    assert silent(guest, lambda guest: pings(guest, 6))
    assert silent(guest, advertised)
    assert silent(guest, lambda guest: solicit(guest, guest.gw6))
    assert silent(guest, lambda guest: dhcp6(guest, 1, {3: struct.pack(">III", 7, 0, 0)}))
    assert not server.inbox and policy_drops(there) == 5


def test_ipv6_only(serve: Serve, world: World) -> None:
    there, guest = serve("-6", resolve=False)
    guest.gw_mac = solicit(guest, guest.gw6).eth_src
    pings(guest, 6)
    connects(guest, world, 6)
    assert advertised(guest)[1][3][14:] == pk.ip(HOST6)[:8] + bytes(8)
    server = guest.with_host(world.udp(AF[4]))
    guest.send_udp(guest.gw4, 7000, server.port, b"?")
    assert silent(guest, lambda guest: pings(guest, 4))
    assert silent(guest, lease)
    assert not server.inbox and policy_drops(there) == 3
    assert silent(guest, Guest.resolve), "ARP, which is IPv4's"


@pytest.mark.parametrize(
    "option, lost",
    [("--no-dhcp", "dhcp"), ("--no-dhcpv6", "dhcpv6"), ("--no-ndp", "ndp ra"), ("--no-ra", "ra")],
)
def test_services_switched_off(serve: Serve, option: str, lost: str) -> None:
    there, guest = serve(option)
    services: dict[str, Callable[[Guest], Any]] = {
        "dhcp": lease,
        "dhcpv6": lambda guest: dhcp6(guest, 1, {3: struct.pack(">III", 7, 0, 0)}),
        "ndp": lambda guest: solicit(guest, guest.gw6),
        "ra": advertised,
    }
    for name, action in services.items():
        if name in lost.split():
            assert silent(guest, action), name
        else:
            action(guest)


# --- what the guest is told ---------------------------------------------------------------------


def test_mtu(serve: Serve, world: World) -> None:
    """In DHCP's option 26, in the router advertisement, in the MSS we announce, and kept to."""
    there, guest = serve("--mtu", "1400")
    assert lease(guest)[1][26] == struct.pack(">H", 1400)
    assert advertised(guest)[1][5] == struct.pack(">HI", 0, 1400)
    for family, header in ((4, 40), (6, 60)):
        tcp, peer = established(guest, world, family, mss=9000)
        assert tcp.segments[0].mss == 1400 - header
        largest = 0
        exchange(guest, tcp, peer, b"", bytes(100_000))
        for packet in tcp.segments:
            largest = max(largest, len(packet.payload))
        assert largest == 1400 - header, (
            "a segment longer than the guest's MTU, or all of them small"
        )


def test_the_mtu_of_the_guests_device(serve: Serve) -> None:
    """A front-end may name it, if it makes sense; that it is less than the guest is told is said.
    And where a guest has moved to is nobody's business.
    """
    there, guest = serve("--mtu", "1500")
    for mtu, code in ((1500, 0), (0, 1), (65536, 1), (1400, 0), (65535, 0)):
        assert guest.drv.call(NET_SET_MTU, struct.pack("<Q", mtu)) == code
    assert guest.drv.call(SEND_RARP, guest.mac + bytes(2)) == 0
    pings(guest, 4)
    assert there.said("use --mtu") == [
        "vhostmq: the guest's device has MTU 1400, it is told 1500: use --mtu 1400"
    ]


def test_no_mtu(serve: Serve) -> None:
    there, guest = serve("--mtu", "0")
    assert 26 not in lease(guest)[1] and 5 not in advertised(guest)[1]


def test_mac_addr(serve: Serve, world: World) -> None:
    """Everything the guest sees comes from this address."""
    mac = pk.mac("02:aa:bb:cc:dd:ee")
    there, guest = serve("--mac-addr", "02:AA:bb:cc:dd:ee", resolve=False)
    seen: set[bytes] = set()
    guest.on_packet = lambda packet, pair: seen.add(packet.eth_src)
    guest.resolve()
    assert guest.gw_mac == mac
    assert solicit(guest, guest.gw6).body[20:] == b"\2\1" + mac
    assert advertised(guest)[1][1] == mac
    lease(guest)
    dhcp6(guest, 1, {3: struct.pack(">III", 7, 0, 0)})
    for family in (4, 6):
        pings(guest, family)
        ask(guest, guest.addresses(family)[1], guest.with_host(world.udp(AF[family])))
        connects(guest, world, family)
    assert seen == {mac}


def test_addresses_and_names(serve: Serve, world: World) -> None:
    """A network of the operator's own making; the guest's packets leave by the host's all the
    same.
    """
    there, guest = serve(
        *("--address", "10.9.8.7", "--netmask", "20", "--gateway", "10.9.8.1"),
        *("--dns", "10.9.8.53", "--dns", "2001:db8:9::53"),
        *("--address", "2001:db8:9::7", "--gateway", "fe80::9"),
        *("--search", "one.example two.example", "--hostname", "vm7", "--fqdn", "vm7.one.example"),
        resolve=False,
    )  # fmt: skip
    guest.ip4, guest.gw4 = pk.ip("10.9.8.7"), pk.ip("10.9.8.1")
    guest.ip6, guest.gw6 = pk.ip("2001:db8:9::7"), pk.ip("fe80::9")
    guest.resolve()
    address, options = lease(guest)
    assert (pk.text(address), pk.text(options[1])) == ("10.9.8.7", "255.255.240.0")
    assert (pk.text(options[3]), pk.text(options[6])) == ("10.9.8.1", "10.9.8.53")
    assert options[12] == b"vm7"
    assert options[119].startswith(b"\3one\7example\0\3two")
    advert, told = advertised(guest)
    assert advert.src == pk.ip("fe80::9") and told[3][14:22] == pk.ip("2001:db8:9::")[:8]
    assert told[25][6:] == pk.ip("2001:db8:9::53")
    assert b"\3two\7example\0" in told[31]
    for family in (4, 6):
        server = guest.with_host(world.udp(AF[family]))
        gateway = guest.addresses(family)[1]
        assert ask(guest, gateway, server) == (gateway, server.port)


def test_a_guest_without_a_link_local_address(serve: Serve, world: World) -> None:
    """What comes by the host's ::1 comes from the gateway, which is link-local here: it has nowhere
    to go until the guest has used such an address."""
    ports = ("-t", str(FORWARD_TCP), "-u", str(FORWARD_UDP))
    there, guest = serve("--gateway", "fe80::9", *ports)
    guest.gw6 = pk.ip("fe80::9")
    client, to = guest.with_host(world.udp(AF[6])), (loopback(AF[6]), FORWARD_UDP)
    client.send(b"anybody?", to)

    def dropped() -> float:
        return there.total("vhostmq_drops_total", reason="no_guest")

    assert guest.pump(dropped, what="a counted drop") == 1
    peer = guest.with_host(world.connect(AF[6], FORWARD_TCP))
    guest.pump(lambda: peer.error or peer.eof, what="a refusal at the host")
    assert there.total("vhostmq_accept_failed_total") == 1
    pings(guest, 6)
    client.send(b"and now?", to)
    packet = guest.next_udp()[1]
    assert (packet.src, packet.dst, packet.payload) == (guest.gw6, LINK_LOCAL, b"and now?")
    assert dropped() == 1


def test_names_kept_back(serve: Serve) -> None:
    named = ("--dns", "192.0.2.53", "--dns", "2001:db8::53", "--search", "one.example")
    there, guest = serve(*named, "--no-dhcp-dns", "--no-dhcp-search")
    assert not {6, 119} & lease(guest)[1].keys()
    assert not {25, 31} & advertised(guest)[1].keys()
    wishes = {3: struct.pack(">III", 7, 0, 0), 6: struct.pack(">HH", 23, 24)}
    assert not {23, 24} & dhcp6(guest, 1, wishes).keys()


def test_interface(serve: Serve) -> None:
    """Addresses and routes of the interface named, though another has the best route."""
    lab = World()
    assert lab.isolated, "a network namespace is needed"
    for line in (
        "link add two0 type veth peer name two1",
        "link set two0 up",
        "link set two1 up",
        "addr add 203.0.113.5/28 dev two0",
        "route add default via 203.0.113.1 dev two0 metric 900",
    ):
        lab.run(subprocess.run, ["ip", *line.split()], check=True)
    try:
        there, guest = serve("--interface", "two0", resolve=False, within=lab)
        address, options = lease(guest)
        assert pk.text(address) == "203.0.113.5"
        assert (pk.text(options[1]), pk.text(options[3])) == ("255.255.255.240", "203.0.113.1")
        assert 3 not in advertised(guest)[1], "a prefix of an interface without a global address"
    finally:
        lab.close()


def test_queues_and_workers(make_backend: Callable[..., Backend]) -> None:
    there = make_backend("--queues", "3", "--workers", "2")
    channel = Channel(there.path)
    channel.send(GET_QUEUE_NUM)
    assert channel.receive()[2] == struct.pack("<Q", 3)
    channel.close()
    assert there.total("vhostmq_workers") == 2 and there.total("vhostmq_queue_pairs") == 3
