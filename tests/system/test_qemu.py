"""test_qemu.py - a Debian kernel in QEMU (TCG) with four queue pairs, through `vhostmq run`.

Theory      One back-end process serves the whole module: a guest that boots, works, changes its
            number of queue pairs, reboots, is killed and comes back with other features. The tests
            run in this order and share the guest; each leaves it on the network.
Limits      The sizes are the issue's: 8 streams of 32 MiB each way over IPv4 and IPv6.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from ipaddress import ip_address, ip_interface

import pytest
from backends import GUEST_PORT, Backend
from lab import DNS_NAME, GATEWAY4, GATEWAY6, HOST4, HOST6, PEER4, PEER6, XFER_PORT, Lab
from names import NameServer
from traffic import MIB, PairCounters, check_transfers, keep_pairs_on_cpus, smoke, transfer

from benchmarks import measure
from benchmarks.guest.guests import RING_PACKED, Network, QemuGuest
from benchmarks.guest.prepare import Images

QUEUES = 4
PEERS = (PEER4, PEER6)

each_family = pytest.mark.parametrize("peer", PEERS, ids=["ipv4", "ipv6"])
each_direction = pytest.mark.parametrize("direction", ["up", "down"])


@pytest.fixture(scope="module")
def guest(lab: Lab, images: Images, backend: Backend) -> Iterator[QemuGuest]:
    """The booted guest, not yet on the network."""
    guest = QemuGuest(lab, images, backend.vhost_socket, backend.queues)
    guest.start()
    yield guest
    guest.close()


@pytest.fixture(scope="module")
def network(guest: QemuGuest) -> Network:
    """The guest's lease and addresses."""
    return guest.join_network()


def test_dhcp_lease(network: Network) -> None:
    """The lease is complete and the router is in the leased subnet."""
    lease = network.lease
    subnet = ip_interface(f"{lease['address']}/{lease['prefix']}").network
    assert ip_address(network.router) in subnet
    assert ip_address(lease["server"])
    assert int(lease["lease_s"]) > 0
    assert network.dns == [PEER4], "the host's name server is the guest's"


def test_ipv6_address(network: Network) -> None:
    """A global address of the host's prefix, and a router that is link-local."""
    assert ip_address(network.address6) in ip_interface(f"{HOST6}/64").network
    assert ip_address(network.router6).is_link_local


@pytest.mark.usefixtures("network")
@each_family
def test_ping(guest: QemuGuest, peer: str) -> None:
    """Echo requests of several sizes come back from beyond the back-end."""
    for size in (0, 56, 1400):
        guest.check(f"ping -c 3 -i 0.2 -W 2 -s {size} {peer}")


@pytest.mark.usefixtures("network")
@pytest.mark.parametrize("server", PEERS, ids=["ipv4", "ipv6"])
def test_dns(guest: QemuGuest, names: NameServer, server: str) -> None:
    """Both records come from the name server, asked over either family."""
    before = names.answered
    answer = guest.check(f"nslookup {DNS_NAME} {server}")
    assert PEER4 in answer and PEER6 in answer
    assert names.answered > before


@pytest.mark.passt_defect("resets a slow guest's connections now and then")
@pytest.mark.usefixtures("network")
@each_direction
@each_family
def test_eight_parallel_transfers(guest: QemuGuest, direction: str, peer: str) -> None:
    """8 x 32 MiB at a time, every stream's SHA-256 equal at both ends."""
    transfer(guest, direction, peer, 32 * MIB, streams=8, timeout_s=120)


@pytest.mark.usefixtures("network")
@each_family
def test_udp_echo(guest: QemuGuest, peer: str) -> None:
    """Datagrams come back unchanged, none lost in lockstep."""
    for size in (1, 512, 1400):
        guest.check(f"xfer udp {peer} {XFER_PORT} 100 {size}")


@pytest.mark.usefixtures("network")
def test_neighbour_on_the_hosts_link(lab: Lab, guest: QemuGuest) -> None:
    """A link-local address of the host's link is reached through the host's interface."""
    words = lab.run(
        "far", ["ip", "-o", "-6", "address", "show", "dev", "downlink", "scope", "link"]
    )
    neighbour = f"{words.stdout.split()[3].partition('/')[0]}%{guest.interface}"
    guest.check(f"ping -c 3 -i 0.2 -W 2 {neighbour}")
    smoke(guest, (neighbour,))


@pytest.mark.usefixtures("network")
@pytest.mark.parametrize("gateway", [GATEWAY4, GATEWAY6], ids=["ipv4", "ipv6"])
def test_gateway_is_the_hosts_loopback(guest: QemuGuest, gateway: str) -> None:
    """The gateway's address leads to servers on the host's loopback."""
    smoke(guest, (gateway,))


@pytest.mark.passt_defect(
    "resets a slow guest's connections; forwards only to the address it gives by DHCPv6"
)
@pytest.mark.usefixtures("network")
@pytest.mark.parametrize(
    ("role", "address"),
    [("host", "127.0.0.1"), ("host", "::1"), ("far", HOST4), ("far", HOST6)],
)
def test_host_to_guest(lab: Lab, images: Images, guest: QemuGuest, role: str, address: str) -> None:
    """Forwarded ports (-t, -u): from the host itself and from outside, TCP both ways and UDP."""
    if guest.run("pidof xfer").status:
        guest.serve_xfer(GUEST_PORT)
    client = [images.bin / "xfer"]
    for direction in ("up", "down"):
        command = [*client, direction, address, str(GUEST_PORT), str(8 * MIB), "4", "3"]
        check_transfers(lab.run(role, command).stdout, direction, 8 * MIB, 4)
    lab.run(role, [*client, "udp", address, str(GUEST_PORT), "100", "1000"])


@pytest.mark.usefixtures("network")
def test_answers_come_back_on_the_pair(backend: Backend, guest: QemuGuest, pairs: int) -> None:
    """Every pair carries packets both ways, and a flow is answered on the pair it sends on."""
    assert_pairs_answer(backend, guest, pairs)


def assert_pairs_answer(backend: Backend, guest: QemuGuest, pairs: int) -> None:
    """One flow at a time, pinned to a pair; next to nothing may move on any other pair.

    One at a time because Linux itself strays when flows compete: a delayed acknowledgement may be
    sent by another CPU's timer, and then the answer has to follow it.
    """
    keep_pairs_on_cpus(guest, pairs)
    for pair in range(pairs):
        for peer in PEERS:
            for verb in (
                f"down {peer} {XFER_PORT} {32 * MIB} 1 {pair}",
                f"udp {peer} {XFER_PORT} 200 99",
            ):
                counters = PairCounters(backend, guest, pairs)
                guest.check(f"taskset {1 << pair:x} xfer {verb}")
                for direction in ("tx", "rx"):
                    for source, carried in counters.since("packets", direction).items():
                        others = sum(carried) - carried[pair]
                        text = f"xfer {verb} on pair {pair}: {source} has {direction} {carried}"
                        assert others <= 5 + carried[pair] // 10, text
                        assert carried[pair] > 10, text


@pytest.mark.usefixtures("network")
def test_queue_pairs_change_under_traffic(backend: Backend, guest: QemuGuest, pairs: int) -> None:
    """`ethtool -L` to one pair and back: no flow breaks, and only enabled pairs carry packets."""
    streams, size = 4, 8 * MIB
    ways = [(direction, peer) for direction in ("down", "up") for peer in PEERS]
    body = " && ".join(f"xfer {way} {peer} {XFER_PORT} {size} {streams} 9" for way, peer in ways)
    guest.check("rm -f /tmp/enough")
    job = guest.start_job(f"while [ ! -e /tmp/enough ]; do {body} || exit 1; done")
    time.sleep(1)
    for enabled in (1, pairs):
        guest.check(f"ethtool -L {guest.interface} combined {enabled}")
        time.sleep(0.5)  # what was in flight in the rings of other pairs has been counted by now
        counters = PairCounters(backend, guest, pairs)
        time.sleep(1)
        for direction in ("tx", "rx"):
            for source, carried in counters.since("packets", direction).items():
                text = f"{enabled} pairs enabled: {source} has {direction} {carried}"
                assert sum(carried[:enabled]) > 0 and not any(carried[enabled:]), text
    guest.check("touch /tmp/enough")
    result = guest.wait_job(job)
    assert result.status == 0, result.output
    lines = result.output.splitlines()
    for number, start in enumerate(range(0, len(lines), streams)):
        direction, _ = ways[number % len(ways)]
        check_transfers("\n".join(lines[start : start + streams]), direction, size, streams)
    assert_pairs_answer(backend, guest, pairs)


HOPS = (
    "while [ ! -e /tmp/enough ]; do for mask in 1 2 4 8; do for id in $(pidof xfer); do "
    "taskset -p $mask $id; mask=$(( mask == 8 ? 1 : 2 * mask )); done; sleep 0.1; done; done"
)


@pytest.mark.usefixtures("network")
def test_flows_follow_their_threads(backend: Backend, guest: QemuGuest, pairs: int) -> None:
    """32 transfers whose processes go to another CPU, and so to another pair, every 100 ms: all
    arrive whole, and flows move between workers."""
    keep_pairs_on_cpus(guest, pairs)
    before = backend.metrics()
    guest.check("rm -f /tmp/enough")
    hopping = guest.start_job(HOPS)
    for direction in ("down", "up"):
        for peer in PEERS:
            transfer(guest, direction, peer, 4 * MIB, streams=32, timeout_s=120)
    guest.check("touch /tmp/enough")
    guest.wait_job(hopping)
    if backend.name == "ours":
        grown = backend.metrics() - before
        assert grown.value("vhostmq_rehomed_flows_total") > 0
        assert grown.value("vhostmq_handoff_frames_total") > 0
    assert_pairs_answer(backend, guest, pairs)


KILLS, KILL_EVERY_S = 8, 2.0


@pytest.mark.usefixtures("network")
def test_workers_are_killed(backend: Backend, guest: QemuGuest, pairs: int) -> None:
    """32 transfers at a time while one worker after another gets SIGKILL: all arrive whole, over
    connections that outlive the process that carried them."""
    if backend.name != "ours":
        pytest.skip("NOT TESTED here: passt has no workers")
    before = backend.metrics()
    way = f"{PEER4} {XFER_PORT} {4 * MIB} 32 5"
    guest.check("rm -f /tmp/enough")
    body = f"xfer down {way} && xfer up {way}"
    job = guest.start_job(f"while [ ! -e /tmp/enough ]; do {body} || exit 1; done")
    chosen = random.Random(1)
    for _ in range(KILLS):
        time.sleep(KILL_EVERY_S)
        os.kill(chosen.choice(measure.workers(backend.process.pid)), signal.SIGKILL)
    guest.check("touch /tmp/enough")
    result = guest.wait_job(job)
    assert result.status == 0, result.output
    lines = result.output.splitlines()
    for number, start in enumerate(range(0, len(lines), 32)):
        direction = ("down", "up")[number % 2]
        check_transfers("\n".join(lines[start : start + 32]), direction, 4 * MIB, 32)
    grown = backend.metrics() - before
    assert grown.value("vhostmq_worker_restarts_total") == KILLS
    assert grown.value("vhostmq_inherited_flows_total") > 0
    assert_pairs_answer(backend, guest, pairs)


@pytest.mark.usefixtures("network")
def test_guest_reboots(guest: QemuGuest) -> None:
    """The guest restarts in good order; the same connection and process serve the new kernel."""
    guest.reboot()
    guest.join_network()
    smoke(guest, PEERS)


@pytest.mark.usefixtures("network")
def test_guest_reset_under_traffic(guest: QemuGuest) -> None:
    """The reset button in the middle of a transfer; the same connection and process go on."""
    guest.start_job(f"xfer down {PEER4} {XFER_PORT} {512 * MIB} 4 5")
    time.sleep(1)
    guest.reset()
    guest.join_network()
    smoke(guest, PEERS)


def test_front_end_killed_under_traffic(guest: QemuGuest) -> None:
    """SIGKILL for QEMU in the middle of a transfer; the same process serves the next QEMU."""
    guest.start_job(f"xfer down {PEER6} {XFER_PORT} {512 * MIB} 4 6")
    time.sleep(1)
    guest.kill()
    guest.start()
    guest.join_network()
    smoke(guest, PEERS)


def test_pairs_answer_after_all_that(backend: Backend, guest: QemuGuest, pairs: int) -> None:
    """The process that saw two guests go steers for the third as for the first."""
    assert_pairs_answer(backend, guest, pairs)


def test_packed_rings(lab: Lab, images: Images, backend: Backend, guest: QemuGuest) -> None:
    """The next front-end takes packed rings, and everything is as with split ones."""
    guest.kill()
    packed = QemuGuest(lab, images, backend.vhost_socket, backend.queues, packed=True)
    packed.start()
    try:
        features = packed.check(f"cat /sys/class/net/{packed.interface}/device/features")
        assert features[RING_PACKED] == "1", f"the driver negotiated {features}"
        packed.join_network()
        smoke(packed, PEERS, 16 * MIB)
        for peer in PEERS:
            for direction in ("up", "down"):
                transfer(packed, direction, peer, 16 * MIB, streams=8)
        assert_pairs_answer(backend, packed, backend.queues)
    finally:
        packed.close()
