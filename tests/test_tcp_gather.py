"""Payload of several streams, interleaved in one burst of the guest: a system call for each stream.

The worker lives in the test's process (inprocess.py), so that one breath finds all of it.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable
from functools import partial

import pytest
from guest import Guest, random_bytes
from inprocess import PROTOCOL, local_guest
from minitcp import Tcp, established
from packets import ACK, FIN, PSH
from vring import Layout
from world import Peer, World

from dataplane.context import CHAIN_IOV_MAX, CHAINS_MAX, GATHERS_MAX

Stream = tuple[Tcp, Peer]
families = pytest.mark.parametrize("family", [4, 6])


@pytest.fixture
def guest(make_local: Callable[..., Guest]) -> Guest:
    """A guest whose worker breathes when the test says so."""
    return make_local()


def send_together(guest: Guest, segments: list[tuple[Tcp, bytes, int]]) -> None:
    """One burst: these segments, in this order, and one breath."""
    transmit = guest.transmit
    guest.transmit = partial(transmit, publish=False)  # type: ignore[method-assign]
    for tcp, data, flags in segments:
        tcp.segment(tcp.nxt, data, flags)
        tcp.nxt += len(data)
        if flags & FIN:
            tcp.fin_at, tcp.nxt = tcp.nxt, tcp.nxt + 1
    guest.transmit = transmit  # type: ignore[method-assign]
    guest.drv.publish(guest.drv.tx(0))
    guest.drv.settle()


def data_segs_out(guest: Guest) -> list[int]:
    """Segments with payload each connection's host socket has sent (the kernel's struct
    tcp_info)."""
    found = []
    for flow in guest.drv.flows():
        if flow["protocol"] == PROTOCOL["tcp"]:
            with socket.socket(fileno=os.dup(flow["fd"])) as sock:
                info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            found.append(struct.unpack_from("=I", info, 156)[0])
    return found


def arrived(guest: Guest, stream: Stream, wanted: bytes) -> None:
    """Wait for the bytes at the host, and for their acknowledgement."""
    tcp, peer = stream
    guest.pump(lambda: len(peer.inbox) >= len(wanted) and tcp.una == tcp.nxt, what="the stream")
    assert peer.inbox == wanted
    tcp.check()


@families
def test_streams_in_turn_cost_a_system_call_each(guest: Guest, world: World, family: int) -> None:
    """Each socket got all of its stream in one piece."""
    streams = [established(guest, world, family) for _ in range(12)]
    parts = [[random_bytes(1000) for _ in range(CHAINS_MAX // 12)] for _ in streams]
    turns = [
        (tcp, part[turn], ACK | PSH)
        for turn in range(CHAINS_MAX // 12)
        for (tcp, _), part in zip(streams, parts, strict=True)
    ]
    send_together(guest, turns)
    assert data_segs_out(guest) == [1] * len(streams)
    for stream, part in zip(streams, parts, strict=True):
        arrived(guest, stream, b"".join(part))


@families
def test_many_streams(guest: Guest, world: World, family: int) -> None:
    """More than there are gathers, some in each burst."""
    streams = [established(guest, world, family) for _ in range(GATHERS_MAX + 6)]
    for _ in range(3):
        for at in range(0, len(streams), 20):
            some = list(enumerate(streams))[at : at + 20]
            turn = [(tcp, b"%010d" % number, ACK | PSH) for number, (tcp, _) in some]
            send_together(guest, turn + turn)
    for number, stream in enumerate(streams):
        arrived(guest, stream, b"%010d" % number * 6)


@pytest.mark.parametrize("left", range(4))
def test_all_gathers_are_given_out(guest: Guest, world: World, left: int) -> None:
    """Streams that begin in the middle of a burst when few gathers are left: what there is goes
    out, and they begin anew."""
    streams = [established(guest, world, 4) for _ in range(3)]
    parts = [[random_bytes(100 + turn, seed) for turn in range(5)] for seed in range(3)]
    guest.drv.workers[0].context.view["gathers_count"] = GATHERS_MAX - left  # type: ignore
    turns = [
        (tcp, part[turn], ACK | PSH)
        for turn in range(5)
        for (tcp, _), part in zip(streams, parts, strict=True)
    ]
    send_together(guest, turns)
    assert sorted(data_segs_out(guest)) == sorted(
        [1 + (0 < left and at < left < 3) for at in range(3)]
    )
    for stream, part in zip(streams, parts, strict=True):
        arrived(guest, stream, b"".join(part))


@families
def test_the_end_of_one_stream_between_others(guest: Guest, world: World, family: int) -> None:
    """FIN sends what was gathered before it, of its own stream, and ends no other."""
    streams = [established(guest, world, family) for _ in range(3)]
    (one, _), (two, ended), (three, _) = streams
    turn = [(one, b"1", ACK), (two, b"2", ACK), (three, b"3", ACK)]
    send_together(guest, [*turn, (two, b"end", ACK | FIN), (one, b"1", ACK), (three, b"3", ACK)])
    for stream, wanted in zip(streams, (b"11", b"2end", b"33"), strict=True):
        arrived(guest, stream, wanted)
    assert ended.eof
    assert not streams[0][1].eof and not streams[2][1].eof


@families
def test_a_dead_socket_takes_nothing_of_others(guest: Guest, world: World, family: int) -> None:
    """The host resets one of three; the payload of the others arrives."""
    streams = [established(guest, world, family) for _ in range(3)]
    streams[1][1].reset()
    turn = [(tcp, b"abc", ACK | PSH) for tcp, _ in streams]
    send_together(guest, turn + turn)
    arrived(guest, streams[0], b"abcabc")
    arrived(guest, streams[2], b"abcabc")
    guest.pump(lambda: streams[1][0].state == "reset", what="the reset")


@families
def test_a_full_gather_that_passes_a_held_fin(world: World, family: int) -> None:
    """A guest that goes on beyond its own FIN, in as many pieces as a gather has: sending them ends
    what was held, and nothing is looked for there afterwards."""
    guest = local_guest(world, num=CHAIN_IOV_MAX)
    tcp, peer = established(guest, world, family)
    tcp.segment(tcp.nxt + 10, b"", ACK | FIN)
    guest.drv.settle()
    data = random_bytes(CHAIN_IOV_MAX + 100)
    headers = 66 if family == 4 else 86
    tcp.segment(tcp.nxt, data, ACK | PSH, layout=Layout((headers, *(1,) * (CHAIN_IOV_MAX - 2))))
    guest.pump(lambda: len(peer.inbox) >= len(data), what="the stream")
    assert peer.inbox == data
    assert not peer.eof
    guest.drv.close()
    peer.close()
