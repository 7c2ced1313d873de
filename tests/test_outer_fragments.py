"""Fragments: a stage synchronised in turns, on one chain, while inner steps go on; every step is in once."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

import outer_world
import pytest
import torch
from outer_faults import Faults
from outer_world import Node, World, inline, round_spec

from shoal.protocol.identity import PeerId
from shoal.protocol.memory_transport import Link
from shoal.protocol.virtual_time import run
from shoal.training.outer.messages import Commit, ContributedPart, Go, Prepare, PublishedPart
from shoal.training.outer.policy import succession
from shoal.training.spec import RunSpec

FRAGMENTS = 3


def in_fragments(**outer: object) -> World:
    return World(4, round_spec(outer={"fragments": FRAGMENTS, "inner_steps": 6, **outer}))


def test_fragments_take_turns_and_every_step_is_in_once() -> None:
    async def main() -> None:
        async with in_fragments() as world:
            await world.rounds(7)
            assert [entry.fragment for entry in world.entries()] == [0, 1, 2, 0, 1, 2, 0]
            assert world.equal()
            world.assert_every_step_is_in_once()
            rows = [entry.contributors[0] for entry in world.entries()]
            spans = [(row.from_step, row.to_step) for row in rows]
            assert spans == [(0, 2), (0, 4), (0, 6), (2, 8), (4, 10), (6, 12), (8, 14)], "each a full H apart"
            assert (
                world.nodes[0].outer.tokens
                == sum(row.tokens for e in world.entries() for row in e.contributors) // 3
            )

    run(main)


def test_a_snapshot_of_fragments_is_put_together_off_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gigabytes at a large stage: once a snapshot, and once where somebody asks for weights in between."""
    offloaded: list[str] = []

    async def counted(function: Callable[..., object], *arguments: object) -> object:
        offloaded.append(function.__name__)
        return await inline(function, *arguments)

    async def main() -> None:
        monkeypatch.setattr(outer_world, "inline", counted)
        async with in_fragments(snapshot_every=4) as world:
            await world.rounds(5)
            outer = world.nodes[0].outer
            assert offloaded.count("_join") == len(world.nodes), "each once, at height 4"
            (height, anchor), (_, again) = await outer.whole_anchor(), await outer.whole_anchor()
            assert (height, anchor.data_ptr()) == (5, again.data_ptr()), "kept until the next entry"
            assert torch.equal(anchor, outer.anchor)

    run(main)


def test_steps_made_while_a_round_is_under_way_are_kept() -> None:
    """On links where a round takes as long as several inner steps."""

    async def main() -> None:
        async with in_fragments() as world:
            for one in world.nodes:
                for other in world.nodes:
                    if one is not other:
                        world.network.set_link(one.name, other.name, Link(0.05, 40_000.0))
            for _ in range(60):
                world.everybody_steps()
                await asyncio.sleep(0.1)
            await asyncio.sleep(5)
            assert world.nodes[0].outer.height >= 6
            assert world.equal()
            world.assert_every_step_is_in_once()

    run(main)


@pytest.mark.parametrize(
    "kind", [Prepare, Go, ContributedPart, PublishedPart, Commit], ids=lambda kind: kind.__name__
)
def test_a_killed_peer_costs_no_step_of_any_fragment(kind: type) -> None:
    faults = Faults()

    async def main() -> None:
        spec = round_spec(outer={"fragments": FRAGMENTS, "inner_steps": 6})
        async with World(4, spec, wrap=faults.wrap) as world:
            await world.rounds(4)

            def strike(peer: PeerId) -> None:
                world.kill(node_of(world, peer))

            faults.arm(kind, "after", strike, count=2)
            for node in world.nodes:
                node.step()
                node.step()
            async with asyncio.timeout(30):
                while faults.hit is None:
                    await asyncio.sleep(0.01)
            await world.reach(5)
            await world.rounds(4)
            assert world.equal()
            world.assert_every_step_is_in_once()

    run(main)


def test_a_leaver_hands_in_every_fragment() -> None:
    async def main() -> None:
        async with in_fragments() as world:
            await world.rounds(2)
            leaver = world.nodes[1]
            leaver.step()
            async with asyncio.timeout(30):
                await leaver.outer.final_round()
            assert leaver.outer.all_listed
            await world.reach(leaver.outer.height)
            world.assert_every_step_is_in_once()

    run(main)


def test_a_joiner_goes_on_in_the_middle_of_a_turn() -> None:
    async def main() -> None:
        async with in_fragments(snapshot_every=4) as world:
            await world.rounds(5)
            joiner = world.node(9)
            world.nodes.append(joiner)
            await joiner.start()
            assert joiner.outer.height == 5
            await world.rounds(4)
            assert world.equal()
            world.assert_every_step_is_in_once()

    run(main)


def test_the_alpha_merge_gives_up_its_share_of_the_steps_in_between() -> None:
    """w ← alpha·w + (1 − alpha)·new: with alpha 0 local weights are the anchor, and nothing more."""

    async def main() -> None:
        async with World(2, round_spec(outer={"merge": "alpha", "merge_alpha": 0.0})) as world:
            for one, other in [(0, 1), (1, 0)]:
                world.network.set_link(world.nodes[one].name, world.nodes[other].name, Link(0.15, 1e9))
            for node in world.nodes:
                node.step()
                node.step()
            await asyncio.sleep(0.5)
            for node in world.nodes:
                node.step()  # the round is under way
            await world.reach(1)
            for node in world.nodes:
                assert torch.equal(node.weights.weights, node.outer.anchor)
            assert world.equal()

    run(main)


def node_of(world: World, peer: PeerId) -> Node:
    return next(node for node in world.nodes if node.name == peer)


def until_all_have_led(spec: RunSpec, names: list[PeerId]) -> int:
    """How many rounds that takes."""
    leaders, height = set[PeerId](), 0
    while len(leaders) < len(names):
        height += 1
        leaders.add(succession(spec.run_id(), 0, height, names)[0])
    return height


def test_bytes_spread_over_the_turns_and_inner_steps_go_on_as_if_there_were_no_rounds() -> None:
    """Four fragments, links that a round fills for three fifths of the time until the next."""
    size, step_s, steps_apart = 40_960, 0.25, 4

    async def main() -> None:
        spec = round_spec(outer={"fragments": 4, "inner_steps": 4 * steps_apart, "part_bytes": 2048})
        async with World(4, spec, size=size) as world:
            whole_round = 2 * 3 * 4 * size  # each sends 3/4 of its delta, and a quarter to three
            link = Link(0.01, whole_round / 4 / (4 * 3) / (0.6 * steps_apart * step_s))
            for one, other in itertools.permutations(world.nodes, 2):
                world.network.set_link(one.name, other.name, link)
            sent: list[int] = []
            made = until_all_have_led(spec, [node.name for node in world.nodes]) + 2
            for _ in range((made + 20) * steps_apart):
                world.everybody_steps()  # waits for nothing: the clock alone says when
                await asyncio.sleep(step_s)
                sent.append(sum(sum(n.transport.counters().bytes_out.values()) for n in world.nodes))
            settled = sent[made * steps_apart :]  # a leader's first round makes its connections
            windows = [late - early for early, late in zip(settled, settled[steps_apart:], strict=False)]
            assert max(windows) <= 1.1 * whole_round / 4
            assert world.nodes[0].outer.height >= 0.9 * (made + 20), "rounds keep pace with the steps"
            await asyncio.sleep(5)
            world.assert_every_step_is_in_once()

    run(main)
