"""guest_net.py - a guest's network set-up: from a TAP without a name to addresses, routes and name
servers, as a guest's own init would do it.

Theory      The interface goes up; the kernel makes a link-local address and solicits routers; a
            router's prefix becomes an address by the kernel's hand (accept_ra). Meanwhile a DHCPv4
            client asks, and a DHCPv6 client once an advertisement says that addresses are managed.
            Both are in guest_dhcp.py; here are their sockets, timers and what follows from leases.
Waiting     Until both families are set up. When one of them is, the other has GRACE_S; when nobody
            answers at all, PATIENCE_S: a back-end on a fresh machine may be compiling. After that
            the guest goes without; the kernel still takes advertisements that come later.
Limits      One interface; leases are not renewed (guest_dhcp.py).
Ownership   The calling process's network namespace.
Errors      Whatever `alarm.check()` raises; what the kernel refuses is told and left out.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from ipaddress import IPv4Address, IPv6Interface
from typing import Protocol

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from control import guest_dhcp, guest_namespace
from control.guest_dhcp import Dhcp4, Dhcp6, Lease4, Router

GRACE_S = 1.0
PATIENCE_S = 60.0
SILENCE_S = 3.0
ADDRESS_S = 2.0
RESEND_FIRST_S, RESEND_MAX_S = 0.25, 4.0
MTU_MIN, MTU_MAX = 68, 65521  # what a TAP takes
FRAME_MAX = 65550
ETH_P_IP = 0x0800
DHCP6_SERVERS = "ff02::1:2"
IFA_F_NODAD, IFA_F_TENTATIVE = 0x02, 0x40
RT_SCOPE_UNIVERSE = 0
RT_SCOPE_LINK = 253


class Alarm(Protocol):
    """Descriptors that tell of trouble: when one is readable, check() raises what happened."""

    def fds(self) -> list[int]: ...

    def check(self) -> None: ...


@dataclass
class Resend:
    """When to send a message (again): at once, then at growing intervals."""

    due_s: float = 0.0
    interval_s: float = RESEND_FIRST_S

    def is_due(self, now_s: float) -> bool:
        """Whether to send now; if so, the next time is set."""
        if now_s < self.due_s:
            return False
        self.due_s = now_s + self.interval_s
        self.interval_s = min(2 * self.interval_s, RESEND_MAX_S)
        return True


@dataclass
class Settings:
    """What the guest was given; `gateways` in the order of families."""

    addresses: list[str] = field(default_factory=list)
    gateways: list[str] = field(default_factory=list)
    dns: list[str] = field(default_factory=list)
    search: list[str] = field(default_factory=list)
    mtu: int = 0

    def resolv_conf(self) -> str:
        """The text of /etc/resolv.conf; what the C library does not read is left out."""
        lines = [f"nameserver {server}" for server in self.dns[:3]]
        if self.search:
            lines.append("search " + " ".join(dict.fromkeys(self.search)))
        return "\n".join(lines) + "\n"

    def __str__(self) -> str:
        words = [", ".join(self.addresses) or "no address"]
        if self.gateways:
            words.append("gateway " + ", ".join(self.gateways))
        if self.dns:
            words.append("DNS " + ", ".join(self.dns))
        return ", ".join([*words, f"MTU {self.mtu}"])


class GuestNet:
    """Sets up `device` of this network namespace; `tell` takes a line for the operator."""

    def __init__(self, device: str, mtu: int | None, tell: Callable[[str], None]) -> None:
        self.ip = IPRoute()
        self.device, self.tell, self.mtu = device, tell, mtu
        self.index: int = self.ip.link_lookup(ifname=device)[0]
        self.mac: bytes = bytes.fromhex(self._link("IFLA_ADDRESS").replace(":", ""))
        self.has_ipv6 = guest_namespace.has_ipv6()
        self.router: tuple[Router, str] | None = None
        self.dhcp4 = Dhcp4(self.mac, int.from_bytes(os.urandom(4), "big"))
        self.dhcp6: Dhcp6 | None = None
        self.resend4, self.resend6 = Resend(), Resend()
        self.socket4 = _packet_socket(device)
        self.socket6 = _icmp6_socket(device) if self.has_ipv6 else None
        self.socket_dhcp6: socket.socket | None = None

    def close(self) -> None:
        """Give back the sockets."""
        for sock in (self.socket4, self.socket6, self.socket_dhcp6, self.ip):
            if sock is not None:
                sock.close()

    def _link(self, name: str) -> str:
        return str(self.ip.get_links(self.index)[0].get_attr(name))

    def up(self) -> None:
        """Bring the interfaces up; the kernel starts asking for routers."""
        self.ip.link("set", index=self.ip.link_lookup(ifname="lo")[0], state="up")
        if self.has_ipv6:
            guest_namespace.set_ipv6(self.device)
        if self.mtu:
            self._set_mtu(self.mtu)
        self.ip.link("set", index=self.index, state="up")

    def configure(self, alarm: Alarm) -> Settings:
        """Ask, wait, and apply what was given."""
        start_s = time.monotonic()
        deadline_s, told = start_s + PATIENCE_S, False
        while True:
            now_s = time.monotonic()
            self._send(now_s)
            if self._complete() or now_s >= deadline_s:
                break
            self._receive(min(deadline_s, start_s + SILENCE_S if not told else deadline_s), alarm)
            if self.dhcp4.lease or self.router:
                deadline_s = min(deadline_s, time.monotonic() + GRACE_S)
            elif not told and time.monotonic() >= start_s + SILENCE_S:
                self.tell("no answer from DHCP or a router yet, still waiting ...")
                told = True
        return self._apply()

    def _complete(self) -> bool:
        """Whether nothing more is to be expected."""
        six = not self.has_ipv6 or (
            self.router is not None and (self.dhcp6 is None or self.dhcp6.lease is not None)
        )
        return six and self.dhcp4.lease is not None

    # Asking

    def _send(self, now_s: float) -> None:
        try:
            if self.dhcp4.lease is None and self.resend4.is_due(now_s):
                self.socket4.send(self.dhcp4.frame())
            if self.dhcp6 is None or self.dhcp6.lease is not None or self.socket_dhcp6 is None:
                return
            if self.resend6.is_due(now_s):
                to = (DHCP6_SERVERS, 547, 0, self.index)
                self.socket_dhcp6.sendto(self.dhcp6.message(), to)
        except OSError:
            pass  # sent again when it is due again

    def _receive(self, until_s: float, alarm: Alarm) -> None:
        """Wait until something arrives, is due, or `until_s`; take in what arrived."""
        sockets = [s for s in (self.socket4, self.socket6, self.socket_dhcp6) if s is not None]
        due_s = [until_s, self.resend4.due_s if self.dhcp4.lease is None else until_s]
        if self.dhcp6 is not None and self.dhcp6.lease is None:
            due_s.append(self.resend6.due_s)
        poll = select.poll()
        for fd in [*alarm.fds(), *(sock.fileno() for sock in sockets)]:
            poll.register(fd, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(max(0.0, min(due_s) - time.monotonic()) * 1000)}
        if ready.intersection(alarm.fds()):
            alarm.check()
        for sock in sockets:
            if sock.fileno() in ready:
                data, sender = sock.recvfrom(FRAME_MAX)
                self._take(sock, data, sender)

    def _take(self, sock: socket.socket, data: bytes, sender: tuple) -> None:
        if sock is self.socket4:
            if self.dhcp4.receive(data):
                self.resend4 = Resend()
        elif sock is self.socket_dhcp6:
            if self.dhcp6 is not None and self.dhcp6.receive(data):
                self.resend6 = Resend()
        elif (router := guest_dhcp.router(data)) is not None:
            self.router = router, sender[0].partition("%")[0]
            if router.managed and self.dhcp6 is None:
                self.dhcp6 = Dhcp6(self.mac, int.from_bytes(os.urandom(3), "big"))
                self.socket_dhcp6 = _dhcp6_socket(self.device)

    # Applying

    def _apply(self) -> Settings:
        settings = Settings()
        lease, router = self.dhcp4.lease, self.router[0] if self.router else None
        mtu = (lease.mtu if lease else 0) or (router.mtu if router else 0)
        if mtu and not self.mtu:
            self._set_mtu(min(max(mtu, MTU_MIN), MTU_MAX))
        if lease is not None:
            self._apply_lease4(lease, settings)
        if self.router is not None:
            self._apply_router(*self.router, settings)
        settings.mtu = int(self._link("IFLA_MTU"))
        return settings

    def _set_mtu(self, mtu: int) -> None:
        self._try("MTU", lambda: self.ip.link("set", index=self.index, mtu=mtu))

    def _try(self, what: str, change: Callable[[], object]) -> None:
        """Make a change the kernel may refuse."""
        try:
            change()
        except NetlinkError as error:
            self.tell(f"the kernel refused the {what} that was offered: {error.args[-1]}")

    def _apply_lease4(self, lease: Lease4, settings: Settings) -> None:
        ip, prefix = str(lease.address.ip), lease.address.network.prefixlen
        self._try(
            f"address {lease.address}",
            partial(self._add, ip, prefix),
        )
        for target, gateway in lease.routes:
            self._try(f"route to {target}", partial(self._route, str(target), gateway))
            if target.prefixlen == 0:
                settings.gateways.append(str(gateway))
        settings.addresses.append(str(lease.address))
        settings.dns += map(str, lease.dns)
        settings.search += lease.search

    def _add(self, address: str, prefix: int) -> None:
        """Add an address; there is nobody on this link to ask whether it is taken."""
        self.ip.addr("add", index=self.index, address=address, prefixlen=prefix, flags=IFA_F_NODAD)

    def _route(self, target: str, gateway: IPv4Address) -> None:
        if int(gateway):
            self.ip.route("add", dst=target, gateway=str(gateway), oif=self.index)
        else:
            self.ip.route("add", dst=target, oif=self.index, scope=RT_SCOPE_LINK)

    def _apply_router(self, router: Router, sender: str, settings: Settings) -> None:
        lease = self.dhcp6.lease if self.dhcp6 is not None else None
        if lease is not None:
            address = str(lease.address)
            self._try(
                f"address {address}",
                partial(self._add, address, 128),
            )
            settings.dns += map(str, lease.dns)
            settings.search += lease.search
        settings.dns += [str(server) for server in router.dns if str(server) not in settings.dns]
        settings.search += router.search
        settings.addresses += self._addresses6(wait=router.prefix or lease is not None)
        if router.default:
            settings.gateways.append(sender)

    def _addresses6(self, wait: bool) -> list[str]:
        """The global addresses that are ready for use; `wait` for the first one."""
        deadline_s = time.monotonic() + ADDRESS_S
        while True:
            found = [
                str(IPv6Interface(f"{entry.get_attr('IFA_ADDRESS')}/{entry['prefixlen']}"))
                for entry in self.ip.get_addr(
                    family=socket.AF_INET6, index=self.index, scope=RT_SCOPE_UNIVERSE
                )
                if not entry["flags"] & IFA_F_TENTATIVE
            ]
            if found or not wait or time.monotonic() > deadline_s:
                return found
            time.sleep(0.02)


def _packet_socket(device: str) -> socket.socket:
    """Ethernet frames with IPv4 inside, in and out."""
    made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_IP))
    made.bind((device, ETH_P_IP))
    return made


def _icmp6_socket(device: str) -> socket.socket:
    """A copy of the ICMPv6 messages the kernel accepts."""
    made = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
    return made


def _dhcp6_socket(device: str) -> socket.socket:
    made = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
    made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, socket.if_nametoindex(device))
    made.bind(("::", 546))
    return made
