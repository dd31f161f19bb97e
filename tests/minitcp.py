"""A small TCP for the guest's side of the wire (RFC 9293), made to be misused.

It does what the tests need a guest's stack to do (connect, accept, send, receive, close, reset,
retransmit, reorder) and lets a test do what a good stack would not: withhold ACKs, advertise any
window, lose chosen segments, cut the stream into any sizes. Everything happens in `Guest.pump`, so
a run is a sequence of steps without threads.

It is also a judge. Each segment is held against what this end has promised, and a breach is noted
in `faults`, which `check` raises: data beyond the advertised window, segments above the MSS, an
acknowledgement of bytes never sent, or a retransmission whose bytes differ from the first
transmission.

Sequence numbers are kept as unbounded integers relative to each side's initial number; `_seq` and
`_ack` add it at the wire. Relative number 0 is the SYN, 1 the first byte of data.
"""

from __future__ import annotations

import itertools
import random
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import packets as pk
from guest import Guest
from packets import ACK, FIN, PSH, RST, SYN, Packet
from vring import Layout
from world import Peer, World

RTO_S = 0.25
WRAP = 1 << 32
TSO_MAX = 60000


class Tcp:
    """One connection of `guest` between its port `lport` and (`raddr`, `rport`), sending on queue
    pair `pair`.
    """

    def __init__(
        self,
        guest: Guest,
        raddr: bytes,
        rport: int,
        *,
        lport: int | None = None,
        pair: int = 0,
        mss: int = 1460,
        wscale: int = 7,
        window: int = 1 << 20,
        iss: int | None = None,
        tso: bool = False,
        sack: bool = False,
    ) -> None:
        self.guest, self.raddr, self.rport, self.pair = guest, raddr, rport, pair
        self.laddr = guest.source_for(raddr)
        self.lport = guest.port() if lport is None else lport
        self.iss = random.getrandbits(32) if iss is None else iss
        self.irs = 0
        self.state = "closed"
        self.mss, self.wscale, self.tso = mss, wscale, tso
        self.peer_mss, self.peer_scale = 536, 0
        self.sack, self.peer_sack = sack, False
        # Sending: out[0] is relative sequence number 1 + trimmed.
        self.out = bytearray()
        self.trimmed = 0
        self.una, self.nxt, self.limit = 0, 0, 1
        self.fin_at: int | None = None
        self.sizes: Iterator[int] = itertools.repeat(1 << 30)
        self.retransmits = 0
        self.retransmit = True
        self.lose_tx: Callable[[int, bytes], bool] = lambda seq, data: False
        # Receiving.
        self.inbox = bytearray()
        self.received = bytearray()
        self.rcv_nxt = 0
        self.window = window
        self.edge = 0
        self.autoread = True
        self.parked: dict[int, bytes] = {}
        self.eof_at: int | None = None
        self.auto_ack = True
        self.lose_rx: Callable[[Packet], bool] = lambda packet: False
        self.late = False  # what comes may have been overtaken
        self.repeated = 0
        self.segments: list[Packet] = []
        self.pairs_seen: list[int] = []
        self.faults: list[str] = []
        self._ack_due = False
        self._dup_acks = 0
        self._recover = 0
        self._timer: float | None = None
        self._rto = RTO_S
        guest.endpoints[raddr, rport, self.lport] = self

    def __str__(self) -> str:
        return (
            f"tcp {self.lport}>{self.rport} {self.state}: una {self.una} nxt {self.nxt} limit "
            f"{self.limit} queued {len(self.out)}, rcv_nxt {self.rcv_nxt} edge {self.edge} "
            f"retransmits {self.retransmits} repeated {self.repeated} faults {self.faults}"
        )

    # --- what a test asks for ---

    def open(self) -> Tcp:
        """Send a SYN; `connect` also waits."""
        self.state = "syn-sent"
        self.nxt = 1
        self._arm()
        self._emit(0, SYN, options=pk.tcp_options(self.mss, self.wscale, self.sack))
        return self

    def connect(self, timeout: float = 5.0) -> Tcp:
        self.open()
        self.guest.pump(lambda: self.state != "syn-sent", timeout, f"an answer to the SYN: {self}")
        assert self.state == "established", f"connection is {self.state}"
        return self

    def send(self, data: bytes) -> None:
        assert self.fin_at is None
        self.out += data
        self._push()

    def close(self) -> None:
        """Half close: a FIN after everything queued."""
        self.fin_at = 1 + self.trimmed + len(self.out)
        self._push()

    def abort(self) -> None:
        self._emit(self.nxt, RST | ACK)
        self.state = "aborted"
        self.forget()

    def forget(self) -> None:
        """From now on the guest knows nothing of this connection."""
        self.guest.endpoints.pop((self.raddr, self.rport, self.lport), None)

    def read(self, size: int | None = None) -> bytes:
        """Take received bytes out of the receive buffer, opening the window."""
        taken = bytes(self.inbox[:size])
        del self.inbox[: len(taken)]
        return taken

    def advertise(self, window: int) -> None:
        """Change the advertised window and tell the other side."""
        self.window = window
        self.send_ack()

    def send_ack(self) -> None:
        self._ack_due = False
        self._emit(self.nxt, ACK)

    def segment(self, seq: int, data: bytes = b"", flags: int = ACK, **fields: Any) -> None:
        """Any segment at all, `seq` relative; `ack` (relative) and `window` (on the wire) may be
        given.
        """
        self._emit(seq, flags, data, **fields)

    @property
    def eof(self) -> bool:
        return self.eof_at is not None and self.rcv_nxt > self.eof_at

    @property
    def all_acked(self) -> bool:
        return not self.out and (self.fin_at is None or self.una > self.fin_at)

    def check(self) -> None:
        assert not self.faults, f"{self.faults}\n{self.guest.history()}"

    # --- receiving ---

    def on_segment(self, packet: Packet, pair: int) -> None:
        if self.lose_rx(packet):
            return
        self.segments.append(packet)
        self.pairs_seen.append(pair)
        if packet.flags & RST:
            self._on_reset(packet)
        elif self.state == "syn-sent":
            self._on_syn_ack(packet)
        elif packet.flags & (SYN | ACK) == SYN and packet.seq == self.irs:
            self._on_syn_again(packet)
        else:
            self._on_data(packet)
            self._on_ack(packet)
        self._push()

    def _on_reset(self, packet: Packet) -> None:
        if self.state == "syn-sent":
            if not packet.flags & ACK or packet.ack != (self.iss + 1) % WRAP:
                self.faults.append(f"RST that does not acknowledge our SYN: {packet}")
            self.state = "refused"
        else:
            seq = self._relative(packet.seq, self.irs, self.rcv_nxt)
            if not self.rcv_nxt <= seq <= max(self.edge, self.rcv_nxt):
                self.faults.append(f"RST at {seq} outside {self.rcv_nxt}..{self.edge}")
            self.state = "reset"
        self._timer = None

    def _on_syn_ack(self, packet: Packet) -> None:
        if packet.flags & (SYN | ACK) != SYN | ACK or packet.ack != (self.iss + 1) % WRAP:
            self.faults.append(f"not an answer to our SYN: {packet}")
            return
        self._take_syn(packet)
        self.una = 1
        self.limit = 1 + packet.window
        self.state = "established"
        self._timer = None
        self._rto = RTO_S
        self.send_ack()

    def _on_syn_again(self, packet: Packet) -> None:
        """The same SYN once more: from who has not seen our answer (RFC 9293 3.10.7.4,
        SYN-RECEIVED), or late."""
        if self.una == 0:
            self._emit(0, SYN | ACK, options=pk.tcp_options(self.mss, self.wscale))
            return
        if not self.late:
            self.faults.append(f"SYN after our answer was acknowledged: {packet}")
        self.send_ack()

    def _take_syn(self, packet: Packet) -> None:
        self.irs = packet.seq
        self.rcv_nxt = 1
        self.peer_mss = packet.mss or 536
        if packet.wscale is None:
            self.wscale = 0
        self.peer_scale = packet.wscale or 0
        self.peer_sack = packet.sack_permitted

    def _on_ack(self, packet: Packet) -> None:
        if not packet.flags & ACK:
            self.faults.append(f"segment without ACK: {packet}")
            return
        ack = self._relative(packet.ack, self.iss, self.una)
        if ack > self.nxt:
            self.faults.append(f"acknowledges {ack}, sent up to {self.nxt}")
            return
        if ack < self.una:
            return
        limit = ack + (packet.window << self.peer_scale)
        if ack > self.una:
            data_end = min(ack, self.fin_at) if self.fin_at is not None else ack
            gone = max(0, data_end - 1 - self.trimmed)
            del self.out[:gone]
            self.trimmed += gone
            self.una, self._dup_acks, self._rto = ack, 0, RTO_S
            self._timer = None
            if self.state == "syn-received":
                self.state = "established"
            if ack < self._recover and self.retransmit:
                self._resend()
        elif limit == self.limit and not packet.payload and self.nxt > self.una:
            self._dup_acks += 1
            if self._dup_acks == 3 and self.retransmit:
                self._resend()
        self.limit = limit
        if self.nxt > self.una:
            self._arm()

    def _on_data(self, packet: Packet) -> None:
        seq = self._relative(packet.seq, self.irs, self.rcv_nxt)
        data = packet.payload
        if packet.flags & SYN:
            self._ack_due = True
            return
        unit = packet.header.gso_size or len(data)
        if unit > self.mss:
            self.faults.append(f"segment of {unit} bytes above our MSS {self.mss}")
        if seq + len(data) > self.edge and not (len(data) == 1 and seq == self.edge):
            self.faults.append(f"data {seq}+{len(data)} beyond the window's edge {self.edge}")
        if packet.flags & FIN:
            end = seq + len(data)
            if self.eof_at not in (None, end):
                self.faults.append(f"FIN at {end}, before at {self.eof_at}")
            self.eof_at = end
        if seq < self.rcv_nxt and data:
            self._compare(seq, data)
        if not data and not packet.flags & FIN:
            if seq < self.rcv_nxt:
                self._ack_due = True
            return
        self._ack_due = True
        if seq > self.rcv_nxt:
            self.parked[seq] = max(data, self.parked.get(seq, b""), key=len)
            if self.auto_ack:
                self.send_ack()
        elif seq + len(data) <= self.edge or not data:
            self._accept(seq, data)

    def _accept(self, seq: int, data: bytes) -> None:
        while data is not None:
            fresh = data[self.rcv_nxt - seq :]
            self.received += fresh
            if not self.autoread:
                self.inbox += fresh
            self.rcv_nxt += len(fresh)
            ready = [at for at in self.parked if at <= self.rcv_nxt]
            if not ready:
                break
            seq = ready[0]
            data = self.parked.pop(seq)
        if self.eof_at is not None and self.rcv_nxt == self.eof_at:
            self.rcv_nxt += 1

    def _compare(self, seq: int, data: bytes) -> None:
        self.repeated += 1
        end = min(len(data), self.rcv_nxt - seq, 1 + len(self.received) - seq)
        if seq >= 1 and end > 0 and data[:end] != self.received[seq - 1 : seq - 1 + end]:
            self.faults.append(f"bytes {seq}..{seq + end} repeated with other contents")

    # --- sending ---

    def _push(self) -> None:
        """Send what the window allows."""
        if self.state not in ("established", "syn-received"):
            return
        while True:
            end = 1 + self.trimmed + len(self.out)
            room = min(end, self.limit) - self.nxt
            if room > 0:
                size = min(room, next(self.sizes), TSO_MAX if self.tso else self.segment_size)
                self._data(self.nxt, size)
                self.nxt += size
                self._arm()
            else:
                break
        if self.fin_at is not None and self.nxt == self.fin_at == end:
            self._emit(self.nxt, FIN | ACK)
            self.nxt += 1
            self._arm()

    @property
    def segment_size(self) -> int:
        """Payload bytes a segment to the other side may have."""
        return self.peer_mss

    def _data(self, seq: int, size: int) -> None:
        at = seq - 1 - self.trimmed
        data = bytes(self.out[at : at + size])
        if not self.lose_tx(seq, data):
            self._emit(seq, ACK | PSH, data)

    def _resend(self) -> None:
        """One segment from the oldest unacknowledged byte; each partial ACK of what was out by then
        brings the next (RFC 6582).
        """
        self.retransmits += 1
        self._recover = max(self._recover, self.nxt)
        end = 1 + self.trimmed + len(self.out)
        size = min(end, self.nxt) - self.una
        if self.state == "syn-sent":
            self._emit(0, SYN, options=pk.tcp_options(self.mss, self.wscale))
        elif self.state == "syn-received" and self.una == 0:
            self._emit(0, SYN | ACK, options=pk.tcp_options(self.mss, self.wscale))
        elif size > 0:
            self._data(self.una, min(size, self.segment_size))
        elif self.fin_at is not None and self.nxt > self.fin_at:
            self._emit(self.fin_at, FIN | ACK)

    def _arm(self) -> None:
        if self._timer is None:
            self._timer = time.monotonic() + self._rto

    def deadline(self) -> float | None:
        return self._timer

    def tick(self, now: float) -> None:
        """Retransmission and window probes, then the acknowledgement of what came in since the
        last tick.
        """
        if self.state in ("reset", "refused", "aborted"):
            return
        if self._ack_due and self.auto_ack:
            self.send_ack()
        blocked = self.out and self.nxt == self.una and self.limit <= self.nxt
        if blocked:
            self._arm()
        if self._timer is None or now < self._timer or not self.retransmit:
            return
        self._timer = None
        if blocked:
            self._data(self.nxt, 1)
            self.nxt += 1
        elif self.nxt > self.una:
            self._resend()
        self._rto = min(2.0, self._rto * 2)
        if self.nxt > self.una or blocked:
            self._arm()

    def _emit(
        self,
        seq: int,
        flags: int,
        data: bytes = b"",
        *,
        options: bytes = b"",
        ack: int | None = None,
        window: int | None = None,
        layout: Layout | None = None,
    ) -> None:
        if window is None:
            room = max(0, self.window - len(self.inbox))
            shift = 0 if flags & SYN else self.wscale
            window = min(65535, room >> shift)
            if flags & ACK or flags & SYN:
                start = 1 if flags & SYN else self.rcv_nxt
                self.edge = max(self.edge, start + (window << shift))
        gso = self.peer_mss if len(data) > self.peer_mss else 0
        body = pk.tcp(
            self.laddr,
            self.raddr,
            self.lport,
            self.rport,
            seq=self.iss + seq,
            ack=self.irs + (self.rcv_nxt if ack is None else ack) if flags & ACK else 0,
            flags=flags,
            window=window,
            options=options,
            payload=data,
            csum="partial" if self.tso else "full",
        )
        packet = pk.ip_packet(self.laddr, self.raddr, pk.TCP, body)
        frame = pk.ip_frame((self.guest.gw_mac, self.guest.mac), packet)
        header = pk.needs_csum(frame, gso_size=gso) if self.tso else pk.PLAIN
        self.guest.transmit(frame, pair=self.pair, header=header, layout=layout)

    @staticmethod
    def _relative(value: int, base: int, near: int) -> int:
        """The unbounded number congruent to `value` - `base` that is closest to `near`."""
        offset = (value - base - near) % WRAP
        return near + (offset if offset < WRAP // 2 else offset - WRAP)


def listen(guest: Guest, lport: int, **options: Any) -> list[Tcp]:
    """Accept connections to `lport` of the guest; the list returned grows by one for each."""
    accepted: list[Tcp] = []

    def on_syn(packet: Packet, pair: int) -> None:
        tcp = Tcp(guest, packet.src, packet.sport, lport=lport, pair=pair, **options)
        tcp.segments.append(packet)
        tcp.pairs_seen.append(pair)
        tcp.laddr = packet.dst
        tcp._take_syn(packet)
        tcp.limit = 1 + packet.window
        tcp.state = "syn-received"
        tcp.nxt = 1
        tcp._arm()
        tcp._emit(0, SYN | ACK, options=pk.tcp_options(tcp.mss, tcp.wscale))
        accepted.append(tcp)

    guest.listeners[lport] = on_syn
    return accepted


def established(
    guest: Guest, world: World, family: int, *, rcvbuf: int = 0, **options: Any
) -> tuple[Tcp, Peer]:
    """A connection from the guest to a fresh host listener, both ends ready."""
    af = socket.AF_INET if family == 4 else socket.AF_INET6
    listener = world.listen(af, rcvbuf=rcvbuf)
    tcp = Tcp(guest, guest.addresses(family)[1], listener.port, **options).connect()
    listener.step()
    peer = guest.with_host(listener.accepted.pop())
    listener.close()
    return tcp, peer


def exchange(
    guest: Guest, tcp: Tcp, peer: Peer, up: bytes, down: bytes, timeout: float = 10
) -> None:
    """Both streams at once; both must arrive whole, within `timeout` s."""
    had_up, had_down = len(peer.inbox), len(tcp.received)

    def whole(store: bytearray, size: int) -> bool:
        assert tcp.state == "established" and not peer.error, f"{tcp}, {peer.error}"
        return len(store) >= size

    if up:
        tcp.send(up)
    peer.send(down)
    guest.pump(lambda: whole(peer.inbox, had_up + len(up)), timeout, "the stream at the host")
    guest.pump(
        lambda: whole(tcp.received, had_down + len(down)), timeout, "the stream at the guest"
    )
    assert bytes(peer.inbox[had_up:]) == up, "the stream at the host differs"
    assert bytes(tcp.received[had_down:]) == down, "the stream at the guest differs"
    tcp.check()
