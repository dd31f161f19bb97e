"""frames.py - what a capture inside a guest holds: judged, and put together once more.

Theory      A capture is a file of records (type, length, virtio-net header, frame), written by
            talk.py or capture.c from a packet socket. Each frame to the guest is held against the
            features agreed on (tests/judge.py); streams and datagrams are put together from what it
            would be on a cable, apart from the guest's own stack.
What is     A driver or TAP stands between rings and kernel. It keeps checksum and segmentation
hidden      fields, but refuses a frame whose fields contradict each other; hdr_len is the kernel's
            own. tests/test_differential.py sees the rings themselves.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import packets as pk
import talk
from driver import CSUM, GUEST_CSUM
from judge import GSO_NEEDS, Judge, Stream
from offload import TAKES, lower
from packets import VnetHeader

FROM_US = 4  # PACKET_OUTGOING
Flow = tuple[bytes, int, int]  # the other end's address and port, our port


@dataclass
class Capture:
    """What the guest was given and what it sent."""

    judge: Judge
    streams: dict[Flow, Stream] = field(default_factory=dict)
    datagrams: dict[tuple[bytes, int], list[bytes]] = field(default_factory=dict)
    kinds: set[tuple[int, int]] = field(default_factory=set)
    kinds_sent: set[int] = field(default_factory=set)
    flags: set[int] = field(default_factory=set)
    flags_sent: set[int] = field(default_factory=set)

    def read(self, data: bytes) -> Capture:
        """All frames of a file; `BadFrame` for one that was not agreed on."""
        for kind, record in talk.captured(data):
            header = VnetHeader(*pk.VNET_HDR.unpack(record[:10] + b"\1\0"))
            if kind == FROM_US:
                self.kinds_sent.add(header.gso_type & ~pk.GSO_ECN)
                self.flags_sent.add(header.flags)
            else:
                self._received(header, record[10:])
        return self

    def _received(self, header: VnetHeader, frame: bytes) -> None:
        packet = self.judge.look(header, frame)
        self.kinds.add((header.gso_type, len(packet.src)))
        self.flags.add(header.flags)
        for plain, piece in lower(header, frame):
            cut = pk.parse(piece.ljust(60, b"\0"), plain)
            flow = (cut.src, cut.sport, cut.dport)
            if cut.proto == pk.TCP:
                self.streams.setdefault(flow, Stream()).add(cut)
            elif cut.proto == pk.UDP:
                self.datagrams.setdefault((cut.src, cut.sport), []).append(cut.payload)

    def streams_from(self, port: int) -> dict[bytes, list[bytes]]:
        """The whole streams that came from this port, by address."""
        found: dict[bytes, list[bytes]] = {}
        for (address, sport, _), stream in self.streams.items():
            if sport == port:
                found.setdefault(address, []).append(stream.whole())
        return found

    def datagrams_from(self, port: int) -> dict[bytes, list[bytes]]:
        """The datagrams that came from this port, by address, in order: whatever our ports were,
        for a kernel may choose the same one again."""
        found = self.datagrams.items()
        return {address: parts for (address, sport), parts in found if sport == port}

    def check_use(self, features: int, among: Iterable[int]) -> None:
        """Offloads agreed on were made use of, both ways, as far as they are `among` those that
        this traffic and this kernel can use."""
        usable = features & sum(among)
        large = {kind for kind in self.kinds if kind[0]}
        assert large == {kind for kind, bit in GSO_NEEDS.items() if usable & bit}
        assert self.kinds_sent - {0} == {kind for kind, bit in TAKES.items() if usable & bit}
        assert any(flags & pk.NEEDS_CSUM for flags in self.flags) == bool(features & GUEST_CSUM)
        assert any(flags & pk.NEEDS_CSUM for flags in self.flags_sent) == bool(features & CSUM)
