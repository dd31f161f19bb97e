"""test_differential.py - the same conversation with every feature taken away in turn, through a
real kernel, and what that kernel was given.

Theory      For each set of features the back-end runs with --features, and `vhostmq guest` talks to
            servers on the host (talk.py). The bytes must be the same at both ends in every run, and
            each frame that a capture inside the guest shows must be as agreed on (frames.py).
Limits      The guest's mover turns DATA_VALID into NEEDS_CSUM: a TAP does not know it.
"""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import packets as pk
import pytest
import talk
from backends import CHECKOUT, Backend, start_backend
from frames import Capture
from judge import GSO_NEEDS, Judge, agreed
from lab import GATEWAY4, GATEWAY6, Lab
from offload import TAKES

from control.features import SERVED
from control.front_end import USO, WANTED
from control.vhost_user import VirtioFeature

PORT = 7200
GATEWAYS = (GATEWAY4, GATEWAY6)
MTU = 1500
MSS = {4: MTU - 40, 16: MTU - 60}
FEATURES = ["", *(f"-{name}" for name in SERVED), "none"]
ALL = sum(SERVED.values())
TAKEN = WANTED | USO | VirtioFeature.MTU  # by `vhostmq guest`

pytestmark = pytest.mark.passt_lacks("most of the features")


@pytest.fixture(scope="module")
def hosts(lab: Lab) -> Iterator[list[talk.Host]]:
    """Servers on the host's loopback, which the gateway's addresses stand for."""
    made = []
    for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        sockets = [lab.socket("host", family, kind) for kind in (1, 2)]
        for sock in sockets:
            sock.bind((address, PORT))
        made.append(talk.Host(*sockets))
    yield made
    for host in made:
        host.close()


@pytest.fixture
def backend(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The back-end, with the features the test is about."""
    words = request.node.callspec.params["features"]
    backend = start_backend(lab, 1, *([f"--features={words}"] if words else []))
    yield backend
    backend.stop()


def converse(lab: Lab, backend: Backend) -> tuple[int, dict, bytes]:
    """A guest's part; what it agreed on with the back-end, what it found, what it captured."""
    file = lab.directory / "capture"
    script = Path(talk.__file__)
    command = [sys.executable, "-m", "control", "guest", "--socket", backend.vhost_socket]
    command += ["--mtu", str(MTU), "--", sys.executable, script, *GATEWAYS, str(PORT), file]
    guest = lab.start("host", command, "guest", cwd=CHECKOUT)
    guest.wait_end(60)
    lines = guest.log.read_text().splitlines()
    terms = next(line for line in lines if line.startswith("vhostmq guest: eth0"))
    names = terms.rpartition(", ")[2].lower().split()
    features = sum(bit for name, bit in SERVED.items() if name in names)
    return features, json.loads(lines[-1]), file.read_bytes()


@pytest.mark.parametrize("features", FEATURES)
def test_every_feature(lab: Lab, backend: Backend, hosts: list[talk.Host], features: str) -> None:
    """Same bytes, and frames as agreed on."""
    for host in hosts:
        host.streams.clear()
        host.rounds[:] = host.rounds[-1:]  # the round that has not begun
    got, result, data = converse(lab, backend)
    taken_away = {"": 0, "none": ALL}.get(features) or SERVED.get(features[1:], 0)
    assert got == agreed(ALL & TAKEN & ~taken_away)
    assert result == {"found": dict.fromkeys(GATEWAYS, talk.expected()), "lost": 0}
    up, down = (
        [part for number in range(len(talk.KINDS)) for part in talk.datagrams(way, number)]
        for way in (talk.UP, talk.DOWN)
    )
    for host in hosts:
        assert host.streams == [talk.stream(talk.UP)]
        assert host.rounds[:2] == [up, up]
    seen, both = Capture(Judge(got, MSS, MTU, raw=False)).read(data), list(map(pk.ip, GATEWAYS))
    assert seen.streams_from(PORT) == dict.fromkeys(both, [talk.stream(talk.DOWN)])
    assert seen.datagrams_from(PORT) == dict.fromkeys(both, down * 2)
    seen.check_use(got, [*GSO_NEEDS.values(), *TAKES.values()])
