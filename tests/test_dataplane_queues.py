"""Several queue pairs: where answers go, pairs switched on and off, rings stopped and started
again.

The rule under test (virtio 5.1.6.5.6, automatic receive steering): after the guest sent a packet
of a flow on transmit queue X, the flow's packets come on receive queue X; never on a disabled one.
Frames already placed when the guest changes its mind may still come on the old queue, but in
order.
"""

from __future__ import annotations

import itertools
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

import pytest
from backend import Backend
from driver import BASIC, EVENT_IDX, GUEST_CSUM, INDIRECT_DESC, MQ, SET_VRING_ADDR
from formats import all_formats, both_formats
from guest import Guest, holds, random_bytes
from minitcp import Tcp, established, exchange, listen
from world import Datagrams, Peer, World

PORT = 15400
ARGS = ("-t", str(PORT))
ALL = BASIC | GUEST_CSUM | EVENT_IDX | INDIRECT_DESC
MULTIQUEUE = pytest.mark.passt_lacks("one queue pair only")
PAIRS = 4


@pytest.fixture
def wide(make_guest: Callable[..., Guest]) -> Guest:
    """A guest with four pairs, all enabled."""
    return make_guest(pairs=PAIRS, num=128, features=ALL | MQ)


def answers_on(guest: Guest, server: Datagrams, pair: int, sport: int, tag: bytes) -> int:
    """Send a datagram on `pair`, have it answered, return the pair the answer came on."""
    guest.send_udp(guest.gw4, sport, server.port, tag, pair=pair)
    data, client = guest.pump(lambda: server.inbox, 2, f"{tag!r} at the host").popleft()
    assert data == tag
    server.send(tag, client)
    came_on, packet = guest.next_udp(2)
    assert packet.payload == tag
    return came_on


@MULTIQUEUE
def test_enough_pairs_are_offered(wide: Guest) -> None:
    assert wide.drv.offered & MQ, "VIRTIO_NET_F_MQ is not offered"
    assert wide.drv.protocol & 1, "protocol feature MQ is not offered"


@MULTIQUEUE
@both_formats
def test_answers_come_where_the_flow_was_last_sent(wide: Guest, world: World) -> None:
    server = wide.with_host(world.udp(socket.AF_INET))
    for pair in range(PAIRS):
        assert answers_on(wide, server, pair, 6000 + pair, b"first %d" % pair) == pair
    for step, pair in enumerate((3, 0, 2, 1, 1, 3, 2, 0)):
        assert answers_on(wide, server, pair, 6100, b"moved %d" % step) == pair


@MULTIQUEUE
def test_echo_answers_on_the_same_pair(wide: Guest) -> None:
    for pair in range(PAIRS):
        wide.ping(wide.gw4, 50 + pair, 1, b"", pair=pair)
        came_on, _ = wide.next_icmp({0})
        assert came_on == pair


@MULTIQUEUE
@pytest.mark.parametrize("family", [4, 6])
@both_formats
def test_stream_follows_the_guest(wide: Guest, world: World, family: int) -> None:
    """The guest moves a connection from pair to pair in mid-stream, data running both ways all the
    time.
    """
    tcp, peer = established(wide, world, family)
    up, down = random_bytes(800_000, 1), random_bytes(800_000, 2)
    tcp.sizes = itertools.repeat(4000)
    for step in range(8):
        tcp.pair = (step * 3 + 1) % PAIRS
        tcp.send(up[step * 100_000 : (step + 1) * 100_000])
        peer.send(down[step * 100_000 : (step + 1) * 100_000])
        end = (step + 1) * 100_000
        wide.pump(holds(peer.inbox, end), 5, f"step {step} at the host")
        wide.pump(holds(tcp.received, end), 5, f"step {step} at the guest")
        wide.pump(lambda: tcp.all_acked, 5, "acknowledgements")
    assert (peer.inbox, tcp.received) == (up, down)
    assert tcp.repeated == 0, f"{tcp.repeated} segments came twice"
    tcp.check()


def wait_unread(condition: Callable[[], Any], what: str) -> None:
    """Wait without reading the guest's rings."""
    deadline = time.monotonic() + 2
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.0002)


def hop_unread(wide: Guest, world: World) -> tuple[Tcp, Peer]:
    """A connection of pair 2, from which 10 segments lie unread when the guest sends on pair 1."""
    tcp, peer = established(wide, world, 4, pair=2)
    wide.pump(timeout=0.05)
    peer.send(random_bytes(14_600, 1))
    wait_unread(lambda: wide.drv.rx(2).ring.pending() >= 10, "ten segments on pair 2")
    tcp.pair = 1
    tcp.send(b"moved")

    def arrived() -> bool:
        peer.step()
        return peer.inbox == b"moved"

    wait_unread(arrived, "the segment at the host")
    return tcp, peer


@MULTIQUEUE
def test_segments_do_not_overtake(wide: Guest, world: World) -> None:
    """What was sent on the old pair and what follows arrive in order, even when the guest looks
    at the new pair some time before the old one.
    """
    for _ in range(40):
        tcp, peer = hop_unread(wide, world)
        start = time.monotonic()
        peer.send(random_bytes(14_600, 2))
        rings = [wide.drv.rx(pair).ring for pair in (1, 2)]
        wait_unread(lambda: sum(ring.pending() for ring in rings) >= 20, "ten more")
        in_time = time.monotonic() - start < 0.015
        wide.serving = [1]
        wide.pump(timeout=0.02)
        wide.serving = list(range(PAIRS))
        wide.pump(holds(tcp.received, 29_200), 5, "all of it")
        if in_time:
            break
    else:
        pytest.fail("this machine was never quick enough to tell")
    assert tcp.repeated == 0, f"{tcp.repeated} segments came twice"
    tcp.pairs_seen.clear()
    peer.send(b"more")
    wide.pump(lambda: tcp.pairs_seen, what="more")
    assert tcp.pairs_seen[0] == 1, "nothing was in flight any more"


@MULTIQUEUE
def test_stream_does_not_wait_for_an_unread_pair(wide: Guest, world: World) -> None:
    """A guest that never looks at the old pair again: soon its data comes on the new one."""
    tcp, peer = hop_unread(wide, world)
    time.sleep(0.05)
    peer.send(random_bytes(14_600, 2))
    time.sleep(0.05)
    peer.send(random_bytes(14_600, 3))
    wait_unread(lambda: wide.drv.rx(1).ring.pending() >= 10, "ten segments on pair 1")


@MULTIQUEUE
def test_data_comes_on_the_new_pair(wide: Guest, world: World) -> None:
    """Once data sent on a new pair has arrived at the host, everything for the guest comes on that
    pair.
    """
    tcp, peer = established(wide, world, 4)
    total = 0
    for step, pair in enumerate((1, 3, 2, 0, 2)):
        wide.drv.wait_sent(tcp.pair)
        tcp.pair = pair
        tcp.send(b"moved %d" % step)
        wide.pump(lambda: tcp.all_acked and peer.inbox, 5, "the moved segment at the host")
        wide.pump(timeout=0.02)
        peer.inbox.clear()
        tcp.pairs_seen.clear()
        peer.send(random_bytes(200_000, step))
        total += 200_000
        wide.pump(holds(tcp.received, total), 5, f"data on pair {pair}")
        assert set(tcp.pairs_seen) == {pair}, f"step {step}: data on {sorted(set(tcp.pairs_seen))}"
    tcp.check()


@MULTIQUEUE
@both_formats
def test_flapping_flow_stays_whole(wide: Guest, world: World) -> None:
    """A guest that sends every segment on another pair: the stream stays complete and quick."""
    tcp, peer = established(wide, world, 4)
    up, down = random_bytes(1_000_000, 1), random_bytes(1_000_000, 2)
    turn = itertools.count()
    emit = tcp._emit

    def hop(*args: Any, **kwargs: Any) -> None:
        tcp.pair = next(turn) % PAIRS
        emit(*args, **kwargs)

    tcp._emit = hop  # type: ignore[method-assign]
    tcp.sizes = itertools.repeat(3000)
    tcp.send(up)
    peer.send(down)
    wide.pump(lambda: len(peer.inbox) >= len(up), 15, "the stream at the host")
    wide.pump(lambda: len(tcp.received) >= len(down), 15, "the stream at the guest")
    assert (peer.inbox, tcp.received) == (up, down)
    tcp.check()


@MULTIQUEUE
def test_host_connections_spread(wide: Guest, world: World) -> None:
    """Connections from the host have no transmit queue yet: they use more than one enabled pair."""
    accepted = listen(wide, PORT)
    peers = [wide.with_host(world.connect(socket.AF_INET, PORT)) for _ in range(48)]
    wide.pump(lambda: sum(t.state == "established" for t in accepted) == 48, 10, "48 connections")
    used = {tcp.pairs_seen[0] for tcp in accepted}
    assert len(used) > 1, f"all 48 connections came on pair {used}"
    for peer in peers:
        peer.send(b"x" * 1000)
    wide.pump(lambda: all(len(t.received) == 1000 for t in accepted), 10, "data on each connection")


@MULTIQUEUE
def test_connections_that_waited_for_the_guest(
    make_guest: Callable[..., Guest], world: World
) -> None:
    """More of them than a worker accepts at a time came before the guest: all are answered."""
    peers = [world.connect(socket.AF_INET, PORT) for _ in range(150)]
    guest = make_guest(pairs=PAIRS, num=256, features=ALL | MQ, resolve=False)
    accepted = listen(guest, PORT)
    guest.resolve()
    for peer in peers:
        guest.with_host(peer)
    guest.pump(lambda: sum(t.state == "established" for t in accepted) == 150, 5, "all of them")


@MULTIQUEUE
def test_disabled_pairs_get_nothing(make_guest: Callable[..., Guest], world: World) -> None:
    """Four pairs set up, one enabled: connections from the host must all come on that one."""
    guest = make_guest(pairs=PAIRS, num=64, features=ALL | MQ, enabled=1)
    accepted = listen(guest, PORT)
    for _ in range(24):
        guest.with_host(world.connect(socket.AF_INET, PORT))
    guest.pump(lambda: sum(t.state == "established" for t in accepted) == 24, 10, "24 connections")
    assert {pair for tcp in accepted for pair in tcp.pairs_seen} == {0}


@MULTIQUEUE
@both_formats
def test_disabled_transmit_ring_is_drained(make_guest: Callable[..., Guest], world: World) -> None:
    """Frames on a disabled transmit ring are consumed and discarded (vhost-user, ring states)."""
    guest = make_guest(pairs=2, features=ALL | MQ, enabled=1)
    server = guest.with_host(world.udp(socket.AF_INET))
    for i in range(10):
        guest.send_udp(guest.gw4, 6000, server.port, b"%d" % i, pair=1)
    guest.drv.wait_sent(1)
    assert answers_on(guest, server, 0, 6001, b"enabled") == 0
    assert not server.inbox, "a frame of a disabled ring was sent"


@pytest.mark.passt_defect("sends frames of a disabled transmit ring")
@both_formats
def test_disabling_the_only_pair(guest: Guest, world: World) -> None:
    server = guest.with_host(world.udp(socket.AF_INET))
    assert answers_on(guest, server, 0, 6000, b"before") == 0
    guest.drv.enable(0, False)
    guest.drv.enable(1, False)
    guest.drv.barrier()
    guest.send_udp(guest.gw4, 6000, server.port, b"while disabled")
    guest.drv.wait_sent(0)
    guest.pump(timeout=0.2)
    assert not server.inbox, "a frame of a disabled ring was sent"
    guest.drv.enable(0, True)
    guest.drv.enable(1, True)
    assert answers_on(guest, server, 0, 6000, b"after") == 0


@MULTIQUEUE
@both_formats
def test_pair_disabled_at_run_time(wide: Guest, world: World) -> None:
    """The guest gives up pairs (ethtool -L): flows that lived there go on elsewhere, data in
    order, none lost.
    """
    tcp, peer = established(wide, world, 4, pair=3)
    stream = random_bytes(600_000)
    peer.send(stream[:300_000])
    wide.pump(lambda: len(tcp.received) > 100_000, 5, "data on pair 3")
    for pair in (1, 2, 3):
        wide.drv.enable(2 * pair, False)
        wide.drv.enable(2 * pair + 1, False)
    wide.drv.barrier()
    wide.pump(timeout=0.05)
    before = [wide.drv.rx(pair).ring.used_idx for pair in (1, 2, 3)]
    tcp.pair = 0
    peer.send(stream[300_000:])
    wide.pump(lambda: len(tcp.received) >= len(stream), 10, "the stream on the pair left")
    assert tcp.received == stream
    after = [wide.drv.rx(pair).ring.used_idx for pair in (1, 2, 3)]
    assert before == after, "frames were put on a disabled ring"
    wide.drv.enable(4, True)
    wide.drv.enable(5, True)
    server = wide.with_host(world.udp(socket.AF_INET))
    assert answers_on(wide, server, 2, 6000, b"pair 2 again") == 2
    tcp.check()


@MULTIQUEUE
def test_silent_flow_leaves_a_disabled_pair(wide: Guest, world: World) -> None:
    """Data from the host for a flow last sent on a pair that is now disabled must come on another
    at once.
    """
    tcp, peer = established(wide, world, 4, pair=2)
    wide.pump(timeout=0.05)
    wide.drv.enable(4, False)
    wide.drv.enable(5, False)
    wide.drv.barrier()
    tcp.pair = 0
    tcp.pairs_seen.clear()
    peer.send(b"first word after the change")
    wide.pump(lambda: len(tcp.received) == 27, 5, "data for the silent flow")
    assert 2 not in tcp.pairs_seen


def stop_and_check(guest: Guest) -> list[int]:
    """Stop all rings; nothing may move afterwards. Returns the bases."""
    drv = guest.drv
    bases = drv.stop_rings()
    before = [queue.ring.shared() for queue in drv.queues]
    time.sleep(0.1)
    assert before == [queue.ring.shared() for queue in drv.queues], "a stopped ring was written"
    return bases


@all_formats
def test_guest_reboot(guest: Guest, world: World) -> None:
    """GET_VRING_BASE on each ring, then everything from index 0 again on the same connection,
    three times.
    """
    for _ in range(3):
        server = guest.with_host(world.udp(socket.AF_INET))
        assert answers_on(guest, server, 0, guest.port(), b"hello") == 0
        tcp, peer = established(guest, world, 6)
        exchange(guest, tcp, peer, b"up", b"down")
        tcp.forget()
        stop_and_check(guest)
        for queue in guest.drv.queues:
            queue.ring.reset()
        guest.drv.start_rings()
        guest.resolve()


@all_formats
def test_base_tells_where_the_ring_stands(guest: Guest, world: World) -> None:
    """The base of a transmit ring is the number of buffers taken; of a receive ring, of buffers
    used.
    """
    server = guest.with_host(world.udp(socket.AF_INET))
    for i in range(20):
        assert answers_on(guest, server, 0, 6000, struct.pack(">I", i)) == 0
    guest.drv.wait_sent(0)
    rx, tx = (queue.ring for queue in guest.drv.queues)
    assert rx.used_idx > 20 and len(tx.free) == tx.num
    assert stop_and_check(guest) == [rx.base, tx.base]


@pytest.mark.passt_defect("writes to a call descriptor it no longer has")
@all_formats
def test_stream_across_a_pause(guest: Guest, world: World) -> None:
    """The VMM pauses and resumes (GET_VRING_BASE, then the same base): the connection goes on,
    nothing is lost.
    """
    tcp, peer = established(guest, world, 4)
    up, down = random_bytes(500_000, 1), random_bytes(500_000, 2)
    tcp.send(up[:250_000])
    peer.send(down[:250_000])
    guest.pump(lambda: len(tcp.received) > 50_000, 5, "some data")
    bases = stop_and_check(guest)
    peer.send(down[250_000:])
    for queue, base in zip(guest.drv.queues, bases, strict=True):
        guest.drv.start_ring(queue, base)
        guest.drv.enable(queue.index, True)
        guest.drv.kick(queue)
    tcp.send(up[250_000:])
    guest.pump(lambda: len(tcp.received) >= len(down), 10, "the stream at the guest")
    guest.pump(lambda: len(peer.inbox) >= len(up), 10, "the stream at the host")
    assert (peer.inbox, tcp.received) == (up, down)
    tcp.check()


@both_formats
def test_memory_table_replaced_while_running(guest: Guest, world: World) -> None:
    """SET_MEM_TABLE on running rings (memory hotplug, ROM remapping): same memory, new mappings,
    no pause.
    """
    tcp, peer = established(guest, world, 4)
    stream = random_bytes(2_000_000)
    peer.send(stream)
    for _ in range(10):
        guest.pump(timeout=0.002)
        guest.drv.set_memory()
        for queue in guest.drv.queues:
            guest.drv.must(SET_VRING_ADDR, guest.drv.addresses(queue))
    guest.pump(lambda: len(tcp.received) >= len(stream), 10, "the stream at the guest")
    assert tcp.received == stream
    tcp.check()


@both_formats
def test_connection_survives_a_front_end_reconnect(
    backend: Backend, make_guest: Callable[..., Guest], world: World
) -> None:
    """The VMM's connection drops and comes back with the same guest in it: its TCP connection goes
    on (A8).
    """
    first = make_guest()
    tcp, peer = established(first, world, 4)
    tcp.send(b"before")
    first.pump(lambda: peer.inbox == b"before" and tcp.all_acked, what="data before")
    first.drv.channel.close()
    second = make_guest()
    moved = _transplant(tcp, second)
    second.with_host(peer)
    moved.send(b", after")
    second.pump(lambda: peer.inbox == b"before, after", what="data after")
    peer.send(b"and back")
    second.pump(lambda: moved.received == b"and back", what="data back")
    moved.check()


def _transplant(tcp: Tcp, guest: Guest) -> Tcp:
    """The same connection in the guest's new device."""
    tcp.forget()
    tcp.guest = guest
    guest.endpoints[tcp.raddr, tcp.rport, tcp.lport] = tcp
    return tcp
