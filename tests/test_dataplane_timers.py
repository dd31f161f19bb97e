"""Minutes and hours: when flows are forgotten, peers probed, and connections given up.

Nothing waits here: `Local.elapse` moves what the flow table remembers into the past, from one timer
to the next, and between two of them the guest answers, or does not.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from typing import Any

import pytest
from guest import Guest, random_bytes
from minitcp import Tcp, established, exchange, listen
from packets import ACK, FIN, RST, SYN, Packet
from world import Datagrams, World, loopback

from control.listeners import bind_all, close_all
from flows.forward import Port

AF = {4: socket.AF_INET, 6: socket.AF_INET6}
families = pytest.mark.parametrize("family", [4, 6])
ONEWAY_S, STREAM_S = 30, 120
KEEPALIVE_S, IDLE_S = 300, 7200
MINUTE, HOUR = 60, 3600


@pytest.fixture
def guest(make_local: Callable[..., Guest]) -> Guest:
    """A guest on a worker in this process; datagram flows live 30 and 120 s."""
    made = make_local()
    made.drv.net["udp_oneway_s"], made.drv.net["udp_stream_s"] = ONEWAY_S, STREAM_S
    return made


def wait(guest: Guest, seconds: float) -> None:
    """Let time pass; the guest does whatever it does."""
    guest.drv.elapse(seconds, lambda: guest.pump(timeout=0.01))


def flows(guest: Guest) -> int:
    return len(guest.drv.flow_indexes())


# --- datagrams ------------------------------------------------------------------------------------


@pytest.fixture
def server(guest: Guest, world: World, family: int) -> Datagrams:
    return guest.with_host(world.udp(AF[family]))


def ask(guest: Guest, server: Datagrams, family: int, port: int = 5000) -> tuple:
    """A datagram to the server; the address it came from."""
    guest.send_udp(guest.addresses(family)[1], port, server.port, b"?")
    guest.pump(lambda: server.inbox, what="the datagram at the host")
    return server.inbox.popleft()[1]


def answer(guest: Guest, server: Datagrams, client: tuple) -> None:
    server.send(b"!", client)
    assert guest.next_udp()[1].payload == b"!"


def descriptors() -> set[str]:
    """What this process has open; sockets by their number."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one of the listing itself
            found.add(os.readlink(f"/proc/self/fd/{name}"))
    return found


@families
def test_datagrams_without_an_answer(guest: Guest, server: Datagrams, family: int) -> None:
    """The flow lives 30 s after the last one, however many there were, and its socket no longer."""
    first = ask(guest, server, family)
    (flow,) = guest.drv.flows()
    held = os.readlink(f"/proc/self/fd/{flow['fd']}")
    assert held in descriptors()
    for _ in range(3):
        wait(guest, ONEWAY_S - 2)
        assert ask(guest, server, family) == first, "another flow"
    wait(guest, ONEWAY_S - 2)
    assert flows(guest) == 1
    wait(guest, 4)
    assert flows(guest) == 0
    assert held not in descriptors()
    server.send(b"too late", first)
    guest.expect_silence(0.1, "an answer to a flow that was forgotten")
    assert ask(guest, server, family) != first
    assert flows(guest) == 1


@families
def test_datagrams_both_ways(guest: Guest, server: Datagrams, family: int) -> None:
    """Once there was an answer, 120 s after the last datagram of either side."""
    client = ask(guest, server, family)
    answer(guest, server, client)
    wait(guest, STREAM_S - 3)
    assert ask(guest, server, family) == client
    wait(guest, STREAM_S - 3)
    answer(guest, server, client)
    wait(guest, STREAM_S - 3)
    assert flows(guest) == 1
    answer(guest, server, client)
    wait(guest, STREAM_S + 1)
    assert flows(guest) == 0


@families
def test_an_answer_counts_even_when_empty(guest: Guest, server: Datagrams, family: int) -> None:
    client = ask(guest, server, family)
    server.send(b"", client)
    guest.next_udp()
    wait(guest, ONEWAY_S + 10)
    assert flows(guest) == 1


@families
def test_a_question_counts_even_when_empty(guest: Guest, server: Datagrams, family: int) -> None:
    guest.send_udp(guest.addresses(family)[1], 5000, server.port, b"")
    guest.pump(lambda: server.inbox, what="the empty datagram at the host")
    answer(guest, server, server.inbox.popleft()[1])
    wait(guest, ONEWAY_S + 10)
    assert flows(guest) == 1


@families
def test_flows_expire_one_by_one(guest: Guest, server: Datagrams, family: int) -> None:
    """Of three flows the one without an answer goes first, the others when their time has come."""
    clients = [ask(guest, server, family, port) for port in (5000, 5001, 5002)]
    answer(guest, server, clients[1])
    wait(guest, 20)
    answer(guest, server, clients[2])
    assert flows(guest) == 3
    for seconds, left in ((20, 2), (75, 2), (10, 1), (10, 1), (10, 0)):
        wait(guest, seconds)
        assert flows(guest) == left


@families
def test_clients_of_a_forwarded_port(guest: Guest, world: World, family: int) -> None:
    """A client nobody answers is forgotten after 30 s, one that got an answer after 120 s."""
    number = world.port()
    bound = world.run(bind_all, [Port("udp", None, None, number, number, None, False)], 1)
    (socket_,) = bound[0].sockets
    guest.drv.forward(socket_, 5353, "udp")
    silent, served = (guest.with_host(world.udp(AF[family])) for _ in range(2))
    for client, knock in ((silent, b"knock"), (served, b"")):
        client.send(knock, (loopback(AF[family]), number))
        assert guest.next_udp()[1].sport == client.port
    guest.send_udp(guest.addresses(family)[1], 5353, served.port, b"who is there?")
    guest.pump(lambda: served.inbox, what="the answer at the client")
    assert flows(guest) == 2
    wait(guest, ONEWAY_S + 1)
    (left,) = guest.drv.flows()
    assert left["far_port"] == served.port
    wait(guest, STREAM_S - ONEWAY_S)
    assert flows(guest) == 0
    close_all(bound)


@families
def test_pings(guest: Guest, family: int) -> None:
    """Echo series are forgotten, too."""
    guest.ping(guest.addresses(family)[1], 7, 1, b"ping")
    guest.next_icmp({0, 129})
    assert flows(guest) == 1
    wait(guest, STREAM_S + 1)
    assert flows(guest) == 0


# --- idle connections -----------------------------------------------------------------------------


def probes(tcp: Tcp) -> list[Packet]:
    """The keepalive probes received: nothing, one byte before what comes next (RFC 9293 3.8.4)."""
    before = (tcp.irs + tcp.rcv_nxt - 1) % (1 << 32)
    return [p for p in tcp.segments if p.seq == before and not p.payload and p.flags == ACK]


@families
def test_an_idle_guest_is_probed_and_stays(guest: Guest, world: World, family: int) -> None:
    """A probe after 300 s of silence and not before; a guest that answers keeps its connection."""
    tcp, peer = established(guest, world, family)
    exchange(guest, tcp, peer, b"up", b"down")
    guest.drv.settle()
    tcp.segments.clear()
    wait(guest, KEEPALIVE_S - 5)
    assert not tcp.segments
    wait(guest, 6)
    assert len(tcp.segments) == len(probes(tcp)) == 1
    wait(guest, 3 * HOUR)
    assert len(tcp.segments) == len(probes(tcp))
    assert 30 <= len(probes(tcp)) <= 37
    assert tcp.state == "established"
    exchange(guest, tcp, peer, b"still", b"here")
    assert peer.inbox == b"upstill" and tcp.received == b"downhere"


@families
def test_traffic_puts_the_probe_off(guest: Guest, world: World, family: int) -> None:
    tcp, peer = established(guest, world, family)
    tcp.segments.clear()
    for _ in range(4):
        wait(guest, KEEPALIVE_S - 20)
        exchange(guest, tcp, peer, b"", b"tick")
    assert not probes(tcp)


@families
def test_a_guest_that_is_gone(guest: Guest, world: World, family: int) -> None:
    """No answer to any probe for two hours: both sides are told, nothing is left."""
    tcp, peer = established(guest, world, family)
    exchange(guest, tcp, peer, b"up", b"down")
    guest.drv.settle()
    tcp.auto_ack = False
    tcp.segments.clear()
    wait(guest, IDLE_S - KEEPALIVE_S)
    assert tcp.state == "established" and peer.error is None
    assert 20 <= len(probes(tcp)) <= 23
    wait(guest, KEEPALIVE_S + 10)
    assert tcp.state == "reset" and flows(guest) == 0
    guest.pump(lambda: peer.error, 1, "the reset at the host")
    assert isinstance(peer.error, ConnectionResetError)
    tcp.check()


@families
def test_half_closed_connections_are_probed(guest: Guest, world: World, family: int) -> None:
    """The guest has finished, the host has not: a guest that vanished must be found out."""
    tcp, peer = established(guest, world, family)
    tcp.close()
    guest.pump(lambda: peer.eof, what="the end at the host")
    guest.drv.settle()
    tcp.segments.clear()
    wait(guest, KEEPALIVE_S + 5)
    assert len(probes(tcp)) == 1
    tcp.auto_ack = False
    wait(guest, IDLE_S + KEEPALIVE_S)
    assert flows(guest) == 0


# --- no acknowledgement ---------------------------------------------------------------------------


@families
def test_a_closed_window_that_answers(guest: Guest, world: World, family: int) -> None:
    """The guest's application does not read for two hours, but its kernel answers every probe: the
    connection stays however long it takes (RFC 9293 3.8.6.1), and goes on.
    """
    tcp, peer = established(guest, world, family, window=20_000, wscale=0)
    tcp.autoread = False
    stream = random_bytes(50_000)
    peer.send(stream)
    guest.pump(lambda: len(tcp.inbox) == 20_000, what="a full window")
    guest.pump(timeout=0.05)
    tcp.segments.clear()
    wait(guest, 2 * HOUR)
    assert tcp.state == "established" and peer.error is None
    assert len(tcp.inbox) == 20_000 and all(len(p.payload) <= 1 for p in tcp.segments)
    assert 2 * HOUR / 130 <= len(tcp.segments) <= 200
    tcp.read()
    tcp.autoread = True
    tcp.send_ack()
    guest.pump(lambda: len(tcp.received) == len(stream), 5, f"the rest: {tcp}")
    assert tcp.received == stream
    tcp.check()


@families
def test_a_closed_window_that_does_not_answer(guest: Guest, world: World, family: int) -> None:
    """Without an answer to its probes the connection ends within minutes."""
    tcp, peer = established(guest, world, family, window=20_000, wscale=0)
    tcp.autoread = False
    peer.send(random_bytes(50_000))
    guest.pump(lambda: len(tcp.inbox) == 20_000, what="a full window")
    guest.pump(timeout=0.05)
    tcp.auto_ack = False
    wait(guest, MINUTE)
    assert tcp.state == "established"
    wait(guest, 10 * MINUTE)
    assert tcp.state == "reset" and flows(guest) == 0
    guest.pump(lambda: peer.error, 1, "the reset at the host")


@families
@pytest.mark.parametrize("fin", [False, True])
def test_data_nobody_acknowledges(guest: Guest, world: World, family: int, fin: bool) -> None:
    """Sent again at growing intervals, seven times, then given up on both sides; the FIN alike."""
    tcp, peer = established(guest, world, family)
    guest.drv.settle()
    tcp.auto_ack = False
    tcp.segments.clear()
    if fin:
        peer.shutdown()
    else:
        peer.send(b"anybody?")
    guest.drv.settle()
    wait(guest, 10 * MINUTE)
    sent = [p for p in tcp.segments if p.payload == b"anybody?" or p.flags & FIN]
    assert len({(p.seq, p.payload) for p in sent}) == 1
    assert len(sent) == 1 + 7
    assert tcp.segments[-1].flags & RST and tcp.state == "reset" and flows(guest) == 0
    if not fin:
        guest.pump(lambda: peer.error, 1, "the reset at the host")
    tcp.check()


@families
def test_a_guest_that_answers_again_in_time(guest: Guest, world: World, family: int) -> None:
    """Silent for a minute, then back: what was sent again meanwhile is only repeated."""
    tcp, peer = established(guest, world, family)
    tcp.auto_ack = False
    peer.send(random_bytes(5000))
    wait(guest, MINUTE)
    tcp.auto_ack = True
    wait(guest, MINUTE)
    exchange(guest, tcp, peer, b"", b"again")
    assert tcp.received == random_bytes(5000) + b"again"
    assert tcp.repeated


@families
def test_a_guest_that_takes_no_connections(guest: Guest, world: World, family: int) -> None:
    """A SYN nobody answers is repeated five times, then the client is reset."""
    syns: list[Packet] = []

    def note(packet: Packet, pair: int) -> None:
        syns.append(packet)

    guest.listeners[8080] = note
    listener = world.listen(AF[family])
    guest.drv.forward(listener.socket, 8080)
    client = guest.with_host(world.connect(AF[family], listener.port))
    guest.pump(lambda: syns, what="a SYN")
    wait(guest, 5 * MINUTE)
    assert {(p.seq, p.flags & SYN) for p in syns} == {(syns[0].seq, SYN)} and len(syns) == 1 + 5
    assert flows(guest) == 0
    guest.pump(lambda: client.error, 1, "the reset at the client")
    listener.close()


@families
def test_connections_wait_for_receive_buffers(guest: Guest, world: World, family: int) -> None:
    """SYN of one and SYN,ACK of another found none, again and again: they go with the first buffers
    there are, once, and at no timer's moment."""
    accepted = listen(guest, 8080)
    inner, outer = world.listen(AF[family]), guest.with_host(world.listen(AF[family]))
    guest.drv.forward(inner.socket, 8080)
    queue = guest.drv.rx(0)
    guest.drv.refill = False
    guest.drv.stop_ring(0)
    queue.ring.reset(queue.ring.base)
    guest.drv.start_ring(queue)
    tcp = Tcp(guest, guest.addresses(family)[1], outer.port)
    tcp.retransmit = False
    tcp.open()
    guest.with_host(world.connect(AF[family], inner.port))
    guest.pump(lambda: flows(guest) == 2, what="both flows")
    wait(guest, 4)  # they are due after 1 s, 2 s and 4 s more
    guest.drv.refill = True
    guest.drv.fill(0)
    wait(guest, 0)
    assert [one.state for one in (tcp, *accepted)] == 2 * ["established"]
    assert [len(one.segments) for one in (tcp, *accepted)] == [1, 2], "SYN,ACK; SYN and ACK"
    inner.close()


@families
def test_connections_wait_for_a_slow_guest(guest: Guest, world: World, family: int) -> None:
    """The answer to the fourth SYN is still in time."""
    accept = listen(guest, 8080)
    answer_it = guest.listeners[8080]
    syns: list[Any] = []

    def late(packet: Packet, pair: int) -> None:
        syns.append(packet)
        if len(syns) == 4:
            answer_it(packet, pair)

    guest.listeners[8080] = late
    listener = world.listen(AF[family])
    guest.drv.forward(listener.socket, 8080)
    client = guest.with_host(world.connect(AF[family], listener.port))
    guest.pump(lambda: syns, what="a SYN")
    wait(guest, MINUTE)
    assert len(syns) == 4
    exchange(guest, accept[0], client, b"late", b"but here")
    listener.close()
