"""A device that breaks the rules of its rings.

The driver says that a ring is broken, or what came is dropped and counted; buffers are never lost,
and no memory but theirs is touched.
"""

from __future__ import annotations

import ctypes
import struct

import pytest
from guestring import HEADER, NUM, Rig, frame, rig_with, signalled
from hypothesis import given
from hypothesis import strategies as st

from dataplane import move
from dataplane.guest_memory import RX_BUFFER_BYTES


def poke(address: int, layout: str, *values: int) -> None:
    ctypes.memmove(address, struct.pack(layout, *values), struct.calcsize(layout))


def use(rig: Rig, which: str, *used: tuple[int, int], index: int = -1) -> None:
    """Return (buffer, length) pairs in a split ring, whatever the driver offered; the used index
    becomes `index` if that is given."""
    at = getattr(rig.mover, which)["used"]
    for place, pair in enumerate(used):
        poke(at + 4 + 8 * place, "<II", *pair)
    poke(at + 2, "<H", len(used) if index < 0 else index)


USED_NOW = 0x8080  # in the first lap


def use_packed(rig: Rig, which: str, *used: tuple[int, int], flags: int = USED_NOW | 2) -> None:
    """The same in a packed ring, from place 0 on."""
    at = getattr(rig.mover, which)["desc"]
    for place, (number, length) in enumerate(used):
        poke(at + 16 * place + 8, "<IHH", length, number, flags)


BROKEN = {"rx": move.BROKEN_RX, "tx": move.BROKEN_TX}
BOTH = pytest.mark.parametrize("which", ["rx", "tx"])
IN_ORDER = pytest.mark.parametrize("in_order", [False, True], ids=["any-order", "in-order"])
TOO_LONG = pytest.mark.parametrize(
    "length", [RX_BUFFER_BYTES + 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
)


@BOTH
@IN_ORDER
@given(jump=st.integers(NUM + 1, 0xFFFF))
def test_used_index_beyond_what_is_out(which: str, in_order: bool, jump: int) -> None:
    with rig_with(in_order=in_order) as rig:
        use(rig, which, index=jump)
        assert rig.mover.step(0) == BROKEN[which]


@BOTH
@IN_ORDER
@given(head=st.one_of(st.integers(NUM, 2**32 - 1), st.just(0xFFFFFFFF)))
def test_used_element_names_no_descriptor(which: str, in_order: bool, head: int) -> None:
    with rig_with(1, in_order=in_order) as rig:
        use(rig, which, (head, 60))
        assert rig.mover.step(0) == BROKEN[which]


@BOTH
def test_used_element_repeated(which: str) -> None:
    """A descriptor the driver already has back, while others are out."""
    with rig_with(3) as rig:
        head = 5 if which == "rx" else 0
        use(rig, which, (head, 0), (head, 0))
        assert rig.mover.step(0) == (0 if which == "rx" else BROKEN["tx"])
        if which == "rx":  # it was offered again in between, so it is only an empty frame
            assert rig.mover.rx["dropped"] == 2


@TOO_LONG
@IN_ORDER
def test_more_written_than_the_buffer_holds(length: int, in_order: bool) -> None:
    with rig_with(in_order=in_order) as rig:
        use(rig, "rx", (0, length))
        assert rig.mover.step(0) == move.BROKEN_RX


@given(last=st.integers(1, NUM - 1), index=st.integers(1, NUM))
def test_batch_larger_than_what_was_used(last: int, index: int) -> None:
    """In order, an entry gives back all buffers up to the one it names: no more than the used index
    says. If that says more, the entry after the batch counts too; here it names far too many."""
    with rig_with(in_order=True, mergeable=False) as rig:
        use(rig, "rx", (last, 0), index=index)
        assert rig.mover.step(0) == (0 if index == last + 1 else move.BROKEN_RX)


@BOTH
@IN_ORDER
@given(number=st.integers(NUM, 0xFFFF))
def test_packed_id_of_no_buffer(which: str, in_order: bool, number: int) -> None:
    with rig_with(1, packed=True, in_order=in_order) as rig:
        use_packed(rig, which, (number, 60))
        assert rig.mover.step(0) == BROKEN[which]


@IN_ORDER
@given(number=st.integers(3, NUM - 1))
def test_packed_id_never_offered(in_order: bool, number: int) -> None:
    with rig_with(3, packed=True, in_order=in_order) as rig:
        use_packed(rig, "tx", (number, 0))
        assert rig.mover.step(0) == move.BROKEN_TX


@BOTH
@IN_ORDER
def test_packed_id_repeated(which: str, in_order: bool) -> None:
    """As above; in order it is the buffer offered last then, which gives back all there are."""
    with rig_with(3, packed=True, in_order=in_order) as rig:
        use_packed(rig, which, (0, 0), (0, 0))
        assert rig.mover.step(0) == (0 if (which, in_order) == ("rx", False) else BROKEN[which])
        if which == "rx" and not in_order:
            assert rig.mover.rx["dropped"] == 2


@TOO_LONG
@IN_ORDER
def test_packed_more_written_than_the_buffer_holds(length: int, in_order: bool) -> None:
    with rig_with(packed=True, in_order=in_order) as rig:
        use_packed(rig, "rx", (0, length))
        assert rig.mover.step(0) == move.BROKEN_RX


@BOTH
@IN_ORDER
@given(flags=st.integers(0, 0xFFFF))
def test_packed_flags(which: str, in_order: bool, flags: int) -> None:
    """A descriptor is used when both marks say so. Of the other flags only WRITE means something:
    without it nothing was written, whatever the length says."""
    with rig_with(1, packed=True, in_order=in_order) as rig:
        rx, tx = rig.mover.rx, rig.mover.tx
        use_packed(rig, which, (0, 80), flags=flags)
        assert rig.mover.step(0) == 0
        is_used = flags & USED_NOW == USED_NOW
        assert rx["last_used"] == (is_used and which == "rx")
        assert tx["last_used"] == (is_used and which == "tx")
        assert rx["frames"] == (is_used and which == "rx" and flags & 2 == 2)
        assert rx["frames"] + rx["dropped"] == rx["last_used"]


@IN_ORDER
@given(
    used=st.lists(
        st.tuples(
            st.integers(0, NUM - 1),
            st.one_of(st.integers(0, NUM), st.integers(0, 0xFFFF)),
            st.one_of(st.integers(0, RX_BUFFER_BYTES + 9), st.integers(0, 0xFFFFFFFF)),
            st.one_of(st.sampled_from([0, 2, USED_NOW, USED_NOW | 2]), st.integers(0, 0xFFFF)),
        ),
        max_size=2 * NUM,
    ),
    sent=st.integers(0, NUM),
    event=st.integers(0, 0xFFFFFFFF),
    mergeable=st.booleans(),
)
def test_packed_anything(
    in_order: bool, used: list[tuple[int, ...]], sent: int, event: int, mergeable: bool
) -> None:
    """Whatever the device writes, a ring is over or all its buffers are somewhere."""
    with rig_with(sent, packed=True, in_order=in_order, mergeable=mergeable) as rig:
        rx, tx = rig.mover.rx, rig.mover.tx
        for view in (rx, tx):
            poke(view["used"], "<I", event)
            for place, number, length, flags in used:
                poke(view["desc"] + 16 * place + 8, "<IHH", length, number, flags)
        for _ in range(3):
            rig.tap.send(frame(1, 60))
            if (result := rig.mover.step(0)) != 0:
                break
            assert rx["out"] == NUM and tx["out"] + tx["free_count"] == NUM
        assert result in (0, *BROKEN.values())


@pytest.mark.parametrize(
    "event_idx, event, kicked",
    [
        (True, 0x0000_0000, True),  # enabled
        (True, 0x0001_0000, False),  # disabled
        (True, 0x0002_8001, True),  # place 1 of this lap is one of those offered
        (True, 0x0002_8003, False),  # place 3 comes later
        (True, 0x0002_0001, False),  # place 1 of the next lap
        (True, 0x0003_0000, True),  # reserved
        (True, 0xFFFD_0000, False),  # reserved bits are no flags
        (False, 0x0002_8003, True),  # not negotiated
        (False, 0x0001_8001, False),
    ],
)
def test_packed_kick_as_asked(event_idx: bool, event: int, kicked: bool) -> None:
    """Three buffers are offered, at places 0 to 2 of the first lap."""
    with rig_with(packed=True, event_idx=event_idx) as rig:
        poke(rig.mover.tx["used"], "<I", event)
        for number in range(3):
            rig.tap.send(frame(number, 60))
        rig.mover.step(0)
        assert rig.mover.tx["kicks"] == kicked and signalled(rig.tx.kick) == kicked


@pytest.mark.parametrize("packed", [False, True])
@IN_ORDER
@given(said=st.integers(0, 0xFFFF), there=st.integers(1, NUM), size=st.integers(0, 80))
def test_number_of_buffers_that_is_wrong(
    packed: bool, in_order: bool, said: int, there: int, size: int
) -> None:
    """A frame that claims more buffers than were returned is dropped; all buffers go back."""
    with rig_with(packed=packed, in_order=in_order) as rig:
        for number in range(there):
            assert rig.rx.pop()
            at = rig.rx.held[0][1][0][0]
            ctypes.memmove(at, frame(number, 80), 80 + HEADER)
            poke(at + 10, "<H", said)
            rig.rx.put(0, size)
        rig.rx.publish()
        assert rig.mover.step(0) == 0
        whole = max(said, 1)
        good = there // whole if size >= HEADER + 14 else 0
        assert rig.mover.rx["out"] == NUM and rig.mover.rx["avail_idx"] == NUM + there
        if size >= HEADER + 14:
            assert rig.mover.rx["frames"] == good
            assert rig.mover.rx["dropped"] == (1 if there % whole else 0)
        else:
            assert rig.mover.rx["frames"] == 0 and rig.mover.rx["dropped"] > 0
