"""Datagrams and echo replies above the guest's MTU: they come as IP fragments, no frame without GSO
is ever larger, and put together again they are what was sent.

`Wire` stands between the rings and the guest's stack. It holds every frame against the MTU, puts
fragments together as RFC 791 3.2 and RFC 8200 4.5 have it, refusing all that a strict host would
refuse, and gives the stack whole packets, whose checksums `packets.parse` then verifies.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from typing import Any

import packets as pk
import pytest
from backend import Backend
from driver import BASIC, CSUM, GUEST_CSUM, GUEST_USO4, GUEST_USO6, HOST_USO
from formats import all_formats
from guest import Guest, holds, random_bytes
from packets import BadFrame, VnetHeader
from test_dataplane_basic import lease
from test_dataplane_room import Make, limit
from world import Datagrams, World, loopback

from control.listeners import bind_all, close_all
from dataplane.lifecycle import FIRST_WORKER
from flows.forward import Port

AF = {4: socket.AF_INET, 6: socket.AF_INET6}
IP_BYTES, EXTRA = {4: 20, 6: 40}, {4: 0, 6: 8}
WHOLE = BASIC & ~(1 << 15)  # without MRG_RXBUF
USO = CSUM | GUEST_CSUM | HOST_USO | GUEST_USO4 | GUEST_USO6
SOL_UDP, UDP_SEGMENT, UDP_L4 = 17, 103, 5
FRAGMENT, MORE, DONT = 44, 0x2000, 0x4000
families = pytest.mark.parametrize("family", [4, 6])
REAL = pytest.mark.passt_lacks("its own idea of the MTU")


def most(mtu: int, family: int) -> int:
    """Payload of the largest datagram that is one packet."""
    return mtu - IP_BYTES[family] - 8


def pieces(size: int, mtu: int, family: int) -> int:
    """Packets that a datagram of `size` bytes takes."""
    if size <= most(mtu, family):
        return 1
    each = (mtu - IP_BYTES[family] - EXTRA[family]) // 8 * 8
    return -(-(size + 8) // each)


class Wire:
    """What a guest's IP does with what its card gives it, on a link of this MTU."""

    def __init__(self, guest: Guest, mtu: int) -> None:
        self.mtu, self.stack = mtu, guest.dispatch
        self.open: dict[tuple, dict[int, tuple[bytes, bool]]] = {}
        self.frames = 0  # UDP and ICMP, whole or in part
        self.identities: list[int] = []
        guest.dispatch = self.dispatch  # type: ignore[method-assign]

    def dispatch(self, pair: int, header: VnetHeader, frame: bytes) -> None:
        kind = struct.unpack_from(">H", frame, 12)[0]
        if not header.gso_type and len(frame) > 14 + self.mtu:
            raise BadFrame(f"frame of {len(frame)} bytes without GSO, MTU {self.mtu}")
        if kind == pk.IP4 and struct.unpack_from(">H", frame, 20)[0] & 0x3FFF:
            self._fragment(pair, header, frame, *self._open4(frame))
        elif kind == pk.IP6 and frame[20] == FRAGMENT:
            self._fragment(pair, header, frame, *self._open6(frame))
        else:
            self.frames += kind in (pk.IP4, pk.IP6)
            self.stack(pair, header, frame)

    def _open4(self, frame: bytes) -> tuple[tuple, int, bool, bytes]:
        head = frame[14:34]
        total, identity, flags = struct.unpack_from(">HHH", head, 2)
        if head[0] != 0x45 or pk.folded(head) != 0xFFFF or flags & ~(MORE | 0x1FFF):
            raise BadFrame(f"fragment with the header {head.hex()}")
        if any(frame[14 + total :]) or len(frame) > max(60, 14 + total):
            raise BadFrame("stray bytes after a fragment")
        key = (head[12:16], head[16:20], head[9], identity)
        return key, (flags & 0x1FFF) * 8, bool(flags & MORE), frame[34 : 14 + total]

    def _open6(self, frame: bytes) -> tuple[tuple, int, bool, bytes]:
        length = struct.unpack_from(">H", frame, 18)[0]
        proto, reserved, offset, identity = struct.unpack_from(">BBHI", frame, 54)
        if frame[14:18] != b"\x60\0\0\0" or reserved or offset & 6 or len(frame) != 54 + length:
            raise BadFrame(f"fragment with the header {frame[14:62].hex()}")
        key = (frame[22:38], frame[38:54], proto, identity)
        return key, offset & ~7, bool(offset & 1), frame[62:]

    def _fragment(
        self, pair: int, header: VnetHeader, frame: bytes, key: tuple, at: int, more: bool,
        data: bytes,
    ) -> None:  # fmt: skip
        self.frames += 1
        if header.flags or header.gso_type or header.hdr_len or header.gso_size:
            raise BadFrame(f"fragment with offloads: {header}")
        if not data or (more and len(data) % 8):
            raise BadFrame(f"fragment of {len(data)} bytes that is not the last")
        if key not in self.open:
            self.identities.append(key[3])
        parts = self.open.setdefault(key, {})
        if at in parts:
            raise BadFrame(f"fragment {at} of {key} came twice")
        parts[at] = (data, more)
        end = 0
        for start in sorted(parts):
            if start != end:
                return
            end += len(parts[start][0])
        if parts[max(parts)][1]:
            return
        del self.open[key]
        body = b"".join(parts[start][0] for start in sorted(parts))
        packet = pk.ip_packet(key[0], key[1], key[2], body, ttl=64)
        self.stack(pair, pk.PLAIN, frame[:14] + packet.ljust(46, b"\0"))


@pytest.fixture
def make(world: World, make_local: Callable[..., Guest], rings: int) -> Make:
    return Make(world, make_local, rings)


def talk(make: Make, family: int, mtu: int, **options: Any) -> tuple[Guest, Datagrams, tuple, Wire]:
    """A guest on a link of this MTU that has sent a datagram, and who answers it."""
    options = {"features": BASIC | GUEST_CSUM, "rx": (1526,), **options}
    guest, host, client = make.conversation(family, **options)
    guest.drv.net["mtu"] = mtu
    return guest, host, client, Wire(guest, mtu)


def give(guest: Guest, host: Datagrams, client: tuple, sizes: list[int]) -> None:
    """Datagrams of these sizes from the host, all there when the device looks."""
    guest.udp.clear()
    payloads = [random_bytes(size, number) for number, size in enumerate(sizes)]
    for payload in payloads:
        host.send(payload, client)
    guest.pump(holds(guest.udp, len(sizes)), 5, f"datagrams of {sizes}")
    assert [packet.payload for _, packet in guest.udp] == payloads


@families
@pytest.mark.parametrize("mtu", [576, 1280, 1281, 1500, 9000, 65520])
@all_formats
def test_around_the_mtu(make: Make, family: int, mtu: int) -> None:
    """To the last byte and beyond, one by one and mixed with small ones, where what came last was
    small and where it was large."""
    told, mtu = mtu, mtu if family == 4 else max(mtu, 1280)  # RFC 8200 5
    guest, host, client, wire = talk(make, family, mtu)
    guest.drv.net["mtu"] = told
    edge = min(most(mtu, family), 65507)
    sizes = [0, edge - 1, edge, *({edge + 1, 4000, 1472, 1473, 65507} - {65508}), edge, 7]
    for size in sizes:
        before = wire.frames
        give(guest, host, client, [size])
        assert wire.frames - before == pieces(size, mtu, family), f"{size} bytes"
    for batch in ([1, 4000, 2, 1473, 4000, 3], [min(edge, 9000), 1, min(edge + 1, 9000), 2]):
        give(guest, host, client, batch)
    assert not wire.open


@families
@pytest.mark.parametrize(
    ("features", "rx"),
    [
        (BASIC, (1526,)),
        (BASIC | GUEST_CSUM, (65562,)),
        (BASIC | GUEST_CSUM, (400,)),
        (BASIC | GUEST_CSUM, (70, 300)),
        (WHOLE | GUEST_CSUM, (1526,)),
        (WHOLE, (12, 1514)),
    ],
    ids=str,
)
def test_buffers_of_other_shapes(
    make: Make, family: int, features: int, rx: tuple[int, ...]
) -> None:
    """Into 64 KiB each, into several each, and, without MRG_RXBUF, where the datagram as it is
    would have found no buffer at all; with checksums finished by us or by the guest."""
    guest, host, client, _ = talk(make, family, 1500, features=features, rx=rx)
    give(guest, host, client, [1473])
    give(guest, host, client, [1, 4000, 9000, 2, 20_000, 100])
    give(guest, host, client, [64] * 40)


@families
@all_formats
def test_all_or_none(make: Make, family: int) -> None:
    """As many buffers as there are fragments will do; with one less nothing comes, it is counted
    once, no buffer is used, and the next one comes."""
    guest, host, client, wire = talk(make, family, 1500)
    count = pieces(20_000, 1500, family)
    for chains, fits in ((count, True), (count - 1, False), (count, True), (2, False)):
        limit(guest, 0, chains)
        before = guest.drv.drops("rx_full", 0)
        guest.udp.clear()
        host.send(random_bytes(20_000), client)
        if fits:
            assert guest.next_udp()[1].payload == random_bytes(20_000)
        else:
            frames = wire.frames
            guest.drv.settle()
            assert not guest.drv.rx(0).ring.pending()
            assert len(guest.drv.rx(0).ring.chains) == chains
            give(guest, host, client, [100])
            assert wire.frames == frames + 1
        assert guest.drv.drops("rx_full", 0) - before == (not fits)
    assert not wire.open


@families
def test_several_of_the_largest(make: Make, family: int) -> None:
    """45 or 46 fragments each into a ring of 256; of those that do not fit none comes in part."""
    guest, host, client, wire = talk(make, family, 1500)
    give(guest, host, client, [65507] * 2)
    payload, answers = random_bytes(60_000), 0
    for _ in range(6):  # the device looks each time, the guest takes nothing
        host.send(payload, client)
        guest.drv.settle()
    fit = 256 // pieces(60_000, 1500, family)
    assert guest.drv.rx(0).ring.pending() == fit * pieces(60_000, 1500, family)
    assert guest.drv.drops("rx_full", 0) == 6 - fit
    guest.udp.clear()
    guest.pump(holds(guest.udp, fit), 5, "what fitted")
    answers = [packet.payload for _, packet in guest.udp]
    assert answers == [payload] * fit and not wire.open


def test_more_fragments_than_are_made(make: Make) -> None:
    """The smallest MTU there is: 48 bytes a fragment. The largest datagram is dropped, counted."""
    guest, host, client, wire = talk(make, 4, 68, num=1024)
    give(guest, host, client, [41, 40, 5000, 12_000])
    host.send(random_bytes(65507), client)
    guest.drv.settle()
    assert guest.drv.drops("rx_full", 0) == 1 and not guest.drv.rx(0).ring.pending()
    give(guest, host, client, [3000])


@families
@pytest.mark.parametrize("mtu", [1280, 1500, 9000])
def test_the_first_datagram_to_a_forwarded_port(make: Make, family: int, mtu: int) -> None:
    """It comes by the listening socket, those that follow by a socket of the conversation."""
    guest = make.guest(features=BASIC | GUEST_CSUM, rx=(1526,))
    guest.drv.net["mtu"] = mtu
    number, wire = make.world.port(), Wire(guest, mtu)
    bound = make.world.run(bind_all, [Port("udp", None, None, number, number, None, False)], 1)
    (socket_,) = bound[0].sockets
    guest.drv.forward(socket_, 5353, "udp")
    for size in (1, most(mtu, family), most(mtu, family) + 1, 4000, 65507):
        client = guest.with_host(make.world.udp(AF[family]))
        guest.udp.clear()
        for payload in (random_bytes(size, 1), random_bytes(size, 2)):
            before = wire.frames
            client.send(payload, (loopback(AF[family]), number))
            assert guest.next_udp()[1].payload == payload
            assert wire.frames - before == pieces(size, mtu, family)
    assert not wire.open
    close_all(bound)


@families
@pytest.mark.parametrize("num", [256, 16])
def test_to_another_workers_ring(make: Make, family: int, num: int) -> None:
    """Each fragment crosses by itself, and waits for buffers there: a ring of 16 gets 45, too."""
    guest, host, client, wire = talk(
        make, family, 1500, pair=1, pairs=2, workers=2, num=num
    )  # fmt: skip
    assert [(flow["home"], flow["tx_queue"]) for flow in guest.drv.flows()] == [(0, 1)]
    guest.drv.keep_home()
    for size in (1400, 1473, 4000, 65507, 1, 65507):
        before = guest.drv.counter("handoff_frames")
        give(guest, host, client, [size])
        crossed = guest.drv.counter("handoff_frames") - before
        assert crossed == pieces(size, 1500, family), f"{size} bytes"
    give(guest, host, client, [100, 4000, 65507, 2])
    assert not wire.open


@families
def test_a_crowd_to_another_workers_ring(make: Make, family: int) -> None:
    """When the hand-off ring has room for what the last one has in bytes, but not for it in
    fragments, it waits in its socket."""
    guest, host, client, wire = talk(make, family, 1500, pair=1, pairs=2, workers=2)
    each, size = (1480, 44) if family == 4 else (1448, 45)  # fragments of 1536 bytes in the ring
    sizes = [size * each - 8] * 14 + [(638 - 14 * size) * each - 8, 65507]
    guest.udp.clear()
    guest.drv.keep_home()
    for number, size in enumerate(sizes):
        host.send(random_bytes(size, number), client)
        guest.drv.breathe(0)  # worker 1 takes nothing meanwhile
    guest.pump(holds(guest.udp, len(sizes)), 5, "all of them")
    for number, size in enumerate(sizes):
        assert guest.udp[number][1].payload == random_bytes(size, number)
    assert guest.drv.drops("rx_full", 0) == guest.drv.drops("rx_full", 2) == 0 and not wire.open


@families
@pytest.mark.parametrize("features", [BASIC, BASIC | GUEST_CSUM], ids=["plain", "csum"])
def test_echo_replies(make: Make, family: int, features: int) -> None:
    """A guest that sends a large request in one frame gets the reply in fragments."""
    guest, _, _, wire = talk(make, family, 1500, features=features)
    reply = {4: 0, 6: 129}[family]
    edge = most(1500, family)
    for number, size in enumerate((56, edge, edge + 1, 4000, 60_000, 1)):
        before, payload = wire.frames, random_bytes(size, number)
        guest.ping(guest.addresses(family)[1], 9, number, payload)
        _, packet = guest.next_icmp({reply})
        assert packet.body == struct.pack(">HH", 9, number) + payload
        assert wire.frames - before == pieces(size, 1500, family)


@families
def test_no_room_in_the_hand_off_ring(make: Make, family: int) -> None:
    """Replies wait in their socket until there is."""
    guest, _, _, wire = talk(make, family, 1500, pairs=2, workers=2)
    gateway, payload = guest.addresses(family)[1], random_bytes(60_000)
    count = (1 << 20) // (pieces(60_000, 1500, family) * 1536) + 1
    for number in range(count):
        guest.ping(gateway, 9, number, payload)
        guest.drv.breathe(0)
        for index in guest.drv.flow_indexes():
            guest.drv.flow(index)["tx_queue"] = 1  # worker 1's, which takes nothing meanwhile
        guest.drv.keep_home()
        for _ in range(2):
            guest.drv.breathe(0)
    assert FIRST_WORKER + 1 in [flow["line"] for flow in guest.drv.flows()]
    guest.pump(holds(guest.icmp, count), 5, "all of them")
    assert [packet.body[4:] for _, packet in guest.icmp] == [payload] * count and not wire.open


def send_train(host: Datagrams, client: tuple, payload: bytes, segment: int) -> None:
    control = [(SOL_UDP, UDP_SEGMENT, struct.pack("H", segment))]
    host.socket.sendmsg([payload], control, 0, client)


@families
@pytest.mark.parametrize("rx", [(1526,), (65562,)], ids=str)
@pytest.mark.parametrize("across", [0, 1], ids=["own", "across"])
def test_trains(make: Make, family: int, rx: tuple[int, ...], across: int) -> None:
    """One whose datagrams fit the MTU comes as it is; one of larger ones is taken apart, and the
    shorter one at its end may be a packet of its own."""
    guest, host, client, wire = talk(
        make, family, 1500, features=BASIC | USO, rx=rx, pair=across, pairs=2, workers=2
    )
    edge = most(1500, family)
    for size, segment in ((60_000, edge), (60_000, 4000), (10_000, edge + 1), (8001, 4000), (9, 4)):
        payload, before = random_bytes(size, segment), wire.frames
        guest.udp.clear()
        send_train(host, client, payload, segment)
        guest.pump(lambda n=size: sum(len(p.payload) for _, p in guest.udp) >= n, 5, "the train")
        got = [packet.payload for _, packet in guest.udp]
        if segment <= edge:
            assert got == [payload] and guest.udp[0][1].header.gso_type == UDP_L4
        else:
            parts = [payload[at : at + segment] for at in range(0, size, segment)]
            assert got == parts
            wanted = sum(pieces(len(part), 1500, family) for part in parts)
            assert wire.frames - before == wanted
    assert not wire.open


@families
def test_identities(make: Make, family: int) -> None:
    """Never the same twice for one pair of hosts, whichever worker gives it, nor for another
    instance; and where they begin is not the same for two pairs of hosts."""
    starts = []
    for _ in range(3):
        guest, host, client, wire = talk(make, family, 1500, pairs=2, workers=2)
        guest.send_udp(guest.addresses(family)[1], 5001, host.port, b"?", pair=1)
        guest.pump(lambda host=host: host.inbox, what="a flow of the other worker")
        other = host.inbox.popleft()[1]
        assert sorted(flow["home"] for flow in guest.drv.flows()) == [0, 1]
        for _ in range(20):
            give(guest, host, client, [3000])
            give(guest, host, other, [3000])
        assert len(set(wire.identities)) == 40
        starts.append(min(wire.identities))
    assert len(set(starts)) == 3


@families
def test_identities_of_other_hosts(make: Make, family: int) -> None:
    """They tell nothing of those that another host's datagrams have."""
    far = {4: "192.0.2.7", 6: "2001:db8:7::7"}[family]
    if not make.world.isolated:
        pytest.skip("no namespace of our own to put a far host into")
    guest, host, client, wire = talk(make, family, 1500)
    distant = guest.with_host(make.world.udp(AF[family], far))
    guest.send_udp(pk.ip(far), 5000, distant.port, b"?")
    guest.pump(lambda: distant.inbox, what="the datagram at the far host")
    for _ in range(5):
        give(guest, host, client, [3000])
        give(guest, distant, distant.inbox[0][1], [3000])
    near, away = wire.identities[::2], wire.identities[1::2]
    steps = {(b - a) % (1 << 16) for a, b in zip(near, away, strict=True)}
    assert steps != {1}, "one sequence for all"
    assert min(abs(a - b) for a in near for b in away) > 10


@REAL
@families
@pytest.mark.parametrize("mtu", [1280, 1500, 65520])
def test_the_mtu_the_guest_is_told(
    make_backend: Callable[..., Backend],
    make_guest: Callable[..., Guest],
    world: World,
    family: int,
    mtu: int,
) -> None:
    """--mtu is what DHCP tells, and what is kept to; no feature has to be taken for that."""
    guest = make_guest(to=make_backend("--queues", "1", "--mtu", str(mtu)))
    assert lease(guest)[1][26] == struct.pack(">H", mtu)
    wire, host, port = Wire(guest, mtu), guest.with_host(world.udp(AF[family])), guest.port()
    guest.send_udp(guest.addresses(family)[1], port, host.port, b"?")
    guest.pump(lambda: host.inbox, 5, "the datagram at the host")
    client = host.inbox.popleft()[1]
    for size in (100, most(mtu, family) + 1, 4000, 65507, 1):
        before, size = wire.frames, min(size, 65507)
        give(guest, host, client, [size])
        assert wire.frames - before == pieces(size, mtu, family)
