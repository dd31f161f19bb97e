"""effects.py - what a vhost-user session asks of the server that carries it.

Theory      session.py decides, the server does. `Session.receive` returns a list of these; the
            server executes them in order and reports what went wrong (`Session.effect_failed`) or
            what only a worker knows (`Session.ring_stopped`). They are plain values: a test
            compares them.
Logging     Nack, RingRefused and Close carry a reason that the server logs, once, as it executes
            them; Log is for everything else.
Limits      A list has at most a few effects for each ring and a handful for the message.
Ownership   No effect owns a descriptor. Descriptors are found in `session.device` and are the
            session's; a worker is sent duplicates.
"""

from __future__ import annotations

from typing import Literal

from control import vhost_user as vu
from shm.record import Record


class MemoryChanged(Record):
    """Every worker pauses, maps `device.memory` instead of what it has, and finds its rings again,
    before the next effect: after the following ack the guest may use the new memory, and the old
    may be gone."""


class RingChanged(Record):
    """The ring runs, with `device.rings[index]` and `device.features`, new or different: give it
    to its worker. Void if the ring is not `started` any more because an effect before this one
    failed."""

    index: int


class RingStop(Record):
    """The worker lets go of the ring: nothing is read, written or signalled any more. Then call
    `ring_stopped` with the base it got to. A worker that never got the ring has nothing to do and
    no base to tell."""

    index: int


class RingRefused(Record):
    """The ring has all it needs and still cannot run: log it and signal the ring's `err_fd`."""

    index: int
    reason: str


class Reply(Record):
    """Send these bytes."""

    data: bytes


class ReplyVringBase(Record):
    """Send `session.vring_base_reply(index)`: it depends on what a RingStop before it brought."""

    index: int


class Ack(Record):
    """Send `data(failed)`, failed: an effect of the same list did not succeed."""

    request: int
    ok: bool = True

    def data(self, failed: bool) -> bytes:
        return vu.encode_ack(self.request, self.ok and not failed)


class Nack(Record):
    """The message was refused and changed nothing: log the reason, send the data."""

    request: int
    reason: str
    data: bytes


class Announce(Record):
    """The guest has moved and would tell the network its MAC address (six bytes). User mode has
    nobody to tell."""

    mac: bytes


class MtuChanged(Record):
    """The guest's device has this MTU. What DHCP tells the guest is the operator's to say."""

    mtu: int


class BackendChannel(Record):
    """The socket for our own requests is now this one (the session's, do not close it) or none."""

    fd: int | None


class Log(Record):
    """One line for the operator."""

    level: Literal["info", "warning", "error"]
    text: str


class Close(Record):
    """Log the reason and close the connection; the session is over. Serve the next one."""

    reason: str


Effect = (
    MemoryChanged
    | RingChanged
    | RingStop
    | RingRefused
    | Reply
    | ReplyVringBase
    | Ack
    | Nack
    | Announce
    | MtuChanged
    | BackendChannel
    | Log
    | Close
)
