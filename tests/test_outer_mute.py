"""A member that answers and ticks, and of which no data comes, neither ends rounds nor slows each (P3).

A broken bulk route does that, as well as a bug or a lie.
"""

from __future__ import annotations

import asyncio

import pytest
from ballots_world import FIRST, leader, mute
from outer_world import World
from test_outer_lies import Lying

from shoal.protocol.identity import PeerId
from shoal.protocol.transport import Transport
from shoal.protocol.virtual_time import run
from shoal.training.outer.claims import ASIDE_MOST_S, ASIDE_S
from shoal.training.outer.context import GROUP_ROLES
from shoal.training.outer.owners import Owner, Owners


async def with_a_mute_member(world: World) -> Transport:
    transport = await leader(world, FIRST)
    transport.serve("outer.0.round", mute, GROUP_ROLES)
    return transport


@pytest.mark.parametrize("members", [2, 3, 4])
def test_the_only_part_does_not_stay_with_an_owner_that_publishes_nothing(members: int) -> None:
    """What was: no entry ever, and members that set each other aside for rounds that came to nothing."""

    async def main() -> None:
        async with Lying(members, size=1024) as world:
            transport = await with_a_mute_member(world)
            for _ in range(3):
                await world.rounds(1, each=3)
            assert world.equal()
            world.assert_every_step_is_in_once()
            told = [kind for node in world.nodes for kind, _ in node.events]
            assert "owner-set-aside" in told and "leader-set-aside" not in told
            await transport.close()

    run(main)


def test_rounds_are_not_held_up_by_one_that_reports_nothing() -> None:
    """What was: each took twice the deadline, and its parts were in none."""

    async def main() -> None:
        async with Lying(3) as world:
            transport = await with_a_mute_member(world)
            await world.rounds(4, each=3)  # each of the three finds out at most once
            begun_s = asyncio.get_running_loop().time()
            await world.rounds(3, each=3)
            took_s = asyncio.get_running_loop().time() - begun_s
            assert took_s < 3 * world.spec.outer.round_deadline_s
            assert all(entry.digests.count(bytes(32)) == 0 for entry in world.entries()[-3:])
            await transport.close()

    run(main)


def test_who_publishes_nothing_owns_nothing_for_a_while_longer_each_time() -> None:
    owners, one, other = Owners(), Owner(PeerId("one"), 1), Owner(PeerId("other"), 1)
    assert owners.note({one: False, other: True}, 0.0) == [one]
    assert {*owners.aside(0.0)} == {one}, "not the process that comes after it"
    assert not owners.aside(ASIDE_S)
    owners.note({one: False}, 100.0)
    assert owners.aside(100.0 + 2.0 * ASIDE_S - 0.1) and not owners.aside(100.0 + 2.0 * ASIDE_S)
    owners.note({one: True}, 200.0)
    owners.note({one: False}, 200.0)
    assert not owners.aside(200.0 + ASIDE_S), "it had kept to it meanwhile"
    for at_s in range(40):
        owners.note({one: False}, float(at_s))
    assert not owners.aside(40.0 + ASIDE_MOST_S)
