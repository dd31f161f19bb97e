"""What happens within one breath, and between two: the order of events is the test's choice.

A back-end that runs decides by itself what it sees together. Here the workers live in the test's
process (inprocess.py), so that a reset, a hang-up or a full buffer comes exactly where it hurts.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from driver import BASIC, EVENT_IDX, GUEST_CSUM, GUEST_TSO4, GUEST_TSO6, INDIRECT_DESC, MQ, drain
from guest import Guest, random_bytes
from inprocess import EXPIRY, PROTOCOL, local_guest, no_descriptors
from minitcp import Tcp, established, exchange, listen
from packets import ACK, FIN, PSH, RST
from vring import Layout
from world import Peer, World, loopback

from dataplane.context import ATTEND_AWAKE, ATTEND_BROKEN, ATTEND_ERRORS
from dataplane.lifecycle import DIRTY, READABLE

AF = {4: socket.AF_INET, 6: socket.AF_INET6}
families = pytest.mark.parametrize("family", [4, 6])
ALL = BASIC | GUEST_CSUM | EVENT_IDX | INDIRECT_DESC | MQ
Make = Callable[..., Guest]


@pytest.fixture
def make(make_local: Make) -> Make:
    """Guests on workers of their own in this process."""
    return make_local


@families
def test_connection(make: Make, world: World, family: int) -> None:
    """The workers of this process serve as others do."""
    guest = make()
    exchange(guest, *established(guest, world, family), random_bytes(200_000), random_bytes(9000))


def tcp_flows(guest: Guest) -> int:
    """How many connections the workers know."""
    return sum(flow["protocol"] == PROTOCOL["tcp"] for flow in guest.drv.flows())


def both_in_one_breath(guest: Guest, *sends: Callable[[], Any]) -> None:
    """Several frames that the next breath finds together."""
    transmit = guest.transmit

    def later(*given: Any, **how: Any) -> None:
        transmit(*given, **{**how, "publish": False})

    guest.transmit = later  # type: ignore[method-assign]
    for send in sends:
        send()
    guest.transmit = transmit  # type: ignore[method-assign]
    guest.drv.publish(guest.drv.tx(0))


def shrink(guest: Guest, sndbuf: int) -> None:
    """Give the host sockets of all connections a send buffer of this size, as the kernel does when
    memory is short.
    """
    for flow in guest.drv.flows():
        if flow["protocol"] == PROTOCOL["tcp"]:
            with socket.socket(fileno=os.dup(flow["fd"])) as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, sndbuf // 2)
                assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == sndbuf


# --- from the guest -------------------------------------------------------------------------------


@families
def test_the_end_of_a_dead_connection_ends_no_other(make: Make, world: World, family: int) -> None:
    """Data and FIN for a connection the host has just reset, then data of another, in one breath:
    the FIN is not the other's.
    """
    guest = make()
    dead, dead_peer = established(guest, world, family)
    tcp, peer = established(guest, world, family)
    guest.drv.settle()
    dead_peer.reset()
    both_in_one_breath(
        guest,
        lambda: dead.segment(dead.nxt, b"last words", ACK | PSH | FIN),
        lambda: tcp.send(b"hello"),
    )
    guest.drv.settle()
    guest.pump(lambda: peer.inbox == b"hello", what="the data of the other connection")
    guest.pump(timeout=0.05)
    assert not peer.eof, "the host was told that the guest has finished"
    exchange(guest, tcp, peer, b"more", b"answer")
    assert peer.inbox == b"hellomore" and not peer.eof
    guest.pump(lambda: dead.state == "reset", what="the reset of the dead connection")


@families
def test_nothing_follows_refused_payload(make: Make, world: World, family: int) -> None:
    """A guest that ignores its window sends more than the socket takes at once, in frames of so
    many pieces that each needs a sendmsg of its own. What one of them left must not be missing in
    front of what the next one sends: the host gets a prefix of the stream, and in the end all.
    """
    guest = make(features=ALL, num=1024)
    tcp, peer = established(guest, world, family)
    shrink(guest, 16_384)
    guest.drv.settle()
    stream, frame = random_bytes(1_500_000), 60_000
    cuts = Layout(sizes=(12, 66) + (100,) * 590, indirect=True)
    tcp.out += stream
    tcp.nxt = tcp.limit = 1 + len(stream)
    both_in_one_breath(
        guest,
        *[
            lambda at=at: tcp.segment(1 + at, stream[at : at + frame], ACK | PSH, layout=cuts)
            for at in range(0, len(stream), frame)
        ],
    )
    guest.drv.settle()
    peer.step()
    assert 0 < len(peer.inbox) < len(stream), "all was taken: nothing was refused"
    assert peer.inbox == stream[: len(peer.inbox)], "not what the guest sent"
    tcp._arm()
    guest.pump(lambda: len(peer.inbox) >= len(stream), 20, f"the rest of the stream: {tcp}")
    assert peer.inbox == stream
    tcp.check()


# --- from the host --------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("data", [b"", b"bye"])
def test_hang_up_while_connecting(make: Make, world: World, family: int, data: bytes) -> None:
    """The server answers and closes before the worker looks: one edge tells of the connection, the
    data and the end.
    """
    guest = make()
    listener = world.listen(AF[family])
    tcp = Tcp(guest, guest.addresses(family)[1], listener.port).open()
    guest.drv.breathe()
    listener.step()
    peer = listener.accepted[0]
    peer.send(data)
    peer.shutdown()
    guest.pump(lambda: tcp.state == "established", what="the connection")
    guest.pump(lambda: tcp.eof, 0.8, "the end of the stream")
    assert tcp.received == data
    tcp.check()
    tcp.send(b"and you")
    tcp.close()
    guest.pump(lambda: (peer.step(), peer.eof)[1], what="the end at the host")
    assert peer.inbox == b"and you"
    guest.pump(lambda: not tcp_flows(guest), what="the flow to be forgotten")
    listener.close()


@families
def test_the_end_acknowledged_after_it_was_taken_back(
    make: Make, world: World, family: int
) -> None:
    """Data and FIN have arrived, but duplicate ACKs make the worker go back to the first byte; it
    finds no buffer to send again, and then all is acknowledged, the FIN included.
    """
    guest = make()
    tcp, peer = established(guest, world, family)
    tcp.auto_ack = False
    peer.send(b"0123456789")
    peer.shutdown()
    guest.pump(lambda: tcp.eof, what="data and FIN")
    drv = guest.drv
    drv.refill = False
    for number in range(256):
        if not drv.rx(0).ring.chains:
            break
        guest.ping(guest.gw4, 1, number, b"")
        guest.pump(lambda: guest.icmp, what="a ping that takes a receive buffer")
        guest.icmp.clear()
    assert not drv.rx(0).ring.chains
    for _ in range(4):
        tcp.segment(tcp.nxt, ack=1)
        drv.settle()
    tcp.segment(tcp.nxt)  # acknowledges the FIN
    drv.settle()
    drv.refill, tcp.auto_ack = True, True
    drv.fill(0)
    drv.settle()
    exchange(guest, tcp, peer, b"still open this way", b"")
    tcp.segments.clear()
    tcp.close()
    guest.pump(lambda: tcp.all_acked, what="the acknowledgement of the FIN")
    guest.pump(lambda: not tcp_flows(guest), 1, "the flow to be forgotten")
    assert not any(packet.flags & (FIN | RST) or packet.payload for packet in tcp.segments)
    tcp.check()


@families
def test_urgent_data(make: Make, world: World, family: int) -> None:
    """Urgent bytes stay where they were sent (RFC 6093)."""
    guest = make()
    tcp, peer = established(guest, world, family)
    expected = b""
    for number in range(5):
        before, after = random_bytes(3000, number), random_bytes(200 * number, 10 + number)
        peer.send(before)
        peer.socket.send(b"!", socket.MSG_OOB)
        peer.send(after)
        expected += before + b"!" + after
        guest.drv.settle()
    peer.shutdown()
    guest.pump(lambda: tcp.eof, 2, f"the end: {tcp}")
    assert tcp.received == expected
    tcp.check()


@families
def test_urgent_data_is_not_held_back(make: Make, world: World, family: int) -> None:
    """recvmsg stops short of an urgent byte although there is more behind it: nothing may wait for
    the next edge, and nothing may spin.
    """
    guest = make()
    tcp, peer = established(guest, world, family)
    expected = b""
    for number in range(4):
        before, after = random_bytes(3000 * number, number), random_bytes(200, 10 + number)
        peer.send(before)
        peer.socket.send(b"!", socket.MSG_OOB)
        peer.send(after)
        expected += before + b"!" + after
        guest.pump(lambda: len(tcp.received) >= len(expected), 0.8, f"all bytes: {tcp}")
        assert tcp.received == expected
        guest.drv.settle()
        assert guest.drv.breaths_in(0.2) < 10
    exchange(guest, tcp, peer, b"up", b"down")
    tcp.check()


@families
@pytest.mark.parametrize("count", [33, 64, 100])
def test_many_echo_replies_at_once(make: Make, family: int, count: int) -> None:
    """As many pings as a breath takes are answered by the kernel before the worker looks again."""
    guest = make(num=256)
    gateway = guest.addresses(family)[1]
    both_in_one_breath(
        guest, *[lambda n=n: guest.ping(gateway, 77, n, b"%d" % n) for n in range(count)]
    )
    guest.pump(lambda: len(guest.icmp) >= count, 1, f"{count} replies")
    replies = [packet for _, packet in guest.icmp]
    assert {packet.type for packet in replies} == {0 if family == 4 else 129}
    assert [struct.unpack_from(">H", packet.body, 2)[0] for packet in replies] == list(range(count))


# --- listeners ------------------------------------------------------------------------------------


@families
def test_a_port_of_the_host_is_used_again_at_once(make: Make, world: World, family: int) -> None:
    """A client of the host breaks its connection and makes another from the same port, and the
    listener's edge comes before that of the broken one: the guest gets RST, then SYN.
    """
    guest = make()
    listener = world.listen(AF[family])
    guest.drv.forward(listener.socket, 8080)
    accepted = listen(guest, 8080)
    first = world.connect(AF[family], listener.port)
    port = first.socket.getsockname()[1]
    guest.with_host(first)
    guest.pump(lambda: [t.state for t in accepted] == ["established"], 2, "the first connection")
    former = accepted[0]
    on_reset = former._on_reset
    former._on_reset = lambda packet: (on_reset(packet), former.forget())  # type: ignore
    guest.with_host(world.connect(AF[family], listener.port))
    first.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    first.socket.close()
    guest.peers.remove(first)
    again = world.socket(AF[family], socket.SOCK_STREAM)
    again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    again.bind((loopback(AF[family]), port))
    again.connect_ex((loopback(AF[family]), listener.port))
    guest.pump(lambda: len(accepted) == 3, 2, "both new connections")
    assert former.state == "reset"
    guest.pump(lambda: {t.state for t in accepted[1:]} == {"established"}, 2, "their ACKs")
    assert [t.rport for t in accepted].count(port) == 2
    again.close()
    listener.close()


@families
def test_connections_wait_while_there_are_no_descriptors(
    make: Make, world: World, family: int
) -> None:
    """accept() fails for want of descriptors: no spinning, and the connection is there when there
    are some again.
    """
    guest = make()
    server = listen(guest, 8080)
    listener = world.listen(AF[family])
    guest.drv.forward(listener.socket, 8080)
    peers = [guest.with_host(world.connect(AF[family], listener.port)) for _ in range(3)]
    with no_descriptors(world):
        guest.drv.settle()
        assert not server and not guest.drv.flow_indexes()
        assert guest.drv.breaths_in(1.2) <= 8, "it spins"
        assert not server and not guest.drv.flow_indexes()
    guest.pump(lambda: len(server) == 3, 2, "the connections")
    guest.pump(lambda: all(tcp.state == "established" for tcp in server), 2, "their set-up")
    by_port = {peer.socket.getsockname()[1]: peer for peer in peers}
    for tcp in server:
        exchange(guest, tcp, by_port[tcp.rport], b"late", b"but here")
    listener.close()


# --- receive rings --------------------------------------------------------------------------------


def many_pieces(guest: Guest, pieces: int) -> None:
    """From now on the receive buffers of pair 0 are of one-byte descriptors, this many each."""
    drv = guest.drv
    drv.stop_ring(0)
    ring = drv.rx(0).ring
    ring.reset()

    def post(pair: int, **how: Any) -> None:
        while len(ring.chains) < 80:
            ring.add(ring.scatter(ring.free[0], (1,) * pieces, True), indirect=True)
        drv.publish(drv.rx(0))

    drv.fill = post  # type: ignore[method-assign, assignment]
    post(0)
    drv.start_ring(drv.rx(0))


@families
@pytest.mark.parametrize("pieces", [400, 1000])
def test_receive_chains_of_many_pieces(make: Make, world: World, pieces: int, family: int) -> None:
    """Mergeable buffers of hundreds of descriptors: a batch has room for a few of them only. A
    frame no batch can hold is dropped and counted; a stream comes in frames that fit.
    """
    guest = make(features=ALL | GUEST_TSO4 | GUEST_TSO6, num=1024)
    tcp, peer = established(guest, world, family)
    many_pieces(guest, pieces)
    gateway = guest.addresses(family)[1]
    for number, size in enumerate((0, 1, pieces, 800)):
        guest.ping(gateway, 9, number, random_bytes(size))
        assert guest.next_icmp({0, 129})[1].body[4:] == random_bytes(size)
    guest.ping(gateway, 9, 10, bytes(60_000))
    guest.drv.settle()
    assert guest.drv.drops("rx_full", 0) == 1, "the frame no batch can hold"
    stream = random_bytes(50_000)
    peer.send(stream)
    guest.pump(lambda: len(tcp.received) >= len(stream), 20, "the stream at the guest")
    assert tcp.received == stream
    tcp.check()


@families
@pytest.mark.parametrize("pieces", [400, 1000])
def test_datagrams_into_chains_of_many_pieces(
    make: Make, world: World, pieces: int, family: int
) -> None:
    """The same for datagrams, which are received straight into the buffers."""
    guest = make(features=ALL, num=1024)
    host = guest.with_host(world.udp(AF[family]))
    guest.send_udp(guest.addresses(family)[1], 5000, host.port, b"?")
    client = guest.pump(lambda: host.inbox, what="the datagram at the host").popleft()[1]
    many_pieces(guest, pieces)
    for size in (0, 1, pieces, 800):
        host.send(random_bytes(size), client)
        assert guest.next_udp(1)[1].payload == random_bytes(size)
    host.send(bytes(60_000), client)
    guest.drv.settle()
    assert guest.drv.drops("rx_full", 0) == 1, "the datagram no batch can hold"
    host.send(b"next", client)
    assert guest.next_udp(1)[1].payload == b"next"


def test_a_broken_receive_ring_is_reported_once(make: Make, world: World) -> None:
    """An available index no driver can have: the ring stops, its error descriptor and the breath
    say so, and the datagrams that wait do not bring it up again.
    """
    guest = make(pairs=2, features=ALL)
    host = guest.with_host(world.udp(socket.AF_INET))
    guest.send_udp(guest.gw4, 5000, host.port, b"?")
    client = guest.pump(lambda: host.inbox, what="the datagram at the host").popleft()[1]
    drv = guest.drv
    guest.serving = [1]
    drv.rx(0).ring.set_avail_idx(drv.rx(0).ring.next_avail + 1000)
    for _ in range(3):
        host.send(b"lost?", client)
    time.sleep(0.01)
    assert drv.breathe() & ATTEND_BROKEN
    for _ in range(5):
        assert not drv.breathe() & ATTEND_BROKEN
    assert drv.queue_counter(0, "errors") == 1
    assert drain(drv.rx(0).err) == 1
    guest.send_udp(guest.gw4, 5001, host.port, b"!", pair=1)
    client = guest.pump(lambda: host.inbox, what="a datagram by the other pair").popleft()[1]
    host.send(b"answer", client)
    assert guest.next_udp()[1].payload == b"answer"


@pytest.mark.parametrize("stops", [True, False], ids=["stops", "is-disabled"])
def test_flows_look_for_another_queue_when_theirs(make: Make, world: World, stops: bool) -> None:
    """Data waits for buffers of a ring that goes away: the worker does not sleep on it."""
    guest = make(pairs=2, num=16, features=ALL)
    tcp, peer = established(guest, world, 4)
    drv = guest.drv
    drv.refill = False
    stream = random_bytes(60_000)
    peer.send(stream)
    guest.pump(lambda: not drv.rx(0).ring.chains, what="the ring to run dry")
    assert not peer.outbox
    drv.breaths_in(1.2)  # timers of before are over
    if stops:
        drv.block["rx_enabled"] = 2
        drv.stop_ring(0)
    else:
        drv.enable_pairs([1])
    drv.refill = True
    start = time.monotonic()
    drv.breathe(0, 3000)
    assert time.monotonic() - start < 1.5, "it slept although data could go"
    guest.pump(lambda: len(tcp.received) >= len(stream), 10, "the rest by the other queue")
    assert tcp.received == stream
    tcp.check()


# --- two workers ----------------------------------------------------------------------------------


def test_room_made_while_the_producer_falls_asleep(make: Make, world: World) -> None:
    """The hand-off ring was full; the consumer makes room after the producer has looked and before
    it sleeps: the producer must be woken nevertheless.
    """
    guest = make(pairs=2, workers=2, num=16, features=ALL)
    drv, flows, each = guest.drv, 14, 80
    host = guest.with_host(world.udp(socket.AF_INET))
    for port in range(6000, 6000 + flows):
        guest.send_udp(guest.gw4, port, host.port, b"at home in the first", pair=0)
    guest.pump(lambda: len(host.inbox) == flows, what="the datagrams at the host")
    clients = [client for _, client in host.inbox]
    drv.keep_home()
    for port in range(6000, 6000 + flows):
        guest.send_udp(guest.gw4, port, host.port, b"answers to the second", pair=1)
    drv.settle()
    assert {(flow["home"], flow["tx_queue"]) for flow in drv.flows()} == {(0, 1)}
    drv.refill = False
    for number in range(each):
        for client in clients:
            host.send(struct.pack(">I", number) + bytes(1400), client)
    drv.settle()
    assert drv.counter("stalled", 0) and not drv.counter("sleeping", 0)
    had = drv.counter("handoff_frames", 0)
    drv.refill = True
    for _ in range(20):
        drv.poll(1)
        drv.fill(1)
        drv.breathe(1)
    for _ in range(5):
        drv.breathe(0)
    assert drv.counter("handoff_frames", 0) > had, "the producer was not told"
    guest.pump(lambda: len(guest.udp) == flows * each, 10, "all datagrams")
    for port in range(6000, 6000 + flows):
        numbers = [struct.unpack_from(">I", p.payload)[0] for _, p in guest.udp if p.dport == port]
        assert numbers == list(range(each))


def test_a_timer_ends_a_rest(make: Make, world: World) -> None:
    """Control has stopped looking: it is told before what is due is begun."""
    guest = make()
    host = guest.with_host(world.udp(socket.AF_INET))
    guest.send_udp(guest.gw4, 6000, host.port, b"x")
    guest.drv.settle()
    guest.drv.block["rests"] += 1
    (index,) = guest.drv.flow_indexes()
    flow, wheel = guest.drv.flow(index), guest.drv.workers[0].context.view["wheel"]
    EXPIRY.arm(wheel, index, flow["deadline_ms"])  # compiled before the clock is looked at
    flow["deadline_ms"] = time.monotonic_ns() // 1_000_000 + 60
    EXPIRY.arm(wheel, index, flow["deadline_ms"])
    assert guest.drv.breathe(0, 500) & ATTEND_AWAKE and guest.drv.flow_indexes()
    assert not guest.drv.breathe(0, 500) & ATTEND_AWAKE and not guest.drv.flow_indexes()


def test_a_worker_settles_only_its_own(make: Make, world: World) -> None:
    """A flow that ended within a breath, its entry taken by another worker in the same moment: the
    list of the first still names it.
    """
    guest = make(pairs=2, workers=2, features=ALL)
    tcp, peer = established(guest, world, 4, pair=1)
    drv = guest.drv
    drv.settle()
    (index,) = drv.flow_indexes()
    assert drv.flow(index)["home"] == 1
    peer.send(b"for the second worker")
    first, second = (worker.context for worker in drv.workers)
    drv.flow(index)["flags"] |= DIRTY
    struct.pack_into("<I", second.scratch("dirty"), 0, index)
    second.view["dirty_count"] = 1
    drv.flow(index)["flags"] |= READABLE
    struct.pack_into("<I", first.scratch("dirty"), 0, index)
    first.view["dirty_count"] = 1
    drv.breathe(0)
    assert first.view["dirty_count"] == 0
    assert drv.flow(index)["flags"] & DIRTY, "settled by a worker it does not belong to"
    assert drv.counter("handoff_frames", 0) == 0
    guest.pump(lambda: tcp.received == b"for the second worker", 1, "the data")
    tcp.check()


def test_a_worker_reads_error_queues_only_of_its_own(make: Make, world: World) -> None:
    """The same for the list of sockets with errors to read."""
    guest = make(pairs=2, workers=2, features=ALL)
    gone = world.udp(socket.AF_INET)
    gone.close()
    guest.send_udp(guest.gw4, 6000, gone.port, b"anybody?", pair=1)
    drv = guest.drv
    drv.breathe(1)
    (index,) = drv.flow_indexes()
    first = drv.workers[0].context
    struct.pack_into("<I", first.scratch("errors"), 0, index)
    first.view["error_count"] = 1
    world.run(drv.workers[0].attend, ATTEND_ERRORS)
    first.view["error_count"] = 0
    assert not drv.counter("handoff_frames", 0), "it read the error of another worker's socket"
    came_on, packet = guest.pump(lambda: guest.icmp, what="port unreachable").popleft()
    assert (came_on, packet.type, packet.code) == (1, 3, 3)


# --- small buffers --------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("sndbuf", [4608, 9216, 34_000, 250_000])
def test_small_send_buffer_and_a_reader_that_stops(
    make: Make, world: World, family: int, sndbuf: int
) -> None:
    """A stream into a host socket of little buffer whose peer reads nothing: the worker sleeps, and
    goes on when the peer reads.
    """
    guest = make(features=ALL)
    tcp, peer = established(guest, world, family, rcvbuf=4096)
    shrink(guest, sndbuf)
    stuff(guest, tcp, peer)


def stuff(guest: Guest, tcp: Tcp, peer: Peer) -> None:
    """Send a stream to a peer that does not read, see that the worker sleeps; then it reads."""
    peer.reading = False
    stream = random_bytes(600_000)
    tcp.send(stream)
    guest.pump(timeout=0.5)
    assert tcp.una - 1 < 500_000, "all of it was taken"
    breaths = guest.drv.breaths_in(0.5)
    assert breaths < 60, f"{breaths} breaths in half a second in which nothing can move"
    peer.reading = True
    guest.pump(lambda: len(peer.inbox) >= len(stream), 30, f"the rest of the stream: {tcp}")
    assert peer.inbox == stream
    tcp.check()


@families
@pytest.mark.parametrize("sndbuf", [4608, 9216, 20_000, 30_000])
def test_a_send_buffer_that_was_always_small(family: int, sndbuf: int) -> None:
    """The same where net.ipv4.tcp_wmem leaves no more: even the empty buffer is less than what a
    segment needs, the kernel calls it writable, and still the worker must neither spin nor stall.
    """
    world = World(uplink=False)
    try:
        if not world.isolated:
            pytest.skip("needs root to make a network namespace")
        sizes = f"{sndbuf} {sndbuf} {sndbuf}"
        world.run(Path("/proc/sys/net/ipv4/tcp_wmem").write_text, sizes)
        guest = local_guest(world, features=ALL)
        stuff(guest, *established(guest, world, family, rcvbuf=4096))
        guest.drv.close()
    finally:
        world.close()
