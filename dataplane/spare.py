"""spare.py - sockets opened before they are needed.

Theory      Between a guest's SYN and connect() stand a socket and its options: four system calls.
            A worker keeps SPARES_MAX TCP sockets of each family ready; take() gives one, and
            refill() opens another when a breath has done all its work and the guest has been told:
            it works then, and nobody waits for us. A family nobody has asked for has none.
Limits      One socket a breath. Where descriptors are short nothing is kept ready until the next
            connection; take() opens one itself when none is left, and says so when it cannot.
Ownership   Private to the worker, until its process ends; in no epoll set and bound to nothing.
Drops       None of its own.
"""

from __future__ import annotations

from dataplane import sockets
from dataplane.context import SPARES_MAX, context, spares
from flows import address
from shm import mem
from shm.jit import jit


@jit
def _of(w, v6):
    return context.spares(w) + v6 * spares.SIZE


@jit
def take(w, host):
    """A TCP socket for the family of `host`, or -errno."""
    v6 = 0 if address.is_v4(host) else 1
    s = _of(w, v6)
    spares.set_wanted(s, SPARES_MAX)
    context.set_connecting(w, 1)
    count = spares.count(s)
    if count == 0:
        return sockets.open_tcp(w, v6)
    spares.set_count(s, count - 1)
    return mem.u32(spares.fds(s) + 4 * (count - 1))


@jit
def refill(w):
    """The end of a breath that left no work: open one where one is missing, unless a connection was
    just begun, which is what to look after next."""
    if context.connecting(w):
        context.set_connecting(w, 0)
        return
    for v6 in range(2):
        s = _of(w, v6)
        count = spares.count(s)
        if count < spares.wanted(s):
            fd = sockets.open_tcp(w, v6)
            if fd < 0:
                spares.set_wanted(s, count)
                return
            mem.put_u32(spares.fds(s) + 4 * count, fd)
            spares.set_count(s, count + 1)
            return
