"""test_dpdk.py - DPDK's virtio-user (testpmd) with two queue pairs through `vhostmq run`.

Theory      A driver without a kernel: no offloads, rings in huge pages, started in another order
            than Linux does. A tap behind it makes the host's kernel the guest, whose frames are
            answered or not.
Limits      Where the machine gives no huge pages the module is skipped, and says so.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from backends import Backend
from dpdk_guest import DpdkGuest
from lab import PEER4, PEER6, XFER_PORT, Lab
from traffic import MIB, check_transfers, transfer

from benchmarks.guest.prepare import DPDK_HUGE_PAGES, Images, free_huge_pages

QUEUES = 2
RINGS = {  # packed, in order: each has code of its own in the driver
    "split": (False, False),
    "split-in-order": (False, True),
    "packed": (True, False),
    "packed-in-order": (True, True),
}

pytestmark = pytest.mark.usefixtures("huge_pages")


@pytest.fixture(scope="module")
def huge_pages(images: Images) -> None:
    """Skip where prepare() could not have them."""
    free = free_huge_pages()
    if free < DPDK_HUGE_PAGES:
        pytest.skip(
            f"NOT TESTED here: testpmd needs {DPDK_HUGE_PAGES} huge pages of 2 MiB, {free} are free"
        )


@pytest.fixture(scope="module", params=RINGS)
def guest(
    request: pytest.FixtureRequest, lab: Lab, images: Images, backend: Backend
) -> Iterator[DpdkGuest]:
    """testpmd forwarding, its tap on the network."""
    packed, in_order = RINGS[request.param]
    guest = DpdkGuest(lab, images, backend.vhost_socket, backend.queues, packed, in_order)
    try:
        guest.start()
        guest.join_network()
        yield guest
    finally:
        guest.close()


def test_arp(guest: DpdkGuest) -> None:
    """ARP requests for the router are answered."""
    router = guest.check("ip route show default").split()[2]
    guest.check(f"arping -I {guest.interface} -c 3 -w 5 {router}")


@pytest.mark.parametrize("peer", [PEER4, PEER6], ids=["ipv4", "ipv6"])
def test_echo(guest: DpdkGuest, peer: str) -> None:
    """ICMP echo is answered."""
    guest.check(f"ping -c 3 -i 0.2 -W 2 {peer}")


@pytest.mark.passt_defect("stalls when the host's receiver is slow or the tap loses a frame")
@pytest.mark.parametrize("peer", [PEER4, PEER6], ids=["ipv4", "ipv6"])
def test_verified_data(guest: DpdkGuest, peer: str) -> None:
    """TCP both ways and datagrams without any offload: every checksum is the back-end's own."""
    guest.check(f"xfer udp {peer} {XFER_PORT} 100 1000")
    for direction in ("up", "down"):
        transfer(guest, direction, peer, 4 * MIB, streams=2)


@pytest.mark.passt_defect("stalls when the tap loses a frame")
@pytest.mark.parametrize("peer", [PEER4, PEER6], ids=["ipv4", "ipv6"])
def test_lost_frames_cost_no_stall(backend: Backend, guest: DpdkGuest, peer: str) -> None:
    """testpmd drops what its rings do not take, while the guest's kernel sends on: whatever is lost
    there, no transfer may wait for a retransmission timer that has doubled a few times.
    """
    before = backend.metrics()
    for _ in range(10):
        output = guest.check(f"xfer up {peer} {XFER_PORT} {4 * MIB} 2 1", 60)
        check_transfers(output, "up", 4 * MIB, 2)
        slowest_s = max(float(line.split()[-1]) for line in output.splitlines())
        assert slowest_s < 2, f"4 MiB took {slowest_s} s; held {backend.metrics() - before}"


def test_both_pairs(backend: Backend, guest: DpdkGuest, pairs: int) -> None:
    """Many flows: both pairs carry packets both ways."""
    before = backend.metrics()
    guest.check(f"for i in $(seq 32); do xfer udp {PEER4} {XFER_PORT} 5 100 || exit 1; done")
    grown = backend.metrics() - before
    for direction in ("tx", "rx"):
        carried = [
            grown.value("vhostmq_packets_total", queue=pair, direction=direction)
            for pair in range(pairs)
        ]
        assert min(carried) > 0, f"{direction} packets of the pairs: {carried}"
