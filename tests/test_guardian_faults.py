"""Every message between a lone replica and its guardian, at each of its points, struck by each action.

Whoever is struck, nothing that was committed is lost, and the stage goes on: at the replica, or at its heir.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from fault_table import Case, all_cases
from outer_faults import Faults
from outer_world import Keeper, Node, World

from shoal.protocol.faults import Action, Arming
from shoal.protocol.identity import PeerId
from shoal.protocol.virtual_time import run
from shoal.training.outer.entry import entry_hash
from shoal.training.outer.policy import GroupMember

CASES = [case for case in all_cases() if case.needs_guardian]
LIMIT_S = 15.0  # for a lone replica to commit, whatever became of its guardians; virtual
SUSPECT_S = 2.0


class Blow:
    """One thing armed, and how this world kills and freezes replica and guardians."""

    def __init__(self, world: World, faults: Faults, case: Case) -> None:
        self.world = world
        self.faults = faults
        self.arming = Arming.parse(case.arming)
        faults.arm_also(self.arming, self._strike)

    @property
    def hit(self) -> PeerId | None:
        return self.faults.has_struck(self.arming)

    def _strike(self, peer: PeerId) -> None:
        world, kills = self.world, self.arming.action is Action.KILL
        node = world.live.get(peer)
        if node is not None:
            world.kill(node) if kills else world.freeze(node)
            return
        keeper = next(keeper for keeper in world.keepers if keeper.name == peer)
        (world.network.kill if kills else world.network.freeze)(peer)
        if kills and keeper.task is not None:
            keeper.task.cancel()
        silence_s = 0.0 if kills else SUSPECT_S
        asyncio.get_running_loop().call_later(silence_s, setattr, keeper, "silent", True)

    def undo(self) -> None:
        """SIGCONT."""
        for node in [node for node in self.world.nodes if node.name in self.world.frozen]:
            self.world.thaw(node)
        for keeper in [keeper for keeper in self.world.keepers if keeper.name == self.hit]:
            self.world.network.thaw(keeper.name)
            keeper.silent = False
        self.faults.wake()


async def until_equal(node: Node, keeper: Keeper) -> None:
    """The guardian's copy is the replica's state."""
    async with asyncio.timeout(LIMIT_S):
        while keeper.member().head != node.outer.head:
            await asyncio.sleep(0.1)
    assert keeper.member().state_root == node.outer.state_root


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case).replace(" ", "-"))
def test_nothing_that_was_committed_is_lost_and_the_stage_goes_on(case: Case) -> None:
    async def main() -> None:
        faults = Faults()
        async with World(1, wrap=faults.wrap) as world:
            (node,) = world.nodes
            await world.rounds(2)
            world.keepers = [Keeper(world, number) for number in range(2)]
            for keeper in world.keepers:
                await keeper.start()
            await world.rounds(2)
            blow = Blow(world, faults, case)
            node.step()
            node.step()
            height = 5
            async with asyncio.timeout(LIMIT_S):
                while blow.hit is None:
                    await asyncio.sleep(0.01)
            struck = blow.hit
            if struck == node.name and case.action is Action.KILL:
                await asyncio.sleep(0.5)
                committed = node.outer.height
                heir = world.node(1)
                await heir.start()
                assert heir.outer.height >= committed
                world.nodes = [node := heir]
            else:
                if struck == node.name and case.action is Action.FREEZE:
                    await asyncio.sleep(1.0)
                    blow.undo()
                await node.outer.wait_until(lambda: node.outer.height >= height)
                blow.undo()
            await world.rounds(2)
            for keeper in world.keepers:
                if keeper.keeps and keeper.task is not None and not keeper.task.done():
                    await until_equal(node, keeper)

    run(main)


def test_a_committed_entry_outlives_a_replica_that_dies_while_its_guardian_takes_it_in() -> None:
    async def main() -> None:
        taking_in = asyncio.Event()

        async def offload(function: Callable[..., Any], *arguments: Any) -> Any:
            if node.name in world.frozen and function.__qualname__.startswith("OuterStep"):
                taking_in.set()
                await asyncio.sleep(0.5)
            return function(*arguments)

        async with World(1) as world:
            (node,) = world.nodes
            await world.rounds(1)
            world.keepers = [keeper] = [Keeper(world, 0, offload)]
            await keeper.start()
            await world.rounds(2)
            await until_equal(node, keeper)
            world.frozen[node.name] = node.member()  # no beat between two rounds
            await world.rounds(1)
            committed = node.outer.height
            assert keeper.guard.height < committed, "it has been handed the entry, no more"
            node.step()
            node.step()
            await taking_in.wait()
            world.kill(node)
            await asyncio.sleep(10.0)
            assert keeper.guard.height == committed

    run(main)


def test_what_a_lone_replica_committed_before_it_left_reaches_who_came_meanwhile() -> None:
    async def main() -> None:
        async with World(1) as world:
            (node,) = world.nodes
            await world.rounds(2)
            world.keepers = [keeper] = [Keeper(world, 0)]
            await keeper.start()
            newcomer = world.node(1)
            await newcomer.start()
            assert newcomer.outer.height == 2
            world.frozen[node.name] = node.member()  # nobody hears of the rounds to come, ...
            world.sides[node.name] = [node]
            await world.rounds(2, [node])
            committed = node.outer.head
            world.kill(node)  # ... and then it is gone
            await asyncio.sleep(1.0)
            newcomer.step()
            newcomer.step()
            await world.reach(3, [newcomer])
            await world.reach(5, [newcomer])
            kept = newcomer.outer.entry(5)
            assert kept is not None and kept.previous == committed
            world.assert_every_step_is_in_once()

    run(main)


def test_guardians_that_tell_of_entries_nobody_has_delay_rounds_by_seconds() -> None:
    class Boaster(Keeper):
        def member(self) -> GroupMember:
            told = super().member()
            return dataclasses.replace(told, height=told.height + 5, head=entry_hash(told.head))

    async def main() -> None:
        async with World(2) as world:
            await world.rounds(1)
            world.keepers = [Boaster(world, number) for number in range(3)]
            for keeper in world.keepers:
                await keeper.start()
            begun_s = asyncio.get_running_loop().time()
            await world.rounds(20)
            assert asyncio.get_running_loop().time() - begun_s < 60.0
            assert world.equal()

    run(main)
