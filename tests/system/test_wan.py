"""test_wan.py - a peer that is far away, beside a program of the host that talks to it directly.

Theory      `vhostmq guest` and, in turn with it, the host itself move the same bytes over a line
            of RTT_S. The guest's stack sees a back-end that acknowledges at once what the host's
            socket has taken: it is the host's TCP that fills the line. So a guest must need hardly
            longer than the host does, whatever its own window is.
            Segments of an ordinary size, and of one that fills a young socket's receive window.
Limits      One stream; the line (wan.py) has no other traffic and loses nothing.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator

import pytest
from backends import CHECKOUT, Backend
from lab import XFER_PORT, Lab
from traffic import MIB, check_transfers
from wan import Line

from benchmarks.guest.prepare import Images

QUEUES = 1
RTT_S = 0.05
SIZE = 24 * MIB
RUNS = 3


@pytest.fixture(scope="module", params=[1500, 65520], ids=["1500", "65520"])
def line(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Line]:
    """The long way to `far`."""
    line = Line(lab, request.param, RTT_S / 2)
    yield line
    line.close()


def took_s(output: str, direction: str) -> float:
    """Seconds of a transfer whose every byte is checked."""
    check_transfers(output, direction, SIZE, 1)
    return float(output.split()[5])


@pytest.mark.parametrize(
    ("direction", "address"), [("up", Line.far4), ("down", Line.far6)], ids=["up", "down"]
)
def test_as_fast_as_the_host(
    lab: Lab, images: Images, backend: Backend, line: Line, direction: str, address: str
) -> None:
    """Medians of runs that take turns: what the guest needs over what the host needs."""
    words = [str(images.bin / "xfer"), direction, address, str(XFER_PORT), str(SIZE), "1"]
    hosts, guests = [], []
    for seed in range(RUNS):
        done = lab.run("host", [*words, str(seed)])
        hosts.append(took_s(done.stdout, direction))
        command = [sys.executable, "-m", "control", "guest", "--socket", str(backend.vhost_socket)]
        guest = lab.start("host", [*command, "--", *words, str(seed)], "guest", cwd=CHECKOUT)
        guest.wait_end(60)
        guests.append(took_s(guest.log.read_text().splitlines()[-1], direction))
    host_s, guest_s = statistics.median(hosts), statistics.median(guests)
    print(f"{direction}: guest {guests}, host {hosts}")
    assert guest_s < 1.25 * host_s + RTT_S, f"guest {guests}, host {hosts}"
