"""Ballots are bounded: whoever names one near the last ends nobody's attempts."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from ballots_world import FIRST, SECOND, ask, leader
from outer_faults import Faults
from outer_world import World

from shoal.protocol.errors import MessageInvalid
from shoal.protocol.identity import PeerId
from shoal.protocol.transport import Buffer
from shoal.protocol.virtual_time import run
from shoal.training.outer.messages import Answer
from shoal.training.outer.promise import LEAP

LAST = 2**53


def test_a_member_promises_no_ballot_far_beyond_the_last() -> None:
    async def main() -> None:
        async with World(1) as world:
            (node,) = world.nodes
            node.step()
            first, second = await leader(world, FIRST), await leader(world, SECOND)
            assert not (await ask(first, node, 5)).promised
            with pytest.raises(MessageInvalid):
                await ask(second, node, LAST)
            assert not (await ask(first, node, 5 + LEAP)).promised, "the next attempt of honest ones"

    run(main)


@pytest.mark.parametrize("liar", [0, 1])
def test_a_member_that_says_it_has_promised_the_last_ballot_ends_no_replica(liar: int) -> None:
    faults = Faults()

    async def main() -> None:
        async with World(2, wrap=faults.wrap) as world:
            await world.rounds(1)

            def tamper(peer: PeerId, header: object, payload: Buffer) -> tuple[object, Buffer]:
                if peer == world.nodes[liar].name and isinstance(header, Answer):
                    return replace(header, promised=LAST), payload
                return header, payload

            faults.tamper = tamper
            for _ in range(2):
                world.everybody_steps()
            await asyncio.sleep(20)
            faults.tamper = lambda peer, header, payload: (header, payload)
            await world.rounds(2)
            assert world.equal()
            assert not any(node.task is None or node.task.done() for node in world.nodes)

    run(main)
