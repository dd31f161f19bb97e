"""Frames that cross to another worker cost by the burst: what they carry is gathered, and a worker
that sleeps is woken once. And nobody sleeps on who was given frames.

The workers live in the test's process (inprocess.py): each breath is one burst, and what was
written to an eventfd before it is read says how often a worker was woken. Worker 0 is the home of
what the guest sends from pair 1, which worker 1 serves.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable
from functools import partial

import pytest
from driver import BASIC, GUEST_CSUM, MQ
from guest import Guest, random_bytes
from inprocess import Died
from minitcp import Tcp, established, listen
from packets import ACK, PSH
from test_tcp_gather import arrived, data_segs_out
from world import Datagrams, Peer, World

from dataplane import breath
from dataplane.breath import HANDOFF_MAX
from dataplane.context import CHAINS_MAX
from dataplane.handoff import PATIENCE_MS, WAKE_BYTES
from dataplane.worker import Worker
from shm import schema
from shm.jit import COMPILED
from shm.layout import View
from shm.schema import HANDOFF_BYTES

Make = Callable[..., Guest]
HOME, OTHER = 0, 1
ETHERNET_TCP_BYTES = 12 + 14 + 20 + 20  # virtio-net header and what follows it, IPv4
families = pytest.mark.parametrize("family", [4, 6])


@pytest.fixture
def make(make_local: Make) -> Make:
    """Guests whose two workers breathe when the test says so."""
    return partial(make_local, workers=2, pairs=2, features=BASIC | GUEST_CSUM | MQ)


def block(guest: Guest, worker: int) -> View:
    base = guest.drv.segment.offsets.worker + worker * schema.WORKER.size
    return View(schema.WORKER, guest.drv.segment.buffer, base)


def asleep(guest: Guest, *workers: int) -> None:
    """These workers say that they sleep, the others that they do not."""
    for worker in range(len(guest.drv.workers)):
        block(guest, worker)["sleeping"] = int(worker in workers)
        woken(guest, worker)


def woken(guest: Guest, worker: int) -> int:
    """How often the worker was woken since this was asked last."""
    try:
        return os.eventfd_read(guest.drv.wakes[worker])
    except BlockingIOError:
        return 0


def crossing(guest: Guest, world: World, family: int = 4) -> tuple[Tcp, Peer]:
    """A connection whose segments, from now on, the guest puts on the other worker's ring."""
    stream = established(guest, world, family)
    guest.drv.keep_home()
    stream[0].pair = 1
    return stream


def send(guest: Guest, segments: list[tuple[Tcp, bytes]]) -> None:
    """One burst on pair 1; nobody breathes."""
    transmit = guest.transmit
    guest.transmit = partial(transmit, publish=False)  # type: ignore[method-assign]
    for tcp, data in segments:
        tcp.segment(tcp.nxt, data, ACK | PSH)
        tcp.nxt += len(data)
    guest.transmit = transmit  # type: ignore[method-assign]
    guest.drv.publish(guest.drv.tx(1))


def handed(guest: Guest) -> View:
    """The ring of frames from worker 1 to worker 0, for the host."""
    number = (OTHER * len(guest.drv.workers) + HOME) * 2
    at = guest.drv.segment.offsets.handoff + number * schema.HANDOFF_STRIDE
    return View(schema.HANDOFF, guest.drv.segment.buffer, at)


# --- gathered -------------------------------------------------------------------------------------


@families
def test_segments_that_cross_are_gathered(make: Make, world: World, family: int) -> None:
    """A burst of two streams: each socket gets all of its stream in one piece."""
    guest = make()
    streams = [crossing(guest, world, family) for _ in range(2)]
    parts = [[random_bytes(1000) for _ in range(CHAINS_MAX // 2)] for _ in streams]
    turns = zip(*parts, strict=True)
    send(
        guest, [(tcp, data) for turn in turns for (tcp, _), data in zip(streams, turn, strict=True)]
    )
    guest.drv.breathe(OTHER)
    assert data_segs_out(guest) == [0, 0]
    guest.drv.breathe(HOME)
    assert data_segs_out(guest) == [1, 1]
    assert handed(guest)["tail"] == handed(guest)["head"]
    for stream, part in zip(streams, parts, strict=True):
        arrived(guest, stream, b"".join(part))


def test_datagrams_that_cross_are_a_train(make: Make, world: World) -> None:
    """They arrive in order and whole, also those of another size."""
    guest = make()
    host = guest.with_host(world.udp(socket.AF_INET))
    guest.send_udp(guest.gw4, 6000, host.port, b"at home in the first", pair=0)
    guest.drv.settle()
    guest.drv.keep_home()
    sent = [struct.pack(">I", number) + bytes(number % 7 // 6 * 100 + 200) for number in range(60)]
    for data in sent:
        guest.send_udp(guest.gw4, 6000, host.port, data, pair=1, publish=False)
    guest.drv.publish(guest.drv.tx(1))
    guest.drv.breathe(OTHER)
    guest.drv.breathe(HOME)
    guest.pump(lambda: len(host.inbox) == 61, what="the datagrams")
    assert [data for data, _ in host.inbox][1:] == sent


def test_more_than_one_breath_takes(make: Make, world: World) -> None:
    """The rest stays where it is, and is looked for without sleeping."""
    guest = make()
    stream, ring = crossing(guest, world), handed(guest)
    parts = [random_bytes(100, seed) for seed in range(HANDOFF_MAX + 10)]
    ends = []
    for burst in (parts[:HANDOFF_MAX], parts[HANDOFF_MAX:]):
        send(guest, [(stream[0], data) for data in burst])
        guest.drv.breathe(OTHER)
        ends.append(ring["head"])
    for end, busy in zip(ends, (True, False), strict=True):
        guest.drv.breathe(HOME)
        assert (ring["tail"], guest.drv.busy(HOME)) == (end, busy)
    arrived(guest, stream, b"".join(parts))


def test_more_than_is_gathered_at_a_time(make: Make, world: World) -> None:
    """Bursts of half the ring each, many times around it: nothing is dropped or overwritten."""
    guest = make()
    stream = crossing(guest, world)
    for _ in range(4):
        parts = [random_bytes(9000, seed) for seed in range(CHAINS_MAX)]
        send(guest, [(stream[0], data) for data in parts])
        guest.drv.breathe(OTHER)
        assert guest.drv.drops("handoff_full", 3) == 0
        guest.drv.breathe(HOME)
        assert handed(guest)["tail"] == handed(guest)["head"]
        arrived(guest, stream, b"".join(parts))
        stream[1].inbox.clear()


def test_a_consumer_that_died_before_it_gave_back(make: Make, world: World) -> None:
    """Its successor sees the same frames: the stream stays what it is, a datagram comes twice."""
    guest = make()
    stream, host = crossing(guest, world), guest.with_host(world.udp(socket.AF_INET))
    guest.send_udp(guest.gw4, 6000, host.port, b"at home in the first", pair=0)
    guest.drv.settle()
    parts = [random_bytes(500, seed) for seed in range(20)]
    send(guest, [(stream[0], data) for data in parts])
    guest.send_udp(guest.gw4, 6000, host.port, b"twice", pair=1)
    guest.drv.breathe(OTHER)
    ring = handed(guest)
    tail = ring["tail"]
    guest.drv.breathe(HOME)
    assert ring["tail"] == ring["head"] > tail
    ring["tail"] = tail
    guest.drv.breathe(HOME)
    arrived(guest, stream, b"".join(parts))
    guest.pump(lambda: len(host.inbox) >= 3, what="the datagrams")
    assert [data for data, _ in host.inbox][1:] == [b"twice", b"twice"]


# --- a full ring ----------------------------------------------------------------------------------


def fill_ring(guest: Guest, stream: tuple[Tcp, Peer]) -> bytes:
    """The guest sends more than the hand-off ring takes; all of what it sent."""
    parts = [random_bytes(9000, seed) for seed in range(HANDOFF_BYTES // 9000 + CHAINS_MAX)]
    stream[0].retransmit = False
    for start in range(0, len(parts), CHAINS_MAX):
        send(guest, [(stream[0], data) for data in parts[start : start + CHAINS_MAX]])
        guest.drv.breathe(OTHER)
    return b"".join(parts)


def test_what_finds_no_room_waits_in_its_queue(make: Make, world: World) -> None:
    """Nothing is lost or spins, who waits is woken when there is room, and order is kept."""
    guest = make(num=1024)
    stream = crossing(guest, world)
    sent = fill_ring(guest, stream)
    assert not guest.drv.busy(OTHER) and guest.drv.counter("stalled", OTHER)
    assert guest.drv.breaths_in(0.1, OTHER) < 20, "it spins"
    woken(guest, OTHER)
    guest.drv.breathe(HOME)
    assert woken(guest, OTHER) == 1, "nobody told of the room"
    os.eventfd_write(guest.drv.wakes[OTHER], 1)
    arrived(guest, stream, sent)
    assert [guest.drv.drops("handoff_full", 2 * pair + 1) for pair in range(2)] == [0, 0]


def test_a_queue_does_not_stand_still_for_a_worker_that_does(make: Make, world: World) -> None:
    """For a while it does. Then what is for that worker is dropped and counted, at once; what is
    not goes its way. When there is room again all is as before."""
    guest = make(num=1024)
    stream, host = crossing(guest, world), guest.with_host(world.udp(socket.AF_INET))
    fill_ring(guest, stream)
    guest.send_udp(guest.gw4, 6000, host.port, b"of its own", pair=1)
    for _ in range(3):
        guest.drv.breathe(OTHER)
    assert not guest.drv.drops("handoff_full", 3)
    guest.drv.breaths_in(0.3, OTHER)
    dropped = guest.drv.drops("handoff_full", 3)
    assert dropped >= CHAINS_MAX / 2
    assert [data for data, _ in host.inbox or guest.pump(lambda: host.inbox)] == [b"of its own"]
    send(guest, [(stream[0], random_bytes(9000))])
    guest.send_udp(guest.gw4, 6000, host.port, b"not late", pair=1)
    guest.drv.breathe(OTHER)
    assert guest.drv.drops("handoff_full", 3) == dropped + 1
    stream[0].retransmit = True
    guest.pump(lambda: len(host.inbox) == 2, what="the second datagram")
    guest.pump(lambda: stream[0].all_acked, 20, "the stream, sent once more")
    assert guest.drv.drops("handoff_full", 3) == dropped + 1


def test_a_queue_that_waits_gets_its_turn(make: Make, world: World) -> None:
    """Frames of one queue for another worker take all the room there is, again and again: those of
    another queue do cross, and what lies behind them arrives."""
    guest = make(pairs=4)
    drv, host, size = guest.drv, guest.with_host(world.udp(socket.AF_INET)), 60_000
    for port, pair in ((6000, 0), (6001, 0), (6002, 3)):
        guest.send_udp(guest.gw4, port, host.port, b"at home", pair=pair)
    guest.pump(lambda: len(host.inbox) == 3, what="the datagrams")
    drv.keep_home()

    def more_than_crosses() -> None:
        while len(drv.tx(1).ring.chains) < 30:
            guest.send_udp(guest.gw4, 6000, host.port, bytes(size), pair=1, publish=False)
        drv.publish(drv.tx(1))

    more_than_crosses()
    drv.breathe(OTHER)
    for port, data in ((6001, bytes(size)), (6002, b"of its own")):
        guest.send_udp(guest.gw4, port, host.port, data, pair=3)
    for _ in range(10):
        drv.breathe(HOME)
        drv.reap_tx(1)
        more_than_crosses()
        drv.breathe(OTHER)
        host.step()
    assert drv.queue_counter(7, "packets") == 3
    guest.pump(lambda: b"of its own" in [data for data, _ in host.inbox], what="what lay behind")


def test_who_waits_for_room_does_not_poll(make: Make, world: World) -> None:
    """With --poll-us a worker looks for work for a while, but it has done none."""
    guest = make(num=1024)
    fill_ring(guest, crossing(guest, world))
    view = guest.drv.workers[OTHER].context.view
    guest.drv.block["poll_us"] = 50
    view["polling"], view["poll_ns"] = 1, 10_000_000
    assert guest.drv.breaths_in(0.15, OTHER) < 100


# --- woken ----------------------------------------------------------------------------------------


def answers_cross(guest: Guest, world: World) -> Datagrams:
    """A program that the guest has asked on both pairs: its flow is worker 0's, and stays, and what
    it sends goes to worker 1's queue."""
    host = guest.with_host(world.udp(socket.AF_INET))
    for pair in (HOME, OTHER):
        guest.send_udp(guest.gw4, 6000, host.port, b"x", pair=pair)
        guest.drv.settle()
    guest.pump(lambda: len(host.inbox) == 2, what="both")
    guest.drv.keep_home()
    return host


def test_a_ring_that_starts_again_has_all_its_patience(make: Make, world: World) -> None:
    """A frame that crossed waits for buffers when its ring is stopped: the first that finds none
    after the ring has started again waits as long as any."""
    guest = make(num=16)
    drv, host = guest.drv, answers_cross(guest, world)
    drv.refill = False
    client = host.inbox[0][1]
    for number in range(17):
        host.send(b"%d" % number, client)
    for _ in range(3):
        drv.breathe(HOME)
        drv.breathe(OTHER)
    r = drv.workers[OTHER].context.ring(2 * OTHER)
    assert r["short_since_ms"] and not drv.drops("rx_full", 2 * OTHER)
    drv.enable_pairs([HOME])
    drv.stop_ring(2 * OTHER)
    drv.settle()
    drv.rx(OTHER).ring.reset(None)
    drv.start_ring(drv.rx(OTHER))
    drv.enable_pairs([HOME, OTHER])
    time.sleep(2 * PATIENCE_MS / 1000)
    guest.send_udp(guest.gw4, 6000, host.port, b"x", pair=OTHER)
    host.send(b"first of a new life", client)
    drv.breathe(OTHER)
    drv.breathe(HOME)
    drv.breathe(OTHER)
    assert r["short_since_ms"] and not drv.drops("rx_full", 2 * OTHER)


def test_a_burst_from_the_guest_wakes_once(make: Make, world: World) -> None:
    guest = make(workers=3, pairs=3)
    stream = crossing(guest, world)
    for sleepers, wanted in (((0, 2), [1, 0, 0]), ((2,), [0, 0, 0])):
        parts = [random_bytes(1000) for _ in range(CHAINS_MAX)]
        send(guest, [(stream[0], data) for data in parts])
        asleep(guest, *sleepers)
        guest.drv.breathe(OTHER)
        assert [woken(guest, worker) for worker in range(3)] == wanted
        asleep(guest)
        arrived(guest, stream, b"".join(parts))
        stream[1].inbox.clear()


def test_much_of_a_burst_is_not_kept_waiting(make: Make, world: World) -> None:
    """Large segments: whoever sleeps is woken before they leave no room for more."""
    guest = make()
    stream, size = crossing(guest, world), 9000
    send(guest, [(stream[0], random_bytes(size)) for _ in range(CHAINS_MAX)])
    asleep(guest, HOME)
    guest.drv.breathe(OTHER)
    sooner = CHAINS_MAX // -(-WAKE_BYTES // (size + ETHERNET_TCP_BYTES))
    assert woken(guest, HOME) == sooner + 1


def test_a_burst_to_the_guest_wakes_once(make: Make, world: World) -> None:
    """Streams and datagrams of many flows, for a receive queue of another worker."""
    guest = make(num=256)
    streams = [crossing(guest, world) for _ in range(8)]
    hosts = [guest.with_host(world.udp(socket.AF_INET)) for _ in range(4)]
    for host in hosts:
        for pair in (0, 1):
            guest.send_udp(guest.gw4, 6000, host.port, b"?", pair=pair)
            guest.drv.settle()
    send(guest, [(tcp, b"?") for tcp, _ in streams])
    guest.drv.settle()
    guest.pump(lambda: all(len(host.inbox) == 2 for host in hosts), what="the datagrams")
    for _, peer in streams:
        peer.send(random_bytes(3000))
    for host in hosts:
        host.send(b"!", host.inbox[0][1])
    asleep(guest, OTHER)
    had = guest.drv.counter("handoff_frames", HOME)
    guest.drv.breathe(HOME)
    assert guest.drv.counter("handoff_frames", HOME) - had >= len(streams) + len(hosts)
    assert woken(guest, OTHER) == 1
    guest.pump(lambda: all(len(tcp.received) == 3000 for tcp, _ in streams), what="the streams")


def test_a_frame_of_plain_python_wakes(make: Make, world: World) -> None:
    """Between breaths: what a worker makes for a queue of another is not kept until the next."""
    guest = make()
    guest.drv.enable_pairs([1])
    asleep(guest, OTHER)
    world.run(guest.drv.workers[HOME].send_frame, bytes(60), 0)
    assert woken(guest, OTHER) == 1
    assert not guest.drv.workers[HOME].context.view["wakes"]


def test_a_connection_that_waited_wakes(make: Make, world: World) -> None:
    """Its SYN goes out when a receive queue is enabled, and that is another worker's."""
    guest = make()
    accepted = listen(guest, 8080)
    listener = world.listen(socket.AF_INET)
    guest.drv.enable_pairs([])
    guest.drv.forward(listener.socket, 8080)
    guest.with_host(world.connect(socket.AF_INET, listener.port))
    guest.drv.settle()
    asleep(guest, OTHER)
    guest.drv.enable_pairs([1])
    guest.drv.breathe(HOME)
    assert woken(guest, OTHER) == 1
    guest.pump(lambda: len(accepted) == 1 and accepted[0].state == "established", what="the SYN")
    assert set(accepted[0].pairs_seen) == {1}
    listener.close()


def test_a_successor_wakes_all(make: Make) -> None:
    """A worker may die between giving frames, or taking some, and telling of it."""
    guest = make(workers=3, pairs=3)
    for restarts, wanted in ((0, 0), (1, 1)):
        block(guest, OTHER)["restarts"] = restarts
        one = Worker(guest.drv.segment, OTHER, 3, guest.drv.wires(OTHER))
        assert [woken(guest, worker) for worker in range(3)] == [wanted] * 3
        one.epoll.close()
        one.context.close()


@pytest.mark.skipif(COMPILED, reason="NOT TESTED here: a death there, NUMBA_DISABLE_JIT=1")
def test_room_made_by_one_that_died(
    make: Make, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits for room in its ring, and is awake, is told by its successor."""
    guest = make(num=1024)
    drv, host = guest.drv, answers_cross(guest, world)
    (flow,) = drv.flows()
    assert (flow["home"], flow["tx_queue"]) == (HOME, OTHER)
    sent = 0
    while not flow["line"]:
        for _ in range(40):
            host.send(bytes(1300), host.inbox[0][1])
        sent += 40
        for _ in range(3):
            drv.breathe(HOME)
        assert sent < 2000, "the ring never was full"
    assert drv.counter("stalled", HOME) and not drv.counter("sleeping", HOME)

    def die(w: int, other: int) -> None:
        raise Died("before it tells of the room")

    with monkeypatch.context() as patch:
        patch.setattr(breath, "HANDOFF_MAX", 2000)  # as if the frames were 64 KiB long
        patch.setattr(breath.handoff, "room_made", die)
        drv.breathe(OTHER)
    assert drv.counter("restarts", OTHER) == 1
    guest.pump(lambda: not flow["line"] and not guest.drv.counter("stalled", HOME), 3, "its turn")
    host.send(b"and on", host.inbox[0][1])
    guest.pump(lambda: guest.udp[-1][1].payload == b"and on", 3, "what comes after")
