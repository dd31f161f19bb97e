"""scrape.py - the back-end's Prometheus text, as the tests read it.

Theory      An independent reader of the text exposition format, so that a test sees what a scraper
            would: samples by name and label set. Differences of two scrapes are what tests assert.
Limits      One HTTP/1.0 exchange, five seconds; exemplars and timestamps are not read.
"""

from __future__ import annotations

import re
import socket

TIMEOUT_S = 5

_SAMPLE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})?\s+(\S+)")
_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"')

Labels = frozenset[tuple[str, str]]


class Metrics:
    """One scrape. `before - after` are the differences of counters."""

    def __init__(self, samples: dict[tuple[str, Labels], float]) -> None:
        self.samples = samples

    def value(self, name: str, **labels: str | int) -> float:
        """The sum of the samples that carry these labels; KeyError if there is none."""
        wanted = {(label, str(value)) for label, value in labels.items()}
        found = [
            value
            for (sample, present), value in self.samples.items()
            if sample == name and wanted <= present
        ]
        if not found:
            raise KeyError(f"no sample {name} with {labels}")
        return sum(found)

    def __sub__(self, earlier: Metrics) -> Metrics:
        samples = self.samples.items()
        return Metrics({key: value - earlier.samples.get(key, 0) for key, value in samples})


def parse(text: str) -> Metrics:
    """Read the text exposition format; ValueError at a line that is not in it."""
    samples: dict[tuple[str, Labels], float] = {}
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        match = _SAMPLE.match(line)
        if match is None:
            raise ValueError(f"not a sample: {line!r}")
        name, labels, value = match.groups()
        samples[name, frozenset(_LABEL.findall(labels or ""))] = float(value)
    return Metrics(samples)


def scrape(connection: socket.socket, address: str, port: int) -> Metrics:
    """GET /metrics over a socket that is not connected yet; closes it."""
    with connection:
        connection.settimeout(TIMEOUT_S)
        connection.connect((address, port))
        connection.sendall(f"GET /metrics HTTP/1.0\r\nHost: {address}\r\n\r\n".encode())
        answer = b""
        while chunk := connection.recv(1 << 16):
            answer += chunk
    head, _, body = answer.partition(b"\r\n\r\n")
    if b" 200 " not in head.split(b"\r\n")[0]:
        raise ValueError(f"GET /metrics: {head[:200]!r}")
    return parse(body.decode())
