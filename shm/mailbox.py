"""mailbox.py - commands with descriptors between the control process and one worker.

Theory      A SOCK_SEQPACKET socket pair: one packet is one pickled message plus its descriptors
            (SCM_RIGHTS). Control asks and waits for one answer; a worker may also report on its own
            (`Report` messages, which `ask` sets aside for the control loop).
Why so      Packets keep message borders and descriptors together; nothing can be half read.
Limits      MESSAGE_MAX bytes and FDS_MAX descriptors a message; an answer within `timeout_s`.
Ownership   A received descriptor belongs to the receiver; a sent one stays open with the sender.
Trust       Both ends are this program run by one user; pickle never meets bytes from a guest or a
            VMM.
"""

from __future__ import annotations

import os
import pickle
import socket
from typing import Any

MESSAGE_MAX = 1 << 17
AWAKE = "awake"  # the report of a worker that has something to do after a rest
DIED = "died"  # the report of a worker's keeper: no answer will come
FDS_MAX = 128


def encode(message: Any) -> bytes:
    """Any Python value as bytes, for another process of this program."""
    return pickle.dumps(message)


def decode(data: bytes) -> Any:
    """The value of `encode`."""
    return pickle.loads(data)


class MailboxError(Exception):
    """The other side is gone or does not answer."""


class PeerDied(MailboxError):
    """The process at the other side has died; what it left says so (Report "died")."""

    def __init__(self, status: int) -> None:
        super().__init__("mailbox: the other side has died")
        self.status = status


class Mailbox:
    """One end of a mailbox."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.reports: list[Any] = []

    @classmethod
    def pair(cls) -> tuple[Mailbox, Mailbox]:
        """Two connected ends."""
        left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (left, right):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MESSAGE_MAX)
        return cls(left), cls(right)

    def fileno(self) -> int:
        """For selectors."""
        return self.socket.fileno()

    def send(self, message: Any, fds: tuple[int, ...] = ()) -> None:
        """Send one message; raises MailboxError when the other side is gone."""
        data = encode(message)
        assert len(data) <= MESSAGE_MAX and len(fds) <= FDS_MAX, "mailbox: message too large"
        try:
            socket.send_fds(self.socket, [data], list(fds))
        except OSError as error:
            raise MailboxError(f"mailbox: {error}") from error

    def receive(self, timeout_s: float | None = None) -> tuple[Any, list[int]]:
        """One message and its descriptors; raises MailboxError at end of file or after
        `timeout_s`."""
        self.socket.settimeout(timeout_s)
        try:
            data, fds, _, _ = socket.recv_fds(self.socket, MESSAGE_MAX, FDS_MAX)
        except ConnectionError:  # it closed with something of ours unread
            data = b""
        except OSError as error:
            raise MailboxError(f"mailbox: {error}") from error
        if not data:
            raise MailboxError("mailbox: the other side is gone")
        return decode(data), fds

    def close(self) -> None:
        """Close this end."""
        self.socket.close()


class Report:
    """A message a worker sends unasked."""

    def __init__(self, kind: str, **values: Any) -> None:
        self.kind = kind
        self.values = values


def ask(box: Mailbox, message: Any, fds: tuple[int, ...] = (), timeout_s: float = 5.0) -> Any:
    """Send and wait for the answer; reports that come first are kept in `box.reports`. Raises
    MailboxError, PeerDied."""
    box.send(message, fds)
    return next_answer(box, timeout_s)


def next_answer(box: Mailbox, timeout_s: float) -> Any:
    """The next answer of those that are due, as `ask` has it."""
    while True:
        answer, _ = box.receive(timeout_s)
        if not isinstance(answer, Report):
            return answer
        if answer.kind == DIED:
            raise PeerDied(answer.values["status"])
        box.reports.append(answer)


def get_in_step(box: Mailbox, message: Any, timeout_s: float) -> Any:
    """As `ask`, after somebody else has asked and not taken the answer: the one that is wanted says
    the same `token` as the message. Raises MailboxError, PeerDied."""
    answer = ask(box, message, timeout_s=timeout_s)
    while getattr(answer, "token", None) != message.token:
        answer = next_answer(box, timeout_s)
    return answer


def wait_for_death(box: Mailbox, timeout_s: float) -> int:
    """The status of the process at the other side, whose death is to be reported; what it said
    before is of no interest any more. Raises MailboxError when nothing comes for `timeout_s`."""
    while True:
        message, fds = box.receive(timeout_s)
        for fd in fds:
            os.close(fd)
        if isinstance(message, Report) and message.kind == DIED:
            return int(message.values["status"])
