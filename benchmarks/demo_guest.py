"""demo_guest.py - what the guest of `make demo` does: look, ping, fetch, move data both ways."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request

from benchmarks.demo import HTTP_PORT, PAGE, SINK_PORT, SOURCE_PORT

STREAMS = 8
BYTES = 64 << 20


def gateway() -> str:
    """The router DHCP gave this guest: its address stands for the host's loopback."""
    from pyroute2 import IPRoute

    with IPRoute() as ip:
        for route in ip.get_default_routes(family=socket.AF_INET):
            return str(route.get_attr("RTA_GATEWAY"))
    raise SystemExit("guest  no default route: DHCP gave none")


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
    host, good = gateway(), True
    if shutil.which("ping"):
        status = subprocess.run(["ping", "-c", "3", "-i", "0.2", host], check=False).returncode
        good = good and status == 0
    else:
        print("guest  not tested: ping is not installed here (Debian: iputils-ping)")
    with urllib.request.urlopen(f"http://{host}:{HTTP_PORT}/", timeout=30) as page:
        fetched = page.read()
    print(f"guest  fetched http://{host}:{HTTP_PORT}/: {len(fetched)} bytes", flush=True)
    good = good and fetched == PAGE
    good = parallel("up (guest to host)", host, send) and good
    return 0 if parallel("down (host to guest)", host, receive) and good else 1


if __name__ == "__main__":
    sys.exit(main())
