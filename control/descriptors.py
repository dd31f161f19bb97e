"""descriptors.py - how many files this process may open, and how many an instance takes.

Theory      Every connection of the guest is a descriptor, and so is every forwarded port once for
            each worker, every ring three times, every piece of guest memory. `raise_limit` takes
            what the hard limit allows; `shortage` says before anything is bound whether that is
            enough, for a limit that ends in the middle of a guest's start is hard to understand.
Why so      Only root may raise the hard limit; a service manager or `ulimit -Hn` sets it.
Limits      Counted for the pairs that are offered and as much memory as QEMU announces at once; a
            front-end may use fewer. Workers inherit the limit: it counts for each process alone.
Errors      DescriptorError, one line with what is needed, what is there and what to do.
"""

from __future__ import annotations

import resource

from dataplane.commands import Wires

CONTROL = 32  # standard streams, sockets, segment, fork server, metrics page, and room to work
PLACE = 8  # of a worker, in control: wake, both ends of its inbox, mailbox, pidfds, its birth
WORKER = 24
RING = 3  # kick, call, err
REGIONS = 8  # the most that SET_MEM_TABLE announces
FLOWS = 1024  # fewer for each worker are worth a warning
REMEDY = "raise it (ulimit -Hn; systemd: LimitNOFILE=)"


class DescriptorError(Exception):
    """The limit is too low to start; the text is one line for the operator."""


def raise_limit() -> None:
    """Take what the hard limit allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def needed(pairs: int, workers: int, ports: int) -> tuple[int, int]:
    """Descriptors of control and of one worker, with every ring in use and no connection yet."""
    device = 2 * pairs * RING + REGIONS
    wires = Wires.count(workers)
    return CONTROL + device + workers * (PLACE + ports), WORKER + device + wires + ports


def shortage(limit: int, pairs: int, workers: int, ports: int) -> str:
    """A warning when the limit leaves few connections, or ""; raises DescriptorError when it leaves
    none."""
    control, worker = needed(pairs, workers, ports)
    most, left = max(control, worker + 1), limit - worker
    if most > limit:
        takes, instead = f"{pairs} queue pairs", "fewer --queues"
        if ports * workers > 2 * pairs * RING:
            takes += f" and {ports} forwarded ports for {workers} workers"
            instead = "forward fewer ports" + (", or --workers 1" if workers > 1 else "")
        short = f"the limit of {limit} open files is too low: {takes} take {most}"
        raise DescriptorError(f"{short}; {REMEDY}, or {instead}")
    if left < FLOWS:
        return f"the limit of {limit} open files leaves each worker {left} connections; {REMEDY}"
    return ""
