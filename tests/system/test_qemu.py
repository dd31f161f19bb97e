"""test_qemu.py - a Debian kernel in QEMU (TCG) with four queue pairs, through `vhostmq run`.

Theory      One back-end with fewer workers than pairs serves the whole module: a guest that boots,
            works, changes its number of queue pairs, reboots, is killed and comes back with other
            features. The tests run in this order and share the guest; each leaves it on the
            network. Reboots come before whatever keeps the guest busy: a new emulator takes eight
            seconds for one, after minutes of traffic half a minute to more than four (its own
            doing, the back-end is idle then). What follows has a new one.
Limits      The sizes are the issue's: 8 streams of 32 MiB each way over IPv4 and IPv6.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from ipaddress import ip_address, ip_interface

import pytest
from backends import GUEST_PORT, Backend
from lab import DNS_NAME, GATEWAY4, GATEWAY6, HOST4, HOST6, PEER4, PEER6, XFER_PORT, Lab
from names import NameServer
from traffic import (
    HOP_MS,
    MIB,
    PairCounters,
    Rounds,
    assert_hopped,
    calm_moments,
    check_transfers,
    keep_pairs_on_cpus,
    kill_workers,
    longest_stalls,
    smoke,
    told,
    transfer,
)

from benchmarks.guest.guests import RING_PACKED, Network, QemuGuest
from benchmarks.guest.prepare import Images

QUEUES, WORKERS = 4, 2  # fewer than pairs, whatever the CPUs
STREAMS, SIZE = 32, 1 * MIB  # at a time, while things happen to queue pairs and workers
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


def assert_only_enabled_pairs_carry(
    backend: Backend, guest: QemuGuest, pairs: int, enabled: int
) -> None:
    """For a second, or until all that streams wait for has come, beginning when what was in flight
    on other pairs has been counted."""
    time.sleep(0.5)
    counters = PairCounters(backend, guest, pairs)
    deadline_s, quiet = time.monotonic() + CARRIED_MAX_S, True
    while quiet:
        assert time.monotonic() < deadline_s, f"{enabled} pairs enabled, and no traffic"
        time.sleep(1)
        quiet = False
        for direction in ("tx", "rx"):
            for source, carried in counters.since("packets", direction).items():
                text = f"{enabled} pairs enabled: {source} has {direction} {carried}"
                assert not any(carried[enabled:]), text
                quiet |= not any(carried)


FLAPS, FLAPS_MAX_S = 10, 180
CARRIED_MAX_S = 30


@pytest.mark.usefixtures("network")
@each_family
def test_queue_pairs_change_under_traffic(
    backend: Backend, guest: QemuGuest, pairs: int, peer: str
) -> None:
    """`ethtool -L` to one pair and back, over and over, for as long as each way takes once at
    least: no flow breaks, and only enabled pairs carry packets."""
    combined = f"ethtool -L {guest.interface} combined"
    rounds = Rounds(guest, peer, SIZE, STREAMS)
    for enabled in (1, pairs):
        guest.check(f"{combined} {enabled}")
        assert_only_enabled_pairs_carry(backend, guest, pairs, enabled)
    # A hundred busy processes are in the way of a command from outside.
    once = f"{combined} 1 && sleep 0.1 && {combined} {pairs} && sleep 0.1 && echo flap || exit 1"
    guest.check("rm -f /tmp/flapped /tmp/once")
    flapping = guest.start_job(f"renice -n -20 $$; while [ ! -e /tmp/flapped ]; do {once}; done")
    flaps, deadline_s = 0, time.monotonic() + FLAPS_MAX_S
    while flaps < FLAPS or guest.run("test -e /tmp/once").status:
        assert time.monotonic() < deadline_s, f"{flaps} flaps, or traffic was not both ways"
        time.sleep(1)
        flaps = int(guest.check(f"grep -c flap /tmp/job.{flapping} || true"))
    guest.check("touch /tmp/flapped")
    result = guest.wait_job(flapping)
    assert result.status == 0, result.output
    rounds.end()
    assert_pairs_answer(backend, guest, pairs)


@pytest.mark.usefixtures("network")
def test_flows_follow_their_threads(backend: Backend, guest: QemuGuest, pairs: int) -> None:
    """STREAMS transfers whose processes go to another CPU, and so to another pair, every 100 ms:
    all arrive whole, and flows move between workers."""
    keep_pairs_on_cpus(guest, pairs)
    before = backend.metrics()
    rounds = [
        transfer(guest, direction, peer, 4 * MIB, STREAMS, timeout_s=120, hop_ms=HOP_MS)
        for direction in ("down", "up")
        for peer in PEERS
    ]
    assert_hopped(rounds)
    grown = backend.metrics() - before
    assert grown.value("vhostmq_rehomed_flows_total") > 0
    assert grown.value("vhostmq_handoff_frames_total") > 0
    assert_pairs_answer(backend, guest, pairs)


CALM, KILLS, KILL_EVERY_S = 5, 15, 2.0
# How long a stall may be is asked in test_guest_flows.py: emulated on two CPUs, this load alone
# stalls for 3 s (a SYN asked for the third time) to 6 s. Here it is told, beside that of the load
# alone; xfer gives up after 20 s.


@pytest.mark.usefixtures("network", "pairs")
@each_family
def test_workers_are_killed(
    backend: Backend, guest: QemuGuest, pairs: int, peer: str, tell: Callable[[str], None]
) -> None:
    """STREAMS transfers at a time while a random worker gets SIGKILL every two seconds, for thirty:
    all arrive whole, over connections that outlive the process that carried them."""
    keep_pairs_on_cpus(guest, pairs)  # else most of what arrives may be one worker's
    before = backend.metrics()
    rounds = Rounds(guest, peer, SIZE, STREAMS)
    ahead_s = clock_ahead_s(guest)
    calm = calm_moments(CALM, KILL_EVERY_S)
    kills = kill_workers(backend, KILLS, KILL_EVERY_S)
    streams = rounds.end()
    undisturbed = longest_stalls(streams, calm, KILL_EVERY_S, ahead_s)
    stalls = longest_stalls(streams, kills, KILL_EVERY_S, ahead_s)
    tell(f"longest stall after each kill: {told(stalls)}; without kills: {told(undisturbed)}")
    # A round lasts longer than from kill to kill, and of a stream only the longest is known.
    assert sum(stall > 0 for stall in stalls) > KILLS // 2, f"traffic was elsewhere: {stalls}"
    grown = backend.metrics() - before
    assert grown.value("vhostmq_worker_restarts_total") == KILLS
    assert grown.value("vhostmq_inherited_flows_total") > 0
    assert_pairs_answer(backend, guest, pairs)


def clock_ahead_s(guest: QemuGuest) -> float:
    """What the guest's CLOCK_MONOTONIC is ahead of ours."""
    asked_s = time.monotonic()
    guest_s = float(guest.check("cat /proc/uptime").split()[0])
    return guest_s - (asked_s + time.monotonic()) / 2


def test_pairs_answer_after_all_that(backend: Backend, guest: QemuGuest, pairs: int) -> None:
    """The process that saw two guests go, and its own workers, steers as in the beginning."""
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
