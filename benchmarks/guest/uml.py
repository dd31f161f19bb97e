"""uml.py - start User-Mode Linux, also on a host with more registers than it has room for.

Theory      `python uml.py COMMAND ...` becomes that command. UML reads the extended registers of
            its guest's programs by ptrace (NT_X86_XSTATE) into a buffer of 2696 bytes; Linux takes
            them back only whole. With AMX they have 11 KiB: the first program of the guest is its
            last (UML of Linux 6.1: "fatal_sigsegv" out of put_fp_registers). There a seccomp filter
            says, as an old host would, that there are none, and UML uses FXSAVE. So what a page
            fault interrupts loses its AVX registers: glibc is told not to use any.
Limits      Guest programs of our own have to be compiled without -mavx.
"""

from __future__ import annotations

import errno
import os
import sys

# The kernel gives what it does not know to init, and so to every program of the guest.
WITHOUT_AVX = (
    "GLIBC_TUNABLES=glibc.cpu.hwcaps="
    "-AVX512F,-AVX512VL,-AVX512BW,-AVX2,-AVX,-AVX_Fast_Unaligned_Load,-ERMS,-FSRM"
)
PTRACE_GETREGSET, NT_X86_XSTATE = 0x4204, 0x202


def too_many_registers() -> bool:
    """Whether this processor has AMX."""
    with open("/proc/cpuinfo") as info:
        return any(line.startswith("flags") and " amx_tile" in line for line in info)


def hide_extended_registers() -> None:
    """For this process and what it becomes and starts."""
    import pyseccomp as seccomp  # needs libseccomp, which other machines may not have

    without = seccomp.SyscallFilter(seccomp.ALLOW)
    asked = seccomp.Arg(0, seccomp.EQ, PTRACE_GETREGSET)
    which = seccomp.Arg(2, seccomp.EQ, NT_X86_XSTATE)
    without.add_rule(seccomp.ERRNO(errno.ENODEV), "ptrace", asked, which)
    without.load()


if __name__ == "__main__":
    command = sys.argv[1:]
    if too_many_registers():
        hide_extended_registers()
        command.append(WITHOUT_AVX)
    os.execvp(command[0], command)
