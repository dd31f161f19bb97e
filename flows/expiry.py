"""expiry.py - when each flow must be looked at again: a timer wheel of flow indexes.

Theory      Three levels of 256 slots: 8 ms, 2 s and 9 min wide. A flow stands in at most one slot,
            in a doubly linked list through arrays indexed by flow. Setting a timer is a store to
            flow.deadline_ms; the flow is put into the wheel only if it is not there yet or must
            come earlier. When its slot comes due and its deadline lies later, it is simply put in
            again: so a timer that moves with every packet costs one store per packet.
Why so      No descriptor per flow and no scan of the table; `next_ms` lets an idle worker sleep
            until something is really due.
Limits      Resolution 8 ms; longest delay 37 hours (later deadlines come due early and are put in
            again).
Ownership   Private to one worker, for the flows it is home of.
"""

from __future__ import annotations

from shm import mem
from shm.access import accessors
from shm.jit import jit
from shm.layout import parse
from shm.schema import FLOWS_MAX

TICK_BITS = 3
LEVEL_BITS = 8
SLOTS = 1 << LEVEL_BITS
LEVELS = 3
HEADS = LEVELS * SLOTS
NODE_BYTES = (
    16  # u32 next + 1, u32 previous + 1, u32 slot + 1, u32 tick it stands for; 0 means none
)

WHEEL = parse("""
struct wheel: timers of one worker
  writer worker:
    u64 tick                 everything before this tick has been handed out
    u64 nodes                NODE_BYTES per flow
    u64 heads                u32 per slot: first flow + 1
    u64 count                flows in the wheel
    u64 soonest              no slot before this tick is filled (a lower bound, made exact by `due`)
""")
wheel = accessors(WHEEL)
NODES_BYTES = NODE_BYTES * FLOWS_MAX
HEADS_BYTES = 4 * HEADS


@jit
def _tick_of(x, deadline_ms):
    """The tick that stands for a deadline: neither in the past nor beyond the last level."""
    now, width = wheel.tick(x), (LEVELS - 1) * LEVEL_BITS
    return min(max(deadline_ms >> TICK_BITS, now), ((now >> width) + SLOTS - 1) << width)


@jit
def _slot_of(x, tick):
    """The slot for a tick that `_tick_of` gave: in the first level whose span reaches it."""
    now = wheel.tick(x)
    for level in range(LEVELS):
        width = level * LEVEL_BITS
        if (tick >> width) - (now >> width) < SLOTS:
            return level * SLOTS + ((tick >> width) & (SLOTS - 1))
    return -1


@jit
def cancel(x, index):
    """Take a flow out of the wheel; harmless when it is not in."""
    node = wheel.nodes(x) + index * NODE_BYTES
    slot = mem.u32(node + 8)
    if slot == 0:
        return
    following, previous = mem.u32(node), mem.u32(node + 4)
    if previous:
        mem.put_u32(wheel.nodes(x) + (previous - 1) * NODE_BYTES, following)
    else:
        mem.put_u32(wheel.heads(x) + 4 * (slot - 1), following)
    if following:
        mem.put_u32(wheel.nodes(x) + (following - 1) * NODE_BYTES + 4, previous)
    mem.put_u32(node + 8, 0)
    wheel.set_count(x, wheel.count(x) - 1)


@jit
def arm(x, index, deadline_ms):
    """Have `index` handed out at `deadline_ms`, in place of any other time."""
    cancel(x, index)
    tick = _tick_of(x, deadline_ms)
    slot = _slot_of(x, tick)
    head = wheel.heads(x) + 4 * slot
    first = mem.u32(head)
    node = wheel.nodes(x) + index * NODE_BYTES
    mem.put_u32(node, first)
    mem.put_u32(node + 4, 0)
    mem.put_u32(node + 8, slot + 1)
    if first:
        mem.put_u32(wheel.nodes(x) + (first - 1) * NODE_BYTES + 4, index + 1)
    mem.put_u32(head, index + 1)
    wheel.set_count(x, wheel.count(x) + 1)
    mem.put_u32(node + 12, tick)
    if tick < wheel.soonest(x) or wheel.count(x) == 1:
        wheel.set_soonest(x, tick)


@jit
def arm_by(x, index, deadline_ms):
    """Have `index` handed out no later than `deadline_ms`: nothing to do when it stands earlier
    already."""
    node = wheel.nodes(x) + index * NODE_BYTES
    later = (
        mem.u32(node + 12) - _tick_of(x, deadline_ms)
    ) & 0xFFFFFFFF  # ticks wrap after 397 days
    if mem.u32(node + 8) == 0 or 0 < later < 0x80000000:
        arm(x, index, deadline_ms)


@jit
def _next_tick(x):
    """The first tick at which a slot must be looked at, or -1: a lower bound of the next
    deadline."""
    now = wheel.tick(x)
    best = -1
    for level in range(LEVELS):
        width = level * LEVEL_BITS
        first = now >> width
        for step in range(SLOTS):
            if mem.u32(wheel.heads(x) + 4 * (level * SLOTS + ((first + step) & (SLOTS - 1)))):
                tick = max((first + step) << width, now)
                if best < 0 or tick < best:
                    best = tick
                break
    return best


@jit
def next_ms(x):
    """When `due` should be called next, in ms of the same clock; -1 when nothing waits."""
    if wheel.count(x) == 0:
        return -1
    return (wheel.soonest(x) + 1) << TICK_BITS


@jit
def due(x, now_ms):
    """A flow whose slot has come due, taken out of the wheel, or -1. Call until -1.

    Its deadline may lie later: the caller compares and arms it again.
    """
    target = now_ms >> TICK_BITS
    if wheel.count(x) == 0 or target <= wheel.soonest(x):
        wheel.set_tick(x, max(target, wheel.tick(x)))
        return -1
    tick = _next_tick(x)
    wheel.set_soonest(x, tick)
    if tick >= target:
        wheel.set_tick(x, max(target, wheel.tick(x)))
        return -1
    wheel.set_tick(x, tick)
    for level in range(LEVELS):
        slot = level * SLOTS + ((tick >> (level * LEVEL_BITS)) & (SLOTS - 1))
        first = mem.u32(wheel.heads(x) + 4 * slot)
        if first:
            cancel(x, first - 1)
            return first - 1
    return -1
