"""names.py - the DNS server of the tests: one name, an IPv4 and an IPv6 address.

Theory      A thread per socket answers A and AAAA questions for the name and NXDOMAIN for any other
            (RFC 1035 section 4). It counts what it answered, so that a test can tell an answer that
            crossed the network from one invented on the way.
Limits      One question a message, UDP only.
"""

from __future__ import annotations

import socket
import struct
import threading
from ipaddress import ip_address

TYPE_A, TYPE_AAAA, CLASS_IN = 1, 28, 1
FLAGS_ANSWER, NXDOMAIN = 0x8580, 3  # QR, AA, RD, RA


class NameServer:
    """Serves on bound UDP sockets until close()."""

    def __init__(self, name: str, addresses: tuple[str, str], sockets: list[socket.socket]) -> None:
        self.name, self.sockets, self.answered = name, sockets, 0
        self.records = {TYPE_A: addresses[0], TYPE_AAAA: addresses[1]}
        for sock in sockets:
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        while True:
            try:
                query, client = sock.recvfrom(512)
            except OSError:
                return  # close() shut it down
            if len(query) > 16:
                sock.sendto(self.answer(query), client)
                self.answered += 1

    def answer(self, query: bytes) -> bytes:
        """The answer to one question."""
        labels, position = [], 12
        while query[position]:
            end = position + 1 + query[position]
            labels.append(query[position + 1 : end].decode())
            position = end
        question = query[12 : position + 5]
        (kind,) = struct.unpack_from("!H", query, position + 1)
        known = ".".join(labels).lower() == self.name
        record = b""
        if known and kind in self.records:
            data = ip_address(self.records[kind]).packed
            record = struct.pack("!HHHIH", 0xC00C, kind, CLASS_IN, 60, len(data)) + data
        flags = FLAGS_ANSWER | (0 if known else NXDOMAIN)
        header = query[:2] + struct.pack("!HHHHH", flags, 1, bool(record), 0, 0)
        return header + question + record

    def close(self) -> None:
        """Stop serving."""
        for sock in self.sockets:
            sock.close()
