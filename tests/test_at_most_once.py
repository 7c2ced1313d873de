"""P2: a weight gradient counts at most once; what a death or a cut makes missing is counted."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pipeline_world import World, batches, small_spec

from shoal.protocol import virtual_time
from shoal.protocol.errors import Busy
from shoal.protocol.identity import PeerId
from shoal.training.pipeline.compute import Passage
from shoal.training.pipeline.messages import APPLIED, TENTATIVE, UNKNOWN, Link, MicroBatch, Verdict
from shoal.training.pipeline.settlement import Outcome, admits, outcome
from shoal.training.spec import RunSpec

DRIVER, MIDDLE, OWN = (
    Link(stage, PeerId(name.ljust(52, "1")), stage) for stage, name in enumerate(("driver", "middle", "own"))
)
THIS, OTHER = (DRIVER, MIDDLE, OWN), (DRIVER, MIDDLE)
TTL_S = 30.0


def said(decision: str, chain: tuple[Link, ...] = ()) -> Verdict:
    return Verdict(decision, chain)


# --- the rule


@pytest.mark.parametrize(
    ("driver", "middle", "departed", "age_s", "expected"),
    [
        # One that applied settles it, whoever says so and whatever the others say.
        (said(APPLIED, THIS), said(TENTATIVE), False, 3.0, Outcome.APPLY),
        (None, said(APPLIED, THIS), True, 3.0, Outcome.APPLY),
        (
            said(UNKNOWN),
            said(APPLIED, THIS),
            True,
            99.0,
            Outcome.APPLY,
        ),  # the driver came back without memory
        # Decided along another way.
        (said(APPLIED, OTHER), said(TENTATIVE), False, 3.0, Outcome.ABANDON),
        (None, said(APPLIED, OTHER), False, 3.0, Outcome.ABANDON),
        # The driver is at it: for ever, if need be.
        (said(TENTATIVE), said(TENTATIVE), False, 1e6, Outcome.HOLD),
        (said(TENTATIVE), None, False, 1e6, Outcome.HOLD),
        # The driver gave it up, but who cannot be asked may have heard otherwise from an earlier process.
        (said(UNKNOWN), said(TENTATIVE), False, 3.0, Outcome.ABANDON),
        (said(UNKNOWN), None, True, 3.0, Outcome.HOLD),
        (said(UNKNOWN), None, True, TTL_S, Outcome.DROP),
        # Silence is no answer.
        (None, said(TENTATIVE), False, TTL_S - 1, Outcome.HOLD),
        (None, said(TENTATIVE), False, TTL_S, Outcome.DROP),
        (None, said(TENTATIVE), True, 3.0, Outcome.DROP),  # dead, and nobody else knows
        (None, None, True, TTL_S - 1, Outcome.HOLD),
    ],
)
def test_what_becomes_of_an_undecided_micro_batch(
    driver: Verdict | None, middle: Verdict | None, departed: bool, age_s: float, expected: Outcome
) -> None:
    verdicts = {DRIVER: driver, MIDDLE: middle}
    assert outcome(OWN, verdicts, driver_departed=departed, age_s=age_s, ttl_s=TTL_S) is expected


VERDICTS = st.one_of(
    st.none(),
    st.just(said(TENTATIVE)),
    st.just(said(UNKNOWN)),
    st.sampled_from([said(APPLIED, THIS), said(APPLIED, OTHER), said(APPLIED)]),
)


@given(VERDICTS, VERDICTS, st.booleans(), st.floats(0.0, 100.0))
def test_nothing_is_applied_unless_a_hop_says_that_this_very_attempt_was(
    driver: Verdict | None, middle: Verdict | None, departed: bool, age_s: float
) -> None:
    verdicts = {DRIVER: driver, MIDDLE: middle}
    found = outcome(OWN, verdicts, driver_departed=departed, age_s=age_s, ttl_s=TTL_S)
    named = any(v is not None and v.decision == APPLIED and OWN in v.chain for v in verdicts.values())
    assert (found is Outcome.APPLY) == named


# --- memory


def test_callers_share_what_a_hop_may_hold() -> None:
    def filled(callers: int, most: int) -> list[int]:
        """Each takes one more in turn until nobody is let in."""
        held = [0] * callers
        while any(admits(own, sum(held), most) for own in held):
            for n in range(callers):
                held[n] += admits(held[n], sum(held), most)
        return held

    assert filled(1, 64) == [52], "about four fifths"
    assert filled(2, 64) == [29, 28], "about four ninths each"
    assert all(own >= 1 for own in filled(10, 64))
    assert sum(filled(10, 64)) <= 64
    assert filled(1, 1) == [1]
    assert admits(0, 52, 64), "a newcomer finds room beside one that took all it could"


# --- on the network


def spec_of(stages: int, ttl_s: float = TTL_S) -> RunSpec:
    spec = small_spec(stages)
    limits = spec.limits.model_copy(update={"undecided_ttl_s": ttl_s})
    return spec.model_copy(update={"limits": limits})


def test_a_silent_hop_is_told_when_it_wakes_and_nobody_waited_for_it() -> None:
    async def main() -> None:
        async with World(spec_of(3), 1) as world:
            driver, middle, last = world.peers
            assert driver.driver
            assert middle.hop
            assert last.hop
            training = asyncio.create_task(driver.driver.train(batches(world.spec, 1)))
            while not len(driver.ledger):
                await asyncio.sleep(0.0005)
            world.network.freeze(last.name)  # its answer is out, the commit is on its way
            loop = asyncio.get_running_loop()
            frozen_s = loop.time()
            while not len(middle.ledger):
                await asyncio.sleep(0.01)
            assert loop.time() - frozen_s < 0.1, "the others are told at once"
            await asyncio.sleep(10.0)
            assert driver.driver.commits.owed == 1
            world.network.thaw(last.name)
            await training
            await last.hop.drained()
            assert len(last.ledger) == 1
            assert driver.driver.commits.lost == 0

    virtual_time.run(main, limit_s=300.0)


def test_a_decision_that_a_partition_hides_is_counted_at_both_ends() -> None:
    async def main() -> None:
        async with World(spec_of(2, ttl_s=8.0), 1) as world:
            driver, last = world.peers
            assert driver.driver
            assert last.hop
            training = asyncio.create_task(driver.driver.train(batches(world.spec, 1)))
            while not len(driver.ledger):
                await asyncio.sleep(0.0005)
            world.network.cut(driver.name, last.name)
            await training
            await last.hop.drained()
            assert (len(driver.ledger), len(last.ledger)) == (1, 0)
            assert driver.driver.commits.lost == 1
            assert last.ledger.dropped == 1
            world.network.heal(driver.name, last.name)
            await driver.driver.train(batches(world.spec, 2))
            await last.hop.drained()
            assert (len(driver.ledger), len(last.ledger)) == (3, 2), "later ones go through, none twice"
            assert driver.driver.commits.lost == 1

    virtual_time.run(main, limit_s=300.0)


def test_what_a_hop_learns_by_asking_is_not_lost() -> None:
    """Frozen for longer than the driver keeps telling it, it asks when it wakes: the count is put right."""

    async def main() -> None:
        async with World(spec_of(2, ttl_s=8.0), 1) as world:
            driver, last = world.peers
            assert driver.driver
            assert last.hop
            training = asyncio.create_task(driver.driver.train(batches(world.spec, 1)))
            while not len(driver.ledger):
                await asyncio.sleep(0.0005)
            world.network.freeze(last.name)
            world._tasks[last.name].cancel()  # frozen: it does not ask
            await training
            assert driver.driver.commits.lost == 1
            world.network.thaw(last.name)
            world._tasks[last.name] = asyncio.create_task(last.hop.run())
            await last.hop.drained()
            assert len(last.ledger) == 1
            assert driver.driver.commits.lost == 0

    virtual_time.run(main, limit_s=300.0)


def test_many_undecided_hops_ask_at_the_same_time() -> None:
    """Forty left by a driver that a cut hides: asked one after the other, each would wait for the others."""

    async def main() -> None:
        spec = small_spec(3, in_flight=40)
        async with World(spec, 1) as world:
            driver, middle, last = world.peers
            assert driver.driver
            assert middle.hop
            assert last.hop
            world.network.cut(driver.name, last.name)
            training = asyncio.create_task(driver.driver.train(batches(spec, 40)))
            while len(middle.ledger) < 40:
                await asyncio.sleep(0.1)
            begun = asyncio.get_running_loop().time()
            world.kill(driver)
            training.cancel()
            await last.hop.drained()
            assert len(last.ledger) == 40
            assert asyncio.get_running_loop().time() - begun < 15.0

    virtual_time.run(main, limit_s=600.0)


def test_one_caller_cannot_fill_a_hop() -> None:
    async def main() -> None:
        spec = small_spec(2, in_flight=20)
        limits = spec.limits.model_copy(update={"undecided_micro_batches": 10})
        spec = spec.model_copy(update={"limits": limits})
        async with World(spec, 1) as world:
            driver, last = world.peers
            assert driver.driver
            assert last.hop
            most = 0

            async def watch() -> None:
                nonlocal most
                while True:
                    held = last.hop.jobs.working.total() + last.hop.undecided if last.hop else 0
                    most = max(most, held)
                    await asyncio.sleep(0.001)

            watching = asyncio.create_task(watch())
            await driver.driver.train(batches(spec, 40))
            watching.cancel()
            assert most <= 8
            assert len(last.ledger) == 40
            await last.hop.drained()
            last.hop.jobs.working.update({driver.name: 8, PeerId("x" * 52): 1})
            with pytest.raises(Busy, match="holds 9 micro-batches, 8 of this caller"):
                last.hop._admit_memory(driver.name)
            last.hop._admit_memory(PeerId("x" * 52))

    virtual_time.run(main, limit_s=600.0)


def test_an_attempt_that_ends_after_another_one_counted_is_not_told_as_missing() -> None:
    """The same hop twice, as after a broken stream: nothing waits there for a driver that dies then."""

    async def main() -> None:
        async with World(spec_of(2), 1) as world:
            driver, hop = world.peers
            assert hop.hop is not None
            name = MicroBatch(driver.name, 1, 0)
            counted, late = ((Link(0, driver.name, 0), Link(1, hop.name, attempt)) for attempt in (1, 2))
            assert hop.ledger.apply(name, counted, 32)
            hop.hop._undecided.hold(name, 2, Passage(), driver.name, late)
            world.kill(driver)
            await asyncio.sleep(10.0)
            assert (hop.ledger.dropped, hop.ledger.abandoned) == (0, 1)

    virtual_time.run(main)
