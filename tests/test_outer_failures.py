"""An unexpected error in the work of a round is told, delays nobody, and loses no step (P3, P4)."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from outer_world import Node, World, inline

from shoal.protocol.virtual_time import run


def fail_in(node: Node, name: str, error: Exception, times: int) -> list[int]:
    """Work of that name off the loop fails so often; what is left of it."""
    left = [times]

    async def offload(function: Any, *arguments: Any) -> Any:
        if function.__name__ == name and left[0]:
            left[0] -= 1
            raise error
        return await inline(function, *arguments)

    object.__setattr__(node.outer.context, "offload", offload)
    return left


@pytest.mark.parametrize("work", ["weighted_mean", "_encode"])
def test_an_error_nobody_thought_of_is_told_and_the_others_do_not_wait(
    work: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What was: it ended silently, and the member waited for its own parts for twice the round's deadline."""

    async def main() -> None:
        async with World(3) as world:
            await world.rounds(1)
            node = world.nodes[1]
            left = fail_in(node, work, KeyError("a bug"), times=1)
            begun_s = asyncio.get_running_loop().time()
            with caplog.at_level(logging.ERROR):
                await world.rounds(1)
            assert left == [0]
            assert asyncio.get_running_loop().time() - begun_s < world.spec.outer.round_deadline_s
            (told,) = [data for kind, data in node.events if kind == "round-failed"]
            assert told["height"] == 2 and "a bug" in str(told["why"])
            assert "failed" in caplog.text
            await world.rounds(2)
            assert world.equal()
            world.assert_every_step_is_in_once()
            assert not any(one.task is None or one.task.done() for one in world.nodes)

    run(main)


def test_a_part_that_cannot_be_summed_for_lack_of_memory_is_skipped_alone() -> None:
    """What was: whatever else this member had to do in the round ended with it."""

    async def main() -> None:
        async with World(2) as world:
            await world.rounds(1)
            node = world.nodes[0]
            left = fail_in(node, "weighted_mean", RuntimeError("no memory"), times=1)
            await world.rounds(1)
            assert left == [0]
            assert [kind for kind, _ in node.events].count("part-not-published") == 1
            assert world.entries()[1].digests.count(bytes(32)) == 1
            await world.rounds(2)
            assert world.equal()
            world.assert_every_step_is_in_once()

    run(main)
