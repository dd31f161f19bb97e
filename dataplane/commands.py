"""commands.py - what control asks of a worker, and what it answers. No compiled code: control
imports this.

Theory      Each command is one mailbox message (shm/mailbox.py) with its descriptors; the worker
            carries it out between two breaths and answers Done or Failed. What a command sets is
            the whole state of its subject (a ring, the memory table), so a new worker is brought up
            by the same commands as a running one is changed.
Ownership   Descriptors become the worker's; it closes what it replaces and what it refuses.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from shm.record import Record


class Wires(NamedTuple):
    """How workers reach each other: every worker's eventfd, the sending end of every worker's
    inbox, and the receiving end of one's own."""

    wakes: tuple[int, ...]
    inboxes: tuple[int, ...]
    inbox: int

    @staticmethod
    def count(workers: int) -> int:
        """How many descriptors that is."""
        return 2 * workers + 1

    @classmethod
    def of(cls, fds: list[int]) -> Wires:
        """The descriptors that came with Start."""
        half = len(fds) // 2
        return cls(tuple(fds[:half]), tuple(fds[half:-1]), fds[-1])

    def fds(self) -> tuple[int, ...]:
        """The same, to be sent."""
        return *self.wakes, *self.inboxes, self.inbox


class Start(NamedTuple):
    """The first message: which worker of how many, in which segment, pinned to which CPU. The
    answer is its process id. Descriptors: Wires."""

    segment: str
    id: int
    workers: int
    cpu: int | None = None


class MapRegion(NamedTuple):
    """Map a region of guest memory (one descriptor) under a number control chose; not used until
    SetRegions."""

    number: int
    gpa: int
    size: int
    uva: int
    mmap_offset: int


class SetRegions(NamedTuple):
    """The memory table is now exactly these mapped regions; others are unmapped, rings find their
    addresses anew."""

    numbers: tuple[int, ...]


class SetFeatures(NamedTuple):
    """Virtio features the driver acked."""

    features: int


RESUME = -1
"""A base: go on where the used index says that the former worker stopped."""


def ring_areas(num: int, packed: bool) -> tuple[tuple[int, int], ...]:
    """(bytes, alignment) of the descriptor, driver (avail) and device (used) area: virtio 1.3, 2.7
    and 2.8.10. A split ring has room for event indices whether they are used or not."""
    if packed:
        return (16 * num, 16), (4, 4), (4, 4)
    return (16 * num, 16), (6 + 2 * num, 2), (6 + 8 * num, 4)


class SetRing(Record):  # `index` is a method of tuples
    """Start a ring or change a running one. Descriptors in the order kick, call, err where the flag
    is set."""

    index: int
    num: int
    desc_uva: int
    avail_uva: int
    used_uva: int
    base: int
    enabled: bool
    has_kick: bool
    has_call: bool
    has_err: bool


class StopRing(Record):  # `index` is a method of tuples
    """Stop a ring: nothing is written to guest memory for it afterwards. The answer is its base."""

    index: int


class ListenOn(NamedTuple):
    """Serve forwarded ports: one descriptor per entry (protocol, port, guest_port, guest_addr).
    `place`: how far this comes in the list of all of that protocol; some may have been left out."""

    ports: tuple[tuple[int, int, int, bytes], ...]
    place: int = 0


class SetNet(NamedTuple):
    """What the slow path answers with (dataplane/slow/net.py Net)."""

    net: Any


class SendFrames(NamedTuple):
    """Frames for the guest, on this queue pair (announcements)."""

    pair: int
    frames: tuple[bytes, ...]


class Revive(NamedTuple):
    """The set of enabled receive queues changed: what waited for one goes on."""


class Describe(NamedTuple):
    """Say what there is (the answer is Have), and this number."""

    token: int


class Have(NamedTuple):
    """The process, the numbers of the regions that are mapped, the rings that are served, the place
    of the last ListenOn of each protocol."""

    token: int
    pid: int
    regions: tuple[int, ...]
    rings: tuple[int, ...]
    listens: tuple[tuple[int, int], ...]


class Stop(NamedTuple):
    """End the worker."""


class Done(NamedTuple):
    """Carried out."""

    value: int = 0


class Failed(NamedTuple):
    """Not carried out; nothing changed."""

    reason: str


Answer = Done | Failed | Have
