"""struct net of the shared segment: every field, from a command line and a made-up host."""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from control import netblock, wanted
from control.hostnet import Host, HostAddress, Route, build_net
from control.options import parse
from shm import schema
from shm.segment import PREFIX, Segment

HOST = Host(
    routes=(
        Route(4, 2, True, 0, ip_address("192.0.2.1")),
        Route(6, 2, True, 0, ip_address("2001:db8::1")),
    ),
    addresses=(
        HostAddress(2, ip_address("192.0.2.2"), 24),
        HostAddress(2, ip_address("2001:db8::2"), 64),
    ),
    name_servers=(ip_address("192.0.2.53"), ip_address("2001:db8::53")),
)
ON_A_LINK = HOST._replace(
    routes=(HOST.routes[0], Route(6, 2, True, 0, ip_address("fe80::fc"))),
    name_servers=(ip_address("127.0.0.53"), ip_address("fe80::53%lo")),
)
NOWHERE = Host()
NONE = "0" * 32

ADDRESSES = [name for name, field in schema.NET.fields.items() if field.count == 16]
PLAIN = {
    **{name: NONE for name in ADDRESSES},
    "our_mac": "56484d5100010000",
    "guest4": "0" * 20 + "ffffc0000202",
    "guest6": "20010db8000000000000000000000002",
    "our4": "0" * 20 + "ffffc0000201",
    "our6": "20010db8000000000000000000000001",
    "our6_local": "fe800000000000000000000000000001",
    "loopback4": "0" * 20 + "ffffc0000201",
    "loopback6": "20010db8000000000000000000000001",
    "dns_host4": "0" * 20 + "ffffc0000235",
    "dns_host6": "20010db8000000000000000000000053",
    "scope_id": 2,
    "no_tcp": 0,
    "no_udp": 0,
    "no_icmp": 0,
    "no_ipv4": 0,
    "no_ipv6": 0,
    "mtu": 65520,
    "udp_oneway_s": 30,
    "udp_stream_s": 120,
    "peek_offset": 1,
}


@pytest.fixture
def segment() -> Iterator[Segment]:
    made = Segment(f"{PREFIX}{os.getpid()}-netblock", 1, create=True)
    # What is not written would show.
    at, size = made.offsets.net, schema.NET.size
    made.buffer[at : at + size] = b"\xee" * size
    yield made
    made.unlink()
    made.close()


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """What this machine's kernel can do and is set to, the same on every machine."""
    monkeypatch.setattr(netblock, "has_peek_offset", lambda: True)
    monkeypatch.setattr(netblock, "CONNTRACK", tmp_path)
    return tmp_path


def filled(segment: Segment, *argv: str, host: Host = HOST) -> dict[str, Any]:
    """The block by field: numbers, and arrays in hexadecimal."""
    options = parse(["run", "--socket", "s", *argv])
    netblock.fill(segment, build_net(wanted.read(options), host), options)
    base = segment.offsets.net
    return {
        name: schema.NET.get_bytes(segment.buffer, base, name).hex()
        if field.count
        else schema.NET.get(segment.buffer, base, name)
        for name, field in schema.NET.fields.items()
    }


def test_every_field(segment: Segment) -> None:
    assert filled(segment) == PLAIN


def changed(segment: Segment, *argv: str, host: Host = HOST) -> dict[str, Any]:
    """What these options change."""
    plain = filled(segment, host=host)
    return {
        name: value
        for name, value in filled(segment, *argv, host=host).items()
        if value != plain[name]
    }


def test_the_block_can_be_filled_again(segment: Segment) -> None:
    everything = (
        *("--map-guest-addr", "10.9.9.9", "--dns-forward", "10.5.5.5", "--mtu", "1500", "--no-tcp"),
        *("--map-host-loopback", "10.8.8.8", "--ipv4-only", "--mac-addr", "02:00:00:00:00:09"),
    )
    assert len(changed(segment, *everything)) > 8
    assert filled(segment) == PLAIN


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["--mac-addr", "02:Ab:00:00:00:0f"], {"our_mac": "02ab0000000f0000"}),
        (["--address", "10.1.2.3/8"], {"guest4": "0" * 20 + "ffff0a010203"}),
        (["--address", "2001:db8:5::5"], {"guest6": "20010db8000500000000000000000005"}),
        (
            ["--gateway", "10.1.2.1"],
            {name: "0" * 20 + "ffff0a010201" for name in ("our4", "loopback4")},
        ),
        (
            ["--gateway", "fe80::7"],
            {
                "our6": NONE,
                "our6_local": "fe800000000000000000000000000007",
                "loopback6": "fe800000000000000000000000000007",
            },
        ),
        (["--map-host-loopback", "10.8.8.8"], {"loopback4": "0" * 20 + "ffff0a080808"}),
        (["--map-host-loopback", "fc00::8"], {"loopback6": "fc" + "0" * 29 + "8"}),
        (["--map-host-loopback", "none"], {"loopback4": NONE, "loopback6": NONE}),
        (["--no-map-gw"], {"loopback4": NONE, "loopback6": NONE}),
        (["--map-guest-addr", "10.9.9.9"], {"map_guest4": "0" * 20 + "ffff0a090909"}),
        (["--map-guest-addr", "fc00::9"], {"map_guest6": "fc" + "0" * 29 + "9"}),
        (["--dns-forward", "10.5.5.5"], {"dns_forward4": "0" * 20 + "ffff0a050505"}),
        (["--dns-forward", "fc00::5"], {"dns_forward6": "fc" + "0" * 29 + "5"}),
        (["--dns-host", "127.0.0.1"], {"dns_host4": "0" * 20 + "ffff7f000001"}),
        (["--dns-host", "::1"], {"dns_host6": "0" * 31 + "1"}),
        (
            ["--dns-host", "fe80::53%lo"],
            {"dns_host6": "fe800000000000000000000000000053", "scope_id": 1},
        ),
        (
            ["--dns-host", "fe80::53%4711"],
            {"dns_host6": "fe800000000000000000000000000053", "scope_id": 4711},
        ),
        (["--no-tcp"], {"no_tcp": 1}),
        (["--no-udp"], {"no_udp": 1}),
        (["--no-icmp"], {"no_icmp": 1}),
        (
            ["--ipv4-only"],
            {
                "no_ipv6": 1,
                "our6": NONE,
                "scope_id": 0,
                **{name: NONE for name in ("guest6", "loopback6", "dns_host6")},
            },
        ),
        (["--mtu", "1280"], {"mtu": 1280}),
        (["--mtu", "0"], {}),  # not told; frames may have any size
        (["--dns", "10.3.3.3", "--search", "a.example", "--hostname", "x"], {}),  # no worker's
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_an_option_changes(
    segment: Segment, argv: list[str], expected: dict[str, Any]
) -> None:
    assert changed(segment, *argv) == expected


def test_ipv6_only(segment: Segment) -> None:
    found = changed(segment, "--ipv6-only", "--map-guest-addr", "10.9.9.9")
    assert found.pop("no_ipv4") == 1
    assert found.pop("our4") == "0" * 20 + "ffffa9fe0202"  # of a link nobody uses
    assert found == {name: NONE for name in ("guest4", "loopback4", "dns_host4")}


def test_a_resolver_that_only_the_host_reaches(segment: Segment) -> None:
    """Forwarded from the address that stands for the host; IPv6 with the host's interface."""
    found = filled(segment, host=ON_A_LINK)
    assert found["dns_forward4"] == found["loopback4"] == PLAIN["our4"]
    assert found["dns_host4"] == "0" * 20 + "ffff7f000035"
    assert found["dns_forward6"] == found["our6_local"] == "fe8000000000000000000000000000fc"
    assert found["dns_host6"] == "fe800000000000000000000000000053" and found["scope_id"] == 1
    assert found["our6"] == NONE


@pytest.mark.parametrize("zone", ["nosuch0", "4294967296", "9" * 5000])
def test_a_resolver_on_an_interface_that_is_gone(segment: Segment, zone: str) -> None:
    """resolv.conf may say anything; it is no reason not to start."""
    host = HOST._replace(name_servers=(ip_address(f"fe80::53%{zone}"),))
    found = filled(segment, host=host)
    assert found["scope_id"] == 0 and found["dns_host6"] == "fe800000000000000000000000000053"


def test_a_host_without_a_network(segment: Segment) -> None:
    """No IPv6 address to share: nothing may stand for it. Zeros would be the host's loopback."""
    found = filled(
        segment, "--map-guest-addr", "10.9.9.9", "--map-guest-addr", "fc00::9", host=NOWHERE
    )
    assert found["guest4"] == "0" * 20 + "ffffa9fe0201"
    assert found["our4"] == found["loopback4"] == "0" * 20 + "ffffa9fe0202"
    assert found["our6_local"] == found["loopback6"] == "fe800000000000000000000000000001"
    assert found["map_guest4"] == "0" * 20 + "ffff0a090909"
    assert {found[name] for name in ("guest6", "our6", "map_guest6", "dns_host4")} == {NONE}


def test_timeouts_of_the_host(segment: Segment, kernel: Path) -> None:
    """As long as the host's own connection tracking remembers."""
    (kernel / "nf_conntrack_udp_timeout").write_text("77\n")
    (kernel / "nf_conntrack_udp_timeout_stream").write_text("nonsense\n")
    found = filled(segment)
    assert (found["udp_oneway_s"], found["udp_stream_s"]) == (77, 120)


def test_peek_offset(segment: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netblock, "has_peek_offset", lambda: False)
    assert changed(segment) == {} and filled(segment)["peek_offset"] == 0


@pytest.mark.parametrize(
    "lacking, found",
    [((), True), ((socket.AF_INET,), False), ((socket.AF_INET6,), False)],
    ids=["both", "only-ipv6", "only-ipv4"],
)
def test_peek_offset_is_needed_in_both_families(
    monkeypatch: pytest.MonkeyPatch, lacking: tuple[int, ...], found: bool
) -> None:
    monkeypatch.undo()
    release = re.match(r"(\d+)\.(\d+)", os.uname().release)
    assert release
    here, real = netblock.has_peek_offset(), socket.socket.setsockopt
    assert here or (int(release[1]), int(release[2])) < (6, 12)

    def setsockopt(sock: socket.socket, level: int, option: int, value: int) -> None:
        if option == netblock.SO_PEEK_OFF and sock.family in lacking:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        real(sock, level, option, value)

    monkeypatch.setattr(socket.socket, "setsockopt", setsockopt)
    assert netblock.has_peek_offset() is (here and found)


def test_peek_offset_without_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    before, real = netblock.has_peek_offset(), socket.socket

    def make(family: int = socket.AF_INET, *how: Any, **more: Any) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported")
        return real(family, *how, **more)

    monkeypatch.setattr(socket, "socket", make)
    assert netblock.has_peek_offset() is before
