"""A round's outer step begins on what is held and ends as COMMIT decides, whatever arrives meanwhile."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from outer_world import World

from shoal.protocol.virtual_time import run
from shoal.training.outer.apply import OuterStep
from shoal.training.outer.codecs import codecs_of
from shoal.training.outer.reduce import Published, publish


def test_a_mean_that_comes_while_its_part_is_skipped_changes_nothing() -> None:
    """Two tasks once wrote such a part, in whatever order: its bits differed (P1)."""

    async def slow_means(function: Callable[..., Any], number: int, published: Published | None) -> Any:
        await asyncio.sleep(0.1 if published is None else 1.0)
        return function(number, published)

    async def main() -> None:
        async with World(1) as world:
            await world.rounds(1)
            node = world.nodes[0]
            entry, context = node.outer.entry(1), node.outer.context
            assert entry is not None
            fragment, anchor = context.fragments[0], node.outer.anchor
            codecs = codecs_of(entry, len(fragment.parts))
            means = [
                publish(b"\1", codecs.published(part.index).encode(torch.ones(part.count)))
                for part in fragment.parts
            ]
            step = OuterStep(
                dataclasses.replace(context, offload=slow_means),
                fragment,
                codecs,
                anchor,
                node.outer.momentum,
                [],
            )
            step.begin(0, means[0])
            finishing = asyncio.create_task(step.finish(entry, {}, None))
            await asyncio.sleep(0.5)
            step.begin(1, means[1])  # its owner is slow: a minority has it, so the leader skips it
            result = await finishing
            await asyncio.sleep(2.0)
            assert torch.equal(result.anchor, anchor)
            assert torch.equal(result.momentum, node.outer.momentum)

    run(main)
