"""Notes for the next control: whole or not at all, seen by another process."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from control.notes import HALF_BYTES, Notes

STATES = st.lists(st.none() | st.integers() | st.binary(max_size=300) | st.text(), max_size=6)


def in_another(notes: Notes, *states: Any, dies_in: int | None = None) -> None:
    """A process that writes these and is gone; with `dies_in`, in the middle of writing that many
    bytes of another one."""
    pid = os.fork()
    if pid == 0:
        for state in states:
            notes.write(state)
        if dies_in is not None:
            notes.take_in_hand()
            half = 64 + (~notes._memory[0] & 1) * HALF_BYTES
            notes._memory[half : half + dies_in] = b"\xff" * dies_in
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0


def test_nothing_written() -> None:
    assert Notes().read() == (None, False)


@given(st.lists(STATES, min_size=1, max_size=4), st.integers(0, 1000))
def test_the_last_state_survives_its_writer(states: list[Any], dies_in: int) -> None:
    notes = Notes()
    in_another(notes, *states)
    assert notes.read() == (states[-1], False)
    in_another(notes, *states, dies_in=dies_in)
    assert notes.read() == (states[-1], True)
    notes.write("again")
    assert notes.read() == ("again", False)


def test_in_hand_until_it_is_written() -> None:
    notes = Notes()
    notes.take_in_hand()
    assert notes.read() == (None, True)
    notes.write(1)
    notes.take_in_hand()
    assert notes.read() == (1, True)
    notes.write(2)
    assert notes.read() == (2, False)
