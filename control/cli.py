"""cli.py - the commands: run, warm, guest, flows, workers.

Theory      `run` makes an instance in the order in which things can fail clearly: every option's
            value before anything is touched, then the socket, the host's network, forwarded ports,
            the segment, metrics. When nothing can fail any more the fork server is started, and
            control as a child (guard.py). It answers a front-end from then on; the data plane loads
            meanwhile.
Imports     Nothing here imports numba. What only one command needs is imported in that command.
Exit status 0 stopped, 1 could not start, 2 wrong usage.
Ownership   Removes its socket, pid file and segment at the end, whatever ended it; but not a socket
            or pid file that somebody else has put in their place.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import resource
import signal
import socket
import stat
import sys
import time
from collections.abc import Iterator
from typing import Any

from control import descriptors, features, listeners, netblock, wanted
from control.descriptors import DescriptorError
from control.guard import Guard
from control.hostnet import HostNetError, read_host
from control.listeners import Listener, ListenError
from control.logs import Log
from control.options import parse, refuse
from control.server import Server, found
from control.session import Offer
from control.wanted import UsageError, Wanted
from control.workers import PROTOCOL_NUMBER, Workers
from dataplane import commands
from dataplane.start import MOVER_ENTRIES, WORKER_ENTRIES
from flows import forward
from flows.forward import ForwardError
from shm import schema
from shm.layout import View
from shm.segment import PREFIX, Segment, SegmentError, remove_stale

LISTEN_BATCH = 32


class StartError(Exception):
    """Why the instance cannot start: one line, with what to do about it."""


def main(arguments: list[str] | None = None) -> int:
    """The `vhostmq` command; returns its exit status."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        if options.verb == "guest":
            from control import guest

            return guest.main(options)
        if options.verb == "warm":
            return warm(options.quiet)
        if options.verb in ("flows", "workers"):
            return show(options)
        return run(options)
    except (UsageError, ForwardError) as error:
        refuse(options.verb, str(error))
    except (StartError, DescriptorError, HostNetError, ListenError, SegmentError) as error:
        print(f"vhostmq: {error}", file=sys.stderr)
        return 1


def show(options: Any) -> int:
    """Rows about a running instance."""
    try:
        if options.verb == "flows":
            from control import flow_list

            status = flow_list.show(options.pid, options.json)
        else:
            from control import worker_list

            status = worker_list.show(options.pid, options.seconds, options.json)
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads on (`| head`); Python would try once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE
    return status


def warm(quiet: bool) -> int:
    """Compile the data plane now, with progress."""
    from shm import code

    code.want(*WORKER_ENTRIES, *MOVER_ENTRIES)
    from dataplane import mover, preload  # noqa: F401  (its entry point is warmed with the others)

    started_s = time.monotonic()
    compiled = preload.compile_all(report=not quiet)
    taken_s = time.monotonic() - started_s
    if not quiet:
        print(f"vhostmq: the data plane is ready ({compiled} compiled, {taken_s:.1f} s)")
    return 0


def bind_socket(path: str) -> socket.socket:
    """The listening vhost-user socket; a stale socket is replaced, nothing else is."""
    taken = f"socket path {path} is in use: stop its owner or choose another --socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        # A datagram socket: a live listener answers EPROTOTYPE and never sees a connection.
        try:
            probe.connect(path)
            raise StartError(taken)
        except (FileNotFoundError, ConnectionRefusedError):
            pass
        except OSError as error:
            if error.errno == errno.EPROTOTYPE:
                raise StartError(taken) from error
            raise StartError(f"socket path {path}: {error.strerror or error}") from error
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        if os.path.lexists(path):
            if not stat.S_ISSOCK(os.lstat(path).st_mode):
                raise StartError(f"{path} exists and is not a socket: choose another --socket")
            os.unlink(path)
        sock.bind(path)
        sock.listen(4)
    except OSError as error:
        raise StartError(f"cannot bind {path}: {error.strerror or error}") from error
    return sock


def identity(path: str) -> tuple[int, int]:
    """Which file it is that has this name; (0, 0) for none."""
    try:
        status = os.lstat(path)
    except OSError:
        return 0, 0
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def listening_socket(path: str) -> Iterator[socket.socket]:
    """The socket of bind_socket, gone at the end."""
    with bind_socket(path) as sock:
        ours = identity(path)
        try:
            yield sock
        finally:
            if identity(path) == ours:
                with contextlib.suppress(OSError):
                    os.unlink(path)


def inherited_socket(fd: int) -> socket.socket:
    """The connected front-end given with --fd: a Unix stream socket, the only kind that carries
    descriptors."""
    try:
        sock = socket.socket(fileno=fd)
        sock.getpeername()
    except OSError as error:
        raise StartError(f"--fd {fd} is not a connected socket: {error.strerror}") from error
    if (sock.family, sock.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
        raise StartError(f"--fd {fd} is not a Unix stream socket")
    os.set_inheritable(fd, False)
    return sock


@contextlib.contextmanager
def segment_for(workers: int, pairs: int) -> Iterator[Segment]:
    """The shared segment of this process, gone at the end."""
    remove_stale()
    name = f"{PREFIX}{os.getpid()}-{os.urandom(4).hex()}"
    segment = Segment(name, workers, create=True)
    try:
        view = View(schema.INSTANCE, segment.buffer, segment.offsets.instance)
        view["pairs"] = pairs
        view["epoch_ns"] = time.monotonic_ns()
        for half in range(2):
            word = int.from_bytes(os.urandom(4), "little")
            schema.INSTANCE.set(segment.buffer, segment.offsets.instance, "secret", word, half)
        yield segment
    finally:
        segment.unlink()


@contextlib.contextmanager
def pid_file(path: str | None) -> Iterator[None]:
    """The process id in a file, gone at the end."""
    if path is None:
        yield
        return
    file, ours = pathlib.Path(path), f"{os.getpid()}\n"
    try:
        file.write_text(ours)
    except OSError as error:
        raise StartError(f"pid file {path}: {error.strerror}") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if file.is_file() and file.read_text() == ours:
                file.unlink()


def forwarded_ports(options: Any, want: Wanted) -> list[forward.Port]:
    """All -t and -u ports."""
    ephemeral = listeners.ephemeral_ports()
    ports = []
    for protocol, specs in (("tcp", options.tcp_ports), ("udp", options.udp_ports)):
        ports += forward.parse(protocol, specs, ephemeral, ipv4=want.ipv4, ipv6=want.ipv6)
    return ports


class Forwards:
    """Listening sockets of forwarded ports: bound for every worker at start, given out one worker
    at a time.

    A worker without an enabled queue pair does not listen for connections: the kernel would give it
    some, and their frames would have to cross. Datagrams are spread over all bound sockets, so
    those every worker gets. A port that somebody else took between being bound and listened on is
    said and left out.
    """

    def __init__(self, ports: list[forward.Port], workers: int, log: Log) -> None:
        self.listeners = listeners.bind_all(ports, workers)
        self.log = log

    def of(
        self, worker: int, protocol: str, place: int = 0
    ) -> Iterator[tuple[commands.ListenOn, tuple[int, ...]]]:
        """The sockets of one worker from that place in the list on, as commands for it."""
        mine = [
            Listener(port, (sockets[worker],))
            for port, sockets in self.listeners
            if port.protocol == protocol
        ]
        for start in range(place, len(mine), LISTEN_BATCH):
            end = min(start + LISTEN_BATCH, len(mine))
            batch = [listener for listener in mine[start:end] if self._listens(listener)]
            entries = tuple(
                (
                    PROTOCOL_NUMBER[port.protocol],
                    port.port,
                    port.guest_port,
                    netblock.packed(port.guest_address),
                )
                for port, _ in batch
            )
            if batch:
                yield commands.ListenOn(entries, end), tuple(sock.fileno() for _, (sock,) in batch)

    def _listens(self, listener: Listener) -> bool:
        try:
            listeners.listen_all([listener])
        except ListenError as error:
            self.log.error(str(error))
            return False
        return True

    def close(self) -> None:
        """Close every socket."""
        listeners.close_all(self.listeners)


def metrics_server(where: Any, segment: Segment, pairs: int, workers: int) -> Any:
    """The socket that --metrics asks for, and what is served there; None without it."""
    if where is None:
        return None
    from control import metrics

    collector = metrics.Collector(segment.buffer, segment.offsets, pairs, workers)
    try:
        return metrics.Server(collector, *where)
    except metrics.MetricsError as error:
        raise StartError(str(error)) from error


def run(options: Any) -> int:
    """Serve front-ends until stopped."""
    log = Log(options.quiet, options.debug)
    guard = Guard(log)  # has the signals: nothing is to be left in the middle
    want = wanted.read(options)
    ports = forwarded_ports(options, want)
    if missing := set(options.cpus or ()) - os.sched_getaffinity(0):
        raise StartError(f"--cpus: CPU {min(missing)} is not there, or not for this process")
    descriptors.raise_limit()
    pairs, count = options.queues, options.workers
    offer = Offer(features.offered(options.features, pairs), pairs)
    with contextlib.ExitStack() as stack:
        if options.fd is not None:
            front_end = inherited_socket(options.fd)
        else:
            front_end = stack.enter_context(listening_socket(options.socket))
        net = read_host(want)
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if short := descriptors.shortage(limit, pairs, count, len(ports)):
            log.warning(short)
        forwards = Forwards(ports, count, log)
        stack.callback(forwards.close)
        segment = stack.enter_context(segment_for(count, pairs))
        netblock.fill(segment, net, options)
        instance = View(schema.INSTANCE, segment.buffer, segment.offsets.instance)
        instance["poll_us"] = options.poll_us
        metrics = metrics_server(options.metrics, segment, pairs, count)
        if metrics is not None:
            stack.callback(metrics.close)
        if not netblock.has_ping_socket():
            log.warning(
                "the guest cannot ping: net.ipv4.ping_group_range leaves this user's group out"
            )
        stack.enter_context(pid_file(options.pid))
        workers = Workers(segment, pairs, count, net, log, options.cpus or ())
        workers.listeners = forwards.of

        def control() -> int:
            """In a process of its own (guard.py), the first and each one after it."""
            noted, in_hand = found(guard.notes, guard.base)
            server = Server(workers, offer, log, options.one_off, guard.notes)
            if guard.ending:  # from here on the server has the signals
                return 0
            if metrics is not None:
                metrics.start()
            if options.fd is None:
                server.listen(front_end)
            if noted is not None:
                instance["restarts"] += 1
                server.take_over(noted, in_hand)
            else:
                workers.start()
                if options.fd is not None:
                    server.adopt(front_end)
                where = options.socket or f"descriptor {options.fd}"
                log.info(f"ready on {where} ({pairs} queue pairs, {count} workers)")
            status = server.run()
            workers.stop()  # not after an exception: the next control goes on with them
            return status

        return guard.run(control)
