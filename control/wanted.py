"""wanted.py - what the operator said about the guest's network, checked: option texts in, values
out.

Theory      `read` judges every option by itself, before anything is opened or started; what only
            the host can tell (whether an interface exists, which router it has) is for hostnet.py,
            which puts a Wanted and the host's tables together.
Rules       Names and meaning are passt's. Where an option may be repeated the last one counts for
            each family; "none" forgets what was said before it.
Ownership   Pure: values in, values out.
Errors      UsageError, one line that names the option.
"""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv4Network, IPv6Address, ip_address
from typing import NamedTuple

from dataplane.slow.net import dns_name

Address = IPv4Address | IPv6Address

MTU_MIN_BYTES = 68  # RFC 791: every module must forward this much
MTU_MAX_BYTES = 65520  # the largest IPv4 packet less an Ethernet header, in whole words
SWITCHES = ("no_dhcp", "no_dhcpv6", "no_ra", "no_dhcp_dns", "no_dhcp_search")


class UsageError(Exception):
    """An option's value can never be used; the text is one line for the operator."""


class Wanted(NamedTuple):
    """The options about the guest's network. Dictionaries are by IP version; what is missing, None
    or "" was not given. `switches` are those Net has too."""

    ipv4: bool
    ipv6: bool
    interface: str
    addresses: dict[int, Address]
    prefix4: int | None
    gateways: dict[int, Address]
    map_host_loopback: dict[int, Address | None]  # None: no mapping
    map_guest_addr: dict[int, Address | None]
    dns: tuple[Address, ...] | None
    dns_forward: dict[int, Address]
    dns_host: dict[int, Address]
    search: tuple[str, ...] | None
    mac: bytes | None
    mtu: int
    hostname: str
    fqdn: str
    switches: dict[str, bool]


def read(options: object) -> Wanted:
    """What the operator wants.

    `options` has option names as attributes (dashes are underscores; a missing one counts as not
    given): strings, or lists of strings where an option may be repeated. Raises UsageError.
    """
    if _flag(options, "ipv4_only") and _flag(options, "ipv6_only"):
        raise UsageError("--ipv4-only and --ipv6-only exclude each other")
    addresses, prefix4 = _guest_addresses(options)
    gateways = _by_version(options, "gateway")
    for version in addresses.keys() & gateways.keys():
        if addresses[version] == gateways[version]:
            raise UsageError(f"--address and --gateway are both {addresses[version]}")
    no_map: dict[int, Address | None] = {4: None, 6: None}
    mac, mtu = _text(options, "mac_addr"), _text(options, "mtu")
    return Wanted(
        ipv4=not _flag(options, "ipv6_only"),
        ipv6=not _flag(options, "ipv4_only"),
        interface=_parse_interface(_text(options, "interface")),
        addresses=addresses,
        prefix4=prefix4,
        gateways=gateways,
        map_host_loopback=_mapping(
            options, "map_host_loopback", no_map if _flag(options, "no_map_gw") else {}
        ),
        map_guest_addr=_mapping(options, "map_guest_addr", {}),
        dns=_dns(options),
        dns_forward=_by_version(options, "dns_forward"),
        dns_host=_by_version(options, "dns_host", loopback=True, zone=True),
        search=_search(options),
        mac=None if mac is None else _parse_mac(mac),
        mtu=MTU_MAX_BYTES if mtu is None else _parse_mtu(mtu),
        hostname=_parse_name("hostname", _text(options, "hostname")),
        fqdn=_parse_name("fqdn", _text(options, "fqdn")),
        switches={name: _flag(options, name) for name in SWITCHES}
        | {"no_ndp": _flag(options, "no_ndp") or _flag(options, "no_icmp")},
    )


def _texts(options: object, name: str) -> list[str]:
    value = getattr(options, name, None)
    if value is None:
        return []
    return [str(item) for item in value] if isinstance(value, list | tuple) else [str(value)]


def _text(options: object, name: str) -> str | None:
    """The option's value, the last one when it was repeated."""
    texts = _texts(options, name)
    return texts[-1] if texts else None


def _flag(options: object, name: str) -> bool:
    return bool(getattr(options, name, False))


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _parse_address(name: str, text: str, loopback: bool = False, zone: bool = False) -> Address:
    """A unicast address given by option `name`; with `zone` a link-local one must have one."""
    try:
        address = ip_address(text)
    except ValueError:
        raise UsageError(f"{_option(name)}: {text!r} is not an IP address") from None
    mapped = isinstance(address, IPv6Address) and address.ipv4_mapped is not None
    zoned = isinstance(address, IPv6Address) and address.scope_id is not None
    unusable = address.is_unspecified or address.is_multicast or address == IPv4Address(2**32 - 1)
    if unusable or mapped or (zoned and not zone) or (address.is_loopback and not loopback):
        raise UsageError(f"{_option(name)}: {text} cannot be used here")
    if zone and address.version == 6 and address.is_link_local and not zoned:
        raise UsageError(f"{_option(name)}: {text} needs an interface: {text}%IFACE")
    return address


def _by_version(options: object, name: str, **allowed: bool) -> dict[int, Address]:
    """{4: address, 6: address}, the last one given for each."""
    addresses = (_parse_address(name, text, **allowed) for text in _texts(options, name))
    return {address.version: address for address in addresses}


def _mapping(
    options: object, name: str, chosen: dict[int, Address | None]
) -> dict[int, Address | None]:
    """`chosen` and what the option, which also takes "none", makes of it."""
    for text in _texts(options, name):
        if text == "none":
            chosen = {4: None, 6: None}
        else:
            address = _parse_address(name, text)
            chosen = {**chosen, address.version: address}
    return chosen


def _guest_addresses(options: object) -> tuple[dict[int, Address], int | None]:
    """--address by version, and the IPv4 prefix length from it or from --netmask."""
    chosen: dict[int, Address] = {}
    netmask = _text(options, "netmask")
    prefix4: int | None = None
    for text in _texts(options, "address"):
        base, slash, length = text.partition("/")
        address = _parse_address("address", base)
        if address.version == 6 and address.is_link_local:
            raise UsageError(f"--address: {base} cannot be used here")
        if slash:
            if not re.fullmatch("[0-9]{1,3}", length) or int(length) > address.max_prefixlen:
                raise UsageError(f"--address: {text!r} has no valid prefix length")
            if address.version == 4 and netmask is not None:
                raise UsageError("--netmask and a prefix length in --address exclude each other")
        if address.version == 4:
            prefix4 = int(length) if slash else _class_prefix(address)
        chosen[address.version] = address
    return chosen, prefix4 if netmask is None else _parse_netmask(netmask)


def _parse_netmask(text: str) -> int:
    """Prefix length from 255.255.255.0 or 24."""
    try:
        if text.isdecimal() and text.isascii():
            return IPv4Network((0, int(text))).prefixlen
        bits = f"{int(IPv4Address(text)):032b}"
    except ValueError:
        raise UsageError(f"--netmask: {text!r} is neither a mask nor a prefix length") from None
    if "01" in bits:
        raise UsageError(f"--netmask: {text} has gaps")
    return bits.count("1")


def _class_prefix(address: Address) -> int:
    """Prefix length of an IPv4 address by its historic class."""
    first = address.packed[0]
    return 8 if first < 128 else 16 if first < 192 else 24 if first < 224 else 32


def _dns(options: object) -> tuple[Address, ...] | None:
    chosen: tuple[Address, ...] | None = None
    for text in _texts(options, "dns"):
        if text == "none":
            chosen = ()
        else:
            chosen = (*(chosen or ()), _parse_address("dns", text, loopback=True))
    return chosen


def _search(options: object) -> tuple[str, ...] | None:
    """Search domains from lists separated by spaces."""
    chosen: tuple[str, ...] | None = None
    for text in _texts(options, "search"):
        if text == "none":
            chosen = ()
        elif not text.split():
            raise UsageError(f"--search: {text!r} is an empty list: say none")
        else:
            domains = (_parse_name("search", domain) for domain in text.split())
            chosen = (*(chosen or ()), *domains)
    return chosen


def _parse_interface(text: str | None) -> str:
    if text == "":
        raise UsageError("--interface: '' is not the name of an interface")
    return text or ""


def _parse_mac(text: str) -> bytes:
    if not re.fullmatch("[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}", text):
        raise UsageError(f"--mac-addr: {text!r} is not a MAC address (xx:xx:xx:xx:xx:xx)")
    mac = bytes.fromhex(text.replace(":", ""))
    if mac[0] & 1 or not any(mac):
        raise UsageError(f"--mac-addr: {text} is not the address of one interface")
    return mac


def _parse_mtu(text: str) -> int:
    known = re.fullmatch("[0-9]{1,9}", text) and int(text) <= MTU_MAX_BYTES
    if not known or 0 < int(text) < MTU_MIN_BYTES:
        limits = f"{MTU_MIN_BYTES} to {MTU_MAX_BYTES}, or 0"
        raise UsageError(f"--mtu: {text!r} is not a number from {limits}")
    return int(text)


def _parse_name(name: str, text: str | None) -> str:
    if text is not None and not (dns_name(text) and re.fullmatch("[0-9A-Za-z._-]+", text)):
        raise UsageError(f"{_option(name)}: {text!r} is not a host or domain name")
    return text or ""
