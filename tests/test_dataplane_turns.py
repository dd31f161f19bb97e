"""Flows that need more receive buffers than the guest gives: they take turns.

One worker in the test's process, and a guest that gives buffers when the test says so, never enough
for all (dataplane/lifecycle.py, Lines).
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable

import pytest
from driver import BASIC, GUEST_CSUM, GUEST_TSO4, MQ
from guest import Guest, random_bytes
from minitcp import established, exchange
from world import Datagrams, World

from dataplane.breath import breathe
from dataplane.context import NOBODY
from dataplane.lifecycle import FIRST_RING, FIRST_WORKER
from dataplane.tcp_rx import BATCHES

Make = Callable[..., Guest]


@pytest.fixture
def guest(make_local: Make) -> Guest:
    """A ring of sixteen buffers: one stream alone takes more."""
    return make_local(num=16, features=BASIC | GUEST_CSUM)


def feed(guest: Guest, rounds: int) -> None:
    """So often the guest gives the ring all the buffers it has room for, and takes what comes."""
    for _ in range(rounds):
        guest.drv.refill = True
        guest.drv.fill(0)
        guest.drv.refill = False
        guest.drv.settle()
        guest.pump(timeout=0)


@pytest.mark.parametrize("trickle", [0, 8000], ids=["all-at-once", "one-now-and-then"])
def test_streams_in_need_of_buffers_take_turns(guest: Guest, world: World, trickle: int) -> None:
    """Nobody gets less than half its share, whether a stream has more than the ring takes, as most
    have, or is drained each time and has news again when buffers come, as the first may."""
    rounds = 4
    streams = [established(guest, world, 4, window=1 << 20) for _ in range(9)]
    guest.drv.refill = False
    for _, peer in streams[1 if trickle else 0 :]:
        peer.send(random_bytes(2_000_000))
    guest.drv.settle()
    for _ in range(rounds * len(streams)):
        streams[0][1].send(random_bytes(trickle))
        feed(guest, 1)
    got = [len(tcp.received) for tcp, _ in streams[1:]]
    assert min(got) >= sum(got) / len(got) / 2, got
    assert len(streams[0][0].received) >= min(sum(got) / len(got), rounds * trickle) / 2
    for tcp, _ in streams:
        tcp.check()


def test_who_finds_no_buffers_keeps_its_place(make_local: Make, world: World) -> None:
    """The ring takes just as much as a stream may send in a breath: it is dry before the stream is
    in line again, and the next one has had nothing yet."""
    guest = make_local(num=32, features=BASIC | GUEST_CSUM | GUEST_TSO4, rx=(65_562,))
    guest.drv.rx_limit[0] = BATCHES * 5
    streams = [established(guest, world, 4, window=1 << 22) for _ in range(5)]
    guest.drv.refill = False
    for _, peer in streams:
        peer.send(random_bytes(8_000_000))
    guest.drv.settle()
    had = [len(tcp.received) for tcp, _ in streams]
    feed(guest, 15)
    got = [len(tcp.received) - before for (tcp, _), before in zip(streams, had, strict=True)]
    assert min(got) >= sum(got) / len(got) / 2, got


def test_datagrams_in_need_of_buffers_take_turns(guest: Guest, world: World) -> None:
    """Of each socket some arrive before all of another's have, and in the end all have."""
    flows, each = 9, 40
    host = guest.with_host(world.udp(socket.AF_INET))
    for port in range(6000, 6000 + flows):
        guest.send_udp(guest.gw4, port, host.port, b"?")
    guest.pump(lambda: len(host.inbox) == flows, what="the datagrams at the host")
    guest.drv.refill = False
    for _, client in host.inbox:
        for number in range(each):
            host.send(b"%d" % number, client)
    guest.drv.settle()
    feed(guest, 2 * flows)
    ports = [packet.dport for _, packet in guest.udp]
    assert {ports.count(port) > 0 for port in range(6000, 6000 + flows)} == {True}, ports
    assert max(ports.count(port) for port in ports) < 2.5 * len(ports) / flows
    feed(guest, 2 * flows * each // 16)
    numbers = [[int(p.payload) for _, p in guest.udp if p.dport == port] for port in set(ports)]
    assert numbers == [list(range(each))] * flows


# --- who leaves the line --------------------------------------------------------------------------


def runs_dry(guest: Guest) -> None:
    """The ring has no buffers left, and gets none."""
    guest.drv.refill = False
    guest.pump(lambda: not guest.drv.rx(0).ring.chains, what="the ring to run dry")
    guest.drv.settle()


def goes_away(guest: Guest, send: Callable[[], object]) -> None:
    """The guest has settled on the other worker's queue, and something of it crosses when buffers
    come: the flow is in line and touched when it is given away."""
    for settled in (False, True):
        send()
        guest.drv.breathe(1)
        if not settled:
            guest.drv.breathe(0)
            time.sleep(0.015)
    guest.drv.fill(0)
    guest.drv.breathe(0)
    (flow,) = guest.drv.flows()
    assert flow["heir"] or flow["home"] == 1, "it was not given away"
    guest.drv.refill = True
    for pair in range(2):
        guest.drv.fill(pair)


def test_a_stream_in_line_follows_the_guest(make_local: Make, world: World) -> None:
    """To another queue of the same worker, which has buffers, while the first gets none."""
    guest = make_local(pairs=2, num=16, features=BASIC | GUEST_CSUM | MQ)
    tcp, peer = established(guest, world, 4)
    stream = random_bytes(60_000)
    peer.send(stream)
    runs_dry(guest)
    had = len(tcp.received)
    assert had < len(stream) - 5000
    assert in_line(guest) == 1
    tcp.pair = 1
    tcp.send_ack()
    guest.pump(lambda: not guest.drv.rx(1).ring.chains, 2, "the other queue's buffers")
    assert in_line(guest) == 0
    assert len(tcp.received) > had + 15_000
    for pair in (1, 0):
        guest.drv.refill = True
        guest.drv.fill(pair)
    guest.pump(lambda: len(tcp.received) >= len(stream), 4, "the rest")
    exchange(guest, tcp, peer, b"still", b"there")
    assert bytes(tcp.received) == stream + b"there"


def test_datagrams_in_line_follow_the_guest(make_local: Make, world: World) -> None:
    """The same for a socket of datagrams."""
    guest = make_local(pairs=2, num=16, features=BASIC | GUEST_CSUM | MQ)
    host = guest.with_host(world.udp(socket.AF_INET))
    guest.send_udp(guest.gw4, 6000, host.port, b"?")
    guest.pump(lambda: len(host.inbox) == 1, what="the datagram at the host")
    client = host.inbox[0][1]
    for number in range(40):
        host.send(b"%d" % number, client)
    runs_dry(guest)
    had = len(guest.udp)
    assert in_line(guest) == 1
    guest.send_udp(guest.gw4, 6000, host.port, b"here", pair=1)
    guest.pump(lambda: not guest.drv.rx(1).ring.chains, 2, "the other queue's buffers")
    assert len(guest.udp) == had + 16
    assert in_line(guest, 1) == 1
    guest.drv.refill = True
    guest.drv.fill(1)
    guest.pump(lambda: len(guest.udp) == 40, 2, "the rest")
    assert [int(packet.payload) for _, packet in guest.udp] == list(range(40))


def test_a_stream_in_line_is_given_away(make_local: Make, world: World) -> None:
    """Once, and all of it arrives."""
    guest = make_local(workers=2, pairs=2, num=16, features=BASIC | GUEST_CSUM | MQ)
    tcp, peer = established(guest, world, 4)
    stream = random_bytes(26_000)
    peer.send(stream)
    runs_dry(guest)
    tcp.pair = 1
    goes_away(guest, tcp.send_ack)
    guest.pump(lambda: len(tcp.received) >= len(stream), 4, "the rest")
    exchange(guest, tcp, peer, b"still", b"there")
    assert bytes(tcp.received) == stream + b"there"


def test_datagrams_in_line_are_given_away(make_local: Make, world: World) -> None:
    """The conversation stays the same."""
    guest = make_local(workers=2, pairs=2, num=16, features=BASIC | GUEST_CSUM | MQ)
    host = guest.with_host(world.udp(socket.AF_INET))
    guest.send_udp(guest.gw4, 6000, host.port, b"?")
    client = guest.pump(lambda: host.inbox, what="the datagram at the host")[0][1]
    for number in range(18):
        host.send(b"%d" % number, client)
    runs_dry(guest)
    goes_away(guest, lambda: guest.send_udp(guest.gw4, 6000, host.port, b"away", pair=1))
    guest.pump(lambda: len(guest.udp) == 18, 4, "the rest")
    guest.send_udp(guest.gw4, 6000, host.port, b"!", pair=1)
    guest.pump(lambda: len(host.inbox) == 4, what="all datagrams at the host")
    assert {one for _, one in host.inbox} == {client}


def test_a_flow_ends_before_its_ring_is_there_again(make_local: Make, world: World) -> None:
    """A successor has no rings yet, is woken, and one of its flows is reset: it leaves its line."""
    guest = make_local(num=16, features=BASIC | GUEST_CSUM)
    streams = [established(guest, world, 4) for _ in range(3)]
    for _, peer in streams:
        peer.send(random_bytes(100_000))
    runs_dry(guest)

    def ends() -> None:
        streams[1][1].reset()
        breathe(guest.drv.workers[0].context.address, 0, 1)
        assert len(guest.drv.flow_indexes()) == 2
        assert in_line(guest) == 2, "one that ended stands there"

    succeeded(guest, ends)
    guest.drv.fill(0)
    left = [streams[0][0], streams[2][0]]
    guest.pump(lambda: all(len(tcp.received) == 100_000 for tcp in left), 3, "the two others")


def test_a_pair_is_disabled_before_its_ring_is_there_again(make_local: Make, world: World) -> None:
    """A successor has no rings yet and one of its flows stands in line for one, when the guest
    disables that."""
    guest = make_local(pairs=2, num=16, features=BASIC | GUEST_CSUM | MQ)
    tcp, peer = established(guest, world, 4)
    peer.send(random_bytes(100_000))
    runs_dry(guest)

    def is_disabled() -> None:
        breathe(guest.drv.workers[0].context.address, 0, 1)
        assert in_line(guest) == 1
        guest.drv.enable_pairs([1])
        assert in_line(guest) == 0, "it stays there"

    succeeded(guest, is_disabled)
    guest.drv.fill(1)
    guest.pump(lambda: len(tcp.received) == 100_000, 3, "the rest on the other pair")


def succeeded(guest: Guest, before: Callable[[], object]) -> None:
    """Another takes the worker's place; `before` it has rings it is woken, and this happens."""
    drv, bring_up = guest.drv, guest.drv._bring_up

    def late(worker: int) -> None:
        before()
        bring_up(worker)

    drv._bring_up = late  # type: ignore[method-assign]
    os.eventfd_write(drv.wakes[0], 1)
    drv.world.run(drv.succeed, 0)
    drv.refill = True


def in_line(guest: Guest, pair: int = 0) -> int:
    """How many flows wait for the pair's buffers."""
    lines = memoryview(guest.drv.workers[0].context.scratch("lines")).cast("I")
    index, count = lines[2 * (FIRST_RING + pair)], 0
    while index != NOBODY:
        index, count = guest.drv.flow(index)["line_next"], count + 1
    return count


# --- and frames of another worker -----------------------------------------------------------------


def test_the_line_goes_on_when_a_frame_gives_up(make_local: Make, world: World) -> None:
    """A frame of another worker needs more buffers than the guest gives, and is dropped after a
    while: those that are there are for the line."""
    guest = make_local(workers=2, pairs=2, num=16, features=BASIC | GUEST_CSUM | MQ)
    drv = guest.drv
    drv.net["mtu"] = 65520
    host = guest.with_host(world.udp(socket.AF_INET))
    guest.send_udp(guest.gw4, 6000, host.port, b"?", pair=1)
    guest.pump(lambda: host.inbox, what="the datagram at the host")
    tcp, peer = established(guest, world, 4)
    drv.settle()
    drv.keep_home()
    guest.send_udp(guest.gw4, 6000, host.port, b"here now", pair=0)
    drv.settle()
    peer.send(random_bytes(200_000))
    runs_dry(guest)
    had = len(tcp.received)
    host.send(bytes(15_000), host.inbox[0][1])  # ten buffers
    drv.settle()
    drv.fill(0, limit=6)
    deadline = time.monotonic() + 2
    while len(tcp.received) == had:
        assert time.monotonic() < deadline, "the line does not move"
        drv.breathe(0, 50)
        drv.breathe(1)
        guest.pump(timeout=0)
    assert drv.drops("rx_full", 0) == 1


def crossing(guest: Guest, world: World, home: int, pair: int) -> Datagrams:
    """A conversation of worker `home`, which the guest goes on with on another one's pair."""
    host = guest.with_host(world.udp(socket.AF_INET))
    for number in (home, pair):
        guest.send_udp(guest.gw4, 6000, host.port, b"?", pair=number)
        guest.drv.settle()
        guest.drv.keep_home()
    guest.pump(lambda: len(host.inbox) == 2, what="the datagrams")
    return host


def test_a_worker_that_hangs_is_not_waited_for(make_local: Make, world: World) -> None:
    """The hand-off ring to it is full when the guest goes to the queue of a third one."""
    guest = make_local(workers=3, pairs=3, num=256, features=BASIC | GUEST_CSUM | MQ)
    host = crossing(guest, world, 0, 1)
    drv, sent = guest.drv, 0
    (flow,) = drv.flows()
    while flow["line"] == 0 and sent < 2000:  # from here on worker 1 does not breathe
        for _ in range(20):
            host.send(b"%d" % sent + bytes(1000), host.inbox[0][1])
            sent += 1
        drv.breathe(0)
    assert flow["line"] == FIRST_WORKER + 1, f"the ring took {sent} datagrams"
    guest.send_udp(guest.gw4, 6000, host.port, b"here now", pair=2)
    for worker in (2, 0, 2):
        drv.breathe(worker)
    guest._step()
    assert {pair for pair, _ in guest.udp} == {2}, "it waits for the one that hangs"
    guest.pump(lambda: len(guest.udp) == sent, what="all of them")
    assert {int(one.payload.rstrip(b"\0")) for _, one in guest.udp} == set(range(sent))


def test_frames_wait_for_the_ring_of_a_successor(make_local: Make, world: World) -> None:
    """A worker dies with frames of another one for the guest before it: the one in its place has
    no rings yet when it looks at them."""
    guest = make_local(workers=2, pairs=2, features=BASIC | GUEST_CSUM | MQ)
    host = crossing(guest, world, 1, 0)
    for number in range(10):
        host.send(b"%d" % number, host.inbox[0][1])
    guest.drv.breathe(1)
    succeeded(guest, lambda: breathe(guest.drv.workers[0].context.address, 0, 1))
    guest.pump(lambda: len(guest.udp) == 10, 2, "all of them")
    assert [int(one.payload) for _, one in guest.udp] == list(range(10))


def test_echo_replies_wait_for_buffers(guest: Guest) -> None:
    guest.drv.refill = False
    for number in range(40):
        guest.ping(guest.gw4, 77, number, b"")
        guest.drv.settle()
    runs_dry(guest)
    assert len(guest.icmp) <= 16 and in_line(guest) == 1
    feed(guest, 4)
    assert replies(guest) == list(range(40))


def test_echo_replies_wait_for_the_ring_of_a_successor(guest: Guest) -> None:
    for number in range(10):
        guest.ping(guest.gw4, 77, number, b"")
    guest.drv.breathe(0)  # it has sent them, and dies
    assert not guest.icmp
    succeeded(guest, lambda: breathe(guest.drv.workers[0].context.address, 0, 1))
    guest.pump(lambda: len(guest.icmp) >= 10, 2, "all of them")
    assert replies(guest) == list(range(10))


def replies(guest: Guest) -> list[int]:
    """Which of its echo requests the guest has an answer to."""
    return [int.from_bytes(packet.body[2:4], "big") for _, packet in guest.icmp]
