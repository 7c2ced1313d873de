"""What a process offered to a chain that it left before it knew the outcome is in once when it is back."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from outer_faults import Faults
from outer_world import Node, World, round_spec
from test_outer_far_forks import split

from shoal.protocol.identity import PeerId
from shoal.protocol.virtual_time import run
from shoal.training.outer.messages import Report


async def until_on_the_chain_of(node: Node, other: Node) -> None:
    async with asyncio.timeout(60.0):
        while node.outer.head != other.outer.head:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("listed_there", [False, True])
def test_it_leaves_a_chain_amid_a_round_and_comes_back_when_that_lists_it(
    tmp_path: Path, listed_there: bool
) -> None:
    """Where nobody knows where both chains parted, only totals of the log tell. What was: its steps of that
    round were in the agreed state, and in its next contribution once more."""
    faults = Faults()
    faults.hangs = False

    async def main() -> None:
        async with World(3, round_spec(outer={"snapshot_every": 4}), wrap=faults.wrap) as world:
            group, alone = list(world.nodes), world.node(3, 1, tmp_path)
            await alone.start()
            await world.rounds(2)
            split(world, [alone], group)
            for height in range(3, 9):
                alone.step(100_000)
                alone.step(100_000)
                await world.reach(height, [alone])
            await alone.stop()
            other = world.node(3, 2, tmp_path)  # it keeps no entry before its snapshot
            world.sides[other.name] = [other]
            await other.start()

            left: list[Node] = []

            def cut(peer: PeerId) -> None:
                """Its report is on its way; it hears of the round's entry no more, and of the other chain."""
                (leaving,) = (node for node in group if node.name == peer)
                left.append(leaving)
                staying = [node for node in group if node is not leaving]
                split(world, staying)
                world.sides[leaving.name] = [leaving, other]
                for node in staying:
                    world.network.cut(leaving.name, node.name)

            faults.arm(Report, "after", cut)
            for node in group:
                node.step()
                node.step()
            async with asyncio.timeout(30.0):
                while not left:
                    await asyncio.sleep(0.01)
            (leaving,) = left
            staying = [node for node in group if node is not leaving]
            await until_on_the_chain_of(leaving, other)
            if listed_there:
                world.sides[leaving.name] = [leaving]
                await world.reach(9, [leaving])
            else:
                world.freeze(other)
            await world.reach(3, staying)
            entry = staying[0].outer.entry(3)
            assert entry is not None
            seat = entry.seat_of(leaving.name)
            assert seat is not None and entry.row_of(seat) is not None
            for height in range(4, 11):
                for node in staying:
                    node.step(1_000_000)
                    node.step(1_000_000)
                await world.reach(height, staying, limit_s=300.0)
            assert staying[0].outer.tokens > other.outer.tokens
            for node in staying:
                world.network.heal(leaving.name, node.name)
            split(world, group)
            await until_on_the_chain_of(leaving, staying[0])
            ahead = leaving.weights.weights - leaving.outer.anchor
            torch.testing.assert_close(ahead, torch.zeros_like(ahead), rtol=0.0, atol=1e-5)
            await world.rounds(2, group)
            assert world.equal(group)

    run(main)
