"""hostnet.py - what the host's network looks like, and so what the guest's shall look like.

Theory      The guest takes the host's place: its address, prefix, router, name servers (the rules
            are those of passt). Three sources, read once: what the operator wants, the kernel's
            routes and addresses (rtnetlink), resolv.conf. `read_host` reads, `build_net` decides
            (it asks the kernel only for the number of a named interface), so every rule can be
            tested with made-up tables.
Template    Per family the interface of the best default route; without one, of the first route in
            the main table that is not link-local; or the one the operator named. Its address: the
            route's own source, else stable before temporary ones, global before ULA, one in the
            router's subnet before others. An option replaces its own part and nothing else
            (wanted.py reads them).
Local mode  Without a template a guest gets 169.254.2.1/16 behind 169.254.2.2, and for IPv6 no
            address: its own link-local one reaches fe80::1, the host. A default route without a
            router (VPN, point-to-point) keeps the host's address behind those routers; DHCP tells
            how to reach a router outside the subnet.
DNS         A name server that only the host can reach (loopback, link-local, or at an address the
            guest knows as the host) is replaced by the address that stands for the host, and
            queries sent there are forwarded (`dns_forward*` to `dns_host*`).
pyroute2    Only its two message classes are used, imported without the package's __init__, which
            loads all of pyroute2, asyncio and ssl: 5 ms instead of 110, out of the 200 ms in which
            a front-end expects its first answer.
Limits      ROUTES_MAX routes per family besides default ones; 64 KiB of resolv.conf.
Ownership   Nothing is kept; the netlink socket and the file are closed again.
Errors      HostNetError with one line: what is wanted does not fit this host, or its kernel does
            not answer.
"""

import importlib
import importlib.util
import socket
import struct
import sys
import types
from collections.abc import Iterable, Iterator
from ipaddress import IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any, NamedTuple

from control.wanted import Address, Wanted
from dataplane.slow.net import Net, dns_name

RESOLV_CONF = "/etc/resolv.conf"
RESOLV_CONF_MAX_BYTES = 65536
NAME_SERVERS_MAX = 3  # per family, as in the C library's resolver
ROUTES_MAX = 64
NETLINK_TIMEOUT_S = 2.0
INTERFACE_MAX = 2**31 - 1  # the kernel counts them with an int

LOCAL = Net()  # what a guest gets when there is no host network to copy

RTM_GETADDR, RTM_GETROUTE = 22, 26
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_REQUEST_DUMP = 0x301
RT_TABLE_MAIN = 254
RTN_UNICAST = 1
RTNH_F_DEAD = 1
RT_SCOPE_LINK = 253
IFA_F_TEMPORARY = 0x01  # IPv6; the same bit is IFA_F_SECONDARY for IPv4
IFA_F_UNUSABLE = 0x20 | 0x40 | 0x08  # deprecated, tentative, failed duplicate detection

UNIQUE_LOCAL = IPv6Network("fc00::/7")


class HostNetError(Exception):
    """The network cannot be set up; the text is one line for the operator."""


class Route(NamedTuple):
    """A unicast route of the main table; `gateway` and `source` None where it has none."""

    version: int
    interface: int
    default: bool
    metric: int = 0
    gateway: Address | None = None
    source: Address | None = None


class HostAddress(NamedTuple):
    """One address of an interface."""

    interface: int
    address: Address
    prefix: int
    scope: int = 0
    flags: int = 0


class Host(NamedTuple):
    """What the kernel and resolv.conf say, in their order. Name servers may carry a zone."""

    routes: tuple[Route, ...] = ()
    addresses: tuple[HostAddress, ...] = ()
    name_servers: tuple[Address, ...] = ()
    search: tuple[str, ...] = ()


class Template(NamedTuple):
    """What is copied from the host for one family; None where it has none."""

    address: Address | None = None
    prefix: int = 0
    gateway: Address | None = None
    interface: int = 0


def read_host(wanted: Wanted, resolv_conf: str = RESOLV_CONF) -> Net:
    """The guest's network, from the host's and what is wanted. Takes about 10 ms."""
    name_servers, search = _read_resolv_conf(resolv_conf)
    try:
        routes, addresses = _read_kernel()
    except OSError as error:
        raise HostNetError(f"cannot read the host's routes and addresses: {error}") from error
    return build_net(wanted, Host(tuple(routes), tuple(addresses), name_servers, search))


# ---- what the guest gets -----------------------------------------------------------------------


def build_net(wanted: Wanted, host: Host) -> Net:
    """The guest's network, decided from what is wanted and tables; HostNetError as in read_host."""
    interface = _interface(wanted.interface) if wanted.interface else 0
    parts: dict[str, Any] = dict(wanted.switches)
    parts |= _part4(wanted, _template(host, 4, interface)) if wanted.ipv4 else {}
    parts |= _part6(wanted, _template(host, 6, interface)) if wanted.ipv6 else {}
    enabled = [version for version, on in ((4, wanted.ipv4), (6, wanted.ipv6)) if on]
    routers = {version: parts[f"gateway{version}"] for version in enabled}
    host_loopback = {**routers, **wanted.map_host_loopback}
    for version in enabled:
        parts[f"map_host_loopback{version}"] = host_loopback[version]
        parts[f"map_guest_addr{version}"] = wanted.map_guest_addr.get(version)
    parts |= _dns(wanted, host, host_loopback, enabled)
    return Net(
        ipv4=wanted.ipv4,
        ipv6=wanted.ipv6,
        our_mac=wanted.mac or LOCAL.our_mac,
        mtu=wanted.mtu,
        search=host.search if wanted.search is None else wanted.search,
        hostname=wanted.hostname,
        fqdn=wanted.fqdn,
        **parts,
    )


def _interface(name: str) -> int:
    """The number of an interface that the operator named."""
    try:
        return socket.if_nametoindex(name)
    except OSError:
        raise HostNetError(f"there is no network interface {name!r}") from None


def zone_index(zone: str) -> int:
    """The interface index of an IPv6 zone; 0, which the kernel takes for none, when there is no
    such interface."""
    try:
        index = int(zone) if zone.isdecimal() else socket.if_nametoindex(zone)
    except (OSError, ValueError):
        return 0
    return index if index <= INTERFACE_MAX else 0


def _template(host: Host, version: int, interface: int) -> Template:
    """What to copy for one family, from `interface` or, with 0, the one with the best route."""
    routes = [
        route
        for route in host.routes
        if route.version == version and interface in (0, route.interface)
    ]
    defaults = [route for route in routes if route.default]
    if defaults:
        route = min(defaults, key=lambda route: route.metric)
    elif routes or interface:
        route = Route(version, interface or routes[0].interface, False)
    else:
        return Template()

    def rank(candidate: HostAddress) -> tuple[bool, bool, bool, bool]:
        network = ip_network((candidate.address, candidate.prefix), strict=False)
        return (
            candidate.address != route.source,
            bool(candidate.flags & IFA_F_TEMPORARY),
            version == 6 and candidate.address in UNIQUE_LOCAL,
            route.gateway is None or route.gateway not in network,
        )

    candidates = [
        candidate
        for candidate in host.addresses
        if (candidate.interface == route.interface or candidate.address == route.source)
        and candidate.address.version == version
        and candidate.scope < RT_SCOPE_LINK
        and not candidate.flags & IFA_F_UNUSABLE
    ]
    if not candidates:
        return Template()
    best = min(candidates, key=rank)
    return Template(best.address, best.prefix, route.gateway, route.interface)


def _part4(wanted: Wanted, template: Template) -> dict[str, Any]:
    address = wanted.addresses.get(4) or template.address or LOCAL.addr4
    prefix = template.prefix if template.address else LOCAL.prefix4
    if wanted.prefix4 is not None:
        prefix = wanted.prefix4
    router = wanted.gateways.get(4) or template.gateway or LOCAL.gateway4
    _keep_apart(address, router)
    return {"addr4": address, "prefix4": prefix, "gateway4": router, "our_addr4": router}


def _part6(wanted: Wanted, template: Template) -> dict[str, Any]:
    """IPv6 has no prefix to choose: address autoconfiguration needs 64 bits (RFC 4862)."""
    address = wanted.addresses.get(6) or template.address
    router = wanted.gateways.get(6) or template.gateway or LOCAL.gateway6
    _keep_apart(address, router)
    link_local = router if router.is_link_local else LOCAL.link_local6
    return {
        "addr6": address,
        "gateway6": router,
        "link_local6": link_local,
        "interface6": template.interface,
    }


def _keep_apart(address: Address | None, router: Address) -> None:
    if router == address:
        raise HostNetError(f"{address} cannot be both the guest's address and its gateway")


def _dns(
    wanted: Wanted, host: Host, host_loopback: dict[int, Address | None], enabled: list[int]
) -> dict[str, Any]:
    """dns*, dns_forward* and dns_host* for the enabled families."""
    resolver = wanted.dns_host.get(6)
    if isinstance(resolver, IPv6Address) and resolver.scope_id:
        if not zone_index(resolver.scope_id):
            raise HostNetError(f"--dns-host: there is no network interface {resolver.scope_id!r}")
    parts: dict[str, Any] = {}
    for version in enabled:
        known = [server for server in host.name_servers if server.version == version]
        chosen = [address for address in wanted.dns or () if address.version == version]
        forward = wanted.dns_forward.get(version)
        if not chosen and wanted.dns != ():
            chosen, forward = _reachable(known, forward, host_loopback.get(version))
        parts[f"dns{version}"] = tuple(chosen)
        parts[f"dns_forward{version}"] = forward
        parts[f"dns_host{version}"] = wanted.dns_host.get(version) or next(iter(known), None)
    return parts


def _reachable(
    known: list[Address], forward: Address | None, host_loopback: Address | None
) -> tuple[list[Address], Address | None]:
    """(name servers as the guest can reach them, address whose queries are forwarded)."""
    chosen: dict[Address, None] = {}
    for server in known[:NAME_SERVERS_MAX]:
        server = ip_address(server.packed)  # a zone of the host means nothing to the guest
        zoned = server.version == 6 and server.is_link_local
        if server.is_loopback or zoned or server == host_loopback:
            forward = forward or host_loopback
            if forward is None:
                continue
            server = forward
        chosen[server] = None
    return list(chosen), forward


# ---- what the host has -------------------------------------------------------------------------


def _read_resolv_conf(path: str) -> tuple[tuple[Address, ...], tuple[str, ...]]:
    """(name servers, search domains); resolv.conf(5): the last "search" or "domain" line counts."""
    try:
        with open(path, "rb") as file:
            text = file.read(RESOLV_CONF_MAX_BYTES).decode("utf-8", "replace")
    except OSError:
        return (), ()
    name_servers = []
    search: list[str] = []
    for words in map(str.split, text.splitlines()):
        if words[:1] == ["nameserver"] and len(words) > 1:
            try:
                name_servers.append(ip_address(words[1]))
            except ValueError:
                continue
        elif words[:1] in (["search"], ["domain"]):
            search = [domain for domain in words[1:] if dns_name(domain)]
    return tuple(name_servers), tuple(search)


def _message_classes() -> list[Any]:
    """pyroute2's route and address message classes.

    Unless somebody has imported pyroute2 already, an empty package of that name stands in for it
    meanwhile: its path is enough to find the two modules. Afterwards the names are forgotten, so
    that a later `import pyroute2` gets the whole package, unmixed.
    """
    spec = None if "pyroute2" in sys.modules else importlib.util.find_spec("pyroute2")
    if spec is not None:
        stand_in = types.ModuleType("pyroute2")
        stand_in.__path__ = list(spec.submodule_search_locations or [])
        sys.modules["pyroute2"] = stand_in
    try:
        return [
            getattr(importlib.import_module(f"pyroute2.netlink.rtnl.{name}"), name)
            for name in ("rtmsg", "ifaddrmsg")
        ]
    finally:
        if spec is not None:
            for name in [name for name in sys.modules if name.partition(".")[0] == "pyroute2"]:
                del sys.modules[name]


def _dump(netlink: socket.socket, request: int, sequence: int) -> Iterator[bytes]:
    """The messages, header included, that the kernel dumps for a request (rtnetlink(7))."""
    body = bytes(12)  # family 0: all; enough for struct rtmsg and struct ifaddrmsg
    netlink.send(struct.pack("=IHHII", 28, request, NLM_F_REQUEST_DUMP, sequence, 0) + body)
    while True:
        received = netlink.recv(1 << 16)
        at = 0
        while at + 16 <= len(received):
            length, kind, _, answered, _ = struct.unpack_from("=IHHII", received, at)
            if answered != sequence or length < 16:
                return
            if kind == NLMSG_DONE:
                return
            if kind == NLMSG_ERROR:
                code = -struct.unpack_from("=i", received, at + 16)[0]
                raise OSError(code, "netlink dump refused")
            yield received[at : at + length]
            at += (length + 3) & ~3


def _read_kernel() -> tuple[list[Route], list[HostAddress]]:
    rtmsg, ifaddrmsg = _message_classes()
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink:
        netlink.settimeout(NETLINK_TIMEOUT_S)
        routes: list[Route] = []
        for data in _main_unicast(_dump(netlink, RTM_GETROUTE, 1)):
            message = rtmsg(data)
            message.decode()
            routes += _routes(message)
        addresses: list[HostAddress] = []
        for data in _dump(netlink, RTM_GETADDR, 2):
            message = ifaddrmsg(data)
            message.decode()
            addresses += _host_addresses(message)
    return routes, addresses


def _main_unicast(messages: Iterable[bytes]) -> Iterator[bytes]:
    """Default routes, and the first ROUTES_MAX others of each family, judged by struct rtmsg.

    A host may have a million routes, and decoding one takes some ten microseconds.
    """
    others = {socket.AF_INET: 0, socket.AF_INET6: 0}
    for data in messages:
        family, prefix, _, _, table, _, _, kind = struct.unpack_from("8B", data, 16)
        if family not in others or table != RT_TABLE_MAIN or kind != RTN_UNICAST:
            continue
        others[family] += prefix > 0
        if prefix == 0 or others[family] <= ROUTES_MAX:
            yield data


def _routes(message: Any) -> Iterator[Route]:
    """A decoded route as Route, one per next hop, heaviest first; none for link-local targets."""
    version = 4 if message["family"] == socket.AF_INET else 6
    target = message.get_attr("RTA_DST")
    if target is not None and ip_address(target).is_link_local:
        return
    hops = message.get_attr("RTA_MULTIPATH") or [message]
    hops = sorted(hops, key=lambda hop: -hop["hops"] if hop is not message else 0)
    for hop in hops:
        interface = message.get_attr("RTA_OIF") if hop is message else hop["oif"]
        if interface is None or hop["flags"] & RTNH_F_DEAD or interface == 1:  # 1 is always lo
            continue
        gateway = hop.get_attr("RTA_GATEWAY")
        source = message.get_attr("RTA_PREFSRC")
        yield Route(
            version,
            interface,
            message["dst_len"] == 0,
            message.get_attr("RTA_PRIORITY") or 0,
            ip_address(gateway) if gateway else None,
            ip_address(source) if source else None,
        )


def _host_addresses(message: Any) -> Iterator[HostAddress]:
    """A decoded address; on a point-to-point link IFA_ADDRESS is the peer, IFA_LOCAL is ours."""
    text = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
    flags = message.get_attr("IFA_FLAGS") or message["flags"]
    if text:
        address = ip_address(text)
        yield HostAddress(message["index"], address, message["prefixlen"], message["scope"], flags)
