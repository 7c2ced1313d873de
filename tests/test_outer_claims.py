"""Who says that it is ahead and hands nothing over holds the others up for seconds, not for ever (P3)."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence

import pytest
import torch
from outer_world import World, round_spec

from shoal.protocol.identity import PeerId, Role
from shoal.protocol.transport import Stream
from shoal.protocol.virtual_time import run
from shoal.training.outer.entry import ENTRY_BYTES
from shoal.training.outer.line import LEADER_SILENCE_S, lifeline
from shoal.training.outer.messages import Answer, Prepare, method
from shoal.training.outer.policy import GroupMember

BOASTER = PeerId("12D3KooWboaster".ljust(52, "z"))


class Boasting(World):
    """One more member, of whom only a beat is known."""

    boast = GroupMember(peer=BOASTER, incarnation=1, uplink=1.0)

    def group(self, seen_by: PeerId) -> Sequence[GroupMember]:
        return [*super().group(seen_by), self.boast]


@pytest.mark.parametrize("varies", [False, True])
def test_a_beat_that_tells_of_entries_nobody_can_have(varies: bool) -> None:
    async def main() -> None:
        async with Boasting(3) as world:
            transport = world.network.transport(BOASTER, frozenset({Role.TRAINER}))
            await transport.start()
            await world.rounds(2, each=3)
            world.boast = dataclasses.replace(world.boast, height=99, head=bytes([7]) * 32, log_tokens=10**15)
            for number in range(6):
                await world.rounds(1, each=3)
                if varies:
                    world.boast = dataclasses.replace(world.boast, head=bytes([number]) * 32)
            assert world.equal()
            await transport.close()

    run(main)


def test_an_answer_that_tells_of_entries_nobody_can_have() -> None:
    async def boast(stream: Stream) -> None:
        async with lifeline(stream, LEADER_SILENCE_S) as line:
            await line.receive(Prepare, max_payload_bytes=ENTRY_BYTES)
            line.post(Answer(99, 0, 0, 0, 0.0, ()), b"")
            await line.receive(Prepare)

    async def main() -> None:
        async with Boasting(3) as world:
            transport = world.network.transport(BOASTER, frozenset({Role.TRAINER}))
            await transport.start()
            await world.rounds(2, each=3)
            transport.serve(method(0, "round"), boast, frozenset(Role))
            for _ in range(6):
                await world.rounds(1, each=3)
            assert world.equal()
            await transport.close()

    run(main)


def test_who_claims_more_tokens_than_its_group_can_have_seen_neither_decides_nor_ends_the_schedule() -> None:
    """What was: it had nearly all of the weight, was never clipped, and the log had counted all tokens."""

    async def main() -> None:
        async with World(4) as world:
            boaster, *honest = world.nodes
            await world.rounds(1)
            before = honest[0].outer.tokens
            boaster.weights.tokens += 2**52
            for node in honest:
                node.step()
                node.step()
            boaster.weights.step(torch.full((boaster.weights.size,), 1e3), 100)
            boaster.weights.step(torch.zeros(boaster.weights.size), 100)
            boaster.outer.stepped()
            await asyncio.gather(*(node.reach(2) for node in world.nodes))
            outer, inner = world.spec.outer, world.spec.inner
            most = 2 * len(world.nodes) * outer.inner_steps * inner.inner_tokens
            assert honest[0].outer.tokens - before <= most + 3 * 200
            entry = honest[0].outer.entry(2)
            assert entry is not None
            boast = entry.row_of(entry.seat_of(boaster.name) or 0)
            assert boast is not None and boast.clip < 0.1
            before = honest[0].outer.tokens
            await world.rounds(1)
            assert honest[0].outer.tokens - before < 1000, "what was left out is not claimed again"
            assert world.equal()

    run(main)


@pytest.mark.parametrize("members", [2, 3, 6])
def test_who_says_that_it_has_made_countless_steps_does_not_make_every_step_a_round(members: int) -> None:
    """What was: a round was due at once after each entry, for whatever single steps there were."""

    async def main() -> None:
        async with Boasting(members, round_spec(outer={"inner_steps": 20})) as world:
            for _ in range(120):
                height, head = world.nodes[0].outer.height, world.nodes[0].outer.head
                world.boast = dataclasses.replace(
                    world.boast, height=height, head=head, steps_since_round=2**50
                )
                world.everybody_steps()
                await asyncio.sleep(1.0)
            assert 3 <= world.nodes[0].outer.height <= 120 * 6 // 20

    run(main)
