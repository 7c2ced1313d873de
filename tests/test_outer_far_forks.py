"""Forks that lie before all that is kept: the chain with more tokens wins, however high the other one is."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from outer_world import Node, World, round_spec

from shoal.protocol.virtual_time import run
from shoal.training.recovery.chain import find_rival
from shoal.training.recovery.policy import Target


@pytest.mark.parametrize(("low", "high"), [(8, 8), (8, 10), (9, 8), (11, 10)])
def test_who_has_fewer_tokens_switches_from_a_higher_chain_too(tmp_path: Path, low: int, high: int) -> None:
    """A restart keeps no entry before its snapshot: then nobody can tell where both chains parted."""

    async def main() -> None:
        async with World(2, round_spec(outer={"snapshot_every": 4})) as world:
            others, alone = list(world.nodes), world.node(2, 1, tmp_path)
            await alone.start()
            await world.rounds(2)
            split(world, [alone], others)
            for height in range(3, low + 1):
                alone.step(100_000)
                alone.step(100_000)
                await world.reach(height, [alone])
            await world.rounds(high - 2, others)
            await alone.stop()
            again = world.node(2, 2, tmp_path)
            world.sides[again.name] = [again]
            await again.start()
            assert (again.outer.height, others[0].outer.height) == (low, high)
            assert again.outer.entry(3) is None, "it does not know where the chains parted"
            head = again.outer.head
            join(world)
            async with asyncio.timeout(30.0):
                while not world.equal():
                    await asyncio.sleep(0.1)
            assert again.outer._replica.log.head_at(low) == head, "all go on from there"
            told = [[data["steps"] for kind, data in n.events if kind == "steps-lost"] for n in others]
            assert told == [[2 * (high - 2)]] * 2, "what is gone with a chain is said"
            assert not [kind for kind, _ in again.events if kind == "steps-lost"]
            await world.rounds(2)
            assert world.equal()

    run(main)


def test_both_sides_find_where_they_parted_though_one_keeps_little_before_it(tmp_path: Path) -> None:
    """Growing strides asked for more than the other keeps: one side compared totals, the other work."""

    async def main() -> None:
        async with World(2, round_spec(outer={"snapshot_every": 8})) as world:
            others, alone = list(world.nodes), world.node(2, 1, tmp_path)
            await alone.start()
            await world.rounds(9)
            split(world, [alone], others)
            for height in range(10, 16):
                alone.step()
                alone.step()
                await world.reach(height, [alone])
            await world.rounds(6, others)
            await alone.stop()
            again = world.node(2, 2, tmp_path)
            world.sides[again.name] = [again]
            await again.start()
            assert again.outer._replica.log.oldest_height == 8
            for mine, theirs in ((others[0], again), (again, others[0])):
                end = theirs.outer
                target = Target(end.height, end.head, end.state_root, (theirs.name,), end.tokens)
                rival = await find_rival(mine.outer.context, mine.outer._replica.log, target)
                assert rival.ancestor_height == 9

    run(main)


def split(world: World, *sides: list[Node]) -> None:
    """Each side sees itself."""
    world.sides = {node.name: side for side in sides for node in side}


def join(world: World) -> None:
    """All see all."""
    world.sides = {}
