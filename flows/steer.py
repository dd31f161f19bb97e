"""steer.py - which receive queue a flow's packets go to, and whose worker that is.

Law         Automatic receive steering (virtio 1.3, 5.1.6.5.6): a packet of a flow goes to the
            receive queue of the pair on which the guest last sent a packet of that flow
            (`flow.tx_queue`).
              - that pair is enabled                     use it
              - it is not (ethtool -L, reset)            use an enabled pair instead: one of this
                                                         worker's own, else any; flow.tx_queue keeps
                                                         the guest's choice
              - no pair is enabled                       none: data waits in its socket
            A flow the guest has not sent on yet starts on an enabled pair of the worker that
            accepted it; the kernel spread those over the workers (one SO_REUSEPORT listener each).
Payload in  What lies in one receive queue can be overtaken by what is put in another: the guest
flight      would take that for loss, and a whole window would go again. So a stream changes its
            queue when the guest has acknowledged what was sent on the old one, at the latest
            STRAY_MAX_MS after the guest moved. A stream that pauses moves at once; one that never
            does stays a little longer where it was.
Hand-off    When the pair belongs to another worker, the frame crosses by the hand-off ring, in
order.
            The schema has what moving a flow needs (home, generation, version); nothing moves yet.
Ownership   instance.rx_enabled and instance.pair_worker are written by control; tx_queue by whoever
            gets a packet.
"""

from __future__ import annotations

from shm import mem
from shm.access import flow, instance
from shm.jit import jit
from shm.schema import PAIRS_MAX

STRAY_MAX_MS = 20


@jit
def worker_of(i, pair):
    """The worker that serves a pair."""
    return mem.u8(instance.pair_worker(i) + pair)


@jit
def is_enabled(i, pair):
    """1 when frames may go to the pair's receive queue."""
    return (instance.rx_enabled(i) >> pair) & 1


@jit
def any_pair(i, worker, start):
    """An enabled pair, this worker's own first, beginning the search at `start`; -1 when none
    is."""
    enabled = instance.rx_enabled(i)
    if enabled == 0:
        return -1
    fallback = -1
    for step in range(PAIRS_MAX):
        pair = (start + step) & (PAIRS_MAX - 1)
        if (enabled >> pair) & 1:
            if worker_of(i, pair) == worker:
                return pair
            if fallback < 0:
                fallback = pair
    return fallback


@jit
def queue_of(i, f, worker):
    """The pair whose receive queue takes this flow's next frame, or -1."""
    pair = flow.tx_queue(f)
    if is_enabled(i, pair):
        return pair
    return any_pair(i, worker, pair)


@jit
def stream_queue_of(i, f, worker, in_flight, now_ms):
    """The same for a stream; `in_flight`: payload may still lie in rx_queue."""
    pair, old = queue_of(i, f, worker), flow.rx_queue(f)
    if pair == old or pair < 0:
        flow.set_strayed_ms(f, 0)
        return pair
    if in_flight and is_enabled(i, old):
        if flow.strayed_ms(f) == 0:
            flow.set_strayed_ms(f, now_ms)
        if now_ms - flow.strayed_ms(f) < STRAY_MAX_MS:
            return old
    flow.set_strayed_ms(f, 0)
    flow.set_rx_queue(f, pair)
    return pair


@jit
def sent_on(f, pair):
    """Remember that the guest sent a packet of the flow on `pair`: one word, written only when it
    changes."""
    if flow.tx_queue(f) != pair:
        flow.set_tx_queue(f, pair)
