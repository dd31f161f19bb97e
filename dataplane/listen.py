"""listen.py - forwarded ports: connections and datagrams from the host.

Theory      Control binds one socket per forwarded port and worker (SO_REUSEPORT) and passes them
            here; the kernel spreads what comes over the workers. A TCP connection becomes a flow
            whose SYN goes to the guest. The first datagram from a client becomes a flow with a
            socket of its own, bound to the address the client used and connected to the client, so
            that the kernel brings it everything that follows.
Why so      Until a receive queue of the guest is enabled, connections wait in the host's backlog: a
            guest that boots or reboots loses none of them.
Limits      ACCEPTS_MAX per listener and breath.
Drops       Connections are counted as worker.accept_failed; datagrams as no_guest, table_full,
            table_busy, no_socket or send_failed of a receive ring of this worker, and what
            place_or_drop() counts.
Ownership   The listeners of this worker; flows made here have it as their home.
"""

from __future__ import annotations

from dataplane import lifecycle, rx, sockets, tcp, udp
from dataplane.context import context, listener
from dataplane.lifecycle import FAR_SAID, ONEWAY, TCP, UDP
from dataplane.wire import UDP_BYTES
from flows import address, sighting, steer, table
from shm import libc, mem
from shm.access import flow, instance, net, seen, worker
from shm.jit import jit
from shm.schema import DROP

ACCEPTS_MAX = 16
NO_GUEST = -1 - DROP["no_guest"]
CMSG_BYTES = 16
IPV6_PKTINFO, IP_PKTINFO = 50, 8
MSG_CONTROL_BYTES = 256


@jit
def at(w, number):
    """Listener `number`."""
    return context.listeners(w) + number * listener.SIZE


@jit
def _guest_key(w, entry, far):
    """Fill the key's addresses for a packet from `far`: the listener's guest address or the one
    last seen; 0: none."""
    key, n, s = context.key(w), context.net(w), context.seen(w)
    guest = key + table.KEY_GUEST
    mem.copy(key + table.KEY_FAR, far, 16)
    if address.is_set(listener.guest_addr(entry)):
        mem.copy(guest, listener.guest_addr(entry), 16)
        return 1 if address.is_v4(far) == address.is_v4(guest) else 0
    if address.is_v4(far):
        mem.copy(guest, net.guest4(n), 16)
        if seen.addr4(s):
            mem.put_be32(guest + 12, seen.addr4(s))
        return address.is_set(net.guest4(n))
    if address.is_link_local(far):
        return sighting.read6(s, seen.addr6_local(s), guest)
    if not sighting.read6(s, seen.addr6(s), guest):
        mem.copy(guest, net.guest6(n), 16)
    return address.is_set(guest)


@jit
def serve(w, number):
    """Connections or datagrams that wait at listener `number`."""
    entry = at(w, number)
    if listener.fd(entry) < 0:
        return
    if instance.rx_enabled(context.instance(w)) == 0 or seen.mac(context.seen(w)) == 0:
        listener.set_ready(entry, 1)
        context.set_listen_waiting(w, 1)  # resume() comes back when the guest is there
        return
    listener.set_ready(entry, 0)
    for _ in range(ACCEPTS_MAX):
        more = _accept(w, entry) if listener.protocol(entry) == TCP else _datagram(w, entry)
        if not more:
            return
    listener.set_ready(entry, 1)  # no further edge tells of those that are left
    context.set_listen_waiting(w, 1)
    context.set_busy(w, 1)


@jit
def resume(w):
    """Serve listeners that had to wait for the guest."""
    context.set_listen_waiting(w, 0)
    for number in range(context.listener_count(w)):
        if listener.ready(at(w, number)):
            serve(w, number)


@jit
def _accept(w, entry):
    """One connection; 0 when none waits."""
    at_addr = context.sockaddr(w)
    mem.put_u32(at_addr + 32, 28)
    fd = libc.accept4(listener.fd(entry), at_addr, at_addr + 32, sockets.SOCK_FLAGS)
    if fd < 0:
        if fd != -sockets.EAGAIN:  # no descriptor or memory now: the backlog keeps what waits
            listener.set_ready(entry, 1)
            context.set_listen_waiting(w, 1)
        return 0
    source, far = context.address(w), context.address(w) + 16
    port = sockets.get_sockaddr(w, source)
    result = NO_GUEST
    if address.inbound(context.net(w), source, far) and _guest_key(w, entry, far):
        result = tcp.accepted(w, entry, fd, port)
    if result < 0:
        sockets.abort(w, fd)
        me = context.me(w)
        worker.set_accept_failed(me, worker.accept_failed(me) + 1)
    return 1


@jit
def _local_address(w, target):
    """The address a datagram was sent to, from its ancillary data (IP_PKTINFO, IPV6_RECVPKTINFO);
    0: unknown."""
    control, size = context.control(w), mem.u64(context.msghdr(w) + 40)
    if size < CMSG_BYTES + 12:
        return 0
    level, kind = mem.u32(control + 8), mem.u32(control + 12)
    if level == sockets.IPPROTO_IPV6 and kind == IPV6_PKTINFO:
        mem.copy(target, control + CMSG_BYTES, 16)
        return 1
    if level == sockets.IPPROTO_IP and kind == IP_PKTINFO:
        mem.put_le64(target, 0)
        mem.put_be32(target + 8, 0xFFFF)
        mem.put_be32(target + 12, mem.be32(control + CMSG_BYTES + 8))
        return 1
    return 0


@jit
def _datagram(w, entry):
    """One datagram from a client; 0 when none waits."""
    buffer, target = context.discard(w) + UDP_BYTES, context.rx_iov(w)
    mem.put_u64(target, buffer)
    mem.put_u64(target + 8, udp.SCRATCH_BYTES - UDP_BYTES)
    message = sockets.put_msghdr(w, target, 1)
    mem.put_u64(message, context.sockaddr(w))
    mem.put_u64(message + 8, 28)
    mem.put_u64(message + 32, context.control(w))
    mem.put_u64(message + 40, MSG_CONTROL_BYTES)
    size = libc.recvmsg(listener.fd(entry), message, sockets.MSG_DONTWAIT)
    if size < 0:
        return 0
    index = _flow_of(w, entry)
    if index >= 0:
        _deliver(w, table.at(context.table(w), index), index, buffer, size)
    else:
        rx.count_refused(w, -1, index)
    return 1


@jit
def _flow_of(w, entry):
    """The flow of the datagram that has just been received, perhaps a new one. Its index, or -1 -
    reason."""
    source, far, local = context.address(w), context.address(w) + 16, context.address(w) + 32
    port = sockets.get_sockaddr(w, source)
    if not _local_address(w, local) or not address.inbound(context.net(w), source, far):
        return NO_GUEST
    if not _guest_key(w, entry, far):
        return NO_GUEST
    key = context.key(w)
    mem.put_u16(key + table.KEY_GUEST_PORT, listener.guest_port(entry))
    mem.put_u16(key + table.KEY_FAR_PORT, port)
    mem.put_u32(key + table.KEY_PROTOCOL, UDP)
    index = table.find(context.table(w), key)
    return index if index >= 0 else _client_flow(w, entry, source, local, port)


@jit
def _client_flow(w, entry, source, local, port):
    """A flow for a new client, its socket bound to the address the client used. Its index, or -1 -
    reason."""
    pair = lifecycle.first_pair(w)
    index = lifecycle.open_flow(w, context.key(w), pair, ONEWAY)
    if index < 0:
        return udp.TABLE_FULL if index == table.FULL else udp.TABLE_BUSY
    f = table.at(context.table(w), index)
    fd = sockets.open_datagram(w, source, 0)
    if fd >= 0:
        sockets.set_int(w, fd, sockets.SOL_SOCKET, sockets.SO_REUSEPORT, 1)
        size = sockets.put_sockaddr(w, local, listener.port(entry))
        if libc.bind(fd, context.sockaddr(w), size) < 0:
            libc.close(fd)
            fd = -1
    return udp.connect(w, f, index, fd, source, port)


@jit
def _deliver(w, f, index, buffer, size):
    """The datagram that came by the listening socket, to the guest. UDP_BYTES in front of it are
    free."""
    pair = steer.queue_of(context.instance(w), f, context.id(w))
    if flow.heir(f) == 0 and flow.home(f) == context.id(w):
        flow.set_rx_bytes(f, flow.rx_bytes(f) + size)
        lifecycle.said(w, f, index, FAR_SAID)
    if size > udp.payload_max(w, f):
        udp.place_alone(w, f, pair, buffer, size, 0)
        return
    header_bytes = udp.header(w, f, size, 0)
    mem.put_u64(context.rx_iov(w), buffer)
    mem.put_u64(context.rx_iov(w) + 8, size)
    udp.finish(w, f, header_bytes, context.rx_iov(w), 1, size)
    rx.place_or_drop(w, pair, context.out(w), header_bytes, buffer, size)
