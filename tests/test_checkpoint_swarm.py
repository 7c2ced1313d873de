"""Checkpoints of a live swarm: written beside training, gathered from all stages, begun from by others."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
import torch
from trainer_world import RandomFeed, Replica, TrainerWorld, round_spec

from shoal.protocol import virtual_time
from shoal.training.checkpoint.gather import Gatherer
from shoal.training.checkpoint.keeper import Keeper
from shoal.training.checkpoint.read import Checkpoint, verify
from shoal.training.checkpoint.reshape import load_stage
from shoal.training.model.layout import stage_layout
from shoal.training.spec import RunSpec


def adam_spec(stages: int, **checkpoint: object) -> RunSpec:
    spec = round_spec(stages, optimizer="adamw", learning_rate=0.01)
    return RunSpec.model_validate(spec.model_dump() | {"checkpoint": {"every_s": 0.0, **checkpoint}})


async def _inline(function: object, *arguments: object) -> object:
    assert callable(function)
    return function(*arguments)


def gatherer(world: TrainerWorld, by: Replica, folder: Path) -> Gatherer:
    return Gatherer(
        world.spec,
        transport=by.trainer._transport,
        replicas=lambda stage: [member.peer for member in by.members.view().online(stage)],
        folder=folder,
        offload=_inline,
        event=lambda kind, data: by.events.append((0.0, kind, data)),
        rng=random.Random(1),
    )


def keeper_of(replica: Replica) -> Keeper:
    assert replica.trainer.keeper is not None
    return replica.trainer.keeper


def whole_state(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Every parameter's weights and outer momentum."""
    layout = stage_layout(checkpoint.spec, range(checkpoint.spec.model.layers))
    state = load_stage(checkpoint, checkpoint.spec, layout)
    found = {}
    for slot in layout.slots:
        found[slot.name] = slot.view(state.weights).numpy().tobytes()
        found[f"{slot.name}/momentum"] = slot.view(state.momentum).numpy().tobytes()
    return found


def state_of(group: list[Replica]) -> dict[str, bytes]:
    """The same of replicas, one a stage."""
    found = {}
    for replica in group:
        outer = replica.trainer.outer
        for slot in replica.trainer.layout.slots:
            found[slot.name] = slot.view(outer.anchor).numpy().tobytes()
            found[f"{slot.name}/momentum"] = slot.view(outer.momentum).numpy().tobytes()
    return found


async def trained(world: TrainerWorld, stages: int, height: int, replicas: int = 1) -> None:
    for number in range(stages * replicas):
        await world.add(number, number % stages)
    await world.heights(height)


async def stand_still(world: TrainerWorld) -> None:
    for replica in world.replicas.values():
        if replica.task is not None:
            replica.task.cancel()
            await asyncio.gather(replica.task, return_exceptions=True)


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_a_gathered_checkpoint_is_the_swarm_s_state_under_one_vector_of_heads(
    tmp_path: Path, stages: int
) -> None:
    async def main() -> None:
        async with TrainerWorld(adam_spec(stages), disk=tmp_path) as world:
            await trained(world, stages, 4, replicas=2)
            seen: list[tuple[int, int]] = []
            checkpoint = await gatherer(world, world.replicas[0], tmp_path / "all").gather(
                lambda done, total: seen.append((done, total))
            )
            verify(checkpoint)
            assert checkpoint.whole
            assert seen[-1][0] == seen[-1][1] > 0
            assert len(checkpoint.manifest.parts) == stages
            for part in checkpoint.manifest.parts:
                assert part.height >= 4
                assert part.inner_steps > 0
                heads = {r.trainer.outer.head.hex(): r for r in world.group(part.stage)}
                if part.head in heads:  # nobody made a round since
                    assert heads[part.head].trainer.outer.state_root.hex() == part.state_root
            await world.heights(6)

    virtual_time.run(main)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 4), (4, 2), (2, 2)])
def test_a_run_starts_from_a_checkpoint_cut_otherwise_and_goes_on(
    tmp_path: Path, before: int, after: int
) -> None:
    """P7: bit-equal at the start; counters and data positions go on; every peer gets its stage from peers."""

    async def save() -> Checkpoint:
        async with TrainerWorld(adam_spec(before), disk=tmp_path / "before") as world:
            await trained(world, before, 5)
            await stand_still(world)
            checkpoint = await gatherer(world, world.replicas[0], tmp_path / "store").gather()
            assert whole_state(checkpoint) == state_of(list(world.replicas.values()))
            assert world.replicas[0].trainer.outer.tokens == checkpoint.manifest.log_tokens > 0
            return checkpoint

    checkpoint = virtual_time.run(save)

    async def start() -> None:
        spec = adam_spec(after, start=checkpoint.digest)
        async with TrainerWorld(spec, disk=tmp_path / "after") as world:
            feed = RandomFeed(spec, 0)
            await world.add(0, 0, feed, run=False, imported=tmp_path / "store")
            for number in range(1, after):
                await world.add(number, number, run=False)
            group = list(world.replicas.values())
            assert state_of(group) == whole_state(checkpoint)
            for replica in group:
                outer = replica.trainer.outer
                assert (outer.height, outer.tokens) == (0, checkpoint.manifest.log_tokens)
                weights = replica.trainer.weights
                moments = await weights.moments(_inline)
                stored = load_stage(checkpoint, spec, replica.trainer.layout).moments
                assert moments is not None
                assert stored is not None
                assert moments.steps == stored.steps > 0
                assert torch.equal(moments.mean, stored.mean)
                assert torch.equal(moments.square, stored.square)
            assert feed.position()[1] > 0, "a stream goes on behind what the run before had read of it"
            for replica in group:
                replica.task = asyncio.create_task(replica.trainer.run())
            await world.heights(3)
            first = world.group(0)[0].trainer
            assert first.outer.tokens > checkpoint.manifest.log_tokens
            for stage in range(after):
                await world.add(10 + stage, stage)
            await world.kill(0)  # the owner vanishes: whoever comes gets the start from those who are there
            joiner = await world.add(20, 0)
            await world.heights(max(r.trainer.outer.height for r in world.group(0)) + 2)
            assert joiner.heard("start-fetched")

    virtual_time.run(start)
