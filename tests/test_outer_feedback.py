"""Error feedback: below 8 bits nothing is lost, it comes later; residuals change only with a commit."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from outer_faults import Faults
from outer_world import Node, World, round_spec

from shoal.protocol.identity import PeerId
from shoal.protocol.virtual_time import run
from shoal.training.outer.entry import SKIP
from shoal.training.outer.messages import PublishedPart
from shoal.training.spec import RunSpec

FAMILIES = ["int4", "onebit", "topk8"]


def spec_of(family: str, *, feedback: bool = True, published: str = "", **outer: object) -> RunSpec:
    """Outer rate 1 without momentum: the anchor moves by exactly what is published."""
    return round_spec(
        outer={"learning_rate": 1.0, "momentum": 0.0, "nesterov": False, **outer},
        compression={
            "contribution": family,
            "published": published or ("int4" if family == "topk8" else family),
            "warmup_rounds": 0,
            "feedback": feedback,
        },
    )


def listed_steps(node: Node) -> torch.Tensor:
    """Sum of a node's steps that the log holds, fragment by fragment."""
    total = torch.zeros(node.weights.size, dtype=torch.float64)
    for fragment in node.outer._context.fragments:
        end, _ = node.outer._replica.log.end_of(node.name, node.incarnation, fragment.index)
        for change in node.changes[:end]:
            total[fragment.span] += change[fragment.span]
    return total


def whole(world: World, kept: dict[int, torch.Tensor]) -> torch.Tensor:
    """Residuals of parts, as one vector."""
    vector = torch.zeros(world.genesis.numel(), dtype=torch.float64)
    for fragment in world.nodes[0].outer._context.fragments:
        for part in fragment.parts:
            if part.index in kept:
                vector[part.span] = kept[part.index].double()
    return vector


def missing(world: World) -> torch.Tensor:
    """Mean of all listed steps, less what the anchor took up, less what the residuals of both legs hold."""
    moved = world.nodes[0].outer.anchor.double() - world.genesis.double()
    nodes = world.nodes
    steps = torch.stack([listed_steps(node) for node in nodes]).mean(0)
    carried = torch.stack([whole(world, n.outer._replica.residuals._contributed) for n in nodes]).mean(0)
    owed = sum(whole(world, n.outer._replica.residuals._published) for n in nodes)
    return steps - moved + carried + owed  # deltas are minus steps


async def even_rounds(world: World, count: int) -> None:
    """Rounds to which everybody contributes two steps of equal weight."""
    for _ in range(count):
        height = world.nodes[0].outer.height
        world.everybody_steps()
        world.everybody_steps()
        await world.reach(height + 1)


@pytest.mark.parametrize("fragments", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_rounding_leaves_out_is_kept_to_the_last_bit(family: str, fragments: int) -> None:
    async def main() -> None:
        async with World(3, spec_of(family, fragments=fragments)) as world:
            await even_rounds(world, 4 * fragments + 1)
            assert world.equal()
            lost = missing(world)
            torch.testing.assert_close(lost, torch.zeros_like(lost), rtol=0, atol=1e-5)
            assert all(dict(node.outer._replica.residuals._contributed) for node in world.nodes)

    run(main)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_feedback_it_is_lost(family: str) -> None:
    async def main() -> None:
        async with World(3, spec_of(family, feedback=False)) as world:
            await even_rounds(world, 4)
            assert world.equal()
            assert missing(world).abs().max() > 1e-3

    run(main)


def test_a_skipped_part_leaves_every_residual_as_it_was() -> None:
    faults = Faults()

    async def main() -> None:
        async with World(4, spec_of("onebit"), wrap=faults.wrap) as world:
            await even_rounds(world, 2)
            before = {n.name: dict(n.outer._replica.residuals._contributed) for n in world.nodes}

            def strike(peer: PeerId) -> None:
                world.kill(next(node for node in world.nodes if node.name == peer))

            faults.arm(PublishedPart, "before", strike)
            world.everybody_steps()
            world.everybody_steps()
            async with asyncio.timeout(20):
                while faults.hit is None:
                    await asyncio.sleep(0.01)
            await world.reach(3)
            survivor = next(iter(world.live.values()))
            entry = survivor.outer.entry(3)
            assert entry is not None
            skipped = [part for part in range(entry.parts) if entry.digest(part) == SKIP]
            assert skipped
            for node in world.live.values():
                now = dict(node.outer._replica.residuals._contributed)
                for part in range(entry.parts):
                    assert torch.equal(now[part], before[node.name][part]) == (part in skipped)
            await world.rounds(2)
            assert world.equal()

    run(main)


def test_a_part_that_gets_another_owner_drops_its_residual_and_says_so() -> None:
    async def main() -> None:
        async with World(2, spec_of("onebit")) as world:
            await even_rounds(world, 2)
            for number in (7, 8, 9):
                joiner = world.node(number)
                world.nodes.append(joiner)
                await joiner.start()
            await even_rounds(world, 2)
            assert world.equal()
            assert sum(node.outer._replica.residuals.handed_over for node in world.nodes) > 0

    run(main)


def test_a_warm_up_goes_in_int8() -> None:
    spec = round_spec(
        compression={"contribution": "onebit", "published": "onebit", "warmup_rounds": 2},
    )

    async def main() -> None:
        async with World(2, spec) as world:
            await world.rounds(4)
            tags = [entry.contribution.split("/")[0] for entry in world.entries()]
            assert tags == ["int8", "int8", "onebit", "onebit"]
            assert world.equal()

    run(main)


@pytest.mark.parametrize("gone_with", ["nothing", "the process itself", "the next process"])
def test_a_restart_takes_the_residual_up_unless_it_has_gone_already(tmp_path: Path, gone_with: str) -> None:
    async def main() -> None:
        async with World(3, spec_of("onebit")) as world:
            old = world.node(8, directory=tmp_path)
            world.nodes.append(old)
            await old.start()
            await even_rounds(world, 3)
            carried = whole(world, dict(old.outer._replica.residuals._contributed))
            assert carried.abs().max() > 0
            file = residual_file(tmp_path)
            before = file.read_bytes()
            if gone_with == "the process itself":
                await even_rounds(world, 1)
            await old.stop()
            if gone_with == "the next process":
                old = world.node(8, incarnation=2, directory=tmp_path)
                world.nodes[-1] = old
                await old.start()
                assert torch.equal(whole(world, dict(old.outer._replica.residuals._contributed)), carried)
                await even_rounds(world, 1)
                await old.stop()
            file.write_bytes(before)  # killed before its disk knew of a round
            again = world.node(8, incarnation=3, directory=tmp_path)
            world.nodes[-1] = again
            await again.start()
            restored = whole(world, dict(again.outer._replica.residuals._contributed))
            assert torch.equal(restored, carried if gone_with == "nothing" else torch.zeros_like(restored))
            await even_rounds(world, 1)
            assert world.equal()

    run(main)


def residual_file(folder: Path) -> Path:
    return next(folder.rglob("residual-00.safetensors"))


@pytest.mark.parametrize("family", ["int8", "onebit"])
def test_an_entropy_coder_behind_the_codec_changes_nothing_but_the_bytes(family: str) -> None:
    async def anchors(entropy: str) -> torch.Tensor:
        codecs = {"contribution": family, "published": family, "warmup_rounds": 0, "entropy": entropy}
        async with World(3, round_spec(compression=codecs)) as world:
            await world.rounds(4)
            assert world.equal()
            assert world.entries()[0].published.endswith("+zlib") == (entropy == "zlib")
            return world.nodes[0].outer.anchor

    assert torch.equal(run(anchors("none")), run(anchors("zlib")))
