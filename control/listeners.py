"""listeners.py - the host sockets of forwarded ports.

Theory      Every port gets one socket for each worker, in one SO_REUSEPORT group: the kernel
            spreads connections and datagrams over the workers. Binding comes first, before
            anything else is started, so that a port that cannot be had is said at once; listening
            comes when workers can take connections (`listen_all`).
Exclusive   SO_REUSEPORT alone would also let a second instance of the same user in, and the kernel
            would deal each guest some of the other's connections. So the first socket of a port is
            bound without it and gets it afterwards, which lets in only what this process binds
            next: the others of its group, and what workers bind to answer UDP clients.
TIME_WAIT   Old connections of an earlier instance are no reason to refuse a port. SO_REUSEADDR sees
            past them, but two sockets that are bound and do not listen yet both get in with it. So
            it is used only where a port is refused without, taken off again, and put back just
            before listening, when the kernel checks once more; connections inherit it and leave it
            in their TIME_WAIT. UDP never has it: there it shares the port with anybody.
Families    A port without an address is one IPv6 socket that also takes IPv4 (IPV6_V6ONLY 0), or
            an IPv4 socket on a host without IPv6. UDP sockets tell what address a datagram was sent
            to (IP_PKTINFO, IPV6_PKTINFO; IPv4 as ::ffff:a.b.c.d on an IPv6 socket).
Weak        Ports that came by `all` are left out where they cannot be had, unless that is true of
            all of them. Running out of descriptors or memory is never passed over.
Limits      One descriptor for each port and worker; BACKLOG connections wait at each socket.
Ownership   The caller closes. Duplicates kept in control outlive a worker, and with them the
            connections that wait.
Errors      ListenError, one line with port, protocol, reason and remedy. When binding fails,
            nothing stays open.
"""

from __future__ import annotations

import errno
import os
import resource
import socket
from collections.abc import Iterable
from typing import NamedTuple

from flows.forward import Address, Port

BACKLOG = 1024  # the kernel caps it at net.core.somaxconn
IP_PKTINFO = 8  # linux/in.h; not in Python 3.11's socket module
KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}
Place = tuple[str, Address | None, str | None]
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)


class ListenError(Exception):
    """A port cannot be had; the text is one line for the operator."""


class Listener(NamedTuple):
    """A forwarded port and its sockets, one for each worker, in their order."""

    port: Port
    sockets: tuple[socket.socket, ...]


def ephemeral_ports() -> range:
    """The ports the host gives to its own connections (net.ipv4.ip_local_port_range)."""
    with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
        first, last = map(int, file.read().split())
    return range(first, last + 1)


def bind_all(ports: Iterable[Port], workers: int = 1) -> list[Listener]:
    """Bind every port for every worker; weak ones that cannot be had are missing in the result.

    The sockets are non-blocking and do not listen yet. Raises ListenError.
    """
    listeners: list[Listener] = []
    had: set[Place] = set()  # where some weak port could be had
    refused: dict[Place, ListenError] = {}  # the first that could not
    try:
        for port in ports:
            place = (port.protocol, port.address, port.interface)
            try:
                listeners.append(Listener(port, _bind_group(port, workers)))
            except OSError as error:
                refusal = ListenError(_refusal(port, error))
                if not port.weak or error.errno in EXHAUSTED:
                    raise refusal from error
                refused.setdefault(place, refusal)
            else:
                if port.weak:
                    had.add(place)
        for place, refusal in refused.items():
            if place not in had:
                raise refusal
    except ListenError:
        close_all(listeners)
        raise
    return listeners


def listen_all(listeners: Iterable[Listener]) -> None:
    """Take connections from now on: they wait until a worker accepts them. Raises ListenError."""
    for port, sockets in listeners:
        for sock in sockets if port.protocol == "tcp" else ():
            try:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.listen(BACKLOG)
            except OSError as error:
                raise ListenError(_refusal(port, error)) from error


def close_all(listeners: Iterable[Listener]) -> None:
    """Close every socket."""
    for listener in listeners:
        for sock in listener.sockets:
            sock.close()


def _bind_group(port: Port, workers: int) -> tuple[socket.socket, ...]:
    """The sockets of one port; all or none. Raises OSError."""
    sockets: list[socket.socket] = []
    past_time_wait = False
    try:
        while len(sockets) < workers:
            try:
                sockets.append(_bind(port, bool(sockets), past_time_wait))
            except OSError as error:
                again = error.errno == errno.EADDRINUSE and port.protocol == "tcp"
                if past_time_wait or not again:
                    raise
                past_time_wait = True
    except OSError:
        for sock in sockets:
            sock.close()
        raise
    return tuple(sockets)


def _bind(port: Port, in_group: bool, past_time_wait: bool) -> socket.socket:
    """One bound socket in the port's group, which `in_group` says exists. Raises OSError."""
    sock = _open(port)
    try:
        if port.interface is not None:
            name = os.fsencode(port.interface) + b"\0"
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, name)
        if port.protocol == "udp" and sock.family == socket.AF_INET:
            sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
        elif port.protocol == "udp":
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        if past_time_wait:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if in_group:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        anywhere = "0.0.0.0" if sock.family == socket.AF_INET else "::"
        sock.bind((str(port.address or anywhere), port.port))
        if not in_group:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if past_time_wait:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    except OSError:
        sock.close()
        raise
    return sock


def _open(port: Port) -> socket.socket:
    """A non-blocking socket of the family that the port's address needs. Raises OSError."""
    kind = KINDS[port.protocol] | socket.SOCK_NONBLOCK
    if port.address is not None and port.address.version == 4:
        return socket.socket(socket.AF_INET, kind)
    try:
        sock = socket.socket(socket.AF_INET6, kind)
    except OSError as error:
        if port.address is None and error.errno == errno.EAFNOSUPPORT:
            return socket.socket(socket.AF_INET, kind)
        raise
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, port.address is not None)
    return sock


def _refusal(port: Port, error: OSError) -> str:
    """One line: what cannot be had, why, and what to do about it."""
    where = f" on {port.address}" if port.address is not None else ""
    if port.interface is not None:
        where += f" on interface {port.interface}"
    what = f"{port.protocol.upper()} port {port.port}{where}"
    return f"cannot forward {what}: {_reason(port, error)}"


def _reason(port: Port, error: OSError) -> str:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    flags = "-ltnp" if port.protocol == "tcp" else "-lunp"
    reasons = {
        errno.EADDRINUSE: f"it is in use; `ss {flags} 'sport = :{port.port}'` shows by whom",
        errno.EACCES: "not permitted; lower net.ipv4.ip_unprivileged_port_start"
        f" to {port.port} or give CAP_NET_BIND_SERVICE",
        errno.EPERM: "not permitted; binding to an interface needs Linux 5.7 or CAP_NET_RAW",
        errno.EMFILE: f"out of descriptors; raise RLIMIT_NOFILE (now {soft}, at most {hard})",
        errno.ENFILE: "the host is out of descriptors; raise fs.file-max",
        errno.EADDRNOTAVAIL: f"no interface of this host has the address {port.address}",
        errno.ENODEV: f"there is no network interface {port.interface!r}",
        errno.EAFNOSUPPORT: "this host has no IPv6",
    }
    return reasons.get(error.errno or 0, os.strerror(error.errno or 0))
