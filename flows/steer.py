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
Moving      A flow moves to the worker of the pair the guest sends on, once it has done so for
            SETTLED_MS and the pair is enabled. A flow that has moved stays until it has carried
            PAID_BYTES, or for flow.stay_ms: STAY_FIRST_MS, twice as long with each move within
            CALM_MS of the last one that did not carry so much, STAY_MAX_MS at most. Meanwhile its
            frames cross, as ever. How a flow moves: dataplane/rehome.py.
Why so      A move costs both workers 15 us, seven system calls among it, a small frame that crosses
            1.1 us (benchmarks/move.py). CPU-seconds of the back-end per GB, eight streams, guest to
            host and host to guest, that go to another queue so often a second (medians of 3 runs of
            2 s, programs and rates in turn):
                                    none          1             10            100
              never moves           0.25  0.41    0.40  0.46    0.37  0.45    0.42  0.42
              stays for stay_ms     0.26  0.35    0.27  0.40    0.31  0.44    0.45  0.43
              as above              0.27  0.35    0.28  0.40    0.29  0.42    0.46  0.49
              moves at once         0.25  0.40    0.28  0.37    0.28  0.40    0.37  0.45
            A flow that settles has to move: at one hop a second crossing costs up to a half more.
            At a hundred nothing settles, and the spread of the runs hides what there is.
            PAID_BYTES is where crossing costs as much as a move, with some to spare: at 0.1 s per
            GB it is 25 us. So a stream moves each time. What carries little stays: a thousand such
            flows, ten times a second, would take a seventh of a processor to move, and a hundredth
            to cross.

            flow is      who              change                            why
            at home      its home         away_ms := now                    the guest sent elsewhere
            away         its home         away_ms := 0                      it came back
            away         its home         none; counted once                it has settled, but the
                                                                            flow has moved only just
                                                                            and carried little since
            away         its home         heir := the other worker          it has settled there
            on its way   its home         heir := 0, away_ms := now         the other has no room
            on its way   the heir         home := itself, heir := 0         it has the socket
            any          a successor      as the worker whose place it has  that one died; it sends
                                          taken                             a socket again
            prohibited:  anybody else writes home or heir (two would serve one socket); a flow on
                         its way is settled, timed or freed (nobody has its socket); one that opens
                         or holds payload moves (its state is private to its home).
Ownership   instance.rx_enabled and instance.pair_worker are written by control; tx_queue by whoever
            gets a packet; what moving needs, by home and heir in turn.
"""

from __future__ import annotations

from shm import mem
from shm.access import flow, instance
from shm.jit import jit
from shm.schema import PAIRS_MAX

STRAY_MAX_MS = 20
SETTLED_MS = 10
STAY_FIRST_MS, STAY_MAX_MS = 50, 5000
CALM_MS = 1000
PAID_BYTES = 1 << 18
AHEAD_MS = 10_000
M32 = 0xFFFFFFFF


@jit
def _moment(now_ms):
    """A moment of 32 bits that is not 0: up to a millisecond ago."""
    return ((now_ms - 1) | 1) & M32


@jit
def since(now_ms, then_ms):
    """Milliseconds between two moments, one of which has 32 bits; 0 when that is ahead, by the
    clock of another worker, which looks at it once in a breath."""
    ms = (now_ms - then_ms) & M32
    return ms if ms < M32 - AHEAD_MS else 0


@jit
def worker_of(i, pair):
    """The worker that serves a pair."""
    return mem.u8(instance.pair_worker(i) + pair)


@jit
def is_enabled(i, pair):
    """1 when frames may go to the pair's receive queue."""
    return (instance.rx_enabled(i) >> pair) & 1


@jit
def pair_of(i, worker):
    """A pair that a worker serves, on whose rings it counts what belongs to none; the one of its
    number if it serves that, or none any more."""
    for step in range(instance.pairs(i)):
        pair = (worker + step) % instance.pairs(i)
        if worker_of(i, pair) == worker:
            return pair
    return worker


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
            flow.set_strayed_ms(f, _moment(now_ms))
        if since(now_ms, flow.strayed_ms(f)) < STRAY_MAX_MS:
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


# --- moving ---------------------------------------------------------------------------------------

STAYS, DAMPED = -1, -2


@jit
def heir_of(i, f, worker, now_ms):
    """The worker to which a flow of `worker` should move now; STAYS, or DAMPED: it would, but has
    moved only just."""
    pair = flow.tx_queue(f)
    other = worker_of(i, pair)
    if other == worker or not is_enabled(i, pair):
        if flow.away_ms(f):
            flow.set_away_ms(f, 0)
        return STAYS
    if flow.away_ms(f) == 0:
        flow.set_away_ms(f, _moment(now_ms))
    if since(now_ms, flow.away_ms(f)) < SETTLED_MS:
        return STAYS
    if flow.moved_ms(f) and since(now_ms, flow.moved_ms(f)) < flow.stay_ms(f) and not _paid(f):
        return DAMPED
    return other


@jit
def tried(f, now_ms):
    """The flow could not go: it tries again when it has settled once more."""
    flow.set_away_ms(f, _moment(now_ms))


@jit
def _carried(f):
    """Bytes of payload, both ways, modulo 2^32."""
    return (flow.tx_bytes(f) + flow.rx_bytes(f)) & M32


@jit
def _paid(f):
    """1 when the flow has carried enough since its last move to be worth another one."""
    carried = (_carried(f) - flow.moved_bytes(f)) & M32  # less than none: a takeover counts anew
    return 1 if PAID_BYTES <= carried < 1 << 31 else 0


@jit
def owner_of(f):
    """The worker that has, or is about to have, the flow's socket."""
    heir = flow.heir(f)
    return heir - 1 if heir else flow.home(f)


@jit
def arrived(f, now_ms):
    """The flow has come to a new home: how long it stays."""
    calm = flow.moved_ms(f) == 0 or since(now_ms, flow.moved_ms(f)) >= CALM_MS or _paid(f)
    stay_ms = STAY_FIRST_MS if calm else min(2 * flow.stay_ms(f), STAY_MAX_MS)
    flow.set_stay_ms(f, stay_ms)
    flow.set_moved_ms(f, _moment(now_ms))
    flow.set_moved_bytes(f, _carried(f))
    flow.set_away_ms(f, 0)
    flow.set_moves(f, flow.moves(f) + 1)
