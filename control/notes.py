"""notes.py - what the next control has to know, should this one die.

Theory      Control writes its state down after whatever may have changed it: the front-end's
            session, what workers are to serve, who they are. Descriptors are written down as
            numbers: the next control has the same table (guard.py). So one that is noted is open:
            it is closed after the note without it. Memory that parent and children share holds two
            halves; one byte says which is valid.
In hand     While messages of the front-end are in hand, that byte says so as well. Whether such a
            message was taken from the socket, carried out or answered, nobody can tell afterwards,
            nor which of the descriptors that are noted are still open.
Limits      HALF_BYTES of state: 509 memory regions and 64 rings take a tenth of it.
Ownership   One control at a time writes; the one after it reads, once.
Trust       Only control writes here; what a guest or a VMM sent is among it as values only.
"""

from __future__ import annotations

import mmap
from typing import Any

from shm.mailbox import decode, encode

HALF_BYTES = 1 << 20
_HALF, _IN_HAND, _WRITTEN = 1, 2, 4  # bits of the first byte
_HEAD = 64


class Notes:
    """The memory; made before the first control, which inherits it."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _HEAD + 2 * HALF_BYTES)

    def take_in_hand(self) -> None:
        """From here to the next `write` the front-end's messages are being carried out."""
        self._memory[0] |= _IN_HAND

    def write(self, state: Any, in_hand: bool = False) -> None:
        """The state is this now."""
        data = encode(state)
        data = len(data).to_bytes(4, "little") + data
        assert len(data) <= HALF_BYTES, "notes: too much state"
        half = ~self._memory[0] & _HALF
        at = _HEAD + half * HALF_BYTES
        self._memory[at : at + len(data)] = data
        head = half | _WRITTEN | (_IN_HAND if in_hand else 0)
        self._memory[0] = head  # one byte: it is there whole or not at all

    def read(self) -> tuple[Any, bool]:
        """The last state, None if there was none; whether messages were in hand since."""
        head = self._memory[0]
        if not head & _WRITTEN:
            return None, bool(head & _IN_HAND)
        at = _HEAD + (head & _HALF) * HALF_BYTES
        size = int.from_bytes(self._memory[at : at + 4], "little")
        return decode(self._memory[at + 4 : at + 4 + size]), bool(head & _IN_HAND)
