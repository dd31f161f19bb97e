"""segment.py - the named shared-memory segment of one instance.

Theory      `run` creates the segment under a name with the instance's process id in it; workers
            and operator's tools open it by name. The name goes away with `unlink`, the memory with
            its last user.
Why so      posix_ipc gives exactly shm_open and shm_unlink. multiprocessing.shared_memory adds a
            resource tracker that unlinks a segment when any process that merely opened it ends; a
            data plane that outlives its control process cannot live with that.
Limits      Pages are allocated when first touched: a segment of 30 MB costs what is used of it.
Ownership   The creator unlinks. Nobody else does.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import pathlib

import posix_ipc

from shm import schema

PREFIX = "/vhostmq-"
FOLDER = pathlib.Path("/dev/shm")
PROC = pathlib.Path("/proc")


def remove_stale() -> None:
    """Remove this user's segments whose creator ended without a chance to (the name holds its
    process id)."""
    for path in FOLDER.glob(PREFIX[1:] + "*"):
        creator = path.name.split("-")[1]
        with contextlib.suppress(OSError):
            if (
                creator.isdigit()
                and path.stat().st_uid == os.getuid()
                and not PROC.joinpath(creator).exists()
            ):
                path.unlink()


class SegmentError(Exception):
    """The segment cannot be created or is not one of ours."""


def running() -> dict[int, str]:
    """The names of this user's segments by the process id of their creator, where that runs."""
    found = {}
    for path in FOLDER.glob(PREFIX[1:] + "*"):
        creator = path.name.split("-")[1]
        with contextlib.suppress(OSError):
            if path.stat().st_uid == os.getuid() and PROC.joinpath(creator).exists():
                found[int(creator)] = "/" + path.name
    return found


def workers_of(name: str) -> int:
    """How many workers a segment was made for. Raises SegmentError."""
    try:
        with (FOLDER / name[1:]).open("rb") as file:
            head = file.read(schema.INSTANCE.size)
    except OSError as error:
        raise SegmentError(f"shared memory {name}: {error.strerror}") from error
    if len(head) < schema.INSTANCE.size or schema.INSTANCE.get(head, 0, "magic") != schema.MAGIC:
        raise SegmentError(f"shared memory {name} was made by another version")
    return schema.INSTANCE.get(head, 0, "workers")


class Segment:
    """A mapped instance segment. `address` is for compiled code, `buffer` for Python."""

    def __init__(self, name: str, workers: int, *, create: bool = False) -> None:
        """Create or open segment `name` for `workers` workers; raises SegmentError."""
        self.name = name
        self.offsets = schema.offsets(workers)
        flags = posix_ipc.O_CREX if create else 0
        size = self.offsets.size if create else 0
        try:
            memory = posix_ipc.SharedMemory(name, flags=flags, mode=0o600, size=size)
        except (posix_ipc.Error, OSError) as error:
            raise SegmentError(f"shared memory {name}: {error}") from error
        try:
            if os.fstat(memory.fd).st_size < self.offsets.size:
                raise SegmentError(f"shared memory {name} is too small")
            self.buffer = mmap.mmap(memory.fd, self.offsets.size)
        finally:
            os.close(memory.fd)
        base = self.offsets.instance
        if create:
            schema.INSTANCE.set(self.buffer, base, "magic", schema.MAGIC)
            schema.INSTANCE.set(self.buffer, base, "workers", workers)
        elif schema.INSTANCE.get(self.buffer, base, "magic") != schema.MAGIC:
            raise SegmentError(f"shared memory {name} was made by another version")
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.buffer))

    def close(self) -> None:
        """Unmap. Compiled code must not use `address` afterwards."""
        self.buffer.close()

    def unlink(self) -> None:
        """Remove the name; idempotent."""
        try:
            posix_ipc.unlink_shared_memory(self.name)
        except posix_ipc.ExistentialError:
            pass
