"""The same transfers with every virtio feature on and off: the same bytes at both ends, and frames
that a guest with just these features may be given.

Sets of features: all, all but one, one with what it needs, none; they come from what is served, so
a new name is tested as soon as it is there. `Card` stands between the guest's stack and its rings.
On the way out it does in software what the features do not allow (offload.py), so the stack says
the same in every run. On the way in it holds each raw frame against the features (judge.py) before
the stack sees it.

What a run leaves is compared with the run without any feature: everything a host's socket was
given, and the guest's datagrams as they would be on a cable, headers included. TCP may cut a stream
as it likes: its bytes, put together from the frames, must be those sent.
"""

from __future__ import annotations

import itertools
import random
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import packets as pk
import pytest
from backend import Backend
from driver import CSUM, GUEST_CSUM, MRG_RXBUF, PROTOCOL_FEATURES, VERSION_1
from guest import Guest, holds, random_bytes
from judge import GSO_NEEDS, NEEDS, Judge, Stream, agreed
from minitcp import Tcp, established, exchange, listen
from offload import CWR, HOST_ECN, TAKES, lower
from packets import PLAIN, Packet, VnetHeader
from vring import ONE, Layout
from world import Datagrams, Peer, World

from control.features import SERVED, offered

PORT = 15301
ports = itertools.count(2000)  # flows outlive their guest: each has a port of its own
ARGS = ("--queues", "1", "-t", str(PORT))
AF = {4: socket.AF_INET, 6: socket.AF_INET6}
BYTES = {4: 4, 6: 16}
MSS = {4: 1460, 16: 1440}
BASE = VERSION_1 | PROTOCOL_FEATURES
ALL = sum(SERVED.values())
INDIRECT = 1 << 28
BIG = sum(GSO_NEEDS.values())
BULK = 150_000
WRITES = (1, 2, 3, 100, 535, 1439, 1440, 1441, 1460, 1461, 3000)
# A datagram's size, how many of them one system call (or one frame) has, and one more at the end.
UDP = (
    *((size, 1, 0) for size in (0, 1, 2, 17, 1000, 1452)),
    (64, 4, 0), (1200, 30, 0), (1200, 5, 7), (1, 100, 0), (1452, 2, 1451), (500, 128, 0), (9, 2, 0),
)  # fmt: skip

pytestmark = pytest.mark.passt_lacks("most of the features")
families = pytest.mark.parametrize("family", [4, 6])


def with_needs(bit: int) -> int:
    """A feature and all it may rest on."""
    needed = NEEDS.get(bit, 0)
    for other in NEEDS:
        needed |= NEEDS[other] if needed & other else 0
    return bit | needed


def some(rng: random.Random) -> int:
    """About half of all features, as far as they go together."""
    return agreed(sum(bit for bit in SERVED.values() if rng.random() < 0.6))


SETS = {
    "all": ALL,
    **{f"-{name}": agreed(ALL & ~bit) for name, bit in SERVED.items()},
    **{f"+{name}": with_needs(bit) & ALL for name, bit in SERVED.items()},
    **{f"some{n}": some(random.Random(n)) for n in range(20)},
}


class Card:
    """A guest's network card: offloads in software on the way out, a judge on the way in."""

    def __init__(self, guest: Guest, effective: int) -> None:
        self.features = effective
        self.judge = Judge(effective, MSS)
        self.frames: list[tuple[VnetHeader, bytes]] = []
        self.kinds: set[int] = set()
        self.finished: set[int] = set()
        self._stack, self._driver, self._number = guest.dispatch, guest.transmit, itertools.count()
        shapes = (ONE, Layout((12,)), Layout((12, 54)), Layout((40, 3)))
        indirect = [Layout(one.sizes, indirect=True) for one in shapes]
        guest.layouts = itertools.cycle(indirect if effective & INDIRECT else shapes)
        guest.dispatch, guest.transmit = self._receive, self._send  # type: ignore[method-assign]

    def _send(self, frame: bytes, *, header: VnetHeader = PLAIN, **how: Any) -> None:
        if header.gso_type in (pk.GSO_TCP4, pk.GSO_TCP6) and next(self._number) % 2:
            at = (34 if header.gso_type == pk.GSO_TCP4 else 54) + 13
            frame = frame[:at] + bytes((frame[at] | CWR,)) + frame[at + 1 :]
            header = replace(header, gso_type=header.gso_type | pk.GSO_ECN)
        for changed, piece in lower(header, frame, self.features):
            self._driver(piece, header=changed, **how)

    def _receive(self, pair: int, header: VnetHeader, frame: bytes) -> None:
        self.judge.look(header, frame)
        self.frames.append((header, frame))
        self.kinds.add(header.gso_type)
        self.finished.add(header.flags)
        self._stack(pair, header, frame)

    def on_cable(self, proto: int, port: int) -> list[tuple[bytes, Packet]]:
        """What came from this port of the host, each frame as on a cable and parsed."""
        found = []
        for header, frame in self.frames:
            for plain, piece in lower(header, frame):
                packet = pk.parse(piece.ljust(60, b"\0"), plain)
                if packet.proto == proto and packet.sport == port:
                    found.append((piece, packet))
        return found


@dataclass
class Found:
    """What a run left that may not depend on features."""

    pings: list[bytes] = field(default_factory=list)
    host_datagrams: list[bytes] = field(default_factory=list)
    host_hops: set[int] = field(default_factory=set)
    datagrams: list[bytes] = field(default_factory=list)
    refusals: list[bytes] = field(default_factory=list)
    headers: set[bytes] = field(default_factory=set)
    syn: list[tuple] = field(default_factory=list)
    streams: dict[str, bytes] = field(default_factory=dict)


def all_transfers(guest: Guest, card: Card, world: World, family: int) -> Found:
    """A little of everything in both directions."""
    found = Found()
    ping(guest, family, found)
    datagrams(guest, card, world, family, found)
    refused_datagram(guest, world, family, found)
    streams(guest, card, world, family, found)
    from_host(guest, card, world, family, found)
    return found


def ping(guest: Guest, family: int, found: Found) -> None:
    reply = {4: 0, 6: 129}[family]
    for number, size in enumerate((0, 1, 56, 1400)):
        guest.ping(guest.addresses(family)[1], 7, number, random_bytes(size, number))
        found.pings.append(guest.next_icmp({reply})[1].body)


def contents(size: int, count: int, last: int, number: int) -> list[bytes]:
    """The datagrams of one entry of UDP, each unlike the others."""
    sizes = [size] * count + ([last] if last else [])
    return [random_bytes(each, 1000 * number + at) for at, each in enumerate(sizes)]


def datagrams(guest: Guest, card: Card, world: World, family: int, found: Found) -> None:
    host, port = guest.with_host(world.udp(AF[family])), next(ports)
    host.record_hops()
    for number, kind in enumerate(UDP):
        parts = contents(*kind, number)
        send_train(guest, family, (port, host.port), parts)
        guest.drv.publish(guest.drv.tx(0))
        guest.pump(holds(host.inbox, len(found.host_datagrams) + len(parts)), 5, f"{kind} up")
        found.host_datagrams += parts
        assert [data for data, _ in host.inbox] == found.host_datagrams, f"{kind} at the host"
    found.host_hops |= set(host.hops)
    for number, kind in enumerate(UDP):
        parts = contents(*kind, 100 + number)
        cut = [(socket.IPPROTO_UDP, 103, struct.pack("H", kind[0]))] if len(parts) > 1 else []
        host.socket.sendmsg([b"".join(parts)], cut, 0, host.inbox[-1][1])
        found.datagrams += parts
        wait_datagrams(guest, len(b"".join(found.datagrams)), kind)
        guest.pump(timeout=0 if any(parts) else 0.02)
    seen = card.on_cable(pk.UDP, host.port)
    assert [packet.payload for _, packet in seen] == found.datagrams, "datagrams at the guest"
    found.headers |= {anonymous(frame, family) for frame, _ in seen}


def send_train(guest: Guest, family: int, ports: tuple[int, int], parts: list[bytes]) -> None:
    """Datagrams of the guest's stack, which leaves the cutting and the checksum to its card."""
    src, dst = guest.addresses(family)
    payload = b"".join(parts)
    body = pk.udp(src, dst, *ports, payload, csum="partial")
    frame = pk.ip_frame((guest.gw_mac, guest.mac), pk.ip_packet(src, dst, pk.UDP, body))
    size = len(parts[0]) if len(parts) > 1 else 0
    guest.transmit(frame, header=pk.needs_csum(frame, gso_size=size), publish=False)


def wait_datagrams(guest: Guest, size: int, kind: tuple) -> None:
    guest.pump(lambda: sum(len(p.payload) for _, p in guest.udp) >= size, 5, f"{kind} down")


def anonymous(frame: bytes, family: int) -> bytes:
    """The headers without what differs from one datagram to the next: ports, lengths, checksums."""
    head = bytearray(frame[: 42 if family == 4 else 62])
    for at in (16, 17, 24, 25) if family == 4 else (18, 19):
        head[at] = 0
    return bytes(head[:-8])


def refused_datagram(guest: Guest, world: World, family: int, found: Found) -> None:
    """An ICMP error is a frame like others."""
    closed: Datagrams = world.udp(AF[family])
    closed.close()
    guest.send_udp(guest.addresses(family)[1], next(ports), closed.port, b"anybody there?")
    found.refusals.append(guest.next_icmp({3} if family == 4 else {1})[1].body[:4])


def connected(guest: Guest, world: World, family: int, **options: Any) -> tuple[Tcp, Peer]:
    mss = MSS[BYTES[family]]
    return established(guest, world, family, mss=mss, lport=next(ports), **options)


def streams(guest: Guest, card: Card, world: World, family: int, found: Found) -> None:
    """A connection to the host, written to in small pieces and in a large one, both ways."""
    tcp, peer = connected(guest, world, family, tso=True)
    for number, size in enumerate(WRITES):
        exchange(guest, tcp, peer, random_bytes(size, number), random_bytes(size, 50 + number))
    exchange(guest, tcp, peer, random_bytes(BULK, 1), random_bytes(BULK, 2))
    finish(guest, card, tcp, peer, found, "there")


def from_host(guest: Guest, card: Card, world: World, family: int, found: Found) -> None:
    """A connection from the host."""
    accepted = listen(guest, PORT, mss=MSS[BYTES[family]], tso=True)
    peer = guest.with_host(world.connect(AF[family], PORT))
    guest.pump(lambda: accepted and accepted[0].state == "established", 5, "a connection")
    exchange(guest, accepted[0], peer, random_bytes(9000, 3), random_bytes(9000, 4))
    finish(guest, card, accepted[0], peer, found, "back")


def finish(guest: Guest, card: Card, tcp: Tcp, peer: Peer, found: Found, name: str) -> None:
    """Close both directions, and note what each end was given."""
    tcp.close()
    peer.shutdown()
    guest.pump(lambda: tcp.eof and peer.eof and tcp.all_acked, 5, f"both ends: {tcp}")
    tcp.check()
    stream = Stream()
    for _, packet in card.on_cable(pk.TCP, tcp.rport):
        stream.add(packet)
        if packet.flags & pk.SYN:
            syn = (packet.mss, packet.wscale, packet.sack_permitted)
            if syn not in found.syn:
                found.syn.append(syn)
    assert stream.whole() == bytes(tcp.received), "frames and stack disagree"
    found.streams |= {f"{name} up": bytes(peer.inbox), f"{name} down": stream.whole()}
    tcp.forget()


# --- the tests ------------------------------------------------------------------------------------

_plain: dict[int, Found] = {}


def run(
    make_guest: Callable[..., Guest], world: World, family: int, features: int,
    rx: tuple[int, ...] = (),
) -> tuple[Card, Found]:  # fmt: skip
    """A guest that takes these features, consistent or not, and posts receive buffers so shaped."""
    effective = agreed(features)
    if not rx:  # as Linux posts them
        rx = (65562,) if effective & BIG and not effective & MRG_RXBUF else (1526,)
    guest = make_guest(features=BASE | features, rx=rx, num=1024 if sum(rx) < 1000 else 256)
    assert guest.drv.features == BASE | features, f"{guest.drv.offered:#x} is offered"
    card = Card(guest, effective)
    found = all_transfers(guest, card, world, family)
    guest.drv.channel.close()  # the back-end serves one at a time
    return card, found


def plain(make_guest: Callable[..., Guest], world: World, family: int) -> Found:
    """What a guest finds that takes no feature at all."""
    if family not in _plain:
        _plain[family] = run(make_guest, world, family, 0)[1]
    return _plain[family]


@families
@pytest.mark.parametrize("name", SETS)
def test_every_set(make_guest: Callable[..., Guest], world: World, family: int, name: str) -> None:
    """As without any; and what was agreed on is made use of."""
    wanted = plain(make_guest, world, family)
    card, found = run(make_guest, world, family, SETS[name])
    assert found == wanted
    kinds = {kind for (kind, size), bit in GSO_NEEDS.items() if card.features & bit
             and size == BYTES[family]}  # fmt: skip
    assert card.kinds == {0} | kinds
    assert card.finished == ({0, 1} if card.features & 2 else {0})


@families
@pytest.mark.parametrize("name", ["all", "-guest_csum"])
@pytest.mark.parametrize("rx", [(4096,), (65562,), (101, 60), (11, 1516), (12, 2000)], ids=str)
def test_every_shape(
    make_guest: Callable[..., Guest], world: World, family: int, rx: tuple[int, ...], name: str
) -> None:
    """Into receive buffers of other shapes, odd ones among them."""
    assert run(make_guest, world, family, SETS[name], rx)[1] == plain(make_guest, world, family)


@families
@pytest.mark.parametrize("features", [0, agreed(ALL & ~MRG_RXBUF)], ids=["none", "-mrg_rxbuf"])
def test_buffers_smaller_than_a_segment(
    make_guest: Callable[..., Guest], world: World, family: int, features: int
) -> None:
    """Without MRG_RXBUF a frame is in one buffer, whatever that takes: streams are cut smaller."""
    wanted = plain(make_guest, world, family)
    guest, found = make_guest(features=BASE | features, rx=(600,)), Found()
    card = Card(guest, features)
    streams(guest, card, world, family, found)
    from_host(guest, card, world, family, found)
    assert (found.streams, found.syn) == (wanted.streams, wanted.syn)
    assert card.kinds == {0} and max(len(frame) for _, frame in card.frames) <= 588


@families
@pytest.mark.parametrize("name", [name for name, bit in SERVED.items() if bit in NEEDS])
@pytest.mark.parametrize("rest", ["alone", "all the others"])
def test_needs_that_are_not_met(
    make_guest: Callable[..., Guest], world: World, family: int, name: str, rest: str
) -> None:
    """A front-end takes a feature without what it needs (virtio 1.3 5.1.3.1): as if it had not."""
    bit = SERVED[name]
    features = bit if rest == "alone" else ALL & ~NEEDS[bit]
    assert not agreed(features) & bit
    assert run(make_guest, world, family, features)[1] == plain(make_guest, world, family)


@families
@pytest.mark.parametrize("kind", ["checksum", "tso", "uso", "ecn"])
def test_offloads_that_were_not_agreed_on(
    backend: Backend, make_guest: Callable[..., Guest], world: World, family: int, kind: str
) -> None:
    """A frame that asks for one goes nowhere, and is counted."""
    tso = pk.GSO_TCP4 if family == 4 else pk.GSO_TCP6
    bit = {"checksum": CSUM, "tso": TAKES[tso], "uso": TAKES[pk.GSO_UDP_L4], "ecn": HOST_ECN}[kind]
    guest = make_guest(features=BASE | MRG_RXBUF | agreed(ALL & ~bit))
    before = backend.total("vhostmq_drops_total", reason="bad_offload")
    if kind in ("tso", "ecn"):
        tcp, peer = connected(guest, world, family)
        tcp.tso, tcp.retransmit = True, False
        if kind == "ecn":
            transmit, ecn = guest.transmit, tso | pk.GSO_ECN

            def marked(frame: bytes, *, header: VnetHeader, **how: Any) -> None:
                transmit(frame, header=replace(header, gso_type=ecn), **how)

            guest.transmit = marked  # type: ignore[method-assign]
        tcp.send(bytes(20_000))
        reached: Any = peer.inbox
    else:
        host = guest.with_host(world.udp(AF[family]))
        parts = [bytes(700)] * (3 if kind == "uso" else 1)
        send_train(guest, family, (next(ports), host.port), parts)
        guest.drv.publish(guest.drv.tx(0))
        reached = host.inbox
    guest.drv.wait_sent(0)
    guest.pump(lambda: backend.total("vhostmq_drops_total", reason="bad_offload") > before, 5)
    guest.pump(timeout=0.05)
    assert backend.total("vhostmq_drops_total", reason="bad_offload") == before + 1
    assert not reached


@families
@pytest.mark.parametrize("features", [0, GUEST_CSUM], ids=["none", "guest_csum"])
def test_checksum_that_comes_out_as_zero(
    make_guest: Callable[..., Guest], world: World, family: int, features: int
) -> None:
    """It is sent as all ones (RFC 768): zero stands for none, which IPv6 forbids."""
    guest, port = make_guest(features=BASE | features), next(ports)
    card, host = Card(guest, features), guest.with_host(world.udp(AF[family]))
    send_train(guest, family, (port, host.port), [b"hello"])
    guest.drv.publish(guest.drv.tx(0))
    guest.pump(holds(host.inbox, 1), 5, "hello at the host")
    ours, far = guest.addresses(family)
    draft = struct.pack(">HHHHH", host.port, port, 10, 0, 0)
    payload = struct.pack(">H", pk.checksum(pk.pseudo(far, ours, pk.UDP, 10) + draft))
    host.send(payload, host.inbox[0][1])
    assert guest.next_udp()[1].payload == payload
    assert card.frames[-1][1][40 if family == 4 else 60 :][:2] == b"\xff\xff" or features


@families
def test_flow_that_outlives_its_guest(
    make_guest: Callable[..., Guest], world: World, family: int
) -> None:
    """The next guest (or the same after a reboot) speaks from the same port to the same, but takes
    no large datagrams: each comes alone."""
    port, host = next(ports), world.udp(AF[family])
    for features in (ALL, MRG_RXBUF):
        guest = make_guest(features=BASE | features, rx=(1526,))
        guest.with_host(host)
        card = Card(guest, features)
        send_train(guest, family, (port, host.port), [b"hello"])
        guest.drv.publish(guest.drv.tx(0))
        guest.pump(holds(host.inbox, 1), 5, "hello at the host")
        parts = contents(1200, 5, 7, 1)
        cut = [(socket.IPPROTO_UDP, 103, struct.pack("H", 1200))]
        host.socket.sendmsg([b"".join(parts)], cut, 0, host.inbox.pop()[1])
        wait_datagrams(guest, len(b"".join(parts)), (1200, 5, 7))
        guest.drv.channel.close()
        assert [packet.payload for _, packet in card.on_cable(pk.UDP, host.port)] == parts


@pytest.mark.parametrize("name", SERVED)
def test_switches(name: str) -> None:
    """--features takes a name away with all that needs it, and gives it with nothing else."""
    bit = SERVED[name]
    assert offered(f"-{name}", 1) == VERSION_1 | agreed(ALL & ~bit)
    needed = [one for one, its in SERVED.items() if its & with_needs(bit)]
    assert offered(",".join(["none", *needed]), 1) == VERSION_1 | with_needs(bit) & ALL
