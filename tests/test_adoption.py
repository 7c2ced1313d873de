"""Work behind a dead hop is adopted, not done again; whoever dies, freezes or lies."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
import torch
from pipeline_world import Peer, World, batches, small_spec

from shoal.protocol import virtual_time
from shoal.training.pipeline.jobs import ORPHAN_S, ORPHAN_SERVICES

SERVICE_S = 0.9  # a third each for forward, backward and weight gradient; callers hear Working every 0.5 s
STAGES = 4
Moment = Callable[[World], bool]


def paced(replicas: int = 2, adopt: bool = True) -> World:
    return World(small_spec(STAGES, adopt=adopt), replicas, service_s=lambda stage, number: SERVICE_S)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def working(world: World, stage: int) -> Peer | None:
    """Who has the (only) micro-batch at a stage, be it answered."""
    return next(
        (p for p in world.stage(stage) if p.hop is not None and (p.hop.jobs.working or p.hop.undecided)), None
    )


def pieces(world: World, stage: int) -> list[int]:
    """How many pieces of work the lanes of a stage have done."""
    return sorted(peer.lane.load().finished for peer in world.stage(stage))


def answered(world: World, stage: int) -> bool:
    return any(peer.hop is not None and peer.hop.undecided for peer in world.stage(stage))


def at_it(world: World, stage: int) -> bool:
    return any(peer.hop is not None and peer.hop.jobs.working for peer in world.stage(stage))


def events(world: World, kind: str) -> list[dict[str, object]]:
    return [data for peer in world.peers for what, data in peer.events if what == kind]


async def undisturbed() -> list[torch.Tensor]:
    """What one micro-batch adds to each stage's gradient."""
    async with paced() as world:
        await world.train(batches(world.spec, 1))
        return [summed(world, stage) for stage in range(STAGES)]


def summed(world: World, stage: int) -> torch.Tensor:
    found = [peer.weights.gradient for peer in world.stage(stage)]
    return torch.stack(found).sum(0)


MOMENTS: dict[str, Moment] = {
    "the next stage is at its forward": lambda world: at_it(world, 2),
    "the last stage is at it": lambda world: at_it(world, 3),
    "the last stage has answered": lambda world: answered(world, 3),
    "the next stage has answered": lambda world: answered(world, 2),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_hops_behind_a_dead_one_compute_a_micro_batch_once(moment: str) -> None:
    async def main() -> None:
        expected = await undisturbed()
        async with paced() as world:
            driver = world.stage(0)[0].driver
            assert driver
            training = asyncio.create_task(driver.train(batches(world.spec, 1)))
            await until(lambda: at_it(world, 2))
            await asyncio.sleep(0.25)  # the driver has heard of stage 2
            await until(lambda: MOMENTS[moment](world))
            dead = working(world, 1)
            assert dead
            world.kill(dead)
            await training
            for peer in world.peers:
                if peer.hop is not None and peer is not dead:
                    await peer.hop.drained()
            assert events(world, "adopt")
            for stage in (2, 3):
                assert pieces(world, stage) == [0, 3], "forward, backward, weight gradient of one replica"
                assert sum(peer.ledger.abandoned for peer in world.stage(stage)) == 0
            for stage in range(STAGES):
                assert sum(len(peer.ledger) for peer in world.stage(stage)) == 1
                assert torch.equal(summed(world, stage), expected[stage]), "equal weights, equal bits"

    virtual_time.run(main, limit_s=120.0)


def test_a_run_may_have_everything_done_again() -> None:
    async def main() -> None:
        async with paced(adopt=False) as world:
            training = one(world)
            await until(lambda: at_it(world, 3))
            await asyncio.sleep(0.5)
            dead = working(world, 1)
            assert dead
            world.kill(dead)
            await until(lambda: not at_it(world, 2) or bool(events(world, "reroute")))
            assert not events(world, "reroute"), "who stood behind the dead one gave up at once"
            await training
            await settled(world)
            assert not events(world, "adopt")
            assert sum(pieces(world, 2)) > 3
            check_once(world)

    virtual_time.run(main, limit_s=120.0)


def one(world: World) -> asyncio.Task[None]:
    """The first driver's one micro-batch."""
    driver = world.stage(0)[0].driver
    assert driver
    return asyncio.create_task(driver.train(batches(world.spec, 1)))


async def settled(world: World) -> None:
    for peer in world.peers:
        if peer.hop is not None and peer.name not in world.dead:
            await peer.hop.drained()


def check_once(world: World) -> None:
    for stage in range(STAGES):
        assert sum(len(peer.ledger) for peer in world.stage(stage)) == 1
    assert sum(peer.ledger.dropped for peer in world.peers) == 0
    assert all(driver.commits.lost == 0 for driver in world.drivers())


def test_a_frozen_hop_that_wakes_makes_nothing_count_again() -> None:
    """Its caller went on without it; the hop behind answers its replacement, and tells it so."""

    async def main() -> None:
        expected = await undisturbed()
        async with paced() as world:
            training = one(world)
            await until(lambda: at_it(world, 3))
            frozen = working(world, 1)
            assert frozen and frozen.hop
            world.network.freeze(frozen.name)
            await training
            world.network.thaw(frozen.name)
            await settled(world)
            assert events(world, "adopt")
            check_once(world)
            assert len(frozen.ledger) == 0
            assert not frozen.hop.jobs.working
            for stage in range(STAGES):
                assert torch.equal(summed(world, stage), expected[stage])

    virtual_time.run(main, limit_s=300.0)


def test_a_hop_cut_off_from_its_caller_alone_gives_way_to_its_replacement() -> None:
    async def main() -> None:
        async with paced() as world:
            training = one(world)
            await until(lambda: at_it(world, 3))
            replaced = working(world, 1)
            held = replaced.hop.jobs if replaced and replaced.hop else None
            assert replaced and held
            for peer in world.stage(2) + world.stage(3):
                world.slower[peer.name] = 8.0  # still at it when the cut is noticed
            world.network.cut(world.stage(0)[0].name, replaced.name)
            await until(lambda: bool(events(world, "retry")))
            await until(lambda: not held.working)  # the hop behind has told it
            world.network.heal(world.stage(0)[0].name, replaced.name)
            await training
            await settled(world)
            assert events(world, "adopt")
            assert pieces(world, 2) == [0, 3]
            assert pieces(world, 3) == [0, 3]
            check_once(world)

    virtual_time.run(main, limit_s=300.0)


def test_of_two_dead_hops_the_work_behind_the_second_is_adopted() -> None:
    async def main() -> None:
        async with paced() as world:
            training = one(world)
            await until(lambda: at_it(world, 3))
            await asyncio.sleep(0.5)  # the driver has heard of stage 3, too
            for stage in (1, 2):
                dead = working(world, stage)
                assert dead
                world.kill(dead)
            await training
            await settled(world)
            assert pieces(world, 3) == [0, 3]
            check_once(world)

    virtual_time.run(main, limit_s=300.0)


def test_what_was_adopted_once_can_be_adopted_again() -> None:
    async def main() -> None:
        async with paced(replicas=3) as world:
            for peer in world.stage(3):
                world.slower[peer.name] = 12.0
            training = one(world)
            await until(lambda: at_it(world, 3))
            for _ in range(2):
                await asyncio.sleep(1.2)  # its caller has heard who stands behind it
                dead = next(
                    p for p in world.stage(1) if p.name not in world.dead and p.hop and p.hop.jobs.working
                )
                world.kill(dead)
            await training
            await settled(world)
            assert pieces(world, 2) == pieces(world, 3) == [0, 0, 3]
            check_once(world)

    virtual_time.run(main, limit_s=300.0)


@pytest.mark.parametrize(("stage", "wait_s"), [(0, 0.2), (1, ORPHAN_S + (ORPHAN_SERVICES + 1) * SERVICE_S)])
def test_nobody_works_for_long_for_whom_nobody_waits(stage: int, wait_s: float) -> None:
    """A dead driver's micro-batch ends at once; one that nobody adopts after a while."""

    async def main() -> None:
        async with paced() as world:
            for peer in world.stage(3):
                world.slower[peer.name] = 100.0
            training = one(world)
            await until(lambda: at_it(world, 3))
            begun = asyncio.get_running_loop().time()
            for peer in world.stage(stage):
                world.kill(peer)
            if stage == 0:
                training.cancel()
            await until(lambda: not at_it(world, 2) and not at_it(world, 3))
            assert asyncio.get_running_loop().time() - begun < wait_s
            training.cancel()
            await asyncio.gather(training, return_exceptions=True)
            assert not sum(len(peer.ledger) for peer in world.peers)
            assert not sum(peer.ledger.dropped for peer in world.peers)

    virtual_time.run(main, limit_s=300.0)


def test_a_decision_is_found_with_the_hop_that_took_a_dead_ones_place() -> None:
    """The driver dies when only the adopting hop knows its decision; those behind ask it though they never
    heard of it."""

    async def main() -> None:
        async with paced() as world:
            driver = world.stage(0)[0]
            training = one(world)
            await until(lambda: at_it(world, 3))
            dead = working(world, 1)
            assert dead
            world.kill(dead)
            adopter = next(peer for peer in world.stage(1) if peer is not dead)
            behind = [working(world, stage) for stage in (2, 3)]
            for peer in behind:
                assert peer
                world.network.cut(driver.name, peer.name)
            await until(lambda: len(adopter.ledger) == 1)
            world.kill(driver)
            training.cancel()
            await asyncio.gather(training, return_exceptions=True)
            await settled(world)
            check_once(world)

    virtual_time.run(main, limit_s=300.0)
