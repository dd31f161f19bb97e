"""udp_train.py - consecutive datagrams of a flow from the guest, in one system call.

Theory      Datagrams of one flow that follow one another in a burst are strung together where they
            lie, in guest memory, as long as they have one size (the last may be shorter). Such a
            train is one sendmsg with UDP_SEGMENT: the kernel walks its stack once and cuts at the
            end. flush() sends; it runs when another flow's turn comes, when a train is full, and at
            the end of a burst, before the chains go back to the guest.
Why so      A datagram costs a system call and the way through the stack; the bytes cost little.
            Nothing is copied and nothing waits: the train never outlives the burst.
Refused     Where the kernel cannot segment (datagrams above the path's MTU, a route without
            checksum offload), the flow is marked NO_SEGMENT and its trains go by sendmmsg from then
            on.
Errors      An ICMP error that came meanwhile fails one call; it was about an earlier datagram, so
            the call is made once more.
Limits      TRAIN_MAX datagrams (the kernel's UDP_MAX_SEGMENTS), TRAIN_BYTES.
Ownership   Only flows whose home is this worker.
Drops       socket_full, send_failed: counted for each datagram.
"""

from __future__ import annotations

from dataplane import iov, lifecycle, sockets, virtq
from dataplane.context import (
    GATHER_IOV_MAX,
    IOV_BYTES,
    MMSG_BYTES,
    TRAIN_MAX,
    context,
)
from dataplane.lifecycle import GUEST_SAID, NO_SEGMENT
from flows import table
from shm import libc, mem
from shm.access import flow
from shm.jit import jit
from shm.schema import DROP

SOCKET_FULL = -1 - DROP["socket_full"]
SEND_FAILED = -1 - DROP["send_failed"]

CMSG_BYTES = 16  # struct cmsghdr
MSG_LEN = 56  # mmsghdr.msg_len
TRAIN_BYTES = 65507  # the largest payload of an IPv4 datagram bounds a train, too
FLAGS = sockets.MSG_DONTWAIT | sockets.MSG_NOSIGNAL


@jit
def _fits(w, index, size):
    """1 when a datagram may follow those in the train."""
    number = context.train_number(w)
    if context.train_flow(w) != index + 1 or number == TRAIN_MAX or size == 0:
        return 0
    first = context.train_size(w)
    if size > first or context.train_bytes(w) % first:  # the last one was shorter
        return 0
    pieces = context.train_count(w) + context.chain_count(w)
    return 1 if context.train_bytes(w) + size <= TRAIN_BYTES and pieces <= GATHER_IOV_MAX else 0


@jit
def add(w, index, skip, size):
    """Append a datagram of `size` bytes, `skip` bytes into the chain at hand."""
    if context.train_flow(w) and not _fits(w, index, size):
        flush(w)
    number, before = context.train_number(w), context.train_count(w)
    if number == 0:
        context.set_train_flow(w, index + 1)
        context.set_train_size(w, size)
    count = iov.append_slice(
        context.train_iov(w), before, context.chain_iov(w), context.chain_count(w), skip, size
    )
    m = context.train_msgs(w) + number * MMSG_BYTES
    mem.put_u64(m + 16, context.train_iov(w) + before * IOV_BYTES)
    mem.put_u64(m + 24, count - before)
    context.set_train_count(w, count)
    context.set_train_bytes(w, context.train_bytes(w) + size)
    context.set_train_number(w, number + 1)
    if size == 0:
        flush(w)


@jit
def _send_segmented(w, f, number, count, total, size):
    """The whole train as one large datagram, cut into `size` bytes each. Bytes sent, or -1 when the
    kernel cannot do that."""
    control, message = context.control(w), sockets.put_msghdr(w, context.train_iov(w), count)
    mem.put_u64(control, CMSG_BYTES + 2)
    mem.put_u32(control + 8, sockets.SOL_UDP)
    mem.put_u32(control + 12, sockets.UDP_SEGMENT)
    mem.put_u16(control + CMSG_BYTES, size)
    mem.put_u64(message + 32, control)
    mem.put_u64(message + 40, CMSG_BYTES + 8)
    done = libc.sendmsg(flow.fd(f), message, FLAGS)
    if done == -sockets.EINVAL or done == -sockets.EMSGSIZE or done == -sockets.EIO:
        lifecycle.put(f, NO_SEGMENT)
        return -1
    if done < 0 and done != -sockets.EAGAIN:
        done = libc.sendmsg(flow.fd(f), message, FLAGS)
    if done < 0:
        _drop(w, SOCKET_FULL if done == -sockets.EAGAIN else SEND_FAILED, number)
        return 0
    return total


@jit
def _sent(w, at, count):
    """Bytes of `count` datagrams that sendmmsg has sent (msg_len)."""
    total = 0
    for number in range(at, at + count):
        total += mem.u32(context.train_msgs(w) + number * MMSG_BYTES + MSG_LEN)
    return total


@jit
def _send_each(w, f, number):
    """One datagram after another. Bytes sent."""
    at, total, again = 0, 0, 1
    for _ in range(2 * TRAIN_MAX):
        if at == number:
            break
        messages = context.train_msgs(w) + at * MMSG_BYTES
        done = libc.sendmmsg(flow.fd(f), messages, number - at, FLAGS)
        if done == -sockets.EAGAIN:
            _drop(w, SOCKET_FULL, number - at)
            break
        if done > 0:
            total += _sent(w, at, done)
            at, again = at + done, 1
        elif again:
            again = 0
        else:
            _drop(w, SEND_FAILED, 1)
            at, again = at + 1, 1
    return total


@jit
def _drop(w, reason, number):
    for _ in range(number):
        virtq.drop_late(w, reason)


@jit
def flush(w):
    """Send the train."""
    index, number, size = context.train_flow(w) - 1, context.train_number(w), context.train_size(w)
    if index < 0:
        return
    count, total = context.train_count(w), context.train_bytes(w)
    context.set_train_flow(w, 0)
    context.set_train_number(w, 0)
    context.set_train_count(w, 0)
    context.set_train_bytes(w, 0)
    f, sent = table.at(context.table(w), index), -1
    if number > 1 and not lifecycle.has(f, NO_SEGMENT):
        sent = _send_segmented(w, f, number, count, total, size)
    if sent < 0:
        sent = _send_each(w, f, number)
    flow.set_tx_bytes(f, flow.tx_bytes(f) + sent)
    lifecycle.said(w, f, index, GUEST_SAID)
