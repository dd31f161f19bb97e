"""sigbus.py - guest memory that is taken away under us does not end the worker.

Theory      A front-end can shrink the file behind guest memory at any time; the next access to a
            page beyond its end raises SIGBUS. The handler puts an anonymous page of zeros in that
            page's place and the access is repeated: the ring then shows an impossible index or
            address, which is counted and stops that ring.
Why so      Checking the file's size before every access would cost a system call and still be a
            race. System calls on such memory fail with EFAULT by themselves.
Limits      Pages of PAGE bytes: in a huge-page mapping the replacement fails and the process ends;
            control starts another. Not in interpreted runs: a handler must not run Python.
Ownership   The worker process; no other process sees the page.
"""

from __future__ import annotations

import ctypes
import signal

from shm import libc, mem
from shm.jit import COMPILED, handler
from shm.schema import PAGE

SI_ADDR = 16  # offset of si_addr in siginfo_t
PROT_READ_WRITE = 3
MAP_PRIVATE_FIXED_ANONYMOUS = 0x32
SA_SIGINFO, SA_NODEFER = 4, 0x40000000
STATUS = 135  # what a shell says of a process ended by SIGBUS


@handler
def replace_page(number, info, context):
    """The signal handler."""
    page = mem.u64(info + SI_ADDR) & ~(PAGE - 1)
    if libc.mmap(page, PAGE, PROT_READ_WRITE, MAP_PRIVATE_FIXED_ANONYMOUS, -1, 0) < 0:
        libc.exit_now(STATUS)


class SigAction(ctypes.Structure):
    """struct sigaction of the C library."""

    _fields_ = [
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_uint64 * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    ]


def install() -> None:
    """Survive SIGBUS from now on."""
    if COMPILED:
        action = SigAction(handler=replace_page.address, flags=SA_SIGINFO | SA_NODEFER)
        if ctypes.CDLL(None).sigaction(signal.SIGBUS, ctypes.byref(action), None) != 0:
            raise OSError("sigaction")
