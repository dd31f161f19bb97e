"""hops.py - a guest whose flows go to another transmit queue so many times a second.

Theory      `vhostmq guest` is a kernel behind a multiqueue TAP. Which queue a packet leaves on is
            said by a BPF program (TUNSETSTEERINGEBPF): the flow's hash plus the number of periods
            that have passed, modulo the queues. So each flow stays on one queue for a period and
            goes to the next then, all at the same moment; without a period it stays for good.
Why so      Left to itself the TAP sends a flow on the queue it was answered on, as a driver with
            aRFS does: it would never move by itself.
Limits      Root, or who may load BPF programs and take the descriptors of the guest's process.
Sources     Linux: Documentation/bpf, include/uapi/linux/bpf.h (struct __sk_buff), if_tun.h.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.lab import LabError

TUNSETSTEERINGEBPF = 0x800454E0
SYS_BPF = {"x86_64": 321, "aarch64": 280}
SYS_PIDFD_GETFD = 438
BPF_PROG_LOAD, BPF_PROG_TYPE_SOCKET_FILTER = 5, 1
KTIME_GET_NS = 5  # helper
SKB_HASH = 68  # in struct __sk_buff
MOV_X, MOV_K, DIV_K, ADD_X, LDX_W, CALL, EXIT = 0xBF, 0xB7, 0x37, 0x0F, 0x61, 0x85, 0x95

_libc = ctypes.CDLL(None, use_errno=True)


def _instruction(
    code: int, target: int = 0, source: int = 0, offset: int = 0, value: int = 0
) -> bytes:
    """struct bpf_insn."""
    return struct.pack("<BBhi", code, source << 4 | target, offset, value)


def program(period_ns: int) -> bytes:
    """Periods that have passed (none when 0) plus the packet's hash."""
    passed = [_instruction(MOV_K, 0, value=0)]
    if period_ns:
        passed = [_instruction(CALL, value=KTIME_GET_NS), _instruction(DIV_K, 0, value=period_ns)]
    return b"".join(
        [
            _instruction(MOV_X, 6, 1),  # the packet
            *passed,
            _instruction(LDX_W, 1, 6, SKB_HASH),
            _instruction(ADD_X, 0, 1),
            _instruction(EXIT),
        ]
    )


def load(code: bytes) -> int:
    """A descriptor of the program. Raises LabError."""
    instructions, license_ = ctypes.create_string_buffer(code), ctypes.create_string_buffer(b"GPL")
    attributes = struct.pack(
        "<IIQQIIQ",
        BPF_PROG_TYPE_SOCKET_FILTER,
        len(code) // 8,
        ctypes.addressof(instructions),
        ctypes.addressof(license_),
        0,
        0,
        0,
    )
    number = SYS_BPF[platform.machine()]
    fd: int = _libc.syscall(number, BPF_PROG_LOAD, attributes, len(attributes))
    if fd < 0:
        raise LabError(f"BPF program not loaded: {os.strerror(ctypes.get_errno())}")
    return fd


def _family(pid: int) -> Iterator[int]:
    """A process and all below it."""
    yield pid
    for thread in Path(f"/proc/{pid}/task").iterdir():
        for child in (thread / "children").read_text().split():
            yield from _family(int(child))


def tap_of(pid: int) -> int:
    """A copy of the guest's TAP descriptor. Raises LabError."""
    for process in _family(pid):
        for link in Path(f"/proc/{process}/fd").iterdir():
            if os.path.islink(link) and os.readlink(link) == "/dev/net/tun":
                pidfd = os.pidfd_open(process)
                fd: int = _libc.syscall(SYS_PIDFD_GETFD, pidfd, int(link.name), 0)
                os.close(pidfd)
                if fd >= 0:
                    return fd
    raise LabError(f"process {pid} has no TAP")


@contextmanager
def hopping(pid: int, hops_per_s: int) -> Iterator[None]:
    """Meanwhile the flows of the guest with this process change their queue so often."""
    tap = tap_of(pid)
    code = load(program(1_000_000_000 // hops_per_s if hops_per_s else 0))
    try:
        fcntl.ioctl(tap, TUNSETSTEERINGEBPF, struct.pack("i", code))
        yield
        fcntl.ioctl(tap, TUNSETSTEERINGEBPF, struct.pack("i", -1))
    finally:
        os.close(code)
        os.close(tap)
