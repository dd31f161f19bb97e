"""traffic.py - verified traffic through a guest, and where it went.

Theory      Every transfer is checked by digest at both ends (xfer.c). Which queue pair carried it
            is read twice, independently: from the back-end's metrics and from the guest driver's
            own counters (`ethtool -S`). Linux picks the transmit queue by CPU (XPS), and RFS keeps
            the acknowledgements on the CPU of the process: a client pinned to CPU i is a client
            pinned to pair i.
"""

from __future__ import annotations

from backends import Backend
from lab import XFER_PORT

from benchmarks.guest.guests import Guest

MIB = 1 << 20


def check_transfers(output: str, direction: str, size: int, streams: int) -> None:
    """Assert that `xfer up|down` moved every byte of every stream, each stream's its own."""
    digests = set()
    lines = [line.split() for line in output.splitlines()]
    for words in lines:
        assert len(words) == 6 and words[0] == direction, f"xfer printed:\n{output}"
        assert int(words[2]) == size
        assert words[3] == words[4], f"stream {words[1]}: sent {words[3]}, received {words[4]}"
        digests.add(words[3])
    assert len(lines) == len(digests) == streams, f"xfer printed:\n{output}"


def transfer(
    guest: Guest,
    direction: str,
    address: str,
    size: int,
    streams: int = 1,
    seed: int = 1,
    timeout_s: float = 60,
) -> None:
    """Move size bytes in each of some parallel streams between the guest and a server."""
    command = f"xfer {direction} {address} {XFER_PORT} {size} {streams} {seed}"
    check_transfers(guest.check(command, timeout_s), direction, size, streams)


def smoke(guest: Guest, addresses: tuple[str, ...], size: int = 4 * MIB) -> None:
    """A little of everything towards each address: ping, datagrams, both directions of TCP."""
    for address in addresses:
        guest.check(f"ping -c 3 -i 0.2 -W 2 {address}")
        guest.check(f"xfer udp {address} {XFER_PORT} 50 1000")
        for direction in ("up", "down"):
            transfer(guest, direction, address, size)


class PairCounters:
    """Packets and bytes of each pair since construction, by metrics and by the guest's driver."""

    def __init__(self, backend: Backend, guest: Guest, pairs: int) -> None:
        self.backend, self.guest, self.pairs = backend, guest, pairs
        self.metrics = backend.metrics()
        self.driver = self._driver()

    def _driver(self) -> dict[str, int]:
        lines = self.guest.check(f"ethtool -S {self.guest.interface}").splitlines()[1:]
        fields = (line.rsplit(":", 1) for line in lines)
        return {name.strip(): int(value) for name, value in fields}

    def since(self, unit: str, direction: str) -> dict[str, list[int]]:
        """unit ("packets", "bytes") per pair, as each side counted them. tx = guest to host."""
        grown = self.backend.metrics() - self.metrics
        driver = self._driver()
        names = [f"{direction}_queue_{pair}_{unit}" for pair in range(self.pairs)]
        pairs = range(self.pairs)
        name = f"vhostmq_{unit}_total"
        return {
            "metrics": [int(grown.value(name, queue=i, direction=direction)) for i in pairs],
            "driver": [driver.get(name, 0) - self.driver.get(name, 0) for name in names],
        }


def keep_pairs_on_cpus(guest: Guest, pairs: int) -> None:
    """Make a process pinned to CPU i use pair i; assert that XPS sends from CPU i on pair i.

    One interrupt serves all pairs, so RFS moves a packet to the CPU of the process that reads the
    socket: its acknowledgements leave from there, whichever pair the packet came on. RPS takes
    packets of flows that no process has read yet to the CPU of the pair.
    """
    queues = f"/sys/class/net/{guest.interface}/queues"
    guest.check("echo 4096 >/proc/sys/net/core/rps_sock_flow_entries")
    for pair in range(pairs):
        guest.check(f"echo {1 << pair:x} >{queues}/rx-{pair}/rps_cpus")
        guest.check(f"echo 1024 >{queues}/rx-{pair}/rps_flow_cnt")
        mask = int(guest.check(f"cat {queues}/tx-{pair}/xps_cpus"), 16)
        assert mask == 1 << pair, f"the guest's driver maps CPUs {mask:#x} to pair {pair}"
