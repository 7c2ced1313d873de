"""The journal: what the own disk has after a jump is as much as after rounds of one's own."""

from __future__ import annotations

from pathlib import Path

import pytest
from outer_world import Node, World, round_spec
from partition_world import PartitionWorld

from shoal.protocol.virtual_time import run


async def join(world: World, number: int, incarnation: int, directory: Path) -> Node:
    node = world.node(number, incarnation, directory)
    await node.start()
    world.nodes.append(node)
    return node


async def comes_back_alone(world: World, node: Node, directory: Path) -> None:
    """All are stopped at once; the disk of one brings everything back."""
    height, head, root = node.outer.height, node.outer.head, node.outer.state_root
    for other in list(world.live.values()):
        await other.stop()
    again = await join(world, int(node.name[9:11]), 2, directory)
    assert (again.outer.height, again.outer.head, again.outer.state_root) == (height, head, root)


@pytest.mark.parametrize("rounds", [9, 11])
@pytest.mark.parametrize("later", [0, 1])
def test_who_came_by_a_snapshot_has_the_entries_after_it_on_its_disk_too(
    tmp_path: Path, rounds: int, later: int
) -> None:
    async def main() -> None:
        async with World(2) as world:
            await world.rounds(rounds)
            joiner = await join(world, 5, 1, tmp_path)
            assert joiner.outer.status()["caught_up"] == 0, "it took a snapshot"
            await world.rounds(later)
            await comes_back_alone(world, joiner, tmp_path)

    run(main)


@pytest.mark.parametrize("switched", [False, True])
@pytest.mark.parametrize("snapshot_every", [4, 50])
def test_after_a_fork_every_disk_has_the_chain_that_won_and_what_re_entered(
    tmp_path: Path, snapshot_every: int, switched: bool
) -> None:
    async def main() -> None:
        spec = round_spec(outer={"snapshot_every": snapshot_every})
        async with PartitionWorld(0, spec, silent_s=5.0) as world:
            nodes = [await join(world, number, 1, tmp_path / str(number)) for number in range(3)]
            await world.train(10.0)
            world.cut(nodes[:2], nodes[2:])
            await world.train(30.0)
            world.heal()
            await world.settle()
            assert [node.outer.status()["switches"] for node in nodes] == [0, 0, 1]
            assert any(entry.lost for entry in world.chain())
            number = 2 if switched else 0
            await comes_back_alone(world, nodes[number], tmp_path / str(number))

    run(main)
