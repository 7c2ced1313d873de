"""A joiner finds its stage as soon as it knows who is there, and no sooner. Virtual time throughout."""

from __future__ import annotations

import asyncio

import pytest
from trainer_world import TrainerWorld, round_spec

from shoal.protocol.virtual_time import run

SOON_S = 0.9  # a first look, 0.4 to wait for those who may dial, a stream, and 0.3 in which nobody new comes


async def placed(world: TrainerWorld, *numbers: int) -> tuple[list[int], float]:
    """The stages that these joiners take, all of whom begin now, and in how many seconds the last has its."""
    loop = asyncio.get_running_loop()
    begun_s = loop.time()
    joiners = [world.make(number) for number in numbers]
    for joiner in joiners:
        world.replicas[joiner.number] = joiner
        await joiner.start()
    stages = await asyncio.gather(*(joiner.settle() for joiner in joiners))
    assert all(joiner.members.lookups > 1 for joiner in joiners), "one look may show a part"
    return [*stages], loop.time() - begun_s


@pytest.mark.parametrize("number", range(5, 11))
def test_a_joiner_takes_the_place_of_one_that_was_killed_just_before(number: int) -> None:
    """It was told to wait a second for those of a lower id to dial it, and the dead do not."""

    async def main() -> None:
        async with TrainerWorld(round_spec(2), seed=number, latency_s=0.02) as world:
            for old in range(4):
                await world.add(old, old % 2)
            killed = number % 4
            await world.kill(killed)
            stages, seconds = await placed(world, number)
            assert stages == [killed % 2]
            assert seconds < SOON_S

    run(main)


@pytest.mark.parametrize("number", range(5, 9))
def test_a_joiner_waits_until_it_knows_of_a_silent_one_that_it_is_gone(number: int) -> None:
    """A machine without power refuses no connection; its record looks as those of the others do."""

    async def main() -> None:
        async with TrainerWorld(round_spec(2), seed=number, latency_s=0.02) as world:
            for old in range(4):
                await world.add(old, old % 2)
            silent = number % 4
            world.network.freeze(world.replicas[silent].peer)
            stages, _ = await placed(world, number)
            assert stages == [silent % 2]

    run(main)


@pytest.mark.parametrize("seed", range(4))
def test_two_that_join_at_once_take_a_place_each(seed: int) -> None:
    async def main() -> None:
        async with TrainerWorld(round_spec(2), seed=seed, latency_s=0.02) as world:
            for old in range(4):
                await world.add(old, old % 2)
            await world.kill(seed % 2)
            await world.kill(3 - seed % 2)
            stages, _ = await placed(world, 5 + 2 * seed, 6 + 2 * seed)
            assert sorted(stages) == [0, 1]

    run(main)


def test_who_knows_nobody_does_not_wait_for_ever() -> None:
    """The directory may be cut: then a joiner takes what looks neediest, as ever."""

    async def main() -> None:
        async with TrainerWorld(round_spec(2), latency_s=0.02) as world:
            stages, seconds = await placed(world, 1)
            assert (stages, seconds) == ([0], 1.0)

    run(main)
