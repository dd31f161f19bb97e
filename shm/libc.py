"""libc.py - system calls for compiled code; a failure is returned as -errno, as the kernel itself
does.

Theory      Each name below is the C function of that name, taken as an external symbol: kept code
            (code.py) is linked to it by name in the next process. Pointers and sizes are int64.
            errno is thread-local and must be read before anything else runs, so every wrapper reads
            it itself, in the same compiled function.
Why so      Performance of a back-end is the number of system calls; here they cost what they cost
            in C.
Twin        Under NUMBA_DISABLE_JIT=1 the same functions are reached through ctypes.
Limits      x86-64 and aarch64 calling conventions: an int argument may be passed in a 64-bit
            register.
Ownership   None. No call here blocks except epoll_wait; callers pass MSG_DONTWAIT or non-blocking
            descriptors.
"""

from __future__ import annotations

import ctypes
from typing import Any

from shm.jit import COMPILED, COMPILER, jit

if COMPILER:
    from numba import types

_library = ctypes.CDLL(None, use_errno=True)


def _external(name: str, arguments: int, wide: bool = False) -> Any:
    """The C function `name` of `arguments` 64-bit values; its result is an int, or wide: a long."""
    if COMPILER:
        result = types.int64 if wide else types.int32
        return types.ExternalFunction(name, result(*(types.int64,) * arguments))
    function = getattr(_library, name)
    function.argtypes = [ctypes.c_int64] * arguments
    function.restype = ctypes.c_int64 if wide else ctypes.c_int32
    return lambda *values: function(*(int(v) for v in values))


def _external_errno() -> Any:
    if COMPILER:
        return types.ExternalFunction("__errno_location", types.CPointer(types.int32)())
    return None


_errno_location = _external_errno()

if COMPILED:

    @jit
    def _failed(result):
        if result < 0:
            return -types.int64(_errno_location()[0])
        return types.int64(result)
else:

    def _failed(result):
        return -ctypes.get_errno() if result < 0 else result


_epoll_wait = _external("epoll_wait", 4)
_epoll_ctl = _external("epoll_ctl", 4)
_socket = _external("socket", 3)
_bind = _external("bind", 3)
_connect = _external("connect", 3)
_accept4 = _external("accept4", 4)
_shutdown = _external("shutdown", 2)
_close = _external("close", 1)
_setsockopt = _external("setsockopt", 5)
_getsockopt = _external("getsockopt", 5)
_recv = _external("recv", 4, wide=True)
_recvmsg = _external("recvmsg", 3, wide=True)
_sendmsg = _external("sendmsg", 3, wide=True)
_recvmmsg = _external("recvmmsg", 5)
_sendmmsg = _external("sendmmsg", 4)
_read = _external("read", 3, wide=True)
_write = _external("write", 3, wide=True)
_writev = _external("writev", 3, wide=True)
_ioctl = _external("ioctl", 3)
_clock_gettime = _external("clock_gettime", 2)
_mmap = _external("mmap", 6, wide=True)
_exit = _external("_exit", 1)


@jit
def epoll_wait(epfd, events, count, timeout_ms):
    """Wait; returns the number of struct epoll_event (12 bytes each on x86-64) filled in."""
    return _failed(_epoll_wait(epfd, events, count, timeout_ms))


@jit
def epoll_ctl(epfd, operation, fd, event):
    """Add (1), delete (2) or modify (3) a registration."""
    return _failed(_epoll_ctl(epfd, operation, fd, event))


@jit
def socket(family, kind, protocol):
    """A new socket."""
    return _failed(_socket(family, kind, protocol))


@jit
def bind(fd, address, size):
    """Bind to a sockaddr of `size` bytes."""
    return _failed(_bind(fd, address, size))


@jit
def connect(fd, address, size):
    """Connect to a sockaddr of `size` bytes."""
    return _failed(_connect(fd, address, size))


@jit
def accept4(fd, address, size, flags):
    """Accept; the peer's sockaddr is stored at `address`, its length at `size` (u32)."""
    return _failed(_accept4(fd, address, size, flags))


@jit
def shutdown(fd, how):
    """Shut down reading (0), writing (1) or both (2)."""
    return _failed(_shutdown(fd, how))


@jit
def close(fd):
    """Close a descriptor."""
    return _failed(_close(fd))


@jit
def setsockopt(fd, level, option, value, size):
    """Set an option from `size` bytes at `value`."""
    return _failed(_setsockopt(fd, level, option, value, size))


@jit
def getsockopt(fd, level, option, value, size):
    """Get an option into `value`; `size` is the address of a u32 holding the room there."""
    return _failed(_getsockopt(fd, level, option, value, size))


@jit
def recv(fd, buffer, size, flags):
    """Receive into one buffer (0 with MSG_TRUNC on TCP: discard)."""
    return _failed(_recv(fd, buffer, size, flags))


@jit
def recvmsg(fd, message, flags):
    """Receive by struct msghdr."""
    return _failed(_recvmsg(fd, message, flags))


@jit
def sendmsg(fd, message, flags):
    """Send by struct msghdr."""
    return _failed(_sendmsg(fd, message, flags))


@jit
def recvmmsg(fd, messages, count, flags):
    """Receive up to `count` datagrams by struct mmsghdr (64 bytes each); how many."""
    return _failed(_recvmmsg(fd, messages, count, flags, 0))


@jit
def sendmmsg(fd, messages, count, flags):
    """Send up to `count` datagrams by struct mmsghdr (64 bytes each); how many."""
    return _failed(_sendmmsg(fd, messages, count, flags))


@jit
def read(fd, buffer, size):
    """Read."""
    return _failed(_read(fd, buffer, size))


@jit
def write(fd, buffer, size):
    """Write."""
    return _failed(_write(fd, buffer, size))


@jit
def writev(fd, iov, count):
    """Write from `count` struct iovec."""
    return _failed(_writev(fd, iov, count))


@jit
def ioctl(fd, request, argument):
    """Ask the driver of a descriptor; `argument` is an address."""
    return _failed(_ioctl(fd, request, argument))


@jit
def clock_gettime(clock, timespec):
    """Store seconds and nanoseconds (two u64) at `timespec`."""
    return _failed(_clock_gettime(clock, timespec))


@jit
def mmap(address, size, protection, flags, fd, offset):
    """Map; the address."""
    return _failed(_mmap(address, size, protection, flags, fd, offset))


@jit
def exit_now(status):
    """End the process without any clean-up (signal handlers)."""
    return _failed(_exit(status))
