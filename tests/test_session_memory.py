"""Guest memory in a vhost-user session: tables, slots, short files, rings that lose it."""

from __future__ import annotations

import os
import socket

import pytest
from conversation import (
    FEATURES,
    GPA,
    RING_PACKED,
    SIZE,
    SPLIT,
    UVA,
    Conversation,
    MiB,
    region,
    reply,
    single,
    start_ring,
    started,
    state,
    table,
    talk,
    u64,
    with_memory,
)

from control.effects import Ack, Close, MemoryChanged, Nack, Reply, RingChanged, RingStop
from control.session import Offer
from dataplane.commands import ring_areas
from shm.mailbox import encode

HALF = SIZE // 2


def refusal(said: Conversation) -> str:
    (nack,) = said.listens()
    assert isinstance(nack, Nack)
    return nack.reason


def test_a_table_replaces_everything() -> None:
    said = talk(acks=True)
    first, second, third = (said.fds.new(SIZE) for _ in range(3))
    both = table(region(0, MiB, UVA), region(GPA, MiB, UVA + MiB, offset=4096))
    said.says("SET_MEM_TABLE", both, first, second, need_reply=True).hears(MemoryChanged(), Ack(5))
    assert [(r.gpa, r.size, r.uva, r.mmap_offset, r.fd) for r in said.mapped] == [
        (0, MiB, UVA, 0, first),
        (GPA, MiB, UVA + MiB, 4096, second),
    ]
    said.says("SET_MEM_TABLE", table(region()), third, need_reply=True).hears(
        MemoryChanged(), Ack(5)
    )
    assert set(said.fds.open) == {third}


def test_a_table_may_be_padded_and_hold_32_regions() -> None:
    said = talk()
    said.says("SET_MEM_TABLE", table(region()) + bytes(32), said.fds.new(SIZE)).hears(
        MemoryChanged()
    )
    many = table(*(region(GPA + i * MiB, MiB, UVA + i * MiB) for i in range(32)))
    said.says("SET_MEM_TABLE", many, *(said.fds.new(MiB) for _ in range(32))).hears(MemoryChanged())
    assert len(said.mapped) == 32 == len(said.fds.open)


@pytest.mark.parametrize(
    ("regions", "sizes", "why"),
    [
        ([region()], [], "1 memory regions without a descriptor; is the guest's memory shared?"),
        ([], [], "no memory region; is the guest's memory shared?"),
        ([region()], [SIZE, SIZE], "2 descriptors for 1 memory regions"),
        ([region(0), region()], [SIZE], "1 descriptors for 2 memory regions"),
        ([], [SIZE], "no memory region"),
        ([region(size=0)], [SIZE], "memory region 0 is empty"),
        ([region(gpa=2**64 - MiB)], [SIZE], "out of range"),
        ([region(gpa=2**63 - MiB, size=2 * MiB)], [SIZE], "out of range"),
        ([region(uva=2**64 - MiB)], [SIZE], "out of range"),
        ([region(offset=2**64 - MiB)], [SIZE], "out of range"),
        ([region(size=2**64 - 1)], [SIZE], "out of range"),
        ([region(0, 2**63, 0)], [SIZE], "out of range"),  # more than mmap takes
        (
            [region(), region(GPA + SIZE - 1)],
            [SIZE, SIZE],
            "memory region 1 at 0x43ffffff overlaps",
        ),
        ([region(), region(GPA - SIZE + 1)], [SIZE, SIZE], "overlaps the one at 0x40000000"),
        ([region(), region(GPA + MiB, MiB)], [SIZE, SIZE], "overlaps"),
        (
            [region(0), region()],
            [SIZE, HALF],
            "memory region 1 needs 64 MiB of a file that has only 32 MiB; was share=on given?",
        ),
        ([region(offset=1)], [SIZE], "needs 67108865 bytes of a file that has only 64 MiB"),
        ([region()], [0], "a file that has only 0 bytes"),
    ],
)
def test_tables_that_are_refused(regions: list[bytes], sizes: list[int], why: str) -> None:
    said = with_memory(acks=True)
    start_ring(said)
    before = said.session.device.memory
    kept = set(said.fds.open)
    said.says("SET_MEM_TABLE", table(*regions), *(said.fds.new(n) for n in sizes), need_reply=True)
    assert why in refusal(said)
    assert said.session.device.memory == before and set(said.fds.open) == kept
    assert said.running == {0}


def test_touching_regions_do_not_overlap() -> None:
    said = talk()
    touching = table(region(GPA, MiB), region(GPA + MiB, MiB), region(GPA - MiB, MiB))
    said.says("SET_MEM_TABLE", touching, *(said.fds.new(MiB) for _ in range(3))).hears(
        MemoryChanged()
    )


def test_a_file_without_a_size_is_taken_as_it_is() -> None:
    said = talk()
    said.says("SET_MEM_TABLE", table(region()), said.fds.new(None)).hears(MemoryChanged())


def test_a_descriptor_that_cannot_be_looked_at_is_refused() -> None:
    said = talk(acks=True)

    def fstat(_fd: int) -> os.stat_result:
        raise OSError(5, "Input/output error")

    said.session.device._fstat = fstat
    said.says("SET_MEM_TABLE", table(region()), said.fds.new(SIZE), need_reply=True)
    assert refusal(said) == "SET_MEM_TABLE: memory region 0: Input/output error"
    assert said.fds.open == {}


@pytest.mark.parametrize("kind", ["pipe", "eventfd", "directory", "socket"])
def test_a_descriptor_that_is_no_file_is_refused(kind: str) -> None:
    said = talk(acks=True)
    fds: tuple[int, ...]
    if kind == "pipe":
        fds = os.pipe()
    elif kind == "socket":
        fds = (socket.socket(socket.AF_UNIX).detach(),)
    else:
        fds = (os.eventfd(0) if kind == "eventfd" else os.open("/", os.O_RDONLY),)
    statuses = [os.fstat(fd) for fd in fds]
    for fd in fds:
        os.close(fd)
    said.session.device._fstat = lambda _fd: statuses[0]
    said.says("SET_MEM_TABLE", table(region()), said.fds.new(SIZE), need_reply=True)
    assert "no file that can be mapped" in refusal(said)


# Slots


def test_slots_are_added_and_removed() -> None:
    said = talk(acks=True)
    said.says("GET_MAX_MEM_SLOTS", need_reply=True).hears(
        Reply(reply("GET_MAX_MEM_SLOTS", u64(509)))
    )
    low, high = said.fds.new(SIZE), said.fds.new(SIZE)
    said.says("ADD_MEM_REG", single(region(0)), low, need_reply=True).hears(
        MemoryChanged(), Ack(37)
    )
    said.says("ADD_MEM_REG", single(region(uva=UVA + SIZE)), high).hears(MemoryChanged())
    assert [r.gpa for r in said.mapped] == [0, GPA]
    # The offset does not count, and a descriptor that comes along is closed unseen.
    said.says("REM_MEM_REG", single(region(0, offset=99)), said.fds.new()).hears(MemoryChanged())
    assert [r.gpa for r in said.mapped] == [GPA] and set(said.fds.open) == {high}


def test_identical_regions_are_counted() -> None:
    """QEMU adds each region once per queue pair and removes it as often."""
    said = talk()
    for _ in range(3):
        said.says("ADD_MEM_REG", single(region()), said.fds.new(SIZE)).hears(MemoryChanged())
        assert len(said.fds.open) == 1 == len(said.session.device.memory)
    for left in (1, 1, 0):
        said.says("REM_MEM_REG", single(region())).hears(MemoryChanged())
        assert len(said.fds.open) == left == len(said.session.device.memory)
    said.says("ADD_MEM_REG", single(region()), said.fds.new(SIZE)).hears(MemoryChanged())
    assert len(said.session.device.memory) == 1


def test_nothing_is_remembered_of_a_region_that_is_gone() -> None:
    """A VMM that plugs memory in and out for years."""
    said = talk()
    sizes = set()
    for number in range(100):
        one = single(region(MiB * number, MiB, UVA + MiB * number))
        for _ in range(2):
            said.says("ADD_MEM_REG", one, said.fds.new(MiB)).hears(MemoryChanged())
        for _ in range(2):
            said.says("REM_MEM_REG", one).hears(MemoryChanged())
        sizes.add(len(encode(said.session)))
    assert max(sizes) - min(sizes) < 64


def test_slots_that_are_refused() -> None:
    said = with_memory(acks=True)
    for name, one, size, why in (
        ("ADD_MEM_REG", region(0), None, "without a descriptor"),
        ("ADD_MEM_REG", region(GPA + MiB, MiB), MiB, "overlaps"),
        ("ADD_MEM_REG", region(0, MiB), MiB - 1, "needs 1 MiB of a file that has only 1048575 b"),
        ("REM_MEM_REG", region(uva=UVA + 1), None, "no memory region of 0x4000000 bytes"),
        ("REM_MEM_REG", region(size=MiB), None, "no memory region"),
        ("REM_MEM_REG", region(0), None, "no memory region of 0x4000000 bytes at 0x0"),
    ):
        fds = [said.fds.new(size)] if size else []
        said.says(name, single(one), *fds, need_reply=True)
        assert why in refusal(said)
        assert len(said.fds.open) == 1 == len(said.session.device.memory)


def test_there_are_509_slots_and_no_more() -> None:
    said = talk(acks=True)
    for slot in range(509):
        said.says(
            "ADD_MEM_REG", single(region(slot * MiB, MiB, UVA + slot * MiB)), said.fds.new(MiB)
        )
        assert said.listens() == [MemoryChanged()]
    said.says("ADD_MEM_REG", single(region(2**40, MiB)), said.fds.new(MiB), need_reply=True)
    assert refusal(said) == "ADD_MEM_REG: all 509 memory slots are taken"
    assert len(said.fds.open) == 509
    said.says("REM_MEM_REG", single(region(7 * MiB, MiB, UVA + 7 * MiB))).hears(MemoryChanged())
    said.says("ADD_MEM_REG", single(region(2**40, MiB)), said.fds.new(MiB)).hears(MemoryChanged())


# Rings in it


@pytest.mark.parametrize(
    ("packed", "areas"),
    [
        (False, ((4096, 16), (518, 2), (2054, 4))),
        (True, ((4096, 16), (4, 4), (4, 4))),
    ],
)
def test_how_much_of_it_a_ring_of_256_takes(
    packed: bool, areas: tuple[tuple[int, int], ...]
) -> None:
    assert ring_areas(256, packed) == areas


@pytest.mark.parametrize(
    ("features", "last", "runs"),
    [(SPLIT, 2056, True), (SPLIT, 2052, False), (SPLIT | RING_PACKED, 4, True)],
)
def test_a_ring_may_use_memory_up_to_its_end(features: int, last: int, runs: bool) -> None:
    at = UVA + SIZE - last
    said = with_memory(features=features)
    said.says("SET_VRING_NUM", state(0, 256)).hears()
    payload = state(0, 0) + u64(UVA) + u64(at) + u64(UVA + 0x1000) + u64(0)
    said.says("SET_VRING_ADDR", payload).hears()
    said.says("SET_VRING_KICK", u64(0), said.fds.new()).listens()
    assert (said.running == {0}) == runs


def test_rings_go_on_when_more_memory_comes() -> None:
    said = started(acks=True)
    more = single(region(GPA + SIZE, MiB, UVA + SIZE))
    said.says("ADD_MEM_REG", more, said.fds.new(MiB), need_reply=True).hears(
        MemoryChanged(), Ack(37)
    )
    said.says("SET_MEM_TABLE", table(region()), said.fds.new(SIZE)).hears(MemoryChanged())
    assert said.running == {0, 1}


def test_a_ring_whose_memory_goes_stops_before_and_starts_after_it_is_back() -> None:
    said = started(acks=True)
    said.bases = {0: 11, 1: 12}
    said.says("ADD_MEM_REG", single(region(0, MiB, 0)), said.fds.new(MiB)).hears(MemoryChanged())
    said.says("REM_MEM_REG", single(region()), need_reply=True)
    heard = said.listens()
    assert [type(effect).__name__ for effect in heard] == [
        "RingStop",
        "RingRefused",
        "RingStop",
        "RingRefused",
        "MemoryChanged",
        "Ack",
    ]
    assert said.sent == [reply("REM_MEM_REG", u64(0))], "the memory is as it should be"
    said.says("ADD_MEM_REG", single(region()), said.fds.new(SIZE)).hears(
        MemoryChanged(), RingChanged(0), RingChanged(1)
    )
    assert [said.worker[i].base for i in (0, 1)] == [11, 12]


def test_a_ring_stops_when_all_memory_goes() -> None:
    said = started()
    said.says("REM_MEM_REG", single(region())).hears(RingStop(0), RingStop(1), MemoryChanged())
    assert said.ring(0).problem == "" and said.mapped == () and said.running == set()


def test_memory_without_descriptors_is_the_end_where_no_nack_can_be_sent() -> None:
    said = Conversation(Offer(FEATURES))
    said.says("SET_MEM_TABLE", table(region()))
    (close,) = said.listens()
    assert isinstance(close, Close) and "share=on" in close.reason
