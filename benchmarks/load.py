"""load.py - the guest's part of a series: load on the back-end, one JSON line per event.

Usage       python -m benchmarks.load RUNS SECONDS KIND AMOUNT, inside `vhostmq guest`.
              tcp N   iperf3 with N streams, up and down in turn
              udp N   iperf3 with datagrams of N bytes as fast as they go, up and down in turn;
                      what counts is what arrives
              rr 1    requests and responses of echo.SIZE bytes on one connection
              crr 1   the same, a connection for each
Output      {"event": "begin"} before each run, {"event": "end", ...} after it: the host reads its
            back-end's processor time at both. {"event": "failed", ...} when the connection broke.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from typing import Any

from benchmarks.demo_guest import gateway
from benchmarks.echo import SIZE

LIMIT_S = 20
ECHO_PORTS = {"rr": 7001, "crr": 7002}
ANSWER_S = 5.0


def iperf3(host: str, direction: str, seconds: int, more: list[str]) -> dict[str, Any]:
    """One iperf3 run: the sums of its report, or {"error": why}."""
    command = ["iperf3", "-c", host, "-t", str(seconds), "-J", *more]
    if direction == "down":
        command.append("-R")
    result: dict[str, Any] = {}
    for _ in range(20):
        try:
            done = subprocess.run(command, capture_output=True, timeout=LIMIT_S, check=False)
        except subprocess.TimeoutExpired:
            return {"error": f"stuck for {LIMIT_S} s"}
        result = json.loads(done.stdout)
        if "busy" not in result.get("error", ""):
            break
        time.sleep(0.5)  # the server has not finished with the run before
    return result if "error" in result else dict(result["end"])


def tcp(host: str, direction: str, seconds: int, streams: int) -> dict[str, Any]:
    """Bytes the receiver got and how long that took."""
    end = iperf3(host, direction, seconds, ["-P", str(streams)])
    if "error" in end:
        return end
    received = end["sum_received"]
    return {"bytes": received["bytes"], "seconds": received["seconds"]}


def udp(host: str, direction: str, seconds: int, size: int) -> dict[str, Any]:
    """Datagrams that arrived and how long that took."""
    end = iperf3(host, direction, seconds, ["-u", "-b", "0", "-l", str(size)])
    if "error" in end:
        return end
    received = end.get("sum_received") or end["sum"]
    arrived = received["packets"] - received["lost_packets"]
    return {"datagrams": arrived, "seconds": received["seconds"]}


def connection(host: str, kind: str) -> socket.socket:
    """To the echo server."""
    sock = socket.create_connection((host, ECHO_PORTS[kind]), ANSWER_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def ask(sock: socket.socket, request: bytes) -> None:
    """One request and its whole response."""
    sock.sendall(request)
    missing = SIZE
    while missing:
        data = sock.recv(missing)
        if not data:
            raise OSError("the server hung up")
        missing -= len(data)


def transactions(host: str, kind: str, seconds: int) -> dict[str, Any]:
    """Requests and responses, one after another: how many, and how long each took."""
    request, took_us = bytes(SIZE), []
    start_s = time.perf_counter()
    try:
        sock = connection(host, "rr")
        while (now_s := time.perf_counter()) < start_s + seconds:
            if kind == "crr":
                sock.close()
                sock = connection(host, kind)
            ask(sock, request)
            if kind == "crr" and sock.recv(1):
                raise OSError("more than a response")
            took_us.append((time.perf_counter() - now_s) * 1e6)
        sock.close()
    except OSError as error:
        return {"error": str(error)}
    took_us.sort()
    return {
        "transactions": len(took_us),
        "seconds": time.perf_counter() - start_s,
        "p50_us": took_us[len(took_us) // 2],
        "p99_us": took_us[len(took_us) * 99 // 100],
    }


def run(host: str, kind: str, direction: str, seconds: int, amount: int) -> dict[str, Any]:
    """One run of any kind."""
    if kind == "tcp":
        return tcp(host, direction, seconds, amount)
    if kind == "udp":
        return udp(host, direction, seconds, amount)
    return transactions(host, kind, seconds)


def main() -> None:
    """All runs of a series."""
    runs, seconds, kind, amount = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    host = gateway()
    for _ in range(runs):
        for direction in ("up", "down") if kind in ("tcp", "udp") else ("both",):
            print(json.dumps({"event": "begin"}), flush=True)
            found = run(host, kind, direction, seconds, amount)
            event = "failed" if "error" in found else "end"
            print(json.dumps({"event": event, "direction": direction} | found), flush=True)


if __name__ == "__main__":
    main()
