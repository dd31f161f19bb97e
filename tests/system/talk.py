"""talk.py - one conversation between a guest and its host, every frame of it captured in the guest.

Theory      Both ends know beforehand what each says (contents are made from numbers), so each can
            tell what it should have got. TCP: small writes, a large one, then the same back.
            Datagrams: of many sizes, one by one and as trains (UDP_SEGMENT), each kind answered in
            kind, once into a socket that takes single datagrams and once into one with UDP_GRO.
            Echo requests of several sizes.
Capture     `python talk.py ADDRESS4 ADDRESS6 PORT FILE` is the guest's part. It opens a packet
            socket with PACKET_VNET_HDR first, whose buffer holds all there will be, and writes each
            frame to FILE in the end: type (0 to us, 4 from us), length, virtio-net header, frame.
            What it shows is what the TAP or virtio-net driver gave the kernel: a large frame
            uncut, an unfinished checksum unfinished, since nothing is put together (GRO) before.
Limits      Root in its network namespace; Linux 5.0 for UDP_SEGMENT and UDP_GRO.
Result      JSON on standard output: SHA-256 of what came, by name; frames the capture lost.
"""

from __future__ import annotations

import hashlib
import json
import random
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator

WRITES = (1, 2, 3, 100, 535, 1439, 1440, 1441, 1460, 1461, 3000, 300_000)
KINDS = (  # size of a datagram, how many in one go, size of one more behind them
    *((size, 1, 0) for size in (0, 1, 2, 17, 1000, 1452)),
    (64, 4, 0), (1200, 30, 0), (1200, 5, 7), (1, 64, 0), (1452, 2, 1451), (500, 64, 0), (9, 2, 0),
)  # fmt: skip
PINGS = (0, 1, 56, 1400)
UP, DOWN = 1, 2
UDP_SEGMENT, UDP_GRO = 103, 104
SOL_PACKET, PACKET_STATISTICS, PACKET_VNET_HDR, ETH_P_ALL = 263, 6, 15, 3
SO_RCVBUFFORCE = 33
CAPTURE_BYTES = 256 << 20
RECORD = struct.Struct("<BI")
WAIT_S = 10


def stream(direction: int) -> bytes:
    """All that goes one way on a connection."""
    return random.Random(direction).randbytes(sum(WRITES))


def datagrams(direction: int, number: int) -> list[bytes]:
    """The datagrams of KINDS[number] in one direction."""
    size, count, last = KINDS[number]
    rng = random.Random(100 * number + direction)
    return [rng.randbytes(each) for each in [size] * count + ([last] if last else [])]


def digest(parts: list[bytes]) -> str:
    """Of datagrams: borders count."""
    return hashlib.sha256(b"".join(struct.pack(">I", len(p)) + p for p in parts)).hexdigest()


def say(sock: socket.socket, direction: int) -> None:
    """A stream in writes of their own sizes."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    data, at = stream(direction), 0
    for size in WRITES:
        sock.sendall(data[at : at + size])
        at += size
    sock.shutdown(socket.SHUT_WR)


def hear(sock: socket.socket) -> bytes:
    """All until the other end has finished."""
    return b"".join(iter(lambda: sock.recv(1 << 16), b""))


def send_kind(sock: socket.socket, direction: int, number: int, *to: object) -> None:
    """One system call."""
    parts = datagrams(direction, number)
    cut = struct.pack("H", KINDS[number][0])
    control = [(socket.IPPROTO_UDP, UDP_SEGMENT, cut)] if len(parts) > 1 else []
    sock.sendmsg([b"".join(parts)], control, 0, *to)


def receive(sock: socket.socket) -> Iterator[tuple[bytes, tuple]]:
    """Datagrams, one by one, with their sender."""
    while True:
        data, control, _, sender = sock.recvmsg(1 << 16, 64)
        size = len(data)
        for level, kind, value in control:
            if (level, kind) == (socket.IPPROTO_UDP, UDP_GRO):
                (size,) = struct.unpack("i", value[:4])
        for at in range(0, max(len(data), 1), max(size, 1)):
            yield data[at : at + size], sender


class Host:
    """The host's part, on bound sockets (stream, datagram) of one family; what it was given."""

    def __init__(self, listener: socket.socket, udp: socket.socket) -> None:
        self.streams: list[bytes] = []
        self.rounds: list[list[bytes]] = []
        self.sockets = (listener, udp)
        udp.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 8 << 20)
        listener.listen()
        for work in (self._serve_streams, self._serve_datagrams):
            threading.Thread(target=self._until_closed, args=(work,), daemon=True).start()

    def _until_closed(self, work: object) -> None:
        try:
            work()  # type: ignore[operator]
        except OSError:
            return

    def _serve_streams(self) -> None:
        while True:
            sock, _ = self.sockets[0].accept()
            with sock:
                sock.settimeout(WAIT_S)
                self.streams.append(hear(sock))
                say(sock, DOWN)

    def _serve_datagrams(self) -> None:
        source = receive(self.sockets[1])
        while True:
            self.rounds.append([])
            for number in range(len(KINDS)):
                for _ in datagrams(UP, number):
                    part, sender = next(source)
                    self.rounds[-1].append(part)
                send_kind(self.sockets[1], DOWN, number, sender)

    def close(self) -> None:
        """Stop serving."""
        for sock in self.sockets:
            sock.shutdown(socket.SHUT_RDWR) if sock.type == socket.SOCK_STREAM else None
            sock.close()


def converse(address: str, port: int) -> dict[str, str]:
    """The guest's part with one address; digests of what came."""
    found, family = {}, socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_connection((address, port), WAIT_S) as sock:
        say(sock, UP)
        found["stream"] = hashlib.sha256(hear(sock)).hexdigest()
    for gro in (0, 1):
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.settimeout(WAIT_S)
            sock.setsockopt(socket.IPPROTO_UDP, UDP_GRO, gro)
            sock.connect((address, port))
            got, source = [], receive(sock)
            for number in range(len(KINDS)):
                send_kind(sock, UP, number)
                got += [next(source)[0] for _ in datagrams(DOWN, number)]
        found[f"datagrams gro {gro}"] = digest(got)
    for size in PINGS:
        command = ["ping", "-q", "-c", "2", "-i", "0.02", "-W", "5", "-s", str(size), address]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return found


def expected() -> dict[str, str]:
    """What converse() returns when all is well."""
    parts = [part for number in range(len(KINDS)) for part in datagrams(DOWN, number)]
    datagram = digest(parts)
    names = {f"datagrams gro {gro}": datagram for gro in (0, 1)}
    return {"stream": hashlib.sha256(stream(DOWN)).hexdigest(), **names}


def capture(device: str) -> socket.socket:
    """A packet socket that keeps every frame from now on, virtio-net header in front."""
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, CAPTURE_BYTES)
    sock.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    sock.bind((device, ETH_P_ALL))
    sock.setblocking(False)
    return sock


def save(sock: socket.socket, file: str) -> int:
    """Write the capture; how many frames it lost."""
    with open(file, "wb") as output:
        while True:
            try:
                data, sender = sock.recvfrom(1 << 17)
            except BlockingIOError:
                break
            output.write(RECORD.pack(sender[2], len(data)) + data)
    return struct.unpack("II", sock.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))[1]


def captured(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(packet type, virtio-net header and frame) of each in a file."""
    at = 0
    while at < len(data):
        kind, size = RECORD.unpack_from(data, at)
        at += RECORD.size
        yield kind, data[at : at + size]
        at += size


def main(address4: str, address6: str, port: str, file: str) -> None:
    """The guest's part with both families."""
    sock = capture("eth0")
    found = {address: converse(address, int(port)) for address in (address4, address6)}
    print(json.dumps({"found": found, "lost": save(sock, file)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
