"""test_differential.py - the same conversation with every feature taken away in turn, through a
real kernel, and what that kernel was given.

Theory      For each set of features the back-end runs with --features, and `vhostmq guest` talks to
            servers on the host (talk.py). The bytes must be the same at both ends in every run. A
            capture inside the guest has each frame with its virtio-net header; the judge of the
            unit tests (tests/judge.py) holds them against what was agreed on, and streams and
            datagrams are put together from them once more, apart from the guest's kernel.
What is     The TAP stands between rings and kernel. It keeps checksum and segmentation fields, but
hidden      refuses a frame whose fields contradict each other, and the guest's mover has turned
            DATA_VALID into NEEDS_CSUM; hdr_len is the kernel's own. tests/test_differential.py
            sees the rings themselves.
"""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import packets as pk
import pytest
import talk
from backends import CHECKOUT, Backend, start_backend
from driver import CSUM, GUEST_CSUM
from judge import GSO_NEEDS, Judge, Stream, agreed
from lab import GATEWAY4, GATEWAY6, Lab
from offload import TAKES, lower
from packets import VnetHeader

from control.features import SERVED
from control.front_end import USO, WANTED
from control.vhost_user import VirtioFeature

PORT = 7200
GATEWAYS = (GATEWAY4, GATEWAY6)
MTU = 1500
MSS = {4: MTU - 40, 16: MTU - 60}
TO_US, FROM_US = 0, 4
FEATURES = ["", *(f"-{name}" for name in SERVED), "none"]
ALL = sum(SERVED.values())
TAKEN = WANTED | USO | VirtioFeature.MTU  # by `vhostmq guest`

pytestmark = pytest.mark.passt_lacks("most of the features")


@dataclass
class Frame:
    """One captured frame."""

    header: VnetHeader
    frame: bytes
    from_us: bool


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


def converse(lab: Lab, backend: Backend) -> tuple[int, dict, list[Frame]]:
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
    frames = []
    for kind, data in talk.captured(file.read_bytes()):
        fields = pk.VNET_HDR.unpack(data[:10] + b"\1\0")
        frames.append(Frame(VnetHeader(*fields), data[10:], kind == FROM_US))
    return features, json.loads(lines[-1]), frames


@pytest.mark.parametrize("features", FEATURES)
def test_every_feature(lab: Lab, backend: Backend, hosts: list[talk.Host], features: str) -> None:
    """Same bytes, and frames as agreed on."""
    for host in hosts:
        host.streams.clear()
        host.rounds[:] = host.rounds[-1:]  # the round that has not begun
    got, result, frames = converse(lab, backend)
    taken_away = {"": 0, "none": ALL}.get(features) or SERVED.get(features[1:], 0)
    assert got == agreed(ALL & TAKEN & ~taken_away)
    assert result == {"found": dict.fromkeys(GATEWAYS, talk.expected()), "lost": 0}
    sent = [part for number in range(len(talk.KINDS)) for part in talk.datagrams(1, number)]
    for host in hosts:
        assert host.streams == [talk.stream(talk.UP)]
        assert host.rounds[:2] == [sent, sent]
    check_received(got, [one for one in frames if not one.from_us])
    check_sent(got, [one for one in frames if one.from_us])


def check_received(features: int, frames: list[Frame]) -> None:
    """What the guest was given: judged, put together, and made full use of."""
    judge = Judge(features, MSS, MTU, raw=False)
    streams: dict[bytes, Stream] = {}
    datagrams: dict[bytes, list[bytes]] = {}
    kinds = set()
    for one in frames:
        packet = judge.look(one.header, one.frame)
        kinds.add((one.header.gso_type, len(packet.src)))
        for plain, piece in lower(one.header, one.frame):
            cut = pk.parse(piece.ljust(60, b"\0"), plain)
            if cut.sport == PORT and cut.proto == pk.TCP:
                streams.setdefault(cut.src, Stream()).add(cut)
            elif cut.sport == PORT:
                datagrams.setdefault(cut.src, []).append(cut.payload)
    answers = [part for number in range(len(talk.KINDS)) for part in talk.datagrams(2, number)]
    gateways = set(map(pk.ip, GATEWAYS))
    assert {src: one.whole() for src, one in streams.items()} == dict.fromkeys(
        gateways, talk.stream(talk.DOWN)
    )
    assert datagrams == dict.fromkeys(gateways, answers * 2)
    assert {kind for kind in kinds if kind[0]} == {
        kind for kind, bit in GSO_NEEDS.items() if features & bit
    }
    assert any(one.header.flags & pk.NEEDS_CSUM for one in frames) == bool(features & GUEST_CSUM)


def check_sent(features: int, frames: list[Frame]) -> None:
    """The guest's kernel made use of the host's offloads, as far as they were agreed on."""
    kinds = {one.header.gso_type & ~pk.GSO_ECN for one in frames} - {0}
    assert kinds == {kind for kind, bit in TAKES.items() if features & bit}
    unfinished = any(one.header.flags & pk.NEEDS_CSUM for one in frames)
    assert unfinished == bool(features & CSUM)
