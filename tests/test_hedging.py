"""Slow, stuck and frozen replicas: one hedge a chain, by the direct caller; nothing waits or counts twice."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from outer_faults import Faults
from pipeline_world import Peer, World, batches, small_spec

from shoal.protocol import virtual_time
from shoal.protocol.faults import Action, Arming
from shoal.training.lane import InlineLane
from shoal.training.pipeline.attempt import Answer, Attempt, Journey
from shoal.training.pipeline.compute import Boundary, Passage
from shoal.training.pipeline.downstream import Errand
from shoal.training.pipeline.messages import Link, MicroBatch
from shoal.training.pipeline.routing import HEDGE_PRIOR_LEAST_S, LANE_STALL_S, UNKNOWN_STALL_S
from shoal.training.pipeline.standing import STALE_S, STALE_SERVICES, Report
from shoal.training.spec import RunSpec
from shoal.training.work import Work

SERVICE_S = 0.03
STUCK = 1e5  # times slower: a piece of work takes longer than the test
SLOW = 20.0  # times: slow enough that the other replicas do everything
KNOWN = 60  # micro-batches after which callers know what is usual


def spec_of(stages: int) -> RunSpec:
    return small_spec(stages, mode="stream", in_flight=4)


async def trained(world: World, count: int) -> None:
    """Some micro-batches of all drivers, decided; commits to the stuck may be missing."""
    (tokens,) = batches(world.spec, 1)
    for driver in world.drivers():
        before = len(driver._ledger)
        feeding = asyncio.create_task(driver.run(lambda: _endless(tokens)))
        while len(driver._ledger) < before + count:
            await asyncio.sleep(0.05)
        driver.pause()
        while driver.in_flight:
            await asyncio.sleep(0.05)
        feeding.cancel()
        await asyncio.gather(feeding, return_exceptions=True)
        driver.resume()


def feeds(world: World) -> list[asyncio.Task[None]]:
    """All drivers, without end."""
    (tokens,) = batches(world.spec, 1)
    return [asyncio.create_task(driver.run(lambda: _endless(tokens))) for driver in world.drivers()]


async def ended(feeding: list[asyncio.Task[None]]) -> None:
    for task in feeding:
        task.cancel()
    await asyncio.gather(*feeding, return_exceptions=True)


async def _endless(tokens: torch.Tensor) -> torch.Tensor:
    return tokens


def hedges(peers: list[Peer]) -> list[dict[str, object]]:
    return [data for peer in peers for kind, data in peer.events if kind == "hedge"]


def applied_twice(world: World) -> list[object]:
    counts = Counter(
        (peer.stage, driver, n)
        for peer in world.peers
        for driver, spans in peer.ledger.applied().items()
        for start, stop in spans
        for n in range(start, stop)
    )
    return [name for name, count in counts.items() if count > 1]


def test_a_stalled_replica_is_hedged_once_by_its_direct_caller_only() -> None:
    async def main() -> None:
        async with World(spec_of(3), 2, service_s=lambda stage, number: SERVICE_S) as world:
            await trained(world, KNOWN)
            before = len(hedges(world.peers))
            stuck = world.stage(2)[0]
            world.slower[stuck.name] = STUCK
            await trained(world, 8)
            made = hedges(world.peers)[before:]
            to_stuck = [found for found in made if found["peer"] == stuck.name]
            assert to_stuck, "somebody waited for it"
            assert all(found["stage"] == 2 for found in to_stuck), "only stage 1 calls stage 2"
            by_driver = hedges(world.stage(0))
            assert not [found for found in by_driver if found in made], (
                "its stage was not the one that stalled"
            )
            per_chain = Counter(found["micro_batch"] for found in to_stuck)
            assert max(per_chain.values()) <= len(world.drivers()), "one for each chain"
            assert applied_twice(world) == []
            for stage in (0, 1):
                assert sum(len(peer.ledger) for peer in world.stage(stage)) == sum(
                    len(peer.ledger) for peer in world.stage(0)
                )

    virtual_time.run(main, limit_s=3600.0)


def test_a_chain_has_one_hedge_though_two_of_its_stages_stall() -> None:
    async def main() -> None:
        async with World(spec_of(3), 2, service_s=lambda stage, number: SERVICE_S) as world:
            await trained(world, KNOWN)
            for stage in (1, 2):
                world.slower[world.stage(stage)[0].name] = 40.0  # slow, not stuck: lanes move
            before = len(hedges(world.peers))
            await trained(world, 12)
            made = hedges(world.peers)[before:]
            assert {found["stage"] for found in made} == {1, 2}, "both stages had to hedge"
            drivers = {peer.name for peer in world.stage(0)}
            # The numbers of two drivers coincide: so many chains have that number.
            assert max(Counter(found["micro_batch"] for found in made).values()) <= len(drivers)
            assert applied_twice(world) == []

    virtual_time.run(main, limit_s=3600.0)


def test_a_lane_that_stands_still_while_its_loop_answers_is_given_up() -> None:
    """One early hedge does not tell a caller that a replica is stuck; the count of finished work does."""

    async def main() -> None:
        async with World(spec_of(2), 2, service_s=lambda stage, number: SERVICE_S) as world:
            await trained(world, 6)
            stuck, loop = world.stage(1)[0], asyncio.get_running_loop()
            world.slower[stuck.name], begun_s = STUCK, loop.time()
            training = asyncio.create_task(trained(world, 6))
            while not world.suspected:
                await asyncio.sleep(0.05)
            assert loop.time() < begun_s + 2 * LANE_STALL_S
            await training
            assert len(hedges(world.peers)) <= len(world.drivers())
            assert {peer for peer, _ in world.suspected} == {stuck.name}
            assert all("its lane finished nothing" in reason for _, reason in world.suspected)
            assert len(world.suspected) < 16, "asked ever more rarely"
            assert applied_twice(world) == []

    virtual_time.run(main, limit_s=3600.0)


@pytest.mark.parametrize("seed", [1, 2])
def test_nobody_is_hedged_for_the_time_that_the_stages_behind_take(seed: int) -> None:
    """A replica says only every half second who has a micro-batch. All of that in which it passed one on was
    held against it: where the stage behind was slow one in sixty was begun twice."""

    async def main() -> None:
        spec = spec_of(3)
        async with World(spec, 2, seed, lambda stage, number: 0.36 if stage == 2 else 0.12) as world:
            await world.train(batches(spec, 200))
            assert not hedges(world.stage(0))

    virtual_time.run(main, limit_s=3600.0)


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_slow_machine_is_not_taken_for_one_that_stands_still_while_nobody_knows_it(replicas: int) -> None:
    """What was: each piece of work over five seconds made its caller give it up and begin it elsewhere."""

    async def main() -> None:
        async with World(spec_of(2), replicas, service_s=lambda stage, number: 3 * 8.0) as world:
            await trained(world, 2)
            assert not world.suspected
            assert not any(kind == "retry" for peer in world.peers for kind, _ in peer.events)

    virtual_time.run(main, limit_s=3600.0)


def test_a_lane_that_hangs_in_its_first_piece_is_given_up_a_little_later() -> None:
    async def main() -> None:
        async with World(spec_of(2), 2, service_s=lambda stage, number: SERVICE_S) as world:
            stuck, loop = world.stage(1)[0], asyncio.get_running_loop()
            world.slower[stuck.name] = STUCK
            training = asyncio.create_task(trained(world, 6))
            while not world.suspected:
                await asyncio.sleep(0.05)
            assert loop.time() < UNKNOWN_STALL_S + 2.0
            await training
            assert {peer for peer, _ in world.suspected} == {stuck.name}

    virtual_time.run(main, limit_s=3600.0)


@pytest.mark.parametrize("pace", [1.0, 30.0])
def test_the_first_activation_of_all_is_hedged_when_it_is_lost_though_the_lane_works_for_others(
    pace: float,
) -> None:
    """Found on real processes: nothing was hedged before 20 answers, and what was lost waited for 60 s."""

    async def main() -> None:
        faults = Faults()
        service_s = SERVICE_S * pace
        async with World(spec_of(2), 2, service_s=lambda stage, number: service_s, wrap=faults.wrap) as world:
            driver = world.stage(0)[0]
            lost = Arming("Propagate.sent", Action.DROP, who=driver.name)
            faults.arm_also(lost)
            feeding = feeds(world)
            while not begins_with_four(driver.ledger.applied().get(f"{driver.name}/1", [(0, 0)])[0]):
                await asyncio.sleep(0.01)
            assert faults.has_struck(lost) is not None
            took_s = asyncio.get_running_loop().time()
            print(f"the first four of {service_s} s were decided after {took_s:.2f} s")
            assert took_s < HEDGE_PRIOR_LEAST_S + 8 * service_s
            assert len(hedges(world.peers)) == 1
            assert applied_twice(world) == []
            await ended(feeding)

    virtual_time.run(main, limit_s=3600.0)


@pytest.mark.parametrize("stood_s", [1.6, 2.1, 2.8, 6.0, 20.0])
def test_who_stood_still_itself_holds_no_silence_against_others(stood_s: float) -> None:
    """A laptop that sleeps, or a debugger. What was: two to three seconds of it, and those who were asked for
    something were given up; after more, those whose lane had just begun a piece of work."""

    async def main() -> None:
        async with World(spec_of(2), 2, service_s=lambda stage, number: 4.0 if stage else 0.1) as world:
            loop = asyncio.get_running_loop()
            assert isinstance(loop, virtual_time.VirtualTimeLoop)
            feeding = feeds(world)
            await asyncio.sleep(30.0)
            for number in range(10):
                await asyncio.sleep(5.0 + 3 * stood_s + 0.07 * number)
                loop.stand_still(stood_s)
            await asyncio.sleep(5.0)
            assert not world.suspected
            await ended(feeding)

    virtual_time.run(main, limit_s=3600.0)


@pytest.mark.parametrize("slow_pieces", [1, 6])
def test_a_slow_start_of_everybody_makes_no_storm_of_hedges(slow_pieces: int) -> None:
    """The first pieces of each lane take a hundred times as long: imports, compilers, cold disks."""

    async def main() -> None:
        async with World(spec_of(3), 2, service_s=lambda stage, number: SERVICE_S) as world:
            for peer in world.peers:
                assert isinstance(peer.lane, InlineLane)
                peer.lane._duration_s = slow_at_first(peer.lane._duration_s, slow_pieces, 300.0)
            feeding = feeds(world)
            while min(len(driver._ledger) for driver in world.drivers()) < 20:
                await asyncio.sleep(0.05)
            callers = len(world.stage(0)) + len(world.stage(1))
            print(f"{len(hedges(world.peers))} hedges by {callers} callers")
            assert len(hedges(world.peers)) <= callers, "one each, whatever they believe"
            assert not world.suspected
            await ended(feeding)

    virtual_time.run(main, limit_s=3600.0)


def begins_with_four(span: tuple[int, int]) -> bool:
    start, stop = span
    return start == 0 and stop >= 4


def slow_at_first(usual_s: Callable[[Work], float], pieces: int, times: float) -> Callable[[Work], float]:
    factors = itertools.chain(itertools.repeat(times, pieces), itertools.repeat(1.0))
    return lambda kind: usual_s(kind) * next(factors)


def test_a_frozen_replica_is_hedged_before_it_counts_as_silent() -> None:
    """Re-routed within two seconds of the freeze."""

    async def main() -> None:
        async with World(spec_of(2), 2, service_s=lambda stage, number: SERVICE_S) as world:
            await trained(world, KNOWN)
            frozen = world.stage(1)[0]
            driver = world.stage(0)[0]
            assert driver.driver is not None
            loop = asyncio.get_running_loop()
            world.network.freeze(frozen.name)
            begun, before = loop.time(), len(driver.ledger)
            (tokens,) = batches(world.spec, 1)
            training = asyncio.create_task(driver.driver.train([tokens] * 4))
            while len(driver.ledger) < before + 4:
                await asyncio.sleep(0.01)
            print(f"decided {loop.time() - begun:.2f} s after the freeze")
            assert loop.time() - begun < 2.0
            training.cancel()
            await asyncio.gather(training, return_exceptions=True)
            await driver.driver.commits.close()

    virtual_time.run(main, limit_s=3600.0)


def test_a_replica_ten_times_slower_gets_a_tenth_and_slows_nobody() -> None:
    async def main() -> None:
        async with World(spec_of(2), 3, service_s=lambda stage, number: SERVICE_S) as world:
            loop = asyncio.get_running_loop()

            async def rate() -> float:
                begun, before = loop.time(), sum(len(peer.ledger) for peer in world.stage(0))
                await trained(world, 100)
                return (sum(len(p.ledger) for p in world.stage(0)) - before) / (loop.time() - begun)

            await trained(world, KNOWN)
            world.kill(world.stage(1)[2])
            without = await rate()
            world.slower[world.stage(1)[1].name] = 10.0
            await trained(world, 30)
            slow = world.stage(1)[1]
            before, decided = len(slow.ledger), sum(len(peer.ledger) for peer in world.stage(0))
            with_slow = await rate()
            share = (len(slow.ledger) - before) / (sum(len(p.ledger) for p in world.stage(0)) - decided)
            print(f"{without:.1f} a second before, {with_slow:.1f} with a slow one, which did {share:.3f}")
            assert share < 0.2
            assert with_slow >= 0.9 * without / 2, "the other one alone makes half"

    virtual_time.run(main, limit_s=3600.0)


def test_a_replica_that_is_quick_again_gets_its_share_again() -> None:
    """Nobody asks the slow one while others are quicker: the callers have to find out by themselves."""

    async def main() -> None:
        async with World(spec_of(2), 2, service_s=lambda stage, number: SERVICE_S) as world:
            once_slow = world.stage(1)[1]
            world.slower[once_slow.name] = SLOW
            await trained(world, KNOWN)
            world.slower.clear()
            stale_s = max(STALE_S, STALE_SERVICES * SLOW * SERVICE_S)
            await trained(world, math.ceil(stale_s / SERVICE_S))
            before, decided = len(once_slow.ledger), sum(len(peer.ledger) for peer in world.stage(0))
            await trained(world, 100)
            share = (len(once_slow.ledger) - before) / (sum(len(p.ledger) for p in world.stage(0)) - decided)
            print(f"share of the replica that was {SLOW:g} times slower: {share:.3f}")
            assert share > 0.3

    virtual_time.run(main, limit_s=36000.0)


def test_who_gives_up_while_the_slower_of_two_is_told_leaves_no_attempt_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An attempt that stayed on the books would take a place at that replica for good."""
    asked: list[Attempt] = []

    async def run(self: Attempt, *_: object) -> Answer:
        asked.append(self)
        if len(asked) == 1:
            self.stalled.set()
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0.1)  # it takes nothing, not even the last word
        return Answer((), 0.0, memoryview(b""), "bfloat16", Report(0.0, 0.0, 0.0), 0.0, 0.0)

    async def main() -> None:
        async with World(spec_of(2), 2) as world:
            driver, me = world.drivers()[0], world.stage(0)[0]
            downstream = driver._downstream
            assert downstream is not None
            passage = Passage(batches(world.spec, 1)[0])
            driver._compute.forward(passage)
            boundary = Boundary(driver._compute, me.lane, passage)
            chain = (Link(0, me.name, 0),)
            errand = Errand(MicroBatch(me.name, 1, 0), chain, 2, boundary, 100.0, Journey(1))
            monkeypatch.setattr(Attempt, "run", run)
            monkeypatch.setattr(Attempt, "is_late", lambda self: True)

            async def use(answer: Answer) -> None:
                raise AssertionError("nobody wants it any more")

            asking = asyncio.create_task(downstream.propagate(errand, use))
            while len(asked) < 2:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.05)  # the second has answered, the first is still being told
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            assert set(downstream.successors.under_way().values()) == {0}

    virtual_time.run(main)
