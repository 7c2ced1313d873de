"""Cuts, shorter and longer than 120 s: one side commits or both, and after the heal each step is in once."""

from __future__ import annotations

import asyncio

import pytest
from outer_faults import Faults
from outer_world import Node, round_spec
from partition_world import PartitionWorld

from shoal.protocol.identity import PeerId
from shoal.protocol.memory_transport import Link
from shoal.protocol.virtual_time import run
from shoal.training.outer.messages import Commit, ContributedPart, Go, Prepare, PublishedPart, Report
from shoal.training.outer.policy import holds_quorum
from shoal.training.spec import RunSpec

SIZE = 6 * 256
HALVES = [(2, 2), (3, 3), (3, 2), (4, 1), (1, 1)]


def partition_spec(**outer: object) -> RunSpec:
    """Rounds of ten steps a replica, parts of one block."""
    return round_spec(outer={"inner_steps": 10, "part_bytes": 1024, "snapshot_every": 4, **outer})


def sides_of(world: PartitionWorld, *sizes: int) -> list[list[Node]]:
    nodes, sides = list(world.live.values()), []
    for size in sizes:
        sides.append(nodes[:size])
        nodes = nodes[size:]
    return sides


@pytest.mark.parametrize("sizes", HALVES, ids=str)
@pytest.mark.parametrize("fragments", [1, 3])
def test_a_short_cut_lets_one_side_commit_and_loses_nothing(sizes: tuple[int, int], fragments: int) -> None:
    async def main() -> None:
        async with PartitionWorld(sum(sizes), partition_spec(fragments=fragments), size=SIZE) as world:
            await world.train(25)
            sides = sides_of(world, *sizes)
            world.cut(*sides)
            await world.train(4)  # what was under way comes to its end
            before = [max(node.outer.height for node in side) for side in sides]
            await world.train(56)
            grown = [
                max(node.outer.height for node in side) - height
                for side, height in zip(sides, before, strict=True)
            ]
            assert sum(count > 0 for count in grown) == 1, f"entries committed on both sides: {grown}"
            if sizes[0] != sizes[1]:
                assert grown[0] > 0, "the larger side goes on"
            world.heal()
            await world.settle()
            world.prove()
            assert not any(kind == "fork" for node in world.nodes for kind, _ in node.events)
            await world.train(15)
            await world.settle()
            world.prove()

    run(main)


@pytest.mark.parametrize("sizes", HALVES, ids=str)
@pytest.mark.parametrize("fragments", [1, 3])
def test_a_long_cut_forks_the_log_and_the_heal_brings_back_every_step_once(
    sizes: tuple[int, int], fragments: int
) -> None:
    async def main() -> None:
        async with PartitionWorld(sum(sizes), partition_spec(fragments=fragments), size=SIZE) as world:
            await world.train(25)
            sides = sides_of(world, *sizes)
            world.cut(*sides)
            await world.train(300)
            heads = {node.outer.head for node in world.nodes}
            assert len(heads) == 2, "both sides have gone on"
            logs = {node.name: node.outer.head for node in world.nodes}
            world.heal()
            await world.settle()
            world.prove()
            switched = [node for node in world.nodes if node.outer.status()["switches"]]
            assert {logs[node.name] for node in switched} != set(logs.values()), "one side only switches"
            assert world.ledger is not None
            account = world.ledger.account(world.nodes[0].outer.head)
            assert account.reentered > 0
            assert account.written_off == 0
            await world.train(20)
            await world.settle()
            world.prove()
            world.assert_nothing_is_lost()

    run(main)


def test_two_cuts_in_a_row_along_different_lines() -> None:
    async def main() -> None:
        async with PartitionWorld(5, partition_spec(fragments=2), size=SIZE) as world:
            await world.train(20)
            a, b, c, d, e = world.nodes
            world.cut([a, b, c], [d, e])
            await world.train(180)
            world.heal()
            await world.train(1.5)  # some have switched, nothing has re-entered yet
            world.cut([a, d], [b, c, e])
            await world.train(180)
            await world.heal_whole()

    run(main)


def test_three_sides_become_one() -> None:
    async def main() -> None:
        async with PartitionWorld(6, partition_spec(), size=SIZE) as world:
            await world.train(20)
            world.cut(*sides_of(world, 3, 2, 1))
            await world.train(240)
            assert len({node.outer.head for node in world.nodes}) == 3
            await world.heal_whole()

    run(main)


@pytest.mark.parametrize("seed", [2, 3])
def test_what_only_a_slow_switcher_holds_re_enters_too(seed: int) -> None:
    """One who switched twice leads, and knows of entries whose payloads are with one still under way."""

    async def main() -> None:
        async with PartitionWorld(3, partition_spec(inner_steps=3), size=SIZE, seed=seed) as world:
            await world.train(10)
            world.cut(*sides_of(world, 1, 1, 1))
            await world.train(240)
            least, middle, most = sorted(world.nodes, key=lambda node: node.outer.tokens)
            world.heal()
            world.cut([least, middle], [most])
            async with asyncio.timeout(60):
                await least.outer.wait_until(lambda: least.outer.reentering > 0)
            for other in (least, most):
                world.network.set_link(middle.name, other.name, Link(0.3, 1e6))
            world.heal()
            await world.settle(300)
            await world.train(40)  # whom the slow link keeps out of some rounds is listed in a later one
            await world.settle()
            world.prove()
            world.assert_nothing_is_lost()
            assert world.ledger is not None
            assert world.ledger.account(most.outer.head).written_off == 0

    run(main)


@pytest.mark.parametrize(
    "kind", [Prepare, Go, ContributedPart, PublishedPart, Report, Commit], ids=lambda kind: kind.__name__
)
@pytest.mark.parametrize("count", [1, 3])
def test_a_cut_amid_a_round_leaves_each_step_in_once(kind: type, count: int) -> None:
    """Both sides may end that round, each with what it has: part by part the chains list different steps."""
    faults = Faults()

    async def main() -> None:
        spec = partition_spec(inner_steps=4, fragments=2)
        async with PartitionWorld(4, spec, size=SIZE, wrap=faults.wrap) as world:
            await world.part_amid_a_round(faults, kind, count, *sides_of(world, 2, 2))

    run(main)


@pytest.mark.parametrize(
    ("sizes", "count", "fragments", "seed"),
    [((2, 1, 1), 1, 2, 2), ((2, 1, 1), 3, 2, 2), ((1, 1, 1), 3, 1, 1)],
    ids=str,
)
def test_a_cut_into_three_sides_amid_a_round_leaves_each_step_in_once(
    sizes: tuple[int, ...], count: int, fragments: int, seed: int
) -> None:
    """Two lost chains may list the same steps of one process, and one re-enters before the other."""
    faults = Faults()

    async def main() -> None:
        spec = partition_spec(inner_steps=4, fragments=fragments)
        async with PartitionWorld(sum(sizes), spec, size=SIZE, seed=seed, wrap=faults.wrap) as world:
            await world.part_amid_a_round(faults, ContributedPart, count, *sides_of(world, *sizes))

    run(main)


def test_who_follows_one_that_came_by_snapshot_waits_to_learn_what_of_its_own_is_in() -> None:
    """Soak seed 1509 at 63295cc: r01 was cut off amid a round that the others ended, and saw r04 alone, which
    had jumped past that entry. It took its steps for not listed, and they were in twice.
    """
    faults = Faults()
    faults.hangs = False

    async def main() -> None:
        spec = partition_spec(inner_steps=4)
        async with PartitionWorld(4, spec, size=SIZE, wrap=faults.wrap) as world:
            await world.train(15)
            bridge, *others = world.nodes
            world.freeze(bridge)
            alone: list[Node] = []

            def strike(leader: PeerId) -> None:
                alone.append(next(node for node in others if node.name != leader))
                world.cut([node for node in others if node is not alone[0]], alone)

            faults.arm(Commit, "before", strike)
            await world.train(40)
            (cut_off,) = alone
            height = cut_off.outer.height
            world.thaw(bridge)
            await world.train(10)
            assert bridge.outer.height > height
            assert bridge.outer.entry(height + 1) is None, "it came by snapshot"
            world.heal()
            await world.settle()
            world.prove()
            world.assert_nothing_is_lost()

    run(main)


def test_who_never_learns_what_of_its_own_is_in_takes_it_for_listed() -> None:
    """As above, and those who have the entry die: what was is that its steps went in twice after 120 s."""
    faults = Faults()
    faults.hangs = False

    async def main() -> None:
        spec = partition_spec(inner_steps=4)
        async with PartitionWorld(4, spec, size=SIZE, wrap=faults.wrap) as world:
            await world.train(15)
            bridge, *others = world.nodes
            world.freeze(bridge)
            alone: list[Node] = []

            def strike(leader: PeerId) -> None:
                alone.append(next(node for node in others if node.name != leader))
                world.cut([node for node in others if node is not alone[0]], alone)

            faults.arm(Commit, "before", strike)
            await world.train(40)
            (cut_off,) = alone
            height = cut_off.outer.height
            world.thaw(bridge)
            await world.train(10)
            assert bridge.outer.entry(height + 1) is None, "it came by snapshot"
            for node in others:
                if node is not cut_off:
                    world.kill(node)
            await world.train(160)
            await world.settle()
            world.prove(anchor=False)
            world.assert_nothing_is_lost()

    run(main)


@pytest.mark.parametrize("kind", [Prepare, Go, ContributedPart, Commit], ids=lambda kind: kind.__name__)
def test_a_heal_amid_a_round(kind: type) -> None:
    faults = Faults()
    faults.hangs = False

    async def main() -> None:
        spec = partition_spec(inner_steps=4)
        async with PartitionWorld(5, spec, size=SIZE, wrap=faults.wrap) as world:
            await world.train(15)
            world.cut(*sides_of(world, 3, 2))
            await world.train(200)
            faults.arm(kind, "receiving", lambda peer: world.heal(), count=2)
            await world.train(10)
            assert faults.hit is not None
            await world.settle(120)
            world.prove()
            world.assert_nothing_is_lost()

    run(main)


@pytest.mark.parametrize("after_s", [0.0, 0.3, 1.0, 2.5])
def test_a_switcher_that_dies_leaves_its_lost_entries_to_the_others_of_its_side(after_s: float) -> None:
    async def main() -> None:
        async with PartitionWorld(5, partition_spec(), size=SIZE) as world:
            await world.train(20)
            sides = sides_of(world, 3, 2)
            world.cut(*sides)
            await world.train(200)
            world.heal()
            async with asyncio.timeout(30):
                while not (switched := [n for n in world.nodes if n.outer.status()["switches"]]):
                    await world.train(0.05)
            await world.train(after_s)
            world.kill(switched[0])
            await world.settle(120)
            world.prove()
            await world.train(20)
            await world.settle()
            world.prove()
            world.assert_nothing_is_lost()

    run(main)


def test_a_payload_that_nobody_can_deliver_is_written_off() -> None:
    """The only one that holds the lost means cannot be asked for them; the group goes on without."""
    faults = Faults()

    async def main() -> None:
        async with PartitionWorld(4, partition_spec(), size=SIZE, wrap=faults.wrap) as world:
            await world.train(20)
            alone = world.nodes[3]
            world.cut(world.nodes[:3], [alone])
            await world.train(200)
            lost = alone.outer.head
            faults.tamper = lambda peer, header, payload: (
                header,
                b"?" if peer == alone.name and isinstance(header, PublishedPart) else payload,
            )
            world.heal()
            await world.train(60)
            faults.tamper = Faults().tamper
            await world.settle(200)
            assert lost not in {node.outer.head for node in world.live.values()}
            assert world.ledger is not None
            account = world.ledger.account(alone.outer.head)
            assert account.written_off > 0
            assert len({node.outer.head for node in world.nodes}) == 1

    run(main)


def test_an_old_leader_that_wakes_with_a_lower_ballot_is_refused() -> None:
    faults = Faults()

    async def main() -> None:
        async with PartitionWorld(4, partition_spec(inner_steps=3), size=SIZE, wrap=faults.wrap) as world:
            await world.train(10)
            faults.arm(Commit, "before", lambda peer: world.freeze(named(world, peer)))
            await world.train(8)
            assert faults.hit is not None
            old = named(world, faults.hit)
            others = [node for node in world.nodes if node is not old]
            assert world.equal(others), "another leader has ended the round"
            height = others[0].outer.height
            assert height > old.outer.height
            world.thaw(old)
            faults.wake()  # it goes on with its COMMIT where it stood
            await world.settle()
            world.prove()
            entry = others[0].outer.entry(height)
            assert entry is not None
            assert entry.leader != old.name

    run(main)


@pytest.mark.parametrize("kind", [Go, ContributedPart, Report], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("count", [1, 2])
def test_the_last_one_of_a_side_goes_on_with_the_other_side_after_the_heal(kind: type, count: int) -> None:
    """Soak seed 824 at 89681a3: r00 held the draft of a round whose only other member had died, and went on
    with it for ever; r02, who had no seat in it, could not report.
    """
    faults = Faults()

    async def main() -> None:
        async with PartitionWorld(3, partition_spec(inner_steps=3), size=SIZE, wrap=faults.wrap) as world:
            await world.train(10)
            head = world.nodes[0].outer.head
            names = [node.name for node in world.nodes]
            lowest = next(
                name
                for name in names
                if all(holds_quorum([name, n], (), [name], head, False).yes for n in names)
            )
            side = [node for node in world.nodes if node.name != lowest]
            world.cut(side, [named(world, lowest)])  # half of a group of two, which may not go on alone
            faults.arm(kind, "before", lambda peer: world.kill(named(world, peer)), count=count)
            await world.train(10)
            assert len(world.live) == 2
            world.heal()
            heights = {node.name: node.outer.height for node in world.live.values()}
            await world.train(20)
            assert all(node.outer.height > heights[node.name] for node in world.live.values())
            await world.settle()
            world.prove()
            world.assert_nothing_is_lost()

    run(main)


@pytest.mark.parametrize("seed", range(4))
def test_the_last_one_of_a_side_dies_before_it_reports_its_draft(seed: int) -> None:
    """Then nobody has reported, and who leads, without a seat in that draft, begins anew."""
    faults = Faults()

    async def main() -> None:
        world = PartitionWorld(3, partition_spec(inner_steps=3), size=SIZE, seed=seed, wrap=faults.wrap)
        async with world:
            await world.train(10)
            first, second, other = world.nodes
            world.cut([first, second], [other])
            faults.arm(Report, "before", lambda peer: world.kill(named(world, peer)))
            await world.train(10)
            (last,) = {first, second} & set(world.live.values())
            faults.arm(Go, "before", lambda peer: world.kill(last))
            world.heal()
            height = other.outer.height
            await world.train(30)
            assert list(world.live.values()) == [other]
            assert other.outer.height > height
            world.prove()

    run(main)


@pytest.mark.parametrize("kind", [Go, PublishedPart, Commit], ids=lambda kind: kind.__name__)
def test_leader_and_owner_die_at_once(kind: type) -> None:
    faults = Faults()

    async def main() -> None:
        async with PartitionWorld(5, partition_spec(inner_steps=3), size=SIZE, wrap=faults.wrap) as world:
            await world.train(10)

            def strike(peer: PeerId) -> None:
                """The one that passes (leader, or an owner), and the one that passed here last."""
                leader = leaders_of(world)[-1]
                world.kill(named(world, peer))
                other = leader if leader in world.live and leader != peer else next(iter(world.live))
                world.kill(world.live[other])

            faults.arm(kind, "before", strike, count=2)
            await world.train(15)
            assert len(world.live) == 3
            await world.settle()
            world.prove()
            world.assert_nothing_is_lost()

    run(main)


def named(world: PartitionWorld, peer: PeerId) -> Node:
    return next(node for node in world.nodes if node.name == peer)


def leaders_of(world: PartitionWorld) -> list[PeerId]:
    """Who opened a round, in order."""
    return [PeerId(str(entry.leader)) for entry in world.chain()]
