"""A peer moves to the stage that needs it, in a whole swarm in virtual time; nothing is lost or doubled."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from trainer_world import TrainerWorld, round_spec

from shoal.dht.beats import Beat, StageBeat
from shoal.dht.view import Member, SwarmView
from shoal.node.worker import Worker
from shoal.protocol.errors import HardwareTooSmall
from shoal.protocol.identity import PeerId, Role
from shoal.protocol.virtual_time import run
from shoal.protocol.wire import decode, encode
from shoal.training.spec import RunSpec
from shoal.training.tenure import Tenure


def moving_spec(stages: int) -> RunSpec:
    spec = round_spec(stages, outer={"snapshot_every": 1})
    section = {**spec.stages.model_dump(), "rebalance_window_s": 8.0}
    return RunSpec.model_validate({**spec.model_dump(), "stages": section})


async def at_stages(world: TrainerWorld, wanted: list[int], limit_s: float = 120.0) -> None:
    """Until so many replicas are online at each stage, as everybody sees it."""
    async with asyncio.timeout(limit_s):
        for replica in world.replicas.values():
            await replica.members.wait_for(
                lambda view: [len(view.online(stage)) for stage in range(len(wanted))] == wanted, limit_s
            )


def test_one_of_four_moves_to_the_stage_with_one_replica_and_trains_there(tmp_path: Path) -> None:
    async def main() -> None:
        async with TrainerWorld(moving_spec(2), disk=tmp_path, slower=10.0) as world:
            for number in range(4):
                await world.add(number, 0, moves=True)
            await world.add(4, 1, moves=True)
            before = {number: weakref.ref(one.trainer.weights) for number, one in world.replicas.items()}
            await at_stages(world, [3, 2])
            (mover,) = (
                replica for replica in world.replicas.values() if replica.stage and replica.number < 4
            )
            gc.collect()
            left = [number for number, weights in before.items() if weights() is None]
            assert left == [mover.number], "a stage that was left takes no memory"
            other = world.replicas[4]
            assert mover.heard("prefetched")[0]["height"]  # a snapshot was there to be copied
            height = other.trainer.outer.height
            await mover.reach(height + 6)
            await other.reach(height + 6)
            outer, weights = mover.trainer.outer, mover.trainer.weights
            assert outer.steps_since_round < weights.inner_steps  # the log lists some of its steps
            for stage in range(2):
                group = [r for r in world.replicas.values() if r.stage == stage]
                top = min(r.trainer.outer.height for r in group)
                states = {r.trainer.outer.head for r in group if r.trainer.outer.height == top}
                assert len(states) == 1
            for replica in world.replicas.values():  # P2
                assert replica.trainer.status()["dropped"] == 0

    run(main)


def test_a_balanced_swarm_stays_as_it_is(tmp_path: Path) -> None:
    async def main() -> None:
        async with TrainerWorld(moving_spec(2), disk=tmp_path, slower=10.0) as world:
            for number in range(4):
                await world.add(number, number % 2, moves=True)
            await asyncio.sleep(60.0)
            assert not [replica for replica in world.replicas.values() if replica.heard("moving")]

    run(main)


def test_who_goes_to_an_emptied_stage_need_not_wait_for_a_round_that_nobody_can_make(tmp_path: Path) -> None:
    """Without that stage nobody makes a step, so no round becomes due, in whose entry it would be let go."""

    async def main() -> None:
        async with TrainerWorld(moving_spec(2), disk=tmp_path, slower=10.0, spare_bytes=1 << 30) as world:
            for number in range(3):
                await world.add(number, 0, moves=True)
            for number in range(3, 5):
                await world.add(number, 1)
            await world.heights(3)
            stayed = [world.replicas[number] for number in range(3)]
            async with asyncio.timeout(60.0):
                while not all(g.trainer.heartbeat().guards for g in stayed[:2]):
                    await asyncio.sleep(0.1)
            height = stayed[0].trainer.outer.height
            await asyncio.gather(*(one.reach(height + 1) for one in stayed))
            for number in range(3, 5):
                await world.kill(number)
            begun_s = asyncio.get_running_loop().time()
            await at_stages(world, [2, 1])
            assert asyncio.get_running_loop().time() - begun_s < 30.0
            await world.heights(height + 3)
            (mover,) = world.group(1)
            assert mover.heard("stage-rescued")

    run(main)


class Slow:
    """A term whose drain takes as long as it may."""

    async def recover(self) -> None:
        pass

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def permission(self, hurry: Callable[[], bool]) -> None:
        pass

    async def drain(self, deadline_s: float) -> None:
        await asyncio.sleep(deadline_s)

    async def prefetch(self, stage: int, donors: Sequence[PeerId]) -> None:
        pass

    async def stop_guarding(self, stage: int) -> None:
        pass


class NoMemory(Slow):
    """A term that there is no memory for, though the plan says that there is."""

    async def recover(self) -> None:
        raise HardwareTooSmall("no memory for stage 1: CUDA out of memory")


def test_a_second_stage_that_there_is_no_memory_for_is_refused_once_and_the_first_goes_on() -> None:
    begun: list[int] = []
    events: list[str] = []
    said: list[dict[int, str]] = []

    @contextlib.asynccontextmanager
    async def begin(stage: int) -> AsyncIterator[Slow]:
        begun.append(stage)
        yield NoMemory() if stage else Slow()

    async def main() -> None:
        me = PeerId("me")
        member = Member(
            peer=me,
            roles=frozenset({Role.TRAINER}),
            stages=(0,),
            state="online",
            beat=Beat(stages=(StageBeat(0),), room=1),
        )
        view = SwarmView(me, 0.0, (member,))
        tenure = Tenure(
            moving_spec(2),
            view=lambda: view,
            begin=begin,
            announce=lambda held: said.append(dict(held)),
            prefetch=Slow().prefetch,
            fits=lambda stages: True,
            event=lambda kind, fields: events.append(kind),
            rng=random.Random(1),
            most=2,
        )
        living = asyncio.create_task(tenure.run(0))
        await asyncio.sleep(200.0)
        assert not living.done()
        assert tenure.room == 0
        living.cancel()
        await asyncio.gather(living, return_exceptions=True)

    run(main)
    assert begun == [0, 1]
    assert events.count("take-cut") == 1
    assert said[-1] == {0: "online"}


def test_who_moves_goes_on_to_be_heard() -> None:
    """Found on real processes: who held one stage of three and left for another said that it had room for
    -1 more. No beat of it could be sent, its streams broke, and it stood alone until it was there."""
    said: list[tuple[dict[int, str], Beat]] = []

    @contextlib.asynccontextmanager
    async def begin(stage: int) -> AsyncIterator[Slow]:
        yield Slow()

    async def main() -> None:
        me = PeerId("z")
        stages = {PeerId("a"): 0, PeerId("b"): 0, me: 0, PeerId("c"): 1, PeerId("d"): 1}
        beats = {peer: Beat(stages=(StageBeat(stage),)) for peer, stage in stages.items()}
        members = [Member(peer=peer, stages=(stages[peer],), beat=beat) for peer, beat in beats.items()]
        tenure = Tenure(
            moving_spec(3),
            view=lambda: SwarmView(me, 0.0, tuple(members)),
            begin=begin,
            announce=lambda held: said.append((dict(held), tenure.complete(Beat()))),
            prefetch=Slow().prefetch,
            fits=lambda stages: True,
            event=lambda kind, fields: None,
            rng=random.Random(1),
        )
        living = asyncio.create_task(tenure.run(0))
        while not said or said[-1][0] != {2: "online"}:
            await asyncio.sleep(0.1)
        living.cancel()
        await asyncio.gather(living, return_exceptions=True)

    run(main, limit_s=120.0)
    held = [stages for stages, _ in said]
    assert {0: "draining", 2: "joining"} in held
    for _, beat in said:
        assert decode(Beat, encode(beat)) == beat


def test_who_is_leaving_takes_no_other_stage_meanwhile(tmp_path: Path) -> None:
    """The daemon drains what it holds, and nobody would finish what it began besides."""
    begun: list[int] = []
    said: list[dict[int, str]] = []

    @contextlib.asynccontextmanager
    async def begin(stage: int) -> AsyncIterator[Slow]:
        begun.append(stage)
        yield Slow()

    async def main() -> None:
        me = PeerId("me")
        member = Member(peer=me, stages=(0,), beat=Beat(stages=(StageBeat(0),), room=1))
        view = SwarmView(me, 0.0, (member,))
        tenure = Tenure(
            moving_spec(2),
            view=lambda: view,
            begin=begin,
            announce=lambda held: said.append(dict(held)),
            prefetch=Slow().prefetch,
            fits=lambda stages: True,
            event=lambda kind, fields: None,
            rng=random.Random(1),
            most=2,
        )
        options: Any = SimpleNamespace(decisions=None)
        presence: Any = SimpleNamespace()
        worker: Any = Worker(presence, options, tmp_path, tmp_path, lambda *_: None, None)
        worker._tenure = tenure
        living = asyncio.create_task(tenure.run(0))
        while not tenure.terms:
            await asyncio.sleep(0.1)
        await worker.drain()
        living.cancel()
        await asyncio.gather(living, return_exceptions=True)

    run(main)
    assert begun == [0]
    assert said[-1] == {0: "draining"}, "and says so to the end"
