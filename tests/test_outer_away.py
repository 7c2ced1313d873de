"""Who is away while what it contributed comes back on another chain finds its steps in once (P4).

The smaller side of a cut ends a round without one of its members. Its chain loses, and the others bring back
its entries, that one among them, which lists whoever is away.
"""

from __future__ import annotations

import asyncio

import pytest
from outer_faults import Faults
from outer_world import Node, World, round_spec
from partition_world import PartitionWorld
from test_outer_partitions import SIZE, partition_spec

from shoal.protocol.faults import Action, Arming
from shoal.protocol.identity import PeerId
from shoal.protocol.transport import Buffer
from shoal.protocol.virtual_time import run
from shoal.training.outer.messages import ContributedPart

SILENT_S = 20.0


def cut_world(seed: int, fragments: int, faults: Faults) -> PartitionWorld:
    spec = partition_spec(inner_steps=4, fragments=fragments)
    return PartitionWorld(7, spec, size=SIZE, seed=seed, wrap=faults.wrap, silent_s=SILENT_S)


async def away_from_a_round(world: PartitionWorld, faults: Faults) -> Node:
    """One of the three on the smaller side, frozen as its leader sends COMMIT; that side has decided then."""
    faults.hangs = False
    await world.train(15)
    small = world.nodes[:3]
    world.cut(small, world.nodes[3:])
    await world.train(2.0 * SILENT_S)
    found: list[Node] = []

    def strike(leader: PeerId) -> None:
        if not found:
            found.append(next(node for node in small if node.name != leader))
            world.freeze(found[0])

    for node in small:
        faults.arm_also(Arming("Commit.sending", Action.KILL, nth=1, who=node.name), strike)
    await world.train(4)
    faults.disarm()
    (away,) = found
    assert away.outer._member.round is not None
    assert max(node.outer.height for node in small) > away.outer.height
    return away


def brought_back(world: PartitionWorld, away: Node) -> list[int]:
    """Heights of re-entries that list it."""
    offered = away.outer._replica.offered
    return [entry.height for entry in world.chain() if entry.lost and offered.lists(entry.source())]


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("fragments", [1, 2])
def test_amid_the_round_itself(seed: int, fragments: int) -> None:
    """What was: it looked for its steps in the entry of that height alone, took them for not listed, and they
    were in twice."""
    faults = Faults()

    async def main() -> None:
        async with cut_world(seed, fragments, faults) as world:
            away = await away_from_a_round(world, faults)
            world.heal()
            await world.train(15)
            assert brought_back(world, away)
            world.thaw(away)
            await world.heal_whole()

    run(main)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("fragments", [1, 2])
def test_after_it_has_switched_itself(seed: int, fragments: int) -> None:
    """What was: it came by a snapshot, and never saw what re-entries before that brought back of its own."""
    faults = Faults()

    async def main() -> None:
        async with cut_world(seed, fragments, faults) as world:
            away = await away_from_a_round(world, faults)
            others = [node for node in world.nodes[:3] if node is not away]
            world.thaw(away)
            world.heal()
            world.cut(others, [away, *world.nodes[3:]])
            while not away.outer.status()["switches"]:
                await world.train(0.05)
            world.freeze(away)
            height = away.outer.height
            world.heal()
            await world.train(15)
            assert [found for found in brought_back(world, away) if found > height]
            world.thaw(away)
            await world.heal_whole()

    run(main)


@pytest.mark.parametrize("seed", [1, 2])
def test_while_later_rounds_list_it_in_a_few_parts_only(seed: int) -> None:
    """What was: with any later round that it sent something to it forgot what it had offered before."""
    faults = Faults()

    async def main() -> None:
        async with cut_world(seed, 1, faults) as world:
            away = await away_from_a_round(world, faults)
            others = [node for node in world.nodes[:3] if node is not away]
            offered = away.outer._replica.offered

            def tamper(peer: PeerId, header: object, payload: Buffer) -> tuple[object, Buffer]:
                cut_short = peer == away.name and isinstance(header, ContributedPart)
                return header, b"?" if cut_short else payload

            def partly(node: Node) -> bool:
                entry = node.outer.entry(node.outer.height)
                return entry is not None and 0 < len(offered.lists(entry)) < entry.parts

            world.thaw(away)
            world.heal()
            world.cut(others, [away, *world.nodes[3:]])
            faults.tamper = tamper
            async with asyncio.timeout(100):
                while not (away.outer.status()["switches"] and not away.outer.reentering and partly(away)):
                    await world.train(0.05)
            height = away.outer.height
            world.heal()
            await world.train(10)
            assert [found for found in brought_back(world, away) if found > height]
            faults.tamper = Faults().tamper
            await world.heal_whole()

    run(main)


def test_who_had_nothing_new_to_contribute_waits_for_nobody_when_it_comes_back() -> None:
    """What was: the log held all steps that it had offered, so it looked for an entry that lists them: 120 s
    long, and then it took for listed what earlier rounds had left out."""
    faults = Faults()

    async def main() -> None:
        spec = round_spec(outer={"snapshot_every": 2})
        async with World(4, spec, wrap=faults.wrap) as world:
            *others, away = world.nodes
            await world.rounds(1)
            faults.hangs = False
            faults.arm(ContributedPart, "receiving", lambda peer: world.freeze(away), who=away.name)
            await world.rounds(1, others, each=3)
            assert away.outer._member.round is not None
            await world.rounds(7, others, each=3)
            world.thaw(away)
            await away.reach(others[0].outer.height)
            assert world.equal()
            world.assert_every_step_is_in_once()

    async def in_time() -> None:
        async with asyncio.timeout(60.0):
            await main()

    run(in_time)
