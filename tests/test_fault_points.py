"""Every message of rounds and recovery, at each of its points, struck by each action, in virtual time.

Whatever is struck, the others commit within seconds, everybody who lives comes to equal bits, and every step
is in once. `soak/fault_points.py` does the same to real processes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from fault_table import Case, all_cases
from orders_world import Owner
from outer_faults import Faults
from outer_world import Node, World, round_spec

from shoal.protocol.faults import Action, Arming
from shoal.protocol.identity import PeerId
from shoal.protocol.virtual_time import run
from shoal.training.outer.policy import succession

# Virtual seconds from the blow to the others' COMMIT. A silent leader is noticed after one second, a member
# after two; what a broken peer sends may cost a whole round, deadline and all, and its repetition.
LIMIT_S = {
    Action.KILL: 3.0,
    Action.FREEZE: 6.0,
    Action.DELAY: 6.0,
    Action.DROP: 10.0,
    Action.CORRUPT: 15.0,
}
FORGETFUL = {"outer": {"snapshot_every": 2, "payload_budget_bytes": 1}}  # a joiner needs a snapshot
CASES = [case for case in all_cases() if not (case.needs_disk or case.needs_guardian)]  # nobody has one here


class Blow:
    """One thing armed in a world, and what it does there."""

    def __init__(self, world: World, faults: Faults, case: Case) -> None:
        self.world = world
        self.faults = faults
        self.arming = Arming.parse(case.arming)
        self.late: Node | None = None  # who comes or comes back meanwhile: the round does not need it

    def arm(self) -> None:
        self.faults.arm_also(self.arming, self._strike)

    @property
    def hit(self) -> PeerId | None:
        return self.faults.has_struck(self.arming)

    def others(self) -> list[Node]:
        """Whose round it is: who lives, was here before and was not struck."""
        return [node for node in self.world.live.values() if node.name != self.hit and node is not self.late]

    def _strike(self, peer: PeerId) -> None:
        node = node_of(self.world, peer)
        if self.arming.action is Action.KILL:
            self.world.kill(node)
        elif peer in self.world.live:
            self.world.freeze(node)
        else:
            self.world.network.freeze(peer)  # a joiner: nobody counts on it yet

    def undo(self) -> None:
        """SIGCONT."""
        if self.hit in self.world.frozen:
            self.world.thaw(node_of(self.world, self.hit))
        elif self.hit is not None:
            self.world.network.thaw(self.hit)
        self.faults.wake()


Scene = Callable[[Blow], Awaitable[int]]  # returns the height of the round under way


def node_of(world: World, peer: PeerId) -> Node:
    return next(node for node in world.nodes if node.name == peer)


async def a_round(blow: Blow) -> int:
    """Everybody makes the steps that a round takes."""
    blow.arm()
    return step(blow.world)


async def a_slow_round(blow: Blow) -> int:
    """A part is on its way for so long that lines have nothing else to say."""
    blow.faults.arm_also(Arming("ContributedPart.sending", Action.DELAY, seconds=0.7))
    return await a_round(blow)


async def a_round_that_loses_a_member(blow: Blow) -> int:
    world = blow.world
    height, names = world.nodes[0].outer.height + 1, [node.name for node in world.nodes]
    last = succession(world.spec.run_id(), 0, height, names)[-1]
    victim = node_of(world, last)
    loss = Arming("Contributing.sending", Action.KILL, who=last)
    blow.faults.arm_also(loss, lambda peer: world.kill(victim))
    return await a_round(blow)


async def a_round_with_a_lost_part(blow: Blow) -> int:
    blow.faults.arm_also(Arming("PublishedPart.sending", Action.DROP))
    return await a_round(blow)


async def a_laggard(blow: Blow) -> int:
    """One sleeps through two rounds and wakes."""
    world = blow.world
    blow.late = away = world.nodes[2]
    world.freeze(away)
    await asyncio.sleep(3)
    await world.rounds(2, [node for node in world.nodes if node is not away])
    blow.arm()
    world.thaw(away)
    await struck(blow)
    return step(world, 3)  # what the laggard should have made, too


async def a_broken_replica(blow: Blow) -> int:
    """One whose memory has changed takes a part from another."""
    world = blow.world
    blow.late = broken = world.nodes[2]
    broken.outer.momentum[100] += 1.0
    blow.arm()
    await world.rounds(1)
    await struck(blow)
    return step(world, 3)


async def a_member_without_orders(blow: Blow) -> int:
    """One has not heard what the owner ordered; the leader names it."""
    world = blow.world
    order = Owner().set("inner.learning_rate", 1e-3)
    names = [node.name for node in world.nodes]
    leader = succession(world.spec.run_id(), 0, 1 + world.nodes[0].outer.height, names)[0]
    blow.late = deaf = next(node for node in world.nodes if node.name != leader)
    for node in world.nodes:
        assert node is deaf or node.orders.adopt(order)
    blow.arm()
    return step(world)


async def a_joiner(blow: Blow) -> int:
    """A newcomer takes a snapshot and its tail."""
    world = blow.world
    blow.late = joiner = world.node(5)
    world.nodes.append(joiner)
    blow.arm()
    joining = asyncio.create_task(joiner.start())
    await struck(blow)
    height = step(world, 3)
    if blow.hit != joiner.name:
        await joining
    elif blow.arming.action is Action.KILL:
        joining.cancel()
        await asyncio.gather(joining, return_exceptions=True)
    else:
        await world.reach(height, blow.others())
        blow.undo()
        await joining
    return height


SCENES: dict[str, Scene] = {
    "Tick": a_slow_round,
    "Gone": a_round_that_loses_a_member,
    "PartRequest": a_round_with_a_lost_part,
    "OrdersRequest": a_member_without_orders,
}


def scene_of(case: Case) -> Scene:
    if case.needs_laggard:
        return a_laggard
    if case.needs_broken:
        return a_broken_replica
    return a_joiner if case.needs_joiner else SCENES.get(case.message, a_round)


def step(world: World, count: int = 2) -> int:
    """Everybody who is awake makes the steps that a round takes. Returns its height."""
    awake = [node for node in world.live.values() if node.name not in world.frozen]
    for node in awake * count:
        node.step()
    return 1 + max(node.outer.height for node in awake)


async def struck(blow: Blow) -> None:
    async with asyncio.timeout(30):
        while blow.hit is None:
            await asyncio.sleep(0.01)


def now() -> float:
    return asyncio.get_running_loop().time()


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case).replace(" ", "-"))
def test_the_others_commit_and_everybody_comes_to_equal_bits(case: Case) -> None:
    faults = Faults()
    scene = scene_of(case)
    spec = round_spec(**FORGETFUL) if scene is a_joiner else round_spec()

    async def main() -> None:
        async with World(3 if scene is a_round else 4, spec, wrap=faults.wrap) as world:
            await world.rounds(3 if scene is a_joiner else 2)  # a snapshot and one more
            blow = Blow(world, faults, case)
            height = await scene(blow)
            await struck(blow)
            begun_s = now()
            await world.reach(height, blow.others())
            assert now() - begun_s < LIMIT_S[case.action]
            blow.undo()
            for _ in range(2):
                await world.reach(step(world))
            assert world.equal()
            if not case.tells_lies:
                world.assert_every_step_is_in_once()

    run(main)
