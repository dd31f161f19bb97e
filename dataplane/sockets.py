"""sockets.py - host sockets from compiled code: addresses, options, epoll registration, errno as a
decision.

Theory      Every flow has one non-blocking socket in its home worker, registered once,
            edge-triggered, for reading, writing and hang-up: an edge is remembered in flow.flags,
            so no registration is ever changed on the hot path. `rearm` is the one exception:
            modifying a registration makes the kernel look again and note that somebody waits for
            room (SOCK_NOSPACE), which is also what lets its send buffer grow.
Addresses   16 bytes as in flow keys; IPv4 (::ffff:a.b.c.d) gets an AF_INET socket.
Errors      -errno. EAGAIN: try later. No socket to be had (EMFILE, ENFILE, ENOBUFS, ENOMEM): the
            packet is dropped and counted. Any other ends a TCP flow; a datagram flow loses the
            datagram.
Limits      One socket a flow: as many flows as the process may open descriptors.
Ownership   A descriptor belongs to the worker that opened it; closing it ends its registration,
            but where another process has it, too (unwatch).
"""

from __future__ import annotations

from dataplane.context import EVENT_FLOW, context
from flows import address
from shm import libc, mem
from shm.access import flow, net
from shm.jit import jit

AF_INET, AF_INET6 = 2, 10
SOCK_STREAM, SOCK_DGRAM = 1, 2
SOCK_FLAGS = 0o4000 | 0o2000000  # SOCK_NONBLOCK | SOCK_CLOEXEC
SOL_SOCKET, SO_ERROR, SO_LINGER, SO_PEEK_OFF, SO_MEMINFO, SO_REUSEADDR = 1, 4, 13, 42, 55, 2
SO_OOBINLINE, SO_REUSEPORT, SO_RCVLOWAT = 10, 15, 18
IPPROTO_TCP, TCP_NODELAY, TCP_INFO = 6, 1, 11
IPPROTO_IP, IP_TTL, IP_RECVERR = 0, 2, 11
IPPROTO_IPV6, IPV6_UNICAST_HOPS, IPV6_RECVERR, IPV6_V6ONLY = 41, 16, 25, 26
MSG_PEEK, MSG_TRUNC, MSG_DONTWAIT, MSG_NOSIGNAL = 2, 0x20, 0x40, 0x4000
SOL_UDP, UDP_SEGMENT, UDP_GRO = 17, 103, 104
SHUT_WR = 1
MSG_CMSG_CLOEXEC, SCM_RIGHTS, CMSG_FD_BYTES = 0x40000000, 1, 20
NO_DESCRIPTOR, NOTHING = -1, -2
EPOLLIN, EPOLLPRI, EPOLLOUT, EPOLLERR, EPOLLHUP = 1, 2, 4, 8, 16
EPOLLRDHUP, EPOLLET = 0x2000, 1 << 31
EPOLL_ADD, EPOLL_DEL, EPOLL_MOD = 1, 2, 3
EAGAIN, EINPROGRESS, ECONNREFUSED, EINTR = 11, 115, 111, 4
EIO, EINVAL, EMSGSIZE = 5, 22, 90
MEMINFO_SNDBUF, MEMINFO_WMEM_QUEUED, MEMINFO_WORDS = 3, 5, 9  # SK_MEMINFO_*


@jit
def put_sockaddr(w, host, port):
    """struct sockaddr_in or sockaddr_in6 in scratch; its size."""
    at = context.sockaddr(w)
    mem.put_be16(at + 2, port)
    if address.is_v4(host):
        mem.put_le16(at, AF_INET)
        mem.put_be32(at + 4, mem.be32(host + 12))
        mem.put_le64(at + 8, 0)
        return 16
    mem.put_le16(at, AF_INET6)
    mem.put_be32(at + 4, 0)
    mem.copy(at + 8, host, 16)
    mem.put_u32(at + 24, net.scope_id(context.net(w)) if address.is_link_local(host) else 0)
    return 28


@jit
def get_sockaddr(w, host):
    """Store the address of the sockaddr in scratch at `host`; the port."""
    at = context.sockaddr(w)
    if mem.le16(at) == AF_INET:
        mem.put_le64(host, 0)
        mem.put_be32(host + 8, 0xFFFF)
        mem.put_be32(host + 12, mem.be32(at + 4))
    else:
        mem.copy(host, at + 8, 16)
    return mem.be16(at + 2)


@jit
def set_int(w, fd, level, option, value):
    """setsockopt of an int."""
    at = context.option(w)
    mem.put_u32(at, value)
    return libc.setsockopt(fd, level, option, at, 4)


@jit
def error_of(w, fd):
    """The pending error of a socket (SO_ERROR), which this clears."""
    at = context.option(w)
    mem.put_u32(at, 0)
    mem.put_u32(at + 8, 4)
    libc.getsockopt(fd, SOL_SOCKET, SO_ERROR, at, at + 8)
    return mem.u32(at)


@jit
def learn_room(w, f):
    """Bytes the send buffer has and still takes, by the kernel's own accounting (SO_MEMINFO)."""
    at = context.option(w)
    mem.put_u32(at + 48, 4 * MEMINFO_WORDS)
    if libc.getsockopt(flow.fd(f), SOL_SOCKET, SO_MEMINFO, at, at + 48) < 0:
        flow.set_sndbuf_free(f, 0)
        return
    size = mem.u32(at + 4 * MEMINFO_SNDBUF)
    flow.set_sndbuf(f, size)
    flow.set_sndbuf_free(f, max(size - mem.u32(at + 4 * MEMINFO_WMEM_QUEUED), 0))


@jit
def _register(w, operation, fd, events, data):
    at = context.option(w)
    mem.put_u32(at, events)
    mem.put_le64(at + 4, data)
    return libc.epoll_ctl(context.epfd(w), operation, fd, at)


@jit
def _flow_event(f, index):
    return (EVENT_FLOW << 56) | (flow.generation(f) << 32) | index


@jit
def watch(w, f, index):
    """Register a flow's socket, once, edge-triggered; -errno when the kernel has no room for it."""
    events = EPOLLIN | EPOLLPRI | EPOLLOUT | EPOLLRDHUP | EPOLLET
    return _register(w, EPOLL_ADD, flow.fd(f), events, _flow_event(f, index))


@jit
def rearm(w, f, index):
    """Have the next room in the send buffer reported."""
    events = EPOLLIN | EPOLLPRI | EPOLLOUT | EPOLLRDHUP | EPOLLET
    return _register(w, EPOLL_MOD, flow.fd(f), events, _flow_event(f, index))


@jit
def unwatch(w, fd):
    """End a registration: closing does not where another process has the socket, too."""
    return libc.epoll_ctl(context.epfd(w), EPOLL_DEL, fd, context.option(w))


@jit
def put_msghdr(w, iov, count):
    """struct msghdr in scratch: payload only."""
    at = context.msghdr(w)
    mem.put_u64(at, 0)
    mem.put_u64(at + 8, 0)
    mem.put_u64(at + 16, iov)
    mem.put_u64(at + 24, count)
    mem.put_u64(at + 32, 0)
    mem.put_u64(at + 40, 0)
    mem.put_u64(at + 48, 0)
    return at


@jit
def _put_control(w, message):
    """Room for one descriptor beside a message (unix(7), SCM_RIGHTS); its address."""
    at = context.control(w)
    mem.put_u64(at, CMSG_FD_BYTES)
    mem.put_u32(at + 8, SOL_SOCKET)
    mem.put_u32(at + 12, SCM_RIGHTS)
    mem.put_u64(message + 32, at)
    mem.put_u64(message + 40, CMSG_FD_BYTES + 4)  # padded
    return at


@jit
def pass_on(w, box, fd, iov):
    """Send the message of one iovec and a descriptor (-1: without) to a box; -errno."""
    message = put_msghdr(w, iov, 1)
    if fd >= 0:
        mem.put_u32(_put_control(w, message) + 16, fd)
    return libc.sendmsg(box, message, MSG_DONTWAIT | MSG_NOSIGNAL)


@jit
def look_into(w, box, iov):
    """Such a message, which stays in the box: a copy of the descriptor, NO_DESCRIPTOR when none is
    with it, or NOTHING when no message waits."""
    message = put_msghdr(w, iov, 1)
    at = _put_control(w, message)
    if libc.recvmsg(box, message, MSG_PEEK | MSG_DONTWAIT | MSG_CMSG_CLOEXEC) < 0:
        return NOTHING
    if mem.u64(message + 40) < CMSG_FD_BYTES or mem.u32(at + 12) != SCM_RIGHTS:
        return NO_DESCRIPTOR
    return mem.u32(at + 16)


@jit
def take_out(w, box):
    """Discard the message that was looked at last, and its descriptor."""
    return libc.recv(box, 0, 0, MSG_DONTWAIT)


@jit
def abort(w, fd):
    """Close so that the peer gets a reset: linger on, zero seconds."""
    at = context.option(w)
    mem.put_u32(at, 1)
    mem.put_u32(at + 4, 0)
    libc.setsockopt(fd, SOL_SOCKET, SO_LINGER, at, 8)
    libc.close(fd)


@jit
def tcp_options(w, fd):
    """What every TCP socket of ours has: no Nagle, and peeking that goes on where it stopped."""
    set_int(w, fd, IPPROTO_TCP, TCP_NODELAY, 1)
    set_int(w, fd, SOL_SOCKET, SO_OOBINLINE, 1)  # urgent bytes out of line would upset peek offsets
    if net.peek_offset(context.net(w)):
        set_int(w, fd, SOL_SOCKET, SO_PEEK_OFF, 0)


@jit
def open_tcp(w, v6):
    """A TCP socket, or -errno."""
    fd = libc.socket(AF_INET6 if v6 else AF_INET, SOCK_STREAM | SOCK_FLAGS, 0)
    if fd >= 0:
        tcp_options(w, fd)
    return fd


@jit
def open_datagram(w, host, protocol):
    """A UDP (protocol 0) or echo socket for the family of `host`, errors queued for us, or
    -errno."""
    v4 = address.is_v4(host)
    fd = libc.socket(AF_INET if v4 else AF_INET6, SOCK_DGRAM | SOCK_FLAGS, protocol)
    if fd >= 0:
        if v4:
            set_int(w, fd, IPPROTO_IP, IP_RECVERR, 1)
        else:
            set_int(w, fd, IPPROTO_IPV6, IPV6_RECVERR, 1)
    return fd


@jit
def takes_trains(w, f):
    """1 when datagrams may come to the guest put together (VIRTIO_NET_F_GUEST_USO4, 6)."""
    v4 = address.is_v4(flow.far_addr(f))
    return context.guest_uso4(w) if v4 else context.guest_uso6(w)


@jit
def join_trains(w, f):
    """Have the kernel put datagrams of a UDP flow together just where the guest takes them so."""
    set_int(w, flow.fd(f), SOL_UDP, UDP_GRO, takes_trains(w, f))


@jit
def set_hops(w, f, v6, hops):
    """Give the guest's TTL or hop limit to the socket when it changes (traceroute works)."""
    if flow.hops(f) != hops and hops > 0:
        flow.set_hops(f, hops)
        if v6:
            set_int(w, flow.fd(f), IPPROTO_IPV6, IPV6_UNICAST_HOPS, hops)
        else:
            set_int(w, flow.fd(f), IPPROTO_IP, IP_TTL, hops)
