"""Sockets of forwarded ports: real ones, in the tests' network namespace where there is one."""

import errno
import gc
import os
import resource
import socket
import subprocess
from collections import Counter
from contextlib import contextmanager
from ipaddress import ip_address

import pytest
from world import World

from control import listeners
from control.cli import Forwards
from control.listeners import ListenError, bind_all, close_all, listen_all
from control.logs import Log
from flows.forward import Port

NOBODY = 65534
TRIES = 64


def port_of(protocol, number, address=None, interface=None, weak=False):
    address = None if address is None else ip_address(address)
    return Port(protocol, address, interface, number, number, None, weak)


@pytest.fixture
def bind(world):
    """bind_all in the tests' namespace; what it returned is closed afterwards."""
    made = []

    def bind(*ports, workers=1):
        made.append(world.run(bind_all, ports, workers))
        return made[-1]

    yield bind
    for one in made:
        close_all(one)


@pytest.fixture
def connect(world):
    made = []

    def connect(host, port, kind=socket.SOCK_STREAM):
        made.append(world.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind))
        made[-1].settimeout(5)
        made[-1].connect((host, port))
        return made[-1]

    yield connect
    for one in made:
        one.close()


def accept_all(sockets):
    """How many connections each socket had waiting."""
    counts = Counter()
    for number, sock in enumerate(sockets):
        assert not sock.getblocking()
        while True:
            try:
                sock.accept()[0].close()
            except BlockingIOError:
                break
            counts[number] += 1
    return counts


def receive(sock):
    """(payload, address it was sent to) of one datagram."""
    sock.settimeout(5)
    data, ancillary, _, _ = sock.recvmsg(100, 256)
    [(level, kind, value)] = ancillary
    if level == socket.IPPROTO_IP:
        assert kind == listeners.IP_PKTINFO
        return data, ip_address(value[8:12])
    assert (level, kind) == (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO)
    return data, ip_address(value[:16])


def open_fds():
    gc.collect()  # what earlier tests forgot to close
    return len(os.listdir("/proc/self/fd"))


# ---- who gets what -------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_connections_are_spread(world, bind, connect, host):
    number = world.port()
    [listener] = bound = bind(port_of("tcp", number), workers=3)
    with pytest.raises(ConnectionRefusedError):
        connect(host, number)
    listen_all(bound)
    for _ in range(TRIES):
        connect(host, number)
    counts = accept_all(listener.sockets)
    assert len(counts) == 3 and counts.total() == TRIES


def test_datagrams_are_spread(world, bind, connect):
    number = world.port()
    [listener] = bind(port_of("udp", number), workers=3)
    for _ in range(TRIES):
        connect("127.0.0.1", number, socket.SOCK_DGRAM).send(b"x")
    counts = Counter()
    for index, sock in enumerate(listener.sockets):
        assert not sock.getblocking()
        while True:
            try:
                sock.recv(10)
            except BlockingIOError:
                break
            counts[index] += 1
    assert len(counts) == 3 and counts.total() == TRIES


@pytest.mark.parametrize(
    "address, host, seen",
    [
        (None, "127.0.0.1", "::ffff:127.0.0.1"),
        (None, "127.0.0.9", "::ffff:127.0.0.9"),
        (None, "::1", "::1"),
        ("::", "::1", "::1"),
        ("::1", "::1", "::1"),
        ("0.0.0.0", "127.0.0.1", "127.0.0.1"),
        ("127.0.0.9", "127.0.0.9", "127.0.0.9"),
    ],
)
def test_datagrams_tell_where_they_were_sent(world, bind, connect, address, host, seen):
    number = world.port()
    [listener] = bind(port_of("udp", number, address))
    connect(host, number, socket.SOCK_DGRAM).send(b"hello")
    assert receive(listener.sockets[0]) == (b"hello", ip_address(seen))


def test_address_families_are_apart(world, bind, connect):
    number = world.port()
    both = bind(port_of("tcp", number, "0.0.0.0"), port_of("tcp", number, "::"))
    listen_all(both[1:])
    connect("::1", number)
    with pytest.raises(ConnectionRefusedError):
        connect("127.0.0.1", number)
    listen_all(both[:1])
    connect("127.0.0.1", number)


def test_one_address_only(world, bind, connect):
    number = world.port()
    bound = bind(port_of("tcp", number, "127.0.0.9"))
    listen_all(bound)
    connect("127.0.0.9", number)
    with pytest.raises(ConnectionRefusedError):
        connect("127.0.0.1", number)


def test_one_interface_only(world, bind, connect):
    number = world.port()
    [tcp, udp] = bound = bind(
        port_of("tcp", number, interface="lo"), port_of("udp", number, "127.0.0.1", "lo")
    )
    listen_all(bound)
    for sock in (*tcp.sockets, *udp.sockets):
        device = sock.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16)
        assert device.rstrip(b"\0") == b"lo"
    connect("::1", number)


def test_link_local_address():
    world = World()
    try:
        if not world.isolated:
            pytest.skip("needs root to make a network namespace")
        add = "ip addr add fe80::9/64 dev up0 nodad"
        world.run(subprocess.run, add.split(), check=True)
        [listener] = bound = world.run(bind_all, [port_of("tcp", 8080, "fe80::9", "up0")])
        scope = world.run(socket.if_nametoindex, "up0")
        assert world.run(listener.sockets[0].getsockname) == ("fe80::9", 8080, 0, scope)
        close_all(bound)
    finally:
        world.close()


def _write(path, text):
    with open(path, "w") as file:
        file.write(text)


def test_sockets_do_not_block_and_are_not_inherited(world, bind):
    bound = bind(port_of("tcp", world.port()), port_of("udp", world.port()), workers=2)
    sockets = [sock for listener in bound for sock in listener.sockets]
    assert len(sockets) == 4
    assert not any(sock.getblocking() or sock.get_inheritable() for sock in sockets)
    assert [listener.port.protocol for listener in bound] == ["tcp", "udp"]


def test_a_worker_can_answer_a_client_from_the_port(world, bind, connect):
    """What the data plane does with a new UDP client: a socket at the address the client used."""
    number = world.port()
    [listener] = bind(port_of("udp", number), workers=2)
    client = connect("127.0.0.1", number, socket.SOCK_DGRAM)
    answering = world.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with answering:
        for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
            answering.setsockopt(socket.SOL_SOCKET, option, 1)
        answering.bind(("127.0.0.1", number))
        answering.connect(client.getsockname())
        client.send(b"again")
        answering.settimeout(5)
        assert answering.recv(10) == b"again"
        answering.send(b"answer")
        assert client.recv(10) == b"answer"
    for sock in listener.sockets:
        with pytest.raises(BlockingIOError):
            sock.recv(10)


# ---- one port, one instance ----------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("listening", [False, True])
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize("address", [None, "127.0.0.1"])
def test_nobody_else_gets_in(world, bind, protocol, listening, workers, address):
    """Not even another instance of the same user, which also uses SO_REUSEPORT."""
    number = world.port()
    bound = bind(port_of(protocol, number), workers=workers)
    if listening:
        listen_all(bound)
    flags = "-ltnp" if protocol == "tcp" else "-lunp"
    with pytest.raises(ListenError) as caught:
        bind(port_of(protocol, number, address), workers=workers)
    where = " on 127.0.0.1" if address else ""
    assert str(caught.value) == (
        f"cannot forward {protocol.upper()} port {number}{where}: "
        f"it is in use; `ss {flags} 'sport = :{number}'` shows by whom"
    )


@pytest.mark.parametrize("option", [socket.SO_REUSEADDR, socket.SO_REUSEPORT])
def test_a_port_of_another_program_is_in_use(world, bind, option):
    number = world.port()
    with world.socket(socket.AF_INET, socket.SOCK_STREAM) as other:
        other.setsockopt(socket.SOL_SOCKET, option, 1)
        other.bind(("127.0.0.1", number))
        other.listen(1)
        with pytest.raises(ListenError, match="in use"):
            bind(port_of("tcp", number))


def leave_time_wait(server, connect, host, number):
    """Close a connection from the server's side first."""
    client = connect(host, number)
    server.settimeout(5)
    server.accept()[0].close()
    assert client.recv(1) == b""
    client.close()
    server.close()


def test_restart_past_our_own_time_wait(world, bind, connect):
    number = world.port()
    [listener] = first = bind(port_of("tcp", number))
    listen_all(first)
    leave_time_wait(listener.sockets[0], connect, "127.0.0.1", number)
    with world.socket(socket.AF_INET6, socket.SOCK_STREAM) as plain, pytest.raises(OSError):
        plain.bind(("::", number))  # there is something to get past
    second = bind(port_of("tcp", number), workers=2)
    with pytest.raises(ListenError, match="in use"):
        bind(port_of("tcp", number), workers=2)
    listen_all(second)
    with pytest.raises(ListenError, match="in use"):
        bind(port_of("tcp", number), workers=2)
    for _ in range(TRIES):
        connect("127.0.0.1", number)
    assert len(accept_all(second[0].sockets)) == 2


def test_start_past_time_wait_of_another_program(world, bind, connect):
    number = world.port()
    other = world.socket(socket.AF_INET, socket.SOCK_STREAM)
    other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    other.bind(("127.0.0.1", number))
    other.listen(1)
    leave_time_wait(other, connect, "127.0.0.1", number)
    bound = bind(port_of("tcp", number), workers=3)
    listen_all(bound)
    for _ in range(TRIES):
        connect("127.0.0.1", number)
    assert len(accept_all(bound[0].sockets)) == 3


def test_listening_is_checked_too(world, bind):
    """Another program's bound socket that listens first."""
    number = world.port()
    with world.socket(socket.AF_INET, socket.SOCK_STREAM) as other:
        [listener] = bound = bind(port_of("tcp", number))
        listener.sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", number))
        other.listen(1)
        listener.sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 0)
        with pytest.raises(ListenError, match=f"TCP port {number}: it is in use"):
            listen_all(bound)


def test_a_port_that_is_taken_meanwhile_is_left_out(world, capsys):
    """By a program that bound it as we did and listens first: said once; the others are given."""
    taken, free = sorted((world.port(), world.port()))
    forwards = world.run(Forwards, [port_of("tcp", taken), port_of("tcp", free)], 1, Log())
    with world.socket(socket.AF_INET, socket.SOCK_STREAM) as other:
        ours = forwards.listeners[0].sockets[0]
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", taken))
        other.listen(1)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 0)
        [(command, fds)] = list(forwards.of(0, "tcp"))
    assert [port for _, port, _, _ in command.ports] == [free] and len(fds) == 1
    said = capsys.readouterr().err
    assert f"TCP port {taken}: it is in use" in said and said.count("\n") == 1
    assert command.place == 2 and not list(forwards.of(0, "tcp", command.place))
    forwards.close()


# ---- ports that cannot be had --------------------------------------------------------------------


def test_nothing_stays_open_after_an_error(world, bind):
    taken = world.port()
    bind(port_of("tcp", taken))
    before = open_fds()
    with pytest.raises(ListenError):
        bind(port_of("tcp", world.port()), port_of("tcp", taken), workers=4)
    assert open_fds() == before


def test_weak_ports_are_left_out(world, bind):
    taken, free, other = world.port(), world.port(), world.port()
    bind(port_of("udp", taken))
    weak = [port_of("udp", number, weak=True) for number in (taken, free, other)]
    assert [listener.port for listener in bind(*weak)] == weak[1:]


def test_weak_ports_are_an_error_when_none_is_left(world, bind):
    taken, free = world.port(), world.port()
    bind(port_of("udp", taken))
    other_place = port_of("udp", free, "127.0.0.1", weak=True)
    before = open_fds()
    with pytest.raises(ListenError, match=f"UDP port {taken}: it is in use"):
        bind(port_of("udp", free), port_of("udp", taken, weak=True), other_place)
    assert open_fds() == before


@contextmanager
def nobody():
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def test_low_port_without_privileges(bind):
    with nobody(), pytest.raises(ListenError) as caught:
        bind(port_of("tcp", 81))
    assert str(caught.value) == (
        "cannot forward TCP port 81: not permitted; lower net.ipv4.ip_unprivileged_port_start to 81"
        " or give CAP_NET_BIND_SERVICE"
    )


def test_interface_without_privileges(world, bind):
    with nobody():
        assert len(bind(port_of("tcp", world.port(), interface="lo"))) == 1


@pytest.mark.parametrize("weak", [False, True])
def test_out_of_descriptors(world, bind, weak):
    """Also for weak ports: what was left of the descriptors would be needed for connections."""
    before, (soft, hard) = open_fds(), resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = max(map(int, os.listdir("/proc/self/fd"))) + 10
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        with pytest.raises(ListenError) as caught:
            bind(*(port_of("tcp", world.port(), weak=weak) for _ in range(limit)))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    text = str(caught.value)
    assert f"raise RLIMIT_NOFILE (now {limit}, at most {hard})" in text and "\n" not in text
    assert open_fds() == before


def test_address_of_no_interface(world, bind):
    number = world.port()
    with pytest.raises(ListenError, match=f"TCP port {number} on 203.0.113.9: no interface"):
        bind(port_of("tcp", number, "203.0.113.9"))


def test_unknown_interface(world, bind):
    number = world.port()
    with pytest.raises(ListenError) as caught:
        bind(port_of("udp", number, interface="nosuch0"))
    assert str(caught.value) == (
        f"cannot forward UDP port {number} on interface nosuch0: "
        "there is no network interface 'nosuch0'"
    )


@pytest.mark.parametrize(
    "number, reason",
    [
        (errno.EPERM, "Linux 5.7 or CAP_NET_RAW"),
        (errno.ENFILE, "fs.file-max"),
        (errno.ENOBUFS, "No buffer space available"),
        (errno.EINVAL, "Invalid argument"),
    ],
)
def test_every_refusal_is_one_line(monkeypatch, bind, number, reason):
    class Refused(socket.socket):
        def bind(self, address):
            raise OSError(number, "x")

    monkeypatch.setattr(listeners.socket, "socket", Refused)
    before = open_fds()
    with pytest.raises(ListenError) as caught:
        bind(port_of("tcp", 8080))
    text = str(caught.value)
    assert text.startswith("cannot forward TCP port 8080: ") and reason in text
    assert "\n" not in text and open_fds() == before


# ---- hosts without IPv6 --------------------------------------------------------------------------


@pytest.fixture
def no_ipv6(monkeypatch):
    """The kernel as it is with ipv6.disable=1: no such sockets."""
    real = socket.socket

    def make(family, kind):
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
        return real(family, kind)

    monkeypatch.setattr(listeners.socket, "socket", make)


def test_ipv4_alone(world, no_ipv6):
    number = world.port()
    [listener] = bound = world.run(bind_all, [port_of("udp", number)], 2)
    try:
        assert [sock.family for sock in listener.sockets] == [socket.AF_INET] * 2
        assert listener.sockets[0].getsockname() == ("0.0.0.0", number)
    finally:
        close_all(bound)


def test_ipv6_address_without_ipv6(world, no_ipv6):
    with pytest.raises(ListenError, match="on ::1: this host has no IPv6"):
        world.run(bind_all, [port_of("tcp", world.port(), "::1")])


def test_ipv6_switched_off_on_all_interfaces():
    """net.ipv6.conf.*.disable_ipv6: such sockets exist, and still take IPv4."""
    world = World(uplink=False)
    try:
        if not world.isolated:
            pytest.skip("needs root to make a network namespace")
        for which in ("all", "default", "lo"):
            world.run(_write, f"/proc/sys/net/ipv6/conf/{which}/disable_ipv6", "1")
        bound = world.run(bind_all, [port_of("tcp", 8080), port_of("udp", 8080)])
        listen_all(bound)
        client = world.socket(socket.AF_INET, socket.SOCK_STREAM)
        client.settimeout(5)
        client.connect(("127.0.0.1", 8080))
        client.close()
        close_all(bound)
    finally:
        world.close()


def test_ephemeral_ports(world):
    found = world.run(listeners.ephemeral_ports)
    with world.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        assert sock.getsockname()[1] in found
    assert 0 < found[0] <= found[-1] <= 65535
