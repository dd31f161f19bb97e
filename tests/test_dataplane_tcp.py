"""TCP between the guest and the host, seen from the guest's wire: data, ends, refusals, and every
kind of loss.

The guest's side is `minitcp`, which judges each segment it is given (window, MSS,
acknowledgements, repeated bytes); `Tcp.check` at the end of a test brings up what it found.
"""

from __future__ import annotations

import errno
import itertools
import random
import socket
import time
from collections.abc import Callable, Iterator

import packets as pk
import pytest
from backend import Backend
from driver import BASIC, EVENT_IDX, GUEST_CSUM, INDIRECT_DESC
from formats import both_formats
from guest import Guest, random_bytes
from minitcp import Tcp, established, exchange, listen
from packets import ACK, FIN, PSH, RST, SYN
from vring import Layout
from world import FAR4, FAR6, Peer, World

PORT, MAPPED, MAPPED_TO = 15001, 15002, 80
ARGS = ("-t", str(PORT), "-t", f"{MAPPED}:{MAPPED_TO}")
AF = {4: socket.AF_INET, 6: socket.AF_INET6}
families = pytest.mark.parametrize("family", [4, 6])


def random_sizes(seed: int, most: int) -> Iterator[int]:
    rng = random.Random(seed)
    while True:
        yield rng.choice((1, 2, 3, rng.randint(1, 100), rng.randint(1, most), most))


@families
@pytest.mark.parametrize("seed", [1, 2])
@both_formats
def test_random_segments(guest: Guest, world: World, family: int, seed: int) -> None:
    """Segments of any length, both ways at once."""
    tcp, peer = established(guest, world, family)
    tcp.sizes = random_sizes(seed, 1460)
    exchange(guest, tcp, peer, random_bytes(600_000, seed), random_bytes(600_000, seed + 10))


@families
@both_formats
def test_bulk(guest: Guest, world: World, family: int) -> None:
    """Four MiB each way in the largest segments."""
    tcp, peer = established(guest, world, family)
    exchange(guest, tcp, peer, random_bytes(4 << 20, 1), b"")
    exchange(guest, tcp, peer, b"", random_bytes(4 << 20, 2))


@pytest.mark.passt_defect("takes an L4 packet in several descriptors for several packets")
@families
@pytest.mark.parametrize("indirect", [False, True])
@both_formats
def test_random_layouts(
    make_guest: Callable[..., Guest], world: World, family: int, indirect: bool
) -> None:
    """Segments of any length in descriptors of any length."""
    guest = make_guest(features=BASIC | GUEST_CSUM | EVENT_IDX | INDIRECT_DESC, borders=2)
    rng = random.Random(family)
    guest.layouts = (
        Layout(
            tuple(rng.choice((1, 1, 3, rng.randint(1, 60))) for _ in range(rng.randint(0, 25))),
            indirect and rng.random() < 0.7,
            rng.choice((None, None, None, 0, 1)),
            rng.randint(1, 66),
        )
        for _ in itertools.count()
    )
    tcp, peer = established(guest, world, family)
    tcp.sizes = random_sizes(3, 1460)
    exchange(guest, tcp, peer, random_bytes(150_000), random_bytes(150_000))


@families
def test_small_mss(guest: Guest, world: World, family: int) -> None:
    """A guest with an MSS of 536: no segment, and no GSO unit, is longer (`Tcp` sees to it)."""
    tcp, peer = established(guest, world, family, mss=536)
    exchange(guest, tcp, peer, b"", random_bytes(200_000))


@pytest.mark.passt_defect("answers with a window scale option all the same")
@families
def test_without_window_scaling(guest: Guest, world: World, family: int) -> None:
    """A SYN without the option: windows are 16 bits wide both ways, and the SYN,ACK must not carry
    one either.
    """
    tcp = _unscaled(guest, world, family)
    peer = guest.peers[-1]
    assert isinstance(peer, Peer)
    exchange(guest, tcp, peer, random_bytes(300_000, 1), random_bytes(300_000, 2))


def _unscaled(guest: Guest, world: World, family: int) -> Tcp:
    listener = world.listen(AF[family])
    tcp = Tcp(guest, guest.addresses(family)[1], listener.port, wscale=0, window=60_000)
    tcp.state, tcp.nxt = "syn-sent", 1
    tcp.segment(0, flags=SYN, window=60_000)
    guest.pump(lambda: tcp.state == "established", what="the SYN,ACK")
    assert tcp.segments[0].wscale is None, "a window scale nobody asked for (RFC 7323 2.2)"
    listener.step()
    guest.with_host(listener.accepted.pop())
    listener.close()
    return tcp


# --- ends ---------------------------------------------------------------------------------------


@families
def test_guest_closes_first(guest: Guest, world: World, family: int) -> None:
    """Half close by the guest: the host sees the end, goes on sending, and ends later."""
    tcp, peer = established(guest, world, family)
    tcp.send(b"last words")
    tcp.close()
    guest.pump(lambda: peer.eof, what="the end at the host")
    assert peer.inbox == b"last words"
    guest.pump(lambda: tcp.all_acked, what="an acknowledgement of the FIN")
    down = random_bytes(300_000)
    peer.send(down)
    guest.pump(lambda: len(tcp.received) == len(down), what="data after the guest's FIN")
    assert not tcp.eof
    peer.shutdown()
    guest.pump(lambda: tcp.eof, what="the host's FIN")
    assert tcp.received == down
    tcp.check()


@families
def test_host_closes_first(guest: Guest, world: World, family: int) -> None:
    tcp, peer = established(guest, world, family)
    peer.send(b"last words")
    peer.shutdown()
    guest.pump(lambda: tcp.eof, what="the host's FIN")
    assert tcp.received == b"last words"
    up = random_bytes(300_000)
    tcp.send(up)
    guest.pump(lambda: len(peer.inbox) == len(up), what="data after the host's FIN")
    tcp.close()
    guest.pump(lambda: peer.eof and tcp.all_acked, what="the guest's FIN")
    assert peer.inbox == up
    tcp.check()


@families
def test_fin_with_data(guest: Guest, world: World, family: int) -> None:
    """One segment with the last bytes and the FIN."""
    tcp, peer = established(guest, world, family)
    tcp.fin_at, tcp.nxt = 6, 7
    tcp.out += b"adieu"
    tcp.segment(1, b"adieu", FIN | PSH | ACK)
    guest.pump(lambda: peer.eof, what="the end at the host")
    assert peer.inbox == b"adieu"
    guest.pump(lambda: tcp.all_acked, what="an acknowledgement of data and FIN")
    tcp.check()


@families
def test_fin_is_sent_again(guest: Guest, world: World, family: int) -> None:
    """The guest loses the host's FIN twice: it comes again, at the same place."""
    tcp, peer = established(guest, world, family)
    lost = itertools.count()
    tcp.lose_rx = lambda packet: bool(packet.flags & FIN) and next(lost) < 2
    peer.send(b"the end")
    peer.shutdown()
    guest.pump(lambda: tcp.eof, 8, "the FIN again")
    assert tcp.received == b"the end"
    tcp.check()


@families
def test_guest_resets(guest: Guest, world: World, family: int) -> None:
    """A RST from the guest is a RST at the host, not an end of file."""
    tcp, peer = established(guest, world, family)
    tcp.send(b"x")
    guest.pump(lambda: peer.inbox, what="data")
    tcp.abort()
    guest.pump(lambda: peer.error or peer.eof, what="the reset at the host")
    assert peer.error is not None and peer.error.errno == errno.ECONNRESET


@families
def test_host_resets(guest: Guest, world: World, family: int) -> None:
    tcp, peer = established(guest, world, family)
    tcp.send(b"x")
    guest.pump(lambda: peer.inbox and tcp.all_acked, what="data")
    peer.reset()
    guest.pump(lambda: tcp.state == "reset", what="the reset at the guest")
    tcp.check()


@pytest.mark.passt_defect("takes any RST")
@families
def test_reset_outside_the_window_is_ignored(guest: Guest, world: World, family: int) -> None:
    """A blind RST does not end a connection (RFC 9293 3.10.7.4)."""
    tcp, peer = established(guest, world, family)
    tcp.segment(tcp.nxt + (1 << 30), flags=RST)
    tcp.segment(tcp.nxt - 100_000, flags=RST)
    exchange(guest, tcp, peer, b"still", b"here")


@families
def test_refused(guest: Guest, world: World, family: int) -> None:
    """Nobody listens on the host: RST in answer to the SYN."""
    closed = world.listen(AF[family])
    closed.close()
    tcp = Tcp(guest, guest.addresses(family)[1], closed.port).open()
    guest.pump(lambda: tcp.state != "syn-sent", what="an answer to the SYN")
    assert tcp.state == "refused"
    tcp.check()


@families
@pytest.mark.parametrize(
    ("flags", "size", "answer"),
    [
        (ACK, 0, RST),
        (ACK | PSH, 10, RST),
        (FIN | ACK, 0, RST),
        (0, 10, RST | ACK),
        pytest.param(FIN, 0, RST | ACK, marks=pytest.mark.passt_defect("a FIN has length 1")),
        (RST, 0, 0),
        (RST | ACK, 0, 0),
    ],
)
def test_unknown_connection(
    guest: Guest, world: World, family: int, flags: int, size: int, answer: int
) -> None:
    """A segment of no connection is answered as RFC 9293 3.10.7.1 says, a RST never."""
    own, gateway = guest.addresses(family)
    port = guest.port()
    seen: list[pk.Packet] = []
    ports = 9, port  # others may still get the FIN of connections that a guest before left
    guest.on_packet = lambda p, pair: seen.append(p) if (p.sport, p.dport) == ports else None
    body = pk.tcp(own, gateway, port, 9, seq=1000, ack=777, flags=flags, payload=bytes(size))
    guest.send_ip(pk.ip_packet(own, gateway, pk.TCP, body))
    if not answer:
        guest.pump(timeout=0.15)
        assert not seen, f"a RST was answered: {seen[0]}"
        return
    guest.pump(lambda: seen, what="a RST")
    assert seen[0].flags == answer
    if answer & ACK:
        assert (seen[0].seq, seen[0].ack) == (0, 1000 + size + bool(flags & FIN))
    else:
        assert seen[0].seq == 777


def finish(guest: Guest, tcp: Tcp, peer: Peer) -> None:
    """The host closes, then the guest."""
    peer.shutdown()
    guest.pump(lambda: tcp.eof, what="the host's FIN")
    tcp.close()
    guest.pump(lambda: peer.eof and tcp.all_acked, what="the guest's FIN")
    peer.close()


@families
def test_port_is_used_again(guest: Guest, world: World, family: int) -> None:
    """The same four-tuple, closed by the guest and opened again at once, ten times."""
    listener = guest.with_host(world.listen(AF[family]))
    lport, iss = guest.port(), 1000
    for round_number in range(10):
        tcp = Tcp(guest, guest.addresses(family)[1], listener.port, lport=lport, iss=iss).connect()
        guest.pump(lambda: listener.accepted, what="the connection at the host")
        peer = guest.with_host(listener.accepted.pop())
        exchange(guest, tcp, peer, b"%d" % round_number, b"yes")
        finish(guest, tcp, peer)
        iss += 1_000_000


# --- connections from the host ------------------------------------------------------------------


@families
@pytest.mark.parametrize(("port", "inside"), [(PORT, PORT), (MAPPED, MAPPED_TO)])
def test_forwarded_port(guest: Guest, world: World, family: int, port: int, inside: int) -> None:
    """-t: the guest is connected to by its gateway, on the port the rule says."""
    own, gateway = guest.addresses(family)
    accepted = listen(guest, inside)
    peer = guest.with_host(world.connect(AF[family], port))
    guest.pump(lambda: accepted and accepted[0].state == "established", what="a connection")
    tcp = accepted[0]
    assert (tcp.laddr, tcp.raddr) == (own, gateway)
    exchange(guest, tcp, peer, random_bytes(200_000, 1), random_bytes(200_000, 2))
    tcp.close()
    peer.shutdown()
    guest.pump(lambda: tcp.eof and peer.eof, what="both ends")
    tcp.check()


def test_forwarded_port_of_a_guest_that_was_silent(guest: Guest, world: World) -> None:
    """It has made itself an address and has sent nothing from it, but asked whether somebody else
    has it: that is where connections from the host go."""
    own = pk.ip("2001:db8:9::f00d")
    group = pk.solicited_node(own)
    body = pk.icmp6(bytes(16), group, 135, 0, bytes(4) + own)
    packet = pk.ipv6(bytes(16), group, pk.ICMP6, body, ttl=255)
    guest.transmit(pk.ip_frame((pk.multicast_mac(group), guest.mac), packet))
    guest.drv.wait_sent(0)
    accepted = listen(guest, PORT)
    guest.with_host(world.connect(socket.AF_INET6, PORT))
    guest.pump(lambda: accepted, what="a SYN")
    assert accepted[0].laddr == own
    tcp, peer = established(guest, world, 6)  # which goes out from the address it had before
    exchange(guest, tcp, peer, b"and", b"back")
    guest.with_host(world.connect(socket.AF_INET6, PORT))
    guest.pump(lambda: len(accepted) == 2, what="a SYN")
    assert accepted[1].laddr == guest.ip6


@families
def test_forwarded_port_the_guest_refuses(guest: Guest, world: World, family: int) -> None:
    """The guest answers the SYN with a RST: the host's client must see a reset."""
    peer = guest.with_host(world.connect(AF[family], PORT))
    guest.pump(lambda: peer.error or peer.eof, what="the refusal at the host")
    assert peer.error is not None and peer.error.errno in (errno.ECONNRESET, errno.ECONNREFUSED)


@pytest.mark.passt_defect("repeats its SYN with the next sequence number")
@families
def test_syn_to_the_guest_is_repeated(guest: Guest, world: World, family: int) -> None:
    """A guest that misses the first SYN gets another, the same one, and the connection works."""
    syns: list[pk.Packet] = []
    accepted: list[Tcp] = []

    def on_syn(packet: pk.Packet, pair: int) -> None:
        syns.append(packet)
        if len(syns) == 2:
            accepted.extend(listen(guest, PORT))
            guest.listeners[PORT](packet, pair)

    guest.listeners[PORT] = on_syn
    peer = guest.with_host(world.connect(AF[family], PORT))
    peer.send(b"early data")
    guest.pump(lambda: len(syns) == 2, 5, "the second SYN")
    assert (syns[0].seq, syns[0].mss) == (syns[1].seq, syns[1].mss)
    tcp = next(iter(guest.endpoints.values()))
    assert isinstance(tcp, Tcp)
    guest.pump(lambda: tcp.received == b"early data", what="data sent before the connection stood")
    tcp.check()


@families
def test_duplicate_syn(guest: Guest, world: World, family: int) -> None:
    """A SYN sent twice makes one connection."""
    listener = guest.with_host(world.listen(AF[family]))
    tcp = Tcp(guest, guest.addresses(family)[1], listener.port).open()
    tcp.segment(0, flags=SYN, window=65535)
    tcp.segment(0, flags=SYN, window=65535)
    guest.pump(lambda: tcp.state == "established", what="an answer to the SYN")
    guest.pump(timeout=0.1)
    assert len(listener.accepted) == 1
    exchange(guest, tcp, guest.with_host(listener.accepted[0]), b"one", b"connection")


@families
def test_far_host(guest: Guest, world: World, family: int) -> None:
    """A destination other than the gateway is reached without translation."""
    if not world.isolated:
        pytest.skip("no namespace of our own to put a far host into")
    far = FAR4 if family == 4 else FAR6
    listener = guest.with_host(world.listen(AF[family], far))
    tcp = Tcp(guest, pk.ip(far), listener.port).connect()
    guest.pump(lambda: listener.accepted, what="the connection at the host")
    exchange(guest, tcp, guest.with_host(listener.accepted[0]), b"to", b"fro")


@pytest.mark.passt_defect("fails an assertion")
def test_v4_mapped_destination(guest: Guest, backend: Backend) -> None:
    """A TCP/IPv6 frame to ::ffff:127.0.0.1 must not be taken for the host's loopback, nor harm
    anybody.
    """
    dst = pk.ip("::ffff:127.0.0.1")
    for flags in (SYN, ACK, RST):
        body = pk.tcp(guest.ip6, dst, 1234, 80, seq=1, ack=1, flags=flags)
        guest.send_ip(pk.ipv6(guest.ip6, dst, pk.TCP, body))
    guest.pump(timeout=0.2)
    assert backend.alive()
    guest.ping(guest.gw6, 1, 1, b"")
    guest.next_icmp({129})


@families
def test_many_connections(guest: Guest, world: World, family: int) -> None:
    """A hundred connections at once, each with data of its own both ways."""
    listener = guest.with_host(world.listen(AF[family]))
    tcps = [Tcp(guest, guest.addresses(family)[1], listener.port).open() for _ in range(100)]
    guest.pump(lambda: all(t.state == "established" for t in tcps), 10, "100 connections")
    for tcp in tcps:
        tcp.send(b"%05d" % tcp.lport + random_bytes(5000, tcp.lport))
    peers = [guest.with_host(peer) for peer in listener.accepted]
    guest.pump(lambda: all(len(p.inbox) == 5005 for p in peers), 10, "data on all of them")
    for peer in peers:
        assert peer.inbox[5:] == random_bytes(5000, int(peer.inbox[:5]))
        peer.send(bytes(peer.inbox[:5]))
        peer.shutdown()
    guest.pump(lambda: all(t.eof for t in tcps), 10, "their ends")
    for tcp in tcps:
        assert tcp.received == b"%05d" % tcp.lport
        tcp.close()
        tcp.check()
    guest.pump(lambda: all(p.eof for p in peers), 10, "their ends at the host")


@families
def test_descriptors_are_given_back(
    backend: Backend, guest: Guest, world: World, family: int
) -> None:
    """A hundred short connections one after another leave no socket behind."""

    def one() -> None:
        tcp, peer = established(guest, world, family)
        tcp.send(b"x")
        tcp.close()
        guest.pump(lambda: peer.eof, what="the end at the host")
        peer.close()
        guest.pump(lambda: tcp.eof, what="the end at the guest")
        tcp.send_ack()
        tcp.forget()
        guest.peers.clear()

    for _ in range(20):
        one()
    time.sleep(1.5)
    before = backend.fds()
    for _ in range(100):
        one()
    deadline = time.monotonic() + 5
    while backend.fds() > before + 40 and time.monotonic() < deadline:
        guest.pump(timeout=0.2)
    assert backend.fds() <= before + 40, f"{backend.fds()} descriptors after, {before} before"
