"""`vhostmq guest` as its users start it: a process, a back-end at the end of a socket, a command.

Most tests use a back-end of a few lines (tinybackend.py) that can lack features, give odd answers
or misbehave; the last ones run against the product itself (or passt, see backend.py). All need
/dev/net/tun and the right to make namespaces; without them they are skipped, with the reason.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import driver as d
import packets as pk
import pytest
from backend import Backend, kind
from guestcommand import ROOT, TIMEOUT_S, Running, argv, network, run, tree
from tinybackend import NOTIFICATION_DATA, RING_PACKED, TinyBackend, Wishes
from world import World

from control import guest_namespace
from dataplane.slow.net import Net

NOBODY = 65534
ALL = d.VERSION_1 | d.PROTOCOL_FEATURES | d.MRG_RXBUF | d.INDIRECT_DESC | d.EVENT_IDX | d.MQ
NET = Net(
    addr4=IPv4Address("192.0.2.2"),
    prefix4=24,
    gateway4=IPv4Address("192.0.2.1"),
    our_addr4=IPv4Address("192.0.2.1"),
    addr6=IPv6Address("2001:db8::2"),
    dns4=(IPv4Address("192.0.2.53"),),
    dns6=(IPv6Address("2001:db8::53"),),
    search=("corp.example",),
    mtu=65520,
)


def why_not() -> str:
    """What this machine lacks, or ""."""
    if not os.path.exists("/dev/net/tun"):
        return "/dev/net/tun is missing: modprobe tun"
    made = subprocess.run(["unshare", "--user", "--map-root-user", "--net", "--mount", "true"])
    return "" if made.returncode == 0 else "user namespaces are not allowed here"


pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vmqguest") as made:
        os.chmod(made, 0o755)
        yield Path(made)


@pytest.fixture
def make_tiny(folder: Path) -> Iterator[Callable[..., TinyBackend]]:
    made: list[TinyBackend] = []

    def make(net: Net = NET, **wishes: int) -> TinyBackend:
        path = str(folder / f"s{len(made)}")
        made.append(TinyBackend(path, network(net), Wishes(**wishes)))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def tiny(make_tiny: Callable[..., TinyBackend]) -> TinyBackend:
    return make_tiny(offer=ALL)


# ---- what the command sees -----------------------------------------------------------------------

LOOK = (
    "ip -j addr show dev eth0; echo; ip -j route; echo; ip -j -6 route; echo; cat /etc/resolv.conf"
)


def look(path: str, **options: Any) -> SimpleNamespace:
    """A guest's own view of its network."""
    done = run(path, "sh", "-c", LOOK, **options)
    assert done.returncode == 0, done.stderr
    link, routes, routes6, resolv = done.stdout.split("\n\n", 3)
    (device,) = (entry for entry in json.loads(link) if entry)
    addresses = {f"{a['local']}/{a['prefixlen']}" for a in device["addr_info"]}
    return SimpleNamespace(
        mtu=device["mtu"],
        addresses={a for a in addresses if not a.startswith("fe80")},
        defaults=[
            (r["gateway"], r.get("flags", []))
            for r in json.loads(routes) + json.loads(routes6)
            if r["dst"] == "default"
        ],
        on_link={r["dst"] for r in json.loads(routes) if r.get("scope") == "link"},
        resolv=resolv,
        said=done.stderr,
    )


def test_everything_the_network_gives(tiny: TinyBackend) -> None:
    seen = look(tiny.path)
    assert seen.mtu == 65520
    assert {"192.0.2.2/24", "2001:db8::2/128"} < seen.addresses
    assert len(seen.addresses) == 3  # and one made from the prefix
    assert [gateway for gateway, _ in seen.defaults] == ["192.0.2.1", "fe80::1"]
    wanted = "nameserver 192.0.2.53\nnameserver 2001:db8::53\nsearch corp.example\n"
    assert seen.resolv == wanted
    line = seen.said.splitlines()[-1]
    assert line.startswith("vhostmq guest: eth0 192.0.2.2/24, 2001:db8::2/128, ")
    assert "gateway 192.0.2.1, fe80::1, DNS 192.0.2.53, 2001:db8::53, MTU 65520" in line


def test_router_outside_the_subnet(make_tiny: Callable[..., TinyBackend]) -> None:
    """Reached by a route on the link (option 121)."""
    net = NET.replaced(gateway4=IPv4Address("198.51.100.1"), our_addr4=IPv4Address("198.51.100.1"))
    seen = look(make_tiny(net).path)
    assert seen.on_link == {"192.0.2.0/24", "198.51.100.1"}
    assert seen.defaults[0][0] == "198.51.100.1"


def test_ipv4_only(make_tiny: Callable[..., TinyBackend]) -> None:
    started_s = time.monotonic()
    seen = look(make_tiny(NET.replaced(ipv6=False, mtu=0)).path)
    assert seen.addresses == {"192.0.2.2/24"} and seen.mtu == 1500
    assert time.monotonic() - started_s < 30, "a family that is not there is not waited for"


def test_ipv6_only(make_tiny: Callable[..., TinyBackend]) -> None:
    """The MTU then comes from the router's advertisement."""
    seen = look(make_tiny(NET.replaced(ipv4=False, mtu=9000)).path)
    assert "2001:db8::2/128" in seen.addresses and "192.0.2.2/24" not in seen.addresses
    assert seen.mtu == 9000 and seen.resolv == "nameserver 2001:db8::53\nsearch corp.example\n"


def test_mtu_option_wins(tiny: TinyBackend) -> None:
    assert look(tiny.path, mtu=1400).mtu == 1400


def test_host_resolver_is_not_used(make_tiny: Callable[..., TinyBackend]) -> None:
    """Without name servers the guest has none, and the host keeps its own."""
    before = Path("/etc/resolv.conf").read_bytes()
    assert look(make_tiny(NET.replaced(dns4=(), dns6=(), search=())).path).resolv.strip() == ""
    assert Path("/etc/resolv.conf").read_bytes() == before


# ---- frames --------------------------------------------------------------------------------------

ECHO = """
import os, socket, sys
sizes, flows = [int(word) for word in sys.argv[1].split(",")], int(sys.argv[2])
for _ in range(flows):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.settimeout(10)
        s.connect(("192.0.2.1", 7))
        for size in sizes:
            for _ in range(3):
                data = os.urandom(size)
                s.send(data)
                assert s.recv(70000) == data
print("same")
"""
OFFERS = [
    d.VERSION_1,
    d.VERSION_1 | d.PROTOCOL_FEATURES,
    d.VERSION_1 | d.PROTOCOL_FEATURES | d.MRG_RXBUF,
    d.VERSION_1 | d.PROTOCOL_FEATURES | d.EVENT_IDX,
    d.VERSION_1 | d.PROTOCOL_FEATURES | d.INDIRECT_DESC,
    ALL,
    ALL | d.IN_ORDER,
    ALL | RING_PACKED | NOTIFICATION_DATA,
    ALL | RING_PACKED | d.IN_ORDER,
    (ALL | RING_PACKED | d.IN_ORDER) & ~(d.EVENT_IDX | d.INDIRECT_DESC | d.MRG_RXBUF),
]


@pytest.mark.parametrize("offer", OFFERS, ids=hex)
def test_frames_of_all_sizes(make_tiny: Callable[..., TinyBackend], offer: int) -> None:
    """With every set of ring features, and without REPLY_ACK as with it."""
    tiny = make_tiny(offer=offer, protocol=d.P_REPLY_ACK if offer == ALL else 0)
    done = run(tiny.path, sys.executable, "-c", ECHO, "0,1,100,1472,4000,30000,65400", "2")
    assert (done.returncode, done.stdout) == (0, "same\n"), done.stderr
    assert tiny.features == offer & ~d.MQ


def test_features_left_out(make_tiny: Callable[..., TinyBackend]) -> None:
    tiny = make_tiny(offer=ALL)
    assert run(tiny.path, "true", features="-event_idx,-indirect_desc").returncode == 0
    assert tiny.features == ALL & ~(d.MQ | d.EVENT_IDX | d.INDIRECT_DESC)


def test_ping(tiny: TinyBackend) -> None:
    done = run(tiny.path, "ping", "-c", "3", "-i", "0.05", "192.0.2.1")
    assert done.returncode == 0 and "3 received" in done.stdout


def test_queue_pairs(make_tiny: Callable[..., TinyBackend]) -> None:
    """Flows are spread by the kernel, and a flow stays on the pair its answers come on."""
    tiny = make_tiny(offer=ALL)
    done = run(tiny.path, sys.executable, "-c", ECHO, "10,1000", "40", queues=4)
    assert (done.returncode, done.stdout) == (0, "same\n"), done.stderr
    assert [ring.enabled for ring in tiny.rings] == [True] * 8
    pairs: dict[bytes, set[int]] = {}
    for pair, frame in tiny.frames:
        if frame[12:14] == b"\x08\0" and frame[23] == pk.UDP and frame[36:38] == b"\0\7":
            pairs.setdefault(frame[34:36], set()).add(pair)
    assert len(pairs) == 40 and all(len(used) == 1 for used in pairs.values())
    assert len(set.union(*pairs.values())) > 1


def test_order_of_messages(tiny: TinyBackend) -> None:
    """QEMU's: owner first, memory before rings, a ring's kick last; all stopped at the end."""
    assert run(tiny.path, "true").returncode == 0
    ring = [d.SET_VRING_NUM, d.SET_VRING_BASE, d.SET_VRING_ADDR]
    ring += [d.SET_VRING_ERR, d.SET_VRING_CALL, d.SET_VRING_KICK]
    assert tiny.requests == [
        *(d.SET_OWNER, d.GET_FEATURES, d.GET_PROTOCOL_FEATURES, d.SET_PROTOCOL_FEATURES),
        *(d.GET_QUEUE_NUM, d.SET_FEATURES, d.SET_MEM_TABLE, *ring, *ring),
        *(d.SET_VRING_ENABLE, d.SET_VRING_ENABLE, d.GET_VRING_BASE, d.GET_VRING_BASE),
    ]


def test_unprivileged(make_tiny: Callable[..., TinyBackend], folder: Path) -> None:
    """In a user namespace: nobody's guest is root inside and configures itself all the same. The
    one privilege left lets it read this checkout wherever it lies."""
    if os.geteuid():
        pytest.skip("NOT TESTED here: not root, so all tests of this file are unprivileged already")
    cache = folder / "cache"
    cache.mkdir()
    os.chown(cache, NOBODY, NOBODY)
    become = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    become += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    script = "id -u; ping -c 1 -W 5 192.0.2.1 >&2; cat /etc/resolv.conf"
    done = subprocess.run(
        [*become, *argv(make_tiny(offer=ALL).path, "sh", "-c", script)],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "XDG_CACHE_HOME": str(cache), "NUMBA_DISABLE_JIT": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr
    assert "1 received" in done.stderr
    assert done.stdout.splitlines()[:2] == ["0", "nameserver 192.0.2.53"]


# ---- how it ends ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command, status",
    [
        (["true"], 0),
        (["sh", "-c", "exit 7"], 7),
        (["sh", "-c", "kill -TERM $$"], 128 + signal.SIGTERM),
        (["/nonexistent/program"], 127),
        (["/dev"], 126),
    ],
)
def test_exit_status(tiny: TinyBackend, command: list[str], status: int) -> None:
    assert run(tiny.path, *command).returncode == status


def test_output_is_the_commands(tiny: TinyBackend) -> None:
    """Nothing of ours on standard output; the command has standard input."""
    done = subprocess.run(
        argv(tiny.path, "cat"), cwd=ROOT, input=b"a\0b", capture_output=True, timeout=TIMEOUT_S
    )
    assert done.stdout == b"a\0b"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_signals_reach_the_command(tiny: TinyBackend, number: signal.Signals) -> None:
    name = number.name.removeprefix("SIG")
    guest = Running(tiny.path, f"trap 'exit 9' {name}; while :; do sleep 0.02; done")
    time.sleep(0.2)
    guest.process.send_signal(number)
    assert guest.end()[0] == 9


COUNT_INTERRUPTS = """
import signal, sys, time
count = 0
def note(*_):
    global count
    count += 1
signal.signal(signal.SIGINT, note)
print("up", flush=True)
deadline = time.monotonic() + 20
while not count and time.monotonic() < deadline:
    time.sleep(0.01)
time.sleep(0.5)
sys.exit(count)
"""


def test_interrupt_key_arrives_once(tiny: TinyBackend) -> None:
    """The terminal sends SIGINT to both processes: the command's is not doubled, and the guest
    lives on to give the command's status."""
    ours, theirs = pty.openpty()
    guest = subprocess.Popen(
        argv(tiny.path, sys.executable, "-c", COUNT_INTERRUPTS),
        cwd=ROOT,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    seen = b""
    while b"up" not in seen:
        seen += os.read(ours, 1000)
    os.write(ours, b"\x03")
    assert guest.wait(30) == 1
    os.close(ours)


def test_background_processes_end_with_the_command(tiny: TinyBackend) -> None:
    """Even one that left its session, and the child of one."""
    script = "setsid sleep 1000 & (setsid sh -c 'sleep 1000 & sleep 1000' &) ; sleep 0.3"
    guest = Running(tiny.path, script)
    time.sleep(0.15)
    guest.pids = tree(guest.process.pid)
    assert len(guest.pids) >= 7
    assert guest.end()[0] == 0


def test_killed_outright(tiny: TinyBackend) -> None:
    """SIGKILL, which nobody can handle: command and movers go too."""
    guest = Running(tiny.path, "exec sleep 1000")
    assert len(guest.pids) == 4  # guest, its movers' parent, one mover, the command
    guest.process.kill()
    guest.process.wait()
    guest.assert_all_gone()


def test_back_end_closes(tiny: TinyBackend) -> None:
    guest = Running(tiny.path, "exec sleep 1000")
    tiny.order(tiny.hang_up)
    status, said = guest.end()
    assert status == 1 and "the back-end closed the connection" in said.splitlines()[-1]


def test_back_end_closes_after_the_command(make_tiny: Callable[..., TinyBackend]) -> None:
    """Then the command's status counts."""
    tiny = make_tiny(offer=ALL, close_at=d.GET_VRING_BASE)
    assert run(tiny.path, "sh", "-c", "exit 5").returncode == 5


def test_command_that_will_not_end(tiny: TinyBackend) -> None:
    """Asked by SIGTERM first, it is killed."""
    guest = Running(tiny.path, "trap '' TERM; while :; do sleep 0.02; done")
    tiny.order(tiny.hang_up)
    assert guest.end()[0] == 1


ALL_QUEUES = """
import contextlib, socket, time
sender = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
eth0 = socket.if_nametoindex("eth0")
print("up", flush=True)
for port in range(1, 65536):
    with contextlib.suppress(OSError):  # the link goes down at the end
        sender.sendto(b"", ("ff02::1234", port, 0, eth0))
    time.sleep(0.01)
"""
"""A guest's program whose frames leave by every queue soon: the kernel chooses by address and
port, with another hash after every boot. To a multicast group, which needs no neighbour."""


@pytest.mark.parametrize(
    "packed, index, word",
    [
        *((0, 0, "receive"), (0, 1, "transmit"), (0, 3, "transmit")),
        *((RING_PACKED, 0, "receive"), (RING_PACKED, 1, "transmit")),
    ],
)
def test_back_end_breaks_a_ring(
    make_tiny: Callable[..., TinyBackend], packed: int, index: int, word: str
) -> None:
    tiny = make_tiny(offer=ALL | packed)
    queues = 1 if packed else 2  # a packed ring lies with its next frame: none shall pass it by
    process = subprocess.Popen(
        argv(tiny.path, sys.executable, "-c", ALL_QUEUES, queues=queues),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    tiny.order(lambda: tiny.break_ring(index))
    _, said = process.communicate(timeout=30)
    wanted = f"queue pair {index // 2}: the back-end broke the {word} ring"
    assert process.returncode == 1 and wanted in said.splitlines()[-1]


def test_back_end_complains(tiny: TinyBackend) -> None:
    guest = Running(tiny.path, "exec sleep 1000")
    tiny.order(lambda: tiny.complain(0))
    status, said = guest.end()
    assert status == 1 and "the back-end says that a ring is broken" in said


def test_mover_dies(tiny: TinyBackend) -> None:
    guest = Running(tiny.path, "exec sleep 1000")
    (mover,) = (pid for pid in guest.pids if tree(pid) == [pid] and pid != guest.shell)
    os.kill(mover, signal.SIGSEGV)
    status, said = guest.end()
    assert status == 1 and "queue pair 0: the mover process ended with status -11" in said


# ---- what cannot start ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wishes, queues, words",
    [
        ({"offer": d.PROTOCOL_FEATURES}, 1, "does not offer VERSION_1"),
        ({"queues": 2}, 3, "3 queue pairs wanted, the back-end serves 2"),
        ({"protocol": 0}, 2, "2 queue pairs wanted, the back-end serves 1"),
        ({"refuse": d.SET_MEM_TABLE}, 1, "the back-end refused SET_MEM_TABLE"),
        ({"refuse": d.SET_VRING_KICK}, 1, "the back-end refused SET_VRING_KICK"),
        ({"close_at": d.GET_FEATURES}, 1, "the back-end closed the connection at GET_FEATURES"),
        ({"close_at": d.SET_VRING_ENABLE}, 1, "the back-end closed the connection"),
    ],
)
def test_back_end_that_does_not_do(
    make_tiny: Callable[..., TinyBackend], wishes: dict[str, int], queues: int, words: str
) -> None:
    done = run(make_tiny(**wishes).path, "true", queues=queues)
    assert done.returncode == 1 and done.stdout == ""
    (line,) = (line for line in done.stderr.splitlines() if "waiting" not in line)
    assert line.startswith("vhostmq guest: ") and words in line


def test_no_back_end(folder: Path) -> None:
    done = run(str(folder / "nobody"), "true")
    assert done.returncode == 1
    assert (
        done.stderr
        == f"vhostmq guest: cannot connect to {folder}/nobody: No such file or directory\n"
    )


@pytest.mark.parametrize(
    "path, words", [("/nonexistent", "modprobe tun"), ("/proc/version", "/proc/version: ")]
)
def test_no_tap(monkeypatch: pytest.MonkeyPatch, path: str, words: str) -> None:
    monkeypatch.setattr(guest_namespace, "TUN", path)
    with pytest.raises(guest_namespace.NamespaceError, match=re.escape(words)):
        guest_namespace.open_taps(1, 0)


def test_command_starts_without_numba() -> None:
    """What the user waits for loads in parallel, in the movers' process."""
    script = "import control.guest, sys; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0


# ---- with the product ----------------------------------------------------------------------------

TRANSFER = """
import hashlib, os, socket, sys, threading
host, port, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
def one(results):
    with socket.create_connection((host, port), 20) as s:
        data = os.urandom(1 << 20)
        wanted = hashlib.sha256()
        for _ in range(size >> 20):
            s.sendall(data)
            wanted.update(data)
        s.shutdown(socket.SHUT_WR)
        got, total = hashlib.sha256(), 0
        while part := s.recv(1 << 18):
            got.update(part)
            total += len(part)
        results.append((total, got.digest() == wanted.digest()))
results = []
threads = [threading.Thread(target=one, args=(results,)) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(results == [(size, True)] * 4)
"""


class Echo(threading.Thread):
    """Takes what a connection sends until its end, then sends all of it back."""

    def __init__(self, world: World, family: int, address: str) -> None:
        super().__init__(daemon=True)
        self.listener = world.run(socket.socket, family, socket.SOCK_STREAM)
        self.listener.bind((address, 0))
        self.listener.listen()
        self.port = self.listener.getsockname()[1]
        self.start()

    def run(self) -> None:
        while True:
            try:
                connection = self.listener.accept()[0]
            except OSError:
                return
            threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    def serve(self, connection: socket.socket) -> None:
        parts = []
        with connection, suppress(OSError):  # the guest then says what it missed
            while part := connection.recv(1 << 18):
                parts.append(part)
            connection.sendall(b"".join(parts))


@pytest.mark.passt_defect("drops what the host's socket does not take; the guest's timer runs out")
@pytest.mark.parametrize("family", [4, 6])
def test_bulk_through_the_product(
    make_backend: Callable[..., Backend], world: World, family: int
) -> None:
    """Four connections there and back, through every offload both sides have."""
    queues = 1 if kind() == "passt" else 2
    backend = make_backend(*([] if kind() == "passt" else ["--queues", str(queues)]))
    sort, loopback = {4: (socket.AF_INET, "127.0.0.1"), 6: (socket.AF_INET6, "::1")}[family]
    echo = Echo(world, sort, loopback)
    gateway = {4: "198.51.100.1", 6: "2001:db8:1::1"}[family]
    words = (sys.executable, "-c", TRANSFER, gateway, str(echo.port), str(8 << 20))
    done = run(backend.path, *words, queues=queues)
    echo.listener.close()
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def test_one_guest_after_the_other(make_backend: Callable[..., Backend]) -> None:
    backend = make_backend()
    for _ in range(3):
        done = run(backend.path, "ping", "-c", "1", "-W", "10", "198.51.100.1")
        assert done.returncode == 0, done.stderr + done.stdout
