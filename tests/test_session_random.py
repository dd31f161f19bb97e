"""vhost-user sessions against anything: random messages, sizes, payloads, descriptors, orders.

Whatever comes: no exception, no descriptor lost or closed twice, one answer exactly where one is
due, and the workers have what the session says they have.
"""

from __future__ import annotations

from typing import Any

from conversation import (
    FEATURES,
    GPA,
    NO_FD,
    NUMBERS,
    REPLY_ACK,
    SIZE,
    SPLIT,
    UVA,
    VERSION_1,
    Conversation,
    MiB,
    addr,
    region,
    single,
    state,
    table,
    u64,
)
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from control.effects import (
    Ack,
    Close,
    Effect,
    MemoryChanged,
    Nack,
    Reply,
    ReplyVringBase,
    RingChanged,
    RingStop,
)
from control.session import Offer
from control.vhost_user import Header, Message
from dataplane.commands import ring_areas

RINGS = 4
PACKED = 1 << 34
OWN_REPLY = {1, 11, 15, 17, 22, 24, 26, 28, 30, 31, 36, 40, 41, 42, 43, 44}

index = st.sampled_from([*range(RINGS)] * 8 + [RINGS, 255, 2**32 - 1])
regions = st.sampled_from(
    [
        region(),
        region(size=SIZE // 2),
        region(GPA + SIZE, SIZE, UVA + SIZE),
        region(0, MiB, 0),
        region(size=2**63),
        region(0, 2 * SIZE, UVA, offset=4096),
    ]
)
states = st.builds(state, index, st.sampled_from([0, 1, 2, 256, 100, 32768, 32769, 0x80008000]))
addrs = st.builds(
    lambda i, at, flags: addr(i, at, flags),
    index,
    st.sampled_from([UVA, UVA + MiB, UVA + SIZE - 4096, UVA + 8, 0, 2**64 - 0x4000]),
    st.sampled_from([0, 0, 0, 1]),
)
tables = st.lists(regions, max_size=3).map(lambda some: table(*some))
features = st.sampled_from([SPLIT, SPLIT, SPLIT | PACKED, VERSION_1, 0, FEATURES, 2**64 - 1])
numbers = st.builds(
    u64, features | st.sampled_from([0, 1, 8, 9, 0xF, 1500, NO_FD, NO_FD | 1, 0x200])
)

SENSIBLE: dict[str, Any] = {
    "SET_FEATURES": features.map(u64),
    "SET_MEM_TABLE": tables,
    "ADD_MEM_REG": regions.map(single),
    "REM_MEM_REG": regions.map(single),
    "SET_VRING_ADDR": addrs,
    **{
        f"{verb}_VRING_{noun}": states
        for verb, noun in (
            ("SET", "NUM"),
            ("SET", "BASE"),
            ("GET", "BASE"),
            ("SET", "ENABLE"),
        )
    },
    **{f"SET_VRING_{noun}": index.map(lambda i: u64(i & 0xFF)) for noun in ("KICK", "CALL", "ERR")},
    "SET_PROTOCOL_FEATURES": st.sampled_from([u64(REPLY_ACK), u64(0x1A03D)] * 4 + [u64(0)]),
    "SET_STATUS": numbers,
    "NET_SET_MTU": numbers,
    "SEND_RARP": numbers,
    **{
        name: st.just(b"")
        for name in (
            "GET_FEATURES",
            "GET_QUEUE_NUM",
            "GET_STATUS",
            "RESET_DEVICE",
            "RESET_OWNER",
            "SET_BACKEND_REQ_FD",
        )
    },
}
USUAL_FDS = dict.fromkeys(
    ("SET_VRING_KICK", "SET_VRING_CALL", "SET_VRING_ERR", "SET_BACKEND_REQ_FD", "ADD_MEM_REG"), 1
)


@st.composite
def sensible(draw: Any) -> tuple[Message, list[int | None]]:
    """A message a front-end might send, with as many descriptors as belong to it."""
    name = draw(st.sampled_from(sorted(SENSIBLE)))
    payload = draw(SENSIBLE[name])
    count = (len(payload) - 8) // 32 if name == "SET_MEM_TABLE" else USUAL_FDS.get(name, 0)
    sizes = draw(st.lists(st.sampled_from([4 * SIZE, None, MiB]), min_size=count, max_size=count))
    flags = draw(st.sampled_from([9, 9, 9, 1]))  # without NEED_REPLY a refusal ends it all
    header = Header(NUMBERS[name], flags, len(payload))
    return Message(header, payload), sizes


@st.composite
def senseless(draw: Any) -> tuple[Message, list[int | None]]:
    """Anything: numbers, flags, sizes and descriptors that do not belong together."""
    request = draw(st.sampled_from(range(0, 50)) | st.integers(0, 2**32 - 1))
    payload = draw(st.binary(max_size=64) | numbers | states | addrs | tables | regions.map(single))
    size = draw(st.just(len(payload)) | st.integers(0, 2**32 - 1))
    flags = draw(st.sampled_from([1, 9, 9, 1, 0xFFFFFFF9, 5, 0, 3]))
    sizes = draw(st.lists(st.sampled_from([SIZE, None]), max_size=3))
    return Message(Header(request, flags, size), payload), sizes


def ready() -> list[tuple[Message, list[int | None]]]:
    """What brings four rings up, for chance to start from."""
    lines: list[tuple[str, bytes, list[int | None]]] = [
        ("SET_PROTOCOL_FEATURES", u64(REPLY_ACK), []),
        ("SET_FEATURES", u64(SPLIT), []),
        ("SET_MEM_TABLE", table(region()), [SIZE]),
    ]
    for ring in range(RINGS):
        lines.append(("SET_VRING_NUM", state(ring, 256), []))
        lines.append(("SET_VRING_ADDR", addr(ring), []))
        lines.append(("SET_VRING_KICK", u64(ring), [None]))
    return [(Message(Header(NUMBERS[n], 1, len(p)), p), fds) for n, p, fds in lines]


def held(said: Conversation) -> set[int]:
    """Every descriptor the session says it has."""
    device = said.session.device
    fds = [device.backend_fd, *(r.fd for r in device.memory)]
    fds += [fd for r in device.rings for fd in (r.kick_fd, r.call_fd, r.err_fd)]
    assert len([fd for fd in fds if fd is not None]) == len(set(fds) - {None})
    return {fd for fd in fds if fd is not None}


def check_rings(said: Conversation) -> None:
    """A ring runs only with all it needs, and the workers have just the rings that run."""
    device = said.session.device
    assert set(said.worker) == said.running
    for ring in device.rings:
        if not ring.started:
            continue
        assert device.features & VERSION_1 and ring.kick_fd is not None and ring.problem == ""
        assert said.worker[ring.index] == ring
        places = (ring.desc_uva, ring.avail_uva, ring.used_uva)
        areas = ring_areas(ring.num, bool(device.features & PACKED))
        for at, (size, alignment) in zip(places, areas, strict=True):
            assert at is not None and at % alignment == 0
            assert any(r.uva <= at and at + size <= r.uva + r.size for r in said.mapped)


def check_answers(said: Conversation, message: Message, heard: list[Effect], acks: bool) -> None:
    answers = [e for e in heard if isinstance(e, Ack | Nack | Reply | ReplyVringBase)]
    assert len(answers) == len(said.sent) <= 1
    if any(isinstance(effect, Close) for effect in heard):
        assert isinstance(heard[-1], Close) and heard[-1].reason and not answers
        return
    request = message.header.request
    if request in OWN_REPLY:
        assert len(answers) == 1 and not isinstance(answers[0], Ack)
    else:
        assert len(answers) == (acks and message.header.need_reply)
    for data in said.sent:
        sent = Header.decode(data[:12])
        assert (sent.request, sent.flags, sent.size) == (request, 5, len(data) - 12)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from([True, True, True, False]),
    st.lists(sensible(), max_size=30),
    st.lists(sensible() | senseless(), max_size=10),
)
def test_anything_may_come(
    begun: bool,
    likely: list[tuple[Message, list[int | None]]],
    unlikely: list[tuple[Message, list[int | None]]],
) -> None:
    said = Conversation(Offer(FEATURES, RINGS // 2))
    served = 0
    for message, sizes in (ready() if begun else []) + likely + unlikely:
        over = said.session.closed
        said.says_message(message, *(said.fds.new(size) for size in sizes))
        heard = said.listens()
        assert set(said.fds.open) == held(said)
        check_rings(said)
        served += not over
        if over:
            assert heard == [] == said.sent
            continue
        # A message that changes what is agreed is answered by the new agreement.
        agreed = bool(said.session.device.protocol_features & REPLY_ACK)
        check_answers(said, message, heard, agreed)
    event(f"served {served // 10 * 10} messages or more")
    event(f"running {len(said.running)}, {'closed' if said.session.closed else 'open'}")
    said.hangs_up().listens()
    assert said.fds.open == {} and said.worker == {} and said.mapped == ()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(sensible(), max_size=30), st.randoms(use_true_random=False))
def test_any_effect_may_fail(script: list[tuple[Message, list[int | None]]], dice: Any) -> None:
    """Workers that cannot map, start or stop: the session and they still agree on what runs."""

    def fails(effect: Effect) -> bool:
        return isinstance(effect, MemoryChanged | RingChanged) and dice.random() < 0.3

    said = Conversation(Offer(FEATURES, RINGS // 2), fails)
    for message, sizes in ready() + script:
        said.says_message(message, *(said.fds.new(size) for size in sizes))
        said.listens()
        assert set(said.fds.open) == held(said)
        assert said.running == set(said.worker)
    said.hangs_up().listens()
    assert said.fds.open == {}


@given(st.permutations(["FEATURES", "MEM", "NUM", "BASE", "ADDR", "ENABLE"]), st.integers(0, 6))
def test_a_ring_starts_in_any_order_once(order: list[str], kick_at: int) -> None:
    """With the base said before all else is there: after the start it would mean a new start."""
    said = Conversation(Offer(FEATURES, RINGS // 2))
    order = [*order[:kick_at], "KICK", *order[kick_at:]]
    if set(order[order.index("BASE") :]) <= {"BASE", "ENABLE"}:
        order.remove("BASE")
        order.insert(0, "BASE")
    lines: dict[str, tuple[str, bytes, list[int]]] = {
        "FEATURES": ("SET_FEATURES", u64(SPLIT), []),
        "MEM": ("SET_MEM_TABLE", table(region()), [said.fds.new(SIZE)]),
        "NUM": ("SET_VRING_NUM", state(2, 256), []),
        "BASE": ("SET_VRING_BASE", state(2, 42), []),
        "ADDR": ("SET_VRING_ADDR", addr(2), []),
        "KICK": ("SET_VRING_KICK", u64(2), [said.fds.new()]),
        "ENABLE": ("SET_VRING_ENABLE", state(2, 1), []),
    }
    heard: list[Effect] = []
    for key in order:
        name, payload, fds = lines[key]
        said.says(name, payload, *fds)
        heard += [e for e in said.listens() if not isinstance(e, MemoryChanged)]
    assert said.working == {2} and said.worker[2].base == 42
    assert heard == [RingChanged(2)] * (2 if order[-1] == "ENABLE" else 1)


def test_what_the_random_tests_assume() -> None:
    """The prologue does bring four rings up, and a hang-up then stops them."""
    said = Conversation(Offer(FEATURES, RINGS // 2))
    for message, sizes in ready():
        said.says_message(message, *(said.fds.new(size) for size in sizes)).listens()
    assert said.running == {0, 1, 2, 3}
    said.hangs_up().hears(*(RingStop(ring) for ring in range(RINGS)), MemoryChanged())
