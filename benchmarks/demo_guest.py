"""demo_guest.py - what the guest of `make demo` does: look, ping, fetch, move data both ways.

Theory      Everything is done from here, with sockets: no program has to be installed. The guest is
            root in its namespace, so that it may open the raw socket a ping needs.
Errors      Exit status 1 when anything did not work, with a line that says what.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
import threading
import time
import urllib.request

from benchmarks.demo import HTTP_PORT, PAGE, SINK_PORT, SOURCE_PORT

STREAMS = 8
BYTES = 64 << 20
PINGS, PING_WAIT_S = 3, 2.0
ECHO_REPLY, ECHO_REQUEST = 0, 8


def gateway() -> str:
    """The router DHCP gave this guest: its address stands for the host's loopback."""
    from pyroute2 import IPRoute

    with IPRoute() as ip:
        for route in ip.get_default_routes(family=socket.AF_INET):
            return str(route.get_attr("RTA_GATEWAY"))
    raise SystemExit("guest  no default route: DHCP gave none")


def checksum(data: bytes) -> int:
    """Internet checksum (RFC 1071) of an even number of bytes."""
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


def echo(sock: socket.socket, number: int) -> float:
    """One echo request (RFC 792) and its reply; milliseconds. Raises TimeoutError."""
    rest = struct.pack("!HH", os.getpid() & 0xFFFF, number) + os.urandom(56)
    total = checksum(struct.pack("!BBH", ECHO_REQUEST, 0, 0) + rest)
    start_s = time.monotonic()
    sock.send(struct.pack("!BBH", ECHO_REQUEST, 0, total) + rest)
    while (left_s := start_s + PING_WAIT_S - time.monotonic()) > 0:
        sock.settimeout(left_s)
        packet = sock.recv(4096)
        message = packet[(packet[0] & 15) * 4 :]  # behind the IP header, which raw sockets show
        if message[:1] == bytes([ECHO_REPLY]) and message[4:] == rest:
            return (time.monotonic() - start_s) * 1e3
    raise TimeoutError


def ping(host: str) -> bool:
    """PINGS echo requests; True when every reply came, whole."""
    times_ms = []
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as sock:
        sock.connect((host, 0))
        for number in range(1, PINGS + 1):
            try:
                times_ms.append(echo(sock, number))
            except OSError as error:
                print(f"guest  ping {number} of {host}: {str(error) or 'no reply'}", flush=True)
    shown = "".join(f", {time_ms:.2f} ms" for time_ms in times_ms)
    print(f"guest  pinged {host}: {len(times_ms)} of {PINGS} replies{shown}", flush=True)
    return len(times_ms) == PINGS


def send(host: str) -> int:
    """One stream up; the bytes the host says it got."""
    with socket.create_connection((host, SINK_PORT)) as stream:
        chunk = bytes(1 << 18)
        for _ in range(BYTES // len(chunk)):
            stream.sendall(chunk)
        stream.shutdown(socket.SHUT_WR)
        return int(stream.makefile("r").readline())


def receive(host: str) -> int:
    """One stream down; the bytes that came."""
    with socket.create_connection((host, SOURCE_PORT)) as stream:
        stream.sendall(f"{BYTES}\n".encode())
        total = 0
        while data := stream.recv(1 << 18):
            total += len(data)
        return total


def parallel(name: str, host: str, task: object) -> bool:
    """STREAMS streams at once; True when every byte arrived."""
    moved: list[int] = []
    threads = [
        threading.Thread(target=lambda: moved.append(task(host)))  # type: ignore[operator]
        for _ in range(STREAMS)
    ]
    start_s = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken_s = time.monotonic() - start_s
    whole = moved == [BYTES] * STREAMS
    rate = sum(moved) * 8 / taken_s / 1e9
    print(
        f"guest  {STREAMS} streams {name}: {sum(moved) >> 20} MiB in {taken_s:.2f} s, "
        f"{rate:.2f} Gbit/s{'' if whole else ' - bytes are missing'}",
        flush=True,
    )
    return whole


def main() -> int:
    """0 when everything worked."""
    host = gateway()
    good = ping(host)
    with urllib.request.urlopen(f"http://{host}:{HTTP_PORT}/", timeout=30) as page:
        fetched = page.read()
    print(f"guest  fetched http://{host}:{HTTP_PORT}/: {len(fetched)} bytes", flush=True)
    good = good and fetched == PAGE
    good = parallel("up (guest to host)", host, send) and good
    return 0 if parallel("down (host to guest)", host, receive) and good else 1


if __name__ == "__main__":
    sys.exit(main())
