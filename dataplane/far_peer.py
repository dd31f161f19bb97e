"""far_peer.py - what the distance of a flow's other end changes, and what it does not.

Theory      guest -> host  Nothing. Whatever the round trip, the guest gets its acknowledgement when
                           the socket has taken the data: the host's TCP fills the line, with a
                           send buffer the kernel sizes for it, and the guest needs no window of
                           that size.
            host -> guest  The kernel opens a socket's receive window with 64 KiB, and wider when
                           more than it has thought of is taken in one round trip. Looking
                           (MSG_PEEK) counts as taking nothing, so where one segment nearly fills
                           the first window it would stay so: one segment each round trip. So the
                           first time that much comes at once the round trip is asked for, and the
                           window of a far peer is opened wide: SO_RCVLOWAT makes the receive buffer
                           larger, as an application may that reads in large pieces, and is taken
                           back. SO_RCVBUF would end the kernel's own sizing, and has a lower limit.
Why so      24 MiB over 50 ms (tests/system/test_wan.py). Guest to host 0.91 s, a program of the
            host 0.92; to acknowledge only what the far end has is no faster (0.95 with passt, which
            does), and has to ask the kernel again and again. Host to guest at an MTU of 65520 0.63
            s, before 4 to 14; a program of the host 0.77. Near peers need no window beyond the
            first: at the same MTU, in turn, 24.2 Gbit/s with it and 25.2 without. Nor does a near
            peer's answer, though it comes soon, take the acknowledgement along: to wait for it cost
            3 to 7 % of the requests per second (a guest that has just been told is still awake when
            the answer comes), and brought QEMU's guest 2 to 5 %.
Cost        Nothing for flows that only talk; else one system call, for a far peer three, once.
Limits      Far is FAR_RTT_US, at which the first window carries half a Gbit/s. The kernel grants at
            most half of tcp_rmem's largest, and what the guest has not taken is the kernel's
            memory: as much as for a program that does not read.
Ownership   Only flows whose home is this worker.
Drops       None.
"""

from __future__ import annotations

from dataplane import lifecycle, sockets
from dataplane.context import context
from shm import libc, mem
from shm.access import flow
from shm.jit import jit

BULK_BYTES = 1 << 13
FAR_RTT_US = 1000
FAR_WINDOW_BYTES = 1 << 20

TCP_INFO_RTT, TCP_INFO_BYTES = 68, 72  # struct tcp_info up to tcpi_rtt


@jit
def rtt_us(w, f):
    """The kernel's round-trip time of a flow's socket, from its handshake at least; 0 when it
    has none."""
    at = context.option(w)
    mem.put_u32(at + TCP_INFO_RTT, 0)
    mem.put_u32(at + TCP_INFO_BYTES, TCP_INFO_BYTES)
    size = at + TCP_INFO_BYTES
    libc.getsockopt(flow.fd(f), sockets.IPPROTO_TCP, sockets.TCP_INFO, at, size)
    return mem.u32(at + TCP_INFO_RTT)


@jit
def widen(w, f):
    """Have the receive buffer of a flow's socket take FAR_WINDOW_BYTES."""
    sockets.set_int(w, flow.fd(f), sockets.SOL_SOCKET, sockets.SO_RCVLOWAT, FAR_WINDOW_BYTES)
    sockets.set_int(w, flow.fd(f), sockets.SOL_SOCKET, sockets.SO_RCVLOWAT, 1)


@jit
def arrived(w, f, size):
    """So much came from the host at once."""
    if size < BULK_BYTES or lifecycle.has(f, lifecycle.RTT_KNOWN):
        return
    lifecycle.put(f, lifecycle.RTT_KNOWN)
    if rtt_us(w, f) >= FAR_RTT_US:
        widen(w, f)
