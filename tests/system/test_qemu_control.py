"""test_qemu_control.py - control dies, and the whole back-end, while QEMU and a guest are at work.

Theory      QEMU tries to connect again (`reconnect=`), as an operator would have it. A control that
            takes the place of one that died goes on with the front-end where it was; one that died
            over a message of the front-end hangs up, and QEMU negotiates everything anew while the
            guest's connections live. When the guard is killed nobody is left: a service manager
            starts `vhostmq run` again, and the guest, which has noticed nothing but that its
            connections ended, opens new ones.
Limits      The sizes are an emulated guest's.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest
from backends import Backend, start_backend
from lab import PEER4, PEER6, Lab
from traffic import MIB, Rounds, keep_pairs_on_cpus, smoke, transfer

from benchmarks import measure
from benchmarks.guest.guests import QemuGuest
from benchmarks.guest.prepare import Images

QUEUES, WORKERS = 4, 2  # fewer than pairs, whatever the CPUs
STREAMS, SIZE = 8, 1 * MIB
KILLS, KILL_EVERY_S = 4, 4.0  # sooner again, and the guard would wait longer each time
RECONNECT_S = 1
AGAIN_MAX_S = 30
PEERS = (PEER4, PEER6)
GONE, BACK = "front-end gone", "control is back"
STILL, ANEW = f"{BACK}, the front-end still connected", "which must connect again"

pytestmark = pytest.mark.passt_lacks("workers and queue pairs")


@pytest.fixture(scope="module")
def guest(lab: Lab, images: Images, backend: Backend) -> Iterator[QemuGuest]:
    """On the network, and its front-end connects again."""
    guest = QemuGuest(lab, images, backend.vhost_socket, backend.queues, reconnect_s=RECONNECT_S)
    guest.start()
    guest.join_network()
    keep_pairs_on_cpus(guest, QUEUES)
    yield guest
    guest.close()


def kill_control(backend: Backend) -> None:
    os.kill(measure.control(backend.process.pid), signal.SIGKILL)


def said(backend: Backend) -> dict[str, int]:
    """How often the back-end has said what."""
    log = backend.process.log.read_text()
    return {words: log.count(words) for words in (GONE, BACK, STILL, ANEW)}


@pytest.mark.parametrize("peer", PEERS, ids=["ipv4", "ipv6"])
def test_control_is_killed(backend: Backend, guest: QemuGuest, peer: str) -> None:
    """Every few seconds, while the front-end has nothing to say: it notices nothing, and every
    transfer is whole."""
    before = said(backend)
    rounds = Rounds(guest, peer, SIZE, STREAMS)
    for _ in range(KILLS):
        time.sleep(KILL_EVERY_S)
        kill_control(backend)
    time.sleep(KILL_EVERY_S)
    rounds.end()
    after = said(backend)
    assert after[STILL] - before[STILL] == KILLS
    assert after[GONE] == before[GONE]


def test_control_is_killed_over_messages(
    backend: Backend, guest: QemuGuest, tell: Callable[[str], None]
) -> None:
    """While `ethtool -L` has the front-end speak all the time: whether control died over a message
    or between two, every transfer is whole."""
    combined = f"ethtool -L {guest.interface} combined"
    before = said(backend)
    rounds = Rounds(guest, PEER4, SIZE, STREAMS)
    guest.check("rm -f /tmp/flapped")
    once = f"{combined} 1 && {combined} {QUEUES} && echo flap || exit 1"
    flapping = guest.start_job(f"renice -n -20 $$; while [ ! -e /tmp/flapped ]; do {once}; done")
    for _ in range(KILLS):
        time.sleep(KILL_EVERY_S)
        kill_control(backend)
    time.sleep(KILL_EVERY_S)
    guest.check("touch /tmp/flapped")
    result = guest.wait_job(flapping)
    assert result.status == 0, result.output
    rounds.end()
    after = said(backend)
    grown = {words: after[words] - before[words] for words in after}
    assert grown[BACK] == KILLS
    assert grown[STILL] + grown[ANEW] == KILLS
    tell(f"of {KILLS} deaths of control {grown[ANEW]} over a message")
    smoke(guest, PEERS)


def test_everything_is_killed(lab: Lab, backend: Backend, guest: QemuGuest) -> None:
    """And started again, as a service manager would: the guest has its network back, and nobody
    has done anything to it."""
    os.kill(backend.process.pid, signal.SIGKILL)
    backend.process.popen.wait(10)
    again = start_backend(lab, QUEUES, "--workers", str(WORKERS))
    backend.process = again.process
    deadline_s = time.monotonic() + AGAIN_MAX_S
    while guest.run(f"ping -c 1 -W 1 {PEER4}").status:
        assert time.monotonic() < deadline_s, f"no network:\n{backend.process.tail()}"
    smoke(guest, PEERS)
    for peer in PEERS:
        for direction in ("up", "down"):
            transfer(guest, direction, peer, 4 * MIB, STREAMS)
