"""driver.py - split virtqueues, the driver side (virtio 1.3, 2.7).

Theory      offer() puts a buffer into the avail ring, where an awake device finds it; notify()
            kicks one that sleeps and asked to be woken for what was offered since the last look.
            finished() and take() get used buffers back. A ring's buffers and descriptors never
            change place (dataplane/guest_memory.py): a buffer is named by its head, and the only
            thing written per frame is a length.
Calls       While frames move, the device is asked not to call. Before waiting, ask_for_call(), then
            a full barrier, then one more look: else the last call is lost (2.7.10).
Why so      The buffer freed last is used first: its bytes are still in the cache.
Limits      One chain per buffer; no packed rings.
Ownership   One mover per ring pair. The device's words are read once each, by atomic loads, and are
            not trusted: BROKEN is returned for what a device cannot have said, and the ring is
            over.
"""

from __future__ import annotations

from shm import libc, mem
from shm.access import accessors
from shm.jit import jit
from shm.layout import parse

AVAIL_F_NO_INTERRUPT = 1
USED_F_NO_NOTIFY = 1
BROKEN = -1

DRIVER_RING = parse("""
struct driver_ring: the driver side of one split virtqueue
  writer mover:
    u32 num                  entries, a power of two
    u32 event_idx            1: VIRTIO_F_EVENT_IDX negotiated
    u64 avail                host address of the avail ring
    u64 used                 host address of the used ring
    u64 buffers              host address of buffer 0
    u64 stride               bytes from one buffer to the next
    u64 lengths              host address of the length word of buffer 0's frame
    u64 length_stride        bytes from one length word to the next
    u64 length_skip          bytes of a frame that this word does not count
    u64 free                 private: u16[num], a stack of buffers nobody uses
    u64 owned                private: u8[num], 1 while the device has the buffer
    u32 free_count           buffers on the stack
    u32 out                  buffers the device has
    u32 avail_idx            next avail entry to fill (16 bits)
    u32 notified             avail index at the last notify() (16 bits)
    u32 last_used            next used entry to take (16 bits)
    i32 kick_fd              eventfd to the device
    u64 frames               frames moved
    u64 bytes                their bytes, Ethernet header included
    u64 dropped              frames that could not be moved
    u64 kicks                notifications to the device
""")

ring = accessors(DRIVER_RING)


@jit
def buffer(r, head):
    """The address of a buffer."""
    return ring.buffers(r) + head * ring.stride(r)


@jit
def push_free(r, head):
    """Nobody uses this buffer now."""
    count = ring.free_count(r)
    mem.put_u16(ring.free(r) + 2 * count, head)
    ring.set_free_count(r, count + 1)


@jit
def top_free(r):
    """The buffer to use next; there must be one."""
    return mem.u16(ring.free(r) + 2 * (ring.free_count(r) - 1))


@jit
def pop_free(r):
    """top_free() is in use now."""
    ring.set_free_count(r, ring.free_count(r) - 1)


@jit
def set_length(r, head, size):
    """A frame to send has `size` bytes, its virtio-net header included."""
    word = ring.lengths(r) + head * ring.length_stride(r)
    mem.put_u32(word, size - ring.length_skip(r))


@jit
def offer(r, head):
    """Give a buffer to the device."""
    at = ring.avail_idx(r)
    mem.put_u16(ring.avail(r) + 4 + 2 * (at & (ring.num(r) - 1)), head)
    mem.put_u8(ring.owned(r) + head, 1)
    ring.set_avail_idx(r, (at + 1) & 0xFFFF)
    ring.set_out(r, ring.out(r) + 1)
    mem.release_u16(ring.avail(r) + 2, at + 1)  # the entry must be visible before the index


@jit
def _wants_kick(r, old, new):
    """Whether the device asked to hear of avail entries old..new (2.7.10)."""
    mem.fence()  # the avail index must be visible before the device's wish is read
    if ring.event_idx(r):
        event = mem.u16(ring.used(r) + 4 + 8 * ring.num(r))
        return (new - event - 1) & 0xFFFF < (new - old) & 0xFFFF
    return mem.u16(ring.used(r)) & USED_F_NO_NOTIFY == 0


@jit
def unnotified(r):
    """Buffers offered since the last notify()."""
    return (ring.avail_idx(r) - ring.notified(r)) & 0xFFFF


@jit
def notify(r, scratch):
    """Kick the device if it wants to hear of what was offered; `scratch` holds 8 bytes."""
    old, new = ring.notified(r), ring.avail_idx(r)
    if old == new:
        return
    ring.set_notified(r, new)
    if _wants_kick(r, old, new):
        mem.put_u64(scratch, 1)
        libc.write(ring.kick_fd(r), scratch, 8)
        ring.set_kicks(r, ring.kicks(r) + 1)


@jit
def finished(r):
    """Used entries not taken yet; BROKEN when they are more than the buffers the device had."""
    count = (mem.acquire_u16(ring.used(r) + 2) - ring.last_used(r)) & 0xFFFF
    return count if count <= ring.out(r) else BROKEN


@jit
def take(r):
    """The next used entry, which finished() has seen: head | bytes written << 32; or BROKEN."""
    at = ring.last_used(r)
    entry = ring.used(r) + 4 + 8 * (at & (ring.num(r) - 1))
    head, length = mem.u32(entry), mem.u32(entry + 4)
    if head >= ring.num(r) or mem.u8(ring.owned(r) + head) == 0:
        return BROKEN
    mem.put_u8(ring.owned(r) + head, 0)
    ring.set_last_used(r, (at + 1) & 0xFFFF)
    ring.set_out(r, ring.out(r) - 1)
    return head | (length << 32)


@jit
def written(word):
    """The bytes written, of a used entry as take() gives it."""
    return (word >> 32) & 0xFFFFFFFF


@jit
def suppress_calls(r):
    """Ask the device for no calls."""
    if ring.event_idx(r):  # an index it has passed
        mem.put_u16(ring.avail(r) + 4 + 2 * ring.num(r), ring.last_used(r) - 1)
    else:
        mem.put_u16(ring.avail(r), AVAIL_F_NO_INTERRUPT)


@jit
def ask_for_call(r, after):
    """Ask for a call when `after` more buffers are used; without EVENT_IDX, when one is."""
    if ring.event_idx(r):
        mem.put_u16(ring.avail(r) + 4 + 2 * ring.num(r), ring.last_used(r) + after - 1)
    else:
        mem.put_u16(ring.avail(r), 0)
