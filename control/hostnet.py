"""hostnet.py - what the host's network looks like, and so what the guest's shall look like.

Theory      The guest takes the host's place: its address, prefix, router, name servers (the rules
            and option names are those of passt). Three sources, read once: options (strings), the
            kernel's routes and addresses (rtnetlink), resolv.conf. `read_host` reads, `build_net`
            decides (it asks the kernel only for the number of a named interface), so every rule
            can be tested with made-up tables.
Template    Per family the interface of the best default route; without one, of the first route in
            the main table that is not link-local; or the one the operator named. Its address: the
            route's own source, else stable before temporary ones, global before ULA, one in the
            router's subnet before others. An option replaces its own part and nothing else.
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
Errors      HostNetError with one line: an unusable option, a kernel that does not answer.
"""

import importlib
import importlib.util
import re
import socket
import struct
import sys
import types
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any, NamedTuple

from dataplane.slow.net import Net, dns_name

Address = IPv4Address | IPv6Address

RESOLV_CONF = "/etc/resolv.conf"
RESOLV_CONF_MAX_BYTES = 65536
NAME_SERVERS_MAX = 3  # per family, as in the C library's resolver
ROUTES_MAX = 64
NETLINK_TIMEOUT_S = 2.0
MTU_MIN_BYTES = 68  # RFC 791: every module must forward this much
MTU_MAX_BYTES = 65520  # the largest IPv4 packet less an Ethernet header, in whole words

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


def read_host(options: object, resolv_conf: str = RESOLV_CONF) -> Net:
    """The guest's network, from the host's and the options.

    `options` has passt's option names as attributes (dashes are underscores; a missing one counts
    as not given): strings, or lists of strings where an option may be repeated. Takes about 10 ms.
    """
    name_servers, search = _read_resolv_conf(resolv_conf)
    try:
        routes, addresses = _read_kernel()
    except OSError as error:
        raise HostNetError(f"cannot read the host's routes and addresses: {error}") from error
    return build_net(options, Host(tuple(routes), tuple(addresses), name_servers, search))


# ---- what the operator wants -------------------------------------------------------------------


def _texts(options: object, name: str) -> list[str]:
    value = getattr(options, name, None)
    if value is None or value == "":
        return []
    return [str(item) for item in value] if isinstance(value, list | tuple) else [str(value)]


def _text(options: object, name: str) -> str:
    """The option's value, the last one when it was repeated, "" without it."""
    return (_texts(options, name) or [""])[-1]


def _flag(options: object, name: str) -> bool:
    return bool(getattr(options, name, False))


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _parse_address(name: str, text: str, loopback: bool = False, zone: bool = False) -> Address:
    """A unicast address given by option `name`."""
    try:
        address = ip_address(text)
    except ValueError:
        raise HostNetError(f"{_option(name)}: {text!r} is not an IP address") from None
    mapped = isinstance(address, IPv6Address) and address.ipv4_mapped is not None
    zoned = isinstance(address, IPv6Address) and address.scope_id is not None
    unusable = address.is_unspecified or address.is_multicast or address == IPv4Address(2**32 - 1)
    if unusable or mapped or (zoned and not zone) or (address.is_loopback and not loopback):
        raise HostNetError(f"{_option(name)}: {text} cannot be used here")
    return address


def _by_version(options: object, name: str, **allowed: bool) -> dict[int, Address]:
    """{4: address, 6: address}, the last one given for each."""
    addresses = (_parse_address(name, text, **allowed) for text in _texts(options, name))
    return {address.version: address for address in addresses}


def _mapping(options: object, name: str, defaults: dict[int, Address]) -> dict[int, Address]:
    """As _by_version for an option that also takes "none", which forgets defaults and addresses."""
    chosen = dict(defaults)
    for text in _texts(options, name):
        if text == "none":
            chosen = {}
        else:
            address = _parse_address(name, text)
            chosen[address.version] = address
    return chosen


def _guest_addresses(options: object) -> dict[int, tuple[Address, int]]:
    """{version: (address, prefix)} from --address and --netmask; prefix -1 where none was given."""
    chosen: dict[int, tuple[Address, int]] = {}
    for text in _texts(options, "address"):
        base, slash, length = text.partition("/")
        address = _parse_address("address", base)
        if address.version == 6 and address.is_link_local:
            raise HostNetError(f"--address: {base} cannot be used here")
        prefix = -1
        if slash:
            if not re.fullmatch("[0-9]{1,3}", length) or int(length) > address.max_prefixlen:
                raise HostNetError(f"--address: {text} has no valid prefix length")
            if address.version == 4 and _text(options, "netmask"):
                raise HostNetError("--netmask and a prefix length in --address exclude each other")
            prefix = int(length)
        chosen[address.version] = (address, prefix)
    return chosen


def _parse_netmask(text: str) -> int:
    """Prefix length from 255.255.255.0 or 24."""
    try:
        if text.isdecimal() and text.isascii():
            return IPv4Network((0, int(text))).prefixlen
        bits = f"{int(IPv4Address(text)):032b}"
    except ValueError:
        raise HostNetError(f"--netmask: {text!r} is neither a mask nor a prefix length") from None
    if "01" in bits:
        raise HostNetError(f"--netmask: {text} has gaps")
    return bits.count("1")


def _class_prefix(address: Address) -> int:
    """Prefix length of an IPv4 address by its historic class."""
    first = address.packed[0]
    return 8 if first < 128 else 16 if first < 192 else 24 if first < 224 else 32


def _parse_mac(text: str) -> bytes:
    if not re.fullmatch("[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}", text):
        raise HostNetError(f"--mac-addr: {text!r} is not a MAC address (xx:xx:xx:xx:xx:xx)")
    mac = bytes.fromhex(text.replace(":", ""))
    if mac[0] & 1 or not any(mac):
        raise HostNetError(f"--mac-addr: {text} is not the address of one interface")
    return mac


def _parse_mtu(text: str) -> int:
    known = re.fullmatch("[0-9]{1,9}", text) and int(text) <= MTU_MAX_BYTES
    if not known or 0 < int(text) < MTU_MIN_BYTES:
        limits = f"{MTU_MIN_BYTES} to {MTU_MAX_BYTES}, or 0"
        raise HostNetError(f"--mtu: {text!r} is not a number from {limits}")
    return int(text)


def _parse_name(name: str, text: str) -> str:
    if text and (not dns_name(text) or not re.fullmatch("[0-9A-Za-z._-]+", text)):
        raise HostNetError(f"{_option(name)}: {text!r} is not a host or domain name")
    return text


def _search(options: object, host: Host) -> tuple[str, ...]:
    """Search domains: from --search (lists separated by spaces, or none), else the host's."""
    given = _texts(options, "search")
    if not given:
        return host.search
    chosen: list[str] = []
    for text in given:
        if text == "none":
            chosen = []
        else:
            chosen += [_parse_name("search", domain) for domain in text.split()]
    return tuple(chosen)


# ---- what the guest gets -----------------------------------------------------------------------


def build_net(options: object, host: Host) -> Net:
    """The guest's network, decided from options and tables; HostNetError as in read_host."""
    ipv4 = not _flag(options, "ipv6_only")
    ipv6 = not _flag(options, "ipv4_only")
    if not ipv4 and not ipv6:
        raise HostNetError("--ipv4-only and --ipv6-only exclude each other")
    named = _named_interfaces(options)
    gateways = _by_version(options, "gateway")
    parts: dict[str, Any] = {"ipv4": ipv4, "ipv6": ipv6}
    parts |= _part4(options, _template(host, 4, named[4]), gateways.get(4)) if ipv4 else {}
    parts |= _part6(options, _template(host, 6, named[6]), gateways.get(6)) if ipv6 else {}
    enabled = [version for version, on in ((4, ipv4), (6, ipv6)) if on]
    routers = {version: parts[f"gateway{version}"] for version in enabled}
    no_map = _flag(options, "no_map_gw")
    host_loopback = _mapping(options, "map_host_loopback", {} if no_map else routers)
    guest_address = _mapping(options, "map_guest_addr", {})
    for version in enabled:
        parts[f"map_host_loopback{version}"] = host_loopback.get(version)
        parts[f"map_guest_addr{version}"] = guest_address.get(version)
    parts |= _dns(options, host, host_loopback, enabled)
    for name in ("no_dhcp", "no_dhcpv6", "no_ra", "no_dhcp_dns", "no_dhcp_search"):
        parts[name] = _flag(options, name)
    mac = _text(options, "mac_addr")
    return Net(
        our_mac=_parse_mac(mac) if mac else LOCAL.our_mac,
        mtu=_parse_mtu(_text(options, "mtu") or str(MTU_MAX_BYTES)),
        search=_search(options, host),
        hostname=_parse_name("hostname", _text(options, "hostname")),
        fqdn=_parse_name("fqdn", _text(options, "fqdn")),
        no_ndp=_flag(options, "no_ndp") or _flag(options, "no_icmp"),
        **parts,
    )


def _named_interfaces(options: object) -> dict[int, int]:
    """{version: index of the interface to copy from, 0 when the operator named none}."""
    indexes = {}
    for version in (4, 6):
        name = _text(options, "interface") or _text(options, f"outbound_if{version}")
        try:
            indexes[version] = socket.if_nametoindex(name) if name else 0
        except OSError:
            raise HostNetError(f"there is no network interface {name!r}") from None
    return indexes


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
    return Template(best.address, best.prefix, route.gateway)


def _part4(options: object, template: Template, gateway: Address | None) -> dict[str, Any]:
    given, given_prefix = _guest_addresses(options).get(4, (None, -1))
    netmask = _text(options, "netmask")
    address = given or template.address or LOCAL.addr4
    prefix = template.prefix if template.address else LOCAL.prefix4
    if given:
        prefix = given_prefix if given_prefix >= 0 else _class_prefix(given)
    if netmask:
        prefix = _parse_netmask(netmask)
    router = gateway or template.gateway or LOCAL.gateway4
    if router == address:
        raise HostNetError(f"{address} cannot be both the guest's address and its gateway")
    return {"addr4": address, "prefix4": prefix, "gateway4": router, "our_addr4": router}


def _part6(options: object, template: Template, gateway: Address | None) -> dict[str, Any]:
    """IPv6 has no prefix to choose: address autoconfiguration needs 64 bits (RFC 4862)."""
    given, _ = _guest_addresses(options).get(6, (None, -1))
    address = given or template.address
    router = gateway or template.gateway or LOCAL.gateway6
    if router == address:
        raise HostNetError(f"{address} cannot be both the guest's address and its gateway")
    link_local = router if router.is_link_local else LOCAL.link_local6
    return {"addr6": address, "gateway6": router, "link_local6": link_local}


def _dns(
    options: object, host: Host, host_loopback: dict[int, Address], enabled: list[int]
) -> dict[str, Any]:
    """dns*, dns_forward* and dns_host* for the enabled families."""
    addresses: list[Address] = []
    no_dns = False
    for text in _texts(options, "dns"):
        no_dns = text == "none"  # forgets what was said before; said last, it means no DNS
        addresses = [] if no_dns else [*addresses, _parse_address("dns", text, loopback=True)]
    forwards = _by_version(options, "dns_forward")
    hosts = _by_version(options, "dns_host", loopback=True, zone=True)
    parts: dict[str, Any] = {}
    for version in enabled:
        known = [server for server in host.name_servers if server.version == version]
        chosen = [address for address in addresses if address.version == version]
        forward = forwards.get(version)
        if not chosen and not no_dns:
            chosen, forward = _reachable(known, forward, host_loopback.get(version))
        parts[f"dns{version}"] = tuple(chosen)
        parts[f"dns_forward{version}"] = forward
        parts[f"dns_host{version}"] = hosts.get(version) or next(iter(known), None)
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
