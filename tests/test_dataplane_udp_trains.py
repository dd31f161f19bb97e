"""Datagrams in numbers: bursts of one flow both ways, and large ones that either side leaves to the
other to cut (USO). However they travel, each arrives once, whole, in order, and alone.
"""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import packets as pk
import pytest
from backend import Backend
from driver import BASIC, CSUM, GUEST_CSUM, GUEST_USO4, GUEST_USO6, HOST_USO, INDIRECT_DESC
from guest import Guest, holds, random_bytes
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from packets import VnetHeader
from world import Datagrams, World

AF = {4: socket.AF_INET, 6: socket.AF_INET6}
USO = CSUM | GUEST_CSUM | HOST_USO | GUEST_USO4 | GUEST_USO6
UDP_L4, NEEDS_CSUM, SOL_UDP, UDP_SEGMENT = 5, 1, 17, 103
families = pytest.mark.parametrize("family", [4, 6])
BURST = settings(
    max_examples=40,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


class Conversation:
    """A guest and a UDP socket of the host that have already spoken."""

    def __init__(self, guest: Guest, world: World, family: int) -> None:
        self.guest, self.family = guest, family
        self.gateway = guest.addresses(family)[1]
        self.host: Datagrams = guest.with_host(world.udp(AF[family]))
        self.port = guest.port()
        self.up([b"hello"])
        self.client = self.sender

    def put(self, payload: bytes) -> None:
        """One more datagram into the transmit ring, unseen by the device yet."""
        self.guest.send_udp(self.gateway, self.port, self.host.port, payload, publish=False)

    def up(self, payloads: list[bytes]) -> None:
        """A burst from the guest, all of it there when the device looks; as it arrives."""
        self.host.inbox.clear()
        for payload in payloads:
            self.put(payload)
        self.guest.drv.publish(self.guest.drv.tx(0))
        self.guest.pump(holds(self.host.inbox, len(payloads)), 5, "all datagrams at the host")
        assert [data for data, _ in self.host.inbox] == payloads
        self.sender = self.host.inbox[-1][1]

    def down(self, payloads: list[bytes]) -> None:
        """A burst from the host; as it arrives at the guest."""
        self.guest.udp.clear()
        for payload in payloads:
            self.host.send(payload, self.client)
        self.guest.pump(holds(self.guest.udp, len(payloads)), 5, "all datagrams at the guest")
        assert [packet.payload for _, packet in self.guest.udp] == payloads


def contents(sizes: list[int]) -> list[bytes]:
    """Datagrams of these sizes that can be told apart."""
    return [struct.pack(">I", number)[:size] + random_bytes(max(size - 4, 0), number)
            for number, size in enumerate(sizes)]  # fmt: skip


SIZES = st.one_of(
    st.tuples(st.integers(0, 1400), st.integers(1, 150)).map(lambda pair: [pair[0]] * pair[1]),
    st.lists(st.integers(0, 3000), min_size=1, max_size=40),
    st.lists(st.sampled_from([0, 1, 100, 100, 100, 1400]), min_size=1, max_size=80),
)

_kept: dict[Callable[..., Guest], dict[int, Conversation]] = {}


@BURST
@given(SIZES, st.sampled_from([4, 6]))
def test_bursts_from_the_guest(
    make_guest: Callable[..., Guest], world: World, sizes: list[int], family: int
) -> None:
    """Whatever the sizes: trains form and end where they must."""
    if make_guest not in _kept:
        guest = make_guest(features=BASIC | GUEST_CSUM | INDIRECT_DESC, num=256)
        _kept[make_guest] = {number: Conversation(guest, world, number) for number in AF}
    _kept[make_guest][family].up(contents(sizes))


@pytest.mark.parametrize("rx", [(1526,), (4096,), (300,), (100, 60)], ids=str)
@families
def test_bursts_to_the_guest(
    make_guest: Callable[..., Guest], world: World, family: int, rx: tuple[int, ...]
) -> None:
    """Small ones, a buffer each; larger ones among them; into buffers of any shape."""
    guest = make_guest(features=BASIC | GUEST_CSUM, rx=rx, num=1024)
    talk, rng = Conversation(guest, world, family), random.Random(family)
    talk.down(contents([64] * 100))
    for _ in range(10):
        talk.down(contents([rng.choice([0, 1, 64, 200, 1400, 4000]) for _ in range(16)]))
    talk.down(contents([64] * 60 + [9000] + [64] * 20))


@families
def test_two_flows_in_turn(make_guest: Callable[..., Guest], world: World, family: int) -> None:
    """Datagrams of two flows, one after another: none goes to the other's host."""
    guest = make_guest()
    talks = [Conversation(guest, world, family) for _ in range(2)]
    for talk in talks:
        talk.host.inbox.clear()
    for number in range(100):
        talks[number // 3 % 2].put(b"%d %d" % (number // 3 % 2, number))
    guest.drv.publish(guest.drv.tx(0))
    guest.pump(lambda: sum(len(talk.host.inbox) for talk in talks) == 100, 5, "all datagrams")
    for which, talk in enumerate(talks):
        numbers = [data.split() for data, _ in talk.host.inbox]
        assert all(int(first) == which for first, _ in numbers)
        assert [int(n) for _, n in numbers] == sorted(int(n) for _, n in numbers)


@families
def test_hop_limits_within_a_burst(
    make_guest: Callable[..., Guest], world: World, family: int
) -> None:
    """Each datagram has the TTL it was sent with, as traceroute needs it."""
    guest = make_guest()
    talk = Conversation(guest, world, family)
    talk.host.record_hops()
    talk.host.inbox.clear()
    wanted = [64, 64, 1, 2, 2, 2, 64, 255, 255]
    for ttl in wanted:
        guest.send_udp(
            talk.gateway, talk.port, talk.host.port, b"same", ttl=ttl, publish=False
        )  # fmt: skip
    guest.drv.publish(guest.drv.tx(0))
    guest.pump(holds(talk.host.inbox, len(wanted)), 5, "all datagrams")
    assert talk.host.hops[-len(wanted) :] == wanted


@pytest.fixture
def narrow() -> Iterator[World]:
    """A network whose loopback has an MTU of 1500."""
    world = World()
    if not world.isolated:
        pytest.skip("no namespace of our own whose MTU could be changed")
    world.run(Path("/sys/class/net/lo/mtu").write_text, "1500")
    yield world
    world.close()


@families
def test_trains_the_kernel_cannot_cut(
    make_backend: Callable[..., Backend],
    make_guest: Callable[..., Guest],
    narrow: World,
    family: int,
) -> None:
    """Datagrams above the MTU of the path go one by one, as fragments, and so do later ones."""
    there = make_backend("--queues", "1", within=narrow)
    talk = Conversation(make_guest(to=there), narrow, family)
    for size in (100, 3000, 1400, 8000):
        talk.up(contents([size] * 50))


# --- segmentation offload -------------------------------------------------------------------------


def train(talk: Conversation, payload: bytes, segment: int) -> None:
    """One large datagram from the guest, to be cut by the device."""
    guest, start = talk.guest, 14 + (20 if talk.family == 4 else 40)
    src = guest.source_for(talk.gateway)
    body = pk.udp(src, talk.gateway, talk.port, talk.host.port, payload, csum="partial")
    header = VnetHeader(NEEDS_CSUM, UDP_L4, start + 8, segment, start, 6)
    guest.send_ip(pk.ip_packet(src, talk.gateway, pk.UDP, body), header=header)


@families
def test_from_the_guest(make_guest: Callable[..., Guest], world: World, family: int) -> None:
    """HOST_USO: a large datagram arrives as the many it stands for."""
    guest = make_guest(features=BASIC | USO)
    assert not guest.drv.wanted & USO & ~guest.drv.offered, "USO is not offered"
    talk = Conversation(guest, world, family)
    kinds = ((5000, 1400), (1400, 1400), (60_000, 1200), (128, 1), (60_000, 500), (0, 9))
    for size, segment in kinds:
        payload = random_bytes(size, segment)
        talk.host.inbox.clear()
        train(talk, payload, segment)
        pieces = [payload[at : at + segment] for at in range(0, size, segment)] or [b""]
        guest.pump(holds(talk.host.inbox, len(pieces)), 3, "the datagrams at the host")
        assert [data for data, _ in talk.host.inbox] == pieces


@pytest.mark.parametrize(("features", "segment"), [(USO, 0), (USO, 9), (USO & ~HOST_USO, 500)])
def test_bad_trains(
    backend: Backend, make_guest: Callable[..., Guest], world: World, features: int, segment: int
) -> None:
    """No size, too many pieces, not negotiated: dropped and counted."""
    guest = make_guest(features=BASIC | features)
    talk = Conversation(guest, world, 4)
    before = refused(backend)
    train(talk, bytes(5000), segment)
    talk.up([b"and all is well"])
    assert refused(backend) == before + 1


def refused(backend: Backend) -> float:
    """How many frames were dropped for their offload so far."""
    return backend.total("vhostmq_drops_total", reason="bad_offload")


@families
@pytest.mark.parametrize("rx", [(1526,), (65562,), (200,)], ids=str)
def test_to_the_guest(
    make_guest: Callable[..., Guest], world: World, family: int, rx: tuple[int, ...]
) -> None:
    """GUEST_USO: what the host's kernel holds as one large datagram comes as one."""
    guest = make_guest(features=BASIC | USO, rx=rx, num=512)
    talk = Conversation(guest, world, family)
    for size, segment in ((3000, 1400), (60_000, 1200), (640, 64), (1000, 999), (30_000, 1000)):
        payload = random_bytes(size, size)
        guest.udp.clear()
        send_train(talk, payload, segment)
        guest.pump(lambda: guest.udp, 3, "the train at the guest")
        got = [packet for _, packet in guest.udp]
        assert [packet.payload for packet in got] == [payload]
        assert (got[0].header.gso_type, got[0].header.gso_size) == (UDP_L4, segment)
        talk.down(contents([100] * 20))
    talk.up([b"?"])


@families
@pytest.mark.parametrize("features", [BASIC | GUEST_CSUM, BASIC], ids=["csum", "nothing"])
def test_to_a_guest_without(
    make_guest: Callable[..., Guest], world: World, family: int, features: int
) -> None:
    """Without GUEST_USO the datagrams of a train come one by one."""
    guest = make_guest(features=features)
    talk = Conversation(guest, world, family)
    payload = random_bytes(50_000)
    guest.udp.clear()
    send_train(talk, payload, 1000)
    guest.pump(holds(guest.udp, 50), 3, "the datagrams at the guest")
    assert b"".join(packet.payload for _, packet in guest.udp) == payload
    assert {packet.header.gso_type for _, packet in guest.udp} == {0}


def send_train(talk: Conversation, payload: bytes, segment: int) -> None:
    """One large datagram of the host, cut by the kernel where somebody needs it."""
    control = [(SOL_UDP, UDP_SEGMENT, struct.pack("H", segment))]
    talk.host.socket.sendmsg([payload], control, 0, talk.client)
