"""Sessions that write at the same time come to share batches, and nobody waits long for it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

import pytest
from serving_world import PROMPT, World, reference, serving_spec

from shoal.protocol.virtual_time import run
from shoal.training.serving.batching import ALONE, Away, Mates, StepCost, mates_until_s, others_until_s
from shoal.training.serving.engine import Engine

STEP_S = 0.02


def test_a_group_is_held_for_one_that_is_no_smaller() -> None:
    def until_s(waiting: int, away: list[Away], most: float = math.inf) -> float:
        return others_until_s(10.0, waiting, away, 0.8, most)

    assert until_s(2, []) == -math.inf  # alone
    on_its_way = Away(9.6, 0.8)  # due at 10.4; it may be a quarter late
    assert until_s(2, 2 * [on_its_way]) == pytest.approx(10.6)
    assert until_s(3, 2 * [on_its_way]) == -math.inf  # these will wait for us
    assert until_s(2, 2 * [on_its_way], most=3.5) == -math.inf  # rows cost more than there is to save
    assert until_s(2, 2 * [Away(9.6, 1.1)]) == -math.inf  # it would slow us down in every round
    assert until_s(2, 2 * [Away(5.0, 0.8)]) == -math.inf  # is late, or gone


def test_who_was_computed_together_is_waited_for_one_after_another() -> None:
    three, other = Mates("a", 7, 3), Mates("b", 7, 1)
    assert mates_until_s([(three, 10.0), (other, 10.2)], 0.1) == pytest.approx(10.1)
    assert mates_until_s([(three, 10.0), (three, 10.05)], 0.1) == pytest.approx(10.15)
    assert mates_until_s([(three, 10.0), (three, 10.05), (three, 10.1), (ALONE, 9.0)], 0.1) == -math.inf
    liars = [(Mates("a", number, 65536), 10.0 + 0.09 * number) for number in range(99)]
    assert mates_until_s([(ALONE, 10.0), *liars], 0.1) == pytest.approx(10.8), "however many come"


def test_rows_are_cheap_as_long_as_they_cost_less_than_what_is_fixed() -> None:
    cost = StepCost()
    for _ in range(100):
        cost.add(4, 0.005)
    assert cost.cheap_rows == math.inf  # as far as is known
    for rows in 20 * [1, 2, 4, 8, 32]:
        cost.add(rows, 0.005 + 0.0005 * rows)
    assert cost.cheap_rows == pytest.approx(10, rel=0.2)
    for rows in 200 * [1, 8]:
        cost.add(rows, 0.002 * rows)
    assert cost.cheap_rows < 1.0


async def together(stages: int, sessions: int, tokens: int = 40) -> tuple[list[float], float]:
    """Positions a batch by stage, and the seconds a token takes, of the second half of texts that begin one
    after another within a round."""
    async with World(serving_spec(stages), 1, duration_s=STEP_S) as world:
        loop, engines = asyncio.get_running_loop(), [peer.server.engine for peer in world.peers]

        async def write(number: int) -> tuple[list[int], float]:
            await asyncio.sleep(number * stages * STEP_S / sessions)
            text, half_s = list[int](), 0.0
            async with world.generation(PROMPT, tokens, seed=number) as generation:
                async for token in generation:
                    text.append(token)
                    if len(text) == tokens // 2:
                        half_s = loop.time()
                        halves.append([(one.figures.positions, one.figures.batches) for one in engines])
            return text, (loop.time() - half_s) / (tokens - tokens // 2)

        halves: list[list[tuple[int, int]]] = []
        texts = await asyncio.gather(*map(write, range(sessions)))
        assert [text for text, _ in texts] == sessions * [reference(world, PROMPT, tokens)]
        ends = [(one.figures.positions, one.figures.batches) for one in engines]
        each = [(b - a) / (n - m) for (a, m), (b, n) in zip(halves[-1], ends, strict=True)]
        return each, max(each_s for _, each_s in texts)


@pytest.mark.parametrize("stages", [2, 4])
def test_eight_sessions_come_to_go_round_as_one(stages: int) -> None:
    _, alone_s = run(lambda: together(stages, 1), limit_s=60)
    batches, each_s = run(lambda: together(stages, 8), limit_s=60)
    assert min(batches) > 7.0, batches
    assert each_s < 1.05 * alone_s


def test_who_says_that_many_come_delays_a_batch_by_half_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    _, alone_s = run(lambda: together(2, 1), limit_s=60)

    def lie(engine: Engine, pieces: Sequence[Any], produced: Sequence[bool]) -> None:
        for piece in pieces:
            piece.session.left_with = Mates("", 1, 1 << 16)

    monkeypatch.setattr(Engine, "_tie", lie)
    _, each_s = run(lambda: together(2, 1), limit_s=60)
    assert alone_s < each_s < 1.55 * alone_s
