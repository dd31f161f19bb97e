"""A flow follows the guest to the worker of the queue pair it sends on: nothing is lost, nothing
comes twice, and whatever is under way meanwhile arrives.

The workers live in the test's process (inprocess.py) and breathe when the test says so: pair p is
worker p's. What a flow needs to settle somewhere is time, so its moments are moved into the past.
"""

from __future__ import annotations

import gc
import os
import random
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from driver import BASIC, GUEST_CSUM, MQ
from guest import Guest, random_bytes
from inprocess import no_descriptors, spare_sockets
from minitcp import Tcp, established, exchange, listen
from packets import ACK, PSH
from world import World

from dataplane.context import BATCH_MAX
from dataplane.udp import BATCHES
from flows import steer
from shm.layout import View

Make = Callable[..., Guest]
HOME, OTHER = 0, 1
M32 = 0xFFFFFFFF
families = pytest.mark.parametrize("family", [4, 6])


@pytest.fixture
def make(make_local: Make) -> Make:
    """Guests with a queue pair for each of their workers, two unless told otherwise."""

    def made(workers: int = 2, **options: object) -> Guest:
        features = BASIC | GUEST_CSUM | MQ
        return make_local(workers=workers, pairs=workers, features=features, **options)

    return made


def now_ms() -> int:
    return time.monotonic_ns() // 1_000_000


def ago(wait_ms: int) -> int:
    """The moment so long ago, or a little longer, as an entry of the table keeps it."""
    return ((now_ms() - wait_ms - 1) | 1) & M32


def only_flow(guest: Guest) -> View:
    (flow,) = guest.drv.flows()
    return flow


def settled(guest: Guest) -> None:
    """The guest has been sending where it does now for as long as a flow needs to move."""
    for flow in guest.drv.flows():
        flow["away_ms"] = ago(steer.SETTLED_MS + 5)
        flow["moved_ms"] = 0


def elsewhere(guest: Guest, tcp: Tcp) -> None:
    """The guest has settled on the other pair; the flow goes with what comes next."""
    tcp.pair = OTHER
    tcp.send_ack()
    guest.drv.settle()
    settled(guest)


def fill_inbox(guest: Guest, worker: int) -> None:
    """With messages that mean nothing."""
    with pytest.raises(BlockingIOError):
        while True:
            guest.drv.inboxes[worker][0].send(struct.pack("<QQ", 5, 0xFFFF))


def moved(guest: Guest, name: str = "rehomed_flows") -> list[int]:
    return [guest.drv.counter(name, worker) for worker in range(len(guest.drv.workers))]


def descriptors(guest: Guest) -> int:
    """How many this process has, but for the workers' spare sockets."""
    gc.collect()  # what earlier tests forgot to close
    spares = sum(len(spare_sockets(worker)) for worker in guest.drv.workers)
    return len(os.listdir("/proc/self/fd")) - spares


def to_other(guest: Guest, tcp: Tcp, pair: int = OTHER) -> None:
    """The guest goes on on another pair, and the flow moves there."""
    tcp.pair = pair
    tcp.send_ack()
    guest.drv.settle()
    settled(guest)
    tcp.send_ack()
    guest.drv.settle()


# --- a move ---------------------------------------------------------------------------------------


@families
def test_a_connection_moves_and_goes_on(make: Make, world: World, family: int) -> None:
    guest = make()
    tcp, peer = established(guest, world, family)
    exchange(guest, tcp, peer, random_bytes(5000), random_bytes(7000, 2))
    guest.drv.settle()
    assert only_flow(guest)["home"] == HOME
    before, gauges = descriptors(guest), guest.drv.flow_count()
    to_other(guest, tcp)
    flow = only_flow(guest)
    assert (flow["home"], flow["heir"], flow["moves"]) == (OTHER, 0, 1)
    assert (moved(guest), descriptors(guest), guest.drv.flow_count()) == ([0, 1], before, gauges)
    crossed = moved(guest, "handoff_frames")
    exchange(guest, tcp, peer, random_bytes(300_000, 3), random_bytes(300_000, 4))
    assert moved(guest, "handoff_frames") == crossed, "all of it stays with one worker"
    assert set(tcp.pairs_seen[-50:]) == {OTHER}
    tcp.close()
    peer.shutdown()
    guest.pump(lambda: not list(guest.drv.flows()), what="the end of the flow")
    assert guest.drv.flow_count() == 0


def test_it_comes_back(make: Make, world: World) -> None:
    """Again and again, data both ways each time."""
    guest = make(workers=3)
    tcp, peer = established(guest, world, 4)
    before = descriptors(guest)
    for turn in range(12):
        pair = (turn + 1) % 3
        to_other(guest, tcp, pair)
        assert only_flow(guest)["home"] == pair
        exchange(guest, tcp, peer, random_bytes(3000, turn), random_bytes(90_000, turn))
    assert (sum(moved(guest)), only_flow(guest)["moves"]) == (12, 12)
    assert descriptors(guest) == before


def test_datagrams_and_pings_move(make: Make, world: World) -> None:
    guest = make()
    host = guest.with_host(world.udp(socket.AF_INET))
    for pair in (HOME, OTHER):
        for number in range(3):
            guest.send_udp(guest.gw4, 6000, host.port, b"%d %d" % (pair, number), pair=pair)
            guest.ping(guest.gw4, 7, number, b"there?", pair=pair)
            guest.drv.settle()
            if number == 0:
                settled(guest)
    guest.pump(lambda: len(host.inbox) == 6, what="the datagrams")
    assert [data for data, _ in host.inbox] == [b"%d %d" % (p, n) for p in (0, 1) for n in range(3)]
    assert {flow["home"] for flow in guest.drv.flows()} == {OTHER}
    assert moved(guest) == [0, 2]
    host.send(b"an answer", host.inbox[-1][1])
    pair, packet = guest.next_udp()
    assert (pair, packet.payload) == (OTHER, b"an answer")


def test_a_connection_from_the_host_moves_to_where_the_guest_answers(
    make: Make, world: World
) -> None:
    guest = make()
    listener = world.listen(socket.AF_INET)
    accepted = listen(guest, 8000)
    guest.drv.forward(listener.socket, 8000)
    client = guest.with_host(world.connect(socket.AF_INET, listener.port))
    guest.pump(lambda: accepted, what="the SYN")
    (tcp,) = accepted
    other = 1 - only_flow(guest)["home"]
    guest.pump(lambda: tcp.state == "established", what="the handshake")
    to_other(guest, tcp, other)
    assert only_flow(guest)["home"] == other
    exchange(guest, tcp, client, random_bytes(20_000), random_bytes(20_000, 2))


# --- when -----------------------------------------------------------------------------------------


def test_not_at_once(make: Make, world: World) -> None:
    """A frame or two elsewhere are no move: they cross."""
    guest = make()
    tcp, peer = established(guest, world, 4)
    guest.drv.settle()
    flow = only_flow(guest)
    tcp.pair = OTHER
    for payload in (b"one", b"two"):
        tcp.send(payload)
        for worker in (OTHER, OTHER, HOME, HOME):
            flow["away_ms"] = ago(0) if flow["away_ms"] else 0  # however slow this machine is
            guest.drv.breathe(worker)
        assert flow["away_ms"] != 0
    assert moved(guest, "handoff_frames")[OTHER] == 2
    tcp.pair = HOME
    guest.pump(lambda: bytes(peer.inbox) == b"onetwo", what="both")
    exchange(guest, tcp, peer, b"three", b"four")
    assert (flow["home"], flow["away_ms"], flow["moves"]) == (HOME, 0, 0)


def test_by_itself_after_a_while(make: Make, world: World) -> None:
    """No moments changed: what a guest would see."""
    guest = make()
    tcp, peer = established(guest, world, 4)
    tcp.pair = OTHER
    begin = now_ms()
    while only_flow(guest)["home"] == HOME:
        exchange(guest, tcp, peer, b"up", b"down")
        assert now_ms() - begin < 5000
    assert now_ms() - begin >= steer.SETTLED_MS


def test_not_to_a_pair_that_is_disabled(make: Make, world: World) -> None:
    guest = make()
    tcp, peer = established(guest, world, 4)
    guest.drv.enable_pairs([HOME])
    to_other(guest, tcp)
    assert only_flow(guest)["home"] == HOME
    exchange(guest, tcp, peer, random_bytes(5000), random_bytes(5000, 2))
    guest.drv.enable_pairs([HOME, OTHER])
    to_other(guest, tcp)
    assert only_flow(guest)["home"] == OTHER


def test_one_that_flaps_stays(make: Make, world: World) -> None:
    """It moves less and less; what it sends crosses, and the refusals are counted."""
    guest = make()
    tcp, peer = established(guest, world, 4)
    guest.drv.settle()
    flow, stays = only_flow(guest), []

    def speak() -> None:
        tcp.send_ack()
        guest.drv.settle()

    for turn in range(6):
        tcp.pair = 1 - flow["home"]
        stay_ms = flow["stay_ms"]
        if turn:
            flow["stay_ms"] = 0xFFFF  # however slow this machine is
        speak()
        flow["away_ms"] = ago(steer.SETTLED_MS + 5)
        if turn:
            for _ in range(2):
                speak()
            assert flow["moves"] == turn, "it has only just moved"
            assert sum(moved(guest, "moves_damped")) == turn, "counted once"
            flow["stay_ms"], flow["moved_ms"] = stay_ms, ago(stay_ms)
            flow["away_ms"] = ago(steer.SETTLED_MS + 5)
        speak()
        assert flow["moves"] == turn + 1
        stays.append(flow["stay_ms"])
        exchange(guest, tcp, peer, b"up", b"down")
        guest.drv.settle()
    assert stays == [steer.STAY_FIRST_MS * 2**turn for turn in range(6)]


def test_one_that_carries_much_moves_each_time(make: Make, world: World) -> None:
    """Crossing would cost more than the move; and the damping begins anew."""
    guest = make()
    tcp, peer = established(guest, world, 4)
    guest.drv.settle()
    flow = only_flow(guest)
    for turn in range(4):
        tcp.pair = 1 - flow["home"]
        if turn:
            flow["stay_ms"] = 0xFFFF  # however slow this machine is
        exchange(guest, tcp, peer, random_bytes(steer.PAID_BYTES // 2), b"")
        exchange(guest, tcp, peer, b"", random_bytes(steer.PAID_BYTES // 2))
        flow["away_ms"] = ago(steer.SETTLED_MS + 5) if flow["away_ms"] else 0
        tcp.send_ack()
        guest.drv.settle()
        assert flow["moves"] == turn + 1
        assert flow["home"] == tcp.pair
        assert flow["stay_ms"] == steer.STAY_FIRST_MS


def test_one_with_more_than_a_breath_takes(make: Make, world: World) -> None:
    """It moves all the same: the rest is the heir's. All arrives, in order."""
    guest = make(num=512)
    host = guest.with_host(world.udp(socket.AF_INET))
    guest.send_udp(guest.gw4, 6000, host.port, b"?")
    guest.pump(lambda: len(host.inbox) == 1, what="the datagram at the host")
    guest.send_udp(guest.gw4, 6000, host.port, b"?", pair=OTHER)
    guest.pump(lambda: len(host.inbox) == 2, what="the other one")
    settled(guest)
    count = 2 * BATCHES * BATCH_MAX
    for number in range(count):
        host.send(b"%d" % number, host.inbox[0][1])
    guest.drv.breathe(HOME)
    flow = only_flow(guest)
    assert flow["rx_bytes"] < len(b"".join(b"%d" % number for number in range(count)))
    assert flow["heir"] == OTHER + 1
    guest.pump(lambda: len(guest.udp) == count, what="all of them")
    assert [int(packet.payload) for _, packet in guest.udp] == list(range(count))


def test_not_while_payload_is_held(make: Make, world: World) -> None:
    """What came too soon is private to its home: the flow moves when it has gone."""
    guest = make()
    tcp, peer = established(guest, world, 4)
    tcp.pair = OTHER
    tcp.segment(tcp.nxt + 4, b"late", ACK | PSH)
    guest.drv.settle()
    settled(guest)
    tcp.send_ack()
    guest.drv.settle()
    assert (only_flow(guest)["home"], only_flow(guest)["held"]) == (HOME, 1)
    tcp.retransmit = False
    tcp.send(b"soon")
    tcp.nxt += 4
    guest.drv.settle()
    tcp.send_ack()
    guest.drv.settle()
    assert only_flow(guest)["home"] == OTHER
    guest.pump(lambda: bytes(peer.inbox) == b"soonlate", what="both")


# --- under way ------------------------------------------------------------------------------------


@contextmanager
def given(guest: Guest, tcp: Tcp) -> Iterator[View]:
    """The home has given the flow; the heir has not breathed since."""
    elsewhere(guest, tcp)
    tcp.send_ack()
    guest.drv.breathe(OTHER)
    guest.drv.breathe(HOME)
    flow = only_flow(guest)
    assert (flow["home"], flow["heir"]) == (HOME, OTHER + 1)
    yield flow
    guest.drv.settle()
    assert (flow["home"], flow["heir"]) == (OTHER, 0)


def test_a_frame_that_is_here_before_the_socket(make: Make, world: World) -> None:
    """In the very breath in which the flow arrives: the inbox is looked at first."""
    guest = make()
    tcp, peer = established(guest, world, 4)
    with given(guest, tcp):
        crossed = moved(guest, "handoff_frames")
        tcp.send(b"on its heels")
        guest.drv.breathe(OTHER)
        assert moved(guest, "handoff_frames") == crossed
    guest.pump(lambda: bytes(peer.inbox) == b"on its heels", what="it")


def test_a_frame_that_crosses_while_the_flow_moves(make: Make, world: World) -> None:
    """It finds the flow gone, and follows it."""
    guest = make(workers=3)
    tcp, peer = established(guest, world, 4)
    with given(guest, tcp):
        tcp.pair = 2
        tcp.send(b"by a third one")
        guest.drv.breathe(2)
        tcp.pair = OTHER
        tcp.send(b", and on")
        guest.drv.breathe(HOME)
    guest.pump(lambda: bytes(peer.inbox) == b"by a third one, and on", what="both")
    assert sum(moved(guest)) == 1
    assert guest.drv.drops("handoff_full", 1) == 0


def test_frames_already_in_the_ring_to_the_home(make: Make, world: World) -> None:
    """The home serves them before it gives the flow."""
    guest = make()
    tcp, peer = established(guest, world, 4)
    elsewhere(guest, tcp)
    tcp.send(b"before")
    guest.drv.breathe(OTHER)
    peer.send(b"an event for the home")
    guest.drv.breathe(HOME)
    guest.drv.settle()
    assert only_flow(guest)["home"] == OTHER
    guest.pump(lambda: bytes(peer.inbox) == b"before", what="it")
    exchange(guest, tcp, peer, b"", b"")
    guest.pump(lambda: bytes(tcp.received) == b"an event for the home", what="it")


def test_what_the_home_has_sent_comes_first(make: Make, world: World) -> None:
    """Frames of the former home wait in its ring for receive buffers; the heir waits for them."""
    guest = make()
    tcp, peer = established(guest, world, 4)
    host = guest.with_host(world.udp(socket.AF_INET))
    guest.send_udp(guest.gw4, 6000, host.port, b"begin", pair=HOME)
    guest.pump(lambda: host.inbox, what="a datagram")
    guest.send_udp(guest.gw4, 6000, host.port, b"elsewhere", pair=OTHER)
    guest.drv.settle()
    flow = next(one for one in guest.drv.flows() if one["protocol"] == 1)
    sent = [b"%03d" % number * 100 for number in range(40)]
    for data in sent[:20]:
        host.send(data, host.inbox[0][1])
    guest.drv.breathe(HOME)  # they cross; worker 1 does not take them yet
    flow["away_ms"] = ago(steer.CALM_MS)
    guest.send_udp(guest.gw4, 6000, host.port, b"again", pair=OTHER)
    guest.drv.breathe(HOME)
    for data in sent[20:]:
        host.send(data, host.inbox[0][1])
    guest.pump(lambda: len(guest.udp) == 40, what="the datagrams")
    assert [packet.payload for _, packet in guest.udp] == sent
    assert flow["home"] == OTHER
    exchange(guest, tcp, peer, b"up", b"down")


def test_it_stays_until_what_came_first_has_gone(make: Make, world: World) -> None:
    """More frames of the former home are before it than a breath takes, and the guest has settled
    elsewhere again: the next home would know nothing of them."""
    guest = make(workers=3, num=512)
    host = guest.with_host(world.udp(socket.AF_INET))
    guest.send_udp(guest.gw4, 6000, host.port, b"begin", pair=HOME)
    guest.pump(lambda: host.inbox, what="a datagram")
    guest.send_udp(guest.gw4, 6000, host.port, b"elsewhere", pair=OTHER)
    guest.drv.settle()
    flow, count = only_flow(guest), 200
    for number in range(count):
        host.send(b"%d" % number, host.inbox[0][1])
    for _ in range(3):
        flow["away_ms"] = ago(0)
        guest.drv.breathe(HOME)
    settled(guest)
    guest.drv.breathe(HOME)
    assert flow["heir"] == OTHER + 1
    guest.send_udp(guest.gw4, 6000, host.port, b"and on", pair=2)
    guest.drv.breathe(2)
    for _ in range(2):
        guest.drv.breathe(OTHER)
        settled(guest)
    assert (flow["home"], flow["heir"]) == (OTHER, 0)
    guest.pump(lambda: len(guest.udp) == count, what="the datagrams")
    assert [int(packet.payload) for _, packet in guest.udp] == list(range(count))
    assert flow["home"] == 2


# --- what can go wrong ----------------------------------------------------------------------------


def test_an_inbox_without_room(make: Make, world: World) -> None:
    """The flow stays, works, and moves when there is room."""
    guest = make()
    tcp, peer = established(guest, world, 4)
    guest.drv.settle()
    before, gauges = descriptors(guest), guest.drv.flow_count()
    elsewhere(guest, tcp)
    fill_inbox(guest, OTHER)
    peer.send(b"x")
    guest.drv.breathe(HOME)
    flow = only_flow(guest)
    assert (flow["home"], flow["heir"], flow["former"]) == (HOME, 0, 0)
    assert (descriptors(guest), guest.drv.flow_count()) == (before, gauges)
    guest.pump(lambda: tcp.received, what="what was sent meanwhile")
    exchange(guest, tcp, peer, random_bytes(9000), random_bytes(9000, 2))
    to_other(guest, tcp)
    assert only_flow(guest)["home"] == OTHER
    exchange(guest, tcp, peer, random_bytes(9000), random_bytes(9000, 2))


def test_an_inbox_without_room_for_long(make: Make, world: World) -> None:
    """Its worker does not go on: the flow does not keep its home busy with trying."""
    guest = make()
    tcp, peer = established(guest, world, 4)
    elsewhere(guest, tcp)
    fill_inbox(guest, OTHER)
    peer.send(b"x")
    assert guest.drv.breaths_in(1.0, HOME) < 50


def test_messages_that_mean_nothing(make: Make, world: World) -> None:
    """Of flows that have ended: their descriptors are closed."""
    guest = make()
    tcp, peer = established(guest, world, 4)
    before = descriptors(guest)
    index = guest.drv.flow_indexes()[0]
    generation = only_flow(guest)["generation"]
    for message in (bytes(16), struct.pack("<QQ", index, generation + 1)):
        socket.send_fds(guest.drv.inboxes[OTHER][0], [message], [0])
    socket.send_fds(guest.drv.inboxes[HOME][0], [struct.pack("<QQ", index, generation)], [0])
    guest.drv.settle()
    assert descriptors(guest) == before
    assert only_flow(guest)["home"] == HOME
    exchange(guest, tcp, peer, b"up", b"down")


def test_a_heir_without_a_descriptor_to_spare(make: Make, world: World) -> None:
    """The connection ends, and both ends are told."""
    guest = make()
    tcp, peer = established(guest, world, 4)
    before = descriptors(guest)
    with given(guest, tcp) as flow, no_descriptors(world):
        guest.drv.breathe(OTHER)
        guest.drv.breathe(OTHER)
        assert flow["state"] == 0
        flow["home"], flow["heir"] = OTHER, 0  # what given() looks for; the entry is free
    guest.pump(lambda: tcp.state == "reset" and (peer.error or peer.eof), what="both ends")
    assert guest.drv.flow_count() == 0 and descriptors(guest) < before


# --- anything at any time -------------------------------------------------------------------------


ROUNDS = 20


@pytest.mark.parametrize("seed", range(12))
def test_streams_of_a_guest_that_hops(make: Make, world: World, seed: int) -> None:
    """Connections whose guest hops between three pairs while three workers breathe in any order;
    every byte arrives once, in order."""
    chosen = random.Random(seed)
    guest = make(workers=3)
    streams = [established(guest, world, chosen.choice((4, 6)), window=1 << 14) for _ in range(4)]
    wanted = [(bytearray(), bytearray()) for _ in streams]

    def hop() -> bool:
        for tcp, _ in streams:
            if chosen.random() < 0.3:
                tcp.pair = chosen.randrange(3)
        for flow in guest.drv.flows():
            if chosen.random() < 0.7 and flow["away_ms"]:
                flow["away_ms"] = ago(chosen.choice((15, 200)))
                flow["moved_ms"] = 0
        for _ in range(chosen.randrange(6)):
            guest.drv.breathe(chosen.randrange(3))
        return all(
            len(peer.inbox) >= len(up) and len(tcp.received) >= len(down)
            for (tcp, peer), (up, down) in zip(streams, wanted, strict=True)
        )

    for turn in range(ROUNDS):
        for (tcp, peer), (up, down) in zip(streams, wanted, strict=True):
            parts = [random_bytes(chosen.randrange(20_000), seed * ROUNDS + turn) for _ in "ud"]
            up += parts[0]
            down += parts[1]
            tcp.sizes = iter(lambda: chosen.randrange(1, 1461), 0)
            tcp.send(parts[0])
            peer.send(parts[1])
        guest.pump(hop, 60, "all streams")
    for (tcp, peer), (up, down) in zip(streams, wanted, strict=True):
        assert (bytes(peer.inbox), bytes(tcp.received)) == (up, down)
        tcp.check()
    assert sum(moved(guest)) >= ROUNDS // 2, "they did move"
    guest.drv.settle()
    for flow in guest.drv.flows():
        assert flow["fd"] >= 0 and not flow["heir"]
