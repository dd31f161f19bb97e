"""A pair changes its worker while frames are under way: none is lost, none comes twice, and flows
follow."""

from __future__ import annotations

import random
from collections.abc import Callable

from driver import BASIC, GUEST_CSUM, MQ
from formats import all_formats
from guest import Guest, random_bytes
from minitcp import established, exchange
from world import World

PAIRS, WORKERS, TURNS = 4, 2, 10
UP, DOWN = random_bytes(4000, 1), random_bytes(60_000, 2)


@all_formats
def test_pairs_change_their_workers(
    make_local: Callable[..., Guest], world: World, rings: int
) -> None:
    """At random moments, with data both ways on every pair."""
    features = BASIC | GUEST_CSUM | MQ | rings
    guest = make_local(workers=WORKERS, pairs=PAIRS, features=features)
    ends = [established(guest, world, 4, pair=pair) for pair in range(PAIRS)]
    chance = random.Random(3)
    for _ in range(TURNS):
        for tcp, peer in ends:
            tcp.send(UP)
            peer.send(DOWN)
        for _ in range(chance.randrange(4)):
            guest.drv.breathe(chance.randrange(WORKERS))
        pair = chance.randrange(PAIRS)
        guest.drv.assign(pair, 1 - guest.drv.owner(pair))
    guest.pump(
        lambda: all(
            len(peer.inbox) >= TURNS * len(UP) and len(tcp.received) >= TURNS * len(DOWN)
            for tcp, peer in ends
        ),
        20,
        "all of it",
    )
    for tcp, peer in ends:
        assert bytes(peer.inbox) == TURNS * UP and bytes(tcp.received) == TURNS * DOWN
        tcp.check()
    for index in range(2 * PAIRS):
        lost = {name: guest.drv.drops(name, index) for name in ("no_queue", "handoff_full")}
        assert not any(lost.values()), f"ring {index}: {lost}"


def test_a_flow_follows_its_pair(make_local: Callable[..., Guest], world: World) -> None:
    """Its home becomes the worker that has the pair now; what waits for receive buffers, too."""
    guest = make_local(workers=WORKERS, pairs=PAIRS, features=BASIC | GUEST_CSUM | MQ)
    tcp, peer = established(guest, world, 4, pair=2)
    exchange(guest, tcp, peer, UP, DOWN)
    guest.drv.settle()
    (flow,) = guest.drv.flows()
    assert flow["home"] == 0
    guest.drv.assign(2, 1)
    for _ in range(3):
        exchange(guest, tcp, peer, UP, DOWN)
        guest.pump(timeout=0.02)  # the flow has settled there
    assert flow["home"] == 1 and set(tcp.pairs_seen[-10:]) == {2}
