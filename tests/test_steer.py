"""Steering: every flow's next frame on the pair the law names, whatever is enabled."""

from __future__ import annotations

import pytest
from compiled import Leaves, area
from hypothesis import given
from hypothesis import strategies as st

from flows.steer import (
    CALM_MS,
    DAMPED,
    PAID_BYTES,
    SETTLED_MS,
    STAY_FIRST_MS,
    STAY_MAX_MS,
    STAYS,
    STRAY_MAX_MS,
)
from shm.layout import View
from shm.schema import FLOW, INSTANCE, PAIRS_MAX

S = Leaves("flows.steer")
INSTANCE_AT, INSTANCE_BYTES = area(4096)
FLOW_AT, FLOW_BYTES = area(4096)
SHARED, ENTRY = View(INSTANCE, INSTANCE_BYTES, 0), View(FLOW, FLOW_BYTES, 0)

PAIRS = st.integers(0, PAIRS_MAX - 1)
ENABLED = st.one_of(st.sets(PAIRS, max_size=3), st.sets(PAIRS))
OWNERS = st.lists(st.integers(0, 3), min_size=PAIRS_MAX, max_size=PAIRS_MAX)


def configure(enabled: set[int], owners: list[int]) -> None:
    SHARED["rx_enabled"] = sum(1 << pair for pair in enabled)
    SHARED.set_bytes("pair_worker", bytes(owners))


@given(ENABLED, OWNERS, PAIRS, st.integers(0, 3))
def test_the_law(enabled, owners, chosen, worker):
    configure(enabled, owners)
    ENTRY["tx_queue"] = chosen
    pair = S.queue_of(INSTANCE_AT, FLOW_AT, worker)
    own = {pair for pair in enabled if owners[pair] == worker}
    if chosen in enabled:
        assert pair == chosen
    elif own:
        assert pair in own
    elif enabled:
        assert pair in enabled
    else:
        assert pair == -1
    assert ENTRY["tx_queue"] == chosen, "the guest's choice is kept for when the pair comes back"


@given(ENABLED, OWNERS, PAIRS, st.integers(0, 3))
def test_any_pair_is_the_first_of_its_own_from_the_start_on(enabled, owners, start, worker):
    configure(enabled, owners)
    order = [(start + step) % PAIRS_MAX for step in range(PAIRS_MAX)]
    found = [pair for pair in order if pair in enabled]
    own = [pair for pair in found if owners[pair] == worker]
    assert S.any_pair(INSTANCE_AT, worker, start) == (own + found + [-1])[0]


@given(OWNERS, st.integers(1, PAIRS_MAX), st.integers(0, 3))
def test_no_two_workers_count_on_one_pair(owners, pairs, worker):
    """Unless one of them serves none."""
    configure(set(), owners)
    SHARED["pairs"] = pairs
    served = [pair for pair in range(pairs) if owners[pair] == worker]
    found = S.pair_of(INSTANCE_AT, worker)
    assert found in served or (found == worker and not served)
    assert found == worker or worker not in served


@given(ENABLED, OWNERS)
def test_lookups(enabled, owners):
    configure(enabled, owners)
    for pair in range(PAIRS_MAX):
        assert S.is_enabled(INSTANCE_AT, pair) == (pair in enabled)
        assert S.worker_of(INSTANCE_AT, pair) == owners[pair]


@given(st.lists(st.tuples(PAIRS, ENABLED, st.booleans(), st.integers(0, 30)), max_size=30))
def test_a_stream_stays_until_its_payload_has_arrived(steps):
    """But no longer than STRAY_MAX_MS, and never on a disabled pair."""
    configure(set(range(PAIRS_MAX)), [0] * PAIRS_MAX)
    ENTRY["tx_queue"] = ENTRY["strayed_ms"] = 0
    now_ms, strayed_ms = 1000, 0
    old = S.stream_queue_of(INSTANCE_AT, FLOW_AT, 0, 0, now_ms)
    for wanted, enabled, in_flight, pause_ms in steps:
        configure(enabled, [0] * PAIRS_MAX)
        ENTRY["tx_queue"] = wanted
        now_ms += pause_ms
        law = S.queue_of(INSTANCE_AT, FLOW_AT, 0)
        strays = law not in (old, -1) and in_flight and old in enabled
        strayed_ms = (strayed_ms or now_ms) if strays else 0
        stays = strays and now_ms - strayed_ms < STRAY_MAX_MS
        pair = S.stream_queue_of(INSTANCE_AT, FLOW_AT, 0, int(in_flight), now_ms)
        assert pair == (old if stays else law)
        strayed_ms = strayed_ms if stays else 0
        old = old if pair == -1 else pair


@pytest.mark.parametrize("now_ms", [5, 1 << 31, (1 << 32) + 5, (1 << 40) + 77])
def test_how_long_ago(now_ms):
    """Modulo 2^32; what another worker's clock has set ahead of ours was just now."""
    for ago_ms, found in ((0, 0), (1, 1), (49 * 86_400_000, 49 * 86_400_000), (-1, 0), (-9000, 0)):
        assert S.since(now_ms, (now_ms - ago_ms) % (1 << 32)) == found


def test_going_round_reaches_every_enabled_pair():
    """Connections from the host are spread: each starts the search after the one before."""
    configure({3, 4, 9, 31}, [0] * PAIRS_MAX)
    start, seen = 0, []
    for _ in range(8):
        pair = S.any_pair(INSTANCE_AT, 0, start)
        seen.append(pair)
        start = (pair + 1) & (PAIRS_MAX - 1)
    assert seen == [3, 4, 9, 31] * 2


@given(st.lists(PAIRS, max_size=20))
def test_the_last_packet_decides(pairs):
    ENTRY["tx_queue"] = 0
    for pair in pairs:
        S.sent_on(FLOW_AT, pair)
        assert ENTRY["tx_queue"] == pair


# --- moving ---------------------------------------------------------------------------------------

STEPS = st.tuples(
    PAIRS,
    st.sets(PAIRS, min_size=8),
    st.sampled_from([0, 3, SETTLED_MS, 60, CALM_MS, 6000]),
    st.sampled_from([0, 0, 0, 1, PAID_BYTES // 2, PAID_BYTES - 1, PAID_BYTES, (1 << 31) - 1]),
)
STARTS_MS = st.sampled_from([1000, (1 << 32) - 2000, (1 << 32) + 77])


@given(OWNERS, STARTS_MS, st.lists(STEPS, max_size=60))
def test_when_a_flow_moves(owners, now_ms, steps):
    """Once the guest has been sending elsewhere for SETTLED_MS, to a pair that is enabled; less
    and less often when that happens again and again, unless it has carried PAID_BYTES. The clock
    of 32 bits may turn over."""
    FLOW_BYTES[:] = bytes(len(FLOW_BYTES))
    home, away_ms, moved_ms, stay_ms, moves, carried = 0, None, None, 0, 0, 0
    for wanted, enabled, pause_ms, size in steps:
        configure(enabled, owners)
        ENTRY["tx_queue"] = wanted
        ENTRY["tx_bytes"] += size // 3
        ENTRY["rx_bytes"] += size - size // 3
        carried += size
        paid = PAID_BYTES <= carried % (1 << 32) < 1 << 31
        now_ms += pause_ms
        elsewhere = owners[wanted] != home and wanted in enabled
        away_ms = (now_ms if away_ms is None else away_ms) if elsewhere else None
        heir = S.heir_of(INSTANCE_AT, FLOW_AT, home, now_ms)
        # A moment in the entry may lie a millisecond before it came.
        away = -1 if away_ms is None else now_ms - away_ms
        stayed = 1 << 20 if moved_ms is None else now_ms - moved_ms
        if away < SETTLED_MS - 1:
            assert heir == STAYS
        elif away >= SETTLED_MS and stayed < stay_ms - 1 and not paid:
            assert heir == DAMPED
        elif away >= SETTLED_MS and (stayed >= stay_ms or paid):
            assert heir == owners[wanted]
        if heir < 0:
            continue
        S.arrived(FLOW_AT, now_ms)
        if stayed >= CALM_MS or paid:
            assert ENTRY["stay_ms"] == STAY_FIRST_MS
        elif stayed < CALM_MS - 1:
            assert ENTRY["stay_ms"] == min(2 * stay_ms, STAY_MAX_MS)
        moves += 1
        home, away_ms, moved_ms, stay_ms = heir, None, now_ms, ENTRY["stay_ms"]
        carried = 0
    assert ENTRY["moves"] == moves


def test_whose_a_flow_is_on_its_way():
    for home, heir, owner in ((0, 0, 0), (3, 0, 3), (3, 1, 0), (0, 32, 31)):
        ENTRY["home"], ENTRY["heir"] = home, heir
        assert S.owner_of(FLOW_AT) == owner
    ENTRY["heir"] = 0
