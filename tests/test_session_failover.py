"""Kill each server at each token: the text is that of the undisturbed run.

And only the lost span is computed again: each other server computes every position once.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from serving_world import PROMPT, World, reference, serving_spec

from shoal.protocol.errors import StageEmpty
from shoal.protocol.transport import Stream
from shoal.protocol.virtual_time import run
from shoal.training.serving.link import Link
from shoal.training.serving.messages import SamplingOptions
from shoal.training.serving.server import PULSE_S
from shoal.training.serving.stuck import SILENT_S
from shoal.training.serving.written import ChainFigures

TOKENS = 64
POSITIONS = len(PROMPT) + TOKENS - 1  # the last token is never fed
DRAWING = SamplingOptions(temperature=0.8, top_p=0.95, top_k=50, repetition_penalty=1.2, seed=11)
LONG = [(7 * n) % 256 for n in range(300)]  # a prompt of several chunks
Strike = Callable[[World, int], None]


@dataclass(frozen=True)
class Outcome:
    """Of a text with something done to its servers."""

    text: list[int]
    figures: ChainFigures
    world: World


async def struck(stages: int, at: int, strike: Strike, replicas: int = 2) -> Outcome:
    """A text; `strike` is called once, when `at` tokens have come, with the number of the token."""
    async with World(serving_spec(stages), replicas) as world:
        text: list[int] = []
        async with world.generation(count=TOKENS, options=DRAWING) as generation:
            world.watched = generation
            async for token in generation:
                text.append(token)
                if len(text) == at:
                    strike(world, at)
        return Outcome(text, generation.figures, world)


@functools.cache
def undisturbed(stages: int) -> list[int]:
    return run(lambda: struck(stages, 0, lambda world, at: None)).text


def kill(*stages: int) -> Strike:
    """The servers that the text uses at these stages."""

    def strike(world: World, at: int) -> None:
        for stage in stages:
            world.kill(world.used(stage))

    return strike


def assert_only_the_lost_span_was_computed_again(world: World, lost: set[int], at: int) -> None:
    for stage in range(world.spec.stages.count):
        living = [peer for peer in world.peers if peer.stage == stage and not peer.killed]
        nothing_left_to_do = stage in lost and at == TOKENS
        assert sum(peer.computed for peer in living) == (0 if nothing_left_to_do else POSITIONS)


@pytest.mark.parametrize(("stages", "stage", "step"), [(2, 0, 1), (2, 1, 1), (3, 1, 7)])
def test_a_server_killed_at_any_token_changes_nothing(stages: int, stage: int, step: int) -> None:
    gaps_s = []
    for at in range(1, TOKENS + 1, step):
        outcome = run(functools.partial(struck, stages, at, kill(stage)), limit_s=60)
        assert outcome.text == undisturbed(stages), f"killed at token {at}"
        assert_only_the_lost_span_was_computed_again(outcome.world, {stage}, at)
        gaps_s.append(outcome.figures.longest_gap_s)
    assert sorted(gaps_s)[int(0.95 * len(gaps_s))] < 1.0


def test_the_text_is_that_of_the_whole_model() -> None:
    async def main() -> None:
        async with World(serving_spec(3), 2) as world:
            assert await world.text(count=TOKENS) == reference(world, PROMPT, TOKENS)

    run(main)


@pytest.mark.parametrize("lost", [(0, 1), (1, 2), (0, 2), (0, 1, 2)])
def test_several_servers_killed_at_once_change_nothing(lost: tuple[int, ...]) -> None:
    outcome = run(lambda: struck(3, 20, kill(*lost)), limit_s=60)
    assert outcome.text == undisturbed(3)
    assert_only_the_lost_span_was_computed_again(outcome.world, set(lost), 20)


def test_who_took_over_may_be_killed_as_well() -> None:
    expected = undisturbed(3)

    async def main() -> None:
        async with World(serving_spec(3), 3) as world:
            text: list[int] = []
            async with world.generation(count=TOKENS, options=DRAWING) as generation:
                world.watched = generation
                async for token in generation:
                    text.append(token)
                    if len(text) in (10, 11):
                        world.kill(world.used(1))
            assert text == expected
            assert generation.figures.replaced == 2

    run(main, limit_s=60)


@pytest.mark.parametrize("stage", range(3))
def test_a_server_killed_while_it_reads_the_prompt_is_replaced(stage: int) -> None:
    async def main() -> None:
        async with World(serving_spec(3, sequence=512), 2) as world:
            async with world.generation(LONG, 8) as generation:
                world.watched = generation
                while not world.computed(stage):
                    await asyncio.sleep(0.001)
                world.kill(world.used(stage))
                text = [token async for token in generation]
            assert text == reference(world, LONG, 8)

    run(main, limit_s=60)


@pytest.mark.parametrize("stage", range(3))
def test_a_frozen_server_is_replaced_and_disturbs_nobody_when_it_wakes(stage: int) -> None:
    expected = undisturbed(3)

    async def main() -> None:
        async with World(serving_spec(3), 2) as world:
            text: list[int] = []
            async with world.generation(count=TOKENS, options=DRAWING) as generation:
                world.watched = generation
                async for token in generation:
                    text.append(token)
                    if len(text) == 20:
                        frozen = world.used(stage)
                        world.network.freeze(frozen.name)
                    if len(text) == 30:
                        world.network.thaw(frozen.name)
            assert text == expected
            assert SILENT_S - PULSE_S <= generation.figures.longest_gap_s < SILENT_S + 1.0
            assert generation.figures.replaced == 1
            await asyncio.sleep(30)
            assert not any(peer.server.sessions for peer in world.peers)

    run(main, limit_s=120)


def test_two_servers_that_cannot_reach_each_other_are_not_used_together() -> None:
    def strike(world: World, at: int) -> None:
        world.network.cut(world.used(0).name, world.used(1).name)

    outcome = run(lambda: struck(3, 20, strike), limit_s=120)
    assert outcome.text == undisturbed(3)
    assert outcome.figures.replaced == 1


def test_a_stage_that_nobody_serves_is_waited_for() -> None:
    expected = undisturbed(2)

    async def main() -> None:
        async with World(serving_spec(2), 2) as world:
            spare = world.peers[-1]
            world.hidden = {peer.name for peer in world.peers if peer.stage == 1} - {spare.name}
            text: list[int] = []
            async with world.generation(count=TOKENS, options=DRAWING) as generation:
                world.watched = generation
                async for token in generation:
                    text.append(token)
                    if len(text) == 20:
                        world.kill(spare)
                        asyncio.get_running_loop().call_later(10, world.hidden.clear)
            assert text == expected
            assert generation.figures.longest_gap_s > 10

    run(main, limit_s=60)


def test_a_stage_that_nobody_serves_any_more_ends_the_text_with_a_reason() -> None:
    async def main() -> None:
        async with World(serving_spec(2), 1) as world, world.generation(patience_s=5.0) as generation:
            await anext(aiter(generation))
            world.kill(world.peers[1])
            with pytest.raises(StageEmpty, match="nobody serves stage 1 since 5 s"):
                [_ async for _ in generation]

    run(main, limit_s=60)


@pytest.mark.parametrize("side", ["_listen", "_tell"])
def test_a_fault_of_the_clients_own_ends_the_text_at_once(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No other server would mend it, and nothing would come any more."""

    async def fault(link: Link, stream: Stream) -> None:
        await asyncio.sleep(0.01)
        raise ZeroDivisionError

    monkeypatch.setattr(Link, side, fault)

    async def main() -> None:
        async with World(serving_spec(2), 2) as world:
            with pytest.raises(ZeroDivisionError):
                await asyncio.wait_for(world.text(), 1.0)
            await asyncio.sleep(1)
            assert not any(peer.server.sessions for peer in world.peers)

    run(main)
