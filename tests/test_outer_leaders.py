"""Who may lead rounds: neither a stranger nor one of the group holds the others up for long (P3)."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from ballots_world import FIRST, SECOND, leader, offer_of
from outer_world import Node, World

from shoal.protocol.errors import MessageInvalid, ShoalError, Stale
from shoal.protocol.identity import PeerId
from shoal.protocol.memory_transport import Link
from shoal.protocol.transport import Transport
from shoal.protocol.virtual_time import run
from shoal.training.outer.entry import ENTRY_BYTES, Seat
from shoal.training.outer.leaders import Leaders
from shoal.training.outer.messages import Answer, Prepare, Tick
from shoal.training.outer.policy import REPORT_SLACK_S, GroupMember

LIMIT_S = 60.0


class Known(World):
    """Everybody knows who holds the stage: those who live, and `liar` where it is a member, too."""

    liar: GroupMember | None = None

    def group(self, seen_by: PeerId) -> Sequence[GroupMember]:
        return [*super().group(seen_by), *([self.liar] if self.liar is not None else ())]

    def holds(self, seen_by: PeerId, peer: PeerId) -> bool:
        return peer in {member.peer for member in self.group(seen_by)}


async def hold(transport: Transport, node: Node, ballots: Iterator[int], ticks: int = 8) -> None:
    """Be the leader of whatever round comes next, and do nothing in it but tick."""
    while True:
        ballot = next(ballots)
        offer = offer_of(transport.me, node, ballot)
        with suppress(ShoalError):
            async with transport.open(node.name, "outer.0.round") as stream:
                await stream.send(Prepare(offer.height, offer.previous, ballot), offer.encode())
                await stream.receive(Answer, Tick, max_payload_bytes=2 * ENTRY_BYTES)
                for _ in range(ticks):
                    await stream.send(Tick())
                    await asyncio.sleep(0.25)
        await asyncio.sleep(0.01)


async def commits_beside(world: Known, holds: int, ticks: int) -> float:
    """Seconds until the group has made another round while a peer holds all its members, each on so many
    streams, which it gives up after some ticks for others with a higher ballot."""
    transport = await leader(world, FIRST)
    for node in world.nodes:
        world.network.set_link(FIRST, node.name, Link(0.001, 1e8))
    await world.rounds(2, each=3)
    before = world.nodes[0].outer.height
    loop, tasks = asyncio.get_running_loop(), []
    ballots = {node.name: itertools.count(1, 1000**n) for n, node in enumerate(world.nodes)}
    for _ in range(holds):
        for node in world.nodes:
            tasks.append(asyncio.create_task(hold(transport, node, ballots[node.name], ticks)))
            await asyncio.sleep(0.3)
    await asyncio.sleep(1.0)
    try:
        begin_s = loop.time()
        for _ in range(4):
            world.everybody_steps()
        await world.reach(before + 1, limit_s=600.0)
        return loop.time() - begin_s
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await transport.close()


@pytest.mark.parametrize(("holds", "ticks"), [(1, 8), (3, 8), (1, 0)])
def test_a_peer_that_does_not_hold_the_stage_engages_nobody(holds: int, ticks: int) -> None:
    """What was: any trainer's PREPARE was taken, and while it ticked nobody else led."""

    async def main() -> None:
        async with Known(3) as world:
            seconds = await commits_beside(world, holds, ticks)
            assert seconds < 10.0, seconds

    run(main)


@pytest.mark.parametrize(("holds", "ticks"), [(1, 8), (3, 8), (1, 0)])
def test_a_member_that_opens_rounds_and_ends_none_is_let_lead_no_more(holds: int, ticks: int) -> None:
    async def main() -> None:
        async with Known(3) as world:
            world.liar = GroupMember(peer=FIRST, incarnation=1, uplink=1.0)
            seconds = await commits_beside(world, holds, ticks)
            assert seconds < LIMIT_S, seconds

    run(main)


def refuses(leaders: Leaders, peer: PeerId, now_s: float) -> bool:
    try:
        leaders.check(peer, now_s)
    except Stale:
        return True
    return False


@pytest.mark.parametrize(("members", "aside"), [(2, 0), (3, 0), (4, 0), (5, 2)])
def test_where_half_of_a_group_would_be_set_aside_nobody_is(members: int, aside: int) -> None:
    """Then it is a link or a disk that is to blame, and each would refuse whoever else could lead."""

    async def main() -> None:
        async with World(1) as world:
            leaders = Leaders(world.nodes[0].outer.context, lambda peer: True, lambda: members)
            held_s = 3.0 * world.spec.outer.round_deadline_s + REPORT_SLACK_S + 0.1
            for peer, begin_s in ((FIRST, 0.0), (SECOND, held_s)):
                leaders.engage(peer, begin_s)
                leaders.disengage(begin_s + held_s)
            assert sum(refuses(leaders, peer, 2.0 * held_s) for peer in (FIRST, SECOND)) == aside
            assert not any(refuses(leaders, peer, 2.0 * held_s + 30.0) for peer in (FIRST, SECOND))

    run(main)


def test_who_leads_to_an_entry_begins_anew() -> None:
    async def main() -> None:
        async with World(1) as world:
            leaders = Leaders(world.nodes[0].outer.context, lambda peer: True, lambda: 3)
            most_s = 2.0 * world.spec.outer.round_deadline_s
            for entered in (False, True, False):
                leaders.engage(FIRST, 0.0)
                if entered:
                    leaders.entered(FIRST)
                leaders.disengage(0.9 * most_s)
                assert not refuses(leaders, FIRST, 0.9 * most_s)

    run(main)


@pytest.mark.parametrize("change", [{"leader": SECOND}, {"ballot": 9}, {"stage": 1}, {"height": 7}], ids=str)
def test_an_offer_that_is_not_what_its_prepare_says_is_refused(change: dict[str, Any]) -> None:
    async def main() -> None:
        async with World(1) as world:
            (node,) = world.nodes
            transport = await leader(world, FIRST)
            offer = offer_of(FIRST, node, 1)
            seats = (*offer.roster, Seat(SECOND, 1, 1.0))
            offer = replace(offer, roster=tuple(sorted(seats, key=lambda seat: seat.peer)))
            prepare = Prepare(offer.height, offer.previous, offer.ballot)
            async with transport.open(node.name, "outer.0.round") as stream:
                await stream.send(prepare, replace(offer, **change).encode())
                with pytest.raises(MessageInvalid):
                    await stream.receive(Answer, Tick, max_payload_bytes=2 * ENTRY_BYTES)
            assert node.outer._member.promises.current.ballot == 0
            await transport.close()

    run(main)
