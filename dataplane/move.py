"""move.py - one bounded step of a mover: frames between a TAP queue and a pair of rings.

Theory      A step waits for something to do, then
              1  rx ring -> TAP: each frame is one writev from the buffers it was received in, which
                 go back to the device at once;
              2  TAP -> tx ring: each frame is one read into the buffer it is sent from.
            The TAP's header is the virtio-net header (IFF_VNET_HDR, 12 bytes), so offloads pass
            from kernel to device and back as they are, and no byte is copied here.
Checksums   A TAP does not know DATA_VALID ("checked, whatever the checksum field says"), which
            back-ends may send: such a frame becomes one whose checksum is still to be computed
            (NEEDS_CSUM), which a receiving kernel trusts just as well.
Notifying   The device sees each frame at once if it looks. Whether it wants a kick is asked every
            KICK_FRAMES frames, for buffers every half ring, and at the end of a burst. After a step
            in which frames moved comes another one that does not wait; only then are calls asked
            for.
Limits      FRAMES_MAX frames each way per step. A TAP cannot hold back its sender: what a program
            sends faster than the mover takes it, the kernel drops before it gets here.
Ownership   m is private to one process (struct mover); its rings: driver.py.
Drops       What the TAP refuses, and frames the device did not finish, are counted (ring.dropped)
            and their buffers offered again. When all tx buffers are out, frames wait in the TAP's
            queue.
"""

from __future__ import annotations

from dataplane import checksum, driver, driver_ring, wire
from dataplane.context import IOV_BYTES
from dataplane.driver_ring import BROKEN, ring
from dataplane.guest_memory import HEADER_BYTES
from dataplane.wire import ETHER_BYTES, VNET_DATA_VALID, VNET_NEEDS_CSUM
from shm import libc, mem
from shm.access import accessors
from shm.jit import entry, jit
from shm.layout import parse

FRAMES_MAX = 64
KICK_FRAMES = 8
EVENTS_MAX = 4
EVENT_BYTES = 12
EVENT_TAP, EVENT_CALL = 1, 2
EAGAIN = 11
BROKEN_RX, BROKEN_TX = 1, 2  # what move() returns when a ring is over

MOVER = parse("""
struct mover: one queue pair of a guest and its TAP queue
  writer mover:
    i32 epfd                 epoll descriptor
    i32 tap_fd               TAP queue, non-blocking
    u64 rx                   struct driver_ring
    u64 tx                   struct driver_ring
    u64 events               scratch: epoll_event[EVENTS_MAX]
    u64 iov                  scratch: iovec of the frame at hand
    u64 numbers              scratch: u16 per buffer of the frame at hand
    u64 word                 scratch: 8 bytes
    u32 mergeable            1: MRG_RXBUF, a frame may span buffers
    u32 started              1: the rx ring has its buffers
    u32 tap_ready            1: the TAP may have frames
    u32 blocked              1: the TAP may have frames but all tx buffers are out
    u32 busy                 1: frames moved in the last step
""")

mover = accessors(MOVER)


@jit
def _wait_ms(m, patience_ms):
    """How long to wait: not at all after work. Calls are asked for, then rings looked at again."""
    rx, tx = mover.rx(m), mover.tx(m)
    if mover.busy(m) or patience_ms == 0:
        return 0
    driver.ask_for_call(rx, 1)
    if mover.blocked(m):
        driver.ask_for_call(tx, max(ring.out(tx) >> 1, 1))
    mem.fence()  # the wish must be visible before the used index is read
    if driver.finished(rx) != 0 or (mover.blocked(m) and driver.finished(tx) != 0):
        return 0
    return patience_ms


@jit
def _wait(m, patience_ms):
    """epoll_wait. Only a TAP's event says something: rings are looked at in any case."""
    wait_ms = _wait_ms(m, patience_ms)
    count = libc.epoll_wait(mover.epfd(m), mover.events(m), EVENTS_MAX, wait_ms)
    if mover.busy(m) == 0:  # else they are suppressed already
        driver.suppress_calls(mover.rx(m))
        driver.suppress_calls(mover.tx(m))
    for number in range(count):
        if mem.le64(mover.events(m) + number * EVENT_BYTES + 4) == EVENT_TAP:
            mover.set_tap_ready(m, 1)


@jit
def _start(m):
    """All receive buffers to the device."""
    rx = mover.rx(m)
    for number in range(ring.num(rx)):
        driver.offer(rx, number)
    driver.notify(rx, mover.word(m))
    mover.set_started(m, 1)


@jit
def _finish_checksum(at, size):
    """Turn DATA_VALID into NEEDS_CSUM for unfragmented TCP and UDP, `size` bytes from the
    virtio-net header on. The checksum field gets the pseudo header's sum (virtio 1.3, 5.1.6.2)."""
    ip = at + HEADER_BYTES + ETHER_BYTES
    room = size - HEADER_BYTES - ETHER_BYTES
    kind = mem.be16(ip - 2)
    if kind == wire.ETHERTYPE_IP4 and room >= wire.IP4_BYTES:
        v6, skip, protocol = 0, (mem.u8(ip) & 15) * 4, mem.u8(ip + 9)
        source, length = ip, mem.be16(ip + 2) - skip
        if mem.be16(ip + 6) & 0x3FFF:
            return
    elif kind == wire.ETHERTYPE_IP6 and room >= wire.IP6_BYTES:
        v6, skip, protocol = 1, wire.IP6_BYTES, mem.u8(ip + 6)
        source, length = ip + 8, mem.be16(ip + 4)
    else:
        return
    if protocol == wire.IPPROTO_TCP:
        field = 16
    elif protocol == wire.IPPROTO_UDP:
        field = 6
    else:
        return
    if room < skip + field + 2:
        return
    # wire.pseudo_sum takes IPv4 addresses as the last 4 of 16 bytes.
    target = source + 16 if v6 else source + 4
    total = checksum.fold(wire.pseudo_sum(v6, protocol, source, target, length))
    mem.put_le16(ip + skip + field, total)
    mem.put_u8(at, VNET_NEEDS_CSUM)
    mem.put_le16(at + 6, ETHER_BYTES + skip)
    mem.put_le16(at + 8, field)


@jit
def _gather(m, ready):
    """Take the buffers of one frame; `ready` are there. Sets numbers[k], iov[k]; returns how many,
    or BROKEN. A frame that is said to have more buffers than are there is emptied."""
    rx, count, wanted = mover.rx(m), 0, 1
    for _ in range(ready):
        word = driver.take(rx)
        size = driver.written(word)
        if word == BROKEN or size > ring.stride(rx):
            return BROKEN
        number = word & 0xFFFF
        at = driver_ring.buffer(rx, number)
        mem.put_u16(mover.numbers(m) + 2 * count, number)
        mem.put_u64(mover.iov(m) + IOV_BYTES * count, at)
        mem.put_u64(mover.iov(m) + IOV_BYTES * count + 8, size)
        if count == 0 and mover.mergeable(m) and size >= HEADER_BYTES:
            wanted = mem.le16(at + 10)
        count += 1
        if count >= wanted:
            break
    if count < wanted:
        mem.put_u64(mover.iov(m) + 8, 0)  # too short to be a frame: deliver() drops it
    return count


@jit
def _deliver(m, count):
    """The gathered frame to the TAP, and its buffers back to the device."""
    rx, iov = mover.rx(m), mover.iov(m)
    first, size, result = mem.u64(iov), mem.u64(iov + 8), 0
    if size >= HEADER_BYTES + ETHER_BYTES:
        if mem.u8(first) & (VNET_DATA_VALID | VNET_NEEDS_CSUM) == VNET_DATA_VALID:
            _finish_checksum(first, size)
        result = libc.writev(mover.tap_fd(m), iov, count)
    if result > 0:
        ring.set_frames(rx, ring.frames(rx) + 1)
        ring.set_bytes(rx, ring.bytes(rx) + result - HEADER_BYTES)
    else:
        ring.set_dropped(rx, ring.dropped(rx) + 1)
    for k in range(count):
        driver.offer(rx, mem.u16(mover.numbers(m) + 2 * k))
    if driver.unnotified(rx) >= ring.num(rx) >> 1:
        driver.notify(rx, mover.word(m))


@jit
def _to_tap(m):
    """Received frames to the TAP; their number or BROKEN."""
    rx = mover.rx(m)
    ready = driver.finished(rx)
    if ready == BROKEN:
        return BROKEN
    moved = 0
    for _ in range(FRAMES_MAX):
        if ready == 0:
            break
        count = _gather(m, ready)
        if count == BROKEN:
            return BROKEN
        _deliver(m, count)
        ready -= count
        moved += 1
    driver.notify(rx, mover.word(m))
    return moved


@jit
def _reclaim(tx):
    """Buffers of sent frames; BROKEN or 0."""
    ready = driver.finished(tx)
    if ready == BROKEN:
        return BROKEN
    for _ in range(ready):
        word = driver.take(tx)
        if word == BROKEN:
            return BROKEN
        driver_ring.push_free(tx, word & 0xFFFF)
    return 0


@jit
def _from_tap(m):
    """The guest's frames to the device; their number or BROKEN."""
    tx, moved = mover.tx(m), 0
    if _reclaim(tx) == BROKEN:
        return BROKEN
    mover.set_blocked(m, 0)
    for _ in range(FRAMES_MAX if mover.tap_ready(m) else 0):
        if ring.free_count(tx) == 0:
            mover.set_blocked(m, 1)
            break
        number = driver_ring.top_free(tx)
        at = driver_ring.buffer(tx, number)
        size = libc.read(mover.tap_fd(m), at, ring.stride(tx))
        if size < HEADER_BYTES + ETHER_BYTES:
            mover.set_tap_ready(m, 0)
            if size != -EAGAIN:
                ring.set_dropped(tx, ring.dropped(tx) + 1)
            break
        mem.put_u8(at, mem.u8(at) & VNET_NEEDS_CSUM)  # drivers send no other flag (5.1.6.2)
        driver_ring.pop_free(tx)
        driver_ring.set_length(tx, number, size)
        driver.offer(tx, number)
        ring.set_frames(tx, ring.frames(tx) + 1)
        ring.set_bytes(tx, ring.bytes(tx) + size - HEADER_BYTES)
        if driver.unnotified(tx) >= KICK_FRAMES:
            driver.notify(tx, mover.word(m))
        moved += 1
    driver.notify(tx, mover.word(m))
    return moved


@jit
def _step(m, patience_ms):
    if mover.started(m) == 0:
        _start(m)
    _wait(m, patience_ms)
    received = _to_tap(m)
    if received == BROKEN:
        return BROKEN_RX
    sent = _from_tap(m)
    if sent == BROKEN:
        return BROKEN_TX
    mover.set_busy(m, 1 if received + sent else 0)
    return 0


@entry(3)
def move(m, patience_ms, most):
    """`most` steps; each waits at most `patience_ms` (-1: until there is something to do). Returns
    0, or at once BROKEN_RX or BROKEN_TX when the device has broken a ring."""
    for _ in range(most):
        broken = _step(m, patience_ms)
        if broken:
            return broken
    return 0
