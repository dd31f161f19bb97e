"""Reading the host: resolv.conf, and routes and addresses of real network namespaces."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from argparse import Namespace
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from control import wanted
from control.hostnet import read_host
from dataplane.slow.net import Net

# a busy machine is no failure
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

ROOT = Path(__file__).parent.parent
LOCAL = Net().replaced(
    mtu=65520,
    map_host_loopback4=IPv4Address("169.254.2.2"),
    map_host_loopback6=IPv6Address("fe80::1"),
)


# ---- resolv.conf ---------------------------------------------------------------------------------


def resolv(tmp_path, text):
    file = tmp_path / "resolv.conf"
    file.write_bytes(text)
    net = read_host(wanted.read(Namespace(map_host_loopback="none")), str(file))
    return [str(server) for server in (*net.dns4, *net.dns6)], net.search


@pytest.mark.parametrize(
    "text, servers, search",
    [
        (b"nameserver 10.0.0.53\nsearch a.example b.example\n", ["10.0.0.53"], 2),
        (b"#nameserver 10.0.0.53\n;x\noptions ndots:2\n", [], 0),
        (b" nameserver\t10.0.0.53 # resolver\n", ["10.0.0.53"], 0),
        (b"nameserver\nnameserver x\nnameserver 2001:db8::5", ["2001:db8::5"], 0),
        (b"search a.example b.example c.example\ndomain d.example\n", [], 1),
        (b"domain d.example\nsearch a.example b.example\n", [], 2),
        (b"search . a.example bad..example " + b"x" * 64 + b"\n", [], 1),
        (b"\xff\xfe\0nameserver\nsearch \xc3\xa4.example\n", [], 0),
        (b"nameserver 10.0.0.53\r\n", ["10.0.0.53"], 0),
        (b"", [], 0),
    ],
)
def test_resolv_conf(tmp_path, text, servers, search):
    found, domains = resolv(tmp_path, text)
    assert found == servers and len(domains) == search


def test_no_resolv_conf(tmp_path):
    assert read_host(wanted.read(Namespace()), str(tmp_path / "none")).dns4 == ()


@unhurried
@given(data=st.binary(max_size=200))
def test_any_resolv_conf(tmp_path_factory, data):
    resolv(tmp_path_factory.getbasetemp(), data)


# ---- real namespaces -----------------------------------------------------------------------------

NAMESPACE = f"vmqhost{os.getpid()}"
READ = """
import json, pickle, sys
from argparse import Namespace
from control import wanted
from control.hostnet import HostNetError, read_host
try:
    net = read_host(wanted.read(Namespace(**json.loads(sys.argv[1]))), sys.argv[2])
except HostNetError as error:
    sys.exit(f"refused: {error}")
heavy = [name for name in ("pyroute2", "asyncio", "numba") if name in sys.modules]
sys.stdout.buffer.write(pickle.dumps((net, heavy)))
"""


@pytest.fixture
def namespace():
    """A function that runs `ip` commands in a fresh namespace."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        reason = "needs root and ip to make network namespaces"
        warnings.warn(f"the host's set-up was not read in a namespace: {reason}", stacklevel=1)
        pytest.skip(reason)

    def ip(*commands):
        for command in commands:
            subprocess.run(["ip", "-n", NAMESPACE, *command.split()], check=True, timeout=30)

    subprocess.run(["ip", "netns", "add", NAMESPACE], check=True)
    try:
        ip(
            "link set lo up",
            "link add one type veth peer name one-far",
            "link add two type veth peer name two-far",
        )
        for name in ("one", "one-far", "two", "two-far"):
            ip(f"link set {name} addrgenmode none", f"link set {name} up")
        yield ip
    finally:
        subprocess.run(["ip", "netns", "del", NAMESPACE], check=True)


def read_inside(tmp_path, resolv_conf="", **options):
    """What a process in the namespace reads, without having loaded what takes long to load."""
    file = tmp_path / "resolv.conf"
    file.write_text(resolv_conf)
    command = ["ip", "netns", "exec", NAMESPACE, sys.executable, "-c", READ]
    run = subprocess.run(
        [*command, json.dumps(options), str(file)], cwd=ROOT, capture_output=True, timeout=60
    )
    assert run.returncode == 0, run.stderr.decode()
    net, heavy = pickle.loads(run.stdout)
    assert heavy == []
    return net


def test_empty_namespace_is_local_mode(namespace, tmp_path):
    assert read_inside(tmp_path) == LOCAL


def test_both_families(namespace, tmp_path):
    namespace(
        "addr add 192.0.2.2/24 dev one",
        "addr add 2001:db8::2/64 dev one nodad",
        "addr add fe80::2/64 dev one nodad",
        "addr add 10.0.0.9/8 dev two",
        "route add default via 192.0.2.1",
        "-6 route add default via fe80::fc dev one",
    )
    text = "nameserver 127.0.0.53\nsearch corp.example\n"
    command = ["ip", "-n", NAMESPACE, "-o", "link", "show", "one"]
    number = subprocess.run(command, check=True, capture_output=True).stdout.split(b":")[0]
    assert read_inside(tmp_path, text) == LOCAL.replaced(
        interface6=int(number),
        addr4=IPv4Address("192.0.2.2"),
        prefix4=24,
        gateway4=IPv4Address("192.0.2.1"),
        our_addr4=IPv4Address("192.0.2.1"),
        map_host_loopback4=IPv4Address("192.0.2.1"),
        dns4=(IPv4Address("192.0.2.1"),),
        dns_forward4=IPv4Address("192.0.2.1"),
        dns_host4=IPv4Address("127.0.0.53"),
        addr6=IPv6Address("2001:db8::2"),
        gateway6=IPv6Address("fe80::fc"),
        link_local6=IPv6Address("fe80::fc"),
        map_host_loopback6=IPv6Address("fe80::fc"),
        search=("corp.example",),
    )
    net = read_inside(tmp_path, interface="two", ipv4_only=True)
    assert (str(net.addr4), net.prefix4, str(net.gateway4)) == ("10.0.0.9", 8, "169.254.2.2")
    assert str(read_inside(tmp_path, address="10.7.7.7/24").addr4) == "10.7.7.7"


def test_metrics_and_other_tables(namespace, tmp_path):
    namespace(
        "addr add 192.0.2.2/24 dev one",
        "addr add 10.0.0.9/8 dev two",
        "route add default via 192.0.2.1 metric 600",
        "route add default via 10.0.0.1 metric 100",
        "route add default via 192.0.2.254 table 100",
        "route add unreachable default metric 1",
    )
    assert str(read_inside(tmp_path).gateway4) == "10.0.0.1"
    namespace("route del default via 10.0.0.1 metric 100")
    assert str(read_inside(tmp_path).gateway4) == "192.0.2.1"


def test_multipath(namespace, tmp_path):
    """The heaviest of several next hops, for both families."""
    namespace(
        "addr add 192.0.2.2/24 dev one",
        "addr add 10.0.0.9/8 dev two",
        "addr add 2001:db8:1::2/64 dev one nodad",
        "addr add 2001:db8:2::2/64 dev two nodad",
        "route add default nexthop via 192.0.2.1 weight 1 nexthop via 10.0.0.1 weight 5",
        "-6 route add default nexthop via 2001:db8:1::1 weight 1"
        " nexthop via 2001:db8:2::1 weight 5",
    )
    net = read_inside(tmp_path)
    assert (str(net.gateway4), str(net.addr4)) == ("10.0.0.1", "10.0.0.9")
    assert (str(net.gateway6), str(net.addr6)) == ("2001:db8:2::1", "2001:db8:2::2")
    net = read_inside(tmp_path, interface="one")
    assert (str(net.gateway4), str(net.gateway6)) == ("192.0.2.1", "2001:db8:1::1")


def test_routes_that_lead_nowhere(namespace, tmp_path):
    """A next hop whose link is down, and the loopback interface."""
    namespace(
        "addr add 192.0.2.2/24 dev one",
        "addr add 10.0.0.9/8 dev two",
        "route add default nexthop via 192.0.2.1 weight 5 nexthop via 10.0.0.1 weight 1",
    )
    assert str(read_inside(tmp_path).gateway4) == "192.0.2.1"
    namespace("link set one down")
    assert str(read_inside(tmp_path).gateway4) == "10.0.0.1"
    namespace("link set two down", "addr add 10.5.5.5/32 dev lo", "route add default dev lo")
    assert read_inside(tmp_path) == LOCAL


def test_point_to_point(namespace, tmp_path):
    """No router on the default route; our own address, not the peer's."""
    namespace(
        "addr add 10.8.0.6 peer 10.8.0.5 dev one",
        "route add default dev one",
        "addr add fd00::6 peer fd00::5 dev two nodad",
        "-6 route add default dev two",
    )
    net = read_inside(tmp_path)
    assert (str(net.addr4), net.prefix4, str(net.gateway4)) == ("10.8.0.6", 32, "169.254.2.2")
    assert (str(net.addr6), str(net.gateway6)) == ("fd00::6", "fe80::1")


def test_source_address_of_the_route(namespace, tmp_path):
    namespace(
        "addr add 192.0.2.2/24 dev one",
        "addr add 192.0.2.7/24 dev one",
        "route add default via 192.0.2.1 src 192.0.2.7",
    )
    assert str(read_inside(tmp_path).addr4) == "192.0.2.7"


def test_addresses_that_do_not_count(namespace, tmp_path):
    namespace(
        "addr add 169.254.7.7/16 dev one scope link",
        "addr add 2001:db8::d/64 dev one nodad preferred_lft 0",
        "addr add 2001:db8::e/64 dev one nodad",
        "addr add fe80::2/64 dev one nodad",
        "-6 route add default via fe80::fc dev one",
    )
    net = read_inside(tmp_path)
    assert (str(net.addr4), str(net.gateway4)) == ("169.254.2.1", "169.254.2.2")
    assert str(net.addr6) == "2001:db8::e"


def test_many_routes(namespace, tmp_path):
    """The default route is found after thousands of others, wherever the kernel lists it."""
    batch = tmp_path / "routes"
    namespace("addr add 192.0.2.2/24 dev one", "addr add 2001:db8::2/64 dev one nodad")
    lines = [f"route add 2001:db8:{n // 250:x}:{n % 250:x}::/64 dev one" for n in range(3000)]
    lines += [f"route add 10.{n // 250}.{n % 250}.0/24 dev one" for n in range(3000)]
    lines += ["route add default via 192.0.2.1", "route add default via 2001:db8::1"]
    batch.write_text("\n".join(lines))
    namespace(f"-batch {batch}")
    net = read_inside(tmp_path)
    assert (str(net.gateway4), str(net.gateway6)) == ("192.0.2.1", "2001:db8::1")
    namespace("-6 route del default")
    net = read_inside(tmp_path)
    assert (str(net.addr6), str(net.gateway6)) == ("2001:db8::2", "fe80::1")


def test_unknown_interface(namespace, tmp_path):
    command = ["ip", "netns", "exec", NAMESPACE, sys.executable, "-c", READ]
    arguments = [json.dumps({"interface": "three"}), "/dev/null"]
    run = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.strip() == "refused: there is no network interface 'three'"


def test_pyroute2_is_whole_afterwards():
    """The lean import leaves no trace: the package works, and its classes fit together."""
    script = """
from argparse import Namespace
from control import wanted
from control.hostnet import read_host
first = read_host(wanted.read(Namespace()))
import pyroute2, pyroute2.netlink.rtnl.rtmsg
with pyroute2.IPRoute() as ip:
    ip.get_routes()
assert pyroute2.netlink.rtnl.rtmsg.rtmsg.__module__ == "pyroute2.netlink.rtnl.rtmsg"
assert read_host(wanted.read(Namespace())) == first
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=60)
