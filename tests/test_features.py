"""What is offered, and that a guest sees exactly that."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from backend import Backend
from driver import CSUM, GUEST_CSUM, HOST_TSO4, MQ
from guest import Guest, random_bytes
from minitcp import established, exchange
from world import World

from control.features import SERVED, offered
from control.vhost_user import VirtioFeature as F
from control.wanted import UsageError

GUEST_USO = F.GUEST_USO4 | F.GUEST_USO6
GUEST_TSO, HOST_TSO = F.GUEST_TSO4 | F.GUEST_TSO6, F.HOST_TSO4 | F.HOST_TSO6
ALL = sum(SERVED.values()) | F.VERSION_1


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("", 0),
        ("-event_idx", F.EVENT_IDX),
        ("-event_idx,-indirect_desc", F.EVENT_IDX | F.INDIRECT_DESC),
        ("-event_idx,event_idx", 0),
        ("-event_idx,+event_idx,", 0),
        ("none", ALL & ~F.VERSION_1),
        ("none,mrg_rxbuf", ALL & ~(F.VERSION_1 | F.MRG_RXBUF)),
        # what needs a feature that is gone goes, too (virtio 5.1.3.1)
        ("-guest_csum", F.GUEST_CSUM | GUEST_TSO | F.GUEST_ECN | GUEST_USO),
        ("-csum", F.CSUM | HOST_TSO | F.HOST_ECN | F.HOST_USO),
        ("-host_tso4", F.HOST_TSO4),
        ("-host_tso4,-host_tso6", HOST_TSO | F.HOST_ECN),
        ("none,host_tso4,-host_tso4", ALL & ~F.VERSION_1),
        ("host_tso4,none", ALL & ~F.VERSION_1),
        ("none,csum,host_tso4", ALL & ~(F.VERSION_1 | F.CSUM | F.HOST_TSO4)),
    ],
)
def test_offered(text: str, missing: int) -> None:
    assert offered(text, 1) == ALL & ~missing


def test_multiqueue_follows_the_pairs() -> None:
    assert offered("none", 2) == F.VERSION_1 | F.NET_MQ | F.CTRL_VQ


@pytest.mark.parametrize(
    "text", ["-nosuch", "--csum", "+-csum", "-", "version_1", "net_mq", "CSUM"]
)
def test_unknown_names(text: str) -> None:
    with pytest.raises(UsageError, match="--features: "):
        offered(text, 1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("none,host_tso4", "host_tso4 cannot be had without csum"),
        ("-csum,host_uso", "host_uso cannot be had without csum"),
        ("none,guest_csum,guest_ecn", "guest_ecn cannot be had without guest_tso4 or guest_tso6"),
    ],
)
def test_asked_for_without_what_it_needs(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=f"--features: {said}"):
        offered(text, 1)


@pytest.mark.parametrize("words", ["none", "-csum", "-guest_csum", "-mrg_rxbuf", "-host_tso4"])
def test_a_guest_without(
    make_backend: Callable[..., Backend], make_guest: Callable[..., Guest], world: World, words: str
) -> None:
    """The guest is offered what is left, and everything works with that."""
    there = make_backend("--queues", "1", f"--features={words}")
    guest = make_guest(to=there, features=offered(words, 1) | MQ | F.PROTOCOL_FEATURES)
    assert guest.drv.offered & ALL == offered(words, 1)
    if words == "-csum":
        assert not guest.drv.offered & (CSUM | HOST_TSO4) and guest.drv.offered & GUEST_CSUM
    for family in (4, 6):
        tcp, peer = established(guest, world, family)
        exchange(guest, tcp, peer, random_bytes(300_000, 1), random_bytes(300_000, 2))
