"""Drafts and entries that cross one another: what one leader left is gone on with by the next."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from ballots_world import FIRST, leader, offer_of, prepare
from outer_faults import Faults
from outer_world import World, inline

from shoal.protocol.errors import StreamBroken
from shoal.protocol.virtual_time import run
from shoal.training.outer.entry import ENTRY_BYTES
from shoal.training.outer.messages import ContributedPart, Go, Gone, Report, Tick
from shoal.training.outer.proposal import draft_of


def test_a_leader_that_dies_while_its_second_draft_begins_leaves_the_first_one_running() -> None:
    async def slow(function: Callable[..., Any], *arguments: Any) -> Any:
        await asyncio.sleep(0.5 if function.__name__ == "draw_owners" else 0.0)
        return await inline(function, *arguments)

    async def main() -> None:
        async with World(0) as world:
            node = world.node(0)  # it leads nothing itself
            node.outer.serve()
            await node.transport.start()
            first = await leader(world, FIRST)
            node.step()
            try:
                async with first.open(node.name, "outer.0.round") as stream:
                    answer = await prepare(stream, FIRST, node, 1)
                    offer, log = offer_of(FIRST, node, 1), node.outer._replica.log
                    draft = draft_of(offer, {node.name: answer, FIRST: answer}, offer, log, 1, 8192)
                    await stream.send(Go(30.0), draft.encode())
                    await asyncio.sleep(0.1)  # the member waits for what the leader contributes and publishes
                    object.__setattr__(node.outer.context, "offload", slow)
                    await stream.send(Go(30.0), replace(draft, first_stage_head=b"2").encode())
                    await asyncio.sleep(0.25)
                    raise StreamBroken("the leader dies")
            except StreamBroken:
                await asyncio.sleep(0.1)
            async with first.open(node.name, "outer.0.round") as stream:
                assert (await prepare(stream, FIRST, node, 2)).draft_bytes == len(draft.encode())
                await stream.send(Go(30.0), draft.encode())
                await stream.send(Gone(draft.seat_of(FIRST) or 0))
                while True:
                    message = await stream.receive(Report, Tick, max_payload_bytes=ENTRY_BYTES)
                    if isinstance(message.header, Report):
                        return

    run(main)


def test_an_entry_that_waits_while_its_member_jumps_is_judged_by_the_new_log() -> None:
    async def main() -> None:
        async with World(2) as world:
            await world.rounds(3)
            donor, joiner = world.nodes[0], world.node(7)
            await joiner.transport.start()
            member, first = joiner.outer._member, donor.outer._replica.log.entry(1)
            assert first is not None

            async def jump() -> bool:
                await asyncio.sleep(1.0)
                await member.replica.adopt(donor.outer._replica, joiner.weights)
                return True

            jumping = asyncio.create_task(member.install(jump))
            await asyncio.sleep(0.5)
            await member.commit(first, [donor.name])  # its log holds it by then
            await jumping
            assert member._unapplied is None, "nothing is undecided"

    run(main)


@pytest.mark.parametrize("survivors", [1, 2])
def test_whoever_had_made_no_step_yet_goes_on_when_all_are_gone_who_had(survivors: int) -> None:
    """What was: with a dead one's draft it kept what it had at PREPARE, nothing, and no round ended."""
    faults = Faults()

    async def main() -> None:
        async with World(1 + survivors, wrap=faults.wrap) as world:
            quick, *others = world.nodes
            await world.rounds(1)
            faults.arm(ContributedPart, "receiving", lambda peer: world.kill(quick))
            for _ in range(2 * len(world.nodes)):
                quick.step()
            async with asyncio.timeout(10.0):
                while quick.name in world.live:
                    await asyncio.sleep(0.1)
            await world.rounds(2, others, each=4)
            assert world.equal()

    run(main)
