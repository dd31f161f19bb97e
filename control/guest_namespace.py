"""guest_namespace.py - the place a guest without a VM lives in: a network and a mount namespace
with a TAP, made without privileges where the host allows user namespaces.

Theory      The calling process itself moves in; its children follow. Root gets a network and a
            mount namespace. Anybody else (or root without CAP_SYS_ADMIN, in a container) also gets
            a user namespace in which they are root, and there all of this is allowed.
TAP         One queue (descriptor) per queue pair. Each frame begins with the 12-byte virtio-net
            header, and the kernel leaves checksums and segmentation to whoever reads it exactly as
            far as the back-end offered to do them.
resolv.conf A file of its own is bound over /etc/resolv.conf in the mount namespace.
Limits      Linux; the process must have one thread (unshare with CLONE_NEWUSER). Gone with the last
            process inside.
Errors      NamespaceError with one line that says how to fix it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import tempfile

from control.vhost_user import VirtioFeature
from dataplane.guest_memory import HEADER_BYTES

DEVICE = "eth0"
TUN = "/dev/net/tun"

CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWNET = 0x20000, 0x10000000, 0x40000000
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000

TUNSETIFF, TUNSETOFFLOAD, TUNSETVNETHDRSZ = 0x400454CA, 0x400454D0, 0x400454D8
IFF_TAP, IFF_MULTI_QUEUE, IFF_NO_PI, IFF_VNET_HDR = 0x2, 0x100, 0x1000, 0x4000
TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN = 1, 2, 4, 8
TUN_F_USO4, TUN_F_USO6 = 0x20, 0x40

_libc = ctypes.CDLL(None, use_errno=True)


class NamespaceError(Exception):
    """The namespace or its TAP cannot be made; the text is one line for the operator."""


def enter() -> None:
    """Move this process into namespaces of its own."""
    uid, gid = os.geteuid(), os.getegid()
    code = _unshare(CLONE_NEWNET | CLONE_NEWNS) if uid == 0 else errno.EPERM
    if code == errno.EPERM:
        code = _unshare(CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWNS)
        if code == 0:
            _write("/proc/self/setgroups", "deny")
            _write("/proc/self/uid_map", f"0 {uid} 1")
            _write("/proc/self/gid_map", f"0 {gid} 1")
    if code:
        raise NamespaceError(
            f"cannot make a network namespace: {os.strerror(code)}; run as root or allow user "
            "namespaces (sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone=1, "
            "kernel.apparmor_restrict_unprivileged_userns=0)"
        )
    _mount("none", "/", MS_REC | MS_PRIVATE)
    _allow_ping()


def _unshare(flags: int) -> int:
    """0, or the error number."""
    return ctypes.get_errno() if _libc.unshare(flags) else 0


def _mount(source: str, target: str, flags: int) -> None:
    if _libc.mount(source.encode(), target.encode(), None, flags, None):
        raise NamespaceError(f"cannot mount {target}: {os.strerror(ctypes.get_errno())}")


def _write(path: str, value: str) -> None:
    try:
        with open(path, "w") as file:
            file.write(value)
    except OSError as error:
        raise NamespaceError(f"cannot write {path}: {error.strerror}") from error


def _set_sysctl(name: str, value: str) -> bool:
    """Whether the kernel took it. What is set here is convenience: a container may forbid it."""
    try:
        _write(f"/proc/sys/net/{name}", value)
    except NamespaceError:
        return False
    return True


def _allow_ping() -> None:
    """For everybody who can be in here: in a user namespace, only group 0 has a meaning."""
    if not _set_sysctl("ipv4/ping_group_range", "0 2147483647"):
        _set_sysctl("ipv4/ping_group_range", "0 0")


def has_ipv6() -> bool:
    """Whether this kernel speaks IPv6."""
    return os.path.isdir("/proc/sys/net/ipv6/conf")


def set_ipv6(device: str) -> None:
    """How the kernel configures `device` from router advertisements: at once, since nobody else on
    this link could have the address (no duplicate detection), and asking every second at first."""
    for name, value in (
        ("accept_dad", 0),
        ("accept_ra", 2),  # also when the command inside turns forwarding on
        ("router_solicitation_interval", 1),
    ):
        _set_sysctl(f"ipv6/conf/{device}/{name}", str(value))


def open_taps(queues: int, features: int) -> list[int]:
    """One descriptor per queue of the namespace's TAP, non-blocking, with the offloads that the
    negotiated `features` allow."""
    taps: list[int] = []
    try:
        for _ in range(queues):
            taps.append(os.open(TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
            flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_MULTI_QUEUE
            fcntl.ioctl(taps[-1], TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), flags))
        fcntl.ioctl(taps[0], TUNSETVNETHDRSZ, struct.pack("i", HEADER_BYTES))
        fcntl.ioctl(taps[0], TUNSETOFFLOAD, tap_offloads(features))
    except OSError as error:
        for fd in taps:
            os.close(fd)
        raise NamespaceError(f"cannot make a TAP: {_tap_problem(error)}") from error
    return taps


def _tap_problem(error: OSError) -> str:
    hints = {
        errno.ENOENT: "load the module (modprobe tun) or give the container the device",
        errno.ENODEV: "load the module (modprobe tun)",
        errno.EACCES: "give this user access to it (its usual mode is 0666)",
        errno.EPERM: "the host lets user namespaces do nothing (sysctl "
        "kernel.apparmor_restrict_unprivileged_userns=0, or run as root)",
    }
    hint = hints.get(error.errno or 0)
    return f"{TUN}: {error.strerror}" + (f"; {hint}" if hint else "")


def tap_offloads(features: int) -> int:
    """What the kernel may leave to the device: TUNSETOFFLOAD's bits from virtio's."""
    if not features & VirtioFeature.CSUM:
        return 0
    offloads = TUN_F_CSUM
    for feature, bit in (
        (VirtioFeature.HOST_TSO4, TUN_F_TSO4),
        (VirtioFeature.HOST_TSO6, TUN_F_TSO6),
        (VirtioFeature.HOST_ECN, TUN_F_TSO_ECN),
        (VirtioFeature.HOST_USO, TUN_F_USO4 | TUN_F_USO6),
    ):
        if features & feature:
            offloads |= bit
    return offloads


def bind_resolv_conf(text: str) -> None:
    """Show `text` as /etc/resolv.conf to this namespace. The file has no name elsewhere."""
    with tempfile.NamedTemporaryFile("w", prefix="vhostmq-resolv-") as file:
        file.write(text)
        file.flush()
        os.fchmod(file.fileno(), 0o644)
        _mount(file.name, "/etc/resolv.conf", MS_BIND)
