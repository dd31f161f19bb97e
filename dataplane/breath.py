"""breath.py - one bounded step of a worker: all the branching of the hot path on one page.

Theory      breathe() breathes until plain Python must attend to something (ATTEND_*). A breath
            waits for something to do and does a bounded share of everything that is due:
              1  epoll_wait (no waiting while work is left); edges set flags, they do not do the
                 work
              2  flows that come from other workers; timers
              3  frames other workers handed over; payload is gathered and sent; their flows move
              4  tx rings: at most CHAINS_MAX chains each; the same. Workers that were given some
                 of the frames are woken
              5  flows in line for receive buffers, then those touched, are settled: data to the
                 guest, acknowledgements, discards, timers; those whose queue is another worker's
                 move there; workers that were given frames for their receive rings are woken
              6  rings are published, one notification each; empty ones ask to be kicked
              7  when nothing is left to do, a socket is opened for a connection to come
Why so      Acknowledgements, discards and notifications are paid once per flow and once per ring
            per breath. Kicks are asked for only when a ring is empty, and it is looked at once more
            afterwards: `busy` then keeps the next breath from sleeping.
Polling     With instance.poll_us a worker that runs out of work goes on looking for a while: at its
            sockets, its rings and what others hand over. Nobody has to kick or wake it meanwhile,
            which is what an answer to a short request waits for. Then it sleeps as ever. How long
            is learnt, poll_us at most: twice as long after a sleep that looking so much longer
            would have spared, half as long after one it would not.
Limits      EVENTS_MAX events, CHAINS_MAX chains per ring, HANDOFF_MAX frames per producer, whose
            room it gets back after HANDOFF_BURST_BYTES at the latest; TIMERS_MAX timers.
Ownership   Everything of this worker (context.py); what it may write of the shared segment:
            shm/schema.py.
Drops       bad_avail (the ring stops), disabled, rx_full (handed over), and what frames and rings
            count themselves.
"""

from __future__ import annotations

from dataplane import (
    handoff,
    icmp,
    inherit,
    lifecycle,
    listen,
    rehome,
    rx,
    spare,
    tcp,
    tcp_rx,
    tx,
    udp,
    virtq,
)
from dataplane.context import (
    ATTEND_AWAKE,
    ATTEND_BROKEN,
    ATTEND_ERRORS,
    ATTEND_MAILBOX,
    CHAIN_IOV_MAX,
    CHAINS_MAX,
    DIRTY_MAX,
    EVENT_BYTES,
    EVENT_FLOW,
    EVENT_INBOX,
    EVENT_KICK,
    EVENT_LISTENER,
    EVENT_MAILBOX,
    EVENT_WAKE,
    EVENTS_MAX,
    FRAME_WAITS,
    LINE_WAITS,
    SLOW_BYTES,
    VNET_BYTES,
    context,
    listener,
    ring,
)
from dataplane.descriptor import BAD_AVAIL
from dataplane.lifecycle import AGAIN, DIRTY, FREE, SERVED, TCP, UDP
from flows import expiry, steer, table
from shm import libc, mem
from shm import ring as shm_ring
from shm.access import flow, instance, queue, worker
from shm.jit import entry, jit
from shm.schema import DROP, HANDOFF_BYTES, PAIRS_MAX

HANDOFF_MAX = 64
HANDOFF_BURST_BYTES = HANDOFF_BYTES // 4
TIMERS_MAX = 256
WAIT_MAX_MS = 3600 * 1000
HELD_LOOK_MS = 50  # how often frames that wait for another worker, or for buffers
LISTEN_RETRY_MS = 500  # how often connections that wait for the guest are looked at
POLL_FIRST_NS = 10_000
CLOCK_MONOTONIC = 1
DISABLED = -1 - DROP["disabled"]


@jit
def _clock(w):
    at = context.option(w)
    libc.clock_gettime(CLOCK_MONOTONIC, at)
    now_ns = mem.u64(at) * 1000000000 + mem.u64(at + 8)
    context.set_now_ns(w, now_ns)
    context.set_now_ms(w, now_ns // 1000000)


@jit
def _timeout_ms(w, patience_ms):
    """How long to wait: not at all while work is left or may come at once, else until the next
    timer."""
    if context.busy(w) or context.polling(w):
        return 0
    if context.listen_waiting(w):
        patience_ms = min(patience_ms, LISTEN_RETRY_MS) if patience_ms >= 0 else LISTEN_RETRY_MS
    if context.handoff_held(w):
        patience_ms = min(patience_ms, HELD_LOOK_MS) if patience_ms >= 0 else HELD_LOOK_MS
    wake_ms = expiry.next_ms(context.wheel(w))
    if wake_ms < 0:
        return patience_ms
    wait_ms = min(max(wake_ms - context.now_ms(w), 0), WAIT_MAX_MS)
    return wait_ms if patience_ms < 0 else min(wait_ms, patience_ms)


@jit
def _wait(w, patience_ms):
    """epoll_wait, or what it found before; while it may sleep, other workers know that they must
    wake us."""
    if context.events_left(w):
        count = context.events_left(w)
        context.set_events_left(w, 0)
        return count
    me, timeout_ms = context.me(w), _timeout_ms(w, patience_ms)
    if timeout_ms != 0:
        worker.set_sleeping(me, 1)
        mem.fence()  # `sleeping` must be visible before the hand-off rings are looked at
        if handoff.waiting(w):
            timeout_ms = 0
    count = libc.epoll_wait(context.epfd(w), context.events(w), EVENTS_MAX, timeout_ms)
    worker.set_sleeping(me, 0)
    context.set_slept(w, (2 if count > 0 else 1) if timeout_ms != 0 else 0)
    context.set_busy(w, 1 if count == EVENTS_MAX else 0)
    context.set_worked(w, 1 if count > 0 else 0)
    return max(count, 0)


@jit
def _dispatch(w, kind, generation, number, events):
    """What one event means: flags are set, the work is done later in the breath."""
    if kind == EVENT_FLOW:
        f = table.at(context.table(w), number)
        if flow.state(f) == FREE or flow.generation(f) != generation:
            return  # it ended earlier in this breath
        if flow.protocol(f) == TCP:
            tcp.on_event(w, f, number, events)
        else:
            udp.on_event(w, f, number, events)
    elif kind == EVENT_KICK:
        r = context.rings(w) + number * ring.SIZE
        ring.set_pending(r, 1)
        counters = ring.counters(r)
        queue.set_kicks(counters, queue.kicks(counters) + 1)
    elif kind == EVENT_LISTENER:
        listener.set_ready(listen.at(w, number), 1)
        listen.serve(w, number)
    elif kind == EVENT_WAKE:
        libc.read(context.wake_fd(w), context.option(w), 8)
        worker.set_stalled(context.me(w), 0)
        lifecycle.room_made(w)
    elif kind == EVENT_INBOX:
        context.set_inbox(w, 1)
    elif kind == EVENT_MAILBOX:
        context.set_attend(w, context.attend(w) | ATTEND_MAILBOX)


@jit
def _timers(w):
    for _ in range(TIMERS_MAX):
        index = expiry.due(context.wheel(w), context.now_ms(w))
        if index < 0:
            return
        f = table.at(context.table(w), index)
        if not _is_ours(w, f):
            continue
        if flow.deadline_ms(f) > context.now_ms(w):
            expiry.arm(context.wheel(w), index, flow.deadline_ms(f))
        elif flow.protocol(f) == TCP:
            tcp_rx.on_timer(w, f, index)
        else:
            udp.on_timer(w, f, index)
    context.set_busy(w, 1)


@jit
def _chain_of_record(w, record):
    """Make a handed-over frame the chain at hand: one piece."""
    mem.put_u64(context.chain_iov(w), record)
    mem.put_u64(context.chain_iov(w) + 8, shm_ring.length(record))
    context.set_chain_count(w, 1)
    context.set_pair(w, shm_ring.meta(record))


@jit
def _give_back(w, h, last):
    """Send what was gathered of handed-over frames; then nobody needs their bytes."""
    tx.flush(w)
    shm_ring.consume(h, last)


@jit
def _handed_tx(w, other):
    """Frames from the guest that another worker received for flows of ours; how many."""
    h, last, size = handoff.between(w, other, context.id(w), handoff.TX), 0, 0
    count = 0
    context.set_crossed(w, 1)
    for _ in range(HANDOFF_MAX):
        record = shm_ring.after(h, last) if last else shm_ring.first(h)
        if record == 0:
            break
        _chain_of_record(w, record)
        result = tx.frame(w)
        if result < 0:
            virtq.drop_late(w, result)
        last, size, count = record, size + shm_ring.length(record), count + 1
        if size >= HANDOFF_BURST_BYTES:
            _give_back(w, h, last)
            last, size = 0, 0
    else:
        context.set_busy(w, 1)
    if last:
        _give_back(w, h, last)
    context.set_crossed(w, 0)
    return count


@jit
def _handed_rx(w, other):
    """Frames to the guest that another worker made for receive rings of ours.

    One that finds no buffers waits, and with it what follows, also for other rings; but not for
    ever: a guest that gives a ring no buffers for handoff.PATIENCE_MS loses the frame, and further
    ones at once, until one fits.
    """
    h = handoff.between(w, other, context.id(w), handoff.RX)
    for number in range(HANDOFF_MAX):
        record = shm_ring.first(h)
        if record == 0:
            return number
        r = rx.ring_of(w, shm_ring.meta(record))
        size = shm_ring.length(record)
        result = rx.put(w, r, record, VNET_BYTES, record + VNET_BYTES, size - VNET_BYTES)
        ring.set_starved(r, ring.starved(r) & ~FRAME_WAITS)
        if result == 0:
            if ring.short_since_ms(r) == 0:
                ring.set_short_since_ms(r, context.now_ms(w))
            if context.now_ms(w) - ring.short_since_ms(r) < handoff.PATIENCE_MS:
                ring.set_starved(r, ring.starved(r) | FRAME_WAITS)
                context.set_handoff_held(w, 1)
                return number
            result = rx.RX_FULL
        elif result > 0:
            ring.set_short_since_ms(r, 0)
        if result < 0 and result != rx.RX_SMALL:
            virtq.drop(r, result)
        shm_ring.consume(h, record)
    context.set_busy(w, 1)
    return HANDOFF_MAX


@jit
def _handed_over(w):
    """What other workers handed over; how many frames from the guest."""
    me, crossed = context.id(w), 0
    context.set_handoff_held(w, 0)
    for other in range(context.workers(w)):
        if other == me:
            continue
        taken, placed = _handed_tx(w, other), _handed_rx(w, other)
        crossed += taken
        mem.fence()
        if taken + placed and worker.stalled(context.workers_at(w) + other * worker.SIZE):
            handoff.room_made(w, other)
        if placed:
            lifecycle.unblock(w, lifecycle.ELSE)  # a flow may wait for its former home's frames
    return crossed


@jit
def _depart(w):
    """Flows whose frames have just crossed move to the worker that sends them, before it has sent
    further ones: at the end of the breath the ring is seldom empty."""
    for position in range(context.dirty_count(w)):
        index = mem.u32(context.dirty(w) + 4 * position)
        f = table.at(context.table(w), index)
        if _is_ours(w, f) and lifecycle.has(f, DIRTY) and flow.away_ms(f):
            listed = flow.flags(f) & (DIRTY | AGAIN | SERVED)
            lifecycle.clear(f, listed)  # first: it may be another worker's at the end
            if not rehome.consider(w, f, index) and _is_ours(w, f):
                lifecycle.put(f, listed)


@jit
def _chain(w, r, pieces):
    """One chain of a tx ring, in chain_iov: its frame goes its way, or is counted as dropped; 1:
    it waits."""
    result = pieces
    context.set_frame_bytes(w, 0)
    if pieces >= 0:
        context.set_chain_count(w, pieces)
        result = tx.frame(w) if ring.enabled(r) else DISABLED
    if result < 0:
        virtq.drop(r, result)
    return result == tx.WAITS


@jit
def _return_chains(w, r, count, slots):
    """Give a burst back; with IN_ORDER naming the last of its chains will do."""
    chains = context.chains(w)
    if ring.in_order(r) and count > 0:
        virtq.put_used(r, mem.u64(chains + 8 * (count - 1)) & 0xFFFF, 0, slots)
    else:
        for number in range(count):
            chain = mem.u64(chains + 8 * number)
            virtq.put_used(r, chain & 0xFFFF, 0, chain >> 16)
    virtq.take(r, slots)


@jit
def _drain(w, r):
    """One burst of a tx ring. The chains go back when their payload has been sent."""
    chains, count, slots, size = context.chains(w), 0, 0, 0
    context.set_retried(w, ring.starved(r))
    ring.set_starved(r, 0)
    context.set_pair(w, ring.index(r) >> 1)
    state = virtq.ready(r, 0)
    for _ in range(CHAINS_MAX):
        if state <= 0:
            break
        pieces = virtq.walk(w, r, slots, context.chain_iov(w), CHAIN_IOV_MAX, 0)
        if pieces == BAD_AVAIL:
            state = pieces
            break
        if _chain(w, r, pieces):
            ring.set_starved(r, FRAME_WAITS)
            context.set_handoff_held(w, 1)
            break
        context.set_retried(w, 0)
        mem.put_u64(chains + 8 * count, ring.chain_id(r) | (ring.chain_slots(r) << 16))
        size += context.frame_bytes(w)
        count += 1
        slots += ring.chain_slots(r)
        state = virtq.ready(r, slots)
    context.set_retried(w, 0)
    if count:
        context.set_worked(w, 1)
    handoff.wake(w)  # they wake up while we send our share
    tx.flush(w)
    _return_chains(w, r, count, slots)
    counters = ring.counters(r)
    queue.set_packets(counters, queue.packets(counters) + count)
    queue.set_bytes(counters, queue.bytes(counters) + size)
    ring.set_pending(r, 1 if state > 0 else 0)
    if state < 0:
        virtq.drop(r, state)
        virtq.fail(r, context.option(w))
        context.set_attend(w, context.attend(w) | ATTEND_BROKEN)


@jit
def _tx_rings(w):
    """First who was the last to find no room in a hand-off ring: those before had taken it all."""
    polling, first, pairs = context.polling(w), context.tx_first(w), context.pairs_end(w)
    context.set_tx_first(w, 0)
    for number in range(pairs):
        pair = (first + number) % pairs
        r = context.rings(w) + (2 * pair + 1) * ring.SIZE
        if ring.running(r) and (ring.pending(r) or (polling and virtq.has_news(r))):
            virtq.suppress_kicks(r)
            _drain(w, r)
            if ring.starved(r):
                context.set_tx_first(w, pair)


@jit
def _rx_kicks(w):
    """Receive rings that got buffers again."""
    polling = context.polling(w)
    for pair in range(context.pairs_end(w)):
        r = rx.ring_of(w, pair)
        news = ring.pending(r) or (polling and ring.starved(r) and virtq.has_news(r))
        if ring.running(r) and news:
            ring.set_pending(r, 0)
            ring.set_starved(r, 0)
            virtq.suppress_kicks(r)


@jit
def _is_ours(w, f):
    """0 when the entry ended, is on its way (its heir is cleared last) or another worker's."""
    return flow.heir(f) == 0 and flow.home(f) == context.id(w) and flow.state(f) != FREE


@jit
def _settle_flow(w, f, index):
    """One flow; 1 when its budget ended."""
    lifecycle.clear(f, DIRTY | AGAIN | SERVED)  # first: it may be another worker's at the end
    if flow.protocol(f) == TCP:
        tcp_rx.settle(w, f, index)
    elif flow.protocol(f) == UDP:
        udp.settle(w, f, index)
    else:
        icmp.settle(w, f, index)
    if _is_ours(w, f) and rehome.consider(w, f, index):
        return 0
    return _is_ours(w, f) and lifecycle.has(f, AGAIN)


@jit
def _serve(w, pair):
    """Those in line for a pair's buffers, while there are some: who finds none loses its place."""
    r, line = rx.ring_of(w, pair), lifecycle.FIRST_RING + pair
    for _ in range(DIRTY_MAX):
        if ring.starved(r) or not lifecycle.somebody_waits(w, line):
            break
        if ring.running(r) and virtq.ready(r, 0) == 0:
            ring.set_starved(r, LINE_WAITS)
            break
        index = lifecycle.next_waiting(w, line)
        f = table.at(context.table(w), index)
        if not _is_ours(w, f):
            continue
        listed = lifecycle.has(f, DIRTY)
        if _settle_flow(w, f, index):
            lifecycle.put(f, listed)  # then it stands on the list
            lifecycle.touch(w, f, index)


@jit
def _settle(w):
    """Flows in line first, then every touched one; those whose budget ended stay on the list."""
    for pair in range(context.pairs_end(w)):
        _serve(w, pair)
    dirty, count, kept = context.dirty(w), context.dirty_count(w), 0
    for position in range(count):
        index = mem.u32(dirty + 4 * position)
        f = table.at(context.table(w), index)
        if _is_ours(w, f) and lifecycle.has(f, DIRTY) and _settle_flow(w, f, index):
            lifecycle.put(f, DIRTY)
            mem.put_u32(dirty + 4 * kept, index)
            kept += 1
    context.set_dirty_count(w, kept)


@jit
def _publish(w):
    """Returned chains become visible; rings that are empty ask to be kicked and are looked at once
    more, unless the worker will look again by itself."""
    scratch, polling = context.option(w), context.polling(w)
    for pair in range(context.pairs_end(w)):
        r = rx.ring_of(w, pair)
        if ring.running(r):
            virtq.publish(r, scratch)
            waits = ring.starved(r) and ring.suppressed(r) and not polling
            if waits and virtq.ask_for_kick(r):
                ring.set_pending(r, 1)
                context.set_busy(w, 1)
        r += ring.SIZE
        if ring.running(r):
            virtq.publish(r, scratch)
            if ring.starved(r):
                continue  # room is told of
            if ring.pending(r) or (not polling and ring.suppressed(r) and virtq.ask_for_kick(r)):
                ring.set_pending(r, 1)
                context.set_busy(w, 1)


@jit
def _learn_to_look(w):
    """After a sleep that work has ended: how long to look the next time."""
    most_ns, poll_ns = 1000 * instance.poll_us(context.instance(w)), context.poll_ns(w)
    if context.now_ns(w) - context.worked_ns(w) < most_ns:
        context.set_poll_ns(w, min(max(2 * poll_ns, POLL_FIRST_NS), most_ns))
    else:
        context.set_poll_ns(w, poll_ns // 2 if poll_ns > POLL_FIRST_NS else 0)


@jit
def _look_on(w):
    """Whether the next breath looks for work by itself; if not, rings ask to be kicked."""
    if context.slept(w) == 2:
        _learn_to_look(w)
    if context.worked(w):
        context.set_worked_ns(w, context.now_ns(w))
        context.set_poll_until_ns(w, context.now_ns(w) + context.poll_ns(w))
    context.set_polling(w, 1 if context.now_ns(w) < context.poll_until_ns(w) else 0)


@jit
def _says_awake(w, count):
    """Control is told of the first work after it has stopped looking before that is begun: it may
    be what a worker gets stuck in. 1: `count` events are left for the next breath."""
    rests = instance.rests(context.instance(w))
    if context.rests(w) == rests or not context.slept(w):
        return 0
    context.set_rests(w, rests)
    context.set_attend(w, ATTEND_AWAKE)
    context.set_events_left(w, count)
    context.set_busy(w, 1)
    return 1


@jit
def _breath(w, patience_ms):
    context.set_attend(w, 0)
    context.set_slow_count(w, 0)
    context.set_error_count(w, 0)
    _clock(w)
    count = _wait(w, patience_ms)
    if _says_awake(w, count):
        return
    _clock(w)
    for number in range(count):
        event = context.events(w) + number * EVENT_BYTES
        data = mem.le64(event + 4)
        _dispatch(w, data >> 56, (data >> 32) & 0xFFFF, data & 0xFFFFFFFF, mem.u32(event))
    if context.listen_waiting(w):
        listen.resume(w)
    if context.inbox(w):
        context.set_inbox(w, 0)
        rehome.adopt(w)
    _timers(w)
    _rx_kicks(w)
    if _handed_over(w):
        _depart(w)
    rehome.part(w)
    _tx_rings(w)
    _settle(w)
    handoff.wake(w)
    _look_on(w)
    _publish(w)
    if not context.busy(w):
        spare.refill(w)
    worker.set_breaths(context.me(w), worker.breaths(context.me(w)) + 1)
    if context.error_count(w):
        context.set_attend(w, context.attend(w) | ATTEND_ERRORS)


@entry(3)
def breathe(w, patience_ms, most):
    """`most` breaths, fewer when plain Python is needed: ATTEND_* bits. Each waits at most
    `patience_ms` (-1: until something is due)."""
    for _ in range(most):
        _breath(w, patience_ms)
        if context.attend(w):
            break
    return context.attend(w)


@entry(2)
def inject(w, meta):
    """A frame made by plain Python, in slow slot 0, to the guest: meta = length | pair << 32."""
    frame, size, pair = context.slow(w), meta & 0xFFFFFFFF, meta >> 32
    if not steer.is_enabled(context.instance(w), pair):
        pair = steer.any_pair(context.instance(w), context.id(w), pair)
    mem.put_le64(context.out(w), 0)
    mem.put_le16(context.out(w) + 8, 0)
    mem.put_le16(context.out(w) + 10, 1)
    result = rx.place_or_drop(w, pair, context.out(w), VNET_BYTES, frame, min(size, SLOW_BYTES))
    handoff.wake(w)
    _publish(w)
    return result


@entry(1)
def succeed(w):
    """Take over the flows of the worker that died as this one."""
    _clock(w)
    return inherit.flows(w)


@entry(1)
def revive(w):
    """The set of enabled receive queues changed: what waited for one, or for buffers of one that is
    enabled no longer, goes on."""
    _clock(w)
    lifecycle.room_made(w)
    for pair in range(PAIRS_MAX):  # also of rings that have not come (inherit.py)
        if not steer.is_enabled(context.instance(w), pair):
            lifecycle.unblock(w, lifecycle.FIRST_RING + pair)
    listen.resume(w)
    handoff.wake(w)
    context.set_busy(w, 1)
    return 0


@entry(2)
def ring_stopped(w, index):
    """A ring goes away: publish what is finished, and let what waited for it look for another."""
    r = context.rings(w) + index * ring.SIZE
    virtq.publish(r, context.option(w))
    ring.set_running(r, 0)
    lifecycle.unblock(w, lifecycle.FIRST_RING + (index >> 1))
    ring.set_starved(r, 0)
    context.set_busy(w, 1)
    return virtq.base(r)
