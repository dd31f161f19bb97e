"""tcp_held.py - payload from the guest that cannot go to its socket yet.

Theory      Two kinds of bytes arrive too soon: those behind a gap (a frame was lost on its way to
            our ring, as forwarders between a guest and us lose them: DPDK, a tap, a bridge), and
            those a socket refused because its buffer shrank after the window was announced. They
            are copied into one of HELD_MAX buffers of the worker and handed to the socket when what
            is missing has come, or when the socket has room. Byte `seq` lies at seq % HELD_BYTES.
            The guest is told which bytes behind a gap we have (SACK, RFC 2018) and sends only the
            missing ones. Nothing held is acknowledged: only the socket's taking is.
Why so      All this is the guest's to send again, and nothing else here is copied. But without it a
            guest whose frames get lost sends whole windows again, and where its kernel has no SACK
            from us it waits for a timer that doubles: measured behind DPDK and a tap with Linux'
            BBR, 4 MiB took more than 20 s in one transfer of twenty.
Limits      HELD_MAX flows of a worker at a time, HELD_BYTES behind the first missing byte, RANGES
            pieces. A buffer nobody touched for STALE_MS goes to the next flow that needs one: what
            was held may be forgotten at any time (RFC 2018 8).
Ownership   Private to the worker. A flow that holds payload does not move (rehome.py); what a
            worker holds when it dies is lost with it, and the guest sends it again (inherit.py).
Drops       None of its own: keep() says whether it kept.
"""

from __future__ import annotations

from dataplane import iov
from dataplane.context import HELD_BYTES, HELD_MAX, RANGES, context, held
from dataplane.wire import M32, distance
from flows import table
from shm import mem
from shm.access import flow, worker
from shm.jit import jit

STALE_MS = 1000
BLOCKS_MAX = 4  # of a segment without other options (RFC 2018 3)


@jit
def _of(w, f):
    """The flow's buffer; only where it has one."""
    return context.held(w) + (flow.held(f) - 1) * held.SIZE


@jit
def _left(h, number):
    return mem.u32(held.left(h) + 4 * number)


@jit
def _right(h, number):
    return mem.u32(held.right(h) + 4 * number)


@jit
def _set(h, number, left, right):
    mem.put_u32(held.left(h) + 4 * number, left)
    mem.put_u32(held.right(h) + 4 * number, right)


@jit
def release(w, f):
    """The flow has no use for its buffer any more."""
    if flow.held(f):
        held.set_owner(_of(w, f), 0)
        flow.set_held(f, 0)


@jit
def _claim(w, f, index):
    """A buffer for the flow: a free one or one nobody touched for long; 0 when there is none."""
    oldest, oldest_ms = -1, context.now_ms(w) - STALE_MS
    for number in range(HELD_MAX):
        h = context.held(w) + number * held.SIZE
        if held.owner(h) == 0:
            oldest = number
            break
        if held.used_ms(h) < oldest_ms:
            oldest, oldest_ms = number, held.used_ms(h)
    if oldest < 0:
        return 0
    h = context.held(w) + oldest * held.SIZE
    if held.owner(h):
        flow.set_held(table.at(context.table(w), held.owner(h) - 1), 0)
    held.set_owner(h, index + 1)
    held.set_count(h, 0)
    held.set_finished(h, 0)
    flow.set_held(f, oldest + 1)
    return h


@jit
def _insert(h, left, right):
    """Note the bytes left..right; ranges that meet become one. 0 when there are too many ranges."""
    first, count = 0, held.count(h)
    for _ in range(count):
        if first == count or distance(_right(h, first), left) >= 0:
            break
        first += 1
    last = first  # ranges first..last - 1 meet the new one
    for _ in range(count):
        if last == count or distance(_left(h, last), right) > 0:
            break
        last += 1
    if first == last:
        if count == RANGES:
            return 0
        for number in range(count, first, -1):
            _set(h, number, _left(h, number - 1), _right(h, number - 1))
        _set(h, first, left, right)
        held.set_count(h, count + 1)
        return 1
    if distance(_left(h, first), left) < 0:
        left = _left(h, first)
    if distance(_right(h, last - 1), right) > 0:
        right = _right(h, last - 1)
    _set(h, first, left, right)
    _remove(h, first + 1, last)
    return 1


@jit
def _remove(h, first, end):
    count = held.count(h)
    for number in range(end, count):
        _set(h, number - end + first, _left(h, number), _right(h, number))
    held.set_count(h, count - (end - first))


@jit
def _copy(w, f, seq, source, pieces, skip, size):
    """Bytes skip..skip + size of the pieces to their place, in two parts at the buffer's end."""
    base, at = context.held_bytes(w) + (flow.held(f) - 1) * HELD_BYTES, seq % HELD_BYTES
    front = min(size, HELD_BYTES - at)
    iov.copy_out(base + at, source, pieces, skip, front)
    iov.copy_out(base, source, pieces, skip + front, size - front)
    worker.set_held_bytes(context.me(w), worker.held_bytes(context.me(w)) + size)


@jit
def keep(w, f, index, seq, source, pieces, skip, size, fin):
    """Keep the payload of a segment: `size` bytes, `skip` bytes into the pieces, `fin` 1 when FIN
    follows them. 1 when all of it is held now."""
    early = distance(flow.seq_from_guest(f), seq)
    if early > 0:
        seq, skip, size = (seq + early) & M32, skip + early, size - early
    whole, room = 1, HELD_BYTES - distance(seq, flow.seq_from_guest(f))
    if size > room:
        whole, size, fin = 0, room, 0
    if size < 0 or size + fin <= 0:
        return 0
    h = _of(w, f) if flow.held(f) else _claim(w, f, index)
    if h == 0:
        return 0
    held.set_used_ms(h, context.now_ms(w))
    if size > 0:
        if not _insert(h, seq, (seq + size) & M32):
            return 0
        held.set_latest(h, seq)
        _copy(w, f, seq, source, pieces, skip, size)
    if fin:
        held.set_finished(h, 1)
        held.set_fin(h, (seq + size) & M32)
    return whole


@jit
def waits(w, f):
    """1 when the next bytes for the socket are held: it refused them, and no others may pass."""
    if flow.held(f) == 0:
        return 0
    h, expected = _of(w, f), flow.seq_from_guest(f)
    if held.finished(h) and held.fin(h) == expected:
        return 1
    return 1 if held.count(h) and distance(expected, _left(h, 0)) >= 0 else 0


@jit
def take(w, f, expected, target):
    """What follows the byte before `expected`: its pieces are put at `target` (room for two
    iovecs) and held no longer. Bytes; they stay in place until the next keep()."""
    h = _of(w, f)
    for _ in range(RANGES):
        if held.count(h) == 0 or distance(_left(h, 0), expected) > 0:
            return 0
        right = _right(h, 0)
        _remove(h, 0, 1)
        size = distance(right, expected)
        if size <= 0:
            continue  # the guest sent all of it once more
        base, at = context.held_bytes(w) + (flow.held(f) - 1) * HELD_BYTES, expected % HELD_BYTES
        front = min(size, HELD_BYTES - at)
        mem.put_u64(target, base + at)
        mem.put_u64(target + 8, front)
        mem.put_u64(target + 16, base)
        mem.put_u64(target + 24, size - front)
        return size
    return 0


@jit
def ends_at(w, f, seq):
    """1 when the guest's FIN, seen before, stands at `seq`."""
    h = _of(w, f)
    return 1 if held.finished(h) and held.fin(h) == seq else 0


@jit
def tidy(w, f):
    """Give the buffer back when nothing is held."""
    if flow.held(f) and held.count(_of(w, f)) == 0:
        h = _of(w, f)
        if not held.finished(h) or distance(flow.seq_from_guest(f), held.fin(h)) > 0:
            release(w, f)


@jit
def _put_block(h, number, at):
    mem.put_be32(at, _left(h, number))
    mem.put_be32(at + 4, _right(h, number))


@jit
def put_sack(w, f, at):
    """The SACK option at `at`, padded to words; its bytes, 0 when there is nothing to tell.

    The range of the latest segment stands first (RFC 2018 4). What only waits for the socket is
    not told: a block that begins at the acknowledgement would mean something else.
    """
    if flow.held(f) == 0:
        return 0
    h, blocks, latest = _of(w, f), 0, -1
    count = held.count(h)
    for number in range(count):
        if distance(_left(h, number), flow.seq_from_guest(f)) <= 0:
            continue
        inside = distance(held.latest(h), _left(h, number))
        if 0 <= inside < distance(_right(h, number), _left(h, number)):
            latest = number
            _put_block(h, number, at + 4)
            blocks = 1
    for number in range(count):
        beyond = distance(_left(h, number), flow.seq_from_guest(f)) > 0
        if beyond and number != latest and blocks < BLOCKS_MAX:
            _put_block(h, number, at + 4 + 8 * blocks)
            blocks += 1
    if blocks == 0:
        return 0
    mem.put_be32(at, 0x01010500 | (2 + 8 * blocks))  # NOP, NOP, kind 5, length
    return 4 + 8 * blocks
