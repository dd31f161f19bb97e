"""driver_ring.py - what the driver knows of one virtqueue, of either format, and of its buffers.

Theory      A ring has as many buffers as entries, one descriptor each. A buffer is known by its
            number, and what its descriptor says is made once (`made`): only the length of a frame
            changes. A buffer nobody uses is on a stack (`free`), else the device has it (`owned`)
            or the mover is working on it.
Indexes     `avail_idx` and `last_used` count buffers offered and taken back, modulo 2^16, in both
            formats: each buffer fills one place of the ring. Where a packed ring wants a place and
            a wrap counter, these are index & (num - 1), and whether index & num is 0.
In order    With IN_ORDER a device may return a batch by naming its last buffer only (virtio 1.3,
            2.7.9, 2.8.8): `order` says which buffers the others are. They count as used in full.
Why so      The buffer freed last is used first: its bytes are still in the cache. Therefore the
            order of buffers is not that of places, and where the format ties descriptors to places
            they are copied from `made`.
Limits      `num` is a power of two, 2^15 at most.
Ownership   One mover per ring. Nothing here is read by the device.
"""

from __future__ import annotations

from shm import mem
from shm.access import accessors
from shm.jit import jit
from shm.layout import parse

BROKEN = -1
DESC_BYTES = 16

DRIVER_RING = parse("""
struct driver_ring: the driver side of one virtqueue
  writer mover:
    u32 num                  entries, a power of two
    u32 packed               1: VIRTIO_F_RING_PACKED negotiated
    u32 in_order             1: VIRTIO_F_IN_ORDER negotiated
    u32 event_idx            1: VIRTIO_F_EVENT_IDX negotiated
    u64 desc                 host address of the descriptors
    u64 avail                host address of the driver's area: avail ring or event suppression
    u64 used                 host address of the device's area: used ring or event suppression
    u64 made                 host address of the descriptor made for buffer 0
    u64 buffers              host address of buffer 0
    u64 stride               bytes from one buffer to the next
    u64 lengths              host address of the length word of buffer 0's frame
    u64 length_stride        bytes from one length word to the next
    u64 length_skip          bytes of a frame that this word does not count
    u64 free                 private: u16[num], a stack of buffers nobody uses
    u64 owned                private: u8[num], 1 while the device has the buffer
    u64 order                private: u16[num], in order: the buffer offered at each place
    u64 offered              private: u16[num], in order: the index each buffer was offered at
    u32 free_count           buffers on the stack
    u32 out                  buffers the device has
    u32 avail_idx            index of the next buffer to offer (16 bits)
    u32 notified             avail_idx at the last notify() (16 bits)
    u32 last_used            index of the next buffer to take (16 bits)
    u32 batch                in order: buffers of the batch at hand that are not taken yet
    u32 batch_length         in order: bytes written to the last of them
    i32 kick_fd              eventfd to the device
    u64 frames               frames moved
    u64 bytes                their bytes, Ethernet header included
    u64 dropped              frames that could not be moved
    u64 kicks                notifications to the device
""")

ring = accessors(DRIVER_RING)


@jit
def buffer(r, number):
    """The address of a buffer."""
    return ring.buffers(r) + number * ring.stride(r)


@jit
def push_free(r, number):
    """Nobody uses this buffer now."""
    count = ring.free_count(r)
    mem.put_u16(ring.free(r) + 2 * count, number)
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
def set_length(r, number, size):
    """A frame to send has `size` bytes, its virtio-net header included."""
    word = ring.lengths(r) + number * ring.length_stride(r)
    mem.put_u32(word, size - ring.length_skip(r))


@jit
def given(r, number):
    """The device has been shown this buffer at `avail_idx`."""
    at = ring.avail_idx(r)
    if ring.in_order(r):
        mem.put_u16(ring.order(r) + 2 * (at & (ring.num(r) - 1)), number)
        mem.put_u16(ring.offered(r) + 2 * number, at)
    mem.put_u8(ring.owned(r) + number, 1)
    ring.set_avail_idx(r, (at + 1) & 0xFFFF)
    ring.set_out(r, ring.out(r) + 1)


@jit
def is_out(r, number):
    """1 when the device has a buffer of this number."""
    return 1 if number < ring.num(r) and mem.u8(ring.owned(r) + number) else 0


@jit
def taken_back(r, number):
    """The device has returned this buffer, the one at `last_used` of those it returned."""
    mem.put_u8(ring.owned(r) + number, 0)
    ring.set_last_used(r, (ring.last_used(r) + 1) & 0xFFFF)
    ring.set_out(r, ring.out(r) - 1)


@jit
def set_batch(r, count, length):
    """In order: the device has returned the next `count` buffers, `length` bytes in the last."""
    ring.set_batch(r, count)
    ring.set_batch_length(r, length)


@jit
def next_of_batch(r):
    """In order: the next buffer of the batch at hand is taken back; its number | bytes << 32."""
    left = ring.batch(r) - 1
    ring.set_batch(r, left)
    number = mem.u16(ring.order(r) + 2 * (ring.last_used(r) & (ring.num(r) - 1)))
    taken_back(r, number)
    return number | (ring.stride(r) if left else ring.batch_length(r)) << 32
