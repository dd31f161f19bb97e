"""demo.py - `make demo`: a guest with four queue pairs behind `vhostmq run`, from lease to table.

Theory      Host side of the demo: an HTTP server and a TCP sink and source on the host's loopback,
            the back-end, and `vhostmq guest` running demo_guest.py. The guest reaches the host's
            loopback by its gateway's address. At the end the back-end's own metrics say which queue
            pair carried what.
Errors      Exit status 1 with one line when the machine does not allow namespaces or a TAP.
"""

from __future__ import annotations

import http.server
import socket
import socketserver
import sys
import threading

from benchmarks import lab

PAIRS = 4
HTTP_PORT, SINK_PORT, SOURCE_PORT = 8080, 8081, 8082
PAGE = b"hello from the host\n" * 50_000
CHUNK = bytes(1 << 16)
COLUMNS = (
    ("frames", "vhostmq_packets_total", 1),
    ("MB", "vhostmq_bytes_total", 1e6),
    ("kicks", "vhostmq_kicks_total", 1),
    ("calls", "vhostmq_calls_total", 1),
)


class Page(http.server.BaseHTTPRequestHandler):
    """One page of a megabyte."""

    def do_GET(self) -> None:
        """Answer."""
        self.send_response(200)
        self.send_header("Content-Length", str(len(PAGE)))
        self.end_headers()
        self.wfile.write(PAGE)

    def log_message(self, format: str, *args: object) -> None:
        """The demo prints its own lines."""


class Sink(socketserver.BaseRequestHandler):
    """Reads everything, then says how much that was."""

    def handle(self) -> None:
        """Serve one connection."""
        total = 0
        while data := self.request.recv(1 << 18):
            total += len(data)
        self.request.sendall(f"{total}\n".encode())


class Source(socketserver.BaseRequestHandler):
    """Sends as many bytes as it was asked for."""

    def handle(self) -> None:
        """Serve one connection."""
        left = int(self.request.makefile("r").readline())
        while left > 0:
            left -= self.request.send(CHUNK[: min(left, len(CHUNK))])


class Threads(socketserver.ThreadingTCPServer):
    """A thread per connection."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64


def serve(port: int, handler: type[socketserver.BaseRequestHandler]) -> None:
    """Serve on the host's loopback until the demo ends."""
    server = Threads(("127.0.0.1", port), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()


def table(samples: lab.Samples) -> None:
    """Print what each queue pair carried."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(title="per queue pair, from the back-end's metrics")
    shown.add_column("pair")
    for direction in ("tx", "rx"):
        for title, _, _ in COLUMNS:
            shown.add_column(f"{direction}\n{title}", justify="right")
    for pair in range(PAIRS):
        cells = [str(pair)]
        for direction in ("tx", "rx"):
            for _, name, unit in COLUMNS:
                value = lab.labelled(samples, name, queue=str(pair), direction=direction)
                cells.append(f"{value / unit:,.0f}")
        shown.add_row(*cells)
    Console().print(shown)
    print("tx is guest to host, rx is host to guest")
    frames = lab.labelled(samples, "vhostmq_handoff_frames_total")
    print(f"frames handed from one worker to another: {frames:,.0f}")


def main() -> int:
    """Run the demo; 0 when everything in it worked."""
    try:
        lab.enter("benchmarks.demo")
        with lab.Lab() as room:
            for port, handler in ((HTTP_PORT, Page), (SINK_PORT, Sink), (SOURCE_PORT, Source)):
                serve(port, handler)
            room.backend(PAIRS, 2)
            print(f"host   vhostmq run --socket {room.socket} --queues {PAIRS} --workers 2")
            print(
                f"host   vhostmq guest --socket {room.socket} --queues {PAIRS} -- ...", flush=True
            )
            status = room.guest(PAIRS, sys.executable, "-m", "benchmarks.demo_guest")
            if status == 0:
                table(lab.scrape())
            return status
    except lab.LabError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    socket.setdefaulttimeout(60)
    sys.exit(main())
