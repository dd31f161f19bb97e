"""echo.py - the host's part of the request/response series: every request of SIZE bytes comes back.

Usage       python -m benchmarks.echo ADDRESS PORT [once]; says "listening" on standard output. With
            `once` a connection is closed after its first response: the side that closes first keeps
            the port for a minute, and 28 000 ports of a client last for ten seconds.
Limits      One thread: a request is smaller than any socket buffer, so nothing here ever waits.
"""

from __future__ import annotations

import selectors
import socket
import sys

SIZE = 64


def main() -> None:
    """Serve until killed."""
    server = socket.create_server((sys.argv[1], int(sys.argv[2])), backlog=1024)
    server.setblocking(False)
    once = "once" in sys.argv[3:]
    selector = selectors.DefaultSelector()
    selector.register(server, selectors.EVENT_READ)
    print("listening", flush=True)
    while True:
        for key, _ in selector.select():
            sock = key.fileobj
            assert isinstance(sock, socket.socket)
            if sock is server:
                client, _ = server.accept()
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                selector.register(client, selectors.EVENT_READ)
                continue
            try:
                data = sock.recv(SIZE)
                if data:
                    sock.send(data)
                    if not once:
                        continue
            except OSError:
                pass
            selector.unregister(sock)
            sock.close()


if __name__ == "__main__":
    main()
