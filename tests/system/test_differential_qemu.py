"""test_differential_qemu.py - features taken away by the VMM, and a capture inside its guest.

Theory      QEMU starts anew for each set of device properties, against one back-end. The guest's
            own driver then agrees on what is left: streams both ways and datagrams, checked by
            digest (xfer.c); each frame that capture.c shows must be as agreed on (frames.py), and
            the streams put together from them have the same digests. GRO is off, or the kernel
            would show its own large frames.
Inconsistent  `guest_csum=off` alone leaves GUEST_TSO4/6 on offer: the VMM's own sets lack what they
            need, and the back-end has to ignore the rest.
Limits      QEMU 7.2 and Linux 6.1 know no USO.
"""

from __future__ import annotations

import hashlib
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import packets as pk
import pytest
from backends import Backend
from driver import GUEST_TSO4, GUEST_TSO6, HOST_TSO4, HOST_TSO6
from frames import Capture
from judge import Judge, agreed
from lab import GATEWAY4, GATEWAY6, XFER_PORT, Lab
from talk import RECORD
from traffic import check_transfers

from benchmarks.guest.guests import QemuGuest
from benchmarks.guest.prepare import Images
from control.features import SERVED

QUEUES = 1
FERRY_PORT = 7300
MTU = 1500
SIZES = (0, 1, 100, 1000, 1452)
STREAM_BYTES = 200_000
TSO = (GUEST_TSO4, GUEST_TSO6, HOST_TSO4, HOST_TSO6)
PROPERTIES = {
    "all": "packed=on",
    "small": "guest_tso4=off,guest_tso6=off,mrg_rxbuf=off,event_idx=off,host_tso4=off",
    "inconsistent": "csum=off,guest_csum=off,indirect_desc=off",
}

pytestmark = pytest.mark.passt_lacks("most of the features")


class TunedGuest(QemuGuest):
    """A guest whose network device has these properties, too."""

    properties = ""

    def _command(self, agent: Path) -> list[str]:
        *words, device = super()._command(agent)
        return [*words, f"{device},{self.properties}"]


@pytest.fixture
def guest(
    lab: Lab, images: Images, backend: Backend, request: pytest.FixtureRequest
) -> Iterator[TunedGuest]:
    """A booted guest on the network, with GRO off and an MTU at which offloads matter."""
    guest = TunedGuest(lab, images, backend.vhost_socket, QUEUES)
    guest.properties = PROPERTIES[request.node.callspec.params["name"]]
    guest.start()
    guest.join_network()
    guest.check(f"ip link set eth0 mtu {MTU}; ethtool -K eth0 gro off")
    yield guest
    guest.close()


@pytest.fixture(scope="module")
def program(lab: Lab) -> Path:
    """capture.c, compiled to run anywhere."""
    made = lab.directory / "capture"
    source = Path(__file__).with_name("capture.c")
    command = ["gcc", "-O2", "-static", "-Wall", "-Wextra", "-o", made, source]
    subprocess.run(command, check=True, timeout=60)
    return made


def ferry(lab: Lab, guest: TunedGuest, command: str, data: bytes | None = None) -> bytes:
    """Run a command with `nc` in the guest that takes `data`, or gives what is returned."""
    listener = lab.socket("host", socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", FERRY_PORT))
    listener.listen()
    listener.settimeout(20)
    got = bytearray()

    def serve() -> None:
        connection = listener.accept()[0]
        with connection:
            connection.settimeout(20)
            if data is not None:
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(1 << 18):
                got.extend(part)

    thread = Thread(target=serve, daemon=True)
    thread.start()
    guest.check(f"nc {GATEWAY4} {FERRY_PORT} {command}")
    thread.join()
    listener.close()
    return bytes(got)


def captured(lab: Lab, guest: TunedGuest, program: Path) -> tuple[bytes, dict[str, list[str]]]:
    """The capture of a conversation with both gateways; the digests that xfer printed for each."""
    ferry(lab, guest, "</dev/null >/tmp/capture", program.read_bytes())
    guest.check("chmod +x /tmp/capture; /tmp/capture eth0 /tmp/frames >/tmp/log 2>&1 &")
    guest.check(
        "for i in $(seq 100); do grep -q ready /tmp/log && exit; usleep 50000; done; exit 1"
    )
    digests: dict[str, list[str]] = {}
    for address in (GATEWAY4, GATEWAY6):
        for way in ("up", "down"):
            shown = guest.check(f"xfer {way} {address} {XFER_PORT} {STREAM_BYTES} 1 7")
            check_transfers(shown, way, STREAM_BYTES, 1)
            digests.setdefault(address, []).append(shown.split()[3])
        for size in SIZES:
            guest.check(f"xfer udp {address} {XFER_PORT} 5 {size}")
        guest.check(f"ping -c 2 -i 0.1 -W 5 -s 1000 {address}")
    guest.check("kill $(pidof capture); while pidof capture; do usleep 20000; done")
    assert guest.check("cat /tmp/log").split() == ["ready", "lost", "0"]
    data = ferry(lab, guest, "</tmp/frames")
    assert guest.check("sha256sum </tmp/frames").split()[0] == hashlib.sha256(data).hexdigest()
    return data, digests


@pytest.mark.parametrize("name", PROPERTIES)
def test_properties(lab: Lab, guest: TunedGuest, program: Path, name: str) -> None:
    """Same bytes, and frames as agreed on."""
    bits = guest.check("cat /sys/class/net/eth0/device/features").strip()
    acked = sum(1 << at for at, bit in enumerate(bits) if bit == "1")
    features = agreed(acked & sum(SERVED.values()))
    if name == "inconsistent":
        assert acked & GUEST_TSO4 and not features & GUEST_TSO4, f"the driver took {acked:#x}"
    data, digests = captured(lab, guest, program)
    judge = Judge(features, {4: MTU - 40, 16: MTU - 60}, MTU, raw=False)
    seen = Capture(judge).read(data)
    streams, datagrams = seen.streams_from(XFER_PORT), seen.datagrams_from(XFER_PORT)
    for address, (up, down) in digests.items():
        answer, stream = sorted(streams[pk.ip(address)], key=len)
        digest = answer[: hashlib.sha256().digest_size]  # then its longest stall
        assert digest.hex() == up, "the host's digest of what the guest sent"
        assert hashlib.sha256(stream[:STREAM_BYTES]).hexdigest() == down
        assert stream[STREAM_BYTES:].hex() == down
        assert list(map(len, datagrams[pk.ip(address)])) == [n for n in SIZES for _ in range(5)]
    seen.check_use(features, TSO)


def test_datagrams_are_in_order_though_a_port_is_chosen_again() -> None:
    """A kernel takes any free port: a later conversation may have an earlier one's."""
    sent = [(4000, b"first"), (5000, b"second"), (4000, b"third")]
    data, host, ours = b"", pk.ip(GATEWAY4), pk.ip("192.0.2.2")
    for port, payload in sent:
        packet = pk.ip_packet(host, ours, pk.UDP, pk.udp(host, ours, XFER_PORT, port, payload))
        frame = pk.ip_frame((bytes(6), bytes(6)), packet).ljust(60, b"\0")
        data += RECORD.pack(0, 10 + len(frame)) + bytes(10) + frame
    seen = Capture(Judge(0, {}, MTU, raw=False)).read(data)
    assert seen.datagrams_from(XFER_PORT) == {host: [payload for _, payload in sent]}
    assert seen.datagrams_from(XFER_PORT + 1) == {}
