"""A part's owner that names contributors who are none, or nobody, ends nobody's rounds (P3)."""

from __future__ import annotations

from dataclasses import replace

import pytest
from outer_faults import Faults
from outer_world import World

from shoal.protocol.identity import PeerId
from shoal.protocol.transport import Buffer
from shoal.protocol.virtual_time import run
from shoal.training.outer.messages import PublishedPart


@pytest.mark.parametrize("listed", [0, 0b11111111], ids=["nobody", "seats beyond the roster"])
def test_a_part_that_lists_whom_it_cannot_is_not_held(listed: int) -> None:
    """What was: all held it, every entry with it broke the rules, and so did each attempt after that."""
    faults = Faults()

    async def main() -> None:
        async with World(3, wrap=faults.wrap) as world:
            liar = world.nodes[0]

            def tamper(peer: PeerId, header: object, payload: Buffer) -> tuple[object, Buffer]:
                if peer == liar.name and isinstance(header, PublishedPart):
                    return replace(header, listed=bytes([listed])), payload
                return header, payload

            await world.rounds(1)
            faults.tamper = tamper
            await world.rounds(2)
            assert world.equal(world.nodes[1:])
            assert all(liar.name in node.outer.context.refused for node in world.nodes[1:])

    run(main)
