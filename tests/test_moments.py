"""A joiner takes the second moments of a replica's optimizer, and steps as one that knows the gradients."""

from __future__ import annotations

import asyncio
import math
import random
from typing import Any

import pytest
import torch
from outer_faults import Faults
from trainer_world import Replica, TrainerWorld, round_spec

from shoal.protocol.errors import Busy, MessageInvalid, NotHere
from shoal.protocol.faults import Action, Arming
from shoal.protocol.identity import PeerId
from shoal.protocol.transport import Buffer, call
from shoal.protocol.virtual_time import run
from shoal.training.inner import InnerOptimizer
from shoal.training.methods import at_stage
from shoal.training.recovery import moments as of_joiners
from shoal.training.recovery.moments import (
    MomentsRequest,
    SecondMoments,
    decode,
    encode,
    encoded_bytes,
    take_moments,
)
from shoal.training.spec import RunSpec

SIZE = 1000


def adam() -> RunSpec:
    return round_spec(2, optimizer="adamw", learning_rate=0.01)


def own(replica: Replica) -> InnerOptimizer:
    return replica.trainer.weights._optimizer


def squares(seed: int) -> torch.Tensor:
    """As wide as they are in practice, some zero, one block all zero."""
    rng = torch.Generator().manual_seed(seed)
    found = torch.exp(8.0 * torch.randn(SIZE, generator=rng) - 20.0)
    found[torch.rand(SIZE, generator=rng) < 0.1] = 0.0
    found[256:512] = 0.0
    return found


def test_squares_keep_their_size_however_wide_their_range() -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    square = squares(seed)
    data = encode(square)
    assert len(data) == encoded_bytes(SIZE)
    found = torch.empty(SIZE)
    decode(memoryview(data), found)
    blocks = [slice(start, min(start + 256, SIZE)) for start in range(0, SIZE, 256)]
    for block in blocks:
        most = float(square[block].max())
        told = (square[block] > most * 2.0**-31) & (square[block] > 0)
        ratio = (found[block][told] / square[block][told]).sqrt()
        assert ((ratio > 2 ** (-1 / 31)) & (ratio < 2 ** (1 / 31))).all(), "the root within 2.3 %"
        assert (found[block] >= square[block] * 0.95).all(), "never much smaller: a step would be larger"
        assert (found[block][square[block] == 0] == most).all(), "of what had no gradient nothing is known"


@pytest.mark.parametrize("scale", [-1.0, math.inf, math.nan])
def test_scales_that_are_no_squares_are_refused(scale: float) -> None:
    data = bytearray(encode(torch.ones(SIZE)))
    data[:4] = torch.tensor([scale]).numpy().tobytes()
    with pytest.raises(MessageInvalid, match="negative or not finite"):
        decode(memoryview(data), torch.empty(SIZE))


def test_a_joiner_steps_with_what_a_replica_has_learned_of_the_gradients() -> None:
    async def main() -> None:
        async with TrainerWorld(adam()) as world:
            for number in (0, 1):
                await world.add(number, 0)
                await world.add(10 + number, 1)
            await world.heights(3)
            joiner = await world.add(20, 1, run=False)
            (told,) = joiner.heard("moments-taken")
            donor = next(r for r in world.replicas.values() if r.peer == told["donor"])
            assert donor.trainer.stage == 1
            found, theirs = own(joiner).moments(), own(donor).moments()
            assert found is not None
            assert theirs is not None
            assert 0 < int(str(told["steps"])) <= theirs.steps
            assert found.steps == told["steps"]
            assert not found.mean.any()
            assert (found.square > 0).all()
            known = theirs.square > theirs.square.max() * 1e-3
            assert (found.square[known] / theirs.square[known]).log2().abs().median() < 1.0
            joiner.task = asyncio.create_task(joiner.run())
            await world.heights(joiner.trainer.outer.height + 3)

    run(main, limit_s=600.0)


@pytest.mark.parametrize("lie", ["scale", "start", "steps", "short", "silent"])
def test_a_donor_that_lies_or_is_silent_is_left_for_another_or_the_joiner_begins_without(
    lie: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = Faults()

    async def main() -> None:
        async with TrainerWorld(adam(), wrap=faults.wrap) as world:
            await world.add(0, 0)
            await world.add(10, 1)
            await world.heights(2)
            liar = world.replicas[10]

            def tamper(peer: PeerId, header: object, payload: Buffer) -> tuple[object, Buffer]:
                if peer == liar.peer and isinstance(header, SecondMoments):
                    data = bytearray(payload)
                    if lie == "scale":
                        data[:4] = torch.tensor([-1.0]).numpy().tobytes()
                    start = 1 if lie == "start" else header.start
                    header = SecondMoments(2**53 if lie == "steps" else header.steps, start)
                    payload = data[:-1] if lie == "short" else data
                return header, payload

            faults.tamper = tamper
            if lie == "silent":
                monkeypatch.setattr(liar.trainer.weights, "moments", never)
            joiner = await world.add(20, 1, run=False)
            if lie == "steps":  # nothing to check it by: its own steps are small for a while
                assert joiner.heard("moments-taken")
                return
            assert joiner.heard("moments-missing")
            assert own(joiner).moments() is None
            refused = joiner.trainer.outer.context.refused[liar.peer]
            assert bool(refused) == (lie != "silent")

    run(main, limit_s=600.0)


def test_donors_that_drip_hold_a_joiner_up_for_a_minute_all_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was: a minute each."""
    monkeypatch.setattr(of_joiners, "PIECE_VALUES", of_joiners.BLOCK)

    async def main() -> None:
        faults = Faults()
        async with TrainerWorld(adam(), slower=20.0, wrap=faults.wrap) as world:
            await world.add(0, 0)
            for number in (10, 11, 12):
                await world.add(number, 1)
            await world.heights(2)
            context = world.replicas[10].trainer.outer.context
            donors = [world.replicas[number].peer for number in (11, 12)]
            for nth in range(2, 60):
                faults.arm_also(Arming("SecondMoments.sending", Action.DELAY, nth=nth, seconds=9.0))
            begun_s = asyncio.get_running_loop().time()
            assert await take_moments(context, donors) is None
            assert asyncio.get_running_loop().time() - begun_s <= of_joiners.GIVE_S + 1.0
            (told,) = world.replicas[10].heard("moments-missing")
            assert "all donors together" in str(told["why"])

    run(main, limit_s=600.0)


async def never(offload: Any) -> None:
    await asyncio.Event().wait()


def test_who_asks_while_others_are_given_theirs_is_told_to_come_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        async with TrainerWorld(adam()) as world:
            await world.add(0, 0)
            await world.add(10, 1)
            await world.heights(2)
            asker, donor = world.replicas[0], world.replicas[10]
            monkeypatch.setattr(donor.trainer.weights, "moments", never)
            method, transport = at_stage(1, "moments"), asker.transport

            async def ask() -> None:
                await call(transport, donor.peer, method, MomentsRequest(), SecondMoments, timeout_s=300.0)

            held = [asyncio.create_task(ask()) for _ in range(of_joiners.GIVEN_AT_ONCE)]
            await asyncio.sleep(1.0)
            with pytest.raises(Busy, match="taking moments from here"):
                await ask()
            begun_s = asyncio.get_running_loop().time()
            found = await asyncio.gather(*held, return_exceptions=True)
            assert [type(error) for error in found] == [Busy] * len(held), "given up, not held for ever"
            assert asyncio.get_running_loop().time() - begun_s < of_joiners.GIVE_S + 1.0

    run(main, limit_s=600.0)


def test_before_the_first_step_and_without_moments_there_is_nothing_to_give() -> None:
    async def main() -> None:
        async with TrainerWorld(round_spec(2)) as world:  # SGD
            await world.add(0, 0)
            await world.add(10, 1)
            await world.heights(2)
            joiner = await world.add(20, 1, run=False)
            assert not joiner.heard("moments-taken")
            with pytest.raises(NotHere, match="no inner step"):
                await call(
                    world.replicas[0].transport,
                    world.replicas[10].peer,
                    at_stage(1, "moments"),
                    MomentsRequest(),
                    SecondMoments,
                    timeout_s=30.0,
                )

    run(main, limit_s=600.0)
