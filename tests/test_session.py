"""vhost-user sessions as conversations: each test reads top to bottom, message by message."""

from __future__ import annotations

import gc
import os

import pytest
from conversation import (
    CSUM,
    FEATURES,
    GPA,
    GUEST_TSO4,
    HOST_TSO4,
    NET_MQ,
    NO_FD,
    PROTOCOL_FEATURES,
    REPLY_ACK,
    RING_PACKED,
    SIZE,
    SPLIT,
    UVA,
    VERSION_1,
    Conversation,
    MiB,
    addr,
    message,
    region,
    reply,
    start_ring,
    started,
    state,
    table,
    talk,
    u64,
    with_memory,
)

from control.effects import (
    Ack,
    BackendChannel,
    Close,
    Log,
    MemoryChanged,
    Nack,
    Reply,
    ReplyVringBase,
    RingChanged,
    RingRefused,
    RingStop,
)
from control.session import Offer, Session

# Features


def test_features_are_told_and_taken() -> None:
    said = talk(pairs=2)
    said.says("GET_FEATURES").hears(Reply(reply("GET_FEATURES", u64(FEATURES | PROTOCOL_FEATURES))))
    said.says("GET_PROTOCOL_FEATURES").hears(Reply(reply("GET_PROTOCOL_FEATURES", u64(0x1A03D))))
    said.says("SET_PROTOCOL_FEATURES", u64(0x9)).hears()
    said.says("SET_OWNER").hears()
    said.says("SET_FEATURES", u64(SPLIT)).hears()
    assert said.session.device.features == SPLIT
    assert said.session.device.protocol_features == 0x9


def test_one_queue_pair_is_offered_without_mq() -> None:
    said = talk(pairs=1)
    virtio = FEATURES & ~NET_MQ | PROTOCOL_FEATURES
    said.says("GET_FEATURES").hears(Reply(reply("GET_FEATURES", u64(virtio))))
    said.says("GET_PROTOCOL_FEATURES").hears(Reply(reply("GET_PROTOCOL_FEATURES", u64(0x1A03C))))


def test_an_offer_is_consistent() -> None:
    assert Offer(VERSION_1 | GUEST_TSO4 | HOST_TSO4).virtio == VERSION_1 | PROTOCOL_FEATURES


@pytest.mark.parametrize(
    "wrong",
    [
        dict(features=VERSION_1, queue_pairs=0),
        dict(features=VERSION_1, queue_pairs=33),
        dict(features=CSUM),
        dict(features=VERSION_1 | 1 << 26),
        dict(features=VERSION_1, protocol_features=1 << 1),
    ],
)
def test_an_offer_that_cannot_be_kept_is_our_own_mistake(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        Offer(**wrong)


def test_features_that_were_not_offered_are_refused() -> None:
    said = talk(acks=True)
    said.says("SET_FEATURES", u64(SPLIT | 1 << 26), need_reply=True).hears(
        Nack(
            2,
            "SET_FEATURES: features that were not offered: LOG_ALL",
            reply("SET_FEATURES", u64(1)),
        )
    )
    said.says("SET_PROTOCOL_FEATURES", u64(0x2)).hears(
        Close("SET_PROTOCOL_FEATURES: protocol features that were not offered: LOG_SHMFD")
    )


def test_features_without_what_they_need_are_not_used() -> None:
    said = talk()
    said.says("SET_FEATURES", u64(SPLIT | GUEST_TSO4 | HOST_TSO4 | CSUM)).hears(
        Log("warning", "ignoring guest features without what they need: GUEST_TSO4")
    )
    assert said.session.device.features == SPLIT | HOST_TSO4 | CSUM
    said.says("SET_FEATURES", u64(SPLIT | GUEST_TSO4 | HOST_TSO4 | CSUM)).hears()


def test_new_features_reach_rings_that_run_and_old_ones_do_not() -> None:
    said = started()
    said.says("SET_FEATURES", u64(SPLIT)).hears()
    said.says("SET_FEATURES", u64(SPLIT | CSUM)).hears(RingChanged(0), RingChanged(1))


@pytest.mark.parametrize(
    ("pairs", "need_reply", "answer"),
    [
        (1, False, 1),
        (1, True, 2),
        (4, False, 4),  # QEMU and DPDK count pairs
        (4, True, 8),  # rust-vmm counts rings, and asks with NEED_REPLY
        (32, True, 64),
    ],
)
def test_the_number_of_queues(pairs: int, need_reply: bool, answer: int) -> None:
    said = talk(pairs, acks=True)
    said.says("GET_QUEUE_NUM", need_reply=need_reply).hears(
        Reply(reply("GET_QUEUE_NUM", u64(answer)))
    )


def test_cloud_hypervisor_from_connect_to_reboot() -> None:
    """All with NEED_REPLY once REPLY_ACK is taken, ADDR before BASE, ENABLE last."""
    said = Conversation(Offer(FEATURES, 2))
    say = said.says
    say("SET_OWNER").hears()
    say("GET_FEATURES").listens()
    say("GET_PROTOCOL_FEATURES").listens()
    say("SET_PROTOCOL_FEATURES", u64(0x8009)).hears()
    say("GET_QUEUE_NUM", need_reply=True).hears(Reply(reply("GET_QUEUE_NUM", u64(4))))
    for boot in range(2):
        say("SET_FEATURES", u64(SPLIT), need_reply=True).hears(Ack(2))
        say("SET_MEM_TABLE", table(region()), said.fds.new(SIZE), need_reply=True).hears(
            MemoryChanged(), Ack(5)
        )
        for ring in range(4):
            say("SET_VRING_NUM", state(ring, 256), need_reply=True).hears(Ack(8))
        for ring in range(4):
            say("SET_VRING_ADDR", addr(ring), need_reply=True).hears(Ack(9))
            say("SET_VRING_BASE", state(ring, boot), need_reply=True).hears(Ack(10))
            say("SET_VRING_CALL", u64(ring), said.fds.new(), need_reply=True).hears(Ack(13))
            say("SET_VRING_KICK", u64(ring), said.fds.new(), need_reply=True).hears(
                RingChanged(ring), Ack(12)
            )
        for ring in range(4):
            say("SET_VRING_ENABLE", state(ring, 1), need_reply=True).hears(
                RingChanged(ring), Ack(18)
            )
        assert said.working == {0, 1, 2, 3}
        for ring in range(4):
            say("SET_VRING_ENABLE", state(ring, 0), need_reply=True).hears(
                RingChanged(ring), Ack(18)
            )
            said.bases[ring] = 7
            say("GET_VRING_BASE", state(ring, 0), need_reply=True).hears(
                RingStop(ring), ReplyVringBase(ring)
            )
            assert said.sent == [reply("GET_VRING_BASE", state(ring, 7))]


# Acks


def test_no_ack_without_need_reply_and_none_before_reply_ack() -> None:
    said = talk()
    said.says("SET_OWNER", need_reply=True).hears()
    said.says("SET_PROTOCOL_FEATURES", u64(REPLY_ACK)).hears()
    said.says("SET_OWNER").hears()
    said.says("SET_OWNER", need_reply=True).hears(Ack(3))
    assert said.sent == [reply("SET_OWNER", u64(0))]


def test_taking_reply_ack_is_acked_at_once() -> None:
    said = talk()
    said.says("SET_PROTOCOL_FEATURES", u64(0x28), need_reply=True).hears(Ack(16))


@pytest.mark.parametrize(
    "name", ["GET_FEATURES", "GET_PROTOCOL_FEATURES", "GET_STATUS", "GET_MAX_MEM_SLOTS"]
)
def test_what_has_its_own_reply_gets_no_ack_beside_it(name: str) -> None:
    said = talk(acks=True)
    said.says(name, need_reply=True).listens()
    assert len(said.sent) == 1


def test_an_ack_tells_that_an_effect_failed() -> None:
    said = talk(acks=True)
    said._fails = lambda effect: effect == RingChanged(0)
    said.says("SET_FEATURES", u64(SPLIT)).hears()
    said.says("SET_MEM_TABLE", table(region()), said.fds.new(SIZE)).hears(MemoryChanged())
    said.says("SET_VRING_NUM", state(0, 256)).hears()
    said.says("SET_VRING_ADDR", addr(0)).hears()
    said.says("SET_VRING_KICK", u64(0), said.fds.new(), need_reply=True).hears(
        RingChanged(0), Ack(12)
    )
    assert said.sent == [reply("SET_VRING_KICK", u64(1))]
    assert said.running == set() and said.ring(0).problem == "no more of that"
    said._fails = lambda effect: False
    said.says("SET_VRING_ENABLE", state(0, 1), need_reply=True).hears(RingChanged(0), Ack(18))


def test_a_ring_that_a_worker_will_not_have_any_longer_is_taken_from_it() -> None:
    said = started()
    said.bases[0] = 31
    said._fails = lambda effect: effect == RingChanged(0)
    said.says("SET_VRING_CALL", u64(0), said.fds.new()).hears(RingChanged(0))
    assert set(said.worker) == {1} == said.running
    said._fails = lambda effect: False
    said.says("SET_VRING_CALL", u64(0), said.fds.new()).hears(RingChanged(0))
    assert said.worker[0].base == 31


def test_a_base_nobody_told_in_time_is_not_taken_later() -> None:
    said = with_memory()
    said._fails = lambda effect: effect == RingChanged(0)
    said.says("SET_VRING_NUM", state(0, 256)).hears()
    said.says("SET_VRING_ADDR", addr(0)).hears()
    said.says("SET_VRING_KICK", u64(0), said.fds.new()).hears(RingChanged(0))
    said._fails = lambda effect: False
    said.says("SET_VRING_ENABLE", state(0, 1)).hears(RingChanged(0))
    said.bases[0] = 50
    said.says("RESET_DEVICE").hears(RingStop(0))
    assert said.ring(0).base == 0


def test_memory_that_cannot_be_mapped_is_forgotten_and_said_to_be() -> None:
    said = started(acks=True)
    said.bases = {0: 5, 1: 6}
    failing = [MemoryChanged()]
    said._fails = lambda effect: effect in failing and failing.pop() == effect  # only the first
    said.says("SET_MEM_TABLE", table(region()), said.fds.new(SIZE), need_reply=True).hears(
        MemoryChanged(), Ack(5)
    )
    assert said.sent == [reply("SET_MEM_TABLE", u64(1))]
    assert said.session.device.memory == () == said.mapped
    assert said.worker == {} and said.running == set()
    # The next table brings the rings back, from where they stopped.
    said.says("SET_MEM_TABLE", table(region()), said.fds.new(SIZE), need_reply=True).hears(
        MemoryChanged(), RingChanged(0), RingChanged(1), Ack(5)
    )
    assert [said.worker[i].base for i in (0, 1)] == [5, 6]


def test_memory_that_cannot_be_mapped_closes_where_no_ack_can_say_so() -> None:
    said = started()
    effects = said.session.effect_failed(MemoryChanged(), "Cannot allocate memory")
    assert effects == [
        RingStop(0),
        RingStop(1),
        MemoryChanged(),
        Close("guest memory: Cannot allocate memory"),
    ]
    assert said.fds.open == {}
    assert said.session.effect_failed(RingStop(0), "again") == []


# Rings


@pytest.mark.parametrize("last", ["NUM", "ADDR", "KICK", "MEM", "FEATURES"])
def test_a_ring_starts_with_whatever_comes_last(last: str) -> None:
    said = talk()
    lines = {
        "FEATURES": ("SET_FEATURES", u64(SPLIT), ()),
        "MEM": ("SET_MEM_TABLE", table(region()), (said.fds.new(SIZE),)),
        "NUM": ("SET_VRING_NUM", state(1, 256), ()),
        "ADDR": ("SET_VRING_ADDR", addr(1), ()),
        "KICK": ("SET_VRING_KICK", u64(1), (said.fds.new(),)),
    }
    for key, (name, payload, fds) in sorted(lines.items(), key=lambda line: line[0] == last):
        assert said.running == set()
        said.says(name, payload, *fds)
        heard = said.listens()
        assert (RingChanged(1) in heard) == (key == last)
    assert said.running == {1} and said.worker[1].base == 0


def test_kick_call_and_error_descriptors_are_replaced_and_closed() -> None:
    said = started()
    for name, field in (
        ("SET_VRING_KICK", "kick_fd"),
        ("SET_VRING_CALL", "call_fd"),
        ("SET_VRING_ERR", "err_fd"),
    ):
        old, new = getattr(said.ring(0), field), said.fds.new()
        said.says(name, u64(0), new).hears(RingChanged(0))
        assert getattr(said.ring(0), field) == new
        assert new in said.fds.open and old not in said.fds.open


def test_a_call_or_error_descriptor_may_be_withheld_a_kick_descriptor_may_not() -> None:
    said = started(acks=True)
    said.says("SET_VRING_CALL", u64(NO_FD)).hears(RingChanged(0))
    assert said.ring(0).call_fd is None
    said.says("SET_VRING_ERR", u64(NO_FD)).hears()
    why = "SET_VRING_KICK: ring 0: polling without a kick descriptor is not supported"
    said.says("SET_VRING_KICK", u64(NO_FD), need_reply=True).hears(
        Nack(12, why, reply("SET_VRING_KICK", u64(1)))
    )
    assert said.running == {0, 1}


def test_rings_are_switched_at_run_time() -> None:
    said = started(pairs=2)
    said.says("SET_VRING_ENABLE", state(2, 0)).hears(RingChanged(2))
    said.says("SET_VRING_ENABLE", state(3, 0)).hears(RingChanged(3))
    said.says("SET_VRING_ENABLE", state(3, 0)).hears()
    assert said.running == {0, 1, 2, 3} and said.working == {0, 1}
    said.says("SET_VRING_ENABLE", state(2, 1)).hears(RingChanged(2))
    said.says("SET_VRING_ENABLE", state(3, 1)).hears(RingChanged(3))
    assert said.working == {0, 1, 2, 3}


def test_enabling_is_remembered_before_the_start() -> None:
    said = talk()
    said.says("SET_VRING_ENABLE", state(0, 1)).hears()
    assert said.ring(0).enabled


def test_all_rings_are_enabled_without_protocol_features() -> None:
    """UML without CONFIG sends SET_FEATURES twice, the second time so, and never ENABLE."""
    said = started()
    said.says("SET_VRING_ENABLE", state(0, 0)).hears(RingChanged(0))
    said.says("SET_FEATURES", u64(SPLIT)).hears()
    said.says("SET_FEATURES", u64(VERSION_1)).hears(RingChanged(0), RingChanged(1))
    assert said.working == {0, 1}


@pytest.mark.parametrize(("features", "base"), [(SPLIT, 0x1234), (SPLIT | RING_PACKED, 0x80340034)])
def test_get_vring_base_stops_a_ring_and_forgets_where_it_was(features: int, base: int) -> None:
    said = started(features=features)
    kick, call = said.ring(0).kick_fd, said.ring(0).call_fd
    said.says("SET_VRING_ERR", u64(0), said.fds.new()).hears(RingChanged(0))
    said.bases[0] = base
    said.says("GET_VRING_BASE", state(0, 0)).hears(RingStop(0), ReplyVringBase(0))
    assert said.sent == [reply("GET_VRING_BASE", state(0, base))]
    assert kick not in said.fds.open and call not in said.fds.open
    ring = said.ring(0)
    assert (ring.kick_fd, ring.call_fd, ring.desc_uva) == (None, None, None)
    assert ring.err_fd in said.fds.open, "QEMU sends it once in its life"
    assert said.running == {1}
    # Asked again it answers the same, without stopping anything.
    said.says("GET_VRING_BASE", state(0, 0)).hears(ReplyVringBase(0))
    assert said.sent == [reply("GET_VRING_BASE", state(0, base))]


def test_get_vring_base_of_a_ring_that_never_ran_answers_what_was_set() -> None:
    said = talk()
    said.says("GET_VRING_BASE", state(1, 0)).hears(ReplyVringBase(1))
    assert said.sent == [reply("GET_VRING_BASE", state(1, 0))]
    said.says("SET_VRING_BASE", state(1, 0x80008000)).hears()
    said.says("GET_VRING_BASE", state(1, 0x8000)).hears(ReplyVringBase(1))
    assert said.sent == [reply("GET_VRING_BASE", state(1, 0x80008000))]


def test_a_worker_that_is_gone_leaves_the_last_known_base() -> None:
    said = with_memory()
    start_ring(said, 0, base=9)
    said._fails = lambda effect: effect == RingStop(0)
    said.says("GET_VRING_BASE", state(0, 0)).hears(RingStop(0), ReplyVringBase(0))
    assert said.sent == [reply("GET_VRING_BASE", state(0, 9))]


def test_base_0_of_a_packed_ring() -> None:
    """UML means the beginning, where the wrap counter is 1; else it is where a lap has ended."""
    said = with_memory(features=SPLIT | RING_PACKED)
    for stood_at, meant in ((None, 0x8000), (0x80058005, 0x8000), (0, 0), (0x80058005, 0x8000)):
        if stood_at is not None:
            said.bases[0] = stood_at
            said.says("GET_VRING_BASE", state(0, 0)).hears(RingStop(0), ReplyVringBase(0))
        start_ring(said, 0, 0)
        assert said.worker[0].base == meant


@pytest.mark.parametrize(("features", "first"), [(SPLIT, 0), (SPLIT | RING_PACKED, 0x80008000)])
def test_rings_start_again_on_the_same_connection(features: int, first: int) -> None:
    """Whatever they stood at; a packed ring begins in a lap whose wrap counter is 1."""
    said = started(pairs=2, features=features)
    for boot in range(3):
        for index in range(4):
            said.bases[index] = first + 100 * boot + index
            said.says("GET_VRING_BASE", state(index, 0)).hears(
                RingStop(index), ReplyVringBase(index)
            )
            assert said.sent == [reply("GET_VRING_BASE", state(index, said.bases[index]))]
        said.says("SET_MEM_TABLE", table(region()), said.fds.new(SIZE)).hears(MemoryChanged())
        for index in range(4):
            start_ring(said, index, first)
            assert said.worker[index].base == first
        assert said.working == {0, 1, 2, 3}


def test_status_zero_between_two_stops_loses_nothing() -> None:
    said = started(pairs=2)
    said.bases = {0: 1, 1: 2, 2: 3, 3: 4}
    for index in (0, 1):
        said.says("GET_VRING_BASE", state(index, 0)).hears(RingStop(index), ReplyVringBase(index))
    said.says("SET_STATUS", u64(0)).hears()
    for index in (2, 3):
        said.says("GET_VRING_BASE", state(index, 0)).hears(RingStop(index), ReplyVringBase(index))
        assert said.sent == [reply("GET_VRING_BASE", state(index, index + 1))]


def test_uml_starts_a_ring_anew_without_having_stopped_it() -> None:
    said = started()
    said.bases[0] = 77
    said.says("SET_VRING_ENABLE", state(0, 0)).hears(RingChanged(0))
    said.says("GET_FEATURES").listens()
    said.says("SET_VRING_CALL", u64(0), said.fds.new()).hears(RingChanged(0))
    said.says("SET_VRING_NUM", state(0, 256)).hears()
    said.says("SET_VRING_BASE", state(0, 0)).hears(RingStop(0))
    said.says("SET_VRING_ADDR", addr(0, UVA + 5 * MiB)).hears()
    assert said.running == {1}, "the old kick descriptor starts nothing"
    said.says("SET_VRING_KICK", u64(0), said.fds.new()).hears(RingChanged(0))
    assert said.worker[0].base == 0 and said.worker[0].desc_uva == UVA + 5 * MiB


def test_another_size_while_a_ring_runs_waits_for_the_next_kick_too() -> None:
    said = started()
    said.says("SET_VRING_NUM", state(0, 128)).hears(RingStop(0))
    said.says("SET_VRING_KICK", u64(0), said.fds.new()).hears(RingChanged(0))
    assert said.worker[0].num == 128


def test_addresses_may_come_again_while_a_ring_runs() -> None:
    said = started()
    said.says("SET_VRING_ADDR", addr(0)).hears()
    said.says("SET_VRING_ADDR", addr(0, UVA + MiB)).hears(RingChanged(0))


def test_a_packed_ring_takes_any_size_and_both_halves_of_a_base() -> None:
    said = with_memory(features=SPLIT | RING_PACKED)
    said.says("SET_VRING_NUM", state(0, 100)).hears()
    said.says("SET_VRING_BASE", state(0, 0x80008000)).hears()
    said.says("SET_VRING_ADDR", addr(0)).hears()
    said.says("SET_VRING_KICK", u64(0), said.fds.new()).hears(RingChanged(0))
    assert said.worker[0].base == 0x80008000


LEGACY = "the guest's driver is a legacy one (VERSION_1 is not among its features)"


def test_a_legacy_driver_is_told_and_the_next_driver_served() -> None:
    said = with_memory(acks=True, features=PROTOCOL_FEATURES)
    said.says("SET_VRING_NUM", state(0, 256)).hears()
    said.says("SET_VRING_ADDR", addr(0)).hears()
    said.says("SET_VRING_KICK", u64(0), said.fds.new()).hears(RingRefused(0, LEGACY))
    said.says("SET_VRING_KICK", u64(0), said.fds.new(), need_reply=True).hears(
        RingRefused(0, LEGACY), Ack(12, ok=False)
    )
    assert said.sent == [reply("SET_VRING_KICK", u64(1))]
    # QEMU aborts when this one fails.
    said.says("SET_VRING_ENABLE", state(0, 1), need_reply=True).hears(Ack(18))
    said.says("GET_VRING_BASE", state(0, 0)).hears(ReplyVringBase(0))
    said.says("SET_FEATURES", u64(SPLIT)).hears()
    start_ring(said, 0)


@pytest.mark.parametrize(
    ("line", "payload", "reason"),
    [
        ("SET_VRING_NUM", state(0, 100), "size 100 is not a power of two"),
        ("SET_VRING_BASE", state(0, 0x10000), "base 0x10000 is beyond 16 bits"),
        ("SET_VRING_ADDR", addr(0, UVA + 8), "descriptor area at 0x7f0000000008 is not aligned"),
        ("SET_VRING_ADDR", addr(0, UVA + SIZE), "descriptor area of 4096 bytes at 0x7f0004000000"),
        ("SET_VRING_ADDR", addr(0, UVA - 4096), "descriptor area of 4096 bytes"),
        ("SET_VRING_ADDR", addr(0, UVA + SIZE - 0x2000), "device (used) area of 2054 bytes"),
        ("SET_VRING_ADDR", addr(0, 2**64 - 0x10000), "descriptor area of 4096 bytes"),
    ],
)
def test_a_ring_that_cannot_run_stays_stopped(line: str, payload: bytes, reason: str) -> None:
    said = with_memory(acks=True)
    said.says("SET_VRING_NUM", state(0, 256)).hears()
    said.says("SET_VRING_ADDR", addr(0)).hears()
    said.says(line, payload).hears()
    said.says("SET_VRING_KICK", u64(0), said.fds.new(), need_reply=True)
    refused, ack = said.listens()
    assert isinstance(refused, RingRefused) and reason in refused.reason
    assert ack == Ack(12, ok=False) and said.running == set()


def test_a_running_ring_that_is_moved_out_of_memory_is_stopped() -> None:
    said = started()
    said.says("SET_VRING_ADDR", addr(0, UVA + SIZE))
    stop, refused = said.listens()
    assert stop == RingStop(0) and isinstance(refused, RingRefused)
    said.says("SET_VRING_ADDR", addr(0)).hears(RingChanged(0))


def test_a_ring_across_two_regions_is_refused_even_when_they_touch() -> None:
    said = talk()
    said.says("SET_FEATURES", u64(SPLIT)).hears()
    halves = table(region(GPA, MiB, UVA), region(GPA + MiB, MiB, UVA + MiB))
    said.says("SET_MEM_TABLE", halves, said.fds.new(MiB), said.fds.new(MiB)).hears(MemoryChanged())
    said.says("SET_VRING_NUM", state(0, 512)).hears()
    said.says("SET_VRING_ADDR", addr(0, UVA + MiB - 0x1000)).hears()
    said.says("SET_VRING_KICK", u64(0), said.fds.new())
    (refused,) = said.listens()
    assert isinstance(refused, RingRefused) and "one memory region" in refused.reason


# Resets


def test_reset_device_stops_all_and_keeps_what_belongs_to_the_connection() -> None:
    said = with_memory(pairs=2, acks=True)
    for index in range(4):
        start_ring(said, index, base=9)
        said.says("SET_VRING_ENABLE", state(index, 1)).hears(RingChanged(index))
    said.says("SET_VRING_ERR", u64(0), said.fds.new()).hears(RingChanged(0))
    said.says("SET_STATUS", u64(15)).hears()
    said.bases = {index: 50 for index in range(4)}
    said.says("RESET_DEVICE", need_reply=True).hears(
        RingStop(0), RingStop(1), RingStop(2), RingStop(3), Ack(34)
    )
    device = said.session.device
    assert (device.features, device.status, device.protocol_features) == (0, 0, REPLY_ACK)
    assert len(device.memory) == 1 and said.working == set()
    assert [ring.base for ring in device.rings] == [0, 0, 0, 0], "the worker's base does not count"
    assert set(said.fds.open) == {device.memory[0].fd, device.rings[0].err_fd}
    said.says("SET_FEATURES", u64(SPLIT)).hears()
    for index in range(4):
        start_ring(said, index)


def test_reset_owner_disables_all_rings() -> None:
    said = started()
    said.says("RESET_OWNER").hears(RingChanged(0), RingChanged(1))
    assert said.running == {0, 1} and said.working == set()


def test_status_is_kept() -> None:
    said = talk(acks=True)
    said.says("SET_STATUS", u64(0xB), need_reply=True).hears(Ack(39))
    said.says("GET_STATUS").hears(Reply(reply("GET_STATUS", u64(0xB))))
    said.says("SET_STATUS", u64(0x100), need_reply=True)
    assert isinstance(said.listens()[0], Nack)


# The rest


def test_the_channel_for_our_requests() -> None:
    said = talk(acks=True)
    first, second = said.fds.new(), said.fds.new()
    said.says("SET_BACKEND_REQ_FD", b"", first, need_reply=True).hears(
        BackendChannel(first), Ack(21)
    )
    said.says("SET_BACKEND_REQ_FD", b"", second).hears(BackendChannel(second))
    assert set(said.fds.open) == {second}
    said.hangs_up().hears(BackendChannel(None))
    assert said.fds.open == {}


def test_the_front_end_goes_and_comes_back() -> None:
    for _ in range(2):
        said = started()
        said.hangs_up().hears(RingStop(0), RingStop(1), MemoryChanged())
        assert said.fds.open == {} and said.worker == {} and said.mapped == ()
        said.hangs_up().hears()
        said.says("GET_FEATURES", b"", said.fds.new()).hears()
        assert said.fds.open == {}


def test_real_descriptors_are_closed() -> None:
    gc.collect()  # what earlier tests forgot to close
    before = len(os.listdir("/proc/self/fd"))
    session = Session(Offer(FEATURES))
    memory = os.memfd_create("guest")
    os.ftruncate(memory, SIZE)
    events = [os.eventfd(0) for _ in range(3)]
    session.receive(message("SET_FEATURES", u64(SPLIT)), [])
    session.receive(message("SET_MEM_TABLE", table(region())), [memory])
    session.receive(message("SET_VRING_NUM", state(0, 256)), [])
    session.receive(message("SET_VRING_ADDR", addr(0)), [])
    session.receive(message("SET_VRING_CALL", u64(0)), [events[0]])
    assert session.receive(message("SET_VRING_KICK", u64(0)), [events[1]]) == [RingChanged(0)]
    assert len(os.listdir("/proc/self/fd")) == before + 3 + 1
    session.receive(message(77), [events[2]])
    assert session.closed and len(os.listdir("/proc/self/fd")) == before
