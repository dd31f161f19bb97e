"""forward.py - which host ports are forwarded to the guest: the operator's words as a list.

Theory      The grammar is that of passt's -t and -u. A specification is `none`, or entries
            separated by commas, before which one prefix says where to listen:

                [ADDR|*][%IFACE]/       default: every address, IPv4 and IPv6
                A[-B][:C[-D]]           host ports A to B are guest ports C to D (default: the same)
                A[-B]:TOADDR[/C[-D]]    at this address of the guest
                ~A[-B]                  not these
                all[:TOADDR]            every port that is not ephemeral; so do exclusions alone

            `parse` reads all specifications for one protocol at once and returns one Port for each
            port: whoever binds them needs no rules.
Weak        A port that came by `all` is weak: if somebody else has it or it is not permitted,
            whoever binds leaves it out. A port that is named wins over `all`, wherever it stands.
Overlaps    Two ports that the kernel would not give to two sockets are refused here, where the
            message can name both: one number, and addresses and interfaces that meet.
Differs     passt ignores `all` beside named ports; here it adds to them, as passt's manual says.
            passt listens on multicast addresses; here each flow needs an address to answer from.
Limits      65535 ports for each address and interface. `22:fe80::1/23` reads as an address to
            listen on, as with passt: `22:[fe80::1]/23` does not.
Ownership   Pure: values in, values out.
Errors      ForwardError, one line that quotes the specification.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from operator import attrgetter
from typing import NamedTuple

Address = IPv4Address | IPv6Address

PORT_MAX = 65535
ANY4, ANY6 = IPv4Address("0.0.0.0"), IPv6Address("::")
BROADCAST4 = IPv4Address("255.255.255.255")

_RANGE = re.compile("([0-9]{1,5})(?:-([0-9]{1,5}))?")
_INTERFACE = re.compile(r"(?!\.{1,2}$)[^\s/:%]{1,15}")  # as the kernel's dev_valid_name()


class ForwardError(Exception):
    """A specification cannot be used; the text is one line for the operator."""


class Port(NamedTuple):
    """One forwarded port. `address` None: every address of both families, with one socket; ANY4,
    ANY6: every address of one family. `guest_address` None: whatever address the guest has."""

    protocol: str
    address: Address | None
    interface: str | None
    port: int
    guest_port: int
    guest_address: Address | None = None
    weak: bool = False

    def __str__(self) -> str:
        """The specification of just this port; it does not show `weak`."""
        place = "" if self.address is None else _text(self.address)
        place += "" if self.interface is None else f"%{self.interface}"
        target = "" if self.guest_port == self.port else str(self.guest_port)
        if self.guest_address is not None:
            target = _text(self.guest_address) + (target and f"/{target}")
        return (place and f"{place}/") + str(self.port) + (target and f":{target}")

    def overlaps(self, other: Port) -> bool:
        """Whether the kernel would not give both to different sockets."""
        if self.port != other.port or len({self.interface, other.interface} - {None}) > 1:
            return False
        if self.address is None or other.address is None or self.address == other.address:
            return True
        same_family = self.address.version == other.address.version
        return same_family and (self.address.is_unspecified or other.address.is_unspecified)


class _Place(NamedTuple):
    """Where a specification listens."""

    protocol: str
    address: Address | None
    interface: str | None


def parse(
    protocol: str,
    specs: Iterable[str],
    ephemeral: range,
    *,
    ipv4: bool = True,
    ipv6: bool = True,
) -> list[Port]:
    """The ports of all specifications given for `protocol` ("tcp" or "udp"), named ones first.

    `ephemeral`: the ports the host gives to its own connections (net.ipv4.ip_local_port_range),
    which `all` leaves out. `ipv4`, `ipv6`: the families in use, at least one. Raises ForwardError.
    """
    ports: list[Port] = []
    for spec in specs:
        try:
            if spec != "none":
                place, entries = _listen_on(protocol, spec, ipv4, ipv6)
                ports += _expand(place, entries, ephemeral)
            elif ports:  # passt: "none" may be a default that what follows replaces
                raise ForwardError("ports were given before it")
        except ForwardError as error:
            raise ForwardError(f"--{protocol}-ports {spec!r}: {error}") from None
    return list(_without_overlaps(sorted(ports, key=attrgetter("weak"))))


def _without_overlaps(ports: list[Port]) -> Iterator[Port]:
    """`ports` without weak ones that overlap named ones, which come first."""
    taken: dict[int, list[Port]] = {}
    for port in ports:
        others = taken.setdefault(port.port, [])
        clash = next(filter(port.overlaps, others), None)
        if clash is None:
            others.append(port)
            yield port
        elif clash.weak == port.weak:
            option = f"--{port.protocol}-ports"
            raise ForwardError(f"{option}: {str(clash)!r} and {str(port)!r} overlap")


def _listen_on(protocol: str, spec: str, ipv4: bool, ipv6: bool) -> tuple[_Place, str]:
    """Split the prefix off: where to listen, and the entries."""
    prefix, slash, entries = spec.partition("/")
    host, percent, interface = prefix.partition("%")
    address = _address(host)
    if address is None and host not in ("", "*"):
        if slash and ":" not in prefix:
            raise ForwardError(f"{host!r} is not an IP address")
        slash = ""  # if there is one, it belongs to the guest's address
    if not slash:
        address, percent, entries = None, "", spec
    if percent and not _INTERFACE.fullmatch(interface):
        raise ForwardError(f"{interface!r} is not the name of an interface")
    if address is None and not (ipv4 and ipv6):
        address = ANY4 if ipv4 else ANY6
    if address is not None:
        if not (ipv4 if address.version == 4 else ipv6):
            raise ForwardError(f"IPv{address.version} is switched off")
        if address.version == 6 and address.is_link_local and not percent:
            raise ForwardError(f"{address} needs an interface: {address}%IFACE/...")
    return _Place(protocol, address, interface if percent else None), entries


def _expand(place: _Place, entries: str, ephemeral: range) -> list[Port]:
    """The ports of one specification: those named, then weak ones."""
    excluded: set[int] = set()
    included: list[tuple[range, range, Address | None]] = []
    all_to: list[Address | None] = []
    for entry in entries.split(","):
        source, colon, target = entry.partition(":")
        guest, guest_ports = _target(target, place.address) if colon else (None, None)
        if source == "all" and guest_ports is None:
            all_to.append(guest)
        elif source.startswith("~") and not colon:
            excluded.update(_range(source[1:]))
        else:
            ports = _range(source)
            if guest_ports is not None and len(ports) != len(guest_ports):
                raise ForwardError(f"{entry!r} maps {len(ports)} ports to {len(guest_ports)}")
            included.append((ports, guest_ports or ports, guest))
    if not included and not all_to:
        all_to.append(None)
    result = [
        Port(*place, port, guest_port, guest)
        for ports, guest_ports, guest in included
        for port, guest_port in zip(ports, guest_ports, strict=True)
        if port not in excluded
    ]
    excluded.update(ephemeral)
    result += [
        Port(*place, port, port, guest, True)
        for guest in all_to
        for port in range(1, PORT_MAX + 1)
        if port not in excluded
    ]
    if not result:
        raise ForwardError("every port is excluded")
    return result


def _target(text: str, listen: Address | None) -> tuple[Address | None, range | None]:
    """What stands behind a colon: C[-D], TOADDR or TOADDR/C[-D]."""
    if _RANGE.fullmatch(text):
        return None, _range(text)
    host, slash, ports = text.partition("/")
    guest = _address(host)
    if guest is None:
        raise ForwardError(f"{host!r} is neither a port, a range nor an IP address")
    if guest.is_unspecified or guest.is_loopback:
        raise ForwardError(f"{guest} is not an address of a guest")
    if listen is None:
        place = ANY4 if guest.version == 4 else ANY6
        raise ForwardError(f"{guest} needs a family to listen on: {_text(place)}/...")
    if guest.version != listen.version:
        raise ForwardError(f"{listen} and {guest} are of different families")
    return guest, _range(ports) if slash else None


def _range(text: str) -> range:
    """Ports A or A-B."""
    match = _RANGE.fullmatch(text)
    if match is None:
        raise ForwardError(f"{text!r} is neither a port, a range nor 'all'")
    first, last = int(match[1]), int(match[2] or match[1])
    if not 1 <= first <= last <= PORT_MAX:
        raise ForwardError(f"{text!r} is not within 1 to {PORT_MAX}")
    return range(first, last + 1)


def _address(text: str) -> Address | None:
    """A unicast address, IPv6 also in brackets, ::ffff:a.b.c.d as IPv4; None: not an address."""
    bracketed = text.startswith("[") and text.endswith("]")
    try:
        address = IPv6Address(text[1:-1]) if bracketed else ip_address(text)
    except ValueError:
        return None
    if isinstance(address, IPv6Address):
        if address.scope_id is not None:  # %IFACE stands outside of the brackets
            return None
        address = address.ipv4_mapped or address
    if address.is_multicast or address == BROADCAST4:
        raise ForwardError(f"{address} is not a unicast address")
    return address


def _text(address: Address) -> str:
    return f"[{address}]" if address.version == 6 else str(address)
