"""A replica that recovers the moment its process is there, before anybody was heard: it waits for that."""

from __future__ import annotations

import asyncio

import pytest
from trainer_world import RandomFeed, Replica, TrainerWorld, round_spec

from shoal.protocol import virtual_time

JOINER = 4


async def swarm_with_a_joiner(world: TrainerWorld) -> Replica:
    """Two stages of two, some rounds on."""
    for number in range(JOINER):
        await world.add(number, number % 2)
    await world.heights(3)
    return world.make(JOINER)


@pytest.mark.parametrize(("stage", "latency_s"), [(0, 0.005), (1, 0.6)])
def test_it_begins_where_its_group_is(stage: int, latency_s: float) -> None:
    """What was: it served and trained the weights of the genesis until the first beat came."""

    async def main() -> None:
        async with TrainerWorld(round_spec(2), latency_s=latency_s, slower=20.0) as world:
            joiner = await swarm_with_a_joiner(world)
            height = min(replica.trainer.outer.height for replica in world.group(stage))
            await joiner.start(stage)
            world.replicas[JOINER] = joiner
            await joiner.train_at(stage, world._duration_s, RandomFeed(world.spec, JOINER))
            assert joiner.trainer.outer.height >= height

    virtual_time.run(main)


def test_it_does_not_begin_a_lost_stage_anew() -> None:
    """What was: it heard nobody tell of entries, so there was nothing to lose, and the run went on."""

    async def main() -> None:
        async with TrainerWorld(round_spec(2), latency_s=0.1, slower=20.0) as world:
            joiner = await swarm_with_a_joiner(world)
            await world.kill(1)
            await world.kill(3)
            await asyncio.sleep(1.0)
            await joiner.start(1)
            world.replicas[JOINER] = joiner
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(15.0):
                    await joiner.train_at(1, world._duration_s, None)
            assert joiner.heard("stage-lost") and not joiner.online

    virtual_time.run(main)


def test_the_first_of_a_run_waits_for_nobody() -> None:
    async def main() -> None:
        async with TrainerWorld(round_spec(1)) as world:
            first = world.make(0)
            await first.start(0)
            world.replicas[0] = first
            async with asyncio.timeout(1.0):
                await first.train_at(0, world._duration_s, RandomFeed(world.spec, 0))

    virtual_time.run(main)
