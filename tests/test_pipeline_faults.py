"""Every message of the pipeline, at each of its points, struck by each action, in virtual time: P2, P3, P5.

Whatever is struck: the drivers that live finish, no stage applies a micro-batch twice, and what is missing at
a stage is counted by the driver that decided it or by the hop that gave it up. Nothing is missing at all
unless somebody died or lied. `soak/pipeline_faults.py` does the same to real processes.
"""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from outer_faults import Faults
from pipeline_world import Peer, World, batches, small_spec

from shoal.protocol import virtual_time
from shoal.protocol.faults import PLACES, Action, Arming
from shoal.protocol.identity import PeerId

MESSAGES = ("Propagate", "Activations", "Working", "Gradient", "CommitChain", "QueryChain", "Verdict")
ADOPTION = ("Adopt", "Adopted")  # only where somebody else has failed before
HARMLESS = {Action.FREEZE, Action.DELAY, Action.DROP}
FROZEN_S, DELAY_S = 10.0, 3.0
CUT_AT_S = 0.15  # in the midst of it
ADOPTED_AT_S = 2.0  # callers have heard who stands behind
EACH, EACH_ADOPTING = 12, 6  # micro-batches of a driver
LIMIT_S = 120.0  # virtual; a decision that a partition hides is given up after 30

CASES = [
    (f"{message}.{place}", action)
    for message in (*MESSAGES, *ADOPTION)
    for place in (PLACES if message in MESSAGES else ("sending", "received"))
    for action in Action
    if not (action is Action.CORRUPT and place == "sent")
    and not (action is Action.DELAY and message in ADOPTION)  # as a freeze
]


def named(world: World, peer: PeerId) -> Peer:
    return next(found for found in world.peers if found.name == peer)


def applied(peers: list[Peer]) -> Counter[tuple[str, int]]:
    """How often each micro-batch was applied by these peers."""
    return Counter(
        (driver, number)
        for peer in peers
        for driver, spans in peer.ledger.applied().items()
        for start, stop in spans
        for number in range(start, stop)
    )


@pytest.mark.parametrize(("point", "action"), CASES, ids=lambda value: str(getattr(value, "value", value)))
def test_nothing_counts_twice_and_what_is_missing_is_counted(point: str, action: Action) -> None:
    async def main() -> None:
        faults = Faults()
        spec = small_spec(3, in_flight=4)
        adoption = point.startswith(ADOPTION)
        each = EACH_ADOPTING if adoption else EACH
        slow = adoption or point.startswith("Working")  # only a hop that takes long says so
        service_s = (lambda stage, number: 0.9) if slow else None
        async with World(spec, 3 if adoption else 2, service_s=service_s, wrap=faults.wrap) as world:
            loop = asyncio.get_running_loop()

            def strike(peer: PeerId) -> None:
                if action is Action.KILL:
                    world.kill(named(world, peer))
                else:
                    world.network.freeze(peer)
                    loop.call_later(FROZEN_S, thaw, peer)

            def thaw(peer: PeerId) -> None:
                world.network.thaw(peer)
                faults.wake()

            if adoption:
                first = world.stage(1)[0].name
                loop.call_later(ADOPTED_AT_S, world.network.freeze, first)
                loop.call_later(ADOPTED_AT_S + FROZEN_S, world.network.thaw, first)
            if point.startswith("QueryChain"):  # a hop asks only when it hears of no decision
                ends = world.stage(0)[0].name, world.stage(2)[0].name
                loop.call_later(CUT_AT_S, world.network.cut, *ends)
                loop.call_later(CUT_AT_S + FROZEN_S, world.network.heal, *ends)
            seconds = DELAY_S if action is Action.DELAY else 0.0
            arming = Arming(point, action, nth=1 if slow or "Query" in point else 5, seconds=seconds)
            faults.arm_also(arming, strike)
            training = [
                asyncio.create_task(peer.driver.train(batches(spec, each, seed)))
                for seed, peer in enumerate(world.stage(0))
                if peer.driver is not None
            ]
            for peer, task in zip(world.stage(0), training, strict=True):
                while not task.done() and peer.name not in world.dead:
                    await asyncio.sleep(0.1)
                task.cancel()
            await asyncio.gather(*training, return_exceptions=True)
            for peer in world.peers:
                if peer.hop is not None and peer.name not in world.dead:
                    await peer.hop.drained()
            hit = faults.has_struck(arming)
            assert hit is not None, "nothing passed that point"
            check(world, action, each)

    virtual_time.run(main, limit_s=LIMIT_S)


def check(world: World, action: Action, each: int) -> None:
    """P2 over the whole world, the dead one's ledger included."""
    drivers = [peer for peer in world.stage(0) if peer.driver is not None]
    decided = applied(drivers)
    for peer in drivers:
        if peer.name not in world.dead:
            assert len(peer.ledger) == each, "it went on"
    lost = sum(peer.driver.commits.lost for peer in drivers if peer.driver is not None)
    counted = lost + sum(peer.ledger.dropped for peer in world.peers)
    missing = 0
    for stage in (1, 2):
        found = applied(world.stage(stage))
        assert not found or max(found.values()) == 1, f"stage {stage} applied twice"
        assert found.keys() <= decided.keys(), "applied without a decision"
        missing += len(decided) - len(found)
    assert missing <= counted
    if action in HARMLESS:
        assert missing == 0
