"""A guest: addresses, ARP and NDP answers, and the dispatch of received frames, over a `Driver`.

Single-threaded and without a clock of its own: `pump` is the only place that waits. It takes
frames from every pair, hands each to whom it concerns (TCP endpoints by port pair, UDP and ICMP to
inboxes), lets endpoints run their timers, drives the host-side `Peer` sockets it was told about,
and sleeps on all their descriptors at once until a condition holds. A time-out raises with the
last frames of both directions, the usual first question.

Frames leave through `transmit` in the layout `layouts` yields, so any traffic can be sent in any
descriptor layout.
"""

from __future__ import annotations

import itertools
import random
import select
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator, Sized
from typing import Any, Protocol, TypeVar

import packets as pk
from driver import Driver, drain
from packets import PLAIN, Packet, VnetHeader
from vring import ONE, Layout
from world import GATEWAY4, GATEWAY6, HOST4, HOST6

MAC = pk.mac("52:54:00:12:34:56")
LINK_LOCAL = pk.ip("fe80::5054:ff:fe12:3456")


class Endpoint(Protocol):
    """A TCP endpoint as `Guest.pump` sees it."""

    def on_segment(self, packet: Packet, pair: int) -> None: ...
    def tick(self, now: float) -> None: ...
    def deadline(self) -> float | None: ...


class HostSide(Protocol):
    """A host-side socket as `Guest.pump` sees it."""

    @property
    def wants_read(self) -> bool: ...
    @property
    def wants_write(self) -> bool: ...
    def fileno(self) -> int: ...
    def step(self) -> None: ...
    def close(self) -> None: ...


H = TypeVar("H", bound=HostSide)


class Guest:
    """The guest behind `drv`, with the addresses a translator gives it unless told otherwise.

    Pairs in `serving` are looked after by `pump`; a test that breaks a pair's rings takes it out.
    """

    def __init__(self, drv: Driver, *, ip4: str = HOST4, ip6: str = HOST6) -> None:
        self.drv = drv
        self.serving = list(range(drv.pairs))
        self.mac = MAC
        self.ip4, self.gw4 = pk.ip(ip4), pk.ip(GATEWAY4)
        self.ip6, self.gw6 = pk.ip(ip6), pk.ip(GATEWAY6)
        self.gw_mac = pk.BROADCAST
        self.endpoints: dict[tuple[bytes, int, int], Endpoint] = {}
        self.listeners: dict[int, Callable[[Packet, int], None]] = {}
        self.udp: deque[tuple[int, Packet]] = deque()
        self.icmp: deque[tuple[int, Packet]] = deque()
        self.arp: deque[Packet] = deque()
        self.peers: list[HostSide] = []
        self.layouts: Iterator[Layout] = itertools.repeat(ONE)
        self.trace: deque[str] = deque(maxlen=40)
        self.on_packet: Callable[[Packet, int], None] | None = None
        self.resets_sent = 0
        self._start = time.monotonic()
        self._ports = itertools.count(40000)

    def addresses(self, family: int) -> tuple[bytes, bytes]:
        """(own address, gateway that stands for the host's loopback) of family 4 or 6."""
        return (self.ip4, self.gw4) if family == 4 else (self.ip6, self.gw6)

    def with_host(self, peer: H) -> H:
        """Have `pump` drive this host-side socket, until the test ends."""
        self.peers.append(peer)
        return peer

    def port(self) -> int:
        """A local port number not used before by this guest."""
        return next(self._ports)

    # --- sending ---

    def transmit(
        self,
        frame: bytes,
        *,
        pair: int = 0,
        header: VnetHeader = PLAIN,
        layout: Layout | None = None,
        publish: bool = True,
    ) -> None:
        self._note(f"guest q{pair}", frame, header)
        chosen = next(self.layouts) if layout is None else layout
        self.drv.send(pair, frame, header=header, layout=chosen, publish=publish)

    def send_ip(self, packet: bytes, *, pair: int = 0, **how: Any) -> None:
        self.transmit(pk.ip_frame((self.gw_mac, self.mac), packet), pair=pair, **how)

    def send_udp(
        self, dst: bytes, sport: int, dport: int, payload: bytes, *, ttl: int = 64, **how: Any
    ) -> None:
        src = self.source_for(dst)
        body = pk.udp(src, dst, sport, dport, payload)
        self.send_ip(pk.ip_packet(src, dst, pk.UDP, body, ttl=ttl), **how)

    def source_for(self, dst: bytes) -> bytes:
        if len(dst) == 4:
            return self.ip4
        return LINK_LOCAL if dst[:2] == b"\xfe\x80" else self.ip6

    def ping(self, dst: bytes, ident: int, sequence: int, payload: bytes, **how: Any) -> None:
        """An ICMP or ICMPv6 echo request."""
        src, rest = self.source_for(dst), struct.pack(">HH", ident, sequence) + payload
        if len(dst) == 4:
            body, proto = pk.icmp(8, 0, rest), pk.ICMP
        else:
            body, proto = pk.icmp6(src, dst, 128, 0, rest), pk.ICMP6
        self.send_ip(pk.ip_packet(src, dst, proto, body), **how)

    # --- receiving ---

    def dispatch(self, pair: int, header: VnetHeader, frame: bytes) -> None:
        packet = pk.parse(frame, header)
        self._note(f"  net q{pair}", frame, header, packet)
        if packet.eth_dst != self.mac and not packet.eth_dst[0] & 1:
            raise pk.BadFrame(f"frame for {packet.eth_dst.hex(':')} delivered: {packet}")
        if self.on_packet:
            self.on_packet(packet, pair)
        if packet.ethertype == pk.ARP:
            self._on_arp(packet)
        elif packet.proto == pk.TCP:
            self._on_tcp(packet, pair)
        elif packet.proto == pk.UDP:
            self.udp.append((pair, packet))
        elif packet.proto == pk.ICMP6 and packet.type == 135:
            self._on_solicitation(packet)
        elif packet.proto in (pk.ICMP, pk.ICMP6):
            self.icmp.append((pair, packet))

    def _on_arp(self, packet: Packet) -> None:
        self.arp.append(packet)
        sender = packet.body[8:14]
        if packet.type == 1 and packet.dst == self.ip4 != packet.src:
            body = pk.arp(2, self.mac, self.ip4, sender, packet.src)
            self.transmit(pk.ether(sender, self.mac, pk.ARP, body))

    def _on_solicitation(self, packet: Packet) -> None:
        target = packet.body[4:20]
        if target in (self.ip6, LINK_LOCAL) and any(packet.src):
            rest = b"\x60\0\0\0" + target + b"\2\1" + self.mac
            body = pk.icmp6(target, packet.src, 136, 0, rest)
            advert = pk.ipv6(target, packet.src, pk.ICMP6, body, ttl=255)
            self.transmit(pk.ip_frame((packet.eth_src, self.mac), advert))

    def _on_tcp(self, packet: Packet, pair: int) -> None:
        endpoint = self.endpoints.get((packet.src, packet.sport, packet.dport))
        if endpoint:
            endpoint.on_segment(packet, pair)
        elif packet.flags & pk.SYN and packet.dport in self.listeners:
            self.listeners[packet.dport](packet, pair)
        elif not packet.flags & pk.RST:
            self._refuse(packet, pair)

    def _refuse(self, packet: Packet, pair: int) -> None:
        """RST for a segment that belongs to no connection (RFC 9293 3.10.7.1)."""
        self.resets_sent += 1
        if packet.flags & pk.ACK:
            seq, ack, flags = packet.ack, 0, pk.RST
        else:
            length = len(packet.payload) + bool(packet.flags & pk.SYN)
            seq, ack, flags = 0, packet.seq + length, pk.RST | pk.ACK
        body = pk.tcp(
            packet.dst, packet.src, packet.dport, packet.sport, seq=seq, ack=ack, flags=flags
        )
        self.send_ip(pk.ip_packet(packet.dst, packet.src, pk.TCP, body), pair=pair)

    # --- the loop ---

    def pump(
        self, until: Callable[[], Any] | None = None, timeout: float = 5.0, what: str = ""
    ) -> Any:
        """Run until the condition holds and return its value; without a condition, for `timeout`
        s.
        """
        deadline = time.monotonic() + timeout
        while True:
            self._step()
            result = until() if until else None
            if result:
                return result
            now = time.monotonic()
            if now >= deadline:
                if until is None:
                    return None
                raise AssertionError(f"not within {timeout} s: {what}\n{self.history()}")
            self._sleep(min(deadline, *self._deadlines(deadline)) - now)

    def _deadlines(self, latest: float) -> list[float]:
        return [d for e in self.endpoints.values() if (d := e.deadline()) is not None] + [latest]

    def _step(self) -> None:
        for pair in self.serving:
            self.drv.reap_tx(pair)
            self.drv.poll(pair)
            inbox = self.drv.inbox[pair]
            while inbox:
                header, frame = inbox.popleft()
                self.dispatch(pair, header, frame)
        now = time.monotonic()
        for endpoint in list(self.endpoints.values()):
            endpoint.tick(now)
        for peer in self.peers:
            if peer.fileno() >= 0:
                peer.step()

    def _sleep(self, seconds: float) -> None:
        live = [peer for peer in self.peers if peer.fileno() >= 0]
        readers = [peer for peer in live if peer.wants_read]
        writers = [peer for peer in live if peer.wants_write]
        if writers:
            if select.select([], writers, [], 0)[1]:
                return
            seconds = min(seconds, 0.002)
        queues = [self.drv.rx(pair) for pair in self.serving]
        self.drv.wait_calls(queues, max(0.0, seconds), readers)

    def expect_silence(self, seconds: float, what: str) -> None:
        """Fail if any frame other than ARP, NDP or router chatter arrives within `seconds`."""
        seen: list[str] = []

        def note(packet: Packet, pair: int) -> None:
            if packet.proto in (pk.TCP, pk.UDP, pk.ICMP) and packet.dst != b"\xff" * 4:
                seen.append(str(packet))

        previous, self.on_packet = self.on_packet, note
        self.pump(timeout=seconds)
        self.on_packet = previous
        assert not seen, f"{what}: {seen}"

    def next_udp(self, timeout: float = 5.0) -> tuple[int, Packet]:
        """(pair, datagram) of the next UDP datagram."""
        self.pump(lambda: self.udp, timeout, "a UDP datagram for the guest")
        return self.udp.popleft()

    def next_icmp(self, kinds: set[int], timeout: float = 5.0) -> tuple[int, Packet]:
        """The next ICMP or ICMPv6 message whose type is one of `kinds`; others are dropped."""

        def found() -> bool:
            while self.icmp and self.icmp[0][1].type not in kinds:
                self.icmp.popleft()
            return bool(self.icmp)

        self.pump(found, timeout, f"an ICMP message of type {sorted(kinds)} for the guest")
        return self.icmp.popleft()

    def resolve(self, timeout: float = 5.0) -> None:
        """Learn the gateway's MAC address by ARP, asking again after a second as a guest does: what
        the flows of a former guest still want to say may fill a small receive ring.
        """
        deadline = time.monotonic() + timeout
        while not any(p.type == 2 and p.src == self.gw4 for p in self.arp):
            if time.monotonic() > deadline:
                raise AssertionError(f"no ARP answer for the gateway\n{self.history()}")
            self.ask_for_gateway()
            self._answered_within(1.0)
        reply = next(p for p in self.arp if p.type == 2 and p.src == self.gw4)
        self.gw_mac = reply.body[8:14]

    def ask_for_gateway(self, **how: Any) -> None:
        """An ARP request."""
        body = pk.arp(1, self.mac, self.ip4, bytes(6), self.gw4)
        self.transmit(pk.ether(pk.BROADCAST, self.mac, pk.ARP, body), **how)

    def _answered_within(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if any(p.type == 2 and p.src == self.gw4 for p in self.arp):
                return
            self.pump(timeout=0.001)

    # --- diagnosis ---

    def _note(
        self, who: str, frame: bytes, header: VnetHeader, packet: Packet | None = None
    ) -> None:
        if packet is None:
            try:
                packet = pk.parse(frame.ljust(60, b"\0"), header)
            except (pk.BadFrame, struct.error, IndexError):
                packet = None
        line = str(packet) if packet else f"{len(frame)} bytes {frame[:40].hex()}"
        extra = f" gso {header.gso_size}" if header.gso_type else ""
        self.trace.append(f"{time.monotonic() - self._start:9.4f} {who} {line}{extra}")

    def history(self) -> str:
        """The last frames, the state of the rings, and which error descriptors are signalled."""
        lines = list(self.trace)
        for queue in self.drv.queues:
            ring = queue.ring
            lines.append(
                f"ring {queue.index}: {len(ring.chains)} out, {ring.pending()} to take, "
                f"{queue.kicks} kicks, {queue.calls} calls"
            )
            if select.select([queue.err], [], [], 0)[0]:
                lines.append(f"ring {queue.index}: error descriptor signalled {drain(queue.err)}")
        for endpoint in self.endpoints.values():
            lines.append(str(endpoint))
        return "\n".join(lines)


def holds(store: Sized, size: int) -> Callable[[], bool]:
    """A condition for `Guest.pump`: `store` has at least `size` items."""
    return lambda: len(store) >= size


def random_bytes(size: int, seed: int = 1) -> bytes:
    """`size` bytes that no misplacement leaves looking right, the same for the same seed."""
    return random.Random(seed).randbytes(size)
